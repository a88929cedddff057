"""Who may import whom: one table, and three walls over it, read from the sources (helpers/imports.py).

* The table `ROWS`: what is not listed is forbidden. `KNOWN_BREACHES` is what breaks it today; the list only shrinks.
* The walls are transitive: (a) no trainer can reach the oracle or the evaluation; (b) no trainer that works without
  pairs reaches a verdict; (c) the command line starts without torch.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.imports import Source, chain, file_of, modules, named, reached, statements

from vlmedit.networks.backbones import families

ROOT = Path(__file__).parent.parent


# --- the table


@dataclass(frozen=True)
class Row:
    """A folder or a module, and what may be imported there: folders, or single modules."""

    name: str  # within vlmedit; "" is the package itself
    may: tuple[str, ...] = ()
    at_import: tuple[str, ...] | None = None  # narrower than `may`, of what its import runs; None is the same


FOUR = ("errors", "protocols", "flow", "seeds")  # import nothing of ours, and everybody may import them
NETWORKS = ("networks", "config", "io", "world.tokenizer", "world.scene", "data.batches")  # scene: what patches show
DATA = ("data", "world", "config", "io")
TRAINING = ("training", "config", "io", "figures", "data.batches")
METHODS = ("methods", "testing.resolve", "equations", *TRAINING, *NETWORKS, *DATA)
PIPELINES = ("pipelines", "networks", "world", "io", "figures", "config", "data.requests")
EVALUATION = ("evaluation", "equations", *PIPELINES, *NETWORKS, *DATA)
COST = ("cost", "methods", "networks", "data", "config", "io", "testing.resolve")
EXPERIMENTS = ("experiments", "benchmarks", "", *METHODS, *EVALUATION, *COST)
TEACHING = ("teaching", "teaching.runner", "testing", "doctor", "data.prepare", "", *EXPERIMENTS)

ROWS = (
    *(Row(name) for name in FOUR),
    Row("extras", ("errors",)),  # which extra brings a library; everybody may ask it
    Row("config"),
    Row("io"),
    Row("world"),
    Row("figures", ("io",)),
    Row("equations", ("data.batches",)),
    Row("networks", NETWORKS),
    Row("data", ("world", "config", "io")),
    Row("data.prepare", ("networks", *DATA)),
    Row("training", TRAINING),
    Row("methods", METHODS),
    Row("pipelines", PIPELINES),
    Row("evaluation", EVALUATION),
    Row("benchmarks", EVALUATION),  # measures what evaluation measures, on public sets
    Row("cost", COST),
    Row("experiments", EXPERIMENTS),
    Row("testing", ("networks", "pipelines.shapes", *DATA)),
    Row("teaching", TEACHING),
    Row("teaching.runner", (*TEACHING, "cli")),  # starts the command in a process of its own
    Row("doctor", TEACHING),
    Row("cli", (*TEACHING, "cli"), at_import=("cli", "errors", "extras")),
    Row("kernels", ("equations", "networks", "methods", "cost")),  # nobody imports it
    Row("", ("pipelines", "networks"), at_import=()),  # its names are fetched when they are asked for
)

# Who imports what against the table today, and which change takes it away. A breach that is gone must be struck out
# here.
TRAINER = "one trainer: training/real_models and its settings dissolve into methods, networks and config"
PROTOCOL = "the judge's protocol"
KNOWN_BREACHES: dict[tuple[str, str], str] = {
    ("cost.plan", "training.real_models"): TRAINER,
    ("cost.plan", "training.settings"): TRAINER,
    **{(f"pipelines.{name}", "training.settings"): TRAINER for name in ("card", "export")},
    ("training.settings", "methods.npedit"): TRAINER,
    ("training.real_models", "data.manifest"): TRAINER,
    **{
        ("training.real_models", f"networks.{name}"): TRAINER
        for name in ("checks", "load", "lora", "prompt_cache", "prompts", "quiet")
    },
    **{("training.real_models", name): TRAINER for name in ("equations.unroll", "methods.npedit", "testing")},
    ("equations.judge_loss", "networks.judge"): PROTOCOL,
    ("equations.rewards", "networks.judge"): PROTOCOL,
    ("equations.rewards", "world.tokenizer"): "questions in other words are asked in data/requests",
    ("networks.judges", "equations.judge_loss"): "clamping to what a judge sees is preprocessing of networks",
    ("pipelines.batch_edit", ""): "pipelines have one function that loads any place",
}
STILL_TO_COME: set[str] = set()  # modules that the table names and nobody has written yet
CLI_LOADS_TORCH = False  # until the commands' imports stand inside their functions


# --- the table, checked


def short(module: str) -> str:
    """A module's name within the package."""
    return module.removeprefix("vlmedit").removeprefix(".")


def within(name: str, folder: str) -> bool:
    return name == folder or (folder != "" and name.startswith(f"{folder}."))


def row_of(name: str) -> Row | None:
    """The row that a module is in, the most special one."""
    return max((row for row in ROWS if within(name, row.name)), key=lambda row: len(row.name), default=None)


def allowed(row: Row, may: tuple[str, ...], name: str) -> bool:
    """Whether a module may be imported: it is in the row itself, or listed; a folder does not bring the rows within
    it."""
    target = row_of(name)
    if target is row or (target is not None and target.name in (*FOUR, "extras") and row.name not in FOUR):
        return True
    return any(within(name, entry) and (target is None or len(target.name) <= len(entry)) for entry in may)


def breaches_of(root: Path, module: str) -> set[tuple[str, str]]:
    """Edges from one module that its row does not allow."""
    row = row_of(short(module))
    if row is None:
        return {(short(module), "no row")}
    found = {(short(module), short(n)) for n in named(root, module) if not allowed(row, row.may, short(n))}
    if row.at_import is not None:
        at_once = named(root, module, everywhere=False)
        found |= {(short(module), short(n)) for n in at_once if not allowed(row, row.at_import, short(n))}
    return found


def test_nobody_imports_what_the_table_does_not_list():
    """Every import of every module, against the row of the folder that it is in."""
    found = set().union(*(breaches_of(ROOT, module) for module in modules(ROOT)))
    new, gone = sorted(found - KNOWN_BREACHES.keys()), sorted(KNOWN_BREACHES.keys() - found)
    assert not new, "\n".join(f"{a} may not import {b}" for a, b in new)
    assert not gone, f"strike them out of KNOWN_BREACHES, they are gone: {gone}"


def test_every_module_is_in_a_row_and_every_row_has_one():
    """A new folder without a rule fails; so does a rule without a folder, or one that is said to come and is there."""
    assert [m for m in modules(ROOT) if row_of(short(m)) is None] == []
    assert {row.name for row in ROWS} - {row_of(short(m)).name for m in modules(ROOT)} == STILL_TO_COME
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        entries = {*row.may, *(row.at_import or ())} - {"testing.resolve", *STILL_TO_COME}
        there = {short(m) for m in modules(ROOT)}
        assert all(any(within(m, entry) for m in there) for entry in entries), row


def test_no_import_by_a_name_that_cannot_be_read():
    """A computed name says which folder it is looked for in, or the walls would have a hole."""
    unread = {short(m) for m in modules(ROOT) if Source(ROOT, m).unreadable()}
    assert unread == {"networks.backbones._base", "pipelines.standalone"}  # both checked below


def test_a_backbone_family_names_libraries_and_networks_alone():
    """What `networks.backbones._base` imports by a family's word, and whose source `pipelines.standalone` reads."""
    libraries = {family.library for family in families().values()}
    assert libraries and all(name == "diffusers" or name.startswith("vlmedit.networks.") for name in libraries)
    assert all(call.__module__.startswith("vlmedit.networks.") for f in families().values() for call in f.calls)


# --- mutants of the table


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The tree's sources, to be spoilt."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("vlmedit", "kernels/src"):
        keep = shutil.ignore_patterns("checkpoints", "configs", "__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=keep)
    return root


def spoilt(root: Path, module: str, line: str) -> set[tuple[str, str]]:
    """New breaches of a module that has one more line."""
    path = file_of(root, module)
    before, whole = breaches_of(root, module), path.read_text(encoding="utf-8")
    try:
        path.write_text(f"{whole}\n{line}\n", encoding="utf-8")
        return breaches_of(root, module) - before
    finally:
        path.write_text(whole, encoding="utf-8")


def example_of(name: str) -> str | None:
    """The smallest module of a row, none where the row is still to come."""
    inside = [m for m in modules(ROOT) if row_of(short(m)).name == name]
    return min(inside, key=lambda m: (file_of(ROOT, m).stat().st_size, m), default=None)


THERE = [row for row in ROWS if row.name not in STILL_TO_COME]


@pytest.mark.parametrize("row", THERE, ids=lambda row: row.name or "vlmedit")
def test_one_forbidden_import_fails(row, copied):
    """A copy of the tree in which a module of this row imports one of a row that is not listed, for every such row,
    inside a function; and where less may be imported at once than later, at once."""
    module = example_of(row.name)
    targets = {other.name: example_of(other.name) for other in ROWS if other.name not in (row.name, *STILL_TO_COME)}
    targets = {name: target for name, target in targets.items() if target}
    refused = {n: t for n, t in targets.items() if not allowed(row, row.may, short(t))}
    assert refused, "a row that may import everything is no rule"
    for target in refused.values():
        line = f"def smuggled():\n    from {target} import anything\n"
        assert spoilt(copied, module, line) == {(short(module), short(target))}, (module, target)
    if row.at_import is not None:
        for target in (t for t in targets.values() if not allowed(row, row.at_import, short(t))):
            new = {(short(module), short(target))}
            assert spoilt(copied, module, f"import {target}") == new - breaches_of(copied, module)
    for target in sorted(targets.keys() - refused.keys()):
        assert not spoilt(copied, module, f"def fine():\n    import {targets[target]}\n"), (module, target)


@pytest.mark.parametrize("way", ("type checking", "string", "computed", "relative", "whole folder"))
def test_the_table_sees_every_way(way, copied):
    """A network that imports a method: for its types alone, by its name as text, by a computed name, relatively, or by
    looking into the folder."""
    line = {
        "type checking": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmedit.methods import npedit",
        "string": "HOME = 'vlmedit.methods.npedit'",
        "computed": "import importlib\ndef f(name):\n    importlib.import_module(f'vlmedit.methods.{name}')",
        "relative": "def f():\n    from ..methods import npedit",
        "whole folder": "import pkgutil\nfrom vlmedit import methods\nX = list(pkgutil.iter_modules(methods.__path__))",
    }[way]
    assert ("networks.dit", "methods.npedit") in spoilt(copied, "vlmedit.networks.dit", line)


def test_a_module_without_a_row_is_found(copied):
    """A new folder that nobody has written a rule for."""
    (copied / "vlmedit" / "attic").mkdir()
    (copied / "vlmedit" / "attic" / "__init__.py").write_text("")
    try:
        assert row_of("attic") is None and breaches_of(copied, "vlmedit.attic") == {("attic", "no row")}
    finally:
        shutil.rmtree(copied / "vlmedit" / "attic")


# --- the walls


WALLED = ("methods", "training", "equations", "networks", "data")  # where nobody may know what the oracle says
TRUTH = ("world.oracle", "evaluation", "experiments")
VERDICTS = ("world.verdict", "data.judge_lessons", "data.lesson_pictures")
SCHOOL = ("methods", "methods.judge", "methods.stages")  # the judge's own trainer, and whoever finds all methods by name


def found_behind(root: Path, module: str, wall: tuple[str, ...]) -> list[str]:
    """What a module reaches behind a wall, and how."""
    found = reached(root, module)
    return [chain(found, m) for m in sorted(found) if any(within(short(m), place) for place in wall)]


def training_modules(*folders: str) -> list[str]:
    return sorted(m for m in modules(ROOT) if any(within(short(m), folder) for folder in folders or WALLED))


@pytest.mark.parametrize("module", training_modules())
def test_training_cannot_reach_oracle_or_evaluation(module):
    """No import, at whatever depth or inside whatever function, leads from training code to the oracle or to
    evaluation."""
    assert not found_behind(ROOT, module, TRUTH)


NO_PAIRS = [m for m in training_modules("methods") if short(m) not in SCHOOL]


@pytest.mark.parametrize("module", (*NO_PAIRS, "vlmedit.data.world", "vlmedit.data.cycles", "vlmedit.data.manifest"))
def test_no_pair_training_reaches_no_verdict(module):
    """No trainer but the judge's school reaches oracle, evaluation, verdict or lessons."""
    assert not found_behind(ROOT, module, (*TRUTH, *VERDICTS))


def test_the_graph_is_not_empty():
    """The walk sees what is known to be there: the oracle reaches the renderer, the judge's trainer lessons and
    verdict."""
    oracle, judge = reached(ROOT, "vlmedit.world.oracle"), reached(ROOT, "vlmedit.methods.judge")
    assert {"vlmedit.world.render", "vlmedit.world.scene", "vlmedit.world.verdict"} <= set(oracle)
    assert {"vlmedit.data.judge_lessons", "vlmedit.world.verdict", "vlmedit.flow"} <= set(judge)
    assert len(NO_PAIRS) >= 9 and found_behind(ROOT, "vlmedit.evaluation.editing", TRUTH)


def test_the_walls_hold_against_a_new_method(copied):
    """A method that reads the verdict, or evaluates itself, is found the day that it is written."""
    path = copied / "vlmedit" / "methods" / "newest.py"
    reads, measures = "from vlmedit.world.verdict import edit_done", "import vlmedit.evaluation.editing"
    for line, wall in ((reads, VERDICTS), (measures, TRUTH)):
        path.write_text(f"def f():\n    {line}\n")
        file_of.cache_clear()
        assert found_behind(copied, "vlmedit.methods.newest", wall)
    path.unlink()
    file_of.cache_clear()


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
    "by a computed name": "from importlib import import_module\ndef f(name):\n    return import_module(f'lab.{name}')",
    "by looking around": "import pkgutil\nimport lab\nnames = [m.name for m in pkgutil.iter_modules(lab.__path__)]",
    "by its folder as text": "def f(find):\n    return find('lab.sub')",
    "for its types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lab.oracle import parse",
}


@pytest.mark.parametrize("way", SMUGGLES)
def test_every_way_to_smuggle_an_import_is_seen(way, tmp_path):
    """Mutants: a trainer that reaches a forbidden module in each of fifteen ways is found out, and an innocent one is
    not."""
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
    """The dynamic counterpart: after importing every training module, the oracle is not among the loaded ones."""
    behind = {m for m in modules(ROOT) if any(within(short(m), place) for place in TRUTH)}
    imports = f"for m in {training_modules()}: importlib.import_module(m)"
    code = f"import importlib, sys\n{imports}\nprint(sorted(set(sys.modules) & {behind}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")


@pytest.mark.xfail(CLI_LOADS_TORCH, strict=True, reason="the commands' imports do not stand inside their functions yet")
def test_the_command_line_starts_without_torch():
    """Nothing that importing the command line imports of ours, at whatever depth, imports a heavy library on import."""
    found = reached(ROOT, "vlmedit.cli", everywhere=False)
    heavy = {}
    for module in found:
        nodes = list(statements(Source(ROOT, module).tree, everywhere=False))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        if taken := sorted(name for name in names if name.split(".")[0] in HEAVY):
            heavy[module] = taken
    assert not heavy, {chain(found, m): names for m, names in heavy.items()}


@pytest.mark.xfail(CLI_LOADS_TORCH, strict=True, reason="the commands' imports do not stand inside their functions yet")
def test_no_torch_is_loaded_after_the_help():
    """The dynamic counterpart."""
    code = f"import sys, vlmedit.cli\nprint(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_no_folder_of_the_repository_hides_a_library():
    """From the repository's root, transformers, diffusers and their friends import, and come from outside the
    repository."""
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
