"""Tensor and pipeline parallelism, alone and with ZeRO, against one process: losses, weights, checkpoints,
communication, generation."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_blip2_train as blip2_train
import test_train_visualglm as glm_train
import torch
import torch.distributed as dist
from cells import diagonal, slow, thinned
from ranks import Replaced, run
from small import arguments, assert_same_run, log_of, losses, wait_for_step, weights
from test_train import ROOT
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import checkpoint
import generate
import model_blip2 as blip2
import model_qwen_vl as qwen
import model_visualglm as glm
import parallel
import pipeline
import train
import vlm

glm_base, glm_dataset = glm_train.glm_base, glm_train.glm_dataset

LORA = {"lora": True, "lora_dropout": 0.3}
LORA_TARGETS = [*qwen.MODEL.lora_targets, r".*resblocks.*c_(fc|proj)"]
MODES = {  # name -> (which base, settings)
    "qwen sft": ("qwen", {}),
    "qwen lora": ("qwen", {**LORA, "lora_target_modules": LORA_TARGETS}),
    "glm sft": ("glm", {}),
    "glm lora": (
        "glm",
        {**LORA, "lora_target_modules": [r".*attention\.(query_key_value|dense)", ".*4h_to_h"]},
    ),
    "glm split lora": ("glm", {**LORA, "lora_split": True, "lora_rank": 3}),
    "glm ptuning": ("glm", {"pre_seq_len": 3, "learning_rate": 0.05}),
    "opt sft": ("opt", {}),
    "opt lora": (
        "opt",
        {**LORA, "lora_target_modules": [r"language_model.*(q|v|out)_proj", r"language_model.*fc2"]},
    ),
    "t5 sft": ("t5", {}),
    "t5 lora": (
        "t5",
        {**LORA, "lora_target_modules": [r"language_model.*Attention\.[qvo]", r".*DenseReluDense\.wo"]},
    ),
    "stage 1": ("stage1", {"stage": "pretrain1"}),
}


@pytest.fixture(scope="session")
def bases(base, glm_base, dataset, glm_dataset, blip2_captions, tmp_path_factory):
    """{name: (checkpoint, dataset)}"""
    root = tmp_path_factory.mktemp("blip2")
    write, opt, t5 = blip2_train.write_checkpoint, blip2_train.OPT, {**blip2_train.T5, "num_heads": 4}
    return {
        "qwen": (base, dataset),
        "glm": (glm_base, glm_dataset),
        "opt": (write(root / "opt", opt), blip2_captions),
        "t5": (write(root / "t5", t5), blip2_captions),
        "stage1": (write(root / "1", opt, True), blip2_captions),
    }


@pytest.fixture(scope="session")
def blip2_captions(tmp_path_factory):
    captions = blip2_train.dataset.__wrapped__(tmp_path_factory)
    return {key: captions[key] for key in ("train", "eval")}


def start(bases, mode, out, world=1, batch=8, main=train.main, **options):
    kind, settings = MODES[mode]
    split = {"per_device_train_batch_size": batch, **options}
    degrees = (options.get(f"{axis}_parallel_degree", 1) for axis in ("tensor", "pipeline"))
    split.setdefault("gradient_accumulation_steps", 8 * math.prod(degrees) // (batch * world))
    run(arguments(*bases[kind], out, **{**settings, **split}), world, main)


@pytest.fixture(scope="session")
def references(bases, tmp_path_factory):
    made = {}

    def reference(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("reference") / "out"
            start(bases, mode, made[mode])
        return made[mode]

    return reference


@pytest.fixture(scope="session")
def train_run(bases, tmp_path_factory):
    """train_run(mode, world=1, out=None, **settings) -> output directory; runs in one process are kept."""
    kept = {}

    def do(mode, world=1, out=None, **settings):
        key = (mode, json.dumps(settings, sort_keys=True)) if world == 1 and out is None else None
        if key is None or key not in kept:
            out = out or tmp_path_factory.mktemp("run") / "out"
            start(bases, mode, out, world, **settings)
            if key is None:
                return out
            kept[key] = out
        return kept[key]

    return do


def records(out, key):
    return [r[key] for r in log_of(out) if key in r]


def assert_close(a, b, tolerance):
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < tolerance, (a, b)


def assert_same_norms(out, reference):
    ratios = [
        a / b - 1 for a, b in zip(records(out, "grad_norm"), records(reference, "grad_norm"), strict=True)
    ]
    assert_close(ratios, [0] * len(ratios), 1e-4)


# --------------------------------------------------------------------------------------------------
# Tensor parallelism

TP2 = {"tensor_parallel_degree": 2}
LAYOUTS = {"tp2": (2, {}), "tp2 x dp2": (4, {})}  # name -> (processes, settings)
LAYOUTS |= {f"tp2 x zero{n}": (4, {"sharding": f"stage{n}"}) for n in (1, 2, 3)}
ALL_LAYOUTS = ("qwen sft", "qwen lora", "glm sft", "glm lora", "opt sft", "opt lora", "t5 sft", "t5 lora")
CELLS = [*itertools.product(ALL_LAYOUTS, LAYOUTS)]
CELLS += [(mode, "tp2") for mode in MODES if mode not in ALL_LAYOUTS]
# Every layout and every family of models once, and the losses that compare samples with each other.
SHORT = [("qwen sft", "tp2"), ("qwen lora", "tp2 x dp2"), ("glm lora", "tp2 x zero2"), ("stage 1", "tp2")]
SHORT += [("opt sft", "tp2 x zero3"), ("t5 lora", "tp2 x zero1")]


def everywhere_equal(model) -> bool:  # all ranks of a tensor-parallel group
    """Whether what the ranks of the group hold whole is the same on all of them, bit for bit."""
    same, group = True, parallel.groups["tp"]
    for p in model.parameters():
        local = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
        if not hasattr(p, "cut"):
            others = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
            dist.all_gather(others, local.contiguous(), group)
            same = same and all(torch.equal(local, other) for other in others)
    return same


def checked(save_checkpoint, path, training):
    assert everywhere_equal(training.model), "the ranks differ in what they hold whole"
    save_checkpoint(path, training)


@pytest.mark.parametrize("mode, layout", thinned(CELLS, SHORT))
def test_equals_one_process(bases, references, tmp_path, mode, layout):
    reference, main = references(mode), Replaced("train.save_checkpoint", checked)
    world, options = LAYOUTS[layout]
    batch = 16 // world if mode == "stage 1" else 2  # pictures are contrasted within a round of micro-batches
    start(bases, mode, tmp_path / "out", world, batch, main, **TP2, **options)
    assert_same_run(tmp_path / "out", reference)
    assert_same_norms(tmp_path / "out", reference)


CHAINS = {  # mode -> layouts that a run goes through: (processes, settings)
    "qwen sft": [
        (2, TP2),
        (4, TP2),
        (1, {}),
        (4, {**TP2, "sharding": "stage3"}),
        (2, {"sharding": "stage2"}),
        (2, TP2),
        (4, {**TP2, "sharding": "stage1"}),
        (2, {"sharding": "stage3"}),
        (4, {**TP2, "sharding": "stage2"}),
    ],
    "glm lora": [(1, {}), (2, TP2), (2, {"sharding": "stage3"})],
    "t5 sft": [(4, {**TP2, "sharding": "stage3"}), (1, {}), (2, TP2)],
}


@pytest.mark.parametrize("mode", thinned(CHAINS, ["glm lora"]))
def test_resumes_on_other_layouts(train_run, mode, tmp_path):
    """Two steps on each layout of the chain: every run continues from what another layout saved."""
    options = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    for i, (world, layout) in enumerate(CHAINS[mode]):
        batch = 8 * layout.get("tensor_parallel_degree", 1) // world
        train_run(mode, world, tmp_path / "out", batch=batch, **options, **layout, max_steps=2 * (i + 1))
    assert_same_run(tmp_path / "out", train_run(mode, **options, max_steps=2 * len(CHAINS[mode])))


def counted(directory, forward_backward, training, micro_batches, facts):
    """Writes what is all-reduced over the tensor-parallel group in a step of one micro-batch."""
    all_reduce, sizes, (batch,) = dist.all_reduce, [], micro_batches

    def reduce(tensor, *args, group=None, **options):
        if group is parallel.groups["tp"]:
            sizes.append(tensor.numel())
        return all_reduce(tensor, *args, group=group, **options)

    dist.all_reduce = reduce
    result = forward_backward(training, micro_batches, facts)
    counts = [len(batch.input_ids), batch.num_supervised, len(batch.pixel_values), sizes]
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(counts))
    return result


@pytest.mark.parametrize("mode", ["qwen sft", "qwen lora", "glm sft"])
def test_two_all_reduces_a_layer_and_direction(bases, tmp_path, mode):
    """4 activations a layer (arXiv:1909.08053 sec. 3), by size; besides, one for the embedding and one for
    the head."""
    kind, _ = MODES[mode]
    options = {
        "lora": "lora" in mode,
        **TP2,
        "max_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 3,
    }
    main = Replaced("train.forward_backward", partial(counted, tmp_path))
    run(arguments(*bases[kind], tmp_path / "out", **options), 2, main)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1]
    tokens, supervised, pictures, sizes = ranks[0]
    raw = checkpoint.read_config(bases[kind][0])
    text, layers = tokens * raw["hidden_size"], 2
    expected = Counter({text: 4 * layers + 1}) + Counter({supervised * raw["hidden_size"]: 1})
    if mode == "qwen sft":  # the tiny resampler has one head, and stays whole
        expected += Counter({pictures * 16 * 32: 4 * 2})
    elif (
        mode == "qwen lora"
    ):  # a frozen tower; nothing goes back beyond the first block; A or B of each adapter
        expected += Counter({pictures * 16 * 32: 2 * 2}) + Counter({8 * raw["hidden_size"]: 4 * layers})
        expected.subtract({text: 1})
    # one block of the tower, two of the Q-Former, the first with cross-attention: a row of 32 channels each
    else:
        expected += Counter({pictures * 17 * 32: 4 + 1}) + Counter({pictures * 4 * 32: 4 * 2 + 2})
    assert Counter(sizes) == expected


def recorded(directory, original, *args):
    found = list(original(*args))
    path = directory / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json"
    path.write_text(json.dumps([ids for _, ids in sorted(found, key=lambda one: one[0].id)]))
    return found


@pytest.mark.parametrize("mode", ["qwen sft", "glm lora", "t5 sft"])
def test_same_greedy_tokens(bases, references, tmp_path, mode):
    """From the weights or the adapter that training left; pictures in some requests only, where the model
    allows it."""
    main = Replaced("generate.run_all", partial(recorded, tmp_path), generate.main)
    out, folder = references(mode), Path(bases[MODES[mode][0]][1]["train"][0]["data_files"]).parent
    requests = [{"prompt": "Question: w1 w2", "image": str(folder / f"{i}.png")} for i in range(3)]
    if not mode.startswith("t5"):
        requests.append({"prompt": "what is it?"})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    where = "--lora_path" if "lora" in mode else "--model_name_or_path"
    common = [where, str(out), "--requests", str(tmp_path / "requests.jsonl")]
    common += ["--min_new_tokens", "6", "--max_new_tokens", "12"]
    for degree in (1, 2):
        output = tmp_path / f"{degree}.jsonl"
        run([*common, "--output", str(output), "--tensor_parallel_degree", str(degree)], degree, main)
        assert len(output.read_text().splitlines()) == len(requests)
    one, *two = (json.loads((tmp_path / f"{place}.json").read_text()) for place in ("1-0", "2-0", "2-1"))
    assert two == [one, one] and len(one) == len(requests) and min(map(len, one)) >= 6


@pytest.mark.slow
def test_evaluation_and_generation_in_training(train_run):
    options = {
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
    }
    options |= {"eval_with_do_generation": True, "metric_for_best_model": "eval_loss"}
    reference = train_run("qwen sft", **options)
    out = train_run("qwen sft", 4, batch=4, **TP2, sharding="stage3", **options)
    assert_same_run(out, reference)
    assert len(records(out, "eval_loss")) == 2
    assert_close(records(out, "eval_loss"), records(reference, "eval_loss"), 1e-5)


def says_how_many(original, model, processor, conversations, *args, **options):
    print(f"rank {os.environ['RANK']} answers {len(conversations)}", flush=True)
    return original(model, processor, conversations, *args, **options)


def says_answers(original, conversations, answers, *args):
    print(f"all answers {json.dumps(answers)}", flush=True)
    return original(conversations, answers, *args)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["stage2", None, "stage1"])
def test_questions_of_an_evaluation_are_shared(bases, tmp_path, capfd, sharding):
    """Each data-parallel rank answers its share, and all have the answers of one process, in order."""
    options = {"evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 1}
    options |= {"eval_with_do_generation": True, "do_eval": False, "load_best_model_at_end": False}
    main = Replaced("evaluate.score", says_answers, Replaced("evaluate.answer_all", says_how_many))
    said = []
    for world in (1, 2):
        start(bases, "qwen sft", tmp_path / str(world), world, 4, main, sharding=sharding, **options)
        said.append(capfd.readouterr().out)
    assert re.findall(r"rank \d answers (\d+)", said[0]) == ["10"]
    assert re.findall(r"rank \d answers (\d+)", said[1]) == ["5", "5"]
    (alone,), (first, second) = (re.findall(r"all answers (.*)", text) for text in said)
    assert first == second == alone and len(json.loads(alone)) == 10


@pytest.mark.parametrize("world, options", [(2, {"recompute": True}), slow(4, {"sharding": "stage2"})])
def test_bf16(train_run, world, options):
    """Computed in 16 bits with fp32 master weights, adapters in fp32."""
    common = {"bf16": True, "fp16_opt_level": "O2", "max_steps": 3, "learning_rate": 1e-3}
    reference = train_run("qwen lora", **common)
    out = train_run("qwen lora", world, batch=2, **common, **TP2, **options)
    assert_close(losses(out), losses(reference), 0.02)
    assert_close(records(out, "grad_norm"), records(reference, "grad_norm"), 0.05)


@pytest.mark.parametrize(
    "model, preset, degree, words",
    [
        (
            qwen,
            "qwen-vl-7b",
            3,
            "=3 does not divide num_attention_heads=32; this model takes 1, 2, 4, 8, 16$",
        ),
        (blip2, "blip2-opt-2.7b", 32, "=32 does not divide vision_config.num_attention_heads=16; this model"),
        (blip2, "blip2-flan-t5-xl", 6, "=6 does not divide vision_config.num_attention_heads=16"),
        (
            glm,
            "visualglm-6b",
            5,
            "=5 does not divide num_attention_heads=32; this model takes 1, 2, 4, 8, 16$",
        ),
    ],
)
def test_degrees_that_do_not_divide(model, preset, degree, words):
    with torch.device("meta"):
        config = model.build_model(vlm.shape(preset)).config
    with pytest.raises(ValueError, match=f"tensor_parallel_degree{words}"):
        model.tp_plan(config, degree)


SHAPES = sorted(p.stem for p in (ROOT / "configs" / "shapes").glob("*.json"))


@pytest.mark.parametrize("model, preset", [(vlm.find(vlm.shape(p)), p) for p in SHAPES])
@pytest.mark.parametrize("degree", [2, 8])
def test_full_size_is_cut(model, preset, degree):
    """Each rank's share of the published shapes: all blocks are cut, what stays whole is small."""
    with torch.device("meta"):
        whole = sum(p.numel() for p in model.build_model(vlm.shape(preset)).parameters())
        part = model.build_model(vlm.shape(preset))
    world = parallel.World(0, degree, torch.device("cpu"), tp_size=degree)
    parallel.tensor_parallel(part, model.tp_plan(part.config, degree), world)
    mine = sum(p.numel() for p in part.parameters())
    assert whole / degree < mine < whole / degree + 0.02 * whole + 3e8 / 2, (mine, whole / degree)


@pytest.mark.parametrize("world", [8, slow(64)])
def test_layout_of_many_ranks(monkeypatch, base, world):
    """Over torch's process group of ranks that are not there: each has its place, its groups hold those that
    share all other places, and the two tables of a sharded model are groups of their own."""
    init = dist.init_process_group
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in (0, 5, world - 2):
        place = SimpleNamespace(rank=rank, size=world, store=None)
        fake = partial(init, "fake", rank=rank, world_size=world, store=FakeStore())
        monkeypatch.setattr(dist, "init_process_group", lambda *_, fake=fake, **__: fake())
        try:
            here = parallel.init_world(2, 2, "stage3", 2, place)
            half, replicas = world // 2, world // 8
            assert (here.rank, here.size, here.tp_rank, here.pp_rank) == (rank, world, rank % 2, rank // half)
            assert here.dp_rank == rank % half // 2 and here.dp_size == world // 4
            members = {axis: dist.get_process_group_ranks(g) for axis, g in parallel.groups.items()}
            assert members["tp"] == [rank - rank % 2, rank - rank % 2 + 1]
            assert members["pp"] == [rank % half, rank % half + half]
            assert members["dp"] == [
                r for r in range(world) if r % 2 == rank % 2 and r // half == rank // half
            ]
            assert members["dp_shard"] == [r for r in members["dp"] if r // 4 == rank // 4]
            assert len(members.get("dp_replicate", [rank])) == replicas
            model = qwen.MODEL.network(checkpoint.read_config(base))
            parallel.shard(model, here.mesh, "stage3", None)
            alone = [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]
            assert {"", "transformer.wte", "lm_head", "transformer.h.0"} <= {*alone}
        finally:
            parallel.leave_world()


def test_cut_and_join():
    whole = torch.arange(48.0).view(12, 4)
    for cut in (parallel.Cut(0, 3, 0, 2), parallel.Cut(0, 1, 0, 4), parallel.Cut(1, 1, 0, 2)):
        parts = [replace(cut, rank=r).take(whole) for r in range(cut.size)]
        assert torch.equal(cut.join(parts), whole)
    assert parallel.Cut(0, 3, 1, 2).take(whole)[:, 0].tolist() == [
        8,
        12,
        24,
        28,
        40,
        44,
    ]  # rows 2, 3, 6, 7, 10, 11


# --------------------------------------------------------------------------------------------------
# Pipeline stages

PP2 = {"batch": 2, "pipeline_parallel_degree": 2}
PP2_DP2 = {**PP2, "batch": 1}
PIPELINES = {  # name -> (processes, settings)
    "pp2": (2, PP2),
    "pp2 x dp2": (4, PP2_DP2),
    "pp2 x zero1": (4, {**PP2_DP2, "sharding": "stage1"}),
    "pp2 x zero2": (4, {**PP2_DP2, "sharding": "stage2"}),
    "pp2 x zero3": (4, {**PP2_DP2, "sharding": "stage3"}),
    "tp2 x pp2": (4, {**PP2, "tensor_parallel_degree": 2}),
}
PIPELINE_MODES = ["qwen sft", "qwen lora", "glm sft", "glm lora", "opt sft", "opt lora"]


@pytest.mark.parametrize("mode, layout", diagonal(PIPELINE_MODES, PIPELINES))
def test_pipeline_equals_one_process(references, train_run, mode, layout):
    """Micro-batches of one or two samples, so that many have no picture, and streams of all lengths."""
    world, settings = PIPELINES[layout]
    out = train_run(mode, world, **settings)
    assert_same_run(out, references(mode))
    assert_same_norms(out, references(mode))


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_schedule": "gpipe", "batch": 8},
        slow({"pipeline_schedule": "gpipe", "recompute": True}),
        slow({"pipeline_schedule": "interleaved"}),
        {"pipeline_schedule": "interleaved", "recompute": True},
        slow({"recompute": True}),
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_pipeline_schedules_change_nothing(train_run, options):
    """With evaluation in between, under LoRA with dropout."""
    evaluation = {"evaluation_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    reference = train_run("qwen lora", **evaluation)
    out = train_run("qwen lora", 2, **{**PP2, **options, **evaluation})
    assert_same_run(out, reference)
    assert len(records(out, "eval_loss")) == 2
    assert_close(records(out, "eval_loss"), records(reference, "eval_loss"), 1e-5)


FROZEN = {
    "first stage": (
        "qwen sft",
        {"freeze_include": ["transformer.visual.*", "transformer.wte.*", "transformer.h.0.*"]},
    ),
    "last stage": ("qwen sft", {"freeze_include": ["transformer.h.*", "transformer.ln_f.*", "lm_head.*"]}),
    "all but the tower": (
        "qwen sft",
        {"freeze_include": ["*.wte.*", "transformer.h.*", "*ln_f.*", "lm_head.*"]},
    ),
    "tied embedding": ("opt sft", {"freeze_include": ["language_model.model.decoder.embed_tokens.*"]}),
}


@pytest.mark.parametrize("case, layout", diagonal(FROZEN, ["pp2", "pp2 x zero1"]))
def test_frozen_stages(train_run, case, layout):
    """No gradient, or none for a micro-batch without a picture, comes back to a stage; frozen weights are
    bit-equal."""
    mode, options = FROZEN[case]
    options = {**options, "learning_rate": 1e-3}
    world, split = PIPELINES[layout]
    reference = train_run(mode, **options)
    out = train_run(mode, world, **options, **split)
    assert_same_run(out, reference)


def test_prefix_on_every_stage(train_run, references):
    """P-tuning's keys and values are used by all blocks: one gradient, from all stages."""
    assert_same_run(train_run("glm ptuning", 2, **PP2), references("glm ptuning"))


@pytest.mark.parametrize("kind, level", diagonal(["bf16", "fp16"], ["O1", "O2"]))
def test_pipeline_in_sixteen_bits(train_run, kind, level):
    options = {kind: True, "fp16_opt_level": level, "max_steps": 3, "learning_rate": 1e-3}
    reference = train_run("qwen sft", **options)
    outs = [train_run("qwen sft", 2, **options, **PP2)]
    if kind == "bf16":  # in fp16 the layout decides which step overflows and is skipped
        outs.append(train_run("qwen sft", 4, **options, **PP2_DP2, sharding="stage2"))
    for out in outs:
        assert_close(losses(out), losses(reference), 0.02)
        a, b = weights(out), weights(reference)
        assert all(a[n].dtype == b[n].dtype and (a[n].float() - b[n].float()).abs().max() < 0.02 for n in b)


@pytest.mark.parametrize("mode", thinned(["qwen sft", "qwen lora", "opt sft"], ["qwen lora"]))
def test_pipeline_resumes_on_other_layouts(train_run, mode, tmp_path):
    """Three steps each on pp2, one process, pp2 x zero3, dp2, pp2: the losses of an uninterrupted run."""
    options = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    chain = [(2, PP2), (1, {}), (4, PIPELINES["pp2 x zero3"][1]), (2, {"batch": 4}), (2, PP2)]
    for i, (world, layout) in enumerate(chain):
        train_run(mode, world, tmp_path / "out", **options, **layout, max_steps=3 * (i + 1))
    assert_same_run(tmp_path / "out", train_run(mode, **options, max_steps=15))


def test_pipeline_checkpoint_is_whole(train_run, bases):
    """Names, shapes and files of one process: a model_name_or_path."""
    out = train_run("opt sft", 2, **PP2, max_steps=1)
    base = weights(bases["opt"][0])
    assert {n: t.shape for n, t in weights(out).items()} == {n: t.shape for n, t in base.items()}
    model = blip2.build_model(checkpoint.read_config(out))
    checkpoint.load_into(dict(model.named_parameters()), checkpoint.open_weights(out))
    assert (out / "tokenizer.json").exists()


def test_lora_goes_on_from_an_adapter(train_run, references):
    adapter = references("qwen lora")
    reference = train_run("qwen lora", lora_path=str(adapter), max_steps=3)
    assert_same_run(train_run("qwen lora", 2, lora_path=str(adapter), max_steps=3, **PP2), reference)


def test_cut_balances_cost():
    cut = pipeline.cut
    assert cut([1.0] * 8, 0, 0, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(r) for r in cut([1.0] * 8, 3, 1, 3)] == [1, 4, 3]
    assert [len(r) for r in cut([1.0] * 3, 9, 0, 2)] == [0, 3]
    assert [len(r) for r in cut([1.0] * 2, 0, 0, 4)] == [0, 1, 1, 0]
    worst = min(max(a + 2.5, 7 - a + 1.0) for a in range(8))  # by trying all
    assert max(len(r) + e for r, e in zip(cut([1.0] * 7, 2.5, 1.0, 2), (2.5, 1.0), strict=True)) == worst
    with pytest.raises(ValueError, match="5 pipeline stages need at least 3 blocks, the model has 2"):
        cut([1.0] * 2, 0, 0, 5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "gradient_accumulation_steps=1 is less than pipeline_parallel_degree=2"),
        (
            {"pipeline_schedule": "zigzag"},
            "pipeline_schedule='zigzag'; expected one of gpipe, 1f1b, interleaved",
        ),
        (
            {"pipeline_schedule": "interleaved", "gradient_accumulation_steps": 5},
            "pipeline_schedule=interleaved",
        ),
        (
            {"gradient_accumulation_steps": 2, "eval_with_do_generation": True},
            "eval_with_do_generation.*pipeline_para",
        ),
        (
            {"gradient_accumulation_steps": 2, "cache_image_features": True},
            "cache_image_features.*pipeline_parallel",
        ),
    ],
)
def test_what_pipelines_refuse(options, words):
    argv = [a for k, v in {"pipeline_parallel_degree": 2, **options}.items() for a in (f"--{k}", str(v))]
    with pytest.raises(ValueError, match=words):
        train.parse_config(argv)


@pytest.mark.parametrize("mode, words", [("t5 sft", "Flan-T5's decoder"), ("stage 1", "pretrain1")])
def test_models_that_are_not_cut(train_run, capfd, mode, words):
    with pytest.raises(AssertionError):
        train_run(mode, 2, **PP2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and all(words in line and "pipeline_parallel_degree=2" in line for line in errors)


def test_shared_gradients_need_no_second_look():
    """Each parameter has a first stage that counts it once, whatever the model."""
    with torch.device("meta"):
        model = blip2.build_model(vlm.shape("blip2-opt-2.7b"))
    blocks = pipeline.cut([1.0] * 32, 8.0, 2.0, 4)
    held = pipeline.stages_of_parameters(model, blip2.MODEL.pipeline, blocks)
    assert {n for n, where in held.items() if len(where) > 1} == {
        "language_model.model.decoder.embed_tokens.weight"
    }
    assert held["language_model.model.decoder.embed_tokens.weight"] == {0, 3}
    sizes = [sum(p.numel() for n, p in model.named_parameters() if stage in held[n]) for stage in range(4)]
    tied = model.language_model.model.decoder.embed_tokens.weight.numel()
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) + tied


# --------------------------------------------------------------------------------------------------
# Communication of the data-parallel axes


def numbers_moved(log, name, place, collective, *args, **options):
    tensor = args[place] if args else options[("output", "input")[place]]
    if os.environ["RANK"] == "0":
        with open(log, "a") as file:
            file.write(f"{name} {tensor.numel()}\n")
    return collective(*args, **options)


@pytest.mark.parametrize("sharding, batch", diagonal(["stage1", "stage2", "stage3"], [4, 1]))
def test_zero_moves_no_more_than_it_must(bases, tmp_path, sharding, batch):
    """Counted numbers a step: parameters gathered once and gradients reduced once (2 x parameters) under
    ZeRO-1; with ZeRO-2 reduced, with ZeRO-3 also gathered twice, every micro-batch: 3 x, apart from what only
    the ends of the model use, which stays."""
    log = tmp_path / "log"

    main = train.main
    for place, name in enumerate(("all_gather_single", "reduce_scatter_single")):
        main = Replaced(f"torch.distributed.{name}", partial(numbers_moved, log, name, place), main)
    options = {"max_steps": 3, "save_strategy": "no", "freeze_include": ["*attn_pool.pos_embed"]}
    start(bases, "qwen sft", tmp_path / "out", 2, batch, main, sharding=sharding, **options)
    moved = {"all_gather_single": 0, "reduce_scatter_single": 0}
    for line in log.read_text().splitlines():
        name, count = line.split()
        moved[name] += int(count) / options["max_steps"]
    sizes = {n: t.numel() for n, t in weights(bases["qwen"][0]).items()}
    whole, rounds = sum(sizes.values()), 4 // batch
    blocks = sum(count for n, count in sizes.items() if re.search(r"\.(h|resblocks)\.\d|wte", n))
    gathered = {"stage1": whole, "stage2": whole, "stage3": rounds * (whole + blocks)}[sharding]
    reduced = whole * (1 if sharding == "stage1" else rounds)
    assert moved["all_gather_single"] == pytest.approx(gathered, rel=0.05)
    assert moved["reduce_scatter_single"] == pytest.approx(reduced, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Ranks that die


def test_torchrun_restarts_after_a_kill(bases, tmp_path):
    """kill -9 of one rank: the other ends by itself with one line, and torchrun goes on from the last
    checkpoint, even of a run that overwrites an older one."""
    options = {"max_steps": 24, "save_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    options["gradient_accumulation_steps"] = 4
    run(arguments(*bases["qwen"], tmp_path / "reference", **options))
    options |= {"pipeline_parallel_degree": 2, "overwrite_output_dir": True}
    argv = arguments(*bases["qwen"], tmp_path / "out", **options)
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1 train.py".split()
    process = subprocess.Popen(
        [sys.executable, *command, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for_step(tmp_path / "out", 6, lambda: process.poll() is None)
        holder = re.match(r"process (\d+) on ", (tmp_path / "out/.lock").read_text())  # rank 0 holds the lock
        os.kill(int(holder[1]), signal.SIGKILL)
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(
        r"error: \[rank 1\] another rank is gone .* continues from .*-\d+", errors[0]
    )
    assert re.search(r"continuing from .*checkpoint-\d+ at step", output), output
    assert_same_run(tmp_path / "out", tmp_path / "reference")


def dies_at_4(original, directory, *args, **options):
    """Rank 1 is killed in the middle of it."""
    if os.environ["RANK"] == "1" and "checkpoint-4" in str(directory):
        if isinstance(args[0], Iterator):  # of the weights
            next(args[0])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(directory, *args, **options)


@pytest.mark.parametrize("where", ["checkpoint.save_weights", slow("train_state.save_train_state")])
def test_a_rank_that_dies_while_it_saves(bases, tmp_path, capfd, where):
    """The checkpoint before stands, the broken one does not appear, and the run goes on from it."""
    out, settings = tmp_path / "out", {**PP2, "save_steps": 2}
    start(bases, "qwen sft", out, 2, **settings, max_steps=2)
    before = {p: p.read_bytes() for p in sorted(out.glob("checkpoint-2/**/*")) if p.is_file()}
    with pytest.raises(AssertionError, match="-9"):
        main = Replaced(where, dies_at_4)
        start(bases, "qwen sft", out, 2, main=main, **settings, max_steps=6)
    assert "error: [rank 0] another rank is gone" in capfd.readouterr().err
    assert checkpoint.last_checkpoint(out).name == "checkpoint-2" and not list(out.glob("*.tmp"))
    assert {p: p.read_bytes() for p in before} == before
    start(bases, "qwen sft", out, 2, **settings, max_steps=6)
    start(bases, "qwen sft", tmp_path / "reference", max_steps=6)
    assert len(losses(out)) == 6 and abs(losses(out)[0] - losses(tmp_path / "reference")[0]) < 1e-5
