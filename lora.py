"""LoRA adapters: low-rank updates beside frozen linear layers, in PEFT's file format.

    names = inject(model, LORA_TARGETS, rank=8, alpha=16, dropout=0.05)   # nn.Linear -> LoraLinear, in place
    with dropout_rows(batch.dropout_keys): ...  # the model says whose rows adapters see
    save_adapter("output", model, LoraConfig(base, rank=8, alpha=16), names, extra_trained={}, tensors=get)
    load_adapter(model, "output")                                         # ours or PEFT's

y = W x + b + (alpha / rank) B A x; A (rank, in) starts random and B (out, rank) zero (arXiv:2106.09685 sec.
4.1). File format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import contextlib
import difflib
import functools
import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import parallel
import quantize
import schema
import terminal
import vlm
from kernels.dispatch import autocast_dtype, without_autocast
from kernels.dropout import Mask, Rows, drop, dropout
from kernels.linear import AnyLinear, linear

PREFIX = "base_model.model."  # PEFT puts it before every name
MAGNITUDE = ".lora_magnitude_vector"


class LoraLinear(nn.Linear):
    """A linear layer plus scaling * B A, made by `inject` out of an nn.Linear; weight and bias keep their
    names."""

    rank: int
    scaling: float
    dropout: float
    seed: int  # from the module's name: dropout masks differ between modules
    # (G, P): output rows are G groups of P parts, each part with an A and a B of its own
    parts: tuple[int, int] | None
    first_channel: int  # tensor parallelism sets it where a rank has a slice of the input channels
    gain: torch.Tensor | None = None  # DoRA's row factors, kept while nothing trains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = self.lora_magnitude_vector
        # The usual case: two thin products beside the layer's own.
        if magnitude is None:
            return self.updated(linear(self, x), x)
        # DoRA: rows of W + scaling B A have the lengths that were trained. Unlike in PEFT, dropout is the
        # update's alone.
        gain = self.gain
        if gain is None:
            gain = magnitude / row_norms(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
            self.gain = None if self.training else gain
        y = self.updated(F.linear(x, self.weight), x)
        y = y * gain.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def train(self, mode: bool = True):
        self.gain = None
        return super().train(mode)

    def updated(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + scaling * B A x, with dropout on x. y is the base's product, and may be overwritten."""
        scaling, mask = self.scaling, None
        # Without keys no row is anybody's: a model that is asked, or a test.
        if self.training and self.dropout > 0 and Rows.keys is not None:
            mask = Mask(Rows.keys, self.dropout, self.seed, self.first_channel, Rows.images)
            scaling /= 1 - self.dropout
        # Where the layer is cut, one side is whole on all ranks, and its gradient is the sum of theirs.
        A, B = parallel.shared_weight(self.lora_A), parallel.shared_weight(self.lora_B)
        # the adapter may be fp32 beside 16-bit weights
        x, A, B = (t.to(autocast_dtype(x.device) or A.dtype) for t in (x, A, B))
        if self.parts is None and not torch.compiler.is_compiling():
            return _LowRank.apply(y, x, A, B, scaling, mask)
        z = F.linear(x if mask is None else dropout(x, mask), A) * scaling
        return y + (F.linear(z, B) if self.parts is None else self.split_B(z, B)).to(y.dtype)

    def split_B(self, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """B z, but of B only the blocks (part j of the rows, part j of the columns) count; the
        others stay zero. So the file is an ordinary adapter of P times the rank, and merges as one."""
        G, P = self.parts
        D = self.out_features // (G * P)  # of a tensor-parallel rank too, which has some of the groups
        blocks = B.unflatten(1, (P, -1)).unflatten(0, (-1, P, D))  # (G, P, D, P, r)
        # P x (T, G*D)
        y = [F.linear(part, blocks[:, j, :, j].flatten(0, 1)) for j, part in enumerate(z.chunk(P, -1))]
        return torch.stack([part.unflatten(-1, (-1, D)) for part in y], -2).flatten(-3)


@torch.no_grad()
def row_norms(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Lengths of the rows of W + scaling B A, in fp32: a constant of the backward pass (arXiv:2402.09353 sec.
    4.3)."""
    with without_autocast(weight.device):
        return torch.addmm(weight.float(), B.float(), A.float(), alpha=scaling).norm(dim=1)


class _LowRank(torch.autograd.Function):
    """y + scaling * B A dropout(x), in place of y.

    Kept are x, which layers with one input have in common, and z (T, r), which is scaled instead of the wide
    result; the mask is made again. So a layer adds 4 launches to the forward pass and 6 to the backward.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scaling: float, mask: Mask | None):
        rows = x.reshape(-1, x.shape[-1])
        with without_autocast(x.device):
            z = (rows if mask is None else drop([rows], mask)[0]).mm(A.t()).mul_(scaling)
            out = y.view(len(rows), -1)
            # (T, r) x (r, out); 16-bit results of an fp32 adapter are rounded once
            out.addmm_(z, B.t()) if out.dtype == z.dtype else out.add_(z.mm(B.t()))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, B, z)
        ctx.scaling, ctx.mask = scaling, mask
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B, z = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[1:4]
        rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(len(z), -1).to(z.dtype)
        dx = dA = None
        with without_autocast(x.device):
            dB = grads.t().mm(z) if need_B else None
            dz = grads.mm(B).mul_(ctx.scaling)
            parts = [rows] if need_A else []
            parts += [dz.mm(A)] if need_x else []
            if ctx.mask is not None:
                parts = drop(parts, ctx.mask) if parts else parts
            if need_x:
                dx = parts.pop().view(x.shape)
            if need_A:
                dA = dz.t().mm(parts.pop())
        return dy, dx, dA, dB, None, None


class SharedLinear(nn.Linear):
    """A linear layer that several adapters share, made by `add_adapters`; each acts on its own rows, as
    `adapted` says."""

    adapters: dict[str, tuple]  # A (r, in), B (out, r), scaling, DoRA's factors of the rows (out,) or None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(self, x)
        for name, rows in Adapted.rows:
            if name in self.adapters:
                A, B, scaling, gain = self.adapters[name]
                mask = rows if rows is not None and rows.dtype == torch.bool else None
                every = rows is None or mask is not None
                update = F.linear(F.linear(x if every else x[rows], A), B) * scaling
                if gain is not None:
                    own = y if every else y[rows]
                    own = own if self.bias is None else own - self.bias
                    update = gain * update + (gain - 1) * own
                update = update if mask is None else torch.where(mask, update, 0.0)
                y = y + update if every else y.index_add(0, rows, update)
        return y


class Adapted:
    """Which rows are whose just now; changed by `adapted` alone."""

    # (adapter, its rows: their numbers, or (T, 1) whether it is one; None: all of them)
    rows: list[tuple[str, torch.Tensor | None]] = []


@contextlib.contextmanager
def adapted(rows: list[tuple[str, torch.Tensor | None]]):
    """Inside, these rows are computed with these adapters, all others with the base alone."""
    before, Adapted.rows = Adapted.rows, rows
    try:
        yield
    finally:
        Adapted.rows = before


# ---- putting adapters into a model


def inject(
    model: nn.Module,
    target_patterns: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    parts: dict | None = None,
    tower: list[str] | None = None,
    whole: list[str] = (),
) -> list[str]:
    """Turn each nn.Linear whose name fully matches a pattern into a LoraLinear; returns the names.

    Freezes nothing. Works on the meta device: fill the new parameters with `init_lora` then. parts {name
    pattern: (G, P)}: packed weights whose P parts get a pair of this rank each (see LoraLinear.split_B).
    tower (fnmatch on parameter names): a pattern that hits modules in and outside of it means those outside
    alone. whole: modules that train whole, in which nothing is adapted.
    """
    if rank < 1:
        raise ValueError(f"lora_rank={rank}; expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={dropout}; expected 0 <= lora_dropout < 1")
    # the exact type: a LoraLinear, and a vocabulary projection (a subclass), are not adapted
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    linears = [name for name in linears if not any(f"{name}.".startswith(f"{w}.") for w in whole)]
    # Whole names, and each pattern must hit: a misspelt one would leave its layers untrained without a word.
    names = set()
    for pattern in target_patterns:
        try:
            hits = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as e:
            raise ValueError(f"lora_target_modules: {pattern!r} is no regular expression ({e})") from None
        if not hits:
            near = difflib.get_close_matches(pattern.replace("\\", ""), linears, 5, 0.3) or linears[:5]
            raise ValueError(
                f"lora_target_modules: {pattern!r} matches no linear layer; it must match the whole name, "
                f"e.g. of {', '.join(near)}"
            )
        # A name such as q_proj is in both parts of some models; who says it means the language model.
        outside = [n for n in hits if not checkpoint.matches(f"{n}.weight", tower)]
        names.update(outside or hits)
    # in the model's order, whatever the patterns' order: it is the adapter file's
    names = [name for name in linears if name in names]
    for name in names:
        split = next((p for pattern, p in (parts or {}).items() if re.fullmatch(pattern, name)), None)
        _to_lora(model, name, rank * (split[1] if split else 1), alpha / rank, dropout, split)
    return names


def _to_lora(model: nn.Module, name: str, rank: int, scaling: float, dropout: float, parts=None) -> None:
    module = model.get_submodule(name)
    where = {"device": module.weight.device, "dtype": module.weight.dtype}
    # the class is changed in place: the weight keeps its name, so base checkpoints load as before
    module.__class__ = LoraLinear
    module.lora_A = nn.Linear(module.in_features, rank, bias=False, **where)
    module.lora_B = nn.Linear(rank, module.out_features, bias=False, **where)
    # B = 0: training begins at the base's own outputs
    nn.init.zeros_(module.lora_B.weight)
    module.rank, module.scaling, module.dropout, module.parts = rank, scaling, dropout, parts
    module.seed = zlib.crc32(name.encode()) >> 1  # fits int32
    module.first_channel = 0
    module.register_parameter("lora_magnitude_vector", None)


def add_magnitude(module: LoraLinear) -> None:
    """Makes DoRA of LoRA: a length of its own for each row."""
    module.lora_magnitude_vector = nn.Parameter(module.weight.detach().norm(dim=1))


def begin_magnitude(name: str, param: nn.Parameter, read, copy) -> None:
    """DoRA begins at the lengths that the base's own rows have; read and copy as take_principal's."""
    copy(param, read(name.removesuffix(MAGNITUDE) + ".weight").float().norm(dim=1))


def whole_modules(model: nn.Module, names: list[str] | None) -> list[str]:
    """The modules that modules_to_save means, by full names or their last parts; a tied weight's other name
    means the one that this model has."""
    # By any ending of the name, as PEFT takes them: "lm_head", "visual.proj".
    here = {name: name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    here |= {alias.rpartition(".")[0]: name.rpartition(".")[0] for alias, name in aliases_of(model).items()}
    found = []
    for wanted in names or ():
        hits = [module for name, module in here.items() if f".{name}".endswith(f".{wanted}")]
        if not hits:
            near = ", ".join(difflib.get_close_matches(wanted, here, 3, 0)) or "none"
            raise ValueError(f"modules_to_save: {wanted!r} is no module with parameters; near names: {near}")
        found += hits
    return found


def init_lora(name: str, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Initial values of one full LoRA parameter, as PEFT's."""
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    else:
        assert ".lora_B." in name, name
        nn.init.zeros_(tensor)


@torch.no_grad()
def take_principal(model: nn.Module, names: list[str], read, copy) -> dict[str, tuple]:
    """PiSSA (arXiv:2404.02948): adapters begin as the largest part of their layer's weight, which keeps the
    rest. Returns what they begin with, {module: (A, B)}; a run that goes on takes the same again.

    read(name): the base's whole weight; copy(parameter, full tensor) as load_adapter's.
    """
    starts = {}
    for name in names:
        module, weight = model.get_submodule(name), read(f"{name}.weight").float()
        if module.rank > min(weight.shape) or module.weight.requires_grad:
            raise ValueError(
                f"init_lora_weights=pissa: {name}, {tuple(weight.shape)}, must be frozen and at least as "
                f"large as lora_rank={module.rank}"
            )
        U, S, V = torch.linalg.svd(weight.to(module.weight.device), full_matrices=False)
        # Both sides get the root of each singular value: scaling * B A is the largest part of the weight.
        root = (S[: module.rank] / module.scaling).sqrt()
        A, B = (root[:, None] * V[: module.rank]).cpu(), (U[:, : module.rank] * root).cpu()
        copy(module.weight, weight - module.scaling * B @ A)
        copy(module.lora_A.weight, A)
        copy(module.lora_B.weight, B)
        starts[name] = A, B
    return starts


# ---- files


# Every key of adapter_config.json is known, by PEFT's LoraConfig (0.21): those that count here, with their
# types;
Rank, Alpha = Annotated[int, 1, 1 << 16], Annotated[float, 1e-6, 1e6]
USED = {
    "peft_type": Literal["LORA"],
    "base_model_name_or_path": str | None,
    "r": Rank,
    "lora_alpha": Alpha,
    "lora_dropout": schema.Share,
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict[str, Rank] | None,
    "alpha_pattern": dict[str, Alpha] | None,
    "target_modules": str | list[str],
    "exclude_modules": str | list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "modules_to_save": list[str] | None,
    "ensure_weight_tying": bool,
    # the others (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights when the adapter begins
    "init_lora_weights": bool | Literal["gaussian", "eva", "orthogonal"],
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# those that must have the value of a plain adapter, since they compute something else;
PLAIN = {"bias": "none"} | dict.fromkeys(("fan_in_fan_out", "use_qalora", "lora_bias"), False)
PLAIN |= dict.fromkeys(
    "megatron_config trainable_token_indices alora_invocation_tokens layer_replication target_parameters "
    "use_bdlora arrow_config kasa_config velora_config monteclora_config".split()
)
# and those that say nothing about the result of a plain one. Any other key is refused.
SAID = (
    "task_type auto_mapping peft_version revision inference_mode runtime_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config qalora_group_size".split()
)


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Names of tied weights that PEFT sees beside the one that this model has, {alias: name}."""
    config = getattr(model, "config", None)  # a part of a model has none
    return {} if config is None else vlm.find(config.raw).aliases(config.raw)


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter was made with, which its adapter_config.json says."""

    base: str | Path  # the checkpoint directory that it belongs to, or its published name
    rank: int
    alpha: float
    dropout: float = 0.0
    base_in: str | None = None  # the kind of few bits that the base's weights were in (quantize.py)
    rslora: bool = False  # updates are scaled by alpha / sqrt(rank), not alpha / rank
    starts: dict | None = None  # take_principal's

    def alpha_of(self, module: "LoraLinear") -> float:
        """What a module's scaling makes of its rank."""
        return module.scaling * (math.sqrt(module.rank) if self.rslora else module.rank)


@functools.cache
def base_sample(directory: str | Path) -> str | None:
    """What tells a base's weights from others, None for a base that is no directory here."""
    if not (Path(directory) / "config.json").is_file():
        return None
    return checkpoint.open_model(directory, vlm.find(checkpoint.read_config(directory))).sample()


def save_adapter(
    directory, model: nn.Module, made: LoraConfig, module_names: list[str], extra_trained, tensors, write=True
) -> None:
    """The adapter's files.

    extra_trained: names of other parameters that were trained. Leaf modules are saved with all their
    parameters and listed in modules_to_save, as PEFT expects; it loads the others too. Tied weights are saved
    under all their names, since PEFT unties what it saves, and an adapted layer's own weight or bias under
    its name in PEFT. tensors(name) gives a full CPU tensor where write is True; it may gather, so all ranks
    call this.
    """
    rank_pattern, alpha_pattern, state = {}, {}, {}
    for name in module_names:
        module = model.get_submodule(name)
        if module.rank != made.rank:  # an adapter from PEFT, trained further, may vary by module
            rank_pattern["^" + name] = module.rank  # PEFT would take a name for the end of a longer one
        if not math.isclose(alpha := made.alpha_of(module), made.alpha):
            alpha_pattern["^" + name] = alpha
    owners = sorted({name.rpartition(".")[0] for name in extra_trained} - {*module_names})
    owners = [name for name in owners if not list(model.get_submodule(name).children())]
    dora = [n for n in module_names if model.get_submodule(n).lora_magnitude_vector is not None]
    names = [f"{name}.lora_{side}.weight" for name in module_names for side in "AB"]
    names += [*(name + MAGNITUDE for name in dora), *extra_trained]
    # PEFT replaces a module to save as a whole, so its frozen parameters go along.
    names += [f"{o}.{name}" for o in owners for name, _ in model.get_submodule(o).named_parameters()]
    for name in dict.fromkeys(names):
        tensor = tensors(name)  # all ranks, whoever writes
        if write:
            owner, _, key = name.rpartition(".")
            base = owner in module_names and not key.startswith("lora_")
            theirs = f"{owner}.base_layer.{key}" if base else name
            module, _, side = name.partition(".lora_")
            if made.starts and side:  # B A - B0 A0, so that the base stays as it was published
                A, B = made.starts[module]
                tensor = torch.cat([tensor, A]) if side[0] == "A" else torch.cat([tensor, -B], 1)
            state[PREFIX + theirs] = tensor.detach().contiguous()
    if not write:
        return
    for alias, name in aliases_of(model).items():
        if PREFIX + name in state:
            state[PREFIX + alias] = state[PREFIX + name].clone()
            owners.append(alias.rpartition(".")[0])
    targets = list(module_names)
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)}
    # PEFT takes the names of a list for the ends of longer ones too; an expression matches whole names.
    if any(other.endswith("." + name) for other in others for name in targets):
        targets = "|".join(map(re.escape, targets))
    sample = base_sample(made.base)
    # With its start beside it an adapter has twice the rank, and its scaling must stay what it was.
    doubled = 1 if not made.starts else math.sqrt(2) if made.rslora else 2
    config = {
        "base_model_name_or_path": os.path.abspath(made.base) if sample else str(made.base),
        "r": made.rank * (2 if made.starts else 1),
        "lora_alpha": made.alpha * doubled,
        "lora_dropout": made.dropout,
        "use_rslora": made.rslora,
        "use_dora": bool(dora),
        "target_modules": targets,
        "modules_to_save": owners or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    metadata = {"base": sample, "base_in": made.base_in}
    write_adapter(directory, state, config, {key: said for key, said in metadata.items() if said})


def write_adapter(directory, state: dict[str, torch.Tensor], config: dict, metadata: dict) -> None:
    """adapter_config.json and adapter_model.safetensors, which PEFT reads too."""
    plain = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config, **plain}
    place = Path(directory) / "adapter_model.safetensors"
    checkpoint.save_tensors(state, place, {"format": "pt"} | metadata)
    checkpoint.write_json(Path(directory) / "adapter_config.json", config)


def combine(directories: list, weights: list[float], output) -> None:
    """Writes the adapter whose updates are the weighted sum of several adapters' updates, exactly: it has
    their A and B side by side, so its rank is the sum of theirs."""
    # sum of s_i B_i A_i = [s_1 B_1 | s_2 B_2 | ...] [A_1; A_2; ...]
    configs, held = zip(*(read_adapter(d) for d in directories), strict=True)
    metadata = [_open_adapter(d).metadata for d in directories]
    for other, said in zip(directories[1:], metadata[1:], strict=True):
        if {"base"} <= said.keys() & metadata[0].keys() and said["base"] != metadata[0]["base"]:
            raise ValueError(f"{other} and {directories[0]} were trained on different bases")
    sides: dict[str, tuple[list, list]] = {}  # module -> all its A and all its B
    for directory, config, tensors, weight in zip(directories, configs, held, weights, strict=True):
        if config.get("use_dora"):
            raise ValueError(f"{directory} is DoRA's, whose effect is no sum; merge it alone")
        if whole := [name for name in tensors if ".lora_" not in name]:
            raise ValueError(
                f"{directory} holds {whole[0]} whole, which is no update that could be added; merge it alone"
            )
        for name in dict.fromkeys(name.partition(".lora_")[0] for name in tensors):
            A, B = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
            all_A, all_B = sides.setdefault(name, ([], []))
            all_A.append(A)
            all_B.append(B * (weight * rank_and_scaling(config, name)[1]))
    state = {}
    for name, (all_A, all_B) in sides.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.cat(all_A)  # (sum of ranks, in)
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(all_B, 1)  # (out, sum of ranks)
    # The updates hold their scalings by now, so each one here is 1: alpha is the rank.
    ranks = {name: sum(map(len, all_A)) for name, (all_A, _) in sides.items()}
    rank = max(ranks.values())
    others = {"^" + re.escape(name): r for name, r in ranks.items() if r != rank}
    config = {
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": "|".join(map(re.escape, sides)),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    common = {k: v for k, v in metadata[0].items() if all(said.get(k) == v for said in metadata)}
    write_adapter(output, state, config, common)


def read_adapter_config(directory) -> dict:
    """adapter_config.json, ValueError for anything in it that this file does not compute."""
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no LoRA adapter ({path.name} is missing)")
    config = schema.read_json(path, "")
    if missing := [key for key in REQUIRED if key not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected a LoRA adapter of PEFT's")
    for key, value in config.items():
        if key in USED:
            schema.check(value, USED[key], f"{path}: {key}")
        elif key in PLAIN:
            if value != PLAIN[key] and (value or key == "bias"):
                raise ValueError(f"{path}: {key}={value!r} is not supported; expected {PLAIN[key]!r}")
        elif key not in SAID:
            raise ValueError(
                f"{path}: the key {key!r} is not known, and may change what is computed; remove it if not"
            )
    # What PEFT matches names by: of targets a text, not a list of names.
    texts = {key: config.get(key) for key in ("target_modules", "exclude_modules")}
    expressions = [(key, text) for key, text in texts.items() if isinstance(text, str)]
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        value = config.get(key)
        expressions += [(key, v) for v in ([value] if isinstance(value, str) else value or ())]
    for key, expression in expressions:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as e:
            raise ValueError(f"{path}: {key}: {expression!r} is no regular expression ({e})") from None
    return config


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _open_adapter(directory) -> checkpoint.Weights:
    return checkpoint.Weights(directory, stems=("adapter_model", "adapter_model"))


def contents(directory) -> tuple[list[str], list[str]]:
    """Names of the modules that an adapter adapts, and of the parameters that it holds whole."""
    names = [n.removeprefix(PREFIX).replace(".base_layer.", ".") for n in _open_adapter(directory)]
    modules = dict.fromkeys(n.partition(".lora_")[0] for n in names if ".lora_" in n)
    return list(modules), [n for n in names if ".lora_" not in n]


def read_adapter(directory, aliases: dict[str, str] | None = None) -> tuple[dict, dict]:
    """-> (adapter_config.json, {name in the base model: tensor}); refuses what this file does not compute.

    aliases {name: name}: the base's tied weights. In PEFT a tied weight that is trained whole is tied no
    longer, so all of its names must be there, with one value.
    """
    # The file decides what there is; adapter_config.json what it means.
    config, weights = read_adapter_config(directory), _open_adapter(directory)
    tensors = {}
    for file_name in weights:
        strange = re.search(r"\.lora_(?!(A|B)\.weight$|magnitude_vector$)", file_name)
        if strange or not file_name.startswith(PREFIX):
            raise ValueError(f"{directory}: {file_name!r} is not a LoRA weight of a linear layer")
        if not weights.dtype(file_name).is_floating_point:
            raise ValueError(
                f"{directory}: {file_name!r} is {weights.dtype(file_name)}; expected floating point"
            )
        tensor, name = weights.read(file_name), file_name.removeprefix(PREFIX).replace(".base_layer.", ".")
        checkpoint.largest(tensor, f"{directory}: {name}")
        tensors[name] = tensor
    for group in tied(aliases or {}):
        held = [n for n in group if n in tensors]
        whole = len(held) == len(group)
        if held and not (whole and all(torch.equal(tensors[n], tensors[held[0]]) for n in held)):
            raise ValueError(
                f"{directory}: {' and '.join(group)} are one tied tensor in this model, the adapter holds "
                f"{'different values of them' if whole else 'only ' + ' and '.join(held)}: in PEFT they are "
                "untied, which is not supported; save equal values of all of them (modules_to_save)"
            )
        for alias in group[1:] if held else ():
            del tensors[alias]
    return config, tensors


def tied(aliases: dict[str, str]) -> list[list[str]]:
    """All names of each tied tensor, the model's own first."""
    return [[name, *(a for a, own in aliases.items() if own == name)] for name in {*aliases.values()}]


def open_base(directory, adapter, definition) -> tuple[dict, checkpoint.Weights]:
    """-> (config.json's contents, weights) of an adapter's base, as the adapter takes it: where it holds a
    tied weight under some of its names alone, or with several values, each name has a value of its own, as in
    PEFT. ValueError if the adapter says that it was trained on other weights."""
    config, own = checkpoint.read_config(directory), _open_adapter(adapter)
    weights = checkpoint.open_model(directory, definition)
    check_base(adapter, weights)
    aliases, apart = definition.aliases(config), False
    for group in tied(aliases):
        held = [PREFIX + n for n in group if PREFIX + n in own.names]
        same = all(torch.equal(own.read(n), own.read(held[0])) for n in held)
        apart |= 0 < len(held) < len(group) or not same
    theirs = "auto_mapping" in read_adapter_config(adapter)  # PEFT's, which unties; else ours, incomplete
    if apart and theirs and (untied := definition.untied(config)) is not None:
        weights.untie(aliases)
        config = untied
    return config, weights


def check_base(directory, weights: checkpoint.Weights) -> None:
    """ValueError if the adapter says that it was trained on other weights than these; one from elsewhere
    can't say."""
    # No path: bases are moved and renamed, and two may have one name.
    sample = _open_adapter(directory).metadata.get("base")
    try:
        fits = sample is None or weights.fits_sample(sample)
    except ValueError:
        raise ValueError(
            f"{directory}: what its adapter says of its base is damaged; fetch it again"
        ) from None
    if not fits:
        raise ValueError(
            f"the adapter in {directory} was trained on other weights than those of {weights.directory}; "
            "give its own base with --model_name_or_path"
        )


def says_base(directory) -> bool:
    """Whether an adapter says what tells its base's weights from others; PEFT's do not."""
    return "base" in _open_adapter(directory).metadata


def base_in(directory) -> str | None:
    """The few bits that an adapter was trained over: nf4, int8; None for whole weights, or PEFT's adapters,
    which do not say."""
    kind = _open_adapter(directory).metadata.get("base_in")
    return kind if kind in quantize.KINDS else None


def say_base(directory, kind: str | None) -> None:
    """On standard error, if an adapter will stand beside weights in other few bits than in its training."""
    if directory and (trained := base_in(directory)) not in (None, kind):
        terminal.note(
            f"note: {directory} was trained over weights in {trained}, here they are {kind or 'whole'}; "
            f"--quantize {trained} computes as in training"
        )


def find_base(directory) -> str:
    """Where the base of an adapter is: the path that it names, from here, from the project, or beside the
    adapter."""
    name = read_adapter_config(directory).get("base_model_name_or_path") or ""
    # An adapter is copied from machine to machine: its base is where it was, or where such things lie.
    root = Path(__file__).resolve().parent
    last, beside = Path(name).name, Path(directory).resolve().parent
    for place in (Path(name), root / name, Path(directory) / name, beside / last, root / "samples" / last):
        if name and "\0" not in name and (place / "config.json").is_file():
            return str(place)
    raise ValueError(
        f"the adapter in {directory} names the base model {name!r}, which is no checkpoint directory here; "
        "give the path of its base with --model_name_or_path"
    )


def rank_and_scaling(config: dict, module_name: str) -> tuple[int, float]:
    """Of one module, following PEFT's rank_pattern, alpha_pattern and use_rslora."""

    def by_pattern(patterns, default):
        # PEFT's rule, to the letter: a key is an expression for a name's end, the first that fits counts.
        hits = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module_name))
        return next(hits, default)

    rank = by_pattern(config.get("rank_pattern"), config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_updates(config: dict, tensors: dict, shapes: dict) -> tuple[dict, list]:
    """Check an adapter against a model {name: shape} -> ({module: scaling}, [other saved names]).

    Every tensor belongs to the model, every module has both sides in the right shape and is a target, every
    target has its pair, every module to save its tensors.
    """
    modules = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    if not modules:
        raise ValueError("the adapter holds no LoRA weights")
    scalings, expected = {}, {}
    for module in modules:
        if len(shapes.get(f"{module}.weight", ())) != 2:
            raise ValueError(
                f"the adapter changes {module!r}, which is no linear layer of this model: wrong base?"
            )
        if not is_target(config, module):
            raise ValueError(
                f"the adapter holds {module}.lora_A.weight, which its adapter_config.json does not name"
            )
        out_features, in_features = shapes[f"{module}.weight"]
        rank, scalings[module] = rank_and_scaling(config, module)
        expected[f"{module}.lora_A.weight"] = rank, in_features
        expected[f"{module}.lora_B.weight"] = out_features, rank
        if config.get("use_dora"):
            expected[module + MAGNITUDE] = (out_features,)
    extra = [name for name in tensors if ".lora_" not in name]
    for name in extra:
        if name not in shapes:
            raise ValueError(f"the adapter holds {name!r}, which this model does not have: wrong base?")
        expected[name] = shapes[name]
    if unknown := next((name for name in tensors if name not in expected), None):
        raise ValueError(f"the adapter holds {unknown!r}, but has no use_dora=true in adapter_config.json")
    # Before anything is copied: half an adapter would be a model that nobody trained.
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"the adapter lacks {name!r}; its file is incomplete")
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"the adapter's {name!r} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
            )
    owners = {name: name.rpartition(".")[0] for name in shapes if ".lora_" not in name}
    for name, module in owners.items():
        linear = name.endswith(".weight") and len(shapes[name]) == 2
        if linear and module not in scalings and is_target(config, module):
            raise ValueError(f"the adapter lacks {module}.lora_A.weight, which its target_modules name")
    for saved in config.get("modules_to_save") or ():
        meant = [n for n, m in owners.items() if f"{m}.".startswith(f"{saved}.")] or [
            n for n, m in owners.items() if f".{saved}." in f".{m}."
        ]
        if lost := next((name for name in meant if name not in tensors), None):
            raise ValueError(f"the adapter lacks {lost}, which its modules_to_save name")
    return scalings, extra


def is_target(config: dict, module: str) -> bool:
    """PEFT's rule. target_modules and exclude_modules: a regular expression, or a list of full names or their
    last parts; in a list, layers_to_transform and layers_pattern narrow the last parts down."""

    def named(names) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith("." + name) for name in names or ())

    # In PEFT's order: what is excluded, what is saved whole, and only then the targets.
    if named(config.get("exclude_modules")):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.get("modules_to_save") or ()):
        return False
    targets, layers = config["target_modules"], _listed(config.get("layers_to_transform"))
    if not named(targets) or isinstance(targets, str) or module in targets or not layers:
        return named(targets)
    patterns = [rf"(?:^|.*?\.){p}" for p in _listed(config.get("layers_pattern"))] or [r".*?\.[^.]*"]
    found = [re.match(rf"{pattern}\.(?P<i>\d+)\.", module) for pattern in patterns]
    first = next((match for match in found if match), None)
    return first is not None and int(first["i"]) in layers


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    directory,
    copy=lambda param, full: param.copy_(full),
    shape=lambda param: param.shape,
    whole: nn.Module | None = None,
) -> list[str]:
    """Inject what the adapter needs and copy every tensor of it into the model; returns the module names.

    copy(parameter, full tensor), shape(parameter): pass checkpoint.copy_full_ and parallel.whole_shape for
    sharded parameters. On the meta device nothing is copied: call again once the parameters are real. If
    modules are injected already, they must be the adapter's. whole: what `model` is a pipeline stage of,
    injected like it, without memory; then only the stage's own tensors are copied.
    """
    config, tensors = read_adapter(directory, aliases_of(model))
    # The whole is checked, since a stage alone has few of the adapter's names.
    if whole is not None:
        names = load_adapter(whole, directory)
        for name, p in model.named_parameters():
            if name in tensors:
                copy(p, tensors[name])
        return names
    scalings, _ = adapter_updates(config, tensors, shapes_of(model, shape))
    # A run that goes on has put its own adapters in: they must be the file's, in names, ranks and scalings.
    injected = {n for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if injected and injected != scalings.keys():
        here, there = sorted(injected - scalings.keys()), sorted(scalings.keys() - injected)
        less = [f"no tensors for {n} ({len(here)} such modules), which has an adapter here" for n in here[:1]]
        more = [f"tensors for {n} ({len(there)} such modules), which has no adapter here" for n in there[:1]]
        raise ValueError(
            f"{directory} has {' and '.join(less + more)}; leave lora_target_modules out to continue with "
            "its own"
        )
    for name, scaling in scalings.items():
        rank, module = tensors[f"{name}.lora_A.weight"].shape[0], model.get_submodule(name)
        if not isinstance(module, LoraLinear):
            check_linear(name, module, (nn.Linear,))
            _to_lora(model, name, rank, scaling, config.get("lora_dropout", 0.0))
            if config.get("use_dora"):
                add_magnitude(module)
        elif (theirs := bool(config.get("use_dora"))) != (module.lora_magnitude_vector is not None):
            raise ValueError(f"{directory} has use_dora={json.dumps(theirs)}; set use_dora to the adapter's")
        elif module.rank != rank or not math.isclose(module.scaling, scaling):
            raise ValueError(
                f"{directory}: {name} has rank {rank} and scaling {scaling:g}, "
                f"but lora_rank, lora_alpha and use_rslora give rank {module.rank} and scaling "
                f"{module.scaling:g}; set them to the adapter's"
            )
    params = dict(model.named_parameters())
    for name, tensor in tensors.items():
        # Of a B in blocks (split_B) only the diagonal ones are used; a file with others means another model.
        parts = model.get_submodule(name.partition(".lora_")[0]).parts if ".lora_B." in name else None
        if parts is not None:
            blocks = tensor.unflatten(1, (parts[1], -1)).unflatten(0, (*parts, -1))
            if any(blocks[:, i, :, j].any() for i in range(parts[1]) for j in range(parts[1]) if i != j):
                raise ValueError(f"{directory}: {name} mixes parts of a packed weight; use lora_split=false")
        if not params[name].is_meta:
            copy(params[name], tensor)
    return list(scalings)


def check_linear(name: str, module: nn.Module, kinds: tuple) -> None:
    # The exact type: a subclass computes something else, which an adapter beside it would not see.
    if type(module) not in kinds:
        kind = type(module).__name__
        raise ValueError(f"the adapter changes {name!r}, a {kind}; expected a linear layer")


def shapes_of(model: nn.Module, shape=lambda param: param.shape) -> dict[str, torch.Size]:
    """Of all weights, those in few bits included."""
    few = {name: module.shape for name, module in quantize.weights_of(model).items()}
    return {name: shape(p) for name, p in model.named_parameters()} | few


@dataclass
class Added:
    """What an adapter is beside the low-rank updates of its layers."""

    changes_images: bool  # whether an image's features are others with it
    text: dict[str, torch.Tensor]  # parameters that it holds whole: those of the language model, and all
    whole: dict[str, torch.Tensor]


@torch.no_grad()
def add_adapters(model: nn.Module, directories: dict[str, str]) -> dict[str, Added]:
    """Puts several adapters beside one base, for rows that `adapted` names. ValueError for one that does not
    belong to the model."""
    tower = vlm.find(model.config.raw).image_parameters
    parameters = dict(model.named_parameters())
    shapes = shapes_of(model)
    like = next(model.parameters())  # an adapter's device and dtype
    added = {}

    for adapter, directory in directories.items():
        config, tensors = read_adapter(directory, aliases_of(model))
        scalings, extra = adapter_updates(config, tensors, shapes)
        for name, scaling in scalings.items():
            module = model.get_submodule(name)
            check_linear(name, module, (nn.Linear, AnyLinear, SharedLinear))
            # In place: the weight keeps its name; layers that no adapter changes stay as fast as they are.
            if type(module) is not SharedLinear:
                module.__class__, module.adapters = SharedLinear, {}
            A, B = (tensors[f"{name}.lora_{x}.weight"].to(like) for x in "AB")
            # Nothing trains here, so DoRA's factors of the rows are known once and for all.
            gain = tensors.get(name + MAGNITUDE)
            if gain is not None and module.weight is None:
                raise ValueError(f"{directory}: DoRA takes lengths of whole weights; leave --quantize out")
            if gain is not None:
                gain = (gain.to(like.device) / row_norms(module.weight, A, B, scaling)).to(like)
            module.adapters[adapter] = A, B, scaling, gain
        if packed := [name for name in extra if name not in parameters]:
            raise ValueError(
                f"{directory} holds {packed[0]} whole, which is in few bits here; leave --quantize out"
            )
        whole = {name: tensors[name].to(parameters[name]) for name in extra}
        # Features of images are shared by requests with and without the adapter, unless it changes them.
        text = {name: x for name, x in whole.items() if not checkpoint.matches(name, tower)}
        changed = [*whole, *(f"{name}.weight" for name in scalings)]
        of_images = any(checkpoint.matches(name, tower) for name in changed)
        added[adapter] = Added(of_images, text, whole)
    return added
