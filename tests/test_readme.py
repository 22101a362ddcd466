"""Every command of the README runs, in its order, in a copy of the repository: those of the first screen by
default, all of them with `-m slow`. Training is cut short; pip and pytest are left out."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if not re.match(r"pip |python -m pytest|\./runs/", line)
]
COMMANDS += re.findall(
    r"\| `((?:python|torchrun) .*?)` \|$", README, re.MULTILINE
)  # of the tables, last cell


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


@pytest.fixture(scope="module")
def servers():
    """What commands have started and left running: port -> process."""
    started = {}
    yield started
    for process in started.values():
        process.terminate()
        process.wait(60)


@dataclass
class Script:
    """A script's main that reads the command line."""

    module: str

    def __call__(self, argv: list[str]) -> int | None:
        sys.argv = [self.module, *argv]
        return importlib.import_module(self.module).main()


FIRST = next(n for n, command in enumerate(COMMANDS) if "data.py" in command)  # those of the first screen


@pytest.mark.parametrize("command", COMMANDS[FIRST:])
def test_command_is_understood(copy, monkeypatch, capfd, command):
    """What follows the first screen: training by a dry run, else by the script's help; test_commands_in_full
    runs it."""
    words = shlex.split(command)
    if words[0] == "curl":
        pytest.skip("no script of ours")
    place = next(n for n, word in enumerate(words) if word.endswith(".py"))
    main, argv = Script(words[place][:-3].replace("/", ".")), words[place + 1 :]
    monkeypatch.chdir(copy)
    if words[place] == "train.py":
        world = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
        if not re.search(r"--init_from|--lora_path|grounding", command):
            run([*argv, *([] if "--dry_run" in argv else ["--dry_run"])], world, main)
        return
    run([*(word for word in argv if word in ("check", "preview", "bench", "plan")), "--help"], main=main)
    known = capfd.readouterr().out
    flags = [word for word in argv if word.startswith("--")]
    assert known and not [flag for flag in flags if not re.search(rf"{flag}\b", known)], known
    assert not [word for word in argv if word.startswith("samples/") and not (copy / word).exists()]


@pytest.mark.parametrize("command", COMMANDS[:FIRST])
def test_command(copy, command, servers):
    execute(copy, command, servers)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_full(copy, command, servers):
    """In their order, from the first on: later ones read what earlier ones wrote."""
    execute(copy, command, servers)


def execute(copy, command, servers):
    if "train.py" in command and "--dry_run" not in command:
        command += " --max_steps 3"
    folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    if re.match(r"python serve.py (?!bench)", command):
        port, place = serve_in_background(f"{command} --port 0", copy, env)
        servers[port] = place
        return
    if ":8000" in command:
        command = command.replace(":8000", f":{max(servers)}")
    result = subprocess.run(
        command, shell=True, cwd=copy, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def serve_in_background(command: str, folder: Path, env: dict) -> tuple[int, subprocess.Popen]:
    """-> the server's port, which a line of it tells when it is ready, and its process."""
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command.split(), cwd=folder, env=env, stderr=log)
    while process.poll() is None:
        if found := re.search(r"serving .*:(\d+)\n", (folder / "server.log").read_text()):
            return int(found[1]), process
        time.sleep(0.1)
    raise AssertionError((folder / "server.log").read_text())


def test_files_of_the_tree_exist():
    tree = re.search(r"```text\n(train\.py.*?)```", README, re.DOTALL)[1]
    names = [line.split()[0] for line in tree.splitlines() if line.strip()]
    names += re.findall(r"; ([\w/]+(?:\.py|/|\.md)):", tree)
    assert len(names) > 10 and not [name for name in names if not (ROOT / name).exists()]
    assert len(README.splitlines()) < 250
