"""Runs side by side: what differs in their settings, their last and best losses, one picture of the curves.

    python runs/compare.py output_a output_b output_c
    python runs/compare.py output_a output_b --picture compare.png  # with requirements-plots.txt installed

Reads run.json or train_config.json and log.jsonl of each; also while a run goes on.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ABOUT = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"}  # differ, and say nothing


def parsed(text: str, where: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{where}: not valid JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {str(found)[:40]}; expected an object as train.py writes it")
    return found


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no text ({e.reason} at byte {e.start})") from None


def settings(run: Path) -> dict:
    for name in ("train_config.json", "run.json"):
        if (path := run / name).is_file():
            found = parsed(read(path), str(path))
            return parsed(json.dumps(found.get("settings")), str(path)) if name == "run.json" else found
    raise ValueError(f"{run} is no run (no train_config.json); give output directories of train.py")


def log(run: Path) -> list[dict]:
    """The log's records; of a run that goes on the last line may be half written."""
    path, found = run / "log.jsonl", []
    lines = read(path).splitlines() if path.is_file() else []
    for n, line in enumerate(lines, 1):
        where = f"{path}:{n}"
        try:
            record = parsed(line, where)
            wanted = {"step", "tokens_per_s"} if "loss" in record else {"step"}
            for key in wanted | {k for k in record if k == "loss" or k.startswith("eval_")}:
                value = record.get(key)
                # a whole number of 400 digits is none that a loss can be
                if not isinstance(value, int | float) or isinstance(value, int) and abs(value) > 1 << 60:
                    raise ValueError(f"{where}: {key} is {value!r:.40}; expected a number")
        except ValueError:
            if n < len(lines):
                raise
        else:
            found.append(record)
    return found


def summary(records: list[dict]) -> dict[str, str]:
    """What a table says of a run; "-" for what it has not."""
    steps = [r for r in records if "loss" in r]
    evals = [r for r in records if "eval_loss" in r and not r.get("final")]
    row = dict.fromkeys(
        ("steps", "last loss", "best loss", "last eval_loss", "best eval_loss", "tokens/s"), "-"
    )
    for name, found, key in (("loss", steps, "loss"), ("eval_loss", evals, "eval_loss")):
        if found:
            best = min(found, key=lambda r: (r[key] != r[key], r[key]))  # NaN is never the best
            row[f"last {name}"] = f"{found[-1][key]:.4f}"
            row[f"best {name}"] = f"{best[key]:.4f} (step {best['step']})"
    if steps:
        row["steps"] = f"{steps[-1]['step']}"
        speeds = sorted(r["tokens_per_s"] for r in steps)
        row["tokens/s"] = f"{speeds[len(speeds) // 2]:,.0f}"  # the median
    last = next((r for r in reversed(evals)), {})
    others = {k: v for k, v in last.items() if k.startswith("eval_") and "eval_loss" not in k}
    return row | {f"last {k}": f"{v:.4f}" for k, v in others.items()}


def table(names: list[str], rows: dict[str, list[str]]) -> str:
    """Columns as wide as their longest cell."""
    cells = [["", *names], *([key, *values] for key, values in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def shown(values: list) -> list[str]:
    """Values of a setting; of long ones the place where they begin to differ."""
    texts = [json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    if max(map(len, texts)) <= 60:
        return texts
    start = max(0, len(os.path.commonprefix(texts)) - 20)
    return ["..." * (start > 0) + (t if len(t) <= 57 else t[:54] + "...") for t in (x[start:] for x in texts)]


def picture(names: list[str], logs: list[list[dict]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, records in zip(names, logs, strict=True):
        steps = [r for r in records if "loss" in r]
        (line,) = axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], alpha=0.6, label=name)
        evals = [r for r in records if "eval_loss" in r]
        axes.plot([r["step"] for r in evals], [r["eval_loss"] for r in evals], "o--", color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (dots: evaluation)")
    axes.legend()
    figure.savefig(out, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of the loss curves; needs matplotlib")
    args = parser.parse_args(argv)
    try:
        configs, logs = [settings(run) for run in args.runs], [log(run) for run in args.runs]
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    names, keys = [str(run) for run in args.runs], dict.fromkeys(key for c in configs for key in c)
    differ = {k: shown([c.get(k) for c in configs]) for k in keys if k not in ABOUT}
    differ = {k: texts for k, texts in differ.items() if len(set(texts)) > 1}
    print(table(names, differ) if differ else "all settings are equal")
    rows = [summary(records) for records in logs]
    columns = dict.fromkeys(key for row in rows for key in row)
    print("\n" + table(names, {key: [row.get(key, "-") for row in rows] for key in columns}))
    if args.picture:
        try:
            picture(names, logs, args.picture)
        except ImportError:
            print(
                "error: no picture without matplotlib; pip install -r requirements-plots.txt", file=sys.stderr
            )
            return 1
        print(f"\nloss curves: {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
