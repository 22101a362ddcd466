"""Ranks, the device mesh, sharding by fully_shard, and recomputation. Everything is an identity at world size
1.

Ranks stand on a mesh with the axes pp, dp_replicate, dp_shard, tp (the last varies fastest). All ranks of a
(pp, tp) place share their part of the model and see other data: data parallel, over the two dp axes together.

ZeRO (arXiv:1910.02054) by torch.distributed.fsdp.fully_shard: stage 1 shards the optimiser's state and
reduces gradients once a step, stage 2 also shards gradients (reduced every micro-batch), stage 3 also frees
parameters between uses.

Tensor parallelism (arXiv:1909.08053) cuts a model's weights by its TP_PLAN: a rank's module holds and
computes with its own part, as if the layer were that much narrower. What crosses ranks is here: `copy_to_tp`
where a layer's input enters the cut part, the sum where it leaves. All else, gradients too, is equal on the
ranks of a group, bit for bit.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from kernels.dropout import with_rows_of_now
from kernels.linear_cross_entropy import linear_cross_entropy
from meeting import TIMEOUT, Meeting

STAGES = ("stage1", "stage2", "stage3")
AXES = ("pp", "dp_replicate", "dp_shard", "tp")
# This process's group on each axis that has more than one rank, and "dp" over both dp axes. Model files have
# no other way to know the layout: helpers that find no group here are identities.
groups: dict[str, dist.ProcessGroup] = {}


@dataclass
class World:
    """All ranks, and this one's place on the axes of the mesh: those of one data-parallel rank see the same
    data."""

    rank: int
    size: int
    device: torch.device
    # dp: who sees the same data; tp: who has which slice of a layer; pp: who has which blocks.
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
    # PaddleMIX's files say -1 for "not used".
    tp, pp = max(tp, 1), max(pp, 1)
    if size % (tp * pp):
        raise ValueError(
            f"tensor_parallel_degree={tp} x pipeline_parallel_degree={pp} = {tp * pp} does not divide the "
            f"{size} processes; start a multiple of {tp * pp}, or lower a degree"
        )
    # What is left is data parallel; sharding may take all of it or groups of it (hybrid).
    dp = size // (tp * pp)
    degree = (dp if sharding_degree in (None, -1) else sharding_degree) if sharding else 1
    if degree < 1 or dp % degree:
        raise ValueError(
            f"sharding_parallel_degree={degree} does not divide the {dp} data-parallel processes"
        )
    # tp last: its ranks are neighbours, on one machine, since they talk in every layer.
    return pp, dp // degree, degree, tp


def init_world(
    tp: int = 1,
    pp: int = 1,
    sharding: str | None = None,
    sharding_degree: int | None = None,
    meeting: Meeting | None = None,
) -> World:
    """Joins the ranks that torchrun started, or makes a world of one. NCCL where there are GPUs, else gloo.
    `meeting`: a Meeting where the ranks have met already; the others as layout's."""
    sizes = layout(int(os.environ.get("WORLD_SIZE", 1)), tp, pp, sharding, sharding_degree)
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        # Before the process group: NCCL binds itself to the current device.
        torch.cuda.set_device(device)
    # gloo beside NCCL: facts, texts and checkpoints travel as CPU tensors
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    meeting = meeting or Meeting()
    # The store that the ranks have met at already: no second port to be taken in between.
    dist.init_process_group(
        backend, store=meeting.store, rank=meeting.rank, world_size=meeting.size, timeout=TIMEOUT
    )
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    axes = {**{axis: mesh[axis] for axis in AXES}, "dp": mesh["dp_replicate", "dp_shard"]._flatten("dp")}
    # an axis of one rank has no group, so that every helper below is an identity there
    groups.clear()
    groups.update({axis: part.get_group() for axis, part in axes.items() if part.size() > 1})
    if cuda and meeting.size > 1:
        groups["facts"] = dist.new_group(backend="nccl")  # see sum_of_all
    place = {f"{axis}_rank": axes[axis].get_local_rank() for axis in ("dp", "tp", "pp")}
    place |= {f"{axis}_size": axes[axis].size() for axis in ("dp", "tp", "pp")}
    return World(dist.get_rank(), dist.get_world_size(), device, mesh=mesh, **place)


def own_device() -> torch.device:
    """Of this rank. ValueError where it has none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, visible = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if visible == 1:  # SLURM shows each task its own GPU alone (--gpus-per-task=1)
        local = 0
    if local >= visible:
        raise ValueError(
            f"LOCAL_RANK={local}, but {visible} GPUs are visible here: start as many ranks on a machine as "
            f"it has GPUs (torchrun --nproc_per_node {visible})"
        )
    return torch.device("cuda", local)


def leave_world() -> None:
    groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def compare(facts: dict) -> None:  # all ranks
    """ValueError on every rank unless all have the same facts {name: value}."""
    # before the first collective of the loop: a difference would hang there, without a word
    found = from_all(facts)
    # Key by key, in everyone's order: all ranks say the same one.
    for key in facts:
        for rank, other in enumerate(found):
            if other.get(key) != found[0].get(key):
                raise ValueError(
                    f"the ranks differ in {key}: rank 0 has {found[0].get(key)}, rank {rank} has "
                    f"{other.get(key)}; start all with the same command on the same files"
                )


def from_all(value) -> list:  # all ranks
    """What each rank gives, by rank. Over the CPU: nobody waits for a device, and a rank that dies is noticed
    at once."""
    if not dist.is_initialized():
        return [value]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def shard(model: nn.Module, mesh: DeviceMesh, stage: str | None, dtype: torch.dtype | None) -> None:
    """Shards (or only replicates) in place, one group per block. `dtype`: what the forward and backward
    compute in; the sharded parameters keep theirs and act as its master copy, gradients are reduced in fp32.
    """
    # here: a second of imports that one rank does without
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # a two-axis mesh means hybrid sharding: shards on one axis, all-reduce over the other
    mesh = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", "dp_shard"]
    # inputs are not cast: rotary angles must stay fp32, and the towers cast their pixels themselves
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # inner modules first: what none of them took belongs to the root, which stays whole between forward and
    # backward; so does the head, whose backward follows at once
    for module in [*tables(model), *model.vision_blocks, *model.blocks, model]:
        freed = module is not model and not isinstance(module, nn.Linear)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == "stage3" and freed)
    # In the backward pass a block gathers ahead the one before it. This one asks for itself, which is there.
    if (block := behind_frozen(model)) is not None:
        block.set_modules_to_backward_prefetch([block])


def behind_frozen(model: nn.Module) -> nn.Module | None:
    """The first block behind a tower's frozen ones, which no backward pass enters."""
    tower = [*model.vision_blocks]
    trained = (n for n, block in enumerate(tower) if any(p.requires_grad for p in block.parameters()))
    first, blocks = next(trained, len(tower)), [*tower, *model.blocks]
    return blocks[first] if 0 < first < len(blocks) else None


# fully_shard's modules and tensors are known by what they have: its own classes take a second to import.


def is_sharder(module: nn.Module) -> bool:
    """Whether fully_shard was applied to it (an FSDPModule)."""
    return hasattr(module, "unshard")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds a shard."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def place_of_shard(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, first index) of this rank's shard in the whole DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def tables(model: nn.Module) -> list[nn.Module]:
    """The token embedding and the vocabulary projection, where each has a weight of its own: of a 7B model
    they are 2.3 GiB in 16 bits that need not be whole while the blocks compute."""
    return [m for m in model.modules() if getattr(m, "is_table", False) and any(True for _ in m.parameters())]


class _Halved(torch.autograd.Function):
    """16-bit copies of fp32 tensors, in one launch; their gradients come back in fp32, in another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        # A weight that this pass did not use has no gradient, not a zero one.
        ctx.set_materialize_grads(False)
        return _copies(masters, dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        fp32 = iter(_copies([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(fp32) for grad in grads)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    # One launch for all: a block has a dozen weights.
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """What `shard` means on one data-parallel rank by its `dtype`: forward and backward see 16-bit copies of
    the trained parameters, which stay fp32, and frozen ones are held once.

    fully_shard would hold frozen weights twice here: its own and the gathered ones. As there, what no block
    has belongs to the model, and a block's copies are made anew when it is recomputed.
    """
    # A parameter belongs to the first module that has it: blocks before the model around them.
    taken: set[nn.Parameter] = set()
    for module in [*model.vision_blocks, *model.blocks, model]:
        places = [
            (owner, key)
            for owner in module.modules()
            for key, p in owner.named_parameters(recurse=False)
            if p.requires_grad and p not in taken
        ]
        taken.update(owner._parameters[key] for owner, key in places)
        if places:
            module.forward = functools.partial(_with_halved, module.forward, places, dtype)


def _with_halved(forward: Callable, places: list[tuple[nn.Module, str]], dtype: torch.dtype, *args, **kwargs):
    # Swapped in for the forward pass and out again behind it: names and optimiser keep the fp32 ones.
    masters = [owner._parameters[key] for owner, key in places]
    # a tied parameter has several places and one copy
    tied = {id(p): p for p in masters}
    copies = dict(zip(tied, _Halved.apply(dtype, *tied.values()), strict=True))
    try:
        for (owner, key), master in zip(places, masters, strict=True):
            owner._parameters[key] = copies[id(master)]
        return forward(*args, **kwargs)
    finally:
        for (owner, key), master in zip(places, masters, strict=True):
            owner._parameters[key] = master


def hold(model: nn.Module) -> None:  # all ranks
    """Gathers the weights of a model that keeps them between its layers' use (not stage3): from here to
    reshard() ranks may make forward passes of their own."""
    for module in filter(is_sharder, model.modules()):
        module.unshard()


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward, which leave whole parameters: other objects than the optimiser
    has."""
    # Each sharded module by itself: reshard() does not go down.
    for module in filter(is_sharder, model.modules()):
        module.reshard()


def set_gradient_sync(model: nn.Module, stage: str | None, last: bool) -> None:
    """Before each micro-batch's backward: only stages 2 and 3 reduce gradients before the step's last one,
    and only stage 3 gathers the parameters again for the next one."""
    if is_sharder(model):
        # without it a micro-batch's gradients stay on the rank, unsharded, and are summed there
        model.set_requires_gradient_sync(last or stage in ("stage2", "stage3"))
        model.set_reshard_after_backward(last or stage == "stage3")


def recompute(model: nn.Module) -> None:
    """Activation checkpointing of every block (arXiv:1604.06174): only its input is kept."""
    for block in [*model.vision_blocks, *model.blocks]:
        forward = block.forward
        # The rows that adapters saw are put back too: the backward pass draws the same dropout.
        block.forward = lambda *args, forward=forward: checkpoint(
            with_rows_of_now(forward), *args, use_reentrant=False, preserve_rng_state=False
        )


# ---- tensor parallelism


@dataclass(frozen=True)
class Cut:
    """How a rank's part of a weight lies in the whole: `dim` holds `parts` blocks (q, k, v), each cut into
    `size` equal slices, and the rank has the `rank`-th slice of every block."""

    dim: int
    parts: int
    rank: int
    size: int

    def take(self, whole: Tensor) -> Tensor:
        # (parts * size * n) -> (parts, size, n): qkv is packed, so a rank's slice is not one contiguous range
        slices = whole.unflatten(self.dim, (self.parts, self.size, -1))
        # (parts, size, n) -> (parts, n) -> (parts * n)
        return slices.select(self.dim + 1, self.rank).flatten(self.dim, self.dim + 1)

    def rows(self, start: int, end: int, length: int) -> list[tuple[int, int]]:
        """Where rows (entries of `dim`) start to end of this part, which has `length`, lie in the whole."""
        block, ranges = length // self.parts, []
        while start < end:
            part, within = divmod(start, block)
            count = min(block - within, end - start)
            place = part * block * self.size + self.rank * block + within
            ranges.append((place, place + count))
            start += count
        return ranges

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole from what all ranks have."""
        # The way back: (parts * n) a rank -> (parts, size, n) -> the whole.
        slices = [part.unflatten(self.dim, (self.parts, -1)) for part in parts]
        return torch.stack(slices, self.dim + 1).flatten(self.dim, self.dim + 2)


def check_degree(degree: int, sizes: dict[str, int]) -> None:
    """sizes {name: what a tensor-parallel degree has to divide}."""
    # degrees that would divide all of them, for the message
    common = math.gcd(*sizes.values())
    works = [str(n) for n in range(1, common + 1) if common % n == 0]
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(
                f"tensor_parallel_degree={degree} does not divide {name}={size}; "
                f"this model takes {', '.join(works)}"
            )


def tensor_parallel(model: nn.Module, plan: dict[str, tuple[str, int]], world: World) -> None:
    """Cuts the weights of a model on the meta device in place: {pattern of module names: (kind, parts)}.

    column: output features, `parts` blocks of them; the bias too. row: input features; the outputs are summed
    over the ranks, then the bias is added. vocab: rows of an embedding or a vocabulary matrix. heads: columns
    of an embedding. A layer's in_features and out_features stay the whole layer's. Call `mark_cuts` when the
    parameters are real.
    """
    # By name, since the parameters of the meta device are replaced by real ones later.
    model.cuts, made = {}, {}
    if world.tp_size == 1:
        return

    def cut(name: str, dim: int, parts: int = 1) -> None:
        owner, _, key = name.rpartition(".")
        owner = model.get_submodule(owner)
        p = getattr(owner, key)
        if p is None:
            return
        # The model's tp_plan has refused such a degree with a message.
        cuts = parts * world.tp_size
        assert p.shape[dim] % cuts == 0, f"{name} {tuple(p.shape)} in {world.tp_size} x {parts}"
        if id(p) not in made:  # tied weights stay tied
            shape = [n // world.tp_size if i == dim else n for i, n in enumerate(p.shape)]
            room = torch.empty(shape, dtype=p.dtype, device=p.device)
            # With the whole one, or another tensor might get its id.
            made[id(p)] = p, nn.Parameter(room, requires_grad=p.requires_grad)
        setattr(owner, key, made[id(p)][1])
        model.cuts[name] = Cut(dim, parts, world.tp_rank, world.tp_size)

    for name, module in list(model.named_modules()):
        # The first pattern that matches counts, so a plan may name exceptions first.
        kind, parts = next((value for pattern, value in plan.items() if fnmatch(name, pattern)), (None, 0))
        if kind is None or not any(True for _ in module.parameters()):  # a pipeline stage lacks most of them
            continue
        # Tells copy_to_tp that this layer's input gradient is a share.
        module.is_cut = True
        lora = hasattr(module, "lora_A")
        if getattr(module, "lora_magnitude_vector", None) is not None:
            raise ValueError(
                f"tensor_parallel_degree={world.tp_size}: DoRA takes lengths of whole rows; merge its adapter"
            )
        if kind in ("column", "vocab"):
            # Rows of the weight are output features: the bias is cut with them.
            for key, _ in list(module.named_parameters(recurse=False)):
                cut(f"{name}.{key}", 0, parts)
            if lora:
                # B's rows follow the layer's; A stays whole and every rank gives its gradient a share
                cut(f"{name}.lora_B.weight", 0, parts)
                module.lora_A.is_shared = True
            if isinstance(module, nn.Embedding):
                module.forward = functools.partial(_vocab_embedding, module)
        elif kind == "row":
            # the bias stays whole: it is added once, behind the sum
            cut(f"{name}.weight", 1)
            module.forward = functools.partial(_row_linear, module)
            if lora:
                # A sees a rank's input channels; its share of the update joins the layer's sum
                cut(f"{name}.lora_A.weight", 1)
                module.lora_B.is_shared = True
                # the adapter's dropout mask is a hash of the channel in the whole layer
                module.first_channel = world.tp_rank * module.weight.shape[1]
        else:
            assert kind == "heads", kind
            cut(f"{name}.weight", 1)


def mark_cuts(model: nn.Module) -> None:
    """Notes on each parameter how it was cut: for checkpoints and the gradient norm."""
    # After to_empty: the marks go onto the tensors that training works with.
    cuts = getattr(model, "cuts", {})
    for name, p in model.named_parameters():
        if name in cuts:
            p.cut = cuts[name]


def whole_shape(p: Tensor) -> torch.Size:
    """Of the parameter of which this may be a tensor-parallel rank's part."""
    if (cut := getattr(p, "cut", None)) is None:
        return p.shape
    return torch.Size(n * cut.size if i == cut.dim else n for i, n in enumerate(p.shape))


class _Copy(torch.autograd.Function):
    """Megatron's f (arXiv:1909.08053 fig. 3): each rank's part of a layer has its share of the input's
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # An identity forward, so another tensor: autograd needs one of this function's own.
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()  # made by the matrix product of a cut layer: nobody else reads it
        if "tp" in groups:  # a dry run has no other ranks
            dist.all_reduce(grad, group=groups["tp"])
        return grad


class _Reduce(torch.autograd.Function):
    """Megatron's g: the ranks' outputs are shares of one sum, whose gradient is each one's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # In place: the product of a cut layer is nobody else's.
        x = x.contiguous()
        if "tp" in groups:  # a dry run has no other ranks
            dist.all_reduce(x, group=groups["tp"])
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def copy_to_tp(x: Tensor, layer: nn.Module) -> Tensor:  # all ranks of a group
    """x before the column layer `layer`, and others that share the input; x itself where that is whole."""
    return _Copy.apply(x) if getattr(layer, "is_cut", False) else x


def heads_of_rank(x: Tensor, dim: int) -> Tensor:  # all ranks of a group
    """This rank's heads of a tensor that every rank has whole."""
    if "tp" not in groups:
        return x
    # Its gradient is summed: each rank has that of its own heads.
    return _Copy.apply(x).chunk(dist.get_world_size(groups["tp"]), dim)[dist.get_rank(groups["tp"])]


def first_channel(local_channels: int) -> int:
    """The place of this rank's first channel among those of a cut layer."""
    return local_channels * dist.get_rank(groups["tp"]) if "tp" in groups else 0


def shared_weight(layer: nn.Linear) -> Tensor:
    """A whole weight of which each rank uses a share of the result (LoRA's A before a column layer's B), or
    that sees a share of the input (B behind a row layer's A): its gradients are shares."""
    return _Copy.apply(layer.weight) if getattr(layer, "is_shared", False) else layer.weight


def _row_linear(module: nn.Linear, x: Tensor) -> Tensor:
    # the adapter's update joins before the sum, so that both need one collective
    y = F.linear(x, module.weight)
    if hasattr(module, "lora_A"):
        y = module.updated(y, x)
    y = _Reduce.apply(y)
    return y if module.bias is None else y + module.bias


def _vocab_embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    # Rows of this rank, from first_channel(V) on.
    V = len(module.weight)
    # a rank embeds the tokens of its rows, zeros for the others: one rank's row is in the sum
    ids = ids - first_channel(V)
    outside = (ids < 0) | (ids >= V)
    x = F.embedding(ids.masked_fill(outside, 0), module.weight).masked_fill(outside[..., None], 0.0)
    return _Reduce.apply(x)


def vocab_logits(logits: Tensor) -> Tensor:  # all ranks of a group
    """(N, V) from each rank's part of the vocabulary. For inference: no gradient."""
    if "tp" not in groups:
        return logits
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(groups["tp"]))]
    # parts are equal: tp_plan refuses a degree that does not divide the vocabulary
    dist.all_gather(parts, logits.contiguous(), groups["tp"])
    return torch.cat(parts, -1)


def vocab_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:  # all ranks of a group
    """linear_cross_entropy with this rank's part of the vocabulary matrix."""
    if "tp" not in groups:
        return linear_cross_entropy(x, weight, targets)
    # Targets count from this rank's first row; those of other ranks lie outside, and the group sums up.
    return linear_cross_entropy(x, weight, targets - first_channel(len(weight)), group=groups["tp"])


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:  # all ranks
    """Of the gradients of all ranks' parameters, () fp64 on the device; one that several ranks hold counts
    once."""
    by_share: dict[float, list[Tensor]] = {}
    for p in parameters:
        # squares are added over all ranks, so each rank counts the share 1 / (ranks that hold this part)
        holders = p.cut.size if hasattr(p, "cut") else 1  # ranks that hold different parts of it
        grad = p.grad
        if is_sharded(grad):
            axes = zip(grad.device_mesh.shape, grad.placements, strict=True)
            holders *= math.prod(size for size, place in axes if place.is_shard())
            grad = grad.to_local()
        # pp_size: a stage's ranks are size / pp_size, of which `holders` have different parts
        by_share.setdefault(holders * world.pp_size / world.size, []).append(grad)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for share, grads in by_share.items():  # a frozen pipeline stage has none
        # fp64: squares of many small and few large gradients are added.
        norms = torch.stack(torch._foreach_norm(grads)).double()
        total += norms.square().sum() * share
    if world.size > 1:
        # One collective for all kinds of layout: shares make it right.
        dist.all_reduce(total)
    return total.sqrt()


# ---- data-parallel ranks


def all_sum(values: Tensor) -> Tensor:  # all ranks
    """Summed in place over the data-parallel ranks; ranks that see the same data count once."""
    # Not over tensor or pipeline ranks: they have counted the same tokens.
    if "dp" in groups:
        dist.all_reduce(values, group=groups["dp"])
    return values


def sum_of_all(sums: list[int], flags: list[bool], world: World) -> tuple[list[int], list[int]]:  # all ranks
    """In one message: numbers summed over the data-parallel ranks, and on how many ranks a flag is up. Over
    the device's backend, but beside its work: reading the result waits for this message alone."""
    if world.size == 1:
        return sums, [int(up) for up in flags]
    cuda = world.device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(world.device)) if cuda else contextlib.nullcontext():
        values = torch.tensor([*sums, *map(int, flags)], dtype=torch.int64, device=world.device)
        # a group of its own, since one group's collectives wait for each other
        dist.all_reduce(values, group=groups.get("facts"))
        values = values.tolist()
    same = world.tp_size * world.pp_size  # so many ranks gave the same numbers
    return [value // same for value in values[: len(sums)]], values[len(sums) :]


def all_max(value: int, world: World) -> int:  # all ranks
    """The largest of all ranks."""
    return max(from_all(value)) if world.size > 1 else value


def from_data_ranks(numbers: list[int], device: torch.device) -> list[list[int]]:  # all ranks
    """The numbers of each data-parallel rank; the host waits for them."""
    group = groups.get("dp")
    if group is None:
        return [numbers]
    found = torch.empty(dist.get_world_size(group), len(numbers), dtype=torch.int64, device=device)
    dist.all_gather([*found], torch.tensor(numbers, device=device), group)
    return found.tolist()


def gather_rows(
    x: Tensor, counts: list[int], differentiable: bool = False
) -> tuple[Tensor, int]:  # all ranks
    """The first counts[r] rows of each data-parallel rank r, and the place of this rank's first one."""
    group = groups.get("dp")
    if group is None:
        return x[: counts[0]], 0
    rank = dist.get_rank(group)
    x, first = x[: counts[rank]], sum(counts[:rank])
    if differentiable:
        return _GatherRows.apply(x, counts, first, group), first
    return _gather(x, counts, group), first


def _gather(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:  # all ranks
    # (n, ...) -> (most, ...), gathered, cut back to what each has.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """The gradient of a row is what all ranks have for it: summed, and its own rank takes it."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], first: int, group: dist.ProcessGroup) -> Tensor:
        # This rank's own rows among all.
        ctx.rows, ctx.group = slice(first, first + len(x)), group
        return _gather(x, counts, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # every rank used the gathered rows in its own loss
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rows], None, None, None


def barrier(world: World) -> None:  # all ranks
    if world.size > 1:
        dist.barrier()
