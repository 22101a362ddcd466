"""Pictures + prompt -> text.

    python generate.py --image samples/images/flags/noto/fr.png --prompt "这是哪个国家的国旗？"
    python generate.py --lora_path output --requests requests.jsonl --output answers.jsonl
    python generate.py --image picture.png --chat        # questions from standard input, one a line

A batch is ragged, never padded: the prompts are one packed stream in the prefill, then every live sequence
contributes one token a step. So a batch gives what its requests give alone. Sampling follows transformers'
order: repetition penalty, minimal length, temperature, top-k, top-p; each request draws from its own
generator.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import lora
import parallel
import terminal
from draw import draw_boxes
from kernels import dispatch
from kernels.attention import attention
from quantize import BITS, quantize
from records import BadRecord, Conversation, one_record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option(default, help: str | None = None, choices: tuple | None = None):
    return field(default=default, metadata={"help": help or " ", "choices": choices})


@dataclass
class Decoding:
    """How an answer is searched for; each field is an option of the command line. ValueError for impossible
    ones."""

    max_new_tokens: int = option(256)
    temperature: float = option(0.0, "0: greedy")
    top_k: int = option(0, "0: off")
    top_p: float = option(1.0, "1: off")
    repetition_penalty: float = option(1.0)
    penalty_rule: str = option(
        "hf",
        "whose repetition penalty; hf: prompt and answer; sat: answer only, always divided",
        ("hf", "sat"),
    )
    min_new_tokens: int = option(0)
    min_length: int = option(0, "tokens before the answer may end, the prompt's included (not an encoder's)")
    num_beams: int = option(1, "1: no beam search")
    length_penalty: float = option(1.0, "beams: above 0 favours long answers")
    beam_rule: str = option("transformers", "when a beam search ends", ("transformers", "lavis"))
    seed: int = option(0)

    def __post_init__(self):
        # finite and within what a float holds, so that no score overflows or becomes NaN
        limits = {
            "max_new_tokens": (1, 1 << 16),
            "temperature": (0, 1e4),
            "top_k": (0, math.inf),
            "top_p": (0, 1),
            "repetition_penalty": (1e-3, 1e3),
            "min_new_tokens": (0, self.max_new_tokens),
            "min_length": (0, math.inf),
            "num_beams": (1, 1024),
            "length_penalty": (-50, 50),
        }
        for key, (least, most) in limits.items():
            value = getattr(self, key)
            if not least <= value <= most or (key == "top_p" and value == 0):
                expected = f"{least} or more" if most == math.inf else f"{least} to {most}"
                above = (
                    ", above 0" if key == "top_p" else " (max_new_tokens)" if key == "min_new_tokens" else ""
                )
                raise ValueError(f"decoding: {key}={value}; expected {expected}{above}")
        if 0 < self.temperature < 1e-4:
            raise ValueError(
                f"decoding: temperature={self.temperature}; expected 0 (greedy) or at least 0.0001"
            )
        if self.num_beams > 1 and (self.temperature or self.penalty_rule == "sat"):
            raise ValueError(
                f"decoding: num_beams={self.num_beams} goes with temperature=0 and penalty_rule=hf, got "
                f"temperature={self.temperature} and penalty_rule={self.penalty_rule}"
            )

    def without_effect(self) -> list[str]:
        """The options that are set but do nothing beside the others."""
        idle = []
        idle += ["top_k", "top_p", "seed"] if not self.temperature else []
        idle += ["length_penalty", "beam_rule"] if self.num_beams == 1 else []
        idle += ["penalty_rule"] if self.repetition_penalty == 1 else []
        return [f.name for f in fields(self) if f.name in idle and getattr(self, f.name) != f.default]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, **defaults) -> None:
        for f in fields(cls):
            parser.add_argument(
                f"--{f.name}", type=f.type, default=defaults.get(f.name, f.default), **f.metadata
            )

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Decoding":
        how = cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
        for name in how.without_effect():
            needed = {"top_k": "temperature", "top_p": "temperature", "seed": "temperature"}
            needed |= {
                "length_penalty": "num_beams",
                "beam_rule": "num_beams",
                "penalty_rule": "repetition_penalty",
            }
            print(f"warning: {name} has no effect without {needed[name]}", file=sys.stderr)
        return how


class KVCache:
    """Keys and values of each sequence: one (capacity, H, D) buffer per layer and sequence, so nothing is
    padded. An encoder's keys and values, which its decoder attends to, are the memory: kept once, never
    appended to."""

    def __init__(self, capacities: list[int]):
        self.capacities = capacities
        self.lengths = [0] * len(capacities)
        self.active = list(range(len(capacities)))  # the sequences in the stream, in its order
        self.buffers: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.memory: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.positions: Tensor | None = None  # (S,) or (n, S): of each sequence's last token
        self.counts: list[int] = []  # tokens that the current pass adds to each active sequence

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        prefix_lens: Tensor | None = None,
        bias: Tensor | None = None,
        tuned: Tensor | None = None,
    ) -> Tensor:
        """Appends k and v (T, H, D) of the segments to their sequences, and attends to all that those hold
        then.

        prefix_lens (S,) as attention() takes them, in the prefill. A bias says itself what is visible. tuned
        (2, P, H, D): keys and values that every sequence has before its own (P-tuning).
        """
        if layer not in self.buffers:
            self.buffers[layer] = [
                (k.new_empty(n, *k.shape[1:]), v.new_empty(n, *v.shape[1:])) for n in self.capacities
            ]
        bounds, keys, values = cu_seqlens.tolist(), [], []
        self.counts = cu_seqlens.diff().tolist()
        for s, i in enumerate(self.active):
            old, new = self.lengths[i], self.lengths[i] + bounds[s + 1] - bounds[s]
            for buffer, x, out in zip(self.buffers[layer][i], (k, v), (keys, values), strict=True):
                buffer[old:new] = x[bounds[s] : bounds[s + 1]]
                out.append(buffer[:new])
            if tuned is not None:
                for t, x in zip(tuned, (keys, values), strict=True):
                    x[-1] = torch.cat((t.to(x[-1].dtype), x[-1]))
        if tuned is not None and prefix_lens is not None:
            prefix_lens = prefix_lens + tuned.shape[1]
        cu_seqlens_k = torch.tensor([0, *(len(x) for x in keys)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        k, v = (x[0] if len(x) == 1 else torch.cat(x) for x in (keys, values))
        longest = int(cu_seqlens_k.diff().max())
        return attention(q, k, v, cu_seqlens, cu_seqlens_k, longest, bias is None, prefix_lens, bias)

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
            lengths = memory_cu_seqlens.diff().tolist()
            self.memory[layer] = list(zip(k.split(lengths), v.split(lengths), strict=True))
        keys, values = zip(*(self.memory[layer][i] for i in self.active), strict=True)
        cu_seqlens_k = torch.tensor([0, *(len(x) for x in keys)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        longest = int(cu_seqlens_k.diff().max())
        return attention(
            q, torch.cat(keys), torch.cat(values), cu_seqlens, cu_seqlens_k, longest, causal=False
        )

    def common_length(self) -> int:
        """The length of the active sequences, where it is the same: a decoder's, which begin together."""
        (length,) = {self.lengths[i] for i in self.active}
        return length

    def advance(self) -> None:
        """After a whole forward pass: the sequences in the stream have grown."""
        for i, n in zip(self.active, self.counts, strict=True):
            self.lengths[i] += n

    def reorder(self, parents: list[int]) -> None:
        """Sequence n goes on from sequence parents[n]; all are active then."""
        for layer, buffers in self.buffers.items():
            taken, new = set(), []
            for p in parents:  # the first heir takes the buffers, the others copy what is in use
                pair = buffers[p]
                if p in taken:
                    pair = tuple(b.new_empty(b.shape) for b in buffers[p])
                    for fresh, old in zip(pair, buffers[p], strict=True):
                        fresh[: self.lengths[p]] = old[: self.lengths[p]]
                taken.add(p)
                new.append(pair)
            self.buffers[layer] = new
        self.memory = {layer: [pairs[p] for p in parents] for layer, pairs in self.memory.items()}
        self.positions = self.positions[..., parents]
        self.lengths, self.capacities = (
            [self.lengths[p] for p in parents],
            [self.capacities[p] for p in parents],
        )
        self.active = list(range(len(parents)))


def sampling_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V) -> probabilities (B, V). top_k 0 and top_p 1 keep all; top_p keeps the smallest set of
    most probable tokens whose total before each member is below top_p, and at least one."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # nothing overflows at a low temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    return logits.softmax(-1)


def penalise_repetition(
    logits: Tensor, seen: list[int], penalty: float, always_divide: bool = False
) -> Tensor:
    """logits (V,): those of tokens seen before are divided by the penalty where positive, else multiplied
    (arXiv:1909.05858). always_divide: negative ones too, which makes them likelier, as SwissArmyTransformer
    does."""
    index = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits.device)
    values = logits[index]
    values = torch.where((values > 0) | always_divide, values / penalty, values * penalty)
    return logits.index_copy(0, index, values)


@torch.no_grad()
def generate(
    model: nn.Module,
    requests: list[dict],
    max_new_tokens: int,
    stop_words: list[list[int]],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    min_new_tokens: int = 0,
    min_length: int = 0,
    penalty_rule: str = "hf",
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """New token ids of each request, a stop word included as it came.

    A request: input_ids (T,), image_starts (positions of the pictures' first slots), pixel_values (list of
    (3, H, W)), and what data.collate takes besides. temperature 0 is greedy. A sequence ends where all its
    ids, prompt included, end with one of `stop_words`, or where `stopped` says so of the ids of its answer.
    Stop words of one token can't come before min_length ids, those of the prompt (of an encoder-decoder: of
    the decoder's prompt) included. Draws of a request depend on (seed, its "id") alone: a batch gives what
    its requests give alone. penalty_rule: whose repetition penalty. "hf": of the prompt's tokens (`seen`, by
    default those outside pictures) and the answer's; "sat": of the answer's alone, always divided.
    `on_token(request, token)` sees each token as it comes.
    """
    model.eval()
    prompts, seen, cache, batch = prefill(model, requests, max_new_tokens)
    generators = [random_stream(seed, r.get("id", "")) for r in requests]
    outputs: list[list[int]] = [[] for _ in prompts]
    room = [room_for(model, p, max_new_tokens) for p in prompts]
    seen = seen if penalty_rule == "hf" else [[] for _ in seen]
    ends = [word[0] for word in stop_words if len(word) == 1]
    given = [given_tokens(model, p) for p in prompts]
    check_minimum(given, max_new_tokens, min_length)
    while True:
        logits = next_logits(model, batch, cache)
        still = []
        for row, i in zip(logits, cache.active, strict=True):
            if repetition_penalty != 1.0:
                row = penalise_repetition(
                    row, seen[i], repetition_penalty, always_divide=penalty_rule == "sat"
                )
            made = len(outputs[i])
            if ends and (made < min_new_tokens or given[i] + made < min_length):
                row = row.index_fill(0, torch.tensor(ends, device=row.device), float("-inf"))
            if temperature == 0:
                token = int(row.argmax())
            else:
                probs = sampling_probs(row[None], temperature, top_k, top_p)[0].cpu()
                token = int(torch.multinomial(probs, 1, generator=generators[i]))
            outputs[i].append(token)
            seen[i].append(token)
            if on_token:
                on_token(i, token)
            text = prompts[i] + outputs[i]
            ended = any(text[-len(word) :] == word for word in stop_words) or bool(
                stopped and stopped(outputs[i])
            )
            if not ended and len(outputs[i]) < room[i]:
                still.append(i)
            elif not ended and room[i] < max_new_tokens:
                print(
                    f"warning: an answer ends after {room[i]} tokens, at the model's last position",
                    file=sys.stderr,
                )
        if not still:
            return outputs
        cache.active = still
        batch = step_batch(model, cache, [outputs[i][-1] for i in still], [len(prompts[i]) for i in still])


@torch.no_grad()
def beam_search(
    model: nn.Module,
    requests: list[dict],
    max_new_tokens: int,
    stop_words: list[list[int]],
    num_beams: int,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    rule: str = "transformers",
    min_length: int = 0,
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[tuple[float, list[int]]]]:
    """The num_beams best answers of each request as (score, new token ids), best first.

    A score is the sum of log-probabilities (after the repetition penalty, which acts on them) / number of
    tokens ** length_penalty. An answer ends with one of the one-token `stop_words`, where `stopped` says so
    of its ids, or at max_new_tokens. `rule`: when a request is closed, and how an answer that the limit cuts
    is scored: "transformers" (5.x) or "lavis" (transformers 4.x fed with embeddings: it counts the start
    token as one more, and knows that token alone of the prompt, also for the repetition penalty and
    min_length).
    """
    model.eval()
    K, ends, lavis = num_beams, {word[0] for word in stop_words if len(word) == 1}, rule == "lavis"
    if len(ends) < len(stop_words):
        raise ValueError("beam search ends at single tokens; a stop word of several tokens needs num_beams=1")
    prompts, seen, cache, batch = prefill(model, requests, max_new_tokens)
    given = [1 if lavis else given_tokens(model, p) for p in prompts]
    check_minimum(given, max_new_tokens, min_length)
    seen = [tokens[:1] for tokens in seen] if lavis else seen
    room = [room_for(model, p, max_new_tokens) for p in prompts]
    # requests that are still open; each has K sequences in the cache after the first pass
    live = list(range(len(requests)))
    beams = {i: [(0.0, [])] for i in live}  # request -> its running (sum of log-probabilities, new tokens)
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in requests]

    def finish(i: int, total: float, tokens: list[int], length: int) -> None:
        finished[i] = sorted([*finished[i], (total / length**length_penalty, tokens)], key=lambda h: -h[0])[
            :K
        ]

    for n in range(1, max(room) + 1):
        logits = next_logits(model, batch, cache)
        offset, parents, last, still = 0, [], [], []
        for i in live:
            rows = logits[offset : offset + len(beams[i])].log_softmax(-1)  # (1 or K, V)
            V = rows.shape[1]
            if K > V // 2:
                raise ValueError(f"num_beams={K}; expected at most {V // 2}, half of the vocabulary")
            if repetition_penalty != 1.0:
                rows = torch.stack(
                    [
                        penalise_repetition(row, seen[i] + tokens, repetition_penalty)
                        for row, (_, tokens) in zip(rows, beams[i], strict=True)
                    ]
                )
            if n <= min_new_tokens or given[i] + n - 1 < min_length:
                rows = rows.index_fill(1, torch.tensor(sorted(ends), device=rows.device), float("-inf"))
            totals = rows + torch.tensor([total for total, _ in beams[i]], device=rows.device)[:, None]
            best, index = totals.flatten().topk(min(2 * K, totals.numel()))
            running, sources = [], []
            for rank, (total, at) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
                tokens = [*beams[i][at // V][1], at % V]
                if tokens[-1] in ends or (stopped and stopped(tokens)):
                    if rank < K:
                        finish(i, total, tokens, n)
                elif n == room[i] and not lavis:
                    if rank < K:
                        finish(i, total, tokens, n)
                elif len(running) < K:
                    running.append((total, tokens))
                    sources.append(offset + at // V)
            offset += len(beams[i])
            reachable = (
                (float(best[0]) / (n + 1) ** length_penalty)
                if lavis
                else (running[0][0] / n**length_penalty if running else float("-inf"))
            )
            closed = len(finished[i]) == K and finished[i][-1][0] >= reachable
            if n == room[i] < max_new_tokens and not closed:
                print(
                    f"warning: an answer ends after {n} tokens, at the model's last position", file=sys.stderr
                )
            if n == room[i] and lavis and not closed:
                for total, tokens in running:
                    finish(i, total, tokens, n + 1)
            if n < room[i] and not closed:
                still.append(i)
                beams[i] = running
                parents += sources
                last += [tokens[-1] for _, tokens in running]
        live = still
        if not live:
            break
        cache.reorder(parents)
        batch = step_batch(model, cache, last, [len(prompts[i]) for i in live for _ in beams[i]])
    return finished


def random_stream(seed: int, id: str) -> torch.Generator:
    """The draws of one request, whatever it is batched with."""
    digest = hashlib.sha256(f"{seed}:{id}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def given_tokens(model: nn.Module, prompt: list[int]) -> int:
    """Tokens before the answer that min_length counts: of an encoder-decoder, the one that its decoder begins
    with."""
    return 1 if getattr(getattr(model, "config", None), "is_t5", False) else len(prompt)


def check_minimum(given: list[int], max_new_tokens: int, min_length: int) -> None:
    if min(given) + max_new_tokens < min_length:
        raise ValueError(
            f"min_length={min_length} cannot be reached: {min(given)} tokens are given and max_new_tokens is "
            f"{max_new_tokens}; lower one or raise the other"
        )


def room_for(model: nn.Module, prompt: list[int], max_new_tokens: int) -> int:
    """New tokens that fit: fewer than max_new_tokens where the model's learned positions end before.
    ValueError for none."""
    limit = getattr(getattr(model, "config", None), "max_positions", None)
    if limit is not None and len(prompt) >= limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the model has {limit} positions; shorten it"
        )
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def prefill(model: nn.Module, requests: list[dict], max_new_tokens: int) -> tuple[list, list, KVCache, dict]:
    """-> (prompts, the tokens of each that the repetition penalty sees, an empty cache, the prompts as one
    stream)"""
    prompts = [[int(t) for t in r["input_ids"]] for r in requests]
    for p in prompts:
        room_for(model, p, max_new_tokens)
    Q = model.num_image_tokens
    batch = data.collate(
        [{"labels": p, "num_image_tokens": Q, **r} for p, r in zip(prompts, requests, strict=True)]
    )
    seen = []
    for r, p in zip(requests, prompts, strict=True):
        slots = {
            i for s in r["image_starts"] for i in range(s, s + Q)
        }  # a picture's slots are no tokens of the text
        seen.append(list(map(int, r.get("seen", (t for i, t in enumerate(p) if i not in slots)))))
    cache = KVCache([len(p) + room_for(model, p, max_new_tokens) for p in prompts])
    cache.positions = batch["position_ids"][..., batch["cu_seqlens"][1:].long() - 1]
    return prompts, seen, cache, batch


def next_logits(model: nn.Module, batch: dict, cache: KVCache) -> Tensor:
    """(B, V) fp32 of each segment's last position; the cache grows by the batch. ValueError unless all are
    finite."""
    device = next(model.parameters()).device
    batch = {
        k: v.to(device) if torch.is_tensor(v) and k not in data.HOST_TENSORS else v for k, v in batch.items()
    }
    logits = model({**batch, "cache": cache}, output="logits").float()
    cache.advance()
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the model's logits are not finite (NaN or infinity): its weights are "
            "damaged, or 16 bits overflow; fetch "
            "the checkpoint again, or use --dtype float32"
        )
    return logits


def step_batch(model: nn.Module, cache: KVCache, tokens: list[int], prompt_lengths: list[int]) -> dict:
    """One token more for each active sequence; its position is the last one plus the model's own step
    (default 1)."""
    cache.positions[..., cache.active] += getattr(model, "position_step", 1)
    return {
        "input_ids": torch.tensor(tokens),
        "position_ids": cache.positions[..., cache.active],
        "cu_seqlens": torch.arange(len(tokens) + 1, dtype=torch.int32),
        "max_len": 1,
        "rope_lengths": torch.tensor(
            prompt_lengths
        ),  # the cached keys were turned with the prompt's NTK base
    }


def base_of(model_name_or_path: str | None, lora_path: str | None) -> str:
    """The checkpoint that is meant: the one named, else the adapter's base, else the tiny model."""
    if model_name_or_path is None and lora_path is not None:
        return lora.find_base(lora_path)
    return model_name_or_path or "tiny"


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora_path: str | Path | None = None,
    world: parallel.World | None = None,
) -> nn.Module:
    """A model for inference from a checkpoint directory, optionally with an adapter (not merged); in a
    tensor-parallel `world` this rank's part of it."""
    config = checkpoint.read_config(directory)
    module = importlib.import_module("model_" + checkpoint.model_kind(config))
    if hasattr(module, "check_dtype"):
        module.check_dtype(config, dtype)
    weights = None
    if lora_path is not None:
        config, weights = lora.open_base(directory, lora_path, module)
    with torch.device("meta"):
        model = module.build_model(config)
    base_names = [name for name, _ in model.named_parameters()]
    if lora_path is not None:
        lora.load_adapter(model, lora_path)
    if world is not None:
        parallel.tensor_parallel(model, module.tp_plan(model.config, world.tp_size), world)
    model = model.to(dtype).to_empty(device=device)
    parallel.mark_cuts(model)
    parameters = dict(model.named_parameters())
    weights = weights or checkpoint.open_model(directory, module)
    checkpoint.load_into({name: parameters[name] for name in base_names}, weights)
    if lora_path is not None:
        lora.load_adapter(model, lora_path, checkpoint.copy_full_, parallel.whole_shape)
    return model.eval()


def read_requests(args) -> tuple[list[Conversation], list[tuple[str, str]]]:
    """What is to be answered, and (where, reason) of the records of --requests that cannot be."""
    if args.requests:
        conversations, problems = data.read_requests(args.requests, [f.name for f in fields(Decoding)])
        return conversations, [(problem.where, problem.reason) for problem in problems]
    if args.prompt is None:
        raise ValueError("nothing to answer: give --prompt (and --image), --chat, or --requests FILE.jsonl")
    turns = [("user", args.prompt)] if not args.system else [("system", args.system), ("user", args.prompt)]
    return [data.request(turns, args.image, where="--prompt")], []


def cut_at_stop(processor, ids: list[int], stop_texts: list[str]) -> tuple[str, bool]:
    """The answer's text before the first stop text, and whether there was one, wherever the borders of tokens
    lie."""
    shown = processor.decode(ids)
    for text in (
        (shown, processor.tokenizer.decode(ids)) if stop_texts else ()
    ):  # blanks at the ends are in the second
        if found := [text.index(stop) for stop in stop_texts if stop in text]:
            return text[: min(found)].strip(), True
    return shown, False


class Shown:
    """The text of an answer while its tokens come: whole characters only, no part of a stop text, and nothing
    that the next token may still change."""

    def __init__(self, processor, stop_texts: list[str] = ()):
        self.processor, self.stop_texts, self.tokens, self.text = processor, stop_texts, [], ""

    def more(self, token: int) -> str:
        """What can be shown now that the token is there."""
        self.tokens.append(token)
        text, stopped = cut_at_stop(self.processor, self.tokens, self.stop_texts)
        if stopped:
            return ""
        # a mark may change with what follows (VisualGLM's punctuation), a letter or digit does not
        held = 0 if text[-1:].isalnum() else 1
        for stop in self.stop_texts:  # the next token may complete a stop text
            held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
        text = text[: len(text) - held].rstrip()
        if not text.startswith(self.text) or text.endswith("\ufffd"):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece

    def rest(self, text: str) -> str | None:
        """What is missing of the whole answer; None where something else was shown."""
        return text[len(self.text) :] if text.startswith(self.text) else None


class Printer(Shown):
    """Prints the answer to one request while its tokens come."""

    def __call__(self, _, token: int) -> None:
        if piece := self.more(token):
            print(piece, end="", flush=True)

    def end(self, text: str) -> None:
        rest = self.rest(text)
        print("\n" + text if rest is None else rest, flush=True)


def answer(
    model: nn.Module,
    processor,
    conversations: list[Conversation],
    stop_words: list[list[int]],
    how: Decoding,
    on_token: Callable[[int, int], None] | None = None,
    stop_texts: list[str] = (),
    bad: list[tuple[str, str]] | None = None,
) -> list[str | None]:
    """The answers, searched for as `how` says, each up to the first of `stop_texts`.

    A conversation whose prompt or images cannot be read is listed in `bad` as (where, reason) and has the
    answer None; without that list it raises its ValueError.
    """
    d, dtype = how, next(p.dtype for p in model.parameters())
    requests = {}
    for n, c in enumerate(conversations):
        try:
            with one_record(c.where):
                request = {**processor.prompt(c), "id": c.id}
                room_for(model, request["input_ids"], d.max_new_tokens)
                request["pixel_values"] = [
                    processor.load_image(image).to(dtype) for image in request["images"]
                ]
                requests[n] = request
        except BadRecord as e:
            if bad is None:
                raise
            bad.append((e.where, e.reason))
    stopped = (lambda ids: cut_at_stop(processor, ids, stop_texts)[1]) if stop_texts else None
    if not requests:
        found = []
    elif d.num_beams > 1:
        beams = beam_search(
            model,
            list(requests.values()),
            d.max_new_tokens,
            stop_words,
            d.num_beams,
            d.length_penalty,
            d.repetition_penalty,
            d.min_new_tokens,
            d.beam_rule,
            d.min_length,
            stopped,
        )
        found = [ids for ((_, ids), *_) in beams]
    else:
        found = generate(
            model,
            list(requests.values()),
            d.max_new_tokens,
            stop_words,
            d.temperature,
            d.top_k,
            d.top_p,
            d.repetition_penalty,
            d.seed,
            on_token,
            d.min_new_tokens,
            d.min_length,
            d.penalty_rule,
            stopped,
        )
    texts = dict(zip(requests, (cut_at_stop(processor, ids, stop_texts)[0] for ids in found), strict=True))
    return [texts.get(n) for n in range(len(conversations))]


def name_bad(bad: list[tuple[str, str]]) -> None:
    """Says what is left out, on the first rank."""
    for where, reason in bad if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: left out {where}: {reason}", file=sys.stderr, flush=True)


def check_bad(bad: list[tuple[str, str]], total: int, share: float, what: str) -> None:
    """ValueError if more than the share max_bad_samples is bad; each was named when it was left out."""
    if len(bad) > share * total:
        raise ValueError(
            f"{len(bad):,} of {total:,} {what} were left out (the first: {bad[0][0]}: {bad[0][1]}), "
            f"max_bad_samples={share:g} allows {int(share * total):,}; mend them or raise it"
        )


def chat(
    model: nn.Module, processor, stop_texts: list[str], how: Decoding, system: str | None, images: list[str]
) -> None:
    """Questions from standard input, one a line, each after all the rounds before; the images belong to the
    first."""
    turns = [("system", system)] if system else []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not line.strip():
            continue
        conversation = data.request([*turns, ("user", line.strip())], images, where="standard input")
        printer = Printer(processor, stop_texts)
        (text,) = answer(model, processor, [conversation], processor.stop_words, how, printer, stop_texts)
        printer.end(text)
        turns, images = [*conversation.turns, ("assistant", [text])], []


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="qwen_vl", help="whose samples/tiny_* to use if no checkpoint is named")
    add(
        "--model_name_or_path",
        default=None,
        help="checkpoint directory; default: the adapter's base, else the tiny model",
    )
    add("--lora_path", default=None, help="adapter directory, applied without merging")
    add("--image", action="append", default=[], help="picture file; may be repeated")
    add("--prompt", default=None)
    add("--system", default=None, help="system text instead of the model's own")
    add("--chat", action="store_true", help="several rounds: questions from standard input, one a line")
    add(
        "--requests",
        default=None,
        help='JSONL: {"prompt": ..., "image": path or list} or any chat record, one a line',
    )
    add("--output", default=None, help="write answers as JSONL here")
    add(
        "--draw",
        default="boxes.png",
        help="where a copy of the picture with the answer's boxes goes, if it has any",
    )
    add("--stage", default="sft", choices=("sft", "pretrain", "pretrain1", "pretrain2"), help="prompt format")
    Decoding.add_arguments(parser)
    add("--stop", action="append", default=[], help="end before this text too; may be repeated")
    add("--batch_size", type=int, default=8)
    share = "share of --requests that may be unusable (named and left out) before the command fails"
    add("--max_bad_samples", type=float, default=0.01, help=share)
    add("--dtype", default="float32", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    degree = "processes (torchrun --nproc_per_node N) that hold the model together"
    add("--tensor_parallel_degree", type=int, default=1, help=degree)
    add(
        "--quantize", default=None, choices=BITS, help="weights of the language model's blocks in 8 or 4 bits"
    )
    choices = ("auto", "true", "false")
    add(
        "--use_flash_attention",
        default="auto",
        choices=choices,
        help="Triton kernels; auto: where there is a GPU",
    )
    args = parser.parse_args(argv)
    how = Decoding.of(args)
    check_arguments(args)
    degree, processes = args.tensor_parallel_degree, int(os.environ.get("WORLD_SIZE", 1))
    if degree != processes:
        raise ValueError(
            f"tensor_parallel_degree={degree} with {processes} processes; start it as "
            f"torchrun --nproc_per_node {degree} generate.py --tensor_parallel_degree {degree} ..."
        )
    if degree == 1:
        before = signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # like Ctrl-C: what is answered is kept
        try:
            return run(args, how)
        finally:
            signal.signal(signal.SIGTERM, before)
    if args.quantize or args.chat:
        raise ValueError(f"tensor_parallel_degree={degree} with --quantize or --chat is not supported; use 1")
    world = parallel.init_world(degree)
    args.device = str(world.device)
    try:
        if world.main:
            return run(args, how, world)
        # all ranks have the same answers
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            args.output = args.output and os.devnull
            return run(args, how, world)
    finally:
        parallel.leave_world()


def check_arguments(args) -> None:
    """Refuses what would be ignored."""
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size}; expected at least 1")
    if not 0 <= args.max_bad_samples <= 1:
        raise ValueError(f"max_bad_samples={args.max_bad_samples}; expected 0 to 1")
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text that ends an answer")
    if args.output:
        checkpoint.check_place(args.output, "output", devices=True)
    for name, others in (("requests", ("prompt", "image", "system", "chat")), ("chat", ("prompt", "output"))):
        for other in others if getattr(args, name) else ():
            if getattr(args, other):
                remedy = (
                    "leave one out" if name == "chat" or other == "chat" else "put it into the file's records"
                )
                raise ValueError(f"--{name} and --{other} are both given, and only one can be used; {remedy}")


def run(args, how: Decoding, world: parallel.World | None = None) -> int:
    kernels = dispatch.use_flash_attention(args.use_flash_attention, args.device)
    directory = data.model_directory(args.model, base_of(args.model_name_or_path, args.lora_path))
    processor = data.load_processor(directory, args.stage)
    conversations, bad = ([], []) if args.chat else read_requests(args)
    total = len(conversations) + len(bad)
    # quantised on the CPU, so that the device never holds the whole weights
    model = load_model(
        directory, DTYPES[args.dtype], "cpu" if args.quantize else args.device, args.lora_path, world
    )
    if args.quantize:
        probe = importlib.import_module(type(model).__module__).probe_batch(processor)
        print(f"{quantize(model, args.quantize, probe)} (against {args.dtype})", file=sys.stderr)
        model.to(args.device)
    main_rank = world is None or world.main
    if main_rank:
        print(f"device {args.device}, kernels: {kernels}", file=sys.stderr)
    if args.chat:
        chat(model, processor, args.stop, how, args.system, args.image)
        return 0
    printer = Printer(processor, args.stop) if len(conversations) == 1 and args.output is None else None
    name_bad(bad)
    drawn = 0
    with answer_file(args.output) as sink:
        for first in range(0, len(conversations), args.batch_size):
            some, named = conversations[first : first + args.batch_size], len(bad)
            left_out = bad if args.requests else None  # a single prompt that fails is an error
            texts = answer(model, processor, some, processor.stop_words, how, printer, args.stop, left_out)
            name_bad(bad[named:])
            for conversation, text in zip(some, texts, strict=True):
                if text is None:
                    continue
                if printer:
                    printer.end(text)
                elif sink is None:
                    print(f"{conversation.id}: {text}")
                else:
                    record = {"id": conversation.id, "answer": text}
                    print(json.dumps(record, ensure_ascii=False), file=sink, flush=True)
                out = (
                    Path(args.draw)
                    if drawn == 0
                    else Path(args.draw).with_stem(f"{Path(args.draw).stem}-{drawn}")
                )
                if (
                    main_rank
                    and conversation.images
                    and (boxes := draw_boxes(conversation.images[-1], text, out))
                ):
                    print(f"{boxes} boxes drawn: {out}", file=sys.stderr)
                    drawn += 1
    check_bad(bad, total, args.max_bad_samples, "requests")
    return 0


@contextlib.contextmanager
def answer_file(path: str | None):
    """The file that answers go to, or None. They gather beside it and replace what is there when all are
    answered, or when the command stops: what it has by then is kept."""
    if path is None or (os.path.exists(path) and not os.path.isfile(path)):  # a device, say
        with open(path, "w", encoding="utf-8") if path else contextlib.nullcontext() as file:
            yield file
        return
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
    except BaseException:
        answers = len(partial.read_bytes().splitlines())
        state = f"has the {answers:,} answers so far" if answers else "is as before"
        print(f"stopped: {path} {state}", file=sys.stderr)
        raise
    finally:
        if partial.stat().st_size:
            os.replace(partial, path)
        else:
            partial.unlink()


if __name__ == "__main__":
    checkpoint.leave(checkpoint.cli(main))
