"""The repository itself: sizes, no path of one particular machine, samples whose files all exist."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
MB = 1_000_000


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    assert files, "git tracks no file"
    return [path for path in files if path.is_file()]


def text_of(path: Path) -> str | None:
    """A file's text; None for a binary file."""
    data = path.read_bytes()
    return None if b"\0" in data else data.decode("utf-8", errors="replace")


def test_sizes(tracked):
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked}
    assert not {name: size for name, size in sizes.items() if size > 6 * MB}
    assert sum(sizes.values()) < 45 * MB


def test_no_local_paths(tracked):
    absolute = re.compile(
        r"(?<![\w.~/-])/wor" + r"k(?![\w-])"
    )  # split, so that this line does not match itself
    beside = "../" + "shared"
    hits = []
    for path in tracked:
        name, text = path.relative_to(ROOT).as_posix(), text_of(path)
        if text is None:
            continue
        if absolute.search(text):
            hits.append(f"{name}: absolute path")
        if path.suffix == ".py" and name != "tests/conftest.py" and beside in text:
            hits.append(f"{name}: {beside}")
    assert not hits


COPY = re.compile(r"# same as (\w+)\.([\w.]+)$")


def definition(tree: ast.Module, names: list[str]) -> ast.AST:
    for name in names:
        tree = next(node for node in tree.body if getattr(node, "name", None) == name)
    return tree


def code_of(node: ast.AST) -> str:
    """Without its docstring, comments and layout."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return ast.dump(ast.Module([type(node)(**{**vars(node), "body": body})], []))


def test_marked_copies_are_equal():
    """`# same as module.Name` above a definition promises what this checks."""
    marked = []
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        starts = {
            node.lineno: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := COPY.match(line.strip()):
                marked.append((path.name, match, starts[number + 1]))
    assert len(marked) >= 3  # the copies are found
    for name, match, node in marked:
        original = ast.parse((ROOT / f"{match[1]}.py").read_text(encoding="utf-8"))
        same = code_of(node) == code_of(definition(original, match[2].split(".")))
        assert same, f"{name}:{node.lineno} differs from {match[1]}.{match[2]}"


def records(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def images_of(record: dict) -> list[str]:
    turns = " ".join(turn["value"] for turn in record.get("conversations", []))
    return re.findall(r"<img>(.*?)</img>", turns) + ([record["image"]] if "image" in record else [])


@pytest.mark.parametrize("name", sorted(p.relative_to(SAMPLES).as_posix() for p in SAMPLES.glob("*/*.json*")))
def test_sample_images_exist(name):
    content = records(SAMPLES / name)
    if isinstance(content, dict):  # COCO's own form; question and annotation files have no image names
        images = [image["file_name"] for image in content.get("images", [])]
    else:
        images = [image for record in content for image in images_of(record)] or [
            record["file"] for record in content
        ]
    missing = {image for image in images if not (SAMPLES / image).is_file()}
    assert not missing


def test_flags_are_held_out():
    """Pre-training files hold no flag; together with the flag records they are the whole files."""
    for language in ("en", "zh"):
        for split in ("train", "val"):
            whole = records(SAMPLES / f"vqa/{split}_{language}.jsonl")
            kept = records(SAMPLES / f"pretrain/vqa_{split}_{language}.jsonl")
            flags = [record for record in whole if record["source"] == "flag"]
            assert flags and kept == [record for record in whole if record["source"] != "flag"]
            assert records(SAMPLES / f"flags_{language}/{split}.jsonl") == flags
    for split in ("train", "val"):
        whole, kept = (
            records(SAMPLES / f"chat/{split}.json"),
            records(SAMPLES / f"pretrain/chat_{split}.json"),
        )
        assert kept == [record for record in whole if not record["id"].startswith("flag_")]
    used = [
        path for file in SAMPLES.glob("pretrain/*") for record in records(file) for path in images_of(record)
    ]
    assert len(used) > 1000 and not [path for path in used if "images/flags/" in path]
    captioned = [i["file_name"] for file in SAMPLES.glob("caption/*.json") for i in records(file)["images"]]
    assert captioned and not [path for path in captioned if "images/flags/" in path]


def test_every_named_licence_is_there():
    notice = (SAMPLES / "NOTICE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:Apache|CC-BY|CC0|BSD-3|Unicode)-(?:[\d.]*\d|Clause)\b|\bMIT\b", notice))
    there = {path.stem for path in (SAMPLES / "licenses").glob("*.txt")}
    assert named == there
