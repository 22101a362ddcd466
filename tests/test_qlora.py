"""Adapters over a base in NF4 or int8: training equals training on a base whose weights were rounded here, in
numpy, by the definitions of arXiv:2305.14314; on other layouts, packed, resumed, and merged."""

import json
import re
import shutil
from statistics import NormalDist

import numpy as np
import pytest
import torch
from cells import thinned
from ranks import run, script, start
from small import arguments, assert_same_run, losses, wait_for_step, weights
from test_parallel import MODES, bases, blip2_captions, glm_base, glm_dataset  # noqa: F401 (fixtures)

import checkpoint
import generate
import merge
import quantize
import serve
import terminal
import train
import vlm
from kernels import nf4

LORA = [mode for mode in MODES if mode.endswith(" lora") and "split" not in mode]


def levels() -> np.ndarray:
    """Quantiles of the normal distribution between the ends' tail and the middle, 8 above zero and 7 below
    (arXiv:2305.14314 sec. 3), scaled to 1; the tail is bitsandbytes' 1 - 0.9677083."""
    tail = 0.9677083

    def half(count):
        return [NormalDist().inv_cdf(p) for p in np.linspace(tail, 0.5, count)[:-1]]

    found = np.sort([*half(9), 0.0, *(-x for x in half(8))])
    return found / found.max()


def byte_values() -> np.ndarray:
    """arXiv:2110.02861 fig. 2: sign, zeros that count the decimal exponent, a one, and a fraction in what
    bits are left, in the middle of its share of 0.1 to 1; the two codes that are left over are 0 and 1."""
    found = [0.0, 1.0]
    for code in range(1, 128):
        bits = f"{code:07b}".lstrip("0")
        fraction = int(bits[1:] or "0", 2), 2 ** (len(bits) - 1)
        found.append(10.0 ** (len(bits) - 7) * (0.1 + 0.9 * (fraction[0] + 0.5) / fraction[1]))
    return np.sort(np.float32([*found, *(-np.array(found[2:]))]))


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None] - values).argmin(-1)


def nf4_rounded(weight: np.ndarray) -> np.ndarray:
    """A weight after NF4 with double quantisation."""
    blocks = np.pad(weight.reshape(-1), (0, -weight.size % 64)).reshape(-1, 64).astype(np.float32)
    largest = np.abs(blocks).max(1)
    codes = nearest(blocks / np.where(largest > 0, largest, 1)[:, None], levels().astype(np.float32))
    middle = np.float32(largest.astype(np.float64).mean())
    groups = np.pad(largest - middle, (0, -len(largest) % 256)).reshape(-1, 256)
    coarse = np.abs(groups).max(1, keepdims=True)
    scale = byte_values()[nearest(groups / np.where(coarse > 0, coarse, 1), byte_values())] * coarse
    scale = scale.reshape(-1)[: len(largest)] + middle
    out = levels().astype(np.float32)[codes] * scale[:, None]
    return out.reshape(-1)[: weight.size].reshape(weight.shape)


def int8_rounded(weight: np.ndarray) -> np.ndarray:
    step = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return np.rint(weight / step) * step


ROUNDED = {"nf4": nf4_rounded, "int8": int8_rounded}


def test_levels_are_the_papers():
    """Written out in arXiv:2305.14314 appendix E to more digits than fp32 has."""
    assert np.abs(levels() - np.array(nf4.LEVELS)).max() < 2e-7
    assert nf4.LEVELS[7] == 0 and nf4.LEVELS[0] == -1 and nf4.LEVELS[15] == 1
    assert len(byte_values()) == 256 and np.abs(byte_values() - nf4.byte_levels().numpy()).max() < 1e-7


@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (7, 13), (1, 1), (3, 65)])
def test_weights_are_rounded_by_the_definition(shape):
    """Rows that no block fits, blocks of zeros, the last block and byte in part."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    weight.view(-1)[64:128] = 0
    few = quantize.NF4(shape)
    few.fill(weight)
    expected = torch.from_numpy(nf4_rounded(weight.numpy()))
    assert torch.allclose(few.weight(torch.float32), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(few.weight(torch.bfloat16), few.weight(torch.float32).bfloat16())
    assert sum(b.numel() * b.element_size() for b in few.buffers()) <= weight.numel() * 4.127 / 8 + 12


def test_a_vector_by_hand():
    """Blocks of one magnitude: then its 8-bit scale is exact and each weight a level times it."""
    weight = torch.zeros(2, 64)
    weight[0, :4], weight[1, :4] = torch.tensor([2.0, -2.0, 1.4, 0.0]), torch.tensor([-2.0, 0.1, 0.33, 2.0])
    packed = nf4.pack(weight)
    # 0.7 is nearest to 0.72296, 0.05 (above the middle of 0 and 0.0796) to 0.0796, 0.165 to 0.16093
    assert packed.codes[:2].tolist() == [0xF0, 0xE7] and packed.codes[32:34].tolist() == [0x08, 0x9F]
    assert packed.middle == 2 and not packed.coarse.any()
    found = nf4.unpack_ref(packed, torch.float32)
    assert torch.allclose(found[0, :4], torch.tensor([2.0, -2.0, 1.4459137, 0.0]))
    assert torch.allclose(found[1, :4], torch.tensor([-2.0, 0.1591606, 0.3218604, 2.0]))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_rounded_weight_and_nothing_is_kept(kind):
    few = quantize.NF4((24, 80)) if kind == "nf4" else quantize.RowScaled((24, 80), 8)
    few.fill(torch.randn(24, 80))
    x = torch.randn(5, 3, 80, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = few(x)
    y.backward(dy := torch.randn_like(y))
    assert not kept
    assert torch.allclose(y, x @ few.weight(torch.float32).T, atol=1e-5)
    assert torch.allclose(x.grad, dy @ few.weight(torch.float32), atol=1e-5)


@pytest.fixture(scope="module")
def rounded_bases(bases, tmp_path_factory):  # noqa: F811
    """rounded_bases(kind, "nf4") -> (a checkpoint whose blocks' weights are rounded in numpy, dataset)"""
    made = {}

    def rounded(name, kind):
        if (name, kind) not in made:
            base, dataset = bases[name]
            path = tmp_path_factory.mktemp(f"{name}_{kind}") / "base"
            shutil.copytree(base, path)
            definition = vlm.find(config := checkpoint.read_config(base))
            held, network = checkpoint.open_model(base, definition), definition.network(config)
            for p in network.parameters():
                p.requires_grad_(False)
            names = {f"{n}.weight" for n in quantize.layers(network)}
            new = {n: held.read(n) for n in held}
            new |= {n: torch.from_numpy(ROUNDED[kind](new[n].float().numpy())).clone() for n in names}
            checkpoint.save_weights(path, new.items())
            made[name, kind] = path, dataset
        return made[name, kind]

    return rounded


@pytest.fixture(scope="module")
def references(rounded_bases, tmp_path_factory):
    """references(mode, "nf4"): plain LoRA on a base that was rounded beforehand."""
    made = {}

    def reference(mode, kind):
        if (mode, kind) not in made:
            name, settings = MODES[mode]
            made[mode, kind] = tmp_path_factory.mktemp("reference") / "out"
            split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
            run(arguments(*rounded_bases(name, kind), made[mode, kind], **settings, **split))
        return made[mode, kind]

    return reference


# what must not change a run, beside the kind of weight
LAYOUTS = {
    "one": (1, {}),
    "recompute": (1, {"recompute": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "zero1": (2, {"sharding": "stage1"}),
    "zero3": (2, {"sharding": "stage3", "recompute": True}),
    "pp2": (2, {"pipeline_parallel_degree": 2, "gradient_accumulation_steps": 2}),
}
CELLS = [
    ("qwen lora", "one", "nf4"),
    ("qwen lora", "pp2", "int8"),
    ("glm lora", "zero1", "int8"),
    ("glm lora", "recompute", "nf4"),
    ("glm lora", "pp2", "nf4"),
    ("opt lora", "zero3", "int8"),
    ("opt lora", "one", "nf4"),
    ("t5 lora", "zero3", "nf4"),
]
SHORT = [("qwen lora", "one", "nf4"), ("opt lora", "zero3", "int8")]


@pytest.mark.parametrize("mode, layout, kind", thinned(CELLS, SHORT))
def test_training_equals_that_on_a_rounded_base(bases, references, tmp_path, mode, layout, kind):  # noqa: F811
    world, options = LAYOUTS[layout]
    name, settings = MODES[mode]
    split = {"per_device_train_batch_size": 8 // world, "gradient_accumulation_steps": 1, **options}
    if "pipeline_parallel_degree" in options:
        split["per_device_train_batch_size"] = 4
    run(arguments(*bases[name], tmp_path / "out", **settings, **split, quantize=kind), world)
    assert_same_run(tmp_path / "out", references(mode, kind))


@pytest.mark.parametrize("mode", thinned(LORA, ["qwen lora"]))
def test_killed_run_continues_exactly(bases, tmp_path, mode):  # noqa: F811
    name, settings = MODES[mode]
    options = {**settings, "quantize": "nf4", "lr_scheduler_type": "constant", "save_steps": 2}
    options |= {"per_device_train_batch_size": 4, "mixtoken": True, "max_length": 96}
    argv = arguments(*bases[name], tmp_path / "out", **options, max_steps=5000)
    (process,) = start(script, train.main, argv)
    wait_for_step(tmp_path / "out", 5, process.is_alive)
    process.kill()
    process.join()
    done = len(losses(tmp_path / "out"))
    assert done < 5000 and checkpoint.last_checkpoint(tmp_path / "out")
    for out in ("out", "reference"):
        run(arguments(*bases[name], tmp_path / out, **options, max_steps=done + 2))
    assert losses(tmp_path / "out") == losses(tmp_path / "reference")
    a, b = weights(tmp_path / "out"), weights(tmp_path / "reference")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)
    held = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert held["peft_type"] == "LORA" and all(".lora_" in n for n in a)


def test_merging_says_the_difference(bases, tmp_path, capsys):  # noqa: F811
    """An adapter over rounded weights becomes one of whole weights: W + BA, whatever W was rounded to."""
    name, settings = MODES["qwen lora"]
    run(arguments(*bases[name], tmp_path / "out", **settings, quantize="nf4", max_steps=2))
    merged = ["--lora_path", str(tmp_path / "out"), "--merge_model_path", str(tmp_path / "merged")]
    assert merge.main(merged) == 0
    said = re.search(
        r"trained over weights in nf4, and merged into whole ones: logits differ by (.*)% from",
        capsys.readouterr().out,
    )
    definition = vlm.find(checkpoint.read_config(bases[name][0]))
    probe = definition.probe_batch(definition.processor(bases[name][0]))
    with torch.no_grad():
        model = generate.load_model(bases[name][0], lora_path=tmp_path / "out")
        quantize.quantize(model, "nf4")
        trained, now = (m.logits(m.hidden(probe)) for m in (model, generate.load_model(tmp_path / "merged")))
    assert abs(float(said[1]) / 100 - float((now - trained).norm() / trained.norm())) < 1e-3
    said_by_all(bases[name], tmp_path, settings, capsys)


def said_by_all(base_and_data, tmp_path, settings, capsys):
    """Each command that puts the adapter beside other weights says so, and none beside the same."""
    base, _ = base_and_data
    adapter = ["--lora_path", str(tmp_path / "out")]
    ask = ["--prompt", "hello", "--max_new_tokens", "1"]
    on = arguments(*base_and_data, tmp_path / "on", **settings, max_steps=1, lora_path=str(tmp_path / "out"))
    same = arguments(
        *base_and_data,
        tmp_path / "same",
        **settings | {"max_steps": 1, "quantize": "nf4", "lora_path": str(tmp_path / "out")},
    )
    serving = ["--model_name_or_path", str(base), "--lora_paths", f"a={tmp_path / 'out'}"]

    def served(argv):
        serve.open_service(serve.arguments(argv))
        return 0

    for main, argv, differs in (
        (generate.main, [*adapter, *ask], True),
        (generate.main, [*adapter, *ask, "--quantize", "nf4"], False),
        (train.main, on, True),
        (train.main, same, False),
        (served, serving, True),
        (served, [*serving, "--quantize", "nf4"], False),
    ):
        assert main(argv) == 0
        said = capsys.readouterr().err
        assert ("was trained over weights in nf4, here they are whole" in said) == differs
        assert ("on a CPU nf4" in said) != differs  # slower, where few bits are


@pytest.mark.parametrize(
    "options, words",
    [
        ({"quantize": "nf4"}, "quantize=nf4 without lora=true"),
        ({"quantize": "int8", "lora": True, "tensor_parallel_degree": 2}, "tensor_parallel_degree=2"),
        ({"quantize": "int8", "lora": True, "freeze_exclude": ["*"]}, "no linear layer"),
    ],
)
def test_what_is_refused(base, dataset, tmp_path, capsys, options, words):
    argv = arguments(base, dataset, tmp_path / "out", **options)
    assert terminal.cli(lambda: train.main(argv)) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and words in error
    assert not list((tmp_path / "out").glob("*.json*"))


def test_noise_is_of_each_token_in_any_stream():
    """NEFTune (arXiv:2310.05914): evenly within alpha / sqrt(L d), L the sample's tokens; packed as alone."""
    lengths, width, alpha = [3, 200, 41], 64, 5.0
    keys = torch.randint(-(2**63), 2**63 - 1, (sum(lengths),), generator=torch.Generator().manual_seed(0))

    def noise(lengths, keys):
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ids = torch.zeros(len(keys), dtype=torch.int64)
        batch = vlm.Batch(ids, ids, starts, dropout_keys=keys, embedding_noise=alpha)
        return vlm.splice_images(torch.zeros(len(keys), width), batch, None)

    packed, first = noise(lengths, keys), 0
    for length in lengths:
        own, limit = packed[first : first + length], alpha / (length * width) ** 0.5
        assert torch.equal(own, noise([length], keys[first : first + length]))
        assert own.abs().max() <= limit and abs(float(own.mean())) < 0.2 * limit
        assert float(own.std()) == pytest.approx(limit / 3**0.5, rel=0.15)
        first += length
    assert len(packed.unique()) > 0.9 * packed.numel()  # all tokens and channels have their own


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["qwen lora", "glm lora", "opt lora", "t5 lora"])
def test_noise_and_rslora_on_other_layouts(bases, tmp_path, mode):  # noqa: F811
    """Packed = one by one, two ranks = one, resumed = in one go."""
    name, settings = MODES[mode]
    options = {**settings, "neftune_noise_alpha": 5.0, "use_rslora": True, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 8, "max_steps": 4}
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    ranks = {"per_device_train_batch_size": 4, "sharding": "stage2"}
    run(arguments(*bases[name], tmp_path / "reference", **options))
    run(arguments(*bases[name], tmp_path / "split", **{**options, **split}))
    run(arguments(*bases[name], tmp_path / "ranks", **{**options, **ranks}), 2)
    run(arguments(*bases[name], tmp_path / "resumed", **{**options, "max_steps": 2}))
    run(arguments(*bases[name], tmp_path / "resumed", **options))
    run(arguments(*bases[name], tmp_path / "quiet", **{**options, "neftune_noise_alpha": 0.0}))
    for out in ("split", "ranks", "resumed"):
        assert_same_run(tmp_path / out, tmp_path / "reference")
    assert abs(losses(tmp_path / "quiet")[0] - losses(tmp_path / "reference")[0]) > 1e-4
