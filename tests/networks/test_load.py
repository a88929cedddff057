"""What is wrong with a model is said before any weight is read: files cut off, parts that are missing, judges and starts of the wrong kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import CPUOffloadPolicy

from vlmedit.errors import ConfigError, InputError
from vlmedit.networks import checks, prompt_cache, sharding
from vlmedit.networks import load as loading
from vlmedit.networks.judges import load_judge
from vlmedit.networks.load import load_transformer
from vlmedit.networks.lora import LORA_FILE, adapter_roles
from vlmedit.testing import random_models as tiny
from vlmedit.testing import resolve
from vlmedit.training import real_models as train


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A whole pipeline, a judge of each answer's spelling, and an adapter of rank 2."""
    folder = tmp_path_factory.mktemp("places")
    found = {**{n: Path(resolve(f"tiny:{n}", folder, "backbone")) for n in ("z-image", "flux")}, **{n: Path(resolve(f"tiny:{n}", folder, "judge")) for n in ("internvl", "smolvlm", "paligemma2")}}
    roles = adapter_roles(tiny.load_backbone(found["z-image"])[0], rank=2)
    roles.student.save(folder / "adapter")
    return {**found, "adapter": folder / "adapter"}


@pytest.fixture
def nothing_is_read(places, monkeypatch):
    """Reading any weight is an error."""

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", refuse)
    monkeypatch.setattr(loading, "load_file", refuse)


unread = pytest.mark.usefixtures("nothing_is_read")


def cut(path: Path, bytes: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-bytes])


# --- weights


@unread
def test_whole_models_have_no_problems(places):
    assert checks.check_backbone(str(places["z-image"])) == []
    for name in ("internvl", "smolvlm", "paligemma2"):  # answers "Yes", " Yes" and "yes"
        assert checks.check_judge(str(places[name])) == []


def test_torn_files_are_told_by_their_header(tmp_path):
    """Cut in its data, in its header, in its length; longer than it says; no safetensors at all."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4, 5), "b": torch.ones(3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    whole = path.read_bytes()
    assert checks.torn(path) is None
    for damaged in (whole[:-1], whole[:40], whole[:3], b"", whole + b"x"):
        path.write_bytes(damaged)
        assert "a.safetensors is cut off or damaged" in checks.torn(path)
        with pytest.raises(SafetensorError):  # as its own reader says
            load_file(path)
    path.write_bytes((5).to_bytes(8, "little") + b"nojsn")
    assert checks.torn(path) == "a.safetensors has no header of safetensors"
    save_file({}, path)
    assert checks.torn(path) is None


PARTS = {
    "transformer/diffusion_pytorch_model.safetensors": "transformer: diffusion_pytorch_model.safetensors is cut off",
    "vae/diffusion_pytorch_model.safetensors": "vae: diffusion_pytorch_model.safetensors is cut off",
    "text_encoder/model.safetensors": "text_encoder: model.safetensors is cut off",
}


@unread
@pytest.mark.parametrize("file", PARTS)
def test_a_backbone_cut_off(places, tmp_path, file):
    half = shutil.copytree(places["z-image"], tmp_path / "half")
    cut(half / file)
    (problem,) = checks.check_backbone(str(half))
    assert PARTS[file] in problem and "download it again" in problem


@unread
def test_parts_that_the_index_names(places, tmp_path):
    """A text encoder without weights or config, no tokenizer, no scheduler; an index that is no JSON."""
    half = shutil.copytree(places["z-image"], tmp_path / "half")
    (half / "text_encoder/model.safetensors").unlink()
    shutil.rmtree(half / "tokenizer")
    (half / "scheduler/scheduler_config.json").unlink()
    problems = checks.check_backbone(str(half))
    assert len(problems) == 3 and all("half" in p for p in problems)
    for part, said in (("text_encoder", "it lacks its weights"), ("tokenizer", "its files are missing"), ("scheduler", "its files are missing")):
        assert sum(f"/{part}: " in p and said in p for p in problems) == 1
    (half / "text_encoder/config.json").unlink()
    assert any("text_encoder: no config.json" in p for p in checks.check_backbone(str(half)))
    (half / "model_index.json").write_text("{")
    (problem,) = checks.check_backbone(str(half))
    assert "model_index.json is no JSON" in problem


# --- judges


def changed(folder: Path, file: str, change) -> None:
    settings = json.loads((folder / file).read_text())
    change(settings)
    (folder / file).write_text(json.dumps(settings))


def spoil(folder: Path, what: str) -> None:
    if what == "cut off":
        cut(folder / "model.safetensors")
    elif what == "small":
        changed(folder, "config.json", lambda c: c["text_config"].update(max_position_embeddings=100))
    elif what == "mute":
        tiny.tokenizer(()).save_pretrained(folder)
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif what == "no JSON":
        (folder / "config.json").write_text("{")


JUDGES = {
    "cut off": "model.safetensors is cut off or damaged",
    "small": "too small for two pictures: .* its context of 100",
    "mute": "writes .* as [0-9]+ tokens",
    "no tokenizer": "okenizer",
    "no JSON": "config.json is no JSON",
}


@unread
@pytest.mark.parametrize("what", JUDGES)
@pytest.mark.parametrize("name", ("internvl", "smolvlm"))
def test_bad_judges(places, tmp_path, name, what):
    """One problem each, by the small files."""
    half = shutil.copytree(places[name], tmp_path / "half")
    spoil(half, what)
    (problem,) = checks.check_judge(str(half))
    assert problem.startswith("judge: ") and re.search(JUDGES[what], problem) and "\n" not in problem


@unread
def test_a_judge_answers_in_its_familys_words(places, tmp_path):
    """PaliGemma says "yes": a tokenizer without "Yes" will do for it, and not for InternVL; settings without a size are named."""
    for name, fine in (("paligemma2", True), ("internvl", False)):
        folder = shutil.copytree(places[name], tmp_path / name)
        tiny.tokenizer(("yes", "no")).save_pretrained(folder)
        assert (checks.check_judge(str(folder)) == []) == fine
    folder = shutil.copytree(resolve("tiny:qwen2.5-vl", tmp_path, "judge"), tmp_path / "q")
    changed(folder, "preprocessor_config.json", lambda s: s.pop("size"))
    (problem,) = checks.check_judge(str(folder))
    assert "settings lack 'size'" in problem


def test_loaders_tell_what_is_cut_off(places, tmp_path):
    """Called without the checks, the loaders name the folder all the same, and a run's frame makes one message of whatever is left."""
    half = shutil.copytree(places["internvl"], tmp_path / "half")
    cut(half / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="half has a config but not all of its weights"):
        load_judge(half)
    half = shutil.copytree(places["z-image"] / "transformer", tmp_path / "transformer")
    cut(half / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileNotFoundError, match="not all of its weights"):
        load_transformer(half)
    for error in (SafetensorError("incomplete metadata"), OSError("no space"), PermissionError("closed")):
        with pytest.raises(InputError, match=str(error)), train.told():
            raise error


# --- where an adapter starts


def settings(places, start, **other):
    return SimpleNamespace(**{"backbone": str(places["z-image"]), "roles": "adapters", "rank": 2, "start": str(start), **other})


@unread
def test_starts(places, tmp_path):
    """A start that fits has no problems; another rank or backbone, a file cut off, and a whole transformer's of another class are told."""
    assert checks.check_start(settings(places, places["adapter"])) == [] == checks.check_start(settings(places, ""))
    (problem,) = checks.check_start(settings(places, places["adapter"], rank=4))
    assert "an adapter of rank 2, and rank is 4" in problem
    (problem,) = checks.check_start(settings(places, places["adapter"], backbone=str(places["flux"])))
    assert "of another backbone" in problem
    half = shutil.copytree(places["adapter"], tmp_path / "half")
    cut(half / LORA_FILE)
    (problem,) = checks.check_start(settings(places, half))
    assert "is cut off or damaged" in problem
    (half / LORA_FILE).unlink()
    assert LORA_FILE in checks.check_start(settings(places, half))[0]
    assert "no folder" in checks.check_start(settings(places, tmp_path / "gone"))[0]
    modules = settings(places, places["z-image"] / "transformer", roles="modules")
    assert checks.check_start(modules) == []
    modules.backbone = str(places["flux"])
    (problem,) = checks.check_start(modules)
    assert "a ZImageTransformer2DModel, and the backbone is a FluxTransformer2DModel" in problem


def test_an_adapter_of_another_rank_is_not_copied(places):
    roles = adapter_roles(tiny.load_backbone(places["z-image"])[0], rank=4)
    with pytest.raises(ConfigError, match="of another rank or backbone: [0-9]+ matrices differ"):
        loading.start_adapter(roles.student, str(places["adapter"]))


# --- prompts


@unread
def test_a_cache_belongs_to_one_place_and_encoder(places, tmp_path):
    """Two folders of one name, and one folder before and after its text encoder was exchanged, have different identities."""
    same = [Path(shutil.copytree(places["z-image"], tmp_path / n / "pipe")) for n in "ab"]
    of = lambda place: prompt_cache.encoder_of(SimpleNamespace(backbone=str(place), text_length=64, precision="no"))
    first, second = map(of, same)
    assert first["backbone"] != second["backbone"] and first["text_encoder"] == second["text_encoder"] and first == of(same[0] / ".." / "pipe")
    changed(same[0] / "text_encoder", "config.json", lambda c: c.update(rope_scaling=3))
    assert of(same[0])["text_encoder"] != first["text_encoder"]
    prompt_cache.PromptCache(tmp_path / "text", first).folder.mkdir()
    (tmp_path / "text/encoder.json").write_text(json.dumps(first))
    for other in (second, of(same[0])):
        with pytest.raises(InputError, match="prompts of another encoder"):
            prompt_cache.PromptCache(tmp_path / "text", other)


# --- shards


@pytest.mark.parametrize("offloaded", (False, True))
def test_shards_that_wait_on_the_cpu_stay_there(places, monkeypatch, offloaded):
    """A judge whose blocks are sharded is moved without its shards; what is not sharded and every buffer moves, a tied weight once. On the
    CPU it answers what it answered before it was sharded."""
    judge = load_judge(places["internvl"])
    judge.model.tied = judge.model.get_input_embeddings()
    ask = lambda: judge.logit_margin([(torch.zeros(3, 32, 32), torch.ones(3, 32, 32))], ["done?"])
    plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=True)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    monkeypatch.setattr(sharding, "CPUOffloadPolicy", type("Pageable", (CPUOffloadPolicy,), {"__init__": lambda self: CPUOffloadPolicy.__init__(self, pin_memory=False)}))
    plugin.cpu_offload = sharding.CPUOffloadPolicy() if offloaded else None
    before = ask().detach()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharding.shard(judge.model, accelerator, "no", root=False)
        shards = {n for n, p in judge.named_parameters() if isinstance(p, sharding.DTensor)}
        torch.testing.assert_close(ask().detach(), before)
        sharding.to_device(judge, torch.device("meta"))
        where = {n: p.device.type for n, p in judge.named_parameters()}
        assert shards and shards == {n for n, d in where.items() if d == "cpu"} and len(shards) < len(where)
        assert {b.device.type for b in judge.buffers()} == {"meta"} and judge.model.tied.weight is judge.model.get_input_embeddings().weight
    finally:
        dist.destroy_process_group()
