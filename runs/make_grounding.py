"""A small grounding set from samples/: where is the frog, not the taxi beside it? Boxes in COCO's format.

    python runs/make_grounding.py grounding  # grounding/train.json, grounding/val.json and their images
    python train.py configs/qwen_vl/samples_grounding.json  # reads ./grounding
    python evaluate.py --lora_path output_grounding --boxes boxes  # Acc@0.5, mean IoU, boxes drawn

Everything follows from the seed: what is on a canvas, by which author, where, on what colour. Drawings are
cut to their visible pixels and stretched to one size, so a box touches what it is around.

A training canvas has one to three different things, a validation canvas three, and each of them is asked
for: a model that finds them but does not know their names is right a third of the time. On the 300 validation
questions Acc@0.5 is 0.000 before training, and 0.840 (mean IoU 0.838) after it (7 minutes of a CPU's core).
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

from PIL import Image

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
CLASSES = {"2764-fe0f": "red heart", "1f535": "blue circle", "1f695": "taxi", "1f438": "frog"}
SIDE, THINGS = 64, 3  # pixels of a canvas, the sample model's own; the most drawings on it
SIZE, STEP = 20, 22  # pixels of a drawing, and of the grid that it stands on


def drawings() -> dict[str, list[Image.Image]]:
    """code -> its drawings by all authors, cut to their visible pixels."""
    found = {}
    for code in CLASSES:
        files = sorted(SAMPLES.glob(f"images/emoji/*/{code}.png"))
        images = [Image.open(path).convert("RGBA") for path in files]
        found[code] = [
            image.crop(image.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()) for image in images
        ]
    return found


def canvas(rng: random.Random, things: dict, count: int) -> tuple[Image.Image, list[tuple[str, list[int]]]]:
    """An image of `count` different things and (code, [x, y, width, height]) of each; none covers another."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(200, 255) for _ in range(3)))
    boxes: list[tuple[str, list[int]]] = []
    for code in rng.sample(list(things), count):
        drawing, free = rng.choice(things[code]).resize((SIZE, SIZE), Image.Resampling.LANCZOS), []
        for x, y in itertools.product(range(0, SIDE - SIZE + 1, STEP), repeat=2):
            if all(abs(x - a) >= SIZE or abs(y - b) >= SIZE for _, (a, b, _, _) in boxes):
                free.append((x, y))
        if free:
            x, y = rng.choice(free)
            image.paste(drawing, (x, y), drawing)
            boxes.append((code, [x, y, SIZE, SIZE]))
    return image, boxes


def make(out: Path, split: str, count: int, seed: int) -> None:
    rng, things, codes = random.Random(f"{seed} {split}"), drawings(), list(CLASSES)
    (out / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(count):
        image, boxes = canvas(rng, things, rng.randint(1, THINGS) if split == "train" else THINGS)
        name = f"{split}/{n:04d}.png"
        image.save(out / name)
        images.append({"id": n, "file_name": name, "width": SIDE, "height": SIDE})
        for code, box in boxes:
            about = {"id": len(annotations), "image_id": n, "category_id": codes.index(code)}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": n, "name": name} for n, name in enumerate(CLASSES.values())]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="training canvases")
    parser.add_argument("--val", type=int, default=100, help="validation canvases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.train, args.val) < 1:
        parser.error("--train and --val: expected at least 1")
    try:
        make(args.out, "train", args.train, args.seed)
        make(args.out, "val", args.val, args.seed)
    except OSError as e:
        print(f"error: {e.filename}: {e.strerror}; name another folder", file=sys.stderr)
        return 1
    print(f"{args.train} + {args.val} canvases of {THINGS} emoji in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
