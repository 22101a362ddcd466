"""Which cells of a table of cases the default run tests; the others are slow (python -m pytest -m slow)."""

import itertools

import pytest


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def thinned(cases, kept) -> list:
    """The cases, of which only the kept ones run by default."""
    kept = list(kept)
    assert set(map(str, kept)) <= set(map(str, cases)), f"{kept} are not among {list(cases)}"
    return [
        case if case in kept else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases
    ]


def diagonal(*axes) -> list:
    """All combinations; by default as many as show every value of every axis once."""
    axes = [list(axis) for axis in axes]
    longest = max(map(len, axes))
    return thinned(
        list(itertools.product(*axes)), {tuple(axis[i % len(axis)] for axis in axes) for i in range(longest)}
    )
