"""VisualGLM checkpoints of SwissArmyTransformer (SAT), in and out.

    python convert_sat.py import visualglm-6b-sat visualglm-6b --qkv split --tokenizer chatglm-6b
    python convert_sat.py export merged merged-sat --qkv split

A SAT directory holds `latest`, model_config.json and `1/mp_rank_00_model_states.pt`. The rows of the language model's
query_key_value are [all q | all k | all v] (`--qkv split`, SAT >= 0.4, the download since July 2023) or per head
q, k, v (`--qkv per_head`, SAT 0.3 and the first download); nothing in a file says which, and the wrong one gives
nonsense. Memory: the checkpoint once.
"""

import argparse
import pickle
import sys
from pathlib import Path

import torch

import checkpoint
import model_visualglm as glm

# in SAT's files, but recomputed or unused: rotary frequencies, and 0.3's position table
LEFT_OUT = ("mixins.chatglm-attn.rotary_emb.inv_freq", "transformer.position_embeddings.weight")
SAME_KEYS = ["hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size", "vocab_size",
             "max_sequence_length", "image_length", "bos_token_id", "mask_token_id", "gmask_token_id",
             "pad_token_id"]  # fmt: skip
RENAMED = {"eva_config": "eva_args", "qformer_config": "qformer_args"}


def expected_shapes(config: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in glm.build_model(config).named_parameters()}


def import_sat(source: Path, target: Path, split_qkv: bool, tokenizer: Path | None) -> None:
    raw = checkpoint.read_json(source / "model_config.json", "expected a SAT checkpoint directory")
    config = {**glm.PRESETS["visualglm-6b"], **{k: raw[k] for k in SAME_KEYS if k in raw}}
    config |= {ours: raw[theirs] for ours, theirs in RENAMED.items() if theirs in raw}
    config |= {k: raw[k] for k in ("layernorm_epsilon", "eos_token_id") if k in raw}
    shapes = expected_shapes(config)
    path = source / (source / "latest").read_text().strip() / "mp_rank_00_model_states.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["module"]
    except (RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as e:
        reason = (str(e).splitlines() or ["cut short"])[0]
        raise ValueError(f"{path} is no SAT checkpoint of one model-parallel rank ({reason}); fetch it again") from None
    state = {name: tensor for name, tensor in state.items() if name not in LEFT_OUT}
    names = {glm.sat_name(name): name for name in shapes}
    problems = [f"missing {n}" for n in names if n not in state] + [f"unexpected {n}" for n in state if n not in names]
    problems += [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(shapes[name])}"
        for n, name in names.items()
        if n in state and state[n].shape != shapes[name]
    ]
    if problems:
        raise ValueError(f"{path} does not fit model_config.json: {'; '.join(problems[:8])} ({len(problems)} in all)")
    heads = config["num_attention_heads"]
    tensors = (
        (name, glm.repack_qkv(name, state[n], heads, to_sat=False) if split_qkv else state[n])
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
    if checkpoint.model_kind(config) != "visualglm" or config.get("pre_seq_len"):
        raise ValueError(f"{source} is no VisualGLM without P-tuning; only that has a counterpart in SAT's format")
    weights = checkpoint.open_weights(source, glm.IGNORED_WEIGHTS)
    checkpoint.check_names(expected_shapes(config), weights)
    c = glm.VisualGLMConfig.from_dict(config)
    state = {}
    for name in weights:
        tensor = weights.read(name)
        state[glm.sat_name(name)] = (
            glm.repack_qkv(name, tensor, c.num_attention_heads, to_sat=True) if split_qkv else tensor
        )
    state[LEFT_OUT[0]] = glm.inverse_frequencies(c.head_dim, exact=True)
    sat_config = {k: config[k] for k in (*SAME_KEYS, "layernorm_epsilon", "eos_token_id") if k in config}
    sat_config |= {theirs: config[ours] for ours, theirs in RENAMED.items()}
    sat_config |= {"model_class": "VisualGLMModel", "tokenizer_type": "THUDM/chatglm-6b", "model_parallel_size": 1,
                   "layernorm_order": "post", "use_bias": True}  # fmt: skip
    with checkpoint.atomic_dir(target) as directory:
        (directory / "1").mkdir()
        torch.save({"module": state}, directory / "1" / "mp_rank_00_model_states.pt")
        (directory / "latest").write_text("1")
        checkpoint.write_json(directory / "model_config.json", sat_config)
        checkpoint.copy_side_files(source, directory)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    if args.direction == "import":
        import_sat(args.source, args.target, args.qkv == "split", args.tokenizer)
    else:
        export_sat(args.source, args.target, args.qkv == "split")
    print(f"wrote {args.target}")


if __name__ == "__main__":
    sys.exit(checkpoint.cli(main))
