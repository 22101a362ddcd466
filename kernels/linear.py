"""Linear layers on a CPU: oneDNN's products where they were measured faster than MKL's, which F.linear takes.

    adopt(model, device)  # a model that trains: large fp32 products on AMD's CPUs, 2.1 to 2.7 times as fast
    pack(model)           # one that answers, for good: it can be neither trained nor saved from here on

Packed weights have an order of the CPU's own. CPU time of all products of a step, 29M fp32 weights, one core
of a Zen 5, 1 / 8 / 256 rows: F.linear 7.2 / 12.8 / 161 ms, packed 4.0 / 6.0 / 63 ms; in bf16 with 1 / 8 / 64
rows 4.9 / 5.9 / 13.2 and 2.5 / 3.8 / 10.6 ms. A row's result does not depend on the others: a batch gives
what one gives alone.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiply-adds from which a product is worth setting oneDNN up for its shape, which takes half a millisecond:
# streams have other lengths in every step.
LARGE = 1 << 26
# Numbers of a weight from which packing it pays: a call costs 9 us more than F.linear's, and 512 x 512 break
# even at 4 rows. With smaller ones packed the tiny models answered 0.70 to 0.77 times as fast.
WORTH_PACKING = 1 << 18
# The first product with so many rows decides the order; this one was the fastest for 1 row as for 256.
PACKED_FOR = 16


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without gradients; for a weight that must stay as it is: a head that is the embedding too."""
    if weight.dtype == torch.float32 and possible(weight) and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def possible(weight: Tensor) -> bool:
    """Whether oneDNN was measured faster for such a weight. Not inside a program that is compiled or
    exported: its machine is another one."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or torch.compiler.is_compiling()
    ):
        return False
    sixteen = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or sixteen


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b of a layer whose weight may be in few bits (quantize.py) or packed, which is then its `few`."""
    if layer.weight is not None:
        plain = x.dim() == 2 and type(layer.weight) in (Tensor, nn.Parameter)
        if plain and not torch.is_autocast_enabled("cpu") and faster(x, layer.weight.t()):
            return _Linear.apply(x, layer.weight, layer.bias)
        return F.linear(x, layer.weight, layer.bias)
    if isinstance(layer.few, Packed):
        return layer.few(x, layer.bias)
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y = layer.few(x)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


@functools.cache
def mkl_is_slow() -> bool:
    """On this CPU, in fp32."""
    about = Path("/proc/cpuinfo")
    return (
        about.exists()
        and "AuthenticAMD" in about.read_text(encoding="utf-8", errors="replace")
        and torch.backends.mkldnn.is_available()
    )


def faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is for a (M, K) times b (K, N)."""
    if torch.compiler.is_compiling():  # first: a size that is asked for would make a program for it alone
        return False
    here = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    return here and a.numel() * b.shape[1] >= LARGE and mkl_is_slow()


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) times b (K, N), + bias (N,); without gradients."""
    if faster(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a.mm(b) if bias is None else torch.addmm(bias, a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a frozen weight has no gradient, for which x would be kept: of a LoRA step a tenth of the memory
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return mm(x, weight.t(), bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x, weight), dy = ctx.saved_tensors, dy.contiguous()
        need_x, need_w, need_b = ctx.needs_input_grad
        dx = mm(dy, weight) if need_x else None
        return dx, mm(dy.t(), x) if need_w else None, dy.sum(0) if need_b else None


class AnyLinear(nn.Linear):
    """An nn.Linear that computes as `linear` says; its weight may be its `few`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


def put_for_weight(layer: nn.Linear, few: nn.Module) -> None:
    """`few` in the place of the layer's weight. The layer keeps its bias, its adapter and its name."""
    layer.register_parameter("weight", None)
    layer.few = few
    if type(layer) is nn.Linear:  # a head, or a layer with an adapter, knows what to do
        layer.__class__ = AnyLinear


def adopt(model: nn.Module, device: torch.device) -> None:
    """Has the plain linear layers compute as `linear` says, where that may be faster; others do by
    themselves."""
    for layer in model.modules() if device.type == "cpu" and mkl_is_slow() else ():
        if type(layer) is nn.Linear:
            layer.__class__ = AnyLinear


class Packed(nn.Module):
    """A weight in oneDNN's order."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.tensor, bias, "none", [], "")


@torch.no_grad()
def pack(model: nn.Module) -> nn.Module:
    """Every large linear layer's weight on a CPU, one after the other, so that only one at a time is there
    twice. Those in few bits, an adapter's, what tensor parallelism has cut and what DoRA takes lengths of
    stay as they are."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer.weight is None or ".lora_" in name:
            continue
        # DoRA asks for the weight's rows
        needed = getattr(layer, "is_cut", False) or getattr(layer, "lora_magnitude_vector", None) is not None
        if layer.weight.numel() >= WORTH_PACKING and possible(layer.weight) and not needed:
            put_for_weight(layer, Packed(layer.weight))
    return model
