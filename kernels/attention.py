"""Attention over packed segments: one mask rule for every model.

Inside a segment, key `j` is visible to query `i` if not `causal`, or `j <= i`, or `j < prefix_lens[segment]`; nothing
is
visible across segments. Queries stand at the end of their keys, so a segment with fewer queries than keys is decoding.

`attention_ref` is plain PyTorch: scaled_dot_product_attention segment by segment, in one batched call where all
segments are equally long (pictures). On CPU this beats padding and any dense mask; no mask is built unless a prefix
asks for one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_len: int,
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    num_segments = len(lengths_q)
    if num_segments > 1 and len({*lengths_q}) == len({*lengths_k}) == 1 and not causal and bias is None:
        # (S*L, H, D) -> (S, H, L, D)
        batched = [x.unflatten(0, (num_segments, -1)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)

    outputs = []
    # split, not slices: its backward is one concatenation, a slice's fills a whole stream of zeros
    for s, (qs, ks, vs) in enumerate(zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)):
        num_q, num_k = lengths_q[s], lengths_k[s]
        if num_q == 0:
            continue
        # (L, H, D) -> (1, H, L, D): a leading 1 selects SDPA's flash path on CPU
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (qs, ks, vs))
        mask, is_causal = None, False
        if causal:
            prefix = 0 if prefix_lens is None else int(prefix_lens[s])
            if prefix <= 1 and num_q == num_k:
                is_causal = True
            elif num_q > 1 and prefix < num_k:
                key = torch.arange(num_k, device=q.device)
                query = torch.arange(num_k - num_q, num_k, device=q.device)[:, None]
                mask = (key <= query) | (key < prefix)
        if bias is not None:
            mask = (
                bias[..., :num_q, :num_k]
                if mask is None
                else bias[..., :num_q, :num_k].masked_fill(~mask, float("-inf"))
            )
        outputs.append(
            F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=is_causal)[0].transpose(0, 1)
        )
    return torch.cat(outputs) if outputs else q


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_len: int,
    causal: bool,
    prefix_lens: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention inside segments, scores divided by sqrt(D).

    q (Tq, H, D), k and v (Tk, H, D); cu_seqlens_q and cu_seqlens_k (S+1,) int32 on the host: segment s of the queries
    is
    rows cu_seqlens_q[s]:cu_seqlens_q[s+1]; max_len the longest segment; prefix_lens (S,): keys visible to every query
    of a causal segment; bias (H, Lq, Lk), added to the scores. Returns (Tq, H, D).
    """
    return attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, max_len, causal, prefix_lens, bias)
