"""Dropout whose mask is a hash of (row key, channel, seed) and nothing else, made where it is used.

    with dropout_rows(batch.dropout_keys):              # the model says whose rows its adapters see
        x = block(x, ctx)

The keys travel with the data (data.collate: a hash of seed, epoch, sample, position), so the mask is the
same in any packing, layout, number of processes and recomputation: there is no state to save, and nothing is
kept for the backward pass, which hashes again. The Triton kernel hashes and multiplies in one launch. On a
CPU, numpy does it in place on blocks that fit a core's cache: (512, 1024) take 0.3 ms instead of 3.8 ms of
one core by `dropout_ref`, which makes a whole tensor at each of its 14 steps.
"""

import contextlib
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kernels.dispatch import jit, tl, triton, use_triton
from kernels.norm import warps

BLOCK = 1 << 15  # hashes in a block of numpy's: with its scratch and the inputs 0.5 MB
KEY_STEP = 0x9E3779B97F4A7C1  # between the keys of an image's rows


@dataclass(frozen=True)
class Mask:
    """Which entries of rows (..., C) are kept, each with probability 1 - p."""

    keys: Tensor  # int64: one for each row, or one for each of `images`, whose rows follow one another
    p: float
    seed: int  # of the place in the model
    first_channel: int = 0  # of the rows' C, where a tensor-parallel rank has a slice of the layer's
    images: int = 0


def mix(x: Tensor) -> Tensor:
    """murmur3's finaliser on int32. `>>` copies the sign bit, so the copies are masked off."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)


def keys_of_rows(keys: Tensor, count: int, salt: int = 0) -> Tensor:
    """One key an image (N,) -> one for each of its `count` rows (N*count,)."""
    place = torch.arange(count, device=keys.device)
    return (keys[:, None] + (place + 1) * KEY_STEP + salt * 0x5851F42D4C957F2).flatten()


def dropout_mask(x: Tensor, mask: Mask) -> Tensor:
    """Booleans, shape of x: the definition."""
    C, keys = x.shape[-1], mask.keys
    if mask.images:
        keys = keys_of_rows(keys, rows_each(x, mask))
    rows_each(x, mask)
    return (random_bits(keys, C, mask.seed, mask.first_channel) >= threshold(mask) - 32768).view(x.shape)


def random_bits(keys: Tensor, C: int, seed: int, first: int = 0) -> Tensor:
    """(rows, C) int16: a hash of each row's key, channels from `first` on, and the place in the model."""
    low, high = keys.contiguous().view(torch.int32).view(-1, 2).unbind(1)  # int64 -> two halves
    row = mix(mix(low + mix(torch.full_like(low, seed))) ^ high)
    # two channels share one 32-bit hash, 16 bits each: half the work, and p is exact to 1/65536
    pairs = torch.arange(first // 2, (first + C + 1) // 2, device=keys.device, dtype=torch.int32)
    bits = mix(row[:, None] ^ mix(pairs + 1)).view(torch.int16)[:, first % 2 :]  # (rows, C or C + 1)
    return bits[:, :C]


def uniform(keys: Tensor, C: int, seed: int) -> Tensor:
    """(rows, C) fp32, evenly between -1 and 1."""
    return (random_bits(keys, C, seed).float() + 0.5) / 32768


def threshold(mask: Mask) -> int:
    """Of 16 random bits: below it an entry is dropped."""
    return round(mask.p * 65536)


def rows_each(x: Tensor, mask: Mask) -> int:
    """How many rows of x a key is for."""
    rows, keys = x.numel() // x.shape[-1], len(mask.keys)
    if mask.images:
        assert keys == mask.images and rows % keys == 0, (
            f"{rows} rows of {mask.images} images, but dropout keys of {keys}"
        )
        return rows // keys
    assert rows == keys, f"{rows} rows, but dropout keys of {keys}"
    return 1


def dropout_ref(x: Tensor, mask: Mask, divisor: float = 1.0) -> Tensor:
    return x * dropout_mask(x, mask) / divisor


# --------------------------------------------------------------------------------------------------
# CPU


def _mix(x: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """`mix` in place, on uint32."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        np.right_shift(x, shift, out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        if factor:
            np.multiply(x, np.uint32(factor), out=x)
    return x


def _mixed(x: np.ndarray) -> np.ndarray:
    return _mix(x, np.empty_like(x))


def _drop_numpy(tensors: list[Tensor], mask: Mask) -> list[Tensor]:
    C, first = tensors[0].shape[-1], mask.first_channel
    keys = mask.keys
    if mask.images:
        keys = keys_of_rows(keys, rows_each(tensors[0], mask))
    halves = keys.numpy().view(np.uint32).reshape(-1, 2)
    seed = _mixed(np.array([mask.seed], np.uint32))
    row = _mixed(_mixed(halves[:, 0] + seed) ^ halves[:, 1])
    channels = _mixed(np.arange(first // 2 + 1, (first + C + 1) // 2 + 1, dtype=np.uint32))
    # as integers: a product with 0 or 1 is exact in any type, and numpy has no bf16
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    outputs = [torch.empty(x.shape, dtype=x.dtype) for x in tensors]
    pairs = [
        [t.detach().reshape(-1, C).view(whole).numpy() for t in (x, y)]
        for x, y in zip(tensors, outputs, strict=True)
    ]
    count = max(1, BLOCK // len(channels))
    hashes, scratch = (np.empty((min(count, len(row)), len(channels)), np.uint32) for _ in range(2))
    for i in range(0, len(row), count):
        some = row[i : i + count]
        bits = np.bitwise_xor(some[:, None], channels, out=hashes[: len(some)])
        bits = _mix(bits, scratch[: len(some)]).view(np.int16)[:, first % 2 : first % 2 + C]
        kept = bits >= threshold(mask) - 32768
        for x, y in pairs:
            np.multiply(x[i : i + count], kept, out=y[i : i + count])
    return outputs


# --------------------------------------------------------------------------------------------------
# Triton


@jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit(do_not_specialize=["seed", "first_channel", "threshold", "count"])
def _drop(
    x,
    keys,
    y,
    seed,
    first_channel,
    threshold,
    count,
    C,
    stride_x,
    divisor,
    STEP: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0)
    if IMAGES:
        key = tl.load(keys + row // count) + (tl.cast(row % count, tl.int64) + 1) * STEP
    else:
        key = tl.load(keys + row)
    low, high = tl.cast(key & 0xFFFFFFFF, tl.uint32), tl.cast((key >> 32) & 0xFFFFFFFF, tl.uint32)
    row_hash = _mix32(_mix32(low + tl.cast(seed, tl.uint32)) ^ high)
    channels = tl.arange(0, BLOCK)
    inside, place = channels < C, tl.cast(first_channel + channels, tl.uint32)
    bits = _mix32(row_hash ^ _mix32((place >> 1) + 1)) >> ((place & 1) * 16)
    kept = ((bits & 0xFFFF) ^ 0x8000) >= threshold  # the halves are compared as signed numbers
    values = tl.load(x + tl.cast(row, tl.int64) * stride_x + channels, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(kept, values / divisor, 0.0).to(y.dtype.element_ty)
    tl.store(y + tl.cast(row, tl.int64) * C + channels, values, mask=inside)


def _launch(x: Tensor, y: Tensor, mask: Mask, divisor: float) -> None:
    C = x.shape[-1]
    rows = x.reshape(-1, C)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    block = triton.next_power_of_2(C)
    _drop[(len(rows),)](
        rows,
        mask.keys.contiguous(),
        y,
        int(_mixed(np.array([mask.seed], np.uint32))[0]),
        mask.first_channel,
        threshold(mask),
        rows_each(x, mask),
        C,
        rows.stride(0),
        divisor,
        STEP=KEY_STEP,
        IMAGES=mask.images > 0,
        BLOCK=block,
        num_warps=warps(block),
    )


# --------------------------------------------------------------------------------------------------


def drop(tensors: list[Tensor], mask: Mask, divisor: float = 1.0, impl: str = "auto") -> list[Tensor]:
    """Each (..., C) of one shape and type with zeros where the mask has them, divided; without a gradient."""
    rows_each(tensors[0], mask)
    if not tensors[0].numel() or tensors[0].is_meta:
        return [torch.empty_like(x) for x in tensors]
    if use_triton(impl, tensors[0]):
        outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
        for x, y in zip(tensors, outputs, strict=True):
            _launch(x, y, mask, divisor)
        return outputs
    if tensors[0].device.type != "cpu":
        return [dropout_ref(x, mask, divisor) for x in tensors]
    outputs = _drop_numpy(tensors, mask)
    return outputs if divisor == 1.0 else [y.div_(divisor) for y in outputs]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mask: Mask, divisor: float, impl: str) -> Tensor:
        ctx.options = mask, divisor, impl
        return drop([x], *ctx.options)[0]

    @staticmethod
    def backward(ctx, dy: Tensor):
        return drop([dy], *ctx.options)[0], None, None, None


@torch.library.custom_op("trimix::dropout", mutates_args=())
def _opaque(
    x: Tensor, keys: Tensor, p: float, seed: int, first_channel: int, images: int, divisor: float
) -> Tensor:
    """`drop` as an operator that a compiler calls as it is. Compiled into a block, `p` was not told apart by
    torch's cache of programs (2.13): a run with another share than the one before it dropped that one's."""
    return drop([x], Mask(keys, p, seed, first_channel, images), divisor)[0]


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.options = inputs[2:]


def _opaque_backward(ctx, dy: Tensor):
    return _opaque(dy, *ctx.saved_tensors, *ctx.options), *[None] * 6


_opaque.register_fake(lambda x, *_: x.new_empty(x.shape))
_opaque.register_autograd(_opaque_backward, setup_context=_remember)


def dropout(x: Tensor, mask: Mask, divisor: float = 1.0, impl: str = "auto") -> Tensor:
    """x (..., C) with zeros where the mask has them, divided by `divisor` (1 - p keeps the mean)."""
    if torch.compiler.is_compiling():
        return _opaque(x, mask.keys, mask.p, mask.seed, mask.first_channel, mask.images, divisor)
    return _Dropout.apply(x, mask, divisor, impl)


# --------------------------------------------------------------------------------------------------
# In a model


class Rows:
    """Whose rows the adapters see just now; changed by dropout_rows alone."""

    keys: Tensor | None = None  # None: no dropout
    images: int = 0  # not 0: a key is that of an image, and there are so many


@contextlib.contextmanager
def dropout_rows(keys: Tensor | None, images: int = 0):
    """Inside, adapters see rows with these dropout keys: one a row, or one for each of so many images."""
    before = Rows.keys, Rows.images
    Rows.keys, Rows.images = keys, images
    try:
        yield
    finally:
        Rows.keys, Rows.images = before


def with_rows_of_now(function):
    """The function as it would run now, whenever it runs: recomputation happens in the backward pass."""
    now = Rows.keys, Rows.images

    def run(*args):
        with dropout_rows(*now):
            return function(*args)

    return run


class Dropout(nn.Module):
    """Zeroes entries with probability p in training, by a hash of row key, channel and place in the model."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.seed = p, 0

    def forward(self, x: Tensor, keys: Tensor | None, first_channel: int = 0) -> Tensor:
        """first_channel: of x's last dimension, where x holds a tensor-parallel rank's channels alone."""
        if not self.training or keys is None or self.p == 0:
            return x
        return dropout(x, Mask(keys, self.p, self.seed, first_channel), 1 - self.p)


def name_dropouts(model: nn.Module) -> None:
    """Masks differ between places."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.seed = zlib.crc32(name.encode()) >> 1
