"""`Project`: one subject's folder with its photos, settings, runs and pictures, and the commands that work on it.

    NAME/
        settings.json   photos/   crops/    what is asked, what is trained on, how it is cut
        stage_one/MODEL/                    embeddings and latents, kept from run to run
        runs/01/                            settings.json, a job's files, and lora/: the output folder of training
        drawings/01/                        a job's files, and pictures/
        exports/01/                         a job's files
        downloads/                          LoRAs under the project's name

All state is in these files. Any number of pages may look at it; one job works in it at a time.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError, command_words, counted, link_or_copy, quoted
from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.drawing.picture_metadata import read_settings
from sd3_lora.projects.estimate import Estimate, estimate
from sd3_lora.projects.job import Job
from sd3_lora.projects.names import safe_name
from sd3_lora.projects.photos import Photos
from sd3_lora.projects.settings import Settings
from sd3_lora.reporting.run_folder import RunFolder, read_run
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_exports import export_path

from filelock import FileLock

TRAIN, DRAW, EXPORT = "train", "draw", "export"
MOST_DRAWN, MOST_STRENGTHS = 8, 6  # pictures of a prompt, and strengths, of one drawing
_TRAINING_SCRIPT = "train_dreambooth_sd3_lora_miniature.py"
_NUMBERED = re.compile(r"\d+")
_PLAN_TIMEOUT_S = 600  # the first time a model's configuration may be downloaded


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn.

    Attributes:
        path: of the file.
        caption: its prompt, and its strength or step.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: of its job.
        step: optimizer steps taken.
        steps: that were asked for.
        loss: of the last steps, smoothed; None before the first.
        note: what else there is to say.
    """

    state: str
    step: int
    steps: int
    loss: float | None
    note: str = ""

    @property
    def sentence(self) -> str:
        """For people."""
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        note = f"; {self.note}" if self.note else ""
        return f"{self.state}: step {self.step} of {self.steps}{loss}{note}"


@dataclass(frozen=True)
class Project:
    """A subject's folder.

    Attributes:
        folder: of it.
    """

    folder: Path

    @classmethod
    def named(cls, root: Path, name: str) -> Project:
        """The project of this name in the folder of all projects; made where there is none.

        Raises:
            UserError: nothing of the name can be a folder's.
        """
        safe = safe_name(name)
        if not safe:
            raise UserError("the project has no name: type letters or digits")
        project = cls(root / safe)
        project.photos.folder.mkdir(parents=True, exist_ok=True)
        return project

    @classmethod
    def names(cls, root: Path) -> list[str]:
        """Of the projects in a folder."""
        if not root.is_dir():
            return []
        return sorted(path.name for path in root.iterdir() if (path / "photos").is_dir())

    @property
    def name(self) -> str:
        """Of the project."""
        return self.folder.name

    @property
    def photos(self) -> Photos:
        """What is trained on."""
        return Photos(self.folder / "photos", self.folder / "crops")

    @property
    def settings(self) -> Settings:
        """What is asked for the next run."""
        return Settings.read(self.folder / "settings.json")

    def save(self, settings: Settings) -> None:
        """Keeps what is asked for the next run, and for the page's next visit.

        Raises:
            UserError: something is wrong with it.
        """
        settings.require_right().save(self.folder / "settings.json")

    # What lies in it.

    @property
    def runs(self) -> list[Job]:
        """The trainings, oldest first."""
        return _numbered(self.folder / "runs")

    @property
    def drawings(self) -> list[Job]:
        """The drawings, oldest first."""
        return _numbered(self.folder / "drawings")

    @property
    def busy(self) -> Job | None:
        """The job at work, if there is one."""
        jobs = (*self.runs, *self.drawings, *_numbered(self.folder / "exports"))
        return next((job for job in jobs if job.state == "running"), None)

    def run(self, name: str) -> Job:
        """The training of this number.

        Raises:
            UserError: there is none.
        """
        for run in self.runs:
            if run.folder.name == name:
                return run
        raise UserError(f"there is no run {name or 'yet'}: train first")

    def last_run(self) -> Job:
        """The newest training.

        Raises:
            UserError: there is none.
        """
        runs = self.runs
        if not runs:
            raise UserError("nothing was trained yet: show the plan, then train")
        return runs[-1]

    def progress(self, run: Job) -> Progress:
        """How far a training is, from its files."""
        asked = Settings.read(run.folder / "settings.json").max_train_steps
        record = _read_run(output_dir(run))
        losses = [line.loss for line in record.losses[-20:]] if record else []
        step = record.steps if record else 0
        state, note = run.state, ""
        if state == "running" and run.at_work != _TRAINING_SCRIPT:
            note = f"first {run.at_work}" if run.at_work else "starting"
        elif state == "running" and run.time_left:
            note = f"{run.time_left} left"
        elif state == "failed":
            note = run.last_sentence
        return Progress(state, step, asked, sum(losses) / len(losses) if losses else None, note)

    def validation_pictures(self, run: Job) -> list[Picture]:
        """What a training drew on the way, the last step first."""
        record = _read_run(output_dir(run))
        folders = sorted(record.step_folders.items(), reverse=True) if record else _first_pictures(output_dir(run))
        return [Picture(path, f"step {step}") for step, folder in folders for path in sorted(folder.glob("*.png"))]

    def drawn_pictures(self, drawing: Job) -> list[Picture]:
        """What a drawing drew, those of one noise beside each other."""
        found = list[tuple[tuple, Picture]]()
        for path in sorted((drawing.folder / "pictures").rglob("*.png")):
            noted = read_settings(path)
            if noted is not None:
                scale = _strength(noted)
                key = (str(noted.get("prompt")), noted.get("image_index", 0), scale)
                found.append((key, Picture(path, f"strength {scale:g} · {noted.get('prompt')}")))
        return [picture for _, picture in sorted(found, key=lambda each: each[0])]

    def lora(self, run: Job) -> Path | None:
        """A training's LoRA, where it is finished."""
        path = output_dir(run) / LORA_FILE
        return path if path.is_file() else None

    def downloads(self, run: Job) -> list[Path]:
        """What there is to take away of a run: the LoRA under the project's name, its other form, the report."""
        lora, files = self.lora(run), list[Path]()
        if lora is None:
            return files
        for source, ending in (
            (lora, ".safetensors"),
            (export_path(lora, "kohya"), "-kohya.safetensors"),
            (lora.with_name("report.html"), "-report.html"),
        ):
            path = self.folder / "downloads" / f"{self.name}-{run.folder.name}{ending}"
            if source.is_file():
                if not path.is_file() or path.stat().st_mtime_ns < source.stat().st_mtime_ns:
                    path.unlink(missing_ok=True)
                    link_or_copy(source, path)
                files.append(path)
        return files

    # What works on it.

    def size(self, settings: Settings) -> PictureSize:
        """The size to which the photos are cropped.

        Raises:
            UserError: the model cannot take it, or is none.
        """
        return PictureSize.square(settings.model_files().resolution(settings.resolution or None))

    def training_commands(self, settings: Settings, run_folder: Path) -> list[list[str]]:
        """Stage one and training; where all of stage one is there, it ends at once. They go on where they stopped."""
        stage_one, subject = self._stage_one(settings), self._subject_flags(settings)
        latents = stage_one / f"latents-{settings.resolution or 'own'}"
        embeddings = stage_one / "embeddings.parquet"
        model = settings.model_flags()
        training = settings.training_flags()
        return [
            command_words(
                "compute_embeddings.py", **model, **subject, **settings.budget_flags(),
                validation_prompt=settings.drawn_prompt, output_path=_shown(embeddings),
            ),
            command_words(
                "precompute_latents.py", **model, **subject, **settings.budget_flags(),
                resolution=settings.resolution or None, output_path=_shown(latents),
            ),
            command_words(
                _TRAINING_SCRIPT, **model, **subject, **training, data_df_path=_shown(embeddings),
                latents_path=_shown(latents), output_dir=_shown(run_folder / "lora"), report_to="none",
                resume_from_checkpoint="latest",
            ),
        ]  # fmt: skip

    def plan_command(self, settings: Settings) -> list[str]:
        """What prints the plan of a training, and trains nothing."""
        return [*self.training_commands(settings, self._next("runs"))[-1], "--plan"]

    def plan(self, settings: Settings) -> str:
        """The scripts' own plan, and the time to expect, where it is known.

        Raises:
            UserError: a script refuses it; the sentence is the script's.
        """
        settings.require_right()
        self._require_photos()
        result = subprocess.run(
            [sys.executable, *self.plan_command(settings)], cwd=PROJECT_FOLDER, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, timeout=_PLAN_TIMEOUT_S,
        )  # fmt: skip
        if result.returncode:
            raise UserError((result.stderr or result.stdout).strip().removeprefix("error: "))
        expected = self.estimate(settings)
        time = expected.sentence(settings) if expected else "time: not known before the first steps of such a run"
        return f"{result.stdout.strip()}\n{time}"

    def estimate(self, settings: Settings) -> Estimate | None:
        """How long a photo takes in a step, where anything like it was measured."""
        return estimate(settings, self.size(settings).width, [output_dir(run) for run in reversed(self.runs)])

    def train(self, settings: Settings) -> Job:
        """Starts a training.

        Raises:
            UserError: another job is at work, there is no photo, or a setting is wrong.
        """
        settings.require_right()
        self._require_photos()
        with self._alone():
            run = Job(self._next("runs"))
            run.folder.mkdir(parents=True)
            settings.save(run.folder / "settings.json")
            run.start(TRAIN, self.training_commands(settings, run.folder))
        return run

    def go_on(self, run: Job) -> Job:
        """Starts the commands of a training again, which go on where they stopped.

        Raises:
            UserError: another job is at work.
        """
        with self._alone():
            run.start(TRAIN, run.commands)
        return run

    def can_go_on(self, run: Job) -> bool:
        """Whether there is anything left of a training."""
        return run.state in ("stopped", "failed")

    def drawing_command(
        self, run: Job, prompt: str, strengths: Sequence[float], num_images: int, seed: int, folder: Path
    ) -> list[str]:
        """What draws a prompt with a run's LoRA at several strengths."""
        settings = Settings.read(run.folder / "settings.json")
        return command_words(
            "inference.py", **settings.model_flags(), **settings.budget_flags(), lora=_shown(output_dir(run)),
            lora_scale=[f"{strength:g}" for strength in dict.fromkeys(strengths)], prompt=prompt,
            num_images=num_images, seed=seed, **settings.guidance_flags(),
            data_df_path=_shown(self._stage_one(settings) / "embeddings.parquet"), outdir=_shown(folder / "pictures"),
        )  # fmt: skip

    def draw(self, run: Job, prompt: str, strengths: Sequence[float], num_images: int = 1, seed: int = 0) -> Job:
        """Starts a drawing.

        Raises:
            UserError: another job is at work, the run has no LoRA yet, or what is asked is wrong.
        """
        prompt = " ".join(prompt.split())
        if not prompt or prompt.startswith("-") or not prompt.isprintable() or len(prompt) > 1000:
            raise UserError("type a prompt of one line that does not begin with a hyphen")
        if not 1 <= len(strengths) <= MOST_STRENGTHS or not all(-4 <= strength <= 4 for strength in strengths):
            raise UserError(f"choose one to {MOST_STRENGTHS} strengths between -4 and 4")
        if not 1 <= num_images <= MOST_DRAWN:
            raise UserError(f"choose one to {counted(MOST_DRAWN, 'picture')} of a prompt")
        if not 0 <= seed < 2**32:
            raise UserError("the seed must be between 0 and 4294967295")
        self._require_lora(run)
        with self._alone():
            drawing = Job(self._next("drawings"))
            words = self.drawing_command(run, prompt, strengths, num_images, seed, drawing.folder)
            drawing.start(DRAW, [words])
        return drawing

    def export(self, run: Job) -> Job:
        """Starts writing a run's LoRA in kohya's names, which ComfyUI, Forge and sd-scripts read.

        Raises:
            UserError: another job is at work, or the run has no LoRA yet.
        """
        lora = self._require_lora(run)
        with self._alone():
            job = Job(self._next("exports"))
            model = Settings.read(run.folder / "settings.json").model_flags()
            words = command_words("sd3_lora.export", lora=_shown(lora), format="kohya", **model)
            job.start(EXPORT, [["-m", *words]])
        return job

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it no other page starts a job of the project, and none is at work.

        Raises:
            UserError: one is.
        """
        with FileLock(self.folder / ".lock"):
            busy = self.busy
            if busy is not None:
                what = {TRAIN: "training", DRAW: "drawing", EXPORT: "writing a LoRA"}.get(busy.kind, "at work")
                raise UserError(f"project {self.name} is {what} already: wait for it, or stop it first")
            yield

    def _require_photos(self) -> None:
        if not self.photos.paths:
            raise UserError("there are no photos yet: add five to ten of your subject")

    def _require_lora(self, run: Job) -> Path:
        lora = self.lora(run)
        if lora is None:
            raise UserError(f"run {run.folder.name} has no LoRA yet: let it train to its end")
        return lora

    def _stage_one(self, settings: Settings) -> Path:
        return self.folder / "stage_one" / settings.model_name

    def _subject_flags(self, settings: Settings) -> dict[str, str]:
        return {"instance_data_dir": _shown(self.photos.folder), "instance_prompt": settings.instance_prompt}

    def _next(self, kind: str) -> Path:
        last = max((int(job.folder.name) for job in _numbered(self.folder / kind)), default=0)
        return self.folder / kind / f"{last + 1:02d}"


def typed(words: Sequence[str]) -> str:
    """A command as it can be typed in the folder of this program."""
    return quoted(["python", *words])


def output_dir(run: Job) -> Path:
    """The output folder of a training."""
    return run.folder / "lora"


def _shown(path: Path) -> str:
    """A path as the scripts get it, who run in the program's folder: shorter to read."""
    path = path.resolve()
    return str(path.relative_to(PROJECT_FOLDER)) if path.is_relative_to(PROJECT_FOLDER) else str(path)


def _numbered(folder: Path) -> list[Job]:
    if not folder.is_dir():
        return []
    names = [path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name) and path.is_dir()]
    return [Job(path) for path in sorted(names, key=lambda path: int(path.name))]


def _read_run(folder: Path) -> RunFolder | None:
    try:
        return read_run(folder)
    except UserError:  # it has not taken its first step
        return None


def _first_pictures(folder: Path) -> Iterator[tuple[int, Path]]:
    """Those before the first step."""
    path = folder / "samples" / "step_000000"
    if path.is_dir():
        yield 0, path


def _strength(noted: dict) -> float:
    """With which the LoRA drew; a picture notes it as hash@strength."""
    try:
        return float(noted["lora"][0].rpartition("@")[2])
    except (KeyError, IndexError, TypeError, ValueError):
        return 0.0
