"""For golden.py: a list of the messages that tests assert, and how many asserts and tests there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SPEAKING = "err|errors?|stderr|said|told|messages?|caught|problems|readouterr|reason|str"
SPEAKS = re.compile(rf"\b({SPEAKING})\b")  # in what an assert looks into


def words_in(node: ast.AST) -> Iterator[str]:
    """String literals below a node, an f-string as one with its gaps as {}; docstrings left out."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from words_in(child)


def asked_messages(function: ast.AST, constants: dict[str, ast.AST]) -> Iterator[str]:
    """Fragments that a test demands of a message. Where a name stands for them, every text of words in the test."""
    where = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            where += [k.value for k in node.keywords if k.arg == "match"]
        elif isinstance(node, ast.Assert):
            for test in (n for n in ast.walk(node.test) if isinstance(n, ast.Compare)):
                if SPEAKS.search(" ".join(map(ast.unparse, test.comparators))):
                    where.append(test.left)
    for place in where:
        yield from words_in(place)
        names = {n.id for n in ast.walk(place) if isinstance(n, ast.Name)}
        for name in names & constants.keys():
            yield from words_in(constants[name])
        if names - constants.keys() - {"re"}:
            yield from (text for text in words_in(function) if " " in text.strip() and "\n" not in text)


def reports() -> dict:
    """Messages that tests assert, sorted; how many asserts and tests there are."""
    messages, asserts = set(), Counter()
    for file in sorted(TESTS.rglob("test_*.py")):
        if file.name == "test_golden.py":
            continue
        tree = ast.parse(file.read_text())
        asserts[file.name] += sum(isinstance(n, ast.Assert) for n in ast.walk(tree))
        named = [(t, n.value) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
        constants = {t.id: value for t, value in named if isinstance(t, ast.Name)}
        for function in tree.body:
            if isinstance(function, ast.FunctionDef | ast.ClassDef):
                messages.update(asked_messages(function, constants))
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--ignore={TESTS / 'test_golden.py'}"]
    listed = subprocess.run([*collect, str(TESTS)], cwd=TESTS.parent, capture_output=True, text=True).stdout
    (tests,) = re.findall(r"^(\d+) tests collected", listed, re.M)
    counts = {"tests": int(tests), "asserts": asserts.total(), "asserts_by_file": dict(asserts)}
    return {**counts, "messages": sorted(messages)}
