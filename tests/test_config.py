"""Configurations that are wrong: each kind with every key it can happen to, and the line that names it."""

import json
import math
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import exit_codes, script, start

import config
import data as loading
import resume
import train

HINTS = typing.get_type_hints(config.Config)
FIELDS = {f.name: f for f in config.fields(config.Config)}
NUMBERS = [name for name in FIELDS if {int, float} & set(config.options_of(HINTS[name]))]
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    "",
    " ",
    "5",
    "nan",
    "\0",
    "\ud800",
    "x" * 300,
    "é" * 200,
    [],
    [1],
    [None],
    [[]],
    [""],
    {},
    {"a": 1},
    [[[[]]]],
    {"train": None},
    {"train": [[]]},
    {"train": [{"data_files": 5}]},
    {"eval": []},
]


def parsed(tmp_path, value, name="c.json"):
    text = value if isinstance(value, str) else json.dumps(value)
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return config.parse_config([str(tmp_path / name)])


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e400", "-2", "1e30", "1" + "0" * 400, "true"]
)
def test_absurd_numbers_are_refused_by_key(tmp_path, name, text):
    with pytest.raises(ValueError, match=f"{name}=.*expected") as error:
        parsed(tmp_path, f'{{"{name}": {text}}}')
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=name):
        config.parse_config([f"--{name}", text])


@pytest.mark.parametrize("name", FIELDS)
def test_odd_values_are_refused_or_have_the_keys_type(tmp_path, name):
    refused = 0
    for value in ODD:
        try:
            got = getattr(parsed(tmp_path, {name: value}), name)
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e) and len(str(e)) < 400, (value, e)
            continue
        kinds = tuple(typing.get_origin(k) or k for k in config.options_of(HINTS[name]))
        assert isinstance(got, kinds) and not (isinstance(got, float) and not math.isfinite(got)), (
            value,
            got,
        )
        assert isinstance(got, bool) <= (bool in kinds), (value, got)
    assert refused >= len(ODD) / 2


ENTRY = {"data_files": "x.jsonl"}
CASES = [  # a file's text, and what its line says
    ('{"lora": true, "lora": false}', "key 'lora' twice"),
    ("", "not valid JSON"),
    ("[]", "--dataset"),
    ("5", "holds 5"),
    ("[" * 100_000, "nested too deeply"),
    ('{"max_steps": ' + "9" * 5000 + "}", "thousands of digits"),
    ('{"lr": 1}', "unknown key 'lr'; --help"),
    ('{"bach_size": 1}', "unknown key 'bach_size'; --help"),
    ('{"learning_rat": 1}', "did you mean 'learning_rate'"),
    ('{"": 1}', "unknown key ''"),
    ('{"bf16": true, "precision": "fp32"}', "precision=fp32 and bf16=true contradict"),
    ('{"save": "sometimes"}', "save='sometimes'; expected one of"),
    ('{"save": 0}', "save=0; expected 1 to"),
    ('{"eta_min": 1, "learning_rate": 0.1}', "eta_min=1.0 is above learning_rate"),
    ('{"do_train": false}', "nothing to do"),
    ('{"eval_split": 0.5, "do_eval": true}', "eval_split=0.5"),
    ('{"report_to": "mlflow"}', "report_to='mlflow'; expected one of"),
    ('{"lr_scheduler_name": []}', "lr_scheduler_name="),
    ('{"lr_scheduler_name": "CosineDecayWithWarmup", "lr_scheduler_type": "linear"}', "contradict"),
    *(
        (json.dumps({"dataset": {"train": [{**ENTRY, **more}]}}), f"dataset.train[0].{key}")
        for more, key in [
            ({"weight": math.nan}, "weight"),
            ({"weight": True}, "weight"),
            ({"weight": "1"}, "weight"),
            ({"weight": -1}, "weight"),
            ({"max_samples": 0}, "max_samples"),
            ({"max_samples": True}, "max_samples"),
            ({"max_samples": 1e30}, "max_samples"),
            ({"splits": 5}, "splits"),
            ({"splits": [[]]}, "splits"),
            ({"name": ["coco_vqa"]}, "name"),
            ({"image_root": ["x"]}, "image_root"),
            ({"chat_template": 5}, "chat_template"),
            ({"data_files": [None]}, "data_files"),
            ({"data_files": []}, "data_files"),
        ]
    ),
    (
        json.dumps({"dataset": {"train": [{**ENTRY, "data_file": 1}]}}),
        "'data_file'; did you mean 'data_files'",
    ),
    (json.dumps({"dataset": {"train": [5]}}), "dataset.train[0] is 5"),
    ('{"dataset": {"trian": []}}', "'trian'"),
]


@pytest.mark.parametrize("text, words", CASES, ids=[words for _, words in CASES])
def test_files_that_are_wrong(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        parsed(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--"], "'--' is no key"),
        (["--=5"], "is no key"),
        (["-lora"], "'-lora' is no key"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--learning_rate", "--lora"], "--learning_rate needs a value"),
        (["--output_dir="], "--output_dir= has no value"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--max_steps", "1", "--max_steps", "x"], "max_steps='x'"),
        (["--max_steps", "0x10"], "max_steps='0x10'"),
        (["--max_steps", "1_0"], "max_steps='1_0'"),
        (["--learning_rate", "nan"], "learning_rate='nan'"),
        (["--freeze_include", "[1]"], "freeze_include holds 1"),
        (["--freeze_include", "[1"], "--freeze_include:1: not valid"),
        (["--dataset", "{"], "--dataset:1: not valid JSON"),
        (["--resume", "true"], "resume=true; expected auto, no"),
        (["--neftune", "5"], "neftune='5'; expected true or false"),
        (["gone.json"], "gone.json does not exist"),
        (["samples"], "samples is a directory"),
        (["/dev/zero"], "/dev/zero is no file"),
        (["samples/flags_zh/train.jsonl"], "give it as --dataset samples/flags_zh/train.jsonl"),
    ],
)
def test_command_lines_that_are_wrong(argv, words):
    with pytest.raises(ValueError) as error:
        config.parse_config(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_right_stays_accepted(tmp_path, capsys):
    """A later source wins, also over the older words for the same; numbers may be written as JSON does."""
    (tmp_path / "c.json").write_text(
        '\ufeff{"bf16": true, "fp16_opt_level": "O2", "prefix_x": 1, "max_steps": null}'
    )
    cfg = config.parse_config(
        [str(tmp_path / "c.json"), "--precision", "fp32", "--max_steps", "1e1", "--lora"]
    )
    assert (cfg.bf16, cfg.fp16, cfg.fp16_opt_level, cfg.max_steps, cfg.lora) == (False, False, "O1", 10, True)
    assert "warning: prefix_x has no effect here" in capsys.readouterr().err
    cfg = config.parse_config(
        ["--tensor_parallel_degree", "-1", "--model", "none", "--report_to", "none", "--seed=0"]
    )
    assert (cfg.tensor_parallel_degree, cfg.model or "qwen_vl", cfg.seed) == (-1, "qwen_vl", 0)
    assert parsed(tmp_path, {"use_flash_attention": "true"}).use_flash_attention is True
    for neftune, said, alpha in (
        (True, {}, 5),
        (True, {"neftune_noise_alpha": 8}, 8),
        (False, {"neftune_noise_alpha": 8}, 0),
    ):
        for text in ({"neftune": neftune, **said}, {**said, "neftune": neftune}):
            assert parsed(tmp_path, text).neftune_noise_alpha == alpha


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--lora_rank", "4", "--stage", "sft", "--lora", "false"],
            "without lora=true there is no effect of lora_rank",
        ),
        (["--sharding_parallel_degree", "2"], "without sharding"),
        (["--max_images", "2"], "without mixtoken=true there is no effect of max_images"),
        (
            ["--eval_with_do_generation", "--dataset", "samples/flags_en/val.jsonl"],
            "without an evaluation there is no effect of eval_with_do_generation",
        ),
        (["--learning_rate", "0"], "nothing is learned"),
        (["--warmup_ratio", "1", "--dataset", "samples/flags_en/val.jsonl"], "rises until the end"),
        (["--max_steps", "9", "--warmup_steps", "9"], "warmup_steps=9"),
        (["--save_strategy", "epoch", "--save_steps", "9"], "save_strategy=steps there is no effect"),
    ],
)
def test_keys_without_effect_are_named(capsys, argv, words):
    config.parse_config(argv)
    assert words in capsys.readouterr().err


def test_shipped_files_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config.parse_config(["configs/blip2/samples_pretrain2.json"])
    files = [entry["data_files"] for entry in cfg.dataset["train"]] + [f"{cfg.init_from}/config.json"]
    files = [file for one in files for file in ([one] if isinstance(one, str) else one)]
    assert len(files) > 1 and all(file.startswith(str(config.data.ROOT)) for file in files)
    assert all((config.data.ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("given", [{"eval_split": 0.3}, {"eval": True}, {"eval": False}])
def test_unused_evaluation_data_are_said(base, dataset, tmp_path, capfd, given):
    """Held back by eval_split, in entries, or in a file that is not there."""
    data = {"train": dataset["train"]}
    if "eval" in given:
        data["eval"] = dataset["eval"] if given["eval"] else [{"data_files": str(tmp_path / "nope.jsonl")}]
    argv = [
        "--model_name_or_path",
        str(base),
        "--dataset",
        json.dumps(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    argv += ["--max_steps", "1", "--num_workers", "0", "--max_length", "128"]
    argv += ["--eval_split", "0.3"] if "eval_split" in given else []
    expected = 1 if given.get("eval") is False else 0
    codes = exit_codes(start(script, train.main, argv))
    err = capfd.readouterr().err
    assert codes == [expected], err
    assert ("nope.jsonl" if expected else "are not evaluated in this run") in err


def test_evaluation_on_what_is_trained_on_is_said(base, dataset, tmp_path, capfd):
    """By content, under whatever name; not of two shares of one file."""
    entry = dataset["train"][0]
    copied = {**entry, "data_files": str(shutil.copy(entry["data_files"], tmp_path / "other.jsonl"))}
    copied["image_root"] = str(Path(entry["data_files"]).parent)
    data = {"train": [entry], "eval": [*dataset["eval"], copied]}
    argv = ["--model_name_or_path", base, "--output_dir", tmp_path / "out", "--do_eval", "true"]
    argv += ["--max_steps", "1", "--num_workers", "0", "--max_length", "128", "--dataset", json.dumps(data)]
    assert exit_codes(start(script, train.main, [str(word) for word in argv])) == [0]
    err = capfd.readouterr().err
    assert err.count("is trained on too") == 1 and "other.jsonl) is trained on too" in err
    index = {
        split: SimpleNamespace(entries=loading.open_entries(entries))
        for split, entries in loading.hold_out({"train": [entry]}, 0.5).items()
    }
    resume.say_shared(*(SimpleNamespace(index=index[split]) for split in ("train", "eval")))
    assert "trained on" not in capfd.readouterr().err


def test_a_directory_is_no_chat_template(tmp_path):
    with pytest.raises(ValueError, match="chat_template=.* is a directory"):
        loading.read_system(str(tmp_path))
