"""What export.py writes, loaded by others: transformers' classes; the published names, orders and shards."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from test_blip2_train import T5, write_checkpoint
from test_engine import write_adapter
from test_train_visualglm import glm_base  # noqa: F401 (a fixture)

import checkpoint
import data
import export
import export_static
import generate
import records
import run_static
import terminal
import vlm
from quantize import quantize

SAMPLES = checkpoint.Path(__file__).resolve().parent.parent / "samples"
TINY = SAMPLES / "tiny_blip2"
QUESTION = "Question: what is it? Answer:"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return str(path)


def run(source, out, form, *options) -> None:
    command = ["--model_name_or_path", str(source), "--output_dir", str(out), "--format", form, *options]
    assert export.main(command) == 0


def request_of(directory, image: str, prompt: str = QUESTION) -> tuple[dict, object]:
    processor = data.load_processor(str(directory))
    request = processor.prompt(records.request([("user", prompt)], [image], "a test"))
    return request | {"pixel_values": [processor.load_image(p) for p in request["images"]]}, processor


def their_blip2(out):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.Blip2ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    aliases = vlm.find(checkpoint.read_config(out)).aliases(checkpoint.read_config(out))
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not set(info["missing_keys"]) - aliases.keys()
    return theirs.eval(), transformers.Blip2Processor.from_pretrained(out)


@torch.no_grad()
def assert_same_model(model, request, processor, theirs, their_processor, image: str) -> None:
    """Ids, pixels, logits of the prompt's end, greedy tokens and the text of the answer."""
    batch = their_processor(images=Image.open(image), text=QUESTION, return_tensors="pt")
    t5, ids = processor.kind == "t5", request["input_ids"].tolist()
    ours, mine = torch.tensor(ids[:-1] if t5 else ids), batch["input_ids"][0].clone()
    mine[: processor.num_image_tokens] = ours[: processor.num_image_tokens]  # the image's places
    assert torch.equal(mine, ours)
    assert torch.equal(batch["pixel_values"][0], request["pixel_values"][0])
    stream = data.collate([{**request, "num_image_tokens": processor.num_image_tokens}])
    expected = model.logits(model.hidden(stream))[-1]
    extra = {"decoder_input_ids": torch.tensor([[ids[-1]]])} if t5 else {}
    found = theirs(**batch, **extra).logits[0, -1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    answer = generate.generate(model, [request], generate.Decoding(12), processor.stop_words)[0]
    tokens = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokens[1 if t5 else len(ids) :] == answer
    text = their_processor.decode(tokens[1 if t5 else len(ids) :], skip_special_tokens=True)
    assert text.strip() == processor.decode(answer)


@pytest.mark.parametrize(
    "case",
    [
        "opt",
        "t5",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("opt-merged-untied", "opt-int4", "opt-nf4", "opt-shards-bf16")
        ),
    ],
)
def test_transformers_loads_blip2(case, tmp_path, image, capsys):
    kind, *how = case.split("-")
    base = TINY if kind == "opt" else write_checkpoint(tmp_path / "base", T5)
    expected, options = base, []
    if "untied" in how:  # the adapter holds the vocabulary projection, which is no longer the embedding
        base = untied_copy(base, tmp_path / "untied")
        projection = ["language_model.lm_head.weight"]
        adapter = write_adapter(tmp_path / "adapter", base, [r".*\.[qv]_proj"], projection, 0)
        options = ["--lora_path", str(adapter)]
    elif "shards" in how:
        options = ["--max_shard_size", "1MB", "--dtype", "bfloat16"]
    elif few := {"int4", "nf4"}.intersection(how):
        options = ["--quantize", *few, "--dtype", "float32"]
    run(base, tmp_path / "out", "transformers", *options)
    ast.parse(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    model = generate.load_model(base)
    if "--quantize" in options:
        quantize(model, options[1])
    theirs, their_processor = their_blip2(tmp_path / "out")
    assert theirs.dtype == (torch.float32 if kind == "t5" or "--quantize" in options else torch.bfloat16)
    request, processor = request_of(expected, image)
    if "merged" in how:  # rounded to the base's bf16 once, as base + adapter is not: merge.py's own proof
        model = generate.load_model(tmp_path / "out")
    assert_same_model(model, request, processor, theirs.float(), their_processor, image)
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == ("shards" in how)
    again, _ = request_of(tmp_path / "out", image)  # the export is a model_name_or_path of ours
    back = generate.load_model(tmp_path / "out")
    same = generate.generate(back, [again], generate.Decoding(12), processor.stop_words)
    assert same == generate.generate(model, [request], generate.Decoding(12), processor.stop_words)


def untied_copy(base, directory):
    config = vlm.find(checkpoint.read_config(base)).untied(checkpoint.read_config(base))
    weights = checkpoint.open_model(base, vlm.find(config))
    weights.untie({"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"})
    directory.mkdir()
    checkpoint.copy_side_files(base, directory)
    checkpoint.write_json(directory / "config.json", config)
    checkpoint.save_weights(directory, ((name, weights.read(name)) for name in weights))
    return directory


@torch.no_grad()
def test_transformers_loads_retrieval(tmp_path, image, capsys):
    transformers = pytest.importorskip("transformers")
    base = SAMPLES / "blip2_stage1"
    run(base, tmp_path / "out", "transformers", "--dtype", "float32")
    assert "tensors of stage 1 (temp, cls) are left out" in capsys.readouterr().out
    theirs, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[f"{what}_keys"] for what in ("unexpected", "missing", "mismatched"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, processor = generate.load_model(base), data.load_processor(str(base), "pretrain1")
    text, pixels = "A photo of a red fish.", processor.load_image(image)[None]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tk = processor.tokenizer
    assert ids[0].tolist() == [tk.begin, *tk.encode(text), tk.eos]
    expected = model.match(model.vision_model(pixels), ids[0], torch.tensor([ids.shape[1]]))
    options = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = theirs.eval()(**options, use_image_text_matching_head=True).logits_per_image
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


# ---- the originals' releases


class Sized:
    """A tensor's size in bf16, and no memory."""

    def __init__(self, count: int):
        self.numel, self.element_size, self.data_ptr = (lambda: count), (lambda: 2), (lambda: id(self))
        self.detach = self.cpu = self.contiguous = self.untyped_storage = lambda: self


def test_qwen_vl_has_the_published_order_and_shards(goldens, tmp_path, monkeypatch):
    table = json.loads((goldens / "qwen_vl/params_7b.json").read_text())["tensors"]
    shape = vlm.shape("qwen-vl-7b")
    parameters = dict(vlm.find(shape).network(shape).named_parameters())
    names = export.published_order(list(parameters), export.RELEASES["qwen_vl"].order)
    assert names == list(table)
    monkeypatch.setattr(torch, "save", lambda shard, path: path.touch())
    sized = ((name, Sized(parameters[name].numel())) for name in names)
    checkpoint.save_weights(tmp_path, sized, export.parse_size("2GB"), pickled=True)
    found = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert found == {name: entry["shard"] for name, entry in table.items()}


def test_visualglm_has_the_published_names_buffers_included(goldens, tmp_path):
    table = json.loads((goldens / "visualglm/param_table.json").read_text())["tensors"]
    shape = vlm.shape("visualglm-6b")
    model = vlm.find(shape).network(shape)
    release, source = export.RELEASES["visualglm"], type("Source", (), {"model": model, "config": shape})
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    buffers = release.buffers(source)
    shapes |= {name: list(t.shape) for name, t in buffers.items()}
    assert shapes == {name: entry["shape"] for name, entry in table.items()}
    assert {t.dtype for t in buffers.values()} == {torch.float16}
    ours = export.published_order([n for n, _ in model.named_parameters()], release.order)
    assert ours[0] == next(iter(table)) and ours.index("lm_head.weight") < ours.index(
        "image_encoder.glm_proj.bias"
    )


@pytest.mark.parametrize("kind", ["qwen_vl", "visualglm"])
def test_a_release_is_read_back(kind, tmp_path, image, capsys):
    base, out, release = SAMPLES / f"tiny_{kind}", tmp_path / "out", export.RELEASES[kind]
    code, modules = tmp_path / "code", [f"{name}.py" for name in release.code.split()]
    code.mkdir()
    for name in modules:
        (code / name).write_text(f"# {name}\n")
    run(base, out, "original", "--max_shard_size", "2MB", "--remote_code", str(code))
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    assert len({*index["weight_map"].values()}) == 3
    held = {}
    for file in {*index["weight_map"].values()}:
        assert file in {f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)}
        held |= torch.load(out / file, weights_only=True)
    assert held.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in held.values())
    config, tokenizer = (json.loads((out / f"{n}.json").read_text()) for n in ("config", "tokenizer_config"))
    named = [*config["auto_map"].values(), tokenizer["auto_map"]["AutoTokenizer"][0]]
    assert {f"{name.split('.')[0]}.py" for name in named} <= {*modules}
    assert all((out / name).read_text() == f"# {name}\n" for name in modules)
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False  # its default, True, would drop the vocabulary projection
    answers = []
    for directory in (base, out):
        request, processor = request_of(directory, image, "What is it?")
        model = generate.load_model(directory)
        answers.append(generate.generate(model, [request], generate.Decoding(8), processor.stop_words))
    assert answers[0] == answers[1]
    capsys.readouterr()
    run(base, tmp_path / "bare", "original")
    assert "the original's code is not part of the export" in capsys.readouterr().out
    assert (tmp_path / "bare/pytorch_model.bin").exists()


# ---- mistakes


@pytest.mark.parametrize(
    "options,said",
    [
        (["--model", "qwen_vl", "--format", "transformers"], "--format original"),
        (["--model", "blip2", "--format", "original"], "convert/lavis.py"),
        (
            ["--model", "blip2", "--format", "transformers", "--max_shard_size", "2"],
            "expected a size such as",
        ),
        (
            ["--model", "blip2", "--format", "transformers", "--remote_code", "."],
            "--remote_code has no effect",
        ),
        (["--model", "qwen_vl", "--format", "original", "--remote_code", "."], "lacks modeling_qwen.py"),
        (["--model", "blip2", "--format", "original"], "convert/lavis.py"),
        (["--model", "qwen_vl", "--format", "original", "--compile", "no"], "--compile has no effect"),
        (
            ["--model", "qwen_vl", "--format", "static", "--max_shard_size", "2GB"],
            "--max_shard_size has no effect",
        ),
        (["--model_name_or_path", str(SAMPLES / "blip2_stage1"), "--format", "static"], "gives no answers"),
        (["--model_name_or_path", "gone", "--format", "original"], "gone"),
        (["--model", "blip2", "--format", "onnx"], "invalid choice"),
        (["--model", "blip2", "--lora_path", "gone", "--format", "transformers"], "holds no LoRA adapter"),
    ],
    ids=lambda v: None if isinstance(v, list) else v[:12],
)
def test_a_mistake_is_one_line_and_writes_nothing(options, said, tmp_path, capsys):
    command = [*options, "--output_dir", str(tmp_path / "out")]
    assert terminal.cli(lambda: export.main(command)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and said in error
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_nothing(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    for out in (base, base / "inside"):
        command = ["--model_name_or_path", str(base), "--output_dir", str(out), "--format", "transformers"]
        assert terminal.cli(lambda command=command: export.main(command)) == 1
    assert capsys.readouterr().err.count("error: ") == 2
    assert {p.name for p in base.iterdir()} == {p.name for p in TINY.iterdir()}


def test_no_row_for_the_image_token(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    weights = checkpoint.open_weights(TINY)
    words = "language_model.model.decoder.embed_tokens.weight"
    cut = {n: weights.read(n)[:1001] if n == words else weights.read(n) for n in weights}
    checkpoint.save_weights(base, cut.items())
    config = checkpoint.read_config(base)
    config["text_config"]["vocab_size"], config["image_token_index"] = 1001, None
    checkpoint.write_json(base / "config.json", config)
    command = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert terminal.cli(lambda: export.main([*command, "--format", "transformers"])) == 1
    assert "no row for the image token 1001" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- static packages


def answer_ids(directory, prompt: str, images: list[str], quantized: str | None = None) -> list[int]:
    """generate.py's own."""
    processor, model = data.load_processor(str(directory)), generate.load_model(directory)
    if quantized:
        quantize(model, quantized)
    request = processor.prompt(records.request([("user", prompt)], images, "a test"))
    request["pixel_values"] = [processor.load_image(path) for path in request["images"]]
    return generate.generate(model, [request], generate.Decoding(12), processor.stop_words)[0]


ASK = """
import sys, run_static
package, questions = run_static.Package("."), {questions!r}
for prompt, images in questions:
    ids = package.generate(prompt, images, 12)
    print(ids, ascii(package.text(ids)))
names = ("model_", "vlm", "checkpoint", "engine", "kernels", "generate")
ours = [m for m in sys.modules if m.startswith(names)]
print(ours, [p for p in sys.path if {root!r} in p])
"""


def assert_package_answers(out, base, questions, quantized=None) -> None:
    """The package asked in a directory of its own, by a Python that knows nothing of the repository."""
    code = ASK.format(questions=questions, root=str(SAMPLES.parent))
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment["AOTI_RUNTIME_CHECK_INPUTS"] = (
        "1"  # shapes and strides that a compiled program takes for granted
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=500)
    *answers, imported = run.stdout.splitlines() or [""]
    assert run.returncode == 0 and imported == "[] []", run.stderr + imported
    processor = data.load_processor(str(base))
    for (prompt, images), line in zip(questions, answers, strict=True):
        expected = answer_ids(base, prompt, images, quantized)
        assert line == f"{expected} {ascii(processor.decode(expected))}", prompt


def questions_of(kind: str, images: list[str]) -> list[tuple[str, list[str]]]:
    """One image; no image and two of them where the model takes that; odd texts."""
    one = [("What is this?", images[:1]), ("  这是什么？\n\nA b", images[1:])]
    none, two = ("2 + 3 = ?", []), ("Which is larger?", images)
    return one + {"qwen_vl": [none, two], "visualglm": [none]}.get(kind, [])


@pytest.fixture
def two_images(tmp_path, image):
    Image.new("RGBA", (40, 30), (250, 20, 90, 255)).save(tmp_path / "b.png")
    return [image, str(tmp_path / "b.png")]


@pytest.fixture(scope="module")
def package(base, tmp_path_factory):
    """Of the smallest Qwen-VL, as graphs; and opened."""
    out = tmp_path_factory.mktemp("package") / "out"
    run(base, out, "static", "--compile", "no")
    return out, run_static.Package(out)


def assert_same_answers(package, base, questions) -> None:
    processor = data.load_processor(str(base))
    for prompt, images in questions:
        expected = answer_ids(base, prompt, images)
        assert package.generate(prompt, images, 12) == expected, prompt
        assert package.text(expected) == processor.decode(expected)


def test_a_package_answers_as_generate_does(base, package, two_images):
    assert_same_answers(package[1], base, questions_of("qwen_vl", two_images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip2", "t5", "visualglm", "ptuning"])
def test_every_models_package_answers_as_generate_does(kind, tmp_path, two_images):
    base = SAMPLES / f"tiny_{kind}"
    if kind == "t5":
        base = write_checkpoint(tmp_path / "base", T5)
    elif kind == "ptuning":  # keys and values in front of every sequence
        base = with_prefix(SAMPLES / "tiny_visualglm", tmp_path / "base")
    run(base, tmp_path / "out", "static", "--compile", "no")
    questions = questions_of("visualglm" if kind == "ptuning" else kind, two_images)
    assert_same_answers(run_static.Package(tmp_path / "out"), base, questions)


def with_prefix(base, directory):
    """The same with P-tuning of random rows."""
    config = checkpoint.read_config(base) | {"pre_seq_len": 3}
    weights, definition = checkpoint.open_model(base, vlm.find(config)), vlm.find(config)
    rows = definition.network(config).transformer.prefix_encoder.embedding.weight
    prefix = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    directory.mkdir()
    checkpoint.copy_side_files(base, directory)
    checkpoint.write_json(directory / "config.json", config)
    named = [(name, weights.read(name)) for name in weights]
    checkpoint.save_weights(directory, [*named, ("transformer.prefix_encoder.embedding.weight", prefix)])
    return directory


@pytest.mark.slow
def test_a_compiled_package(glm_base, tmp_path, two_images):  # noqa: F811
    """AOTInductor's machine code, positions of two axes, weights in 8 bits in one file for three programs."""
    if not export_static.has_compiler():
        pytest.skip("no C++ compiler")
    run(glm_base, tmp_path / "out", "static", "--compile", "yes", "--quantize", "int8")
    assert_package_answers(tmp_path / "out", glm_base, questions_of("visualglm", two_images), "int8")


def test_what_lies_in_a_package_imports_nothing_else_of_ours():
    carried = {"run_static", "images", "python_version", "tokenizer_visualglm", "schema"}
    for name in carried:
        tree = ast.parse((SAMPLES.parent / f"{name}.py").read_text(encoding="utf-8"))
        names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
        tops = {n.split(".")[0] for n in names}
        ours = {n for n in tops if any((SAMPLES.parent / f).exists() for f in (f"{n}.py", f"{n}"))}
        assert ours <= carried, name


def test_a_package_refuses(package, tmp_path, image):
    directory, whole = package
    with pytest.raises(ValueError, match="a mark of the model's own"):
        whole.generate("<|im_end|> what", [image], 4)
    with pytest.raises(ValueError, match="no such image"):
        whole.generate("what", [str(tmp_path / "gone.png")], 4)
    template = whole.spec["template"] | {"images": [1, 1]}
    with pytest.raises(ValueError, match="2 images; this model takes 1"):
        run_static.prompt_ids(template, whole.tokenizer, "what", 2)
    whole.spec["stop_words"] = [[-1]]
    length = len(whole.inputs("what", 0)[0])
    whole.spec["max_positions"] = length + 5
    assert len(whole.generate("what", [], 100)) == 5
    with pytest.raises(ValueError, match=f"the model {length + 5} positions"):
        whole.generate("what " * 20, [], 4)
    with pytest.raises(ValueError, match="no valid UTF-8"):
        whole.generate("\udc80", [], 4)
    spec = json.loads((directory / "package.json").read_text())

    def sealed(**changed) -> None:
        said = spec | changed
        checkpoint.write_json(tmp_path / "package.json", said | {"seal": run_static.seal(said)})

    for key, value, said in (("torch", "1.0", "made with torch 1.0"), ("cpu", "Z80", "compiled for Z80")):
        made = spec["made_with"] | {key: value}
        sealed(compiled=True, made_with=made)
        with pytest.raises(ValueError, match=said):
            run_static.Package(tmp_path)
    sealed()
    with pytest.raises(
        ValueError, match="lacks decode.pt2, prefill.pt2, tokenizer.json, vision.pt2, weights"
    ):
        run_static.Package(tmp_path)
    with pytest.raises(ValueError, match="has no package.json"):
        run_static.Package(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["package.json", "weights.safetensors", "decode.pt2", "tokenizer.json"])
def test_a_damaged_package_is_refused(package, tmp_path, name):
    """Cut, emptied, written over, and with one byte changed."""
    shutil.copytree(package[0], tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / name).read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for content in (whole[:-9], b"", b"[]", b"[" * 100_000, b"\xff", changed):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} (is damaged or )?has (been )?changed"):
            run_static.Package(tmp_path)


def test_a_package_of_damaged_numbers_gives_no_answer(package, monkeypatch):
    monkeypatch.setattr(package[1], "prefill", lambda *_: (torch.full((9,), float("nan")), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="logits are NaN"):
        package[1].generate("what", [], 4)
