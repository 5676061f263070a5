"""Progress on a terminal and without one."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

from sd3_lora.common import progress
from sd3_lora.common.progress import Progress

import pytest
from conftest import PROJECT, Prepared

MOST_LINES = 25
GIB = r"host \d+\.\d GiB(, GPU \d+\.\d GiB)?"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock for the lines that a test sets, and for tqdm."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def count(file: io.StringIO, clock: list[float], seconds: float, steps: int = 100, **more: object) -> list[str]:
    """What is written in so many steps of so many seconds."""
    with Progress(total=steps, desc="steps", file=file, disable=False, **more) as bar:
        for step in range(steps - bar.n):
            clock[0] += seconds
            bar.update()
            bar.set_postfix_str(f"loss {step}", refresh=False)
    return file.getvalue().split("\n")


def test_a_bar_shows_the_time_left_and_the_memory(clock: list[float]) -> None:
    text = "\n".join(count(Terminal(), clock, seconds=1))
    assert re.search(rf"\rsteps:  50%\|.*\| 50/100 \[00:50 left,  1\.00it/s, {GIB}, loss 48\]", text)
    assert "\x1b[3" not in text  # no colour, so that NO_COLOR has nothing to forbid


def test_what_follows_a_bar_that_goes_away_begins_at_the_left(clock: list[float]) -> None:
    text = "\n".join(count(Terminal(), clock, seconds=1, leave=False))
    assert re.search(r"\r +\r$", text)


def test_without_a_terminal_there_is_a_line_for_a_tenth(clock: list[float]) -> None:
    lines = count(io.StringIO(), clock, seconds=2)
    assert len(lines) == 11
    assert lines.pop() == ""
    assert not any("\r" in line for line in lines)
    assert re.fullmatch(rf"steps: 10 of 100, 03:00 left, {GIB}, loss 8", lines[0])
    assert re.fullmatch(rf"steps: 100 of 100, {GIB}, loss 98", lines[-1])


def test_what_is_done_soon_has_no_line(clock: list[float]) -> None:
    assert count(io.StringIO(), clock, seconds=0.09) == [""]
    assert len(count(io.StringIO(), clock, seconds=0.35)) == 4  # one for each 10 seconds


def test_a_run_that_goes_on_counts_its_own_steps(clock: list[float]) -> None:
    lines = count(io.StringIO(), clock, seconds=20, initial=50)
    assert re.fullmatch(rf"steps: 51 of 100, 16:20 left, {GIB}", lines[0])


def test_a_line_above_leaves_lines_alone(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with Progress(total=10, desc="steps", file=file, disable=False):
        Progress.write("a note")
    assert capsys.readouterr().out == "a note\n"
    assert file.getvalue() == ""


def test_the_scripts_are_quiet_in_a_pipe(prepared: Prepared, tmp_path) -> None:
    """Whole lines, no more than 25 of each script, whatever is drawn on a terminal; and no library says anything."""
    model = ["--pretrained_model_name_or_path", str(prepared.model)]
    pictures = [*model, "--instance_data_dir", str(prepared.pictures), "--instance_prompt", "a photo of sks robot"]
    artefacts = ["--data_df_path", str(tmp_path / "e.parquet"), "--latents_path", str(tmp_path / "latents")]
    prompt = ["--validation_prompt", "a sks robot"]
    lora = ["--output_dir", str(tmp_path / "lora"), "--max_train_steps", "30", "--report_to", "none"]
    drawn = ["--prompt", "a sks robot", "--num_steps", "2", "--outdir", str(tmp_path / "pictures")]
    calls = [
        ("compute_embeddings", [*pictures, *prompt, "--output_path", artefacts[1]]),
        ("precompute_latents", [*pictures, "--output_path", artefacts[3]]),
        ("train_dreambooth_sd3_lora_miniature", [*pictures, *artefacts, *prompt, "--validation_num_steps", "2", *lora]),
        ("inference", [*model, *artefacts[:2], "--lora", str(tmp_path / "lora"), *drawn]),
    ]
    code = f"""
import importlib, sys
for name, words in {calls!r}:
    assert importlib.import_module(name).main(words) == 0
    print("end of", name)
    print("end of", name, file=sys.stderr)
"""
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == [f"end of {name}" for name, _ in calls]
    assert "\r" not in ended.stdout
    said = re.split(r"end of \w+\n", ended.stdout)
    assert len(said) == len(calls) + 1
    assert all(len(each.splitlines()) <= MOST_LINES for each in said)


def test_every_bar_is_ours() -> None:
    """tqdm's own would fill a pipe."""
    paths = [*PROJECT.glob("*.py"), *(PROJECT / "sd3_lora").rglob("*.py")]
    own = re.compile(r"\btqdm(\.auto)?\(|import tqdm\b")
    assert [path.name for path in paths if own.search(path.read_text(encoding="utf-8"))] == ["progress.py"]
