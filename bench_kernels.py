"""Kernels beside torch's own, on this machine; and the first ten minutes on a GPU, part by part.

    python bench.py kernels
    python bench.py gpu --json gpu.json
    python bench_kernels.py attention  # one part of the latter, in this process

Each part of `gpu` runs in a process of its own under a time limit of its own: one that fails leaves a row
that says why, and the others run. Without a GPU `gpu --small` runs every part on the CPU at its smallest.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import build
import config
import engine
import estimate
import generate
import parallel
import terminal
import vlm
from bench_timing import Row, agree, median, peak_memory, report, rounds, row_of
from kernels.attention import attention
from kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_ref
from kernels.norm import rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu

ROOT = Path(__file__).resolve().parent
SHARES = (0.31, 0.05, 0.17, 0.02, 0.22, 0.03, 0.12, 0.08)  # of 8 uneven segments in a stream
Alternatives = dict[str, Callable]


def bounds_of(T: int) -> Tensor:
    lengths = [int(T * share) for share in SHARES]
    lengths[0] += T - sum(lengths)
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def dense_mask(cu_seqlens: Tensor, device) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
    place = torch.arange(len(segment))
    return ((segment[:, None] == segment) & (place[:, None] >= place)).to(device)


def same(what: str, alternatives: Alternatives, allowed: float) -> None:
    """ValueError where one computes something else than the first."""
    with torch.no_grad():
        expected, *others = [(name, call().float()) for name, call in alternatives.items()]
    scale = float(expected[1].abs().max())
    for name, y in others:
        error = float((y - expected[1]).abs().max())
        agree(f"{what}: {name}", scale + error, scale, allowed)


def gradients(calls: Alternatives, inputs: list[Tensor]) -> Alternatives:
    """Each with its backward pass."""

    def step(call: Callable):
        y = call()
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return {name: functools.partial(step, call) for name, call in calls.items()}


# --------------------------------------------------------------------------------------------------
# Alternatives, on any device


def attention_alternatives(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Alternatives:
    """Causal attention of a stream of segments."""
    device, lengths = q.device, cu_seqlens.diff().tolist()
    # made once, outside of what is timed: a training step makes it once for all its layers
    mask, longest = dense_mask(cu_seqlens, device), max(lengths)

    def batched(x):
        return x.transpose(0, 1)[None]  # (T, H, D) -> (1, H, T, D)

    def dense():
        return F.scaled_dot_product_attention(*map(batched, (q, k, v)), attn_mask=mask)[0].transpose(0, 1)

    def pad():
        rows = [x.split(lengths) for x in (q, k, v)]
        padded = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True).transpose(1, 2) for x in rows]
        o = F.scaled_dot_product_attention(*padded, is_causal=True).transpose(1, 2)
        return torch.cat([o[s, :n] for s, n in enumerate(lengths)])

    stream = q, k, v, cu_seqlens, cu_seqlens, True
    ours = functools.partial(attention, *stream)
    found = {"ours": ours, "pad to the longest": pad, "SDPA with a dense mask": dense}
    if device.type == "cuda":
        found["plain PyTorch"] = functools.partial(attention, *stream, impl="ref")
        from torch.nn.attention.varlen import varlen_attn

        on_device = cu_seqlens.to(device)
        if q.element_size() == 2:
            found["varlen_attn"] = lambda: varlen_attn(
                q, k, v, on_device, on_device, longest, longest, window_size=(-1, 0)
            )
    return found


def flex_alternative(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, device = len(q), q.device
    lengths = cu_seqlens.diff().to(device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    blocks = create_block_mask(
        lambda b, h, i, j: (segment[i] == segment[j]) & (i >= j), 1, 1, T, T, device=device.type
    )
    # with dynamic shapes its CPU code does not compile; it has no backward pass on a CPU
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex():
        qkv = [x.transpose(0, 1)[None] for x in (q, k, v)]
        if device.type == "cpu":
            qkv = [x.detach() for x in qkv]
        return compiled(*qkv, block_mask=blocks)[0].transpose(0, 1)

    return flex


def loss_alternatives(h: Tensor, w: Tensor, targets: Tensor) -> Alternatives:
    """The summed loss of the supervised rows of h (N, C)."""
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    found = {
        "ours": lambda: linear_cross_entropy(h[rows], w, targets[rows])[0],
        "supervised rows, then naive": lambda: linear_cross_entropy_ref(h[rows], w, targets[rows])[0],
        "naive": lambda: F.cross_entropy((h @ w.t()).float(), targets, reduction="sum"),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = {"reduction": "sum", "options": torch.nn.LinearCrossEntropyOptions()}
        found["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(h, w, targets, **options)
        found["F.linear_cross_entropy, supervised rows"] = lambda: F.linear_cross_entropy(
            h[rows], w, targets[rows], **options
        )
    return found


def elementwise(device, dtype, T: int, C: int, M: int) -> list[tuple[str, Alternatives, list[Tensor]]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    x, w, q, gate, up = leaf(T, C), leaf(C), leaf(T, C // 64, 64), leaf(T, M), leaf(T, M)
    angles = torch.randn(T, 32, device=device)
    cos, sin = angles.cos(), angles.sin()
    norms = {"ours": lambda: rms_norm(x, w, 1e-6), "F.rms_norm": lambda: F.rms_norm(x, (C,), w, 1e-6)}
    acts = {"ours": lambda: swiglu(gate, up), "silu * up": lambda: F.silu(gate) * up}
    turns = {"ours": lambda: rotary(q, cos, sin), "plain": lambda: rotary(q, cos, sin, impl="ref")}
    return [("RMSNorm", norms, [x, w]), ("SwiGLU", acts, [gate, up]), ("rotary", turns, [q])]


# --------------------------------------------------------------------------------------------------
# `bench.py kernels`: this machine's CPU


def kernels_command(folder: Path, args) -> Iterator[Row]:
    sizes = {"N": 64, "C": 32, "V": 500} if args.small else {"N": 2048, "C": 1024, "V": 151_936}
    for frozen in (False, True):  # first: it forks, which the threads of compiled code would not survive
        name = f"projection + cross entropy, {'frozen' if frozen else 'trained'} head, fp32, {sizes}"
        if args.only in name:
            yield loss_row(name, frozen, args, **sizes)
    for T in (128,) if args.small else (2048, 4096):
        name = f"packed causal attention, fp32, T={T}, 8 segments, 8 heads of 64"
        if args.only not in name:
            continue
        q, k, v = inputs = [torch.randn(T, 8, 64, requires_grad=True) for _ in range(3)]
        calls = attention_alternatives(q, k, v, bounds_of(T))
        same(name, calls, 1e-4)
        times = rounds(gradients(calls, inputs), args.rounds)
        yield row_of(f"{name}, forward and backward", times)
        if not args.small:
            calls["flex_attention, compiled"] = flex_alternative(q, k, v, bounds_of(T))
            same(name, calls, 1e-4)
        with torch.no_grad():
            times = rounds(calls, args.rounds)
        yield row_of(f"{name}, forward", times)
    T, C, M = (64, 128, 160) if args.small else (2048, 1024, 2816)
    for name, calls, inputs in elementwise("cpu", torch.float32, T, C, M):
        name = f"{name}, fp32, T={T}, forward and backward"
        if args.only in name:
            same(name, calls, 1e-5)
            yield row_of(name, rounds(gradients(calls, inputs), args.rounds))


def loss_row(name: str, frozen: bool, args, N: int, C: int, V: int) -> Row:
    h, w = torch.randn(N, C).requires_grad_(), (torch.randn(V, C) / 32).requires_grad_(not frozen)
    targets = torch.where(torch.rand(N) < 0.3, torch.randint(V, (N,)), IGNORE_INDEX)
    calls = loss_alternatives(h, w, targets)
    inputs = [h] if frozen else [h, w]
    steps = gradients(calls, inputs)
    memory = {side: peak_memory(lambda step=step: step) for side, step in steps.items()}
    same(name, calls, 1e-4)
    rows = int((targets != IGNORE_INDEX).sum())

    def floor():
        """Logits, the gradient of h, that of w: as many products of the supervised rows."""
        for _ in inputs:
            h.detach()[:rows] @ w.detach().t()
        return h.detach()[:rows] @ w.detach().t()

    times = rounds({**steps, "products": floor}, args.rounds)
    peaks = {f"{side}, peak": memory[side] / memory["ours"] for side in steps if side != "ours"}
    return row_of(name, times, "products", **{"ours, peak MB": memory["ours"] / 1e6}, **peaks)


# --------------------------------------------------------------------------------------------------
# `bench.py gpu`: its parts. Each takes (device, dtype, small, folder) and gives rows.


def on(device: torch.device, alternatives: Alternatives, repeats: int) -> dict:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return rounds(alternatives, repeats, synchronize, warm=2)


def measured(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if value is not None}


def wall_row(what: str, times: dict, **more) -> Row:
    """Wall times in milliseconds: on a GPU the CPU's time says nothing."""
    ours = next(iter(times))
    figures = {f"{ours}, ms": 1e3 * median(times, ours, wall=True)}
    figures |= {n: median(times, n, True) / median(times, ours, True) for n in times if n != ours}
    return Row(what, measured({**figures, **more}))


def peak_of(device: torch.device, call: Callable) -> float | None:
    """MB above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def parity_part(device, dtype, small: bool, folder: Path) -> list[Row]:
    """Largest error of every kernel and its gradients against fp64, in units of plain PyTorch's in that
    dtype: about 1 where it is as exact. Above 2, the part fails."""
    T, found = (96 if small else 1000), []
    cu = bounds_of(T)
    prefix = (cu.diff() // 2).to(torch.int64)

    def case(name: str, function: Callable, *shapes: tuple[int, ...]):
        xs = [torch.randn(*shape, dtype=torch.float64, device=device) for shape in shapes]
        results = []
        for kind, impl in ((torch.float64, "ref"), (dtype, "ref"), (dtype, "auto")):
            inputs = [x.to(kind).requires_grad_() for x in xs]
            y = function(*inputs, impl=impl)
            results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
        worst = 0.0
        for exact, plain, ours in zip(*results, strict=True):
            scale = torch.finfo(dtype).eps * float(exact.abs().max())
            errors = [float((x.double() - exact).abs().max()) for x in (ours, plain)]
            worst = max(worst, errors[0] / (errors[1] + scale))
        found.append(Row(f"parity of {name}, {dtype}", {"error to plain PyTorch's": worst}))
        if not worst < 2:
            raise ValueError(f"{name} in {dtype}: the error is {worst:.2g} times plain PyTorch's")

    for D in (64, 80, 88, 104, 128):
        for mask in ("causal", "full", "prefix"):
            visible = cu, cu, mask != "full", prefix if mask == "prefix" else None

            def attend(q, k, v, impl, visible=visible):
                return attention(q, k, v, *visible, impl=impl)

            case(f"attention, {mask}, heads of {D}", attend, *[(T, 2, D)] * 3)
    targets = torch.randint(501, (T,), device=device)

    def loss(h, w, impl):
        return linear_cross_entropy(h, w, targets, impl=impl)[0]

    case("linear cross entropy", loss, (T, 64), (501, 64))
    angles = torch.randn(T, 32, device=device)
    case("RMSNorm", lambda x, w, impl: rms_norm(x, w, 1e-6, impl=impl), (T, 512), (512,))
    case("rotary", lambda x, impl: rotary(x, angles.cos(), angles.sin(), impl=impl), (T, 4, 64))
    case("SwiGLU", lambda g, u, impl: swiglu(g, u, impl=impl), (T, 512), (T, 512))
    return found


def tests_part(device, dtype, small: bool, folder: Path) -> list[Row]:
    """tests/test_gpu.py."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", *(["--collect-only"] if small else [])]
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    if done.returncode:
        raise ValueError(f"tests/test_gpu.py: {last}")
    return [Row("tests/test_gpu.py", {"says": last})]


def attention_part(device, dtype, small: bool, folder: Path) -> list[Row]:
    T, found = (128 if small else 8192), []
    for H, D in ((2, 64),) if small else ((32, 128), (16, 104), (16, 88)):
        q, k, v = inputs = [
            torch.randn(T, H, D, device=device, dtype=dtype).requires_grad_() for _ in range(3)
        ]
        name = f"packed causal attention, {dtype}, T={T}, {H} heads of {D}"
        calls = attention_alternatives(q, k, v, bounds_of(T))
        if device.type == "cuda":
            calls["flex_attention, compiled"] = flex_alternative(q, k, v, bounds_of(T))
        same(name, calls, 3e-2)
        flops = 4 * H * D * sum(n * n / 2 for n in bounds_of(T).diff().tolist())
        with torch.no_grad():
            times = on(device, calls, 10)
        rate = flops / median(times, "ours", True) / 1e12
        found.append(wall_row(f"{name}, forward", times, **{"ours, TFLOP/s": rate}))
        steps = gradients(calls, inputs)
        times = on(device, steps, 10)
        peaks = {f"{side}, peak MB": peak_of(device, step) for side, step in steps.items()}
        # the backward pass of a fused attention computes the scores again: 2.5 forward passes
        rate = 3.5 * flops / median(times, "ours", True) / 1e12
        found.append(wall_row(f"{name}, forward and backward", times, **{"ours, TFLOP/s": rate}, **peaks))
    return found


def loss_part(device, dtype, small: bool, folder: Path) -> list[Row]:
    N, C, V = (64, 32, 500) if small else (8192, 4096, 151_936)
    found = []
    for frozen in (False, True):
        h = torch.randn(N, C, device=device, dtype=dtype).requires_grad_()
        w = (torch.randn(V, C, device=device, dtype=dtype) / C**0.5).requires_grad_(not frozen)
        targets = torch.randint(V, (N,), device=device)
        targets[torch.rand(N, device=device) > 0.3] = IGNORE_INDEX
        calls = loss_alternatives(h, w, targets)
        name = f"projection + cross entropy, {'frozen' if frozen else 'trained'} head, {dtype}, V={V:,}"
        same(name, calls, 1e-2)
        steps = gradients(calls, [h] if frozen else [h, w])
        peaks = {f"{side}, peak MB": peak_of(device, step) for side, step in steps.items()}
        found.append(wall_row(name, on(device, steps, 10), **peaks))
    T, C, M = (64, 128, 160) if small else (8192, 4096, 11_008)
    for name, calls, inputs in elementwise(device, dtype, T, C, M):
        same(name, calls, 5e-2)
        times = on(device, gradients(calls, inputs), 10)
        found.append(wall_row(f"{name}, {dtype}, T={T}, forward and backward", times))
    return found


class Launches(TorchDispatchMode):
    """Counts operations that compute: on a GPU about as many launches, our Triton kernels apart."""

    VIEWS = re.compile(r"aten::(_?unsafe_view|_?view|_?reshape|t|transpose|permute|expand|slice|select)\b")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        view = any(a.alias_info and not a.alias_info.is_write for a in function._schema.returns)
        self.count += not view and not name.startswith("aten::empty") and not self.VIEWS.match(name)
        return function(*args, **(kwargs or {}))

    @classmethod
    def of(cls, call: Callable) -> int:
        with cls() as launches:
            call()
        return launches.count


def full_width(kind: str, small: bool) -> dict:
    """A published size with two blocks of each kind; the middle-size benchmark's smallest for --small."""
    if small:
        return bench.CONFIGS[kind](True)
    names = {"qwen_vl": "qwen-vl-7b", "blip2": "blip2-opt-2.7b", "visualglm": "visualglm-6b"}
    values = vlm.shape(names[kind])

    def shallow(part: dict) -> dict:
        deep = ("num_hidden_layers", "num_layers", "layers")
        return {k: shallow(v) if isinstance(v, dict) else 2 if k in deep else v for k, v in part.items()}

    return shallow(values)


def predicted(values: dict, cfg: config.Config, batch: vlm.Batch) -> tuple[float, float]:
    """What --dry_run says of this micro-batch: bytes at the peak, FLOPs."""
    definition = vlm.find(values)
    model = estimate.network(cfg, values, definition)
    lengths = batch.cu_seqlens.diff().tolist()
    stream = estimate.Stream(sum(lengths), batch.num_supervised, len(lengths), lengths)
    layout, blocks = estimate.layout_of(cfg, 1), [range(len(model.blocks))]
    flops = estimate.step_flops(model, stream, layout)
    dtype = build.halve(model, cfg, {}) or torch.float32
    return sum(estimate.devices(model, definition, blocks, stream, layout, dtype)[0].values()), flops


def product_rate(device, dtype, small: bool) -> float:
    """FLOP/s of a large square product: what a step is measured against."""
    n = 128 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median(on(device, {"product": lambda: a @ b}, 5), "product", wall=True)


def steps_part(kind: str, lora: bool) -> Callable:
    def part(device, dtype, small: bool, folder: Path) -> list[Row]:
        """One training step at full width with few layers, as train.py computes it."""
        values = full_width(kind, small)
        base = bench.write_model(folder / kind, values, torch.bfloat16)
        settings = {"lora": True, "lora_dropout": 0.05} if lora else {}
        cfg = config.Config(model_name_or_path=str(base), bf16=True, fp16_opt_level="O2", **settings)
        world = parallel.init_world()
        try:
            model = build.build(cfg, base, world, build.StreamSizes(1, 1, 1, 1)).model
            batch = bench.random_stream(model, [20, 30] if small else [400, 100, 600, 300, 500, 148])
            step = bench.our_step(model, batch.to(device), lora, world)
            step()  # the first one makes the optimiser's state
            times = on(device, {"step": step}, 5)
            T = len(batch.input_ids)
            expected, flops = predicted(values, cfg, batch)
            seconds = median(times, "step", wall=True)
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            found = {
                "ms": 1e3 * seconds,
                "tokens/s": T / seconds,
                "share of the products' rate": flops / seconds / product_rate(device, dtype, small),
                "operations": Launches.of(step),
                "dry run, MB": expected / 1e6,
                "weights and optimiser, MB": before / 1e6 or None,
                "measured peak above these, MB": peak_of(device, step),
            }
        finally:
            parallel.leave_world()
        what = f"{'LoRA' if lora else 'full'} step of {kind}, {T} tokens, {cfg.fp16_opt_level}"
        return [Row(what, measured(found))]

    return part


def decode_part(kind: str) -> Callable:
    def part(device, dtype, small: bool, folder: Path) -> list[Row]:
        """Decoding steps at full width with few layers: time, operations, share of the weights' reading."""
        base = bench.write_model(folder / kind, full_width(kind, small), torch.bfloat16)
        model, found = generate.load_model(base, dtype, device), []
        read = sum(p.numel() * p.element_size() for block in model.blocks for p in block.parameters())
        read += model.config.vocab_size * model.config.hidden_size * dtype.itemsize
        like = torch.empty(max(read // 4, 1), device=device)
        copied = median(on(device, {"copy": like.clone}, 5), "copy", wall=True)
        for batch in (1, 8):
            how, new = generate.Decoding(max_new_tokens=64), 8
            request = bench.random_sample(model, 24, 1, torch.Generator().manual_seed(0))
            request["pixel_values"] = [pixels.to(dtype) for pixels in request["pixel_values"]]
            runners, answers = {}, []
            # As it comes, on a GPU from CUDA graphs, and step by step.
            ways = {"step": None, "eager step": False} if device.type == "cuda" else {"step": None}
            for name, capture in ways.items():
                sizes = {"cache_tokens": 0, "max_running": batch}
                runner = engine.Engine(model, stop_words=[], capture=capture, **sizes)
                wanted = [engine.Request(str(i), request, how, logprobs=-1) for i in range(batch)]
                sequences = [runner.sequence(r) for r in wanted]
                runner.pool.grow(sum(s.rows for s in sequences))  # not in the middle of what is timed
                for sequence in sequences:
                    runner.enqueue(sequence)
                for _ in range(new):  # prompts, and the first steps
                    runner.step()
                runners[name], answers = runner, [*answers, sequences]
            times = on(device, {name: runner.step for name, runner in runners.items()}, 10)
            told = [[s.answer[: new + 10] for s in sequences] for sequences in answers]
            graphs = runners["step"].graphs
            if told[0] != told[-1] or graphs and not graphs.capture:
                raise ValueError(f"{kind}, batch {batch}: no graphs, or other tokens than step by step")
            for name, runner in runners.items():
                seconds = median(times, name, wall=True)
                figures = {
                    "ms": 1e3 * seconds,
                    "tokens/s": batch / seconds,
                    "share of the copying bandwidth": read * copied / (8 * like.numel()) / seconds,
                    "operations": Launches.of(runner.step),
                }
                found.append(Row(f"decoding {name} of {kind}, batch {batch}, {dtype}", figures))
        return found

    return part


PARTS = {  # name -> (what runs, seconds it may take)
    "parity": (parity_part, 180),
    "tests": (tests_part, 300),
    "attention": (attention_part, 120),
    "loss": (loss_part, 90),
    **{f"lora_{kind}": (steps_part(kind, True), 90) for kind in bench.CONFIGS},
    **{f"full_{kind}": (steps_part(kind, False), 90) for kind in bench.CONFIGS},
    **{f"decode_{kind}": (decode_part(kind), 90) for kind in bench.CONFIGS},
}


def run_part(name: str, folder: Path, small: bool, limit: float) -> list[Row]:
    """A part in a process of its own; what goes wrong is its row."""
    # of its own: what a kernel's fault leaves of a CUDA context serves nobody
    command = [sys.executable, str(ROOT / "bench_kernels.py"), name, "--json", str(folder / f"{name}.json")]
    start, why = time.perf_counter(), ""
    try:
        done = subprocess.run(
            command + ["--small"] * small, capture_output=True, text=True, timeout=limit, cwd=ROOT
        )
        if not done.returncode:
            rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]
            return [Row(row.pop("what"), row) for row in rows]
        why = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        why = f"took longer than its {limit:.0f} s"
    except (OSError, ValueError, KeyError) as e:
        why = str(e)
    return [Row(f"{name}: FAILED", {"why": why[:300], "seconds": time.perf_counter() - start})]


def gpu_command(folder: Path, args) -> Iterator[Row]:
    if not torch.cuda.is_available() and not args.small:
        raise ValueError("gpu: there is no GPU that torch can use; --small runs every part on the CPU")
    for name in PARTS:
        if args.only in name:
            yield from run_part(name, folder, args.small, PARTS[name][1])


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    parser.add_argument("part", choices=PARTS, help="of `bench.py gpu`")
    parser.add_argument("--small", action="store_true", help="the smallest size")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        dtype = torch.bfloat16 if cuda else torch.float32
        report(f"gpu, {args.part}", PARTS[args.part][0](device, dtype, args.small, Path(folder)), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
