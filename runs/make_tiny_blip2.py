"""A small untrained BLIP-2: tokenizers trained on samples/, random weights. See runs/make_tiny.sh.

export PYTHONPATH=.
python runs/make_tiny_blip2.py init runs/out/blip2  # .../language_model and .../stage1
python runs/make_tiny_blip2.py tower runs/out/blip2/trained1 runs/out/blip2/tower  # the ViT alone
python runs/make_tiny_blip2.py round runs/out/blip2/trained2 samples/tiny_blip2  # weights to bf16
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import checkpoint
import model_blip2 as blip2
from build import named_generator

NUM_TOKENS = 1000  # of each tokenizer, about
WIDTH = 128
CONFIG = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "model_type": "blip-2",
    "num_query_tokens": 8,
    "image_text_hidden_size": 64,
    "initializer_range": 0.02,
    "use_decoder_only_language_model": True,
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "blip_2_vision_model",
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 4 * WIDTH,
        "image_size": 64,
        "patch_size": 8,
    },
    "qformer_config": {
        "model_type": "blip_2_qformer",
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "encoder_hidden_size": WIDTH,
        "max_position_embeddings": 64,
    },
    "text_config": {
        "model_type": "opt",
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 4 * WIDTH,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": 128,
        "dropout": 0.1,
        "bos_token_id": 2,
        "pad_token_id": 1,
    },
}


def texts() -> list[str]:
    """Every English caption, question and answer of the training files, worded as the model gets them."""
    found = []
    for line in Path("samples/pretrain/vqa_train_en.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = blip2.question_text(record["question"])
        found.append(blip2.Blip2Processor.QUESTION_PROMPT.format(question))
        found += [f" {answer}" for answer in record["answers"]]
    for a in json.loads(Path("samples/caption/captions_train_en.json").read_text(encoding="utf-8"))[
        "annotations"
    ]:
        caption = blip2.caption_text(a["caption"])
        found += [caption, f"a photo of {caption}"]
    return found


def write_opt_tokenizer(out: Path) -> int:
    """vocab.json and merges.txt as OPT has them; returns the number of their tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=NUM_TOKENS, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    bpe.model.save(str(out))
    vocab = json.loads((out / "vocab.json").read_text())
    vocab["<mask>"] = len(vocab)
    checkpoint.write_json(out / "vocab.json", vocab)
    return len(vocab)


def write_bert_tokenizer(out: Path) -> int:
    """vocab.txt as BERT has it; returns the number of its words."""
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert.train_from_iterator(
        texts(), trainers.WordPieceTrainer(vocab_size=NUM_TOKENS, special_tokens=special, show_progress=False)
    )
    bert.model.save(str(out))
    return bert.get_vocab_size()


def write_weights(out: Path, config: dict) -> None:
    model = blip2.build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_weights(name, p, named_generator(0, name))
            if p.ndim == 2 and "embed" not in name:
                p.mul_(WIDTH**-0.5 / 0.02)  # 0.02 is for models ten times as wide
            if name.startswith("language_projection"):
                # the language model alone, while it is trained first; then a picture begins as nothing
                p.zero_()
    checkpoint.write_json(out / "config.json", config)
    checkpoint.save_weights(out, model.state_dict().items())


def init(root: Path) -> None:
    language, stage1 = root / "language_model", root / "stage1"
    for path in (language, stage1):
        path.mkdir(parents=True, exist_ok=True)
    num_tokens, num_words = write_opt_tokenizer(language), write_bert_tokenizer(stage1)
    newline = json.loads((language / "vocab.json").read_text())["Ċ"]
    # one more: the image's
    text = {**CONFIG["text_config"], "vocab_size": num_tokens + 1, "eos_token_id": newline}
    qformer = {**CONFIG["qformer_config"], "vocab_size": num_words + 1}  # one more: [DEC]
    config = {**CONFIG, "text_config": text, "qformer_config": qformer, "image_token_index": num_tokens}
    write_weights(language, config)
    qformer = {**qformer, "use_qformer_text_input": True}
    retrieval = {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "qformer_config": qformer,
        "image_token_index": None,
    }
    write_weights(stage1, {**config, **retrieval, "stage1_heads": True})


def copy_weights(source: Path, out: Path, prefix: str, dtype: torch.dtype) -> None:
    """The tensors whose names begin so, with config.json and tokenizer."""
    weights = checkpoint.open_weights(source)
    with checkpoint.atomic_dir(out) as temporary:
        names = [n for n in sorted(weights.names) if n.startswith(prefix)]
        checkpoint.save_weights(temporary, ((n, weights.read(n).to(dtype)) for n in names))
        config = {**checkpoint.read_config(source), "torch_dtype": str(dtype).removeprefix("torch.")}
        checkpoint.write_json(temporary / "config.json", config)
        checkpoint.copy_side_files(source, temporary)


if __name__ == "__main__":
    command, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if command == "init":
        init(*paths)
    elif command == "tower":
        copy_weights(*paths, "vision_model.", torch.float32)
    else:
        copy_weights(*paths, "", torch.bfloat16)
