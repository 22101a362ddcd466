"""RMSNorm (arXiv:1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) / rms(x) * weight: fp32 inside, rounded to x's dtype BEFORE the weight is applied, as Qwen does."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight
