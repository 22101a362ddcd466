"""Records: a line of somebody's file becomes a Conversation, whoever wrote it.

    (source,) = record_files.open_files(["train.jsonl"])
    conversations_of(source[0], source.where(0), "", 0)     # [Conversation(...)]

The way of a record: reader_of() recognises it by its own keys -> its reader gives [(kind, turns, answers)] ->
conversations_of() finds the images' files, writes boxes into the text, checks what is left -> Conversation. A
format of your own is a reader beside read_caption() and its keys in reader_of() and CONTENT_KEYS.

Known are Qwen-VL's [user, assistant] pairs with <img> tags, LLaVA and ShareGPT (from/value, <image> where
each image stands), ms-swift and LLaMA-Factory and TRL (messages and images, query/response, objects),
OpenAI's content parts, instruction/input/output, captions, questions with answers. A key that would change
what a record means is understood or the record is refused; nothing is dropped.
"""

import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import images
from record_files import IMAGE_KEYS, TABLE_KEYS, open_files
from terminal import cut, nearest, one_line, printable

# --------------------------------------------------------------------------------------------------
# door


class BadRecord(ValueError):
    """One record that cannot be used: where it stands, and why, cut to a line."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


class one_record:
    """The one door for bad data, `with one_record(where):` whatever reading, encoding or decoding this record
    raises is the record's fault. A class: contextlib's generators take ten times as long, twice a record."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self):
        pass

    def __exit__(self, kind, e, _):
        if isinstance(e, Exception) and not isinstance(e, BadRecord | MemoryError):
            raise BadRecord(self.where, one_line(e).removeprefix(f"{self.where}: ")) from e


# --------------------------------------------------------------------------------------------------
# a turn: texts and images in their order


class ImageRef(NamedTuple):
    """An image at its place in a turn."""

    source: str  # a file's path, or a data URL
    # The author's own words around the image's tag, in Qwen-VL's file format; None: each model writes its own
    wording: tuple[str, str] | None = None


Content = list[str | ImageRef]  # a turn: texts and images in their order


@dataclass
class Conversation:
    id: str
    turns: list[tuple[str, Content]]  # (role, content), role system, user or assistant
    # "chat": text used as it is; "caption", "vqa", "grounding": the model's processor adds its own wording
    kind: str
    where: str  # "train.jsonl:17", or "train.json record 17" (counted from 0) for a one-document file
    answers: list[str]  # all reference answers, with repetitions; of a chat, the last assistant turn
    source: str  # the record's own "source", else the entry's name
    boxes: bool = False  # whether boxes in pixels were put into its text: not every model has a form for them

    @property
    def boxed(self) -> bool:
        """Whether its text has boxes, which an image must not move under."""
        return self.boxes or any("<box>" in text_of(content) for _, content in self.turns)

    @property
    def images(self) -> list[str]:
        """Sources of the images in order."""
        return sources_of(self.turns)


def sources_of(turns: list[tuple[str, Content]]) -> list[str]:
    """Of the images in order."""
    return [part.source for _, content in turns for part in content if isinstance(part, ImageRef)]


def text_of(content: Content) -> str:
    """A turn's text without its images."""
    return "".join([part for part in content if isinstance(part, str)])


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


IMAGE_TAG = re.compile(r"((?:Picture \d+: ?)?)<img>(.*?)</img>(\n?)", re.S)  # Qwen-VL's own file format
PLACEHOLDER = "<image>"
IMAGE_PLACE = object()  # inside a turn: an image that the record's list will fill in


def parts_of_text(text: str) -> list:
    """Text with <img>PATH</img> tags and <image> placeholders -> texts, ImageRefs and IMAGE_PLACEs."""
    if "<" not in text:  # most texts
        return [text] if text else []
    small = text.lower()  # <IMG> was meant as a tag too, and is none
    if not small.count("<img>") == small.count("</img>") == len(IMAGE_TAG.findall(text)):
        raise ValueError("the tags <img> and </img> don't match")
    pieces, parts = IMAGE_TAG.split(text), []
    for n in range(0, len(pieces), 4):
        for k, plain in enumerate(pieces[n].split(PLACEHOLDER)):
            parts += ([IMAGE_PLACE] if k else []) + ([plain] if plain else [])
        if n + 1 < len(pieces):
            before, source, after = pieces[n + 1 : n + 4]
            parts.append(ImageRef(source, (before, after)))
    return parts


def image_source(value) -> str:
    """An image's source out of a path, a URL or an object that holds one."""
    if isinstance(value, dict):
        found = [value[key] for key in ("url", "path", "image", "image_url") if value.get(key)]
        # Hugging Face writes {"bytes": null, "path": ...}
        extra = set(value) - {"url", "path", "image", "image_url", "detail", "bytes", "type"}
        if len(found) != 1 or extra or value.get("bytes"):
            raise ValueError(f"an image object needs one of url and path, got {cut(sorted(value))}")
        value = found[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an image must be a path or a data URL, got {cut(value)}")
    return value


def read_part(part) -> list:
    """One content part of OpenAI's, TRL's or Hugging Face's messages."""
    if isinstance(part, str):
        return parts_of_text(part)
    if isinstance(part, ImageRef) or part is IMAGE_PLACE:  # placed before
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
    return [ImageRef(image_source(sources[0]))] if sources else [IMAGE_PLACE]


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
    places = [(content, n) for _, content in turns for n, part in enumerate(content) if part is IMAGE_PLACE]
    named = sources_of(turns)
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
    shown = path
    if "://" in path and re.match(r"[a-z][a-z0-9+.-]+://", path, re.I):
        url = urlparse(path)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise ValueError(
                f"image {images.short(shown)} is a URL; download it first and give the file's path"
            )
        path = unquote(url.path)
    if "\0" in path:
        raise ValueError(f"image {cut(path)} has a NUL character in its path")
    if os.path.isabs(path):
        tried = [path]
    else:
        if image_root and os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise ValueError(
                f"image {images.short(shown)} leaves image_root {image_root}; give a path inside it"
            )
        tried = [os.path.join(root, path) for root in (image_root, folder) if root] + [path]
    for place in tried:
        if os.path.isfile(place):
            # a.png and ./a.png are one image, whose captions belong together
            plain = os.path.normpath(place)
            return plain if plain == place or os.path.realpath(plain) == os.path.realpath(place) else place
    tried = ", ".join(map(images.short, dict.fromkeys(tried)))
    raise ValueError(f"image {images.short(shown)} not found; tried {tried}")


def resolved(content: Content, image_root: str | None, folder: str) -> Content:
    """The content with the files that its images' paths mean."""
    return [
        ImageRef(resolve_image(part.source, image_root, folder), part.wording)
        if isinstance(part, ImageRef)
        else part
        for part in content
    ]


# --------------------------------------------------------------------------------------------------
# keys: what a reader does not know is refused if it could change what the record means

# What some reader takes as a record's content. Beside another kind's keys it would be dropped: refused.
CONTENT_KEYS = TABLE_KEYS.difference(IMAGE_KEYS).union(
    "conversation multiple_choice_answer system history input objects bbox ref sent".split()
)
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
# Facts about a record that no reader needs
ABOUT = set("id question_id image_id question_type answer_type source split width height".split())
EMPTY = (None, "", [], {})


def is_empty(value) -> bool:
    return not value and value in EMPTY  # 0 and false say something


def says_something(text: str) -> bool:
    """Whether there is more to see than blanks and what is invisible."""
    return text[:1].isalnum() or any(c.isprintable() and not c.isspace() for c in text)


def text_value(value, what: str) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not says_something(value):
        raise ValueError(f"{what} must be a text that is not empty, got {cut(value)}")
    return value


def given_images(record: dict) -> list[str]:
    """The images that a record names beside its text."""
    keys = [key for key in IMAGE_KEYS if key in record and record[key] not in (None, [])]
    if len(keys) > 1:
        raise ValueError(f"the keys {' and '.join(map(repr, keys))} both name images; keep one")
    values = record[keys[0]] if keys else []
    return [image_source(value) for value in (values if isinstance(values, list) else [values])]


def check_keys(record: dict, known: set[str]) -> None:
    """Refuses a key that could change what the record means and that its reader does not know."""
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
            if not others:
                raise ValueError(f"the key {key!r} is of another kind of record than this entry's name says")
            raise ValueError(
                f"the key {key!r} does not go with {others}: two kinds of record in one; keep one"
            )
        # by the key's name; or by a file's name under any key, where the record has no other image
        number = isinstance(value, bool | int | float)
        named = MEDIA_WORD.search(key) and not ABOUT_MEDIA.search(key) and not number
        many = value if isinstance(value, list) else [value]
        # 4096: a path has no more, and a long text need not be searched
        file = any(isinstance(v, str) and len(v) < 4096 and MEDIA_FILE.fullmatch(v) for v in many)
        no_image = all(is_empty(record.get(key)) for key in IMAGE_KEYS)
        if named or (file and no_image and key not in ("id", "source")):
            raise ValueError(
                f"the key {cut(key)} looks like media and is not known{nearest(key, IMAGE_KEYS)}; images "
                "belong into 'images', other media are not supported"
            )


TURN_KEYS = {"role", "content", "from", "value", *IMAGE_KEYS}


def unused_keys(record) -> set[str]:
    """The record's keys that nothing reads and that are not refused either: they may be a misspelt one."""
    if not isinstance(record, dict):
        return set()
    found = set(record).difference(CONTENT_KEYS, IMAGE_KEYS, ABOUT, WEIGHTS)
    turns = record.get("messages") or record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            found |= {f"{key} (of a turn)" for key in set(turn).difference(TURN_KEYS, WEIGHTS)}
    return found


# --------------------------------------------------------------------------------------------------
# captions and questions. A reader takes (record, answered), and gives [(kind, turns, answers)]: mostly one,
# of a list of captions several; not answered: the record is a request, and its answer may lack


def read_caption(record: dict, answered: bool):
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


VQA_KEYS = {"question", "answer", "answers", "multiple_choice_answer", *IMAGE_KEYS}


def read_vqa(record: dict, answered: bool):
    """The answer learned is "answer", VQAv2's "multiple_choice_answer", or else the most frequent of
    "answers"."""
    check_keys(record, VQA_KEYS)
    said = [v for k in ("answer", "multiple_choice_answer") if (v := record.get(k)) is not None]
    if len(said) > 1 and said[0] != said[1]:
        raise ValueError(f"'answer' is {cut(said[0])}, 'multiple_choice_answer' {cut(said[1])}; keep one")
    answer, answers = said[0] if said else None, record.get("answers")
    if isinstance(answer, list):
        answer, answers = None, answer
    if answers is None:
        answers = [] if answer is None else [answer]
    if not isinstance(answers, list):
        raise ValueError(f"'answers' must be a list, got {cut(answers)}")
    answers = [answer_text(a) for a in answers]
    if answer is None and answers:
        answer = Counter(answers).most_common(1)[0][0]
    answer = "" if answer is None else answer_text(answer)
    if answered and not says_something(answer):
        raise ValueError("no answer: expected 'answer' or a non-empty list 'answers'")
    found = given_images(record)
    if not found:
        raise ValueError("a question needs an image, got none under 'image'")
    turns = asked_and_answered(text_value(record.get("question"), "'question'"), answer, found)
    return [("vqa", turns, answers or [answer])]


def asked_and_answered(question: str, answer: str, sources: list[str]) -> list[tuple[str, Content]]:
    turns = [("user", parts_of_text(question)), ("assistant", [answer])]
    place_images(turns, sources)
    return turns


def read_visualglm(record: dict, answered: bool):
    check_keys(record, {"img", "prompt", "label"})
    image, question = image_source(record.get("img")), text_value(record.get("prompt"), "'prompt'")
    answer = text_value(record.get("label"), "'label'") if answered else ""
    return [("vqa", asked_and_answered(question, answer, [image]), [answer])]


# --------------------------------------------------------------------------------------------------
# boxes


def read_boxes(record: dict, answered: bool):
    """What is asked for ("ref", or RefCOCO's "sent") and its boxes in pixels: "bbox" is one [x1, y1, x2, y2]
    or a list of them. They are put in when the image is found, by fill_boxes."""
    check_keys(record, {"ref", "sent", "bbox", "width", "height", *IMAGE_KEYS})
    names = [key for key in ("ref", "sent") if not is_empty(record.get(key))]
    if len(names) != 1:
        raise ValueError("a box needs one name of what is in it, under 'ref'")
    name = text_value(record[names[0]], repr(names[0])).strip()
    if "<" in name and re.search(r"</?(ref|box|img|quad)>", name):
        raise ValueError(f"{names[0]!r} holds a tag: {cut(name)}")
    found = given_images(record)
    if len(found) != 1:
        raise ValueError(f"a box needs one image, got {len(found)}")
    if answered and is_empty(record.get("bbox")):
        raise ValueError("no box: expected 'bbox': [x1, y1, x2, y2] in pixels, or a list of such")
    turns = [("user", [ImageRef(found[0]), f"<ref>{name}</ref>"]), ("assistant", [""])]
    return [("grounding", turns, [])]


def fill_boxes(turns: list[tuple[str, list]], record: dict) -> list[str]:
    """Writes a grounding record's boxes into its answer; returns the reference, in pixels of the image.
    ValueError where they do not fit the image."""
    boxes = record.get("bbox") or []
    boxes = boxes if boxes and isinstance(boxes, list) and isinstance(boxes[0], list) else [boxes]
    size = images.image_size(turns[0][1][0].source)
    told = tuple(record.get(key) or own for key, own in zip(("width", "height"), size, strict=True))
    if told != size:
        raise ValueError(
            f"the record says {cut(told[0])}x{cut(told[1])} pixels, its image has {size[0]}x{size[1]}: its "
            "boxes are another image's"
        )
    found = [inside(box, size) for box in boxes]
    if empty := [box for box in found if box[0] == box[2] or box[1] == box[3]]:
        raise ValueError(f"box {cut(empty[0])} has no area")
    turns[1][1][0] = "".join(thousandths(box, size) for box in found)
    pixels = "".join("<box>({:.10g},{:.10g}),({:.10g},{:.10g})</box>".format(*box) for box in found)
    return [f"{pixels} of {size[0]}x{size[1]}"]


def inside(box, size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2 of a box that lies in its image. Half a pixel beyond an edge is the annotator's rounding
    and is cut off."""
    four = isinstance(box, list) and len(box) == 4
    numbers = four and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    if not numbers or not all(map(math.isfinite, box)):
        raise ValueError(f"a box must be four numbers x1, y1, x2, y2, got {cut(box)}")
    if max(box) <= 1 < min(size) and any(v % 1 for v in box):
        raise ValueError(f"box {cut(box)} has shares of the image's sides; expected pixels")
    slack = 0.5 if size != (1, 1) else 0.0  # of shares of a side there is no half a pixel
    cut_off = [min(max(v, 0), side) for v, side in zip(box, size * 2, strict=True)]
    far = any(abs(v - w) > slack for v, w in zip(box, cut_off, strict=True))
    if far or cut_off[0] > cut_off[2] or cut_off[1] > cut_off[3]:
        raise ValueError(f"box {cut(box)} does not lie in its image of {size[0]}x{size[1]}")
    return cut_off


def thousandths(box: list[float], size: tuple[int, int]) -> str:
    """A box in pixels in Qwen-VL's form: corners from 0 to 999 over the image's sides."""
    x1, y1, x2, y2 = (min(999, int(1000 * v / side)) for v, side in zip(box, size * 2, strict=True))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def refuse_boxes(conversation: Conversation, model: str) -> None:
    """Of a model whose text has no form for a box."""
    if conversation.boxes:
        raise ValueError(
            f"{model} has no form for boxes in its text; train Qwen-VL on them, or leave them out"
        )


# --------------------------------------------------------------------------------------------------
# chats

ASKED, REPLIED = ("query", "instruction", "prompt"), ("response", "output", "completion", "answer")
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model"), "assistant")


def read_chat(record: dict, answered: bool):
    return [("chat", chat_turns(record, answered), [])]  # its answer is known when its boxes are


def chat_turns(record: dict, answered: bool) -> list[tuple[str, list]]:
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


def single_exchange(record: dict) -> list[tuple[object, object]]:
    """[(role, content)] of a record whose question and answer have keys of their own: query/response,
    instruction/input/output, prompt/completion; "history" holds the pairs before."""
    asked = next(key for key in ASKED if not is_empty(record.get(key)))
    replied = [key for key in REPLIED if not is_empty(record.get(key))]
    if len(replied) > 1:
        raise ValueError(f"the keys {' and '.join(map(repr, replied))} both answer {asked!r}; keep one")
    raw, history = [], [] if is_empty(record.get("history")) else record["history"]
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history' must be a list of [question, answer], got {cut(pair)}")
        raw += [("user", pair[0]), ("assistant", pair[1])]
    question = record[asked]
    if asked == "instruction" and not is_empty(extra := record.get("input")):
        question = text_value(question, "'instruction'") + "\n" + text_value(extra, "'input'")
    return raw + turns_of("user", question) + (turns_of("assistant", record[replied[0]]) if replied else [])


def turns_of(role: str, said) -> list[tuple[object, object]]:
    """What somebody said: a turn of that role, or TRL's conversational form, a list of messages."""
    if isinstance(said, list) and said and isinstance(said[0], dict) and "role" in said[0]:
        return [message_of(n, message) for n, message in enumerate(said)]
    return [(role, said)]


def message_of(n: int, message) -> tuple[object, object]:
    """(role, content) of one message in OpenAI's or ShareGPT's form, with its own images in place."""
    if not isinstance(message, dict):
        raise ValueError(f"turn {n} must be an object with role and content, got {cut(message)}")
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if message.keys() == {role_key, text_key}:  # most have nothing else to look at
            return message[role_key], message[text_key]
    given = [key for key in ("role", "content", "from", "value") if not is_empty(message.get(key))]
    role_key, text_key = ("role", "content") if {"role", "content"} & {*given} else ("from", "value")
    if other := next((key for key in given if key not in (role_key, text_key)), None):
        raise ValueError(
            f"turn {n} has {other!r} beside {role_key!r} and {text_key!r}; keep one of the pairs"
        )
    # what is no answer is not learned anyway
    learned = ROLES.get(str(message.get(role_key))) == "assistant"
    try:
        check_keys(message, TURN_KEYS if learned else TURN_KEYS | {*WEIGHTS})
    except ValueError as e:
        raise ValueError(f"turn {n}: {e}") from None
    content = message.get(text_key)
    if own := given_images(message):
        content = read_content(content)
        place_images([("user", content)], own)
    return message.get(role_key), content


def fill_objects(turns: list[tuple[str, list]], objects, answered: bool = True) -> None:
    """ms-swift's "objects": names and boxes that take the places of <ref-object> and <bbox> in the text, in
    pixels of their image unless "bbox_type" is "norm1". Sources: its documentation of custom datasets."""
    text = "".join([text_of(content) for _, content in turns])
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
        count = text.count(marks[key])
        # what is asked for is in the answer that a request leaves out
        if not isinstance(values, list) or count > len(values) or count < len(values) and answered:
            raise ValueError(f"{cut(values)} under objects.{key}, but the text has {count} {marks[key]}")
    if not isinstance(owners, list) or len(owners) != len(boxes):
        raise ValueError(f"objects.image_id must name an image for each of the {len(boxes)} boxes")
    sources, boxes = sources_of(turns), zip(boxes, owners, strict=True)
    names = [f"<ref>{text_value(ref, 'objects.ref')}</ref>" for ref in refs]
    written = [box_text(box, kind, owner, sources) for box, owner in boxes]
    # each mark takes the next one of its kind, through all turns
    fillings = {"<ref-object>": iter(names), "<bbox>": iter(written)}
    for _, content in turns:
        for n, part in enumerate(content):
            if isinstance(part, str):
                content[n] = re.sub("<ref-object>|<bbox>", lambda match: next(fillings[match[0]]), part)


def box_text(box, kind: str, owner: int, sources: list[str]) -> str:
    """A box of "objects" in thousandths of its image's sides."""
    if not isinstance(owner, int) or not 0 <= owner < len(sources):
        raise ValueError(f"objects.image_id names image {cut(owner)}, the record has {len(sources)}")
    size = images.image_size(sources[owner]) if kind == "real" else (1, 1)
    return thousandths(inside(box, size), size)


# --------------------------------------------------------------------------------------------------
# a record

READERS = {
    "chatml_dataset": read_chat,
    "coco_caption": read_caption,
    "vg_caption": read_caption,
    "coco_vqa": read_vqa,
    "visualglm_dataset": read_visualglm,
    "boxes": read_boxes,
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
    if "bbox" in have and have & {"ref", "sent"}:
        return read_boxes
    if have & {*ASKED}:
        return read_chat
    if have & {"caption", "captions"} or "text" in have and have & set(IMAGE_KEYS):
        return read_caption
    raise ValueError(
        f"no known kind of record among the keys {cut(sorted(have))}; expected 'messages', 'conversations', "
        "'query' and 'response', 'instruction' and 'output', 'question' and 'answer', 'ref' and 'bbox', or "
        "'image' and 'caption'"
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
    for kind, turns, answers in (READERS[name] if name else reader_of(record))(record, answered):
        turns = [(role, resolved(content, image_root, folder)) for role, content in turns]
        # boxes in pixels are written as shares of the image, whose size only its file says
        if kind == "chat":
            fill_objects(turns, record.get("objects"), answered)
            answers = [text_of(turns[-1][1])] if answered else []
            if system and turns[0][0] != "system":
                turns.insert(0, ("system", [system]))
        if kind == "grounding":
            answers = fill_boxes(turns, record) if answered else []
        boxes = kind == "grounding" or not is_empty(record.get("objects"))
        check_text(turns, [str(id), source, *answers])
        found.append(Conversation(str(id), turns, kind, where, answers, source, boxes))
    return found


# Other projects' words for the place of an image or a film, which would be learned as text
BLANK = r"[\s\u200b-\u200d\u2060\ufeff]*"  # what is invisible too
LEFT_OVER = re.compile(
    rf"(<|&lt;)/?\|?{BLANK}((start|begin|end)_of_)?(image|img|video|audio|vision)s?"
    r"([ _-]?(\d+|placeholder|here|pad|(soft_)?token|start|end|context|content|bos|eos|sep))*"
    rf"{BLANK}/?\|?(>|&gt;)",
    re.I,
)


def check_text(turns: list[tuple[str, Content]], more: list[str] = ()) -> None:
    """Refuses a turn's leftovers, and half characters in it or in `more`, which no file could hold."""
    texts = [text_of(content) for _, content in turns]
    for n, text in enumerate(texts):
        if ("<" in text or "&lt;" in text) and (found := LEFT_OVER.search(text)):
            raise ValueError(
                f"turn {n} ({turns[n][0]}) has {found[0]} in its text, which stands for no image here; "
                f"images stand where {PLACEHOLDER} stands in a question or an answer of a chat"
            )
    try:
        "".join([*texts, *more]).encode()
    except UnicodeEncodeError as e:
        half, what = e.object[e.start], "its id, source or an answer"
        for n in (n for n, text in enumerate(texts) if half in text):
            what = f"turn {n} ({turns[n][0]})"
        raise ValueError(f"{what} has a lone surrogate, half a character: {cut(half)}") from None


# --------------------------------------------------------------------------------------------------
# requests: records that are to be answered


def say_keys(what: str, keys) -> None:
    if keys:
        names = ", ".join(printable(key)[:60] for key in sorted(keys)[:20])
        print(f"note: {what}: keys that are not used: {names}", file=sys.stderr)


def request(turns: list[tuple[str, str | Content]], images: list[str], where: str) -> Conversation:
    """A chat to be answered. A turn may be a text with <img>PATH</img> tags; `images` stand before the last
    one's."""
    parts = [
        (role, parts_of_text(content) if isinstance(content, str) else content) for role, content in turns
    ]
    place_images([("user", parts[-1][1])], images)
    if any(not isinstance(part, str) for role, content in parts if role == "system" for part in content):
        raise ValueError(f"{where}: an image in the system text; images belong into the question")
    turns = [(role, resolved(content, None, "")) for role, content in parts]
    # what a model has said may hold anything
    check_text([turn for turn in turns if turn[0] != "assistant"])
    return Conversation("0", turns, "chat", where, [], "request")


def read_requests(path: str, elsewhere=()) -> tuple[list[Conversation], list[BadRecord]]:
    """What is to be answered, and the records that cannot be: {"prompt": ..., "image": path or list of paths}
    or any record of records.py, whose last answer is dropped.

    elsewhere: keys that a record must not have, since they are options of the whole command.
    """
    requests, problems, unused = [], [], set()
    for source, i in ((file, i) for file in open_files([path]) for i in range(len(file))):
        where, folder = source.where(i), os.path.dirname(source.path)
        try:
            with one_record(where):
                record = source[i]
                if wrong := set(elsewhere) & set(record if isinstance(record, dict) else ()):
                    raise ValueError(f"{wrong.pop()!r} is an option of the command, for all requests alike")
                requests.append(conversations_of(record, where, folder, i, answered=False)[0])
                unused |= unused_keys(record)
        except BadRecord as e:
            problems.append(e)
    if not requests and not problems:
        raise ValueError(f"{path} holds no request")
    say_keys(path, unused)
    return requests, problems
