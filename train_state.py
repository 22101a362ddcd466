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

import parallel
from checkpoint import SAFETENSORS_DTYPES, file_digest, reason_of, shortened, write_json
from schema import check, read_json

# torch.distributed.checkpoint is imported where it is used: it takes a second of CPU time, which commands
# that neither save nor resume do without.


# ---- the index of a state, without running what a pickle may ask for

PATHS = ("PosixPath", "PurePosixPath", "WindowsPath")
KNOWN = {  # what describes tensors
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING ChunkStorageMetadata "
        "MetadataIndex StorageMeta".split()
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", *(str(dtype).removeprefix("torch.") for dtype in SAFETENSORS_DTYPES.values())),
    "torch.serialization": ("_get_layout",),
    "pathlib": PATHS,
    "pathlib._local": PATHS,  # Python 3.13 has them there
    "collections": ("OrderedDict",),
}


class TensorsOnly(pickle.Unpickler):
    """Knows the classes that describe tensors, and nothing that could be run."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return member  # so does Python 3.11.0 to 3.11.3 name one of an enumeration
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        if name in PATHS:  # of the system that saved it
            name, module = "PurePosixPath", "pathlib"
        return super().find_class(module, name)


def member(kind, name: str):
    """In the place of getattr, which gives anything of anything."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which describes no tensor")


def read_metadata(folder: Path):
    """Which tensors a state holds, and where in its files each piece of them lies."""
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    with open(folder / ".metadata", "rb") as file:
        metadata = TensorsOnly(file).load()
    tensors = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(metadata, Metadata) or not isinstance(tensors, dict):
        raise pickle.UnpicklingError("it describes no training state")
    if not all(isinstance(t, TensorStorageMetadata) for t in tensors.values()):
        raise pickle.UnpicklingError("it holds something else than tensors")
    for place in metadata.storage_data.values():
        # A path out of the directory would read what it likes.
        if os.path.basename(place.relative_path) != place.relative_path:
            raise pickle.UnpicklingError(
                f"it names the file {place.relative_path!r} outside of the directory"
            )
    return metadata


# ---- a whole state, all ranks


def save_train_state(directory, params: dict, optimizer: torch.optim.Optimizer, extra: dict) -> None:
    """Write {name: parameter} and AdamW's state to train_state/, and `extra` to trainer_state.json. all
    ranks."""
    import torch.distributed.checkpoint as dcp

    folder, rank = Path(directory) / "train_state", dist.get_rank() if dist.is_initialized() else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(_train_state(params, optimizer), storage_writer=dcp.FileSystemWriter(folder))
        except dcp.CheckpointException as e:  # which is no Exception
            raise OSError(0, reason_of(first_failure(e))) from e
    # Each rank reads back the files that it wrote.
    digests = parallel.from_all({p.name: file_digest(p) for p in sorted(folder.glob(f"__{rank}_*.distcp"))})
    if rank == 0:  # last: it marks a complete state
        files = {name: digest for part in digests for name, digest in part.items()}
        write_json(Path(directory) / "trainer_state.json", {**extra, "train_state": files})


def first_failure(error: BaseException) -> BaseException:
    """What went wrong on the first rank, where torch.distributed.checkpoint lists what did on each."""
    while failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    return error


def check_train_state(directory, files: dict) -> None:
    """Compare the files of train_state/ with their checksums; ranks take files in turn. all ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    # In turn: each file is read once, not by every rank, and a checkpoint has many gigabytes.
    for name in sorted(files)[rank::size]:
        path = Path(directory) / "train_state" / os.path.basename(name)
        try:
            if file_digest(path) != files[name]:
                problem = f"{path} has changed since it was saved"
        except OSError as e:
            problem = f"{path}: {e.strerror}"
    if problem := next(filter(None, parallel.from_all(problem)), None):
        raise ValueError(
            f"{problem}: the checkpoint is damaged; remove {directory} to resume from an earlier one"
        )


# What torch meets in a damaged index or file.
DAMAGED = (EOFError, pickle.UnpicklingError, AttributeError, TypeError, IndexError)


def load_train_state(directory, params: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Read back what save_train_state wrote, bit for bit, on any number of ranks; returns `extra`. all
    ranks."""
    import torch.distributed.checkpoint as dcp

    directory = Path(directory)
    extra = read_json(directory / "trainer_state.json", "expected a checkpoint-N directory of a training run")
    # Checkpoints of before there were checksums have none: they are read as they are.
    files = extra.pop("train_state", {})
    check(files, dict[str, str], f"{directory / 'trainer_state.json'}: train_state")
    check_train_state(directory, files)
    state = _train_state(params, optimizer)
    try:
        metadata = read_metadata(directory / "train_state")
        saved = metadata.state_dict_metadata
        held = parallel.from_all({name: (tuple(t.shape), t.dtype) for name, t in state.items()})
        # pipeline stages hold different names; all ranks must come to the same verdict
        here = {name: value for part in held for name, value in part.items()}
        problems = [f"missing {name}" for name in sorted(set(here) - set(saved))]
        problems += [f"unexpected {name}" for name in sorted(set(saved) - set(here))]
        for name in sorted(set(saved) & set(here)):  # dcp.load would cast silently
            was = (tuple(saved[name].size), saved[name].properties.dtype)
            if was != here[name]:
                problems.append(f"{name} is {was[1]} {was[0]}, expected {here[name][1]} {here[name][0]}")
        if problems:
            raise ValueError(
                f"{directory} is another run's training state: {shortened(problems)}; resume with the model, "
                "precision and trainable parameters it was saved with, or set overwrite_output_dir"
            )
        reader = dcp.FileSystemReader(directory / "train_state")
        reader.read_metadata = lambda **kwargs: metadata  # torch's own would unpickle it without a look
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader)
    except (OSError, dcp.CheckpointException, *DAMAGED) as e:
        raise ValueError(
            f"{directory}/train_state can't be read ({reason_of(first_failure(e))}); remove "
            f"{directory} to resume from an earlier one"
        ) from None
    return extra


# ---- its tensors


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
        # Where this rank's rows lie in the whole: packed blocks (q, k, v) make several ranges of them.
        for begin, stop in cut.rows(start, end, tensor.shape[cut.dim]) if local.numel() else ():
            place = list(first)
            place[cut.dim] = begin
            self.pieces[tuple(place)] = local.narrow(cut.dim, at, stop - begin)
            at += stop - begin

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of a tensor without memory")

    # What torch.distributed.checkpoint asks of a tensor of a kind that it does not know.

    def __create_write_items__(self, name: str, _) -> list:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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

    def __create_chunk_list__(self) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(place), piece.size()) for place, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index) -> torch.Tensor:
        return self.pieces[tuple(index.offset)]


def _train_state(params: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Flat {key: tensor} that shares memory with parameters and AdamW state; missing AdamW state is created
    (zeros)."""

    def entry(p, value):
        return Pieces(value.detach(), p.cut) if hasattr(p, "cut") and value.ndim else value.detach()

    # Views of what trains: the checkpoint is written from, and read into, that memory itself.
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
