"""The configuration of a run: every key with its default, and how it is read.

    cfg = parse_config(["configs/qwen_vl/lora.json", "--learning_rate", "2e-5"])

Keys come from JSON files and `--key value`; later wins; `--flag` alone means true. Keys of PaddleMIX's
`paddlemix/tools` that mean nothing here are taken with a warning, so its JSON files run unchanged.
"""

import contextlib
import difflib
import fnmatch
import json
import sys
import types
import typing
from dataclasses import dataclass

import checkpoint
import data
import metrics
import parallel
import pipeline


@dataclass
class Config:
    # model and stage
    model: str | None = None  # qwen_vl; default: from the checkpoint's config.json
    model_name_or_path: str = "tiny"  # a checkpoint directory, or a preset: tiny is the one in samples/
    stage: str = "sft"  # sft; the model's own pre-training stages: pretrain (Qwen-VL), pretrain1 and pretrain2 (BLIP-2)
    # checkpoint whose tensors replace those of the same name: stage 2 begins with stage 1's
    init_from: str | None = None
    freeze_include: list[str] | None = None  # fnmatch on parameter names: frozen
    freeze_exclude: list[str] | None = None  # carved out of freeze_include, or of what lora freezes: trainable
    # data
    dataset: dict | None = None  # {"train": [entry, ...], "eval": [...]}; default: samples/
    mixtoken: bool = False  # fill each stream up to max_length tokens
    max_length: int = 2048  # tokens a stream, and the cap for one sample
    max_images: int | None = None  # pictures a stream
    max_bad_samples: float = 0.01  # share of unusable records above which the run stops
    # training pictures move by up to this share of a side, scale by it, turn by so many radians
    image_jitter: float = 0.0
    cache_image_features: bool = False  # encode each picture once; only with a frozen vision tower
    num_workers: int = 2  # data processes per rank
    # run
    output_dir: str = "output"
    overwrite_output_dir: bool = False  # start anew instead of continuing the run that is there
    resume_from_checkpoint: str | bool | None = None  # a checkpoint directory, or true: the last one
    accept_changed_data: bool = False  # continue although the data files have changed since the checkpoint
    num_train_epochs: float = 1
    max_steps: int | None = None
    per_device_train_batch_size: int = 1  # samples, or with mixtoken streams, a micro-batch
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    eval_accumulation_steps: int | None = None  # eval batches kept on the device before they move to the host
    do_train: bool = True
    do_eval: bool = False  # evaluate at the end too
    save_strategy: str = "steps"  # no, epoch, steps
    save_steps: int = 500
    save_total_limit: int | None = None  # the best one is kept besides
    evaluation_strategy: str = "no"  # no, epoch, steps
    eval_steps: int | None = None  # default: save_steps
    # answers the eval questions too: eval_cider, eval_bleu_4, eval_vqa_accuracy, eval_accuracy, ... by their format
    eval_with_do_generation: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"  # or one of those: the higher the better
    seed: int = 42
    # optimiser: AdamW, no decay on biases and norm weights
    learning_rate: float = 5e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    decay_scalars: bool = False  # weight decay on single numbers too (LAVIS decays its temperature)
    lr_scheduler_type: str = "linear"  # linear, cosine, constant; cosine_epochs: steps down once an epoch, as LAVIS
    warmup_ratio: float = 0.0
    warmup_steps: int = 0  # wins over warmup_ratio
    warmup_start_lr: float = 0.0
    eta_min: float = 0.0  # where linear and cosine end
    # precision and speed
    bf16: bool = False
    fp16: bool = False
    fp16_opt_level: str = "O1"  # O1: fp32 weights, autocast; O2: computes in 16 bits, fp32 master weights
    recompute: bool = False  # activation checkpointing
    compile: bool = False  # torch.compile of the blocks
    use_flash_attention: str | bool = "auto"  # auto: Triton kernels on a GPU; true: or an error; false: plain PyTorch
    # adapters
    lora: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None  # regular expressions, full match on module names
    lora_path: str | None = None  # start from this adapter
    lora_split: bool = False  # an A and a B for each of q, k, v in a packed weight, as SwissArmyTransformer has them
    pre_seq_len: int | None = None  # P-tuning: only so many keys and values in front of every sample are trained
    # layout
    tensor_parallel_degree: int = 1  # ranks that hold a layer together; -1, like 1: off
    pipeline_parallel_degree: int = 1  # stages on ranks of their own; their micro-batches: gradient_accumulation_steps
    # 1f1b: a stage keeps activations of few micro-batches; gpipe: all forward, then all backward passes; interleaved:
    # 1f1b with two stages on each rank, which wait half as long and send twice as much
    pipeline_schedule: str = "1f1b"
    sharding_parallel_degree: int | None = None  # default: all data-parallel ranks
    sharding: str | None = None  # stage1, stage2, stage3
    # output
    logging_steps: int = 10
    disable_tqdm: bool = False
    report_to: list[str] | None = None  # tensorboard
    benchmark: bool = False  # print samples/s, tokens/s and peak memory at the end
    skip_memory_metrics: bool = True
    dry_run: bool = False  # print the plan and stop


NO_EFFECT = [  # keys of the toolkit whose files run here unchanged
    "src_length", "lazy", "task_name", "prefix_*", "neftune*", "device", "use_auto_parallel", "amp_*", "do_predict",
    "zero_padding", "optim", "scale_loss", "unified_checkpoint", "use_fused_*", "dataloader_*", "ignore_*",
    "text_model_name_or_path",
]  # fmt: skip
CHOICES = {
    "save_strategy": ("no", "epoch", "steps"),
    "evaluation_strategy": ("no", "epoch", "steps"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "cosine_epochs"), "fp16_opt_level": ("O1", "O2"),
    "metric_for_best_model": ("eval_loss", *(f"eval_{s}" for scores in metrics.SCORES.values() for s in scores)),
    "sharding": (None, *parallel.STAGES), "pipeline_schedule": pipeline.SCHEDULES,
    "use_flash_attention": ("auto", True, False),
}  # fmt: skip


def convert(key: str, value, kind, from_text: bool):
    """`value` as the field's type; text from the command line is read as JSON where the type is not str."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if from_text and value not in (None, True):
        if type(None) in options and value.lower() in ("none", "null"):
            return None
        for option in options:
            if option is bool and value.lower() in ("true", "false"):
                return value.lower() == "true"
            if typing.get_origin(option) is list and not value.startswith("["):
                return [value]
            if option is not str and option is not bool:
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
                    break
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
        if plain is int and isinstance(value, float) and value.is_integer():
            return int(value)
    expected = " or ".join(
        "null" if o is type(None) else str(o) if typing.get_origin(o) else o.__name__ for o in options
    )
    raise ValueError(f"{key}={value!r} has the wrong type; expected {expected}")


def parse_config(argv: list[str]) -> Config:
    """`[config.json ...] [--key value ...]` -> Config. Raises ValueError for an unknown key, a wrong type or value."""
    hints = typing.get_type_hints(Config)
    values, from_text, i = {}, {}, 0
    while i < len(argv):
        if not argv[i].startswith("--"):
            given = checkpoint.read_json(argv[i], "give the path of a configuration file")
            i += 1
        else:
            key, _, value = argv[i][2:].partition("=")
            i += 1
            if not value and i < len(argv) and not argv[i].startswith("--"):
                value, i = argv[i], i + 1
            given = {key: value or True}
            from_text[key] = True
        for key, value in given.items():
            if key == "lr_scheduler_name" and value == "CosineDecayWithWarmup":  # the toolkit's other name for it
                key, value = "lr_scheduler_type", "cosine"
            if any(fnmatch.fnmatch(key, pattern) for pattern in NO_EFFECT):
                print(f"warning: {key} has no effect here", file=sys.stderr)
            elif key not in hints:
                near = difflib.get_close_matches(key, hints, n=1, cutoff=0)
                raise ValueError(f"unknown key {key!r}; the nearest known key is {near[0]!r}")
            else:
                values[key] = convert(key, value, hints[key], from_text.get(key, False))
    if values.get("dataset") is None:
        stage = "lora" if values.get("lora") else values.get("stage", "sft")
        path = data.ROOT / "configs" / (values.get("model") or "qwen_vl") / f"samples_{stage}.json"
        if path.exists():
            given = json.loads(path.read_text(encoding="utf-8"))
            defaults = {k: convert(k, v, hints[k], False) for k, v in given.items()}
            values = {**defaults, **values}
            print(
                f"no dataset given: training on samples/ with the settings of {path.relative_to(data.ROOT)}",
                file=sys.stderr,
            )
    cfg = Config(**values)
    validate(cfg)
    return cfg


def validate(cfg: Config) -> None:
    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        if value not in choices:
            raise ValueError(f"{key}={value!r}; expected one of {', '.join(map(str, choices))}")
    positive = ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size",
                "gradient_accumulation_steps",                "save_steps", "logging_steps", "lora_rank")  # fmt: skip
    optional = ("pre_seq_len", "max_steps", "max_images", "eval_steps", "save_total_limit", "eval_accumulation_steps")
    for key in (*positive, *(k for k in optional if getattr(cfg, k) is not None)):
        if getattr(cfg, key) < 1:
            raise ValueError(f"{key}={getattr(cfg, key)}; expected at least 1")
    for key in (
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "num_train_epochs",
        "num_workers",
        "max_grad_norm",
        "eta_min",
    ):
        if getattr(cfg, key) < 0:
            raise ValueError(f"{key}={getattr(cfg, key)}; expected 0 or more")
    for key in ("warmup_ratio", "lora_dropout", "max_bad_samples", "image_jitter", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(cfg, key) <= 1:
            raise ValueError(f"{key}={getattr(cfg, key)}; expected 0 to 1")
    if cfg.bf16 and cfg.fp16:
        raise ValueError("bf16 and fp16 are both true; use one")
    if cfg.tensor_parallel_degree != -1 and cfg.tensor_parallel_degree < 1:
        raise ValueError(f"tensor_parallel_degree={cfg.tensor_parallel_degree}; expected 1 or more (or -1: off)")
    if cfg.pipeline_parallel_degree != -1 and cfg.pipeline_parallel_degree < 1:
        raise ValueError(f"pipeline_parallel_degree={cfg.pipeline_parallel_degree}; expected 1 or more (or -1: off)")
    validate_pipeline(cfg)
    if cfg.load_best_model_at_end and (cfg.evaluation_strategy == "no" or cfg.save_strategy != cfg.evaluation_strategy):
        raise ValueError(
            f"load_best_model_at_end needs evaluation_strategy={cfg.evaluation_strategy} and "
            f"save_strategy={cfg.save_strategy} to be the same of epoch and steps"
        )
    eval_steps = cfg.eval_steps or cfg.save_steps
    if cfg.load_best_model_at_end and cfg.save_strategy == "steps" and eval_steps % cfg.save_steps:
        raise ValueError(
            f"load_best_model_at_end needs a checkpoint of every evaluation: eval_steps={eval_steps} must be a "
            f"multiple of save_steps={cfg.save_steps}"
        )
    if cfg.metric_for_best_model != "eval_loss" and not cfg.eval_with_do_generation:
        raise ValueError(f"metric_for_best_model={cfg.metric_for_best_model} needs eval_with_do_generation=true")
    if cfg.dataset is not None and (unknown := set(cfg.dataset) - {"train", "eval"}):
        raise ValueError(f"dataset has the key {unknown.pop()!r}; expected train and eval")


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
            f"gradient_accumulation_steps={micro_batches} with {pp} and pipeline_schedule=interleaved; use a multiple "
            f"of {cfg.pipeline_parallel_degree}"
        )
    for key in ("cache_image_features", "eval_with_do_generation"):
        if getattr(cfg, key):
            raise ValueError(f"{key}=true needs the whole model on a rank, {pp} cuts it; use one of the two")
