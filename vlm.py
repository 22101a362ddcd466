"""The contract between a model file and everything else, and what all models do alike.

    definition = vlm.find(checkpoint.read_config("merged"))  # model_type -> the MODEL of its model_*.py
    with torch.device("meta"):
        model = definition.build_model(config)
    loss_sum, losses = model(batch)                              # batch: vlm.Batch

A model file ends in `MODEL = vlm.Model(...)`. It is found by its name: model_<model_type>.py anywhere on
Python's path, so that a new model is one new file and no line elsewhere. No script asks which model it has.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

import parallel
from kernels.dropout import dropout_rows, uniform
from kernels.linear import linear
from kernels.linear_cross_entropy import IGNORE_INDEX

# --------------------------------------------------------------------------------------------------
# Data: what a processor gives for one record, and what a model takes


class Sample(TypedDict, total=False):
    """One record as a processor's `encode` gives it, or without answer its `prompt`."""

    input_ids: Any  # (T,) int32, an image's places included
    labels: Any  # (T,) int32, UNSHIFTED: the token itself where it is learned, else -100
    image_starts: list[int]  # the first of each image's places
    images: list[str]  # a path or data URL for each of them, in the same order
    truncated: bool  # something was cut at max_length
    position_ids: Any  # (T,) or (n, T), if they are not 0, 1, 2, ...
    prefix_len: int  # leading tokens that the whole segment sees, if it is not causal from the start
    seen: list[int]  # the tokens that a repetition penalty counts, if not all outside the images


@dataclass
class Batch:
    """A micro-batch: one stream of T tokens in S segments with N images. data.collate fills it.

    "host" tensors stay on the CPU: they decide shapes, and a device would have to be waited for. It is a
    dataclass because fully_shard moves every tensor in the tuples, lists and dicts that a module is given to
    the device, and leaves objects alone.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, or (n, T) for a model with n axes of positions
    cu_seqlens: Tensor  # (S+1,) int32, host: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1]
    targets: Tensor | None = None  # (T,) int64: the token that follows where it is learned, else -100
    supervised: Tensor | None = None  # (R,) int64: the rows that have one; made from targets
    row_datasets: Tensor | None = None  # (R,) int64: the dataset_ids of these rows' segments; made
    pixel_values: Tensor | None = None  # (N, 3, H, W) fp32
    image_features: Tensor | None = None  # (N, Q, C) instead of pixel_values: cached features
    image_positions: Tensor | None = None  # (N, Q) int64: the rows that the features of an image take
    prefix_lens: Tensor | None = None  # (S,) int64, host: leading tokens that the whole segment sees
    dropout_keys: Tensor | None = None  # (T,) int64: a hash of (seed, epoch, sample, position)
    image_dropout_keys: Tensor | None = None  # (N,) int64
    embedding_noise: float = 0.0  # NEFTune's alpha, in training
    image_ids: Tensor | None = None  # (S,) int64: equal where segments show the same image (contrast)
    dataset_ids: Tensor | None = None  # (S,) int64: the entry of `dataset` that a segment comes from
    sample_ids: list[str] = field(default_factory=list)  # "file:line#id" of each segment, for messages
    bad: list[tuple[str, str]] = field(default_factory=list)  # (where, reason) of samples left out
    rope_lengths: Tensor | None = None  # (S,) int64, host; decoding: the prompt's length (see Qwen-VL's NTK)
    single: bool = False  # decoding: each segment is one token, so rows are segments
    cache: Any = None  # decoding: keys and values of what the segments have seen before
    on_host: "Batch | None" = None  # of a batch on a device: what it was before, whose values cost no waiting

    def __post_init__(self):
        # Made on the host: on a device their number would have to be waited for.
        if self.supervised is None and self.targets is not None:
            self.supervised = (self.targets != IGNORE_INDEX).nonzero()[:, 0]
        if self.row_datasets is None and self.supervised is not None and self.dataset_ids is not None:
            # Row -> segment -> entry: right=True, since a row at a border begins the next segment.
            segments = torch.bucketize(self.supervised, self.cu_seqlens[1:], right=True)
            self.row_datasets = self.dataset_ids[segments]

    @classmethod
    def of_images(cls, pixel_values: Tensor) -> "Batch":
        """Images (N, 3, H, W) without a token, for `output="features"`."""
        nothing = torch.zeros(0, dtype=torch.int64, device=pixel_values.device)
        return cls(nothing, nothing, torch.zeros(1, dtype=torch.int32), pixel_values=pixel_values)

    @property
    def num_supervised(self) -> int:
        return len(self.supervised)

    @property
    def has_images(self) -> bool:
        return self.pixel_values is not None or self.image_features is not None

    @property
    def host(self) -> "Batch":
        """The same on the host."""
        return self if self.on_host is None else self.on_host

    def to(self, device: torch.device) -> "Batch":
        """The same on a device, but for host tensors."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in HOST_FIELDS}
        ours = {name: value for name, value in ours.items() if isinstance(value, Tensor)}
        coming = {name: t for name, t in ours.items() if t.device.type == "cpu" != device.type}
        others = {name: t.to(device) for name, t in ours.items() if name not in coming}
        return replace(self, **move(coming, device), **others, on_host=self.host)


HOST_FIELDS = ("cu_seqlens", "prefix_lens", "rope_lengths")
ALIGNED = 128  # bytes: kernels that are compiled for aligned pointers must find them so in every batch


def move(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Host tensors on a device, in one copy a dtype, that the host does not wait for."""
    if device.type == "cpu":
        return tensors
    moved = {}
    for dtype in {t.dtype: None for t in tensors.values()}:
        names = [name for name, t in tensors.items() if t.dtype == dtype]
        step = ALIGNED // dtype.itemsize
        room = [-(-tensors[name].numel() // step) * step for name in names]
        # Pinned: else the device could not read it by itself, and the copy would hold up the host.
        staged = torch.empty(sum(room), dtype=dtype, pin_memory=device.type == "cuda")
        places = [part[: tensors[n].numel()] for n, part in zip(names, staged.split(room), strict=True)]
        for name, place in zip(names, places, strict=True):
            place.copy_(tensors[name].flatten())
        parts = staged.to(device, non_blocking=True).split(room)
        for name, part in zip(names, parts, strict=True):
            moved[name] = part[: tensors[name].numel()].view(tensors[name].shape)
    return moved


# --------------------------------------------------------------------------------------------------
# The contract


class Config(Protocol):
    """A model's checked config.json. Beside these a model file has the fields that it needs itself."""

    raw: dict  # as it was read; written back beside the weights
    hidden_size: int  # C of the language model
    vocab_size: int
    num_hidden_layers: int
    mlp_width: int  # the inner width of a block's MLP
    max_positions: int | None  # tokens of the longest sequence, None where positions have no table


class Network(Protocol):
    """What build_model gives: an nn.Module whose state_dict has the published names."""

    config: Config
    LOSSES: tuple[str, ...]  # names of the summed losses, ("loss",) for language modelling alone
    pipeline_obstacle: str | None  # why the blocks can't be cut into pipeline stages
    position_step: Any  # what a decoding step adds to a sequence's last position: 1, or (n, 1)
    position_axes: int  # n of position_ids (n, T), 1 for (T,)
    prefill: str  # how the engine computes a prompt. "chunks": a token never sees later ones, so in pieces;
    # "whole": tokens see later ones; "alone": an encoder takes it, while no answer runs beside it
    encoder_decoder: bool  # a prompt's tokens but the last are the encoder's
    prefix_rows: int  # keys and values in front of every segment (P-tuning), 0 for none
    num_image_tokens: int  # Q, the places of an image in the stream
    image_size: tuple[int, int]  # height and width of pixel_values
    blocks: Any  # the language model's blocks: what is recomputed, sharded, compiled, cut into stages
    vision_blocks: Any  # the same of the vision tower: those that a forward pass runs, all of them

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) -> features (N, Q, C); `keys` (N,) are the images' dropout keys."""

    def embed(self, batch: Batch) -> Tensor:
        """(T, C): the tokens' embeddings, the images' features at their places."""

    def hidden(self, batch: Batch, x: Tensor | None = None, blocks=None) -> Tensor:
        """(T, C) behind the blocks; a pipeline stage passes what it received, `x`, and its own `blocks`."""

    def logits(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, V)."""

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of the supervised tokens, and each one's own (detached), in stream order."""

    def forward(self, batch: Batch, output: str = "loss", x: Tensor | None = None, blocks=None) -> Any:
        """The one entrance (a sharded model gathers its weights there). `output`: "loss" as head(); "logits"
        (S, V) of each segment's last row; "features" as encode_images(); "hidden" (T, C)."""

    def loss_counts(self, batch: Batch) -> list[int]:
        """What each of LOSSES is a sum over, known on the host."""

    def cache_group(self, length: int) -> Any:
        """Prompts of equal groups may share cached keys and values."""

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fills one whole parameter for training from scratch."""


class Retriever(Protocol):
    """What a network has besides, whose checkpoint ranks images and texts (Model.retrieval_stage)."""

    def encode_and_project(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> what match() takes (N, P, W), and the image's features to compare (N, Q, E)."""

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Texts one after the other (T,), `lengths` (S,) of the host -> (T, C)."""

    def text_features(self, text: Tensor, lengths: Tensor) -> Tensor:
        """What encode_text gave -> features to compare (S, E)."""

    def match(self, image: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (S, 2) of whether image s and text s belong together."""


class Processor(Protocol):
    """Records -> what a model takes. It alone knows the model's wording ("Picture 1:", "Question: ...")."""

    tokenizer: Any
    stage: str  # of training, which may change the wording
    image_size: Any  # a side or (height, width)
    num_image_tokens: int
    stop_words: list[list[int]]  # token sequences that end an answer
    eos: int
    blank_ids: tuple[int, ...]  # a sample that says nothing, for a rank that has none
    token_bytes: Any  # [token] -> its bytes; () where a token's text depends on what stands before it

    def fingerprint(self) -> str:
        """Changes whenever a record could get other ids."""

    def load_image(self, source) -> Tensor:
        """(3, H, W) fp32 of a path or data URL; ValueError that names it."""

    def encode(self, conversation, max_length: int) -> Sample:
        """A training sample; ValueError for a conversation that this model can't take."""

    def prompt(self, conversation) -> Sample:
        """What generation starts from: a trailing answer is left out."""

    def asked(self, conversation) -> str:
        """What a record asks in this model's wording, as `generate.py --prompt` takes it; the image aside."""

    def answer_ids(self, text: str) -> list[int]:
        """The beginning of an answer, behind a prompt, that generation goes on from."""

    def decode(self, ids: list[int]) -> str:
        """The answer's text, cut at the first end marker."""


REQUIRED = object()


@dataclass(frozen=True)
class Model:
    """What a model file says of itself, its MODEL. Patterns are fnmatch's on parameter names."""

    build_model: Callable[[dict], nn.Module] = REQUIRED  # config.json -> Network, inside torch.device("meta")
    load_processor: Callable[[Path, str], Processor] = REQUIRED  # (checkpoint directory, stage) -> Processor
    probe_batch: Callable[[Processor], Batch] = REQUIRED  # a fixed prompt with an image, to compare logits
    forward_flops: Callable[..., dict[str, float]] = REQUIRED  # (config, tokens, supervised, images, segment)
    parts: dict[str, str] = REQUIRED  # rows of the start-up table: the first pattern that matches
    image_parameters: list[str] = REQUIRED  # what an image's features depend on
    stages: tuple[str, ...] = REQUIRED  # of training
    lora_targets: list[str] = REQUIRED  # regular expressions of the modules that are adapted by default
    tp_plan: Callable[[Any, int], dict] = REQUIRED  # (config, degree) -> name: (cut, packed)
    pipeline: dict[str, Any] = REQUIRED  # "blocks": prefix; "first", "last": patterns of these stages
    vision_stem: list[str] = field(default_factory=list)  # of the vision tower, what stands before its blocks
    pretrain_freeze: dict[str, list[str]] = field(default_factory=dict)  # stage -> patterns that are frozen
    ignored_weights: list[str] = field(default_factory=list)  # in files, but recomputed here
    aliases: Callable[[dict], dict[str, str]] = lambda config: {}  # tied name -> the name it says the same as
    untied: Callable[[dict], dict | None] = lambda config: None  # config.json with the tied pair apart
    legacy_names: dict[str, str] = field(default_factory=dict)  # PaddleMIX's names in patterns -> ours
    prefix_tuning: str | None = None  # pattern of P-tuning's parameters
    lora_parts: Callable[[Any], dict[str, tuple[int, int]]] | None = None  # packed weights adapted in parts
    # the stage of a checkpoint that ranks images and texts (a Retriever); None for one that answers
    retrieval_stage: Callable[[dict], str | None] = lambda config: None
    contrasted: tuple[str, ...] = ()  # stages that compare the samples of a micro-batch with each other
    # ValueError for a dtype that the model can't be held in
    check_dtype: Callable[[dict, torch.dtype], None] = lambda config, dtype: None

    def __post_init__(self):
        if missing := [f.name for f in fields(self) if getattr(self, f.name) is REQUIRED]:
            raise ValueError(f"MODEL lacks {', '.join(missing)}; vlm.Model says what each is")

    def check_stage(self, stage: str, config: dict | None = None) -> None:
        """ValueError for a stage that this model does not have, or not with such a checkpoint."""
        if stage not in self.stages:
            raise ValueError(f"stage={stage!r}; expected one of {', '.join(self.stages)} for this model")
        if config is not None and (stage in self.contrasted) != bool(self.retrieval_stage(config)):
            kind, taking = "captioning" if stage in self.contrasted else "stage-1", ", ".join(self.contrasted)
            raise ValueError(
                f"stage={stage} and a {kind} checkpoint do not go together: {taking} takes a stage-1 "
                "checkpoint, the others don't"
            )

    def network(self, config: dict) -> nn.Module:
        """The model without weights, on the meta device. ValueError with the list of what its class lacks."""
        with torch.device("meta"):
            model = self.build_model(config)
        check_complete(model, Network)
        if self.retrieval_stage(config):
            check_complete(model, Retriever)
        return model

    def processor(self, directory: str | Path, stage: str = "sft") -> Processor:
        """The processor of a checkpoint directory. ValueError with the list of what its class lacks."""
        self.check_stage(stage)
        processor = self.load_processor(directory, stage)
        check_complete(processor, Processor)
        return processor


def members(protocol: type) -> list[str]:
    """The names that a protocol asks for."""
    own = [name for name in vars(protocol) if not name.startswith("_")]
    return sorted({*protocol.__annotations__, *own})


def check_complete(thing, protocol: type) -> None:
    """ValueError with the list of what `thing` lacks of a protocol."""
    if missing := [name for name in members(protocol) if not hasattr(thing, name)]:
        raise ValueError(
            f"{type(thing).__module__}.py: {type(thing).__name__} lacks {', '.join(missing)}; "
            f"vlm.{protocol.__name__} says what each is"
        )


# Published model_types whose file has another name
FILES = {"qwen": "qwen_vl", "blip-2": "blip2", "chatglm": "visualglm"}


def file_of(kind: str) -> str | None:
    """The module name of model_<kind>.py, None if there is no such file on Python's path."""
    name = "model_" + re.sub(r"\W", "_", kind)
    return name if name in sys.modules or importlib.util.find_spec(name) else None


def kind_of(config: dict) -> str:
    """Which model_<kind>.py reads this config.json. ValueError where there is none."""
    model_type = config.get("model_type")
    kind = FILES.get(model_type, model_type) if isinstance(model_type, str) else None
    plain_qwen = model_type == "qwen" and "visual" not in config
    if not kind or plain_qwen or file_of(kind) is None:
        raise ValueError(
            f"config.json has model_type={model_type!r}; supported: 'qwen' with a 'visual' part (Qwen-VL), "
            "'blip-2', 'chatglm' (VisualGLM-6B), and any type with a model_<type>.py on Python's path"
        )
    return kind


def find(config: dict) -> Model:
    """The MODEL of the file that reads this config.json. ValueError where there is none."""
    file = file_of(kind_of(config))
    definition = getattr(importlib.import_module(file), "MODEL", None)
    if not isinstance(definition, Model):
        raise ValueError(f"{file}.py has no MODEL; a model file ends in MODEL = vlm.Model(...)")
    return definition


def shape(name: str) -> dict | None:
    """The config.json of a published size, by its name ("qwen-vl-7b"): enough for a dry run."""
    path = Path(__file__).resolve().parent / "configs" / "shapes" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --------------------------------------------------------------------------------------------------
# Mechanism that all models share


def even_segments(num_segments: int, length: int) -> Tensor:
    """(num_segments + 1,) host: cu_seqlens of segments of one length."""
    return torch.arange(num_segments + 1, dtype=torch.int32) * length


NOISE_SEED = 0x4EF7  # no place of a model has it: their seeds are hashes of names


def splice_images(x: Tensor, batch: Batch, encode: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Embeddings x (T, C) with the images' features at their places, in order.

    There may be more images than places: a rank of a sharded run that has none encodes a blank one, because
    the tower's weights are gathered by all ranks together. It counts nothing.
    """
    if batch.embedding_noise:
        lengths = batch.cu_seqlens.diff()
        # arXiv:2310.05914, by each token's own key: the same in any stream
        largest = batch.embedding_noise * (lengths * x.shape[-1]).rsqrt().repeat_interleave(lengths)
        noise = uniform(batch.dropout_keys, x.shape[-1], NOISE_SEED)
        x = x + (largest.to(x.device)[:, None] * noise).to(x.dtype)
    features = batch.image_features
    if features is None and batch.pixel_values is not None:
        with dropout_rows(batch.image_dropout_keys, batch.pixel_values.shape[0]):
            features = encode(batch.pixel_values, batch.image_dropout_keys)
    if features is None:
        return x
    places, rows = batch.image_positions.flatten(), features.flatten(0, 1).to(x.dtype)  # (N*Q,), (N*Q, C)
    P = places.shape[0]  # len() would be a constant of an exported program
    x = x.index_copy(0, places, rows[:P])
    if rows.shape[0] > P:
        x = x + 0.0 * rows[P:].sum()  # zero, but the tower's backward pass runs on this rank too
    return x


class TokenEmbedding(nn.Embedding):
    """The tokens' embedding, of which nobody uses the weight but its forward."""

    is_table = True  # so ranks that shard it gather it where it is entered (parallel.tables)


class LMHead(nn.Linear):
    """The vocabulary projection: logits, or with targets their cross entropy without a stream's logits."""

    is_table = True

    def forward(self, x: Tensor, targets: Tensor | None = None):
        if targets is None:
            return parallel.vocab_logits(linear(self, x))
        return parallel.vocab_cross_entropy(x, self.weight, targets)


def run(model: nn.Module, batch: Batch, output: str, x: Tensor | None, blocks, last_rows=None):
    """Network.forward. `last_rows` (S,): of hidden()'s result, where they are not the stream's own."""
    if output == "features":
        return model.encode_images(batch.pixel_values)
    x = model.hidden(batch, x, blocks)
    if output == "hidden":
        return x
    if output == "logits":
        if not batch.single:  # (T, C) -> (S, C): what comes next in each segment
            x = x[(batch.cu_seqlens[1:] - 1 if last_rows is None else last_rows).to(x.device)]
        return model.logits(x)
    return model.head(x, batch)


def blank_image(size: int | tuple[int, int]) -> Tensor:
    """Zeros (3, height, width); one number stands for both."""
    return torch.zeros(3, *((size, size) if isinstance(size, int) else size))
