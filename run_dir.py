"""The output directory of a run: what is in it, how it is continued, and what is published there.

    run.json            which run this is: its id, settings, where it began, whether it is finished
    train_config.json   the settings that trained, as a configuration file      log.jsonl   every step
    checkpoint-N        whole, each a model_name_or_path; trainer_state.json in it says which run's it is
    .lock               while a run goes on: by which process

The first start of a run decides whether it begins anew, from a given checkpoint, or continues; a restart of
the same command finds that decision in run.json and goes on from the run's own last checkpoint.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import checkpoint
import loggers
import schema
import terminal
from config import Config
from meeting import Meeting, between_ranks, restart_count
from terminal import one_line

# What a command asks of the output directory.
REQUEST = {"overwrite_output_dir", "resume_from_checkpoint"}
# Settings that change no trained value: a finished run with others of them is the same finished run. What is
# said and kept of a run, how it is computed, and on which ranks.
HARMLESS = REQUEST | set(
    "output_dir logging_steps disable_tqdm report_to sample_steps benchmark skip_memory_metrics dry_run "
    "save_total_limit accept_changed_data num_workers use_flash_attention compile recompute sharding "
    "sharding_parallel_degree tensor_parallel_degree pipeline_parallel_degree pipeline_schedule".split()
)
# With these changed, a command is still a restart of the one before: another number of ranks or another
# memory asks for other batches, and a run may be made longer.
RESTARTED_WITH = HARMLESS | set(
    "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size "
    "eval_accumulation_steps save_steps max_steps num_train_epochs early_stopping_patience".split()
)
SEEN = 60  # seconds after which a file of another machine must be seen: NFS keeps what it knows so long
PUBLISHED = ("*model*.safetensors*", "adapter_config.json", "loss.png")


# ---- signals


class Stopped(BaseException):
    """A signal broke off what went on."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP is noted; where work can be broken off, it raises Stopped. A second
    one ends the process."""

    def __init__(self):
        self.number, self.time, self.breaking, self.before = 0, 0.0, False, {}
        self.pipe = self.pipe_before = -1

    def __enter__(self):
        # Python runs a handler when the main thread is back from C, which may be a collective without an end;
        # a byte in this pipe comes at once, for other threads to see.
        self.pipe, end = os.pipe()
        os.set_blocking(end, False)
        self.pipe_before = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(signal.set_wakeup_fd(self.pipe_before))
        os.close(self.pipe)
        self.pipe = -1

    def came(self) -> bool:
        """Whether this process was told to end, handled or not. Any thread may ask."""
        return bool(self.number) or self.pipe >= 0 and bool(select.select([self.pipe], [], [], 0)[0])

    def handle(self, number: int, _frame) -> None:
        if not self.number:
            self.number, self.time = number, time.monotonic()
            if self.breaking:
                raise Stopped(number)
        elif time.monotonic() - self.time > 0.3:
            # torchrun passes on at once what its ranks had from the terminal
            os.write(2, b"error: ended at once by a second signal; the last checkpoint stands\n")
            os._exit(128 + number)

    @contextlib.contextmanager
    def breakable(self, here: bool = True):
        """Within it a signal raises Stopped at once. Not where other ranks would wait for this one."""
        if here and self.number:
            raise Stopped(self.number)
        self.breaking = here
        try:
            yield
        finally:
            self.breaking = False


# ---- the directory


@dataclass
class Start:
    """What rank 0 found in the output directory, and decided; the other ranks are told."""

    id: str  # of the run; its checkpoints have it
    resume: str | None = None  # the checkpoint to continue from
    anew: bool = True  # begins a run; else continues the one that is there
    clears: bool = False  # removes what an earlier run left, when its own first checkpoint is saved
    # runs whose checkpoints up to a step belong to this one too: (id; null for one of before ids, step)
    lineage: list = field(default_factory=list)
    finished: int | None = None  # the steps of the run, if it is finished
    changed: dict = field(default_factory=dict)  # setting -> [that of the run there, the one asked for]


class RunDir:
    """Rank 0 writes; nothing of an earlier run is removed before this one's first checkpoint is there."""

    def __init__(self, cfg: Config):
        self.cfg, self.path, self.file = cfg, Path(cfg.output_dir), None
        self.start: Start | None = None
        self.waiting = False  # for the first checkpoint

    # -- lock

    def lock(self) -> None:
        """Freed by the process's death, whatever kills it. rank 0."""
        out, own = self.path, (".lock", "run.json", "train_config.json", "index")
        if out.exists() and not out.is_dir():
            raise ValueError(f"output_dir={out} is a file; choose a directory")
        foreign = [p.name for p in out.iterdir()] if out.is_dir() else []
        is_run = "train_config.json" in foreign or "run.json" in foreign
        if not is_run and any(
            n not in own and not n.endswith(".tmp") and "log.jsonl" not in n for n in foreign
        ):
            raise ValueError(
                f"output_dir={out} is not empty and holds no earlier run (no train_config.json); choose "
                "another directory"
            )
        while self.file is None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                file = open(out / ".lock", "a+", encoding="utf-8")
            except OSError as e:
                raise ValueError(
                    f"output_dir={out} cannot be written to ({e.strerror}); choose another directory"
                ) from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"output_dir={out} is in use by {holder}; wait for that run to "
                    "end, or choose another directory"
                ) from None
            # the one before may have removed the file that was opened here
            if (out / ".lock").exists() and os.path.samestat(os.stat(out / ".lock"), os.fstat(file.fileno())):
                self.file = file
        with contextlib.suppress(OSError):  # on a full disk the lock holds, but can't say who has it
            os.ftruncate(file.fileno(), 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        for path in [*out.glob("*.tmp"), *out.glob("index/*.tmp")]:  # what a killed process left
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        for path in out.glob("checkpoint-*.old"):
            if (final := path.with_suffix("")).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def check_seen(self, meeting: Meeting) -> None:  # all ranks
        """ValueError where this rank's output directory is another one than rank 0's: on a machine without
        the file system that the others share, its part of a checkpoint would be lost."""
        if meeting.main:
            # From the file that holds the lock: to open and close it once more would free it (fcntl).
            self.file.seek(0)
            meeting.share("holder", self.file.read())
            return
        lock, holder = self.path / ".lock", meeting.share("holder")
        end, seen = time.monotonic() + SEEN, None
        while seen != holder:
            with contextlib.suppress(OSError):
                seen = lock.read_text(encoding="utf-8")
            if seen != holder and time.monotonic() > end:
                raise ValueError(
                    f"output_dir={self.path.absolute()} on {socket.gethostname()} is not the one of rank 0 "
                    f"({holder}): all ranks write there; give a directory on a file system that all machines "
                    "share, under the same path"
                )
            time.sleep(0 if seen == holder else 0.2)

    def unlock(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                if self.waiting:  # nothing of this run is to stay
                    self.log_path().unlink(missing_ok=True)
                (self.path / ".lock").unlink(missing_ok=True)
            self.file.close()
            self.file = None

    # -- the decision

    def record(self) -> dict | None:
        """run.json; of a run of before there was one, what its other files say; None without a run."""
        last = checkpoint.last_checkpoint(self.path)
        # Checkpoints say whose they are, also where run.json was lost; those of before ids do not.
        run = None
        with contextlib.suppress(ValueError):  # a damaged one is named where it is needed
            run = read_state(last).get("run") if last else None
        if (self.path / "run.json").exists():
            record = schema.read_json(self.path / "run.json", "")
            kinds = {"id": str | None, "settings": dict, "request": dict, "lineage": list}
            for key, kind in {**kinds, "finished": int | None}.items():
                schema.check(record.setdefault(key), kind, f"{self.path / 'run.json'}: {key}")
            record["id"] = record["id"] or run
            if not all((self.path / name).exists() for name in record.get("published") or [""]):
                record["finished"] = None  # what it published was removed
            return record
        if not (self.path / "train_config.json").exists():
            return None
        settings = schema.read_json(self.path / "train_config.json", "")
        # The final model stands in the directory itself once a run is finished.
        is_published = any(p for pattern in PUBLISHED[:2] for p in self.path.glob(pattern))
        finished = int(last.name.split("-")[1]) if last and is_published else None
        return {"id": run, "settings": settings, "request": settings, "lineage": [], "finished": finished}

    def decide(self) -> Start:
        """rank 0, which holds the lock."""
        cfg, record, new = self.cfg, self.record(), uuid.uuid4().hex[:12]
        request = request_in(asdict(cfg))
        given = request["resume_from_checkpoint"]
        if record is None:
            start = Start(new, self.given_checkpoint(given))
        else:
            changed = self.changed(record["settings"])
            # The same command again, after a kill perhaps, means the run that it began.
            restart = request_in(record["request"]) == request and not changed.keys() - RESTARTED_WITH
            if given:
                anew = not restart
            else:  # torchrun starts ranks again: then it is never a new run
                again = restart and (record["finished"] is None or restart_count() > 0)
                anew = cfg.overwrite_output_dir and not again
            if anew:
                start = Start(new, self.given_checkpoint(given), lineage=self.ancestors(record, given))
                start.clears = cfg.overwrite_output_dir and not given
            else:
                id = record["id"] or new
                lineage = record["lineage"] if record["id"] else [[None, 1 << 60]]
                start = Start(id, anew=False, lineage=lineage, finished=record["finished"], changed=changed)
                start.clears = bool(record.get("clears"))
                own = self.own(start)
                start.resume = str(own[-1]) if own else record.get("from")
        if start.anew and given:  # the settings of its own run, where that still stands around it
            with contextlib.suppress(OSError, ValueError, TypeError):
                text = (Path(given).resolve().parent / "train_config.json").read_text(encoding="utf-8")
                start.changed = self.changed(dict(json.loads(text)))
        if cfg.resume_from_checkpoint is True and start.resume is None and not restart_count():
            raise ValueError(f"resume_from_checkpoint=true, but {self.path} has no complete checkpoint")
        return start

    def changed(self, old: dict) -> dict:
        """setting -> [`old`'s, this command's] where they differ, but for how it is to begin."""
        # As they come back from a file: lists for tuples. A key that the run there lacks is as it was.
        new = json.loads(json.dumps(asdict(self.cfg)))
        return {k: [old[k], v] for k, v in new.items() if k in old and old[k] != v and k not in REQUEST}

    def given_checkpoint(self, given: str | None) -> str | None:
        if given and not (Path(given) / "trainer_state.json").exists():
            raise ValueError(
                f"resume_from_checkpoint={given} is no complete checkpoint (no trainer_state.json)"
            )
        return given

    def ancestors(self, record: dict, given: str | None) -> list:
        """Whose checkpoints in the directory belong to a run that begins from `given` too."""
        none = [[None, -1]]  # checkpoints without an id are those of a run of before ids
        if not given or Path(given).resolve().parent != self.path.resolve():
            return none if record["id"] is None else []
        state = read_state(given)
        # The ancestors' ancestors, and none of them beyond the step where this run leaves.
        lineage = {None: -1, **{i: step for i, step in record["lineage"]}, state.get("run"): 1 << 60}
        return [[i, min(step, state["step"])] for i, step in lineage.items()]

    def belongs(self, path: Path, start: Start | None = None) -> bool:
        """Whether a checkpoint is this run's. A damaged one is: it may not be passed over without a word."""
        start = start or self.start
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            run, step, lineage = state.get("run"), state["step"], {i: last for i, last in start.lineage}
            # One without an id is anybody's, unless it is known how far those of this directory count.
            if run == start.id or run is None and None not in lineage:
                return True
            return run in lineage and step <= lineage[run]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return True

    def own(self, start: Start | None = None) -> list[Path]:
        return [p for p in checkpoint.checkpoints(self.path) if self.belongs(p, start)]

    # -- what is written

    def begin(self) -> None:
        """The run is built: from now on the directory is its own, or, if there is something of an earlier run
        to lose, from its first checkpoint on. rank 0."""
        left = checkpoint.checkpoints(self.path) or any(p for g in PUBLISHED for p in self.path.glob(g))
        self.waiting = bool(self.start.anew and left)
        if self.waiting and self.cfg.save_strategy == "no" and self.cfg.do_train:
            raise ValueError(
                f"output_dir={self.path} holds a trained model, and save_strategy=no would save none in its "
                "place; choose another output_dir"
            )
        if not self.waiting and self.cfg.do_train:
            self.write_record()
            self.take_over()

    def write_record(self, finished: int | None = None, published: list[str] = ()) -> None:
        start, path = self.start, self.path / "run.json"
        request, first = request_in(asdict(self.cfg)), start.resume and os.path.abspath(start.resume)
        before = schema.read_json(path, "") if path.exists() else None
        if not start.anew:
            first = None
            if before:  # what its first start asked for stands
                request, first = before["request"], before.get("from")
                published = published or before.get("published", [])
        record = {"id": start.id, "settings": asdict(self.cfg), "request": request, "from": first}
        record |= {"lineage": start.lineage, "clears": start.clears, "finished": finished}
        record |= {"published": list(published)}
        # A restart that changes nothing writes nothing: on a full disk it can still say what is there.
        if json.loads(json.dumps(record)) != before:
            checkpoint.write_json(path, record)

    def take_over(self) -> None:
        """After the first checkpoint, or where nothing is to lose: settings and log of this run, and what an
        earlier one left goes, if overwrite_output_dir says so."""
        checkpoint.write_json(self.path / "train_config.json", asdict(self.cfg))
        if self.log_path(True).exists():
            os.replace(self.log_path(True), self.log_path(False))
        for path in self.path.glob("log.jsonl.*.next"):
            path.unlink()
        if self.start.clears and self.start.anew:
            for path in checkpoint.checkpoints(self.path):
                if not self.belongs(path):
                    checkpoint.remove_dir(path)
            for path in [p for pattern in PUBLISHED for p in self.path.glob(pattern)]:
                path.unlink()
        self.waiting = False

    # A kill may come between any two of these: run.json first says whose the checkpoint is that is saved
    # next, and only once that is whole does anything of an earlier run go.

    def before_save(self) -> None:
        if self.waiting or not (self.path / "run.json").exists():
            self.write_record()

    def after_save(self) -> None:
        if self.waiting or not (self.path / "train_config.json").exists():
            self.take_over()
            self.start.anew = False

    def log_path(self, waiting: bool | None = None) -> Path:
        waiting = self.waiting if waiting is None else waiting
        return self.path / (f"log.jsonl.{self.start.id}.next" if waiting else "log.jsonl")

    def finish(self, source: Path, step: int) -> None:
        """The final model's files stand in the output directory
        itself too, and the run is finished. rank 0."""
        before = schema.read_json(self.path / "run.json", "").get("published", [])
        published = publish(source, self.path)
        for name in {*before} - {*published}:
            (self.path / os.path.basename(name)).unlink(missing_ok=True)
        self.write_record(step, published)


def request_in(settings: dict) -> dict:
    """What settings ask of the output directory: only a checkpoint's path says where to begin."""
    given = settings.get("resume_from_checkpoint")
    anew = bool(settings.get("overwrite_output_dir"))
    return {"overwrite_output_dir": anew, "resume_from_checkpoint": given if isinstance(given, str) else None}


def read_state(directory) -> dict:
    """trainer_state.json of a checkpoint, checked; its directory's name says the same step."""
    path = Path(directory) / "trainer_state.json"
    state = schema.read_json(path, "expected a checkpoint-N directory of a training run")
    number = float | int | None
    kinds = {"step": int, "epoch": int | None, "units": int | None, "bad": int, "samples": int}
    kinds |= {"since_best": int, "probe": dict | None}
    kinds |= {"best_step": int | None, "facts": dict | None, "scaler": dict | None, "run": str | None}
    for key, kind in {**kinds, "best_metric": number, "evaluated": bool | None}.items():
        # Runs of before some of them were counted have no such key.
        if key in state or key == "step":
            schema.check(state.get(key), kind, f"{path}: {key}")
    for key in ("epoch", "units", "bad", "samples", "since_best"):
        if (state.get(key) or 0) < 0:
            raise ValueError(f"{path}: {key} is {state[key]}; expected 0 or more; fetch or write it again")
    state.pop("train_state", None)
    name = os.path.basename(os.path.abspath(directory))
    if state["step"] < 0 or name.startswith("checkpoint-") and name != f"checkpoint-{state['step']}":
        raise ValueError(
            f"{path}: step is {state['step']}, the directory is {name}; remove it to resume from another"
        )
    return state


def shown(changed: dict) -> str:
    """Settings with both values."""

    def short(value) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."

    return ", ".join(f"{key} {short(old)} -> {short(new)}" for key, (old, new) in changed.items())


def publish(path: Path, out: Path) -> list[str]:
    """Links where possible, else copies; returns their names."""
    names = []
    for source in sorted(path.iterdir()):
        if source.is_file() and source.name != "trainer_state.json":
            temporary = out / (source.name + ".tmp")
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, out / source.name)
            temporary.unlink(missing_ok=True)  # a rename of one link to a file onto another leaves both
            names.append(source.name)
    return names


class Log:
    """log.jsonl (every step), console lines, progress bar, the logs of report_to. Rank 0 only."""

    def __init__(self, cfg: Config, run_dir: RunDir, start_step: int, total: int, evaluated: bool):
        """`evaluated`: whether the evaluation due at start_step has counted already; else it comes again."""
        self.cfg, self.total, self.path = cfg, total, run_dir.log_path()
        kept, source = [], run_dir.path / "log.jsonl"
        if start_step and source.exists():  # steps after the checkpoint are taken again
            for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
                    r = json.loads(line)
                    again = r["step"] == start_step and "eval_loss" in r and not evaluated
                    if r["step"] <= start_step and not again and not r.get("final"):
                        kept.append(line)
        if cfg.do_train:
            with checkpoint.atomic_file(self.path, "w") as file:
                file.write("".join(line + "\n" for line in kept))
        elif self.path.exists() and not (text := self.path.read_bytes()).endswith(b"\n"):
            # A killed run's half line: ours would be glued to it.
            os.truncate(self.path, text.rfind(b"\n") + 1)
        self.file = open(self.path, "a", encoding="utf-8")
        self.progress = terminal.Progress(total, enabled=not cfg.disable_tqdm)
        run_id = run_dir.start.id
        self.others = loggers.open_logs(cfg.report_to or [], run_dir.path, asdict(cfg), run_id, start_step)

    def write(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as e:
            raise checkpoint.SaveError(self.path, e.strerror) from e
        for other in self.others:
            other.write(record)

    def step(self, r: dict) -> None:
        self.write(r)
        if r["step"] % self.cfg.logging_steps == 0 or r["step"] in (1, self.total):
            sets = "".join(f" | {name} {loss:.4f}" for name, loss in r.get("loss_by_dataset", {}).items())
            print(
                f"step {r['step']:05d}/{self.total:05d} | loss {r['loss']:.4f} | lr {r['lr']:.1e} | gnorm "
                f"{r['grad_norm']:.2f} | {r['ms']:.0f} ms | {r['tokens_per_s']:,.0f} tok/s "
                f"({r['supervised']:.0%} supervised) | data {r['data']:.0%} | mem {r['mem_gib']:.1f}G{sets}",
                flush=True,
            )
        if self.progress.enabled:
            self.progress.update(r["step"], f"loss {r['loss']:.4f}")

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        for other in self.others:
            other.close()


# ---- what ended a run


def goes_on(cfg: Config) -> str:
    last = checkpoint.last_checkpoint(cfg.output_dir)
    return f"the same command {f'continues from {last}' if last else 'begins anew: no checkpoint yet'}"


def explained(error: BaseException, cfg: Config) -> Exception | None:
    """What a dead rank, a dead data worker or a full memory means to the user; None for another error."""
    text, then = one_line(error), goes_on(cfg)
    if worker := re.search(r"DataLoader worker [^;]*?(killed by signal: \w+|exited unexpectedly)", text):
        return ValueError(f"a data worker died (out of memory?): {worker[0]}; lower num_workers; {then}")
    if isinstance(error, ValueError | OSError):
        return None
    if (said := between_ranks(error)) is not None:
        return ConnectionError(f"{said}; {then}")
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ValueError(
            f"out of memory ({text[:200]}); lower per_device_train_batch_size or max_length, or set "
            f"recompute=true or sharding=stage3; {then}"
        )
    if type(error).__name__ == "InductorError":  # of a module that only compilation loads
        return ValueError(
            f"compile=true: torch could not compile a block ({text[:300]}); remove what a kill left half "
            f"written in its cache, or leave compile out; {then}"
        )
    return None
