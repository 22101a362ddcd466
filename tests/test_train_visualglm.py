"""VisualGLM in the loop: SFT, LoRA, P-tuning and pre-training; packs, layouts, resumption, answers learned by
heart."""

import fnmatch
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cells import diagonal, slow, thinned
from PIL import Image
from ranks import run, script, start
from small import arguments, assert_same_run, filled, gradients, log_of, losses, wait_for_step, weights
from tokenizers import AddedToken, Tokenizer, models

import checkpoint
import data
import evaluate
import generate
import merge
import model_visualglm as glm
import terminal
import tokenizer_visualglm
import train
from convert import sat

QUESTIONS = ["what is it?", "这是什么？", "name it\nnow", "它是什么颜色？"]
ANSWERS = ["a red bus, fast", "一只橘色的猫。", "two old men", "蓝色的，很亮！"]
CONTROL = ["[MASK]", "[gMASK]", "<sop>", "<eop>"]


@pytest.fixture(scope="session")
def glm_base(tmp_path_factory):
    """A checkpoint of 150 thousand parameters: random weights, a vocabulary of single characters."""
    path = tmp_path_factory.mktemp("glm_base")
    text = (
        "".join(QUESTIONS + ANSWERS)
        + "问答：,.:;?!<>/img0123456789abcdefghijklmnopqrstuvwxyzQADescribthmg描述这张图片。"
    )
    letters = sorted({c for c in text.replace("\n", "")} - {" "} | {tokenizer_visualglm.SPACE})
    special = ["<unk>", "<s>", "</s>", "<pad>", tokenizer_visualglm.NEWLINE]
    pieces = [
        *special,
        *letters,
        *CONTROL,
        tokenizer_visualglm.TAB,
        *tokenizer_visualglm.BLANKS,
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    tokenizer = Tokenizer(models.Unigram([(p, 0.0 if p in special else -5.0) for p in pieces], 0))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (*special[:4], *CONTROL)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "model_type": "chatglm",
        "hidden_size": 64,
        "inner_hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(pieces) + 3,
        "bos_token_id": pieces.index("<sop>"),
        "eos_token_id": pieces.index("<eop>"),
        "mask_token_id": pieces.index("[MASK]"),
        "gmask_token_id": pieces.index("[gMASK]"),
        "pad_token_id": 3,
        "image_length": 4,
        "initializer_range": 0.1,
        "eva_config": {
            "num_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "inner_hidden_size": 64,
            "image_size": [32, 32],
            "patch_size": 8,
        },
        "qformer_config": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 4,
            "is_decoder": [True, False],
        },
    }
    checkpoint.write_json(path / "config.json", config)
    model = filled(glm.build_model(config))
    extra = {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    checkpoint.save_weights(path, {**model.state_dict(), **extra}.items())
    return path


@pytest.fixture(scope="session")
def glm_dataset(tmp_path_factory):
    """24 records in the model's own format and as chats of one or two
    rounds, every third without a picture."""
    path = tmp_path_factory.mktemp("glm_data")
    rng, own, chats = np.random.default_rng(0), [], []
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i}.png")
        question, answer = QUESTIONS[i % 4] * (1 + i % 3), ANSWERS[i // 2 % 4]
        if i % 2:
            own.append({"img": f"{i}.png", "prompt": question, "label": answer})
        else:
            tag = "" if i % 3 == 2 else f"Picture 1: <img>{i}.png</img>\n"
            rounds = [[tag + question, answer]] + ([["name it", "no"]] if i % 4 else [])
            chats.append({"id": str(i), "conversations": rounds})
    (path / "own.json").write_text(json.dumps(own))
    (path / "chats.json").write_text(json.dumps(chats))
    names = {"own.json": "visualglm_dataset", "chats.json": "chatml_dataset"}
    return {"train": [{"name": name, "data_files": str(path / file)} for file, name in names.items()]}


MODES = {
    "sft": {},
    "lora": {"lora": True, "lora_split": True, "lora_rank": 3, "lora_dropout": 0.3},
    "plain lora": {"lora": True, "lora_target_modules": [".*query_key_value"]},
    "ptuning": {"pre_seq_len": 3, "learning_rate": 0.05, "adam_epsilon": 1e-8},  # its gradients are small
}
SIZE = {"per_device_train_batch_size": 8, "max_steps": 6}


@pytest.fixture(scope="session")
def glm_references(glm_base, glm_dataset, tmp_path_factory):
    out = {}
    for mode, options in MODES.items():
        out[mode] = tmp_path_factory.mktemp("glm") / "out"
        run(arguments(glm_base, glm_dataset, out[mode], **{**SIZE, **options}))
        first, second = losses(out[mode])[:3], losses(out[mode])[3:]  # three steps are an epoch
        assert len(second) == 3 and sum(second) < sum(first) - 1e-3, (mode, first, second)
    return out


STAGES = ("stage1", "stage2", "stage3")


@pytest.mark.parametrize("mode, sharding", diagonal(("sft", "lora", "ptuning"), STAGES))
def test_two_processes_equal_one(glm_references, glm_base, glm_dataset, tmp_path, mode, sharding):
    """Micro-batches of one sample, so that often only one of the ranks has a picture."""
    split = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "sharding": sharding,
    }
    run(arguments(glm_base, glm_dataset, tmp_path / "out", **{**split, **MODES[mode]}), world=2)
    assert_same_run(tmp_path / "out", glm_references[mode])


@pytest.mark.parametrize("mode", thinned(["sft", "lora", "ptuning"], ["ptuning"]))
def test_stopped_run_continues_exactly(glm_references, glm_base, glm_dataset, tmp_path, mode):
    """Three steps of six, then the same command again, with recomputation."""
    options = {**SIZE, **MODES[mode], "lr_scheduler_type": "constant"}
    run(arguments(glm_base, glm_dataset, tmp_path / "reference", **options))
    run(arguments(glm_base, glm_dataset, tmp_path / "out", **{**options, "max_steps": 3}))
    run(arguments(glm_base, glm_dataset, tmp_path / "out", **options))
    assert losses(tmp_path / "out") == losses(tmp_path / "reference")
    a, b = weights(tmp_path / "out"), weights(tmp_path / "reference")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)
    run(arguments(glm_base, glm_dataset, tmp_path / "again", **options, recompute=True))
    assert_same_run(tmp_path / "again", tmp_path / "reference")


@pytest.mark.parametrize("mode", [slow("sft"), "lora"])
def test_killed_run_continues_exactly(glm_base, glm_dataset, tmp_path, mode):
    """kill -9 somewhere behind the second checkpoint, then the same
    command: losses and weights bit for bit."""
    options = {**SIZE, **MODES[mode], "lr_scheduler_type": "constant", "max_steps": 5000, "save_steps": 4}
    argv = arguments(glm_base, glm_dataset, tmp_path / "out", **options)
    (process,) = start(script, train.main, argv)
    wait_for_step(tmp_path / "out", 9, process.is_alive)
    process.kill()
    process.join()
    done = len(losses(tmp_path / "out"))
    assert 9 <= done < 5000 and checkpoint.last_checkpoint(tmp_path / "out")
    options["max_steps"] = done + 4
    run(arguments(glm_base, glm_dataset, tmp_path / "out", **options))
    run(arguments(glm_base, glm_dataset, tmp_path / "reference", **options))
    assert losses(tmp_path / "out") == losses(tmp_path / "reference")
    a, b = weights(tmp_path / "out"), weights(tmp_path / "reference")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("pre_seq_len", [None, 3])
def test_packed_equals_one_by_one(glm_base, glm_dataset, pre_seq_len):
    """Loss and every gradient, the image encoder's included, with
    contexts and answers of different lengths."""
    processor = glm.load_processor(glm_base)
    index = data.build_index(glm_dataset["train"], processor, 128, None, 0, False)
    plan = data.Plan(index, 0, 128)
    samples = [data.load_sample(plan, n, 0, processor) for n in range(4, 20)]
    assert len({s["prefix_len"] for s in samples}) > 3 and len({len(s["images"]) for s in samples}) == 2
    model = glm.build_model({**checkpoint.read_config(glm_base), "pre_seq_len": pre_seq_len}).train()
    parameters = dict(model.named_parameters())
    prefix = {n: parameters.pop(n) for n in list(parameters) if "prefix_encoder" in n}
    checkpoint.load_into(parameters, checkpoint.open_weights(glm_base, glm.MODEL.ignored_weights))
    for p in prefix.values():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))

    loss, packed = gradients(model, [data.collate(samples)])
    loss_single, single = gradients(model, [data.collate([s]) for s in samples])
    assert abs(loss - loss_single) < 1e-5
    assert packed.keys() == single.keys() and any("qformer" in n for n in packed)
    assert bool(prefix) == any("prefix_encoder" in n for n in packed)
    for name in packed:
        assert (packed[name] - single[name]).abs().max() < 1e-5, name


def test_what_trains(glm_references, glm_base, glm_dataset, tmp_path):
    before, tuned = weights(glm_base), weights(glm_references["ptuning"])
    new = tuned.keys() - before.keys()
    assert new == {"transformer.prefix_encoder.embedding.weight"}
    assert all(torch.equal(tuned[n], before[n]) for n in tuned.keys() - new)
    assert checkpoint.read_config(glm_references["ptuning"])["pre_seq_len"] == 3
    captions = [
        {"image": r["img"], "caption": r["label"]}
        for r in json.loads(open(glm_dataset["train"][0]["data_files"]).read())
    ]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(captions))
    root = glm_dataset["train"][0]["data_files"].rsplit("/", 1)[0]
    entries = {"train": [{"name": "coco_caption", "data_files": str(file), "image_root": root}]}
    run(
        arguments(
            glm_base,
            entries,
            tmp_path / "out",
            stage="pretrain",
            freeze_include=["image_encoder.vit.*"],
            **SIZE,
        )
    )
    after = weights(tmp_path / "out")
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert changed and all(
        n.startswith(("image_encoder.qformer.", "image_encoder.glm_proj.")) for n in changed
    )
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.mark.parametrize("mode", ["lora", "plain lora"])
def test_merge_folds_the_adapter(glm_references, glm_base, tmp_path, mode, capsys):
    """merge.py's own check of tensors and logits, with the adapter and after folding."""
    info = merge.merge(None, glm_references[mode], tmp_path / "merged")
    assert info["logits_vs_adapter"] < 1e-4 < info["logits_vs_base"]
    names = {n for n, t in weights(tmp_path / "merged").items() if not torch.equal(t, weights(glm_base)[n])}
    assert any("query_key_value" in n for n in names)
    assert all(n.startswith("transformer.layers.") for n in names)
    for qkv in ("split", "per_head"):  # the merged model in SAT's file and back, bit for bit
        file, back = str(tmp_path / f"sat_{qkv}"), tmp_path / f"back_{qkv}"
        sat.main(["export", str(tmp_path / "merged"), file, "--qkv", qkv])
        sat.main(["import", file, str(back), "--qkv", qkv])
        merged = {n: t for n, t in weights(tmp_path / "merged").items() if not n.endswith("inv_freq")}
        again = weights(back)
        assert again.keys() == merged.keys() and all(torch.equal(again[n], merged[n]) for n in merged)


def test_four_samples_by_heart(glm_base, tmp_path, capsys):
    """Chinese and English, same picture for none: the answers come back exactly, and end."""
    rng = np.random.default_rng(1)
    records = []
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        records.append({"img": f"{i}.png", "prompt": question, "label": answer})
    (tmp_path / "four.json").write_text(json.dumps(records))
    entries = {"train": [{"name": "visualglm_dataset", "data_files": str(tmp_path / "four.json")}]}
    size = {"per_device_train_batch_size": 4, "max_steps": 80, "learning_rate": 5e-3}
    run(arguments(glm_base, entries, tmp_path / "out", **size))
    assert losses(tmp_path / "out")[-1] < 0.05
    model, processor = generate.load_model(tmp_path / "out"), glm.load_processor(tmp_path / "out")
    conversations = data.open_entries(entries["train"])[0]
    questions = [c for i in range(4) for c in conversations.conversations(i)]
    requests = [processor.prompt(c) for c in questions]
    for request in requests:
        request["pixel_values"] = [processor.load_image(p) for p in request["images"]]
    answers = generate.generate(model, requests, generate.Decoding(40), processor.stop_words)
    assert [processor.decode(a) for a in answers] == ANSWERS and all(a[-1] == processor.eos for a in answers)
    assert answers == [
        generate.generate(model, [r], generate.Decoding(40), processor.stop_words)[0] for r in requests
    ]
    argv = ["--model_name_or_path", str(tmp_path / "out"), "--batch_size", "2"]
    evaluate.main([*argv, "--name", "visualglm_dataset", "--data_files", str(tmp_path / "four.json")])
    out, err = capsys.readouterr()
    assert (
        "scores of 4 answers: vqa_accuracy 1.000, accuracy 1.000" in out and "kernels: plain PyTorch" in err
    )


TOOLKIT = {  # PaddleMIX's visualglm/sft_argument.json and lora_sft_argument.json, key for key
    "mixtoken": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 16,
    "learning_rate": 3e-4,
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "save_strategy": "steps",
    "src_length": 1024,
    "max_length": 2048,
    "fp16": True,
    "fp16_opt_level": "O2",
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "load_best_model_at_end": True,
    "eval_with_do_generation": False,
    "save_total_limit": 1,
}
TOOLKIT_SFT = {
    "freeze_include": ["*vision_model*"],
    "num_train_epochs": 2,
    "warmup_steps": 30,
    "save_steps": 10,
}
TOOLKIT_LORA = {
    "lora": True,
    "num_train_epochs": 30,
    "warmup_ratio": 0.02,
    "lr_scheduler_type": "cosine",
    "save_steps": 5,
    "lora_target_modules": [".*query_key_value.*", ".*dense.*", ".*dense_h_to_4h", ".*dense_4h_to_h"],
}


@pytest.mark.parametrize("own", [TOOLKIT_SFT, TOOLKIT_LORA])
def test_toolkit_files_run_unchanged(glm_base, tmp_path, own):
    """Only the paths differ from the published files, and the number of steps."""
    rng, records = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "question": QUESTIONS[i % 4], "answer": ANSWERS[i % 4]})
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "val.json").write_text(json.dumps(records[:3]))
    entries = {
        split: [{"name": "coco_vqa", "data_files": str(tmp_path / file)}]
        for split, file in (("train", "train.json"), ("eval", "val.json"))
    }
    config = {**TOOLKIT, **own, "model_name_or_path": str(glm_base), "dataset": entries}
    config |= {"output_dir": str(tmp_path / "out")}
    (tmp_path / "argument.json").write_text(json.dumps(config))
    run([str(tmp_path / "argument.json"), "--num_workers", "0", "--max_steps", "10"])
    records = log_of(tmp_path / "out")
    assert (
        len(losses(tmp_path / "out")) == 10
        and sum("eval_loss" in r for r in records) == 10 // own["save_steps"]
    )
    before, after = weights(glm_base), weights(tmp_path / "out")
    if "lora" in own:  # the language model's linear layers, no others
        changed = {n.partition(".lora_")[0] for n in after if ".lora_" in n}
        assert changed == {
            f"transformer.layers.{i}.{m}"
            for i in range(2)
            for m in (
                "attention.query_key_value",
                "attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
        }
    else:
        same = {n for n in after if torch.equal(after[n], before[n].to(after[n].dtype))}
        tower = {n for n in after if fnmatch.fnmatch(n, "image_encoder.vit.*")}
        assert tower <= same and any("qformer" in n for n in after.keys() - same)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_chat_at_the_command_line(glm_base, tmp_path, monkeypatch, capsys, language):
    """Each question after all earlier rounds, the picture at the front of the first: ids as the format writes
    them."""
    base = tmp_path / "base"
    base.mkdir()
    for file in ("tokenizer.json", "model.safetensors"):
        os.link(glm_base / file, base / file)
    checkpoint.write_json(
        base / "config.json", {**checkpoint.read_config(glm_base), "prompt_language": language}
    )
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    asked, plain = [], generate.run_all

    def watch(engine, wanted, *rest):
        wanted = list(wanted)
        asked.extend(request.prompt["input_ids"].tolist() for request in wanted)
        return plain(engine, iter(wanted), *rest)

    monkeypatch.setattr(generate, "run_all", watch)
    questions = {"zh": ["这是什么？", "它是什么颜色？", "很亮"], "en": ["what is it?", "name it", "two"]}[
        language
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([questions[0], "", *questions[1:]])))
    generate.main(
        [
            "--model_name_or_path",
            str(base),
            "--image",
            str(tmp_path / "a.png"),
            "--chat",
            "--max_new_tokens",
            "3",
        ]
    )
    out, err = capsys.readouterr()
    answers, tk = out.splitlines(), glm.load_processor(base).tokenizer
    assert len(answers) == len(asked) == 3 and "kernels: plain PyTorch" in err
    for n, ids in enumerate(asked):
        q, a = {"zh": ("问：", "答："), "en": ("Q:", "A:")}[language]
        text = "".join(f"{q}{x}\n{a}{y}\n" for x, y in zip(questions[:n], answers, strict=False))
        text += f"{q}{questions[n]}\n{a}"
        tag = tk.encode("<img>")
        assert ids == [*tag, *[tk.unk] * 4, *tk.encode("</img>" + text), tk.gmask, tk.sop]


def test_generate_refuses_pictures(glm_base, tmp_path, capsys):
    pictures = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in pictures:
        Image.new("RGB", (8, 8)).save(path)
    later = {"conversations": [["what is it?", "two"], [f"<img>{pictures[0]}</img>name it", "later"]]}
    (tmp_path / "r.jsonl").write_text(json.dumps(later))
    for argv, words in (
        (
            ["--prompt", "what is it?", "--image", pictures[0], "--image", pictures[1]],
            "takes one image.*2 images",
        ),
        (["--requests", str(tmp_path / "r.jsonl")], r"r.jsonl:1: .*one image, at the front.*in a later turn"),
        (["--prompt", "what is it?", "--image", "no.png"], "no.png"),
    ):
        assert (
            terminal.cli(lambda argv=argv: generate.main(["--model_name_or_path", str(glm_base), *argv])) == 1
        )
        out, err = capsys.readouterr()
        assert not out and re.fullmatch(f"(device.*\n)?(warning: .*\n)?error: .*{words}.*\n", err), err


@pytest.fixture(scope="module")
def untrained_tiny(tmp_path_factory):
    """What the tiny model's recipe begins with."""
    path = tmp_path_factory.mktemp("tiny") / "init"
    command = [sys.executable, "runs/make_tiny_visualglm.py", "init", str(path)]
    subprocess.run(command, cwd=data.ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})
    return path


@pytest.mark.parametrize("stage", ["sft", "lora", "pretrain"])
def test_sample_configurations(untrained_tiny, tmp_path, stage):
    """configs/visualglm/samples_*.json as they are, but for 16 records of a file and two steps."""
    config = json.loads((data.ROOT / f"configs/visualglm/samples_{stage}.json").read_text())
    options = {"model_name_or_path": str(untrained_tiny), "output_dir": str(tmp_path / "out"), "max_steps": 2}
    for entries in config["dataset"].values():
        for entry in entries:
            entry["max_samples"] = 16
            for key in ("data_files", "image_root"):
                entry[key] = str(data.ROOT / entry[key])
    (tmp_path / "config.json").write_text(json.dumps({**config, **options, "num_workers": 0}))
    run([str(tmp_path / "config.json")])
    assert len(losses(tmp_path / "out")) == 2
    records = log_of(tmp_path / "out")
    assert any("eval_loss" in r for r in records)


@pytest.mark.parametrize(
    "record, words",
    [
        (
            {"conversations": [["<img>0.png</img>a <img>1.png</img>b", "c"]]},
            "one image, at the front.*2 images",
        ),
        ({"conversations": [["a", "b"], ["<img>0.png</img>c", "d"]]}, "at the front.*in a later turn"),
        ({"conversations": [["what is it? " * 40, "b"]]}, "no answer fits within max_length=128"),
    ],
)
def test_records_that_the_model_cannot_take(glm_base, tmp_path, record, words):
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.json").write_text(json.dumps([record]))
    entries = [{"name": "chatml_dataset", "data_files": str(tmp_path / "a.json")}]
    with pytest.raises(ValueError, match=f"a.json record 0.*{words}"):
        data.build_index(entries, glm.load_processor(glm_base), 128, None, 0, False)
