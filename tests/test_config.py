"""Settings: flat keys find the one dataclass that has them, old names are refused by name, and what is saved makes the
same again."""

import dataclasses
import json
import subprocess
import sys

import pytest

from vlmedit import config as module
from vlmedit import methods
from vlmedit.config import RENAMED, TIERS, WORLD, ManifestConfig, TrainConfig, WorldConfig
from vlmedit.data import requests
from vlmedit.data import world as data
from vlmedit.errors import ConfigError
from vlmedit.methods.copy_warmup import CopyWarmupConfig
from vlmedit.methods.judge import JudgeConfig
from vlmedit.methods.npedit import NPEditConfig
from vlmedit.methods.synthetic_pairs import SyntheticPairsConfig
from vlmedit.methods.teacher import TeacherConfig
from vlmedit.world.edits import ALL_TYPES

CONFIGS = {name: methods.find(name)[0] for name in methods.names()}
MANIFEST = "data/train.jsonl"
LESS = dict(reading_steps=0)  # of the copy warm-up, where there is nothing to read


def fields(config: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config)} - {"place", "data"}


def on_manifest(config: type[TrainConfig], tier: str = "laptop", **given) -> TrainConfig:
    return config.make(tier, **{**(LESS if config is CopyWarmupConfig else {}), "data": MANIFEST, **given})


# --- one name, one place


def test_no_name_stands_in_two_dataclasses():
    """A method's own settings, the world's and a manifest's have no name in common, so a flat key has one home; and
    every method's defaults of its data are settings of such data."""
    assert not fields(WorldConfig) & fields(ManifestConfig)
    for config in CONFIGS.values():
        assert set(config.own()) == fields(config)
        assert not fields(config) & (fields(WorldConfig) | fields(ManifestConfig)), config
        assert config.world.keys() <= fields(WorldConfig) and (config.manifest or {}).keys() <= fields(ManifestConfig)


def test_flat_keys_find_their_place():
    config = NPEditConfig.make(side=16, fulfilled_share=0.4, emphasis=["move"], lr=0.1, judge="mine")
    assert config.data == WorldConfig(side=16, fulfilled_share=0.4, emphasis=("move",)) and config.side == 16
    assert (config.lr, config.judge) == (0.1, ("mine",))
    config = NPEditConfig.make(data=MANIFEST, buckets=["256x128"], flip=0.5, lr=0.1)
    assert (
        config.data == ManifestConfig(MANIFEST, ("256x128",), flip=0.5)
        and config.data.sizes == [(256, 128)]
        and config.lr == 0.1
    )


def test_a_method_s_defaults_of_its_data_hold_until_they_are_overruled():
    """The warm-up mirrors half of a manifest and asks for nothing never; NP-Edit's world holds fulfilled requests, the
    teacher's has none."""
    assert (on_manifest(CopyWarmupConfig).data.flip, on_manifest(CopyWarmupConfig).data.nothing_share) == (0.5, 0.0)
    assert on_manifest(CopyWarmupConfig, flip=0.1).data.flip == 0.1 and on_manifest(NPEditConfig).data.flip == 0.0
    assert (
        NPEditConfig.make().data.fulfilled_share == 0.2
        and TeacherConfig.make().data == TeacherConfig().data == WorldConfig()
    )


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (TeacherConfig, dict(stpes=3), "unknown config key 'stpes' of TeacherConfig; nearest: steps"),
        (JudgeConfig, dict(zzz=3), "unknown config key 'zzz' of JudgeConfig; nearest: data, out, seed, steps"),
        (
            TeacherConfig,
            dict(task="edit"),
            "unknown config key 'task' of TeacherConfig",
        ),  # it draws pictures, not requests
        (
            NPEditConfig,
            dict(data=MANIFEST, side=16),
            f"side is a setting of data=world, and data is '{MANIFEST}'; .*buckets=512x512",
        ),
        (
            NPEditConfig,
            dict(buckets="64x64"),
            "buckets is a setting of pictures from a manifest, and data is 'world'; name it: data=",
        ),
        (TeacherConfig, dict(buckets="64x64"), "unknown config key 'buckets' of TeacherConfig"),
        (
            TeacherConfig,
            dict(data=MANIFEST),
            f"data is '{MANIFEST}'; a manifest does not hold what TeacherConfig's method is trained on, the world does",
        ),
        (
            CopyWarmupConfig,
            dict(data=MANIFEST),
            "reading_steps is 500; instructions to read come from data=world: set reading_steps=0",
        ),
    ],
)
def test_a_key_without_a_place_is_told(config, given, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        config.make(**given)


def test_an_unknown_tier_names_the_tiers():
    with pytest.raises(ConfigError, match="unknown tier 'huge'; known: smoke, laptop, gpu"):
        TrainConfig.make("huge")


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_of_before_is_refused_by_its_new_one(name):
    """By every method that has the setting today, and some method has; by the others as a key that nobody knows."""
    told = 0
    for config in CONFIGS.values():
        if name in config.known():
            continue
        there = RENAMED[name].split()[0] in config.known()
        with pytest.raises(
            ConfigError,
            match=f"^unknown config key '{name}' of {config.__name__}; " + ("it is called" if there else "nearest"),
        ) as error:
            config.make(**{name: 1})
        assert not there or str(error.value).endswith(f"it is called {RENAMED[name]} now")
        told += there
    assert told


def test_choices_are_those_of_the_world():
    """The settings state the words that they know, and import nobody who has them."""
    assert (
        module.EDIT_TYPES == ALL_TYPES
        and module.TASKS == tuple(data.TASKS)
        and module.QUESTIONS == tuple(requests.QUESTIONS)
    )
    found = subprocess.run(
        [sys.executable, "-c", "import sys, vlmedit.config; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {name for name in found.stdout.split() if name.startswith("vlmedit.")}
    assert imported == {"vlmedit.config", "vlmedit.errors"} and not {
        "torch",
        "numpy",
        "PIL",
        "diffusers",
        "transformers",
    } & {*found.stdout.split()}


# --- what a run keeps


@pytest.mark.parametrize("config", (TrainConfig, *CONFIGS.values()))
def test_every_tier_of_every_method_exists_and_round_trips(config, tmp_path):
    """Tiers build, overrides win over them, configs are frozen, and the saved file builds the same config."""
    for tier in TIERS:
        made = config.make(tier, seed=9)
        assert made.seed == 9
        made.save(tmp_path / "config.json")
        again = json.loads((tmp_path / "config.json").read_text())
        assert config.make(**again) == made and again == json.loads(json.dumps(made.flat()))
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.seed = 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.data.side = 1
    assert config.make("smoke", steps=5).steps == 5


@pytest.mark.parametrize("config", [c for c in CONFIGS.values() if c.manifest is not None])
def test_settings_of_a_manifest_round_trip_too(config):
    for tier in TIERS:
        made = on_manifest(config, tier, type_shares={"add": 0.5, "remove": 1.5}, buckets=["64x32"], nothing_share=0.2)
        assert config.make(**json.loads(json.dumps(made.flat()))) == made and made.flat()["data"] == MANIFEST


def test_the_same_but_for_some():
    """`replace` gives an equal configuration with other values, of the method and of its data alike, checked as any;
    the old one stays."""
    config = NPEditConfig.make("smoke", side=16, seed=3)
    other = config.replace(lr=0.5, task="customise", fulfilled_share=0.0)
    assert (other.lr, other.data.task, other.seed, other.side, other.steps) == (0.5, "customise", 3, 16, 2)
    assert config.lr == 1e-3 and config.data.task == "edit" and config.replace() == config
    with pytest.raises(ConfigError, match="lr is -1"):
        config.replace(lr=-1.0)
    with pytest.raises(ConfigError, match="nearest: lr"):
        config.replace(lrr=1.0)


def test_differences_are_named_with_both_values():
    """Then and now, of the method's settings and of its data's, as a saved file has them; settings of the machine do
    not count, and one that did not exist then had what is its default today."""
    now = NPEditConfig.make("smoke", side=16)
    saved = json.loads(json.dumps(now.flat()))
    assert now.differences(saved) == {} == now.differences(now.flat())
    assert now.differences({**saved, "side": 32, "lr": 0.5, "betas": [0.1, 0.2]}) == {
        "side": (32, 16),
        "lr": (0.5, 1e-3),
        "betas": ([0.1, 0.2], [0.5, 0.98]),
    }
    for name in now.machine:
        assert now.differences({**saved, name: "elsewhere"}) == {}, name
    assert now.differences({**saved, "forgotten": 7}) == {"forgotten": (7, None)}
    older = {k: v for k, v in saved.items() if k != "guidance"}
    assert now.differences(older) == {} and now.replace(guidance=3.5).differences(older) == {"guidance": (2.0, 3.5)}
    assert now.differences({k: v for k, v in saved.items() if k != "data"}) == {}  # there was the world alone


def test_other_data_are_a_difference():
    """World and manifest tell each other apart, with what only one of them has; two manifests by their place."""
    here, there = NPEditConfig.make(), on_manifest(NPEditConfig)
    found = there.differences(here.flat())
    assert found["data"] == (WORLD, MANIFEST) and found["side"] == (32, None) and found["flip"] == (None, 0.0)
    assert here.differences(there.flat())["data"] == (MANIFEST, WORLD)
    assert there.differences(there.replace(data="other.jsonl").flat()) == {"data": ("other.jsonl", MANIFEST)}


# --- what cannot be


@pytest.mark.parametrize(
    "bad",
    (
        dict(steps=0),
        dict(batch=0),
        dict(side=0),
        dict(save_every=0),
        dict(accumulate=0),
        dict(ema=1.0),
        dict(ema=-0.1),
        dict(lr=0.0),
        dict(precision="fp64"),
    ),
)
def test_impossible_settings_are_named(bad):
    """Each message carries the setting's name and value."""
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"^{key} is '?{value}"):
        TrainConfig.make(**bad)


IMPOSSIBLE = (
    ("npedit", dict(guidance=float("nan"))), ("npedit", dict(judge_weight=-0.1)), ("npedit", dict(request_limit=0)),
    ("npedit", dict(sampler_steps=0)),
    ("npedit", dict(sampler_shift=-1.0)),
    ("npedit", dict(lr="fast")), ("npedit", dict(batch=2.5)), ("npedit", dict(warmup=True)),
    ("judge", dict(size="huge")), ("judge", dict(attack_share=2)), ("judge", dict(attack_radius=-1)),
    ("flow_grpo", dict(kl_weight=-1)), ("flow_grpo", dict(ratio_clip=0)), ("teacher", dict(text_dropout=1.5)),
    ("cyclegan_turbo", dict(critic_lr=0.0)),
    ("npedit", dict(optimizer="sgd")), ("npedit", dict(roles="copies")), ("npedit", dict(sharding="zero")),
    ("npedit", dict(frozen_precision="fp8")), ("npedit", dict(rank=0)),
    ("npedit", dict(fulfilled_share=1.0)), ("npedit", dict(task="paint")),
)  # fmt: skip


@pytest.mark.parametrize("method, bad", IMPOSSIBLE, ids=[f"{method} {next(iter(bad))}" for method, bad in IMPOSSIBLE])
def test_impossible_settings_of_a_method_are_named(method, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"^{key} is '?{value}'?; (it must be|it is|known)"):
        CONFIGS[method].make(**bad)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (dict(buckets="wide"), "bucket 'wide' is no size; write WIDTHxHEIGHT"),
        (dict(buckets="500x512"), "bucket '500x512': width and height must be multiples of 16"),
        (dict(buckets=[]), "buckets is empty; name at least one size"),
        (dict(type_shares={"add": -1}), "type_shares is {'add': -1}; it maps edit types to shares"),
        (dict(type_shares={"add": 0}), "type_shares is {'add': 0}; it maps edit types to shares"),
        (dict(questions="polite"), "questions is 'polite'; known: released, shapes"),
        (dict(flip=2), "flip is 2; it is a share"),
        (dict(text_length=0), "text_length is 0; it must be at least 1"),
        (dict(matching="mmd"), "matching is 'mmd'; known: dmd, sid, pseudo-huber"),
        (
            dict(gan_weight=0.5),
            "gan_weight is 0.5; its discriminator reads features that only the world's own networks show",
        ),
    ],
)
def test_impossible_settings_of_a_manifest_are_named(bad, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        on_manifest(NPEditConfig, **bad)


@pytest.mark.parametrize(
    ("config", "bad", "told"),
    [
        (NPEditConfig, dict(trackers=["paper", "wandb"]), "trackers names 'paper'; known: tensorboard, wandb, trackio"),
        (NPEditConfig, dict(checkpointing="vae"), "checkpointing names 'vae'; known: backbone, judge, codec"),
        (NPEditConfig, dict(offload="codec"), "offload names 'codec'; known: student, fake, teacher, judge"),
        (
            NPEditConfig,
            dict(offload=["fake", "judge"], roles="adapters"),
            "offload is fake, judge and roles is 'adapters'; .* offload=judge",
        ),
        (NPEditConfig, dict(offload="fake", sharding="fsdp2"), "offload is fake and sharding is 'fsdp2'"),
        (NPEditConfig, dict(emphasis="fly"), "emphasis names the unknown edit type fly; known: add"),
        (
            SyntheticPairsConfig,
            dict(pair_editor="magic"),
            "pair_editor is 'magic'; known: twins, sdedit, inversion, flowedit",
        ),
        (
            CopyWarmupConfig,
            dict(steps=5, reading_steps=5),
            "reading_steps is 5 of steps 5; leave some steps for copying",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(config, bad, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        config.make(**bad)
