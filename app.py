"""A page in the browser, from photos to a LoRA, for people who do not type commands.

It starts the same scripts as processes of their own, shows each command, and reads what they write. A training goes on
when the browser is closed and when this program ends; started again, it shows the training where it is by then.

    pip install -r requirements-app.txt
    python app.py
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from collections.abc import Iterator
from dataclasses import dataclass, field

from sd3_lora.common.command_line import CommandLine, UserError, require_right

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class PageFlags:
    """Where the page is."""

    output_dir: str = field(default="outputs/app", metadata={"help": "Folder of the projects."})
    port: int = field(default=7860, metadata={"help": "Of the page."})
    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "Address to listen at. Any other than this machine's own lets others in, without a password."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 < self.port < 65536:
            yield f"--port {self.port} must be between 1 and 65535"
        if not self.host or self.host.startswith("-"):
            yield "--host is empty: type an address, or leave it out"


COMMAND_LINE = CommandLine("app.py", __doc__, (PageFlags,))
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import html
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import wraps
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import quote

from sd3_lora.common.command_line import counted, exit_code, require_writable_folder
from sd3_lora.projects.job import Job
from sd3_lora.projects.photos import MOST_MEGABYTES, MOST_PHOTOS, Upload
from sd3_lora.projects.project import MOST_DRAWN, Picture, Project, typed
from sd3_lora.projects.settings import MODELS, RESOLUTIONS, Settings
from sd3_lora.stage_one.image_files import RASTER_EXTENSIONS

INSTALL = "pip install -r requirements-app.txt"
REFRESH_S = 2.0
MOST_LINES = 14  # of a log that are shown
DROP_HERE = f"Drop photos here (up to {MOST_PHOTOS})"
STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
CSS = """
.gradio-container {width: 100% !important; max-width: 1080px !important; margin: 0 auto !important;}
#title h1 {margin: 0.2em 0 0;}
#title p {margin: 0; color: var(--body-text-color-subdued);}
.log textarea, .command textarea {font-family: ui-monospace, monospace; font-size: 0.82rem;}
.status {font-size: 1.05rem;}
.pictures .grid-wrap {height: auto !important; max-height: none !important; min-height: 0 !important;
  overflow: visible !important; padding-top: 2.2rem;}
.pictures .grid-container {grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)) !important;}
.pictures .thumbnail-lg {display: flex; flex-direction: column; height: auto; aspect-ratio: auto;}
.pictures .thumbnail-lg > img {width: 100%; height: auto; aspect-ratio: 1; object-fit: cover;}
.pictures .thumbnail-lg > .caption-label {
  position: static; width: 100%; max-width: none; border: 0; border-radius: 0; padding: 0.35rem 0.5rem;
  text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: 0.78rem; line-height: 1.3;}
#files li {margin: 0.4rem 0;}
#files a {color: var(--link-text-color); text-decoration: underline; overflow-wrap: anywhere;}
#create {align-self: end; margin-bottom: 0.6rem;}
footer {display: none !important;}
"""
# The project's name in the address, so that the page opens it again.
REMEMBER = "(name) => { if (name) history.replaceState(null, '', '?project=' + encodeURIComponent(name)); return name }"


def spoken(handler: Callable[..., dict]) -> Callable[..., dict]:
    """A handler whose errors are shown as the sentences that they are, and change nothing on the page."""

    @wraps(handler)
    def told(page: Page, *values: Any) -> dict:
        import gradio as gr

        try:
            return handler(page, *values)
        except UserError as error:
            gr.Warning(html.escape(str(error)), duration=None, title="Not yet")
            return {page.nothing: None}

    return told


class Page:
    """The page: its controls from top to bottom, what each of them does, and how they are connected.

    It keeps nothing but the controls: what a visitor looks at is in the visitor's own `gr.State`, all else in files.

    Args:
        root: the folder of all projects.
    """

    def __init__(self, root: Path):
        import gradio as gr

        self.gr, self.root = gr, root
        with gr.Blocks(
            title="SD3 LoRA", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
        ) as self.blocks:
            self.name, self.nothing = gr.State(""), gr.State()  # the project looked at
            self.planned = gr.State(None)  # settings whose plan was shown
            self.seen = gr.State({})  # what the browser has already, so that pictures do not flicker
            self._header()
            with gr.Tabs():
                with gr.Tab("1 Photos"):
                    self._photos()
                with gr.Tab("2 Subject"):
                    self._subject()
                with gr.Tab("3 Train"):
                    self._train()
                with gr.Tab("4 Try"):
                    self._try()
            self._connect()

    # The controls.

    def _header(self) -> None:
        gr = self.gr
        gr.Markdown(
            "# Your subject in Stable Diffusion 3\nFrom a few photos to a LoRA, on this machine.", elem_id="title"
        )
        with gr.Row():
            self.choice = gr.Dropdown([], label="Project", info="Everything is kept in its folder.")
            self.new_name = gr.Textbox(label="New project", info="A name of letters and digits.", max_length=40)
            self.create = gr.Button("Create", scale=0, min_width=110, size="md", elem_id="create")

    def _photos(self) -> None:
        gr = self.gr
        gr.Markdown("Five to ten photos of your subject, each from another side and before another background.")
        self.drop = gr.File(
            file_count="multiple",
            file_types=sorted(RASTER_EXTENSIONS),
            label=DROP_HERE,
            height=150,
        )
        self.crops = gr.Gallery(
            label="As training sees them", allow_preview=False, height="auto", elem_classes="pictures", buttons=[],
            interactive=False,
        )  # fmt: skip
        self.chosen = gr.State("")
        self.chosen_title = gr.Markdown("Choose a photo above to write its caption.")
        self.caption = gr.Textbox(
            label="Caption", lines=2, interactive=False, max_length=1000,
            info="Everything that is not your subject, with the rare word for it: a photo of sks dog on a red sofa",
        )  # fmt: skip
        with gr.Row():
            self.save_caption = gr.Button("Save caption", interactive=False, size="md")
            self.remove = gr.Button("Remove photo", variant="stop", interactive=False, size="md")
        gr.Markdown("Then name it: **2 Subject**, above.")

    def _subject(self) -> None:
        gr, default = self.gr, Settings()
        with gr.Row():
            identifier = gr.Textbox(
                default.identifier, label="Rare word", info="Names your subject alone.", max_length=40
            )
            subject = gr.Textbox(default.subject, label="Kind", info="What it is: dog, mug, robot.", max_length=80)
        self.prompt_line = gr.Markdown()
        model = gr.Dropdown(
            list(MODELS), value=default.model, label="Model", allow_custom_value=True,
            info="The miniature draws a small world of objects, at once and on any machine. Or the path of a folder.",
        )  # fmt: skip
        with gr.Row():
            budget = gr.Number(
                default.vram_budget_gib,
                label="GPU memory to use, GiB",
                info="0: what is free.",
                minimum=0,
                min_width=220,
            )
            resolution = gr.Dropdown(
                [("the model's own", 0), *((f"{side} px", side) for side in RESOLUTIONS if side)], value=0,
                label="Resolution", info="Side of the crops.", min_width=220,
            )  # fmt: skip
        with gr.Row():
            steps = gr.Number(default.max_train_steps, label="Steps", precision=0, minimum=1)
            photos = gr.Number(default.photos_per_step, label="Photos a step", precision=0, minimum=1)
            rank = gr.Number(default.rank, label="Rank of the LoRA", precision=0, minimum=1)
            seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
        drawn = gr.Textbox(label="Draw while training", info="Empty: the subject's prompt.", max_length=300)
        # In the order of the fields of Settings.
        self.settings = [identifier, subject, model, budget, resolution, steps, photos, rank, seed, drawn]
        self.plan = gr.Button("Show plan and time", variant="primary", size="md")
        self.plan_text = gr.Textbox(label="Plan", lines=6, max_lines=40, elem_classes="log", interactive=False)
        gr.Markdown("Then train: **3 Train**, above.")

    def _train(self) -> None:
        gr = self.gr
        self.status = gr.Markdown(elem_classes="status")
        with gr.Row():
            self.train = gr.Button("Train", variant="primary", interactive=False, size="md", min_width=80)
            self.stop = gr.Button("Stop", interactive=False, size="md", min_width=80)
            self.go_on = gr.Button("Go on", interactive=False, size="md", min_width=80)
        self.validation = gr.Gallery(
            label="Drawn on the way, the last step first", height="auto", elem_classes="pictures", interactive=False
        )
        self.log = gr.Textbox(label="The end of the log", lines=8, max_lines=80, elem_classes="log", interactive=False)
        self.commands = gr.Textbox(
            label="Commands", info="The same, typed in the folder of this program.", lines=3, max_lines=8,
            elem_classes="command", buttons=["copy"], interactive=False,
        )  # fmt: skip

    def _try(self) -> None:
        gr = self.gr
        self.run = gr.Dropdown([], label="LoRA of run")
        self.prompt = gr.Textbox(label="Prompt", max_length=1000, info="With the rare word, as in training.")
        self.strengths = gr.CheckboxGroup(
            [(f"{strength:g}", strength) for strength in STRENGTHS], value=[0, 0.5, 1],
            label="Strengths to compare", info="0 is without the LoRA. Up to six.",
        )  # fmt: skip
        with gr.Row():
            self.num_images = gr.Slider(1, MOST_DRAWN, 1, step=1, label="Pictures of each")
            self.draw_seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", size="md")
            self.stop_drawing = gr.Button("Stop", interactive=False, size="md", min_width=80)
        self.drawing_status = gr.Markdown(elem_classes="status")
        self.drawn = gr.Gallery(label="Drawn", height="auto", elem_classes="pictures", interactive=False)
        with gr.Accordion("Log and command", open=False):
            self.drawing_log = gr.Textbox(label="Log", lines=4, max_lines=80, elem_classes="log", interactive=False)
            self.drawing_command = gr.Textbox(
                label="Command", lines=2, elem_classes="command", buttons=["copy"], interactive=False
            )
        gr.Markdown(
            "### Take away\nThe LoRA, for ComfyUI's *Load LoRA*, diffusers and this program; and a second form, in "
            "kohya's names, for Forge and sd-scripts."
        )
        self.files = gr.HTML(elem_id="files")
        self.export = gr.Button("Write the second form (kohya)", size="md")

    # What they do. Each returns control → new value.

    def project(self, name: str) -> Project:
        """The project of this name, which must be there: a name that is none makes no folder.

        Raises:
            UserError: there is none.
        """
        if name not in Project.names(self.root):
            raise UserError("choose a project above, or create one")
        return Project.named(self.root, name)

    def visit(self, request: Any) -> dict:
        """The page was opened: the project in its address, or the only one."""
        names = Project.names(self.root)
        asked = request.query_params.get("project", "") if request else ""
        name = asked if asked in names else names[0] if len(names) == 1 else ""
        shown = {self.choice: self.gr.update(choices=names, value=name or None)}
        return {**shown, **(self._opened(name) if name else {})}

    @spoken
    def make(self, name: str, waiting: Sequence[str] | None) -> dict:
        project = Project.named(self.root, name)
        choice = self.gr.update(choices=Project.names(self.root), value=project.name)
        return {self.choice: choice, self.new_name: "", **self._opened_with(project.name, waiting)}

    @spoken
    def open(self, name: str | None, waiting: Sequence[str] | None) -> dict:
        return self._opened_with(self.project(name or "").name, waiting)

    def _opened_with(self, name: str, waiting: Sequence[str] | None) -> dict:
        """With the photos that were dropped before a project was chosen."""
        return {**(self.add(name, waiting) if waiting else {}), **self._opened(name)}

    def _opened(self, name: str) -> dict:
        settings = self.project(name).settings
        values = dict(zip(self.settings, asdict(settings).values(), strict=True))
        prompt = {self.prompt: settings.drawn_prompt}
        return {
            self.name: name,
            self.planned: None,
            self.plan_text: "",
            **values,
            **prompt,
            **self._shown_photos(name),
            **self._news(name, {}),
        }

    @spoken
    def add(self, name: str, paths: Sequence[str] | None) -> dict:
        """Takes what was dropped. Without a project it waits in the field for `make` or `open`, and is told to wait."""
        if name not in Project.names(self.root):
            wait = f"{counted(len(paths or ()), 'photo')} to be added: choose a project above, or create one"
            self.gr.Info(f"They wait here: {wait}.", duration=None, title="Not yet")
            return {self.drop: self.gr.update(label=wait)}
        uploads = [Upload(Path(path), Path(path).name) for path in paths or ()]
        project = self.project(name)
        _, refused = project.photos.add(uploads)
        if refused:
            lines = refused[:8] + ([f"and {len(refused) - 8} more"] if len(refused) > 8 else [])
            self.gr.Warning("<br>".join(map(html.escape, lines)), duration=None, title="Not taken")
        empty = self.gr.update(value=None, label=DROP_HERE)
        return {self.drop: empty, self.planned: None, **self._shown_photos(name)}

    def _shown_photos(self, name: str) -> dict:
        project = self.project(name)
        try:
            size = project.size(project.settings)
        except UserError:  # a model's folder that is not there any more
            size = project.size(Settings())
        shown = [
            (str(project.photos.crop(path, size)), project.photos.caption(path.name) or "— the subject's prompt —")
            for path in project.photos.paths
        ]
        label = f"{counted(len(shown), 'photo')}, as training sees them ({size})"
        return {self.crops: self.gr.update(value=shown, label=label, selected_index=None), **self._choose(name, "")}

    def _choose(self, name: str, photo: str) -> dict:
        is_on, update = bool(photo), self.gr.update
        return {
            self.chosen: photo,
            self.chosen_title: f"**{photo}**" if is_on else "Choose a photo above to write its caption.",
            self.caption: update(value=self.project(name).photos.caption(photo) if is_on else "", interactive=is_on),
            self.save_caption: update(interactive=is_on),
            self.remove: update(interactive=is_on),
        }

    @spoken
    def select(self, name: str, index: int) -> dict:
        paths = self.project(name).photos.paths
        if index >= len(paths):
            raise UserError("the photos have changed: choose again")
        return self._choose(name, paths[index].name)

    @spoken
    def write_caption(self, name: str, photo: str, text: str) -> dict:
        self.project(name).photos.write_caption(photo, text)
        return {**self._shown_photos(name), **self._choose(name, photo)}

    @spoken
    def remove_photo(self, name: str, photo: str) -> dict:
        self.project(name).photos.remove(photo)
        return self._shown_photos(name)

    def changed(self, *values: Any) -> dict:
        """A setting was changed: the plan that is shown is none of it."""
        prompt = f"Photos without a caption are trained with: **{_settings(values).instance_prompt}**"
        return {self.planned: None, self.train: self.gr.update(interactive=False), self.prompt_line: prompt}

    @spoken
    def show_plan(self, name: str, *values: Any) -> dict:
        project, settings = self.project(name), _settings(values)
        project.save(settings)
        command = typed(project.plan_command(settings))
        text = f"{project.plan(settings)}\n\n$ {command}"
        ready = self.gr.update(interactive=project.busy is None)
        prompt = {self.prompt: settings.drawn_prompt}
        return {
            self.plan_text: text,
            self.planned: asdict(settings),
            self.train: ready,
            **prompt,
            **self._shown_photos(name),
        }

    @spoken
    def start(self, name: str, planned: dict | None, *values: Any) -> dict:
        settings = _settings(values)
        if planned != asdict(settings):
            raise UserError("the settings have changed since the plan was shown: show it again")
        self.project(name).train(settings)
        return {self.planned: None, self.train: self.gr.update(interactive=False), **self._news(name, {})}

    @spoken
    def resume(self, name: str) -> dict:
        project = self.project(name)
        project.go_on(project.last_run())
        return self._news(name, {})

    @spoken
    def end(self, name: str) -> dict:
        busy = self.project(name).busy
        if busy is not None:
            busy.stop()
            self.gr.Info("It ends its step, saves a checkpoint, and can go on from there.")
        return self._news(name, {})

    @spoken
    def draw_pictures(
        self, name: str, run: str, prompt: str, strengths: list[float], count: float, seed: float
    ) -> dict:
        project = self.project(name)
        project.draw(project.run(run or ""), prompt, sorted(strengths), int(count), int(seed or 0))
        return self._news(name, {})

    @spoken
    def write_export(self, name: str, run: str) -> dict:
        project = self.project(name)
        job = project.export(project.run(run or ""))
        if job.wait(120) != "finished":
            raise UserError(job.last_sentence)
        return self._news(name, {})

    def refresh(self, name: str, seen: dict) -> dict:
        """What has changed since the browser asked last."""
        if name not in Project.names(self.root):
            return {self.nothing: None}
        return self._news(name, seen)

    def _news(self, name: str, seen: dict) -> dict:
        project, update = self.project(name), self.gr.update
        runs, drawings, busy = project.runs, project.drawings, project.busy
        run, drawing = (jobs[-1] if jobs else None for jobs in (runs, drawings))
        finished = [run.folder.name for run in runs if project.lora(run)]
        pictures = project.validation_pictures(run) if run else []
        drawn = project.drawn_pictures(drawing) if drawing else []
        downloads = [path for each in runs for path in project.downloads(each)]
        values: dict[Any, Any] = {
            self.status: _status(project, run),
            self.log: _last_lines(run),
            self.commands: _typed(run),
            self.drawing_status: f"{drawing.state}: drawing {drawing.folder.name}" if drawing else "",
            self.drawing_log: _last_lines(drawing),
            self.drawing_command: _typed(drawing),
            self.validation: _shown(pictures),
            self.drawn: _shown(drawn),
            self.files: _links(downloads),
            self.run: (finished, finished[-1] if finished else None),
            self.stop: busy is not None,
            self.stop_drawing: busy is not None,
            self.go_on: bool(run) and busy is None and project.can_go_on(run),
        }
        news = {key: value for key, value in values.items() if seen.get(str(key._id), "") != value}
        seen_now = {str(key._id): value for key, value in values.items()}
        for key in (self.stop, self.stop_drawing, self.go_on):
            if key in news:
                news[key] = update(interactive=news[key])
        if self.run in news:
            news[self.run] = update(choices=finished, value=values[self.run][1])
        return {**news, self.seen: seen_now}

    # How they are connected.

    def _connect(self) -> None:
        everything = self._outputs()
        name, settings = self.name, self.settings

        def on(event: Callable[..., Any], handler: Callable[..., dict], inputs: Sequence[Any] = (), **more: Any) -> Any:
            return event(handler, list(inputs), everything, api_visibility="private", **more)

        def visit(request: self.gr.Request) -> dict:  # type: ignore[name-defined]
            return self.visit(request)

        def select(name: str, event: self.gr.SelectData) -> dict:  # type: ignore[name-defined]
            return self.select(name, event.index)

        visit.__annotations__["request"], select.__annotations__["event"] = self.gr.Request, self.gr.SelectData
        on(self.blocks.load, visit)
        for event in (self.create.click, self.new_name.submit):
            on(event, self.make, [self.new_name, self.drop])
        on(self.choice.input, self.open, [self.choice, self.drop])
        self.choice.change(None, [self.choice], None, js=REMEMBER, api_visibility="private")
        on(self.drop.upload, self.add, [name, self.drop])
        on(self.crops.select, select, [name])
        for event in (self.save_caption.click, self.caption.submit):
            on(event, self.write_caption, [name, self.chosen, self.caption])
        on(self.remove.click, self.remove_photo, [name, self.chosen])
        for control in settings:
            on(control.change, self.changed, settings, show_progress="hidden")
        on(self.plan.click, self.show_plan, [name, *settings])
        on(self.train.click, self.start, [name, self.planned, *settings])
        on(self.go_on.click, self.resume, [name])
        for button in (self.stop, self.stop_drawing):
            on(button.click, self.end, [name])
        shown = [self.run, self.prompt, self.strengths, self.num_images, self.draw_seed]
        on(self.draw.click, self.draw_pictures, [name, *shown])
        on(self.export.click, self.write_export, [name, self.run])
        on(self.gr.Timer(REFRESH_S).tick, self.refresh, [name, self.seen], show_progress="hidden")

    def _outputs(self) -> list[Any]:
        """All controls that a handler may change."""
        return [
            value for value in vars(self).values() if isinstance(value, self.gr.components.Component)
        ] + self.settings


def _settings(values: Sequence[Any]) -> Settings:
    """The settings of the controls' values; an emptied number is its default."""
    by_name = zip((each.name for each in fields(Settings)), values, strict=True)
    return Settings.of({name: value for name, value in by_name if value is not None})


def _status(project: Project, run: Job | None) -> str:
    """How far the last training is, and what comes next."""
    if run is None:
        return "Nothing was trained yet: show the plan first, in **2 Subject**, above."
    sentence = project.progress(run).sentence
    if run.state == "finished" and project.lora(run):
        return f"{sentence}\n\nThen draw with it, and take it away: **4 Try**, above."
    return f"{sentence}\n\nGo on: it begins where it stopped." if project.can_go_on(run) else sentence


def _last_lines(job: Job | None) -> str:
    """Of a job's log; of its commands, which are shown beside it, the beginnings."""
    lines = job.log().splitlines()[-MOST_LINES:] if job else []
    return "\n".join(shorten(line, 60, placeholder=" …") if line.startswith("$ ") else line for line in lines)


def _typed(job: Job | None) -> str:
    return "\n".join(map(typed, job.commands)) if job else ""


def _links(paths: Sequence[Path]) -> str:
    """A list of files to be downloaded."""
    lines = [
        f'<li><a href="gradio_api/file={quote(path.as_posix())}" download="{html.escape(path.name)}">'
        f"{html.escape(path.name)}</a> <small>{path.stat().st_size / 1e6:.1f} MB</small></li>"
        for path in paths
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing yet: a run leaves its LoRA here when it ends.</p>"


def _shown(pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    return [(str(picture.path), picture.caption) for picture in pictures]


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    (flags,) = COMMAND_LINE.parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the page needs Gradio: type `{INSTALL}`")
    root = Path(flags.output_dir).resolve()
    require_writable_folder(root)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".uploads")  # not the system's, which others read
    if flags.host not in LOOPBACK:
        print(f"warning: at {flags.host} whoever reaches this machine can train on it and read all projects")
    launch(Page(root), flags)


def launch(page: Page, flags: PageFlags) -> None:
    """Serves the page until Ctrl-C; jobs go on without it."""
    gr = page.gr
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=system, font_mono=["ui-monospace", "monospace"]
    )
    try:
        page.blocks.queue(default_concurrency_limit=8).launch(
            server_name=flags.host, server_port=flags.port, share=False, inbrowser=False, quiet=True, show_error=True,
            allowed_paths=[str(page.root)], max_file_size=f"{MOST_MEGABYTES}mb", ssr_mode=False, footer_links=[],
            enable_monitoring=False, mcp_server=False, pwa=False, theme=theme, css=CSS, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {flags.port} is taken ({error}): type --port {flags.port + 1}") from error
    print(f"open http://{flags.host}:{flags.port} in a browser; Ctrl-C ends this page, and no training", flush=True)
    try:
        while True:  # a wait without an end would keep Ctrl-C out on Windows
            time.sleep(1)
    finally:
        page.blocks.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the page; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
