"""Recipes: how a published score was measured, so that whoever has the weights checks us with one command.

    python evaluate.py configs/qwen_vl/eval_refcoco_val.json --model_name_or_path Qwen-VL  # expected 0.8936

A recipe is a configuration with the key "evaluation": the prompt's template ({} is what the record asks), the
decoding, the metric, and the score that the published weights give on all of the data. Options of the command
line win, and whatever is then not the published measurement is said; a score is compared only where the
weights have the published size, no adapter, and every record of the set was answered.
"""

from dataclasses import dataclass, fields, replace
from typing import get_type_hints

import metrics
import schema
from generate import Decoding
from records import Conversation, ImageRef, text_of
from terminal import nearest

WITHIN = 0.005  # of the published score: differences of kernels and library versions


@dataclass
class Recipe:
    """The key "evaluation" of a configuration."""

    metric: str  # of metrics.SCORES
    score: str  # the one that was published
    expected: float
    records: int | None  # of the whole set, as evaluate.py counts them (a caption's images); None: not known
    source: str  # where prompt, decoding and score are from
    decoding: dict  # options of generate.Decoding
    weights: dict  # "text_config.num_layers": 24, ...: what the published config.json says of the size
    prompt: str | None = None  # None: the processor's own
    note: str | None = None  # said with the score
    apart: str | None = None  # what else was done for the published score, or is not known of it


def recipe_of(value: dict | None) -> Recipe | None:
    """ValueError for a recipe that lacks something, or says more than is understood."""
    if value is None:
        return None
    schema.check(value, dict, "evaluation")
    known = {f.name for f in fields(Recipe)}
    for key in value:
        if key not in known:
            raise ValueError(f"evaluation has the unknown key {key!r}{nearest(key, known)}")
    recipe = schema.from_json(Recipe, value, "evaluation")
    if recipe.score not in metrics.SCORES.get(recipe.metric, ()):
        raise ValueError(f"evaluation: metric={recipe.metric} has no score {recipe.score}")
    if wrong := set(recipe.decoding) - {f.name for f in fields(Decoding)}:
        raise ValueError(f"evaluation: decoding has the unknown option {sorted(wrong)[0]}")
    kinds = get_type_hints(Decoding)
    for key, option in recipe.decoding.items():
        schema.check(option, kinds[key], f"evaluation: decoding: {key}")
    return recipe


def asked(conversation: Conversation, prompt: str | None) -> Conversation:
    """The question in the recipe's wording: a chat, whose text every processor takes as it is."""
    if prompt is None:
        return conversation
    system = [turn for turn in conversation.turns if turn[0] == "system"]
    (content, *more) = [content for role, content in conversation.turns if role == "user"]
    places = [n for n, part in enumerate(content) if isinstance(part, ImageRef)] or [0]
    inside = text_of(content[: places[-1]]).strip() and text_of(content[places[0] :]).strip()
    if more or inside:
        what = "several questions" if more else "images inside its text"
        raise ValueError(
            f"{conversation.where}: --prompt words one question behind its images; this has {what}"
        )
    text = prompt.replace("{}", text_of(content).strip())
    parts = [ImageRef(part.source) for part in content if isinstance(part, ImageRef)]
    return replace(conversation, turns=[*system, ("user", [*parts, text])], kind="chat")


def deviations(recipe: Recipe, config: dict, changed: dict, answered: int, options: dict) -> list[str]:
    """Why a score is not the published measurement. `changed`: what else the weights are than the published
    ones (an adapter, few bits); `options`: the metric, prompt and decoding in use."""
    found = []
    for path, value in recipe.weights.items():
        have = config
        for key in path.split("."):
            have = have.get(key) if isinstance(have, dict) else None
        if have != value:
            found.append(f"config.json has {path}={have} instead of {value}")
    found += [f"{key}={value}" for key, value in changed.items() if value]
    if recipe.records is not None and answered != recipe.records:
        found.append(f"{answered:,} records instead of {recipe.records:,}")
    # what the recipe does not name is as it is by default; its own limit of tokens each command has
    usual = {f.name: f.default for f in fields(Decoding) if f.name != "max_new_tokens"}
    meant = {"metric": [recipe.metric], "prompt": recipe.prompt, **usual, **recipe.decoding}
    used = {**usual, **options}
    found += [f"{key}={used[key]} instead of {value}" for key, value in meant.items() if used[key] != value]
    return [*found, recipe.apart] if recipe.apart else found


def verdict(recipe: Recipe, scores: dict[str, float], found: list[str]) -> str:
    """A line: expected beside got, or why they are not compared."""
    if (got := scores.get(recipe.score)) is None:
        return f"{recipe.score}, which is published, is not scored: {'; '.join(found)}"
    if found:
        return (
            f"{recipe.score} {got:.4f}; published with full weights and data: {recipe.expected:.4f} "
            f"({recipe.source}), not compared: {'; '.join(found)}"
        )
    near = abs(got - recipe.expected) <= WITHIN
    return (
        f"{recipe.score}: expected {recipe.expected:.4f} ({recipe.source}), got {got:.4f}: "
        f"{'reproduced' if near else 'NOT reproduced'} (within {WITHIN:g})"
        + (f"; {recipe.note}" if recipe.note else "")
    )
