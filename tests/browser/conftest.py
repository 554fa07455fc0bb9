"""A browser without a window, for pages that are opened from a file."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

Look = Callable[..., None]

REQUIRED = "BILEVEL_BROWSER"
"""Set to `required`, it makes a missing browser a failure instead of a reason to skip."""


def program(*names: str) -> str:
    """Where Debian's browser or its driver is."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    message = f"there is no {names[0]}: apt-get install chromium chromium-driver"
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(_browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """A browser as it is at its start: light, 1280 pixels wide, nothing remembered."""
    _look(_browser)
    _browser.get_log("browser")
    _browser.get_log("performance")
    yield _browser
    _browser.execute_script("try { localStorage.clear(); } catch {}")
    _browser.get("about:blank")


@pytest.fixture
def look() -> Look:
    """Sets the width of the screen and the colours that the system asks for."""
    return _look


def _look(browser: webdriver.Chrome, *, width: int = 1280, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
