"""The notebooks and the papers' pages: every name in them exists, and every notebook runs top to bottom, unsolved, with sane metrics."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vlmedit.pipelines.shapes import checkpoint
from vlmedit.teaching import checking, exercises
from vlmedit.teaching.checking import Exercise
from vlmedit.teaching.notebook import without_outputs
from vlmedit.teaching.workshop import solved

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted((ROOT / "papers").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
name_of = lambda path: path.stem


def code_of(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def text_of(path: Path) -> str:
    if path.suffix == ".ipynb":
        return "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    return path.read_text()


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = dotted.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ImportError:
            continue
        for part in parts[k:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_there_are_notebooks():
    assert "00_start_here" in [p.stem for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_form(path):
    """Valid; kernel python3; one question as title; literal parameters with one dial; no installs, no path tricks; metrics last."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert re.match(r"# \d\d .+\?\n", notebook.cells[0].source)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    given = {}
    for statement in ast.parse(tagged[0].source).body:
        (target,) = statement.targets
        given[target.id] = ast.literal_eval(statement.value)  # raises for anything computed
    assert given["TIER"] == "smoke" and given["SEED"] == 0
    code = "\n".join(code_of(path))
    assert not re.search(r"sys\.path|^\s*[!%]|pip install|os\.chdir|/home/|/work/|/tmp/", code, re.M)
    assert "checking.record(" in code_of(path)[-1]
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_import_and_attribute_of_the_package_exists(path):
    tree = ast.parse("\n".join(code_of(path)))
    modules, named = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vlmedit"):
            named += [f"{node.module}.{a.name}" for a in node.names]
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            modules |= {a.name: a.name for a in node.names if a.name.startswith("vlmedit")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            named.append(f"{modules[node.value.id]}.{node.attr}")
    if importlib.util.find_spec("triton") is None:  # then a stand-in without its functions
        named = [n for n in named if not n.startswith("vlmedit.kernels.dispatch.t")]
    assert named and not [n for n in named if not exists(n)]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=name_of)
def test_every_name_in_the_prose_exists(path):
    """`vlmedit.a.b` resolves, as do test names after a `test_x` file, and links to files of the repository."""
    text = text_of(path)
    assert not [n for n in re.findall(r"`(vlmedit(?:\.\w+)+)", text) if not exists(n)]
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (path.parent / target.partition("#")[0]).exists(), target
    for line in text.splitlines():
        # "`test_flow`: `test_a`, `test_b`; `test_pipeline::test_c`"
        tests, here = {}, None
        for name, inner in re.findall(r"`(test_\w+)(?:::(test_\w+))?`", line):
            if inner or any((ROOT / "tests").rglob(f"{name}.py")):
                here = name
                tests.setdefault(here, [])
                if inner:
                    tests[here].append(inner)
            else:
                assert here, f"no file {name}.py in tests"
                tests[here].append(name)
        for file, functions in tests.items():
            (found,) = (ROOT / "tests").rglob(f"{file}.py")
            source = found.read_text()
            assert not [f for f in functions if f"def {f}(" not in source], file


def test_settings_of_the_papers_table_are_the_configs():
    """The column "here" of papers/npedit.md against the defaults it speaks of."""
    from vlmedit.data.world import EDIT_SHARES
    from vlmedit.experiments.live import LIVE
    from vlmedit.methods.copy_warmup import CopyWarmupConfig
    from vlmedit.methods.judge import JudgeConfig
    from vlmedit.methods.npedit import NPEditConfig
    from vlmedit.networks.dit import DiT

    page = (ROOT / "papers/npedit.md").read_text()
    here = {row[1].strip(" *"): row[4].strip() for line in page.splitlines() if len(row := line.split("|")) == 6}
    c, w = NPEditConfig.make("laptop"), CopyWarmupConfig.make("laptop")
    dit = DiT.__init__.__wrapped__.__defaults__ if hasattr(DiT.__init__, "__wrapped__") else ()
    assert (32, 3, 4, 128, 6) == dit[:5] and "patch 4, width 128, depth 6" in here["base model"]
    g = lambda x: f"{x:g}".replace("0.", ".", 1) if 0 < x < 1 else f"{x:g}"
    assert f"size {JudgeConfig.make('laptop').size}" in here["judge"] and here["resolution"] == f"{c.side} x {c.side}"
    assert here["warm-up"].startswith(f"{w.steps:,} updates, of which {w.reading_steps} for reading") and here["its batch, learning rate"].startswith(f"{w.batch}; {w.lr * 1000:g}e-3 to {w.final_lr:.0%}".replace("%", " %"))
    assert here["its time shift, text dropout"] == f"{g(w.time_shift)}, {g(w.text_dropout)}"
    assert here["main stage: updates".replace("main stage", "main stage**")] == f"{c.steps:,}; main job's live run {LIVE['laptop']['steps']}"
    assert here["batch"] == str(c.batch)
    assert here["learning rate"] == f"{c.lr * 1000:g}e-3, {c.warmup} warm-up, cosine to {c.final_lr:.0%}; fake {c.fake_lr * 1000:g}e-3, likewise".replace("%", " %")
    assert f"({g(c.betas[0])}, {g(c.betas[1])})" in here["optimizer"] and f"weight decay {g(c.weight_decay)}" in here["optimizer"]
    assert here["gradient clip, spike guard"] == f"{g(c.clip)}, skip above {g(c.skip_above)}"
    assert here["EMA"].startswith(g(c.ema))
    weights = next(v for k, v in here.items() if k.startswith("$\\lambda"))
    assert weights == ", ".join(g(x) for x in (c.dmd_weight, c.judge_weight, c.nothing_weight))
    assert here["logit-gain ramp"] == f".1 to 1 over {c.logit_gain_steps} of {c.steps:,}"
    assert here["guidance $w$ of the real score"] == f"{g(c.guidance)} for all"
    assert here["fake updates per student update"].startswith(f"{c.fake_updates}, on the student") and c.fake_rollouts == "shared"
    assert here["second time $t$"] == "{.75, .5, .25} (shift 1)" and (c.sampler_steps, c.sampler_shift) == (4, 1.0)
    assert (here["calls in the unroll"], c.calls) == ("as released", "mixed") and (here["noise at the second call"], c.renoise) == ("fresh", "fresh")
    assert here["do-nothing share"] == f"{EDIT_SHARES['nothing']:.0%}".replace("%", " %")
    assert here["share of requests that are fulfilled already (target = reference)"].startswith(f"{c.data.fulfilled_share:.0%}".replace("%", " %"))
    assert here["removals among requests"].startswith(f"{EDIT_SHARES['remove']:.0%}".replace("%", " %"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_exercise_runs_as_a_stub_and_with_its_solution(path):
    """Each stub's own cell gives the reference; the reference in its place is kept. Every stub is checked."""
    notebook = nbformat.read(path, 4)
    stubs = [c.source for c in notebook.cells if "exercise" in c.metadata.get("tags", ())]
    checks = dict(re.findall(r"^(\w+) = checking\.check\(\1, exercises\.(\w+)\)$", "\n".join(code_of(path)), re.M))
    names = {ast.parse(s).body[0].name for s in stubs}
    assert names == set(checks) and names
    for stub in stubs:
        space: dict = {}
        exec("import torch\nfrom vlmedit.world.edits import Edit\nfrom vlmedit.world.scene import Scene\n" + stub, space)
        name = ast.parse(stub).body[0].name
        exercise = getattr(exercises, checks[name])
        assert isinstance(exercise, Exercise)
        assert checking.check(space[name], exercise) is exercise.reference
        assert checking.check(exercise.reference, exercise) is exercise.reference


def execute(path: Path, folder: Path, *options: str) -> Path:
    """The notebook executed by `vlmedit notebook run` at tier smoke in an empty folder, where it leaves nothing else."""
    command = [sys.executable, "-m", "vlmedit.cli", "notebook", "run", str(path), "-p", "TIER=smoke", "--out", str(folder), *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    assert sorted(p.name for p in folder.iterdir()) == [path.name, f"{path.stem}.json"]
    return folder / path.name


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """Each notebook executed once; the path of the result."""
    done: dict[Path, Path] = {}

    def run(path: Path) -> Path:
        if path not in done:
            done[path] = execute(path, tmp_path_factory.mktemp(path.stem))
        return done[path]

    return run


def lacking() -> str:
    """What of the shipped checkpoints is not there; empty when all are."""
    try:
        for role in ("editor", "teacher", "warm", "judge"):
            checkpoint("shapes", role)
    except FileNotFoundError as error:
        return str(error)
    return ""


needs_checkpoints = pytest.mark.skipif(bool(lacking()), reason=f"the notebooks need the shipped checkpoints: {lacking()}")
MEASURED = re.compile(r"seconds|cpu|time|memory|mib|gib|peak|cost", re.I)  # metrics of the machine, which differ from run to run


def figures(metrics: dict, before: str = "") -> dict:
    """Recorded metrics by their full names, without those of the machine."""
    out = {}
    for name, value in metrics.items():
        inner = figures(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
        out |= {k: v for k, v in inner.items() if not MEASURED.search(k)}
    return out


def same(one: dict, other: dict) -> bool:
    one, other = figures(one), figures(other)
    return one.keys() == other.keys() and all(v == (pytest.approx(other[k], rel=1e-3, abs=1e-4) if isinstance(v, float) else other[k]) for k, v in one.items())


@needs_checkpoints
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_runs_top_to_bottom_unsolved(path, executed):
    notebook = nbformat.read(executed(path), 4)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
    kinds = [o.output_type for c in notebook.cells for o in c.get("outputs", ())]
    assert "error" not in kinds
    pictures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ()))
    assert pictures >= 3
    metrics = checking.recorded(executed(path))
    assert metrics["tier"] == "smoke" and metrics["seed"] == 0 and metrics["seconds"] > 0


@needs_checkpoints
def test_start_here_records_what_it_claims(executed):
    metrics = checking.recorded(executed(ROOT / "notebooks/00_start_here.ipynb"))
    assert metrics["lazy_done"] <= 1 and metrics["lazy_kept"] >= 7 and metrics["lazy_p_identity"] > 0.7 > 0.3 > metrics["lazy_p_edit"]
    assert 0.5 <= metrics["success"] <= 1 and set(metrics["success_by_type"]) == {"add", "remove", "replace", "recolor", "texture", "background", "move", "style"}
    believed = sum(metrics["judge_p_yes"].values()) / 2
    assert metrics["hacking_gap"] == pytest.approx(believed - metrics["success"], abs=1e-6)
    assert metrics["n"] == 32 and metrics["keep_psnr"] > 20


@needs_checkpoints
def test_plain_papermill_elsewhere_on_half_deleted_outputs_changes_nothing(executed, tmp_path):
    """Executed notebook 00 with one output gone, by papermill itself, in another folder: the same figures, and nothing else written."""
    first = executed(ROOT / "notebooks/00_start_here.ipynb")
    book = nbformat.read(first, 4)
    book.cells = [c for c in book.cells if "injected-parameters" not in c.metadata.get("tags", ())]
    next(c for c in book.cells if c.get("outputs")).outputs = []
    (tmp_path / "here").mkdir()
    nbformat.write(book, tmp_path / "again.ipynb")
    command = [sys.executable, "-m", "papermill", "../again.ipynb", "out.ipynb", "-p", "TIER", "smoke", "-k", "python3", "--no-progress-bar", "--execution-timeout", "600"]
    result = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["out.ipynb"]
    assert same(checking.recorded(first), checking.recorded(tmp_path / "here/out.ipynb"))


def twice(path: Path, folder: Path) -> Path:
    """A notebook whose code runs two times in one kernel, as after `Run All Cells` again."""
    book = nbformat.read(path, 4)
    again = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ())]
    for cell in again:
        cell.id = f"again-{cell.id}"[:64]
    book.cells += again
    nbformat.write(book, folder / path.name)
    return folder / path.name


@needs_checkpoints
@pytest.mark.parametrize("path", [p if p.stem == "00_start_here" else pytest.param(p, marks=pytest.mark.solved) for p in NOTEBOOKS], ids=name_of)
def test_running_all_cells_again_changes_nothing(path, tmp_path):
    """No cell depends on what a later one left behind: the second pass in the same kernel records the figures of the first."""
    (tmp_path / "out").mkdir()
    book = nbformat.read(execute(twice(path, tmp_path), tmp_path / "out"), 4)
    start = next(i for i, c in enumerate(book.cells) if c.id.startswith("again-"))
    passes = []
    for cells in (book.cells[:start], book.cells[start:]):
        passes.append({k: v for c in cells for o in c.get("outputs", ()) for k, v in o.get("data", {}).get(checking.METRICS, {}).items()})
    assert passes[0] and same(*passes)


@pytest.mark.solved
@needs_checkpoints
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_runs_top_to_bottom_with_the_solutions(path, tmp_path):
    """Every stub replaced by its reference, as in the teacher's zip: each is told right, and the figures are sane."""
    book = solved(nbformat.read(path, 4))
    stubs = 0
    for cell in book.cells:
        if "exercise" in cell.metadata.get("tags", ()):
            cell.source = cell.source[cell.source.index("# the solution") :]
            stubs += 1
    nbformat.write(without_outputs(book), tmp_path / path.name)
    (tmp_path / "out").mkdir()
    done = execute(tmp_path / path.name, tmp_path / "out")
    said = "".join(o.get("text", "") for c in nbformat.read(done, 4).cells for o in c.get("outputs", ()))
    assert said.count("the notebook goes on with yours") == stubs and "not solved yet" not in said
    assert checking.recorded(done)["tier"] == "smoke"
