"""--dry_run's memory beside what the same run takes on the CPU: its peak less what the process had when it
began."""

import contextlib
import copy
import ctypes
import io
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cells import thinned
from PIL import Image
from ranks import run
from test_train import ROOT, arguments
from torch.utils import flop_counter

import bench
import build
import checkpoint
import config
import estimate
import model_qwen_vl as qwen
import parallel
import tokenizer_qwen_vl
import train
import vlm
from kernels import attention

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """42 million parameters, so that the interpreter's own ups and downs do not count, and 64 samples."""
    path = tmp_path_factory.mktemp("large")
    base = path / "base"
    base.mkdir()
    shutil.copy(ROOT / "samples/tiny_qwen_vl/qwen.tiktoken", base)
    tokens = len((base / "qwen.tiktoken").read_text().splitlines())
    image_start = tokens + tokenizer_qwen_vl.SPECIAL_TOKENS.index("<img>")
    visual = {
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 512,
        "image_start_id": image_start,
        "n_queries": 16,
    }
    config = {
        **vlm.shape("qwen-vl-7b"),
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "kv_channels": 128,
        "intermediate_size": 4096,
        "vocab_size": 8192,
        "seq_length": 512,
        "torch_dtype": "float32",
        "visual": visual,
    }
    checkpoint.write_json(base / "config.json", config)
    model = qwen.build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_weights(name, p, build.named_generator(1, name))
    checkpoint.save_weights(base, model.state_dict().items())
    records = []
    for i in range(64):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)).save(
            path / f"{i}.png"
        )
        turn = [f"Picture 1: <img>{i}.png</img>\nwhat is it?", "one two three four five six seven " * 4]
        records.append({"id": str(i), "conversations": [turn]})
    (path / "a.json").write_text(json.dumps(records))
    return base, {"train": [{"name": "chatml_dataset", "data_files": str(path / "a.json")}]}


def memory(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(argv):
    """train.main, which leaves its peak beside its output directory."""
    libc, start, init_world = ctypes.CDLL(None), 0, parallel.init_world
    libc.mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed is given back
    libc.mallopt(M_ARENA_MAX, 1)

    def begin(*args):
        nonlocal start
        world = init_world(*args)
        libc.malloc_trim(0)
        start = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        return world

    parallel.init_world = begin
    code = train.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    (out.parent / f"peak-{os.environ['RANK']}").write_text(str(memory("VmHWM") - start))
    return code


def warmed(argv):
    """`measured` in a process that has trained the smallest model before: code and libraries are loaded, some
    60 MB that are no memory of a model's. 16 bits attend in 16 bits, as on a GPU."""
    attention.CPU_IN_FP32 = ()
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    kind = vlm.kind_of(checkpoint.read_config(options["--model_name_or_path"]))
    out = Path(options["--output_dir"]).parent / f"warm-{os.environ['RANK']}"
    options |= {"--model_name_or_path": f"{ROOT}/samples/tiny_{kind}", "--output_dir": str(out)}
    options |= {"--tensor_parallel_degree": "1", "--pipeline_parallel_degree": "1"}
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # alone
        assert train.main([word for pair in options.items() for word in pair]) == 0
    return measured(argv)


def predicted(argv, world: int, monkeypatch) -> float:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert train.main([*argv, "--dry_run"]) == 0
    return float(re.search(r"sum +([\d.]+) GiB", text.getvalue())[1]) * 2**30


def flops_on_cpu(model, batch) -> float:
    """Of a real forward and backward pass, as torch counts them."""
    aten = torch.ops.aten

    def in_place(into, a, b, out_shape=None, **options):
        return 2 * a[0] * a[1] * b[1]

    def forward(q, k, v, *args, out_shape=None, **options):
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **options):
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

    attention = "_scaled_dot_product_flash_attention_for_cpu"
    counted = {aten.addmm_: in_place, getattr(aten, attention): forward}
    counted[getattr(aten, f"{attention}_backward")] = backward
    with flop_counter.FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(batch)[0].sum().backward()
    return counter.get_total_flops()


TOWERS = {"qwen_vl": "transformer.visual.*", "blip2": "vision_model.*", "visualglm": "image_encoder.*"}
TRAINED = {
    "sft": {},
    "lora": {"lora": True},
    "lora recomputed": {"lora": True, "recompute": True},
    "recomputed": {"recompute": True},
    "frozen tower": {"freeze_include": True},
}
ALL = [(kind, trained) for kind in TOWERS for trained in TRAINED]


@pytest.mark.parametrize(
    "kind, trained",
    thinned(ALL, [("qwen_vl", "frozen tower"), ("blip2", "lora recomputed"), ("visualglm", "lora")]),
)
def test_flops_are_torchs(kind, trained, monkeypatch):
    monkeypatch.setattr(estimate, "CAUSAL", 1.0)  # torch counts what a mask hides as well
    settings = dict(TRAINED[trained])
    if settings.get("freeze_include"):
        settings["freeze_include"] = [TOWERS[kind]]
    cfg, values = config.Config(**settings), bench.CONFIGS[kind](True)
    definition = vlm.find(values)
    model = definition.network(values)
    if cfg.lora:
        build.add_adapter(model, definition, cfg)
    build.choose_trainable(model, definition, cfg)
    real = copy.deepcopy(model).to_empty(device="cpu").train()
    with torch.no_grad():
        for p in real.parameters():
            p.normal_(std=0.02)
    batch = bench.random_stream(real, [20, 30])
    if cfg.recompute:
        parallel.recompute(real)
    lengths = batch.cu_seqlens.diff().tolist()
    stream = estimate.Stream(sum(lengths), batch.num_supervised, len(lengths), lengths)
    assert estimate.step_flops(model, stream, estimate.layout_of(cfg, 1)) == flops_on_cpu(real, batch)


def test_a_size_without_data_has_an_image_a_sample():
    cfg = config.Config(max_length=100, per_device_train_batch_size=3)
    sizes, heaviest, _ = estimate.streams(None, cfg)
    assert (sizes.images, heaviest.images, heaviest.lengths) == (3, 3, [100, 100, 100])


TWICE = {"gradient_accumulation_steps": 2}
LAYOUTS = {
    "accumulation": (1, TWICE),
    "recomputation": (1, {"recompute": True, "per_device_train_batch_size": 8}),
    "lora": (1, {"lora": True, "per_device_train_batch_size": 8}),
    "lora, bf16": (1, {"lora": True, "bf16": True, "per_device_train_batch_size": 8}),
    "lora, bf16 with masters": (1, {"lora": True, "precision": "bf16-master"}),
    "bf16": (1, {"bf16": True}),
    "bf16 with masters": (1, {"precision": "bf16-master"}),
    "dp2": (2, {}),
    "zero1": (2, {"sharding": "stage1", **TWICE}),
    "zero2": (2, {"sharding": "stage2", **TWICE}),
    "zero3": (2, {"sharding": "stage3"}),
    "pp2": (2, {"pipeline_parallel_degree": 2, **TWICE}),
}


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs Linux's account of memory and glibc's heap",
)


@linux
@pytest.mark.parametrize("layout", thinned(LAYOUTS, ["lora"]))
def test_memory_is_within_a_tenth(large, tmp_path, monkeypatch, layout):
    world, settings = LAYOUTS[layout]
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_length": 512,
        "save_strategy": "no",
        **settings,
    }
    argv = arguments(*large, tmp_path / "out", **options)
    estimate = predicted(argv, world, monkeypatch)
    run(argv, world, warmed)
    peak = max(int(path.read_text()) for path in tmp_path.glob("peak-*"))
    assert len([*tmp_path.glob("peak-*")]) == world
    # two pipeline stages were measured at 12% less than is counted
    assert -0.1 < estimate / peak - 1 < (0.15 if "pipeline_parallel_degree" in settings else 0.1), (
        f"{estimate / 2**20:.0f} MiB estimated, {peak / 2**20:.0f} measured"
    )


@linux
@pytest.mark.slow
def test_frozen_weights_are_held_once_in_16_bits(large, tmp_path):
    """Beside fp32, 16 bits save two bytes a weight, and activations. A second copy would take two back."""
    peaks = {}
    for name, level in {"fp32": {}, "bf16": {"bf16": True}, "master": {"precision": "bf16-master"}}.items():
        options = {"lora": True, "per_device_train_batch_size": 4, "max_steps": 2, "max_length": 512, **level}
        out = tmp_path / name / "out"
        run(arguments(*large, out, save_strategy="no", **options), 1, measured)
        peaks[name] = int((tmp_path / name / "peak-0").read_text())
    weights = (large[0] / "model.safetensors").stat().st_size / 4
    for name in ("bf16", "master"):
        assert peaks["fp32"] - peaks[name] > 2.6 * weights, peaks


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_of_weights_in_few_bits(large, tmp_path, monkeypatch, kind):
    """A base in few bits takes what --dry_run says of it, and never more: no whole weight stays."""
    options = {
        "lora": True,
        "quantize": kind,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "max_length": 512,
        "save_strategy": "no",
    }
    argv = arguments(*large, tmp_path / "out", **options)
    estimate = predicted(argv, 1, monkeypatch)
    run(argv, 1, measured)
    peak = int((tmp_path / "peak-0").read_text())
    assert abs(estimate / peak - 1) < 0.1, (
        f"{estimate / 2**20:.0f} MiB estimated, {peak / 2**20:.0f} measured"
    )
