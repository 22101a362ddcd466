"""What a person sees at the terminal: help, a mistake as one line, a progress bar, the next command.

sys.exit(cli(main))               # every script: error: what, where, expected, remedy
bar = Progress(total=2000, what="training")
bar.update(120, "loss 2.31")      # [####......] 120/2000 training, loss 2.31, 3:05 left
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
from pathlib import Path

from images import is_data_url
from meeting import between_ranks, check_environment

# ---- words of messages


def nearest(word: str, known) -> str:
    """A hint at the known word that is meant: a like one, or the one that ends in it ("batch_size"); else
    nothing."""
    known, word = list(known), str(word)[:100]
    # Letters that are swapped or missing; and words of which the first part was left out.
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    close = close or [k for k in known if len(word) > 4 and k.endswith(f"_{word}")]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The error's message as one printable line of bounded length."""
    text = error if isinstance(error, str) else str(error)
    if (
        isinstance(error, KeyError | AttributeError | TypeError | AssertionError | RecursionError)
        or not text.strip()
    ):
        text = f"{type(error).__name__}: {text}"  # such a text alone says little
    text = printable(" ".join(text[: 4 * limit].split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str, keep: str = "") -> str:
    """With codes in place of what no terminal shows or what would steer it: control characters, invisible
    ones, half characters; but for those of `keep`."""
    # category Zs: blanks of any width
    shown = (c.isprintable() or c in keep or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if s else c.encode("unicode_escape").decode() for c, s in zip(text, shown, strict=True))


def cut(value, limit: int = 60) -> str:
    """A value for a message."""
    text = repr(value[: 2 * limit] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---- a script from its beginning to its end


def is_main() -> bool:
    """Whether this process speaks for all: known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """What is no result and no error, said once."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def cli(main) -> int:
    """Run a script's main(): a user's mistake becomes one line on stderr and exit code 1."""
    # a terminal that lacks a character shows its code, and nothing is lost
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_environment()
        return main()
    # `python data.py preview | head` is no error of anybody's.
    except BrokenPipeError:
        # or Python complains once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(
            "error: nobody reads the standard output any more (broken pipe); what is saved stands",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, RuntimeError) as e:
        # What torch raises otherwise is a fault of ours, and its traceback is wanted.
        between = between_ranks(e) if isinstance(e, RuntimeError) else None
        if isinstance(e, RuntimeError) and between is None:
            raise
        # Of many ranks each says who it is: which one failed first is what matters.
        many = "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1"
        rank = f"[rank {os.environ['RANK'][:9]}] " if many else ""
        said = between or str(e)
        # OSError's own text repeats the error number; file and reason are what helps.
        if isinstance(e, OSError) and e.filename and e.strerror:
            said = f"{e.filename}: {e.strerror}"
        print(f"error: {rank}{printable(' '.join(said.splitlines()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # As a shell reports Ctrl-C.
        return 130


def leave(code: int) -> None:
    """Ends the script. Of several ranks without the interpreter's own end: threads of the collectives that
    are still letting go of tensors would abort it (2 of 12 pipelines of two ranks that had finished their
    work)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)


# ---- the command line of the scripts that have no configuration file


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,15}", text):
        raise ValueError
    return int(text)


finite.__name__, whole.__name__ = "number", "int"  # the names in argparse's messages


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False, [], argparse.SUPPRESS) or action.required:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help, no abbreviated keys, finite
    numbers, and errors that are one line."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})
        self.register("type", float, finite)
        self.register("type", int, whole)

    def error(self, message: str):
        # argparse names all that it did not know; the first one is enough, with what was meant.
        if match := re.match(r"unrecognized arguments: (-\S*)", message):
            options = [o for action in self._actions for o in action.option_strings]
            near = difflib.get_close_matches(match[1].partition("=")[0], options, n=1, cutoff=0.7)
            message = f"unknown key {match[1]}" + (f"; did you mean {near[0]}?" if near else "")
        raise ValueError(f"{message} ({os.path.basename(self.prog.split()[0])} --help lists all)")


def help_lines(name: str, kind: str, text: str) -> list[str]:
    """One key in a help text: name and type, then its meaning in a column of its own."""
    head, column = f"  {name} {kind}", 40
    width = min(shutil.get_terminal_size().columns, 110)
    lines = textwrap.wrap(text, max(width - column, 30), break_long_words=False, break_on_hyphens=False)
    first = [head.ljust(column) + lines.pop(0)] if len(head) < column else [head]
    return first + [" " * column + line for line in lines]


def free_name(name: str, lora_path) -> str:
    """A directory for the merge of this adapter that no other merge stands in."""
    # A name that is taken would make the next command fail, and nobody knows what else stands there.
    for n in range(1, 10_000):
        place = Path(name if n == 1 else f"{name}_{n}")
        info = place / "merge_info.json"
        if not place.exists():
            return str(place)
        with contextlib.suppress(ValueError, OSError, AttributeError):
            if json.loads(info.read_text(encoding="utf-8")).get("adapter") == str(lora_path):
                return str(place)  # an earlier merge of the same adapter
    return f"{name}_{os.getpid()}"


def script(name: str) -> str:
    """How one of the project's scripts is started from the working directory."""
    path = Path(__file__).resolve().parent / name
    return f"python {name if Path.cwd() == path.parent else shlex.quote(str(path))}"


def example_request(conversation, processor) -> str:
    """--image, --prompt and --stage of generate.py that ask what the model learned to answer by a record."""
    images = [f"--image {shlex.quote(source)}" for source in conversation.images if not is_data_url(source)]
    # A record's own question: what a model was trained on is what it can show.
    prompt = processor.asked(conversation).strip().replace("\n", " ")
    stage = [] if processor.stage == "sft" else [f"--stage {processor.stage}"]
    return " ".join([*images[:1], f"--prompt {shlex.quote(prompt[:200])}", *stage])


# ---- the progress bar


class Erasing:
    """A standard stream that erases the bar before it writes anything else on that line."""

    def __init__(self, stream, bar: "Progress"):
        self.stream, self.bar = stream, bar

    def write(self, text: str) -> int:
        self.bar.erase()
        return self.stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Progress:
    """A bar on stderr with the time that is left, as wide as the terminal. Nothing where stderr is no
    terminal.

    While it is shown, whatever else is printed erases it first.
    """

    def __init__(self, total: int, what: str = "", enabled: bool = True):
        self.total, self.what = total, what
        self.started = None  # (seconds, count) of the first update
        self.enabled = enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.streams, self.shown, self.drawn_at = None, False, -math.inf

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self.started = self.started or (now, done)
        if not self.enabled or (now - self.drawn_at < 0.1 and done < self.total):
            return
        # From the first update on, so that whatever prints in between does not tear the bar.
        if self.streams is None:
            self.streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (Erasing(stream, self) for stream in self.streams)
        self.drawn_at, self.shown = now, True
        columns = shutil.get_terminal_size().columns
        self.streams[1].write("\r\033[K" + self.line(done, note, now, columns))
        self.streams[1].flush()
        if done >= self.total:
            self.close()

    def line(self, done: int, note: str, now: float, columns: int) -> str:
        # From the first update: a run that goes on at step 900 has not made 900 steps in this time.
        since, first = self.started
        parts = [part for part in (self.what, note) if part]
        if done > first:
            parts.append(f"{clock((now - since) / (done - first) * (self.total - done))} left")
        text = f" {done}/{self.total} " + ", ".join(parts)
        # As much bar as there is room for; of a narrow terminal the numbers are worth more.
        room = min(columns - len(text) - 3, 40)
        filled = room * done // max(self.total, 1)
        bar = f"[{'#' * filled}{'.' * (room - filled)}]" if room >= 5 else ""
        return (bar + text)[: columns - 1]

    def erase(self) -> None:
        if self.shown:
            self.shown = False
            self.streams[1].write("\r\033[K")
            self.streams[1].flush()

    def close(self) -> None:
        """Erases the bar and gives the standard streams back."""
        self.erase()
        if self.streams is not None:
            sys.stdout, sys.stderr = self.streams
            self.streams = None


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
