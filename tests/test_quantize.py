"""generate.py --quantize for every model: what it prints and answers,
against weights rounded here in numpy."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_blip2_train import OPT, T5, write_checkpoint
from test_qlora import nf4_rounded
from test_train_visualglm import glm_base  # noqa: F401 (a fixture)

import data
import evaluate
import generate
import lora
import records
import terminal
import train
import vlm
from bench_timing import Products
from kernels import linear
from quantize import NF4, RowScaled, empty, layers, quantize
from quantize import main as write_quantized


@pytest.fixture(scope="module")
def bases(base, glm_base, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("blip2")
    blip2 = {name: write_checkpoint(root / name, text) for name, text in (("opt", OPT), ("t5", T5))}
    return {"qwen_vl": base, "visualglm": glm_base, **blip2}


def rounded(weight: np.ndarray, bits: int) -> np.ndarray:
    """Each row to a grid of 2 ** bits - 1 points, symmetric, the
    largest weight at its end; the step in fp16."""
    step = (
        (np.abs(weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)).astype(np.float16).astype(np.float64)
    )
    return np.rint(weight / step) * step


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", ["qwen_vl", "visualglm", "opt", "t5"])
def test_printed_error_and_answers(bases, tmp_path, capsys, name, kind):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    question = ["--image", str(tmp_path / "a.png"), "--prompt", "what is it?", "--max_new_tokens", "12"]
    assert generate.main(["--model_name_or_path", str(bases[name]), *question, "--quantize", kind]) == 0
    answer, line = (text.strip() for text in capsys.readouterr())
    exact, model = generate.load_model(bases[name]), generate.load_model(bases[name])
    processor = data.load_processor(str(bases[name]))
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    errors = []
    for m in linears:
        weight = m.weight.double().numpy()
        new = nf4_rounded(m.weight.numpy()) if kind == "nf4" else rounded(weight, int(kind[3:]))
        errors.append(np.linalg.norm(new - weight) / np.linalg.norm(weight))
        m.weight.copy_(torch.from_numpy(new))
    probe = vlm.find(model.config.raw).probe_batch(processor)
    before, after = (m.logits(m.hidden(probe)).double() for m in (exact, model))
    found = re.match(
        rf"{kind}: (\d+) linear layers, .* weights off by (.*)% \(mean\), (.*)% \(worst layer\); "
        r"logits off by (.*)%, "
        r"same best token at \d+% of \d+ positions \(against float32\)\n",
        line,
    )
    assert found and int(found[1]) == len(linears) > 0, line
    assert f"note: on a CPU {kind} in float32 saves memory, but answers slower" in line
    expected = [np.mean(errors), np.max(errors), float((after - before).norm() / before.norm())]
    assert np.allclose([float(x) / 100 for x in found.groups()[1:]], expected, atol=6e-5)
    assert 0 < expected[2] < {"int8": 0.03, "int4": 0.4, "nf4": 0.4}[kind]
    plain = records.request([("user", "what is it?")], [str(tmp_path / "a.png")], "test")
    request = processor.prompt(plain)
    request["pixel_values"] = [processor.load_image(p) for p in request["images"]]
    ids = generate.generate(model, [request], generate.Decoding(12), processor.stop_words)[0]
    assert processor.decode(ids).strip() == answer


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen_vl", "visualglm", "opt", "t5"])
def test_packed_weights_are_the_same_weights(bases, name, dtype, monkeypatch):
    """Every linear layer's, the tower's and the head's too; a row is the same whatever stands beside it."""
    if not linear.possible(torch.empty(1, dtype=dtype)):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    model = generate.load_model(bases[name], dtype)
    probe = vlm.find(model.config.raw).probe_batch(data.load_processor(str(bases[name])))
    before = model.logits(model.hidden(probe)).float()
    found = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [m.weight.clone() for m in found]
    # those of a published model are large enough, these are not
    monkeypatch.setattr(linear, "WORTH_PACKING", 0)
    linear.pack(model)
    after = model.logits(model.hidden(probe)).float()
    assert (after - before).norm() / before.norm() < (1e-5 if dtype == torch.float32 else 0.03)
    assert found and all(m.weight is None for m in found)
    for layer, weight in zip(found, weights, strict=True):
        assert torch.equal(layer.few.tensor.to_dense(), weight)
        x = torch.randn(5, weight.shape[1], dtype=dtype)
        assert torch.equal(linear.linear(layer, x)[3:4], linear.linear(layer, x[3:4]))


@torch.no_grad()
def test_an_adapter_stands_beside_quantized_weights(bases, tmp_path, capsys):
    """In one process with its adapter, in evaluation and in the server: the adapter on the rounded base."""
    model = generate.load_model(bases["qwen_vl"])
    names = lora.inject(model, [r".*c_attn"], 2, 2, 0.0)
    params = dict(model.named_parameters())
    for name in names:
        params[f"{name}.lora_B.weight"] = params[f"{name}.weight"][:, :2] * 5
    made = lora.LoraConfig(bases["qwen_vl"], 2, 2)
    lora.save_adapter(tmp_path, model, made, names, [], lambda n: params[n].detach())
    argv = ["--lora_path", str(tmp_path), "--prompt", "hello", "--quantize", "nf4", "--max_new_tokens", "9"]
    assert generate.main(argv) == 0
    answer = capsys.readouterr().out.strip()
    processor = data.load_processor(str(bases["qwen_vl"]))
    shared = generate.load_model(bases["qwen_vl"])
    quantize(shared, "nf4")
    lora.add_adapters(shared, {"a": str(tmp_path)})
    model = generate.load_model(bases["qwen_vl"], lora_path=tmp_path)
    for module in layers(model.requires_grad_(False)).values():
        few = NF4(module.weight.shape)
        few.fill(module.weight)
        module.weight.copy_(few.weight(torch.float32))
    request = processor.prompt(records.request([("user", "hello")], [], "test"))
    ids = generate.generate(model, [request], generate.Decoding(9), processor.stop_words)[0]
    assert processor.decode(ids).strip() == answer
    probe = vlm.find(model.config.raw).probe_batch(processor)
    with lora.adapted([("a", None)]):
        served = shared.logits(shared.hidden(probe))
    assert torch.allclose(served, model.logits(model.hidden(probe)), atol=1e-4)
    assert not torch.allclose(served, shared.logits(shared.hidden(probe)), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, dtype", [("int8", "bfloat16"), ("int8", "float32"), ("int8", "float16"), ("int4", "bfloat16")]
)
@pytest.mark.parametrize("shape", [(128, 96), (33, 70)])
def test_a_cpu_computes_with_few_bits_as_they_are(kind, dtype, shape, monkeypatch):
    """The same as with the weight expanded, up to the rounding of 16 bits; a shape without a kernel too."""
    few = empty(kind, shape)
    few.fill(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 1, shape[1], generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    expected = x.double() @ few.weight(torch.float64).T
    if shape == (128, 96):
        monkeypatch.setattr(RowScaled, "weight", None)
    found = few(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert (found - expected).norm() < {"float32": 1e-5}.get(dtype, 2e-2) * expected.norm()


@pytest.mark.parametrize(
    "name, kind", [("qwen_vl", "nf4"), ("visualglm", "int4"), ("opt", "int8"), ("t5", "nf4")]
)
def test_a_quantized_checkpoint_is_read_back(bases, tmp_path, capsys, name, kind):
    """It answers as --quantize does; what can't use it says so."""
    out = str(tmp_path / "small")
    argv = ["--model_name_or_path", str(bases[name]), "--quantize", kind]
    assert write_quantized([*argv, "--output_dir", out]) == 0
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    question = ["--image", str(tmp_path / "a.png"), "--prompt", "what is it?", "--max_new_tokens", "9"]
    capsys.readouterr()
    assert generate.main([*argv, *question]) == 0
    answer = capsys.readouterr().out
    assert generate.main(["--model_name_or_path", out, *question]) == 0
    said = capsys.readouterr()
    assert (
        said.out == answer
        and f"note: on a CPU {kind} in float32 saves memory, but answers slower" in said.err
    )
    generate.load_as_asked(out, None, "bfloat16", "cpu", None)
    slow = "answers" if kind == "nf4" else "reads prompts and answers batches"
    assert f"note: on a CPU {kind} in bfloat16 saves memory, but {slow} slower" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "what?", "answer": "red"}')
    files = ["--data_files", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "r.json")]
    assert evaluate.main(["--model_name_or_path", out, *files, "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr().out  # not taken for the whole weights, whose score is published
    assert (
        f", {kind}) with no adapter" in said
        and json.loads((tmp_path / "r.json").read_text())["quantize"] == kind
    )
    for main, more, words in (
        (train.main, ["--dataset", str(tmp_path), "--max_steps", "1"], "holds weights in"),
        (generate.main, [*question, "--quantize", kind], "already; leave it out"),
        (write_quantized, ["--quantize", kind, "--output_dir", str(tmp_path / "again")], "holds weights in"),
    ):
        argv = ["--model_name_or_path", out, *more]
        if main is train.main:
            if name in ("opt", "t5"):  # these want an image in each record
                continue
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
            argv[3] = str(tmp_path / "a.jsonl")
            argv += ["--output_dir", str(tmp_path / "trained")]
        assert terminal.cli(lambda main=main, argv=argv: main(argv)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error


def test_a_checkpoint_without_a_language_model_is_refused(tmp_path):
    argv = ["--model_name_or_path", str(data.ROOT / "samples/blip2_stage1"), "--quantize", "nf4"]
    with pytest.raises(ValueError, match="blip2_stage1 has no language model to round"):
        write_quantized([*argv, "--output_dir", str(tmp_path / "small")])
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_beyond_the_scales_is_refused(kind):
    with pytest.raises(ValueError, match="weights of 1e.09 are too large for int.'s fp16 scales; use nf4"):
        empty(kind, (4, 64)).fill(torch.full((4, 64), 1e9))


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_adopted_linear_layers_give_torchs_results_and_gradients(monkeypatch, rows):
    """oneDNN's products, as on an AMD processor with large layers, whatever this one is."""
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: torch.backends.mkldnn.is_available())
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=n > 9) for n, m in ((19, 33), (33, 5), (5, 8))))
    model[1].weight.requires_grad_(False)
    x = torch.randn(rows, 19, requires_grad=True)
    weights = torch.randn(8)

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def passes() -> list[torch.Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad((y * weights).sum(), trained)]

    expected, calls = passes(), Products()
    linear.adopt(model, torch.device("cpu"))
    with calls:
        found = passes()
    assert all(type(layer) is linear.AnyLinear for layer in model)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # three forward, three for inputs, two for weights that are trained
    taken = [f._schema.name for f, _ in calls.calls].count("mkldnn::_linear_pointwise")
    assert taken == (8 if torch.backends.mkldnn.is_available() and rows else 0)
