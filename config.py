"""The configuration of a run: every key with its default, bounds and meaning, and the one parser that reads
it.

    cfg = parse_config(["configs/qwen_vl/lora.json", "--learning_rate", "2e-5"])
    python train.py --help                       # the same keys, grouped, with types, defaults and bounds

Keys come from JSON files and `--key value`; later wins; `--flag` alone means true. Whatever is wrong (an
unknown key, a type, a number out of bounds, two keys that contradict each other) is a ValueError that names
the key and what was expected. The keys of PaddleMIX's `paddlemix/tools` are translated or ignored by one
table, TOOLKIT, so its JSON files run unchanged.
"""

import dataclasses
import fnmatch
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import data
import loggers
import metrics
import parallel
import pipeline
import terminal
from terminal import nearest, note

RUN, SPEED = "the run", "precision and speed"  # titles in --help that keys of two classes stand under
# From the files' names, not by importing them: --help is fast, and a model file of one's own counts
MODELS = tuple(sorted(path.stem.removeprefix("model_") for path in data.ROOT.glob("model_*.py")))
METRICS = ("eval_loss", *(f"eval_{s}" for scores in metrics.SCORES.values() for s in scores))
STRATEGIES = ("no", "epoch", "steps")
PRECISIONS = {  # -> bf16, fp16, fp16_opt_level
    "fp32": (False, False, "O1"),
    "bf16": (True, False, "O1"),
    "bf16-master": (True, False, "O2"),
    "fp16": (False, True, "O1"),
    "fp16-master": (False, True, "O2"),
}
COUNT = 10**9  # above any number of steps
LONGEST = 2**20  # above any stream's tokens
MB = 1_000_000


def key(default, help: str, **rules):
    """A field of the configuration. Rules: `low` and `high` (inclusive), `above` and `below` (exclusive),
    `off` (a number outside of them that means off), `choices`, `path` (a file name), `filled` (a list must
    not be empty); `group`: the title in --help of this key and those that follow."""
    return field(default=default, metadata={"help": help, **rules})


def count(default, help: str, **rules):
    """A key whose value is a number of things."""
    return key(default, help, low=1, high=COUNT, **rules)


@dataclass
class Config:
    model: str | None = key(
        None, "model file; by default the checkpoint's own", group="model and stage", choices=(None, *MODELS)
    )
    model_name_or_path: str = key(
        "tiny", "a checkpoint directory, or a preset; tiny is the model's small one in samples/", path=True
    )
    stage: str = key(
        "sft", "sft, or the model's own: pretrain (Qwen-VL, VisualGLM), pretrain1, pretrain2 (BLIP-2)"
    )
    init_from: str | None = key(
        None,
        "checkpoint whose tensors replace those of the same name: stage 2 begins with stage 1's",
        path=True,
    )
    freeze_include: list[str] | None = key(None, "fnmatch patterns on parameter names: these are frozen")
    freeze_exclude: list[str] | None = key(
        None, "patterns carved out of freeze_include, or of what lora freezes: these train"
    )

    dataset: dict | str | None = key(
        None,
        'FILE, FILE,EVAL_FILE, a folder, or {"train": [entry, ...], "eval": [...]}; by default samples/; '
        '"probe": [...] is scored before and after training, to see what is forgotten',
        group="data",
    )
    eval_split: float = key(0.0, "share of the training records that evaluates instead", low=0, below=1)
    mixtoken: bool = key(False, "fill each stream up to max_length tokens")
    max_length: int = key(2048, "tokens of a stream, and the cap for one sample", low=1, high=LONGEST)
    max_images: int | None = key(None, "images of a stream at most", low=1, high=LONGEST)
    max_bad_samples: float = key(0.01, "share of unusable records above which the run stops", low=0, high=1)
    evaluation: dict | None = key(
        None,
        "for evaluate.py (configs/*/eval_*.json): prompt, decoding, metric, score of a published evaluation",
        shown="RECIPE",
    )
    image_jitter: float = key(
        0.0,
        "training images move by up to this share of a side, scale by it, turn by so many radians",
        low=0,
        high=1,
    )
    cache_image_features: bool = key(False, "encode each image once; only with a frozen vision tower")
    num_workers: int = key(2, "data processes of a rank; 0: in the training process", low=0, high=1024)

    output_dir: str = key("output", "directory of checkpoints, log and final model", group=RUN, path=True)
    overwrite_output_dir: bool = key(
        False, "start anew instead of continuing the run that is there (resume: no)"
    )
    resume_from_checkpoint: str | bool | None = key(
        None, "a checkpoint directory, or true: the last one of output_dir (resume: PATH)", path=True
    )
    accept_changed_data: bool = key(False, "continue although the data have changed since the checkpoint")
    num_train_epochs: float = key(1, "passes over the data", above=0, high=100_000)
    max_steps: int | None = count(None, "updates, instead of num_train_epochs")
    per_device_train_batch_size: int = key(
        1, "samples of a micro-batch, or streams with mixtoken", low=1, high=65_536
    )
    per_device_eval_batch_size: int = key(1, "the same in evaluation", low=1, high=65_536)
    gradient_accumulation_steps: int = key(1, "micro-batches of an update", low=1, high=65_536)
    eval_accumulation_steps: int | None = count(
        None, "eval batches kept on the device before they move to the host"
    )
    do_train: bool = key(True, "train")
    do_eval: bool = key(False, "evaluate at the end too")
    save_strategy: str = key("steps", "when checkpoints are saved (save)", choices=STRATEGIES)
    save_steps: int = count(500, "interval of save_strategy=steps")
    save_total_limit: int | None = count(None, "newest checkpoints kept, the best one besides")
    evaluation_strategy: str = key("no", "when the eval entries are evaluated (evaluate)", choices=STRATEGIES)
    eval_steps: int | None = count(None, "interval of evaluation_strategy=steps; by default save_steps")
    eval_with_do_generation: bool = key(
        False,
        "evaluation answers the questions too: eval_cider, eval_vqa_accuracy, ... by the records' format",
    )
    load_best_model_at_end: bool = key(False, "publish the best evaluated checkpoint instead of the last one")
    metric_for_best_model: str = key(
        "eval_loss", "eval_loss: the lower the better; others need eval_with_do_generation", choices=METRICS
    )
    early_stopping_patience: int | None = count(
        None, "evaluations in a row that are not better than the best one, after which the run ends"
    )
    sample_steps: int | None = count(
        None, "interval of greedy answers to four fixed eval questions, shown and logged"
    )
    seed: int = key(42, "of order, initial values, dropout", low=0, high=2**32 - 1)

    learning_rate: float = key(
        5e-5, "peak of the schedule", group="optimiser: AdamW, no decay on biases and norms", low=0, high=10
    )
    learning_rate_rules: dict | None = key(
        None,
        "other peaks by fnmatch pattern on parameter names, the first match counts; the schedule, eta_min "
        "and warmup_start_lr scale with each",
        shown='{"PATTERN": X, ...}',
        above=0,
        high=10,
    )
    vision_lr_decay: float = key(
        1.0, "the vision tower's rate falls by this factor a layer, from its last one", above=0, high=1
    )
    loraplus_lr_ratio: float = key(
        1.0, "LoRA+: the rate of LoRA's B matrices is so many times that of A", above=0, high=1000
    )
    adam_beta1: float = key(0.9, "decay of the mean of gradients", low=0, below=1)
    adam_beta2: float = key(0.999, "decay of the mean of squared gradients", low=0, below=1)
    adam_epsilon: float = key(1e-8, "added to the root of the squares' mean", above=0, high=1)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0, high=10)
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm; 0: never", low=0, high=1e9)
    decay_scalars: bool = key(False, "weight decay on single numbers too (LAVIS decays its temperature)")
    lr_scheduler_type: str = key(
        "linear",
        "shape after the warm-up; cosine_epochs steps down once an epoch, as LAVIS",
        choices=("linear", "cosine", "constant", "cosine_epochs"),
    )
    warmup_ratio: float = key(0.0, "share of the updates that warm up", low=0, high=1)
    warmup_steps: int = key(0, "updates that warm up; wins over warmup_ratio", low=0, high=COUNT)
    warmup_start_lr: float = key(0.0, "where the warm-up begins", low=0, high=10)
    eta_min: float = key(0.0, "where linear and cosine end", low=0, high=10)
    neftune_noise_alpha: float = key(
        0.0,
        "training adds uniform noise of up to this / sqrt(tokens of the sample x hidden size) to the tokens' "
        "embeddings (NEFTune)",
        low=0,
        high=1000,
    )

    bf16: bool = key(False, "compute in bfloat16 (precision)", group=SPEED)
    fp16: bool = key(False, "compute in float16 with a loss scaler (precision)")
    fp16_opt_level: str = key(
        "O1", "O1: fp32 weights, autocast; O2: 16-bit weights, fp32 masters (precision)", choices=("O1", "O2")
    )
    recompute: bool = key(False, "compute activations again in the backward pass instead of keeping them")
    compile: bool = key(False, "torch.compile of the blocks")
    use_flash_attention: str | bool = key(
        "auto",
        "auto: Triton kernels on a GPU; true: these or an error; false: plain PyTorch",
        choices=("auto", True, False),
    )

    lora: bool = key(False, "train low-rank adapters instead of the weights", group="adapters")
    lora_rank: int = key(8, "rank of the adapters", low=1, high=4096)
    lora_alpha: float = key(16, "their update is scaled by lora_alpha / lora_rank", above=0, high=100_000)
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(lora_rank) (rank-stabilised LoRA)")
    init_lora_weights: str | bool = key(
        True,
        "true: updates begin at zero; pissa: adapters begin as the largest part of their layer's weight, and "
        "are saved as plain ones of twice the rank",
        choices=(True, "pissa"),
    )
    use_dora: bool = key(False, "the length of each row of an adapted weight trains by itself (DoRA)")
    lora_dropout: float = key(0.05, "share of an adapter's inputs that is dropped", low=0, below=1)
    lora_target_modules: list[str] | None = key(
        None, "regular expressions, full match on module names; by default the model's own", filled=True
    )
    modules_to_save: list[str] | None = key(
        None,
        "modules that train whole beside the adapter, saved in its file: full names, or their last parts",
        filled=True,
    )
    quantize: str | None = key(
        None,
        "frozen weights of the language model's blocks in NF4 (QLoRA: 4.1 bits each) or int8, whole on each "
        "rank",
        choices=(None, "nf4", "int8"),
    )
    lora_path: str | None = key(None, "adapter directory to start from", path=True)
    lora_split: bool = key(
        False, "an A and a B for each of q, k, v in a packed weight, as SwissArmyTransformer has them"
    )
    pre_seq_len: int | None = key(
        None,
        "P-tuning: only so many keys and values in front of every sample are trained",
        low=1,
        high=16_384,
    )

    tensor_parallel_degree: int = key(
        1, "ranks that hold a layer together", group="many devices", low=1, high=65_536, off=-1
    )
    pipeline_parallel_degree: int = key(
        1, "pipeline stages; their micro-batches are gradient_accumulation_steps", low=1, high=65_536, off=-1
    )
    pipeline_schedule: str = key(
        "1f1b",
        "1f1b keeps few micro-batches' activations; gpipe runs all forward, then all backward passes; "
        "interleaved is 1f1b with two stages on each rank",
        choices=pipeline.SCHEDULES,
    )
    sharding: str | None = key(
        None,
        "ZeRO over data-parallel ranks: of optimiser state, gradients too, weights too",
        choices=(None, *parallel.STAGES),
    )
    sharding_parallel_degree: int | None = key(
        None, "ranks of a sharding group; by default all data-parallel ranks", low=1, high=65_536, off=-1
    )

    logging_steps: int = count(
        10, "updates between reads of the loss, with a printed line; log.jsonl has every one", group="output"
    )
    disable_tqdm: bool = key(False, "no progress bar")
    report_to: list[str] | None = key(
        None, "other logs, whose package must be installed", choices=(None, "none", *loggers.PACKAGES)
    )
    benchmark: bool = key(False, "print samples/s, tokens/s and peak memory at the end")
    skip_memory_metrics: bool = key(True, "leave out the peak memory at the end")
    dry_run: bool = key(False, "print memory, steps and FLOPs of the run, and stop")

    @property
    def degrees(self) -> tuple[int, int, str | None, int | None]:
        """What parallel.layout and parallel.init_world take."""
        cut = self.tensor_parallel_degree, self.pipeline_parallel_degree
        return *cut, self.sharding, self.sharding_parallel_degree


@dataclass
class PreviewConfig(Config):
    """What `data.py` takes besides."""

    packs: int = count(2, "streams that are shown", group="preview")
    out: str = key("preview", "folder for images with their boxes drawn", path=True)


@dataclass
class Short:
    """Keys that say in one word what several of Config's say; they are translated into those."""

    precision: str | None = key(
        None,
        "bf16, fp16: autocast over fp32 weights; -master: 16-bit weights with fp32 master copies",
        group=SPEED,
        choices=(None, *PRECISIONS),
    )
    resume: str | None = key(
        None,
        "auto: continue the run of output_dir if there is one; no: start anew; PATH: that checkpoint",
        group=RUN,
        path=True,
    )
    save: int | str | None = count(None, "a number of updates, epoch, or no", choices=(None, *STRATEGIES))
    evaluate: int | str | None = count(None, "likewise", choices=(None, *STRATEGIES))


@dataclass
class EntryKeys:
    """An entry of the dataset; data.Entry opens it."""

    name: str | None = key(None, "format of the records; by default told from their shape")
    data_files: list[str] = key(None, "a path or a list of paths", filled=True, path=True)
    image_root: str | None = key(None, "folder that images are relative to", path=True)
    weight: float | None = key(
        None, "share of the entry in a mixture, relative to the others'", low=0, high=1e9
    )
    max_samples: int | None = count(None, "records taken at most")
    chat_template: str | None = key(None, "file with a system text", path=True)
    splits: list[str] | None = key(None, "only records whose split is one of these", filled=True)
    eval_split: float = key(0.0, "share of its records that evaluates", low=0, below=1)
    eval_part: bool = key(False, "whether this entry is that share, or the rest")


def _other_scheduler(name, source: dict) -> dict:
    if name != "CosineDecayWithWarmup":
        raise ValueError(
            f"lr_scheduler_name={shown(name)}; expected CosineDecayWithWarmup, or use lr_scheduler_type"
        )
    if (ours := source.get("lr_scheduler_type", "cosine")) != "cosine":
        raise ValueError(
            f"lr_scheduler_name={name} and lr_scheduler_type={shown(ours)} contradict each other"
        )
    return {"lr_scheduler_type": "cosine"}


def _neftune(on, source: dict) -> dict:
    """PaddleMIX's switch beside its number: off, the number says nothing; on, it is 5 by default."""
    if str(on).lower() not in ("true", "false"):
        raise ValueError(f"neftune={shown(on)}; expected true or false, or use neftune_noise_alpha")
    if str(on).lower() == "false":
        return {"neftune_noise_alpha": 0.0}
    return {} if "neftune_noise_alpha" in source else {"neftune_noise_alpha": 5.0}


# The keys of PaddleMIX's files that are not ours, by fnmatch pattern: None has no effect here, a function
# translates.
TOOLKIT = dict.fromkeys(
    "src_length lazy task_name prefix_* device use_auto_parallel amp_* do_predict zero_padding "
    "optim scale_loss unified_checkpoint use_fused_* dataloader_* ignore_* text_model_name_or_path".split()
) | {"lr_scheduler_name": _other_scheduler, "neftune": _neftune}

# ---- one value


def shown(value) -> str:
    """A value in a message: as JSON, cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= 60 else text[:57] + "..."


def options_of(kind) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


WORDS = {int: "int", float: "number", bool: "bool: true or false", str: "text", dict: "object"}
WORDS[types.NoneType] = "null"


def type_name(kind) -> str:
    return " or ".join(WORDS.get(o) or "list of texts" for o in options_of(kind))


def bounds(rules) -> str:
    """The range that a number must be in, in words; "" if it has none."""
    words = {"above": "above {:,}", "low": "{:,} or more", "high": "to {:,}", "below": "below {:,}"}
    parts = [word.format(rules[k]) for k, word in words.items() if k in rules]
    if "low" in rules and "high" in rules:
        parts = [f"{rules['low']:,} to {rules['high']:,}"]
    return ", ".join(parts) + (f" (or {rules['off']}: off)" if "off" in rules else "")


def check_number(name: str, value, rules) -> None:
    # an int of 400 digits is finite, and out of bounds
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}; expected a finite number")
    inside = (
        rules.get("low", value) <= value <= rules.get("high", value)
        and (value > rules["above"] if "above" in rules else True)
        and (value < rules["below"] if "below" in rules else True)
    )
    if not inside and value != rules.get("off"):
        raise ValueError(f"{name}={shown(value)}; expected {bounds(rules)}")


def check_text(name: str, value: str, rules) -> None:
    if not value.strip():
        raise ValueError(f"{name} is empty; give a text, or leave the key out")
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError(
            f"{name}={shown(value)} holds a character that no name can have (code below 32, or a surrogate)"
        )
    if rules.get("path") and max(len(part.encode()) for part in (*value.split("/"), value[4000:])) > 255:
        raise ValueError(f"{name}={shown(value)} is longer than a file name can be (255 bytes)")


def convert(name: str, value, kind, rules):
    """`value` as the key's type, within its bounds and choices, or a ValueError that names it."""
    options = options_of(kind)
    # use_flash_attention: "true" in a JSON file means the switch, not a name
    if {bool, str} <= set(options) and value in ("true", "false"):
        value = value == "true"
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = math.inf if abs(value) > 1e308 else float(value)  # of 400 digits: float() would raise
        elif plain is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e3
        elif plain is list and isinstance(value, str):
            value = [value]
        elif not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
            continue
        break
    else:
        raise ValueError(f"{name}={shown(value)} has the wrong type; expected {type_name(kind)}")
    if isinstance(value, list):
        if rules.get("filled") and not value:
            raise ValueError(f"{name} is an empty list; name at least one, or leave the key out")
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"{name} holds {shown(item)}; expected a list of texts")
            check_text(name, item, rules)
    elif isinstance(value, str):
        check_text(name, value, rules)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_number(name, value, rules)
    if "choices" in rules and isinstance(value, bool | str | list | None):
        allowed = rules["choices"]
        for item in value if isinstance(value, list) else [value]:
            if not any(item is c or (isinstance(c, str) and item == c) for c in allowed):
                known = ", ".join("null" if c is None else json.dumps(c).strip('"') for c in allowed)
                near = nearest(item, [c for c in allowed if isinstance(c, str)])
                raise ValueError(f"{name}={shown(item)}; expected one of {known}{near}")
    return value


def from_text(name: str, text: str | None, kind):
    """The value that a text of the command line stands for; None is a key without a value."""
    options = options_of(kind)
    if text is None:
        if bool not in options:
            raise ValueError(f"--{name} needs a value: {type_name(kind)}")
        return True
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    of = {typing.get_origin(option) or option for option in options}
    if (list in of and text.startswith("[")) or (dict in of and text.startswith("{")):
        return loads(text, f"--{name}")
    if of & {int, float}:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


# ---- files and the command line


def loads(text: str, where: str):
    """JSON in which no key stands twice."""

    def once(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{where} has the key {shown(name)} twice; keep one of them")
            found[name] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}:{e.lineno}: not valid JSON ({e.msg}, column {e.colno})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; expected an object of keys and values") from None
    except ValueError as e:
        reason = f"{where} holds a number of thousands of digits" if "digits" in str(e) else str(e)
        raise ValueError(reason) from None


def here_or_shipped(path: str) -> str:
    """A file of configs/ or samples/ is found from every working directory."""
    shipped = data.ROOT / path
    ours = Path(path).parts[:1] in (("configs",), ("samples",)) and shipped.exists()
    return str(shipped) if ours and not os.path.exists(path) else path


def read_file(path: str) -> dict:
    """A configuration file's keys and values."""
    found = Path(here_or_shipped(path))
    if not found.is_file():
        what = "is a directory" if found.is_dir() else "is no file" if found.exists() else "does not exist"
        raise ValueError(f"{path} {what}; give the path of a configuration file, or a key as --key value")
    # to parse a data set would take a while, and end in a message about one of its records
    if found.suffix == ".jsonl" or found.stat().st_size > 10 * MB:
        how = f"give it as --dataset {path} (evaluate.py: --data_files {path})"
        raise ValueError(f"{path} looks like data, not like a configuration; {how}")
    try:
        text = found.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    value = loads(text, path)
    if not isinstance(value, dict):
        expected = 'expected an object, {"key": value, ...}'
        hint = f"; if it is the data, give it as --dataset {path}" if isinstance(value, list) else ""
        raise ValueError(f"{path} holds {shown(value)}; {expected}{hint}")
    return value


def sources_of(argv: list[str]) -> list[tuple[str, dict, bool]]:
    """The command line as (where, keys and values, whether the values are texts), in its order."""
    sources, i = [], 0
    while i < len(argv):
        word, i = argv[i], i + 1
        if not word.startswith("-"):
            sources.append((word, read_file(word), False))
            continue
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise ValueError(f"{word!r} is no key; keys are given as --key value (see --help)")
        if equals and not text:
            raise ValueError(f"--{name}= has no value; give one, or leave the key out")
        if not equals:
            text = None
            if i < len(argv) and not argv[i].startswith("--"):
                text, i = argv[i], i + 1
        # its keys between two files are a source of their own: later wins, also over a file
        if not sources or not sources[-1][2]:
            sources.append(("the command line", {}, True))
        sources[-1][1][name] = text
    return sources


def translate(where: str, given: dict, values: dict) -> None:
    """What one source says through Short's keys, into Config's; the source's own values must not contradict
    it."""
    new = {}
    for name in [f.name for f in fields(Short) if given.get(f.name) is not None]:
        value = given[name]
        if name == "precision":
            says = dict(zip(("bf16", "fp16", "fp16_opt_level"), PRECISIONS[value], strict=True))
        elif name == "resume":
            if value.lower() in ("true", "false", "yes") and not os.path.exists(value):
                raise ValueError(f"{where}: resume={value}; expected auto, no, or a checkpoint's directory")
            says = {"overwrite_output_dir": value == "no", "resume_from_checkpoint": None}
            if value not in ("auto", "no"):
                says["resume_from_checkpoint"] = value
        else:
            strategy, steps = INTERVALS[name]
            says = {strategy: value} if isinstance(value, str) else {strategy: "steps", steps: value}
        # in one source: a later one may change its mind
        for key, ours in says.items():
            if key in given and given[key] != ours:
                raise ValueError(
                    f"{where}: {name}={value} and {key}={shown(given[key])} "
                    f"contradict each other; keep {name}"
                )
        new |= says
    values |= {**{k: v for k, v in given.items() if k not in SHORT}, **new}


SHORT = {f.name for f in fields(Short)}
INTERVALS = {"save": ("save_strategy", "save_steps"), "evaluate": ("evaluation_strategy", "eval_steps")}


def parse_config(argv: list[str], cls=Config, usage: str = "train.py [CONFIG.json ...] [--key value ...]"):
    """`[config.json ...] [--key value ...]` -> a `cls`. Raises ValueError; -h and --help print the keys and
    exit."""
    if "-h" in argv or "--help" in argv:
        if terminal.is_main():
            print(help_text(cls, usage))
        raise SystemExit(0)
    known = {f.name: f for f in (*fields(cls), *fields(Short))}
    hints = typing.get_type_hints(cls) | typing.get_type_hints(Short)
    values = {}
    for where, source, texts in sources_of(argv):
        given, toolkit = {}, {}
        for name, value in source.items():
            pattern = next((p for p in TOOLKIT if fnmatch.fnmatch(name, p)), None)
            if name not in known and pattern is None:
                near = nearest(name, known) or "; --help lists all keys"
                raise ValueError(f"unknown key {shown(name)}{near}")
            if name in known:
                value = from_text(name, value, hints[name]) if texts else value
                given[name] = convert(name, value, hints[name], known[name].metadata)
            elif TOOLKIT[pattern]:
                toolkit |= TOOLKIT[pattern](value, source)
            else:
                note(f"warning: {name} has no effect here")
        translate(where, given | toolkit, values)
    # first, since the sample configuration's keys are defaults, over which what was given wins
    if values.get("dataset") is None:
        values = with_sample_defaults(values, hints)
    cfg = cls(**values)
    if isinstance(cfg.dataset, str):
        cfg.dataset = data.dataset_of(cfg.dataset)
    validate(cfg)
    if cfg.dataset is not None:  # the entries carry the split from here on
        cfg.dataset, cfg.eval_split = data.hold_out(cfg.dataset, cfg.eval_split), 0.0
    return cfg


def with_sample_defaults(values: dict, hints: dict) -> dict:
    """Without a dataset: the one of samples/, with the settings that suit it."""
    stage = "lora" if values.get("lora") else values.get("stage", "sft")
    # looked for among those that are there: a stage may be any text, also none that a file can be named
    shipped = (data.ROOT / "configs" / (values.get("model") or "qwen_vl")).glob("samples_*.json")
    if (path := next((p for p in shipped if p.stem == f"samples_{stage}"), None)) is None:
        return values
    note(f"no dataset given: training on samples/ with the settings of {path.relative_to(data.ROOT)}")
    rules = {f.name: f.metadata for f in fields(Config)}
    defaults = {k: convert(k, v, hints[k], rules[k]) for k, v in read_file(str(path)).items()}
    return {**defaults, **{k: v for k, v in values.items() if k != "dataset"}}


# ---- keys together


def validate(cfg: Config) -> None:
    """What one key alone cannot say: keys that contradict each other are refused, keys without effect are
    named."""
    validate_dataset(cfg)
    validate_pipeline(cfg)
    for name in ("model_name_or_path", "init_from"):
        if getattr(cfg, name):
            setattr(cfg, name, here_or_shipped(getattr(cfg, name)))
    if cfg.bf16 and cfg.fp16:
        raise ValueError("bf16 and fp16 are both true; use one")
    if not cfg.do_train and not cfg.do_eval and not cfg.dry_run:
        raise ValueError("do_train and do_eval are both false: there is nothing to do; set one of them")
    for name in ("eta_min", "warmup_start_lr"):
        if getattr(cfg, name) > cfg.learning_rate > 0:
            raise ValueError(
                f"{name}={getattr(cfg, name)} is above learning_rate={cfg.learning_rate}; lower it"
            )
    if cfg.load_best_model_at_end and not cfg.save_strategy == cfg.evaluation_strategy != "no":
        raise ValueError(
            f"load_best_model_at_end needs evaluation_strategy={cfg.evaluation_strategy} and "
            f"save_strategy={cfg.save_strategy} to be the same of epoch and steps"
        )
    eval_steps = cfg.eval_steps or cfg.save_steps
    if cfg.load_best_model_at_end and cfg.save_strategy == "steps" and eval_steps % cfg.save_steps:
        raise ValueError(
            f"load_best_model_at_end needs a checkpoint of every evaluation: eval_steps={eval_steps} must be "
            f"a multiple of save_steps={cfg.save_steps}"
        )
    if cfg.early_stopping_patience and cfg.evaluation_strategy == "no":
        raise ValueError(
            f"early_stopping_patience={cfg.early_stopping_patience} counts evaluations, and "
            "evaluation_strategy=no has none; set evaluate to a number of steps, or to epoch"
        )
    if cfg.metric_for_best_model != "eval_loss" and not cfg.eval_with_do_generation:
        raise ValueError(
            f"metric_for_best_model={cfg.metric_for_best_model} needs eval_with_do_generation=true"
        )
    check_rates(cfg)
    check_quantize(cfg)
    if cfg.neftune_noise_alpha and cfg.stage == "pretrain1":
        raise ValueError(
            f"neftune_noise_alpha={cfg.neftune_noise_alpha} with stage=pretrain1: noise is for a language "
            "model's embeddings, and stage 1 has none; leave it out"
        )
    loggers.check(cfg.report_to or [])
    note_without_effect(cfg)


def note_without_effect(cfg: Config) -> None:
    """Names what was set and changes nothing, since another key is as it is."""
    for names, has_effect, needs in (
        (
            "lora_rank lora_alpha use_rslora lora_dropout lora_target_modules lora_split loraplus_lr_ratio "
            "modules_to_save use_dora init_lora_weights",
            cfg.lora or cfg.lora_path,
            "lora=true",
        ),
        ("eval_steps", cfg.evaluation_strategy == "steps", "evaluation_strategy=steps"),
        (
            "save_steps",
            "steps" in (cfg.save_strategy, cfg.eval_steps is None and cfg.evaluation_strategy),
            "save_strategy=steps",
        ),
        (
            "eval_with_do_generation eval_accumulation_steps",
            cfg.evaluation_strategy != "no" or cfg.do_eval,
            "an evaluation",
        ),
        ("max_images", cfg.mixtoken, "mixtoken=true"),
        ("sharding_parallel_degree", cfg.sharding or cfg.sharding_parallel_degree in (-1, 1), "sharding"),
        ("pipeline_schedule", cfg.pipeline_parallel_degree > 1, "pipeline_parallel_degree"),
        ("warmup_ratio", not cfg.warmup_steps, "warmup_steps=0"),
    ):
        unused = [n for n in names.split() if getattr(cfg, n) != DEFAULTS[n]]
        if unused and not has_effect:
            note(f"warning: without {needs} there is no effect of {', '.join(unused)}")
    if cfg.init_lora_weights == "pissa" and cfg.lora_dropout:
        note(f"warning: lora_dropout={cfg.lora_dropout} drops of what PiSSA took out of weights; it means 0")
    if cfg.max_steps and cfg.warmup_steps >= cfg.max_steps > 1:
        note(f"warning: warmup_steps={cfg.warmup_steps} lasts for all of max_steps={cfg.max_steps}")
    if cfg.warmup_ratio == 1 and not cfg.warmup_steps:
        note("warning: warmup_ratio=1: the learning rate rises until the end")
    if cfg.learning_rate == 0 and cfg.do_train:
        note("warning: learning_rate=0: nothing is learned")


def validate_dataset(cfg: Config) -> None:
    if cfg.dataset is None:
        return
    for split, entries in cfg.dataset.items():
        if split not in ("train", "eval", "probe"):
            raise ValueError(f"dataset has the key {shown(split)}; expected train, eval and probe")
        if not isinstance(entries, list) or (not entries and split == "train"):
            raise ValueError(
                f"dataset.{split} is {shown(entries)}; expected a list of entries with data_files"
            )
        cfg.dataset[split] = [check_entry(f"dataset.{split}[{n}]", entry) for n, entry in enumerate(entries)]
    if cfg.eval_split and cfg.dataset.get("eval"):
        raise ValueError(f"eval_split={cfg.eval_split} and the dataset's eval entries; use one of the two")
    evaluates = cfg.dataset.get("eval") or cfg.eval_split
    for name, off in (("evaluation_strategy", "no"), ("do_eval", False), ("sample_steps", None)):
        if (value := getattr(cfg, name)) != off and not evaluates:
            raise ValueError(
                f"dataset has no 'eval' entry, which {name}={shown(value).strip(chr(39))} needs; add one, or "
                "eval_split=0.05"
            )


def check_entry(where: str, entry) -> dict:
    """An entry whose keys are known and whose values have their types; shipped files are found from
    everywhere."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {shown(entry)}; expected an object with data_files")
    known, hints = {f.name: f for f in fields(EntryKeys)}, typing.get_type_hints(EntryKeys)
    for name in entry:
        if name not in known:
            raise ValueError(f"{where} has the unknown key {shown(name)}{nearest(name, known)}")
    if "data_files" not in entry:
        raise ValueError(f"{where} has no data_files; name the file of its records")
    for name, value in entry.items():
        convert(f"{where}.{name}", value, hints[name], known[name].metadata)
    entry, files = dict(entry), entry["data_files"]
    files = here_or_shipped(files) if isinstance(files, str) else [here_or_shipped(f) for f in files]
    entry["data_files"] = files
    if entry.get("image_root"):
        entry["image_root"] = here_or_shipped(entry["image_root"])
    return entry


def validate_pipeline(cfg: Config) -> None:
    """What pipeline stages can't be combined with."""
    pp = f"pipeline_parallel_degree={cfg.pipeline_parallel_degree}"
    if cfg.pipeline_parallel_degree < 2:
        return
    micro_batches = cfg.gradient_accumulation_steps
    rounds = max(1, micro_batches // cfg.pipeline_parallel_degree)
    if cfg.pipeline_schedule == "1f1b" and micro_batches < cfg.pipeline_parallel_degree:
        raise ValueError(
            f"gradient_accumulation_steps={micro_batches} is less than {pp}: the micro-batches do not fill "
            "pipeline_schedule=1f1b; raise it, or use pipeline_schedule=gpipe"
        )
    if cfg.pipeline_schedule == "interleaved" and micro_batches % rounds:
        raise ValueError(
            f"gradient_accumulation_steps={micro_batches} with {pp} and pipeline_schedule=interleaved; use a "
            f"multiple of {cfg.pipeline_parallel_degree}"
        )
    for key in ("cache_image_features", "eval_with_do_generation", "sample_steps"):
        if value := getattr(cfg, key):
            raise ValueError(
                f"{key}={json.dumps(value)} needs the whole model on a rank, {pp} cuts it; use one of the two"
            )


def check_rates(cfg: Config) -> None:
    """The rules are numbers, and factors of a learning rate that is not 0."""
    rules = next(f.metadata for f in fields(Config) if f.name == "learning_rate_rules")
    for pattern, rate in (cfg.learning_rate_rules or {}).items():
        where = f"learning_rate_rules[{shown(pattern)}]"
        check_text(where, pattern, {})
        convert(where, rate, float, rules)
    if cfg.learning_rate_rules and not cfg.learning_rate:
        raise ValueError(
            "learning_rate=0 with learning_rate_rules: the schedule is learning_rate's; give it a peak, and "
            "freeze_include what shall not train"
        )


def check_quantize(cfg: Config) -> None:
    """What frozen weights in few bits can't be combined with."""
    if cfg.quantize and not cfg.lora:
        raise ValueError(
            f"quantize={cfg.quantize} without lora=true: weights in few bits cannot be trained; add lora=true"
        )
    dora, pissa = cfg.use_dora, cfg.init_lora_weights == "pissa"
    others = ["quantize", "tensor_parallel_degree", "lora_split"] if dora else []
    others += ["quantize", "pipeline_parallel_degree", "lora_split", "use_dora", "lora_path"] if pissa else []
    for name in others:
        if (value := getattr(cfg, name)) != DEFAULTS[name]:
            raise ValueError(
                f"{'init_lora_weights=pissa' if pissa else 'use_dora=true'} with {name}="
                f"{json.dumps(value).strip(chr(34))}: whole weights of the base alone are needed; leave one "
                "of the two out"
            )
    if cfg.quantize and cfg.tensor_parallel_degree > 1:
        raise ValueError(
            f"quantize={cfg.quantize} with tensor_parallel_degree={cfg.tensor_parallel_degree}: blocks of 64 "
            "weights are not cut; use sharding, or pipeline_parallel_degree"
        )


# ---- shown to a person

DEFAULTS = {f.name: f.default for f in fields(Config)}


def differences(cfg: Config) -> str:
    """What is not as by default, in one line."""
    changed = {k: v for k, v in dataclasses.asdict(cfg).items() if v != DEFAULTS.get(k)}
    return " | ".join(
        f"{k} {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in changed.items()
    )


def help_text(cls=Config, usage: str = "train.py [CONFIG.json ...] [--key value ...]") -> str:
    """Every key by group: its type, meaning, default and bounds."""
    hints = typing.get_type_hints(cls) | typing.get_type_hints(Short) | typing.get_type_hints(EntryKeys)
    groups: dict[str, list] = {}
    title = ""
    for f in (*fields(cls), *fields(Short)):
        title = f.metadata.get("group", title)
        groups.setdefault(title, []).append(f)
    lines = [
        f"usage: {usage}",
        "",
        "Keys come from JSON files and the command line; later wins; --flag alone means true.",
        "Keys in brackets say the same in one word.",
    ]
    for title, keys in groups.items():
        lines += ["", f"{title}:"]
        for f in keys:
            lines += terminal.help_lines(f"--{f.name}", kind_in_help(hints[f.name], f), help_of(f))
    lines += ["", 'keys of an entry of "dataset":']
    for f in fields(EntryKeys):
        lines += terminal.help_lines(f.name, kind_in_help(hints[f.name], f), help_of(f))
    return "\n".join(lines)


def kind_in_help(kind, f) -> str:
    if "choices" in f.metadata and list not in {typing.get_origin(o) for o in options_of(kind)}:
        choices = [json.dumps(c).strip('"') for c in f.metadata["choices"] if c is not None]
        return "N|" * (int in options_of(kind)) + "|".join(choices) if len(choices) <= 5 else "NAME"
    if f.metadata.get("path"):
        return "PATH"
    if "shown" in f.metadata:
        return f.metadata["shown"]
    plain = next(o for o in options_of(kind) if o is not type(None))
    return {int: "N", float: "X", bool: "true|false", str: "TEXT", dict: "DATA"}.get(
        plain, "TEXT|[TEXT, ...]"
    )


def help_of(f) -> str:
    rules, notes = f.metadata, []
    if len(choices := rules.get("choices", ())) > 5:
        notes.append("one of " + ", ".join(map(str, choices)))
    if f.default is not None:
        notes.append(f"default {json.dumps(f.default).strip(chr(34))}")
    if any(k in rules for k in ("low", "high", "above", "below")):
        notes.append(bounds(rules))
    return rules["help"] + (f" [{'; '.join(notes)}]" if notes else "")
