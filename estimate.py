"""What a layout costs, from shapes alone: memory of the fullest device, communication, waiting, the
hardware's limit.

    torchrun --nproc_per_node 8 train.py configs/qwen_vl/sft.json --sharding stage1 --dry_run

Activations are what autograd would keep: one forward pass on the meta device counts it. The rest is
arithmetic. tests/test_estimate.py holds it to a tenth of the measured peak for eight layouts; two
tensor-parallel ranks took 10% more than it says.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import parallel
import pipeline
import quantize
import rates
import vlm
from build import (
    StreamSizes,
    add_adapter,
    choose_trainable,
    halve,
    parameter_table,
    pipeline_blocks,
    stream_sizes,
    total_steps,
    with_prefix,
)
from config import Config
from kernels import dispatch
from kernels.linear_cross_entropy import CHUNK_BYTES

# H100 SXM (https://resources.nvidia.com/en-us-tensor-core, data sheet): dense bf16, NVLink in one direction
PEAK_FLOPS, LINK_BYTES = 989e12, 450e9


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention keeps: its inputs, its output, one number a row. Its FLOPs, and in the
    backward pass, which computes the scores once more, two and a half times as many, go to `count`."""

    @staticmethod
    def forward(ctx, count: Callable, flops: float, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *mask)
        ctx.count, ctx.flops = count, flops
        count(flops)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.count(2.5 * ctx.flops)
        q, k, v, _, _, *mask = ctx.saved_tensors
        return None, None, *(torch.empty_like(x) for x in (q, k, v)), *(None for _ in mask)


CAUSAL = 0.5  # of a segment's scores are computed
PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__}


class _Fused(TorchFunctionMode):
    """What computes on the meta device otherwise than on a real one: scaled_dot_product_attention would be
    the unfused one, with all scores, and autocast would not cast. `flops`: of attention."""

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast, self.flops, self.copies = autocast, 0.0, {}

    def __enter__(self):
        # put into its place: a mode is not seen by what a backward pass computes anew, in its own thread
        self.plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self.attention
        dispatch.pretended = self.autocast
        return super().__enter__()

    def __exit__(self, *error):
        F.scaled_dot_product_attention, dispatch.pretended = self.plain, None
        return super().__exit__(*error)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal=False) -> Tensor:
        flops = 4 * q.numel() * k.shape[-2] * (CAUSAL if is_causal else 1.0)
        return _FusedAttention.apply(self.count, flops, q, k, v, *(() if attn_mask is None else (attn_mask,)))

    def count(self, flops: float) -> None:
        self.flops += flops

    def cast(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(self.autocast)
        if x not in self.copies:  # autocast too makes one copy of a weight
            self.copies[x] = x.to(self.autocast)
        return self.copies[x]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and function in PRODUCTS:
            args, kwargs = tree_map(self.cast, (args, kwargs))
        return function(*args, **kwargs)


def product_flops():
    """Counts matrix products and convolutions, also those in place, which torch's counter leaves out."""
    from torch.utils.flop_counter import FlopCounterMode  # which a training run needs not

    def in_place(into, a, b, out_shape=None, **options) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def step_flops(model: nn.Module, stream: "Stream", layout: "Layout") -> float:
    """FLOPs of a micro-batch's forward and backward pass, of one on the meta device: what is frozen has no
    gradient, what is recomputed runs twice, and causal attention computes half of the scores."""
    model = copy.deepcopy(model).train()
    if layout.recompute:
        parallel.recompute(model)
    batch = meta_batch(stream, model)
    rows = {"device": "meta", "dtype": torch.int64}
    batch.targets = torch.empty(stream.tokens, **rows)
    batch.supervised = torch.empty(stream.supervised, **rows)
    with product_flops() as products, _Fused() as attention:
        loss, _ = model(batch)
        if loss.requires_grad:
            loss.sum().backward()
    return products.get_total_flops() + attention.flops


def saved_bytes(
    model: nn.Module, forward: Callable, received: Tensor | None, layout: "Layout"
) -> tuple[float, float]:
    """Bytes that `forward()` of a model on the meta device leaves for its backward pass, weights and
    `received` apart; bytes of the block that leaves most.

    With recompute a block leaves its input, and one block at a time what it keeps itself.
    """
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    if received is not None:
        known.add(received.untyped_storage()._cdata)
    alive, bytes_of, inputs, inside = [], {None: 0}, {}, [None]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)  # so that no other storage gets its address
            bytes_of[inside[-1]] = bytes_of.get(inside[-1], 0) + storage.nbytes()
        return tensor

    hooks = []
    for block in [*model.vision_blocks, *model.blocks]:

        def enter(block, args):
            inside.append(block)
            inputs[block] = args[0].numel() * args[0].element_size()

        hooks += [
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(lambda *_: inside.pop() and None),
        ]
    autocast = _Fused(torch.bfloat16 if layout.autocast else None)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    outside, largest = bytes_of.pop(None), max(bytes_of.values(), default=0)
    if not layout.recompute or not bytes_of:
        return outside + sum(bytes_of.values()), largest
    return outside + sum(inputs[block] for block, kept in bytes_of.items() if kept) + largest, largest


@dataclass
class Stream:
    """A micro-batch: tokens, supervised tokens, images; lengths of its samples."""

    tokens: int
    supervised: int
    images: int
    lengths: list[int]


def meta_batch(stream: Stream, model: nn.Module) -> vlm.Batch:
    T, Q, meta = stream.tokens, model.num_image_tokens, {"device": "meta", "dtype": torch.int64}
    return vlm.Batch(
        input_ids=torch.empty(T, **meta),
        position_ids=torch.empty((T,) if model.position_axes == 1 else (model.position_axes, T), **meta),
        cu_seqlens=torch.tensor([0, *stream.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_len=max(stream.lengths),
        pixel_values=torch.empty(stream.images, 3, *model.image_size, device="meta")
        if stream.images
        else None,
        image_positions=torch.empty(stream.images, Q, **meta),
        prefix_lens=torch.tensor([n // 2 for n in stream.lengths]) if model.prefill == "whole" else None,
        dropout_keys=torch.empty(T, **meta),
        image_dropout_keys=torch.empty(stream.images, **meta),
    )


@dataclass
class Device:
    """Bytes at the moment when the most is in use, by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class Layout:
    """What train.py's configuration means for memory."""

    pp: int
    dp: int
    shard: int
    tp: int
    sharding: str | None
    schedule: str
    micro_batches: int
    recompute: bool
    compute_bytes: int  # of a number in forward and backward: 4, or 2 in 16 bits
    master: bool  # fp32 copies beside 16-bit weights (O2)
    autocast: bool  # O1

    @property
    def fsdp(self) -> bool:
        return self.dp > 1


def gathered_bytes(groups: list[float], layout: Layout) -> float:
    """Weights that are whole at a time, of sharded ones; the last group is the root's."""
    if layout.sharding != "stage3":
        return sum(groups)
    return sum(sorted(groups[:-1], reverse=True)[:2]) + groups[-1]  # this block's, the next one's, the root's


def loss_bytes(head: dict | None, layout: Layout) -> float:
    """Of the vocabulary projection with its loss, which keeps a chunk of the logits at a time."""
    if not head:
        return 0.0
    rows, V, C = head["rows"], head["vocabulary"], head["width"]
    return 2 * min(CHUNK_BYTES, 4 * rows * V) + 3 * rows * C * layout.compute_bytes + head["gradient"]


def alive_micro_batches(layout: Layout, stages: list[int]) -> float:
    """Micro-batches whose activations are kept at a time, on the rank that has `stages`."""
    L, n, rank = layout, layout.micro_batches, stages[0]
    if L.pp == 1:
        return 1
    if L.schedule == "gpipe":
        return n
    if L.schedule == "1f1b":
        return min(n, L.pp - rank)
    # in stages: warm-up of the interleaved schedule and the one at work
    chunks = len(stages)
    return min(n * chunks, 2 * (L.pp - rank - 1) + (chunks - 1) * L.pp + 1) / chunks


def size(parameters, trainable: bool | None = None, width: int | None = None) -> float:
    """Bytes of those that train (True), that are frozen (False) or of all, each number of `width` bytes."""
    chosen = [p for p in parameters if trainable is None or p.requires_grad == trainable]
    return sum(p.numel() * (width or p.element_size()) for p in chosen)


def groups_of(model: nn.Module, modules: list[nn.Module]) -> list[list[nn.Parameter]]:
    """Parameters of each module, and at the end those of none."""
    groups = [[*module.parameters()] for module in modules]
    grouped = {id(p) for group in groups for p in group}
    return [*groups, [p for p in model.parameters() if id(p) not in grouped]]


def stage_memory(
    model: nn.Module,
    stages: list[int],
    num_stages: int,
    hidden: float,
    kept: float,
    block: float,
    head: dict | None,
    layout: Layout,
) -> Device:
    """Of the rank that has `stages`. `hidden`: bytes of hidden states (T, C); `kept` and `block`: saved_bytes
    of one micro-batch over all its stages; `head`: rows, vocabulary and width of the projection if it is
    here."""
    L = layout
    alone = parallel.tables(model) if L.fsdp else []
    groups = groups_of(model, [*alone, *model.vision_blocks, *model.blocks])
    everything = [*model.parameters()]
    trained, frozen = size(everything, True), size(everything, False)
    few = [*quantize.weights_of(model).values()]  # whole on each rank, expanded one at a time
    expanded = max((weight.shape.numel() * L.compute_bytes for weight in few), default=0)
    largest = max((p.numel() * 4 for p in everything if p.requires_grad), default=0)
    optimiser, shards = 2 * trained / L.shard, L.shard
    weights, communication = (trained + frozen) / shards + size(b for w in few for b in w.buffers()), 0.0
    trained_group = max((size(g, True) for g in groups), default=0)
    gathered = 0.0
    if L.fsdp:
        width = L.compute_bytes if L.master else None
        gathered = gathered_bytes([size(g, None, width) for g in groups], L)
        # an all-gather's result before it is dealt out
        communication += max((size(g, None, width) for g in groups), default=0)
    elif L.master:  # 16-bit copies of what trains; a block that is recomputed makes its own anew
        *blocks, root = (size(g, True, L.compute_bytes) for g in groups)
        gathered = root + (max(blocks, default=0) if L.recompute else sum(blocks))
    n, alive = L.micro_batches, alive_micro_batches(L, stages)
    activations = alive * kept
    if L.pp > 1:
        # the schedule has a buffer for each message of a step, and keeps outputs until their backward
        received = sum((s > 0) + (s < num_stages - 1) for s in stages)
        communication += n * hidden * received
        activations += alive * hidden * sum(s < num_stages - 1 for s in stages)
    # gradients while activations are there, and when all are made
    reduced = L.sharding in ("stage2", "stage3")
    accumulated = 0.0
    if n > 1:
        accumulated = trained / shards if reduced else trained * (L.compute_bytes / 4 if L.master else 1)
    base = {"weights": weights + gathered, "optimiser": optimiser}
    forward = Device(
        {
            **base,
            "gradients": accumulated,
            "activations": activations,
            "loss": max(loss_bytes(head, L), expanded),
            "communication": communication,
        }
    )
    # the first block's backward pass: all other gradients are made
    backward = Device(
        {
            **base,
            "gradients": (trained / shards if L.fsdp and reduced else trained) + (largest if n > 1 else 0),
            "activations": block + expanded,
            "loss": 0.0,
            "communication": communication + (trained_group * (1 + 1 / shards) if L.fsdp else 0.0),
        }
    )
    step = Device(
        {
            "weights": weights,
            "optimiser": optimiser,
            "gradients": trained / shards,
            "activations": 0.0,
            "loss": 2 * largest / shards,
            "communication": communication,
        }
    )
    return max(forward, backward, step, key=lambda device: device.total)


def heaviest_stream(plan, batch_size: int, steps: int = 10_000) -> Stream:
    """The micro-batch with most tokens among the first ones of a run."""
    index, heaviest = plan.index, None
    units = plan.units(0)[: steps * batch_size]
    for start in range(0, len(units), batch_size):
        numbers = [int(n) for unit in units[start : start + batch_size] for n in unit]
        tokens = int(index.length[numbers].sum())
        if heaviest is None or tokens > heaviest[0]:
            heaviest = tokens, numbers
    tokens, numbers = heaviest
    supervised, images = int(index.num_supervised[numbers].sum()), int(index.num_images[numbers].sum())
    return Stream(tokens, supervised, images, index.length[numbers].tolist())


def streams(plan, cfg: Config) -> tuple[StreamSizes, Stream, Stream]:
    """Means of a micro-batch, the one with most tokens, and samples of lengths as they come for FLOPs, which
    go by the squares of lengths too."""
    if plan is None:  # no tokenizer, so no data: full samples with one image each
        T, n = cfg.max_length, cfg.per_device_train_batch_size
        full = Stream(T * n, int(0.3 * T * n), n, [T] * n)
        return StreamSizes(T * n, 0.3 * T * n, float(n), T), full, full
    sizes, index = stream_sizes(plan, cfg), plan.index
    places = np.linspace(0, len(index) - 1, min(64, len(index))).round().astype(int)
    lengths = np.sort(index.length)[places].tolist()
    share = sum(lengths) / sizes.tokens
    typical = Stream(sum(lengths), round(share * sizes.supervised), round(share * sizes.images), lengths)
    return sizes, heaviest_stream(plan, cfg.per_device_train_batch_size), typical


def devices(
    model: nn.Module, definition, blocks: list[range], stream: Stream, layout: Layout, dtype
) -> list[Device]:
    """Memory of each pipeline rank; `model` is on the meta device, with requires_grad as in training."""
    L, config, found = layout, model.config, []
    hidden = stream.tokens * config.hidden_size * L.compute_bytes
    for rank in range(L.pp):
        part, stages = copy.deepcopy(model), [s for s in range(len(blocks)) if s % L.pp == rank]
        if L.pp > 1:
            held = pipeline.stages_of_parameters(part, definition.pipeline, blocks)
            trained = {name for name, p in part.named_parameters() if p.requires_grad}
            first_trained = min(min(held[name]) for name in trained)
            pipeline.keep_parameters(part, {name for name, where in held.items() if where & {*stages}})
        world = parallel.World(0, L.pp * L.dp * L.tp, torch.device("cpu"), tp_size=L.tp)
        parallel.tensor_parallel(part, definition.tp_plan(config, L.tp), world)
        last = len(blocks) - 1
        head = None
        if last in stages:
            V, C = config.vocab_size // L.tp, config.hidden_size
            trains = any(p.requires_grad and p.shape == (V, C) for p in part.parameters())
            head = {"rows": stream.supervised, "vocabulary": V, "width": C, "gradient": 4 * V * C * trains}
        computed = copy.deepcopy(part).train()
        if not L.autocast:  # which casts on the way
            computed.to(dtype)
        kept, block_bytes = 0.0, 0.0
        for stage in stages:
            x = None
            if stage:
                options = {"dtype": dtype, "device": "meta", "requires_grad": first_trained < stage}
                x = torch.empty(stream.tokens, config.hidden_size, **options)
            own = [block for n, block in numbered(computed, definition, L.pp) if n in blocks[stage]]
            left, largest = activation_bytes(computed, stream, x, own, L)
            kept, block_bytes = kept + left, max(block_bytes, largest)
        found.append(stage_memory(part, stages, len(blocks), hidden, kept, block_bytes, head, L))
    return found


def numbered(model: nn.Module, definition, pp: int) -> list[tuple[int, nn.Module]]:
    if pp == 1:
        return [*enumerate(model.blocks)]
    return [
        (int(n), block) for n, block in model.get_submodule(definition.pipeline["blocks"])._modules.items()
    ]


def activation_bytes(
    model: nn.Module, stream: Stream, x: Tensor | None, blocks: list, layout: Layout
) -> tuple[float, float]:
    """saved_bytes of one micro-batch through `blocks`."""
    config = model.config
    if model.pipeline_obstacle:  # its passes depend on the data: by a formula
        inner = 11 * config.hidden_size + 4 * config.mlp_width
        N = config.num_hidden_layers
        layers = config.hidden_size * N + inner if layout.recompute else inner * N
        width = stream.tokens * next(model.parameters()).element_size()
        return width * layers, width * inner
    batch = meta_batch(stream, model)

    def forward() -> Tensor:
        return model(batch, "hidden", x, blocks)

    return saved_bytes(model, forward, x, layout)


def communication(model: nn.Module, tokens: float, layout: Layout) -> dict[str, float]:
    """Bytes that a device sends in a step by axis, as messages' sizes: gathers count the result."""
    L = layout
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / (L.pp * L.tp)
    everything = sum(p.numel() for p in model.parameters()) / (L.pp * L.tp)
    n, width, hidden = L.micro_batches, L.compute_bytes, tokens * model.config.hidden_size * L.compute_bytes
    volumes = {"data parallel": 0.0, "tensor parallel": 0.0, "pipeline": 0.0}
    if L.dp > 1:
        gathers = 2 * n if L.sharding == "stage3" else 1
        reductions = n if L.sharding in ("stage2", "stage3") else 1
        volumes["data parallel"] = everything * width * gathers * (L.shard > 1) + trained * 4 * reductions
        if L.dp > L.shard:  # and an all-reduce of the shards over the replicas
            volumes["data parallel"] += trained * 4 * reductions / L.shard
    if L.tp > 1:  # two all-reduces a layer forward, two backward
        volumes["tensor parallel"] = n * hidden * len(model.blocks) / L.pp * (6 if L.recompute else 4)
    if L.pp > 1:
        volumes["pipeline"] = 2 * n * hidden * (2 if L.schedule == "interleaved" else 1)
    return volumes


def layout_of(cfg: Config, world_size: int) -> Layout:
    pp, replicas, shard, tp = parallel.layout(
        world_size,
        cfg.tensor_parallel_degree,
        cfg.pipeline_parallel_degree,
        cfg.sharding,
        cfg.sharding_parallel_degree,
    )
    sixteen = cfg.bf16 or cfg.fp16
    o2 = sixteen and cfg.fp16_opt_level == "O2"
    return Layout(
        pp=pp,
        dp=replicas * shard,
        shard=shard,
        tp=tp,
        sharding=cfg.sharding,
        schedule=cfg.pipeline_schedule,
        micro_batches=cfg.gradient_accumulation_steps,
        recompute=cfg.recompute,
        compute_bytes=2 if sixteen else 4,
        master=o2,
        autocast=sixteen and not o2,
    )


def dry_run(cfg: Config, config: dict, definition, plan, world_size: int) -> str:
    """Memory per device, disk, steps and FLOPs, from shapes alone."""
    model = definition.network(with_prefix(config, definition, cfg))
    if cfg.lora:
        add_adapter(model, definition, cfg)
    choose_trainable(model, definition, cfg)
    layout = layout_of(cfg, world_size)
    sizes, heaviest, typical = streams(plan, cfg)
    forward = definition.forward_flops(
        model.config, sizes.tokens, sizes.supervised, sizes.images, sizes.segment
    )
    flops = 3 * sum(forward.values()) if not cfg.lora else 2 * sum(forward.values()) + forward["head"]
    if not model.pipeline_obstacle:  # else its passes depend on the data
        flops = step_flops(model, typical, layout) * sizes.tokens / typical.tokens
    halve(model, cfg, {})
    if cfg.quantize:
        quantize.prepare(model, cfg.quantize)
    pp, dp, tp, micro_batches = layout.pp, layout.dp, layout.tp, layout.micro_batches
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    o2 = layout.master
    blocks = pipeline_blocks(model, definition, cfg, sizes) if pp > 1 else [range(len(model.blocks))]
    found = devices(model, definition, blocks, heaviest, layout, torch.bfloat16 if o2 else torch.float32)
    fullest = max(found, key=lambda device: device.total)
    micro = micro_batches * dp
    shares = ", ".join(f"{part} {value / sum(forward.values()):.0%}" for part, value in forward.items())
    where = f" (pipeline rank {found.index(fullest)} of {pp})" if pp > 1 else ""
    lines = [
        parameter_table(model, definition.parts),
        *filter(None, [rates.table(model, rates.rates(model, definition, cfg), cfg)]),
        "",
        f"fullest device{where}, {world_size} processes: pp {pp} x dp {dp} x tp "
        f"{tp}, {cfg.sharding or 'no sharding'}:",
    ]
    memory = {**fullest.parts, "sum": fullest.total}
    lines += [f"  {name:<14}{value / 2**30:>10.3f} GiB" for name, value in memory.items()]
    disk = (total if not cfg.lora else trainable) * (2 if o2 and not cfg.lora else 4) + trainable * 12
    lines.append(f"disk: {disk / 2**30:.2f} GiB a checkpoint, {cfg.save_total_limit or 'all'} of them kept")
    lines.append(
        f"tokens per step: {sizes.tokens * micro:,.0f} ({sizes.supervised / sizes.tokens:.0%} supervised, "
        f"{sizes.images * micro:,.0f} images)"
    )
    lines.append(f"FLOPs per step: {flops * micro:.3e} (forward: {shares})")
    volumes = communication(model, sizes.tokens, layout)
    lines += [
        f"communication a step and device, {axis}: {v / 2**30:.3f} GiB" for axis, v in volumes.items() if v
    ]
    bubble = pipeline.bubble_share(pp, cfg.pipeline_schedule, micro_batches)
    if pp > 1:
        lines.append(
            f"pipeline bubble: {bubble:.1%} of a step; blocks: {', '.join(str(len(r)) for r in blocks)}"
        )
    seconds = flops * micro / world_size / (1 - bubble) / PEAK_FLOPS
    link = sum(volumes.values()) / LINK_BYTES
    bound = "computation" if seconds >= link else "communication"
    lines.append(
        f"hardware limit: {sizes.tokens * micro / max(seconds, link):,.0f} tokens/s on {world_size} x H100 "
        f"({PEAK_FLOPS / 1e12:.0f} TFLOP/s dense bf16, {LINK_BYTES / 1e9:.0f} GB/s), by {bound}"
    )
    if plan is not None:
        global_batch = cfg.per_device_train_batch_size * micro
        lines.append(f"steps: {total_steps(cfg, plan, global_batch):,}")
    return "\n".join(lines)
