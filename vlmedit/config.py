"""Settings: frozen dataclasses of flat literals, each with its unit and source, and how a flat file becomes one.

A run's settings are those of its method (`NPEditConfig` in methods/npedit.py and so on), which extend `TrainConfig`: run, optimization and
machine; and those of its data, `config.data`: a `WorldConfig` where the place `data` is "world", otherwise a `ManifestConfig`. Files and
`--set` are flat: `make` gives every key to the one dataclass that has it.

`TIER` is the one dial: smoke (seconds, for tests), laptop (the shipped checkpoints), gpu (a larger world).
Sources: [R] the authors' released configuration, [P] the paper [arXiv:2510.14978], [X] measured here (papers/log.md). Defaults are the
miniature's; `configs/zimage_internvl.yaml` is the released recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vlmedit.errors import ConfigError

TIERS = ("smoke", "laptop", "gpu")
WORLD = "world"  # the place of data that are drawn, not read
POSITIVE = (
    "lr", "fake_lr", "critic_lr", "clip", "skip_above", "time_shift", "sampler_shift", "ratio_clip", "advantage_clip",
    "request_limit", "sampler_steps", "alpha",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "logit_gain_steps", "warmup", "attack_from", "attack_steps", "attack_radius", "weight_decay", "fake_updates",
    "strip_every",
)  # and every weight  # fmt: skip
SHARES = ("final_lr", "text_dropout", "attack_share", "mismatch", "nothing_share", "flip", "instruction_share")  # in [0, 1]
OPTIMIZERS = ("muon", "adamw", "adamw8bit", "paged_adamw8bit")
TRACKERS = ("tensorboard", "wandb", "trackio")
ROLES = ("modules", "adapters")
RECOMPUTED = ("backbone", "judge", "codec")
OFFLOADED = ("student", "fake", "teacher", "judge")
SHARDING = ("auto", "fsdp2", "none")
QUESTIONS = ("released", "shapes")  # wordings of the judge's questions: see vlmedit/data/requests.py
TASKS = ("edit", "customise", "both")  # of the world: see vlmedit/data/world.py
EDIT_TYPES = ("add", "remove", "replace", "recolor", "texture", "background", "move", "style", "nothing", "customise")
BUCKETS = ("512x512", "576x448", "448x576", "640x384", "384x640", "512x384", "384x512")  # width x height [R]
RENAMED = {  # settings by the name that they had before 0.2
    "backbone": "teacher", "start": "student", "second": "judge (a second name in it)", "guidance_strong": "guidance_by_type",
    "strong_types": "guidance_by_type", "spike": "skip_above", "settled": "fulfilled_share", "pool": "request_limit",
    "gain_steps": "logit_gain_steps", "maker": "pair_editor", "maker_start": "pair_editor_start",
    "maker_steps": "pair_editor_steps", "follow": "target_decay",
}  # fmt: skip


class Settings:
    """The checks that every dataclass of settings shares."""

    def __post_init__(self) -> None:
        self.check_numbers()

    def check_numbers(self) -> None:
        """Raise `ConfigError` for a number that is none, is not finite, or lies where its kind of setting cannot."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value, kind = field.name, getattr(self, field.name), str(field.type)
            if not kind.startswith(("int", "float")) or (value is None and "None" in kind):
                continue
            whole = kind.startswith("int")
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
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

    def check_words(self, **known: Iterable[str]) -> None:
        """Raise `ConfigError` for a list that holds other words than those known for it."""
        for name, words in known.items():
            if wrong := [v for v in getattr(self, name) if v not in words]:
                raise ConfigError(f"{name} names {', '.join(map(repr, wrong))}; known: {', '.join(words)}")


@dataclass(frozen=True)
class WorldConfig(Settings):
    """The world of shapes, drawn while training."""

    place: str = WORLD
    side: int = 32  # pixels
    task: str = "edit"  # edit, customise or both
    emphasis: tuple[str, ...] = ()  # edit types drawn twice as often as usual
    fulfilled_share: float = 0.0  # of requests that are fulfilled already, where a type allows it: more rows with target = reference
    request_limit: int | None = None  # distinct training requests; None is unlimited

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("side")
        self.check_choices(task=TASKS)
        if not 0 <= self.fulfilled_share < 1:
            raise ConfigError(f"fulfilled_share is {self.fulfilled_share}; it is a share in [0, 1)")
        if unknown := sorted(set(self.emphasis) - set(EDIT_TYPES)):
            raise ConfigError(f"emphasis names the unknown edit type {', '.join(unknown)}; known: {', '.join(EDIT_TYPES)}")


@dataclass(frozen=True)
class ManifestConfig(Settings):
    """Pictures with requests, read from a manifest or from shards: see vlmedit/data/manifest.py."""

    place: str = "data/manifest.jsonl"  # a manifest, .jsonl or .parquet, or a folder of shards, tar or parquet
    buckets: tuple[str, ...] = BUCKETS  # WIDTHxHEIGHT in pixels
    type_shares: dict[str, float] | None = None  # how often each edit type is drawn; None draws every row alike
    nothing_share: float = 0.01  # requests replaced by "do nothing" [P]
    flip: float = 0.0  # share mirrored left to right; never where the words would be wrong [R]
    negative_prompt: str = "low quality, artifacts"  # of the unconditional score [R]
    questions: str = "released"  # wording of the judge's questions; "shapes" for the world's own judge
    text_cache: str | None = None  # folder of encoded prompts; None is `out`/text
    text_length: int = 512  # tokens, where the pipeline lets one choose; its default is usually 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(questions=QUESTIONS)
        self.check_counts("text_length")
        if not self.buckets:
            raise ConfigError("buckets is empty; name at least one size, such as 512x512")
        _ = self.sizes
        shares = self.type_shares
        if shares is not None and not (isinstance(shares, dict) and shares and all(map(is_share, shares.values())) and sum(shares.values())):
            example = "type_shares: {remove: 0.25, color: 0.08}"
            raise ConfigError(f"type_shares is {shares!r}; it maps edit types to shares that are at least 0, in a file of settings: {example}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each bucket."""
        return [bucket_of(text) for text in self.buckets]


def is_share(value: Any) -> bool:
    """Whether it is a number that is at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def bucket_of(text: str) -> tuple[int, int]:
    """(width, height) of "512x384", in pixels. Raises ConfigError unless both are multiples of 16."""
    try:
        width, height = (int(part) for part in str(text).lower().split("x"))
    except ValueError:
        raise ConfigError(f"bucket {text!r} is no size; write WIDTHxHEIGHT in pixels, such as 512x384") from None
    if min(width, height) < 16 or width % 16 or height % 16:
        raise ConfigError(f"bucket {text!r}: width and height must be multiples of 16, so that autoencoder and patches divide them")
    return width, height


@dataclass(frozen=True)
class TrainConfig(Settings):
    """What every method has: run, optimization, machine."""

    world: ClassVar[dict[str, Any]] = {"side": 32}  # settings of the world that the method reads, with its defaults
    manifest: ClassVar[dict[str, Any] | None] = None  # its defaults for data from a manifest; None: it cannot be trained on them

    data: WorldConfig | ManifestConfig = None  # type: ignore[assignment] # by default the world; in flat settings `data` is its place
    out: str = "runs/run"  # run folder: checkpoints, logs, metrics
    seed: int = 0
    steps: int = 1000  # updates
    batch: int = 64  # samples per batch
    accumulate: int = 1  # batches per update and process
    lr: float = 2e-3  # peak, of all optimizers alike [X]
    warmup: int = 100  # updates of linear warm-up
    final_lr: float = 0.02  # share of the peak at the end of the cosine
    optimizer: str = "muon"  # Muon for matrices and AdamW for the rest [X]; or adamw for all, in 32 or 8 bits
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW
    weight_decay: float = 0.01
    clip: float = 2.0  # gradient norm [R]
    skip_above: float = 300.0  # gradient norm above which an update is skipped [R]
    ema: float = 0.998  # decay of the averaged weights; 0 keeps none
    precision: str = "bf16"  # autocast: bf16 or no
    save_every: int = 500  # updates between checkpoints
    trackers: tuple[str, ...] = ("tensorboard",)
    strip_every: int = 0  # updates between picture strips on disk and in the trackers; 0 writes none

    # what may differ between runs that share a checkpoint
    machine: ClassVar[tuple[str, ...]] = ("out", "save_every", "steps", "trackers", "strip_every")

    def __post_init__(self) -> None:
        if self.data is None:
            object.__setattr__(self, "data", WorldConfig(**self.world))
        super().__post_init__()
        self.check_counts("steps", "batch", "accumulate", "save_every")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must lie in [0, 1)")
        self.check_choices(precision=("bf16", "no"), optimizer=OPTIMIZERS)
        self.check_words(trackers=TRACKERS)

    @property
    def side(self) -> int:
        """Pixels of the world's pictures."""
        return self.data.side  # type: ignore[union-attr]

    @classmethod
    def own(cls) -> dict[str, Any]:
        """The method's own settings by name, with their types."""
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "data"}

    @classmethod
    def of_data(cls, place: str) -> dict[str, Any]:
        """The settings of its data that the method reads, with their types. Raises ConfigError for data that it cannot use."""
        if place != WORLD and cls.manifest is None:
            raise ConfigError(
                f"data is {place!r}; a manifest does not hold what {cls.__name__}'s method is trained on, the world does: data=world"
            )
        kind = WorldConfig if place == WORLD else ManifestConfig
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind) if f.name != "place"]
        return {name: hints[name] for name in names if place != WORLD or name in cls.world}

    @classmethod
    def known(cls, place: str = WORLD) -> dict[str, Any]:
        """All settings by their flat names, with their types."""
        return {"data": str, **cls.own(), **cls.of_data(place)}

    @classmethod
    def make(cls, tier: str = "laptop", **flat: Any) -> Self:
        """The method's settings at a tier, with overrides. Raises `ConfigError` for an unknown tier or key."""
        if tier not in TIERS:
            raise ConfigError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
        place = str(flat.pop("data", WORLD))
        known = cls.known(place)
        for key in flat:
            check_key(cls, key, known, place)
        at_tier = {k: v for k, v in cls.tiers().get(tier, {}).items() if k in known}
        kind, defaults = (WorldConfig, cls.world) if place == WORLD else (ManifestConfig, cls.manifest or {})
        merged = {k: fitted(v, known[k]) for k, v in {**defaults, **at_tier, **flat}.items()}
        data = kind(place=place, **{k: merged.pop(k) for k in cls.of_data(place) if k in merged})
        return cls(data=data, **merged)

    @classmethod
    def tiers(cls) -> dict[str, dict[str, Any]]:
        """Flat overrides of each tier."""
        return {"smoke": dict(steps=2, batch=4, warmup=1, save_every=1)}

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names, as `make` takes them."""
        place = self.data.place
        mine, read = ({n: getattr(of, n) for n in names} for of, names in ((self, self.own()), (self.data, self.of_data(place))))
        return {"data": place, **mine, **read}

    def replace(self, **flat: Any) -> Self:
        """The same settings but for these."""
        return self.make("laptop", **{**self.flat(), **flat})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.flat(), indent=2) + "\n")

    def differences(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Which settings a run with the flat settings `saved` had otherwise: name -> (then, now). A setting that did not exist then had what
        is its default today; settings of the machine do not count."""
        place = str(saved.get("data", WORLD))
        plain = lambda v: list(v) if isinstance(v, tuple) else v
        default = {} if place != self.data.place else type(self).make("laptop", data=place).flat()
        then, now = {k: plain(v) for k, v in {**default, **saved}.items()}, {k: plain(v) for k, v in self.flat().items()}
        names = [n for n in {**now, **then} if n not in self.machine]
        return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


@dataclass(frozen=True)
class BackboneConfig(TrainConfig):
    """What methods share that train the shape world's transformer or a real one behind the same interface. Places are folders, ids of the
    Hub, or "tiny:NAME", which builds one of vlmedit.testing."""

    teacher: str = "runs/teacher/model"  # a trained DiT, or a diffusers pipeline: transformer, vae, text encoder
    student: str | None = "runs/copy_warmup/model"  # its first weights; None is the teacher's
    roles: str = "modules"  # or adapters: one base, LoRA for student and fake score
    rank: int = 64  # of the adapters
    alpha: float | None = None  # of the adapters; None is the rank
    omni: bool = False  # Z-Image: the reference as an image of its own, modulated as clean data
    frozen_precision: str = "fp32"  # of the frozen weights: teacher, judge, text encoder
    codec_precision: str = "fp32"  # of the autoencoder
    checkpointing: tuple[str, ...] = ()  # whose blocks are recomputed on the way back
    offload: tuple[str, ...] = ()  # roles that wait in the CPU's memory while others work
    sharding: str = "auto"  # FSDP2 when accelerate was told so, "fsdp2" always, "none" never
    compile: str | None = None  # torch.compile backend of every block of the backbone, such as inductor
    trust_remote_code: bool = False  # run code that comes with the backbone; a judge's is never run

    machine = (*TrainConfig.machine, "compile", "checkpointing", "offload", "sharding", "text_cache")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(roles=ROLES, sharding=SHARDING, codec_precision=("fp32", "bf16"), frozen_precision=("fp32", "bf16"))
        self.check_words(checkpointing=RECOMPUTED, offload=OFFLOADED)
        self.check_counts("rank")
        waiting = ", ".join(self.offload)
        if self.roles == "adapters" and set(self.offload) - {"judge"}:
            raise ConfigError(f"offload is {waiting} and roles is 'adapters'; adapters share one base, so only the judge can wait elsewhere: offload=judge")
        if self.offload and self.sharding == "fsdp2":
            raise ConfigError(f"offload is {waiting} and sharding is 'fsdp2'; sharded weights are offloaded by accelerate's fsdp_offload_params instead")


def check_key(config: type[TrainConfig], key: str, known: dict[str, Any], place: str) -> None:
    """Raise `ConfigError` for a setting that the method does not have with such data, naming what it is called, or the nearest."""
    if key in known:
        return
    if place != WORLD and key in config.world:
        raise ConfigError(f"{key} is a setting of data=world, and data is {place!r}; pictures of a manifest come in buckets: buckets=512x512")
    if place == WORLD and config.manifest is not None and key in {f.name for f in dataclasses.fields(ManifestConfig)}:
        raise ConfigError(f"{key} is a setting of pictures from a manifest, and data is {place!r}; name it: data={ManifestConfig.place}")
    if key in RENAMED and RENAMED[key].split()[0] in known:
        raise ConfigError(f"unknown config key {key!r} of {config.__name__}; it is called {RENAMED[key]} now")
    near = difflib.get_close_matches(key, list(known), 3) or list(known)
    raise ConfigError(f"unknown config key {key!r} of {config.__name__}; nearest: {', '.join(near)}")


def fitted(value: Any, hint: Any) -> Any:
    """A list as the tuple that a setting holds, and one word as a tuple of one."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if any(typing.get_origin(k) is tuple for k in kinds):
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list):
            return tuple(value)
    return value
