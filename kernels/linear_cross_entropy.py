"""Vocabulary projection and cross entropy in one operation, for supervised tokens only.

Logits never exist for all rows. Plain PyTorch makes them for one chunk of rows at a time, and the gradients
in the forward pass while they exist. Rows without a target are left out first: with 30% supervised tokens
that is a 3x saving in time, chunking the saving in memory (most of all with a frozen vocabulary matrix, whose
gradient is never made).

Triton makes no logits at all: its forward reduces each tile of them to the tile's log-sum-exp where it was
computed. The backward computes softmax - one_hot for a slice of the vocabulary (arXiv:2411.09009 has the idea
for tiles), in the input's dtype, and leaves its two products to torch.mm. A slice's weight gradient is
complete, so nothing is added up there, and no atomics are needed.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import (
    FP32_DOTS,
    architecture,
    autocast_dtype,
    jit,
    tl,
    triton,
    use_triton,
    without_autocast,
)
from kernels.linear import mm

IGNORE_INDEX = -100
CHUNK_BYTES = 256 << 20  # fp32 logits held at a time, or 16-bit gradients of logits in the Triton version


def _compute_dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device) or x.dtype


def _across(
    group, log_z: Tensor, target_logit: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics of rows (N,) over the whole vocabulary, from those of each rank's part of it. All ranks."""
    if group is None:
        return log_z, target_logit, mean
    # One message of two or three numbers a row: what a rank's share of the vocabulary says of a row.
    parts = [log_z, target_logit] + ([mean] if mean is not None else [])
    gathered = [torch.empty_like(torch.stack(parts)) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, torch.stack(parts), group)
    log_z, target_logit, *mean = torch.stack(gathered, dim=1)  # each (ranks, N)
    # Only the target's rank has its logit, the others have 0; equal shares, so the mean is the means' mean.
    return log_z.logsumexp(0), target_logit.sum(0), mean[0].mean(0) if mean else None


def _row_losses(log_z: Tensor, target_logit: Tensor, mean: Tensor | None, smoothing: float) -> Tensor:
    return log_z - target_logit if mean is None else log_z - (1 - smoothing) * target_logit - smoothing * mean


def _vocab_size(weight: Tensor, group) -> int:
    return weight.shape[0] * (1 if group is None else dist.get_world_size(group))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, smoothing: float, group
    ) -> tuple[Tensor, Tensor]:
        N, V = x.shape[0], weight.shape[0]
        dtype = _compute_dtype(x)
        # A frozen vocabulary matrix gets no gradient, which would be the largest tensor of the step.
        need_x, need_w = ctx.needs_input_grad[:2]
        w = weight.to(dtype)
        grad_x = torch.empty(N, x.shape[1], dtype=dtype, device=x.device) if need_x else None
        # fp32: it is summed over chunks of rows.
        grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need_w else None
        row_losses = torch.empty(N, dtype=torch.float32, device=x.device)
        chunk = max(1, CHUNK_BYTES // (4 * V))
        with without_autocast(x.device):
            for i in range(0, N, chunk):
                # Else two chunks' logits would live at a time: the last one's until this one's are made.
                logits = grad = None
                rows, target = x[i : i + chunk].to(dtype), targets[i : i + chunk, None]
                # Vocabulary-parallel: another rank's targets are outside of this one's columns.
                mine = (target >= 0) & (target < V)
                target = torch.where(mine, target, 0)
                logits = mm(rows, w.t()).float()  # (chunk, V)
                target_logit = torch.where(mine, logits.gather(1, target), 0.0)
                mean = logits.mean(dim=-1) if smoothing else None
                largest = logits.amax(dim=-1, keepdim=True)
                # From here on in place, and each exponential is taken once: for the sum and the gradient.
                grad = logits.sub_(largest).exp_()
                log_z = largest[:, 0] + grad.sum(dim=-1).log()
                log_z, target_logit, mean = _across(group, log_z, target_logit[:, 0], mean)
                row_losses[i : i + chunk] = _row_losses(log_z, target_logit, mean, smoothing)
                if not (need_x or need_w):
                    continue
                # softmax - (1 - smoothing) * one_hot - smoothing / V
                grad *= (largest - log_z[:, None]).exp_()
                grad.scatter_add_(1, target, torch.where(mine, smoothing - 1.0, 0.0))
                if smoothing:
                    grad -= smoothing / _vocab_size(weight, group)
                grad = grad.to(dtype)
                if need_x:
                    grad_x[i : i + chunk] = mm(grad, w)
                if need_w:
                    if dtype == torch.float32:
                        grad_w.addmm_(grad.t(), rows, beta=0 if i == 0 else 1)
                    else:
                        grad_w.add_(grad.t() @ rows)
        # all ranks: each has the part of x's gradient that comes through its columns
        if need_x and group is not None:
            dist.all_reduce(grad_x, group=group)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(row_losses)
        return row_losses.sum(), row_losses

    @staticmethod
    def backward(ctx, grad_sum: Tensor, _):
        grad_x, grad_w = ctx.saved_tensors
        # Made in the forward pass, of a sum whose own gradient is a number that is only known here.
        if grad_x is not None:
            grad_x = (grad_x * grad_sum).to(ctx.dtypes[0])
        if grad_w is not None:
            grad_w = grad_w.mul_(grad_sum).to(ctx.dtypes[1])
        return grad_x, grad_w, None, None, None


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once, plain autograd."""
    logits = (x @ weight.t()).float()
    row_losses = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=label_smoothing
    )
    return row_losses.sum(), row_losses.detach()


# --------------------------------------------------------------------------------------------------
# Triton


@jit
def _logits(
    x,
    w,
    m0,
    n0,
    num_rows,
    num_columns,
    C,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of x @ w.T (BLOCK_M, BLOCK_N), fp32. Rows past the end repeat the last one; nobody reads their
    results."""
    # Clamped, not masked: loads without a mask are copied asynchronously, 16 bytes at a time.
    rows = tl.minimum(m0 + tl.arange(0, BLOCK_M), num_rows - 1)
    columns = tl.minimum(n0 + tl.arange(0, BLOCK_N), num_columns - 1)
    channels = tl.arange(0, BLOCK_K)
    x_pointers = x + tl.cast(rows, tl.int64)[:, None] * stride_x + channels[None, :]
    w_pointers = w + tl.cast(columns, tl.int64)[:, None] * stride_w + channels[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_K):
        if EVEN:
            x_tile, w_tile = tl.load(x_pointers + c), tl.load(w_pointers + c)
        else:
            inside = (c + channels < C)[None, :]
            x_tile = tl.load(x_pointers + c, mask=inside, other=0.0)
            w_tile = tl.load(w_pointers + c, mask=inside, other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    return acc


@jit(do_not_specialize=["num_rows"])  # another one in every step
def _ce_forward(
    x,
    w,
    targets,
    log_z,
    sums,
    target_logits,
    num_rows,
    num_columns,
    C,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """log_z, sums (blocks of columns, N): each tile's share; target_logits (N,): written where the target's
    tile is."""
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    # Rows first: the programs that run at a time share their columns of the weight in L2.
    m0 = tl.program_id(0) % row_blocks * BLOCK_M
    block = tl.program_id(0) // row_blocks
    n0 = block * BLOCK_N
    logits = _logits(
        x, w, m0, n0, num_rows, num_columns, C, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION
    )
    rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    target = tl.load(targets + rows, mask=inside, other=-1)
    # A gather from registers: one of the tile's columns is the target's, or none is.
    logit = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
    last = tl.minimum(n0 + BLOCK_N, num_columns)
    tl.store(target_logits + rows, logit, mask=inside & (target >= n0) & (target < last))
    place = block * num_rows + rows
    if SUMS:
        tl.store(
            sums + place, tl.sum(tl.where((columns < num_columns)[None, :], logits, 0.0), 1), mask=inside
        )
    logits = tl.where((columns < num_columns)[None, :], logits, float("-inf"))
    # A tile's log-sum-exp is all that leaves it: (vocabulary / BLOCK_N) numbers a row instead of logits.
    m = tl.max(logits, 1)
    tl.store(log_z + place, m + tl.log(tl.sum(tl.exp(logits - m[:, None]), 1)), mask=inside)


@jit(do_not_specialize=["num_rows"])  # another one in every step
def _ce_gradient(
    x,
    w,
    targets,
    log_z,
    grad,
    first_column,
    num_rows,
    num_columns,
    C,
    stride_x,
    stride_w,
    stride_grad,
    hit,
    spread,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad (N, columns of this slice) = softmax - hit * one_hot - spread; w is the slice's part of the
    weight."""
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    m0 = tl.program_id(0) % row_blocks * BLOCK_M
    n0 = tl.program_id(0) // row_blocks * BLOCK_N
    logits = _logits(
        x, w, m0, n0, num_rows, num_columns, C, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION
    )
    rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    target = tl.load(targets + rows, mask=inside, other=-1)
    # The logits are computed anew: that costs a product, keeping them the memory of the whole head.
    row_log_z = tl.load(log_z + rows, mask=inside, other=float("inf"))
    g = tl.exp(logits - row_log_z[:, None]) - spread
    g -= tl.where((first_column + columns)[None, :] == target[:, None], hit, 0.0)
    pointers = grad + tl.cast(rows, tl.int64)[:, None] * stride_grad + columns[None, :]
    tl.store(pointers, g.to(grad.dtype.element_ty), mask=inside[:, None] & (columns < num_columns)[None, :])


# bytes of an element -> (rows, columns, channels, warps, stages); dev/report.py checks them
TILES = {
    "sm_80": {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)},
    "sm_90": {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)},
}


def _launch(fn, num_rows: int, num_columns: int, x: Tensor, *args, **options) -> None:
    block_m, block_n, block_k, warps, stages = TILES[architecture(x.device)][x.element_size()]
    programs = triton.cdiv(num_rows, block_m) * triton.cdiv(num_columns, block_n)
    fn[(programs,)](
        *args,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=x.shape[1] % block_k == 0,
        PRECISION=FP32_DOTS if x.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
        **options,
    )


class _TritonLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, smoothing: float, group
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes, dtype = (x.dtype, weight.dtype), _compute_dtype(x)
        x, w, targets = x.to(dtype).contiguous(), weight.to(dtype).contiguous(), targets.int()
        N, C = x.shape
        V = w.shape[0]
        block_n = TILES[architecture(x.device)][x.element_size()][1]
        log_z = torch.empty(triton.cdiv(V, block_n), N, dtype=torch.float32, device=x.device)
        sums = torch.empty_like(log_z) if smoothing else log_z  # not written without smoothing
        target_logit = torch.zeros(N, dtype=torch.float32, device=x.device)
        if N:
            _launch(
                _ce_forward,
                N,
                V,
                x,
                x,
                w,
                targets,
                log_z,
                sums,
                target_logit,
                N,
                V,
                C,
                x.stride(0),
                w.stride(0),
                SUMS=smoothing > 0,
            )
        mean = sums.sum(0) / V if smoothing else None
        log_z, target_logit, mean = _across(group, log_z.logsumexp(0), target_logit, mean)
        row_losses = _row_losses(log_z, target_logit, mean, smoothing)
        ctx.save_for_backward(x, w, targets, log_z)
        ctx.smoothing, ctx.group = smoothing, group
        ctx.mark_non_differentiable(row_losses)
        return row_losses.sum(), row_losses

    @staticmethod
    def backward(ctx, grad_sum: Tensor, _):
        x, w, targets, log_z = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        (N, C), V = x.shape, w.shape[0]
        grad_x = torch.zeros(N, C, dtype=torch.float32, device=x.device) if need_x else None
        grad_w = torch.zeros(w.shape, dtype=ctx.dtypes[1], device=x.device) if need_w else None
        # A slice of the vocabulary whose gradients of logits fit CHUNK_BYTES.
        columns = min(V, max(1024, CHUNK_BYTES // (max(N, 1) * x.element_size()) // 16 * 16))
        buffer = torch.empty(N, columns, dtype=x.dtype, device=x.device)
        hit, spread = 1 - ctx.smoothing, ctx.smoothing / _vocab_size(w, ctx.group)
        with without_autocast(x.device):
            for first in range(0, V if N else 0, columns):
                part = w[first : first + columns]
                grad = buffer[:, : len(part)]
                _launch(
                    _ce_gradient,
                    N,
                    len(part),
                    x,
                    x,
                    part,
                    targets,
                    log_z,
                    grad,
                    first,
                    N,
                    len(part),
                    C,
                    x.stride(0),
                    w.stride(0),
                    grad.stride(0),
                    hit,
                    spread,
                )
                if need_x:
                    grad_x += grad @ part
                # A slice's weight gradient is whole: no sum over slices, no atomics.
                if need_w:
                    grad_w[first : first + columns] = (grad.t() @ x) * grad_sum
        if need_x:
            if ctx.group is not None:
                dist.all_reduce(grad_x, group=ctx.group)
            grad_x = (grad_x * grad_sum).to(ctx.dtypes[0])
        return grad_x, grad_w, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0, group=None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of softmax(x @ weight.T), and the loss of each row.

    x (N, C): rows that have a target; weight (V, C); targets (N,) in 0..V-1. Returns (sum of losses, fp32,
    differentiable; row losses (N,), fp32, detached). Sums are taken in fp32; plain PyTorch rounds the logits
    to x's dtype before, as its matmul gives them. label_smoothing as torch.nn.functional.cross_entropy's. In
    plain PyTorch the sum's gradient may be taken once (the buffers are scaled in place).

    Vocabulary-parallel: each rank of the process group `group` has the same x and an equal share of the
    weight's rows, in rank order; targets count from the rank's first row, so other ranks' are below 0 or not
    below V. Every rank returns the loss over the whole vocabulary and the whole gradient of x. All ranks of
    the group call.
    """
    function = _TritonLinearCrossEntropy if use_triton(impl, x) else _LinearCrossEntropy
    return function.apply(x, weight, targets, label_smoothing, group)
