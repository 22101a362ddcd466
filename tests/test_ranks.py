"""The starter of ranks itself: what they return, say and fail with reaches the test, however they start."""

import os
import sys
from multiprocessing import get_context

import pytest
import ranks
import torch
import torch.distributed as dist


def sum_of(rank, number):
    total = torch.tensor([float(rank + number)])
    dist.all_reduce(total)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} in {os.getcwd()}: {os.environ['SAID']}")
    return total


@pytest.mark.parametrize("method", ["as shipped", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_ranks_return_and_say(tmp_path, monkeypatch, capfd, method):
    if method == "spawn":
        monkeypatch.setattr(ranks, "CONTEXT", get_context("spawn"))
    monkeypatch.chdir(tmp_path)
    for said in ("hello", "again"):  # environment, place and output are those of now, not of the first start
        monkeypatch.setenv("SAID", said)
        assert ranks.together(sum_of, 3) == [torch.tensor([7.0])] * 2
        output = capfd.readouterr().out
        assert all(f"rank {rank} of 2 in {tmp_path}: {said}\n" in output for rank in (0, 1))


def fails(rank):
    if rank == 1:
        raise KeyError("what went wrong")
    dist.barrier()


def test_what_ranks_fail_with(capfd):
    with pytest.raises(AssertionError, match=r"exit codes \[1, 1\]"):
        ranks.together(fails)
    assert "KeyError: 'what went wrong'" in capfd.readouterr().err


def main_of(argv):
    sys.exit(int(argv[0]))


def test_what_scripts_end_with():
    ranks.run(["0"], main=main_of)
    with pytest.raises(AssertionError, match=r"exit codes \[3, 3\]"):
        ranks.run(["3"], 2, main_of)
