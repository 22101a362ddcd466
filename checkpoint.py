"""Checkpoints in and out: weight files under their published names, and training state that resumes on another layout.

    weights = open_weights("qwen-vl-chat")                        # .safetensors or .bin, one file or shards
    load_into(dict(model.named_parameters()), weights)            # a strict copy: no missing, no unexpected names
    with atomic_dir("output/checkpoint-500", rank) as directory:  # whole, or not there at all
        save_weights(directory, ((name, full_tensor(p)) for name, p in model.named_parameters()), write=rank == 0)
        save_train_state(directory, params, optimizer, {"step": 500})

A parameter here is a plain tensor (the same on every rank that has its name) or a DTensor (each rank holds a shard).
If it carries a parallel.Cut, that is a tensor-parallel rank's part of the one in the files.
Formats: https://huggingface.co/docs/safetensors#format, https://pytorch.org/docs/stable/distributed.checkpoint.html
"""

import contextlib
import fnmatch
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import parallel

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

SIDE_FILES = [
    "qwen.tiktoken", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "preprocessor_config.json", "*.model", "vocab.*", "merges.txt",
]  # fmt: skip


class SaveError(OSError):
    """Writing failed (disk full, no permission, ...); nothing under the final name was changed."""

    def __init__(self, path, reason: str):
        super().__init__(
            f"could not save {path}: {reason}; free space or choose another output_dir; "
            "the previous checkpoint is untouched"
        )


def cli(main) -> int:
    """Run a script's main(): a user's mistake becomes one line on stderr and exit code 1."""
    try:
        return main()
    except (ValueError, OSError) as e:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error: {rank}{' '.join(str(e).splitlines())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---- config.json


def read_json(path, what: str) -> dict:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not valid JSON ({e.msg}); fetch or write it again") from None
    except ValueError as e:
        raise ValueError(f"{path} is not text ({e}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; fetch or write it again")
    return value


def write_json(path, value: dict) -> None:
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(directory) -> dict:
    return read_json(Path(directory) / "config.json", "expected a checkpoint directory with config.json and weights")


def model_kind(config: dict) -> str:
    """Which model file reads this config.json: "qwen_vl", "blip2" or "visualglm"."""
    model_type = config.get("model_type")
    if model_type == "qwen" and "visual" in config:
        return "qwen_vl"
    kinds = {"blip-2": "blip2", "chatglm": "visualglm", "visualglm": "visualglm"}
    if model_type in kinds:
        return kinds[model_type]
    raise ValueError(
        f"config.json has model_type={model_type!r}; supported: 'qwen' with a 'visual' part (Qwen-VL), 'blip-2', "
        "'chatglm' or 'visualglm' (VisualGLM-6B)"
    )


# ---- weights in


class Weights:
    """The tensors of a checkpoint directory by name."""

    def __init__(self, directory, ignore=(), aliases=None):
        directory = Path(directory)
        for file_name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                          "pytorch_model.bin.index.json"):  # fmt: skip
            if (directory / file_name).is_file():
                break
        else:
            raise ValueError(f"{directory} has no model.safetensors or pytorch_model.bin (or their .index.json)")
        weight_map = {}  # name -> shard
        if file_name.endswith(".index.json"):
            weight_map = read_json(directory / file_name, "").get("weight_map", {})
        self._entries = {}  # name -> (path, shape, dtype, offset or None for .bin)
        self._shard = (None, None)  # the one .bin shard that is open: (path, tensors)
        for shard in sorted(set(weight_map.values())) or [file_name]:
            path = directory / shard
            if not path.is_file():
                raise ValueError(f"{path} is missing but {file_name} names it; fetch it again")
            entries = _safetensors_entries(path) if shard.endswith(".safetensors") else self._bin_entries(path)
            for name, entry in entries.items():
                if weight_map.get(name, shard) == shard:
                    self._entries[name] = entry
        for name, shard in weight_map.items():
            if name not in self._entries:
                raise ValueError(f"{directory / shard} does not hold {name!r}, which {file_name} says; fetch it again")
        for alias, name in (aliases or {}).items():
            if name in self._entries:
                self._entries.pop(alias, None)
        for name in [n for n in self._entries if any(fnmatch.fnmatch(n, pattern) for pattern in ignore)]:
            del self._entries[name]
        self.names = set(self._entries)

    def __iter__(self):
        return iter(self._entries)  # in file order, so that each .bin shard is opened once

    def shape(self, name: str) -> torch.Size:
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][2]

    def read(self, name: str, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor in memory of its own, or in what `scratch()` gave: then it is valid until the next read."""
        path, shape, dtype, offset = self._entries[name]
        if offset is None:
            tensor = self._open_bin(path)[name]
            return tensor.clone(memory_format=torch.contiguous_format) if scratch is None else tensor
        # not memory-mapped: mapped pages would count beside the model's own copy and double the memory
        if scratch is None:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            tensor = scratch[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with open(path, "rb", buffering=0) as f:
            f.seek(offset)
            while len(buffer):
                count = f.readinto(buffer)  # at most 2 GiB in one call on Linux
                if not count:
                    raise ValueError(f"{path} ended while {name!r} was read; fetch it again")
                buffer = buffer[count:]
        return tensor

    def scratch(self) -> torch.Tensor:
        """Room for any one tensor. Fresh memory for each would leave the heap full of holes: up to 1.6x the weights."""
        sizes = [math.prod(shape) * dtype.itemsize for _, shape, dtype, offset in self._entries.values() if offset]
        return torch.empty(max(sizes, default=0), dtype=torch.uint8)

    def _bin_entries(self, path: Path) -> dict:
        tensors = self._open_bin(path)
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError(f"{path} is not a plain dictionary of tensors; save its state dict alone")
        return {name: (path, t.shape, t.dtype, None) for name, t in tensors.items()}

    def _open_bin(self, path: Path) -> dict:
        if self._shard[0] != path:
            self._shard = (None, None)  # close the previous one first
            try:
                try:
                    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                except RuntimeError as e:
                    if "mmap can only be used" not in str(e):
                        raise
                    tensors = torch.load(path, map_location="cpu", weights_only=True)  # format before torch 1.6
            except Exception as e:  # damaged pickles raise all sorts of errors
                raise ValueError(f"{path} can't be read ({_reason(e)}); it may be cut short: fetch it again") from None
            self._shard = (path, tensors)
        return self._shard[1]


def open_weights(directory, ignore=(), aliases: dict | None = None) -> Weights:
    """`ignore`: fnmatch patterns of names to leave out (what a model's files hold but its code recomputes). `aliases`
    {name: name}: names that say the same as another one are left out where that is there too (tied weights)."""
    return Weights(directory, ignore, aliases)


def _safetensors_entries(path: Path) -> dict:
    """8 bytes little-endian header length, JSON header, then the data; every offset is checked against the file."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        header_size = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if header_size > size - 8:
            raise ValueError(f"{path} is cut short or no safetensors file ({size:,} bytes); fetch it again")
        try:
            header = json.loads(f.read(header_size))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError):
            raise ValueError(f"{path} has a damaged header; fetch it again") from None
    data, entries = 8 + header_size, {}
    for name, info in header.items():
        if info["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name!r} has dtype {info['dtype']}; supported: {', '.join(SAFETENSORS_DTYPES)}")
        dtype, (begin, end) = SAFETENSORS_DTYPES[info["dtype"]], info["data_offsets"]
        if end - begin != math.prod(info["shape"]) * dtype.itemsize or begin < 0:
            raise ValueError(f"{path}: {name!r} has data offsets that do not fit its shape; fetch the file again")
        if data + end > size:
            raise ValueError(
                f"{path} is cut short: {size:,} bytes, but {name!r} ends at {data + end:,}; fetch it again"
            )
        entries[name] = (path, torch.Size(info["shape"]), dtype, data + begin)
    return entries


def check_names(expected: dict, weights: Weights, ignore=()) -> None:
    """Raise unless the weights have exactly the expected {name: shape}; names in `ignore` don't matter."""
    ignore = set(ignore)
    problems = [f"missing {name}" for name in sorted(set(expected) - weights.names - ignore)]
    problems += [f"unexpected {name}" for name in sorted(weights.names - set(expected) - ignore)]
    for name in sorted(weights.names & set(expected) - ignore):
        if tuple(weights.shape(name)) != tuple(expected[name]):
            problems.append(f"{name} is {tuple(weights.shape(name))}, expected {tuple(expected[name])}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"the weights do not fit the model: {'; '.join(problems[:8])}{more}; "
            "use the config.json that belongs to these weights"
        )


@torch.no_grad()
def copy_full_(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, casting; this rank takes what it holds of it (no communication)."""
    if hasattr(param, "cut"):
        full = param.cut.take(full)
    if isinstance(param, DTensor):
        shard = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.to_local().copy_(shard.to_local())
    else:
        param.copy_(full)


def full_tensor(param: torch.Tensor) -> torch.Tensor:
    """The whole parameter on the CPU. all ranks: gathers."""
    full = param.detach()
    full = full.full_tensor() if isinstance(full, DTensor) else full
    if hasattr(param, "cut"):
        parts = [torch.empty_like(full) for _ in range(param.cut.size)]
        dist.all_gather(parts, full.contiguous(), parallel.groups["tp"])
        full = param.cut.join(parts)
    return full.cpu()


def load_into(params: dict, weights: Weights, dtype: torch.dtype | None = None, skip=()) -> None:
    """Strict copy of the weights into {name: parameter}, one tensor at a time.

    dtype: round to this first (None: only the parameter's own dtype counts). skip: names left alone on both sides.
    """
    check_names({name: parallel.whole_shape(p) for name, p in params.items()}, weights, ignore=skip)
    skip, scratch = set(skip), weights.scratch()
    for name in weights:
        if name not in skip:
            full = weights.read(name, scratch)
            copy_full_(params[name], full if dtype is None else full.to(dtype))


# ---- weights out


def save_weights(directory, named_tensors, max_shard_bytes: int = 5 * 10**9, write: bool = True) -> None:
    """Write model.safetensors, or shards with an index, holding one shard in memory at most.

    The iterable may gather (collectives), so every rank consumes all of it, also after a failed write;
    with write=False a rank keeps and writes nothing.
    """
    directory, shard, shard_bytes, files, names, error = Path(directory), {}, 0, [], {}, None

    def flush():
        path = directory / f"shard-{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in named_tensors:
        if not write or error:
            continue
        assert name not in names, f"{name} is given twice"
        size = names[name] = tensor.numel() * tensor.element_size()
        try:
            if shard and shard_bytes + size > max_shard_bytes:
                flush()
                shard_bytes = 0
            tensor = tensor.detach().cpu().contiguous()
            pointers = {t.untyped_storage().data_ptr() for t in shard.values()}
            shared = tensor.untyped_storage().data_ptr() in pointers
            shard[name] = tensor.clone() if shared else tensor  # safetensors refuses tied weights
            shard_bytes += size
        except (OSError, SafetensorError) as e:
            error = e
            shard.clear()
    if error:
        raise error
    if not write:
        return
    flush()
    if len(files) == 1:
        files[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, (path, shard_names) in enumerate(files, 1):
        file_name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        path.rename(directory / file_name)
        weight_map |= dict.fromkeys(shard_names, file_name)
    index = {"metadata": {"total_size": sum(names.values())}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def copy_side_files(source, target) -> None:
    """Copy tokenizer and generation files that exist, so that the target is a model_name_or_path of its own."""
    for pattern in SIDE_FILES:
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, Path(target) / path.name)


@contextlib.contextmanager
def atomic_dir(final, rank: int = 0):
    """Yield `final`.tmp; when the body succeeded on all ranks, fsync it and rename it to `final`, replacing that.

    all ranks (needs a shared file system). If the body fails on one rank, every rank raises and `final` is as before.
    Failed writes become a SaveError. A kill between the two renames of a replacement leaves the older one as
    `final`.old, which the next call puts back.
    """
    final = Path(os.path.abspath(final))
    temporary, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        with _all_or_none(final):
            if rank == 0:
                if old.exists() and not final.exists():
                    old.rename(final)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _all_or_none(final):
            yield temporary
        with _all_or_none(final):
            if rank == 0:
                for folder, _, files in os.walk(temporary):
                    for path in [*(os.path.join(folder, f) for f in files), folder]:
                        _fsync(path)
                shutil.rmtree(old, ignore_errors=True)
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
    except (Exception, CheckpointException) as e:  # CheckpointException is no Exception
        error = e
    reasons = [None if error is None else _reason(error)]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, None if error is None else _reason(error))
    if isinstance(error, OSError | SafetensorError | CheckpointException):
        raise SaveError(path, _reason(error)) from error
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise SaveError(path, f"rank {rank}: {reason}")


def _reason(error: BaseException) -> str:
    """One line: what went wrong first, seen through the wrapping of torch.distributed.checkpoint and torch.save."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is not None and cause.strerror:
        return cause.strerror
    if "inline_container.cc" in str(error):  # torch.save's words when a write fails; from another rank without cause
        return "a write failed (disk full?)"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---- training state


def save_train_state(directory, params: dict, optimizer: torch.optim.Optimizer, extra: dict) -> None:
    """Write {name: parameter} and AdamW's state to train_state/, and `extra` to trainer_state.json. all ranks."""
    directory = Path(directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(_train_state(params, optimizer), storage_writer=dcp.FileSystemWriter(directory / "train_state"))
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(directory / "trainer_state.json", extra)  # last: it marks a complete state


def load_train_state(directory, params: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Read back what save_train_state wrote, bit for bit, on any number of ranks; returns `extra`. all ranks."""
    directory = Path(directory)
    extra = read_json(directory / "trainer_state.json", "expected a checkpoint-N directory of a training run")
    state = _train_state(params, optimizer)
    try:
        reader = dcp.FileSystemReader(directory / "train_state")
        saved = reader.read_metadata().state_dict_metadata
        here = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
        if dist.is_initialized():  # pipeline stages hold different names; all ranks must come to the same verdict
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, here)
            here = {name: value for part in gathered for name, value in part.items()}
        problems = [f"missing {name}" for name in sorted(set(here) - set(saved))]
        problems += [f"unexpected {name}" for name in sorted(set(saved) - set(here))]
        for name in sorted(set(saved) & set(here)):  # dcp.load would cast silently
            was = (tuple(saved[name].size), saved[name].properties.dtype)
            if was != here[name]:
                problems.append(f"{name} is {was[1]} {was[0]}, expected {here[name][1]} {here[name][0]}")
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(
                f"{directory} is another run's training state: {'; '.join(problems[:8])}{more}; resume with the "
                "model, precision and trainable parameters it was saved with, or set overwrite_output_dir"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader)
    except (OSError, EOFError, pickle.UnpicklingError, CheckpointException) as e:
        raise ValueError(
            f"{directory}/train_state can't be read ({_reason(e)}); remove {directory} to resume from an earlier one"
        ) from None
    return extra


class Pieces(torch.Tensor):
    """What this rank holds of a tensor-parallel parameter (or its AdamW state), as torch.distributed.checkpoint takes
    it: a tensor of the whole shape without memory, and rectangles of it {place in the whole: view of the rank's
    memory}. Packed blocks make several of them."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, cut: parallel.Cut):
        shape = [n * cut.size if i == cut.dim else n for i, n in enumerate(tensor.shape)]
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=tensor.dtype, device=tensor.device)

    def __init__(self, tensor: torch.Tensor, cut: parallel.Cut):
        local, first = tensor, [0] * tensor.ndim
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
        self.local = local
        self.pieces: dict[tuple, torch.Tensor] = {}
        block = tensor.shape[cut.dim] // cut.parts  # of each packed block, the rank has so many rows
        start, end = first[cut.dim], first[cut.dim] + local.shape[cut.dim]
        while start < end and local.numel():
            part, within = divmod(start, block)
            length = min(block - within, end - start)
            place = list(first)
            place[cut.dim] = part * block * cut.size + cut.rank * block + within
            self.pieces[tuple(place)] = local.narrow(cut.dim, start - first[cut.dim], length)
            start += length

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of a tensor without memory")

    def __create_write_items__(self, name: str, _) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        items = zip(self.pieces, self.__create_chunk_list__(), strict=True)
        return [
            WriteItem(
                MetadataIndex(name, torch.Size(place)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for place, chunk in items
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(place), piece.size()) for place, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[tuple(index.offset)]


def _train_state(params: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Flat {key: tensor} that shares memory with parameters and AdamW state; missing AdamW state is created (zeros)."""

    def entry(p, value):
        return Pieces(value.detach(), p.cut) if hasattr(p, "cut") and value.ndim else value.detach()

    state = {f"model.{name}": entry(p, p) for name, p in params.items()}
    names = {id(p): name for name, p in params.items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) in names, "the optimizer holds a parameter that is not in params"
            slots = optimizer.state[p]
            if not slots:  # never had a gradient; AdamW would make the same at its first step
                on_device = group.get("fused") or group.get("capturable")
                slots["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            assert set(slots) == {"step", "exp_avg", "exp_avg_sq"}, f"not plain AdamW: its state has {sorted(slots)}"
            for key, value in slots.items():
                state[f"optim.{names[id(p)]}.{key}"] = entry(p, value)
    return state


# ---- checkpoint-N directories


def _checkpoints(output_dir) -> list:
    """Complete checkpoint-N directories, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    complete = [p for p in found if (p / "trainer_state.json").is_file()]
    return sorted(complete, key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(output_dir) -> Path | None:
    """The newest complete checkpoint-N, or None."""
    return (_checkpoints(output_dir) or [None])[-1]


def rotate(output_dir, limit: int | None, keep=()) -> None:
    """Keep the newest `limit` checkpoints (None: all) and those in `keep`; clear what a killed save left. rank 0."""
    for path in Path(output_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if limit is None:
        return
    keep = {os.path.abspath(path) for path in keep if path is not None}
    for path in _checkpoints(output_dir)[: -limit or None]:
        if os.path.abspath(path) not in keep:
            doomed = path.rename(path.with_name(path.name + ".tmp"))  # so that it is never half there
            shutil.rmtree(doomed, ignore_errors=True)
