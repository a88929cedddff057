"""A real browser: headless Chromium opens JupyterLab, runs a notebook at smoke tier, moves every widget and sees the picture change.

    make browser-test

Needs Chromium (the system's, e.g. `apt-get install chromium`, or `playwright install chromium`; another one is named by
VLMEDIT_CHROMIUM) and `pip install playwright`; where one is missing the tests are skipped and say so. Screenshots are kept in the
folder VLMEDIT_SCREENSHOTS, or in pytest's temporary folder.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from vlmedit.teaching.notebook import without_outputs

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if p.name[:2] in ("00", "05")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
TOKEN = "smoke"
PATIENCE = 400  # seconds for a whole notebook; it needs at most a minute where nothing else runs
SETTINGS = {  # no question about news, and every cell in the page, also those that are not in sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser test: `pip install playwright`", exc_type=ImportError)
    with sync_api.sync_playwright() as playwright:
        named = os.environ.get("VLMEDIT_CHROMIUM")
        found = named or next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip(f"no browser test: {named or 'Chromium'} not found; `apt-get install chromium` or `playwright install chromium`, or set VLMEDIT_CHROMIUM")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    """The address of a JupyterLab with the notebooks as a participant gets them, and with no settings but ours."""
    home = tmp_path_factory.mktemp("lab")
    for name, values in SETTINGS.items():
        path = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    books = home / "books"
    books.mkdir()
    for path in NOTEBOOKS:
        nbformat.write(without_outputs(nbformat.read(path, 4)), books / path.name)
    places = {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    environment = os.environ | {name: str(home / folder) for name, folder in places.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={books}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=books, env=environment, stdout=log, stderr=log)
    try:
        yield address(server, home)
    finally:
        server.terminate()
        server.wait(60)


def address(server: subprocess.Popen, home: Path) -> str:
    """Where the server listens, by the file that it leaves in its runtime folder."""
    for _ in range(600):
        for path in (home / "runtime").glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())["url"].rstrip("/")
            except ValueError:  # being written
                pass
        assert server.poll() is None, (home / "log").read_text()[-2000:]
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start within 2 minutes: {(home / 'log').read_text()[-2000:]}")


def wait_for_kernel(page, lab: str) -> None:
    """Until the server has a kernel that the page is connected to, and the page says so: it says idle before there is any, too."""
    for _ in range(240):
        kernels = page.request.get(f"{lab}/api/kernels?token={TOKEN}").json()
        if any(k["connections"] and k["execution_state"] == "idle" for k in kernels):
            page.wait_for_timeout(2000)
            if page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').count():
                return
        page.wait_for_timeout(500)
    raise AssertionError(f"no kernel is connected: {kernels}")


def shut_down(browser, lab: str) -> None:
    """End every kernel, so that the next notebook has the memory to itself."""
    with browser.new_context() as context:
        for kernel in context.request.get(f"{lab}/api/kernels?token={TOKEN}").json():
            context.request.delete(f"{lab}/api/kernels/{kernel['id']}?token={TOKEN}")


def run_all(page, cells: int) -> None:
    """By the menu, as a person would; until every code cell has its number. A failing cell fails the test with its error."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    errors, asked = page.locator('[data-mime-type="application/vnd.jupyter.error"]'), page.locator(".jp-Dialog .jp-mod-accept")
    for _ in range(PATIENCE):
        page.wait_for_timeout(1000)
        if asked.count():  # which kernel? The one that the notebook names
            asked.first.click()
        assert not errors.count(), errors.first.inner_text()[-2000:]
        prompts = [text.strip() for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]
        if len(prompts) == cells and all(re.fullmatch(r"\[\d+\]:", text) for text in prompts):
            return
    raise AssertionError(f"after {PATIENCE} s the code cells stand at {' '.join(prompts)}")


def pictures(cell) -> str:
    """A fingerprint of the pixels that the widget shows."""
    shown = cell.locator(".widget-output img, .jupyter-widgets img").evaluate_all("all => all.filter(i => i.complete && i.naturalWidth).map(i => i.src)")
    return hashlib.sha256("".join(shown).encode()).hexdigest() if shown else ""


def changed(page, cell, before: str, seconds: float = 60) -> bool:
    """Whether another picture appears, and stays."""
    for _ in range(int(5 * seconds)):
        now = pictures(cell)
        if now and now != before:
            page.wait_for_timeout(500)
            if pictures(cell) == now:
                return True
        page.wait_for_timeout(200)
    return False


def move(control, times: int) -> None:
    """One control of a widget to another value: a slider by the arrow keys, a menu to its next or first entry."""
    handle, menu, box = control.locator(".noUi-handle"), control.locator("select"), control.locator("input[type=checkbox]")
    if handle.count():
        at, most = (float(handle.first.get_attribute(f"aria-{name}")) for name in ("valuenow", "valuemax"))
        handle.first.focus()
        for _ in range(times):
            handle.first.press("ArrowLeft" if at >= most else "ArrowRight")
    elif menu.count():
        chosen, entries = menu.first.evaluate("m => [m.selectedIndex, m.options.length]")
        menu.first.select_option(index=(chosen + times) % entries)
    elif box.count():
        box.first.click()
    else:
        raise AssertionError(f"no way to move the control {control.inner_text()!r}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_widgets_move_the_picture(path, browser, lab, tmp_path):
    kept = Path(os.environ.get("VLMEDIT_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"{lab}/doc/tree/{path.name}?token={TOKEN}")
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    page.locator(".jp-CodeCell").first.wait_for(timeout=120_000)
    try:
        wait_for_kernel(page, lab)
        run_all(page, len(code))
        cells = page.locator(".jp-CodeCell:has(.widget-interact)")
        assert cells.count() == sum("ipywidgets.interact(" in c.source for c in code) > 0
        for i in range(cells.count()):
            cell = cells.nth(i)
            cell.scroll_into_view_if_needed()
            assert changed(page, cell, ""), "the widget shows no picture"
            page.screenshot(path=kept / f"{path.stem}-widget{i}-0.png")
            controls = cell.locator(".widget-interact > :is(.jupyter-widgets, .widget-slider):not(.widget-output)")
            controls.first.wait_for()  # its view may come after the picture's
            for j in range(controls.count()):
                before = pictures(cell)
                move(controls.nth(j), times=1)
                if not changed(page, cell, before, 20):  # one notch may be one that shows nothing new
                    move(controls.nth(j), times=2)
                    assert changed(page, cell, before), f"{controls.nth(j).inner_text()!r} moves nothing"
                page.screenshot(path=kept / f"{path.stem}-widget{i}-{j + 1}.png")
    finally:
        page.screenshot(path=kept / f"{path.stem}-end.png")
        page.close()
        shut_down(browser, lab)
