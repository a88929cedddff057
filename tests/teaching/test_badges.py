"""Binder and Colab: the address comes from one place, the badges from the address, and Colab's cell does nothing anywhere else."""

import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import yaml

from vlmedit.teaching import badges

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/someone/vlmedit"


@pytest.mark.parametrize(
    "remote",
    [
        "git@github.com:someone/vlmedit.git\n",
        "https://github.com/someone/vlmedit.git",
        "https://github.com/someone/vlmedit/",
        "https://someone:secret@github.com/someone/vlmedit.git",
        "ssh://git@github.com:22/someone/vlmedit.git",
        "git://github.com/someone/vlmedit",
    ],
)
def test_remotes_become_public_addresses(remote):
    assert badges.public(remote) == ADDRESS


@pytest.mark.parametrize("remote", ["/srv/git/vlmedit.git", "../vlmedit", "file:///srv/vlmedit", "", "http://localhost:3000/someone/vlmedit"])
def test_places_on_this_machine_are_no_addresses(remote):
    assert badges.public(remote) is None


def repository(folder: Path, urls: str = "", origin: str = "") -> Path:
    (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\n{urls}')
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    if origin:
        subprocess.run(["git", "remote", "add", "origin", origin], cwd=folder, check=True)
    return folder


def test_pyproject_comes_before_git_and_nothing_gives_nothing(tmp_path):
    (tmp_path / "both").mkdir(), (tmp_path / "git").mkdir(), (tmp_path / "none").mkdir()
    both = repository(tmp_path / "both", f'[project.urls]\nRepository = "{ADDRESS}"\n', "git@gitlab.com:other/thing.git")
    assert badges.address(both) == badges.declared(both) == ADDRESS
    git = repository(tmp_path / "git", origin="git@gitlab.com:other/thing.git")
    assert badges.address(git) == "https://gitlab.com/other/thing" and badges.declared(git) is None
    assert badges.address(repository(tmp_path / "none")) is None and badges.badges(None) == ""


def test_badges_lead_to_the_first_notebook():
    both = badges.badges(ADDRESS)
    assert "(https://mybinder.org/v2/gh/someone/vlmedit/HEAD?urlpath=lab%2Ftree%2Fnotebooks%2F00_start_here.ipynb)" in both
    assert "(https://colab.research.google.com/github/someone/vlmedit/blob/colab/notebooks/00_start_here.ipynb)" in both
    lab = badges.badges("https://gitlab.com/group/sub/vlmedit")
    assert "/v2/gl/group%2Fsub%2Fvlmedit/HEAD" in lab and "colab" not in lab
    assert "/v2/git/https%3A%2F%2Fcodeberg.org%2Fme%2Fvlmedit/HEAD" in badges.badges("https://codeberg.org/me/vlmedit")
    assert (ROOT / "notebooks/00_start_here.ipynb").is_file()


def test_badges_stand_below_the_title_and_go_again():
    page = "# vlmedit\n\n**Train** it.\n\nMore.\n"
    shown = badges.with_badges(page, ADDRESS)
    assert shown.startswith("# vlmedit\n\n<!-- badges:begin -->\n[![Open") and shown.endswith("<!-- badges:end -->\n\n**Train** it.\n\nMore.\n")
    assert badges.with_badges(shown, ADDRESS) == shown and badges.with_badges(shown, None) == page
    assert "gitlab" in badges.with_badges(shown, "https://gitlab.com/a/gitlab") and shown.count("badges:begin") == 1


def test_the_readme_has_the_badges_of_the_declared_address():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if badges.declared(ROOT) or badges.BEGIN not in readme:
        assert readme == badges.with_badges(readme, badges.declared(ROOT)), "run `python -m vlmedit.teaching.badges`"
    else:
        assert readme == badges.with_badges(readme, badges.address(ROOT)), "run `python -m vlmedit.teaching.badges`"


def test_colab_gets_a_setup_cell_and_nobody_else_does(tmp_path):
    written = badges.write_colab(ROOT, tmp_path, ADDRESS)
    assert [p.name for p in written] == [p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for path in written:
        book, ours = nbformat.read(path, 4), nbformat.read(ROOT / "notebooks" / path.name, 4)
        nbformat.validate(book)
        tagged = [c for c in book.cells if "setup" in c.metadata.get("tags", ())]
        assert tagged == [book.cells[1]] and ADDRESS in tagged[0].source
        assert [c.source for c in book.cells if c is not tagged[0]] == [c.source for c in ours.cells]
        assert not [c for c in ours.cells if "setup" in c.metadata.get("tags", ()) or "colab" in c.source.lower()]
        assert not any(c.get("outputs") for c in book.cells)
    with pytest.raises(badges.InputError, match="pyproject.toml"):
        badges.write_colab(ROOT, tmp_path, None)


def test_the_setup_cell_installs_on_colab_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    source = badges.SETUP.format(address=ADDRESS)
    exec(source, {})
    assert not calls
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(source, {})
    assert calls == [[sys.executable, "-m", "pip", "install", "--quiet", f"vlmedit @ git+{ADDRESS}"]]


def test_binder_finds_what_it_needs():
    """repo2docker reads environment.yml and an executable postBuild at the root; the lock and the package are beside them."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert {"-r requirements.lock", "-e ."} <= set(pip) and (ROOT / "requirements.lock").is_file()
    assert "jupyterlab==" in (ROOT / "requirements.lock").read_text()
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists()  # either would hide the files at the root
    script = ROOT / "postBuild"
    assert os.access(script, os.X_OK) and subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert 'vlmedit.load("shapes")' in script.read_text()
