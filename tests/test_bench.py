"""bench.py: each command runs at its smallest, and refuses to report what computes something else."""

import json
import subprocess
import sys

import pytest
import torch

import bench
import bench_kernels
import bench_timing
import checkpoint
import model_blip2
from kernels import linear_cross_entropy as loss

SMALL = ["--small", "--rounds", "1"]


def rows_of(tmp_path, *argv: str) -> dict[str, dict]:
    """A command's rows; in a process of its own, since the bench forks to measure memory."""
    path = tmp_path / "figures.json"
    subprocess.run([sys.executable, bench.__file__, *argv, *SMALL, "--json", str(path)], check=True)
    return {row["what"]: row for row in json.loads(path.read_text())["rows"]}


def refuses(match: str, *argv: str) -> None:
    """In this process, where something is patched: nothing is reported."""
    threads = torch.get_num_threads()
    try:
        # no fork of a process that has threads, which may wait for ever
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=match):
            for module in (bench, bench_kernels):
                patch.setattr(module, "peak_memory", lambda prepare: prepare()() or 1, raising=False)
            bench.main([*argv, *SMALL])
    finally:
        torch.set_num_threads(threads)


def test_loading(tmp_path, monkeypatch, capfd):
    (row,) = rows_of(tmp_path, "load", "--only", "float32").values()
    assert row["load_file + copy_, CPU"] > 0 and row["ours to floor"] > 0
    assert "loading float32" in capfd.readouterr().out
    monkeypatch.setattr(checkpoint, "load_into", lambda params, weights: None)
    refuses("loaded weights differ", "load", "--only", "float32")


@pytest.mark.slow
def test_kernels(tmp_path, monkeypatch):
    rows = rows_of(tmp_path, "kernels", "--only", "R")
    assert any("F.rms_norm, CPU" in row for row in rows.values())
    (row,) = rows_of(tmp_path, "kernels", "--only", "frozen head").values()
    assert "F.linear_cross_entropy, CPU" in row and row["naive, peak"] > 0

    def wrong(*args):
        value, rows = loss.linear_cross_entropy(*args)
        return 1.01 * value, rows

    monkeypatch.setattr(bench_kernels, "linear_cross_entropy", wrong)
    refuses("is not timed", "kernels", "--only", "frozen head")


def test_a_ratio_is_of_one_round():
    """The second round ran on a machine half as fast: the ratio is the same."""
    times = {"ours": [(1.0, 2.0), (2.0, 4.0), (9.0, 1.0)], "theirs": [(3.0, 2.0), (6.0, 4.0), (9.0, 1.0)]}
    assert bench_timing.ratio(times, "theirs", "ours") == 3
    assert bench_timing.ratio(times, "theirs", "ours", wall=True) == 1
    assert bench_timing.row_of("x", times).figures["theirs, CPU"] == 3
    with pytest.raises(ValueError, match="loss: ours is 1, the other 1.1"):
        bench_timing.agree("loss", 1.0, 1.1, 1e-2)


def test_products_are_recorded_backward_too():
    x, w = torch.randn(5, 8), torch.randn(8, 3, requires_grad=True)
    products = bench_timing.Products.of(lambda: (x @ w).relu().sum().backward())
    assert len(products.calls) == 2  # x needs no gradient
    products.replay()


def test_no_row_is_refused(tmp_path):
    refuses("no row of load has that", "load", "--only", "nothing")
    with pytest.raises(ValueError, match="--rounds 0"):
        bench.main(["load", "--rounds", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU that torch can use"):
            bench.main(["gpu"])


@pytest.mark.slow
def test_training(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    rows = rows_of(tmp_path, "train")
    assert len(rows) == len(bench.WORKS) + len(bench.CONFIGS)
    head = model_blip2.Blip2.head

    def wrong(self, x, batch):
        value, rows = head(self, x, batch)
        return 1.01 * value, rows

    monkeypatch.setattr(model_blip2.Blip2, "head", wrong)
    refuses("loss: ours is", "train", "--only", "equal lengths")


@pytest.mark.slow
def test_generation(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    assert len(rows_of(tmp_path, "generate")) == len(bench.QUESTIONS) + 1
    monkeypatch.setattr(bench.generate, "generate", lambda *args: [[5] * 4])
    refuses("tokens differ", "generate", "--only", "greedy, batch 1")


@pytest.mark.slow
def test_start(tmp_path):
    pytest.importorskip("peft")
    rows = rows_of(tmp_path, "start")
    assert any("microseconds a record" in row for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in bench_kernels.PARTS if name != "tests"])
def test_part_of_the_first_minutes(tmp_path, part):
    small = bench_kernels.PARTS[part][0](torch.device("cpu"), torch.float32, True, tmp_path)
    assert small and all(row.figures for row in small)


@pytest.mark.slow
def test_a_failing_part_leaves_the_others(tmp_path, monkeypatch):
    wrong = {"parity": (None, 1e-3), "loss": (None, 100)}
    monkeypatch.setattr(bench_kernels, "PARTS", wrong)
    path = tmp_path / "figures.json"
    assert bench.main(["gpu", *SMALL, "--json", str(path)]) == 0
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    assert "took longer" in rows.pop("parity: FAILED")["why"]
    assert rows and not any("FAILED" in what for what in rows)
