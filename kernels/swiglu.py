"""SwiGLU's gate (arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., C)."""
    return F.silu(gate) * up
