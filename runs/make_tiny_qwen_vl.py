"""A small untrained Qwen-VL: config.json, a byte-level BPE trained on samples/, random weights. See
runs/make_tiny.sh.

    export PYTHONPATH=.
    python runs/make_tiny_qwen_vl.py init runs/out/init
    python runs/make_tiny_qwen_vl.py round runs/out/trained samples/tiny_qwen_vl  # weights to bf16
"""

import base64
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import checkpoint
import model_qwen_vl as qwen
import tokenizer_qwen_vl
from build import named_generator

NUM_TOKENS = 1500  # of the BPE, special tokens not counted
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "intermediate_size": 704,
    "vocab_size": 1728,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 512,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.088,
    "torch_dtype": "float32",
    "visual": {
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "heads": 4,
        "mlp_ratio": 4.0,
        "output_dim": 128,
        "image_start_id": NUM_TOKENS + tokenizer_qwen_vl.SPECIAL_TOKENS.index("<img>"),
        "n_queries": 16,
    },
}


def texts() -> list[str]:
    """Every question, answer and caption of the training files."""
    found = []

    def walk(value):
        if isinstance(value, str):
            found.append(value)
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(child)

    for path in sorted(Path("samples/pretrain").glob("*train*")):
        text = path.read_text(encoding="utf-8")
        for record in map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else json.loads(text):
            walk([record.get(key) for key in ("question", "answers", "conversations")])
    for path in sorted(Path("samples/caption").glob("captions_train_*.json")):
        walk([a["caption"] for a in json.loads(path.read_text(encoding="utf-8"))["annotations"]])
    return found


def init(out: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizer_qwen_vl.byte_level_split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=NUM_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    assert len(vocab) == NUM_TOKENS, len(vocab)
    out.mkdir(parents=True, exist_ok=True)
    lines = (
        base64.b64encode(bytes(tokenizer_qwen_vl.CHAR_TO_BYTE[c] for c in token)).decode() + f" {i}\n"
        for token, i in vocab
    )
    (out / "qwen.tiktoken").write_text("".join(lines))
    checkpoint.write_json(out / "config.json", CONFIG)
    model = qwen.build_model(CONFIG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_weights(name, p, named_generator(0, name))
    checkpoint.save_weights(out, model.state_dict().items())


def round_weights(source: Path, out: Path) -> None:
    weights = checkpoint.open_weights(source)
    with checkpoint.atomic_dir(out) as temporary:
        checkpoint.save_weights(temporary, ((n, weights.read(n).bfloat16()) for n in sorted(weights.names)))
        checkpoint.write_json(
            temporary / "config.json", {**checkpoint.read_config(source), "torch_dtype": "bfloat16"}
        )
        checkpoint.copy_side_files(source, temporary)


if __name__ == "__main__":
    if sys.argv[1] == "init":
        init(Path(sys.argv[2]))
    else:
        round_weights(Path(sys.argv[2]), Path(sys.argv[3]))
