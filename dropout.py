"""Dropout as a pure function: a mask is a hash of the row's key, the channel and the place in the model.

    with dropout_rows(batch.dropout_keys):              # the model says whose rows its adapters see
        x = block(x, ctx)

The keys travel with the data (data.collate: a hash of seed, epoch, sample, position), so a mask is the same
in any packing, layout, number of processes, and in recomputation: there is no state to save.
"""

import contextlib
import zlib

import torch
from torch import Tensor, nn


def mix(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finaliser on int32. `>>` copies the sign bit, so the copies are masked off."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)


def dropout_mask(
    x: torch.Tensor, keys: torch.Tensor, p: float, seed: int, first_channel: int = 0, images: int = 0
) -> torch.Tensor:
    """Boolean mask, shape of x, True with probability 1 - p: a hash of (row key, channel, seed) and nothing
    else.

    So it is the same in any packing, layout, number of processes and recomputation. keys: one for each row of
    x (..., C), or one for each of `images`, whose rows follow one another.
    """
    C, rows = x.shape[-1], x.numel() // x.shape[-1]
    if images:
        assert len(keys) == images and rows % images == 0, (
            f"{rows} rows of {images} images, but dropout keys of {len(keys)}"
        )
        keys = keys_of_rows(keys, rows // images)
    assert rows == len(keys), f"{rows} rows, but dropout keys of {len(keys)}"
    low, high = keys.contiguous().view(torch.int32).view(-1, 2).unbind(1)  # int64 -> two halves
    row = mix(mix(low + mix(torch.full_like(low, seed))) ^ high)
    # two channels share one 32-bit hash, 16 bits each: half the work, and p is exact to 1/65536
    pairs = torch.arange(first_channel // 2, (first_channel + C + 1) // 2, device=x.device, dtype=torch.int32)
    bits = mix(row[:, None] ^ mix(pairs + 1)).view(torch.int16)[:, first_channel % 2 :]  # (rows, C or C + 1)
    return (bits[:, :C] >= round(p * 65536) - 32768).view(x.shape)


def keys_of_rows(keys: torch.Tensor, count: int, salt: int = 0) -> torch.Tensor:
    """One key an image (N,) -> one for each of its `count` rows (N*count,)."""
    place = torch.arange(count, device=keys.device)
    return (keys[:, None] + (place + 1) * 0x9E3779B97F4A7C1 + salt * 0x5851F42D4C957F2).flatten()


class Rows:
    """Whose rows the adapters see just now; changed by dropout_rows alone."""

    keys: torch.Tensor | None = None  # None: no dropout
    images: int = 0  # not 0: a key is that of an image, and there are so many


@contextlib.contextmanager
def dropout_rows(keys: torch.Tensor | None, images: int = 0):
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
        return x * dropout_mask(x, keys, self.p, self.seed, first_channel) / (1 - self.p)


def name_dropouts(model: nn.Module) -> None:
    """Masks differ between places."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.seed = zlib.crc32(name.encode()) >> 1
