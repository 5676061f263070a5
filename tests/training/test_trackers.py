"""Trackers: those that are installed, a sentence for the others, never a login prompt."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from sd3_lora.training.trackers import usable_trackers

import pytest
import torch
from conftest import Prepared
from training_runs import Script, patch_loss, train

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
    names = ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_DIR")
    for name in (*names, "WANDB_IDENTITY_TOKEN_FILE"):
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


NETRC = "machine {host}\n  login user\n  password 0123\n"


@pytest.mark.parametrize("where", ["NETRC", "~/.netrc", "~/_netrc", "settings", "own settings", "mode"])
def test_wandb_finds_a_key_wherever_it_looks(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    installed("wandb")
    monkeypatch.chdir(tmp_path)
    texts = {"settings": "[default]\napi_key = 0123\n", "mode": "[default]\nmode = disabled\n"}
    texts["own settings"] = texts["settings"]
    places = {
        "NETRC": tmp_path / "elsewhere",
        "settings": tmp_path / ".config" / "wandb" / "settings",
        "own settings": tmp_path / "wandb" / "settings",
        "mode": tmp_path / "wandb" / "settings",
    }
    path = places.get(where, tmp_path / where.removeprefix("~/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(texts.get(where, NETRC.format(host="api.wandb.ai")))
    if where == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    assert usable_trackers(["wandb"]) == ["wandb"]
    assert "WANDB_MODE" not in os.environ
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["environment", "settings"])
def test_wandb_on_a_host_of_ones_own(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    installed("wandb")
    monkeypatch.chdir(tmp_path)
    if how == "environment":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8443/")
    else:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example:8443\n")
    (tmp_path / ".netrc").write_text(NETRC.format(host="api.wandb.ai"))
    usable_trackers(["wandb"])
    assert os.environ.pop("WANDB_MODE") == "offline"  # that key is of another host
    (tmp_path / ".netrc").write_text(NETRC.format(host="wandb.example"))
    usable_trackers(["wandb"])
    assert "WANDB_MODE" not in os.environ


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


@pytest.mark.parametrize("fault", ["import", "folder", "writer"])
def test_a_broken_tensorboard_does_not_stop_training(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    pytest.importorskip("tensorboard")
    import torch.utils.tensorboard as tensorboard

    def broken(*_: object, **__: object) -> None:
        raise TypeError("Descriptors cannot be created directly.\nMore.")

    tmp_path.joinpath("out").mkdir()
    if fault == "import":
        monkeypatch.delattr(torch.utils, "tensorboard")
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    elif fault == "folder":
        (tmp_path / "out" / "logs").touch()
    else:
        monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", broken)
    run = train(script, prepared, tmp_path / "out", "--report_to", "tensorboard", "--max_train_steps", 12)
    notes = [line for line in run.out.splitlines() if line.startswith("note: tensorboard does not work (")]
    assert len(notes) == 1
    assert notes[0].endswith("): training goes on without it, and losses.jsonl has what it would have shown")
    if fault == "writer":
        assert "(TypeError: Descriptors cannot be created directly.)" in notes[0]
    assert len(run.losses) == 12
    assert run.lora


def test_an_interrupted_run_has_sent_its_losses(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    closed: list[bool] = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda _: closed.append(True))
    patch_loss(monkeypatch, lambda number, loss: (number == 2 and signal.raise_signal(signal.SIGINT), loss)[1])
    train(script, prepared, tmp_path, "--report_to", "tensorboard", code=130)
    assert closed


@pytest.mark.parametrize("folder", ["../logs", "../../x", "logs/../../x", ".."])
def test_logs_stay_in_the_output_folder(script: Script, prepared: Prepared, tmp_path: Path, folder: str) -> None:
    run = train(script, prepared, tmp_path / "out", "--logging_dir", folder, code=2)
    assert run.error == (f"--logging_dir {folder} leaves the output folder: type a name such as logs, or a full path")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_tracked_unless_asked(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path, "--report_to", "none")
    assert not (tmp_path / "logs").exists()


def test_an_unknown_tracker(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out", "--report_to", "tensorboard,mlflow", code=2)
    assert run.error == "--report_to mlflow is unknown: type tensorboard, wandb, comet_ml, all or none"
    assert not run.folder.exists()
