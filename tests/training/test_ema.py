"""The moving average: its formula, skipped steps, its file, exact resume, and its bytes in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.ema import EMA_BYTES_PER_PARAMETER, MovingAverage
from sd3_lora.training.lora_flags import AverageFlags
from sd3_lora.training.trainables import Trainables, TrainedGroup
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE, read_lora_record
from sd3_lora.transformer.lora_files import find_lora

import pytest
import torch
from conftest import Prepared, Result
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from test_not_finite import Exploding
from test_resume import Interrupted, assert_same_run, interrupt
from training_runs import Script, patch_loss, same_lora, train, training_script, use_float16

FINITE = torch.tensor(1.0)


@pytest.fixture
def trainables() -> Trainables:
    return Trainables(
        [
            TrainedGroup("transformer", flatten_parameters([torch.nn.Parameter(torch.ones(3))]), 0.1),
            TrainedGroup("clip", flatten_parameters([torch.nn.Parameter(torch.zeros(2))]), 0.1),
        ]
    )


def move(trainables: Trainables, step: int) -> None:
    for parameter in trainables.parameters:
        generator = torch.Generator().manual_seed(step)
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_it_is_diffusers_average(trainables: Trainables, decay: float) -> None:
    """But for the first update: a tenth of the start stays, where diffusers takes the parameters whole."""
    average = MovingAverage(trainables, decay)
    start = [parameter.detach().clone() for parameter in trainables.parameters]
    move(trainables, 0)
    average.update(FINITE)
    first = average.state_dict()["averages"]
    for mine, before, now in zip(first, start, trainables.parameters, strict=True):
        torch.testing.assert_close(mine, 0.1 * before + 0.9 * now)
    theirs = EMAModel(trainables.parameters, decay=decay)
    theirs.shadow_params = [value.clone() for value in first]
    theirs.optimization_step = 1
    for step in range(1, 12):
        move(trainables, step)
        average.update(FINITE)
        theirs.step(trainables.parameters)
    for mine, other in zip(average.state_dict()["averages"], theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other)
    assert average.state_dict()["updates"] == 12


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_skipped_step_does_not_count(trainables: Trainables, norm: float) -> None:
    plain, skipping = MovingAverage(trainables, 0.9999), MovingAverage(trainables, 0.9999)
    for step in range(4):
        move(trainables, step)
        plain.update(FINITE)
        skipping.update(FINITE)
        skipping.update(torch.tensor(norm))
    for mine, other in zip(skipping.state_dict()["averages"], plain.state_dict()["averages"], strict=True):
        assert torch.equal(mine, other)
    assert skipping.state_dict()["updates"] == 4


def test_nothing_is_read_by_the_host() -> None:
    """Tensors on the meta device have no values to read."""
    with torch.device("meta"):
        group = TrainedGroup("transformer", flatten_parameters([torch.nn.Parameter(torch.ones(3))]), 0.1)
        average = MovingAverage(Trainables([group]), 0.9999)
        average.update(torch.tensor(1.0))
    assert all(tensor.is_meta for tensor in average.state_dict()["averages"])


def test_the_parameters_come_back_bit_for_bit(trainables: Trainables) -> None:
    average = MovingAverage(trainables, 0.9999)
    start = [parameter.detach().clone() for parameter in trainables.parameters]
    move(trainables, 0)
    trained = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in trainables.parameters]

    def draw_and_fail() -> None:
        with average.in_place():
            assert all(map(torch.equal, trainables.parameters, start))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    for parameter, (place, value) in zip(trainables.parameters, trained, strict=True):
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)


def test_it_is_written_beside_the_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The LoRA is that of a run without; the average is between its start and its end."""
    words = ["--learning_rate", 0.01, "--checkpointing_steps", 2]
    run = train(script, prepared, tmp_path / "ema", "--use_ema", *words)
    plain = train(script, prepared, tmp_path / "plain", *words)
    assert same_lora(run.folder / LORA_FILE, plain.folder / LORA_FILE)
    assert not (plain.folder / EMA_FILE).exists()
    average = load_file(run.folder / EMA_FILE)
    assert average.keys() == run.lora.keys()
    moved = [name for name in average if not torch.equal(average[name], run.lora[name])]
    assert len(moved) == 29  # all but the lora_B of what the last block asks of the text it drops
    for name in moved:
        if ".lora_B." in name:  # which starts at zero
            assert 0 < average[name].norm() < run.lora[name].norm()
    assert read_lora_record(run.folder / EMA_FILE) == read_lora_record(run.folder / LORA_FILE)
    assert (run.folder / "checkpoint-2" / EMA_FILE).is_file()
    assert find_lora(str(run.folder)) == run.folder / LORA_FILE
    flags = json.loads((run.folder / "run.json").read_text())["flags"]
    assert (flags["use_ema"], flags["ema_decay"]) == (True, 0.9999)


def test_its_decay(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """With a decay of 0 the average is the LoRA."""
    run = train(script, prepared, tmp_path / "none", "--use_ema", "--ema_decay", 0)
    assert same_lora(run.folder / LORA_FILE, run.folder / EMA_FILE)
    usual = train(script, prepared, tmp_path / "usual", "--use_ema")
    assert not same_lora(usual.folder / LORA_FILE, usual.folder / EMA_FILE)


def test_the_printed_command_draws_with_it(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out", "--use_ema")
    (line,) = (line for line in run.out.splitlines() if line.startswith("with the moving average: "))
    words = line.split("python inference.py ", 1)[1]
    assert f"--lora {run.folder / EMA_FILE}" in words
    import shlex

    more = ["--num_steps", "1", "--outdir", str(tmp_path / "images"), "--device", "cpu"]
    result: Result = script("inference", *shlex.split(words), *more)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "images").glob("*/img_*.png"))) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exact_resume(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The average, too, ends with the same bits; in fp16 after a step that the scaler skipped."""
    words = ["--use_ema", "--max_train_steps", 6, "--checkpointing_steps", 3, "--learning_rate", 0.01]
    if precision == "fp16":
        use_float16(monkeypatch)

    def skip_second(number: int, loss: torch.Tensor) -> torch.Tensor:
        return Exploding.apply(loss) if number == 2 and precision == "fp16" else loss  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch_loss(patch, skip_second)
        whole = train(script, prepared, tmp_path / "whole", *words)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch_loss(patch, skip_second)
        interrupt(patch, 5)
        with pytest.raises(Interrupted):
            train(script, prepared, folder, *words)
    train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, folder, 6)
    assert same_lora(whole.folder / EMA_FILE, folder / EMA_FILE)
    skipped = sum(line["skipped"] for line in whole.losses)
    assert (skipped > 0) == (precision == "fp16")
    assert load_file(folder / "checkpoint-6" / "state.safetensors")["/ema/updates"] == 6 - skipped


def test_a_run_with_it_stays_one_with_it(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path / "with", "--use_ema")
    resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5]
    run = train(script, prepared, tmp_path / "with", *resumed, code=2)
    assert "was trained with --use_ema: type --use_ema to go on" in run.error
    train(script, prepared, tmp_path / "without")
    run = train(script, prepared, tmp_path / "without", "--use_ema", *resumed, code=2)
    assert "was trained without --use_ema: leave --use_ema out to go on" in run.error


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"use_ema": True, "ema_decay": 1.0}, "--ema_decay 1 must be at least 0 and less than 1: 0.9999 is usual"),
        ({"use_ema": True, "ema_decay": -0.1}, "--ema_decay -0.1 must be at least 0 and less than 1"),
        ({"ema_decay": 0.5}, "--ema_decay 0.5 is of --use_ema: add that, or leave it out"),
    ],
)
def test_bad_values(values: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, ValueError)) as error:
        AverageFlags(**values)
    assert says in str(error.value)


def test_it_does_not_average_an_average(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """The parameters of a schedule-free run are not its LoRA: their average would be of neither."""
    run = train(script, prepared, tmp_path / "out", "--use_ema", "--optimizer", "ScheduleFree-AdamW", code=2)
    assert run.error == (
        "--use_ema does not go with --optimizer schedule_free_adamw, whose LoRA is an average of the run already: "
        "leave one of them out"
    )
    assert run.wrote_no_weights()


def test_the_plan_counts_it(prepared: Prepared, miniature_files: Any) -> None:
    module = training_script()

    def bytes_per_parameter(*words: str) -> float:
        flags = TrainingFlags(*module.COMMAND_LINE.parse(list(words)))
        task = module.training_task(flags, miniature_files, Buckets.square(64), torch.float16, torch.device("cpu"), 1)
        return float(task.shape.bytes_per_parameter)

    assert bytes_per_parameter("--use_ema") - bytes_per_parameter() == EMA_BYTES_PER_PARAMETER == 4
