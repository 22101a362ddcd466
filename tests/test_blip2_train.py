"""BLIP-2 through train.py: stages, layouts, resumption; one process is the reference."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run as run_ranks
from small import argv_of, filled, losses, weights
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoint
import data
import evaluate
import generate
import merge
import metrics
import model_blip2 as blip2
import terminal
import train
from convert import lavis
from records import Conversation, ImageRef

WORDS = [f"w{i}" for i in range(20)]


def write_checkpoint(path, text, stage1=False):
    path.mkdir()
    special = {
        "opt": ["<s>", "<pad>", "</s>", "<unk>", "\n"],
        "t5": ["<pad>", "</s>", "<unk>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    }
    kind = "bert" if stage1 else text["model_type"]
    vocabulary = [*special[kind], *WORDS, "Question:", "Short", "answer:", "a", "photo", "of"]
    unknown = next(t for t in vocabulary if "unk" in t.lower())
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=unknown))
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Split("\n", "isolated")])
    tokenizer.add_special_tokens([t for t in special[kind] if t != "\n"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "model_type": "blip-2",
        "num_query_tokens": 4,
        "image_text_hidden_size": 16,
        "image_token_index": None,
        "stage1_heads": stage1,
        "vision_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "image_size": 28,
        },
        "qformer_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "vocab_size": 40,
            "max_position_embeddings": 32,
            "encoder_hidden_size": 32,
            "use_qformer_text_input": stage1,
        },
        "text_config": text,
    }
    checkpoint.write_json(path / "config.json", config)
    model = filled(blip2.build_model(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not name.startswith("language_model."):
                p.mul_(4)
    checkpoint.save_weights(path, model.named_parameters())
    return path


OPT = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 3,
    "dense_act_fn": "gelu",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("blip2")
    return {
        "pretrain1": write_checkpoint(root / "stage1", OPT, stage1=True),
        "opt": write_checkpoint(root / "opt", OPT),
        "t5": write_checkpoint(root / "t5", T5),
    }


def write_captions(path: Path, count: int, shortest: int) -> Path:
    """So many images with captions of the vocabulary's words."""
    records, rng = [], np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i}.png")
        caption = " ".join(WORDS[(i + k) % 20] for k in range(shortest + i % 4))
        records.append({"image": f"{i}.png", "caption": caption})
    (path / "a.json").write_text(json.dumps(records))
    return path / "a.json"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_captions(path, 20, 1)
    entries = [{"name": "coco_caption", "data_files": str(path / "a.json")}]
    return {"train": entries, "eval": entries, "image": str(path / "0.png")}


def run(base, dataset, out, world=1, **options):
    options = {
        "model_name_or_path": str(base),
        "dataset": {k: dataset[k] for k in ("train", "eval")},
        "output_dir": str(out),
        "learning_rate": 3e-3,
        "max_steps": 7,
        "lr_scheduler_type": "constant",
        "num_workers": 0,
        "logging_steps": 1000,
        "max_length": 32,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8 // world,
        **options,
    }
    run_ranks(argv_of(options), world)
    return out


def assert_same_run(a, b, tolerance=1e-5):
    x, y = losses(a), losses(b)
    assert len(x) == len(y) and max(abs(i - j) for i, j in zip(x, y, strict=True)) < tolerance, (x, y)


STAGES = {
    "pretrain1": ("pretrain1", {}),
    "pretrain2": ("opt", {}),
    "pretrain2-t5": ("t5", {}),
    "sft": ("opt", {"freeze_include": ["vision_model.e*"]}),
}


@pytest.mark.parametrize("case", STAGES)
def test_two_processes_equal_one_and_the_tower_stays(bases, dataset, tmp_path, case):
    """20 samples, steps of 8: the last step of an epoch gives one rank more samples than it has, and dropout
    is on."""
    kind, options = STAGES[case]
    stage = case.split("-")[0]
    one = run(bases[kind], dataset, tmp_path / "one", stage=stage, **options)
    two = run(bases[kind], dataset, tmp_path / "two", world=2, stage=stage, **options)
    assert losses(one)[-1] < losses(one)[0]
    assert_same_run(one, two, 2e-5)
    before, after = weights(bases[kind]), weights(one)
    for name, tensor in before.items():
        frozen = name.startswith("vision_model.e") or (
            stage == "pretrain2" and name.startswith("language_model.")
        )
        assert torch.equal(after[name], tensor) == frozen or name.endswith("key.bias"), name


@pytest.mark.parametrize("case", ["pretrain1", "pretrain2", "pretrain2-t5"])
def test_resumed_run_is_the_same(bases, dataset, tmp_path, case):
    kind, options = STAGES[case]
    whole = run(bases[kind], dataset, tmp_path / "whole", stage=case.split("-")[0], save_steps=3, **options)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for step in (6, 7):
        shutil.rmtree(part / f"checkpoint-{step}", ignore_errors=True)
    run(bases[kind], dataset, part, stage=case.split("-")[0], save_steps=3, **options)
    assert_same_run(whole, part, 1e-12)
    a, b = weights(whole), weights(part)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_packed_equals_one_by_one(bases, dataset, kind):
    processor = blip2.load_processor(bases[kind], "pretrain2")
    index = data.build_index(dataset["train"], processor, 32, None, 0, False)
    plan = data.Plan(index, 0, 32)
    samples = [data.load_sample(plan, n, 0, processor) for n in range(6)]
    model = blip2.build_model(checkpoint.read_config(bases[kind])).train()
    checkpoint.load_into(dict(model.named_parameters()), checkpoint.open_weights(bases[kind]))

    def gradients(batches):
        model.zero_grad()
        loss = sum(model(b)[0] for b in batches) / sum(b.num_supervised for b in batches)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, packed = gradients([data.collate(samples)])
    single_loss, single = gradients([data.collate([s]) for s in samples])
    assert (
        abs(loss - single_loss) < 1e-5
        and packed.keys() == single.keys()
        and any("vision_model.enc" in n for n in packed)
    )
    for name in packed:
        assert (packed[name] - single[name]).abs().max() < 1e-5, name


def test_stage2_begins_with_stage1(bases, dataset, tmp_path, capfd):
    out = run(
        bases["opt"],
        dataset,
        tmp_path / "out",
        stage="pretrain2",
        init_from=str(bases["pretrain1"]),
        learning_rate=0.0,
    )
    stage1, now = weights(bases["pretrain1"]), weights(out)
    shared = stage1.keys() & now.keys()
    assert "query_tokens" in shared and len(shared) > 50
    assert all(torch.equal(stage1[n], now[n]) for n in shared)
    unused = sorted(stage1.keys() - now.keys())
    assert f"({len(unused)} of its own are not used, the first is {unused[0]})" in capfd.readouterr().out


def test_stage_and_checkpoint_must_fit(bases, dataset, tmp_path, capfd):
    with pytest.raises(AssertionError):
        run(bases["opt"], dataset, tmp_path / "out", stage="pretrain1")
    assert "do not go together" in capfd.readouterr().err


def test_lora_with_the_toolkits_file(bases, dataset, tmp_path):
    """paddlemix/config/blip2/lora_sft_argument.json: only the paths differ, and the number of steps."""
    toolkit = {
        "model_name_or_path": str(bases["opt"]),
        "text_model_name_or_path": "facebook/opt-2.7b",
        "dataset": {
            "train": [{**dataset["train"][0], "splits": "train"}],
            "eval": [{**dataset["eval"][0], "splits": "val"}],
        },
        "output_dir": str(tmp_path / "out"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 128,
        "eval_accumulation_steps": 16,
        "num_train_epochs": 10,
        "learning_rate": 1e-03,
        "weight_decay": 0.05,
        "adam_beta2": 0.95,
        "eta_min": 1e-5,
        "warmup_start_lr": 1e-6,
        "lr_scheduler_name": "CosineDecayWithWarmup",
        "logging_steps": 1,
        "save_steps": 10,
        "evaluation_strategy": "steps",
        "save_strategy": "steps",
        "max_length": 2048,
        "fp16": True,
        "fp16_opt_level": "O1",
        "do_train": True,
        "do_eval": False,
        "do_predict": False,
        "disable_tqdm": True,
        "load_best_model_at_end": True,
        "eval_with_do_generation": False,
        "save_total_limit": 1,
        "lora": True,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": [
            "language_model.opt.decoder.layers.*.self_attn.q_proj.*",
            "language_model.opt.decoder.layers.*.self_attn.v_proj.*",
        ],
    }
    (tmp_path / "argument.json").write_text(json.dumps(toolkit))
    out = tmp_path / "out"
    run_ranks([str(tmp_path / "argument.json"), "--max_steps", "12", "--num_workers", "0"])
    assert losses(out)[-1] < losses(out)[0] and (out / "checkpoint-10").is_dir()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 16 and sorted(config["target_modules"]) == sorted(
        f"language_model.model.decoder.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"
    )
    merged = tmp_path / "merged"
    merge.main(["--lora_path", str(out), "--merge_model_path", str(merged)])
    request = tmp_path / "r.jsonl"
    request.write_text(json.dumps({"prompt": "Question: w1 Short answer:", "image": dataset["image"]}) + "\n")
    answers = []
    for options in (["--lora_path", str(out)], ["--model_name_or_path", str(merged)]):
        for beams in ("1", "3"):
            argv = ["--requests", str(request), "--output", str(tmp_path / "a"), "--num_beams", beams]
            generate.main([*options, *argv, "--max_new_tokens", "5"])
            answers.append((tmp_path / "a").read_text())
    assert answers[:2] == answers[2:]


CAPTIONS = ["w3 w1 w4", "w1 w5 w9 w2 w6", "w5", "w3 w5 w8 w9"]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_four_captions_by_heart(bases, tmp_path, kind):
    """Labels are shifted and the end is learned: the captions come back exactly, and stop. The rate falls to
    zero over many steps, so that the last ones are no matter of luck: the loss says that they are known
    before they are asked."""
    rng = np.random.default_rng(1)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "four.json").write_text(json.dumps(records))
    entries = [{"name": "coco_caption", "data_files": str(tmp_path / "four.json")}]
    options = {"per_device_train_batch_size": 4, "max_steps": 200, "learning_rate": 4e-3, "warmup_steps": 10}
    options |= {"lr_scheduler_type": "cosine", "adam_epsilon": 1e-6}
    out = run(bases[kind], {"train": entries, "eval": entries}, tmp_path / "out", stage="sft", **options)
    assert losses(out)[-1] < 0.05
    model, processor = generate.load_model(out), blip2.load_processor(out)
    questions = [c for i in range(4) for c in data.open_entries(entries)[0].conversations(i)]
    requests = [processor.prompt(c) for c in questions]
    for request in requests:
        request["pixel_values"] = [processor.load_image(p) for p in request["images"]]
    ids = generate.generate(model, requests, generate.Decoding(20), processor.stop_words)
    assert [processor.decode(i) for i in ids] == CAPTIONS and all(i[-1] == processor.eos for i in ids)
    how = generate.Decoding(max_new_tokens=20, num_beams=3)
    assert generate.answer(generate.Engine(model, processor, cache_tokens=0), questions, how) == CAPTIONS


@pytest.mark.parametrize("kind", ["pretrain1", "opt"])
def test_retrieval_and_captions_are_scored(bases, dataset, tmp_path, kind):
    argv = ["--model_name_or_path", str(bases[kind]), "--data_files", dataset["train"][0]["data_files"]]
    argv += [
        "--name",
        "coco_caption",
        "--output",
        str(tmp_path / "r.json"),
        "--batch_size",
        "7",
        "--rerank",
        "20",
    ]
    assert evaluate.main(argv) == 0
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    if kind == "opt":
        assert scores.keys() == set(metrics.SCORES["caption"])
        with pytest.raises(ValueError, match="needs a checkpoint that ranks"):
            evaluate.main([*argv, "--metric", "retrieval"])
        return
    model, processor = generate.load_model(bases[kind]), blip2.load_processor(bases[kind], "pretrain1")
    entry = data.open_entries(dataset["train"])[0]
    captions = [c for i in range(20) for c in entry.conversations(i)]
    samples = [data.attach_images(processor.encode(c, 64), processor) for c in captions]
    Q = processor.num_image_tokens
    with torch.no_grad():
        similarity = model(data.collate(samples), output="itc")  # (pictures, texts)
        _, ours, matched = evaluate.retrieval(model, processor, captions, 7, 20, [])
        assert (ours - similarity).abs().max() < 1e-5 and matched.isfinite().all()
        for i, j in ((i, 3 * i % 20) for i in range(20)):  # each pair alone
            image, text = model.vision_model(samples[i]["pixel_values"][0][None]), samples[j]["input_ids"][Q:]
            logits = model.match(image, torch.from_numpy(text).long(), torch.tensor([len(text)]))
            assert (matched[:, i, j] - similarity[i, j] - logits[0, 1]).abs().max() < 1e-5
        few_scores, _, few = evaluate.retrieval(model, processor, captions, 7, 3, [])
    for side, dim in ((0, 1), (1, 0)):  # each direction re-ranks its own three
        best = torch.zeros(20, 20).scatter(dim, similarity.topk(3, dim).indices, 1.0) > 0
        assert torch.equal(few[side].isfinite(), best)
        hits = float((best.diag()).float().mean())
        assert few_scores[("itm_text_r10", "itm_image_r10")[side]] == pytest.approx(hits)
    assert not torch.equal(few[0].isfinite(), few[1].isfinite())
    for k, name in ((1, "itc_text_r1"), (5, "itc_text_r5")):
        rank = (similarity > similarity.diag()[:, None]).sum(1)
        assert scores[name] == pytest.approx((rank < k).float().mean().item())
    rank = (similarity > similarity.diag()[None]).sum(0)
    assert scores["itc_image_r10"] == pytest.approx((rank < 10).float().mean().item())


@pytest.mark.parametrize("kind", ["pretrain1", "opt", "t5"])
def test_nothing_is_cut_that_fits_and_a_caption_is_left(bases, dataset, kind):
    processor = blip2.load_processor(bases[kind], "pretrain1" if kind == "pretrain1" else "sft")
    turns = [("user", [ImageRef("a.png"), "one two three four five six seven"]), ("assistant", ["eight"])]
    chat = Conversation("0", turns, "chat", "f:1", ["eight"], "s")
    whole = processor.encode(chat, 512)
    length = len(whole["input_ids"])
    for limit in (length, length + 1):
        sample = processor.encode(chat, limit)
        assert sample["input_ids"].tolist() == whole["input_ids"].tolist() and not sample["truncated"]
    assert processor.encode(chat, length - 1)["truncated"]
    caption = Conversation("0", [turns[0], ("assistant", ["!!! ..."])], "caption", "f:1", ["!!! ..."], "s")
    with pytest.raises(ValueError, match="nothing is left of .* in BLIP-2's wording"):
        processor.encode(caption, 512)


@pytest.mark.parametrize("beams", [1, 2])
def test_min_length_of_t5_counts_the_decoders_tokens(bases, beams):
    """Nearly every token ends an answer; the prompt in the encoder is longer than the minimum, and does not
    count."""
    model, request = generate.load_model(bases["t5"]), our_request("t5", torch.zeros(1, 3, 28, 28))
    ends = [[t] for t in range(model.config.text.vocab_size - 8)]
    if beams == 1:
        (ids,) = generate.generate(model, [request], generate.Decoding(9, min_length=4), ends)
    else:
        (((_, ids), *_),) = generate.beam_search(
            model, [request], generate.Decoding(9, num_beams=beams, min_length=4), ends
        )
    assert len(request["input_ids"]) > 4 and len(ids) >= 4  # the start token, and three that don't end
    assert all([t] not in ends for t in ids[:3])


def their_model(transformers, path, kind):
    theirs, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not set(info["missing_keys"]) - blip2.MODEL.aliases(checkpoint.read_config(path)).keys()
    theirs.config.image_token_index = theirs.config.image_token_id = SLOT
    return theirs.eval()


SLOT, PROMPT = 60, [7, 8, 9]


def their_ids(kind):
    return torch.tensor([[SLOT] * 4 + ([*PROMPT, 1] if kind == "t5" else [2, *PROMPT])])


def our_request(kind, pixels):
    ids = their_ids(kind)[0].tolist() + ([0] if kind == "t5" else [])
    return {
        "input_ids": ids,
        "image_starts": [0],
        "pixel_values": [pixels[0]],
        "seen": [0] if kind == "t5" else ids,
    }


def their_logits(theirs, kind, pixels):
    extra = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    ids = their_ids(kind)
    with torch.no_grad():
        return theirs(
            pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **extra
        ).logits[0]


def our_logits(model, kind, pixels):
    request = our_request(kind, pixels)
    batch = data.collate([{**request, "labels": request["input_ids"], "num_image_tokens": 4}])
    with torch.no_grad():
        return model.logits(model.hidden(batch))


def same_answers(theirs, ours, kind, pixels):
    """Logits, greedy tokens and beams."""
    assert (our_logits(ours, kind, pixels) - their_logits(theirs, kind, pixels)).abs().max() < 1e-4
    ids, request, eos = their_ids(kind), our_request(kind, pixels), 1 if kind == "t5" else 4
    for options in ({}, {"num_beams": 3, "length_penalty": 1.5}, {"num_beams": 4, "repetition_penalty": 1.3}):
        expected = theirs.generate(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=eos,
            pad_token_id=eos,
            decoder_start_token_id=0,
            **options,
        )[0].tolist()
        expected = expected[1 if kind == "t5" else ids.shape[1] :]
        expected = expected[: expected.index(eos) + 1] if eos in expected else expected
        if options:
            found = generate.beam_search(ours, [request], generate.Decoding(8, **options), [[eos]])[0][0][1]
        else:
            found = generate.generate(ours, [request], generate.Decoding(8), [[eos]])[0]
        assert found == expected, options
    return found


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_directories_go_to_transformers_and_back(bases, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    theirs, ours = their_model(transformers, bases[kind], kind), generate.load_model(bases[kind])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    same_answers(theirs, ours, kind, pixels)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    same_answers(theirs, generate.load_model(tmp_path / "theirs"), kind, pixels)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_adapters_go_to_peft_and_back(bases, dataset, tmp_path, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    out = run(bases[kind], dataset, tmp_path / "out", stage="sft", lora=True, learning_rate=3e-2)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = our_logits(generate.load_model(bases[kind]), kind, pixels)

    ours = generate.load_model(bases[kind], lora_path=out)
    theirs = peft.PeftModel.from_pretrained(their_model(transformers, bases[kind], kind), out).eval()
    logits = their_logits(theirs, kind, pixels)
    assert (our_logits(ours, kind, pixels) - logits).abs().max() < 1e-4 and (
        logits - plain
    ).abs().max() > 1e-2

    targets = {"opt": r".*language_model.*\.(q_proj|fc2)", "t5": r".*language_model.*\.(q|wo)"}[kind]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(their_model(transformers, bases[kind], kind), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    logits = their_logits(theirs, kind, pixels)
    ours = generate.load_model(bases[kind], lora_path=tmp_path / "theirs")
    assert (our_logits(ours, kind, pixels) - logits).abs().max() < 1e-4 and (
        logits - plain
    ).abs().max() > 1e-2


def test_stage1_begins_with_bert(bases, tmp_path, monkeypatch, capsys):
    """Against transformers' BERT: a text alone gives its hidden states; queries' feed-forwards are copies."""
    transformers = pytest.importorskip("transformers")
    config = checkpoint.read_config(bases["pretrain1"])
    q = config["qformer_config"]
    sizes = {
        k: q[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    }
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=39, max_position_embeddings=32, **sizes)
    )
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP-2 has none
    bert.save_pretrained(tmp_path / "bert")
    shutil.copy(bases["pretrain1"] / "tokenizer.json", tmp_path / "bert")
    tower = {n: t for n, t in weights(bases["pretrain1"]).items() if n.startswith("vision_model.e")}
    tower = {n.removeprefix("visual_encoder."): t for n, t in lavis.to_lavis(tower).items() if "visual" in n}
    tower |= {
        n.replace("blocks.1.", "blocks.2."): t for n, t in tower.items() if n.startswith("blocks.1.")
    }  # unused
    torch.save(tower, tmp_path / "eva.pth")
    out = tmp_path / "out"
    argv = ["init", str(tmp_path / "bert"), "--tower", str(tmp_path / "eva.pth"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *argv, "--config", str(bases["pretrain1"] / "config.json")])
    assert lavis.main() == 0
    model = generate.load_model(out)
    blip2.load_processor(out, "pretrain1")
    ids, lengths = torch.tensor([2, 5, 9, 3, 2, 7, 3]), torch.tensor([4, 3])
    with torch.no_grad():
        got = model.encode_text(ids, lengths)
        for part, row in zip(got.split([4, 3]), ids.split([4, 3]), strict=True):
            assert (part - bert.eval().bert(row[None]).last_hidden_state[0]).abs().max() < 1e-5
            assert (model.logits(part)[:, :39] - bert(row[None]).logits[0]).abs().max() < 1e-4
    new, old = dict(model.named_parameters()), weights(bases["pretrain1"])
    assert torch.equal(
        new["qformer.encoder.layer.1.output_query.dense.weight"],
        new["qformer.encoder.layer.1.output.dense.weight"],
    )
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(new[name], old[name])
    assert new["embeddings.word_embeddings.weight"].shape[0] == 40 and new["temp"].item() == pytest.approx(
        0.07
    )
    assert 0.01 < new["query_tokens"].std() < 0.03


def test_flan_t5_is_refused_in_fp16(bases, dataset, tmp_path, capsys):
    entries = json.dumps({k: dataset[k] for k in ("train", "eval")})
    argv = [
        "--model_name_or_path",
        str(bases["t5"]),
        "--dataset",
        entries,
        "--output_dir",
        str(tmp_path / "o"),
    ]
    asked = ["--model_name_or_path", str(bases["t5"]), "--image", dataset["image"], "--prompt", "w1"]
    asked += ["--dtype", "float16"]
    for main, options in ((train.main, [*argv, "--fp16"]), (generate.main, asked)):
        assert terminal.cli(lambda main=main, options=options: main(options)) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert err == "error: Flan-T5 overflows in fp16 (float16): use bf16 (bfloat16) or fp32 (float32)"
    assert not (tmp_path / "o").exists()
