"""A headless Chromium for the live page, and what the page must show beside any server. Knows no server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not on this machine"
)

PATIENCE_S = 5.0

# It asks nobody but the server under test.
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@contextmanager
def browse(profile: Path, *flags: str) -> Iterator[webdriver.Chrome]:
    """A browser with a new profile; `driver.get_log("browser")` is its console."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    if os.geteuid() == 0:  # Chromium's sandbox refuses to be root's
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def find(driver: webdriver.Chrome, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver: webdriver.Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    found: list[str] = driver.execute_script(script, selector)
    return found


def attributes(driver: webdriver.Chrome, selector: str, name: str) -> list[str]:
    """In one go: the page replaces elements as it hears from the server."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.getAttribute(arguments[1]))"
    )
    found: list[str] = driver.execute_script(script, selector, name)
    return found


def text(driver: webdriver.Chrome, selector: str) -> str:
    return "".join(texts(driver, selector))


def wait_until(
    driver: webdriver.Chrome, true: Callable[[], Any], what: str, timeout_s: float | None = None
) -> None:
    WebDriverWait(driver, timeout_s or PATIENCE_S, poll_frequency=0.05).until(lambda _: true(), what)


def console_errors(driver: webdriver.Chrome) -> list[str]:
    """Since the last call; an HTTP status that the page answers for is none."""
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [entry["message"] for entry in severe if entry["source"] != "network"]


def drawn_bars(driver: webdriver.Chrome) -> dict[int, dict[str, int]]:
    """How many bars of each kind stand in each rank's lane; only what has a width and a colour counts."""
    script = """
        const lanes = {};
        for (const lane of document.querySelectorAll("#timeline .lane")) {
            const bars = lanes[lane.dataset.rank] = {prefill: 0, decode: 0};
            for (const path of lane.querySelectorAll("path")) {
                const seen = path.getBoundingClientRect().width > 0 && getComputedStyle(path).fill !== "none";
                if (seen) bars[path.classList[0]] += Number(path.dataset.count);
            }
        }
        return lanes;
    """
    return {int(rank): bars for rank, bars in driver.execute_script(script).items()}


def ask(driver: webdriver.Chrome, prompt: str, mode: str = "chat", max_tokens: int = 8) -> None:
    Select(find(driver, "#mode")).select_by_value(mode)
    for selector, value in (("#prompt", prompt), ("#max-tokens", str(max_tokens))):
        find(driver, selector).clear()
        find(driver, selector).send_keys(value)
    find(driver, "#send").click()


def has_answered(driver: webdriver.Chrome) -> bool:
    return (
        find(driver, "#send").is_enabled() and find(driver, "#answer").get_attribute("aria-busy") == "false"
    )


def check_page(
    driver: webdriver.Chrome,
    base_url: str,
    *,
    num_ranks: int,
    api_key: str = "",
    mode: str = "chat",
    prompt: str = "Hello",
    max_tokens: int = 8,
) -> None:
    """The page of any serving server: it draws each rank, and answers a prompt as it is made."""
    driver.get(base_url)
    if api_key:
        find(driver, "#key").send_keys(api_key)
    wait_until(driver, lambda: text(driver, "#state") == "serving", "the state is shown")
    wait_until(
        driver, lambda: len(texts(driver, "#ranks [role=meter]")) == num_ranks, "a KV bar for each rank"
    )
    ask(driver, prompt, mode, max_tokens)
    wait_until(driver, lambda: has_answered(driver), "the answer ends", timeout_s=60)
    assert not text(driver, "#trouble"), text(driver, "#trouble")
    assert text(driver, "#answer"), "the answer is empty"
    assert "TTFT" in text(driver, "#timing") and "–" not in text(driver, "#timing").split("·")[0]

    def all_lanes_drawn() -> bool:
        lanes = drawn_bars(driver).values()
        return len(lanes) == num_ranks and all(bars["prefill"] and bars["decode"] for bars in lanes)

    wait_until(driver, all_lanes_drawn, f"prefill and decode on {num_ranks} lanes: {drawn_bars(driver)}")
    assert not (errors := console_errors(driver)), errors
