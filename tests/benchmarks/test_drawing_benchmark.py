"""The benchmark of drawing: its rows, on a tiny model and a CPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, Prepared

sys.path.insert(0, str(PROJECT / "benchmarks"))


@pytest.mark.parametrize("only", [["diffusers' pipeline", "captured"]])
def test_rows_are_drawn_and_compared(prepared: Prepared, tmp_path: Path, only: list[str]) -> None:
    import drawing

    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    words = ["--models", tmp_path, "--model", model, "--device", "cpu", "--sizes", 64, 64, "--steps", 1]
    words += ["--pictures", 2, "--result", tmp_path / "result.json", "--only", *only]
    assert drawing.main([str(word) for word in words]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert all(row["s_a_picture"] > 0 for row in rows if "s_a_picture" in row)
