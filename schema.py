"""JSON that others wrote, checked before anything is made of it: a wrong key or number is one clear error.

config = schema.read_json("qwen-vl-chat/config.json", "expected a checkpoint directory")
vision = schema.from_json(VisionConfig, config["visual"], "config.json: visual")
"""

import json
import math
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal


def read_json(path, what: str) -> dict:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not valid JSON ({e.msg}); fetch or write it again") from None
    except ValueError as e:
        raise ValueError(f"{path} is not text ({e}); fetch or write it again") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; fetch or write it again") from None
    check(value, dict, f"{path}: the file")
    return value


# Numbers of JSON files: Annotated[type, least, most]. The limits are far from any model, so that a damaged
# number is refused before a layer or a table is made of it.
Size = Annotated[int, 1, 1 << 20]
Depth = Annotated[int, 1, 1000]
Pixels = Annotated[int, 1, 4096]
TokenId = Annotated[int, 0, 1 << 24]
Epsilon = Annotated[float, 1e-20, 0.1]
Share = Annotated[float, 0.0, 0.99]
Scale = Annotated[float, 0.0, 1.0]
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NAMES |= {dict: "an object", list: "a list", types.NoneType: "null"}


def fits(value, kind) -> bool:
    """Whether a JSON value is what a type annotation says; true is no number, and NaN and infinity are none
    either."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and parts[1] <= value <= parts[2]
    if origin is Literal:  # of equal type: 1 == True
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items()
        )
    if kind in (int, float):
        number = isinstance(value, int) or kind is float and isinstance(value, float) and math.isfinite(value)
        return number and not isinstance(value, bool)
    return isinstance(value, kind)


def expectation(kind) -> str:
    """A type annotation in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{expectation(parts[0])} from {parts[1]:g} to {parts[2]:.10g}"
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(expectation, parts))
    if origin is list:
        return f"a list of which each is {expectation(parts[0])}"
    if origin is dict:
        return f"an object in which each value is {expectation(parts[1])}"
    return NAMES.get(kind, kind.__name__)


def check(value, kind, where: str) -> None:
    """ValueError unless the value at `where` (file and key) is what the annotation `kind` says."""
    if not fits(value, kind):
        # of a long list its kind, since the wrong item may be the last one
        shown = repr(value) if not isinstance(value, dict | list) or len(value) < 4 else NAMES[type(value)]
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise ValueError(f"{where} is {shown}; expected {expectation(kind)}; fetch or write it again")


def from_json(kind: type, values, where: str, **given):
    """A dataclass from a JSON object at `where`: each field is there, or has a default, and is of its type.
    `given` are fields that come from elsewhere; other keys of the object are left out."""
    check(values, dict, where)
    hints = typing.get_type_hints(kind, include_extras=True)  # with the bounds of Annotated
    wanted = [f for f in fields(kind) if f.name not in given]
    # both are MISSING for a field without a default
    missing = [f.name for f in wanted if f.name not in values and f.default is f.default_factory]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; is it a checkpoint of another model?")
    for f in wanted:
        if f.name in values:
            check(values[f.name], hints[f.name], f"{where}: {f.name}")
    return kind(**{f.name: values[f.name] for f in wanted if f.name in values}, **given)


def require(values: dict, where: str, **expected) -> None:
    """ValueError for a key that changes what is computed and is not as the only supported value."""
    for key, value in expected.items():
        found = values.get(key, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):  # 1 == True
            raise ValueError(f"{where}: {key} is {found!r}; this model is computed with {value!r} only")


def demand(holds: bool, message: str) -> None:
    """ValueError where config.json asks for a shape that a model's modules cannot have."""
    if not holds:
        raise ValueError(f"config.json: {message}")
