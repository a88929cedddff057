"""How the command line starts: its commands, what their files import, and how soon help and mistakes are answered."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vlmedit import cli
from vlmedit.cli import _main, main

FOLDER = Path(cli.__file__).parent
COMMANDS = ("doctor", "train", "edit", "eval", "export", "data", "bench", "notebook", "study")
AT_IMPORT = {*sys.stdlib_module_names, "tyro", "rich", "vlmedit.errors", "vlmedit.cli"}  # and what lies in them

QUICK = [  # what is answered without working: arguments and exit code
    (["--help"], 0),
    *(([command, "--help"], 0) for command in COMMANDS),
    ([], 2),
    (["--version"], 2),
    (["frobnicate"], 2),
    (["edit", "a.png", "--step", "3"], 2),
    (["train", "teacher", "--tier", "desktop"], 2),
    (["study"], 2),
    (["train", "--set", "steps"], 2),
    (["train", "sft", "--config", "gone.yaml"], 2),
    (["train", "--dry-run"], 2),
    (["eval", "--n", "none"], 2),
    (["data", "prepare", "--out", "nowhere"], 2),
    (["data", "--out", "nowhere", "--n", "0"], 2),
]
ANSWER = """
import contextlib, io, json, sys
from vlmedit.cli import main
out = []
for args in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(args)
    heavy = [m for m in ("torch", "diffusers", "transformers", "matplotlib", "pandas", "scipy") if m in sys.modules]
    out.append([code, heavy])
print(json.dumps(out))
"""


def test_help_and_mistakes_load_no_torch(tmp_path):
    """Help of every command, an option that nobody knows, settings that cannot be read: nothing heavy is imported."""
    asked = json.dumps([args for args, _ in QUICK])
    done = subprocess.run([sys.executable, "-c", ANSWER], cwd=tmp_path, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert {" ".join(args): answer for (args, _), answer in zip(QUICK, answers, strict=True)} == {
        " ".join(args): [code, []] for args, code in QUICK
    }
    assert not list(tmp_path.iterdir())


def test_the_probe_sees_torch():
    """A control: a command that needs a model loads torch, and the probe above says so."""
    done = subprocess.run([sys.executable, "-c", ANSWER], input='[["study", "list"]]', capture_output=True, text=True)
    ((code, heavy),) = json.loads(done.stdout)
    assert code == 0 and "torch" in heavy


def cpu_seconds(*args: str) -> float:
    """Processor time of one run of the command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "vlmedit.cli", *args], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: vlmedit" in done.stdout, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("args", [("--help",), ("edit", "--help")])
def test_help_is_there_at_once(args):
    """In less than half a second of processor time; the best of several runs, because other processes disturb it."""
    assert min(cpu_seconds(*args) for _ in range(5)) < 0.5


def imports_at_import(tree: ast.Module) -> list[str]:
    """Modules that a file names outside functions, those for type checkers alone left out."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


def allowed(name: str) -> bool:
    """Whether a module is one of those that may be imported at import, or lies in one."""
    return any(name == one or name.startswith(f"{one}.") for one in AT_IMPORT)


def foreign(source: str) -> list[str]:
    """Imports that a file of the command line may not make at import."""
    return [name for name in imports_at_import(ast.parse(source)) if not allowed(name)]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_files_of_the_command_line_import_little(path):
    """The standard library, tyro, rich and the errors."""
    assert foreign(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from vlmedit.io import save_json",
        "import vlmedit.errors_of_others",
        "try:\n    import numpy as np\nexcept ImportError:\n    pass",
        "class A:\n    from PIL import Image",
        "from . import doctor",
        "from vlmedit import flow",
    ],
)
def test_heavy_imports_would_be_seen(source):
    """Mutants of that rule; and inside a function, or for type checkers, everything may be imported."""
    assert foreign(source)
    indented = source.replace("\n", "\n    ")
    assert not foreign(f"def f():\n    {indented}") and not foreign(f"if TYPE_CHECKING:\n    {indented}")


def test_commands_are_the_files_in_the_order_of_the_help():
    """One file for each, helpers begin with an underscore."""
    assert tuple(_main.commands()) == COMMANDS
    files = {p.stem for p in FOLDER.glob("*.py") if not p.name.startswith("_")}
    assert {function.__name__ for function in _main.commands().values()} == files
    for name, function in _main.commands().items():
        assert function.__module__ == f"vlmedit.cli.{function.__name__}" and name in (function.__name__, "eval")


GREET = '''
def greet(name: str, /, *, times: int = 1) -> int:
    """Say hello."""
    print("hello", name, times)
    return 7
'''


def test_a_new_file_is_a_new_command(tmp_path, monkeypatch, capsys):
    """A file in the folder is enough: it is last in the help, takes options, gives its exit code; helpers do not."""
    (tmp_path / "greet.py").write_text(GREET)
    (tmp_path / "_helper.py").write_text("raise RuntimeError('imported as a command')\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert main(["--help"]) == 0
        said = capsys.readouterr().out
        assert "study,greet}" in said and "Say hello." in said
        assert main(["greet", "you", "--times", "3"]) == 7 and capsys.readouterr().out == "hello you 3\n"
    finally:
        sys.modules.pop("vlmedit.cli.greet", None)
        vars(cli).pop("greet", None)
    monkeypatch.undo()
    assert tuple(_main.commands()) == COMMANDS


def test_the_console_command_is_the_modules():
    """`vlmedit` and `python -m vlmedit.cli` run the same function."""
    declared = (FOLDER.parents[1] / "pyproject.toml").read_text()
    assert 'vlmedit = "vlmedit.cli:main"' in declared and cli.main is _main.main
