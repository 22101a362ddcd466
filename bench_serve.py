"""What a server of OpenAI's chat API gives, ours or any other: serve.py bench URL.

    python serve.py bench http://127.0.0.1:8000 --concurrency 8 --image samples/images/digits/0001.png

Time to the first token, between tokens, and of whole answers; tokens/s; goodput, the rate of answers that
keep an objective.
"""

import base64
import concurrent.futures
import http.client
import json
import math
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch

import images
import record_files
import terminal


def connect(url, timeout: float, api_key: str | None) -> tuple[http.client.HTTPConnection, str, dict]:
    """-> (connection, the path before /v1, headers)"""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return kind(url.hostname, url.port, timeout=timeout), url.path.rstrip("/").removesuffix("/v1"), headers


def one_answer(url, args, number: int, image: str | None) -> dict:
    """Asks once and streams the answer: times of its pieces, its tokens, or the error."""
    content = [{"type": "text", "text": args.prompt.replace("{n}", str(number))}]
    if image:
        content.insert(0, {"type": "image_url", "image_url": {"url": image}})
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": args.max_tokens}
    body |= {"model": args.model_name, "stream_options": {"include_usage": True}, "temperature": 0}
    body |= args.body
    connection, path, headers = connect(url, 600, args.api_key)
    found = {"began": time.perf_counter(), "times": [], "tokens": 0, "error": None}
    try:
        headers["Content-Type"] = "application/json"
        connection.request("POST", f"{path}/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            found["error"] = f"status {response.status}"
        for line in response if response.status == 200 else ():
            if not line.startswith(b"data: {"):  # blank lines, comments, [DONE]
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                found["error"] = str(chunk["error"])[:100]
            if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                found["times"].append(time.perf_counter())
            found["tokens"] = (chunk.get("usage") or {}).get("completion_tokens", found["tokens"])
    except (OSError, ValueError, http.client.HTTPException) as e:
        found["error"] = f"{type(e).__name__}: {e}"[:100]
    finally:
        connection.close()
    found["ended"] = time.perf_counter()
    # a server that does not count: a piece is mostly a token
    found["tokens"] = found["tokens"] or len(found["times"])
    found["times"] = found["times"] or [found["ended"]]  # an answer without text
    return found


def percentiles(seconds: list[float]) -> str:
    """The median, the 90th and the 99th, in ms."""
    ordered = sorted(seconds) or [math.nan]
    places = (min(len(ordered) - 1, int(q * len(ordered))) for q in (0.5, 0.9, 0.99))
    return " ".join(f"{1000 * ordered[place]:9.1f}" for place in places)


def main(argv: list[str]) -> int:
    parser = terminal.Parser(prog="serve.py bench", description=__doc__)
    add = parser.add_argument
    add("url", help="the server, e.g. http://127.0.0.1:8000")
    clients = "closed loop: so many clients, each asks again when answered"
    add("--concurrency", type=int, default=8, help=clients)
    arrivals = "requests a second with Poisson arrivals, instead of --concurrency"
    add("--rate", type=float, help=arrivals)
    add("--num_requests", type=int, default=64)
    add("--max_tokens", type=int, default=64)
    add("--prompt", default="Question {n}: describe the image.", help="{n}: the request's number")
    add("--image", action="append", default=[], help="image file; of several each request takes the next one")
    add("--model_name", help="default: the first of the server's /v1/models")
    add("--api_key")
    add("--ttft_ms", type=float, default=1000.0, help="goodput: first token within so many ms ...")
    add("--itl_ms", type=float, default=100.0, help="... and later ones on average every so many ms")
    add("--body", default="{}", help='more fields of each body as JSON, e.g. {"min_tokens": 64}')
    add("--seed", type=int, default=0, help="of the arrivals")
    args = parser.parse_args(argv)
    url = urlsplit(args.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"url={args.url!r}; expected http://HOST:PORT or https://HOST")
    if args.num_requests < 1 or args.concurrency < 1 or (args.rate is not None and args.rate <= 0):
        raise ValueError("bench: num_requests, concurrency and rate must be above 0")
    sent = []
    for path in args.image:
        images.open_image(path)
        sent.append("data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode())
    args.body = record_files.parse_json(args.body)
    if not isinstance(args.body, dict):
        raise ValueError('body: expected an object such as {"min_tokens": 64}')
    args.model_name = args.model_name or first_model(url, args.api_key)

    def ask(number: int) -> dict:
        return one_answer(url, args, number, sent[number % len(sent)] if sent else None)

    began = time.perf_counter()
    # closed loop: the load waits for the server. With a rate it does not, as users do not, and queues show
    if args.rate is None:
        with concurrent.futures.ThreadPoolExecutor(args.concurrency) as clients:
            answers = list(clients.map(ask, range(args.num_requests)))
    else:
        gaps = torch.empty(args.num_requests).exponential_(
            args.rate, generator=torch.Generator().manual_seed(args.seed)
        )
        with concurrent.futures.ThreadPoolExecutor(args.num_requests) as clients:
            asked = []
            for number, due in enumerate((gaps.cumsum(0) - gaps[0]).tolist()):
                time.sleep(max(0.0, began + due - time.perf_counter()))
                asked.append(clients.submit(ask, number))
            answers = [one.result() for one in asked]
    return report(args, answers, time.perf_counter() - began)


def first_model(url, api_key: str | None) -> str:
    connection, path, headers = connect(url, 30, api_key)
    path += "/v1/models"
    try:
        connection.request("GET", path, headers=headers)
        return json.loads(connection.getresponse().read())["data"][0]["id"]
    except OSError as e:
        raise ValueError(
            f"no server answers at {url.geturl()} ({e.strerror or e}); start one first"
        ) from None
    except (ValueError, LookupError, TypeError, http.client.HTTPException):
        raise ValueError(f"{path} of the server lists no model; give --model_name (and --api_key?)") from None


def report(args, answers: list[dict], seconds: float) -> int:
    good = [a for a in answers if not a["error"]]
    first = [a["times"][0] - a["began"] for a in good]
    gaps = [b - a for one in good for a, b in zip(one["times"], one["times"][1:], strict=False)]
    mean = [(a["times"][-1] - a["times"][0]) / max(a["tokens"] - 1, 1) for a in good]
    # an answer is within the objective as a whole or not at all
    within = sum(
        f <= args.ttft_ms / 1000 and m <= args.itl_ms / 1000 for f, m in zip(first, mean, strict=True)
    )
    tokens = sum(a["tokens"] for a in good)
    load = f"{args.rate:g} requests/s" if args.rate else f"{args.concurrency} clients"
    print(f"{load}: {len(good)} of {len(answers)} answered in {seconds:.1f} s, {tokens:,} tokens")
    print(f"{tokens / seconds:.1f} tokens/s, {len(good) / seconds:.2f} requests/s")
    print("ms                        p50       p90       p99")
    print(f"first token         {percentiles(first)}")
    print(f"between tokens      {percentiles(gaps)}")
    print(f"whole answer        {percentiles([a['ended'] - a['began'] for a in good])}")
    objective = f"first token <= {args.ttft_ms:g} ms, then <= {args.itl_ms:g} ms a token"
    print(f"goodput {within / seconds:.2f} requests/s ({objective})")
    if errors := [a["error"] for a in answers if a["error"]]:
        print(f"{len(errors)} failed, the first: {errors[0]}", file=sys.stderr)
    return 1 if len(good) < len(answers) else 0
