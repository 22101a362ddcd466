"""Every training stage in one loop: pre-training, SFT and LoRA differ by configuration only.

    torchrun train.py --model qwen_vl --lora  # the tiny model and data in samples/
    torchrun --nproc_per_node 8 train.py configs/qwen_vl/sft.json --learning_rate 2e-5
    python train.py configs/qwen_vl/sft.json --dry_run  # memory, steps and FLOPs, nothing loaded

Keys come from JSON files and `--key value` (config.py). `Run.train` below is the loop: a step reads
micro-batches, sums their losses, divides by what was counted on all ranks, clips, updates, saves, evaluates.
What is before it: where the run stands (resume.py) and how the model is made ready (build.py). Killed at any
point, the same command continues from the last checkpoint with the same losses (run_dir.py).
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import copy
import hashlib
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import estimate
import lora
import parallel
import rates
import schema
import terminal
import train_state
import vlm
import watch
from build import (
    autocast,
    build,
    check_adapter,
    check_stage,
    make_optimizer,
    model_file,
    parameter_table,
    stream_sizes,
)
from config import Config, parse_config
from draw import draw_loss
from features import cache_features
from kernels import dispatch
from meeting import Meeting
from rates import LossScaler, learning_rate_at
from resume import Prepared, check_eval_use, is_finished, prepare
from run_dir import HARMLESS, Log, RunDir, Signals, Stopped, explained, goes_on, shown
from terminal import note, one_line
from vlm import Batch

# --------------------------------------------------------------------------------------------------
# One step: facts that all ranks share, gradients, update


SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@dataclass
class Facts:
    """Of one step, summed over its micro-batches and all ranks before the first forward pass: so every rank
    divides by the same numbers, and enters the same towers."""

    counts: list[int]  # what each of the model's losses is summed over
    tokens: int
    supervised: int  # of these tokens
    samples: int
    bad: int  # samples that could not be loaded
    signal: int  # that some rank got; 0: none
    has_images: list[bool]  # by micro-batch: whether some rank has an image in it


def step_facts(
    model: nn.Module, micro_batches: list[Batch], signalled: int, world: parallel.World
) -> Facts:  # all ranks
    # all ranks: one small message a step; a flag is up where its sum is not zero
    # By each of the model's losses: images, pairs, tokens.
    counts = [sum(column) for column in zip(*(model.loss_counts(b) for b in micro_batches), strict=True)]
    sizes = zip(
        *((len(b.input_ids), b.num_supervised, len(b.sample_ids), len(b.bad)) for b in micro_batches),
        strict=True,
    )
    sums = [*counts, *(sum(column) for column in sizes)]
    # A signal is sent to ranks at different moments: what one has makes all of them stop at one step.
    flags = [signalled == s for s in SIGNALS] + [b.pixel_values is not None for b in micro_batches]
    sums, flags = parallel.sum_of_all(sums, flags, world)
    signals, has_images = flags[: len(SIGNALS)], flags[len(SIGNALS) :]
    stop = max((int(s) for s, up in zip(SIGNALS, signals, strict=True) if up), default=0)
    return Facts(sums[:-4], *sums[-4:], stop, [up > 0 for up in has_images])


def to_device(batch: Batch, device: torch.device, blank_image: bool, image_size) -> Batch:
    """Moves a batch. A rank without an image gets a blank one where another rank has one: the weights of a
    sharded tower are gathered by all ranks together."""
    # Behind the facts: which micro-batches need a blank image is only known once all ranks have said.
    batch = batch.to(device)
    if blank_image and not batch.has_images:
        # It counts nothing: vlm.splice_images multiplies its features by zero.
        pixels = vlm.blank_image(image_size)[None].to(device)
        keys = torch.zeros(1, dtype=torch.int64, device=device)
        batch = replace(batch, pixel_values=pixels, image_dropout_keys=keys)
    return batch


def losses_by_dataset(batch: Batch, losses: Tensor, num_datasets: int) -> Tensor:
    """(num_datasets, K, 2) fp64: sum and count of each of the model's K losses by dataset entry.

    `losses`: each supervised token's own (K = 1), or (S, K, 2) sums and counts of the segments.
    """
    if losses.ndim == 1:
        index = batch.row_datasets
        losses = torch.stack((losses.double(), torch.ones_like(losses).double()), dim=1)[:, None]
    else:
        index, losses = batch.dataset_ids, losses.double()
    # fp64: sums of many tokens must not depend on the order in which ranks add them.
    out = torch.zeros(num_datasets, *losses.shape[1:], dtype=torch.float64, device=losses.device)
    return out.index_add_(0, index, losses)


def means(sums: Tensor) -> Tensor:
    """(..., K, 2) sums and counts -> (..., K), zero where nothing was counted."""
    # A mean over tokens, not of means: entries with long answers weigh as much as their tokens.
    return sums[..., 0] / sums[..., 1].clamp(min=1)


def named_losses(model: nn.Module, sums: Tensor) -> dict[str, float]:
    """Each of a model's several losses by its name; (K, 2) sums and counts."""
    return dict(zip(model.LOSSES, means(sums).tolist(), strict=True)) if len(model.LOSSES) > 1 else {}


def name_bad(micro_batches: list[Batch], named: dict, world: parallel.World) -> None:
    """Says what could not be loaded, once for each record: one of the ranks that see the same data."""
    for where, reason in [pair for batch in micro_batches for pair in batch.bad]:
        # Ranks of one tensor or pipeline group read the same records.
        if where not in named and world.tp_rank == world.pp_rank == 0:
            print(f"warning: left out {where}: {reason}", file=sys.stderr, flush=True)
        named[where] = reason


def check_bad(bad: int, tried: int, cfg: Config, what: str) -> None:
    # A share, not a number: one bad record of a million must not end a run of days.
    if bad > cfg.max_bad_samples * tried:
        raise ValueError(
            f"{bad} of {tried} {what} could not be loaded (listed above), max_bad_samples="
            f"{cfg.max_bad_samples:g} allows {int(cfg.max_bad_samples * tried)}"
        )


class Passes:
    """Forward passes of one step's micro-batches, the same for training and evaluation: each adds its losses
    to `sums` (num_datasets, K, 2), sums and counts of this rank."""

    def __init__(self, run: "Run", micro_batches: list[Batch], has_images: list[bool], num_datasets: int):
        self.run, self.micro_batches, self.has_images = run, micro_batches, has_images
        shape = num_datasets, len(run.model.LOSSES), 2
        self.sums = torch.zeros(shape, dtype=torch.float64, device=run.world.device)
        self.on_device: dict[int, Batch] = {}  # a pipeline has several under way

    def forward(self, i: int, x: Tensor | None = None, blocks=None, last: bool = True) -> Tensor:
        """The summed losses of micro-batch i; of a pipeline stage that is not the last its hidden states."""
        run = self.run
        # Late: the device holds the micro-batches under way, not all of a step.
        if i not in self.on_device:
            batch, size = self.micro_batches[i], run.processor.image_size
            # With the batch, not on a module: recomputation and other stages see the same noise.
            noise = run.cfg.neftune_noise_alpha if run.model.training else 0.0
            batch = replace(batch, embedding_noise=noise)
            self.on_device[i] = to_device(batch, run.world.device, self.has_images[i], size)
        batch = self.on_device[i]
        # O1 computes in 16 bits from fp32 weights; O2 has 16-bit weights, so autocast does nothing.
        with run.autocast:
            # A pipeline stage that is not the last gives hidden states (T, C) on.
            if not last:
                return run.model(batch, "hidden", x, blocks)
            loss_sum, losses = run.model(batch, x=x, blocks=blocks)
        # Each token belongs to an entry of `dataset`: the log says how each one learns.
        self.sums.add_(losses_by_dataset(batch, losses, len(self.sums)))
        return loss_sum


def forward_backward(run: "Run", micro_batches: list[Batch], facts: Facts) -> Tensor:
    """Gradients of the mean loss over the whole step, a sum of means where the model has several. Returns
    (num_datasets, K, 2) of this rank: loss sums and counts."""
    cfg, world, stages, has_images = run.cfg, run.world, run.built.stages, facts.has_images
    if stages is not None:
        # A schedule sends as many micro-batches of one length in each step;
        # a rank with fewer adds empty ones.
        empty = cfg.gradient_accumulation_steps - len(micro_batches)
        micro_batches = [
            *micro_batches,
            *(data.collate([], (), run.model.num_image_tokens) for _ in range(empty)),
        ]
        # Stages exchange tensors of one shape, known before the step begins.
        length = max(len(b.input_ids) for b in micro_batches)
        micro_batches = [data.pad_stream(b, length) for b in micro_batches]
        has_images = [*has_images, *[False] * empty]
    passes = Passes(run, micro_batches, has_images, len(run.entries))
    # Sharded gradients are averaged over ranks: times their number, divided by the counts of all.
    scales = [world.dp_size / max(n, 1) * run.scaler.scale for n in facts.counts]
    # One number for each of the model's losses, the same on all ranks.
    weights = torch.tensor(scales, device=world.device)
    # Known to all ranks alike (facts), so they reduce gradients behind the same micro-batch.
    # If only the vision tower trains, a micro-batch without an image has no backward pass.
    with_gradient = [i for i in range(len(micro_batches)) if has_images[i] or not run.images_only]

    def loss_of(i: int, x: Tensor | None = None, blocks=None, last: bool = True) -> Tensor:
        # The sum of means: BLIP-2's three losses weigh the same, whatever they count.
        out = passes.forward(i, x, blocks, last)
        return (out * weights).sum() if last else out

    def before_backward(i: int) -> None:
        # Where the layout reduces gradients once a step, it does so in the last backward pass.
        parallel.set_gradient_sync(run.model, cfg.sharding, last=i == max(with_gradient, default=-1))

    if stages is not None:
        stages.run(loss_of, len(micro_batches), length, before_backward)
    else:
        for i in range(len(micro_batches)):
            loss = loss_of(i)
            # Frozen through and through where there is no image: nothing to go back through.
            if loss.requires_grad:
                before_backward(i)
                loss.backward()
            # Its activations go with the graph; its inputs would stay until the step's end.
            del passes.on_device[i]
    parallel.reshard(run.model)  # a micro-batch without a backward pass may have come last
    return passes.sums


def clip_and_step(
    parameters: dict[str, nn.Parameter],
    optimizer,
    max_grad_norm: float,
    scaler: LossScaler,
    world: parallel.World,
    stages=None,
    loss: Tensor | None = None,
) -> Tensor:  # all ranks
    """One update; returns the gradient norm before clipping, on the device. A trainable parameter that got no
    gradient has a zero one: AdamW's decay and moments act on it as on every other rank's."""
    for p in parameters.values():
        # Else a rank whose micro-batches had no image would step without a decay that the others apply.
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if stages is not None:
        # Tied embedding and head lie on two stages: each has a part of one gradient.
        stages.sum_shared_gradients(parameters)
    # And of such a pair one counts in the norm.
    counted = [p for n, p in parameters.items() if stages is None or stages.counts_here(n)]
    # all ranks: of the whole gradient, so every rank clips by the same factor
    norm = parallel.gradient_norm(counted, world) / scaler.scale
    # 1e-6 as in torch's clip_grad_norm_: a zero gradient stays zero.
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm else torch.ones_like(norm)
    # Without a loss or gradient that is finite there is no update at all. The fused optimiser reads both on
    # the device and divides while it updates: no pass to clip, and the host has not to wait for the norm.
    finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    optimizer.grad_scale, optimizer.found_inf = (scaler.scale / factor).float(), (~finite).float()
    optimizer.step()
    # Freed, not zeroed: the next backward pass writes instead of adding.
    optimizer.zero_grad(set_to_none=True)
    if scaler.enabled:
        scaler.update(bool(finite))
    return norm


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate_loss(run: "Run", plan: data.Plan) -> dict[str, float]:  # all ranks
    """Mean loss over the supervised tokens of an evaluation set, and of each of its entries. A signal breaks
    it off on all ranks. Raises ValueError for more bad samples than max_bad_samples allows."""
    cfg, world, stages = run.cfg, run.world, run.built.stages
    # Dropout off, Qwen-VL's extrapolation on: see the models.
    run.model.eval()
    deal = data.Deal(world.dp_rank, world.dp_size, cfg.per_device_eval_batch_size)
    steps = range(plan.steps_per_epoch(deal.per_device_batch * deal.dp_size))
    loader = data.TrainLoader(plan, run.processor, steps, deal, cfg.num_workers)
    # fp64 and by entry: the same on any number of ranks.
    sums = torch.zeros(len(plan.index.entries), len(run.model.LOSSES), 2, dtype=torch.float64)
    kept: list[Tensor] = []  # on the device; brought to the host every eval_accumulation_steps
    num_bad = 0
    for _, _, micro_batches in loader:
        # all ranks: a signal that one got breaks off all
        facts = step_facts(run.model, micro_batches, run.signals.number, world)
        if facts.signal:
            raise Stopped(facts.signal)
        name_bad(micro_batches, run.named_eval_bad, world)
        # Counted over ranks already (facts).
        num_bad += facts.bad
        passes = Passes(run, micro_batches, facts.has_images, len(sums))
        if stages is None:
            # One micro-batch a step: nothing is accumulated here.
            passes.forward(0)
        else:
            stages.run(passes.forward, 1, len(micro_batches[0].input_ids))
        kept.append(passes.sums)
        if cfg.eval_accumulation_steps and len(kept) == cfg.eval_accumulation_steps:
            sums += sum(kept).cpu()
            kept.clear()
    # all ranks: eval samples were dealt to them
    sums = parallel.all_sum(sums + sum(kept).cpu() if kept else sums)
    if stages is not None:
        # The last stage alone has seen losses.
        stages.from_last(sums)
    check_bad(num_bad, len(plan.index), cfg, "eval samples")
    if not sums[..., 1].sum():
        raise ValueError("the eval set has no supervised token")
    result = {"eval_loss": float(means(sums.sum(0)).sum())}
    result |= {f"eval_loss_{k}": v for k, v in named_losses(run.model, sums.sum(0)).items()}
    if len(sums) > 1:
        # An entry of which no sample could be loaded has no mean, and none is invented.
        pairs = zip(plan.index.entries, sums, strict=True)
        result |= {f"eval_loss/{e.label}": float(means(x).sum()) for e, x in pairs if x[:, 1].any()}
    return result


def generation_scores(run: "Run", plan: data.Plan, after_each=None) -> dict[str, float]:  # all ranks
    """The eval entries' own metrics (eval_cider, eval_vqa_accuracy, eval_accuracy, ...) of greedy answers.
    Data-parallel ranks take the questions in turn. Questions whose image cannot be read are named and left
    out; ValueError for more than max_bad_samples."""
    import evaluate  # it imports generate.py, which training alone needs not

    cfg, index = run.cfg, plan.index
    questions = evaluate.merge_references(
        [index.conversation(n) for n in range(len(index))], index.entry.tolist()
    )
    # Greedy and short: it compares checkpoints, and says so with the same answer each time.
    how, size = evaluate.Decoding(max_new_tokens=32), cfg.per_device_eval_batch_size
    # stage3 gathers weights in every forward pass: its ranks make the same passes, so all answer all
    turn = (0, 1) if cfg.sharding == "stage3" else (run.world.dp_rank, run.world.dp_size)
    if turn[1] > 1:
        parallel.hold(run.model)
    with autocast(cfg, run.world):  # its weights may be held in 16 bits
        answers, bad = evaluate.answer_in_turn(
            run.model, run.processor, questions, size, how, turn, after_each or (lambda: None)
        )
    evaluate.check_bad(bad, len(questions), cfg.max_bad_samples, "questions of the evaluation")
    # Those that could not be answered are in `bad`, and count against max_bad_samples.
    questions, answers = evaluate.answered(questions, answers)
    return {f"eval_{name}": value for name, value in evaluate.score(questions, answers)[0].items()}


# --------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(path: Path, run: "Run") -> None:  # all ranks
    """A whole checkpoint: weights (or the adapter) as a loadable directory, and the state to go on from."""
    cfg, built, write = run.cfg, run.built, run.world.main
    # `everything` has names and shapes of the whole model, a pipeline rank's `parameters` only its own.
    parameters, everything = dict(built.model.named_parameters()), dict(built.whole.named_parameters())

    def on_rank_0(name: str) -> Tensor | None:
        # all ranks: each sends its part; rank 0 keeps what they make.
        if built.stages is not None:
            return built.stages.whole_tensor(name, parameters, everything[name])
        return checkpoint.gathered(parameters[name])

    # Under another name until everything is written: a kill leaves the last checkpoint as it was.
    with checkpoint.atomic_dir(path, run.world.rank) as temporary:
        if cfg.lora:
            sizes = cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout
            how = {"base_in": cfg.quantize, "rslora": cfg.use_rslora, "starts": built.starts}
            made = lora.LoraConfig(run.directory, *sizes, **how)
            # What trained beside the adapter (freeze_exclude): whole, in the same file.
            others = [n for n, p in everything.items() if p.requires_grad and ".lora_" not in n]
            lora.save_adapter(temporary, built.whole, made, built.lora_modules, others, on_rank_0, write)
        else:
            # In the precision in which the next run or the server will hold it; the fp32 originals are in
            # train_state/.
            dtype = torch.float32
            if cfg.fp16_opt_level == "O2" and (cfg.bf16 or cfg.fp16):
                dtype = torch.bfloat16 if cfg.bf16 else torch.float16
            # A generator: one tensor in memory at a time.
            named = ((n, on_rank_0(n)) for n in everything)
            checkpoint.save_weights(
                temporary, named, write=write, convert=lambda n, tensor: rounded(n, tensor, dtype)
            )
            if write:
                config = {**built.model.config.raw, "torch_dtype": str(dtype).removeprefix("torch.")}
                checkpoint.write_json(temporary / "config.json", config)
                checkpoint.copy_side_files(run.directory, temporary)
        # Each rank writes its own shards; any other layout can read them.
        train_state.save_train_state(temporary, run.trainable, run.optimizer, run.state)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """ValueError for a value that `dtype` has not."""
    tensor = tensor.to(dtype)
    # fp16 ends at 65,504: a large weight would be saved as infinity.
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} has a value that {dtype} can't hold; use bf16=true; the last checkpoint stands"
        )
    return tensor


def check_finite(parameters: dict[str, nn.Parameter], step: int, world: parallel.World) -> None:  # all ranks
    """Before a checkpoint is made of them. What is so large that its
    square overflows is as bad as infinity."""
    # Each rank looks at its own shards; the verdict is everyone's.
    local = {n: p.to_local() if hasattr(p, "to_local") else p for n, p in parameters.items()}
    wrong = [n for n, p in local.items() if p.numel() and not float(p.detach().abs().amax()) < 1e18]
    if parallel.all_max(len(wrong), world):
        where = f" (first of them: {wrong[0]})" if wrong else ""
        raise ValueError(
            f"parameters are NaN, infinite or beyond 1e18 after step {step}{where}; nothing is saved of "
            "them, the last checkpoint stands; lower learning_rate or set max_grad_norm"
        )


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # Kilobytes on Linux; of the process, so its memory before the training too.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# The run


@dataclass
class Unread:
    """A step whose loss and gradient norm are still on the device."""

    record: dict  # of its line in the log, as far as the host knows it
    facts: Facts
    ids: list[str]  # of its samples on this rank
    waited: float  # seconds for data
    clock: float  # when it began
    sums: Tensor  # (num_datasets, K, 2)
    norm: Tensor  # ()


class Run:
    """The model, its optimiser and where they stand, and the loop over steps."""

    def __init__(
        self,
        cfg: Config,
        ready: Prepared,
        directory: Path,
        world: parallel.World,
        signals: Signals,
        kernels: str,
    ):
        # What a run is made of, in the order in which it came to be known.
        self.cfg, self.world, self.signals, self.directory = cfg, world, signals, directory
        self.autocast = autocast(cfg, world)  # what a forward pass runs in
        self.plan, self.eval_plan, self.probe_plan = ready.plan, ready.eval_plan, ready.probe_plan
        self.run_dir, self.state, self.total = ready.run_dir, ready.state, ready.total
        self.processor = ready.processor
        # Rank 0 speaks for all.
        self.say = print if world.main else (lambda *_a, **_k: None)
        self.out, self.entries = Path(cfg.output_dir), self.plan.index.entries
        # Units (samples or packs) of one update, on all ranks together.
        self.global_batch = self.state["facts"]["global_batch"]
        # Weights are loaded here; a mistake in keys or data has been said before.
        self.built = build(cfg, directory, world, stream_sizes(self.plan, cfg))
        self.model, definition = self.built.model, self.built.definition
        self.say(parameter_table(self.built.whole, definition.parts))
        if table := rates.table(self.built.whole, self.built.learning_rates, cfg):
            self.say(table)
        if self.built.stages is not None:
            self.say(f"pipeline stages, {cfg.pipeline_schedule}: {self.built.stages.describe()}")
        # Said at the start: a run on the wrong device or on plain kernels is seen in its first lines.
        threads = torch.get_num_threads()
        self.say(
            f"device {world.device.type} x {world.size}, kernels: {kernels}, {threads} threads", flush=True
        )
        self.optimizer = make_optimizer(self.model, cfg, self.built.learning_rates)
        self.scaler = LossScaler(cfg.fp16)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # Then a micro-batch without an image has no backward pass at all.
        self.images_only = all(checkpoint.matches(n, definition.image_parameters) for n in self.trainable)
        # Moments and counters, once there are parameters that they belong to.
        self.restore()
        # Encoded before the first step, while the tower is still needed nowhere else.
        self.features = None
        if cfg.cache_image_features:
            self.features = cache_features(
                self.model, definition, self.plan, self.processor, cfg, world, signals
            )
        self.log = None
        if world.main:
            self.run_dir.begin()
            self.log = Log(cfg, self.run_dir, self.start_step, self.total, self.state["evaluated"])
        self.named_bad, self.named_eval_bad = {}, {}
        self.unread: list[Unread] = []
        # For --benchmark: sums over the steps behind the warm-up.
        self.measured = {"samples": 0, "tokens": 0, "supervised": 0, "seconds": 0.0}

    def restore(self) -> None:
        """Continues from the checkpoint that was chosen."""
        start, state = self.run_dir.start, self.state
        self.start_step = self.saved_at = state["step"]
        if start.resume is None:
            return
        train_state.load_train_state(start.resume, self.trainable, self.optimizer)
        if state.get("scaler"):
            self.scaler.load(state["scaler"])
        elif state.get("scale"):  # of before the counters were saved
            self.scaler.scale = state["scale"]
        self.say(f"continuing from {start.resume} at step {state['step']}", flush=True)
        # Allowed, since a run may be continued with another learning rate; said, since it may be a slip.
        if changed := {k: v for k, v in start.changed.items() if k not in HARMLESS}:
            note(f"warning: continuing with other settings than the run began with: {shown(changed)}")
        # Without load_best_model_at_end the best is a number alone, which early stopping counts from.
        # Deleted by hand, it cannot be chosen at the end, and must not win against later ones.
        best = self.out / f"checkpoint-{state['best_step']}"
        if state["best_step"] and self.cfg.load_best_model_at_end and not best.is_dir():
            self.say(
                f"the best checkpoint so far, of step {state['best_step']}, is not in {self.out}: not counted"
            )
            state |= {"best_metric": None, "best_step": None, "since_best": 0}

    # -- one step

    def learning_rate(self, step: int, epoch: int) -> float:
        """Of the update that follows `step` finished ones; after a change of batch by the share of the data
        seen."""
        cfg, plan = self.cfg, self.plan
        # The usual case: one batch size all along, so steps say how far the run is.
        if plan.origin == (0, 0, 0) or cfg.max_steps is not None:
            return learning_rate_at(step, self.total, cfg, epoch)
        # As if the whole run had this batch: its steps, and how many of them the data seen so far would have
        # been.
        fresh = copy.copy(plan)
        fresh.origin = 0, 0, 0
        steps = fresh.total_steps(cfg.num_train_epochs, self.global_batch)
        ends = plan.ends(cfg.num_train_epochs, self.global_batch)
        at, first = plan.locate(step, self.global_batch)
        seen = sum(end for e, end in ends if e < at) + first
        return learning_rate_at(steps * seen / sum(end for _, end in ends), steps, cfg, epoch)

    def train_step(
        self, step: int, epoch: int, micro_batches: list[Batch], waited: float, clock: float
    ) -> int:
        """One update; returns the number of the signal that some rank got."""
        cfg, world, state = self.cfg, self.world, self.state
        # all ranks: what is summed here is divided by below
        facts = step_facts(self.model, micro_batches, self.signals.number, world)
        name_bad(micro_batches, self.named_bad, world)
        state["bad"] += facts.bad  # a record that is bad comes back in each epoch
        check_bad(state["bad"], max(len(self.plan.index), state["samples"]), cfg, "samples")
        # For messages: "file:line#id" of each sample of this rank.
        ids = [i for batch in micro_batches for i in batch.sample_ids]
        lr = self.learning_rate(step, epoch)
        # Bad records are counted and named; a step that has only such ones is no fault of the run.
        if facts.supervised == 0 and facts.bad:
            self.say(
                f"step {step + 1}: all its samples are left out, so nothing is learned in it", flush=True
            )
            self.settle()
            if self.log:
                self.log.write({"step": step + 1, "left_out": facts.bad})
            self.advance(step, 0, lr)
            return facts.signal
        if facts.supervised == 0:
            raise ValueError(f"step {step + 1} has no supervised token; its samples: {', '.join(ids)}")
        # A function of the step alone: nothing of the schedule is in a checkpoint.
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        # forward, backward: gradients of the mean over all ranks
        sums = forward_backward(self, micro_batches, facts)
        # all ranks: every one sees the loss of all, and stops or goes on with them
        parallel.all_sum(sums)
        if self.built.stages is not None:
            self.built.stages.from_last(sums)
        norm = clip_and_step(
            self.trainable,
            self.optimizer,
            cfg.max_grad_norm,
            self.scaler,
            world,
            self.built.stages,
            loss=means(sums.sum(0)).sum(),
        )
        self.advance(step, facts.samples, lr)
        record = {"step": step + 1, "epoch": epoch, "lr": lr}
        self.unread.append(Unread(record, facts, ids, waited, clock, sums, norm))
        # The first two steps warm up: their time is theirs alone.
        if (step + 1) % cfg.logging_steps == 0 or step + 1 == self.total or step < self.start_step + 2:
            self.settle()
        return facts.signal

    def settle(self) -> None:
        """Reads what the last steps left on the device, in one wait, and logs it. A loss or gradient that is
        not finite stops the run here, before anything is made of the parameters: the update was left out."""
        if not self.unread:
            return
        unread, self.unread = self.unread, []
        read = torch.stack([torch.cat((u.sums.flatten(), u.norm.view(1))) for u in unread]).cpu()
        # A step's own time is unknown on a device that works on its own: the steps share theirs.
        seconds = (time.perf_counter() - unread[0].clock) / len(unread)
        for u, values in zip(unread, read, strict=True):
            sums, norm = values[:-1].view(u.sums.shape), float(values[-1])
            loss, step = float(means(sums.sum(0)).sum()), u.record["step"]
            wrong = "loss" if not math.isfinite(loss) else "gradient"
            # fp16 takes a smaller loss scale and goes on
            if wrong == "loss" or not math.isfinite(norm) and not self.cfg.fp16:
                raise ValueError(
                    f"the {wrong} of step {step} is {loss if wrong == 'loss' else norm}; its samples: "
                    f"{', '.join(u.ids)}; the last checkpoint stands"
                )
            facts = u.facts
            record = {
                **u.record,
                "loss": loss,
                "grad_norm": norm,
                "ms": 1000 * seconds,
                "tokens": facts.tokens,
                "tokens_per_s": facts.tokens / seconds / self.world.size,
                "supervised": facts.supervised / facts.tokens,
                "data": u.waited / seconds,
                "mem_gib": peak_memory_gib(self.world.device),
            }
            self.note(record, sums)
            if step > self.start_step + 2:
                sizes = facts.samples, facts.tokens, facts.supervised, seconds
                for key, value in zip(self.measured, sizes, strict=True):
                    self.measured[key] += value

    def advance(self, step: int, num_samples: int, lr: float) -> None:
        """The run stands behind this step now."""
        at, first = self.plan.locate(step, self.global_batch)
        # The last step of an epoch may take fewer units than a batch.
        first += min(self.global_batch, self.plan.count(at) - first)
        self.state |= {
            "step": step + 1,
            "epoch": at,
            "units": first,
            "total_steps": self.total,
            "learning_rate": lr,
        }
        self.state["samples"] += num_samples

    def note(self, record: dict, sums: Tensor) -> None:
        """A step's line in the log; `sums` (num_datasets, K, 2) of its losses."""
        if not self.log:
            return
        if len(self.entries) > 1:
            pairs = zip(self.entries, sums, strict=True)
            # Of one entry alone it would be the loss itself.
            record["loss_by_dataset"] = {e.label: float(means(x).sum()) for e, x in pairs if x[:, 1].any()}
        record |= {f"loss_{k}": v for k, v in named_losses(self.model, sums.sum(0)).items()}
        self.log.step(record)

    # -- between steps

    def due(self, strategy: str, every: int) -> bool:
        """Whether to save or evaluate behind the step that the run stands at."""
        # Behind the update: the run stands at the next step already.
        step = self.state["step"]
        if strategy == "epoch":
            # By units of data, not by steps: another batch size ends the epoch at the same sample.
            ended = self.state["units"] == self.plan.count(self.state["epoch"])
            return step == self.total or ended
        return strategy == "steps" and step % every == 0

    def save(self) -> None:  # all ranks
        self.settle()
        state, cfg = self.state, self.cfg
        if not state["samples"]:
            raise ValueError(
                f"no sample could be loaded in {state['step']} steps (listed above): nothing was learned, "
                "nothing is saved"
            )
        # all ranks: NaN must not replace a checkpoint that is good
        check_finite(self.trainable, state["step"], self.world)
        if cfg.fp16:
            state["scaler"] = self.scaler.state()
        path = self.out / f"checkpoint-{state['step']}"
        if self.world.main:
            # The log first: a checkpoint that a kill leaves behind must not be ahead of it.
            self.run_dir.before_save()
        save_checkpoint(path, self)
        if self.world.main:
            self.run_dir.after_save()
            self.log.path = self.run_dir.log_path()
        # Validate, then delete: older ones go when this one is whole.
        self.rotate()
        self.saved_at = state["step"]
        self.say(f"saved {path}", flush=True)

    def rotate(self) -> None:
        if self.world.main:
            steps = (self.state["best_step"], self.state["step"])
            # Never the best one nor the newest, whatever the limit.
            keep = {self.out / f"checkpoint-{step}" for step in steps if step}
            checkpoint.rotate(self.out, self.cfg.save_total_limit, keep=keep, own=self.run_dir.belongs)

    def scores(self, plan: data.Plan) -> dict[str, float]:  # all ranks
        alone = self.world.size == 1
        self.settle()
        try:
            # One process may stop anywhere; of several, all or none (break_off).
            with self.signals.breakable(alone):
                result = evaluate_loss(self, plan)
                if self.cfg.eval_with_do_generation:
                    result |= generation_scores(self, plan, None if alone else self.break_off)
        finally:
            # Whatever broke it off: whole weights would stay in memory, and dropout off.
            parallel.reshard(self.model)
            self.model.train()
        return result

    def evaluate(self, final: bool = False) -> dict[str, float]:  # all ranks
        result = self.scores(self.eval_plan)
        self.say("evaluation | " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()), flush=True)
        if self.log:
            self.log.write({"step": self.state["step"], **result, **({"final": True} if final else {})})
        return result

    def break_off(self) -> None:  # all ranks
        if stop := parallel.all_max(self.signals.number, self.world):
            raise Stopped(stop)

    def judge(self, value: float) -> None:
        """Takes the step for the best one if its score is; its checkpoint learns of the evaluation."""
        # A loss is better when it is lower, every score when it is higher.
        state, lower = self.state, self.cfg.metric_for_best_model == "eval_loss"
        best = state["best_metric"]
        if not math.isfinite(value):
            note(f"warning: {self.cfg.metric_for_best_model} is {value}: never the best")
        # Ties keep the earlier one.
        elif best is None or (value < best if lower else value > best):
            state |= {"best_metric": value, "best_step": state["step"]}
        state["evaluated"] = True
        state["since_best"] = 0 if state["best_step"] == state["step"] else state["since_best"] + 1
        # Saved before it was judged: its file learns of the result, or a restart would evaluate once more.
        if self.saved_at == state["step"] and self.world.main:
            path = self.out / f"checkpoint-{state['step']}" / "trainer_state.json"
            if path.exists():
                files = schema.read_json(path, "").get("train_state", {})
                checkpoint.write_json(path, {**state, "train_state": files})
        if state["best_step"] == state["step"] and self.saved_at == state["step"]:
            self.rotate()

    def after_step(self, stop: int) -> None:
        """Saves, then evaluates. Raises Stopped behind a signal, once the step is saved."""
        cfg, state = self.cfg, self.state
        evaluates = self.due(cfg.evaluation_strategy, cfg.eval_steps or cfg.save_steps)
        state["evaluated"] = not evaluates
        if cfg.sample_steps and state["step"] % cfg.sample_steps == 0:
            watch.show_answers(self)
        # Save before evaluating: an evaluation that fails or is killed costs no training.
        if self.due(cfg.save_strategy, cfg.save_steps) or (stop and cfg.save_strategy != "no"):
            self.save()
        if stop:
            raise Stopped(stop)
        if evaluates:
            self.judge(self.evaluate()[cfg.metric_for_best_model])

    def train(self) -> int:
        cfg, state = self.cfg, self.state
        sizes = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
        deal, steps = (
            data.Deal(self.world.dp_rank, self.world.dp_size, *sizes),
            range(self.start_step, self.total),
        )
        options = cfg.num_workers, cfg.image_jitter, self.features
        loader = data.TrainLoader(self.plan, self.processor, steps, deal, *options)
        self.model.train()
        try:
            if not state["evaluated"] and cfg.do_train and self.eval_plan is not None:  # it was killed before
                self.judge(self.evaluate()[cfg.metric_for_best_model])
            watch.begin_probe(self)
            # From here to the next reading: waiting for data, then the step.
            clock = time.perf_counter()
            # THE LOOP. Workers prepare the next micro-batches while this step computes.
            for step, epoch, micro_batches in loader if cfg.do_train and not watch.stops_early(self) else ():
                stop = self.train_step(step, epoch, micro_batches, time.perf_counter() - clock, clock)
                # Saving and evaluating are no part of the next step's time.
                clock = time.perf_counter()
                self.after_step(stop)
                clock = time.perf_counter() if self.saved_at == step + 1 else clock
                if cfg.early_stopping_patience is not None and watch.stops_early(self):
                    break
            # The final model is a checkpoint like any other, published in the output directory itself.
            self.finish()
        except Stopped as e:
            return self.stopped(e.number)
        return 0

    def stopped(self, number: int) -> int:  # all ranks
        cfg, step = self.cfg, self.state["step"]
        self.settle()
        if cfg.save_strategy != "no" and cfg.do_train and self.saved_at != step:
            self.save()
        # SIGTERM, SIGINT, ...: a cluster's own words in the log.
        name = signal.Signals(number).name
        if cfg.save_strategy == "no" or not cfg.do_train:
            then = "nothing is saved (save_strategy=no)" if cfg.do_train else "nothing was trained"
        elif step == 0:
            then = "nothing is saved yet; the same command begins again"
        else:
            then = f"{self.out / f'checkpoint-{step}'} is saved; the same command continues from there"
        self.say(f"stopped by {name} after step {step}: {then}", flush=True)
        # As a shell reports it: a scheduler sees that it was a signal.
        return 128 + number

    def finish(self) -> None:
        """The final model is saved, chosen, evaluated and published."""
        cfg, state, out = self.cfg, self.state, self.out
        self.settle()
        saving = cfg.do_train and cfg.save_strategy != "no"
        # The last step is a checkpoint even where save_steps does not divide it.
        if saving and (self.saved_at != state["step"] or not (out / f"checkpoint-{state['step']}").is_dir()):
            self.save()
        final = state["step"]
        if cfg.load_best_model_at_end and state["best_step"]:
            final = state["best_step"]
            best = out / f"checkpoint-{final}"
            # Evaluated below as it will be published.
            train_state.load_train_state(best, self.trainable, self.optimizer)
            self.say(f"best model: {best} with {cfg.metric_for_best_model} {state['best_metric']:.4f}")
        elif cfg.load_best_model_at_end:
            self.say("no evaluation gave a number: the last model stands for the best one", flush=True)
        if cfg.do_eval:
            self.evaluate(final=True)
        watch.end_probe(self)
        if saving and self.world.main:
            draw_loss(self.log.path, out / "loss.png")
            self.run_dir.finish(out / f"checkpoint-{final}", state["step"])
        if self.log:
            self.log.close()
        self.tell_end(saving)

    def tell_end(self, saving: bool) -> None:
        cfg, measured, out = self.cfg, self.measured, self.out
        if cfg.benchmark and measured["seconds"]:
            s = measured["seconds"]
            self.say(
                f"benchmark | {measured['samples'] / s:.2f} samples/s | {measured['tokens'] / s:,.0f} "
                f"tokens/s | {measured['supervised'] / s:,.0f} supervised tokens/s | peak memory "
                f"{peak_memory_gib(self.world.device):.2f} GiB"
            )
        elif not cfg.skip_memory_metrics:
            self.say(f"peak memory {peak_memory_gib(self.world.device):.2f} GiB")
        if saving and cfg.lora:
            merged = shlex.quote(terminal.free_name("merged", out))
            start = f"{terminal.script('merge.py')} --lora_path {shlex.quote(str(out))}"
            self.say(f"adapter: {out}\nnext: {start} --merge_model_path {merged}")
        elif saving:
            example = terminal.example_request(self.plan.index.conversation(0), self.processor)
            start = f"{terminal.script('generate.py')} --model_name_or_path {shlex.quote(str(out))}"
            self.say(f"model: {out}\nnext: {start} {example}")
        elif cfg.do_train:
            self.say("nothing is saved (save_strategy=no)")


# --------------------------------------------------------------------------------------------------
# From the command line to the loop


def run(cfg: Config, definition, directory: Path, meeting: Meeting, signals: Signals | None = None) -> int:
    # What runs before there is a process group: reading, comparing, refusing.
    kernels = dispatch.use_flash_attention(cfg.use_flash_attention, meeting.device)
    signals, run_dir, doing = signals or Signals(), RunDir(cfg), "records were read"
    try:
        with signals.breakable():
            ready = prepare(cfg, definition, directory, meeting, run_dir)
            if is_finished(ready, cfg):
                if meeting.main:
                    print(
                        f"{cfg.output_dir} holds a finished run of {run_dir.start.finished} steps; set "
                        "overwrite_output_dir to train anew"
                    )
                return 0
        doing = "the model was built"
        with signals.breakable(meeting.size == 1):
            world = parallel.init_world(*cfg.degrees, meeting)
            facts = {**ready.state["facts"], "checkpoint": run_dir.start.resume, "total steps": ready.total}
            rows = hashlib.sha256(ready.plan.index.rows.tobytes()).hexdigest()[:16]
            # all ranks: the same data, settings and checkpoint everywhere, or one line and the end
            parallel.compare(
                {**facts, "length index": rows, "settings": json.dumps(asdict(cfg), sort_keys=True)}
            )
            training = Run(cfg, ready, directory, world, signals, kernels)
        code = training.train()
        meeting.part()  # all ranks: the others wait while rank 0 publishes
        return code
    except Stopped as e:
        name = signal.Signals(e.number).name
        meeting.fail(f"stopped by {name}")
        if meeting.main:
            print(f"stopped by {name} while {doing}; nothing of this start is saved", flush=True)
        return 128 + e.number
    except (RuntimeError, MemoryError, ValueError, OSError) as e:
        meeting.fail(one_line(e))
        raise
    finally:
        run_dir.unlock()


def main(argv: list[str] | None = None) -> int:
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    if cfg.dataset is not None and not cfg.dataset.get("train"):
        raise ValueError('dataset has no "train" entries; expected {"train": [entry, ...]}')
    if cfg.do_train and not cfg.dry_run:
        check_eval_use(cfg)
    check_adapter(cfg)
    config, definition, directory = model_file(cfg)
    if cfg.fp16:
        definition.check_dtype(config, torch.float16)
    if directory is None and not cfg.dry_run:
        raise ValueError(
            f"{cfg.model_name_or_path} is a shape without weights or tokenizer, for --dry_run; "
            "give a checkpoint directory (config.json, weights, tokenizer)"
        )
    if cfg.dry_run:
        return dry_run(cfg, config, definition, directory)
    with Signals() as signals:
        meeting = Meeting()
        meeting.pressed = signals.came
        meeting.on_loss = lambda reason: end_now(f"another rank is gone ({reason}); {goes_on(cfg)}")
        try:
            return run(cfg, definition, directory, meeting, signals)
        except (RuntimeError, MemoryError, ValueError, OSError) as e:
            if (clear := explained(e, cfg)) is None:
                raise
            raise clear from None
        finally:
            meeting.over = True
            parallel.leave_world()


def dry_run(cfg: Config, config: dict, definition: vlm.Model, directory: Path | None) -> int:
    """Prints what the run would need (estimate.py). A preset has no tokenizer, so no data: full streams."""
    check_stage(cfg, definition)
    definition.check_stage(cfg.stage, config)
    plan = None
    if directory is not None:
        entries = (cfg.dataset or data.DEFAULT_DATASET)["train"]
        processor = definition.processor(directory, cfg.stage)
        options = {"progress": False, "max_bad_samples": cfg.max_bad_samples}
        index = data.build_index(entries, processor, cfg.max_length, None, cfg.num_workers, **options)
        plan = data.Plan(index, cfg.seed, cfg.max_length, cfg.mixtoken, cfg.max_images)
    degrees = max(1, cfg.tensor_parallel_degree) * max(1, cfg.pipeline_parallel_degree)
    shards = max(1, cfg.sharding_parallel_degree or 1) if cfg.sharding else 1
    world_size = int(os.environ.get("WORLD_SIZE", degrees * shards))
    if terminal.is_main():
        print(estimate.dry_run(cfg, config, definition, plan, world_size))
    return 0


def end_now(reason: str) -> None:
    """From a thread, where the main one waits for ever in a collective."""
    os.write(2, f"error: [rank {os.environ.get('RANK', 0)}] {one_line(reason)}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    terminal.leave(terminal.cli(main))
