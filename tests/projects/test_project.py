"""A project: settings checked, commands that the scripts take, one job at a time, all state read from files."""

from __future__ import annotations

import importlib
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.projects.estimate import estimate
from sd3_lora.projects.job import Job
from sd3_lora.projects.photos import Upload
from sd3_lora.projects.project import Project, typed
from sd3_lora.projects.settings import MODELS, Settings

import pytest
from conftest import PROJECT, save_pictures

SETTINGS = Settings(subject="robot", max_train_steps=3, photos_per_step=1)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.named(tmp_path / "projects", "my robot")
    project.photos.add([Upload(path, path.name) for path in save_pictures(tmp_path / "uploads", [(96, 64)] * 2)])
    return project


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of training, something that takes its time."""
    command = ["-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Project, "training_commands", lambda *_: [command])


def parsed(words: list[str]) -> None:
    """The script takes the command, and it is the one that can be copied."""
    assert shlex.split(typed(words)) == ["python", *words]
    script, *flags = words[1:] if words[0] == "-m" else words
    importlib.import_module(script.removesuffix(".py")).COMMAND_LINE.parse(flags)


@pytest.mark.parametrize("model", [*MODELS, "folder"])
@pytest.mark.parametrize("budget", [0, 7.5])
def test_the_scripts_take_its_commands(
    project: Project, tiny_sd3: Path, model: str, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    settings = replace(SETTINGS, model=str(tiny_sd3) if model == "folder" else model, vram_budget_gib=budget)
    commands = project.training_commands(settings.require_right(), project.folder / "runs" / "01")
    assert [words[0] for words in commands] == [
        "compute_embeddings.py", "precompute_latents.py", "train_dreambooth_sd3_lora_miniature.py",
    ]  # fmt: skip
    run = Job(project.folder / "runs" / "01")
    (run.folder / "lora").mkdir(parents=True)
    settings.save(run.folder / "settings.json")
    commands.append(project.drawing_command(run, "a 'sks' robot", [0, 0.5, 1], 2, 3, run.folder))
    for words in commands:
        parsed(words)
        assert ("--vram_budget_gib" in words) == (budget > 0)
        assert words[words.index("--pretrained_model_name_or_path") + 1] == settings.model


def test_in_the_programs_folder_the_commands_are_short() -> None:
    project = Project(PROJECT / "outputs" / "app" / "dog")
    (first, *_) = project.training_commands(SETTINGS, project.folder / "runs" / "01")
    assert first[first.index("--instance_data_dir") + 1] == os.path.join("outputs", "app", "dog", "photos")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"identifier": "two words"}, "must be one word"),
        ({"identifier": ""}, "must be one word"),
        ({"subject": " "}, "kind is missing"),
        ({"subject": "--plan"}, "without a hyphen before it"),
        ({"validation_prompt": "-x"}, "without a hyphen before it"),
        ({"validation_prompt": "a\nb"}, "one line"),
        ({"model": "/no/such/folder"}, "there is no folder /no/such/folder"),
        ({"model": "owner/unknown"}, "there is no folder owner/unknown"),
        ({"subject": "a" * 301}, "at most 300 letters"),
        ({"max_train_steps": 0}, "max_train_steps must be between 1 and 20000"),
        ({"max_train_steps": 20_001}, "max_train_steps must be between 1 and 20000"),
        ({"photos_per_step": 65}, "photos_per_step must be between 1 and 64"),
        ({"rank": 257}, "rank must be between 1 and 256"),
        ({"resolution": 2049}, "resolution must be between 0 and 2048"),
        ({"vram_budget_gib": float("nan")}, "vram_budget_gib must be"),
        ({"vram_budget_gib": float("inf")}, "vram_budget_gib must be between 0 and 1000"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(project: Project, change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        project.save(replace(SETTINGS, **change))
    assert project.settings == Settings()
    with pytest.raises(UserError, match=sentence):
        project.train(replace(SETTINGS, **change))
    assert project.runs == []


def test_settings_are_kept_and_old_ones_read(project: Project) -> None:
    project.save(SETTINGS)
    assert Project(project.folder).settings == SETTINGS
    path = project.folder / "settings.json"
    path.write_text(json.dumps({"subject": "robot", "unknown": 1}))
    assert project.settings == Settings(subject="robot")
    for damaged in ("", "[1]", '{"rank": "x"}'):
        path.write_text(damaged)
        assert project.settings == Settings()


def test_the_plan_is_the_scripts_own_with_the_time(project: Project) -> None:
    text = project.plan(SETTINGS)
    assert "plan: base unchanged" in text
    assert text.splitlines()[-1].startswith("time: about 0.2 s for 3 steps of 1 photo, after loading")
    assert project.runs == []
    with pytest.raises(UserError, match=r"^--resolution 2000 does not fit this model.*type --resolution"):
        project.plan(replace(SETTINGS, resolution=2000))


def test_nothing_starts_without_photos(tmp_path: Path) -> None:
    project = Project.named(tmp_path, "empty")
    for start in (project.plan, project.train):
        with pytest.raises(UserError, match="there are no photos yet"):
            start(SETTINGS)


@pytest.mark.usefixtures("slow")
def test_of_two_trainings_at_once_one_is_refused(project: Project) -> None:
    def start(_: int) -> str:
        try:
            return Project(project.folder).train(SETTINGS).folder.name
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        results = sorted(pool.map(start, range(8)))
    assert results == ["01"] + ["project my-robot is training already: wait for it, or stop it first"] * 7
    (run,) = project.runs
    assert project.busy == run
    with pytest.raises(UserError, match="is training already"):
        project.go_on(run)
    run.stop()
    assert run.wait(30) == "stopped"
    assert project.can_go_on(run)
    assert project.go_on(run).state == "running"
    run.stop()
    run.wait(30)


def test_two_projects_do_not_wait_for_each_other(project: Project, slow: None) -> None:
    other = Project.named(project.folder.parent, "other")
    other.photos.add([Upload(path, path.name) for path in project.photos.paths])
    runs = [each.train(SETTINGS) for each in (project, other)]
    assert [run.state for run in runs] == ["running"] * 2
    for run in runs:
        run.stop()
        run.wait(30)


def test_there_is_nothing_to_draw_with_before_a_lora(project: Project) -> None:
    with pytest.raises(UserError, match="there is no run yet"):
        project.run("")
    with pytest.raises(UserError, match="nothing was trained yet"):
        project.last_run()
    run = Job(project.folder / "runs" / "01")
    run.folder.mkdir(parents=True)
    for start in (lambda: project.draw(run, "a", [1]), lambda: project.export(run)):
        with pytest.raises(UserError, match="run 01 has no LoRA yet"):
            start()
    assert project.downloads(run) == []


@pytest.mark.parametrize(
    ("prompt", "strengths", "count", "seed"),
    [("", [1], 1, 0), ("--plan", [1], 1, 0), ("a", [], 1, 0), ("a", [9], 1, 0), ("a", [1], 99, 0), ("a", [1], 1, -1)],
)
def test_what_cannot_be_drawn_is_refused(project: Project, prompt: str, strengths: list, count: int, seed: int) -> None:
    with pytest.raises(UserError):
        project.draw(Job(project.folder / "runs" / "01"), prompt, strengths, count, seed)
    assert project.drawings == []


def test_downloads_have_the_projects_name_and_follow_the_run(project: Project) -> None:
    run = Job(project.folder / "runs" / "01")
    (run.folder / "lora").mkdir(parents=True)
    lora = run.folder / "lora" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(b"one")
    (path,) = project.downloads(run)
    assert (path.name, path.read_bytes()) == ("my-robot-01.safetensors", b"one")
    os.utime(path, ns=(0, 0))
    lora.unlink()
    lora.write_bytes(b"two")
    assert project.downloads(run)[0].read_bytes() == b"two"


def test_a_name_is_a_folder_within_the_root(tmp_path: Path) -> None:
    assert Project.named(tmp_path / "root", "../../x").folder == tmp_path / "root" / "x"
    for name in ("", "..", "/"):
        with pytest.raises(UserError, match="the project has no name"):
            Project.named(tmp_path / "root", name)
    assert Project.names(tmp_path / "root") == ["x"]


def test_the_time_is_an_earlier_runs_or_a_published_one(tmp_path: Path) -> None:
    medium = replace(SETTINGS, model=MODELS[1], vram_budget_gib=6, max_train_steps=500, photos_per_step=4)
    expected = estimate(medium, 1024, [])
    assert expected is not None
    assert "H200" in expected.sentence(medium)
    assert expected.seconds == pytest.approx(0.11, abs=0.01)  # README, 6 GiB
    assert estimate(medium, 512, []) is None
    run = tmp_path / "01" / "lora"
    run.mkdir(parents=True)
    medium.save(run.parent / "settings.json")
    (run / "run.json").write_text(json.dumps({"resolution": 1024, "ms_a_step": 2000.0}))
    earlier = estimate(medium, 1024, [run])
    assert earlier is not None
    assert earlier.seconds == 0.5
    assert "about 17 min for 500 steps of 4 photos" in earlier.sentence(medium)
    assert estimate(replace(medium, vram_budget_gib=0), 1024, [run]) != earlier
