"""Linear layers of a model that only answers: oneDNN's products, with weights in an order of the CPU's own.

    pack(model)         # for good: from here on the model can be neither trained nor saved

F.linear in fp32 is MKL's, which does not use all that a CPU has (least on AMD's), and reads a weight again
for every few rows. CPU time of all products of a step, 29M fp32 weights, one core of a Zen 5, 1 / 8 / 256
rows: F.linear 7.2 / 12.8 / 161 ms, packed 4.0 / 6.0 / 63 ms; in bf16 with 1 / 8 / 64 rows 4.9 / 5.9 / 13.2
and 2.5 / 3.8 / 10.6 ms. A row's result does not depend on the others: a batch gives what one gives alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return F.linear(x, layer.weight, layer.bias)
    if isinstance(layer.few, Packed):
        return layer.few(x, layer.bias)
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y = layer.few(x)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class WeightlessLinear(nn.Linear):
    """An nn.Linear without a weight, which is its `few`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


def put_for_weight(layer: nn.Linear, few: nn.Module) -> None:
    """`few` in the place of the layer's weight. The layer keeps its bias, its adapter and its name."""
    layer.register_parameter("weight", None)
    layer.few = few
    if type(layer) is nn.Linear:  # a head, or a layer with an adapter, knows what to do
        layer.__class__ = WeightlessLinear


class Packed(nn.Module):
    """A weight in oneDNN's order."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.tensor, bias, "none", [], "")


@torch.no_grad()
def pack(model: nn.Module) -> nn.Module:
    """Every linear layer's weight on a CPU, one after the other, so that only one at a time is there twice.
    Those in few bits, an adapter's, what tensor parallelism has cut and what DoRA takes lengths of stay as
    they are."""
    for name, layer in list(model.named_modules()):
        whole = (
            isinstance(layer, nn.Linear) and layer.weight is not None and not getattr(layer, "is_cut", False)
        )
        dora = getattr(layer, "lora_magnitude_vector", None) is not None
        if whole and not dora and ".lora_" not in name and possible(layer.weight):
            put_for_weight(layer, Packed(layer.weight))
    return model
