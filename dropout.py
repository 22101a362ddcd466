"""Dropout as a pure function: a mask is a hash of the row's key, the channel and the place in the model
(kernels/dropout.py).

    with dropout_rows(batch.dropout_keys):              # the model says whose rows its adapters see
        x = block(x, ctx)

The keys travel with the data (data.collate: a hash of seed, epoch, sample, position), so a mask is the same
in any packing, layout, number of processes, and in recomputation: there is no state to save.
"""

import contextlib
import zlib

import torch
from torch import Tensor, nn

from kernels.dropout import Mask, dropout


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
        return dropout(x, Mask(keys, self.p, self.seed, first_channel), 1 - self.p)


def name_dropouts(model: nn.Module) -> None:
    """Masks differ between places."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.seed = zlib.crc32(name.encode()) >> 1
