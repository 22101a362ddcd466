"""What trains, and the order in which a model is made ready: prefix, adapter, freezing, 16 bits, pipeline,
tensor cut, compile, recomputation, sharding, loading.

    built = build(cfg, directory, world, stream_sizes(plan, cfg))  # built.model, built.stages, ...
    optimizer = make_optimizer(built.model, cfg, built.learning_rates)

`build` below is that order, with a reason beside each step.
"""

import copy
import difflib
import fnmatch
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import checkpoint
import data
import lora
import parallel
import pipeline
import quantize
import rates
import vlm
from checkpoint import matches
from config import Config
from kernels import attention
from kernels.linear import adopt


def check_stage(cfg: Config, definition) -> None:
    """Refuses another model's stage, and gives patterns this model's names for the toolkit's."""
    # PaddleMIX's files name its own modules; their patterns mean ours.
    for key in ("freeze_include", "freeze_exclude", "lora_target_modules", "modules_to_save"):
        for theirs, ours in definition.legacy_names.items():
            if getattr(cfg, key):
                setattr(cfg, key, [pattern.replace(theirs, ours) for pattern in getattr(cfg, key)])
    definition.check_stage(cfg.stage)


def check_adapter(cfg: Config) -> None:
    """Refuses what would train or save something else than an adapter of the base alone."""
    # The adapter would be read and then trained as a part of the base: what is saved would be neither.
    if cfg.lora_path and not cfg.lora:
        raise ValueError(
            f"lora_path={cfg.lora_path} without lora=true: add --lora to train that adapter on, or fold it "
            "into its base with merge.py and train the result"
        )
    # Both change the base itself, and an adapter is saved without its base.
    for key in ("init_from", "pre_seq_len"):
        if cfg.lora and getattr(cfg, key):
            raise ValueError(
                f"{key}={getattr(cfg, key)} with lora=true: an adapter is saved without its base, so no "
                f"other command could put that base together again; train with {key} first, then lora=true "
                "on the checkpoint"
            )


def lora_targets(cfg: Config, definition) -> list[str]:
    """The patterns to adapt: those asked for, else the continued adapter's own modules, else the model's
    default."""
    # A continued adapter has its layers already; others would begin at zero beside them.
    if cfg.lora_target_modules or not cfg.lora_path:
        return cfg.lora_target_modules or definition.lora_targets
    return [re.escape(name) for name in lora.contents(cfg.lora_path)[0]]


def choose_trainable(model: nn.Module, definition, cfg: Config) -> None:
    """Sets requires_grad: adapters and what freeze_exclude and modules_to_save carve out train; what
    freeze_include matches, the rest under `lora` and the language model in pre-training are frozen."""
    # A pattern that matches nothing is a misspelt one: it would train or freeze something else than meant.
    names = [name for name, _ in model.named_parameters()]
    for key in ("freeze_include", "freeze_exclude"):
        for pattern in getattr(cfg, key) or ():
            if not fnmatch.filter(names, pattern):
                # With a remedy: the nearest names, since the pattern was meant for one of them.
                near = difflib.get_close_matches(pattern.strip("*"), names, n=2, cutoff=0)
                raise ValueError(f"{key}: {pattern!r} matches no parameter; near names: {', '.join(near)}")
    carved = [
        *(cfg.freeze_exclude or []),
        *(f"{m}.*" for m in lora.whole_modules(model, cfg.modules_to_save)),
    ]
    # First match wins: an adapter trains even where its layer is frozen by name.
    frozen = (cfg.freeze_include or []) + definition.pretrain_freeze.get(cfg.stage, [])
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.requires_grad_(True)
        # freeze_exclude carves out of what is frozen: "all of the tower but its last norm".
        elif matches(name, frozen):
            p.requires_grad_(matches(name, carved))
        # P-tuning trains the prefix alone, LoRA its adapter and what is carved out.
        elif cfg.pre_seq_len:
            p.requires_grad_(matches(name, [definition.prefix_tuning]))
        elif cfg.lora:
            p.requires_grad_(matches(name, carved))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing is trainable: freeze_include matches every parameter; narrow it or set lora=true"
        )


def parameter_table(model: nn.Module, parts: dict[str, str]) -> str:
    # The table of what trains, printed at the start: a wrong freeze is seen before it costs a day.
    rows = {part: [0, 0] for part in [*parts, "adapter"]}

    def part_of(name: str) -> str:
        if ".lora_" in name:
            return "adapter"
        return next(part for part, pattern in parts.items() if fnmatch.fnmatch(name, pattern))

    for name, p in model.named_parameters():
        part = part_of(name)
        # Of the whole parameter: a rank's slice or shard would say less than is trained.
        count = parallel.whole_shape(p).numel()
        rows[part][0] += count
        rows[part][1] += count * p.requires_grad
    for name, few in quantize.weights_of(model).items():
        rows[part_of(name)][0] += few.shape.numel()
    rows["all"] = [sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())]
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}"]
    return "\n".join(
        lines
        + [f"{part:<16}{total:>16,}{trainable:>16,}" for part, (total, trainable) in rows.items() if total]
    )


def named_generator(seed: int, name: str) -> torch.Generator:
    """Initial values depend on the parameter's name alone, not on the order or layout of creation."""
    # 56 bits of the digest: a generator takes no longer seed.
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    )


def with_prefix(config: dict, definition, cfg: Config) -> dict:
    """config.json's contents, with P-tuning's prefix if one is asked for."""
    if cfg.pre_seq_len and definition.prefix_tuning is None:
        raise ValueError(f"pre_seq_len={cfg.pre_seq_len}: this model has no P-tuning; use lora=true")
    return {**config, "pre_seq_len": cfg.pre_seq_len} if cfg.pre_seq_len else config


def lora_parts(model: nn.Module, definition, cfg: Config) -> dict:
    """The packed weights that lora_split adapts part by part."""
    # SAT adapts q, k and v of one packed matrix apart, PEFT the matrix as one.
    if cfg.lora_split and definition.lora_parts is None:
        raise ValueError("lora_split=true: this model has no packed weight whose parts are adapted apart")
    return definition.lora_parts(model.config) if cfg.lora_split else {}


@dataclass
class StreamSizes:
    """Means of a micro-batch, from the lengths of the training samples."""

    tokens: float
    supervised: float
    images: float
    segment: float  # tokens of a sample


def stream_sizes(plan: data.Plan, cfg: Config) -> StreamSizes:
    # A share of the epoch's tokens for each micro-batch: packs and single samples alike.
    index, share = plan.index, cfg.per_device_train_batch_size / max(1, len(plan.units(0)))
    sums = (float(x.sum()) * share for x in (index.length, index.num_supervised, index.num_images))
    return StreamSizes(*sums, float(index.length.mean()))


def pipeline_blocks(model: nn.Module, definition, cfg: Config, sizes: StreamSizes) -> list[range]:
    """The blocks of each pipeline stage, by the FLOPs of their forward and backward passes."""
    degree = f"pipeline_parallel_degree={cfg.pipeline_parallel_degree}"
    if obstacle := model.pipeline_obstacle:
        raise ValueError(f"{degree}: {obstacle}; use tensor_parallel_degree or sharding=stage3")
    flops = definition.forward_flops(
        model.config, sizes.tokens, sizes.supervised, sizes.images, sizes.segment
    )
    # Adapters are small beside the products of the layers that they stand at.
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    prefix, N = definition.pipeline["blocks"] + ".", len(model.blocks)
    # A tower with something to train is gone back through; a frozen one is not.
    image = any(matches(n, definition.image_parameters) for n in trained)
    head = any(matches(n, definition.pipeline["last"]) for n in trained)
    # A stage is as slow as its FLOPs, forward and backward; the slowest one sets the pace of all.
    # forward 1; gradients of inputs 1, of weights 1; the tower's inputs are pixels, which need none if it is
    # frozen
    block = flops.pop("language model") / N * (2 + any(n.startswith(prefix) for n in trained) + cfg.recompute)
    last = flops.pop("head") * (2 + head)
    # What is neither block nor head is the first stage's: tower, resampler, embedding.
    first = sum(flops.values()) * (3 + cfg.recompute if image else 1)
    # Interleaved schedules give a rank several stages.
    stages = pipeline.num_stages(cfg.pipeline_parallel_degree, cfg.pipeline_schedule)
    try:
        return pipeline.cut([block] * N, first, last, stages)
    except ValueError as e:
        raise ValueError(f"{degree}, pipeline_schedule={cfg.pipeline_schedule}: {e}") from None


@dataclass
class Built:
    """What training works with."""

    model: nn.Module  # on the device, with its weights; under pipelines this rank's stages of it
    whole: nn.Module  # before the cut into pipeline stages, without weights: names and shapes of everything
    definition: vlm.Model
    lora_modules: list[str]  # names of the adapted layers
    stages: pipeline.Pipeline | None
    learning_rates: dict[str, rates.Rate]  # of each trainable parameter of the whole model
    starts: dict | None = None  # what lora.take_principal took out of the base


def build(cfg: Config, directory: Path, world: parallel.World, sizes: StreamSizes) -> Built:  # all ranks
    """The order matters, and each step says why it stands where it does. Until `to_empty` everything is on
    the meta device: nothing has memory before it is known what this rank holds."""
    # The checkpoint says which model file reads it: nothing else here knows.
    config = checkpoint.read_config(directory)
    definition = vlm.find(config)

    # Prefix: its parameters belong to the model, so they must exist before anything looks at names.
    config = with_prefix(config, definition, cfg)
    weights = checkpoint.open_model(directory, definition)
    model = definition.network(config)
    tuned = [definition.prefix_tuning] if cfg.pre_seq_len else None
    # A prefix is new unless an earlier run has trained it: then the checkpoint has it.
    new = {name for name, _ in model.named_parameters() if matches(name, tuned)} - weights.names
    # Now, before minutes of loading: both ways, missing and unexpected.
    checkpoint.check_names({n: p.shape for n, p in model.named_parameters() if n not in new}, weights)
    base_names = {name for name, _ in model.named_parameters()} - new

    # Adapter before freezing: which base weights train depends on there being one.
    lora_modules = add_adapter(model, definition, cfg, directory) if cfg.lora else []
    choose_trainable(model, definition, cfg)
    learning_rates = rates.rates(model, definition, cfg)
    if cfg.lora_path:
        check_continued_adapter(model, cfg, weights, say=world.main)

    # 16 bits after freezing: a frozen weight needs no fp32 master copy, a trained one does.
    compute_dtype = halve(model, cfg, {name: weights.dtype(name) for name in weights})

    # Pipeline before the tensor cut: a rank cuts only the blocks that it keeps. Names and shapes of the whole
    # stay known on each rank, for saving and for the table.
    whole, stages, shapes = model, None, {name: p.shape for name, p in model.named_parameters()}
    if world.pp_size > 1:
        whole = copy.deepcopy(model)
        stages = cut_into_stages(model, whole, definition, cfg, world, sizes, compute_dtype)
    parallel.tensor_parallel(model, definition.tp_plan(model.config, world.tp_size), world)

    # Few bits behind the pipeline's cut, of the frozen weights that this rank keeps: they are no parameters
    # any more, so nothing below shards, casts or counts them.
    if cfg.quantize:
        hold_in_few_bits(model, whole, cfg.quantize)
        if world.main:
            quantize.say_slower(cfg.quantize, world.device, "trains")

    # After the last that asks for an nn.Linear, and before what changes a module's class or forward itself.
    adopt(model, world.device)

    # Compile, then 16-bit copies, then recompute around both, since it frees them with the rest. Sharding is
    # outermost: fully_shard's hooks gather the weights that a recomputed block uses again. One rank has
    # nothing to gather and would hold its weights twice.
    if cfg.compile:
        compile_blocks(model)
    # On several ranks fully_shard's mixed precision casts; here it is done by hand.
    if compute_dtype and world.dp_size == 1:
        parallel.compute_in(model, compute_dtype)
    if cfg.recompute:
        parallel.recompute(model)
    if world.dp_size > 1:
        parallel.shard(model, world.mesh, cfg.sharding, compute_dtype)

    # Memory, then the weights, one tensor at a time: the host never holds the model twice.
    model.to_empty(device=world.device)
    parallel.mark_cuts(model)
    # A pipeline rank has a part of them: the others' names are skipped, not missed.
    parameters = dict(model.named_parameters())
    here = base_names & parameters.keys()
    checkpoint.load_into({name: parameters[name] for name in here}, weights, skip=base_names - here)
    load_few_bits(quantize.weights_of(model), weights)
    # Over the base's values: stage 2 begins with stage 1's Q-Former and a language model of its own.
    if cfg.init_from:
        found = load_init_from(cfg.init_from, definition, parameters, shapes, base_names)
        if world.main:
            print(f"{found} from {directory}")
    # Prefix and adapter: what no checkpoint has.
    draw({n: p for n, p in parameters.items() if n not in base_names}, new, model, weights, cfg.seed)
    pissa = cfg.init_lora_weights == "pissa"
    starts = lora.take_principal(model, lora_modules, weights.read, checkpoint.copy_full_) if pissa else None
    if cfg.lora_path:
        other = whole if stages else None
        lora.load_adapter(model, cfg.lora_path, checkpoint.copy_full_, parallel.whole_shape, other)
    return Built(model, whole, definition, lora_modules, stages, learning_rates, starts)


def draw(
    parameters: dict, prefix: set[str], model: nn.Module, weights: checkpoint.Weights, seed: int
) -> None:
    """Initial values, drawn whole and then cut: the same on any layout. `prefix`: names that are P-tuning's,
    the others are an adapter's."""
    for name, param in parameters.items():
        if name.endswith(lora.MAGNITUDE):
            lora.begin_magnitude(name, param, weights.read, checkpoint.copy_full_)
            continue
        full, init = torch.empty(parallel.whole_shape(param)), model.init_weights
        with torch.no_grad():
            (init if name in prefix else lora.init_lora)(name, full, named_generator(seed, name))
        checkpoint.copy_full_(param, full)


def add_adapter(model: nn.Module, definition: vlm.Model, cfg: Config, base: Path | None = None) -> list[str]:
    """Puts LoRA beside the layers that are asked for; returns their names. `base`: of an adapter that will be
    saved."""
    if base:
        lora.base_sample(base)  # for its file: read now, whatever happens to the base later
    if cfg.lora_path:
        here = dict(model.named_modules())
        if strange := [name for name in lora.contents(cfg.lora_path)[0] if name not in here]:
            raise ValueError(
                f"lora_path={cfg.lora_path} adapts {strange[0]}, which this model does not have: is it "
                "another model's adapter?"
            )
    names = lora.inject(
        model,
        lora_targets(cfg, definition),
        cfg.lora_rank,
        # inject divides by the rank, rank-stabilised LoRA by its root (arXiv:2312.03732)
        cfg.lora_alpha * (math.sqrt(cfg.lora_rank) if cfg.use_rslora else 1),
        cfg.lora_dropout,
        lora_parts(model, definition, cfg),
        definition.image_parameters,
        lora.whole_modules(model, cfg.modules_to_save),
    )
    for name in names if cfg.use_dora else ():
        lora.add_magnitude(model.get_submodule(name))
    return names


def check_continued_adapter(model: nn.Module, cfg: Config, weights: checkpoint.Weights, say: bool) -> None:
    """ValueError for an adapter of another base, or one that would be saved only in part; `say`: also what is
    no mistake, but no more what it was."""
    if say:
        lora.say_base(cfg.lora_path, cfg.quantize)
    # An adapter on other weights trains without a word of warning and means nothing.
    lora.check_base(cfg.lora_path, weights)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if lost := sorted(frozen.intersection(lora.contents(cfg.lora_path)[1])):
        raise ValueError(
            f"lora_path={cfg.lora_path} holds {lost[0]} trained whole ({len(lost)} in all), which is frozen "
            "here and would be left out of the new adapter; name it in modules_to_save or freeze_exclude"
        )


def halve(model: nn.Module, cfg: Config, file_dtypes: dict) -> torch.dtype | None:
    """Holds frozen weights in 16 bits; returns what forward and backward compute in, None for fp32 or what
    autocast chooses. file_dtypes: of the checkpoint's tensors, as far as they are known."""
    dtype16 = {(True, False): torch.bfloat16, (False, True): torch.float16}.get((cfg.bf16, cfg.fp16))
    if dtype16 and cfg.fp16_opt_level == "O2":
        # O2: everything computes in 16 bits, trained weights keep an fp32 original for the update.
        halve_frozen(model, dtype16)
        return dtype16
    if dtype16:
        halve_products(model, dtype16, cfg, file_dtypes)
    return None


def halve_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    for owner in model.modules():
        for name, p in owner.named_parameters(recurse=False):
            if not p.requires_grad:
                setattr(owner, name, nn.Parameter(p.to(dtype), requires_grad=False))


def halve_products(model: nn.Module, dtype: torch.dtype, cfg: Config, file_dtypes: dict) -> None:
    """Under autocast: the frozen weights that it would cast for every product, where nothing is lost by it.
    An adapter is saved without its base, and what the file has in 16 bits comes out as it went in."""
    # Some tensors come from another file, whose precision is not in this list.
    if cfg.init_from:
        file_dtypes = {}
    for prefix, owner in model.named_modules():
        own = dict(owner.named_parameters(recurse=False))
        # not a layer of which one part trains: an adapter holds it whole
        if not isinstance(owner, nn.Linear | nn.Conv2d) or any(p.requires_grad for p in own.values()):
            continue
        names = [f"{prefix}.{key}" for key in own]
        if cfg.lora or all(file_dtypes.get(name) == dtype for name in names):
            for key, p in own.items():
                setattr(owner, key, nn.Parameter(p.to(dtype), requires_grad=False))


def cut_into_stages(
    model: nn.Module, whole: nn.Module, definition: vlm.Model, cfg: Config, world, sizes: StreamSizes, dtype
) -> pipeline.Pipeline:
    """Leaves this rank's stages of the model; `dtype` of the hidden states between them, None for fp32."""
    # A tied tensor is held by two stages; each stage keeps what its blocks need.
    blocks = pipeline_blocks(model, definition, cfg, sizes)
    held_by = pipeline.stages_of_parameters(model, definition.pipeline, blocks)
    here = {n for n, held in held_by.items() if world.pp_rank in {stage % world.pp_size for stage in held}}
    pipeline.keep_parameters(model, here)
    trainable = {n for n, p in whole.named_parameters() if p.requires_grad}
    plan, schedule, dtype = definition.pipeline, cfg.pipeline_schedule, dtype or torch.float32
    return pipeline.Pipeline(model, plan, blocks, held_by, trainable, schedule, world, dtype)


def compile_blocks(model: nn.Module) -> None:
    """Each block by itself, for streams of any length: one program serves all of them."""
    attention.leave_uncompiled()
    for block in [*model.vision_blocks, *model.blocks]:
        block.forward = torch.compile(block.forward, dynamic=True)


def hold_in_few_bits(model: nn.Module, whole: nn.Module, kind: str) -> None:
    """ValueError if no layer of the whole model is frozen; a pipeline rank alone may well hold none."""
    if not quantize.layers(whole):
        raise ValueError(
            f"quantize={kind}: no linear layer of the language model's blocks is frozen, and only frozen "
            "weights can be in few bits; narrow freeze_exclude, or leave quantize out"
        )
    quantize.prepare(model, kind)


def load_few_bits(few: dict[str, nn.Module], weights: checkpoint.Weights) -> None:
    """Rounds one weight at a time, where it will be: the device holds no other weight in 16 bits."""
    scratch = weights.scratch()
    for name in [n for n in weights if n in few]:  # in the file's order
        full = weights.read(name, scratch)
        checkpoint.largest(full, f"{weights.directory}: {name}")
        few[name].fill(full)


def load_init_from(path: str, definition: vlm.Model, parameters: dict, shapes: dict, base_names: set) -> str:
    """Replaces what a checkpoint of fewer parts (a stage-1 Q-Former) has of this model. -> how much it is"""
    other = checkpoint.open_model(path, definition)
    common = sorted(base_names & other.names)
    if not common:
        raise ValueError(f"init_from={path} has no tensor of this model; the two must share names")
    for name in common:
        # Shapes of the whole model, before any cut over ranks.
        if other.shape(name) != shapes[name]:
            raise ValueError(
                f"init_from={path}: {name} is {tuple(other.shape(name))}, "
                f"expected {tuple(shapes[name])}; use a checkpoint of the same sizes"
            )
        if not other.dtype(name).is_floating_point:
            raise ValueError(f"init_from={path}: {name} is {other.dtype(name)}, expected floating point")
    here = {name: parameters[name] for name in common if name in parameters}
    try:
        checkpoint.load_into(here, other, skip=other.names - here.keys())
    except ValueError as e:
        raise ValueError(f"init_from={path}: {e}") from None
    left = sorted(other.names - base_names)
    unused = f" ({len(left)} of its own are not used, the first is {left[0]})" if left else ""
    return f"{len(common)} tensors from {path}{unused}, {len(base_names) - len(common)}"


def make_optimizer(
    model: nn.Module, cfg: Config, learning_rates: dict[str, rates.Rate] | None = None
) -> torch.optim.AdamW:
    """Without rates of their own all parameters have the configuration's."""
    # a pipeline rank may hold nothing that trains, and AdamW takes no empty list
    groups = rates.param_groups(model, learning_rates or {}, cfg) or [{"params": [], "factor": 1.0}]
    # torch's own AdamW: decay apart from the gradient, moments in the parameter's precision. Fused: one pass
    # over all that it touches, and no temporary copies.
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon, fused=True)


def autocast(cfg: Config, world: parallel.World):
    # O1 only: O2's weights are in 16 bits already, and fp32 needs none.
    dtype = torch.bfloat16 if cfg.bf16 else torch.float16
    return torch.autocast(
        world.device.type, dtype, enabled=(cfg.bf16 or cfg.fp16) and cfg.fp16_opt_level == "O1"
    )


def model_file(cfg: Config) -> tuple[dict, vlm.Model, Path | None]:
    """-> (config.json's contents, definition, checkpoint directory; None for a preset: a shape alone)."""
    # A directory of that name wins over a shape.
    if not os.path.isdir(cfg.model_name_or_path) and (config := vlm.shape(cfg.model_name_or_path)):
        return config, vlm.find(config), None
    directory = Path(data.model_directory(cfg.model, cfg.model_name_or_path))
    config = checkpoint.read_config(directory)
    definition = vlm.find(config)
    if cfg.model not in (None, vlm.kind_of(config)):
        raise ValueError(
            f"model={cfg.model}, but {directory}/config.json is a {vlm.kind_of(config)} checkpoint"
        )
    return config, definition, directory


def total_steps(cfg: Config, plan: data.Plan, global_batch: int) -> int:
    return (
        cfg.max_steps if cfg.max_steps is not None else plan.total_steps(cfg.num_train_epochs, global_batch)
    )
