"""Boxes drawn onto an image: whatever a model may write between the tags."""

import math

import numpy as np
import pytest
from PIL import Image

import draw
from terminal import printable

RED = (255, 0, 0)


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def red_corners(path) -> tuple[int, int, int, int]:
    """The outermost red pixels: x1, y1, x2, y2."""
    with Image.open(path) as drawn:
        y, x = np.nonzero((np.asarray(drawn.convert("RGB")) == RED).all(-1))
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


@pytest.mark.parametrize(
    "box, corners",
    [
        ("(100,200),(500,900)", (20, 20, 100, 90)),
        (" ( 100 , 200 ) , ( 500 , 900 ) ", (20, 20, 100, 90)),
        ("(100.4,200.0),(500.0,900)", (20, 20, 100, 90)),
        ("(500,900),(100,200)", (20, 20, 100, 90)),
        ("(500,200)(100,900)", (20, 20, 100, 90)),
        ("(-50,200),(500,900)", (0, 20, 100, 90)),
        ("(290,290),(500,900)", (58, 29, 100, 90)),  # a thousandth is floored, without rounding errors before
        ("(1000,200),(1000,900)", (198, 20, 199, 90)),  # at the very edge: two pixels wide
        (f"(100,200),({'9' * 30},900)", (20, 20, 199, 90)),
        (f"(100,200),({'9' * 5000},{'9' * 400})", (20, 20, 199, 99)),
    ],
)
def test_odd_numbers(image, tmp_path, box, corners):
    assert draw.draw_boxes(image, f"<box>{box}</box>", tmp_path / "b.png") == 1
    assert red_corners(tmp_path / "b.png") == corners


@pytest.mark.parametrize(
    "box", ["", "(1,2)", "(1,2),(3,nan)", "(a,b),(c,d)", "(1,2),(3,4),(5,6)", "x" * 5000]
)
def test_what_is_no_box_is_named(image, tmp_path, capsys, box):
    text = f"<box>{box}</box><box>(0,0),(500,500)</box>"
    assert draw.draw_boxes(image, text, tmp_path / "b.png") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: box ") and "(x1,y1),(x2,y2)" in line and len(line) < 200


def test_a_label_holds_for_the_boxes_behind_it():
    text = "<ref>two\n dogs</ref><box>(1,1),(2,2)</box> <box>(3,3),(4,4)</box>, <box>(5,5),(6,6)</box>"
    boxes, _ = draw.boxes_of(text)
    assert [label for label, _ in boxes] == ["two dogs", "two dogs", ""]


@pytest.mark.parametrize("label", ["犬", "собака", "Größe", "🐕" * 3, "a\u0000b"])
def test_a_label_is_drawn_or_printed_with_its_number(image, tmp_path, capsys, monkeypatch, label):
    text = f"<box>(0,0),(10,10)</box><ref>{label}</ref><box>(0,0),(999,999)</box>"
    label = printable(label)
    drawn = draw.font_for(label, 12) is not None
    assert draw.draw_boxes(image, text, tmp_path / "b.png") == 2
    assert capsys.readouterr().err == ("" if drawn else f"box 2: {label}\n")
    monkeypatch.setattr(draw, "FONTS", ())  # a machine without any
    draw.draw_boxes(image, "<ref>犬</ref><box>(0,0),(999,999)</box>", tmp_path / "b.png")
    assert capsys.readouterr().err == "box 1: 犬\n"


def test_a_font_is_one_that_has_the_characters(monkeypatch):
    assert draw.font_for("dog", 12) is not None
    monkeypatch.setattr(draw, "FONTS", ())
    assert draw.font_for("犬", 12) is None


def test_a_box_in_the_smallest_image(tmp_path):
    Image.new("RGB", (1, 1), "white").save(tmp_path / "one.png")
    text = "<ref>" + "long " * 50 + "</ref><box>(0,0),(999,999)</box>"
    assert draw.draw_boxes(str(tmp_path / "one.png"), text, tmp_path / "b.png") == 1
    assert math.prod(Image.open(tmp_path / "b.png").size) == 1


def test_what_no_terminal_shows_has_its_code(image, tmp_path, capsys):
    assert printable("a\u3000b 图 \x1b[31m\u202e\ud800\n") == "a\u3000b 图 \\x1b[31m\\u202e\\ud800\\n"
    assert printable("a\n\tb", keep="\n\t") == "a\n\tb"
    text = "<ref>\u0e01\x1b[2J\u202e\u200b</ref><box>(1,1),(900,900)</box>"  # no font here has the first
    assert draw.boxes_of(text)[0][0][0] == "\u0e01\\x1b[2J\\u202e\\u200b"
    draw.draw_boxes(image, text, tmp_path / "out.png")
    assert "\x1b" not in (said := capsys.readouterr().err) and "\u202e" not in said
