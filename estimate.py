"""What a layout costs, from shapes alone: memory of the fullest device, communication, waiting, the
hardware's limit.

    torchrun --nproc_per_node 8 train.py configs/qwen_vl/sft.json --sharding stage1 --dry_run
    python estimate.py plan --model qwen-vl-7b --gpus 64  # the best layouts (plan.py)

A step's forward and backward pass run on the meta device, where tensors have shapes and no memory, and what
is alive at a time is added up; weights, optimiser and messages are arithmetic. tests/test_estimate.py holds
it to a tenth of the peak of live tensors in 42 layouts. What is no tensor (a library's own buffers, NCCL's,
the allocator's gaps) is not counted.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import collections
import contextlib
import copy
import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import parallel
import pipeline
import quantize
import rates
import terminal
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


class _Fused:
    """Inside, scaled_dot_product_attention on the meta device is a fused one, not the one that has all
    scores. `flops`: of attention."""

    flops = 0.0

    def __enter__(self):
        # put into its place: a mode is not seen by what a backward pass computes anew
        self.plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self.attention
        return self

    def __exit__(self, *error):
        F.scaled_dot_product_attention = self.plain

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal=False) -> Tensor:
        flops = 4 * q.numel() * k.shape[-2] * (CAUSAL if is_causal else 1.0)
        return _FusedAttention.apply(self.count, flops, q, k, v, *(() if attn_mask is None else (attn_mask,)))

    def count(self, flops: float) -> None:
        self.flops += flops


class _Autocast(TorchFunctionMode):
    """What torch's autocast, which knows not the meta device, does to products."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.copies, self.depth = dtype, {}, 0

    def __enter__(self):
        self.depth, dispatch.pretended = self.depth + 1, self.dtype
        return super().__enter__()

    def __exit__(self, *error):
        self.depth -= 1
        if not self.depth:  # autocast too keeps its copies of weights until it ends
            self.copies.clear()
            dispatch.pretended = None
        return super().__exit__(*error)

    def cast(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (isinstance(x, nn.Parameter) and x.requires_grad):
            return x.to(self.dtype)
        if x not in self.copies:  # one of a weight that trains
            self.copies[x] = x.to(self.dtype)
        return self.copies[x]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in PRODUCTS:
            args, kwargs = tree_map(self.cast, (args, kwargs))
        return function(*args, **kwargs)

    def around(self, module: nn.Module) -> None:
        """Also when the module is recomputed, in the backward pass."""
        inner = module.forward

        def forward(*args):
            with self:
                return inner(*args)

        module.forward = forward


@contextlib.contextmanager
def data_ranks(count: int):
    """Inside, what ranks contrast with each other is as large as with so many of them."""
    plain = parallel.from_data_ranks, parallel.gather_rows
    parallel.from_data_ranks = lambda numbers, device: [numbers] * count
    parallel.gather_rows = lambda x, counts, differentiable=False: (torch.cat([+x for _ in counts]), 0)
    try:
        yield
    finally:
        parallel.from_data_ranks, parallel.gather_rows = plain


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
    with product_flops() as products, _Fused() as attention:
        loss, _ = model(meta_batch(stream, model))
        if loss.requires_grad:
            loss.sum().backward()
    return products.get_total_flops() + attention.flops


class _Live(TorchDispatchMode):
    """Bytes of what operations made inside and nobody has freed: `now`, and `peak` with the gradients in
    it. Weights are not counted, gradients as `layout` keeps them."""

    def __init__(self, model: nn.Module, layout: "Layout"):
        super().__init__()
        self.now, self.peak, self.gradients, self.peak_gradients = 0, 0, 0, 0
        self.known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self.layout, self.reduced, self.in_flight, self.last = layout, {}, None, True
        modules = [*parallel.tables(model), *model.vision_blocks, *model.blocks]
        self.groups = [[p for p in g if p.requires_grad] for g in groups_of(model, modules)]
        for group in self.groups:
            for p in group:
                p.register_post_accumulate_grad_hook(lambda p, group=group: self.made(p, group))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.hold(x)
        return out

    def ignore(self, x: Tensor) -> Tensor:
        self.known.add(x.untyped_storage()._cdata)
        return x

    def hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients
        weakref.finalize(storage, self.free, place, size)

    def free(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size

    def made(self, p: nn.Parameter, group: list[nn.Parameter]) -> None:
        """A gradient is there: without fully_shard it stays. With it, a group's gradients, once all are
        there, are copied into one fp32 message, of which this rank's share stays."""
        if self.layout.fsdp and all(q.grad is not None for q in group):
            self.reduce(group)
        kept = [q.grad for group in self.groups for q in group if q.grad is not None]
        self.gradients = sum(x.untyped_storage().nbytes() for x in [*kept, *self.reduced.values()])

    def reduce(self, group: list[nn.Parameter]) -> None:
        numbers = {"dtype": torch.float32, "device": "meta"}
        if self.last or self.layout.sharding in ("stage2", "stage3"):
            count = sum(p.numel() for p in group)
            # the message before it has been sent by now, this one stays until the next
            self.in_flight = None
            self.in_flight = torch.empty(count, **numbers)
            part = torch.empty(-(-count // self.layout.shard), **numbers)
            self.reduced.setdefault(id(group), part)
            for p in group:
                p.grad = None
        elif group[0].dtype != torch.float32:  # the sum of several micro-batches is kept in fp32
            for p in group:
                self.reduced.setdefault(id(p), torch.empty(p.shape, **numbers))
                p.grad = None


@dataclass
class Stream:
    """A micro-batch: tokens, supervised tokens, images; lengths of its samples."""

    tokens: int
    supervised: int
    images: int
    lengths: list[int]


def meta_batch(stream: Stream, model: nn.Module) -> vlm.Batch:
    T, Q, meta = stream.tokens, model.num_image_tokens, {"device": "meta", "dtype": torch.int64}
    pixels = torch.empty(stream.images, 3, *model.image_size, device="meta") if stream.images else None
    batch = vlm.Batch(
        input_ids=torch.empty(T, **meta),
        position_ids=torch.empty((T,) if model.position_axes == 1 else (model.position_axes, T), **meta),
        cu_seqlens=torch.tensor([0, *stream.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        targets=torch.empty(T, **meta),
        supervised=torch.empty(stream.supervised, **meta),
        pixel_values=pixels,
        image_positions=torch.empty(stream.images, Q, **meta),
        prefix_lens=torch.tensor([n // 2 for n in stream.lengths]) if model.prefill == "whole" else None,
        dropout_keys=torch.empty(T, **meta),
        image_dropout_keys=torch.empty(stream.images, **meta),
    )
    if model.encoder_decoder:  # on the host its tokens say where a segment's decoder begins
        start, ends = model.language_model.start, batch.cu_seqlens[1:].tolist()
        ids, share = torch.full((T,), start + 1), stream.supervised / T
        learned = [max(1, round(share * n)) for n in stream.lengths]
        rows = [torch.arange(end - n, end) for end, n in zip(ends, learned, strict=True)]
        ids[[int(r[0]) for r in rows]] = start
        rows = torch.cat(rows)
        batch.supervised = torch.empty(len(rows), **meta)
        batch.on_host = replace(batch, input_ids=ids, supervised=rows)
    return batch


Memory = dict[str, float]  # bytes at the moment when the most is in use, by what they are for


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
    autocast: torch.dtype | None  # O1's

    @property
    def hidden_bytes(self) -> int:
        """Of a number of the hidden states between blocks."""
        return 4 if self.autocast else self.compute_bytes

    @property
    def fsdp(self) -> bool:
        return self.dp > 1


def gathered_bytes(groups: list[float], layout: Layout) -> float:
    """Weights that are whole at a time, of sharded ones; the last group is the root's."""
    if layout.sharding != "stage3":
        return sum(groups)
    return sum(sorted(groups[:-1], reverse=True)[:2]) + groups[-1]  # this block's, the next one's, the root's


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


@dataclass
class Part:
    """Of the model, what a pipeline rank has."""

    stages: list[int]
    blocks: list[range]  # of all stages
    first_trained: int  # the first stage with something to train: no gradient goes back beyond it
    groups: list = field(default_factory=list)  # (name, module, parameters) as parallel.shard groups them

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for *_, group in self.groups for p in group]

    def modules(self, model: nn.Module, definition) -> dict[int, list[nn.Module]]:
        """The blocks of each stage that is here."""
        if len(self.blocks) == 1:
            return {0: [*model.blocks]}
        modules = model.get_submodule(definition.pipeline["blocks"])._modules
        return {s: [modules[str(n)] for n in self.blocks[s]] for s in self.stages}


def stage_memory(model: nn.Module, part: Part, hidden: float, peak: tuple[int, int], L: Layout) -> Memory:
    """Of one rank. `hidden`: bytes of hidden states (T, C); `peak`: of the passes."""
    trained, frozen = size(part.parameters, True), size(part.parameters, False)
    few = [*quantize.weights_of(model).values()]  # whole on each rank
    weights = (trained + frozen) / L.shard + size(b for w in few for b in w.buffers())
    gathered, communication = 0.0, 0.0
    if L.fsdp:
        width = L.compute_bytes if L.master else None
        sizes = [size(group, None, width) for *_, group in part.groups]
        gathered = gathered_bytes(sizes, L)
        # an all-gather's result before it is dealt out; the root's, before there are activations
        communication += max(sizes[:-1], default=0)
    if L.pp > 1:  # the schedule has a buffer for each message of a step
        received = sum((s > 0) + (s < len(part.blocks) - 1) for s in part.stages)
        communication += L.micro_batches * hidden * received
    base = {"optimiser": 2 * trained / L.shard, "communication": communication}
    # the passes, where weights are gathered; or the update, when activations are gone
    activations = {"gradients": peak[1], "activations": peak[0] - peak[1]}
    passes = {"weights": weights + gathered, **base, **activations}
    step = {"weights": weights, **base, "gradients": trained / L.shard, "activations": 0.0}
    return max(passes, step, key=lambda memory: sum(memory.values()))


def heaviest_stream(plan, batch_size: int, steps: int = 10_000) -> Stream:
    """The micro-batch with most tokens among the first ones of a run."""
    index, units = plan.index, plan.units(0)[: steps * batch_size]
    starts = range(0, len(units), batch_size)
    batches = ([int(n) for unit in units[i : i + batch_size] for n in unit] for i in starts)
    numbers = max(batches, key=lambda numbers: index.length[numbers].sum())
    columns = index.length, index.num_supervised, index.num_images
    return Stream(*(int(column[numbers].sum()) for column in columns), index.length[numbers].tolist())


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
    images = round(float(index.num_images.mean()) * len(lengths))
    typical = Stream(sum(lengths), round(share * sizes.supervised), images, lengths)
    return sizes, heaviest_stream(plan, cfg.per_device_train_batch_size), typical


def passes(
    model: nn.Module, definition, part: Part, stream: Stream, layout: Layout, dtype
) -> tuple[int, int]:
    """Bytes alive at the peak of a step's forward and backward passes, and gradients' among them. They run on
    the meta device, as many as it takes until memory does not grow any more."""
    L, last = layout, len(part.blocks) - 1
    model = copy.deepcopy(model).train()
    cast = _Autocast(L.autocast) if L.autocast else contextlib.nullcontext()
    if L.master and L.fsdp:
        model.to(dtype)  # what fully_shard gathers
    elif L.master:
        parallel.compute_in(model, dtype)
    if L.recompute:
        for block in [*model.vision_blocks, *model.blocks] if L.autocast else ():
            cast.around(block)
        parallel.recompute(model)
    blocks, alive, batches = part.modules(model, definition), {}, {}
    n, warm_up = L.micro_batches, round(alive_micro_batches(L, part.stages) * len(part.stages))
    n = min(n, -(-(warm_up + len(part.stages)) // L.pp) * L.pp)
    # of the interleaved schedule, so many micro-batches go through a rank's stages in turn
    group = L.pp if len(part.stages) > 1 else 1
    forwards = sorted(itertools.product(part.stages, range(n)), key=lambda x: (x[1] // group, x))
    backwards = sorted(itertools.product(part.stages, range(n)), key=lambda x: (x[1] // group, -x[0], x[1]))
    options = {"dtype": dtype, "device": "meta"}
    received = {f: torch.empty(stream.tokens, model.config.hidden_size, **options) for f in forwards if f[0]}
    grad = torch.empty(stream.tokens, model.config.hidden_size, **options)
    live = _Live(model, L)
    live.known |= {x.untyped_storage()._cdata for x in (grad, *received.values())}

    def forward(stage: int, i: int) -> None:
        if i not in batches:
            batches[i] = meta_batch(stream, model)
        x = received[stage, i].requires_grad_(part.first_trained < stage) if stage else None
        with cast:
            out = model(batches[i], "loss" if stage == last else "hidden", x, blocks[stage])
        alive[stage, i] = out[0].sum() if stage == last else out

    def backward(stage: int, i: int) -> None:
        out, live.last = alive.pop((stage, i)), i == n - 1
        if out.requires_grad:
            torch.autograd.backward(out, None if stage == last else grad)
        if L.pp == 1:
            del batches[i]

    with _Fused(), data_ranks(L.dp), live:
        for made, place in enumerate(forwards, 1):
            forward(*place)
            if made >= warm_up:
                backward(*backwards[made - warm_up])
        for place in backwards[len(forwards) - warm_up + 1 :]:
            backward(*place)
    return live.peak, live.peak_gradients


def of_rank(
    model: nn.Module, definition, blocks: list[range], rank: int, L: Layout
) -> tuple[nn.Module, Part]:
    """What a pipeline rank has of a model on the meta device, cut over tensor-parallel ranks."""
    mine, part = copy.deepcopy(model), Part([s for s in range(len(blocks)) if s % L.pp == rank], blocks, 0)
    if L.pp > 1:
        held = pipeline.stages_of_parameters(mine, definition.pipeline, blocks)
        part.first_trained = min(min(held[name]) for name, p in mine.named_parameters() if p.requires_grad)
        pipeline.keep_parameters(mine, {name for name, where in held.items() if where & {*part.stages}})
    world = parallel.World(0, L.pp * L.dp * L.tp, torch.device("cpu"), tp_size=L.tp)
    parallel.tensor_parallel(mine, definition.tp_plan(model.config, L.tp), world)
    modules = [*parallel.tables(mine), *mine.vision_blocks, *mine.blocks]
    names = {module: name for name, module in mine.named_modules()}
    found = zip([*modules, mine], groups_of(mine, modules), strict=True)
    part.groups = [(names[module], module, group) for module, group in found]
    return mine, part


def devices(
    model: nn.Module, definition, blocks: list[range], stream: Stream, layout: Layout, dtype
) -> list[Memory]:
    """Memory of each pipeline rank; `model` is on the meta device, with requires_grad as in training."""
    found, hidden = [], stream.tokens * model.config.hidden_size * dtype.itemsize
    for rank in range(layout.pp):
        mine, part = of_rank(model, definition, blocks, rank, layout)
        peak = passes(mine, definition, part, stream, layout, dtype)
        found.append(stage_memory(mine, part, hidden, peak, layout))
    return found


def block_inputs(model: nn.Module, stream: Stream) -> dict[str, tuple[int, int]]:
    """{name of a block: numbers that enter it, gradients that go back into its attention and its MLP}. The
    first block with something to train sends none back any more."""
    found, model = {}, copy.deepcopy(model).train()
    names = {module: name for name, module in model.named_modules()}
    for block in [*model.vision_blocks, *model.blocks]:

        def note(block, args, out):
            found[names[block]] = args[0].numel(), args[0].requires_grad + out.requires_grad

        block.register_forward_hook(note)
    with _Fused():
        model.to(torch.float32)(meta_batch(stream, model), "hidden")
    return found


def collectives(model: nn.Module, part: Part, inputs: dict, stream: Stream, layout: Layout) -> dict:
    """{(axis, kind): [messages, bytes]} of the forward and backward passes of a step, by a rank that has
    `model`. A message is as large as the whole: what a gather gives, what a reduction takes. `inputs`: of
    block_inputs."""
    found = collections.defaultdict(lambda: [0, 0.0])
    L, n = layout, layout.micro_batches
    rows, hidden = stream.supervised, stream.tokens * model.config.hidden_size * L.hidden_bytes

    def add(axis: str, kind: str, messages: int, size: float) -> None:
        found[axis, kind][0] += messages
        found[axis, kind][1] += messages * size

    # in the order of the forward pass; a head is a Linear, and like the root not freed before the backward
    order = sorted(part.groups[:-1], key=lambda group: isinstance(group[1], nn.Linear)) + part.groups[-1:]
    back = [inputs.get(name, (0, any(p.requires_grad for p in group)))[1] > 0 for name, _, group in order]
    for i, (name, module, group) in enumerate(order if L.fsdp else ()):
        # fully_shard cuts rows, and pads each parameter to as many on every rank
        count = {p: -(-p.shape[0] // L.shard) * L.shard * (p.numel() // p.shape[0]) for p in group}
        message = sum(k * (L.compute_bytes if L.master else p.element_size()) for p, k in count.items())
        reduced = 4 * sum(k for p, k in count.items() if p.requires_grad)
        # in the backward pass each gathers ahead what came before it, also what is not needed
        ahead = i + 2 < len(order) and order[i + 1][1] is not parallel.behind_frozen(model)
        wanted = back[i] or (ahead and back[i + 1])
        again = name and not isinstance(module, nn.Linear) and wanted  # freed, as parallel.shard says
        if L.shard > 1 and group:
            gathers = n * (2 if again else 1) if L.sharding == "stage3" else 1
            add("data parallel", "all-gather", gathers, message)
        times = n if L.sharding in ("stage2", "stage3") else 1
        if L.shard > 1 and reduced:
            add("data parallel", "reduce-scatter", times, reduced)
        if L.dp > L.shard and reduced:  # of the shards over the replicas
            add("data parallel", "all-reduce", times, reduced / L.shard)
    if L.tp > 1:
        sums, width = "tensor parallel", L.compute_bytes
        for name, *_ in part.groups:
            # a block has two sums forward and two backward; its recomputation ends before the last
            numel, gradients = inputs.get(name, (0, 0))
            again = L.recompute and gradients > 0
            add(sums, "all-reduce", n * (2 + again) * (numel > 0), numel * width)
            add(sums, "all-reduce", n * gradients, numel * L.hidden_bytes)
        if 0 in part.stages:  # of the embedding
            add(sums, "all-reduce", n, hidden)
        if len(part.blocks) - 1 in part.stages:  # of the loss: the gradient of its rows, statistics of them
            add(sums, "all-reduce", n, rows * model.config.hidden_size * width)
            add(sums, "all-gather", n, 8 * rows * L.tp)
        for module in model.modules():  # of adapters, whose gradients are shares
            if getattr(module, "is_shared", False):
                add(sums, "all-reduce", n, size(module.parameters(), None, width if L.master else None))
    border = len(part.blocks) - 1
    for stage in part.stages if border else ():
        messages = (stage < border) + (part.first_trained < stage)  # forward, and the gradient backward
        add("pipeline", "send", n * messages, hidden)
    return found


def layout_of(cfg: Config, world_size: int) -> Layout:
    pp, replicas, shard, tp = parallel.layout(world_size, *cfg.degrees)
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
        autocast=(torch.bfloat16 if cfg.bf16 else torch.float16) if sixteen and not o2 else None,
    )


def network(cfg: Config, config: dict, definition: vlm.Model) -> nn.Module:
    """What would train, on the meta device and in fp32."""
    model = definition.network(with_prefix(config, definition, cfg))
    if cfg.lora:
        add_adapter(model, definition, cfg)
    choose_trainable(model, definition, cfg)
    return model


def in_few_bits(model: nn.Module, cfg: Config) -> torch.dtype:
    """Frozen weights as they will be held; returns the dtype of what enters a pipeline stage."""
    dtype = halve(model, cfg, {}) or torch.float32
    if cfg.quantize:
        quantize.prepare(model, cfg.quantize)
    return dtype


def dry_run(cfg: Config, config: dict, definition, plan, world_size: int) -> str:
    """Memory per device, disk, steps and FLOPs, from shapes alone."""
    model, layout = network(cfg, config, definition), layout_of(cfg, world_size)
    sizes, heaviest, typical = streams(plan, cfg)
    # from the model file's formulas: shares of the parts, which the counted FLOPs don't tell
    forward = definition.forward_flops(
        model.config, sizes.tokens, sizes.supervised, sizes.images, sizes.segment
    )
    flops = step_flops(model, typical, layout) * sizes.tokens / typical.tokens
    dtype = in_few_bits(model, cfg)  # after the FLOPs, which few bits don't change
    pp, dp, tp, micro_batches = layout.pp, layout.dp, layout.tp, layout.micro_batches
    blocks = pipeline_blocks(model, definition, cfg, sizes) if pp > 1 else [range(len(model.blocks))]
    found = devices(model, definition, blocks, heaviest, layout, dtype)
    fullest = max(found, key=lambda memory: sum(memory.values()))
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
    memory = {**fullest, "sum": sum(fullest.values())}
    lines += [f"  {name:<14}{value / 2**30:>10.3f} GiB" for name, value in memory.items()]
    # weights in the dtype of training, or of an adapter fp32; of what trains, fp32 copy and two moments
    whole, trained = size(model.parameters(), None, 1), size(model.parameters(), True, 1)
    disk = trained * 4 if cfg.lora else whole * (2 if layout.master else 4)
    disk += trained * 12
    lines.append(f"disk: {disk / 2**30:.2f} GiB a checkpoint, {cfg.save_total_limit or 'all'} of them kept")
    lines.append(
        f"tokens per step: {sizes.tokens * micro:,.0f} ({sizes.supervised / sizes.tokens:.0%} supervised, "
        f"{sizes.images * micro:,.0f} images)"
    )
    lines.append(f"FLOPs per step: {flops * micro:.3e} (forward: {shares})")
    share, inputs = sizes.tokens / typical.tokens, {}
    if tp > 1:
        typically = block_inputs(model, typical).items()
        inputs = {name: (numel * share, gradients) for name, (numel, gradients) in typically}
    mine, part = of_rank(model, definition, blocks, 0, layout)  # the first has the vision tower
    mean = Stream(sizes.tokens, sizes.supervised, sizes.images, [])
    volumes = collections.Counter()
    for (axis, _), (_, sent) in collectives(mine, part, inputs, mean, layout).items():
        volumes[axis] += sent
    lines += [f"communication a step and device, {axis}: {v / 2**30:.3f} GiB" for axis, v in volumes.items()]
    bubble = pipeline.bubble_share(pp, cfg.pipeline_schedule, micro_batches)
    if pp > 1:
        sizes_of_stages = ", ".join(str(len(r)) for r in blocks)
        lines.append(f"pipeline bubble: {bubble:.1%} of a step; blocks: {sizes_of_stages}")
    # each at its peak, one hidden behind the other: nothing is faster
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


def main() -> int:
    import plan  # which needs this file

    argv = sys.argv[1:]
    if argv[:1] not in (["plan"], ["-h"], ["--help"]):
        raise ValueError("expected: estimate.py plan --model qwen-vl-7b --gpus 64 (--help lists all)")
    return plan.main(argv[argv[0] == "plan" :])


if __name__ == "__main__":
    sys.modules["estimate"] = sys.modules["__main__"]
    terminal.leave(terminal.cli(main))
