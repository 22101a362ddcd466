"""evaluate.py from the command line: which model, adapter, data and settings it takes, the public metrics'
own files, bad images, a stop."""

import ast
import json
import signal
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from ranks import run as train_run
from ranks import together

import evaluate
import generate
import model_qwen_vl as qwen
import terminal

ROOT = Path(evaluate.__file__).parent


def results(path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write(path, value) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.fixture
def says(monkeypatch, base):
    """says(texts): the model's tokens are those of the text of each request's id; everything around them is
    real."""

    def stub(texts: dict):
        tokenizer = qwen.load_processor(base).tokenizer

        def tokens(engine, wanted, *_args):
            return ((request, tokenizer.encode(texts[request.id])) for request in wanted)

        monkeypatch.setattr(generate, "run_all", tokens)

    return stub


def test_golden_vqa_through_the_command(goldens, base, says, tmp_path):
    """VQAv2's own two files and names of images; references with their multiplicity."""
    golden = results(goldens / "metrics/vqa.json")
    cases, questions, annotations = golden["cases"], [], []
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val2014/COCO_val2014_000000000007.jpg")
    for n, case in enumerate(cases):
        questions.append({"question_id": n, "image_id": 7, "question": f"what is {n}?"})
        annotations.append(
            {
                "question_id": n,
                "image_id": 7,
                "question_type": case["question_type"],
                "answer_type": case["answer_type"],
                "multiple_choice_answer": Counter(case["answers"]).most_common(1)[0][0],
                "answers": [{"answer": a, "answer_id": i + 1} for i, a in enumerate(case["answers"])],
            }
        )
    files = [
        write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions}),
        write(tmp_path / "a.json", {"data_subtype": "val2014", "annotations": annotations}),
    ]
    says({str(n): case["prediction"] for n, case in enumerate(cases)})
    argv = ["--model_name_or_path", str(base), "--data_files", files[0], "--data_files", files[1]]
    argv += ["--image_root", str(tmp_path), "--output", str(tmp_path / "r.json")]
    assert evaluate.main(argv) == 0
    found = results(tmp_path / "r.json")
    assert [round(100 * a["scores"]["vqa_accuracy"], 2) for a in found["answers"]] == [
        c["accuracy"] for c in cases
    ]
    assert round(100 * found["scores"]["vqa_accuracy"], 2) == golden["overall"]


def test_golden_captions_through_the_command(goldens, base, says, tmp_path):
    """COCO's own layout, all captions of an image its references."""
    names = {"BLEU1": "bleu_1", "BLEU4": "bleu_4", "ROUGE_L": "rouge_l", "CIDEr_D": "cider"}
    for name, corpus in results(goldens / "metrics/caption.json")["corpora"].items():
        images, annotations = [], []
        for n, one in enumerate(corpus["sets"]):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
            images.append({"id": n, "file_name": f"{n}.png"})
            annotations += [{"image_id": n, "caption": text} for text in one["references"]]
        path = write(tmp_path / "c.json", {"images": images, "annotations": annotations})
        says({str(n): one["candidate"] for n, one in enumerate(corpus["sets"])})
        argv = ["--model_name_or_path", str(base), "--data_files", path, "--name", "coco_caption"]
        assert evaluate.main([*argv, "--output", str(tmp_path / "r.json")]) == 0
        found = results(tmp_path / "r.json")["scores"]
        for key, ours in names.items():
            assert abs(found[ours] - corpus["corpus"][key]) < 1e-9, (name, key)


@pytest.fixture(scope="module")
def run_of_adapter(base, tmp_path_factory):
    """A finished LoRA run on records of its own, with a part of the eval entry left out by max_samples and
    splits."""
    path = tmp_path_factory.mktemp("run")
    rng, records = np.random.default_rng(0), []
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path / f"{i}.png")
        split = "val" if i % 2 else "test"
        records.append(
            {"question_id": i, "image": f"{i}.png", "question": "q?", "answers": [f"a{i}"], "split": split}
        )
    write(path / "d.json", records)
    entry = {"name": "coco_vqa", "data_files": str(path / "d.json")}
    config = {
        "model_name_or_path": str(base),
        "lora": True,
        "max_steps": 1,
        "num_workers": 0,
        "max_length": 128,
        "disable_tqdm": True,
        "per_device_eval_batch_size": 3,
        "output_dir": str(path / "out"),
        "save_steps": 1,
        "dataset": {"train": [entry], "eval": [{**entry, "splits": ["val"], "max_samples": 3}]},
    }
    train_run([write(path / "c.json", config)])
    return path


@pytest.mark.parametrize("part", ["", "checkpoint-1"])
def test_an_adapter_is_scored_on_the_data_of_its_run(run_of_adapter, base, tmp_path, capsys, part):
    adapter = str(run_of_adapter / "out" / part)
    assert evaluate.main(["--lora_path", adapter, "--output", str(tmp_path / "r.json")]) == 0
    found, out = results(tmp_path / "r.json"), capsys.readouterr().out
    assert [a["id"] for a in found["answers"]] == ["1", "3", "5"]
    assert found["lora_path"] == adapter and found["model_name_or_path"] == str(base)
    assert f"scoring {base} (qwen_vl, sft, float32) with adapter {adapter} on coco_vqa:d" in out


def test_an_adapter_without_its_run_needs_data(run_of_adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((run_of_adapter / "out" / name).read_bytes())
    with pytest.raises(ValueError, match="no train_config.json.*--data_files"):
        evaluate.main(["--lora_path", str(tmp_path)])


def test_a_configuration_is_honoured_and_validated(run_of_adapter, base, tmp_path, monkeypatch):
    """Batch, precision, adapter and stage come from it; options win; what training refuses is refused."""
    seen = []
    real = evaluate.answer_all

    def spy(model, processor, conversations, batch_size, *args, **options):
        seen.append((next(model.parameters()).dtype, batch_size, processor.stage))
        return real(model, processor, conversations, batch_size, *args, **options)

    monkeypatch.setattr(evaluate, "answer_all", spy)
    given = results(run_of_adapter / "c.json")
    given |= {
        "bf16": True,
        "fp16_opt_level": "O2",
        "stage": "pretrain",
        "lora_path": str(run_of_adapter / "out"),
    }
    path, out = write(tmp_path / "c.json", given), str(tmp_path / "r.json")
    evaluate.main([path, "--output", out])
    assert results(out)["lora_path"] == given["lora_path"] and results(out)["prompt_format"] == "pretrain"
    evaluate.main([path, "--batch_size", "2", "--dtype", "float32", "--stage", "sft", "--output", out])
    assert [(str(d), b, s) for d, b, s in seen] == [
        ("torch.bfloat16", 3, "pretrain"),
        ("torch.float32", 2, "sft"),
    ]
    with pytest.raises(ValueError, match="bf16 and fp16"):
        evaluate.main([write(tmp_path / "d.json", {**given, "fp16": True})])
    with pytest.raises(ValueError, match="unknown key 'learning_rat'"):
        evaluate.main([write(tmp_path / "e.json", {**given, "learning_rat": 1})])


@pytest.fixture
def cut(tmp_path):
    """Four questions, the third with a cut image."""
    records = []
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        records.append({"question_id": i, "image": f"{i}.png", "question": "q?", "answers": [f"a{i}"]})
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    return write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, records)))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--boxes", "{}/0.png"], "0.png: File exists"),
        (["--prompt", "Answer:"], "d.jsonl:1: --prompt 'Answer:' has no {}"),
        (
            ["--prompt", "{} Answer:", "--data_files", "{}/two.jsonl"],
            "two.jsonl:1: --prompt words one question",
        ),
        (
            ["--prompt", "{} Answer:", "--data_files", "{}/in.jsonl"],
            "in.jsonl:1: --prompt words one question",
        ),
        (["--metric", "grounding"], "d.jsonl:1: metric=grounding, and a reference has no box"),
        (["--output", "{}/d.jsonl"], "is what is read, and would be lost"),
    ],
)
def test_what_cannot_be_scored_or_kept_is_refused_first(
    cut, base, tmp_path, capsys, monkeypatch, options, words
):
    monkeypatch.setattr(evaluate, "load_as_asked", None)  # nothing is loaded by then
    for name, asked in (("two", ["<image>q", "a", "q?", "b"]), ("in", ["is <image> red?", "yes"])):
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(asked)]
        write(tmp_path / f"{name}.jsonl", {"messages": turns, "images": ["0.png"]})
    before = Path(cut).read_bytes()
    argv = [
        "--model_name_or_path",
        str(base),
        "--data_files",
        cut,
        *(o.replace("{}/", f"{tmp_path}/") for o in options),
    ]
    assert terminal.cli(lambda: evaluate.main(argv)) == 1
    assert words in capsys.readouterr().err.splitlines()[-1] and Path(cut).read_bytes() == before


@pytest.mark.parametrize("allowed", [0.5, 0.01])
def test_a_bad_image_is_named_and_the_others_are_scored(cut, base, says, tmp_path, capsys, allowed):
    says({str(i): f"a{i}" for i in range(4)})
    argv = ["--model_name_or_path", str(base), "--data_files", cut, "--output", str(tmp_path / "r.json")]
    argv += ["--batch_size", "2", "--max_bad_samples", str(allowed)]
    assert terminal.cli(lambda: evaluate.main(argv)) == (allowed < 0.25)
    err = capsys.readouterr().err
    assert "warning: left out" in err and "d.jsonl:3: " in err and err.count("error: ") == (allowed < 0.25)
    found = results(tmp_path / "r.json")
    assert [a["id"] for a in found["answers"]] == ["0", "1", "3"] and found["scores"]["vqa_accuracy"] == 1.0
    assert len(found["left_out"]) == 1 and found["left_out"][0]["where"].endswith("d.jsonl:3")


def test_a_bad_image_does_not_end_training(cut, base, tmp_path, capfd):
    entries = [{"name": "coco_vqa", "data_files": cut}]
    config = {
        "model_name_or_path": str(base),
        "max_steps": 1,
        "num_workers": 0,
        "max_length": 128,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "eval_with_do_generation": True,
        "max_bad_samples": 0.5,
        "dataset": {"train": entries, "eval": entries},
    }
    train_run([write(tmp_path / "c.json", config)])
    assert "eval_vqa_accuracy" in (tmp_path / "out/log.jsonl").read_text(encoding="utf-8")
    assert "d.jsonl:3: " in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_keeps_its_answers(base, says, tmp_path, capsys, monkeypatch, number):
    """The second batch is broken off by a signal; a restart says that it begins again."""
    records = []
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        records.append({"question_id": i, "image": f"{i}.png", "question": "q?", "answers": [f"a{i}"]})
    path, out = write(tmp_path / "d.json", records), tmp_path / "r.json"
    says({str(i): f"a{i}" for i in range(4)})
    done, stub = [], generate.run_all

    def stopped(*args):
        for answer in stub(*args):
            done.append(answer)
            if len(done) == 3:
                signal.raise_signal(number)
            yield answer

    monkeypatch.setattr(generate, "run_all", stopped)
    before = signal.signal(number, signal.default_int_handler)  # a background job's SIGINT is ignored
    argv = [
        "--model_name_or_path",
        str(base),
        "--data_files",
        path,
        "--batch_size",
        "2",
        "--output",
        str(out),
    ]
    assert terminal.cli(lambda: evaluate.main(argv)) == 130
    assert signal.signal(number, before) is signal.default_int_handler
    assert "2 of 4 questions answered" in capsys.readouterr().out
    assert [a["answer"] for a in results(out)["answers"]] == ["a0", "a1"] and results(out)[
        "complete"
    ] is False
    assert terminal.cli(lambda: evaluate.main(argv)) == 0
    assert "this one begins again" in capsys.readouterr().out
    assert len(results(out)["answers"]) == 4 and results(out)["complete"] is True


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_bar_is_for_terminals_and_leaves_no_trace(
    cut, base, says, monkeypatch, capsys, terminal
):
    says({str(i): f"a{i}" for i in range(4)})
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    argv = [
        "--model_name_or_path",
        str(base),
        "--data_files",
        cut,
        "--batch_size",
        "1",
        "--max_bad_samples",
        "1",
    ]
    evaluate.main(argv)
    err = capsys.readouterr().err
    assert ("\r" in err) == terminal == ("] 4/4 answered, 0:00 left" in err)
    for line in err.split("\n"):  # what stays on a line has no bar in front
        assert " answered" not in line.split("\r\033[K")[-1]


def test_every_text_file_is_opened_with_an_encoding():
    """Files are UTF-8 whatever the locale says."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]
    assert len(scripts) > 15
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            keys = {k.arg: k.value for k in node.keywords}
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
                assert "encoding" in keys, f"{path.name}:{node.lineno}"
            if isinstance(node.func, ast.Name) and node.func.id == "open":
                mode = node.args[1] if len(node.args) > 1 else keys.get("mode", ast.Constant("r"))
                binary = isinstance(mode, ast.Constant) and "b" in mode.value
                assert binary or "encoding" in keys, f"{path.name}:{node.lineno}"


def answers_of_ranks(rank, numbers):
    """What answer_in_turn gives on a rank, and how often it asked between answers."""

    def answer_all(model, processor, conversations, batch_size, how, bad):
        for number in conversations:
            if number % 4 == 1:
                bad.append((f"record {number}", "no image"))
            yield None if number % 4 == 1 else f"answer {number}"

    asked = []
    with mock.patch.object(evaluate, "answer_all", answer_all):
        turn = rank, 2
        found = evaluate.answer_in_turn(None, None, numbers, 3, None, turn, lambda: asked.append(1))
    return found, len(asked)


@pytest.mark.parametrize("count", [7, 1])
def test_answers_in_turn_are_in_order(count):
    """Whoever gave them; and ranks with fewer questions ask about signals as often as the others."""
    first, second = together(answers_of_ranks, list(range(count)))
    assert first == second
    (answers, bad), asked = first
    assert answers == [None if n % 4 == 1 else f"answer {n}" for n in range(count)]
    assert bad == [(f"record {n}", "no image") for n in range(count) if n % 4 == 1]
    assert asked == -(-count // 2)
