"""Features of a frozen vision tower, encoded once and kept beside the length index (cache_image_features).

The file is known by what the features depend on, has a checksum, and is made again when it does not fit.
"""

import hashlib
import json
import math
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import parallel
import vlm
from build import autocast
from config import Config
from images import is_data_url
from kernels.dropout import Dropout
from lora import LoraLinear
from run_dir import Signals, Stopped

IMAGES = 16  # that the tower encodes at a time on a rank


class ImageFeatures:
    """Features of a frozen vision tower, (Q, C) fp32 an image, in one file beside the length index. The rows
    of images that could not be read are NaN. The file ends in a checksum of what is before."""

    def __init__(self, paths: list[str], file: Path, shape: tuple[int, int], mode: str):
        self.rows = {path: i for i, path in enumerate(paths)}
        self.array = np.memmap(file, dtype=np.float32, mode=mode, shape=(len(paths), *shape))

    def get(self, path: str) -> Tensor | None:
        row = np.array(self.array[self.rows[path]]) if path in self.rows else None
        return None if row is None or np.isnan(row).any() else torch.from_numpy(row)


def refuse_feature_cache(model, definition, cfg: Config) -> None:
    """Where features would not be what the tower gives in training."""
    towers = {n: p for n, p in model.named_parameters() if checkpoint.matches(n, definition.image_parameters)}
    if any(p.requires_grad for p in towers.values()):
        raise ValueError(
            "cache_image_features=true needs a frozen vision tower; add it to "
            "freeze_include or turn the cache off"
        )
    if cfg.image_jitter:
        raise ValueError(
            "image_jitter changes the images, cache_image_features keeps them; use one of the two"
        )
    for name, part in model.named_modules():
        rate = part.p if isinstance(part, Dropout | nn.Dropout) else 0.0
        rate = part.dropout if isinstance(part, LoraLinear) else rate
        if rate and checkpoint.matches(f"{name}.x", definition.image_parameters):
            raise ValueError(
                f"cache_image_features=true would leave out the dropout of {name} ({rate:g}), which training "
                "has; turn the cache off, or set that dropout to 0 in config.json"
            )


def features_key(model, definition, processor, cfg: Config, paths: list[str], main: bool) -> str:  # all ranks
    """Of all that features depend on: the tower's values, whatever they come from, images, precision. Rank 0
    (`main`) makes it; the others send it what they hold of the tower."""
    key = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if checkpoint.matches(name, definition.image_parameters):
            whole = checkpoint.gathered(p)
            if main:
                values = whole.contiguous().flatten().view(torch.uint8).numpy()
                key.update(name.encode() + values.tobytes())
    for path in paths if main else ():
        key.update((path if is_data_url(path) else checkpoint.file_digest(path)).encode())
    facts = [
        model.config.raw,
        cfg.bf16,
        cfg.fp16,
        cfg.fp16_opt_level,
        processor.fingerprint(),
        cfg.max_length,
    ]
    key.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return parallel.from_all(key.hexdigest()[:24])[0]


def readable_image(processor, path: str) -> Tensor | None:
    try:
        return processor.load_image(path)
    except ValueError:  # the loader reports it
        return None


@torch.no_grad()
def cache_features(
    model, definition, plan, processor, cfg: Config, world, signals: Signals
) -> ImageFeatures:  # all ranks
    """Encodes every readable image of the training set once, in batches that ranks take in turn; a later run
    with the same files, weights and precision reads them."""
    refuse_feature_cache(model, definition, cfg)
    paths = sorted({path for n in range(len(plan.index)) for path in plan.index.conversation(n).images})
    key = features_key(model, definition, processor, cfg, paths, world.main)
    file = Path(cfg.output_dir) / "index" / f"features-{key}.f32"
    shape = (processor.num_image_tokens, model.config.hidden_size)
    size = 4 * len(paths) * math.prod(shape)
    # Rank 0 alone looks.
    if not parallel.all_max(int(world.main and not (file.exists() and features_whole(file, size))), world):
        return ImageFeatures(paths, file, shape, "r")
    temporary = file.with_name(file.name + ".tmp")
    if world.main:
        ImageFeatures(paths, temporary, shape, "w+")
    parallel.barrier(world)
    features = ImageFeatures(paths, temporary, shape, "r+")
    model.eval()
    with ThreadPoolExecutor(cfg.num_workers or 1) as pool:

        def begin(start: int) -> tuple[list[str], list[Future]]:
            """This rank's images of those from `start` on."""
            first = start + IMAGES * world.dp_rank
            own = paths[first : first + IMAGES]
            return own, [pool.submit(readable_image, processor, path) for path in own]

        coming = begin(0)
        # all ranks: a sharded tower is entered together
        for start in range(0, len(paths), IMAGES * world.dp_size):
            if stop := parallel.all_max(signals.number, world):
                raise Stopped(stop)
            # The next images are read while the tower computes these.
            (own, images), coming = coming, begin(start + IMAGES * world.dp_size)
            images = [image.result() for image in images]
            blank = vlm.blank_image(processor.image_size)  # also for a rank that has none left
            pixels = torch.stack([blank if image is None else image for image in images or [None]])
            with autocast(cfg, world):
                encoded = model(vlm.Batch.of_images(pixels.to(world.device)), output="features")
            encoded = encoded.float().cpu().numpy()
            for n, (path, image) in enumerate(zip(own, images, strict=True)):
                features.array[features.rows[path]] = math.nan if image is None else encoded[n]
    parallel.reshard(model)
    features.array.flush()
    parallel.barrier(world)
    if world.main:
        with open(temporary, "r+b") as f:
            checksum = hashlib.file_digest(f, "sha256").digest()
            f.seek(0, os.SEEK_END)
            f.write(checksum)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
        for other in set(file.parent.glob("features-*.f32")) - {file}:  # of another tower or other images
            other.unlink()
    parallel.barrier(world)
    return ImageFeatures(paths, file, shape, "r")


def features_whole(file: Path, size: int) -> bool:
    """Whether it has its length and its checksum."""
    whole = hashlib.sha256()
    with open(file, "rb") as f:
        left = size
        while left and (block := f.read(min(left, 1 << 24))):
            whole.update(block)
            left -= len(block)
        good = not left and f.read() == whole.digest()
    if not good:
        print(f"warning: {file} is damaged and is made again", file=sys.stderr)
    return good
