"""BLIP-2 checkpoints of LAVIS (.pth), in and out; a fresh stage 1 from BERT; another image size.

python convert/lavis.py import blip2_pretrained.pth --config config.json --out stage1
python convert/lavis.py init bert-base-uncased --tower eva_vit_g.pth --out stage1
python convert/lavis.py export stage1 --out stage1.pth
python convert/lavis.py resize blip2-opt-2.7b blip2-opt-2.7b-364 --image_size 364
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts stand one folder up

import python_version  # noqa: F401  (first: it says which Python is needed)

import math
import re
import zlib
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import model_blip2 as blip2
import schema
import terminal
import vlm
from model_blip2 import TOWER, Blip2Config, QFormerConfig, build_model, init_weights, resize_positions

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
    # bare tower; its own norm and head, and the block that BLIP-2 leaves out, belong to EVA-CLIP
    if "cls_token" in state:
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
        if name not in state and not name.startswith(tuple(pattern[:-1] for pattern in TOWER)):
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
        found = {"are missing": missing, "have no place": unknown}
        said = [f"{len(n)} tensors {what} ({', '.join(n[:3])})" for what, n in found.items() if n]
        raise ValueError(
            f"{', '.join(said)}; give the other files too (eva_vit_g.pth, --base with the language model) "
            "and the config.json that belongs to them"
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
                file, {**schema.read_json(file, ""), "size": {"height": side, "width": side}}
            )


def without_last_block(config: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """eva_vit_g.pth has one block more than BLIP-2 uses."""
    last = f"vision_model.encoder.layers.{Blip2Config.from_dict(config).vision.num_hidden_layers}."
    return {n: t for n, t in state.items() if not n.startswith(last)}


def read_model(directory: str | Path) -> dict[str, Tensor]:
    return read_all(checkpoint.open_model(directory, blip2.MODEL))


def read_all(weights: checkpoint.Weights) -> dict[str, Tensor]:
    return {name: weights.read(name) for name in weights}


def import_files(args) -> None:
    """LAVIS .pth files -> a checkpoint directory."""
    if args.config is None and args.base is None:
        raise ValueError("give --config FILE, or --base DIRECTORY")
    state = read_model(args.base) if args.base else {}
    for path in args.files:
        state |= read_lavis(path)
    config = schema.read_json(args.config or Path(args.base) / "config.json", "give it with --config")
    # the features' norm is LAVIS's nn.LayerNorm, with that class's own eps
    config["vision_config"] = {**config.get("vision_config", {}), "post_layernorm_eps": 1e-5}
    config["stage1_heads"] = "temp" in state
    with torch.device("meta"):
        wanted = dict(build_model(config).named_parameters())
    stage1_file = any(name in state for name in ("temp", "itm_head.weight"))
    if stage1_file and not config["qformer_config"].get("use_qformer_text_input"):
        # a stage-1 file for a stage-2 model: the text branch goes
        state = {n: t for n, t in state.items() if n in wanted}
    elif any(n.startswith("language_model.") for n in state):
        tower = "vision_model.encoder.layers."
        state = {n: t for n, t in state.items() if n in wanted or not n.startswith(tower)}
    write_model(args.out, config, without_last_block(config, state), args.tokenizer or args.base)


def begin_stage1(args) -> None:
    """BERT and the tower -> the checkpoint that stage 1 begins with."""
    config = vlm.shape("blip2-stage1")
    if args.config:
        config = schema.read_json(args.config, "give --config")
    config = {**config, "vision_config": {**config["vision_config"], "post_layernorm_eps": 1e-5}}
    config["qformer_config"] = {**asdict(QFormerConfig()), **config["qformer_config"]}
    state = read_lavis(args.tower)
    state |= from_bert(read_all(checkpoint.open_weights(args.bert)), args.seed)
    state = fill_stage1(config, without_last_block(config, state), args.seed)
    write_model(args.out, config, state, args.bert)


def export_file(args) -> None:
    """A checkpoint directory -> a LAVIS .pth file."""
    state = read_model(args.directory)
    if args.trained_only:
        frozen = (*(pattern[:-1] for pattern in blip2.TOWER), "language_model.")
        state = {n: t for n, t in state.items() if not n.startswith(frozen)}
    config = Blip2Config.from_dict(checkpoint.read_config(args.directory))
    with checkpoint.atomic_file(args.out) as file:
        torch.save({"model": to_lavis(state, config.qformer.max_position_embeddings)}, file)


def resize(args) -> None:
    """Interpolates the position embedding to another resolution."""
    config = checkpoint.read_config(args.directory)
    Blip2Config.from_dict(config)
    config["vision_config"] = {**config["vision_config"], "image_size": args.image_size}
    write_model(args.out, config, read_model(args.directory), args.directory)


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, help: str):
        one = commands.add_parser(name, help=help)
        one.set_defaults(run=run)
        return one.add_argument

    add = command("import", import_files, "LAVIS .pth files -> a checkpoint directory")
    add("files", nargs="+", help="later files win; parts that none has come from --base")
    add("--config", help="config.json of the model; default: the base's")
    add("--base", help="checkpoint with the missing parts (tower, language model) and the tokenizer")
    add("--tokenizer", help="directory of tokenizer files, if not --base")
    add("--out", required=True)
    add = command("init", begin_stage1, "BERT and the tower -> the checkpoint that stage 1 begins with")
    add("bert", help="directory of bert-base-uncased: weights, vocab.txt or tokenizer.json")
    add("--tower", required=True, help="eva_vit_g.pth")
    add("--config", help="config.json of the model; default: the published sizes")
    add("--seed", type=int, default=0)
    add("--out", required=True)
    add = command("export", export_file, "a checkpoint directory -> a LAVIS .pth file")
    add("directory")
    trained_only = "leave out the tower and the language model, as LAVIS does when they are frozen"
    add("--trained_only", action="store_true", help=trained_only)
    add("--out", required=True)
    add = command("resize", resize, "interpolate the position embedding to another resolution")
    add("directory")
    add("out")
    add("--image_size", type=int, required=True)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if args.command != "export" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new directory")
    if (place := getattr(args, "tokenizer", None)) and not Path(place).is_dir():
        raise ValueError(f"--tokenizer {place} is no directory; give the one that has the tokenizer's files")
    args.run(args)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
