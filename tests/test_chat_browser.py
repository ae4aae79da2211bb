"""The chat in a real browser: a picture is chosen, a question asked, and answer and overlay are on the screen.

For developers, because it needs Chromium and a server for notebooks, which the suite does not install::

    apt-get install chromium chromium-driver && pip install voila selenium
    CHAT_BROWSER=1 python -m pytest tests/test_chat_browser.py

The screenshots lie in ``CHAT_BROWSER_SHOTS`` (a temporary folder by default). With ``CHAT_BROWSER=08`` the cells of
notebook 08 up to the chat are shown, with the models in ``ART_HOME``, instead of the tiny model of the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
ASKED = os.environ.get("CHAT_BROWSER", "")
SECONDS = 60 if ASKED == "1" else 600
TINY = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import functools, pathlib, tempfile
import tiny_chat
from helpers import chat, chat_ui, feedback, references, verdicts

folder = pathlib.Path({folder!r})
(folder / "pictures").mkdir()
dataset, model = tiny_chat.write_dataset(folder / "pictures"), tiny_chat.build_model()
known = references.of_dataset(model, dataset, settings=tiny_chat.SETTINGS)
missing = dict.fromkeys(verdicts.NOTEBOOKS, "Nothing saved for these pictures: run its notebook.")
detectors = verdicts.Detectors({{}}, None, missing, None, frozenset())
ui = chat_ui.show(
    tiny_chat.session(model, known), samples=chat.sample_pictures(dataset), detectors=detectors,
    on_feedback=functools.partial(feedback.record, folder / "feedback.jsonl"), transcripts=folder / "chat",
)
"""

pytestmark = pytest.mark.skipif(not ASKED, reason="set CHAT_BROWSER=1; needs chromium, voila and selenium")


def chat_notebook(folder: Path) -> Path:
    """A notebook that ends with the chat."""
    if ASKED == "08":
        cells = nbformat.read(REPOSITORY / "notebooks" / "08_anomalygpt_chat.ipynb", as_version=4).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
        last = next(number for number, source in enumerate(sources) if "chat_ui.show" in source)
        sources = [f"import os; os.chdir({str(REPOSITORY)!r})", *sources[: last + 1]]
    else:
        sources = [TINY.format(root=str(REPOSITORY), folder=str(folder))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "chat.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", str(chat_notebook(folder)), f"--port={port}", "--no-browser"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait(lambda: "is running at" in (folder / "server.log").read_text(), "the server started")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module")
def page(address) -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,1500"):
        options.add_argument(argument)
    options.page_load_strategy = "none"  # the page is complete only when every cell has run; that is waited for below
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # named, else selenium looks for one online
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get(address)
        wait(lambda: "Every detector" in text(driver), "the chat is shown")
        yield driver
    finally:
        driver.quit()


def wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.3)
    raise AssertionError(f"after {SECONDS} s it is still not so that {what}")


def text(driver) -> str:
    return "".join(body.text for body in driver.find_elements("tag name", "body"))


def button(driver, words: str):
    return driver.find_element("xpath", f"//button[contains(normalize-space(.), '{words}')]")


def shot(driver, folder: Path, name: str) -> np.ndarray:
    """A screenshot of the whole chat, kept on disk, as uint8 RGB."""
    target = Path(os.environ.get("CHAT_BROWSER_SHOTS") or folder)
    target.mkdir(parents=True, exist_ok=True)
    heights = "return Math.max(...[...document.querySelectorAll('*')].map(one => one.scrollHeight))"
    height = driver.execute_script(heights)
    driver.set_window_size(1240, max(900, height + 90))
    time.sleep(0.7)
    driver.save_screenshot(str(target / f"{name}.png"))
    return np.asarray(Image.open(target / f"{name}.png").convert("RGB"))


def test_choose_ask_look_and_judge(page, folder):
    shot(page, folder, "1_before")
    assert "Choose a picture, then ask about it." in text(page)
    page.find_element("xpath", "//select/option[contains(., 'box')]").click()
    wait(lambda: "Highest value" in text(page), "the map is described")
    original_size = page.execute_script("return document.querySelector('img').naturalWidth")
    assert original_size > 50, "the picture is not shown"
    threshold = re.search(r"threshold (\d\.\d{3})", text(page))
    readout = page.find_elements("css selector", ".widget-readout")[1]
    assert threshold.group(1) == readout.text, "the slider does not stand on the threshold"
    button(page, "Is there any anomaly").click()
    wait(lambda: re.search(r"AnomalyGPT · \d+\.\d s", text(page)), "the first answer is there")
    page.find_element("tag name", "textarea").send_keys("<b>Is it</b> whole?")
    button(page, "Send").click()
    wait(lambda: "tokens reused" in text(page), "the second answer is there")
    assert "<b>Is it</b> whole?" in text(page)
    overlay = shot(page, folder, "2_answered")
    button(page, "Original").click()
    time.sleep(2)
    original = shot(page, folder, "3_original")
    rows, columns = (min(a, b) for a, b in zip(overlay.shape[:2], original.shape[:2]))
    changed = (overlay[:rows, : columns // 2] != original[:rows, : columns // 2]).any(axis=2)
    assert changed.sum() > 2000, "the overlay looks like the picture"
    button(page, "Overlay").click()
    button(page, "Ask every detector").click()
    wait(lambda: "p-value" in text(page), "the verdicts are there")
    button(page, "wrong").click()
    button(page, "Save judgement").click()
    wait(lambda: "your judgement is saved" in text(page), "the judgement is confirmed")
    shot(page, folder, "4_judged")


def test_a_wrong_path_is_said_in_a_box(page, folder):
    page.find_element("xpath", "//*[contains(@class, 'lm-TabBar-tabLabel') and text()='Path']").click()
    time.sleep(0.5)
    page.find_element("xpath", "//input[contains(@placeholder, 'picture.jpg')]").send_keys("/no/such.png")
    button(page, "Open").click()
    wait(lambda: "does not exist" in text(page), "the mistake is named")
    assert "went wrong" not in text(page)
    shot(page, folder, "5_refused")


def test_on_a_narrow_screen_nothing_is_cut_off(page, folder):
    page.set_window_size(520, 1800)
    time.sleep(1)
    page.save_screenshot(str(Path(os.environ.get("CHAT_BROWSER_SHOTS") or folder) / "6_narrow.png"))
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")
