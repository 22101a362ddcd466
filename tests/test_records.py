"""Records of other people's files: each shape means the same
conversation; what can't be understood is named."""

import base64
import csv
import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data
import data_check
import records
from images import image_size, open_image
from records import BadRecord, ImageRef, conversations_of, front_image, text_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture()
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (100, 50), colour).save(tmp_path / name)
    return tmp_path


def read(folder, record, **options):
    """The one conversation of a record, through a file."""
    path = folder / "records.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    entry = data.Entry({"data_files": str(path), **options})
    (conversation,) = entry.conversations(0)
    return conversation


def shape(conversation, folder):
    """[(role, [text or image name])]"""
    return [
        (role, [p.source.removeprefix(f"{folder}/") if isinstance(p, ImageRef) else p for p in content])
        for role, content in conversation.turns
    ]


def messages(*texts, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **more}


def llava(*texts, **more):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)], **more}


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


ONE = [("user", ["a.png", "What?"]), ("assistant", ["Red."])]
TWO_TURNS = [
    ("user", ["a.png", "What?"]),
    ("assistant", ["Red."]),
    ("user", ["And ", "b.png", " this?"]),
    ("assistant", ["Blue."]),
]
SAME = {  # shape of a record -> (record, what it means)
    "llava": (llava("<image>What?", "Red.", image="a.png"), ONE),
    "llava, later turn": (
        llava("<image>What?", "Red.", "And <image> this?", "Blue.", image=["a.png", "b.png"]),
        TWO_TURNS,
    ),
    "ms-swift": (messages("<image>What?", "Red.", images=["a.png"]), ONE),
    "ms-swift, objects as paths": (messages("<image>What?", "Red.", images=[{"path": "a.png"}]), ONE),
    "no placeholder": (messages("What?", "Red.", images=["a.png"]), ONE),
    "query": ({"query": "<image>What?", "response": "Red.", "images": ["a.png"]}, ONE),
    "history": (
        {
            "query": "And <image> this?",
            "response": "Blue.",
            "history": [["<image>What?", "Red."]],
            "images": ["a.png", "b.png"],
        },
        TWO_TURNS,
    ),
    "trl": (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            ],
        },
        ONE,
    ),
    "openai": (
        messages(
            [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}], "Red."
        ),
        ONE,
    ),
    "openai, text url": (
        messages([{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "What?"}], "Red."),
        ONE,
    ),
    "images of a turn": (
        {
            "messages": [
                {"role": "user", "content": "What?", "images": ["a.png"]},
                {"role": "assistant", "content": "Red."},
                {"role": "user", "content": "And <image> this?", "image": "b.png"},
                {"role": "assistant", "content": "Blue."},
            ]
        },
        TWO_TURNS,
    ),
    "prompt": ({"prompt": "What?", "completion": "Red.", "image": "a.png"}, ONE),
    "alpaca": (
        {"instruction": "What", "input": "is it?", "output": "Red.", "image": "a.png"},
        [("user", ["a.png", "What\nis it?"]), ("assistant", ["Red."])],
    ),
    "system key": (
        messages("<image>What?", "Red.", images=["a.png"], system="Be brief."),
        [("system", ["Be brief."]), *ONE],
    ),
    "system turn": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *messages("<image>What?", "Red.")["messages"],
            ],
            "image": "a.png",
        },
        [("system", ["Be brief."]), *ONE],
    ),
    "empty system": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                *llava("<image>What?", "Red.")["conversations"],
            ],
            "image": "a.png",
        },
        ONE,
    ),
    "vqa": ({"image": "a.png", "question": "What?", "answer": "Red."}, ONE),
    "vqa with a place": ({"image": "a.png", "question": "<image>What?", "answer": "Red."}, ONE),
    "parts of a table": (
        messages(
            [
                {"type": "image", "text": None, "image": "a.png"},
                {"type": "text", "text": "What?", "image": None},
            ],
            "Red.",
        ),
        ONE,
    ),
    "caption": ({"image": "a.png", "caption": "Red."}, [("user", ["a.png"]), ("assistant", ["Red."])]),
    "huggingface folder": (
        {"file_name": "a.png", "text": "Red."},
        [("user", ["a.png"]), ("assistant", ["Red."])],
    ),
    "visualglm": ({"img": "a.png", "prompt": "What?", "label": "Red."}, ONE),
}


@pytest.mark.parametrize("name", SAME)
def test_a_record_means_what_its_author_meant(folder, name):
    record, expected = SAME[name]
    assert shape(read(folder, record), folder) == expected


@pytest.mark.parametrize("asked", ["query", "instruction", "prompt"])
@pytest.mark.parametrize("replied", ["response", "output", "completion", "answer"])
def test_a_question_and_its_answer_under_any_names(folder, asked, replied):
    record = {asked: "What?", replied: "Red.", "image": "a.png"}
    assert shape(read(folder, record), folder) == [("user", ["a.png", "What?"]), ("assistant", ["Red."])]


def test_facts_and_whole_weights_change_nothing(folder):
    facts = {"imageId": "7", "image_classes": ["x"], "image_caption": "x", "weight": 1, "loss": True}
    assert read(folder, {**_vqa, **facts, "category": "colour"}) == read(folder, _vqa)
    turns = [
        {"role": "user", "content": "q", "loss": False},
        {"role": "assistant", "content": "x", "loss": True},
    ]
    assert shape(read(folder, {"messages": turns}), folder) == [("user", ["q"]), ("assistant", ["x"])]


def test_keys_that_nothing_reads_are_said(folder, capsys):
    path = folder / "t.jsonl"
    turns = [{"role": "user", "content": "q", "mood": "x"}, {"role": "assistant", "content": "x"}]
    records = [_vqa, {**_vqa, "hint": "It is warm.", "answer_type": "other"}, {"messages": turns}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    data.say_unused_keys([data.Entry({"data_files": str(path)})])
    assert capsys.readouterr().err == "note: data:t: keys that are not used: hint, mood (of a turn)\n"
    path.write_text(
        "".join(json.dumps({**_vqa, **({"hint": "x"} if n > 250 else {})}) + "\n" for n in range(500))
    )
    data.say_unused_keys([data.Entry({"data_files": str(path)})])
    assert "not used: hint" in capsys.readouterr().err
    path.write_text(json.dumps(_vqa) + "\n")
    data.say_unused_keys([data.Entry({"data_files": str(path)})])
    assert capsys.readouterr().err == ""


def test_keys_of_requests_that_nothing_reads_are_said(folder, capsys):
    path = folder / "r.jsonl"
    path.write_text('{"prompt": "q", "max_tokens": 5}\n{"prompt": "q", "model": "x"}\n')
    requests, problems = records.read_requests(str(path), ["temperature"])
    assert len(requests) == 2 and not problems
    assert capsys.readouterr().err == f"note: {path}: keys that are not used: max_tokens, model\n"
    path.write_text('{"image": "a.png", "text": "What is this?"}\n')
    assert "a question is 'prompt'" in str(records.read_requests(str(path))[1][0])


def test_a_single_request_has_no_leftovers_either(folder):
    image = str(folder / "a.png")
    turns = [("system", "Be short."), ("user", "<image>What?")]
    asked = records.request(turns, [image], "--prompt")
    assert shape(asked, folder)[1] == ("user", ["a.png", "What?"])
    with pytest.raises(ValueError, match="turn 0 .user. has <image_1>"):
        records.request([("user", "<image_1>What?")], [image], "--prompt")
    with pytest.raises(ValueError, match="an image in the system text"):
        records.request([("system", "<image>"), ("user", "What?")], [image], "--prompt")


def test_data_urls_and_file_urls_are_images(folder):
    url = data_url(folder / "a.png")
    conversation = read(
        folder, messages([{"type": "image_url", "image_url": {"url": url}}, {"text": "What?"}], "Red.")
    )
    assert conversation.images == [url] and open_image(url).getpixel((0, 0)) == (255, 0, 0)
    conversation = read(folder, {"image": (folder / "a.png").as_uri(), "caption": "x"})
    assert conversation.images == [str(folder / "a.png")]


def test_objects_stand_in_their_places(folder):
    record = messages(
        "<image>Where is <ref-object>?",
        "Here: <bbox>",
        images=["a.png"],
        objects={"ref": ["it"], "bbox": [[10, 5, 100, 50]]},
    )
    found = read(folder, record)
    assert text_of(found.turns[0][1]) == "Where is <ref>it</ref>?"
    assert found.answers == ["Here: <box>(100,100),(999,999)</box>"]
    shares = {"bbox": [[0.1, 0.1, 1, 1]], "bbox_type": "norm1"}
    assert read(folder, messages("<image>Where?", "<bbox>", images=["a.png"], objects=shares)).answers == [
        "<box>(100,100),(999,999)</box>"
    ]


BAD = {  # what is wrong -> (record, part of the reason)
    "fewer places": (
        llava("<image>What?", "x", image=["a.png", "b.png"]),
        "2 images, but the text has 1 places",
    ),
    "fewer images": (llava("<image><image>What?", "x", image="a.png"), "1 images, but the text has 2 places"),
    "a place without an image": (llava("<image>What?", "x"), "0 images, but the text has 1 places"),
    "tags and a list": (
        {"conversations": [["<img>a.png</img>What?", "x"]], "image": ["a.png", "b.png"]},
        "the text names other images",
    ),
    "videos": (messages("What?", "x", videos=["a.mp4"]), "'videos' looks like media"),
    "audio": (messages("What?", "x", audios=["a.wav"]), "'audios' looks like media"),
    "unknown image key": (messages("What?", "x", pictures=["a.png"]), "'pictures' looks like media"),
    "unknown key with a file": (messages("What?", "x", file="a.png"), "'file' looks like media"),
    "two image keys": (messages("What?", "x", image="a.png", images=["b.png"]), "both name images"),
    "tools": (messages("What?", "x", tools="[...]"), "'tools' is not supported"),
    "preferences": (messages("What?", "x", rejected="y"), "'rejected' is not supported"),
    "excluded turn": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "loss": False},
            ]
        },
        "excludes it",
    ),
    "unknown role": ({"messages": [{"role": "tool", "content": "q"}]}, "expected a role"),
    "role that is a list": ({"messages": [{"role": ["user"], "content": "q"}]}, "expected a role"),
    "two shapes": (
        {**messages("q", "x"), "conversations": [["q", "x"]]},
        "both 'messages' and 'conversations'",
    ),
    "two answers": (
        {"image": "a.png", "question": "q", "answer": "x", "multiple_choice_answer": "y"},
        "'multiple_choice_answer' 'y'",
    ),
    "two texts of a turn": (
        {"conversations": [{"from": "human", "value": "q", "role": "user", "content": "other"}]},
        "'from' beside 'role' and 'content'",
    ),
    "two systems": (
        {
            "conversations": [{"from": "system", "value": "a"}, *llava("q", "x")["conversations"]],
            "system": "b",
        },
        "two different system texts",
    ),
    "lone surrogate": (messages("q \ud83d", "x"), "lone surrogate"),
    "an invisible character": (messages("<image\u200b>q", "x"), "has <image\\u200b> in its text"),
    "half an id": (messages("q", "x", id="\ud83d"), "its id, source or an answer has a lone surrogate"),
    "half a source": (messages("q", "x", source="\ud83d"), "has a lone surrogate"),
    "half a reference": (
        {"image": "a.png", "question": "q", "answers": ["x", "x", "\ud83d"]},
        "has a lone surrogate",
    ),
    "video part": (messages([{"type": "video", "video": "a.mp4"}], "x"), "neither text nor an image"),
    "url": ({"image": "https://example.org/a.png", "caption": "x"}, "is a URL"),
    "nul": ({"image": "a.png\0", "caption": "x"}, "NUL"),
    "number as image": ({"image": 5, "caption": "x"}, "must be a path"),
    "id": ({"id": {"a": 1}, "image": "a.png", "caption": "x"}, "'id' must be"),
    "nothing known": ({"text": "a"}, "no known kind of record"),
    "box outside": (
        messages("<image>q", "<bbox>", images=["a.png"], objects={"bbox": [[0, 0, 101, 50]]}),
        "does not lie in its image",
    ),
    "box without a place": (
        messages("<image>q", "x", images=["a.png"], objects={"bbox": [[0, 0, 1, 1]]}),
        "the text has 0",
    ),
}
# Keys that say something about what is learned, beside a record that is whole without them
_chat = messages("<image>What?", "Red.", images=["a.png"])
_vqa = {"image": "a.png", "question": "What?", "answer": "Red."}
_caption, _glm = {"image": "a.png", "caption": "Red."}, {"img": "a.png", "prompt": "What?", "label": "Red."}
for _key, _value in {
    "kto_tag": False,
    "negative_messages": [[]],
    "choices": ["Red.", "Blue."],
    "option_a": "Red.",
    "B": "Blue.",
    "mask_history": True,
    "train_on_prompt": True,
    "system_prompt": "Be short.",
    "loss_scale": 0.0,
    "weight": 0.5,
    "history": [["q", "x"]],
    "conversation": [["q", "x"]],
}.items():
    for _name, _record in (("chat", _chat), ("vqa", _vqa), ("caption", _caption), ("glm", _glm)):
        BAD[f"{_key} of a {_name}"] = ({**_record, _key: _value}, _key)
for _key, _value in {"label": False, "answer": "Blue.", "caption": "x", "output": "x", "input": "x"}.items():
    BAD[f"{_key} beside messages"] = ({**_chat, _key: _value}, f"{_key!r} does not go with 'messages'")
BAD["system of a vqa"] = ({**_vqa, "system": "Be short."}, "'system' does not go with 'question', 'answer'")
BAD["system of a caption"] = ({**_caption, "system": "Be short."}, "'system' does not go with 'caption'")
BAD["text of a caption"] = ({**_caption, "text": "Blue."}, "'caption' and 'text' both are captions")
BAD["two answers"] = ({"query": "q", "response": "x", "output": "y"}, "both answer 'query'")
# What other projects write where an image stands, and what stands where none can be
for _word in ("<Image>", "<IMAGE>", "<image >", "<image_1>", "<image 1>", "<|image_1|>", "<ImageHere>"):
    BAD[f"{_word} in a question"] = (llava(f"{_word}\nq", "x", image="a.png"), f"turn 0 (user) has {_word}")
for _word in (
    "<image-placeholder>",
    "<|image_pad|>",
    "<image/>",
    "<video>",
    "<audio>",
    "<video_2>",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "<|vision_start|>",
    "&lt;image&gt;",
):
    BAD[f"{_word} in a question"] = (llava(f"q {_word}", "x"), f"turn 0 (user) has {_word}")
BAD["place in a caption"] = ({**_caption, "caption": "<image> Red."}, "turn 1 (assistant) has <image>")
BAD["tag in a caption"] = ({**_caption, "caption": "<img>b.png</img>x"}, "turn 1 (assistant) has <img>")
BAD["place in an answer"] = ({**_vqa, "answer": "<image>"}, "turn 1 (assistant) has <image>")
BAD["place in a label"] = ({**_glm, "label": "<image>x"}, "turn 1 (assistant) has <image>")
BAD["place in a system"] = ({**_chat, "system": "<image> Look."}, "turn 0 (system) has <image>")
BAD["history that is no list"] = (
    {"query": "q", "response": "x", "history": False},
    "'history' must be a list",
)
BAD["several texts as one"] = ({"query": "q", "response": ["x", "y"]}, "got a list of texts")
BAD["an image for an answer"] = (messages("q", "<image>", images=["a.png"]), "turn 1 (assistant) has no text")
for _value in ("\u200b", "\0", " \ufeff\n"):  # nothing to see
    BAD[f"question {_value!a}"] = (messages(_value, "x"), "turn 0 (user) has no text")
    BAD[f"answer {_value!a}"] = (messages("q", _value), "turn 1 (assistant) has no text")
    BAD[f"vqa {_value!a}"] = ({"image": "a.png", "question": "q", "answer": _value}, "no answer")
    BAD[f"caption {_value!a}"] = ({"image": "a.png", "caption": _value}, "'caption' must be a text")
    BAD[f"label {_value!a}"] = ({"img": "a.png", "prompt": "q", "label": _value}, "'label' must be a text")
for _value in (True, None, {}, [], "", float("nan")):
    BAD[f"vqa answer {_value!r}"] = ({"image": "a.png", "question": "q", "answer": _value}, "answer")
    BAD[f"vqa answers [{_value!r}]"] = ({"image": "a.png", "question": "q", "answers": [_value]}, "answer")
for _value in (True, None, 5, {}, float("nan"), " "):
    BAD[f"label {_value!r}"] = ({"img": "a.png", "prompt": "q", "label": _value}, "")
    BAD[f"chat answer {_value!r}"] = (messages("q", _value), "turn 1")
    BAD[f"response {_value!r}"] = ({"query": "q", "response": _value}, "")
    BAD[f"caption {_value!r}"] = ({"image": "a.png", "caption": _value}, "")


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_says_something_else_is_named(folder, name):
    record, reason = BAD[name]
    with pytest.raises(BadRecord) as e:
        read(folder, record)
    assert e.value.where == f"{folder}/records.jsonl:1" and reason in e.value.reason
    assert len(e.value.reason) <= 300 and "\n" not in e.value.reason


def test_numbers_of_a_vqa_file_are_text(folder):
    record = {
        "image": "a.png",
        "question": "How many?",
        "answer": 2,
        "answers": [{"answer": 2}, {"answer": "3"}, 1.50, 1e3],
    }
    (folder / "records.jsonl").write_text(json.dumps(record).replace("1.5", "1.50").replace("1000.0", "1e3"))
    assert entry_of(folder / "records.jsonl")[0][0].answers == ["2", "3", "1.50", "1e3"]


def test_no_message_repeats_a_data_url(folder):
    url = "data:image/png;base64," + "A" * 100_000
    with pytest.raises(ValueError) as e:
        open_image(url)
    assert len(str(e.value)) < 400
    with pytest.raises(BadRecord) as e:
        read(folder, messages([{"type": "image_url", "image_url": {"url": url, "more": url}}], "x"))
    assert len(str(e.value)) < 400 + len(str(folder))


# ------------------------------------------------------------------------------------------------
# files


def entry_of(path, **settings):
    entry = data.Entry({"data_files": str(path), **settings})
    found, bad = [], []
    for i in range(len(entry)):
        try:
            found += entry.conversations(i)
        except BadRecord as e:
            bad.append((e.where, e.reason))
    return found, bad


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables(folder, suffix, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows(
        [
            ["image", "question", "answer", "answers"],
            ["a.png", 'a "quoted",\nlong one?', "2", ""],  # what follows ends no line of a file
            ["a.png", "q\u2028\x0b\x85\x1ctail", "2", ""],
            ["b.png", "q", "", '["x", "y", "y"]'],
            ["a.png", "q"],
            ["a.png", "q", "", ""],
            ["gone.png", "q", "x", ""],
            ["a.png", "q", "x", "", "a comma too many"],
            ["a.png", "q", "", "['x', 'y']"],
            ["a.png", "q", "[sic] x", ""],
        ]
    )
    path = folder / f"t{suffix}"
    path.write_text("\ufeff" + text.getvalue(), encoding="utf-8")
    found, bad = entry_of(path)
    asked = ['a "quoted",\nlong one?', "q\u2028\x0b\x85\x1ctail", "q", "q"]
    assert [text_of(c.turns[0][1]) for c in found] == asked
    assert [c.turns[1][1] for c in found] == [["2"], ["2"], ["y"], ["[sic] x"]]
    assert found[2].answers == ["x", "y", "y"]
    assert [where for where, _ in bad] == [f"{path}:{n}" for n in (6, 7, 8, 9, 10)] and "2 cells" in bad[0][1]
    assert "5 cells" in bad[3][1] and "'answers' looks like JSON" in bad[4][1]
    if suffix == ".tsv":
        path.write_text('image\tcaption\na.png\t"one\nb.png\ttwo"\n')
        assert "is not closed in it?" in entry_of(path)[1][0][1]
    path.write_text(f"image{delimiter} question{delimiter} answer\na.png{delimiter} q?{delimiter} red one\n")
    ((question, (_, answer)),) = [c.turns for c in entry_of(path)[0]]
    assert (text_of(question[1]), answer) == ("q?", ["red one"])
    path.write_text(f"foo{delimiter}bar\n1{delimiter}2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path}:1: the header .* names no known column"):
        data.Entry({"data_files": str(path)})


def test_a_folder_of_captioned_images(folder, capsys):
    (folder / "a.txt").write_text("one\r\n\ntwo\u2028tail\n", encoding="utf-8")
    (folder / "lost.txt").write_text("x", encoding="utf-8")
    (folder / ".cache").mkdir()
    for name in ("a.png", "a.txt"):
        shutil.copy(folder / name, folder / ".cache")
    (folder / "linked").symlink_to(folder / ".cache")
    found, bad = entry_of(folder)
    assert [(c.images, c.turns[1][1]) for c in found] == [
        ([str(folder / "a.png")], [t]) for t in ("one", "two\u2028tail")
    ]
    assert found[0].answers == ["one", "two\u2028tail"]
    assert sorted(where for where, _ in bad) == [f"{folder}/b.png", f"{folder}/lost.txt"]
    assert "1 linked folders in it are not looked into" in capsys.readouterr().err
    (folder / "b.txt").write_text(" \n")
    assert "b.txt is empty" in dict(entry_of(folder)[1])[f"{folder}/b.png"]
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    assert len(entry_of(folder)[0]) == 1
    said = capsys.readouterr().err
    assert "3 .txt files are not used" in said and "metadata.jsonl describes 1 of its 2 images" in said
    (folder / "metadata.csv").write_text("file_name,text\na.png,y\n")
    with pytest.raises(ValueError, match="has both metadata.jsonl and metadata.csv"):
        entry_of(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without images"):
        data.Entry({"data_files": str(folder / "empty")})


def test_dataset_of_text(folder):
    assert data.dataset_of("a.jsonl,b.jsonl") == {
        "train": [{"data_files": "a.jsonl"}],
        "eval": [{"data_files": "b.jsonl"}],
    }
    (folder / "x,y.jsonl").write_text("{}")
    assert data.dataset_of(str(folder / "x,y.jsonl")) == {
        "train": [{"data_files": str(folder / "x,y.jsonl")}]
    }
    with pytest.raises(ValueError, match="expected FILE or FILE,EVAL_FILE"):
        data.dataset_of("a,b,c")


def test_eval_split_parts_the_records_by_their_content(folder):
    lines = [json.dumps(messages(f"q{n}", "x")) for n in range(400)]

    def parts(lines):
        path = folder / "all.jsonl"
        path.write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
        dataset = data.hold_out({"train": [{"data_files": str(path)}]}, 0.1)
        out = {
            split: entry_of(path, **{k: v for k, v in dataset[split][0].items() if k != "data_files"})
            for split in dataset
        }
        return {split: {text_of(c.turns[0][1]) for c in found} for split, (found, _) in out.items()}, out

    found, whole = parts(lines)
    assert (
        found["train"] | found["eval"] == {f"q{n}" for n in range(400)} and not found["train"] & found["eval"]
    )
    assert 20 <= len(found["eval"]) <= 60
    assert parts(lines[::-1])[0] == found  # whatever their order
    fewer = parts(lines[:200])[0]  # and whatever else the file holds
    assert fewer["eval"] == found["eval"] & {f"q{n}" for n in range(200)}
    assert len(whole["train"][1]) == 1 and not whole["eval"][1]  # a broken line is named once


def test_files_that_do_not_belong_together_are_refused(folder):
    ask = [{"question_id": 1, "image_id": 5, "question": "q"}]
    pairs = {
        "have no question": [{"question_id": q, "image_id": 5, "answers": [{"answer": "x"}]} for q in (1, 2)],
        "is about image 5": [{"question_id": 1, "image_id": 6, "answers": [{"answer": "x"}]}],
        "two annotations": [{"question_id": 1, "image_id": 5, "answers": []}] * 2,
    }
    (folder / "q.json").write_text(json.dumps({"questions": ask}))
    for message, annotations in pairs.items():
        (folder / "n.json").write_text(json.dumps({"annotations": annotations}))
        with pytest.raises(ValueError, match=message):
            data.Entry({"data_files": [str(folder / "q.json"), str(folder / "n.json")]})
    (folder / "q.json").write_text(json.dumps({"questions": [{**ask[0], "image_id": "five"}]}))
    (folder / "n.json").write_text(
        json.dumps({"annotations": [{**pairs["two annotations"][0], "image_id": "five"}]})
    )
    with pytest.raises(ValueError, match="q.json: image_id='five' is no number"):
        data.Entry({"data_files": [str(folder / "q.json"), str(folder / "n.json")]})
    (folder / "q.json").write_text(json.dumps({"questions": ask * 2}))
    (folder / "n.json").write_text(json.dumps({"annotations": pairs["two annotations"][:1]}))
    with pytest.raises(ValueError, match="two questions have question_id=1"):
        data.Entry({"data_files": [str(folder / "q.json"), str(folder / "n.json")]})
    twice = [{"id": 5, "file_name": name} for name in ("a.png", "b.png")]
    (folder / "q.json").write_text(json.dumps({"questions": ask, "images": twice}))
    with pytest.raises(ValueError, match="q.json: two images have one id"):
        data.Entry({"data_files": [str(folder / "q.json"), str(folder / "n.json")]})
    captions = [{"image_id": "1", "caption": "x"}]
    images = [{"id": 1, "file_name": "a.png"}]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    with pytest.raises(ValueError, match="c.json: a caption is of image_id='1', which is no id"):
        data.Entry({"data_files": str(folder / "c.json")})


def test_where_all_records_are_bad_the_first_is_said(folder):
    (folder / "r.jsonl").write_text('{"image": "gone.png", "caption": "x"}\n' * 2)
    with pytest.raises(
        ValueError, match="none of the 2 records .* is usable; .*r.jsonl:1: image gone.png not found"
    ):
        processor = data.load_processor(data.model_directory("qwen_vl", "tiny"))
        data.build_index([{"data_files": str(folder / "r.jsonl")}], processor, 512, None, max_bad_samples=1.0)


def test_a_text_that_looks_like_a_missing_value_is_noted(folder):
    (folder / "r.jsonl").write_text(
        '{"image": "a.png", "caption": "NaN"}\n{"image": "a.png", "caption": "no"}\n'
    )
    processor = data.load_processor(data.model_directory("qwen_vl", "tiny"))
    index = data.build_index([{"data_files": str(folder / "r.jsonl")}], processor, 512, None)
    notes = [note for _, note in data_check.odd_samples(index, processor) if "missing" in note]
    assert notes == ["the assistant's text is 'NaN': a missing value?"]


@pytest.mark.parametrize(
    "kind, token", [("qwen_vl", "<|im_end|>"), ("visualglm", "<sop>"), ("blip2", "</s>")]
)
def test_what_is_read_in_another_way_than_it_looks_is_noted(folder, kind, token):
    ImageDraw.Draw(image := Image.new("RGB", (9, 9))).point((1, 1), "red")
    image.save(folder / "a.png")
    records = [
        messages(f"<image>q {token}", "x", images=["a.png"]),
        messages("<image>q", "x\ny", images=["a.png"]),
        {"image": "a.png", "question": "q", "answer": "x", "answers": ["y", "z"]},
        {"image": "a.png", "question": "q", "answer": "X", "answers": ["x", "z"]},
        messages("<image><ref>q", "<ref>x</ref><box>(1,2),(3,4)</box>", images=["a.png"]),
    ]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    processor = data.load_processor(data.model_directory(kind, "tiny"))
    index = data.build_index([{"data_files": str(folder / "r.jsonl")}], processor, 512, None)
    assert [(where[-1], note) for where, note in data_check.odd_samples(index, processor)] == [
        ("1", f"the user's text has {token}, a special token of this model"),
        *[("2", "an answer goes on behind '\\n', where this model's answers end")] * (kind == "blip2"),
        ("3", "the answer 'x' is none of those that it is scored by"),
        ("5", "the tags <ref> and </ref> don't match"),
    ]
    moved = [where[-1] for where, note in data_check.odd_samples(index, processor, 0.1) if "jitter" in note]
    assert moved == ["5"]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b'{"query": "q", "response": "x", "response": "y"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": ',
        b"5",
        b"null",
    ],
)
def test_a_bad_line_costs_itself_only(folder, line):
    good = json.dumps(messages("q", "x")).encode()
    (folder / "l.jsonl").write_bytes(b"\n".join([good, line, good]))
    found, bad = entry_of(folder / "l.jsonl")
    assert len(found) == 2 and [where for where, _ in bad] == [f"{folder}/l.jsonl:2"]


def test_a_document_under_the_name_of_lines(folder):
    records = [messages("q", str(n)) for n in range(3)]
    (folder / "d.jsonl").write_text(json.dumps(records, indent=1))
    found, bad = entry_of(folder / "d.jsonl")
    assert [c.answers for c in found] == [["0"], ["1"], ["2"]] and not bad
    (folder / "u.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-16")
    found, bad = entry_of(folder / "u.jsonl")
    assert not found and all("UTF-16" in reason for _, reason in bad)


# ------------------------------------------------------------------------------------------------
# images


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return np.asarray(open_image(folder / name), np.int64)


def test_more_than_eight_bits_are_scaled_by_their_range(folder):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = saved(folder, "i8.png", Image.fromarray((ramp >> 8).astype(np.uint8)))
    for name, array in (
        ("i16.png", ramp),
        ("i32.tiff", ramp.astype(np.int32)),
        ("unit.tiff", (ramp / 65535).astype(np.float32)),
        ("f255.tiff", (ramp / 257).astype(np.float32)),
        ("wide.tiff", (ramp / 100 - 300).astype(np.float32)),
    ):
        assert np.abs(saved(folder, name, Image.fromarray(array)) - expected).max() <= 1, name

    def retold(array, tag, told, meant, old=b"", new=b""):
        Image.fromarray(array).save(folder / "x.tiff")
        (folder / "x.tiff").write_bytes((folder / "x.tiff").read_bytes().replace(old, new))
        old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (told, meant))
        content = (folder / "x.tiff").read_bytes()
        assert content.count(old) == 1
        (folder / "x.tiff").write_bytes(content.replace(old, new))
        return np.asarray(open_image(folder / "x.tiff"), np.int64)

    unsigned = retold((ramp.astype(np.uint32) << 16).view(np.int32), 339, 2, 1)
    assert np.abs(unsigned - expected).max() <= 1
    a, b = (ramp >> 4)[:, ::2], (ramp >> 4)[:, 1::2]  # of 12 bits: two pixels in three bytes
    packed = np.stack((a >> 4, (a & 15) << 4 | b >> 8, b & 255), -1).astype(np.uint8).tobytes()
    twelve = retold(ramp, 258, 16, 12, ramp.tobytes(), packed.ljust(ramp.nbytes))
    assert np.abs(twelve - expected).max() <= 1
    zero_is_white = retold(ramp, 262, 1, 0)
    assert np.abs(zero_is_white - (255 - expected)).max() <= 1
    exif = Image.Exif()
    exif[274] = 6
    turned = saved(folder, "turned.png", Image.fromarray(ramp), exif=exif, transparency=int(ramp[0, 0]))
    assert (turned[0, -1] == 255).all() and np.abs(turned - np.rot90(expected, -1)).max(2).ravel()[
        64:
    ].max() <= 1
    with pytest.raises(ValueError, match="NaN or infinity"):
        saved(folder, "nan.tiff", Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_images_are_upright_and_on_white(folder):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    turned = saved(folder, "turned.png", image, exif=exif)
    assert (
        turned.shape == (64, 32, 3)
        and turned[0, 0].tolist() == [0, 0, 255]
        and turned[-1, 0].tolist() == [255, 0, 0]
    )
    for name in ("turned.png", "turned.jpg", "turned.webp", "turned.tiff"):  # boxes are in these pixels
        saved(folder, name, image, exif=exif)
        assert image_size(str(folder / name)) == open_image(folder / name).size == (32, 64), name
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    for name, image, options in (
        ("rgba.png", clear, {}),
        ("la.png", clear.convert("LA"), {}),
        ("p.png", palette, {"transparency": 0}),
        ("rgb.png", Image.new("RGB", (8, 8)), {"transparency": (0, 0, 0)}),
    ):
        assert (saved(folder, name, image, **options) == 255).all(), name


def test_eight_bit_rgb_is_untouched(folder):
    array = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    assert (saved(folder, "rgb.png", Image.fromarray(array)) == array).all()


def test_front_image():
    a, worded = ImageRef("a"), ImageRef("a", ("Picture 1: ", "\n"))
    assert front_image([a, "\nWhat?"]) == front_image(["What?\n", a]) == (a, "What?")
    assert front_image([worded, "\nWhat?"]) == (worded, "\nWhat?")
    assert front_image(["What?"]) == (None, "What?")
    for content in ([a, a], ["Look at ", a, " now"]):
        with pytest.raises(ValueError):
            front_image(content)


_it = {"ref": ["it"], "bbox": [[1, 1, 9, 9]]}


def test_requests_take_any_record_and_no_option(folder):
    lines = [
        {"prompt": "q", "image": "a.png"},
        {"question": "q", "image": "a.png"},
        {**messages("q", "x", "r"), "id": 7},
        {"prompt": "q", "temperature": 1},
        {"prompt": "q", "image": "gone.png"},
        messages("<image>Where is <ref-object>?", "<bbox>", images=["a.png"], objects=_it),
    ]
    path = folder / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found, problems = records.read_requests(str(path), ["temperature"])
    assert [c.kind for c in found] == ["chat", "vqa", "chat", "chat"]
    assert text_of(found[3].turns[0][1]) == "Where is <ref>it</ref>?"
    assert found[2].turns[-1] == ("user", ["r"]) and found[2].id == "7"
    assert [p.where for p in problems] == [f"{path}:4", f"{path}:5"]


def test_conversations_of_names_no_place_itself():
    with pytest.raises(ValueError, match="^expected an object"):
        conversations_of(5, "f:1", "", 0)


# ------------------------------------------------------------------------------------------ each model's own
# wording

SYSTEM = {"system": "Be brief."}
TWO_IMAGES = {**llava("<image>\nWhat?", "Red.", "<image>\nAnd?", "Blue.", image=["a.png", "b.png"]), **SYSTEM}
WORDED = {"conversations": [["Picture 7: <img>a.png</img>What?", "Red."]]}
WORDING = {  # (model, stage, record) -> its text; slots are left out
    "qwen_vl chat": (
        "qwen_vl",
        "sft",
        TWO_IMAGES,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nPicture 1: <img></img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\nPicture 2: <img></img>\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nBlue.<|im_end|>\n",
    ),
    "qwen_vl, the author's own words": (
        "qwen_vl",
        "sft",
        WORDED,
        "<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\nPicture 7: <img></img>What?"
        "<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n",
    ),
    "qwen_vl raw": (
        "qwen_vl",
        "pretrain",
        TWO_IMAGES,
        "Be brief.\n<img></img>What?Red.<|endoftext|><img></img>And?Blue.<|endoftext|>",
    ),
    "visualglm": (
        "visualglm",
        "sft",
        {**llava("What?\n<image>", "Red.", "And?", "Blue.", image="a.png"), **SYSTEM},
        "<img> </img>问:Be brief.\nWhat?\n答:Red.\n问:And?\n答: Blue.",
    ),
    "visualglm, the author's own words": ("visualglm", "sft", WORDED, "<img> </img>问:What?\n答: Red."),
    "blip2": (
        "blip2",
        "sft",
        {**llava("<image>\nwhat is it?", "a bus", image="a.png"), **SYSTEM},
        "Be brief. what is it? a bus\n",
    ),
}


@pytest.mark.parametrize("name", WORDING)
def test_a_model_words_a_record_in_its_own_way(folder, name):
    model, stage, record, expected = WORDING[name]
    processor = data.load_processor(str(ROOT / f"samples/tiny_{model}"), stage)
    conversation = read(folder, record)
    sample, prompt = processor.encode(conversation, 512), processor.prompt(conversation)
    slots = {s + n for s in sample["image_starts"] for n in range(processor.num_image_tokens)}
    slots = set() if model == "qwen_vl" else slots  # its tokenizer takes a whole tag back
    ids = [int(token) for n, token in enumerate(sample["input_ids"]) if n not in slots]
    assert processor.tokenizer.decode(ids) == expected
    assert [Path(source).name for source in sample["images"]] == ["a.png", "b.png"][: len(sample["images"])]
    # what is learned is what will be asked: the prompt is its beginning, the answer is the rest
    fillers = {s + n for s in sample["image_starts"] for n in range(processor.num_image_tokens)}
    pairs = enumerate(zip(prompt["input_ids"].tolist(), sample["input_ids"].tolist(), strict=False))
    assert all(a == b or n in fillers for n, (a, b) in pairs)
    assert (sample["labels"][len(prompt["input_ids"]) :] != data.IGNORE).all()


# ------------------------------------------------------------------------------------------------ a
# newcomer's commands


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, kind",
    [
        ("qwen_vl", "llava"),
        ("visualglm", "ms-swift"),
        ("blip2", "llama-factory"),
        ("visualglm", "csv"),
        ("blip2", "folder"),
    ],
)
def test_own_data_from_preview_to_merge(tmp_path, model, kind):
    """preview, train, evaluate by the adapter's own data, merge: no configuration file and no name of a
    format."""
    lines = (ROOT / "samples/flags_zh/train.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    records = [json.loads(line) for line in lines]
    (tmp_path / "folder").mkdir()
    for n, r in enumerate(records):
        for place in (tmp_path, tmp_path / "folder"):
            shutil.copy(ROOT / "samples" / r["image"], place / f"{n}.png")
        (tmp_path / f"folder/{n}.txt").write_text(r["answers"][0], encoding="utf-8")
    chats = [("<image>\n" + r["question"], r["answers"][0]) for r in records]
    files = {
        "llava": [llava(*c, image=f"{n}.png") for n, c in enumerate(chats)],
        "ms-swift": [messages(*c, images=[f"{n}.png"]) for n, c in enumerate(chats)],
        "llama-factory": [messages(*c, images=[f"{n}.png"], system="Be brief.") for n, c in enumerate(chats)],
    }
    path = tmp_path / {"csv": "t.csv", "folder": "folder"}.get(kind, "records.json")
    if kind in files:
        path.write_text(json.dumps(files[kind]), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            rows = [(f"{n}.png", r["question"], r["answers"][0]) for n, r in enumerate(records)]
            csv.writer(file).writerows([("image", "question", "answer"), *rows])

    def run(script, *arguments):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dataset = json.dumps({split: [{"data_files": str(path)}] for split in ("train", "eval")})
    shown = run("data.py", "preview", "--model", model, "--dataset", path, "--packs", 6, "--num_workers", 0)
    assert all(f"{n}.png, " in shown for n in range(6)) and "<image>" not in shown
    assert all(
        f"\033[32m{r['answers'][0][0]}" in shown.replace("[32m ", "[32m") for r in records
    )  # supervised
    options = ("--max_steps", 2, "--learning_rate", 1e-2, "--num_workers", 0, "--output_dir", "out")
    run("train.py", "--model", model, "--lora", "--dataset", dataset, *options)
    assert "scores of " in run("evaluate.py", "--lora_path", "out", "--max_new_tokens", 2)
    run("merge.py", "--lora_path", "out", "--merge_model_path", "merged")
