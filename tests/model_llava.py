"""LLaVA-1.5 (arXiv:2310.03744): a CLIP tower, a two-layer projector, Llama with grouped key/value heads.

A model that the project does not ship, in one file: with this directory on PYTHONPATH every script trains,
runs, scores, merges and dry-runs it. It reads what transformers' LlavaForConditionalGeneration saves.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

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
from kernels.norm import rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu
from records import text_of
from schema import Depth, Epsilon, Pixels, Size, TokenId

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class VisionConfig:
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    image_size: Pixels
    patch_size: Pixels
    layer_norm_eps: Epsilon = 1e-5


@dataclass
class TextConfig:
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Size
    max_position_embeddings: Size = 2048  # trained with; rotary positions have no table that ends
    rms_norm_eps: Epsilon = 1e-6
    bos_token_id: TokenId = 1
    eos_token_id: TokenId = 2


@dataclass
class LlavaConfig:
    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: TokenId
    raw: dict = field(default_factory=dict)
    max_positions = None

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def num_hidden_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def mlp_width(self) -> int:
        return self.text_config.intermediate_size

    @property
    def num_image_tokens(self) -> int:
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @classmethod
    def from_dict(cls, raw: dict) -> "LlavaConfig":
        parts = {
            key: schema.from_json(kind, raw.get(key), f"config.json: {key}")
            for key, kind in (("vision_config", VisionConfig), ("text_config", TextConfig))
        }
        # what this file computes; anything else would be another model
        schema.require(raw, "config.json", vision_feature_layer=-2, vision_feature_select_strategy="default")
        schema.require(raw["vision_config"], "config.json: vision_config", hidden_act="quick_gelu")
        schema.require(raw["text_config"], "config.json: text_config", hidden_act="silu", mlp_bias=False)
        return schema.from_json(cls, raw, "config.json", **parts, raw=raw)


# --------------------------------------------------------------------------------------------------
# Llama


@dataclass
class Context:
    """What every block of one forward pass shares."""

    cu_seqlens: Tensor  # (S+1,) host
    cos: Tensor  # (T, D/2) fp32
    sin: Tensor
    cache: object | None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        C, self.layer = config.hidden_size, layer
        self.head_dim = C // config.num_attention_heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = parallel.copy_to_tp(x, self.q_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(q, ctx.cos, ctx.sin), rotary(k, ctx.cos, ctx.sin)  # (T, H, D), (T, H of keys, D)
        if ctx.cache is None:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal=True)
        else:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens)
        return self.o_proj(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.gate_proj)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------
# CLIP ViT: the hidden states before its last block, without the class token


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = parallel.copy_to_tp(x, self.q_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, cu_seqlens, cu_seqlens, causal=False).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(parallel.copy_to_tp(x, self.fc1))
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(config), VisionMLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cu_seqlens)
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(C))
        self.embeddings.patch_embedding = nn.Conv2d(3, C, P, P, bias=False)
        self.embeddings.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, C)
        self.pre_layrnorm = nn.LayerNorm(C, config.layer_norm_eps)  # the published spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(C, config.layer_norm_eps)  # in the files, but never used

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, C)"""
        e = self.embeddings
        x = e.patch_embedding(pixel_values.to(e.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((e.class_embedding.expand(len(x), 1, -1), x), 1) + e.position_embedding.weight
        N, P, _ = x.shape
        x, cu_seqlens = self.pre_layrnorm(x).flatten(0, 1), vlm.even_segments(N, P)  # (N*P, C)
        for block in self.encoder.layers[:-1]:
            x = block(x, cu_seqlens)
        return x.unflatten(0, (N, P))[:, 1:]


# --------------------------------------------------------------------------------------------------
# The whole model


class Llava(nn.Module):
    LOSSES = ("loss",)
    pipeline_obstacle, position_step, position_axes, prefix_rows = None, 1, 1, 0
    prefill, encoder_decoder = "chunks", False

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config, text = config, config.text_config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear_1 = nn.Linear(config.vision_config.hidden_size, text.hidden_size)
        self.multi_modal_projector.linear_2 = nn.Linear(text.hidden_size, text.hidden_size)
        self.language_model = nn.Module()
        self.language_model.model = llama = nn.Module()
        llama.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        llama.layers = nn.ModuleList(Block(text, i) for i in range(text.num_hidden_layers))
        llama.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.language_model.lm_head = vlm.LMHead(text.hidden_size, text.vocab_size, bias=False)
        self.num_image_tokens = config.num_image_tokens
        self.image_size = config.vision_config.image_size, config.vision_config.image_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.language_model.model.layers

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.vision_tower.encoder.layers[:-1]  # the last one never runs

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        projector = self.multi_modal_projector
        return projector.linear_2(F.gelu(projector.linear_1(self.vision_tower(pixel_values))))

    def embed(self, batch: vlm.Batch) -> Tensor:
        x = self.language_model.model.embed_tokens(batch.input_ids)
        return vlm.splice_images(x, batch, self.encode_images)

    def hidden(self, batch: vlm.Batch, x: Tensor | None = None, blocks=None) -> Tensor:
        x = self.embed(batch) if x is None else x
        D = self.config.hidden_size // self.config.text_config.num_attention_heads
        half = torch.arange(0, D, 2, device=batch.position_ids.device, dtype=torch.float32) / D
        angles = batch.position_ids[:, None].float() / 10000.0**half  # (T, D/2) fp32
        ctx = Context(batch.cu_seqlens, angles.cos(), angles.sin(), batch.cache)
        with dropout_rows(batch.dropout_keys):
            for block in self.blocks if blocks is None else blocks:
                x = block(x, ctx)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.language_model.lm_head(self.language_model.model.norm(x))

    def head(self, x: Tensor, batch: vlm.Batch) -> tuple[Tensor, Tensor]:
        x = self.language_model.model.norm(x[batch.supervised])
        return self.language_model.lm_head(x, batch.targets[batch.supervised])

    def forward(self, batch: vlm.Batch, output: str = "loss", x: Tensor | None = None, blocks=None):
        return vlm.run(self, batch, output, x, blocks)

    def loss_counts(self, batch: vlm.Batch) -> list[int]:
        return [batch.num_supervised]

    def cache_group(self, length: int) -> int:
        return 0

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0, 0.02, generator=generator)


def tp_plan(config: LlavaConfig, degree: int) -> dict[str, tuple[str, int]]:
    text, vision = config.text_config, config.vision_config
    sizes = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "vision_config.num_attention_heads": vision.num_attention_heads,
        "vision_config.intermediate_size": vision.intermediate_size,
    }
    parallel.check_degree(degree, sizes)
    return {
        "language_model.model.embed_tokens": ("vocab", 1),
        "language_model.lm_head": ("vocab", 1),
        "*layers.*.self_attn.[qkv]_proj": ("column", 1),
        "*layers.*.self_attn.o*_proj": ("row", 1),
        "language_model.*.mlp.gate_proj": ("column", 1),
        "language_model.*.mlp.up_proj": ("column", 1),
        "language_model.*.mlp.down_proj": ("row", 1),
        "vision_tower.*.mlp.fc1": ("column", 1),
        "vision_tower.*.mlp.fc2": ("row", 1),
    }


def forward_flops(config: LlavaConfig, tokens, supervised, images, segment_length) -> dict[str, float]:
    t, v, P = config.text_config, config.vision_config, config.num_image_tokens + 1
    C, W, kv = t.hidden_size, v.hidden_size, t.num_key_value_heads / t.num_attention_heads
    block = 2 * ((2 + 2 * kv) * C * C + 3 * C * t.intermediate_size) + 4 * C * segment_length / 2
    vision_block = 2 * P * (4 * W * W + 2 * W * v.intermediate_size) + 4 * P * P * W
    return {
        "language model": tokens * t.num_hidden_layers * block,
        "head": 2.0 * supervised * C * t.vocab_size,
        "vision": images * ((v.num_hidden_layers - 1) * vision_block + 6 * v.patch_size**2 * W * P),
        "projector": images * 2.0 * P * (W * C + C * C),
    }


# --------------------------------------------------------------------------------------------------
# Tokenizer, image, prompt and label mask (Vicuna's: "USER: ... ASSISTANT: ...</s>")

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


class LlavaProcessor:
    blank_ids, token_bytes = (0,), ()

    def __init__(self, config: LlavaConfig, directory: Path, stage: str):
        self.stage = stage
        self.config, self.tokenizer = config, checkpoint.read_tokenizer(Path(directory) / "tokenizer.json")
        self.image_size, self.num_image_tokens = config.vision_config.image_size, config.num_image_tokens
        self.eos = config.text_config.eos_token_id
        self.stop_words = [[self.eos]]

    def fingerprint(self) -> str:
        return "llava-" + hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def load_image(self, source) -> Tensor:
        image = open_image(source).convert("RGB")
        side = (self.image_size, self.image_size)
        pixels = np.asarray(image.resize(side, Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        return torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1).copy())

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turns(self, conversation) -> tuple[list[int], list[int], list[int]]:
        """-> ids, unshifted labels, the first place of each image."""
        ids, labels, starts = [self.config.text_config.bos_token_id], [IGNORE_INDEX], []
        for role, content in conversation.turns:
            piece = self.ids({"user": "USER: ", "assistant": " ", "system": ""}[role])
            for part in content:
                if isinstance(part, str):
                    piece += self.ids(part)
                else:
                    starts.append(len(ids) + len(piece))
                    piece += [self.config.image_token_index] * self.num_image_tokens + self.ids("\n")
            piece += self.ids(" ASSISTANT:") if role == "user" else []
            piece += [self.eos] if role == "assistant" else []
            ids += piece
            labels += piece if role == "assistant" else [IGNORE_INDEX] * len(piece)
        return ids, labels, starts

    def encode(self, conversation, max_length: int) -> vlm.Sample:
        ids, labels, starts = self.turns(conversation)
        length = min(len(ids), max_length)
        for start in starts:  # an image is whole or not there
            if start < length < start + self.num_image_tokens:
                length = start
        starts = [start for start in starts if start < length]
        return {
            "input_ids": np.array(ids[:length], np.int32),
            "labels": np.array(labels[:length], np.int32),
            "image_starts": starts,
            "images": conversation.images[: len(starts)],
            "truncated": length < len(ids),
        }

    def prompt(self, conversation) -> vlm.Sample:
        while conversation.turns and conversation.turns[-1][0] == "assistant":
            conversation = type(conversation)(**{**vars(conversation), "turns": conversation.turns[:-1]})
        return self.encode(conversation, 1 << 30)

    def asked(self, conversation) -> str:
        return text_of(next(content for role, content in conversation.turns if role == "user")).strip()

    def answer_ids(self, text: str) -> list[int]:
        return self.ids(f" {text}")

    def decode(self, ids: list[int]) -> str:
        stop = ids.index(self.eos) if self.eos in ids else len(ids)
        return self.tokenizer.decode(ids[:stop]).strip()


def build_model(config: dict) -> Llava:
    return Llava(LlavaConfig.from_dict(config))


def load_processor(directory, stage: str = "sft") -> LlavaProcessor:
    return LlavaProcessor(LlavaConfig.from_dict(checkpoint.read_config(directory)), directory, stage)


def probe_batch(processor: LlavaProcessor) -> vlm.Batch:
    Q, size = processor.num_image_tokens, processor.image_size
    ids = torch.tensor([1, *[processor.config.image_token_index] * Q, *processor.ids("What is this?")])
    ramp = torch.linspace(-1, 1, size)
    return vlm.Batch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        pixel_values=(ramp[:, None] * ramp).expand(1, 3, size, size),
        image_positions=1 + torch.arange(Q)[None],
    )


MODEL = vlm.Model(
    build_model=build_model,
    load_processor=load_processor,
    probe_batch=probe_batch,
    forward_flops=forward_flops,
    parts={
        "vision": "vision_tower.*",
        "projector": "multi_modal_projector.*",
        "embedding": "*embed_tokens.*",
        "head": "*lm_head.*",
        "language model": "language_model.*",
    },
    image_parameters=["vision_tower.*", "multi_modal_projector.*"],
    stages=("sft", "pretrain"),
    pretrain_freeze={"pretrain": ["vision_tower.*", "language_model.*"]},
    lora_targets=[r"language_model\..*_proj"],
    tp_plan=tp_plan,
    pipeline={
        "blocks": "language_model.model.layers",
        "first": ["vision_tower.*", "multi_modal_projector.*", "language_model.model.embed_tokens.*"],
        "last": ["language_model.model.norm.*", "language_model.lm_head.*"],
    },
)
