"""Write docs/equations.md: which line of the code computes which equation.

    python papers/equations.py         # tests/equations/test_equation_table.py says when it is out of date

It reads the comments that stand on those lines. `# Eq. 7 [arXiv:2311.18828]` is equation 7 of that paper; without
brackets it is of the first paper that the module's docstring names. `# Eq. E8` is an equation of papers/npedit.md,
whose numbers they are. A formula that its paper does not number has a name: `# Eq. ReNO [arXiv:2406.04312]`. One line
may compute several: `# Eq. E8, 7`. What follows the labels is a remark.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "equations.md"
OWN = re.compile(r"E\d+")  # a number of papers/npedit.md
LABEL = r"(?:E\d+|\d+[a-z]?|[A-Za-z][\w-]*)"
LABELS = rf"{LABEL}(?:, (?:E?\d+[a-z]?)(?![\w-]))*"
COMMENT = re.compile(rf"#\s*Eq\.\s+(?P<labels>{LABELS})(?:\s+\[(?P<paper>[^\]]+)\])?")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
HEAD = """# Equations and the lines that compute them

Written by `python papers/equations.py` from the comments on those lines: do not edit it by hand. E1 to E11 are the
numbers of [papers/npedit.md](../papers/npedit.md), which says for each what proves it; any other number is the paper's
own, and a name stands for a formula whose number we do not know.

| equation | paper | where |
|---|---|---|
"""


@dataclass(frozen=True)
class Line:
    """A line that computes an equation."""

    label: str
    paper: str  # an arXiv id, another source, or papers/npedit.md
    path: str  # from the repository's root
    function: str  # with its class

    def row(self) -> str:
        paper = re.sub(ARXIV, r"[arXiv:\1](https://arxiv.org/abs/\1)", self.paper)
        paper = paper.replace("papers/npedit.md", "[papers/npedit.md](../papers/npedit.md)")
        name = self.path.removeprefix("vlmedit/")
        return f"| {self.label} | {paper} | [{name}: `{self.function}`](../{self.path}) |"


def functions(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """First and last line of each function, and its name with its class; outer ones first."""
    todo: list[tuple[ast.AST, str]] = [(tree, "")]
    while todo:
        node, inside = todo.pop(0)
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{inside}.{child.name}".strip(".")
                if isinstance(child, ast.FunctionDef):
                    yield child.lineno, child.end_lineno or child.lineno, name
            todo.append((child, name))


def lines_of(path: Path, root: Path = ROOT) -> list[Line]:
    """The numbered lines of one file. Raises ValueError for a comment that cannot be read, stands in no function, or
    names no paper where the docstring names none either."""
    source, place = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
    if "# Eq." not in source:
        return []
    tree = ast.parse(source)
    named = ARXIV.search(ast.get_docstring(tree) or "")
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not re.match(r"#\s*Eq\b", token.string):
            continue
        number = token.start[0]
        read = COMMENT.match(token.string)
        owner = [name for first, last, name in functions(tree) if first <= number <= last]
        if not read or not owner:
            form = "`# Eq. LABEL, LABEL [PAPER]` within a function"
            raise ValueError(f"{place}, line {number}: {token.string!r} is no {form}")
        for label in read["labels"].split(", "):
            paper = read["paper"] or (named[0] if named else None)
            if OWN.fullmatch(label):
                paper = "papers/npedit.md"
            if paper is None:
                said = f"{token.string!r} names no paper, nor does the module's docstring"
                raise ValueError(f"{place}, line {number}: {said}")
            found.append(Line(label, paper, place, owner[-1]))
    return found


def order(line: Line) -> tuple:
    """The numbers of papers/npedit.md first, then paper by paper."""
    own = OWN.fullmatch(line.label)
    number = int(re.sub(r"\D", "", line.label) or 0)
    return not own, number if own else 0, line.paper, number, line.label, line.path, line.function


def lines(root: Path = ROOT) -> list[Line]:
    """All of them, each once."""
    found = {line for path in (root / "vlmedit").rglob("*.py") for line in lines_of(path, root)}
    return sorted(found, key=order)


def page(root: Path = ROOT) -> str:
    return HEAD + "".join(f"{line.row()}\n" for line in lines(root))


def main() -> None:
    """Write docs/equations.md anew."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    tyro.cli(main)
