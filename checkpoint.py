"""Checkpoints in and out: weight files under their published names, each written whole or not at all.

    weights = open_weights("qwen-vl-chat")                        # .safetensors or .bin, one file or shards
    load_into(dict(model.named_parameters()), weights)  # a strict copy: no missing, no unexpected names
    with atomic_dir("output/checkpoint-500", rank) as directory:  # whole, or not there at all
        named = ((name, gathered(p)) for name, p in model.named_parameters())
        save_weights(directory, named, write=rank == 0)

A parameter here is a plain tensor (the same on every rank that has its name) or a DTensor (each rank holds a
shard). If it carries a parallel.Cut, that is a tensor-parallel rank's part of the one in the files. Format:
https://huggingface.co/docs/safetensors#format; training state is train_state.py's.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

import parallel
from schema import Pixels, check, read_json, require
from terminal import cli  # noqa: F401  (programs that drive our scripts look for it here)

# What a file may hold. 8-bit floats and the like are refused by name: casting them would be a guess.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What makes a directory of weights a checkpoint that loads by itself.
SIDE_FILES = (
    "qwen.tiktoken tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "generation_config.json preprocessor_config.json *.model vocab.* merges.txt"
).split()


class SaveError(OSError):
    """Writing failed (disk full, no permission, ...); nothing under the final name was changed."""

    def __init__(self, path, reason: str):
        # An OSError, so that cli() says it in a line; and of one kind, so that nobody wraps it once more.
        super().__init__(
            f"could not save {path}: {reason}; free space or choose another place; "
            "what was saved there before is untouched"
        )


# ---- files in place, whole or not at all


def check_place(path: str, key: str, devices: bool = False, keep: list[str] = ()) -> None:
    """ValueError unless a file can be written there, and is none of those to `keep`: known before the work
    that it is to hold."""
    path = Path(path)
    # Through links too: the same file may have two names.
    if os.path.realpath(path) in map(os.path.realpath, filter(None, keep)):
        raise ValueError(f"{key}={path} is what is read, and would be lost; name another file")
    # /dev/stdout and the like: written to directly, since a rename would replace them.
    if devices and path.exists() and not path.is_file() and not path.is_dir():
        return
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"{key}={path} is {what}; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{key}={path}: there is no directory {path.parent}; make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{key}={path}: {path.parent} cannot be written to; name a file elsewhere")


@contextlib.contextmanager
def atomic_file(path, mode: str = "wb"):
    """Yield an open file that becomes `path` when the body has succeeded: whole, synced, or not there at all.

    It is `path`.tmp until then. Failed writes become a SaveError; what was at `path` stays.
    """
    path = Path(os.path.realpath(path))  # of a symbolic link the file that it means
    temporary = path.with_name(path.name + ".tmp")
    if path.exists() and not path.is_file():  # a device, say, which a rename would replace
        raise SaveError(path, "no regular file")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            # The bytes must be on the disk before the name is: else a power cut leaves an empty file of the
            # right name.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # The name itself is the directory's content.
        _fsync(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            # A full disk gets its space back.
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and not isinstance(e, SaveError):
            raise SaveError(path, reason_of(e)) from e
        raise


def write_json(path, value: dict) -> None:
    with atomic_file(path, "w") as file:
        # As a person would write it: these files are read, compared and edited by hand.
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_digest(path, size: float = math.inf) -> str:
    """Of a file's content, or of its first `size` bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(min(size, 1 << 20)):
            found.update(piece)
            size -= len(piece)
    return found.hexdigest()


# ---- config.json

NO_NUMBERS = {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}  # keys that no result is of


def read_config(directory) -> dict:
    path = Path(directory) / "config.json"
    config = read_json(path, "expected a checkpoint directory with config.json and weights")
    # Read by others than the model file, which checks its own keys.
    check(config.get("architectures"), list[str] | None, f"{path}: architectures")
    # transformers 5 writes dtype, older ones torch_dtype.
    for key in ("torch_dtype", "dtype"):
        check(config.get(key), Literal["float32", "bfloat16", "float16", "auto"] | None, f"{path}: {key}")
    return config


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's, for all three


def check_side_files(directory, height: int, width: int, **tokenizer) -> None:
    """ValueError where preprocessor_config.json or tokenizer_config.json asks for something else than is done
    here: images of height x width, CLIP's mean and deviation, bicubic; `tokenizer`: keys with the only
    supported value."""
    # Files that say what is done anyway are fine: they come with every published checkpoint.
    path = Path(directory) / "tokenizer_config.json"
    if path.is_file():
        require(read_json(path, ""), str(path), **tokenizer)
    # Absent is fine: the model file knows its own images. Present and different is another model's.
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        return
    config = read_json(path, "")
    done = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    require(config, str(path), **done, do_center_crop=False, resample=3)  # 3: bicubic, in Pillow's numbers
    for key, expected in {"image_mean": MEAN, "image_std": STD, "rescale_factor": [1 / 255]}.items():
        check(value := config.get(key, expected), float | list[float], f"{path}: {key}")
        value = value if isinstance(value, list) else [value]
        # To 1e-5: files of several writers round them differently.
        if len(value) != len(expected) or not np.allclose(value, expected, rtol=0, atol=1e-5):
            raise ValueError(
                f"{path}: {key} is {value}; this model's images are normalised with {expected} only"
            )
    size = config.get("size", {})
    check(size, Pixels | dict[str, Pixels], f"{path}: size")
    # One number means both sides; an object names them.
    sides = {"height": height, "width": width}
    given = dict.fromkeys(sides, size) if isinstance(size, int) else size
    if any(given[key] != side for key, side in sides.items() if key in given) or given.keys() - sides:
        raise ValueError(
            f"{path}: size is {size}, but config.json's images are {height} x {width}; make them agree"
        )


def read_tokenizer(*paths, make=None):
    """The tokenizers library's tokenizer of a tokenizer.json, or of other files by `make(*paths)`. ValueError
    for a damaged file."""
    try:
        make = make or (lambda path: Tokenizer.from_str(Path(path).read_text(encoding="utf-8-sig")))
        tokenizer = make(*paths)
        ids = tokenizer.get_vocab()
    except OSError:
        raise
    except Exception as e:  # the library raises nothing narrower
        raise ValueError(f"{paths[0]}: not a readable tokenizer ({reason_of(e)}); fetch it again") from None
    # Two tokens with one id: decoding would give the other one's text.
    if len({*ids.values()}) < len(ids) or not ids:
        raise ValueError(f"{paths[0]}: the tokenizer has no tokens, or two with one id; fetch it again")
    return tokenizer


# ---- weights in


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    key: str  # its name in the file
    shape: torch.Size
    dtype: torch.dtype
    offset: int | None  # of its bytes in a .safetensors file; None in a pickle, which only torch can open


class Weights:
    """The tensors of a checkpoint directory by name. Made, it has looked at every header and at no value.

    ignore: fnmatch patterns of names to leave out (what a model's files hold but its code recomputes).
    aliases {name: name}: the first says the same as the second (tied weights), and is left out or takes its
    place. stems: the files' names without .safetensors and .bin.
    """

    def __init__(self, directory, ignore=(), aliases=None, stems=("model", "pytorch_model")):
        self.directory = directory = Path(directory)
        safe, old = stems
        # The first that is there: safetensors before pickles, one file before shards.
        both = [
            f"{stem}{end}" for stem in (f"{safe}.safetensors", f"{old}.bin") for end in ("", ".index.json")
        ]
        found = [name for name in both if (directory / name).is_file()]
        if not found:
            raise ValueError(f"{directory} has no {safe}.safetensors or {old}.bin (or their .index.json)")
        file_name = found[0]
        if f"{file_name}.index.json" in found:
            raise ValueError(
                f"{directory} holds {file_name} and {file_name}.index.json; remove the older one"
            )
        weight_map = None  # name -> shard
        if file_name.endswith(".index.json"):
            weight_map = read_json(directory / file_name, "").get("weight_map")
            where = f"{directory / file_name}: weight_map"
            check(weight_map, dict[str, str], where)
            # An index is somebody else's file: a path out of the directory would read what it likes.
            for shard in {*weight_map.values()} or {""}:
                if shard != os.path.basename(shard) or not shard.endswith((".safetensors", ".bin")):
                    raise ValueError(
                        f"{where} names the file {shard!r}; expected .safetensors or .bin files beside it"
                    )
        # Where each tensor lies is known before any of them is read: names and shapes are compared first.
        self._places: dict[str, Place] = {}
        # The one .bin shard that is open: (path, tensors). Two of them open would be two in memory.
        self._shard = (None, None)
        self.metadata: dict[str, str] = {}  # of a .safetensors file
        for shard in sorted({*weight_map.values()}) if weight_map else [file_name]:
            path = directory / shard
            if not path.is_file():
                raise ValueError(f"{path} is missing but {file_name} names it; fetch it again")
            if shard.endswith(".safetensors"):
                places, self.metadata = _safetensors_places(path)
            else:
                places = self._bin_places(path)
            for name, place in places.items():
                if weight_map is None or weight_map.get(name) == shard:
                    self._places[name] = place
                # A shard with more than the index says of it: the two are of different downloads.
                elif not matches(name, [*ignore, *({*(aliases or {})} - weight_map.keys())]):
                    raise ValueError(
                        f"{path} holds {name!r}, which {file_name} does not say of it; fetch both again"
                    )
        # The other way round: a shard with less than the index says was cut, or is of another download.
        for name, shard in (weight_map or {}).items():
            if name not in self._places:
                raise ValueError(
                    f"{directory / shard} does not hold {name!r}, which {file_name} says; fetch it again"
                )
        # Buffers that old files hold and the code computes (rotary frequencies, masks).
        for name in [n for n in self._places if matches(n, ignore)]:
            del self._places[name]
        # Tied weights: one tensor under one name, whatever the file calls it.
        for alias, name in (aliases or {}).items():
            if alias not in self._places:
                continue
            if name not in self._places:  # a file may hold the tied tensor under any of its names
                self._places[name] = self._places[alias]
            # Both there: they must agree, or one of them would be lost without a word.
            elif not torch.equal(self.read(alias), self.read(name)):
                raise ValueError(
                    f"{directory}: {alias} and {name} are one tied tensor in this model, but their values "
                    "differ; use weights whose two are equal"
                )
            del self._places[alias]
        self.names = set(self._places)

    def untie(self, aliases: dict[str, str]) -> None:
        """Hold the tied weights under each of their names {alias: name} from now on."""
        for alias, name in aliases.items():
            self._places[alias] = self._places[name]
        self.names = set(self._places)

    def __iter__(self):
        return iter(self._places)  # in file order, so that each .bin shard is opened once

    def shape(self, name: str) -> torch.Size:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str, scratch: torch.Tensor | None = None, rows: list | None = None) -> torch.Tensor:
        """One tensor in memory of its own, or in what `scratch()` gave: then it is valid until the next read.
        rows [(first, end), ...]: only these of the first dimension, one behind the other."""
        path, key, shape, dtype, offset = self._places[name]
        if rows is not None:
            shape = torch.Size((sum(b - a for a, b in rows), *shape[1:]))
        # A pickle is mapped into memory as it is: only a copy of it outlives the next shard.
        if offset is None:
            tensor = self._open_bin(path)[key]
            if rows is not None:
                return torch.cat([tensor[a:b] for a, b in rows])
            return tensor.clone(memory_format=torch.contiguous_format) if scratch is None else tensor
        # not memory-mapped: mapped pages would count beside the model's own copy and double the memory
        if scratch is None:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            tensor = scratch[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        with open(path, "rb", buffering=0) as f:
            begun, values = 0, tensor.reshape(-1).view(torch.uint8).numpy()
            # Without rows the whole is one of them.
            row = len(values) if rows is None else math.prod(shape[1:]) * dtype.itemsize
            for first, end in [(0, 1)] if rows is None else rows:
                count = (end - first) * row
                f.seek(offset + first * row)
                fill(values[begun : begun + count], f, name)
                begun += count
        return tensor

    def in_pieces(self, name: str, param: torch.Tensor) -> bool:
        """Whether read_into() can fill the parameter: it is whole, and no pickle holds the tensor."""
        # A shard or a cut takes rows from here and there; a device's memory is no place to read a file into.
        whole = not parallel.is_sharded(param) and not hasattr(param, "cut")
        return whole and param.device.type == "cpu" and param.is_contiguous() and self._places[name].offset

    def read_into(self, name: str, param: torch.Tensor) -> float:
        """Reads the tensor into a parameter. -> its largest absolute value, looked for a piece at a time,
        while a core's cache still holds it; ValueError for NaN or infinity."""
        path, _, _, kind, offset = self._places[name]
        count, most, straight = PIECE_BYTES // kind.itemsize, 0, param.dtype == kind
        values = param.detach().view(-1)
        room = values if straight else torch.empty(count, dtype=kind)
        # The bits as integers: ordered like the numbers, and cheaper to look through.
        bits = integers(room)
        with open(path, "rb", buffering=0) as f:
            f.seek(offset)
            for start in range(0, len(values), count):
                end = min(start + count, len(values))
                piece = bits[start:end] if straight else bits[: end - start]
                fill(piece, f, name)
                most = max(most, magnitude(piece))
                if not straight:
                    values[start:end].copy_(room[: end - start])
        return finite(most, kind, f"{self.directory}: {name}")

    def scratch(self) -> torch.Tensor:
        """Room for any one tensor. Fresh memory for each would leave the heap full of holes: up to 1.6x the
        weights."""
        # Of the largest tensor: one buffer serves all of them.
        sizes = [
            math.prod(shape) * dtype.itemsize
            for _, _, shape, dtype, offset in self._places.values()
            if offset  # a pickle's tensors are in memory already
        ]
        return torch.empty(max(sizes, default=0), dtype=torch.uint8)

    def sample(self) -> str:
        """Some values of every tensor, and the coarsest precision, as text: it tells other weights from
        these."""
        # No checksum: it would read all of them at every start, and know no copy in another precision.
        values, eps = {}, 0.0
        for name in self:
            path, key, shape, dtype, offset = self._places[name]
            # Eight values from the middle: the first rows of an embedding are often alike.
            count = min(8, math.prod(shape))
            first = (math.prod(shape) - count) // 2
            if offset is None:
                values[name] = self._open_bin(path)[key].reshape(-1)[first : first + count].float()
            else:
                with open(path, "rb") as f:
                    f.seek(offset + first * dtype.itemsize)
                    raw = bytearray(f.read(count * dtype.itemsize))
                values[name] = torch.frombuffer(raw, dtype=dtype).float() if raw else torch.empty(0)
            eps = max(eps, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)
        # Names by hash, values as they are: the text goes into adapters and trainer states.
        names = hashlib.sha256("\n".join(sorted(values)).encode()).hexdigest()
        flat = torch.cat([values[name] for name in sorted(values)]) if values else torch.empty(0)
        return f"{names} {eps:g} {base64.b64encode(flat.numpy().astype('<f4').tobytes()).decode()}"

    def fits_sample(self, sample: str) -> bool:
        """Whether `sample` is of these weights, in this precision exactly, in another one up to rounding."""
        (names, eps, values), (names2, eps2, values2) = sample.split(" "), self.sample().split(" ")
        a, b = (np.frombuffer(base64.b64decode(v), "<f4").astype(np.float64) for v in (values, values2))
        if names != names2 or len(a) != len(b):
            return False
        # bf16 and fp32 copies of one model are the same weights up to the coarser rounding.
        coarse = 0.0 if eps == eps2 else max(float(eps), float(eps2))
        return bool((np.abs(a - b) <= coarse * np.abs(a) + (1e-7 if coarse else 0.0)).all())

    def _bin_places(self, path: Path) -> dict[str, Place]:
        tensors = self._open_bin(path)
        check_state(tensors, path)
        return {name: Place(path, name, t.shape, t.dtype, None) for name, t in tensors.items()}

    def _open_bin(self, path: Path) -> dict:
        if self._shard[0] != path:
            self._shard = (None, None)  # close the previous one first
            try:
                try:
                    # weights_only: nothing of a pickle is run. mmap: what is not asked for is not read.
                    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                except RuntimeError as e:
                    if "mmap can only be used" not in str(e):
                        raise
                    # format before torch 1.6
                    tensors = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:  # damaged pickles raise all sorts of errors
                raise ValueError(
                    f"{path} can't be read ({reason_of(e)}); it may be cut short: fetch it again"
                ) from None
            self._shard = (path, tensors)
        return self._shard[1]


# Half a megabyte stays in a core's cache between reading and looking.
PIECE_BYTES = 1 << 19


def fill(values: np.ndarray, file, name: str) -> None:
    """Reads an array's bytes from where the file stands."""
    buffer = memoryview(values).cast("B")
    while len(buffer):
        # Linux reads at most 2 GiB in one call; a network's file system may give less.
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{file.name} ended while {name!r} was read; fetch it again")
        buffer = buffer[count:]


def check_state(tensors, path) -> None:
    """ValueError unless what a pickle held is a dictionary of names and plain tensors."""
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a plain dictionary of tensors; save its state dict alone")
    # An empty dictionary would pass every look at its tensors.
    if not tensors:
        raise ValueError(f"{path} holds no tensor; save the model's state dict")
    for name, t in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: a tensor has the name {name!r}; expected text")
        # Sparse, quantised or on another device: not something to copy by rows.
        if t.layout != torch.strided or t.device.type != "cpu" or t.dtype not in SAFETENSORS_DTYPES.values():
            raise ValueError(
                f"{path}: {name!r} is {t.dtype}, {t.layout} on {t.device}; expected a plain tensor"
            )


def open_weights(directory, ignore=()) -> Weights:
    """The weights as the files name them."""
    return Weights(directory, ignore)


def open_model(directory, definition, few_bits: bool = False) -> Weights:
    """The weights of a checkpoint directory under the names that its model file (vlm.Model) has for them.
    ValueError for weights in few bits (quantize.py), unless they can be used."""
    config = read_config(directory)
    # Their names are not those of the model, whose message would help nobody.
    if (kind := config.get("quantize")) and not few_bits:
        raise ValueError(
            f"{directory} holds weights in {kind}, which only generate, evaluate and serve use, without an "
            f"adapter; give the checkpoint that it was made of (with --quantize {kind} for few bits)"
        )
    return Weights(directory, definition.ignored_weights, definition.aliases(config))


def matches(name: str, patterns) -> bool:
    """Whether one of the fnmatch patterns (None: of none) is the name's."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ())


def _safetensors_places(path: Path) -> tuple[dict[str, Place], dict]:
    """-> (places, metadata)."""
    try:
        # The library checks all of it: the header, and that the tensors lie behind it without gaps or
        # overlaps, to the end of the file. It does not say where they lie, and what it maps is copied once
        # more: reading into a parameter's own memory takes 0.65x the CPU time (0.5 GB in bf16, one thread).
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
    except SafetensorError as e:
        raise ValueError(f"{path} is cut short or no safetensors file ({e}); fetch it again") from None
    header.pop("__metadata__", None)
    places = {}
    for name, info in header.items():
        if info["dtype"] not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise ValueError(f"{path}: {name!r} has dtype {info['dtype']}; supported: {known}")
        # Offsets count from behind the header, which stands behind its own size.
        dtype, offset = SAFETENSORS_DTYPES[info["dtype"]], 8 + size + info["data_offsets"][0]
        places[name] = Place(path, name, torch.Size(info["shape"]), dtype, offset)
    return places, metadata


def check_names(expected: dict, weights: Weights, ignore=()) -> None:
    """Raise unless the weights have exactly the expected {name: shape}, in floating point; names in `ignore`
    don't matter."""
    # Both ways: a missing tensor would stay random, an unexpected one means another model.
    ignore = set(ignore)
    problems = [f"missing {name}" for name in sorted(set(expected) - weights.names - ignore)]
    problems += [f"unexpected {name}" for name in sorted(weights.names - set(expected) - ignore)]
    # In one order on every rank, so that all say the same.
    for name in sorted(weights.names & set(expected) - ignore):
        if tuple(weights.shape(name)) != tuple(expected[name]):
            problems.append(f"{name} is {tuple(weights.shape(name))}, expected {tuple(expected[name])}")
        elif not weights.dtype(name).is_floating_point:
            problems.append(
                f"{name} is {weights.dtype(name)}, expected floating point (quantised files are not read)"
            )
    if problems:
        raise ValueError(
            f"the weights do not fit the model: {shortened(problems)}; use the config.json that belongs to "
            "these weights"
        )


def shortened(problems: list[str]) -> str:
    """In one line; eight are enough to see what is the matter."""
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


# A float's bits without its sign are ordered as integers, NaN and infinity last, and numpy finds the largest
# integer of 16 or 32 bits 2 to 4 times as fast as torch.aminmax the largest float.
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def integers(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor of floats as a flat view of their bits."""
    return tensor.detach().reshape(-1).view(SIGNED[tensor.element_size()]).numpy()


def magnitude(values: np.ndarray) -> int:
    """Of floats' bits: those of the largest absolute value."""
    sign = 1 << (8 * values.itemsize - 1)
    if not values.size:
        return 0
    # Read as unsigned, the sign bit makes negative numbers the largest.
    negative = int(np.maximum.reduce(values.view(f"u{values.itemsize}")))
    return max(int(np.maximum.reduce(values)), negative - sign if negative >= sign else 0)


def finite(bits: int, dtype: torch.dtype, name: str) -> float:
    value = float(torch.tensor([bits], dtype=SIGNED[dtype.itemsize]).view(dtype))
    if not math.isfinite(value):
        raise ValueError(f"{name} holds NaN or infinity; fetch or train these weights again")
    return value


def largest(tensor: torch.Tensor, name: str) -> float:
    """The largest absolute value. ValueError for NaN or infinity."""
    # Integers (weights in few bits) have neither.
    if not tensor.is_floating_point():
        return float(tensor.abs().max()) if tensor.numel() else 0.0
    return finite(magnitude(integers(tensor.cpu())), tensor.dtype, name)


@torch.no_grad()
def copy_full_(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, casting; this rank takes
    what it holds of it (no communication)."""
    # The same cut as for a file, from a tensor in memory.
    ranges = rows_held(param)
    rows = full if ranges is None else torch.cat([full[a:b] for a, b in ranges])
    copy_rows_(param, rows)


def rows_held(param: torch.Tensor) -> list[tuple[int, int]] | None:
    """Which rows of the whole tensor this rank's part is made from; None for all of them. A part of the
    columns is taken from whole rows, as they lie in a file."""
    cut = getattr(param, "cut", None)
    by_rows = cut is not None and cut.dim == 0
    if not parallel.is_sharded(param) and not by_rows:
        return None
    # First the rank's part of the tensor-parallel cut, of that its shard, and then where these rows stand in
    # the file: packed blocks (q, k, v) make several ranges of them.
    start, end = 0, len(param)
    if parallel.is_sharded(param):
        shape, first = parallel.place_of_shard(param)
        start, end = first[0], first[0] + shape[0] if math.prod(shape) else first[0]
    return cut.rows(start, end, len(param)) if by_rows else [(start, end)]


@torch.no_grad()
def copy_rows_(param: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy what rows_held() names into a parameter, casting."""
    # A cut by columns: whole rows were read.
    if hasattr(param, "cut") and param.cut.dim:
        rows = param.cut.take(rows)
    parallel.local(param).copy_(rows)


def gathered(param: torch.Tensor) -> torch.Tensor | None:
    """The whole parameter on the CPU of rank 0 (of a pipeline stage's first one); None elsewhere. all ranks:
    each sends what it holds, once, and none has more than one parameter whole."""
    # First over the shards, then over the tensor-parallel cut: the reverse of how it was divided.
    full = param.detach()
    if parallel.is_sharded(full):
        full = _gathered_rows(full)
    if full is not None and hasattr(param, "cut"):
        # of the tensor-parallel groups only that of the first data-parallel ranks has something
        parts = _gather(full.contiguous(), parallel.groups["tp"])
        full = parts and param.cut.join(parts)
    elif "tp" in parallel.groups and dist.get_rank(parallel.groups["tp"]):
        full = None
    return None if full is None else full.cpu()


def _gathered_rows(x) -> torch.Tensor | None:
    (dim,) = [i for i, place in enumerate(x.placements) if place.is_shard(0)]
    if any(place for i, place in enumerate(x.device_mesh.get_coordinate()) if i != dim):
        return None  # a replica: its twin on the first one sends
    local, rows = x.to_local(), -(-len(x) // x.device_mesh.size(dim))
    # The last ranks hold fewer rows, and a gather takes equally many: filled up, and cut off behind it.
    if len(local) < rows:
        local = torch.cat((local, local.new_zeros(rows - len(local), *x.shape[1:])))
    parts = _gather(local.contiguous(), x.device_mesh.get_group(dim))
    return parts and torch.cat(parts)[: len(x)]


def _gather(part: torch.Tensor, group) -> list[torch.Tensor] | None:  # all ranks of a group
    """All ranks' parts on the group's first one, None elsewhere."""
    # A gather, not an all_gather: one rank alone needs room for the whole.
    parts = None
    if dist.get_rank(group) == 0:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.gather(part, parts, group=group, group_dst=0)
    return parts


def in_threads(call, items: list) -> Iterator:
    """call(item) of each in order, by as many threads as torch has; what has not begun when one raises is
    not done."""
    # Reading and numpy let other threads go on.
    # As many as torch would use itself, so that ranks on one machine do not crowd each other out.
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(cancel_futures=True)


def load_into(params: dict, weights: Weights, skip=()) -> None:  # all ranks
    """Strict copy of the weights into {name: parameter}, one tensor at a time. Each rank reads the rows that
    it holds a part of; what is wrong with any of them is said on all. skip: names left alone on both sides.
    """
    # Before anything is overwritten.
    check_names({name: parallel.whole_shape(p) for name, p in params.items()}, weights, ignore=skip)
    problem, peak, skip = None, 0.0, set(skip)
    try:
        peak = _load(params, weights, [name for name in weights if name not in skip])
    except (ValueError, OSError) as e:
        problem = str(e)
    # A rank that raised alone would leave the others in their next collective.
    found = parallel.from_all((problem, peak))
    if problem := next((said for said, _ in found if said), None):
        raise ValueError(problem)
    # A file that was allocated and never filled is all zeros, with a good header.
    if params and not any(peak for _, peak in found):
        raise ValueError("every weight is zero; the file was never written in full: fetch it again")


def _load(params: dict, weights: Weights, names: list[str]) -> float:
    """-> the largest value that was read. One tensor at a time: a model as large as the memory has no room
    for a second copy."""
    whole = [n for n in names if weights.in_pieces(n, params[n])]
    straight = [n for n in whole if params[n].dtype == weights.dtype(n)]
    # Reading and looking at what was read take as long as each other: threads do both at a time.
    with contextlib.closing(in_threads(lambda n: weights.read_into(n, params[n]), straight)) as found:
        highs = dict(zip(straight, found, strict=True))
    # To cast, torch has threads of its own.
    highs |= {n: weights.read_into(n, params[n]) for n in whole if n not in highs}
    # What is left: shards and cuts, a GPU's parameters, and tensors of a pickle.
    scratch = weights.scratch() if len(highs) < len(names) else None
    for name in names:
        param, read = params[name], None
        if name not in highs:
            read = weights.read(name, scratch, rows_held(param))
            highs[name] = largest(read, f"{weights.directory}: {name}")
        # A cast to fp16 makes infinity of what is above 65,504.
        if highs[name] > torch.finfo(param.dtype).max:
            raise ValueError(
                f"{name} has a value of {highs[name]:.3g}, too large for {param.dtype}; use bfloat16 or "
                "float32"
            )
        if read is not None:
            copy_rows_(param, read)
    return max(highs.values(), default=0.0)


# ---- weights out


def save_tensors(tensors: dict, path, metadata: dict[str, str]) -> None:
    """A .safetensors file that is the same for the same tensors: the library writes `metadata` in a random
    order."""
    # The header is rewritten in place, in the same number of bytes.
    save_file(tensors, path, metadata=metadata)
    # So that equal runs give equal files: their checksums can be compared.
    with open(path, "r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(ordered) == size, "the header was not written as compactly as it can be"
        file.seek(8)
        file.write(ordered)


def save_weights(
    directory,
    named_tensors,
    max_shard_bytes: int = 5 * 10**9,
    write: bool = True,
    convert=None,
    pickled: bool = False,
) -> None:
    """Write model.safetensors (pickled: pytorch_model.bin), or shards with an index, holding one shard in
    memory at most.

    The iterable may gather (collectives), so every rank consumes all of it, also after a failed write;
    with write=False a rank keeps and writes nothing. convert(name, tensor): what is written of it.
    """
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    # Shards are named when their number is known; until then by their turn.
    directory, shard, shard_bytes, files, names, error = Path(directory), {}, 0, [], {}, None

    def flush():
        path = directory / f"shard-{len(files)}{suffix}"
        if pickled:
            torch.save(dict(shard), path)
        else:
            save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in named_tensors:
        # The iterable gathers on all ranks: it is consumed to its end, or the others would wait for ever.
        if not write or error:
            continue
        assert name not in names, f"{name} is given twice"
        try:
            tensor = convert(name, tensor) if convert else tensor
            size = names[name] = tensor.numel() * tensor.element_size()
            if shard and shard_bytes + size > max_shard_bytes:
                flush()
                shard_bytes = 0
            tensor = tensor.detach().cpu().contiguous()
            # Tied weights share memory: written under each name, as transformers expects of fully named
            # files.
            pointers = {t.untyped_storage().data_ptr() for t in shard.values()}
            shared = tensor.untyped_storage().data_ptr() in pointers
            shard[name] = tensor.clone() if shared else tensor  # safetensors refuses tied weights
            shard_bytes += size
        except (OSError, SafetensorError, ValueError) as e:
            error = e
            shard.clear()
    if error:
        raise error
    if not write:
        return
    # The last shard; the names are known only now: each says how many there are.
    flush()
    if len(files) == 1:
        files[0][0].rename(directory / f"{stem}{suffix}")
        return
    weight_map = {}
    for i, (path, shard_names) in enumerate(files, 1):
        file_name = f"{stem}-{i:05d}-of-{len(files):05d}{suffix}"
        path.rename(directory / file_name)
        weight_map |= dict.fromkeys(shard_names, file_name)
    # transformers' format of an index.
    index = {"metadata": {"total_size": sum(names.values())}, "weight_map": weight_map}
    write_json(directory / f"{stem}{suffix}.index.json", index)


def copy_side_files(source, target) -> None:
    """Copy tokenizer and generation files that exist, so that the
    target is a model_name_or_path of its own."""
    for pattern in SIDE_FILES:
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, Path(target) / path.name)


@contextlib.contextmanager
def atomic_dir(final, rank: int = 0):
    """Yield `final`.tmp; when the body succeeded on all ranks, fsync it and rename it to `final`, replacing
    that.

    all ranks (needs a shared file system). If the body fails on one rank, every rank raises and `final` is as
    before. Failed writes become a SaveError. A kill between the two renames of a replacement leaves the older
    one as `final`.old, which the next call puts back.
    """
    # Absolute: the working directory may change while it is written; and of a link what it means.
    final = Path(os.path.realpath(final))
    temporary, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        # Each part ends with all ranks agreeing, so none goes on alone into the next one.
        with _all_or_none(final):
            if rank == 0:
                # A kill between the two renames of before: the old one is put back first.
                if old.exists() and not final.exists():
                    old.rename(final)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _all_or_none(final):
            yield temporary
        with _all_or_none(final):
            if rank == 0:
                # There is no way to ask for the mask but to set it.
                mask = os.umask(0)
                os.umask(mask)
                for folder, _, files in os.walk(temporary):
                    for path in [os.path.join(folder, f) for f in files]:
                        os.chmod(path, 0o666 & ~mask)  # safetensors makes its files for their owner alone
                        _fsync(path)
                    # Files before the folder that names them.
                    _fsync(folder)
                shutil.rmtree(old, ignore_errors=True)
                # Two renames: a directory cannot be replaced in one.
                if final.exists():
                    final.rename(old)
                try:
                    temporary.rename(final)
                except OSError:
                    if old.exists():
                        old.rename(final)
                    raise
                _fsync(final.parent)
                shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync(path) -> None:
    # Of a directory too, which open() does not take.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _all_or_none(path):
    """all ranks: wait for each other after the body; if it failed on one rank, raise on every rank."""
    error = None
    try:
        yield
    # Held back until all ranks have said how it went for them.
    except Exception as e:
        # A data worker's death is raised wherever this rank is, in the middle of a collective too: it has
        # none to share then. The others see it end.
        if "DataLoader worker" in str(e):
            raise
        error = e
    # all ranks: nobody goes on with half a checkpoint
    reasons = parallel.from_all(None if error is None else reason_of(error))
    # The rank that failed raises its own error, the others say which one it was.
    if isinstance(error, OSError | SafetensorError):
        raise SaveError(path, reason_of(error)) from error
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise SaveError(path, f"rank {rank}: {reason}")


def reason_of(error: BaseException) -> str:
    """One line: what went wrong first, seen through the wrapping of torch.save."""
    # The operating system's own word (disk full, no permission) is somewhere down the chain.
    cause = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__context__
    if cause is not None:
        return cause.strerror
    # torch.save's words when a write fails; from another rank without cause
    if "inline_container.cc" in str(error):
        return "a write failed (disk full?)"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---- checkpoint-N directories


def checkpoints(output_dir) -> list[Path]:
    """Complete checkpoint-N directories, oldest first."""
    found = [
        p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-(0|[1-9]\d*)", p.name)
    ]
    # trainer_state.json is written last: without it the directory is half a checkpoint.
    complete = [p for p in found if (p / "trainer_state.json").is_file()]
    return sorted(complete, key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(output_dir) -> Path | None:
    """The newest complete checkpoint-N, or None."""
    return (checkpoints(output_dir) or [None])[-1]


def remove_dir(path: Path) -> None:
    doomed = path.rename(path.with_name(path.name + ".tmp"))  # so that it is never half there
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir, limit: int | None, keep=(), own=None) -> None:
    """Keep the newest `limit` checkpoints (None: all) and those in `keep`; clear what a killed save left.
    rank 0.

    own(path): whether a checkpoint is of this run; others are the first to go.
    """
    for path in Path(output_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    # Checkpoints that nobody limits are the user's to delete.
    if limit is None:
        return
    keep = {os.path.abspath(path) for path in keep if path is not None}
    # False sorts before True: another run's go first.
    by_age = sorted(checkpoints(output_dir), key=own) if own else checkpoints(output_dir)
    for path in by_age[: -limit or None]:
        if os.path.abspath(path) not in keep:
            remove_dir(path)
