"""Qwen-VL 7B (arXiv:2308.12966): ViT-bigG, one cross-attention resampler, Qwen-7B, and everything about its
data format.

    python train.py --model qwen_vl --lora
    python generate.py --image image.png --prompt "What is this?"

Text has no batch dimension: a micro-batch is one stream of T tokens, cut into segments (samples) by
`cu_seqlens`. Numerics follow the original modeling_qwen.py and visual.py (2023); where this file differs on
purpose, it says so. Parameter names are those of the published checkpoint.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import parallel
import schema
import vlm
from images import open_image
from kernels.attention import attention
from kernels.dropout import dropout_rows
from kernels.linear import product
from kernels.linear_cross_entropy import IGNORE_INDEX
from kernels.norm import rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu
from records import text_of
from schema import Depth, Epsilon, Pixels, Scale, Size, TokenId, demand
from tokenizer_qwen_vl import QwenTokenizer
from vlm import Batch, LMHead, even_segments

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class VisualConfig:
    # Published: 448, 14, 1664, 48, 16, 4.9231, 4096, 151857. A square image gives (448 / 14)^2 = 1,024
    # patches.
    image_size: Pixels
    patch_size: Pixels
    width: Size
    layers: Depth
    heads: Size
    mlp_ratio: Annotated[float, 0.01, 100]
    output_dim: Size
    image_start_id: TokenId
    n_queries: Size = 256  # absent from the published file


@dataclass
class QwenVLConfig:
    """The fields of the published config.json that change what is computed; other fields of the file are kept
    and ignored."""

    # Published: 4096, 32, 32, 22016, 151936, 2048.
    hidden_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    intermediate_size: Size  # the MLP's inner width is HALF of it
    vocab_size: Size
    seq_length: Size  # trained length: beyond it evaluation uses dynamic NTK and log-n scaling
    visual: VisualConfig
    # From here on with the original's defaults, so that a file that leaves a field out means the same here.
    kv_channels: Annotated[int, 4, 1 << 20] = 128
    layer_norm_epsilon: Epsilon = 1e-6
    rotary_emb_base: Annotated[float, 100, 1e10] = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    tie_word_embeddings: bool = False
    initializer_range: Scale = 0.02
    raw: dict = field(default_factory=dict)  # config.json as it was read, written back with the weights
    max_positions: ClassVar[int | None] = None  # rotary positions have no table that ends

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size // 2

    @classmethod
    def from_dict(cls, raw: dict) -> "QwenVLConfig":
        """Raises ValueError for a missing field, a wrong type or a
        shape that the architecture cannot have."""
        # The file is somebody else's: each number is checked before a layer is made of it.
        visual = schema.from_json(VisualConfig, raw.get("visual"), "config.json: visual")
        config = schema.from_json(cls, raw, "config.json", visual=visual, raw=raw)
        # Keys that would change what is computed, and that no published Qwen-VL sets.
        schema.require(raw, "config.json", attn_dropout_prob=0, emb_dropout_prob=0, scale_attn_weights=True)
        c, v = config, config.visual
        # Each line is a shape that the modules below could not have.
        demand(
            c.kv_channels * c.num_attention_heads == c.hidden_size,
            f"kv_channels={c.kv_channels} x num_attention_heads={c.num_attention_heads} is not hidden_size",
        )
        demand(
            c.kv_channels % 2 == 0, f"kv_channels={c.kv_channels} must be even (rotary positions turn pairs)"
        )
        demand(c.intermediate_size % 2 == 0, f"intermediate_size={c.intermediate_size} must be even")
        demand(
            v.output_dim == c.hidden_size,
            f"visual.output_dim={v.output_dim} must be hidden_size={c.hidden_size}",
        )
        demand(
            v.output_dim % 128 == 0,
            f"visual.output_dim={v.output_dim} must be a multiple of 128 (resampler heads)",
        )
        demand(v.width % v.heads == 0, f"visual.heads={v.heads} does not divide visual.width={v.width}")
        demand(
            v.image_size % v.patch_size == 0,
            f"visual.patch_size={v.patch_size} does not divide image_size={v.image_size}",
        )
        demand(
            math.isqrt(v.n_queries) ** 2 == v.n_queries, f"visual.n_queries={v.n_queries} must be a square"
        )
        demand(
            c.rotary_pct == 1.0,
            f"rotary_pct={c.rotary_pct} is not supported; every published Qwen-VL has 1.0",
        )
        return config


# --------------------------------------------------------------------------------------------------
# Language model


@dataclass
class Context:
    """What every block of one forward pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    # Angles are the same in every block, so they are made once a forward pass; (T, D/2), not (T, D): both
    # halves of a head turn by the same angle.
    cos: Tensor  # (T, D/2) fp32
    sin: Tensor
    logn: Tensor | None  # (T, 1, 1), evaluation only
    cache: object | None = None  # engine.KVCache


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        # No bias and no mean: x / rms(x), cast back to x's dtype, then times the weight, in this order.
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: QwenVLConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        # The cache is one pool for all layers: a block says which of it is its own.
        self.layer = layer
        self.head_dim = config.kv_channels
        # The one bias of the language model, whatever no_bias says.
        self.c_attn = nn.Linear(C, 3 * C)  # [q | k | v], each head-major
        self.c_proj = nn.Linear(C, C, bias=not config.no_bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = parallel.copy_to_tp(x, self.c_attn)
        # One product for all three; a tensor-parallel rank holds its heads of each.
        q, k, v = self.c_attn(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # 3 x (T, H, D)
        # Turned before they are cached: a key keeps the angle of the position where it was made.
        q, k = rotary(q, ctx.cos, ctx.sin), rotary(k, ctx.cos, ctx.sin)
        # Queries alone are scaled, beyond the trained length: the softmax stays as sharp as at that length.
        if ctx.logn is not None:
            q = q * ctx.logn.to(q.dtype)
        # Training and loss: every segment sees itself alone, from its start to the query's own place.
        if ctx.cache is None:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal=True)
        else:
            # The cache appends k and v and attends to all that the sequence holds.
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens)
        # Heads side by side again, (T, H, D) -> (T, C).
        return self.c_proj(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: QwenVLConfig):
        super().__init__()
        # intermediate_size counts both halves of the gated product, as the original's w1 and w2 together.
        C, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(C, inner, bias=bias)  # LLaMA's up_proj
        self.w2 = nn.Linear(C, inner, bias=bias)  # LLaMA's gate_proj: the activation is on w2
        self.c_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.w1)
        # (T, C) -> (T, inner) twice -> (T, C)
        return self.c_proj(swiglu(self.w2(x), self.w1(x)))


class Block(nn.Module):
    def __init__(self, config: QwenVLConfig, layer: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # Pre-norm: the residual stream itself is never normalised before ln_f.
        x = x + self.attn(self.ln_1(x), ctx)
        return x + self.mlp(self.ln_2(x))


# --------------------------------------------------------------------------------------------------
# Vision: images are a plain batch; inside, their patches are one stream of N*P rows

VISUAL_EPS = 1e-6  # fixed in the original, whatever layer_norm_epsilon says


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A square position table (G*G, C) interpolated to (grid*grid, C): bicubic in fp32, no antialiasing."""
    # The table is the 16 x 16 grid of 224-pixel pre-training; 448 pixels give 32 x 32, so it is always
    # stretched.
    G = math.isqrt(table.shape[0])
    if G == grid:
        return table
    # (G*G, C) -> (1, C, G, G), rows of the table are rows of the image.
    image = table.float().view(1, G, G, -1).permute(0, 3, 1, 2)
    # fp32: bicubic weights in 16 bits move every position a little.
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    # Back to rows in reading order, (1, C, grid, grid) -> (grid*grid, C).
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class VisualAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.in_proj = nn.Linear(width, 3 * width)  # per head: q, k, v (not CLIP's [all q | all k | all v])
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.in_proj)
        # Unpacked the CLIP way these weights give finite features that mean nothing.
        q, k, v = self.in_proj(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)  # 3 x (N*P, H, D)
        # No mask and no causality: each patch sees all of its image, and of no other.
        return self.out_proj(attention(q, k, v, cu_seqlens, cu_seqlens, causal=False).flatten(1))


class VisualMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        # The exact erf GELU, neither CLIP's quick one nor tanh's.
        return self.c_proj(F.gelu(self.c_fc(parallel.copy_to_tp(x, self.c_fc))))


class VisualBlock(nn.Module):
    def __init__(self, config: VisualConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=VISUAL_EPS)
        self.ln_2 = nn.LayerNorm(config.width, eps=VISUAL_EPS)  # in the published files' order
        self.attn = VisualAttention(config.width, config.heads)
        # Rounded down, as in the original: 1664 * 4.9231 = 8,192.04.
        self.mlp = VisualMLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cu_seqlens)
        return x + self.mlp(self.ln_2(x))


class CrossAttention(nn.Module):
    """torch.nn.MultiheadAttention's parameters and maths for queries that differ from keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        # Whole tensors without a Linear around them: the published names are nn.MultiheadAttention's.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # [Wq; Wk; Wv]
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_images: int) -> Tensor:
        """q (Q, E), the same for every image; k and v (N*P, E). Returns (N*Q, E)."""
        q, k, v = (parallel.copy_to_tp(x, self) for x in (q, k, v))
        # Three products, because their inputs differ: q from the queries, k with positions, v without.
        (wq, wk, wv), (bq, bk, bv) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # The queries are the same for every image: projected once, (Q, E) -> (N*Q, E).
        q = F.linear(q, wq, bq).repeat(num_images, 1)
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)) for x in (q, F.linear(k, wk, bk), F.linear(v, wv, bv))
        )
        # Queries and patches of image n are segment n on either side: it looks at its own patches alone.
        Q, P = q.shape[0] // num_images, k.shape[0] // num_images
        o = attention(q, k, v, even_segments(num_images, Q), even_segments(num_images, P), causal=False)
        return self.out_proj(o.flatten(1))


class Resampler(nn.Module):
    def __init__(self, config: VisualConfig):
        super().__init__()
        E, Q = config.output_dim, config.n_queries
        # fixed sines in a fresh model, but always loaded: the published table is rounded to bf16 (and may be
        # fine-tuned)
        self.pos_embed = nn.Parameter(torch.empty(Q, E), requires_grad=False)
        self.query = nn.Parameter(torch.empty(Q, E))
        self.kv_proj = nn.Identity() if config.width == E else nn.Linear(config.width, E, bias=False)
        # The original fixes the head size at 128, whatever the tower has.
        self.attn = CrossAttention(E, E // 128)
        self.ln_q = nn.LayerNorm(E, eps=VISUAL_EPS)
        self.ln_kv = nn.LayerNorm(E, eps=VISUAL_EPS)

    def forward(self, x: Tensor, num_images: int) -> Tensor:
        # width -> E, then the norm: the order of the original.
        kv = self.ln_kv(self.kv_proj(x))  # (N*P, E)
        # Keys stand on the patches' grid, queries on their own: the same table, once stretched, once as it
        # is.
        grid = math.isqrt(x.shape[0] // num_images)
        k = kv + resize_positions(self.pos_embed, grid).to(kv.dtype).repeat(num_images, 1)
        # No residual around the attention: the queries themselves are not added to what they found.
        q = self.ln_q(self.query)
        # Positions on queries and keys, not on values.
        return self.attn(q + self.pos_embed.to(q.dtype), k, kv, num_images)


class Visual(nn.Module):
    def __init__(self, config: VisualConfig):
        super().__init__()
        W, E = config.width, config.output_dim
        # A convolution whose patches do not overlap, so a matrix product for each patch; no class token is
        # added.
        self.conv1 = nn.Conv2d(3, W, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(256, W))  # the 16x16 grid of 224-pixel training
        self.ln_pre = nn.LayerNorm(W, eps=VISUAL_EPS)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(VisualBlock(config) for _ in range(config.layers))
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(E, eps=VISUAL_EPS)
        self.proj = nn.Parameter(torch.empty(E, E))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> features (N, Q, E)."""
        # Patches as rows: (N, 3, H, W) -> (N, W, h, w) -> (N, P, W).
        x = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (N, P, W)
        N, P, _ = x.shape
        # Positions before ln_pre; then images side by side, (N, P, W) -> (N*P, W).
        x = (x + resize_positions(self.positional_embedding, math.isqrt(P))).flatten(0, 1)
        x = self.ln_pre(x)
        # An image is a segment, so the tower has no batch dimension either.
        cu_seqlens = even_segments(N, P)
        for block in self.transformer.resblocks:
            x = block(x, cu_seqlens)
        # The resampler makes Q features of P patches, whatever P is.
        # No norm behind the last block: ln_post comes after the resampler, and proj stands on the right, not
        # transposed.
        x = self.ln_post(self.attn_pool(x, N)) @ self.proj
        # (N*Q, E) -> (N, Q, E): an image's features by themselves again.
        return x.unflatten(0, (N, -1))


# --------------------------------------------------------------------------------------------------
# The whole model


class QwenVL(nn.Module):
    # What the contract (vlm.Network) asks for, in its order.
    LOSSES = ("loss",)
    position_step, position_axes, prefix_rows = 1, 1, 0
    prefill, encoder_decoder = "chunks", False

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config = config
        # Bare modules give the names of the published files: transformer.h.0.attn.c_attn.weight, ...
        self.transformer = nn.Module()
        embedding = nn.Embedding if config.tie_word_embeddings else vlm.TokenEmbedding
        self.transformer.wte = embedding(config.vocab_size, config.hidden_size)
        self.transformer.visual = Visual(config.visual)
        self.transformer.h = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.transformer.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        # Tied, the embedding's matrix is the head: a second name for one tensor would be saved and cut twice.
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)

    @property
    def pipeline_obstacle(self) -> str | None:
        tied = self.config.tie_word_embeddings
        return "tie_word_embeddings=true: the first and the last stage would share a tensor" if tied else None

    @property
    def num_image_tokens(self) -> int:
        return self.config.visual.n_queries

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.visual.image_size, self.config.visual.image_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.transformer.visual.transformer.resblocks

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.transformer.visual(pixel_values)  # no dropout of its own, so no use for keys

    def embed(self, batch: Batch) -> Tensor:
        """The tokens' embeddings (T, C), the images' features at their places."""
        return vlm.splice_images(self.transformer.wte(batch.input_ids), batch, self.encode_images)

    def ntk_alpha(self, lengths: Tensor) -> Tensor:
        """What the rotary base is stretched by for a prompt of that length, fp64."""
        # 1 up to the trained 2,048 tokens, then 3, 7, 15 as the length doubles. A little less than the power:
        # of a logarithm that is not whole for a power of two, on some device, the ceiling would jump; lengths
        # up to 2**31 are told apart. (Not in whole numbers: compiled for a CPU, their sum came out wrong.)
        power = torch.log2(lengths.double() / self.config.seq_length) + (1 - 1e-10)
        return (2.0 ** power.ceil() - 1).clamp(min=1)

    def cache_group(self, length: int) -> float:
        # keys are turned with the base of the prompt that they were made for
        return float(self.ntk_alpha(torch.tensor(length))) if self.config.use_dynamic_ntk else 1.0

    def context(self, batch: Batch) -> Context:
        """Rotary angles and log-n factors. Both extrapolations act in evaluation only, as in the original.

        `rope_lengths` (S,), host, optional: the length that decides a segment's NTK base, if it is not the
        segment's own (while decoding: the prompt's; the cached keys were turned with it).
        """
        c, positions, cu_seqlens = self.config, batch.position_ids, batch.cu_seqlens
        # Made here, not kept as buffers: NTK changes the base from segment to segment.
        # fp32 also in a 16-bit model: 16-bit frequencies turn far tokens by the wrong angle.
        half = torch.arange(0, c.kv_channels, 2, device=positions.device, dtype=torch.float32) / c.kv_channels
        # Training never stretches: its samples end at the trained length.
        if self.training or not c.use_dynamic_ntk:
            inv_freq = 1.0 / c.rotary_emb_base**half
        else:
            lengths = None if batch.single else cu_seqlens.diff()
            alpha = self.ntk_alpha(lengths if batch.rope_lengths is None else batch.rope_lengths)
            # The exponent leaves the fastest channel as it is and stretches the slowest one by all of alpha.
            base = c.rotary_emb_base * alpha ** (c.kv_channels / (c.kv_channels - 2))
            inv_freq = 1.0 / base.to(positions.device, torch.float32)[:, None] ** half  # (S, D/2)
            # (S, D/2) -> (T, D/2): each token has the base of its segment.
            if not batch.single:
                counts = lengths.to(positions.device)
                # the size is known: a device is not asked for it
                inv_freq = inv_freq.repeat_interleave(counts, dim=0, output_size=positions.shape[0])
        # fp32: 16-bit angles lose the position past 256
        angles = positions[:, None].float() * inv_freq  # (T, D/2)
        logn = None
        # log_2048(position + 1), 1 within the trained length. The position is the token's own, so a cached
        # and a whole computation agree.
        if c.use_logn_attn and not self.training:
            logn = (torch.log((positions + 1).float()) / math.log(c.seq_length)).clamp(min=1.0)[:, None, None]
        return Context(cu_seqlens, angles.cos(), angles.sin(), logn, batch.cache)

    def hidden(self, batch: Batch, x: Tensor | None = None, blocks=None) -> Tensor:
        """(T, C) behind the blocks. A pipeline stage gives what it received, `x` (T, C), and its own
        `blocks`."""
        x, ctx = self.embed(batch) if x is None else x, self.context(batch)
        # Qwen has no dropout, an adapter has: its mask is a function of the row's key, wherever the row
        # stands.
        with dropout_rows(batch.dropout_keys):
            for block in self.blocks if blocks is None else blocks:
                x = block(x, ctx)
        return x

    def logits(self, x: Tensor) -> Tensor:
        # The last norm belongs to the head: it is on the last pipeline stage, and sees only the rows that are
        # asked for.
        x = self.transformer.ln_f(x)
        if self.config.tie_word_embeddings:
            return parallel.vocab_logits(product(x, self.transformer.wte.weight))
        return self.lm_head(x)

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss of the supervised tokens and each one's own loss (detached), in stream order."""
        # Only supervised rows reach the norm and the vocabulary: (T, C) -> (rows, C).
        x, targets = self.transformer.ln_f(x[batch.supervised]), batch.targets[batch.supervised]
        if self.config.tie_word_embeddings:
            return parallel.vocab_cross_entropy(x, self.transformer.wte.weight, targets)
        return self.lm_head(x, targets)

    def forward(self, batch: Batch, output: str = "loss", x: Tensor | None = None, blocks=None):
        return vlm.run(self, batch, output, x, blocks)

    def loss_counts(self, batch: Batch) -> list[int]:
        return [batch.num_supervised]

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fills one full-size parameter for training from scratch, as the original initialises it."""
        # By name, since a parameter may arrive as a shard or a slice of itself.
        c = self.config
        if name.endswith("pos_embed"):
            tensor.copy_(sincos_positions(math.isqrt(c.visual.n_queries), c.visual.output_dim))
        elif name.endswith("positional_embedding"):
            # As CLIP draws them: so wide that a sum over the width has variance 1.
            tensor.normal_(0, c.visual.width**-0.5, generator=generator)
        elif name.endswith("visual.proj"):
            tensor.normal_(0, c.visual.output_dim**-0.5, generator=generator)
        elif name.endswith("bias"):
            tensor.zero_()
        elif ".ln_" in name:
            tensor.fill_(1.0)
        elif name.endswith(("conv1.weight", "in_proj_weight")):
            # torch's own defaults of a convolution and of nn.MultiheadAttention, which the original leaves.
            bound = (tensor[0].numel()) ** -0.5 if "conv1" in name else math.sqrt(6 / sum(tensor.shape))
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            # Two branches a block add to the residual stream: their outputs start smaller, so that its
            # variance does not grow with the depth.
            scale = math.sqrt(2 * c.num_hidden_layers) if name.endswith("c_proj.weight") else 1.0
            tensor.normal_(0, c.initializer_range / scale, generator=generator)


def sincos_positions(grid: int, width: int) -> Tensor:
    """(grid*grid, width) fixed 2-D table: first half the column, last
    half the row, each [sines | cosines]."""
    # fp64, then rounded once: the table of a fresh model does not depend on the machine.
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1).float()  # (grid, width/2)
    return torch.cat((line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)), dim=1)


def build_model(config: dict) -> QwenVL:
    """The model for a config.json's contents; create it under `torch.device("meta")` and load the weights
    after."""
    return QwenVL(QwenVLConfig.from_dict(config))


def aliases(config: dict) -> dict[str, str]:
    """Names that files may hold beside, or instead of, the tied one that they say the same as."""
    return {"lm_head.weight": "transformer.wte.weight"} if config.get("tie_word_embeddings") else {}


def untied(config: dict) -> dict:
    """The same with a vocabulary projection of its own."""
    return {**config, "tie_word_embeddings": False}


# How a weight is cut over tensor-parallel ranks: (kind, number of equal blocks packed along the cut
# dimension)
TP_PLAN = {
    "transformer.wte": ("vocab", 1),
    # Packed [q | k | v]: each third is cut by itself, so that a rank has the same heads of all three.
    "transformer.h.*.attn.c_attn": ("column", 3),
    "transformer.h.*.attn.c_proj": ("row", 1),
    "transformer.h.*.mlp.w1": ("column", 1),
    "transformer.h.*.mlp.w2": ("column", 1),
    "transformer.h.*.mlp.c_proj": ("row", 1),
    # One block: its rows are grouped by head already, and a rank takes whole heads.
    "transformer.visual.transformer.resblocks.*.attn.in_proj": (
        "column",
        1,
    ),  # grouped by head: they stay whole
    "transformer.visual.transformer.resblocks.*.attn.out_proj": ("row", 1),
    "transformer.visual.transformer.resblocks.*.mlp.c_fc": ("column", 1),
    "transformer.visual.transformer.resblocks.*.mlp.c_proj": ("row", 1),
    "transformer.visual.attn_pool.attn": ("column", 3),  # its in_proj_weight and in_proj_bias
    "transformer.visual.attn_pool.attn.out_proj": ("row", 1),
    "lm_head": ("vocab", 1),
}


def tp_plan(config: QwenVLConfig, degree: int) -> dict[str, tuple[str, int]]:
    """TP_PLAN for a degree, ValueError where it does not fit. A resampler with too few heads stays whole."""
    # A cut must leave whole heads and equal shares on every rank.
    v = config.visual
    parallel.check_degree(
        degree,
        {
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size / 2": config.mlp_width,
            "vocab_size": config.vocab_size,
            "visual.heads": v.heads,
            "visual's MLP width": int(v.width * v.mlp_ratio),
        },
    )
    # The resampler has E / 128 heads, fewer than the language model.
    whole = v.output_dim // 128 % degree != 0
    return {name: cut for name, cut in TP_PLAN.items() if not (whole and ".attn_pool." in name)}


def forward_flops(
    config: QwenVLConfig, tokens: int, supervised: int, images: int, segment_length: float
) -> dict[str, float]:
    """FLOPs of one forward pass by part (a multiply-add counts two): tokens in the stream, supervised tokens,
    images.
    """
    c, v = config, config.visual
    # Matrix products alone: norms, softmax and rotary are small beside them.
    C, W, E = c.hidden_size, v.width, v.output_dim
    P, Q = (v.image_size // v.patch_size) ** 2, v.n_queries
    # c_attn and c_proj: 4 C^2; w1, w2 and c_proj of the MLP: 3 C * inner. A multiply-add is two.
    block = 2 * (4 * C * C + 3 * C * c.intermediate_size // 2)
    visual_block = 2 * (4 * W * W + 2 * W * int(W * v.mlp_ratio)) * P + 4 * P * P * W
    resampler = 2 * (W * E * P + 2 * E * E * P + 2 * E * E * Q) + 4 * P * Q * E + 2 * E * E * Q
    return {
        # A causal token sees half of its segment on average: scores and values, 4 C for each key.
        "language model": tokens * c.num_hidden_layers * (block + 4 * C * segment_length / 2),
        "head": 2.0 * supervised * C * c.vocab_size,
        "vision": images * (v.layers * visual_block + 2 * 3 * v.patch_size**2 * W * P),
        "resampler": images * float(resampler),
    }


# --------------------------------------------------------------------------------------------------
# Images, prompt format, label mask

# CLIP's means and deviations of the three channels.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
SYSTEM = "You are a helpful assistant."


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: alpha dropped, aspect ratio not kept, PIL's antialiased bicubic rounded to 8
    bits."""
    # The rounding matters: the original resizes 8-bit images; a resize of floats is off by up to 0.45 after
    # the normalisation.
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def preprocess_image(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) fp32, normalised."""
    # In fp32 from the 8-bit pixels on, as torchvision does it.
    pixels = resize_image(image, size).astype(np.float32) / np.float32(255)
    # (H, W, 3) -> (3, H, W), the convolution's order.
    return torch.from_numpy(np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)))


def chat_ids(
    tokenizer: QwenTokenizer, turns: list[tuple[str, str]], system: str = SYSTEM, strict_paths: bool = True
) -> tuple[list[int], list[int]]:
    """Ids and UNSHIFTED labels of a conversation in ChatML, as the official finetune.py makes them.

    Every block supervises its markers and the newline after it; an assistant's block its content too. Role,
    newline and content are encoded separately. A first message that is not the user's is dropped.
    """
    tk, ids, labels = tokenizer, [], []
    # The official script does so: a chat begins with a question.
    if turns and turns[0][0] != "user":
        turns = turns[1:]
    for role, text in [("system", system), *turns]:
        # Encoded apart: a merge across the border would give other ids than the official ones.
        header = tk.encode(role) + tk.newline
        content = tk.encode(text, strict_paths=strict_paths)
        ids += [tk.im_start, *header, *content, tk.im_end, *tk.newline]
        # What the official script learns: the assistant's words and, of every block, its markers. Nobody's
        # role name is learned.
        learned = content if role == "assistant" else [IGNORE_INDEX] * len(content)
        labels += [tk.im_start, *[IGNORE_INDEX] * len(header), *learned, tk.im_end, *tk.newline]
    return ids, labels


def chat_prompt(
    tokenizer: QwenTokenizer,
    query: str,
    history: list[tuple[str, str | None]] = (),
    system: str = SYSTEM,
    max_window_size: int = 6144,
    strict_paths: bool = True,
) -> list[int]:
    """Ids of a chat up to the assistant's header. In user and assistant text only the vision tags are
    special, so a typed `<|im_end|>` is plain text. Past (question, answer) pairs are kept newest first while
    they fit in max_window_size tokens; an answer may be None."""
    tk = tokenizer

    def block(role: str, text: str) -> list[int]:
        # A typed marker must not end the user's turn: it stays text. Only images, boxes and references are
        # parsed.
        content = tk.encode(text, special="vision", strict_paths=strict_paths)
        return [tk.im_start, *tk.encode(role), *tk.newline, *content, tk.im_end]

    head, kept = block("system", system), []
    for question, answer in reversed(history):
        turn = tk.newline + block("user", question)
        turn += tk.newline + block("assistant", answer) if answer is not None else []
        # The newest turns are worth most: older ones go first, a turn as a whole.
        if len(head) + len(turn) + len(kept) >= max_window_size:
            break
        kept = turn + kept
    return [
        *head,
        *kept,
        *tk.newline,
        *block("user", query),
        *tk.newline,
        tk.im_start,
        *tk.encode("assistant"),
        *tk.newline,
    ]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


class QwenVLProcessor:
    """Conversations and images -> what the model takes. `stage` "pretrain" uses the base model's raw
    captioning format."""

    def __init__(self, config: QwenVLConfig, tokenizer: QwenTokenizer, stage: str = "sft"):
        expected = tokenizer.img_start
        # A tokenizer of another Qwen has other ids behind the same words: the model would see another text.
        if config.visual.image_start_id != expected or tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer and config.json do not belong together: <img> is token {expected}, "
                f"visual.image_start_id is {config.visual.image_start_id}; the tokenizer has "
                f"{tokenizer.vocab_size} tokens, vocab_size is {config.vocab_size}"
            )
        self.config, self.tokenizer, self.stage = config, tokenizer, stage
        self.image_size, self.num_image_tokens = config.visual.image_size, config.visual.n_queries
        # Chat ends at <|im_end|>; a model that begins the next turn instead has ended too.
        self.stop_words = [[tokenizer.im_end], [tokenizer.im_start], [tokenizer.eos]]
        self.eos = tokenizer.eos
        self.blank_ids, self.token_bytes = (0,), tokenizer.token_bytes

    def fingerprint(self) -> str:
        """Changes whenever the same conversation could get other ids."""
        vocabulary = hashlib.sha256(self.tokenizer.bpe.to_str().encode()).hexdigest()
        # 3: raised by hand when encode() changes, so that cached indices are made anew.
        return f"qwen_vl-3-{self.stage}-{self.num_image_tokens}-{vocabulary}"

    def load_image(self, source: str | Path) -> Tensor:
        """(3, H, W) fp32 of a file or data URL. ValueError naming it for anything that is no whole image."""
        return preprocess_image(open_image(source), self.image_size)

    def texts(self, conversation) -> list[tuple[str, str]]:
        """The turns as text with an `<img>` tag where an image's slots go, and this model's wording around
        images, captions and questions. What the author of a file in Qwen-VL's own format wrote around a tag
        stays."""
        # Images are counted through the whole chat: the second turn's first may be Picture 2.
        turns, count = [], 0
        for role, content in conversation.turns:
            text, in_front = "", False  # in_front: an image's own line ended just now
            for part in content:
                if isinstance(part, str):
                    text += part.removeprefix("\n") if in_front else part
                    in_front = False
                    continue
                count += 1
                # Its own words win, or a text that ends in them would say "Picture 1: Picture 1: ".
                worded = part.wording is not None or text and re.search(r"Picture \d+: ?$", text)
                before, after = part.wording or ("", "")
                if not worded and self.stage != "pretrain":
                    before, after = f"Picture {count}: ", "\n"
                text += f"{before}<img></img>{after}"
                in_front = not worded
            turns.append((role, text))
        if conversation.kind == "chat":
            return turns
        question = text_of(conversation.turns[0][1])
        # The captioning prompt of pre-training, in the language of the caption.
        if conversation.kind == "caption" and not question:
            chinese = is_chinese(text_of(conversation.turns[1][1]))
            turns[0] = (
                "user",
                turns[0][1] + ("用中文描述这张图片：" if chinese else "Describe the image in English:"),
            )
        elif conversation.kind == "vqa" and self.stage == "pretrain":
            turns[0] = ("user", turns[0][1] + " Answer:")
        return turns

    def raw_ids(self, role: str, text: str) -> list[int]:
        """A turn of the base model's: text without markers; an answer ends in <|endoftext|>, at which that
        model has learned to stop."""
        ids = self.tokenizer.encode(text + "\n" if role == "system" else text)
        return [*ids, self.eos] if role == "assistant" else ids

    def encode(self, conversation, max_length: int) -> dict:
        """One training sample: ids, unshifted labels, slots. An image's span is never cut; text is cut from
        the end.

        Deviations from finetune.py: the slots of an image in an assistant's turn are not supervised, and a
        literal `<|endoftext|>` in the data is attended to.
        """
        tk = self.tokenizer
        turns = self.texts(conversation)
        if self.stage == "pretrain":
            ids, labels = [], []
            for role, text in turns:
                piece = self.raw_ids(role, text)
                ids += piece
                labels += piece if role == "assistant" else [IGNORE_INDEX] * len(piece)
        else:
            # The system block is there also when nobody wrote one: the chat models were trained with one.
            system = [text for role, text in turns if role == "system"]
            turns = [turn for turn in turns if turn[0] != "system"]
            ids, labels = chat_ids(tk, turns, system[0] if system else SYSTEM)
        ids, labels = np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)
        # An image takes the places behind <img>; what stands there is replaced by its features.
        starts, images = ((ids == tk.img_start).nonzero()[0] + 1).tolist(), conversation.images
        if len(starts) != len(images):
            raise ValueError(f"{len(images)} images, but the text has {len(starts)} tags <img>")
        # Text is cut from the end; what is left must still be whole.
        length = min(len(ids), max_length)
        for start in starts:
            # A cut inside an image would leave places without features: it goes as a whole.
            if start - 1 < length < start + self.num_image_tokens + 1:
                length = start - 1
        starts = [start for start in starts if start < length]
        for start in starts:
            # Features cannot be predicted.
            labels[start : start + self.num_image_tokens] = IGNORE_INDEX
        # The markers of every block are learned, so a sample with its answer cut off would still have
        # targets: of nothing that was asked.
        if length < len(ids) and not {*labels[:length].tolist()} - {
            IGNORE_INDEX,
            tk.im_start,
            tk.im_end,
            *tk.newline,
        }:
            labels[:] = IGNORE_INDEX  # only markers are left of the answers: nothing to learn
        return {
            "input_ids": ids[:length],
            "labels": labels[:length],
            "image_starts": starts,
            "images": images[: len(starts)],
            "truncated": length < len(ids),
        }

    def prompt(self, conversation) -> dict:
        """The ids that generation starts from; a trailing answer is left out."""
        tk, turns = self.tokenizer, self.texts(conversation)
        # A record of training may be asked as it is.
        while turns and turns[-1][0] == "assistant":
            turns = turns[:-1]
        system = next((text for role, text in turns if role == "system"), None)
        turns = [turn for turn in turns if turn[0] != "system"]
        if not turns:
            raise ValueError(f"{conversation.where}: no user turn to answer")
        if self.stage == "pretrain":
            turns = [("system", system)] * bool(system) + turns
            ids = [token for turn in turns for token in self.raw_ids(*turn)]
            if conversation.kind == "grounding":  # as Qwen's own evaluation asks: the box is begun
                ids += tk.encode("<box>")
        else:
            # chat_prompt takes pairs; turns alternate (records.py has seen to it), so each question has its
            # answer.
            history = [(q[1], a[1]) for q, a in zip(turns[:-1:2], turns[1:-1:2], strict=True)]
            ids = chat_prompt(tk, turns[-1][1], history, SYSTEM if system is None else system)
        starts = [i + 1 for i, token in enumerate(ids) if token == tk.img_start]
        # the window may have dropped old turns
        images = conversation.images[len(conversation.images) - len(starts) :]
        return {
            "input_ids": np.array(ids, dtype=np.int32),
            "labels": np.full(len(ids), IGNORE_INDEX, dtype=np.int32),
            "image_starts": starts,
            "images": images,
            "truncated": False,
        }

    def template(self) -> dict:
        """How a question about images is worded, for run_static.py, which has the tokenizer alone."""
        tk = self.tokenizer
        system = [tk.im_start, *tk.encode("system"), *tk.newline, *tk.encode(SYSTEM), tk.im_end]
        return {
            "images": [0, None],
            "start": [*system, *tk.newline, tk.im_start, *tk.encode("user"), *tk.newline],
            "image_text": "Picture {number}: ",
            "image": [tk.img_start, *[tk.img_pad] * self.num_image_tokens, tk.img_end],
            "first_place": 1,
            "gap": "\n",
            "text": "{prompt}",
            "end": [tk.im_end, *tk.newline, tk.im_start, *tk.encode("assistant"), *tk.newline],
            "reserved": list(tk.special),
            "skip_special": False,  # in the answer's text
            "cleanup": [],
        }

    def asked(self, conversation) -> str:
        """The first question as a text to put behind the images."""
        # Without tags: generate.py puts the images in front by itself.
        first = next(text for role, text in self.texts(conversation) if role == "user")
        return re.sub(r"(Picture \d+: ?)?<img></img>\n?", "", first)

    def answer_ids(self, text: str) -> list[int]:
        """Ids of the beginning of an answer, behind the prompt, that generation goes on from."""
        return self.tokenizer.encode(text, special="vision")

    def decode(self, ids: list[int]) -> str:
        """The reply: cut at the first end marker, special text such as boxes kept."""
        ends = {self.tokenizer.im_start, self.tokenizer.im_end, self.eos}
        # The end marker is part of what was generated, not of the answer.
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return self.tokenizer.decode(ids[:stop]).strip()


def probe_batch(processor: QwenVLProcessor) -> Batch:
    """A fixed prompt with one synthetic image, to compare two models' logits."""
    tk, Q, size = processor.tokenizer, processor.num_image_tokens, processor.image_size
    ids = torch.tensor(chat_prompt(tk, "Picture 1: <img>a</img>\nWhat is this? 这是什么？"))
    # Three ramps, so that no channel, row or column can be taken for another.
    ramp = torch.linspace(-1, 1, size)
    image = torch.stack((ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], ramp[:, None] * ramp))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        pixel_values=image[None],
        image_positions=(ids == tk.img_start).nonzero() + 1 + torch.arange(Q),
    )


def load_processor(directory: str | Path, stage: str = "sft") -> QwenVLProcessor:
    """The processor of a checkpoint directory (config.json and tokenizer)."""
    config = QwenVLConfig.from_dict(checkpoint.read_config(directory))
    checkpoint.check_side_files(directory, config.visual.image_size, config.visual.image_size)
    return QwenVLProcessor(config, QwenTokenizer(directory, config.visual.n_queries), stage)


MODEL = vlm.Model(
    build_model=build_model,
    load_processor=load_processor,
    probe_batch=probe_batch,
    forward_flops=forward_flops,
    parts={
        "resampler": "transformer.visual.attn_pool.*",
        "vision": "transformer.visual.*",
        "embedding": "transformer.wte.*",
        "language model": "transformer.*",
        "head": "lm_head.*",
    },
    image_parameters=["transformer.visual.*"],
    vision_stem=[f"transformer.visual.{n}" for n in ("conv1.*", "positional_embedding", "ln_pre.*")],
    stages=("sft", "pretrain"),
    pretrain_freeze={"pretrain": ["transformer.wte.*", "transformer.h.*", "transformer.ln_f.*", "lm_head.*"]},
    # The official targets. By name they exist in the language model only: the vision tower's linears are
    # in_proj, out_proj, c_fc.
    lora_targets=[r".*\.attn\.c_attn", r".*\.attn\.c_proj", r".*\.mlp\.w1", r".*\.mlp\.w2"],
    tp_plan=tp_plan,
    pipeline={
        "blocks": "transformer.h",
        "first": ["transformer.wte.*", "transformer.visual.*"],
        "last": ["transformer.ln_f.*", "lm_head.*"],
    },
    aliases=aliases,
    untied=untied,
)
