"""Speed and memory of the kernels, side by side with what one would write instead.

    python bench.py --kernels   # on this machine's CPU: packed attention, projection + cross entropy
    python bench.py --gpu       # Triton against PyTorch's own, on a GPU

Times are medians, alternatives take turns in one run, and ratios are to ours: above 1.00 ours is faster or
smaller.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import itertools
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import terminal
from checkpoint import cli
from kernels.attention import attention
from kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_ref
from kernels.norm import rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu

SHARES = (0.31, 0.05, 0.17, 0.02, 0.22, 0.03, 0.12, 0.08)  # of 8 uneven segments in a stream


def bounds_of(T: int) -> Tensor:
    lengths = [int(T * share) for share in SHARES]
    lengths[0] += T - sum(lengths)
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def dense_mask(cu_seqlens: Tensor, device) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
    place = torch.arange(len(segment))
    return ((segment[:, None] == segment) & (place[:, None] >= place)).to(device)


def timed(
    alternatives: dict[str, Callable], repeats: int, synchronize: Callable = lambda: None
) -> dict[str, float]:
    """Median seconds of each, after one call to warm up."""
    times = {name: [] for name in alternatives}
    for i in range(repeats + 1):
        for name, call in alternatives.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(title: str, results: dict[str, float], unit: str = "ms", scale: float = 1e3) -> None:
    print(title)
    ours = next(iter(results.values()))
    for name, value in results.items():
        print(f"  {name:44}{value * scale:10,.1f} {unit}   x{value / ours:.2f}")


# --------------------------------------------------------------------------------------------------
# CPU


def attention_cpu(T: int, H: int = 8, D: int = 64, repeats: int = 5) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cu_seqlens = bounds_of(T)
    lengths = cu_seqlens.diff().tolist()
    q, k, v = (torch.randn(T, H, D, requires_grad=True) for _ in range(3))
    mask, do = dense_mask(cu_seqlens, "cpu"), torch.randn(T, H, D)

    def ours():
        return attention(q, k, v, cu_seqlens, cu_seqlens, max(lengths), causal=True)

    def dense():
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[
            0
        ].transpose(0, 1)

    def loop():
        parts = []
        for a, b in itertools.pairwise(cu_seqlens.tolist()):
            qkv = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
            parts.append(F.scaled_dot_product_attention(*qkv, is_causal=True)[0].transpose(0, 1))
        return torch.cat(parts)

    def pad():
        padded = [
            torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)
            for x in (q, k, v)
        ]
        o = F.scaled_dot_product_attention(*padded, is_causal=True).transpose(1, 2)
        return torch.cat([o[s, :n] for s, n in enumerate(lengths)])

    segment = torch.repeat_interleave(torch.arange(len(lengths)), cu_seqlens.diff())
    block_mask = create_block_mask(
        lambda b, h, i, j: (segment[i] == segment[j]) & (i >= j), 1, 1, T, T, device="cpu"
    )
    compiled = torch.compile(
        flex_attention, dynamic=False
    )  # with dynamic shapes its CPU code does not compile

    def flex():
        qkv = (x.detach().transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*qkv, block_mask=block_mask)[0].transpose(0, 1)

    alternatives = {
        "ours": ours,
        "loop of slices": loop,
        "pad to the longest": pad,
        "SDPA with a dense mask": dense,
    }
    with torch.no_grad():
        expected = dense()
        for name, call in (alternatives | {"flex_attention, compiled": flex}).items():
            assert (call() - expected).abs().max() < 1e-4, f"{name} computes something else"
        forward = timed(alternatives | {"flex_attention, compiled": flex}, repeats)
    table(f"packed causal attention, forward: fp32, T={T}, 8 segments, {H} heads of {D}", forward)
    both = timed(
        {
            name: lambda call=call: torch.autograd.grad(call(), (q, k, v), do)
            for name, call in alternatives.items()
        },
        repeats,
    )
    table("  forward and backward (flex_attention has no backward on CPU)", both)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def cost(call: Callable) -> tuple[float, int]:
    """Seconds and extra peak memory of one call in a process of its own."""

    def child(pipe):
        before, peak, done = resident(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        pipe.send((seconds, peak - before))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    result = ours.recv()
    process.join()
    return result


def cross_entropy_cpu(N: int = 2048, C: int = 1024, V: int = 151_936, supervised: float = 0.3) -> None:
    x, weight = torch.randn(N, C), torch.randn(V, C) / 32
    targets = torch.where(torch.rand(N) < supervised, torch.randint(V, (N,)), IGNORE_INDEX)
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    for frozen in (False, True):

        def call(loss, frozen=frozen):
            h, w = x.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
            loss(h, w).backward()

        results = {
            name: cost(lambda loss=loss: call(loss))
            for name, loss in {
                "ours": lambda h, w: linear_cross_entropy(h[rows], w, targets[rows])[0],
                "supervised rows, then naive": lambda h, w: linear_cross_entropy_ref(
                    h[rows], w, targets[rows]
                )[0],
                "naive": lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum"),
            }.items()
        }
        head = "frozen" if frozen else "trained"
        sizes = f"fp32, N={N}, {len(rows)} supervised, C={C}, V={V:,}"
        table(
            f"projection + cross entropy, {head} head: {sizes}; forward and backward",
            {name: seconds for name, (seconds, _) in results.items()},
        )
        table("  extra peak memory", {name: memory for name, (_, memory) in results.items()}, "MB", 1e-6)


# --------------------------------------------------------------------------------------------------
# GPU


def gpu(T: int = 8192) -> None:
    if not torch.cuda.is_available():
        raise ValueError("--gpu: there is no GPU that torch can use; --kernels measures on the CPU")
    device, dtype = torch.device("cuda"), torch.bfloat16
    cu_seqlens = bounds_of(T)

    def compare(title: str, alternatives: dict[str, Callable], inputs: list[Tensor]) -> None:
        def step(call):
            y = call()
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        table(
            title,
            timed(
                {name: lambda call=call: step(call) for name, call in alternatives.items()},
                20,
                torch.cuda.synchronize,
            ),
        )
        peaks = {}
        for name, call in alternatives.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(call)
            peaks[name] = torch.cuda.max_memory_allocated() - before
        table("  extra peak memory", peaks, "MB", 1e-6)

    def pair(function, *args, **options) -> dict[str, Callable]:
        return {
            "Triton": lambda: function(*args, impl="triton", **options),
            "plain PyTorch": lambda: function(*args, impl="ref", **options),
        }

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    print(f"{torch.cuda.get_device_name()}, bf16, T={T}, forward and backward")
    for H, D in ((32, 128), (16, 104), (16, 88)):
        q, k, v = inputs = [leaf(T, H, D) for _ in range(3)]
        mask = dense_mask(cu_seqlens, device)
        longest = int(cu_seqlens.diff().max())
        alternatives = pair(attention, q, k, v, cu_seqlens, cu_seqlens, longest, True)
        alternatives["SDPA with a dense mask"] = lambda q=q, k=k, v=v, mask=mask: (
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)
        )
        compare(f"packed causal attention, {H} heads of {D}", alternatives, inputs)
    x, w = leaf(T // 3, 4096), leaf(151_936, 4096)
    targets = torch.randint(len(w), (len(x),), device=device)
    losses = {n: lambda f=f: f()[0] for n, f in pair(linear_cross_entropy, x, w, targets).items()}
    losses["naive"] = lambda: linear_cross_entropy_ref(x, w, targets)[0]
    compare("projection + cross entropy, trained head", losses, [x, w])
    compare("projection + cross entropy, frozen head", losses, [x])
    x, w = leaf(T, 4096), leaf(4096)
    compare("RMSNorm", pair(rms_norm, x, w, 1e-6), [x, w])
    q, angles = leaf(T, 32, 128), torch.randn(T, 64, device=device)
    compare("rotary", pair(rotary, q, angles.cos(), angles.sin()), [q])
    gate, up = leaf(T, 11_008), leaf(T, 11_008)
    compare("SwiGLU", pair(swiglu, gate, up), [gate, up])


def main() -> int:
    parser = terminal.Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernels", action="store_true", help="the CPU's kernels")
    what.add_argument("--gpu", action="store_true", help="the Triton kernels")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[2048, 4096], help="stream lengths of --kernels"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.gpu:
        gpu()
        return 0
    print(f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads")
    cross_entropy_cpu()  # first: it forks, which compiled code's threads would not survive
    for T in args.tokens:
        attention_cpu(T)
    return 0


if __name__ == "__main__":
    sys.exit(cli(main))
