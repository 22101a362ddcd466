"""How the ranks of a run find each other, notice that one is gone, and say what went wrong between them.

    meeting = Meeting()                     # RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun sets them
    meeting.share("start", text)            # what rank 0 gives, on every rank
    meeting.wait_for_all("prepared")

It comes before the process group: ranks wait here however long one of them reads data, no weights are loaded
yet, and a mistake is one line. The group is made over the same store (parallel.init_world). Each rank beats
there once a second for as long as the run goes on, since NCCL alone would wait hours for a rank that is dead.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

MEET = timedelta(minutes=10)  # that the ranks of a run have to come
TIMEOUT = timedelta(hours=2)  # of a collective: as long as rank 0 may write a large checkpoint
SILENT = timedelta(minutes=5)  # after which a rank that was heard of is taken for dead
PRESSED = timedelta(seconds=8)  # the same once this rank was told to end: torchrun kills it 30 seconds later
GRACE = timedelta(seconds=15)  # that this rank has to end by itself when another one has failed
HOW = "torchrun --master_addr, --master_port or --rdzv_endpoint"


# ---- the environment that torchrun or srun makes


def check_environment() -> None:
    """RANK, WORLD_SIZE and their like, which torchrun sets, are numbers that fit together, or none of them is
    set."""
    take_ranks_of_slurm()
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        text = os.environ.get(name)
        if text is not None and not re.fullmatch(r"\d{1,9}", text):
            raise ValueError(
                f"the environment has {name}={text[:40]!r}, expected a number; unset it, or use torchrun"
            )
        numbers[name] = None if text is None else int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size == 0:
        raise ValueError("the environment has WORLD_SIZE=0, expected 1 or more; unset it, or use torchrun")
    if rank is not None and size is None:
        raise ValueError(f"the environment has RANK={rank} but no WORLD_SIZE; unset it, or use torchrun")
    if rank is not None and rank >= size:
        raise ValueError(
            f"the environment has RANK={rank} with WORLD_SIZE={size}; unset both, or use torchrun"
        )


def take_ranks_of_slurm() -> None:
    """The tasks that srun starts are ranks, as if torchrun had started them. Without it each would be a run
    of its own, in the one output directory."""
    said = os.environ.get
    tasks = said("SLURM_STEP_NUM_TASKS") or (
        said("SLURM_NTASKS") if said("SLURM_PROCID", "0") != "0" else None
    )
    if (
        {"RANK", "WORLD_SIZE"} & os.environ.keys()
        or not re.fullmatch(r"\d{1,9}", tasks or "")
        or int(tasks) < 2
    ):
        return
    nodes = said("SLURM_STEP_NODELIST") or said("SLURM_JOB_NODELIST") or said("SLURM_NODELIST") or ""
    # "gpu[07-09,12]-ib,login": the first name is gpu07-ib
    name, number, rest = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes).groups(default="")
    job, step = (re.sub(r"\D", "", said(key, "")) or "0" for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    place = {"RANK": said("SLURM_PROCID", "0"), "WORLD_SIZE": tasks, "LOCAL_RANK": said("SLURM_LOCALID", "0")}
    place["MASTER_ADDR"] = said("MASTER_ADDR") or name + number + rest
    # jobs that share a machine get ports of their own
    place["MASTER_PORT"] = said("MASTER_PORT") or str(20000 + (31 * int(job) + int(step)) % 20000)
    os.environ.update(place)


def restart_count() -> int:
    """How often torchrun has started all ranks again, since one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def check_meeting_place() -> None:
    """ValueError unless the environment says where the ranks meet, as torchrun does."""
    place = {name: os.environ.get(name) for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if lacking := [name for name, value in place.items() if not value]:
        raise ValueError(
            f"the environment has RANK={os.environ['RANK']} but no {' and no '.join(lacking)}; unset RANK, "
            "or use torchrun"
        )
    port = place["MASTER_PORT"]
    if not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(
            f"the environment has MASTER_PORT={port[:40]!r}, expected a number from 1 to 65535; set "
            "it alike on all processes, or use torchrun"
        )


def connect() -> dist.Store:  # all ranks
    """The store of all ranks, which rank 0 keeps (or torchrun). ValueError that says why it can't be had."""
    rank, found = int(os.environ["RANK"]), []

    def attempt() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=MEET))[0])
        except Exception as e:
            found.append(e)

    # a thread: torch waits for the answer of whatever listens at the place, even where none ever comes
    threading.Thread(target=attempt, daemon=True).start()
    end = time.monotonic() + MEET.total_seconds() + 10
    while not found and time.monotonic() < end:
        time.sleep(0.02)
    if found and not isinstance(found[0], Exception):
        return found[0]
    raise ValueError(why_not(found[0] if found else None, rank))


def why_not(error: Exception | None, rank: int) -> str:
    """Why the ranks did not meet, and the remedy."""
    text, place = str(error or ""), os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"]
    port, minutes = os.environ["MASTER_PORT"], f"{MEET.total_seconds() / 60:g} minutes"
    if "EADDRINUSE" in text:
        return (
            f"MASTER_PORT={port} is taken on this machine, by another run perhaps; give this one a free port "
            f"({HOW}), or use torchrun --standalone on one machine"
        )
    if refusal := re.search(r"failed to (?:listen|bind).*?message: ([^.\n]*)", text):
        return f"MASTER_PORT={port} can't be listened on ({refusal[1]}); give another port ({HOW})"
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return (
            f"{joined[1]} of {joined[2]} ranks came to {place} within {minutes}; start the others too, all "
            "with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
        )
    reason = reach(os.environ["MASTER_ADDR"], int(port))
    who = "this rank can't reach itself" if rank == 0 else "no rank 0 was found"
    return (
        f"{who} at MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={port} within {minutes} ({reason}); "
        f"set both to where rank 0 runs, alike on all machines ({HOW})"
    )


def reach(host: str, port: int) -> str:
    """What comes of trying to connect there."""
    try:
        socket.create_connection((host, port), timeout=3).close()
        return "something else than a training run listens there"
    except socket.gaierror as e:
        return f"no machine of that name: {e.strerror}"
    except OSError as e:
        return (e.strerror or str(e)).lower()


class Meeting:
    """The ranks of a run: they wait for each other however long that takes, share texts, and look after each
    other."""

    def __init__(self):
        self.rank, self.size, self.store = 0, 1, dist.HashStore()
        if "RANK" in os.environ:
            check_meeting_place()
            self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            # ranks that torchrun started again find what the dead ones left in its store
            self.store = dist.PrefixStore(f"start-{restart_count()}", connect())
            self.introduce()
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} but no RANK: the other processes "
                "would never meet this one; start all of them with torchrun, or unset it"
            )
        elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
            raise ValueError(
                f"SLURM has {os.environ['SLURM_NTASKS']} tasks for this job, and srun has not started this "
                "process: start all with srun, or torchrun with srun; for one alone unset SLURM_NTASKS"
            )
        # Here, before there are ranks of it: which kernels run is said and refused at the start.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.over, self.lost, self.beats = False, None, {}
        self.pressed: Callable[[], bool] = lambda: False  # whether this rank was told to end
        self.on_loss: Callable[[str], None] | None = None  # what a rank does that can't get away by itself
        if self.size > 1:
            # a thread, since a rank may read data for minutes before it waits for anybody
            threading.Thread(target=self.watch, daemon=True).start()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def introduce(self) -> None:  # all ranks
        """ValueError where another process takes itself for this rank, or has another number of ranks."""
        problem = None
        # Counted by the store: two processes with one rank would each wait for the other's part.
        if self.store.add(f"rank {self.rank}", 1) > 1:
            problem = f"two processes have RANK={self.rank}; give each of the {self.size} its own"
        size = self.store.compare_set("world size", "", str(self.size)).decode()
        if size != str(self.size):
            problem = f"WORLD_SIZE={self.size} here, and {size} on another rank; start all with the same"
        if problem:
            self.fail(problem)
            raise ValueError(f"{problem}, or use torchrun")

    # -- the others

    def watch(self) -> None:
        """Tells the others that this rank lives, and looks whether they do: rank 0 after all, they after
        it. After trouble this rank has GRACE to end by itself: whoever hangs in a collective that a dead rank
        never enters gets away here."""
        store = self.store.clone()  # a connection of its own: the main thread may wait in the other one
        count, woke, since = 0, time.monotonic(), None
        while not self.over:
            now = time.monotonic()
            if now - woke > 10:  # this process was stopped, and the others perhaps with it
                self.beats.clear()
            woke = now
            try:
                store.set(f"beat-{self.rank}", str(count := count + 1))
                trouble = self.failure(store) or self.look(store, now)
            except RuntimeError:
                trouble = "rank 0 is gone, and the ranks' store with it"
            if trouble and since is None:
                self.lost, since = trouble, now
            if self.on_loss and since and now - since > GRACE.total_seconds() and not self.over:
                self.on_loss(self.lost)
            time.sleep(1)

    def look(self, store: dist.Store, now: float) -> str | None:
        """Which rank has not been heard of for too long."""
        # A rank may be silent while a machine swaps; one that was told to end has no such time.
        limit = PRESSED if self.pressed() else SILENT
        for rank in range(1, self.size) if self.main else [0]:
            beat = store.get(f"beat-{rank}") if store.check([f"beat-{rank}"]) else b""
            known, since = self.beats.get(rank, (None, now))
            if beat != known:
                self.beats[rank] = beat, now
            elif now - since > limit.total_seconds():
                return f"rank {rank} has not been heard of for {limit.total_seconds():g} seconds"
        return None

    def failure(self, store: dist.Store) -> str | None:
        return store.get("failed").decode() if store.check(["failed"]) else None

    def fail(self, reason: str) -> None:
        """The others need not wait for this rank."""
        with contextlib.suppress(RuntimeError):  # rank 0 has ended, and the store with it
            if self.size > 1 and not self.store.check(["failed"]):
                self.store.set("failed", f"rank {self.rank}: {reason}")

    # -- what they share

    def share(self, key: str, value: str | None = None) -> str:  # all ranks
        """What rank 0 gives."""
        if self.main:
            self.store.set(key, value)
        self.wait([key])
        return self.store.get(key).decode()

    def wait_for_all(self, key: str) -> None:  # all ranks
        self.store.set(f"{key}-{self.rank}", "here")
        self.wait([f"{key}-{rank}" for rank in range(self.size)])

    def part(self) -> None:  # all ranks
        """The end of the run. Rank 0, which keeps the store, is the last to leave."""
        if self.main:
            self.store.set("over", "")
            self.wait([f"left-{rank}" for rank in range(1, self.size)])
        else:
            self.wait(["over"])
            self.store.set(f"left-{self.rank}", "")

    def wait(self, keys: list[str]) -> None:
        while keys and not self.store.check(keys):
            if failure := self.failure(self.store):
                raise ValueError(f"stopped, since another rank did: {failure}")
            if self.lost:
                raise ValueError(f"{self.lost}; start all ranks again")
            time.sleep(0.05)


# ---- what a collective said

INTERFACE = "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME, to the network interface that the ranks share"
# Torch's words -> the cause, ({}: what it said) and the remedy. The first whose words are in an error counts,
# and the last one's are in each.
CAUSES = {
    r"Duplicate GPU|invalid device ordinal": "two ranks use one GPU, or one has none ({}): start as many "
    "ranks on a machine as it has GPUs (torchrun --nproc_per_node)",
    r"EADDRINUSE|failed to listen|already in use": f"a port is taken ({{}}): give another ({HOW})",
    r"[Uu]nable to (find|resolve)|resolve host|getaddrinfo|looking up": "this machine's name has no address "
    f"({{}}): {INTERFACE}",
    r"connectFullMesh|[Cc]onnect timeout|No route to host|unreachable": "the ranks found each other at "
    f"MASTER_ADDR, but can't connect among themselves ({{}}): open the ports between the machines, "
    f"or {INTERFACE}",
    r"[Tt]imed out|[Tt]imeout": "another rank did not come to a collective in time ({}): it hangs, or the "
    "network between them does",
    r"unhandled cuda|invalid (usage|argument)|internal error": "NCCL failed ({}): NCCL_DEBUG=INFO says why",
    r"": "another rank is gone ({}): it was killed, or stopped with an error that it printed; torchrun "
    "--max-restarts starts all again",
}


def between_ranks(error: BaseException) -> str | None:
    """What an error of the ranks' communication means; None if the error is of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or "gloo" in str(seen):
            # The first line says it; the rest is where in torch it was said.
            text = str(seen).strip() or type(seen).__name__
            reason = re.sub(r"^\[\S*gloo\S*\] ?", "", text.splitlines()[0]).split(". ")[0]
            return next(said for words, said in CAUSES.items() if re.search(words, text)).format(reason)
        seen = seen.__cause__ or seen.__context__
    return None
