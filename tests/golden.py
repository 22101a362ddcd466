"""Frozen outputs of the originals, as files below the golden root (see conftest.py)."""

import json
from pathlib import Path

from safetensors.torch import load_file


class Sections(dict):
    """One that a set does not hold is named with its file: conftest.py tells it from a fault of ours."""

    path: Path

    def __missing__(self, key):
        raise FileNotFoundError(f"{self.path} has no {key!r}")


def read_golden(path: Path) -> Sections | list:
    """A JSON or safetensors file."""
    safe = path.suffix == ".safetensors"
    content = load_file(path) if safe else json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = Sections(content)
        content.path = path
    return content
