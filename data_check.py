"""The commands `python data.py check|preview`: what is wrong with a data set, and what a model sees of it.

check opens every record and image, names what is or looks wrong, and counts. preview prints the first streams
token by token, supervised ones in colour, and draws their boxes onto the images.
"""

import os
import re
import sys
from collections.abc import Iterator

import numpy as np

import metrics
from config import PreviewConfig, parse_config
from data import (
    DEFAULT_DATASET,
    IGNORE,
    Index,
    Plan,
    build_index,
    load_processor,
    model_directory,
    say_unused,
)
from draw import draw_boxes
from images import is_constant, open_image, short
from records import text_of
from terminal import cut, nearest, printable

BOX_TAGS = {f"<{end}{tag}>" for tag in ("ref", "box", "quad") for end in ("", "/")}


def check(dataset: dict, processor, settings: dict) -> int:
    """Opens every record and image; prints what is or looks wrong, and sums. Returns 1 if a record is
    unusable."""
    found = 0
    for split, entries in dataset.items():
        # every problem is wanted, not the first few of too many
        index = measured(entries, processor, settings, decode_images=True)
        for where, reason in index.problems:
            print(f"{where}: {reason}")
        say_unused(index)
        found += len(index.problems)
        if not len(index):
            print(f"{split}: no usable sample")
            found += 1
            continue
        doubts = 0  # samples that train, and look wrong: they do not fail the command
        for where, doubt in odd_samples(index, processor, settings["image_jitter"]):
            print(f"{where}: note: {doubt}")
            doubts += 1
        tokens, max_length = index.length.sum(), settings["max_length"]
        # packed, whether the configuration packs or not: it shows what mixtoken would bring
        packs = len(Plan(index, settings["seed"], max_length, True, settings["max_images"]).units(0))
        print(
            f"{split}: {sum(map(len, index.entries)):,} records, {len(index):,} samples, "
            f"{index.num_images.sum():,} images | tokens mean {index.length.mean():.1f} max "
            f"{index.length.max():,}, {index.num_supervised.sum() / tokens:.1%} supervised | "
            f"{index.truncated.sum():,} truncated | {packs:,} packs at max_length={max_length:,}, "
            f"{tokens / packs / max_length:.1%} full | {len(index.problems):,} problems, {doubts:,} notes"
        )
    return 1 if found else 0


def measured(entries: list, processor, settings: dict, **more) -> Index:
    """Of all usable records, however many are not; no cache, since images may have changed."""
    size, workers = settings["max_length"], settings["num_workers"]
    return build_index(entries, processor, size, None, workers, max_bad_samples=1.0, **more)


def odd_samples(index: Index, processor, image_jitter: float = 0.0) -> Iterator[tuple[str, str]]:
    """(where, what) of samples that can be trained on and are probably not what was meant."""
    seen: dict[str, bool] = {}  # an image that many records name is opened once
    # As in the originals, a typed <|im_end|>, </s> or <sop> is the token; those of boxes are meant to be.
    try:
        reserved = processor.template()["reserved"]
    except (AttributeError, ValueError):  # exports ask for it: a fork may have none, as BLIP-2's stage 1
        reserved = []
    ends = [processor.tokenizer.decode(stop) for stop in processor.stop_words]  # OPT's is a line break
    special = re.compile("|".join(map(re.escape, set(reserved) - BOX_TAGS)) or "(?!)")
    for number in np.flatnonzero(index.part == 0):  # a record's other samples have the same images
        conversation = index.conversation(number)
        for source in conversation.images:
            if source not in seen:
                seen[source] = is_constant(open_image(source))
            if seen[source]:
                yield conversation.where, f"image {short(source)} has one colour throughout"
        for role, content in conversation.turns:
            text = text_of(content)
            if problem := box_problems(text):
                yield conversation.where, problem
            # what other tools write where a table has no value
            if text.strip().lower() in ("nan", "null", "none", "n/a", "undefined", "<na>", "[]", "{}"):
                yield conversation.where, f"the {role}'s text is {cut(text)}: a missing value?"
            if found := special.search(text):
                yield conversation.where, f"the {role}'s text has {found[0]}, a special token of this model"
            elif role == "assistant" and (end := next((e for e in ends if e and e in text.strip()), None)):
                yield conversation.where, f"an answer goes on behind {end!r}, where this model's answers end"
        if image_jitter and conversation.boxed:
            yield (
                conversation.where,
                "image_jitter moves its image, but not its boxes: training leaves it out",
            )
        answer = text_of(conversation.turns[-1][1])
        if conversation.kind == "vqa" and not metrics.any_case(answer, conversation.answers):
            yield conversation.where, f"the answer {cut(answer)} is none of those that it is scored by"


def box_problems(text: str) -> str | None:
    """What is wrong with the boxes of a text, whose corners are thousandths of the image's sides: 0 to
    999."""
    for tag in ("ref", "box", "quad"):
        if text.count(f"<{tag}>") != text.count(f"</{tag}>"):
            return f"the tags <{tag}> and </{tag}> don't match"
    for box in re.findall(r"<box>(.*?)</box>", text, re.S):
        numbers = re.fullmatch(r"\s*\((\d+),(\d+)\),\((\d+),(\d+)\)\s*", box)
        if not numbers:
            return f"box {cut(box)} is not of the form (x1,y1),(x2,y2) with whole numbers"
        if any(len(n) > 3 for n in numbers.groups()):
            return f"box {cut(box)} goes beyond 999; corners are thousandths of the image's sides, not pixels"
        x1, y1, x2, y2 = map(int, numbers.groups())
        if x1 > x2 or y1 > y2:
            return f"box {cut(box)} has its corners swapped; the upper left one comes first"
    return None


def coloured(sample: dict, processor) -> str:
    """A sample's text: supervised tokens green, others grey, an image as one bracket; with NO_COLOR
    (no-color.org) supervised tokens between »«."""
    plain = bool(os.environ.get("NO_COLOR"))
    image, green, grey, end_colour = (
        ("", "»", "", "") if plain else ("\033[36m", "\033[32m", "\033[90m", "\033[0m")
    )
    ids, supervised = sample["input_ids"], sample["labels"] != IGNORE
    supervised[0] = False  # nothing stands before it that could predict it
    Q, pieces, t = processor.num_image_tokens, [], 0
    # first place -> (number, source): the image's Q places have ids that say nothing
    spans = dict(zip(sample["image_starts"], enumerate(sample["images"], 1), strict=True))
    while t < len(ids):
        if t in spans:
            n, source = spans[t]
            pieces.append(f"{image}[image {n}: {short(source)}, {Q} tokens]{end_colour}")
            t += Q
            continue
        # one run of tokens of one colour: decoded together, since a character may be several tokens
        end = t + 1
        while end < len(ids) and end not in spans and supervised[end] == supervised[t]:
            end += 1
        colour, after = (green, "«" if plain else end_colour) if supervised[t] else (grey, end_colour)
        text = printable(processor.tokenizer.decode(ids[t:end].tolist()), keep="\n\t")
        pieces.append(f"{colour}{text}{after}")
        t = end
    return "".join(pieces)


def preview(dataset: dict, processor, settings: dict) -> int:
    index, max_length = measured(dataset["train"], processor, settings), settings["max_length"]
    for where, reason in index.problems:
        print(f"left out {where}: {reason}")
    say_unused(index)
    plan = Plan(index, settings["seed"], max_length, settings["mixtoken"], settings["max_images"])
    for n, unit in enumerate(plan.units(0)[: settings["packs"]]):
        print(f"=== stream {n}: {len(unit)} samples, {index.length[unit].sum():,} of {max_length:,} tokens")
        for number in map(int, unit):
            conversation = index.conversation(number)
            sample = processor.encode(conversation, max_length)
            size, supervised = len(sample["input_ids"]), index.num_supervised[number]
            print(f"--- {conversation.where} | {size:,} tokens, {supervised:,} supervised")
            print(coloured(sample, processor))
            drawing = os.path.join(settings["out"], f"sample_{number}.png")
            answer = text_of(conversation.turns[-1][1])
            if sample["images"] and draw_boxes(sample["images"][-1], answer, drawing):
                print(f"boxes: {drawing}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    usage = "data.py check|preview [CONFIG.json ...] [--key value ...]"
    commands = ("check", "preview", "-h", "--help")
    if not argv or argv[0] not in commands:
        got = f"got {cut(argv[0])}{nearest(argv[0], commands)}" if argv else "got nothing"
        raise ValueError(f"usage: python {usage}; {got}")
    cfg = parse_config(argv[argv[0] in ("check", "preview") :], PreviewConfig, usage)
    dataset = cfg.dataset or DEFAULT_DATASET
    dataset = {split: dataset[split] for split in ("train", "eval") if dataset.get(split)}
    processor = load_processor(model_directory(cfg.model, cfg.model_name_or_path), cfg.stage)
    return (check if argv[0] == "check" else preview)(dataset, processor, vars(cfg))
