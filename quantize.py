"""Weights of a language model's blocks in 8 or 4 bits: for inference, and frozen under adapters.

    python generate.py --model visualglm --quantize nf4 --image image.png --prompt "What is this?"
    python train.py --model qwen_vl --lora --quantize nf4                # QLoRA, arXiv:2305.14314

int8, int4: each output row has one scale, max|w| / (2^(bits-1) - 1), kept in fp16, and weights are rounded to
it. With int4 two neighbouring columns share a byte, the even one in the low bits (an order of our own). nf4:
see kernels/nf4.py. Embeddings, vocabulary head, norms, biases and the vision tower stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import nf4

KINDS = ("int8", "int4", "nf4")


class RowScaled(nn.Module):
    """A weight (N, K) in int8, or two int4 a byte, with a scale for each row."""

    def __init__(self, shape, bits: int, device=None):
        super().__init__()
        self.shape, self.bits = torch.Size(shape), bits
        columns = shape[1] if bits == 8 else (shape[1] + 1) // 2
        self.register_buffer("q", torch.empty(shape[0], columns, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(shape[0], dtype=torch.float16, device=device))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        weight = weight.to(self.q.device).float()
        top = 2 ** (self.bits - 1) - 1
        scale = (weight.abs().amax(1) / top).half()
        # all-zero rows; and rows too small for fp16 become zero rather than infinite
        steps = torch.where(scale > 0, scale.float(), 1.0)[:, None]
        q = (weight / steps).round().clamp(-top, top).to(torch.int8)
        if self.bits == 4:
            q = F.pad(q, (0, q.shape[1] % 2))
            q = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
        self.q.copy_(q)
        self.scale.copy_(scale)

    def weight(self, dtype: torch.dtype) -> Tensor:
        q = self.q
        if self.bits == 4:  # shifts on int8 keep the sign
            q = torch.stack(((q << 4) >> 4, q >> 4), dim=-1).flatten(1)[:, : self.shape[1]]
        return q.to(dtype).mul_(self.scale.to(dtype)[:, None])  # in place: one copy of the weight

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
        return F.linear(x, few.weight(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.few.weight(dy.dtype), None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b of a layer whose weight may be in few bits."""
    if layer.weight is not None:
        return F.linear(x, layer.weight, layer.bias)
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y = layer.few(x)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class QuantLinear(nn.Linear):
    """An nn.Linear without a weight, which is its `few`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


def replace_weight(layer: nn.Linear, kind: str) -> nn.Module:
    """Room for the layer's weight in few bits, in its place; `fill` it. The layer keeps its bias, its adapter
    and its name."""
    few = empty(kind, layer.weight.shape, layer.weight.device)
    layer.register_parameter("weight", None)
    layer.few = few
    if type(layer) is nn.Linear:  # a layer with an adapter knows what to do
        layer.__class__ = QuantLinear
    return few


def empty(kind: str, shape, device=None) -> nn.Module:
    """Room for a weight in few bits."""
    return NF4(shape, device) if kind == "nf4" else RowScaled(shape, int(kind[3:]), device)


def rounded(weight: Tensor, kind: str) -> Tensor:
    """The weight as few bits give it back."""
    few = empty(kind, weight.shape, weight.device)
    few.fill(weight)
    return few.weight(weight.dtype)


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the language model's blocks, those whose frozen weight can be in few bits."""
    names = {id(module): name for name, module in model.named_modules()}
    found = [m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    # an adapter's own matrices are inside of the layer that they change
    return {
        names[id(m)]: m
        for m in found
        if m.weight is not None and not m.weight.requires_grad and ".lora_" not in names[id(m)]
    }


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


@torch.no_grad()
def quantize(model: nn.Module, kind: str, probe: dict | None = None) -> str:
    """Rounds the weight of every linear layer inside `model.blocks`, one by one, and returns a line that says
    what it cost.

    probe: a batch whose logits are compared before and after (a model file's probe_batch); compute them in
    fp32 for an error against fp32.
    """
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
