"""Run: uv run benchmarks/service_browser.py [--runs 10000] [--rounds 15] [--json FILE.json]

The list page of a store with many runs in headless Chromium. Each round opens it in a browser context of its own, with
an empty cache, types into the search box by the keyboard as soon as it is there, and waits until the table holds what
was searched for: interactive. Then it sorts by name, goes to the next page, and opens a run. All times are those of the
clock outside the browser, from the key or click (or the start of the navigation) to what is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from lamella.jsons import Json

sys.path.insert(0, str(Path(__file__).parent))
from service_load import fill, start

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
ROWS = "document.querySelectorAll('#runs tr').length"


def until(page: Page, condition: str, act: Callable[[], object]) -> float:
    """Milliseconds from before the act until the condition holds in the page."""
    began = time.perf_counter()
    act()
    page.wait_for_function(condition, polling="raf", timeout=30_000)
    return 1000 * (time.perf_counter() - began)


def rows_are(count: int, first: str) -> str:
    """The condition that the table has so many rows, the first of this name."""
    return f"{ROWS} === {count} && document.querySelector('#runs a').textContent === {json.dumps(first)}"


def one_round(browser: Browser, address: str, runs: int) -> dict[str, float]:
    """What a person does with the list, and how long each answer takes."""
    # the policy of the pages forbids what playwright asks them by; it costs no time
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    searched = f"run {runs - 1}"

    def open_and_type() -> None:
        page.goto(address, wait_until="commit")
        page.get_by_label("Search").press_sequentially(searched)

    took = {"interactive_ms": until(page, rows_are(1, searched), open_and_type)}
    box, newest = page.get_by_label("Search"), f"run {runs - 1}"
    took["filter_cleared_ms"] = until(page, rows_are(50, newest), lambda: box.fill(""))
    took["state_filter_ms"] = until(
        page, f"{ROWS} === 50 && [...document.querySelectorAll('#runs td.failed')].length === 50",
        lambda: page.locator('select[name=state]').select_option("failed"),
    )  # fmt: skip
    page.locator("select[name=state]").select_option("")
    page.wait_for_function(rows_are(50, newest))
    took["sort_ms"] = until(page, rows_are(50, "run 0"), lambda: page.get_by_role("button", name="Run").click())
    second = sorted(f"run {i}" for i in range(runs))[50]
    took["next_page_ms"] = until(page, rows_are(50, second), lambda: page.get_by_role("button", name="Next").click())
    began = time.perf_counter()
    page.get_by_role("link", name=second, exact=True).click()
    page.locator("#state", has_text="step 1000 of 1000").wait_for()
    took["open_run_ms"] = 1000 * (time.perf_counter() - began)
    context.close()
    assert errors == []
    return took


def measure(home: Path, args: argparse.Namespace) -> Json:
    """All figures."""
    fill(home, args.runs)
    server, address, _ = start(home)
    try:
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            version = browser.version
            one_round(browser, address, args.runs)  # the browser itself warms up
            rounds = [one_round(browser, address, args.runs) for _ in range(args.rounds)]
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
    figures = {
        name: {
            "median": round(statistics.median(r[name] for r in rounds), 1),
            "min": round(min(r[name] for r in rounds), 1), "max": round(max(r[name] for r in rounds), 1),
        }
        for name in rounds[0]
    }  # fmt: skip
    load = [round(load, 1) for load in os.getloadavg()]
    return {"runs": args.runs, "rounds": args.rounds, "chromium": version, "load": load} | figures


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="browser.") as name:
        report = measure(Path(name) / "home", args)
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
