"""Prose: figures in the notebooks are recorded ones, headings are in order, links and commands lead somewhere, README's program runs.

What counts as a figure: a decimal, a percentage, or a number with a unit of measurement, outside mathematics, code, references and names.
Where it may come from: what the notebook recorded, its parameters, its constants in capitals. Machine times have their line in the header.
"""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

from vlmedit.teaching import checking

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "notebooks").glob("*.md")), *sorted((ROOT / "papers").glob("*.md"))]
name_of = lambda path: path.stem

EXAMPLES = {"03_judge": {"0.8"}, "06_evaluation": {"0.79", "0.76"}, "08_real_models": {"80"}}  # made up to explain something, and said to be so; no measurement

UNIT = r"(?:%|percent\b|per cent\b|dB\b|ms\b|[KMG]i?B\b|CPU-seconds\b|CPU-minutes\b|times (?:as|faster|slower|cheaper|more|less|larger|smaller)\b)"
FIGURE = re.compile(rf"(?<![\w.])([+-]?\d*\.\d+|\d[\d,]*(?=\s?{UNIT}))(\s?(?:%|percent\b|per cent\b))?")
NO_FIGURE = (
    r"```.*?```",
    r"\$\$.*?\$\$",
    r"\$[^$]*\$",
    r"`[^`]*`",
    r"\[[^\]]*\]\([^)]*\)",  # a link's text is a name
    r"https?://\S+",
    r"<[^>]+>",
    r"arXiv:\S+",
    r"\*\*Machine time:\*\*.*?(?=\*\*|\Z)",
    r"(?:[Ss]ec(?:tion)?s?\.?|[Ee]q(?:uation)?s?\.?|[Ff]ig(?:ure)?s?\.?|[Tt]ables?|[Aa]ppendix|[Nn]otebooks?)\s+[A-Z]?[\d.]+(?:(?:,| and| to)\s+[\d.]+)*",
    r"\b95\s?%",  # the level of confidence
    r"(?:Python|PyTorch|torch|CUDA|Triton|diffusers|transformers|version)\s+\d[\d.]*",
    r"\b[A-Za-z][\w-]*\d[\w.-]*",  # names with a number in them, Qwen2.5-VL
)


def prose(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]


def figures(text: str) -> list[str]:
    """The figures of a text as they stand there, with a percent sign if they have one."""
    for pattern in NO_FIGURE:
        text = re.sub(pattern, " ", text, flags=re.S)
    return [number.replace(",", "") + ("%" if share.strip() else "") for number, share in FIGURE.findall(text)]


def flat(value) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in flat(v)]
    if isinstance(value, list | tuple | set):
        return [x for v in value for x in flat(v)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def sources(path: Path) -> list[float]:
    """Numbers that prose may quote: recorded ones, parameters, constants in capitals."""
    out = flat(checking.recorded(path))
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets):
                out += [float(n.value) for n in ast.walk(node.value) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
    return out


def quoted(figure: str, values: list[float]) -> bool:
    """Whether the figure is one of the values, to the digits that it is given with."""
    number = float(figure.rstrip("%"))
    digits = len(figure.rstrip("%").partition(".")[2])
    scale = 100 if figure.endswith("%") else 1
    return any(abs(sign * scale * v - number) <= 0.5 * 10**-digits + 1e-9 for v in values for sign in (1, -1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_figures_in_the_prose_are_recorded(path):
    values, examples = sources(path), EXAMPLES.get(path.stem, set())
    loose = [f for text in prose(path) for f in figures(text) if f not in examples and not quoted(f, values)]
    assert not loose, f"figures that the notebook does not record: {', '.join(loose)}; record them, make them parameters, or leave them to a title"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("success rises to 0.75 of all", ["0.75"]),
        ("a share of .41, or 41 % or 3.5% or 12 percent, at 95 % confidence", [".41", "41%", "3.5%", "12%"]),
        ("kept at 31.2 dB and 28 dB in 1,200 MiB, 3 times faster", ["31.2", "28", "1200", "3"]),
        ("it gains +0.1 and loses -2.5", ["+0.1", "-2.5"]),
        ("Section 3.2, Eq. 7.1 and 7.2, arXiv:2510.14978, `x = 0.5`, $t = 0.75$, Qwen2.5-VL, PyTorch 2.9", []),
        ("4 steps, 32 pixels, a 7-billion-parameter model, notebook 05, exercise 1.", []),
        ("**Machine time:** 2.5 minutes. **Paper:** a gap of 0.3", ["0.3"]),
    ],
)
def test_what_a_figure_is(text, found):
    assert figures(text) == found


def test_when_a_figure_is_quoted():
    assert quoted("0.75", [0.7512]) and quoted("75%", [0.7512]) and quoted("31", [31.4]) and quoted("-0.10", [0.1])
    assert not quoted("0.75", [0.756]) and not quoted("75%", [0.756]) and not quoted("0.75", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_headings_are_in_order(path):
    """One title, no level left out; sections and exercises are numbered as they come."""
    text = re.sub(r"```.*?```", "", "\n\n".join(prose(path)), flags=re.S)
    headings = [(len(marks), title.strip()) for marks, title in re.findall(r"^(#+) (.+)$", text, re.M)]
    levels = [level for level, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert not [title for (before, _), (level, title) in zip(headings, headings[1:]) if level > before + 1]
    for pattern in (r"(\d+) \S", r"Exercise (\d+)"):
        numbers = [int(m[1]) for level, title in headings if level > 1 and (m := re.match(pattern, title))]
        assert numbers == list(range(1, len(numbers) + 1)), [title for _, title in headings]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda p: p.name)
def test_links_and_pictures(path):
    """Links into the repository and to headings lead there; those to arXiv are what their text says; pictures have a text in their place."""
    text = "\n\n".join(prose(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for mark, words, target in re.findall(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", text):
        assert words.strip(), f"no text for {target}"
        assert target.startswith("https://") or (target[1:] in slugs if target[0] == "#" else (path.parent / target.partition("#")[0]).exists()), target
        if said := re.search(r"arXiv:(\d{4}\.\d{5})", words):
            assert target.endswith(said[1]), f"{words} leads to {target}"
        assert not (mark and len(words) < 8), f"the picture {target} is described by {words!r} alone"
    assert not [tag for tag in re.findall(r"<img[^>]*>", text) if not re.search(r'alt="[^"]{8,}"', tag)]


TITLE, LABEL = r"suptitle\(|title=|set_title\(", r"label\(|xlabel=|ylabel=|axis\(\"off\"\)|aspect=|[xy]ticks=\[\]"


def with_helpers(code: list[str]) -> list[str]:
    """Each cell's source, followed by that of the notebook's own functions that it calls, and that those call."""
    functions = {n.name: ast.unparse(n) for source in code for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    out = []
    for source in code:
        seen, todo = set(), [source]
        while todo:
            text = todo.pop()
            called = {name for name in functions if re.search(rf"\b{name}\b", text)} - seen
            seen |= called
            todo += [functions[name] for name in called]
        out.append("\n".join([source, *(functions[name] for name in seen)]))
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_figure_says_what_it_shows(path):
    """A cell that makes a figure gives it a title, and names to the axes of curves and bars, itself or by the notebook's functions."""
    code = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    makers = [(c, all_of_it) for c, all_of_it in zip(code, with_helpers(code)) if re.search(r"plt\.(subplots|figure|subplot_mosaic)\(", c)]
    assert makers
    for cell, all_of_it in makers:
        assert re.search(TITLE, all_of_it), f"a figure without a title:\n{cell}"
        curves = re.search(r"\.(plot|bar|barh|errorbar|semilogy|loglog)\(", all_of_it)
        assert not curves or re.search(LABEL, all_of_it), f"axes without a name:\n{cell}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_header_is_filled_in(path):
    """The first cell names what is needed, a person's time, and the machine's at two tiers; nothing is left to be filled in."""
    header = prose(path)[0]
    time = re.search(r"\*\*Machine time:\*\*(.*?)(?=\*\*|\Z)", header, re.S)
    assert "**Needs:**" in header and "**Your time:**" in header and time
    assert not _placeholders(path), _placeholders(path)
    assert "smoke" in time[1] and "laptop" in time[1], f"the header says no machine time for smoke and laptop: {time[0]!r}"


def _placeholders(path: Path) -> list[str]:
    text = re.sub(r"`[^`]*`|\$[^$]*\$", " ", "\n".join(prose(path)))
    return re.findall(r"@\w+@|\b[A-Z]{3,}_[A-Z]+\b|TODO|FIXME|XXX", text)


# --- README, docs/ and the site


def fenced(path: Path, language: str) -> list[str]:
    """The blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_the_readme_s_program_runs(tmp_path):
    """It trains, edits and asks the judge; here for two updates of a small batch."""
    (program,) = fenced(ROOT / "README.md", "python")
    assert "steps=300" in program
    (tmp_path / "program.py").write_text(program.replace("steps=300", "steps=2, batch=4"))
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3 and (tmp_path / "runs/mine/model/config.json").is_file()


@cache
def options(command: str) -> str:
    """The help of a command of `vlmedit`; of the command line itself for ""."""
    words = [sys.executable, "-m", "vlmedit.cli", *([command] if command else []), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, f"vlmedit {command}: {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.stdout


def commands(path: Path) -> list[list[str]]:
    """The command lines of a page's blocks, without comments and leading variables."""
    lines = "".join(fenced(path, "bash") + fenced(path, "")).splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"(vlmedit|make|python|accelerate) ", line)]
    return [words for words in found if words]


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_commands_in_the_pages_exist(path):
    """Make targets, commands of `vlmedit` with their options, scripts and files of tests that are named are there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "python":
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
        for first in [k for k, word in enumerate(words) if word in ("vlmedit", "vlmedit.cli")]:
            command, *rest = words[first + 1 :]
            said = options(command if not command.startswith("-") else "")
            for option in (word for word in rest if word.startswith("--")):
                assert re.search(rf"{re.escape(option)}\b", said), f"{' '.join(words)}: no {option}"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_files_named_in_the_pages_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    named = re.findall(r"`((?:vlmedit|kernels|notebooks|papers|tests|docs|\.github|\.ci)/[\w./-]*)`", text)
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]  # NAME is the reader's own


def site():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]


def test_the_navigation_leads_to_pages_and_every_page_is_in_it():
    hooks, nav = site(), leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {path.name for path in (ROOT / "docs").glob("*.md")} | set(hooks.beside())
    assert set(nav) <= there and len(nav) == len(set(nav))
    assert {name for name in there if name.endswith(".md")} - set(nav) == {"papers/README.md"}
    assert hooks.notebooks() == [f"notebooks/{path.name}" for path in NOTEBOOKS]


def test_the_api_pages_describe_every_module():
    """Each module of the package, but for the command line and helpers, is on one page."""
    described = [module for modules in site().api().values() for module in modules]
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "vlmedit").rglob("*.py")]
    expected = {".".join(p.parts) for p in files if not any(part.startswith("_") for part in p.parts) and p.parts[1] != "cli"}
    assert len(described) == len(set(described)) and expected <= set(described)


@pytest.mark.parametrize(
    ("uri", "text", "found"),
    [
        ("index.md", "[log](../papers/log.md) and [a](architecture.md#x)", "[log](papers/log.md) and [a](architecture.md#x)"),
        ("papers/npedit.md", "[log](log.md), [results](../docs/results.md)", "[log](log.md), [results](../results.md)"),
        ("papers/npedit.md", "![plot](results/strip.png)", "![plot](results/strip.png)"),
        ("equations.md", "[flow.py: `guide`](../vlmedit/flow.py)", "flow.py: `guide`"),
        ("CONTRIBUTING.md", "[recipes](docs/adding.md) [web](https://a.org/b)", "[recipes](adding.md) [web](https://a.org/b)"),
        ("index.md", "```\n[x](../papers/log.md)\n```", "```\n[x](../papers/log.md)\n```"),
    ],
)
def test_links_between_files_are_links_between_pages(uri, text, found):
    assert site().relinked(text, uri) == found
