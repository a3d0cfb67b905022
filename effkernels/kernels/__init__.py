"""Triton kernels, one file an operator: jitted kernels first, then the launchers that allocate. Nothing else knows
pointers. A large operator has a file for each direction, and one for what they share.

Importing this package imports Triton; ``effkernels.dispatch`` is the only gate to it.
"""
