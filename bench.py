"""What a user would pick instead, side by side: transformers and peft, torch's own kernels, plain loading.

    python bench.py train     # LoRA steps against transformers + peft, full steps against their products
    python bench.py generate  # greedy and beams against transformers, and against the reading of the weights
    python bench.py load      # a checkpoint into parameters against load_file + copy_
    python bench.py start     # imports, and the index of a set of records
    python bench.py kernels   # attention, loss, norm against torch's own
    python bench.py gpu --json gpu.json  # the first ten minutes on a GPU: parity, speed, memory, launches

Alternatives take turns and are timed several times; the median of the rounds' ratios counts. Nothing is
reported of alternatives whose losses, gradient norms, weights or tokens differ. transformers and peft come
with requirements-dev.txt. bench_timing.py says how, bench_kernels.py holds the last two commands.
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import functools
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import build
import checkpoint
import config
import data
import generate
import lora
import parallel
import terminal
import train
import vlm
from bench_timing import Products, Row, agree, median, peak_memory, read_bandwidth, report, rounds, row_of
from build import StreamSizes
from kernels.linear import pack

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Models of a middle size (28 to 60 million parameters), and the same code at the smallest


def blip2_config(small: bool) -> dict:
    base = checkpoint.read_config(ROOT / "samples/tiny_blip2") | {"torch_dtype": "float32"}
    # streams are longer here than the sample's table of positions
    text = base["text_config"] | {"max_position_embeddings": 1024}
    if small:
        return base | {"text_config": text}
    inner = {"hidden_size": 256, "intermediate_size": 1024}
    vision = base["vision_config"] | inner | {"num_hidden_layers": 6, "image_size": 112, "patch_size": 14}
    qformer = base["qformer_config"] | inner | {"encoder_hidden_size": 256}
    text |= {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 8}
    # OPT's own vocabulary; in a model of this size it weighs more than in the published ones
    text |= {"num_attention_heads": 8, "vocab_size": 50_272}
    parts = {"vision_config": vision, "qformer_config": qformer, "text_config": text}
    return base | parts | {"num_query_tokens": 32, "image_token_index": 50_271}


def qwen_vl_config(small: bool) -> dict:
    base = checkpoint.read_config(ROOT / "samples/tiny_qwen_vl")
    if small:
        return base
    visual = base["visual"] | {"width": 256, "layers": 4, "output_dim": 512, "image_start_id": 8000}
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4, "kv_channels": 128}
    return (
        base | sizes | {"intermediate_size": 4096, "vocab_size": 8192, "seq_length": 2048, "visual": visual}
    )


def visualglm_config(small: bool) -> dict:
    base = checkpoint.read_config(ROOT / "samples/tiny_visualglm")
    if small:
        return base
    return base | {"hidden_size": 512, "inner_hidden_size": 2048, "num_layers": 8, "num_attention_heads": 8}


CONFIGS = {"qwen_vl": qwen_vl_config, "blip2": blip2_config, "visualglm": visualglm_config}


def write_model(directory: Path, values: dict, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint directory of random weights. Vectors are drawn too, so that no norm or bias is trivial."""
    directory.mkdir(parents=True)
    checkpoint.write_json(directory / "config.json", values)
    definition = vlm.find(values)
    shapes = {name: p.shape for name, p in definition.network(values).named_parameters()}

    def tensors():
        for name, shape in shapes.items():
            matrix = len(shape) > 1
            t = torch.randn(shape, generator=build.named_generator(0, name)) * (0.05 if matrix else 0.1)
            yield name, (t + 1 if not matrix and name.endswith("weight") else t).to(dtype)

    checkpoint.save_weights(directory, tensors())
    return directory


def write_adapter(directory: Path, base: Path, rank: int) -> Path:
    """A LoRA adapter whose two factors are both drawn, so that both get a gradient."""
    values = checkpoint.read_config(base)
    definition = vlm.find(values)
    model = definition.network(values)
    names = lora.inject(model, definition.lora_targets, rank, 2 * rank, 0.05)

    def tensor(name: str) -> Tensor:
        shape = dict(model.named_parameters())[name].shape
        return torch.randn(shape, generator=build.named_generator(1, name)) * 0.05

    directory.mkdir(parents=True)
    made = lora.LoraConfig(base, rank, 2 * rank, 0.05)
    lora.save_adapter(directory, model, made, names, [], tensor)
    return directory


# --------------------------------------------------------------------------------------------------
# Training


@dataclass
class Work:
    """Samples of one step: tokens of each behind its image."""

    name: str
    lengths: list[int]
    dropout: bool = False
    dtype: torch.dtype = torch.float32

    def padding(self, image_tokens: int) -> float:
        whole = [n + image_tokens for n in self.lengths]
        return 1 - sum(whole) / len(whole) / max(whole)


WORKS = [
    Work("VQA + captions + chat", [12, 14, 10, 16, 13, 9, 11, 15, 12, 17, 10, 14, 150, 230, 110, 190]),
    Work("chat", [300, 120, 190, 250, 90, 160, 210, 280, 100, 140, 180, 170, 130, 220, 150, 200]),
    Work("VQA + captions", [8, 10, 12, 14, 9, 11, 13, 15, 8, 12, 10, 14, 16, 9, 11, 13]),
    Work("equal lengths", [96] * 16),
    Work("equal lengths, dropout", [96] * 16, dropout=True),
    Work("VQA + captions + chat, bf16", [12, 14, 10, 16, 13, 9, 11, 15, 150, 230], dtype=torch.bfloat16),
]


def samples_of(lengths: list[int], values: dict) -> list[vlm.Sample]:
    """BLIP-2's samples for both sides: an image's places, then so many tokens, as data.collate takes them."""
    g = torch.Generator().manual_seed(len(lengths))
    Q, slot, side = (
        values["num_query_tokens"],
        values["image_token_index"],
        values["vision_config"]["image_size"],
    )
    samples = []
    for number, n in enumerate(lengths):
        text = torch.randint(4, slot, (n,), generator=g)
        text[0] = values["text_config"]["bos_token_id"]
        pixels = torch.randn(3, side, side, generator=g)
        sample = as_sample(torch.cat((torch.full((Q,), slot), text)), Q, learned_of(n), pixels)
        samples.append(sample | {"key": (0, 0, number)})
    return samples


def learned_of(words: int) -> int:
    """As many of a text's last tokens as a conversation's answers are of it."""
    return max(1, int(0.4 * words))


def as_sample(ids: Tensor, image_tokens: int, learned: int, pixels: Tensor) -> vlm.Sample:
    """The last `learned` tokens have labels, which data.collate shifts."""
    labels = ids.clone()
    labels[: len(ids) - learned] = data.IGNORE
    sample = {"input_ids": ids.numpy(), "labels": labels.numpy(), "num_image_tokens": image_tokens}
    return sample | {"image_starts": [0], "images": [""], "pixel_values": [pixels]}


def padded(samples: list[vlm.Sample], pad: int, left: bool = False) -> dict[str, Tensor]:
    """What transformers take: rows of the longest one's length."""
    ids, labels = ([torch.from_numpy(x[name]) for x in samples] for name in ("input_ids", "labels"))
    rows = {"input_ids": (ids, pad), "labels": (labels, data.IGNORE)}
    rows["attention_mask"] = [torch.ones_like(x) for x in ids], 0
    side = "left" if left else "right"
    found = {
        name: nn.utils.rnn.pad_sequence(x, True, value, padding_side=side)
        for name, (x, value) in rows.items()
    }
    return found | {"pixel_values": torch.stack([x["pixel_values"][0] for x in samples])}


def world_of(dtype: torch.dtype) -> parallel.World:
    """Of one process; 16-bit weights with fp32 copies are kept by a process group."""
    if dtype == torch.float32:
        return parallel.World(0, 1, CPU)
    parallel.leave_world()  # a row before may have left one
    return parallel.init_world()


def our_model(base: Path, adapter: Path | None, dtype: torch.dtype) -> nn.Module:
    """As train.py makes it ready."""
    sixteen = dtype == torch.bfloat16
    settings = {"lora": True, "lora_path": str(adapter), "lora_rank": 8} if adapter else {}
    cfg = config.Config(model_name_or_path=str(base), bf16=sixteen, fp16_opt_level="O2", **settings)
    return build.build(cfg, base, world_of(dtype), StreamSizes(1, 1, 1, 1)).model


def our_step(
    model: nn.Module, batch: vlm.Batch, dropout: bool, world: parallel.World | None = None
) -> Callable[[], tuple[float, float]]:
    """A step as train.py takes it, the weights unchanged; gives the loss and the gradient's norm."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # a rate of zero: each step computes the same
    optimizer = build.make_optimizer(model, config.Config(learning_rate=0.0, weight_decay=0.0))
    world, scaler = world or parallel.World(0, 1, CPU), train.LossScaler(False)
    model.train(dropout)

    def step():
        loss_sum, _ = model(batch)
        loss = loss_sum.sum() / batch.num_supervised
        loss.backward()
        return loss.item(), float(train.clip_and_step(trained, optimizer, 1.0, scaler, world))

    return step


def their_model(base: Path, adapter: Path | None, values: dict, dtype: torch.dtype) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    # of each load it prints a table and a bar
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(base, dtype=dtype)
        model.config.image_token_index = model.config.image_token_id = values["image_token_index"]
        if adapter is None:
            return model.eval()
        import peft

        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def their_step(model: nn.Module, inputs: dict, dropout: bool) -> Callable[[], tuple[float, float]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    model.train(dropout)

    def step():
        loss = model(**inputs).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def lora_rows(folder: Path, args) -> Iterator[Row]:
    """BLIP-2 with LoRA on OPT, against transformers + peft on the same samples, padded."""
    values = blip2_config(args.small)
    base = write_model(folder / "blip2", values)
    adapter = write_adapter(folder / "adapter", base, 8)
    Q, pad = values["num_query_tokens"], values["text_config"]["pad_token_id"]
    works = [w for w in WORKS if args.only in w.name]
    if args.small:
        works = [replace(w, lengths=w.lengths[-2:]) for w in works]
    us, them = "ours", "transformers + peft"
    models: dict[tuple, nn.Module] = {}

    def step_of(side: str, work: Work, dropout: bool) -> Callable:
        samples, key = samples_of(work.lengths, values), (side, work.dtype)
        if key not in models:
            theirs = base, adapter, values, work.dtype
            models[key] = our_model(base, adapter, work.dtype) if side == us else their_model(*theirs)
        if side == us:
            return our_step(models[key], data.collate(samples), dropout)
        inputs = padded(samples, pad)
        inputs["pixel_values"] = inputs["pixel_values"].to(work.dtype)
        return their_step(models[key], inputs, dropout)

    import peft  # noqa: F401  (here, so that neither side's memory holds the packages)
    import transformers  # noqa: F401

    memory = {}
    for work in works:  # each forks: before anything is computed in this process
        for side in (us, them):
            prepare = functools.partial(step_of, side, work, work.dropout)
            memory[work.name, side] = peak_memory(prepare)
    for work in works:
        allowed = 1e-4 if work.dtype == torch.float32 else 3e-2
        ours, theirs = (step_of(side, work, False)() for side in (us, them))  # no two dropouts are equal
        agree(f"{work.name}: loss", ours[0], theirs[0], allowed)
        agree(f"{work.name}: gradient norm", ours[1], theirs[1], 10 * allowed)
        sides = {side: step_of(side, work, work.dropout) for side in (us, them)}
        sides["products"] = Products.of(sides[us]).replay  # the floor
        more = {"loss": ours[0], f"{us}, peak MB above the weights": memory[work.name, us] / 1e6}
        more[f"{them}, peak"] = memory[work.name, them] / memory[work.name, us]
        what = f"LoRA step, BLIP-2 OPT, {work.name}, {work.padding(Q):.0%} padding for them"
        yield row_of(what, rounds(sides, args.rounds), "products", **more)


def random_sample(model: nn.Module, words: int, learned: int, g: torch.Generator) -> vlm.Sample:
    """Random tokens behind an image, of any model; the last ones are learned."""
    T, axes = model.num_image_tokens + words, model.position_axes
    ids = torch.randint(model.config.vocab_size // 2, (T,), generator=g)
    pixels = torch.randn(3, *model.image_size, generator=g)
    sample = as_sample(ids, model.num_image_tokens, learned, pixels)
    if axes > 1:
        sample["position_ids"] = np.stack([np.arange(T), *[np.zeros(T, int)] * (axes - 1)])
    if model.prefill == "whole":
        sample["prefix_len"] = T - learned
    return sample


def random_stream(model: nn.Module, lengths: list[int]) -> vlm.Batch:
    g = torch.Generator().manual_seed(0)
    return data.collate([random_sample(model, n, learned_of(n), g) for n in lengths])


def full_rows(folder: Path, args) -> Iterator[Row]:
    """A full fine-tuning step of each model against the products in it."""
    for kind, make in CONFIGS.items():
        name = f"full step, {kind}"
        if args.only not in name:
            continue
        base = folder / f"full_{kind}"
        write_model(base, make(args.small))
        model = our_model(base, None, torch.float32)
        step = our_step(model, random_stream(model, [20, 30] if args.small else WORKS[0].lengths), False)
        times = rounds({"ours": step, "products": Products.of(step).replay}, args.rounds)
        parameters = sum(p.numel() for p in model.parameters())
        yield row_of(f"{name}, {parameters / 1e6:.0f}M parameters", times, "products")


def train_command(folder: Path, args) -> Iterator[Row]:
    try:
        yield from lora_rows(folder, args)
        yield from full_rows(folder, args)
    finally:
        parallel.leave_world()


# --------------------------------------------------------------------------------------------------
# Generation

QUESTIONS = {
    "greedy, batch 1": ([24], 1),
    "greedy, batch 8, equal": ([24] * 8, 1),
    "greedy, batch 8, ragged": ([8, 200, 16, 40, 12, 120, 24, 10], 1),
    "beams 5, batch 1": ([24], 5),
    "beams 5, batch 4, ragged": ([8, 120, 16, 40], 5),
}


def generate_command(folder: Path, args) -> Iterator[Row]:
    """Answers of a fixed length against transformers' generate on left-padded rows. Floors: a step's
    products, and reading the weights once a step at the measured bandwidth."""
    values = blip2_config(args.small)
    base = write_model(folder / "blip2", values)
    ours = generate.load_model(base)
    theirs = their_model(base, None, values, torch.float32)
    theirs.generation_config.eos_token_id = theirs.language_model.generation_config.eos_token_id = None
    pad, new = values["text_config"]["pad_token_id"], 4 if args.small else 32
    read = sum(p.numel() * 4 for block in ours.blocks for p in block.parameters())
    read += 4 * ours.config.vocab_size * ours.config.hidden_size
    bandwidth = read_bandwidth(read)
    pack(ours)  # as generate.py does, after the weights' bytes are counted
    for name, (lengths, beams) in QUESTIONS.items():
        if args.only not in name:
            continue
        lengths = [max(2, n // 8) for n in lengths] if args.small else lengths
        requests = samples_of(lengths, values)
        inputs = {k: x for k, x in padded(requests, pad, left=True).items() if k != "labels"}

        def we(requests=requests, beams=beams):
            if beams == 1:
                return generate.generate(ours, requests, generate.Decoding(new), [])
            how = generate.Decoding(new, num_beams=beams)
            return [found[0][1] for found in generate.beam_search(ours, requests, how, [])]

        def they(inputs=inputs, beams=beams):
            options = {"max_new_tokens": new, "do_sample": False, "num_beams": beams, "pad_token_id": pad}
            with torch.no_grad():
                out = theirs.generate(**inputs, **options)
            return out[:, -new:].tolist()

        if we() != they():
            raise ValueError(f"{name}: the tokens differ; what computes something else is not timed")
        times = rounds({"ours": we, "transformers": they, "products": Products.of(we).replay}, args.rounds)
        seconds = median(times, "ours", wall=True)
        share = read * new / bandwidth / seconds
        yield row_of(
            name,
            times,
            "products",
            **{"tokens/s": new * len(lengths) / seconds, "share of the reading bandwidth": share},
        )
    yield Row("measured reading bandwidth", {"GB/s": bandwidth / 1e9, "weights a step, MB": read / 1e6})


# --------------------------------------------------------------------------------------------------
# Loading


def load_command(folder: Path, args) -> Iterator[Row]:
    """A checkpoint into parameters that exist, checked, against load_file + copy_ (and no check)."""
    for dtype in (torch.float32, torch.bfloat16):
        name = f"loading {str(dtype).removeprefix('torch.')}"
        if args.only in name:
            yield load_row(name, dtype, folder / name, args)


def load_row(name: str, dtype: torch.dtype, directory: Path, args) -> Row:
    from safetensors.torch import load_file

    width = 64 if args.small else 2048
    shapes = {f"{n}.weight": (width, 2 * width) for n in range(2 if args.small else 24)}
    shapes |= {f"{n}.bias": (width,) for n in range(8)}
    directory.mkdir()
    checkpoint.save_weights(directory, ((n, torch.randn(s).to(dtype)) for n, s in shapes.items()))
    file = directory / "model.safetensors"

    def parameters() -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    def ours(into):
        checkpoint.load_into(into, checkpoint.open_weights(directory))

    def theirs(into):
        for name, tensor in load_file(file).items():
            into[name].copy_(tensor)

    sides = {"ours": ours, "load_file + copy_": theirs}

    def call(side: str) -> Callable:
        into = parameters()
        return lambda: sides[side](into)

    memory = {side: peak_memory(lambda side=side: call(side)) for side in sides}
    into = {side: parameters() for side in sides}
    for side, load in sides.items():
        load(into[side])
    for n in shapes:
        if not torch.equal(*(into[side][n] for side in sides)):
            raise ValueError(
                f"{name}, {n}: the loaded weights differ; what loads something else is not timed"
            )
    source = load_file(file)  # the floor: its pages are in memory, and are copied alone
    timed = {side: lambda side=side: sides[side](into[side]) for side in sides}
    timed["copy"] = lambda: [into["ours"][n].copy_(tensor) for n, tensor in source.items()]
    peaks = {f"{side}, peak MB above the parameters": m / 1e6 for side, m in memory.items()}
    times = rounds(timed, args.rounds)
    return row_of(f"{name}, {file.stat().st_size / 1e6:,.0f} MB in the page cache", times, "copy", **peaks)


# --------------------------------------------------------------------------------------------------
# Start: imports, the index of a set


def spent(command: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds of a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{' '.join(command)} ended with code {code}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def start_command(folder: Path, args) -> Iterator[Row]:
    imports = {
        "ours": "import train, model_qwen_vl",
        "transformers + peft": "import transformers, peft; transformers.Blip2ForConditionalGeneration",
        "torch": "import torch",
    }
    if args.only in (name := "importing train.py and a model"):
        times = {side: [] for side in imports}
        for i in range(args.rounds + 1):  # the first fills the page cache and writes .pyc files
            for side, text in imports.items():
                seconds = spent([sys.executable, "-c", text])
                if i:
                    times[side].append(seconds)
        yield row_of(name, times, "torch")
    if args.only in "index of JSONL records":
        yield from index_rows(folder, args)


def index_rows(folder: Path, args) -> list[Row]:
    """The length index of JSONL records, one process; floor: reading the JSON and tokenising the texts."""
    count = 200 if args.small else 20_000
    path, processor = folder / "records.jsonl", data.load_processor(str(ROOT / "samples/tiny_qwen_vl"))
    image = ROOT / "samples/images/digits/0001.png"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            record = {
                "image": str(image),
                "question": f"what digit is it, number {i}?",
                "answer": f"a {i % 10}",
            }
            file.write(json.dumps(record) + "\n")
    lines = path.read_text(encoding="utf-8").splitlines()

    def ours():
        return data.build_index([{"data_files": str(path)}], processor, 512, None, 0, progress=False)

    def floor():
        for line in lines:
            record = json.loads(line)
            processor.tokenizer.encode(f"{record['question']}{record['answer']}")

    if len(ours()) != count:
        raise ValueError("the index lacks records; what reads something else is not timed")
    times = rounds({"ours": ours, "JSON and tokens": floor}, args.rounds)
    found = row_of(f"index of {count:,} JSONL records, one process", times, "JSON and tokens")
    found.figures["microseconds a record"] = 1e6 * median(times, "ours") / count
    return [found]


# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    commands = {"train": train_command, "generate": generate_command, "load": load_command}
    commands |= {"start": start_command, "kernels": None, "gpu": None}
    parser.add_argument("command", choices=commands, help="what is measured")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each row")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--small", action="store_true", help="the smallest size of everything: does it run")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; expected 1 or more")
    if args.json:
        checkpoint.check_place(args.json, "--json")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.command in ("kernels", "gpu"):
        import bench_kernels

        commands |= {"kernels": bench_kernels.kernels_command, "gpu": bench_kernels.gpu_command}
    with tempfile.TemporaryDirectory() as folder:
        try:
            count = report(args.command, commands[args.command](Path(folder), args), args.json)
        except ModuleNotFoundError as e:
            if e.name not in ("transformers", "peft"):
                raise
            raise ValueError(
                f"there is no {e.name} to compare with: pip install -r requirements-dev.txt"
            ) from e
    if not count:
        raise ValueError(f"--only {args.only!r}: no row of {args.command} has that in its name")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
