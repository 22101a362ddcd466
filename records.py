"""Records: a line of somebody's file becomes a Conversation, whoever wrote it.

    (source,) = open_files(["train.jsonl"])  # JSON, JSONL, CSV, TSV, or a folder of images with .txt captions
    conversations_of(source[0], source.where(0), "", 0)     # [Conversation(...)]

Top to bottom: the door for bad records -> files -> images of a turn -> readers by shape. A record is
recognised by its own keys: Qwen-VL's [user, assistant] pairs with <img> tags, LLaVA and ShareGPT (from/value,
<image> where each image stands), ms-swift and LLaMA-Factory and TRL (messages and images, query/response,
objects), OpenAI's content parts, instruction/input/output, captions, questions with answers. A key that would
change what a record means is understood or the record is refused; nothing is dropped.
"""

import contextlib
import csv
import difflib
import json
import math
import os
import re
import sys
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np

import images


def nearest(word: str, known) -> str:
    """A hint at the known word that is meant: a like one, or the one that ends in it ("batch_size"); else
    nothing."""
    known, word = list(known), str(word)[:100]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    close = close or [k for k in known if len(word) > 4 and k.endswith(f"_{word}")]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


# --------------------------------------------------------------------------------------------------
# door


class BadRecord(ValueError):
    """One record that cannot be used: where it stands, and why, cut to a line."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


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


@contextlib.contextmanager
def one_record(where: str):
    """The one door for bad data: whatever reading, encoding or decoding this record raises is the record's
    fault."""
    try:
        yield
    except BadRecord:
        raise
    except MemoryError:
        raise
    except Exception as e:
        raise BadRecord(where, one_line(e).removeprefix(f"{where}: ")) from e


def cut(value, limit: int = 60) -> str:
    """A value for a message."""
    text = repr(value[: 2 * limit] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --------------------------------------------------------------------------------------------------
# files


def unique_keys(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {cut(twice)} stands twice")
    return found


def parse_json(text: str):
    """JSON whose objects have each key once. ValueError (RecursionError included) if it is none."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class JsonLines:
    """A JSONL file as a sequence of records. Only 24 bytes a line are in memory; blank lines are skipped."""

    def __init__(self, path: str):
        self.path, spans, position = path, array("q"), 0
        with open(path, "rb") as file:
            self.utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
            file.seek(0)
            for number, line in enumerate(file, 1):
                skip = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0  # UTF-8 byte order mark
                if line[skip:].strip():
                    spans.extend((position + skip, len(line) - skip, number))
                position += len(line)
        self.spans = np.frombuffer(spans, np.int64).reshape(-1, 3)  # (N, 3): offset, size, line number

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int):
        start, size, _ = map(int, self.spans[i])
        with open(
            self.path, "rb"
        ) as file:  # opened anew each time, so that forked workers share no file position
            file.seek(start)
            line = file.read(size)
        if self.utf16:
            raise ValueError("UTF-16 text; convert the file to UTF-8")
        try:
            return parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise ValueError(
                f"not UTF-8 text ({e.reason} at byte {e.start} of the line); convert the file"
            ) from None
        except ValueError as e:
            raise ValueError(f"not valid JSON: {e}") from None

    def where(self, i: int) -> str:
        return f"{self.path}:{self.spans[i, 2]}"


class Records:
    """Records of a parsed document, or what is wrong with them; `places` names each (default: "record N",
    from 0)."""

    def __init__(self, path: str, records: list, places: list[str] | None = None):
        self.path, self.records, self.places = path, records, places

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int):
        if isinstance(self.records[i], Exception):
            raise self.records[i]
        return self.records[i]

    def where(self, i: int) -> str:
        return f"{self.path}{self.places[i]}" if self.places else f"{self.path} record {i}"


def is_jsonl(path: str) -> bool:
    """Whether each line is a record: if the first line is a whole object and another line follows; of a file
    named so, unless it begins an array that goes on in the next line."""
    with open(path, "rb") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, b""), next(lines, None)
    try:
        value = parse_json(first.decode("utf-8-sig"))
        return path.endswith(".jsonl") or (isinstance(value, dict) and second is not None)
    except ValueError:
        return path.endswith(".jsonl") and not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")


def read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); convert the file") from None


def read_document(path: str):
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not valid JSON: {e.msg} (column {e.colno})") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON: {one_line(e).removeprefix(f'{path}: ')}") from None


def read_table(path: str) -> Records:
    """A CSV or TSV file with a header; a cell of JSON ("[...]" or "{...}") in a column that may hold one is
    parsed."""
    csv.field_size_limit(sys.maxsize)  # a data URL is long
    rows, places = [], []
    try:
        reader = csv.reader(
            read_text(path).splitlines(keepends=True), delimiter="\t" if is_tsv(path) else ",", strict=True
        )
        header = [cell.strip() for cell in next(reader, [])]
        if repeated := [key for key, count in Counter(header).items() if count > 1]:
            raise ValueError(f"{path}:1: the column {repeated[0]!r} stands twice in the header")
        if "" in header or not set(header) & TABLE_KEYS:
            raise ValueError(
                f"{path}:1: the header {cut(header)} names no known column; expected e.g. image,caption or "
                "image,question,answer"
            )
        first = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(row_record(header, cells))
                places.append(f":{first}")
            first = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(
            f"{path}:{reader.line_num}: not a table of comma- or tab-separated values: {e}"
        ) from None
    return Records(path, rows, places)


def row_record(header: list[str], cells: list[str]) -> dict | Exception:
    if len(cells) != len(header):
        return ValueError(f"a row of {len(cells)} cells under a header of {len(header)}")
    try:
        return {column: cell_value(column, cell) for column, cell in zip(header, cells, strict=True)}
    except ValueError as e:
        return e


def is_tsv(path: str) -> bool:
    return path.lower().endswith((".tsv", ".tab"))


def cell_value(column: str, cell: str):
    """A cell of a column that may hold a list or an object is JSON if it looks so; an empty cell is a missing
    key."""
    text = cell.strip()
    if not text:
        return None
    if column in LIST_KEYS and text[0] + text[-1] in ("[]", "{}"):
        try:
            return parse_json(cell)
        except ValueError as e:
            raise ValueError(f"the cell of {column!r} looks like JSON and is none: {e}") from None
    return cell


def read_folder(path: str) -> list:
    """A folder of images beside .txt files of the same name, each line of which is a caption of the image; or
    one that describes itself in metadata.jsonl or metadata.csv."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
    for name in ("metadata.jsonl", "metadata.csv"):
        if (Path(path) / name).is_file():
            if unused := sum(p.suffix.lower() == ".txt" for p in files):
                print(
                    f"note: {path}: {name} has the captions; {unused:,} .txt files are not used",
                    file=sys.stderr,
                )
            return open_files([str(Path(path) / name)])
    pictures = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    texts = {p.with_suffix("") for p in files if p.suffix.lower() == ".txt"}
    if not pictures or not texts:
        raise ValueError(
            f"{path} is a folder without images that have captions beside them (a.jpg and a.txt)"
        )
    records, places = [], []
    for picture in pictures:
        name = str(picture.relative_to(path))
        caption = picture.with_suffix(".txt")
        try:
            lines = [line.strip() for line in read_text(str(caption)).splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"{caption.name} is empty")
            records.append({"image": name, "caption": lines})
        except (OSError, ValueError) as e:
            records.append(ValueError(f"no caption beside it ({one_line(e)})"))
        places.append(name)
    for text in sorted(texts - {p.with_suffix("") for p in pictures}):
        records.append(ValueError("no image beside it"))
        places.append(f"{text.relative_to(path)}.txt")
    return [
        Records(os.path.join(path, ""), records, places)
    ]  # with a file's path: its records stand in its folder


def open_files(paths: list[str]) -> list:
    """Data files -> record sequences. COCO's and VQAv2's own documents become one record per image or
    question."""
    sources, questions, annotations = [], [], {}
    for path in paths:
        if os.path.isdir(path):
            sources += read_folder(path)
        elif is_tsv(path) or path.lower().endswith(".csv"):
            sources.append(read_table(path))
        elif is_jsonl(path):
            sources.append(JsonLines(path))
        else:
            document = read_document(path)
            keys = document.keys() if isinstance(document, dict) else ()
            if "questions" in keys:
                questions.append((path, document))
            elif "annotations" in keys and "images" not in keys:
                found = {a["question_id"]: a for a in document["annotations"]}
                if len(found) < len(document["annotations"]) or annotations.keys() & found.keys():
                    raise ValueError(f"{path}: two annotations have one question_id")
                annotations |= found
            elif "annotations" in keys:
                sources.append(Records(path, coco_captions(path, document)))
            else:
                sources.append(Records(path, document if isinstance(document, list) else [document]))
    if bool(questions) != bool(annotations):
        have, lack = ("questions", "annotations") if questions else ("annotations", "questions")
        raise ValueError(
            f"{', '.join(paths)}: VQAv2 {have} without their {lack}; list both files in data_files"
        )
    joined = [Records(path, vqa_v2(path, document, annotations)) for path, document in questions]
    asked = {record["question_id"] for source in joined for record in source.records}
    if lost := [key for key in annotations if key not in asked]:
        raise ValueError(
            f"{', '.join(paths)}: {len(lost):,} annotations have no question, the "
            f"first is question_id={cut(lost[0])}; "
            "list the files that belong together"
        )
    return sources + joined


def coco_captions(path: str, document: dict) -> list[dict]:
    """One record an image, with all its captions."""
    records = {
        i["id"]: {"image": i["file_name"], "image_id": i["id"], "caption": []} for i in document["images"]
    }
    if len(records) < len(document["images"]):
        raise ValueError(f"{path}: two images have one id")
    for annotation in document["annotations"]:
        if annotation["image_id"] not in records:
            raise ValueError(
                f"{path}: a caption is of image_id={cut(annotation['image_id'])}, which is no id among its "
                "images; the two lists do not belong together"
            )
        records[annotation["image_id"]]["caption"].append(annotation["caption"])
    if without := sum(not record["caption"] for record in records.values()):
        print(f"warning: {path}: {without:,} images have no caption and are left out", file=sys.stderr)
    return [record for record in records.values() if record["caption"]]


def vqa_v2(path: str, document: dict, annotations: dict) -> list[dict]:
    """Questions with their annotations. The published files name no
    image: COCO's own file names are meant."""
    files = {i["id"]: i["file_name"] for i in document.get("images", [])}
    subset, records = document.get("data_subtype", ""), []
    for question in document["questions"]:
        image, annotation = question["image_id"], annotations.get(question["question_id"], {})
        if annotation.get("image_id", image) != image:
            raise ValueError(
                f"{path}: question {question['question_id']} is about image {image}, its annotation about "
                f"{annotation['image_id']}; the files do not belong together"
            )
        if not files and not str(image).isdecimal():
            raise ValueError(
                f"{path}: image_id={cut(image)} is no number, and no list of images names its file"
            )
        name = files.get(image) if files else f"{subset}/COCO_{subset}_{int(image):012d}.jpg"
        records.append({**annotation, **question, "image": name})
    return records


# --------------------------------------------------------------------------------------------------
# images of a turn


@dataclass(frozen=True)
class ImageRef:
    """An image at its place in a turn."""

    source: str  # a file's path, or a data URL
    # The author's own words around the image's tag, in Qwen-VL's file format; None: each model writes its own
    wording: tuple[str, str] | None = None


Content = list[str | ImageRef]  # a turn: texts and images in their order


@dataclass
class Conversation:
    id: str
    turns: list[tuple[str, Content]]  # (role, content), role system, user or assistant
    kind: str  # "chat": text used as it is; "caption", "vqa": the model's processor adds its own wording
    where: str  # "train.jsonl:17", or "train.json record 17" (counted from 0) for a one-document file
    answers: list[str]  # all reference answers, with repetitions; of a chat, the last assistant turn
    source: str  # the record's own "source", else the entry's name

    @property
    def images(self) -> list[str]:
        """Sources of the images in order."""
        return [part.source for _, content in self.turns for part in content if isinstance(part, ImageRef)]


def text_of(content: Content) -> str:
    """A turn's text without its images."""
    return "".join(part for part in content if isinstance(part, str))


def front_image(content: Content) -> tuple[ImageRef | None, str]:
    """(image, text) of a turn for a model that has one place for an image, before the text. ValueError for
    two images, or for one inside the text. LLaVA's files put it in front of a question or behind it, which is
    the same here."""
    places = [n for n, part in enumerate(content) if isinstance(part, ImageRef)]
    if not places:
        return None, text_of(content)
    before, after = text_of(content[: places[0]]), text_of(content[places[0] + 1 :])
    if len(places) > 1:
        raise ValueError(f"{len(places)} images in one question")
    if before.strip() and after.strip():
        raise ValueError("an image inside the text")
    text = before.removesuffix("\n") if before.strip() else after
    unworded = content[places[0]].wording is None
    return content[places[0]], text.removeprefix("\n") if unworded and not before.strip() else text


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_TAG = re.compile(r"((?:Picture \d+: ?)?)<img>(.*?)</img>(\n?)", re.S)  # Qwen-VL's own file format
PLACEHOLDER = "<image>"
PICTURE = object()  # inside a turn: an image that the record's list will fill in


def parts_of_text(text: str) -> list:
    """Text with <img>PATH</img> tags and <image> placeholders -> texts, ImageRefs and PICTUREs."""
    small = text.lower()  # <IMG> was meant as a tag too, and is none
    if not small.count("<img>") == small.count("</img>") == len(IMAGE_TAG.findall(text)):
        raise ValueError("the tags <img> and </img> don't match")
    pieces, parts = IMAGE_TAG.split(text), []
    for n in range(0, len(pieces), 4):
        for k, plain in enumerate(pieces[n].split(PLACEHOLDER)):
            parts += ([PICTURE] if k else []) + ([plain] if plain else [])
        if n + 1 < len(pieces):
            before, source, after = pieces[n + 1 : n + 4]
            parts.append(ImageRef(source, (before, after)))
    return parts


def image_source(value) -> str:
    """An image's source out of a path, a URL or an object that holds one."""
    if isinstance(value, dict):
        found = [value[key] for key in ("url", "path", "image", "image_url") if value.get(key)]
        if (
            len(found) != 1
            or set(value) - {"url", "path", "image", "image_url", "detail", "bytes", "type"}
            or value.get("bytes")
        ):
            raise ValueError(f"an image object needs one of url and path, got {cut(sorted(value))}")
        value = found[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an image must be a path or a data URL, got {cut(value)}")
    return value


def read_part(part) -> list:
    """One content part of OpenAI's, TRL's or Hugging Face's messages."""
    if isinstance(part, str):
        return parts_of_text(part)
    if isinstance(part, ImageRef) or part is PICTURE:  # placed before
        return [part]
    if not isinstance(part, dict):
        raise ValueError(f"a content part must be an object, got {cut(part)}")
    kind = part.get("type")
    about = ("type", "detail", "cache_control")
    given = {key: value for key, value in part.items() if key not in about and value is not None}
    extra = set(given) - {"text", "image", "image_url", "url", "path", "base64"}
    if kind not in (None, "text", "input_text", "image", "image_url", "input_image") or extra:
        raise ValueError(f"content part {cut(kind or sorted(extra)[0])} is neither text nor an image")
    if kind in ("text", "input_text") or kind is None and "text" in given:
        if len(given) > 1 or not isinstance(given.get("text"), str):
            raise ValueError(f"a text part must hold one text, got {cut(part)}")
        return parts_of_text(given["text"])
    sources = [value for key, value in given.items() if key in ("image", "image_url", "url", "path")]
    if base64 := given.get("base64"):
        sources.append(f"data:image/png;base64,{base64}")  # decoders look at the content, not at this type
    if len(sources) > 1 or given.get("text") or (kind is None and not sources):
        raise ValueError(f"an image part must hold one image, got {cut(part)}")
    return [ImageRef(image_source(sources[0]))] if sources else [PICTURE]


def read_content(value) -> list:
    """What a message says: a text, or a list of parts."""
    if isinstance(value, str):
        return parts_of_text(value)
    if isinstance(value, list):
        if len(value) > 1 and all(isinstance(part, str) for part in value):
            raise ValueError(f"expected one text, got a list of texts {cut(value)}")
        return [found for part in value for found in read_part(part)]
    raise ValueError(f"expected a text or a list of content parts, got {cut(value)}")


def place_images(turns: list[tuple[str, list]], sources: list[str]) -> None:
    """Puts the k-th image where the k-th placeholder stands; without placeholders, all in front of the first
    question. Images that tags in the text name already must be the same ones."""
    places = [(content, n) for _, content in turns for n, part in enumerate(content) if part is PICTURE]
    named = [part.source for _, content in turns for part in content if isinstance(part, ImageRef)]
    if named and not places and sources and sources == named:
        return
    if named and sources:
        raise ValueError("the text names other images than the record's list; keep the tags or the list")
    if places and len(places) != len(sources):
        raise ValueError(
            f"{len(sources)} images, but the text has {len(places)} places {PLACEHOLDER} for them"
        )
    for (content, n), source in zip(places, sources, strict=False):
        content[n] = ImageRef(source)
    if not places and sources:
        first = next((content for role, content in turns if role == "user"), None)
        if first is None:
            raise ValueError("images, but no question that they could belong to")
        first[:0] = [ImageRef(source) for source in sources]


def resolve_image(path: str, image_root: str | None, folder: str) -> str:
    """The file that a record's image path means: under image_root, else beside the data file, else as it is.
    A data URL is itself."""
    if images.is_data_url(path):
        return path
    shown = images.short(path)
    if re.match(r"[a-z][a-z0-9+.-]+://", path, re.I):
        url = urlparse(path)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise ValueError(f"image {shown} is a URL; download it first and give the file's path")
        path = unquote(url.path)
    if "\0" in path:
        raise ValueError(f"image {cut(path)} has a NUL character in its path")
    if os.path.isabs(path):
        tried = [path]
    else:
        if image_root and os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise ValueError(f"image {shown} leaves image_root {image_root}; give a path inside it")
        tried = [os.path.join(root, path) for root in (image_root, folder) if root] + [path]
    for place in dict.fromkeys(tried):
        if os.path.isfile(place):
            return place
    raise ValueError(f"image {shown} not found; tried {', '.join(map(images.short, dict.fromkeys(tried)))}")


# ------------------------------------------------------------------------------------------------
# readers: one turns a record into [(kind, turns, answers)]; most give one, a caption list several

IMAGE_KEYS = ("image", "images", "img", "image_path", "image_paths", "image_file", "image_url", "file_name")
TABLE_KEYS = {
    *IMAGE_KEYS,
    "caption",
    "captions",
    "text",
    "question",
    "answer",
    "answers",
    "query",
    "response",
    "prompt",
    "completion",
    "instruction",
    "output",
    "label",
    "messages",
    "conversations",
}
# What some reader takes as a record's content. Beside another kind's keys it would be dropped: refused.
CONTENT_KEYS = {
    *TABLE_KEYS.difference(IMAGE_KEYS),
    "conversation",
    "multiple_choice_answer",
    "system",
    "history",
    "input",
    "objects",
}
LIST_KEYS = {*IMAGE_KEYS, "caption", "captions", "answers", "messages", "conversations", "history", "objects"}
MEDIA_WORD = re.compile(r"image|img|picture|photo|video|audio|speech|media|frames?$|pixel", re.I)
ABOUT_MEDIA = re.compile(  # facts about an image, no image
    r"_(ids?|sizes?|width|height|sources?|licen[sc]es?|credits?|authors?|types?|formats?|hash|md5|sha\d*|"
    r"keys?|split|titles?|names?|count|num|index|date|description|class(es)?|tags?|labels?|categor(y|ies)|"
    r"captions?|lang(uage)?|quality|scores?|domain|dataset)$|^(num|n)_|(?-i:[a-z]Ids?$)",
    re.I,
)
MEDIA_FILE = re.compile(
    r"\S+\.(jpe?g|png|webp|bmp|gif|tiff?|mp4|avi|mov|mkv|webm|mp3|wav|flac)$|data:image/", re.I
)
# Keys that change what a record means, and that no stage here knows: tools, preferences, the choices of a
# question, what is learned of a text
ELSEWHERE = re.compile(
    r"tools?|functions?|tool_calls|function_call|chosen(_\w+)?|rejected(_\w+)?|kto_tag|"
    r"(positive|negative)(_messages)?|(choice|option|candidate)s?(_?\w)?|[A-H]|"
    r"mask_(history|prompt|inputs?)|train_on_\w+|loss_mask|"
    r"(system|sys)_?(prompt|message|text|instruction)s?|sys"
)
# Shares of the loss, of a record or a turn: all there is here is the whole
WEIGHTS = ("loss", "loss_scale", "loss_weight", "weight", "sample_weight", "train", "trainable")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def is_empty(value) -> bool:
    return value is None or isinstance(value, str | list | dict) and not value


def says_something(text: str) -> bool:
    """Whether there is more to see than blanks and what is invisible."""
    return any(c.isprintable() and not c.isspace() for c in text)


def text_value(value, what: str) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not says_something(value):
        raise ValueError(f"{what} must be a text that is not empty, got {cut(value)}")
    return value


def given_images(record: dict) -> list[str]:
    """The images that a record names beside its text."""
    keys = [key for key in IMAGE_KEYS if record.get(key) not in (None, [])]
    if len(keys) > 1:
        raise ValueError(f"the keys {' and '.join(map(repr, keys))} both name images; keep one")
    values = record[keys[0]] if keys else []
    return [image_source(value) for value in (values if isinstance(values, list) else [values])]


def check_keys(record: dict, known: set[str]) -> None:
    """Refuses a key that could change what the record means and that its reader does not know."""
    no_image = all(is_empty(record.get(key)) for key in IMAGE_KEYS)
    for key, value in record.items():
        if key in known or is_empty(value):
            continue
        if ELSEWHERE.fullmatch(key):
            raise ValueError(f"the key {key!r} is not supported; remove it or the record")
        if key in WEIGHTS and not (value in (1, "default") and isinstance(value, bool | int | float | str)):
            raise ValueError(
                f"{key}={cut(value)} excludes it from the loss or weights it, which is not supported; "
                "remove it or the record"
            )
        if key in CONTENT_KEYS:
            others = ", ".join(repr(k) for k in record if k in known and k not in IMAGE_KEYS)
            raise ValueError(
                f"the key {key!r} does not go with {others}: two kinds of record in one; keep one"
            )
        many = value if isinstance(value, list) else [value]
        file = any(isinstance(v, str) and len(v) < 4096 and MEDIA_FILE.fullmatch(v) for v in many)
        named = (
            MEDIA_WORD.search(key)
            and not ABOUT_MEDIA.search(key)
            and not isinstance(value, bool | int | float)
        )
        if named or (file and no_image and key not in ("id", "source")):
            raise ValueError(
                f"the key {cut(key)} looks like media and is not "
                f"known{nearest(key, IMAGE_KEYS)}; images belong into "
                "'images', other media are not supported"
            )


# Facts about a record that no reader needs
ABOUT = {"id", "question_id", "image_id", "question_type", "answer_type", "source", "split"}


def unused_keys(record) -> set[str]:
    """The record's keys that nothing reads and that are not refused either: they may be a misspelt one."""
    if not isinstance(record, dict):
        return set()
    found = set(record) - CONTENT_KEYS - set(IMAGE_KEYS) - ABOUT - set(WEIGHTS)
    turns = record.get("messages") or record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            known = {"role", "content", "from", "value", *IMAGE_KEYS, *WEIGHTS}
            found |= {f"{key} (of a turn)" for key in set(turn) - known}
    return found


def read_caption(record: dict, answered: bool = True):
    known = {"caption", "captions", "text", *IMAGE_KEYS}
    check_keys(record, known)
    keys = [key for key in ("caption", "captions", "text") if not is_empty(record.get(key))]
    if len(keys) > 1:
        raise ValueError(f"the keys {' and '.join(map(repr, keys))} both are captions; keep one")
    if keys == ["text"] and not answered:
        raise ValueError(
            "'text' beside an image is its caption, which nobody asks for; a question is 'prompt'"
        )
    captions = record[keys[0]] if keys else record.get("caption")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(c, str) and says_something(c) for c in captions):
        raise ValueError(f"'caption' must be a text or a list of texts, got {cut(captions)}")
    found = given_images(record)
    if len(found) != 1:
        raise ValueError(f"a caption needs one image, got {len(found)}")
    return [
        ("caption", [("user", [ImageRef(found[0])]), ("assistant", [caption])], captions)
        for caption in captions
    ]


def answer_text(value) -> str:
    """An answer of a VQA file; a number written there is its text."""
    if isinstance(value, dict):
        if "answer" not in value:
            raise ValueError(f"an answer needs the key 'answer', got {cut(value)}")
        value = value["answer"]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not number:
        raise ValueError(f"an answer must be a text or a number, got {cut(value)}")
    return str(value)


def read_vqa(record: dict, answered: bool = True):
    """The answer learned is "answer", VQAv2's "multiple_choice_answer", or else the most frequent of
    "answers"."""
    check_keys(record, {"question", "answer", "answers", "multiple_choice_answer", *IMAGE_KEYS})
    answer, answers = record.get("answer", record.get("multiple_choice_answer")), record.get("answers")
    if isinstance(answer, list):
        answer, answers = None, answer
    if answers is None:
        answers = [] if answer is None else [answer]
    if not isinstance(answers, list):
        raise ValueError(f"'answers' must be a list, got {cut(answers)}")
    answers = [answer_text(a) for a in answers]
    answer = (
        answer_text(answer)
        if answer is not None
        else Counter(answers).most_common(1)[0][0]
        if answers
        else ""
    )
    if answered and not says_something(answer):
        raise ValueError("no answer: expected 'answer' or a non-empty list 'answers'")
    found = given_images(record)
    if not found:
        raise ValueError("a question needs an image, got none under 'image'")
    turns = asked_and_answered(text_value(record.get("question"), "'question'"), answer, found)
    return [("vqa", turns, answers or [answer])]


def asked_and_answered(question: str, answer: str, sources: list[str]) -> list[tuple[str, list]]:
    turns = [("user", parts_of_text(question)), ("assistant", [answer])]
    place_images(turns, sources)
    return turns


def read_visualglm(record: dict, answered: bool = True):
    check_keys(record, {"img", "prompt", "label"})
    image, question = image_source(record.get("img")), text_value(record.get("prompt"), "'prompt'")
    answer = text_value(record.get("label"), "'label'") if answered else ""
    return [("vqa", asked_and_answered(question, answer, [image]), [answer])]


def single_exchange(record: dict) -> list[tuple[str, object]]:
    """[(role, content)] of a record whose question and answer have keys of their own: query/response,
    instruction/input/output, prompt/completion; "history" holds the pairs before."""
    asked = next(key for key in ASKED if not is_empty(record.get(key)))
    replied = [key for key in REPLIED if not is_empty(record.get(key))]
    if len(replied) > 1:
        raise ValueError(f"the keys {' and '.join(map(repr, replied))} both answer {asked!r}; keep one")
    raw = []
    history = record.get("history")
    if not is_empty(history) and not isinstance(history, list):
        raise ValueError(f"'history' must be a list of [question, answer], got {cut(history)}")
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history' must be a list of [question, answer], got {cut(pair)}")
        raw += [("user", pair[0]), ("assistant", pair[1])]
    question = record[asked]
    if asked == "instruction" and not is_empty(extra := record.get("input")):
        question = text_value(question, "'instruction'") + "\n" + text_value(extra, "'input'")
    if isinstance(question, list) and question and isinstance(question[0], dict) and "role" in question[0]:
        raw += [message_of(n, m) for n, m in enumerate(question)]  # TRL's conversational prompt
    else:
        raw.append(("user", question))
    answer = record[replied[0]] if replied else None
    if isinstance(answer, list) and answer and isinstance(answer[0], dict) and "role" in answer[0]:
        raw += [message_of(n, m) for n, m in enumerate(answer)]
    elif answer is not None:
        raw.append(("assistant", answer))
    return raw


ASKED, REPLIED = ("query", "instruction", "prompt"), ("response", "output", "completion", "answer")


def message_of(n: int, message) -> tuple[object, object]:
    """(role, content) of one message in OpenAI's or ShareGPT's form, with its own images in place."""
    if not isinstance(message, dict):
        raise ValueError(f"turn {n} must be an object with role and content, got {cut(message)}")
    role_key, text_key = (
        ("role", "content") if "role" in message or "content" in message else ("from", "value")
    )
    # what is no answer is not learned anyway
    learned = ROLES.get(str(message.get(role_key))) == "assistant"
    try:
        check_keys(message, {"role", "content", "from", "value", *IMAGE_KEYS, *(() if learned else WEIGHTS)})
    except ValueError as e:
        raise ValueError(f"turn {n}: {e}") from None
    content = message.get(text_key)
    if own := given_images(message):
        content = read_content(content)
        place_images([("user", content)], own)
    return message.get(role_key), content


def raw_turns(record: dict) -> list[tuple[object, object]]:
    """[(role, content)] of a chat record as they stand there."""
    shapes = [
        key for key in ("messages", "conversations", "conversation", *ASKED) if not is_empty(record.get(key))
    ]
    if len(shapes) != 1:
        found = (
            f"both {shapes[0]!r} and {shapes[1]!r}" if shapes else f"none of them among {cut(sorted(record))}"
        )
        raise ValueError(
            f"a chat needs one of 'messages', 'conversations', 'query', 'instruction', 'prompt'; {found}"
        )
    own = {shapes[0], "system", "objects", *IMAGE_KEYS}
    if shapes[0] in ASKED:
        own |= {*REPLIED, "history"} | ({"input"} if shapes[0] == "instruction" else set())
    check_keys(record, own)
    if shapes[0] in ASKED:
        return single_exchange(record)
    turns = record[shapes[0]]
    if not isinstance(turns, list):
        raise ValueError(f"{shapes[0]!r} must be a list of turns, got {cut(turns)}")
    raw = []
    for n, turn in enumerate(turns):
        if isinstance(turn, list) and len(turn) == 2 and shapes[0] != "messages":
            raw += [("user", turn[0]), ("assistant", turn[1])]
        elif isinstance(turn, list):
            raise ValueError(
                f"{shapes[0]}[{n}] is neither a [user, assistant] pair nor an object with role and text"
            )
        else:
            raw.append(message_of(n, turn))
    return raw


def chat_turns(record: dict, answered: bool = True) -> list[tuple[str, list]]:
    """[(role, content), ...] of a chat record in any of its shapes; users and assistants alternate. Images
    are in place. answered: the last turn is the assistant's; else a last answer is dropped."""
    turns = []
    for n, (role, content) in enumerate(raw_turns(record)):
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {n}: expected a role among {', '.join(ROLES)}, got {cut(role)}")
        try:
            parts = read_content(content)
        except ValueError as e:
            raise ValueError(f"turn {n} ({role}): {e}") from None
        # an image alone asks something, and answers nothing
        empty = not any(
            says_something(part) if isinstance(part, str) else ROLES[role] != "assistant" for part in parts
        )
        if empty and ROLES[role] != "system":
            raise ValueError(f"turn {n} ({role}) has no text")
        if not empty:  # an empty system text is none
            turns.append((ROLES[role], parts))
    if not is_empty(system := record.get("system")):
        if turns and turns[0][0] == "system" and text_of(turns[0][1]) != system:
            raise ValueError("the record's 'system' and its first turn are two different system texts")
        if not turns or turns[0][0] != "system":
            turns.insert(0, ("system", [text_value(system, "'system'")]))
    roles = [role for role, _ in turns[1 if turns and turns[0][0] == "system" else 0 :]]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError(
            f"turns must alternate user, assistant and begin with user, got {', '.join(roles)[:80]}"
        )
    place_images(turns, given_images(record))
    if turns[0][0] == "system" and not all(isinstance(part, str) for part in turns[0][1]):
        raise ValueError("an image in the system text")
    if answered and turns[-1][0] != "assistant":
        raise ValueError(f"the last turn must be the assistant's, got {turns[-1][0]}")
    return turns if answered or turns[-1][0] == "user" else turns[:-1]


def fill_objects(turns: list[tuple[str, list]], objects) -> None:
    """ms-swift's "objects": names and boxes that take the places of <ref-object> and <bbox> in the text, in
    pixels of their image unless "bbox_type" is "norm1". Sources: its documentation of custom datasets."""
    text = "".join(text_of([p for p in content if isinstance(p, str)]) for _, content in turns)
    marks = {"ref": "<ref-object>", "bbox": "<bbox>"}
    if is_empty(objects):
        if found := [mark for mark in marks.values() if mark in text]:
            raise ValueError(f"{found[0]} in the text, but the record has no 'objects'")
        return
    if not isinstance(objects, dict) or set(objects) - {"ref", "bbox", "bbox_type", "image_id"}:
        raise ValueError(
            f"'objects' must be an object with ref, bbox, bbox_type and image_id, got {cut(objects)}"
        )
    refs, boxes = objects.get("ref") or [], objects.get("bbox") or []
    kind, owners = objects.get("bbox_type") or "real", objects.get("image_id") or [0] * len(boxes)
    if kind not in ("real", "norm1"):
        raise ValueError(f"bbox_type must be real or norm1, got {cut(kind)}")
    for key, values in (("ref", refs), ("bbox", boxes)):
        if not isinstance(values, list) or text.count(marks[key]) != len(values):
            raise ValueError(
                f"{cut(values)} under objects.{key}, but the text has {text.count(marks[key])} {marks[key]}"
            )
    if not isinstance(owners, list) or len(owners) != len(boxes):
        raise ValueError(f"objects.image_id must name an image for each of the {len(boxes)} boxes")
    sources = [part.source for _, content in turns for part in content if isinstance(part, ImageRef)]
    fillings = {
        "<ref-object>": iter([f"<ref>{text_value(ref, 'objects.ref')}</ref>" for ref in refs]),
        "<bbox>": iter(
            [box_text(box, kind, owner, sources) for box, owner in zip(boxes, owners, strict=True)]
        ),
    }
    for _, content in turns:
        for n, part in enumerate(content):
            if isinstance(part, str):
                content[n] = re.sub("<ref-object>|<bbox>", lambda match: next(fillings[match[0]]), part)


def box_text(box, kind: str, owner: int, sources: list[str]) -> str:
    """A box in thousandths of its image's sides, as Qwen-VL's format and this project's have them."""
    numbers = (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and v is not True for v in box)
    )
    if not numbers or not all(map(math.isfinite, box)):
        raise ValueError(f"a box must be four numbers x1, y1, x2, y2, got {cut(box)}")
    if not isinstance(owner, int) or not 0 <= owner < len(sources):
        raise ValueError(f"objects.image_id names image {cut(owner)}, the record has {len(sources)}")
    width, height = images.open_image(sources[owner]).size if kind == "real" else (1, 1)
    x1, y1, x2, y2 = (v / side for v, side in zip(box, (width, height) * 2, strict=True))
    if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
        raise ValueError(f"box {cut(box)} does not lie in its image of {width}x{height}")
    x1, y1, x2, y2 = (min(999, int(1000 * v)) for v in (x1, y1, x2, y2))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def read_chat(record: dict, answered: bool = True):
    return [("chat", chat_turns(record, answered), [])]  # its answer is known when its boxes are


READERS = {
    "chatml_dataset": read_chat,
    "coco_caption": read_caption,
    "vg_caption": read_caption,
    "coco_vqa": read_vqa,
    "visualglm_dataset": read_visualglm,
}


def reader_of(record: dict):
    """The reader that a record's own keys ask for."""
    have = {key for key, value in record.items() if not is_empty(value)}
    if have & {"messages", "conversations", "conversation"}:
        return read_chat
    if {"img", "prompt"} <= have and "label" in have:
        return read_visualglm
    if "question" in have:
        return read_vqa
    if have & {*ASKED}:
        return read_chat
    if have & {"caption", "captions"} or "text" in have and have & set(IMAGE_KEYS):
        return read_caption
    raise ValueError(
        f"no known kind of record among the keys {cut(sorted(have))}; "
        "expected 'messages', 'conversations', "
        "'query' and 'response', 'instruction' and 'output', 'question' and "
        "'answer', or 'image' and 'caption'"
    )


def conversations_of(
    record,
    where: str,
    folder: str,
    number: int,
    name: str | None = None,
    image_root: str | None = None,
    system: str | None = None,
    answered: bool = True,
) -> list[Conversation]:
    """One record -> its conversations, the images' files found. ValueError if it is unusable.

    number: its id if it has none. name: the one reader to use; by default the record's keys tell. answered:
    it is to be learned from, so it must have an answer; else a last answer of a chat is dropped.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {cut(record)}")
    key = next((key for key in ("id", "question_id", "image_id") if not is_empty(record.get(key))), None)
    id = number if key is None else record[key]
    if not isinstance(id, str | int) or isinstance(id, bool) or len(str(id)) > 200:
        raise ValueError(f"{key!r} must be a number or a text of at most 200 characters, got {cut(id)}")
    source, found = record.get("source"), []
    source = source if isinstance(source, str) and source else name or "data"

    def resolved(part):
        if isinstance(part, str):
            return part
        return ImageRef(resolve_image(part.source, image_root, folder), part.wording)

    for kind, turns, answers in (READERS[name] if name else reader_of(record))(record, answered):
        turns = [(role, [resolved(part) for part in content]) for role, content in turns]
        if kind == "chat":
            fill_objects(turns, record.get("objects"))
            answers = [text_of(turns[-1][1])] if answered else []
            if system and turns[0][0] != "system":
                turns.insert(0, ("system", [system]))
        check_text(turns)
        found.append(Conversation(str(id), turns, kind, where, answers, source))
    return found


# Other projects' words for the place of an image or a film, which would be learned as text
LEFT_OVER = re.compile(
    r"</?\|?\s*(image|img|video|audio)s?([ _-]?(\d+|placeholder|here|pad|token|start|end))*\s*/?\|?>", re.I
)


def check_text(turns: list[tuple[str, Content]]) -> None:
    for n, (role, content) in enumerate(turns):
        if found := LEFT_OVER.search(text_of(content)):
            raise ValueError(
                f"turn {n} ({role}) has {found[0]} in its text, which stands for no image here; images stand "
                f"where {PLACEHOLDER} stands in a question or an answer of a chat"
            )
        try:
            text_of(content).encode()
        except UnicodeEncodeError as e:
            half = cut(e.object[e.start])
            raise ValueError(f"turn {n} ({role}) has a lone surrogate, half a character: {half}") from None
