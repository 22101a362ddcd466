"""Every training stage in one loop: pre-training, SFT and LoRA differ by configuration only.

    torchrun train.py --model qwen_vl --lora  # the tiny model and data in samples/
    torchrun --nproc_per_node 8 train.py configs/qwen_vl/sft.json --learning_rate 2e-5
    python train.py configs/qwen_vl/sft.json --dry_run  # memory, steps and FLOPs, nothing loaded

Keys come from JSON files and `--key value` (config.py). Losses are sums over supervised tokens, divided by
their number over all micro-batches and ranks, so batch x accumulation x processes may be split in any way.
Killed at any point, the same command continues from the last checkpoint with the same losses (run_dir.py).
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint
import data
import estimate
import lora
import metrics
import parallel
import terminal
import vlm
from build import (
    autocast,
    build,
    check_adapter,
    check_stage,
    make_optimizer,
    matches,
    model_file,
    parameter_table,
    stream_sizes,
    total_steps,
)
from config import Config, differences, parse_config
from draw import draw_loss
from features import cache_features
from kernels import dispatch
from records import one_line
from run_dir import HARMLESS, Log, RunDir, Signals, Start, Stopped, read_state, shown
from vlm import Batch

# --------------------------------------------------------------------------------------------------
# Learning rate and loss scale


def learning_rate_at(step: int, total: int, cfg: Config, epoch: int = 0) -> float:
    """Of the update that follows `step` finished ones."""
    warmup = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)
    if cfg.lr_scheduler_type == "cosine_epochs":  # warm-up ends with the first epoch at the latest
        if epoch == 0:
            warmed = cfg.warmup_start_lr + (cfg.learning_rate - cfg.warmup_start_lr) * step / max(warmup, 1)
            return min(cfg.learning_rate, warmed)
        shape = (1 + math.cos(math.pi * epoch / cfg.num_train_epochs)) / 2
        return cfg.eta_min + (cfg.learning_rate - cfg.eta_min) * shape
    if step < warmup:
        return cfg.warmup_start_lr + (cfg.learning_rate - cfg.warmup_start_lr) * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        cfg.lr_scheduler_type
    ]
    return cfg.eta_min + (cfg.learning_rate - cfg.eta_min) * shape


class LossScaler:
    """Dynamic loss scale for fp16: halved when a gradient overflows, doubled after 2,000 good steps."""

    def __init__(self, enabled: bool):
        self.scale, self.good, self.skipped, self.enabled = (2.0**16 if enabled else 1.0), 0, 0, enabled

    def state(self) -> dict:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state: dict) -> None:
        self.scale, self.good, self.skipped = state["scale"], state["good"], state["skipped"]

    def update(self, finite: bool) -> None:
        self.good, self.skipped = (self.good + 1, 0) if finite else (0, self.skipped + 1)
        if not self.enabled:
            return
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good % 2000 == 0:
            self.scale *= 2
        if self.skipped >= 25:
            raise ValueError("25 steps in a row overflowed in fp16; use bf16=true, or a lower learning_rate")


# --------------------------------------------------------------------------------------------------
# Steps


def to_device(batch: Batch, device: torch.device, blank_image: bool, image_size) -> Batch:
    """Moves a batch. A rank without an image gets a blank one where another rank has one: the weights of a
    sharded tower are gathered by all ranks together."""
    batch = batch.to(device)
    if blank_image and not batch.has_images:
        pixels = vlm.blank_image(image_size)[None].to(device)
        keys = torch.zeros(1, dtype=torch.int64, device=device)
        batch = replace(batch, pixel_values=pixels, image_dropout_keys=keys)
    return batch


def losses_by_dataset(batch: Batch, losses: Tensor, num_datasets: int) -> Tensor:
    """(num_datasets, K, 2) fp64: sum and count of each of the model's K losses by dataset entry.

    `losses`: each supervised token's own (K = 1), or (S, K, 2) sums and counts of the segments.
    """
    if losses.ndim == 1:
        rows = batch.supervised
        segments = torch.bucketize(rows, batch.cu_seqlens[1:].to(rows.device), right=True)
        index = batch.dataset_ids[segments]
        losses = torch.stack((losses.double(), torch.ones_like(losses).double()), dim=1)[:, None]
    else:
        index, losses = batch.dataset_ids, losses.double()
    out = torch.zeros(num_datasets, *losses.shape[1:], dtype=torch.float64, device=losses.device)
    return out.index_add_(0, index, losses)


def named_losses(model: nn.Module, sums: Tensor) -> dict[str, float]:
    """Each of a model's several losses by its name; (K, 2) sums and counts."""
    return dict(zip(model.LOSSES, means(sums).tolist(), strict=False))


def means(sums: Tensor) -> Tensor:
    """(..., K, 2) sums and counts -> (..., K), zero where nothing was counted."""
    return sums[..., 0] / sums[..., 1].clamp(min=1)


def step_facts(
    model: nn.Module, micro_batches: list[Batch], signalled: int, world: parallel.World
) -> tuple[list[int], int, int, int, list[bool]]:  # all ranks
    """What all ranks hold together: counts of the losses, supervised tokens, bad samples, a signal's number,
    which rounds have pictures."""
    counts = [sum(column) for column in zip(*(model.loss_counts(b) for b in micro_batches), strict=True)]
    sums = [*counts, sum(b.num_supervised for b in micro_batches), sum(len(b.bad) for b in micro_batches)]
    maxima = [signalled, *(b.pixel_values is not None for b in micro_batches)]
    if world.size > 1:
        sums = parallel.all_sum(torch.tensor(sums)).tolist()
        maxima = parallel.all_max(torch.tensor(maxima, dtype=torch.int64), world).tolist()
    return sums[:-2], sums[-2], sums[-1], maxima[0], [bool(x) for x in maxima[1:]]


def name_bad(micro_batches: list[Batch], named: dict, world: parallel.World) -> None:
    """Says what could not be loaded, once for each record. One of the
    ranks that see the same data says it."""
    for where, reason in [pair for batch in micro_batches for pair in batch.bad]:
        if where not in named and world.tp_rank == world.pp_rank == 0:
            print(f"warning: left out {where}: {reason}", file=sys.stderr, flush=True)
        named[where] = reason


def check_bad(bad: int, tried: int, cfg: Config, what: str) -> None:
    if bad > cfg.max_bad_samples * tried:
        raise ValueError(
            f"{bad} of {tried} {what} could not be loaded (listed above), "
            f"max_bad_samples={cfg.max_bad_samples:g} "
            f"allows {int(cfg.max_bad_samples * tried)}"
        )


def forward_backward(
    model,
    micro_batches,
    has_images,
    counts,
    cfg,
    world,
    scaler,
    num_datasets,
    image_size,
    pictures_only=False,
    stages=None,
) -> Tensor:
    """Gradients of the mean loss over the whole step, a sum of means where the model has several. Returns
    (num_datasets, K, 2) of this rank: loss sums and counts. `pictures_only`: nothing but what pictures pass
    is trained here; `stages`: the Pipeline, if the model is cut."""
    sums = torch.zeros(num_datasets, len(counts), 2, dtype=torch.float64, device=world.device)
    weights = torch.tensor([world.dp_size / max(n, 1) * scaler.scale for n in counts], device=world.device)
    if (
        stages is not None
    ):  # as many micro-batches of one length in each step; the pictures are the first stage's
        empty = cfg.gradient_accumulation_steps - len(micro_batches)
        micro_batches = [
            *micro_batches,
            *(data.collate([], (), model.num_image_tokens) for _ in range(empty)),
        ]
        length = max(len(b.input_ids) for b in micro_batches)
        micro_batches = [data.pad_stream(b, length) for b in micro_batches]
        has_images = [*has_images, *[False] * empty]
    count, on_device = len(micro_batches), {}
    with_gradient = [i for i in range(count) if has_images[i] or not pictures_only]

    def prepare(i: int) -> None:
        """Before the backward pass of micro-batch i."""
        parallel.set_gradient_sync(model, cfg.sharding, last=i == max(with_gradient, default=-1))

    def forward(i: int, x: Tensor | None = None, blocks=None, last: bool = True) -> Tensor:
        if i not in on_device:
            on_device[i] = to_device(micro_batches[i], world.device, has_images[i], image_size)
        batch = on_device[i]
        with autocast(cfg, world):
            if not last:
                return model(batch, "hidden", x, blocks)
            loss_sum, losses = model(batch, x=x, blocks=blocks)
        sums.add_(losses_by_dataset(batch, losses, num_datasets))
        # sharded gradients are averaged over ranks: times their number, divided by the counts of all
        return (loss_sum * weights).sum()

    if stages is not None:
        stages.run(forward, count, length, prepare)
        parallel.reshard(model)
        return sums
    for i in range(count):
        loss = forward(i)
        if loss.requires_grad:  # not without a picture if only the vision tower is trained
            prepare(i)
            loss.backward()
        del on_device[i]
    parallel.reshard(model)  # a micro-batch without a backward pass may have come last
    return sums


def clip_and_step(
    parameters: dict[str, nn.Parameter],
    optimizer,
    max_grad_norm: float,
    scaler: LossScaler,
    world: parallel.World,
    stages=None,
) -> float:  # all ranks
    """One update; returns the gradient norm before clipping. A trainable parameter that got no gradient has a
    zero one."""
    for p in parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if stages is not None:
        stages.sum_shared_gradients(parameters)
    counted = [p for n, p in parameters.items() if stages is None or stages.counts_here(n)]
    norm = parallel.gradient_norm(counted, world) / scaler.scale
    finite = math.isfinite(norm)
    if finite:
        factor = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
        if parameters and (factor != 1.0 or scaler.scale != 1.0):  # a frozen pipeline stage has none
            torch._foreach_mul_([p.grad for p in parameters.values()], factor / scaler.scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scaler.update(finite)
    return norm


@torch.no_grad()
def evaluate_loss(
    model,
    plan,
    processor,
    cfg: Config,
    world,
    stages=None,
    signals: Signals | None = None,
    bad: dict | None = None,
) -> dict[str, float]:  # all ranks
    """Mean loss over the supervised tokens of the eval set, and of each of its entries. A signal breaks it
    off on all ranks. `bad` {where: reason}: records that could not be loaded, named already; more are added.
    """
    bad = {} if bad is None else bad
    model.eval()
    steps = plan.steps_per_epoch(cfg.per_device_eval_batch_size * world.dp_size)
    loader = data.TrainLoader(
        plan,
        processor,
        start_step=0,
        total_steps=steps,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        per_device_batch=cfg.per_device_eval_batch_size,
        num_workers=cfg.num_workers,
    )
    kept: list[Tensor] = []
    sums = torch.zeros(len(plan.index.entries), len(model.LOSSES), 2, dtype=torch.float64)
    num_bad = 0
    for _, _, micro_batches in loader:
        number = signals.number if signals else 0
        _, _, count, stop, has_images = step_facts(model, micro_batches, number, world)
        if stop:
            raise Stopped(stop)
        name_bad(micro_batches, bad, world)
        num_bad += count
        batch = to_device(micro_batches[0], world.device, has_images[0], processor.image_size)

        def forward(
            _i: int, x: Tensor | None = None, blocks=None, last: bool = True, batch=batch
        ) -> Tensor | None:
            with autocast(cfg, world):
                if not last:
                    return model(batch, "hidden", x, blocks)
                loss_sum, losses = model(batch, x=x, blocks=blocks)
            kept.append(losses_by_dataset(batch, losses, len(plan.index.entries)))
            return loss_sum

        if stages is None:
            forward(0)
        else:
            stages.run(forward, 1, len(batch.input_ids))
        if cfg.eval_accumulation_steps and len(kept) == cfg.eval_accumulation_steps:
            sums += sum(kept).cpu()
            kept.clear()
    sums = parallel.all_sum(sums + sum(kept).cpu() if kept else sums)
    if stages is not None:
        stages.from_last(sums)
    check_bad(num_bad, len(plan.index), cfg, "eval samples")
    if not sums[..., 1].sum():
        raise ValueError("the eval set has no supervised token")
    result = {"eval_loss": float(means(sums.sum(0)).sum())}
    result |= {f"eval_loss_{k}": v for k, v in named_losses(model, sums.sum(0)).items()}
    if len(sums) > 1:
        pairs = zip(plan.index.entries, sums, strict=True)
        result |= {f"eval_loss/{e.label}": float(means(x).sum()) for e, x in pairs if x[:, 1].any()}
    return result


def generation_scores(model, index: data.Index, processor, cfg: Config, after_each=None) -> dict[str, float]:
    """The eval entries' own metrics (eval_cider, eval_vqa_accuracy, eval_accuracy, ...) of greedy answers.
    all ranks answer all questions: a sharded model is entered together. Questions whose image cannot be read
    are named and left out; ValueError for more than max_bad_samples."""
    import evaluate  # it imports generate.py, which training alone needs not

    questions = evaluate.merge_references(
        [index.conversation(n) for n in range(len(index))], index.entry.tolist()
    )
    how = evaluate.Decoding(max_new_tokens=32)
    bad: list[tuple[str, str]] = []
    answers = []
    for text in evaluate.answer_all(model, processor, questions, cfg.per_device_eval_batch_size, how, bad):
        answers.append(text)
        if after_each:
            after_each()
    evaluate.check_bad(bad, len(questions), cfg.max_bad_samples, "questions of the evaluation")
    questions, answers = evaluate.answered(questions, answers)
    return {f"eval_{name}": value for name, value in evaluate.score(questions, answers)[0].items()}


# --------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    path, model, whole, definition, optimizer, cfg, directory, lora_modules, state, world, stages
) -> None:  # all ranks
    """A whole checkpoint: weights (or the adapter) as a loadable
    directory, and the state to continue from."""
    parameters, everything = dict(model.named_parameters()), dict(whole.named_parameters())
    trainable = {n: p for n, p in parameters.items() if p.requires_grad}

    def full_tensor(name: str) -> Tensor:
        if stages is not None:
            return stages.whole_tensor(name, parameters, everything[name])
        return checkpoint.full_tensor(parameters[name])

    with checkpoint.atomic_dir(path, world.rank) as temporary:
        if cfg.lora:
            lora.save_adapter(
                temporary,
                whole,
                directory,
                cfg.lora_rank,
                cfg.lora_alpha,
                cfg.lora_dropout,
                lora_modules,
                extra_trained=[n for n, p in everything.items() if p.requires_grad and ".lora_" not in n],
                tensors=full_tensor,
                write=world.main,
            )
        else:
            dtype = torch.float32
            if cfg.fp16_opt_level == "O2" and (cfg.bf16 or cfg.fp16):
                dtype = torch.bfloat16 if cfg.bf16 else torch.float16
            named = ((n, rounded(n, full_tensor(n), dtype)) for n in everything)
            checkpoint.save_weights(temporary, named, write=world.main)
            if world.main:
                config = {**model.config.raw, "torch_dtype": str(dtype).removeprefix("torch.")}
                checkpoint.write_json(temporary / "config.json", config)
                checkpoint.copy_side_files(directory, temporary)
        checkpoint.save_train_state(temporary, trainable, optimizer, state)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """ValueError for a value that `dtype` has not."""
    tensor = tensor.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} has a value that {dtype} can't hold; use bf16=true; the last checkpoint stands"
        )
    return tensor


def check_finite(parameters: dict[str, nn.Parameter], step: int, world: parallel.World) -> None:  # all ranks
    """Before a checkpoint is made of them. What is so large that its
    square overflows is as bad as infinity."""
    local = {n: p.to_local() if hasattr(p, "to_local") else p for n, p in parameters.items()}
    wrong = [n for n, p in local.items() if p.numel() and not float(p.detach().abs().amax()) < 1e18]
    if int(parallel.all_max(torch.tensor([len(wrong)]), world)):
        where = f" (first of them: {wrong[0]})" if wrong else ""
        raise ValueError(
            "parameters are NaN, infinite or beyond 1e18 after step "
            f"{step}{where}; nothing is saved of them, "
            "the last checkpoint stands; lower learning_rate or set max_grad_norm"
        )


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# The run


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
            "give a checkpoint directory (config.json, weights, qwen.tiktoken)"
        )
    if cfg.dry_run:
        check_stage(cfg, definition)
        plan = None
        if directory is not None:
            processor = definition.processor(directory, cfg.stage)
            index = data.build_index(
                (cfg.dataset or data.DEFAULT_DATASET)["train"],
                processor,
                cfg.max_length,
                None,
                cfg.num_workers,
                False,
                cfg.max_bad_samples,
            )
            plan = data.Plan(index, cfg.seed, cfg.max_length, cfg.mixtoken, cfg.max_images)
        degrees = max(1, cfg.tensor_parallel_degree) * max(1, cfg.pipeline_parallel_degree)
        shards = max(1, cfg.sharding_parallel_degree or 1) if cfg.sharding else 1
        world_size = int(os.environ.get("WORLD_SIZE", degrees * shards))
        if os.environ.get("RANK", "0") == "0":
            print(estimate.dry_run(cfg, config, definition, plan, world_size))
        return 0
    with Signals() as signals:
        try:
            return run(cfg, definition, directory, parallel.Meeting(), signals)
        except (RuntimeError, MemoryError, ValueError, OSError) as e:
            if (clear := explained(e, cfg)) is None:
                raise
            raise clear from None
        finally:
            parallel.leave_world()


def check_eval_use(cfg: Config) -> None:
    """Says that evaluation data stand unused; an unused file that is not there is refused like a used one."""
    entries = (cfg.dataset or {}).get("eval") or []
    if not entries or cfg.do_eval or cfg.evaluation_strategy != "no":
        return
    for entry in entries:
        files = entry["data_files"]
        for path in [files] if isinstance(files, str) else files:
            if not os.path.exists(path):
                raise ValueError(
                    f"data_files: no file {path} (working directory {os.getcwd()}), in the eval entries"
                )
    if os.environ.get("RANK", "0") == "0":
        held = "the records that eval_split holds back" if entries[0].get("eval_part") else "the eval entries"
        print(
            f"warning: {held} are not evaluated in this run; --evaluate epoch or --do_eval true does so",
            file=sys.stderr,
        )


def explained(error: BaseException, cfg: Config) -> Exception | None:
    """What a dead rank, a dead data worker or a full memory means to the user; None for another error."""
    text = one_line(error)
    last = checkpoint.last_checkpoint(cfg.output_dir)
    then = (
        f"the same command continues from {last}"
        if last
        else "the same command begins anew: no checkpoint yet"
    )
    if worker := re.search(r"DataLoader worker [^;]*?(killed by signal: \w+|exited unexpectedly)", text):
        return ValueError(f"a data worker died (out of memory?): {worker[0]}; lower num_workers; {then}")
    if isinstance(error, ValueError | OSError):
        return None
    if (reason := parallel.lost_rank(error)) is not None:
        return ConnectionError(
            f"another rank is gone ({reason}): it was killed, or stopped with an "
            f"error that it printed; {then}, and "
            "torchrun --max-restarts does so by itself"
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ValueError(
            f"out of memory ({text[:200]}); lower per_device_train_batch_size or max_length, or set "
            f"recompute=true or sharding=stage3; {then}"
        )
    return None


@dataclass
class Prepared:
    """What all ranks know before they are a process group."""

    processor: object
    plan: data.Plan
    eval_plan: data.Plan | None
    run_dir: RunDir
    state: dict  # where the run stands: trainer_state.json
    total: int  # steps of the run


def read_plan(
    cfg: Config, split: str, processor, meeting: parallel.Meeting, **options
) -> data.Plan:  # all ranks
    dataset = cfg.dataset or data.DEFAULT_DATASET
    if not dataset.get(split):
        raise ValueError(f"dataset has no {split!r} entry")
    progress = meeting.main and not cfg.disable_tqdm
    folder = Path(cfg.output_dir) / "index"
    args = dataset[split], processor, cfg.max_length, folder, cfg.num_workers, progress
    if not meeting.main:  # the others read what rank 0 measured
        meeting.share(f"{split} index")
    index = data.build_index(*args, max_bad_samples=cfg.max_bad_samples)
    if meeting.main:
        meeting.share(f"{split} index", "made")
        data.say_unused_keys(index.entries)
        for where, reason in index.problems[:10]:
            print(f"warning: left out {where}: {reason}", file=sys.stderr)
        if cut := int(index.truncated.sum()):
            print(
                f"warning: {cut:,} of {len(index):,} {split} samples exceed "
                f"max_length={cfg.max_length} and are cut",
                file=sys.stderr,
            )
    return data.Plan(index, cfg.seed, cfg.max_length, cfg.mixtoken, cfg.max_images, **options)


def check_metric(cfg: Config, eval_plan: data.Plan) -> None:
    kinds = {
        eval_plan.index.conversation(n).kind for n in np.unique(eval_plan.index.entry, return_index=True)[1]
    }
    have = [f"eval_{name}" for name in metrics.scores_of_kinds(kinds)]
    if cfg.metric_for_best_model not in ("eval_loss", *have):
        raise ValueError(
            f"metric_for_best_model={cfg.metric_for_best_model}: the eval "
            f"entries give eval_loss, {', '.join(have)}"
        )


def check_contrast(cfg: Config, definition, dp_size: int, evaluating: bool) -> None:
    """Where a micro-batch's samples are contrasted with each other, one alone has nothing to be told from."""
    if cfg.stage not in definition.contrasted:
        return
    for key, used in (
        ("per_device_train_batch_size", cfg.do_train),
        ("per_device_eval_batch_size", evaluating),
    ):
        if used and getattr(cfg, key) * dp_size < 2:
            raise ValueError(
                f"{key}={getattr(cfg, key)} on {dp_size} data-parallel rank: "
                f"stage={cfg.stage} contrasts the pairs of "
                "a micro-batch, and one pair alone is its own negative; use at least 2"
            )


def run_facts(
    cfg: Config, definition, directory: Path, plan, eval_plan, ranks: int, global_batch: int
) -> dict:
    """What a step and its sample are defined by; a checkpoint keeps it, and a resumed run is compared with
    it."""
    base = [checkpoint.open_model(path, definition).sample() for path in (directory, cfg.init_from) if path]
    return {
        "seed": cfg.seed,
        "mixtoken": cfg.mixtoken,
        "max_length": cfg.max_length,
        "max_images": cfg.max_images,
        "data": data.content_key(plan.index.entries),
        "samples": len(plan.index),
        "global_batch": global_batch,
        "ranks": ranks,
        "eval_data": data.content_key(eval_plan.index.entries) if eval_plan else None,
        "base": hashlib.sha256(json.dumps(base).encode()).hexdigest()[:16],
        "lora_alpha": cfg.lora_alpha,
        "lora_split": cfg.lora_split,
        "stage": cfg.stage,
    }


def check_facts(facts: dict, state: dict, cfg: Config, resume: str) -> None:
    """Refuses to continue where the same step would mean another sample or another model."""
    saved = state.get("facts")
    if saved is None:
        print(f"{resume} does not say what it was trained on: the data and batch of this command are assumed")
        return
    keys = ["seed", "mixtoken", "base", "lora_alpha", "lora_split", "stage"]
    keys += ["max_length", "max_images"] if cfg.mixtoken else []
    of_data = ["data", "samples"] + (["eval_data"] if saved.get("eval_data") and facts["eval_data"] else [])
    changed = [k for k in keys + of_data if k in saved and saved[k] != facts[k]]
    words = {
        "data": "the training data's key",
        "eval_data": "the eval data's key",
        "base": "the base weights' key",
    }
    words["samples"] = "the number of usable samples"
    listed = "; ".join(f"{words.get(k, k)} is {facts[k]}, it was {saved[k]}" for k in changed)
    if changed and cfg.accept_changed_data and not set(changed) - set(of_data):
        print(f"accept_changed_data=true: {listed}")
        if "eval_data" in changed:
            state |= {"best_metric": None, "best_step": None}
    elif changed:
        only_data = not set(changed) - set(of_data)
        way = (
            "accept_changed_data=true goes on with the new data"
            if only_data
            else "give the values it began with"
        )
        raise ValueError(
            f"can't continue from {resume}: {listed}; {way}, or begin a run in another output_dir "
            "(here with overwrite_output_dir=true)"
        )


def place_plan(plan: data.Plan, state: dict, facts: dict, resume: str) -> None:
    """Sets the plan to where the checkpoint stands, whatever batch and ranks it was trained with."""
    if state.get("units") is None or state.get("epoch") is None:  # of before these were saved
        return
    global_batch, was = facts["global_batch"], (state.get("facts") or {}).get("global_batch")
    place = state["epoch"], min(state["units"], plan.count(state["epoch"]))
    found = plan.locate(state["step"], global_batch)
    if found != (place if place[1] < plan.count(place[0]) else (place[0] + 1, 0)):
        plan.origin = state["step"], *place
        unit = "packs" if plan.mixtoken else "samples"
        print(
            f"{resume} stands behind {place[1]:,} {unit} of epoch "
            f"{place[0] + 1}, trained {was} a step; from here "
            f"{global_batch} a step, the learning rate by the share of the data seen"
        )


def prepare(
    cfg: Config, definition, directory: Path, meeting: parallel.Meeting, run_dir: RunDir
) -> Prepared:  # all ranks
    """Decides how the output directory is continued, reads the data and finds the place in it."""
    decided = None
    if meeting.main:
        run_dir.lock()
        decided = json.dumps(asdict(run_dir.decide()))
        print(f"settings | {differences(cfg) or 'all as by default'}")
    start = run_dir.start = Start(**json.loads(meeting.share("start", decided)))
    check_stage(cfg, definition)
    processor = definition.processor(directory, cfg.stage)
    plan = read_plan(cfg, "train", processor, meeting)
    evaluating = cfg.do_eval or cfg.evaluation_strategy != "no"
    eval_plan = read_plan(cfg, "eval", processor, meeting, shuffle=False) if evaluating else None
    if evaluating:
        check_metric(cfg, eval_plan)
    pp, replicas, shards, _ = parallel.layout(
        meeting.size,
        cfg.tensor_parallel_degree,
        cfg.pipeline_parallel_degree,
        cfg.sharding,
        cfg.sharding_parallel_degree,
    )
    check_contrast(cfg, definition, replicas * shards, evaluating)
    global_batch = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * replicas * shards
    facts = run_facts(cfg, definition, directory, plan, eval_plan, meeting.size, global_batch)
    state = {"step": 0, "best_metric": None, "best_step": None, "bad": 0, "samples": 0, "evaluated": True}
    if start.resume:
        state |= read_state(start.resume)
        with contextlib.redirect_stdout(sys.stdout if meeting.main else io.StringIO()):
            check_facts(facts, state, cfg, start.resume)
            place_plan(plan, state, facts, start.resume)
    state |= {"facts": facts, "run": start.id}
    total = total_steps(cfg, plan, global_batch)
    if cfg.do_train and total < 1:
        raise ValueError(
            f"num_train_epochs={cfg.num_train_epochs:g} gives no step; raise it, or set do_train=false"
        )
    if cfg.do_train and start.resume and total < state["step"]:
        key = "max_steps" if cfg.max_steps is not None else "num_train_epochs"
        if start.finished is None or not start.changed.keys() - HARMLESS:
            raise ValueError(
                f"{start.resume} is at step {state['step']}, and "
                f"{key}={getattr(cfg, key):g} ends at step {total}; "
                f"raise {key}, or give an earlier checkpoint as resume_from_checkpoint"
            )
    if cfg.do_train and not start.anew and start.resume is None:
        if start.finished is not None and total > start.finished:
            raise ValueError(
                f"{cfg.output_dir} holds a finished run of {start.finished} steps "
                "without its checkpoint: it can't "
                f"go on to step {total}; choose another output_dir, or set "
                "overwrite_output_dir=true to train anew"
            )
        if start.finished is None and meeting.main:
            print(f"{cfg.output_dir} has no complete checkpoint of its run: it begins at step 0")
    meeting.wait_for_all("prepared")
    return Prepared(processor, plan, eval_plan, run_dir, state, total)


def is_finished(ready: Prepared, cfg: Config) -> bool:
    """Whether the run is finished. With other settings than it was trained with that is an error."""
    start, out = ready.run_dir.start, cfg.output_dir
    if not cfg.do_train or start.finished is None or ready.total > start.finished:
        return False
    if changed := {k: v for k, v in start.changed.items() if k not in HARMLESS}:
        raise ValueError(
            f"{out} holds a finished run of {start.finished} steps that was trained with other settings: "
            f"{shown(changed)}; choose another output_dir, or set overwrite_output_dir=true to train anew"
        )
    return True


def run(
    cfg: Config, definition, directory: Path, meeting: parallel.Meeting, signals: Signals | None = None
) -> int:
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
            world = parallel.init_world(
                cfg.tensor_parallel_degree,
                cfg.pipeline_parallel_degree,
                cfg.sharding,
                cfg.sharding_parallel_degree,
                meeting,
            )
            facts = {**ready.state["facts"], "checkpoint": run_dir.start.resume, "total steps": ready.total}
            rows = hashlib.sha256(ready.plan.index.rows.tobytes()).hexdigest()[:16]
            parallel.compare(
                {**facts, "length index": rows, "settings": json.dumps(asdict(cfg), sort_keys=True)}
            )
            training = Run(cfg, ready, definition, directory, world, signals, kernels)
        return training.train()
    except Stopped as e:
        name = signal.Signals(e.number).name
        meeting.fail(f"stopped by {name}")
        if meeting.main:
            print(f"stopped by {name} while {doing}; nothing of this start is saved", flush=True)
        return 128 + e.number
    except (ValueError, OSError) as e:
        if not dist.is_initialized():
            meeting.fail(one_line(e))
        raise
    finally:
        run_dir.unlock()


class Run:
    """The model, its optimiser and where they stand, and the loop over steps."""

    def __init__(
        self, cfg: Config, ready: Prepared, definition, directory: Path, world, signals: Signals, kernels: str
    ):
        self.cfg, self.world, self.signals, self.directory = cfg, world, signals, directory
        self.plan, self.eval_plan, self.processor = ready.plan, ready.eval_plan, ready.processor
        self.run_dir, self.state, self.total = ready.run_dir, ready.state, ready.total
        self.say = print if world.main else (lambda *_a, **_k: None)
        self.out, self.entries = Path(cfg.output_dir), self.plan.index.entries
        self.global_batch = self.state["facts"]["global_batch"]
        built = build(cfg, directory, world, stream_sizes(self.plan, cfg))
        self.model, self.whole, self.definition, self.lora_modules, self.stages = built
        self.say(parameter_table(self.whole, self.definition.parts))
        if self.stages is not None:
            self.say(f"pipeline stages, {cfg.pipeline_schedule}: {self.stages.describe()}")
        threads = torch.get_num_threads()
        self.say(
            f"device {world.device.type} x {world.size}, kernels: {kernels}, {threads} threads", flush=True
        )
        self.optimizer, self.scaler = make_optimizer(self.model, cfg), LossScaler(cfg.fp16)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.pictures_only = all(matches(n, self.definition.image_parameters) for n in self.trainable)
        self.restore()
        self.features = None
        if cfg.cache_image_features:
            self.features = cache_features(
                self.model, self.definition, self.plan, self.processor, cfg, world, signals
            )
        self.log = None
        if world.main:
            self.run_dir.begin()
            self.log = Log(cfg, self.run_dir, self.start_step, self.total, self.state["evaluated"])
        self.named_bad, self.named_eval_bad = {}, {}
        self.measured = {"samples": 0, "tokens": 0, "supervised": 0, "seconds": 0.0}

    def restore(self) -> None:
        """Continues from the checkpoint that was chosen."""
        start, state = self.run_dir.start, self.state
        self.start_step = self.saved_at = state["step"]
        if start.resume is None:
            return
        checkpoint.load_train_state(start.resume, self.trainable, self.optimizer)
        if state.get("scaler"):
            self.scaler.load(state["scaler"])
        elif state.get("scale"):  # of before the counters were saved
            self.scaler.scale = state["scale"]
        self.say(f"continuing from {start.resume} at step {state['step']}", flush=True)
        if changed := {k: v for k, v in start.changed.items() if k not in HARMLESS}:
            self.say(
                f"warning: continuing with other settings than the run began with: {shown(changed)}",
                file=sys.stderr,
            )
        if state["best_step"] and not (self.out / f"checkpoint-{state['best_step']}").is_dir():
            self.say(
                f"the best checkpoint so far, of step {state['best_step']}, is not in {self.out}: not counted"
            )
            state |= {"best_metric": None, "best_step": None}

    # -- one step

    def learning_rate(self, step: int, epoch: int) -> float:
        """Of the update that follows `step` finished ones; after a change of batch by the share of the data
        seen."""
        cfg, plan = self.cfg, self.plan
        if plan.origin == (0, 0, 0) or cfg.max_steps is not None:
            return learning_rate_at(step, self.total, cfg, epoch)
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
        facts = step_facts(self.model, micro_batches, self.signals.number, world)
        counts, supervised, bad, stop, has_images = facts
        name_bad(micro_batches, self.named_bad, world)
        state["bad"] += bad
        check_bad(
            state["bad"], max(len(self.plan.index), state["samples"]), cfg, "samples"
        )  # it comes back each epoch
        ids = [i for batch in micro_batches for i in batch.sample_ids]
        lr = self.learning_rate(step, epoch)
        if supervised == 0 and bad:
            self.say(
                f"step {step + 1}: all its samples are left out, so nothing is learned in it", flush=True
            )
            if self.log:
                self.log.write({"step": step + 1, "left_out": bad})
            self.advance(step, 0, lr)
            return stop
        if supervised == 0:
            raise ValueError(f"step {step + 1} has no supervised token; its samples: {', '.join(ids)}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = forward_backward(
            self.model,
            micro_batches,
            has_images,
            counts,
            cfg,
            world,
            self.scaler,
            len(self.entries),
            self.processor.image_size,
            self.pictures_only,
            self.stages,
        )
        tokens = torch.tensor([sum(len(b.input_ids) for b in micro_batches), len(ids)], dtype=torch.float64)
        totals = parallel.all_sum(torch.cat((sums.cpu().flatten(), tokens)))
        if self.stages is not None:
            self.stages.from_last(totals)
        sums, (num_tokens, num_samples) = totals[:-2].view(len(self.entries), -1, 2), totals[-2:].tolist()
        loss = float(means(sums.sum(0)).sum())
        where = f"its samples: {', '.join(ids)}; the last checkpoint stands"
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {step + 1} is {loss}; {where}")
        norm = clip_and_step(
            self.trainable, self.optimizer, cfg.max_grad_norm, self.scaler, world, self.stages
        )
        if not math.isfinite(norm) and not cfg.fp16:
            raise ValueError(f"the gradient of step {step + 1} is {norm}; {where}")
        self.advance(step, int(num_samples), lr)
        self.note(step, epoch, loss, lr, norm, sums, (num_samples, num_tokens, supervised), waited, clock)
        return stop

    def advance(self, step: int, num_samples: int, lr: float) -> None:
        """The run stands behind this step now."""
        at, first = self.plan.locate(step, self.global_batch)
        first += min(self.global_batch, self.plan.count(at) - first)
        self.state |= {
            "step": step + 1,
            "epoch": at,
            "units": first,
            "total_steps": self.total,
            "learning_rate": lr,
        }
        self.state["samples"] += num_samples

    def note(self, step, epoch, loss, lr, norm, sums, sizes, waited: float, clock: float) -> None:
        """A step's line in the log, and its share of what `benchmark` prints."""
        num_samples, num_tokens, supervised = sizes
        seconds = time.perf_counter() - clock
        if self.log:
            record = {
                "step": step + 1,
                "epoch": epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "ms": 1000 * seconds,
                "tokens": int(num_tokens),
                "tokens_per_s": num_tokens / seconds / self.world.size,
                "supervised": supervised / num_tokens,
                "data": waited / seconds,
                "mem_gib": peak_memory_gib(self.world.device),
            }
            if len(self.entries) > 1:
                pairs = zip(self.entries, sums, strict=True)
                record["loss_by_dataset"] = {
                    e.label: float(means(x).sum()) for e, x in pairs if x[:, 1].any()
                }
            record |= {f"loss_{k}": v for k, v in named_losses(self.model, sums.sum(0)).items()}
            self.log.step(record)
        if step >= self.start_step + 2:  # the first two warm up
            for key, value in zip(self.measured, (num_samples, num_tokens, supervised, seconds), strict=True):
                self.measured[key] += value

    # -- between steps

    def due(self, strategy: str, every: int) -> bool:
        """Whether to save or evaluate behind the step that the run stands at."""
        step = self.state["step"]
        if strategy == "epoch":
            ended = self.state["units"] == self.plan.count(self.state["epoch"])
            return step == self.total or ended
        return strategy == "steps" and step % every == 0

    def save(self) -> None:  # all ranks
        state, cfg = self.state, self.cfg
        if not state["samples"]:
            raise ValueError(
                f"no sample could be loaded in {state['step']} steps (listed "
                "above): nothing was learned, nothing is "
                "saved"
            )
        check_finite(self.trainable, state["step"], self.world)
        if cfg.fp16:
            state["scaler"] = self.scaler.state()
        path = self.out / f"checkpoint-{state['step']}"
        if self.world.main:
            self.run_dir.before_save()
        save_checkpoint(
            path,
            self.model,
            self.whole,
            self.definition,
            self.optimizer,
            cfg,
            self.directory,
            self.lora_modules,
            state,
            self.world,
            self.stages,
        )
        if self.world.main:
            self.run_dir.after_save()
            self.log.path = self.run_dir.log_path()
        self.rotate()
        self.saved_at = state["step"]
        self.say(f"saved {path}", flush=True)

    def rotate(self) -> None:
        if self.world.main:
            steps = (self.state["best_step"], self.state["step"])
            keep = {self.out / f"checkpoint-{step}" for step in steps if step}
            checkpoint.rotate(self.out, self.cfg.save_total_limit, keep=keep, own=self.run_dir.belongs)

    def evaluate(self, final: bool = False) -> dict[str, float]:  # all ranks
        cfg, alone = self.cfg, self.world.size == 1
        try:
            with self.signals.breakable(alone):
                result = evaluate_loss(
                    self.model,
                    self.eval_plan,
                    self.processor,
                    cfg,
                    self.world,
                    self.stages,
                    signals=self.signals,
                    bad=self.named_eval_bad,
                )
                if cfg.eval_with_do_generation:
                    result |= generation_scores(
                        self.model,
                        self.eval_plan.index,
                        self.processor,
                        cfg,
                        None if alone else self.break_off,
                    )
        finally:
            parallel.reshard(self.model)
            self.model.train()
        self.say("evaluation | " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()), flush=True)
        if self.log:
            self.log.write({"step": self.state["step"], **result, **({"final": True} if final else {})})
        return result

    def break_off(self) -> None:  # all ranks
        if stop := int(parallel.all_max(torch.tensor([self.signals.number]), self.world)):
            raise Stopped(stop)

    def judge(self, value: float) -> None:
        """Takes the step for the best one if its score is; its checkpoint learns of the evaluation."""
        state, lower = self.state, self.cfg.metric_for_best_model == "eval_loss"
        best = state["best_metric"]
        if not math.isfinite(value):
            self.say(f"warning: {self.cfg.metric_for_best_model} is {value}: never the best", file=sys.stderr)
        elif best is None or (value < best if lower else value > best):
            state |= {"best_metric": value, "best_step": state["step"]}
        state["evaluated"] = True
        if self.saved_at == state["step"] and self.world.main:
            path = self.out / f"checkpoint-{state['step']}" / "trainer_state.json"
            if path.exists():
                files = checkpoint.read_json(path, "").get("train_state", {})
                checkpoint.write_json(path, {**state, "train_state": files})
        if state["best_step"] == state["step"] and self.saved_at == state["step"]:
            self.rotate()

    def after_step(self, stop: int) -> None:
        """Saves, then evaluates. Raises Stopped behind a signal, once the step is saved."""
        cfg, state = self.cfg, self.state
        evaluates = self.due(cfg.evaluation_strategy, cfg.eval_steps or cfg.save_steps)
        state["evaluated"] = not evaluates
        if self.due(cfg.save_strategy, cfg.save_steps) or (stop and cfg.save_strategy != "no"):
            self.save()
        if stop:
            raise Stopped(stop)
        if evaluates:
            self.judge(self.evaluate()[cfg.metric_for_best_model])

    def train(self) -> int:
        cfg, state = self.cfg, self.state
        loader = data.TrainLoader(
            self.plan,
            self.processor,
            start_step=self.start_step,
            total_steps=self.total,
            dp_rank=self.world.dp_rank,
            dp_size=self.world.dp_size,
            per_device_batch=cfg.per_device_train_batch_size,
            grad_accum=cfg.gradient_accumulation_steps,
            num_workers=cfg.num_workers,
            image_jitter=cfg.image_jitter,
            features=self.features,
        )
        self.model.train()
        try:
            if not state["evaluated"] and cfg.do_train and self.eval_plan is not None:  # it was killed before
                self.judge(self.evaluate()[cfg.metric_for_best_model])
            clock = time.perf_counter()
            for step, epoch, micro_batches in loader if cfg.do_train else ():
                stop = self.train_step(step, epoch, micro_batches, time.perf_counter() - clock, clock)
                clock = time.perf_counter()
                self.after_step(stop)
                clock = time.perf_counter() if self.saved_at == step + 1 else clock
            self.finish()
        except Stopped as e:
            return self.stopped(e.number)
        return 0

    def stopped(self, number: int) -> int:  # all ranks
        cfg, step = self.cfg, self.state["step"]
        if cfg.save_strategy != "no" and cfg.do_train and self.saved_at != step:
            self.save()
        name = signal.Signals(number).name
        if cfg.save_strategy == "no" or not cfg.do_train:
            then = "nothing is saved (save_strategy=no)" if cfg.do_train else "nothing was trained"
        elif step == 0:
            then = "nothing is saved yet; the same command begins again"
        else:
            then = f"{self.out / f'checkpoint-{step}'} is saved; the same command continues from there"
        self.say(f"stopped by {name} after step {step}: {then}", flush=True)
        return 128 + number

    def finish(self) -> None:
        """The final model is saved, chosen, evaluated and published."""
        cfg, state, out = self.cfg, self.state, self.out
        saving = cfg.do_train and cfg.save_strategy != "no"
        if saving and (self.saved_at != state["step"] or not (out / f"checkpoint-{state['step']}").is_dir()):
            self.save()
        final = state["step"]
        if cfg.load_best_model_at_end and state["best_step"]:
            final = state["best_step"]
            best = out / f"checkpoint-{final}"
            checkpoint.load_train_state(best, self.trainable, self.optimizer)
            self.say(f"best model: {best} with {cfg.metric_for_best_model} {state['best_metric']:.4f}")
        elif cfg.load_best_model_at_end:
            self.say("no evaluation gave a number: the last model stands for the best one", flush=True)
        if cfg.do_eval:
            self.evaluate(final=True)
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
                f"benchmark | {measured['samples'] / s:.2f} samples/s | "
                f"{measured['tokens'] / s:,.0f} tokens/s | "
                f"{measured['supervised'] / s:,.0f} supervised tokens/s | "
                f"peak memory {peak_memory_gib(self.world.device):.2f} GiB"
            )
        elif not cfg.skip_memory_metrics:
            self.say(f"peak memory {peak_memory_gib(self.world.device):.2f} GiB")
        if saving and cfg.lora:
            merged = shlex.quote(terminal.free_name("merged", out))
            start = f"{terminal.script('merge.py')} --lora_path {shlex.quote(str(out))}"
            self.say(f"adapter: {out}\nnext: {start} --merge_model_path {merged}")
        elif saving:
            example = terminal.example_request(self.plan.index.conversation(0))
            start = f"{terminal.script('generate.py')} --model_name_or_path {shlex.quote(str(out))}"
            self.say(f"model: {out}\nnext: {start} {example}")


if __name__ == "__main__":
    checkpoint.leave(checkpoint.cli(main))
