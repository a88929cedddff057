"""What MkDocs cannot know by itself: which pages do not lie in docs/, and where a link between files leads.

Pages link to each other as files do, so that the links also work in an editor and on a code host. In the site such a
link leads to the page that was made of the file; a link to a file that has no page, such as a module, becomes its text.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import join, normpath, relpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "kernels/*.md",
    "notebooks/*.md",
    "notebooks/*.ipynb",
    "papers/*.md",
    "papers/results/**/*.png",
)
BASICS = "basics"  # the API page of the modules that lie in no folder
NO_API = ("checkpoints", "cli", "configs", "__pycache__")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def beside() -> list[str]:
    """Files of the repository outside docs/ that are pages or pictures of the site, under the same path."""
    return sorted({path.relative_to(ROOT).as_posix() for pattern in BESIDE for path in ROOT.glob(pattern)})


def notebooks() -> list[str]:
    return [path for path in beside() if path.endswith(".ipynb")]


def api() -> dict[str, list[str]]:
    """Each API page with the modules that it describes; helpers, whose names begin with _, are left out."""
    package, pages = ROOT / "vlmedit", {BASICS: []}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in NO_API or any(part.startswith("_") for part in parts[:-1]):
            continue
        name = ".".join(("vlmedit", *parts)).removesuffix(".__init__")
        if parts[-1].startswith("_") and (parts[-1] != "__init__" or not path.read_text(encoding="utf-8").strip()):
            continue
        pages.setdefault(parts[0] if len(parts) > 1 else BASICS, []).append(name)
    return pages


def place(source: str) -> str | None:
    """The site's path of a file of the repository, None where it has none."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/") if (ROOT / source).is_file() else None
    return source if source in beside() else None


def source_of(uri: str) -> str:
    """The file of the repository from which a page of the site is made."""
    return uri if (ROOT / uri).is_file() and not (ROOT / "docs" / uri).is_file() else f"docs/{uri}"


def target(link: str, uri: str) -> str | None:
    """A link between files as one between pages of the site; None where it leads to a file that has no page."""
    if re.match(r"[a-z]+:|/", link):
        return link
    found = place(normpath(join(source_of(uri).rpartition("/")[0], link)))
    return relpath(found, uri.rpartition("/")[0] or ".") if found else None


def relinked(markdown: str, uri: str) -> str:
    """A page's text with its links made those of the site; code is left alone."""

    def one(match: re.Match) -> str:
        mark, words, link, anchor = match.groups()
        leads = target(link, uri)
        return f"{mark}[{words}]({leads}{anchor or ''})" if leads else words

    parts = re.split(r"(```.*?```)", markdown, flags=re.S)
    return "".join(part if part.startswith("```") else LINK.sub(one, part) for part in parts)


# --- what MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation's last sections, which follow from what is there."""
    config.nav += [{"Notebooks": notebooks()}, {"API": [{name: f"api/{name}.md"} for name in api()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    for path in beside():
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for name, modules in api().items():
        title = "vlmedit" if name == BASICS else f"vlmedit.{name}"
        content = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


on_files.mkdocs_priority = 100  # before the plugin that looks for notebooks among the files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown if page.file.src_uri.startswith("api/") else relinked(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links in notebooks, which are rendered without MkDocs: to pages they lead there, to other files nowhere."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def one(match: re.Match) -> str:
        uri = target(match[1], page.file.src_uri)
        file = files.get_file_from_path(normpath(join("notebooks", uri))) if uri else None
        return f'href="{file.url_relative_to(page.file)}{match[2] or ""}"' if file else 'href="#"'

    return re.sub(r'href="(?!#|https?:|mailto:|data:)([^"#]+)(#[^"]*)?"', one, html)
