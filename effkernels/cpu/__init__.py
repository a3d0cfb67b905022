"""Inference on a CPU: oneDNN's convolutions, with BatchNorm folded in and the activation or the sum after them."""
