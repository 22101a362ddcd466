"""The loop against itself: layouts, splits, resumption, frozen parameters, precision modes. One process is
the reference."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import diagonal, slow, thinned
from ranks import run
from safetensors.torch import load_file
from small import arguments, assert_same_run, gradients, log_of, losses, wait_for_step, weights

import checkpoint
import data
import export_static
import model_qwen_vl as qwen
import train

ROOT = Path(__file__).resolve().parent.parent


MODES = {
    "sft": {},
    "lora": {
        "lora": True,
        "lora_dropout": 0.3,
        "lora_target_modules": [*qwen.MODEL.lora_targets, r".*resblocks.*c_fc"],
    },
}
SPLIT = {"per_device_train_batch_size": 8}
SPLITS = [(mode, *split) for mode in MODES for split in ((4, 2), (1, 8))]


@pytest.fixture(scope="session")
def references(base, dataset, tmp_path_factory):
    out = {}
    for mode, options in MODES.items():
        for mixtoken in (False, True):
            path = out[mode, mixtoken] = tmp_path_factory.mktemp(f"{mode}{mixtoken}") / "out"
            size = {"per_device_train_batch_size": 2 if mixtoken else 8}
            run(arguments(base, dataset, path, mixtoken=mixtoken, **size, **options))
            assert len(losses(path)) == 10 and losses(path)[-1] < losses(path)[0]
    return out


@pytest.mark.parametrize("mode, batch, accumulation", thinned(SPLITS, SPLITS[::3]))
def test_splits_of_a_batch_are_equal(references, base, dataset, tmp_path, mode, batch, accumulation):
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run(arguments(base, dataset, tmp_path / "out", **split, **MODES[mode]))
    assert_same_run(tmp_path / "out", references[mode, False])


@pytest.mark.parametrize("sharding, mode", diagonal([None, "stage1", "stage2", "stage3"], MODES))
def test_two_processes_equal_one(references, base, dataset, tmp_path, mode, sharding):
    """Micro-batches of one sample, so that often only one of the ranks has a picture."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    evaluation = {"evaluation_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    options = {"sharding": sharding, **evaluation} if sharding else {}
    run(arguments(base, dataset, tmp_path / "out", **split, **options, **MODES[mode]), world=2)
    assert_same_run(tmp_path / "out", references[mode, False])


def test_hybrid_sharding_of_four_processes_equals_one(references, base, dataset, tmp_path):
    options = {"sharding": "stage3", "sharding_parallel_degree": 2, "per_device_train_batch_size": 2}
    run(arguments(base, dataset, tmp_path / "out", **options), world=4)
    assert_same_run(tmp_path / "out", references["sft", False])


def test_packed_streams_on_two_processes_equal_one(references, base, dataset, tmp_path):
    run(
        arguments(base, dataset, tmp_path / "out", mixtoken=True, sharding="stage2", **MODES["lora"]), world=2
    )
    assert_same_run(tmp_path / "out", references["lora", True])


@pytest.mark.parametrize(
    "option", [{"recompute": True}, {"cache_image_features": True}, {"num_workers": 2}, {"eval_steps": 3}]
)
def test_options_that_must_not_change_a_run(references, base, dataset, tmp_path, option):
    frozen = {"freeze_include": ["*visual*"]} if "cache_image_features" in option else {}
    reference = references["sft", False]
    if frozen:
        reference = tmp_path / "reference"
        run(arguments(base, dataset, reference, **frozen, **SPLIT))
    extra = {"evaluation_strategy": "steps"} if "eval_steps" in option else {}
    run(arguments(base, dataset, tmp_path / "out", **SPLIT, **option, **frozen, **extra))
    assert_same_run(tmp_path / "out", reference, loss_tol=1e-6)
    if extra:
        evals = [r for r in log_of(tmp_path / "out") if "eval_loss" in r]
        assert [r["step"] for r in evals] == [3, 6, 9] and evals[0]["eval_loss"] > evals[-1]["eval_loss"]


def test_packed_equals_one_by_one(base, dataset):
    """Loss and every gradient, the vision tower's included."""
    processor = qwen.load_processor(base)
    index = data.build_index(dataset["train"], processor, 128, None, 0, False)
    plan = data.Plan(index, 0, 128)
    samples = [data.load_sample(plan, n, 0, processor) for n in range(9)]
    model = qwen.build_model(checkpoint.read_config(base)).train()
    checkpoint.load_into(dict(model.named_parameters()), checkpoint.open_weights(base))

    loss, packed = gradients(model, [data.collate(samples)])
    loss_single, single = gradients(model, [data.collate([s]) for s in samples])
    assert abs(loss - loss_single) < 1e-5
    assert packed.keys() == single.keys() and any("resblocks" in n for n in packed)
    for name in packed:
        assert (packed[name] - single[name]).abs().max() < 1e-5, name


# --------------------------------------------------------------------------------------------------


def start(argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("world", [1, slow(2)])
def test_killed_run_continues_exactly(base, dataset, tmp_path, world):
    options = {
        "save_steps": 3,
        "save_total_limit": 2,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        **MODES["lora"],
    }
    # so many steps that it is killed before the last, however slowly this process comes to it
    process = start(arguments(base, dataset, tmp_path / "out", **{**options, "max_steps": 5000}))
    wait_for_step(tmp_path / "out", 8, lambda: process.poll() is None)
    process.kill()
    process.wait()
    done = len(losses(tmp_path / "out"))
    options["max_steps"] = done + 4
    run(arguments(base, dataset, tmp_path / "reference", **options))
    assert 8 <= done < 5000 and not (tmp_path / "out" / "adapter_model.safetensors").exists()
    if world == 2:
        options |= {"sharding": "stage3", "per_device_train_batch_size": 1}
    run(arguments(base, dataset, tmp_path / "out", **options), world=world)
    if world == 1:
        assert losses(tmp_path / "out") == losses(tmp_path / "reference")
        a, b = weights(tmp_path / "out"), weights(tmp_path / "reference")
        assert all(torch.equal(a[n], b[n]) for n in b)
    else:
        assert_same_run(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_signals_save_and_the_same_command_continues(base, dataset, tmp_path, number):
    """The whole process group gets the signal, data workers too, as from a terminal."""
    options = {"per_device_train_batch_size": 4, "num_workers": 1, "lr_scheduler_type": "constant"}
    process = start(arguments(base, dataset, tmp_path / "out", max_steps=5000, **options))
    wait_for_step(tmp_path / "out", 5, lambda: process.poll() is None)
    os.killpg(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number and number.name in output and "Traceback" not in output, output
    assert checkpoint.last_checkpoint(tmp_path / "out").name == f"checkpoint-{len(losses(tmp_path / 'out'))}"
    options["max_steps"] = len(losses(tmp_path / "out")) + 4
    run(arguments(base, dataset, tmp_path / "out", **options))
    run(arguments(base, dataset, tmp_path / "reference", **{**options, "num_workers": 0}))
    assert losses(tmp_path / "out") == losses(tmp_path / "reference")


def test_frozen_parameters_are_bit_equal_and_carved_ones_train(base, dataset, tmp_path):
    out = tmp_path / "out"
    run(
        arguments(
            base,
            dataset,
            out,
            freeze_include=["*visual*"],
            freeze_exclude=["*visual.attn_pool*"],
            weight_decay=0.1,
            **SPLIT,
        )
    )
    before, after = weights(base), weights(out)
    for name in before:
        frozen = "visual" in name and "attn_pool" not in name
        assert torch.equal(before[name], after[name]) == frozen, name
    assert checkpoint.read_config(out)["model_type"] == "qwen" and (out / "qwen.tiktoken").exists()


def test_under_lora_freeze_exclude_trains_more(base, dataset, tmp_path):
    """The carved-out weight is in the adapter's files; nothing else of the base is."""
    out = tmp_path / "out"
    run(arguments(base, dataset, out, lora=True, freeze_exclude=["lm_head.weight"], **SPLIT))
    saved, before = load_file(out / "adapter_model.safetensors"), weights(base)
    whole = [name for name in saved if ".lora_" not in name]
    assert len(whole) == 1 and "lm_head" in whole[0]
    assert not torch.equal(saved[whole[0]], before["lm_head.weight"])


def test_pretraining_trains_vision_only(base, dataset, tmp_path):
    captions = tmp_path / "captions.json"
    root = Path(dataset["train"][0]["data_files"]).parent
    captions.write_text(
        json.dumps([{"image": str(root / f"{i}.png"), "caption": f"picture {i}"} for i in range(8)])
    )
    entry = {"train": [{"name": "coco_caption", "data_files": str(captions)}]}
    run(arguments(base, entry, tmp_path / "out", stage="pretrain", **SPLIT))
    before, after = weights(base), weights(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert (
        changed
        and all("visual" in n for n in changed)
        and losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    )


def test_best_model_is_kept_and_loaded(base, dataset, tmp_path):
    """With a learning rate that first helps and then destroys, the best is not the last."""
    out = tmp_path / "out"
    options = {
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "learning_rate": 0.3,
        "max_grad_norm": 0.0,
    }
    run(arguments(base, dataset, out, **options, **SPLIT))
    evals = {r["step"]: r["eval_loss"] for r in log_of(out) if "eval_loss" in r}
    best = min(evals, key=evals.get)
    assert best != 10
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-10"}
    a, b = weights(out), weights(out / f"checkpoint-{best}")
    assert all(torch.equal(a[n], b[n]) for n in a) and (out / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("kind, level, mode", diagonal(["bf16", "fp16"], ["O1", "O2"], MODES))
def test_sixteen_bits(references, base, dataset, tmp_path, kind, level, mode):
    out, options = tmp_path / "out", {kind: True, "fp16_opt_level": level, **SPLIT, **MODES[mode]}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    run(arguments(base, dataset, out, max_steps=4, **options))
    exact = losses(references[mode, False])
    assert 0 < abs(losses(out)[0] - exact[0]) < 0.03
    assert losses(out)[3] < losses(out)[0]
    assert checkpoint.last_checkpoint(out).name == "checkpoint-4"
    run(arguments(base, dataset, out, max_steps=6, **options))
    assert len(losses(out)) == 6


def test_dry_run_loads_nothing(capsys):
    assert (
        train.main(
            ["--model_name_or_path", "qwen-vl-7b", "--lora", "--bf16", "--fp16_opt_level", "O2", "--dry_run"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "9,6" in text and re.search(r"sum +\d+\.\d+ GiB", text) and "FLOPs per step" in text
    weights_gib = float(re.search(r"weights +([\d.]+) GiB", text)[1])
    assert 17.9 < weights_gib < 40


# --------------------------------------------------------------------------------------------------

PADDLEMIX = {  # the keys of that toolkit's qwen_vl/sft_argument.json and lora_sft_argument.json
    "mixtoken": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 1,
    "learning_rate": 1e-05,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "warmup_ratio": 0.01,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "max_length": 2048,
    "bf16": True,
    "fp16_opt_level": "O1",
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "load_best_model_at_end": False,
    "eval_with_do_generation": False,
    "skip_memory_metrics": False,
    "benchmark": False,
    "save_total_limit": 1,
}
PADDLEMIX_LORA = {
    "lora": True,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"],
}
PADDLEMIX_SFT = {"freeze_include": ["*visual*"], "freeze_exclude": ["*visual.attn_pool*"], "benchmark": True}


@pytest.mark.parametrize("own", [PADDLEMIX_LORA, PADDLEMIX_SFT])
def test_paddlemix_files_run_unchanged(base, dataset, tmp_path, own):
    entries = {
        split: [{**e, "chat_template": "chat_template.json"} for e in dataset[split]] for split in dataset
    }
    config = {
        **PADDLEMIX,
        **own,
        "model_name_or_path": str(base),
        "dataset": entries,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "argument.json").write_text(json.dumps(config))
    run([str(tmp_path / "argument.json")])
    assert any("eval_loss" in r for r in log_of(tmp_path / "out")) and checkpoint.last_checkpoint(
        tmp_path / "out"
    )
    saved = json.loads((tmp_path / "out" / "train_config.json").read_text())
    assert saved["learning_rate"] == 1e-5 and saved["mixtoken"] is True
    again = train.parse_config([str(tmp_path / "out" / "train_config.json")])
    assert again.dataset == entries


@pytest.mark.slow
def test_compiled_blocks_learn_as_they_do_without(tmp_path, monkeypatch):
    """With dropout, also behind a run with another share of it: torch's cache gave that one's program."""
    if not export_static.has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = {"lora": True, "max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2}
    entries = {"train": [{"data_files": "samples/flags_zh/train.jsonl", "image_root": "samples"}]}
    for name, share, compiled in (("other", 0.05, True), ("compiled", 0.3, True), ("plain", 0.3, False)):
        how = {**options, "lora_dropout": share, "compile": compiled}
        run(arguments(data.ROOT / "samples/tiny_qwen_vl", entries, tmp_path / name, **how))
    assert_same_run(tmp_path / "compiled", tmp_path / "plain", 1e-4, 1e-3)
