"""NF4, 4-bit NormalFloat with double quantisation (arXiv:2305.14314 sec. 3), and products with such weights.

    packed = pack(linear.weight)                 # 4.127 bits a weight
    y = nf4_linear(x, packed)                    # x @ unpack(packed).T, with x's gradient; W has none

A weight is read row by row as blocks of 64. Each value is the nearest of 16 levels times its block's
largest magnitude; two codes share a byte, the earlier one in the high half. The magnitudes, less their mean,
are again blocks of 256 of 8-bit codes: signed numbers with a decimal exponent (arXiv:2110.02861 sec. 2.2)
times the block's largest magnitude, in fp32. So bitsandbytes lays weights out too (load_in_4bit, quant type
nf4, double quantisation).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import FP32_DOTS, jit, tl, triton, use_triton
from kernels.linear import product

# Quantiles of the normal distribution, seven below and eight above zero: arXiv:2305.14314 appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
BLOCK, GROUP = 64, 256  # weights that share a magnitude, magnitudes that share a scale
CHUNK = 1 << 16  # weights unpacked at a time on a CPU: they stay in its cache
FEW_ROWS = 16  # up to so many rows of x the codes are read inside the product


class Packed(NamedTuple):
    """A weight (N, K) in 4 bits; with double quantisation."""

    codes: Tensor  # uint8, one for two weights
    scales: Tensor  # uint8, one for each block of 64
    coarse: Tensor  # fp32, one for 256 scales
    middle: Tensor  # fp32, one number: the mean magnitude
    shape: tuple[int, int]


@functools.cache
def byte_levels() -> Tensor:
    """The 256 values of an 8-bit scale, ascending: +-10^(e-6) times the middle of one of 2^e equal parts of
    (0.1, 1) for e = 0 .. 6, zero and one."""
    found = [0.0, 1.0]
    for e in range(7):
        for i in range(2**e):
            value = 10.0 ** (e - 6) * (0.1 + 0.9 * (i + 0.5) / 2**e)
            found += [value, -value]
    return torch.tensor(sorted(found))


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, byte levels, and for each byte of two codes its two levels as one 64-bit number."""
    levels = torch.tensor(LEVELS, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), 1)
    return levels, byte_levels().to(device), pairs.view(torch.int64).flatten()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Which of the ascending levels is nearest, uint8; the lower one in the middle."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """The numbers of x as rows of `size`, the last one filled with zeros."""
    x = x.reshape(-1)
    return F.pad(x, (0, -len(x) % size)).view(-1, size)


def scaled(x: Tensor, largest: Tensor) -> Tensor:
    """Rows of x over their largest magnitudes; zero where all is zero."""
    return x / torch.where(largest > 0, largest, 1.0)[:, None]


def pack(weight: Tensor) -> Packed:
    """The nearest NF4 weight, on the weight's device."""
    levels, bytes_, _ = tables(weight.device)
    flat, codes, magnitudes = weight.reshape(-1), [], []
    chunk = CHUNK if weight.device.type == "cpu" else 256 * CHUNK
    for start in range(0, len(flat), chunk):  # whole blocks: fp32 copies of a few at a time
        x = blocks_of(flat[start : start + chunk].float(), BLOCK)
        magnitudes.append(x.abs().amax(1))
        code = nearest(scaled(x, magnitudes[-1]), levels).view(-1, 2)
        codes.append(code[:, 0] << 4 | code[:, 1])
    magnitudes = torch.cat(magnitudes)
    middle = magnitudes.double().mean().float()  # the same in any order of summing
    groups = blocks_of(magnitudes - middle, GROUP)
    coarse = groups.abs().amax(1)
    scales = nearest(scaled(groups, coarse), bytes_).flatten()[: len(magnitudes)]
    return Packed(torch.cat(codes)[: (len(flat) + 1) // 2], scales, coarse, middle, tuple(weight.shape))


def sizes(shape: tuple[int, int]) -> tuple[int, int, int]:
    """How many codes, scales and coarse scales a weight of this shape has."""
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    return (count + 1) // 2, blocks, -(-blocks // GROUP)


def unpack_ref(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (N, K): level times magnitude in fp32, rounded once to dtype."""
    codes, scales, coarse, middle, (N, K) = packed
    _, bytes_, pairs = tables(codes.device)
    every = coarse.repeat_interleave(GROUP)[: len(scales)]
    magnitudes = (bytes_[scales.int()] * every + middle)[:, None]
    out = torch.empty(len(scales) * BLOCK, dtype=dtype, device=codes.device)
    codes = F.pad(codes, (0, len(scales) * BLOCK // 2 - len(codes)))
    # a GPU takes the weight at once, a CPU what fits its cache
    chunk = CHUNK if codes.device.type == "cpu" else len(out)
    for start in range(0, len(out), chunk):
        bytes_here = codes[start // 2 : (start + chunk) // 2].int()
        x = pairs.index_select(0, bytes_here).view(torch.float32).view(-1, BLOCK)
        torch.mul(
            x,
            magnitudes[start // BLOCK : (start + chunk) // BLOCK],
            out=out[start : start + chunk].view(-1, BLOCK),
        )
    return out[: N * K].view(N, K)


def nf4_linear_ref(x: Tensor, packed: Packed) -> Tensor:
    return F.linear(x, unpack_ref(packed, x.dtype))


@jit
def _magnitude(scales, coarse, bytes_, middle, block, mask):
    """Of these blocks of 64."""
    scale = tl.load(bytes_ + tl.load(scales + block, mask=mask, other=0).to(tl.int32))
    return scale * tl.load(coarse + block // 256, mask=mask, other=0.0) + tl.load(middle)


@jit
def _unpack(codes, scales, coarse, middle, levels, bytes_, out, size, COUNT: tl.constexpr):
    """COUNT bytes, 2 * COUNT weights, a program."""
    i = tl.cast(tl.program_id(0), tl.int64) * COUNT + tl.arange(0, COUNT)
    byte = tl.load(codes + i, mask=2 * i < size, other=0).to(tl.int32)
    magnitude = _magnitude(scales, coarse, bytes_, middle, i // 32, 2 * i < size)
    high, low = tl.load(levels + (byte >> 4)) * magnitude, tl.load(levels + (byte & 15)) * magnitude
    j = tl.cast(tl.program_id(0), tl.int64) * COUNT * 2 + tl.arange(0, 2 * COUNT)
    tl.store(out + j, tl.interleave(high, low).to(out.dtype.element_ty), mask=j < size)


@jit
def _few_rows(
    x,
    codes,
    scales,
    coarse,
    middle,
    levels,
    bytes_,
    y,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (M, N) = x (M, K) W^T for at most ROWS rows of x; a program has COLUMNS of the N.

    A byte holds neighbouring columns of W: the even ones and the odd ones are two products, which are added,
    so that nothing has to be put in order.
    """
    m, n = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, 32)  # bytes of one block of 64
    here = (n < N)[:, None]
    row = tl.cast(n, tl.int64)[:, None] * K
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, 64):
        byte = tl.load(codes + (row + start) // 2 + k[None, :], mask=here, other=0).to(tl.int32)
        magnitude = _magnitude(scales, coarse, bytes_, middle, (row + start) // 64, here)
        even = (tl.load(levels + (byte >> 4)) * magnitude).to(x.dtype.element_ty)
        odd = (tl.load(levels + (byte & 15)) * magnitude).to(x.dtype.element_ty)
        places = x + m[:, None] * K + start + 2 * k[None, :]
        x_even = tl.load(places, mask=(m < M)[:, None], other=0.0)
        x_odd = tl.load(places + 1, mask=(m < M)[:, None], other=0.0)
        total = tl.dot(x_even, tl.trans(even), total, input_precision=PRECISION)
        total = tl.dot(x_odd, tl.trans(odd), total, input_precision=PRECISION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=mask)


def unpack(packed: Packed, dtype: torch.dtype, impl: str = "auto") -> Tensor:
    """The weight (N, K) in dtype."""
    if not use_triton(impl, packed.codes):
        return unpack_ref(packed, dtype)
    (N, K), (levels, bytes_, _) = packed.shape, tables(packed.codes.device)
    out = torch.empty(N, K, dtype=dtype, device=packed.codes.device)
    _unpack[(triton.cdiv(N * K, 2048),)](*packed[:4], levels, bytes_, out, N * K, COUNT=1024)
    return out


def _product(x: Tensor, packed: Packed, impl: str) -> Tensor:
    (N, K), rows = packed.shape, x.numel() // max(1, x.shape[-1])
    # a product of many rows reads the weight several times: unpacked once, it is an ordinary product
    if not use_triton(impl, x) or not 0 < rows <= FEW_ROWS or K % BLOCK:
        return product(x, unpack(packed, x.dtype, impl))
    levels, bytes_, _ = tables(x.device)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    _few_rows[(triton.cdiv(N, 32),)](
        *(x.contiguous(), *packed[:4], levels, bytes_, y, rows, N, K),
        ROWS=FEW_ROWS,
        COLUMNS=32,
        PRECISION=FP32_DOTS,
    )
    return y


class _NF4Linear(torch.autograd.Function):
    """Keeps nothing: the backward pass unpacks the weight again."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Packed, impl: str) -> Tensor:
        ctx.packed, ctx.impl = packed, impl
        return _product(x, packed, impl)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ unpack(ctx.packed, dy.dtype, ctx.impl), None, None


def nf4_linear(x: Tensor, packed: Packed, impl: str = "auto") -> Tensor:
    """x (..., K) times a packed weight (N, K) -> (..., N), in x's dtype; for gradients of x alone."""
    return _NF4Linear.apply(x, packed, impl)
