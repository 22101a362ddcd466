"""Data: records -> conversations -> samples -> token streams, in an order fixed by (files, seed, epoch).

    python data.py check  # open every record and image; or: check CONFIG.json --key value
    python data.py preview --packs 1  # the first stream as the model sees it, boxes drawn onto their images

Top to bottom: entries (files of records) -> length index (measured once, cached) -> plan (shuffle, mixture,
packs, deal to ranks) -> samples and batches -> loader; the two commands stand in data_check.py. A large set
belongs in JSONL: its lines stay on disk, while a JSON document is held in memory by every worker.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import terminal
import vlm
from images import short
from record_files import JsonLines, open_files, read_system
from records import READERS, BadRecord, Conversation, conversations_of, one_record, say_keys, unused_keys
from terminal import cut, nearest, one_line

ROOT = Path(__file__).resolve().parent
# What a command without a dataset trains on: it should run before anything is downloaded.
DEFAULT_DATASET = {
    split: [
        {"name": "coco_vqa", "data_files": f"{ROOT}/samples/flags_zh/{file}", "image_root": f"{ROOT}/samples"}
    ]
    for split, file in (("train", "train.jsonl"), ("eval", "val.jsonl"))
}
# torch's cross entropy knows it as "no target".
IGNORE = -100
CHANGED = "the file was changed after this run had read it; restore it, or begin again"


# --------------------------------------------------------------------------------------------------
# entries


class Entry:
    """One entry of the configuration's "dataset": its files as one sequence of records, and how they are
    read."""

    def __init__(self, settings: dict):
        """settings: the keys of config.EntryKeys, of their types (config.check_entry)."""
        self.settings, self.name = settings, settings.get("name")
        # PaddleMIX's files name the reader; others leave it to the records' own keys.
        if self.name is not None and self.name not in READERS:
            known = f"{', '.join(READERS)}{nearest(self.name, READERS)}"
            raise ValueError(
                f"unknown dataset name {cut(self.name)}; known: {known}; "
                "without a name records are recognised by their keys"
            )
        # Several files are one sequence: VQAv2 has its questions in one and its answers in another.
        self.paths = listed(settings["data_files"])
        for path in self.paths:
            if not os.path.isfile(path) and not os.path.isdir(path):
                raise ValueError(f"data_files: no file {cut(path, 300)} (working directory {os.getcwd()})")
        self.image_root = settings.get("image_root")
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise ValueError(
                f"image_root {cut(self.image_root)} of {self.name or self.paths[0]} is no directory"
            )
        self.weight, self.max_samples = settings.get("weight"), int(settings.get("max_samples") or 0)
        self.splits = listed(settings.get("splits"))
        # hold_out() sets both: the entry stands twice, once for each part.
        self.eval_split, self.eval_part = settings.get("eval_split") or 0.0, bool(settings.get("eval_part"))
        self.system = read_system(settings.get("chat_template"))
        try:
            # Lines of JSONL are found here, and read when they are needed.
            self.sources = open_files(self.paths)
        except (KeyError, TypeError, AttributeError) as e:
            problem = f"missing {e}" if isinstance(e, KeyError) else str(e)
            raise ValueError(f"{', '.join(self.paths)}: not a COCO or VQAv2 document: {problem}") from None
        # Record i of the entry is in the first source whose end is behind i.
        self.ends = np.cumsum([len(source) for source in self.sources]).tolist()
        self.base_label = self.label = f"{self.name or 'data'}:{Path(self.paths[0]).stem}"

    def __len__(self):
        return self.ends[-1]

    @functools.cached_property
    def digests(self) -> list[str]:
        """Of its files' contents, those that were opened: lines may be added meanwhile."""
        sizes = {source.path: source.size for source in self.sources if isinstance(source, JsonLines)}
        return [digest(path, sizes.get(path, math.inf)) for path in self.paths]

    @property
    def contents(self) -> tuple[list[str], int | None]:
        """(digests, size of the last file if lines may be added to it)"""
        last = self.sources[-1]
        lines = isinstance(last, JsonLines) and last.path == self.paths[-1]
        return self.digests, last.size if lines else None

    def goes_on(self, saved: list) -> bool:
        """Whether its records begin with those of which (count, *contents) was saved."""
        (_, digests, size), last = saved, self.sources[-1]
        if digests == self.digests:
            return True
        grown = None not in (size, self.contents[1]) and size <= last.size and last.has_line_end(size)
        # The old part is not taken on trust.
        return grown and [*self.digests[:-1], digest(last.path, size)] == digests

    @property
    def selects(self) -> bool:
        """Whether some of its records are another set's."""
        return bool(self.splits or self.eval_split)

    def locate(self, i: int):
        # -> (source, number within it)
        n = bisect.bisect_right(self.ends, i)
        return self.sources[n], i - (self.ends[n - 1] if n else 0)

    def where(self, i: int) -> str:
        source, i = self.locate(i)
        return source.where(i)

    def conversations(self, i: int) -> list[Conversation]:
        """Record i as conversations; none if "splits" or "eval_split" leave it out. BadRecord if it is
        unusable."""
        # The place is known before the record is read: a line that is no JSON has one too.
        (source, n), where = self.locate(i), self.where(i)
        with one_record(where):
            try:
                # Read from the file each time: an epoch over a large set holds no records in memory.
                record = source[n]
            except ValueError:
                if self.eval_part:  # the training part names it
                    return []
                raise
            # The record's own "split", as Hugging Face's files have it: some records are another set's.
            if self.splits and isinstance(record, dict) and "split" in record:
                if not isinstance(record["split"], str):
                    raise ValueError(f"'split' must be a name, got {cut(record['split'])}")
                if record["split"] not in self.splits:
                    return []
            # By content: the same record is on the same side in every run, and wherever it stands in the
            # file.
            if self.eval_split and (share_of(record) < self.eval_split) != self.eval_part:
                return []
            # One record may be several samples: a list of captions is one for each.
            return conversations_of(
                record, where, os.path.dirname(source.path), i, self.name, self.image_root, self.system
            )


def listed(names):
    """A name alone is a list of one."""
    return [names] if isinstance(names, str) else names


def share_of(record) -> float:
    """A number in [0, 1) that depends on the record's content alone: eval_split compares it."""
    # 48 bits: a float holds them exactly.
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def open_entries(entries: list[dict]) -> list[Entry]:
    if not isinstance(entries, list) or not entries:
        raise ValueError("the dataset has no entry; expected a list of objects with data_files")
    entries = [entry if isinstance(entry, Entry) else Entry(entry) for entry in entries]
    # Two entries of one file have the same name: the second one becomes name#2.
    seen: Counter = Counter()
    for entry in entries:  # losses and scores are logged by label: each its own
        seen[entry.base_label] += 1
        if (n := seen[entry.base_label]) > 1:
            entry.label = f"{entry.base_label}#{n}"
    return entries


def say_unused_keys(entries: list[Entry], first: int = 100) -> None:
    """Names the keys of each entry's first records that nothing reads, and splits that nothing has."""
    for entry in entries:
        found, split = set(), False
        # The first hundred and a hundred over the whole: a file may be joined of several.
        spread = range(0, len(entry), -(-len(entry) // first) or 1)
        for i in sorted({*range(min(first, len(entry))), *spread}):
            source, n = entry.locate(i)
            with contextlib.suppress(ValueError):  # named elsewhere
                found.update(unused_keys(record := source[n]))
                split |= isinstance(record, dict) and "split" in record
        say_keys(entry.label, found)
        if entry.splits and not split:
            print(f"warning: {entry.label}: splits leaves out none: no record has a 'split'", file=sys.stderr)


def say_unused(index: "Index") -> None:
    """Names what of its entries has no effect: whole ones, their system text, keys, splits."""
    for number, entry in enumerate(index.entries):
        samples = np.flatnonzero(index.entry == number)
        if not len(samples):
            print(f"warning: {entry.label}: none of its records is used", file=sys.stderr)
        elif entry.system and index.conversation(samples[0]).kind != "chat":
            what = "chat_template has no effect on captions, questions and boxes"
            print(f"warning: {entry.label}: {what}", file=sys.stderr)
    say_unused_keys(index.entries)


def dataset_of(value: str) -> dict:
    """What the key `dataset` means as "FILE[,EVAL_FILE]" (files or folders): entries of these."""
    # A path may have a comma in it: what exists is meant as it is.
    paths = [value] if os.path.exists(value) else [path.strip() for path in value.split(",")]
    if len(paths) > 2 or not all(paths):
        raise ValueError(
            f"dataset={cut(value)}; expected FILE or FILE,EVAL_FILE, or an object with train and eval"
        )
    return {split: [{"data_files": path}] for split, path in zip(("train", "eval"), paths, strict=False)}


def hold_out(dataset: dict, share: float) -> dict:
    """The dataset with `share` of its training records as the evaluation set."""
    if not share:
        return dataset

    def part(evaluates: bool) -> list[dict]:
        # The same files in both parts; share_of says which part a record is in.
        return [{**entry, "eval_split": share, "eval_part": evaluates} for entry in dataset.get("train", [])]

    return {**dataset, "train": part(False), "eval": part(True)}


# --------------------------------------------------------------------------------------------------
# length index


@dataclass
class Index:
    """What is known of every usable sample before any is loaded. A sample's number is its row."""

    entries: list[Entry]
    # Numbers alone, no texts: what plans and estimates need of a sample.
    rows: np.ndarray  # (N, 7) int64, columns as in COLUMNS
    problems: list[tuple[str, str]]  # (where, reason) of the records left out

    COLUMNS = ("entry", "record", "part", "length", "num_images", "num_supervised", "truncated")

    def __len__(self):
        return len(self.rows)

    # Views of one array: an index of a million samples is 56 MB, and forked workers share it.
    def __getattr__(self, name):  # index.length, index.num_images, ...: columns (N,)
        if name not in Index.COLUMNS:
            raise AttributeError(name)
        return self.rows[:, Index.COLUMNS.index(name)]

    def where(self, number: int) -> str:
        return self.entries[self.entry[number]].where(int(self.record[number]))

    def conversation(self, number: int) -> Conversation:
        # Read anew: the row says which record, and which of its samples.
        found, part = self.entries[self.entry[number]].conversations(int(self.record[number])), self.part
        if part[number] >= len(found):
            raise BadRecord(self.where(number), CHANGED)
        return found[part[number]]


class Measurer:
    """Encodes records and keeps their numbers. decode=True opens the images too (`data.py check`)."""

    def __init__(self, entries, processor, max_length, decode=False):
        self.entries, self.processor, self.max_length = entries, processor, max_length
        # An image that many records name is decoded once.
        self.decode, self.decoded = decode, {}  # source -> what is wrong with it, or None

    def decode_image(self, source: str) -> None:
        if source not in self.decoded:
            self.decoded[source] = None
            try:
                self.processor.load_image(source)
            except ValueError as e:
                self.decoded[source] = e
        if self.decoded[source]:
            raise self.decoded[source]

    def __call__(self, task: tuple[int, int, int]):
        """(entry, first, end) -> rows (n, 7), problems [(entry, record, where, reason)]"""
        number, first, end = task
        entry, rows, problems = self.entries[number], [], []
        for record in range(first, end):
            try:
                # The door: whatever reading or encoding raises is this record's problem, with its place.
                with one_record(entry.where(record)):
                    rows += [
                        (number, record, part, *sizes) for part, sizes in enumerate(self.sizes(entry, record))
                    ]
            except BadRecord as e:  # a record is used whole or not at all
                problems.append((number, record, e.where, e.reason))
        return np.array(rows, dtype=np.int64).reshape(-1, 7), problems

    def sizes(self, entry: Entry, record: int) -> list[tuple[int, ...]]:
        """(length, num_images, num_supervised, truncated) of each of a record's samples."""
        found = []
        for conversation in entry.conversations(record):
            # The same function that training calls: what it measures here it gives there.
            sample = self.processor.encode(conversation, self.max_length)
            # Only `check` decodes: an index looks whether files are there.
            for source in sample["images"] if self.decode else ():
                self.decode_image(source)
            length = len(sample["input_ids"])
            assert length <= self.max_length, (
                f"encode() gave {length} tokens, max_length is {self.max_length}"
            )
            # The first token is never a target.
            supervised = int(np.count_nonzero(sample["labels"][1:] != IGNORE))
            # It would cost a place in a batch and teach nothing.
            if not supervised:
                raise ValueError(f"no supervised token within max_length={self.max_length}")
            found.append((length, len(sample["images"]), supervised, bool(sample["truncated"])))
        return found


def begin_worker(_=None) -> None:
    """In a process of its own: it takes one core, ends when its parent does, however that dies, and leaves
    signals of a terminal to it."""
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group: the parent decides, and its workers end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        # A parent that was killed says nothing; its children get another parent.
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# What a forked process finds in its copy of the memory: nothing is pickled.
_measurer = None  # in a forked worker of measure_all: the parent's Measurer


def _start_worker(measurer):
    global _measurer
    _measurer = measurer
    begin_worker()


def _measure_in_worker(task):
    return _measurer(task)


def measure_all(measurer: Measurer, num_workers: int, progress: bool, saved: tuple | None = None):
    """-> rows, problems and how many records of each entry were read; `saved` are those of the first ones."""
    old_rows, problems, files = saved or (np.zeros((0, 7), np.int64), [], [[0]] * len(measurer.entries))
    # Pieces of 250 records: many enough to share out, large enough that sending them costs nothing.
    tasks, total, counts = [], 0, []
    for number, entry in enumerate(measurer.entries):
        count, begin = len(entry), files[number][0]
        # Where records are left out by their content, how far to read is only known afterwards.
        if entry.max_samples and not entry.selects:
            count = min(count, entry.max_samples)
        counts.append(count)
        total += count - begin
        tasks += [(number, first, min(first + 250, count)) for first in range(begin, count, 250)]
    pool, rows, problems, done = None, [old_rows], [*problems], 0
    bar = terminal.Progress(total, "records read", progress)
    # Forked, not spawned: entries and tokenizer are there already.
    if num_workers and len(tasks) >= 4:
        pool = ProcessPoolExecutor(num_workers, get_context("fork"), _start_worker, (measurer,))
    try:
        # In order, whoever is ready first: the index is the same for any number of workers.
        results = pool.map(_measure_in_worker, tasks) if pool else map(measurer, tasks)
        for (_, first, end), (task_rows, task_problems) in zip(tasks, results, strict=True):
            # (n, 7) of each piece, in the order of the files.
            rows.append(task_rows)
            problems += task_problems
            done += end - first
            bar.update(done, f"{len(problems):,} bad")
    except BrokenProcessPool:
        # They ignore SIGTERM, and may wait for ever for a lock that the dead one held.
        for worker in list(pool._processes.values()):
            worker.kill()
        raise ValueError("a worker that reads records died (out of memory?); try --num_workers 0") from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    # Entry by entry, as without `saved`.
    rows, problems = np.concatenate(rows), sorted(problems, key=lambda p: p[:2])
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    # Of what is usable, not of what was read: max_samples=1000 gives 1,000.
    for number, entry in enumerate(measurer.entries):
        if entry.max_samples:
            keep = np.ones(len(rows), bool)
            keep[np.flatnonzero(rows[:, 0] == number)[entry.max_samples :]] = False
            rows = rows[keep]
    return rows, problems, counts


def digest(path: str, size: float = math.inf) -> str:
    """Of a file's content or its first `size` bytes, or of all files of a directory."""
    if not os.path.isdir(path):
        return checkpoint.file_digest(path, size)
    # A folder of captions: its texts count by content, its images by size.
    listed = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    texts = (".txt", ".json", ".jsonl", ".csv", ".tsv")
    facts = [
        [os.path.relpath(p, path), digest(p) if p.lower().endswith(texts) else os.path.getsize(p)]
        for p in sorted(listed)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def content_key(entries: list[Entry]) -> str:
    """Changes whenever the records of the entries, their order or their mixture do; not with the place of the
    files."""
    facts = []
    for entry in entries:
        # Paths are left out: data may be moved. What shapes the samples stays.
        settings = {
            k: v for k, v in entry.settings.items() if k not in ("data_files", "image_root", "chat_template")
        }
        facts.append([entry.digests, settings, entry.system])
    return short_hash(facts)


def short_hash(value, size: int = 16) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:size]


def index_checksum(rows: np.ndarray, listing: str) -> str:
    return hashlib.sha256(rows.tobytes() + listing.encode()).hexdigest()


def read_index(path: Path) -> tuple[np.ndarray, list, list] | None:
    """A saved index: (rows, problems, files), files as Entry.contents; None if the file is damaged."""
    try:
        with np.load(path) as saved:
            rows, listing, checksum = saved["rows"], str(saved["listing"]), str(saved["checksum"])
        # A kill or a full disk may leave half a file, which would train on wrong lengths.
        if index_checksum(rows, listing) == checksum:
            problems, files = json.loads(listing)
            return rows, [tuple(p) for p in problems], files
        problem = "does not fit its checksum"
    except Exception as e:  # a damaged archive raises all sorts of errors
        problem = f"is damaged ({one_line(e)})"
    print(f"warning: {path} {problem} and is made again", file=sys.stderr)
    return None


def saved_index(folder: Path, key: str, entries: list[Entry]) -> tuple | None:
    """What read_index gives of the same records, or of the first ones: of the newest file that fits."""
    found = sorted(folder.glob(f"index-{key}-*.npz"), key=os.path.getmtime, reverse=True)
    fits = (saved for saved in map(read_index, found) if saved and all(map(Entry.goes_on, entries, saved[2])))
    return next(fits, None)


def build_index(
    entries: list[dict],
    processor,
    max_length: int,
    cache_dir: str | None,
    num_workers: int = 0,
    progress: bool = True,
    max_bad_samples: float = 0.01,
    decode_images: bool = False,
) -> Index:
    """Measure every record once. Image files must exist; they are not decoded unless asked.

    Unusable records are left out and listed; more than a share of max_bad_samples is a ValueError. With
    cache_dir the result is kept there under a key of files, settings, max_length and processor.
    """
    entries = open_entries(entries)
    measurer, saved, path = Measurer(entries, processor, max_length, decode_images), None, None
    if cache_dir:
        # Named by all that a length depends on: the limit, everything that encode() does, where images are
        # looked for; and the files' contents.
        other = {"weight": None, "data_files": None}
        facts = [[[*map(os.path.abspath, e.paths)], e.system, {**e.settings, **other}] for e in entries]
        key = short_hash([max_length, processor.fingerprint(), facts], 24)
        path = Path(cache_dir) / f"index-{key}-{short_hash([e.digests for e in entries])}.npz"
        saved = saved_index(path.parent, key, entries)
    # An image may have been added since: if a record has become good, measure anew.
    if saved and any(not measurer((number, record, record + 1))[1] for number, record, *_ in saved[1]):
        saved = None
    rows, problems, counts = measure_all(measurer, num_workers, progress, saved)
    listed = [(where, reason) for _, _, where, reason in problems]
    num_bad, total = len(listed), len(rows) + len(listed)
    # One line with the first five: the rest is told once those are mended.
    if num_bad > max_bad_samples * total:
        first = "; ".join(f"{where}: {reason}" for where, reason in listed[:5])
        more = f"; and {num_bad - 5:,} more" if num_bad > 5 else ""
        share = f"{num_bad:,} of {total:,} records are unusable, max_bad_samples={max_bad_samples:g} allows"
        raise ValueError(f"{share} {int(max_bad_samples * total):,}: {first}{more}")
    # `data.py check` says so itself, with all that it found.
    if not len(rows) and not decode_images:
        files = ", ".join(p for entry in entries for p in entry.paths)
        if listed:
            where, reason = listed[0]
            raise ValueError(f"none of the {num_bad:,} records in {files} is usable; {where}: {reason}")
        raise ValueError(
            f"the dataset is empty: no sample in {files} (after splits, eval_split and max_samples)"
        )
    if path and not (saved and path.exists()):
        # Problems too: a restart names them again without reading the data.
        listing = json.dumps([problems, [[n, *e.contents] for n, e in zip(counts, entries, strict=True)]])
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: another rank may be waiting for it.
        with checkpoint.atomic_file(path) as file:
            np.savez(file, rows=rows, listing=listing, checksum=index_checksum(rows, listing))
    return Index(entries, rows, listed)


# ------------------------------------------------------------------------------------------------
# plan


# numpy.random is named in quotes: it is loaded when it is used.
def generator(*seed: int) -> "np.random.Generator":
    # NumPy promises PCG64's stream: the same order on every machine and version.
    return np.random.Generator(np.random.PCG64(seed))


@dataclass(frozen=True)
class Deal:
    """How a step's units are dealt out to ranks and forward passes: it changes who computes what, not what a
    step is."""

    dp_rank: int = 0
    dp_size: int = 1
    per_device_batch: int = 1
    grad_accum: int = 1


class Plan:
    """Which samples make up step k: a pure function of (index, seed, epoch).

    A unit is one sample, or with mixtoken a stream of samples that fills max_length tokens (and holds at most
    max_images images). A step takes the next global_batch units of its epoch; the last one may take fewer.
    global_batch = per_device_batch * grad_accum * dp_size; how it splits into these three changes no step.
    """

    def __init__(
        self, index: Index, seed: int, max_length: int, mixtoken=False, max_images=None, shuffle=True
    ):
        self.index, self.seed, self.max_length = index, seed, max_length
        self.mixtoken, self.max_images, self.shuffle = mixtoken, max_images, shuffle
        # One epoch's units are kept: steps ask for them one after the other.
        self.cached = None, None  # epoch, units
        # the run stands behind (step, epoch, units of it); later steps count from there
        self.origin = (0, 0, 0)
        self.num_units = {}  # epoch -> number of units: packs differ a little from one shuffle to the next
        # It would fit into no pack.
        if mixtoken and max_images and index.num_images.max() > max_images:
            n = int(index.num_images.argmax())
            raise ValueError(
                f"{index.where(n)} has {index.num_images[n]} images, more than max_images={max_images}"
            )
        # All entries or none: a missing one could mean 0 or 1.
        weights = [entry.weight for entry in index.entries]
        # An evaluation takes every sample once, whatever the weights.
        self.weighted = shuffle and any(w is not None for w in weights)
        if self.weighted:
            if None in weights or not sum(weights):
                raise ValueError(
                    f"weights of the dataset entries are {weights}; give every entry one, or none"
                )
            # Any positive numbers: they are made to add up to 1.
            self.shares = np.array(weights, float) / sum(weights)
            self.members = [np.flatnonzero(index.entry == e) for e in range(len(weights))]
            for entry, members in zip(index.entries, self.members, strict=True):
                if entry.weight and not len(members):
                    raise ValueError(f"dataset entry {entry.label} has weight {entry.weight} but no sample")

    def order(self, epoch: int) -> np.ndarray:
        """Sample numbers in the order of training. With weights an epoch is as many draws as there are
        samples."""
        if not self.shuffle:
            return np.arange(len(self.index))
        # A function of (seed, epoch) alone: any process, at any time, can say what comes where.
        if not self.weighted:
            return generator(self.seed, epoch).permutation(len(self.index))
        # Not drawn at random: after n samples each entry has its share of n, to within one sample.
        # How many samples each entry has given so far.
        drawn, order = np.zeros(len(self.shares)), np.empty(len(self.index), np.int64)
        passes = [self.passes(epoch, e) for e in range(len(self.shares))]
        for n in range(len(order)):
            e = int(np.argmax(self.shares * (n + 1) - drawn))  # the entry that lags most behind its share
            order[n] = next(passes[e])
            drawn[e] += 1
        return order

    def passes(self, epoch: int, e: int) -> Iterator[int]:
        turn = 0
        # A small entry comes round several times an epoch, each time in another order.
        while True:
            yield from generator(self.seed, epoch, e, turn).permutation(self.members[e])
            turn += 1

    def units(self, epoch: int) -> list[np.ndarray]:
        if self.cached[0] != epoch:
            order = self.order(epoch)
            # Without packs a unit is one sample: (N,) -> N arrays of (1,).
            units = self.pack(order) if self.mixtoken else list(order.reshape(-1, 1))
            self.cached, self.num_units[epoch] = (epoch, units), len(units)
        return self.cached[1]

    def pack(self, order: np.ndarray) -> list[np.ndarray]:
        # Plain lists: a loop over NumPy numbers is slow.
        lengths, images = self.index.length[order].tolist(), self.index.num_images[order].tolist()
        borders, tokens, shown = [], 0, 0
        for n, (length, count) in enumerate(zip(lengths, images, strict=True)):
            # Greedy, in the order of training: a pack never waits for a sample that comes later.
            if tokens + length > self.max_length or (self.max_images and shown + count > self.max_images):
                borders.append(n)
                tokens = shown = 0
            # A sample of max_length is a pack of its own: encode() makes none longer.
            tokens, shown = tokens + length, shown + count
        return np.split(order, borders)

    def count(self, epoch: int) -> int:
        """Units of an epoch."""
        # Without packs it is known without a shuffle.
        if not self.mixtoken:
            return len(self.index)
        if epoch not in self.num_units:
            self.units(epoch)
        return self.num_units[epoch]

    def steps_per_epoch(self, global_batch: int, epoch: int = 0) -> int:
        # Rounded up: the last step of an epoch may take fewer units.
        return -(-self.count(epoch) // global_batch)

    def total_steps(self, num_epochs: float, global_batch: int) -> int:
        """Of the whole run, of which origin's steps are done."""
        steps, epoch, first = self.origin
        for e, end in self.ends(num_epochs, global_batch):
            # Epochs before the origin are done, whatever batch they were done with.
            if e >= epoch:
                steps += max(0, -(-(end - (first if e == epoch else 0)) // global_batch))
        return steps

    def ends(self, num_epochs: float, global_batch: int) -> list[tuple[int, int]]:
        """(epoch, how many of its units are trained on)"""
        # 0.5 epochs: half of its steps, rounded up to whole ones.
        whole, part = int(num_epochs), num_epochs % 1
        # Whole epochs, then the part of one.
        ends = [(epoch, self.count(epoch)) for epoch in range(whole)]
        if part:
            steps = math.ceil(part * self.steps_per_epoch(global_batch, whole))
            ends.append((whole, min(self.count(whole), steps * global_batch)))
        return ends

    def locate(self, step: int, global_batch: int) -> tuple[int, int]:
        """Step of the run -> (epoch, first of its units there)."""
        start, epoch, first = self.origin
        # From the origin on: a run whose batch has changed counts its steps from there.
        step -= start
        while step >= (steps := -(-(self.count(epoch) - first) // global_batch)):
            step, epoch, first = step - steps, epoch + 1, 0
        return epoch, first + step * global_batch

    def micro_batches(self, step: int, deal: Deal) -> tuple[int, list[list[np.ndarray]]]:
        """-> (epoch, one list of units per forward pass of this rank). All ranks get equally many lists, some
        empty."""
        # One forward pass of all ranks together.
        round_size = deal.per_device_batch * deal.dp_size
        epoch, first = self.locate(step, round_size * deal.grad_accum)
        # The units of the whole step, of all ranks: every rank knows them, and takes its own.
        units = self.units(epoch)[first : first + round_size * deal.grad_accum]
        # A round is one forward pass of all ranks; dealt out in turn, so that the last one is even too.
        rounds = [units[start : start + round_size] for start in range(0, len(units), round_size)]
        return epoch, [units_of_round[deal.dp_rank :: deal.dp_size] for units_of_round in rounds]


# --------------------------------------------------------------------------------------------------
# Samples and batches


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 -> well mixed uint64 (Steele et al., 2014, "Fast splittable pseudorandom number generators")."""
    # Wraps around at 2^64: that is meant.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_keys(*parts) -> np.ndarray:
    """int64 hash of whole numbers and arrays of them, for dropout masks that no layout changes."""
    # Folded one by one: (1, 2) and (2, 1) are different keys.
    state = np.zeros(1, np.uint64)
    # Arrays are broadcast: (3 numbers, (T,) positions) -> (T,) keys.
    for part in parts:
        state = splitmix64(state ^ np.atleast_1d(part).astype(np.uint64))
    return state.view(np.int64)


def jitter(image: torch.Tensor, fraction: float, rng: "np.random.Generator") -> torch.Tensor:
    """(3, H, W), moved by up to that fraction of a side, scaled by up to it, turned by up to as many radians,
    edge pixels repeated; brightness by up to 0.1 std (3%).

    Boxes in the text stay where they were: keep the fraction below the precision they need.
    """
    # One draw of the sample's own generator: the same in every epoch that has this key.
    dx, dy, scale, angle = rng.uniform(-fraction, fraction, 4)
    # Rotation and scale in one matrix; the image is sampled at where each pixel comes from.
    cos, sin = (1 + scale) * np.cos(angle), (1 + scale) * np.sin(angle)
    # in grid_sample's units, an image is 2 wide
    matrix = torch.tensor([[[cos, -sin, 2 * dx], [sin, cos, 2 * dy]]], dtype=image.dtype)
    grid = F.affine_grid(matrix, [1, *image.shape], align_corners=False)
    moved = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    return moved + rng.uniform(-0.1, 0.1)


def attach_images(
    sample: dict, processor, features=None, image_jitter: float = 0.0, seed: tuple = ()
) -> dict:
    """Add what collate needs of the sample's images: pixel_values, or image_features from
    `features.get(path)`."""
    # collate knows samples, not processors.
    sample["num_image_tokens"] = processor.num_image_tokens
    # Cached: the image itself is not opened at all.
    if features is not None:
        found = [features.get(path) for path in sample["images"]]
        for path, feature in zip(sample["images"], found, strict=True):
            if feature is None:
                processor.load_image(path)  # says what is wrong with it
                raise ValueError(f"no cached features of image {short(path)}")
        sample["image_features"] = [torch.as_tensor(feature) for feature in found]
        return sample
    # Decoded by the worker: (3, H, W) fp32 each.
    sample["pixel_values"] = [processor.load_image(path) for path in sample["images"]]
    if image_jitter:
        images = enumerate(sample["pixel_values"])
        sample["pixel_values"] = [jitter(image, image_jitter, generator(*seed, n)) for n, image in images]
    return sample


def load_sample(plan: Plan, number: int, epoch: int, processor, image_jitter=0.0, features=None) -> dict:
    """Sample `number`, ready for collate. Raises BadRecord if it can't be read or an image can't be
    decoded."""
    # The record is read and encoded here, in a worker, when its step is near.
    entry, conversation = int(plan.index.entry[number]), plan.index.conversation(number)
    key = (plan.seed, epoch, int(number))  # all that is random in this sample is a function of it
    # Whatever a record does wrong, here or in its images, is that record's fault and has its name.
    with one_record(conversation.where):
        if image_jitter and conversation.boxed:
            raise ValueError(
                "image_jitter moves images, but not the boxes in its text; leave image_jitter out"
            )
        sample = processor.encode(conversation, plan.max_length)
        if len(sample["input_ids"]) != plan.index.length[number]:
            raise ValueError(CHANGED)
        attach_images(sample, processor, features, image_jitter, seed=key)
    sample.update(sample_id=f"{conversation.where}#{conversation.id}", dataset_id=entry, key=key)
    return sample


def collate(samples: list[vlm.Sample], bad=(), num_image_tokens: int = 0, blank_ids=(0,)) -> vlm.Batch:
    """Samples -> one stream of T tokens and S segments. No sample: a segment of `blank_ids` that predicts
    nothing."""
    if not samples:
        ids = np.array(blank_ids, np.int32)
        blank = {"input_ids": ids, "labels": np.full(len(ids), IGNORE), "image_starts": [], "images": []}
        samples = [{**blank, "num_image_tokens": num_image_tokens}]
    # Samples one after the other, no padding: T is the sum of their lengths.
    lengths = [len(sample["input_ids"]) for sample in samples]
    starts = np.cumsum([0, *lengths])
    # An image's Q places follow each other from its start on.
    places = np.arange(samples[0].get("num_image_tokens", num_image_tokens))  # (Q,)
    assert len(places) or not any(s["image_starts"] for s in samples), (
        "collate needs num_image_tokens (attach_images)"
    )
    # (0, Q): a stream without an image has an empty list of places, not none.
    targets, keys, image_keys, positions = [], [], [], [np.zeros((0, len(places)), np.int64)]
    for sample, start, length in zip(samples, starts, lengths, strict=False):
        # labels are shifted here, inside the segment: its last token has nothing to predict
        targets.append(np.append(sample["labels"][1:], IGNORE))
        key = sample.get("key", (0, 0, 0))
        # By (seed, epoch, sample, position): dropout is the same wherever the sample stands.
        keys.append(hash_keys(*key, np.arange(length)))
        # 2^32: no position of a token has that number.
        image_keys += [hash_keys(*key, 1 << 32, n) for n in range(len(sample["image_starts"]))]
        # Places in the sample -> rows of the stream.
        positions += [(start + first + places)[None] for first in sample["image_starts"]]

    # int64: what embeddings and index_copy take.
    def joined(arrays, axis=0):
        return torch.from_numpy(np.concatenate(arrays, axis).astype(np.int64))

    def images(name):
        found = [image for sample in samples for image in sample.get(name, [])]
        return torch.stack(found) if found else None

    prefix_lens = None
    # A model that is causal throughout gives none.
    if any("prefix_len" in sample for sample in samples):
        prefix_lens = torch.tensor([sample["prefix_len"] for sample in samples])
    return vlm.Batch(
        input_ids=joined([sample["input_ids"] for sample in samples]),
        # Restart in each segment; with several axes they are joined along the last one.
        position_ids=joined([s.get("position_ids", np.arange(len(s["input_ids"]))) for s in samples], -1),
        # int32: what attention kernels take.
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        targets=joined(targets),
        pixel_values=images("pixel_values"),
        image_features=images("image_features"),
        image_positions=joined(positions),
        prefix_lens=prefix_lens,
        dropout_keys=joined(keys),
        image_dropout_keys=joined(image_keys or [np.zeros(0, np.int64)]),
        dataset_ids=torch.tensor([sample.get("dataset_id", 0) for sample in samples]),
        sample_ids=[sample.get("sample_id", "") for sample in samples],
        bad=list(bad),
    )


def pad_stream(batch: vlm.Batch, length: int) -> vlm.Batch:
    """The batch with a segment behind it that fills its stream to `length` tokens and predicts nothing."""
    # Pipeline stages exchange tensors of one shape: a segment of nothing behind the others.
    missing = length - len(batch.input_ids)
    if not missing:
        return batch

    def padded(x, count, value=0):
        return None if x is None else F.pad(x, (0, count), value=value)

    return replace(
        batch,
        input_ids=padded(batch.input_ids, missing),
        targets=padded(batch.targets, missing, IGNORE),
        position_ids=padded(batch.position_ids, missing),
        dropout_keys=padded(batch.dropout_keys, missing),
        cu_seqlens=padded(batch.cu_seqlens, 1, length),
        prefix_lens=padded(batch.prefix_lens, 1),
    )


# --------------------------------------------------------------------------------------------------
# The loader


class TrainLoader:
    """Yields (step, epoch, [batch per forward pass of this rank]) for `steps`, in their order.

    The batches are the same for any num_workers. A sample that fails to load is left out and listed in
    batch.bad.
    """

    def __init__(
        self,
        plan: Plan,
        processor,
        steps: range,
        deal: Deal = Deal(),
        num_workers: int = 0,
        image_jitter: float = 0.0,
        features=None,
    ):
        if image_jitter and features is not None:
            raise ValueError(
                "image_jitter changes the images, cache_image_features keeps them; use one of the two"
            )
        self.plan, self.processor, self.steps, self.deal = plan, processor, steps, deal
        self.num_workers, self.image_jitter, self.features = num_workers, image_jitter, features

    def __len__(self):
        return len(self.steps)

    # A step's number is all that a worker gets: it reads, encodes and decodes by itself.
    def __getitem__(self, k: int):
        # k counts from 0 in this run, the step from the run's beginning.
        step = self.steps[k]
        epoch, rounds = self.plan.micro_batches(step, self.deal)
        return step, epoch, [self.load(epoch, units) for units in rounds]

    def load(self, epoch: int, units: list[np.ndarray]) -> vlm.Batch:
        # An empty list of units is a rank that has none left: collate makes it a blank segment.
        samples, bad = [], []
        for number in (int(number) for unit in units for number in unit):
            options = self.processor, self.image_jitter, self.features
            try:
                samples.append(load_sample(self.plan, number, epoch, *options))
            except BadRecord as e:
                bad.append((e.where, e.reason))
        return collate(samples, bad, self.processor.num_image_tokens, self.processor.blank_ids)

    def __iter__(self):
        # Batches are made by __getitem__: the loader only brings them, in order.
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            collate_fn=lambda item: item,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
            # Forked: index, entries and tokenizer are shared, not sent.
            multiprocessing_context="fork" if self.num_workers else None,
        )
        try:
            yield from loader
        except RuntimeError as e:
            # A worker that was killed (memory) leaves no traceback of its own.
            if "DataLoader worker" not in str(e) or "exited unexpectedly" not in str(e):
                raise
            raise ValueError(f"a data worker died (out of memory?); lower num_workers: {one_line(e)}") from e


# --------------------------------------------------------------------------------------------------
# A checkpoint's processor


def model_directory(model: str | None, name: str) -> str:
    """The checkpoint directory that `name` means; "tiny" is the model's small one in samples/."""
    if name == "tiny" and not os.path.isdir(name):
        model = model or "qwen_vl"
        if not (path := ROOT / f"samples/tiny_{model}").is_dir():
            tiny = sorted(p.name.removeprefix("tiny_") for p in (ROOT / "samples").glob("tiny_*"))
            have = f"there is one of {', '.join(tiny)}{nearest(model, tiny)}"
            raise ValueError(f"no tiny checkpoint of model {model!r}; {have}")
        return str(path)
    if not os.path.isdir(name):
        raise ValueError(
            f"model_name_or_path={name!r} is no directory; download the checkpoint (config.json, weights, "
            "tokenizer files) and give the path of its directory"
        )
    return name


def load_processor(directory: str, stage: str = "sft"):
    """The processor of the checkpoint's own model file."""
    return vlm.find(checkpoint.read_config(directory)).processor(directory, stage)


def main(argv: list[str] | None = None) -> int:
    import data_check  # not above: its commands stand on all of this file

    return data_check.main(argv)


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
