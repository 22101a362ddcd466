"""The engine: whatever shares a batch, an answer is the one that its request gets alone; what prompts have in
common is computed once; adapters are their merged models; nothing is lost where room is short."""

import dataclasses
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_blip2_train import OPT, T5, write_checkpoint

import build
import data
import engine
import generate
import lora
import merge
import records
import vlm
from engine import Engine, Request
from generate import Decoding
from kernels import linear

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("qwen_vl", "qwen_vl_long", "opt", "t5", "stage1", "visualglm", "ptuning")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return [str(path / f"{i}.png") for i in range(4)]


@pytest.fixture(scope="session")
def loaded(base, tmp_path_factory):
    """kind -> (model, processor)"""
    root, cache = tmp_path_factory.mktemp("blip2"), {}

    def load(kind: str):
        if kind not in cache:
            stage = "pretrain1" if kind == "stage1" else "sft"
            if kind == "qwen_vl_long":  # seq_length=64: longer prompts have another rotary base
                path = base
            elif kind in ("t5", "stage1"):
                path = write_checkpoint(root / kind, T5 if kind == "t5" else OPT, kind == "stage1")
            else:
                path = ROOT / "samples" / f"tiny_{ {'opt': 'blip2', 'ptuning': 'visualglm'}.get(kind, kind) }"
            model = generate.load_model(path)
            if kind == "ptuning":
                model = model_with_ptuning(model)
            cache[kind] = model, data.load_processor(str(path), stage)
        return cache[kind]

    return load


def model_with_ptuning(model):
    """Three trained keys and values before each segment's own."""
    import model_visualglm as glm

    tuned = glm.build_model({**model.config.raw, "pre_seq_len": 3}).eval()
    tuned.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for p in tuned.transformer.prefix_encoder.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
    return tuned


WORDS = "what is this which number do you see here a red w1 w2 w3 w4 flag".split()


def prompt_of(kind: str, processor, rng, images) -> dict:
    """A question of random length, often beginning like another one; an image where the model needs or may
    have one."""
    length = rng.integers(1, 4 if kind == "opt" else 12)
    text = " ".join(WORDS[: rng.integers(0, 6)] + [WORDS[rng.integers(len(WORDS))] for _ in range(length)])
    count = 1 if kind in ("opt", "t5", "stage1") else int(rng.integers(0, 3 if "qwen" in kind else 2))
    chosen = [images[rng.integers(len(images))] for _ in range(count)]
    return processor.prompt(records.request([("user", text)], chosen, "test"))


def decoding_of(rng) -> Decoding:
    how = {"max_new_tokens": int(rng.integers(1, 14)), "seed": int(rng.integers(3))}
    if rng.random() < 0.15:
        how |= {
            "num_beams": 3,
            "length_penalty": 0.5,
            "beam_rule": str(rng.choice(["transformers", "lavis"])),
        }
        return Decoding(**how)
    if rng.random() < 0.5:
        how |= {"temperature": float(rng.choice([0.5, 1.0, 3.0])), "top_k": int(rng.choice([0, 5, 40]))}
        how |= {"top_p": float(rng.choice([1.0, 0.8]))}
    if rng.random() < 0.3:
        how |= {"repetition_penalty": 1.3, "penalty_rule": str(rng.choice(["hf", "sat"]))}
    if rng.random() < 0.3:
        how |= {"min_new_tokens": how["max_new_tokens"]}
    return Decoding(**how)


def alone(model, processor, request: Request) -> list[int]:
    pixels = [processor.load_image(image) for image in request.prompt["images"]]
    prompt = {**request.prompt, "pixel_values": pixels, "id": request.id}
    if request.how.num_beams > 1:  # nothing else of it acts on beams
        how = {name: getattr(request.how, name) for name in ("num_beams", "beam_rule", "length_penalty")}
        how = Decoding(request.how.max_new_tokens, **how)
        return generate.beam_search(model, [prompt], how, processor.stop_words)[0][0][1]
    (ids,) = generate.generate(model, [prompt], request.how, processor.stop_words)
    return ids


def drain(e: Engine, answers: dict | None = None) -> dict[str, list[int]]:
    answers = {} if answers is None else answers
    while e.has_work():
        take(e.step(), answers)
    return answers


def take(events, answers: dict) -> None:
    for event in events:
        assert event.error is None
        answers.setdefault(event.request.id, []).append(event.token)


def assert_whole(e: Engine) -> None:
    """Every slot and every row is free, or holds what is left of an answer for the next one."""
    assert sorted(e.free_slots) == list(range(e.max_running)) and not (e.active or e.queue or e.by_request)
    kept = [(s.start, s.start + s.rows) for s in e.kept]
    assert engine.joined([*e.pool.free, *kept]) == [(0, e.pool.size)]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_shares_the_batch_answers_are_those_alone(loaded, images, kind):
    """Random arrivals, settings and cancels; so few rows and tokens a step that requests wait, prompts enter
    in pieces and ranges are given up."""
    (model, processor), rng = loaded(kind), np.random.default_rng(1)
    e = Engine(model, processor, step_tokens=24, cache_tokens=400, max_running=7)
    answers, cancelled, requests, waited = {}, set(), [], 0
    while len(requests) < 30 or e.has_work():
        for _ in range(rng.integers(0, 4) if len(requests) < 30 else 0):
            request = Request(str(len(requests)), prompt_of(kind, processor, rng, images), decoding_of(rng))
            requests.append(request)
            e.submit(request)
        if requests and rng.random() < 0.05:
            gone = requests[rng.integers(len(requests))]
            cancelled.add(gone.id)
            e.cancel(gone)
        take(e.step(), answers)
        waited += e.waiting
    assert waited
    assert_whole(e)
    for request in requests:
        expected = alone(model, processor, request)
        got = answers.get(request.id, [])
        assert got == (expected[: len(got)] if request.id in cancelled else expected), request


@pytest.mark.parametrize("kind", ["qwen_vl", "opt"])
def test_a_common_beginning_is_computed_once(loaded, images, kind):
    model, processor = loaded(kind)
    question = [records.request([("user", "what number is this")], [image], "test") for image in images[:2]]
    turns = [*question[0].turns, ("assistant", ["7"]), ("user", "and now")]
    first, longer, other = map(
        processor.prompt, (question[0], records.request(turns, [], "test"), question[1])
    )
    how, seen, calls = Decoding(max_new_tokens=5), [], []
    e, encode = Engine(model, processor), model.encode_images
    model.encode_images = lambda pixels, *a: calls.append(len(pixels)) or encode(pixels, *a)
    try:
        for name, prompt in (("first", first), ("again", first), ("longer", longer), ("other", other)):
            request = Request(name, prompt, how)
            e.submit(request)
            events = []
            while e.has_work():
                events += e.step()
            assert [event.token for event in events] == alone(model, processor, request)
            seen.append(events[0].cached_tokens)
    finally:
        del model.encode_images
    known = [*first["input_ids"], *alone(model, processor, Request("", first, how))[:-1]]
    differs = [a != b for a, b in zip(known, longer["input_ids"], strict=False)]
    shared = differs.index(True) if True in differs else len(differs)
    assert shared >= len(first["input_ids"]) - (kind == "opt")  # the line break is a token of its own or not
    # all but the last token; what both begin with; what stands before the image
    assert seen == [0, len(first["input_ids"]) - 1, shared, first["image_starts"][0]]
    assert calls == [1] * (4 + 2)  # each answer alone, and each image once
    assert e.features.keys() == {(engine.digest_of(processor.load_image(i)), None) for i in images[:2]}


def test_no_beginning_is_shared_where_it_is_not_the_same(loaded, images):
    """VisualGLM's context sees all of itself; Qwen-VL's keys turn with the base of the prompt's length."""
    for kind, texts in (
        ("visualglm", ("what is this", "what is this number")),
        ("qwen_vl_long", ("a b", "a b" * 60)),
    ):
        model, processor = loaded(kind)
        e = Engine(model, processor)
        for n, text in enumerate(texts):
            request = Request(
                str(n), processor.prompt(records.request([("user", text)], [], "t")), Decoding(4)
            )
            e.submit(request)
            events = []
            while e.has_work():
                events += e.step()
            assert events[0].cached_tokens == 0
            assert [event.token for event in events] == alone(model, processor, request)
    assert e.kept[0].group != e.kept[1].group


@pytest.mark.parametrize("kind", ["qwen_vl", "t5", "stage1", "visualglm"])
def test_features_of_the_last_images_are_kept(loaded, images, kind):
    """As many as the limit holds; the vision tower does not see those again, whatever is asked."""
    (model, processor), calls, how = loaded(kind), [], Decoding(2)
    with torch.no_grad():
        pixels = processor.load_image(images[0])[None]
        features = model(vlm.Batch.of_images(pixels), output="features")
    room = 2.5 * features.numel() * 4 / 2**20
    e, forward = Engine(model, processor, image_cache_mb=room), model.forward

    def count(batch, output="loss"):
        if output == "features":
            calls.append(len(batch.pixel_values))
        return forward(batch, output)

    def asked(text: str, n: int) -> int:
        prompt = processor.prompt(records.request([("user", text)], [images[n]], "test"))
        request, before = Request(f"{text} {n}", prompt, how), sum(calls)
        e.use_pool(1000), e.kept.clear()  # no rows to go on from
        e.submit(request)
        answer = drain(e)[request.id]
        seen = sum(calls) - before
        assert answer == alone(model, processor, request)
        return seen

    model.forward = count
    try:
        assert [asked("what", 0), asked("w1 w2", 0), asked("what", 1), asked("is", 0)] == [1, 0, 1, 0]
        assert [asked("what", 2), asked("red", 0), asked("red", 1)] == [
            1,
            0,
            1,
        ]  # 1 was the one longest unused
    finally:
        del model.forward
    assert len(e.features) == 2 and e.feature_bytes == 2 * features.numel() * 4


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_one_prompt_share_its_prefill(loaded, images, kind):
    (model, processor), tokens = loaded(kind), []
    prompt = processor.prompt(records.request([("user", "what is w1")], images[:1], "test"))
    e, forward = Engine(model, processor, step_tokens=9), model.forward

    def count(batch, output="loss"):
        tokens.append(len(batch.input_ids) if output == "logits" else 0)
        return forward(batch, output)

    model.forward = count
    requests = [Request(str(n), prompt, Decoding(6, temperature=2.0, min_new_tokens=6)) for n in range(5)]
    try:
        for request in requests:
            e.submit(request)
        answers = drain(e)
    finally:
        del model.forward
    # the prompt once, its last token for each other answer, and all new tokens but the last
    assert sum(tokens) == len(prompt["input_ids"]) + 4 + 5 * 5
    assert answers == {r.id: alone(model, processor, r) for r in requests}
    assert len({tuple(a) for a in answers.values()}) == 5


@pytest.mark.parametrize("kind", ["qwen_vl", "t5"])
def test_an_engine_goes_on_with_a_larger_pool(loaded, images, kind):
    """Calls of generate() that share one: what was computed stays right where the pool grows."""
    (model, processor), rng, cached = loaded(kind), np.random.default_rng(3), []
    e = Engine(model, processor, cache_tokens=0)
    step = e.step

    def watch():
        events = step()
        cached.extend(event.cached_tokens for event in events)
        return events

    e.step = watch
    question, size = records.request([("user", "what is")], images[:1], "test"), 0
    for new in (2, 40, 90):
        prompt = processor.prompt(question)
        request = Request("a", prompt, Decoding(new, temperature=1.0, min_new_tokens=new))
        other = prompt_of(kind, processor, rng, images)
        asked = [
            {**p, "id": "a", "pixel_values": [processor.load_image(i) for i in p["images"]]}
            for p in (prompt, other)
        ]
        how = {"temperature": 1.0, "min_new_tokens": new}
        found = generate.generate(model, asked, generate.Decoding(new, **how), processor.stop_words, engine=e)
        assert found[0] == alone(model, processor, request) and e.pool.size > size
        size = e.pool.size
    assert_whole(e)
    assert max(cached) == len(prompt["input_ids"]) - 1  # the question was asked before


def test_two_hundred_requests_lose_no_slot(loaded, images):
    (model, processor), rng = loaded("opt"), np.random.default_rng(2)
    e = Engine(model, processor, step_tokens=64, cache_tokens=300, max_running=5)
    requests = []
    for n in range(200):
        requests.append(
            Request(str(n), prompt_of("opt", processor, rng, images), Decoding(int(rng.integers(1, 6))))
        )
        e.submit(requests[-1])
        if rng.random() < 0.2:
            e.cancel(requests[rng.integers(n + 1)])
        e.step()
        assert e.running <= 5
    drain(e)
    assert_whole(e)


def test_a_long_request_is_not_overtaken_for_ever(loaded):
    """It does not fit beside the others; they wait behind it."""
    model, processor = loaded("qwen_vl")
    prompt = processor.prompt(records.request([("user", "a")], [], "test"))
    rows = len(prompt["input_ids"]) + 20
    e = Engine(model, processor, cache_tokens=2 * rows)
    order = []
    for n in range(8):
        room = 20 + rows if n == 2 else 20
        e.submit(Request(str(n), prompt, Decoding(room, min_new_tokens=room, temperature=1.0)))
    while e.has_work():
        order += [event.request.id for event in e.step() if event.finish]
    assert order[:3] == ["0", "1", "2"] and len(order) == 8


def test_clients_take_turns(loaded):
    """One who asks later and less does not wait for all that another one has asked."""
    model, processor = loaded("qwen_vl")
    prompt = processor.prompt(records.request([("user", "a")], [], "test"))
    e, order = Engine(model, processor, max_running=2), []
    for n, client in enumerate("aaaaaaaabcb"):
        e.submit(Request(f"{client}{n}", prompt, Decoding(4, min_new_tokens=4), client=client))
    while e.has_work():
        order += [event.request.id for event in e.step() if event.finish]
    assert order[:6] == ["a0", "b8", "a1", "c9", "a2", "b10"] and len(order) == 11


def test_what_can_never_run_is_refused(loaded, tmp_path):
    model, processor = loaded("qwen_vl")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    prompt = processor.prompt(records.request([("user", "a")], [], "test"))
    bad = processor.prompt(records.request([("user", "a")], [str(tmp_path / "bad.png")], "test"))
    e = Engine(model, processor, cache_tokens=100)
    for request, reason in (
        (Request("", prompt, Decoding(100)), "need 1.. rows of the cache, which has 100"),
        (Request("", prompt, Decoding(2), adapter="gone"), "adapter 'gone' is not here; there is none"),
        (Request("", bad, Decoding(2)), "bad.png"),
        (Request("", prompt, Decoding(2), logit_bias={10**9: 1.0}), "logit_bias: token 1000000000"),
        (Request("", prompt, Decoding(2, num_beams=900)), "num_beams=900; expected at most 864"),
        (Request("", prompt, Decoding(2, num_beams=2), presence_penalty=1.0), "need num_beams=1"),
        (Request("", prompt, Decoding(2, min_length=99)), "min_length=99 cannot be reached"),
    ):
        with pytest.raises(ValueError, match=reason) as e_info:
            e.submit(request)
        assert len(str(e_info.value).splitlines()) == 1
    assert not e.has_work() and e.step() == []


def test_a_request_that_fails_leaves_the_others(loaded):
    """Logits that are not finite end one answer; the next one does not go on from its rows."""
    model, processor = loaded("qwen_vl")
    good, bad = (processor.prompt(records.request([("user", text)], [], "test")) for text in ("good", "bad"))
    e, forward = Engine(model, processor), model.forward
    requests = [Request(name, p, Decoding(4, min_new_tokens=4)) for name, p in (("good", good), ("bad", bad))]

    def broken(batch, output="loss"):
        logits = forward(batch, output)
        return logits.index_fill(0, torch.tensor([1]), float("nan")) if len(logits) == 2 else logits

    model.forward = broken
    try:
        for request in requests:
            e.submit(request)
        events = []
        while e.has_work():
            events += e.step()
    finally:
        del model.forward
    ends = {event.request.id: (event.finish, event.error) for event in events if event.finish}
    assert ends == {"good": ("length", None), "bad": ("error", engine.NOT_FINITE)}
    again = Request("again", bad, Decoding(4, min_new_tokens=4))
    e.submit(again)
    first, *_ = e.step()
    assert first.cached_tokens < len(bad["input_ids"]) - 1  # what it shares with the good one alone
    assert [first.token, *drain(e)["again"]] == alone(model, processor, again)
    assert_whole(e)


def test_logprobs_bias_and_penalties(loaded):
    """Log-probabilities are the model's own; bias and penalties change what is chosen, in their row alone."""
    model, processor = loaded("qwen_vl")
    prompt = processor.prompt(records.request([("user", "what is this")], [], "test"))
    how = Decoding(6, min_new_tokens=6)
    plain = Request("plain", prompt, how, logprobs=3)
    forced = Request("forced", prompt, how, logit_bias={77: 1000.0}, logprobs=0)
    counted = Request("counted", prompt, how, logit_bias={77: 50000.0, 78: 49700.0, 79: 49400.0}, logprobs=-1)
    counted.frequency_penalty = 1000.0
    once = Request("once", prompt, how, logit_bias={77: 10000.0, 78: 9700.0}, presence_penalty=5000.0)
    e, events = Engine(model, processor), {}
    for request in (plain, forced, counted, once):
        e.submit(request)
    while e.has_work():
        for event in e.step():
            events.setdefault(event.request.id, []).append(event)
    tokens = {name: [event.token for event in found] for name, found in events.items()}
    assert tokens["plain"] == alone(model, processor, plain)
    assert tokens["forced"] == [77] * 6
    assert tokens["counted"] == [77, 78, 79, 77, 78, 79]
    assert tokens["once"] == [77, 78, 77, 77, 77, 77]
    ids = list(prompt["input_ids"])
    for name in ("plain", "forced"):
        for n, event in enumerate(events[name]):
            sample = {
                **prompt,
                "input_ids": np.array(ids + tokens[name][:n]),
                "labels": np.zeros(len(ids) + n),
            }
            with torch.no_grad():
                batch = data.collate([sample], num_image_tokens=model.num_image_tokens)
                expected = model(batch, output="logits")[0].log_softmax(-1)
            assert abs(event.logprob - float(expected[event.token])) < 1e-4
            assert len(event.top) == (3 if name == "plain" else 0)
            for (token, logprob), value in zip(event.top, expected.topk(3).values, strict=False):
                assert abs(logprob - float(value)) < 1e-4 and abs(logprob - float(expected[token])) < 1e-4
    assert events["counted"][0].logprob is None


def test_stop_texts_end_one_answer(loaded, images):
    model, processor = loaded("qwen_vl")
    prompt = processor.prompt(records.request([("user", "what is this number")], images[:1], "test"))
    free = Request("free", prompt, Decoding(12, min_new_tokens=12))
    text = processor.tokenizer.decode(alone(model, processor, free))
    stop = text[len(text) // 2 :][:2]
    e, finish = Engine(model, processor), {}
    for request in (free, Request("stopped", prompt, free.how, stop=[stop])):
        e.submit(request)
    answers = {}
    while e.has_work():
        events = e.step()
        take(events, answers)
        finish |= {event.request.id: event.finish for event in events if event.finish}
    assert finish == {"free": "length", "stopped": "stop"}
    assert answers["stopped"] == answers["free"][: len(answers["stopped"])] != answers["free"]


def write_adapter(path: Path, base: Path, patterns: list[str], whole: list[str], seed: int, dora=False):
    """An adapter of random values; `whole`: parameters that it holds whole."""
    model = generate.load_model(base)
    names = lora.inject(model, patterns, 4, 8, 0.0)
    for name in names if dora else ():
        lora.add_magnitude(model.get_submodule(name))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            if ".lora_" in name or name in whole:
                p.add_(torch.randn(p.shape, generator=build.named_generator(seed, name)), alpha=0.05)
    path.mkdir()
    made = lora.LoraConfig(str(base), 4, 8)
    lora.save_adapter(path, model, made, names, whole, lambda n: parameters[n].detach())
    return path


def logits_of(e: Engine) -> dict[str, list[torch.Tensor]]:
    """Filled while the engine runs: the logits of each request, a step each."""
    rows, forward = {}, e.forward

    def watch(entries):
        logits = forward(entries)
        for (s, _), row in zip(entries, logits, strict=True):
            rows.setdefault(s.request.id, []).append(row)
        return logits

    e.forward = watch
    return rows


# a parameter of the language model, and one that images' features depend on
WHOLE = {
    "qwen_vl": ("transformer.ln_f.weight", "transformer.visual.proj"),
    "opt": ("language_model.model.decoder.final_layer_norm.weight", "language_projection.bias"),
    "t5": ("language_model.decoder.final_layer_norm.weight", "language_projection.bias"),
    "visualglm": ("transformer.final_layernorm.weight", "image_encoder.glm_proj.bias"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_several_adapters_in_one_batch_are_their_merged_models(tmp_path, images, kind, monkeypatch):
    """LoRA and DoRA of the language model, of the vision tower, with parameters held whole of either; beside
    the base."""
    if kind == "t5":
        base = write_checkpoint(tmp_path / "base", T5)
    else:
        base = ROOT / "samples" / f"tiny_{'blip2' if kind == 'opt' else kind}"
    plain, processor = generate.load_model(base), data.load_processor(str(base))
    module = vlm.find(plain.config.raw)
    linears = [re.escape(n) for n, m in plain.named_modules() if type(m) is torch.nn.Linear]
    in_vision = [
        n
        for n in linears
        if any(fnmatch(f"{n}.weight".replace("\\", ""), p) for p in module.image_parameters)
    ]
    targets = module.lora_targets
    adapters = {
        "text": write_adapter(tmp_path / "text", base, targets, [], 1),
        "DoRA": write_adapter(tmp_path / "dora", base, targets, [], 5, dora=True),
        "vision": write_adapter(tmp_path / "vision", base, in_vision, [], 2),
        "whole": write_adapter(tmp_path / "whole", base, targets, [WHOLE[kind][0]], 3),
        "whole vision": write_adapter(tmp_path / "resampler", base, targets, [WHOLE[kind][1]], 4),
    }
    models = {None: plain}
    for name, path in adapters.items():
        merge.merge(base, path, tmp_path / f"merged {name}", torch.float32)
        models[name] = generate.load_model(tmp_path / f"merged {name}")
    e = Engine(generate.load_model(base), processor, adapters)
    monkeypatch.setattr(linear, "WORTH_PACKING", 0)
    linear.pack(e.model)  # as serve.py does, behind the adapters
    asked = [("what is this", images[0]), ("which number do you see", images[1])]
    prompts = [processor.prompt(records.request([("user", q)], [image], "test")) for q, image in asked]
    how = Decoding(5, min_new_tokens=5)
    requests = [
        Request(f"{name} {n}", p, how, adapter=name) for n, p in enumerate(prompts) for name in models
    ]
    for request in requests:
        e.submit(request)
    rows = logits_of(e)
    answers = drain(e)
    assert_whole(e)
    for request in requests:
        merged = Engine(models[request.adapter], processor)
        merged.submit(dataclasses.replace(request, adapter=None))
        expected = logits_of(merged)
        assert drain(merged)[request.id] == answers[request.id]
        ours, theirs = torch.stack(rows[request.id]), torch.stack(expected[request.id])
        assert len(ours) == 5 and float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    firsts = torch.stack([rows[f"{name} 0"][0] for name in models])
    apart = torch.cdist(firsts, firsts) + torch.eye(len(models))
    assert float(apart.min()) > 1e-2  # each adapter changes the logits, and in a way of its own
