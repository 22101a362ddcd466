"""RMSNorm (arXiv:1910.07467). One Triton pass over the rows instead of five.

There is no kernel for LayerNorm: torch's own is one pass already.
"""

import torch
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


class _PlainRMSNorm(torch.autograd.Function):
    """The same without Triton: 2 passes forward and 7 backward, where autograd takes 6 and 16 over more
    tensors. Kept are x and a number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.float()
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scales = (norms.square_().div_(x.shape[-1])).add_(eps).rsqrt_()  # (..., 1): 1 / rms
        ctx.save_for_backward(x, weight, scales)
        return (rows * scales).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, scales = ctx.saved_tensors
        C = x.shape[-1]
        normed, grads = x.float() * scales, dy.float()
        w = weight.float()
        # of the weight, where the forward pass multiplied what it had rounded
        shares = grads * normed.to(x.dtype)
        dw = shares.view(-1, C).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        means = (shares.view(-1, C) @ w).view(scales.shape).div_(C)
        # d(normed) = grads * w, less its part along the row: a longer row has the same normed values
        dx = torch.addcmul(grads * w, normed, means, value=-1).mul_(scales)
        return dx.to(x.dtype), dw, None


@jit
def _rms_norm_forward(x, weight, y, scales, C, stride_x, eps, BLOCK: tl.constexpr):
    """One row a program. scales (N,): 1 / rms."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < C
    values = tl.load(x + tl.cast(row, tl.int64) * stride_x + channels, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / C + eps)
    tl.store(scales + row, scale)
    normed = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + tl.cast(row, tl.int64) * C + channels, (normed * w).to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_rows", "rows_each"])  # another one in every step
def _rms_norm_backward(
    x, weight, dy, scales, dx, dw, num_rows, rows_each, C, stride_x, BLOCK: tl.constexpr, WEIGHT: tl.constexpr
):
    """rows_each rows a program; dw (programs, C) is its share of the weight's gradient, if WEIGHT."""
    channels = tl.arange(0, BLOCK)
    inside = channels < C
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        values = tl.load(x + tl.cast(row, tl.int64) * stride_x + channels, mask=inside, other=0.0).to(
            tl.float32
        )
        grads = tl.load(dy + tl.cast(row, tl.int64) * C + channels, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normed = values * scale
        if WEIGHT:
            share += grads * normed.to(x.dtype.element_ty).to(tl.float32)
        grads *= w
        values = (grads - normed * (tl.sum(grads * normed, 0) / C)) * scale
        tl.store(dx + tl.cast(row, tl.int64) * C + channels, values.to(dx.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dw + tl.cast(tl.program_id(0), tl.int64) * C + channels, share, mask=inside)


def warps(block: int) -> int:
    """16 channels a thread."""
    return min(16, max(4, block // 512))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C = x.shape[-1]
        rows = x.reshape(-1, C)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
        scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(C)
        if len(rows):
            _rms_norm_forward[(len(rows),)](
                rows, weight, y, scales, C, rows.stride(0), eps, BLOCK=block, num_warps=warps(block)
            )
        ctx.save_for_backward(rows, weight, scales)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        rows, weight, scales = ctx.saved_tensors
        (N, C), need_weight = rows.shape, ctx.needs_input_grad[1]
        rows_each = max(1, triton.cdiv(N, 512)) if need_weight else 1
        programs = triton.cdiv(N, rows_each)
        dx = torch.empty(N, C, dtype=rows.dtype, device=rows.device)
        dw = torch.empty(programs if need_weight else 0, C, dtype=torch.float32, device=rows.device)
        block = triton.next_power_of_2(C)
        if N:
            _rms_norm_backward[(programs,)](
                rows,
                weight,
                dy.contiguous(),
                scales,
                dx,
                dw,
                N,
                rows_each,
                C,
                rows.stride(0),
                BLOCK=block,
                WEIGHT=need_weight,
                num_warps=warps(block),
            )
        return dx.view(dy.shape), dw.sum(0).to(weight.dtype) if need_weight else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x (..., C) / rms(x) * weight: fp32 inside, rounded to x's dtype BEFORE the weight is applied, as Qwen
    does."""
    if use_triton(impl, x):
        return _RMSNorm.apply(x, weight, eps)
    if impl == "ref" or torch.compiler.is_compiling():  # the compiler fuses the definition by itself
        return rms_norm_ref(x, weight, eps)
    return _PlainRMSNorm.apply(x, weight, eps)
