"""VisualGLM-6B: EVA ViT-g, a Q-Former with 32 queries, ChatGLM-6B, and everything about its data format.

    python train.py --model visualglm --lora
    python generate.py --model visualglm --image image.png --prompt "这张图片里有什么？"

Text has no batch dimension: a micro-batch is one stream of T tokens, cut into segments (samples) by
`cu_seqlens`. Of each segment the context (up to and without `<sop>`) is seen by every token, the answer is
causal. Numerics follow the Hugging Face code of THUDM/visualglm-6b and, where they differ,
SwissArmyTransformer (SAT) by an option; where this file differs on purpose, it says so. Parameter names are
those of the Hugging Face checkpoint.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

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
from kernels.linear_cross_entropy import IGNORE_INDEX
from kernels.rotary import rotary
from records import front_image, refuse_boxes, text_of
from schema import Depth, Epsilon, Pixels, Scale, Size, TokenId, demand
from tokenizer_visualglm import (
    CLEANUP,
    TEMPLATES,
    TEXT_SPECIALS,
    GLMTokenizer,
    chat_prompt,
    clean_response,
    context_ids,
    context_text,
    glm_positions,
    training_ids,
)
from vlm import Batch, LMHead, even_segments

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class VisionConfig:
    """EVA ViT, config.json's `eva_config`."""

    num_layers: Depth
    hidden_size: Size
    num_attention_heads: Size
    inner_hidden_size: Size
    image_size: list[Pixels]  # height, width
    patch_size: Pixels
    layernorm_epsilon: Epsilon = 1e-6

    @property
    def num_tokens(self) -> int:
        """Of one image: its patches and the class token in front."""
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size) + 1


@dataclass
class QFormerConfig:
    """config.json's `qformer_config`; its vocab_size is the number of queries."""

    num_layers: Depth
    hidden_size: Size
    num_attention_heads: Size
    is_decoder: list[bool]  # which layers attend to the image
    vocab_size: Size = 32
    inner_hidden_size: Size | None = None  # default: 4 x hidden_size
    layernorm_epsilon: Epsilon = 1e-12


@dataclass
class VisualGLMConfig:
    """The fields of the published config.json that change what is computed; other fields of the file are kept
    and ignored."""

    hidden_size: Size
    num_layers: Depth
    num_attention_heads: Size
    inner_hidden_size: Size
    vocab_size: Size
    eva_config: VisionConfig
    qformer_config: QFormerConfig
    layernorm_epsilon: Epsilon = 1e-5
    bos_token_id: TokenId = 130004  # <sop>
    # Ids of the published files; config.json may leave them out.
    eos_token_id: TokenId = 130005  # <eop>
    mask_token_id: TokenId = 130000
    gmask_token_id: TokenId = 130001
    pad_token_id: TokenId = 3
    # HF rounds the rotary frequencies to half precision, whatever dtype follows; SAT >= 0.4.4 does not
    exact_inv_freq: bool = False
    # zh: 问/答, as the Hugging Face code always does; en: Q/A, SAT's English mode
    prompt_language: str = "zh"
    # None of the published files has P-tuning: these two keys come with a training run.
    pre_seq_len: Size | None = None  # P-tuning: keys and values in front of every segment, in each layer
    prefix_projection: bool = False  # P-tuning: made by a two-layer network from embeddings
    initializer_range: Scale = 0.02
    max_sequence_length: Size = 2048  # of the original's chat; nothing is cut at it
    raw: dict = field(default_factory=dict)  # config.json as it was read, written back with the weights

    max_positions: ClassVar[int | None] = None  # rotary positions have no table that ends

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def mlp_width(self) -> int:
        return self.inner_hidden_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        # The Q-Former's "words" are its queries, so their number is that of the features.
        return self.qformer_config.vocab_size

    @classmethod
    def from_dict(cls, raw: dict) -> "VisualGLMConfig":
        """Raises ValueError for a missing field, a wrong type or a
        shape that the architecture cannot have."""
        # Three objects in one file, all somebody else's: checked before a layer is made of their numbers.
        vision = schema.from_json(VisionConfig, raw.get("eva_config"), "config.json: eva_config")
        qformer = schema.from_json(QFormerConfig, raw.get("qformer_config"), "config.json: qformer_config")
        c = schema.from_json(cls, raw, "config.json", eva_config=vision, qformer_config=qformer, raw=raw)
        # Keys whose other values would be another model: refused, not ignored.
        schema.require(raw, "config.json", position_encoding_2d=True, image_length=qformer.vocab_size)
        schema.require(
            raw["eva_config"],
            "config.json: eva_config",
            layernorm_order="pre",
            pre_len=1,
            post_len=0,
            in_channels=3,
            use_final_layernorm=False,
            vocab_size=1,
        )
        schema.require(
            raw["qformer_config"],
            "config.json: qformer_config",
            layernorm_order="post",
            cross_attn_hidden_size=vision.hidden_size,
        )
        demand(
            c.hidden_size % (4 * c.num_attention_heads) == 0,
            f"num_attention_heads={c.num_attention_heads} must cut hidden_size={c.hidden_size} by 4s",
        )
        demand(
            len(vision.image_size) == 2 and not any(n % vision.patch_size for n in vision.image_size),
            f"eva_config.image_size={vision.image_size} must be a height and a width that "
            f"patch_size={vision.patch_size} divides",
        )
        demand(
            vision.hidden_size % vision.num_attention_heads == 0,
            "eva_config: num_attention_heads does not divide hidden_size",
        )
        demand(
            qformer.hidden_size % qformer.num_attention_heads == 0,
            "qformer_config: num_attention_heads does not divide hidden_size",
        )
        demand(
            len(qformer.is_decoder) == qformer.num_layers,
            f"qformer_config.is_decoder must have {qformer.num_layers} entries",
        )
        demand(
            c.prompt_language in TEMPLATES,
            f"prompt_language={c.prompt_language!r}; expected one of {', '.join(TEMPLATES)}",
        )
        return c


# --------------------------------------------------------------------------------------------------
# Language model


@dataclass
class Context:
    """What every block of one forward pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    prefix_lens: Tensor | None  # (S,) host: the context's length, seen by the whole segment
    # Made once a forward pass: they are the same in every block. Two axes, since each half of a head turns by
    # its own.
    cos: Tensor  # (2, T, D/4) fp32: place in the context, place in the answer
    sin: Tensor
    tuned: Tensor | None = None  # P-tuning's (layers, 2, P, H, D) keys and values
    cache: object | None = None  # engine.KVCache


def inverse_frequencies(head_dim: int, exact: bool = False, device=None) -> Tensor:
    """(D/4,) fp32. Each half of a head turns by its own position, so the rotary dimension is D/2."""
    # fp32 on purpose: in bf16 no place beyond 256 has an angle of its own.
    half = torch.arange(0, head_dim // 2, 2, device=device, dtype=torch.float32) / (head_dim // 2)
    # The published model was trained with frequencies rounded to half precision.
    inv_freq = 1.0 / 10000.0**half
    return inv_freq if exact else inv_freq.half().float()


def prepend_to_segments(prefix: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """prefix (P, H, D) in front of each segment of x (T, H, D)."""
    return torch.cat(
        [part for segment in x.split(cu_seqlens.diff().tolist()) for part in (prefix.to(x.dtype), segment)]
    )


class Attention(nn.Module):
    def __init__(self, config: VisualGLMConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer = layer
        self.head_dim = config.head_dim
        # The order of the rows is no detail: the other one gives logits that are off by more than 2.
        self.query_key_value = nn.Linear(C, 3 * C)  # per head: q, k, v (SAT >= 0.4: [all q | all k | all v])
        self.dense = nn.Linear(C, C)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = parallel.copy_to_tp(x, self.query_key_value)
        # Grouped by head, so that a tensor-parallel cut of the rows keeps heads whole.
        # (T, 3C) -> (T, H, 3, D) -> three of (T, H, D).
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)  # 3 x (T, H, D)
        # 2-D rotary: half of a head turns by the place in the context, half by that in the answer.
        q, k = rotary(q, ctx.cos, ctx.sin), rotary(k, ctx.cos, ctx.sin)
        # HF divides the scores by layer + 1 and multiplies them again (fp16 range): nothing is left of that
        tuned = None if ctx.tuned is None else ctx.tuned[self.layer]
        # P-tuning's rows are not turned: they stand at no place, and every token sees them.
        if ctx.cache is not None:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens, ctx.prefix_lens, tuned=tuned)
        elif tuned is None:
            # One mask rule: causal, but every token sees the whole context (prefix_lens).
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal=True, prefix_lens=ctx.prefix_lens)
        else:  # queries stand at the end of their keys
            P = tuned.shape[1]
            # P-tuning: P keys and values in front of each segment, which the context may see too.
            k, v = (prepend_to_segments(p, t, ctx.cu_seqlens) for p, t in zip(tuned, (k, v), strict=True))
            # Segment s is preceded by s + 1 tuned blocks of P rows, its own included.
            cu_seqlens_k = ctx.cu_seqlens + P * torch.arange(len(ctx.cu_seqlens), dtype=torch.int32)
            # The whole segment sees them, as it sees its context.
            prefix_lens = P + (
                ctx.prefix_lens
                if ctx.prefix_lens is not None
                else torch.zeros(len(cu_seqlens_k) - 1, dtype=torch.int64)
            )
            o = attention(q, k, v, ctx.cu_seqlens, cu_seqlens_k, causal=True, prefix_lens=prefix_lens)
        # (T, H, D) -> (T, C)
        return self.dense(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, gelu: str):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, inner)
        self.dense_4h_to_h = nn.Linear(inner, width)
        # The two forms differ by 8e-4 in the logits, so a mix-up would pass for rounding.
        self.gelu = gelu  # "tanh" in the language model, "none" (exact) in the vision tower and the Q-Former

    def forward(self, x: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.dense_h_to_4h)
        # (T, C) -> (T, 4C) -> (T, C)
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, config: VisualGLMConfig, layer: int):
        super().__init__()
        C, eps = config.hidden_size, config.layernorm_epsilon
        # HF forgets to pass num_layers on, so there it is sqrt(56) for any depth; here as in SAT. Equal for
        # 28 layers.
        self.alpha = math.sqrt(2 * config.num_layers)
        # 1e-5 here, 1e-6 in the tower, 1e-12 in the Q-Former: each as its file says.
        self.input_layernorm = nn.LayerNorm(C, eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(C, eps)
        self.mlp = MLP(C, config.inner_hidden_size, "tanh")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # GLM's DeepNorm variant: the residual is the normalised input, scaled by alpha.
        a = self.input_layernorm(x)
        b = self.post_attention_layernorm(self.alpha * a + self.attention(a, ctx))
        # Nothing bypasses a norm: with a plain residual stream the logits are off by more than 3.
        return self.alpha * b + self.mlp(b)  # both residuals start from the normalised input


class PrefixEncoder(nn.Module):
    """P-tuning: the keys and values that every layer sees before a segment's own. Deviation: without HF's
    dropout of 0.1."""

    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        # A key and a value for each layer, in one row of the table.
        P, C, size = config.pre_seq_len, config.hidden_size, 2 * config.num_layers * config.hidden_size
        self.shape = P, config.num_layers, 2, config.num_attention_heads, config.head_dim
        self.embedding = nn.Embedding(P, C if config.prefix_projection else size)
        if config.prefix_projection:
            # All layers' keys and values of a row come from one small vector, through two layers.
            self.trans = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, size))

    def forward(self) -> Tensor:
        """(layers, 2, P, H, D)"""
        x = self.embedding.weight
        x = self.trans(x) if hasattr(self, "trans") else x
        # (P, layers * 2 * C) -> (layers, 2, P, H, D): HF's order of the row.
        return x.view(self.shape).permute(1, 2, 0, 3, 4)


# --------------------------------------------------------------------------------------------------
# Vision: images are a plain batch; inside, their tokens are one stream of N*P rows


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        # [q | k | v], each head-major: not as in the language model
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.query_key_value)
        # (N*P, 3W) -> (N*P, 3, H, D): all of q first, so a cut over ranks takes its rows of each third.
        q, k, v = self.query_key_value(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # 3 x (N*P, H, D)
        # No mask: every patch sees its whole image; cu_seqlens keeps images apart.
        return self.dense(attention(q, k, v, cu_seqlens, cu_seqlens, causal=False).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        W, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = nn.LayerNorm(W, eps)
        self.attention = VisionAttention(W, config.num_attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(W, eps)
        self.mlp = MLP(W, config.inner_hidden_size, "none")

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        # Plain pre-norm, unlike the language model's block.
        x = x + self.attention(self.input_layernorm(x), cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class ViT(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        W = config.hidden_size
        self.transformer = nn.Module()
        # SAT calls every table an embedding of words: this one has a single row.
        self.transformer.word_embeddings = nn.Embedding(1, W)  # the class token
        self.transformer.position_embeddings = nn.Embedding(config.num_tokens, W)
        self.transformer.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        # The names are SAT's, which the Hugging Face files kept.
        self.mixins = nn.ModuleDict()
        self.mixins["patch_embedding"] = nn.Module()
        self.mixins["patch_embedding"].proj = nn.Conv2d(
            3, W, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.mixins["cls"] = nn.Module()
        self.mixins["cls"].ln_vision = nn.LayerNorm(W, 1e-5)  # fixed, not the blocks' 1e-6

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, int]:
        """(N, 3, H, W) -> (N*P, W), P"""
        proj, t = self.mixins["patch_embedding"].proj, self.transformer
        # Patches as rows: (N, 3, H, W) -> (N, W, h, w) -> (N, P-1, W).
        x = proj(pixel_values.to(proj.weight.dtype)).flatten(2).transpose(1, 2)  # (N, P-1, W)
        # The class row goes first and has a position of its own, row 0 of the table.
        x = (
            torch.cat((t.word_embeddings.weight.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
            + t.position_embeddings.weight
        )
        N, P, _ = x.shape
        # An image is a segment: (N, P, W) -> (N*P, W), no batch dimension.
        x, cu_seqlens = x.flatten(0, 1), even_segments(N, P)
        # 39 of EVA-g's 40 blocks: the last one is not in the files.
        for block in t.layers:
            x = block(x, cu_seqlens)
        # The norm takes all rows: the Q-Former looks at the class row too.
        return self.mixins["cls"].ln_vision(x), P


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_width: int):
        super().__init__()
        self.head_dim = width // heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(kv_width, 2 * width)  # [k | v], each head-major
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, image: Tensor, num_images: int) -> Tensor:
        # Both inputs are whole on each rank; their gradients are summed over ranks.
        x, image = (parallel.copy_to_tp(t, self.query) for t in (x, image))
        # Queries of an image see the patches of that image alone.
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # (N*Q, H, D)
        k, v = self.key_value(image).unflatten(-1, (2, -1, self.head_dim)).unbind(1)  # 2 x (N*P, H, D)
        Q, P = q.shape[0] // num_images, k.shape[0] // num_images
        # Segments of Q queries against segments of P patches, image by image.
        o = attention(q, k, v, even_segments(num_images, Q), even_segments(num_images, P), causal=False)
        return self.dense(o.flatten(1))


class QFormerBlock(nn.Module):
    """A BERT layer shifted by one norm: each layer's output norm
    stands in the next one as `input_layernorm`."""

    def __init__(self, config: QFormerConfig, kv_width: int, cross: bool):
        super().__init__()
        W, heads, eps = config.hidden_size, config.num_attention_heads, config.layernorm_epsilon
        # eps 1e-12, BERT's: with 1e-5 the logits are off by 0.6.
        self.input_layernorm = nn.LayerNorm(W, eps)
        self.attention = VisionAttention(W, heads)
        self.post_attention_layernorm = nn.LayerNorm(W, eps)
        # In every second layer: is_decoder says which.
        self.cross_attention = CrossAttention(W, heads, kv_width) if cross else None
        self.post_cross_attention_layernorm = nn.LayerNorm(W, eps) if cross else None
        self.mlp = MLP(W, config.inner_hidden_size or 4 * W, "none")

    def forward(self, x: Tensor, image: Tensor, num_images: int) -> Tensor:
        # The norm that BERT has at the end of the layer before, or of its embedding.
        a = self.input_layernorm(x)
        # Post-norm, as BERT: the sum is normalised, not the branch.
        queries = even_segments(num_images, x.shape[0] // num_images)
        y = self.post_attention_layernorm(a + self.attention(a, queries))
        # The image is asked behind the queries' own exchange, not before it.
        if self.cross_attention is not None:
            y = self.post_cross_attention_layernorm(y + self.cross_attention(y, image, num_images))
        # Its norm is the next layer's input_layernorm, or the final one.
        return y + self.mlp(y)


class QFormer(nn.Module):
    def __init__(self, config: QFormerConfig, kv_width: int):
        super().__init__()
        self.transformer = nn.Module()
        # No position is added: queries are told apart by themselves.
        self.transformer.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)  # the queries
        self.transformer.layers = nn.ModuleList(
            QFormerBlock(config, kv_width, cross) for cross in config.is_decoder
        )
        self.transformer.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, image: Tensor, num_images: int) -> Tensor:
        """(N*P, W) -> (N*Q, C)"""
        # Every image starts from the same learned queries: (Q, C) -> (N*Q, C).
        x = self.transformer.word_embeddings.weight.repeat(num_images, 1)
        for block in self.transformer.layers:
            x = block(x, image, num_images)
        return self.transformer.final_layernorm(x)


class ImageEncoder(nn.Module):
    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        self.vit = ViT(config.eva_config)
        self.qformer = QFormer(config.qformer_config, config.eva_config.hidden_size)
        self.glm_proj = nn.Linear(config.qformer_config.hidden_size, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> features (N, Q, C) of the language model."""
        # (N, 3, H, W) -> (N*P, W), one row a patch and one for the class.
        image, P = self.vit(pixel_values)
        N = image.shape[0] // P
        # (N*Q, E) -> (N*Q, C) -> (N, Q, C); neither scaled nor normalised before it stands in the stream.
        return self.glm_proj(self.qformer(image, N)).unflatten(0, (N, -1))


# --------------------------------------------------------------------------------------------------
# The whole model


class VisualGLM(nn.Module):
    LOSSES = ("loss",)
    # The contract's facts (vlm.Network): two axes of positions, and a prompt that sees itself whole, so that
    # it is never computed in pieces.
    pipeline_obstacle, position_axes = None, 2
    prefill, encoder_decoder = "whole", False
    # what a decoding step adds to a sequence's last position: the place in the context stays, that in the
    # answer grows
    position_step = torch.tensor([[0], [1]])

    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        self.config = config
        # Names are the Hugging Face files'.
        self.image_encoder = ImageEncoder(config)
        self.transformer = nn.Module()
        self.transformer.word_embeddings = vlm.TokenEmbedding(config.vocab_size, config.hidden_size)
        self.transformer.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.transformer.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        if config.pre_seq_len:
            # Beside the blocks, not in them: one table serves all layers.
            self.transformer.prefix_encoder = PrefixEncoder(config)
        # not tied to word_embeddings
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_image_tokens

    @property
    def prefix_rows(self) -> int:
        return self.config.pre_seq_len or 0

    @property
    def image_size(self) -> tuple[int, int]:
        # The tower's table of positions fixes both.
        height, width = self.config.eva_config.image_size
        return height, width

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.layers

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.image_encoder.vit.transformer.layers

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.image_encoder(pixel_values)  # no dropout of its own, so no use for keys

    def embed(self, batch: Batch) -> Tensor:
        """The tokens' embeddings (T, C), the images' features at their places."""
        return vlm.splice_images(self.transformer.word_embeddings(batch.input_ids), batch, self.encode_images)

    def cache_group(self, length: int) -> int:
        # Nothing depends on the prompt's length: all cached keys may be shared.
        return 0

    def context(self, batch: Batch) -> Context:
        """`position_ids` (2, T) as `glm_positions` makes them; (T,) stands for a stream without answers."""
        c, positions = self.config, batch.position_ids
        # Text alone, without an answer yet: everything is context.
        if positions.ndim == 1:
            positions = torch.stack((positions, torch.zeros_like(positions)))
        inv_freq = inverse_frequencies(c.head_dim, c.exact_inv_freq, positions.device)
        # fp32: 16-bit angles lose the position past 256 (the original under .half() and .bfloat16() computes
        # them so)
        angles = positions[..., None].float() * inv_freq  # (2, T, D/4)
        # Made once a forward pass, then each rank of a tensor-parallel group keeps its heads.
        tuned = parallel.heads_of_rank(self.transformer.prefix_encoder(), dim=3) if c.pre_seq_len else None
        return Context(batch.cu_seqlens, batch.prefix_lens, angles.cos(), angles.sin(), tuned, batch.cache)

    # same as model_qwen_vl.QwenVL.hidden
    def hidden(self, batch: Batch, x: Tensor | None = None, blocks=None) -> Tensor:
        """(T, C) behind the blocks. A pipeline stage gives what it received, `x` (T, C), and its own
        `blocks`."""
        x, ctx = self.embed(batch) if x is None else x, self.context(batch)
        with dropout_rows(batch.dropout_keys):
            for block in self.blocks if blocks is None else blocks:
                x = block(x, ctx)
        return x

    def logits(self, x: Tensor) -> Tensor:
        # The last block's sum holds alpha times a normalised row: brought back to scale before the head.
        return self.lm_head(self.transformer.final_layernorm(x))

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss of the supervised tokens and each one's own loss (detached), in stream order."""
        # Only supervised rows reach the vocabulary: (T, C) -> (rows, C).
        x = self.transformer.final_layernorm(x[batch.supervised])
        return self.lm_head(x, batch.targets[batch.supervised])

    def forward(self, batch: Batch, output: str = "loss", x: Tensor | None = None, blocks=None):
        return vlm.run(self, batch, output, x, blocks)

    def loss_counts(self, batch: Batch) -> list[int]:
        return [batch.num_supervised]

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fills one full-size parameter for training from scratch: normal, output layers of the blocks
        smaller by depth."""
        # By name, since a parameter may arrive as a shard of itself.
        c = self.config
        if name.endswith("bias"):
            tensor.zero_()
        elif "layernorm" in name or "ln_vision" in name:
            tensor.fill_(1.0)
        # Small: a fresh prefix should hardly change what the model says.
        elif "prefix_encoder" in name:
            tensor.normal_(0, 0.01, generator=generator)
        else:
            # What a block adds starts smaller, the deeper the model is.
            deep = name.startswith("transformer.") and name.endswith(("dense.weight", "dense_4h_to_h.weight"))
            tensor.normal_(
                0, c.initializer_range / (math.sqrt(2 * c.num_layers) if deep else 1.0), generator=generator
            )


def build_model(config: dict) -> VisualGLM:
    """The model for a config.json's contents; create it under `torch.device("meta")` and load the weights
    after."""
    return VisualGLM(VisualGLMConfig.from_dict(config))


# How a weight is cut over tensor-parallel ranks: (kind, number of equal blocks packed along the cut
# dimension)
TP_PLAN = {
    "transformer.word_embeddings": ("vocab", 1),
    "transformer.layers.*.attention.query_key_value": (
        "column",
        1,
    ),  # grouped by head: a cut keeps heads whole
    "transformer.layers.*.attention.dense": ("row", 1),
    "transformer.layers.*.mlp.dense_h_to_4h": ("column", 1),
    "transformer.layers.*.mlp.dense_4h_to_h": ("row", 1),
    # Three packed blocks, each cut by itself: a rank gets the same heads of q, k and v.
    "image_encoder.vit.transformer.layers.*.attention.query_key_value": ("column", 3),
    "image_encoder.vit.transformer.layers.*.attention.dense": ("row", 1),
    "image_encoder.vit.transformer.layers.*.mlp.dense_h_to_4h": ("column", 1),
    "image_encoder.vit.transformer.layers.*.mlp.dense_4h_to_h": ("row", 1),
    "image_encoder.qformer.transformer.layers.*.attention.query_key_value": ("column", 3),
    "image_encoder.qformer.transformer.layers.*.attention.dense": ("row", 1),
    "image_encoder.qformer.transformer.layers.*.cross_attention.query": ("column", 1),
    "image_encoder.qformer.transformer.layers.*.cross_attention.key_value": ("column", 2),
    "image_encoder.qformer.transformer.layers.*.cross_attention.dense": ("row", 1),
    "image_encoder.qformer.transformer.layers.*.mlp.dense_h_to_4h": ("column", 1),
    "image_encoder.qformer.transformer.layers.*.mlp.dense_4h_to_h": ("row", 1),
    "lm_head": ("vocab", 1),
}


def tp_plan(config: VisualGLMConfig, degree: int) -> dict[str, tuple[str, int]]:
    """TP_PLAN for a degree, ValueError where it does not fit. A Q-Former with too few heads stays whole."""
    # A cut must leave whole heads and equal shares on every rank.
    v, q = config.eva_config, config.qformer_config
    parallel.check_degree(
        degree,
        {
            "num_attention_heads": config.num_attention_heads,
            "inner_hidden_size": config.inner_hidden_size,
            "vocab_size": config.vocab_size,
            "eva_config.num_attention_heads": v.num_attention_heads,
            "eva_config.inner_hidden_size": v.inner_hidden_size,
        },
    )
    # A Q-Former of 12 heads is not cut by 8: it stays whole on every rank.
    whole = q.num_attention_heads % degree or (q.inner_hidden_size or 4 * q.hidden_size) % degree
    return {name: cut for name, cut in TP_PLAN.items() if not (whole and ".qformer." in name)}


def lora_parts(config: VisualGLMConfig) -> dict[str, tuple[int, int]]:
    """Packed weights that SAT's LoRA adapts in parts, each with an A and a B of its own: {name pattern: (rows
    are so many groups, each of so many parts)}: per head q, k, v."""
    return {r"transformer\.layers\.\d+\.attention\.query_key_value": (config.num_attention_heads, 3)}


def forward_flops(
    config: VisualGLMConfig, tokens: int, supervised: int, images: int, segment_length: float
) -> dict[str, float]:
    """FLOPs of one forward pass by part (a multiply-add counts two): tokens in the stream, supervised tokens,
    images."""
    c, v, q = config, config.eva_config, config.qformer_config
    C, W, P, E, Q = c.hidden_size, v.hidden_size, v.num_tokens, q.hidden_size, q.vocab_size
    # A multiply-add counts two; GELU's MLP has two matrices.
    block = 2 * (4 * C * C + 2 * C * c.inner_hidden_size)
    vision_block = 2 * P * (4 * W * W + 2 * W * v.inner_hidden_size) + 4 * P * P * W
    self_block = 2 * Q * (4 * E * E + 2 * E * (q.inner_hidden_size or 4 * E)) + 4 * Q * Q * E
    cross = 2 * (2 * Q * E * E + 2 * P * W * E) + 4 * Q * P * E
    adapter = q.num_layers * self_block + sum(q.is_decoder) * cross + 2 * Q * E * C
    return {
        # A token sees half of its segment on average (its context wholly: a little more, which is left out).
        "language model": tokens * c.num_layers * (block + 4 * C * segment_length / 2),
        "head": 2.0 * supervised * C * c.vocab_size,
        "vision": images * (v.num_layers * vision_block + 2 * 3 * v.patch_size**2 * W * (P - 1)),
        "q-former": images * float(adapter),
    }


# --------------------------------------------------------------------------------------------------
# Images, prompt format, label mask

# CLIP's means and deviations of the channels.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def resize_image(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8, `size` being both or that pair: alpha dropped, aspect ratio not kept, PIL's
    antialiased bicubic rounded to 8 bits."""
    height, width = (size, size) if isinstance(size, int) else size
    # Rounded to 8 bits by PIL, as in the original; a resize of floats gives other pixels.
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def preprocess_image(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """(3, height, width) fp32, normalised."""
    pixels = resize_image(image, size).astype(np.float32) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)))


# same as model_qwen_vl.is_chinese
def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


class VisualGLMProcessor:
    """Conversations and images -> what the model takes. `stage` "pretrain" puts nothing but the image
    before a caption."""

    def __init__(self, config: VisualGLMConfig, tokenizer: GLMTokenizer, stage: str = "sft"):
        # A tokenizer of another release has other ids behind the same words (the first one is 20,000 off).
        ids = {
            "<sop>": config.bos_token_id,
            "<eop>": config.eos_token_id,
            "[MASK]": config.mask_token_id,
            "[gMASK]": config.gmask_token_id,
            "<pad>": config.pad_token_id,
        }
        for token, expected in ids.items():
            if tokenizer.ids[token] != expected:
                raise ValueError(
                    f"tokenizer and config.json do not belong together: {token} is token "
                    f"{tokenizer.ids[token]}, config.json says {expected}"
                )
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, config.json's "
                f"vocab_size is {config.vocab_size}"
            )
        self.config, self.tokenizer, self.stage = config, tokenizer, stage
        height, width = config.eva_config.image_size
        # One number for a square, as the other models' processors have it.
        self.image_size = height if height == width else (height, width)
        self.num_image_tokens = config.num_image_tokens
        self.eos = tokenizer.eop
        self.stop_words = [[tokenizer.eop]]
        self.blank_ids, self.token_bytes = (0,), ()

    def fingerprint(self) -> str:
        """Changes whenever the same conversation could get other ids."""
        language, slots = self.config.prompt_language, self.num_image_tokens
        # 3: raised by hand when encode() changes, so that cached indices are made anew.
        return f"visualglm-3-{self.stage}-{language}-{slots}-{self.tokenizer.fingerprint}"

    # same as model_qwen_vl.QwenVLProcessor.load_image
    def load_image(self, source: str | Path) -> Tensor:
        """(3, H, W) fp32 of a file or data URL. ValueError naming it for anything that is no whole image."""
        return preprocess_image(open_image(source), self.image_size)

    def rounds(self, conversation) -> list[tuple[str, str | None]]:
        """(question, answer) pairs without the image; the last answer may be missing. A system text, which
        the format has no place for, begins the first question. ValueError for more than one image or one
        inside the text."""
        refuse_boxes(conversation, "VisualGLM")
        system = "".join(f"{text_of(content)}\n" for role, content in conversation.turns if role == "system")
        turns = [content for role, content in conversation.turns if role != "system"]
        if not turns:
            raise ValueError("no turn to answer")
        try:
            # One place for an image, in front of everything: the format has no other.
            image, first = front_image(turns[0])
            if len(conversation.images) > (image is not None):
                raise ValueError("one stands in a later turn")
        except ValueError as e:
            raise ValueError(f"VisualGLM takes one image, at the front of the first question; {e}") from None
        # Pairs of question and answer; the last one may be open.
        texts = [system + first, *map(text_of, turns[1:])]
        return list(zip(texts[::2], [*texts[1::2], None] if len(texts) % 2 else texts[1::2], strict=True))

    def context(self, conversation, rounds, slot: int) -> tuple[list[int], list[int]]:
        """Ids before [gMASK] and the image's first slot: the rounds but the last one's answer."""
        query, earlier = self.worded(conversation, rounds[-1][0]), rounds[:-1]
        # Captions of pre-training follow the image directly, without 问 and 答.
        alone = self.stage == "pretrain" and not query and not earlier
        text = "" if alone else context_text(query, earlier, self.config.prompt_language)
        return context_ids(self.tokenizer, text, self.num_image_tokens if conversation.images else 0, slot)

    def sample(self, ids, labels, starts, conversation, truncated: bool) -> dict:
        tk = self.tokenizer
        # The border of the context stands in the ids, so it needs no second source.
        positions, context = glm_positions(ids, tk.sop, tk.gmask, tk.mask)
        return {
            "input_ids": np.array(ids, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int32),
            "position_ids": positions,
            "prefix_len": context,
            "image_starts": starts,
            "images": conversation.images,
            "truncated": truncated,
        }

    def encode(self, conversation, max_length: int) -> dict:
        """One training sample: ids, unshifted labels, slots, positions. Only the last answer is supervised:
        the format has one `<sop>`, and earlier rounds are context, which every token sees. A long answer is
        cut at its end."""
        rounds = self.rounds(conversation)
        # SAT's filler, since training follows SAT; prompts below have HF's.
        context, starts = self.context(conversation, rounds, self.tokenizer.pad)
        ids, labels = training_ids(self.tokenizer, context, rounds[-1][1])
        # [gMASK], <sop> and a token to learn.
        if len(context) + 3 > max_length:
            raise ValueError(
                f"the question alone has {len(context)} tokens: no answer fits within max_length={max_length}"
            )
        # The context comes first and fits, so that only the answer can be cut.
        return self.sample(ids[:max_length], labels[:max_length], starts, conversation, len(ids) > max_length)

    def prompt(self, conversation) -> dict:
        """The ids that generation starts from; a trailing answer is left out."""
        try:
            context, starts = self.context(conversation, self.rounds(conversation), self.tokenizer.unk)
            ids = [*context, self.tokenizer.gmask, self.tokenizer.sop]
            # HF's repetition penalty counts every id of the prompt, the slots' <unk> too
            return {**self.sample(ids, [IGNORE_INDEX] * len(ids), starts, conversation, False), "seen": ids}
        except ValueError as e:
            raise ValueError(f"{conversation.where}: {e}") from None

    def worded(self, conversation, query: str) -> str:
        """The question; for a caption a request for one, which pre-training has not."""
        # A question of the record's own wins.
        if conversation.kind != "caption" or query and self.stage != "pretrain":
            return query
        if self.stage == "pretrain":
            return ""
        return "描述这张图片。" if is_chinese("".join(conversation.answers)) else "Describe this image."

    def template(self) -> dict:
        """As model_qwen_vl.QwenVLProcessor.template, in this model's wording."""
        tk = self.tokenizer
        return {
            "images": [0, 1],
            "start": [],
            "image_text": "<img>",
            "image": [tk.unk] * self.num_image_tokens,
            "first_place": 0,
            "gap": "</img>",
            "text": TEMPLATES[self.config.prompt_language].replace("{}", "{prompt}"),
            "end": [tk.gmask, tk.sop],
            "reserved": TEXT_SPECIALS,
            "skip_special": False,  # in the answer's text
            "cleanup": CLEANUP,
        }

    def asked(self, conversation) -> str:
        """The first question as a text to put behind the image."""
        return self.worded(conversation, self.rounds(conversation)[0][0])

    def answer_ids(self, text: str) -> list[int]:
        """Ids of the beginning of an answer, behind the prompt, that generation goes on from."""
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The reply: cut at the end marker, punctuation restored."""
        ids = list(ids)
        return clean_response(self.tokenizer.decode(ids[: ids.index(self.eos)] if self.eos in ids else ids))


def probe_batch(processor: VisualGLMProcessor) -> Batch:
    """A fixed prompt with one synthetic image, to compare two models' logits."""
    tk, Q = processor.tokenizer, processor.num_image_tokens
    ids = chat_prompt(tk, "What is this? 这是什么？", num_image_tokens=Q)
    positions, context = glm_positions(ids, tk.sop, tk.gmask, tk.mask)
    # Three ramps, so that no channel, row or column can be taken for another.
    rows, columns = (torch.linspace(-1, 1, size) for size in processor.config.eva_config.image_size)
    rows, columns = rows[:, None], columns[None]
    return Batch(
        input_ids=torch.tensor(ids),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        prefix_lens=torch.tensor([context]),
        pixel_values=torch.stack((rows + 0 * columns, columns + 0 * rows, rows * columns))[None],
        image_positions=(len(tk.encode("<img>")) + torch.arange(Q))[None],
    )


def load_processor(directory: str | Path, stage: str = "sft") -> VisualGLMProcessor:
    """The processor of a checkpoint directory (config.json and tokenizer)."""
    config = VisualGLMConfig.from_dict(checkpoint.read_config(directory))
    # num_image_tokens: the first release's tokenizer counts 20,000 ids for images that this model does not
    # have
    checkpoint.check_side_files(
        directory, *config.eva_config.image_size, num_image_tokens=0, do_lower_case=False
    )
    return VisualGLMProcessor(config, GLMTokenizer(directory), stage)


MODEL = vlm.Model(
    build_model=build_model,
    load_processor=load_processor,
    probe_batch=probe_batch,
    forward_flops=forward_flops,
    parts={
        "q-former": "image_encoder.[qg]*",  # Q-Former and glm_proj
        "vision": "image_encoder.*",
        "embedding": "transformer.word_embeddings.*",
        "prefix": "transformer.prefix_encoder.*",
        "language model": "transformer.*",
        "head": "lm_head.*",
    },
    image_parameters=["image_encoder.*"],
    vision_stem=[
        "image_encoder.vit.transformer.*_embeddings.*",
        "image_encoder.vit.mixins.patch_embedding.*",
    ],
    stages=("sft", "pretrain"),
    pretrain_freeze={"pretrain": ["transformer.*", "lm_head.*"]},
    # the official targets, in the language model only
    lora_targets=[
        r"transformer\.layers\.\d+\.attention\.query_key_value",
        r"transformer\.layers\.\d+\.attention\.dense",
    ],
    tp_plan=tp_plan,
    pipeline={
        "blocks": "transformer.layers",
        "first": ["image_encoder.*", "transformer.word_embeddings.*"],
        "last": ["transformer.final_layernorm.*", "lm_head.*"],
    },
    # in published files; the original ignores them too
    ignored_weights=["transformer.layers.*.attention.rotary_emb.inv_freq"],
    legacy_names={
        "vision_model": "image_encoder.vit",
        "language_projection": "image_encoder.glm_proj",
        "language_model.chatglm.": "",
        "query_tokens": "image_encoder.qformer.transformer.word_embeddings.*",
    },
    prefix_tuning="transformer.prefix_encoder.*",
    lora_parts=lora_parts,
)
