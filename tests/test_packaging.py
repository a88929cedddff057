"""What is shipped, and the tools around it: the source distribution is complete, the wheel works outside the checkout.

The wheel is built from the unpacked source distribution, offline, and installed into virtual environments that hold
what it declares and nothing else: the plain one must edit and evaluate, the full one must train and run notebooks.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageDraw

from vlmedit.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IGNORED = shutil.ignore_patterns(
    ".git",
    ".venv",
    "runs",
    "outputs",
    "dist",
    "build",
    "site",
    "shared",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
)
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
IMPORTED_AS = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "pyzmq": "zmq",
    "huggingface-hub": "huggingface_hub",
    "jupyterlab": "IPython",
}
CHOSEN = {"bitsandbytes", "trackio", "wandb"}  # imported only where a setting names them


def run(*command, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A command without the checkout on its path; its exit code is checked."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout's files, so that building leaves nothing behind in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "vlmedit", ignore=IGNORED, symlinks=True)


@pytest.fixture(scope="module")
def unpacked(checkout, tmp_path_factory) -> Path:
    """The source distribution, built from the checkout and unpacked elsewhere."""
    before, folder = files_below(checkout), tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    shutil.rmtree(checkout / "vlmedit.egg-info")
    assert files_below(checkout) == before
    return folder / f"vlmedit-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(unpacked, folder / "source")
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=copy)
    (built,) = folder.glob("*.whl")
    return built


def required(requirement: Requirement, extras: set[str], found: dict[str, metadata.Distribution]) -> None:
    """Add what `requirement` needs, and what that needs, as it is installed here."""
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}):
        return
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return  # of another platform, or optional in this environment
    name = canonicalize_name(distribution.name)
    if name in found and not requirement.extras:
        return
    found[name] = distribution
    for text in distribution.requires or ():
        required(Requirement(text), set(requirement.extras), found)


def declared(extras: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The distributions that an installation of the package with these extras brings."""
    found: dict[str, metadata.Distribution] = {}
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, texts):
        if requirement.name == "vlmedit":
            found |= declared(tuple(requirement.extras))
        else:
            required(requirement, set(), found)
    return found


def environment(wheel: Path, folder: Path, *extras: str) -> Path:
    """A virtual environment with the wheel and what it declares, linked to what is here; its programs' folder."""
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for distribution in declared(extras).values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def plain(wheel, tmp_path_factory) -> Path:
    return environment(wheel, tmp_path_factory.mktemp("plain") / "venv")


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory) -> Path:
    return environment(wheel, tmp_path_factory.mktemp("full") / "venv", "train", "notebooks", "test")


@pytest.fixture()
def drawing(tmp_path) -> Path:
    """A blue disc on grey."""
    picture = Image.new("RGB", (64, 64), (128, 128, 128))
    ImageDraw.Draw(picture).ellipse((12, 12, 44, 44), fill=(40, 60, 220))
    picture.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


# --- what is in them


def test_the_source_distribution_holds_every_file(checkout, unpacked):
    """Tests, pages, notebooks and results included; beside them only what building adds."""
    missing = files_below(checkout) - files_below(unpacked)
    assert not missing, f"add to MANIFEST.in: {sorted(missing)[:5]}"
    added = {name for name in files_below(unpacked) - files_below(checkout) if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_and_nothing_else(checkout, wheel):
    """All modules by their names, checkpoints, settings, notebooks; no tests and no papers."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"vlmedit/{name}" for name in files_below(checkout / "vlmedit")}
    expected |= {f"vlmedit/kernels/{name}" for name in files_below(checkout / "kernels/src")}
    expected |= {f"vlmedit/notebooks/{name}" for name in files_below(checkout / "notebooks")}
    assert names == expected
    assert not [name for name in names if name.startswith("kernels")]  # the Hub's package is called so
    assert "vlmedit/py.typed" in names and "vlmedit/checkpoints/shapes/editor/config.json" in names


def test_the_metadata_say_what_a_user_needs_to_know(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    assert f"Version: {PROJECT['version']}\n" in text and "License-Expression: MIT" in text
    assert set(re.findall(r"^Provides-Extra: (\w+)$", text, re.M)) == set(PROJECT["optional-dependencies"])
    assert (
        "Programming Language :: Python :: 3.13" in text and "Typing :: Typed" in text and "Project-URL: Paper" in text
    )


def third_party(path: Path) -> set[str]:
    """The libraries that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vlmedit"}


def test_every_library_is_declared_and_every_declared_one_is_used():
    """What is imported comes with a plain install or with the extra that its message names; nothing in vain."""
    used = {
        name
        for folder in ("vlmedit", "kernels/src")
        for path in (ROOT / folder).rglob("*.py")
        for name in third_party(path)
    }

    def as_imported(texts: list[str]) -> set[str]:
        return {IMPORTED_AS.get(r.name, r.name) for r in map(Requirement, texts)} - {"vlmedit"}

    always = as_imported(PROJECT["dependencies"])
    extras = {
        extra: as_imported(PROJECT["optional-dependencies"][extra])
        for extra in ("train", "notebooks", "data", "kernels")
    }
    assert used <= always | set(EXTRAS) | CHOSEN, used - always - set(EXTRAS) - CHOSEN
    assert always <= used, always - used
    for library, extra in EXTRAS.items():
        assert library in extras[extra] and library not in always, f"{library} is not in the extra {extra}"


# --- what they do


def test_the_plain_installation_edits_and_evaluates(plain, drawing, tmp_path):
    """Nothing of the checkout is imported, and nothing that only an extra brings."""
    where = "import json, sys, vlmedit; print(json.dumps([vlmedit.__version__, vlmedit.__file__]))"
    version, file = json.loads(run(plain / "python", "-c", where, cwd=tmp_path).stdout)
    assert version == PROJECT["version"] and Path(file).is_relative_to(plain.parent)
    run(
        plain / "vlmedit",
        "edit",
        drawing,
        "make the background white",
        "--out",
        "edited.png",
        "--report",
        "--force",
        cwd=tmp_path,
    )
    assert {"edited.png", "edited.json", "edited-strip.png"} <= files_below(tmp_path)
    run(plain / "vlmedit", "eval", "--n", "8", "--steps", "1", "--json", "metrics.json", cwd=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["n"] == 8


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("train", "npedit", "--tier", "smoke"), "train"),
        (("notebook", "list"), "notebooks"),
        (("notebook", "copy", "mine"), "notebooks"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_missing_extra_is_named_in_one_line(command, extra, plain, tmp_path):
    done = run(plain / "vlmedit", *command, cwd=tmp_path, code=2)
    assert done.stderr.count("\n") == 1 and f"pip install 'vlmedit[{extra}]'" in done.stderr, done.stderr
    assert not files_below(tmp_path)


def test_the_full_installation_trains(full, tmp_path):
    """Two updates of the smoke tier from the shipped checkpoints, into a folder of the user's."""
    shipped = "from importlib.resources import files; print(files('vlmedit') / 'checkpoints/shapes')"
    models = Path(run(full / "python", "-c", shipped, cwd=tmp_path).stdout.strip())
    roles = (
        f"{role}={models / folder}"
        for role, folder in (("teacher", "teacher"), ("judge", "judge"), ("student", "warm"))
    )
    settings = ("--set", "steps=2", "side=32", "precision=no", *roles)
    run(full / "vlmedit", "train", "npedit", "--tier", "smoke", "--out", "mine", *settings, cwd=tmp_path)
    assert any(name.startswith("mine/model/") for name in files_below(tmp_path))


def test_the_full_installation_lists_copies_and_runs_notebooks(full, tmp_path):
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    run(full / "vlmedit", "notebook", "list", "--json", "list.json", cwd=tmp_path)
    assert list(json.loads((tmp_path / "list.json").read_text())) == names
    run(full / "vlmedit", "notebook", "copy", "mine", cwd=tmp_path)
    assert files_below(tmp_path / "mine") == {f"{name}.ipynb" for name in names}
    run(
        full / "vlmedit",
        "notebook",
        "run",
        "mine/00_start_here.ipynb",
        "-p",
        "TIER=smoke",
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out/00_start_here.json").read_text())["ok"]


def test_a_study_keeps_its_results_where_it_is_run(full, tmp_path):
    """Outside a checkout beside its trainings, in one with the papers."""
    code = "from vlmedit.experiments.study.plans import folder_of; print(folder_of('objective'))"
    assert run(full / "python", "-c", code, cwd=tmp_path).stdout.strip() == "runs/studies/objective"
    (tmp_path / "papers/results").mkdir(parents=True)
    assert run(full / "python", "-c", code, cwd=tmp_path).stdout.strip() == "papers/results/studies/objective"


@pytest.mark.parametrize("module", ["workshop", "badges"])
def test_what_needs_a_checkout_says_so(module, full, tmp_path):
    done = run(full / "python", "-m", f"vlmedit.teaching.{module}", cwd=tmp_path, code=2)
    assert (
        done.stderr.count("\n") == 1 and "is no checkout of the repository" in done.stderr and not files_below(tmp_path)
    )


def test_the_source_distribution_passes_tests(full, unpacked):
    """A few files of the suite, from the unpacked archive, with its own helpers and configuration."""
    done = run(
        full / "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_flow.py",
        "tests/world/test_scenes.py",
        cwd=unpacked,
    )
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout


# --- tools

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_lock_holds_what_the_package_declares():
    """Every library of a plain install and of the extras that the tests need, at a version within its bounds."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    locked = {canonicalize_name(name): version for name, version in pairs}
    extras = [
        text for name in ("train", "notebooks", "data", "test") for text in PROJECT["optional-dependencies"][name]
    ]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        if requirement.name != "vlmedit":
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_every_extra_is_in_all():
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == set(PROJECT["optional-dependencies"]) - {"all"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_targets_that_exist(path):
    """Each job checks the code out and runs make targets; what else it runs installs the system's packages."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (
        workflow["permissions"] == {"contents": "read"} and True in workflow
    )  # YAML reads the key `on` as a truth value
    for job in workflow["jobs"].values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        made = [command.split()[1] for command in commands if command.startswith("make ")]
        assert made and set(made) <= TARGETS and job["timeout-minutes"] <= 360
        assert all(command.startswith(("make ", "sudo apt-get ")) for command in commands)
        assert job["steps"][0]["uses"].startswith("actions/checkout@")


def test_the_workflows_cover_what_is_supported():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs) == {"lint", "test", "notebooks", "package", "docs"}
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]


def test_ci_and_help_name_make_targets_that_exist():
    called = set(re.findall(r"^(?:make|.*\|\| make) ([a-z-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M))
    told = set(re.findall(r'@echo "make ([a-z-]+)', (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert "test" in called <= TARGETS and told <= TARGETS


def test_pre_commit_never_strips_outputs():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = [hook["id"] for repo in yaml.safe_load(text)["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "mypy", "nbformat", "check-added-large-files"} <= set(hooks)
    assert "nbstripout" not in text and not any("strip" in hook for hook in hooks)
