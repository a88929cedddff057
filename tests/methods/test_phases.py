"""Methods are found by their files, and hold equations and phases alone: no loop, optimizer, file, device or process of
their own."""

import ast
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vlmedit import methods
from vlmedit.config import TrainConfig
from vlmedit.protocols import Phase, Trained

FOLDER = Path(methods.__path__[0])
TEN = (
    "bootstrap",
    "copy_warmup",
    "cyclegan_turbo",
    "distill",
    "flow_grpo",
    "judge",
    "npedit",
    "sft",
    "synthetic_pairs",
    "teacher",
)

# --- found by file


def test_the_ten_methods_are_found():
    """By name, each with a configuration of its own whose folder is the method's, and a trainer; helpers are none."""
    assert tuple(methods.names()) == TEN
    for name in TEN:
        config, train = methods.find(name)
        assert issubclass(config, TrainConfig) and config.__module__ == train.__module__ == f"vlmedit.methods.{name}"
        assert train.__name__ == f"train_{name}" and config.make().out == f"runs/{name}"


@pytest.mark.parametrize("name", ("nope", "_base", ""))
def test_an_unknown_method_names_those_there_are(name):
    with pytest.raises(KeyError, match=f"unknown method '{name}'; known: bootstrap, copy_warmup, .*teacher"):
        methods.find(name)


MADE_UP = '''
"""Weights that shrink."""

from collections.abc import Iterator
from dataclasses import dataclass

from vlmedit.config import TrainConfig
from vlmedit.data.batches import CaptionedBatch
from vlmedit.data.world import WorldData
from vlmedit.methods._base import Base
from vlmedit.networks.dit import DiT
from vlmedit.protocols import Trained
from vlmedit.training.run import Step
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class ShrinkConfig(TrainConfig):
    student: str = "runs/teacher/model"
    strength: float = 0.5


class Shrink(Base):
    batch = CaptionedBatch

    def __init__(self, config: ShrinkConfig, student: DiT):
        super().__init__({"student": Trained(student, ema=config.ema)})
        self.config, self.student = config, student

    def backward(self, phase, batch, memory, index):
        loss = self.config.strength * sum(p.square().sum() for p in self.student.parameters())
        loss.backward()
        return {"loss": loss.item(), "seen": len(batch)}


def train_shrink(config: ShrinkConfig, accelerator=None) -> Iterator[Step]:
    yield from train(Shrink(config, DiT.from_pretrained(config.student)), WorldData(config), config, accelerator)
'''


def test_a_file_in_the_folder_is_a_method_and_trains(folder, tmp_path, monkeypatch):
    """Nothing else names it: it is found, has settings of its own with the tiers of all, trains, saves and resumes."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "shrink.py").write_text(MADE_UP)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "more")])
    importlib.invalidate_caches()
    try:
        assert "shrink" in methods.names() and len(methods.names()) == 11
        config_class, train = methods.find("shrink")
        config = config_class.make(
            "smoke",
            student=str(folder / "student"),
            side=16,
            strength=0.1,
            out=str(tmp_path / "run"),
            precision="no",
            trackers=(),
            steps=3,
        )
        first = next(train(config))
        assert first.metrics["seen"] == 4
        rest = list(train(config))
        assert [s.index for s in rest] == [2, 3] and rest[-1].metrics["loss"] < first.metrics["loss"]
        start, end = (
            load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder / "student", tmp_path / "run/model")
        )
        assert sum(v.square().sum() for v in end.values()) < sum(v.square().sum() for v in start.values())
    finally:
        sys.modules.pop("vlmedit.methods.shrink", None)
        if hasattr(methods, "shrink"):
            delattr(methods, "shrink")


# --- what a method does not own

FOREIGN = (  # modules, and what is in them, that belong to the trainer
    "torch.optim", "torch.distributed", "torch.multiprocessing", "torch.utils.data",
    "multiprocessing", "subprocess", "threading", "os", "shutil", "tempfile", "signal", "time", "json",
    "vlmedit.training.optimizer", "vlmedit.training.checkpoints", "vlmedit.training.offload",
    "vlmedit.training.gathered", "vlmedit.training.trackers", "vlmedit.io",
)  # fmt: skip
FILES = (
    "open",
    "save",
    "save_file",
    "save_model",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "rename",
    "touch",
    "save_pretrained",
)
STEPPED = (
    "step",
    "zero_grad",
    "clip_grad_norm_",
    "reduce",
    "all_reduce",
    "gather",
    "wait_for_everyone",
    "prepare",
    "cuda",
    "autocast",
)
OF_PROCESS = ("process_index", "num_processes", "is_main_process", "local_process_index", "world_size")
WRITES = ("save",)  # a method's `save` writes the result, into the folder that it is given


def name_of(node: ast.AST) -> str:
    """A dotted name, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def foreign(name: str) -> bool:
    return any(name == f or name.startswith(f"{f}.") for f in FOREIGN)


def owned(source: str) -> list[str]:
    """What a method's module has that is the trainer's, each with its line."""
    return [f"line {line}: {what}" for line, what in sorted(set(findings(ast.parse(source))))]


def findings(node: ast.AST, inside: str = "") -> Iterator[tuple[int, str]]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Import):
        yield from ((line, f"imports {a.name}") for a in node.names if foreign(a.name))
    elif isinstance(node, ast.ImportFrom):
        yield from ((line, f"imports {node.module}.{a.name}") for a in node.names if foreign(f"{node.module}.{a.name}"))
    elif isinstance(node, ast.For) and any(name_of(n).endswith(".steps") for n in ast.walk(node.iter)):
        yield line, "a loop over updates"
    elif isinstance(node, ast.While):
        yield line, "a loop without an end"
    elif isinstance(node, ast.Call):
        yield from calls(node, line, inside)
    elif isinstance(node, ast.Attribute) and (node.attr in OF_PROCESS or foreign(name_of(node))):
        yield line, f"asks for {name_of(node)}"
    elif (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.split(":")[0] in ("cuda", "cpu", "mps")
    ):
        yield line, f"names the device {node.value}"
    within = node.name if isinstance(node, ast.FunctionDef) else inside
    for child in ast.iter_child_nodes(node):
        yield from findings(child, within)


def calls(node: ast.Call, line: int, inside: str) -> Iterator[tuple[int, str]]:
    name = name_of(node.func)
    last = name.rpartition(".")[2] or getattr(node.func, "attr", "")
    if last in FILES and inside not in WRITES:
        yield line, f"writes by {last}"
    if last in STEPPED:
        yield line, f"calls {last}"
    if last in ("Accelerator", "device"):
        yield line, f"makes a {last}"


@pytest.mark.parametrize("file", sorted(p.name for p in FOLDER.glob("*.py")))
def test_a_method_owns_no_loop_optimizer_file_device_or_process(file):
    assert not owned((FOLDER / file).read_text())


MUTANTS = {
    "loop": "def f(config):\n    for index in range(config.steps):\n        pass",
    "loop from elsewhere": "def f(self, start):\n    for index in range(start, self.config.steps):\n        pass",
    "loop without an end": "def f():\n    while True:\n        pass",
    "optimizer": "import torch\ndef f(p):\n    return torch.optim.AdamW(p)",
    "optimizer by its name": "from torch.optim import AdamW",
    "optimizer of the suite": "from vlmedit.training.optimizer import Optimizer",
    "average of the suite": "def f():\n    from vlmedit.training.optimizer import EMA",
    "step": "def f(optimizer):\n    optimizer.step()",
    "gradients cleared": "def f(self):\n    self.student.zero_grad()",
    "clipping": "from torch import nn\ndef f(p):\n    nn.utils.clip_grad_norm_(p, 1.0)",
    "file": "def f(path):\n    return open(path, 'w')",
    "file by its path": "def f(path):\n    path.write_text('x')",
    "weights": "import torch\ndef f(x, path):\n    torch.save(x, path)",
    "weights by safetensors": "from safetensors.torch import save_file\ndef backward(x, path):\n    save_file(x, path)",
    "checkpoint": "from vlmedit.training.checkpoints import Checkpoints",
    "process": "def f(accelerator):\n    return accelerator.process_index",
    "main process": "def f(self):\n    if self.accelerator.is_main_process:\n        pass",
    "gradients over processes": "def f(accelerator, g):\n    return accelerator.reduce(g)",
    "processes": "import torch.distributed as dist",
    "accelerator": "from accelerate import Accelerator\ndef f():\n    return Accelerator()",
    "device": "import torch\ndef f():\n    return torch.device('x')",
    "device by its name": "def f(model):\n    return model.to('cuda:0')",
    "device by its method": "def f(model):\n    return model.cuda()",
    "clock": "import time",
}
ALLOWED = {
    "annotation": "from accelerate import Accelerator\n"
    "def train_x(config, accelerator: Accelerator | None = None):\n    return begin(config, accelerator).device",
    "result": "from safetensors.torch import save_file\n"
    "class X:\n    def save(self, state, folder):\n        save_file(state, folder / 'x')",
    "another loop": "def phases(self):\n    for k in range(self.config.fake_updates):\n        yield k",
    "where a batch is": "import torch\ndef f(batch):\n    return torch.rand(3, device=batch.device)",
    "a count of steps": "def f(config):\n    return sample(config.sampler_steps)",
}


@pytest.mark.parametrize("what", MUTANTS)
def test_each_of_them_would_be_seen(what):
    assert owned(MUTANTS[what])


@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_method_may_do_is_not_held_against_it(what):
    assert not owned(ALLOWED[what])


def test_a_phase_and_a_role_cannot_be_changed():
    """What a method hands the trainer is a constant; without words a phase trains nobody on the last draw, a role has
    no rate or average."""
    phase, role = Phase("student"), Trained(None)
    assert (phase.trains, phase.batch, phase.key, phase.size) == ((), None, (), None) and (role.lr, role.ema) == (
        None,
        0.0,
    )
    for thing, field in ((phase, "name"), (role, "ema")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
