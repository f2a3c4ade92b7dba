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
from running_server import Running, held, running
from vlmforge import GenerationConfig, Pipeline, pipeline
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
        # The model is not trained: its answers would end with the window, and no turn fit behind.
        driver.execute_script("document.getElementById('max_tokens').value = 24")
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
    def ended() -> bool:
        errors = driver.find_elements("css selector", ".error:not(:empty)")
        assert not [error.text for error in errors]
        return len(driver.find_elements("css selector", ".turn.assistant .bar")) == count

    wait_until(ended)


def button(driver: Any, text: str, number: int = 0) -> Any:
    return driver.find_elements("xpath", f"//button[text()='{text}']")[number]


def dark(driver: Any) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )


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
        GenerationConfig(max_new_tokens=24),
    )
    assert not isinstance(wanted, list)
    assert text.split() == wanted.text.split()
    ask(browser, "and now?")
    answered(browser, 2)
    button(browser, "Show the prompt").click()
    wait_until(lambda: len(browser.find_elements("css selector", "pre mark")) == 1)
    assert "<image>" in browser.find_element("css selector", "pre mark").text
    shot(browser, "two_turns")
    button(browser, "Edit and fork", 1).click()
    assert browser.find_element("id", "text").get_attribute("value") == "and now?"
    assert len(turns(browser, "user")) == 1
    ask(browser, " or then?")
    answered(browser, 2)
    assert turns(browser, "user")[1].find_element("css selector", ".text").text == (
        "and now? or then?"
    )
    branches = browser.find_elements("css selector", "#branch option")
    assert [branch.text for branch in branches] == ["Branch 1 of 2", "Branch 2 of 2"]
    branches[0].click()
    wait_until(lambda: "or then" not in turns(browser, "user")[1].text)
    assert len(browser.find_elements("css selector", "pre mark")) == 1  # still shown
    browser.find_element("css selector", "summary").click()
    for name, width, height in (("narrow", 360, 740), ("dark", 900, 900)):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        shot(browser, name)
        dark(browser)


def image_url(path: Path) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_stop_and_error(browser: Any, server: Running, pipe: Pipeline, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.getElementById('max_tokens').value = 4000")
    browser.execute_script(  # an answer that is long enough to be stopped
        "const real = window.fetch; window.fetch = (url, given) => real(url, given.body ? "
        "{...given, body: JSON.stringify({...JSON.parse(given.body), ignore_eos: true})} : given)"
    )
    for number, stop in enumerate(("button", "Escape"), 1):
        with held(pipe):  # the button is there while an answer comes, which is soon over
            ask(browser, "tell me a long story")
            wait_until(lambda: browser.find_element("id", "stop").is_displayed())
            if stop == "button":
                browser.find_element("id", "stop").click()
            else:
                browser.find_element("id", "text").send_keys(Keys.ESCAPE)
            wait_until(lambda: browser.find_element("id", "send").is_displayed())
        wait_until(lambda: server.app.state.admission.running == 0)
        assert turns(browser, "assistant")[number - 1].text.count("stopped") == 1
    # A setting that is out of range is shown, where it was folded away.
    browser.execute_script("document.getElementById('top_p').value = 7")
    ask(browser, "this is not sent")
    wait_until(lambda: browser.execute_script("return document.activeElement.id === 'top_p'"))
    assert len(turns(browser, "user")) == 2
    browser.execute_script("document.getElementById('top_p').value = 0.33")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    browser.find_element("id", "file").send_keys(str(tmp_path / "broken.png"))
    wait_until(lambda: len(browser.find_elements("css selector", "#tray img")) == 1)
    browser.find_element("id", "text").clear()
    ask(browser, "what is broken?")
    wait_until(lambda: len(browser.find_elements("css selector", ".turn .error")) == 1)
    assert "found:" in browser.find_element("css selector", ".turn .error").text
    shot(browser, "error")
    browser.get_log("browser")  # that the browser notes the 422 is right
    browser.execute_script("document.getElementById('max_tokens').value = 8")
    browser.find_element("id", "text").clear()
    ask(browser, "and this is answered")  # what was refused is no turn of the conversation
    wait_until(lambda: len(browser.find_elements("css selector", ".turn.assistant .bar")) == 1)
    assert len(browser.find_elements("css selector", ".turn .error")) == 1


def test_keyboard_and_names(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def active() -> str:
        return str(browser.execute_script("return document.activeElement.id"))

    assert active() == "text"
    ask(browser, "hello")  # with Enter
    answered(browser, 1)
    assert active() == "text"
    seen = [active()]
    while (found := press(browser, Keys.TAB)) != "text":
        seen.append(found)
        assert len(seen) < 40, seen
    wanted = {"text", "send", "Settings", "model", "clear", "chat", "pick", "Edit and fork"}
    assert wanted | {"Answer again", "Show the prompt"} <= set(seen), seen
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter("
        "e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.getAttribute("
        "'aria-hidden') || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
    assert browser.find_element("id", "status").get_attribute("textContent").startswith("Answer: ")
    names = {
        turn.accessible_name for turn in (*turns(browser, "user"), *turns(browser, "assistant"))
    }
    assert names == {"You", "Model"}


def press(driver: Any, key: str) -> str:
    """What has the focus behind this key: its id, or its text."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(key).perform()
    found = "const e = document.activeElement; return e.id || e.textContent.trim()"
    return str(driver.execute_script(found))


def test_boxes_and_what_is_no_picture(browser: Any, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "teal.png")
    (tmp_path / "notes.txt").write_text("no picture")
    browser.find_element("id", "file").send_keys(str(tmp_path / "notes.txt"))
    wait_until(lambda: bool(browser.find_element("id", "notice").text))
    assert browser.find_element("id", "notice").text == "Not a picture: notes.txt"
    # No trained engine that grounds is small enough: an answer as the server would give it.
    browser.execute_script(
        "state.turns = [{role: 'user', text: 'where?', pictures: [{url: arguments[0], name: 'p'}]},"
        "{role: 'assistant', text: 'there', boxes: [{image: 0, x1: 30, y1: 50, x2: 150, y2: 200,"
        " ref: 'sea'}]}]; draw();",
        image_url(tmp_path / "teal.png"),
    )
    wait_until(lambda: len(browser.find_elements("css selector", ".box")) == 1)
    box = browser.find_element("css selector", ".box").rect
    image = browser.find_elements("css selector", ".turn.assistant img")[0].rect
    found = [
        (box["x"] - image["x"]) / image["width"],
        (box["y"] - image["y"]) / image["height"],
        box["width"] / image["width"],
        box["height"] / image["height"],
    ]
    assert found == pytest.approx([0.1, 0.25, 0.4, 0.75], abs=0.02)
    alt = browser.find_elements("css selector", ".turn.assistant img")[0].get_attribute("alt")
    assert alt == "p with boxes: sea"
    shot(browser, "boxes")
