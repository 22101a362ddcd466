"""Qwen-VL's tokenizer: a byte-level BPE of tiktoken's file, special tokens behind its vocabulary.

    tokenizer = QwenTokenizer("qwen-vl-7b")  # a directory with qwen.tiktoken, or a tokenizer.json
    ids = tokenizer.encode("<|im_start|>user\\nWhat is this?")

An image's span is <img>, the bytes of its path, pads up to the number of its places, </img>.
"""

import base64
import binascii
import re
import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import checkpoint

# tiktoken's pattern: contractions | one non-letter + letters | ONE digit | blank + punctuation + line ends |
# white space
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_TAGS = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
SPECIAL_TOKENS = [ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)), *VISION_TAGS]


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte inside the tokenizers library (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


BYTE_TO_CHAR = _byte_characters()
CHAR_TO_BYTE = {c: b for b, c in enumerate(BYTE_TO_CHAR)}


def read_tiktoken(path: Path) -> Tokenizer:
    """A byte-level BPE from a file of `base64(token) rank` lines. A merge is any pair of tokens that makes a
    token, by its rank."""
    ranks, lines = {}, path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    try:
        for text, rank in (line.split() for line in lines if line):
            ranks[base64.b64decode(text, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as e:
        raise ValueError(f"{path}: not a tiktoken vocabulary (lines of 'base64 rank'): {e}") from None
    if len(ranks) < sum(map(bool, lines)) or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: its tokens or ranks are not each there once, from 0 on; fetch it again")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"{path}: the byte {missing[0]} is no token of it; fetch it again")
    to_text = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [
            (token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks
        ]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(to_text[a], to_text[b]) for a, b in pairs]
    tokenizer = Tokenizer(models.BPE({to_text[t]: r for t, r in ranks.items()}, merges))
    tokenizer.pre_tokenizer = byte_level_split()
    return tokenizer


def byte_level_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class QwenTokenizer:
    """Qwen's tokenizer: `qwen.tiktoken` or `tokenizer.json` in `directory`, special tokens directly behind
    its vocabulary."""

    def __init__(self, directory: str | Path, num_image_tokens: int = 256):
        directory = Path(directory)
        if (directory / "qwen.tiktoken").exists():
            self.bpe = read_tiktoken(directory / "qwen.tiktoken")
        elif (directory / "tokenizer.json").exists():
            self.bpe = checkpoint.read_tokenizer(directory / "tokenizer.json")
        else:
            raise ValueError(
                f"{directory}: no tokenizer; expected qwen.tiktoken or tokenizer.json beside the weights"
            )
        base = self.bpe.get_vocab(with_added_tokens=False)
        self.num_base_tokens = len(base)
        self.num_image_tokens = num_image_tokens
        self.special = {token: len(base) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.special_text = {i: token for token, i in self.special.items()}
        self.token_bytes = [b""] * len(base)
        for token, i in base.items():
            if i >= len(base) or not CHAR_TO_BYTE.keys() >= set(token):
                raise ValueError(
                    f"{directory}: the tokenizer has the token {token!r} ({i}); "
                    "expected Qwen's byte-level BPE"
                )
            self.token_bytes[i] = bytes(CHAR_TO_BYTE[c] for c in token)
        self.eos = self.pad = self.special[ENDOFTEXT]
        self.im_start, self.im_end = self.special[IM_START], self.special[IM_END]
        self.img_start, self.img_end, self.img_pad = (
            self.special[t] for t in ("<img>", "</img>", "<imgpad>")
        )
        self.vocab_size = len(base) + len(SPECIAL_TOKENS)
        self.split_all, self.split_vision = (
            re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
            for tokens in (SPECIAL_TOKENS, VISION_TAGS)
        )
        self.known: dict[str, list[int]] = {}  # short texts, the first that come
        self.newline = self.encode("\n")

    def words(self, piece: str) -> list[int]:
        """Ids of text without special tokens. Every chat has the same roles, newlines and system text: these
        are kept."""
        ids = self.known.get(piece)
        if ids is None:
            ids = self.bpe.encode(piece, add_special_tokens=False).ids
            if len(piece) <= 32 and len(self.known) < 1024:
                self.known[piece] = ids
        return ids

    def encode(self, text: str, special: str = "all", strict_paths: bool = True) -> list[int]:
        """Token ids. `special`: which special tokens inside the text are parsed, "all" or "vision" (the rest
        is plain text).

        `<img>path</img>` becomes start, Q slots holding the path's BYTES as ids and then pads, end. Raises
        ValueError for an unclosed tag or a path longer than Q bytes, TypeError for a special token inside the
        path. The model never reads a path back, so `strict_paths=False` fills the slots of a long path with
        pads instead.
        """
        text = unicodedata.normalize("NFC", text)
        if "<" not in text:  # most texts, and all special tokens have it
            return [*self.words(text)]
        pieces = (self.split_all if special == "all" else self.split_vision).split(text)
        ids: list[int] = []
        i = 0
        while i < len(pieces):
            piece = pieces[i]
            if i % 2 == 0:  # ordinary text stands at even places
                ids += self.words(piece) if piece else []
            elif piece != "<img>":
                ids.append(self.special[piece])
            else:
                if "</img>" not in pieces[i:]:
                    raise ValueError(f"Unclosed image token: {text[:80]!r} has <img> without </img>")
                end = pieces.index("</img>", i)
                if end != i + 2:
                    raise TypeError(f"special token {pieces[i + 2]!r} inside <img>...</img>")
                path, Q = pieces[i + 1].encode(), self.num_image_tokens
                if len(path) > Q and strict_paths:
                    raise ValueError(
                        f"The content in <img>..</img> is too long: {len(path)} bytes of at most {Q}"
                    )
                slots = [*path, *[self.img_pad] * (Q - len(path))] if len(path) <= Q else [self.img_pad] * Q
                ids += [self.img_start, *slots, self.img_end]
                i = end
            i += 1
        return ids

    def to_json(self) -> str:
        """A tokenizers file for other programs. In it a special token is one wherever it stands."""
        whole = Tokenizer.from_str(self.bpe.to_str())
        whole.add_special_tokens(SPECIAL_TOKENS)
        whole.normalizer, whole.decoder = normalizers.NFC(), decoders.ByteLevel()
        return whole.to_str()

    def path_at(self, ids: list[int], start: int, strict: bool) -> bytes | None:
        """The path that the image span from `start` on holds: bytes, then pads; None if it holds none."""
        if self.img_end not in ids[start:]:
            return None
        span = ids[start + 1 : ids.index(self.img_end, start)]
        path = span[: span.index(self.img_pad)] if self.img_pad in span else None
        if path is not None and all(token < 256 for token in path):
            return bytes(path)
        if strict:
            raise ValueError(f"an image span without a path and a pad, at place {start}")
        return None

    def decode(
        self,
        ids: list[int],
        skip_special: bool = False,
        keep_image_special: bool = False,
        errors: str = "replace",
        strict: bool = False,
    ) -> str:
        """Text of the ids; an image span becomes `<img>path</img>` again. What a model may say and no path
        has, a span without a pad or with other tokens than bytes, is the text of its tokens; ValueError if
        `strict`, as in the original."""
        out, i = b"", 0
        kept_tags = {self.special[t] for t in VISION_TAGS[:6]} if keep_image_special else set()
        ids = [int(t) for t in ids]
        while i < len(ids):
            token = ids[i]
            if token == self.img_start and (path := self.path_at(ids, i, strict)) is not None:
                out += path if skip_special else b"<img>" + path + b"</img>"
                i = ids.index(self.img_end, i)
            elif token < self.num_base_tokens:
                out += self.token_bytes[token]
            elif token in self.special_text and (not skip_special or token in kept_tags):
                out += self.special_text[token].encode()
            i += 1
        return out.decode("utf-8", errors=errors)
