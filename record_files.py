"""Files of records: JSON, JSONL, CSV, TSV, folders of images with .txt captions; COCO's, VOC's, VQAv2's own.

    (source,) = open_files(["train.jsonl"])
    source[0], source.where(0), len(source)  # a record as it was parsed, "train.jsonl:1", how many

What a record means is read in records.py.
"""

import csv
import functools
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from terminal import cut, one_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_KEYS = ("image", "images", "img", "image_path", "image_paths", "image_file", "image_url", "file_name")
# Columns that make a table one of records; and those whose cells may hold a list or an object
TABLE_KEYS = {*IMAGE_KEYS, *"caption captions text question answer answers query response prompt".split()}
TABLE_KEYS |= set("completion instruction output label messages conversations".split())
LIST_KEYS = {*IMAGE_KEYS, *"caption captions answers messages conversations history objects bbox".split()}


def unique_keys(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {cut(twice)} stands twice")
    return found


class Written(float):
    """A number of a file, whose text is the one written there: the answer 1.50 is no "1.5"."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self):
        return self.text


# json.loads makes one for every line
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=Written)


def parse_json(text: str):
    """JSON whose objects have each key once. ValueError (RecursionError included) if it is none."""
    try:
        return DECODER.decode(text)
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
        self.spans = spans  # offset, size, line number; offset, ...
        self.size = position  # of what was read here: a file may grow

    def __len__(self):
        return len(self.spans) // 3

    def __getitem__(self, i: int):
        start, size, _ = self.spans[3 * i : 3 * i + 3]
        line = os.pread(opened(self).fileno(), size, start)
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
        return f"{self.path}:{self.spans[3 * i + 2]}"

    def has_line_end(self, size: int) -> bool:
        """Whether its first `size` bytes are whole lines."""
        return not size or b"\n" in os.pread(opened(self).fileno(), 2, size - 1)


@functools.lru_cache(16)
def opened(source: JsonLines):
    """Its file, which is read by offsets alone: forked workers and threads share no position in it."""
    return open(source.path, "rb", buffering=0)


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
    with open(path, "rb") as file:  # two lines tell: a large file is not read for this
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
    text, delimiter = read_text(path), "\t" if is_tsv(path) else ","
    try:
        # not splitlines(): a cell may hold U+2028 and other ends of lines that are none of a file
        file, spaced = io.StringIO(text, newline=""), f"{delimiter} " in text.partition("\n")[0]
        # "image, caption": where the header's cells begin with a blank, so do the others
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=spaced)
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
    """Or what is wrong with it: said when the record is read, since other rows may be good."""
    if len(cells) != len(header):
        return ValueError(f"a row of {len(cells)} cells under a header of {len(header)}")
    if any("\t" in cell and "\n" in cell for cell in cells):
        return ValueError(
            "a cell with a tab and a line break: a quote that begins a cell is not closed in it?"
        )
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
    hidden = re.compile(r"(^|/)\.")
    found = (p for p in Path(path).rglob("*") if not hidden.search(p.relative_to(path).as_posix()))
    found = list(found)
    files = sorted(p for p in found if p.is_file())
    if linked := sum(p.is_symlink() and p.is_dir() for p in found):
        print(f"note: {path}: {linked:,} linked folders in it are not looked into", file=sys.stderr)
    described = [n for n in ("metadata.jsonl", "metadata.csv") if (Path(path) / n).is_file()]
    if len(described) > 1:
        raise ValueError(f"{path} has both {' and '.join(described)}; keep one")
    for name in described:
        if unused := sum(p.suffix.lower() == ".txt" for p in files):
            what = f"{name} has the captions; {unused:,} .txt files are not used"
            print(f"note: {path}: {what}", file=sys.stderr)
        sources = open_files([str(Path(path) / name)])
        if (images := sum(p.suffix.lower() in IMAGE_SUFFIXES for p in files)) > len(sources[0]):
            what = f"{name} describes {len(sources[0]):,} of its {images:,} images"
            print(f"note: {path}: {what}", file=sys.stderr)
        return sources
    if annotations := [str(p) for p in files if p.suffix.lower() == ".xml"]:
        return voc_boxes(annotations)
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    texts = {p.with_suffix("") for p in files if p.suffix.lower() == ".txt"}
    if not images or not texts:
        raise ValueError(
            f"{path} is a folder without images that have captions beside them (a.jpg and a.txt)"
        )
    records, places = [], []
    for image in images:
        name = str(image.relative_to(path))
        caption = image.with_suffix(".txt")
        try:
            lines = [line.strip() for line in read_text(str(caption)).split("\n") if line.strip()]
            if not lines:
                raise ValueError(f"{caption.name} is empty")
            records.append({"image": name, "caption": lines})
        except (OSError, ValueError) as e:
            records.append(ValueError(f"no caption beside it ({one_line(e)})"))
        places.append(name)
    for text in sorted(texts - {p.with_suffix("") for p in images}):
        records.append(ValueError("no image beside it"))
        places.append(f"{text.relative_to(path)}.txt")
    # with a file's path: its records stand in its folder
    return [Records(os.path.join(path, ""), records, places)]


def open_files(paths: list[str]) -> list:
    """Data files -> record sequences. COCO's and VQAv2's own documents become one record per image or
    question."""
    sources, questions, annotations = [], [], {}
    for path in paths:
        if os.path.isdir(path):
            sources += read_folder(path)
        elif is_tsv(path) or path.lower().endswith(".csv"):
            sources.append(read_table(path))
        elif path.lower().endswith(".xml"):
            sources += voc_boxes([path])
        elif is_jsonl(path):
            sources.append(JsonLines(path))
        else:  # one document: what it is, its keys tell
            document = read_document(path)
            keys = document.keys() if isinstance(document, dict) else ()
            if "questions" in keys:
                questions.append((path, document))
            elif "annotations" in keys and "images" not in keys:  # VQAv2's, of questions of another file
                found = by_key(path, document["annotations"], "question_id", "two annotations")
                if annotations.keys() & found.keys():
                    raise ValueError(f"{path}: two annotations have one question_id")
                annotations |= found
            elif "annotations" in keys:
                # COCO's caption files may list categories too
                instances = "categories" in keys and "caption" not in next(iter(document["annotations"]), {})
                records = (coco_boxes if instances else coco_captions)(path, document)
                sources.append(Records(path, records))
            else:
                sources.append(Records(path, document if isinstance(document, list) else [document]))
    if bool(questions) != bool(annotations):
        have, lack = ("questions", "annotations") if questions else ("annotations", "questions")
        raise ValueError(
            f"{', '.join(paths)}: VQAv2 {have} without their {lack}; list both files in data_files"
        )
    # when all files are open: questions may come before their annotations
    joined = [Records(path, vqa_v2(path, document, annotations)) for path, document in questions]
    asked = Counter(record["question_id"] for source in joined for record in source.records)
    if twice := next((key for key, count in asked.items() if count > 1), None):
        raise ValueError(f"{', '.join(paths)}: two questions have question_id={cut(twice)}")
    if lost := [key for key in annotations if key not in asked]:
        raise ValueError(
            f"{', '.join(paths)}: {len(lost):,} annotations have no question, the first is "
            f"question_id={cut(lost[0])}; list the files that belong together"
        )
    return sources + joined


def by_key(path: str, things: list[dict], key: str, two: str) -> dict:
    """{value of the key: thing}"""
    found = {thing[key]: thing for thing in things}
    if len(found) < len(things):  # what is said of one would be taken for the other's
        raise ValueError(f"{path}: {two} have one {key}")
    return found


def coco_captions(path: str, document: dict) -> list[dict]:
    """One record an image, with all its captions."""
    records = {}
    for key, image in by_key(path, document["images"], "id", "two images").items():
        name = image["image" if "image" in image else "file_name"]
        records[key] = {"image": name, "image_id": key, "caption": []}
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


def coco_boxes(path: str, document: dict) -> list[dict]:
    """One record for each class of an image, with all its boxes; COCO's are corner and size in pixels. A
    crowd's box is around many objects and so is that of none."""
    lists = document["images"], document["categories"]
    files, names = (by_key(path, things, "id", "two images or two categories") for things in lists)
    records, crowds = {}, 0
    for n, annotation in enumerate(document["annotations"]):
        for key, known in (("image_id", files), ("category_id", names)):
            if annotation[key] not in known:
                raise ValueError(
                    f"{path}: annotation {n} is of {key}={cut(annotation[key])}, which is no id there; the "
                    "lists do not belong together"
                )
        if annotation.get("iscrowd"):
            crowds += 1
            continue
        image, name = files[annotation["image_id"]], names[annotation["category_id"]]["name"]
        about = {"image": image["file_name"], "image_id": image["id"], "ref": name, "bbox": []}
        size = {key: image[key] for key in ("width", "height") if key in image}
        box = annotation["bbox"]
        # else as it is: records.py says what is wrong with it, and where
        if isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        records.setdefault((image["id"], name), {**about, **size})["bbox"].append(box)
    if crowds:
        print(f"note: {path}: {crowds:,} boxes of crowds (iscrowd) are left out", file=sys.stderr)
    return list(records.values())


def voc_boxes(paths: list[str]) -> list[Records]:
    """PASCAL VOC's annotation files, those of a folder together: one record for each class of an image. A
    corner's pixel counts from 1 and is inside, so a box begins one pixel before it."""
    folders, bare = {}, 0

    def number(node, key: str) -> float:
        if (text := node.findtext(key)) is None:
            raise ValueError(f"no {key} in its <{node.tag}>")
        return float(text)

    for path in paths:
        try:
            text = read_text(path)
            # entities that grow without end, or that name files
            if "<!DOCTYPE" in text or "<!ENTITY" in text:
                raise ValueError("an XML document type, which no annotation has")
            root = ElementTree.fromstring(text)
            size = {key: int(number(root, f"size/{key}")) for key in ("width", "height")}
            found: dict[str, dict] = {}
            for thing in root.iter("object"):
                low, high = ([number(thing, f"bndbox/{c}{m}") for c in "xy"] for m in ("min", "max"))
                name = thing.findtext("name")
                about = {"image": root.findtext("filename"), "ref": name, "bbox": [], **size}
                found.setdefault(name, about)["bbox"].append([low[0] - 1, low[1] - 1, *high])
        except (ValueError, OverflowError, ElementTree.ParseError) as e:
            found = {"": ValueError(f"not a VOC annotation: {one_line(e)}")}
        bare += not found
        records, places = folders.setdefault(os.path.dirname(path), ([], []))
        records += found.values()
        places += [os.path.basename(path)] * len(found)
    if bare == len(paths):
        raise ValueError(f"{paths[0]}: no object is annotated in these {len(paths):,} files")
    if bare:
        print(f"note: {paths[0]}: {bare:,} of {len(paths):,} such files annotate no object", file=sys.stderr)
    # with a file's path: its records stand in its folder
    return [Records(os.path.join(folder, ""), *found) for folder, found in folders.items()]


def vqa_v2(path: str, document: dict, annotations: dict) -> list[dict]:
    """Questions with their annotations. The published files name no image: COCO's own names are meant."""
    listed = by_key(path, document.get("images", []), "id", "two images")
    files = {key: image["file_name"] for key, image in listed.items()}
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
        records.append({**annotation, **question, "image": name})  # both files' keys; ids are the question's
    return records


def read_system(path: str | None) -> str | None:
    """System text of a PaddleNLP chat template, {"system": "<|im_start|>system\\n...<|im_end|>"} or plain
    text."""
    if path is None:
        return None
    if os.path.isdir(path):
        raise ValueError(f"chat_template={cut(path)} is a directory; give the file with the template")
    if not os.path.isfile(path):
        print(f"warning: no chat_template file {path}; the model's own template is used", file=sys.stderr)
        return None
    document = read_document(path)
    system = document.get("system") if isinstance(document, dict) else None
    if system is None:
        return None
    if not isinstance(system, str):
        raise ValueError(f"{path}: 'system' must be a text, got {cut(system)}")
    # The template's markers are the tokenizer's business: the text between them is what counts.
    match = re.fullmatch(r"\s*<\|im_start\|>system\r?\n(.*?)<\|im_end\|>\s*", system, re.S)
    text = match.group(1) if match else system
    if "<|" in text:
        raise ValueError(
            f"{path}: 'system' has other markers than <|im_start|>system ... <|im_end|>: {cut(text)}"
        )
    return text
