"""Measures the code: what a reader has to read, and what one training step runs through.

    python dev/house.py             # the files' table, and one step of the tiny Qwen-VL
    python dev/house.py --no_step   # the table alone

The table counts lines of code without blank lines, comments and docstrings; tests are left out. The step
counts the repository's functions that a step of one sample calls (comprehensions and lambdas, which Python
calls too, apart), their files, and how often a call goes from one file to another.
"""

import argparse
import ast
import contextlib
import io
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LONG_LINE, LONG_FUNCTION, MANY_PARAMETERS = 110, 60, 8
OUTSIDE = ("tests", "runs", "dev")  # not part of what is run


@dataclass
class Function:
    name: str  # file:line name
    lines: int
    parameters: int
    kernel: bool  # Triton's: its parameters are pointers and tile sizes


@dataclass
class File:
    name: str
    code: int = 0  # lines
    comments: int = 0
    docstrings: int = 0
    long_lines: int = 0
    functions: list[Function] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Comments per 100 lines of code."""
        return 100 * self.comments / max(self.code, 1)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers that belong to a docstring."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                found |= set(range(first.lineno, first.end_lineno + 1))
    return found


def functions_of(tree: ast.AST, name: str) -> list[Function]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        own = [a for a in arguments if a.arg not in ("self", "cls")]
        kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
        where = f"{name}:{node.lineno} {node.name}"
        found.append(Function(where, node.end_lineno - node.lineno + 1, len(own), kernel))
    return found


def measure(path: Path) -> File:
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    tree = ast.parse(text)
    docs, code, comments = docstring_lines(tree), set(), 0
    nothing = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += not set(token.string) <= {"#", "-", " "}  # a rule between sections says nothing
        elif token.type not in nothing:
            code |= set(range(token.start[0], token.end[0] + 1)) - docs
    long_lines = sum(len(line) > LONG_LINE for line in text.splitlines())
    return File(name, len(code), comments, len(docs), long_lines, functions_of(tree, name))


def tracked() -> list[Path]:
    """The Python files that git tracks, without tests and recipes."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    return [ROOT / n for n in sorted(names) if n and n.split("/")[0] not in OUTSIDE and (ROOT / n).is_file()]


def step_calls() -> tuple[set, set, int]:
    """(functions, files, changes of file) of the second optimiser step of a short run: the first one warms
    up caches."""
    import torch

    import train

    seen, files, changes, active, last = set(), set(), 0, False, [None]

    def profile(frame, event, _):
        nonlocal changes
        if event != "call":
            return
        path = frame.f_code.co_filename
        if not path.startswith(str(ROOT)) or path == __file__:
            return
        seen.add((path, frame.f_code.co_qualname))
        files.add(path)
        changes += last[0] is not None and path != last[0]
        last[0] = path

    steps = 0
    plain_step = torch.optim.AdamW.step

    def counted_step(self, *args, **kwargs):
        nonlocal steps, active
        result = plain_step(self, *args, **kwargs)
        steps += 1
        active = steps == 1
        sys.setprofile(profile if active else None)
        return result

    torch.optim.AdamW.step = counted_step
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            options = {
                "model": "qwen_vl",
                "lora": "true",
                "output_dir": f"{folder}/run",
                "max_steps": 3,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "dataloader_num_workers": 0,
                "save": "no",
                "evaluate": "no",
            }
            train.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    finally:
        sys.setprofile(None)
        torch.optim.AdamW.step = plain_step
    return seen, files, changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--no_step", action="store_true", help="count the files alone, run nothing")
    args = parser.parse_args()
    files = [measure(path) for path in tracked()]
    print(f"{'file':34}{'code':>7}{'comments':>10}{'per 100':>9}{'docstrings':>12}{'> 110':>7}")
    total = File("in all", *(sum(getattr(f, n) for f in files) for n in ("code", "comments", "docstrings")))
    total.long_lines = sum(f.long_lines for f in files)
    for f in [*sorted(files, key=lambda f: -f.code), total]:
        print(f"{f.name:34}{f.code:7,}{f.comments:10,}{f.density:9.1f}{f.docstrings:12,}{f.long_lines:7,}")
    functions = [function for f in files for function in f.functions]
    print(f"\nlongest functions (over {LONG_FUNCTION} lines):")
    for function in sorted(functions, key=lambda f: -f.lines):
        if function.lines > LONG_FUNCTION:
            print(f"{function.lines:5}  {function.name}{'  (kernel)' if function.kernel else ''}")
    print(f"\n{MANY_PARAMETERS} parameters or more (kernels left out):")
    for function in sorted(functions, key=lambda f: -f.parameters):
        if function.parameters >= MANY_PARAMETERS and not function.kernel:
            print(f"{function.parameters:5}  {function.name}")
    if not args.no_step:
        seen, where, changes = step_calls()
        named = [(path, name) for path, name in seen if not name.endswith(">")]
        print(
            f"\none training step of one sample: {len(named)} functions and {len(seen) - len(named)} ", end=""
        )
        print(f"comprehensions or lambdas, {len(where)} files, {changes} changes of file")
        for path in sorted(where):
            names = sorted(name for other, name in named if other == path)
            print(f"{len(names):5}  {Path(path).relative_to(ROOT).as_posix()}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
