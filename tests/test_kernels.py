"""Kernels against fp64, in Triton's interpreter: forward and every gradient.

The measure is plain PyTorch's own error in the same dtype: the kernel's may not be larger, an epsilon aside.
The interpreter must be chosen before the kernels are imported, so the cases run in processes of their own,
which report one line per case; pytest then has one test for each. By hand: python tests/test_kernels.py [CASE
...] bf16: the interpreter computes with its bits as integers; see `bf16_shim`.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cells import slow, thinned

ROOT = Path(__file__).resolve().parent.parent

# name -> (lengths of queries, lengths of keys); odd, empty, of one token, decoding, cross attention
LENGTHS = {
    "one": ([67], [67]),
    "packed": ([33, 1, 0, 50, 7], [33, 1, 0, 50, 7]),
    "even": ([35, 35], [35, 35]),
    "decode": ([1, 1, 1], [1, 40, 77]),
    "append": ([5, 1, 17], [64, 9, 17]),
    "cross": ([16, 16], [49, 49]),
}
HEAD_DIMS = (64, 80, 88, 104, 128)


def attention_cases():
    for D in HEAD_DIMS:
        for lengths, mask in (("one", "causal"), ("packed", "full"), ("packed", "prefix")):
            for dtype in ("float32", "float16"):
                yield "attention", lengths, mask, D, dtype
    for lengths in LENGTHS:
        for mask in ("causal", "full", "prefix"):
            for D, dtype in ((64, "float32"), (64, "float16"), (88, "float16")):
                if not (lengths == "cross" and mask != "full"):
                    yield "attention", lengths, mask, D, dtype
    for lengths, mask, D in (
        ("packed", "causal", 64),
        ("even", "full", 88),
        ("append", "prefix", 128),
        ("decode", "causal", 104),
    ):
        yield "attention", lengths, mask, D, "bfloat16"
    for D in (8, 16, 32, 40):  # of tiny models
        yield "attention", "packed", "causal", D, "float32"
    for D, dtype in itertools.product(
        (64, 104, 128), ("float32", "float16")
    ):  # tiles as shipped, strided q, k, v
        yield "attention_shipped", "packed", "prefix", D, dtype


def cross_entropy_cases():
    for (N, V), C, smoothing in itertools.product(((0, 50), (1, 129), (70, 300)), (64, 100), (0.0, 0.1)):
        for dtype in ("float32", "float16"):
            yield "cross_entropy", N, V, C, smoothing, dtype, "both"
    for N, V, C, smoothing in ((1, 129, 64, 0.0), (70, 300, 100, 0.1)):
        yield "cross_entropy", N, V, C, smoothing, "bfloat16", "both"
    for frozen, dtype in itertools.product(("weight", "x"), ("float32", "float16")):
        yield "cross_entropy", 37, 3000, 72, 0.0, dtype, frozen  # three slices of the vocabulary


def other_cases():
    for dtype in ("float32", "float16", "bfloat16"):
        for shape in ((0, 64), (1, 64), (3, 5, 100), (600, 72)):
            yield "rms_norm", shape, dtype, "trained"
        yield "rms_norm", (7, 130), dtype, "frozen"
        for parts, D in ((1, 64), (1, 80), (2, 128), (2, 40)):
            yield "rotary", parts, D, dtype
        yield "dropout", 40, 2, 0, dtype
        yield "dropout", 9, 3, 4, dtype
        yield "swiglu", (0, 7), dtype
        yield "swiglu", (37, 103), dtype
        # products that read the codes, the last rows in part; ones with the weight unpacked
        for rows, N, K in ((1, 40, 128), (16, 32, 64), (17, 33, 64), (3, 7, 90), (0, 8, 64)):
            yield "nf4", rows, N, K, dtype
    yield "rms_norm", (33, 96), "float16", "fp32 weight"
    yield "rotary", 1, 88, "float16"


CASES = {
    " ".join(map(str, case)): case
    for case in dict.fromkeys([*attention_cases(), *cross_entropy_cases(), *other_cases()])
}
EXTRA = (
    "skipped_blocks",
    "deterministic",
    "plan_is_shared",
    "key_ranges",
    "even_ranges",
    "device_ranges",
    "refusals",
    "autocast",
    "vocab_parallel",
    "qwen_vl_step",
    "visualglm_step",
    "blip2_opt_step",
    "blip2_t5_step",
)
CASES |= {name: (name,) for name in EXTRA}


# --------------------------------------------------------------------------------------------------
# In the interpreter's process


def interpreter_main(names: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    bf16_shim()
    for name in names:
        torch.manual_seed(0)
        try:
            problems = run_case(*CASES[name])
        except Exception as e:  # reported, and the next case runs
            problems = [f"{type(e).__name__}: {e}"]
        print(json.dumps([name, problems]), flush=True)
    return 0


def bf16_shim() -> None:
    """The interpreter keeps bf16 as uint16, multiplies those integers, and cuts fp32 off instead of rounding
    it. Here dots are given fp32 operands, which loses nothing (products of bf16 numbers are exact in fp32,
    where they are summed), and fp32 is rounded to the nearest bf16. The kernels compute with bf16 in no other
    way."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def cast(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = source.data.view(np.uint32)
            rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
            return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return plain_cast(self, source, kind)

    def dot(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


def errors(inputs: list, dtype: str, kernel, reference) -> list[str]:
    """Kernel and plain PyTorch on `inputs` in dtype against the reference in fp64: what is worse than it may
    be."""
    import torch

    kind = getattr(torch, dtype)
    inputs = [x.to(kind) if x.dtype == torch.float32 and x.requires_grad else x for x in inputs]

    def run(function, xs):
        xs = [x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in xs]
        y, *rest = y if isinstance(y := function(*xs), tuple) else (y,)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(kind).to(y)
        grads = torch.autograd.grad(y, [x for x in xs if x.requires_grad], dy)
        return [*grads, y.detach(), *rest]

    exact = run(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    ours, torchs = run(kernel, inputs), run(reference, inputs)
    # half a unit in the last place of the largest value: the rounding of the result itself
    eps = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    problems, num_grads = [], sum(x.requires_grad for x in inputs)
    for i, (a, b, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        what = f"gradient {i}" if i < num_grads else f"output {i - num_grads}"
        if a.shape != e.shape or a.dtype != b.dtype:
            problems.append(f"{what}: {a.shape} {a.dtype}, expected {e.shape} {b.dtype}")
        elif a.numel():
            mine, theirs = ((x.double() - e).abs().max().item() for x in (a, b))
            limit = theirs + eps * max(1.0, e.abs().max().item())
            if not mine <= limit:
                problems.append(f"{what}: error {mine:.2e}, plain PyTorch {theirs:.2e}, limit {limit:.2e}")
    return problems


def small_tiles() -> None:
    """Tiles of 32 x 16, so that short segments already take several."""
    from kernels import attention, linear_cross_entropy

    attention.TILES = {"sm_80": {kind: {(4, 128): (32, 16, 4, 2)} for kind in ("forward", "dq", "dkdv")}}
    attention.TILES["sm_80"]["decode"] = {(4, 128): (16, 16, 4, 2)}
    linear_cross_entropy.TILES = {"sm_80": dict.fromkeys((2, 4), (32, 32, 32, 4, 2))}


def bounds(lengths: list[int]):
    import torch

    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def prefixes_of(lengths_k: list[int]):
    """Of nothing, of one key, of some, of all."""
    import torch

    prefix = torch.tensor([(0, 20, 1, 10**6)[i % 4] for i in range(1, 1 + len(lengths_k))])
    return torch.minimum(prefix, torch.tensor(lengths_k))


def attention_call(lengths: str, mask: str, **options):
    from kernels.attention import attention

    lengths_q, lengths_k = LENGTHS[lengths]
    prefix = prefixes_of(lengths_k) if mask == "prefix" else None
    arguments = (bounds(lengths_q), bounds(lengths_k), mask != "full", prefix)
    return lambda q, k, v, **more: attention(q, k, v, *arguments, **options, **more)


def qkv(lengths: str, D: int, H: int = 2, strided: bool = False) -> list:
    import torch

    rows = (sum(LENGTHS[lengths][0]), *[sum(LENGTHS[lengths][1])] * 2)
    if strided:  # as a model's c_attn gives them
        return [x.requires_grad_() for x in torch.randn(rows[0], 3, H, D).unbind(1)]
    return [torch.randn(n, H, D).requires_grad_() for n in rows]


def run_case(kind: str, *case) -> list[str]:
    import torch

    from kernels import linear_cross_entropy as ce
    from kernels.norm import rms_norm
    from kernels.swiglu import swiglu

    if kind in EXTRA:
        return globals()[kind]()
    if kind != "attention_shipped":
        small_tiles()

    def both(function, inputs, dtype, **options):
        def kernel(*xs):
            return function(*xs, impl="triton", **options)

        return errors(inputs, dtype, kernel, lambda *xs: function(*xs, impl="ref", **options))

    if kind.startswith("attention"):
        lengths, mask, D, dtype = case
        return both(
            attention_call(lengths, mask), qkv(lengths, D, strided=kind == "attention_shipped"), dtype
        )
    if kind == "cross_entropy":
        N, V, C, smoothing, dtype, frozen = case
        ce.CHUNK_BYTES = 1  # the smallest slices
        x, w = torch.randn(N, C), torch.randn(V, C) / 4
        x.requires_grad_(frozen != "x")
        w.requires_grad_(frozen != "weight")
        # without gradient errors() would leave them in fp32
        x, w = (t if t.requires_grad else t.to(getattr(torch, dtype)) for t in (x, w))
        targets = torch.randint(V, (N,))
        return errors(
            [x, w, targets],
            dtype,
            lambda *a: ce.linear_cross_entropy(*a, smoothing, impl="triton"),
            lambda *a: ce.linear_cross_entropy_ref(*a, smoothing),
        )
    if kind == "rms_norm":
        shape, dtype, weight = case
        w = (1 + torch.randn(shape[-1])).requires_grad_(weight == "trained")
        w = w if weight != "frozen" else w.to(getattr(torch, dtype))
        return both(
            lambda x, w, impl: rms_norm(x, w, 1e-6, impl=impl),
            [torch.randn(shape).requires_grad_(), w],
            dtype,
        )
    if kind == "rotary":
        parts, D, dtype = case
        T, H = 37, 3
        angles = torch.randn(*([2] if parts == 2 else []), T, D // 2 // parts) * 100
        return both(
            rotary_in_fp64, [torch.randn(T, H, D).requires_grad_(), angles.cos(), angles.sin()], dtype
        )
    if kind == "nf4":
        return nf4_case(*case)
    if kind == "dropout":
        return dropout_case(*case)
    shape, dtype = case
    return both(swiglu, [torch.randn(shape).requires_grad_() for _ in range(2)], dtype)


def nf4_case(rows: int, N: int, K: int, dtype: str) -> list[str]:
    import torch

    from kernels import nf4

    packed, kind = nf4.pack(torch.randn(N, K) / 8), getattr(torch, dtype)
    problems = errors(
        [torch.randn(rows, K).requires_grad_()],
        dtype,
        lambda x: nf4.nf4_linear(x, packed, impl="triton"),
        lambda x: nf4.nf4_linear_ref(x, packed),
    )
    same = torch.equal(nf4.unpack(packed, kind, "triton"), nf4.unpack(packed, kind, "ref"))
    return problems + ([] if same else ["unpacked weights differ"])


def dropout_case(C: int, first: int, images: int, dtype: str) -> list[str]:
    """Bit for bit the definition's result and gradient."""
    import torch

    from kernels.dropout import Mask, dropout

    keys = torch.randint(-(2**63), 2**63 - 1, (images or 12,))
    x = torch.randn(12, C + 3, dtype=getattr(torch, dtype))[:, 3:].requires_grad_()
    dy, results = torch.randn(12, C, dtype=x.dtype), []
    for impl in ("triton", "ref"):
        y = dropout(x, Mask(keys, 0.3, 2**31 - 5, first, images), 0.5, impl)
        results.append((y, *torch.autograd.grad(y, x, dy)))
    return [what for what, a, b in zip(("y", "dx"), *results, strict=True) if not torch.equal(a, b)]


def rotary_in_fp64(x, cos, sin, impl):
    """The reference computes in fp32; of fp64 inputs it is taken in fp64."""
    import torch

    from kernels.rotary import rotary

    if x.dtype != torch.float64:
        return rotary(x, cos.float(), sin.float(), impl=impl)
    halves, parts = (x.chunk(2, -1), range(2)) if cos.dim() == 3 else ((x,), (...,))
    turned = []
    for half, part in zip(halves, parts, strict=True):
        a, b = half.chunk(2, -1)
        c, s = cos[part][:, None], sin[part][:, None]
        turned += [a * c - b * s, b * c + a * s]
    return torch.cat(turned, -1)


# ---- not a comparison of one call


def skipped_blocks() -> list[str]:
    """The plan of blocks against the mask itself: every visible pair in exactly one visited block, no block
    visited for nothing, none taken without a mask that needs one."""
    import torch

    from kernels.attention import key_blocks, query_blocks

    problems = []
    for (lengths_q, lengths_k), causal, prefix, (M, N) in itertools.product(
        LENGTHS.values(), (True, False), (0, 1, 21, 1000), ((32, 16), (16, 32))
    ):
        segments, visible, q0, k0 = [], torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.bool), 0, 0
        for nq, nk in zip(lengths_q, lengths_k, strict=True):
            p = min(prefix, nk) if causal else nk
            segments.append((q0, q0 + nq, k0, k0 + nk, k0 + p))
            i, j = torch.arange(nk - nq, nk)[:, None], torch.arange(nk)[None]
            visible[q0 : q0 + nq, k0 : k0 + nk] = (j <= i) | (j < p)
            q0, k0 = q0 + nq, k0 + nk
        for kind in (query_blocks, key_blocks):
            seen = torch.zeros_like(visible, dtype=torch.int)
            for own, own_end, first, full, end, *_ in kind(segments, M, N):
                by_query = kind is query_blocks
                size, step = (M, N) if by_query else (N, M)
                own_rows = slice(own, min(own + size, own_end))
                for x in range(first, end, step):
                    rows, cols = own_rows, slice(x, x + step)
                    whole_block = visible[rows, cols] if by_query else visible[cols, rows]
                    inside = slice(x, min(x + step, end if not by_query else end))
                    block = (rows, inside) if by_query else (inside, rows)
                    seen[block] += visible[block].int()
                    if not visible[block].any():
                        problems.append(f"{kind.__name__} visits a block for nothing: {own}, {x}")
                    masked = x >= full if by_query else x < full
                    if not masked and not visible[block].all():
                        problems.append(f"{kind.__name__} forgets a mask: {own}, {x} of {whole_block.shape}")
            if not torch.equal(seen, visible.int()):
                problems.append(f"{kind.__name__} sees other pairs than the mask")
    return problems


def deterministic() -> list[str]:
    """Bit for bit the same whatever order the programs run in."""
    import torch

    from kernels import attention

    small_tiles()
    inputs, plan, results = qkv("packed", 64), attention.plan, []
    do = torch.randn(inputs[0].shape)
    for order in (lambda t: t, lambda t: t.flip(0)):
        attention.plan = lambda *a, order=order: order(plan(*a))
        o = attention_call("packed", "causal", impl="triton")(*inputs)
        results.append([o, *torch.autograd.grad(o, inputs, do)])
    attention.plan = plan
    return [
        f"output {i} differs" for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)
    ]


def plan_is_shared() -> list[str]:
    from kernels import attention

    small_tiles()
    attention.plan.cache_clear()
    for _ in range(3):  # three layers, each with bounds of its own as a cache makes them
        attention_call("decode", "causal", impl="triton")(*[x.detach() for x in qkv("decode", 64)])
    info = attention.plan.cache_info()
    return [] if (info.misses, info.hits) == (1, 2) else [f"three layers made {info.misses} plans"]


def key_ranges() -> list[str]:
    """Keys that lie anywhere in a pool, in any order, give what they give brought together."""
    import torch

    from kernels.attention import attention_ranges

    small_tiles()
    problems = []
    for lengths, mask in (
        ("decode", "causal"),
        ("append", "causal"),
        ("append", "prefix"),
        ("cross", "full"),
    ):
        q, k, v = (x.detach() for x in qkv(lengths, 64))
        expected = attention_call(lengths, mask, impl="ref")(q, k, v)
        counts, pool = LENGTHS[lengths][1], torch.full((2, 400, *k.shape[1:]), float("nan"))
        keys, first = [], 380
        for count in counts:  # from the end to the front, with gaps
            first -= count + 5
            keys.append((first, first + count))
        for (first, end), ks, vs in zip(keys, k.split(counts), v.split(counts), strict=True):
            pool[0, first:end], pool[1, first:end] = ks, vs
        cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS[lengths][0])], dtype=torch.int32)
        prefix_lens = prefixes_of(counts) if mask == "prefix" else None
        for impl in ("ref", "triton"):
            o = attention_ranges(q, *pool, cu_seqlens, keys, mask != "full", prefix_lens, impl=impl)
            if not float((o - expected).abs().max()) < 1e-5:
                problems.append(f"{impl}, {lengths}, {mask}: off by {float((o - expected).abs().max())}")
    return problems


def even_ranges() -> list[str]:
    """Single queries whose keys begin at even distances are one call, which sees no row behind a range."""
    import torch

    from kernels.attention import attention_ranges, runs_of

    problems = []
    for counts, step, calls in (([7, 30, 31, 9], 40, 1), ([40, 40], 40, 1), ([41, 3], 40, 2), ([5], 1, 1)):
        q, pool = torch.randn(len(counts), 2, 16), torch.randn(2, 200, 2, 16)
        keys = [(7 + n * step, 7 + n * step + count) for n, count in enumerate(counts)]
        bounds = torch.arange(len(counts) + 1, dtype=torch.int32)
        found = attention_ranges(q, *pool, bounds, keys, True, impl="ref")
        for n, (first, end) in enumerate(keys):
            k, v = pool[:, first:end].double()
            weights = torch.einsum("hd,khd->hk", q[n].double(), k).div(4).softmax(-1)
            expected = torch.einsum("hk,khd->hd", weights, v)
            if not float((found[n] - expected).abs().max()) < 1e-5:
                problems.append(
                    f"{counts}, {step}: segment {n} is off by {(found[n] - expected).abs().max()}"
                )
        runs = runs_of(tuple(bounds.tolist()), tuple(keys), 200, 32, True, q.device)
        if len(runs) != calls:
            problems.append(f"{counts}, {step}: {len(runs)} calls")
    return problems


def device_ranges() -> list[str]:
    """A decoding step whose ranges are read on the device: uneven, of one row (a slot that nobody has), in
    pieces of which some are empty, heads in groups. What lies beside a range is not looked at."""
    import torch

    from kernels import attention

    small_tiles()
    attention.LEAST_KEYS = 16
    problems = []
    for D, (H, heads), counts, pieces in (
        (64, (2, 2), [1, 40, 77, 1], 3),
        (80, (4, 4), [200], 5),
        (40, (6, 2), [2, 33], 4),
        (128, (4, 1), [50, 1, 17], 1),
    ):
        q, pool, table, row = torch.randn(len(counts), H, D), torch.randn(2, 300, heads, D), [], 5
        for count in counts:
            table.append((row, row + count))
            row += count + 3
        ranges, holes = torch.tensor(table).t().contiguous(), pool.clone()
        for a, b in zip([0, *(end for _, end in table)], [*(first for first, _ in table), 300], strict=True):
            holes[:, a:b] = float("nan")
        keys = pool.double().repeat_interleave(H // heads, 2)
        exact = [
            torch.einsum("hk,khd->hd", torch.einsum("hd,khd->hk", x, k).div(D**0.5).softmax(-1), v)
            for x, (k, v) in zip(q.double(), (keys[:, a:b] for a, b in table), strict=True)
        ]
        for dtype in (torch.float32, torch.float16):
            x = q.to(dtype)
            plain = attention.attention_decode(x, *pool.to(dtype), *ranges, impl="ref")
            split = attention.attention_decode_triton(x, *holes.to(dtype), *ranges, 300, pieces)
            bound, error = (float((o - torch.stack(exact)).abs().max()) for o in (plain, split))
            allowed = 1.5 * bound + (1e-6 if dtype == torch.float32 else 2e-3)
            if split.dtype != dtype or not error <= allowed or not bound < 5e-3:
                problems.append(f"{counts} in {pieces}, {dtype}: off by {error}, plain PyTorch by {bound}")
        bounds = torch.arange(len(counts) + 1, dtype=torch.int32)
        with torch.no_grad():  # the way of a step that is planned on the host
            found = attention.attention_ranges(q, *holes, bounds, table, True, impl="triton")
        one = attention.attention_decode_triton(q, *holes, *ranges, 300, 1)
        if not torch.equal(found, one):
            problems.append(f"{counts}: a step of the host takes another way")
    if [attention.pieces_of(*x, torch.device("cpu")) for x in ((511, 1), (9999, 1), (9999, 2))] != [1, 2, 1]:
        problems.append("pieces_of")
    return problems


def refusals() -> list[str]:
    import torch

    problems = []
    for D, dtype, rows in (
        (12, torch.float32, 67),
        (136, torch.float32, 67),
        (64, torch.float64, 67),
        (64, torch.float32, 66),
    ):
        try:
            attention_call("one", "causal", impl="triton")(
                *[torch.randn(rows, 2, D, dtype=dtype) for _ in range(3)]
            )
            problems.append(f"head size {D} in {dtype} with {rows} rows was not refused")
        except ValueError:
            pass
    bias = torch.randn(2, 67, 67)
    x = [t.detach() for t in qkv("one", 12)]
    a, b = (attention_call("one", "full", impl=impl, bias=bias)(*x) for impl in ("triton", "ref"))
    return problems + ([] if torch.equal(a, b) else ["with a bias plain PyTorch should have run"])


def autocast() -> list[str]:
    """16-bit results from fp32 inputs, and fp32 gradients, as plain PyTorch under autocast."""
    import torch

    from kernels.linear_cross_entropy import linear_cross_entropy

    small_tiles()
    problems = []
    x, w, targets = (
        torch.randn(33, 64).requires_grad_(),
        torch.randn(90, 64).requires_grad_(),
        torch.randint(90, (33,)),
    )
    inputs, outputs = qkv("packed", 64), []
    for impl in ("triton", "ref"):
        with torch.autocast("cpu", torch.float16):
            o = attention_call("packed", "causal", impl=impl)(*inputs)
            loss = linear_cross_entropy(x, w, targets, impl=impl)[0]
        grads = torch.autograd.grad(o.float().square().sum(), inputs) + torch.autograd.grad(loss, (x, w))
        outputs.append([o, loss, *grads])
    for i, (a, b) in enumerate(zip(*outputs, strict=True)):
        if a.dtype != b.dtype or (a - b).abs().max() > 4e-3 * b.abs().max():
            problems.append(f"output {i}: {a.dtype} {b.dtype} {(a - b).abs().max()}")
    return problems


def vocab_parallel() -> list[str]:
    """Two ranks with half of the vocabulary each: the losses and gradients of one with all of it."""
    import torch
    from ranks import together

    from kernels.linear_cross_entropy import linear_cross_entropy_ref

    x, w, targets = (
        torch.randn(37, 64).requires_grad_(),
        torch.randn(120, 64).requires_grad_(),
        torch.randint(120, (37,)),
    )
    problems = []
    for impl, smoothing in itertools.product(("triton", "ref"), (0.0, 0.1)):
        loss, rows = linear_cross_entropy_ref(x, w, targets, smoothing)
        expected = [loss.detach(), rows, *torch.autograd.grad(loss, (x, w))]
        results = together(_vocab_rank, x, w, targets, smoothing, impl)
        for r, (loss, rows, dx, dw) in enumerate(results):
            for what, a, b in zip(
                ("loss", "rows", "dx", "dw"),
                (loss, rows, dx, dw),
                (*expected[:3], expected[3].chunk(2)[r]),
                strict=True,
            ):
                if not (a - b).abs().max() <= 1e-5 * b.abs().max():
                    problems.append(f"{impl} {smoothing} rank {r} {what}: differs by {(a - b).abs().max()}")
    return problems


def _vocab_rank(rank, x, w, targets, smoothing, impl):
    import torch
    import torch.distributed as dist

    from kernels.linear_cross_entropy import linear_cross_entropy

    small_tiles()
    x, w = x.detach().requires_grad_(), w.detach().chunk(2)[rank].requires_grad_()
    loss, rows = linear_cross_entropy(
        x, w, targets - rank * len(w), smoothing, group=dist.group.WORLD, impl=impl
    )
    return [loss.detach(), rows, *torch.autograd.grad(loss, (x, w))]


def golden_config(directory: str) -> dict:
    path = sorted((ROOT / "tests" / "goldens").glob(directory))[0]
    if (path / "config.json").exists():
        return json.loads((path / "config.json").read_text())
    return json.loads((path / "golden.json").read_text())["config"]


def step_batch(lengths: list[int], Q: int, size: int, image_start: int, vocabulary: int) -> dict:
    """A stream of random tokens with an image in the first segment."""
    import torch

    import vlm

    ids = torch.randint(10, vocabulary, (sum(lengths),))
    return vlm.Batch(
        input_ids=ids,
        targets=torch.where(torch.rand(len(ids)) < 0.4, ids.roll(-1), -100),
        cu_seqlens=bounds(lengths),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        pixel_values=torch.randn(1, 3, size, size),
        image_positions=torch.arange(image_start, image_start + Q)[None],
    )


def qwen_vl_step() -> list[str]:
    import model_qwen_vl as qwen

    model = qwen.build_model(golden_config("qwen_vl/tiny_*"))
    Q, size = model.config.visual.n_queries, model.config.visual.image_size
    batch = step_batch([Q + 9, 1, 23], Q, size, 2, 200)
    return compare_step(model, batch, ("attention", "linear_cross_entropy", "swiglu"))


def visualglm_step() -> list[str]:
    """With bidirectional contexts of several lengths and 2-D positions."""
    import numpy as np
    import torch

    import model_visualglm as glm

    config = golden_config("visualglm/b")
    config["qformer_config"] |= {"hidden_size": 32, "num_attention_heads": 4}  # heads that the kernel takes
    model = glm.build_model(config)
    Q = model.num_image_tokens
    batch = step_batch([Q + 9, 3, 23], Q, config["eva_config"]["image_size"][0], 3, 60)
    placed = []
    for ids, context in zip(batch.input_ids.split([Q + 9, 3, 23]), (Q + 4, 1, 11), strict=True):
        ids[context - 1], ids[context] = config["gmask_token_id"], config["bos_token_id"]
        placed.append(glm.glm_positions(ids, *(config[f"{k}_token_id"] for k in ("bos", "gmask", "mask"))))
    batch.position_ids = torch.from_numpy(np.concatenate([p for p, _ in placed], 1))
    batch.prefix_lens = torch.tensor([n for _, n in placed])
    return compare_step(model, batch, ("attention", "linear_cross_entropy"))


def blip2_opt_step() -> list[str]:
    import model_blip2 as blip2

    config = golden_config("blip2/hf_opt_*")
    config["vision_config"]["num_attention_heads"], config["text_config"]["num_attention_heads"] = 3, 5
    model = blip2.build_model(config)
    Q = model.num_image_tokens
    batch = step_batch([Q + 9, 1, 23], Q, config["vision_config"]["image_size"], 0, 60)
    return compare_step(model, batch, ("attention", "linear_cross_entropy"))


def blip2_t5_step() -> list[str]:
    """A segment is the encoder's tokens, then the decoder's from its start token on; self-attention has a
    bias."""
    import model_blip2 as blip2

    config = golden_config("blip2/hf_t5_*")
    config["vision_config"]["num_attention_heads"] = 3
    model = blip2.build_model(config)
    Q = model.num_image_tokens
    batch = step_batch([Q + 9, 15], Q, config["vision_config"]["image_size"], 0, 60)
    for ids, targets, start in (
        (batch.input_ids.split([Q + 9, 15])[i], batch.targets.split([Q + 9, 15])[i], n)
        for i, n in enumerate((Q + 4, 8))
    ):
        ids[start] = model.language_model.start
        targets[:start] = targets[-1] = -100
        targets[start:-1] = ids[start + 1 :]
    batch = dataclasses.replace(batch, supervised=None)  # of the new targets
    return compare_step(model, batch, ("attention", "linear_cross_entropy"))


def compare_step(model, batch: dict, kernels: tuple[str, ...]) -> list[str]:
    """A whole step, pictures included: the reference's loss and gradients, and all the kernels named have
    run."""
    import importlib

    import torch

    from kernels import dispatch

    small_tiles()
    model.eval()  # no dropout
    results, launches = [], []
    modules = [importlib.import_module(f"kernels.{name}") for name in kernels]
    plain = [module._launch for module in modules]
    for module, launch in zip(modules, plain, strict=True):
        module._launch = lambda *a, launch=launch, **k: (launches.append(launch), launch(*a, **k))
    for impl in ("triton", "ref"):
        dispatch.use(impl, torch.device("cpu"))
        model.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        results.append(
            {
                "loss": loss.detach(),
                **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            }
        )
    dispatch.use("auto", torch.device("cpu"))
    for module, launch in zip(modules, plain, strict=True):
        module._launch = launch
    ours, reference = results
    if set(launches) != set(plain):
        return ["not all kernels ran"]
    if ours.keys() != reference.keys():
        return [f"gradients of other parameters: {sorted(ours.keys() ^ reference.keys())}"]
    scale = max(r.abs().max() for r in reference.values())
    return [
        f"{name}: differs by {(ours[name] - r).abs().max():.1e} of {r.abs().max():.1e}"
        for name, r in reference.items()
        if (ours[name] - r).abs().max() > 1e-5 * r.abs().max() + 1e-7 * scale
    ]


# --------------------------------------------------------------------------------------------------
# pytest's side


@pytest.fixture(scope="module")
def results(request) -> dict[str, list[str] | None]:
    """Of the cases that are asked for, from two interpreter processes that take turns in the list."""
    names = [item.callspec.params["name"] for item in request.session.items if "results" in item.fixturenames]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *names[i::2]], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    return dict(
        json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("[")
    )


# by default one of five: fives run across the loops that the cases come from
NAMES = list(CASES)
KEPT = [name for n, name in enumerate(NAMES) if n % 5 == 2 or name in EXTRA]


@pytest.mark.parametrize("name", thinned(NAMES, KEPT))
def test_interpreter(results, name):
    assert name in results, "the interpreter's process died before this case"
    assert results[name] == []


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm, 16 bits", "rotary", "rotary, 2-D"])
def test_without_triton_the_definitions_values_and_gradients(name):
    """What runs on a CPU is written for few passes, with a backward of its own."""
    import torch

    from kernels.norm import rms_norm, rms_norm_ref
    from kernels.rotary import rotary, rotary_ref

    torch.manual_seed(0)
    dy = torch.randn(7, 3, 40)
    x = torch.randn(7, 3, 3, 40)[:, 1].requires_grad_()  # rows with a gap between them
    if "rms_norm" in name:
        w = (1 + torch.randn(40)).requires_grad_()
        if "16" in name:
            x, dy = x.detach().bfloat16().requires_grad_(), dy.bfloat16()
            w = w.detach().bfloat16().requires_grad_()
        inputs, functions = (x, w), (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6))
    else:
        angles = torch.randn(2, 7, 10) if "2-D" in name else torch.randn(7, 20)
        pair = angles.cos(), angles.sin()
        inputs, functions = (x,), (lambda x: rotary(x, *pair), lambda x: rotary_ref(x, *pair))
    results = [(y := function(*inputs), *torch.autograd.grad(y, inputs, dy)) for function in functions]
    near = {"atol": 0.1, "rtol": 0.1} if "16" in name else {"atol": 1e-4, "rtol": 1e-4}
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **near)


def test_fp32_means_fp32():
    import torch

    from kernels import dispatch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    dispatch.use("auto", torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_what_changes_in_every_step_compiles_nothing_anew():
    """The number of a stream's tokens is specialised neither on 1 nor on being a multiple of 16."""
    from kernels import attention, dispatch, dropout, linear_cross_entropy, norm, rotary

    if dispatch.triton is None:
        pytest.skip("triton is not made for this platform")
    for fn, names in (
        (attention._attention_forward, {"num_q"}),
        (attention._attention_dq, {"num_q"}),
        (attention._attention_dkdv, {"num_q"}),
        (linear_cross_entropy._ce_forward, {"num_rows"}),
        (linear_cross_entropy._ce_gradient, {"num_rows"}),
        (norm._rms_norm_backward, {"num_rows", "rows_each"}),
        (rotary._rotary, {"T"}),
        (dropout._drop, {"seed", "first_channel", "threshold", "count"}),
    ):
        assert names <= {p.name for p in fn.params if p.do_not_specialize}, fn


def test_triton_is_refused_without_gpu():
    import torch

    from kernels import dispatch
    from kernels.attention import attention

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x, cu_seqlens = torch.randn(4, 1, 64), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="there is no GPU"):
        attention(x, x, x, cu_seqlens, cu_seqlens, True, impl="triton")
    with pytest.raises(ValueError, match="there is no GPU.*use auto or false"):
        dispatch.use("triton", torch.device("cpu"))
    assert "no GPU" in dispatch.use("auto", torch.device("cpu"))
    with pytest.raises(ValueError, match="expected one of auto, triton, ref"):
        dispatch.use("fast", torch.device("cpu"))


def test_training_refuses_triton_without_gpu():
    import torch

    import parallel
    import train

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cfg = train.Config(use_flash_attention=True)
    with pytest.raises(ValueError, match="use_flash_attention=True.*there is no GPU"):
        train.run(cfg, None, None, parallel.World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("frozen, share", [(False, 3), (True, 8)])
def test_memory_of_linear_cross_entropy(monkeypatch, frozen, share):
    """Peak of what is allocated, at 1/16 of the vocabulary and of the chunk: at most 1/share of naive
    logits'."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from kernels import linear_cross_entropy as ce

    monkeypatch.setattr(ce, "CHUNK_BYTES", ce.CHUNK_BYTES // 16)
    torch.manual_seed(0)
    N, C, V = 2048, 1024, 151_936 // 16
    x, w, targets = torch.randn(N, C), torch.randn(V, C) / 32, torch.randint(V, (N,))
    targets[torch.rand(N) > 0.3] = -100
    rows = (targets != -100).nonzero()[:, 0]

    def peak(loss) -> int:
        h, weight = x.detach().requires_grad_(), w.detach().requires_grad_(not frozen)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss(h, weight).backward()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    ours = peak(lambda h, w: ce.linear_cross_entropy(h[rows], w, targets[rows])[0])
    naive = peak(lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="sum"))
    assert naive > 2 * N * V * 4 and ours * share <= naive, (ours, naive)


@pytest.mark.parametrize(
    "count, only",
    [
        (2, "norm_backward weight bf16"),
        slow(
            26,
            r"attention_\w+ D=(88|128) bf16|cross_entropy_\w+ bf16|"
            "(norm_backward weight|rotary_2d|swiglu_backward) bf16",
        ),
    ],
)
def test_report_of_a_subset(count, only):
    """A kernel of each kind on both architectures: spills, tensor cores, FLOPs, copies, registers in the
    budget."""
    command = [sys.executable, str(ROOT / "dev" / "report.py"), "--only", only]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} kernels compiled, 0 checks failed" in done.stdout


if __name__ == "__main__":
    sys.exit(interpreter_main(sys.argv[1:] or list(CASES)))
