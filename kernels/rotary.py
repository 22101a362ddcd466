"""Rotary position embedding, rotate-half convention
(arXiv:2104.09864): channel j turns with channel j + D/2."""

import torch
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if cos.dim() == 3:
        return torch.cat(
            [rotary_ref(half, c, s) for half, c, s in zip(x.chunk(2, dim=-1), cos, sin, strict=True)], dim=-1
        )
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@jit(do_not_specialize=["T"])  # another one in every step
def _rotary(
    x,
    cos,
    sin,
    y,
    T,
    H,
    stride_t,
    stride_h,
    direction,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """All heads of one token a program (of half a head each, where PARTS is 2). direction -1 turns back."""
    t, part = tl.program_id(0), tl.program_id(1)
    heads, channels = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    angle = (tl.cast(part, tl.int64) * T + t) * HALF + channels
    c = tl.load(cos + angle, mask=channels < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=channels < HALF, other=0.0)[None, :] * direction
    # a multiple of 8 elements: 16 bytes are copied at once
    place = tl.multiple_of(heads * stride_h, 8)[:, None]
    heads, channels = heads[:, None], channels[None, :]
    inside = (heads < H) & (channels < HALF)
    source = x + tl.cast(t, tl.int64) * stride_t + place + part * 2 * HALF + channels
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y + (tl.cast(t, tl.int64) * H + heads) * (2 * HALF * PARTS) + part * 2 * HALF + channels
    tl.store(target, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, turn) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return ctx.turn(dy, *ctx.saved_tensors, -1.0), None, None, None


def _turn_plain(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """In three passes and one new tensor; rotary_ref makes seven, and autograd twice as many behind it."""
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    # (P, T, D/2P) -> (T, 1, P, D/2P), beside (T, H, P, 2, D/2P): the two halves that turn together
    cos, sin = (angles.transpose(0, 1)[:, None] for angles in (cos, sin))
    halves = x.unflatten(-1, (cos.shape[2], 2, -1))
    y = torch.mul(halves, cos[..., None, :], out=torch.empty(halves.shape, dtype=cos.dtype, device=x.device))
    a, b = halves.unbind(-2)
    y[..., 0, :].addcmul_(b, sin, value=-direction)
    y[..., 1, :].addcmul_(a, sin, value=direction)
    return y.view(x.shape).to(x.dtype)


def _turn_triton(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    T, H, D = x.shape
    if x.stride(2) != 1 or x.stride(1) % 8 or D % 8:
        x = x.contiguous()
    y = torch.empty(T, H, D, dtype=x.dtype, device=x.device)
    parts, half = (2 if cos.dim() == 3 else 1), cos.shape[-1]
    if T:
        _rotary[(T, parts)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            y,
            T,
            H,
            x.stride(0),
            x.stride(1),
            direction,
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            BLOCK_H=triton.next_power_of_2(H),
            PARTS=parts,
        )
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor, impl: str = "auto") -> Tensor:
    """x (T, H, D) turned by the angles of cos and sin (T, D/2), both fp32. Computed in fp32, returned in x's
    dtype.

    With cos and sin (2, T, D/4) each half of a head is turned by its own position (ChatGLM's 2-D positions).
    """
    if use_triton(impl, x):
        return _Rotary.apply(x, cos, sin, _turn_triton)
    if impl == "ref" or torch.compiler.is_compiling():  # the compiler fuses the definition by itself
        return rotary_ref(x, cos, sin)
    return _Rotary.apply(x, cos, sin, _turn_plain)
