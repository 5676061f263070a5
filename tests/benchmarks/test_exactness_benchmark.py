"""The benchmark of exactness: what it compares with what, and what it says where bits differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

from sd3_lora.transformer.lora import LORA_FILE

import torch
from exactness import AGAIN, RESUMED, Group, Runs, compare, groups, off_by, time_steps
from safetensors.torch import save_file
from tables import exactness_table


def write_lora(folder: Path, *numbers: float) -> Path:
    """A run's folder whose LoRA has these numbers, and zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.tensor(numbers), "b": torch.zeros(2)}, folder / LORA_FILE)
    return folder


def test_how_far_two_loras_are_apart(tmp_path: Path) -> None:
    """By the tensor where that is most, of its norm; and -0.0 is not 0.0's bits but its number."""
    reference, other = write_lora(tmp_path / "a", 3.0, 4.0), write_lora(tmp_path / "b", 3.0, 4.5)
    assert off_by(other, reference) == (False, pytest.approx(0.1))
    assert off_by(reference, reference) == (True, 0.0)


class FakeRuns(Runs):
    """Writes LoRAs in place of training them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.trained: list[tuple[list[str], bool]] = []

    def train(
        self, group: Group, flags: Sequence[str], steps: int, output: Path, resumed: bool = False
    ) -> dict[str, Any]:
        self.trained.append((list(flags), resumed))
        if "--fail" in flags:
            raise RuntimeError("out of memory")
        write_lora(output, 3.0, 4.5 if "--other" in flags else 4.0)
        for name in (f"checkpoint-{steps // 2}", f"checkpoint-{steps}"):
            (output / name).mkdir(exist_ok=True)
        (output / "losses.jsonl").touch()
        record = {
            "execution": {"captured": True},
            "predicted_bytes": 2,
            "measured_bytes": 1,
            "ms_a_step": 30.0 if "on" in group.flags else 20.0,
        }
        (output / "run.json").write_text(json.dumps(record))
        return record


def test_rows_are_compared_with_their_groups_reference(tmp_path: Path) -> None:
    """A row that fails leaves the others; the resumed one begins with the reference's checkpoint alone."""
    rows = {AGAIN: (), RESUMED: (), "another": ("--other",), "none": ("--fail",)}
    runs = FakeRuns(tmp_path)
    found = list(compare(runs, Group("1024 px", ("--deterministic", "on"), rows)))
    assert [row["name"] for row in found] == [f"1024 px: {name}" for name in rows]
    assert [row.get("bit_equal") for row in found] == [True, True, False, None]
    assert found[2]["off_by"] == pytest.approx(0.1)
    assert found[3]["failed"] == "RuntimeError: out of memory"
    assert runs.trained == [([], False), ([], False), ([], True), (["--other"], False), (["--fail"], False)]


def test_a_group_whose_reference_fails_is_one_row(tmp_path: Path) -> None:
    group = Group("lost", ("--deterministic", "on"), {AGAIN: ()})
    runs = FakeRuns(tmp_path)
    runs.train = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
    assert list(compare(runs, group)) == [{"name": "lost", "failed": "ZeroDivisionError: division by zero"}]


def test_the_exact_step_beside_the_fast_one(tmp_path: Path) -> None:
    """At both sizes, compiled, as a T4's kernel and as flash attention."""
    found = dict(time_steps(FakeRuns(tmp_path), 1))
    assert list(found) == ["1024", "512", "1024 compiled", "1024 as a T4", "512 as a T4", "1024 flash"]
    assert found["512"] == {"fast_ms": 20.0, "exact_ms": 30.0, "ratio": 1.5}


def test_every_plan_at_both_sizes() -> None:
    """With the flag; without it, and with torch's own backward pass, twice and resumed."""
    found = {(group.name, group.flags[-1]): set(group.rows) for group in groups()}
    for size in ("1024 px", "512 px"):
        assert found[size, "on"] >= {AGAIN, RESUMED, "all streamed from the files", "all recomputed, inputs offloaded"}
        assert found[size, "auto"] == found[size, "off"] == {AGAIN, RESUMED}
    assert all("--deterministic" in group.flags for group in groups())


def test_the_table() -> None:
    rows = [
        {"name": "a", "deterministic": "on", "execution": {"captured": True}, "bit_equal": True, "off_by": 0.0},
        {"name": "b", "deterministic": "off", "execution": {"captured": False}, "bit_equal": False, "off_by": 0.0123},
        {"name": "c", "failed": "out of memory"},
    ]
    where = {"machine": "a GPU", "date": "2026-11-28", "model": "sd3-medium"}
    versions = {"torch": "2", "diffusers": "3", "bitsandbytes": "4"}
    times = {"1024": {"fast_ms": 20.0, "exact_ms": 21.0, "ratio": 1.05}}
    lines = exactness_table({**where, "versions": versions, "rows": rows, "step_times": times}).splitlines()
    assert lines[2:4] == ["| a | on | yes | yes |  |", "| b | off | no | no | 1.2e-02 |"]
    assert "| 1024 | 20.0 | 21.0 | 1.050 |" in lines
    assert "out of memory" not in "".join(lines)
