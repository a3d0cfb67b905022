"""Plain PyTorch twins of the fused operators: the CPU path, the fallback, and the truth the tests compare with."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


def drop_path_mask(n: int, rate: float, device) -> torch.Tensor:
    """One draw per sample, ``bernoulli(1 - rate) / (1 - rate)``, fp32 [N]: drawn here by both paths, so masks agree bit for bit."""
    keep = 1.0 - rate
    return torch.empty(n, dtype=torch.float32, device=device).bernoulli_(keep).div_(keep)


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth per sample (Huang et al., 2016): x [N, ...] times ``drop_path_mask``; identity in eval or at rate 0."""
    if rate == 0.0 or not training:
        return x
    mask = drop_path_mask(x.shape[0], rate, x.device)
    return x * mask.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
