"""Drawings: the boxes that an answer names on a copy of its image, and the loss curve of a run.

    draw_boxes("street.jpg", "<ref>bus</ref><box>(100,200),(500,900)</box>", "boxes.png")    # -> 1

Corners are thousandths of the image's sides, as Qwen-VL writes them. A model's answer may hold anything
between the tags: blanks, signs, fractions and swapped corners are read, what lies outside is drawn at the
edge, and a box that is no four numbers is named. A label whose characters no font here has is drawn as a
number and printed beside it.
"""

import json
import math
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import checkpoint
from images import open_image, short
from terminal import printable

TAGGED = re.compile(r"<ref>(?P<label>.*?)</ref>|<box>(?P<box>.*?)</box>", re.S)
NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*"
CORNERS = re.compile(rf"\s*\({NUMBER},{NUMBER}\)\s*,?\s*\({NUMBER},{NUMBER}\)\s*")
# Fonts with Chinese, Japanese and Korean characters as Linux, macOS and Windows have them; PIL looks in their
# folders
FONTS = (
    "NotoSansCJK-Regular.ttc, NotoSansCJKsc-Regular.otf, NotoSansSC-Regular.otf, "
    "SourceHanSansSC-Regular.otf, wqy-microhei.ttc, wqy-zenhei.ttc, DroidSansFallbackFull.ttf, uming.ttc, "
    "PingFang.ttc, Hiragino Sans GB.ttc, Arial Unicode.ttf, msyh.ttc, simsun.ttc, malgun.ttf, DejaVuSans.ttf"
).split(", ")


def boxes_of(text: str) -> tuple[list[tuple[str, list[float]]], list[str]]:
    """-> ([(label, [x1, y1, x2, y2] in thousandths, upper left corner first)], boxes that are no four
    numbers).

    A label holds for all boxes that follow it without other text between."""
    boxes, unreadable, label, end = [], [], "", 0
    for match in TAGGED.finditer(text):
        if text[end : match.start()].strip():
            label = ""
        end = match.end()
        if match["box"] is None:
            label = printable(" ".join(match["label"].split()))
        elif numbers := CORNERS.fullmatch(match["box"]):
            # a number of thousands of digits is infinite here, and so at the edge
            x1, y1, x2, y2 = (min(max(float(n), 0.0), 1000.0) for n in numbers.groups())
            boxes.append((label, [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]))
        else:
            unreadable.append(match["box"])
    return boxes, unreadable


def font_for(text: str, size: int):
    """A font that has every character of the text, or None."""
    fonts = [lambda: ImageFont.load_default(size), *(lambda n=n: ImageFont.truetype(n, size) for n in FONTS)]
    for load in fonts:
        try:
            font = load()
            absent = bytes(font.getmask("\U0010ffff"))  # the glyph that stands for what the font lacks
            if all(bytes(font.getmask(c)) != absent for c in set(text) if not c.isspace()):
                return font
        except (OSError, ImportError, UnicodeEncodeError):
            continue  # not here; or PIL's bitmap font, which has Latin-1 alone
    return None


def draw_boxes(source: str, text: str, out: str | Path) -> int:
    """Draws the boxes of the text onto a copy of the image; returns how many there were. Prints what it
    cannot show."""
    boxes, unreadable = boxes_of(text)
    for box in unreadable:
        said = f"box {short(box, 60)!r} is not of the form (x1,y1),(x2,y2)"
        print(f"warning: {said}; not drawn", file=sys.stderr)
    if not boxes:
        return 0
    image = open_image(source)
    draw, (W, H) = ImageDraw.Draw(image), image.size
    size = max(12, min(W, H) // 30)
    for n, (label, corners) in enumerate(boxes, 1):
        # a thousandth is floored as Qwen-VL's own drawing does; the last pixel of a side is W - 1
        pairs = zip(corners, (W, H, W, H), strict=True)
        x1, y1, x2, y2 = (min(math.floor(v * side / 1000), side - 1) for v, side in pairs)
        draw.rectangle((x1, y1, x2, y2), outline="red", width=2)
        label = short(label, 60)
        font = font_for(label, size)
        if font is None:
            print(f"box {n}: {label}", file=sys.stderr)
            label, font = str(n), font_for(str(n), size)
        if label:
            width = draw.textlength(label, font=font)
            inside = max(min(x1 + 3, W - width - 1), 0), max(min(y1 + 2, H - size - 2), 0)
            draw.text(inside, label, "red", font)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_file(out) as file:
        image.save(file, Image.registered_extensions().get(Path(out).suffix.lower(), "PNG"))
    return len(boxes)


def draw_loss(log_path: Path, out: Path) -> None:
    """The loss curve as an image: training in blue, evaluation in red."""
    records = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    train = [(r["step"], r["loss"]) for r in records if math.isfinite(r.get("loss", math.nan))]
    evals = [(r["step"], r["eval_loss"]) for r in records if math.isfinite(r.get("eval_loss", math.nan))]
    if not train and not evals:
        return
    W, H, margin = 640, 400, 48
    top = max(v for _, v in train + evals) or 1.0
    last = max(s for s, _ in train + evals)
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)

    def place(step, value):
        return margin + (W - 2 * margin) * step / last, H - margin - (H - 2 * margin) * value / top

    draw.rectangle((margin, margin, W - margin, H - margin), outline="black")
    for i in range(5):
        x, y = place(last * i / 4, top * i / 4)
        draw.text((8, y - 6), f"{top * i / 4:.3g}", fill="black")
        draw.text((x - 10, H - margin + 6), f"{last * i // 4}", fill="black")
    for points, colour in ((train, "blue"), (evals, "red")):
        if len(points) > 1:
            draw.line([place(*p) for p in points], fill=colour, width=2)
        for p in points if len(points) < 50 else []:
            x, y = place(*p)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    draw.text((W // 2 - 40, 16), "loss over steps", fill="black")
    with checkpoint.atomic_file(out) as file:
        image.save(file, "PNG")
