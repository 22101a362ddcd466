"""BLIP-2 (arXiv:2301.12597): EVA ViT-g, Q-Former, OPT or Flan-T5, and everything about its data format.

    python train.py --model blip2 --lora
    python generate.py --model_name_or_path blip2-opt-2.7b --image a.png --prompt "a photo of"

`Blip2` reads an image and writes text. Its language models are in blip2_language.py; the model of stage 1 and
of retrieval, built from the same tower and Q-Former, is in blip2_stage1.py; convert/lavis.py reads and writes
LAVIS's files. Text has no batch dimension: a micro-batch is one stream of T tokens, cut into segments
(samples) by `cu_seqlens`. Parameter names are those of the published Hugging Face checkpoints. Numerics
follow LAVIS (2023) and transformers; where this file differs on purpose, it says so. Dropout acts on hidden
states only (the originals drop attention probabilities too) and is a pure function of the sample, so that no
layout changes it.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import parallel
import schema
import vlm
from blip2_language import OPT, T5, TEXT_CONFIGS, Blip2Tokenizer, OPTConfig, T5Config
from images import open_image
from kernels.attention import attention
from kernels.dropout import Dropout, dropout_rows, keys_of_rows, name_dropouts
from kernels.linear_cross_entropy import IGNORE_INDEX
from records import front_image, refuse_boxes, says_something, text_of
from schema import Depth, Epsilon, Pixels, Scale, Share, Size, TokenId, demand
from terminal import cut
from vlm import Batch, even_segments

# --------------------------------------------------------------------------------------------------
# Configuration: the fields of the published config.json that change what is computed, with its defaults


@dataclass
class VisionConfig:
    hidden_size: Size = 1408
    intermediate_size: Size = 6144
    num_hidden_layers: Depth = 39
    num_attention_heads: Size = 16
    image_size: Pixels = 224
    patch_size: Pixels = 14
    layer_norm_eps: Epsilon = 1e-6
    # LAVIS normalises the features with 1e-5, the published Hugging Face models with the blocks' eps; ours
    # alone has the key
    post_layernorm_eps: Epsilon | None = None


@dataclass
class QFormerConfig:
    # BERT-base's numbers, which all published files have; of text only where stage 1 is.
    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_dropout_prob: Share = 0.1
    max_position_embeddings: Size = 512
    # BERT's: with another epsilon every feature moves.
    layer_norm_eps: Epsilon = 1e-12
    cross_attention_frequency: Size = 2
    encoder_hidden_size: Size = 1408
    use_qformer_text_input: bool = False


@dataclass
class Blip2Config:
    vision: VisionConfig
    qformer: QFormerConfig
    # Two kinds of language model behind one stream: blip2_language.py.
    text: OPTConfig | T5Config
    num_query_tokens: Size = 32
    image_text_hidden_size: Size = 256
    image_token_index: TokenId | None = None  # null in older files
    initializer_range: Scale = 0.02
    # temperature and language-modelling head of stage 1; published retrieval models lack them
    stage1_heads: bool = False
    raw: dict = field(default_factory=dict)  # config.json as it was read, written back with the weights

    @classmethod
    def from_dict(cls, raw: dict) -> "Blip2Config":
        """Raises ValueError for a shape that the architecture cannot have."""
        # Three objects in one file, all somebody else's: checked before a layer is made of their numbers.
        parts = {part: raw.get(f"{part}_config") for part in ("vision", "qformer", "text")}
        for part, values in parts.items():
            schema.check(values, dict, f"config.json: {part}_config")
        kind = parts["text"].get("model_type")
        schema.check(kind, Literal["opt", "t5"], "config.json: text_config.model_type")
        classes = {"vision": VisionConfig, "qformer": QFormerConfig, "text": TEXT_CONFIGS[kind]}
        read = {p: schema.from_json(classes[p], parts[p], f"config.json: {p}_config") for p in parts}
        config = schema.from_json(cls, raw, "config.json", **read, raw=raw)
        v, q, text = config.vision, config.qformer, config.text
        # keys that would change what is computed have one value here
        only = {
            "vision": {"hidden_act": "gelu", "qkv_bias": True, "attention_dropout": 0},
            "qformer": {"hidden_act": "gelu", "position_embedding_type": "absolute"},
            "text": text.only_values(),
        }
        schema.require(raw, "config.json", use_decoder_only_language_model=not config.is_t5)
        for part, values in only.items():
            schema.require(parts[part], f"config.json: {part}_config", **values)
        heads = "num_attention_heads must divide hidden_size"
        demand(v.hidden_size % v.num_attention_heads == 0, f"vision_config: {heads}")
        demand(q.hidden_size % q.num_attention_heads == 0, f"qformer_config: {heads}")
        demand(config.is_t5 or text.hidden_size % text.num_attention_heads == 0, f"text_config: {heads}")
        size = f"patch_size={v.patch_size} does not divide image_size={v.image_size}"
        demand(v.image_size % v.patch_size == 0, size)
        wide = f"qformer_config.encoder_hidden_size={q.encoder_hidden_size} must be the vision tower's "
        demand(q.encoder_hidden_size == v.hidden_size, f"{wide}{v.hidden_size}")
        index = f"image_token_index={config.image_token_index} must be below text_config.vocab_size="
        demand((config.image_token_index or 0) < text.vocab_size, f"{index}{text.vocab_size}")
        if config.is_t5:
            # As transformers reads a file without it.
            text.num_decoder_layers = text.num_decoder_layers or text.num_layers
            # transformers 5 saves tie_word_embeddings true for every T5, and what it means in the other key
            tied = parts["text"].get("tie_word_embeddings", False)
            own = "text_config.tie_word_embeddings must be false: Flan-T5 has its own lm_head"
            demand(not parts["text"].get("scale_decoder_outputs", tied), own)
        return config

    @property
    def is_t5(self) -> bool:
        return isinstance(self.text, T5Config)

    # what train.py asks of every model's config
    @property
    def max_positions(self) -> int | None:
        """Tokens of a sequence, an image's slots included, that have a learned position; None: no table that
        ends."""
        if self.qformer.use_qformer_text_input:  # text counts from the end of the slots
            return self.num_query_tokens + self.qformer.max_position_embeddings
        return None if self.is_t5 else self.text.max_position_embeddings

    @property
    def hidden_size(self) -> int:
        return self.text.d_model if self.is_t5 else self.text.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def num_hidden_layers(self) -> int:
        return (
            self.text.num_layers + self.text.num_decoder_layers if self.is_t5 else self.text.num_hidden_layers
        )

    @property
    def mlp_width(self) -> int:
        return self.text.d_ff if self.is_t5 else self.text.ffn_dim


# --------------------------------------------------------------------------------------------------
# Vision: images are a plain batch; inside, their patches are one stream of N*P rows


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A position table (1, 1 + G*G, C) for another grid: the class row kept, the rest bicubic in fp32, no
    antialiasing."""
    # Row 0 is the class token's: it has no place in the grid.
    G = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (G, G):
        return table
    # fp32: bicubic weights in 16 bits move every position a little.
    grid = table[:, 1:].float().unflatten(1, (G, G)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    # (1, C, rows, columns) -> (1, rows * columns, C), the class row in front again.
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, C))
        # The class token has a position of its own, row 0: 257 for 224 pixels.
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + (config.image_size // P) ** 2, C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, rows, columns)
        # 224 pixels in pre-training, 364 in fine-tuning: the table is stretched to the image.
        positions = resize_positions(self.position_embedding, *x.shape[2:])
        # (N, C, rows, columns) -> (N, rows * columns, C), in reading order.
        x = x.flatten(2).transpose(1, 2)
        # (N, P, C), P = 1 + patches.
        return torch.cat((self.class_embedding.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1) + positions


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.hidden_size
        self.head_dim = C // config.num_attention_heads
        # LAVIS has no bias for k: here its third starts at 0, and does not change a softmax
        self.qkv = nn.Linear(C, 3 * C)
        self.projection = nn.Linear(C, C)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.qkv)
        # [all q | all k | all v], each head-major.
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # 3 x (N*P, H, D)
        # No mask: every patch sees its whole image; cu_seqlens keeps images apart.
        return self.projection(attention(q, k, v, cu_seqlens, cu_seqlens, causal=False).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # The exact erf GELU.
        return self.fc2(F.gelu(self.fc1(parallel.copy_to_tp(x, self.fc1))))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        # Pre-norm, no scales on the branches, no drop path: 0 in every published config.
        x = x + self.self_attn(self.layer_norm1(x), cu_seqlens)
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """EVA-CLIP-g without its last block. Only post_layernorm (LAVIS: ln_vision) is always trained."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        # LAVIS has 1e-5 here, Hugging Face the blocks' 1e-6: files of both exist, so it is a key.
        eps = config.layer_norm_eps if config.post_layernorm_eps is None else config.post_layernorm_eps
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, C), class token first."""
        x = self.embeddings(pixel_values)
        N, P, _ = x.shape
        # An image is a segment: (N, P, C) -> (N*P, C), no batch dimension.
        x, cu_seqlens = x.flatten(0, 1), even_segments(N, P)
        for block in self.encoder.layers:
            x = block(x, cu_seqlens)
        # (N*P, C) -> (N, P, C): the Q-Former looks at all rows of its image, the class token too.
        return self.post_layernorm(x).unflatten(0, (N, P))


# --------------------------------------------------------------------------------------------------
# Q-Former: a stream whose segments hold queries, or text, or queries and then text


@dataclass
class QFormerContext:
    """What every layer of one pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    query_rows: Tensor | None  # (N*Q,) rows of the stream that hold queries, image by image; None: all text
    text_rows: Tensor | None  # the other rows; None: all queries
    image: Tensor | None  # (N, P, W): image n is seen by queries n*Q .. n*Q+Q-1
    # language modelling: text is causal, and sees this many queries before it
    prefix_lens: Tensor | None = None
    keys: Tensor | None = None  # (R,) dropout keys of the rows
    image_keys: Tensor | None = None  # (N,) of the images
    cache: object | None = None  # engine.KVCache

    def __post_init__(self):
        # Once a pass instead of once a layer.
        both = self.query_rows is not None and self.text_rows is not None
        # Queries and text are computed apart; this brings their rows back into the stream's order.
        self.order = torch.cat((self.query_rows, self.text_rows)).argsort() if both else None
        self.query_keys, self.text_keys = (
            self.keys if self.keys is None or rows is None else self.keys[rows]
            for rows in (self.query_rows, self.text_rows)
        )


class QFormerOutput(nn.Module):
    """Projection, dropout, residual, post-norm."""

    def __init__(self, config: QFormerConfig, inner: int):
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor, keys: Tensor | None) -> Tensor:
        with dropout_rows(keys):
            x = self.dense(x)
        # Post-norm, as BERT: the sum is normalised, and nothing bypasses it.
        return self.LayerNorm(self.dropout(x, keys) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, config: QFormerConfig, layer: int, kv_size: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.head_dim = layer, C // config.num_attention_heads
        # The published names, attention.attention.query among them, are BERT's.
        self.attention = nn.Module()
        self.attention.query = nn.Linear(C, C)
        self.attention.key = nn.Linear(kv_size, C)
        self.attention.value = nn.Linear(kv_size, C)
        self.output = QFormerOutput(config, C)

    def forward(self, x: Tensor, ctx: QFormerContext, image: Tensor | None = None) -> Tensor:
        """Self-attention of the stream, or with an image (N, P, W)
        cross-attention of the queries (N*Q, C)."""
        a = self.attention
        y = parallel.copy_to_tp(x, a.query)
        # Keys and values: the stream itself, or the patches of the images.
        kv = y if image is None else parallel.copy_to_tp(image.flatten(0, 1), a.key)
        # Whose dropout keys the adapters see: rows of the stream, or the queries alone.
        rows = ctx.keys if image is None else ctx.query_keys
        with dropout_rows(rows):
            q = a.query(y).unflatten(-1, (-1, self.head_dim))
        with dropout_rows(rows) if image is None else dropout_rows(ctx.image_keys, image.shape[0]):
            k, v = (layer(kv).unflatten(-1, (-1, self.head_dim)) for layer in (a.key, a.value))
        if image is not None:
            N, P, _ = image.shape
            # Image n's queries are segment n, its patches too: (N*Q, H, D) against (N*P, H, D).
            Q = x.shape[0] // N
            o = attention(q, k, v, even_segments(N, Q), even_segments(N, P), causal=False)
        elif ctx.cache is not None:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens, prefix_lens=ctx.prefix_lens)
        else:
            # Contrast and matching see both ways; captioning is causal behind the queries.
            causal = ctx.prefix_lens is not None
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal, prefix_lens=ctx.prefix_lens)
        # (R, H, D) -> (R, C), then residual and norm.
        return self.output(o.flatten(1), x, rows)


class QFormerIntermediate(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        with dropout_rows(keys):
            # The exact erf GELU, BERT's.
            return F.gelu(self.dense(parallel.copy_to_tp(x, self.dense)))


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, layer: int):
        super().__init__()
        self.attention = QFormerAttention(config, layer, config.hidden_size)
        self.crossattention = None
        # Every second layer looks at the image.
        if layer % config.cross_attention_frequency == 0:
            self.crossattention = QFormerAttention(config, layer, config.encoder_hidden_size)
        # Queries and text share attention and have an MLP each: stage 2 keeps the queries' alone.
        self.intermediate_query = QFormerIntermediate(config)
        self.output_query = QFormerOutput(config, config.intermediate_size)
        if config.use_qformer_text_input:
            self.intermediate = QFormerIntermediate(config)
            self.output = QFormerOutput(config, config.intermediate_size)

    def forward(self, x: Tensor, ctx: QFormerContext) -> Tensor:
        """(R, C) -> (R, C). Queries see the image and have an MLP of their own; text never does."""
        # Queries and text together; the context's mask says who sees whom.
        x = self.attention(x, ctx)
        parts = []
        if ctx.query_rows is not None:
            q = x if ctx.text_rows is None else x[ctx.query_rows]
            if self.crossattention is not None:
                q = self.crossattention(q, ctx, ctx.image)
            parts.append(self.output_query(self.intermediate_query(q, ctx.query_keys), q, ctx.query_keys))
        if ctx.text_rows is not None:
            t = x if ctx.query_rows is None else x[ctx.text_rows]
            parts.append(self.output(self.intermediate(t, ctx.text_keys), t, ctx.text_keys))
        return parts[0] if ctx.order is None else torch.cat(parts)[ctx.order]


class QFormer(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(QFormerLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(self, x: Tensor, ctx: QFormerContext) -> Tensor:
        """Embedded queries and text (R, C) -> (R, C)."""
        # Queries too: LAVIS normalises them with the text, before the first layer.
        x = self.dropout(self.layernorm(x), ctx.keys)
        for layer in self.encoder.layer:
            x = layer(x, ctx)
        return x


def spread_keys(keys: Tensor | None, count: int, salt: int = 0) -> Tensor | None:
    """One key per image (N,) -> one per row (N*count,)."""
    if keys is None:
        return None
    return keys_of_rows(keys, count, salt)


def encode_queries(model: nn.Module, image: Tensor, keys: Tensor | None = None) -> Tensor:
    """Image features (N, P, W) -> query outputs (N, Q, C); `keys` (N,) for dropout."""
    N, Q = image.shape[0], model.query_tokens.shape[1]
    # Queries alone: every row is one, image by image.
    rows = torch.arange(N * Q, device=image.device)
    ctx = QFormerContext(even_segments(N, Q), rows, None, image, keys=spread_keys(keys, Q), image_keys=keys)
    return model.qformer(model.query_tokens.expand(N, -1, -1).flatten(0, 1), ctx).unflatten(0, (N, Q))


# --------------------------------------------------------------------------------------------------
# Image -> text: stage 2, fine-tuning, captioning, questions


class Blip2(nn.Module):
    LOSSES = ("loss",)
    # What the contract (vlm.Network) asks for.
    position_step, position_axes, prefix_rows = 1, 1, 0

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        # In the order of the data: image -> tower -> queries -> language model's width -> language model.
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer.hidden_size))
        self.vision_model = VisionModel(config.vision)
        self.qformer = QFormer(config.qformer)
        # The one new matrix of stage 2: 768 -> the language model's width.
        self.language_projection = nn.Linear(config.qformer.hidden_size, config.hidden_size)
        self.language_model = T5(config.text) if config.is_t5 else OPT(config.text)
        # Each Dropout gets a seed from its place: masks differ between layers, not between layouts.
        name_dropouts(self)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_query_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.vision.image_size, self.config.vision.image_size

    def loss_counts(self, batch: Batch) -> list[int]:
        # One loss, a sum over the supervised tokens.
        return [batch.num_supervised]

    @property
    def encoder_decoder(self) -> bool:
        return self.config.is_t5

    @property
    def prefill(self) -> str:
        # An encoder takes the prompt whole; OPT is causal throughout, the image's places included.
        return "alone" if self.config.is_t5 else "chunks"

    def cache_group(self, length: int) -> int:
        # Nothing depends on the prompt's length: all cached keys may be shared.
        return 0

    @property
    def pipeline_obstacle(self) -> str | None:
        return "Flan-T5's decoder needs the encoder's output in every block" if self.config.is_t5 else None

    @property
    def blocks(self):
        return self.language_model.blocks

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) -> (N, Q, C of the language model); `keys` (N,) for dropout."""
        # An image's dropout is a function of its own key, wherever its sample stands.
        with dropout_rows(keys, pixel_values.shape[0]):
            return self.language_projection(encode_queries(self, self.vision_model(pixel_values), keys))

    def embed(self, batch: Batch) -> Tensor:
        """The stream's embeddings (T, C), at the images' places their features; with learned positions."""
        # Positions come behind the splice: OPT's are added to image features too, T5's stand in its
        # attention.
        x = self.language_model.embed(batch.input_ids)
        return self.language_model.add_positions(vlm.splice_images(x, batch, self.encode_images), batch)

    def hidden(self, batch: Batch, x: Tensor | None = None, blocks=None) -> Tensor:
        """(T, C) behind the blocks. A pipeline stage gives what it received, `x` (T, C), and its own
        `blocks`."""
        # Without keys no dropout is drawn, also while the module is in training mode.
        x, keys = self.embed(batch) if x is None else x, batch.dropout_keys if self.training else None
        return self.language_model.hidden(x, batch, keys, blocks)

    def logits(self, x: Tensor) -> Tensor:
        # The head is the embedding's matrix in OPT, a tensor of its own in T5.
        return parallel.vocab_logits(self.language_model.logits(x))

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss of the supervised tokens and each one's own loss (detached), in stream order."""
        # Only supervised rows reach the norm and the vocabulary: (T, C) -> (R, C).
        x = self.language_model.norm(x[self.language_model.supervised_rows(batch)])
        targets = batch.targets[batch.supervised]
        return parallel.vocab_cross_entropy(x, self.language_model.head_weight, targets)

    def forward(self, batch: Batch, output: str = "loss", x: Tensor | None = None, blocks=None):
        # Where T5's result lies is not where the stream's segments end: it has the decoder's rows alone.
        return vlm.run(self, batch, output, x, blocks, self.language_model.last_rows(batch))

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        init_weights(self.config, name, tensor, generator)


def init_weights(config: Blip2Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fills one full-size parameter for training from scratch: N(0, 0.02), T5 by fan-in."""
    # By name and shape, since a parameter may arrive as a shard of itself.
    std = 0.02
    if config.is_t5 and name.startswith("language_model.") and tensor.ndim == 2:
        t = config.text
        # T5 does not scale its scores: q starts smaller by the heads' width instead.
        fan_in = {"shared": 1, "q": t.d_model * t.d_kv, "o": t.num_heads * t.d_kv, "wo": t.d_ff}
        # the original draws lm_head from N(0, 1), which begins at a loss of hundreds
        std = fan_in.get(name.split(".")[-2], t.d_model) ** -0.5
    if name == "temp":
        # The divisor itself, as LAVIS has it, neither its logarithm nor its inverse.
        tensor.fill_(0.07)
    elif name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim == 1:  # norms
        tensor.fill_(1.0)
    else:
        tensor.normal_(0, std, generator=generator)


def build_model(config: dict) -> nn.Module:
    """Blip2, or Blip2Qformer for a Q-Former that takes text: stage 1 and retrieval."""
    # One config.json format for both kinds of model: the Q-Former's key tells them apart.
    config = Blip2Config.from_dict(config)
    if config.qformer.use_qformer_text_input:
        from blip2_stage1 import Blip2Qformer  # here, since it is built from this file's parts

        return Blip2Qformer(config)
    return Blip2(config)


def retrieval_stage(config: dict) -> str | None:
    return "pretrain1" if Blip2Config.from_dict(config).qformer.use_qformer_text_input else None


def check_dtype(config: dict, dtype: torch.dtype) -> None:
    """ValueError for a number format that the model's activations leave."""
    kind = config["text_config"]["model_type"]
    # Its feed-forward products leave fp16's range: LAVIS runs it in bf16.
    if kind == "t5" and dtype == torch.float16:
        raise ValueError("Flan-T5 overflows in fp16 (float16): use bf16 (bfloat16) or fp32 (float32)")


def aliases(config: dict) -> dict[str, str]:
    """Names that files may hold beside, or instead of, the tied one that they say the same as."""
    # Files of before 2024 hold all the names, newer ones only one: either is read.
    text = config.get("text_config") or {}
    if text.get("model_type") == "opt":
        tied = {"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"}
        # Untied by an export: two tensors that may differ.
        return {} if text.get("tie_word_embeddings") is False else tied
    return {
        f"language_model.{stack}.embed_tokens.weight": "language_model.shared.weight"
        for stack in ("encoder", "decoder")
    }


def untied(config: dict) -> dict | None:
    """The same with a vocabulary projection of its own; None for Flan-T5: its stacks share the embedding."""
    text = config["text_config"]
    apart = {**config, "text_config": {**text, "tie_word_embeddings": False}}
    return apart if text["model_type"] == "opt" else None


# Not its last norm, which both stages of pre-training train
TOWER = ["vision_model.embeddings.*", "vision_model.encoder.*"]
# How a weight is cut over tensor-parallel ranks: (kind, equal blocks packed along the cut dimension)
TP_PLAN = {
    # Packed [q | k | v]: each third is cut by itself, so that a rank has the same heads of all three.
    "vision_model.encoder.layers.*.self_attn.qkv": ("column", 3),
    "vision_model.encoder.layers.*.self_attn.projection": ("row", 1),
    "vision_model.encoder.layers.*.mlp.fc1": ("column", 1),
    "vision_model.encoder.layers.*.mlp.fc2": ("row", 1),
    "qformer.encoder.layer.*attention.attention.query": ("column", 1),
    "qformer.encoder.layer.*attention.attention.key": ("column", 1),
    "qformer.encoder.layer.*attention.attention.value": ("column", 1),
    "qformer.encoder.layer.*.intermediate*.dense": ("column", 1),
    # Both attentions' outputs and both MLPs'.
    "qformer.encoder.layer.*output*.dense": ("row", 1),
    "language_model.model.decoder.embed_tokens": ("vocab", 1),
    "language_model.model.decoder.layers.*.self_attn.[qkv]_proj": ("column", 1),
    "language_model.model.decoder.layers.*.self_attn.out_proj": ("row", 1),
    "language_model.model.decoder.layers.*.fc1": ("column", 1),
    "language_model.model.decoder.layers.*.fc2": ("row", 1),
    "language_model.shared": ("vocab", 1),
    # A column a head: each rank keeps those of its heads.
    "language_model.*.relative_attention_bias": ("heads", 1),
    "language_model.*Attention.[qkv]": ("column", 1),
    "language_model.*Attention.o": ("row", 1),
    "language_model.*DenseReluDense.wi_[01]": ("column", 1),
    "language_model.*DenseReluDense.wo": ("row", 1),
    "language_model.lm_head": ("vocab", 1),
}


def tp_plan(config: Blip2Config, degree: int) -> dict[str, tuple[str, int]]:
    """TP_PLAN for a degree, ValueError where it does not fit. A Q-Former with too few heads stays whole."""
    # A cut must leave whole heads and equal shares on every rank.
    v, q, t = config.vision, config.qformer, config.text
    sizes = {
        "vision_config.num_attention_heads": v.num_attention_heads,
        "vision_config.intermediate_size": v.intermediate_size,
    }
    if not q.use_qformer_text_input:
        sizes["text_config's number of heads"] = t.num_heads if config.is_t5 else t.num_attention_heads
        sizes |= {"text_config's MLP width": config.mlp_width, "text_config.vocab_size": t.vocab_size}
    parallel.check_degree(degree, sizes)
    # 12 heads do not go by 8: then the Q-Former is whole on every rank, 105 M parameters.
    whole = q.num_attention_heads % degree or q.intermediate_size % degree
    return {name: cut for name, cut in TP_PLAN.items() if not (whole and name.startswith("qformer."))}


def forward_flops(
    config: Blip2Config, tokens: int, supervised: int, images: int, segment_length: float
) -> dict[str, float]:
    """FLOPs of one forward pass by part (a multiply-add counts two): tokens in the stream, supervised tokens,
    images."""
    # Matrix products alone, a multiply-add counting two.
    v, q, C, N = config.vision, config.qformer, config.hidden_size, config.num_hidden_layers
    W, P = v.hidden_size, (v.image_size // v.patch_size) ** 2 + 1
    Q, E = config.num_query_tokens, q.hidden_size
    tower = v.num_hidden_layers * (2 * P * (4 * W * W + 2 * W * v.intermediate_size) + 4 * P * P * W)
    # Every second layer, the first one among them: rounded up.
    cross = -(-q.num_hidden_layers // q.cross_attention_frequency)
    qformer = q.num_hidden_layers * (2 * Q * (4 * E * E + 2 * E * q.intermediate_size) + 4 * Q * Q * E)
    qformer += cross * (2 * (2 * Q * E * E + 2 * P * W * E) + 4 * Q * P * E)
    result = {
        "vision": float(images * (tower + 2 * 3 * v.patch_size**2 * W * P)),
        "resampler": float(images * qformer),
    }
    if q.use_qformer_text_input:  # three passes over the text, and queries in two more
        text = tokens * 2 * (4 * E * E + 2 * E * q.intermediate_size) * q.num_hidden_layers
        result["resampler"] = images * 4 * qformer + 5.0 * text
        return {**result, "head": 2.0 * supervised * E * q.vocab_size}
    # T5's MLP has a gate, so three matrices; its heads' width is its own.
    inner, mlp = (config.text.num_heads * config.text.d_kv, 3) if config.is_t5 else (C, 2)
    block = 2 * (4 * C * inner + mlp * C * config.mlp_width)
    if config.is_t5:  # a token passes one of the two stacks
        N = N / 2
    # A causal token sees half of its segment on average.
    result["language model"] = tokens * N * (block + 4 * inner * segment_length / 2)
    return {**result, "head": 2.0 * supervised * C * config.vocab_size}


# --------------------------------------------------------------------------------------------------
# Images, text, prompt format, label mask

# CLIP's means and deviations of the channels.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def preprocess_image(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) fp32, normalised: alpha dropped (as LAVIS; transformers 5 puts it on white), aspect
    ratio not kept, PIL's antialiased bicubic rounded to 8 bits."""
    # Rounded to 8 bits by PIL, as in LAVIS; a resize of floats gives other pixels.
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(
        np.ascontiguousarray(((pixels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1))
    )


def caption_text(caption: str, max_words: int = 50) -> str:
    """LAVIS's blip_caption: lower case, some punctuation to blanks, runs of blanks to one."""
    # Commas, question marks, hyphens and apostrophes stay.
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def question_text(question: str, max_words: int = 50) -> str:
    """LAVIS's blip_question: lower case, the same punctuation deleted."""
    # Deleted, where a caption's become blanks: "3:30" is asked as "330".
    question = re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" ")
    return " ".join(question.split(" ")[:max_words])


class Blip2Processor:
    """Conversations -> what the model takes. Stage "sft" captions after a prompt, pre-training without."""

    # LAVIS's wording of the fine-tuned models; pre-trained captions follow the image directly.
    CAPTION_PROMPT = "a photo of"
    QUESTION_PROMPT = "Question: {} Short answer:"

    def __init__(self, config: Blip2Config, tokenizer: Blip2Tokenizer, stage: str = "sft"):
        # Which tokenizer belongs to the checkpoint shows in its special ids: compared before anything is
        # trained on other words.
        stage1, text = config.qformer.use_qformer_text_input, config.text
        # stage 1 adds [DEC] behind BERT's vocabulary
        room = config.qformer.vocab_size - 1 if stage1 else config.vocab_size
        if tokenizer.vocab_size > room:
            raise ValueError(
                f"tokenizer and config.json do not belong together: {tokenizer.vocab_size} tokens, "
                f"vocab_size leaves room for {room}"
            )
        if not stage1 and tokenizer.pad not in (None, text.pad_token_id):
            raise ValueError(
                f"tokenizer and config.json do not belong together: <pad> is token {tokenizer.pad}, "
                f"text_config.pad_token_id is {text.pad_token_id}"
            )
        begin, eos = (
            (text.pad_token_id, text.eos_token_id) if config.is_t5 else (text.bos_token_id, tokenizer.eos)
        )
        if not stage1 and (tokenizer.begin, tokenizer.eos) != (begin, eos):
            raise ValueError(
                "tokenizer and config.json do not belong together: texts begin and end with tokens "
                f"{tokenizer.begin} and {tokenizer.eos}; by text_config with {begin} and {eos}"
            )
        MODEL.check_stage(stage, config.raw)
        # What the contract (vlm.Processor) asks for.
        self.config, self.tokenizer, self.stage = config, tokenizer, stage
        self.image_size, self.num_image_tokens = config.vision.image_size, config.num_query_tokens
        # Three layouts of a segment: see encode().
        self.kind = "bert" if stage == "pretrain1" else "t5" if config.is_t5 else "opt"
        self.slot = config.image_token_index
        if self.slot is None:
            # any token but the one that T5's decoder starts with: features replace its embedding
            self.slot = config.text.eos_token_id if config.is_t5 else config.text.pad_token_id
        self.decoder_start = config.qformer.vocab_size - 1  # stage 1, as in Blip2Qformer
        # OPT ends at a line break; </s>, which stands in front of every text, ends nothing
        self.end = tokenizer.encode("\n") if self.kind == "opt" else [tokenizer.eos]
        self.eos, self.stop_words = self.end[-1], [self.end]
        # a rank without a sample computes on these: both of T5's stacks have a row, as on the other ranks
        self.token_bytes = ()
        self.blank_ids = (tokenizer.eos, tokenizer.begin) if self.kind == "t5" else (0,)

    def fingerprint(self) -> str:
        """Changes whenever the same conversation could get other ids."""
        vocabulary = hashlib.sha256(self.tokenizer.model.to_str().encode()).hexdigest()
        # 5: raised by hand when encode() changes, so that cached indices are made anew.
        return f"blip2-5-{self.stage}-{self.num_image_tokens}-{self.config.max_positions}-{vocabulary}"

    # same as model_qwen_vl.QwenVLProcessor.load_image
    def load_image(self, source: str | Path) -> Tensor:
        """(3, H, W) fp32 of a file or data URL. ValueError naming it for anything that is no whole image."""
        return preprocess_image(open_image(source), self.image_size)

    def check_length(self, length: int) -> None:
        # OPT's table of positions ends, and nothing would be there for later tokens.
        if (limit := self.config.max_positions) is not None and length > limit:
            raise ValueError(
                f"{length} tokens with the image's, but the model has {limit} positions; "
                f"shorten the text, or let max_length={limit} cut it"
            )

    def texts(self, conversation) -> tuple[str, str]:
        """(prompt, answer). Earlier turns of a chat are joined by blanks and belong to the prompt."""
        refuse_boxes(conversation, "BLIP-2")
        # A system text goes in front of the first question, which has the image.
        first = next((n for n, (role, _) in enumerate(conversation.turns) if role == "user"), None)
        if first is None:
            raise ValueError("no turn to answer")
        turns = [(role, text_of(content)) for role, content in conversation.turns]
        try:
            image, question = front_image(conversation.turns[first][1])
            turns[first] = ("user", question)
            # One place for an image, in front of everything: the model was trained with no other.
            if len(conversation.images) > (image is not None):
                raise ValueError("one stands in a later turn")
            if image is None:
                raise ValueError("got none")
        except ValueError as e:
            raise ValueError(f"BLIP-2 takes one image, at the front of the first question; {e}") from None
        answer = turns[-1][1] if turns[-1][0] == "assistant" else ""
        questions = turns[:-1] if turns[-1][0] == "assistant" else turns
        # The format has no turns: what was said before is text in front of the question.
        prompt = " ".join(text for _, text in questions)
        if conversation.kind == "caption":
            return ("" if self.stage.startswith("pretrain") else self.CAPTION_PROMPT), caption_text(answer)
        if conversation.kind == "vqa":
            return self.QUESTION_PROMPT.format(question_text(prompt)), answer
        return prompt, answer

    def encode(self, conversation, max_length: int) -> dict:
        """One training sample: ids, unshifted labels, slots. Text is cut from the end (an end token that
        LAVIS keeps is kept)."""
        tk, Q = self.tokenizer, self.num_image_tokens
        prompt, answer = self.texts(conversation)
        if not says_something(answer):  # LAVIS's wording of captions has no . ! " ( ) * # : ; ~
            raise ValueError(
                f"nothing is left of {cut(conversation.answers)} in BLIP-2's wording of captions"
            )
        # The image's places come first and are never cut.
        room = max_length - Q
        if room < 4:
            raise ValueError(f"max_length={max_length} leaves no room for text behind the image's {Q} slots")
        if self.kind == "bert":  # [CLS] text [SEP]
            text = tk.encode(f"{prompt} {answer}".strip())
            ids = [tk.begin, *text[: room - 2], tk.eos]
            # All but [CLS], which captioning replaces by [DEC]; [SEP] is learned.
            supervised, truncated = ids[1:], len(text) > room - 2
        elif self.kind == "t5":  # question </s>, then the decoder's start, answer </s>
            question, reply = tk.encode(prompt), tk.encode(answer)
            # Both stacks must have a row: a question takes the room that its answer leaves, and half of it
            # at least.
            head = [*question[: max(room // 2 - 1, room - len(reply) - 3)], tk.eos, tk.begin]
            supervised = [*reply[: room - len(head) - 1], tk.eos]
            ids, truncated = head + supervised, len(head) + len(supervised) < len(question) + len(reply) + 3
        else:  # </s> question answer "\n"; without a question </s> is learned too, as LAVIS does
            head = [tk.begin, *tk.encode(prompt)]
            # The answer's first word carries the blank, as in running text.
            reply = tk.encode(f" {answer}" if prompt else answer) + self.end
            ids, truncated = (head + reply)[:room], len(head) + len(reply) > room
            supervised = ids[len(head) if prompt else 0 :]
        self.check_length(Q + len(ids))
        # Unshifted: data.collate moves them by one inside the segment.
        labels = [IGNORE_INDEX] * (Q + len(ids) - len(supervised)) + supervised
        return {
            "input_ids": np.array([self.slot] * Q + ids, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int32),
            "image_starts": [0],
            "images": conversation.images,
            "truncated": truncated,
        }

    def prompt(self, conversation) -> dict:
        """The ids that generation starts from; a trailing answer is left out. `seen`: what the repetition
        penalty counts."""
        tk, (prompt, _) = self.tokenizer, self.texts(conversation)
        if self.kind == "bert":
            # Captioning with the stage-1 model: [DEC] begins, nothing is asked.
            ids = seen = [self.decoder_start]
        elif self.kind == "t5":
            ids, seen = [*tk.encode(prompt), tk.eos, tk.begin], [tk.begin]
        else:
            ids = seen = [tk.begin, *tk.encode(prompt)]
        ids = [self.slot] * self.num_image_tokens + ids
        self.check_length(len(ids))
        return {
            "input_ids": np.array(ids, dtype=np.int32),
            "labels": np.full(len(ids), IGNORE_INDEX, dtype=np.int32),
            "image_starts": [0],
            "images": conversation.images,
            "truncated": False,
            "seen": seen,
        }

    def template(self) -> dict:
        """As model_qwen_vl.QwenVLProcessor.template, in this model's wording."""
        tk, t5 = self.tokenizer, self.kind == "t5"
        if self.kind == "bert":
            raise ValueError(
                "a stage-1 checkpoint compares images with texts, it gives no answers; export stage 2"
            )
        return {
            "images": [1, 1],
            "start": [],
            "image_text": "",
            "image": [self.slot] * self.num_image_tokens + ([] if t5 else [tk.begin]),
            "first_place": 0,
            "gap": "",
            "text": "{prompt}",
            "end": [tk.eos, tk.begin] if t5 else [],
            "reserved": [token.content for token in tk.model.get_added_tokens_decoder().values()],
            "skip_special": True,  # in the answer's text
            "cleanup": [],
        }

    def asked(self, conversation) -> str:
        """The prompt as a text to put behind the image."""
        return self.texts(conversation)[0]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of the beginning of an answer, behind the prompt, that generation goes on from."""
        # As in encode(): behind a prompt OPT's words begin with a blank.
        return self.tokenizer.encode(f" {text}" if self.kind == "opt" else text)

    def decode(self, ids: list[int]) -> str:
        """The reply: cut at the first end token, blanks at both ends removed."""
        # OPT ends at a line break, T5 at </s>: cut there, and what the beam search wrote behind it goes.
        stop = next((i for i, token in enumerate(ids) if token == self.eos), len(ids))
        return self.tokenizer.decode(ids[:stop]).strip()


def probe_batch(processor: Blip2Processor) -> Batch:
    """A fixed prompt with one synthetic image, to compare two models' logits."""
    tk, Q, size = processor.tokenizer, processor.num_image_tokens, processor.image_size
    text = tk.encode("Question: what is this? Short answer:")
    # T5's segment needs a row of the decoder.
    text = [*text, tk.eos, tk.begin] if processor.kind == "t5" else [tk.begin, *text]
    ids = torch.tensor([processor.slot] * Q + text)
    # Three ramps, so that no channel, row or column can be taken for another.
    ramp = torch.linspace(-1, 1, size)
    image = torch.stack((ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], ramp[:, None] * ramp))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        image_positions=torch.arange(Q)[None],
        pixel_values=image[None],
    )


def load_processor(directory: str | Path, stage: str = "sft") -> Blip2Processor:
    """The processor of a checkpoint directory (config.json and tokenizer)."""
    config = Blip2Config.from_dict(checkpoint.read_config(directory))
    side, stage1 = config.vision.image_size, config.qformer.use_qformer_text_input
    # What a tokenizer_config.json could ask for, and is not done here.
    options = {"add_prefix_space": False, "tokenize_chinese_chars": True}
    if stage1:
        options["do_lower_case"] = True
    elif not config.is_t5:
        options["add_bos_token"] = True  # OPT's texts begin with </s>
    checkpoint.check_side_files(directory, side, side, **options)
    kind = "bert" if stage1 else "t5" if config.is_t5 else "opt"
    return Blip2Processor(config, Blip2Tokenizer(directory, kind), stage)


MODEL = vlm.Model(
    build_model=build_model,
    load_processor=load_processor,
    probe_batch=probe_batch,
    forward_flops=forward_flops,
    parts={
        "vision": "vision_model.*",
        "resampler": "q*",  # query_tokens, qformer
        "projection": "*_projection.*",
        "language model": "language_model.*",
        "text embedding": "embeddings.*",
        "heads": "*",
    },
    image_parameters=["vision_model.*", "q*", "language_projection.*"],
    vision_stem=["vision_model.embeddings.*"],
    stages=("sft", "pretrain1", "pretrain2"),
    pretrain_freeze={"pretrain1": TOWER, "pretrain2": [*TOWER, "language_model.*"]},
    lora_targets=[r"language_model\.(model\.decoder\.layers.*\.(q_proj|v_proj)|.*Attention\.(q|v))"],
    tp_plan=tp_plan,
    # OPT's embedding is its vocabulary projection too: first and last stage have it, and sum its gradient
    pipeline={
        "blocks": "language_model.model.decoder.layers",
        "first": ["vision_model.*", "q*", "language_projection.*", "language_model.model.decoder.embed_*"],
        "last": [
            f"language_model.{n}.*"
            for n in ("model.decoder.final_layer_norm", "model.decoder.embed_tokens", "lm_head")
        ],
    },
    aliases=aliases,
    untied=untied,
    legacy_names={
        "language_model.opt.": "language_model.model.",
        "visual_encoder": "vision_model",
        "Qformer": "qformer",
    },
    retrieval_stage=retrieval_stage,
    contrasted=("pretrain1",),
    check_dtype=check_dtype,
)
