"""Ranks, the device mesh, sharding by fully_shard, and recomputation. Everything is an identity at world size 1.

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


@dataclass
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def init_world() -> World:
    """Joins the ranks that torchrun started, or makes a world of one. NCCL where there are GPUs, else gloo."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return World(dist.get_rank(), dist.get_world_size(), device)


def make_mesh(world: World, sharding_degree: int) -> DeviceMesh:
    """Axes (dp_replicate, dp_shard)."""
    shape = (world.size // sharding_degree, sharding_degree)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def shard(model: nn.Module, mesh: DeviceMesh, stage: str | None, dtype: torch.dtype | None) -> None:
    """Shards (or only replicates) in place, one group per block. `dtype`: what the forward and backward compute in;
    the sharded parameters keep theirs and act as its master copy, gradients are reduced in fp32."""
    if mesh["dp_replicate"].size() == 1:
        mesh = mesh["dp_shard"]
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


def all_sum(values: Tensor, world: World) -> Tensor:  # all ranks
    if world.size > 1:
        dist.all_reduce(values)
    return values


def all_max(values: Tensor, world: World) -> Tensor:  # all ranks
    if world.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_rows(x: Tensor, differentiable: bool = False) -> tuple[Tensor, int]:  # all ranks
    """Rows of all ranks in rank order (ranks may have different numbers), and the place of this rank's first one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    counts = [int(n) for n in counts]
    first = sum(counts[: dist.get_rank()])
    return (_GatherRows.apply(x, counts, first) if differentiable else _gather(x, counts)), first


def _gather(x: Tensor, counts: list[int]) -> Tensor:  # all ranks
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """The gradient of a row is what all ranks have for it: summed, and its own rank takes it."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], first: int) -> Tensor:
        ctx.rows = slice(first, first + len(x))
        return _gather(x, counts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows], None, None


def largest(value: int, device: torch.device) -> int:  # all ranks
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def barrier(world: World) -> None:  # all ranks
    if world.size > 1:
        dist.barrier()
