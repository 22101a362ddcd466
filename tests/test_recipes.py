"""configs/*/eval_*.json: each runs on a small file of its set's layout with the sample model, asks in the
published words, and never claims a published score for anything else."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_evaluate import results

import data
import evaluate
import recipes
import records

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("configs/*/eval_*.json"))
# in the words of the published evaluations; <img> stands for an image's places, which a processor fills
PROMPTS = {
    ("qwen_vl", "grounding"): "<img></img><ref>red bus</ref><box>",
    ("qwen_vl", "caption"): "<img></img>Describe the image in English:",
    ("qwen_vl", "answer"): "<img></img>What is it? Answer:",
    ("qwen_vl", "chat answer"): "Picture 1: <img></img>\nWhat is it?",
    ("qwen_vl", "chat caption"): "Picture 1: <img></img>\nDescribe the image in English:",
    ("blip2", "caption"): "a photo of",
    # in LAVIS's wording of a question, which is in lower case
    ("blip2", "answer"): "Question: what is it? Short answer:",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem.removeprefix('eval_')}"


def small_set(recipe: dict, folder: Path) -> int:
    """Files of the layout that the recipe names, in `folder`; how many records they hold."""
    ((entry,), metric) = recipe["dataset"]["eval"], recipe["evaluation"]["metric"]
    files = entry["data_files"] if isinstance(entry["data_files"], list) else [entry["data_files"]]
    root = folder / (entry.get("image_root") or ".")
    (root / "val2014").mkdir(parents=True)
    for image in ("a.png", "val2014/COCO_val2014_000000000007.jpg"):
        Image.new("RGB", (64, 48), "red").save(root / image)
    question = {"question_id": 1, "question": "What is it?"}
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        image = "a.png" if entry.get("image_root") else str(root / "a.png")
        if metric == "grounding":
            record = {"image": image, "sent": "red bus", "bbox": [1, 2, 30, 40], "width": 64, "height": 48}
        elif metric == "caption":
            key = "image" if "qwen_vl" in recipe["model"] else "file_name"
            notes = [{"image_id": 3, "id": n, "caption": "a red bus"} for n in range(5)]
            record = {"images": [{"id": 3, key: image}], "annotations": notes}
        elif "questions" in file and "annotations" not in file and len(files) > 1:
            record = {"data_subtype": "val2014", "questions": [{**question, "image_id": 7}]}
        elif len(files) > 1 and file.endswith(".json"):
            answers = [{"answer": "bus"} for _ in range(10)]
            record = {"annotations": [{"question_id": 1, "image_id": 7, "answers": answers}]}
        else:
            record = {**question, "image": image, "answer": "bus"}
        path.write_text(json.dumps(record) + "\n")
    return sum(file.endswith(".jsonl") for file in files) or 1


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_runs_and_claims_nothing(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = json.loads(path.read_text())
    kind, published = recipe["model"], recipe["evaluation"]
    count = small_set(recipe, tmp_path)
    argv = ["--model_name_or_path", str(ROOT / f"samples/tiny_{kind}"), "--output", "r.json"]
    monkeypatch.setattr(evaluate, "answer_all", lambda m, p, asked, *a, **o: ["bus" for _ in asked])
    assert evaluate.main([str(path), *argv, "--dtype", "float32"]) == 0
    said, found = capsys.readouterr().out, results("r.json")
    assert f"published with full weights and data: {published['expected']:.4f}" in said
    assert "not compared: config.json has" in said
    assert (f"{count} records instead of" in said) == (published["records"] is not None)
    assert published.get("apart", "") in said
    assert "reproduced" not in said and found["published"]["deviations"]
    assert found["metrics"] == [published["metric"]] and published["score"] in found["scores"]
    assert {k: v for k, v in found["decoding"].items() if k in published["decoding"]} == published["decoding"]
    what = published["metric"] if published["metric"] in ("grounding", "caption") else "answer"
    processor = data.load_processor(ROOT / f"samples/tiny_{kind}", recipe["stage"])
    chat = kind == "qwen_vl" and recipe["stage"] == "sft"
    wanted = PROMPTS[kind, f"chat {what}" if chat else what]
    for answer in found["answers"]:
        if kind == "qwen_vl":  # to the token, against the text of the published script
            plain = [("user", wanted.replace("<img></img>", f"<img>{answer['images'][0]}</img>"))]
            ids = processor.prompt(records.request(plain, [], "x"))["input_ids"].tolist()
            assert answer["prompt"] == processor.tokenizer.decode(ids)
        else:
            assert answer["prompt"].endswith(wanted)


@pytest.mark.parametrize("kind", ["qwen_vl", "blip2"])
def test_a_recipe_is_decoded_as_it_says(kind, tmp_path, monkeypatch, capsys):
    """Through the engine itself, once for each model; what the command line gives wins, and is said."""
    monkeypatch.chdir(tmp_path)
    path = next(p for p in RECIPES if p.parent.name == kind and "caption" in p.read_text())
    small_set(json.loads(path.read_text()), tmp_path)
    argv = [str(path), "--model_name_or_path", str(ROOT / f"samples/tiny_{kind}"), "--dtype", "float32"]
    stage = {"qwen_vl": "pretrain", "blip2": "pretrain2"}[kind]  # not the recipe's
    assert evaluate.main([*argv, "--max_new_tokens", "9", "--prompt", "a {}", "--stage", stage]) == 0
    said = capsys.readouterr().out
    assert f"stage={stage}" in said
    assert "max_new_tokens=9 instead of 30" in said and "prompt=a {} instead of" in said

    assert (
        evaluate.main([*argv, "--max_new_tokens", "9", "--metric", "exact_match", "--output", "o.json"]) == 0
    )
    assert "cider, which is published, is not scored: " in capsys.readouterr().out and results("o.json")


def recipe(**changes) -> dict:
    value = json.loads((ROOT / "configs/qwen_vl/eval_refcoco_val.json").read_text())["evaluation"]
    return {**value, **changes}


def test_the_verdict():
    """Expected beside got only where weights, data, metric, prompt and decoding are the published ones."""
    r = recipes.recipe_of(recipe())
    full = {"hidden_size": 4096, "num_hidden_layers": 32, "visual": {"layers": 48}}
    options = {"metric": ["grounding"], "prompt": "{}<box>", "max_new_tokens": 28, "min_new_tokens": 10}
    for got, said in ((0.8936, "reproduced"), (0.8976, "reproduced"), (0.88, "NOT reproduced")):
        line = recipes.verdict(r, {"acc@0.5": got}, recipes.deviations(r, full, {}, 10834, options))
        assert (
            f"expected 0.8936 (QwenLM/Qwen-VL eval_mm/evaluate_grounding.py, README), got {got:.4f}" in line
        )
        assert f": {said} (within" in line
    for config, weights, count, changed in (
        ({**full, "visual": {"layers": 4}}, {}, 10834, {}),
        ({**full, "visual": None}, {}, 10834, {}),
        (full, {"lora_path": "output", "quantize": None}, 10834, {}),
        (full, {"quantize": "nf4"}, 10834, {}),
        (full, {}, 10833, {}),
        (full, {}, 10834, {"metric": ["exact_match"]}),
        (full, {}, 10834, {"prompt": None}),
        (full, {}, 10834, {"max_new_tokens": 32}),
        (full, {}, 10834, {"temperature": 1.0}),
        (full, {"left_out": 3, "stage": None}, 10834, {}),
    ):
        found = recipes.deviations(r, config, weights, count, {**options, **changed})
        assert len(found) == 1 and "not compared" in recipes.verdict(r, {"acc@0.5": 0.8936}, found)


def test_what_is_not_known_of_a_score_is_said():
    """A count that nobody published is not compared; a step that is not taken here keeps the scores apart."""
    options = {"metric": ["grounding"], "prompt": "{}<box>", "max_new_tokens": 28, "min_new_tokens": 10}
    full = {"hidden_size": 4096, "num_hidden_layers": 32, "visual": {"layers": 48}}
    r = recipes.recipe_of(recipe(records=None, note="7 records"))
    line = recipes.verdict(r, {"acc@0.5": 0.8936}, recipes.deviations(r, full, {}, 7, options))
    assert ": reproduced (within" in line and line.endswith("; 7 records")
    r = recipes.recipe_of(recipe(apart="the answers are lemmatised"))
    found = recipes.deviations(r, full, {}, 10834, options)
    assert recipes.verdict(r, {"acc@0.5": 0.8936}, found).endswith("not compared: the answers are lemmatised")


def test_a_recipe_that_is_wrong_is_refused(tmp_path):
    for change, said in (
        ({"exepcted": 1}, "unknown key 'exepcted'.*expected"),
        ({"score": "cider"}, "metric=grounding has no score cider"),
        ({"decoding": {"beams": 5}}, "unknown option beams"),
        ({"decoding": {"num_beams": "5"}}, "decoding: num_beams is '5'; expected a whole number"),
        ({"expected": "much"}, "evaluation: expected"),
    ):
        with pytest.raises(ValueError, match=said):
            recipes.recipe_of(recipe(**change))
    with pytest.raises(ValueError, match="lacks metric"):
        recipes.recipe_of({"score": "cider"})
    with pytest.raises(ValueError, match="evaluation is 5; expected an object"):
        recipes.recipe_of(5)


def test_there_are_recipes():
    assert len(RECIPES) >= 27 and {p.parent.name for p in RECIPES} == {"qwen_vl", "blip2"}
