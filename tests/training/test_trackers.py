"""Trackers: those that are installed, a sentence for the others, never a login prompt."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from sd3_lora.training.trackers import usable_trackers

import pytest
from conftest import Prepared
from training_runs import Script, train

Installed = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """`installed("wandb")`: these modules are found, and no other."""

    def call(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)

    return call


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is put back, whatever the test sets
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))


def test_none(installed: Installed) -> None:
    installed("tensorboard", "wandb")
    assert usable_trackers(["none"]) == []
    assert usable_trackers(["tensorboard", "none"]) == []


def test_tensorboard_when_it_is_installed(installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tensorboard", "tensorboardX"):
        installed(name)
        assert usable_trackers(["tensorboard"]) == ["tensorboard"]
    installed()
    assert usable_trackers(["tensorboard"]) == []  # the default: no word about it
    assert capsys.readouterr().out == ""


def test_one_that_is_not_installed_is_a_sentence(installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    installed("tensorboard")
    assert usable_trackers(["wandb", "comet_ml", "tensorboard"]) == ["tensorboard"]
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is not installed, so nothing is sent to it: type `pip install {name}` to have it"
        for name in ("wandb", "comet_ml")
    ]
    assert usable_trackers(["all"]) == ["tensorboard"]
    assert capsys.readouterr().out == ""


def test_wandb_without_a_key_is_offline(installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    installed("wandb")
    assert usable_trackers(["wandb"]) == ["wandb"]
    assert os.environ["WANDB_MODE"] == "offline"
    assert capsys.readouterr().out == (
        "wandb has no key, so it logs offline: type `wandb login`, or `wandb sync` afterwards\n"
    )


@pytest.mark.parametrize("where", ["WANDB_API_KEY", "WANDB_MODE", "netrc"])
def test_wandb_with_a_key_is_left_alone(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    installed("wandb")
    if where == "netrc":
        path = tmp_path / (".netrc" if os.name != "nt" else "_netrc")
        path.write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
        path.chmod(0o600)
    else:
        monkeypatch.setenv(where, "disabled")
    assert usable_trackers(["wandb"]) == ["wandb"]
    assert os.environ.get("WANDB_MODE") == ("disabled" if where == "WANDB_MODE" else None)
    assert capsys.readouterr().out == ""


def test_a_broken_netrc_is_no_key(installed: Installed, tmp_path: Path) -> None:
    installed("wandb")
    (tmp_path / (".netrc" if os.name != "nt" else "_netrc")).write_text("machine machine machine {")
    assert usable_trackers(["wandb"]) == ["wandb"]
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_run_goes_on_without_wandb(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else original(name, *more)
    )
    run = train(script, prepared, tmp_path, "--report_to", "wandb")
    assert run.out.count("wandb is not installed, so nothing is sent to it: type `pip install wandb` to have it") == 1
    assert len(run.losses) == 3


def test_tensorboard_has_every_loss(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--report_to", "tensorboard", "--logging_dir", "my logs", "--lr_scheduler", "linear"]
    run = train(script, prepared, tmp_path, *flags, "--max_train_steps", 12)
    (path,) = (tmp_path / "my logs").glob("*/events.out.tfevents*")  # below it, another for the flags
    events = EventAccumulator(str(path)).Reload()
    for name in ("loss", "learning_rate"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in run.losses]
        assert scalars == expected
        assert len(scalars) == 12


def test_nothing_is_tracked_unless_asked(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path, "--report_to", "none")
    assert not (tmp_path / "logs").exists()


def test_an_unknown_tracker(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out", "--report_to", "tensorboard,mlflow", code=2)
    assert run.error == "--report_to mlflow is unknown: type tensorboard, wandb, comet_ml, all or none"
    assert not run.folder.exists()
