"""The page in headless Chromium; skipped by name where Gradio,
playwright or Chromium is missing.

apt install chromium && pip install playwright -r requirements-app.txt
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.projects.photos import Upload
from sd3_lora.projects.project import Project

import pytest
from conftest import PROJECT, save_pictures

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed"),
]
TOKEN = "hf_" + "x" * 34
ROBOT = sorted(path for path in (PROJECT / "examples" / "robot").iterdir() if path.suffix in (".png", ".jpg"))
WAIT_MS = 180_000  # of a machine that does much else


@dataclass
class Served:
    """`python app.py`, which can be ended and started again at the same place."""

    root: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "--output_dir", str(self.root), "--port", str(self.port)],
            cwd=PROJECT,
            env={**os.environ, "HF_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        assert f"open {self.url} in a browser" in self.process.stdout.readline()

    def end(self, number: int = signal.SIGINT) -> str:
        assert self.process
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Served(tmp_path_factory.mktemp("app"), port)
    served.start()
    yield served
    assert served.end().strip() == "interrupted: run the same command again to go on"
    for name in Project.names(served.root):  # none, unless a test has failed
        if (busy := Project.named(served.root, name).busy) is not None:
            busy.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a window of its own; what it complained of, and asked of another address."""

    def __init__(self, browser: Any, served: Served, project: str = "", **more: Any):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **more})
        self.page, self.complaints = self.context.new_page(), list[str]()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, served.url))
        self.page.goto(f"{served.url}/?project={project}")
        self.page.get_by_label("New project").wait_for()
        if project:
            self.page.get_by_text("as training sees them").wait_for()

    def _note(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.complaints.append(url)

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def make(self, name: str) -> None:
        self.page.get_by_label("New project").fill(name)
        self.page.get_by_role("button", name="Create").click()
        self.page.wait_for_url(f"**/?project={name}")

    def drop(self, paths: list[Path]) -> None:
        self.page.locator("input[type=file]").first.set_input_files(paths)

    def show(self, number: int) -> None:
        self.page.get_by_role("tab", name=f"{number} ").click()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=re.compile(rf"^\s*{name}")).first  # of those that are seen

    def press(self, name: str) -> None:
        self.button(name).click()

    def is_on(self, name: str) -> bool:
        return bool(self.button(name).is_enabled())

    def value(self, label: str) -> str:
        return str(self.control(label).input_value())

    def control(self, label: str) -> Any:
        return self.page.get_by_label(re.compile(rf"^\s*{label}\b")).first  # a hint may follow the label

    def fill(self, **values: str) -> None:
        for label, value in values.items():
            self.control(label.replace("_", " ")).fill(value)
            self.page.keyboard.press("Tab")

    def plan(self) -> str:
        self.press("Show plan and time")
        self.until(lambda: "time: " in self.value("Plan"))
        return self.value("Plan")

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_MS / 1000
        while not is_so():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(200)

    def status(self, begins: str) -> str:
        found = self.page.locator(".status:visible", has_text=begins).first
        found.wait_for()
        return str(found.text_content())


@pytest.fixture
def project(served: Served, request: pytest.FixtureRequest) -> Project:
    """One with photos."""
    project = Project.named(served.root, request.node.name[:40])
    project.photos.add([Upload(path, path.name) for path in ROBOT[:2]])
    return project


def test_two_tabs_with_two_projects_do_not_mix(browser: Any, served: Served) -> None:
    with Tab(browser, served) as one, Tab(browser, served) as other:
        one.make("one")
        other.make("other")
        one.drop(ROBOT[:2])
        other.drop(ROBOT[:3])
        one.page.get_by_text("2 photos").wait_for()
        other.page.get_by_text("3 photos").wait_for()
        one.show(2)
        other.show(2)
        one.fill(Kind="mug", Steps="3")
        other.fill(Kind="lamp", Steps="4")
        assert "'a photo of sks mug'" in one.plan()
        assert "'a photo of sks lamp'" in other.plan()
    names = ("one", "other")
    assert [Project(served.root / name).settings.subject for name in names] == ["mug", "lamp"]
    assert [len(Project(served.root / name).photos.paths) for name in names] == [2, 3]
    with Tab(browser, served, "one") as again:
        again.show(2)
        assert (again.value("Kind"), again.value("Steps")) == ("mug", "3")


def test_what_was_planned_is_what_is_trained(browser: Any, served: Served, project: Project) -> None:
    with Tab(browser, served, project.name) as tab:
        tab.show(2)
        tab.fill(Steps="3")
        tab.plan()
        tab.fill(Steps="30000")
        tab.show(3)
        tab.until(lambda: not tab.is_on("Train"))
        tab.show(2)
        tab.press("Show plan and time")
        tab.page.get_by_text("max_train_steps must be between 1 and 20000").wait_for()
    assert project.runs == []


def test_what_is_no_picture_is_refused_by_name(browser: Any, served: Served, tmp_path: Path) -> None:
    bad = tmp_path / "not <i>a picture.png"
    bad.write_text("no")
    with Tab(browser, served) as tab:
        tab.make("refused")
        tab.drop([ROBOT[0], bad])
        tab.page.get_by_text("does not decode (not a picture in a known format)").wait_for()
        tab.page.get_by_text("1 photo,").wait_for()
    assert len(Project(served.root / "refused").photos.paths) == 1


def test_fifty_photos_at_once_from_two_tabs(browser: Any, served: Served, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path / "fifty", [(64, 64)] * 50)
    with Tab(browser, served) as tab:
        tab.make("fifty")
        with Tab(browser, served, "fifty") as other:
            tab.drop(paths[:30])
            other.drop(paths[20:])
            photos = Project(served.root / "fifty").photos
            tab.until(lambda: len(photos.paths) == 60)
    assert {path.read_bytes() for path in photos.paths} == {path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "{root}/../secret.txt", "{project}/app.py", "{root}/%2e%2e/secret.txt"]
)
def test_nothing_else_is_served(served: Served, path: str) -> None:
    (served.root.parent / "secret.txt").write_text("secret")
    asked = path.format(root=served.root, project=PROJECT)
    for prefix in ("/gradio_api/file=", "/file="):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(served.url + prefix + asked)
        assert refused.value.code in (403, 404)


def test_another_site_gets_nothing_from_a_visitors_browser(served: Served) -> None:
    """A page elsewhere that the visitor has open may not call this one."""
    request = urllib.request.Request(served.url + "/config", headers={"Origin": "https://example.com"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") is None


def test_a_name_with_a_path_in_it_is_uploaded_into_its_folder(served: Served) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../../x.png"\r\n\r\nno\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = urllib.request.urlopen(urllib.request.Request(served.url + "/gradio_api/upload", body, headers))
    (path,) = json.loads(answer.read())
    assert Path(path).resolve().is_relative_to(served.root / ".uploads")
