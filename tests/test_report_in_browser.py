"""The report of a real small run in headless Chromium: charts, keyboard, contrast, names as text, no request, no error.

Without a browser, or without playwright, these tests are skipped: the page was then not looked at.
"""

import json
import shutil

import pytest

from conftest import SMALL_STUDENT
from report_runs import crossing_rows, write_benchmark
from vit_linearizer.commands.distill import DistillConfig, distill
from vit_linearizer.commands.report import ReportConfig, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page was not checked")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core here: the page was not checked")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page was not checked in a browser")

HOSTILE = "<img src=x onerror=alert(1)>"
SIZES = {"phone": {"width": 375, "height": 800}, "desktop": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, photos, small_teacher):
    """The report of two real runs, one of a hostile name, with a benchmark and accuracies beside them."""
    folder = tmp_path_factory.mktemp("report")
    runs = [folder / HOSTILE, folder / "baseline"]
    weights = {"activation_matching_weight": 0.0, "masked_prediction_weight": 0.0, "feature_regression_weight": 1.0}
    for run in runs:
        settings = dict(
            teacher=str(small_teacher),
            student="adventurer_tiny_patch16_224",
            student_args=tuple(f"{name}={value}" for name, value in SMALL_STUDENT.items()),
            data=str(photos),
            out=str(run),
            epochs=3,
            batch_size=4,
            learning_rate=1e-3,
            device="cpu",
            precision="fp32",
            log_every=1,
            **(weights if run is runs[1] else {}),
        )
        distill(DistillConfig(**settings))
    write_benchmark(folder, crossing_rows(str(runs[1]), str(runs[0])))
    (folder / "quickstart.json").write_text(json.dumps({HOSTILE: {"knn": 90.0}, "baseline": {"knn": 80.0}}))
    return report(ReportConfig(runs=(str(folder),)))


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, page_file):
    """Opens the page; keyword arguments are the browser context's. Fails on any error, message, dialogue or request."""
    contexts, troubles = [], []

    def open_page(**settings):
        context = chromium.new_context(**{"viewport": SIZES["desktop"], **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: troubles.append(request.url) if not is_own(request.url) else None)
        page.goto(page_file.as_uri())
        return page

    def is_own(url):
        return url == page_file.as_uri() or url.startswith("data:")

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def until(page, expression):
    """Wait for an expression to hold; playwright's own way evaluates text in the page, which its policy forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")


def open_everything(page):
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    until(page, "[...document.querySelectorAll('.chart')].every((one) => one.querySelector('.main-svg'))")


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desktop", "dark")])
def test_every_chart_is_drawn_and_axe_finds_nothing_serious(opened, tmp_path, size, scheme):
    page = opened(viewport=SIZES[size], color_scheme=scheme)
    open_everything(page)
    page.screenshot(path=tmp_path / f"{size}-{scheme}.png", full_page=True)
    charts = page.evaluate(
        """[...document.querySelectorAll(".chart")].map((chart) => ({
            wanted: JSON.parse(document.getElementById(chart.id + "-data").textContent).data.length,
            drawn: chart.querySelectorAll(".scatterlayer .trace").length,
            fits: chart.querySelector(".main-svg").getBoundingClientRect().right <= innerWidth,
            text: getComputedStyle(chart.querySelector(".xtick text")).fill,
            name: chart.getAttribute("aria-label"),
        }))"""
    )
    assert len(charts) >= 6
    for chart in charts:
        assert chart["drawn"] == chart["wanted"] > 0
        assert chart["fits"] and chart["name"]
        assert chart["text"] == {"light": "rgb(28, 31, 35)", "dark": "rgb(232, 234, 236)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll in their own boxes
    violations = axe.Axe().run(page).response["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"][:200]) for one in violations if one["impact"] in ("serious", "critical")
    ] == []


def test_names_are_text_and_hovering_shows_values(opened):
    page = opened(reduced_motion="reduce")  # the page would still be scrolling when the mouse comes
    open_everything(page)
    assert page.locator("h3", has_text=HOSTILE).count() == 1
    assert page.locator(".legend text", has_text=HOSTILE).count() >= 1
    assert page.locator("img").count() == page.locator("img[src^='data:image/webp']").count() == 1
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 100)")
    chart = page.locator("#curves details[open] .chart").first
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .legend text")
    assert "loss, training : " in page.locator(".hoverlayer", has_text="step").first.text_content()


def test_the_keyboard_reaches_everything(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")  # and it comes into sight
    seen = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.closest('nav, summary, .scroll')?.tagName"))
    assert {"NAV", "SUMMARY", "DIV"} <= seen
    closed = page.locator("details.values summary").first
    closed.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.values").first.get_attribute("open") is not None


def test_without_scripts_the_page_still_says_everything(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".chart:visible").count() == 0
    page.locator("details.values summary").first.click()
    assert page.locator("details.values table").first.is_visible()
    assert page.locator("#answer strong").count() == 3
    assert "448x448" in page.locator("#answer").text_content()


def test_colours_follow_the_system_and_paper_is_light(opened, tmp_path):
    page = opened(color_scheme="light")
    dark = "getComputedStyle(document.querySelector('.chart .xtick text')).fill === 'rgb(232, 234, 236)'"
    page.wait_for_selector(".chart .xtick text")
    assert not page.evaluate(dark)
    page.emulate_media(color_scheme="dark")
    until(page, dark)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    until(page, "getComputedStyle(document.querySelector('.chart .xtick text')).fill === 'rgb(0, 0, 0)'")
    widths = page.evaluate("[...document.querySelectorAll('.chart .main-svg')].map((one) => one.clientWidth)")
    assert widths and max(widths) <= 640  # of a page of A4 or Letter
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="dark")
    until(page, dark)
