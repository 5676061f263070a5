"""The benchmark of drawing: its rows and its table, on a tiny model and a CPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, Prepared

sys.path.insert(0, str(PROJECT / "benchmarks"))


def test_rows_are_drawn_compared_and_shown(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import drawing
    from tables import drawing_table

    rows = [drawing.Case(drawing.STOCK, 64, 4), drawing.Case("merged", 64, None, (), "unmerged")]
    rows += [drawing.Case("unmerged", 64, None, ("--unmerged",)), drawing.Case("first PNG", 64, None)]
    monkeypatch.setattr(drawing, "cases", lambda _: rows)
    monkeypatch.setattr(drawing, "run_first", lambda *_: {"first_png_s": 1.0, "device_gib": 0.0})
    model = shutil.copytree(prepared.model, tmp_path / "model")
    words = ["--models", tmp_path, "--model", model, "--device", "cpu", "--steps", 1, "--pictures", 2]
    words += ["--result", tmp_path / "result.json", "--only", "pipeline", "merged", "first"]
    assert drawing.main([str(word) for word in words]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == [case.name for case in rows]
    _, merged, unmerged, _ = result["rows"]
    assert (merged["plan"]["merged"], unmerged["plan"]["merged"]) == (True, False)
    assert 0 <= merged["mean_off_by"] < 0.1
    lines = drawing_table(result).splitlines()
    assert lines[3].startswith("| merged | 64 | 1 | ")
    assert lines[3].endswith(f" | {merged['mean_off_by']} |")
    assert "| first PNG | 1.0 | 0.00 |" in lines
