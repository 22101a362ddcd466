"""A body of POST /v1/chat/completions: what it may hold, and its images.

    wanted = read_wanted(b'{"messages": [...]}', limits, Decoding(), vocab_size)   # Refused names the field

A field is understood, or has no effect on an answer, or is refused by name. Images are data URLs, or come
over https from hosts that the server's command line names; a text or an address never opens a file.
limits: max_images, max_image_pixels, max_body_mb, image_hosts. Sources: OpenAI's API reference; the names of
what it lacks (top_k, min_tokens, repetition_penalty, ...) are vLLM's.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import math
import re
import secrets
import socket
import ssl
import threading
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from PIL import Image

import images
import record_files
import records
import terminal
from generate import Decoding

NUMBERS = {  # field -> (type, least, most)
    "max_tokens": (int, 1, 1 << 16),
    "max_completion_tokens": (int, 1, 1 << 16),
    "min_tokens": (int, 0, 1 << 16),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, 1 << 31),
    "repetition_penalty": (float, 1e-3, 1e3),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "num_beams": (int, 1, 16),
    "length_penalty": (float, -50, 50),
    "n": (int, 1, 8),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
    "top_logprobs": (int, 0, 20),
}
# field -> that of generate.Decoding
DECODING = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
DECODING["min_tokens"] = "min_new_tokens"
SAME = "temperature top_p top_k repetition_penalty num_beams length_penalty seed".split()
DECODING |= {name: name for name in SAME}
BEAMLESS = ("n", "logprobs", "logit_bias", "presence_penalty", "frequency_penalty")  # not with num_beams
FLAGS = ("stream", "logprobs", "continue_final_message", "add_generation_prompt")
OTHERS = ("model", "messages", "stop", "stream_options", "logit_bias")
# of no effect on an answer: accepted
HARMLESS = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction "
    "parallel_tool_calls request_id priority"
).split()
# Would change the answer and is not there: accepted where it asks for nothing, by null or by what stands
# here. Clients send some of them with every request, as their defaults.
ABSENT = "audio web_search_options guided_json guided_regex guided_choice structured_outputs"
NEUTRAL = dict.fromkeys(ABSENT.split(), ()) | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_p": (0, 0.0),
    "ignore_eos": (False,),
    "echo": (False,),
    "return_token_ids": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
KNOWN = {*NUMBERS, *FLAGS, *OTHERS, *HARMLESS, *NEUTRAL}
ROLES = ("system", "developer", "user", "assistant")
MAX_TEXT = 1_000_000  # characters of all messages
# Fewer decoders than for one's own files: each is a way in for what a stranger sends.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")


class Refused(Exception):
    """A request that is answered with an error in OpenAI's shape; `param` names the field."""

    def __init__(self, status: int, message: str, param=None, code: str | None = None, **headers):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad(param: str, expected: str, got) -> Refused:
    return Refused(400, f"{param}: expected {expected}, got {terminal.cut(got)}", param)


@dataclass
class Wanted:
    """What a body asks for, checked."""

    model: str
    turns: list  # of a records.Conversation
    places: list[str]  # where in the body each image stands
    how: Decoding
    n: int = 1
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    logprobs: int = -1  # the best tokens to report at each place; -1: nothing
    logit_bias: dict[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    begun: str | None = None  # the beginning of the answer, which is not part of what is made


def read_wanted(content: bytes, limits, defaults: Decoding, vocab_size: int) -> Wanted:
    """The body of /v1/chat/completions. Refused names the first field that is not right."""
    body = read_fields(content)
    numbers = {name: read_number(name, body[name], *NUMBERS[name]) for name in NUMBERS if name in body}
    for name in FLAGS:
        if not isinstance(body.get(name, False), bool):
            raise bad(name, "true or false", body[name])
    if not isinstance(body["model"], str):
        raise bad("model", "a model's name", body["model"])
    go_on = body.get("continue_final_message", False)
    if body.get("add_generation_prompt", not go_on) == go_on:
        expected = f"{json.dumps(not go_on)}, with continue_final_message={json.dumps(go_on)}"
        raise bad("add_generation_prompt", expected, go_on)
    if numbers.get("top_logprobs") and not body.get("logprobs"):
        raise Refused(400, "top_logprobs goes with logprobs=true", "top_logprobs")
    stream = body.get("stream", False)
    include_usage = read_stream_options(body.get("stream_options", {}), stream)
    stop, bias = read_stop(body.get("stop", [])), read_bias(body.get("logit_bias", {}), vocab_size)
    how = read_decoding(numbers, defaults)
    # Beams share one search: there is no next token of one answer to change or to report.
    for name in BEAMLESS if how.num_beams > 1 else ():
        if body.get(name) and not (name == "n" and body[name] == 1):
            raise Refused(400, f"{name} and num_beams={how.num_beams} do not go together", name)
    turns, places, begun = read_messages(body["messages"], limits, go_on)
    given = {k: numbers[k] for k in ("n", "presence_penalty", "frequency_penalty") if k in numbers}
    return Wanted(
        body["model"],
        turns,
        places,
        how,
        stop=stop,
        stream=stream,
        include_usage=include_usage,
        logprobs=numbers.get("top_logprobs", 0) if body.get("logprobs") else -1,
        logit_bias=bias,
        begun=begun,
        **given,
    )


def read_fields(content: bytes) -> dict:
    """The body's fields that are given (null is not), all of them known and none that asks for what is not
    there."""
    try:
        body = record_files.parse_json(content.decode("utf-8"))
    except ValueError as e:
        raise Refused(400, f"the body is not valid JSON: {terminal.one_line(e, 120)}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body must be a JSON object, got {terminal.cut(body)}")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in KNOWN:
            hint = terminal.nearest(name, sorted(KNOWN))
            raise Refused(400, f"unknown field {terminal.cut(name)}{hint}", name[:100], "unknown_parameter")
    # Clients of agents send their tools always.
    if body.get("tool_choice") == "none":
        body.pop("tools", None)  # they are never called
    for name in NEUTRAL:
        if name in body and not any(type(body[name]) is type(v) and body[name] == v for v in NEUTRAL[name]):
            message = f"{name}={terminal.cut(body[name])} is not supported here; leave it out"
            raise Refused(400, message, name, "unsupported_parameter")
    for name in ("model", "messages"):
        if name not in body:
            raise Refused(400, f"{name} is missing", name, "missing_required_parameter")
    return body


def read_stream_options(options, stream: bool) -> bool:
    """-> include_usage"""
    if not isinstance(options, dict) or not all(isinstance(v, bool) for v in options.values()):
        raise bad("stream_options", 'an object such as {"include_usage": true}', options)
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused(400, f"stream_options: unknown field {terminal.cut(min(unknown))}", "stream_options")
    if options and not stream:
        raise Refused(400, "stream_options goes with stream=true", "stream_options")
    return options.get("include_usage", False)


def read_number(name: str, value, kind: type, least, most):
    # JSON knows one kind of number, Python two; true is an int there, and none here.
    fits = isinstance(value, int) or kind is float and isinstance(value, float) and math.isfinite(value)
    if not fits or isinstance(value, bool) or not least <= value <= most or (name == "top_p" and value == 0):
        what = "a whole number" if kind is int else "a number"
        raise bad(name, f"{what} from {least} to {most}" + (", above 0" if name == "top_p" else ""), value)
    return value


def read_stop(value) -> list[str]:
    stop = [value] if isinstance(value, str) else value
    texts = isinstance(stop, list) and all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stop)
    if not texts or len(stop) > 4:
        raise bad("stop", "a text or up to 4 texts, none of them empty", value)
    return stop


def read_bias(value, vocab_size: int) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad("logit_bias", "an object of at most 1,024 token ids with a number each", value)
    bias = {}
    for key, number in value.items():
        if not re.fullmatch(r"0|[1-9]\d{0,8}", key) or int(key) >= vocab_size:
            raise bad("logit_bias", f"token ids below {vocab_size}", key)
        bias[int(key)] = read_number("logit_bias", number, float, -100, 100)
    return bias


def read_decoding(numbers: dict, defaults: Decoding) -> Decoding:
    a, b = numbers.get("max_tokens"), numbers.get("max_completion_tokens")
    if a != b and None not in (a, b):
        message = f"max_tokens={a} and max_completion_tokens={b} contradict each other"
        raise Refused(400, message, "max_completion_tokens")
    given = {DECODING[name]: value for name, value in numbers.items() if name in DECODING}
    if "top_k" in given:
        given["top_k"] = max(given["top_k"], 0)  # -1 is vLLM's "off"
    # Without a seed each answer is another one, as clients expect.
    given.setdefault("seed", secrets.randbits(62))
    try:
        return replace(defaults, **given)
    except ValueError as e:
        message = str(e).removeprefix("decoding: ")
        for name in numbers:  # say it in the request's own words
            message = message.replace(DECODING.get(name, name), name)
        raise Refused(400, message, message.partition("=")[0]) from None


def read_messages(messages, limits, go_on: bool) -> tuple[list, list[str], str | None]:
    """The turns of a conversation, where its images stand, and the beginning of the answer, if its last
    message is one to go on from. Texts stay texts (no tag opens a file); images are data URLs."""
    if not isinstance(messages, list) or not messages or len(messages) > 4096:
        raise bad("messages", "a list of messages, at least one", messages)
    cleaned, places, length = [], [], 0
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise bad(where, "an object with role and content", message)
        # What earlier answers bring back with them (refusal: null, tool_calls: []) asks for nothing.
        message = {key: value for key, value in message.items() if value not in (None, [])}
        if message.get("role") not in ROLES:
            raise bad(f"{where}.role", f"one of {', '.join(ROLES)}", message.get("role"))
        for key in message.keys() - {"role", "content", "name"}:
            raise Refused(400, f"{where}.{key[:40]} is not supported; leave it out", f"{where}.{key[:40]}")
        content = message.get("content")
        if isinstance(content, str):
            check_text(content, f"{where}.content")
            length += len(content)
        elif isinstance(content, list):
            content = [read_part(part, f"{where}.content[{k}]", limits) for k, part in enumerate(content)]
            places += [f"{where}.content[{k}]" for k, p in enumerate(content) if p["type"] == "image_url"]
            length += sum(len(part.get("text", "")) for part in content)
        else:
            raise bad(f"{where}.content", "a text or a list of parts that is not empty", content)
        if len(places) > limits.max_images:
            raise Refused(400, f"{where}: more than {limits.max_images} images", f"{where}.content")
        cleaned.append({"role": message["role"], "content": content})
    if length > MAX_TEXT:  # before it is taken apart into tokens
        message = f"messages: {length:,} characters of text, at most {MAX_TEXT:,} are taken; shorten them"
        raise Refused(400, message, "messages", "context_length_exceeded")
    last, begun = cleaned[-1], None
    if last["role"] != ("assistant" if go_on else "user"):
        whose = "the assistant, to go on from" if go_on else "the user"
        raise bad(f"messages[{len(cleaned) - 1}].role", f"a last message of {whose}", last["role"])
    if go_on:
        begun = last["content"]
        if not isinstance(begun, str):
            raise bad(f"messages[{len(cleaned) - 1}].content", "a text to go on from", begun)
    try:
        turns = records.chat_turns({"messages": cleaned}, answered=False)
        records.check_text(turns)
    except ValueError as e:
        # A record's turns are this body's messages, so its error can name the field.
        number = re.match(r"turn (\d+) ", str(e))
        where = f"messages[{number[1]}].content" if number else "messages"
        raise Refused(400, f"{where}: {terminal.one_line(e)}", where) from None
    return turns, places, begun


def check_text(text: str, where: str) -> None:
    if any(tag in text.lower() for tag in ("<img>", "</img>", records.PLACEHOLDER)):
        # in a file of records they name images
        message = f"{where}: <image> and <img> in a text stand for files; give an image as an image_url part"
        raise Refused(400, message, where)


def read_part(part, where: str, limits) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "image_url"):
        refuse_others(part, {"type", kind, "cache_control"}, where)
    # A part holds exactly what it is for: an "image" in a part of text would be dropped without a word.
    if kind == "text" and isinstance(part.get("text"), str):
        check_text(part["text"], f"{where}.text")
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        expected = "a part of type text with a text, or of type image_url"
        got = part if kind in (None, "text") else kind
        raise bad(where if kind == "text" else f"{where}.type", expected, got)
    value, where = part.get("image_url"), f"{where}.image_url"
    if isinstance(value, dict):
        refuse_others(value, {"url", "detail"}, where)
        if value.get("detail") not in (None, "auto", "low", "high"):
            raise bad(f"{where}.detail", "auto, low or high (all are one size here)", value["detail"])
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str):
        raise bad(where, "an image as a data URL", value)
    source = value if images.is_data_url(value) else fetch_image(value, where, limits)
    check_image(source, where, limits)
    return {"type": "image_url", "image_url": source}


def refuse_others(given: dict, known: set[str], where: str) -> None:
    """What is not read is refused: it may be an image or a text."""
    for key in (k for k, value in given.items() if k not in known and value is not None):
        raise Refused(400, f"{where}: {terminal.cut(key)} is not supported; leave it out", where)


def check_image(source: str, where: str, limits) -> None:
    """Refuses what is no image, or a larger one, by its header alone."""
    try:
        # By the header: a bomb of a few kilobytes would open to gigabytes.
        content = images.read_bytes(source)
        with Image.open(io.BytesIO(content), formats=images.readable(FORMATS)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = math.inf
    except Exception as e:  # decoders raise errors of every kind
        known = isinstance(e, ValueError) and not isinstance(e, OSError)
        reason = f" ({terminal.one_line(e, 100)})" if known else ""
        message = f"{where}: not a readable image{reason}; expected PNG, JPEG, WEBP, GIF or BMP in base64"
        raise Refused(400, message, where, "invalid_image") from None
    if width * height > limits.max_image_pixels:
        message = f"{where}: more than {limits.max_image_pixels:,} pixels; scale the image down"
        raise Refused(400, message, where, "image_too_large")


# ---- images of other hosts


def is_public(address: str) -> bool:
    """Whether an address, and the IPv4 address that an IPv6 one wraps, is one of the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inside = []
    if ip.version == 6:
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inside.append(ipaddress.ip_address(int(ip) & 0xFFFFFFFF))
    return all(x.is_global and not x.is_multicast for x in [ip, *filter(None, inside)])


class Pinned(http.client.HTTPSConnection):
    """An https connection to an address that was looked at, for the host that it belongs to."""

    def __init__(self, host: str, address: str, timeout: float):
        super().__init__(host, timeout=timeout, context=ssl.create_default_context())
        self.address = address

    def connect(self):
        plain = socket.create_connection((self.address, self.port), self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)

    def abort(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


def fetch_image(url: str, where: str, limits, seconds: float = 10) -> str:
    """The image of an allowed host as a data URL: resolved once, no redirects, bounded in time and size."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise bad(where, "a data URL", url) from None
    if parts.scheme != "https" or port not in (None, 443) or parts.username or host not in limits.image_hosts:
        allowed = f" or https from {', '.join(limits.image_hosts)}" if limits.image_hosts else ""
        expected = f"{where}: expected a data URL (data:image/png;base64,...){allowed}"
        raise Refused(400, f"{expected}; this one is not fetched", where, "invalid_image_url")
    try:
        found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
        addresses = [address[0] for *_, address in found]
        # A name may mean a machine of this network, which no client can reach by itself.
        if not addresses or not all(map(is_public, addresses)):
            raise ValueError("its address is not one of the open internet")
        connection = Pinned(host, addresses[0], seconds)
        # A timeout of the socket is for each read: a host that sends a byte a second would hold us.
        watchdog = threading.Timer(seconds, connection.abort)
        watchdog.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "trimix"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"the host answered {answer.status}; redirects are not followed")
            content = answer.read(limits.max_body_mb * 1_000_000 + 1)
        finally:
            watchdog.cancel()
            connection.close()
        if len(content) > limits.max_body_mb * 1_000_000:
            raise ValueError(f"more than {limits.max_body_mb} MB")
    except (OSError, ValueError, http.client.HTTPException) as e:
        reason = terminal.one_line(e, 100) if isinstance(e, ValueError) else type(e).__name__
        message = f"{where}: the image could not be fetched ({reason})"
        raise Refused(400, message, where, "invalid_image_url") from None
    return "data:image/png;base64," + base64.b64encode(content).decode()  # decoders look at the content
