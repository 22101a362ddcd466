"""VisualGLM checkpoints of SwissArmyTransformer (SAT), in and out.

    python convert/sat.py import visualglm-6b-sat visualglm-6b --qkv split --tokenizer chatglm-6b
    python convert/sat.py export merged merged-sat --qkv split

A SAT directory holds `latest`, model_config.json and `1/mp_rank_00_model_states.pt`. The rows of the language
model's query_key_value are [all q | all k | all v] (`--qkv split`, SAT >= 0.4, the download since July 2023)
or per head q, k, v (`--qkv per_head`, SAT 0.3 and the first download); nothing in a file says which, and the
wrong one gives nonsense. Memory: the checkpoint once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts stand one folder up

import python_version  # noqa: F401  (first: it says which Python is needed)

import os
import re

import numpy as np
import torch
from torch import Tensor

import checkpoint
import model_visualglm as glm
import schema
import terminal
import vlm

# in SAT's files, but recomputed or unused: rotary frequencies, and 0.3's position table
LEFT_OUT = ("mixins.chatglm-attn.rotary_emb.inv_freq", "transformer.position_embeddings.weight")
SAME_KEYS = [
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "vocab_size",
    "max_sequence_length",
    "image_length",
    "bos_token_id",
    "mask_token_id",
    "gmask_token_id",
    "pad_token_id",
]
RENAMED = {"eva_config": "eva_args", "qformer_config": "qformer_args"}


def sat_name(name: str) -> str:
    """SAT's name of a Hugging Face parameter."""
    if name == "lm_head.weight":
        return "mixins.chatglm-final.lm_head.weight"
    return (
        name.replace("image_encoder.", "mixins.eva.model.", 1) if name.startswith("image_encoder.") else name
    )


def repack_qkv(name: str, tensor: Tensor, num_heads: int, to_sat: bool) -> Tensor:
    """Rows of the language model's query_key_value: per head q, k, v <-> [all q | all k | all v]. Others as
    they are."""
    if not re.fullmatch(r"transformer\.layers\.\d+\.attention\.query_key_value\.(weight|bias)", name):
        return tensor
    order = (num_heads, 3) if to_sat else (3, num_heads)
    return tensor.unflatten(0, (*order, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def expected_shapes(config: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in glm.build_model(config).named_parameters()}


def read_state(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a SAT checkpoint; no code in it is run. Beside them SAT keeps where it was in training:
    the random states hold NumPy arrays, which are let in as data."""
    if not (source / "latest").is_file():
        raise ValueError(f"{source} has no file latest; expected a SAT checkpoint directory")
    folder = (source / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if folder != os.path.basename(folder) or folder in ("", ".", ".."):
        raise ValueError(
            f"{source / 'latest'} names {folder[:60]!r}; expected the name of a directory beside it"
        )
    path = source / folder / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {source / 'latest'} names its directory; fetch it again")
    array = np.zeros(1, np.uint32)
    rebuild = array.__reduce__()[0]
    harmless = [np.ndarray, np.dtype, *{type(np.dtype(c)) for c in "?bhilqBHILQfd"}]
    harmless += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(harmless):
            state = torch.load(path, map_location="cpu", weights_only=True)["module"]
    except Exception as e:  # damaged pickles raise all sorts of errors
        reason = (str(e).splitlines() or ["cut short"])[0][:200]
        raise ValueError(
            f"{path} is no SAT checkpoint of one model-parallel rank ({reason}); fetch it again"
        ) from None
    checkpoint.check_state(state, path)
    return state


def import_sat(source: Path, target: Path, split_qkv: bool, tokenizer: Path | None) -> None:
    raw = schema.read_json(source / "model_config.json", "expected a SAT checkpoint directory")
    config = {**vlm.shape("visualglm-6b"), **{k: raw[k] for k in SAME_KEYS if k in raw}}
    config |= {ours: raw[theirs] for ours, theirs in RENAMED.items() if theirs in raw}
    config |= {k: raw[k] for k in ("layernorm_epsilon", "eos_token_id") if k in raw}
    shapes = expected_shapes(config)
    state = read_state(source)
    state = {name: tensor for name, tensor in state.items() if name not in LEFT_OUT}
    names = {sat_name(name): name for name in shapes}
    problems = [f"missing {n}" for n in names if n not in state] + [
        f"unexpected {n}" for n in state if n not in names
    ]
    problems += [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(shapes[name])}"
        for n, name in names.items()
        if n in state and state[n].shape != shapes[name]
    ]
    if problems:
        some = "; ".join(problems[:8])
        raise ValueError(f"{source} does not fit its model_config.json: {some} ({len(problems)} in all)")
    for n in names:
        if not state[n].is_floating_point():
            raise ValueError(
                f"{n} is {state[n].dtype}; expected floating point (quantised files are not read)"
            )
        checkpoint.largest(state[n], n)
    heads = config["num_attention_heads"]
    tensors = (
        (name, repack_qkv(name, state[n], heads, to_sat=False) if split_qkv else state[n])
        for n, name in names.items()
    )
    config["torch_dtype"] = str(state["transformer.word_embeddings.weight"].dtype).removeprefix("torch.")
    with checkpoint.atomic_dir(target) as directory:
        checkpoint.save_weights(directory, tensors)
        checkpoint.write_json(directory / "config.json", config)
        for place in (source, tokenizer):
            if place is not None:
                checkpoint.copy_side_files(place, directory)


def export_sat(source: Path, target: Path, split_qkv: bool) -> None:
    config = checkpoint.read_config(source)
    if vlm.kind_of(config) != "visualglm" or config.get("pre_seq_len"):
        raise ValueError(
            f"{source} is no VisualGLM without P-tuning; only that has a counterpart in SAT's format"
        )
    weights = checkpoint.open_weights(source, glm.MODEL.ignored_weights)
    checkpoint.check_names(expected_shapes(config), weights)
    c = glm.VisualGLMConfig.from_dict(config)
    state = {}
    for name in weights:
        tensor = weights.read(name)
        checkpoint.largest(tensor, name)
        state[sat_name(name)] = (
            repack_qkv(name, tensor, c.num_attention_heads, to_sat=True) if split_qkv else tensor
        )
    state[LEFT_OUT[0]] = glm.inverse_frequencies(c.head_dim, exact=True)
    sat_config = {k: config[k] for k in (*SAME_KEYS, "layernorm_epsilon", "eos_token_id") if k in config}
    sat_config |= {theirs: config[ours] for ours, theirs in RENAMED.items()}
    sat_config |= {
        "model_class": "VisualGLMModel",
        "tokenizer_type": "THUDM/chatglm-6b",
        "model_parallel_size": 1,
        "layernorm_order": "post",
        "use_bias": True,
    }
    with checkpoint.atomic_dir(target) as directory:
        (directory / "1").mkdir()
        torch.save({"module": state}, directory / "1" / "mp_rank_00_model_states.pt")
        (directory / "latest").write_text("1", encoding="utf-8")
        checkpoint.write_json(directory / "model_config.json", sat_config)
        checkpoint.copy_side_files(source, directory)


def main(argv: list[str] | None = None) -> None:
    parser = terminal.Parser(description=__doc__)
    parser.add_argument("direction", choices=["import", "export"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="directory to write; must not exist yet")
    parser.add_argument(
        "--qkv", choices=["split", "per_head"], required=True, help="row order of the SAT side, see above"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="import: directory with ice_text.model, which SAT keeps elsewhere"
    )
    args = parser.parse_args(argv)
    if args.target.exists():
        raise ValueError(f"{args.target} exists; choose another directory")
    if args.tokenizer and (args.direction == "export" or not args.tokenizer.is_dir()):
        raise ValueError(
            f"--tokenizer {args.tokenizer}: expected with import, a directory with ice_text.model"
        )
    if args.direction == "import":
        import_sat(args.source, args.target, args.qkv == "split", args.tokenizer)
        print(
            "note: SAT trains this model with a dropout of 0.1; train.py trains "
            "it without (lora_dropout is its own)"
        )
    else:
        export_sat(args.source, args.target, args.qkv == "split")
    print(f"wrote {args.target}")


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
