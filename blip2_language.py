"""BLIP-2's language models: OPT and Flan-T5 on a stream of tokens, and the tokenizers.

    language_model = T5(config.text) if config.is_t5 else OPT(config.text)  # in model_blip2.py
    x = language_model.hidden(language_model.embed(batch.input_ids), batch, keys)

Both take the stream of model_blip2.py, in which an image's tokens come first. OPT is causal. Of Flan-T5 a
segment holds the encoder's tokens, then the decoder's, which begin with its start token.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

import checkpoint
import parallel
from kernels.attention import attention
from kernels.dropout import Dropout, dropout_rows
from kernels.linear import product
from kernels.norm import rms_norm
from schema import Depth, Epsilon, Share, Size, TokenId
from vlm import Batch, even_segments

# --------------------------------------------------------------------------------------------------
# Configuration: config.json's text_config


@dataclass
class OPTConfig:
    # transformers' defaults: a field that a file leaves out means the same here.
    vocab_size: Size = 50272
    hidden_size: Size = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    ffn_dim: Size = 3072
    # The image's 32 places take positions too: 2,016 are left for text.
    max_position_embeddings: Size = 2048
    dropout: Share = 0.1
    pad_token_id: TokenId = 1
    bos_token_id: TokenId = 2
    eos_token_id: TokenId = 2  # answers end at a line break, whatever it says
    tie_word_embeddings: bool = True  # in every published file

    def only_values(self) -> dict:
        """Keys of config.json that would change what is computed, with the one value that they have here."""
        return {
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "enable_bias": True,
            "layerdrop": 0,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "attention_dropout": 0,
            "word_embed_proj_dim": self.hidden_size,
        }


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
    # The stream of a segment is divided where this token stands first, so a text must not hold it.
    pad_token_id: TokenId = 0  # also what the decoder starts with
    eos_token_id: TokenId = 1

    def only_values(self) -> dict:
        """As OPTConfig's."""
        return {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": self.pad_token_id}


TEXT_CONFIGS = {"opt": OPTConfig, "t5": T5Config}  # by config.json's text_config.model_type


def segments(lengths: Tensor) -> Tensor:
    """(S,) lengths -> (S+1,) int32 cumulative, on the host."""
    # On the host: they decide shapes, and a device would have to be waited for.
    return F.pad(lengths.cpu().cumsum(0), (1, 0)).int()


# --------------------------------------------------------------------------------------------------
# OPT (arXiv:2205.01068)


@dataclass
class Context:
    """What every block of one forward pass shares."""

    cu_seqlens: Tensor  # (S+1,) int32, host
    # None in evaluation: dropout is off.
    keys: Tensor | None  # (T,) dropout keys of the rows
    cache: object | None = None  # engine.KVCache
    # T5 only
    # (Te, C) encoder output; None in a decoding step: its keys and values are cached
    memory: Tensor | None = None
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
        # Three matrices in the file's order; all four have biases.
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.q_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # A tensor-parallel rank has its heads of all three.
        x = parallel.copy_to_tp(x, self.q_proj)
        # Three times (T, C) -> (T, H, D).
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if ctx.cache is None:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal=True)
        else:
            # The cache appends k and v and attends to all that the sequence holds.
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens)
        # (T, H, D) -> (T, C)
        return self.out_proj(o.flatten(1))


class OPTBlock(nn.Module):
    def __init__(self, config: OPTConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.self_attn = OPTAttention(config, layer)
        # eps 1e-5, LayerNorm's own default, in every published OPT.
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.fc1 = nn.Linear(C, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, C)
        self.final_layer_norm = nn.LayerNorm(C)
        # Active in stage 2 too: LAVIS does not put the frozen language model into evaluation mode.
        self.dropout1, self.dropout2 = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.dropout1(self.self_attn(self.self_attn_layer_norm(x), ctx), ctx.keys)
        # Pre-norm, and ReLU instead of GELU: OPT is older than its neighbours.
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
        # 2,050 rows for 2,048 positions.
        decoder.embed_positions = nn.Embedding(config.max_position_embeddings + self.POSITION_OFFSET, C)
        decoder.final_layer_norm = nn.LayerNorm(C)
        decoder.layers = nn.ModuleList(OPTBlock(config, i) for i in range(config.num_hidden_layers))
        # An export may have untied it; then the head is a tensor of its own.
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.decoder.layers

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.decoder.embed_tokens(input_ids)

    def add_positions(self, x: Tensor, batch: Batch) -> Tensor:
        # Behind the splice: the image's places get a position like words do.
        return x + self.model.decoder.embed_positions(batch.position_ids + self.POSITION_OFFSET)

    def hidden(self, x: Tensor, batch: Batch, keys: Tensor | None, blocks=None) -> Tensor:
        # Adapters drop by the row's key, as the blocks' own dropout does.
        ctx = Context(batch.cu_seqlens, keys, batch.cache)
        with dropout_rows(keys):
            for block in self.blocks if blocks is None else blocks:
                x = block(x, ctx)
        return x

    def supervised_rows(self, batch: Batch) -> Tensor:
        return batch.supervised

    def last_rows(self, batch: Batch) -> None:
        return None  # the stream's own: what comes next in a segment is said by its last row

    def norm(self, x: Tensor) -> Tensor:
        # Part of the head: the last pipeline stage has it.
        return self.model.decoder.final_layer_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.lm_head(x) if hasattr(self, "lm_head") else product(x, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.decoder.embed_tokens.weight


# --------------------------------------------------------------------------------------------------
# Flan-T5 (arXiv:1910.10683, arXiv:2210.11416). In the stream a segment holds the encoder's tokens, then the
# decoder's, which begin with its start token (id 0); that token stands nowhere else, so it is where the
# stream is divided.

# BLIP-2's published configs override Flan-T5's tanh form with the exact one: a mix-up moves logits by 1e-2.
T5_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


class T5Norm(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        # No mean and no bias; the variance in fp32.
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def t5_buckets(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Distance key - query -> bucket: exact when near, logarithmic up to max_distance; half of them for each
    sign if both are seen."""
    # Positions by distance alone, so there is no table that ends.
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    # Half of the buckets hold one distance each, the others ever wider ranges of them.
    exact = num_buckets // 2
    far = (
        # fp32, rounded down: the borders between buckets are where the original has them.
        torch.log(distance.float().clamp(min=1) / exact)
        / math.log(max_distance / exact)
        * (num_buckets - exact)
    )
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    # Beyond max_distance all are one: "far".
    return bucket + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, layer: int, decoder: bool, with_bias: bool = False):
        super().__init__()
        # The heads' width is a field of its own: inner need not be d_model.
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
        # In a stack's first block only; the others use what it made (Context.shared).
        self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads) if with_bias else None

    def bias(self, first: int, length: int, device: torch.device) -> Tensor:
        """(H, length - first, length), queries from position `first`
        on; -inf on what a decoder may not see."""
        # (length - first, length) distances -> as many buckets -> one number a head.
        key = torch.arange(length, device=device)
        distance = key - key[first:, None]
        buckets = t5_buckets(distance, not self.decoder, self.num_buckets, self.max_distance)
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        # The bias carries the decoder's causality as well: one mask instead of two.
        return bias.masked_fill(distance > 0, float("-inf")) if self.decoder else bias

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.relative_attention_bias is not None:
            # While decoding, the queries are the last rows of the longest sequence.
            first = 0 if ctx.cache is None else ctx.cache.longest_past()
            # One segment is all of the stream: torch.export knows its length by shape alone.
            one = ctx.cu_seqlens.shape[0] == 2
            longest = x.shape[0] if one else int(ctx.cu_seqlens.diff().max())
            ctx.shared.bias = self.bias(first, first + longest, x.device)
        x = parallel.copy_to_tp(x, self.q)
        q, k, v = (self.project(layer, x) for layer in (self.q, self.k, self.v))
        q = q * q.shape[-1] ** 0.5  # T5 does not scale its scores, attention() does
        # In the activations' precision, as the original adds it.
        bias = ctx.shared.bias.to(q.dtype)
        if ctx.cache is not None:
            o = ctx.cache.attend(self.layer, q, k, v, ctx.cu_seqlens, bias=bias)
        else:
            o = attention(q, k, v, ctx.cu_seqlens, ctx.cu_seqlens, causal=False, bias=bias)
        return self.o(o.flatten(1))

    def cross(self, x: Tensor, ctx: Context) -> Tensor:
        """Attention to the encoder's output, all of it seen."""
        q = self.project(self.q, parallel.copy_to_tp(x, self.q))
        # No bias here: an encoder's place has no distance from a decoder's.
        q, k, v = q * q.shape[-1] ** 0.5, None, None
        # The encoder's keys and values are made once a prompt, then kept: a step brings queries alone.
        if ctx.memory is not None:
            memory = parallel.copy_to_tp(ctx.memory, self.k)
            with dropout_rows(ctx.memory_keys):
                k, v = self.project(self.k, memory), self.project(self.v, memory)
        if ctx.cache is not None:
            o = ctx.cache.attend_memory(self.layer, q, k, v, ctx.cu_seqlens, ctx.memory_cu_seqlens)
        else:
            # Decoder rows of segment s look at encoder rows of segment s.
            o = attention(q, k, v, ctx.cu_seqlens, ctx.memory_cu_seqlens, causal=False)
        return self.o(o.flatten(1))


class T5MLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        # Gated: wi_0 goes through the activation, wi_1 is what it gates.
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.act, self.dropout = T5_ACTIVATIONS[config.dense_act_fn], Dropout(config.dropout_rate)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = parallel.copy_to_tp(x, self.wi_0)
        x = self.act(self.wi_0(x)) * self.wi_1(x)
        # Dropout between the two products; a rank's channels have their places in the whole layer's mask.
        return self.wo(self.dropout(x, keys, parallel.first_channel(x.shape[-1])))


class T5Sublayer(nn.Module):
    def __init__(self, config: T5Config, name: str, inner: nn.Module):
        super().__init__()
        # The published names: layer.0.SelfAttention, layer.1.EncDecAttention, layer.2.DenseReluDense.
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
        # Pre-norm three times: the stack's own rows, the encoder's, the MLP.
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
        # T5 drops at both ends of a stack too.
        x = self.dropout_in(x, ctx.keys)
        with dropout_rows(ctx.keys):
            for block in self.block:
                x = block(x, ctx)
        return self.dropout_out(self.final_layer_norm(x), ctx.keys)


class T5(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.start = config.pad_token_id
        # One table for both stacks. The head is a matrix of its own and its logits are not scaled by
        # d_model^-0.5, as Flan-T5's.
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, config.num_layers, decoder=False)
        self.decoder = T5Stack(config, config.num_decoder_layers, decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.block, *self.decoder.block]

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.shared(input_ids)

    def add_positions(self, x: Tensor, batch: Batch) -> Tensor:
        return x  # they are in the attention's bias

    def decoder_rows(self, batch: Batch) -> Tensor:
        """(T,) bool of a batch on the host: rows of the stream from their segment's start token on."""
        # Counts start tokens before each row: beyond its segment's beginning, it is the decoder's.
        starts = (batch.input_ids == self.start).int()
        before = starts.cumsum(0)
        lengths, first = batch.cu_seqlens.diff(), batch.cu_seqlens[:-1].long()
        return before > (before - starts)[first].repeat_interleave(lengths)

    def hidden(self, x: Tensor, batch: Batch, keys: Tensor | None, blocks=None) -> Tensor:
        """(T, C) -> the decoder's rows (Td, C), normalised. `blocks`: all of them, always."""
        cache = batch.cache
        if cache is not None and not cache.encode:  # a decoding step: decoder tokens only
            return self.decoder(x, Context(batch.cu_seqlens, keys, cache))
        # one prompt: its last token is the decoder's
        if cache is not None and batch.cu_seqlens.shape[0] == 2:
            cu = even_segments(1, x.shape[0] - 1), even_segments(1, 1)
            memory = self.encoder(x[:-1], Context(cu[0], None))
            return self.decoder(x[-1:], Context(cu[1], None, cache, memory, cu[0]))
        in_decoder = self.decoder_rows(batch.host)  # on the host: lengths are needed there
        rows = [r.nonzero()[:, 0].to(x.device) for r in (~in_decoder, in_decoder)]
        cu_seqlens = batch.cu_seqlens.long()
        # Differences of a running sum: how many decoder rows lie in each segment.
        decoder_lengths = F.pad(in_decoder.long().cumsum(0), (1, 0))[cu_seqlens].diff()
        cu = segments(cu_seqlens.diff() - decoder_lengths), segments(decoder_lengths)
        row_keys = [None if keys is None else keys[r] for r in rows]
        # The encoder sees both ways, so a prompt is never computed in pieces.
        memory = self.encoder(x[rows[0]], Context(cu[0], row_keys[0]))
        ctx = Context(cu[1], row_keys[1], cache, memory, cu[0], row_keys[0])
        return self.decoder(x[rows[1]], ctx)

    def supervised_rows(self, batch: Batch) -> Tensor:
        """(R,) of hidden()'s result, which has the decoder's rows alone."""
        host = batch.host
        place = self.decoder_rows(host).long().cumsum(0) - 1  # (T,) of a row among the decoder's
        return place[host.supervised].to(batch.input_ids.device)

    def last_rows(self, batch: Batch) -> Tensor:
        """Rows of hidden()'s result: in a prompt and in a step the
        decoder holds one token of each segment."""
        return torch.arange(len(batch.cu_seqlens) - 1)

    def norm(self, x: Tensor) -> Tensor:
        return x  # hidden() did it

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight


# --------------------------------------------------------------------------------------------------
# Tokenizers


def check_merges(path: Path, vocab: dict[str, int]) -> None:
    """ValueError unless merges.txt is whole and in order: a line joins characters or what earlier lines made,
    and all longer tokens of the vocabulary are made by one, but for some added ones."""
    # A file cut short gives a tokenizer that works and splits words otherwise: looked for here.
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
    # Added tokens (<s>, madeupwords) need no merge: some dozens.
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
        # The library's own file first: it says more than the older ones.
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
        # A tokenizer.json may bring a length of its own: cutting is the processor's.
        self.model.no_truncation()
        self.model.no_padding()

        def special(token: str) -> int:
            if (i := self.model.token_to_id(token)) is None:
                raise ValueError(
                    f"{directory}: its tokenizer has no {token!r}; expected that of a {kind.upper()} model"
                )
            return i

        # Which tokens begin and end a text: OPT's begins with its end token.
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
        # A <pad> inside the text would divide the sample.
        return [i for i in ids if i != self.begin] if self.kind == "t5" else ids

    def to_json(self) -> str:
        """A tokenizers file for other programs."""
        return self.model.to_str()

    def decode(self, ids: list[int]) -> str:
        # Rows of the vocabulary beyond the tokenizer's have no text.
        return self.model.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)
