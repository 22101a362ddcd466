"""A checkpoint as other programs load it: transformers, the original code, a runner without model code.

    python export.py --model_name_or_path merged_blip2 --output_dir out --format transformers
    python export.py --model_name_or_path merged --output_dir out --format original --remote_code qwen-vl-chat
    python export.py --model_name_or_path merged --output_dir package --format static

transformers: BLIP-2 (OPT, Flan-T5, image-text retrieval) with processor and tokenizer. original: Qwen-VL and
VisualGLM under the names, in the shards and with the files of their releases. Their Python is not ours to
give: it is taken from --remote_code. static: vision tower, prefill and decoding step as programs that
run_static.py, which goes with them, runs without a model file (export_static.py). An adapter (--lora_path) is
merged first. Every tensor is read back.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import fnmatch
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor, nn

import checkpoint
import data
import merge
import quantize
import terminal
import vlm
from generate import DTYPES, load_model


@dataclass
class Source:
    """The checkpoint that is exported, tensor by tensor in the numbers that the export shall have."""

    directory: Path
    dtype: torch.dtype | None = None  # of the written weights; None: as they are
    quantize: str | None = None  # round the blocks' weights (int8, int4, nf4), written in `dtype` again

    def __post_init__(self):
        self.config = checkpoint.read_config(self.directory)
        self.kind, self.definition = vlm.kind_of(self.config), vlm.find(self.config)
        self.weights = checkpoint.open_model(self.directory, self.definition)
        self.model = self.definition.network(self.config)
        # Here, before a directory is made for it.
        checkpoint.check_names({name: p.shape for name, p in self.model.named_parameters()}, self.weights)
        if self.dtype is not None:
            self.definition.check_dtype(self.config, self.dtype)
        blocks = {id(m) for block in self.model.blocks for m in block.modules() if isinstance(m, nn.Linear)}
        self.rounded = {f"{name}.weight" for name, m in self.model.named_modules() if id(m) in blocks}
        if self.quantize and not self.rounded:
            raise ValueError(f"--quantize {self.quantize}: {self.directory} has no language model to round")

    def stage(self) -> str:
        """One that its processor takes."""
        return "pretrain1" if "Qformer" in type(self.model).__name__ else "sft"

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.weights.dtype(name)

    def read(self, name: str) -> Tensor:
        tensor, dtype = self.weights.read(name), self.dtype_of(name)
        high = checkpoint.largest(tensor, f"{self.directory}: {name}")
        if high > torch.finfo(dtype).max:
            raise ValueError(f"{name} has a value of {high:.3g}, too large for {dtype}; use --dtype bfloat16")
        if self.quantize and name in self.rounded:
            tensor = quantize.rounded(tensor, self.quantize)
        return tensor.to(dtype)


# --------------------------------------------------------------------------------------------------
# Weight files


def parse_size(text: str) -> int:
    """ "2GB" -> bytes; KB, MB and GB are powers of 1,000, KiB, MiB and GiB of 1,024."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?([KMG])(i?)B", text)
    if not match or not float(match[1]):
        raise ValueError(f"max_shard_size={text[:40]!r}; expected a size such as 2GB, 500MB or 1GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMG".index(match[2]) + 1))


def write_weights(
    directory: Path, read: Callable[[str], Tensor], names: list[str], limit: int, pickled: bool
) -> None:
    """Files of at most `limit` bytes in the names' order, each tensor read back from them."""
    checkpoint.save_weights(directory, ((name, read(name)) for name in names), limit, pickled=pickled)
    written = checkpoint.open_weights(directory)
    for name in names:
        if not torch.equal(merge.bits(written.read(name)), merge.bits(read(name).contiguous())):
            raise ValueError(f"self-check failed: {name} read back differs; check the disk")


# --------------------------------------------------------------------------------------------------
# transformers: BLIP-2


def transformers_config(source: Source, image_token: int | None) -> dict:
    """config.json with every key that the model is computed by: transformers has other defaults than we."""
    config, raw = source.model.config, source.config
    retrieval = config.qformer.use_qformer_text_input
    vision = {**raw["vision_config"], **asdict(config.vision), "model_type": "blip_2_vision_model"}
    # One key for two norms: transformers has no place for the second epsilon.
    own_eps = vision.pop("post_layernorm_eps")
    if own_eps not in (None, config.vision.layer_norm_eps):
        print(
            f"note: transformers normalises the image's features with {config.vision.layer_norm_eps:g}, this "
            f"model with {own_eps:g} (as LAVIS): they will differ by about 1e-5"
        )
    text = {**raw["text_config"], **asdict(config.text), **config.text.only_values()}
    tied = not config.is_t5 and config.text.tie_word_embeddings
    text["tie_word_embeddings"] = tied
    # Keys of the file that we do not read are another program's, and stay.
    kept = {key: value for key, value in raw.items() if key not in ("stage1_heads", "dtype", "torch_dtype")}
    dtypes = {source.dtype_of(name) for name in source.weights}
    return {
        **kept,
        "architectures": ["Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration"],
        "image_text_hidden_size": config.image_text_hidden_size,
        "image_token_index": image_token,
        "num_query_tokens": config.num_query_tokens,
        "qformer_config": {**raw["qformer_config"], **asdict(config.qformer), "model_type": "blip_2_qformer"},
        "text_config": text,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch."),
        "use_decoder_only_language_model": not config.is_t5,
        "vision_config": vision,
    }


def transformers_tokenizer(source: Source, processor, directory: Path) -> int | None:
    """tokenizer.json and tokenizer_config.json that give our ids, special tokens included. Returns the image
    token's id, for which the vocabulary must have a row."""
    tk, kind = processor.tokenizer, processor.kind
    tokenizer = Tokenizer.from_str(tk.model.to_str())
    begin, eos = (tokenizer.id_to_token(i) for i in (tk.begin, tk.eos))
    # Where our tokenizer puts its marks: transformers must make the same ids of the same text.
    template = {"opt": f"{begin} $A", "t5": f"$A {eos}", "bert": f"{begin} $A {eos}"}[kind]
    special = [(token, tokenizer.token_to_id(token)) for token in {begin, eos}]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    image_token = None
    if kind != "bert":
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
        image_token = tokenizer.token_to_id("<image>")
        if image_token >= source.model.config.vocab_size:
            raise ValueError(
                f"{source.directory}: text_config.vocab_size={source.model.config.vocab_size} has no row for "
                f"the image token {image_token}, which transformers puts behind the tokenizer's; no export"
            )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if kind == "bert":
        named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    elif kind == "opt":  # its texts begin with the token that ends them
        named["bos_token"] = "</s>"
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Blip2Processor",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if kind == "opt" else "right",  # an answer goes on from the last token
        "model_max_length": source.model.config.max_positions or 512,
        **{key: token for key, token in named.items() if tokenizer.token_to_id(token) is not None},
    }
    if kind == "bert":
        options["do_lower_case"] = True
    checkpoint.write_json(directory / "tokenizer_config.json", options)
    return image_token


def export_transformers(source: Source, directory: Path, options: dict) -> str:
    """Writes what transformers' from_pretrained reads; returns the line of Python that does."""
    limit = parse_size(options["max_shard_size"])
    processor = source.definition.processor(source.directory, source.stage())
    image_token = transformers_tokenizer(source, processor, directory)
    config = transformers_config(source, image_token)
    side, text = processor.image_size, source.model.config.text
    checkpoint.write_json(directory / "config.json", config)
    image = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        **{f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "normalize")},
        "size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": checkpoint.MEAN,
        "image_std": checkpoint.STD,
    }
    checkpoint.write_json(directory / "preprocessor_config.json", image)
    named = {"processor_class": "Blip2Processor", "num_query_tokens": processor.num_image_tokens}
    checkpoint.write_json(directory / "processor_config.json", named)
    if processor.kind != "bert":
        generation = {"eos_token_id": processor.eos, "pad_token_id": text.pad_token_id}
        if processor.kind == "t5":
            generation["decoder_start_token_id"] = text.pad_token_id
        else:
            generation["bos_token_id"] = text.bos_token_id
        checkpoint.write_json(directory / "generation_config.json", generation)
    # temperature and language-modelling head of stage 1 have no place in transformers' retrieval model
    heads = ("temp", "cls.*")
    names = [n for n in source.weights if not checkpoint.matches(n, heads)]
    if left := len(source.weights.names) - len(names):
        print(f"note: {left} tensors of stage 1 (temp, cls) are left out: transformers' class has none")
    write_weights(directory, source.read, names, limit, pickled=False)
    return f"transformers.{config['architectures'][0]}.from_pretrained('{{}}')"


# --------------------------------------------------------------------------------------------------
# The original code of Qwen-VL and VisualGLM


@dataclass(frozen=True)
class Release:
    """What a release holds beside weights, and its order of them."""

    config: Callable[[Source], dict]  # keys of config.json that the original needs
    tokenizer: dict  # tokenizer_config.json
    generation: Callable[[Source, object], dict]
    vocabulary: str  # the tokenizer's file
    code: str  # its Python modules
    order: str  # patterns: tensors are written in the order of the first that they match
    loader: str
    buffers: Callable[[Source], dict[str, Tensor]] = lambda source: {}  # in the files, computed here


def qwen_config(source: Source) -> dict:
    code = {"AutoConfig": "configuration_qwen.QWenConfig"}
    code["AutoModelForCausalLM"] = "modeling_qwen.QWenLMHeadModel"
    tied = source.model.config.tie_word_embeddings
    named = {"architectures": ["QWenLMHeadModel"], "tokenizer_type": "QWenTokenizer", "auto_map": code}
    return {**named, "tie_word_embeddings": tied}


def qwen_generation(source: Source, processor) -> dict:
    """Qwen-VL-Chat's; its chat() refuses to run without chat_format and max_window_size."""
    ends = {"eos_token_id": processor.eos, "pad_token_id": processor.eos}
    chat = {"chat_format": "chatml", "max_window_size": 6144, "max_new_tokens": 512}
    return {**ends, **chat, "do_sample": True, "top_k": 0, "top_p": 0.3}


def visualglm_config(source: Source) -> dict:
    """The tower's and the Q-Former's keys are arguments of SwissArmyTransformer, which has no default for
    some that never change."""
    config, raw = source.model.config, source.config
    # The published numbers for what our files leave out, ours for all else.
    published = vlm.shape("visualglm-6b")
    parts = {part: {**published[part], **raw[part]} for part in ("eva_config", "qformer_config")}
    parts["eva_config"]["max_sequence_length"] = config.eva_config.num_tokens
    parts["qformer_config"]["cross_attn_hidden_size"] = config.eva_config.hidden_size
    model = "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"
    code = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    code |= dict.fromkeys(("AutoModel", "AutoModelForSeq2SeqLM"), model)
    # Without the key transformers ties the vocabulary projection to the embedding, whatever the files hold.
    own = {"architectures": ["ChatGLMModel"], "auto_map": code, "use_cache": True}
    return {**own, "tie_word_embeddings": False, **parts}


def visualglm_buffers(source: Source) -> dict[str, Tensor]:
    """The rotary frequencies, which the published model has rounded to half precision."""
    config = source.model.config
    # Half of a head's channels turn by the position, half by the place in the answer: each has its own.
    half = torch.arange(0, config.head_dim // 2, 2, dtype=torch.float32) / (config.head_dim // 2)
    names = (f"transformer.layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.num_layers))
    return dict.fromkeys(names, (1.0 / 10000.0**half).half())


RELEASES = {
    "qwen_vl": Release(
        config=qwen_config,
        tokenizer={
            "model_max_length": 8192,
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
        generation=qwen_generation,
        vocabulary="qwen.tiktoken",
        code="modeling_qwen configuration_qwen tokenization_qwen qwen_generation_utils visual",
        order="transformer.wte.* transformer.h.* transformer.ln_f.* transformer.visual.* lm_head.*",
        loader="transformers.AutoModelForCausalLM.from_pretrained('{}', trust_remote_code=True)",
    ),
    "visualglm": Release(
        config=visualglm_config,
        tokenizer={
            "tokenizer_class": "ChatGLMTokenizer",
            "bos_token": "<sop>",
            "eos_token": "<eop>",
            "end_token": "</s>",
            "gmask_token": "[gMASK]",
            "mask_token": "[MASK]",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "remove_space": False,
            "do_lower_case": False,
            "num_image_tokens": 0,  # the class's default of 20,000 would move every id
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        },
        generation=lambda source, processor: {},
        vocabulary="ice_text.model",
        code="modeling_chatglm configuration_chatglm tokenization_chatglm quantization visual",
        order="transformer.* lm_head.* image_encoder.*",
        loader="transformers.AutoModel.from_pretrained('{}', trust_remote_code=True)",
        buffers=visualglm_buffers,
    ),
}


def published_order(names: list[str], order: str) -> list[str]:
    patterns = order.split()
    return sorted(names, key=lambda n: next(i for i, p in enumerate(patterns) if fnmatch.fnmatch(n, p)))


def export_original(source: Source, directory: Path, options: dict) -> str:
    """Writes what the release's own code reads; returns the line of Python that does."""
    limit, code = parse_size(options["max_shard_size"]), options["remote_code"]
    release = RELEASES[source.kind]
    processor = source.definition.processor(source.directory)
    checkpoint.copy_side_files(source.directory, directory)
    dtype = source.dtype_of(next(iter(source.weights)))
    named = {"model_type": source.config["model_type"], "torch_dtype": str(dtype).removeprefix("torch.")}
    config = {key: value for key, value in source.config.items() if key != "dtype"}
    checkpoint.write_json(directory / "config.json", {**config, **release.config(source), **named})
    for name, value in (
        ("tokenizer_config.json", release.tokenizer),
        ("generation_config.json", release.generation(source, processor)),
    ):
        # What the checkpoint brought with it is the user's, and stays.
        if value and not (directory / name).exists():
            checkpoint.write_json(directory / name, value)
    if not (directory / release.vocabulary).exists():
        print(
            f"note: {source.directory} has no {release.vocabulary}, which the original tokenizer reads; "
            "put it beside the weights"
        )
    copy_code(release, Path(code or source.directory), directory, required=code is not None)
    buffers = release.buffers(source)
    names = published_order([n for n, _ in source.model.named_parameters()], release.order)

    def read(name: str) -> Tensor:
        return buffers[name].clone() if name in buffers else source.read(name)

    write_weights(directory, read, [*names, *(n for n in buffers if n not in names)], limit, pickled=True)
    return release.loader


def copy_code(release: Release, where: Path, directory: Path, required: bool) -> None:
    """The original's Python from a directory that has it: all of it, or none and a word on that."""
    names = [f"{module}.py" for module in release.code.split()]
    if missing := [name for name in names if not (where / name).is_file()]:
        if required:
            raise ValueError(
                f"--remote_code {where} lacks {', '.join(missing)}; name a directory of the original release"
            )
        print(
            f"note: the original's code is not part of the export; put {', '.join(names)} of the "
            "release beside the weights, or name a directory that has them with --remote_code"
        )
        return
    for name in names:
        shutil.copyfile(where / name, directory / name)


# --------------------------------------------------------------------------------------------------


def export_static(source: Source, directory: Path, options: dict) -> str:
    """Writes programs, weights and their runner; returns how it is started."""
    import export_static  # here: torch's exporter takes a second to import

    model = load_model(source.directory, source.dtype or torch.float32)
    processor = source.definition.processor(source.directory, source.stage())
    if source.quantize:
        print(quantize.quantize(model, source.quantize))
    export_static.write(model, processor, source.directory, directory, options["compile"])
    return "python {}/run_static.py --image image.png --prompt 'What is this?'"


@dataclass(frozen=True)
class Format:
    write: Callable[[Source, Path, dict], str]  # (source, directory, options) -> how the export is used
    kinds: tuple[str, ...] | None  # of models; None: all
    options: dict[str, str | None]  # keys of the command line that it alone takes, with their defaults


FORMATS = {
    "transformers": Format(export_transformers, ("blip2",), {"max_shard_size": "5GB"}),
    "original": Format(export_original, tuple(RELEASES), {"max_shard_size": "2GB", "remote_code": None}),
    "static": Format(export_static, None, {"compile": "auto"}),
}
ELSEWHERE = {
    "transformers": "transformers has no class of it; --format original writes what the release's code loads",
    "original": "--format transformers writes the published files, python convert/lavis.py LAVIS's",
}


def export(source: Source, output: Path, form: str, **given: str | None) -> str:
    """Writes the directory `output`, whole or not at all. Returns how it is used."""
    wanted = FORMATS[form]
    if wanted.kinds is not None and source.kind not in wanted.kinds:
        raise ValueError(f"--format {form} is not for {source.kind}: {ELSEWHERE[form]}")
    # An option that would be ignored is refused.
    for key, value in given.items():
        if value is not None and key not in wanted.options:
            raise ValueError(f"--{key} has no effect with --format {form}; leave it out")
    check_output(output, source.directory)
    options = wanted.options | {key: value for key, value in given.items() if value is not None}
    with checkpoint.atomic_dir(output) as directory:
        return wanted.write(source, directory, options).format(output)


def check_output(output: Path, source: Path) -> None:
    """ValueError for a place that holds something: an export replaces nothing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output} exists and is not empty; name a new directory")
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"--output_dir {output} lies in the model's own directory; name one elsewhere")


@contextlib.contextmanager
def merged_first(base: str | None, adapter: str | None, output: Path):
    """The directory that is exported: the base, or for as long as it is needed base + adapter."""
    if adapter is None:
        yield Path(base)
        return
    # Beside the output, on a disk that has room for it; /tmp may not.
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-merged-", dir=output.parent) as room:
        merge.merge(base, Path(adapter), Path(room) / "merged")
        (Path(room) / "merged" / "merge_info.json").unlink()
        yield Path(room) / "merged"


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="qwen_vl", help="whose samples/tiny_* to take if no checkpoint is named")
    add("--model_name_or_path", help="checkpoint directory")
    add("--lora_path", help="adapter directory, merged into the weights that are written")
    add("--output_dir", required=True, help="directory to write; it must be new or empty")
    add("--format", required=True, choices=list(FORMATS), help="for whom")
    dtypes = ["keep", *DTYPES]
    add("--dtype", default="keep", choices=dtypes, help="of the written weights (static: keep is float32)")
    rounding = "round the blocks' weights as generate.py does; only a static package keeps them small"
    add("--quantize", choices=quantize.KINDS, help=rounding)
    defaults = {form: f.options.get("max_shard_size") for form, f in FORMATS.items()}
    sizes = ", ".join(f"{form}: {size}" for form, size in defaults.items() if size)
    add("--max_shard_size", help=f"of one weight file (default: {sizes})")
    add("--remote_code", help="original: a directory with the release's Python files")
    machine_code = "static: programs in machine code of this CPU (minutes)"
    compiling = f"{machine_code}, or graphs that torch runs step by step; auto: where there is g++"
    add("--compile", choices=["auto", "yes", "no"], help=compiling)
    args = parser.parse_args(argv)
    output = Path(args.output_dir)
    base = args.model_name_or_path
    if base is None and args.lora_path is None:
        base = data.model_directory(args.model, "tiny")
    # Before a merge of minutes; export() looks once more, at the directory that it writes from.
    check_output(output, Path(base or args.lora_path))
    dtype = DTYPES.get(args.dtype)
    with merged_first(base, args.lora_path, output) as directory:
        source = Source(directory, dtype, args.quantize)
        given = {key: getattr(args, key) for key in ("max_shard_size", "remote_code", "compile")}
        how = export(source, output, args.format, **given)
    print(f"written: {output}")
    print(f"next: {how}")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
