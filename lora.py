"""LoRA adapters: low-rank updates beside frozen linear layers, in PEFT's file format.

    names = inject(model, LORA_TARGETS, rank=8, alpha=16, dropout=0.05)   # nn.Linear -> LoraLinear, in place
    set_dropout_keys(model, batch)                                        # before each forward in training
    save_adapter("output", model, base, 8, 16, 0.05, names, extra_trained={}, tensors=get)
    load_adapter(model, "output")                                         # ours or PEFT's

y = W x + b + (alpha / rank) B A x; A (rank, in) starts random and B (out, rank) zero (arXiv:2106.09685 sec. 4.1).
File format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import difflib
import fnmatch
import json
import math
import pickle
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "base_model.model."  # PEFT puts it before every name


class LoraLinear(nn.Linear):
    """A linear layer plus scaling * B A, made by `inject` out of an nn.Linear; weight and bias keep their names."""

    rank: int
    scaling: float
    dropout: float
    seed: int  # from the module's name: dropout masks differ between modules
    parts: tuple[int, int] | None  # (G, P): output rows are G groups of P parts, each part with an A and a B of its own
    first_channel: int  # tensor parallelism sets it where a rank has a slice of the input channels
    dropout_keys: tuple | None  # see set_dropout_keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.update(x).to(y.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * B A x, with dropout on x."""
        scaling = self.scaling
        if self.training and self.dropout > 0 and self.dropout_keys is not None:
            x = x * dropout_mask(x, *self.dropout_keys, self.dropout, self.seed, self.first_channel)
            scaling /= 1 - self.dropout
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)  # the adapter may be fp32 beside 16-bit weights
        z = self.lora_A(x)
        return (self.lora_B(z) if self.parts is None else self.split_B(z)) * scaling

    def split_B(self, z: torch.Tensor) -> torch.Tensor:
        """lora_B(z), of whose weight only the blocks (part j of the rows, part j of the columns) count; the others stay
        zero. So the file is an ordinary adapter of P times the rank, and merges as one."""
        G, P = self.parts
        D = self.out_features // (G * P)  # of a tensor-parallel rank too, which has some of the groups
        blocks = self.lora_B.weight.unflatten(1, (P, -1)).unflatten(0, (-1, P, D))  # (G, P, D, P, r)
        y = [F.linear(part, blocks[:, j, :, j].flatten(0, 1)) for j, part in enumerate(z.chunk(P, -1))]  # P x (T, G*D)
        return torch.stack([part.unflatten(-1, (-1, D)) for part in y], -2).flatten(-3)


# ---- dropout as a pure function


def mix(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finaliser on int32. `>>` copies the sign bit, so the copies are masked off."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)


def dropout_mask(x, keys, image_keys, p: float, seed: int, first_channel: int = 0) -> torch.Tensor:
    """Boolean mask, shape of x, True with probability 1 - p: a hash of (row key, channel, seed) and nothing else.

    So it is the same in any packing, layout, number of processes and recomputation. Rows of x (..., C) are stream
    positions with `keys` (T,), or, where the row count differs from T, tokens of images with `image_keys` (N,).
    """
    C, rows = x.shape[-1], x.numel() // x.shape[-1]
    if rows != len(keys):
        images = 0 if image_keys is None else len(image_keys)
        assert images and rows % images == 0, f"{rows} rows are neither {len(keys)} tokens nor from {images} images"
        place = torch.arange(rows // images, device=x.device)
        keys = (image_keys[:, None] + (place + 1) * 0x9E3779B97F4A7C1).flatten()
    low, high = keys.contiguous().view(torch.int32).view(-1, 2).unbind(1)  # int64 -> two halves
    row = mix(mix(low + mix(torch.full_like(low, seed))) ^ high)
    # two channels share one 32-bit hash, 16 bits each: half the work, and p is exact to 1/65536
    pairs = torch.arange(first_channel // 2, (first_channel + C + 1) // 2, device=x.device, dtype=torch.int32)
    bits = mix(row[:, None] ^ mix(pairs + 1)).view(torch.int16)[:, first_channel % 2 :]  # (rows, C or C + 1)
    return (bits[:, :C] >= round(p * 65536) - 32768).view(x.shape)


def set_dropout_keys(model: nn.Module, batch: dict | None) -> None:
    """Take the dropout keys of this batch (None: no dropout). They must stay until its backward if it recomputes."""
    keys = None if batch is None else (batch["dropout_keys"], batch.get("image_dropout_keys"))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.dropout_keys = keys


# ---- putting adapters into a model


def inject(
    model: nn.Module, target_patterns: list[str], rank: int, alpha: float, dropout: float, parts: dict | None = None,
    tower: list[str] | None = None,
) -> list[str]:
    """Turn each nn.Linear whose name fully matches a pattern into a LoraLinear; returns the names.

    Freezes nothing. Works on the meta device: fill the new parameters with `init_lora` then.
    parts {name pattern: (G, P)}: packed weights whose P parts get a pair of this rank each (see LoraLinear.split_B).
    tower (fnmatch on parameter names): a pattern that hits modules in and outside of it means those outside alone.
    """
    if rank < 1:
        raise ValueError(f"lora_rank={rank}; expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={dropout}; expected 0 <= lora_dropout < 1")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
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
        outside = [n for n in hits if not any(fnmatch.fnmatch(f"{n}.weight", p) for p in tower or ())]
        names.update(outside or hits)
    names = [name for name in linears if name in names]
    for name in names:
        split = next((p for pattern, p in (parts or {}).items() if re.fullmatch(pattern, name)), None)
        _to_lora(model, name, rank * (split[1] if split else 1), alpha / rank, dropout, split)
    return names


def _to_lora(model: nn.Module, name: str, rank: int, scaling: float, dropout: float, parts=None) -> None:
    module = model.get_submodule(name)
    where = {"device": module.weight.device, "dtype": module.weight.dtype}
    module.__class__ = LoraLinear
    module.lora_A = nn.Linear(module.in_features, rank, bias=False, **where)
    module.lora_B = nn.Linear(rank, module.out_features, bias=False, **where)
    nn.init.zeros_(module.lora_B.weight)
    module.rank, module.scaling, module.dropout, module.parts = rank, scaling, dropout, parts
    module.seed = zlib.crc32(name.encode()) >> 1  # fits int32
    module.first_channel, module.dropout_keys = 0, None


def init_lora(name: str, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Initial values of one full LoRA parameter, as PEFT's."""
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    else:
        assert ".lora_B." in name, name
        nn.init.zeros_(tensor)


# ---- files


def save_adapter(
    directory, model: nn.Module, base_name, rank: int, alpha: float, dropout: float, module_names: list[str],
    extra_trained, tensors, write: bool = True,
) -> None:  # fmt: skip
    """adapter_config.json and adapter_model.safetensors, which PEFT reads too.

    extra_trained: names of other parameters that were trained. Leaf modules are saved with all their parameters and
    listed in modules_to_save, as PEFT expects; it loads the others too.
    tensors(name) gives a full CPU tensor; it may gather, so all ranks call this, and those with write=True write.
    """
    rank_pattern, alpha_pattern, state = {}, {}, {}
    for name in module_names:
        module = model.get_submodule(name)
        if module.rank != rank:  # an adapter from PEFT, trained further, may vary by module
            rank_pattern["^" + name] = module.rank  # PEFT would take a name for the end of a longer one
        if not math.isclose(module.scaling * module.rank, alpha):
            alpha_pattern["^" + name] = module.scaling * module.rank
    owners = sorted({name.rpartition(".")[0] for name in extra_trained})
    owners = [name for name in owners if not list(model.get_submodule(name).children())]
    names = [f"{name}.lora_{side}.weight" for name in module_names for side in "AB"]
    names += extra_trained
    names += [f"{owner}.{name}" for owner in owners for name, _ in model.get_submodule(owner).named_parameters()]
    for name in dict.fromkeys(names):
        tensor = tensors(name)
        if write:
            state[PREFIX + name] = tensor.detach().contiguous()
    if not write:
        return
    targets, others = list(module_names), {n for n, m in model.named_modules() if type(m) is nn.Linear}
    if any(other.endswith("." + name) for other in others for name in targets):  # so a list would name those too
        targets = "|".join(map(re.escape, targets))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "r": rank,
        "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": owners or None, "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern, "inference_mode": True,
    }  # fmt: skip
    save_file(state, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(directory) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(directory) -> tuple[dict, dict]:
    """-> (adapter_config.json, {name in the base model: tensor}); refuses what this file does not compute."""
    directory = Path(directory)
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        if (directory / "adapter_model.safetensors").is_file():
            state = load_file(directory / "adapter_model.safetensors")
        else:
            state = torch.load(directory / "adapter_model.bin", map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise ValueError(f"{directory} holds no LoRA adapter ({Path(e.filename).name} is missing)") from None
    except (ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        raise ValueError(f"the adapter in {directory} is damaged ({e}); fetch or train it again") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ValueError(f"{directory}: use_dora, lora_bias and bias other than 'none' are not supported")
    strange = [n for n in state if not n.startswith(PREFIX) or re.search(r"\.lora_(?!(A|B)\.weight$)", n)]
    if strange:
        raise ValueError(f"{directory}: {strange[0]!r} is not a LoRA weight of a linear layer")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def rank_and_scaling(config: dict, module_name: str) -> tuple[int, float]:
    """Of one module, following PEFT's rank_pattern, alpha_pattern and use_rslora."""

    def by_pattern(patterns, default):
        hits = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module_name))
        return next(hits, default)

    rank = by_pattern(config.get("rank_pattern"), config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_updates(config: dict, tensors: dict, shapes: dict) -> tuple[dict, list]:
    """Check an adapter against a model {name: shape} -> ({module: scaling}, [other saved names]).

    Every tensor belongs to the model, every module has both sides in the right shape, every target has its pair.
    """
    modules = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    if not modules:
        raise ValueError("the adapter holds no LoRA weights")
    scalings, expected = {}, {}
    for module in modules:
        if len(shapes.get(f"{module}.weight", ())) != 2:
            raise ValueError(f"the adapter changes {module!r}, which is no linear layer of this model: wrong base?")
        out_features, in_features = shapes[f"{module}.weight"]
        rank, scalings[module] = rank_and_scaling(config, module)
        expected |= {f"{module}.lora_A.weight": (rank, in_features), f"{module}.lora_B.weight": (out_features, rank)}
    extra = [name for name in tensors if ".lora_" not in name]
    for name in extra:
        if name not in shapes:
            raise ValueError(f"the adapter holds {name!r}, which this model does not have: wrong base?")
        expected[name] = shapes[name]
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"the adapter lacks {name!r}; its file is incomplete")
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(f"the adapter's {name!r} is {tuple(tensors[name].shape)}, expected {tuple(shape)}")
    if not (config.get("exclude_modules") or config.get("layers_to_transform")):
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and ".lora_" not in name and module not in scalings and _is_target(config, module):
                raise ValueError(f"the adapter lacks {module}.lora_A.weight, which its target_modules name")
    return scalings, extra


def _is_target(config: dict, module: str) -> bool:
    """PEFT's rule: target_modules is a regular expression, or a list of full names or their last parts."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith("." + t) for t in targets)


@torch.no_grad()
def load_adapter(
    model: nn.Module, directory, copy=lambda param, full: param.copy_(full), shape=lambda param: param.shape,
    whole: nn.Module | None = None,
) -> list[str]:  # fmt: skip
    """Inject what the adapter needs and copy every tensor of it into the model; returns the module names.

    copy(parameter, full tensor), shape(parameter): pass checkpoint.copy_full_ and parallel.whole_shape for sharded
    parameters. On the meta device nothing is copied: call again once the parameters are real. Modules that are injected
    already must agree. whole: what `model` is a pipeline stage of, injected like it, without memory; then only the
    stage's own tensors are copied.
    """
    config, tensors = read_adapter(directory)
    if whole is not None:
        names = load_adapter(whole, directory)
        for name, p in model.named_parameters():
            if name in tensors:
                copy(p, tensors[name])
        return names
    scalings, _ = adapter_updates(config, tensors, {name: shape(p) for name, p in model.named_parameters()})
    for name, scaling in scalings.items():
        rank, module = tensors[f"{name}.lora_A.weight"].shape[0], model.get_submodule(name)
        if not isinstance(module, LoraLinear):
            if type(module) is not nn.Linear:
                raise ValueError(f"the adapter changes {name!r}, a {type(module).__name__}; expected a linear layer")
            _to_lora(model, name, rank, scaling, config.get("lora_dropout", 0.0))
        elif module.rank != rank or not math.isclose(module.scaling, scaling):
            raise ValueError(
                f"{directory}: {name} has rank {rank} and scaling {scaling:g}, but lora_rank and lora_alpha give "
                f"rank {module.rank} and scaling {module.scaling:g}; set them to the adapter's"
            )
    params = dict(model.named_parameters())
    unused = [n for n, m in model.named_modules() if isinstance(m, LoraLinear) and n not in scalings]
    if unused:
        raise ValueError(f"{directory} has no tensors for {unused[0]}, which has a LoRA adapter in this model")
    for name, tensor in tensors.items():
        parts = model.get_submodule(name.partition(".lora_")[0]).parts if ".lora_B." in name else None
        if parts is not None:
            blocks = tensor.unflatten(1, (parts[1], -1)).unflatten(0, (*parts, -1))
            if any(blocks[:, i, :, j].any() for i in range(parts[1]) for j in range(parts[1]) if i != j):
                raise ValueError(f"{directory}: {name} mixes parts of a packed weight; use lora_split=false")
        if not params[name].is_meta:
            copy(params[name], tensor)
    return list(scalings)
