"""The loss log: what it writes, when it stops a run, and how it is cut back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.checksums import without_checksum
from sd3_lora.common.command_line import UserError
from sd3_lora.training.loss_log import MAX_SKIPPED_IN_A_ROW, READ_EVERY, LossLog, PendingStep

import pytest
import torch

INF, NAN = math.inf, math.nan


def step(number: int, loss: float = 0.5, norm: float = 2.0, skipped: bool = False) -> PendingStep:
    return PendingStep(number, torch.tensor(loss), torch.tensor(norm), 1e-3, skipped, "a.png, b.png", (0.25, 1 / 3))


def new_log(path: Path | None, dtype: str = "fp32", mean: Callable[[torch.Tensor], torch.Tensor] | None = None):
    return LossLog(path, mean or (lambda losses: losses), dtype)


def test_one_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path)
    log.add(step(1, loss=0.25))
    log.add(step(2, loss=0.75, norm=4.0))
    assert not path.exists()  # nothing is read at each step
    lines = log.read()
    log.add(step(3))
    (last,) = log.read()
    rest = {"skipped": False, "sigmas": [0.25, 0.3333]}
    expected = [
        {"step": 1, "loss": 0.25, "gradient_norm": 2.0, "learning_rate": 0.001, **rest},
        {"step": 2, "loss": 0.75, "gradient_norm": 4.0, "learning_rate": 0.001, **rest},
        {"step": 3, "loss": 0.5, "gradient_norm": 2.0, "learning_rate": 0.001, **rest},
    ]
    assert [without_checksum(json.loads(line)) for line in path.read_text().splitlines()] == expected
    assert [(line.step, line.loss) for line in lines] == [(1, 0.25), (2, 0.75)]
    assert last.step == 3
    assert log.recent_mean == pytest.approx(0.5)
    assert log.read() == []
    assert READ_EVERY == 10  # detection lags by no more


def test_the_recent_mean_forgets() -> None:
    log = new_log(None)
    assert math.isnan(log.recent_mean)
    for number in range(100):
        log.add(step(number, loss=float(number)))
    log.read()
    assert log.recent_mean == pytest.approx(sum(range(50, 100)) / 50)


def test_losses_are_averaged_over_the_ranks(tmp_path: Path) -> None:
    """One call for all pending steps; the norms are alike on every rank already."""
    seen: list[torch.Tensor] = []

    def mean(losses: torch.Tensor) -> torch.Tensor:
        seen.append(losses)
        return losses / 2

    log = new_log(tmp_path / "losses.jsonl", mean=mean)
    log.add(step(1, loss=1.0))
    log.add(step(2, loss=3.0))
    assert [(line.loss, line.gradient_norm) for line in log.read()] == [(0.5, 2.0), (1.5, 2.0)]
    assert [losses.tolist() for losses in seen] == [[1.0, 3.0]]


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (NAN, 1.0, "the loss is nan at step 2"),
        (INF, 1.0, "the loss is inf at step 2"),
        (0.5, INF, "the gradient norm is inf at step 2"),
        (0.5, NAN, "the gradient norm is nan at step 2"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "cure"), [("fp32", ": lower --learning_rate;"), ("bf16", "type --mixed_precision no")]
)
def test_what_is_not_finite_stops_the_run(
    tmp_path: Path, loss: float, norm: float, what: str, dtype: str, cure: str
) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path, dtype)
    log.add(step(1))
    log.add(step(2, loss, norm))
    with pytest.raises(UserError) as error:
        log.read()
    assert what in str(error.value)
    assert cure in str(error.value)
    assert dtype in str(error.value)
    assert "a.png, b.png" in str(error.value)
    assert not path.exists() or "NaN" not in path.read_text()


def test_a_skipped_step_may_have_an_infinite_gradient_but_no_infinite_loss(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path, "fp16")
    log.add(step(1, norm=INF, skipped=True))
    log.add(step(2))
    assert [(line.gradient_norm, line.skipped) for line in log.read()] == [(None, True), (2.0, False)]
    assert json.loads(path.read_text().splitlines()[0])["gradient_norm"] is None
    assert log.skipped == 1
    log.add(step(3, loss=NAN, norm=NAN, skipped=True))
    with pytest.raises(UserError, match="the loss is nan at step 3 in fp16"):
        log.read()


def test_twenty_skips_in_a_row_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path, "fp16")
    assert MAX_SKIPPED_IN_A_ROW == 20
    for number in range(1, 20):
        log.add(step(number, norm=INF, skipped=True))
    log.add(step(20))  # a good one: the count starts again
    for number in range(21, 40):
        log.add(step(number, norm=INF, skipped=True))
    with pytest.raises(UserError, match="20 steps in a row had infinite gradients in fp16 up to step 40: type --mixed"):
        log.add(step(40, norm=INF, skipped=True))
    assert log.skipped == 39
    assert len(path.read_text().splitlines()) == 40  # the log shows what happened


def test_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path)
    for number in range(1, 11):
        log.add(step(number, loss=number / 7))
    log.read()
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 11, "lo')  # torn off by a kill
    new_log(path).cut_back(10)
    assert path.read_text() == whole
    resumed = new_log(path)
    resumed.cut_back(4)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
    assert resumed.recent_mean == pytest.approx((1 + 2 + 3 + 4) / 7 / 4)  # as of the run that was not interrupted
    new_log(path).cut_back(0)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["losses.jsonl"]


def test_a_damaged_log_is_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.jsonl"
    log = new_log(path)
    for number in range(1, 5):
        log.add(step(number))
    log.read()
    first, second, third, fourth = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second.replace(b"{", b"\xff") + b"[1]\n" + third.replace(b'"step"', b'"stop"') + fourth)
    new_log(path).cut_back(4)
    assert path.read_bytes() == first + fourth
    assert capsys.readouterr().out == f"note: {path} is damaged in line 2, 3, 4, which is left out\n"


def test_ranks_that_do_not_write(tmp_path: Path) -> None:
    log = new_log(None)
    log.cut_back(0)
    log.add(step(1))
    assert len(log.read()) == 1
    new_log(tmp_path / "none.jsonl").cut_back(3)  # a new run
    assert list(tmp_path.iterdir()) == []
    log.add(step(2, loss=NAN))
    with pytest.raises(UserError):
        log.read()  # every rank stops


def test_a_scaler_that_skips_for_a_while_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = new_log(tmp_path / "losses.jsonl", "fp16")
    for number in range(1, 20):
        log.add(step(number, norm=INF, skipped=True))
        said = capsys.readouterr().out
        expected = "note: the scaler has skipped 8 steps in a row up to step 8, for infinite gradients in fp16: "
        assert said.startswith(expected) if number == 8 else said == ""
    log.add(step(20))
    for number in range(21, 28):
        log.add(step(number, norm=INF, skipped=True))
    assert capsys.readouterr().out == ""  # seven
