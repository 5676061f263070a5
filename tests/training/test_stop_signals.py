"""Ctrl-C, SIGTERM and SIGHUP: the step ends, a checkpoint is kept, and the printed command goes on, bit for bit."""

from __future__ import annotations

import re
import shlex
import signal
import threading
from pathlib import Path

from sd3_lora.common.command_line import Interrupted
from sd3_lora.training.stop_signals import StopSignals
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared
from training_runs import Script, patch_loss, train

CPU = torch.device("cpu")
WORDS = ["--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.2, "--learning_rate", 0.01]


def send(monkeypatch: pytest.MonkeyPatch, number: int, *micro_steps: int) -> None:
    """Sends the process a signal within these micro-steps, counted from 1."""

    def change(count: int, loss: torch.Tensor) -> torch.Tensor:
        if count in micro_steps:
            signal.raise_signal(number)
        return loss

    patch_loss(monkeypatch, change)


@pytest.mark.parametrize(
    ("name", "code", "micro_step"), [("SIGINT", 130, 1), ("SIGINT", 130, 6), ("SIGTERM", 143, 5), ("SIGHUP", 129, 5)]
)
def test_an_interrupted_run_goes_on_with_the_printed_command(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    micro_step: int,
) -> None:
    """Within the first or the second micro-batch of a step; a micro-batch of the next step is drawn already."""
    if not hasattr(signal, name):
        pytest.skip("Windows has no such signal")
    before = signal.getsignal(getattr(signal, name))
    whole = train(script, prepared, tmp_path / "whole", *WORDS)
    folder = tmp_path / "a folder"
    with monkeypatch.context() as patch:
        send(patch, getattr(signal, name), micro_step)
        run = train(script, prepared, folder, *WORDS, code=code)
    assert signal.getsignal(getattr(signal, name)) is before
    step = (micro_step + 1) // 2
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{step}", "losses.jsonl"]
    sentence = run.err.splitlines()[-1]
    (typed,) = re.findall(r"interrupted: .*/a folder/checkpoint-\d is kept; to go on, type `(.*)`", sentence)
    python, name_of_script, *arguments = shlex.split(typed)
    assert (python, name_of_script) == ("python", f"{TRAINING_SCRIPT}.py")
    result = script(TRAINING_SCRIPT, *arguments)
    assert result.code == 0, result.err
    assert f"checkpoint-{step}: step {step} of 6" in result.out
    for path in (LORA_FILE, "losses.jsonl", "checkpoint-6/state.safetensors", "checkpoint-6/state.json"):
        assert (whole.folder / path).read_bytes() == (folder / path).read_bytes()


def test_the_command_resumes_from_the_latest(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever checkpoint the interrupted command itself went on from."""
    train(script, prepared, tmp_path, "--max_train_steps", 2)
    send(monkeypatch, signal.SIGINT, 1)
    words = ["--max_train_steps", 5, "--resume-from-checkpoint", "checkpoint-2"]
    run = train(script, prepared, tmp_path, *words, code=130)
    assert "checkpoint-3 is kept" in run.err
    assert run.err.count("checkpoint-2") == 0
    assert run.err.endswith(" --max_train_steps 5 --resume_from_checkpoint latest`\n")


def test_a_second_signal_stops_at_once(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, 3, 4)
        run = train(script, prepared, tmp_path / "a", *WORDS, code=143)
    assert "interrupted: no step was kept; to start again, type `python train_" in run.err
    assert run.wrote_no_weights()
    send(monkeypatch, signal.SIGINT, 7, 8)
    run = train(script, prepared, tmp_path / "b", *WORDS, "--checkpointing_steps", 2, code=130)
    assert f"interrupted: {tmp_path / 'b' / 'checkpoint-2'} is kept; to go on, type `python train_" in run.err
    assert [path.name for path in run.folder.glob("*checkpoint*")] == ["checkpoint-2"]


def test_in_the_last_step_nothing_is_interrupted(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(monkeypatch, signal.SIGINT, 3)
    run = train(script, prepared, tmp_path)
    assert "next: python inference.py" in run.out
    assert len(run.lora) == 30


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup` runs on when the terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(str, CPU) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.agreed()
            signal.raise_signal(signal.SIGTERM)
            assert signals.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_ranks_agree_one_step_late() -> None:
    others = [0.0]
    with StopSignals(lambda: "nothing", CPU, lambda mine: mine + others[0]) as signals:
        assert not signals.agreed()
        others[0] = 1.0  # another rank has received one
        assert not signals.agreed()
        others[0] = 0.0
        assert signals.agreed()
        assert not signals.agreed()
        signal.raise_signal(signal.SIGINT)
        assert not signals.agreed()
        assert signals.agreed()
        with pytest.raises(Interrupted, match="nothing") as error:
            signal.raise_signal(signal.SIGTERM)
        assert error.value.number == signal.SIGTERM


def test_another_thread_cannot_have_handlers() -> None:
    """As where a notebook's thread trains: nothing is noted, nothing fails."""
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with StopSignals(str, CPU) as signals:
                assert not signals.agreed()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed
