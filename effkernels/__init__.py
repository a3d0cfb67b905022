"""Fused Triton kernels for MBConv blocks. Importing this package touches no GPU and does not import Triton."""

__version__ = "0.1.0"
