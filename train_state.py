"""Training state: parameters, AdamW's moments and where the run is, written and read on any layout of ranks.

    save_train_state(directory, params, optimizer, {"step": 500})   # all ranks
    extra = load_train_state(directory, params, optimizer)          # bit for bit, also on fewer or more ranks

A parameter is a plain tensor (the same on every rank that has its name) or a DTensor (each rank holds a
shard); with a parallel.Cut it is a tensor-parallel rank's part of a larger one. Format:
https://pytorch.org/docs/stable/distributed.checkpoint.html
"""

import enum
import os
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import parallel
from checkpoint import SAFETENSORS_DTYPES, file_digest, reason_of, write_json
from schema import check, read_json


def member(kind, name: str):
    """In the place of getattr, which gives anything of anything."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which describes no tensor")


class StateReader(dcp.FileSystemReader):
    """Reads a training state without running what its pickled .metadata may ask for: only the classes that
    describe tensors are known."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", *(str(dtype).removeprefix("torch.") for dtype in SAFETENSORS_DTYPES.values())),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath"),
        "collections": ("OrderedDict",),
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) == ("builtins", "getattr"):
                return member  # so does Python 3.11.0 to 3.11.3 name one of an enumeration
            if name not in StateReader.KNOWN.get(module, ()):
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
            if name == "WindowsPath" or name == "PosixPath":  # of the system that saved it
                name, module = "PurePosixPath", "pathlib"
            return super().find_class(module, name)

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = StateReader.Unpickler(file).load()
        tensors = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(metadata, Metadata) or not isinstance(tensors, dict):
            raise pickle.UnpicklingError("it describes no training state")
        if not all(isinstance(t, TensorStorageMetadata) for t in tensors.values()):
            raise pickle.UnpicklingError("it holds something else than tensors")
        for place in metadata.storage_data.values():
            if os.path.basename(place.relative_path) != place.relative_path:
                raise pickle.UnpicklingError(
                    f"it names the file {place.relative_path!r} outside of the directory"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_train_state(directory, params: dict, optimizer: torch.optim.Optimizer, extra: dict) -> None:
    """Write {name: parameter} and AdamW's state to train_state/, and `extra` to trainer_state.json. all
    ranks."""
    folder, rank = Path(directory) / "train_state", dist.get_rank() if dist.is_initialized() else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(_train_state(params, optimizer), storage_writer=dcp.FileSystemWriter(folder))
        except CheckpointException as e:  # which is no Exception
            raise OSError(0, reason_of(first_failure(e))) from e
    digests = [{p.name: file_digest(p) for p in sorted(folder.glob(f"__{rank}_*.distcp"))}]
    if dist.is_initialized():
        mine, digests = digests[0], [None] * dist.get_world_size()
        dist.all_gather_object(digests, mine)
    if rank == 0:  # last: it marks a complete state
        files = {name: digest for part in digests for name, digest in part.items()}
        write_json(Path(directory) / "trainer_state.json", {**extra, "train_state": files})


def first_failure(error: BaseException) -> BaseException:
    """What went wrong on the first rank, where torch.distributed.checkpoint lists what did on each."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error


def check_train_state(directory, files: dict) -> None:
    """Compare the files of train_state/ with their checksums; ranks take files in turn. all ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    for name in sorted(files)[rank::size]:
        path = Path(directory) / "train_state" / os.path.basename(name)
        try:
            if file_digest(path) != files[name]:
                problem = f"{path} has changed since it was saved"
        except OSError as e:
            problem = f"{path}: {e.strerror}"
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * size
        dist.all_gather_object(problems, problem)
    if problem := next(filter(None, problems), None):
        raise ValueError(
            f"{problem}: the checkpoint is damaged; remove {directory} to resume from an earlier one"
        )


def load_train_state(directory, params: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Read back what save_train_state wrote, bit for bit, on any
    number of ranks; returns `extra`. all ranks."""
    directory = Path(directory)
    extra = read_json(directory / "trainer_state.json", "expected a checkpoint-N directory of a training run")
    files = extra.pop("train_state", {})
    check(files, dict[str, str], f"{directory / 'trainer_state.json'}: train_state")
    check_train_state(directory, files)
    state = _train_state(params, optimizer)
    try:
        reader = StateReader(directory / "train_state")
        saved = reader.read_metadata().state_dict_metadata
        here = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
        # pipeline stages hold different names; all ranks must come to the same verdict
        if dist.is_initialized():
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
                f"{directory} is another run's training state: {'; '.join(problems[:8])}{more}; resume with "
                "the model, precision and trainable parameters it was saved with, or set overwrite_output_dir"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader)
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        CheckpointException,
        AttributeError,
        TypeError,
        IndexError,
    ) as e:
        raise ValueError(
            f"{directory}/train_state can't be read ({reason_of(first_failure(e))}); remove "
            f"{directory} to resume from an earlier one"
        ) from None
    return extra


class Pieces(torch.Tensor):
    """What this rank holds of a tensor-parallel parameter (or its AdamW state), as
    torch.distributed.checkpoint takes it: a tensor of the whole shape without memory, and rectangles of it
    {place in the whole: view of the rank's memory}. Packed blocks make several of them."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, cut: parallel.Cut):
        shape = [n * cut.size if i == cut.dim else n for i, n in enumerate(tensor.shape)]
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=tensor.dtype, device=tensor.device)

    def __init__(self, tensor: torch.Tensor, cut: parallel.Cut):
        local = self.local = parallel.local(tensor)
        first = parallel.place_of_shard(tensor)[1] if parallel.is_sharded(tensor) else [0] * tensor.ndim
        self.pieces: dict[tuple, torch.Tensor] = {}
        start, end, at = first[cut.dim], first[cut.dim] + local.shape[cut.dim], 0
        for begin, stop in cut.rows(start, end, tensor.shape[cut.dim]) if local.numel() else ():
            place = list(first)
            place[cut.dim] = begin
            self.pieces[tuple(place)] = local.narrow(cut.dim, at, stop - begin)
            at += stop - begin

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
    """Flat {key: tensor} that shares memory with parameters and AdamW state; missing AdamW state is created
    (zeros)."""

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
            assert set(slots) == {"step", "exp_avg", "exp_avg_sq"}, (
                f"not plain AdamW: its state has {sorted(slots)}"
            )
            for key, value in slots.items():
                state[f"optim.{names[id(p)]}.{key}"] = entry(p, value)
    return state
