"""Words about scenes: captions, instructions and the judge's questions, from one table that both writes and reads.

* `caption(scene)` is lossy on purpose: it names things, colours, textures, background and style, never a position
  or a size, so the target caption alone cannot bring the reference back.
* `instruct(edit, scene, rng)` phrases an edit in one of several ways; `parse_instruction(text)` reads it back.
* `questions(edit, ...)` are the judge's: edit verification and identity preservation per edit type, in the single-image
  "is there a ..." form with target answer No for removals [arXiv:2510.14978, Sec. 3.2; npedit critic_models/prompts.py].

Raises `UnknownInstruction` with the nearest known words and the grammar when a text cannot be read.
"""

from __future__ import annotations

import difflib
import random
import re
from dataclasses import dataclass
from functools import cache

from vlmedit.errors import UnknownInstruction
from vlmedit.world.edits import Edit
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, SIDES, STYLES, TEXTURES, Scene, Thing

TEMPLATES: dict[str, tuple[str, ...]] = {
    "add": ("add a {new}", "put a {new} in the picture", "insert a {new}", "draw a {new}"),
    "remove": ("remove the {thing}", "delete the {thing}", "erase the {thing}", "take away the {thing}"),
    "replace": ("replace the {thing} with a {new_shape}", "turn the {thing} into a {new_shape}", "swap the {thing} for a {new_shape}"),
    "recolor": ("make the {thing} {color}", "paint the {thing} {color}", "change the color of the {thing} to {color}", "color the {thing} {color}"),
    "texture": ("make the {thing} {texture}", "change the {thing} to {texture}", "give the {thing} a {texture} look"),
    "background": ("make the background {background}", "change the background to {background}", "put everything on a {background} background"),
    "move": ("move the {thing} to the {side}", "shift the {thing} to the {side}", "push the {thing} to the {side}"),
    "style": ("make it a {style} picture", "turn it into a {style} picture", "change the style to {style}"),
    "nothing": ("do nothing", "keep everything as it is", "leave the picture unchanged"),
    "customise": ("show the {thing} on a {background} background", "show the {thing} on a {background} background with a {new}"),
}
SYNONYMS = {"colour": "color", "gray": "grey", "recolour": "color", "recolor": "color", "plus": "cross", "disc": "circle", "an": "a", "violet": "purple", "turquoise": "cyan"}


def _any(words) -> str:
    return "|".join(words)


_NOUN = rf"(?:(?:{_any(TEXTURES)}) )?(?:(?:{_any(COLORS)}) )?(?P<{{0}}>{_any(SHAPES)})"
_SLOTS = {
    "{thing}": _NOUN.format("shape"),
    "{new}": rf"(?:(?P<texture>{_any(TEXTURES)}) )?(?P<color>{_any(COLORS)}) (?P<new_shape>{_any(SHAPES)})",
    "{new_shape}": rf"(?P<new_shape>{_any(SHAPES)})",
    "{color}": rf"(?P<color>{_any(COLORS)})",
    "{texture}": rf"(?P<texture>{_any(TEXTURES)})",
    "{background}": rf"(?P<background>{_any(BACKGROUNDS)})",
    "{side}": rf"(?P<side>{_any(SIDES)})",
    "{style}": rf"(?P<style>{_any(STYLES)})",
}


@cache
def _patterns() -> list[tuple[str, re.Pattern]]:
    out = []
    for kind, templates in TEMPLATES.items():
        for template in templates:
            out.append((kind, re.compile(re.sub(r"\{\w+\}", lambda m: _SLOTS[m[0]], template))))
    return out


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation, synonyms mapped to the world's words."""
    words = re.sub(r"[^a-z ]+", " ", text.lower()).split()
    return " ".join(SYNONYMS.get(w, w) for w in words if w != "please")


def parse_instruction(text: str) -> Edit:
    """Read an instruction. Raises `UnknownInstruction` naming unknown words, their neighbours and the grammar."""
    plain = normalise(text)
    if not plain:
        raise UnknownInstruction("the instruction is empty; say for example 'make the circle red'")
    for kind, pattern in _patterns():
        found = pattern.fullmatch(plain)
        if found:
            fields = {k: v for k, v in found.groupdict().items() if v}
            if kind == "add":
                fields["shape"] = fields.pop("new_shape")
                fields.setdefault("texture", "solid")
            return Edit(kind, **fields)
    known = instruction_words()
    hints = []
    for word in plain.split():
        if word not in known:
            near = difflib.get_close_matches(word, sorted(known), 3, 0.5)
            hints.append(f"unknown word {word!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    reason = "; ".join(hints) or "known words, but not in a known order"
    raise UnknownInstruction(f"cannot read the instruction {text!r}: {reason}.\n{grammar()}")


def grammar() -> str:
    """The instruction grammar as text, one line per edit type, then the words of each slot."""
    lines = ["Known instructions:"]
    lines += [f"  {kind:<10} {' | '.join(templates)}" for kind, templates in TEMPLATES.items()]
    slots = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "background": BACKGROUNDS, "side": SIDES, "style": STYLES}
    lines += [f"  {{{name}}}: {', '.join(words)}" for name, words in slots.items()]
    lines.append("  {thing}: [texture] [color] shape    {new}: [texture] color shape")
    return "\n".join(lines)


def noun(color: str | None, shape: str, texture: str | None = None) -> str:
    """A noun phrase: 'striped red circle'; solid is not said."""
    return " ".join(w for w in (texture if texture not in (None, "solid") else None, color, shape) if w)


def describe(thing: Thing) -> str:
    return noun(thing.color, thing.shape, thing.texture)


def caption(scene: Scene) -> str:
    """A lossy caption: 'pastel picture of red circle and striped blue square on white background'."""
    things = [describe(t) for t in scene.things]
    body = " and ".join(things) or "nothing"
    style = "" if scene.style == "plain" else f"{scene.style} picture of "
    return f"{style}{body} on {scene.background} background"


def _fill(template: str, edit: Edit, thing: str) -> str:
    new = noun(edit.color, edit.new_shape or edit.shape or "", edit.texture)
    slots = {**{k: v for k, v in vars(edit).items() if v}, "thing": thing, "new": new}
    return template.format(**slots)


def instruct(edit: Edit, scene: Scene, rng: random.Random) -> str:
    """Phrase an edit; the thing is named by its shape alone or by colour and shape."""
    thing = ""
    if edit.type not in ("add", "background", "style", "nothing"):
        held = scene.things[scene.find(edit.shape)]
        thing = noun(held.color if rng.random() < 0.3 else None, held.shape)
    templates = TEMPLATES[edit.type]
    if edit.type == "customise":
        return _fill(templates[1 if edit.new_shape else 0], edit, thing)
    return _fill(rng.choice(templates), edit, thing)


@dataclass(frozen=True)
class Question:
    """One yes/no question. `pair`: the judge sees reference and output, else the output alone. `answer`: the target."""

    text: str
    answer: bool
    pair: bool


def edit_question(edit: Edit, instruction: str) -> Question:
    """Was the edit made? For removals: is the thing still there, in the output alone, target No."""
    if edit.type == "remove":
        return Question(f"is there a {edit.shape} ?", answer=False, pair=False)
    return Question(f"was this done : {instruction} ?", answer=True, pair=True)


def identity_question(edit: Edit, instruction: str) -> Question:
    """Is everything that the instruction does not name as it was?"""
    if edit.type == "remove":
        return Question(f"is all but the {edit.shape} the same ?", answer=True, pair=True)
    if edit.type == "customise":
        return Question(f"is it the same {edit.shape} ?", answer=True, pair=True)
    return Question(f"is the rest the same : {instruction} ?", answer=True, pair=True)


DESCRIBE = "what is in the picture ?"  # the captioning request of the judge's schooling
PRESENCE = "is there a {} ?"


@cache
def instruction_words() -> frozenset[str]:
    words = " ".join(t for ts in TEMPLATES.values() for t in ts)
    slots = (*SHAPES, *COLORS, *TEXTURES, *BACKGROUNDS, *SIDES, *STYLES)
    return frozenset(re.sub(r"\{\w+\}", " ", words).split()) | frozenset(slots)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that captions, instructions and questions can contain, sorted."""
    other = "was this done : is the rest same all but it there a ? what in picture of and on background nothing with"
    return tuple(sorted(instruction_words() | frozenset(other.split())))
