"""A whole real run on tiny random models: end to end, resumed, in two precisions, and refused where it must be."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline
from helpers.tiny_models import saved_elements
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vlmedit.cli import main
from vlmedit.cli._settings import read_settings, typed
from vlmedit.cost import calls, counting, plan, table
from vlmedit.data.layouts import read_items
from vlmedit.data.manifest import Feed, Order, load_fitted, nearest, read_manifest, texts_of
from vlmedit.data.shards import write_shards
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.errors import ConfigError, InputError
from vlmedit.flow import few_step_times, guide, sample
from vlmedit.networks import load as loading
from vlmedit.networks import prompt_cache
from vlmedit.networks.backbones import families
from vlmedit.networks.backbones._base import Backbone, pack, unpack
from vlmedit.networks.prompt_cache import PromptCache, pipeline_encoder
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable
from vlmedit.pipelines.export import ABOUT, CODE, export, push_to_hub
from vlmedit.pipelines.shapes import to_pixels
from vlmedit.pipelines.standalone import standalone
from vlmedit.seeds import rng_for
from vlmedit.testing import resolve
from vlmedit.training import real_models as train
from vlmedit.training import trackers
from vlmedit.training.offload import Offloaded
from vlmedit.training.real_models import Guided, RealEdit, Setup, train_copy, train_real
from vlmedit.training.settings import CONFIGS, CopyConfig, RealConfig, find_config, shipped

BACKBONES = ("z-image", "flux")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """Pipelines, judge and data on disk, and the prompts encoded once per pipeline."""
    folder = tmp_path_factory.mktemp("places")
    found = {name: resolve(f"tiny:{name}", folder, "backbone") for name in BACKBONES}
    return {**found, "judge": resolve("tiny:internvl", folder, "judge"), "data": resolve("tiny:shapes", folder, "data"), "folder": folder}


@pytest.fixture
def settings(places, tmp_path):
    """Settings of a run by overrides."""
    base = read_settings(CONFIGS / "tiny.yaml")

    def make(backbone="z-image", **overrides) -> dict:
        text = str(places["folder"] / f"text-{Path(backbone).name}-{overrides.get('precision', 'no')}")
        if backbone in families() and backbone not in places:
            places[backbone] = resolve(f"tiny:{backbone}", places["folder"], "backbone")
        own = dict(backbone=places.get(backbone, backbone), judge=[places["judge"]], data=places["data"], text_cache=text, out=str(tmp_path / "run"), trackers=[])
        return {**base, **own, **overrides}

    return make


def parquet_of(manifest: str) -> str:
    """The manifest as parquet shards, where parquet can be written."""
    if not importlib.util.find_spec("pyarrow"):
        return manifest
    out = Path(manifest).parent / "parquet"
    write_shards(read_items(manifest), out, "parquet")
    return str(out)


def config_of(given: dict, config_class=RealConfig) -> RealConfig:
    return config_class.make("laptop", **typed(config_class, given))


def editor(given: dict) -> tuple[RealEdit, Setup]:
    """Everything loaded as a run loads it, before its first update."""
    setup = Setup(config_of(given))
    judge = loading.load_judges(setup.config, setup.questions, setup.run.accelerator)
    return RealEdit(setup.config, setup.roles, judge, setup.codec, setup.run.device), setup


def moved(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


# --- the run


def test_a_run_from_the_command_line(tmp_path, capfd):
    """`train npedit --config tiny` builds its models, encodes its prompts, trains, and leaves an adapter that a stock transformer takes; the
    same command again has nothing to do."""
    out = tmp_path / "run"
    command = ["train", "npedit", "--config", "configs/tiny.yaml", "--set", "steps=2", "trackers=tensorboard", "--out", str(out), "--json", str(tmp_path / "r.json")]
    assert main(command) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["updates"] == 2 and {"judge_loss", "fake_loss", "gradient_dmd", "seconds_judge"} <= record["metrics"].keys()
    assert list(out.glob("vlmedit/events*")) and Image.open(out / "strips" / "000002.png").width > 200
    from diffusers import ZImageTransformer2DModel

    stock = ZImageTransformer2DModel.from_pretrained(out / "tiny/backbone/z-image/transformer")
    stock.load_lora_adapter(out / "model", prefix=None, weight_name=loading.LORA_FILE)
    saved = load_file(out / "model" / loading.LORA_FILE)
    assert any(v.any() for k, v in saved.items() if "lora_B" in k)
    assert sum("lora" in n for n, _ in stock.named_parameters()) == len(saved)
    capfd.readouterr()
    assert main(command) == 0 and "nothing left to do" in capfd.readouterr().err


@pytest.mark.parametrize("backbone, roles", [("z-image", "adapters"), ("flux", "modules")])
def test_a_resumed_run_is_the_uninterrupted_one(settings, places, tmp_path, backbone, roles):
    """Killed in the third update of three, with a checkpoint every two, on a manifest and on parquet shards: weights of both roles, average, moments and data position end bit for
    bit as those of a run without interruption."""
    data = parquet_of(places["data"]) if roles == "modules" else places["data"]
    given = settings(backbone, data=data, roles=roles, steps=3, batch=1, accumulate=2, fake_rollouts="shared" if roles == "modules" else "fresh", strip_every=100)
    for name in ("whole", "killed"):
        config = config_of({**given, "out": str(tmp_path / name)})
        for step in train_real(config):
            if name == "killed" and step.index == 3:
                break
        if name == "killed":
            assert json.loads((tmp_path / "killed/checkpoint/state.json").read_text())["step"] == 2
            assert [s.index for s in train_real(config)] == [3]
    whole, killed = (tmp_path / n / "checkpoint" for n in ("whole", "killed"))
    for file in ("model", "fake", "model.ema"):
        a, b = load_file(whole / f"{file}.safetensors"), load_file(killed / f"{file}.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    a, b = (torch.load(p / "optimizers.pt", weights_only=True) for p in (whole, killed))
    assert a["data"] == b["data"] and a["data"]["drawn"] >= 2 * 3 * (1 if roles == "modules" else 2)
    for role in ("model", "fake"):
        for i, state in a[role][0]["state"].items():
            assert all(torch.equal(v, b[role][0]["state"][i][k]) for k, v in state.items())
    other = config_of({**given, "out": str(tmp_path / "whole"), "judge_weight": 0.5})
    with pytest.raises(ConfigError, match="judge_weight: 0.02 there, 0.5 now"):
        next(iter(train_real(other)))


def test_roles_can_wait_on_the_cpu(settings, monkeypatch):
    """Two updates with every role waiting while others work end with the weights of two updates without; weights were elsewhere meanwhile,
    a frozen role's home is never written, and nobody is missing when it is called."""
    states, away = [], []
    leave = Offloaded.leave

    def watch(self):
        away.append(bool(self.homes) and all(p.data_ptr() != home.data_ptr() for p, home in self.homes.items()))
        leave(self)

    monkeypatch.setattr(Offloaded, "leave", watch)
    for offload in ((), ("student", "fake", "teacher", "judge")):
        given = settings("flux", roles="modules", steps=2, offload=list(offload), out=str(Path(settings()["out"]) / f"{len(offload)}"))
        list(train_real(config_of(given)))
        states.append(load_file(Path(given["out"]) / "checkpoint/model.safetensors"))
    assert moved(*states) == 0 and sum(away) > 4
    module = nn.Linear(3, 3).requires_grad_(False)
    home = module.weight.data_ptr()
    waiting = Offloaded(module, torch.device("cpu"))
    waiting.enter()
    module.weight.data.add_(1)
    waiting.leave()
    assert module.weight.data_ptr() == home and module.weight.abs().max() < 1


def test_copy_warmup_starts_a_run(settings, tmp_path, monkeypatch):
    """The warm-up's loss is finite and its student, saved with its mode, is what a run with `start` begins with: of modules and of adapters.
    The student alone is loaded for it, and a dropped prompt is the empty one, not the negative one."""
    read, asked, encode, load = [], [], Backbone.encode_text, train.load_backbone
    monkeypatch.setattr(train, "load_backbone", lambda *given: (read.append(given), load(*given))[1])
    monkeypatch.setattr(Backbone, "encode_text", lambda self, numbers: (asked.append(numbers), encode(self, numbers))[1])
    for roles, backbone in (("modules", "flux"), ("adapters", "z-image")):
        given = settings(backbone, roles=roles, steps=2, lr=1e-2, warmup=1, ema=0.0, text_dropout=1.0, omni=backbone == "z-image", out=str(tmp_path / roles))
        asked.clear()
        steps = list(train_copy(config_of(given, CopyConfig)))
        assert all(0 < s.metrics["loss"] < 100 and s.metrics["gradient_norm"] > 0 for s in steps)
        assert len(read) == 1  # of the modules; adapters have a loader of their own
        empty = PromptTable("low quality, artifacts", texts_of(read_manifest(given["data"]))).number("")
        assert empty > 0 and {n for numbers in asked for n in numbers.flatten().tolist()} == {empty}
        assert json.loads((tmp_path / roles / "model" / train.MODE_FILE).read_text()) == {"omni": given["omni"]}
        after = load_file(tmp_path / roles / "checkpoint/model.safetensors")
        onward = {k: v for k, v in given.items() if k != "text_dropout"}
        begun = Setup(config_of({**onward, "start": str(tmp_path / roles / "model"), "out": str(tmp_path / f"{roles}-on")})).roles
        assert moved(after, begun.student.state_dict()) == 0
        if roles == "modules":
            assert moved(begun.student.state_dict(), begun.teacher.state_dict()) > 1e-3
            assert moved(begun.fake.state_dict(), begun.teacher.state_dict()) == 0


# --- trackers and optional optimizers


def recorded(tracker: str, out: Path, home: Path) -> tuple[dict[str, list[int]], dict]:
    """The updates at which each name was recorded, and the configuration; of W&B, whose files are its own, the pictures' updates alone."""
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(out / "vlmedit"), size_guidance={"scalars": 0, "images": 0}).Reload()
        told = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        found = {name: [s.step for s in events.Scalars(name)] for name in events.Tags()["scalars"]}
        return found | {"edits": [s.step for s in events.Images("edits")]}, json.loads(told)
    if tracker == "wandb":
        folders = sorted(out.glob("wandb/offline-run-*"))
        assert len(folders) == 2 and len({f.name.split("-", 3)[3] for f in folders}) == 1  # one run in two parts
        return {"edits": [2, 4] if all(list(f.glob("files/media/images/edits_*.png")) for f in folders) else []}, {}
    found = {}
    with sqlite3.connect(home / "vlmedit.db") as database:
        for step, names in database.execute("select step, metrics from metrics order by step"):
            for name in json.loads(names):
                found.setdefault(name, set()).add(step)
        ((runs,),) = database.execute("select count(distinct run_name) from metrics")
        assert runs == 1
        ((told,),) = database.execute("select config from configs")
    return {name: sorted(steps) for name, steps in found.items()}, json.loads(told)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_holds_every_update_of_a_resumed_run(settings, tmp_path, monkeypatch, tracker):
    """Killed in the fourth update, with a checkpoint after the second: every metric of every update and both strips are in one run of the tracker,
    with the configuration, and TensorBoard shows nothing twice. A finished run that is started again leaves it alone, another run has another
    name, and the processes' connection outlives the tracker."""
    tracker == "tensorboard" or pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [m for m in sys.modules if m.split(".")[0] == "trackio"]:  # it reads its folder when it is imported
        monkeypatch.delitem(sys.modules, module)

    def lost(*_):
        raise AssertionError("processes must still gather the weights")

    monkeypatch.setattr(AcceleratorState, "destroy_process_group", lost)
    config = config_of(settings(trackers=[tracker], batch=1, roles="adapters", strip_every=2, save_every=2))
    for step in train_real(config):
        if step.index == 4:
            break
    name = trackers.tracked_name(tmp_path / "run", 2)
    last = list(train_real(config))[-1]
    assert not list(train_real(config)) and trackers.tracked_name(tmp_path / "run", 4) == name
    found, told = recorded(tracker, tmp_path / "run", tmp_path / "trackio")
    assert found["edits"] in ([2, 4], [2, 4, 4]) and (tmp_path / "run/model").is_dir()
    if tracker != "wandb":
        assert all(found[metric] == [1, 2, 3, 4] for metric in last.metrics) and "cpu_seconds" in found and told["lr"] == config.lr
    assert trackers.tracked_name(tmp_path / "run", 0) != name


def test_a_failing_tracker_ends_no_run(settings, tmp_path, monkeypatch, capsys):
    """One message, and the run goes on to its model without it. One that cannot even start is an error."""
    log = TensorBoardTracker.log
    monkeypatch.setattr(TensorBoardTracker, "log", lambda self, values, step=None: log(self, values, step) if step < 2 else 1 / 0)
    assert len(list(train_real(config_of(settings(trackers=["tensorboard"], steps=3))))) == 3
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard failed and is left out from now on: ZeroDivisionError") == 1 and (tmp_path / "run/model").is_dir()
    monkeypatch.setattr(TensorBoardTracker, "start", lambda self: 1 / 0)
    with pytest.raises(ConfigError, match="trackers is tensorboard, and they did not start: division by zero"):
        next(train_real(config_of(settings(trackers=["tensorboard"], out=str(tmp_path / "other")))))


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_moments_learn_alike(settings, places, tmp_path, name):
    """From the same weights, four updates with moments of 8 bits end within 3 % of the way of those with 32, in a checkpoint of less than half its
    size; killed and resumed, bit for bit where they do without interruption."""
    pytest.importorskip("bitsandbytes")
    given = dict(roles="modules", batch=1, ema=0.0)
    ends = {}
    for optimizer, where in (("adamw", "full"), (name, "eight"), (name, "killed")):
        config = config_of(settings(optimizer=optimizer, out=str(tmp_path / where), **given))
        for step in train_real(config):
            if where == "killed" and step.index == 4:
                break
        if where == "killed":
            list(train_real(config))
        ends[where] = load_file(tmp_path / where / "checkpoint/model.safetensors")
    assert sum(v.numel() >= 4096 for v in ends["full"].values()) > 3  # smaller ones keep 32 bits
    first = Setup(config_of(settings(out=str(tmp_path / "first"), **given))).student.state_dict()
    way = {w: torch.cat([(v - first[k]).flatten() for k, v in sorted(end.items())]) for w, end in ends.items()}
    assert 0 < (way["eight"] - way["full"]).norm() < 0.03 * way["full"].norm()
    assert torch.equal(way["eight"], way["killed"])
    size = {w: (tmp_path / w / "checkpoint/optimizers.pt").stat().st_size for w in ("full", "eight")}
    assert size["eight"] < 0.5 * size["full"]


# --- the update


def test_recomputing_keeps_less_and_changes_nothing(settings):
    """Unroll, decoder and judge together keep less than 0.7 of the elements with all three recomputed, each alone less than none; the
    student's gradients agree to 1e-5 of their size."""
    kept, slopes = {}, []
    for on in ([], ["backbone"], ["judge"], ["codec"], ["backbone", "judge", "codec"]):
        edit, setup = editor(settings(checkpointing=on))
        ((_, batch),) = setup.feed.parts(0)

        def whole():
            torch.manual_seed(3)
            output = edit.edit(batch, (1.0, 0.9))
            return judge_loss(edit.judge, batch, edit.codec.decode(output))[0]

        kept[tuple(on)] = saved_elements(whole)
        if len(on) != 1:
            whole().backward()
            slopes.append(torch.cat([p.grad.flatten() for p in setup.roles.student.parameters() if p.grad is not None]))
    assert all(kept[(part,)] < 0.95 * kept[()] for part in ("backbone", "judge", "codec"))
    assert kept[("backbone", "judge", "codec")] < 0.7 * kept[()]
    assert slopes[0].abs().max() > 0 and (slopes[0] - slopes[1]).norm() < 1e-5 * slopes[0].norm()


def test_bf16_agrees_with_fp32(settings):
    """One update's student gradient under bf16 autocast with a bf16 base points where fp32's does (cosine above 0.95), and every loss
    agrees to 5 %; trained weights and gradients stay fp32."""
    slopes, metrics = [], []
    for precision in ("no", "bf16"):
        edit, setup = editor(settings("flux", precision=precision, judge_weight=1.0))
        ((_, batch),) = setup.feed.parts(0)
        torch.manual_seed(3)
        with setup.run.accelerator.autocast():
            _, m = edit.student_backward(batch, (1.0, 0.9), 10)
        grads = [p.grad for p in setup.roles.student.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        slopes.append(torch.cat([g.flatten() for g in grads]))
        metrics.append(m)
        base = next(p for n, p in setup.roles.student.shared.transformer.named_parameters() if "base_layer.weight" in n)
        assert base.dtype == (torch.float32 if precision == "no" else torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) > 0.95
    assert metrics[1] == pytest.approx(metrics[0], rel=0.05)


def test_guidance_is_by_edit_type(settings):
    """Each row's real score is guided by its own scale, the released 7.5 for removals, shape, style and action and 3.5 otherwise; at 1 the
    unconditional score is never asked."""
    calls = []

    class Scores(nn.Module):
        def forward(self, x, t, text):
            calls.append(text)
            return x * (text.view(-1, 1, 1, 1) + 1.0)

    guided, x, t, text = Guided(Scores()), torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([[2], [5]])
    assert torch.equal(guided(x, t, text), x * torch.tensor([3.0, 6.0]).view(-1, 1, 1, 1)) and len(calls) == 1
    guided.scale = torch.tensor([3.5, 7.5])
    for row, scale in enumerate((3.5, 7.5)):
        torch.testing.assert_close(guided(x, t, text)[row], guide(x[row] * (text[row] + 1.0), x[row], scale))
    edit, setup = editor(settings())
    ((_, batch),) = setup.feed.parts(0)
    batch = replace(batch, types=("remove", "color"))
    torch.manual_seed(0)
    edit.output_gradients(batch, torch.randn(2, 4, 16, 16), 0)
    assert edit.teacher.scale.tolist() == [7.5, 3.5]


def test_blocks_can_be_compiled(settings, monkeypatch):
    """A whole update, rollouts and the three roles through compiled blocks: output, losses and gradients are those of eager blocks (to 1e-4), and
    dynamo compiles variants without giving up on any."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 256)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for backend in (None, "aot_eager"):
        edit, setup = editor(settings(compile=backend, buckets=["64x64"], batch=1))
        ((_, batch),) = setup.feed.parts(0)
        torch.manual_seed(3)
        output, metrics = edit.student_backward(batch, (1.0,), 10)
        metrics["fake_loss"] = edit.fake_backward(output, edit.caption(batch), batch)
        slopes = [torch.cat([p.grad.flatten() for p in role.parameters() if p.grad is not None]) for role in (setup.roles.student, setup.roles.fake)]
        found.append((output, metrics, slopes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    (a, m, g), (b, n, h) = found
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert n == pytest.approx(m, rel=1e-3)
    assert all((x - y).norm() < 1e-4 * x.norm() for x, y in zip(g, h))
    torch._dynamo.reset()


# --- data


def test_the_manifest_becomes_batches(places, settings):
    """Pictures come in buckets of their own aspect ratio, whole batches of one size; requests, prompts and answers are the manifest's."""
    rows = read_manifest(places["data"])
    config = config_of(settings(batch=2, nothing_share=0.0))
    prompts, questions = PromptTable("negative", texts_of(rows)), PromptTable()
    feed = Feed(rows, config, prompts, questions)
    size, sizes = len(prompts.texts), set()
    for k in range(6):
        ((number, batch),) = feed.parts(k)
        assert number == 0 and batch.reference.abs().max() <= 1
        sizes.add(tuple(batch.reference.shape[-2:]))
        for i, words in enumerate(prompts.look_up(batch.instruction)):
            request = next(r.request for r in rows if r.request.instruction == words and r.request.type == batch.types[i])
            assert batch.edit_answer[i] == (request.type != "remove")
    assert len(prompts.texts) == size and prompts.texts[0] == "negative" and sizes == {(64, 64), (48, 96), (96, 48)}
    always = Feed(rows, replace(config, nothing_share=1.0), prompts, questions).parts(0)[0][1]
    assert always.nothing.all() and torch.equal(always.target_caption, always.reference_caption)


def test_the_nearest_bucket_and_what_is_cut(tmp_path):
    """The aspect ratio decides; a picture covers its bucket, and what protrudes is cut off evenly on both sides."""
    sizes = RealConfig().sizes
    for size, bucket in (((1000, 990), 0), ((4032, 3024), 5), ((1080, 1920), 4), ((900, 700), 1)):
        assert nearest(size, sizes) == bucket, size
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    picture = load_fitted(tmp_path / "wide.png", (64, 64))
    assert picture.shape == (3, 64, 64) and (picture[2, :, 4:-4] > 0.9).all() and (picture[0, :, 4:-4] < -0.9).all()


def test_order_uses_every_row_and_resumes():
    """Without shares every row comes once per epoch; with shares types come by them; a restored position goes on exactly; the seed matters."""
    kinds = ["a"] * 6 + ["b"] * 2
    order = Order(kinds, lambda row: row % 2, 2)
    epoch = sorted(row for _ in range(4) for row in order.next()[1])
    assert epoch == list(range(8))
    shared = Order(kinds, lambda row: 0, 1, {"a": 0.2, "b": 0.8})
    drawn = [shared.next()[1][0] for _ in range(400)]
    assert sum(row >= 6 for row in drawn) / 400 == pytest.approx(0.8, abs=0.06)
    for _ in range(3):
        order.next()
    again = Order(kinds, lambda row: row % 2, 2)
    again.load_state_dict(json.loads(json.dumps({"x": order.state_dict()}), object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()})["x"])
    assert [order.next() for _ in range(9)] == [again.next() for _ in range(9)]
    other = Order(kinds, lambda row: row % 2, 2, seed=1)
    assert [other.next() for _ in range(4)] != [Order(kinds, lambda row: row % 2, 2).next() for _ in range(4)]
    with pytest.raises(InputError, match="no share of b"):
        Order(kinds, lambda row: 0, 1, {"a": 1.0})


def test_processes_split_one_order(places, settings):
    """Two processes' batches together are those of one that accumulates both, number by number."""
    rows, config = read_manifest(places["data"]), config_of(settings(batch=1))
    feed = lambda accumulate, *process: Feed(rows, replace(config, accumulate=accumulate), PromptTable("", texts_of(rows)), PromptTable(), *process)
    one, two = feed(2), [feed(1, rank, 2) for rank in range(2)]
    for k in range(3):
        whole = one.parts(k)
        split = [part for f in two for part in f.parts(k)]
        assert [n for n, _ in whole] == [n for n, _ in split] == [0, 1]
        assert all(torch.equal(a.reference, b.reference) and a.types == b.types for (_, a), (_, b) in zip(whole, split))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_are_the_manifest(places, settings, tmp_path, kind):
    """Shards are read in place, and give the manifest's requests and pictures; more processes than shards split their rows, and each gets,
    from a position in the middle, the batches that it gets from the manifest."""
    kind == "tar" or pytest.importorskip("pyarrow")
    rows, config = read_manifest(places["data"]), config_of(settings(batch=2))
    write_shards(read_items(places["data"]), tmp_path / "shards", kind, per_shard=len(rows) - 1)
    packed = read_manifest(tmp_path / "shards")
    assert [r.request for r in packed] == [r.request for r in rows] and not {type(r.image) for r in packed} & {type(r.image) for r in rows}
    for rank in range(3):
        plain, feed, again = (Feed(r, config, PromptTable("", texts_of(rows)), PromptTable(), rank, 3) for r in (rows, packed, packed))
        plain.parts(0), feed.parts(0)
        again.order.load_state_dict(feed.order.state_dict())
        expected = plain.parts(1)
        for other in (feed, again):
            for (n, a), (m, b) in zip(expected, other.parts(1), strict=True):
                assert n == m and a.types == b.types and torch.equal(a.reference, b.reference) and torch.equal(a.instruction, b.instruction)
    fewer = Feed(packed[1:], config, PromptTable("", texts_of(rows)), PromptTable())
    with pytest.raises(InputError, match=f"stopped with {len(rows)} rows of data .* finds {len(rows) - 1} .*name a new out folder"):
        fewer.order.load_state_dict(feed.order.state_dict())


def test_a_table_of_paths_is_a_manifest(places):
    rows = read_manifest(places["data"])
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    lines = [json.loads(line) for line in Path(places["data"]).read_text().splitlines()]
    pandas.DataFrame(lines).to_parquet(Path(places["data"]).parent / "train.parquet")
    assert read_manifest(Path(places["data"]).parent / "train.parquet") == rows


def test_prompts_are_encoded_once(places, tmp_path):
    """What the cache hands out is what the pipeline's own encoder gives; an interrupted filling goes on; another encoder is refused; a
    prompt that is not there is named."""
    encode = pipeline_encoder(places["z-image"], torch.device("cpu"), torch.float32, 64)
    texts, asked = ["negative", "a red dog", "make the dog red", "a house"], []

    def counted(some):
        asked.extend(some)
        return encode(some)

    cache = PromptCache(tmp_path / "text", {"backbone": "z"})
    next(cache.fill(texts, counted, at_once=2))  # stopped after the first shard
    again = PromptCache(tmp_path / "text", {"backbone": "z"})
    assert list(again.fill(texts, counted, at_once=2)) == [2] and asked == texts
    bank = again.embeddings(PromptTable(texts[-1], texts[::-1]))
    for text, states in zip(texts, reversed(list(bank(torch.arange(4)).rows()))):
        assert torch.equal(states, encode([text]).states[0])
    with pytest.raises(InputError, match="prompts of another encoder"):
        PromptCache(tmp_path / "text", {"backbone": "other"})
    with pytest.raises(InputError, match="lacks 1 prompts, the first 'new'"):
        again.embeddings(PromptTable("new"))


# --- the budget


def test_the_dry_run_counts_what_is_loaded(settings, capsys):
    """Parameters and standing bytes per role are those of the loaded models: adapters and modules, bf16 base, codec in fp32; nothing is
    loaded for it; the table is printed."""
    for roles in ("adapters", "modules"):
        given = settings("flux", roles=roles, precision="bf16")
        counted = {r.role: r for r in plan.plan(config_of(given)).roles}
        edit, setup = editor(given)
        size = lambda m: sum(p.numel() for p in m.parameters())
        bytes_of = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())
        for role in ("student", "fake"):
            assert counted[role].parameters == size(getattr(setup.roles, role)) and counted[role].weights == bytes_of(getattr(setup.roles, role))
            assert counted[role].gradients == counted[role].weights and counted[role].moments == 2 * counted[role].weights
        assert counted["judge"].weights == bytes_of(edit.judge) and counted["autoencoder"].weights == bytes_of(edit.codec)
        frozen = setup.roles.teacher if roles == "modules" else [p for n, p in setup.roles.student.shared.transformer.named_parameters() if "lora" not in n]
        assert counted["teacher"].weights == sum(p.numel() * p.element_size() for p in (frozen.parameters() if roles == "modules" else frozen))
    given = ["train", "npedit", "--config", "tiny", "--set", *(f"{k}={v}" for k, v in (("backbone", given["backbone"]), ("data", given["data"]))), "--dry-run", "--out", given["out"]]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("student", "fake", "teacher", "judge", "peak", "TFLOP")) and not Path(given[-1], "text").exists()


def test_settings_change_the_budget_as_they_must(settings):
    """Offload takes weights off the device, shards divide, recomputation and fewer rollouts cost less, 8-bit moments a quarter."""
    base = plan.plan(config_of(settings("flux", roles="modules")))
    having = lambda **kw: plan.plan(config_of(settings("flux", roles="modules", **kw)))
    weights = {r.role: r.weights for r in base.roles}
    moved_out = having(offload=["judge", "teacher"])
    assert base.memory("student") - moved_out.memory("student") == weights["judge"] + weights["teacher"]
    assert base.memory("judge") - moved_out.memory("judge") == weights["teacher"]
    acts = lambda p: sum(r.activations for r in p.roles)
    assert acts(having(checkpointing=[])) > acts(base) and acts(having(batch=4)) == 2 * acts(base)
    flops = lambda p: {r.role: r.flops for r in p.roles}
    assert flops(having(fake_rollouts="shared"))["fake"] < flops(base)["fake"] < flops(having(fake_updates=5))["fake"]
    assert flops(having(checkpointing=[]))["student"] == pytest.approx(flops(base)["student"] * 3 / 4)
    eight = plan.plan(config_of(settings("flux", roles="modules")), 8, True)
    held = sum(r.activations for r in base.roles if r.role == "student")
    codec, judge = (next(r for r in base.roles if r.role == role) for role in ("autoencoder", "judge"))
    alone = codec.standing + judge.whole  # the judge's embeddings and output layer are in no block
    assert 4 * 400 * 32 <= judge.whole < 0.5 * judge.weights
    assert eight.memory("student") - held - alone == pytest.approx((base.memory("student") - held - alone) / 8)


def test_the_released_recipe_is_counted_without_a_network():
    """Z-Image with InternVL3-14B from the published configurations: 6.15 and 15.1 billion parameters; three modules in mixed precision need
    more than one 141 GB device, eight sharded ones do not; adapters fit one."""
    released = plan.plan(config_of(read_settings(CONFIGS / "zimage_internvl.yaml")), 1, False)
    sizes = {r.role: r.parameters / 1e9 for r in released.roles}
    assert sizes["student"] == pytest.approx(6.15, rel=0.005) and sizes["judge"] == pytest.approx(15.1, rel=0.005)
    assert released.peak > 141e9 and replace_processes(released, 8).peak < 80e9
    lora = plan.plan(config_of(read_settings(CONFIGS / "zimage_internvl_lora.yaml")), 1, False)
    assert lora.peak < 80e9


OFFLINE = {  # billions of weights: backbone, judge
    "flux2_klein_qwen3_vl": (3.88, 8.77), "flux_kontext_llava": (11.9, 8.03), "qwen_image_edit_qwen2_5_vl": (20.4, 8.29), "zimage_internvl": (6.15, 15.1),
    "zimage_internvl_lora": (6.15, 15.1), "zimage_refcopy": (6.15, None),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_every_shipped_file_can_be_counted_without_a_network(name, monkeypatch):
    """Every model that a shipped file names is known by its published configuration: its size, and an autoencoder of its latents. (The two
    others make theirs on the spot.)"""
    assert OFFLINE.keys() == shipped().keys() - {"tiny", "shapes"}
    monkeypatch.setattr(calls, "read_json", lambda *_: None)  # no file, no network
    config = config_of(read_settings(shipped()[name]), CopyConfig if name == "zimage_refcopy" else RealConfig)
    backbone, judge = OFFLINE[name]
    transformer, note = calls.meta_transformer.__wrapped__(config.backbone)
    assert counting.parameters(transformer) / 1e9 == pytest.approx(backbone, rel=0.005) and note == "published configuration"
    latents = {"ZImageTransformer2DModel": 16, "FluxTransformer2DModel": 16, "QwenImageTransformer2DModel": 16, "Flux2Transformer2DModel": 128}
    assert calls.meta_codec.__wrapped__(config.backbone)[0].channels == latents[type(transformer).__name__]
    if judge:
        assert counting.parameters(calls.meta_judge.__wrapped__(config.judge[0])[0]) / 1e9 == pytest.approx(judge, rel=0.005)


def test_the_warmup_is_counted_as_it_runs(settings, capsys):
    """`train copy_warmup --dry-run` counts the student and the autoencoder alone, in one part: no judge, no fake score, no moments of one; with
    adapters their base; prompts times bytes are what the cache then holds."""
    for roles in ("modules", "adapters"):
        given = {**settings("flux", roles=roles, precision="bf16"), "text_cache": None}
        given["out"] += roles
        found = plan.plan(config_of(given, CopyConfig))
        setup = Setup(config_of(given, CopyConfig), judged=False)
        counted = {r.role: r for r in found.roles}
        assert list(counted) == (["student", "autoencoder"] if roles == "modules" else ["student", "base", "autoencoder"]) and found.parts == ("student",)
        student = counted["student"]
        assert student.parameters == sum(p.numel() for p in setup.student.parameters()) and student.moments == 8 * student.parameters
        if roles == "modules":
            assert setup.roles is None
        else:
            held = sum(p.numel() * p.element_size() for p in setup.student.shared.transformer.parameters())
            assert student.weights + counted["base"].weights == held
        assert found.peak == sum(r.standing + r.activations for r in found.roles)
        on_disk = sum(t.numel() * t.element_size() for file in Path(given["out"], "text").glob("*.safetensors") for t in load_file(file).values())
        assert (found.prompts.count, found.prompts.bytes) == (len(setup.prompts.texts), on_disk)
    table.show(found)
    shown = capsys.readouterr().out
    assert f"{found.prompts.count} x 64 tokens" in shown and "judge" not in shown
    table.show(replace(found, prompts=None))
    assert "cannot be read" in capsys.readouterr().out


def test_processes_encode_their_shares(settings, tmp_path, monkeypatch):
    """Three processes encode a third each, and their parts become one cache, the one that a single process fills; a part that an interrupted
    run left is used; a disk that is too small is named before anything is written."""
    config = config_of(settings(precision="no"))
    prompts, asked, lock, meet = PromptTable(config.negative_prompt, texts_of(read_manifest(config.data))), [], Lock(), Barrier(3)
    encode = pipeline_encoder(config.backbone, torch.device("cpu"), torch.float32, config.text_length)

    def counted(texts):
        with lock:
            asked.append(len(texts))
            return encode(texts)

    def process(name: str, rank: int = 0, of: int = 1) -> PromptEmbeddings:
        wait = meet.wait if of > 1 else lambda: None
        told = SimpleNamespace(device=torch.device("cpu"), print=lambda *_: None, process_index=rank, num_processes=of, is_main_process=rank == 0, wait_for_everyone=wait)
        return prompt_cache.encoded(replace(config, text_cache=str(tmp_path / name)), prompts, told)

    monkeypatch.setattr(prompt_cache, "pipeline_encoder", lambda *_: counted)
    alone = process("alone")
    asked.clear()
    with ThreadPoolExecutor(3) as pool:
        banks = list(pool.map(lambda rank: process("three", rank, 3), range(3)))
    shares = sorted(asked)[3:]  # after the three samples
    assert sum(shares) == len(prompts.texts) and max(shares) - min(shares) <= 1 and not list((tmp_path / "three").glob("part-*"))
    assert all(torch.equal(bank.states[i], alone.states[i]) for bank in banks for i in range(len(alone)))
    (tmp_path / "left").mkdir()
    (tmp_path / "alone").rename(tmp_path / "left/part-002")
    asked.clear()
    assert len(process("left")) == len(alone) and not asked
    monkeypatch.setattr("vlmedit.io.free_bytes", lambda _: 0)
    with pytest.raises(InputError, match="disk is full"):
        process("full")
    assert not list((tmp_path / "full").glob("*.safetensors"))


def replace_processes(found: plan.Plan, processes: int) -> plan.Plan:
    return replace(found, processes=processes, sharded=True)


# --- settings


def test_shipped_settings_are_the_recipe():
    """Every shipped file makes a configuration, each of its lines names its source, and its times are the published ones; a file is found by
    name or path."""
    for name, path in shipped().items():
        config_class = CopyConfig if name.endswith("refcopy") else RealConfig
        config_of(read_settings(path), config_class)
        assert all("#" in line for line in path.read_text().splitlines() if ":" in line and name.startswith(("zimage", "flux", "qwen")) and not line.startswith(("#", "out:"))), name
        assert find_config(Path(name)) == find_config(Path(f"configs/{name}.yaml")) == path
    assert few_step_times(4, 6.0) == pytest.approx((1, 0.9474, 0.8571, 0.6667), abs=1e-4)


STAGES = {  # the released files' numbers, copied from the authors' configurations and code, not from ours
    "zimage_refcopy": dict(
        steps=5000, batch=2, accumulate=1, lr=2e-5, warmup=1000, final_lr=1e-6 / 2e-5, betas=(0.9, 0.99), weight_decay=0.01, clip=2.0, spike=100.0, time_shift=6.0, text_dropout=0.1,
        flip=0.5, roles="modules", omni=True, precision="bf16",
    ),
    "zimage_internvl": dict(
        steps=14_000, batch=1, accumulate=1, lr=2e-5, fake_lr=2e-5, warmup=0, final_lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, clip=2.0, spike=300.0, ema=0.0, dmd_weight=1.0,
        judge_weight=0.02, nothing_weight=1.0, guidance=3.5, guidance_strong=7.5, strong_types=("remove", "shape", "style", "action"), negative_prompt="low quality, artifacts",
        fake_updates=5, fake_rollouts="fresh", sampler_steps=4, sampler_shift=6.0, renoise="fresh", calls="mixed", dmd_norm="pixel", gain_steps=2000, flip=0.0, roles="modules",
        omni=True, precision="bf16", codec_precision="fp32", identity=True, target_caption=True, answer_loss="two_logits",
    ),
}  # fmt: skip
EQUAL = ("color", "material", "shape", "add", "replace", "background", "style", "action")  # 0.0833 each


@pytest.mark.parametrize("name", STAGES)
def test_the_released_files_are_the_published_numbers(name):
    """Line by line, against a table of its own; what neither file can set is what the code does, and our table of the recipe agrees."""
    from vlmedit.equations.dmd import dmd_gradient, draw_dmd_time
    from vlmedit.experiments.recipe import FIXED, MAIN_STAGE

    given = config_of(read_settings(shipped()[name]), CopyConfig if name == "zimage_refcopy" else RealConfig)
    for key, value in STAGES[name].items():
        assert getattr(given, key) == (pytest.approx(value) if isinstance(value, float) else value), key
    assert set(given.sizes) == {(512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (512, 384), (384, 512)}
    assert given.type_shares == {"remove": 0.25, "text": 0.0837, **dict.fromkeys(EQUAL, 0.0833)}
    if name == "zimage_refcopy":
        return
    for line in MAIN_STAGE:
        value = getattr(given, line.here, None) if line.here and line.here not in ("side", "ema", "precision") else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            first = float(re.search(r"[\d.]+(?:e-\d+)?", line.released.replace(",", ""))[0])
            assert value == pytest.approx(first), line.what
    fixed = {line.what: line.released for line in FIXED}
    t = draw_dmd_time(4000)
    assert 0.02 <= t.min() < 0.03 and 0.97 < t.max() <= 0.98 and t.mean() == pytest.approx(0.5, abs=0.03) and "0.02-0.98" in fixed["DMD times"]
    zero = torch.zeros(1, 2, 1, 1)
    assert dmd_gradient(zero, zero, zero + 1e-6, "pixel").max().item() == pytest.approx(1.0) and "1e-6" in fixed["DMD normalizer's clamp"]
    words = shipped()[name].read_text()
    assert all(word in words for word in ("1e-8", "0.02-0.98", "start_multistep_sampling_step 0", "text dropout", "eta 1"))


def test_accelerate_reads_its_files():
    """The shipped configuration files are accelerate's own, and FSDP2 is what the one for eight GPUs asks for."""
    from accelerate.commands.config import load_config_from_file

    found = {p.stem: load_config_from_file(str(p)) for p in (CONFIGS / "accelerate").glob("*.yaml")}
    assert found.keys() == {"one_gpu", "fsdp2_8gpu", "two_cpu"}
    assert found["fsdp2_8gpu"].num_processes == 8 and found["fsdp2_8gpu"].fsdp_config["fsdp_version"] == 2 and found["two_cpu"].use_cpu


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Reading any weight is an error."""

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    for name in ("load_transformer", "load_judge"):
        monkeypatch.setattr(loading, name, refuse)
    monkeypatch.setattr(loading.diffusers.AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(prompt_cache, "pipeline_encoder", refuse)


def spoil(places, tmp_path, what) -> dict:
    """One thing wrong with a run."""
    half = tmp_path / "half"
    copy = lambda name: shutil.copytree(places[name], half)
    change = lambda file, **kw: (half / file).write_text(json.dumps({**json.loads((half / file).read_text()), **kw}))
    if what == "unknown key":
        return {"bacth": 3}
    if what == "missing folder":
        return {"backbone": str(tmp_path / "gone")}
    if what == "id without network":
        return {"judge": ["nobody/nothing-7b"]}
    if what == "half a backbone":
        (copy("z-image") / "transformer/diffusion_pytorch_model.safetensors").unlink()
    elif what == "half an index":
        folder = copy("z-image") / "transformer"
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "unknown class":
        copy("z-image")
        change("transformer/config.json", _class_name="LuminaNextDiT2DModel")
    elif what == "pipeline as code":
        copy("z-image")
        change("model_index.json", transformer=["mine", "MyTransformer"], _class_name=["words", "MyPipeline"])
    elif what == "backbone as code":
        copy("z-image")
        change("vae/config.json", auto_map={"AutoModel": "mine.Mine"})
    elif what == "judge as code":
        copy("judge")
        change("config.json", architectures=["InternVLChatModel"], auto_map={"AutoModel": "modeling.InternVLChatModel"})
        return {"judge": [str(half)]}
    elif what == "no single token":
        from vlmedit.testing import random_models as tiny

        copy("judge")
        tiny.tokenizer(()).save_pretrained(half)
        return {"judge": [str(half)]}
    elif what == "no captions":
        (tmp_path / "bare.jsonl").write_text(json.dumps({"image": "a.png", "instruction": "make it red", "type": "color"}))
        return {"data": str(tmp_path / "bare.jsonl")}
    elif what == "no pictures":
        words = {"image": "gone.png", "instruction": "make it red", "type": "color", "caption": "a", "target_caption": "b"}
        (tmp_path / "bare.jsonl").write_text(json.dumps(words))
        return {"data": str(tmp_path / "bare.jsonl")}
    elif what == "no bitsandbytes":
        return {"optimizer": "adamw8bit"}
    elif what == "no tracker" or what.startswith("W&B"):
        return {"trackers": ["wandb"]}
    elif what == "no start":
        return {"start": str(tmp_path / "nowhere")}
    elif what == "start of another mode":
        (tmp_path / "model").mkdir()
        (tmp_path / "model/student.json").write_text('{"omni": false}')
        return {"start": str(tmp_path / "model"), "omni": True}
    elif what == "start of an older run":
        (tmp_path / "model").mkdir()
        (tmp_path / "config.json").write_text('{"omni": true}')
        return {"start": str(tmp_path / "model")}
    return {"backbone": str(half)}


BAD = {
    "unknown key": r"unknown config key 'bacth' of RealConfig; nearest: batch",
    "missing folder": r"gone: no such folder",
    "id without network": r"judge: nobody/nothing-7b: no such folder, and no model of the Hub that can be reached",
    "half a backbone": r"half a model, it lacks its weights .*; download it again",
    "half an index": r"it lacks diffusion_pytorch_model-00002-of-00002.safetensors; download it again",
    "unknown class": r"no adapter for LuminaNextDiT2DModel; known: FluxTransformer2DModel",
    "pipeline as code": r"code of its own \(transformer, pipeline\), which is not run",
    "backbone as code": r"code of its own \(vae\), which is not run; .*trust_remote_code=true",
    "judge as code": r"InternVLChatModel, code of its own, which is not run; .*-hf",
    "no single token": r"writes 'Yes' as 3 tokens",
    "no captions": r"no caption and no target_caption",
    "no pictures": r"no picture .*gone.png",
    "no bitsandbytes": r"needs bitsandbytes, and that is not installed",
    "no tracker": r"trackers names wandb, which is not installed",
    "W&B without account": r"trackers names wandb: no account is known here; run wandb login, or set WANDB_MODE=offline",
    "W&B out of reach": r"trackers names wandb: division by zero, or set WANDB_MODE=offline",
    "no start": r"start is .*nowhere', which is no folder",
    "start of another mode": r"student was trained with omni=false, and omni is true: .*; set omni=false",
    "start of an older run": r"student was trained with omni=true, and omni is false",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message_before_any_weight(settings, places, tmp_path, what, nothing_is_read, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    if what == "no tracker":
        monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    if what.startswith("W&B"):  # a stand-in for wandb, which may not be installed
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.WANDB])
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: False if "account" in what else 1 / 0))
    given = settings(**spoil(places, tmp_path, what))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
    assert main(["train", "npedit", "--config", str(tmp_path / "s.yaml")]) == 2
    said = capsys.readouterr().err
    assert re.search(BAD[what], said) and "Traceback" not in said


def test_trusted_code_is_run(settings, places, tmp_path):
    """With trust_remote_code the transformer and the pipeline that encodes the prompts are the classes that came with the folder."""
    half = shutil.copytree(places["z-image"], tmp_path / "half")
    (half / "transformer/mine.py").write_text("from diffusers import ZImageTransformer2DModel as Stock\n\n\nclass ZImageTransformer2DModel(Stock):\n    mine = True\n")
    code = "from pathlib import Path\n\nfrom diffusers import ZImagePipeline\n\n\nclass ZImageWords(ZImagePipeline):\n    def encode_prompt(self, *args, **kwargs):\n"
    (half / "words.py").write_text(f"{code}        Path({str(tmp_path / 'ran')!r}).touch()\n        return super().encode_prompt(*args, **kwargs)\n")
    for file, more in (("transformer/config.json", {"auto_map": {"AutoModel": "mine.ZImageTransformer2DModel"}}), ("model_index.json", {"_class_name": ["words", "ZImageWords"]})):
        (half / file).write_text(json.dumps({**json.loads((half / file).read_text()), **more}))
    given = settings(str(half), text_cache=str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"code of its own \(transformer, pipeline\)"):
        train.check(config_of(given))
    config = config_of({**given, "trust_remote_code": True})
    train.check(config)
    setup = Setup(config)
    assert setup.roles.student.shared.transformer.mine and (tmp_path / "ran").exists()
    setup.finish(setup.roles.student, None)
    config.save(tmp_path / "run/config.json")
    with pytest.raises(InputError, match="a run on it is not exported"):
        export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(side=64), "come in buckets"),
        (dict(buckets=("500x500",)), "multiples of 16"),
        (dict(buckets=("large",)), "WIDTHxHEIGHT"),
        (dict(matching="mmd", batch=2), "known: dmd, sid, pseudo-huber"),
        (dict(roles="lora"), "known: modules, adapters"),
        (dict(roles="adapters", offload=("teacher",)), "only the judge can wait"),
        (dict(offload=("judge",), sharding="fsdp2"), "fsdp_offload_params"),
        (dict(checkpointing=("vae",)), "checkpointing names 'vae'"),
        (dict(type_shares={"remove": -1}), "shares that are at least 0"),
        (dict(nothing_share=2), "share in"),
        (dict(judge=()), "judge is empty"),
        (dict(fake_updates=-1), "fake_updates is -1"),
        (dict(optimizer="sgd"), "known: adamw"),
        (dict(rank=0), "rank is 0"),
    ],
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        RealConfig.make("laptop", **wrong)


def test_a_removal_is_mirrored_only_where_it_may(places, settings):
    """Mirroring every picture leaves those alone whose words say left or right."""
    rows = read_manifest(places["data"])
    config = replace(config_of(settings(nothing_share=0.0)), flip=1.0)
    feed = Feed(rows, config, PromptTable("", texts_of(rows)), PromptTable())
    row = rows[0]
    for words, mirrored in (("make it red", True), ("remove the left circle", False)):
        feed.rows = [replace(row, request=replace(row.request, instruction=words, type="color"))]
        batch = feed.load(0, [0], rng_for("x"))
        plain = load_fitted(row.image, config.sizes[0])
        assert torch.equal(batch.reference[0], plain.flip(-1) if mirrored else plain)


# --- out of a run


def finished(settings, tmp_path, backbone: str, **overrides):
    """The folder of a run whose student is random, and the student as it was."""
    given = settings(backbone, out=str(tmp_path / "run"), **overrides)
    setup = Setup(config_of(given))
    student = setup.roles.student
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    setup.finish(student, None)
    setup.config.save(tmp_path / "run" / "config.json")
    return setup, student


WAYS = {  # from our latents to the layout in which diffusers' own pipelines keep them, and back
    "flux": (pack, lambda z, side: unpack(z, side, side)),
    "flux2": (lambda z: z.flatten(2).transpose(1, 2), lambda z, side: z.transpose(1, 2).unflatten(2, (side, side))),
}


@torch.no_grad()
def own_sampler(setup, student, picture, words: str, seed: int):
    """Our sampler from the global generator, its state in the layout in which the pipeline draws its noise."""
    config = setup.config
    text = pipeline_encoder(config.backbone, torch.device("cpu"), torch.float32, config.text_length)([words])(torch.tensor([0]))
    reference = setup.codec.encode(picture)
    to, back = WAYS.get(Path(config.backbone).name, (lambda z: z, lambda z, side: z))
    side = reference.shape[-1]
    torch.manual_seed(seed)
    start = torch.randn(reference.shape) if "flux2" in config.backbone else torch.randn(to(reference).shape)
    velocity = lambda x, t: to(student(back(x, side), t, text, reference))
    begin = to(start) if "flux2" in config.backbone else start
    return start, setup.codec.decode(back(sample(velocity, begin, few_step_times(config.sampler_steps, config.sampler_shift), "renoise"), side))


EXPORTED = [("flux", "modules"), ("flux", "adapters"), ("flux2", "adapters"), ("z-image", "adapters"), ("z-image", "modules"), ("qwen-image", "adapters"), ("sd3", "adapters"), ("sana", "modules")]


@pytest.mark.parametrize("backbone, roles", EXPORTED)
def test_the_exported_pipeline_draws_what_we_draw(settings, tmp_path, backbone, roles):
    """Loaded by diffusers from its folder, with its own text encoder, the pipeline's four steps give our sampler's picture from the same
    noise (to 1e-4 of [0, 1]), not that of other words, nor that of the backbone as it was; its adapter on the untouched backbone gives it
    too, where the backbone has room for a reference. Z-Image as modules is omni."""
    words, length = "make it red", 160 if backbone == "qwen-image" else 64  # tokens: its template alone has more than 64 of the tiny tokenizer's
    setup, student = finished(settings, tmp_path, backbone, roles=roles, omni=(backbone, roles) == ("z-image", "modules"), text_length=length)
    folder = export(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    picture = Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy())
    start, expected = own_sampler(setup, student, to_pixels(picture, 64), words, 5)

    def drawn(pipeline, words=words):
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(5)
        torch.randn(start.shape)
        sizes = dict(height=64, width=64, guidance_scale=1.0, num_inference_steps=4, max_sequence_length=length) if backbone in WAYS else {}
        sizes |= dict(max_area=64 * 64, _auto_resize=False) if backbone == "flux" else {}
        return pipeline(image=picture, prompt=words, latents=start, output_type="pt", **sizes).images

    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    want = ((expected + 1) / 2).clamp(0, 1)
    assert (drawn(loaded) - want).abs().max() < 1e-4 and 0.01 < want.std()
    assert (drawn(loaded, "a house") - want).abs().max() > 1e-4
    assert not type(loaded).__module__.startswith("vlmedit") and json.loads((folder / ABOUT).read_text())["transformer"] == type(loaded.transformer).__name__
    text = (folder / "README.md").read_text()
    assert "library_name: diffusers" in text and "from_pretrained" in text and str(tmp_path) not in text
    if roles == "adapters" and backbone == "sd3":
        with pytest.raises(InputError, match="widened for the reference"):
            export(tmp_path / "run", tmp_path / "adapter", "adapter")
    elif roles == "adapters":
        adapter = export(tmp_path / "run", tmp_path / "adapter", "adapter")
        custom = {} if backbone in WAYS else dict(custom_pipeline=str(adapter / CODE), trust_remote_code=True)
        stock = DiffusionPipeline.from_pretrained(setup.config.backbone, **custom)
        stock.scheduler = loaded.scheduler
        assert (drawn(stock) - want).abs().max() > 1e-3
        with pytest.raises(InputError, match="a folder that nobody else has"):
            push_to_hub(adapter, "nobody/editor")
        stock.load_lora_weights(adapter)
        assert (drawn(stock) - want).abs().max() < 1e-4


def test_exported_code_and_the_miniatures_load_in_one_process(settings, tmp_path, folder):
    """diffusers keeps a folder's code under the name of its file: the miniature's and ours have different names, so each loads after the other."""
    from vlmedit.pipelines.shapes import assemble

    assemble(folder / "student", None).save_pretrained(tmp_path / "shapes")
    finished(settings, tmp_path, "z-image")
    export(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    names = []
    for _ in range(2):
        names.append(type(DiffusionPipeline.from_pretrained(tmp_path / "shapes", custom_pipeline="pipeline", trust_remote_code=True)).__name__)
        names.append(type(DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__)
    assert names == ["EditPipeline", "FewStepEditPipeline"] * 2


def test_the_pipeline_file_needs_diffusers_alone():
    """What is written beside the weights imports torch, diffusers and the standard library only, whatever the family."""
    written = [family for family in families().values() if family.adapter and not family.stock]
    assert len(written) >= 4
    for family in written:
        tree = ast.parse(standalone(family))
        names = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
        assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_what_cannot_be_exported_or_pushed(settings, tmp_path, capsys):
    """A folder that is no run, an unfinished run, an adapter of a whole transformer, a full folder, no network: one message each, by the
    command line too, and nothing half-written."""
    for wrong, said in ((tmp_path, "not the folder of a run"), (tmp_path / "run", "no student")):
        if wrong.name == "run":
            wrong.mkdir()
            config_of(settings("flux")).save(wrong / "config.json")
        with pytest.raises(InputError, match=said):
            export(wrong, tmp_path / "out")
    finished(settings, tmp_path, "flux", roles="modules")
    with pytest.raises(InputError, match="not an adapter"):
        export(tmp_path / "run", tmp_path / "out", "adapter")
    with pytest.raises(InputError, match="not an empty folder"):
        export(tmp_path / "run", tmp_path / "run")
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--push", "nobody/editor"]) == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err and (tmp_path / "out/README.md").is_file()
    with pytest.raises(InputError, match="no name of a repository"):
        push_to_hub(tmp_path / "out", "no//name")
    with pytest.raises(InputError, match="not an exported folder"):
        push_to_hub(tmp_path, "nobody/editor")
