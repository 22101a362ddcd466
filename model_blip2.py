"""BLIP-2 (arXiv:2301.12597): EVA ViT-g, Q-Former, OPT or Flan-T5, and everything about its data format.

    python generate.py --model_name_or_path blip2-opt-2.7b --image a.png --prompt "a photo of"
    python model_blip2.py import blip2_pretrained.pth --config config.json --out stage1  # LAVIS, and back
    python model_blip2.py init bert-base-uncased --tower eva_vit_g.pth --out stage1  # begins stage 1
    python model_blip2.py resize blip2-opt-2.7b blip2-opt-2.7b-364 --image_size 364

Two models: `Blip2` reads a picture and writes text; `Blip2Qformer` is stage 1 of pre-training and retrieval
(a config.json whose Q-Former takes text: `use_qformer_text_input`). Text has no batch dimension: a
micro-batch is one stream of T tokens, cut into segments (samples) by `cu_seqlens`. Parameter names are those
of the published Hugging Face checkpoints. Numerics follow LAVIS (2023) and transformers; where this file
differs on purpose, it says so. Dropout acts on hidden states only (the originals drop attention probabilities
too) and is a pure function of the sample, so that no layout changes it.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import hashlib
import math
import re
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

import checkpoint
import parallel
import terminal
import vlm
from checkpoint import Depth, Epsilon, Pixels, Scale, Share, Size, TokenId
from dropout import dropout_mask, dropout_rows, keys_of_rows, mix
from images import open_image
from kernels.attention import attention
from kernels.linear_cross_entropy import IGNORE_INDEX
from kernels.norm import rms_norm
from records import front_image, text_of
from vlm import Batch

# --------------------------------------------------------------------------------------------------
# Configuration: the fields of the published config.json that change what is computed, with that file's
# defaults


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
    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_dropout_prob: Share = 0.1
    max_position_embeddings: Size = 512
    layer_norm_eps: Epsilon = 1e-12
    cross_attention_frequency: Size = 2
    encoder_hidden_size: Size = 1408
    use_qformer_text_input: bool = False


@dataclass
class OPTConfig:
    vocab_size: Size = 50272
    hidden_size: Size = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    ffn_dim: Size = 3072
    max_position_embeddings: Size = 2048
    dropout: Share = 0.1
    pad_token_id: TokenId = 1
    bos_token_id: TokenId = 2
    eos_token_id: TokenId = 2  # answers end at a line break, whatever it says
    tie_word_embeddings: bool = True  # in every published file


@dataclass
class T5Config:
    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Depth = 6
    num_decoder_layers: Depth | None = None
    num_heads: Size = 8
    relative_attention_num_buckets: Annotated[int, 4, 1 << 20] = 32
    relative_attention_max_distance: Size = 128
    dropout_rate: Share = 0.1
    layer_norm_epsilon: Epsilon = 1e-6
    # the published BLIP-2 configs say gelu: the exact one, unlike Flan-T5's own
    dense_act_fn: Literal["gelu", "gelu_new"] = "gelu_new"
    pad_token_id: TokenId = 0  # also what the decoder starts with
    eos_token_id: TokenId = 1


@dataclass
class Blip2Config:
    vision: VisionConfig
    qformer: QFormerConfig
    text: OPTConfig | T5Config
    num_query_tokens: Size = 32
    image_text_hidden_size: Size = 256
    image_token_index: TokenId | None = None  # null in older files
    initializer_range: Scale = 0.02
    stage1_heads: bool = (
        False  # temperature and language-modelling head of stage 1; published retrieval models lack them
    )
    raw: dict = field(default_factory=dict)  # config.json as it was read, written back with the weights

    @classmethod
    def from_dict(cls, raw: dict) -> "Blip2Config":
        """Raises ValueError for a shape that the architecture cannot have."""

        parts = {part: raw.get(f"{part}_config") for part in ("vision", "qformer", "text")}
        for part, values in parts.items():
            checkpoint.check(values, dict, f"config.json: {part}_config")
        kind = parts["text"].get("model_type")
        checkpoint.check(kind, Literal["opt", "t5"], "config.json: text_config.model_type")
        text = checkpoint.from_json(
            {"opt": OPTConfig, "t5": T5Config}[kind], parts["text"], "config.json: text_config"
        )
        vision = checkpoint.from_json(VisionConfig, parts["vision"], "config.json: vision_config")
        qformer = checkpoint.from_json(QFormerConfig, parts["qformer"], "config.json: qformer_config")
        config = checkpoint.from_json(
            cls, raw, "config.json", vision=vision, qformer=qformer, text=text, raw=raw
        )
        text_only = {
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "enable_bias": True,
            "layerdrop": 0,
        }
        text_only |= {
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "attention_dropout": 0,
        }
        only = {
            "vision": {"hidden_act": "gelu", "qkv_bias": True, "attention_dropout": 0},
            "qformer": {"hidden_act": "gelu", "position_embedding_type": "absolute"},
            "text": {**text_only, "word_embed_proj_dim": config.hidden_size},
        }
        if config.is_t5:
            only["text"] = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": text.pad_token_id}
        checkpoint.require(raw, "config.json", use_decoder_only_language_model=not config.is_t5)
        for part, values in only.items():
            checkpoint.require(parts[part], f"config.json: {part}_config", **values)
        v, q = config.vision, config.qformer
        checks = [
            (
                v.hidden_size % v.num_attention_heads == 0,
                "vision_config: num_attention_heads must divide hidden_size",
            ),
            (
                v.image_size % v.patch_size == 0,
                f"patch_size={v.patch_size} does not divide image_size={v.image_size}",
            ),
            (
                q.hidden_size % q.num_attention_heads == 0,
                "qformer_config: num_attention_heads must divide hidden_size",
            ),
            (
                q.encoder_hidden_size == v.hidden_size,
                f"qformer_config.encoder_hidden_size={q.encoder_hidden_size} must be "
                f"the vision tower's {v.hidden_size}",
            ),
            (
                (config.image_token_index or 0) < text.vocab_size,
                f"image_token_index={config.image_token_index} must be below "
                f"text_config.vocab_size={text.vocab_size}",
            ),
        ]
        if isinstance(text, OPTConfig):
            checks += [
                (
                    text.hidden_size % text.num_attention_heads == 0,
                    "text_config: num_attention_heads must divide hidden_size",
                )
            ]
        else:
            text.num_decoder_layers = text.num_decoder_layers or text.num_layers
            checks += [
                (
                    # transformers 5 saves tie_word_embeddings true for every T5, and what it means in the
                    # other key
                    not parts["text"].get(
                        "scale_decoder_outputs", parts["text"].get("tie_word_embeddings", False)
                    ),
                    "text_config.tie_word_embeddings must be false: Flan-T5 has its own lm_head",
                )
            ]
        for ok, message in checks:
            if not ok:
                raise ValueError(f"config.json: {message}")
        return config

    @property
    def is_t5(self) -> bool:
        return isinstance(self.text, T5Config)

    # what train.py asks of every model's config
    @property
    def max_positions(self) -> int | None:
        """Tokens of a sequence, a picture's slots included, that have a learned position; None: no table that
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


def _preset(text: dict, image_token_index: int, **qformer) -> dict:
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "image_token_index": image_token_index,
        "image_text_hidden_size": 256,
        "initializer_range": 0.02,
        "use_decoder_only_language_model": text["model_type"] == "opt",
        "torch_dtype": "float32",
        "vision_config": {"model_type": "blip_2_vision_model"},
        "qformer_config": {"model_type": "blip_2_qformer", "vocab_size": 30522, **qformer},
        "text_config": text,
    }


def _opt(hidden_size: int) -> dict:
    return {
        "model_type": "opt",
        "vocab_size": 50304,
        "hidden_size": hidden_size,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 4 * hidden_size,
        "word_embed_proj_dim": hidden_size,
        "max_position_embeddings": 2048,
        "dropout": 0.1,
        "eos_token_id": 50118,
        "bos_token_id": 2,
        "pad_token_id": 1,
    }


def _flan_t5(d_model: int, d_ff: int, num_heads: int) -> dict:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": d_model,
        "d_kv": 64,
        "d_ff": d_ff,
        "num_heads": num_heads,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


PRESETS = {
    "blip2-opt-2.7b": _preset(_opt(2560), 50265),
    "blip2-opt-6.7b": _preset(_opt(4096), 50265),
    "blip2-flan-t5-xl": _preset(_flan_t5(2048, 5120, 32), 32100),
    "blip2-flan-t5-xxl": _preset(_flan_t5(4096, 10240, 64), 32100),
    "blip2-itm-vit-g": {
        **_preset(_opt(2560), None, use_qformer_text_input=True),
        "architectures": ["Blip2ForImageTextRetrieval"],
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": 30523,
            "use_qformer_text_input": True,
        },
    },
}
PRESETS["blip2-stage1"] = {**PRESETS["blip2-itm-vit-g"], "stage1_heads": True}


class Dropout(nn.Module):
    """Zeroes entries with probability p in training, by a hash of row key, channel and place in the model."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.seed = p, 0

    def forward(self, x: Tensor, keys: Tensor | None, first_channel: int = 0) -> Tensor:
        """first_channel: of x's last dimension, where x holds a tensor-parallel rank's channels alone."""
        if not self.training or keys is None or self.p == 0:
            return x
        return x * dropout_mask(x, keys, self.p, self.seed, first_channel) / (1 - self.p)


def name_dropouts(model: nn.Module) -> None:
    """Masks differ between places."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.seed = zlib.crc32(name.encode()) >> 1


# same as model_qwen_vl.even_segments
def even_segments(num_segments: int, length: int) -> Tensor:
    return torch.arange(0, (num_segments + 1) * length, length, dtype=torch.int32)


def segments(lengths: Tensor) -> Tensor:
    """(S,) lengths -> (S+1,) int32 cumulative, on the host."""
    return F.pad(lengths.cpu().cumsum(0), (1, 0)).int()


# --------------------------------------------------------------------------------------------------
# Vision: pictures are a plain batch; inside, their patches are one stream of N*P rows


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A position table (1, 1 + G*G, C) for another grid: the class row kept, the rest bicubic in fp32, no
    antialiasing."""
    G = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (G, G):
        return table
    grid = table[:, 1:].float().unflatten(1, (G, G)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, C))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + (config.image_size // P) ** 2, C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, rows, columns)
        positions = resize_positions(self.position_embedding, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        return torch.cat((self.class_embedding.expand(len(x), -1, -1).to(x.dtype), x), dim=1) + positions


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.hidden_size
        self.head_dim = C // config.num_attention_heads
        self.qkv = nn.Linear(
            C, 3 * C
        )  # LAVIS has no bias for k: here its third starts 0, and does not change a softmax
        self.projection = nn.Linear(C, C)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        x = parallel.copy_to_tp(x, self.qkv)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # 3 x (N*P, H, D)
        return self.projection(attention(q, k, v, cu_seqlens, cu_seqlens, max_len, causal=False).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(parallel.copy_to_tp(x, self.fc1))))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cu_seqlens, max_len)
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """EVA-CLIP-g without its last block. Only post_layernorm (LAVIS: ln_vision) belongs to what is always
    trained."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        eps = config.layer_norm_eps if config.post_layernorm_eps is None else config.post_layernorm_eps
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, C), class token first."""
        x = self.embeddings(pixel_values)
        N, P, _ = x.shape
        x, cu_seqlens = x.flatten(0, 1), even_segments(N, P)
        for block in self.encoder.layers:
            x = block(x, cu_seqlens, P)
        return self.post_layernorm(x).unflatten(0, (N, P))


# --------------------------------------------------------------------------------------------------
# Q-Former: a stream whose segments hold queries, or text, or queries and then text


@dataclass
class QFormerContext:
    """What every layer of one pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    max_len: int
    query_rows: (
        Tensor | None
    )  # (N*Q,) rows of the stream that hold queries, picture by picture; None: all text
    text_rows: Tensor | None  # the other rows; None: all queries
    image: Tensor | None  # (N, P, W): picture n is seen by queries n*Q .. n*Q+Q-1
    prefix_lens: Tensor | None = (
        None  # language modelling: text is causal, and sees this many queries before it
    )
    keys: Tensor | None = None  # (R,) dropout keys of the rows
    image_keys: Tensor | None = None  # (N,) of the pictures
    cache: object | None = None  # engine.KVCache

    def __post_init__(self):
        both = self.query_rows is not None and self.text_rows is not None
        self.order = torch.cat((self.query_rows, self.text_rows)).argsort() if both else None
        self.query_keys, self.text_keys = (
            self.keys if self.keys is None or rows is None else self.keys[rows]
            for rows in (self.query_rows, self.text_rows)
        )


def interleave(Q: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries (N*Q,) and of text, and cu_seqlens, of N segments with Q queries and then lengths[n]
    text tokens."""
    device, N = lengths.device, len(lengths)
    cu_seqlens = segments(lengths + Q)
    starts = cu_seqlens[:-1].to(device).long()
    query_rows = (starts[:, None] + torch.arange(Q, device=device)).flatten()
    text_rows = torch.arange(int(lengths.sum()), device=device)
    return (
        query_rows,
        text_rows + Q * (1 + torch.arange(N, device=device)).repeat_interleave(lengths),
        cu_seqlens,
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
        return self.LayerNorm(self.dropout(x, keys) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, config: QFormerConfig, layer: int, kv_size: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.head_dim = layer, C // config.num_attention_heads
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
        kv = y if image is None else parallel.copy_to_tp(image.flatten(0, 1), a.key)
        rows = ctx.keys if image is None else ctx.query_keys
        with dropout_rows(rows):
            q = a.query(y).unflatten(-1, (-1, self.head_dim))
        with dropout_rows(rows) if image is None else dropout_rows(ctx.image_keys, len(image)):
            k, v = (layer(kv).unflatten(-1, (-1, self.head_dim)) for layer in (a.key, a.value))
        if image is not None:
            N, P, _ = image.shape
            Q = len(x) // N
            o = attention(q, k, v, even_segments(N, Q), even_segments(N, P), max(Q, P), causal=False)
        elif ctx.cache is not None:
            o = ctx.cache.attend(
                self.layer, q, k, v, ctx.cu_seqlens, ctx.max_len, prefix_lens=ctx.prefix_lens
            )
        else:
            causal = ctx.prefix_lens is not None
            o = attention(
                q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, ctx.max_len, causal, prefix_lens=ctx.prefix_lens
            )
        return self.output(o.flatten(1), x, rows)


class QFormerIntermediate(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        with dropout_rows(keys):
            return F.gelu(self.dense(parallel.copy_to_tp(x, self.dense)))


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, layer: int):
        super().__init__()
        self.attention = QFormerAttention(config, layer, config.hidden_size)
        self.crossattention = None
        if layer % config.cross_attention_frequency == 0:
            self.crossattention = QFormerAttention(config, layer, config.encoder_hidden_size)
        self.intermediate_query = QFormerIntermediate(config)
        self.output_query = QFormerOutput(config, config.intermediate_size)
        if config.use_qformer_text_input:
            self.intermediate = QFormerIntermediate(config)
            self.output = QFormerOutput(config, config.intermediate_size)

    def forward(self, x: Tensor, ctx: QFormerContext) -> Tensor:
        """(R, C) -> (R, C). Queries look at the picture and have a feed-forward of their own; text never sees
        it directly."""
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
        x = self.dropout(self.layernorm(x), ctx.keys)
        for layer in self.encoder.layer:
            x = layer(x, ctx)
        return x


def spread_keys(keys: Tensor | None, count: int, salt: int = 0) -> Tensor | None:
    """One key per picture (N,) -> one per row (N*count,)."""
    if keys is None:
        return None
    return keys_of_rows(keys, count, salt)


def encode_queries(model: nn.Module, image: Tensor, keys: Tensor | None = None) -> Tensor:
    """Image features (N, P, W) -> query outputs (N, Q, C); `keys` (N,) for dropout."""
    N, Q = len(image), model.query_tokens.shape[1]
    rows = torch.arange(N * Q, device=image.device)
    ctx = QFormerContext(
        even_segments(N, Q), Q, rows, None, image, keys=spread_keys(keys, Q), image_keys=keys
    )
    return model.qformer(model.query_tokens.expand(N, -1, -1).flatten(0, 1), ctx).unflatten(0, (N, Q))


# --------------------------------------------------------------------------------------------------
# OPT (arXiv:2205.01068)


@dataclass
class Context:
    """What every block of one forward pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    max_len: int
    keys: Tensor | None  # (T,) dropout keys of the rows
    cache: object | None = None  # engine.KVCache
    # T5 only
    memory: Tensor | None = (
        None  # (Te, C) encoder output; None in a decoding step: its keys and values are cached
    )
    memory_cu_seqlens: Tensor | None = None
    memory_keys: Tensor | None = None  # (Te,)
    # .bias (H, Lq, Lk), made by a stack's first block for all of them; fully_shard copies a dataclass, but
    # not this
    shared: SimpleNamespace = field(default_factory=SimpleNamespace)


class OPTAttention(nn.Module):
    def __init__(self, config: OPTConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.head_dim = layer, C // config.num_attention_heads
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.q_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = parallel.copy_to_tp(x, self.q_proj)
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if ctx.cache is None:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, ctx.max_len, causal=True)
        else:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens, ctx.max_len)
        return self.out_proj(o.flatten(1))


class OPTBlock(nn.Module):
    def __init__(self, config: OPTConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.self_attn = OPTAttention(config, layer)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.fc1 = nn.Linear(C, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, C)
        self.final_layer_norm = nn.LayerNorm(C)
        self.dropout1, self.dropout2 = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.dropout1(self.self_attn(self.self_attn_layer_norm(x), ctx), ctx.keys)
        y = parallel.copy_to_tp(self.final_layer_norm(x), self.fc1)
        return x + self.dropout2(self.fc2(F.relu(self.fc1(y))), ctx.keys)


class OPT(nn.Module):
    """The vocabulary projection is the word embedding itself, unless tie_word_embeddings is false."""

    POSITION_OFFSET = 2  # the published table begins with two rows that no real token uses

    def __init__(self, config: OPTConfig):
        super().__init__()
        C = config.hidden_size
        self.model = nn.Module()
        self.model.decoder = decoder = nn.Module()
        decoder.embed_tokens = nn.Embedding(config.vocab_size, C)
        decoder.embed_positions = nn.Embedding(config.max_position_embeddings + self.POSITION_OFFSET, C)
        decoder.final_layer_norm = nn.LayerNorm(C)
        decoder.layers = nn.ModuleList(OPTBlock(config, i) for i in range(config.num_hidden_layers))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.decoder.layers

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.decoder.embed_tokens(input_ids)

    def add_positions(self, x: Tensor, batch: dict) -> Tensor:
        return x + self.model.decoder.embed_positions(batch["position_ids"] + self.POSITION_OFFSET)

    def hidden(self, x: Tensor, batch: dict, keys: Tensor | None, blocks=None) -> Tensor:
        ctx = Context(batch["cu_seqlens"], batch["max_len"], keys, batch.get("cache"))
        with dropout_rows(keys):
            for block in self.blocks if blocks is None else blocks:
                x = block(x, ctx)
        return x

    def targets(self, batch: dict) -> Tensor:
        return batch["targets"]

    def last_rows(self, batch: dict) -> Tensor:
        return batch["cu_seqlens"][1:] - 1

    def norm(self, x: Tensor) -> Tensor:
        return self.model.decoder.final_layer_norm(x)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.decoder.embed_tokens.weight


# --------------------------------------------------------------------------------------------------
# Flan-T5 (arXiv:1910.10683, arXiv:2210.11416). In the stream a segment holds the encoder's tokens, then the
# decoder's, which begin with its start token (id 0); that token stands nowhere else, so it is where the
# stream is divided.

T5_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


class T5Norm(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def t5_buckets(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Distance key - query -> bucket: exact when near, logarithmic up to max_distance; half of them for each
    sign if both are seen."""
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    far = (
        torch.log(distance.float().clamp(min=1) / exact)
        / math.log(max_distance / exact)
        * (num_buckets - exact)
    )
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, layer: int, decoder: bool, with_bias: bool = False):
        super().__init__()
        C, inner = config.d_model, config.num_heads * config.d_kv
        self.layer, self.decoder, self.head_dim = layer, decoder, config.d_kv
        self.num_buckets, self.max_distance = (
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        self.q = nn.Linear(C, inner, bias=False)
        self.k = nn.Linear(C, inner, bias=False)
        self.v = nn.Linear(C, inner, bias=False)
        self.o = nn.Linear(inner, C, bias=False)
        self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads) if with_bias else None

    def bias(self, first: int, length: int, device: torch.device) -> Tensor:
        """(H, length - first, length), queries from position `first`
        on; -inf on what a decoder may not see."""
        key = torch.arange(length, device=device)
        distance = key - key[first:, None]
        buckets = t5_buckets(distance, not self.decoder, self.num_buckets, self.max_distance)
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        return bias.masked_fill(distance > 0, float("-inf")) if self.decoder else bias

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.relative_attention_bias is not None:
            first = 0 if ctx.cache is None else ctx.cache.longest_past()
            ctx.shared.bias = self.bias(first, first + ctx.max_len, x.device)
        x = parallel.copy_to_tp(x, self.q)
        q, k, v = (self.project(layer, x) for layer in (self.q, self.k, self.v))
        q = q * q.shape[-1] ** 0.5  # T5 does not scale its scores, attention() does
        bias = ctx.shared.bias.to(q.dtype)
        if ctx.cache is not None:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens, ctx.max_len, bias=bias)
        else:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, ctx.max_len, causal=False, bias=bias)
        return self.o(o.flatten(1))

    def cross(self, x: Tensor, ctx: Context) -> Tensor:
        """Attention to the encoder's output, all of it seen."""
        q = self.project(self.q, parallel.copy_to_tp(x, self.q))
        q, k, v = q * q.shape[-1] ** 0.5, None, None
        if ctx.memory is not None:
            memory = parallel.copy_to_tp(ctx.memory, self.k)
            with dropout_rows(ctx.memory_keys):
                k, v = self.project(self.k, memory), self.project(self.v, memory)
        if ctx.cache is not None:
            o = ctx.cache.attend_memory(self.layer, q, k, v, ctx.cu_seqlens, ctx.memory_cu_seqlens)
        else:
            lengths = ctx.max_len, int(ctx.memory_cu_seqlens.diff().max())
            o = attention(q, k, v, ctx.cu_seqlens, ctx.memory_cu_seqlens, max(lengths), causal=False)
        return self.o(o.flatten(1))


class T5MLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.act, self.dropout = T5_ACTIVATIONS[config.dense_act_fn], Dropout(config.dropout_rate)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = parallel.copy_to_tp(x, self.wi_0)
        x = self.act(self.wi_0(x)) * self.wi_1(x)
        return self.wo(self.dropout(x, keys, parallel.first_channel(x.shape[-1])))


class T5Sublayer(nn.Module):
    def __init__(self, config: T5Config, name: str, inner: nn.Module):
        super().__init__()
        self.add_module(name, inner)
        self.layer_norm = T5Norm(config)
        self.dropout = Dropout(config.dropout_rate)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, layer: int, decoder: bool):
        super().__init__()
        sublayers = [
            T5Sublayer(config, "SelfAttention", T5Attention(config, layer, decoder, with_bias=layer == 0))
        ]
        if decoder:
            sublayers.append(T5Sublayer(config, "EncDecAttention", T5Attention(config, layer, decoder)))
        self.layer = nn.ModuleList([*sublayers, T5Sublayer(config, "DenseReluDense", T5MLP(config))])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        own, *cross, mlp = self.layer
        x = x + own.dropout(own.SelfAttention(own.layer_norm(x), ctx), ctx.keys)
        for sub in cross:
            x = x + sub.dropout(sub.EncDecAttention.cross(sub.layer_norm(x), ctx), ctx.keys)
        return x + mlp.dropout(mlp.DenseReluDense(mlp.layer_norm(x), ctx.keys), ctx.keys)


class T5Stack(nn.Module):
    def __init__(self, config: T5Config, num_layers: int, decoder: bool):
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, i, decoder) for i in range(num_layers))
        self.final_layer_norm = T5Norm(config)
        self.dropout_in, self.dropout_out = Dropout(config.dropout_rate), Dropout(config.dropout_rate)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.dropout_in(x, ctx.keys)
        with dropout_rows(ctx.keys):
            for block in self.block:
                x = block(x, ctx)
        return self.dropout_out(self.final_layer_norm(x), ctx.keys)


class T5(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.start = config.pad_token_id
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, config.num_layers, decoder=False)
        self.decoder = T5Stack(config, config.num_decoder_layers, decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.block, *self.decoder.block]

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.shared(input_ids)

    def add_positions(self, x: Tensor, batch: dict) -> Tensor:
        return x  # they are in the attention's bias

    def decoder_rows(self, batch: dict) -> Tensor:
        """(T,) bool: rows of the stream from their segment's start token on."""
        starts = (batch["input_ids"] == self.start).int()
        before = starts.cumsum(0)
        lengths = batch["cu_seqlens"].diff().to(before.device)
        first = batch["cu_seqlens"][:-1].to(before.device).long()
        return before > (before - starts)[first].repeat_interleave(lengths)

    def hidden(self, x: Tensor, batch: dict, keys: Tensor | None, blocks=None) -> Tensor:
        """(T, C) -> the decoder's rows (Td, C), normalised. `blocks`: all of them, always."""
        cache = batch.get("cache")
        if cache is not None and not cache.encode:  # a decoding step: decoder tokens only
            return self.decoder(x, Context(batch["cu_seqlens"], batch["max_len"], keys, cache))
        in_decoder = self.decoder_rows(batch)
        rows = (~in_decoder).nonzero()[:, 0], in_decoder.nonzero()[:, 0]
        cu_seqlens = batch["cu_seqlens"].to(x.device).long()
        decoder_lengths = F.pad(in_decoder.long().cumsum(0), (1, 0))[cu_seqlens].diff()
        cu = segments(cu_seqlens.diff() - decoder_lengths), segments(decoder_lengths)
        row_keys = [None if keys is None else keys[r] for r in rows]
        memory = self.encoder(x[rows[0]], Context(cu[0], int(cu[0].diff().max()), row_keys[0]))
        ctx = Context(cu[1], int(cu[1].diff().max()), row_keys[1], cache, memory, cu[0], row_keys[0])
        return self.decoder(x[rows[1]], ctx)

    def targets(self, batch: dict) -> Tensor:
        return batch["targets"][self.decoder_rows(batch)]

    def last_rows(self, batch: dict) -> Tensor:
        """Rows of hidden()'s result: in a prompt and in a step the
        decoder holds one token of each segment."""
        return torch.arange(len(batch["cu_seqlens"]) - 1)

    def norm(self, x: Tensor) -> Tensor:
        return x  # hidden() did it

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight


# --------------------------------------------------------------------------------------------------
# Picture -> text: stage 2, fine-tuning, captioning, questions


class Blip2(nn.Module):
    LOSSES = ("loss",)
    position_step, position_axes = 1, 1

    @property
    def encoder_decoder(self) -> bool:
        return self.config.is_t5

    @property
    def prefill(self) -> str:
        return "alone" if self.config.is_t5 else "chunks"

    def cache_group(self, length: int) -> int:
        return 0

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer.hidden_size))
        self.vision_model = VisionModel(config.vision)
        self.qformer = QFormer(config.qformer)
        self.language_projection = nn.Linear(config.qformer.hidden_size, config.hidden_size)
        self.language_model = T5(config.text) if config.is_t5 else OPT(config.text)
        name_dropouts(self)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_query_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.vision.image_size, self.config.vision.image_size

    def loss_counts(self, batch: Batch) -> list[int]:
        return [batch.num_supervised]

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
        with dropout_rows(keys, len(pixel_values)):
            return self.language_projection(encode_queries(self, self.vision_model(pixel_values), keys))

    def embed(self, batch: dict) -> Tensor:
        """Word embeddings (T, C), those of the picture slots replaced by features, and positions.

        More pictures than slots: the others (a blank one, so that every rank of a sharded run enters the
        tower) count nothing.
        """
        x = self.language_model.embed(batch["input_ids"])
        features = batch.get("image_features")
        if features is None and batch.get("pixel_values") is not None:
            features = self.encode_images(batch["pixel_values"], batch.get("image_dropout_keys"))
        if features is not None:
            positions = batch["image_positions"].flatten()
            features = features.flatten(0, 1).to(x.dtype)
            x = x.index_copy(0, positions, features[: len(positions)])
            if len(features) > len(positions):
                x = x + 0.0 * features[len(positions) :].sum()
        return self.language_model.add_positions(x, batch)

    def hidden(self, batch: dict, x: Tensor | None = None, blocks=None) -> Tensor:
        """(T, C) behind the blocks. A pipeline stage gives what it received, `x` (T, C), and its own
        `blocks`."""
        x, keys = self.embed(batch) if x is None else x, batch.get("dropout_keys") if self.training else None
        return self.language_model.hidden(x, batch, keys, blocks)

    def logits(self, x: Tensor) -> Tensor:
        return parallel.vocab_logits(F.linear(self.language_model.norm(x), self.language_model.head_weight))

    def head(self, x: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """Summed loss of the supervised tokens and each one's own loss (detached), in stream order."""
        targets = self.language_model.targets(batch)
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
        x = self.language_model.norm(x[rows])
        return parallel.vocab_cross_entropy(x, self.language_model.head_weight, targets[rows])

    def forward(self, batch: dict, output: str = "loss", x: Tensor | None = None, blocks=None):
        """The one entrance of a sharded model. `output`: "loss" as head(); "logits" (S, V) of each segment's
        last position; "features" (N, Q, C) of the pictures; "hidden" (T, C). `x`, `blocks`: as hidden()."""
        if output == "features":
            return self.encode_images(batch["pixel_values"])
        x = self.hidden(batch, x, blocks)
        if output == "hidden":
            return x
        if output == "logits":
            return self.logits(x[self.language_model.last_rows(batch).to(x.device)])
        return self.head(x, batch)

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        init_weights(self.config, name, tensor, generator)


# --------------------------------------------------------------------------------------------------
# Stage 1 and retrieval. A segment of the stream is Q slots (queries) and then [CLS] text [SEP].


class LMPredictions(nn.Module):
    """BERT's head; its vocabulary matrix is the word embedding."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        C = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(C, C)
        self.transform.LayerNorm = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.transform.LayerNorm(F.gelu(self.transform.dense(x))), weight, self.bias)


CONTRASTED = ("pretrain1",)  # stages that compare the samples of a micro-batch, of all ranks, with each other


class Blip2Qformer(nn.Module):
    prefill = "alone"  # a prompt enters the engine whole, without running sequences: queries see one another
    LOSSES = ("itc", "itm", "lm")
    pipeline_obstacle = "stage=pretrain1 passes a picture's features to every layer in several passes"
    position_step, position_axes = 1, 1
    encoder_decoder = False
    MASKED = -10000.0  # added to similarities that may not be drawn
    SMOOTHING = 0.1  # of contrastive and language-modelling targets

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        q, C = config.qformer, config.qformer.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, C))
        self.vision_model = VisionModel(config.vision)
        self.qformer = QFormer(q)
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(q.vocab_size, C)
        self.embeddings.position_embeddings = nn.Embedding(q.max_position_embeddings, C)
        self.vision_projection = nn.Linear(C, config.image_text_hidden_size)
        self.text_projection = nn.Linear(C, config.image_text_hidden_size)
        self.itm_head = nn.Linear(C, 2)
        if config.stage1_heads:
            self.temp = nn.Parameter(
                torch.full((1,), 0.07)
            )  # LAVIS's has no dimension, which fully_shard can't take
            self.cls = nn.Module()
            self.cls.predictions = LMPredictions(q)
        name_dropouts(self)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_query_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.vision.image_size, self.config.vision.image_size

    @property
    def decoder_start(self) -> int:
        return self.config.qformer.vocab_size - 1  # [DEC], added behind BERT's vocabulary

    @property
    def blocks(self) -> list:
        # a layer is used by three passes a step: it is sharded and recomputed with the whole, not alone
        return []

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def embed_text(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(positions)

    def embed(self, batch: dict) -> Tensor:
        """(T, C): queries in the slots; text positions count from the segment's first text token."""
        x = self.embed_text(batch["input_ids"], (batch["position_ids"] - self.num_image_tokens).clamp(min=0))
        slots = batch.get("image_positions")
        if slots is not None and len(slots):
            x = x.index_copy(
                0, slots.flatten(), self.query_tokens.expand(len(slots), -1, -1).flatten(0, 1).to(x.dtype)
            )
        return x

    def hidden(self, batch: dict, image: Tensor | None = None) -> Tensor:
        """The language-modelling pass: queries see queries, text sees
        queries and the text before it. (T, C)"""
        slots, Q, cu_seqlens = batch.get("image_positions"), self.num_image_tokens, batch["cu_seqlens"]
        query_rows, text_rows, prefix = (
            None,
            torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device),
            0,
        )
        if slots is not None and len(slots):
            image = batch.get("image_features") if image is None else image
            if image is None:
                with dropout_rows(batch.get("image_dropout_keys"), len(batch["pixel_values"])):
                    image = self.vision_model(batch["pixel_values"])
            is_text = torch.ones(len(text_rows), dtype=torch.bool, device=text_rows.device)
            query_rows, prefix = slots.flatten(), Q
            is_text[query_rows] = False
            text_rows = text_rows[is_text]
        prefix_lens = torch.full((len(cu_seqlens) - 1,), prefix)
        keys = batch.get("dropout_keys") if self.training else None
        image_keys = None if keys is None else batch["image_dropout_keys"]
        ctx = QFormerContext(
            cu_seqlens,
            batch["max_len"],
            query_rows,
            text_rows,
            image,
            prefix_lens,
            keys,
            image_keys,
            batch.get("cache"),
        )
        return self.qformer(self.embed(batch), ctx)

    def logits(self, x: Tensor) -> Tensor:
        return self.cls.predictions(x, self.embeddings.word_embeddings.weight)

    def encode_text(self, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Text alone (T,), both directions -> (T, C)."""
        positions = torch.arange(len(ids), device=ids.device)
        cu_seqlens = segments(lengths)
        positions = positions - cu_seqlens[:-1].to(ids.device).repeat_interleave(lengths)
        rows = torch.arange(len(ids), device=ids.device)
        ctx = QFormerContext(cu_seqlens, int(lengths.max()), None, rows, None, keys=keys)
        return self.qformer(self.embed_text(ids, positions), ctx)

    def match(self, image: Tensor, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Matching logits (S, 2) of picture s (S, P, W) with text s:
        the mean over the queries, who see both."""
        queries = self.multimodal(image, ids, lengths, keys)
        with dropout_rows(keys, len(queries)):
            return self.itm_head(queries).mean(1)

    def multimodal(self, image: Tensor, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Query outputs (S, Q, C) of queries and text that see each other, both directions."""
        S, Q, C = len(image), *self.query_tokens.shape[1:]
        query_rows, text_rows, cu_seqlens = interleave(Q, lengths)
        starts = segments(lengths)[:-1].to(ids.device)
        positions = torch.arange(len(ids), device=ids.device) - starts.repeat_interleave(lengths)
        text = self.embed_text(ids, positions)
        x = text.new_empty(S * Q + len(ids), C).index_copy(0, text_rows, text)
        x = x.index_copy(0, query_rows, self.query_tokens.expand(S, -1, -1).flatten(0, 1).to(text.dtype))
        longest, pair_keys = int(cu_seqlens.diff().max()), keys
        if keys is not None:  # (S,) -> one per row: the longest segment's worth, cut to each
            table = spread_keys(keys, longest, salt=3).view(S, longest)
            keys = table[torch.arange(longest, device=ids.device) < (lengths + Q)[:, None]]
        ctx = QFormerContext(
            cu_seqlens, longest, query_rows, text_rows, image, keys=keys, image_keys=pair_keys
        )
        return self.qformer(x, ctx)[query_rows].unflatten(0, (S, Q))

    def image_features(self, queries: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, E), unit length."""
        return F.normalize(self.vision_projection(queries), dim=-1)

    def text_features(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Encoded text -> (S, E) of the first tokens, unit length."""
        return F.normalize(self.text_projection(text[segments(lengths)[:-1].to(text.device).long()]), dim=-1)

    def encode_pictures(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> what match() takes (N, P, W), and image_features() of the queries alone."""
        image = self.vision_model(pixel_values)
        return image, self.image_features(encode_queries(self, image))

    @staticmethod
    def text_of(batch: dict) -> tuple[Tensor, Tensor]:
        """The text rows' places in the stream, and how many each segment has."""
        is_text = torch.ones(len(batch["input_ids"]), dtype=torch.bool, device=batch["input_ids"].device)
        is_text[batch["image_positions"].flatten()] = False
        cu_seqlens = batch["cu_seqlens"].to(is_text.device).long()
        return is_text.nonzero()[:, 0], F.pad(is_text.long().cumsum(0), (1, 0))[cu_seqlens].diff()

    def loss_counts(self, batch: dict) -> list[int]:
        """What each of LOSSES is a sum over: pictures, pairs, tokens."""
        B = len(batch["image_positions"])
        return [B, 3 * B, batch["num_supervised"]]

    def draw(self, scores: Tensor, rows: Tensor, columns: Tensor, purpose: int) -> Tensor:
        """(B,) one column a row, drawn with probabilities softmax(scores) (B, M).

        By adding Gumbel noise that is a hash of the two samples' keys: no number of ranks or their order
        changes it.
        """
        rows, columns = (mix((k ^ (k >> 32)).to(torch.int32)) for k in (rows, columns))
        bits = mix(mix(rows[:, None] + purpose) ^ columns)  # int32 (B, M)
        uniform = (bits.double() + 2**31 + 0.5) / 2**32
        return (scores.double() - (-uniform.log()).log()).argmax(1)

    def losses(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Summed losses (3,) as in LOSSES, and (S, 3, 2): sum and count of each segment (detached). all ranks

        The batch of all ranks is what pictures and texts are contrasted in. `image_ids` (S,), optional: pairs
        of the same picture are positives of each other and never negatives.
        """
        weight = 1.0
        if not len(
            batch["image_positions"]
        ):  # this rank has no sample left, but the others wait for it: a blank one, times 0
            batch, weight = self.blank(batch), 0.0
        B, device = len(batch["image_positions"]), batch["input_ids"].device
        real = B if weight else 0
        rows, lengths = self.text_of(batch)
        ids, keys = batch["input_ids"][rows], batch["image_dropout_keys"]
        dropout = keys if self.training else None
        with dropout_rows(dropout, len(batch["pixel_values"])):
            image = self.vision_model(batch["pixel_values"])

        # a caption begins with [DEC] where it is generated; queries don't see it, so this pass gives them
        # what one without text would
        started = batch["input_ids"].index_fill(
            0, rows[segments(lengths)[:-1].to(device).long()], self.decoder_start
        )
        x = self.hidden({**batch, "input_ids": started}, image)
        with dropout_rows(dropout, B):
            image_feats = self.image_features(x[batch["image_positions"]])  # (B, Q, E)
        text_keys = None if dropout is None else batch["dropout_keys"][rows] + 1
        encoded = self.encode_text(ids, lengths, text_keys)
        with dropout_rows(dropout, B):
            text_feats = self.text_features(encoded, lengths)  # (B, E)

        # contrast: the gathered side is detached, also in one process, as in LAVIS: each direction trains one
        # side
        all_images, first = parallel.gather_rows(image_feats[:real].detach())
        all_texts, _ = parallel.gather_rows(text_feats[:real].detach())
        sim_i2t = torch.einsum("bqe,me->bmq", image_feats, all_texts).amax(-1) / self.temp  # (B, M)
        sim_t2i = torch.einsum("be,mqe->bmq", text_feats, all_images).amax(-1) / self.temp
        M = len(all_texts)
        image_ids = batch.get("image_ids")
        own = torch.arange(first, first + B, device=device)
        if image_ids is None:
            same = F.one_hot(own.clamp(max=M - 1), M).bool()
        else:
            same = image_ids[:, None] == parallel.gather_rows(image_ids[:real])[0]
        targets = same / same.sum(1, keepdim=True) * (1 - self.SMOOTHING) + self.SMOOTHING / M
        itc = (
            -(targets * (sim_i2t.float().log_softmax(-1) + sim_t2i.float().log_softmax(-1))).sum(1) / 2
        )  # (B,)

        # matching: true pairs, hard negative pictures, hard negative texts
        all_keys, _ = parallel.gather_rows(keys[:real])
        with torch.no_grad():
            negative_image, negative_text = (
                self.draw(sim.masked_fill(same, self.MASKED).float().log_softmax(-1), keys, all_keys, purpose)
                for purpose, sim in ((1, sim_t2i), (2, sim_i2t))
            )
        every_image, _ = parallel.gather_rows(image[:real], differentiable=True)
        every_ids, every_length = self.gather_text(ids, lengths, real)
        pairs = torch.cat((own.clamp(max=M - 1), own.clamp(max=M - 1), negative_text))  # texts
        pair_ids, pair_lengths = every_ids[pairs], every_length[pairs]
        pair_ids = pair_ids[torch.arange(pair_ids.shape[1], device=device) < pair_lengths[:, None]]
        pictures = torch.cat((image, every_image[negative_image], image))
        pair_keys = None if dropout is None else torch.cat((dropout, dropout + 1, dropout + 2))
        matched = self.match(pictures, pair_ids, pair_lengths, pair_keys)  # (3B, 2)
        labels = torch.ones(3 * B, dtype=torch.long, device=device)
        labels[B:] = 0
        itm = F.cross_entropy(matched.float(), labels, reduction="none").view(3, B)
        # a pair that is alone, or among pairs of its own picture, has no negative: what was drawn is its
        # positive
        itm = itm[0] + itm[1:].sum(0) * (~same).any(1)  # (B,)

        predicted = (batch["targets"] != IGNORE_INDEX).nonzero()[:, 0]
        with dropout_rows(None if dropout is None else batch["dropout_keys"][predicted]):
            predictions = self.logits(x[predicted]).float()
        lm = F.cross_entropy(
            predictions, batch["targets"][predicted], reduction="none", label_smoothing=self.SMOOTHING
        )
        segment = torch.bucketize(predicted, batch["cu_seqlens"][1:].to(device), right=True)
        lm_sums, lm_counts = torch.zeros(2, B, device=device)
        lm_sums = lm_sums.index_add(0, segment, lm)
        lm_counts = lm_counts.index_add(0, segment, torch.ones_like(lm))
        sums = torch.stack((itc, itm, lm_sums), dim=1)  # (B, 3)
        counts = torch.stack(
            (torch.ones(B, device=device), torch.full((B,), 3.0, device=device), lm_counts), dim=1
        )
        return sums.sum(0) * weight, torch.stack((sums.detach(), counts), dim=-1) * weight

    def blank(self, batch: dict) -> dict:
        """A batch of one sample without meaning."""
        Q, device = self.num_image_tokens, batch["input_ids"].device
        ids = torch.zeros(Q + 2, dtype=torch.long, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return {
            **batch,
            "input_ids": ids,
            "targets": torch.cat((ids[:-1] + IGNORE_INDEX, zero)),
            "max_len": Q + 2,
            "position_ids": torch.arange(Q + 2, device=device),
            "cu_seqlens": torch.tensor([0, Q + 2], dtype=torch.int32),
            "image_positions": torch.arange(Q, device=device)[None],
            "dropout_keys": ids,
            "image_dropout_keys": zero,
        }

    @staticmethod
    def gather_text(ids: Tensor, lengths: Tensor, real: int) -> tuple[Tensor, Tensor]:
        """The texts of all ranks as (M, L) with pads, and their lengths (M,). all ranks"""
        longest = parallel.largest(int(lengths.max()), ids.device)
        padded = torch.zeros(len(lengths), longest, dtype=torch.long, device=ids.device)
        padded[torch.arange(longest, device=ids.device) < lengths[:, None]] = ids
        return parallel.gather_rows(padded[:real])[0], parallel.gather_rows(lengths[:real])[0]

    def forward(self, batch: dict, output: str = "loss", x: None = None, blocks: None = None):
        """`output`: "loss" as losses(); "logits" (S, V) of each segment's last position (captioning with
        stage 1 alone); "itc" (S, S) similarities of every picture with every text; "itm" (S,) probability
        that picture and text match. `x`, `blocks`: a pipeline's, for which this model has no stages."""
        assert x is None and blocks is None, "stage 1 has no pipeline stages"
        if output == "features":
            return self.encode_images(batch["pixel_values"])
        if output == "logits":
            x = self.hidden(batch)
            return self.logits(x[batch["cu_seqlens"][1:].to(x.device) - 1])
        if output == "loss":
            return self.losses(batch)
        rows, lengths = self.text_of(batch)
        (image, image_feats), ids = self.encode_pictures(batch["pixel_values"]), batch["input_ids"][rows]
        if output == "itm":
            return self.match(image, ids, lengths).softmax(-1)[:, 1]
        text_feats = self.text_features(self.encode_text(ids, lengths), lengths)
        return torch.einsum("bqe,me->bmq", image_feats, text_feats).amax(-1)

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        """The tower's output (N, P, W): the queries look at it in every pass anew."""
        return self.vision_model(pixel_values)

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.losses(batch)  # of three passes of its own, not of one hidden state

    def cache_group(self, length: int) -> int:
        return 0

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        init_weights(self.config, name, tensor, generator)


def init_weights(config: Blip2Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fills one full-size parameter for training from scratch: N(0, 0.02), T5 by fan-in."""
    std = 0.02
    if config.is_t5 and name.startswith("language_model.") and tensor.ndim == 2:
        t = config.text
        kind = name.split(".")[-2]
        std = {
            "shared": 1.0,
            "q": (t.d_model * t.d_kv) ** -0.5,
            "o": (t.num_heads * t.d_kv) ** -0.5,
            "wo": t.d_ff**-0.5,
        }.get(
            kind,
            t.d_model**-0.5,  # the original draws lm_head from N(0, 1), which begins at a loss of hundreds
        )
    if name == "temp":
        tensor.fill_(0.07)
    elif name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim == 1:  # norms
        tensor.fill_(1.0)
    else:
        tensor.normal_(0, std, generator=generator)


def build_model(config: dict) -> Blip2 | Blip2Qformer:
    """The model for a config.json's contents; create it under `torch.device("meta")` and load the weights
    after."""
    config = Blip2Config.from_dict(config)
    return Blip2Qformer(config) if config.qformer.use_qformer_text_input else Blip2(config)


def check_dtype(config: dict, dtype: torch.dtype) -> None:
    """ValueError for a number format that the model's activations leave."""
    kind = config["text_config"]["model_type"]
    if kind == "t5" and dtype == torch.float16:
        raise ValueError("Flan-T5 overflows in fp16 (float16): use bf16 (bfloat16) or fp32 (float32)")


def aliases(config: dict) -> dict[str, str]:
    """Names that files may hold beside, or instead of, the tied one that they say the same as."""
    text = config.get("text_config") or {}
    if text.get("model_type") == "opt":
        tied = {"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"}
        return {} if text.get("tie_word_embeddings") is False else tied
    return {
        f"language_model.{stack}.embed_tokens.weight": "language_model.shared.weight"
        for stack in ("encoder", "decoder")
    }


def untied(config: dict) -> dict | None:
    """The same with a vocabulary projection of its own; None for Flan-T5, whose encoder and decoder share
    words."""
    text = config["text_config"]
    return (
        {**config, "text_config": {**text, "tie_word_embeddings": False}}
        if text["model_type"] == "opt"
        else None
    )


# Parameters of each part, for the start-up table: the first pattern that matches
PARTS = {
    "vision": "vision_model.*",
    "resampler": "q*",  # query_tokens, qformer
    "projection": "*_projection.*",
    "language model": "language_model.*",
    "text embedding": "embeddings.*",
    "heads": "*",
}
IMAGE_PARAMETERS = ["vision_model.*", "q*", "language_projection.*"]  # what a picture's features depend on
STAGES = ("sft", "pretrain1", "pretrain2")
IGNORED_WEIGHTS: list[str] = []  # names that files hold but this file recomputes
# Frozen by stage: not the tower's last norm, which both stages train. What fine-tuning freezes is the
# configuration's choice.
_TOWER = ["vision_model.embeddings.*", "vision_model.encoder.*"]
PRETRAIN_FREEZE = {"pretrain1": _TOWER, "pretrain2": [*_TOWER, "language_model.*"]}
LORA_TARGETS = [r"language_model\.(model\.decoder\.layers.*\.(q_proj|v_proj)|.*Attention\.(q|v))"]
# Names of the toolkit PaddleMIX inside patterns of the configuration -> ours
LEGACY_NAMES = {
    "language_model.opt.": "language_model.model.",
    "visual_encoder": "vision_model",
    "Qformer": "qformer",
}
# How a weight is cut over tensor-parallel ranks: (kind, number of equal blocks packed along the cut
# dimension)
TP_PLAN = {
    "vision_model.encoder.layers.*.self_attn.qkv": ("column", 3),
    "vision_model.encoder.layers.*.self_attn.projection": ("row", 1),
    "vision_model.encoder.layers.*.mlp.fc1": ("column", 1),
    "vision_model.encoder.layers.*.mlp.fc2": ("row", 1),
    "qformer.encoder.layer.*attention.attention.query": ("column", 1),
    "qformer.encoder.layer.*attention.attention.key": ("column", 1),
    "qformer.encoder.layer.*attention.attention.value": ("column", 1),
    "qformer.encoder.layer.*.intermediate*.dense": ("column", 1),
    "qformer.encoder.layer.*output*.dense": ("row", 1),
    "language_model.model.decoder.embed_tokens": ("vocab", 1),
    "language_model.model.decoder.layers.*.self_attn.[qkv]_proj": ("column", 1),
    "language_model.model.decoder.layers.*.self_attn.out_proj": ("row", 1),
    "language_model.model.decoder.layers.*.fc1": ("column", 1),
    "language_model.model.decoder.layers.*.fc2": ("row", 1),
    "language_model.shared": ("vocab", 1),
    "language_model.*.relative_attention_bias": ("heads", 1),
    "language_model.*Attention.[qkv]": ("column", 1),
    "language_model.*Attention.o": ("row", 1),
    "language_model.*DenseReluDense.wi_[01]": ("column", 1),
    "language_model.*DenseReluDense.wo": ("row", 1),
    "language_model.lm_head": ("vocab", 1),
}
# Which pipeline stages have a parameter: a block's own stage; the first or last one (OPT's word embedding is
# its vocabulary projection too). Stage 1 of pre-training and Flan-T5 are not cut: their passes cross all of
# the layers.
PIPELINE = {
    "blocks": "language_model.model.decoder.layers",
    "first": ["vision_model.*", "q*", "language_projection.*", "language_model.model.decoder.embed_*"],
    "last": [
        f"language_model.{n}.*"
        for n in ("model.decoder.final_layer_norm", "model.decoder.embed_tokens", "lm_head")
    ],
}


def tp_plan(config: Blip2Config, degree: int) -> dict[str, tuple[str, int]]:
    """TP_PLAN for a degree, ValueError where it does not fit. A Q-Former with too few heads stays whole."""
    v, q, t = config.vision, config.qformer, config.text
    sizes = {
        "vision_config.num_attention_heads": v.num_attention_heads,
        "vision_config.intermediate_size": v.intermediate_size,
    }
    if not q.use_qformer_text_input:
        sizes["text_config's number of heads"] = t.num_heads if config.is_t5 else t.num_attention_heads
        sizes |= {"text_config's MLP width": config.mlp_width, "text_config.vocab_size": t.vocab_size}
    parallel.check_degree(degree, sizes)
    whole = q.num_attention_heads % degree or q.intermediate_size % degree
    return {name: cut for name, cut in TP_PLAN.items() if not (whole and name.startswith("qformer."))}


def forward_flops(
    config: Blip2Config, tokens: int, supervised: int, images: int, segment_length: float
) -> dict[str, float]:
    """FLOPs of one forward pass by part (a multiply-add counts two): tokens in the stream, supervised tokens,
    pictures."""
    v, q, C, N = config.vision, config.qformer, config.hidden_size, config.num_hidden_layers
    W, P, Q, E = (
        v.hidden_size,
        (v.image_size // v.patch_size) ** 2 + 1,
        config.num_query_tokens,
        q.hidden_size,
    )
    tower = v.num_hidden_layers * (2 * P * (4 * W * W + 2 * W * v.intermediate_size) + 4 * P * P * W)
    cross = -(-q.num_hidden_layers // q.cross_attention_frequency)
    qformer = q.num_hidden_layers * (2 * Q * (4 * E * E + 2 * E * q.intermediate_size) + 4 * Q * Q * E)
    qformer += cross * (2 * (2 * Q * E * E + 2 * P * W * E) + 4 * Q * P * E)
    result = {
        "vision": float(images * (tower + 2 * 3 * v.patch_size**2 * W * P)),
        "resampler": float(images * qformer),
    }
    if q.use_qformer_text_input:  # three passes over the text, and queries in two more
        text = tokens * 2 * (4 * E * E + 2 * E * q.intermediate_size) * q.num_hidden_layers
        return {
            **result,
            "resampler": images * 4 * qformer + 5.0 * text,
            "head": 2.0 * supervised * E * q.vocab_size,
        }
    inner, mlp = (config.text.num_heads * config.text.d_kv, 3) if config.is_t5 else (C, 2)
    block = 2 * (4 * C * inner + mlp * C * config.mlp_width)
    if config.is_t5:  # a token passes one of the two stacks
        N = N / 2
    result["language model"] = tokens * N * (block + 4 * inner * segment_length / 2)
    return {**result, "head": 2.0 * supervised * C * config.vocab_size}


# --------------------------------------------------------------------------------------------------
# LAVIS's names. {} is a layer number.

LAVIS_NAMES = {
    "query_tokens": "query_tokens",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "visual_encoder.blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "visual_encoder.blocks.{}.attn.qkv": "vision_model.encoder.layers.{}.self_attn.qkv",
    "visual_encoder.blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.projection",
    "visual_encoder.blocks.{}.mlp": "vision_model.encoder.layers.{}.mlp",
    "ln_vision": "vision_model.post_layernorm",
    "Qformer.bert.embeddings.LayerNorm": "qformer.layernorm",
    "Qformer.bert.embeddings.word_embeddings": "embeddings.word_embeddings",
    "Qformer.bert.embeddings.position_embeddings": "embeddings.position_embeddings",
    "Qformer.bert.encoder.layer.{}.attention.self": "qformer.encoder.layer.{}.attention.attention",
    "Qformer.bert.encoder.layer.{}.crossattention.self": "qformer.encoder.layer.{}.crossattention.attention",
    "Qformer.bert.encoder.layer": "qformer.encoder.layer",
    "Qformer.cls": "cls",
    "temp": "temp",
    "vision_proj": "vision_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
    "opt_proj": "language_projection",
    "t5_proj": "language_projection",
    "opt_model": "language_model",
    "t5_model": "language_model",
}
# Aliases and a buffer: they say nothing that the other names don't
LAVIS_REDUNDANT = {
    "Qformer.bert.embeddings.position_ids": None,
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
    "opt_model.lm_head.weight": "opt_model.model.decoder.embed_tokens.weight",
    "t5_model.encoder.embed_tokens.weight": "t5_model.shared.weight",
    "t5_model.decoder.embed_tokens.weight": "t5_model.shared.weight",
}


def translate(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if match := re.fullmatch(re.escape(old).replace(r"\{\}", r"(\d+)") + r"((?:\..*)?)", name):
            *layer, rest = match.groups()
            return new.format(*layer) + rest
    raise ValueError(f"no name for {name!r}; expected a tensor of LAVIS's BLIP-2 models")


def from_lavis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LAVIS checkpoint's "model" (or the bare eva_vit_g.pth) under our names. It holds what LAVIS trained,
    so stage-2 files lack the tower and the language model."""
    if (
        "cls_token" in state
    ):  # bare tower; its own norm and head, and the block that BLIP-2 leaves out, belong to EVA-CLIP
        state = {
            f"visual_encoder.{n}": t
            for n, t in state.items()
            if n.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks")
        }
    out = {}
    for name, tensor in state.items():
        if name.endswith(("attn.q_bias", "attn.v_bias")):
            other = name[: -len("q_bias")] + {"q": "v", "v": "q"}[name[-len("q_bias")]] + "_bias"
            if other not in state:
                raise ValueError(f"the file holds {name} but not {other}; fetch it again")
            if name.endswith("attn.q_bias"):
                v = state[name.replace("q_bias", "v_bias")]
                out[translate(name.replace("q_bias", "qkv.bias"), LAVIS_NAMES)] = torch.cat(
                    (tensor, torch.zeros_like(v), v)
                )
        elif name == "temp":
            out[name] = tensor.reshape(1)
        elif name not in LAVIS_REDUNDANT:
            out[translate(name, LAVIS_NAMES)] = tensor
    return out


def from_bert(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A BERT checkpoint under the Q-Former's names, as stage 1 begins: the queries' feed-forwards are copies
    of the text's, one row for [DEC] is added to the vocabulary."""
    dropped = ("pooler", "token_type_embeddings", "seq_relationship", "position_ids", "predictions.decoder")
    words, decoder = (
        next((t for n, t in state.items() if n.endswith(end)), None)
        for end in ("embeddings.word_embeddings.weight", "predictions.decoder.weight")
    )
    if words is not None and decoder is not None and not torch.equal(words, decoder):
        raise ValueError(
            "BERT's predictions.decoder.weight differs from its word embedding, to which it is tied here"
        )
    names = {
        n: n.replace("gamma", "weight").replace("beta", "bias")
        for n in state
        if not any(d in n for d in dropped)
    }
    names = {n: m if m.startswith(("bert.", "cls.")) else f"bert.{m}" for n, m in names.items()}
    out = from_lavis({f"Qformer.{m}": state[n] for n, m in names.items()})
    for name in list(out):
        if match := re.fullmatch(r"(qformer\.encoder\.layer\.\d+\.(?:intermediate|output))(\..*)", name):
            out[f"{match[1]}_query{match[2]}"] = out[name].clone()
    words = out["embeddings.word_embeddings.weight"]
    row = torch.empty(1, words.shape[1]).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    out["embeddings.word_embeddings.weight"] = torch.cat((words, row.to(words.dtype)))
    if "cls.predictions.bias" in out:
        out["cls.predictions.bias"] = F.pad(out["cls.predictions.bias"], (0, 1))
    return out


def fill_stage1(config: dict, state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """`state` with what stage 1 begins anew: queries, cross-attention, heads; projections as nn.Linear's
    default."""
    with torch.device("meta"):
        model = build_model(config)
    for name, p in model.named_parameters():
        if name not in state and not name.startswith(tuple(pattern[:-1] for pattern in _TOWER)):
            generator = torch.Generator().manual_seed(seed + (zlib.crc32(name.encode()) >> 1))
            tensor = torch.empty(p.shape)
            if name.startswith(("vision_projection", "text_projection", "itm_head")):
                bound = config["qformer_config"]["hidden_size"] ** -0.5
                tensor.uniform_(-bound, bound, generator=generator)
            else:
                init_weights(model.config, name, tensor, generator)
            state = {**state, name: tensor}
    return state


def to_lavis(state: dict[str, Tensor], max_positions: int = 512) -> dict[str, Tensor]:
    """The inverse, with LAVIS's aliases and its buffer of text positions. The k third of the towers' biases
    has no place there."""
    lm = "t5" if any(n.startswith("language_model.shared") for n in state) else "opt"
    if lm == "opt" and "language_model.lm_head.weight" in state:
        raise ValueError("an OPT with a vocabulary projection of its own has no counterpart in LAVIS's files")
    other = {"opt": "t5", "t5": "opt"}[lm]
    table = {new: old for old, new in LAVIS_NAMES.items() if not old.startswith(other)}
    out = {}
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            base = translate(name, table).removesuffix("qkv.bias")
            out[base + "q_bias"], out[base + "v_bias"] = q.clone(), v.clone()
        else:
            out[translate(name, table)] = tensor.reshape(()) if name == "temp" else tensor
    for alias, name in LAVIS_REDUNDANT.items():
        if name in out:
            out[alias] = out[name]
    out["Qformer.bert.embeddings.position_ids"] = torch.arange(max_positions)[None]
    return out


# --------------------------------------------------------------------------------------------------
# Tokenizers


def check_merges(path: Path, vocab: dict[str, int]) -> None:
    """ValueError unless merges.txt is whole and in order: a line joins characters or what earlier lines made,
    and all longer tokens of the vocabulary are made by one, but for some added ones."""
    made: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if number == 1 and line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or any(len(part) > 1 and part not in made for part in pair):
            raise ValueError(
                f"{path}:{number}: {line[:40]!r} joins no two tokens that are there before; fetch it again"
            )
        made.add("".join(pair))
    unmade = [token for token in vocab if len(token) > 1 and token not in made]
    if len(unmade) > 64:
        raise ValueError(
            f"{path}: no line makes {len(unmade)} tokens of vocab.json, e.g. {unmade[0]!r}; fetch both again"
        )


class Blip2Tokenizer:
    """OPT's byte-level BPE, T5's Unigram or BERT's WordPiece, from tokenizer.json, vocab.json + merges.txt,
    or vocab.txt.

    encode() adds no special token: the processor does. Those inside a text are read, but for T5's padding
    token, which begins the decoder's part of a sample: it is left out.
    """

    def __init__(self, directory: str | Path, kind: str):
        directory = Path(directory)
        files = {"opt": ("vocab.json", "merges.txt"), "bert": ("vocab.txt",), "t5": ()}[kind]
        if (directory / "tokenizer.json").exists():
            self.model = checkpoint.read_tokenizer(directory / "tokenizer.json")
        elif files and all((directory / f).exists() for f in files):
            paths = [str(directory / f) for f in files]
            self.model = checkpoint.read_tokenizer(
                *paths,
                make=lambda *paths: Tokenizer(
                    models.BPE.from_file(*paths)
                    if kind == "opt"
                    else models.WordPiece.from_file(*paths, unk_token="[UNK]")
                ),
            )
            if kind == "opt":
                check_merges(directory / "merges.txt", self.model.get_vocab())
                self.model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                self.model.decoder = decoders.ByteLevel()
                self.model.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
            else:
                self.model.normalizer = normalizers.BertNormalizer(lowercase=True)
                self.model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
                self.model.decoder = decoders.WordPiece()
                self.model.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        else:
            expected = " or ".join(["tokenizer.json", *(["+".join(files)] if files else [])])
            raise ValueError(f"{directory}: no tokenizer; expected {expected} beside the weights")
        self.kind = kind
        self.model.no_truncation()
        self.model.no_padding()

        def special(token: str) -> int:
            if (i := self.model.token_to_id(token)) is None:
                raise ValueError(
                    f"{directory}: its tokenizer has no {token!r}; expected that of a {kind.upper()} model"
                )
            return i

        if kind == "bert":
            self.begin, self.eos = special("[CLS]"), special("[SEP]")
        elif kind == "opt":
            self.begin, self.eos = special("</s>"), special("</s>")
        else:
            self.begin, self.eos = special("<pad>"), special("</s>")
        self.pad = self.model.token_to_id("<pad>")
        self.vocab_size = 1 + max(self.model.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        ids = self.model.encode(text, add_special_tokens=False).ids if text else []
        return [i for i in ids if i != self.begin] if self.kind == "t5" else ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------
# Pictures, text, prompt format, label mask

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def preprocess_image(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) fp32, normalised: alpha dropped (as LAVIS; transformers 5 puts it on white), aspect
    ratio not kept, PIL's antialiased bicubic rounded to 8 bits."""
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(
        np.ascontiguousarray(((pixels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1))
    )


def _words(text: str, limit: int) -> str:
    words = text.split(" ")
    return " ".join(words[:limit]) if len(words) > limit else text


def caption_text(caption: str, max_words: int = 50) -> str:
    """LAVIS's blip_caption: lower case, some punctuation to blanks, runs of blanks to one."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return _words(caption, max_words)


def question_text(question: str, max_words: int = 50) -> str:
    """LAVIS's blip_question: lower case, the same punctuation deleted."""
    return _words(re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" "), max_words)


class Blip2Processor:
    """Conversations and pictures -> what the model takes. Stage "sft" captions after "a photo of",
    pre-training without a prompt."""

    CAPTION_PROMPT = "a photo of"
    QUESTION_PROMPT = "Question: {} Short answer:"

    def __init__(self, config: Blip2Config, tokenizer: Blip2Tokenizer, stage: str = "sft"):
        stage1, text = config.qformer.use_qformer_text_input, config.text
        room = (
            config.qformer.vocab_size - 1 if stage1 else config.vocab_size
        )  # stage 1 adds [DEC] behind BERT's words
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
                "tokenizer and config.json do not belong together: texts begin and "
                f"end with tokens {tokenizer.begin} "
                f"and {tokenizer.eos}; by text_config with {begin} and {eos}"
            )
        if (stage == "pretrain1") != config.qformer.use_qformer_text_input:
            kind = "a stage-1" if config.qformer.use_qformer_text_input else "a captioning"
            raise ValueError(
                f"stage={stage} and {kind} checkpoint do not go together: "
                "pretrain1 takes a stage-1 checkpoint, "
                "the others don't"
            )
        self.config, self.tokenizer, self.stage = config, tokenizer, stage
        self.image_size, self.num_image_tokens = config.vision.image_size, config.num_query_tokens
        self.kind = "bert" if stage == "pretrain1" else "t5" if config.is_t5 else "opt"
        self.slot = config.image_token_index
        if (
            self.slot is None
        ):  # any token but the one that T5's decoder starts with: features replace its embedding
            self.slot = config.text.eos_token_id if config.is_t5 else config.text.pad_token_id
        self.decoder_start = config.qformer.vocab_size - 1  # stage 1, as in Blip2Qformer
        # OPT ends at a line break; </s>, which stands in front of every text, ends nothing
        self.end = tokenizer.encode("\n") if self.kind == "opt" else [tokenizer.eos]
        self.eos, self.stop_words = self.end[-1], [self.end]
        # what a rank without a sample computes on: both of T5's stacks have a row, so that all ranks do the
        # same
        self.blank_ids = (tokenizer.eos, tokenizer.begin) if self.kind == "t5" else (0,)

    def fingerprint(self) -> str:
        """Changes whenever the same conversation could get other ids."""
        vocabulary = hashlib.sha256(self.tokenizer.model.to_str().encode()).hexdigest()
        return f"blip2-4-{self.stage}-{self.num_image_tokens}-{self.config.max_positions}-{vocabulary}"

    # same as model_qwen_vl.QwenVLProcessor.load_image
    def load_image(self, source: str | Path) -> Tensor:
        """(3, H, W) fp32 of a file or data URL. ValueError naming it for anything that is no whole image."""
        return preprocess_image(open_image(source), self.image_size)

    def check_length(self, length: int) -> None:
        if (limit := self.config.max_positions) is not None and length > limit:
            raise ValueError(
                f"{length} tokens with the picture's, but the model has {limit} "
                "positions; shorten the text, or let "
                f"max_length={limit} cut it"
            )

    def texts(self, conversation) -> tuple[str, str]:
        """(prompt, answer). Earlier turns of a chat are joined by blanks and belong to the prompt."""
        first = next((n for n, (role, _) in enumerate(conversation.turns) if role == "user"), None)
        if first is None:
            raise ValueError("no turn to answer")
        turns = [(role, text_of(content)) for role, content in conversation.turns]
        try:
            image, question = front_image(conversation.turns[first][1])
            turns[first] = ("user", question)
            if len(conversation.images) > (image is not None):
                raise ValueError("one stands in a later turn")
            if image is None:
                raise ValueError("got none")
        except ValueError as e:
            raise ValueError(f"BLIP-2 takes one image, at the front of the first question; {e}") from None
        answer = turns[-1][1] if turns[-1][0] == "assistant" else ""
        questions = turns[:-1] if turns[-1][0] == "assistant" else turns
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
        room = max_length - Q
        if room < 4:
            raise ValueError(
                f"max_length={max_length} leaves no room for text behind the picture's {Q} slots"
            )
        if self.kind == "bert":  # [CLS] text [SEP]
            text = tk.encode(f"{prompt} {answer}".strip())
            ids = [tk.begin, *text[: room - 2], tk.eos]
            supervised, truncated = ids[1:], len(text) > room - 2
        elif self.kind == "t5":  # question </s>, then the decoder's start, answer </s>
            question, reply = tk.encode(prompt), tk.encode(answer)
            head = [*question[: room // 2 - 1], tk.eos, tk.begin]
            supervised = [*reply[: room - len(head) - 1], tk.eos]
            ids, truncated = head + supervised, len(head) + len(supervised) < len(question) + len(reply) + 3
        else:  # </s> question answer "\n"; without a question </s> is learned too, as LAVIS does
            head = [tk.begin, *tk.encode(prompt)]
            reply = tk.encode(f" {answer}" if prompt else answer) + self.end
            ids, truncated = (head + reply)[:room], len(head) + len(reply) > room
            supervised = ids[len(head) if prompt else 0 :]
        self.check_length(Q + len(ids))
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

    def answer_ids(self, text: str) -> list[int]:
        """Ids of the beginning of an answer, behind the prompt, that generation goes on from."""
        return self.tokenizer.encode(f" {text}" if self.kind == "opt" else text)

    def decode(self, ids: list[int]) -> str:
        """The reply: cut at the first end token, blanks at both ends removed."""
        stop = next((i for i, token in enumerate(ids) if token == self.eos), len(ids))
        return self.tokenizer.decode(ids[:stop]).strip()


def probe_batch(processor: Blip2Processor) -> Batch:
    """A fixed prompt with one synthetic picture, to compare two models' logits."""
    tk, Q, size = processor.tokenizer, processor.num_image_tokens, processor.image_size
    text = tk.encode("Question: what is this? Short answer:")
    text = [*text, tk.eos, tk.begin] if processor.kind == "t5" else [tk.begin, *text]
    ids = torch.tensor([processor.slot] * Q + text)
    ramp = torch.linspace(-1, 1, size)
    image = torch.stack((ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], ramp[:, None] * ramp))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_len=len(ids),
        image_positions=torch.arange(Q)[None],
        pixel_values=image[None],
    )


def load_processor(directory: str | Path, stage: str = "sft") -> Blip2Processor:
    """The processor of a checkpoint directory (config.json and tokenizer)."""
    config = Blip2Config.from_dict(checkpoint.read_config(directory))
    side, bert = (
        config.vision.image_size,
        {"do_lower_case": True} if config.qformer.use_qformer_text_input else {},
    )
    checkpoint.check_side_files(
        directory, side, side, add_prefix_space=False, tokenize_chinese_chars=True, **bert
    )
    kind = "bert" if config.qformer.use_qformer_text_input else "t5" if config.is_t5 else "opt"
    return Blip2Processor(config, Blip2Tokenizer(directory, kind), stage)


MODEL = vlm.Model(
    build_model=build_model,
    load_processor=load_processor,
    probe_batch=probe_batch,
    forward_flops=forward_flops,
    parts=PARTS,
    image_parameters=IMAGE_PARAMETERS,
    stages=STAGES,
    pretrain_freeze=PRETRAIN_FREEZE,
    lora_targets=LORA_TARGETS,
    tp_plan=tp_plan,
    pipeline=PIPELINE,
    aliases=aliases,
    untied=untied,
    legacy_names=LEGACY_NAMES,
    contrasted=CONTRASTED,
    check_dtype=check_dtype,
)

# --------------------------------------------------------------------------------------------------
# Commands: LAVIS checkpoints in and out, another resolution


def read_lavis(path: str | Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged pickles raise all sorts of errors
        reason = (str(e).splitlines() or ["cut short"])[0][:200]
        raise ValueError(
            f"{path} can't be read ({type(e).__name__}: {reason}); expected a LAVIS .pth file"
        ) from None
    state = state.get("model", state) if isinstance(state, dict) else state
    checkpoint.check_state(state, path)
    for alias, name in LAVIS_REDUNDANT.items():
        if alias in state and name in state and not torch.equal(state[alias], state[name]):
            raise ValueError(
                f"{path}: {alias} and {name} are one tied tensor in this model, but their values differ"
            )
    return from_lavis(state)


def write_model(
    out: str | Path, config: dict, state: dict[str, Tensor], side_files: str | Path | None
) -> None:
    """A whole checkpoint directory; positions are interpolated where the files' and the config's resolutions
    differ."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(config).named_parameters()}
    name = "vision_model.embeddings.position_embedding"
    table = state[name].shape if name in state else ()
    if len(table) == 3 and math.isqrt(table[1] - 1) ** 2 == table[1] - 1 and table[1] != shapes[name][1]:
        grid = math.isqrt(shapes[name][1] - 1)
        state = {**state, name: resize_positions(state[name], grid, grid)}
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unknown)} have no place "
            f"({', '.join(unknown[:3])}); give the other files too (eva_vit_g.pth, "
            "--base with the language model) and "
            "the config.json that belongs to them"
        )
    wrong = [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(s)}"
        for n, s in shapes.items()
        if state[n].shape != s
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong[:3])}; use the config.json that belongs to these weights")
    for n, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{n} is {tensor.dtype}; expected floating point (quantised files are not read)")
        checkpoint.largest(tensor, n)
    with checkpoint.atomic_dir(out) as temporary:
        checkpoint.save_weights(temporary, ((n, state[n].float()) for n in shapes))
        checkpoint.write_json(temporary / "config.json", {**config, "torch_dtype": "float32"})
        if side_files:
            checkpoint.copy_side_files(side_files, temporary)
        file = temporary / "preprocessor_config.json"
        if file.is_file():  # it may be another resolution's
            side = Blip2Config.from_dict(config).vision.image_size
            checkpoint.write_json(
                file, {**checkpoint.read_json(file, ""), "size": {"height": side, "width": side}}
            )


def without_last_block(config: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """eva_vit_g.pth has one block more than BLIP-2 uses."""
    last = f"vision_model.encoder.layers.{Blip2Config.from_dict(config).vision.num_hidden_layers}."
    return {n: t for n, t in state.items() if not n.startswith(last)}


def read_model(directory: str | Path) -> dict[str, Tensor]:
    return read_all(checkpoint.open_model(directory, MODEL))


def read_all(weights: checkpoint.Weights) -> dict[str, Tensor]:
    return {name: weights.read(name) for name in weights}


def main() -> int:
    parser = terminal.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="LAVIS .pth files -> a checkpoint directory").add_argument
    add("files", nargs="+", help="later files win; parts that none has come from --base")
    add("--config", help="config.json of the model; default: the base's")
    add(
        "--base", help="checkpoint directory with the missing parts (tower, language model) and the tokenizer"
    )
    add("--tokenizer", help="directory of tokenizer files, if not --base")
    add("--out", required=True)
    add = commands.add_parser(
        "init", help="BERT and the tower -> the checkpoint that stage 1 begins with"
    ).add_argument
    add("bert", help="directory of bert-base-uncased: weights, vocab.txt or tokenizer.json")
    add("--tower", required=True, help="eva_vit_g.pth")
    add("--config", help="config.json of the model; default: the published sizes")
    add("--seed", type=int, default=0)
    add("--out", required=True)
    add = commands.add_parser("export", help="a checkpoint directory -> a LAVIS .pth file").add_argument
    add("directory")
    add(
        "--trained_only",
        action="store_true",
        help="leave out the tower and the language model, as LAVIS does when they are frozen",
    )
    add("--out", required=True)
    add = commands.add_parser(
        "resize", help="interpolate the position embedding to another resolution"
    ).add_argument
    add("directory")
    add("out")
    add("--image_size", type=int, required=True)
    args = parser.parse_args()
    if args.command == "import":
        state = read_model(args.base) if args.base else {}
        for path in args.files:
            state |= read_lavis(path)
        if args.config is None and args.base is None:
            raise ValueError("give --config FILE, or --base DIRECTORY")
        config = checkpoint.read_json(args.config or Path(args.base) / "config.json", "give it with --config")
        config["vision_config"] = {
            **config.get("vision_config", {}),
            "post_layernorm_eps": 1e-5,
        }  # LAVIS's nn.LayerNorm
        config["stage1_heads"] = "temp" in state
        with torch.device("meta"):
            wanted = dict(build_model(config).named_parameters())
        if any(n in state for n in ("temp", "itm_head.weight")) and not config["qformer_config"].get(
            "use_qformer_text_input"
        ):
            state = {
                n: t for n, t in state.items() if n in wanted
            }  # a stage-1 file for a stage-2 model: the text branch goes
        elif "language_model" in {n.split(".")[0] for n in state}:
            state = {
                n: t
                for n, t in state.items()
                if n in wanted or not n.startswith("vision_model.encoder.layers.")
            }
        write_model(args.out, config, without_last_block(config, state), args.tokenizer or args.base)
    elif args.command == "init":
        config = (
            checkpoint.read_json(args.config, "give --config") if args.config else PRESETS["blip2-stage1"]
        )
        config = {**config, "vision_config": {**config["vision_config"], "post_layernorm_eps": 1e-5}}
        config["qformer_config"] = {**asdict(QFormerConfig()), **config["qformer_config"]}
        state = {
            **read_lavis(args.tower),
            **from_bert(read_all(checkpoint.open_weights(args.bert)), args.seed),
        }
        state = fill_stage1(config, without_last_block(config, state), args.seed)
        write_model(args.out, config, state, args.bert)
    elif args.command == "export":
        state = read_model(args.directory)
        if args.trained_only:
            state = {
                n: t
                for n, t in state.items()
                if not n.startswith((*(p[:-1] for p in _TOWER), "language_model."))
            }
        positions = Blip2Config.from_dict(
            checkpoint.read_config(args.directory)
        ).qformer.max_position_embeddings
        with checkpoint.atomic_file(args.out) as file:
            torch.save({"model": to_lavis(state, positions)}, file)
    else:
        config = checkpoint.read_config(args.directory)
        Blip2Config.from_dict(config)
        config["vision_config"] = {**config["vision_config"], "image_size": args.image_size}
        write_model(args.out, config, read_model(args.directory), args.directory)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(checkpoint.cli(main))
