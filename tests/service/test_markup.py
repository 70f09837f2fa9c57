"""Case 26 in a browser: markup in a run's name and in its log is text, and runs nothing."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from lamella.service.app import make_app
from lamella.service.context import Service
from support.service import new_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
MARKUP = "<img src=x onerror=\"window.hit='NAME'\"><script>window.hit='NAME'</script>&lt;b&gt;"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    """Of the service, on a port; nothing is scheduled."""
    server = uvicorn.Server(uvicorn.Config(make_app(service, schedule=False), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_markup_in_a_name_a_reason_and_a_log_is_text(service: Service, address: str) -> None:
    name, reason, line = (MARKUP.replace("NAME", what) for what in ("name", "reason", "log"))
    run = service.store.create(new_run(name=name))[0]
    service.store.move(run, "failed", "refused", {"reason": reason}, failure="user_config", reason=reason)
    log = service.place.log(run.id)
    log.parent.mkdir(parents=True)
    log.write_text(f"{line}\n")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        for path, texts in (("/", [name]), (f"/runs/{run.id}", [name, reason, line])):
            page.goto(address + path)
            for text in texts:
                expect(page.locator("body")).to_contain_text(text, timeout=30_000)
            assert page.evaluate("window.hit") is None
            assert page.locator("img[src=x]").count() == 0
        browser.close()
