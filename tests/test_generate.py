"""Generation: a batch is its requests alone, sampling as transformers orders it, adapters, merged models, the
command line."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run

import checkpoint
import data
import draw
import engine
import generate as g
import lora
import merge
import model_qwen_vl as qwen
import records
import sampling
import terminal
import vlm

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


@pytest.fixture(scope="module")
def model(base):
    return g.load_model(base)


@pytest.fixture(scope="module")
def processor(base):
    return qwen.load_processor(base)


@pytest.fixture(scope="module")
def requests(processor, dataset):
    """Prompts of unequal length, with no, one and two pictures."""
    folder = Path(dataset["train"][0]["data_files"]).parent
    pictures = [str(folder / f"{i}.png") for i in range(3)]
    texts = [
        ("hello", []),
        ("what is it?", pictures[:1]),
        ("which of the two is the larger one?", pictures[1:]),
        ("a b c", []),
    ]
    found = []
    for text, images in texts:
        request = processor.prompt(records.request([("user", text)], images, "test"))
        request["pixel_values"] = [processor.load_image(p) for p in request["images"]]
        assert len(request["image_starts"]) == len(images)
        found.append(request)
    return found


SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 4},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_is_its_requests_alone(model, requests, settings):
    """Past the trained length too: some prompts are near seq_length=64, so they cross it while decoding."""
    streamed = [[] for _ in requests]
    batch = g.generate(
        model, requests, g.Decoding(40, **settings), [], on_token=lambda i, t: streamed[i].append(t)
    )
    assert batch == streamed and all(len(ids) == 40 for ids in batch)
    assert batch == [g.generate(model, [r], g.Decoding(40, **settings), [])[0] for r in requests]
    if settings:
        assert batch != g.generate(model, requests, g.Decoding(40, **{**settings, "seed": 99}), [])


def test_cached_decoding_equals_forward_passes_over_everything(model, requests):
    """Below the trained length the whole sequence at once must choose the same tokens."""
    request = requests[0]
    ids = [int(t) for t in request["input_ids"]]
    new = g.generate(model, [request], g.Decoding(12), [])[0]
    for i, token in enumerate(new):
        sample = {**request, "input_ids": np.array(ids + new[:i]), "labels": np.zeros(len(ids) + i)}
        batch = data.collate([sample], num_image_tokens=4)
        assert len(batch.input_ids) < model.config.seq_length
        assert int(model(batch, output="logits")[0].argmax()) == token


def test_stop_words_end_a_sequence_and_only_that(model, requests):
    free = g.generate(model, requests, g.Decoding(12), [])
    word = free[0][4:6]
    stopped = g.generate(model, requests, g.Decoding(12), [word])
    for a, b in zip(free, stopped, strict=True):
        end = next((i for i in range(2, len(a) + 1) if a[i - 2 : i] == word), len(a))
        assert b == a[:end]
    assert len(stopped[0]) <= 6


@pytest.mark.parametrize(
    "temperature, top_k, top_p, penalty", [(1.0, 0, 1.0, 1.0), (0.6, 7, 0.9, 1.5), (2.0, 0, 0.3, 0.8)]
)
def test_sampling_follows_transformers(temperature, top_k, top_p, penalty):
    from transformers.generation import logits_process as hf

    torch.manual_seed(0)
    logits, seen = torch.randn(1, 300) * 3, torch.randint(0, 300, (1, 50))
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    expected = hf.TemperatureLogitsWarper(temperature)(seen, expected)
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(seen, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(seen, expected)
    ours = sampling.penalise_repetition(logits, sampling.seen_mask(seen[0].tolist(), 300), penalty)
    torch.testing.assert_close(sampling.sampling_probs(ours, temperature, top_k, top_p), expected.softmax(-1))


def test_lora_targets_the_language_model_unless_named(base):
    with torch.device("meta"):
        model = qwen.build_model(checkpoint.read_config(base))
    names = lora.inject(model, qwen.MODEL.lora_targets, 4, 8, 0.0)
    assert len(names) == 4 * 2 and not any("visual" in name for name in names)
    with torch.device("meta"):
        model = qwen.build_model(checkpoint.read_config(base))
    assert all("visual" in name for name in lora.inject(model, [r".*resblocks.*\.in_proj"], 4, 8, 0.0))


@pytest.fixture(scope="module")
def adapter(base, dataset, tmp_path_factory):
    """An adapter with a trained resampler beside it."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    argv = f"""--model_name_or_path {base} --output_dir {out} --max_steps 8 --learning_rate 0.02
        --lora --freeze_include *visual* --freeze_exclude *attn_pool* --num_workers 0
        --per_device_train_batch_size 8 --max_length 128"""
    run([*argv.split(), "--dataset", json.dumps(dataset)])
    return out


def test_merged_answers_as_base_and_adapter_do(base, adapter, model, requests, tmp_path, capsys):
    merged = tmp_path / "merged"
    argv = ["--lora_path", str(adapter), "--merge_model_path", str(merged)]
    assert terminal.cli(lambda: merge.main(argv)) == 0, capsys.readouterr().err
    assert "largest logit difference" in capsys.readouterr().out
    with_adapter = g.generate(g.load_model(base, lora_path=adapter), requests, g.Decoding(20), [])
    assert g.generate(g.load_model(merged), requests, g.Decoding(20), []) == with_adapter
    assert with_adapter != g.generate(model, requests, g.Decoding(20), [])
    saved = lora.read_adapter(adapter)[1]
    assert any("attn_pool" in name for name in saved)
    changed = checkpoint.open_weights(merged)
    assert torch.equal(
        changed.read("transformer.visual.attn_pool.query"), saved["transformer.visual.attn_pool.query"]
    )


@pytest.mark.parametrize("change", ["missing", "extra", "rank", "not trained"])
def test_a_tampered_adapter_is_not_merged(adapter, tmp_path, capsys, change):
    from safetensors.torch import load_file, save_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in state if n.endswith("c_attn.lora_B.weight"))
    if change == "missing":
        del state[name]
    elif change == "extra":
        state[name.replace("h.0", "h.7").replace("h.1", "h.7")] = state[name].clone()
    elif change == "rank":
        state[name] = state[name][:, :-1].contiguous()
    else:
        state = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in state.items() if "lora_" in n}
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    save_file(state, tmp_path / "adapter_model.safetensors")
    argv = ["--lora_path", str(tmp_path), "--merge_model_path", str(tmp_path / "m")]
    assert terminal.cli(lambda: merge.main(argv)) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and not (tmp_path / "m").exists()
    words = {"missing": "lacks", "extra": "h.7.attn", "rank": "expected (384", "not trained": "not trained"}
    assert words[change] in err


def test_draws_depend_on_seed_and_id_alone(model, requests):
    """Equal requests with different ids differ, equal ids are equal, and a batch is its requests alone."""
    six = [{**requests[0], "id": str(i)} for i in range(6)]
    hot = {"temperature": 5.0, "seed": 1}
    batch = g.generate(model, six, g.Decoding(10, **hot), [])
    assert len({tuple(ids) for ids in batch}) == 6
    assert batch == [g.generate(model, [r], g.Decoding(10, **hot), [])[0] for r in six]
    assert batch[::-1] == g.generate(model, six[::-1], g.Decoding(10, **hot), [])


class Letters:
    """A processor whose tokens are texts: id n is pieces[n]."""

    def __init__(self, pieces):
        self.pieces, self.tokenizer = pieces, self

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    "pieces, stops, shown",
    [
        (["He", "llo", " EN", "D no"], ["END"], "Hello"),  # across tokens
        (["Hello EN", "END", "x"], ["END"], "Hello EN"),  # a false start
        (["a", "b##c", "d"], ["##"], "ab"),  # inside a token
        (["no stop", " EN"], ["END"], "no stop EN"),  # the part of one at the end is text
        (["a x", "y", "z"], ["xyz", "xy"], "a"),  # the first that is complete
    ],
)
def test_stop_texts_lie_anywhere_and_are_never_shown(pieces, stops, shown, capsys):
    processor, printer = Letters(pieces), None
    printer = g.Printer(processor, stops)
    for n in range(len(pieces)):
        printer(0, n)
        text, stopped = g.cut_at_stop(processor, list(range(n + 1)), stops)
        assert shown.startswith(printer.text)
        if stopped:
            break
    printer.end(text)
    assert (text, capsys.readouterr().out) == (shown, shown + "\n")


@pytest.mark.parametrize("kind", ["qwen_vl", "blip2", "visualglm"])
def test_a_long_answer_is_shown_from_its_last_tokens(kind, monkeypatch):
    """All of it, whatever the tokens are, and without decoding all of it for each."""
    processor = data.load_processor(data.model_directory(kind, "tiny"))
    random_ids = torch.Generator().manual_seed(1)
    words = [processor.answer_ids(text) for text in ("Two flags, 3 ", "你好，世界！", "🙂 é", "a.b: c ")]
    ids = [i for n in torch.randint(0, 4, (400,), generator=random_ids).tolist() for i in words[n]]
    whole, longest, decode = processor.decode(ids), 0, processor.decode

    def counted(some):
        nonlocal longest
        longest = max(longest, len(some))
        return decode(some)

    monkeypatch.setattr(processor, "decode", counted)
    shown = g.Shown(processor)
    pieces = [shown.more(i) for i in ids]
    assert "".join(pieces) + shown.rest(whole) == whole
    assert longest < 3 * g.Shown.WINDOW < len(ids) / 2 and sum(map(bool, pieces)) > 400


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_text_of_an_answer(model, processor, dataset, beams):
    """Any piece of the free answer, at borders that no tokenizer would choose, ends the answer before it."""
    c = records.request([("user", "hello")], [], "test")
    how = g.Decoding(max_new_tokens=12, num_beams=beams)
    e = g.Engine(model, processor, cache_tokens=0, stop_words=[])
    (free,) = g.answer(e, [c], how)
    cut = len(free) // 2
    stop = free[cut : cut + 3]
    (text,) = g.answer(e, [c], how, [stop])
    assert stop not in text
    if beams == 1:
        assert text == free[: free.index(stop)].strip() != ""


def test_where_an_answer_ends_the_next_begins(model, requests):
    """A long answer does not keep the others waiting, and none of them changes."""
    lengths = [10, 2, 2, 2, 2]
    wanted = [
        engine.Request(
            str(n), requests[n % len(requests)], g.Decoding(length, min_new_tokens=length), logprobs=-1
        )
        for n, length in enumerate(lengths)
    ]
    e = engine.Engine(model, stop_words=[], cache_tokens=0, max_running=2)
    running, step = [], e.step
    e.step = lambda: (step(), running.append(e.running))[0]
    found = dict(g.run_all(e, iter(wanted), 2, {}))
    assert list(found) == [*wanted[1:], wanted[0]]  # as they end
    assert len(running) == 10  # batch after batch: 10 + 2 + 2
    for request, ids in found.items():
        assert ids == g.generate(model, [request.prompt], request.how, [])[0]


def test_a_round_of_a_chat_computes_what_is_new(model, processor):
    """What generate.py --chat does: an engine whose pool has no rows of its own."""
    e, turns, counts, known = engine.Engine(model, processor, cache_tokens=0), [], [], 0
    step, how = e.step, g.Decoding(5, min_new_tokens=5)

    def watch():
        events = step()
        counts.extend(event.cached_tokens for event in events[:1])
        return events

    e.step = watch
    for question in ("hello", "and?"):  # longer prompts than seq_length=64 have another rotary base
        conversation = records.request([*turns, ("user", question)], [], "test")
        del counts[:]
        (text,) = g.answer(e, [conversation], how)
        assert text == g.answer(g.Engine(model, processor, cache_tokens=0), [conversation], how)[0]
        assert counts[0] >= known
        known = len(processor.prompt(conversation)["input_ids"]) - 5  # its end changes where an answer begins
        turns = [*conversation.turns, ("assistant", [text])]


def test_answers_come_in_order_past_bad_records(model, processor, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    bad_ones = [[str(tmp_path / "no.png")] * (n in (0, 3, 5)) for n in range(6)]
    questions = [records.request([("user", f"w{n}")], images, "test") for n, images in enumerate(bad_ones)]
    bad, how = [], g.Decoding(max_new_tokens=5)
    e = g.Engine(model, processor, cache_tokens=0, max_running=2)
    found = list(g.answers(e, questions, how, bad=bad))
    assert [n for n, text in enumerate(found) if text is None] == [0, 3, 5] and len(bad) == 3
    good = [n for n in range(6) if n not in (0, 3, 5)]
    assert [found[n] for n in good] == [g.answer(e, [questions[n]], how)[0] for n in good]


@pytest.mark.parametrize("rule", ["transformers", "lavis"])
def test_beams_end_where_the_text_does(model, requests, rule):
    """Every beam ends where `stopped` says so, and the search with them."""
    found = g.beam_search(
        model, requests, g.Decoding(6, num_beams=3, beam_rule=rule), [], stopped=lambda ids: len(ids) == 2
    )
    assert all(len(ids) == 2 for beams in found for _, ids in beams)


def test_lavis_rule_penalises_no_token_of_the_prompt_but_the_first(model, requests):
    prompt = [int(t) for t in requests[0]["input_ids"]]
    free = g.beam_search(model, requests[:1], g.Decoding(8, num_beams=2), [])[0][0][1]
    seen = {
        "all": [prompt[0], *free],
        "first": prompt[:1],
    }  # what the answer would hold counts as said before
    for rule, same in (("lavis", True), ("transformers", False)):
        options = {"repetition_penalty": 3.0, "beam_rule": rule}
        one, other = (
            g.beam_search(model, [{**requests[0], "seen": s}], g.Decoding(8, num_beams=2, **options), [])
            for s in seen.values()
        )
        assert (one == other) == same


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"num_beams": 2}])
def test_logits_that_are_not_finite_are_refused(base, processor, settings):
    broken = g.load_model(base)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    c = records.request([("user", "hello")], [], "test")
    with pytest.raises(ValueError, match="logits are not finite"):
        g.answer(g.Engine(broken, processor, cache_tokens=0), [c], g.Decoding(max_new_tokens=3, **settings))


@pytest.mark.parametrize("beams", [1, 3])
def test_min_length_counts_the_prompt(model, requests, beams):
    """All but one token end an answer: it ends at once, or at the length asked for."""
    request, ends = requests[0], [[t] for t in range(model.config.vocab_size - 8)]
    length = len(request["input_ids"])
    for more in (1, 4):
        if beams == 1:
            (ids,) = g.generate(model, [request], g.Decoding(9, min_length=length + more - 1), ends)
        else:
            (((_, ids), *_),) = g.beam_search(
                model, [request], g.Decoding(9, num_beams=beams, min_length=length + more - 1), ends
            )
        assert len(ids) >= more and all([t] not in ends for t in ids[: more - 1])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-30},
        {"temperature": -1},
        {"top_p": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**9},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"min_new_tokens": 300},
        {"min_length": -1},
        {"num_beams": 10**6},
        {"num_beams": 2, "length_penalty": float("nan")},
        {"num_beams": 2, "length_penalty": 1e9},
        {"num_beams": 2, "temperature": 1.0},
        {"num_beams": 2, "penalty_rule": "sat"},
    ],
)
def test_impossible_decoding_is_refused(settings):
    with pytest.raises(
        ValueError, match="decoding: " + list(settings)[-1] if len(settings) == 1 else "decoding: "
    ):
        g.Decoding(**settings)


def test_options_without_effect_are_said():
    assert g.Decoding(top_k=5, length_penalty=2.0, seed=1).without_effect() == [
        "top_k",
        "length_penalty",
        "seed",
    ]
    assert g.Decoding(top_k=5, temperature=1.0).without_effect() == []
    assert g.Decoding(penalty_rule="sat").without_effect() == ["penalty_rule"]
    assert g.Decoding(num_beams=2, length_penalty=2.0).without_effect() == []


@pytest.mark.parametrize("beams", [1, 2])
def test_a_minimum_that_cannot_be_reached_is_refused(model, requests, beams):
    with pytest.raises(ValueError, match="min_length=999 cannot be reached"):
        if beams == 1:
            g.generate(model, requests, g.Decoding(3, min_length=999), [])
        else:
            g.beam_search(model, requests, g.Decoding(3, num_beams=beams, min_length=999), [])


def test_beams_beyond_the_vocabulary_are_refused(model, requests):
    with pytest.raises(ValueError, match="half of the vocabulary"):
        g.beam_search(model, requests[:1], g.Decoding(2, num_beams=model.config.vocab_size // 2 + 1), [])


@pytest.mark.parametrize(
    "argv",
    [
        ["--requests", "r", "--prompt", "x"],
        ["--requests", "r", "--image", "x"],
        ["--requests", "r", "--system", "x"],
        ["--requests", "r", "--chat"],
        ["--chat", "--prompt", "x"],
        ["--chat", "--output", "x"],
    ],
)
def test_arguments_that_would_be_ignored_are_refused(argv):
    with pytest.raises(ValueError, match="both given"):
        g.main(argv)


@pytest.mark.parametrize(
    "argv", [["--prompt", " "], ["--prompt", "q", "--system", ""], ["--prompt", "q", "--stop", ""]]
)
def test_empty_texts_are_refused(argv):
    with pytest.raises(ValueError, match=f"^{argv[-2]} is empty"):
        g.main(argv)
    with pytest.raises(ValueError, match="both given"):
        g.main(["--requests", "r.jsonl", "--prompt", ""])


@pytest.mark.parametrize("allowed", [0.5, 0.01])
def test_requests_with_a_bad_image_leave_the_others_answered(base, tmp_path, capsys, allowed):
    """Named, counted; beyond the allowed share the command fails, its answers stay."""
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    lines = [json.dumps({"id": f"r{i}", "prompt": "q", "image": f"{i}.png"}) for i in range(4)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("yesterday's\n", encoding="utf-8")
    argv = ["--model_name_or_path", str(base), "--requests", str(tmp_path / "r.jsonl"), "--batch_size", "2"]
    argv += [
        "--max_new_tokens",
        "2",
        "--output",
        str(tmp_path / "a.jsonl"),
        "--max_bad_samples",
        str(allowed),
    ]
    assert terminal.cli(lambda: g.main(argv)) == (allowed < 0.25)
    err = capsys.readouterr().err
    assert err.count("r.jsonl:3: ") == (1 if allowed == 0.5 else 2) and "Traceback" not in err
    answers = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in answers] == ["r0", "r1", "r3"]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl"] * 2 + [".png"] * 4


def test_boxes_are_drawn(tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    text = "<ref>dog</ref><box>(100,200),(500,900)</box> and <box>(0,0),(999,999)</box>"
    assert draw.draw_boxes(str(tmp_path / "a.png"), text, tmp_path / "b.png") == 2
    with Image.open(tmp_path / "b.png") as image:
        pixels = np.asarray(image)
    assert (
        tuple(pixels[50, 20]) == (255, 0, 0)
        and tuple(pixels[89, 60]) == (255, 0, 0)
        and tuple(pixels[50, 60]) == (255, 255, 255)
    )
    assert (
        draw.draw_boxes(str(tmp_path / "a.png"), "no box", tmp_path / "c.png") == 0
        and not (tmp_path / "c.png").exists()
    )


def test_command_line_answers_requests(tmp_path):
    """The tiny model on a validation picture: in a file of requests as alone, streamed."""
    root = Path(g.__file__).parent
    picture = "samples/images/digits/0464.png"
    chinese = f"Picture 1: <img>{picture}</img>\n这里写的是哪个数字？"
    lines = [
        {"id": "a", "prompt": "What digit is written here?", "image": picture},
        {"id": "b", "messages": [{"role": "user", "content": chinese}]},
        {"id": "c", "conversations": [["What is 1 and 1?", "2"], ["and now?", "dropped"]]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "generate.py", "--max_new_tokens", "10"]
    requests = ["--requests", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    subprocess.run([*command, *requests], cwd=root, check=True)
    answers = {r["id"]: r["answer"] for r in map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())}
    assert answers.keys() == {"a", "b", "c"} and answers["a"] in "0123456789" and answers["b"] in "0123456789"
    alone = [*command, "--prompt", lines[0]["prompt"], "--image", picture]
    streamed = subprocess.run(alone, cwd=root, check=True, capture_output=True, text=True).stdout
    assert streamed.strip() == answers["a"] != ""


@pytest.mark.parametrize(
    "named, device, dtype",
    [
        ({"torch_dtype": "bfloat16"}, "cuda", "bfloat16"),
        ({"dtype": "float16"}, "cuda:1", "float16"),
        ({"torch_dtype": "auto"}, "cuda", "float32"),
        ({}, "cuda", "float32"),
        ({"torch_dtype": "bfloat16"}, "cpu", "float32"),
    ],
)
def test_the_type_of_weights_is_the_checkpoints_on_a_gpu(tmp_path, named, device, dtype):
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert g.default_dtype(str(tmp_path), device) == dtype


@pytest.mark.parametrize("name", ["tiny_qwen_vl", "tiny_visualglm", "tiny_blip2"])
def test_whatever_a_model_says_is_a_text(name):
    """Ids in any order, marks of images most of all: a model that is sampled from may say them."""
    directory, rng = SAMPLES / name, random.Random(0)
    values = checkpoint.read_config(directory)
    definition = vlm.find(values)
    processor, size = definition.processor(directory), definition.network(values).config.vocab_size
    marks = definition.probe_batch(processor).input_ids.unique().tolist()  # of an image and its question
    for _ in range(300):
        ids = [rng.choice((rng.randrange(size), rng.choice(marks))) for _ in range(rng.randrange(1, 30))]
        assert isinstance(processor.decode(ids), str) and isinstance(processor.tokenizer.decode(ids), str)


def test_an_image_mark_in_an_answer_is_its_text():
    """As the tag that it is, in front of what stands behind it; a path between marks is a path."""
    tokenizer = qwen.load_processor(SAMPLES / "tiny_qwen_vl").tokenizer
    start, end, pad = tokenizer.img_start, tokenizer.img_end, tokenizer.img_pad
    said = tokenizer.encode("a cat")
    assert tokenizer.decode([start, *said, end]) == "<img>a cat</img>"
    assert tokenizer.decode([start, end, *said]) == "<img></img>a cat"
    assert tokenizer.decode([start, *b"a.png", pad, pad, end]) == "<img>a.png</img>"
    for wrong in ([start, end], [start, 300, pad, end]):
        with pytest.raises(ValueError, match="without a path"):
            tokenizer.decode(wrong, strict=True)
