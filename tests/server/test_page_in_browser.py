"""The page at `/` in a real browser: Debian's `chromium` and `chromium-driver`, without a window.

Once a night. Pictures of what was seen are left in out/screenshots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from conftest import ROOT, wait_until
from running_server import Running, running
from vlmforge import Pipeline, pipeline
from vlmforge.server.settings import server_vision_config

pytestmark = pytest.mark.nightly

SCREENSHOTS = ROOT / "out/screenshots"


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    with running([("tiny", pipe)]) as made:
        yield made


@pytest.fixture
def browser(server: Running) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.set_window_size(900, 900)
        driver.get(server.url)
        wait_until(lambda: bool(driver.find_element("id", "about").text))
        yield driver
        assert [entry["message"] for entry in driver.get_log("browser")] == []
        assert _addresses(driver) <= {server.url}
    finally:
        driver.quit()


def _addresses(driver: Any) -> set[str]:
    """Where the page sent requests to, data and blob URLs apart."""
    found = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith("http"):
                found.add("/".join(url.split("/")[:3]))
    return found


def ask(driver: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.find_element("id", "text").send_keys(text + Keys.ENTER)


def turns(driver: Any, who: str) -> list[Any]:
    return list(driver.find_elements("css selector", f".turn.{who}"))


def answered(driver: Any, count: int) -> None:
    wait_until(lambda: len(driver.find_elements("css selector", ".turn.assistant .bar")) == count)


def shot(driver: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def test_a_picture_and_two_turns(browser: Any, pipe: Pipeline, tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).ellipse((60, 30, 200, 170), fill="red")
    image.save(tmp_path / "red.png")
    browser.find_element("id", "file").send_keys(str(tmp_path / "red.png"))
    wait_until(lambda: len(browser.find_elements("css selector", "#tray img")) == 1)
    ask(browser, "what is this?")
    answered(browser, 1)
    text = turns(browser, "assistant")[0].find_element("css selector", ".text").text
    wanted = pipe(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image_url(tmp_path / "red.png")}},
                    {"type": "text", "text": "what is this?"},
                ],
            }
        ],
    )
    assert not isinstance(wanted, list)
    assert text.split() == wanted.text.split()
    ask(browser, "and now?")
    answered(browser, 2)
    browser.find_elements("xpath", "//button[text()='Show the prompt']")[0].click()
    wait_until(lambda: len(browser.find_elements("css selector", "pre")) == 1)
    shot(browser, "two_turns")
    browser.find_elements("xpath", "//button[text()='Edit and fork']")[1].click()
    assert browser.find_element("id", "text").get_attribute("value") == "and now?"
    assert len(turns(browser, "user")) == 1
    browser.set_window_size(360, 740)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shot(browser, "narrow")


def image_url(path: Path) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_stop_and_error(browser: Any, server: Running) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.getElementById('max_tokens').value = 4000")
    browser.execute_script(  # an answer that is long enough to be stopped
        "const real = window.fetch; window.fetch = (url, given) => real(url, given.body ? "
        "{...given, body: JSON.stringify({...JSON.parse(given.body), ignore_eos: true})} : given)"
    )
    ask(browser, "tell me a long story")
    wait_until(lambda: browser.find_element("id", "stop").is_displayed())
    browser.find_element("id", "text").send_keys(Keys.ESCAPE)
    wait_until(lambda: browser.find_element("id", "send").is_displayed())
    wait_until(lambda: server.app.state.admission.running == 0)
    browser.execute_script("document.getElementById('top_p').value = 7")
    ask(browser, "and this is refused")
    wait_until(lambda: len(browser.find_elements("css selector", ".error")) == 1)
    assert "top_p" in browser.find_element("css selector", ".error").text
    shot(browser, "error")
    browser.get_log("browser")  # that the browser notes the 400 is right


def test_keyboard_and_names(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    active = "return document.activeElement.id"
    assert browser.execute_script(active) == "text"
    browser.find_element("id", "text").send_keys(Keys.TAB)
    assert browser.execute_script(active) == "send"
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter("
        "e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.getAttribute("
        "'aria-hidden') || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
