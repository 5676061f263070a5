"""Pictures while training: drawn from the same noise each time, and the run is as if none had been."""

from __future__ import annotations

import importlib
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.drawing import validation
from sd3_lora.drawing.pictures import PicturePlan
from sd3_lora.drawing.sampling import Sampler
from sd3_lora.drawing.validation import Validation
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE
from sd3_lora.transformer.lora_files import find_lora

import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, torchrun
from PIL import Image
from training_runs import Run, Script, same_lora, train

CLASS_PROMPT = "a photo of a robot"
QUICK = ["--validation_num_steps", 2, "--validation_guidance", 3]
DRAWS = ["--validation_prompt", PROMPT, CLASS_PROMPT, *QUICK]
LEARNS = ["--learning_rate", 0.01, "--lora_dropout", 0.3]
NAMES = ["00_a-photo-of-sks-robot_00.png", "01_a-photo-of-a-robot_00.png"]


def steps_drawn(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run.folder / "samples").glob("step_*"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def drawn_at(run: Run, step: int, name: str = NAMES[0]) -> bytes:
    return pixels(run.folder / "samples" / f"step_{step:06d}" / name)


def run_once(prepared: Prepared, folder: Path, *words: object) -> Run:
    """Three steps with dropout; for fixtures, which cannot have the fixture `script`."""
    shared = [*prepared.flags, "--device", "cpu", "--max_train_steps", 3, "--output_dir", folder, *LEARNS, *words]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in shared]) == 0
    return Run(folder, "", "")


@pytest.fixture(scope="module")
def without(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without pictures."""
    return run_once(prepared, tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def with_pictures(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with pictures of two prompts after every step, and before the first."""
    return run_once(prepared, tmp_path_factory.mktemp("with"), *DRAWS, "--validation_steps", 1)


def assert_same_run(run: Run, other: Run) -> None:
    assert run.losses == other.losses
    assert same_lora(run.folder / LORA_FILE, other.folder / LORA_FILE)


def test_the_run_is_as_if_nothing_had_been_drawn(with_pictures: Run, without: Run) -> None:
    """Bit for bit, with dropout."""
    assert_same_run(with_pictures, without)
    assert steps_drawn(with_pictures) == [0, 1, 2, 3]
    for step in range(4):
        folder = with_pictures.folder / "samples" / f"step_{step:06d}"
        assert [path.name for path in sorted(folder.iterdir())] == NAMES
    assert len({drawn_at(with_pictures, step) for step in range(4)}) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--use_ema"],
        ["--stream_blocks", 2, "--gradient_checkpointing", "--modulations_ahead", "on"],
        ["--deterministic", "on"],
        ["--use_8bit_adam"],
        ["--optimizer", "schedule_free_adamw"],
        ["--optimizer", "prodigy", "--learning_rate", 1],
        ["--optimizer", "adafactor"],
        ["--prior_term", "prediction"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_so_it_is_whatever_keeps_it_small(
    script: Script, prepared: Prepared, tmp_path: Path, without: Run, words: list[Any]
) -> None:
    words = [*LEARNS, *words]
    run = train(
        script, prepared, tmp_path / "with", *words, *DRAWS, "--validation_steps", 1, "--early_warning_steps", 1
    )
    changes = not {"--optimizer", "--use_8bit_adam", "--prior_term"}.isdisjoint(words)  # the run's numbers
    others = train(script, prepared, tmp_path / "without", *words) if changes else without
    assert_same_run(run, others)
    assert steps_drawn(run) == [0, 1, 2, 3]


def test_they_are_the_pictures_that_inference_draws(
    script: Script, prepared: Prepared, tmp_path: Path, with_pictures: Run
) -> None:
    """Of the seed and the resolution by default, with the LoRA that the run leaves."""
    model = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    words = ["--lora", with_pictures.folder, "--prompt", PROMPT, CLASS_PROMPT, "--batch_size", 2, "--device", "cpu"]
    words.append("--unmerged")  # as it trains
    result = script("inference", *model, *words, "--num_steps", 2, "--guidance", 3, "--outdir", tmp_path / "images")
    assert result.code == 0, result.err
    drawn = sorted((tmp_path / "images").glob("*/img_*.png"))
    assert [pixels(path) for path in drawn] == [drawn_at(with_pictures, 3, name) for name in NAMES]


def test_the_average_draws_where_there_is_one(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*LEARNS, "--use_ema", "--ema_decay", 0.5, "--validation_prompt", PROMPT, *QUICK]
    run = train(script, prepared, tmp_path / "run", *words, "--validation_steps", 3)
    model = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    for name in (LORA_FILE, EMA_FILE):
        words = ["--lora", run.folder / name, "--prompt", PROMPT, "--num_steps", 2, "--guidance", 3, "--device", "cpu"]
        words.append("--unmerged")  # as it trains
        assert script("inference", *model, *words, "--outdir", tmp_path / name).code == 0
        (path,) = (tmp_path / name).glob("*/img_*.png")
        assert (pixels(path) == drawn_at(run, 3)) == (name == EMA_FILE)


@pytest.mark.parametrize(
    ("flag", "value", "changes"),
    [
        ("validation_seed", 1, True),
        ("validation_seed", 0, False),  # 0 is a seed, and the default
        ("validation_guidance", 5, True),
        ("validation_num_steps", 3, True),
        ("validation_negative_prompt", CLASS_PROMPT, True),
        ("num_validation_images", 2, False),  # the first one stays
    ],
)
def test_what_decides_the_pixels(
    script: Script, prepared: Prepared, tmp_path: Path, with_pictures: Run, flag: str, value: Any, changes: bool
) -> None:
    words = [*DRAWS, f"--{flag}", value, "--max_train_steps", 1]
    run = train(script, prepared, tmp_path, *words)
    assert (drawn_at(run, 0) != drawn_at(with_pictures, 0)) == changes
    count = value if flag == "num_validation_images" else 1
    pictures = sorted((tmp_path / "samples" / "step_000001").iterdir())
    assert len(pictures) == 2 * count
    assert len({pixels(path) for path in pictures}) == 2 * count


def test_prompts_of_a_file(script: Script, prepared: Prepared, tmp_path: Path, with_pictures: Run) -> None:
    (tmp_path / "prompts.txt").write_text(f"# what to draw\n{PROMPT}\n{CLASS_PROMPT}\n{PROMPT}\n")
    words = ["--validation_prompts_file", tmp_path / "prompts.txt", *QUICK, "--max_train_steps", 1]
    run = train(script, prepared, tmp_path / "out", *words)
    assert [drawn_at(run, 0, name) for name in NAMES] == [drawn_at(with_pictures, 0, name) for name in NAMES]


def test_a_prompt_that_is_not_embedded_is_refused_with_the_command(
    script: Script, private: Prepared, tmp_path: Path
) -> None:
    """Before anything is loaded or written; and the command adds it."""
    words = ["--validation_prompt", "sks robot in a forest", "--validation_negative_prompt", "blurry", *QUICK]
    run = train(script, private, tmp_path / "out", *words, code=2)
    assert run.error.startswith(f"{private.embeddings} lacks 'sks robot in a forest' and 1 more prompt: type `")
    assert not run.folder.exists()
    _, name, *typed = shlex.split(run.error.split("`")[1])
    assert script(name.removesuffix(".py"), *typed).code == 0
    run = train(script, private, tmp_path / "out", *words, "--max_train_steps", 1)
    assert steps_drawn(run) == [0, 1]


def test_a_signal_leaves_out_the_pictures_to_come(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is taken away waits for seconds: the checkpoint comes first."""
    denoised: list[int] = []
    original = Sampler.denoise

    def denoise(self: Sampler, *words: Any) -> torch.Tensor:
        denoised.append(1)
        if len(denoised) == 3:  # the first batch of step 2
            signal.raise_signal(signal.SIGTERM)
        return original(self, *words)

    monkeypatch.setattr(Sampler, "denoise", denoise)
    words = ["--num_validation_images", 3, "--validation_steps", 2, "--max_train_steps", 5]
    run = train(script, prepared, tmp_path, *DRAWS, *words, code=143)
    assert len(denoised) == 3  # six pictures are two batches
    assert {path.name: len(list(path.iterdir())) for path in (tmp_path / "samples").glob("step*")} == {
        "step_000000": 6,
        "step_000002": 4,
    }
    assert (run.folder / "checkpoint-3").is_dir()


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends a signal before this optimizer step of the next run."""
    taken: list[int] = []
    original = importlib.import_module(TRAINING_SCRIPT).optimizer_step

    def take(*words: Any) -> Any:
        taken.append(1)
        if len(taken) == step:
            signal.raise_signal(signal.SIGTERM)
        return original(*words)

    monkeypatch.setattr(importlib.import_module(TRAINING_SCRIPT), "optimizer_step", take)


@pytest.mark.parametrize("when", [["--validation_steps", 2], ["--checkpointing_steps", 2], ["--save_every_n_steps", 2]])
def test_what_was_due_at_the_step_of_an_interruption_is_drawn_when_the_run_goes_on(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: list[Any]
) -> None:
    """Once, also where the run is resumed there a second time; and the losses of the early warning are measured."""
    words = [*LEARNS, *DRAWS, *when, "--early_warning_steps", 2, "--max_train_steps", 4]
    whole = train(script, prepared, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        run = train(script, prepared, tmp_path / "halves", *words, code=143)
    assert steps_drawn(run) == [0]
    drawn: list[int] = []
    original = Validation._denoise
    monkeypatch.setattr(
        Validation, "_denoise", lambda self, *words: drawn.append(len(words[1])) or original(self, *words)
    )
    resumed = ["--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 1)
        train(script, prepared, tmp_path / "halves", *words, *resumed, code=143)
    assert len(drawn) == 1  # of step 2
    shutil.rmtree(tmp_path / "halves" / "checkpoint-3")
    run = train(script, prepared, tmp_path / "halves", *words, *resumed)
    assert len(drawn) == len(steps_drawn(whole)) - 1  # those after step 2 once more; the first one is of the first run
    assert steps_drawn(run) == steps_drawn(whole)
    for step in steps_drawn(whole):
        assert [drawn_at(run, step, name) for name in NAMES] == [drawn_at(whole, step, name) for name in NAMES]
    assert_same_run(run, whole)
    measured = [(each.folder / "early_warning.jsonl").read_text() for each in (run, whole)]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("fault", ["nan", "disk", "memory"])
def test_a_failure_costs_a_sentence_and_not_the_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Run, fault: str
) -> None:
    errors = {
        "nan": UserError("the VAE decoded a picture to NaN"),
        "disk": OSError(28, "No space left on device"),
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    }

    def fail(*_: object) -> None:
        raise errors[fault]

    monkeypatch.setattr(validation, "decode", fail)
    run = train(script, prepared, tmp_path, *LEARNS, *DRAWS, "--validation_steps", 2)
    notes = [line for line in run.out.splitlines() if line.startswith("note: the pictures of step ")]
    assert notes == [f"note: the pictures of step {n} failed ({errors[fault]}): training goes on" for n in (0, 2, 3)]
    assert_same_run(run, without)


def test_pictures_are_written_beside_the_next_steps_and_whole_in_the_end(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Run
) -> None:
    """However slow the disk is; where it is full at step 2, a sentence says so, and the others are there."""
    original, taken = PicturePlan.save, []

    def save(plan: PicturePlan, picture: Image.Image) -> None:
        time.sleep(0.2)
        taken.append(plan.path)
        if plan.settings["training_step"] == 2:
            raise OSError(28, "No space left on device")
        original(plan, picture)

    monkeypatch.setattr(PicturePlan, "save", save)
    run = train(script, prepared, tmp_path, *LEARNS, *DRAWS, "--validation_steps", 1)
    assert len(taken) == 8
    notes = [line for line in run.out.splitlines() if line.startswith("note: the pictures of step ")]
    assert notes == ["note: the pictures of step 2 failed ([Errno 28] No space left on device): training goes on"]
    assert steps_drawn(run) == [0, 1, 3]
    assert len(list((tmp_path / "samples").glob("step_*/*.png"))) == 6
    with Image.open(tmp_path / "samples" / "sheet.webp") as sheet:
        assert sheet.height > 3 * 176
    assert_same_run(run, without)


def test_the_sheet_grows_in_a_resumed_run(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*LEARNS, *DRAWS, "--validation_steps", 2, "--checkpointing_steps", 2]
    run = train(script, prepared, tmp_path, *words)
    rows = []
    for resumed in ([], ["--resume_from_checkpoint", "latest", "--max_train_steps", 6]):
        run = train(script, prepared, tmp_path, *words, *resumed) if resumed else run
        with Image.open(tmp_path / "samples" / "sheet.webp") as sheet:
            rows.append(sheet.height)
    assert steps_drawn(run) == [0, 2, 3, 4, 6]
    assert rows[1] - rows[0] == 2 * (176 + 12)
    whole = train(script, prepared, tmp_path / "whole", *words, "--max_train_steps", 6)
    assert [drawn_at(run, step) for step in (0, 2, 4, 6)] == [drawn_at(whole, step) for step in (0, 2, 4, 6)]


def test_tensorboard_has_the_pictures(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*DRAWS, "--num_validation_images", 2, "--max_train_steps", 1, "--early_warning_steps", 1]
    train(script, prepared, tmp_path, *words, "--report_to", "tensorboard")
    (path,) = (tmp_path / "logs").glob("*/events.out.tfevents*")
    events = EventAccumulator(str(path)).Reload()
    for prompt in (PROMPT, CLASS_PROMPT):  # its pictures side by side
        images = events.Images(f"validation/{prompt}")
        assert [(event.step, event.width, event.height) for event in images] == [(0, 128, 64), (1, 128, 64)]
    assert [event.step for event in events.Scalars("subject_loss")] == [0, 1]
    assert [event.step for event in events.Scalars("class_loss")] == [0, 1]


def test_a_lora_of_every_n_steps(script: Script, prepared: Prepared, tmp_path: Path, without: Run) -> None:
    """Beside the LoRA of the run, which is still the one that is found in the folder."""
    words = [*LEARNS, "--use_ema", "--checkpointing_steps", 2]
    run = train(script, prepared, tmp_path / "my run", *words, "--save_every_n_steps", 2, "--max_train_steps", 4)
    for step in (2, 4):
        for end, name in (("", LORA_FILE), ("_ema", EMA_FILE)):
            path = run.folder / f"my run-step{step:08d}{end}.safetensors"
            assert same_lora(path, run.folder / f"checkpoint-{step}" / name)
    assert len(list(run.folder.glob("*.safetensors"))) == 6
    assert find_lora(str(run.folder)) == run.folder / LORA_FILE


def test_several_processes(prepared: Prepared, tmp_path: Path) -> None:
    """Rank 0 draws while the other waits; the LoRA is that of a run without pictures."""
    shared = [*prepared.flags, "--device", "cpu", "--max_train_steps", 2, *LEARNS]
    for name, words in (("with", [*DRAWS, "--validation_steps", 1, "--early_warning_steps", 1]), ("without", [])):
        result = torchrun(PROJECT / f"{TRAINING_SCRIPT}.py", *shared, *words, "--output_dir", tmp_path / name)
        assert result.code == 0, result.err
    assert same_lora(tmp_path / "with" / LORA_FILE, tmp_path / "without" / LORA_FILE)
    run = Run(tmp_path / "with", "", "")
    assert steps_drawn(run) == [0, 1, 2]
    assert (run.folder / "samples" / "sheet.webp").is_file()
