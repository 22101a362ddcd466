"""Continuous batching: many answers at once, each as it would be alone.

    engine = Engine(model, processor)
    engine.submit(Request("a", processor.prompt(conversation), Decoding(max_new_tokens=20)))
    while engine.has_work():
        for event in engine.step():
            print(event.request.id, event.token, event.finish)

A step is one forward pass over one stream: a token of each running sequence and pieces of waiting prompts,
under a budget of tokens. Requests join and leave between steps. Keys and values lie in one pool; a sequence
owns a range of its rows, attention reads them where they are. The range of an answer that has ended stays
until room is needed: a prompt that begins like it (same tokens, images, adapter) computes only what is new.
"""

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

import lora
from decode_graph import DecodeGraphs, capture_for
from kernels.attention import attention_ranges
from sampling import Beams, Sampler
from vlm import Batch, move

IMAGES_AT_ONCE = 16  # images that the vision tower takes in one pass: its activations are bounded
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): its weights are damaged, or 16 bits overflow; "
    "fetch the checkpoint again, or use --dtype float32"
)


# eq=False: a request is itself, also beside one with the same fields, and can be the key of a dict.
@dataclass(eq=False)
class Request:
    """One answer that is wanted."""

    id: str  # names its random stream together with how.seed
    prompt: dict  # what processor.prompt(conversation) gave; with pixel_values, `images` are not opened
    how: "Decoding"  # noqa: F821  (generate.Decoding)
    stop: list[str] = field(default_factory=list)  # texts that end the answer and are not part of it
    adapter: str | None = None  # one of the engine's; None: the base
    logprobs: int = 0  # best tokens whose log-probabilities are reported; -1: none at all
    logit_bias: dict[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stopped: Callable[[list[int]], bool] | None = None  # ends the answer by its ids
    client: str = ""  # whose it is: clients take turns, however many requests each has


@dataclass(slots=True)
class Event:
    """One token of a request, or its end."""

    request: Request
    token: int | None  # None: nothing but the end
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: str | None = None  # None while it runs; "stop", "length", "error"
    error: str | None = None  # one line, with finish="error"
    cached_tokens: int = 0  # tokens of the prompt that were not computed again


@dataclass(eq=False)
class Sequence:
    """A request inside the engine."""

    request: Request | None  # None: it has ended
    # In NumPy: a step reads and writes single numbers of each sequence, for which a tensor is slow.
    tokens: np.ndarray  # the prompt, then room for the answer
    total: int  # tokens that are known, prompt and answer; total - fed of them are still to be computed
    positions: np.ndarray  # (n, len(tokens)) or (len(tokens),)
    given: int  # tokens of the prompt
    encoder: int  # of them, those that an encoder sees; the others are rows of the pool
    rows: int  # that it needs
    images: list[Tensor]  # their pixels until they are encoded
    digests: dict[int, bytes]  # place of an image's first slot -> what the image is
    group: tuple  # sequences of one group may share cached rows
    start: int = -1  # its first row
    fed: int = 0  # tokens whose keys and values are in the pool
    cached: int = 0  # of them, those that came from another sequence
    slot: int = -1  # its place in the sampler's tables
    stopped: Callable[[list[int]], bool] | None = None  # whether an answer ends, by its ids
    beams: "Beams | None" = None  # the search that it belongs to
    features: list[Tensor] | None = None
    feature_keys: list[tuple] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.given : self.total].tolist()

    # Beams are sequences of their own from the first fork on; until then the request has one, its prompt's.
    @property
    def running(self) -> "list[Sequence]":
        """Itself, or the beams that it has become."""
        return self.beams.sequences if self.beams and self.beams.sequences else [self]

    @property
    def decodes(self) -> bool:
        """Whether one token is left to compute, and others are there."""
        first = self.running[0]  # beams go in step: what holds for one holds for all
        return first.fed > 0 and first.total - first.fed == 1

    def row(self, token: int) -> int:
        """Rows of the pool that the tokens before this one take."""
        # What only an encoder sees has its keys and values in the memory, not among the rows.
        return max(0, token - self.encoder)


# --------------------------------------------------------------------------------------------------
# Keys and values


class Pool:
    """Rows for the keys and values of all sequences, the same rows in every layer. `memory` holds what an
    encoder-decoder's layers see of the encoder.

    Ranges are whole multiples of GRAIN: neighbours then often begin at even distances, and attention takes
    them in one call (attention_ranges_ref). One row more than `size` is nobody's (decode_graph.py).
    """

    GRAIN = 32

    def __init__(self, size: int, before: int = 0):
        self.size, self.before = 0, before  # rows in front of each sequence's own (P-tuning)
        self.free: list[tuple[int, int]] = []  # (first, end) of each gap, in order
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.grow(size)

    def grow(self, size: int) -> None:
        """To that many rows, if it has fewer."""
        # For generate(), which learns one by one what it needs; a server's pool has its size from the start.
        if size <= self.size:
            return
        # New dicts: captured graphs see by them that the addresses they hold are of old buffers, of which
        # those of one layer at a time are there beside the new ones.
        before, self.layers, self.memory = (self.layers, self.memory), {}, {}
        for old, new in zip(before, (self.layers, self.memory), strict=True):
            for layer in list(old):
                new[layer] = tuple(self.buffer(x, size, x) for x in old.pop(layer))
        # The new rows are a gap like any other, joined with the one before if that reaches the old end.
        self.give_back(self.size, size - self.size)
        self.size = size

    @staticmethod
    def buffer(like: Tensor, size: int, old: Tensor | None = None) -> Tensor:
        """(size + 1, heads, width), with what an older one holds."""
        new = like.new_zeros(size + 1, *like.shape[1:])
        if old is not None:
            new[: len(old) - 1] = old[:-1]
        return new

    def take(self, rows: int) -> int | None:
        """The first row of a range that is free, None where there is no such gap."""
        # The first gap: ranges gather at the beginning, and the rest of the pool stays in one piece.
        for n, (first, end) in enumerate(self.free):
            if end - first >= rows:
                self.free[n : n + 1] = [(first + rows, end)] if end - first > rows else []
                return first
        return None

    def give_back(self, first: int, rows: int) -> None:
        self.free = joined([*self.free, (first, first + rows)])

    def would_fit(self, rows: int, ranges: list[tuple[int, int]]) -> bool:
        """Whether there is a gap of so many rows once these ranges are free."""
        # Asked first: what is given up and does not make room enough would be lost for nothing.
        return any(end - first >= rows for first, end in joined([*self.free, *ranges]))

    def grains(self, rows: int, ranges: int) -> int:
        """The rows of so many ranges side by side, in whole grains if the pool has as many."""
        whole = -(-rows // self.GRAIN) * self.GRAIN * ranges
        return whole if whole <= self.size or rows * ranges > self.size else rows * ranges

    def clear(self, first: int, rows: int) -> None:
        """Attention may look at rows behind a sequence's keys, and drop what it finds; NaN would stay."""
        # A probability of zero times NaN is NaN.
        for pair in (*self.layers.values(), *self.memory.values()):
            for x in pair:
                x[first : first + rows] = 0

    def copy(self, source: int, target: int, rows: int, memory: int = 0) -> None:
        for buffers, count in ((self.layers, rows), (self.memory, memory)):
            for pair in buffers.values():
                for x in pair:
                    x[target : target + count] = x[source : source + count]


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, neighbours as one."""
    out: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if out and out[-1][1] == first:
            first = out.pop()[0]
        out.append((first, end))
    return out


class KVCache:
    """The pool as one forward pass sees it: the ranges of the segments of its stream."""

    def __init__(self, pool: Pool, starts: list[int], past: list[int], memory: list[int], encode: bool):
        self.pool, self.starts, self.past, self.memory_lengths = pool, starts, past, memory
        self.encode = encode  # an encoder-decoder's prompts: the stream holds the encoder's tokens too
        self.rows: Tensor | None = None  # (T,) where the stream's tokens go, known at the first layer
        self.keys: list[tuple[int, int]] = []  # (first row, end) that each segment attends to

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        prefix_lens: Tensor | None = None,
        bias: Tensor | None = None,
        tuned: Tensor | None = None,
    ) -> Tensor:
        """Puts k and v (T, H, D) of the segments behind what their sequences hold, and attends to all of it.

        prefix_lens (S,) as attention() takes them. A bias (H, Lq, Lk) says itself what is visible; it ends
        with the last query and the last key. tuned (2, P, H, D): keys and values that every sequence has
        before its own (P-tuning).
        """
        before = self.pool.before
        # The first layer works out for all of them where the tokens go; a device gets it in one copy.
        if self.rows is None:
            counts = cu_seqlens.diff().tolist()
            first = [s + before + n for s, n in zip(self.starts, self.past, strict=True)]
            self.keys = [(s, f + n) for s, f, n in zip(self.starts, first, counts, strict=True)]
            self.rows = there(ranges_of(first, counts), q.device)
        pair = self.buffers(self.pool.layers, layer, k, v)
        # Written before they are read: a token sees itself, and earlier ones of its own piece.
        for buffer, x in zip(pair, (k, v), strict=True):
            buffer.index_copy_(0, self.rows, x)
        # The prefix lies in front of each sequence's own rows, so attention needs no second range.
        if before:
            new = [s for s, n in zip(self.starts, self.past, strict=True) if n == 0]
            for buffer, x in zip(pair, tuned, strict=True):
                for s in new:
                    buffer[s : s + before] = x
            prefix_lens = None if prefix_lens is None else prefix_lens + before
        return attention_ranges(q, *pair, cu_seqlens, self.keys, bias is None, prefix_lens, bias)

    def attend_memory(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cu_seqlens: Tensor,
        memory_cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Attends to the memory of the segments' sequences, all of it; k and v (Tm, H, D) make it in the
        first pass."""
        if k is not None:
            rows = there(ranges_of(self.starts, memory_cu_seqlens.diff().tolist()), q.device)
            for buffer, x in zip(self.buffers(self.pool.memory, layer, k, v), (k, v), strict=True):
                buffer.index_copy_(0, rows, x)
        # The same first row as the decoder's own range, in buffers of the memory's own.
        keys = [(s, s + n) for s, n in zip(self.starts, self.memory_lengths, strict=True)]
        return attention_ranges(q, *self.pool.memory[layer], cu_seqlens, keys, causal=False)

    def longest_past(self) -> int:
        """Of the sequences, before this pass."""
        return max(self.past)

    def buffers(self, where: dict, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # Made by what comes: the pool need not know a layer's heads, their width, dtype and device.
        if layer not in where:
            where[layer] = tuple(self.pool.buffer(x, self.pool.size) for x in (k, v))
        return where[layer]


def there(x: Tensor, device: torch.device) -> Tensor:
    """The same on a device, for which the host does not wait."""
    return move({"x": x}, device)["x"]


def ranges_of(first: list[int], counts: list[int]) -> Tensor:
    """The whole numbers of the ranges first[n] .. first[n] + counts[n] - 1, one range after the other."""
    # Without a loop: each number is its place in the stream, moved by what its range begins behind it.
    counts = np.array(counts)
    ends = counts.cumsum()
    return torch.from_numpy(np.repeat(np.array(first) - ends + counts, counts) + np.arange(ends[-1]))


# --------------------------------------------------------------------------------------------------
# Prompts


def room_for(model: nn.Module, prompt, max_new_tokens: int) -> int:
    """New tokens that fit: fewer than max_new_tokens where the model's learned positions end before.
    ValueError for none."""
    limit = model.config.max_positions
    if limit is not None and len(prompt) >= limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the model has {limit} positions; shorten it"
        )
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def check_minimum(given: int, max_new_tokens: int, min_length: int) -> None:
    if given + max_new_tokens < min_length:
        raise ValueError(
            f"min_length={min_length} cannot be reached: {given} tokens are given and max_new_tokens is "
            f"{max_new_tokens}; lower one or raise the other"
        )


def penalised_tokens(model: nn.Module, prompt: dict) -> list[int]:
    """What a repetition penalty counts of a prompt: `seen`, by default the tokens outside images."""
    # What stands at an image's places are fillers that nobody wrote: they are no repetition.
    if "seen" in prompt:
        return [int(t) for t in prompt["seen"]]
    Q = model.num_image_tokens
    slots = {i for s in prompt["image_starts"] for i in range(s, s + Q)}
    return [int(t) for i, t in enumerate(prompt["input_ids"]) if i not in slots]


def cut_at_stop(processor, ids: list[int], stop_texts: list[str]) -> tuple[str, bool]:
    """The answer's text before the first stop text, and whether there was one, wherever the borders of tokens
    lie."""
    shown = processor.decode(ids)
    # blanks at the ends are in the second
    for text in (shown, processor.tokenizer.decode(ids)) if stop_texts else ():
        if found := [text.index(stop) for stop in stop_texts if stop in text]:
            return text[: min(found)].strip(), True
    return shown, False


def digest_of(pixels: Tensor) -> bytes:
    # As bytes: NumPy knows no bf16.
    data = pixels.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


# --------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """Answers requests; one thread calls it. The model is in evaluation mode from then on.

    step_tokens: tokens of a forward pass; cache_tokens: rows of the pool (keys and values of one token each);
    image_cache_mb: features of images that were seen lately; max_running: answers at once; stop_words: tokens
    that end an answer (default: the processor's); capture: what makes CUDA graphs of decoding steps
    (decode_graph.py; by default where there is a GPU to gain by it), False for none.
    """

    def __init__(
        self,
        model: nn.Module,
        processor=None,
        adapters: dict[str, str] | None = None,
        *,
        step_tokens: int = 2048,
        cache_tokens: int = 32768,
        image_cache_mb: float = 512,
        max_running: int = 64,
        stop_words: list[list[int]] | None = None,
        capture: Callable | bool | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # how a prompt may enter: in "chunks"; "whole", where later tokens change what earlier ones are; or
        # "alone", in a pass without running sequences
        self.prefill = model.prefill
        # A word of one token ends an answer by itself; of several the last ones must be compared.
        stop_words = processor.stop_words if stop_words is None else stop_words
        self.end_tokens = {word[0] for word in stop_words if len(word) == 1}
        self.end_words = [word for word in stop_words if len(word) > 1]
        self.adapters = lora.add_adapters(model, adapters) if adapters else {}
        self.step_tokens, self.max_running = step_tokens, max_running
        self.tuned = model.prefix_rows
        self.use_pool(cache_tokens)
        self.sampler = Sampler(max_running, sorted(self.end_tokens))
        self.free_slots = list(range(max_running))[::-1]
        self.queue: deque[Sequence] = deque()
        # A sequence is in one of three places: it waits, it runs, or it has ended and its rows may be of use.
        self.active: list[Sequence] = []  # in the order in which they came
        self.kept: list[Sequence] = []  # their rows are still there, the latest used last
        self.by_request: dict[Request, Sequence] = {}
        self.features: OrderedDict[tuple, Tensor] = OrderedDict()  # (digest, adapter) -> an image's features
        self.feature_bytes, self.feature_limit = 0, image_cache_mb * 2**20
        capture = capture_for(model) if capture is None else capture
        self.graphs = DecodeGraphs(self, capture) if capture else None

    # ---- requests

    def submit(self, request: Request) -> None:
        """ValueError in one line where it can never run."""
        sequence = self.sequence(request)  # opens the images: a bad one is the caller's error, not a step's
        how = request.how
        # All rows that it may ever need are its own from the start: no answer is cut off for another's sake.
        if sequence.rows > self.pool.size:
            raise ValueError(
                f"the prompt's {sequence.given} tokens and max_new_tokens={how.max_new_tokens} need "
                f"{sequence.rows} rows of the cache, which has {self.pool.size}; shorten one"
            )
        self.enqueue(sequence)

    def enqueue(self, sequence: Sequence) -> None:
        self.queue.append(sequence)
        self.by_request[sequence.request] = sequence

    def sequence(self, request: Request) -> Sequence:
        """The request as the engine needs it, its images opened."""
        model, prompt, how = self.model, request.prompt, request.how
        if request.adapter is not None and request.adapter not in self.adapters:
            names = ", ".join(self.adapters) or "none"
            raise ValueError(f"adapter {request.adapter!r} is not here; there is {names}")
        given = len(prompt["input_ids"])
        room = room_for(model, prompt["input_ids"], how.max_new_tokens)
        # The prompt's last token is the one that the decoder starts with.
        encoder = given - 1 if model.encoder_decoder else 0
        # A stop text may end inside a token or begin in an earlier one: only the decoded answer shows it.
        stopped = request.stopped
        if request.stop:
            stopped = lambda ids: cut_at_stop(self.processor, ids, request.stop)[1]  # noqa: E731
        beams = self.beams(request, room, given - encoder, stopped) if how.num_beams > 1 else None
        check_minimum(beams.given if beams else given - encoder, how.max_new_tokens, how.min_length)
        # Refused here: an index beyond the vocabulary would fail inside a step, for all that share it.
        size = model.config.vocab_size
        if bad := [t for t in request.logit_bias if not 0 <= t < (size or t + 1)]:
            raise ValueError(f"logit_bias: token {bad[0]}; expected 0 to {size - 1}")
        tokens = np.zeros(given + room, np.int64)
        tokens[:given] = prompt["input_ids"]
        # The answer's are known already: each step takes a column, (n,) or a number, and computes nothing.
        positions = np.asarray(prompt.get("position_ids", np.arange(given)))
        step = np.asarray(model.position_step)
        later = positions[..., -1:] + step * np.arange(1, room + 1)
        images = prompt.get("pixel_values")
        if images is None:
            images = [self.processor.load_image(image) for image in prompt.get("images", ())]
        # Of the pixels, not of a file's bytes: what the model sees decides whether keys are the same.
        digests = [digest_of(pixels) for pixels in images]
        group = model.cache_group(given)
        return Sequence(
            request=request,
            tokens=tokens,
            total=given,
            positions=np.concatenate((positions, later), -1),
            given=given,
            encoder=encoder,
            rows=self.pool.grains(max(encoder, given - encoder + room) + self.tuned, how.num_beams),
            images=images,
            digests=dict(zip(prompt["image_starts"], digests, strict=True)),
            group=(request.adapter, group),
            stopped=stopped,
            beams=beams,
        )

    def beams(self, request: Request, room: int, given: int, stopped) -> Beams:
        """ValueError for what a beam search does not take."""
        how, size = request.how, self.model.config.vocab_size
        if self.end_words:
            raise ValueError(
                "beam search ends at single tokens; a stop word of several tokens needs num_beams=1"
            )
        if size is not None and how.num_beams > size // 2:
            raise ValueError(
                f"num_beams={how.num_beams}; expected at most {size // 2}, half of the vocabulary"
            )
        if request.logit_bias or request.presence_penalty or request.frequency_penalty:
            raise ValueError("logit_bias and presence or frequency penalties need num_beams=1")
        seen = penalised_tokens(self.model, request.prompt)
        return Beams(request, room, given, seen, self.end_tokens, stopped)

    def cancel(self, request: Request) -> None:
        """Frees its place before the next step; nothing is said of it any more."""
        sequence = self.by_request.pop(request, None)
        # One that waits has no rows yet.
        if sequence in self.queue:
            self.queue.remove(sequence)
        elif sequence is not None:
            if sequence.total == sequence.given and not sequence.beams:
                sequence.fed = 0  # no logits have shown yet whether its keys are finite
                self.pool.clear(sequence.start, sequence.rows)
            self.leave(sequence)

    def has_work(self) -> bool:
        return bool(self.by_request)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        return len(self.active)

    # ---- rows of the pool

    def use_pool(self, size: int) -> None:
        self.pool = Pool(size, self.tuned)

    def common_prefix(self, a: Sequence, b: Sequence, known: int) -> int:
        """Tokens of `a`'s prompt that begin like the first `known` of `b`; at least one is left over."""
        # Another adapter, or another rotary base, makes other keys of the same tokens.
        if a.group != b.group:
            return 0
        # One is left over, since logits come of a token that is computed, not of cached keys.
        n = min(a.given - 1, known)
        differs = (a.tokens[:n] != b.tokens[:n]).nonzero()[0]
        n = int(differs[0]) if len(differs) else n
        # All images have the same tokens at their places, so those say nothing of which image it is.
        for place in a.digests.keys() | b.digests.keys():
            if place < n and a.digests.get(place) != b.digests.get(place):
                n = place
        # where later tokens change what earlier ones are, nothing but a whole prompt is the same
        if self.prefill != "chunks" and not (n == a.given - 1 and a.given == b.given):
            return 0
        return n

    def admit(self, sequence: Sequence) -> bool:
        """Gives it rows, and what another sequence has computed of its prompt. False: it has to wait."""
        donor, shared = None, 0
        # Also from one that still runs: what is written of a sequence never changes.
        for other in [*self.active, *self.kept]:
            # Beams trade places, so behind the prompt their rows are of one beam now and of another later.
            known = min(other.fed, other.given) if other.beams else other.fed
            n = self.common_prefix(sequence, other, known)
            if n > shared:
                donor, shared = other, n
            # one that will be computed soon is worth waiting for: the other answers to a prompt (n > 1)
            if other.fed < other.given and self.common_prefix(sequence, other, other.given) > max(n, shared):
                return False
        start = self.pool.take(sequence.rows)
        if start is None:
            if self.pool_is_short(sequence):
                return False
            while start is None:  # the longest unused first, the donor last
                victim = next((k for k in self.kept if k is not donor), donor)
                if victim is donor:
                    donor, shared = None, 0
                self.kept.remove(victim)
                self.pool.give_back(victim.start, victim.rows)
                start = self.pool.take(sequence.rows)
        sequence.start, sequence.slot = start, self.free_slots.pop()
        # A copy, not a reference: ranges stay whole, so attention needs no table of pages.
        if donor is not None:
            rows = sequence.row(shared) + self.pool.before
            self.pool.copy(donor.start, start, rows, sequence.encoder)
            sequence.fed = sequence.cached = shared
            # A kept donor is the latest used now, unless it has become superfluous; a running one stays.
            if donor in self.kept:
                self.kept.remove(donor)
                if donor.fed > shared or self.prefill != "chunks":
                    self.kept.append(donor)
                else:  # all that it has is in the new one too
                    self.pool.give_back(donor.start, donor.rows)
        self.active.append(sequence)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Its rows stay until room is needed."""
        self.active.remove(sequence)
        # The slot's row of the sampler's tables is cleared by the next one that joins.
        self.free_slots.append(sequence.slot)
        sequence.features, sequence.images = None, []
        # of its first place, the prompt's rows are what they were; the answer's are anyone's
        if sequence.beams:
            rows = sequence.rows // sequence.request.how.num_beams
            self.pool.give_back(sequence.start + rows, sequence.rows - rows)
            sequence.rows, sequence.fed = rows, min(sequence.fed, sequence.given)
        # what is kept for its rows must not hold the request: its images may be large
        sequence.request, sequence.stopped = None, None
        # Half of a prompt that sees itself whole is of no use: the whole has other keys.
        whole = self.prefill == "chunks" or sequence.fed >= sequence.given
        if sequence.fed and whole:
            self.kept.append(sequence)
        else:
            self.pool.give_back(sequence.start, sequence.rows)

    def fork(self, leader: Sequence, parents: list[int], tokens: list[int]) -> None:
        """Each beam goes on from its parent with its token. The first heir takes the rows over, the others
        copy what is in use to other places of the leader's range."""
        # Each beam has a fixed share of the leader's range: a fork never has to ask for room.
        before = leader.running
        rows = leader.rows // leader.beams.how.num_beams
        taken = {before[p].start for p in parents}
        free = [s for s in range(leader.start, leader.start + leader.rows, rows) if s not in taken]
        heirs = []
        # A parent with one heir costs nothing: in most steps most beams go on from themselves.
        for n, p in enumerate(parents):
            s = before[p]
            if p in parents[:n]:
                s = replace(s, tokens=s.tokens.copy(), start=free.pop())
                self.pool.copy(before[p].start, s.start, s.row(s.fed) + self.tuned, s.encoder)
            heirs.append(s)
        for s, token in zip(heirs, tokens, strict=True):
            s.tokens[s.total] = token
            s.total += 1
        leader.beams.sequences = heirs

    # ---- a step

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens of it) of the next pass."""
        # Running sequences first: a long prompt may slow an answer down, never stop it. What is left of the
        # budget goes to prompts that have begun, then to new ones.
        whole, alone = self.prefill != "chunks", self.prefill == "alone"
        decode = [(x, 1) for s in self.active for x in s.running if s.decodes]
        prompts, left = [], self.step_tokens - (0 if alone else len(decode))

        def add(sequence: Sequence) -> None:
            nonlocal left
            rest = sequence.total - sequence.fed
            count = rest if whole else min(rest, left)
            if count <= left or not prompts:  # a prompt beyond the budget is alone in its step
                prompts.append((sequence, count))
                left -= count

        # First what has begun: a half-computed prompt holds rows that nobody can use.
        for sequence in self.active:
            if left > 0 and not sequence.decodes:
                add(sequence)
        for sequence in self.in_turn() if left > 0 and self.free_slots else ():
            if left <= 0 or not self.free_slots:
                break
            if self.admit(sequence):
                self.queue.remove(sequence)
                # The whole prompt but its last token was there: it decodes from its first step on.
                if sequence.decodes:
                    decode.append((sequence, 1))
                    left -= 1
                else:
                    add(sequence)
            elif self.pool_is_short(sequence):
                break  # the others wait behind it: a long one is never overtaken for ever
        decode.sort(key=lambda entry: entry[0].start)  # for attention, see Pool.GRAIN
        if not alone:
            return decode + prompts
        # its prompts have a pass of their own, for one adapter
        adapter = prompts[0][0].request.adapter if prompts else None
        return [p for p in prompts if p[0].request.adapter == adapter] or decode

    def in_turn(self) -> list[Sequence]:
        """The waiting ones that are next: the fewer answers its client has before it, the earlier."""
        # So a client with a thousand requests holds up nobody else's first one.
        before = Counter(s.request.client for s in self.active)
        turns = []
        for n, sequence in enumerate(self.queue):
            client = sequence.request.client
            turns.append((before[client], n, sequence))
            before[client] += 1
        return [sequence for *_, sequence in sorted(turns)[: self.max_running]]

    def pool_is_short(self, sequence: Sequence) -> bool:
        """Whether it must wait for running ones to end: what is only kept would not make room enough."""
        kept = [(k.start, k.start + k.rows) for k in self.kept]
        return not self.pool.would_fit(sequence.rows, kept)

    def forward(self, entries: list[tuple[Sequence, int]]) -> Tensor:
        """Logits (S, V) fp32 behind the next tokens of each sequence; the pool grows by them."""
        pieces, Q = [(s, s.fed, count) for s, count in entries], self.model.num_image_tokens
        seeing = [s for s, a, n in pieces if any(a < p + Q and p < a + n for p in s.digests)]
        self.encode_images(seeing)
        # an adapter that holds parameters of the language model whole has a pass of its own
        groups: dict[str | None, list[int]] = {}
        for n, (s, _, _) in enumerate(pieces):
            adapter = s.request.adapter
            groups.setdefault(adapter if adapter and self.adapters[adapter].text else None, []).append(n)
        logits = [None]
        # The steps between prompts: one token of each, behind others, none of them a part of an image.
        if self.graphs and len(groups) == 1 and not seeing and all(a and n == 1 for _, a, n in pieces):
            logits = [self.graphs.logits(*groups, [s for s, _, _ in pieces])]
        if logits[0] is None:
            logits = [self.one_pass(adapter, [pieces[n] for n in rows]) for adapter, rows in groups.items()]
        # Not before: the passes ask where each sequence stands.
        for s, first, count in pieces:
            s.fed = first + count
        if len(logits) == 1:
            return logits[0]
        # Each pass has its sequences in the stream's order; all of them are brought back into it.
        order = np.argsort([n for rows in groups.values() for n in rows])
        return torch.cat(logits)[there(torch.from_numpy(order), self.device)]

    def one_pass(self, whole: str | None, pieces: list[tuple[Sequence, int, int]]) -> Tensor:
        """The model on one stream; `whole`: the adapter whose whole parameters it has."""
        batch = self.batch(pieces)
        cache = KVCache(
            self.pool,
            [s.start for s, _, _ in pieces],
            [s.row(first) for s, first, _ in pieces],
            [s.encoder for s, _, _ in pieces],
            encode=any(first == 0 for _, first, _ in pieces),
        )
        # One copy a dtype, and none on a CPU, where a new object would be all that it gives.
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        batch.cache = cache
        with lora.adapted(self.rows_of_adapters(pieces)):
            return self.run(whole, batch, "logits").float()

    def run(self, adapter: str | None, batch: Batch, output: str) -> Tensor:
        """The model with the parameters that the adapter holds whole in place of the base's."""
        whole = self.adapters[adapter].whole if adapter else {}
        if not whole:
            return self.model(batch, output=output)
        return torch.func.functional_call(self.model, whole, (batch,), {"output": output})

    def batch(self, entries: list[tuple[Sequence, int, int]]) -> Batch:
        """The tokens first .. first + count - 1 of each sequence as one stream."""
        counts = [count for _, _, count in entries]
        bounds = np.cumsum([0, *counts])
        prefixes = [s.request.prompt.get("prefix_len", 0) for s, _, _ in entries]
        # Which features lie in these pieces, and at which rows of the stream: a piece may begin or end inside
        # an image.
        features, places = [], []
        Q = self.model.num_image_tokens
        for (s, first, count), start in zip(entries, bounds.tolist(), strict=False):
            for n, slot in enumerate(s.digests):
                a, b = max(slot, first), min(slot + Q, first + count)  # the part of the image in this piece
                if a < b:
                    features.append(s.features[n][a - slot : b - slot] if b - a < Q else s.features[n])
                    places.append(np.arange(a, b) + start - first)
        image_features = image_positions = None
        if features and self.prefill == "alone":  # whole images, which need not have a row a slot
            image_features, image_positions = torch.stack(features), torch.from_numpy(np.stack(places))
        elif features:
            image_features = torch.cat(features)[None]
            image_positions = torch.from_numpy(np.concatenate(places))[None]
        return Batch(
            input_ids=torch.from_numpy(np.concatenate([s.tokens[f : f + n] for s, f, n in entries])),
            position_ids=torch.from_numpy(
                np.concatenate([s.positions[..., f : f + n] for s, f, n in entries], -1)
            ),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            image_features=image_features,
            image_positions=image_positions,
            prefix_lens=torch.tensor(prefixes) if any(prefixes) else None,
            # cached keys were turned with the base that the prompt's length decides
            rope_lengths=torch.tensor([s.given for s, _, _ in entries]),
            single=counts == [1] * len(counts),
        )

    def rows_of_adapters(self, entries: list[tuple[Sequence, int, int]]) -> list[tuple[str, Tensor | None]]:
        """(adapter, rows of the stream that are its; None: all of them)."""
        counts = [count for _, _, count in entries]
        names = [s.request.adapter for s, _, _ in entries]
        if len({*names}) == 1:
            return [] if names[0] is None else [(names[0], None)]
        # Rows of the base are in no list: -1.
        owners = np.repeat([list(self.adapters).index(n) if n is not None else -1 for n in names], counts)
        rows = [(name, torch.from_numpy((owners == n).nonzero()[0])) for n, name in enumerate(self.adapters)]
        return [(name, there(index, self.device)) for name, index in rows if len(index)]

    def encode_images(self, sequences: list[Sequence]) -> None:
        """The features of their images, of those that no request had lately in one pass an adapter."""
        needed: dict[str | None, dict[tuple, Tensor]] = {}
        for s in sequences:
            if s.features is None:
                adapter = s.request.adapter
                adapter = adapter if adapter and self.adapters[adapter].changes_images else None
                s.feature_keys = [(digest, adapter) for digest in s.digests.values()]
                for key, pixels in zip(s.feature_keys, s.images, strict=True):
                    if key not in self.features:
                        needed.setdefault(adapter, {})[key] = pixels
        # Equal images of one step are encoded once: `needed` is by what an image is, not by who asks.
        found = {}
        for adapter, images in needed.items():
            keys = list(images)
            for first in range(0, len(keys), IMAGES_AT_ONCE):
                some = keys[first : first + IMAGES_AT_ONCE]
                pixels = torch.stack([images[key] for key in some]).to(self.device, self.dtype)
                with lora.adapted([] if adapter is None else [(adapter, None)]):
                    features = self.run(adapter, Batch.of_images(pixels), "features")
                found |= zip(some, features, strict=True)
        for s in sequences:
            if s.features is None:
                s.features = [found[k] if k in found else self.features[k] for k in s.feature_keys]
                for key, x in zip(s.feature_keys, s.features, strict=True):
                    self.features[key] = x
                    self.features.move_to_end(key)
        # The longest unused go first. What a running sequence needs it holds itself.
        self.feature_bytes += sum(x.numel() * x.element_size() for x in found.values())
        while self.feature_bytes > self.feature_limit:
            _, x = self.features.popitem(last=False)
            self.feature_bytes -= x.numel() * x.element_size()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One forward pass; [] if there is nothing to do."""
        entries = self.schedule()
        if not entries:
            return []
        logits = self.forward(entries)
        # the others are inside their prompt
        done = [n for n, (s, _) in enumerate(entries) if s.fed == s.total]
        plain = [n for n in done if not entries[n][0].beams]
        events = self.sample([entries[n][0] for n in plain], self.some(logits, plain))
        searches: dict[Beams, list[int]] = {}
        for n in done:
            if entries[n][0].beams:
                searches.setdefault(entries[n][0].beams, []).append(n)
        for beams, rows in searches.items():
            if beams.sequences:
                rows.sort(key=lambda n: beams.sequences.index(entries[n][0]))
            events += self.search(self.by_request[beams.request], self.some(logits, rows))
        for event in events:
            if event.finish:
                self.leave(self.by_request.pop(event.request))
        return events

    def some(self, logits: Tensor, rows: list[int]) -> Tensor:
        """These rows; often they are all."""
        if rows == list(range(len(logits))):
            return logits
        return logits[there(torch.tensor(rows, dtype=torch.int64), self.device)]

    def sample(self, sequences: list[Sequence], logits: Tensor) -> list[Event]:
        """A token more for each."""
        if not sequences:
            return []  # all of the step's tokens were inside prompts, or beams'
        # Before its first token: the sampler's tables have the logits' width, dtype and device.
        for s, row in zip(sequences, logits, strict=True):
            if s.total == s.given:
                how = s.request.how
                least = max(how.min_new_tokens, how.min_length - (s.given - s.encoder))
                self.sampler.join(s.slot, s, penalised_tokens(self.model, s.request.prompt), least, row)
        found = self.sampler(logits, [s.slot for s in sequences])
        tokens, finite, chosen, best = self.read(*found, [s.request.logprobs for s in sequences])
        events = []
        for n, s in enumerate(sequences):
            # The others of the batch do not see its rows, so they go on.
            if not finite[n]:
                events.append(self.failed(s))
                continue
            s.tokens[s.total] = tokens[n]
            s.total += 1
            finish = self.finish(s, tokens[n])
            events.append(Event(s.request, tokens[n], chosen[n], best[n], finish, cached_tokens=s.cached))
        return events

    def search(self, leader: Sequence, logits: Tensor) -> list[Event]:
        """A token more for each beam of a request; at the end, the tokens of its best answer."""
        # Nothing is told while it runs: the best answer may still become another one.
        beams = leader.beams
        if (chosen := beams.advance(logits)) is not None:
            self.fork(leader, *chosen)
            return []
        # One row that is not finite ends the search: its beams go on from each other.
        if not beams.finite:
            return [self.failed(leader)]
        # The end: the best answer is told at once, as if it had come token by token.
        tokens = beams.finished[0][1]
        ended = tokens[-1] in self.end_tokens or bool(beams.stopped and beams.stopped(tokens))
        events = [Event(leader.request, token, cached_tokens=leader.cached) for token in tokens]
        events[-1].finish = "stop" if ended else "length"
        return events

    def failed(self, s: Sequence) -> Event:
        s.fed = 0  # no other request goes on from its rows
        self.pool.clear(s.start, s.rows)
        return Event(s.request, None, finish="error", error=NOT_FINITE, cached_tokens=s.cached)

    def finish(self, s: Sequence, token: int) -> str | None:
        """Why the answer ends with this token; None: it goes on."""
        # A sampled token may end several ways; `stopped` decodes the answer, so it is asked last.
        ended = token in self.end_tokens
        ended |= any(s.tokens[: s.total][-len(word) :].tolist() == word for word in self.end_words)
        if not ended and s.stopped:
            ended = s.stopped(s.answer)
        return "stop" if ended else "length" if s.total == len(s.tokens) else None

    @staticmethod
    def read(tokens: Tensor, finite: Tensor, logprobs: Tensor | None, wanted: list[int]) -> tuple[list, ...]:
        """On the host: tokens (B,), whether their logits are finite, their log-probabilities and those of the
        best ones, as many as each request wants (-1: not even its token's own)."""
        # What a device has computed is read once a step, in one copy: whole numbers, fp32 by its bits.
        if logprobs is None:
            tokens, finite = torch.stack((tokens, finite.long())).tolist()
            return tokens, finite, [None] * len(tokens), [[] for _ in tokens]
        k = min(max(*wanted, 0), logprobs.shape[1])
        values, indices = logprobs.topk(k)  # (B, k) each
        values = torch.cat((logprobs.gather(1, tokens[:, None]), values), 1).view(torch.int32)
        table = torch.cat((tokens.int()[:, None], finite.int()[:, None], indices.int(), values), 1)
        table = table.cpu().numpy()
        values = table[:, 2 + k :].view(np.float32).tolist()
        best = [
            list(zip(i, v[1:], strict=True))[: max(w, 0)]
            for i, v, w in zip(table[:, 2 : 2 + k].tolist(), values, wanted, strict=True)
        ]
        chosen = [v[0] if w >= 0 else None for v, w in zip(values, wanted, strict=True)]
        return table[:, 0].tolist(), table[:, 1].tolist(), chosen, best
