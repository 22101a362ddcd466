"""Layouts of a training on many GPUs, the fastest first: simulated, since nobody can try them all.

    python estimate.py plan --model qwen-vl-7b --gpus 8..1024 --samples 2048 configs/qwen_vl/lora.json

A roofline: a step takes its products at the card's peak, or reads its weights three times a micro-batch; it
waits for tensor parallelism's sums and the pipeline's bubble. Other messages hide behind products while they
are shorter: in stages 2 and 3 than a step, else than a micro-batch. In a ring of g ranks a gather or a
reduction of M bytes sends M (g - 1) / g from each, an all-reduce twice that. The update reads weight, moments
and gradient, and writes all but the last. Kernels reach about half of all this: it only ranks.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import estimate
import pipeline
import terminal
import vlm
from build import pipeline_blocks
from config import Config, parse_config
from parallel import STAGES

# H100 SXM (data sheet), eight on a machine, each with a network port of 400 Gb/s; bytes in one direction
CARD = {
    "memory": (72.0, "GiB that tensors may fill: of 80, what libraries and gaps leave"),
    "peak_tflops": (989.0, "of products in 16 bits"),
    "memory_bandwidth": (3350.0, "GB/s"),
    "node_bandwidth": (450.0, "GB/s from a GPU to others of its machine"),
    "network_bandwidth": (50.0, "GB/s from a GPU to other machines"),
    "gpus_per_node": (8, "on one machine"),
}
KEYS = "tensor_parallel_degree pipeline_parallel_degree sharding sharding_parallel_degree"
KEYS = f"{KEYS} per_device_train_batch_size gradient_accumulation_steps recompute".split()
HEAD = "     tokens/s replicas    sharding  tp  pp size accum. recompute     GiB  bubble  GB sent  seconds"


@dataclass
class Candidate:
    cfg: Config
    layout: estimate.Layout
    blocks: list[range]
    sent: float = 0.0  # bytes a step and GPU
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by what they are for
    memory: float = 0.0

    def line(self, tokens: float) -> str:
        L, size, total = self.layout, self.cfg.per_device_train_batch_size, sum(self.seconds.values())
        n, sharding, again = L.micro_batches, f"{L.sharding or '-'} {L.shard}", "yes" if L.recompute else "no"
        parts = ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items() if s >= 0.005)
        return (
            f"{tokens / total:>13,.0f}{L.dp // L.shard:>9}{sharding:>12}{L.tp:>4}{L.pp:>4}"
            f"{size:>5}{n:>7}{again:>10}{self.memory / 2**30:>8.3g}"
            f"{pipeline.bubble_share(L.pp, L.schedule, n):>8.1%}{self.sent / 1e9:>9.2f}  {parts}"
        )


def layouts(cfg: Config, gpus: int, samples: int, per_node: int) -> Iterator[Config]:
    """Configurations of `gpus` ranks that take `samples` samples a step."""
    degrees = range(1, 2 if cfg.quantize else per_node + 1)  # few bits are not cut
    for tp, pp in itertools.product(degrees, (1, 2, 4, 8)):
        dp, rest = divmod(gpus, tp * pp)
        within = sorted(d for d in {dp, per_node // tp} if d > 1 and dp % d == 0)  # all, or one machine's
        shardings = [(None, None), *itertools.product(STAGES, within)]
        for sharding, size, again in itertools.product(shardings, (1, 2, 4), (False, True)):
            n, left = (0, 1) if rest else divmod(samples, dp * size)
            if not left and n >= pp:  # else they would not fill the pipeline
                yield replace(cfg, **dict(zip(KEYS, (tp, pp, *sharding, size, n, again), strict=True)))


class Planner:
    """A model's shapes, and what has been counted of them. `card`: of CARD."""

    def __init__(self, cfg: Config, config: dict, card):
        self.card, self.definition, self.parts = card, vlm.find(config), {}
        if len(self.definition.network(config).LOSSES) > 1:
            raise ValueError(f"--model {cfg.model_name_or_path}: expected one that is trained for one loss")
        self.model = estimate.network(cfg, config, self.definition)
        alone = list(layouts(cfg, 1, 1, 1))  # one sample, without recomputation and with it
        one = estimate.streams(None, alone[0])[1]
        self.flops = [estimate.step_flops(self.model, one, estimate.layout_of(c, 1)) for c in alone]
        self.inputs = estimate.block_inputs(self.model, one)
        self.dtype = estimate.in_few_bits(self.model, cfg)

    def part(self, c: Candidate, rank: int):
        if (key := (c.layout.tp, rank, str(c.blocks))) not in self.parts:
            self.parts[key] = estimate.of_rank(self.model, self.definition, c.blocks, rank, c.layout)
        return self.parts[key]

    def candidate(self, cfg: Config, gpus: int) -> Candidate:
        """Its step by the roofline, on the first pipeline rank, which has the tower too. ValueError for a
        layout that the model does not take."""
        L, card, (sizes, stream, _) = estimate.layout_of(cfg, gpus), self.card, estimate.streams(None, cfg)
        found = Candidate(cfg, L, [range(len(self.model.blocks))])
        if L.pp > 1:
            found.blocks = pipeline_blocks(self.model, self.definition, cfg, sizes)
        mine, part = self.part(found, 0)
        n, size, memory = L.micro_batches, cfg.per_device_train_batch_size, card.memory_bandwidth * 1e9
        inputs = {name: (numel * size, back) for name, (numel, back) in self.inputs.items()}
        took = {"tensor parallel": 0.0, "data parallel": 0.0, "pipeline": 0.0}
        for (axis, kind), (_, total) in estimate.collectives(mine, part, inputs, stream, L).items():
            # ranks stand as in parallel.AXES, tp closest: `span` is from a group's first to its last
            copies = axis == "data parallel" and kind == "all-reduce"
            ranks = {"tensor parallel": L.tp, "pipeline": 2}.get(axis, L.dp // L.shard if copies else L.shard)
            span = {"tensor parallel": L.tp, "pipeline": gpus}.get(axis, L.tp * (L.dp if copies else L.shard))
            share = (ranks - 1) / ranks
            sent = total * {"send": 1, "all-reduce": 2 * share}.get(kind, share)
            speed = card.node_bandwidth if span <= card.gpus_per_node else card.network_bandwidth
            found.sent, took[axis] = found.sent + sent, took[axis] + sent / (1e9 * speed)
        weights = estimate.size(part.parameters, None, L.compute_bytes if L.master else None)
        products = n * size * self.flops[L.recompute] / (L.tp * L.pp) / (card.peak_tflops * 1e12)
        work, bubble = max(products, 3 * n * weights / memory), pipeline.bubble_share(L.pp, L.schedule, n)
        hides = work if L.sharding in ("stage2", "stage3") else work / n
        found.seconds = {
            "products" if work == products else "reading weights": work,
            "tensor parallel": took["tensor parallel"],
            "bubble": (work + took["tensor parallel"]) * bubble / (1 - bubble),
            "data parallel": max(0.0, took["data parallel"] - hides),
            "pipeline": max(0.0, took["pipeline"] - work),
            "update": 7 * estimate.size(part.parameters, True) / L.shard / memory,
        }
        return found

    def fits(self, c: Candidate) -> bool:
        L, room, stream = c.layout, self.card.memory * 2**30, estimate.streams(None, c.cfg)[1]
        hidden = stream.tokens * self.model.config.hidden_size * L.hidden_bytes
        # of pipeline ranks with as many blocks the earlier one keeps more micro-batches
        ranks = {str([len(b) for b in c.blocks[r :: L.pp]]): r for r in range(L.pp - 2, 0, -1)}
        for rank in {0, L.pp - 1, *ranks.values()}:
            mine, part = self.part(c, rank)
            if (
                sum(estimate.stage_memory(mine, part, hidden, (0, 0), L).values()) > room
            ):  # before any activation
                return False
            peak = estimate.passes(mine, self.definition, part, stream, L, self.dtype)
            c.memory = max(c.memory, sum(estimate.stage_memory(mine, part, hidden, peak, L).values()))
        return c.memory <= room

    def fastest(self, cfg: Config, gpus: int, samples: int, top: int) -> list[Candidate]:
        """The `top` fastest layouts that fit. ValueError where there is none."""
        found = []
        for settings in layouts(cfg, gpus, samples, self.card.gpus_per_node):
            with contextlib.suppress(ValueError):
                found.append(self.candidate(settings, gpus))
        found.sort(key=lambda c: sum(c.seconds.values()))
        if not found:
            raise ValueError(
                f"--gpus {gpus}: no layout deals --samples {samples} evenly; use a multiple of {gpus}"
            )
        if fitting := list(itertools.islice(filter(self.fits, found), top)):
            return fitting
        room = f"--memory {self.card.memory:g} GiB"
        raise ValueError(f"--gpus {gpus}: no layout fits into {room}; use more GPUs, or --lora")


def main(argv: list[str]) -> int:
    parser = terminal.Parser(prog="estimate.py plan", epilog="and a CONFIG.json, any of train.py's keys")
    parser.add_argument("--model", required=True, help="one of configs/shapes, such as qwen-vl-7b")
    parser.add_argument("--gpus", required=True, help="64, or 8..1024 for all doublings")
    parser.add_argument("--samples", type=int, default=1024, help="of max_length tokens, a step on all GPUs")
    parser.add_argument("--top", type=int, default=3, help="layouts to print")
    for name, (value, text) in CARD.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    args, rest = parser.parse_known_args(argv)
    for name in ("samples", "top", *CARD):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name):g}: expected a number above 0")
    match = re.fullmatch(r"([1-9]\d{0,6})(?:\.\.([1-9]\d{0,6}))?", args.gpus)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise ValueError(f"--gpus {args.gpus}: expected a number such as 64, or 8..1024 for all doublings")
    if (values := vlm.shape(args.model)) is None:
        raise ValueError(f"--model {args.model}: expected a name in configs/shapes, such as qwen-vl-7b")
    if not any(word.endswith(".json") for word in rest):
        rest = [f"configs/{vlm.kind_of(values)}/{'lora' if '--lora' in rest else 'sft'}.json", *rest]
    cfg = parse_config([*rest, "--model_name_or_path", args.model])
    planner = Planner(cfg, values, args)
    print(f"{args.samples} samples of {cfg.max_length} tokens a step", end="")
    print(*(f", {name} {getattr(args, name):g}" for name in CARD), sep="")
    for gpus in (first << i for i in range(24) if first << i <= last):
        print(f"\n{gpus} GPUs\n{HEAD}", flush=True)
        try:
            for found in planner.fastest(cfg, gpus, args.samples, args.top):
                print(found.line(args.samples * cfg.max_length), flush=True)
        except ValueError as e:
            if first == last:
                raise
            print(e)
    return 0
