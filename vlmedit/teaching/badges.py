"""Badges that open the notebooks on Binder and on Colab, and the cell that Colab needs.

    python -m vlmedit.teaching.badges            # writes the badges into README.md
    python -m vlmedit.teaching.badges dist/colab # also the notebooks for Colab, to be pushed as the branch `colab`

The repository's public address is known in one place, `[project.urls] Repository` of pyproject.toml, or else git's `origin`; without
either there are no badges. Binder builds environment.yml and postBuild. Colab builds nothing, so it opens copies of the notebooks whose
second cell, tagged `setup`, installs the package there and does nothing elsewhere. The notebooks in notebooks/ know of neither.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat

from vlmedit.errors import InputError
from vlmedit.teaching.notebook import checkout
from vlmedit.teaching.workshop import without_outputs

BRANCH = "colab"
BEGIN, END = "<!-- badges:begin -->", "<!-- badges:end -->"
SETUP = """# For Colab alone, which has not got this package: installs it. Anywhere else this cell does nothing.
import sys

if "google.colab" in sys.modules:
    import subprocess

    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "vlmedit @ git+{address}"], check=True)"""


def public(remote: str) -> str | None:
    """A git remote as the https address of its pages, without user or password; None for a folder on this machine.
    git@host:owner/name.git, ssh://git@host/owner/name and https://user@host/owner/name.git are all https://host/owner/name."""
    found = re.fullmatch(r"(?:(?:https?|ssh|git)://)(?:[^@/]*@)?([\w.-]+\.\w+)(?::\d+)?/(.+?)(?:\.git)?/?", remote.strip())
    found = found or re.fullmatch(r"(?:[\w.-]+@)([\w.-]+\.\w+):(.+?)(?:\.git)?/?", remote.strip())
    return f"https://{found[1]}/{found[2]}" if found else None


def declared(root: Path) -> str | None:
    """The address in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    return public(urls["repository"]) if "repository" in urls else None


def address(root: Path) -> str | None:
    """The address in pyproject.toml, or else that of git's `origin`, or None."""
    if known := declared(root):
        return known
    remote = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True)
    return public(remote.stdout) if remote.returncode == 0 else None


def badges(address: str | None) -> str:
    """The two badges in Markdown; Colab's only for GitHub, which is all it opens. Empty without an address."""
    if address is None:
        return ""
    host, _, name = address.removeprefix("https://").partition("/")
    places = {"github.com": f"gh/{name}", "gitlab.com": f"gl/{quote(name, safe='')}"}
    first = "notebooks/00_start_here.ipynb"
    binder = f"https://mybinder.org/v2/{places.get(host) or 'git/' + quote(address, safe='')}/HEAD?urlpath={quote(f'lab/tree/{first}', safe='')}"
    out = [f"[![Open the notebooks on Binder](https://mybinder.org/badge_logo.svg)]({binder})"]
    if host == "github.com":
        colab = f"https://colab.research.google.com/github/{name}/blob/{BRANCH}/{first}"
        out.append(f"[![Open the first notebook on Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})")
    return "\n".join(out)


def with_badges(page: str, address: str | None) -> str:
    """A page with the badges between its markers, which stand below its title the first time; without an address without them."""
    page = re.sub(rf"{BEGIN}.*?{END}\n\n", "", page, flags=re.S)
    if not (block := badges(address)):
        return page
    title, rest = page.split("\n\n", 1)
    return f"{title}\n\n{BEGIN}\n{block}\n{END}\n\n{rest}"


def for_colab(notebook, address: str):
    """A notebook with its setup cell, and without outputs."""
    setup = nbformat.v4.new_code_cell(SETUP.format(address=address), id="colab-setup", metadata={"tags": ["setup"]})
    notebook.cells.insert(1, setup)
    return without_outputs(notebook)


def write_colab(root: Path, out: Path, address: str | None) -> list[Path]:
    """The notebooks of a checkout for Colab, in `out/notebooks`. Raises `InputError` without an address that Colab can install from."""
    if address is None:
        raise InputError("the repository's public address is not known; put Repository = \"https://...\" below [project.urls] in pyproject.toml")
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        nbformat.write(for_colab(nbformat.read(path, 4), address), folder / path.name)
    return sorted(folder.glob("*.ipynb"))


def main(arguments: list[str]) -> int:
    """Write the badges, and into each folder named the notebooks for Colab; what is wrong is told in one line."""
    try:
        root = checkout()
        known, readme = address(root), root / "README.md"
        readme.write_text(with_badges(readme.read_text(encoding="utf-8"), known), encoding="utf-8")
        print(badges(known) or "no badges: neither pyproject.toml nor git's origin tells a public address")
        for folder in arguments:
            print(f"{len(write_colab(root, Path(folder), known))} notebooks in {folder}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
