"""Dataset -> answers -> exact-match accuracy, by the records' "source".

python evaluate.py --model_name_or_path samples/tiny_qwen_vl --data_files samples/pretrain/vqa_val_en.jsonl
--image_root samples
python evaluate.py --lora_path output                      # the default task of samples/, with an adapter
"""

import argparse
import json
import os
import sys
from collections import defaultdict

import torch
from torch import nn

import checkpoint
import data
from generate import DTYPES, base_of, generate, load_model
from kernels import dispatch


def exact_match(
    model: nn.Module,
    processor,
    conversations: list[data.Conversation],
    batch_size: int,
    max_new_tokens: int = 32,
    sink=None,
) -> dict[str, float]:
    """Share of greedy answers that equal one of the reference answers, blanks at both ends aside: {"all": ...,
    source: ...}.

    Answers go to `sink` as JSONL. Pictures that cannot be read raise ValueError.
    """  # fmt: skip
    dtype, hits = next(model.parameters()).dtype, defaultdict(list)
    for first in range(0, len(conversations), batch_size):
        some = conversations[first : first + batch_size]
        requests = [processor.prompt(c) for c in some]
        for request in requests:
            request["pixel_values"] = [processor.load_image(p).to(dtype) for p in request["images"]]
        answers = generate(model, requests, max_new_tokens, processor.stop_words)
        for c, ids in zip(some, answers, strict=True):
            answer = processor.decode(ids)
            hit = answer in {a.strip() for a in c.answers}
            hits[c.source].append(hit)
            if sink:
                record = {"id": c.id, "where": c.where, "answer": answer, "answers": c.answers, "correct": hit}
                print(json.dumps(record, ensure_ascii=False), file=sink)
    scores = {source: sum(h) / len(h) for source, h in sorted(hits.items())}
    return {"all": sum(map(sum, hits.values())) / len(conversations), **scores}


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
    add("--lora_path", default=None)
    add("--data_files", action="append", default=None, help="may be repeated; instead of a configuration")
    add("--name", default="coco_vqa", choices=data.READERS, help="format of --data_files")
    add("--image_root", default=None)
    add("--output", default=None, help="write the answers as JSONL here")
    add("--max_new_tokens", type=int, default=32)
    add("--batch_size", type=int, default=32)
    add("--dtype", default="float32", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    choices = ("auto", "true", "false")
    add("--use_flash_attention", default="auto", choices=choices, help="Triton kernels; auto: where there is a GPU")
    args = parser.parse_args(argv)
    kernels = dispatch.use_flash_attention(args.use_flash_attention, args.device)
    if args.data_files:
        entries = [{"name": args.name, "data_files": args.data_files, "image_root": args.image_root}]
    else:
        config = checkpoint.read_json(args.config, "give the path of a configuration file") if args.config else {}
        entries = config.get("dataset", data.DEFAULT_DATASET).get("eval")
    directory = data.model_directory(args.model, base_of(args.model_name_or_path, args.lora_path))
    processor = data.load_processor(directory)
    # one answer a record, also where it has several captions
    conversations = [c for e in data.open_entries(entries) for i in range(len(e)) for c in e.conversations(i)[:1]]
    if not conversations:
        raise ValueError("the dataset is empty: nothing to answer")
    model = load_model(directory, DTYPES[args.dtype], args.device, args.lora_path)
    print(f"device {args.device}, kernels: {kernels}", file=sys.stderr)
    with open(args.output or os.devnull, "w") as sink:
        scores = exact_match(model, processor, conversations, args.batch_size, args.max_new_tokens, sink)
    print(f"exact match of {len(conversations)} answers: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    return 0


if __name__ == "__main__":
    sys.exit(checkpoint.cli(main))
