"""An OpenAI-compatible server for one model and its adapters, with a chat page at "/".

    python serve.py --model qwen_vl                                # the tiny model at http://127.0.0.1:8000
    python serve.py --model_name_or_path qwen-vl-7b --lora_paths flags=output --dtype bfloat16
    torchrun --nproc_per_node 2 serve.py --tensor_parallel_degree 2 --model_name_or_path qwen-vl-7b
    python serve.py bench http://127.0.0.1:8000 --concurrency 8    # what it gives, also any other server

    POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics (Prometheus, vLLM's names)

Needs requirements-serve.txt. A chat is answered as generate.py --requests answers the same record; what a
request does not set has generate.py's default, or the one that this command line gives (temperature 0:
greedy). Two threads: the event loop reads, checks and writes; one thread steps the engine, and alone touches
it. chat_body.py says what a request may hold.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import hmac
import itertools
import json
import logging
import math
import queue
import re
import resource
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from bisect import bisect_left
from collections import Counter, OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as e:
    sys.exit(f"error: {e.name} is not installed; pip install -r requirements-serve.txt")
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import bench_serve
import checkpoint
import data
import engine
import generate
import lora
import parallel
import records
import terminal
import vlm
from chat_body import DECODING, Refused, Wanted, read_wanted
from generate import Decoding, Shown
from kernels import dispatch
from kernels.linear import pack
from quantize import KINDS

NAME = r"[\w.:/-]+"  # of a model or an adapter
PAGE = Path(__file__).resolve().parent / "chat.html"
KEPT_IMAGES = 32  # whose pixels stay in memory, 2.4 MB each at 448 x 448

# ---- the engine's thread


@dataclass(eq=False)
class Wish(engine.Request):
    """One answer that the engine makes, and the chat that waits for it."""

    chat: "Chat" = None
    index: int = 0
    number: int = 0  # by which the ranks of a tensor-parallel model know it


class EngineThread(threading.Thread):
    """Steps the engine while it has work. What it is told and what it says crosses over once a step."""

    def __init__(self, engine, loop: asyncio.AbstractEventLoop, deliver, failed, ranks: int = 1):
        super().__init__(daemon=True)
        self.engine, self.loop, self.deliver, self.failed, self.ranks = engine, loop, deliver, failed, ranks
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.numbers = itertools.count()

    def submit(self, wishes: list[Wish]) -> None:
        """All of them before the next step, so that each is taken before the first event of one."""
        for wish in wishes:
            wish.number = next(self.numbers)
        self.inbox.put([(wish, True) for wish in wishes])

    def cancel(self, wishes: list[Wish]) -> None:
        self.inbox.put([(wish, False) for wish in wishes])

    def end(self) -> None:
        self.inbox.put(None)
        self.join(10)

    @torch.inference_mode()
    def run(self) -> None:
        try:
            while True:
                # Without work it waits for orders; with work it takes those that are there, and steps.
                told = [] if self.engine.has_work() else [self.sleep()]
                while not self.inbox.empty():
                    told.append(self.inbox.get())
                if None in told:
                    self.tell(None)
                    return
                orders = [order for orders in told for order in orders]
                self.tell(orders)
                news = [self.obey(*order) for order in orders]
                news += [(event.request, event) for event in self.engine.step()]
                # One call for all: a wake-up of the loop for each token would cost as much as the token.
                if news := [item for item in news if item is not None]:
                    self.loop.call_soon_threadsafe(self.deliver, news)
        except Exception as e:
            self.loop.call_soon_threadsafe(self.failed, where_from(e))

    def sleep(self) -> list | None:
        """The next orders; none after a while, where other ranks wait for a word of this one."""
        try:
            return self.inbox.get(timeout=None if self.ranks == 1 else 30)
        except queue.Empty:
            return []

    def tell(self, orders: list | None) -> None:
        """The other ranks, which follow(): (number of a request, the request or None: it is given up)."""
        # An empty list too: each of its steps is one of theirs.
        if self.ranks == 1:
            return
        said, names = None if orders is None else [], [f.name for f in fields(engine.Request)]
        for wish, wanted in orders or ():
            # Without the chat, which no other rank has.
            request = engine.Request(**{name: getattr(wish, name) for name in names}) if wanted else None
            said.append((wish.number, request))
        dist.broadcast_object_list([said], src=0, device=torch.device("cpu"))

    def obey(self, wish: Wish, wanted: bool):
        """-> (wish, True) when it is taken, (wish, reason) when it can never run."""
        if not wanted:
            self.engine.cancel(wish)
            return None
        try:
            with records.one_record("the request"):
                self.engine.submit(wish)
            return wish, True
        except records.BadRecord as e:
            return wish, e.reason


@torch.inference_mode()
def follow(made: engine.Engine) -> int:
    """What the other ranks of a tensor-parallel model do: rank 0's steps with rank 0's orders. Logits are the
    same on all of them, so the tokens are."""
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them to all; rank 0 says when it ends
        signal.signal(number, signal.SIG_IGN)
    running: dict[int, engine.Request] = {}
    while True:
        said = [None]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        if said[0] is None:
            return 0
        for number, request in said[0]:
            if request is None and number in running:
                made.cancel(running.pop(number))
            elif request is not None:
                # What rank 0 refuses is refused here, by the same look at it.
                with contextlib.suppress(records.BadRecord), records.one_record("the request"):
                    made.submit(request)
                    running[number] = request
        ended = {event.request for event in made.step() if event.finish}
        running = {number: request for number, request in running.items() if request not in ended}


def where_from(error: BaseException) -> str:
    """What went wrong and where, without the text of the error: it may quote a request."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return f"{type(error).__name__} at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"


# ---- answers


class Chat:
    """One HTTP request: its n answers, and what the engine says of them."""

    def __init__(self, service: "Service", wanted: Wanted, prompt: dict, adapter: str | None, client: str):
        self.service, self.wanted, self.events = service, wanted, asyncio.Queue()
        # What usage says of it, and the times of the metrics.
        self.prompt_tokens, self.cached_tokens = len(prompt["input_ids"]), 0
        self.image_tokens = service.processor.num_image_tokens * len(prompt["images"])
        self.started, self.first, self.last = time.monotonic(), None, None
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        w, settings = wanted, {"stop": wanted.stop, "adapter": adapter, "logprobs": wanted.logprobs}
        settings |= {"logit_bias": w.logit_bias, "presence_penalty": w.presence_penalty}
        settings |= {"frequency_penalty": w.frequency_penalty, "client": client}
        # like the numbers of records in a file of requests: so one seed gives the answers of generate.py
        self.wishes = [Wish(str(n), prompt, w.how, **settings, chat=self, index=n) for n in range(w.n)]
        begun = prompt["begun"], wanted.begun or ""
        self.choices = [Choice(service.processor, w.stop, w.logprobs, n, *begun) for n in range(w.n)]
        self.running = set(range(w.n))

    async def accepted(self) -> None:
        """Sends the answers to the engine. Refused where they can never run."""
        self.service.thread.submit(self.wishes)
        refusal = None
        for _ in self.wishes:
            # Before the head of an answer is sent: a refusal can still have its status.
            wish, said = await self.events.get()
            if isinstance(said, engine.Event):
                raise Refused(500, said.error)  # the engine is lost
            if said is not True:
                self.running.discard(wish.index)
                refusal = said
        if refusal:
            raise Refused(400, refusal, "messages")

    async def pieces(self):
        """Yields (choice, its new text, its new log-probabilities) until all answers have ended."""
        while self.running:
            wish, event = await self.events.get()
            choice = self.choices[wish.index]
            if event.finish == "error":
                raise Refused(500, event.error or "the answer failed")
            # Several answers share one prompt: what one of them found is all that was found.
            self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
            yield choice, *choice.add(event)
            if event.finish:
                self.running.discard(wish.index)
                self.service.metrics.ended(self, choice)

    def cancel(self) -> None:
        if self.running:
            self.service.thread.cancel([self.wishes[index] for index in self.running])
            self.service.metrics.add("request_success", len(self.running), finished_reason="abort")

    def usage(self) -> dict:
        made = sum(choice.made for choice in self.choices)
        details = {"cached_tokens": self.cached_tokens, "image_tokens": self.image_tokens, "audio_tokens": 0}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": details,
        }

    def head(self, kind: str) -> dict:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model}
        return {**about, "system_fingerprint": "trimix"}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> bytes:
        body = {**self.head("chat.completion.chunk"), "choices": choices}
        if self.wanted.include_usage:
            body["usage"] = usage
        return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    async def stream(self):
        """Yields server-sent events: the texts of all answers as they grow."""

        def delta(choice: Choice, content: dict, finish=None, logprobs=None) -> bytes:
            one = {"index": choice.index, "delta": content, "logprobs": logprobs, "finish_reason": finish}
            return self.chunk([one])

        begin = {"role": "assistant", "content": ""}
        yield b"".join(delta(choice, begin) for choice in self.choices)
        try:
            async for choice, text, logprobs in self.pieces():
                out = b""
                if text or logprobs:
                    out += delta(choice, {"content": text}, None, choice.logprobs_of(logprobs))
                if choice.finish:
                    out += delta(choice, {}, choice.finish)
                if out:  # a step may give no whole character
                    yield out
        except Refused as e:  # the head is out: the error is an event of the stream
            yield b"data: " + json.dumps(e.body()).encode() + b"\n\n"
            return
        yield (self.chunk([], self.usage()) if self.wanted.include_usage else b"") + b"data: [DONE]\n\n"

    async def whole(self) -> Response:
        found = [("", []) for _ in self.choices]
        async for choice, text, logprobs in self.pieces():
            before, entries = found[choice.index]
            found[choice.index] = before + text, entries + logprobs
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": choice.logprobs_of(entries),
                "finish_reason": choice.finish,
            }
            for choice, (text, entries) in zip(self.choices, found, strict=True)
        ]
        return JSONResponse({**self.head("chat.completion"), "choices": choices, "usage": self.usage()})


class Choice:
    """One answer as it grows."""

    def __init__(self, processor, stop: list[str], top: int, index: int, begun: list[int], text: str):
        self.processor, self.stop, self.top, self.index = processor, stop, top, index
        if begun and not text.startswith(processor.decode(begun)):
            text = processor.decode(begun)  # what the model makes of it
        self.shown, self.finish, self.begun = Shown(processor, stop, begun, text), None, len(begun)
        self.entries = []  # (where its text begins, a log-probability that waits to be sent)

    @property
    def made(self) -> int:
        return len(self.shown.tokens) - self.begun

    def add(self, event) -> tuple[str, list[dict]]:
        """-> the text and the log-probabilities that can be sent now."""
        text, tokens = "", self.shown.tokens
        if event.token is not None:
            if self.top >= 0:
                entry = self.entry(tokens, event.token, event.logprob)
                entry["top_logprobs"] = [self.entry(tokens, *one) for one in event.top[: self.top]]
                self.entries.append((len(self.processor.decode(tokens)), entry))
            text = self.shown.more(event.token)
        # A log-probability goes out with its token's text, which may wait: for the rest of a character, or
        # since a stop text may begin in it.
        end = len(self.shown.text)
        if event.finish:
            whole = generate.cut_at_stop(self.processor, tokens, self.stop)[0]
            text += self.shown.rest(whole) or ""
            end = len(whole) if event.finish == "stop" else math.inf  # without the end marker, or a stop text
            self.finish = event.finish
        ready = [entry for start, entry in self.entries if start < end]
        self.entries = [(start, entry) for start, entry in self.entries if start >= end]
        return text, ready

    def entry(self, before: list[int], token: int, logprob: float) -> dict:
        tokenizer, table = self.processor.tokenizer, self.processor.token_bytes
        if token < len(table):
            raw = table[token]
            text = raw.decode("utf-8", "replace")
        else:  # with what stands before: a first token loses its blank
            head, both = tokenizer.decode(before[-8:]), tokenizer.decode([*before[-8:], token])
            text = both[len(head) :] if both.startswith(head) else tokenizer.decode([token])
            raw = text.encode()
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    def logprobs_of(self, entries: list[dict]) -> dict | None:
        return None if self.top < 0 else {"content": entries, "refusal": None}


class ChatCompletions:
    """The route: an ASGI application, so that it sees the client go while it answers."""

    def __init__(self, service: "Service"):
        self.service = service

    async def __call__(self, scope, receive, send) -> None:
        service, request = self.service, Request(scope, receive)
        client = (scope.get("client") or ("",))[0]  # an address
        # A seat first: who finds none is sent away before a body is read.
        with service.seats.taken(client) as take:
            content = await read_body(request, service.limits)
            prepared = asyncio.get_running_loop().run_in_executor(service.workers, service.prepare, content)
            wanted, prompt, adapter = await prepared
            del content  # megabytes, for as long as the answer takes
            take(wanted.n - 1)
            chat = Chat(service, wanted, prompt, adapter, client)
            scope["chat"] = chat  # for the log
            service.chats.add(chat)
            answer = asyncio.ensure_future(self.answer(chat, scope, receive, send))
            gone = asyncio.ensure_future(client_gone(receive))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ClientDisconnect
                await answer
            finally:
                chat.cancel()  # who has gone frees the engine at once
                service.chats.discard(chat)
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)

    async def answer(self, chat: Chat, scope, receive, send) -> None:
        await chat.accepted()
        if not chat.wanted.stream:
            response = await chat.whole()
            await response(scope, receive, send)
            return
        options = {"media_type": "text/event-stream", "headers": {"cache-control": "no-cache"}}
        # Not by calling it: it would look for the client's going too, with the same `receive`.
        await StreamingResponse(chat.stream(), **options).stream_response(send)


async def client_gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limits, seconds: float = 30) -> bytes:
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        # a page of another site can send every other type without being asked
        raise Refused(415, "expected the header Content-Type: application/json")
    # What says that it is too large is not read at all; what does not say it, up to the limit.
    length, most = request.headers.get("content-length", "0"), limits.max_body_mb * 1_000_000
    size = int(length) if re.fullmatch(r"\d{1,15}", length) else math.inf
    stream, parts = request.stream(), []
    if size <= most:
        size = 0
        try:
            async with asyncio.timeout(seconds):
                async for part in stream:
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        break
        except TimeoutError:
            raise Refused(408, f"the body did not come within {seconds:g} s", connection="close") from None
    if size > most:
        with contextlib.suppress(TimeoutError):  # one that is still sending would not see the answer
            async with asyncio.timeout(1):
                async for _ in stream:
                    pass
        raise Refused(413, f"the body is larger than {limits.max_body_mb} MB", connection="close")
    return b"".join(parts)


class Seats:
    """How many answers are waiting or running; one that finds no seat is sent away at once. Some seats are
    kept for others than the one who has most."""

    def __init__(self, running: int, waiting: int):
        # So that one busy client leaves room for others: a quarter of the queue.
        self.most, self.most_of_one = running + waiting, running + waiting - waiting // 4
        self.open, self.of, self.draining, self.mean_seconds = 0, Counter(), False, 1.0

    @contextlib.contextmanager
    def taken(self, client: str):
        """Takes a seat, and yields what takes so many more; all are free again behind it."""
        mine, began = 0, time.monotonic()

        def take(count: int) -> None:
            nonlocal mine
            if self.draining:
                raise Refused(503, "the server is shutting down", retry_after="30", connection="close")
            full = self.open + count > self.most
            if full or self.of[client] + count > self.most_of_one:
                # About when the next seat will be free.
                wait = str(min(60, max(1, math.ceil(self.mean_seconds))))
                message = f"too many requests{'' if full else ' of yours'} are waiting; try again later"
                raise Refused(429, message, None, "queue_full", retry_after=wait)
            self.open += count
            self.of[client] += count
            mine += count

        try:
            take(1)
            yield take
            self.mean_seconds += 0.1 * (time.monotonic() - began - self.mean_seconds)
        finally:
            self.open -= mine
            self.of[client] -= mine
            if not self.of[client]:  # or addresses would gather for as long as the server runs
                del self.of[client]


# ---- metrics


class Metrics:
    """Counters and histograms in Prometheus' text format, under vLLM's names."""

    # The bounds of vLLM's histograms, so that its dashboards fit.
    TIMES = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160"
    TIMES = tuple(map(float, TIMES.split()))
    COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
    HISTOGRAMS = {
        "time_to_first_token_seconds": TIMES,
        "inter_token_latency_seconds": TIMES,
        "e2e_request_latency_seconds": TIMES,
        "request_prompt_tokens": COUNTS,
        "request_generation_tokens": COUNTS,
    }
    COUNTERS = ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")

    def __init__(self, model: str):
        self.model = model
        self.counters = {(name, ""): 0 for name in self.COUNTERS}
        self.histograms = {name: [[0] * (len(b) + 1), 0.0] for name, b in self.HISTOGRAMS.items()}

    def add(self, name: str, count: int, **labels: str) -> None:
        key = name, "".join(f',{label}="{value}"' for label, value in labels.items())
        self.counters[key] = self.counters.get(key, 0) + count

    def observe(self, name: str, value: float) -> None:
        found = self.histograms[name]
        found[0][bisect_left(self.HISTOGRAMS[name], value)] += 1
        found[1] += value

    def token(self, chat: Chat, now: float) -> None:
        if chat.first is None:
            chat.first = now
            self.observe("time_to_first_token_seconds", now - chat.started)
            self.observe("request_prompt_tokens", chat.prompt_tokens)
            self.add("prompt_tokens", chat.prompt_tokens)
        # Of several answers in turn it would be the time between any two of them.
        elif len(chat.wishes) == 1:
            self.observe("inter_token_latency_seconds", now - chat.last)
        chat.last = now
        self.add("generation_tokens", 1)

    def ended(self, chat: Chat, choice: Choice) -> None:
        self.add("request_success", 1, finished_reason=choice.finish)
        self.observe("e2e_request_latency_seconds", time.monotonic() - chat.started)
        self.observe("request_generation_tokens", choice.made)
        self.add("prefix_cache_queries", chat.prompt_tokens)
        self.add("prefix_cache_hits", chat.cached_tokens)

    def text(self, gauges: dict[str, float]) -> str:
        label, lines = f'model_name="{self.model}"', []
        for name, value in gauges.items():
            lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{label}}} {value}"]
        # A type is said once, before all the lines of a name.
        named = None
        for (name, more), value in sorted(self.counters.items()):
            lines += [f"# TYPE vllm:{name}_total counter"] if name != named else []
            lines.append(f"vllm:{name}_total{{{label}{more}}} {value}")
            named = name
        for name, (counts, total) in self.histograms.items():
            lines.append(f"# TYPE vllm:{name} histogram")
            # Prometheus' buckets are cumulative.
            below = 0
            for bound, count in zip([*self.HISTOGRAMS[name], "+Inf"], counts, strict=True):
                below += count
                lines.append(f'vllm:{name}_bucket{{{label},le="{bound}"}} {below}')
            lines += [f"vllm:{name}_sum{{{label}}} {total}", f"vllm:{name}_count{{{label}}} {below}"]
        return "\n".join(lines) + "\n"


# ---- the service and its routes


class Service:
    """All that a request needs; the event loop's side of the engine."""

    def __init__(self, made: engine.Engine, processor, name: str, limits: argparse.Namespace):
        self.engine, self.processor, self.name, self.limits = made, processor, name, limits
        self.created = int(time.time())
        self.seats, self.metrics = Seats(limits.max_running, limits.max_queue), Metrics(name)
        # a large image is a hundred MB while it opens
        self.workers = concurrent.futures.ThreadPoolExecutor(4)
        self.thread, self.failure, self.server = None, None, None
        self.chats: set[Chat] = set()  # that are being answered
        self.opened: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # pixels by the hash of what was sent

    def start(self, loop) -> None:
        ranks = self.limits.tensor_parallel_degree
        self.thread = EngineThread(self.engine, loop, self.deliver, self.failed, ranks)
        self.thread.start()

    def deliver(self, news: list) -> None:
        # One time for a step: its tokens were made together.
        now = time.monotonic()
        for wish, said in news:
            wish.chat.events.put_nowait((wish, said))
            if said is not True and getattr(said, "token", None) is not None:
                self.metrics.token(wish.chat, now)

    def failed(self, failure: str) -> None:
        """The engine is lost, and all answers with it: the process ends, so that its keeper starts anew."""
        log(f"error: the engine failed: {failure}")
        self.failure = failure
        # Nothing more is taken, and whoever waits is told.
        self.seats.draining = self.server.should_exit = True
        for chat in self.chats:
            for wish in chat.wishes:
                error = engine.Event(wish, None, finish="error", error="the engine failed")
                chat.events.put_nowait((wish, error))

    def prepare(self, content: bytes) -> tuple[Wanted, dict, str | None]:
        """A body -> what it asks for, and its prompt. In a worker thread: it decodes, and may fetch."""
        wanted = read_wanted(content, self.limits, self.limits.defaults, self.processor.config.vocab_size)
        if wanted.model not in (self.name, *self.limits.adapters):
            message = f"there is no model {terminal.cut(wanted.model)}; this server has {self.names()}"
            raise Refused(404, message, "model", "model_not_found")
        # From here a chat is a record like any other: the model's own wording, its own image tokens.
        conversation = records.Conversation("0", wanted.turns, "chat", "messages", [], "request")
        place = "messages"
        try:
            with records.one_record("the request"):
                prompt = self.processor.prompt(conversation)
                prompt["begun"] = self.go_on(prompt, wanted.begun) if wanted.begun else []
                prompt["pixel_values"] = []
                sources = prompt["images"]  # the last ones, where the model's window has dropped old turns
                for where, source in zip(wanted.places[-len(sources) :], sources, strict=False):
                    place = where
                    prompt["pixel_values"].append(self.pixels_of(source))
        except records.BadRecord as e:
            raise Refused(400, e.reason, place) from None
        return wanted, prompt, wanted.model if wanted.model in self.limits.adapters else None

    def pixels_of(self, source: str) -> torch.Tensor:
        """An image's pixels, once for all rounds of a chat: each sends its images again. Several workers may
        be here at once: then one more is opened, or kept for a moment."""
        # By a hash: a data URL may have megabytes, and keys are kept.
        key = hashlib.sha256(source.encode()).digest()
        pixels = self.opened.pop(key, None)
        self.opened[key] = pixels = self.processor.load_image(source) if pixels is None else pixels
        if len(self.opened) > KEPT_IMAGES:
            self.opened.popitem(last=False)
        return pixels

    def go_on(self, prompt: dict, text: str) -> list[int]:
        """Puts the beginning of an answer behind the prompt -> its ids."""
        if self.engine.model.encoder_decoder:
            raise ValueError("continue_final_message: an encoder-decoder does not go on; leave it out")
        ids = self.processor.answer_ids(text)
        prompt["input_ids"] = np.append(prompt["input_ids"], ids)
        # The answer goes on as if the model had made its beginning: its positions, its marks.
        if "position_ids" in prompt:
            given, step = prompt["position_ids"], np.asarray(self.engine.model.position_step)
            later = given[..., -1:] + step * np.arange(1, len(ids) + 1)
            prompt["position_ids"] = np.concatenate((given, later), -1)
        if "seen" in prompt:
            prompt["seen"] = [*prompt["seen"], *ids]
        return ids

    def names(self) -> str:
        return ", ".join([self.name, *self.limits.adapters])

    def models(self) -> list[dict]:
        ours = {asked: getattr(self.limits.defaults, name) for asked, name in DECODING.items()}
        ours.pop("seed")  # each time another one
        common = {"object": "model", "created": self.created, "owned_by": "trimix", "root": self.name}
        common |= {"defaults": ours, "image_tokens": self.processor.num_image_tokens}
        parents = [(self.name, None), *((name, self.name) for name in self.limits.adapters)]
        return [{"id": name, **common, "parent": parent} for name, parent in parents]

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.models()})

    async def one_model(self, request: Request) -> Response:
        for model in self.models():
            if model["id"] == request.path_params["name"]:
                return JSONResponse(model)
        message = f"there is no such model; this server has {self.names()}"
        raise Refused(404, message, "model", "model_not_found")

    async def health(self, request: Request) -> Response:
        if self.seats.draining:
            raise Refused(503, "the engine failed" if self.failure else "the server is shutting down")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        gauges = {"num_requests_running": self.engine.running, "num_requests_waiting": self.engine.waiting}
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        if not PAGE.is_file():
            raise Refused(404, "there is no chat.html beside serve.py; the API is at /v1")
        content = PAGE.read_bytes()
        return Response(content, media_type="text/html; charset=utf-8", headers=page_headers(content))

    def app(self):
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", ChatCompletions(self), methods=["POST"]),
        ]
        handlers = {Refused: refused, HTTPException: not_found}
        app = Front(Starlette(routes=routes, exception_handlers=handlers), self)
        if self.limits.cors:  # outermost: errors have its headers too
            options = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
            exposed = ["x-request-id", "retry-after"]
            app = CORSMiddleware(app, self.limits.cors, expose_headers=exposed, **options)
        return app


def error_response(error: Refused) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def refused(request: Request, error: Refused) -> Response:
    return error_response(error)


async def not_found(request: Request, error: HTTPException) -> Response:
    what = {404: "there is no such route", 405: "this route does not take that method"}
    message = what.get(error.status_code, str(error.detail))
    return error_response(Refused(error.status_code, message, **(error.headers or {})))


def page_headers(content: bytes) -> dict[str, str]:
    """The page may run its own script and style, known by their hashes, and talk to this server alone."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%b[^>]*>(.*?)</%b>" % (tag, tag), content, re.S | re.I)
        digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    # What a model writes is shown as text; should a tag slip through, it cannot run or call home.
    policy = f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
    policy += "connect-src 'self'; img-src 'self' data: blob:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


class Front:
    """Around all routes: the request's id, host and key, a line of the log. No exception leaves it."""

    OPEN = ("/", "/health")  # without a key

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # A proxy's id is kept, so that both logs name the request alike; nothing else gets into the log.
        given = headers.get(b"x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,128}", given) else f"req-{secrets.token_hex(12)}"
        began, status = time.monotonic(), None

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self.check(scope["path"], headers)
            await self.app(scope, receive, answer)
        except Refused as e:
            await error_response(e)(scope, receive, answer)
        except ClientDisconnect:
            status = 499  # as nginx names it
        except Exception as e:
            log(f"error: {request_id}: {where_from(e)}")
            if status is None:
                failure = Refused(500, "the server failed; its log has the place")
                await error_response(failure)(scope, receive, answer)
        if scope["path"].startswith("/v1/chat"):
            tokens = ""
            if chat := scope.get("chat"):
                usage = chat.usage()
                tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
            log(f"{request_id} {status}{tokens}, {1000 * (time.monotonic() - began):.0f} ms")

    def check(self, path: str, headers: dict[bytes, str]) -> None:
        service = self.service
        if path not in self.OPEN and service.limits.key:
            kind, _, key = headers.get(b"authorization", "").partition(" ")
            # Hashes, in constant time: neither length nor beginning of the key can be measured.
            found = hashlib.sha256(key.strip().encode("latin-1")).digest()
            if not hmac.compare_digest(found, service.limits.key) or kind.lower() != "bearer":
                message = "expected the header Authorization: Bearer KEY with this server's key"
                raise Refused(401, message, None, "invalid_api_key", www_authenticate="Bearer")
        host = re.sub(r":\d*$", "", headers.get(b"host", "localhost")).lower()
        local = is_local(service.limits.host) and not service.limits.key
        if local and host not in ("localhost", "127.0.0.1", "[::1]", service.limits.host):
            # a page of another site whose name was turned to this address
            message = "this server is for its own machine: the Host must be localhost; or set --api_key"
            raise Refused(403, message)


def is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


class Server(uvicorn.Server):
    """uvicorn that lets running answers end first, while /health says that it goes; a second signal ends it
    at once."""

    service: Service = None
    patience = 30.0  # seconds

    def handle_exit(self, sig, frame) -> None:
        if self.service.seats.draining:
            self.should_exit = self.force_exit = True
        else:
            self.service.seats.draining = True
            self.service.thread.loop.call_soon_threadsafe(self.service.thread.loop.create_task, self.drain())

    async def drain(self) -> None:
        log(f"shutting down: {self.service.seats.open} answers run, {self.patience:g} s at most")
        until = time.monotonic() + self.patience
        while self.service.seats.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.should_exit = True


# ---- the command


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="qwen_vl", help="whose samples/tiny_* to use if no checkpoint is named")
    add("--model_name_or_path", default="tiny", help="checkpoint directory; tiny: the one in samples/")
    lora = "adapters, NAME=DIR, that requests name as their model"
    add("--lora_paths", nargs="+", default=[], help=lora)
    add("--served_model_name", default=None, help="the base's name; default: its directory's")
    add("--host", default="127.0.0.1", help="0.0.0.0: reached from other machines (set --api_key then)")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--api_key", default=None, help="a key that clients must send; @FILE: the file's first line")
    add("--cors", nargs="*", default=None, help="origins whose pages may call; without a value: any")
    add("--image_hosts", nargs="+", default=[], help="hosts that images may be fetched from over https")
    add("--max_running", type=int, default=64, help="answers that are computed at the same time")
    queue = "answers that wait besides; one more gets status 429, and one address fills three quarters"
    add("--max_queue", type=int, default=256, help=queue)
    add("--step_tokens", type=int, default=2048, help="of one forward pass")
    add("--cache_tokens", type=int, default=32768, help="whose keys and values are kept, of all requests")
    add("--max_body_mb", type=int, default=20)
    add("--max_images", type=int, default=16, help="in one request")
    add("--max_image_pixels", type=int, default=25_000_000)
    Decoding.add_arguments(parser)
    degree = "processes (torchrun --nproc_per_node N) that hold the model together; the first one serves"
    add("--tensor_parallel_degree", type=int, default=1, help=degree)
    add("--dtype", default=None, choices=generate.DTYPES, help=generate.DTYPE_HELP)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    bits = "weights of the language model's blocks in 8 or 4 bits"
    add("--quantize", default=None, choices=KINDS, help=bits)
    kernels = "Triton kernels; auto: where there is a GPU"
    add("--use_flash_attention", default="auto", choices=("auto", "true", "false"), help=kernels)
    return check_arguments(parser.parse_args(argv))


def check_arguments(args) -> argparse.Namespace:
    """The arguments with `defaults` (a Decoding), `adapters` {name: directory} and `key`. ValueError for what
    cannot be."""
    above_zero = "max_running", "step_tokens", "cache_tokens", "max_body_mb", "max_images", "max_image_pixels"
    for name in above_zero:
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}; expected 1 or more")
    if args.max_queue < 0 or not 0 <= args.port < 65536:
        raise ValueError(f"max_queue={args.max_queue}, port={args.port}; expected 0 or more, and 0 to 65535")
    args.adapters = {}
    for one in args.lora_paths:
        name, _, directory = one.partition("=")
        if not re.fullmatch(NAME, name) or not directory or name in args.adapters:
            raise ValueError(f"lora_paths: {one!r}; expected NAME=DIR, each name once")
        args.adapters[name] = directory
    if args.served_model_name is not None and not re.fullmatch(NAME, args.served_model_name):
        raise ValueError(f"served_model_name={args.served_model_name!r}; expected letters, digits and .:/-_")
    key = args.api_key
    if key is not None and key.startswith("@"):
        key = Path(key[1:]).read_text(encoding="utf-8").partition("\n")[0]
    if key is not None and not key.strip():
        raise ValueError("api_key is empty; leave it out, or give a key")
    args.key = key and hashlib.sha256(key.strip().encode()).digest()
    args.cors = ["*"] if args.cors == [] else args.cors
    for key, form in (("cors", r"\*|null|[\w+.-]+://[^/\s]+"), ("image_hosts", r"[\w.-]+")):
        if wrong := [one for one in getattr(args, key) or () if not re.fullmatch(form, one)]:
            forms = {"cors": "https://HOST[:PORT], null or *", "image_hosts": "HOST"}
            raise ValueError(f"{key}: {wrong[0]!r} would match nothing; expected {forms[key]}")
    args.defaults = Decoding(**{f.name: getattr(args, f.name) for f in fields(Decoding)})
    generate.check_degree("serve.py", args.tensor_parallel_degree)
    if args.tensor_parallel_degree > 1 and (args.quantize or args.adapters):
        given = f"quantize={args.quantize}" if args.quantize else "lora_paths"
        raise ValueError(
            f"tensor_parallel_degree={args.tensor_parallel_degree} with {given} is not supported; "
            "use 1, or merge the adapter (python merge.py) and serve the result"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench_serve.main(argv[1:])
    args = arguments(argv)
    if args.tensor_parallel_degree == 1:
        listening = listen(args.host, args.port)  # before a model is loaded for a port that is taken
        return serve(open_service(args), listening)
    world = parallel.init_world(args.tensor_parallel_degree)
    args.device = str(world.device)
    try:
        if not world.main:
            return follow(open_service(args, world).engine)
        listening = listen(args.host, args.port)
        return serve(open_service(args, world), listening)
    finally:
        parallel.leave_world()


def listen(host: str, port: int) -> socket.socket:
    try:
        # IPv6 too; and a backlog for a burst of clients that no accept() has seen yet.
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as e:
        raise ValueError(
            f"cannot listen at {host}:{port} ({e.strerror or e}); give another --host or --port"
        ) from None


def open_service(args, world: parallel.World | None = None) -> Service:
    """The model in an engine, and what is around it; in a tensor-parallel `world` on all ranks."""
    generate.check_device(args.device)
    kernels = dispatch.use_flash_attention(args.use_flash_attention, args.device)
    directory = data.model_directory(args.model, args.model_name_or_path)
    name = args.served_model_name or re.sub(r"[^\w.-]", "_", Path(directory).resolve().name)
    if name in args.adapters:
        raise ValueError(f"{name!r} is the name of the model and of an adapter; give --served_model_name")
    for adapter in args.adapters.values():
        lora.say_base(adapter, args.quantize)
        weights = checkpoint.open_model(directory, vlm.find(checkpoint.read_config(directory)))
        lora.check_base(adapter, weights)
    processor = data.load_processor(directory)
    args.dtype = args.dtype or generate.default_dtype(directory, args.device)
    model = generate.load_as_asked(directory, processor, args.dtype, args.device, args.quantize, world=world)
    sizes = {name: getattr(args, name) for name in ("step_tokens", "cache_tokens", "max_running")}
    engine_of_all = engine.Engine(model, processor, args.adapters, **sizes)
    if world is None or world.main:
        graphs = ", decoding steps from CUDA graphs" if engine_of_all.graphs else ""
        print(f"device {args.device}, kernels: {kernels}{graphs}", file=sys.stderr)
    pack(model)  # behind the adapters, which may hold a whole weight in place of the base's
    return Service(engine_of_all, processor, name, args)


def serve(service: Service, listening: socket.socket) -> int:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # its messages may quote a request
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked here
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is a file
    most = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    options = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off", "access_log": False}
    config = uvicorn.Config(
        service.app(), log_level="critical", server_header=False, timeout_graceful_shutdown=2, **options
    )
    server = Server(config)
    server.service, service.server = service, server

    async def whole_life() -> None:
        # The loop must run before the engine's thread has anything to tell it.
        service.start(asyncio.get_running_loop())
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        key = "" if service.limits.key or is_local(host) else "; whoever reaches it can use it (no --api_key)"
        print(f"serving {service.names()} at http://{shown}:{port}{key}", file=sys.stderr, flush=True)
        await server.serve(sockets=[listening])

    asyncio.run(whole_life())
    service.thread.end()  # the interpreter's own end would meet it inside a step
    if service.failure:
        raise ValueError(f"the engine failed: {service.failure}")
    return 0


if __name__ == "__main__":
    terminal.leave(terminal.cli(main))
