"""Ranks, the device mesh, sharding by fully_shard, and recomputation. Everything is an identity at world size 1.

Ranks stand on a mesh with the axes pp, dp_replicate, dp_shard, tp (the last varies fastest). All ranks of a (pp, tp)
place share their part of the model and see other data: data parallel, over the two dp axes together.

ZeRO (arXiv:1910.02054) by torch.distributed.fsdp.fully_shard: stage 1 shards the optimiser's state and reduces
gradients once
a step, stage 2 also shards gradients (reduced every micro-batch), stage 3 also frees parameters between uses.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

STAGES = ("stage1", "stage2", "stage3")


AXES = ("pp", "dp_replicate", "dp_shard", "tp")
# This process's group on each axis that has more than one rank, and "dp" over both dp axes. Model files have no other
# way to know the layout: helpers that find no group here are identities.
groups: dict[str, dist.ProcessGroup] = {}


@dataclass
class World:
    """All ranks, and this one's place on the axes of the mesh: those of one data-parallel rank see the same data."""

    rank: int
    size: int
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0


def layout(size: int, tp: int, pp: int, sharding: str | None, sharding_degree: int | None) -> tuple[int, ...]:
    """Sizes of the AXES for `size` processes; -1 means 1, and no sharding_degree all data-parallel ranks."""
    tp, pp = max(tp, 1), max(pp, 1)
    if size % (tp * pp):
        raise ValueError(
            f"tensor_parallel_degree={tp} x pipeline_parallel_degree={pp} = {tp * pp} does not divide the {size} "
            f"processes; start a multiple of {tp * pp}, or lower a degree"
        )
    dp = size // (tp * pp)
    degree = (dp if sharding_degree in (None, -1) else sharding_degree) if sharding else 1
    if degree < 1 or dp % degree:
        raise ValueError(f"sharding_parallel_degree={degree} does not divide the {dp} data-parallel processes")
    return pp, dp // degree, degree, tp


def init_world(tp: int = 1, pp: int = 1, sharding: str | None = None, sharding_degree: int | None = None) -> World:
    """Joins the ranks that torchrun started, or makes a world of one. NCCL where there are GPUs, else gloo."""
    sizes = layout(int(os.environ.get("WORLD_SIZE", 1)), tp, pp, sharding, sharding_degree)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    axes = {**{axis: mesh[axis] for axis in AXES}, "dp": mesh["dp_replicate", "dp_shard"]._flatten("dp")}
    groups.clear()
    groups.update({axis: part.get_group() for axis, part in axes.items() if part.size() > 1})
    place = {f"{axis}_rank": axes[axis].get_local_rank() for axis in ("dp", "tp", "pp")}
    place |= {f"{axis}_size": axes[axis].size() for axis in ("dp", "tp", "pp")}
    return World(dist.get_rank(), dist.get_world_size(), device, mesh=mesh, **place)


def leave_world() -> None:
    groups.clear()
    dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, stage: str | None, dtype: torch.dtype | None) -> None:
    """Shards (or only replicates) in place, one group per block. `dtype`: what the forward and backward compute in;
    the sharded parameters keep theirs and act as its master copy, gradients are reduced in fp32."""
    mesh = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", "dp_shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.vision_blocks, *model.blocks, model]:
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == "stage3" and module is not model
        )


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward, which leave whole parameters: other objects than the optimiser has."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_gradient_sync(model: nn.Module, stage: str | None, last: bool) -> None:
    """Before each micro-batch's backward: only stages 2 and 3 reduce gradients before the step's last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or stage in ("stage2", "stage3"))


def recompute(model: nn.Module) -> None:
    """Activation checkpointing of every block (arXiv:1604.06174): only its input is kept."""
    for block in [*model.vision_blocks, *model.blocks]:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


def all_sum(values: Tensor) -> Tensor:  # all ranks
    """Summed in place over the data-parallel ranks; ranks that see the same data count once."""
    if "dp" in groups:
        dist.all_reduce(values, group=groups["dp"])
    return values


def all_max(values: Tensor, world: World) -> Tensor:  # all ranks
    """The largest of all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_rows(x: Tensor, differentiable: bool = False) -> tuple[Tensor, int]:  # all ranks
    """Rows of all data-parallel ranks in rank order (they may have different numbers), and the place of this rank's
    first one."""
    group = groups.get("dp")
    if group is None:
        return x, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group)
    counts = [int(n) for n in counts]
    first = sum(counts[: dist.get_rank(group)])
    return (_GatherRows.apply(x, counts, first, group) if differentiable else _gather(x, counts, group)), first


def _gather(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:  # all ranks
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """The gradient of a row is what all ranks have for it: summed, and its own rank takes it."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], first: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = slice(first, first + len(x)), group
        return _gather(x, counts, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rows], None, None, None


def largest(value: int, device: torch.device) -> int:  # all ranks
    """Of the data-parallel ranks."""
    if "dp" not in groups:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=groups["dp"])
    return int(tensor)


def barrier(world: World) -> None:  # all ranks
    if world.size > 1:
        dist.barrier()
