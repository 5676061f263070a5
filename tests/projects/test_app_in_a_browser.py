"""The page in headless Chromium, from photos to a downloaded LoRA of the miniature; skipped by name where Gradio,
playwright or Chromium is missing.

apt install chromium && pip install playwright -r requirements-app.txt
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
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
from sd3_lora.projects.settings import Settings

import pytest
from conftest import PROJECT, save_pictures
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")
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
            self.page.get_by_text(re.compile(r"\d+ photos?, as training sees them")).wait_for()  # it is opened

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


def test_from_photos_to_a_downloaded_lora(browser: Any, served: Served, tmp_path: Path) -> None:
    with Tab(browser, served) as tab:
        tab.make("robot")
        tab.drop(ROBOT)
        tab.page.get_by_text("5 photos, as training sees them (128x128)").wait_for()
        tab.page.locator(".pictures .thumbnail-item").first.click()
        tab.page.get_by_text("01.png").wait_for()
        tab.fill(Caption="a photo of sks robot on yellow")
        tab.press("Save caption")
        tab.page.locator(".caption-label", has_text="on yellow").wait_for()
        tab.show(3)
        assert not tab.is_on("Train")  # before its plan was shown
        tab.show(2)
        tab.fill(Kind="robot", Steps="400", Photos_a_step="1")
        assert "predicted peak" in tab.plan()
        tab.show(3)
        tab.press("Train")
        tab.status("running")
    project = Project(served.root / "robot")
    (run,) = project.runs
    # The browser is closed, and the page's program ends: the training goes on.
    served.end(signal.SIGTERM)
    deadline = time.monotonic() + WAIT_MS / 1000
    while project.progress(run).step < 10:
        assert run.state == "running", run.log()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    served.start()
    with Tab(browser, served, "robot") as tab:
        tab.show(3)
        assert "running: step" in tab.status("running")
        assert not tab.is_on("Train")
        tab.page.locator(".pictures:visible .caption-label", has_text="step 0").wait_for()
        tab.press("Stop")
        assert "Go on" in tab.status("stopped: step")
        stopped_at = project.progress(run).step
        assert 10 <= stopped_at < 400
        shorten_run(run.folder, stopped_at + 5)
        tab.press("Go on")
        assert "4 Try" in tab.status("finished: step")  # where to go next
        assert "resumed from" in run.log()
        texts = [area.input_value() for area in tab.page.locator("textarea:visible").all()]
        assert any("python train_dreambooth_sd3_lora_miniature.py" in text for text in texts), texts
        assert any("pytorch_lora_weights.safetensors, read back" in text for text in texts)  # the end of the log
        draw_and_take(tab, project, tmp_path)
        assert [each for each in tab.complaints if each != "Method not implemented."] == []
        assert TOKEN not in tab.page.content()
    assert not any(TOKEN.encode() in path.read_bytes() for path in served.root.rglob("*") if path.is_file())


def shorten_run(folder: Path, steps: int) -> None:
    """A few steps more are enough for a test; --max_train_steps may be changed between two parts of a run."""
    path = folder / "job.json"
    path.write_text(path.read_text().replace('"400"', f'"{steps}"'))


def draw_and_take(tab: Tab, project: Project, folder: Path) -> None:
    tab.show(4)
    assert tab.value("Prompt") == "a photo of sks robot"
    tab.page.get_by_label("0.5", exact=True).uncheck()
    tab.press("Draw")
    tab.status("finished: drawing")
    tab.page.locator(".pictures:visible .caption-label", has_text="strength 1").wait_for()
    (drawing,) = project.drawings
    assert [picture.caption for picture in project.drawn_pictures(drawing)] == [
        "strength 0 · a photo of sks robot", "strength 1 · a photo of sks robot",
    ]  # fmt: skip
    tab.press("Write the second form")
    for name in ("robot-01.safetensors", "robot-01-kohya.safetensors"):
        with tab.page.expect_download() as download:
            tab.page.get_by_role("link", name=name).click()
        download.value.save_as(folder / name)
        assert load_file(folder / name)
    lora = project.lora(project.last_run())
    assert lora
    assert (folder / "robot-01.safetensors").read_bytes() == lora.read_bytes()


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


def test_a_scripts_sentence_is_shown_as_it_is(browser: Any, served: Served, project: Project) -> None:
    folder = served.root.parent / "<b>no model"
    folder.mkdir(exist_ok=True)
    project.save(Settings(model=str(folder), max_train_steps=3))
    with Tab(browser, served, project.name) as tab:
        tab.show(2)
        tab.until(lambda: tab.value("Steps") == "3")  # the project's own settings have come
        tab.press("Show plan and time")
        tab.page.get_by_text(f"{folder} has no model_index.json: give the folder of a diffusers SD3").wait_for()


def test_what_is_no_picture_is_refused_by_name(browser: Any, served: Served, tmp_path: Path) -> None:
    bad = tmp_path / "not <i>a picture.png"
    bad.write_text("no")
    with Tab(browser, served) as tab:
        tab.make("refused")
        tab.drop([ROBOT[0], bad])
        tab.page.get_by_text("does not decode (not a picture in a known format)").wait_for()
        tab.page.get_by_text("1 photo,").wait_for()
    assert len(Project(served.root / "refused").photos.paths) == 1


@pytest.mark.parametrize("is_there", [False, True], ids=["created", "chosen"])
def test_photos_dropped_before_a_project_wait_for_it(browser: Any, served: Served, is_there: bool) -> None:
    """They are neither lost nor taken twice, and the page says what they wait for."""
    name = f"waiting{int(is_there)}"
    if is_there:
        Project.named(served.root, name)
    Project.named(served.root, "another")  # one project alone would be opened at once
    Project.named(served.root, "third")
    with Tab(browser, served) as tab:
        tab.drop(ROBOT[:3])
        tab.page.get_by_text("3 photos to be added: choose a project above, or create one").first.wait_for()
        if is_there:
            tab.control("Project").click()
            tab.page.get_by_role("option", name=name).click()
        else:
            tab.make(name)
        tab.page.get_by_text("3 photos, as training sees them").wait_for()
        tab.drop(ROBOT[3:4])
        tab.page.get_by_text("4 photos, as training sees them").wait_for()
    assert len(Project(served.root / name).photos.paths) == 4
    assert not Project(served.root / "another").photos.paths


def test_fifty_photos_at_once_from_two_tabs(browser: Any, served: Served, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path / "fifty", [(64, 64)] * 50)
    with Tab(browser, served) as tab:
        tab.make("fifty")
        with Tab(browser, served, "fifty") as other:
            tab.drop(paths[:30])
            other.drop(paths[20:])
            photos = Project(served.root / "fifty").photos
            tab.until(lambda: len(photos.paths) == 50)  # ten came from both
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


def test_an_upload_that_is_too_large_is_refused(served: Served) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + b"0" * 60_000_000
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.URLError) as refused:
        urllib.request.urlopen(urllib.request.Request(served.url + "/gradio_api/upload", body, headers))
    assert getattr(refused.value, "code", 413) == 413  # or the connection is closed before all of it was sent
    assert urllib.request.urlopen(served.url).status == 200


def test_a_name_with_a_path_in_it_is_uploaded_into_its_folder(served: Served) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../../x.png"\r\n\r\nno\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = urllib.request.urlopen(urllib.request.Request(served.url + "/gradio_api/upload", body, headers))
    (path,) = json.loads(answer.read())
    assert Path(path).resolve().is_relative_to(served.root / ".uploads")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_its_window_and_follows_the_systems_colours(
    browser: Any, served: Served, project: Project, scheme: str, width: int
) -> None:
    with Tab(browser, served, project.name, viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
        for number in (1, 2, 3, 4):
            tab.show(number)
            assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == (scheme == "dark")
        assert [each for each in tab.complaints if each != "Method not implemented."] == []
