"""One frozen dataclass per training stage: flat literals, each with its unit and source.

`TIER` is the one dial: smoke (seconds, for tests), laptop (the shipped checkpoints), gpu (a larger world).
Sources: [R] the authors' released configuration, [X] measured here (papers/log.md).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlmedit.errors import ConfigError

TIERS = ("smoke", "laptop", "gpu")

# The names of the choices, in the order of the tables of the same name, which a test compares with them: settings are
# read without importing what they choose from.
TASKS = ("edit", "customise", "both")  # vlmedit/data/world.py
NORMS = ("sample", "pixel")  # vlmedit/equations/dmd.py
OBJECTIVES = ("dmd", "f-js", "sid", "pseudo-huber", "mmd", "gan")  # vlmedit/equations/matching.py
WITHOUT_FAKE = ("mmd",)  # those of them that need no model of the student's own pictures
REWARDS = ("judge", "teacher")  # vlmedit/equations/rewards.py
WORDINGS = ("schooled", "short", "turned", "bare")  # vlmedit/equations/rewards.py
EDITORS = ("sdedit", "inversion", "flowedit")  # vlmedit/equations/training_free.py
CALLS = ("one", "two", "mixed", "all")  # vlmedit/equations/unroll.py
RENOISE = ("fresh", "same")  # vlmedit/equations/unroll.py
POLICIES = ("euler", "exponential")  # vlmedit/equations/flow_grpo.py
ALL_TYPES = (  # vlmedit/world/edits.py
    "add", "remove", "replace", "recolor", "texture", "background", "move", "style", "nothing", "customise",
)  # fmt: skip

POSITIVE = ("lr", "fake_lr", "critic_lr", "clip", "spike", "time_shift", "sampler_shift", "ratio_clip", "advantage_clip", "pool", "sampler_steps")
NOT_NEGATIVE = ("seed", "gain_steps", "warmup", "attack_from", "attack_steps", "attack_radius", "weight_decay", "fake_updates")  # and every weight
SHARES = ("final_lr", "text_dropout", "attack_share", "mismatch")  # in [0, 1]
MAKERS = ("twins", *EDITORS)  # of synthetic pairs: see vlmedit/methods/synthetic_pairs.py


@dataclass(frozen=True)
class TrainConfig:
    """What every stage has."""

    out: str = "runs/run"  # run folder: checkpoints, logs, metrics
    seed: int = 0
    steps: int = 1000  # updates
    batch: int = 64  # samples per update and process
    side: int = 32  # pixels
    lr: float = 2e-3  # peak, AdamW and Muon alike [X]
    warmup: int = 100  # updates of linear warm-up
    final_lr: float = 0.02  # share of the peak at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW
    weight_decay: float = 0.01
    clip: float = 2.0  # gradient norm [R]
    spike: float = 300.0  # gradient norm above which an update is skipped [R]
    ema: float = 0.998  # decay of the averaged weights; 0 keeps none
    precision: str = "bf16"  # autocast: bf16 or no
    save_every: int = 500  # updates between checkpoints

    def __post_init__(self):
        self.check_numbers()
        self.check_counts("steps", "batch", "side", "save_every")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must lie in [0, 1)")
        self.check_choices(precision=("bf16", "no"))

    def check_numbers(self) -> None:
        """Raise `ConfigError` for a number that is none, is not finite, or lies where its kind of setting cannot."""
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), str(field.type)
            if not kind.startswith(("int", "float")) or (value is None and "None" in kind):
                continue
            whole = kind.startswith("int")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name} is {value!r}; it must be a {'whole' if whole else 'finite'} number")
            if name in POSITIVE and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be positive")
            if value < 0 and (name in NOT_NEGATIVE or name.endswith("_weight")):
                raise ConfigError(f"{name} is {value}; it must be at least 0")
            if name in SHARES and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; it is a share in [0, 1]")

    def check_counts(self, *names: str) -> None:
        """Raise `ConfigError` for a setting below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def check_choices(self, **known: Iterable[str]) -> None:
        """Raise `ConfigError` for a setting that is none of the words known for it."""
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(words)}")

    @classmethod
    def make(cls, tier: str = "laptop", **overrides):
        """The stage's configuration at a tier, with overrides. Raises `ConfigError` for an unknown tier or key."""
        if tier not in TIERS:
            raise ConfigError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, 3) or known
                raise ConfigError(f"unknown config key {key!r} of {cls.__name__}; nearest: {', '.join(near)}")
        return cls(**{**cls.tiers().get(tier, {}), **overrides})

    @classmethod
    def tiers(cls) -> dict[str, dict]:
        return {"smoke": dict(steps=2, batch=4, warmup=1, save_every=1)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class TeacherConfig(TrainConfig):
    """Text-to-image flow matching."""

    out: str = "runs/teacher"
    steps: int = 7000
    text_dropout: float = 0.1  # share of empty captions, for guidance [R warm-up]
    time_shift: float = 2.0  # of the logit-normal training times
    ground_weight: float = 0.1  # of predicting what each patch shows, from halfway (REPA's idea, arXiv:2410.06940) [X]
    start: str | None = None  # weights to go on from; None is random

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=256, steps=60_000)}


@dataclass(frozen=True)
class JudgeConfig(TrainConfig):
    """The judge's schooling, adversarial from `attack_from` on [X: miniature's finding that unlocked the rest]."""

    out: str = "runs/judge"
    steps: int = 3000
    batch: int = 48  # pairs; each carries up to seven questions and a caption
    lr: float = 1.5e-3
    size: str = "medium"  # small, medium or large: see JUDGE_SIZES
    attack_from: int = 1000  # updates on clean inputs first
    attack_share: float = 0.75  # share of each batch that is attacked
    attack_radius: float = 3.5  # L2, [-1, 1] pixel units, drawn uniformly up to it
    attack_steps: int = 2
    caption_weight: float = 0.3
    start: str | None = None  # weights to go on from; None is random
    softener: str | None = "runs/teacher/model"  # redraws some of the outputs as a student would; None is off
    students: tuple[str, ...] = ()  # earlier students, whose edits become lessons: what they bribe a judge with
    ground_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(size=JUDGE_SIZES)

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "smoke": dict(steps=2, batch=4, warmup=1, save_every=1, size="small", attack_from=1, softener=None), "gpu": dict(side=64, batch=256, steps=20_000, size="large")}


JUDGE_SIZES = {
    "small": dict(width=64, conv=32, vision_layers=1, text_layers=2),
    "medium": dict(width=128, conv=64, vision_layers=2, text_layers=3),
    "large": dict(width=192, conv=96, vision_layers=3, text_layers=4),
}


@dataclass(frozen=True)
class WarmupConfig(TrainConfig):
    """Copy warm-up: flow matching with the reference itself as target [R], from the teacher's weights. The first
    `reading_steps` updates teach the text encoder to read instructions, without pictures: real backbones' encoders can."""

    out: str = "runs/warmup"
    teacher: str = "runs/teacher/model"
    steps: int = 1500
    batch: int = 48
    lr: float = 1.5e-3
    time_shift: float = 3.0  # few-step sampling starts at pure noise, so most copies are learnt there [X]
    text_dropout: float = 0.1  # [R]
    reading_steps: int = 500
    reading_batch: int = 128

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.reading_steps < self.steps:
            raise ConfigError(f"reading_steps is {self.reading_steps} of steps {self.steps}; leave some steps for copying")

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "reading_steps": 1, "reading_batch": 4}}


@dataclass(frozen=True)
class NPEditConfig(TrainConfig):
    """NP-Edit: DMD + judge + do-nothing [arXiv:2510.14978; R: zimage_instruct_critic_internvl.yaml]."""

    out: str = "runs/npedit"
    teacher: str = "runs/teacher/model"
    judge: str = "runs/judge/model"
    student: str = "runs/warmup/model"
    steps: int = 2000
    batch: int = 32
    lr: float = 1.0e-3  # [X]; R: 2e-5 at 6B parameters
    fake_lr: float = 1.5e-3
    betas: tuple[float, float] = (0.5, 0.98)  # [X]; R: (0, 0.9)
    weight_decay: float = 0.0  # [R]
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    matching: str = "dmd"  # what pulls to the teacher's pictures: see vlmedit/equations/matching.py
    dmd_weight: float = 1.0  # of that; 0 is off [R]
    judge_weight: float = 0.15  # [X]; R: 0.02
    nothing_weight: float = 5.0  # [X]; R: 1.0
    settled: float = 0.2  # share of requests that are fulfilled already, where a type allows it: more rows with target = reference [X]; R: 0
    guidance: float = 2.0  # of the real score, w = 1 is off; R: 3.5, 7.5 for removals, shape, style and action
    dmd_norm: str = "sample"
    fake_updates: int = 2  # per student update; R: 5
    ratio_weight: float = 0.1  # of the discriminator in the fake's loss, where `matching` needs one
    fake_rollouts: str = "shared"  # fake updates see the student's own rollout, or "fresh" ones [R]
    calls: str = "mixed"
    sampler_steps: int = 4
    sampler_shift: float = 1.0
    renoise: str = "fresh"
    gradient_calls: int | None = None
    truncate: str = "fixed"  # "random": the gradient goes through the last K calls, K uniform up to all [AlignProp]
    gan_weight: float = 0.0  # of DMD2's adversarial term beside the matching; 0.5 pulls a quarter as hard as DMD at the start [X]
    anchor_weight: float = 0.0  # of |weights - their start|^2 [R0's kind of regularizer]
    pretrain_weight: float = 0.0  # of the warm-up's own loss on the batch's references [ReFL's second term]
    reward: str = "judge"  # who says whether an edit is right: see vlmedit/equations/rewards.py
    second: str | None = None  # folder of a second judge, asked too: an ensemble
    wording: str = "schooled"  # of the questions: see vlmedit/equations/rewards.py
    augment: bool = False  # the judge sees both pictures shifted and speckled
    teacher_draws: int = 2  # noises per picture, where the teacher is the judge
    teacher_scale: float = 50.0  # of its margin [X]
    identity: bool = True
    answer_loss: str = "two_logits"
    gain_steps: int = 30  # updates of the logit-gain ramp; R: 2000 of 14000
    target_caption: bool = True  # False: DMD sees the reference's caption, which does not carry the edit
    pool: int | None = None  # distinct training requests; None is unlimited
    task: str = "edit"  # edit, customise or both
    emphasis: tuple[str, ...] = ()  # edit types drawn twice as often as `TASKS` says

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.emphasis) - set(ALL_TYPES)):
            raise ConfigError(f"emphasis names the unknown edit type {', '.join(unknown)}; known: {', '.join(ALL_TYPES)}")
        if self.dmd_weight == 0 and self.judge_weight == 0:
            raise ConfigError("dmd_weight and judge_weight are both 0; nothing would be learnt")
        self.check_choices(task=TASKS)
        if not 0 <= self.settled < 1:
            raise ConfigError(f"settled is {self.settled}; it is a share in [0, 1)")
        if self.gan_weight and (not self.dmd_weight or self.matching in WITHOUT_FAKE):
            raise ConfigError(f"gan_weight is {self.gan_weight}; its discriminator is a head of the fake score, which dmd_weight 0 and matching 'mmd' do not train")
        for name, off in (("second", None), ("wording", "schooled"), ("augment", False)):
            if self.reward != "judge" and getattr(self, name) != off:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it belongs to reward 'judge', and reward is {self.reward!r}: leave one of them out")
        if self.teacher_draws < 1 or self.teacher_scale <= 0:
            raise ConfigError(f"teacher_draws is {self.teacher_draws} and teacher_scale {self.teacher_scale}; at least one draw and a positive scale are needed")
        self.check_choices(reward=REWARDS, wording=WORDINGS, truncate=("fixed", "random"))
        self.check_choices(matching=OBJECTIVES, dmd_norm=NORMS, calls=CALLS, renoise=RENOISE, answer_loss=("two_logits", "vocabulary"))
        if self.gradient_calls is not None and self.gradient_calls < 1:
            raise ConfigError(f"gradient_calls is {self.gradient_calls}; at least the last call must carry a gradient, or none for all")
        if self.matching == "mmd" and self.batch < 2:
            raise ConfigError(f"batch is {self.batch}; matching 'mmd' compares pictures with each other: it must be at least 2")
        self.check_choices(fake_rollouts=("shared", "fresh"))

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=128, steps=14_000, fake_updates=5)}


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """The paired rival: flow matching towards the exact target, from the same warm start and for as many updates."""

    out: str = "runs/sft"
    student: str = "runs/warmup/model"
    steps: int = 1200
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    time_shift: float = 3.0


@dataclass(frozen=True)
class SyntheticConfig(SFTConfig):
    """Paired training on the teacher's own pairs, those the judge says yes to [arXiv:2211.09800; arXiv:2411.18616]. Its own settings
    say how pairs are made; the rest is SFT's."""

    out: str = "runs/synthetic"
    teacher: str = "runs/teacher/model"
    judge: str = "runs/judge/model"
    maker: str = "flowedit"  # what makes a pair: see vlmedit/methods/synthetic_pairs.py
    maker_start: float = 0.85  # time at which an editor leaves the reference; twins start at 1
    maker_steps: int = 8
    guidance: float = 2.0  # of the target caption; InstructPix2Pix: 7.5
    candidates: int = 8  # pairs made per update
    threshold: float = 0.5  # P(yes) to both questions above which a pair is kept
    capacity: int = 2048  # pairs held, the newest; an update draws its batch from all of them
    settled: float = 0.2  # as NPEditConfig: the same requests
    pool: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_counts("candidates", "maker_steps", "capacity")
        if not 0 < self.maker_start <= 1:
            raise ConfigError(f"maker_start is {self.maker_start}; it is a time in (0, 1]")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold}; it is a probability in [0, 1)")
        self.check_choices(maker=MAKERS)

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "candidates": 2, "maker_steps": 2, "capacity": 8}, "gpu": dict(side=64, batch=128, candidates=32)}


@dataclass(frozen=True)
class CycleConfig(TrainConfig):
    """What the unpaired rivals without a VLM share: requests with their inverse, and a cycle back to the reference."""

    teacher: str = "runs/teacher/model"
    student: str = "runs/warmup/model"
    steps: int = 2000
    batch: int = 32
    lr: float = 1.0e-3
    betas: tuple[float, float] = (0.5, 0.98)
    weight_decay: float = 0.0
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    cycle_weight: float = 1.0  # CycleGAN-Turbo: 1
    nothing_weight: float = 1.0  # CycleGAN-Turbo's identity term, 1: of the distance to the reference where nothing is to be done
    settled: float = 0.2  # as NPEditConfig: the same requests
    pool: int | None = None

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=128)}


@dataclass(frozen=True)
class CycleGANConfig(CycleConfig):
    """CycleGAN-Turbo, its two domains being captions [arXiv:2403.12036; R here: its released train_cyclegan_turbo.py]."""

    out: str = "runs/cyclegan"
    gan_weight: float = 0.5  # R: 0.5
    critic_lr: float = 1e-3
    critic_updates: int = 1  # per student update [R]
    mismatch: float = 0.5  # share of the critic's references shown with another one's caption, as false [GAN-CLS, arXiv:1605.05396]; R: 0
    calls: str = "mixed"  # in the unroll; R: one
    sampler_steps: int = 4
    sampler_shift: float = 1.0
    renoise: str = "fresh"

    def __post_init__(self):
        super().__post_init__()
        if self.gan_weight <= 0:
            raise ConfigError(f"gan_weight is {self.gan_weight}; without it copying is the best answer: it must be positive")
        self.check_counts("critic_updates")
        self.check_choices(calls=CALLS, renoise=RENOISE)


@dataclass(frozen=True)
class BootstrapConfig(CycleConfig):
    """Bootstrap Your Generator: the frozen model's direction of change, and a cycle [arXiv:2606.03911; the settings are ours]."""

    out: str = "runs/bootstrap"
    prior_weight: float = 1.0
    guidance: float = 2.0  # of the target caption in the direction of change
    sampler_steps: int = 4  # of the pseudo-target
    sampler_shift: float = 1.0
    time_shift: float = 3.0  # of the noisy states that are trained, as SFT's
    follow: float = 0.99  # decay of the average that makes pseudo-targets

    def __post_init__(self):
        super().__post_init__()
        if self.prior_weight <= 0:
            raise ConfigError(f"prior_weight is {self.prior_weight}; without it copying is the best answer: it must be positive")
        if not 0 <= self.follow < 1:
            raise ConfigError(f"follow is {self.follow}; it must lie in [0, 1)")


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Flow-GRPO with NP-Edit's judge as the reward [arXiv:2505.05470; R here: its released config/grpo.py]. `student` is where it starts:
    the copy warm start, or the model of an SFT run."""

    out: str = "runs/grpo"
    judge: str = "runs/judge/model"
    student: str = "runs/warmup/model"
    steps: int = 800
    batch: int = 32  # samples per update and process: requests times `group`; R: 48 x 24
    group: int = 8  # samples of one request; R: 24
    lr: float = 1e-4  # [X]: at 3e-4 a paired student loses sharpness before it earns anything; R: 3e-4, of LoRA weights
    betas: tuple[float, float] = (0.9, 0.99)  # R: (0.9, 0.999)
    weight_decay: float = 0.0  # R: 1e-4
    warmup: int = 20
    final_lr: float = 0.1  # R: 1, no schedule
    clip: float = 1.0  # gradient norm [R]
    ema: float = 0.99
    policy: str = "exponential"  # or "euler", the paper's, which needs more steps than a few: see vlmedit/equations/flow_grpo.py
    noise_level: float = 0.7  # a in sigma = a sqrt(t / (1 - t)) [R]
    sampler_steps: int = 4  # while training; R: 10, of 40 in use
    sampler_shift: float = 1.0
    inner: int = 2  # optimizer steps on the same samples; R: 2, on a half each
    ratio_clip: float = 1e-4  # of the ratio of mean log-probabilities [R]
    kl_weight: float = 0.04  # of the KL to the start [R]; 0 loads no reference policy
    advantage_clip: float = 5.0  # standard deviations [R]
    advantage_spread: str = "group"  # whose standard deviation: the paper's group, or "batch" [R]
    settled: float = 0.2  # as NPEditConfig: the same requests
    pool: int | None = None
    task: str = "edit"

    def __post_init__(self):
        super().__post_init__()
        if self.group < 2 or self.batch % self.group:
            raise ConfigError(f"batch is {self.batch} and group {self.group}; a group needs at least 2 samples, and the batch whole groups")
        if self.sampler_steps < 2:
            raise ConfigError(f"sampler_steps is {self.sampler_steps}; the last step is not random, so there must be at least 2")
        self.check_counts("inner")
        if self.noise_level <= 0:
            raise ConfigError(f"noise_level is {self.noise_level}; without noise there is nothing to compare: it must be positive")
        self.check_choices(policy=POLICIES, advantage_spread=("group", "batch"), task=TASKS)

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "group": 2}, "gpu": dict(side=64, batch=1152, group=24, sampler_steps=10)}


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Few-step text-to-image by DMD alone, from the teacher's weights [arXiv:2311.18828, arXiv:2405.14867]."""

    out: str = "runs/distill"
    teacher: str = "runs/teacher/model"
    steps: int = 800
    batch: int = 32
    lr: float = 1.0e-3
    fake_lr: float = 1.0e-3
    betas: tuple[float, float] = (0.5, 0.98)
    weight_decay: float = 0.0
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    guidance: float = 2.0
    dmd_norm: str = "sample"
    fake_updates: int = 3
    sampler_steps: int = 4
    sampler_shift: float = 1.0
