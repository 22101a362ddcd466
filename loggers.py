"""Other logs beside log.jsonl: TensorBoard, Weights & Biases, trackio, SwanLab; each by a few calls.

    python train.py --report_to wandb  # with WANDB_MODE=offline (SWANLAB_MODE=offline) without a server
    logs = loggers.open_logs(["wandb"], Path("output"), {"lora": True}, "run id")
    logs[0].write({"step": 1, "loss": 2.3}), logs[0].close()

A package is needed where its log is asked for only; config.py looks before anything is loaded.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "swanlab": "swanlab"}


@dataclass
class OtherLog:
    scalars: Callable[[dict, int], None]  # (name -> number, step)
    close: Callable[[], None]

    def write(self, record: dict) -> None:
        """The numbers of a record of log.jsonl."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        numbers |= {f"loss/{k}": v for k, v in record.get("loss_by_dataset", {}).items()}
        if numbers:
            self.scalars(numbers, record["step"])


def check(names: list[str]) -> None:
    """ValueError for a log whose package is not installed."""
    # transformers' word for no log at all.
    if "none" in names and {*names} != {"none"}:
        raise ValueError(f"report_to={names}: none and others; keep one")
    for name in names:
        if name != "none" and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {PACKAGES[name]}")


def open_logs(names: list[str], out: Path, settings: dict, run_id: str, done: int = 0) -> list[OtherLog]:
    """rank 0. A continued run goes on in its own log, behind its first `done` steps: `run_id` is the same."""
    return [open_log(name, out, settings, run_id, done) for name in names if name != "none"]


def open_log(name: str, out: Path, settings: dict, run_id: str, done: int) -> OtherLog:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(out), purge_step=done + 1 if done else None)  # later ones come again

        def scalars(numbers: dict, step: int) -> None:
            for key, value in numbers.items():
                board.add_scalar(key, value, step)

        return OtherLog(scalars, board.close)
    # A run that goes on must find its own log again: by the id of run.json, which a restart keeps.
    package, title = importlib.import_module(PACKAGES[name]), f"{out.resolve().name}-{run_id}"
    about = {"project": "trimix", "config": settings, "resume": "allow"}
    if name == "wandb":
        run = package.init(**about, name=title, id=run_id, dir=str(out))
    elif name == "trackio":  # a run is known by its name
        run = package.init(**about, name=title)
    else:  # its ids have 21 characters
        folder = str(out / "swanlab")
        run = package.init(**about, experiment_name=title, id=(run_id * 2)[:21], logdir=folder)
    return OtherLog(lambda numbers, step: run.log(numbers, step=step), run.finish)
