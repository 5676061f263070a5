"""The report says what the run's files say, shows nothing unescaped, and can do without any of them."""

from __future__ import annotations

import base64
import html
import importlib
import importlib.metadata
import io
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sd3_lora import report
from sd3_lora.common.command_line import quoted
from sd3_lora.reporting import page
from sd3_lora.reporting.page import write_report
from sd3_lora.reporting.run_folder import read_run
from sd3_lora.reporting.settings import GROUPS, commands
from sd3_lora.reporting.thumbnails import MOST_BYTES

import numpy as np
import pytest
from conftest import PROJECT, TRAINING_SCRIPT, Prepared, Result, save_pictures
from made_runs import make_run
from PIL import Image
from safetensors.numpy import save_file
from training_runs import train

Run = Callable[..., Path]
NASTY = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"'&{{ 7 * 7 }}"


@pytest.fixture
def a_run(tmp_path: Path) -> Run:
    """`a_run(steps=60)` makes a finished run by hand."""
    return partial(make_run, tmp_path)


class Page(HTMLParser):
    """What a browser makes of the file: the words, the elements, and the numbers of the charts."""

    def __init__(self, path: Path):
        super().__init__()
        self.html, self.words, self.scripts, self.data = path.read_text(encoding="utf-8"), "", 0, dict[str, Any]()
        self.elements = list[tuple[str, dict[str, str | None]]]()
        self._inside: str | None = None
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside is None:
            self.words += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def section(self, name: str) -> str:
        """The words of a section, on one line."""
        html = re.search(rf'<section id="{name}".*?</section>', self.html, re.DOTALL)
        assert html
        return " ".join(re.sub(r"<[^>]+>", " ", html[0]).split())


def report_of(folder: Path) -> Page:
    return Page(write_report(folder))


def test_the_numbers_are_those_of_the_files(a_run: Run) -> None:
    folder = a_run(steps=60)
    made, record = report_of(folder), json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [(point["step"], point["loss"]) for point in made.data["losses"]] == [
        (line["step"], line["loss"]) for line in lines
    ]
    losses = [line["loss"] for line in lines]
    assert made.data["losses"][30]["smooth"] == pytest.approx(np.mean(losses[27:34]))
    assert made.data["warning"] == [
        json.loads(line) for line in (folder / "early_warning.jsonl").read_text().splitlines()
    ]
    assert f"{record['loss']:.4f}" in made.words
    assert "lowest at step 40 (0.5000)" in made.section("warning").replace(" )", ")").replace("( ", "(")
    assert [(bar["name"], bar["elapsed_s"], bar["device_gib"]) for bar in made.data["bars"]] == [
        ("encode with CLIP-L", 2.0, 1.0),
        ("encode with T5 (fp16)", 20.0, 9.0),
        ("encode pictures", 8.0, 4.0),
        ("load transformer", 5.0, 4.1),
        ("train", 300.0, 9.4),
    ]
    training = made.data["spans"][-1]
    assert (training["planned_gib"], training["measured_gib"]) == (10.0, pytest.approx(9.8))
    assert list(training["parts"].items()) == [("weights", 4.0), ("activations", 6.0)]  # as planned, not by name
    memory = made.section("memory")
    assert "in all 5.1 min 9.80 0.50 planned; measured −2.0 % 10.00" in memory
    assert "torch 2.13.0" in made.section("settings")


def test_stages_lie_side_by_side_as_wide_as_they_took(a_run: Run) -> None:
    bars = report_of(a_run()).data["bars"]
    assert bars[0]["start"] == 0
    assert bars[-1]["end"] == pytest.approx(1)
    assert all(left["end"] == right["start"] for left, right in itertools.pairwise(bars))
    widths = [bar["end"] - bar["start"] for bar in bars]
    assert widths[-1] / widths[1] == pytest.approx(300 / 20)
    assert widths[0] == pytest.approx(widths[1] * 0.012 / (20 / 335), rel=1e-3)  # 2 of 335 s would be 0.6 %


def test_each_step_of_validation_is_a_picture_of_the_slider(a_run: Run) -> None:
    made = report_of(a_run(drawn_at=(0, 30, 60)))
    pictures = [each for each in made.attributes("img") if "data-step" in each]
    assert [each["data-step"] for each in pictures] == ["0", "30", "60"] * 2
    assert ["hidden" in each for each in pictures] == [True, True, False] * 2  # without scripts the last one is seen
    (slider,) = made.attributes("input")
    assert (slider["data-steps"], slider["max"], slider["value"]) == ("0 30 60", "2", "2")
    with Image.open(io.BytesIO(base64.b64decode(str(pictures[0]["src"]).partition(",")[2]))) as first:
        assert (first.format, first.size) == ("WEBP", (64, 64))


def test_pictures_of_steps_that_the_run_has_not_taken_are_left_out(a_run: Run) -> None:
    made = report_of(a_run(drawn_at=(0, 60, 90)))
    assert made.attributes("input")[0]["data-steps"] == "0 60"


def test_crops_are_cut_as_training_saw_them(a_run: Run, tmp_path: Path) -> None:
    folder = a_run()
    made = report_of(folder)
    crops = [each for each in made.attributes("img") if "data-step" not in each]
    assert [each["alt"] for each in crops[:2]] == [
        "photo 0.png, 64×64 px, 16 px from the left",
        "photo 0.png, 64×64 px, 16 px from the left, mirrored",
    ]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(crops[0]["src"]).partition(",")[2]))), np.float32)
    photo = np.asarray(Image.open(tmp_path / "photos" / "photo 0.png").crop((16, 0, 80, 64)), np.float32)
    assert np.abs(shown - photo).mean() < 25  # noise, which WebP smooths
    assert np.abs(shown[:, ::-1] - photo).mean() > 60
    assert "2 pictures. Crops by size: 64×64 (2)." in made.section("pictures")


def test_what_is_beside_a_mask_is_dark(a_run: Run, tmp_path: Path) -> None:
    folder = a_run()
    noted = read_run(folder).pictures or ()
    mask = np.zeros((1, 8, 8), np.float16)
    mask[:, :, 4:] = 1
    masked = {"sd3_lora": json.dumps({"masks": {"64x64+16+0": "alpha"}})}
    save_file({"64x64+16+0.mask": mask}, tmp_path / "latents" / f"{noted[0].image_id}.safetensors", masked)
    made = report_of(folder)
    crops = [each for each in made.attributes("img") if "data-step" not in each]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(crops[0]["src"]).partition(",")[2]))), np.float32)
    assert shown[:, :30].mean() < 0.4 * shown[:, 34:].mean()
    assert "50 % of it in the mask" in made.section("pictures")


def test_a_picture_that_moved_or_changed_has_a_placeholder(a_run: Run, tmp_path: Path) -> None:
    folder = a_run()
    (tmp_path / "photos" / "photo 0.png").unlink()
    Image.new("RGB", (96, 64)).save(tmp_path / "photos" / "photo 1.png")
    said = report_of(folder).section("pictures")
    assert "the file is no longer where it was" in said
    assert "the file has changed since it was trained on" in said


def test_captions_have_their_tokens(a_run: Run) -> None:
    long = "a photo of sks dog " + "and another dog " * 40
    made = report_of(a_run(captions=("a photo of sks dog", long)))
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(PROJECT / "miniature" / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(PROJECT / "miniature" / "tokenizer_3")
    said = made.section("captions")
    for prompt in ("a photo of sks dog", long):
        for tokenizer in (clip, t5):
            assert f"{len(tokenizer(prompt).input_ids)} / 77" in said
    assert f"{len(t5(long).input_ids)} / 77, cut" in said
    assert "a photo of a dog" in [each.get("aria-label") for each in made.attributes("span")]


def test_without_the_model_captions_are_shown_and_not_counted(a_run: Run) -> None:
    folder = a_run()
    record = json.loads((folder / "run.json").read_text())
    record["flags"]["pretrained_model_name_or_path"] = "someone/a-model-that-is-not-here"
    (folder / "run.json").write_text(json.dumps(record))
    said = report_of(folder).section("captions")
    assert (
        "Tokens are not counted: someone/a-model-that-is-not-here is neither a folder here nor downloaded yet" in said
    )
    assert "a photo of sks dog in the snow 1 picture – –" in said


def test_what_a_user_wrote_is_escaped(a_run: Run, tmp_path: Path) -> None:
    folder = a_run(captions=(NASTY, "b"), prompts=(NASTY, "a photo of a dog"))
    record = json.loads((folder / "run.json").read_text())
    record["stages"][0]["name"] = record["model"] = record["flags"]["lora_blocks"] = NASTY
    (folder / "run.json").write_text(json.dumps(record))
    (folder / f"{NASTY.replace('/', '-')}-step00000030.safetensors").touch()
    made = report_of(folder)
    scripts = made.attributes("script")
    assert len(scripts) == 4  # the numbers, two libraries, our own
    assert not [each for each in made.elements if any(name.startswith("on") for name in each[1])]
    assert not [each for each in made.attributes("img") if not str(each["src"]).startswith("data:image/webp;base64,")]
    assert made.words.count(NASTY) >= 4
    assert "{{ 7 * 7 }}" in made.words
    assert NASTY in [each.get("alt", "").partition(", picture")[0] for each in made.attributes("img")]  # type: ignore[union-attr]
    assert made.data["bars"][3]["name"] == NASTY
    assert made.data["loras"]["30"] == [f"{NASTY.replace('/', '-')}-step00000030.safetensors"]


def test_the_page_allows_itself_nothing_but_its_own_scripts(a_run: Run) -> None:
    made = report_of(a_run())
    policy = next(str(each["content"]) for each in made.attributes("meta") if each.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert len(re.findall(r"'sha256-[^']{44}'", policy)) == 3
    links = [str(each[name]) for _, each in made.elements for name in ("src", "href") if name in each]
    others = [link for link in links if not link.startswith(("data:", "#"))]
    assert others == ["https://observablehq.com/plot", "https://d3js.org"]  # to be clicked


def test_five_megabytes_are_enough_for_noise(a_run: Run) -> None:
    """500 steps, 10 validations and the start, 4 pictures each, of which nothing can be compressed."""
    prompts = tuple(f"prompt {number}" for number in range(4))
    folder = a_run(steps=500, prompts=prompts, drawn_at=tuple(range(0, 501, 50)), side=400, noise=400)
    made = report_of(folder)
    assert len([each for each in made.attributes("img") if "data-step" in each]) == 44
    assert len(made.html.encode()) < 1.34 * MOST_BYTES + 1_000_000 < 5_000_000


@pytest.mark.parametrize(
    ("missing", "section", "said"),
    [
        ("samples", "drawn", "No validation pictures were drawn."),
        ("early_warning.jsonl", "warning", "Not measured."),
        ("losses.jsonl", "loss", "losses.jsonl is not in the folder."),
        ("pictures.json", "pictures", "Nothing in the folder names the pictures"),
        ("run.json", "again", "They are noted by a checkpoint, and at the end of a run."),
        ("run.json", "memory", "Stages are noted at the end of a run."),
    ],
)
def test_each_part_may_be_missing(a_run: Run, missing: str, section: str, said: str) -> None:
    folder = a_run()
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in report_of(folder).section(section)


def test_damaged_and_half_written_lines_are_left_out(a_run: Run) -> None:
    folder = a_run(steps=20)
    log = folder / "losses.jsonl"
    log.write_text("not json\n[1]\n" + log.read_text() + '{"step": 21, "lo')
    made = report_of(folder)
    assert [point["step"] for point in made.data["losses"]] == list(range(1, 21))
    assert "losses.jsonl has 2 damaged lines, left out here." in made.words


def test_a_run_that_goes_on_shows_what_its_checkpoint_notes(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path
) -> None:
    train(script, prepared, tmp_path, "--max_train_steps", 6, "--checkpointing_steps", 3, "--rank", 3)
    interrupt(tmp_path)
    made = report_of(tmp_path)
    assert "This run has not ended" in made.words
    assert "4 of 6" in " ".join(made.words.split())
    assert "--rank 3" in made.section("settings").replace("--rank  3", "--rank 3")
    assert f"torch {importlib.metadata.version('torch')}" in made.section("settings")
    assert made.section("pictures").startswith("Pictures as the model saw them 5 pictures.")
    assert len([each for each in made.attributes("img") if "data-step" not in each]) == 5 * 3 - 2
    assert "moved" not in made.words
    assert "no longer" not in made.words
    assert "Tokens are not counted" not in made.words
    assert "going on, or interrupted: noted at its end" in made.section("memory")
    (again,) = commands(read_run(tmp_path))[-1:]
    assert "--rank 3 " in again
    assert "--max_train_steps 6" in again
    assert again in html.unescape(made.section("again"))


def interrupt(folder: Path) -> None:
    """Leaves of a run of 6 steps what an interruption behind the 4th leaves, with a checkpoint of the 3rd."""
    for name in ("run.json", "pictures.json", "checkpoint-6"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = folder / "losses.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))


def test_a_checkpoint_of_an_earlier_version_does_not_say_that_pictures_moved(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path
) -> None:
    train(script, prepared, tmp_path, "--max_train_steps", 6, "--checkpointing_steps", 3, "--rank", 3)
    interrupt(tmp_path)
    (tmp_path / "checkpoint-3" / "run.json").unlink()
    made = report_of(tmp_path)
    assert made.section("pictures").count("where its file lies is not noted") == 5
    assert "--rank 3" in made.section("settings").replace("--rank  3", "--rank 3")
    assert "no longer where it was" not in made.words


def test_a_finished_run_that_goes_on_has_not_ended(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path
) -> None:
    train(script, prepared, tmp_path, "--max_train_steps", 3, "--checkpointing_steps", 3)
    record = (tmp_path / "run.json").read_text()
    more = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--resume_from_checkpoint", "latest")
    train(script, prepared, tmp_path, *more)
    (tmp_path / "run.json").write_text(record)
    shutil.rmtree(tmp_path / "checkpoint-6")
    log = tmp_path / "losses.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    run = read_run(tmp_path)
    assert not run.has_ended
    assert (run.steps, run.planned_steps) == (4, 3)  # of the older command: no checkpoint notes the newer


def test_photos_that_a_relative_path_does_not_reach_from_here(
    a_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run()
    record = json.loads((folder / "run.json").read_text())
    record["flags"]["instance_data_dir"] = "photos"
    (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(folder)
    assert f"its folder photos is not found in {folder}" in report_of(folder).section("pictures")
    monkeypatch.chdir(tmp_path)
    assert "is not found" not in report_of(folder).section("pictures")


def test_a_real_run_writes_its_report_and_the_command_writes_the_same(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.time, "strftime", lambda _: "now")
    run = train(script, prepared, tmp_path, "--early_warning_steps", 1, "--seed", 5)
    path = tmp_path / "report.html"
    assert f"wrote {path}: open it in a browser\n" in run.out
    written = path.read_bytes()
    made = Page(path)
    assert [point["loss"] for point in made.data["losses"]] == [line["loss"] for line in run.losses]
    assert len([each for each in made.attributes("img") if "data-step" not in each]) == 5 * 3 - 2  # a square has one
    path.unlink()
    assert report.main([str(tmp_path)]) == 0
    assert path.read_bytes() == written


def test_a_resumed_run_is_shown_as_one(script: Callable[..., Result], prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path, "--max_train_steps", 3, "--early_warning_steps", 1)
    words = "--max_train_steps", 5, "--early_warning_steps", 1, "--resume_from_checkpoint", "latest"
    run = train(script, prepared, tmp_path, *words)
    made = Page(tmp_path / "report.html")
    assert [(point["step"], point["loss"]) for point in made.data["losses"]] == [
        (line["step"], line["loss"]) for line in run.losses
    ]
    assert [each["step"] for each in made.data["warning"]] == [0, 1, 2, 3, 4, 5]
    assert "where training went on from a checkpoint, its stages are those of the last command." in made.section(
        "memory"
    )
    assert "--resume_from_checkpoint" not in made.section("again")


def test_noise_levels_are_those_of_the_step(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, seen = importlib.import_module(TRAINING_SCRIPT), []
    original = training.micro_step

    def spy(model: Any, inputs: Any, *more: Any) -> Any:
        seen.append(inputs.sigmas)
        return original(model, inputs, *more)

    monkeypatch.setattr(training, "micro_step", spy)
    words = "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--compile", "off", "--device", "cpu"
    run = train(script, prepared, tmp_path, *words)
    shown = [line["sigmas"] for line in run.losses]
    assert [len(each) for each in shown] == [4, 4, 4]
    drawn = [sigma for each in seen[-6:] for sigma in each.flatten().tolist()]
    assert [sigma for each in shown for sigma in each] == pytest.approx(drawn, abs=6e-5)


def test_a_report_that_fails_costs_a_sentence(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise OSError("no room")

    monkeypatch.setattr(page, "write_report", fail)
    run = train(script, prepared, tmp_path)
    assert "note: the report was not written (no room)\n" in run.out
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_commands_give_the_recorded_flags_again(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path
) -> None:
    words = ["--rank", 2, "--validation_prompt", "a photo of sks robot", "--validation_steps", 9, "--random_flip", "no"]
    train(script, prepared, tmp_path, *words, "--validation_num_steps", 1)
    run = read_run(tmp_path)
    typed = commands(run)
    assert [shlex.split(command)[1] for command in typed] == [*list(GROUPS)[:2], TRAINING_SCRIPT + ".py"]
    for command, record in zip(typed, (*run.earlier, run.training), strict=True):
        _, name, *arguments = shlex.split(command)
        groups = importlib.import_module(name.removesuffix(".py")).COMMAND_LINE.parse(arguments)
        assert tuple(map(type, groups)) == GROUPS[name]
        again = {name: value for group in groups for name, value in vars(group).items()}
        assert {name: value for name, value in again.items() if value != record.flags[name]} == {}


def test_the_seed_that_was_drawn_is_in_the_command(a_run: Run) -> None:
    assert commands(read_run(a_run()))[-1].endswith(" --seed 1234")


@pytest.mark.parametrize("work", ["adamw", "adam8bit"])
def test_old_work_has_a_report(work: str, tmp_path: Path) -> None:
    folder = tmp_path / work
    shutil.copytree(PROJECT / "tests" / "data" / "cc752f5" / work, folder)
    made = report_of(folder)
    lines = (folder / "losses.jsonl").read_text().splitlines()
    assert [point["loss"] for point in made.data["losses"]] == [json.loads(line)["loss"] for line in lines]
    assert "losses.jsonl has no noise levels: an earlier version of the trainer wrote it." in made.section("loss")
    assert "--use_8bit_adam" in made.section("settings").replace("_ ", "_")


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    save_pictures(tmp_path, [(8, 8)])
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds neither run.json nor losses.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


OTHERS = {
    "latents": "what precompute_latents.py wrote, and no training run",
    "images": "what inference.py wrote, and no training run",
}


@pytest.mark.parametrize("folder", OTHERS)
def test_what_another_script_wrote_is_no_run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / folder).mkdir()
    shutil.copy(PROJECT / "tests" / "data" / "cc752f5" / folder / "run.json", tmp_path / folder)
    assert report.main([str(tmp_path / folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / folder} holds {OTHERS[folder]}: give the --output_dir of a training")
    assert [path.name for path in (tmp_path / folder).iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", '{"name": "another program"}', "a run.json that is damaged or not of this trainer"),
        ("run.json", '{"flags": ["--rank"]}', "a run.json that is damaged or not of this trainer"),
        ("run.json", "[1]", "a run.json that is damaged or not of this trainer"),
        ("run.json", "{", "a run.json that is damaged or not of this trainer"),
        ("losses.jsonl", '{"epoch": 1, "loss": 2.0}\n', "a losses.jsonl without a line of this trainer"),
    ],
)
def test_what_another_program_wrote_is_no_run(
    name: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds {said}: give the --output_dir")
    assert not (tmp_path / "report.html").exists()


def test_a_foreign_record_beside_losses_is_left_out(a_run: Run) -> None:
    folder = a_run()
    (folder / "run.json").write_text('{"name": "another program"}')
    made = report_of(folder)
    assert "run.json is damaged or not that of a training run, and is left out here." in made.words
    assert "This run has not ended" in made.words


@pytest.mark.parametrize("name", ["run.json", "report.html", "checkpoint-3"])
def test_what_lies_in_a_run_is_told_with_the_command_for_its_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    shutil.copytree(PROJECT / "tests" / "data" / "cc752f5" / "adamw", folder)
    (folder / "report.html").touch()
    assert report.main([str(folder / name)]) == 2
    what = "a checkpoint in the folder of its run" if name == "checkpoint-3" else "a file, and a run is a folder"
    command = quoted(["python", "-m", "sd3_lora.report", str(folder)])
    assert capsys.readouterr().err == f"error: {folder / name} is {what}: type `{command}`\n"
    assert report.main(shlex.split(command)[3:]) == 0


def test_a_file_elsewhere_is_called_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    assert report.main([str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt is a file, and a run is a folder: give the --output_dir" in capsys.readouterr().err


def test_two_folders_are_told_apart_from_a_name_with_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main(["one", "two"]) == 2
    said = capsys.readouterr().err
    assert said == "error: unknown argument two: --output_dir is one, here one: type the command once for each\n"
    Path("my new run").mkdir()
    assert report.main(["my", "new", "run"]) == 2
    assert capsys.readouterr().err == 'error: unknown argument new: put double quotes around "my new run"\n'


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": NaN, "gradient_norm": 1, "learning_rate": 1, "skipped": false}',
        '{"step": 1, "loss": "low", "gradient_norm": 1, "learning_rate": 1, "skipped": false}',
        '{"step": 1, "loss": 1, "gradient_norm": 1, "learning_rate": 1, "skipped": false, "sigmas": ["a"]}',
        '{"step": 1, "loss": null, "gradient_norm": 1, "learning_rate": 1, "skipped": false}',
    ],
)
def test_what_no_chart_can_show_is_a_damaged_line(a_run: Run, line: str) -> None:
    folder = a_run(steps=20)
    log = folder / "losses.jsonl"
    log.write_text("".join([line + "\n", *log.read_text().splitlines(keepends=True)[1:]]))
    made = report_of(folder)
    assert [point["step"] for point in made.data["losses"]] == list(range(2, 21))
    assert "losses.jsonl has 1 damaged line, left out here." in made.words


def test_the_libraries_are_those_of_their_list() -> None:
    import hashlib

    folder = PROJECT / "sd3_lora" / "reporting" / "vendored"
    listed = re.findall(r"^\| `(.*?)` .* `([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(path.name for path in folder.glob("*.js"))
    for name, digest in listed:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert all("Permission to use, copy" in path.read_text() for path in folder.glob("LICENSE-*.txt"))
