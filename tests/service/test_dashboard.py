"""The dashboard in a real browser (Debian's chromium): from the form to a finished run, by mouse and by keyboard."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from support.models import trainable_moe

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
SCREENSHOTS = os.environ.get("LAMELLA_SCREENSHOTS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs: a small converted model and a text."""
    folder = tmp_path_factory.mktemp("dashboard")
    trainable_moe(folder / "moe")
    (folder / "text.txt").write_text("".join(f"Line {i} of a text about slices.\n" for i in range(2000)))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "lamella.cli", "serve", "--port", "0", "--home", str(folder / "home")]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        yield found[0]
        server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


Pages = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Pages]:
    """Pages whose errors fail the test: of scripts, of the console, of the content security policy."""
    errors: list[str] = []
    contexts = []

    def opened(path: str, **options: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def shoot(page: Page, name: str) -> None:
    """A picture to look at, where $LAMELLA_SCREENSHOTS names a folder."""
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), full_page=True)


def check_accessible(page: Page) -> None:
    """No serious finding of axe."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in serious] == []


@pytest.fixture(scope="module")
def finished(browser: Browser, address: str, folder: Path) -> str:
    """The id of a training run that was submitted by the form and has ended well."""
    page = browser.new_page()
    page.goto(f"{address}/new")
    values = {
        "model": folder / "moe", "out": folder / "run", "data": f'["{folder / "text.txt"}"]', "steps": 6,
        "seq_len": 32, "samples_per_step": 2,
    }  # fmt: skip
    page.get_by_label("Name").fill("from the form")
    page.get_by_label("Processes").fill("1")
    page.locator("summary").click()
    for key, value in (values | {"heldout_samples": 2, "save_every_steps": 3, "tensorboard": "false"}).items():
        page.locator(f'[name="key:{key}"]').fill(str(value))
    page.locator('[name="key:steps"]').fill("many")
    page.locator("#problem", has_text="steps").wait_for(timeout=30_000)
    assert page.get_by_role("button", name="Submit").is_disabled()
    page.locator('[name="key:steps"]').fill("6")
    page.locator("#plan", has_text="lamella train").wait_for(timeout=60_000)
    shoot(page, "new")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"/runs/run-[0-9a-f]{12}$"))
    page.locator("#state", has_text=re.compile("^(succeeded|failed)")).wait_for(timeout=240_000)
    assert page.locator("#state").inner_text().startswith("succeeded"), page.locator("#log").inner_text()
    run = page.url.rsplit("/", 1)[1]
    page.close()
    return run


def test_a_run_shows_its_curves_experts_checkpoints_events_and_log(open_page: Pages, finished: str) -> None:
    page = open_page(f"/runs/{finished}")
    for chart in ("loss", "rate", "speed", "twins", "load"):
        page.locator(f"#{chart} .main-svg").first.wait_for(timeout=30_000)
    assert page.locator("#checkpoints tr").count() >= 1
    page.get_by_role("button", name="Verify step 6").click()
    page.get_by_text("yes, every byte").wait_for(timeout=30_000)
    page.locator("#events li", has_text="succeeded").first.wait_for()
    assert "step" in page.locator("#log").inner_text()
    assert page.get_by_role("button", name="Export").is_visible()
    shoot(page, "run")
    check_accessible(page)


@pytest.mark.parametrize("path", ["/", "/new", "/models", "/compare?runs=RUN,RUN", "/runs/RUN", "/login"])
def test_pages_fit_a_phone_in_dark_mode(open_page: Pages, finished: str, path: str) -> None:
    page = open_page(
        path.replace("RUN", finished), viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
    )
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shoot(page, "phone" + path.split("?")[0].replace(finished, "").replace("/", "-").replace("RUN", "run"))
    check_accessible(page)


def test_the_list_is_searched_and_opened_by_keyboard(open_page: Pages, finished: str) -> None:
    page = open_page("/")
    page.get_by_role("link", name="from the form").wait_for()
    shoot(page, "runs")
    check_accessible(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("Search").focus()
    page.keyboard.type("no run is called so")
    page.get_by_text("No run yet").wait_for()
    page.get_by_label("Search").fill("form")
    link = page.get_by_role("link", name="from the form")
    link.wait_for()
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/runs/{finished}")


def test_a_run_is_cancelled_from_its_page(open_page: Pages, address: str, folder: Path) -> None:
    recipe = {
        "model": str(folder / "moe"), "out": str(folder / "long"), "data": [str(folder / "text.txt")], "seq_len": 32,
        "samples_per_step": 2, "steps": 100_000, "heldout_samples": 0, "tensorboard": False,
    }  # fmt: skip
    job = {"kind": "train", "recipe": recipe, "ranks": 1}
    run = httpx.post(f"{address}/v1/jobs", json={"job": job, "name": "long"}).raise_for_status().json()["id"]
    page = open_page(f"/runs/{run}")
    page.locator("#state", has_text="running").wait_for(timeout=120_000)
    page.get_by_role("button", name="Cancel").click()
    page.locator("#state", has_text="cancelled").wait_for(timeout=120_000)
    assert page.get_by_role("button", name="Retry").is_visible()


def test_what_is_missing_is_told(open_page: Pages, address: str) -> None:
    page = open_page("/login")
    answer = httpx.post(f"{address}/login", json={"key": "wrong"})
    assert answer.status_code == 401
    assert "not known" in answer.json()["detail"]
    assert httpx.get(f"{address}/assets/../pages.py").status_code == 404
    assert "unsafe" not in httpx.get(f"{address}/").headers["content-security-policy"]
    assert "script-src 'self';" in httpx.get(f"{address}/runs/run-000000000000").headers["content-security-policy"]
    assert page.get_by_label("Key").is_visible()


def test_pages_come_at_once(address: str) -> None:
    began = time.perf_counter()
    for path in ("/", "/new", "/assets/runs.js", "/assets/style.css"):
        assert httpx.get(address + path).status_code == 200
    assert time.perf_counter() - began < 5
