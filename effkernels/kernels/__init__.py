"""Triton kernels, one file per operator: jitted kernels first, then the launchers that allocate. Nothing else knows
pointers.

Importing this package imports Triton; ``effkernels.dispatch`` is the only gate to it.
"""
