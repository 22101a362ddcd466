"""--dry_run's memory beside what the same run takes on the CPU: its peak less what the process had when it
began."""

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import thinned
from PIL import Image
from ranks import run
from test_train import ROOT, arguments

import build
import checkpoint
import model_qwen_vl as qwen
import parallel
import tokenizer_qwen_vl
import train
import vlm

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


def predicted(argv, world: int, monkeypatch) -> float:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert train.main([*argv, "--dry_run"]) == 0
    return float(re.search(r"sum +([\d.]+) GiB", text.getvalue())[1]) * 2**30


TWICE = {"gradient_accumulation_steps": 2}
LAYOUTS = {
    "accumulation": (1, TWICE),
    "recomputation": (1, {"recompute": True, "per_device_train_batch_size": 8}),
    "lora": (1, {"lora": True, "per_device_train_batch_size": 8}),
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
@pytest.mark.parametrize("layout", thinned(LAYOUTS, ["lora", "zero2"]))
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
    run(argv, world, measured)
    peak = max(int(path.read_text()) for path in tmp_path.glob("peak-*"))
    assert len([*tmp_path.glob("peak-*")]) == world
    assert abs(estimate / peak - 1) < 0.1, (
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
