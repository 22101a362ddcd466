"""data.py with a whitespace tokenizer in place of a model: readers, index, order, packs, batches, loader,
commands."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import data_check
import vlm
from records import ImageRef, read_requests, resolve_image, text_of

Q, SIZE = 4, 8


class Processor:
    """One token a word (its checksum); an image is Q slots; assistant text is supervised; text is cut at
    max_length."""

    num_image_tokens, image_size, name, blank_ids, stop_words = Q, SIZE, "dummy", (0,), []

    def fingerprint(self):
        return self.name

    def load_image(self, path):
        with Image.open(path) as image:
            if image.width * image.height > 1_000_000:
                raise ValueError(f"{path} has too many pixels")
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), np.float32)
        return torch.from_numpy(pixels / 128 - 1).permute(2, 0, 1).contiguous()

    def encode(self, conversation, max_length):
        ids, labels, starts, images, files = [], [], [], [], iter(conversation.images)
        for role, content in conversation.turns:
            if "REFUSE" in text_of(content):
                raise ValueError("the model can't take this")
            for piece in content:
                if isinstance(piece, ImageRef):
                    file = next(files)
                    if len(ids) + Q <= max_length:
                        starts.append(len(ids))
                        images.append(file)
                        ids += [1] * Q
                        labels += [-100] * Q
                else:
                    words = [zlib.crc32(word.encode()) % 30_000 + 2 for word in piece.split()]
                    ids += words
                    labels += words if role == "assistant" else [-100] * len(words)
        cut = slice(0, max_length)
        sample = {"input_ids": np.array(ids[cut], np.int32), "labels": np.array(labels[cut], np.int32)}
        return {**sample, "image_starts": starts, "images": images, "truncated": len(ids) > max_length}

    def __init__(self):
        self.tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def picture(path: Path, colour=(200, 30, 30), side=16) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    return str(path)


def write(path: Path, records, lines=False) -> str:
    dump = (
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) if lines else json.dumps(records)
    )
    path.write_text(dump, encoding="utf-8")
    return str(path)


def entry(name, files, **more):
    return {"name": name, "data_files": files, **more}


def read_all(name, files, **more):
    opened = data.Entry(entry(name, files, **more))
    return [conversation for i in range(len(opened)) for conversation in opened.conversations(i)]


def chats(tmp_path, count, name="chat.jsonl", words=lambda n: 1 + n % 7, images=lambda n: 0):
    """`count` text records of different lengths, as a chatml_dataset entry."""
    records = []
    for n in range(count):
        question = f"<img>{n % 3}.png</img>" * images(n) + f"q{n}"
        answer = " ".join(f"a{n}.{w}" for w in range(words(n)))
        records.append({"id": n, "conversations": [[question, answer]]})
    for n in range(3):
        picture(tmp_path / f"{n}.png", (n * 90, 0, 0))
    return entry("chatml_dataset", write(tmp_path / name, records, lines=True))


def index_of(*entries, max_length=64, **more):
    return data.build_index(list(entries), Processor(), max_length, None, **more)


# --------------------------------------------------------------------------------------------------
# readers


def test_chatml_three_shapes_read_alike(tmp_path):
    picture(tmp_path / "a.png")
    user, answer = "Picture 1: <img>a.png</img>\nWhat is this?", "A bus."
    rest = [("assistant", answer), ("user", "And?"), ("assistant", "No.")]
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is this?"}]
    shapes = [
        {"conversations": [[user, answer], ["And?", "No."]]},
        {"conversations": [{"from": role, "value": text} for role, text in [("user", user), *rest]]},
        {"messages": [{"role": role, "content": text} for role, text in [("user", user), *rest]]},
        {"messages": [{"role": role, "content": text} for role, text in [("user", parts), *rest]]},
        {"image": "a.png", "conversations": [["What is this?", answer], ["And?", "No."]]},
    ]
    for n, record in enumerate(shapes):
        (found,) = read_all(
            "chatml_dataset", write(tmp_path / f"{n}.json", [{"id": "x", "source": "s", **record}])
        )
        assert [(role, text_of(content)) for role, content in found.turns] == [
            ("user", "What is this?"),
            *rest,
        ], record
        assert isinstance(found.turns[0][1][0], ImageRef)
        assert found.images == [str(tmp_path / "a.png")]
        assert (found.id, found.kind, found.answers, found.source) == ("x", "chat", ["No."], "s")
        assert found.where == f"{tmp_path}/{n}.json record 0"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "a chat needs one of 'messages', 'conversations'"),
        ({"conversations": []}, "a chat needs one of 'messages', 'conversations'"),
        ({"conversations": [["only one"]]}, "neither a .user, assistant. pair"),
        (
            {"conversations": [["q", 3]]},
            "turn 1 .assistant.: expected a text or a list of content parts, got 3",
        ),
        ({"conversations": [["<img>a.png", "x"]]}, "don't match"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "expected a role among"),
        ({"messages": [{"role": "user", "content": "x"}]}, "last turn must be the assistant's"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            "must alternate",
        ),
        ("just text", "expected an object"),
    ],
)
def test_malformed_chat_is_named(tmp_path, record, reason):
    path = write(tmp_path / "bad.jsonl", [{"conversations": [["q", "a"]]}, record], lines=True)
    with pytest.raises(ValueError, match=f"^{path}:2: .*{reason}"):
        read_all("chatml_dataset", path)


@pytest.mark.parametrize("name", ["coco_caption", "vg_caption"])
def test_captions(tmp_path, name):
    picture(tmp_path / "pics/a.png")
    picture(tmp_path / "pics/b.png")
    lines = [
        {"image": "a.png", "caption": "one"},
        {"image": "b.png", "caption": ["two", "three"], "image_id": "7"},
    ]
    coco = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in ((1, "a"), (7, "b"), (9, "unused"))],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((1, "one"), (7, "two"), (7, "three"))],
    }
    for path in (write(tmp_path / "c.json", lines), write(tmp_path / "coco.json", coco)):
        found = read_all(name, path, image_root=str(tmp_path / "pics"))
        assert [c.turns[1][1] for c in found] == [["one"], ["two"], ["three"]]
        assert [c.answers for c in found] == [["one"], ["two", "three"], ["two", "three"]]
        assert found[2].turns[0] == ("user", [ImageRef(str(tmp_path / "pics/b.png"))])
        assert found[2].id == "7" and found[2].kind == "caption" and found[2].source == name
    del coco["images"][0]["file_name"]
    with pytest.raises(ValueError, match="coco.json: not a COCO or VQAv2 document: missing 'file_name'"):
        read_all(name, write(tmp_path / "coco.json", coco))
    bad = write(tmp_path / "bad.json", [{"image": "a.png", "caption": []}])
    with pytest.raises(ValueError, match="'caption' must be"):
        read_all(name, bad)


def test_vqa_records_and_vqa_v2_pair(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "val2014/COCO_val2014_000000000005.jpg")
    records = [
        {"image": "a.png", "question": "What?", "answer": "bus", "answers": ["bus", "car"], "question_id": 3},
        {"image": "a.png", "question": "What?", "answers": ["car", "bus", "bus"]},
    ]
    found = read_all("coco_vqa", write(tmp_path / "v.jsonl", records, lines=True))
    question = [ImageRef(str(tmp_path / "a.png")), "What?"]
    assert [c.turns for c in found] == [[("user", question), ("assistant", ["bus"])]] * 2
    assert found[0].answers == ["bus", "car"] and found[0].id == "3" and found[0].kind == "vqa"

    ask = [{"question_id": 11, "image_id": 5, "question": "What?"}]
    given = [{"answer": "bus"}, {"answer": "van"}]
    tell = [{"question_id": 11, "image_id": 5, "multiple_choice_answer": "bus", "answers": given}]
    annotations = write(tmp_path / "annotations.json", {"annotations": tell})
    official = write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": ask})
    named = write(tmp_path / "q2.json", {"questions": ask, "images": [{"id": 5, "file_name": "a.png"}]})
    for questions, image in ((official, "val2014/COCO_val2014_000000000005.jpg"), (named, "a.png")):
        (one,) = read_all("coco_vqa", [annotations, questions])
        assert (
            one.images == [str(tmp_path / image)]
            and one.answers == ["bus", "van"]
            and one.turns[1][1] == ["bus"]
        )
    with pytest.raises(ValueError, match="questions without their annotations"):
        read_all("coco_vqa", official)


def test_visualglm(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "g.json", [{"img": "a.png", "prompt": "What?", "label": "bus"}])
    (one,) = read_all("visualglm_dataset", path)
    question = [ImageRef(str(tmp_path / "a.png")), "What?"]
    assert one.turns == [("user", question), ("assistant", ["bus"])] and one.kind == "vqa"
    with pytest.raises(ValueError, match="record 0: 'prompt' must be"):
        read_all("visualglm_dataset", write(tmp_path / "h.json", [{"img": "a.png", "label": "x"}]))


def test_jsonl_lines_bom_blank_and_malformed(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"conversations": [["你好", "嗨"]]}, ensure_ascii=False)
    path.write_bytes(("\ufeff" + good + "\n\n" + good + "\r\n{oops\n" + good).encode())
    opened = data.Entry(entry("chatml_dataset", str(path))).sources[0]
    assert len(opened) == 4 and opened[0] == opened[1] == opened[3] == json.loads(good)
    assert [opened.where(i) for i in range(4)] == [f"{path}:{n}" for n in (1, 3, 4, 5)]
    with pytest.raises(ValueError, match="not valid JSON"):
        opened[2]
    renamed = tmp_path / "a.json"  # JSONL under another name
    renamed.write_text(good + "\n" + good + "\n")
    assert len(data.Entry(entry("chatml_dataset", str(renamed)))) == 2
    broken = tmp_path / "b.json"
    broken.write_text('[\n{"id": 1},\n{"id": }\n]')
    with pytest.raises(ValueError, match=f"{broken}:3: not valid JSON"):
        data.Entry(entry("chatml_dataset", str(broken)))


def test_entry_mistakes(tmp_path):
    path = chats(tmp_path, 1)["data_files"]
    for settings, message in (
        (entry("coco_captions", path), "known: chatml_dataset.*did you mean 'coco_caption'"),
        (entry("chatml_dataset", path + "x"), "no file"),
        (entry("chatml_dataset", path, image_root="nowhere"), "image_root 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Entry(settings)


def test_chat_template_splits_max_samples(tmp_path, capsys):
    records = [{"conversations": [["q", str(n)]], **({"split": "val"} if n % 2 else {})} for n in range(6)]
    path = write(tmp_path / "a.json", records)
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"system": "<|im_start|>system\nBe brief.<|im_end|>"}))
    (tmp_path / "other.json").write_text(json.dumps({"system": "<|system|>\nBe brief.<|end|>"}))
    with pytest.raises(ValueError, match="'system' has other markers"):
        read_all("chatml_dataset", path, chat_template=str(tmp_path / "other.json"))
    found = read_all("chatml_dataset", path, chat_template=str(template), splits=["train"])
    assert [c.answers[0] for c in found] == ["0", "2", "4"]
    assert found[0].turns[0] == ("system", ["Be brief."])
    assert read_all("chatml_dataset", path, chat_template="no/such.json")[0].turns[0][0] == "user"
    assert "no/such.json; the model's own template" in capsys.readouterr().err
    index = index_of(
        {**entry("chatml_dataset", path), "max_samples": 2, "splits": ["val"]}, max_bad_samples=0
    )
    assert index.record.tolist() == [0, 1]
    data.say_unused_keys(index.entries)
    assert "splits" not in capsys.readouterr().err
    lines = write(tmp_path / "b.jsonl", json.dumps({"query": "q", "response": "x", "subset": "val"}))
    data.say_unused_keys([data.Entry({"data_files": lines, "splits": ["val"]})])
    assert "splits leaves out none: no record has a 'split'" in capsys.readouterr().err
    picture(tmp_path / "a.png")
    asked = write(tmp_path / "c.json", [{"image": "a.png", "question": "q", "answer": "x"}])
    other = write(tmp_path / "d.json", [{"query": "q", "response": "x", "split": "val"}])
    none = {"data_files": other, "splits": ["gone"]}
    data.say_unused(index_of({"data_files": asked, "chat_template": str(template)}, none, max_bad_samples=0))
    said = capsys.readouterr().err
    assert "data:c: chat_template has no effect on captions, questions" in said
    assert "data:d: none of its records is used" in said


def test_image_places(tmp_path, monkeypatch):
    root, folder, here = tmp_path / "root", tmp_path / "folder", tmp_path / "here"
    for place in (root, folder, here):
        picture(place / "all.png")
    picture(here / "cwd.png")
    picture(folder / "file.png")
    monkeypatch.chdir(here)
    assert resolve_image("all.png", str(root), str(folder)) == str(root / "all.png")
    assert resolve_image("all.png", None, str(folder)) == str(folder / "all.png")
    assert resolve_image("file.png", str(root), str(folder)) == str(folder / "file.png")
    assert resolve_image("cwd.png", str(root), str(folder)) == "cwd.png"
    assert resolve_image("../here/cwd.png", None, str(folder)) == str(here / "cwd.png")
    with pytest.raises(ValueError, match="leaves image_root"):
        resolve_image("x/../../here/cwd.png", str(root), str(folder))
    with pytest.raises(ValueError, match=f"tried {root}/no.png, {folder}/no.png, no.png"):
        resolve_image("no.png", str(root), str(folder))
    with pytest.raises(ValueError, match="download it first"):
        resolve_image("https://example.com/a.png", None, "")


# --------------------------------------------------------------------------------------------------
# index


def test_index_columns_and_workers(tmp_path):
    settings = chats(tmp_path, 1001, images=lambda n: n % 2)
    index, forked = index_of(settings), index_of(settings, num_workers=2)
    n = np.arange(1001)
    assert (index.length == 2 + n % 7 + Q * (n % 2)).all() and (index.num_images == n % 2).all()
    assert (index.num_supervised == 1 + n % 7).all() and (index.record == n).all()
    assert (forked.rows == index.rows).all()
    short = index_of(settings, max_length=4, max_bad_samples=1)
    assert short.truncated.sum() == (index.length > 4).sum() - len(short.problems) > 0
    assert len(short.problems) == 500 and "no supervised token within max_length=4" in short.problems[0][1]


def test_index_cache(tmp_path):
    settings, cache = chats(tmp_path, 20, images=lambda n: 1), str(tmp_path / "cache")
    processor, calls = Processor(), []
    encode = processor.encode
    processor.encode = lambda *args: calls.append(1) or encode(*args)

    def build(settings=settings, max_length=64, **more):
        calls.clear()
        index = data.build_index([settings], processor, max_length, cache, **more)
        return index, len(calls)

    first, cost = build()
    again, cost_again = build()
    assert (cost, cost_again) == (20, 0) and (first.rows == again.rows).all()
    assert build(max_length=63)[1] == 20
    assert build({**settings, "max_samples": 5})[1] == 5
    processor.name = "other"
    assert build()[1] == 20 and build()[1] == 0
    os.utime(settings["data_files"], (1, 1))
    assert build()[1] == 0  # by content, not by time
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert build()[1] == 20 and build()[1] == 0  # made again
    with open(settings["data_files"], "a") as file:
        file.write(json.dumps({"conversations": [["<img>late.png</img>", "a"]]}) + "\n")
    index, cost = build(max_bad_samples=0.1)
    assert cost == 0 and len(index.problems) == 1  # the record without a file is kept as a problem ...
    assert len(build(max_bad_samples=0.1)[0]) == 20
    picture(tmp_path / "late.png")
    assert len(build(max_bad_samples=0.1)[0]) == 21  # ... until its picture is there


@pytest.mark.parametrize(
    "change, again",
    [
        (lambda old: old + b"\n\n" + old[:200] + b"\n{}\n", False),
        (lambda old: old + b"\n" + old, False),
        (lambda old: old + b"x", True),  # the last line goes on
        (lambda old: b" " + old[:-1] + b"\n" + old, True),
        (lambda old: old.replace(b"q3", b"Q3") + b"\n" + old, True),
        (lambda old: old[:-20], True),
    ],
)
@pytest.mark.parametrize("more", [{}, {"max_samples": 25}, {"eval_split": 0.4, "max_samples": 9}])
def test_an_index_is_gone_on_with(tmp_path, monkeypatch, change, again, more):
    """What is measured of a file that has grown is its new lines, and all is as if measured at once."""
    measured, cache = [], str(tmp_path / "cache")
    sizes = data.Measurer.sizes
    monkeypatch.setattr(
        data.Measurer, "sizes", lambda self, entry, n: measured.append(n) or sizes(self, entry, n)
    )
    lines = [json.dumps({"conversations": [[f"q{n}", "a" * (n % 5 + 1)]]}) for n in range(20)]
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file in (path, other):
        file.write_text("\n".join([*lines[:7], "{", *lines[7:]]))

    def build(cache_dir):
        measured.clear()
        entries = [{"data_files": str(path), "weight": len(path.read_bytes()), **more}]
        entries += [{"data_files": [str(other), str(path)]}, {"data_files": str(other)}]
        return data.build_index(entries, Processor(), 64, cache_dir, max_bad_samples=1)

    first = build(cache)
    cost = len(measured)
    assert (build(cache).rows == first.rows).all() and len(measured) == len(first.problems)
    path.write_bytes(change(path.read_bytes()))
    found, count = build(cache), len(measured)
    fresh = build(None)
    assert found.rows.tobytes() == fresh.rows.tobytes() and found.rows.dtype == fresh.rows.dtype
    assert found.problems == fresh.problems
    # Bad records of before are looked at again: what they lacked may be there now.
    assert count == len(measured) if again else count == len(measured) - cost + len(first.problems)
    assert (build(cache).rows == fresh.rows).all() and len(measured) == len(fresh.problems)


@pytest.mark.parametrize("other", [["one two", "six"], ["one", "two", "x"]])
def test_a_file_that_changes_during_a_run_is_said(tmp_path, other):
    """Captions are lost, or have another number of words than the step was planned with."""
    picture(tmp_path / "a.png")
    path = tmp_path / "a.jsonl"

    def write(captions):
        path.write_text(json.dumps({"image": "a.png", "caption": captions}).ljust(99))

    write(["one two", "three four five", "six"])
    plan = data.Plan(data.build_index([{"data_files": str(path)}], Processor(), 64, None), 0, 64)
    write(other)
    (_, _, (batch,)), *_ = data.TrainLoader(plan, Processor(), range(1), data.Deal(per_device_batch=3))
    assert batch.bad and all(reason == data.CHANGED for _, reason in batch.bad), batch.bad


def test_bad_records_are_counted_and_listed(tmp_path):
    picture(tmp_path / "a.png")
    lines = [json.dumps({"conversations": [["q", "a"]]})] * 100
    questions = {3: "REFUSE", 5: "<img>none.png</img>", 7: "<img>../a.png</img>", 9: "<img>a.png</img> ok"}
    for n, question in questions.items():
        lines[n] = json.dumps({"conversations": [[question, "a"]]})
    lines[11] = '{"conversations": '
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    settings = entry("chatml_dataset", str(path), image_root=str(tmp_path))
    index = index_of(settings, max_bad_samples=0.04)
    assert [where for where, _ in index.problems] == [f"{path}:{n}" for n in (4, 6, 8, 12)] and len(
        index
    ) == 96
    expectations = ("can't take", "not found", "leaves", "not valid JSON")
    for (_, reason), expected in zip(index.problems, expectations, strict=True):
        assert expected in reason and str(path) not in reason
    with pytest.raises(ValueError) as error:
        index_of(settings, max_bad_samples=0.03)
    message = str(error.value)
    assert "4 of 100 records are unusable" in message and f"{path}:12: not valid JSON" in message
    assert "\n" not in message
    path.write_text("\n".join(["{"] * 9))
    with pytest.raises(ValueError, match="9 of 9 .*; and 4 more"):
        index_of(settings)


def test_empty_dataset(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the dataset is empty: no sample in .*none.jsonl"):
        index_of(entry("chatml_dataset", str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="no entry"):
        index_of()


@pytest.mark.slow
def test_100k_records_memory(tmp_path):
    """Reading, indexing and loading 100,000 JSONL records takes no more memory than 1,000."""
    script = """
import os, resource, sys; sys.path[:0] = ["tests", "."]
import data
from test_data import Processor
index = data.build_index([{"name": "chatml_dataset", "data_files": sys.argv[1]}], Processor(), 64, None, 2)
plan = data.Plan(index, 0, 64, mixtoken=True)
steps = min(plan.steps_per_epoch(4), 500)
for item in data.TrainLoader(plan, Processor(), range(steps), data.Deal(grad_accum=4)):
    pass
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(len(index), own // 1024, workers // 1024,)
"""
    peaks = {}
    for count in (1_000, 100_000):
        line = '{{"id": {}, "conversations": [["' + "word " * 10 + " " * 350 + '", "an answer"]]}}\n'
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            file.writelines(line.format(n) for n in range(count))
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
        )
        found, *peaks[count] = map(int, done.stdout.split())
        assert found == count
    growth = [after - before for before, after in zip(peaks[1_000], peaks[100_000], strict=True)]
    print(f"100,000 records: memory +{growth} MB")
    assert max(growth) <= 40, growth


# --------------------------------------------------------------------------------------------------
# order


def test_mixture_proportions(tmp_path):
    names = ("a.jsonl", "b.jsonl", "c.jsonl")
    entries = [chats(tmp_path, size, name) for size, name in zip((7000, 2000, 1000), names, strict=True)]
    weights = (1, 5, 4)
    weighted = [{**e, "weight": w} for e, w in zip(entries, weights, strict=True)]
    index = index_of(*weighted)
    order = data.Plan(index, 0, 64).order(0)
    assert len(order) == 10_000
    for upto in (100, 1000, 10_000):
        shares = np.bincount(index.entry[order[:upto]], minlength=3) / upto
        assert np.abs(shares - np.array(weights) / 10).max() <= 0.01
    second = order[
        index.entry[order] == 1
    ]  # 5,000 draws of 2,000 samples: two whole passes, each in its own order
    assert sorted(second[:2000]) == sorted(second[2000:4000]) == list(range(7000, 9000))
    assert (second[:2000] != second[2000:4000]).any()

    plain = data.Plan(index_of(*entries), 0, 64)
    assert sorted(plain.order(0)) == list(range(10_000))
    assert (plain.order(0) != plain.order(1)).any() and (
        plain.order(1) == data.Plan(plain.index, 0, 64).order(1)
    ).all()
    assert (plain.order(0) != data.Plan(plain.index, 1, 64).order(0)).any()
    assert (data.Plan(index, 0, 64, shuffle=False).order(3) == np.arange(10_000)).all()
    with pytest.raises(ValueError, match="give every entry one"):
        data.Plan(index_of(weighted[0], entries[1]), 0, 64)


@pytest.mark.parametrize("mixtoken", [False, True])
def test_steps_do_not_depend_on_the_layout(tmp_path, mixtoken):
    index = index_of(chats(tmp_path, 103))

    def run(dp_size, batch, accum, start=0):
        plan, steps = data.Plan(index, 5, 32, mixtoken), []
        for step in range(start, data.Plan(index, 5, 32, mixtoken).total_steps(3, 8)):
            ranks = [
                plan.micro_batches(step, data.Deal(rank, dp_size, batch, accum)) for rank in range(dp_size)
            ]
            assert len({epoch for epoch, _ in ranks}) == len({len(rounds) for _, rounds in ranks}) == 1
            assert (
                all(len(units) <= batch for _, rounds in ranks for units in rounds)
                and len(ranks[0][1]) <= accum
            )
            assert all(
                any(rounds[n] for _, rounds in ranks) for n in range(len(ranks[0][1]))
            )  # no round is all empty
            samples = [unit.tolist() for _, rounds in ranks for units in rounds for unit in units]
            steps.append((ranks[0][0], sorted(samples)))
        return steps

    reference = run(1, 8, 1)
    for layout in ((1, 1, 8), (2, 4, 1), (2, 1, 4), (4, 2, 1), (8, 1, 1)):
        assert run(*layout) == reference, layout
    assert run(2, 2, 2, start=9) == reference[9:]
    for epoch in range(3):  # each sample exactly once an epoch
        assert sorted(n for e, units in reference if e == epoch for u in units for n in u) == list(range(103))


def test_last_step_leaves_ranks_empty_but_in_step(tmp_path):
    plan = data.Plan(index_of(chats(tmp_path, 9)), 0, 64)
    rounds = [plan.micro_batches(1, data.Deal(rank, 4, 1, 2))[1] for rank in range(4)]
    assert [[len(units) for units in r] for r in rounds] == [[1], [0], [0], [0]]


def test_packs(tmp_path):
    index = index_of(chats(tmp_path, 500, images=lambda n: n % 4))
    uncapped = [index.length[unit].sum() for unit in data.Plan(index, 0, 64, mixtoken=True).units(0)]
    assert max(uncapped) == 64 and np.mean(uncapped) > 50
    plan = data.Plan(index, 0, 64, mixtoken=True, max_images=5)
    units = plan.units(0)
    assert sorted(np.concatenate(units)) == list(range(500))
    tokens, images = [index.length[u].sum() for u in units], [index.num_images[u].sum() for u in units]
    assert max(tokens) <= 64 and max(images) == 5
    for n in range(len(units) - 1):  # greedy: the next sample would not have fitted
        follower = units[n + 1][0]
        assert tokens[n] + index.length[follower] > 64 or images[n] + index.num_images[follower] > 5
    assert sorted(np.concatenate(plan.units(1))) == list(range(500))
    assert [u.tolist() for u in plan.units(0)] == [u.tolist() for u in units]
    with pytest.raises(ValueError, match="has 3 images, more than max_images=2"):
        data.Plan(index, 0, 64, mixtoken=True, max_images=2)


# -------------------------------------------------------------------------------------------------- samples
# and batches


def test_collate(tmp_path):
    index = index_of(chats(tmp_path, 4, images=lambda n: n % 3, words=lambda n: 3))
    plan = data.Plan(index, 1, 64)
    samples = [data.load_sample(plan, n, 0, Processor()) for n in range(3)]
    batch = data.collate(samples, bad=[("x:1", "gone")])
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 24] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids.tolist() == [*range(4), *range(8), *range(12)]
    ids, targets = batch.input_ids.tolist(), batch.targets.tolist()
    for start, end in ((0, 4), (4, 12), (12, 24)):
        assert targets[end - 1] == -100  # never the first token of the next segment
        assert targets[end - 4 : end - 1] == ids[end - 3 : end] and set(targets[start : end - 4]) <= {-100}
    assert batch.num_supervised == 9 and batch.bad == [("x:1", "gone")]
    assert batch.image_positions.tolist() == [[4, 5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert (batch.input_ids[batch.image_positions] == 1).all() and (batch.input_ids == 1).sum() == 12
    assert batch.pixel_values.shape == (3, 3, SIZE, SIZE)
    assert batch.sample_ids == [f"{tmp_path}/chat.jsonl:{n + 1}#{n}" for n in range(3)]
    assert batch.dataset_ids.tolist() == [0, 0, 0]

    empty = data.collate([], num_image_tokens=Q)
    assert (empty.input_ids.tolist(), empty.targets.tolist(), empty.num_supervised) == ([0], [-100], 0)
    assert empty.pixel_values is None and empty.image_positions.shape == (0, Q)
    assert empty.cu_seqlens.tolist() == [0, 1] and empty.image_dropout_keys.shape == (0,)


def test_dropout_keys_follow_the_sample(tmp_path):
    index = index_of(chats(tmp_path, 4, images=lambda n: 2))

    def keys(numbers, epoch=0, seed=1):
        plan = data.Plan(index, seed, 64)
        samples = [data.load_sample(plan, n, epoch, Processor()) for n in numbers]
        batch = data.collate(samples)
        return batch.dropout_keys.tolist(), batch.image_dropout_keys.tolist()

    alone, together = keys([2]), keys([0, 2])
    assert together[0][-len(alone[0]) :] == alone[0] and together[1][-2:] == alone[1]
    everything = [
        k for part in (keys([0, 1, 2, 3]), keys([0], 1), keys([0], 0, 2)) for k in part[0] + part[1]
    ]
    assert len(set(everything)) == len(everything)
    bits = (np.array(keys([0, 1, 2, 3])[0])[:, None] >> np.arange(64)) & 1
    assert 0.3 < bits.mean() < 0.7


def test_jitter_is_deterministic_and_bounded(tmp_path):
    index = index_of(chats(tmp_path, 3, images=lambda n: 1))
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / f"{n}.png")

    def pixels(number, epoch, seed, fraction):
        plan = data.Plan(index, seed, 64)
        return data.load_sample(plan, number, epoch, Processor(), fraction)["pixel_values"][0]

    plain, shaken = pixels(0, 0, 1, 0.0), pixels(0, 0, 1, 0.25)
    assert torch.equal(shaken, pixels(0, 0, 1, 0.25)) and torch.equal(
        plain, Processor().load_image(tmp_path / "0.png")
    )
    assert not torch.equal(shaken, plain)
    assert not torch.equal(shaken, pixels(0, 1, 1, 0.25)) and not torch.equal(shaken, pixels(0, 0, 2, 0.25))


def test_jitter_moves_scales_and_turns_by_at_most_the_fraction():
    fraction, side = 0.1, 64
    y, x = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 2, indexing="ij")

    def blob(cx, cy):
        return torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 18.0)

    image = torch.stack(
        (blob(0, 0), blob(12, 0), torch.zeros(side, side))
    )  # the third one shows the brightness
    seen = []
    for n in range(200):
        shaken = data.jitter(image, fraction, np.random.default_rng(n))
        brightness = shaken[2].mean()
        assert (shaken[2] - brightness).abs().max() < 1e-6 and abs(brightness) <= 0.1
        (cx, cy), (px, py) = (
            [float((c * v).sum() / c.sum()) for v in (x, y)] for c in shaken[:2] - brightness
        )
        seen.append((cx, cy, np.hypot(px - cx, py - cy) / 12, np.arctan2(py - cy, px - cx)))
    cx, cy, scale, angle = np.array(seen).T
    moved = side * fraction * (1 + fraction) * np.sqrt(2)
    for value, bound in ((np.hypot(cx, cy), moved), (1 / scale - 1, fraction), (angle, fraction)):
        assert bound / 2 < np.abs(value).max() < bound * 1.03
        assert bound / 2 < -value.min() or value is not angle  # both ways


def test_cached_features(tmp_path):
    index = index_of(chats(tmp_path, 3, images=lambda n: 1))
    features = {str(tmp_path / f"{n}.png"): np.full((Q, 5), n, np.float32) for n in range(2)}
    plan = data.Plan(index, 0, 64, shuffle=False)
    deal = data.Deal(per_device_batch=3)
    loader = data.TrainLoader(plan, Processor(), range(1), deal, features=features)
    ((_, _, (batch,)),) = loader
    assert batch.pixel_values is None and batch.image_features[:, 0, 0].tolist() == [0, 1]
    assert [reason for _, reason in batch.bad] == [f"no cached features of image {tmp_path}/2.png"]
    with pytest.raises(ValueError, match="image_jitter"):
        data.TrainLoader(plan, Processor(), range(1), image_jitter=0.1, features=features)


# --------------------------------------------------------------------------------------------------
# loader


def damaged_pictures(tmp_path) -> dict:
    """Files that exist but can't be decoded, name -> bytes."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    whole = buffer.getvalue()
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")  # 400 million pixels: PIL itself raises
    files = {
        "truncated.png": whole[:300],
        "empty.png": b"",
        "text.png": b"hello",
        "bomb.png": buffer.getvalue(),
    }
    files["header.png"] = whole[:40] + b"\0" * 50 + whole[90:]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return files


def test_loader_leaves_out_damaged_pictures(tmp_path):
    names = list(damaged_pictures(tmp_path))
    picture(tmp_path / "good.png")
    records = [{"conversations": [[f"<img>{name}</img> q", "a b"]]} for name in [*names, "good.png"]]
    path = write(tmp_path / "a.jsonl", records, lines=True)
    plan = data.Plan(
        index_of(entry("chatml_dataset", path)), 0, 64, shuffle=False
    )  # files exist: all are indexed
    assert len(plan.index) == 6
    loader = data.TrainLoader(plan, Processor(), range(1), data.Deal(per_device_batch=6))
    ((step, epoch, (batch,)),) = loader
    assert [where for where, _ in batch.bad] == [f"{path}:{n}" for n in range(1, 6)]
    assert batch.sample_ids == [f"{path}:6#5"] and batch.pixel_values.shape[0] == 1
    assert all(reason and "\n" not in reason for _, reason in batch.bad)
    only_bad = data.TrainLoader(plan, Processor(), range(1))
    ((_, _, (batch,)),) = only_bad
    assert batch.num_supervised == 0 and len(batch.bad) == 1


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_loader_workers_agree_and_resume(tmp_path):
    index = index_of(chats(tmp_path, 60, images=lambda n: n % 3))

    def run(num_workers, start=0, jitter=0.2):
        plan = data.Plan(index, 3, 32, mixtoken=True)
        deal, total = data.Deal(1, 2, per_device_batch=2, grad_accum=2), plan.total_steps(2, 8)
        loader = data.TrainLoader(plan, Processor(), range(start, total), deal, num_workers, jitter)
        items = list(loader)
        assert [step for step, _, _ in items] == list(range(start, total)) and len(loader) == len(items)
        return items

    reference = run(0)
    assert {epoch for _, epoch, _ in reference} == {0, 1}
    plain = run(0, jitter=0.0)
    assert not equal(plain[0][2][0].pixel_values, reference[0][2][0].pixel_values)
    for got, want in ((run(2), reference), (run(2, 3), reference[3:])):
        assert len(got) == len(want) > 0
        for (step, epoch, batches), (step2, epoch2, batches2) in zip(got, want, strict=True):
            assert (step, epoch, len(batches)) == (step2, epoch2, len(batches2))
            for a, b in zip(batches, batches2, strict=True):
                for field in dataclasses.fields(a):
                    assert equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_dead_worker_is_a_clear_error(tmp_path):
    class Fatal(Processor):
        def load_image(self, path):
            os._exit(9)

    plan = data.Plan(index_of(chats(tmp_path, 4, images=lambda n: 1)), 0, 64)
    with pytest.raises(ValueError, match="a data worker died"):
        list(data.TrainLoader(plan, Fatal(), range(4), num_workers=1))


def test_dead_reader_ends_the_others(tmp_path):
    """Readers leave signals to their parent, and one may wait for what a dead one held."""
    first, survived = tmp_path / "first", tmp_path / "survived"

    class Fatal(Processor):
        def encode(self, conversation, max_length):
            try:
                first.mkdir()
            except FileExistsError:
                time.sleep(30)
                survived.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match="a worker that reads records died"):
        data.build_index([chats(tmp_path, 1001)], Fatal(), 64, None, 2)
    assert not survived.exists()


# --------------------------------------------------------------------------------------------------
# commands


def test_check_and_preview(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_check, "model_directory", lambda *_: "anywhere")
    monkeypatch.setattr(data_check, "load_processor", lambda *_: Processor())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        return data_check.main()

    damaged_pictures(tmp_path)
    picture(tmp_path / "good.png", side=100)
    answer = "<ref>cat</ref><box>(100,200),(500,700)</box>"
    good = [{"conversations": [["<img>good.png</img> q", answer]]}] * 3
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"learning_rate": 1, "dataset": {"train": [chats(tmp_path, 5, "t.jsonl")]}}))
    assert run("check", str(config), "--max_length", "100") == 0
    assert (
        "train: 5 records, 5 samples, 0 images | tokens mean 4.0 max 6, 75.0% supervised"
        in capsys.readouterr().out
    )

    bad = [{"conversations": [["<img>bomb.png</img>", "a"]]}, {"id": 1}]
    path = write(tmp_path / "a.jsonl", [*good, *bad], lines=True)
    dataset = json.dumps({"train": [entry("chatml_dataset", path)]})
    assert run("check", "--dataset", dataset) == 1
    out = capsys.readouterr().out
    assert f"{path}:4: " in out and f"{path}:5: a chat needs one of" in out
    assert "3 samples, 3 images" in out and "2 problems" in out

    out_folder = tmp_path / "drawn"
    good_path = write(tmp_path / "good.jsonl", good, lines=True)
    dataset = json.dumps({"train": [entry("chatml_dataset", good_path)]})
    assert run("preview", "--dataset", dataset, "--packs", "1", "--mixtoken", "--out", str(out_folder)) == 0
    out = capsys.readouterr().out
    assert out.count(f"[image 1: {tmp_path}/good.png, {Q} tokens]") == 3 and "\033[32m" in out
    drawn = np.asarray(Image.open(out_folder / "sample_0.png")).astype(int)
    assert drawn[20, 30].tolist() == [255, 0, 0] and drawn[70, 30].tolist() == [255, 0, 0]  # top, bottom edge
    assert drawn[50, 90].tolist() == [200, 30, 30]
    with pytest.raises(ValueError, match="unknown key 'max_lenght'.*did you mean 'max_length'"):
        run("check", "--max_lenght", "3")


def test_model_directory_and_processor(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tiny checkpoint of model 'qwen'"):
        data.model_directory("qwen", "tiny")
    with pytest.raises(ValueError, match="'qwen-vl/chat' is no directory; download"):
        data.model_directory(None, "qwen-vl/chat")
    assert data.model_directory(None, str(tmp_path)) == str(tmp_path)
    for kind, model in (("blip-2", "blip2"), ("chatglm", "visualglm")):
        real = vlm.find({"model_type": kind})
        loaded = dataclasses.replace(real, load_processor=lambda *args, model=model: (model, *args))
        fake = types.SimpleNamespace(MODEL=loaded)
        monkeypatch.setitem(sys.modules, f"model_{model}", fake)
        monkeypatch.setattr(vlm, "check_complete", lambda *_: None)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        stage = real.stages[-1]
        assert data.load_processor(str(tmp_path), stage) == (model, str(tmp_path), stage)
        with pytest.raises(ValueError, match="stage='other'; expected one of sft, "):
            data.load_processor(str(tmp_path), "other")


def test_requests(tmp_path):
    picture(tmp_path / "a.png")
    records = [
        {"prompt": "What?", "image": "a.png", "id": "x"},
        {"conversations": [["<img>a.png</img> q", "a"]]},
    ]
    found, problems = read_requests(write(tmp_path / "r.jsonl", records, lines=True))
    assert found[0].id == "x" and found[0].turns[0][1][1] == "What?" and not problems
    assert [c.images for c in found] == [[str(tmp_path / "a.png")]] * 2
    assert found[1].where == f"{tmp_path}/r.jsonl:2"


def test_command_line_error_has_no_traceback(tmp_path):
    command = [sys.executable, "data.py", "check", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_preview_without_colours(monkeypatch):
    ids, labels = np.array([5, 6, 7, 8]), np.array([-100, -100, 7, 8])
    sample = {"input_ids": ids, "labels": labels, "image_starts": [], "images": []}
    assert data_check.coloured(sample, Processor()) == "\033[90m5 6\033[0m\033[32m7 8\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert data_check.coloured(sample, Processor()) == "5 6»7 8«"
