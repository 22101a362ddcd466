"""--dry_run's memory beside what the tensors of the same run take on the CPU at the peak."""

import collections
import contextlib
import copy
import io
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cells import slow, thinned
from PIL import Image
from ranks import run
from small import arguments
from test_blip2_train import T5, write_checkpoint
from test_train import ROOT
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import build
import checkpoint
import config
import estimate
import parallel
import plan
import train
import vlm
from kernels import attention
from rates import LossScaler

WORDS = "one two three four five six seven "


def shape(kind: str) -> dict:
    """config.json of a model of some twenty million parameters: large beside what hangs on no size."""
    if kind == "t5":
        text = T5 | {
            "vocab_size": 2048,
            "d_model": 384,
            "d_kv": 64,
            "d_ff": 1024,
            "num_layers": 4,
            "num_heads": 6,
        }
        return shape("blip2") | {
            "text_config": text,
            "image_token_index": None,
            "use_decoder_only_language_model": False,
        }
    if kind == "stage1":
        config = checkpoint.read_config(ROOT / "samples/blip2_stage1")
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 512}
        return config | {"qformer_config": config["qformer_config"] | sizes}
    config = checkpoint.read_config(ROOT / f"samples/tiny_{kind}")
    if kind == "blip2":
        text = config["text_config"] | {"hidden_size": 384, "ffn_dim": 1536, "word_embed_proj_dim": 384}
        text |= {"num_hidden_layers": 8, "max_position_embeddings": 256}
        return config | {"text_config": text}
    if kind == "visualglm":
        return config | {
            "hidden_size": 384,
            "inner_hidden_size": 1536,
            "num_layers": 8,
            "num_attention_heads": 6,
        }
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "kv_channels": 64, "intermediate_size": 2048}
    visual = config["visual"] | {"output_dim": 384}
    return config | sizes | {"num_hidden_layers": 8, "seq_length": 512, "visual": visual}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind -> a checkpoint directory, made when it is asked for."""
    path, made = tmp_path_factory.mktemp("bases"), {}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = base = path / kind
            if kind == "t5":
                write_checkpoint(base, T5)
            else:
                shutil.copytree(
                    ROOT / f"samples/{'blip2_stage1' if kind == 'stage1' else f'tiny_{kind}'}", base
                )
            config = shape(kind) | {"torch_dtype": "float32"}
            checkpoint.write_json(base / "config.json", config)
            network = vlm.find(config).network(config)
            checkpoint.save_weights(
                base, ((n, torch.randn(p.shape) / 50) for n, p in network.named_parameters())
            )
        return made[kind]

    return base


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("records")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(path / "a.png")
    record = {"image": "a.png", "question": "what is it?", "answers": [WORDS * 4]}
    lines = [json.dumps({"question_id": i, **record}) for i in range(64)]
    (path / "a.jsonl").write_text("\n".join(lines))
    entry = {"name": "coco_vqa", "data_files": str(path / "a.jsonl"), "image_root": str(path)}
    return {"train": [entry]}


@pytest.fixture(scope="module")
def captions(dataset):
    """The same images, each with a caption."""
    (entry,) = dataset["train"]
    path = Path(entry["image_root"])
    lines = [json.dumps({"id": i, "image": "a.png", "caption": WORDS * 4}) for i in range(64)]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return {"train": [{"data_files": str(path / "captions.jsonl")}]}


def measured(argv):
    """train.main, which leaves the peak of its tensors' bytes beside its output directory: what a GPU's
    allocator would count. 16 bits attend in 16 bits, as there."""
    attention.CPU_IN_FP32 = ()
    loop, out = train.Run.train, Path(argv[argv.index("--output_dir") + 1])

    def watched(run):
        held = [*run.model.parameters(), *run.model.buffers()]
        storages = [getattr(x, "_local_tensor", x).untyped_storage() for x in held]
        held = sum({x.data_ptr(): x.nbytes() for x in storages}.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            code = loop(run)
        events = profiler.profiler.kineto_results.events()
        updates = sorted(e.start_ns() for e in events if e.name().startswith("Optimizer.step"))
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        alive = np.cumsum([nbytes for _, nbytes in changes])
        # of the steps behind the first update, which are equal, the one with the least: gloo's threads let
        # go of messages whenever they come to it
        steps = np.searchsorted(updates[:-1], [when for when, _ in changes])
        peak = held + min(alive[steps == step].max() for step in range(1, len(updates)))
        (out.parent / f"peak-{os.environ.get('RANK', 0)}").write_text(str(peak))
        return code

    def waits(collective):
        def call(*args, **options):
            work = collective(*args, **options)
            time.sleep(0.005)  # until gloo's thread lets go of the message
            return work

        return call

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(train.Run, "train", watched))
        for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            patches.enter_context(mock.patch.object(dist, name, waits(getattr(dist, name))))
        return train.main(argv)


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
    model = estimate.network(cfg, values, definition)
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
O1, O2, FP16 = {"bf16": True}, {"precision": "bf16-master"}, {"fp16": True}
BF16_O2 = {"bf16": True, "fp16_opt_level": "O2"}  # what that precision means
LORA, RECOMPUTE, STAGE3 = {"lora": True}, {"recompute": True}, {"sharding": "stage3"}
PP, TP = {"pipeline_parallel_degree": 2}, {"tensor_parallel_degree": 2}
PTUNING = {"pre_seq_len": 8}
PAIRS = {"stage": "pretrain1"}
LAYOUTS = [  # (model, processes, settings)
    ("qwen_vl", 1, {}),
    ("qwen_vl", 1, TWICE),
    ("qwen_vl", 1, RECOMPUTE),
    ("qwen_vl", 1, O1),
    ("qwen_vl", 1, O2),
    ("qwen_vl", 1, O2 | RECOMPUTE | TWICE),
    ("qwen_vl", 1, LORA),
    ("qwen_vl", 1, LORA | O1),
    ("qwen_vl", 1, LORA | O1 | RECOMPUTE),
    ("qwen_vl", 1, LORA | O2 | RECOMPUTE),
    ("qwen_vl", 1, LORA | FP16 | RECOMPUTE),
    ("qwen_vl", 1, LORA | O2 | {"quantize": "nf4"}),
    ("qwen_vl", 1, LORA | O1 | RECOMPUTE | {"quantize": "int8"}),
    ("visualglm", 1, O1 | RECOMPUTE),
    ("visualglm", 1, LORA | O2),
    ("visualglm", 1, PTUNING),
    ("visualglm", 1, PTUNING | O2),
    ("blip2", 1, O2),
    ("blip2", 1, LORA | O1 | RECOMPUTE),
    ("blip2", 1, LORA | O2),
    ("t5", 1, O1),
    ("t5", 1, LORA | O2 | RECOMPUTE),
    ("stage1", 1, PAIRS),
    ("stage1", 1, PAIRS | RECOMPUTE | TWICE),
    ("stage1", 1, PAIRS | O1),
    ("stage1", 1, PAIRS | O2),
    ("stage1", 2, PAIRS),
    ("stage1", 2, PAIRS | STAGE3 | O2),
    ("qwen_vl", 2, {}),
    ("qwen_vl", 2, O2 | TWICE),
    ("qwen_vl", 2, {"sharding": "stage1"} | TWICE),
    ("qwen_vl", 2, {"sharding": "stage2"} | TWICE | O2),
    ("qwen_vl", 2, STAGE3),
    ("qwen_vl", 2, STAGE3 | LORA | O2 | RECOMPUTE),
    ("blip2", 2, STAGE3 | O1),
    ("qwen_vl", 2, TP),
    ("visualglm", 2, TP | LORA | O2),
    ("qwen_vl", 2, PP | TWICE),
    ("qwen_vl", 2, PP | O1 | {"gradient_accumulation_steps": 4}),
    ("qwen_vl", 2, PP | {"pipeline_schedule": "gpipe", "gradient_accumulation_steps": 4}),
    ("visualglm", 2, PP | LORA | O2 | RECOMPUTE | {"gradient_accumulation_steps": 4}),
    ("blip2", 2, PP | {"pipeline_schedule": "interleaved", "gradient_accumulation_steps": 4}),
]


@pytest.mark.parametrize(
    "kind, world, settings", thinned(LAYOUTS, [("qwen_vl", 1, LORA | O1 | RECOMPUTE)]), ids=str
)
def test_memory_is_within_a_tenth(bases, dataset, captions, tmp_path, monkeypatch, kind, world, settings):
    options = {"per_device_train_batch_size": 8, "max_length": 512, "save_strategy": "no"}
    options["max_steps"] = 2 if world == 1 else 3
    data = captions if kind == "stage1" else dataset
    argv = arguments(bases(kind), data, tmp_path / "out", **options | settings)
    estimate = predicted(argv, world, monkeypatch)
    run(argv, world, measured)
    peaks = [int(path.read_text()) for path in tmp_path.glob("peak-*")]
    assert len(peaks) == world
    # the fullest pipeline rank; others are equal but for gloo
    peak = max(peaks) if "pipeline_parallel_degree" in settings else min(peaks)
    said = f"{estimate / 2**20:.1f} MiB estimated, {peak / 2**20:.1f} measured"
    print(f"{kind} x {world} {settings}: {said}, {estimate / peak - 1:+.1%}")
    assert abs(estimate / peak - 1) < 0.1, said


@pytest.mark.slow
def test_frozen_weights_are_held_once_in_16_bits(bases, dataset, tmp_path):
    """Beside fp32, 16 bits save two bytes a weight, and activations. A second copy would take two back."""
    peaks = {}
    for name, level in {"fp32": {}, "bf16": O1, "master": O2}.items():
        options = {"lora": True, "per_device_train_batch_size": 4, "max_steps": 2, "max_length": 512, **level}
        out = tmp_path / name / "out"
        run(arguments(bases("qwen_vl"), dataset, out, save_strategy="no", **options), 1, measured)
        peaks[name] = int((tmp_path / name / "peak-0").read_text())
    weights = (bases("qwen_vl") / "model.safetensors").stat().st_size / 4
    for name in ("bf16", "master"):
        assert peaks["fp32"] - peaks[name] > 2 * weights, peaks


class Messages(TorchDispatchMode):
    """Counts the collectives that a group is asked for: {kind: [messages, bytes of the whole]}."""

    KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}

    def __init__(self):
        super().__init__()
        self.found = collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._opname.strip("_").removesuffix("_base")
        if function.namespace == "c10d" and not name.startswith("recv"):
            whole = tree_leaves(args[1] if name == "reduce_scatter" else args[0])
            kind = self.found[self.KINDS.get(name, name)]
            kind[0] += 1
            kind[1] += sum(x.nbytes for x in whole if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def world_of(cfg, ranks: int, monkeypatch) -> parallel.World:
    """Of rank 0 among ranks that are not there: torch's fake group sends nothing, and claims to have."""
    init = dist.init_process_group
    fake = {"store": FakeStore(), "rank": 0, "world_size": ranks}
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: init("fake", **fake))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return parallel.init_world(*cfg.degrees, SimpleNamespace(store=None, rank=0, size=ranks))


def whole_model(cfg):
    values = bench.CONFIGS["qwen_vl"](True)
    definition = vlm.find(values)
    return estimate.network(cfg, values, definition), definition


BATCHES_4 = {"gradient_accumulation_steps": 4}
WORLDS = [  # (ranks, settings)
    (8, STAGE3),
    (8, TP | O1 | RECOMPUTE),
    (8, PP | BATCHES_4 | BF16_O2),
    (64, {"sharding": "stage2"} | TWICE | BF16_O2 | RECOMPUTE),
    (64, {"sharding": "stage1", "sharding_parallel_degree": 8} | TWICE | TP),
    (1024, STAGE3 | TWICE | LORA | {"sharding_parallel_degree": 8}),
    (1024, {"sharding": "stage1"} | TP | PP | BATCHES_4),
    (1024, STAGE3 | TP | LORA | BF16_O2),
]


@pytest.mark.parametrize("ranks, settings", thinned(WORLDS, WORLDS[:1]), ids=str)
def test_collectives_are_those_that_a_group_is_asked_for(ranks, settings, monkeypatch):
    cfg = config.Config(**settings)
    layout, world = estimate.layout_of(cfg, ranks), world_of(cfg, ranks, monkeypatch)
    try:
        whole, definition = whole_model(cfg)
        batch = replace(bench.random_stream(whole, [20, 30]), dataset_ids=torch.zeros(2, dtype=torch.int64))
        lengths = batch.cu_seqlens.diff().tolist()
        stream = estimate.Stream(sum(lengths), batch.num_supervised, 2, lengths)
        inputs = estimate.block_inputs(whole, stream)
        dtype, model = build.halve(whole, cfg, {}), copy.deepcopy(whole)
        sizes = build.StreamSizes(sum(lengths), batch.num_supervised, 2.0, 25.0)
        blocks, stages = [range(len(model.blocks))], None
        if layout.pp > 1:
            blocks = build.pipeline_blocks(whole, definition, cfg, sizes)
            stages = build.cut_into_stages(model, whole, definition, cfg, world, sizes, dtype)
        mine, part = estimate.of_rank(whole, definition, blocks, 0, layout)
        said = collections.defaultdict(lambda: [0, 0])
        for (_, kind), counted in estimate.collectives(mine, part, inputs, stream, layout).items():
            said[kind] = [a + b for a, b in zip(said[kind], counted, strict=True)]

        parallel.tensor_parallel(model, definition.tp_plan(model.config, layout.tp), world)
        if cfg.recompute:
            parallel.recompute(model)
        parallel.shard(model, world.mesh, cfg.sharding, dtype)
        model.to_empty(device="cpu").train()
        run = SimpleNamespace(cfg=cfg, world=world, model=model, images_only=False, entries=["a"])
        run.built, run.scaler = SimpleNamespace(stages=stages), LossScaler(False)
        run.autocast, run.processor = build.autocast(cfg, world), SimpleNamespace(image_size=model.image_size)
        n = layout.micro_batches
        facts = train.Facts([n], n, n, 2 * n, 0, 0, [True] * n)
        batch = replace(batch, row_datasets=None)
        # of fake ranks no stage says that its shapes are known
        known = mock.Mock(return_value=torch.ones(1, dtype=torch.int32))
        with mock.patch("torch.distributed.pipelining.PipelineStage._warmup_backward_result", known):
            train.forward_backward(run, [batch] * n, facts)  # the first step sets up
        with Messages() as messages:
            train.forward_backward(run, [batch] * n, facts)
    finally:
        parallel.leave_world()
    assert dict(messages.found) == dict(said)
    assert said


@pytest.fixture
def planned(monkeypatch, capsys):
    """Runs the command for the tiny model -> the numbers of its rows, words of a row apart."""
    monkeypatch.setattr(vlm, "shape", lambda name: bench.CONFIGS["qwen_vl"](True) if name == "tiny" else None)

    def command(*options: str) -> list[list[str]]:
        argv = ["--model", "tiny", "--gpus", "8", "--max_length", "64", "--samples", "32", "--top", "2"]
        assert plan.main([*argv, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.replace(",", "").split() for line in lines[lines.index(plan.HEAD) + 1 :]]

    return command


@pytest.mark.slow
def test_plan_ranks_what_fits(planned):
    """Faster first; what needs more memory is gone; the slower the network, the fewer tokens a second."""
    best = planned()
    less = planned("--memory", f"{0.7 * float(best[0][9])}")
    slower = planned("--gpus", "16", "--network_bandwidth", "0.001", "--top", "1")
    faster = planned("--gpus", "16", "--network_bandwidth", "50", "--top", "1")
    assert float(best[0][0]) >= float(best[1][0]) >= float(less[0][0])
    assert float(less[0][9]) <= 0.7 * float(best[0][9])
    assert float(slower[0][0]) < float(faster[0][0])
    whole = planned("--gpus", "4..8", "--lora")
    assert ["8", "GPUs"] in whole and len(whole) == 2 + 3 + 2  # rows; a blank, a number and a head; rows


@pytest.mark.parametrize(
    "options, said",
    [
        (["--gpus", "8x"], "--gpus 8x: expected a number such as 64"),
        (["--gpus", "64..8"], "--gpus 64..8: expected"),
        (["--memory", "-1"], "--memory -1: expected a number above 0"),
        (["--model", "qwen"], "--model qwen: expected a name in configs/shapes"),
        (["--lorra", "true"], "did you mean 'lora'"),
        slow(["--gpus", "7"], "--gpus 7: no layout deals --samples 32 evenly"),
        slow(["--memory", "0.001"], "--gpus 8: no layout fits into --memory 0.001 GiB"),
    ],
)
def test_plan_refuses(planned, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(*options)
