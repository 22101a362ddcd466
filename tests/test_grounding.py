"""Boxes from COCO, VOC, RefCOCO and ms-swift files to Acc@0.5: what is read, refused, scored; goldens are
computed by hand, and pushed through the command."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from ranks import run
from small import arguments
from test_evaluate import results, says, write  # noqa: F401  (a fixture)
from test_records import messages

import data
import data_check
import evaluate
import metrics
import train
import vlm
from records import BadRecord
from runs import make_grounding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def street(tmp_path):
    """A folder with one image, 200 x 100."""
    Image.new("RGB", (200, 100), "white").save(tmp_path / "street.png")
    return tmp_path


def entry(folder, name: str, content) -> data.Entry:
    write(folder / name, content)
    return data.Entry({"data_files": str(folder / name)})


def coco(annotations: list[dict], **image) -> dict:
    return {
        "images": [{"id": 5, "file_name": "street.png", "width": 200, "height": 100, **image}],
        "annotations": [{"id": n, "image_id": 5, "category_id": 1, **a} for n, a in enumerate(annotations)],
        "categories": [{"id": 1, "name": "bus"}, {"id": 2, "name": "dog"}],
    }


VOC = """<annotation><filename>street.png</filename>
<size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>bus</name><difficult>0</difficult>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>120</xmax><ymax>60</ymax></bndbox>
<part><name>wheel</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
</annotation>"""
BUS = "<box>(100,100),(600,600)</box>"  # (20, 10) to (120, 60) of 200 x 100
FILES = {
    "coco": ("a.json", coco([{"bbox": [20, 10, 100, 50], "iscrowd": 0}])),
    "voc": ("a.xml", VOC),
    "refcoco": (
        "a.jsonl",
        {"image": "street.png", "sent": "bus", "bbox": [20, 10, 120, 60], "width": 200, "height": 100},
    ),
    "boxes": ("a.jsonl", {"image": "street.png", "ref": "bus", "bbox": [[20, 10, 120, 60]]}),
    "csv": ("a.csv", 'image,ref,bbox\nstreet.png,bus,"[20, 10, 120, 60]"\n'),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_file_means_the_same(street, kind):
    (bus,) = entry(street, *FILES[kind]).conversations(0)
    assert bus.kind == "grounding" and bus.images == [str(street / "street.png")]
    assert bus.turns[0][1][1:] == ["<ref>bus</ref>"] and bus.turns[1] == ("assistant", [BUS])
    assert bus.answers == ["<box>(20,10),(120,60)</box> of 200x100"]


def test_coco_has_all_of_a_class_and_no_crowd(street, capsys):
    boxes = [[0, 0, 10, 10], [20, 20, 20, 20], [0, 0, 200, 100], [190, 90, 10.3, 10]]
    more = [{"category_id": 1}, {"category_id": 2}, {"iscrowd": 1}, {"category_id": 1}]
    found = entry(street, "a.json", coco([{"bbox": b, **m} for b, m in zip(boxes, more, strict=True)]))
    assert [found.conversations(n)[0].turns[1][1][0] for n in range(len(found))] == [
        "<box>(0,0),(50,100)</box><box>(950,900),(999,999)</box>",  # a third of a pixel beyond is cut off
        "<box>(100,200),(200,400)</box>",
    ]
    assert "1 boxes of crowds" in capsys.readouterr().err


def test_a_folder_of_voc_files(street, capsys):
    (street / "Annotations").mkdir()
    write(street / "Annotations/a.xml", VOC)
    write(street / "Annotations/b.xml", VOC.replace("<name>bus</name>", "<name>dog</name>"))
    write(street / "Annotations/c.xml", "<annotation>")
    write(street / "Annotations/d.xml", VOC[: VOC.index("<object>")] + "</annotation>")
    found = data.Entry({"data_files": str(street / "Annotations"), "image_root": str(street)})
    assert len(found) == 3 and found.conversations(1)[0].turns[0][1][1] == "<ref>dog</ref>"
    with pytest.raises(BadRecord, match=r"c\.xml: not a VOC annotation"):
        found.conversations(2)
    assert "1 of 4 such files annotate no object" in capsys.readouterr().err
    for part in "ab":  # each file's image stands beside it
        (street / part).mkdir()
        Image.new("RGB", (200, 100)).save(street / part / "street.png")
        write(street / part / "street.xml", VOC)
    (street / "Annotations/c.xml").unlink()
    found = data.Entry({"data_files": str(street)})
    images = {
        found.conversations(n)[0].images[0] for n in range(len(found)) if "Annotations" not in found.where(n)
    }
    assert images == {str(street / part / "street.png") for part in "ab"}


BAD = {
    "outside": (FILES["boxes"][1] | {"bbox": [20, 10, 201, 60]}, "does not lie in its image of 200x100"),
    "turned": (FILES["boxes"][1] | {"bbox": [120, 10, 20, 60]}, "does not lie in its image"),
    "negative": (FILES["boxes"][1] | {"bbox": [-2, 10, 20, 60]}, "does not lie in its image"),
    "empty": (FILES["boxes"][1] | {"bbox": [20, 10, 20, 60]}, "has no area"),
    "three": (FILES["boxes"][1] | {"bbox": [20, 10, 20]}, "must be four numbers"),
    "text": (FILES["boxes"][1] | {"bbox": "20 10 30 60"}, "must be four numbers"),
    "truth": (FILES["boxes"][1] | {"bbox": [True, 10, 20, 60]}, "must be four numbers"),
    "nan": (FILES["boxes"][1] | {"bbox": [float("nan"), 10, 20, 60]}, "must be four numbers"),
    "none": (FILES["boxes"][1] | {"bbox": []}, "no known kind|no box"),
    "another size": (FILES["refcoco"][1] | {"width": 640, "height": 480}, "its image has 200x100"),
    "two names": (FILES["boxes"][1] | {"sent": "dog"}, "one name"),
    "a tag": (FILES["boxes"][1] | {"ref": "bus</ref>"}, "holds a tag"),
    "two kinds": (FILES["boxes"][1] | {"caption": "x"}, "'caption' does not go with"),
    "no image": ({"ref": "bus", "bbox": [1, 2, 3, 4]}, "one image"),
    "coco outside": (coco([{"bbox": [150, 10, 60, 50]}]), "does not lie in its image"),
    "coco turned": (coco([{"bbox": [50, 10, -20, 50]}]), "does not lie in its image"),
    "entity": ('<!DOCTYPE a [<!ENTITY b "c">]>' + VOC, "document type"),
    "shares": (FILES["boxes"][1] | {"bbox": [[0.1, 0.1, 0.6, 1.0]]}, "shares of the image's sides"),
    "coco shares": (coco([{"bbox": [0.1, 0.1, 0.5, 0.5]}]), "shares of the image's sides"),
    "no corner": (VOC.replace("<xmin>21</xmin>", ""), "not a VOC annotation: no bndbox/xmin in its <object>"),
    "voc outside": (VOC.replace("<xmax>120", "<xmax>220"), "does not lie in its image"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_box_is_a_named_bad_record(street, case):
    content, said = BAD[case]
    name = "a.xml" if isinstance(content, str) else "a.json" if "images" in content else "a.jsonl"
    with pytest.raises(BadRecord, match=said) as error:
        entry(street, name, content).conversations(0)
    assert str(street) in str(error.value) and "\n" not in str(error.value)


def test_an_annotation_of_nothing_is_refused(street):
    for change in ({"image_id": 6}, {"category_id": 3}):
        with pytest.raises(ValueError, match="is no id there"):
            entry(street, "a.json", coco([{"bbox": [0, 0, 1, 1], **change}]))


@pytest.mark.parametrize("kind", ["qwen_vl", "blip2", "visualglm"])
def test_a_model_without_a_form_for_boxes_refuses(street, kind):
    processor = vlm.find(json.loads((ROOT / f"samples/tiny_{kind}/config.json").read_text())).processor(
        ROOT / f"samples/tiny_{kind}"
    )
    swift = messages("<image>Where?", "<bbox>", images=["street.png"], objects={"bbox": [[0, 0, 9, 9]]})
    for content in (FILES["boxes"][1], swift):
        (conversation,) = entry(street, "a.jsonl", content).conversations(0)
        if kind == "qwen_vl":
            text = processor.tokenizer.decode(processor.encode(conversation, 512)["input_ids"].tolist())
            assert re.search(r"<box>\(\d+,\d+\),\(\d+,\d+\)</box>", text)
            continue
        for ask in (lambda c: processor.encode(c, 512), processor.prompt):
            with pytest.raises(ValueError, match="has no form for boxes"):
                ask(conversation)


def test_the_published_prompt(street):
    """<img>..</img><ref>..</ref><box> of the base model; its training text goes on from there."""
    processor = data.load_processor(ROOT / "samples/tiny_qwen_vl", "pretrain")
    (bus,) = entry(street, *FILES["boxes"]).conversations(0)
    asked, tokens = processor.prompt(bus)["input_ids"], processor.encode(bus, 512)["input_ids"]
    assert processor.tokenizer.decode(asked[-4:].tolist()).endswith("<box>")
    assert tokens[: len(asked)].tolist() == asked.tolist()


def test_images_may_not_move_under_their_boxes(street, tmp_path):
    write(street / "a.json", FILES["coco"][1])
    dataset = {"train": [{"data_files": str(street / "a.json")}]}
    argv = arguments(
        ROOT / "samples/tiny_qwen_vl", dataset, tmp_path / "out", image_jitter=0.1, max_length=512
    )
    with pytest.raises(ValueError, match=r"image_jitter=0\.1 moves images, but not the boxes in .*a\.json"):
        train.main(argv)
    processor = data.load_processor(ROOT / "samples/tiny_qwen_vl")
    plan = data.Plan(data.build_index(dataset["train"], processor, 512, None), 0, 512)
    with pytest.raises(BadRecord, match="image_jitter moves images, but not the boxes in its text"):
        data.load_sample(plan, 0, 0, processor, image_jitter=0.1)


# --------------------------------------------------------------------------------------------------
# scores: by hand

BOXES = {  # answer, reference, IoU
    "same": ("(0,0),(999,999)", "<box>(0,0),(200,100)</box> of 200x100", 1.0),
    "half": ("<ref>bus</ref><box>(0,0),(999,999)</box>", "<box>(0,0),(100,100)</box> of 200x100", 0.5),
    "less": ("(0,0),(999,999)", "<box>(0,0),(99,100)</box> of 200x100", 0.495),
    # (0,0)-(100,100) and (50,50)-(150,100): 50*50 / (10000 + 5000 - 2500)
    "corner": ("(0,0),(499.5,999)", "<box>(50,50),(150,100)</box> of 200x100", 0.2),
    "apart": ("(0,0),(99,99)", "<box>(100,50),(150,100)</box> of 200x100", 0.0),
    "best of two": ("(0,0),(999,999)", "<box>(0,0),(1,1)</box><box>(0,0),(160,100)</box> of 200x100", 0.8),
    "first of two": ("(0,0),(99,99)(0,0),(999,999)", "<box>(100,50),(200,100)</box> of 200x100", 0.0),
    "of a chat": ("(0,0),(999,999)", "It is <box>(0,0),(999,333)</box>", 1 / 3),
    "turned": ("(999,999),(0,0)", "<box>(0,0),(200,100)</box> of 200x100", 0.0),
    "no box": ("no bus", "<box>(0,0),(200,100)</box> of 200x100", 0.0),
    "three and one": ("(0,0,999),(999)", "<box>(0,0),(200,100)</box> of 200x100", 0.0),
    "words": ("(a,b),(c,d)", "<box>(0,0),(200,100)</box> of 200x100", 0.0),
    "infinite": ("(0,0),(inf,nan)", "<box>(0,0),(200,100)</box> of 200x100", 0.0),
}
ANSWERS = {  # metric -> score -> (answer, references, value)
    "anls": {
        "anls": [
            ("Hello  World", ["hello world"], 1 - 0 / 12),
            ("helo", ["hello"], 1 - 1 / 5),
            ("abcd", ["abxy"], 0.5),
            ("abc", ["xyc"], 0.0),  # two of three are wrong: below a half
            ("", ["a"], 0.0),
            ("stra\u00dfe", ["stras"], 1 - 2 / 7),  # "STRASSE" has seven letters
            ("1998", ["1997", "1998"], 1.0),
        ]
    },
    "relaxed_accuracy": {
        "relaxed_accuracy": [
            ("10.5", ["10"], 1.0),
            ("10.51", ["10"], 0.0),
            ("9.5", ["10"], 1.0),
            ("52%", ["0.5"], 1.0),
            ("0", ["0"], 1.0),  # a reference of 0 is compared as a text
            ("0.0", ["0"], 0.0),
            ("Yes", ["yes"], 1.0),
            ("Yes.", ["yes"], 0.0),
            ("3", ["4", "3"], 1.0),
        ],
        "relaxed_accuracy_qwen": [
            ("10.52", ["10"], 1.0),  # 0.52 / 10.52 = 4.94%
            ("9.5", ["10"], 0.0),  # 0.5 / 9.5 = 5.3%
        ],
    },
    "gqa": {
        "gqa_accuracy": [
            ("It is a red bus.", ["red bus"], 1.0),
            ("the top of the hill", ["top"], 1.0),
            ("Yes, it is", ["yes"], 1.0),
            ("pizza box", ["box"], 1.0),  # "a " ends "pizza": sic
            ("pizza box", ["pizza box"], 0.0),
            ("No", ["NO "], 1.0),
        ],
        "gqa_accuracy_lavis": [
            ("two", ["2"], 1.0),
            ("a dog", ["dog"], 1.0),
            ("dog", ["a dog"], 0.0),  # the reference stays as it is
            ("Yes!", ["yes"], 1.0),
        ],
    },
    "any_case": {"any_case_accuracy": [(" Brown Cat ", ["brown cat"], 1.0), ("cat", ["cats"], 0.0)]},
    "vqa_accuracy": {
        "vqa_accuracy": [("two", ["2"] * 3 + ["3"] * 7, 0.9), ("a dog!", ["dog"] * 9 + ["cat"], 1.0)]
    },
}


def test_boxes_by_hand():
    answers, references, expected = zip(*BOXES.values(), strict=True)
    scores = metrics.scores_of("grounding", list(answers), [[r] for r in references])
    assert scores["mean_iou"][1] == pytest.approx(expected)
    hits = [float(iou >= 0.5) for iou in expected]
    assert scores["acc@0.5"] == (pytest.approx(sum(hits) / len(hits)), hits)


@pytest.mark.parametrize("metric", ANSWERS)
def test_answers_by_hand(metric):
    for score, cases in ANSWERS[metric].items():
        answers, references, expected = map(list, zip(*cases, strict=True))
        assert metrics.scores_of(metric, answers, references)[score][1] == pytest.approx(expected), score


@pytest.mark.parametrize("metric", ["grounding", *ANSWERS])
def test_the_command_gives_the_goldens(street, base, says, metric):  # noqa: F811
    records, answers, expected = [], {}, {}
    if metric == "grounding":
        for name, (answer, reference, iou) in BOXES.items():
            if not reference.endswith("200x100"):
                continue
            corners = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", reference)
            box = [[int(v) for v in four] for four in corners]
            records.append({"id": name, "image": "street.png", "ref": "bus", "bbox": box})
            answers[name], expected[name] = answer, {"mean_iou": iou, "acc@0.5": float(iou >= 0.5)}
    else:
        for score, cases in ANSWERS[metric].items():
            for n, (answer, references, value) in enumerate(cases):
                name = f"{score} {n}"
                records.append(
                    {"id": name, "image": "street.png", "question": "what?", "answers": references}
                )
                answers[name], expected[name] = answer, {score: value}
    says(answers)
    path = write(street / "a.jsonl", "\n".join(map(json.dumps, records)))
    argv = ["--model_name_or_path", str(base), "--data_files", path, "--output", str(street / "r.json")]
    argv += ["--metric", metric, "--boxes", str(street / "drawn")]
    assert evaluate.main(argv) == 0
    found = results(street / "r.json")
    for answer in found["answers"]:
        for score, value in expected[answer["id"]].items():
            assert answer["scores"][score] == pytest.approx(value), answer
    drawn = len(list((street / "drawn").glob("*.png"))) if metric == "grounding" else 0
    assert drawn == sum("<box>" in text for text in answers.values())


# --------------------------------------------------------------------------------------------------
# a small real set


def test_the_set_is_its_seed_and_its_boxes_are_right(tmp_path):
    for name in ("a", "b"):
        make_grounding.make(tmp_path / name, "val", 3, 7)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    found = json.loads((tmp_path / "a/val.json").read_text())
    assert len(found["annotations"]) == 9  # three different things on each of three canvases
    assert len({(a["image_id"], a["category_id"]) for a in found["annotations"]}) == 9
    for annotation in found["annotations"]:
        image = Image.open(tmp_path / "a" / found["images"][annotation["image_id"]]["file_name"])
        x, y, w, h = annotation["bbox"]
        ground, inside = image.getpixel((0, 0)), image.crop((x, y, x + w, y + h)).getcolors(9999)
        assert sum(count for count, colour in inside if colour != ground) > 0.3 * w * h
    assert data_check.main(["check", "--dataset", str(tmp_path / "a/val.json"), "--max_length", "512"]) == 0


@pytest.mark.slow
def test_trained_and_scored_by_the_commands(tmp_path, monkeypatch):
    """The shipped configuration and the three commands of runs/make_grounding.py, for a few steps."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 12), ("val", 2)):
        make_grounding.make(tmp_path / "grounding", split, count, 0)
    quick = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--evaluate",
        "no",
        "--warmup_steps",
        "0",
    ]
    run(["configs/qwen_vl/samples_grounding.json", *quick])
    run(["--lora_path", "output_grounding", "--boxes", "boxes", "--output", "r.json"], main=evaluate.main)
    found = results("r.json")
    assert found["scores"].keys() == {"acc@0.5", "mean_iou"} and len(found["answers"]) == 6
    assert all(a["references"][0].endswith(" of 64x64") for a in found["answers"])


def test_the_sample_set_is_made_or_its_mistake_is_one_line(tmp_path, capsys):
    assert make_grounding.main([str(tmp_path / "made"), "--train", "2", "--val", "1"]) == 0
    assert len(data.Entry({"data_files": str(tmp_path / "made/val.json")})) == 3
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert make_grounding.main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file")
    with pytest.raises(SystemExit):
        make_grounding.main([str(tmp_path / "made"), "--val", "0"])
