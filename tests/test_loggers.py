"""report_to: the real TensorBoard where it is installed; the others by modules that note what is called."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from cells import slow
from ranks import run
from small import arguments, log_of

import loggers
import train

STAND_IN = """
import json, os
class Run:
    def note(self, *what):
        with open(os.environ["NOTED"], "a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, numbers, step):
        self.note("log", step, numbers)
    def finish(self):
        self.note("finish")
def init(project, config, resume, {more}):
    Run().note("init", {{"project": project, "resume": resume, "lora": config["lora"], {given}}})
    return Run()
"""
ARGUMENTS = {  # as the packages' documentation has them
    "wandb": ("name", "id", "dir"),
    "trackio": ("name",),
    "swanlab": ("experiment_name", "id", "logdir"),
}


def options(base, dataset, out, name, **more):
    short = {"max_steps": 3, "save_steps": 2, "evaluation_strategy": "steps", "report_to": name, **more}
    return arguments(base, dataset, out, **short)


@pytest.mark.parametrize("name", ["wandb", slow("trackio"), slow("swanlab")])
def test_what_others_are_told(base, dataset, tmp_path, monkeypatch, name):
    given = ARGUMENTS[name]
    text = STAND_IN.format(more=", ".join(given), given=", ".join(f'"{g}": {g}' for g in given))
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert train.main(options(base, dataset, tmp_path / "out", name)) == 0
    monkeypatch.delitem(sys.modules, name)
    assert train.main(options(base, dataset, tmp_path / "out", name, max_steps=4)) == 0  # continued
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    (_, first), (_, second) = (n for n in noted if n[0] == "init")
    assert first == second and first["lora"] is False and first["resume"] == "allow"  # one log for the run
    assert len(first.get("id", "x" * 21)) in (12, 21) and (name != "swanlab" or len(first["id"]) == 21)
    logged = [(n[1], n[2]) for n in noted if n[0] == "log"]
    steps = [step for step, numbers in logged if "loss" in numbers]
    assert steps == [1, 2, 3, 4] and [n for n in noted if n[0] == "finish"] == [["finish"]] * 2
    assert [step for step, numbers in logged if "eval_loss" in numbers] == [2, 4]
    assert all(isinstance(v, int | float) for _, numbers in logged for v in numbers.values())
    names = {key for _, numbers in logged for key in numbers}
    assert {"lr", "grad_norm", "loss/chatml_dataset:a", "loss/chatml_dataset:b", "eval_loss"} <= names
    log = log_of(tmp_path / "out")
    assert {r["step"]: r["loss"] for r in log if "loss" in r} == {
        s: n["loss"] for s, n in logged if "loss" in n
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself(base, dataset, tmp_path):
    argv = options(base, dataset, tmp_path / "out", "tensorboard")
    run([*argv, "--save_steps", "2", "--max_steps", "3"])
    shutil.rmtree(tmp_path / "out/checkpoint-3")  # its third step comes again, behind step 2
    (tmp_path / "out/model.safetensors").unlink()
    run([*argv, "--save_steps", "2", "--max_steps", "4"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out")).Reload()
    log = log_of(tmp_path / "out")
    losses = [(r["step"], r["loss"]) for r in log if "loss" in r]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == losses
    assert [e.step for e in events.Scalars("eval_loss")] == [2, 4]


def test_mistakes_come_before_anything_is_loaded(base, dataset, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for name in loggers.PACKAGES:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a, name=name: None if n == name else find(n, *a)
        )
        with pytest.raises(ValueError, match=f"report_to: {name} is not installed; pip install {name}"):
            train.main(options(base, dataset, Path(tmp_path / "out"), name))
    with pytest.raises(ValueError, match="report_to='wandbb'; expected one of .*wandb"):
        train.main(options(base, dataset, tmp_path / "out", "wandbb"))
    with pytest.raises(ValueError, match="none and others"):
        loggers.check(["none", "tensorboard"])
    assert not (tmp_path / "out").exists()
