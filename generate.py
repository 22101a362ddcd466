"""Images + prompt -> text.

    python generate.py --image samples/images/flags/noto/fr.png --prompt "这是哪个国家的国旗？"
    python generate.py --lora_path output --requests requests.jsonl --output answers.jsonl
    python generate.py --image image.png --chat        # questions from standard input, one a line

Answers come from engine.py, so a batch gives what its requests give alone. Sampling follows transformers'
order: repetition penalty, minimal length, temperature, top-k, top-p; each request has draws of its own.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch
from torch import nn

import checkpoint
import data
import lora
import parallel
import quantize
import records
import terminal
import vlm
from draw import draw_boxes
from engine import Engine, Request, cut_at_stop, room_for
from kernels import dispatch
from kernels.linear import pack
from records import BadRecord, Conversation, one_record
from terminal import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DTYPE_HELP = (
    "of the weights; default: the checkpoint's on a GPU, float32 on a CPU (bfloat16 is faster on one with "
    "AVX512-BF16, slower on others)"
)


def default_dtype(directory: str, device: str) -> str:
    config = checkpoint.read_config(directory)
    own = config.get("torch_dtype") or config.get("dtype")
    return own if own in DTYPES and torch.device(device).type != "cpu" else "float32"


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


def generate(
    model: nn.Module,
    requests: list[dict],
    how: Decoding,
    stop_words: list[list[int]],
    on_token: Callable[[int, int], None] | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    engine: Engine | None = None,
) -> list[list[int]]:
    """New token ids of each request, a stop word included as it came; with beams those of the best answer.

    A request: input_ids (T,), image_starts (positions of the images' first slots), pixel_values (list of
    (3, H, W)), and what data.collate takes besides. A sequence ends where all its ids, prompt included, end
    with one of `stop_words`, or where `stopped` says so of the ids of its answer. Stop words of one token
    can't come before min_length ids, those of the prompt (of an encoder-decoder: of the decoder's prompt)
    included. Draws of a request depend on (seed, its "id") alone: a batch gives what its requests give alone.
    penalty_rule: whose repetition penalty. "hf": of the prompt's tokens (`seen`, by default those outside
    images) and the answer's; "sat": of the answer's alone, always divided. `on_token(request, token)` sees
    each token as it comes. `engine`: one of this model with these stop words, which keeps what it computed
    for the next call.
    """
    engine = engine or Engine(model, stop_words=stop_words, cache_tokens=0, max_running=len(requests))
    wanted = [Request(r.get("id", ""), r, how, logprobs=-1, stopped=stopped) for r in requests]
    outputs: list[list[int]] = [[] for _ in wanted]
    numbers = {request: i for i, request in enumerate(wanted)}
    for request, ids in run_all(engine, iter(wanted), len(wanted), numbers, on_token):
        outputs[numbers[request]] = ids
    return outputs


def run_all(
    engine: Engine,
    wanted: Iterator[Request],
    at_once: int,
    numbers: dict[Request, int],
    on_token: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Request, list[int]]]:
    """(request, its new token ids) as the answers end; where one ends, the next request begins. The engine's
    pool grows to the room that `at_once` of them need."""
    running: dict[Request, list[int]] = {}
    while True:
        new = [engine.sequence(request) for request in islice(wanted, at_once - len(running))]
        # and room for the last answer that has ended: a round of a chat goes on from the one before
        engine.pool.grow(sum(s.rows for s in [*new, *engine.active, *engine.queue, *engine.kept[-1:]]))
        for sequence in new:
            running[sequence.request] = []
            engine.enqueue(sequence)
        if not running:
            return
        for event in engine.step():
            if event.error:
                raise ValueError(event.error)
            ids = running[event.request]
            ids.append(event.token)
            if on_token:
                on_token(numbers[event.request], event.token)
            if not event.finish:
                continue
            if event.finish == "length" and len(ids) < event.request.how.max_new_tokens:
                print(
                    f"warning: an answer ends after {len(ids)} tokens, at the model's last position",
                    file=sys.stderr,
                )
            del running[event.request]
            yield event.request, ids


def beam_search(
    model: nn.Module,
    requests: list[dict],
    how: Decoding,
    stop_words: list[list[int]],
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[tuple[float, list[int]]]]:
    """The num_beams best answers of each request as (score, new token ids), best first.

    A score is the sum of log-probabilities (after the repetition penalty, which acts on them) / number of
    tokens ** length_penalty. An answer ends with one of the one-token `stop_words`, where `stopped` says so
    of its ids, or at max_new_tokens. `beam_rule`: when a request is closed, and how an answer that the limit
    cuts is scored: "transformers" (5.x) or "lavis" (transformers 4.x fed with embeddings: it counts the start
    token as one more, and knows that token alone of the prompt, also for the repetition penalty and
    min_length).
    """
    engine = Engine(model, stop_words=stop_words, cache_tokens=0, max_running=len(requests))
    wanted = [Request(r.get("id", ""), r, how, logprobs=-1, stopped=stopped) for r in requests]
    sequences = [engine.sequence(request) for request in wanted]
    engine.pool.grow(sum(s.rows for s in sequences))
    for sequence in sequences:
        engine.enqueue(sequence)
    while engine.has_work():
        for event in engine.step():
            if event.error:
                raise ValueError(event.error)
    return [sequence.beams.finished for sequence in sequences]


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
    definition = vlm.find(config)
    definition.check_dtype(config, dtype)
    weights = None
    if lora_path is not None:
        config, weights = lora.open_base(directory, lora_path, definition)
    model = definition.network(config)
    base_names = [name for name, _ in model.named_parameters()]
    if lora_path is not None:
        lora.load_adapter(model, lora_path)
    if world is not None:
        parallel.tensor_parallel(model, definition.tp_plan(model.config, world.tp_size), world)
    model = model.to(dtype)
    if kind := config.get("quantize"):  # written by quantize.py
        few_bits_alone(directory, kind, world)
        quantize.prepare(model.requires_grad_(False), kind)
    model = model.to_empty(device=device)
    parallel.mark_cuts(model)
    parameters = dict(model.named_parameters())
    weights = weights or checkpoint.open_model(directory, definition, few_bits=True)
    few = quantize.tensors_of(model)
    quantize.load(few, weights)
    whole = {name: parameters[name] for name in base_names if name in parameters}
    checkpoint.load_into(whole, weights, skip=few.keys())
    if lora_path is not None:
        lora.load_adapter(model, lora_path, checkpoint.copy_full_, parallel.whole_shape)
    return model.eval()


def few_bits_alone(directory, kind: str, world: parallel.World | None) -> None:
    if kind not in quantize.KINDS:
        raise ValueError(f"{directory}: quantize={kind!r}; expected one of {', '.join(quantize.KINDS)}")
    if world is not None:
        raise ValueError(
            f"{directory} holds weights in {kind}, which tensor_parallel_degree can't cut; use 1"
        )


def load_quantized(directory, processor, dtype: str, device, kind: str, lora_path=None) -> nn.Module:
    """load_model with the blocks' weights in few bits; says what that costs. Rounded on the CPU, so that the
    device never holds the whole weights."""
    if made := checkpoint.read_config(directory).get("quantize"):
        raise ValueError(f"--quantize {kind}: {directory} holds weights in {made} already; leave it out")
    model = load_model(directory, DTYPES[dtype], "cpu", lora_path)
    probe = vlm.find(model.config.raw).probe_batch(processor)
    print(f"{quantize.quantize(model, kind, probe)} (against {dtype})", file=sys.stderr)
    return model.to(device)


def load_as_asked(directory, processor, dtype: str, device, kind: str | None, adapter=None, world=None):
    """The model that a command line means, in few bits if it names a kind of them. An adapter that was
    trained over other bits is named."""
    lora.say_base(adapter, kind)
    if kind:
        model = load_quantized(directory, processor, dtype, device, kind, adapter)
    else:
        model = load_model(directory, DTYPES[dtype], device, adapter, world)
    if few := kind or model.config.raw.get("quantize"):
        packed = few != "nf4" and dtype == "bfloat16"
        slow = "reads prompts and answers batches" if packed else "answers"
        quantize.say_slower(f"{few} in {dtype}", torch.device(device), slow)
    return model


def read_requests(args) -> tuple[list[Conversation], list[tuple[str, str]]]:
    """What is to be answered, and (where, reason) of the records of --requests that cannot be."""
    if args.requests:
        conversations, problems = records.read_requests(args.requests, [f.name for f in fields(Decoding)])
        return conversations, [(problem.where, problem.reason) for problem in problems]
    if args.prompt is None:
        raise ValueError("nothing to answer: give --prompt (and --image), --chat, or --requests FILE.jsonl")
    turns = [("user", args.prompt)] if not args.system else [("system", args.system), ("user", args.prompt)]
    return [records.request(turns, args.image, where="--prompt")], []


class Shown:
    """The text of an answer while its tokens come: whole characters only, no part of a stop text, and nothing
    that the next token may still change. Of a long answer the last tokens alone are decoded.

    begun: tokens of the answer that are shown already, as the text `text`.
    """

    WINDOW = 96

    def __init__(self, processor, stop_texts: list[str] = (), begun: list[int] = (), text: str = ""):
        self.processor, self.stop_texts = processor, stop_texts
        self.tokens, self.text = list(begun), text
        self.start, self.window = 0, text  # the first token that is decoded, and what is shown from there on

    def more(self, token: int) -> str:
        """What can be shown now that the token is there."""
        self.tokens.append(token)
        text, stopped = cut_at_stop(self.processor, self.tokens[self.start :], self.stop_texts)
        if stopped:
            return ""
        # a mark may change with what follows (VisualGLM's punctuation), a letter or digit does not
        held = 0 if text[-1:].isalnum() else 1
        for stop in self.stop_texts:  # the next token may complete a stop text
            held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
        text = text[: len(text) - held].rstrip()
        if not text.startswith(self.window) or text.endswith("\ufffd"):
            return ""
        piece, self.window = text[len(self.window) :], text
        self.text += piece
        if not held and not self.stop_texts and len(self.tokens) - self.start > self.WINDOW:
            start = len(self.tokens) - self.WINDOW // 3
            window = self.processor.decode(self.tokens[start:])
            if self.text.endswith(window):  # else it begins inside a character, or is worded anew
                self.start, self.window = start, window
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


def answer(engine: Engine, conversations: list[Conversation], how: Decoding, *options) -> list[str | None]:
    """The answers as a list; more as answers() takes it."""
    return list(answers(engine, conversations, how, *options))


def answers(
    engine: Engine,
    conversations: list[Conversation],
    how: Decoding,
    stop_texts: list[str] = (),
    on_token: Callable[[int, int], None] | None = None,
    bad: list[tuple[str, str]] | None = None,
) -> Iterator[str | None]:
    """The answers in order, searched for as `how` says, each up to the first of `stop_texts`. As many as the
    engine runs at once are computed side by side; where one ends, the next begins.

    A conversation whose prompt or images cannot be read is listed in `bad` as (where, reason) and has the
    answer None; without that list it raises its ValueError. The engine has a processor, and keeps what it
    computed for the next call; its pool grows as needed.
    """
    model, processor, dtype = engine.model, engine.processor, engine.dtype
    stopped = (lambda ids: cut_at_stop(processor, ids, stop_texts)[1]) if stop_texts else None
    numbers: dict[Request, int] = {}
    texts: dict[int, str | None] = {}  # of those that wait for one before them

    def wanted() -> Iterator[Request]:
        for n, c in enumerate(conversations):
            try:
                with one_record(c.where):
                    prompt = {**processor.prompt(c), "id": c.id}
                    room_for(model, prompt["input_ids"], how.max_new_tokens)
                    pixels = [processor.load_image(image).to(dtype) for image in prompt["images"]]
                    prompt["pixel_values"] = pixels
            except BadRecord as e:
                if bad is None:
                    raise
                bad.append((e.where, e.reason))
                texts[n] = None
                continue
            request = Request(c.id, prompt, how, logprobs=-1, stopped=stopped)
            numbers[request] = n
            yield request

    given = 0
    for request, ids in run_all(engine, wanted(), engine.max_running, numbers, on_token):
        texts[numbers.pop(request)] = cut_at_stop(processor, ids, stop_texts)[0]
        while given in texts:
            yield texts.pop(given)
            given += 1
    while given in texts:
        yield texts.pop(given)
        given += 1


def name_bad(bad: list[tuple[str, str]]) -> None:
    """Says what is left out, on the first rank."""
    for where, reason in bad:
        terminal.note(f"warning: left out {where}: {reason}")


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
    engine = Engine(model, processor, cache_tokens=0)  # it keeps the rounds before
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not line.strip():
            continue
        conversation = records.request([*turns, ("user", line.strip())], images, where="standard input")
        printer = Printer(processor, stop_texts)
        (text,) = answer(engine, [conversation], how, stop_texts, printer)
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
    add("--image", action="append", default=[], help="image file; may be repeated")
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
        help="where a copy of the image with the answer's boxes goes, if it has any",
    )
    add("--stage", default="sft", help="of training, for its prompt format: sft, or the model's own")
    Decoding.add_arguments(parser)
    add("--stop", action="append", default=[], help="end before this text too; may be repeated")
    add("--batch_size", type=int, default=8)
    share = "share of --requests that may be unusable (named and left out) before the command fails"
    add("--max_bad_samples", type=float, default=0.01, help=share)
    add("--dtype", default=None, choices=DTYPES, help=DTYPE_HELP)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    degree = "processes (torchrun --nproc_per_node N) that hold the model together"
    add("--tensor_parallel_degree", type=int, default=1, help=degree)
    add(
        "--quantize",
        default=None,
        choices=quantize.KINDS,
        help="weights of the language model's blocks in 8 or 4 bits; fast on a CPU: int8, int4 in bfloat16",
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
    degree = args.tensor_parallel_degree
    check_degree("generate.py", degree)
    if degree == 1:
        # like Ctrl-C: what is answered is kept
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
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


def check_degree(script: str, degree: int) -> None:
    """ValueError unless so many processes were started."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if degree != processes:
        raise ValueError(
            f"tensor_parallel_degree={degree} with {processes} processes; start it as "
            f"torchrun --nproc_per_node {degree} {script} --tensor_parallel_degree {degree} ..."
        )


def check_device(name: str) -> None:
    """ValueError unless tensors can be kept there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = one_line(str(e), 120)
        raise ValueError(
            f"device={name[:40]!r} cannot be used here ({reason}); use cpu, or cuda where there is a GPU"
        ) from None


def check_arguments(args) -> None:
    """Refuses what would be ignored."""
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size}; expected at least 1")
    if not 0 <= args.max_bad_samples <= 1:
        raise ValueError(f"max_bad_samples={args.max_bad_samples}; expected 0 to 1")
    if args.system is not None and not args.system.strip():
        raise ValueError("--system is empty; leave it out for the model's own system text")
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text that ends an answer")
    if args.output:
        checkpoint.check_place(args.output, "output", devices=True, keep=[args.requests or ""])
    if os.path.isdir(args.draw):
        raise ValueError(f"draw={args.draw} is a directory; name a file")
    check_device(args.device)
    for name, others in (("requests", ("prompt", "image", "system", "chat")), ("chat", ("prompt", "output"))):
        for other in others if getattr(args, name) else ():
            if getattr(args, other) not in (None, [], False):
                remedy = (
                    "leave one out" if name == "chat" or other == "chat" else "put it into the file's records"
                )
                raise ValueError(f"--{name} and --{other} are both given, and only one can be used; {remedy}")
    if args.prompt is not None and not args.prompt.strip() and not args.image:
        raise ValueError("--prompt is empty, and there is no --image that it could be about")


@torch.inference_mode()
def run(args, how: Decoding, world: parallel.World | None = None) -> int:
    kernels = dispatch.use_flash_attention(args.use_flash_attention, args.device)
    directory = data.model_directory(args.model, base_of(args.model_name_or_path, args.lora_path))
    processor = data.load_processor(directory, args.stage)
    conversations, bad = ([], []) if args.chat else read_requests(args)
    total = len(conversations) + len(bad)
    args.dtype = args.dtype or default_dtype(directory, args.device)
    where = args.dtype, args.device
    model = pack(load_as_asked(directory, processor, *where, args.quantize, args.lora_path, world))
    main_rank = world is None or world.main
    if main_rank:
        print(f"device {args.device}, kernels: {kernels}", file=sys.stderr)
    if args.chat:
        chat(model, processor, args.stop, how, args.system, args.image)
        return 0
    printer = Printer(processor, args.stop) if len(conversations) == 1 and args.output is None else None
    name_bad(bad)
    named, drawn = len(bad), 0
    with answer_file(args.output) as sink:
        left_out = bad if args.requests else None  # a single prompt that fails is an error
        engine = Engine(model, processor, cache_tokens=0, max_running=args.batch_size)
        texts = answers(engine, conversations, how, args.stop, printer, left_out)
        for conversation, text in zip(conversations, texts, strict=True):
            name_bad(bad[named:])
            named = len(bad)
            if text is None:
                continue
            if printer:
                printer.end(text)
            elif sink is None:
                print(f"{conversation.id}: {text}")
            else:
                record = {"id": conversation.id, "answer": text}
                print(json.dumps(record, ensure_ascii=False), file=sink, flush=True)
            out = Path(args.draw)
            out = out.with_stem(f"{out.stem}-{drawn}") if drawn else out
            shown = conversation.images[-1:] if main_rank else []
            if shown and (boxes := draw_boxes(shown[0], text, out)):
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
    path = os.path.realpath(path)
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
    terminal.leave(terminal.cli(main))
