"""The report in headless Chromium, driven by playwright; skipped by name where one of them is missing.

apt install chromium && pip install playwright
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3_lora.reporting.page import write_report

import pytest
from conftest import PROJECT
from made_runs import make_run

CHARTS = ["loss", "levels", "subject", "class", "device", "host", "parts"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with everything, and long names, which a phone has no room for."""
    long = "a photo of sks dog " + "supercalifragilisticexpialidocious" * 3
    return write_report(make_run(tmp_path_factory.mktemp("run"), steps=120, captions=("a photo of sks dog", long)))


class Opened:
    """The report in a window; what it complained of and asked of a network."""

    def __init__(self, browser: Any, report: Path, width: int = 1100, **more: Any):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        self.page, self.complaints = self.context.new_page(), list[str]()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(report.as_uri())

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(request.url)

    def shown(self) -> list[str]:
        """Which validation pictures are seen, each by its step."""
        steps: list[str] = self.page.eval_on_selector_all(
            ".frame img", "all => all.filter(each => each.checkVisibility()).map(each => each.dataset.step)"
        )
        return steps

    def colour(self, selector: str, name: str) -> tuple[int, ...]:
        value = self.page.eval_on_selector(selector, f"each => getComputedStyle(each)['{name}']")
        return tuple(map(int, value.removeprefix("rgb(").removesuffix(")").split(",")))


@pytest.fixture
def opened(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    opened = Opened(browser, report, **getattr(request, "param", {}))
    yield opened
    opened.context.close()


def test_it_draws_all_and_asks_nothing_of_a_network(opened: Opened) -> None:
    drawn = opened.page.eval_on_selector_all(
        "[data-chart]",
        "all => all.map(each => [each.dataset.chart, each.querySelectorAll('path, circle, rect').length])",
    )
    assert [name for name, _ in drawn] == CHARTS
    assert all(marks for _, marks in drawn)
    dots = opened.page.eval_on_selector("[data-chart=loss]", "each => each.querySelectorAll('circle').length")
    assert dots == 120
    broken = "all => all.filter(each => !each.complete || !each.naturalWidth).length"
    assert opened.page.eval_on_selector_all("img", broken) == 0
    assert opened.complaints == []


def test_the_slider_is_moved_by_the_keyboard(opened: Opened) -> None:
    page = opened.page
    assert opened.shown() == ["60", "60"]
    page.locator("#step").focus()
    for key, step in (("ArrowLeft", "30"), ("Home", "0"), ("ArrowRight", "30"), ("End", "60")):
        page.keyboard.press(key)
        assert opened.shown() == [step, step]
        assert page.locator("#step-shown").text_content() == step
        assert page.locator("#step").get_attribute("aria-valuetext") == f"step {step}"
    assert opened.complaints == []


def test_the_keyboard_reaches_all_that_can_be_used(opened: Opened) -> None:
    page, reached = opened.page, set[str]()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.skip", "A.", "INPUT.", "SUMMARY.", "DIV.scroll", "PRE."} <= reached
    page.locator("#settings summary").focus()
    page.keyboard.press("Enter")
    assert page.locator(".facts.all").first.is_visible()


@pytest.mark.parametrize(
    ("opened", "is_dark"), [({"color_scheme": "dark"}, True), ({"color_scheme": "light"}, False)], indirect=["opened"]
)
def test_it_follows_the_systems_colours(opened: Opened, is_dark: bool) -> None:
    paper, ink = sum(opened.colour("body", "backgroundColor")), sum(opened.colour("body", "color"))
    axis = sum(opened.colour("[data-chart=loss] svg", "color"))
    assert (paper < 100 and ink > 600 and axis > 600) if is_dark else (paper > 700 and ink < 150 and axis < 150)


@pytest.mark.parametrize("opened", [{"width": 360, "has_touch": True, "is_mobile": True}], indirect=True)
def test_a_phone_has_room_for_it(opened: Opened) -> None:
    page = opened.page
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((each) => {
            const box = each.getBoundingClientRect();
            return box.width && box.right > 361 && !each.closest(".scroll, nav, svg, caption");
        }).map((each) => each.outerHTML.slice(0, 100))"""
    )
    assert beyond == []
    assert opened.complaints == []


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_the_last_pictures_and_all_numbers_are_there(opened: Opened) -> None:
    assert opened.page.locator(".frame img:not([hidden])").count() == 2
    assert opened.page.locator("#loss table").count() == 2
    assert opened.page.locator("#memory table tbody").count() == 3


def test_a_script_that_slips_in_does_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """Were something not escaped, the page's own policy would still stop it."""
    path = tmp_path / "report.html"
    path.write_text(report.read_text().replace("<main", "<script>document.title = 'in'</script><main", 1))
    opened = Opened(browser, path)
    assert opened.page.title() != "in"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.context.close()


@pytest.mark.parametrize("missing", ["run.json", "losses.jsonl", "early_warning.jsonl", "samples", "pictures.json"])
def test_it_draws_what_there_is(browser: Any, tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    opened = Opened(browser, write_report(folder))
    empty = "all => all.filter(each => !each.querySelector('svg')).map(each => each.dataset.chart)"
    assert opened.page.eval_on_selector_all("[data-chart]", empty) == []
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("work", ["adamw", "adam8bit"])
def test_it_draws_old_work(browser: Any, tmp_path: Path, work: str) -> None:
    folder = tmp_path / work
    shutil.copytree(PROJECT / "tests" / "data" / "cc752f5" / work, folder)
    opened = Opened(browser, write_report(folder))
    assert opened.page.locator("[data-chart=loss] circle").count() == 6
    assert opened.complaints == []
    opened.context.close()


def test_it_opens_in_a_second(browser: Any, tmp_path: Path) -> None:
    """500 steps, and 44 pictures that cannot be compressed; parsed, drawn and decoded. Five times that here."""
    prompts = tuple(f"prompt {number}" for number in range(4))
    folder = make_run(tmp_path, 500, prompts=prompts, drawn_at=tuple(range(0, 501, 50)), side=400, noise=400)
    opened = Opened(browser, write_report(folder))
    opened.page.wait_for_load_state("load")
    loaded = opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert loaded < 5000
    picture = opened.page.locator(".frame img:not([hidden])").first.get_attribute("src") or ""
    assert base64.b64decode(picture.partition(",")[2])[8:12] == b"WEBP"
    opened.context.close()
