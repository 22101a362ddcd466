"""The programs of a static package: a model as three graphs that run without its code.

    python export.py --model_name_or_path merged --output_dir package --format static
    python package/run_static.py --image image.png --prompt "What is this?"
    python export_static.py --package package --model_name_or_path merged --image image.png  # both in turns

`vision` (image -> features), `prefill` (a prompt -> logits and rows of the cache) and `decode` (a token and
the rows before it -> logits and its row) are written once over the contract of vlm.py. Lengths and the number
of images stay open. A row of the cache is what a token leaves in all layers, so that the rows of a prompt lie
side by side and a program takes the first P of them without a copy.
"""

import python_version  # first: it says which Python is needed

import base64
import importlib.util
import io
import json
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import checkpoint
import generate
import images
import records
import run_static
import terminal
import vlm
from kernels.attention import attention_even
from kernels.linear import pack
from vlm import Batch, even_segments


class Rows:
    """A cache (engine.KVCache) of one sequence, as a program sees it: `past` (P, layers, 2, H, D) is an
    input, what the new tokens leave is an output. `memory`: the same of an encoder's tokens."""

    def __init__(self, past: Tensor | None = None, memory: Tensor | None = None):
        self.past, self.memory, self.encode = past, memory, past is None
        self.new, self.new_memory = [], []  # (T, 2, H, D) of each layer

    def attend(self, layer, q, k, v, cu_seqlens, prefix_lens=None, bias=None, tuned=None) -> Tensor:
        """What KVCache.attend computes, by shapes alone."""
        if self.past is None and tuned is not None:  # P-tuning: every sequence begins with these rows
            k, v = (torch.cat((p.to(x.dtype), x)) for p, x in zip(tuned, (k, v), strict=True))
            prefix_lens = None if prefix_lens is None else prefix_lens + tuned.shape[1]
        # Before past and mask: a row of the cache is what this token alone leaves.
        self.new.append(torch.stack((k, v), 1))
        if self.past is not None:
            k, v = (torch.cat((self.past[:, layer, i], x)) for i, x in enumerate((k, v)))
        # No branch here may depend on a length: the graph is recorded once, and holds for all of them.
        mask, causal = bias, False
        if bias is None and self.past is None:  # a step's only token sees all
            num_q, num_k = q.shape[0], k.shape[0]
            causal = prefix_lens is None and tuned is None
            if not causal:
                key = torch.arange(num_k, device=q.device)
                seen = key <= torch.arange(num_k - num_q, num_k, device=q.device)[:, None]
                mask = seen if prefix_lens is None else seen | (key < prefix_lens)
        return attention_even(q, k, v, 1, causal, mask)

    def attend_memory(self, layer, q, k, v, cu_seqlens, memory_cu_seqlens) -> Tensor:
        if k is None:
            k, v = self.memory[:, layer].unbind(1)
        else:
            self.new_memory.append(torch.stack((k, v), 1))
        return attention_even(q, k, v, 1, causal=False)

    def longest_past(self) -> int:
        return 0 if self.past is None else self.past.shape[0]

    def outputs(self) -> tuple[Tensor, ...]:
        """(T, layers, 2, H, D) of the tokens, and of an encoder's."""
        return tuple(torch.stack(layers, 1) for layers in (self.new, self.new_memory) if layers)


class Vision(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, Q, C)"""
        return self.model.encode_images(pixel_values)


class Prefill(Vision):
    def forward(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, places: Tensor, prefix: Tensor
    ) -> tuple[Tensor, ...]:
        """(T,), (T,) or (n, T), the images' features (R, C), their places (R,), (1,) -> logits (V,), rows, an
        encoder's rows. A row more than the prompt takes features that stand nowhere: those of a prompt
        without image have the place T.
        """
        # A tensor of no rows would be a graph of its own, so there is always an image, and always a place.
        T = input_ids.shape[0]
        grown = Batch(
            torch.cat((input_ids, input_ids[:1])),
            torch.cat((position_ids, position_ids[..., :1]), -1),
            even_segments(1, T + 1),
            image_features=features[None],
            image_positions=places[None],
        )
        x = self.model.embed(grown)[:T]
        cache = Rows()
        batch = Batch(input_ids, position_ids, even_segments(1, T), prefix_lens=prefix, cache=cache)
        if not self.whole:
            batch.prefix_lens = None
        hidden = self.model.hidden(batch, x)
        return self.model.logits(hidden[-1:])[0], *cache.outputs()

    @property
    def whole(self) -> bool:
        """Whether a prompt's tokens see later ones."""
        return self.model.prefill == "whole"


class Decode(Vision):
    def forward(
        self, input_ids: Tensor, position_ids: Tensor, length: Tensor, past: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(1,), (1,) or (n, 1), the prompt's length (1,), (P, layers, 2, H, D), an encoder's -> logits (V,),
        row."""
        cache = Rows(past, memory)
        segment = even_segments(1, 1)
        batch = Batch(input_ids, position_ids, segment, rope_lengths=length, cache=cache)
        logits = self.model.logits(self.model.hidden(batch, self.model.embed(batch)))
        return logits[0], *cache.outputs()


@torch.no_grad()
def programs(model: nn.Module) -> dict[str, ExportedProgram]:
    """The three graphs. An example's sizes say nothing, but for 0 and 1, which are taken for constants. Its
    tensors are contiguous, as all that the runner gives: compiled programs rely on the strides."""
    axes, Q = model.position_axes, model.num_image_tokens
    pixels = torch.zeros(1, 3, *model.image_size)
    vision = torch.export.export(Vision(model), (pixels,))
    # Two images and seven other tokens: no two sizes of the example are equal by chance.
    T, open_size = 7 + 2 * Q, Dim("tokens", min=3)
    ids, positions = torch.full((T,), 5), torch.arange(T).expand(axes, T).contiguous()
    positions = positions if axes > 1 else positions[0]
    features = torch.cat([model.encode_images(pixels).flatten(0, 1)] * 2)
    example = ids, positions, features, torch.arange(2 * Q), torch.tensor([T - 1])
    images = {0: Dim("image_rows", min=2)}
    shapes = {0: open_size}, {axes - 1: open_size}, images, images, {}
    prefill = torch.export.export(Prefill(model), example, dynamic_shapes=shapes)
    _, past, *memory = Prefill(model)(*example)
    # An encoder-decoder's prompt leaves one row, which would be taken for a constant.
    past = past if past.shape[0] > 1 else torch.cat((past, past, past))
    example = ids[:1], positions[..., :1].contiguous(), torch.tensor([T]), past, *(memory or [None])
    shapes = {}, {}, {}, {0: Dim("rows", min=1)}, {0: Dim("encoded", min=2)} if memory else None
    decode = torch.export.export(Decode(model), example, dynamic_shapes=shapes)
    return {"vision": vision, "prefill": prefill, "decode": decode}


# --------------------------------------------------------------------------------------------------
# The package


def write(model: nn.Module, processor, source: Path, directory: Path, compile: str) -> None:
    """Programs, weights, tokenizer and the runner, which words a question as the model's file does.

    compile: "yes", "no", or "auto", which compiles where there is a C++ compiler.
    """
    if not hasattr(processor, "template"):
        raise ValueError(f"{type(processor).__name__} has no template(): its wording can't go into a package")
    template = processor.template()
    compiled = compile == "yes" or compile == "auto" and has_compiler()
    if compile == "auto" and not compiled:
        print("note: no C++ compiler (g++): the programs stay graphs, which torch runs step by step")
    # The weights once, beside the programs: three copies of a 7B model would not fit many disks.
    graphs = programs(model)
    constants, weights = shared_weights(graphs)
    save_file(weights, directory / "weights.safetensors", metadata={"format": "pt"})
    for name, graph in graphs.items():
        write_program(graph, directory / f"{name}.pt2", compiled)
    spec = {
        "model": type(model).__name__,
        "made_with": {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()},
        "compiled": compiled,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "hidden_size": model.config.hidden_size,
        "num_image_tokens": model.num_image_tokens,
        "image_size": list(model.image_size),
        "mean": checkpoint.MEAN,
        "std": checkpoint.STD,
        "max_positions": model.config.max_positions,
        "position_axes": model.position_axes,
        "position_step": torch.as_tensor(model.position_step).tolist(),
        # How a question is worded and an answer ends: nothing of the model's code is in the package.
        "stop_words": processor.stop_words,
        "template": template,
        "tokenizer": write_tokenizer(processor.tokenizer, source, directory),
        "constants": constants,
    }
    spec["files"] = {p.name: run_static.digest(p) for p in sorted(directory.iterdir()) if p.suffix != ".py"}
    spec = json.loads(json.dumps(spec))  # as it will be read
    checkpoint.write_json(directory / "package.json", spec | {"seal": run_static.seal(spec)})
    for file in (run_static.__file__, images.__file__, python_version.__file__):
        shutil.copyfile(file, directory / Path(file).name)
    check_wording(spec, processor, directory)
    check_programs(model, directory)


def has_compiler() -> bool:
    """Whether torch finds the C++ compiler that its own programs for a CPU need."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def shared_weights(graphs: dict[str, ExportedProgram]) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """{program: {its constant: name of a tensor}} and the tensors, each once though programs share them."""
    constants, weights, known = {}, {}, {}
    for program, graph in graphs.items():
        tensors = {**graph.state_dict, **{n: t for n, t in graph.constants.items() if isinstance(t, Tensor)}}
        constants[program] = {}
        for name, tensor in tensors.items():
            # By memory, not by name: tied weights have two names and one place.
            key = known.setdefault((tensor.data_ptr(), tensor.shape), name)
            constants[program][name] = key
            weights[key] = tensor.detach().contiguous()
    return constants, weights


def write_program(graph: ExportedProgram, path: Path, compiled: bool) -> None:
    """Without its weights: they lie in one file for all three."""
    if not compiled:
        for name, tensor in graph.state_dict.items():
            empty = tensor.detach().new_empty(0)
            parameter = isinstance(tensor, nn.Parameter)
            graph.state_dict[name] = nn.Parameter(empty, requires_grad=False) if parameter else empty
        torch.export.save(graph, path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            graph, package_path=str(path), inductor_configs={"aot_inductor.package_constants_in_so": False}
        )


def write_tokenizer(tokenizer, source: Path, directory: Path) -> str | None:
    """tokenizer.json; of a tokenizer that is no such file its class, as module.name, and what that reads."""
    if hasattr(tokenizer, "to_json"):
        (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        return None
    module = type(tokenizer).__module__
    for name in (module, "schema"):  # it imports nothing else of ours
        shutil.copyfile(importlib.util.find_spec(name).origin, directory / f"{name}.py")
    checkpoint.copy_side_files(source, directory)
    return f"{module}.{type(tokenizer).__name__}"


QUESTIONS = ("What is this?", "  这是什么？\n\n1 + 2 =", "naïve cafe\u0301 \t x", ".")


def check_wording(spec: dict, processor, directory: Path) -> None:
    """ValueError unless the runner makes the ids that the model's file makes."""
    template, tokenizer = spec["template"], run_static.tokenizer_of(directory, spec)
    least, most = template["images"]
    for count in range(least, (2 if most is None else most) + 1):
        for question in QUESTIONS:
            # a file that is there: no image is opened
            conversation = records.request([("user", question)], [__file__] * count, "the self-check")
            expected = processor.prompt(conversation)
            ids, starts = run_static.prompt_ids(template, tokenizer, question, count)
            if ids != expected["input_ids"].tolist() or starts != list(expected["image_starts"]):
                raise ValueError(
                    f"self-check failed: {question!r} with {count} images has other ids; report this"
                )


def check_programs(model: nn.Module, directory: Path) -> None:
    """ValueError unless the programs give the logits of the modules that they were made of, step by step."""
    package, found = run_static.Package(directory), []
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    # No token is -1: all four steps are taken, whatever the first ones are.
    package.spec["stop_words"] = [[-1]]

    def ask() -> list[Tensor]:
        """The first question's own tokens are the second one's too."""
        logits, tokens = [], list(found)
        found.clear()

        def choose(row: Tensor) -> int:
            logits.append(row.float())
            found.append(tokens.pop(0) if tokens else int(row.argmax()))
            return found[-1]

        package.generate(QUESTIONS[0], [image], 4, choose)
        return logits

    # Compiled programs add in another order than the modules do.
    now, limit = ask(), 1e-3 if package.spec["dtype"] == "float32" else 5e-2
    package.vision, package.prefill, package.decode = (kind(model) for kind in (Vision, Prefill, Decode))
    for step, (row, expected) in enumerate(zip(now, ask(), strict=True)):
        error, scale = float((row - expected).abs().max()), float(expected.abs().max())
        if not error <= limit * max(scale, 1):
            raise ValueError(f"self-check failed: logits of step {step} are off by {error:.2g}; report this")


# --------------------------------------------------------------------------------------------------
# How fast it is


def main(argv: list[str] | None = None) -> int:
    """The package and generate.py's engine in turns, on one question: CPU time to the first token (image
    opened and encoded) and tokens a second of CPU time after it; medians of the rounds after one of each."""
    parser = terminal.Parser(description=main.__doc__)
    add = parser.add_argument
    add("--package", required=True, help="directory of a static package")
    add("--model_name_or_path", required=True, help="the checkpoint that it was made of")
    add("--image", required=True)
    add("--prompt", default="What is this?")
    add("--max_new_tokens", type=int, default=64)
    add("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    package = run_static.Package(args.package)
    package.spec["stop_words"] = never = [[-1]]  # all answers are as long
    model = pack(generate.load_model(args.model_name_or_path))  # as generate.py does
    processor = vlm.find(model.config.raw).processor(args.model_name_or_path)
    conversation = records.request([("user", args.prompt)], [args.image], "--prompt")

    @torch.inference_mode()
    def eager(on_token) -> list[int]:
        request = processor.prompt(conversation)
        request["pixel_values"] = [processor.load_image(image) for image in request["images"]]
        given = [request], generate.Decoding(args.max_new_tokens), never
        return generate.generate(model, *given, on_token=lambda _, token: on_token(token))[0]

    def static(on_token) -> list[int]:
        def greedy(logits: Tensor) -> int:
            on_token(token := int(logits.argmax()))
            return token

        return package.generate(args.prompt, [args.image], args.max_new_tokens, greedy)

    times, answers = {"eager": [], "static": []}, {}
    for _ in range(args.rounds + 1):
        for name, ask in (("eager", eager), ("static", static)):
            seen = [time.process_time()]
            answers[name] = ask(lambda token, seen=seen: seen.append(time.process_time()))
            times[name].append((seen[1] - seen[0], (len(seen) - 2) / (seen[-1] - seen[1])))
    print(f"{len(answers['eager'])} tokens, equal: {answers['eager'] == answers['static']}")
    for name, rounds in times.items():
        first, rate = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        print(f"{name:8} first token {1000 * first:7.1f} ms, then {rate:8,.0f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
