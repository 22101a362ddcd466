"""A user's mistake is one clear line and exit code 1: no traceback, nothing lost."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import exit_codes, script, start
from safetensors.torch import load_file, save_file
from small import argv_of

import checkpoint
import evaluate
import generate
import merge
import train


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def run(main, argv) -> int:
    return exit_codes(start(script, main, argv))[0]


def fails(capfd, main, argv, *words):
    """Runs a script's main; exactly one error line that holds all the words."""
    code = run(main, argv)
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def common(base, dataset, out, **options):
    options = {
        "model_name_or_path": str(base),
        "dataset": dataset,
        "output_dir": str(out),
        "max_steps": 3,
        "num_workers": 0,
        "disable_tqdm": True,
        "max_length": 128,
        **options,
    }
    return argv_of(options)


SETTINGS = [
    (["--learning_rat", "1"], ["learning_rat", "learning_rate"]),
    (["--max_length", "abc"], ["max_length='abc'", "int"]),
    (["--bf16", "yes"], ["bf16='yes'", "bool"]),
    (["--max_length", "0"], ["max_length=0", "expected 1 to"]),
    (["--lr_scheduler_type", "cosin"], ["cosin", "cosine"]),
    (["--stage", "sff"], ["stage='sff'", "sft"]),
    (["--bf16", "--fp16"], ["bf16 and fp16"]),
    (["--tensor_parallel_degree", "2"], ["tensor_parallel_degree=2"]),
    (["--sharding", "stage4"], ["stage4", "stage3"]),
    (["--load_best_model_at_end"], ["load_best_model_at_end", "evaluation_strategy"]),
    (
        "--load_best_model_at_end --evaluation_strategy steps --eval_steps 3 --save_steps 2".split(),
        ["eval_steps=3", "save_steps=2"],
    ),
    (["--use_flash_attention", "true"], ["Triton"]),
    (["--freeze_include", "*vsual*"], ["*vsual*", "visual"]),
    (["--freeze_include", "*"], ["nothing is trainable"]),
    (["--lora", "--lora_target_modules", ".*c_atn"], [".*c_atn", "c_attn"]),
    (["--lora", "--lora_path", "nowhere"], ["nowhere"]),
    (["--model_name_or_path", "qwen-vl/qwen-vl-chat-7b"], ["qwen-vl/qwen-vl-chat-7b", "download"]),
    (["--model_name_or_path", "qwen-vl-7b"], ["without weights"]),
    (["--model", "blip2"], ["blip2", "qwen_vl"]),
    (["--resume_from_checkpoint", "true"], ["no complete checkpoint"]),
    (["--resume_from_checkpoint", "nowhere"], ["nowhere"]),
    (["--cache_image_features"], ["frozen vision tower"]),
    (["--report_to", "mlflow"], ["mlflow", "tensorboard"]),
    (["no_such_config.json"], ["no_such_config.json"]),
    (["--dataset", '{"trian": []}'], ["trian", "train"]),
    (["--dataset", '{"train": []}'], ["train"]),
    (["--dataset", '{"train": [{"name": "coco_vqa", "data_file": "x"}]}'], ["data_file", "data_files"]),
    (["--dataset", '{"train": [{"name": "coco_vqq", "data_files": "x"}]}'], ["coco_vqq", "coco_vqa"]),
    (["--dataset", '{"train": [{"name": "coco_vqa", "data_files": "missing.json"}]}'], ["missing.json"]),
]


@pytest.mark.parametrize("argv, words", SETTINGS, ids=[" ".join(argv)[:40] for argv, _ in SETTINGS])
def test_settings(capfd, base, dataset, tmp_path, argv, words):
    fails(capfd, train.main, common(base, dataset, tmp_path / "out") + argv, *words)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_malformed_configuration_names_its_line(capfd, tmp_path):
    path = write(tmp_path / "c.json", '{"lora": true,\n"bf16": tru}')
    fails(capfd, train.main, [path], f"{path}:2")


def png(path, size=(8, 8)):
    Image.new("RGB", size, "red").save(path)


def bad_records(tmp_path):
    png(tmp_path / "good.png", (64, 64))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    (tmp_path / "in").mkdir()
    chat = {"conversations": [["Picture 1: <img>good.png</img>\nwhat?", "this"]]}

    def picture(name):
        return {"conversations": [[f"Picture 1: <img>{name}</img>\nwhat?", "this"]]}

    return {
        "truncated": ([picture("truncated.png")], {}, ["truncated.png"]),
        "zero bytes": ([picture("zero.png")], {}, ["zero.png"]),
        "no picture": ([picture("text.png")], {}, ["text.png"]),
        "bomb": ([picture("bomb.png")], {}, ["12000x12000"]),
        "missing": ([picture("gone.png")], {}, ["gone.png", "data.jsonl:1"]),
        "outside": (
            [picture("../good.png")],
            {"image_root": str(tmp_path / "in")},
            ["../good.png", "image_root"],
        ),
        "malformed": ("\n".join([json.dumps(chat)] * 2 + ['{"conversations": [']), {}, ["data.jsonl:3"]),
        "empty": ("", {}, ["empty"]),
        "no answer": (
            [{"conversations": [{"from": "user", "value": "hello"}]}],
            {},
            ["data.jsonl:1", "assistant"],
        ),
        "too long": ([{"conversations": [["word " * 300, "answer"]]}], {}, ["data.jsonl:1", "max_length"]),
        "unclosed": ([{"conversations": [["<img>good.png what?", "this"]]}], {}, ["data.jsonl:1", "<img>"]),
    }


CASES = (
    "truncated, zero bytes, no picture, bomb, missing, outside, malformed, "
    "empty, no answer, too long, unclosed"
)


@pytest.mark.parametrize("case", CASES.split(", "))
def test_data(capfd, base, tmp_path, case):
    records, entry, words = bad_records(tmp_path)[case]
    text = records if isinstance(records, str) else "\n".join(map(json.dumps, records))
    files = write(tmp_path / "data.jsonl", text)
    dataset = {"train": [{"name": "chatml_dataset", "data_files": files, **entry}]}
    out = tmp_path / "out"
    argv = common(base, dataset, out)
    code = run(train.main, argv)
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    # pictures are opened while training: the run names each one as it comes and stops over the limit
    assert all(word in err for word in words), err
    assert not list(out.glob("checkpoint-*"))


def test_few_bad_pictures_are_named_and_left_out(capfd, base, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(Path(dataset["train"][0]["data_files"]).parent, folder)
    (folder / "4.png").write_bytes(b"")
    entries = [{**e, "data_files": str(folder / Path(e["data_files"]).name)} for e in dataset["train"]]
    argv = common(
        base,
        {"train": entries},
        tmp_path / "out",
        max_bad_samples=0.05,
        max_steps=5,
        per_device_train_batch_size=8,
    )
    assert run(train.main, argv) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "4.png" in line]
    assert len(warnings) == 1 and "a.jsonl:5" in warnings[0]


def test_output_directory_that_is_no_run(capfd, base, dataset, tmp_path):
    write(tmp_path / "thesis.txt", "precious")
    fails(
        capfd, train.main, common(base, dataset, tmp_path, overwrite_output_dir=True), "not empty", tmp_path
    )
    fails(capfd, train.main, common(base, dataset, tmp_path / "thesis.txt"), "is a file")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    folder = tmp_path / "folder"
    folder.mkdir()
    png(folder / "a.png")
    (folder / "a.txt").write_text("red")
    out = tmp_path / "folder/../folder/out"
    fails(capfd, train.main, common(base, {"train": [{"data_files": str(folder)}]}, out), "lies in", folder)


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "truncated", "no config", "wrong tokenizer"])
def test_broken_checkpoints(capfd, base, dataset, tmp_path, case):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    file = broken / "model.safetensors"
    state, words = load_file(file), ["transformer.h.1.mlp.w1.weight"]
    if case == "missing":
        del state[words[0]]
    elif case == "extra":
        words = ["transformer.h.9.odd"]
        state[words[0]] = torch.zeros(1)
    elif case == "shape":
        state[words[0]] = torch.zeros(3, 3)
    save_file(state, file)
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        words = ["model.safetensors"]
    elif case == "no config":
        (broken / "config.json").unlink()
        words = ["config.json"]
    elif case == "wrong tokenizer":
        lines = (broken / "qwen.tiktoken").read_text().splitlines()
        (broken / "qwen.tiktoken").write_text("\n".join(lines[:-1]))
        words = ["tokenizer", "image_start_id"]
    fails(capfd, train.main, common(broken, dataset, tmp_path / "out"), *words)


def limited(error, argv):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    sys.stderr = open(error, "w")
    script(train.main, argv)


def test_disk_that_fills_during_a_save(base, dataset, tmp_path):
    """A file size limit stands in for a full disk. The checkpoint before stays good, and the run continues
    from it."""
    out = tmp_path / "out"
    argv = common(base, dataset, out, save_steps=2, max_steps=2)
    assert run(train.main, argv) == 0
    argv = common(base, dataset, out, save_steps=2, max_steps=6)
    codes = exit_codes(start(limited, tmp_path / "err", argv))
    err = (tmp_path / "err").read_text()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert codes == [1] and len(lines) == 1 and "checkpoint-4" in lines[0] and "Traceback" not in err, err
    assert checkpoint.last_checkpoint(out).name == "checkpoint-2"
    assert not list(out.glob("*.tmp"))
    assert run(train.main, argv) == 0
    assert checkpoint.last_checkpoint(out).name == "checkpoint-6"


def test_no_supervised_token_in_a_step(base, dataset, tmp_path, capfd):
    """Cannot come from files, since such samples are dropped before; images that all fail can empty every
    step."""
    folder = tmp_path / "data"
    shutil.copytree(Path(dataset["train"][0]["data_files"]).parent, folder)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    lines = [line for line in (folder / "a.jsonl").read_text().splitlines() if "<img>" in line]
    (folder / "a.jsonl").write_text("\n".join(lines))
    entries = [{"data_files": str(folder / "a.jsonl")}]
    argv = common(base, {"train": entries}, tmp_path / "out", max_bad_samples=1.0, max_steps=3)
    fails(capfd, train.main, argv, "nothing was learned, nothing is saved")


def test_non_finite_loss_names_its_samples(base, dataset, tmp_path, capfd):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    state = load_file(broken / "model.safetensors")
    state["lm_head.weight"][5] = 3e38  # finite; NaN itself is refused when it is loaded
    save_file(state, broken / "model.safetensors")
    fails(capfd, train.main, common(broken, dataset, tmp_path / "out"), "step 1 is nan", "b.json record", "#")


SCRIPTS = [
    (generate.main, ["--image", "gone.png", "--prompt", "what?"], ["gone.png"]),
    (generate.main, [], ["--prompt"]),
    (generate.main, ["--prompt", "x", "--temperature", "-1"], ["temperature"]),
    (generate.main, ["--prompt", "x", "--lora_path", "nowhere"], ["nowhere"]),
    (generate.main, ["--requests", "./b", "--output", "b"], ["output=b is what is read"]),
    (generate.main, ["--prompt", "x", "--model_name_or_path", "nowhere"], ["nowhere"]),
    (evaluate.main, ["--data_files", "nowhere.json"], ["nowhere.json"]),
    (merge.main, ["--lora_path", "nowhere"], ["nowhere"]),
    (
        generate.main,
        ["--prompt", "x", "--device", "cpu", "--use_flash_attention", "true"],
        ["true", "no GPU", "auto"],
    ),
    (
        evaluate.main,
        ["--device", "cpu", "--use_flash_attention", "true"],
        ["use_flash_attention=true", "no GPU"],
    ),
]


@pytest.mark.parametrize(
    "main, argv, words", SCRIPTS, ids=[f"{m.__module__} {' '.join(a)}"[:40] for m, a, _ in SCRIPTS]
)
def test_other_scripts(capfd, base, main, argv, words):
    if (
        main in (generate.main, evaluate.main)
        and "--model_name_or_path" not in argv
        and "--lora_path" not in argv
    ):
        argv = ["--model_name_or_path", str(base), *argv]
    fails(capfd, main, argv, *words)


def test_malformed_request_names_its_line(capfd, base, tmp_path):
    path = write(tmp_path / "r.jsonl", '{"prompt": "hello"}\n{"prompt": ')
    fails(capfd, generate.main, ["--model_name_or_path", str(base), "--requests", path], f"{path}:2")
    assert not os.path.exists(tmp_path / "boxes.png")


# ---- adapters that are trained on


def adapter(base, dataset, out, *options):
    assert run(train.main, [*common(base, dataset, out, max_steps=1, lora=True), *options]) == 0
    return {n.split("base_model.model.")[1] for n in load_file(out / "adapter_model.safetensors")}


@pytest.mark.slow
def test_an_adapter_is_trained_on_as_a_whole(base, dataset, tmp_path, capfd):
    first = adapter(
        base,
        dataset,
        tmp_path / "a",
        "--lora_target_modules",
        '[".*c_attn", ".*w1"]',
        "--freeze_exclude",
        '["lm_head.weight"]',
    )
    assert len(first) == 2 * 4 + 1 and "lm_head.weight" in first
    capfd.readouterr()
    go_on = [*common(base, dataset, tmp_path / "b"), "--lora_path", str(tmp_path / "a")]
    whole = ["--freeze_exclude", '["lm_head.weight"]']
    for options, words in (
        (["--lora"], ["lm_head.weight", "freeze_exclude"]),
        (["--lora", *whole, "--lora_target_modules", '[".*c_attn"]'], ["tensors for transformer.h.0.mlp.w1"]),
        (
            ["--lora", *whole, "--lora_target_modules", '[".*c_attn", ".*w1", ".*w2"]'],
            ["no tensors for", "mlp.w2"],
        ),
        (["--lora", *whole, "--lora_rank", "4"], ["rank 8", "rank 4"]),
        ([], ["lora_path", "--lora"]),
        (["--lora", "--init_from", str(base)], ["init_from", "lora=true"]),
        (
            ["--model", "visualglm", "--model_name_or_path", "samples/tiny_visualglm", "--lora"],
            [f"lora_path={tmp_path / 'a'} adapts transformer.h.", "another model's adapter"],
        ),
    ):
        fails(capfd, train.main, [*go_on, *options], *words)
    assert adapter(base, dataset, tmp_path / "c", "--lora_path", str(tmp_path / "a"), *whole) == first
    other = tmp_path / "other"
    shutil.copytree(base, other)
    state = load_file(other / "model.safetensors")
    state["transformer.h.0.mlp.w1.weight"] += 0.1
    save_file(state, other / "model.safetensors")
    fails(
        capfd,
        train.main,
        [*common(other, dataset, tmp_path / "d"), "--lora", *whole, "--lora_path", str(tmp_path / "a")],
        "trained on other weights",
    )


def test_a_directory_wins_over_a_preset_of_its_name(base, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "visualglm-6b")
    assert run(train.main, common("visualglm-6b", dataset, "out", max_steps=1)) == 0
    assert checkpoint.read_config("out")["hidden_size"] == 128
