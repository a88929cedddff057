"""What the modules of a source tree import, read and never run.

Every `import` counts, those inside functions and under `if TYPE_CHECKING` included, and every string that is the dotted
name of a module. A name that is computed, as by `import_module(f"vlmedit.methods.{name}")` or `pkgutil.iter_modules`,
is read as the whole folder it is looked for in.

A package that is imported only because a module lies in it counts with the imports that its import runs, not with those
inside its functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDERS = {"vlmedit.kernels": "kernels/src"}  # packages that lie elsewhere than their name says


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def file_of(root: Path, module: str) -> Path | None:
    """The source file of a module under `root`, or None if it is not there (another library's, or a name in a
    module)."""
    base = root.joinpath(*module.split("."))
    for name, folder in FOLDERS.items():
        if module == name or module.startswith(f"{name}."):
            base = root.joinpath(folder, *module.removeprefix(name).strip(".").split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def is_package(root: Path, module: str) -> bool:
    path = file_of(root, module)
    return path is not None and path.name == "__init__.py"


def folder_of(root: Path, package: str) -> set[str]:
    """A package and all modules in it and in its subfolders."""
    path = file_of(root, package)
    assert path is not None and path.name == "__init__.py", package
    out = {package}
    for file in path.parent.rglob("*.py"):
        parts = file.relative_to(path.parent).with_suffix("").parts
        out.add(".".join((package, *parts)).removesuffix(".__init__"))
    return out


@cache
def modules(root: Path, package: str = "vlmedit") -> frozenset[str]:
    """All modules of the package, those that lie elsewhere included."""
    found = folder_of(root, package)
    for name in FOLDERS:
        if name.startswith(f"{package}.") and is_package(root, name):
            found |= folder_of(root, name)
    return frozenset(found)


def statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    """All nodes, or only those that run on import: function bodies are left out."""
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        yield node
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


@cache
def names_of(root: Path, module: str, source: str, everywhere: bool) -> frozenset[str]:
    """`Source.names`, remembered: the walls ask for the same modules again and again."""
    return frozenset(Source(root, module).names(everywhere))


def named(root: Path, module: str, everywhere: bool = True) -> frozenset[str]:
    path = file_of(root, module)
    assert path is not None, module
    return names_of(root, module, path.read_text(encoding="utf-8"), everywhere)


class Source:
    """One module's source, and what it imports."""

    def __init__(self, root: Path, module: str):
        path = file_of(root, module)
        assert path is not None, module
        self.root, self.module = root, module
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.tree = parsed(path.read_text(encoding="utf-8"))

    def base(self, node: ast.ImportFrom) -> str:
        """The absolute name of what a `from` import names."""
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        return ".".join([*parts[: len(parts) - node.level + 1], node.module or ""]).strip(".")

    def names(self, everywhere: bool = True) -> set[str]:
        """Modules under the root that the source names: by import and from-import (absolute or relative), by a string
        constant that is the dotted name of a module, as `import_module` takes it, and by a computed name. Of a package
        only its submodules count where nothing else is taken from it."""
        found: set[str] = set()
        for node in statements(self.tree, everywhere):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self.base(node)
                inner = [f"{base}.{alias.name}" for alias in node.names]
                found |= set(inner)
                if not all(self.is_module(name) for name in inner):
                    found.add(base)
            elif isinstance(node, ast.Constant) and everywhere:
                found |= self.of_text(node.value)
            elif isinstance(node, ast.Call):
                found |= self.computed(node) or set()
        return {name for name in found if self.is_module(name)}

    def is_module(self, name: str) -> bool:
        return name.replace(".", "").replace("_", "").isalnum() and file_of(self.root, name) is not None

    def of_text(self, text: object) -> set[str]:
        """What a string constant names: a module, or of a package the whole folder, for somebody may look into it."""
        if not isinstance(text, str) or "." not in text or not text.isprintable() or not self.is_module(text):
            return set()
        return folder_of(self.root, text) if is_package(self.root, text) else {text}

    def computed(self, call: ast.Call) -> set[str] | None:
        """What a call that finds or imports modules by name may reach; nothing for any other call, None for a name that
        cannot be read."""
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called not in ("import_module", "__import__", "iter_modules", "walk_packages") or not call.args:
            return set()
        argument = call.args[0]
        if isinstance(argument, ast.Constant):
            return set()  # read as a string
        packages: set[str] = set()
        literal = False
        for node in ast.walk(argument):
            name = node.id if isinstance(node, ast.Name) else ""
            if name in ("__package__", "__name__", "__path__", "__file__"):
                packages.add(self.package)
            elif name in self.aliases():
                packages.add(self.aliases()[name])
            elif name in self.literals():
                literal = True  # its strings are read where it is written
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip("."):
                packages |= self.heads(node.value)
            elif isinstance(node, ast.Constant) and node.value == ".":
                packages.add(self.package)
        found = {module for p in packages if is_package(self.root, p) for module in folder_of(self.root, p)}
        return found if found or literal else None

    def heads(self, text: str) -> set[str]:
        """The package that a text such as "vlmedit.methods." begins with."""
        name = f"{self.package}{text}" if text.startswith(".") else text
        return {name.rstrip(".")} if is_package(self.root, name.rstrip(".")) else set()

    def aliases(self) -> dict[str, str]:
        """Packages by the name that the module gives them."""
        out = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                whole = {a.name.split(".")[0] for a in node.names if not a.asname}
                out |= {name: name for name in whole} | {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom):
                out |= {a.asname or a.name: f"{self.base(node)}.{a.name}" for a in node.names}
        return {name: m for name, m in out.items() if self.is_module(m) and is_package(self.root, m)}

    def literals(self) -> set[str]:
        """Names of the module's own tables of texts."""
        tables = (ast.Dict, ast.Tuple, ast.List, ast.Set, ast.Constant)
        assigned = [node for node in self.tree.body if isinstance(node, ast.Assign) and isinstance(node.value, tables)]
        return {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}

    def unreadable(self) -> list[int]:
        """Lines that import by a name which the walker cannot tell."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return [call.lineno for call in calls if self.computed(call) is None]


def reached(root: Path, start: str, everywhere: bool = True) -> dict[str, str]:
    """Every module that importing or running `start` may import, with the module that named it first. With `everywhere`
    False only what runs on import is followed."""
    found, todo, parents = {start: "-"}, [start], set()
    while todo:
        module = todo.pop()
        new = {n: module for n in named(root, module, everywhere)}
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
