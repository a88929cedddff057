"""One file of code out of the package: the frame of `few_step_edit.py` with the source of a family's calls, helpers included.

What a definition names is followed to where its module gets it: a definition of ours is copied, with what it names in turn; torch, diffusers and
the standard library are imported. Anything else is refused, so the file runs where diffusers is installed and this package is not. It is a
function of the installed source alone: `vlmedit edit` writes it anew and compares, before it runs a folder's code.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import resolve_name

from vlmedit.networks.backbones._base import Family
from vlmedit.pipelines.few_step_edit import FewStepEditPipeline

LIBRARIES = {"torch", "diffusers", *sys.stdlib_module_names}
NAME = "few_step_edit_pipeline.py"  # exported folders name it
HEAD = '''"""Editing in a few steps, for {transformer}.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    edited = pipe(image, "make the dog red").images[0]

Written by `vlmedit export` out of the functions that trained it. Imports torch and diffusers alone.
"""'''


def names_in(source: str) -> set[str]:
    """Names that a definition takes from its module, those of annotations included."""
    found, todo = set(), [symtable.symtable(source, "definition", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        own = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (own or s.is_global())}
    return found - set(dir(builtins))


def statements(module: str) -> Iterator[ast.stmt]:
    """A module's own, and those that it keeps for type checkers."""
    for node in ast.parse(inspect.getsource(import_module(module))).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def binds(node: ast.stmt, name: str) -> bool:
    """Whether a statement gives a module this name."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any((a.asname or a.name.partition(".")[0]) == name for a in node.names)
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


@dataclass
class Collector:
    """Definitions in the order in which they need each other, and imports."""

    packages: set[str]  # whose definitions are copied
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)  # of every name: module and its name there
    imports: set[str] = field(default_factory=set)
    sources: list[str] = field(default_factory=list)

    def add(self, name: str, module: str) -> None:
        """What `name` is in a module. Raises ValueError for what cannot stand in a file of its own."""
        node = next((node for node in statements(module) if binds(node, name)), None)
        if node is None:
            raise ValueError(f"{module} calls {name}, which is no name of its top level; what is exported calls those alone")
        if isinstance(node, ast.Import | ast.ImportFrom):
            self.add_import(name, node, module)
        elif self.is_new(name, (module, name)):
            lines = inspect.getsource(import_module(module)).splitlines()
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            source = "\n".join(lines[first - 1 : node.end_lineno])
            for other in sorted(names_in(source) - {name}):
                self.add(other, module)
            self.sources.append(source)

    def add_import(self, name: str, node: ast.Import | ast.ImportFrom, module: str) -> None:
        (alias,) = (a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
        if isinstance(node, ast.Import):
            where, statement = alias.name, f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        else:
            package = module if hasattr(import_module(module), "__path__") else module.rpartition(".")[0]
            where = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            statement = f"from {where} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        top = where.partition(".")[0]
        if top in LIBRARIES:
            self.is_new(name, (where, alias.name))
            self.imports.add(statement)
        elif top in self.packages and isinstance(node, ast.ImportFrom) and alias.asname in (None, alias.name):
            self.add(alias.name, where)
        else:
            raise ValueError(f"{module}: {statement}: what is exported imports torch and diffusers alone, and names ours as they are")

    def is_new(self, name: str, origin: tuple[str, str]) -> bool:
        """Whether it is not there yet. Raises ValueError where the name is another thing's."""
        known = name in self.origins
        if self.origins.setdefault(name, origin) != origin:
            raise ValueError(f"{name} is {'.'.join(self.origins[name])} and {'.'.join(origin)}; an exported file has one thing of a name")
        return not known


def pipeline_of(family: Family) -> type[FewStepEditPipeline]:
    """The frame with a family's calls, in this process."""
    calls = {call.__name__: staticmethod(call) for call in family.calls}
    return type("FewStepEditPipeline", (FewStepEditPipeline,), {"text_pipeline": family.text_pipeline, "latents_per_token": family.multiple, **calls})


def standalone(family: Family) -> str:
    """The same as a file of its own. Raises ValueError for calls that need more than torch and diffusers."""
    found = Collector({"vlmedit", *(call.__module__.partition(".")[0] for call in family.calls)})
    for part in (FewStepEditPipeline, *family.calls):
        found.add(part.__name__, part.__module__)
    imports = sorted(found.imports, key=lambda line: (line.split()[1].partition(".")[0] in ("torch", "diffusers"), line.startswith("from"), line))
    given = {"text_pipeline": repr(family.text_pipeline), "latents_per_token": repr(family.multiple)}
    given |= {call.__name__: f"staticmethod({call.__name__})" for call in family.calls}
    tail = "\n".join(f"FewStepEditPipeline.{name} = {value}" for name, value in given.items())
    return "\n\n\n".join([f"{HEAD.format(transformer=family.transformer)}\n\n" + "\n".join(imports), *found.sources, tail]) + "\n"
