"""Ranks that meet: each way in which they cannot is said as what it is, and one that hangs is noticed."""

import os
import re
import signal
import socket
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Replaced, run, together
from small import arguments

import meeting
import parallel
import run_dir
import terminal
import train


def listener() -> socket.socket:
    """Something else that has a port of this machine, and never says a word."""
    s = socket.socket()
    s.bind(("0.0.0.0", 0))
    s.listen()
    return s


def free_port() -> int:
    with listener() as s:
        return s.getsockname()[1]


@pytest.fixture
def place(monkeypatch):
    """Sets where the ranks meet."""

    def set_place(rank: int, size: int, port: int, host: str = "127.0.0.1") -> None:
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setattr(meeting, "MEET", timedelta(seconds=1))
    return set_place


def test_a_port_that_is_taken(place, capsys):
    """Also through the whole of train.main: nobody is gone."""
    with listener() as other:
        port = other.getsockname()[1]
        place(0, 2, port)
        assert terminal.cli(lambda: train.main(["--model", "qwen_vl"])) == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error")]
    assert line.startswith(f"error: [rank 0] MASTER_PORT={port} is taken on this machine")
    assert "--master_port" in line and "gone" not in line


def test_a_rank_0_that_is_not_there(place):
    place(1, 2, free_port())
    with pytest.raises(
        ValueError, match="no rank 0 was found at MASTER_ADDR=127.0.0.1 .*connection refused.*set both"
    ):
        meeting.Meeting()


def test_a_host_name_that_nobody_has(place):
    place(1, 2, free_port(), "no.such.host.invalid")
    with pytest.raises(ValueError, match="MASTER_ADDR=no.such.host.invalid .*no machine of that name"):
        meeting.Meeting()


def test_a_stranger_that_listens(place, monkeypatch):
    """torch waits for its answer without an end."""
    with listener() as other:
        place(1, 2, other.getsockname()[1])
        monkeypatch.setattr(meeting, "MEET", timedelta(seconds=-9))  # and the ten that are added
        with pytest.raises(ValueError, match="something else than a training run listens there"):
            meeting.Meeting()


def test_ranks_that_do_not_come(place):
    place(0, 3, free_port())
    with pytest.raises(ValueError, match="1 of 3 ranks came .* start the others too"):
        meeting.Meeting()


def introduced(place, rank: int, size: int, port: int) -> meeting.Meeting:
    """A rank that only says who it is: no thread of its own."""
    place(rank, size, port)
    one = object.__new__(meeting.Meeting)
    server = dist.TCPStore("127.0.0.1", port, is_master=not introduced.servers, wait_for_workers=False)
    introduced.servers.append(server)
    one.rank, one.size, one.store = rank, size, dist.PrefixStore("start-0", server)
    one.introduce()
    return one


def test_ranks_that_contradict_each_other(place):
    introduced.servers, port = [], free_port()
    introduced(place, 0, 2, port)
    with pytest.raises(ValueError, match="WORLD_SIZE=3 here, and 2 on another rank"):
        introduced(place, 1, 3, port)
    with pytest.raises(ValueError, match="two processes have RANK=1"):
        introduced(place, 1, 2, port)
    first = introduced.servers[0]
    assert dist.PrefixStore("start-0", first).get("failed").startswith(b"rank 1: WORLD_SIZE=3")


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "The server socket has failed to listen on any local network address. EADDRINUSE",
            "a port is taken",
        ),
        (
            "[enforce fail at gloo/transport/tcp/device.cc:84] rp != nullptr. Unable to find address for: x",
            "no address",
        ),
        ("Gloo connectFullMesh failed with gloo: timed out", "can't connect among themselves"),
        ("[x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7200000ms for recv", "in time"),
        (
            "NCCL error: invalid usage, NCCL version 2.27. Duplicate GPU detected : rank 1 and rank 0",
            "one GPU",
        ),
        (
            "NCCL error in: x.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
            "NCCL failed",
        ),
        (
            "[x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:19",
            "another rank is gone",
        ),
        ("NCCL error: remote process exited or there was a network error", "another rank is gone"),
    ],
)
def test_each_cause_has_its_own_words(text, said):
    line = meeting.between_ranks(dist.DistBackendError(text))
    assert said in line and (": " in line) and ("gone" in line) == ("gone" in said) and "\n" not in line


def test_every_script_says_it_in_one_line(capsys):
    def lost():
        raise dist.DistBackendError("Connection closed by peer [127.0.0.1]:19")

    assert terminal.cli(lost) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "another rank is gone (Connection closed by peer" in line
    with pytest.raises(RuntimeError, match="a fault of ours"):
        terminal.cli(lambda: exec("raise RuntimeError('a fault of ours')"))


def test_other_errors_are_not_the_ranks():
    assert meeting.between_ranks(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def suspended_at_3(original, *args, **options):
    """Rank 1 is there, and never enters the collectives of step 3: as NCCL waits for a rank that is dead."""
    where = args[0]
    if where.state["step"] == 2 and os.environ["RANK"] == "1":
        subprocess.Popen(["sh", "-c", f"sleep 12; kill -9 {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif where.state["step"] == 2:
        meeting.SILENT, meeting.GRACE = timedelta(seconds=4), timedelta(seconds=1)
    return original(*args, **options)


def told_to_end_at_3(original, *args, **options):
    """As torchrun does when a rank has died; here long before its silence would be noticed."""
    where = args[0]
    if where.state["step"] == 2 and os.environ["RANK"] == "0":
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"])
        meeting.PRESSED, meeting.GRACE = timedelta(seconds=4), timedelta(seconds=1)
        return original(*args, **options)
    return suspended_at_3(original, *args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("how", [suspended_at_3, told_to_end_at_3])
def test_a_rank_that_hangs_is_noticed(base, dataset, tmp_path, capfd, how):
    """gloo notices a connection that ends, NCCL not even that: the ranks' beats say it, and the line names
    the checkpoint."""
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match=r"exit codes \[1, -9\]"):
        run(
            arguments(base, dataset, out, max_steps=4, save_steps=1), 2, Replaced("train.Run.train_step", how)
        )
    (line,) = [s for s in capfd.readouterr().err.splitlines() if s.startswith("error")]
    assert re.match(
        r"error: \[rank 0\] another rank is gone \(rank 1 has not been heard of .*checkpoint-2$", line
    )


class Elsewhere:
    """train.main of which rank 1 works in another directory: what a machine without the shared one sees."""

    def __call__(self, argv: list[str]) -> int:
        run_dir.SEEN = 0.5
        Path(f"machine {os.environ['RANK']}").mkdir()
        os.chdir(f"machine {os.environ['RANK']}")
        return train.main(argv)


def test_ranks_without_a_shared_directory_are_refused(base, dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"exit codes \[1, 1\]"):
        run(arguments(base, dataset, Path("out"), max_steps=2), 2, Elsewhere())
    lines = sorted(s for s in capfd.readouterr().err.splitlines() if s.startswith("error"))
    assert len(lines) == 2 and "stopped, since another rank did: rank 1: output_dir=" in lines[0]
    assert re.match(r"error: \[rank 1\] output_dir=.*/machine 1/out on .* is not the one of rank 0", lines[1])
    assert not [*tmp_path.glob("machine ?/out/*checkpoint*")]


# ---- who started the ranks

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm(monkeypatch):
    """slurm(name=value): the environment of a task, from which os.environ recovers."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in RANKS})
    return lambda **more: os.environ.update(more)


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[07-09,12]", "gpu07"), ("a1,a2", "a1"), ("rack3-[1,4]-ib,login", "rack3-1-ib"), ("one", "one")],
)
def test_tasks_of_srun_are_ranks(slurm, nodes, first):
    slurm(**SRUN, SLURM_STEP_NODELIST=nodes)
    meeting.check_environment()
    assert [os.environ[name] for name in RANKS[:4]] == ["5", "8", "1", first]
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


def test_what_torchrun_says_stands(slurm):
    slurm(**SRUN, RANK="1", WORLD_SIZE="2")
    meeting.check_environment()
    assert os.environ["RANK"] == "1" and os.environ["WORLD_SIZE"] == "2"


def test_one_task_is_one_process(slurm):
    slurm(**SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    meeting.check_environment()
    assert "RANK" not in os.environ and meeting.Meeting().size == 1


def test_a_batch_script_that_forgot_srun_is_refused(slurm):
    slurm(SLURM_PROCID="0", SLURM_NTASKS="4")
    meeting.check_environment()
    with pytest.raises(ValueError, match="SLURM has 4 tasks.*start all with srun"):
        meeting.Meeting()


@pytest.mark.parametrize("visible, local, index", [(8, "3", 3), (1, "3", 0), (2, "3", None), (1, "0", 0)])
def test_the_gpu_of_a_rank(monkeypatch, visible, local, index):
    """With one visible GPU a task it is that one, whatever LOCAL_RANK says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", local)
    if index is None:
        with pytest.raises(ValueError, match="LOCAL_RANK=3, but 2 GPUs are visible.*--nproc_per_node 2"):
            parallel.own_device()
    else:
        assert parallel.own_device() == torch.device("cuda", index)


def facts_of(rank):
    """-> what two ranks with other batches and signals are told, and in how many messages."""
    batches = [
        SimpleNamespace(
            num_supervised=3 + rank + i,
            input_ids=range(10 * (1 + rank)),
            sample_ids=["a"] * (1 + i),
            bad=[("x", "y")] * rank,
            pixel_values=1 if rank == i == 1 else None,
        )
        for i in range(2)
    ]
    model = SimpleNamespace(loss_counts=lambda b: [b.num_supervised, 7])
    world = parallel.World(rank, 2, torch.device("cpu"), dp_rank=rank, dp_size=2)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
        facts = train.step_facts(model, batches, (signal.SIGINT, signal.SIGTERM)[rank], world)
    return facts, sent.call_count


def test_the_facts_of_a_step_are_one_message():
    (first, one), (second, other) = together(facts_of)
    assert first == second and one == other == 1
    assert first == train.Facts([16, 28], 60, 16, 6, 2, signal.SIGTERM, [False, True])
