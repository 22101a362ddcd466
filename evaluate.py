"""Dataset -> answers -> scores: captions (CIDEr-D, BLEU, ROUGE-L), VQA accuracy, exact match, BLIP-2's retrieval.

python evaluate.py --lora_path output                      # the default task of samples/, with an adapter
python evaluate.py --model blip2 --data_files samples/caption/captions_val_en.json --name coco_caption --num_beams 5
python evaluate.py configs/blip2/samples_sft.json --model_name_or_path output --output results.json

What is scored follows each record's format: captions by "caption", questions by "vqa_accuracy" and "exact_match",
chats by "exact_match"; --metric takes others. A stage-1 checkpoint of BLIP-2 is scored by "retrieval".
"""

import argparse
import dataclasses
import sys
from collections import defaultdict

import torch
from torch import Tensor, nn

import checkpoint
import data
import metrics
from generate import DTYPES, Decoding, answer, base_of, load_model
from kernels import dispatch


def merge_references(conversations: list[data.Conversation], entries: list[int]) -> list[data.Conversation]:
    """One caption is asked for an image of an entry: its records become one with all their references, equal ones
    too. Each conversation of a record carries all captions of the record, which count once.

    entries: the number of each conversation's dataset entry.
    """
    merged, taken = {}, set()
    for n, (entry, c) in enumerate(zip(entries, conversations, strict=True)):
        key = (entry, *c.images) if c.kind == "caption" else n
        if key not in merged:
            merged[key] = dataclasses.replace(c, answers=list(c.answers))
        elif (key, c.where) not in taken:
            merged[key].answers.extend(c.answers)
        taken.add((key, c.where))
    return list(merged.values())


def question(conversation: data.Conversation) -> str:
    """The last thing that the user said, without the picture."""
    text = next((text for role, text in reversed(conversation.turns) if role == "user"), "")
    return data.IMAGE_TAG.sub("", text).strip()


def answer_all(
    model: nn.Module, processor, conversations: list[data.Conversation], batch_size: int, how: Decoding
) -> list[str]:
    """all ranks of a sharded model."""
    found = []
    for first in range(0, len(conversations), batch_size):
        some = conversations[first : first + batch_size]
        found += answer(model, processor, some, processor.stop_words, how)
    return found


def score(
    conversations: list[data.Conversation], answers: list[str], names: list[str] | None = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """-> (whole set's scores, each answer's). Exact match also by the records' "source" where there are several."""
    whole: dict[str, float] = {}
    each: list[dict[str, float]] = [{} for _ in answers]
    for name, function in metrics.METRICS.items():
        rows = [i for i, c in enumerate(conversations) if name in (names or metrics.OF_KIND[c.kind])]
        if not rows:
            continue
        for key, (total, own) in function([answers[i] for i in rows], [conversations[i].answers for i in rows]).items():
            whole[key] = total
            sources = defaultdict(list)
            for i, value in zip(rows, own, strict=True):
                each[i][key] = value
                sources[conversations[i].source].append(value)
            if name != "caption" and len(sources) > 1:
                whole |= {f"{key}/{source}": sum(v) / len(v) for source, v in sorted(sources.items())}
    return whole, each


@torch.no_grad()
def retrieval(
    model: nn.Module, processor, conversations: list[data.Conversation], batch_size: int, rerank: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Recall of texts for images and of images for texts, by BLIP-2's contrastive similarity ("itc") and by matching
    ("itm"): the `rerank` most similar of each image, and of each text, get matching logit + similarity, as in
    arXiv:2301.12597. A direction ranks its own candidates only.

    conversations: one caption each. -> (scores, similarities (N, M) of N images and M captions, re-ranked (2, N, M):
    of each image its texts, of each text its images; -inf where it is no candidate)
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    paths = list(dict.fromkeys(c.images[0] for c in conversations))
    owner = torch.tensor([paths.index(c.images[0]) for c in conversations])  # (M,) each text's picture
    pictures, image_feats = [], []
    for first in range(0, len(paths), batch_size):
        pixels = torch.stack([processor.load_image(p) for p in paths[first : first + batch_size]])
        features = model.encode_pictures(pixels.to(device, dtype))
        pictures.append(features[0].cpu())
        image_feats.append(features[1])
    pictures, image_feats = torch.cat(pictures), torch.cat(image_feats)
    Q = processor.num_image_tokens
    texts = [torch.from_numpy(processor.encode(c, Q + 35)["input_ids"][Q:]).long() for c in conversations]
    similarity = []
    for first in range(0, len(texts), batch_size):
        some = texts[first : first + batch_size]
        ids, lengths = torch.cat(some).to(device), torch.tensor([len(t) for t in some], device=device)
        text_feats = model.text_features(model.encode_text(ids, lengths), lengths)
        similarity.append(torch.einsum("nqe,me->nmq", image_feats, text_feats).amax(-1).float().cpu())
    similarity = torch.cat(similarity, dim=1)  # (N, M)
    wanted = torch.zeros(2, *similarity.shape, dtype=torch.bool)
    for side, dim in ((0, 1), (1, 0)):
        wanted[side].scatter_(dim, similarity.topk(min(rerank, similarity.shape[dim]), dim).indices, True)
    matched = torch.full_like(similarity, float("-inf"))
    pairs = wanted.any(0).nonzero()
    for some in pairs.split(batch_size):
        of = [texts[m] for m in some[:, 1].tolist()]
        lengths = torch.tensor([len(t) for t in of], device=device)
        logits = model.match(pictures[some[:, 0]].to(device), torch.cat(of).to(device), lengths)
        matched[some[:, 0], some[:, 1]] = logits[:, 1].float().cpu() + similarity[some[:, 0], some[:, 1]]
    matched = torch.where(wanted, matched, float("-inf"))
    own = owner == torch.arange(len(paths))[:, None]  # (N, M)
    scores = {}
    for name, tables in (("itc", (similarity, similarity)), ("itm", matched)):
        for k in (1, 5, 10):
            for table, direction, dim in zip(tables, ("text", "image"), (1, 0), strict=True):
                best = table.topk(min(k, table.shape[dim]), dim)
                hits = (own.gather(dim, best.indices) & best.values.isfinite()).any(dim)
                scores[f"{name}_{direction}_r{k}"] = float(hits.float().mean())
    return scores, similarity, matched


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("config", nargs="?", default=None, help='training configuration whose "eval" entries are answered')
    add("--model", default="qwen_vl", help="whose samples/tiny_* to use if no checkpoint is named")
    add(
        "--model_name_or_path",
        default=None,
        help="checkpoint directory; default: the adapter's base, else the tiny model",
    )
    add("--lora_path", default=None, help="adapter directory, applied without merging")
    add("--data_files", action="append", default=None, help="may be repeated; instead of a configuration")
    add("--name", default="coco_vqa", choices=data.READERS, help="format of --data_files")
    add("--image_root", default=None)
    names = [*metrics.METRICS, "retrieval"]
    add("--metric", action="append", default=None, choices=names, help="instead of the format's own; may be repeated")
    stages = ("sft", "pretrain", "pretrain1", "pretrain2")
    add("--stage", default=None, choices=stages, help="prompt format; default: pretrain1 for stage 1, else sft")
    add("--output", default=None, help="write answers, scores and settings as JSON here")
    add("--batch_size", type=int, default=32)
    add("--rerank", type=int, default=128, help="retrieval: candidates that are matched")
    Decoding.add_arguments(parser, max_new_tokens=32)
    add("--dtype", default="float32", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    choices = ("auto", "true", "false")
    add("--use_flash_attention", default="auto", choices=choices, help="Triton kernels; auto: where there is a GPU")
    args = parser.parse_args(argv)
    how = Decoding.of(args)
    for key in ("batch_size", "rerank"):
        if getattr(args, key) < 1:
            raise ValueError(f"{key}={getattr(args, key)}; expected at least 1")
    if args.config and args.data_files:
        raise ValueError(f"both the configuration {args.config} and --data_files are given; use one")
    kernels = dispatch.use_flash_attention(args.use_flash_attention, args.device)
    if args.data_files:
        entries = [{"name": args.name, "data_files": args.data_files, "image_root": args.image_root}]
    else:
        config = checkpoint.read_json(args.config, "give the path of a configuration file") if args.config else {}
        entries = (config.get("dataset") or data.DEFAULT_DATASET).get("eval")
        if not entries:
            raise ValueError(f'{args.config}: its dataset has no "eval" entry; name files with --data_files')
    entries = data.open_entries(entries)
    directory = data.model_directory(args.model, base_of(args.model_name_or_path, args.lora_path))
    is_stage1 = bool((checkpoint.read_config(directory).get("qformer_config") or {}).get("use_qformer_text_input"))
    retrieving = "retrieval" in args.metric if args.metric else is_stage1
    if retrieving and not (is_stage1 and len(args.metric or names[-1:]) == 1):
        raise ValueError(
            f"metric=retrieval needs a stage-1 checkpoint of BLIP-2 and no other metric; {directory} "
            f"{'is one' if is_stage1 else 'is none'}, --metric {' '.join(args.metric)}"
        )
    processor = data.load_processor(directory, args.stage or ("pretrain1" if is_stage1 else "sft"))
    found = [(n, c) for n, e in enumerate(entries) for i in range(len(e)) for c in e.conversations(i)]
    numbers, conversations = [n for n, _ in found], [c for _, c in found]
    if not conversations:
        raise ValueError("the dataset is empty: nothing to answer")
    model = load_model(directory, DTYPES[args.dtype], args.device, args.lora_path)
    print(f"device {args.device}, kernels: {kernels}", file=sys.stderr)
    result = {
        "model_name_or_path": str(directory), "lora_path": args.lora_path, "dataset": [e.settings for e in entries],
        "prompt_format": processor.stage, "dtype": args.dtype, "metric_version": metrics.VERSION,
    }  # fmt: skip
    if retrieving:
        if not_captions := [c for c in conversations if c.kind != "caption"]:
            raise ValueError(f"{not_captions[0].where}: metric=retrieval needs captions; use --name coco_caption")
        scores, similarity, _ = retrieval(model, processor, conversations, args.batch_size, args.rerank)
        result |= {"metrics": ["retrieval"], "scores": scores, "rerank": args.rerank}
        print(f"retrieval among {similarity.shape[0]} pictures and {similarity.shape[1]} captions: ", end="")
    else:
        conversations = merge_references(conversations, numbers)
        answers = answer_all(model, processor, conversations, args.batch_size, how)
        scores, each = score(conversations, answers, args.metric)
        prompts = [processor.tokenizer.decode(processor.prompt(c)["input_ids"].tolist()) for c in conversations]
        result |= {
            "metrics": args.metric or sorted({name for c in conversations for name in metrics.OF_KIND[c.kind]}),
            "scores": scores, "decoding": dataclasses.asdict(how),
            "answers": [
                {"id": c.id, "where": c.where, "images": c.images, "question": question(c), "prompt": prompt,
                 "answer": text, "references": c.answers, "scores": own}
                for c, prompt, text, own in zip(conversations, prompts, answers, each, strict=True)
            ],
        }  # fmt: skip
        print(f"scores of {len(conversations)} answers: ", end="")
    print(", ".join(f"{k} {v:.3f}" for k, v in scores.items() if "/" not in k))
    for key in ("vqa_accuracy", "accuracy"):
        if parts := [f"{k.partition('/')[2]} {v:.3f}" for k, v in scores.items() if k.startswith(f"{key}/")]:
            print(f"{key} by source: {', '.join(parts)}")
    if args.output:
        checkpoint.write_json(args.output, result)
        print(f"results: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(checkpoint.cli(main))
