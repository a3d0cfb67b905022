"""nn.Modules over the fused operators. Nothing here imports Triton."""
