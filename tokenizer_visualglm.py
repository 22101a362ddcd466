"""ChatGLM-6B's tokenizer, a sentencepiece unigram model read without the sentencepiece package, and
VisualGLM's prompt format.

    tokenizer = GLMTokenizer("visualglm-6b")  # a directory with ice_text.model, or a tokenizer.json
    ids = tokenizer.encode("图片里有什么？")
    ids = chat_prompt(tokenizer, "图片里有什么？", num_image_tokens=32)

The segmentation is the tokenizers library's; the normalisation is done here, from the table in the file.
"""

import hashlib
import json
import math
import re
import struct
import unicodedata
from base64 import b64decode
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tokenizers import Tokenizer, models

import schema

SPACE = "\u2581"  # sentencepiece's visible blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece's piece types
NEWLINE, TAB = "<n>", "<|tab|>"
BLANKS = [f"<|blank_{n}|>" for n in range(2, 81)]
# Literally in a user's text these become the special ids, as in the original; [gMASK] and </s> do not
TEXT_SPECIALS = ["<sop>", "<eop>", "<pad>", "<unk>", "[MASK]"]


def protobuf_fields(data: bytes):
    """(number, value) of each field of one message: ints, 4-byte floats, bytes.
    https://protobuf.dev/programming-guides/encoding/"""
    i = 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            i += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while i < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        elif kind == 2:
            size = varint()
            value, i = data[i : i + size], i + size
            if i > len(data):
                raise ValueError("it is cut short")
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, i = struct.unpack("<d" if kind == 1 else "<f", data[i : i + size])[0], i + size
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, value


def read_sentencepiece(path: Path) -> tuple[list[tuple[str, float, int]], bytes]:
    """-> ([(piece, score, type)], normalisation table) of a unigram model file.
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto"""
    pieces, table = [], b""
    try:
        for number, value in protobuf_fields(path.read_bytes()):
            if number == 1:
                piece = dict(protobuf_fields(value))
                pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)))
            elif number == 2 and dict(protobuf_fields(value)).get(3, 1) != 1:
                raise ValueError("its model type is not unigram")
            elif number == 3:
                table = dict(protobuf_fields(value)).get(2, b"")
    except (ValueError, IndexError, KeyError, struct.error, TypeError) as e:
        raise ValueError(f"{path}: not a sentencepiece unigram model ({e}); fetch it again") from None
    return pieces, table


def read_tokenizer_json(path: Path) -> tuple[list[tuple[str, float, int]], bytes]:
    """The same from a tokenizers file with a Unigram model. Types go by name."""
    document = schema.read_json(path, "expected a tokenizer")
    model, added, normalizer = (document.get(key) for key in ("model", "added_tokens", "normalizer"))
    schema.check(model, dict, f"{path}: model")
    schema.check(model.get("type", "Unigram"), Literal["Unigram"], f"{path}: model.type")
    vocab = model.get("vocab")
    schema.check(vocab, list, f"{path}: model.vocab")
    pairs = (isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in vocab)
    if not all(pairs) or not all(isinstance(score, int | float) for _, score in vocab):
        raise ValueError(
            f"{path}: model.vocab has an entry that is no pair of text and score; fetch it again"
        )
    schema.check(model.get("unk_id"), Annotated[int, 0, len(vocab) - 1], f"{path}: model.unk_id")
    schema.check(added, list[dict] | None, f"{path}: added_tokens")
    control = {str(token.get("content")) for token in added or [] if token.get("special")}
    schema.check(normalizer, dict | None, f"{path}: normalizer")
    parts = (normalizer or {}).get("normalizers", [normalizer or {}])
    schema.check(parts, list[dict], f"{path}: normalizer.normalizers")
    maps = [n.get("precompiled_charsmap") for n in parts if n.get("type") == "Precompiled"]
    schema.check(maps, list[str], f"{path}: precompiled_charsmap")
    try:
        table = b64decode(maps[0], validate=True) if maps else b""
    except ValueError as e:
        raise ValueError(f"{path}: precompiled_charsmap is no base64 ({e}); fetch it again") from None

    def kind(i: int, piece: str) -> int:
        if i == model["unk_id"]:
            return UNKNOWN
        if piece in (NEWLINE, TAB) or re.fullmatch(r"<\|blank_\d+\|>", piece):
            return USER_DEFINED
        return BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else CONTROL if piece in control else NORMAL

    return [(piece, float(score), kind(i, piece)) for i, (piece, score) in enumerate(vocab)], table


class CharacterMap:
    """sentencepiece's normalisation table: a Darts double array of UTF-8 prefixes -> offsets of their
    replacements."""

    def __init__(self, table: bytes):
        size = struct.unpack("<I", table[:4])[0] if len(table) > 4 else 0
        if not 4 <= size <= len(table) - 5 or size % 4 or table[-1]:
            raise ValueError("the tokenizer's normalisation table is damaged; fetch it again")
        self.units = np.frombuffer(table[4 : 4 + size], dtype="<u4").tolist()
        self.replacements = table[4 + size :]

    def longest(self, data: bytes, start: int) -> tuple[int, str] | None:
        """(length, replacement) of the longest prefix of data[start:] in the table."""
        units, found = self.units, None
        node = offset_of(units[0])
        for i in range(start, len(data)):
            node ^= data[i]
            if node >= len(units) or units[node] & 0x800000FF != data[i]:
                break
            unit = units[node]
            node ^= offset_of(unit)
            if unit >> 8 & 1:  # a key ends here; its value is the next unit
                if node >= len(units) or (value := units[node] & 0x7FFFFFFF) >= len(self.replacements):
                    raise ValueError("the tokenizer's normalisation table is damaged; fetch it again")
                found = i + 1 - start, value
        if found is None:
            return None
        end = self.replacements.index(b"\0", found[1])
        return found[0], self.replacements[found[1] : end].decode()

    def begins(self, data: bytes) -> bool:
        """Whether a key of the table begins with these bytes."""
        node = offset_of(self.units[0])
        for byte in data:
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000FF != byte:
                return False
            node ^= offset_of(self.units[node])
        return True

    def runs(self) -> re.Pattern:
        """Matches ASCII that stands for itself, whatever ASCII follows: most of a text."""
        ascii = [bytes([c]) for c in range(128)]
        kept = [c for c in ascii if not self.longest(c, 0) and not any(self.begins(c + d) for d in ascii)]
        return re.compile(b"[%b]+(?![\x80-\xff])" % re.escape(b"".join(kept)) if kept else b"(?!)")


def offset_of(unit: int) -> int:
    return (unit >> 10) << ((unit & 512) >> 6)


class GLMTokenizer:
    """ChatGLM-6B's tokenizer: `ice_text.model`, or a `tokenizer.json`
    with a Unigram model, in `directory`."""

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        if (directory / "ice_text.model").exists():
            pieces, table = read_sentencepiece(directory / "ice_text.model")
        elif (directory / "tokenizer.json").exists():
            pieces, table = read_tokenizer_json(directory / "tokenizer.json")
        else:
            raise ValueError(
                f"{directory}: no tokenizer; expected ice_text.model or tokenizer.json beside the weights"
            )
        self.pieces = [piece for piece, _, _ in pieces]
        self.types = [kind for _, _, kind in pieces]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        odd = next((p for p in pieces if not math.isfinite(p[1]) or p[2] not in range(1, 7)), None)
        if odd or len(self.ids) < len(pieces):
            what = f"the piece {odd!r}" if odd else "a piece twice"
            raise ValueError(f"{directory}: the tokenizer has {what}; expected ChatGLM-6B's, fetch it again")
        missing = [t for t in (*TEXT_SPECIALS, "[gMASK]", NEWLINE, "<0x00>", "<0xFF>") if t not in self.ids]
        if missing:
            raise ValueError(
                f"{directory}: the tokenizer has no piece {', '.join(missing)}; expected ChatGLM-6B's"
            )
        self.unk, self.pad, self.sop, self.eop, self.mask, self.gmask = (
            self.ids[t] for t in ("<unk>", "<pad>", "<sop>", "<eop>", "[MASK]", "[gMASK]")
        )
        self.vocab_size = len(pieces)
        # a name with a raw blank is never found in normalised text: only ordinary pieces are
        vocab = [
            (piece if kind in (NORMAL, UNUSED) else f" {i}", score)
            for i, (piece, score, kind) in enumerate(pieces)
        ]
        self.unigram = Tokenizer(models.Unigram(vocab, self.unk))
        user = sorted((p for p, _, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
        self.user_defined = re.compile("(" + "|".join(map(re.escape, user)) + ")")
        self.specials = re.compile("(" + "|".join(map(re.escape, TEXT_SPECIALS)) + ")")
        self.map = CharacterMap(table) if table else None
        self.runs = self.map.runs() if self.map else None
        self.fingerprint = hashlib.sha256(json.dumps(pieces).encode() + table).hexdigest()

        self.image_tag = self.encode("<img>")

    def normalise(self, text: str) -> str:
        """As sentencepiece: characters by the table (plain NFKC without one), runs of blanks to one, none at
        the ends, a dummy blank in front; user-defined pieces stay as they are."""
        out, after_blank = [], True
        for i, part in enumerate(self.user_defined.split(text)):
            for piece in [part] if i % 2 else self.characters(part):
                piece = piece.lstrip(" ") if after_blank else piece
                if piece:
                    out.append(piece.replace(" ", SPACE))
                    after_blank = piece.endswith(" ")
        text = "".join(out).rstrip(SPACE)
        return SPACE + text if text else ""

    def characters(self, text: str):
        """The replacements of a text's characters, in runs where these have none; runs of blanks are one."""
        if self.map is None:
            yield re.sub(" +", " ", unicodedata.normalize("NFKC", text))
            return
        data, i = text.encode("utf-8", "replace"), 0
        while i < len(data):
            if run := self.runs.match(data, i):
                yield re.sub(" +", " ", run[0].decode())
                i = run.end()
                continue
            found = self.map.longest(data, i)
            if found is None:
                size = 1 if data[i] < 0x80 else 2 if data[i] < 0xE0 else 3 if data[i] < 0xF0 else 4
                found = size, data[i : i + size].decode()
            yield found[1]
            i += found[0]

    def encode_plain(self, text: str) -> list[int]:
        """Without special tokens: line ends, tabs and runs of blanks have pieces of their own, unknown
        characters are bytes."""
        text = text.replace("\n", NEWLINE).replace("\t", TAB)
        for n in range(80, 1, -1) if "  " in text else ():
            text = text.replace(" " * n, f"<|blank_{n}|>")
        ids: list[int] = []
        for i, part in enumerate(self.user_defined.split(self.normalise(text))):
            if i % 2:
                ids.append(self.ids[part])
                continue
            encoding = self.unigram.encode(part, add_special_tokens=False)
            if self.unk not in encoding.ids:
                ids += encoding.ids
                continue
            for token, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
                ids += (
                    [token]
                    if token != self.unk
                    else [self.ids[f"<0x{b:02X}>"] for b in part[first:end].encode()]
                )
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text; TEXT_SPECIALS in it become their ids, blanks around them are lost, as in the
        original."""
        ids, parts = [], self.specials.split(text)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.ids[part])
            else:
                part = part.lstrip() if i else part
                ids += self.encode_plain(part.rstrip() if i < len(parts) - 1 else part)
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of the ids. Pads and control pieces vanish; so do ids without a piece (the embedding has more
        rows than the vocabulary), where the original raises IndexError."""
        text, raw = "", b""
        for token in map(int, ids):
            if token >= self.vocab_size or token == self.pad:
                continue
            if skip_special and (token == self.unk or self.types[token] == CONTROL):
                continue
            piece, kind = self.pieces[token], self.types[token]
            if kind == BYTE:
                raw += bytes([int(piece[1:-1], 16)])
                continue
            text, raw = text + raw.decode("utf-8", "replace"), b""
            if kind == UNKNOWN:
                text += " \u2047 "
            elif kind != CONTROL:
                text += piece.replace(SPACE, " ") if text else piece.removeprefix(SPACE).replace(SPACE, " ")
        text += raw.decode("utf-8", "replace")
        text = text.replace(NEWLINE, "\n").replace(TAB, "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda m: " " * int(m[1]), text)


# --------------------------------------------------------------------------------------------------
# The prompt format: which ids a chat has, where each stands, which are learned

# No "[Round n]": that is the text-only ChatGLM's format.
TEMPLATES = {"zh": "问：{}\n答：", "en": "Q:{}\nA:"}


def glm_positions(ids, bos: int, gmask: int, mask: int) -> tuple[np.ndarray, int]:
    """-> position_ids (2, T), length of the context.

    The context ends before the first `<sop>`. Channel 0 counts through it and then stays at the place of
    [gMASK] (of [MASK] where there is none); channel 1 is 0 in the context and counts from 1 at `<sop>`.
    """
    ids = ids if isinstance(ids, list) else np.asarray(ids).tolist()
    if bos not in ids or not (gmask in ids or mask in ids):
        raise ValueError("the tokens need a <sop> and a [gMASK] or [MASK]")
    # The first of each counts.
    context, place = ids.index(bos), ids.index(gmask if gmask in ids else mask)
    # Image places count like words: 32 of them.
    count = np.arange(len(ids))
    answer = count >= context
    # From 1 at <sop>: with a count from 0 the logits are off by 0.5.
    return np.stack((np.where(answer, place, count), np.where(answer, count - context + 1, 0))), context


def context_text(query: str, history: list[tuple[str, str]] = (), language: str = "zh") -> str:
    """Past rounds and the question, up to where the answer begins."""
    template = TEMPLATES[language]
    # A past round ends in a line break, the open one in the answer's mark.
    return "".join(template.format(q) + f"{a}\n" for q, a in history) + template.format(query)


def context_ids(
    tokenizer: GLMTokenizer, text: str, num_image_tokens: int, slot: int
) -> tuple[list[int], list[int]]:
    """-> ids of `<img>`, the image's slots, `</img>` and the text; [index of the first slot].
    num_image_tokens 0: no image.

    The tags are plain text to the tokenizer. No slot's id reaches an embedding: HF writes <unk> there, SAT
    <pad>.
    """
    if not num_image_tokens:
        return tokenizer.encode(text), []
    # Encoded apart, as the original does: each part gets the tokenizer's dummy blank in front.
    tag = tokenizer.image_tag
    return [*tag, *[slot] * num_image_tokens, *tokenizer.encode("</img>" + text)], [len(tag)]


def chat_prompt(
    tokenizer: GLMTokenizer,
    query: str,
    history: list[tuple[str, str]] = (),
    num_image_tokens: int = 0,
    language: str = "zh",
    slot: int | None = None,
) -> list[int]:
    """Ids of a chat up to where the answer begins; an image stands in front of the first round, whatever
    round it is."""
    slot = tokenizer.unk if slot is None else slot
    ids, _ = context_ids(tokenizer, context_text(query, history, language), num_image_tokens, slot)
    # [gMASK] says that an answer of any length follows; <sop> is its first token.
    return [*ids, tokenizer.gmask, tokenizer.sop]


def training_ids(
    tokenizer: GLMTokenizer, context: list[int], answer: str, max_source=None, max_target=None
) -> tuple[list, list]:
    """Ids and UNSHIFTED labels of one sample as the official finetune_visualglm.py makes them: `<sop>`, the
    answer and `<eop>` are supervised. max_source and max_target cut the context and the answer, each with its
    special tokens."""
    # here: a static package holds this file, no kernels
    from kernels.linear_cross_entropy import IGNORE_INDEX

    tk = tokenizer
    # The official script cuts a long question at its end, the answer's mark with it.
    context = context if max_source is None else context[: max_source - 1]
    answer = tk.encode(answer) if max_target is None else tk.encode(answer)[: max_target - 2]
    ids = [*context, tk.gmask, tk.sop, *answer, tk.eop]
    # From <sop> on, which is learned itself: behind the context and [gMASK].
    start = len(context) + 1
    return ids, [IGNORE_INDEX] * start + ids[start:]


# The original's finish of an answer: Chinese punctuation, which the tokenizer's normalisation had made
# half-width
CLEANUP = [(r"\[\[训练时间\]\]", "2023年")]
for _half, _full in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？")):
    CLEANUP += [(rf"([\u4e00-\u9fff]){_half}", rf"\1{_full}"), (rf"{_half}([\u4e00-\u9fff])", rf"{_full}\1")]


def clean_response(text: str) -> str:
    text = text.strip()
    for pattern, new in CLEANUP:
        text = re.sub(pattern, new, text)
    return text
