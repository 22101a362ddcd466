"""A small VisualGLM to train: config.json, a unigram tokenizer trained on samples/, the tiny Qwen-VL's vision
tower, random weights elsewhere.

    export PYTHONPATH=.
    python runs/make_tiny_visualglm.py init runs/out/init_glm
    python train.py runs/tiny_visualglm.json
    python runs/make_tiny_visualglm.py round runs/out/trained_glm samples/tiny_visualglm  # weights to bf16
"""

import json
import math
import sys
from pathlib import Path

import torch
from make_tiny_qwen_vl import round_weights, texts
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

import checkpoint
import model_qwen_vl as qwen
import model_visualglm as glm
import tokenizer_visualglm
from build import named_generator

NUM_PIECES = 1400  # ordinary ones
CONFIG = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "hidden_size": 128,
    "inner_hidden_size": 512,
    "num_layers": 4,
    "num_attention_heads": 4,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 512,
    "position_encoding_2d": True,
    "image_length": 16,
    "torch_dtype": "float32",
    "eva_config": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "inner_hidden_size": 512,
        "layernorm_epsilon": 1e-6,
        "image_size": [64, 64],
        "patch_size": 8,
    },
    "qformer_config": {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 16,
        "inner_hidden_size": 512,
        "is_decoder": [True, False],
        "layernorm_epsilon": 1e-12,
    },
    "initializer_range": 0.05,
}
CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]


def tokenizer() -> Tokenizer:
    """Pieces in ChatGLM's order: special ones, `<n>`, ordinary ones, masks and markers, tab and blanks,
    bytes."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    template = [f"\u95ee:{t}\u7b54:" for t in texts()] + ["<img></img>"] * 50
    trained.train_from_iterator(
        template, trainers.UnigramTrainer(vocab_size=NUM_PIECES, unk_token="<unk>", show_progress=False)
    )
    ordinary = [
        (p, s) for p, s in json.loads(trained.to_str())["model"]["vocab"] if p not in ("<unk>", "<n>")
    ]
    if tokenizer_visualglm.SPACE not in dict(ordinary):
        ordinary.append((tokenizer_visualglm.SPACE, -8.0))
    zero = ["<unk>", "<s>", "</s>", "<pad>", tokenizer_visualglm.NEWLINE]
    late = [
        *CONTROL,
        tokenizer_visualglm.TAB,
        *tokenizer_visualglm.BLANKS,
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    vocab = [(p, 0.0) for p in zero] + ordinary + [(p, 0.0) for p in late]
    out = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    out.normalizer = normalizers.NFKC()
    out.add_special_tokens([AddedToken(t, normalized=False) for t in (*zero[:4], *CONTROL)])
    return out


def sample_pixels() -> torch.Tensor:
    paths = sorted(Path("samples/images").rglob("*.png"))[::10]
    return torch.stack([qwen.load_processor(Path("samples/tiny_qwen_vl")).load_image(path) for path in paths])


def tower() -> dict[str, torch.Tensor]:
    """The tiny Qwen-VL's trained vision tower under this model's names: nobody trains a VisualGLM from
    nothing, the published one began with BLIP-2's.

    That tower normalises the patches before its first block, this one does not: the same with each patch's
    own standard deviation replaced by the mean one over some pictures, which the training gets over.
    """
    source = Path("samples/tiny_qwen_vl")
    weights = checkpoint.open_weights(source)
    old = {n.removeprefix("transformer.visual."): weights.read(n).float() for n in weights.names}
    kernel, (grid, patch) = (
        old["conv1.weight"],
        (CONFIG["eva_config"][k] for k in ("image_size", "patch_size")),
    )
    positions = qwen.resize_positions(old["positional_embedding"], grid[0] // patch)
    patches = (
        torch.nn.functional.conv2d(sample_pixels(), kernel, stride=patch).flatten(2).transpose(1, 2)
        + positions
    )
    scale = old["ln_pre.weight"] / patches.std(-1).mean()
    kernel, positions = kernel - kernel.mean(0), positions - positions.mean(-1, keepdim=True)
    vit = "image_encoder.vit."
    new = {
        vit + "mixins.patch_embedding.proj.weight": kernel * scale[:, None, None, None],
        vit + "mixins.patch_embedding.proj.bias": old["ln_pre.bias"],
        vit + "transformer.position_embeddings.weight": torch.cat(
            (torch.zeros(1, len(scale)), positions * scale)
        ),
    }
    heads = CONFIG["eva_config"]["num_attention_heads"]
    for i in range(CONFIG["eva_config"]["num_layers"]):
        theirs, ours = f"transformer.resblocks.{i}.", f"{vit}transformer.layers.{i}."
        for a, b in (
            ("ln_1", "input_layernorm"),
            ("attn.out_proj", "attention.dense"),
            ("ln_2", "post_attention_layernorm"),
            ("mlp.c_fc", "mlp.dense_h_to_4h"),
            ("mlp.c_proj", "mlp.dense_4h_to_h"),
        ):
            new |= {f"{ours}{b}.{kind}": old[f"{theirs}{a}.{kind}"] for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):  # rows by head: q, k, v -> all q, all k, all v
            rows = old[f"{theirs}attn.in_proj.{kind}"].unflatten(0, (heads, 3, -1))
            new[f"{ours}attention.query_key_value.{kind}"] = rows.transpose(0, 1).flatten(0, 2)
    return new


@torch.no_grad()
def focus(model) -> None:
    """Query q of the Q-Former begins as an average of the tower's features around its own place in a 4x4
    grid. Queries that all look everywhere take as long to part as all the rest of the training."""
    encoder, C = model.image_encoder, CONFIG["qformer_config"]["hidden_size"]
    former = encoder.qformer.transformer
    heads, block = CONFIG["qformer_config"]["num_attention_heads"], former.layers[0]
    # each head gets some of the frequencies of column and row
    by_head = torch.arange(C).view(4, heads, -1).transpose(0, 1).flatten()
    small = qwen.sincos_positions(math.isqrt(CONFIG["image_length"]), C)
    places = qwen.resize_positions(
        small, CONFIG["eva_config"]["image_size"][0] // CONFIG["eva_config"]["patch_size"]
    )
    former.word_embeddings.weight.copy_(small[:, by_head])
    # keys: the places, as far as a linear map can read them from the features
    features, P = encoder.vit(sample_pixels())
    features = features.unflatten(0, (-1, P))[:, 1:]
    x = torch.nn.functional.pad(features.flatten(0, 1), (0, 1), value=1.0)
    y = places[:, by_head].repeat(len(features), 1)
    solution = torch.linalg.solve(x.T @ x + torch.eye(C + 1), x.T @ y)
    cross = block.cross_attention
    cross.query.weight.copy_(6 * torch.eye(C))
    cross.key_value.weight.copy_(torch.cat((solution[:C].T, torch.eye(C))))
    cross.key_value.bias.copy_(torch.cat((solution[C], torch.zeros(C))))
    cross.dense.weight.copy_(2 * torch.eye(C))
    encoder.glm_proj.weight.normal_(0, C**-0.5, generator=named_generator(0, "glm_proj"))


def init(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(out / "tokenizer.json"), pretty=False)
    tk = tokenizer_visualglm.GLMTokenizer(out)
    ids = {"bos": tk.sop, "eos": tk.eop, "mask": tk.mask, "gmask": tk.gmask, "pad": tk.pad}
    config = {
        **CONFIG,
        "vocab_size": -(-tk.vocab_size // 64) * 64,
        **{f"{k}_token_id": v for k, v in ids.items()},
    }
    checkpoint.write_json(out / "config.json", config)
    model = glm.build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_weights(name, p, named_generator(0, name))
        parameters = dict(model.named_parameters())
        for name, tensor in tower().items():
            parameters[name].copy_(tensor)
    focus(model)
    checkpoint.save_weights(out, model.state_dict().items())


if __name__ == "__main__":
    if sys.argv[1] == "init":
        init(Path(sys.argv[2]))
    else:
        round_weights(Path(sys.argv[2]), Path(sys.argv[3]))
