"""Dataset -> answers -> scores: captions (CIDEr-D, BLEU, ROUGE-L), answers (VQA accuracy, exact match, ANLS),
boxes (Acc@0.5), charts (relaxed accuracy), BLIP-2's retrieval.

    python evaluate.py --lora_path output  # an adapter, on the eval entries of its own run
    python evaluate.py --model blip2 --data_files captions.json --image_root images --num_beams 5
    python evaluate.py configs/blip2/samples_sft.json --model_name_or_path output --output results.json

A configuration is read as train.py reads it, and the same samples are scored; options of the command line
win. With none, it is the train_config.json of the run that --lora_path or --model_name_or_path comes from.
What is scored follows each record's format: captions by "caption", questions by "vqa_accuracy" and
"exact_match", boxes by "grounding", chats by "exact_match"; --metric takes others (metrics.py). A stage-1
checkpoint of BLIP-2 is scored by "retrieval".
"""

import python_version  # noqa: F401  (first: it says which Python is needed)

import contextlib
import dataclasses
import json
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import metrics
import parallel
import recipes
import terminal
import vlm
from config import Config, parse_config, read_file
from draw import draw_boxes
from engine import Engine
from generate import DTYPES, Decoding, answers, base_of, check_bad, check_device, load_as_asked, name_bad
from kernels import dispatch
from kernels.linear import pack
from quantize import KINDS
from records import READERS, Conversation, text_of
from terminal import one_line


def merge_references(conversations: list[Conversation], entries: list[int]) -> list[Conversation]:
    """One caption is asked for an image of an entry: its records become one with all their references, equal
    ones too. Each conversation of a record carries all captions of the record, which count once.

    entries: the number of each conversation's dataset entry.
    """
    merged, taken = {}, set()  # taken: (key, place of the record) whose captions are in
    for n, (entry, c) in enumerate(zip(entries, conversations, strict=True)):
        key = (entry, *c.images) if c.kind == "caption" else n
        if key not in merged:
            merged[key] = dataclasses.replace(c, answers=list(c.answers))
        elif (key, c.where) not in taken:
            merged[key].answers.extend(c.answers)
        taken.add((key, c.where))
    return list(merged.values())


def question(conversation: Conversation) -> str:
    """The last thing that the user said, without the image."""
    said = [text_of(content) for role, content in conversation.turns if role == "user"]
    return said[-1].strip() if said else ""


def answer_all(
    model: nn.Module,
    processor,
    conversations: list[Conversation],
    batch_size: int,
    how: Decoding,
    bad: list[tuple[str, str]],
    progress: bool = False,
) -> Iterator[str | None]:
    """The answers in order. all ranks of a sharded model.

    Where an image cannot be read, the answer is None and (where, reason) is named and added to `bad`.
    """
    bar = terminal.Progress(len(conversations), "answered", progress)
    # it keeps the features of images asked about again
    engine = Engine(model, processor, cache_tokens=0, max_running=batch_size)
    named, done = len(bad), 0
    lengths, last = Counter(), {}  # of each answer, in tokens

    def on_token(number: int, token: int) -> None:
        lengths[number] += 1
        last[number] = token

    try:
        for text in answers(engine, conversations, how, on_token=on_token, bad=bad):
            name_bad(bad[named:])
            named, done = len(bad), done + 1
            bar.update(done)
            yield text
    finally:
        bar.close()
        ends = [stop[-1] for stop in processor.stop_words]
        cut = sum(n >= how.max_new_tokens and last[k] not in ends for k, n in lengths.items())
        if cut and progress:
            limit = f"max_new_tokens={how.max_new_tokens}, not at an end of their own"
            print(f"note: {cut:,} of {done:,} answers end at {limit}", file=sys.stderr)


def answer_in_turn(
    model: nn.Module,
    processor,
    conversations: list[Conversation],
    batch_size: int,
    how: Decoding,
    turn: tuple[int, int],
    after_each: Callable[[], None],
) -> tuple[list[str | None], list[tuple[str, str]]]:  # all ranks
    """Every rank's answers on all ranks, in order, and what was bad. turn (k, n): this rank answers the k-th
    of each n questions, as others may too that share its part of the model. after_each: between answers, as
    often on every rank."""
    (k, n), bad = turn, []
    # every n-th, not a block: long questions mostly stand together
    mine = conversations[k::n]
    given, answers = answer_all(model, processor, mine, batch_size, how, bad), []
    for _ in range(-(-len(conversations) // n)):
        if len(answers) < len(mine):
            answers.append(next(given))
        after_each()
    # ranks of one tensor-parallel group say the same: the last one counts
    by_turn = {k: (answers, bad) for k, answers, bad in parallel.from_all((k, answers, bad))}
    whole = [by_turn[i % n][0][i // n] for i in range(len(conversations))]
    return whole, [pair for k in range(n) for pair in by_turn[k][1]]


def answered(*columns: list) -> list[tuple]:
    """The columns, the last of which are the answers, without rows that could not be answered. ValueError if
    none is left."""
    rows = [row for row in zip(*columns, strict=True) if row[-1] is not None]
    if not rows:
        raise ValueError(
            f"none of {len(columns[0]):,} questions could be answered; the reasons are listed above"
        )
    return list(zip(*rows, strict=True))


def score(
    conversations: list[Conversation], answers: list[str], names: list[str] | None = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """-> (whole set's scores, each answer's). Also by the records' "source" where there are several: the
    CIDEr of two sets together is neither's."""
    whole: dict[str, float] = {}
    each: list[dict[str, float]] = [{} for _ in answers]
    for name in metrics.SCORES:
        rows = [i for i, c in enumerate(conversations) if name in (names or metrics.OF_KIND[c.kind])]
        sources = defaultdict(list)
        for i in rows:
            sources[conversations[i].source].append(i)
        parts = {f"/{source}": some for source, some in sorted(sources.items())} if len(sources) > 1 else {}
        for part, some in ({"": rows} | parts).items() if rows else ():
            references = [conversations[i].answers for i in some]
            for key, (total, own) in metrics.scores_of(name, [answers[i] for i in some], references).items():
                whole[key + part] = total
                for i, value in zip(some, own, strict=True) if not part else ():
                    each[i][key] = value
    return whole, each


@torch.no_grad()
def retrieval(
    model: nn.Module,
    processor,
    conversations: list[Conversation],
    batch_size: int,
    rerank: int,
    bad: list[tuple[str, str]],
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Recall of texts for images and of images for texts, by BLIP-2's contrastive similarity ("itc") and by
    matching ("itm"): the `rerank` most similar of each image, and of each text, get matching logit +
    similarity, as in arXiv:2301.12597. A direction ranks its own candidates only.

    conversations: one caption each; those whose image cannot be read are left out and added to `bad`.
    -> (scores, similarities (N, M) of N images and M captions, re-ranked (2, N, M):
    of each image its texts, of each text its images; -inf where it is no candidate)
    """
    device, Q = next(model.parameters()).device, processor.num_image_tokens
    conversations, paths, images, image_feats = encoded_images(
        model, processor, conversations, batch_size, bad
    )
    texts = [torch.from_numpy(processor.encode(c, Q + 35)["input_ids"][Q:]).long() for c in conversations]
    similarity = []
    for first in range(0, len(texts), batch_size):
        some = texts[first : first + batch_size]
        ids, lengths = torch.cat(some).to(device), torch.tensor([len(t) for t in some])
        text_feats = model.text_features(model.encode_text(ids, lengths), lengths)
        # The best of an image's Q queries speaks for it.
        similarity.append(torch.einsum("nqe,me->nmq", image_feats, text_feats).amax(-1).float().cpu())
    similarity = torch.cat(similarity, dim=1)  # (N, M)
    # Each image's candidates among the texts, and each text's among the images.
    wanted = torch.zeros(2, *similarity.shape, dtype=torch.bool)
    for side, dim in ((0, 1), (1, 0)):
        wanted[side].scatter_(dim, similarity.topk(min(rerank, similarity.shape[dim]), dim).indices, True)
    matched = torch.full_like(similarity, float("-inf"))
    # A pair that both directions want is matched once.
    for some in wanted.any(0).nonzero().split(batch_size):
        of = [texts[m] for m in some[:, 1].tolist()]
        lengths = torch.tensor([len(t) for t in of])
        logits = model.match(images[some[:, 0]].to(device), torch.cat(of).to(device), lengths)
        matched[some[:, 0], some[:, 1]] = logits[:, 1].float().cpu() + similarity[some[:, 0], some[:, 1]]
    matched = torch.where(wanted, matched, float("-inf"))
    row = {path: n for n, path in enumerate(paths)}
    own = torch.tensor([row[c.images[0]] for c in conversations]) == torch.arange(len(paths))[:, None]
    return recalls(own, {"itc": (similarity, similarity), "itm": matched}), similarity, matched


def encoded_images(
    model, processor, conversations: list[Conversation], batch_size: int, bad: list
) -> tuple[list[Conversation], list[str], Tensor, Tensor]:
    """-> (conversations whose image could be read, their N images' paths, what match() takes of them
    (N, P, W), on the CPU, and their features (N, Q, E))."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    # An image with several captions is encoded once.
    paths, reasons = list(dict.fromkeys(c.images[0] for c in conversations)), {}
    images, image_feats = [], []
    for first in range(0, len(paths), batch_size):
        pixels = []
        for path in paths[first : first + batch_size]:
            try:
                pixels.append(processor.load_image(path))
            except ValueError as e:
                reasons[path] = one_line(e)
        if pixels:
            image, features = model.encode_and_project(torch.stack(pixels).to(device, dtype))
            images.append(image.cpu())
            image_feats.append(features)
    if reasons:
        found = [(c.where, reasons[c.images[0]]) for c in conversations if c.images[0] in reasons]
        name_bad(found)
        bad += found
        paths = [p for p in paths if p not in reasons]
        conversations = [c for c in conversations if c.images[0] not in reasons]
        if not conversations:
            raise ValueError("no image could be read; the reasons are listed above")
    return conversations, paths, torch.cat(images), torch.cat(image_feats)


def recalls(own: Tensor, tables: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Recall at 1, 5 and 10. own (N, M): which text belongs to which image; tables: by name, what texts are
    ranked by for an image, and images for a text, each (N, M)."""
    scores = {}
    for name, pair in tables.items():
        for k in (1, 5, 10):
            for table, direction, dim in zip(pair, ("text", "image"), (1, 0), strict=True):
                best = table.topk(min(k, table.shape[dim]), dim)
                hits = (own.gather(dim, best.indices) & best.values.isfinite()).any(dim)
                scores[f"{name}_{direction}_r{k}"] = float(hits.float().mean())
    return scores


def run_config(path: str | Path) -> str | None:
    """The train_config.json of the run that wrote this model or adapter: in it, or above its checkpoint-N."""
    path = Path(path)
    for folder in (path, path.resolve().parent) if path.resolve().name.startswith("checkpoint-") else (path,):
        if (folder / "train_config.json").is_file():
            return str(folder / "train_config.json")
    return None


def settings(args) -> tuple[Config, str | None]:
    """The configuration that is meant, with the options of the command line, and its file (None: the
    defaults)."""
    if args.config and args.data_files:
        raise ValueError(f"both the configuration {args.config} and --data_files are given; use one")
    trained = args.lora_path or args.model_name_or_path
    source = args.config or (trained and run_config(trained))
    if args.lora_path and not source and not args.data_files:
        raise ValueError(
            f"{args.lora_path} has no train_config.json, in it or above its checkpoint-N, that says which "
            "data it was trained with; give a configuration, or --data_files and --name"
        )
    argv = [source] if source else []
    if args.data_files:
        entry = {"name": args.name, "data_files": args.data_files, "image_root": args.image_root}
        argv += ["--dataset", json.dumps({"eval": [entry]})]
    elif not source:
        argv += ["--dataset", json.dumps(data.DEFAULT_DATASET)]
    for key in ("model", "model_name_or_path", "stage", "batch_size", "max_bad_samples"):
        if (value := getattr(args, key)) is not None:
            argv += [f"--{'per_device_eval_batch_size' if key == 'batch_size' else key}", str(value)]
    return parse_config(argv), source


def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("config", nargs="?", help='training configuration whose "eval" entries are answered')
    add("--model", help="whose samples/tiny_* to use if no checkpoint is named")
    base = "checkpoint directory; default: the configuration's, the adapter's base"
    add("--model_name_or_path", help=base)
    add("--lora_path", help="adapter directory, applied without merging; default: the configuration's")
    add("--data_files", action="append", help="may be repeated; instead of the configuration's entries")
    add("--name", choices=READERS, help="format of --data_files; default: each record's own keys tell")
    add("--image_root", help="directory of the images of --data_files")
    own = "instead of the format's own; may be repeated"
    add("--metric", action="append", choices=[*metrics.SCORES, "retrieval"], help=own)
    own = "instead of the model's own wording of a question: a text in which {} is what the record asks"
    add("--prompt", help=own)
    add("--stage", help="of training, for its prompt format; default: the configuration's")
    add("--boxes", help="folder for copies of the images with the boxes of the answers drawn")
    add("--output", help="write answers, scores and settings as JSON here")
    add("--batch_size", type=int, help="default: per_device_eval_batch_size, else 32")
    add("--rerank", type=int, default=128, help="retrieval: candidates that are matched")
    share = (
        "share of unusable records and images (named and left out) before the command fails; default: 0.01"
    )
    add("--max_bad_samples", type=float, help=share)
    Decoding.add_arguments(parser, max_new_tokens=32)
    add("--dtype", choices=DTYPES, help="default: what the configuration's weights are held in, else float32")
    bits = "weights of the language model's blocks in 8 or 4 bits; default: the configuration's"
    add("--quantize", choices=KINDS, help=bits)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kernels = "Triton kernels; auto: where there is a GPU"
    add("--use_flash_attention", choices=("auto", "true", "false"), help=kernels)
    args = parser.parse_args(argv)
    if args.config and (recipe := recipes.recipe_of(read_file(args.config).get("evaluation"))):
        parser.set_defaults(prompt=recipe.prompt, **recipe.decoding)  # what the command line gives, wins
        args = parser.parse_args(argv)
        args.metric = args.metric or [recipe.metric]
    how = Decoding.of(args)
    for key in ("name", "image_root"):
        if getattr(args, key) and not args.data_files:
            raise ValueError(f"--{key} says how --data_files are read, and none is given; leave it out")
    if args.output:  # before hours of answers
        checkpoint.check_place(args.output, "output")
    check_device(args.device)
    for key in ("batch_size", "rerank"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"{key}={getattr(args, key)}; expected at least 1")
    # like Ctrl-C: what is answered is kept
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(args, how)
    finally:
        signal.signal(signal.SIGTERM, before)


def ranks_or_answers(args, cfg: Config, model_config: dict, directory) -> tuple[bool, str]:
    """Whether images and texts are ranked instead of questions answered, and the stage whose prompts are
    used."""
    stage = vlm.find(model_config).retrieval_stage(model_config)  # None for a model that answers
    retrieving = "retrieval" in args.metric if args.metric else bool(stage)
    if retrieving and not (stage and len(args.metric or ["retrieval"]) == 1):
        raise ValueError(
            "metric=retrieval needs a checkpoint that ranks images and texts (of BLIP-2's stage 1) and no "
            f"other metric; {directory} is {'one' if stage else 'none'}, --metric {' '.join(args.metric)}"
        )
    return retrieving, stage if stage and not args.stage else cfg.stage


def check_what_is_asked(conversations: list[Conversation], args, retrieving: bool) -> None:
    """Refuses, before anything is answered, what could not be scored or shown, or would not be asked."""
    if retrieving and args.prompt is not None:
        raise ValueError("--prompt has no effect where images and texts are ranked; leave it out")
    for c in conversations:
        recipes.asked(c, args.prompt)  # says what it cannot word
        if args.prompt is not None and "{}" not in args.prompt and question(c):
            raise ValueError(f"{c.where}: --prompt {args.prompt!r} has no {{}} for the question it asks")
        if "grounding" in (args.metric or ()) and not all(map(metrics.CORNERS.search, c.answers)):
            raise ValueError(
                f"{c.where}: metric=grounding, and a reference has no box; choose another metric"
            )
    if args.boxes:
        Path(args.boxes).mkdir(parents=True, exist_ok=True)


def ranked(model, processor, conversations: list, batch_size: int, rerank: int, bad: list) -> dict:
    """What the result file says of a retrieval."""
    if not_captions := [c for c in conversations if c.kind != "caption"]:
        raise ValueError(f"{not_captions[0].where}: metric=retrieval needs captions; use --name coco_caption")
    scores, similarity, _ = retrieval(model, processor, conversations, batch_size, rerank, bad)
    print(f"retrieval among {similarity.shape[0]} images and {similarity.shape[1]} captions: ", end="")
    return {"metrics": ["retrieval"], "scores": scores, "rerank": rerank}


@torch.inference_mode()
def run(args, how: Decoding) -> int:
    cfg, source = settings(args)
    kernels = dispatch.use_flash_attention(args.use_flash_attention or cfg.use_flash_attention, args.device)
    adapter = args.lora_path or cfg.lora_path
    # an adapter given here brings its own base, unless that is given too
    base = base_of(args.model_name_or_path, args.lora_path) if args.lora_path else cfg.model_name_or_path
    directory = data.model_directory(cfg.model, base)
    model_config = checkpoint.read_config(directory)
    retrieving, stage = ranks_or_answers(args, cfg, model_config, directory)
    entries = cfg.dataset.get("eval") if cfg.dataset else data.DEFAULT_DATASET["eval"]
    if not entries:
        raise ValueError(f'{source}: its dataset has no "eval" entry; name files with --data_files')
    processor = data.load_processor(directory, stage)
    batch_size = cfg.per_device_eval_batch_size if args.batch_size or source else 32
    # autocast's weights are fp32
    sixteen = "bfloat16" if cfg.bf16 else "float16" if cfg.fp16 else "float32"
    dtype = args.dtype or (sixteen if cfg.fp16_opt_level == "O2" else "float32")
    # the samples of training's own evaluation; all problems are named, and counted when the others are
    # answered
    index = data.build_index(entries, processor, cfg.max_length, None, cfg.num_workers, max_bad_samples=1.0)
    bad = list(index.problems)
    name_bad(bad)
    data.say_unused(index)
    conversations, numbers = [index.conversation(n) for n in range(len(index))], index.entry.tolist()
    total = len({c.where for c in conversations}) + len(bad)
    if args.output:
        checkpoint.check_place(args.output, "output", keep=[p for e in index.entries for p in e.paths])
    check_what_is_asked(conversations, args, retrieving)
    kind = args.quantize or cfg.quantize
    few = kind or model_config.get("quantize")  # which a directory of quantize.py's says itself
    print(
        f"scoring {directory} ({vlm.kind_of(model_config)}, {processor.stage}, {dtype}"
        f"{f', {few}' if few else ''}) with "
        f"{f'adapter {adapter}' if adapter else 'no adapter'} on "
        + ", ".join(f"{e.label} ({', '.join(e.paths)})" for e in index.entries)
        + (f", settings of {source}" if source else ""),
        flush=True,
    )
    if args.output and Path(args.output).is_file():
        say_again(args.output)
    model = pack(load_as_asked(directory, processor, dtype, args.device, kind, adapter))
    print(f"device {args.device}, kernels: {kernels}", file=sys.stderr)
    result = {
        "model_name_or_path": str(directory),
        "lora_path": adapter,
        "config": source,
        "dataset": [e.settings for e in index.entries],
        "prompt_format": processor.stage,
        "dtype": dtype,
        "quantize": few,
        "metric_version": metrics.VERSION,
        "complete": True,
    }
    stop = None
    if retrieving:
        result |= ranked(model, processor, conversations, batch_size, args.rerank, bad)
    else:
        conversations = merge_references(conversations, numbers)
        asked = [recipes.asked(c, args.prompt) for c in conversations]
        batches = answer_all(model, processor, asked, batch_size, how, bad, progress=True)
        found, stop = scored_answers(processor, conversations, asked, batches, args.metric)
        if args.boxes:
            draw_answers(found["answers"], Path(args.boxes))
        result |= {**found, "decoding": dataclasses.asdict(how)}
    scores = result["scores"]
    result["left_out"] = [{"where": where, "reason": reason} for where, reason in bad]
    print_scores(scores)
    if (recipe := recipes.recipe_of(cfg.evaluation)) and not retrieving:
        options = {"metric": args.metric, "prompt": args.prompt, **result["decoding"]}
        result["published"] = compared(recipe, model_config, result, options)
    if args.output:
        checkpoint.write_json(args.output, result)
        print(f"results: {args.output}", flush=True)
    if stop is not None:  # what was answered is on the disk by now
        print("the same command begins again", flush=True)
        raise stop
    if bad:
        print(f"{len(bad):,} of {total:,} left out, named above", file=sys.stderr)
    check_bad(bad, total, cfg.max_bad_samples, "records")
    return 0


def compared(recipe: recipes.Recipe, model_config: dict, result: dict, options: dict) -> dict:
    """Prints how the scores stand to the published one; -> what the result file says of it."""
    changed = {key: result[key] for key in ("lora_path", "quantize")}
    changed |= {"left_out": len(result["left_out"]), "stopped": not result["complete"]}
    own = read_file(result["config"]).get("stage", "sft")
    changed |= {"stage": result["prompt_format"] if result["prompt_format"] != own else None}
    found = recipes.deviations(recipe, model_config, changed, len(result["answers"]), options)
    print(recipes.verdict(recipe, result["scores"], found))
    return {"score": recipe.score, "expected": recipe.expected, "deviations": found}


def print_scores(scores: dict[str, float]) -> None:
    print(", ".join(f"{k} {v:.3f}" for k, v in scores.items() if "/" not in k))
    for key in ("cider", "vqa_accuracy", "accuracy"):
        if parts := [f"{k.partition('/')[2]} {v:.3f}" for k, v in scores.items() if k.startswith(f"{key}/")]:
            print(f"{key} by source: {', '.join(parts)}")


def scored_answers(
    processor, conversations: list, asked: list, batches, asked_for: list[str] | None
) -> tuple[dict, BaseException | None]:
    """Takes the answers as they come -> (what the result file says of them, what broke them off). What is
    answered by then is scored and written; with no answer at all the error is raised. `asked` are the
    conversations in the wording that they were asked in."""
    answers, stop, total = [], None, len(conversations)
    try:
        for text in batches:
            answers.append(text)
    except (KeyboardInterrupt, Exception) as e:
        if not any(text is not None for text in answers):
            raise
        stop = e
    n = len(answers)
    conversations, asked, answers = answered(conversations[:n], asked[:n], answers)
    scores, each = score(conversations, answers, asked_for)
    # as the model saw it: the first thing to look at when a score is odd
    prompts = [processor.tokenizer.decode(processor.prompt(c)["input_ids"].tolist()) for c in asked]
    result = {
        "metrics": asked_for or sorted({name for c in conversations for name in metrics.OF_KIND[c.kind]}),
        "scores": scores,
        "answers": [
            {
                "id": c.id,
                "where": c.where,
                "images": c.images,
                "question": question(c),
                "prompt": prompt,
                "answer": text,
                "references": c.answers,
                "scores": own,
            }
            for c, prompt, text, own in zip(conversations, prompts, answers, each, strict=True)
        ],
    }
    if stop is not None:
        result |= {"complete": False, "asked": total}
        done = f"{len(answers):,} of {total:,} questions answered"
        print(f"stopped ({type(stop).__name__}) with {done}; ", end="")
    print(f"scores of {len(answers)} answers: ", end="")
    return result, stop


def draw_answers(answers: list[dict], folder: Path) -> None:
    """Copies of the images with the boxes that the answers name, numbered as the answers."""
    drawn = 0
    for n, found in enumerate(answers):
        text = found["answer"]
        if found["prompt"].endswith("<box>"):  # the prompt began it
            text = f"<box>{text}"
        drawn += bool(found["images"] and draw_boxes(found["images"][-1], text, folder / f"{n:05d}.png"))
    print(f"boxes of {drawn:,} answers drawn: {folder}", file=sys.stderr)


def say_again(path: str) -> None:
    """Results of a stopped run are made anew; says so."""
    with contextlib.suppress(ValueError, AttributeError, OSError):  # what else stands there is replaced
        if json.loads(Path(path).read_text(encoding="utf-8")).get("complete") is False:
            print(f"{path} holds the answers of a stopped evaluation; this one begins again", flush=True)


if __name__ == "__main__":
    sys.exit(terminal.cli(main))
