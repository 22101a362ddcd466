"""Pictures for a person: boxes of an answer drawn onto their image, the loss curve of a run.

    draw_boxes("street.jpg", "<ref>bus</ref><box>(100,200),(500,700)</box>", "boxes.png")
"""

import functools
import json
import math
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import checkpoint
from images import open_image

BLANK, NUMBER = r"\s*", r"(-?\d+(?:\.\d+)?)"
CORNER = BLANK.join(("", r"\(", NUMBER, ",", NUMBER, r"\)", ""))
BOX = re.compile(rf"(?:<ref>(.*?)</ref>)?\s*<box>{CORNER},{CORNER}</box>", re.S)
# files of fonts with Chinese, Japanese and Korean characters, as systems name them
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc NotoSansCJKsc-Regular.otf NotoSansSC-Regular.otf NotoSerifCJK-Regular.ttc wqy-zenhei.ttc "
    "wqy-microhei.ttc DroidSansFallbackFull.ttf DroidSansFallback.ttf uming.ttc PingFang.ttc msyh.ttc simsun.ttc"
).split()


@functools.cache
def cjk_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def draw_boxes(source: str, text: str, out: str | Path) -> int:
    """Draws the boxes in the text (thousandths of each side) onto a copy of the image; returns how many there were.

    Corners may be swapped, and are cut to the image. A label that no font here can write becomes a number, which a line
    on stderr explains.
    """
    boxes = BOX.findall(text)
    if not boxes:
        return 0
    image = open_image(source)
    draw, legend = ImageDraw.Draw(image), []
    for n, (label, *corners) in enumerate(boxes, 1):
        sides = image.size * 2
        x1, y1, x2, y2 = (min(max(float(v), 0), 1000) * side / 1000 for v, side in zip(corners, sides, strict=True))
        x1, x2, y1, y2 = *sorted((x1, x2)), *sorted((y1, y2))
        draw.rectangle((x1, y1, min(x2, image.width - 1), min(y2, image.height - 1)), outline="red", width=2)
        label, font = " ".join(label.split()), ImageFont.load_default(14)
        if not label.isascii():
            font = cjk_font(14) or font
            if cjk_font(14) is None:
                legend.append(f"{n}: {label}")
                label = str(n)
        draw.text((x1 + 3, y1 + 2), label, fill="red", font=font)
    if legend:
        print(f"no font here writes these labels, numbers stand for them: {', '.join(legend)}", file=sys.stderr)
    save(image, out)
    return len(boxes)


def save(image: Image.Image, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_file(out) as file:
        image.save(file, Image.registered_extensions().get(Path(out).suffix.lower(), "PNG"))


def draw_loss(log_path: Path, out: Path) -> None:
    """The loss curve as a picture: training in blue, evaluation in red."""
    records = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    train = [(r["step"], r["loss"]) for r in records if "loss" in r and math.isfinite(r["loss"])]
    evals = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r and math.isfinite(r["eval_loss"])]
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
