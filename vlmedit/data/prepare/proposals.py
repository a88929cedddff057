"""What a model is asked about a picture in `vlmedit data prepare`, and which answers are taken.

The paper has instructions proposed per edit category, checked, and captions written [arXiv:2510.14978, Sec. 4]; its
prompts are not published, these are ours. An answer is read as it is or refused with one of REASONS: nothing is guessed
or repaired.
"""

from __future__ import annotations

import json
import re

KINDS = {  # type: what is asked for, an example
    "remove": ("remove one thing that is clearly visible and could be missing", "Remove the bicycle on the left.", "the bicycle"),
    "add": ("add one new thing at a place that the instruction names", "Add a straw hat to the woman's head.", "a straw hat"),
    "replace": ("replace one visible thing by a different thing of about its size", "Replace the cup with a teapot.", "the cup"),
    "color": ("change the color of one visible thing", "Make the sofa dark green.", "the sofa"),
    "material": ("change the material or texture of one visible thing", "Turn the table into polished marble.", "the table"),
    "shape": ("change the shape or size of one visible thing", "Make the dog's ears much longer.", "the dog's ears"),
    "background": ("change the background or setting and nothing else", "Put the scene on a snowy mountain.", "the background"),
    "style": ("redraw the whole picture in another artistic style", "Turn the picture into a watercolor painting.", "the picture"),
    "action": ("change the pose, action or expression of a person or animal", "Make the cat lie on its back.", "the cat"),
    "text": ("change words that are written in the picture", "Change the sign so that it reads OPEN.", "the sign"),
}
CAPTION = 'Describe this picture in one sentence of at most 40 words. Answer with JSON alone: {"caption": "..."}'
PROPOSE = (
    "You write instructions for an image editor. {view} Write one short imperative instruction to {task}. It must fit this picture, need no other "
    'picture, and be possible to check by looking. An example for another picture: {{"instruction": "{example}", "object": "{thing}"}}. '
    "Answer with JSON alone, with these two fields; object is the thing that the instruction is about, in a few words."
)
CHECK = (
    'An image editor was given this picture and the instruction: "{instruction}" Does the instruction fit what is to be seen, and could it be '
    "carried out? Answer Yes or No."
)
TARGET = (
    'A picture shows: "{caption}" It is edited by this instruction: "{instruction}" Describe the edited picture in one sentence of at most 40 words, '
    'without saying that it was edited. Answer with JSON alone: {{"caption": "..."}}'
)
REASONS = {
    "unreadable": "the file is missing or no picture",
    "unsuitable": "the picture is animated, tiny, huge or longer than 4 to 1",
    "seen before": "the picture looks like one that came earlier",
    "no caption": "the description of the picture is not as asked",
    "no proposal": "the proposal is not JSON with an instruction",
    "not an instruction": "too short, too long, or not words",
    "no object": "a removal that does not name what goes",
    "the example": "repeats the example of the prompt",
    "twice for one picture": "the same instruction as another one of this picture",
    "no clear answer": "the check is answered neither yes nor no",
    "not possible": "the check says no",
    "no target caption": "the edited picture's description is not as asked",
    "nothing changes": "both captions are the same",
    "still there": "the target caption names what is removed",
    "too common": "the instruction came often enough",
}


class Refused(ValueError):
    """An answer that cannot be used. Its text is one of REASONS."""


def fields_of(text: str, *names: str) -> tuple[str, ...]:
    """The text fields of the first JSON object in an answer; fences and words around it do not matter. Raises
    ValueError without them."""
    decoder = json.JSONDecoder()
    for at in (m.start() for m in re.finditer(r"\{", text)):
        try:
            found, _ = decoder.raw_decode(text[at:])
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and all(isinstance(found.get(n), str) and found[n].strip() for n in names):
            return tuple(" ".join(found[n].split()) for n in names)
    raise ValueError(f"no JSON with {', '.join(names)}")


def is_prose(text: str, least: int, most: int) -> bool:
    """Between so many words, nearly all of them words of letters."""
    words = text.split()
    plain = [w for w in words if re.fullmatch(r"[\"'(]*[^\W_]+(?:['’-][^\W_]+)*[\"').,;:!?]*", w)]
    return least <= len(words) <= most and len(plain) >= 0.8 * len(words)


def parse_caption(text: str, reason: str) -> str:
    try:
        (caption,) = fields_of(text, "caption")
    except ValueError:
        raise Refused(reason) from None
    if not is_prose(caption, 3, 60) or caption == "...":
        raise Refused(reason)
    return caption


def parse_proposal(text: str, kind: str) -> tuple[str, str | None]:
    """Instruction and object of a proposal. Raises `Refused` with the reason."""
    try:
        (instruction,) = fields_of(text, "instruction")
    except ValueError:
        raise Refused("no proposal") from None
    if not is_prose(instruction, 2, 40):
        raise Refused("not an instruction")
    if plain(instruction) == plain(KINDS[kind][1]):
        raise Refused("the example")
    try:
        thing = fields_of(text, "instruction", "object")[1]
    except ValueError:
        thing = None
    if kind == "remove" and (thing is None or not is_prose(thing, 1, 12) or core(thing) not in plain(instruction)):
        raise Refused("no object")
    return instruction, thing


def parse_answer(text: str) -> bool:
    """Yes or no, the answer's first word. Raises `Refused` for another one."""
    found = re.match(r"\W*(yes|no)\b", text, re.I)
    if not found:
        raise Refused("no clear answer")
    return found[1].lower() == "yes"


def no_change(kind: str, thing: str | None, caption: str, target: str) -> str:
    """Why a target caption shows no edit, or nothing."""
    if plain(caption) == plain(target):
        return "nothing changes"
    return "still there" if kind == "remove" and thing and core(thing) in plain(target) else ""


def plain(text: str) -> str:
    """Small letters, no punctuation: texts that say the same read the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def core(thing: str) -> str:
    """A thing without its article."""
    return re.sub(r"^(the|a|an|its|his|her|their)\s+", "", plain(thing))
