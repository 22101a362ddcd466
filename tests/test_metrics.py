"""Scores against the COCO caption evaluation's and the official VQA evaluation's own."""

import json

import numpy as np
import pytest
from PIL import Image
from ranks import run
from small import log_of

import evaluate
import metrics
from records import Conversation, ImageRef, read_vqa


def one_file(goldens, name):
    """Every file of that kind below the golden root."""
    found = sorted((goldens / "metrics").glob(f"{name}*.json"))
    if not found:
        pytest.fail(f"no metrics/{name}*.json below {goldens}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def corpora(goldens):
    return [corpus for document in one_file(goldens, "caption") for corpus in document["corpora"].values()]


def test_golden_caption_scores(goldens):
    for corpus in corpora(goldens):
        sets = corpus["sets"]
        candidates = [s["candidate_tokens"].split() for s in sets]
        references = [[r.split() for r in s["reference_tokens"]] for s in sets]
        names = ["BLEU1", "BLEU2", "BLEU3", "BLEU4", "ROUGE_L", "CIDEr_D"]
        bleu, rouge, cider = (
            f(candidates, references) for f in (metrics.bleu, metrics.rouge_l, metrics.cider_d)
        )
        whole = dict(zip(names, [*bleu[0], rouge[0], cider[0]], strict=True))
        for name in names:
            assert abs(whole[name] - corpus["corpus"][name]) < 1e-9, name
        for i, s in enumerate(sets):
            own = dict(zip(names, [*bleu[1][i], rouge[1][i], cider[1][i]], strict=True))
            for name in names:
                assert abs(own[name] - s["scores"][name]) < 1e-9, (s["id"], name)


def test_golden_caption_tokens(goldens):
    for corpus in corpora(goldens):
        for s in corpus["sets"]:
            texts, tokens = (
                [s["candidate"], *s["references"]],
                [s["candidate_tokens"], *s["reference_tokens"]],
            )
            for text, expected in zip(texts, tokens, strict=True):
                assert " ".join(metrics.ptb_tokens(text)) == expected, text


def test_golden_vqa_normalisation(goldens):
    for document in one_file(goldens, "vqa"):
        for case in document["normalise"]:
            assert metrics.vqa_punctuation(case["text"]) == case["punctuation"], case
            assert metrics.vqa_words(metrics.vqa_punctuation(case["text"])) == case["normalised"], case


def test_golden_vqa_accuracy(goldens):
    for document in one_file(goldens, "vqa"):
        cases = document["cases"]
        scores = [metrics.vqa_accuracy(c["prediction"], c["answers"]) for c in cases]
        for score, case in zip(scores, cases, strict=True):
            assert round(100 * score, 2) == case["accuracy"], case

        def mean(some):
            return round(100 * sum(some) / len(some), 2)

        assert mean(scores) == document["overall"]
        for key, group in (("answer_type", "per_answer_type"), ("question_type", "per_question_type")):
            for name, expected in document[group].items():
                pairs = zip(scores, cases, strict=True)
                assert mean([s for s, c in pairs if c[key] == name]) == expected, name


@pytest.mark.parametrize(
    "text, expected",
    [  # the treebank's tokenisation guidelines
        ("They can't say it isn't Bob's dogs' house.", "they ca n't say it is n't bob 's dogs ' house"),
        ("You cannot, I'm gonna; we've", "you can not i 'm gon na we 've"),
        (
            "A well-known 3-year-old, at 10:30 a.m. in the U.S.",
            "a well-known 3-year-old at 10:30 a.m. in the u.s.",
        ),
        ("Mr. X paid $1,000 (50% off) and/or 1/2...", "mr. x paid $ 1,000 -lrb- 50 % off -rrb- and/or 1/2"),
        # slashes and stars, by CoreNLP 3.4.1 itself
        (
            "A metal/rock band, a hip-hop/rap song and/or more",
            "a metal/rock band a hip-hop/rap song and/or more",
        ),
        ("black-and-white/red a/b/c/d w/ 1/2", "black-and-white/red a/b/c / d w / 1/2"),
        (
            "caf\u00e9/bar men's/women's word_a/b 50mph/hour",
            "caf\u00e9 / bar men 's / women 's word_a / b 50mph/hour",
        ),
        ("a * star ** two *italic* f**k", "a * star ** two * italic * f ** k"),
        ("\u201cA man's caf\u00e9\u201d \u2013 it's 5 o'clock!", "a man 's caf\u00e9 it 's 5 o'clock"),
        ("一只狗，在草地上。 A dog", "一 只 狗 在 草 地 上 a dog"),
    ],
)
def test_caption_tokens(text, expected):
    assert metrics.ptb_tokens(text) == expected.replace(" ' ", " ").split()


def test_fewer_than_ten_answers_count_as_ten():
    whole, own = metrics.scores_of(
        "vqa_accuracy", ["red", "Red", "cat", "x"], [["red"], ["red", "blue"], ["cat", "dog"], ["y"]]
    )["vqa_accuracy"]
    assert own == [1.0, 1.0, 1.0, 0.0] and whole == 0.75
    for some in (["cat", "dog", "x"], ["cat", "x", "cat", "dog", "y", "z"]):  # in any order
        turned = [some[i:] + some[:i] for i in range(len(some))]
        assert len({metrics.vqa_accuracy("cat", answers) for answers in turned}) == 1


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [("1", ["7"] * 9 + ["1"], 0.3), ("7", ["7"] * 9 + ["1"], 1.0), ("cat", ["cat"] * 6 + list("abcd"), 1.0)],
)
def test_each_of_ten_people_counts(prediction, answers, expected):
    """Through the reader, as training and evaluation take the references."""
    record = {"image": "a.png", "question": "q", "answers": [{"answer": a} for a in answers]}
    ((kind, turns, references),) = read_vqa(record, True)
    c = Conversation("0", turns, kind, "f:1", references, "s")
    (merged,) = evaluate.merge_references([c], [0])
    assert evaluate.score([merged], [prediction])[0]["vqa_accuracy"] == pytest.approx(expected, abs=1e-12)


def test_equal_captions_count_each_but_once_per_record():
    """A record of two captions gives two conversations that both carry them."""
    records = [["a dog", "a dog"], ["a dog", "one cat"]]
    conversations = [
        Conversation("0", [("user", [ImageRef("a.png")])], "caption", f"f:{n}", captions, "s")
        for n, captions in enumerate(records)
        for _ in captions
    ]
    (merged,) = evaluate.merge_references(conversations, [0] * 4)
    assert merged.answers == ["a dog", "a dog", "a dog", "one cat"]


def test_two_sets_of_captions_have_scores_of_their_own():
    texts = ["a red bus", "two dogs run", "a red cat", "one bird"]
    sets = [
        Conversation(str(n), [("user", [ImageRef(f"{n}.png")])], "caption", f"f:{n}", [text], "ab"[n // 2])
        for n, text in enumerate(texts)
    ]
    answers = ["a red bus", "dogs run", "a cat", "one bird"]
    whole, _ = evaluate.score(sets, answers)
    for source, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        own = metrics.caption_scores(answers[part], [[text] for text in texts[part]])
        assert {key: whole[f"{key}/{source}"] for key in own} == {
            key: total for key, (total, _) in own.items()
        }
    assert whole["cider"] == metrics.caption_scores(answers, [[text] for text in texts])["cider"][0]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Three pictures, one of them in two records."""
    path, rng = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    records = []
    for i, texts in enumerate(["a red cat", ["a dog", "one dog runs"], "two birds", "birds in a tree"]):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i % 3}.png")
        # the last one names the first image in another way
        records.append({"image": f"{'./' * (i > 2)}{i % 3}.png", "caption": texts})
    (path / "captions.json").write_text(json.dumps(records))
    return path / "captions.json"


def test_results_file_says_how_each_answer_came_about(base, captions, tmp_path, capsys):
    argv = ["--model_name_or_path", str(base), "--data_files", str(captions), "--name", "coco_caption"]
    argv += ["--max_new_tokens", "6", "--num_beams", "2", "--output", str(tmp_path / "r.json")]
    assert evaluate.main(argv) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    answers = result["answers"]
    references = [["a red cat", "birds in a tree"], ["a dog", "one dog runs"], ["two birds"]]
    assert [a["references"] for a in answers] == references
    assert result["decoding"]["num_beams"] == 2 and result["metric_version"] == metrics.VERSION
    assert all("<img>" in a["prompt"] and a["images"] for a in answers)
    expected = metrics.caption_scores([a["answer"] for a in answers], [a["references"] for a in answers])
    assert result["scores"] == {name: whole for name, (whole, _) in expected.items()}
    assert [a["scores"]["rouge_l"] for a in answers] == expected["rouge_l"][1]
    out, err = capsys.readouterr()
    assert "of 3 answers end at max_new_tokens=6, not at an end of their own" in err
    assert f"cider {result['scores']['cider']:.3f}" in out
    evaluate.main([*argv, "--metric", "exact_match"])
    assert json.loads((tmp_path / "r.json").read_text())["scores"].keys() == {"accuracy"}


def test_training_scores_what_evaluation_scores(base, captions, tmp_path, capfd):
    entries = [{"name": "coco_caption", "data_files": str(captions)}]
    options = {
        "model_name_or_path": str(base),
        "dataset": {"train": entries, "eval": entries},
        "max_steps": 80,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "num_workers": 0,
        "eval_steps": 40,
        "save_steps": 40,
        "output_dir": str(tmp_path / "out"),
        "evaluation_strategy": "steps",
        "eval_with_do_generation": True,
        "metric_for_best_model": "eval_rouge_l",
        "load_best_model_at_end": True,
        "disable_tqdm": True,
    }
    (tmp_path / "c.json").write_text(json.dumps(options))
    run([str(tmp_path / "c.json")])
    records = log_of(tmp_path / "out")
    evals = {r["step"]: r for r in records if "eval_cider" in r}
    assert evals.keys() == {40, 80}
    best = max(evals, key=lambda step: evals[step]["eval_rouge_l"])
    argv = [
        "--model_name_or_path",
        str(tmp_path / f"out/checkpoint-{best}"),
        "--output",
        str(tmp_path / "r.json"),
    ]
    evaluate.main([str(tmp_path / "c.json"), *argv])
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert scores == {name: pytest.approx(evals[best][f"eval_{name}"], abs=1e-9) for name in scores}
    assert scores["rouge_l"] > 0.3
    wrong = ["--metric_for_best_model", "eval_vqa_accuracy", "--output_dir", str(tmp_path / "no")]
    with pytest.raises(AssertionError):
        run([str(tmp_path / "c.json"), *wrong])
    assert "the eval entries give eval_loss, eval_cider" in capfd.readouterr().err
