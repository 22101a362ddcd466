"""Compiled kernels on a GPU: results, gradients, repeatability, and speed beside PyTorch's own. Skipped
without one.

The same measure as tests/test_kernels.py, which has the interpreter: an error against fp64 no larger than
plain PyTorch's. `python bench.py gpu` runs them and times everything.
"""

import warnings
from pathlib import Path

import pytest
import torch
from test_kernels import HEAD_DIMS, LENGTHS, attention_call, bounds, errors

import data
import generate
import records
from engine import Engine, Request
from kernels.attention import attention, attention_decode_ref, attention_decode_triton
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from kernels.norm import rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the kernels are tested in the interpreter"
)
DTYPES = ("float32", "float16", "bfloat16")


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").requires_grad_()


def check(function, inputs, dtype: str) -> None:
    torch.manual_seed(0)
    assert (
        errors(inputs, dtype, lambda *xs: function(*xs, impl="triton"), lambda *xs: function(*xs, impl="ref"))
        == []
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", ("causal", "full", "prefix"))
def test_attention(lengths, mask, D, dtype):
    rows = [sum(n) for n in (LENGTHS[lengths][0], *[LENGTHS[lengths][1]] * 2)]
    check(attention_call(lengths, mask), [leaf(n, 3, D) for n in rows], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_long_segments(dtype):
    lengths = [1500, 1, 0, 777]
    arguments = bounds(lengths), bounds(lengths), True
    q, k, v = torch.randn(sum(lengths), 3, 4, 128, device="cuda").unbind(1)
    check(
        lambda q, k, v, impl: attention(q, k, v, *arguments, impl=impl),
        [x.requires_grad_() for x in (q, k, v)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", (None, 1, 7))
@pytest.mark.parametrize("heads", (8, 2))
def test_decoding_over_ranges_of_the_device(heads, pieces, dtype):
    q, pool = torch.randn(4, 8, 128, device="cuda"), torch.randn(2, 5000, heads, 128, device="cuda")
    first, end = torch.tensor([[0, 10, 4000, 4999], [1, 3500, 4130, 5000]], device="cuda")
    exact = attention_decode_ref(q.double(), *pool.double(), first, end)
    x, (k, v) = q.to(getattr(torch, dtype)), pool.to(getattr(torch, dtype))
    plain = attention_decode_ref(x, k, v, first, end)
    found = attention_decode_triton(x, k, v, first, end, len(k), pieces)
    bound, error = (float((o - exact).abs().max()) for o in (plain, found))
    assert error <= 1.5 * bound + {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]


def test_backward_repeats_bit_by_bit():
    lengths = [1500, 300]
    inputs = [leaf(1800, 4, 128) for _ in range(3)]
    results = []
    for _ in range(3):
        o = attention(*inputs, bounds(lengths), bounds(lengths), True, impl="triton")
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "V", "C", "smoothing"), ((1, 129, 64, 0.0), (700, 5003, 512, 0.1), (300, 32000, 1000, 0.0))
)
def test_linear_cross_entropy(N, V, C, smoothing, dtype):
    targets = torch.randint(V, (N,), device="cuda")
    found = errors(
        [leaf(N, C), (torch.randn(V, C, device="cuda") / C**0.5).requires_grad_(), targets],
        dtype,
        lambda *a: linear_cross_entropy(*a, smoothing, impl="triton"),
        lambda *a: linear_cross_entropy_ref(*a, smoothing),
    )
    assert found == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_others(dtype):
    check(lambda x, w, impl: rms_norm(x, w, 1e-6, impl=impl), [leaf(1000, 4096), leaf(4096)], dtype)
    check(swiglu, [leaf(1000, 1103), leaf(1000, 1103)], dtype)
    for angles, D in (
        (torch.randn(99, 64, device="cuda"), 128),
        (torch.randn(2, 99, 32, device="cuda"), 128),
    ):
        x = leaf(99, 32, D).to(getattr(torch, dtype))
        a, b = (rotary(x, angles.cos(), angles.sin(), impl=impl) for impl in ("triton", "ref"))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ("qwen_vl", "visualglm", "blip2"))
def test_decoding_steps_from_graphs(kind):
    """Answers as step by step; the host waits for the device once a step."""
    samples, answers = Path(__file__).resolve().parent.parent / "samples", []
    path, images = samples / f"tiny_{kind}", sorted((samples / "images").rglob("*.png"))
    model, processor = generate.load_model(path, device="cuda"), data.load_processor(str(path), "sft")
    for capture in (None, False):
        e, told = Engine(model, processor, capture=capture), {}
        for n in range(5):
            prompt = processor.prompt(records.request([("user", "what " * n)], [str(images[n])], "test"))
            how = generate.Decoding(20, min_new_tokens=20, temperature=float(n % 2), top_p=0.9)
            e.submit(Request(str(n), prompt, how, logprobs=n))
        while e.has_work():
            known, steps = len(e.graphs.graphs) if e.graphs else 0, all(s.decodes for s in e.active)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                events = e.step()
                torch.cuda.set_sync_debug_mode("default")
            if known and steps and known == len(e.graphs.graphs) and not e.waiting:
                assert sum("synchroniz" in str(w.message) for w in said) == 1
            for event in events:
                told.setdefault(event.request.id, []).append(event.token)
        assert capture is False or e.graphs.capture and len(e.graphs.graphs) >= 1
        answers.append(told)
    assert answers[0] == answers[1] and len(answers[0]) == 5


def test_attention_is_faster_than_a_dense_mask():
    lengths = [2048, 1024, 512, 512]
    q, k, v = (leaf(4096, 32, 128).bfloat16().detach().requires_grad_() for _ in range(3))
    cu_seqlens = bounds(lengths)
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = ((segment[:, None] == segment) & torch.ones(4096, 4096, dtype=torch.bool).tril()).cuda()

    def ours():
        return attention(q, k, v, cu_seqlens, cu_seqlens, True, impl="triton")

    def dense():
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask
        )

    times = []
    for call in (ours, dense):
        events = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            y = call()
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
            end.record()
            torch.cuda.synchronize()
            events.append(start.elapsed_time(end))
        times.append(min(events))
    assert times[0] < times[1], times
