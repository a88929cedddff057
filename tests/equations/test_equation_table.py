"""docs/equations.md: made from the comments on the lines that compute, complete, and refused where a comment cannot be
read."""

from pathlib import Path

import pytest
from helpers.scripts import script

ROOT = Path(__file__).parents[2]

equations = script("equations")

NUMBERED = ("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10", "E11")  # the method, in papers/npedit.md
OF_PAPERS = {  # equations whose number in the paper is known
    ("4", "arXiv:2510.14978"),  # NP-Edit: the two-token loss
    ("7", "arXiv:2311.18828"), ("8", "arXiv:2311.18828"),  # DMD: gradient and normalizer
    ("19", "arXiv:2403.03206"), ("23", "arXiv:2403.03206"),  # SD3: logit-normal times and their shift
    ("14", "arXiv:2010.02502"),  # DDIM: inversion
}  # fmt: skip


def test_the_page_is_that_of_the_code():
    assert equations.PAGE.read_text(encoding="utf-8") == equations.page(), "run `python papers/equations.py`"


def test_every_numbered_equation_has_a_line():
    """Each number of the method's page, in their order, each known number of a paper; and papers/npedit.md has the same
    numbers."""
    lines = equations.lines()
    own = [line.label for line in lines if line.paper == "papers/npedit.md"]
    assert tuple(dict.fromkeys(own)) == NUMBERED
    assert OF_PAPERS <= {(line.label, line.paper) for line in lines}
    page = (ROOT / "papers" / "npedit.md").read_text(encoding="utf-8")
    assert all(f"| {number} | " in page for number in NUMBERED) and "| E12 | " not in page


def test_every_module_of_equations_says_which():
    folder = ROOT / "vlmedit" / "equations"
    files = {p.relative_to(ROOT).as_posix() for p in folder.glob("*.py") if p.stem != "__init__"}
    assert len(files) > 8 and files <= {line.path for line in equations.lines()}


def test_every_row_leads_to_a_function_that_is_there():
    for line in equations.lines():
        name = line.function.rpartition(".")[2]
        assert f"def {name}(" in (ROOT / line.path).read_text() and f"](../{line.path})" in line.row()


DOCUMENTED = '"""Of a paper [arXiv:1234.56789], and of another [arXiv:2345.67890]."""\n'


def written(folder: Path, text: str) -> list[tuple[str, str, str]]:
    path = folder / "vlmedit" / "equations" / "new.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return [(line.label, line.paper, line.function) for line in equations.lines(folder)]


def test_comments_are_read_as_they_are_meant(tmp_path):
    """Own numbers and the paper's on one line, a source of its own, a name, a method within a class, remarks; and texts
    that only look like it."""
    text = DOCUMENTED + (
        "def f(x):\n    y = x + 1  # Eq. E8, 7\n    z = '# Eq. 9'\n    return y  # Eq. 3b [arXiv:9999.00001], as they say\n"
        "class A:\n    def g(self):\n        return 1  # Eq. ReNO, exactly [arXiv:9999.00002]\n"
    )
    first = "arXiv:1234.56789"
    named, other = [("ReNO", first, "A.g"), ("7", first, "f")], ("3b", "arXiv:9999.00001", "f")
    assert written(tmp_path, text) == [("E8", "papers/npedit.md", "f"), *named, other]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DOCUMENTED + "def f():\n    return 1  # Eq. ?\n", "line 3: '# Eq. \\?' is no"),
        (DOCUMENTED + "X = 1  # Eq. 4\n", "line 2: .* within a function"),
        ("def f():\n    return 1  # Eq. 4\n", "line 2: '# Eq. 4' names no paper"),
    ],
)
def test_comments_that_say_nothing_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, text)


def test_a_new_line_makes_the_page_stale(tmp_path):
    """The page follows the code: one more numbered line is one more row."""
    text = DOCUMENTED + "def f():\n    return 1  # Eq. 4\n"
    before, page = written(tmp_path, text), equations.page(tmp_path)
    assert len(written(tmp_path, text + "def g():\n    return 2  # Eq. 5\n")) == len(before) + 1 == 2
    assert equations.page(tmp_path) != page
