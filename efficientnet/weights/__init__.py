"""Weights: networks by name with theirs, checkpoints of this and other libraries, published sets, export to other
programs.
"""
