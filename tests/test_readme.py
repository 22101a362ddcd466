"""Every command of the README runs, in its order, in a copy of the repository.

Training is cut short; pip and pytest are
left out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if not re.match(r"pip |python -m pytest|\./runs/", line)
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme") / "trimix"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    return path


def test_there_are_commands():
    assert sum("train.py" in c for c in COMMANDS) >= 4 and any("merge.py" in c for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(copy, command):
    if "train.py" in command and "--dry_run" not in command:
        command += " --max_steps 3"
    folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, shell=True, cwd=copy, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def test_files_of_the_tree_exist():
    tree = re.search(r"```text\n(train\.py.*?)```", README, re.DOTALL)[1]
    names = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(names) > 10 and not [name for name in names if not (ROOT / name).exists()]
    assert len(README.splitlines()) < 250
