"""Before a script begins: the Python that runs it, and what the environment says about ranks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import meeting
import terminal

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("convert/*.py")])
SCRIPTS = [p for p in FILES if 'if __name__ == "__main__":' in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_an_old_python_reads_as_far_as_the_check(script):
    tree = ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 8))
    ours = next(n for n, node in enumerate(tree.body) if "python_version" in ast.unparse(node))
    # behind the docstring alone, or in a folder behind what puts the repository's root on the path
    before = [ast.unparse(node).split("(")[0] for node in tree.body[1:ours]]
    assert before == (
        [] if script.parent == ROOT else ["import sys", "from pathlib import Path", "sys.path.insert"]
    )


def test_an_old_python_is_named(tmp_path):
    assert len(SCRIPTS) >= 8
    source = (ROOT / "python_version.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    (tmp_path / "old.py").write_text(f"import sys\nsys.version_info = (3, 9, 1)\n{source}\nprint('on')")
    done = subprocess.run([sys.executable, str(tmp_path / "old.py")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: this needs Python 3.11 or newer") and "is 3.9" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": ""},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"LOCAL_RANK": "0.5"},
        {"WORLD_SIZE": "9" * 30},
        {"TORCHELASTIC_RESTART_COUNT": "x"},
        {"WORLD_SIZE": "0"},
    ],
)
def test_nonsense_about_ranks_is_one_line(monkeypatch, capsys, environment):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    meeting.check_environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.cli(lambda: 0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and list(environment)[0] in line


def test_nonsense_about_ranks_at_the_command_line():
    environment = {**os.environ, "WORLD_SIZE": "two"}
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: the environment has WORLD_SIZE='two'")


def test_a_world_without_a_rank_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but no RANK"):
        meeting.Meeting()


def test_a_reader_that_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    program = "import terminal, sys; sys.exit(terminal.cli(lambda: print(5, flush=True)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "broken pipe" in line


def test_imports_leave_out_what_some_runs_need():
    """torch alone takes 1.4 s; its compiler, DTensor and checkpoints of many ranks as much again."""
    program = "import train, merge, data_check, serve, gc, sys; sys.stdout.write(' '.join(sys.modules))"
    program += "; sys.exit(not gc.isenabled())"
    models = "; import " + ", ".join(p.stem for p in ROOT.glob("model_*.py"))
    command = [sys.executable, "-c", program.replace("; sys.", f"{models}; sys.", 1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    late = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.checkpoint"}
    late |= {
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "numpy.random",
        "sympy",
        "transformers",
    }
    assert not late & {*done.stdout.split()}
