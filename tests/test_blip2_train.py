"""BLIP-2 through train.py: stages, layouts, resumption; one process is the reference."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoint
import data
import merge
import model_blip2 as blip2
import train

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
    model = blip2.build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_weights(name, p, train.named_generator(1, name))
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
        "opt": write_checkpoint(root / "opt", OPT), "t5": write_checkpoint(root / "t5", T5),
    }  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    records = []
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": " ".join(WORDS[(i + k) % 20] for k in range(1 + i % 4))})
    (path / "a.json").write_text(json.dumps(records))
    entries = [{"name": "coco_caption", "data_files": str(path / "a.json")}]
    return {"train": entries, "eval": entries, "image": str(path / "0.png")}


def rank_main(rank, world, port, argv):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    sys.exit(checkpoint.cli(lambda: train.main(argv)))


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
    argv = [a for k, v in options.items() for a in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_main, args=(r, world, port, argv)) for r in range(world)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
        if p.is_alive():
            for q in processes:
                q.kill()
            pytest.fail("a rank hangs")
    assert [p.exitcode for p in processes] == [0] * world
    return out


def losses(out):
    return [r["loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in r]


def weights(out):
    w = checkpoint.open_weights(out)
    return {name: w.read(name) for name in w.names}


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
    """20 samples, steps of 8: the last step of an epoch gives one rank more samples than it has, and dropout is on."""
    kind, options = STAGES[case]
    stage = case.split("-")[0]
    one = run(bases[kind], dataset, tmp_path / "one", stage=stage, **options)
    two = run(bases[kind], dataset, tmp_path / "two", world=2, stage=stage, **options)
    assert losses(one)[-1] < losses(one)[0]
    assert_same_run(one, two, 2e-5)
    before, after = weights(bases[kind]), weights(one)
    for name, tensor in before.items():
        frozen = name.startswith("vision_model.e") or (stage == "pretrain2" and name.startswith("language_model."))
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
    samples = [data.load_sample(index, n, 0, processor, 32, 0) for n in range(6)]
    model = blip2.build_model(checkpoint.read_config(bases[kind])).train()
    checkpoint.load_into(dict(model.named_parameters()), checkpoint.open_weights(bases[kind]))

    def gradients(batches):
        model.zero_grad()
        loss = sum(model(b)[0] for b in batches) / sum(b["num_supervised"] for b in batches)
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


def test_stage2_begins_with_stage1(bases, dataset, tmp_path):
    out = run(
        bases["opt"], dataset, tmp_path / "out", stage="pretrain2", init_from=str(bases["pretrain1"]), learning_rate=0.0
    )
    stage1, now = weights(bases["pretrain1"]), weights(out)
    shared = stage1.keys() & now.keys()
    assert "query_tokens" in shared and len(shared) > 50
    assert all(torch.equal(stage1[n], now[n]) for n in shared)


def test_stage_and_checkpoint_must_fit(bases, dataset, tmp_path, capfd):
    with pytest.raises(AssertionError):
        run(bases["opt"], dataset, tmp_path / "out", stage="pretrain1")
    assert "do not go together" in capfd.readouterr().err


def test_lora_with_the_toolkits_keys(bases, dataset, tmp_path):
    """paddlemix/config/blip2/lora_sft_argument.json, key for key, in fewer steps and in fp32."""
    toolkit = {
        "text_model_name_or_path": "facebook/opt-2.7b", "overwrite_output_dir": True, "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 128, "eval_accumulation_steps": 16, "num_train_epochs": 10, "weight_decay": 0.05,
        "adam_beta2": 0.95, "eta_min": 1e-5, "warmup_start_lr": 1e-6, "lr_scheduler_name": "CosineDecayWithWarmup",
        "logging_steps": 1, "save_steps": 10, "evaluation_strategy": "steps", "save_strategy": "steps",
        "fp16_opt_level": "O1", "do_train": True, "do_eval": False, "do_predict": False, "load_best_model_at_end": True,
        "eval_with_do_generation": False, "save_total_limit": 1, "lora": True, "lora_rank": 16, "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["language_model.opt.decoder.layers.*.self_attn.q_proj.*",
                                "language_model.opt.decoder.layers.*.self_attn.v_proj.*"],
    }  # fmt: skip
    out = run(bases["opt"], dataset, tmp_path / "out", max_steps=12, learning_rate=1e-2, **toolkit)
    assert losses(out)[-1] < losses(out)[0]
    config = json.loads((out / "adapter_config.json").read_text())
    merged = tmp_path / "merged"
    merge.main(["--lora_path", str(out), "--merge_model_path", str(merged)])
    request = tmp_path / "r.jsonl"
    request.write_text(json.dumps({"prompt": "Question: w1 Short answer:", "image": dataset["image"]}) + "\n")
    answers = []
    for options in (["--lora_path", str(out)], ["--model_name_or_path", str(merged)]):
        for beams in ("1", "3"):
            files = ["--requests", str(request), "--output", str(tmp_path / "a")]
            command = [sys.executable, "generate.py", *options, *files]
            subprocess.run([*command, "--num_beams", beams, "--max_new_tokens", "5"], check=True, cwd=data.ROOT)
            answers.append((tmp_path / "a").read_text())
    assert answers[:2] == answers[2:]
    assert config["r"] == 16 and sorted(config["target_modules"]) == sorted(
        f"language_model.model.decoder.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"
    )


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_transformers_reads_what_we_write(bases, kind):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
        bases[kind], output_loading_info=True, dtype=torch.float32
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not set(info["missing_keys"]) - blip2.ALIASES.keys()
    ours = blip2.build_model(checkpoint.read_config(bases[kind])).eval()
    checkpoint.load_into(dict(ours.named_parameters()), checkpoint.open_weights(bases[kind]))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    slot, Q = 60, 4
    theirs.config.image_token_index = theirs.config.image_token_id = slot
    text = [7, 8, 9]
    ids = [slot] * Q + ([*text, 1] if kind == "t5" else [2, *text])
    ours_ids = torch.tensor(ids + ([0] if kind == "t5" else []))
    batch = {
        "input_ids": ours_ids,
        "position_ids": torch.arange(len(ours_ids)),
        "max_len": len(ours_ids),
        "pixel_values": pixels,
        "cu_seqlens": torch.tensor([0, len(ours_ids)], dtype=torch.int32),
        "image_positions": torch.arange(Q)[None],
    }
    extra = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    with torch.no_grad():
        expected = theirs.eval()(
            pixel_values=pixels, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **extra
        ).logits
        got = ours.logits(ours.hidden(batch))
    assert (got - expected[0]).abs().max() < 1e-4
