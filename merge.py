"""Fold a LoRA adapter into its base model, and prove that the result computes the same.

    python merge.py --lora_path output --merge_model_path merged

Writes a whole checkpoint directory: weights W + scaling * B A (added in fp32, rounded once), config.json,
tokenizer. Before it appears under its name, every tensor is read back and compared, and the logits of base +
adapter, merged and base are compared on one short prompt with an image. Memory: one file of up to 5 GB while
merging; the logits are computed with the weights of one block at a time.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import data
import lora
import quantize
import schema
import terminal
import vlm
from checkpoint import Weights, open_weights


def merge(
    base: Path | None, adapter: Path, output: Path, dtype: torch.dtype | None = None, says: dict | None = None
) -> dict:
    """Merge `adapter` into `base` (None: the one the adapter names) and write `output`; returns
    merge_info.json."""
    adapter, output = Path(adapter), Path(output)
    if not (adapter / "adapter_config.json").is_file():
        inside = sorted(adapter.glob("checkpoint-*/adapter_config.json"), key=lambda p: p.stat().st_mtime)
        hint = f"{inside[-1].parent} does: pass it as --lora_path" if inside else "train one with lora=true"
        raise ValueError(f"{adapter} holds no LoRA adapter (adapter_config.json); {hint}")
    base = Path(base or lora.find_base(adapter))
    if not (base / "config.json").is_file():
        raise ValueError(
            f"the base model {str(base)!r} is no checkpoint directory; name it with --model_name_or_path"
        )
    if output.exists():  # it will be replaced as a whole
        for what, path in (("base model", base.resolve()), ("adapter", adapter.resolve())):
            if output.resolve() in (path, *path.parents):
                raise ValueError(
                    f"--merge_model_path {output} is or holds the {what}; choose another directory"
                )
        if not output.is_dir() or (any(output.iterdir()) and not (output / "merge_info.json").is_file()):
            raise ValueError(
                f"--merge_model_path {output} exists and is no earlier merge; choose another directory"
            )

    # An adapter may have untied the vocabulary: then the result has two matrices, and says so.
    model_config = checkpoint.read_config(base)
    definition = vlm.find(model_config)
    model_config, weights = lora.open_base(base, adapter, definition)
    shapes = {name: p.shape for name, p in definition.network(model_config).named_parameters()}
    checkpoint.check_names(shapes, weights)
    # All that can be wrong is looked for before anything is written.
    config, tensors = lora.read_adapter(adapter, definition.aliases(model_config))
    if not lora.says_base(adapter):
        print(
            f"note: {adapter} does not say which weights it was trained on; "
            f"whether they are {base}'s is not checked"
        )
    scalings, replaced = lora.adapter_updates(config, tensors, shapes)
    update = Update(weights, scalings, tensors, dtype)
    if not any(map(update.changes, weights)):
        raise ValueError(
            f"the adapter in {adapter} changes nothing (all updates are zero): it was not trained"
        )

    info = {"base": str(base), "adapter": str(adapter), "dtype": str(dtype or "as the base")}
    info |= {"modules": len(scalings), "replaced": replaced, **(says or {})}
    # Under its name only once it is proven: what fails below leaves the place as it was.
    with checkpoint.atomic_dir(output) as directory:
        checkpoint.save_weights(directory, ((name, update.merged(name)) for name in weights))
        if dtype is not None:
            model_config["torch_dtype"] = str(dtype).removeprefix("torch.")
        checkpoint.write_json(directory / "config.json", model_config)
        checkpoint.copy_side_files(base, directory)
        info["changed_tensors"] = check_tensors(directory, update)
        print(f"tensors: {info['changed_tensors']} changed as computed, {len(weights.names)} in all")
        info |= check_logits(definition, base, adapter, directory)
        checkpoint.write_json(directory / "merge_info.json", info)
    return info


def average(directories: list[Path], output: Path) -> None:
    """Writes the mean of several checkpoints of one model, in fp32 and rounded once, one tensor at a time."""
    if len(directories) < 2:
        raise ValueError(f"--average {directories[0]}: one checkpoint is its own mean; name two or more")
    configs = [checkpoint.read_config(d) for d in directories]
    for directory, config in zip(directories, configs, strict=True):
        for key in (config.keys() | configs[0].keys()) - checkpoint.NO_NUMBERS:
            if config.get(key) != configs[0].get(key):
                raise ValueError(
                    f"{directory} has {key}={config.get(key)!r}, {directories[0]} {configs[0].get(key)!r}: "
                    "checkpoints of different models have no mean"
                )
    if Path(output).exists():
        raise ValueError(f"--merge_model_path {output} exists; choose another directory")
    definition = vlm.find(configs[0])
    stage = definition.retrieval_stage(configs[0]) or "sft"
    # Rows of two vocabularies have the same shape and no common meaning.
    words = [definition.processor(directory, stage).fingerprint() for directory in directories]
    if other := next((d for d, w in zip(directories, words, strict=True) if w != words[0]), None):
        raise ValueError(f"{other} has another tokenizer than {directories[0]}: their rows mean other tokens")
    held = [checkpoint.open_model(d, definition) for d in directories]
    shapes = {name: p.shape for name, p in definition.network(configs[0]).named_parameters()}
    for weights in held:
        checkpoint.check_names(shapes, weights)

    def mean(name: str) -> torch.Tensor:
        # In fp32: the sum of many 16-bit numbers would lose their last bits.
        total = sum(weights.read(name).float() for weights in held) / len(held)
        checkpoint.largest(total, f"the mean of {name}")
        return total.to(held[0].dtype(name))

    with checkpoint.atomic_dir(output) as directory:
        checkpoint.save_weights(directory, ((name, mean(name)) for name in held[0]))
        checkpoint.write_json(directory / "config.json", configs[0])
        checkpoint.copy_side_files(directories[0], directory)
    print(f"{len(held[0].names)} tensors, each the mean of {len(held)}")


@dataclass
class Update:
    """What an adapter makes of its base's weights, one at a time."""

    weights: Weights  # the base's
    scalings: dict[str, float]  # of the adapted modules
    tensors: dict[str, torch.Tensor]  # the adapter's
    dtype: torch.dtype | None = None  # of the results; None: the base's own

    def module(self, name: str) -> str | None:
        """The adapted module whose weight this is, if any."""
        module = name.removesuffix(".weight")
        return module if module != name and module in self.scalings else None

    def changes(self, name: str) -> bool:
        own = self.tensors.get(name)
        if own is not None and not torch.equal(own.float(), self.weights.read(name).float()):
            return True
        # B A is zero where a side of it is, as it was before the training.
        module = self.module(name)
        return module is not None and all(self.tensors[f"{module}.lora_{side}.weight"].any() for side in "AB")

    def merged(self, name: str) -> torch.Tensor:
        tensor = self.weights.read(name)
        if not tensor.is_floating_point():
            return tensor
        rounded = self.dtype or tensor.dtype
        if name in self.tensors:  # a parameter that was trained whole
            tensor = self.tensors[name]
        if module := self.module(name):
            A, B = (self.tensors[f"{module}.lora_{side}.weight"].float() for side in "AB")
            # In fp32, (out, r) x (r, in): rounded once, when all is added.
            tensor = tensor.float() + self.scalings[module] * (B @ A)
            if (lengths := self.tensors.get(module + lora.MAGNITUDE)) is not None:
                tensor *= (lengths.float() / tensor.norm(dim=1))[:, None]
        return tensor.to(rounded)


def check_tensors(directory: Path, update: Update) -> int:
    """Read every tensor back: exactly as computed, changed only where the adapter says, finite. -> number
    changed."""
    merged, weights, changed = open_weights(directory), update.weights, 0
    if merged.names != weights.names:
        raise ValueError("self-check failed: the merged file holds other tensors than the base; report this")
    # Twice computed, once written: what the disk gives back is compared with what it was to hold.
    for name in weights:
        base, now = weights.read(name), merged.read(name)
        checkpoint.largest(base, f"{weights.directory}: {name}")
        expected = base = base.to(update.dtype or base.dtype) if base.is_floating_point() else base
        if update.changes(name):
            expected = update.merged(name)
            changed += 1
            # A small update of 16-bit weights may be less than half of their last bit.
            if update.module(name) and torch.equal(now, base):
                raise ValueError(
                    f"the update of {name} is lost in rounding to {now.dtype}; use --dtype float32"
                )
        if now.dtype != expected.dtype or not torch.equal(bits(now), bits(expected)):
            raise ValueError(
                f"self-check failed: {name} read back differs from what was computed; check the disk"
            )
        if not now.isfinite().all():
            raise ValueError(f"{name} is too large for {now.dtype}; use --dtype bfloat16 or float32")
    return changed


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def set_parameter(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, torch.nn.Parameter(tensor, requires_grad=False))


def streamed_model(
    directory: Path, lora_path: Path | None = None, kind: str | None = None
) -> torch.nn.Module:
    """As generate.load_model in fp32, but a block has weights only while it runs: all of Qwen-VL 7B's would
    be 36 GiB. kind: what training rounded the language model's blocks to."""
    config = checkpoint.read_config(directory)
    definition = vlm.find(config)
    if lora_path is None:
        weights = checkpoint.open_model(directory, definition)
    else:
        config, weights = lora.open_base(directory, lora_path, definition)
    model = definition.network(config).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    checkpoint.check_names(shapes, weights)
    kept = {}  # what the adapter holds stays
    if lora_path is not None:
        lora.load_adapter(model, lora_path)
        kept = {n: p.shape for n, p in model.named_parameters() if n not in shapes}
        kept |= {n: shapes[n] for n in lora.contents(lora_path)[1] if n in shapes}
    few = {f"{name}.weight" for name in quantize.layers(model.requires_grad_(False))} if kind else ()
    base = shapes.keys() - kept.keys()
    names, streamed = {p: name for name, p in model.named_parameters()}, set()
    # Each block reads its weights when it begins and forgets them when it ends.
    for block in [*model.vision_blocks, *model.blocks]:
        own = {name: names[p] for name, p in block.named_parameters() if names[p] in base}
        streamed.update(own.values())

        # a hook that knew the model would keep it alive: they know the block that they are called with
        def read(block, args, own=own):
            for name, full in own.items():
                tensor = weights.read(full).float()
                set_parameter(block, name, quantize.rounded(tensor, kind) if full in few else tensor)

        def forget(block, args, out, own=own):
            for name, full in own.items():
                set_parameter(block, name, torch.empty(shapes[full], device="meta"))

        block.register_forward_pre_hook(read)
        block.register_forward_hook(forget)
    for name in base - streamed:
        set_parameter(model, name, weights.read(name).float())
    # Room for what the adapter holds, which is loaded into it.
    for name, shape in kept.items():
        set_parameter(model, name, torch.empty(shape))
    if lora_path is not None:
        lora.load_adapter(model, lora_path)
    return model


@torch.no_grad()
def check_logits(definition: vlm.Model, base: Path, adapter: Path, merged: Path) -> dict:
    """The merged model must give base + adapter's logits, up to the rounding of its weights."""
    batch = definition.probe_batch(definition.processor(base))

    def logits(directory, lora_path=None):
        model = streamed_model(directory, lora_path)
        return model.logits(model.hidden(batch)).float()

    # Two ways to the same numbers: the adapter beside the layers, and in their weights.
    expected, now = logits(base, adapter), logits(merged)
    difference, from_base = now - expected, float((now - logits(base)).abs().max())
    largest = float(difference.abs().max())
    print(f"largest logit difference merged vs base+adapter: {largest:.1e} (merged vs base: {from_base:.2g})")
    if kind := lora.base_in(adapter):
        # what the adapter was trained to correct goes with the rounding: this is no fault of the merge
        trained = streamed_model(base, adapter, kind)
        trained = trained.logits(trained.hidden(batch)).float()
        share = float((now - trained).norm() / trained.norm())
        print(
            f"the adapter was trained over weights in {kind}, and merged into whole ones: "
            f"logits differ by {share:.2%} from those in training"
        )
    # fp32 differs by its last bits alone. 16-bit weights were rounded, each by up to half of their last bit.
    weights = open_weights(merged)
    if all(weights.dtype(name).itemsize >= 4 for name in weights):
        error, limit = largest, 1e-3 * float(expected.abs().max())
    else:  # root mean square: the largest of millions of rounding errors is several times that
        error, limit = float(difference.square().mean().sqrt()), 0.05 * float(expected.std())
    if not error <= limit:
        raise ValueError(
            f"self-check failed: logits are off by {error:.2g}, allowed {limit:.2g}; nothing was written"
        )
    return {"logits_vs_adapter": largest, "logits_vs_base": from_base}


def example(adapter: Path, merged: str) -> str:
    """A question that the adapter was trained on, as options of generate.py; a plain one if that is not
    known."""
    for directory in (adapter, adapter.parent):  # a run, or its checkpoint-N
        with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, KeyError):
            config = schema.read_json(directory / "train_config.json", "")
            entry = data.Entry((config["dataset"] or data.DEFAULT_DATASET)["train"][0])
            processor = data.load_processor(merged, config["stage"])
            return terminal.example_request(entry.conversations(0)[0], processor)
    return "--prompt Hello"


def merge_average(args) -> int:
    for key in ("model_name_or_path", "weights"):
        if getattr(args, key):
            raise ValueError(f"--{key} and --average are both given: --average takes checkpoints alone")
    if args.lora_path != ["output"] or args.dtype != "keep":
        raise ValueError(
            "--average with --lora_path or --dtype: it takes checkpoints alone, in their precision"
        )
    for directory in args.average:
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(
                f"--average: {directory} is no checkpoint (config.json); adapters are added with --weights"
            )
    average([Path(directory) for directory in args.average], args.merge_model_path)
    print(f"mean of the checkpoints: {args.merge_model_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", help="base checkpoint directory (default: the one the adapter names)")
    adapters = "directory of the adapter; several with --weights"
    add("--lora_path", nargs="+", default=["output"], help=adapters)
    factors = "of several adapters: their updates times these are added"
    add("--weights", nargs="+", type=float, help=factors)
    mean = "no adapter: the mean of the weights of these checkpoints"
    add("--average", nargs="+", metavar="DIR", help=mean)
    add("--merge_model_path", default="merged", help="directory to write")
    dtypes = ["keep", "float32", "bfloat16", "float16"]
    add("--dtype", default="keep", choices=dtypes, help="of the merged weights")
    args = parser.parse_args(argv)
    paths, count = args.lora_path, len(args.lora_path)
    # Without a word on the command line: the adapter of a run in output, or what there is to say.
    if not argv and not (Path(paths[0]) / "adapter_config.json").is_file():
        parser.print_help()
        raise ValueError(f"{paths[0]} holds no adapter: name one with --lora_path")
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    if args.average:
        return merge_average(args)
    if len(args.weights or [1.0]) != count:
        raise ValueError(
            f"--weights {args.weights} for {count} adapters; expected a number for each of --lora_path"
        )
    if args.weights and not any(args.weights):
        raise ValueError("--weights are all 0: that is the base itself")
    if args.weights is None:
        merge(args.model_name_or_path, paths[0], args.merge_model_path, dtype)
    else:
        # Their sum is an adapter too: it is merged, and proven, like any other.
        with tempfile.TemporaryDirectory() as directory:
            base = args.model_name_or_path or lora.find_base(paths[0])
            lora.combine(paths, args.weights, directory)
            print("adapters: " + " + ".join(f"{w:g} x {p}" for w, p in zip(args.weights, paths, strict=True)))
            info = {"adapter": dict(zip(paths, args.weights, strict=True))}
            merge(base, directory, args.merge_model_path, dtype, info)
    print(f"merged model: {args.merge_model_path}")
    place = shlex.quote(args.merge_model_path)
    asking = example(Path(paths[0]), args.merge_model_path)
    print(f"next: {terminal.script('generate.py')} --model_name_or_path {place} {asking}")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
