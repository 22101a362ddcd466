"""The server: its answers are those of generate.py, no body breaks it, what is refused is named, and a place
that is left is free again."""

import base64
import contextlib
import copy
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import ranks
import torch
from PIL import Image
from test_blip2_train import T5, write_checkpoint

pytest.importorskip("starlette", reason="starlette is not installed (requirements-serve.txt)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (requirements-serve.txt)")

import bench_serve  # noqa: E402
import chat_body  # noqa: E402
import generate  # noqa: E402
import lora  # noqa: E402
import records  # noqa: E402
import serve  # noqa: E402
import vlm  # noqa: E402
from engine import Engine  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("qwen_vl", "blip2", "visualglm")
KINDS = (*MODELS, "t5")  # t5: BLIP-2 with an encoder-decoder
DIGIT, SHAPE = (ROOT / f"samples/images/{name}" for name in ("digits/0001.png", "flags/pd/ar.png"))


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def picture(path: Path = DIGIT) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(path), "detail": "low"}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def asked(question: str = "What digit is written here?", path: Path = DIGIT) -> list[dict]:
    return [{"role": "user", "content": [picture(path), text(question)]}]


class Client:
    """A server in a thread of this process, and requests to it."""

    def __init__(self, model: str = "qwen_vl", *options: str):
        base = ["--model", model] if model in MODELS else ["--model_name_or_path", model]
        args = serve.arguments([*base, "--port", "0", "--device", "cpu", *options])
        listening = serve.listen(args.host, args.port)
        self.port = listening.getsockname()[1]
        self.service = serve.open_service(args)
        self.name = self.service.name
        self.code = None
        self.thread = threading.Thread(target=self.live, args=(listening,), daemon=True)
        self.thread.start()

    def live(self, listening):
        with contextlib.suppress(ValueError):  # a failed engine, which a test wants
            self.code = serve.serve(self.service, listening)

    def close(self):
        self.service.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def send(self, body, path="/v1/chat/completions", method="POST", **headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        return connection.getresponse()

    def ask(self, messages=None, **fields) -> dict:
        body = {"model": self.name, "messages": asked() if messages is None else messages, **fields}
        response = self.send(body)
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer

    def stream(self, messages=None, **fields) -> list[dict]:
        body = {"model": self.name, "messages": messages or asked(), "stream": True, **fields}
        response = self.send(body)
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.read().decode().split("\n\n") if line]
        assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
        return [json.loads(event[6:]) for event in events[:-1]]

    def get(self, path, **headers):
        response = self.send(None, path, "GET", **headers)
        return response.status, response.read().decode(), dict(response.getheaders())

    def until(self, condition, what: str):
        """Waits for what another thread does; only a fault takes the whole minute."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.005)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Servers of the tiny models, each started when it is first asked for."""
    started = {}

    def client(model="qwen_vl") -> Client:
        if model not in started:
            where = model
            if model == "t5":
                where = str(write_checkpoint(tmp_path_factory.mktemp("serve") / "t5", T5))
            started[model] = Client(where)
        return started[model]

    yield client
    for one in started.values():
        one.close()


@pytest.fixture(scope="module")
def client(clients):
    return clients()


@pytest.fixture
def small():
    """Starts servers with other options, and ends them."""
    started = []

    def start(*options: str, model: str = "qwen_vl") -> Client:
        started.append(Client(model, *options))
        return started[-1]

    yield start
    for one in started:
        one.close()


# ---- answers


def by_generate(service, requests: list[list[dict]], stop=(), **how) -> list[str]:
    """What generate.py --requests answers to the same messages."""
    conversations = []
    for messages in requests:
        (one,) = records.conversations_of({"messages": messages}, "test", "", 0, answered=False)
        conversations.append(one)
    alone = Engine(service.engine.model, service.processor, cache_tokens=0)
    with torch.no_grad():
        return generate.answer(alone, conversations, generate.Decoding(**how), list(stop))


def chats(model: str) -> list[list[dict]]:
    one = [
        asked(),
        asked("What is this?", SHAPE),
        asked("这是什么？", SHAPE),
        [
            {"role": "developer", "content": "Answer in one word."},
            *asked("Which country's flag is it?", SHAPE),
            {"role": "assistant", "content": "Argentina"},
            {"role": "user", "content": "Are you sure?"},
        ],
    ]
    if model != "qwen_vl":
        return one
    several = [{"role": "user", "content": [picture(), text("and"), picture(SHAPE), text("Compare them.")]}]
    return [*one, several, [{"role": "user", "content": "Hello, who are you?"}]]


@pytest.mark.parametrize("model", KINDS)
def test_answers_are_those_of_generate(clients, model):
    """Greedy and sampled, streamed and whole, all at the same time."""
    client, requests = clients(model), chats(model)
    sampling = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
    expected = by_generate(client.service, requests, max_new_tokens=24)
    sampled = [by_generate(client.service, [r], max_new_tokens=24, **sampling)[0] for r in requests]
    found = {}

    def ask(kind, n, fields):
        found[kind, n] = client.ask(requests[n], max_tokens=24, **fields)["choices"][0]["message"]["content"]

    def streamed(kind, n, fields):
        chunks = client.stream(requests[n], max_completion_tokens=24, **fields)
        found[kind, n] = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    threads = []
    for n in range(len(requests)):
        for kind, fields in (("greedy", {}), ("sampled", sampling)):
            threads.append(threading.Thread(target=ask, args=(kind, n, fields)))
            threads.append(threading.Thread(target=streamed, args=(f"{kind} stream", n, fields)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind, right in (("greedy", expected), ("sampled", sampled)):
        for way in (kind, f"{kind} stream"):
            assert [found[way, n] for n in range(len(requests))] == right
    assert any(expected) and expected != sampled


@pytest.mark.parametrize("model", KINDS)
def test_a_stream_is_the_whole_answer(clients, model):
    client = clients(model)
    fields = {"max_tokens": 40, "min_tokens": 40, "temperature": 1.5, "seed": 3, "n": 2}
    fields |= {"logprobs": True, "top_logprobs": 2}
    whole = client.ask(**fields)
    chunks = client.stream(stream_options={"include_usage": True}, **fields)
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 80
    prompt = whole["usage"].pop("prompt_tokens_details")
    assert (
        prompt.pop("cached_tokens") >= 0 and usage["usage"]["prompt_tokens_details"].pop("cached_tokens") > 0
    )
    assert {**whole["usage"], "prompt_tokens_details": prompt} == usage["usage"]
    assert prompt["image_tokens"] == client.service.processor.num_image_tokens
    assert {c["id"] for c in chunks} == {chunks[0]["id"]} and all(c["usage"] is None for c in chunks)
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:3]] == ["assistant", "assistant", None]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"] != ""
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1]["delta"] == {} and choice["finish_reason"] == "length"
        entries = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        expected = choice["logprobs"]["content"]
        assert [e["bytes"] for e in entries] == [e["bytes"] for e in expected] and len(entries) == 40
        for entry, other in zip(entries, expected, strict=True):
            assert entry["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert [top["bytes"] for top in entry["top_logprobs"]] == [
                top["bytes"] for top in other["top_logprobs"]
            ]
    first, second = whole["choices"]
    assert first["message"] != second["message"]  # its own draws


def test_chunks_never_split_a_character(client):
    """Chinese and emoji of several tokens each, forced by the bias."""
    ids = [i for text in "你好🙂é" for i in client.service.processor.tokenizer.encode(text)]
    assert len(ids) > 4
    bias = {str(i): 100 for i in ids}
    fields = {"logit_bias": bias, "max_tokens": 60, "min_tokens": 60, "temperature": 1.0, "seed": 1}
    whole = client.ask(**fields)["choices"][0]["message"]["content"]
    pieces = [c["choices"][0]["delta"].get("content", "") for c in client.stream(**fields)]
    assert "".join(pieces) == whole and len([p for p in pieces if p]) > 3
    for n, piece in enumerate(pieces[:-2]):  # a broken character may stand inside, not at a piece's end
        assert not piece.endswith("\ufffd") or "".join(pieces[: n + 1]) == whole


def test_an_image_is_opened_once_for_all_rounds(client, monkeypatch):
    opened, load = [], client.service.processor.load_image
    monkeypatch.setattr(client.service.processor, "load_image", lambda s: (opened.append(s), load(s))[1])
    monkeypatch.setattr(serve, "KEPT_IMAGES", 2)
    client.service.opened.clear()
    paths = sorted((ROOT / "samples/images/flags/noto").glob("*.png"))[-3:]
    answers = [client.ask(asked("What is this?", p), max_tokens=4) for p in (*paths[:2], *paths[:2], *paths)]
    said = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert len(opened) == 3 and said[:2] == said[2:4] == said[4:6]
    client.ask(asked("What is this?", paths[0]), max_tokens=1)  # the third has taken its place
    assert len(opened) == 4


@pytest.mark.parametrize("model", KINDS)
def test_n_answers_are_n_draws_of_one_seed(clients, model):
    client, how = clients(model), {"temperature": 1.2, "seed": 5}
    answer = client.ask(n=3, max_tokens=12, **how)
    alone = Engine(client.service.engine.model, client.service.processor, cache_tokens=0)
    (conversation,) = records.conversations_of({"messages": asked()}, "test", "", 0, answered=False)
    expected = []
    for id in "012":
        conversation.id = id
        expected += generate.answer(alone, [conversation], generate.Decoding(max_new_tokens=12, **how))
    assert [c["message"]["content"] for c in answer["choices"]] == expected
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    free = {"temperature": 2, "max_tokens": 12, "min_tokens": 12}  # without a seed each time another one
    assert len({client.ask(**free)["choices"][0]["message"]["content"] for _ in range(4)}) > 1


@pytest.mark.parametrize("model", KINDS)
def test_beams(clients, model):
    client, how = clients(model), {"num_beams": 3, "length_penalty": 0.5}
    (text,) = by_generate(client.service, [asked()], max_new_tokens=12, min_new_tokens=4, **how)
    fields = {"max_tokens": 12, "min_tokens": 4, **how}
    assert client.ask(**fields)["choices"][0]["message"]["content"] == text
    chunks = client.stream(**fields)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
    greedy = client.ask(max_tokens=12, min_tokens=4)["choices"][0]["message"]["content"]
    assert text != greedy


def test_a_stop_text_is_never_shown(client):
    fields = {"max_tokens": 60, "min_tokens": 60, "temperature": 1.0, "seed": 2}
    whole = client.ask(**fields)["choices"][0]["message"]["content"]
    stop = whole[9:24]  # of several tokens: its beginning must be held back
    cut = whole[: whole.index(stop)].strip()
    answer = client.ask(stop=["never there", stop], logprobs=True, **fields)
    assert answer["choices"][0]["message"]["content"] == cut
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 60
    chunks = client.stream(stop=stop, **fields)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == cut
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_is_gone_on_with(clients, model):
    """From a half of it, the other half: also where a blank stands between them."""
    client, fields = clients(model), {"min_tokens": 24, "logit_bias": {}}
    whole = client.ask(max_tokens=24, logprobs=True, **fields)["choices"][0]
    entries, processor = whole["logprobs"]["content"], client.service.processor
    text, tried = whole["message"]["content"], 0
    for half in range(6, 18):
        begun = bytes(b for e in entries[:half] for b in e["bytes"]).decode("utf-8", "replace").strip()
        if not text.startswith(begun) or len(processor.answer_ids(begun)) != half:
            continue  # its tokens would be others
        messages = [*asked(), {"role": "assistant", "content": begun}]
        more = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 24 - half}
        answer = client.ask(messages, **{**fields, "min_tokens": 24 - half}, **more)
        assert begun + answer["choices"][0]["message"]["content"] == text
        assert answer["usage"]["completion_tokens"] == 24 - half
        tried += 1
    assert tried > 1


def test_an_encoder_decoder_does_not_go_on(clients):
    client = clients("t5")
    messages = [*asked(), {"role": "assistant", "content": "A"}]
    response = client.send({"model": client.name, "messages": messages, "continue_final_message": True})
    assert response.status == 400 and "continue_final_message" in response.read().decode()


@pytest.mark.parametrize("model", KINDS)
def test_log_probabilities(clients, model):
    client = clients(model)
    answer = client.ask(logprobs=True, top_logprobs=3, max_tokens=16)
    entries = answer["choices"][0]["logprobs"]["content"]
    shown = answer["choices"][0]["message"]["content"]
    assert bytes(b for e in entries for b in e["bytes"]).decode().strip() == shown != ""
    for entry in entries:
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] <= 0
        assert entry["logprob"] == best[0] and entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
    bare = client.ask(logprobs=True, max_tokens=4)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] and entry["logprob"] <= 0 for entry in bare)
    assert client.ask(max_tokens=4)["choices"][0]["logprobs"] is None


def test_bias_and_penalties_change_an_answer(client):
    plain = client.ask(max_tokens=8, logprobs=True)["choices"][0]
    token = client.service.processor.tokenizer.encode(plain["logprobs"]["content"][0]["token"])[0]
    banned = client.ask(max_tokens=8, logit_bias={str(token): -100})["choices"][0]["message"]["content"]
    assert plain["message"]["content"][0] not in banned
    fields = {"max_tokens": 40, "min_tokens": 40, "logit_bias": dict.fromkeys(map(str, range(100, 140)), 20)}
    kinds = {}
    for name in ("none", "presence_penalty", "frequency_penalty"):
        more = {} if name == "none" else {name: 2}
        entries = client.ask(logprobs=True, **fields, **more)["choices"][0]["logprobs"]["content"]
        kinds[name] = len({tuple(e["bytes"]) for e in entries})
    assert kinds["none"] < min(kinds["presence_penalty"], kinds["frequency_penalty"])


def test_what_a_server_sets_holds_where_a_request_does_not(small):
    client = small("--max_new_tokens", "3", "--min_new_tokens", "3")
    assert client.ask()["usage"]["completion_tokens"] == 3
    assert client.ask(max_tokens=5, min_tokens=5)["usage"]["completion_tokens"] == 5
    model = json.loads(client.get("/v1/models")[1])["data"][0]
    assert model["defaults"]["max_tokens"] == 3 and model["defaults"]["temperature"] == 0


# ---- bodies that are refused

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


BAD = [  # what is changed in a good body, the field that the error names
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"model": ["a"]}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": {"role": "user", "content": "x"}}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "images": ["/etc/passwd"]}]}, "messages[0].images"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x"}] * 2}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    (user(3), "messages[0].content"),
    (user(""), "messages[0].content"),
    (user(" \n"), "messages[0].content"),
    (user([]), "messages[0].content"),
    (user({"type": "text"}), "messages[0].content"),
    (user("\ud800"), "messages[0].content"),
    (user("<img>/etc/passwd</img> what?"), "messages[0].content"),
    (user("what is <image>?"), "messages[0].content"),
    (user("<img>"), "messages[0].content"),
    (user("</img>" * 200_000 + "<img>" * 200_000), "messages[0].content"),  # hours of a search for pairs
    (user("x" * 1_000_001), "messages"),
    (user(["text"]), "messages[0].content[0].type"),
    (user([{"type": "text"}]), "messages[0].content[0]"),
    (user([{"type": "text", "text": 3}]), "messages[0].content[0]"),
    (user([{"type": "text", "text": "<img>a.png</img>"}]), "messages[0].content[0].text"),
    (user([{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0].type"),
    (user([{"type": "text", "text": "q", "image_url": {"url": "data:,"}}]), "messages[0].content[0]"),
    (user([{"type": "image_url", "image_url": "data:,", "text": "q"}]), "messages[0].content[0]"),
    (
        user([{"type": "image_url", "image_url": {"url": "data:,", "min_pixels": 9}}]),
        "messages[0].content[0].image_url",
    ),
    (user([{"type": "file", "file": {"file_id": "x"}}]), "messages[0].content[0].type"),
    (user([{"image_url": "data:,"}]), "messages[0].content[0].type"),
    (user([{"type": "image_url"}]), "messages[0].content[0].image_url"),
    (user([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].image_url.url"),
    (user([{"type": "image_url", "image_url": {"url": 3}}]), "messages[0].content[0].image_url.url"),
    (user([{"type": "image_url", "image_url": [1]}]), "messages[0].content[0].image_url"),
    (
        user([{**IMAGE, "image_url": {"url": "x", "detail": "huge"}}]),
        "messages[0].content[0].image_url.detail",
    ),
    (user([text("x"), IMAGE]), "messages[0].content[1].image_url.url"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": [1]}, "stream_options"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [3]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"05": 1, "5": 2}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"num_beams": 17}, "num_beams"),
    ({"num_beams": 2, "temperature": 1}, "num_beams"),
    ({"num_beams": 2, "n": 2}, "n"),
    ({"num_beams": 2, "logprobs": True}, "logprobs"),
    ({"temprature": 1}, "temprature"),
    ({"continue_final_message": True}, "messages[0].role"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"continue_final_message": 1}, "continue_final_message"),
    ({"max_tokens": 60_000}, "messages"),  # no room in the cache
]


@pytest.mark.parametrize("change, param", BAD, ids=[json.dumps(change)[:60] for change, _ in BAD])
def test_bad_bodies_are_named(client, change, param):
    body = {"model": client.name, "messages": asked(), "max_tokens": 2, **change}
    response = client.send(body)
    error = json.loads(response.read())["error"]
    assert response.status == 400 and error["param"] == param, (response.status, error)
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500 and "\n" not in error["message"]
    assert param.partition("[")[0] in error["message"] or param == "messages"


def test_harmless_fields_are_taken(client):
    fields = {"user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "service_tier": "auto"}
    fields |= {"response_format": {"type": "text"}, "stop": None, "logit_bias": {}, "tool_choice": "auto"}
    assert client.ask(max_tokens=3, **fields)["choices"]
    assert client.ask(max_tokens=3, tools=[{"type": "function"}], tool_choice="none")["choices"]


NO_JSON = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000]


@pytest.mark.parametrize("content", NO_JSON, ids=[repr(c[:12]) for c in NO_JSON])
def test_what_is_no_object_is_refused(client, content):
    response = client.send(content)
    assert response.status == 400 and "body" in json.loads(response.read())["error"]["message"]


def test_unknown_models_and_routes(client):
    for body, status, code in (
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"model": ""}, 404, "model_not_found"),
    ):
        response = client.send({"model": client.name, "messages": asked(), **body})
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"], error["param"]) == (status, code, "model")
        assert client.name in error["message"]
    for path, method, status in (
        ("/v1/nothing", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/etc/passwd", "GET", 404),
    ):
        response = client.send(None, path, method)
        assert response.status == status and json.loads(response.read())["error"]["message"]


def mutated(body, rng: random.Random):
    """A copy with one to three places changed to something else of JSON, or gone, or doubled."""
    strange = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "x" * 300,
        "\ud800",
        "\0",
        [],
        {},
        [[]],
        {"a": {}},
        "NaN",
        0.5,
    ]
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        places, stack = [], [body]
        while stack:
            node = stack.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], dict | list):
                    stack.append(node[key])
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif kind == 2 and isinstance(node[key], str) and node[key]:
            cut = rng.randrange(len(node[key]))
            node[key] = (
                node[key][:cut]
                + rng.choice(["", "<img>", "\u202e", "é", "<|im_end|>"])
                + node[key][cut + 1 :]
            )
        else:
            node[key] = rng.choice(strange)
    return body


@pytest.mark.parametrize(
    "model, count", [("qwen_vl", 300), *(pytest.param(m, 2000, marks=pytest.mark.slow) for m in KINDS)]
)
def test_no_body_is_a_500(clients, model, count):
    client = clients(model)
    rng, statuses = random.Random(0), {}
    full = {
        "model": client.name,
        "messages": chats(model)[3],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    full |= {
        "stop": ["a", "b"],
        "seed": 1,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "logit_bias": {"5": 1},
    }
    full |= {"user": "u", "stream": False, "top_k": 5, "presence_penalty": 1, "metadata": {"k": "v"}}
    for _ in range(count):
        body = mutated(full, rng)
        response = client.send(body)
        content = response.read()
        if response.headers["content-type"].startswith("text/event-stream"):
            assert content.endswith(b"data: [DONE]\n\n"), (content, body)
            continue
        content = json.loads(content)
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert response.status in (200, 400, 404), (response.status, content, body)
        assert ("error" in content) == (response.status != 200)
    assert statuses[200] > 20 and statuses[400] > 100


# ---- images and addresses


def png(width: int, height: int, data: bytes = b"", before: tuple[bytes, bytes] = (b"tIME", b"")) -> str:
    """A PNG of any claimed size, with a chunk (its kind, its content) before its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(*before)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(content).decode()


def as_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"


def tiff() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "TIFF")
    return out.getvalue()


ATTACKS = {
    "path": "/etc/passwd",
    "relative": "samples/images/digits/0001.png",
    "file": f"file://{DIGIT}",
    "http": "http://127.0.0.1/x.png",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "https": "https://example.com/x.png",
    "decimal address": "https://2130706433/x.png",
    "hexadecimal address": "https://0x7f000001/x.png",
    "octal address": "https://0177.0.0.1/x.png",
    "user": "https://images.example@127.0.0.1/x.png",
    "backslash": "https://images.example\\@127.0.0.1/x.png",
    "ftp": "ftp://example.com/x.png",
    "gopher": "gopher://127.0.0.1:25/_x",
    "bad address": "https://[::1",
    "no base64": "data:image/png,hello",
    "other type": "data:text/html;base64,PGI+",
    "damaged base64": "data:image/png;base64,@@@@",
    "empty": "data:image/png;base64,",
    "bomb": png(60_000, 60_000),
    "large": png(9_000, 8_000),
    "no pixels": png(0, 5),
    "bomb of text": png(4, 4, before=(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
    "frame larger than its image": as_url(
        b"GIF89a" + struct.pack("<HHBBBBHHHHB", 4, 4, 0, 0, 0, 44, 0, 0, 65000, 65000, 0) + b"\2\2L\1\0;"
    ),
    "script first": as_url(b"GIF89a<script>alert(1)</script>" + bytes(99), "image/gif"),
    "document first": as_url(b"%PDF-1.4\n" + DIGIT.read_bytes()),
    "document's type": as_url(DIGIT.read_bytes(), "application/pdf"),
    "truncated": as_url(DIGIT.read_bytes()[:-200]),
    "eps": as_url(eps()),
    "tiff": as_url(tiff()),
    "svg": as_url(
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "image/svg+xml"
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_by_images_are_refused(client, monkeypatch, name):
    def nowhere(*args, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    body = {"model": client.name, "max_tokens": 2}
    body |= user([{"type": "image_url", "image_url": {"url": ATTACKS[name]}}, text("What?")])
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.sock = socket.socket()
    connection.sock.connect(("127.0.0.1", client.port))
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert response.status == 400 and error["param"].startswith("messages[0].content[0]"), error
    assert "root:" not in error["message"] and "No such file" not in error["message"]
    assert (error["code"] == "image_too_large") == (name in ("bomb", "large", "frame larger than its image"))


@pytest.mark.parametrize("kind", chat_body.FORMATS)
def test_every_format_is_taken(client, kind):
    """Of an animation its first image."""
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "green", "blue") * 20]
    several = {"save_all": True, "append_images": images[1:]} if kind in ("PNG", "GIF", "WEBP") else {}
    answers = []
    for options in ({}, several):
        out = io.BytesIO()
        images[0].save(out, kind, **options)
        content = [{"type": "image_url", "image_url": as_url(out.getvalue())}, text("What?")]
        answers.append(client.ask(user(content)["messages"], max_tokens=4)["choices"][0]["message"])
    assert answers[0] == answers[1]


def test_many_images_are_refused(client):
    response = client.send({"model": client.name, **user([picture()] * 17 + [text("What?")])})
    assert response.status == 400 and "16 images" in json.loads(response.read())["error"]["message"]


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff0e::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address, public):
    assert chat_body.is_public(address) == public


class Host(threading.Thread):
    """A host of images, of one answer a path."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self.listening.getsockname()[1], []
        self.start()

    def run(self):
        while True:
            connection, _ = self.listening.accept()
            with connection:
                path = connection.recv(65536).split()[1].decode()
                self.asked.append(path)
                content = DIGIT.read_bytes()
                if path == "/redirect":
                    head = "302 Found\r\nLocation: http://169.254.169.254/"
                    content = b""
                elif path == "/endless":
                    head, content = "200 OK", b"x" * 2_000_000
                else:
                    head = "200 OK"
                if path == "/slow":
                    time.sleep(1.5)
                with contextlib.suppress(OSError):
                    connection.sendall(f"HTTP/1.1 {head}\r\nConnection: close\r\n\r\n".encode() + content)


def test_images_of_allowed_hosts(monkeypatch):
    host, resolved = Host(), []

    class Plain(http.client.HTTPConnection):  # of TLS, Pinned's own, nothing is tested here
        def __init__(self, name, address, timeout):
            super().__init__(address, host.port, timeout=timeout)

        abort = chat_body.Pinned.abort

    real_resolve = socket.getaddrinfo

    def resolve(name, port, *args, **options):
        if name == "127.0.0.1":  # the connection's own
            return real_resolve(name, port, *args, **options)
        resolved.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[name], port))]

    addresses = {"images.example": "127.0.0.1", "inside.example": "10.0.0.1"}
    limits = serve.arguments(["--image_hosts", "images.example", "inside.example", "--max_body_mb", "1"])
    monkeypatch.setattr(chat_body, "Pinned", Plain)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    def fetch(url, **options):
        return chat_body.fetch_image(url, "here", limits, **options)

    with pytest.raises(chat_body.Refused, match="open internet"):  # 127.0.0.1
        fetch("https://images.example/a.png")
    with pytest.raises(chat_body.Refused, match="open internet"):
        fetch("https://inside.example/a.png")
    assert not host.asked
    real = chat_body.is_public
    monkeypatch.setattr(chat_body, "is_public", lambda address: address == "127.0.0.1" or real(address))
    resolved.clear()
    assert chat_body.images.read_bytes(fetch("https://images.example/a.png?b=c")) == DIGIT.read_bytes()
    assert resolved == ["images.example"] and host.asked == ["/a.png?b=c"]
    with pytest.raises(chat_body.Refused, match="302; redirects are not followed"):
        fetch("https://images.example/redirect")
    with pytest.raises(chat_body.Refused, match="more than 1 MB"):
        fetch("https://images.example/endless")
    with pytest.raises(chat_body.Refused, match="could not be fetched"):
        fetch("https://images.example/slow", seconds=0.2)
    for url in (
        "http://images.example/a.png",
        "https://images.example:8443/a.png",
        "https://images.example.evil/a.png",
        "https://evilimages.example/a.png",
    ):
        with pytest.raises(chat_body.Refused, match="not fetched"):
            fetch(url)
    for url in (
        "https://me@images.example/a.png",
        "https://evil.example#images.example",
        "https://IMAGES.example@evil.example/",
    ):
        with pytest.raises(chat_body.Refused, match="not fetched"):
            fetch(url)
    assert len(host.asked) == 4


# ---- load and ends

LONG = {"max_tokens": 3000, "min_tokens": 3000}


def leave(response: http.client.HTTPResponse) -> None:
    """Goes away without a word."""
    response.fp.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    response.fp.raw._sock.close()
    response.close()


def test_a_client_that_goes_frees_its_places(client):
    engine, seats = client.service.engine, client.service.seats
    client.until(lambda: not seats.open, "places are taken before the test")
    response = client.send({"model": client.name, "messages": asked(), "stream": True, "n": 3, **LONG})
    assert b"assistant" in response.readline()
    client.until(lambda: engine.running == 3, "three answers run")
    leave(response)
    client.until(lambda: engine.running == engine.waiting == seats.open == 0, "the places are free")
    body = json.dumps({"model": client.name, "messages": asked(), **LONG}).encode()  # not a stream
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        plain.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        client.until(lambda: engine.running == 1, "an answer runs")
    client.until(lambda: engine.running == seats.open == 0, "its place is free")
    assert client.ask(max_tokens=3)["choices"]
    assert (
        'request_success_total{model_name="tiny_qwen_vl",finished_reason="abort"}'
        in client.get("/metrics")[1]
    )


def test_a_full_queue_answers_429(small):
    client = small("--max_running", "2", "--max_queue", "2")
    running = [
        client.send({"model": client.name, "messages": asked(), "stream": True, **LONG}) for _ in range(2)
    ]
    client.until(lambda: client.service.engine.running == 2, "two answers run")
    body = {"model": client.name, "messages": asked(), "n": 3}
    response = client.send(body)  # one finds a place, three don't
    assert response.status == 429 and json.loads(response.read())["error"]["code"] == "queue_full"
    statuses, lock = [], threading.Lock()

    def ask():
        response = client.send({"model": client.name, "messages": asked(), "max_tokens": 2})
        with lock:
            statuses.append((response.status, response.headers.get("retry-after")))
        response.read()

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    client.until(lambda: len(statuses) == 28, "all but the two that wait are sent away")
    assert all(status == 429 and 1 <= int(after) <= 60 for status, after in statuses)
    for response in running:
        leave(response)
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in statuses) == [200] * 2 + [429] * 28
    client.until(lambda: client.service.seats.open == 0, "all places are free")


def test_one_address_leaves_places_for_others(small):
    client = small("--max_running", "1", "--max_queue", "4")
    body = json.dumps({"model": client.name, "messages": asked(), "stream": True, **LONG})

    def ask(address: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(
            "127.0.0.1", client.port, timeout=300, source_address=(address, 0)
        )
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        except OSError as e:
            pytest.skip(f"no second address here: {e}")
        return connection.getresponse()

    waiting = [ask("127.0.0.1") for _ in range(4)]
    response = ask("127.0.0.1")
    assert response.status == 429 and "of yours" in json.loads(response.read())["error"]["message"]
    waiting.append(ask("127.0.0.2"))
    assert [r.status for r in waiting] == [200] * 5
    response = ask("127.0.0.3")
    assert response.status == 429 and "of yours" not in json.loads(response.read())["error"]["message"]
    for response in waiting:
        leave(response)
    client.until(lambda: not client.service.seats.open and not client.service.seats.of, "places are free")


def test_a_large_body_is_not_kept(small):
    client = small("--max_body_mb", "1")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(f"{head}Content-Length: 2000000\r\n\r\n".encode())
        assert plain.recv(1000).startswith(b"HTTP/1.1 413")  # before a byte of it
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(30):
            plain.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert plain.recv(1000).startswith(b"HTTP/1.1 413")
    response = client.send(b" " * 3_000_000)  # a client that sends all before it reads sees why
    assert response.status == 413 and "1 MB" in json.loads(response.read())["error"]["message"]
    client.until(lambda: client.service.seats.open == 0, "all places are free")


def command(*options: str, **more) -> tuple[subprocess.Popen, int]:
    """serve.py as one starts it, and its port."""
    line = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--device", "cpu", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, **more
    )
    for text in process.stderr:
        if match := re.match(r"serving .* at http://127.0.0.1:(\d+)", text):
            return process, int(match[1])
    raise AssertionError(f"it ended with {process.wait()}")


def test_sigterm_lets_answers_end_and_the_log_tells_nothing():
    process, port = command("--api_key", "secret-key-1")
    client = Client.__new__(Client)
    client.port, client.name = port, "tiny_qwen_vl"
    key = {"Authorization": "Bearer secret-key-1"}
    try:
        body = {"model": client.name, "messages": asked("unrepeatable words"), "stream": True}
        response = client.send({**body, "max_tokens": 400, "min_tokens": 400}, **key)
        assert b"assistant" in response.readline()
        bad = client.send({"model": client.name, "messages": "unrepeatable too"}, **key)
        assert bad.status == 400 and bad.read()
        process.send_signal(signal.SIGTERM)
        client.until(lambda: client.get("/health")[0] == 503, "/health says that it goes")
        late = client.send(body, **key)
        assert late.status == 503 and json.loads(late.read())["error"]["type"] == "server_error"
        rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "unrepeatable" not in out + err and "secret" not in out + err and "base64" not in out + err
    statuses = re.findall(r"^\d\d:\d\d:\d\d req-\w+ (\d+)", err, re.M)
    assert sorted(statuses) == ["200", "400", "503"], err


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_serve_one_model(clients, model):
    """Greedy, sampled, beams and given up, as one process answers; SIGTERM ends both."""
    whole = clients(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", model, "--port", str(port), "--device", "cpu", "--tensor_parallel_degree", "2"]
    processes = ranks.start(ranks.script, serve.main, options, world=2)
    parts = Client.__new__(Client)
    parts.port, parts.name = port, whole.name

    def serves() -> bool:
        assert all(p.exitcode is None for p in processes), "a rank ended; it said why"
        with contextlib.suppress(OSError):
            return parts.get("/health")[0] == 200
        return False

    try:
        whole.until(serves, "the ranks serve")
        left = parts.send({"model": parts.name, "messages": asked(), "stream": True, "n": 2, **LONG})
        assert b"assistant" in left.readline()
        hot = {"temperature": 1.5, "seed": 7, "n": 2, "top_k": 40, "repetition_penalty": 1.1}
        for how in ({}, hot, {"num_beams": 2}):
            ours, theirs = (one.ask(max_tokens=16, min_tokens=16, **how) for one in (parts, whole))
            assert [c["message"] for c in ours["choices"]] == [c["message"] for c in theirs["choices"]]
        leave(left)
        assert parts.ask(asked("这是什么？", SHAPE), max_tokens=4)["choices"]
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        codes = ranks.exit_codes(processes)
    assert codes == [0, 0]


def test_a_lost_engine_ends_the_server(small):
    client = small()
    running = client.send({"model": client.name, "messages": asked(), "stream": True, **LONG})
    assert b"assistant" in running.readline()
    client.until(lambda: client.service.engine.running == 1, "an answer runs")
    client.service.engine.step = broken
    rest = running.read().decode()  # its client is told
    assert (
        "[DONE]" not in rest
        and json.loads(rest.strip().splitlines()[-1][6:])["error"]["type"] == "server_error"
    )
    client.thread.join(60)
    assert client.code is None and client.service.failure.startswith("ZeroDivisionError at test_serve.py")


def broken(*args):
    return 1 // 0


# ---- who may ask


def test_a_key_is_needed_but_for_health_and_the_page(small, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("correct horse\nanother line\n")
    (tmp_path / "chat.html").write_text("<script>go()</script><style>b{}</style>")
    monkeypatch.setattr(serve, "PAGE", tmp_path / "chat.html")
    client = small("--api_key", f"@{tmp_path / 'key'}")
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "correct horse"},
        {"Authorization": "Bearer "},
    ):
        for path in ("/v1/models", "/metrics", "/v1/models/x", "/anything"):
            status, body, found = client.get(path, **headers)
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
            assert found["www-authenticate"] == "Bearer"
        assert client.send({"model": client.name, "messages": asked()}, **headers).status == 401
    assert client.get("/health")[0] == 200 and client.get("/")[0] == 200
    assert client.get("/v1/models", Authorization="Bearer correct horse")[0] == 200


def test_pages_of_other_sites_are_kept_out(client, small):
    assert client.send({"model": client.name, "messages": asked()}, Content_Type="text/plain").status == 415
    assert client.get("/v1/models", Host="evil.example:8000")[0] == 403  # a name that was turned to 127.0.0.1
    assert client.get("/v1/models", Host="localhost:1")[0] == 200
    assert "access-control-allow-origin" not in client.get("/v1/models", Origin="https://evil.example")[2]
    open_to = small("--cors", "https://good.example")
    for path in ("/v1/models", "/nothing"):
        assert open_to.get(path, Origin="https://good.example")[2]["access-control-allow-origin"]
        assert "access-control-allow-origin" not in open_to.get(path, Origin="https://evil.example")[2]


def test_the_page_has_a_strict_policy(client, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "PAGE", tmp_path / "chat.html")
    assert client.get("/")[0] == 404
    (tmp_path / "chat.html").write_text("<!doctype html><style>b{}</style><script>go()</script>")
    status, body, headers = client.get("/")
    assert status == 200 and "go()" in body and headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    digest = base64.b64encode(__import__("hashlib").sha256(b"go()").digest()).decode()
    assert policy["default-src"] == "'none'" and policy["script-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in headers["content-security-policy"]


def test_models_health_metrics_and_ids(client):
    models = json.loads(client.get("/v1/models")[1])
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == [client.name]
    assert json.loads(client.get(f"/v1/models/{client.name}")[1]) == models["data"][0]
    assert client.get("/v1/models/other")[0] == 404 and client.get("/health")[0] == 200
    client.ask(max_tokens=4, min_tokens=4)
    metrics = client.get("/metrics")[1]
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "generation_tokens_total",
        "prompt_tokens_total",
    ):
        assert re.search(rf'^vllm:{name}{{model_name="{client.name}"}} \d', metrics, re.M), name
    count = re.search(r"vllm:time_to_first_token_seconds_count\{.*\} (\d+)", metrics)[1]
    last = re.search(r'vllm:time_to_first_token_seconds_bucket\{.*le="\+Inf"\} (\d+)', metrics)[1]
    assert int(count) == int(last) > 0
    assert client.get("/health", X_Request_Id="mine-1")[2]["x-request-id"] == "mine-1"
    made = client.get("/nothing", X_Request_Id="bad id\t")[2]["x-request-id"]
    assert re.fullmatch(r"req-\w+", made)


# ---- adapters, the command


def random_adapter(model: str, directory: Path, seed: int) -> str:
    """An adapter of the tiny model that changes its answers."""
    base = ROOT / f"samples/tiny_{model}"
    adapted = generate.load_model(base)
    names = lora.inject(adapted, vlm.find(adapted.config.raw).lora_targets, 4, 8, 0.0)
    parameters, random_numbers = dict(adapted.named_parameters()), torch.Generator().manual_seed(seed)
    for name in names:
        for side in "AB":
            parameters[f"{name}.lora_{side}.weight"].data.normal_(0, 0.3, generator=random_numbers)
    directory.mkdir()
    read = lambda name: parameters[name].detach()  # noqa: E731
    lora.save_adapter(directory, adapted, lora.LoraConfig(str(base), 4, 8), names, [], read)
    return str(directory)


@pytest.mark.parametrize("model", MODELS)
def test_adapters_beside_the_base(small, tmp_path, model):
    """Each name answers as generate.py --lora_path does, base and adapters in one batch."""
    paths = {name: random_adapter(model, tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    client = small("--lora_paths", *(f"{name}={path}" for name, path in paths.items()), model=model)
    assert [m["id"] for m in json.loads(client.get("/v1/models")[1])["data"]] == [client.name, "a", "b"]
    assert json.loads(client.get("/v1/models/a")[1])["parent"] == client.name
    fields, found = {"max_tokens": 12, "min_tokens": 12}, {}

    def ask(name):
        found[name] = client.ask(model=name, **fields)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(name,)) for name in (client.name, "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    processor = client.service.processor
    (conversation,) = records.conversations_of({"messages": asked()}, "test", "", 0, answered=False)
    how = generate.Decoding(max_new_tokens=12, min_new_tokens=12)
    for name in (client.name, "a", "b"):
        alone = generate.load_model(ROOT / f"samples/tiny_{model}", lora_path=paths.get(name))
        (text,) = generate.answer(Engine(alone, processor, cache_tokens=0), [conversation], how)
        assert found[name] == text
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lora_paths", "output"], ["lora_paths", "NAME=DIR"]),
        (["--lora_paths", "a=x", "a=y"], ["a=y", "once"]),
        (["--lora_paths", "tiny_qwen_vl=x"], ["served_model_name"]),
        (["--served_model_name", 'a"b'], ["served_model_name"]),
        (["--api_key", ""], ["api_key"]),
        (["--api_key", "@nowhere"], ["nowhere"]),
        (["--max_running", "0"], ["max_running=0"]),
        (["--cors", "null", "a.example"], ["cors: 'a.example' would match nothing", "https://HOST"]),
        (["--image_hosts", "https://a.example"], ["image_hosts: 'https://a.example'", "expected HOST"]),
        (["--tensor_parallel_degree", "2"], ["tensor_parallel_degree=2", "torchrun", "serve.py"]),
        (["--port", "70000"], ["port=70000"]),
        (["--host", "no such host"], ["no such host"]),
        (["--model", "qwen"], ["qwen", "qwen_vl"]),
        (["--temperature", "-1"], ["temperature=-1"]),
        (["--num_beams", "3", "--temperature", "1"], ["num_beams=3", "temperature"]),
        (["--modle", "x"], ["--modle", "--model"]),
        (["bench", "x"], ["url='x'"]),
        (["bench", "http://127.0.0.1:9/"], ["127.0.0.1:9"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_the_command_line_says_what_is_wrong(options, words):
    with pytest.raises((ValueError, OSError)) as error:
        serve.main(options if options[0] == "bench" else ["--port", "0", *options])
    for word in words:
        assert word in str(error.value)


def test_a_taken_port_is_said_before_the_model_loads(client):
    with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{client.port} .*--port"):
        serve.main(["--port", str(client.port), "--model_name_or_path", "nowhere"])


def test_bench_measures_a_server(client, capsys):
    url = f"http://127.0.0.1:{client.port}"
    common = [url, "--num_requests", "6", "--max_tokens", "8", "--image", str(DIGIT)]
    for load in (["--concurrency", "3"], ["--rate", "50"]):
        assert bench_serve.main([*common, *load]) == 0
        out = capsys.readouterr().out
        assert "6 of 6 answered" in out and re.search(r"first token +\d+\.\d +\d+\.\d +\d+\.\d\n", out)
    assert bench_serve.main([*common, "--model_name", "other"]) == 1
    assert "6 failed, the first: status 404" in capsys.readouterr().err
