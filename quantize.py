"""Weights of a language model's blocks in 8 or 4 bits: for inference, and frozen under adapters.

    python generate.py --model visualglm --quantize nf4 --image image.png --prompt "What is this?"
    python train.py --model qwen_vl --lora --quantize nf4                # QLoRA, arXiv:2305.14314

int8, int4: each output row has one scale, max|w| / (2^(bits-1) - 1), kept in fp16, and weights are rounded to
it. With int4 two neighbouring columns share a byte, the even one in the low bits (an order of our own). nf4:
see kernels/nf4.py. Embeddings, vocabulary head, norms, biases and the vision tower stay as they are.

    python quantize.py --model_name_or_path base --quantize nf4 --output_dir base-nf4

Such a directory holds for `x.weight` the buffers below (`x.weight.codes`, ...), and `"quantize"` in its
config.json. generate.py, evaluate.py and serve.py read it; what trains, merges or exports takes the original.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import terminal
import vlm
from kernels import nf4
from kernels.linear import product, put_for_weight

KINDS = ("int8", "int4", "nf4")
# Rows of x up to which a CPU's product with few bits was measured faster than one with the weight expanded;
# for int4 the codes are kept once more, in an order of the CPU's own.
CPU_ROWS = {(8, torch.bfloat16): 28, (8, torch.float32): 4, (8, torch.float16): 2, (4, torch.bfloat16): 64}


class RowScaled(nn.Module):
    """A weight (N, K) in int8, or two int4 a byte, with a scale for each row."""

    def __init__(self, shape, bits: int, device=None):
        super().__init__()
        self.shape, self.bits, self.on_cpu = torch.Size(shape), bits, None
        columns = shape[1] if bits == 8 else (shape[1] + 1) // 2
        self.register_buffer("q", torch.empty(shape[0], columns, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(shape[0], dtype=torch.float16, device=device))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        top, rows = 2 ** (self.bits - 1) - 1, max(1, (1 << 18) // self.shape[1])
        pieces = zip(weight.split(rows), self.q.split(rows), self.scale.split(rows), strict=True)
        for piece, q_here, scale_here in pieces:  # fp32 copies of a few rows at a time
            piece = piece.to(self.q.device).float()
            scales = piece.abs().amax(1) / top
            if bool((scales > torch.finfo(torch.float16).max).any()):
                high = float(piece.abs().max())
                raise ValueError(
                    f"weights of {high:.3g} are too large for int{self.bits}'s fp16 scales; use nf4"
                )
            scale_here.copy_(scales)
            # all-zero rows; and rows too small for fp16 become zero rather than infinite
            steps = torch.where(scale_here > 0, scale_here.float(), 1.0)[:, None]
            q = (piece / steps).round().clamp(-top, top).to(torch.int8)
            if self.bits == 4:
                q = F.pad(q, (0, q.shape[1] % 2))
                q = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
            q_here.copy_(q)

    def weight(self, dtype: torch.dtype) -> Tensor:
        q = self.q
        if self.bits == 4:  # shifts on int8 keep the sign
            q = torch.stack(((q << 4) >> 4, q >> 4), dim=-1).flatten(1)[:, : self.shape[1]]
        return q.to(dtype).mul_(self.scale.to(dtype)[:, None])  # in place: one copy of the weight

    def product(self, x: Tensor) -> Tensor:
        """x W^T. For few rows a CPU computes with int8 and int4 as they are: 16-bit weights would take longer
        to expand, or to read, than the product takes."""
        if torch.compiler.is_compiling():  # a compiled program is for any number of rows
            return F.linear(x, self.weight(x.dtype))
        rows = x.numel() // max(1, x.shape[-1])
        fits = self.shape[1] % 32 == 0 and (self.bits == 8 or self.shape[0] % 64 == 0)  # unchecked by torch
        # For more rows the product outweighs expanding the weight, and whole weights multiply faster.
        if x.device.type != "cpu" or not fits or not 0 < rows <= CPU_ROWS.get((self.bits, x.dtype), 0):
            return product(x, self.weight(x.dtype))
        flat = x.reshape(rows, -1).contiguous()
        if self.bits == 8:
            y = torch._weight_int8pack_mm(flat, self.q, self.scale.to(x.dtype))
        else:
            if self.on_cpu is None:
                self.on_cpu = self.pack_for_cpu()
            y = torch._weight_int4pack_mm_for_cpu(flat, *self.on_cpu)
        return y.view(*x.shape[:-1], -1)

    def pack_for_cpu(self) -> tuple[Tensor, int, Tensor]:
        """Codes in the order that this CPU computes with, columns that share a scale, scales and zeros."""
        group = next(size for size in (256, 128, 64, 32) if self.shape[1] % size == 0)
        codes = torch.stack(((self.q << 4) >> 4, self.q >> 4), dim=-1).flatten(1).int() + 8
        scales = torch.stack((self.scale, torch.zeros_like(self.scale)), -1).bfloat16()
        scales = scales.expand(self.shape[1] // group, -1, -1).contiguous()
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1), group, scales

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class NF4(nn.Module):
    """A weight (N, K) in NF4 with double quantisation."""

    def __init__(self, shape, device=None):
        super().__init__()
        self.shape = torch.Size(shape)
        codes, scales, coarse = nf4.sizes(self.shape)
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=device))
        self.register_buffer("coarse", torch.empty(coarse, dtype=torch.float32, device=device))
        self.register_buffer("middle", torch.empty((), dtype=torch.float32, device=device))

    @property
    def packed(self) -> nf4.Packed:
        return nf4.Packed(self.codes, self.scales, self.coarse, self.middle, tuple(self.shape))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        for buffer, values in zip(self.buffers(), nf4.pack(weight.to(self.codes.device))[:4], strict=True):
            buffer.copy_(values)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return nf4.unpack(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nf4.nf4_linear(x, self.packed)


class _Product(torch.autograd.Function):
    """x W^T; the backward pass expands the weight again, so nothing of it is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, few: RowScaled) -> Tensor:
        ctx.few = few
        return few.product(x.detach())

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.few.weight(dy.dtype), None


def replace_weight(layer: nn.Linear, kind: str) -> nn.Module:
    """Room for the layer's weight in few bits, in its place; `fill` it."""
    # Its rows' lengths change in training, while a weight in few bits is the base's for good.
    if getattr(layer, "lora_magnitude_vector", None) is not None:
        raise ValueError(f"quantize={kind}: DoRA takes lengths of whole weights; merge its adapter first")
    few = empty(kind, layer.weight.shape, layer.weight.device)
    put_for_weight(layer, few)
    return few


def empty(kind: str, shape, device=None) -> nn.Module:
    """Room for a weight in few bits."""
    return NF4(shape, device) if kind == "nf4" else RowScaled(shape, int(kind[3:]), device)


def rounded(weight: Tensor, kind: str) -> Tensor:
    """The weight in fp32 as few bits give it back."""
    few = empty(kind, weight.shape, weight.device)
    few.fill(weight)
    return few.weight(torch.float32)


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the language model's blocks, those whose frozen weight can be in few bits."""
    names, found = {id(module): name for name, module in model.named_modules()}, {}
    for layer in (m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)):
        trains = any(p.requires_grad for p in layer.parameters(recurse=False))
        # an adapter's own matrices are inside of the layer that they change
        if layer.weight is not None and not trains and ".lora_" not in names[id(layer)]:
            found[names[id(layer)]] = layer
    return found


def prepare(model: nn.Module, kind: str) -> None:
    """Room for the blocks' frozen weights in few bits, before a model on the meta device gets memory."""
    for layer in layers(model).values():
        replace_weight(layer, kind)


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """{name of the weight: what keeps it in few bits}."""
    return {
        name.removesuffix("few") + "weight": module
        for name, module in model.named_modules()
        if isinstance(module, NF4 | RowScaled)
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What keeps weights in few bits, by its name in files."""
    named = weights_of(model).items()
    return {f"{name}.{key}": buffer for name, few in named for key, buffer in few.named_buffers()}


@torch.no_grad()
def load(tensors: dict[str, Tensor], weights: checkpoint.Weights) -> None:
    """Fills what `tensors_of` gives from a file."""
    for name, tensor in tensors.items():
        if name not in weights.names:
            raise ValueError(f"{weights.directory} lacks {name}, which its quantize in config.json needs")
        if (weights.shape(name), weights.dtype(name)) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{weights.directory}: {name} is {tuple(weights.shape(name))} {weights.dtype(name)}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
        full = weights.read(name)
        if full.is_floating_point():
            checkpoint.largest(full, f"{weights.directory}: {name}")
        tensor.copy_(full)


def write(base: Path, kind: str, output: Path) -> None:
    """A checkpoint whose blocks' weights are in few bits; one whole weight in memory at a time."""
    # One weight at a time: the model on the meta device says which, and has no memory.
    config = checkpoint.read_config(base)
    definition = vlm.find(config)
    weights, model = checkpoint.open_model(base, definition), definition.network(config)
    checkpoint.check_names({name: p.shape for name, p in model.named_parameters()}, weights)
    if output.exists():
        raise ValueError(f"--output_dir {output} exists; choose another directory")
    prepare(model.requires_grad_(False), kind)
    if not (small := weights_of(model)):
        raise ValueError(f"{base} has no language model to round")

    def tensors():
        for name in weights:
            full = weights.read(name)
            checkpoint.largest(full, f"{weights.directory}: {name}")
            if name not in small:
                yield name, full
                continue
            few = empty(kind, full.shape)
            few.fill(full)
            yield from ((f"{name}.{key}", buffer) for key, buffer in few.named_buffers())

    with checkpoint.atomic_dir(output) as directory:
        checkpoint.save_weights(directory, tensors())
        checkpoint.write_json(directory / "config.json", {**config, "quantize": kind})
        checkpoint.copy_side_files(base, directory)


@torch.no_grad()
def say_slower(kind: str, device: torch.device, what: str) -> None:
    if device.type == "cpu":
        print(f"note: on a CPU {kind} saves memory, but {what} slower than whole weights", file=sys.stderr)


def quantize(model: nn.Module, kind: str, probe: dict | None = None) -> str:
    """Rounds the weight of every linear layer inside `model.blocks`, one by one, and returns a line that says
    what it cost.

    probe: a batch whose logits are compared before and after (a model file's probe_batch); compute them in
    fp32 for an error against fp32.
    """
    # The cost in what counts, logits; weights alone would say little.
    before = None if probe is None else model.logits(model.hidden(probe)).float()
    for p in model.parameters():
        p.requires_grad_(False)
    errors, small, total = [], 0, 0
    for layer in layers(model).values():
        weight = layer.weight
        few = replace_weight(layer, kind)
        few.fill(weight)
        norm = weight.float().norm().clamp(min=1e-30)
        errors.append(float((few.weight(torch.float32) - weight).norm() / norm))
        total += weight.numel() * weight.element_size()
        small += sum(b.numel() * b.element_size() for b in few.buffers())
    line = (
        f"{kind}: {len(errors)} linear layers, {total / 2**20:,.1f} -> {small / 2**20:,.1f} MiB, "
        f"weights off by {sum(errors) / len(errors):.2%} (mean), {max(errors):.2%} (worst layer)"
    )
    if before is not None:
        after = model.logits(model.hidden(probe)).float()
        difference = (after - before).norm() / before.norm()
        same = (after.argmax(-1) == before.argmax(-1)).float().mean()
        line += f"; logits off by {difference:.2%}, same best token at {same:.0%} of {len(after)} positions"
    return line


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint directory")
    parser.add_argument("--quantize", required=True, choices=KINDS)
    parser.add_argument("--output_dir", required=True, help="directory to write")
    args = parser.parse_args(argv)
    if not (Path(args.model_name_or_path) / "config.json").is_file():
        raise ValueError(f"{args.model_name_or_path} is no checkpoint directory (config.json)")
    write(Path(args.model_name_or_path), args.quantize, Path(args.output_dir))
    print(f"weights in {args.quantize}: {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
