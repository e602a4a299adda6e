"""A real Chromium, driven by Selenium. These tests have a command of their own: `hatch run browser:test`."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Open = Callable[..., Any]


@pytest.fixture
def open_page() -> Iterator[Open]:
    """Open an address in a window of its own: `open_page(address, width=1280, dark=False)`, a Selenium driver."""
    from selenium import webdriver

    opened = []

    def open_(address: str, width: int = 1280, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        opened.append(browser)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(address)
        return browser

    yield open_
    for browser in opened:
        browser.quit()
