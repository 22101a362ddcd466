"""What comes next: probabilities with temperature, top-k and top-p, penalties, samplers and beams.

    probabilities = sampling_probs(logits, temperature=0.8, top_k=50, top_p=0.9)   # (N, V)

One definition for `generate.py`, the server and training's evaluation. A request's random numbers are a
function of (seed, its id), whatever runs beside it.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import hash_keys
from vlm import move


def sampling_probs(logits: Tensor, temperature, top_k, top_p) -> Tensor:
    """logits (B, V) -> probabilities (B, V). top_k 0 and top_p 1 keep all; top_p keeps the smallest set of
    most probable tokens whose total before each member is below top_p, and at least one. Each setting: a
    number, or one of each row, on the host."""
    V, names = logits.shape[-1], ("temperature", "top_k", "top_p")
    settings = [torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1) for x in (temperature, top_k, top_p)]
    # What decides shapes is asked on the host; the device has the same numbers in one copy.
    _, top_k, top_p = settings
    there = move(dict(zip(names, settings, strict=True)), logits.device)
    logits = logits.float()
    # nothing overflows at a low temperature
    logits = (logits - logits.amax(-1, keepdim=True)) / there["temperature"].float()
    if (top_k > 0).any():
        most, k = min(V, int(top_k.max())), there["top_k"].long()
        kth = logits.topk(most).values.gather(1, (k - 1).clamp(0, most - 1).expand(len(logits), 1))
        logits = logits.masked_fill((logits < kth) & (k > 0), float("-inf"))
    if (top_p < 1).any():
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        drop = (probs.cumsum(-1) - probs >= there["top_p"]) & (there["top_p"] < 1)
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    return logits.softmax(-1)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty, always_divide=False) -> Tensor:
    """logits (..., V): those of tokens in `seen` (..., V) are divided by the penalty where positive, else
    multiplied (arXiv:1909.05858). always_divide: negative ones too, which makes them likelier, as
    SwissArmyTransformer does. Penalty and rule: one, or one of each row (B, 1)."""
    lower = torch.where((logits > 0) | always_divide, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def seen_mask(tokens: list[int], V: int, device: torch.device | str = "cpu") -> Tensor:
    """(V,) whether a token is one of these."""
    index = torch.tensor(tokens, dtype=torch.int64, device=device)
    return torch.zeros(V, dtype=torch.bool, device=device).index_fill(0, index, True)


def best_tokens(logits: Tensor) -> Tensor:
    """logits.argmax(-1); on a CPU NumPy's takes a tenth of the time of torch's."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


class Sampler:
    """Chooses a token for each row of logits, each row by its own settings, in transformers' order:
    penalties, bias, minimal length, temperature, top-k, top-p. A sequence has a slot in the tables while it
    runs."""

    NAMES = "temperature top_k top_p repetition sat presence frequency minimum logprobs".split()

    def __init__(self, slots: int, ends: list[int]):
        self.settings = np.zeros((slots, len(self.NAMES)))
        self.streams = np.zeros(slots, np.uint64)  # names of the random streams
        self.made = np.zeros(slots, np.int64)  # tokens of each answer
        self.plain = np.zeros(slots, bool)  # whose token is the largest logit, unless it comes too early
        self.ends, self.slots = torch.tensor(ends, dtype=torch.int64), slots
        # (slots, V), made when the first request needs them
        self.seen: Tensor | None = None  # what the repetition penalty counts
        self.counts: Tensor | None = None  # how often a token is in the answer
        self.bias: Tensor | None = None

    def join(self, slot: int, sequence, seen: list[int], minimum: int, logits: Tensor) -> None:
        """The slot is an engine.Sequence's from now on."""
        request, how, V = sequence.request, sequence.request.how, logits.shape[-1]
        sat = how.penalty_rule == "sat"
        penalties = how.repetition_penalty, sat, request.presence_penalty, request.frequency_penalty
        self.settings[slot] = (
            *(how.temperature, min(how.top_k, V), how.top_p),
            *penalties,
            *(minimum, request.logprobs),
        )
        self.streams[slot], self.made[slot] = stream_of(how.seed, request.id), 0
        changes = how.repetition_penalty != 1, request.presence_penalty, request.frequency_penalty
        changes = *changes, how.temperature, request.logit_bias, request.logprobs >= 0
        self.plain[slot] = not any(changes)

        def table(now: Tensor | None, dtype: torch.dtype) -> Tensor:
            now = logits.new_zeros(self.slots, V, dtype=dtype) if now is None else now
            now[slot] = 0
            return now

        if how.repetition_penalty != 1:
            self.seen = table(self.seen, torch.bool)
            self.seen[slot] = seen_mask([] if sat else seen, V, logits.device)
        if request.presence_penalty or request.frequency_penalty:
            self.counts = table(self.counts, torch.float32)
        if request.logit_bias or self.bias is not None:
            self.bias = table(self.bias, torch.float32)
            for token, value in request.logit_bias.items():
                self.bias[slot, token] = value

    def __call__(self, logits: Tensor, slots: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """logits (B, V) fp32 -> tokens (B,), whether a row's logits are finite (B,), log-probabilities (B, V)
        where a row asks for them."""
        settings, device = self.settings[slots], logits.device
        finite = logits.sum(-1).isfinite()  # of finite ones the sum is finite: they are far from fp32's end
        early = self.made[slots] < settings[:, self.NAMES.index("minimum")]
        if self.plain[slots].all() and not early.any():
            self.made[slots] += 1
            return best_tokens(logits), finite, None
        s = dict(zip(self.NAMES, settings.T, strict=True))
        hot = np.flatnonzero(s["temperature"] > 0)
        # a number in [0, 1) for each of them: a function of its stream and its place, and nothing else
        draws = hash_keys(self.streams[slots][hot], self.made[slots][hot]).view(np.uint64) >> np.uint64(32)
        # fp64 has room for all of it: a device gets it in one copy that nobody waits for.
        numbers = {**s, "slot": np.array(slots), "early": early, "hot": hot, "draws": draws * 2.0**-32}
        there = move({n: torch.from_numpy(x.astype(np.float64)) for n, x in numbers.items()}, device)
        at = there["slot"].long()
        logprobs = logits.log_softmax(-1) if (s["logprobs"] >= 0).any() else None

        def column(name: str) -> Tensor:
            return there[name].float()[:, None]

        repeats = (s["repetition"] != 1).any()
        counted = ((s["presence"] != 0) | (s["frequency"] != 0)).any()
        if repeats:
            penalty = column("repetition")
            seen = self.seen[at] & (penalty != 1)
            logits = penalise_repetition(logits, seen, penalty, column("sat") > 0)
        if counted:
            used = (column("presence") != 0) | (column("frequency") != 0)
            counts = torch.where(used, self.counts[at], 0.0)
            logits = logits - column("presence") * (counts > 0) - column("frequency") * counts
        if self.bias is not None:
            logits = logits + self.bias[at]
        if len(self.ends) and early.any():
            self.ends = self.ends.to(device)
            mask = torch.zeros_like(logits[:1], dtype=torch.bool).index_fill(1, self.ends, True)
            logits = logits.masked_fill((column("early") > 0) & mask, float("-inf"))
        tokens = best_tokens(logits)
        if len(hot):
            rows, draws = there["hot"].long(), there["draws"][:, None]
            settings = (s[name][hot] for name in ("temperature", "top_k", "top_p"))
            probs = sampling_probs(logits[rows], *settings)
            # fp64 where there is: fp32 sums of a large vocabulary lose the small probabilities
            sums = probs.cumsum(-1, dtype=torch.float64)
            found = torch.searchsorted(sums, draws * sums[:, -1:], right=True)[:, 0]
            tokens[rows] = found.clamp(max=logits.shape[-1] - 1)
        if repeats:
            self.seen[at, tokens] = True
        if counted:
            self.counts[at, tokens] += 1
        self.made[slots] += 1
        return tokens, finite, logprobs


class Beams:
    """The search for the best answers to one request: a few sequences that go on side by side."""

    def __init__(
        self,
        request: "Request",  # noqa: F821  (engine.Request)
        room: int,
        given: int,
        seen: list[int],
        ends: set[int],
        stopped: Callable[[list[int]], bool] | None,
    ):
        how = request.how
        self.request, self.how, self.room = request, how, room
        self.ends, self.stopped = sorted(ends), stopped
        self.lavis = how.beam_rule == "lavis"
        # lavis knows of the prompt the token alone that the answer begins with
        self.given, self.seen = (1, seen[:1]) if self.lavis else (given, seen)
        self.made = 0  # tokens of each
        self.running: list[tuple[float, list[int]]] = [(0.0, [])]  # (sum of log-probabilities, new tokens)
        self.finished: list[tuple[float, list[int]]] = []  # (score, new tokens), best first
        self.finite = True  # whether all logits were
        self.sequences: list = []  # engine.Sequence of each running one

    def finish(self, total: float, tokens: list[int], length: int) -> None:
        self.finished.append((total / length**self.how.length_penalty, tokens))
        self.finished = sorted(self.finished, key=lambda h: -h[0])[: self.how.num_beams]

    def advance(self, logits: Tensor) -> tuple[list[int], list[int]] | None:
        """logits (B, V) behind the running ones -> the one that each goes on from and its next token; None at
        the end, and where they are not finite."""
        how, K, stopped = self.how, self.how.num_beams, self.stopped
        rows, V = logits.log_softmax(-1), logits.shape[1]
        self.made += 1
        if how.repetition_penalty != 1.0:
            masks = [seen_mask(self.seen + tokens, V, rows.device) for _, tokens in self.running]
            rows = penalise_repetition(rows, torch.stack(masks), how.repetition_penalty)
        if self.made <= how.min_new_tokens or self.given + self.made - 1 < how.min_length:
            rows = rows.index_fill(1, torch.tensor(self.ends, device=rows.device), float("-inf"))
        totals = rows + torch.tensor([total for total, _ in self.running], device=rows.device)[:, None]
        best, index = totals.flatten().topk(min(2 * K, totals.numel()))
        # What a device has computed is read in one copy; fp64 holds places exactly.
        best, index, finite = torch.stack(
            (best.double(), index.double(), logits.isfinite().all().double().expand(len(best)))
        ).tolist()
        self.finite, running, parents = bool(finite[0]), [], []
        if not self.finite:
            return None
        for rank, (total, at) in enumerate(zip(best, map(int, index), strict=True)):
            tokens = [*self.running[at // V][1], at % V]
            ended = tokens[-1] in self.ends or bool(stopped and stopped(tokens))
            if ended or (self.made == self.room and not self.lavis):
                if rank < K:
                    self.finish(total, tokens, self.made)
            elif len(running) < K:
                running.append((total, tokens))
                parents.append(at // V)
        if self.lavis:
            reachable = best[0] / (self.made + 1) ** how.length_penalty
        else:
            reachable = running[0][0] / self.made**how.length_penalty if running else float("-inf")
        self.running = running
        if len(self.finished) == K and (self.finished[-1][0] >= reachable or not running):
            return None  # `stopped` may end all of them at once
        if self.made < self.room:
            return parents, [tokens[-1] for _, tokens in running]
        for total, tokens in running if self.lavis else ():
            self.finish(total, tokens, self.made + 1)
        return None


def stream_of(seed: int, id: str) -> int:
    """The draws of one request, whatever it is batched with."""
    digest = hashlib.sha256(f"{seed}:{id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
