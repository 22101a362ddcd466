"""Answers a question about images with the programs of a static package; no model code is needed.

    python package/run_static.py --image image.png --prompt "What is this?"

It lies in the package, beside package.json (what stands around a question, how an answer ends), the weights
and three programs made by export.py: images -> features, prompt -> logits and rows, token and rows -> logits
and row. It needs torch, numpy, pillow, safetensors and tokenizers. Decoding is greedy, one question a start.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import argparse
import hashlib
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from images import open_image


class JSONTokenizer:
    """tokenizer.json of the tokenizers library."""

    def __init__(self, directory: Path, skip_special: bool):
        self.model, self.skip = Tokenizer.from_file(str(directory / "tokenizer.json")), skip_special

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=self.skip)


class Package:
    """What a package's JSON says, its tokenizer and its programs."""

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        self.spec = spec = read_spec(directory)
        made = spec["made_with"]
        # A program is torch's own, and machine code the CPU's: another would fail without a word, or worse.
        if made["torch"] != torch.__version__:
            raise ValueError(f"the package is made with torch {made['torch']}, here is {torch.__version__}")
        if spec["compiled"] and made["cpu"] != (here := torch.backends.cpu.get_cpu_capability()):
            raise ValueError(f"the programs are compiled for {made['cpu']}, this CPU has {here}; export here")
        if missing := [name for name in spec["files"] if not (directory / name).is_file()]:
            raise ValueError(f"{directory} lacks {', '.join(missing)}; export it again")
        if changed := [name for name, known in spec["files"].items() if digest(directory / name) != known]:
            raise ValueError(f"{directory / changed[0]} has changed since it was exported; export it again")
        self.tokenizer = tokenizer_of(directory, spec)
        weights = load_file(directory / "weights.safetensors")
        self.vision, self.prefill, self.decode = (
            load_program(directory / f"{name}.pt2", spec["compiled"], spec["constants"], weights)
            for name in ("vision", "prefill", "decode")
        )

    def load_image(self, source: str) -> torch.Tensor:
        """(3, H, W) fp32, normalised: the aspect ratio is not kept, PIL's bicubic rounds to 8 bits."""
        height, width = self.spec["image_size"]
        image = open_image(source).resize((width, height), 3)
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        mean, std = (np.array(self.spec[key], dtype=np.float32) for key in ("mean", "std"))
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))

    def inputs(self, prompt: str, num_images: int) -> tuple[torch.Tensor, ...]:
        """-> ids (T,), positions (T,) or (2, T), the images' places (N, Q), how many tokens all see (1,)."""
        ids, starts = prompt_ids(self.spec["template"], self.tokenizer, prompt, num_images)
        T, Q = len(ids), self.spec["num_image_tokens"]
        positions, seen = torch.arange(T), 0
        # the last token begins the answer, at the place of the one before
        if self.spec["position_axes"] == 2:
            seen = T - 1
            positions = torch.stack((positions.clamp(max=T - 2), (positions == T - 1).long()))
        places = torch.tensor(starts or [T])[:, None] + torch.arange(Q) * bool(starts)
        return torch.tensor(ids), positions, places, torch.tensor([seen])

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        images: list[str],
        max_new_tokens: int,
        choose: Callable[[torch.Tensor], int] = lambda logits: int(logits.argmax()),
    ) -> list[int]:
        """The answer's ids, an end mark included; `choose` takes a token by its logits (V,)."""
        spec, dtype = self.spec, getattr(torch, self.spec["dtype"])
        ids, positions, places, seen = self.inputs(prompt, len(images))
        T, Q = len(ids), spec["num_image_tokens"]
        if (limit := spec["max_positions"]) is not None:
            if T >= limit:
                raise ValueError(f"the prompt has {T} tokens, but the model {limit} positions; shorten it")
            max_new_tokens = min(max_new_tokens, limit - T)
        # one image a call, then all their rows; without an image rows that stand nowhere
        features = [self.vision(self.load_image(image)[None]).flatten(0, 1) for image in images]
        features = torch.cat(features or [torch.zeros(Q, spec["hidden_size"], dtype=dtype)])
        logits, rows, *memory = self.prefill(ids, positions, features, places.flatten(), seen)
        # all rows that there will be, side by side: a step takes the first of them as they are
        pool = torch.empty(len(rows) + max_new_tokens, *rows.shape[1:], dtype=rows.dtype)
        pool[: len(rows)] = rows
        length, answer = len(rows), []
        position, step, T = positions[..., -1:], torch.tensor(spec["position_step"]), torch.tensor([T])
        while True:
            if not logits.isfinite().all():
                raise ValueError("the logits are NaN or infinite; export the model again in float32")
            token = choose(logits)
            answer.append(token)
            if len(answer) == max_new_tokens or self.ended(ids, answer):
                return answer
            position = position + step
            past = (pool[:length], *(x.contiguous() for x in memory)) if memory else (pool[:length], None)
            logits, row = self.decode(torch.tensor([token]), position, T, *past)
            pool[length] = row[0]
            length += 1

    def ended(self, ids: torch.Tensor, answer: list[int]) -> bool:
        """Whether all ids end with a stop word."""
        longest = max(map(len, self.spec["stop_words"]))
        last = (ids[-longest:].tolist() + answer)[-longest:]
        return any(last[-len(word) :] == word for word in self.spec["stop_words"])

    def text(self, ids: list[int]) -> str:
        ends = {word[-1] for word in self.spec["stop_words"]}
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:stop]).strip()
        for pattern, new in self.spec["template"]["cleanup"]:
            text = re.sub(pattern, new, text)
        return text


ENDS = 32 << 20  # bytes


def digest(path: Path) -> str:
    """Of a file's first and last 32 MB, and of its length: all of it but for large weights, whose reading
    would take as long as the answer."""
    with open(path, "rb") as file:
        found, length = hashlib.sha256(file.read(ENDS)), file.seek(0, 2)
        file.seek(max(ENDS, length - ENDS))
        found.update(file.read() + str(length).encode())
    return found.hexdigest()


def seal(spec: dict) -> str:
    """Of all that package.json says but of this."""
    said = {key: value for key, value in spec.items() if key != "seal"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_spec(directory: Path) -> dict:
    path = directory / "package.json"
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} has no package.json; name a package of export.py") from None
    except (ValueError, RecursionError):  # no text, no JSON
        spec = None
    if not isinstance(spec, dict) or spec.get("seal") != seal(spec):
        raise ValueError(f"{path} is damaged or has been changed; export it again")
    return spec


def tokenizer_of(directory: Path, spec: dict):
    """The package's tokenizer: a file of the tokenizers library, or a class that lies beside."""
    if spec["tokenizer"] is None:
        return JSONTokenizer(directory, spec["template"]["skip_special"])
    module, name = spec["tokenizer"].split(".")
    return getattr(importlib.import_module(module), name)(directory)


def load_program(path: Path, compiled: bool, constants: dict[str, dict], weights: dict) -> Callable:
    """A program with the weights that it shares with the others."""
    names = constants[path.stem]  # its constants -> their tensors' names
    mine = {constant: weights[name] for constant, name in names.items()}
    if compiled:
        program = torch._inductor.aoti_load_package(str(path))
        # A compiled program has folded some of its constants, and takes no others.
        wanted = set(program.get_constant_fqns())
        mine = {constant: tensor for constant, tensor in mine.items() if constant in wanted}
        program.load_constants(mine, check_full_update=True, user_managed=True)
        return program
    program = torch.export.load(path)
    for name, tensor in program.state_dict.items():
        parameter = isinstance(tensor, torch.nn.Parameter)
        program.state_dict[name] = (
            torch.nn.Parameter(mine[name], requires_grad=False) if parameter else mine[name]
        )
    return program.module()


def prompt_ids(template: dict, tokenizer, prompt: str, num_images: int) -> tuple[list[int], list[int]]:
    """Ids of a question about images, and the first place of each image's features."""
    # What the model's own file refuses is refused here: it was never trained on it.
    least, most = template["images"]
    if num_images < least or (most is not None and num_images > most):
        expected = f"{least}" if least == most else f"{least} to {most}" if most else f"at least {least}"
        raise ValueError(f"{num_images} images; this model takes {expected}")
    if mark := next((mark for mark in template["reserved"] if mark in prompt), None):
        raise ValueError(f"the prompt holds {mark!r}, a mark of the model's own; leave it out")
    if any(0xD800 <= ord(c) < 0xE000 for c in prompt):
        raise ValueError("the prompt is no valid UTF-8; write it again")
    ids, starts, text = list(template["start"]), [], ""
    for number in range(1, num_images + 1):
        ids += tokenizer.encode(text + template["image_text"].replace("{number}", str(number)))
        starts.append(len(ids) + template["first_place"])
        ids += template["image"]
        text = template["gap"]
    text += template["text"].replace("{prompt}", prompt)
    return ids + tokenizer.encode(text) + template["end"], starts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--package", default=str(here), help="directory of the package (default: this one)")
    parser.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args(argv)
    if not 1 <= args.max_new_tokens <= 1 << 16:
        raise ValueError(f"max_new_tokens={args.max_new_tokens}; expected 1 to {1 << 16}")
    package, times = Package(args.package), [time.perf_counter()]

    def greedy(logits: torch.Tensor) -> int:
        times.append(time.perf_counter())
        return int(logits.argmax())

    ids = package.generate(args.prompt, args.image, args.max_new_tokens, greedy)
    print(package.text(ids))
    rate = f", then {(len(ids) - 1) / (times[-1] - times[1]):,.0f} tokens/s" if len(ids) > 1 else ""
    print(f"first token after {1000 * (times[1] - times[0]):,.0f} ms{rate}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")
