"""The page of `bilevel report` in a browser: it stays silent, answers, and can be read by all."""

import base64
import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from bilevel.outer.history import History, Record
from bilevel.outer.report.page import write_page
from bilevel.outer.report.section import Section, section_of
from bilevel.outer.run import Run, summarize

pytestmark = pytest.mark.slow

Look = Callable[..., None]

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"

LOOKS = {
    "light": {"width": 1280, "scheme": "light"},
    "dark": {"width": 1280, "scheme": "dark"},
    "narrow": {"width": 320, "scheme": "light"},
    "narrow and dark": {"width": 360, "scheme": "dark"},
}


def run_of(policy: str, seed: int, length: int, work: int, **fields: Any) -> Run:
    """A run whose metric falls, and whose solves cost `work`."""
    draw = np.random.default_rng(seed)
    records = [Record(epoch=0, metric=2.0)]
    for epoch in range(1, length + 1):
        noise = float(draw.uniform(0.9, 1.1))
        budget = min(epoch, work)
        records.append(
            Record(
                epoch=epoch,
                metric=2.0 * 0.9 ** min(epoch, 60) * noise,
                gradient_norm=0.9 ** min(epoch, 60),
                gradient_noise=0.1 * noise,
                error=0.5 * noise / epoch,
                updates=1,
                level=budget,
                budget_iterations=budget,
                adjoint_budget_iterations=max(budget // 2, 1),
                solves=1,
                primal_iterations=budget,
                adjoint_iterations=max(budget // 2, 1),
                primal_residual=0.5**budget,
                adjoint_residual=0.6**budget,
                primal_capped=1,
                seconds=0.01,
                elapsed=0.01 * epoch,
            )
        )
    history = History(records)
    known: dict[str, Any] = {
        "task": "two",
        "controller": "none",
        "status": "completed",
        "message": "",
        "metric_name": "error",
        "seconds": history[-1].elapsed,
        "compile_seconds": 0.0,
        "compilations": 1,
        "other_compilations": 0,
        "device": "cpu",
    }
    return Run(None, history, summarize(history, {}, policy=policy, seed=seed, **known | fields))


def comparison_section() -> Section:
    runs = {
        "full": [run_of("full", seed, 30, 40) for seed in (0, 1)],
        "prdp": [run_of("prdp", seed, 30, 20) for seed in (0, 1)],
        ATTACK: [run_of(ATTACK, 0, 12, 8, status="nonfinite", message=ATTACK)],
    }
    section = section_of(runs, ATTACK, "error", 0.2)
    return dataclasses.replace(section, configurations={"runs/a": {"task.width": ATTACK}})


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison, a run alone, one without an epoch, and one of ten thousand."""
    alone = section_of({"auto": [run_of("auto", 0, 25, 12)]}, "alone", "error", None)
    empty = section_of({"full": [run_of("full", 0, 0, 1)]}, "empty", "error", None)
    single = section_of({"full": [run_of("full", 0, 1, 1)]}, "one epoch", "error", None)
    long = section_of({"prdp": [run_of("prdp", 0, 10_000, 50)]}, "long", "error", None)
    sections = [comparison_section(), alone, empty, single, long]
    return write_page(sections, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(browser: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    open_page(browser, page)
    return browser


def open_page(browser: webdriver.Chrome, page: Path) -> None:
    browser.get(page.as_uri())
    wait(browser, lambda: len(figures(browser)) > 0)
    count = len(browser.find_elements(By.CSS_SELECTOR, "figure"))
    wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".plot canvas")) == count)


def wait(browser: webdriver.Chrome, until: Callable[[], Any]) -> None:
    WebDriverWait(browser, 15).until(lambda _: until())


def figures(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "figure[data-position]")


def figure(browser: webdriver.Chrome, key: str) -> WebElement:
    found = browser.find_element(By.CSS_SELECTOR, f'figure[data-chart="{key}"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def picture(browser: webdriver.Chrome, found: WebElement) -> bytes:
    """The pixels of a chart."""
    script = "return arguments[0].querySelector('canvas').toDataURL().split(',')[1]"
    # uPlot draws when the browser next has time.
    settle = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    browser.execute_async_script(settle)
    return base64.b64decode(browser.execute_script(script, found))


def button(found: WebElement, name: str) -> WebElement:
    return next(
        each for each in found.find_elements(By.TAG_NAME, "button") if each.text.startswith(name)
    )


# Silence.


@pytest.mark.parametrize("name", LOOKS)
def test_it_says_nothing_asks_for_nothing_and_fits(
    browser: webdriver.Chrome, look: Look, page: Path, name: str
):
    look(browser, **LOOKS[name])
    open_page(browser, page)
    assert browser.get_log("browser") == []
    messages = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if url != "about:blank"] == [page.as_uri()]
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1]


def test_the_names_of_runs_run_nothing(opened: webdriver.Chrome):
    assert opened.find_element(By.TAG_NAME, "h1").text.startswith(ATTACK)
    assert opened.execute_script("return document.images.length") == 0
    assert opened.execute_script("return document.scripts.length") == 2


# Answers.


def test_the_slider_moves_by_keys_and_tells_what_is_there(opened: webdriver.Chrome):
    found = figure(opened, "1-metric")
    slider = found.find_element(By.CSS_SELECTOR, "input[type=range]")
    assert found.get_attribute("data-position") == "25"
    slider.send_keys(Keys.HOME)
    assert found.get_attribute("data-position") == "0"
    assert found.find_element(By.TAG_NAME, "output").text == "outer step 0"
    assert slider.get_attribute("aria-valuetext") == "outer step 0: auto 2"
    assert found.find_element(By.CSS_SELECTOR, ".value").text == "2"
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert found.find_element(By.TAG_NAME, "output").text == "outer step 2"
    assert found.find_element(By.CSS_SELECTOR, ".value").text != "2"


def test_hovering_moves_the_slider(opened: webdriver.Chrome):
    found = figure(opened, "0-work")
    over = found.find_element(By.CSS_SELECTOR, ".u-over")
    seen: set[str | None] = set()
    for offset in (-150, 0, 150):
        ActionChains(opened).move_to_element_with_offset(over, offset, 0).perform()
        seen.add(found.get_attribute("data-position"))
    assert len(seen) == 3
    slider = found.find_element(By.CSS_SELECTOR, "input[type=range]")
    assert slider.get_attribute("value") == found.get_attribute("data-position")


def test_the_legend_hides_lines_by_mouse_and_by_keys(opened: webdriver.Chrome):
    found = figure(opened, "0-metric")
    before = picture(opened, found)
    entry = button(found, "prdp")
    assert entry.get_attribute("aria-pressed") == "true"
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    hidden = picture(opened, found)
    assert hidden != before
    entry.send_keys(Keys.SPACE)
    assert entry.get_attribute("aria-pressed") == "true"
    ActionChains(opened).move_to_element(found.find_element(By.TAG_NAME, "h4")).perform()
    assert picture(opened, found) == before


@pytest.mark.parametrize("key", ["0-metric", "0-work"])
def test_zooming_by_buttons_and_by_dragging(opened: webdriver.Chrome, key: str):
    found = figure(opened, key)
    whole = picture(opened, found)
    button(found, "Zoom in").click()
    assert picture(opened, found) != whole
    assert found.get_attribute("data-zoomed") == "true"
    button(found, "Zoom out").click()
    wait(opened, lambda: found.get_attribute("data-zoomed") == "false")
    assert picture(opened, found) == whole
    over = found.find_element(By.CSS_SELECTOR, ".u-over")
    ActionChains(opened).move_to_element_with_offset(over, -60, 0).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()
    wait(opened, lambda: found.get_attribute("data-zoomed") == "true")
    button(found, "Whole").click()
    wait(opened, lambda: found.get_attribute("data-zoomed") == "false")


def test_the_axis_changes_between_linear_and_logarithmic(opened: webdriver.Chrome):
    found = figure(opened, "0-residual")
    before = picture(opened, found)
    toggle = button(found, "Logarithmic")
    assert toggle.get_attribute("aria-pressed") == "true"
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false"
    assert picture(opened, found) != before


def background(browser: webdriver.Chrome) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_colours_follow_the_system_and_the_button(
    browser: webdriver.Chrome, look: Look, page: Path
):
    look(browser, scheme="dark")
    open_page(browser, page)
    dark = background(browser)
    drawn = picture(browser, figure(browser, "1-metric"))
    look(browser, scheme="light")
    light = background(browser)
    assert light != dark
    assert picture(browser, figure(browser, "1-metric")) != drawn
    toggle = browser.find_element(By.ID, "theme")
    seen = []
    for _ in range(3):
        toggle.click()
        seen.append((toggle.text, background(browser)))
    assert seen == [
        ("Colours: light", light),
        ("Colours: dark", dark),
        ("Colours: as the system", light),
    ]


def test_what_was_chosen_is_remembered(opened: webdriver.Chrome, page: Path):
    toggle = opened.find_element(By.ID, "theme")
    toggle.click()
    toggle.click()
    dark = background(opened)
    open_page(opened, page)
    assert background(opened) == dark
    assert opened.find_element(By.ID, "theme").text == "Colours: dark"


# For everyone.


@pytest.fixture(scope="module")
def axe() -> str:
    return resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")


@pytest.mark.parametrize("name", LOOKS)
def test_the_accessibility_checker_finds_nothing(
    browser: webdriver.Chrome, look: Look, page: Path, axe: str, name: str
):
    look(browser, **LOOKS[name])
    open_page(browser, page)
    browser.execute_script(
        "document.querySelectorAll('details').forEach((each) => each.open = true)"
    )
    browser.set_script_timeout(120)
    browser.execute_script(axe)
    result = browser.execute_async_script(
        "const done = arguments[0];"
        "axe.run(document, {resultTypes: ['violations']}).then(done, (e) => done(String(e)))"
    )
    assert isinstance(result, dict), result
    found = [
        (each["impact"], each["id"], [node["html"][:200] for node in each["nodes"][:3]])
        for each in result["violations"]
    ]
    assert found == []
    # That it can find something, with these settings.
    browser.execute_script("document.querySelector('h4').innerHTML = '<img src=\"data:,\">'")
    worse = browser.execute_async_script("axe.run('h4').then(arguments[0])")
    assert "image-alt" in [each["id"] for each in worse["violations"]]


def test_the_page_is_walked_through_by_keys(opened: webdriver.Chrome):
    body = opened.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    first = opened.switch_to.active_element
    assert first.text == "Skip to the content"
    assert first.is_displayed()
    first.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "content"
    names: list[str] = []
    for _ in range(40):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        active = opened.switch_to.active_element
        names.append(active.text or active.get_attribute("aria-label") or "")
    assert {"Zoom in", "Position: outer step"} <= set(names)
    assert any(name.startswith("full") for name in names)
    assert all(names)


def test_without_scripts_the_words_and_tables_are_there(
    browser: webdriver.Chrome, page: Path
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        text = browser.find_element(By.TAG_NAME, "main").text
        assert "Charts are drawn by a script, which is switched off here." in text
        assert "auto came to" in text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
