"""A run that is started again: the same command, another number of ranks, other settings, other data, after a
kill."""

import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cells import thinned
from ranks import Replaced, exit_codes, run, script, start
from safetensors.torch import load_file
from small import arguments, log_of, losses

import checkpoint
import data
import rates
import train
import vlm
from config import Config
from resume import check_facts, run_facts
from run_dir import RunDir, explained, read_state

LORA = {
    "lora": True,
    "max_steps": None,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
}
LORA |= {"lr_scheduler_type": "linear"}


def steps(out) -> list[int]:
    return [r["step"] for r in log_of(out) if "loss" in r]


def checkpoints(out) -> list[int]:
    return [int(p.name.split("-")[1]) for p in checkpoint.checkpoints(out)]


def state(out, step: int) -> dict:
    return json.loads((Path(out) / f"checkpoint-{step}" / "trainer_state.json").read_text())


@dataclass
class Dying:
    """In place of a function: its process is killed at the n-th call of this start."""

    n: int

    def __call__(self, original, *args, **options):
        self.n -= 1
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)


def killed(argv, update: int, world: int = 1) -> None:
    with pytest.raises(AssertionError, match="-9"):
        run(argv, world, Replaced("train.clip_and_step", Dying(update)))


def refused(argv, capfd, *words, world: int = 1, main=train.main) -> None:
    """One line for each rank."""
    capfd.readouterr()
    with pytest.raises(AssertionError):
        run(argv, world, main)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == world and all(word in line for line in lines for word in words), lines


def files(out) -> dict:
    found = [p for p in Path(out).rglob("*") if p.is_file() and p.name != ".lock" and "index" not in p.parts]
    return {p: p.read_bytes() for p in found}


def same_model(out, reference) -> bool:
    a, b = (load_file(Path(path) / "adapter_model.safetensors") for path in (out, reference))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def units_seen(seen, load, loader, epoch, units):
    with open(seen, "a") as file:
        file.writelines(f"{epoch} {int(n)} {os.getpid()}\n" for unit in units for n in unit)
    return load(loader, epoch, units)


@pytest.mark.parametrize("mixtoken", [False, True])
def test_another_batch_goes_on_at_the_right_sample(base, dataset, tmp_path, mixtoken):
    """Killed behind step 2, continued on two processes with twice the batch, killed again, continued on one:
    no unit of the epoch is lost or repeated, and the learning rate follows the share of the data seen."""
    out, seen = tmp_path / "out", tmp_path / "seen"
    options = {**LORA, "num_train_epochs": 2, "mixtoken": mixtoken, "save_total_limit": 99}
    options |= {"max_length": 64, "per_device_train_batch_size": 2 if mixtoken else 4, "save_steps": 1}
    loads = Replaced("data.TrainLoader.load", partial(units_seen, seen))
    with pytest.raises(AssertionError, match="-9"):
        step = Replaced("train.clip_and_step", Dying(3), main=loads)
        run(arguments(base, dataset, out, **options), main=step)
    position = state(out, 2)
    assert (
        position["facts"]["global_batch"] == options["per_device_train_batch_size"] and position["epoch"] == 0
    )
    done = set(
        seen.read_text().splitlines()[: position["samples"]]
    )  # what the third step had taken is taken again
    seen.write_text("")
    run(arguments(base, dataset, out, **options), world=2, main=loads)
    again = [line.rsplit(" ", 1)[0] for line in seen.read_text().splitlines()]
    taken = sorted([line.rsplit(" ", 1)[0] for line in done] + again)
    assert taken == sorted(f"{epoch} {n}" for epoch in (0, 1) for n in range(40))
    rates = [r["lr"] for r in log_of(out)]
    last = state(out, len(rates))
    assert last["epoch"] == 1 and last["samples"] == 80 and last["total_steps"] == len(rates)
    if not mixtoken:  # 4 + 4 samples, then 8 a step, of 80
        shares = [0, 4, *range(8, 80, 8)]
        assert rates == pytest.approx([1e-2 * (1 - share / 80) for share in shares])


def test_finished_run(base, dataset, tmp_path, capfd):
    """The same command says so and writes nothing; another setting is
    refused by name; a longer one goes on."""
    out = tmp_path / "out"
    run(arguments(base, dataset, out, **LORA))
    before = files(out)
    run(arguments(base, dataset, out, **{**LORA, "num_workers": 1}))
    assert "holds a finished run of 10 steps" in capfd.readouterr().out and files(out) == before
    refused(
        arguments(base, dataset, out, **LORA, weight_decay=0.5), capfd, "weight_decay 0.0 -> 0.5", "overwrite"
    )
    refused(arguments(base, dataset, out, **{**LORA, "num_train_epochs": 0.5}), capfd, "num_train_epochs")
    assert files(out) == before
    run(arguments(base, dataset, out, **{**LORA, "num_train_epochs": 2}))
    assert steps(out) == list(range(1, 21))
    assert json.loads((out / "train_config.json").read_text())["num_train_epochs"] == 2


CHANGES = {
    "seed": {"seed": 7},
    "packed": {"mixtoken": True},
    "lora_alpha": {"lora_alpha": 99},
    "fewer steps": {"max_steps": 1},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "trained whole": {"modules_to_save": ["ln_f"]},
    "few bits": {"quantize": "nf4"},
}


@pytest.mark.parametrize("change", thinned(CHANGES, ["seed", "lora_alpha", "rsLoRA"]))
def test_what_a_step_means_may_not_change(base, dataset, tmp_path, capfd, change):
    out, options = tmp_path / "out", {**LORA, "max_steps": 6}
    killed(arguments(base, dataset, out, **options), 4)
    before = files(out)
    key, value = next(iter(CHANGES[change].items()))
    refused(
        arguments(base, dataset, out, **{**options, **CHANGES[change]}),
        capfd,
        key,
        "checkpoint-2",
        str(value),
    )
    assert files(out) == before


@pytest.mark.parametrize("byte", [-3, "middle", "longer"])
def test_changed_data_is_refused_or_accepted(base, dataset, tmp_path, capfd, byte):
    """By content: a byte anywhere in the file, with its time as it was."""
    file = tmp_path / "a.json"
    records = [{"id": str(i), "conversations": [["what is it?", f"number {i}"]]} for i in range(24)]
    file.write_text(json.dumps(records))
    entries = {"train": [{"name": "chatml_dataset", "data_files": str(file)}]}
    options = {**LORA, "max_steps": 6}
    killed(arguments(base, entries, tmp_path / "out", **options), 4)
    time = file.stat().st_mtime_ns
    text = file.read_text()
    if byte == "longer":
        file.write_text(json.dumps([*records, records[0]]))
    else:
        place = text.index("number 12") if byte == "middle" else text.rindex("number")
        file.write_text(text[:place] + "N" + text[place + 1 :])
    os.utime(file, ns=(time, time))
    key = state(tmp_path / "out", 2)["facts"]["data"]
    refused(
        arguments(base, entries, tmp_path / "out", **options),
        capfd,
        "training data's key",
        key,
        "accept_changed",
    )
    run(arguments(base, entries, tmp_path / "out", **options, accept_changed_data=True))
    assert (
        steps(tmp_path / "out") == [1, 2, 3, 4, 5, 6] and state(tmp_path / "out", 6)["facts"]["data"] != key
    )


def test_a_run_whose_record_is_damaged_goes_on(tmp_path):
    """run.json lost, or without keys: checkpoints say whose they are. A name that is no step's is none."""
    cfg, last = Config(output_dir=str(tmp_path)), tmp_path / "checkpoint-2"
    last.mkdir()
    (last / "trainer_state.json").write_text('{"step": 2, "run": "abc"}')
    (tmp_path / "checkpoint-03").symlink_to(last)
    checkpoint.write_json(tmp_path / "train_config.json", asdict(cfg))
    start = RunDir(cfg).decide()
    assert (start.id, start.resume, start.anew) == ("abc", str(last), False)
    whole = {"id": "abc", "settings": asdict(cfg), "request": {}, "lineage": [], "finished": None}
    for key in ("id", "finished"):
        checkpoint.write_json(tmp_path / "run.json", {k: v for k, v in whole.items() if k != key})
        assert RunDir(cfg).decide().resume == str(last)
    (tmp_path / "checkpoint-3").symlink_to(last)
    with pytest.raises(ValueError, match="step is 2, the directory is checkpoint-3"):
        read_state(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="scaler: good is None"):
        rates.LossScaler(True).load({"scale": 1.0})


def test_what_torch_cannot_compile_is_one_line(tmp_path):
    """A kill may leave half a library in torch's cache, where every later start would find it."""
    said = type("InductorError", (RuntimeError,), {})(
        "ImportError: /tmp/torchinductor_me/x.so: file too short"
    )
    clear = explained(said, Config(output_dir=str(tmp_path), compile=True))
    assert isinstance(clear, ValueError) and "/tmp/torchinductor_me/x.so" in str(clear), clear


VOCABULARIES = [  # a model, its vocabulary's file, two of its tokens
    ("qwen_vl", "qwen.tiktoken", "IHRoaXM= ", "IG9m "),
    ("visualglm", "tokenizer.json", '"答"', '"▁问:"'),
    ("blip2", "vocab.json", '"!"', '"#"'),
]


@pytest.mark.parametrize("model, file, one, other", VOCABULARIES)
def test_another_config_or_vocabulary_of_the_base_is_refused(tmp_path, model, file, one, other):
    """Its weights may be equal: the next step would be another model's all the same."""
    shutil.copytree(data.ROOT / f"samples/tiny_{model}", tmp_path, dirs_exist_ok=True)
    plan, cfg = SimpleNamespace(index=data.Index([], np.zeros((0, 7)), [])), Config()

    def facts() -> dict:
        definition, processor = vlm.find(checkpoint.read_config(tmp_path)), data.load_processor(tmp_path)
        plans = {"data": plan, "eval_data": None, "probe_data": None}
        return run_facts(cfg, definition, tmp_path, processor, plans, 1, 1)

    config, text, before = (tmp_path / "config.json").read_text(), (tmp_path / file).read_text(), facts()

    def configured(**keys) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), **keys}))

    configured(torch_dtype="float32", transformers_version="5")
    assert facts() == before
    configured(initializer_range=0.5)
    with pytest.raises(ValueError, match="config.json and vocabulary is"):
        check_facts(facts(), {"facts": before}, cfg, "checkpoint-2")
    configured()
    assert one in text and other in text
    (tmp_path / file).write_text(text.replace(one, "\0", 1).replace(other, one, 1).replace("\0", other, 1))
    with pytest.raises(ValueError, match="config.json and vocabulary is"):
        check_facts(facts(), {"facts": before}, cfg, "checkpoint-2")


@pytest.mark.parametrize("how", thinned(["overwrite", "elsewhere", "rollback"], ["rollback"]))
def test_a_restart_of_the_same_command_goes_on(base, dataset, tmp_path, capfd, how):
    """Whatever the first start was told: to overwrite, or to begin from a checkpoint of another or of the
    same run."""
    first, options = (
        tmp_path / "first",
        {**LORA, "max_steps": 10, "save_total_limit": 2 if how == "rollback" else 99},
    )
    run(arguments(base, dataset, first, **{**options, "save_total_limit": 99}))
    out = tmp_path / "second" if how == "elsewhere" else first
    more = {"learning_rate": 5e-3}
    given = {"overwrite_output_dir": True} if how == "overwrite" else {}
    given = given or {"resume_from_checkpoint": str(first / "checkpoint-4")}
    argv, begin = (
        arguments(base, dataset, out, **{**options, **more}, **given),
        0 if how == "overwrite" else 4,
    )
    old = files(first)
    kept = shutil.copytree(first / "checkpoint-4", tmp_path / "kept" / "checkpoint-4")
    killed(argv, 2)  # before its first checkpoint: everything of the earlier run is there
    said = "warning: continuing with other settings than the run began with: learning_rate"
    assert (said in capfd.readouterr().err) == (how != "overwrite")
    assert out != first or {p: b for p, b in files(first).items() if p in old} == old
    killed(argv, 4)
    assert (
        checkpoints(out) == {"overwrite": [2], "elsewhere": [6], "rollback": [4, 6]}[how]
    )  # no abandoned ones
    assert how != "overwrite" or not (out / "adapter_model.safetensors").exists()
    killed(argv, 4)
    run(argv)
    assert steps(out)[-10 + begin :] == list(range(begin + 1, 11))
    whole = tmp_path / "whole"  # the same without a kill
    if how == "overwrite":
        run(arguments(base, dataset, whole, **{**options, **more}))
    else:
        given = {"resume_from_checkpoint": str(kept)}
        run(arguments(base, dataset, tmp_path / "third", **{**options, **more}, **given))
        whole = tmp_path / "third"
    assert losses(out)[-10 + begin :] == losses(whole) and same_model(out, whole)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(
        json.dumps({**record, "finished": None})
    )  # killed before it says that it is finished
    run(argv)
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.next")) and same_model(out, whole)
    id = json.loads((out / "run.json").read_text())["id"]
    run(argv)  # finished: with overwrite a new run, else no run
    assert (json.loads((out / "run.json").read_text())["id"] != id) == (how == "overwrite")


def test_a_mistake_of_an_overwriting_command_costs_nothing(base, dataset, tmp_path, capfd):
    out = tmp_path / "out"
    run(arguments(base, dataset, out, **LORA))
    before = files(out)
    wrong = {"freeze_include": ["*vsual*"]}, {"stage": "pretrain2"}, {"report_to": ["wandb"]}
    for options in (*wrong, {"evaluation_strategy": "steps", "metric_for_best_model": "eval_cider"}):
        refused(arguments(base, dataset, out, **{**LORA, **options}, overwrite_output_dir=True), capfd)
        assert files(out) == before, options


def test_saved_before_it_is_evaluated(base, dataset, tmp_path):
    """A kill in the evaluation costs only that: it is taken again, and the log and the best step are as
    without."""
    options = {**LORA, "max_steps": 6, "evaluation_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True}
    run(arguments(base, dataset, tmp_path / "whole", **options))

    argv = arguments(base, dataset, tmp_path / "out", **options)
    with pytest.raises(AssertionError, match="-9"):
        run(argv, main=Replaced("train.evaluate_loss", Dying(2)))
    assert checkpoints(tmp_path / "out")[-1] == 4 and not state(tmp_path / "out", 4)["evaluated"]
    run(argv)
    keys = ("step", "loss", "eval_loss")
    a, b = ([{k: r[k] for k in keys if k in r} for r in log_of(tmp_path / name)] for name in ("out", "whole"))
    assert a == b and same_model(tmp_path / "out", tmp_path / "whole")


def signalled(*_args, **_options):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the evaluation went on")


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_signal_breaks_off_an_evaluation(base, dataset, tmp_path, capfd, strategy):
    options = {
        **LORA,
        "evaluation_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 4,
        "save_strategy": strategy,
    }
    with pytest.raises(AssertionError, match="143"):
        argv = arguments(base, dataset, tmp_path / "out", **options)
        run(argv, main=Replaced("train.evaluate_loss", signalled))
    text = capfd.readouterr().out
    if strategy == "no":
        assert "nothing is saved (save_strategy=no)" in text and not checkpoints(tmp_path / "out")
    else:
        assert "checkpoint-3 is saved" in text and checkpoints(tmp_path / "out") == [3]


def with_a_second_run(argv, original, *args, **options):
    assert exit_codes(start(script, train.main, argv)) == [1]
    return original(*args, **options)


def test_one_run_at_a_time(base, dataset, tmp_path, capfd):
    """The second one says who has the directory; a dead holder has nothing."""
    out = tmp_path / "out"

    argv = arguments(base, dataset, out, **{**LORA, "max_steps": 2})
    run(argv, main=Replaced("train.clip_and_step", partial(with_a_second_run, argv)))
    assert f"error: output_dir={out} is in use by process " in capfd.readouterr().err
    assert steps(out) == [1, 2] and not (out / ".lock").exists()


def test_features_of_another_tower_are_made_again(base, dataset, tmp_path, capfd):
    """In the same place, or behind init_from; damaged ones too. A bad picture is left out, not trained as
    zeros."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    options = {**LORA, "lora": False, "freeze_include": ["*visual*"], "max_steps": 1, "save_strategy": "no"}

    def loss(cached: bool, **more):
        run(arguments(model, dataset, tmp_path / "out", **options, cache_image_features=cached, **more))
        assert "nothing is saved (save_strategy=no)" in capfd.readouterr().out
        return losses(tmp_path / "out")[-1]

    assert loss(True) == loss(False)
    weights = checkpoint.open_weights(base)
    tensors = {n: weights.read(n) * (0.3 if "visual" in n and "weight" in n else 1) for n in weights.names}
    checkpoint.save_weights(model, tensors.items())
    changed = loss(False)
    assert loss(True, overwrite_output_dir=True) == changed
    (file,) = (tmp_path / "out" / "index").glob("features-*.f32")
    for damaged in (file.read_bytes()[:-100], b"", bytes(file.stat().st_size)):
        file.write_bytes(damaged)
        assert loss(True, overwrite_output_dir=True) == changed
    assert loss(True, init_from=str(base), output_dir=str(tmp_path / "out")) != changed
    refused(
        arguments(model, dataset, tmp_path / "out", **options, cache_image_features=True, image_jitter=0.1),
        capfd,
        "image_jitter",
        "cache_image_features",
    )


def fewer_rows(build_index, *args, **options):
    index = build_index(*args, **options)
    if os.environ["RANK"] == "1":
        index.rows = index.rows[:30]
    return index


def test_ranks_compare_what_they_read(base, dataset, tmp_path, capfd):
    argv = arguments(base, dataset, tmp_path / "out", **LORA)
    main = Replaced("data.build_index", fewer_rows)
    refused(argv, capfd, "samples", "40", "30", world=2, main=main)


def test_loss_scale_continues_with_its_counters():
    scaler, other = train.LossScaler(True), train.LossScaler(True)
    for finite in [False] + [True] * 1999:
        scaler.update(finite)
    other.load(json.loads(json.dumps(scaler.state())))
    scaler.update(True)
    other.update(True)
    assert scaler.state() == other.state() and scaler.scale == 2.0**16


def ruined(clip_and_step, parameters, *args, **options):
    norm = clip_and_step(parameters, *args, **options)
    with torch.no_grad():
        next(iter(parameters.values())).fill_(float("nan"))
    return norm


def test_nothing_that_is_not_finite_is_published(base, dataset, tmp_path, capfd):
    """The update behind the last finite loss may have ruined the parameters."""
    with pytest.raises(AssertionError):
        argv = arguments(base, dataset, tmp_path / "out", **{**LORA, "max_steps": 1})
        run(argv, main=Replaced("train.clip_and_step", ruined))
    assert "the last checkpoint stands" in capfd.readouterr().err and not checkpoints(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "wrong", [{"bad": None}, {"samples": None}, {"since_best": -1}, {"step": None}, {"bad": "0"}]
)
def test_a_state_that_no_run_wrote_is_refused(tmp_path, wrong):
    """By its key, not behind the start; keys of today are missing in states of before."""
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    path.parent.mkdir()
    path.write_text('{"step": 3}')
    assert read_state(path.parent) == {"step": 3}
    path.write_text(json.dumps({"step": 3, "bad": 0, "samples": 6, "since_best": 0} | wrong))
    with pytest.raises(ValueError, match=f"trainer_state.json: {next(iter(wrong))}"):
        read_state(path.parent)
