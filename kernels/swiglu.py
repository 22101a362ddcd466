"""SwiGLU's gate (arXiv:2002.05202). The Triton kernel keeps nothing for the backward but its two inputs.

There is no kernel for GELU: torch's own is one pass each way already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton

BLOCK = 2048  # elements a program, 16 a thread


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@jit
def _swiglu_forward(gate, up, y, size, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=i < size)


@jit
def _swiglu_backward(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < size, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(dgate + i, (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=i < size)
    tl.store(dup + i, (d * g * sigmoid).to(dup.dtype.element_ty), mask=i < size)


def _launch(fn, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    if size:
        fn[(triton.cdiv(size, BLOCK),)](*tensors, size, BLOCK=BLOCK)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _launch(_swiglu_forward, gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _launch(_swiglu_backward, gate, up, dy.contiguous(), dgate, dup)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up, both (..., C) of one dtype."""
    return _SwiGLU.apply(gate, up) if use_triton(impl, gate) else swiglu_ref(gate, up)
