"""What is read from other people's files is whole, of the right types and means what it says, or is refused
in a line.

Every case is a small model of the right family with one thing changed, and the message that it must give
(None: it is read, and right).
"""

import base64
import dataclasses
import json
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import T5_TEXT, filled

import checkpoint
import data
import generate
import model_blip2 as blip2
import model_qwen_vl as qwen
import model_visualglm as glm
import records
import tokenizer_qwen_vl
import tokenizer_visualglm
from convert import lavis, sat

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {
    "qwen_vl": "tiny_qwen_vl",
    "blip2": "tiny_blip2",
    "visualglm": "tiny_visualglm",
    "stage1": "blip2_stage1",
}
MODULES = {"qwen_vl": qwen, "blip2": blip2, "visualglm": glm, "stage1": blip2}


@pytest.fixture(params=SAMPLES)
def kind(request):
    return request.param


@pytest.fixture
def copy(tmp_path):
    """A copy of a small checkpoint, which may be spoilt."""

    def make(kind: str) -> Path:
        shutil.copytree(ROOT / "samples" / SAMPLES[kind], tmp_path / "model", dirs_exist_ok=True)
        return tmp_path / "model"

    return make


def refused(match: str | None, function, *args):
    """One line that says what, where and what was expected; no other kind of exception."""
    with pytest.raises(ValueError, match=match) as info:
        function(*args)
    assert len(str(info.value).splitlines()) == 1 and len(str(info.value)) < 2000


# ---- config.json: every field of every model, with every wrong type


def fields_of(config: dict, path=()):
    """(path of keys, value) of everything but what is only said, and what names the family."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield (*path, key), value
            yield from fields_of(value, (*path, key))
        elif key not in ("model_type", "torch_dtype", "architectures"):
            yield (*path, key), value


def changed(config: dict, path: tuple, value) -> dict:
    config = json.loads(json.dumps(config))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


WRONG = ["x", -1, 1.5, [], {}, 10**12, True, float("nan"), [[1]]]


def test_every_field_of_every_config_is_checked(kind):
    module, config = MODULES[kind], checkpoint.read_config(ROOT / "samples" / SAMPLES[kind])
    paths = list(fields_of(config))
    assert len(paths) > 15
    for path, right in paths:
        for value in WRONG:
            if value is True and isinstance(right, bool) or value == 1.5 and path[-1] == "mlp_ratio":
                continue  # that one is right
            refused("config.json", module.build_model, changed(config, path, value))


def test_deep_models_and_foreign_files_are_refused(kind, copy, tmp_path):
    directory = copy(kind)
    module = MODULES[kind]
    for text in (
        "",
        "null",
        "[]",
        "{}",
        "5",
        "{",
        "[" * 10**5,
        '{"model_type": ["qwen"]}',
        '{"model_type": {}}',
    ):
        (directory / "config.json").write_text(text)
        refused("config.json", lambda: module.build_model(checkpoint.read_config(directory)))
        if kind != "stage1":
            refused("config.json", generate.load_model, directory)
    (directory / "config.json").write_bytes(b"\xff\xfe{}")
    refused("is not text", checkpoint.read_config, directory)
    (directory / "config.json").write_text('{"torch_dtype": "int4"}')
    refused("torch_dtype", checkpoint.read_config, directory)
    (directory / "config.json").write_text('{"architectures": "x"}')
    refused("architectures", checkpoint.read_config, directory)
    (directory / "config.json").write_text('\ufeff{"model_type": "qwen"}', encoding="utf-8")
    assert checkpoint.read_config(directory) == {"model_type": "qwen"}  # a byte order mark is no damage


@pytest.mark.parametrize(
    "kind,path,value",
    [
        ("qwen_vl", ("scale_attn_weights",), False),
        ("qwen_vl", ("attn_dropout_prob",), 0.1),
        ("blip2", ("vision_config", "hidden_act"), "relu"),
        ("blip2", ("qformer_config", "hidden_act"), "relu"),
        ("blip2", ("text_config", "activation_function"), "gelu"),
        ("blip2", ("text_config", "enable_bias"), False),
        ("blip2", ("qformer_config", "position_embedding_type"), "relative_key"),
        ("visualglm", ("eva_config", "layernorm_order"), "post"),
        ("visualglm", ("position_encoding_2d",), False),
        ("visualglm", ("qformer_config", "cross_attn_hidden_size"), 64),
    ],
)
def test_keys_that_change_what_is_computed_are_refused(kind, path, value):
    config = checkpoint.read_config(ROOT / "samples" / SAMPLES[kind])
    refused(path[-1], MODULES[kind].build_model, changed(config, path, value))


# ---- safetensors headers


def entry(**change):
    return lambda h: h["b"].update(change)


HEADERS = {
    "entry is a number": lambda h: h.update(b=5),
    "no dtype": lambda h: h["b"].pop("dtype"),
    "no shape": lambda h: h["b"].pop("shape"),
    "no offsets": lambda h: h["b"].pop("data_offsets"),
    "metadata is a number": lambda h: h.update(__metadata__=5),
    "metadata of numbers": lambda h: h.update(__metadata__={"a": 5}),
    "shares bytes": lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]),
    "hole": lambda h: h.pop("a"),
    "behind the last": lambda h: h.pop("c"),
    **{f"dtype {v!r}": entry(dtype=v) for v in (None, 5, "F99", [], {}, "I64", "f32")},
    **{
        f"offsets {v!r}": entry(data_offsets=v)
        for v in (
            None,
            5,
            "x",
            [],
            [0],
            [0, 1, 2],
            ["a", "b"],
            [-24, 0],
            [48, 24],
            [0, 10**18],
            [1.5, 2.5],
            [10**30, 10**31],
            [True, 25],
        )
    },
    **{
        f"shape {v!r}": entry(shape=v)
        for v in (
            None,
            5,
            "x",
            [],
            [-2, -3],
            ["a"],
            [1.5, 4],
            [10**30],
            [0, 6],
            [[6]],
            [0, 10**30],
            [True, 6],
        )
    },
}


def safetensors(path: Path, header, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path, case):
    header = {
        n: {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]}
        for i, n in enumerate("abc")
    }
    safetensors(tmp_path / "model.safetensors", header, bytes(72))
    assert checkpoint.open_weights(tmp_path).names == {*"abc"}
    HEADERS[case](header)
    safetensors(tmp_path / "model.safetensors", header, bytes(72))
    refused("model.safetensors", checkpoint.open_weights, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"5",
        b"null",
        b"",
        b"{",
        b"[" * 10**5,
        b'{"\xff": 1}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "U8", "shape": [1], '
        b'"data_offsets": [1, 2]}}',
    ],
)
def test_safetensors_headers_that_are_no_objects(tmp_path, text):
    safetensors(tmp_path / "model.safetensors", text, b"12")
    refused("model.safetensors", checkpoint.open_weights, tmp_path)


# ---- indices

INDICES = {
    "outside": {"a": "../x.safetensors", "b": "x.safetensors"},
    "absolute": {"a": "/dev/zero", "b": "x.safetensors"},
    "folder": {"a": "sub/x.safetensors", "b": "x.safetensors"},
    "dot": {"a": ".", "b": "x.safetensors"},
    "no name": {"a": "", "b": "x.safetensors"},
    "config.json": {"a": "config.json", "b": "x.safetensors"},
    "number": {"a": 5, "b": "x.safetensors"},
    "null": {"a": None, "b": "x.safetensors"},
    "list": {"a": ["x.safetensors"], "b": "x.safetensors"},
    "gone": {"a": "y.safetensors", "b": "x.safetensors"},
    "not named": {"a": "x.safetensors"},
    "not held": {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"},
    "empty": {},
    "no object": [],
    "nothing": None,
}


@pytest.mark.parametrize("case", INDICES)
def test_indices(tmp_path, case):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path.parent / "x.safetensors")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "sub")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    assert checkpoint.open_weights(tmp_path).names == {"a", "b"}
    index.write_text(json.dumps({"weight_map": INDICES[case]}))
    refused("index.json|x.safetensors", checkpoint.open_weights, tmp_path)


def test_what_two_files_say_is_not_chosen_from(tmp_path):
    """A tensor in two shards; a single file beside an index."""
    for shard in ("x.safetensors", "y.safetensors"):
        save_file({shard[0]: torch.ones(2), "twice": torch.ones(2)}, tmp_path / shard)
    index = {"x": "x.safetensors", "twice": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused("y.safetensors holds 'twice'", checkpoint.open_weights, tmp_path)
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    refused("model.safetensors and model.safetensors.index.json", checkpoint.open_weights, tmp_path)


# ---- values


@pytest.mark.parametrize("case", ["int", "bool", "nan", "inf", "one nan", "zeros", "overflow"])
def test_values_that_no_model_has(kind, copy, case):
    directory, dtype = copy(kind), torch.float16 if case == "overflow" else torch.float32
    state = load_file(directory / "model.safetensors")
    name = max(state, key=lambda n: state[n].numel())
    w = state[name].float()
    w.view(-1)[7] = {"one nan": float("nan"), "inf": float("inf"), "overflow": 1e30}.get(case, w.view(-1)[7])
    state[name] = {"int": w.to(torch.int8), "bool": w.bool(), "nan": w * float("nan")}.get(case, w)
    if case == "zeros":
        state = {n: torch.zeros_like(t) for n, t in state.items()}
    save_file(state, directory / "model.safetensors")
    match = {
        "int": "int8, expected floating",
        "bool": "bool, expected floating",
        "overflow": "too large for",
        "zeros": "every weight is zero",
    }.get(case, "holds NaN or infinity")
    refused(match, generate.load_model, directory, dtype)


def test_tensors_of_a_bin_file(tmp_path):
    good = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(2)), "c": torch.zeros(1).expand(2, 2)}
    torch.save(good, tmp_path / "pytorch_model.bin")
    assert torch.equal(checkpoint.open_weights(tmp_path).read("a"), good["a"])

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    for bad in (
        [1],
        {"state_dict": good},
        {1: good["a"]},
        {**good, "a": None},
        good["a"],
        torch.nn.Linear(2, 2),
        {"a": good["a"].to_sparse()},
        {"a": good["a"].to(torch.complex64)},
        {"a": good["a"].to("meta")},
        {"a": Evil()},
        Evil(),
    ):
        torch.save(bad, tmp_path / "pytorch_model.bin")
        refused("pytorch_model.bin", checkpoint.open_weights, tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- tied names: equal by value, whatever name the file has them under

TIED = {
    "blip2": ["language_model.lm_head.weight"],
    "t5": ["language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"],
    "qwen_vl": ["lm_head.weight"],
}


def tied_checkpoint(tmp_path, kind: str):
    """A small model with tied weights, freshly initialised ->
    (module, directory, name of the tied tensor)."""
    module = MODULES.get(kind, blip2)
    config = checkpoint.read_config(ROOT / "samples" / SAMPLES.get(kind, "tiny_blip2"))
    if kind == "qwen_vl":
        config["tie_word_embeddings"] = True
    if kind == "t5":
        config["use_decoder_only_language_model"] = False
        config["text_config"] = T5_TEXT
    model = filled(module.build_model(config))
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    checkpoint.write_json(tmp_path / "config.json", config)
    return module, tmp_path, module.aliases(config)[TIED[kind][0]]


@pytest.mark.parametrize("kind", TIED)
def test_tied_names_must_be_equal(tmp_path, kind):
    module, directory, name = tied_checkpoint(tmp_path, kind)
    assert sorted(module.aliases(checkpoint.read_config(directory))) == sorted(TIED[kind])
    file = directory / "model.safetensors"
    state = load_file(file)
    expected = dict(generate.load_model(directory).named_parameters())
    assert not expected.keys() & {*TIED[kind]}
    for held in ([name, *TIED[kind]], TIED[kind], TIED[kind][:1]):  # beside it, and instead of it
        save_file(
            {**{n: t for n, t in state.items() if n != name}, **{n: state[name].clone() for n in held}}, file
        )
        loaded = dict(generate.load_model(directory).named_parameters())
        assert all(torch.equal(loaded[n], p) for n, p in expected.items())
    for alias in TIED[kind]:
        save_file({**state, alias: state[name] + 1e-3}, file)
        refused(f"{alias} and {name} are one tied tensor", generate.load_model, directory)


def test_a_tied_qwen_computes_with_its_embedding(tmp_path):
    _, directory, _ = tied_checkpoint(tmp_path, "qwen_vl")
    shutil.copy(ROOT / "samples/tiny_qwen_vl/qwen.tiktoken", directory)
    tied = generate.load_model(directory)
    batch = qwen.probe_batch(qwen.load_processor(directory))
    config = {**checkpoint.read_config(directory), "tie_word_embeddings": False}
    checkpoint.write_json(directory / "config.json", config)
    state = load_file(directory / "model.safetensors")
    save_file(
        {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, directory / "model.safetensors"
    )
    untied = generate.load_model(directory)
    assert torch.equal(tied.logits(tied.hidden(batch)), untied.logits(untied.hidden(batch)))
    batch = dataclasses.replace(batch, targets=torch.arange(len(batch.input_ids)))
    losses = [model(batch)[0] for model in (tied, untied)]
    assert torch.equal(*losses)
    losses[0].backward()
    losses[1].backward()
    grad = untied.transformer.wte.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.transformer.wte.weight.grad, grad)


# ---- tokenizers


def spoilt(data: bytes) -> dict[str, bytes]:
    lines = data.splitlines(keepends=True)
    return {
        "empty": b"",
        "half": data[: len(data) // 2],
        "binary": bytes(range(256)) * 3,
        "{}": b"{}",
        "[]": b"[]",
        "null": b"null",
        "deep": b"[" * 10**5,
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "a line twice": data + lines[0],
        "html": b"<html>403</html>",
    }


@pytest.mark.parametrize(
    "kind,file",
    [
        ("qwen_vl", "qwen.tiktoken"),
        ("visualglm", "tokenizer.json"),
        ("blip2", "vocab.json"),
        ("blip2", "merges.txt"),
    ],
)
def test_damaged_tokenizers(copy, kind, file):
    directory, module = copy(kind), MODULES[kind]
    data = (directory / file).read_bytes()
    for name, bad in spoilt(data).items():
        (directory / file).write_bytes(bad)
        with pytest.raises(ValueError) as info:
            module.load_processor(directory)
        assert len(str(info.value).splitlines()) == 1, name
    ids = lambda: module.load_processor(directory).tokenizer.encode("Which animal? 这是什么 1/2")  # noqa: E731
    (directory / file).write_bytes(data)
    expected = ids()
    for good in (
        data.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + data if file.endswith(("json", "tiktoken")) else data,
    ):
        if file != "vocab.json":
            (directory / file).write_bytes(good)
            assert ids() == expected
    (directory / file).unlink()
    refused("tokenizer", module.load_processor, directory)


def test_tiktoken_lines(copy):
    directory = copy("qwen_vl")
    path = directory / "qwen.tiktoken"
    lines = path.read_text().splitlines()
    a = base64.b64encode(b"a").decode()
    for bad in (
        lines[:-1] + [lines[-1].split()[0] + " -5"],
        lines[:-1] + [lines[-1].split()[0] + " 5"],
        lines[:-1] + [lines[-1].split()[0] + " five"],
        lines[:-1] + ["%% 1500"],
        [line for line in lines if line.split()[0] != a]
        + ["YWFhYWFh " + str(lines.index(next(line for line in lines if line.split()[0] == a)))],
    ):
        path.write_text("\n".join(bad))
        refused("qwen.tiktoken", tokenizer_qwen_vl.read_tiktoken, path)
    path.write_text("\n".join(lines[::-1]))  # any order: the ranks say it
    assert tokenizer_qwen_vl.read_tiktoken(path).get_vocab_size() == len(lines)


def test_merges_out_of_order(copy):
    directory = copy("blip2")
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    for bad in (lines[::-1], lines[:1], lines[: len(lines) // 2]):
        (directory / "merges.txt").write_text("\n".join(bad), encoding="utf-8")
        refused("merges.txt", blip2.load_processor, directory)


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return field(
        1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + b"\x18" + varint(kind)
    )


def test_sentencepiece_files(tmp_path):
    special = ["<unk>", "<pad>", "<sop>", "<eop>", "[MASK]", "[gMASK]", "<n>"]
    pieces = [piece(t, 0.0, 2 if t == "<unk>" else 4 if t == "<n>" else 3) for t in special]
    pieces += [piece(f"<0x{b:02X}>", 0.0, 6) for b in range(256)] + [piece(c, -1.0) for c in "▁ab"]
    path = tmp_path / "ice_text.model"
    path.write_bytes(b"".join(pieces))
    assert tokenizer_visualglm.GLMTokenizer(tmp_path).encode("ab")
    whole = b"".join(pieces)
    for bad in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole + b"\xff",
        b"",
        b"{}",
        whole + pieces[-1],
        whole + piece("c", float("nan")),
        whole + piece("c", 0.0, 9),
        whole + field(1, b""),
        whole + field(3, field(2, b"\x05\0\0\0abc")),
    ):
        path.write_bytes(bad)
        refused("ice_text.model|the tokenizer", tokenizer_visualglm.GLMTokenizer, tmp_path)


# ---- SAT checkpoints as SAT saves them


def sat_directory(tmp_path) -> Path:
    sat.main(["export", str(ROOT / "samples/tiny_visualglm"), str(tmp_path / "sat"), "--qkv", "split"])
    return tmp_path / "sat"


def test_a_sat_checkpoint_with_random_states_is_imported(tmp_path):
    source = sat_directory(tmp_path)
    file = source / "1/mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    training = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "iteration": 300,
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        "client_lr_scheduler": {"num_iters": 300, "lr": np.float64(1e-4).item()},
        "ds_config": {},
        "buffer_names": [],
    }
    torch.save({**state, **training}, file)
    sat.main(["import", str(source), str(tmp_path / "back"), "--qkv", "split"])
    weights = checkpoint.open_weights(tmp_path / "back")
    original = checkpoint.open_weights(ROOT / "samples/tiny_visualglm")
    assert all(torch.equal(weights.read(n), original.read(n)) for n in original)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    name = next(iter(state["module"]))
    for bad in (
        {**state, **training, "client_lr_scheduler": Evil()},
        {"module": [1]},
        {},
        [],
        Evil(),
        {"module": {**state["module"], name: 5}},
        {"module": {**state["module"], name: state["module"][name].to(torch.int8)}},
        {"module": {**state["module"], name: state["module"][name] * float("nan")}},
    ):
        torch.save(bad, file)
        argv = ["import", str(source), str(tmp_path / "bad"), "--qkv", "split"]
        refused("SAT checkpoint|plain|NaN|int8", sat.main, argv)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "bad").exists()
    for folder in ("", "..", "/etc", "2"):
        (source / "latest").write_text(folder)
        refused("latest", sat.main, ["import", str(source), str(tmp_path / "bad"), "--qkv", "split"])
    (source / "latest").unlink()
    refused("latest", sat.main, ["import", str(source), str(tmp_path / "bad"), "--qkv", "split"])


# ---- a vision tower that is not square


def test_visualglm_takes_images_that_are_not_square(copy, tmp_path):
    """The same tower computed with its parts by hand: rows x columns of patches, in that order."""
    directory = copy("visualglm")
    config = checkpoint.read_config(directory)
    config["eva_config"]["image_size"] = [24, 40]  # height, width; patches of 8
    checkpoint.write_json(directory / "config.json", config)
    state = load_file(directory / "model.safetensors")
    name = "image_encoder.vit.transformer.position_embeddings.weight"
    state[name] = state[name][: 3 * 5 + 1].clone()
    save_file(state, directory / "model.safetensors")
    Image.effect_noise((70, 30), 50).convert("RGB").save(tmp_path / "a.png")
    processor, model = glm.load_processor(directory), generate.load_model(directory)
    pixels = processor.load_image(tmp_path / "a.png")
    assert pixels.shape == (3, 24, 40)
    vit = model.image_encoder.vit
    seen = []
    vit.transformer.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = model.encode_images(pixels[None])
    assert features.shape[1] == 16
    proj = vit.mixins["patch_embedding"].proj
    for row, column in ((0, 0), (0, 4), (2, 1)):
        patch = pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        expected = (
            (proj.weight * patch).sum((1, 2, 3)) + proj.bias + state[name][1 + 5 * row + column].float()
        )
        torch.testing.assert_close(seen[0][1 + 5 * row + column], expected, atol=1e-4, rtol=1e-4)
    asked = records.request([("user", "what is it?")], [str(tmp_path / "a.png")], "test")
    engine = generate.Engine(model, processor, cache_tokens=0)
    (text,) = generate.answer(engine, [asked], generate.Decoding(max_new_tokens=3))
    assert isinstance(text, str)
    batch = glm.probe_batch(processor)
    assert model.logits(model.hidden(batch)).isfinite().all()
    for bad in ([24], [24, 40, 8], [24, 41], 24):
        refused("image_size", glm.build_model, changed(config, ("eva_config", "image_size"), bad))


# ---- learned positions end


def long_request(tmp_path, words: int):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    return records.request([("user", "dog " * words)], [str(tmp_path / "a.png")], "test")


def sample(tmp_path, words: int):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "dog " * words}, {"role": "assistant", "content": "a cat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "messages": turns}))
    return data.Entry({"name": "chatml_dataset", "data_files": str(tmp_path / "a.jsonl")}).conversations(0)[0]


def test_more_tokens_than_positions_are_refused(tmp_path):
    directory = ROOT / "samples/tiny_blip2"  # OPT with 128 positions
    processor, model = blip2.load_processor(directory), generate.load_model(directory)
    limit = model.config.max_positions
    assert limit == 128 == processor.config.max_positions
    short, long = (sample(tmp_path, words) for words in (20, 300))
    assert len(processor.encode(short, 2048)["input_ids"]) < limit
    refused("the model has 128 positions.*max_length=128", processor.encode, long, 2048)
    assert len(processor.encode(long, limit)["input_ids"]) == limit
    refused("the model has 128 positions", processor.prompt, long_request(tmp_path, 300))


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_end_at_the_last_position(tmp_path, capsys, beams):
    directory = ROOT / "samples/tiny_blip2"
    processor, model = blip2.load_processor(directory), generate.load_model(directory)
    model.config.text.max_position_embeddings = 40  # as if the table ended there
    request = processor.prompt(long_request(tmp_path, 8))
    request["pixel_values"] = [processor.load_image(p) for p in request["images"]]
    room = 40 - len(request["input_ids"])
    assert 0 < room < 30
    if beams == 1:
        (answer,) = generate.generate(model, [request], generate.Decoding(100), [])
        assert "last position" in capsys.readouterr().err
    else:
        (((_, answer), *_),) = generate.beam_search(
            model, [request], generate.Decoding(100, num_beams=beams), [[999]]
        )
    assert len(answer) == room
    model.config.text.max_position_embeddings = len(request["input_ids"])
    refused("positions", generate.generate, model, [request], generate.Decoding(5), [])


def test_positions_of_each_model():
    limits = {
        kind: MODULES[kind].build_model(checkpoint.read_config(ROOT / "samples" / name)).config.max_positions
        for kind, name in SAMPLES.items()
    }
    assert limits == {"qwen_vl": None, "blip2": 128, "visualglm": None, "stage1": 8 + 64}


# ---- what stands beside the weights


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
        {"image_mean": "x"},
        {"resample": 2},
        {"size": {"height": 32, "width": 64}},
        {"size": 32},
        {"size": {"shortest_edge": 64}},
        {"size": "64"},
        {"do_normalize": False},
        {"do_center_crop": True},
        {"rescale_factor": 1.0},
    ],
)
def test_a_preprocessor_that_differs_is_refused(kind, copy, change):
    directory, stage = copy(kind), "pretrain1" if kind == "stage1" else "sft"
    right = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": {"height": 64, "width": 64},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 0.00392156862745098,
        "image_processor_type": "BlipImageProcessor",
    }
    path = directory / "preprocessor_config.json"
    checkpoint.write_json(path, right)
    MODULES[kind].load_processor(directory, stage)
    checkpoint.write_json(path, {**right, **change})
    refused(f"preprocessor_config.json: {next(iter(change))}", MODULES[kind].load_processor, directory, stage)
    path.write_text("[")
    refused("preprocessor_config.json", MODULES[kind].load_processor, directory, stage)


@pytest.mark.parametrize(
    "kind,key,value",
    [
        ("visualglm", "num_image_tokens", 20000),
        ("blip2", "add_prefix_space", True),
        ("blip2", "add_bos_token", False),
        ("stage1", "do_lower_case", False),
    ],
)
def test_a_tokenizer_config_that_differs_is_refused(copy, kind, key, value):
    directory, stage = copy(kind), "pretrain1" if kind == "stage1" else "sft"
    checkpoint.write_json(directory / "tokenizer_config.json", {key: value})
    refused(key, MODULES[kind].load_processor, directory, stage)


@pytest.mark.parametrize(
    "kind,path,value",
    [
        ("qwen_vl", ("visual", "image_start_id"), 1713),
        ("qwen_vl", ("vocab_size",), 1700),
        ("visualglm", ("gmask_token_id",), 1404),
        ("visualglm", ("vocab_size",), 1400),
        ("blip2", ("text_config", "bos_token_id"), 3),
        ("blip2", ("text_config", "vocab_size"), 900),
        ("blip2", ("image_token_index",), 1002),
        ("stage1", ("qformer_config", "vocab_size"), 900),
    ],
)
def test_tokenizer_and_config_that_do_not_belong_together(copy, kind, path, value):
    directory, stage = copy(kind), "pretrain1" if kind == "stage1" else "sft"
    checkpoint.write_json(directory / "config.json", changed(checkpoint.read_config(directory), path, value))
    match = "belong together|vocab_size"
    refused(match, MODULES[kind].load_processor, directory, stage)


# ---- LAVIS checkpoints


def test_lavis_commands(tmp_path):
    """Out and in again is the same model, whole or with the frozen parts from --base; resizing there and back
    keeps all but the positions."""
    base, file, whole = (
        ROOT / "samples/tiny_blip2",
        tmp_path / "x.pth",
        lavis.read_model(ROOT / "samples/tiny_blip2"),
    )
    for number, options in enumerate(([], ["--trained_only"])):
        out = tmp_path / str(number)
        lavis.main(["export", str(base), "--out", str(file), *options])
        held = {*torch.load(file, weights_only=True)["model"]}
        assert any(n.startswith("opt_model.") for n in held) != bool(options) and "opt_proj.weight" in held
        lavis.main(["import", str(file), "--base", str(base), "--out", str(out)])
        again = lavis.read_model(out)
        assert again.keys() == whole.keys()
        assert not [n for n in whole if not torch.equal(whole[n].float(), again[n]) and "qkv.bias" not in n]
        file.unlink()
    lavis.main(["resize", str(base), str(tmp_path / "large"), "--image_size", "128"])
    large, name = lavis.read_model(tmp_path / "large"), "vision_model.embeddings.position_embedding"
    config = checkpoint.read_config(tmp_path / "large")
    assert large.pop(name).shape[1] == (128 // config["vision_config"]["patch_size"]) ** 2 + 1
    assert not [n for n in large if not torch.equal(large[n], whole[n].float())]
    refused("--config", lavis.main, ["import", str(tmp_path / "none.pth"), "--out", str(tmp_path / "y")])
    lavis.main(["export", str(base), "--out", str(file)])
    onto = [["import", str(file), "--base", str(base), "--out"], ["resize", "--image_size", "128", str(base)]]
    for argv in (*onto, ["init", str(base), "--tower", str(file), "--out"]):
        refused("exists and is not empty", lavis.main, [*argv, str(tmp_path / "large")])
    nowhere = ["--tokenizer", str(tmp_path / "none")]
    refused("is no directory", lavis.main, [*onto[0], str(tmp_path / "y"), *nowhere])
    refused("ice_text", sat.main, ["import", str(base), str(tmp_path / "y"), "--qkv", "split", *nowhere])


def test_damaged_lavis_files(tmp_path):
    out, file = tmp_path / "out", tmp_path / "x.pth"
    config = checkpoint.read_config(ROOT / "samples/tiny_blip2")
    state = lavis.to_lavis(lavis.read_model(ROOT / "samples/tiny_blip2"))

    def import_lavis(saved):
        torch.save(saved, file)
        lavis.write_model(out, config, lavis.read_lavis(file), None)

    import_lavis({"model": state})
    assert checkpoint.open_weights(out).names == checkpoint.open_weights(ROOT / "samples/tiny_blip2").names
    shutil.rmtree(out)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    name, table, head = "opt_proj.weight", "visual_encoder.pos_embed", "opt_model.lm_head.weight"
    w = state[name]
    for change in (
        {name: w.to(torch.int8)},
        {name: w * float("nan")},
        {name: None},
        {1: w},
        {name: w.to_sparse()},
        {name: w.to("meta")},
        {name: w.to(torch.complex64)},
        {"zzz": w},
        {head: state[head] + 1},
        {name: w[:-1]},
        {table: torch.zeros(5)},
        {table: torch.zeros(1, 7, 128)},
        {table: torch.zeros(1, 65, 64)},
        {"x": Evil()},
    ):
        refused(None, import_lavis, {"model": {**state, **change}})
    for gone in ("visual_encoder.blocks.0.attn.q_bias", "visual_encoder.blocks.0.attn.v_bias", name):
        refused(None, import_lavis, {"model": {n: t for n, t in state.items() if n != gone}})
    for saved in ([1], {"model": [1]}, {"model": {}}, Evil()):
        refused(None, import_lavis, saved)
    assert not out.exists() and not (tmp_path / "ran").exists()
