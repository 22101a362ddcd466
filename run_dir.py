"""The output directory of a run: what is in it, how it is continued, and what is published there.

    train_config.json   the settings      log.jsonl   every step      checkpoint-N   whole, each a model_name_or_path
"""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

import checkpoint
import parallel
from config import Config


def prepare_output_dir(cfg: Config, world: parallel.World) -> Path | None:
    """The checkpoint to continue from, or None. Refuses to touch a directory that is no run of ours.

    A run that torchrun started again, since a rank had died, always goes on from its own last checkpoint.
    """
    out = Path(cfg.output_dir)
    restarted = parallel.restart_count() > 0
    overwrite = cfg.overwrite_output_dir and not restarted
    is_run = (out / "train_config.json").exists()
    if out.exists() and not out.is_dir():
        raise ValueError(f"output_dir={out} is a file; choose a directory")
    if out.is_dir() and any(out.iterdir()) and not is_run:
        raise ValueError(
            f"output_dir={out} is not empty and holds no earlier run (no train_config.json); choose another directory"
        )
    resume = checkpoint.last_checkpoint(out) if restarted else None
    if resume is None and isinstance(cfg.resume_from_checkpoint, str):
        resume = Path(cfg.resume_from_checkpoint)
        if not (resume / "trainer_state.json").exists():
            raise ValueError(f"resume_from_checkpoint={resume} is no complete checkpoint (no trainer_state.json)")
    elif not overwrite and resume is None:
        resume = checkpoint.last_checkpoint(out)
        if resume is None and cfg.resume_from_checkpoint and not restarted:
            raise ValueError(f"resume_from_checkpoint=true, but {out} has no complete checkpoint")
    parallel.barrier(world)
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        if is_run and overwrite:
            for path in [
                *out.glob("checkpoint-*"),
                *(out / n for n in ("log.jsonl", "loss.png")),
                *out.glob("*model*.safetensors*"),
            ]:
                if resume is None or path.resolve() != resume.resolve():
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if is_run and resume is not None:
            old = json.loads((out / "train_config.json").read_text(encoding="utf-8"))
            changed = [
                k
                for k, v in asdict(cfg).items()
                if old.get(k, v) != v and k not in ("overwrite_output_dir", "resume_from_checkpoint")
            ]
            if changed:
                print(
                    f"warning: continuing with other settings than the run began with: {', '.join(changed)}",
                    file=sys.stderr,
                )
        checkpoint.write_json(out / "train_config.json", asdict(cfg))
    parallel.barrier(world)
    return resume


def publish(path: Path, out: Path) -> None:
    """The final model's files stand in the output directory itself too: links where possible, else copies."""
    for source in path.iterdir():
        if source.is_file() and source.name != "trainer_state.json":
            temporary = out / (source.name + ".tmp")
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, out / source.name)


class Log:
    """log.jsonl (every step), console lines, progress bar, TensorBoard. Rank 0 only."""

    def __init__(self, cfg: Config, start_step: int, total: int):
        self.cfg, self.total, self.path = cfg, total, Path(cfg.output_dir) / "log.jsonl"
        kept = []
        if start_step and self.path.exists():  # steps after the checkpoint are taken again
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", encoding="utf-8")
        self.bar = sys.stderr.isatty() and not cfg.disable_tqdm
        self.board = None
        for target in cfg.report_to or ():
            if target != "tensorboard":
                raise ValueError(f"report_to: {target!r} is not supported; expected tensorboard")
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("report_to: tensorboard is not installed; pip install tensorboard") from None
            self.board = SummaryWriter(cfg.output_dir)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(key, value, record["step"])

    def step(self, r: dict) -> None:
        self.write(r)
        if r["step"] % self.cfg.logging_steps == 0 or r["step"] in (1, self.total):
            sets = "".join(f" | {name} {loss:.4f}" for name, loss in r.get("loss_by_dataset", {}).items())
            print(
                f"{self.clear()}step {r['step']:05d}/{self.total:05d} | loss {r['loss']:.4f} | lr {r['lr']:.1e} | "
                f"gnorm {r['grad_norm']:.2f} | {r['ms']:.0f} ms | {r['tokens_per_s']:,.0f} tok/s "
                f"({r['supervised']:.0%} supervised) | data {r['data']:.0%} | "
                f"mem {r['mem_gib']:.1f}G{sets}",
                flush=True,
            )
        if self.bar:
            filled = 30 * r["step"] // self.total
            print(
                f"\r[{'#' * filled}{'.' * (30 - filled)}] {r['step']}/{self.total} loss {r['loss']:.4f} ",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> str:
        return "\r\033[K" if self.bar else ""


def draw_loss(log_path: Path, out: Path) -> None:
    """The loss curve as a picture: training in blue, evaluation in red."""
    records = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evals = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    W, H, margin = 640, 400, 48
    top = max(v for _, v in train + evals) or 1.0
    last = max(s for s, _ in train + evals)
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)

    def place(step, value):
        return margin + (W - 2 * margin) * step / last, H - margin - (H - 2 * margin) * value / top

    draw.rectangle((margin, margin, W - margin, H - margin), outline="black")
    for i in range(5):
        x, y = place(last * i / 4, top * i / 4)
        draw.text((8, y - 6), f"{top * i / 4:.3g}", fill="black")
        draw.text((x - 10, H - margin + 6), f"{last * i // 4}", fill="black")
    for points, colour in ((train, "blue"), (evals, "red")):
        if len(points) > 1:
            draw.line([place(*p) for p in points], fill=colour, width=2)
        for p in points if len(points) < 50 else []:
            x, y = place(*p)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    draw.text((W // 2 - 40, 16), "loss over steps", fill="black")
    image.save(out)
