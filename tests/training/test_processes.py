"""Real runs in two processes on a CPU: sharded by FSDP2 over gloo or not, in fp32 and bf16, from shards, killed and resumed. Each is one process
that accumulates their batches. And roles that wait elsewhere are not missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.two_real_processes import watched
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmedit.cli._settings import read_settings
from vlmedit.data.layouts import read_items
from vlmedit.data.shards import write_shards
from vlmedit.networks.lora import LORA_FILE
from vlmedit.testing import resolve
from vlmedit.training import real_models as train
from vlmedit.training.offload import Offloaded
from vlmedit.training.real_models import RealEdit
from vlmedit.training.settings import CONFIGS

ROOT = Path(__file__).parents[2]
LR, STEPS = 1e-3, 3
ROLES = ["student", "fake", "teacher", "judge"]
COMMON = dict(steps=STEPS, lr=LR, fake_lr=LR, batch=1, save_every=1, strip_every=100, trackers=[])

CASES = {  # what two processes do
    # removals alone, without the identity question, show the judge no reference: it is called as often as in a process that has others
    "modules": dict(roles="modules", source="tar", accumulate=2, sharding="fsdp2", ema=0.5, identity=False),
    # guidance for some types alone: a batch without them has as many calls of the teacher as one with them
    "adapters": dict(roles="adapters", source="parquet", accumulate=2, sharding="fsdp2", ema=0.5, precision="bf16", guidance=1.0, strong_types=["remove"]),
    "warmup": dict(stage="warmup", roles="modules", source="parquet", accumulate=2, sharding="fsdp2", ema=0.5, warmup=2, text_dropout=0.5, flip=0.5),
    "whole": dict(roles="modules", source="tar", accumulate=1, sharding="none", offload=ROLES),
    "z-image": dict(backbone="z-image", roles="modules", omni=True, accumulate=1, sharding="fsdp2", precision="bf16", steps=2),
}
FP32 = 1e-5  # of a gradient's length: sums in another order, some hundred roundings of 2^-24
BF16 = 2**-5  # sixteen roundings of 2^-9: shards round the scales of norms, and each batch's gradients, to bf16 as well


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a run of three updates in buckets of three shapes, by backbone, source of data and overrides. Prompts are encoded once."""
    folder = tmp_path_factory.mktemp("places")
    places = {name: resolve(f"tiny:{name}", folder, "backbone") for name in ("flux", "z-image")}
    judge, data = resolve("tiny:internvl", folder, "judge"), {"manifest": resolve("tiny:shapes", folder, "data")}
    for kind in ("tar", "parquet"):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        assert len(write_shards(read_items(data["manifest"]), folder / kind, kind)) == 1  # for two processes
        data[kind] = str(folder / kind)
    base = read_settings(CONFIGS / "tiny.yaml") | COMMON | {"judge": [judge]}

    def make(out: Path, backbone="flux", source="manifest", **overrides) -> dict:
        text = str(folder / f"text-{backbone}-{overrides.get('precision', 'no')}")
        return {**base, "backbone": places[backbone], "data": data[source], "text_cache": text, "out": str(out), **overrides}

    return make


def launched(*command) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", *map(str, command)], env=own, capture_output=True, text=True, timeout=300)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Everything that a run has trained, by file and name."""
    return {f"{file.name}: {k}": v for file in sorted(out.glob("checkpoint/*.safetensors")) for k, v in load_file(file).items()}


def far(a: dict, b: dict) -> float:
    """The farthest that any weight is from the other's."""
    assert a.keys() == b.keys() and a
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |a|"""
    return ((a - b).norm() / a.norm()).item()


def by_key(found: dict) -> dict[str, dict]:
    return {u["key"]: u for u in found["updates"]}


def compare(name: str, case: dict, settings, folder: Path) -> None:
    """Two processes' run in `folder`/NAME-two against one process, from the manifest, without a kill, nothing sharded, nobody elsewhere."""
    plain = {k: v for k, v in case.items() if k not in ("source", "offload", "sharding")}
    together = plain | {"accumulate": 2 * case["accumulate"]}
    found = watched(settings(folder / f"{name}-one", **together))
    one, half = by_key(found), by_key(watched(settings(folder / f"{name}-half", **plain), updates=1))
    rough = "precision" in case and case["roles"] == "modules"  # bf16 rounds an adapter's run alike in shards
    exact = by_key(watched(settings(folder / f"{name}-exact", **together | {"precision": "no"}), updates=None if rough else 1)) if "precision" in case else {}
    ranks = [torch.load(folder / f"{name}-two/rank{r}.pt", weights_only=True) for r in range(2)]
    assert [r["processes"] for r in ranks] == [2, 2] and len(ranks[0]["updates"]) == len(ranks[1]["updates"])
    keys = [u["key"] for u in ranks[0]["updates"]]
    assert [k for k in keys if "/" not in k] == ["0", "1", "1", "2"][: case.get("steps", STEPS) + 1] and set(keys) == one.keys()  # killed in the second update
    before = {}
    for a, b in zip(*(r["updates"] for r in ranks)):
        same, key = one[a["key"]], f"{name}, update {a['key']}"
        assert torch.equal(a["gradient"], b["gradient"]) and a["norm"] == b["norm"], key
        assert torch.equal(a["gradient"], before.setdefault(a["key"], a["gradient"])), f"{key}: not what it was before the kill"
        assert a["shards"] == b["shards"] == (len(same["lengths"]) if case["sharding"] == "fsdp2" else 0), key
        assert sorted([*a["rows"], *b["rows"]]) == same["rows"] and a["rows"][0] != b["rows"][0], key
        distance = apart(same["gradient"], a["gradient"])
        if not rough:
            assert distance < FP32 and a["norm"] == pytest.approx(same["norm"], rel=FP32), key
        else:  # both are roundings of the same run; the second update starts from weights that differ already
            assert distance < 2 * apart(exact[a["key"]]["gradient"], same["gradient"]), key
            assert distance < BF16 or a["key"] != "0", key
    assert all(apart(one[key]["gradient"], half[key]["gradient"]) > 0.2 for key in half)  # where a process is lost
    assert all(100 * FP32 < apart(exact[key]["gradient"], one[key]["gradient"]) for key in exact)  # it was bf16
    assert len({row[2] for u in found["updates"] for row in u["rows"]}) >= 2  # shapes of a picture
    orders = [torch.load(folder / f"{name}-{where}/checkpoint/optimizers.pt", weights_only=True)["data"] for where in ("one", "two")]
    assert orders[0] == orders[1]
    measured = lambda run: {k: v for k, v in run["metrics"].items() if not k.startswith(("seconds", "cpu", "calls"))}
    assert measured(ranks[0]) == measured(ranks[1]) == pytest.approx(measured(found), rel=0.1 if rough else 1e-4)
    if not rough:
        assert far(weights(folder / f"{name}-one"), weights(folder / f"{name}-two")) < 0.02 * LR * STEPS


def test_two_processes_train_as_one(settings, tmp_path):
    """Modules, adapters and the copy warm-up sharded, and modules unsharded with every role waiting on the CPU: two processes read one shard
    of data, are killed in the second update, and each batch, gradient, metric and weight is that of one process that accumulates
    as many batches from the manifest, without interruption; in bf16 within its roundings. A gradient of half the batches is 0.2 and more away.

    Then one of the two processes dies in the middle of `--config tiny`, taking the other with it, and `accelerate launch` with the file
    that ships for two processes goes on: one model in the end, as one process trains it."""
    files = []
    for name, case in CASES.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(settings(tmp_path / f"{name}-two", **case, stop=2)))
    out, overrides = tmp_path / "tiny", COMMON | dict(batch=1, sharding="fsdp2", trackers=["tensorboard"])
    files.append(tmp_path / "tiny.json")
    files[-1].write_text(json.dumps(read_settings(CONFIGS / "tiny.yaml") | overrides | {"out": str(out), "crash": 2}))
    done = launched("torch.distributed.run", "--standalone", "--nproc_per_node", "2", (Path(__file__).parents[1] / "helpers" / "two_real_processes.py"), *files)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-3000:]
    for name, case in CASES.items():
        compare(name, case, settings, tmp_path)

    assert json.loads((out / "checkpoint/state.json").read_text())["step"] == 1 and not (out / "model").exists()
    pairs = [f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in overrides.items()]
    shipped = "--config_file", CONFIGS / "accelerate/two_cpu.yaml", "--main_process_port", "0"
    done = launched("accelerate.commands.launch", *shipped, "-m", "vlmedit.cli", "train", "npedit", "--config", "tiny", "--out", out, "--set", *pairs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(out.glob("vlmedit/events*"))
    assert len(list((out / "text").glob("*.safetensors"))) == 2  # each process encoded its share
    places = dict(backbone=str(out / "tiny/backbone/z-image"), judge=[str(out / "tiny/judge/internvl")], data=str(out / "tiny/data/shapes/train.jsonl"))
    for name, batches in (("one", 2), ("half", 1)):
        watched(read_settings(CONFIGS / "tiny.yaml") | COMMON | places | dict(accumulate=batches, text_cache=str(out / "text"), out=str(tmp_path / name)))
    trained = [load_file(folder / "model" / LORA_FILE) for folder in (tmp_path / "one", out, tmp_path / "half")]
    assert far(*trained[:2]) < 0.02 * LR * STEPS < 0.1 * far(*trained[1:])


# --- roles that wait


class Elsewhere(TorchDispatchMode):
    """The memory where weights wait as another device: no operation may read it, copies alone cross. Within it, `homes` fills as roles are
    told to wait."""

    CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.detach.default}

    def __init__(self, monkeypatch):
        super().__init__()
        self.homes, self.kept, self.seen = set(), [], []
        begin, clock = Offloaded.__init__, RealEdit.clock

        def wait(waiting, module, device):
            begin(waiting, module, device)
            self.kept += [p.data for p in module.parameters()]
            self.homes |= {p.data_ptr() for p in module.parameters()}

        @contextmanager
        def watch(edit, part):
            with clock(edit, part):
                self.seen.append((part, {role for role, w in edit.waiting.items() if w.homes}))
                yield

        monkeypatch.setattr(Offloaded, "__init__", wait)
        monkeypatch.setattr(RealEdit, "clock", watch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.CROSSING and any(isinstance(x, torch.Tensor) and x.data_ptr() in self.homes for x in tree_leaves((args, kwargs))):
            raise AssertionError(f"{func} reads a weight that is elsewhere")
        return func(*args, **(kwargs or {}))


def test_nobody_reads_a_weight_that_waits(settings, tmp_path, monkeypatch):
    """All roles wait while others work, through accumulated batches, two updates of the fake score, a kill and a resume: no operation, forward
    or backward, reads a weight where it waits, teacher and judge are never here together, and the fake score learns alone. Weights, average
    and moments end bit for bit as where all stay. A part that forgets whom it needs is caught, and so are weights that are not
    brought back."""
    case = dict(roles="modules", batch=2, accumulate=2, fake_updates=2, ema=0.5, steps=2)  # of one row, a product rounds by where its weights lie
    stay = watched(settings(tmp_path / "stay", **case))
    with monkeypatch.context() as m, Elsewhere(m) as there:
        wait = watched(settings(tmp_path / "wait", **case, offload=ROLES, stop=2))
    assert len(there.homes) > 200 and {part for part, _ in there.seen} == set(train.PRESENT)
    for part, here in there.seen:
        assert not {"teacher", "judge"} <= here, part
        assert part != "fake" or here == {"fake"}
    again = [u["key"] for u in wait["updates"]]
    assert again == [*(u["key"] for u in stay["updates"]), *again[-3:]] and again[-3] == "1"
    assert all(torch.equal(u["gradient"], by_key(stay)[u["key"]]["gradient"]) for u in wait["updates"])
    assert far(weights(tmp_path / "stay"), weights(tmp_path / "wait")) == 0
    moments = [torch.load(tmp_path / name / "checkpoint/optimizers.pt", weights_only=True) for name in ("stay", "wait")]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*map(tree_leaves, moments), strict=True))

    for part, missed in (("rollout", "student"), ("teacher", "fake"), ("judge", "judge"), ("fake", "fake")):
        with monkeypatch.context() as m, pytest.raises(AssertionError, match="elsewhere"):
            m.setitem(train.PRESENT, part, tuple(role for role in train.PRESENT[part] if role != missed))
            with Elsewhere(m):
                watched(settings(tmp_path / f"{part}-{missed}", **case, offload=ROLES), updates=1)

    def forget(waiting):
        for p, home in waiting.homes.items():
            p.data = home
        waiting.homes = {}

    with monkeypatch.context() as m:
        m.setattr(Offloaded, "leave", forget)
        lost = watched(settings(tmp_path / "lost", **case, offload=ROLES))
    assert apart(by_key(stay)["1"]["gradient"], by_key(lost)["1"]["gradient"]) > 0.01
