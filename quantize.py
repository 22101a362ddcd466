"""Weight-only int8 and int4 of a language model's blocks, for inference, for every model here.

    python generate.py --model visualglm --quantize int4 --image image.png --prompt "What is this?"

Each output row has one scale, max|w| / (2^(bits-1) - 1), kept in fp16; weights are rounded to it, computed
with in the activations' dtype. Embeddings, vocabulary head, norms, biases and the vision tower stay as they
are. With int4 two neighbouring columns share a byte, the even one in the low bits (an order of our own: no
such file is read or written).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = {"int8": 8, "int4": 4}


class QuantLinear(nn.Module):
    """A linear layer whose weight is int8, or two int4 a byte."""

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        weight = linear.weight.detach().float()
        top = 2 ** (bits - 1) - 1
        scale = (weight.abs().amax(1) / top).half()
        # all-zero rows; and rows too small for fp16 become zero rather than infinite
        steps = torch.where(scale > 0, scale.float(), 1.0)[:, None]
        q = (weight / steps).round().clamp(-top, top).to(torch.int8)
        if bits == 4:
            q = F.pad(q, (0, q.shape[1] % 2))
            q = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
        self.bits, self.in_features = bits, linear.in_features
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.error = float((self.weight(torch.float32) - weight).norm() / weight.norm().clamp(min=1e-30))

    def weight(self, dtype: torch.dtype) -> Tensor:
        q = self.q
        if self.bits == 4:  # shifts on int8 keep the sign
            q = torch.stack(((q << 4) >> 4, q >> 4), dim=-1).flatten(1)[:, : self.in_features]
        return q.to(dtype) * self.scale.to(dtype)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x.dtype), self.bias)


@torch.no_grad()
def quantize(model: nn.Module, kind: str, probe: dict | None = None) -> str:
    """Replaces every linear layer inside `model.blocks`, one by one, and returns a line that says what it
    cost.

    probe: a batch whose logits are compared before and after (a model file's probe_batch); compute them in
    fp32 for an error against fp32. Raises ValueError for a model with an adapter.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"quantize={kind} with an adapter: merge it first (python merge.py), then quantize the result"
        )
    before = None if probe is None else model.logits(model.hidden(probe)).float()
    errors, saved, total = [], 0, 0
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                new = QuantLinear(module, BITS[kind])
                block.set_submodule(name, new)
                errors.append(new.error)
                total += module.weight.numel() * module.weight.element_size()
                saved += (
                    module.weight.numel() * module.weight.element_size()
                    - new.q.numel()
                    - 2 * new.scale.numel()
                )
    line = (
        f"{kind}: {len(errors)} linear layers, {total / 2**20:,.1f} -> {(total - saved) / 2**20:,.1f} MiB, "
        f"weights off by {sum(errors) / len(errors):.2%} (mean), {max(errors):.2%} (worst layer)"
    )
    if before is not None:
        after = model.logits(model.hidden(probe)).float()
        difference = (after - before).norm() / before.norm()
        same = (after.argmax(-1) == before.argmax(-1)).float().mean()
        line += f"; logits off by {difference:.2%}, same best token at {same:.0%} of {len(after)} positions"
    return line
