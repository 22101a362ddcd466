"""How bench.py measures: alternatives that take turns, a run's own floor, memory in a process of its own.

    times = rounds({"ours": step, "theirs": other}, 5)  # (CPU, wall) seconds of each, in every round
    floor = Products.of(step).replay()                   # the products of that step, and nothing else
    extra = peak_memory(lambda: step)                    # bytes above what was there before the step

A machine may be busy with other work, and its clock changes: so a ratio is taken within a round, and the
median of the rounds counts.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Times = dict[str, list[tuple[float, float]]]


def rounds(
    alternatives: dict[str, Callable], repeats: int, synchronize: Callable = lambda: None, warm: int = 1
) -> Times:
    """(CPU, wall) seconds of each alternative in each of `repeats` rounds, after `warm` rounds that don't
    count. Every other round goes backwards, so that none always runs behind the same neighbour."""
    times: Times = {name: [] for name in alternatives}
    for i in range(warm + repeats):
        order = [*alternatives.items()]
        for name, call in order if i % 2 == 0 else reversed(order):
            synchronize()  # what the neighbour left in the queue is the neighbour's
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            if i >= warm:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def ratio(times: Times, name: str, to: str, wall: bool = False) -> float:
    """Median over the rounds of name's time divided by to's, CPU time unless `wall`."""
    pairs = zip(times[name], times[to], strict=True)
    return statistics.median(a[wall] / max(b[wall], 1e-9) for a, b in pairs)


def median(times: Times, name: str, wall: bool = False) -> float:
    return statistics.median(t[wall] for t in times[name])


@dataclass
class Row:
    """A line of the table: figures of the alternatives, ratios to ours (above 1: ours is better)."""

    what: str
    figures: dict[str, float | str | None] = field(default_factory=dict)


def row_of(what: str, times: Times, floor: str | None = None, **more) -> Row:
    """Ours is the first alternative; `floor` the one that nothing can be faster than."""
    ours = next(iter(times))
    figures = {f"{ours}, CPU s": median(times, ours)}
    for name in times:
        if name not in (ours, floor):
            figures[f"{name}, CPU"] = ratio(times, name, ours)
            figures[f"{name}, wall"] = ratio(times, name, ours, wall=True)
    if floor:
        figures["ours to floor"] = ratio(times, ours, floor)
    return Row(what, {**figures, **more})


def agree(what: str, ours: float, theirs: float, allowed: float) -> None:
    """ValueError, and so no report, where two alternatives compute something else."""
    if not abs(ours - theirs) <= allowed * max(abs(ours), abs(theirs)):
        raise ValueError(
            f"{what}: ours is {ours:.8g}, the other {theirs:.8g}, relative difference allowed {allowed:g}; "
            "what computes something else is not timed"
        )


# ---- floor


PRODUCTS = {
    f"aten::{name}" for name in "mm addmm bmm baddbmm addmm_ convolution convolution_backward".split()
}
PRODUCTS |= {
    f"aten::_scaled_dot_product_{kind}{direction}"
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention")
    for direction in ("", "_backward")
} | {"mkldnn::_linear_pointwise"}


class Products(TorchDispatchMode):
    """Matrix products, convolutions and fused attention that a call runs, by shape: what is left of it if all
    else cost nothing. They run again on numbers of their own."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.pool: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, call: Callable) -> "Products":
        products = cls()
        with products:
            call()
        return products

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in PRODUCTS:
            kept = tree_map(self.remember, (args, kwargs or {}))
            self.calls.append((function, kept))
        return function(*args, **(kwargs or {}))

    def remember(self, x):
        if not isinstance(x, Tensor) or x.is_mkldnn:  # which has no strides; a weight, so it stays
            return x
        key = x.shape, x.stride(), x.dtype, x.device
        # one tensor a shape: kept inputs would hold a step's activations
        if key not in self.pool:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self.pool[key] = like.normal_(std=0.02) if x.is_floating_point() else like.zero_()
        return self.pool[key]

    @torch.no_grad()
    def replay(self) -> None:
        for function, (args, kwargs) in self.calls:
            function(*args, **kwargs)


def read_bandwidth(num_bytes: int, repeats: int = 5) -> float:
    """Bytes a second at which this machine reads that many, with torch's threads."""
    x = torch.ones(max(num_bytes // 4, 1 << 16))
    y = torch.empty(())
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.sum(x, dim=0, out=y)
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / min(times[1:])  # a floor: what the machine can do, not what it does on average


# ---- memory


def status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


def peak_memory(prepare: Callable[[], Callable]) -> int:
    """Bytes at the peak of the call that `prepare()` gives, above what was there before it, in a process of
    its own. Fork before torch has started threads."""

    def child(pipe):
        torch.set_num_threads(1)
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back
        try:
            call = prepare()
            gc.collect()
            libc.malloc_trim(0)
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is forgotten
            call()
            pipe.send(status("VmHWM") - before)
        except (ValueError, OSError) as e:
            pipe.send(e)  # raised by the parent, which has the terminal
        finally:
            pipe.close()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise ValueError(
            f"memory: the process ended with code {process.exitcode}; is there enough?"
        ) from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


# ---- report


def circumstances() -> dict[str, str | int]:
    """What a figure depends on: machine, versions, commit."""
    versions = {}
    for name in ("torch", "transformers", "peft", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = re.search(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "commit": commit,
    }


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def shown(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(command: str, rows: Iterable[Row], path: str | None) -> int:
    """The table on the terminal, each row as it comes; with `path` all of it as JSON as well, also of a run
    that is stopped. Returns the number of rows."""
    facts, done = circumstances(), []
    print(f"bench.py {command} | " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    better = "above 1: ours is faster or smaller"
    print(f"ratios are to ours, {better}; `ours to floor`: 1 is the fastest possible")
    for row in rows:
        lines = [f"    {name:<44}{shown(value):>12}" for name, value in row.figures.items()]
        print(row.what, *lines, sep="\n", flush=True)
        done.append({"what": row.what, **row.figures})
        if path:
            text = json.dumps({"command": command, **facts, "rows": done}, indent=2) + "\n"
            Path(path).write_text(text, encoding="utf-8")
    if path and done:
        print(f"written: {path}")
    return len(done)
