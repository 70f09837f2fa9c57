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
import yaml
from playwright.sync_api import Browser, Page, Route, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from lamella.run.folder import RunDir
from support.models import save_llama, trainable_moe

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
    (folder / "more.txt").write_text("".join(f"Of another text this is line {i}.\n" for i in range(1500)))
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
        "model": folder / "moe", "out": folder / "run", "data": f"[{folder / 'text.txt'}, {folder / 'more.txt'}]",
        "steps": 6, "seq_len": 32, "samples_per_step": 2,
    }  # fmt: skip
    page.get_by_label("Name").fill("from the form")
    page.get_by_label("Processes").fill("1")
    page.locator("#rest summary").click()
    for key, value in (values | {"heldout_samples": 6, "save_every_steps": 3}).items():
        page.locator(f'[name="key:{key}"]').fill(str(value))
    page.locator('[name="key:tensorboard"]').select_option("false")
    page.locator('[name="key:steps"]').fill("many")
    page.locator("#problem", has_text="steps").wait_for(timeout=30_000)
    assert page.get_by_role("button", name="Submit").is_disabled()
    assert page.locator('[name="key:steps"]').get_attribute("aria-invalid") == "true"
    assert page.locator('[id="wrong-key:steps"]').inner_text() != ""
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
    def answer_late(route: Route) -> None:
        """Let the list of checkpoints be drawn anew, for the events of saves, while one is verified."""
        time.sleep(3)
        route.continue_()

    page = open_page(f"/runs/{finished}")
    page.route("**/checkpoints?verify=6", answer_late)
    for chart in ("loss", "heldout", "rate", "speed", "twins", "load", "entropy"):
        page.locator(f"#{chart} .main-svg").first.wait_for(timeout=30_000)
    assert page.locator("#checkpoints tr").count() >= 1
    page.get_by_role("button", name="Verify step 6").click()
    page.get_by_text("yes, every byte").wait_for(timeout=120_000)
    page.locator("#events li", has_text="succeeded").first.wait_for()
    assert "step" in page.locator("#log").inner_text()
    assert page.get_by_role("button", name="Export").is_visible()
    shoot(page, "run")
    check_accessible(page)


def test_the_curves_are_those_of_the_files_and_events_stand_on_them(
    open_page: Pages, finished: str, folder: Path
) -> None:
    page = open_page(f"/runs/{finished}")
    for chart in ("loss", "heldout", "twins", "load", "entropy"):
        page.locator(f"#{chart} .main-svg").first.wait_for(timeout=30_000)
    page.locator("#marks tr").nth(2).wait_for(timeout=30_000)  # the events are heard beside the curves' reading
    run = RunDir(folder / "run")
    lines = list(run.metrics())
    read = "place => document.getElementById(place).data.map(({name, x, y, z, text}) => ({name, x, y, z, text}))"

    def drawn(place: str) -> dict[str, dict]:
        return {trace.get("name"): trace for trace in page.evaluate(read, place)}

    loss = drawn("loss")
    assert loss["loss"]["y"] == [line.get("loss") for line in lines]
    assert loss["heldout loss"]["y"] == [line["heldout_loss"] for line in lines]
    assert loss["loss"]["x"] == [line["step"] for line in lines]
    assert loss["saves"]["x"] == [event["step"] for event in run.events("save")] == [3, 6]
    assert loss["starts and resumes"]["text"] == ["step 0: started, 1 rank"]
    sources = drawn("heldout")
    for name in ("text.txt", "more.txt"):
        assert sources[name]["y"] == [line.get("heldout_losses", {}).get(str(folder / name)) for line in lines]
        assert sources[name]["y"][0] is not None
    trained = [line for line in lines if "twin_share" in line]
    for place, name in (("twins", "twin_share"), ("load", "max_vio"), ("entropy", "router_entropy")):
        (heat,) = page.evaluate(read, place)
        assert heat["z"] == [list(layer) for layer in zip(*(line[name] for line in trained), strict=True)]
        assert heat["x"] == [line["step"] for line in trained]
    assert "6 points" in page.locator("#speed").get_attribute("aria-label")
    rows = page.locator("#marks tr")
    assert [rows.nth(i).locator("td").first.inner_text() for i in range(rows.count())] == ["0", "3", "6"]
    page.get_by_label("Axis").select_option("time")
    saves = "() => document.getElementById('loss').data.find(({name}) => name === 'saves').x.map(Number)"
    page.wait_for_function(f"() => ({saves})()[0] > 1e9")
    times = page.evaluate(saves)
    assert times == pytest.approx([1000 * event["time"] for event in run.events("save")], abs=2)


def test_a_conversion_is_verified_from_its_page(open_page: Pages, address: str, folder: Path) -> None:
    save_llama(folder / "dense")
    recipe = {"model": str(folder / "dense"), "out": str(folder / "sliced"), "method": "slice", "slices": 4}
    job = {"kind": "convert", "recipe": recipe}
    run = httpx.post(f"{address}/v1/jobs", json={"job": job, "name": "slices"}).raise_for_status().json()["id"]
    page = open_page(f"/runs/{run}")
    page.get_by_text("Nothing yet.").wait_for(timeout=120_000)
    assert page.locator("#made").inner_text().count("slice") >= 1
    page.get_by_text("Layer by layer", exact=True).click()
    assert page.locator("#layers tbody tr").count() == 2
    page.get_by_role("button", name="Verify").click()
    page.wait_for_url(lambda url: not url.endswith(run))
    page.locator("#state", has_text=re.compile("^(succeeded|failed)")).wait_for(timeout=240_000)
    assert page.locator("#state").inner_text() == "succeeded", page.locator("#log").inner_text()
    page.locator("#result", has_text="matches").wait_for()
    result = httpx.get(f"{address}/v1/jobs/{page.url.rsplit('/', 1)[1]}/result").json()
    verdicts = page.locator("#result tbody tr td:nth-child(6)").all_inner_texts()
    assert verdicts == ["" if check["bound"] is None else "pass" for check in result["checks"]]
    shoot(page, "verify")
    check_accessible(page)
    page = open_page(f"/runs/{run}")
    page.locator("#checked", has_text="checks pass").wait_for(timeout=30_000)
    shoot(page, "conversion")
    check_accessible(page)
    page = open_page("/models")
    row = page.locator("#models tr", has_text="slices")
    assert "checks pass" in row.inner_text()


def test_values_are_read_as_yaml_reads_them(open_page: Pages) -> None:
    page = open_page("/new")
    texts = (
        "7", "-3", "1.5", "1.0e-4", "2_000", "true", "null", "word", "every:3", "two words", "[a, b]", "[]", "{}",
        "[1, [2, x], {a: 1}]", "{source: new text, weight: 0.75}", "'quoted: [x]'", '"a \\"b\\" c"', "/a/b-c.txt",
        "[/a/b.txt, python-docs]", "s3://bucket/model",
    )  # fmt: skip
    read = "async text => (await import('/assets/values.js')).parsed(text)"
    assert [page.evaluate(read, text) for text in texts] == [yaml.safe_load(text) for text in texts]
    for wrong in ("[a", "{a b}", "'open", "[a] b", "{a: 1"):
        with pytest.raises(PlaywrightError, match=r"missing|left over"):
            page.evaluate(read, wrong)


def test_long_lists_are_paged_and_sorted(open_page: Pages, address: str, finished: str) -> None:
    for i in range(60):
        job = {"kind": "evaluate", "folder": f"missing/{i}"}
        body = {"job": job, "name": f"paged {i:02d}", "priority": -5}
        run = httpx.post(f"{address}/v1/jobs", json=body).raise_for_status().json()["id"]
        httpx.post(f"{address}/v1/jobs/{run}/cancel").raise_for_status()
    page = open_page("/?search=paged")
    names = page.locator("#runs a")
    page.get_by_text("1 to 50 of 60").wait_for()
    assert names.first.inner_text() == "paged 59"
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator("#runs tr:first-child a", has_text="paged 00").wait_for()
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Run")
    page.get_by_role("button", name="Next").click()
    page.get_by_text("51 to 60 of 60").wait_for()
    assert names.all_inner_texts() == [f"paged {i}" for i in range(50, 60)]
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_role("button", name="Previous").click()
    page.get_by_text("1 to 50 of 60").wait_for()
    page.reload()
    page.locator("#runs tr:first-child a", has_text="paged 00").wait_for()  # the address keeps what was asked for


@pytest.mark.parametrize("path", ["/", "/new", "/models", "/compare?runs=RUN,RUN", "/runs/RUN", "/login"])
def test_pages_fit_a_phone_in_dark_mode(open_page: Pages, finished: str, path: str) -> None:
    page = open_page(
        path.replace("RUN", finished), viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
    )
    page.wait_for_timeout(1000)
    if "RUN" in path:
        page.locator("#heldout .main-svg").first.wait_for(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shoot(page, "phone" + path.split("?")[0].replace(finished, "").replace("/", "-").replace("RUN", "run"))
    check_accessible(page)


def test_the_list_is_searched_and_opened_by_keyboard(open_page: Pages, finished: str) -> None:
    page = open_page("/?kind=train")
    page.get_by_role("link", name="from the form").wait_for()
    shoot(page, "runs")
    check_accessible(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("Search").focus()
    page.keyboard.type("no run is called so")
    page.get_by_text("No run is like that").wait_for()
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
    """The least of three attempts: another process may have the core in one of them."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for path in ("/", "/new", "/assets/runs.js", "/assets/style.css"):
            assert httpx.get(address + path).status_code == 200
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 5
