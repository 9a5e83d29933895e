"""The Space as it is seen: a real browser uploads, asks and reads, and asks nothing of other hosts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from spark_vl.demo import digits
from tests.browser.serving import MODEL, served_space

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs Chromium: apt-get install chromium chromium-driver"),
]

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ROWS = digits.rows("test")
WRONG, RIGHT = ROWS[0], ROWS[3]
"""Problems whose answers the model judges wrong and right."""
WIDE, NARROW = (1280, 900), (420, 900)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with served_space(tmp_path_factory.mktemp("served")) as address:
        yield address()


class Page:
    """The Space in a window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def until(self, true: Callable[[], object], seconds: float = 30) -> None:
        WebDriverWait(self.driver, seconds).until(lambda _: true())

    def button(self, name: str) -> WebElement:
        return self.driver.find_element(By.XPATH, f"//button[normalize-space()='{name}']")

    def panel(self, heading: str) -> dict[str, WebElement]:
        """Label → field of the panel below `heading`, or of the form (an empty heading)."""
        inside = f"//div[contains(@class, 'card')][.//h2[contains(., '{heading}')]]" if heading else ""
        labels = self.driver.find_elements(By.XPATH, f"{inside}//label[.//textarea]")
        return {label.text: label.find_element(By.TAG_NAME, "textarea") for label in labels}

    def said(self, heading: str) -> list[str]:
        return [field.get_property("value") for field in self.panel(heading).values()]

    def verdict(self) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, ".verdict b").text

    def status(self) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, "[role=status]").text

    def upload(self, file: Path) -> None:
        self.driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(file))
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "img[alt='The uploaded image']"))

    def ask(self, question: str) -> None:
        self.panel("")["Question"].send_keys(question)
        self.button("Ask").click()

    def foreign(self) -> list[str]:
        """Addresses of other hosts that anything in the window asked for."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        asked = {
            message["params"].get("url") or message["params"]["request"]["url"]
            for message in messages
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")
        }
        assert any(urlsplit(address).hostname == "127.0.0.1" for address in asked), "nothing was recorded"
        return [
            a
            for a in asked
            if (host := urlsplit(a)).scheme in ("http", "https", "ws", "wss") and host.hostname != "127.0.0.1"
        ]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(url, tmp_path, request) -> Iterator[Page]:
    """The page just opened, in the theme and size of the parameter; afterwards nothing may have gone wrong in it."""
    theme, (width, height) = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(f"{url}?__theme={theme}")
        opened = Page(driver)
        opened.until(lambda: driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))
        yield opened
        assert (opened.foreign(), opened.complaints()) == ([], [])
    finally:
        driver.quit()


def everywhere(test):
    parameters = [("light", WIDE), ("dark", WIDE), ("light", NARROW)]
    return pytest.mark.parametrize("page", parameters, indirect=True, ids=["light", "dark", "narrow"])(test)


def file_of(row: dict, folder: Path) -> Path:
    file = folder / "digits.png"
    file.write_bytes(row["image"]["bytes"])
    return file


@everywhere
def test_the_panels_fill_in(page, tmp_path):
    assert MODEL in page.driver.find_element(By.TAG_NAME, "h1").find_element(By.XPATH, "..").text
    assert page.said("Answer") == page.said("Judgment")[:1] * 2 == ["", ""]
    page.upload(file_of(WRONG, tmp_path))
    page.ask(WRONG["question"])
    page.until(lambda: page.status() == "Done.")
    final, reply = page.said("Answer")
    assert f"\\boxed{{{final}}}" in reply
    assert page.verdict() == "Wrong"
    assert "\\boxed" in page.said("Judgment")[0]
    final, reply = page.said("Reflection")
    assert f"\\boxed{{{final}}}" in reply
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("page", [("light", WIDE)], indirect=True, ids=["light"])
def test_an_answer_judged_right_is_reflected_on_when_wanted(page, tmp_path):
    page.upload(file_of(RIGHT, tmp_path))
    page.ask(RIGHT["question"])
    page.until(lambda: page.status() == "Done.")
    assert page.verdict() == "Right"
    assert page.said("Reflection") == ["", ""]
    assert "Not needed" in page.driver.find_element(By.TAG_NAME, "body").text
    page.until(lambda: page.button("Reflect anyway").is_displayed())
    page.button("Reflect anyway").click()
    page.until(lambda: page.status() == "Done." and all(page.said("Reflection")))
    assert "Not needed" not in page.driver.find_element(By.TAG_NAME, "body").text


@pytest.mark.parametrize("page", [("light", WIDE)], indirect=True, ids=["light"])
def test_what_is_missing_is_said(page):
    page.button("Ask").click()
    page.until(lambda: "Please upload an image first" in page.driver.find_element(By.TAG_NAME, "body").text)
    page.until(lambda: page.status() == "Stopped.")


CONTRAST = """
const light = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
let back = arguments[0];
while (/, 0\\)|transparent/.test(getComputedStyle(back).backgroundColor)) back = back.parentElement;
const [a, b] = [light(getComputedStyle(arguments[0]).color), light(getComputedStyle(back).backgroundColor)];
return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""


@everywhere
def test_everything_has_a_label_and_can_be_read(page, tmp_path):
    page.upload(file_of(WRONG, tmp_path))
    page.ask(WRONG["question"])
    page.until(lambda: page.status() == "Done.")
    for element in page.driver.find_elements(By.CSS_SELECTOR, "main textarea, main input, main button"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    texts = "main h1, main h2, main textarea, main label > span, .verdict b, .verdict span, [role=status]"
    shown = [e for e in page.driver.find_elements(By.CSS_SELECTOR, texts) if e.is_displayed()]
    assert len(shown) > 15
    for element in shown:
        # 4.5: WCAG 2.2, level AA
        assert page.driver.execute_script(CONTRAST, element) >= 4.5, element.get_attribute("outerHTML")
