"""The chat page in a real browser: headless Chromium, driven over its own DevTools pipe, no package needed.

Most tests talk to a small stand-in for the server, whose answers are known word for word; the last one to
serve.py itself. Without Chromium (Debian: apt-get install chromium) they are skipped.
"""

import base64
import fcntl
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import data_check
import draw

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "chat.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
OTHERS = ("blip2", "visualglm")
PATIENCE = 60  # seconds until a page that never gets there fails its test


class Browser:
    """A headless Chromium and one page in it. Messages are JSON, each ended by a zero byte, on its
    descriptors 3 and 4."""

    def __init__(self, folder: Path):
        theirs_in, self.out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        self.back, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        log = os.open(folder / "chromium.log", os.O_CREAT | os.O_WRONLY, 0o600)
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions += [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        command = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}/profile"]
        command += [
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--force-color-profile=srgb",
        ]
        command += ["--disable-background-networking", "--hide-scrollbars"]
        command += ["--no-sandbox"]  # it cannot have one as root, nor in most containers
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions, setsid=True)
        for fd in (theirs_in, theirs_out, log):
            os.close(fd)
        self.number, self.rest, self.session, self.events = 0, b"", None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self.folder = folder

    def __call__(self, method: str, **params) -> dict:
        """One command, and its result."""
        self.number += 1
        session = {"sessionId": self.session} if self.session and not method.startswith("Browser.") else {}
        message = {"id": self.number, "method": method, "params": params, **session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], PATIENCE)[0] or not (
                more := os.read(self.back, 1 << 20)
            ):
                log = (self.folder / "chromium.log").read_text(errors="replace")
                raise RuntimeError(f"Chromium does not answer: {log[-2000:]}")
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def js(self, expression: str):
        """The value of an expression in the page; a promise is awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str):
        """Waits until the expression is true, and gives its value."""
        end = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            assert time.monotonic() < end, (expression, self.js("document.body.innerText"))
            time.sleep(0.02)
        return value

    def open(self, url: str, width: int = 1280, height: int = 800):
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.querySelector('#model option') !== null")

    def press(self, key: str, text: str = ""):
        codes = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **common)

    def ask(self, text: str):
        """Types a question into the field that has the focus, and sends it by Enter."""
        self("Input.insertText", text=text)
        self.press("Enter", "\r")

    def click(self, face: str, within: str = "body"):
        """Clicks the last shown button with that text, as a mouse does."""
        spot = self.until(
            f"""(() => {{
                const all = [...document.querySelectorAll({json.dumps(within + " button")})];
                const named = all.filter(node => node.textContent.trim() === {json.dumps(face)});
                const node = named.filter(node => node.checkVisibility()).at(-1);
                if (!node || node.disabled) return null;
                node.scrollIntoView({{block: "center"}});
                const r = node.getBoundingClientRect();
                return [r.x + r.width / 2, r.y + r.height / 2];
            }})()"""
        )
        self.mouse("mouseMoved", *spot)
        self.mouse("mousePressed", *spot, button="left", clickCount=1)
        self.mouse("mouseReleased", *spot, button="left", clickCount=1)

    def mouse(self, type: str, x: float, y: float, **more):
        self("Input.dispatchMouseEvent", type=type, x=x, y=y, **more)

    def drop(self, *paths: Path):
        dragged = {"items": [], "files": [str(p) for p in paths], "dragOperationsMask": 1}
        before = self.js("document.querySelectorAll('.compose .thumbs img').length")
        for type in ("dragEnter", "dragOver", "drop"):
            self("Input.dispatchDragEvent", type=type, x=200, y=300, data=dragged)
        self.until(f"document.querySelectorAll('.compose .thumbs img').length === {before + len(paths)}")

    def answered(self, count: int = 1):
        """Waits until nothing runs and that many answers stand there."""
        self.until(
            f"document.querySelectorAll('.answer').length === {count} && !document.querySelector('.busy')"
        )

    def downloaded(self, pattern: str) -> bytes:
        end = time.monotonic() + PATIENCE
        while not (found := [p for p in self.folder.glob(pattern) if not p.name.endswith(".crdownload")]):
            assert time.monotonic() < end, f"nothing downloaded as {pattern}"
            time.sleep(0.02)
        content = found[0].read_bytes()
        found[0].unlink()
        return content

    def screenshot(self, path: Path):
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What the console holds: exceptions, refusals by the content security policy."""
        self.js("1")
        found = []
        for event in self.events:
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                entry = event["params"]["entry"]
                found.append(f"{entry['text']} {entry.get('url', '')}")
        return found

    def close(self):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.out)
        os.close(self.back)


def policy(page: bytes) -> str:
    """The policy under which the page must work: its one script and one style, this server alone."""
    hashes = {}
    for tag in (b"script", b"style"):
        (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.S)
        hashes[tag] = base64.b64encode(hashlib.sha256(text).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; "
        f"style-src 'sha256-{hashes[b'style']}'; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class StandIn(http.server.ThreadingHTTPServer):
    """OpenAI's streaming chat with answers that a test sets: `answers` maps a question to its pieces;
    `gate` holds the stream back after the first piece until it is set; `broken` stands for its end."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.headers, self.answers, self.cors, self.broken = [], [], {}, {}, b""
        self.gate, self.gone = threading.Event(), threading.Event()
        self.gate.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, kind: str, body: bytes, **headers):
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        for name, value in self.server.cors.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self):
        self.reply(204, "text/plain", b"")

    def do_GET(self):
        if self.path == "/v1/models":
            defaults = {"temperature": 0.25, "max_tokens": 77}
            models = [{"id": "base", "defaults": defaults}, {"id": "flags", "parent": "base"}]
            self.reply(200, "application/json", json.dumps({"object": "list", "data": models}).encode())
        elif self.path == "/":
            page = PAGE.read_bytes()
            self.reply(200, "text/html; charset=utf-8", page, content_security_policy=policy(page))
        else:
            self.reply(404, "text/plain", b"")

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.requests.append(body)
        server.headers.append(self.headers)
        content = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        question = content if isinstance(content, str) else content[-1].get("text", "")
        pieces = server.answers.get((body["model"], question)) or server.answers[question]
        if isinstance(pieces, int):
            error = {"error": {"message": "the queue is full", "type": "x"}}
            return self.reply(pieces, "application/json", json.dumps(error).encode(), retry_after=7)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        for name, value in server.cors.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        details = {"cached_tokens": 5, "image_tokens": 256}
        usage = {"prompt_tokens": 300, "completion_tokens": len(pieces), "prompt_tokens_details": details}
        chunks.append({"choices": [], "usage": usage})
        lines = b"".join(b"data: %s\n\n" % json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks)
        lines = b": a comment\n\n" + lines + (server.broken or b"data: [DONE]\n\n")
        try:
            first = lines.find(b"data: ", lines.find(pieces[0].encode()) if pieces else 0)
            self.wfile.write(lines[:first])
            self.wfile.flush()
            while not server.gate.wait(0.02):
                self.wfile.write(b": wait\n\n")  # fails once the client has gone
                self.wfile.flush()
            # in pieces that end inside a line and inside a character, if there is one
            inside = next((n + 1 for n in range(first, len(lines)) if lines[n] > 127), first + 20)
            for start, end in itertools.pairwise([first, first + 12, inside, len(lines)]):
                self.wfile.write(lines[start:end])
                self.wfile.flush()
                time.sleep(0.03)
        except OSError:
            server.gone.set()
        self.close_connection = True


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def server():
    found = StandIn()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def page(browser, server):
    browser.events.clear()
    browser.open(server.url)
    browser.until("document.querySelector('#model').value === 'base'")
    yield browser
    browser.js("stop()")
    assert not [c for c in browser.complaints() if "429" not in c]


def write_image(path: Path, size: tuple[int, int], colour="white", mode="RGB", **options) -> Path:
    image = Image.new(mode, size, colour)
    image.paste("black", (0, 0, 1, 1))  # not one colour throughout
    image.save(path, **options)
    return path


def text(page: Browser, n: int = 0) -> str:
    return page.js(f"document.querySelectorAll('.answer .text')[{n}].innerText")


def status(page: Browser) -> str:
    return page.js("document.querySelector('#status').textContent")


def images_of(request: dict) -> list[bytes]:
    """The images of a request's last question, decoded from their data URLs."""
    parts = request["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_file():
    """One file that a server can allow by two hashes: no attributes that run or style, no other host."""
    page = PAGE.read_text(encoding="utf-8")
    assert len(page.encode()) <= 40_000
    for tag in ("script", "style"):
        assert len(re.findall(rf"<{tag}\b", page)) == len(re.findall(rf"<{tag}>", page)) == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\s(on\w+|style)=", markup)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", page)
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", page)


@browser_only
def test_dropped_image_and_streamed_answer(page, server, tmp_path):
    path = write_image(tmp_path / "small.png", (64, 48))
    page.drop(path)
    server.answers["What is it?"] = ["A flag", " of **许多** colours", ", 😀."]
    server.gate.clear()
    page.ask("What is it?")
    page.until("document.querySelector('.answer.busy .text')?.innerText.trim() === 'A flag'")
    assert page.js("document.querySelector('#composer .main').textContent") == "Stop"
    server.gate.set()
    page.answered()
    assert text(page) == "A flag of 许多 colours, 😀."
    assert page.js("document.querySelector('.text strong').textContent") == "许多"
    assert (
        page.js("document.querySelector('#announce').textContent") == "base: A flag of **许多** colours, 😀."
    )
    figures = page.js("document.querySelector('.figures').textContent")
    pattern = r"3 tokens · ([\d.]+ tokens/s · )?first token [\d.]+ s · 300 prompt tokens"
    assert re.fullmatch(pattern + " · 256 image tokens · 5 cached", figures), figures

    (request,) = server.requests
    assert images_of(request) == [path.read_bytes()]  # small enough: the file itself
    assert request["messages"][-1]["content"][-1] == {"type": "text", "text": "What is it?"}
    del request["messages"]
    assert request == {"model": "base", "stream": True, "stream_options": {"include_usage": True}}


@browser_only
def test_images_picked_pasted_and_refused(page, server, tmp_path):
    first = write_image(tmp_path / "a.jpg", (40, 30), "red")
    second = write_image(tmp_path / "b.png", (30, 40), "blue")
    (tmp_path / "c.png").write_bytes(b"no image")
    picker = page("Runtime.evaluate", expression="document.querySelector('input[type=file]')")["result"]
    page("DOM.setFileInputFiles", files=[str(first), str(second)], objectId=picker["objectId"])
    page.until("document.querySelectorAll('.compose img').length === 2")
    page.js(
        """(async () => {
            const blob = await new Promise(done => {
                const canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [50, 20];
                canvas.toBlob(done);
            });
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
            document.querySelector("textarea").focus();
        })()"""
    )
    page("Input.dispatchKeyEvent", type="keyDown", key="v", code="KeyV", modifiers=2, commands=["paste"])
    page.until("document.querySelectorAll('.compose img').length === 3")
    dragged = {"items": [], "files": [str(tmp_path / "c.png")], "dragOperationsMask": 1}
    for type in ("dragEnter", "dragOver", "drop"):
        page("Input.dispatchDragEvent", type=type, x=200, y=300, data=dragged)
    page.until("document.querySelector('#status').textContent")
    assert status(page) == "c.png: not an image that this browser can open"

    page.js("document.querySelector('[aria-label=\"Remove image 2\"]').click()")
    server.answers["Both?"] = ["Yes."]
    page.ask("Both?")
    page.answered()
    sizes = [Image.open(io.BytesIO(image)).size for image in images_of(server.requests[0])]
    assert sizes == [(40, 30), (50, 20)]


@browser_only
def test_boxes_at_the_right_pixels(page, server, tmp_path):
    """Corners are pixels of the original although a smaller image is sent; as draw.py has them."""
    page.drop(write_image(tmp_path / "large.png", (2003, 1001), (0, 0, 0, 0), "RGBA"))  # clear: white below
    answer = (
        "<ref>a  bus</ref><box>(100,200),(500,900)</box> and <ref>men</ref><box>(700.5, 950),(600,500)</box>"
        "<box>(0,0),(999,1000)</box> <box>(7,8)</box> plain <box>(1,2),(3,4)</box> `<box>(5,5),(6,6)</box>`"
    )
    server.answers["Where?"] = [answer]
    page.ask("Where?")
    page.answered()
    (sent,) = images_of(server.requests[0])
    assert Image.open(io.BytesIO(sent)).size == (1536, 768)

    boxes, unreadable = draw.boxes_of(answer)
    assert len(boxes) == 5 and unreadable == ["(7,8)"]
    sides = (2003, 1001, 2003, 1001)
    expected = [
        {"label": label, "box": [min(int(v * s / 1000), s - 1) for v, s in zip(box, sides, strict=True)]}
        for label, box in boxes
    ]
    assert expected[2]["box"] == [0, 0, 2000, 1000]
    page.click("Copy as pixels")
    page.until("document.querySelector('#status').textContent.includes('copied')")
    copied = page.js("navigator.clipboard.readText()")
    assert [json.loads(line) for line in copied.splitlines()] == expected

    # on the screen: the large one first, so that the others can be pointed at
    shown = page.js(
        """(() => {
            const image = document.querySelector(".frame img").getBoundingClientRect();
            return [...document.querySelectorAll(".frame .box")].map(node => {
                const r = node.getBoundingClientRect();
                const x = v => (v - image.left) / image.width, y = v => (v - image.top) / image.height;
                return [node.dataset.box, x(r.left), y(r.top), x(r.right), y(r.bottom)];
            });
        })()"""
    )
    assert len(shown) == 5 and shown[0][0] == "4"
    (bus,) = [place for n, *place in shown if n == "1"]
    assert bus == pytest.approx([0.1, 0.2, 0.5, 0.9], abs=2e-3)
    # inside code a tag is text, elsewhere an unreadable box is shown as it stands
    assert "(7,8)" in text(page) and page.js("document.querySelector('.text code').textContent").startswith(
        "<box>"
    )

    page.click("Download PNG")
    image = Image.open(io.BytesIO(page.downloaded("boxes*.png"))).convert("RGB")
    assert image.size == (1536, 768)
    hue = (0xFF, 0x4D, 0x4D)
    left, top, right, bottom = (
        int(v * s / 1000) for v, s in zip((100, 200, 500, 900), (1536, 768) * 2, strict=True)
    )
    for spot in ((left, 600), (right, 600), ((left + right) // 2, top), ((left + right) // 2, bottom)):
        near = [image.getpixel((spot[0] + dx, spot[1] + dy)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        assert any(max(abs(a - b) for a, b in zip(p, hue, strict=True)) < 8 for p in near), (spot, near)
    assert image.getpixel((left + 40, 600)) == (255, 255, 255)


@browser_only
def test_any_text_is_read_as_draw_py_reads_it(page):
    """Random texts of tags, marks and fragments: the same boxes, and no element but markdown's own."""
    pieces = (
        "<ref> </ref> <box> </box> (1,2),(3,4) (9.5,-3),(+7,1e3) ( .5 , 6. ) , a 中 * ** ` ``` # - 1. [x](y)"
    )
    pieces = [
        *pieces.split(),
        "[l](https://e.org)",
        "https://e.org/<b>",
        "<b>",
        "\ue0000\ue001",
        " ",
        "\n",
        "\n\n",
    ]
    chance = random.Random(0)
    texts = ["".join(chance.choices(pieces, k=chance.randrange(1, 25))) for _ in range(1500)]
    for n in range(500):  # most of those hold no whole box
        corners = ["".join(chance.choices("(10,20),(30,40) ", k=chance.choice((0, 0, 3)))) for _ in range(2)]
        texts[n] += f"<ref>{corners[0]}</ref>{chance.choice(pieces)}<box>(10,20),(3{n},40){corners[1]}</box>"
    found = page.js(
        f"""{json.dumps(texts)}.map(text => {{
            const {{ nodes, tags }} = markdown(h("article"), text);
            const box = h("div", {{}}, ...nodes);
            return [tags.filter(tag => tag.corners).map(tag => [tag.label, tag.corners]),
                tags.filter(tag => tag.box !== undefined && !tag.corners).map(tag => tag.box),
                [...box.querySelectorAll("*")].map(node => node.tagName)];
        }})"""
    )
    shown = set()
    for text, (boxes, unreadable, elements) in zip(texts, found, strict=True):
        text = re.sub("[\ue000\ue001]", "", text)
        expected, damaged = draw.boxes_of(text)
        assert [(label, corners) for label, corners in boxes] == expected and unreadable == damaged, text
        shown |= {*elements}
    assert shown == {*"P BR PRE CODE H4 UL OL LI STRONG EM A SPAN".split()}


@browser_only
def test_large_photo_is_sent_upright(page, server, tmp_path):
    """Scaled down as it is seen: EXIF's quarter turn is in the pixels that are sent."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    page.drop(write_image(tmp_path / "photo.jpg", (3000, 1000), "red", exif=exif))
    server.answers["Up?"] = ["<box>(0,0),(500,500)</box>"]
    page.ask("Up?")
    page.answered(1)
    (sent,) = images_of(server.requests[0])
    sent = Image.open(io.BytesIO(sent))
    assert sent.size == (512, 1536) and not sent.getexif()
    assert "(0,0)–(500,1500)" in page.js("document.querySelector('.labels button').textContent")


@browser_only
def test_box_and_label_light_up_together(page, server, tmp_path):
    page.drop(write_image(tmp_path / "a.png", (400, 300)))
    server.answers["Where?"] = [
        "<ref>cup</ref><box>(100,100),(400,400)</box><ref>pen</ref><box>(600,600),(900,900)</box>"
    ]
    page.ask("Where?")
    page.answered()
    page.js("document.querySelector('.frame').scrollIntoView({block: 'center'})")
    middle = """(() => { const r = document.querySelectorAll(%r)[%d].getBoundingClientRect();
        return [r.x + r.width / 2, r.y + r.height / 2]; })()"""
    lit = "[...document.querySelectorAll('.on')].map(n => n.textContent.trim().split(' ')[0]).join()"
    page.mouse("mouseMoved", *page.js(middle % (".text .ref", 1)))
    page.until(lit + " === 'pen,(600,600),(900,900),pen,pen'")  # the word, the corners, the box, the button
    page.mouse("mouseMoved", *page.js(middle % (".frame .box", 0)))
    page.until(lit + " === 'cup,(100,100),(400,400),cup,cup'")
    page.mouse("mouseMoved", 5, 400)
    page.until(lit + " === ''")


@browser_only
def test_edit_and_run_again(page, server, tmp_path):
    """An earlier question and its image are replaced; the conversation as it was stays in the history."""
    new = write_image(tmp_path / "new.png", (30, 30), "green")
    page.drop(write_image(tmp_path / "old.png", (20, 20), "red"))
    server.answers |= {"One?": ["First."], "Two?": ["Second."], "One, again?": ["Third."]}
    page.ask("One?")
    page.answered(1)
    page.ask("Two?")
    page.answered(2)
    assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "user"]

    page.js("document.querySelector('[aria-label=\"Edit question 1\"]').click()")
    picker = page("Runtime.evaluate", expression="document.querySelector('.question input[type=file]')")[
        "result"
    ]
    page.js("HTMLInputElement.prototype.click = () => {}")  # no file dialog
    page.js("document.querySelector('[aria-label=\"Replace image 1\"]').click()")
    page("DOM.setFileInputFiles", files=[str(new)], objectId=picker["objectId"])
    page.until("document.querySelector('.question img')?.alt === 'new.png'")
    page.js("document.querySelector('.question textarea').select()")
    page.ask("One, again?")
    page.answered(1)
    assert text(page) == "Third."
    (message,) = server.requests[2]["messages"]
    assert (
        images_of(server.requests[2]) == [new.read_bytes()]
        and message["content"][-1]["text"] == "One, again?"
    )

    page.until("document.querySelectorAll('#chats li').length === 2")
    page.click("One?", "#chats")
    page.answered(2)
    assert text(page, 1) == "Second."


@browser_only
def test_stop_continue_and_regenerate(page, server):
    server.answers["Go?"] = ["One", " two three"]
    server.gate.clear()
    page.ask("Go?")
    page.until("document.querySelector('.answer.busy .text')?.innerText.trim() === 'One'")
    page.press("Escape")
    page.answered()
    assert server.gone.wait(PATIENCE)  # the server sees that nobody waits
    assert text(page) == "One" and "stopped" in page.js("document.querySelector('.figures').textContent")
    server.gate.set()
    page.click("Continue")
    page.until("document.querySelector('.answer .text').innerText.trim() === 'OneOne two three'")
    page.answered()
    request = server.requests[1]
    assert request["messages"][-1] == {"role": "assistant", "content": "One"}
    assert request["continue_final_message"] is True and request["add_generation_prompt"] is False

    server.answers["Go?"] = 429  # a failure leaves the answer that was there
    page.click("Regenerate")
    page.until("document.querySelector('.answer .bad')?.textContent")
    assert (
        page.js("document.querySelector('.answer .bad').textContent")
        == "the queue is full (try again in 7 s)"
    )
    assert text(page) == "OneOne two three"
    server.answers["Go?"] = ["New."]
    page.click("Regenerate")
    page.until("document.querySelector('.answer .text').innerText.trim() === 'New.'")


@browser_only
def test_what_fails_is_said(page, server):
    """A stream that breaks off or ends in an error keeps its text, says so, and can be gone on with."""
    server.answers |= {"Go?": ["One"], "On?": ["Two"]}
    server.broken = b": and the connection ends\n\n"
    page.ask("Go?")
    page.answered(1)
    bad = "[...document.querySelectorAll('.answer .bad')].at(-1).textContent"
    assert text(page) == "One" and page.js(bad) == "The connection broke before the answer's end."
    server.broken = b'data: {"error": {"message": "the engine <b>failed</b>"}}\n\n'
    page.ask("On?")
    page.answered(2)
    assert text(page, 1) == "Two" and page.js(bad) == "the engine <b>failed</b>"
    server.broken = b""
    page.click("Continue")
    page.until("document.querySelectorAll('.answer .text')[1].innerText.trim() === 'TwoTwo'")
    page.answered(2)
    assert page.js(bad) == ""

    page.js("document.querySelector('textarea').value = 'ni'")  # Enter that ends a word of an input method
    enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    page.js(f"document.querySelector('textarea').dispatchEvent({enter})")
    assert page.js("document.querySelector('textarea').value") == "ni" and len(server.requests) == 3


ATTACKS = """<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script>
<svg onload="window.hacked=3"></svg> <iframe srcdoc="<script>parent.hacked=4</script>"></iframe>
[a](javascript:window.hacked=5) [b](JaVaScRiPt:window.hacked=6) [c](data:text/html,<script>hacked=7</script>)
![d](https://other.example/pixel.png) [e](https://good.example/x"onmouseover="hacked=8)
<ref><img src=x onerror="window.hacked=9"></ref><box>(1,1),(500,500)</box> **<b onclick=hacked=10>x</b>**
`<img src=x onerror="window.hacked=11">` [f]( javascript:window.hacked=12)
<a href="javascript:hacked=13">g</a>
```
</code></pre><script>window.hacked=14</script>
```"""


@browser_only
def test_answers_are_inert(page, server, tmp_path):
    """What a model or a user writes is text: nothing of it runs, loads or leads anywhere but by http."""
    page.drop(write_image(tmp_path / "a.png", (40, 30)))
    server.answers[ATTACKS] = [ATTACKS[:90], ATTACKS[90:]]
    page.js(f"document.querySelector('textarea').value = {json.dumps(ATTACKS)}")
    page.press("Enter", "\r")
    page.answered()
    page.js(
        "document.querySelectorAll('.text *').forEach(node => node.dispatchEvent(new Event('mouseover')))"
    )
    page.js("new Promise(done => setTimeout(done, 300))")
    assert page.js("window.hacked === undefined")
    made = ".text :is(img, script, svg, iframe, b), .question :is(script, svg, iframe, b, a)"
    assert page.js(f"document.querySelectorAll({made!r}).length") == 0
    links = page.js(
        "[...document.querySelectorAll('.text a')].map(a => [a.href, a.rel, a.attributes.length])"
    )
    assert {href.partition(":")[0] for href, *_ in links} == {"https"}
    assert all(rel == "noopener noreferrer" and count == 3 for _, rel, count in links)
    assert '<img src=x onerror="window.hacked=1">' in text(page)
    assert page.js("document.querySelector('.question').innerText.trim()") == ATTACKS
    # and if code that runs here tried, the browser itself would refuse
    assert (
        page.js("(() => { try { document.body.innerHTML = '<p>'; } catch (error) { return error.name; } })()")
        == "TypeError"
    )
    page.events.clear()


@browser_only
def test_two_models_side_by_side(page, server):
    """Each column is a conversation of its own."""
    page.js("document.querySelector('#beside').value = 'flags'; document.querySelector('#beside').onchange()")
    server.answers |= {("base", "A?"): ["base a"], ("flags", "A?"): ["flags a"], "B?": ["b"]}
    page.ask("A?")
    page.answered(2)
    assert sorted(r["model"] for r in server.requests) == ["base", "flags"]
    assert [text(page, 0), text(page, 1)] == ["base a", "flags a"]
    left, right = page.js("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().x)")
    assert right > left + 300
    page.ask("B?")
    page.answered(4)
    for request in server.requests[2:]:
        assert request["messages"][1]["content"] == request["model"] + " a"
    page.js("document.querySelector('#beside').value = ''; document.querySelector('#beside').onchange()")


def checked(lines: bytes, tmp_path: Path, capsys) -> str:
    """What `data.py check` says about the records; they must be fine."""
    path = tmp_path / "saved.jsonl"
    path.write_bytes(lines)
    status = data_check.main(["check", "--dataset", str(path)])
    said = capsys.readouterr().out
    assert status == 0, said
    return said


@browser_only
def test_training_samples(page, server, tmp_path, capsys):
    """A conversation is saved as a record that data.py accepts, with the answer as a person corrected it."""
    page.click("Settings")
    page.js("document.querySelector('#field-system').focus()")
    page("Input.insertText", text="Be brief.")
    page.click("Done")
    path = write_image(tmp_path / "a.png", (64, 48))
    page.drop(path)
    server.answers |= {
        "Where is it?": ["There: <ref>it</ref><box>(10,20),(300,400)</box>"],
        "Sure?": ["Perhaps."],
    }
    page.ask("Where is it?")
    page.answered(1)
    page.ask("Sure?")
    page.answered(2)
    page.click("Edit", ".answer")
    page.js("document.querySelector('.answer textarea').select()")
    page("Input.insertText", text="Yes, “certainly”.")
    page.click("Keep")
    page.click("Save as training sample")
    saved = page.downloaded("sample-*.jsonl")
    assert "1 records, 1 samples, 1 images" in checked(saved, tmp_path, capsys)
    (record,) = map(json.loads, saved.decode().splitlines())
    assert [m["role"] for m in record["messages"]] == ["system", *["user", "assistant"] * 2]
    assert record["messages"][0]["content"] == "Be brief."
    assert images_of({"messages": record["messages"][:2]}) == [path.read_bytes()]
    assert record["messages"][-1]["content"] == "Yes, “certainly”."

    page.click("New chat")  # a second conversation, which has no answer
    server.answers["Busy?"] = 429
    page.ask("Busy?")
    page.until("document.querySelector('.answer .bad')?.textContent")
    page.until("document.querySelectorAll('#chats li').length > 1")
    page.click("Save all as training samples")
    checked(page.downloaded("samples*.jsonl"), tmp_path, capsys)
    assert re.search(r"left out: 1\. Question 1 has no answer", status(page)), status(page)

    page.click("New chat")  # text that a data set reads as an image's place
    server.answers["What is <image>?"] = ["A tag."]
    page.ask("What is <image>?")
    page.answered(1)
    page.click("Save as training sample")
    assert "The text holds <image>" in status(page)
    page.click("Settings")
    page.click("Clear all")
    page.click("Done")


@browser_only
def test_history_outlives_the_page(page, server, tmp_path):
    path = write_image(tmp_path / "a.png", (64, 48))
    page.drop(path)
    server.answers |= {"Kept?": ["Kept."], "More?": ["More."]}
    page.js("set('system', 'Be kind.')")
    page.ask("Kept?")
    page.answered(1)
    page.js("set('system', '')")
    page.until("document.querySelectorAll('#chats li').length === 1")
    page.open(server.url)
    page.until("document.querySelectorAll('#chats li').length === 1")
    page.click("Kept?", "#chats")
    page.answered(1)
    page.ask("More?")
    page.answered(2)
    system, *messages = server.requests[1]["messages"]
    assert system == {"role": "system", "content": "Be kind."}
    assert images_of({"messages": messages[:1]}) == [path.read_bytes()]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    server.gate.clear()  # it is deleted while it runs, and does not come back
    page.ask("More?")
    page.until("document.querySelector('.busy .text')?.innerText.trim() === 'More.'")
    page.js("window.confirm = () => true; document.querySelector('[aria-label^=Delete]').click()")
    page.until(
        "document.querySelectorAll('#chats li').length === 0 && document.querySelector('#empty') !== null"
    )
    page.until("running.size === 0")
    page.js("new Promise(done => setTimeout(done, 200))")
    assert page.js("stored('readonly', chats => chats.getAll())") == []
    page.js("set('system', '')")


@browser_only
def test_settings(page, server):
    page.click("Settings")
    shown = page.js(
        "['temperature', 'max_tokens', 'top_k'].map(n => document.querySelector(`#field-${n}`).placeholder)"
    )
    assert shown == ["0.25", "77", "default"]
    for name, value in {
        "temperature": "0",
        "top_k": "20",
        "seed": "3",
        "stop": "END\nSTOP",
        "key": "secret",
    }.items():
        page.js(f"document.querySelector('#field-{name}').focus()")
        page("Input.insertText", text=value)
    page.js("document.querySelector('#field-top_p').focus()")
    page("Input.insertText", text="7")  # more than 1: not taken
    page.js("document.querySelector('#field-seed').focus()")
    page.click("Done")
    page.js("document.querySelector('#settings').close(); document.querySelector('textarea').focus()")
    server.answers["So?"] = ["So."]
    page.ask("So?")
    page.answered(1)
    request = server.requests[0]
    assert request["temperature"] == 0 and request["top_k"] == 20 and request["seed"] == 3
    assert request["stop"] == ["END", "STOP"] and "top_p" not in request and "max_tokens" not in request
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert page.js("!JSON.stringify(localStorage).includes('secret')")
    page.js("localStorage.clear(); sessionStorage.clear()")


@browser_only
def test_from_a_file(browser, server, tmp_path):
    """Opened as a file with ?api=, where the server allows it by CORS; without it, told what to do."""
    browser.events.clear()
    server.cors = {"access-control-allow-origin": "null", "access-control-allow-headers": "*"}
    browser.open(f"{PAGE.as_uri()}?api={server.url}/")
    browser.until("document.querySelector('#model').value === 'base'")
    server.answers["Here?"] = ["Yes."]
    browser.ask("Here?")
    browser.answered(1)
    assert text(browser) == "Yes." and not browser.complaints()
    server.cors = {}
    browser("Page.navigate", url=f"{PAGE.as_uri()}?api={server.url}")
    browser.until("document.querySelector('#status')?.textContent")
    assert status(browser) == f"No answer from {server.url}: start python serve.py --cors null Try again"


@browser_only
def test_phone_width_and_keyboard(browser, server, tmp_path):
    """At 390 pixels nothing is wider than the page; everything shown is reached and has a name."""
    browser.open(server.url, width=390)
    browser.until("document.querySelector('#model').value === 'base'")
    browser.drop(write_image(tmp_path / "wide.png", (1400, 200)))
    long = "x" * 300
    server.answers["Long?"] = [
        f"{long} https://example.org/{long}\n```\n{long}\n```\n<ref>{long}</ref><box>(0,0),(99,999)</box>"
    ]
    browser.ask("Long?")
    browser.answered(1)
    outside = """[...document.querySelectorAll("body *")].filter(node => node.checkVisibility()
        && !node.closest("pre, .sr, .box, dialog")
        && node.getBoundingClientRect().right > 390.5).map(node => node.outerHTML.slice(0, 80))"""
    assert browser.js(outside) == [] and browser.js("document.documentElement.scrollWidth") == 390
    reached = set()
    for _ in range(40):
        browser.press("Tab")
        reached.add(browser.js("(n => n.ariaLabel || n.id || n.textContent)(document.activeElement)"))
    wanted = {"open-history", "model", "beside", "new", "open-settings", "Question", "Add images", "Send"}
    wanted |= {"Edit question 1", "Regenerate", "Copy as pixels", "Save as training sample"}
    assert not wanted - reached
    nameless = """[...document.querySelectorAll("button, input, select, textarea")].filter(node =>
        !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map(node => node.outerHTML)"""
    assert browser.js(nameless) == []
    browser.js("document.querySelector('pre').scrollLeft = 50")
    assert browser.js("document.querySelector('pre').scrollLeft") == 50
    browser.js("document.querySelector('#prompt textarea').focus()")
    browser.press("ArrowUp")
    assert browser.js("document.activeElement.ariaLabel") == "Edited question"
    browser.press("Escape")
    assert browser.js("document.activeElement.ariaLabel") == "Question"


@browser_only
@pytest.mark.parametrize("model", ["qwen_vl", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_with_serve_py(browser, model):
    """serve.py's own page shows what its API answers, under its own policy; a stopped answer goes on."""
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason=f"{name} is not installed (requirements-serve.txt)")
    command = [sys.executable, "serve.py", "--model", model, "--port", "0", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        started = next(
            (m for line in server.stderr if (m := re.match(r"serving .* at (http\S+)", line))), None
        )
        assert started, f"serve.py ended with {server.wait()}"
        url = started[1]
        threading.Thread(target=server.stderr.read, daemon=True).start()
        browser.events.clear()
        browser.open(url)
        browser.until(f"document.querySelector('#model').value === 'tiny_{model}'")
        browser.js("set('max_tokens', '3')")
        image = ROOT / "samples/images/digits/0001.png"
        browser.drop(image)
        question = "Describe the image in detail."
        browser.ask(question)
        browser.answered(1)
        assert browser.js("chat.turns[0].answers[0].usage.prompt_tokens_details.image_tokens") > 0
        if browser.js("chat.turns[0].answers[0].finish") == "length":
            browser.js("set('max_tokens', '5')")
            browser.click("Continue")
            browser.until("chat.turns[0].answers[0].usage?.completion_tokens === 5")
            browser.answered(1)
        else:
            assert model == "blip2"  # whose tiny model says one word

        url_of_image = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": url_of_image}, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": parts}], "model": f"tiny_{model}", "max_tokens": 8}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        (choice,) = json.load(urllib.request.urlopen(request, timeout=PATIENCE))["choices"]
        assert browser.js("chat.turns[0].answers[0].text") == choice["message"]["content"] != ""
        assert not browser.complaints()
    finally:
        server.terminate()
        server.wait()
