"""Attention over packed segments: one mask rule for every model.

Inside a segment, key `j` is visible to query `i` if not `causal`, or `j <= i`, or `j < prefix_lens[segment]`;
nothing is visible across segments. Queries stand at the end of their keys, so a segment with fewer queries
than keys is decoding.

`attention_ref` is plain PyTorch: scaled_dot_product_attention segment by segment, in one batched call where
neighbours are equally long (images are). On CPU this beats padding and any dense mask; no mask is built
unless a prefix asks for one. The Triton kernels follow it.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import FP32_DOTS, architecture, jit, tl, triton, use_triton

LOG2E = 1 / math.log(2)
# 16-bit dots do not read it
PRECISION = {torch.float32: FP32_DOTS, torch.float16: "tf32", torch.bfloat16: "tf32"}
# torch's CPU kernels have no fast 16-bit backward: 5 times the time of fp32
CPU_IN_FP32 = (torch.bfloat16, torch.float16)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if q.device.type == "cpu" and q.dtype in CPU_IN_FP32:
        with torch.autocast("cpu", enabled=False):
            fp32, bias = [x.float() for x in (q, k, v)], bias if bias is None else bias.float()
            return attention_ref(*fp32, cu_seqlens_q, cu_seqlens_k, causal, prefix_lens, bias).to(q.dtype)
    # On the host: nothing waits for a device. Neighbours of one shape share a call: (queries, keys, prefix,
    # how many).
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    prefixes = prefix_lens.tolist() if causal and prefix_lens is not None else [0] * len(lengths_q)
    shapes = zip(lengths_q, lengths_k, prefixes, strict=True)
    runs = [(*shape, len(list(same))) for shape, same in itertools.groupby(shapes)]
    # split, not slices: its backward is one concatenation, a slice's fills a whole stream of zeros
    parts_q = q.split([num_q * count for num_q, _, _, count in runs])
    parts_k, parts_v = (x.split([num_k * count for _, num_k, _, count in runs]) for x in (k, v))
    outputs = []
    for (num_q, num_k, prefix, count), qs, ks, vs in zip(runs, parts_q, parts_k, parts_v, strict=True):
        if num_q == 0 or num_k == 0:  # nothing asks, or nothing is there to see
            nothing = qs * 0.0 + (ks.sum() + vs.sum()) * 0.0
            cast = torch.is_autocast_enabled(q.device.type)  # as scaled_dot_product_attention does
            outputs.append(nothing.to(torch.get_autocast_dtype(q.device.type)) if cast else nothing)
            continue
        # (count * L, H, D) -> (count, H, L, D): four axes also select SDPA's flash path on CPU
        qs, ks, vs = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (qs, ks, vs))
        here = None if bias is None else bias[..., :num_q, :num_k]
        outputs.append(_segments(qs, ks, vs, causal, prefix, here).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _segments(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix: int, bias: Tensor | None) -> Tensor:
    """Equally long segments: q (N, H, Lq, D), k and v (N, H, Lk, D), bias (H, Lq, Lk) -> (N, H, Lq, D)."""
    num_q, num_k = q.shape[2], k.shape[2]
    mask, is_causal = bias, False
    if causal:
        # A prefix of one key shows nothing more: every query sees the first. SDPA's own flag needs no mask.
        if prefix <= 1 and num_q == num_k and bias is None:
            is_causal = True
        # A single query is the last one and sees all its keys; so do all under a prefix of the whole segment.
        elif num_q > 1 and prefix < num_k:
            key = torch.arange(num_k, device=q.device)
            query = torch.arange(num_k - num_q, num_k, device=q.device)[:, None]
            seen = (key <= query) | (key < prefix)
            mask = seen if bias is None else bias.masked_fill(~seen, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def attention_ranges_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    keys: list[tuple[int, int]],
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Segment by segment, each over a view of its range of k and v; single queries whose keys begin at even
    distances in one call over one view. Behind a range's end, up to the next one's begin, k and v must hold
    finite numbers.

    CPU time of a layer in a decoding step (one core, fp32, 4 heads of 32): 8 segments of 100 keys 81 us one
    by one, 34 us in one call, 95 us with their keys brought together first; 16 of 300 keys 245, 158, 503 us.
    """
    bounds = cu_seqlens_q.tolist()
    prefixes = prefix_lens.tolist() if causal and prefix_lens is not None else [0] * len(keys)
    # 16 bits on a CPU are computed in fp32, as in attention_ref
    cast = q.device.type == "cpu" and q.element_size() == 2
    rows = k.stride(0)
    outputs = []
    runs = runs_of(tuple(bounds), tuple(keys), len(k), k[0].numel(), bias is None, q.device)
    for s, count, step, length, mask in runs:
        first, num_q = keys[s][0], bounds[s + 1] - bounds[s]
        if count > 1 or num_q == 1:  # (count, H, 1, D) and (count, H, length, D)
            shape = count, k.shape[1], length, k.shape[2]
            strides = step * rows, k.stride(1), rows, k.stride(2)
            qs = q[bounds[s] : bounds[s] + count, :, None]
            ks, vs = (x.as_strided(shape, strides, x.storage_offset() + first * rows) for x in (k, v))
        else:
            qs, ks, vs = (
                x[None, a:b].transpose(1, 2)
                for x, a, b in ((q, *bounds[s : s + 2]), (k, *keys[s]), (v, *keys[s]))
            )
        here = mask if mask is None or cast else mask.to(q.dtype)
        if bias is not None:  # it ends with the last query and the last key
            here = bias[..., bias.shape[-2] - num_q :, bias.shape[-1] - length :].to(
                torch.float32 if cast else q.dtype
            )
        if cast:
            qs, ks, vs = qs.float(), ks.float(), vs.float()
        if num_q == 1:
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=here)[:, :, 0]
        else:
            out = _segments(qs, ks, vs, causal, prefixes[s], here)[0].transpose(0, 1)
        outputs.append(out)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(v.dtype)


def attention_decode_ref(q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Over all rows of k and v, which must hold finite numbers everywhere, under a mask: no shape depends on
    a range."""
    rows = torch.arange(len(k), device=k.device)
    seen = (rows >= first[:, None]) & (rows < end[:, None])  # (S, R)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, S, D), (1, H of keys, R, D)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return o[0].transpose(0, 1)


@functools.lru_cache(maxsize=8)
def runs_of(
    bounds: tuple[int, ...], keys: tuple, end: int, width: int, joined: bool, device: torch.device
) -> list[tuple[int, int, int, int, Tensor | None]]:
    """The calls of attention_ranges_ref: (first segment, segments, rows between their keys' beginnings, keys
    of the longest, mask). end: rows of k; width: channels of one. All layers of a step share it.
    """
    runs, s = [], 0
    while s < len(keys):
        # As many neighbours with a single query as lie at even distances in the pool.
        lengths, step = [keys[s][1] - keys[s][0]], 0
        single = bounds[s + 1] - bounds[s] == 1
        while joined and single and (n := s + len(lengths)) < len(keys) and bounds[n + 1] - bounds[n] == 1:
            distance, longest = keys[n][0] - keys[n - 1][0], max(*lengths, keys[n][1] - keys[n][0])
            wasted = (len(lengths) + 1) * longest - sum(lengths) - (keys[n][1] - keys[n][0])
            fits = longest <= distance and keys[n][0] + longest <= end
            # a call costs as much as some 30,000 numbers of keys
            if not fits or step not in (0, distance) or wasted * width > 30_000 * len(lengths):
                break
            lengths.append(keys[n][1] - keys[n][0])
            step = distance
        longest, mask = max(lengths), None
        if min(lengths) < longest:
            # Rows behind a shorter range belong to others, or to nobody.
            behind = torch.arange(longest) >= torch.tensor(lengths)[:, None, None, None]
            mask = torch.zeros(behind.shape).masked_fill(behind, float("-inf")).to(device)
        runs.append((s, len(lengths), step, longest, mask))
        s += len(lengths)
    return runs


# --------------------------------------------------------------------------------------------------
# Triton. One program does one block of one segment's rows (for one head), so no program is started for
# nothing and none visits keys that its rows cannot see: `plan` lists the blocks on the host, where cu_seqlens
# is. Scores are kept in units of log 2. Backward: dQ by query blocks, then dK and dV by key blocks; nobody
# shares an output, so there are no atomics and results repeat bit by bit. (arXiv:2205.14135,
# arXiv:2307.08691)


@jit
def _tile(
    base, row, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """Rows row..row+BLOCK of one head, (BLOCK, BLOCK_D); zeros from row `end` (if CHECK) and channel D on."""
    rows, channels = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    if CHECK:
        if BLOCK_D > D:
            tile = tl.load(pointers, mask=(row + rows < end)[:, None] & (channels < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(row + rows < end)[:, None], other=0.0)
    elif BLOCK_D > D:
        tile = tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@jit
def _store(base, row, end, stride, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, channels = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    tl.store(
        pointers, tile.to(base.dtype.element_ty), mask=(row + rows < end)[:, None] & (channels < D)[None, :]
    )


@jit
def _head(base, stride):
    """Where this program's head starts; a multiple of 8 elements lets 16 bytes be copied at once."""
    return base + tl.multiple_of(tl.program_id(1) * stride, 8)


@jit
def _forward_step(
    acc,
    m,
    total,
    q,
    k,
    v,
    n,
    rows,
    end,
    last,
    prefix_end,
    stride_k,
    stride_v,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """Online softmax (arXiv:2112.05682): m the row's largest score so far, total its sum of exponentials."""
    keys = _tile(k, n, end, stride_k, D, BLOCK_N, BLOCK_D, MASK)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if MASK:
        cols = n + tl.arange(0, BLOCK_N)[None, :]
        s = tl.where(((cols <= last + rows[:, None]) | (cols < prefix_end)) & (cols < end), s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1) * scale)
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen no key yet
    else:
        new_m = tl.maximum(m, tl.max(s, 1) * scale)
        safe_m = new_m
    p = tl.exp2(s * scale - safe_m[:, None])
    # What was summed under the old maximum, under the new one.
    rescale = tl.exp2(m - safe_m)
    total = total * rescale + tl.sum(p, 1)
    values = _tile(v, n, end, stride_v, D, BLOCK_N, BLOCK_D, MASK)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_m, total


@jit(do_not_specialize=["num_q"])  # another one in every step
def _attention_forward(
    blocks,
    q,
    k,
    v,
    o,
    lse,
    num_q,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    head_q,
    head_k,
    head_v,
    head_o,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o (Tq, H, D) and lse (H, Tq) in log 2; `blocks`: rows of query_blocks()."""
    blocks += tl.program_id(0) * 8
    m0, m_end, n0 = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    n_full, n_end = tl.load(blocks + 3), tl.load(blocks + 4)
    k_end, prefix_end, shift = tl.load(blocks + 5), tl.load(blocks + 6), tl.load(blocks + 7)
    q, k, v = _head(q, head_q), _head(k, head_k), _head(v, head_v)
    rows = tl.arange(0, BLOCK_M)
    queries = _tile(q, m0, m_end, stride_q, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # First the blocks of keys that every row of this block sees whole, then those that want a mask: two loops
    # in the machine code, the first of which compares nothing.
    for masked in tl.static_range(2):
        for n in range(n_full if masked else n0, n_end if masked else n_full, BLOCK_N):
            acc, m, total = _forward_step(
                acc,
                m,
                total,
                queries,
                k,
                v,
                n,
                rows,
                k_end,
                m0 + shift,
                prefix_end,
                stride_k,
                stride_v,
                scale,
                D,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                masked,
            )
    # a row that sees no key: output 0, and lse = inf makes its probabilities 0 in the backward
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    # Divided once at the end, not in each step.
    acc = acc / total[:, None]
    row_lse = tl.where(seen, m + tl.log2(total), float("inf"))
    tl.store(lse + tl.program_id(1) * num_q + m0 + rows, row_lse, mask=m0 + rows < m_end)
    _store(o + tl.program_id(1) * head_o, m0, m_end, stride_o, acc, D, BLOCK_M, BLOCK_D)


@jit
def _dq_step(
    dq,
    q,
    do,
    lse,
    delta,
    k,
    v,
    n,
    rows,
    end,
    last,
    prefix_end,
    stride_k,
    stride_v,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    keys = _tile(k, n, end, stride_k, D, BLOCK_N, BLOCK_D, MASK)
    values = _tile(v, n, end, stride_v, D, BLOCK_N, BLOCK_D, MASK)
    # The probabilities again, from the saved log-sum-exp: no matrix of them was kept.
    p = tl.exp2(tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale - lse[:, None])
    if MASK:
        cols = n + tl.arange(0, BLOCK_N)[None, :]
        p = tl.where(((cols <= last + rows[:, None]) | (cols < prefix_end)) & (cols < end), p, 0.0)
    # Softmax's derivative: p * (dp - sum of p * dp over the row, which is rowsum(o * do)).
    ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@jit(do_not_specialize=["num_q"])  # another one in every step
def _attention_dq(
    blocks,
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    num_q,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    head_q,
    head_k,
    head_v,
    head_o,
    head_do,
    head_dq,
    scale,
    score_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq (Tq, H, D), and delta (H, Tq) = rowsum(o * do), which _attention_dkdv reads."""
    blocks += tl.program_id(0) * 8
    m0, m_end, n0 = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    n_full, n_end = tl.load(blocks + 3), tl.load(blocks + 4)
    k_end, prefix_end, shift = tl.load(blocks + 5), tl.load(blocks + 6), tl.load(blocks + 7)
    k, v = _head(k, head_k), _head(v, head_v)
    rows = tl.arange(0, BLOCK_M)
    outputs = _tile(_head(o, head_o), m0, m_end, stride_o, D, BLOCK_M, BLOCK_D, True)
    grads = _tile(_head(do, head_do), m0, m_end, stride_do, D, BLOCK_M, BLOCK_D, True)
    row_delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    place = tl.program_id(1) * num_q + m0 + rows
    tl.store(delta + place, row_delta, mask=m0 + rows < m_end)
    row_lse = tl.load(lse + place, mask=m0 + rows < m_end, other=float("inf"))
    queries = _tile(_head(q, head_q), m0, m_end, stride_q, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Whole blocks, then masked ones, as in the forward pass.
    for masked in tl.static_range(2):
        for n in range(n_full if masked else n0, n_end if masked else n_full, BLOCK_N):
            acc = _dq_step(
                acc,
                queries,
                grads,
                row_lse,
                row_delta,
                k,
                v,
                n,
                rows,
                k_end,
                m0 + shift,
                prefix_end,
                stride_k,
                stride_v,
                scale,
                D,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                masked,
            )
    _store(dq + tl.program_id(1) * head_dq, m0, m_end, stride_dq, acc * score_scale, D, BLOCK_M, BLOCK_D)


@jit
def _dkdv_step(
    dk,
    dv,
    k,
    v,
    q,
    do,
    lse,
    delta,
    m,
    end,
    cols,
    shift,
    prefix_end,
    stride_q,
    stride_do,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    # Everything stands the other way round, keys by queries: dk and dv are then plain products.
    queries = _tile(q, m, end, stride_q, D, BLOCK_M, BLOCK_D, True)
    rows = m + tl.arange(0, BLOCK_M)
    # rows beyond the segment: probability 0
    row_lse = tl.load(lse + rows, mask=rows < end, other=float("inf"))
    p = tl.exp2(tl.dot(k, tl.trans(queries), input_precision=PRECISION) * scale - row_lse[None, :])
    if MASK:
        p = tl.where((cols[:, None] <= rows[None, :] + shift) | (cols < prefix_end)[:, None], p, 0.0)
    grads = _tile(do, m, end, stride_do, D, BLOCK_M, BLOCK_D, True)
    dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
    row_delta = tl.load(delta + rows, mask=rows < end, other=0.0)
    ds = p * (tl.dot(v, tl.trans(grads), input_precision=PRECISION) - row_delta[None, :])
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@jit(do_not_specialize=["num_q"])  # another one in every step
def _attention_dkdv(
    blocks,
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    num_q,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    head_q,
    head_k,
    head_v,
    head_do,
    head_dk,
    scale,
    score_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv (Tk, H, D); `blocks`: rows of key_blocks()."""
    blocks += tl.program_id(0) * 8
    n0, n_end, m0 = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    m_full, m_end = tl.load(blocks + 3), tl.load(blocks + 4)
    prefix_end, shift = tl.load(blocks + 5), tl.load(blocks + 6)
    q, do = _head(q, head_q), _head(do, head_do)
    lse += tl.program_id(1) * num_q
    delta += tl.program_id(1) * num_q
    cols = n0 + tl.arange(0, BLOCK_N)
    keys = _tile(_head(k, head_k), n0, n_end, stride_k, D, BLOCK_N, BLOCK_D, True)
    values = _tile(_head(v, head_v), n0, n_end, stride_v, D, BLOCK_N, BLOCK_D, True)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # The other way round: the first queries that see these keys see only a part of them.
    for whole in tl.static_range(2):
        for m in range(m_full if whole else m0, m_end if whole else m_full, BLOCK_M):
            acc_k, acc_v = _dkdv_step(
                acc_k,
                acc_v,
                keys,
                values,
                q,
                do,
                lse,
                delta,
                m,
                m_end,
                cols,
                shift,
                prefix_end,
                stride_q,
                stride_do,
                scale,
                D,
                BLOCK_M,
                BLOCK_D,
                PRECISION,
                not whole,
            )
    _store(dk + tl.program_id(1) * head_dk, n0, n_end, stride_dk, acc_k * score_scale, D, BLOCK_N, BLOCK_D)
    _store(dv + tl.program_id(1) * head_dk, n0, n_end, stride_dk, acc_v, D, BLOCK_N, BLOCK_D)


@jit
def _decode(
    q,
    k,
    v,
    first,
    end,
    o,
    lse,
    stride_q,
    stride_k,
    stride_v,
    head_q,
    head_k,
    head_v,
    scale,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A piece of a segment's keys, for the single query's GROUP heads that share a key head; a grid of
    (segments, key heads, pieces). o (S, pieces, H, D) and lse (S, pieces, H) in log 2, inf where a piece is
    empty."""
    s, piece, pieces = tl.cast(tl.program_id(0), tl.int64), tl.program_id(2), tl.num_programs(2)
    # The range is read on the device: the grid, and all that is passed, is the same in every step.
    begin, stop = tl.load(first + s).to(tl.int32), tl.load(end + s).to(tl.int32)
    step = tl.maximum(tl.cdiv(stop - begin, pieces), LEAST)
    begin += piece * (tl.cdiv(step, BLOCK_N) * BLOCK_N)
    stop = tl.minimum(begin + tl.cdiv(step, BLOCK_N) * BLOCK_N, stop)
    full = begin + tl.maximum(stop - begin, 0) // BLOCK_N * BLOCK_N
    rows = tl.arange(0, BLOCK_M)  # heads of the group, and rows of zeros up to what a dot takes
    queries = _tile(_head(q + s * stride_q, GROUP * head_q), 0, GROUP, head_q, D, BLOCK_M, BLOCK_D, True)
    k, v = _head(k, head_k), _head(v, head_v)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for masked in tl.static_range(2):
        for n in range(full if masked else begin, stop if masked else full, BLOCK_N):
            # `stop` ends the keys and the prefix: whatever lies in the range is seen.
            acc, m, total = _forward_step(
                acc,
                m,
                total,
                queries,
                k,
                v,
                n,
                rows,
                stop,
                0,
                stop,
                stride_k,
                stride_v,
                scale,
                D,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                masked,
            )
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    place = ((s * pieces + piece) * tl.num_programs(1) + tl.program_id(1)) * GROUP
    tl.store(lse + place + rows, tl.where(seen, m + tl.log2(total), float("inf")), mask=rows < GROUP)
    _store(o + place * D, 0, GROUP, D, acc / total[:, None], D, BLOCK_M, BLOCK_D)


@jit
def _combine_pieces(parts, lse, o, pieces, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """o (S, H, D) of what _decode found, each piece by its weight, the sum of its exponentials."""
    piece, channels = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    H, head = tl.num_programs(1), tl.program_id(1)
    s = tl.cast(tl.program_id(0), tl.int64)
    place = (s * pieces + piece) * H + head
    weights = tl.load(lse + place, mask=piece < pieces, other=float("inf"))
    weights = tl.where(weights == float("inf"), float("-inf"), weights)
    largest = tl.max(weights, 0)
    weights = tl.exp2(weights - tl.where(largest == float("-inf"), 0.0, largest))
    inside = (piece < pieces)[:, None] & (channels < D)[None, :]
    values = tl.load(parts + place[:, None] * D + channels[None, :], mask=inside, other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(o + (s * H + head) * D + channels, out.to(o.dtype.element_ty), mask=channels < D)


# (bytes of an element, largest head size) -> (rows of queries, rows of keys, warps, stages);
# dev/report.py checks them. sm_80's fit the 99 KB of shared memory of sm_86 and sm_89 too.
TILES = {
    "sm_80": {
        "forward": {(2, 128): (128, 64, 8, 2), (4, 64): (64, 32, 4, 2), (4, 128): (16, 32, 4, 2)},
        "decode": {(2, 64): (16, 64, 4, 2), (2, 128): (16, 32, 4, 2), (4, 128): (16, 32, 4, 2)},
        "dq": {(2, 128): (128, 64, 8, 2), (4, 64): (32, 32, 4, 2), (4, 128): (16, 32, 4, 2)},
        "dkdv": {
            (2, 64): (64, 64, 4, 2),
            (2, 128): (64, 64, 8, 2),
            (4, 64): (32, 32, 4, 2),
            (4, 128): (32, 16, 4, 2),
        },
    },
    "sm_90": {
        "forward": {(2, 128): (128, 64, 8, 3), (4, 64): (64, 32, 4, 2), (4, 128): (16, 32, 4, 2)},
        "decode": {(2, 128): (16, 64, 4, 2), (4, 128): (16, 32, 4, 2)},
        "dq": {(2, 128): (128, 64, 8, 2), (4, 64): (64, 32, 4, 2), (4, 128): (16, 32, 4, 2)},
        "dkdv": {
            (2, 64): (64, 128, 8, 2),
            (2, 104): (32, 64, 4, 2),
            (2, 128): (64, 128, 8, 2),
            (4, 64): (64, 32, 8, 2),
            (4, 128): (32, 16, 4, 2),
        },
    },
}


def tile(architecture: str, kernel: str, element_size: int, D: int) -> tuple[int, int, int, int]:
    table = TILES[architecture][kernel]
    return table[min(key for key in table if key >= (element_size, D))]


def strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for axis in (0, 1) for x in tensors]


def query_blocks(segments, block_m: int, block_n: int) -> list[tuple[int, ...]]:
    """One row per block of queries: its first row, the segment's end; first key, first key of the blocks that
    not every row sees whole, end of the keys that any row sees; the segment's last key + 1, end of its
    prefix, and what to add to a query's row for the last key it sees."""
    blocks = []
    for q0, q_end, k0, k_end, prefix_end in segments:
        shift = k_end - q_end
        for m in range(q0, q_end, block_m):
            # The first row of a block sees the fewest keys, the last one the most.
            seen_by_all = max(k0, min(k_end, max(prefix_end, m + shift + 1)))
            seen_by_any = max(k0, min(k_end, max(prefix_end, min(m + block_m, q_end) + shift)))
            full = k0 + (seen_by_all - k0) // block_n * block_n
            blocks.append((m, q_end, k0, full, seen_by_any, k_end, prefix_end, shift))
    return sorted(blocks, key=lambda b: b[2] - b[4])  # longest first: the last wave is then short


def key_blocks(segments, block_m: int, block_n: int) -> list[tuple[int, ...]]:
    """One row per block of keys: its first key, the segment's end; first query that sees a key, first query
    of the blocks that see every key, the segment's last query + 1; end of the prefix, shift as in
    query_blocks."""
    blocks = []
    for q0, q_end, k0, k_end, prefix_end in segments:
        shift = k_end - q_end
        for n in range(k0, k_end, block_n):
            last = min(n + block_n, k_end) - 1
            first = q0 if n < prefix_end else min(max(q0, n - shift), q_end)
            full = first if last < prefix_end else min(max(first, last - shift), q_end)
            full = min(first + -(-(full - first) // block_m) * block_m, q_end)
            blocks.append((n, k_end, first, full, q_end, prefix_end, shift, 0))
    return sorted(blocks, key=lambda b: b[2] - b[4])


@functools.lru_cache(maxsize=64)
def plan(
    kind,
    bounds_q: tuple,
    keys: tuple,
    prefixes: tuple | None,
    block_m: int,
    block_n: int,
    device: torch.device,
) -> Tensor:
    """query_blocks or key_blocks on the device; keys: each segment's (first row, end). Kept, so that all
    layers of a step share one copy over the bus."""
    segments = []
    # Without causality a prefix as long as the segment: one rule for all.
    for s, ((q0, q_end), (k0, k_end)) in enumerate(zip(itertools.pairwise(bounds_q), keys, strict=True)):
        segments.append((q0, q_end, k0, k_end, k_end if prefixes is None else min(k_end, k0 + prefixes[s])))
    table = torch.tensor(kind(segments, block_m, block_n), dtype=torch.int32).view(-1, 8)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _loadable(x: Tensor) -> Tensor:
    """x (T, H, D) as the kernels read it: channels adjacent, rows and heads on 16-byte borders."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    return x if x.stride(2) == 1 and aligned else x.contiguous()


def _launch(name: str, fn, kind, segments: tuple, q: Tensor, *args) -> None:
    H, D = q.shape[1:]
    block_d = max(16, triton.next_power_of_2(D))
    block_m, block_n, warps, stages = tile(architecture(q.device), name, q.element_size(), D)
    blocks = plan(kind, *segments, block_m, block_n, q.device)
    if len(blocks):
        fn[(len(blocks), H)](
            blocks,
            *args,
            D=D,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            PRECISION=PRECISION[q.dtype],
            num_warps=warps,
            num_stages=stages,
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *segments):
        q, k, v = _loadable(q), _loadable(k), _loadable(v)
        Tq, H, D = q.shape
        o = torch.empty(Tq, H, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(H, Tq, dtype=torch.float32, device=q.device)
        args = q, k, v, o, lse, Tq, *strides(q, k, v, o), LOG2E / math.sqrt(D)
        _launch("forward", _attention_forward, query_blocks, segments, q, *args)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.segments = segments
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = _loadable(do)
        Tq, _, D = q.shape
        scales = LOG2E / math.sqrt(D), 1 / math.sqrt(D)
        dq, delta = torch.empty_like(o), torch.empty_like(lse)
        args = q, k, v, o, do, lse, delta, dq, Tq, *strides(q, k, v, o, do, dq), *scales
        _launch("dq", _attention_dq, query_blocks, ctx.segments, q, *args)
        # Behind dq, which leaves delta; a frozen tower's queries alone have a gradient.
        dk = dv = None
        if any(ctx.needs_input_grad[1:3]):
            dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
            args = q, k, v, do, lse, delta, dk, dv, Tq, *strides(q, k, v, do, dk), *scales
            _launch("dkdv", _attention_dkdv, key_blocks, ctx.segments, q, *args)
        return dq, dk, dv, None, None, None


def pieces_of(longest: int, programs: int, device: torch.device) -> int:
    """Into how many the keys of a decoding step are split: a few long sequences leave processors idle, where
    one program walks all keys of a head. A piece has at least 512 keys: it must be worth a second launch."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return max(1, min(-(-2 * processors // max(programs, 1)), longest // 512, 64))


LEAST_KEYS = 128  # of a piece: short ranges leave the last ones empty


def check_kernel_takes(q: Tensor) -> None:
    D = q.shape[-1]
    if D % 8 or D > 128 or q.dtype not in PRECISION:
        takes = "multiples of 8 up to 128 in fp32, fp16, bf16"
        raise ValueError(
            f"head_dim={D}, {q.dtype}: the Triton kernel takes {takes}; set use_flash_attention=false"
        )


def attention_decode_triton(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, longest: int, pieces: int | None = None
) -> Tensor:
    """As attention_decode; `longest`: no range has more keys. They are taken in pieces side by side, which
    are then put together ("Flash-Decoding", Dao et al. 2023)."""
    check_kernel_takes(q)
    if torch.is_autocast_enabled(q.device.type):  # as scaled_dot_product_attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    (S, H, D), heads = q.shape, k.shape[1]
    pieces = pieces_of(longest, S * heads, q.device) if pieces is None else pieces
    block_m, block_n, warps, stages = tile(architecture(q.device), "decode", q.element_size(), D)
    block_d = max(16, triton.next_power_of_2(D))
    o = torch.empty(S, H, D, dtype=q.dtype, device=q.device)
    # One piece is the answer; of several, each as exact as the sum that they make.
    parts = o if pieces == 1 else torch.empty(S, pieces, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(S, pieces, H, dtype=torch.float32, device=q.device)
    if S:
        _decode[(S, heads, pieces)](
            *(q, k, v, first, end, parts, lse),
            *strides(q, k, v),
            LOG2E / math.sqrt(D),
            D=D,
            GROUP=H // heads,
            LEAST=LEAST_KEYS,
            BLOCK_M=max(block_m, triton.next_power_of_2(H // heads)),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            PRECISION=PRECISION[q.dtype],
            num_warps=warps,
            num_stages=stages,
        )
    if S and pieces > 1:
        _combine_pieces[(S, H)](
            parts, lse, o, pieces, D=D, BLOCK_P=triton.next_power_of_2(pieces), BLOCK_D=block_d
        )
    return o


@functools.lru_cache(maxsize=8)
def ranges_on(device: torch.device, keys: tuple[tuple[int, int], ...]) -> Tensor:
    """(2, S) int64: where they begin, and end. All layers of a step share it, as `plan`."""
    table = torch.tensor(keys, dtype=torch.int64).view(-1, 2).t().contiguous()
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def attention_ranges_triton(q, k, v, cu_seqlens_q, keys, causal: bool, prefix_lens=None) -> Tensor:
    bounds_q, keys = tuple(cu_seqlens_q.tolist()), tuple(keys)
    end = max((end for _, end in keys), default=0)
    check_kernel_takes(q)
    if bounds_q[-1] != len(q) or end > len(k):
        rows = f"{len(q)} queries and {len(k)} keys"
        raise ValueError(f"cu_seqlens end at {bounds_q[-1]} and {end}, but there are {rows}")
    if bounds_q == tuple(range(len(keys) + 1)) and not torch.is_grad_enabled():
        longest = max((end - first for first, end in keys), default=0)
        return attention_decode_triton(q, k, v, *ranges_on(q.device, keys), longest)
    if k.shape[1] != q.shape[1]:
        return _grouped(attention_ranges_triton, q, k, v, cu_seqlens_q, keys, causal, prefix_lens)
    prefixes = None
    if causal:
        prefixes = (0,) * len(keys) if prefix_lens is None else tuple(prefix_lens.tolist())
    if torch.is_autocast_enabled(q.device.type):  # as scaled_dot_product_attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return _Attention.apply(q, k, v, bounds_q, keys, prefixes)


def _grouped(function, q: Tensor, k: Tensor, v: Tensor, *options) -> Tensor:
    """Grouped heads: the first query heads of all groups, then the second ones, ...: no key is copied."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key/value heads do not divide {q.shape[1]} query heads")
    heads = q.unflatten(1, (k.shape[1], -1)).unbind(2)  # each (Tq, H of keys, D)
    return torch.stack([function(x, k, v, *options) for x in heads], dim=2).flatten(1, 2)


def attention_even(
    q: Tensor, k: Tensor, v: Tensor, count: int, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """attention() of `count` equally long segments, images for instance, without a number that is read from a
    tensor: what torch.export can follow. A mask (Lq, Lk) or bias (H, Lq, Lk) instead of `causal`."""
    dtype, cast = q.dtype, q.device.type == "cpu" and q.element_size() == 2  # as attention_ref
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # (count, H, L, D)
    if cast:
        q, k, v = q.float(), k.float(), v.float()
        bias = bias if bias is None or bias.dtype == torch.bool else bias.float()
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(0, 1).to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention inside segments, scores divided by sqrt(D).

    q (Tq, H, D), k and v (Tk, H, D) or with fewer heads, each of which serves a run of query heads (grouped
    heads, arXiv:2305.13245); cu_seqlens_q and cu_seqlens_k (S+1,) int32 on the host: segment s of the
    queries is rows cu_seqlens_q[s]:cu_seqlens_q[s+1]; prefix_lens (S,), on the host: keys visible to every
    query of a causal segment; bias (H, Lq, Lk), added to the scores (plain PyTorch whatever `impl`; not with
    grouped heads). Returns (Tq, H, D).
    """
    if torch.compiler.is_exporting():  # no lengths are there to read; a program's segments are all as long
        return attention_even(q, k, v, cu_seqlens_q.shape[0] - 1, causal, bias)
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, prefix_lens, bias, impl)


def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, prefix_lens, bias, impl) -> Tensor:
    if k.shape[1] != q.shape[1]:
        options = cu_seqlens_q, cu_seqlens_k, causal, prefix_lens, bias, impl
        return _grouped(_attention, q, k, v, *options)
    if bias is None and use_triton(impl, q):
        # A key that no segment holds would go without a gradient.
        rows = cu_seqlens_k.tolist()
        if rows[-1] != len(k):
            raise ValueError(f"cu_seqlens_k ends at {rows[-1]}, but there are {len(k)} keys")
        return attention_ranges_triton(q, k, v, cu_seqlens_q, itertools.pairwise(rows), causal, prefix_lens)
    return attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, prefix_lens, bias)


def leave_uncompiled() -> None:
    """Before torch.compile: a loop over segments would be compiled anew for each of their lengths. Not as a
    decorator, which imports the compiler."""
    global _attention
    _attention = torch.compiler.disable(_attention)


def attention_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    keys: list[tuple[int, int]],
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """attention() over keys and values that lie anywhere: keys[s] is the (first row, end) of segment s in k
    and v, the pool of a decoder; nothing is copied. A bias (H, Lq, Lk) ends with the last query and the last
    key of every segment. Without gradients."""
    if bias is None and use_triton(impl, q):
        return attention_ranges_triton(q, k, v, cu_seqlens_q, keys, causal, prefix_lens)
    if k.shape[1] != q.shape[1]:
        return _grouped(attention_ranges_ref, q, k, v, cu_seqlens_q, keys, causal, prefix_lens, bias)
    return attention_ranges_ref(q, k, v, cu_seqlens_q, keys, causal, prefix_lens, bias)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, impl: str = "auto"
) -> Tensor:
    """attention_ranges() of single queries q (S, H, D) whose ranges, first and end (S,) int64, are on the
    device: nothing of a step is known on the host, so a CUDA graph can hold it. k and v may have fewer
    heads."""
    if use_triton(impl, q):
        return attention_decode_triton(q, k, v, first, end, len(k))
    return attention_decode_ref(q, k, v, first, end)
