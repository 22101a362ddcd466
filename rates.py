"""A learning rate for each part: rules by name, decay over the vision tower's layers, LoRA+. And fp16's
loss scale.

    python train.py --learning_rate_rules '{"transformer.visual.*": 2e-6}' --vision_lr_decay 0.9 --dry_run

Everything is a factor of learning_rate, so that one schedule (warm-up, cosine, eta_min) scales them all:

    rate(name) = rule's or learning_rate * vision_lr_decay ** layers above * loraplus_lr_ratio for a LoRA B

The layers of a tower of N blocks are counted as BEiT (arXiv:2106.08254) and LAVIS do: block i (from 0) has
N - i layers above it, what stands before the blocks N + 1, a norm behind them 1. LoRA+: arXiv:2402.12354.
"""

import difflib
import fnmatch
import math
import re
from dataclasses import dataclass
from typing import Annotated

from torch import nn

import checkpoint
import parallel
import schema
from config import Config

KEYS = ("learning_rate_rules", "vision_lr_decay", "loraplus_lr_ratio")


@dataclass(frozen=True)
class Rate:
    """The rate of some parameters: its factor, and where that comes from."""

    factor: float = 1.0  # of learning_rate
    reason: str = "learning_rate"


def facts(cfg: Config) -> dict:
    """What a checkpoint keeps of it. The rules as pairs: of two that match, the first one counts."""
    rules = [[pattern, rate] for pattern, rate in (cfg.learning_rate_rules or {}).items()]
    return {**{key: getattr(cfg, key) for key in KEYS}, "learning_rate_rules": rules}


def rates(model: nn.Module, definition, cfg: Config) -> dict[str, Rate]:
    """name -> rate of every trainable parameter of the whole model. ValueError for a rule or a decay that
    would change nothing: it is a misspelt one, or its part is frozen."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    rules = cfg.learning_rate_rules or {}

    def first(name: str) -> str | None:
        return next((pattern for pattern in rules if fnmatch.fnmatch(name, pattern)), None)

    # Each rule must change something: else a misspelt one would train its part at the common rate.
    for pattern in rules:
        if not fnmatch.filter(trainable, pattern):
            frozen = fnmatch.filter([name for name, _ in model.named_parameters()], pattern)
            near = difflib.get_close_matches(pattern.strip("*"), trainable, n=2, cutoff=0)
            why = f"matches {len(frozen)} parameters, all frozen" if frozen else "matches no parameter"
            raise ValueError(
                f"learning_rate_rules: {pattern!r} {why}; near names that train: {', '.join(near)}"
            )
        if all(first(name) != pattern for name in trainable):
            raise ValueError(
                f"learning_rate_rules: all that {pattern!r} matches has the rate of a rule before it; the "
                "first one that matches counts, so put the narrower rule in front"
            )
    layers = layers_above(model, definition, trainable) if cfg.vision_lr_decay != 1 else {}
    if cfg.vision_lr_decay != 1 and not layers:
        raise ValueError(
            f"vision_lr_decay={cfg.vision_lr_decay:g}: no parameter of the vision tower trains; leave the "
            "key out, or name the tower in freeze_exclude"
        )
    found = {}
    for name in trainable:
        pattern = first(name)
        factor, reasons = 1.0, ["learning_rate" if pattern is None else f"rule {pattern}"]
        if pattern is not None:
            factor = rules[pattern] / cfg.learning_rate
        if name in layers:
            factor *= cfg.vision_lr_decay ** layers[name]
            reasons.append(f"vision_lr_decay ** {layers[name]}")
        if ".lora_B." in name and cfg.loraplus_lr_ratio != 1:
            factor *= cfg.loraplus_lr_ratio
            reasons.append("loraplus_lr_ratio")
        found[name] = Rate(factor, " * ".join(reasons))
    return found


def layers_above(model: nn.Module, definition, names: list[str]) -> dict[str, int]:
    """name -> how many layers of the vision tower its part is below what takes the tower's output."""
    if not definition.vision_stem:
        raise ValueError("vision_lr_decay: this model's file does not say what vision_stem is (vlm.Model)")
    # The blocks' own name in the model, whatever the model calls them.
    prefix = next(name for name, module in model.named_modules() if module is model.vision_blocks) + "."
    found = {}
    for name in names:
        if block := re.match(re.escape(prefix) + r"(\d+)\.", name):
            found[name] = len(model.vision_blocks) - int(block[1])
        elif checkpoint.matches(name, definition.vision_stem):
            found[name] = len(model.vision_blocks) + 1
        elif next(part for part, p in definition.parts.items() if fnmatch.fnmatch(name, p)) == "vision":
            found[name] = 1
    return found


def param_groups(model: nn.Module, rates: dict[str, Rate], cfg: Config) -> list[dict]:
    """AdamW's groups: of one rate and one weight decay each, the decayed ones first."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # LAVIS decays its temperature, which is one number; other scalars and biases are exempt.
    one_number = {n for n, p in trainable if p.numel() == 1 and cfg.decay_scalars}
    exempt = {n for n, p in trainable if n.endswith("bias") or p.ndim < 2 and n not in one_number}
    # As few groups as there are pairs of rate and decay: the fused optimiser launches once for each.
    groups: dict[tuple, dict] = {}
    for name, p in sorted(trainable, key=lambda pair: pair[0] in exempt):  # stable: the model's order
        decay, rate = 0.0 if name in exempt else cfg.weight_decay, rates.get(name, Rate())
        group = {"params": [], "weight_decay": decay, "factor": rate.factor}
        group |= {"lr": cfg.learning_rate * rate.factor, "reason": rate.reason}
        groups.setdefault((decay, rate), group)["params"].append(p)
    return list(groups.values())


def table(model: nn.Module, rates: dict[str, Rate], cfg: Config) -> str:
    """The groups with their rates and sizes; "" where there is one rate for all."""
    if all(rate == Rate() for rate in rates.values()):
        return ""
    lines = [f"{'peak rate':<12}{'weight decay':<14}{'parameters':>14}  is"]
    for group in param_groups(model, rates, cfg):
        size = sum(parallel.whole_shape(p).numel() for p in group["params"])
        lines.append(f"{group['lr']:<12.4g}{group['weight_decay']:<14g}{size:>14,}  {group['reason']}")
    return "\n".join(lines)


def learning_rate_at(step: int, total: int, cfg: Config, epoch: int = 0) -> float:
    """Of the update that follows `step` finished ones."""
    # warmup_steps, where given, wins over the ratio, as in transformers.
    warmup = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)
    # LAVIS's rule: the rate is constant within an epoch, but for the warm-up in the first one.
    if cfg.lr_scheduler_type == "cosine_epochs":  # warm-up ends with the first epoch at the latest
        if epoch == 0:
            warmed = cfg.warmup_start_lr + (cfg.learning_rate - cfg.warmup_start_lr) * step / max(warmup, 1)
            return min(cfg.learning_rate, warmed)
        shape = (1 + math.cos(math.pi * epoch / cfg.num_train_epochs)) / 2
        return cfg.eta_min + (cfg.learning_rate - cfg.eta_min) * shape
    if step < warmup:
        return cfg.warmup_start_lr + (cfg.learning_rate - cfg.warmup_start_lr) * step / warmup
    # From the end of the warm-up (0) to the end of the run (1).
    done = (step - warmup) / max(1, total - warmup)
    # 1 at the end of the warm-up, 0 at the end of the run ("constant" stays).
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        cfg.lr_scheduler_type
    ]
    return cfg.eta_min + (cfg.learning_rate - cfg.eta_min) * shape


class LossScaler:
    """Dynamic loss scale for fp16: halved when a gradient overflows, doubled after 2,000 good steps."""

    def __init__(self, enabled: bool):
        # 2^16, as torch's own begins: too large at first is found out in a few steps, too small never.
        self.scale, self.good, self.skipped, self.enabled = (2.0**16 if enabled else 1.0), 0, 0, enabled

    def state(self) -> dict:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state: dict) -> None:
        for key, least in {"scale": 1.0, "good": 0, "skipped": 0}.items():
            schema.check(
                state.get(key), Annotated[type(least), least, 1e38], f"the checkpoint's scaler: {key}"
            )
        self.scale, self.good, self.skipped = state["scale"], state["good"], state["skipped"]

    def update(self, finite: bool) -> None:
        # An overflow begins the count anew: growth waits for 2,000 good steps in a row.
        self.good, self.skipped = (self.good + 1, 0) if finite else (0, self.skipped + 1)
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good % 2000 == 0:
            self.scale *= 2
        # From 2^16 down to 1 in 16 halvings: still overflowing means that the values themselves do.
        if self.skipped >= 25:
            raise ValueError("25 steps in a row overflowed in fp16; use bf16=true, or a lower learning_rate")
