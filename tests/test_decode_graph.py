"""Decoding steps from CUDA graphs, proven without a GPU: on a stand-in whose captures are written down and
replayed into the same memory (standin.py), the whole engine answers as it does step by step on the CPU."""

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import test_engine
from cells import slow
from standin import Device, memory_of, move
from test_engine import WHOLE, assert_whole, decoding_of, prompt_of, write_adapter

import generate
import lora
import records
import vlm
from decode_graph import DecodeGraphs
from engine import Engine, Request
from generate import Decoding

images, loaded = test_engine.images, test_engine.loaded
ROOT = Path(__file__).resolve().parent.parent
SIZES = {"step_tokens": 24, "cache_tokens": 400, "max_running": 7}


def play(e: Engine, kind: str, processor, files, names=(None,), count: int = 10, seed: int = 0) -> dict:
    """Random requests that come and go between steps: sampled and greedy, with beams, log-probabilities,
    several answers to one prompt, prompts asked before, cancelled ones. Request -> what was told of it."""
    rng, told, asked = np.random.default_rng(seed), {}, []
    while len(asked) < count or e.has_work():
        if len(asked) < count and rng.random() < 0.5:
            prompt = prompt_of(kind, processor, rng, files)
            if asked and rng.random() < 0.3:
                prompt = asked[rng.integers(len(asked))].prompt
            how, name = decoding_of(rng), names[rng.integers(len(names))]
            for n in range(2 if how.temperature and rng.random() < 0.5 else 1):
                best = int(rng.integers(-1, 4)) if how.num_beams == 1 else -1
                asked.append(Request(f"{len(asked)}.{n}", prompt, how, adapter=name, logprobs=best))
                e.submit(asked[-1])
        if asked and rng.random() < 0.03:
            e.cancel(asked[rng.integers(len(asked))])
        for event in e.step():
            assert event.error is None
            told.setdefault(event.request.id, []).append(event)
    assert_whole(e)
    return told


def tokens(told: dict) -> dict:
    return {name: [(event.token, event.finish) for event in events] for name, events in told.items()}


def on_device(device: Device, model, processor, adapters=None, **sizes) -> Engine:
    """An engine on the stand-in, with a model of its own."""
    model = copy.deepcopy(model)
    move(model)
    return Engine(model, processor, adapters, capture=device.capture, **sizes)


def memory_of_engine(e: Engine) -> set[int]:
    """All that a captured step may find: what stays where it is while the engine lives."""
    shared = [m.adapters for m in e.model.modules() if isinstance(m, lora.SharedLinear)]
    parts = (
        list(e.model.parameters()),
        list(e.model.buffers()),
        shared,
        [a.whole for a in e.adapters.values()],
    )
    return memory_of(*parts, e.pool.layers, e.graphs.table, e.graphs.out)


def assert_same(found: dict, expected: dict) -> None:
    """Tokens, ends, and log-probabilities."""
    assert tokens(found) == tokens(expected) and len(found) > 5
    for name, events in expected.items():
        for ours, theirs in zip(found[name], events, strict=True):
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
            for a, b in zip([(0, ours.logprob), *ours.top], [(0, theirs.logprob), *theirs.top], strict=True):
                assert a[1] == b[1] or abs(a[1] - b[1]) < 1e-4


@pytest.mark.parametrize("kind", ["qwen_vl_long", *map(slow, ("opt", "visualglm", "ptuning", "stage1"))])
def test_replayed_steps_answer_as_eager_ones(loaded, images, kind):
    model, processor = loaded(kind)
    expected = play(Engine(model, processor, **SIZES), kind, processor, images)
    with Device(reads=True) as device:
        e = on_device(device, model, processor, **SIZES)
        found = play(e, kind, processor, images)
        known = memory_of_engine(e)
    assert_same(found, expected)
    replays = [tape.replays for tape in device.tapes]
    assert len(replays) > 2 and sum(replays) > 2 * len(replays)
    # Nothing that a capture has found is gone with the step in which it was made.
    assert all(tape.given <= known for tape in device.tapes)


@pytest.mark.parametrize("kind", [slow("qwen_vl"), slow("visualglm")])
def test_a_mix_of_adapters_is_a_graph(loaded, images, tmp_path, kind):
    """LoRA and DoRA beside each other and the base; one that holds a parameter whole, in steps of its own."""
    (model, processor), base = loaded(kind), ROOT / "samples" / f"tiny_{'blip2' if kind == 'opt' else kind}"
    targets = vlm.find(model.config.raw).lora_targets
    whole = [WHOLE[kind][0]]
    adapters = {
        "text": write_adapter(tmp_path / "text", base, targets, [], 1),
        "DoRA": write_adapter(tmp_path / "dora", base, targets, [], 2, dora=True),
        "whole": write_adapter(tmp_path / "whole", base, targets, whole, 3),
    }
    plain, answers = Engine(generate.load_model(base), processor, adapters, **SIZES), []
    with Device(reads=True) as device:
        e = on_device(device, model, processor, adapters, **SIZES)
        for names, count in (((None, *adapters), 11), (("whole",), 8)):
            answers.append([play(x, kind, processor, images, names, count) for x in (e, plain)])
        known = memory_of_engine(e)
    for found, expected in answers:
        assert_same(found, expected)
    mixes = {key[1:] for key in e.graphs.graphs}
    assert {(None, (0, 1, 2)), (None, (1, 2))} & mixes and "whole" in {whole for whole, _ in mixes}
    assert all(tape.given <= known for tape in device.tapes)


@pytest.mark.parametrize("field", [slow(f) for f in (*DecodeGraphs.FIELDS, "position")])
def test_a_number_that_stays_what_it_was_is_found(loaded, images, monkeypatch, tmp_path, field):
    """The comparison sees each of the table's numbers: with one as it was when its graph was captured,
    answers are others."""
    kind = "opt" if field == "adapter" else "qwen_vl_long"
    (model, processor), adapters = loaded(kind), {}
    fill, first, at = DecodeGraphs.fill, {}, (*DecodeGraphs.FIELDS, "position").index(field)
    if field == "adapter":
        base = ROOT / "samples" / "tiny_blip2"
        targets = vlm.find(model.config.raw).lora_targets
        adapters = {n: write_adapter(tmp_path / n, base, targets, [], i) for i, n in enumerate("ab")}
        model = generate.load_model(base)

    def stale(graphs, sequences, bucket):
        key = bucket, fill(graphs, sequences, bucket)
        graphs.numbers[at] = first.setdefault(key, graphs.numbers[at].copy())
        return key[1]

    plain = Engine(copy.deepcopy(model), processor, adapters, **SIZES)
    expected = play(plain, kind, processor, images, (None, *adapters), 20 if adapters else 8)
    monkeypatch.setattr(DecodeGraphs, "fill", stale)
    with Device(reads=True) as device:
        e = on_device(device, model, processor, adapters, **SIZES)
        found = play(e, kind, processor, images, (None, *adapters), 20 if adapters else 8)
    with pytest.raises(AssertionError):
        assert_same(found, expected)


@pytest.mark.parametrize("stale", [False, slow(True)])
def test_a_slot_that_nobody_has_writes_nowhere(loaded, monkeypatch, stale):
    """Of four answers two end, and the next one takes over the rows of the last: what the fourth slot did
    before would be written among its keys."""
    model, processor = loaded("qwen_vl")

    def request(name: str, words: int, new: int) -> Request:
        text = " ".join(f"{name}{n}" for n in range(words))
        prompt = processor.prompt(records.request([("user", text)], [], "test"))
        return Request(name, prompt, Decoding(new, min_new_tokens=new))

    asked = [request(*how) for how in (("a", 1, 20), ("b", 1, 12), ("c", 1, 20), ("d", 11, 12), ("e", 14, 6))]
    sizes = {"cache_tokens": sum(Engine(model, processor).sequence(r).rows for r in asked[:4])}
    fill = DecodeGraphs.fill

    def forgetful(graphs, sequences, bucket):
        before, (*_, n) = graphs.numbers.copy(), (0, len(sequences))
        adapters = fill(graphs, sequences, bucket)
        graphs.numbers[:, n:bucket] = before[:, n:bucket]
        return adapters

    answers = []
    for device in (None, Device(reads=True)):
        with device or contextlib.nullcontext():
            e = on_device(device, model, processor, **sizes) if device else Engine(model, processor, **sizes)
            for r in asked:
                e.submit(r)
            answers.append({})
            while e.has_work():
                for event in e.step():
                    answers[-1].setdefault(event.request.id, []).append(event.token)
        if stale:
            monkeypatch.setattr(DecodeGraphs, "fill", forgetful)
    assert (answers[0] == answers[1]) != stale
    assert answers[0].keys() == {*"abcde"} and {key[0] for key in e.graphs.graphs} >= {2, 4}


@pytest.mark.parametrize("sampled, copies", [(True, 3), slow(False, 1)])
def test_a_step_is_one_read_and_few_copies(loaded, sampled, copies):
    """Of the tokens, with whether they are finite, and log-probabilities; the table, and where they are asked
    for the settings of the sampler and of what is random. Addresses stay; a pool that grows is captured
    anew."""
    model, processor = loaded("qwen_vl")
    prompt = processor.prompt(records.request([("user", "what is")], [], "test"))
    how = Decoding(9)
    if sampled:
        how = Decoding(9, min_new_tokens=9, temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.1)
    requests = [Request(str(n), prompt, how, logprobs=2 * n if sampled else -1) for n in range(3)]
    with Device(reads=True) as device:
        e = on_device(device, model, processor, cache_tokens=200, stop_words=[])
        places, counts = [], []
        for request in requests:
            e.submit(request)
        answers = {}
        while e.has_work():
            decoding = all(s.decodes for s in e.active) and not e.waiting
            before = device.reads, len(device.copies), len(device.tapes)
            for event in e.step():
                answers.setdefault(event.request.id, []).append(event.token)
            after = device.reads, len(device.copies), len(device.tapes)
            if decoding and before[2]:
                counts.append(tuple(b - a for a, b in zip(before, after, strict=True)))
                places.append(memory_of(e.graphs.table, e.graphs.out, e.pool.layers))
            if len(counts) == 4:
                e.pool.grow(300)
    assert counts[:5] == [(1, copies, 0)] * 4 + [(1, copies, 1)]
    assert {count[:2] for count in counts} == {(1, copies)}
    assert all(p == places[0] for p in places[:4]) and all(p == places[-1] for p in places[4:])
    assert places[0] != places[-1]
    plain = Engine(model, processor, stop_words=[])
    for request in requests:
        plain.submit(request)
    expected = {}
    while plain.has_work():
        for event in plain.step():
            expected.setdefault(event.request.id, []).append(event.token)
    assert answers == expected


def test_what_cannot_be_captured_stays_eager(loaded, capsys):
    """A capture that fails is said, once; the answers are the same."""
    model, processor = loaded("qwen_vl")

    def capture(run):
        run()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    prompt, answers = processor.prompt(records.request([("user", "a")], [], "test")), []
    for engine in (Engine(model, processor, capture=capture), Engine(model, processor)):
        engine.submit(Request("0", prompt, Decoding(5, min_new_tokens=5)))
        answers.append([])
        while engine.has_work():
            answers[-1] += [event.token for event in engine.step()]
    assert answers[0] == answers[1] and len(answers[0]) == 5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("note: no CUDA graphs") and "not permitted" in said[0]
