"""Pipeline parallelism by torch.distributed.pipelining: the blocks are cut into stages, one after another on
the ranks of the mesh axis pp, and the micro-batches of a step flow through them.

The embedding and the vision tower belong to the first stage, the vocabulary projection to the last. Every
stage loads the same batches, so only hidden states (T, C) travel; T is one number for all micro-batches of a
step, their tails are padded. A stage keeps the names of the whole model, block numbers included, so a
checkpoint knows nothing of stages. A parameter that several stages use (tied embeddings, P-tuning's prefix)
has a copy on each and one summed gradient.

Sources: GPipe arXiv:1811.06965; 1F1B and the interleaved schedule arXiv:2104.04473.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint
import parallel

SCHEDULES = ("gpipe", "1f1b", "interleaved")
INTERLEAVED = 2  # stages on each rank under the interleaved schedule


def num_stages(ranks: int, schedule: str) -> int:
    return ranks * (INTERLEAVED if schedule == "interleaved" else 1)


def bubble_share(ranks: int, schedule: str, micro_batches: int) -> float:
    """Share of a step in which a rank waits, for stages of equal cost (arXiv:2104.04473 sec. 2.2)."""
    wait = (ranks - 1) / (num_stages(ranks, schedule) / ranks)
    return wait / (micro_batches + wait)


def cut(costs: list[float], first: float, last: float, stages: int) -> list[range]:
    """Blocks of each stage such that the costliest stage costs least. `first` and `last`: cost of what these
    stages have besides blocks; they may go without a block, the others may not. ValueError for too many
    stages."""
    N = len(costs)
    if stages - 2 > N:
        raise ValueError(f"{stages} pipeline stages need at least {stages - 2} blocks, the model has {N}")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def cost_of(stage: int, a: int, b: int) -> float:
        return total[b] - total[a] + first * (stage == 0) + last * (stage == stages - 1)

    # dynamic programming over (stage, end): at most stages * N^2 steps, exact where a greedy cut is not
    best = {0: (0.0, [])}  # blocks given out -> (costliest stage so far, ends of the stages)
    for stage in range(stages):
        least = 0 if stage in (0, stages - 1) else 1
        found = {}
        for start, (worst, ends) in best.items():
            for end in range(start + least, N + 1) if stage < stages - 1 else (N,):
                candidate = max(worst, cost_of(stage, start, end)), [*ends, end]
                if end >= start + least and (end not in found or candidate[0] < found[end][0]):
                    found[end] = candidate
        best = found
    ends = best[N][1]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def stages_of_parameters(model: nn.Module, plan: dict, blocks: list[range]) -> dict[str, set[int]]:
    """{parameter: the stages that have it}, by a model file's PIPELINE and the blocks of each stage."""
    prefix, last = plan["blocks"] + ".", len(blocks) - 1

    def stages_of(name: str) -> set[int]:
        if name.startswith(prefix):
            number = int(name[len(prefix) :].split(".")[0])
            return {stage for stage, numbers in enumerate(blocks) if number in numbers}
        ends = {"first": 0, "last": last}.items()
        own = {stage for end, stage in ends if checkpoint.matches(name, plan[end])}
        return own or set(range(last + 1))  # what no plan names, each stage has

    found: dict[int, set[int]] = {}
    # the stages of both names, since each stage must hold what it uses
    for name, p in model.named_parameters(remove_duplicate=False):  # a tied one has two names
        found.setdefault(id(p), set()).update(stages_of(name))
    return {name: found[id(p)] for name, p in model.named_parameters()}


def keep_parameters(model: nn.Module, names: set[str]) -> None:
    """Drops all other parameters, and blocks without one, in place. Block numbers stay as they are."""
    kept = {id(p) for name, p in model.named_parameters() if name in names}
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for number, block in list(module._modules.items()):
                if not any(id(p) in kept for p in block.parameters()):
                    del module._modules[number]  # `del module[i]` would number the others anew
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) not in kept:
                module.register_parameter(name, None)


class _Stage(nn.Module):
    """What a pipeline stage does with one micro-batch. The model is no submodule: the schedule must not touch
    it."""

    def __init__(self, forward: Callable, before_backward: Callable):
        super().__init__()
        self.run, self.before_backward = forward, before_backward

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        i = int(index)
        out = self.run(i, x)
        # runs when this stage's backward begins: each micro-batch decides whether gradients are synchronised
        if out.requires_grad:
            out.register_hook(lambda _grad: self.before_backward(i))
        return out


class Pipeline:
    """This rank's stages, and the schedule that runs them.

    `stages`: {parameter: stages that have it}; `trainable`: names; `dtype`: of the hidden states (T, C)
    between stages.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: dict,
        blocks: list[range],
        stages: dict[str, set[int]],
        trainable: set[str],
        schedule: str,
        world: parallel.World,
        dtype: torch.dtype,
    ):
        self.model, self.schedule, self.world, self.dtype = model, schedule, world, dtype
        self.num_stages, self.ranges, self.hidden_size = len(blocks), blocks, model.config.hidden_size
        self.group = world.mesh["pp"].get_group()
        # stage s is on rank s % pp_size: under the interleaved schedule a rank has stages s and s + pp_size
        modules = model.get_submodule(plan["blocks"])._modules
        self.blocks = {
            stage: [modules[str(n)] for n in numbers]
            for stage, numbers in enumerate(blocks)
            if stage % world.pp_size == world.pp_rank
        }
        self.ranks = {
            name: sorted({stage % world.pp_size for stage in where}) for name, where in stages.items()
        }
        # is there anything to train before stage s: if not, no gradient goes back over that border
        firsts = [min(stages[name]) for name in trainable]
        self.needs_gradient = [any(first < stage for first in firsts) for stage in range(self.num_stages)]
        self.first, self.last = 0 in self.blocks, self.num_stages - 1 in self.blocks
        self.made, self.running = None, None

    def run(
        self, forward: Callable, num_micro_batches: int, length: int, before_backward: Callable | None = None
    ) -> None:  # all ranks of the group
        """All micro-batches through all stages, with their backward passes if `before_backward(i)` is given.

        `forward(i, x, blocks, last)` computes this rank's `blocks` for micro-batch i from x (length, C), None
        on the first stage, and returns hidden states (length, C), or on the last stage the loss to be
        differentiated.
        """
        self.forward, self.before_backward = forward, before_backward
        # torch's stages arrange receive buffers once, from shapes; a schedule is made anew where these change
        key = num_micro_batches, length, before_backward is not None
        if key != self.made:  # gloo aborts when a message has another size than was arranged
            self.made, self.running = key, self.make_schedule(*key)
        index = torch.arange(num_micro_batches)
        args = (index,) if self.first else ()
        if before_backward is None:
            self.running.step(*args, index=index, return_outputs=False)
        else:
            self.running.step(*args, index=index, target=index, return_outputs=False)

    def make_schedule(self, num_micro_batches: int, length: int, train: bool):
        # here: it imports torch's compiler, a sixth of a start's time, which a run without a pipeline saves
        from torch.distributed import pipelining

        def hidden(stage: int) -> Tensor:
            """What enters `stage`."""
            # the first stage receives no hidden state: the schedule hands it the micro-batch's number
            if stage == 0:
                return torch.zeros(1, dtype=torch.int64)
            options = {"dtype": self.dtype, "requires_grad": train and self.needs_gradient[stage]}
            return torch.empty(length, self.hidden_size, device="meta", **options)

        stages = []
        for stage, blocks in self.blocks.items():
            last = stage == self.num_stages - 1

            # bound as defaults: a closure would see the loop's last stage
            def forward(i, x, stage=stage, blocks=blocks, last=last):
                return self.forward(i, None if stage == 0 else x, blocks, last)

            out = torch.empty((), device="meta", requires_grad=train) if last else hidden(stage + 1)
            module = _Stage(forward, lambda i: self.before_backward(i))
            shapes = {"input_args": (hidden(stage),), "output_args": (out,)}
            place = stage, self.num_stages, self.world.device
            stages.append(pipelining.PipelineStage(module, *place, **shapes, group=self.group))
        # the last stage returns its loss; it is a sum over the step's tokens already, so nothing is scaled
        options = {"loss_fn": (lambda output, _: output) if train else None, "scale_grads": False}
        if self.schedule == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, num_micro_batches, **options)
        # without a backward pass 1F1B is GPipe
        one_by_one = self.schedule == "1f1b" and train
        kind = pipelining.Schedule1F1B if one_by_one else pipelining.ScheduleGPipe
        return kind(stages[0], num_micro_batches, **options)

    def sum_shared_gradients(self, parameters: dict[str, nn.Parameter]) -> None:  # all ranks of the group
        """Of each parameter that several ranks have: the first one adds in order, so that all copies stay
        bit-equal."""
        me = self.world.pp_rank
        for name, (first, *others) in sorted(self.ranks.items()):
            if not others or me not in (first, *others) or name not in parameters:
                continue
            grad = parameters[name].grad
            grad = parallel.local(grad)
            # one rank adds in rank order and sends the sum back: an all-reduce may round differently
            if me == first:
                for rank in others:
                    received = torch.empty_like(grad)
                    dist.recv(received, group=self.group, group_src=rank)
                    grad += received
                for rank in others:
                    dist.send(grad, group=self.group, group_dst=rank)
            else:
                dist.send(grad.contiguous(), group=self.group, group_dst=first)
                dist.recv(grad, group=self.group, group_src=first)

    def from_last(self, values: Tensor) -> None:  # all ranks of the group
        """What the last stage's rank has, to all of them, in place."""
        dist.broadcast(values, group=self.group, group_src=self.world.pp_size - 1)

    def describe(self) -> str:
        return ", ".join(f"rank {s % self.world.pp_size}: {len(r)} blocks" for s, r in enumerate(self.ranges))

    def counts_here(self, name: str) -> bool:
        """Whether this rank is the one that counts the parameter where every parameter counts once."""
        return self.ranks[name][0] == self.world.pp_rank

    def whole_tensor(
        self, name: str, parameters: dict[str, nn.Parameter], like: Tensor
    ) -> Tensor | None:  # all ranks
        """A parameter of any stage, whole, on rank 0's CPU; None elsewhere. `like`: of its shape and
        dtype."""
        owner, w, full = self.ranks[name][0], self.world, None
        if w.pp_rank == owner:
            full = checkpoint.gathered(parameters[name])
        if owner and full is not None:
            dist.send(full.contiguous(), dst=0)
            return None
        if owner and w.main:
            full = torch.empty(like.shape, dtype=like.dtype)
            # ranks of a pipeline lie world.size / pp_size apart: pp is the mesh's first axis
            dist.recv(full, src=owner * w.size // w.pp_size)
        return full
