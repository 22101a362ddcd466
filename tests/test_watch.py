"""Early stopping, answers while training, the probe set, comparing runs: alone, on ranks, after restarts."""

import importlib.util
import json
import os
import re
import signal
import types
from pathlib import Path

import pytest
from ranks import Replaced, run
from small import arguments, assert_same_run, log_of, losses

import run_dir
import train
from config import Config
from runs import compare

ROOT = Path(__file__).resolve().parent.parent


def state(out, step: int) -> dict:
    return json.loads((Path(out) / f"checkpoint-{step}/trainer_state.json").read_text())


class Scores:
    """Evaluations give these losses, one after the other; the last one stays."""

    def __init__(self, *values: float):
        self.values = list(values)

    def __call__(self, original, run, plan):
        if self.values == [None]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"eval_loss": self.values.pop(0) if len(self.values) > 1 else self.values[0]}


def patient(base, dataset, out, scores, patience=2, world=1, **options):
    options = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "evaluation_strategy": "steps", **options}
    argv = arguments(base, dataset, out, **{"early_stopping_patience": patience, **options})
    run(argv, main=Replaced("train.evaluate_loss", Scores(*scores)), world=world)


def test_patience_ends_the_run_where_it_is_used_up(base, dataset, tmp_path, capfd):
    out = tmp_path / "out"
    best = {"load_best_model_at_end": True, "save_total_limit": 1}
    patient(base, dataset, out, [3.0, 2.0, 2.5, float("nan"), 1.0], **best)
    said = capfd.readouterr().out
    assert (
        "early stopping after step 8 of 12: eval_loss 2.0000 of step 4 is the best, and 2 evaluations" in said
    )
    assert len(losses(out)) == 8 and state(out, 8)["since_best"] == 2 and state(out, 8)["best_step"] == 4
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    published, best = ((out / folder / "model.safetensors").read_bytes() for folder in (".", "checkpoint-4"))
    assert published == best and "best model:" in said
    # the same command has nothing to do; with more patience it goes on where it stopped
    patient(base, dataset, out, [9.0], load_best_model_at_end=True, save_total_limit=1)
    assert "holds a finished run of 8 steps" in capfd.readouterr().out
    patient(base, dataset, out, [2.5, 2.6], 4, load_best_model_at_end=True, save_total_limit=1)
    assert len(losses(out)) == 12 and state(out, 12)["since_best"] == 4


@pytest.mark.slow
def test_what_a_continued_run_cannot_compare_is_chosen_and_measured_anew(base, dataset, tmp_path, capfd):
    out, keys = tmp_path / "out", {"evaluation_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    probed = {**dataset, "probe": dataset["eval"]}
    run(arguments(base, probed, out, **keys, max_steps=2))
    keys |= {"eval_with_do_generation": True, "metric_for_best_model": "eval_accuracy"}
    run(arguments(base, probed, out, **keys, max_steps=4))
    assert state(out, 4)["best_step"] == 4 and 0 <= state(out, 4)["best_metric"] <= 1
    assert "by eval_accuracy instead of eval_loss" in capfd.readouterr().out
    ended = log_of(out)[-1].keys()
    assert {"probe_after_accuracy", "probe_drop_loss"} <= ended and "probe_drop_accuracy" not in ended
    other = {**dataset, "probe": dataset["train"]}
    run(arguments(base, other, out, **keys, max_steps=6, accept_changed_data=True))
    assert "probe after step 4, the first time | loss" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("saves", [2, 3])
def test_the_count_survives_a_restart(base, dataset, tmp_path, saves):
    """After kill -9, on two ranks; also where a checkpoint is not of an evaluation's step: that evaluation
    comes again."""
    once, again = tmp_path / "once", tmp_path / "again"
    options = {"save_steps": saves, "per_device_train_batch_size": 2}
    patient(base, dataset, once, [3.0, 2.0, 2.5, 2.4, 1.0], **options)
    with pytest.raises(AssertionError, match="-9"):
        patient(base, dataset, again, [3.0, 2.0, 2.5, None], **options)
    assert len(losses(again)) == 8
    options |= {"per_device_train_batch_size": 1, "sharding": "stage2"}
    patient(base, dataset, again, [2.5, 2.4, 1.0][saves == 2 :], world=2, **options)
    assert state(again, 8)["since_best"] == 2
    assert losses(again) == pytest.approx(losses(once), abs=1e-5) and len(losses(once)) == 8


def test_what_patience_needs_is_said(base, dataset, tmp_path):
    for options, said in (
        (
            {"early_stopping_patience": 2},
            "early_stopping_patience=2 counts evaluations, and evaluation_strategy=no",
        ),
        ({"early_stopping_patience": 0}, "expected 1 to"),
        (
            {"sample_steps": 2, "dataset": {"train": dataset["train"]}},
            "no 'eval' entry, which sample_steps=2 needs",
        ),
        (
            {"sample_steps": 2, "pipeline_parallel_degree": 2, "gradient_accumulation_steps": 2},
            "sample_steps=2 needs the whole model on a rank, pipeline_parallel_degree=2",
        ),
        ({"dataset": {**dataset, "prob": []}}, "dataset has the key 'prob'; expected train, eval and probe"),
    ):
        options = {"dataset": dataset, **options}
        argv = arguments(base, options.pop("dataset"), tmp_path / "out", **options)
        with pytest.raises(ValueError, match=said):
            train.main(argv)


WATCHED = {"sample_steps": 2, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}


def watched(base, dataset, out, world=1, batch=2, **options):
    probed = {**dataset, "probe": dataset["eval"]}
    options = {**WATCHED, "per_device_train_batch_size": batch, **options}
    run(arguments(base, probed, out, **options), world=world)
    return [r["samples"] for r in log_of(out) if "samples" in r], [
        r for r in log_of(out) if "probe_drop_loss" in r
    ]


def test_answers_and_probe_are_equal_on_ranks_and_after_a_restart(base, dataset, tmp_path, capfd):
    answers, (probe,) = watched(base, dataset, tmp_path / "one")
    said = capfd.readouterr().out
    assert len(answers) == 2 and all(len(some) == 4 for some in answers)
    assert (
        said.count("sample | ") == 8
        and "probe before training | loss" in said
        and "probe | loss better by" in said
    )
    assert probe["probe_drop_loss"] == pytest.approx(probe["probe_after_loss"] - probe["probe_before_loss"])
    assert answers[0][0].keys() == {"where", "question", "answer", "reference"}
    watched(base, dataset, tmp_path / "again", max_steps=2)
    for name, options in (("again", {}), ("two", {"world": 2, "batch": 1, "sharding": "stage2"})):
        found, (other,) = watched(base, dataset, tmp_path / name, **options)
        assert found == answers, name
        for key in ("probe_before_loss", "probe_after_loss"):
            assert other[key] == pytest.approx(probe[key], abs=1e-5), name
    assert_same_run(tmp_path / "again", tmp_path / "one", 1e-6, 1e-6)
    run(
        arguments(
            base,
            dataset,
            tmp_path / "off",
            **{**WATCHED, "sample_steps": None},
            per_device_train_batch_size=2,
        )
    )
    assert_same_run(tmp_path / "off", tmp_path / "one", 1e-6, 1e-6)  # looking on changes nothing


def test_runs_side_by_side(base, dataset, tmp_path, capsys):
    """A finished run, and one whose last line is half written."""
    a, b = tmp_path / "a", tmp_path / "b"
    for out, rate, value in ((a, 1e-2, [2.0, 1.5]), (b, 1e-3, [2.5, 2.6])):
        options = {"max_steps": 4, "learning_rate": rate, "early_stopping_patience": 3}
        patient(base, dataset, out, value, **options)
    last = [f"{losses(out)[-1]:.4f}" for out in (a, b)]
    with open(b / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert compare.main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in said.splitlines() if line}
    assert rows["learning_rate"] == ["0.01", "0.001"] and "output_dir" not in rows and "seed" not in rows
    assert rows["last loss"] == last and rows["steps"] == ["4", "4"]
    assert re.search(r"best eval_loss +1\.5000 \(step 4\) +2\.5000 \(step 2\)", said)
    if importlib.util.find_spec("matplotlib"):
        assert compare.main([str(a), str(b), "--picture", str(tmp_path / "c.png")]) == 0
        assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    bad = tmp_path / "bad"
    bad.mkdir()
    for config, lines, words in (
        ("", "", "bad/train_config.json: not valid JSON"),
        ("[]", "", "bad/train_config.json holds []"),
        ("\ud800", "", "bad/train_config.json is no text"),
        ("{}", "5\n{}\n", "log.jsonl:1 holds 5"),
        ("{}", '{"step": 1, "loss": null, "tokens_per_s": 3}\n{}\n', "log.jsonl:1: loss is None"),
        ("{}", '{"step": 1, "loss": 2.0}\n{}\n', "log.jsonl:1: tokens_per_s is None"),
        ("{}", '{"step": 1, "lo\n{"step": 2}\n', "log.jsonl:1: not valid JSON"),
        ("{}", '{"step": 1, "eval_x": "0.5"}\n{}\n', "log.jsonl:1: eval_x is '0.5'"),
        ("{}", '{"step": 1, "eval_x": 1' + 400 * "0" + "}\n{}\n", "log.jsonl:1: eval_x is 1000"),
        (None, "", "is no run"),
    ):
        (bad / "train_config.json").write_bytes((config or "").encode(errors="surrogatepass"))
        (bad / "log.jsonl").write_text(lines)
        if config is None:
            (bad / "train_config.json").unlink()
        capsys.readouterr()
        assert compare.main([str(a), str(bad)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error


def test_settings_that_differ_far_behind_are_shown(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        dataset = {"train": [{"data_files": "d" * 200 + name, "image_root": "e" * 200}]}
        (tmp_path / name / "train_config.json").write_text(json.dumps({"dataset": dataset, "seed": 0}))
    assert compare.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("dataset"))
    assert "done" in row and "dtwo" in row and len(row) < 160


def test_an_evaluation_is_not_written_behind_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3}\n{"step": 4, "lo')
    where = types.SimpleNamespace(path=tmp_path, log_path=lambda: path, start=types.SimpleNamespace(id="a"))
    log_file = run_dir.Log(Config(do_train=False, do_eval=True), where, 3, 3, True)
    log_file.write({"step": 3, "eval_loss": 1.0})
    log_file.close()
    assert log_of(tmp_path) == [{"step": 3}, {"step": 3, "eval_loss": 1.0}]
