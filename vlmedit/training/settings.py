"""Settings of a real run: one frozen dataclass, whose defaults are the released recipe, and the YAML files that ship.

[R] the authors' released configuration, zimage_instruct_critic_internvl.yaml, or code; [P] the paper [arXiv:2510.14978], whose do-nothing share is
known from a report that quotes it. Where we differ, the comment says so and why; what is no setting but a constant is in recipe.py, `FIXED`.
A file of settings is found by its path or, when there is none, by its name among `configs/`; an unknown key is refused with the nearest
known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmedit.config import TIERS, Settings
from vlmedit.errors import ConfigError

if TYPE_CHECKING:
    from vlmedit.methods.npedit import NPEditConfig

CONFIGS = Path(__file__).parent.parent / "configs"
BUCKETS = ("512x512", "576x448", "448x576", "640x384", "384x640", "512x384", "384x512")  # width x height [R]
SHARES = {  # how often each edit type is drawn [R, where material is texture and add is insertion]
    "remove": 0.25, "color": 0.0833, "material": 0.0833, "shape": 0.0833, "add": 0.0833, "replace": 0.0833, "background": 0.0833, "style": 0.0833,
    "action": 0.0833, "text": 0.0837,
}  # fmt: skip
OPTIMIZERS = ("adamw", "muon", "adamw8bit", "paged_adamw8bit")
ROLES = ("modules", "adapters")
CHECKPOINTED = ("backbone", "judge", "codec")
OFFLOADED = ("student", "fake", "teacher", "judge")
SHARDING = ("auto", "fsdp2", "none")
MATCHING = ("dmd", "sid", "pseudo-huber")  # the others read features that only the miniature's networks show
TRACKERS = ("tensorboard", "wandb", "trackio")
QUESTIONS = ("released", "shapes")  # the names of the table in requests.py, in its order: a test compares them


MACHINE = (  # what may differ between runs that share a checkpoint
    "out", "save_every", "steps", "trackers", "strip_every", "compile", "checkpointing", "offload", "sharding", "text_cache",
)  # fmt: skip


@dataclass(frozen=True)
class RealConfig(Settings):
    """NP-Edit on real models. Places are folders or ids of the Hub; "tiny:NAME" builds one of vlmedit.testing.random_models."""

    out: str = "runs/real"
    backbone: str = "Tongyi-MAI/Z-Image"  # a diffusers pipeline: transformer, vae, text encoder [R]
    judge: tuple[str, ...] = ("OpenGVLab/InternVL3-14B-hf",)  # several are an ensemble [R: one]
    data: str = "data/manifest.jsonl"  # a manifest, .jsonl or .parquet, or a folder of shards (tar or parquet): see vlmedit/data/manifest.py
    start: str | None = None  # the student's first weights: `student` of a finished run (a copy warm-up), none is the backbone
    # roles
    roles: str = "modules"  # or adapters: one base, LoRA for student and fake score [R: modules]
    rank: int = 64  # of the adapters
    alpha: float | None = None  # of the adapters; none is the rank
    omni: bool = False  # Z-Image: reference as an image of its own, modulated as clean data [R: True in effect, by its own patch; off here, because no other family has it]
    # data
    buckets: tuple[str, ...] = BUCKETS
    type_shares: dict[str, float] | None = None  # none draws every row alike [R: `SHARES`; not ours, because they name every type that a manifest may hold]
    nothing_share: float = 0.01  # requests replaced by "do nothing" [P; its code R data/instruct.py]
    flip: float = 0.0  # share mirrored left to right [R]; instructions that say left or right, or speak of text, are never mirrored, because they would be wrong
    negative_prompt: str = "low quality, artifacts"  # of the unconditional score [R]
    text_cache: str | None = None  # folder of encoded prompts; none is `out`/text
    text_length: int = 512  # tokens, where the pipeline lets one choose; its default is usually 512
    # updates
    seed: int = 0
    clip: float = 2.0  # gradient norm [R]
    spike: float = 300.0  # gradient norm above which an update is skipped [R]
    steps: int = 14_000  # [R]
    batch: int = 1  # per process [R]
    accumulate: int = 1  # batches per update and process [R]
    lr: float = 2e-5  # [R]
    fake_lr: float = 2e-5  # [R]
    warmup: int = 0  # [R]
    final_lr: float = 1.0  # share of the peak at the end: constant [R]
    betas: tuple[float, float] = (0.0, 0.9)  # [R]
    weight_decay: float = 0.0  # [R]
    optimizer: str = "adamw"  # muon: for matrices, as the miniature's stages use it; adamw8bit and paged_adamw8bit need bitsandbytes [R: adamw]
    ema: float = 0.0  # decay of averaged weights, off as their code has it [R: .999 in the configuration, create_ema=False in DMDTrainer]
    # losses
    matching: str = "dmd"  # [R] [P]
    dmd_weight: float = 1.0  # [R]
    judge_weight: float = 0.02  # [R]
    nothing_weight: float = 1.0  # of the squared distance to the reference, in latents, on do-nothing rows alone [R]
    guidance: float = 3.5  # of the real score [R]
    guidance_strong: float = 7.5  # of the real score for `strong_types` [R]
    strong_types: tuple[str, ...] = ("remove", "shape", "style", "action")  # [R]
    dmd_norm: str = "pixel"  # mean over channels [R]; "sample" is DMD2's
    fake_updates: int = 5  # per student update [R]
    fake_rollouts: str = "fresh"  # of the student, on batches of their own [R]
    calls: str = "mixed"  # one call in a quarter of the updates, otherwise two; the same in every process [R; P: two]
    sampler_steps: int = 4  # [R]
    sampler_shift: float = 6.0  # times 1, .9474, .8571, .6667 [R; P: .90, .70, .47, or .75, .5, .25 in its first version]
    renoise: str = "fresh"  # [R; P: same]
    gradient_calls: int | None = None  # all [R] [P]
    identity: bool = True  # second question; the mean of both losses counts [R; P: their sum]
    answer_loss: str = "two_logits"  # [R] [P]
    questions: str = "released"  # the recipe's two templates per question, in our words; "shapes": in the words of the world of shapes, for its own judge
    gain_steps: int = 2000  # updates in which the gain of its logits grows from 0.1 to 1 [R]
    target_caption: bool = True  # what teacher and fake score read [R] [P]
    # machine
    precision: str = "bf16"  # [R]
    checkpointing: tuple[str, ...] = CHECKPOINTED  # whose blocks are recomputed [R: backbone and judge; the autoencoder here too, for memory]
    codec_precision: str = "fp32"  # of the autoencoder [R]
    offload: tuple[str, ...] = ()  # roles that wait in the CPU's memory while others work
    sharding: str = "auto"  # FSDP2 when accelerate was told so, "fsdp2" always, "none" never
    compile: str | None = None  # torch.compile backend of every block of the backbone, such as inductor
    trust_remote_code: bool = False  # run code that comes with the backbone; a judge's is never run
    trackers: tuple[str, ...] = ("tensorboard",)
    strip_every: int = 100  # updates between picture strips in the trackers
    save_every: int = 250

    def __post_init__(self):
        super().__post_init__()
        self.check_counts("steps", "batch", "save_every")
        if self.spike <= 0:
            raise ConfigError(f"spike is {self.spike}; it must be positive")
        if self.gain_steps < 0:
            raise ConfigError(f"gain_steps is {self.gain_steps}; it must be at least 0")
        self.check_choices(roles=ROLES, optimizer=OPTIMIZERS, sharding=SHARDING, matching=MATCHING, questions=QUESTIONS, codec_precision=("fp32", "bf16"))
        self.npedit()  # its checks hold here too
        for name, allowed in dict(checkpointing=CHECKPOINTED, offload=OFFLOADED, trackers=TRACKERS).items():
            if wrong := [v for v in getattr(self, name) if v not in allowed]:
                raise ConfigError(f"{name} names {', '.join(map(repr, wrong))}; known: {', '.join(allowed)}")
        self.check_counts("accumulate", "rank", "strip_every", "text_length")
        for name in ("nothing_share", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share in [0, 1]")
        if not self.judge:
            raise ConfigError("judge is empty; name at least one vision-language model")
        if not self.buckets:
            raise ConfigError("buckets is empty; name at least one size, such as 512x512")
        for text in self.buckets:
            bucket_of(text)
        if self.type_shares is not None and (not isinstance(self.type_shares, dict) or not self.type_shares or any(not isinstance(v, (int, float)) or v < 0 for v in self.type_shares.values()) or not sum(self.type_shares.values())):
            raise ConfigError(f"type_shares is {self.type_shares!r}; it maps edit types to shares that are at least 0, in a file of settings: type_shares: {{remove: 0.25, color: 0.08}}")
        if self.roles == "adapters" and set(self.offload) - {"judge"}:
            raise ConfigError(f"offload is {', '.join(self.offload)} and roles is 'adapters'; adapters share one base, so only the judge can wait elsewhere: offload=judge")
        if self.offload and self.sharding == "fsdp2":
            raise ConfigError(f"offload is {', '.join(self.offload)} and sharding is 'fsdp2'; sharded weights are offloaded by accelerate's fsdp_offload_params instead")

    def npedit(self) -> NPEditConfig:
        """What `NPEdit` reads, as its own configuration; guidance is the teacher's matter here, by edit type."""
        from vlmedit.methods.npedit import NPEditConfig  # which imports torch; reading settings does not

        names = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(NPEditConfig)}
        ours = {n: getattr(self, n) for n in names - {"guidance", "judge", "data"}}
        return NPEditConfig(**ours, guidance=1.0, skip_above=self.spike, logit_gain_steps=self.gain_steps)

    @property
    def skip_above(self) -> float:
        """What `Optimizer` calls `spike`."""
        return self.spike

    def flat(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.flat(), indent=2) + "\n")

    def differences(self, saved: dict) -> dict[str, tuple]:
        """As `TrainConfig.differences`."""
        plain = lambda values: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        then, now = plain(type(self)().flat() | saved), plain(self.flat())
        return {n: (then.get(n), now[n]) for n in now if n not in MACHINE and then.get(n) != now[n]}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each bucket."""
        return [bucket_of(text) for text in self.buckets]

    @classmethod
    def make(cls, tier: str = "laptop", **overrides):
        """As for every stage; `side` raises ConfigError, because real pictures come in buckets."""
        if "side" in overrides:
            raise ConfigError(f"side is {overrides['side']!r}; a real run's pictures come in buckets: buckets=512x512")
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
        return {"smoke": dict(steps=2, save_every=1)}


@dataclass(frozen=True)
class CopyConfig(RealConfig):
    """Warm-up: the student learns to copy its reference [R zimage_instruct_refcopy.yaml]. Settings of losses and judge are not read."""

    out: str = "runs/real_copy"
    steps: int = 5000  # [R]
    batch: int = 2  # per process [R]
    lr: float = 2e-5  # peak [R]
    warmup: int = 1000  # [R]
    final_lr: float = 0.05  # 1e-6 of 2e-5, cosine [R]
    betas: tuple[float, float] = (0.9, 0.99)  # [R]
    weight_decay: float = 0.01  # [R]
    spike: float = 100.0  # [R]
    ema: float = 0.999  # [R: "default", which is not told; .999 is the main stage's configuration]
    flip: float = 0.5  # [R]
    nothing_share: float = 0.0  # the stage copies anyway
    time_shift: float = 6.0  # of logit-normal times [R: logit-normal weights; drawn so, no draw is spent on a weight near 0]
    text_dropout: float = 0.1  # share of empty prompts [R; what theirs are is not known]


def bucket_of(text: str) -> tuple[int, int]:
    """(width, height) of "512x384", in pixels. Raises ConfigError unless both are multiples of 16."""
    try:
        width, height = (int(part) for part in str(text).lower().split("x"))
    except ValueError:
        raise ConfigError(f"bucket {text!r} is no size; write WIDTHxHEIGHT in pixels, such as 512x384") from None
    if min(width, height) < 16 or width % 16 or height % 16:
        raise ConfigError(f"bucket {text!r}: width and height must be multiples of 16, so that autoencoder and patches divide them")
    return width, height


def shipped() -> dict[str, Path]:
    """The settings that ship, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def find_config(path: Path) -> Path:
    """A file of settings: the path itself, or a shipped one of that name. Raises `ConfigError` when there is neither."""
    path = Path(path)
    if path.is_file():
        return path
    known = shipped()
    if path.stem in known and path.suffix in ("", ".yaml"):
        return known[path.stem]
    near = difflib.get_close_matches(path.stem, known, 1)
    raise ConfigError(f"--config {path}: cannot be read (no such file), and no settings of that name ship{f' (nearest: {near[0]})' if near else ''}; shipped: {', '.join(known)}")
