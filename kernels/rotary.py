"""Rotary position embedding, rotate-half convention (arXiv:2104.09864): channel j turns with channel j + D/2."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D) turned by the angles of cos and sin (T, D/2), both fp32. Computed in fp32, returned in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
