"""The import graph: no trainer can reach the oracle or the evaluation, and the no-pair trainer reaches no verdict either.

Static: every `import` of every module the training code names is followed, those inside functions included. A package that is
imported only because a module lies in it counts with the imports that its import runs, not with those inside its functions.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING = ("vlmedit.data.world", "vlmedit.data.judge_lessons", "vlmedit.equations.unroll", "vlmedit.equations.dmd", "vlmedit.equations.judge_loss", "vlmedit.equations.rewards", "vlmedit.equations.matching", "vlmedit.equations.cycle")
MAIN = "vlmedit.experiments.live"  # the main job: calls the trainer, then the evaluation; itself no trainer, so none may import it
ORACLE = {"vlmedit.world.oracle", "vlmedit.evaluation.editing", MAIN}
UNPAIRED = ORACLE | {"vlmedit.world.verdict", "vlmedit.data.judge_lessons"}


def file_of(root: Path, module: str) -> Path | None:
    """The source file of a module under `root`, or None if it is not there (another library's, or a name in a module)."""
    base = root.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def statements(tree: ast.Module, everywhere: bool):
    """All nodes, or only those that run on import: function bodies are left out."""
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        yield node
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def named(root: Path, module: str, everywhere: bool = True) -> set[str]:
    """Modules under `root` that a module's source names: import, from-import (absolute or relative), and any string constant
    that is the dotted name of a module, as `import_module` takes it."""
    path = file_of(root, module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    out = set()
    for node in statements(ast.parse(path.read_text()), everywhere):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], node.module or ""]).strip(".") if node.level else node.module
            out |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and everywhere and node.value.isprintable() and "." in node.value:
            out |= {node.value}
    return {name for name in out if name.replace(".", "").replace("_", "").isalnum() and file_of(root, name)}


def reached(root: Path, start: str) -> dict[str, str]:
    """Every module that importing or running `start` may import, with the module that named it first."""
    found, todo, parents = {start: "-"}, [start], set()
    while todo:
        module = todo.pop()
        new = {n: module for n in named(root, module)}
        for name in (module, *new):
            while name := name.rpartition(".")[0]:
                if name not in parents and file_of(root, name):
                    parents.add(name)
                    new |= {n: name for n in named(root, name, everywhere=False)}
        for name, by in new.items():
            if name not in found:
                found[name] = by
                todo.append(name)
    return found | {p: "a module in it" for p in parents if p not in found}


def chain(found: dict[str, str], module: str) -> str:
    """How `module` was reached, for the message."""
    out = [module]
    while found.get(out[-1], "-") in found:
        out.append(found[out[-1]])
    return " <- ".join(out)


def training_modules() -> list[str]:
    stages = sorted((ROOT / "vlmedit/train").glob("*.py"))
    return [*TRAINING, *(m for p in stages if p.stem != "__init__" and (m := f"vlmedit.train.{p.stem}") != MAIN)]


@pytest.mark.parametrize("module", training_modules())
def test_training_cannot_reach_oracle_or_evaluation(module):
    """No import, at whatever depth or inside whatever function, leads from training code to the oracle or to evaluation."""
    if not file_of(ROOT, module):
        pytest.skip(f"{module} does not exist yet")
    found = reached(ROOT, module)
    assert not ORACLE & set(found), [chain(found, m) for m in ORACLE & set(found)]


@pytest.mark.parametrize("module", (*(f"vlmedit.train.{name}" for name in ("npedit", "synthetic", "cyclegan", "bootstrap", "grpo")), "vlmedit.data.world"))
def test_no_pair_training_reaches_no_verdict(module):
    """No trainer that works without pairs reaches oracle, evaluation, verdict or schooling."""
    if not file_of(ROOT, module):
        pytest.skip(f"{module} does not exist yet")
    found = reached(ROOT, module)
    assert not UNPAIRED & set(found), [chain(found, m) for m in UNPAIRED & set(found)]


def test_the_graph_is_not_empty():
    """The walk sees what is known to be there: the oracle reaches the renderer, the judge's trainer schooling and verdict."""
    assert {"vlmedit.world.render", "vlmedit.world.scene", "vlmedit.world.verdict"} <= set(reached(ROOT, "vlmedit.world.oracle"))
    assert {"vlmedit.data.judge_lessons", "vlmedit.world.verdict", "vlmedit.flow"} <= set(reached(ROOT, "vlmedit.methods.judge"))


SMUGGLES = {
    "plain": "import lab.oracle",
    "alias": "import lab.oracle as friend",
    "from": "from lab.oracle import parse",
    "module from package": "from lab import oracle",
    "relative": "from . import oracle",
    "relative name": "from .oracle import parse",
    "in a function": "def f():\n    from lab.oracle import parse",
    "in a method": "class A:\n    def f(self):\n        import lab.oracle",
    "by name": "import importlib\nx = importlib.import_module('lab.oracle')",
    "through another": "from lab import helper",
    "through a package": "import lab.sub.leaf",
}


@pytest.mark.parametrize("way", SMUGGLES)
def test_every_way_to_smuggle_an_import_is_seen(way, tmp_path):
    """Mutants: a trainer that reaches a forbidden module in each of eleven ways is found out, and an innocent one is not."""
    files = {
        "lab/__init__.py": "def lazy():\n    import lab.oracle\n",  # runs only if somebody calls it
        "lab/oracle.py": "parse = None",
        "lab/helper.py": "def f():\n    import lab.oracle",
        "lab/sub/__init__.py": "from ..oracle import parse",
        "lab/sub/leaf.py": "",
        "lab/innocent.py": "import lab.other\nimport os.path\ntext = 'the oracle.'",
        "lab/other.py": "",
        "lab/trainer.py": SMUGGLES[way],
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert "lab.oracle" in reached(tmp_path, "lab.trainer")
    assert "lab.oracle" not in reached(tmp_path, "lab.innocent")


def test_training_imports_no_oracle_when_it_runs():
    """The dynamic counterpart: after importing every training module that exists, the oracle is not among the loaded ones."""
    modules = [m for m in training_modules() if file_of(ROOT, m)]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(sorted(set(sys.modules) & {ORACLE}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_no_folder_of_the_repository_hides_a_library():
    """From the repository's root, transformers, diffusers and their friends import, and come from outside the repository."""
    names = ["transformers", "diffusers", "accelerate", "peft", "datasets", "tokenizers", "evaluate"]
    code = f"""
import importlib.util, pathlib, transformers, diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerFast
here = pathlib.Path.cwd().resolve()
hidden = []
for name in {names}:
    spec = importlib.util.find_spec(name)
    places = [spec.origin or '', *(spec.submodule_search_locations or [])] if spec else []
    hidden += [name for p in places if pathlib.Path(p).resolve().parent in (here, here / name) and '.venv' not in p]
print(hidden)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
