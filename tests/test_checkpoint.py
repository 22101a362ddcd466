"""checkpoint.py: weight files against safetensors and torch.save, atomic directories, resume on another
layout."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import together
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import checkpoint as ck
import parallel
import train_state
import vlm


def some_tensors() -> dict:
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"f{i}": torch.randn(3, 5, generator=g).to(dtype)
        for i, dtype in enumerate([torch.float64, torch.float32, torch.float16, torch.bfloat16])
    }
    for dtype in [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]:
        tensors[str(dtype)] = torch.randint(0, 2, (7,), generator=g).to(dtype)
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize(
    "kind", ["safetensors", "safetensors shards", "bin", "bin before torch 1.6", "bin shards"]
)
def test_open_weights_reads_every_format(tmp_path, kind):
    tensors = some_tensors()
    halves = [dict(list(tensors.items())[:6]), dict(list(tensors.items())[6:])]
    if kind == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif kind == "bin before torch 1.6":
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        safe = kind.startswith("safetensors")
        stem, end, write = (
            ("model", "safetensors", save_file) if safe else ("pytorch_model", "bin", torch.save)
        )
        for i, half in enumerate(halves):
            write(half, tmp_path / f"{stem}-{i}.{end}")
        index = {"weight_map": {name: f"{stem}-{i}.{end}" for i, half in enumerate(halves) for name in half}}
        (tmp_path / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    weights = ck.open_weights(tmp_path)
    assert weights.names == set(tensors)
    for name, tensor in tensors.items():
        assert same(weights.read(name), tensor) and weights.shape(name) == tensor.shape
        assert weights.dtype(name) == tensor.dtype
    scratch = weights.scratch()
    assert all(same(weights.read(name, scratch), tensor) for name, tensor in tensors.items())
    first = weights.read("f1")
    first.zero_()  # memory of its own
    assert same(weights.read("f1"), tensors["f1"])


def test_damaged_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no model.safetensors"):
        ck.open_weights(tmp_path)
    for file_name, write in [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]:
        path = tmp_path / file_name
        write({"a": torch.randn(300), "b": torch.randn(300)}, path)
        whole = path.read_bytes()
        for size in (0, 5, 50, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{file_name} .*fetch it again"):
                ck.open_weights(tmp_path)
        path.unlink()
    save_file({"a": torch.randn(3)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(ValueError, match="x.safetensors does not hold 'b'"):
        ck.open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    with pytest.raises(ValueError, match="y.safetensors is missing"):
        ck.open_weights(tmp_path)


def test_save_weights_shards_and_tied_tensors(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)}
    tensors["tied"], tensors["view"] = tensors["t4"], tensors["t0"].t()
    for limit, files in [(10**9, 1), (1000, 4)]:
        directory = tmp_path / str(limit)
        directory.mkdir()
        ck.save_weights(directory, iter(tensors.items()), max_shard_bytes=limit)
        assert len(list(directory.glob("*.safetensors"))) == files
        loaded = {}
        for path in directory.glob("*.safetensors"):
            loaded |= load_file(path)
        assert set(loaded) == set(tensors) and all(same(loaded[n], t) for n, t in tensors.items())
        weights = ck.open_weights(directory)
        assert all(same(weights.read(n), t) for n, t in tensors.items())
    assert (
        json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        == 7 * 400
    )
    consumed = []
    ck.save_weights(tmp_path, ((consumed.append(n) or n, t) for n, t in tensors.items()), write=False)
    assert len(consumed) == len(tensors) and not list(tmp_path.glob("*.safetensors"))


def test_load_into_is_strict(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()
    tensors = {name: torch.randn(p.shape) for name, p in model.named_parameters()}

    def load(tensors, **kwargs):
        save_file(tensors, tmp_path / "model.safetensors")
        ck.load_into(dict(model.named_parameters()), ck.open_weights(tmp_path), **kwargs)

    load(tensors)
    assert all(torch.equal(p, tensors[name].bfloat16()) for name, p in model.named_parameters())
    renamed = {name.replace("1.bias", "1.beta"): t for name, t in tensors.items()}
    with pytest.raises(ValueError, match="missing 1.bias; unexpected 1.beta"):
        load(renamed)
    load(renamed, skip=["1.bias", "1.beta"])
    with pytest.raises(ValueError, match=r"0.weight is \(4, 2\), expected \(4, 3\)"):
        load(tensors | {"0.weight": torch.randn(4, 2)})
    with pytest.raises(ValueError, match="unexpected x7; and 4 more"):
        load(tensors | {f"x{i:x}": torch.zeros(1) for i in range(12)})


def test_reading_does_not_double_the_memory(tmp_path):
    """Peak resident memory of one big file, read tensor by tensor into a model: at most 1.2 times the
    weights."""
    save_file(
        {f"w{i}": torch.full((10, 1024, 256), 2.0) for i in range(16)}, tmp_path / "model.safetensors"
    )  # 160 MiB
    script = """
import resource, sys, torch, checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
params = {f"w{i}": torch.ones(10, 1024, 256) for i in range(16)}
before = peak()
checkpoint.load_into(params, checkpoint.open_weights(sys.argv[1]))
assert all((p == 2).all() for p in params.values())
print((160 + peak() - before) / 160)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) <= 1.2


def test_config_and_model_kind(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        ck.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qw')
    with pytest.raises(ValueError, match="not valid JSON"):
        ck.read_config(tmp_path)
    assert vlm.kind_of({"model_type": "qwen", "visual": {}}) == "qwen_vl"
    assert vlm.kind_of({"model_type": "blip-2"}) == "blip2"
    assert vlm.kind_of({"model_type": "chatglm"}) == "visualglm"
    with pytest.raises(ValueError, match="'llama'"):
        vlm.kind_of({"model_type": "llama"})
    with pytest.raises(ValueError, match="'qwen'"):
        vlm.kind_of({"model_type": "qwen"})  # a text-only Qwen


def test_a_dead_data_worker_asks_no_rank_during_a_save(tmp_path, monkeypatch):
    """It is raised in the middle of anything, a collective of the save too: another one would never end."""

    def in_the_middle():
        monkeypatch.setattr(parallel, "from_all", None)
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match="DataLoader worker"), ck.atomic_dir(tmp_path / "c"):
        in_the_middle()
    assert not list(tmp_path.iterdir())


def test_atomic_dir(tmp_path):
    final = tmp_path / "run" / "checkpoint-1"
    with ck.atomic_dir(final) as directory:
        (directory / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    for error, raised in [
        (KeyError("x"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), ck.SaveError),
    ]:  # noqa: E501
        with pytest.raises(raised) as info, ck.atomic_dir(final) as directory:
            (directory / "a").write_text("half")
            raise error
        assert (final / "a").read_text() == "1" and os.listdir(final.parent) == ["checkpoint-1"]
    assert str(info.value) == (
        f"could not save {final}: No space left on device; free space or choose another place; "
        "what was saved there before is untouched"
    )
    with ck.atomic_dir(final) as directory:  # replaces
        (directory / "b").write_text("2")
    assert os.listdir(final) == ["b"] and os.listdir(final.parent) == ["checkpoint-1"]
    final.rename(final.with_name("checkpoint-1.old"))  # as a kill between the two renames leaves it
    with pytest.raises(KeyError), ck.atomic_dir(final):
        raise KeyError("x")
    assert os.listdir(final) == ["b"]
    (tmp_path / "linked").symlink_to("run/checkpoint-1")  # a link stays one: what it means is replaced
    with ck.atomic_dir(tmp_path / "linked") as directory:
        (directory / "c").write_text("3")
    (tmp_path / "name").symlink_to("linked/c")
    ck.write_json(tmp_path / "name", {})
    assert (tmp_path / "linked").is_symlink() and (tmp_path / "name").is_symlink()
    assert (final / "c").read_text() == "{}\n" and os.listdir(final) == ["c"]
    assert sorted(os.listdir(tmp_path)) == ["linked", "name", "run"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ck.SaveError):
        with ck.atomic_dir(blocked / "checkpoint-1"):
            pass


@pytest.mark.parametrize("what", ["weights", "train_state", "config"])
def test_disk_full_is_one_clear_line(tmp_path, what):
    """A file size limit makes write() fail as a full disk does, inside safetensors, DCP and Python itself."""
    script = f"""
import resource, signal, sys, torch, checkpoint, train_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
layer = torch.nn.Linear(400, 400)
params, optimizer = dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters())
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with checkpoint.atomic_dir(sys.argv[1]) as d:
        if "{what}" == "weights":
            checkpoint.save_weights(d, params.items())
        elif "{what}" == "train_state":
            train_state.save_train_state(d, params, optimizer, {{}})
        else:
            checkpoint.write_json(d / "config.json", {{"x": "y" * 200_000}})
except checkpoint.SaveError as e:
    print(e)
"""
    final = tmp_path / "checkpoint-1"
    final.mkdir()
    out = subprocess.run([sys.executable, "-c", script, str(final)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(f"could not save {final}: ") and out.stdout.count("\n") == 1, out.stdout
    assert "File too large" in out.stdout or "a write failed" in out.stdout, out.stdout
    assert os.listdir(tmp_path) == ["checkpoint-1"] and os.listdir(final) == []


def test_last_checkpoint_and_rotate(tmp_path):
    for name in [
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-99.tmp",
        "checkpoint-best",
        "other",
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()  # incomplete
    assert ck.last_checkpoint(tmp_path).name == "checkpoint-10"
    assert ck.last_checkpoint(tmp_path / "nowhere") is None
    ck.rotate(tmp_path, None)
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-99.tmp").exists()
    ck.rotate(tmp_path, 1, keep={tmp_path / "checkpoint-2"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-2",
        "checkpoint-best",
        "other",
    ]


# ---- training state: 2 ranks <-> 1 process


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (
            nn.Linear(5, 7),
            nn.Linear(7, 1),
            nn.Linear(3, 3),
        )  # odd sizes; c has no gradient
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).square().mean() + 0 * self.frozen.sum()


def toy(sharded: bool):
    model = Toy()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.a, mesh=mesh)
        fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    return model, params, torch.optim.AdamW([p for p in params.values() if p.requires_grad], lr=0.01)


def train(model, optimizer, steps: int):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def everything(params, optimizer) -> dict:
    """Full tensors of weights and AdamW state, gathered here without checkpoint.py."""
    state = dict(params)
    for name, p in params.items():
        state |= {f"{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in state.items()}


def ranks_save(rank, directory):
    model, params, optimizer = toy(sharded=True)
    train(model, optimizer, 3)
    before = everything(params, optimizer)
    with ck.atomic_dir(directory / "checkpoint-3", rank) as d:
        train_state.save_train_state(d, params, optimizer, {"step": 3})
        ck.save_weights(d, ((n, ck.gathered(p)) for n, p in params.items()), write=rank == 0)
    if rank == 0:
        torch.save(before, directory / "expected.pt")


def ranks_load(rank, directory):
    model, params, optimizer = toy(sharded=True)
    train(model, optimizer, 1)  # other values than the saved ones
    model.reshard()
    assert train_state.load_train_state(directory / "checkpoint-4", params, optimizer) == {"step": 4}
    loaded = everything(params, optimizer)
    expected = torch.load(directory / "expected.pt")
    assert set(loaded) == set(expected) and all(same(loaded[k], expected[k]) for k in expected)
    fresh = toy(sharded=True)[1]
    ck.load_into(fresh, ck.open_weights(directory / "checkpoint-4"))
    assert all(same(p.full_tensor(), expected[n]) for n, p in fresh.items())
    train(model, optimizer, 1)  # and it trains on


def ranks_fail(rank, directory):
    failed = []
    try:
        with ck.atomic_dir(directory / "checkpoint-5", rank):
            if rank == 1:
                raise OSError(28, "No space left on device")
    except ck.SaveError as e:
        failed.append(str(e))
    assert "No space left" in failed[0]
    model, params, optimizer = toy(sharded=True)
    try:  # rank 0 can't write, but keeps up with the gathering of the others
        ck.save_weights(
            directory / "nowhere", ((n, ck.gathered(p)) for n, p in params.items()), 10, rank == 0
        )
    except Exception as e:
        failed.append(str(e))
    assert len(failed) == 2 - rank
    assert dist.get_world_size() == 2 and not (directory / "checkpoint-5").exists()


class Counted:
    """`place` ("module.name") that counts bytes on the way: count(*arguments) of each call."""

    def __init__(self, owner, name: str, count):
        self.bytes, original = 0, getattr(owner, name)

        def counting(*args, **options):
            self.bytes += count(*args)
            return original(*args, **options)

        setattr(owner, name, counting)


def ranks_count(rank, directory):
    """-> bytes that this rank reads, sends and keeps of 5 tensors, two of an odd number of rows."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 33), "b": torch.nn.Linear(33, 64, bias=False)})
    model["c"] = torch.nn.Embedding(7, 16)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    if rank == 0:
        ck.save_weights(directory, expected.items())
    dist.barrier()
    for module in model.values():
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    params = dict(model.named_parameters())
    read = Counted(ck, "fill", lambda values, *_: values.nbytes)
    sent = Counted(dist, "gather", lambda part, parts, *_: part.nbytes)
    ck.load_into(params, ck.open_weights(directory))
    assert all(same(p.to_local(), expected[n].chunk(2)[rank]) for n, p in params.items())
    DTensor.full_tensor = None  # which gathers on every rank
    gathered = {n: ck.gathered(p) for n, p in params.items()}
    if rank == 0:
        assert all(same(gathered[n], expected[n]) for n in expected)
    return read.bytes, sent.bytes, sum(t.nbytes for t in gathered.values() if t is not None)


def test_each_rank_reads_and_sends_its_own_rows(tmp_path):
    total = 4 * (40 * 33 + 33 + 33 * 64 + 7 * 16)
    (read, sent, kept), (read1, sent1, kept1) = together(ranks_count, tmp_path)
    assert read + read1 == total and max(read, read1) < 0.53 * total
    assert max(sent, sent1) < 0.53 * total  # once, padded to the rows that rank 0 has
    assert kept == total and kept1 == 0


def ranks_meet_a_bad_file(rank, directory):
    mesh, rows = init_device_mesh("cpu", (2,)), torch.ones(4, 3)
    if rank == 0:
        rows[3, 1] = float("nan")  # of rank 1's half
        (directory / "nan").mkdir(), (directory / "half").mkdir()
        ck.save_weights(directory / "nan", [("weight", rows)])
        ck.save_weights(directory / "half", [("weight", torch.cat((torch.zeros(2, 3), torch.ones(2, 3))))])
    dist.barrier()
    model = torch.nn.Linear(3, 4, bias=False)
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    ck.load_into(params, ck.open_weights(directory / "half"))  # zeros here, but not everywhere
    try:
        ck.load_into(params, ck.open_weights(directory / "nan"))
    except ValueError as e:
        return str(e)


def test_what_one_rank_reads_is_said_on_all(tmp_path):
    first, second = together(ranks_meet_a_bad_file, tmp_path)
    assert first == second and "weight holds NaN" in first


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_of_a_part(parts):
    """Of packed blocks each rank has a slice: the rows that it reads are those that it takes."""
    whole = torch.arange(24)
    for rank in range(2):
        cut = parallel.Cut(0, parts, rank, 2)
        part = cut.take(whole)
        for start, end in ((0, 12), (0, 5), (3, 11), (4, 4)):
            found = [whole[a:b] for a, b in cut.rows(start, end, 12)]
            assert torch.equal(torch.cat([whole[:0], *found]), part[start:end])


def test_two_ranks_save_one_process_loads(tmp_path):
    together(ranks_save, tmp_path)
    expected = torch.load(tmp_path / "expected.pt")
    model, params, optimizer = toy(sharded=False)
    assert train_state.load_train_state(tmp_path / "checkpoint-3", params, optimizer) == {"step": 3}
    loaded = everything(params, optimizer)
    assert set(expected) < set(loaded)  # plus the zeros of c, which never had a gradient
    for name, tensor in loaded.items():
        assert same(tensor, expected[name]) if name in expected else not tensor.any(), name
    assert float(loaded["a.weight/step"]) == 3 and loaded["a.weight/exp_avg"].any()
    weights = ck.open_weights(tmp_path / "checkpoint-3")
    assert all(same(weights.read(name), expected[name]) for name in params)


def test_one_process_saves_two_ranks_load(tmp_path):
    model, params, optimizer = toy(sharded=False)
    train(model, optimizer, 4)
    with ck.atomic_dir(tmp_path / "checkpoint-4") as d:
        train_state.save_train_state(d, params, optimizer, {"step": 4})
        ck.save_weights(d, params.items())
    torch.save(everything(params, optimizer), tmp_path / "expected.pt")
    together(ranks_load, tmp_path)


def test_failure_on_one_rank_is_failure_on_all(tmp_path):
    together(ranks_fail, tmp_path)
    assert os.listdir(tmp_path) == []


def test_resumed_steps_are_exact_and_other_states_are_refused(tmp_path):
    model, params, optimizer = toy(sharded=False)
    train(model, optimizer, 2)
    train_state.save_train_state(tmp_path, params, optimizer, {"loss": 0.1, "order": [1, 2]})
    train(model, optimizer, 2)
    model2, params2, optimizer2 = toy(sharded=False)
    assert train_state.load_train_state(tmp_path, params2, optimizer2) == {"loss": 0.1, "order": [1, 2]}
    train(model2, optimizer2, 2)
    assert all(torch.equal(params[n], params2[n]) for n in params)

    half = {name: nn.Parameter(p.detach().bfloat16()) for name, p in params.items()}
    with pytest.raises(ValueError, match="a.bias is torch.float32 .* expected torch.bfloat16"):
        train_state.load_train_state(tmp_path, half, torch.optim.AdamW(half.values()))
    few = {"a.weight": params["a.weight"]}
    with pytest.raises(ValueError, match="unexpected model.a.bias"):
        train_state.load_train_state(tmp_path, few, torch.optim.AdamW(few.values()))
    next((tmp_path / "train_state").glob("*.distcp")).write_bytes(np.zeros(10, np.uint8).tobytes())
    with pytest.raises(ValueError, match="is damaged; remove"):
        train_state.load_train_state(tmp_path, *toy(sharded=False)[1:])


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL']}",)


class Getattr:
    """What a class of those that are known has, which is no member of an enumeration."""

    def __reduce__(self):
        return getattr, (Metadata, "__init__")


@pytest.mark.parametrize("metadata", [Evil(), Getattr(), {"a": 1}, [], b"", b"\x80\x04cos\nsystem\n."])
def test_resuming_runs_no_code_of_the_checkpoint(tmp_path, metadata, monkeypatch):
    """Neither a pickle that names a function, nor another object or half a pickle, in .metadata."""
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    _, params, optimizer = toy(sharded=False)
    train_state.save_train_state(tmp_path, params, optimizer, {})
    raw = metadata if isinstance(metadata, bytes) else pickle.dumps(metadata)
    (tmp_path / "train_state" / ".metadata").write_bytes(raw)
    with pytest.raises(ValueError, match="train_state can't be read"):
        train_state.load_train_state(tmp_path, params, optimizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "reduced", [lambda x, _: (getattr, (type(x), x.name)), lambda x, _: (type(x), (x.value,))]
)
def test_every_pythons_state_is_read(tmp_path, monkeypatch, reduced):
    """Members of an enumeration as Python 3.11.0 to 3.11.3 pickles them, and as others do."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
    _, params, optimizer = toy(sharded=False)
    train_state.save_train_state(tmp_path, params, optimizer, {"step": 7})
    before = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.data.zero_()
    assert train_state.load_train_state(tmp_path, params, optimizer) == {"step": 7}
    assert all(torch.equal(params[n], before[n]) for n in params)


def test_files_are_whole_or_not_there_and_follow_the_umask(tmp_path):
    path = tmp_path / "x.json"
    ck.write_json(path, {"a": 1})
    with pytest.raises(KeyError), ck.atomic_file(path, "w") as file:
        file.write("half")
        raise KeyError
    assert ck.read_json(path, "") == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(ck.SaveError, match="No such file"):
        ck.write_json(tmp_path / "nowhere" / "x.json", {})
    old = os.umask(0o027)
    try:
        with ck.atomic_dir(tmp_path / "checkpoint-1") as directory:
            ck.save_weights(directory, [("a", torch.zeros(2))])
        ck.write_json(path, {})
    finally:
        os.umask(old)
    for made in (path, tmp_path / "checkpoint-1" / "model.safetensors"):
        assert made.stat().st_mode & 0o777 == 0o640, made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_value_is_found_by_its_bits(dtype):
    for values in ([1.0, -3.0, 2.0], [-1.0, -2.0], [3.0, 1.0], [0.0, -0.0], [-0.0], [1e-7, -1e-6], []):
        tensor = torch.tensor(values, dtype=dtype)
        assert ck.largest(tensor, "a") == (float(tensor.abs().max()) if values else 0)
        assert ck.largest(tensor.expand(2, -1).T, "a") == ck.largest(tensor, "a")
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for other in (1.0, -1.0):
            with pytest.raises(ValueError, match="a holds NaN or infinity"):
                ck.largest(torch.tensor([other, bad, other], dtype=dtype), "a")


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_in_pieces_looks_at_every_one(tmp_path, monkeypatch, dtype, held):
    monkeypatch.setattr(ck, "PIECE_BYTES", 64)
    full = {f"{n}": torch.randn(7, 11).to(dtype) for n in range(3)} | {"none": torch.empty(0, 3, dtype=dtype)}
    into = {name: torch.zeros_like(t, dtype=held) for name, t in full.items()}
    ck.save_weights(tmp_path, full.items())
    monkeypatch.setattr(ck.Weights, "read", None)  # no tensor is held whole beside its parameter
    ck.load_into(into, ck.open_weights(tmp_path))
    assert all(torch.equal(into[name], t.to(held)) for name, t in full.items())
    full["1"][-1, -1] = float("-inf")
    ck.save_weights(tmp_path, full.items())
    with pytest.raises(ValueError, match="1 holds NaN or infinity"):
        ck.load_into(into, ck.open_weights(tmp_path))
    weights = ck.open_weights(tmp_path)
    os.truncate(tmp_path / "model.safetensors", os.path.getsize(tmp_path / "model.safetensors") - 5)
    with pytest.raises(ValueError, match="model.safetensors ended while"):
        ck.load_into({"2": into["2"], "0": into["0"]}, weights, skip={"1", "none"})
