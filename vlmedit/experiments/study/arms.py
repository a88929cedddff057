"""The studies: for each a question and its arms. An arm is one or more trainings, one after the other, and the ways its student is used.

A new study is one entry of `STUDIES`. Whatever an arm does not set is the tier's configuration, from the shared warm start, teacher and judge.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vlmedit.errors import InputError


class Share(float):
    """A setting as a share of the requests that a training draws (updates x batch)."""


class Role(str):
    """A setting that takes the folder of the model in this role: a shared one's, or of an earlier training of the arm."""


@dataclass(frozen=True)
class Part:
    """One training of an arm."""

    stage: str
    settings: Mapping = field(default_factory=dict)
    share: float = 1.0  # of the study's updates
    updates: int | None = None  # a fixed number instead; 2 at tier smoke
    gives: str = "student"  # the role its model takes in what follows


@dataclass(frozen=True)
class Arm:
    parts: tuple[Part, ...]  # none: the teacher as it is
    ways: tuple[str, ...] = ("4 steps",)
    watched: int = 1  # times that the last training's student is measured, the last time at its end
    before: bool = False  # also measure what the last training starts from


@dataclass(frozen=True)
class Study:
    question: str
    arms: Mapping[str, Arm]


def npedit(ways: Sequence[str] = ("4 steps",), watched: int = 1, **settings) -> Arm:
    """An arm of one no-pair training."""
    return Arm((Part("npedit", settings),), tuple(ways), watched)


OTHER = dict(size="small", attack_from=500)  # settings of a second judge


def schooled(size: str, updates: int = 1500, watched: int = 1, editor: Mapping = {}, **settings) -> Arm:
    """The no-pair editor (with its own settings) under a judge of its own, schooled from nothing for half of what the shipped one was."""
    return Arm((Part("judge", {**OTHER, "size": size, **settings}, updates=updates, gives="judge"), Part("npedit", editor)), watched=watched)


ALONE = dict(dmd_weight=0.0)  # judge only
BOTH = dict(judge=(Role("judge"), Role("other")))


# How a model is used: settings of `evaluation.editing.evaluate_student`, or with an `editor` of its `edit_by_captions`.
WAYS = {
    "1 step": dict(steps=1),
    "2 steps": dict(steps=2),
    "4 steps": dict(steps=4),
    "8 steps": dict(steps=8),
    "4 steps, Euler": dict(steps=4, sampler="euler"),
    "30 steps": dict(steps=30, sampler="euler"),
    "best of 4": dict(steps=4, search="samples", particles=4),
    "best of 8": dict(steps=4, search="samples", particles=8),
    "FK of 4": dict(steps=4, search="samples", particles=4, strength=1.0),
    "FK of 8": dict(steps=4, search="samples", particles=8, strength=1.0),
    "ReNO": dict(steps=1, search="noise", descents=20),
    **{f"from {t}": dict(editor="sdedit", start=t, steps=15) for t in (0.4, 0.6, 0.8)},
    **{f"back to {t}": dict(editor="inversion", start=t, steps=15, iterations=3) for t in (0.6, 0.8, 1.0)},
    **{f"through {t}": dict(editor="flowedit", start=t, steps=15) for t in (0.6, 0.8, 1.0)},
}

PAIRED = Arm((Part("sft"),), ("4 steps", "4 steps, Euler", "30 steps"))

STUDIES: dict[str, Study] = {
    "objective": Study(
        "which terms of the objective are needed",
        {
            "full": npedit(),
            "DMD only": npedit(judge_weight=0.0),
            "judge only": npedit(dmd_weight=0.0),
            "caption-blind DMD": npedit(target_caption=False),
            "no identity question": npedit(identity=False),
            "full-vocabulary loss": npedit(answer_loss="vocabulary"),
            "paired SFT": PAIRED,
        },
    ),
    "matching": Study(
        "what may stand in DMD's place",
        {
            "DMD": npedit(),
            "f-distill JS": npedit(matching="f-js"),
            "SiD": npedit(matching="sid"),
            "pseudo-Huber": npedit(matching="pseudo-huber"),
            "DMD + GAN": npedit(gan_weight=0.5),
            "GAN": npedit(matching="gan", dmd_weight=2.0),  # its gradient is half of DMD's at the start [X]
            "MMD": npedit(matching="mmd", dmd_weight=12.0),  # its gradient is a twelfth of DMD's at the start; the others' are alike [X]
        },
    ),
    "reward": Study(
        "is the reward's gradient enough without distribution matching, and what must then hold the student",
        {
            "NP-Edit": npedit(),
            "judge only": npedit(dmd_weight=0.0),
            "ReFL": npedit(dmd_weight=0.0, gradient_calls=1, pretrain_weight=1.0),
            "DRaFT-1": npedit(dmd_weight=0.0, calls="all", gradient_calls=1),
            "DRaFT-2": npedit(dmd_weight=0.0, calls="all", gradient_calls=2),
            "DRaFT (all calls)": npedit(dmd_weight=0.0, calls="all"),
            "AlignProp": npedit(dmd_weight=0.0, calls="all", truncate="random"),
            "R0": npedit(dmd_weight=0.0, anchor_weight=0.1),
        },
    ),
    "teacher_judge": Study(
        "must the judge be a VLM, or does the teacher know which caption fits",
        {
            "VLM": npedit(),
            "teacher for the edit and VLM for the rest": npedit(reward="teacher"),
            "teacher alone": npedit(reward="teacher", identity=False),
            "nobody": npedit(judge_weight=0.0),
        },
    ),
    "asking": Study(
        "how far the outcome hangs on who is asked, and how",
        {
            "as schooled": npedit(),
            "short questions": npedit(wording="short"),
            "turned questions": npedit(wording="turned"),
            "bare questions": npedit(wording="bare"),
            "augmented pictures": npedit(augment=True),
            "another judge": schooled("small"),
            "both judges": Arm((Part("judge", OTHER, updates=1500, gives="other"), Part("npedit", BOTH))),
        },
    ),
    "hacking": Study(
        "when does the judge's word come apart from the oracle's, and what holds them together",
        {
            "NP-Edit": npedit(watched=4),
            "judge only": npedit(watched=4, **ALONE),
            "augmented pictures": npedit(watched=4, augment=True, **ALONE),
            "small judge": schooled("small", watched=4, editor=ALONE),
            "small judge (never attacked)": schooled("small", watched=4, editor=ALONE, attack_share=0.0),
            "both judges": Arm((Part("judge", OTHER, updates=1500, gives="other"), Part("npedit", BOTH | ALONE)), watched=4),
            "begun again halfway": Arm((Part("npedit", ALONE, share=0.5), Part("npedit", ALONE, share=0.5)), watched=2),
            "judge relearns halfway": Arm(
                (
                    Part("npedit", ALONE, share=0.5),
                    Part("judge", dict(start=Role("judge"), students=(Role("student"),), attack_from=0, lr=7e-4, warmup=20), updates=300, gives="judge"),
                    Part("npedit", ALONE, share=0.5),
                ),
                watched=2,
            ),
        },
    ),
    "unpaired": Study(
        "what other ways without a pair reach, and what synthetic pairs are worth",
        {
            "NP-Edit": npedit(),
            "CycleGAN-Turbo": Arm((Part("cyclegan_turbo"),)),
            "Bootstrap Your Generator": Arm((Part("bootstrap"),)),
            "synthetic pairs": Arm((Part("synthetic_pairs"),)),
            "synthetic pairs (nobody chooses)": Arm((Part("synthetic_pairs", dict(threshold=0.0)),)),
            "synthetic pairs (twins)": Arm((Part("synthetic_pairs", dict(pair_editor="twins")),)),
            "synthetic pairs + NP-Edit": Arm((Part("synthetic_pairs", share=0.5), Part("npedit", share=0.5))),
            "paired SFT": Arm((Part("sft"),)),
        },
    ),
    "unroll": Study(
        "how many calls are unrolled, and how many of them carry a gradient",
        {
            "mixed": npedit(),
            "one call": npedit(calls="one"),
            "two calls": npedit(calls="two"),
            "two calls (gradient in the last)": npedit(calls="two", gradient_calls=1),
            "all calls": npedit(calls="all"),
            "all calls (gradient in the last)": npedit(calls="all", gradient_calls=1),
            "mixed (same noise)": npedit(renoise="same"),
        },
    ),
    "judge_size": Study(
        "does a larger judge teach more, and a better schooled one",
        {
            "shipped": npedit(),
            **{size: schooled(size) for size in ("small", "medium", "large")},
            "medium (half the school)": schooled("medium", updates=750, attack_from=250),
            "medium (never attacked)": schooled("medium", attack_share=0.0),
        },
    ),
    "data": Study(
        "how many distinct requests are needed: as many as a share of the training's draws, drawn with replacement, or new ones each time",
        {**{name: npedit(request_limit=Share(share)) for name, share in (("1 %", 0.01), ("50 %", 0.5), ("100 %", 1.0))}, "new each time": npedit()},
    ),
    "rl": Study(
        "reward by gradient or by policy, with and without pairs first, the judge being the same",
        {
            "SFT": PAIRED,
            "SFT + Flow-GRPO": Arm((Part("sft", share=0.5), Part("flow_grpo", share=0.5)), before=True),
            "SFT + NP-Edit": Arm((Part("sft", share=0.5), Part("npedit", share=0.5)), before=True),
            "Flow-GRPO": Arm((Part("flow_grpo"),)),
            "NP-Edit": npedit(),
        },
    ),
    "steps": Study(
        "how many steps are needed in use",
        {
            "NP-Edit": npedit(("1 step", "2 steps", "4 steps", "8 steps")),
            "paired SFT": Arm((Part("sft"),), ("1 step", "2 steps", "4 steps", "8 steps")),
        },
    ),
    "fake_updates": Study("how many updates of the fake score per update of the student", {str(k): npedit(fake_updates=k) for k in (1, 2, 5, 10)}),
    "caption": Study(
        "must the caption that distribution matching reads carry the edit",
        {"target caption": npedit(), "reference caption": npedit(target_caption=False), "target caption (DMD only)": npedit(judge_weight=0.0)},
    ),
    "shift": Study("the schedule's shift towards noise, in training and use", {str(s): npedit(sampler_shift=float(s)) for s in (1, 2, 3, 6)}),
    "search": Study(
        "what the judge gives in use, without any training for it",
        {"NP-Edit": npedit(("1 step", "4 steps", "best of 4", "best of 8", "FK of 4", "FK of 8", "ReNO"))},
    ),
    "training_free": Study(
        "how far the teacher comes without any training, given both captions",
        {
            "SDEdit": Arm((), ("from 0.4", "from 0.6", "from 0.8")),
            "inversion": Arm((), ("back to 0.6", "back to 0.8", "back to 1.0")),
            "FlowEdit": Arm((), ("through 0.6", "through 0.8", "through 1.0")),
            "NP-Edit": npedit(),
        },
    ),
}


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.4)
    return f" (nearest: {near[0]})" if near else ""


def find(name: str) -> Study:
    """A study by name. Raises `InputError` with the list of known ones."""
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}{nearest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]
