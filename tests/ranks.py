"""Ranks for tests: processes that see what torchrun would tell them.

    run(argv, world=2)                        train.main on two ranks; fails unless both end with 0
    run(argv, main=Replaced("train.evaluate_loss", broken))  the same with a function of ours in place of one
    together(function, *args, world=2)        what function(rank, *args) returns on each rank of a gloo group

A rank shares nothing with the test but its arguments, environment, working directory and output: functions
and arguments are pickled, as for "spawn", so a test's closures and monkeypatches do not reach it. On Linux
the ranks come from multiprocessing's fork server, which has imported torch and the scripts once and never
computes anything: a rank starts in milliseconds, without threads or process groups of anybody else.
"""

import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from multiprocessing.reduction import DupFd
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import terminal
import train

CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")
# What ranks are forked with: also what a run loads late, or each of them would take a second to load it.
LATE = (
    "_dynamo",
    "distributed.checkpoint",
    "distributed.fsdp",
    "distributed.pipelining",
    "distributed.tensor",
)
CONTEXT.set_forkserver_preload(
    ["ranks", "train", "evaluate", "generate", "merge", "train_state", *(f"torch.{name}" for name in LATE)]
)
HANGS = 600  # seconds after which a rank is taken for hanging: a guard, no measure
GRACE = 60  # seconds that the other ranks have to notice that one has failed


class Outputs:
    """Standard output and error of the process that pickles it: unpickled, they become the reader's own."""

    def __reduce__(self):
        return _take_over, (DupFd(1), DupFd(2))


def _take_over(*outputs) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(output.detach(), number)


@dataclass
class Replaced:
    """A script's main while `place` ("module.function") is ours: called as ours(original, *arguments)."""

    place: str
    ours: Callable
    main: Callable = train.main

    def __call__(self, argv: list[str]) -> int:
        owner, name = self.place.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner)
        original = getattr(owner, name)
        with mock.patch.object(owner, name, lambda *args, **options: self.ours(original, *args, **options)):
            return self.main(argv)


def script(main: Callable, argv: list[str]) -> None:
    """A script's main as its command line runs it; its code is the process's."""
    sys.exit(terminal.cli(lambda: main(argv)))


def start(function: Callable, *args, world: int = 1) -> list:
    """`function(*args)` in `world` processes -> the processes."""
    # As under torchrun the store is not a rank's: a port that we only looked up could be taken by anybody
    # before rank 0 listens on it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # the fork server takes no path from us before Python 3.12, and must not look into a test's directory
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), PYTHONSAFEPATH="1"):
        if CONTEXT.get_start_method() == "forkserver":
            ensure_running()
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        job = (Outputs(), environment, function, args)
        processes.append(CONTEXT.Process(target=_rank, args=job))
        processes[-1].start()
        processes[-1].store = store  # it serves as long as somebody holds one of them
    return processes


def _rank(_outputs, environment: dict, function: Callable, args: tuple) -> None:
    for stream in (sys.stdout, sys.stderr):  # a line in one piece: ranks say things at the same moment
        stream.reconfigure(line_buffering=True, write_through=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def exit_codes(processes: list) -> list[int]:
    """Waits for all; what hangs is killed and fails the test."""
    end = time.monotonic() + HANGS
    while running := [p for p in processes if p.exitcode is None]:
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + GRACE)
        if not wait([p.sentinel for p in running], max(0, end - time.monotonic())):
            for p in running:
                p.kill()
            pytest.fail(f"a rank hangs; the others' exit codes: {[p.exitcode for p in processes]}")
        for p in running:
            p.join(0)
    return [p.exitcode for p in processes]


def run(argv: list[str], world: int = 1, main: Callable = train.main) -> None:
    """A script's main on `world` ranks; exit codes must be 0."""
    codes = exit_codes(start(script, main, argv, world=world))
    assert codes == [0] * world, f"exit codes {codes}; what the ranks said stands in the captured output"


def together(function: Callable, *args, world: int = 2) -> list:
    """function(rank, *args) on each rank of one gloo group -> what they return, by rank."""
    with tempfile.TemporaryDirectory() as directory:
        codes = exit_codes(start(_in_group, function, args, directory, world=world))
        assert codes == [0] * world, f"exit codes {codes}; what the ranks said stands in the captured output"
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _in_group(function: Callable, args: tuple, directory: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(function(rank, *args), Path(directory) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still computes with it
    dist.destroy_process_group()
