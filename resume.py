"""Where a run begins: what its output directory already holds, which data it reads, at which sample it is.

A checkpoint keeps what a step means (data, batch, seed, base weights). The next start, on any number of
ranks, compares: it goes on at exactly the next sample, or refuses with both values. All of this is known
before the ranks are a process group, so that a mistake is one line and costs no weights loaded.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import checkpoint
import data
import metrics
import parallel
import rates
import watch
from build import check_stage, total_steps
from config import Config, differences
from meeting import Meeting
from records import Conversation
from run_dir import HARMLESS, RunDir, Start, read_state, shown
from terminal import note

# Each of these changes which sample a step is, or which model it updates: a checkpoint keeps it.
KEPT = (
    "seed mixtoken lora_alpha lora_split use_rslora quantize stage use_dora init_lora_weights "
    "max_length max_images"
).split()


@dataclass
class Prepared:
    """What all ranks know before they are a process group."""

    # In the order in which they are found out.
    processor: object
    plan: data.Plan
    eval_plan: data.Plan | None
    probe_plan: data.Plan | None
    run_dir: RunDir
    state: dict  # where the run stands: trainer_state.json
    total: int  # steps of the run


def read_plan(cfg: Config, split: str, processor, meeting: Meeting, **options) -> data.Plan:  # all ranks
    # Without data the samples: the first command of a newcomer trains on something.
    dataset = cfg.dataset or data.DEFAULT_DATASET
    if not dataset.get(split):
        raise ValueError(f"dataset has no {split!r} entry")
    progress = meeting.main and not cfg.disable_tqdm
    # Beside the run, under a key of its content: another command with the same data finds it too.
    folder = Path(cfg.output_dir) / "index"
    args = dataset[split], processor, cfg.max_length, folder, cfg.num_workers, progress
    if not meeting.main:  # the others read what rank 0 measured
        meeting.share(f"{split} index")
    # Rank 0 measures and writes; what the others then read is what it has.
    index = data.build_index(*args, max_bad_samples=cfg.max_bad_samples)
    if meeting.main:
        meeting.share(f"{split} index", "made")
        data.say_unused(index)
        # Ten are enough to see the kind; `data.py check` lists all.
        for where, reason in index.problems[:10]:
            note(f"warning: left out {where}: {reason}")
        if cut := int(index.truncated.sum()):
            samples = f"{cut:,} of {len(index):,} {split} samples"
            note(f"warning: {samples} exceed max_length={cfg.max_length} and are cut")
    return data.Plan(index, cfg.seed, cfg.max_length, cfg.mixtoken, cfg.max_images, **options)


def check_metric(cfg: Config, eval_plan: data.Plan) -> None:
    # It tells the entry's kind, and so which scores there will be.
    kinds = {conversation.kind for conversation in one_of_each(eval_plan)}
    # What an evaluation of these entries will put into the log.
    have = [f"eval_{name}" for name in metrics.scores_of_kinds(kinds)]
    # Now: an unknown name would show only behind the first evaluation.
    if cfg.metric_for_best_model not in ("eval_loss", *have):
        raise ValueError(
            f"metric_for_best_model={cfg.metric_for_best_model}: the eval "
            f"entries give eval_loss, {', '.join(have)}"
        )


def one_of_each(plan: data.Plan) -> Iterator[Conversation]:
    """The first conversation of each entry."""
    for n in np.unique(plan.index.entry, return_index=True)[1]:
        yield plan.index.conversation(n)


def check_jitter(cfg: Config, plan: data.Plan) -> None:
    """An image that moves takes its boxes away from what they are around."""
    # Most files are of one kind. Of others load_sample says it.
    for conversation in one_of_each(plan) if cfg.image_jitter else ():
        if conversation.boxed:
            raise ValueError(
                f"image_jitter={cfg.image_jitter:g} moves images, but not the boxes in {conversation.where}; "
                "leave image_jitter out"
            )


def say_shared(plan: data.Plan, eval_plan: data.Plan) -> None:
    """Names what is trained on and evaluated: its score would say nothing of what is unseen."""
    # By content; of one file, two splits or two shares are different records.
    trained, asked = (
        [e for e in p.index.entries if not (e.splits or e.eval_split)] for p in (plan, eval_plan)
    )
    known = {digest for entry in trained for digest in entry.digests}
    for entry in asked:
        if known.issuperset(entry.digests):
            note(
                f"warning: the eval entry {entry.label} ({', '.join(entry.paths)}) is trained on too; "
                "--eval_split 0.05 keeps a share back"
            )


def check_output(cfg: Config) -> None:
    """ValueError for an output_dir in a folder of data: its files would be data too, others after each
    save."""
    entries = [entry for split in (cfg.dataset or {}).values() for entry in split]
    for path in (p for entry in entries for p in data.listed(entry["data_files"]) if os.path.isdir(p)):
        if Path(cfg.output_dir).resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"output_dir={cfg.output_dir} lies in {path}, whose files are the data; choose a directory "
                "elsewhere"
            )


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
    held = "the records that eval_split holds back" if entries[0].get("eval_part") else "the eval entries"
    note(f"warning: {held} are not evaluated in this run; --evaluate epoch or --do_eval true does so")


def check_contrast(cfg: Config, definition, dp_size: int, evaluating: bool) -> None:
    """Where a micro-batch's samples are contrasted with each other, one alone has nothing to be told from."""
    # Only contrast looks across samples; elsewhere a micro-batch of one is fine.
    used = {"train": cfg.do_train, "eval": evaluating} if cfg.stage in definition.contrasted else {}
    for key in [f"per_device_{name}_batch_size" for name, is_used in used.items() if is_used]:
        if getattr(cfg, key) * dp_size < 2:
            raise ValueError(
                f"{key}={getattr(cfg, key)} on {dp_size} data-parallel rank: stage={cfg.stage} contrasts the "
                "pairs of a micro-batch, and one pair alone is its own negative; use at least 2"
            )


def run_facts(
    cfg: Config, definition, directory: Path, processor, plans: dict, ranks: int, global_batch: int
) -> dict:
    """What a step and its sample are defined by; a checkpoint keeps it, and a resumed run is compared with
    it."""
    # A few values of each tensor: another base of the same shape is told from this one, without reading
    # gigabytes.
    base = [checkpoint.open_model(path, definition).sample() for path in (directory, cfg.init_from) if path]
    # Equal weights under another epsilon or vocabulary are another model.
    config = {k: v for k, v in checkpoint.read_config(directory).items() if k not in checkpoint.NO_NUMBERS}
    # By content, not by path: data may be moved between starts, not changed.
    keys = {name: data.content_key(plan.index.entries) if plan else None for name, plan in plans.items()}
    return {
        **{key: getattr(cfg, key) for key in KEPT},
        **keys,
        "samples": len(plans["data"].index),
        "global_batch": global_batch,
        # For the log alone: ranks may change, the global batch is what counts.
        "ranks": ranks,
        "base": hashlib.sha256(json.dumps(base).encode()).hexdigest()[:16],
        "base_files": data.short_hash([config, processor.fingerprint()]),
        "modules_to_save": sorted(cfg.modules_to_save or []),
        "metric": cfg.metric_for_best_model,
        **rates.facts(cfg),
    }


def check_facts(facts: dict, state: dict, cfg: Config, resume: str) -> None:
    """Refuses to continue where the same step would mean another sample or another model."""
    # Of before facts were saved: nothing to compare, and that is said.
    saved = state.get("facts")
    if saved is None:
        print(f"{resume} does not say what it was trained on: the data and batch of this command are assumed")
        return
    # What would make the next step another one. Learning rates and such may change: they are said as a
    # warning. Packs depend on both limits; single samples do not: a longer one cuts fewer of them.
    keys = [k for k in KEPT if cfg.mixtoken or k not in ("max_length", "max_images")]
    keys += ["base", "base_files", "modules_to_save", *rates.KEYS]
    of_data = ["data", "samples"]
    of_data += [k for k in ("eval_data", "probe_data") if saved.get(k) and facts[k]]
    changed = [k for k in keys + of_data if k in saved and saved[k] != facts[k]]
    # In a person's words where the fact is a hash.
    words = {"data": "the training data's key", "samples": "the number of usable samples"}
    words |= {f"{split}_data": f"the {split} data's key" for split in ("eval", "probe")}
    words["base"] = "the base weights' key"
    words["base_files"] = "the key of the base's config.json and vocabulary"
    listed = "; ".join(f"{words.get(k, k)} is {facts[k]}, it was {saved[k]}" for k in changed)
    # New data is a decision that one can make; another base or seed is a mistake.
    only_data = not set(changed) - set(of_data)
    if changed and cfg.accept_changed_data and only_data:
        print(f"accept_changed_data=true: {listed}")
    elif changed:
        way = "give the values it began with"
        way = "accept_changed_data=true goes on with the new data" if only_data else way
        raise ValueError(
            f"can't continue from {resume}: {listed}; {way}, or begin a run in another output_dir "
            "(here with overwrite_output_dir=true)"
        )
    # Scores of other questions, or of another kind, cannot be compared with the best so far.
    other_metric = saved.get("metric", facts["metric"]) != facts["metric"]
    if "eval_data" in changed or other_metric:
        state |= {"best_metric": None, "best_step": None, "since_best": 0}
    if other_metric:
        print(f"the best model is chosen anew, by {facts['metric']} instead of {saved['metric']}")
    if saved.get("probe_data") != facts["probe_data"]:
        state["probe"] = None


def place_plan(plan: data.Plan, state: dict, facts: dict, resume: str) -> None:
    """Sets the plan to where the checkpoint stands, whatever batch and ranks it was trained with."""
    if state.get("units") is None or state.get("epoch") is None:  # of before these were saved
        return
    # The checkpoint counts in units of the epoch, not in steps: a unit is the same under any batch.
    global_batch, was = facts["global_batch"], (state.get("facts") or {}).get("global_batch")
    # Fewer units than before, if packs have become longer: then the epoch is over.
    place = state["epoch"], min(state["units"], plan.count(state["epoch"]))
    # Where the step count alone would put us; if that is the place, the batch has not changed.
    found = plan.locate(state["step"], global_batch)
    if found != (place if place[1] < plan.count(place[0]) else (place[0] + 1, 0)):
        plan.origin = state["step"], *place
        unit = "packs" if plan.mixtoken else "samples"
        print(
            f"{resume} stands behind {place[1]:,} {unit} of epoch {place[0] + 1}, trained {was} a step; from "
            f"here {global_batch} a step, the learning rate by the share of the data seen"
        )


def check_end(cfg: Config, start: Start, step: int, total: int, main: bool) -> None:
    """Refuses a run that ends before it begins, or that can't go on from where it stands."""
    if not cfg.do_train:
        return
    if total < 1:
        raise ValueError(
            f"num_train_epochs={cfg.num_train_epochs:g} gives no step; raise it, or set do_train=false"
        )
    if start.resume and total < step:
        key = "max_steps" if cfg.max_steps is not None else "num_train_epochs"
        # A finished run with changed settings is is_finished()'s to name.
        if start.finished is None or not start.changed.keys() - HARMLESS:
            raise ValueError(
                f"{start.resume} is at step {step}, and {key}={getattr(cfg, key):g} ends at step {total}; "
                f"raise {key}, or give an earlier checkpoint as resume_from_checkpoint"
            )
    if not start.anew and start.resume is None:
        # Finished, and its last checkpoint was deleted: the final model has no moments to go on with.
        if start.finished is not None and total > start.finished:
            raise ValueError(
                f"{cfg.output_dir} holds a finished run of {start.finished} steps without its checkpoint: it "
                f"can't go on to step {total}; choose another output_dir, or set overwrite_output_dir=true "
                "to train anew"
            )
        if start.finished is None and main:
            print(f"{cfg.output_dir} has no complete checkpoint of its run: it begins at step 0")


def prepare(
    cfg: Config, definition, directory: Path, meeting: Meeting, run_dir: RunDir
) -> Prepared:  # all ranks
    """Decides how the output directory is continued, reads the data and finds the place in it."""
    # Rank 0 alone looks at the directory: others could see it a moment later, with another answer.
    decided = None
    if meeting.main:
        # Two commands in one directory would take turns in breaking each other's checkpoints.
        run_dir.lock()
        decided = json.dumps(asdict(run_dir.decide()))
        print(f"settings | {differences(cfg) or 'all as by default'}")
    # What rank 0 found, the same object on every rank.
    start = run_dir.start = Start(**json.loads(meeting.share("start", decided)))
    # Before the data is read, which takes minutes for a large set.
    run_dir.check_seen(meeting)
    check_stage(cfg, definition)
    check_output(cfg)
    processor = definition.processor(directory, cfg.stage)
    plan = read_plan(cfg, "train", processor, meeting)
    check_jitter(cfg, plan)
    evaluating = cfg.do_eval or cfg.evaluation_strategy != "no"
    # In the files' order: an evaluation is the same whenever it is made.
    reads = {"eval": evaluating or cfg.sample_steps, "probe": (cfg.dataset or {}).get("probe")}
    eval_plan, probe_plan = (
        read_plan(cfg, split, processor, meeting, shuffle=False) if wanted else None
        for split, wanted in reads.items()
    )
    # Before the process group: still one line and the end.
    if evaluating:
        check_metric(cfg, eval_plan)
        if meeting.main:
            say_shared(plan, eval_plan)
    # The layout as it will be; there is no process group yet.
    _, replicas, shards, _ = parallel.layout(meeting.size, *cfg.degrees)
    check_contrast(cfg, definition, replicas * shards, evaluating)
    # Samples (or packs) that one update averages over, on all ranks together.
    global_batch = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * replicas * shards
    plans = {"data": plan, "eval_data": eval_plan, "probe_data": probe_plan}
    facts = run_facts(cfg, definition, directory, processor, plans, meeting.size, global_batch)
    # A run that begins: nothing seen, nothing evaluated, so nothing to evaluate again.
    state = {"step": 0, "best_metric": None, "best_step": None, "bad": 0, "samples": 0, "evaluated": True}
    state |= {"since_best": 0, "probe": None}
    if start.resume:
        # The checkpoint's own, over the beginning's.
        state |= read_state(start.resume)
        # Every rank comes to the same verdict; one says it.
        with contextlib.redirect_stdout(sys.stdout if meeting.main else io.StringIO()):
            check_facts(facts, state, cfg, start.resume)
            place_plan(plan, state, facts, start.resume)
    state |= {"facts": facts, "run": start.id}
    # After the place is known: with another batch the rest of an epoch has another number of steps.
    total = total_steps(cfg, plan, global_batch)
    check_end(cfg, start, state["step"], total, meeting.main)
    # Whoever found a mistake has said so by now; the process group comes next.
    meeting.wait_for_all("prepared")
    return Prepared(processor, plan, eval_plan, probe_plan, run_dir, state, total)


def is_finished(ready: Prepared, cfg: Config) -> bool:
    """Whether the run is finished. With other settings than it was trained with that is an error."""
    # The same command again is no error: it says that there is nothing to do.
    start, out = ready.run_dir.start, cfg.output_dir
    early = start.finished == ready.state["step"] and watch.out_of_patience(ready.state, cfg)
    if not cfg.do_train or start.finished is None or ready.total > start.finished and not early:
        return False
    # A finished run is never taken for another one's.
    if changed := {k: v for k, v in start.changed.items() if k not in HARMLESS}:
        raise ValueError(
            f"{out} holds a finished run of {start.finished} steps that was trained with other settings: "
            f"{shown(changed)}; choose another output_dir, or set overwrite_output_dir=true to train anew"
        )
    return True
