"""The ladder's picture: a bar a row, the same numbers on a light and a dark page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

pytest.importorskip("matplotlib")
sys.path.insert(0, str(PROJECT / "benchmarks"))

import plot_ladder

BESIDE = {"text_encoder": 0.5, "text_encoder_2": 2.5, "text_encoder_3": 18.0, "vae": 0.3}


def row(name: str, driver_gib: float, beside: dict[str, float]) -> dict:
    parts = {"CUDA": 0.8, "weights": 7.5, "LoRA and optimizer": 0.1, "activations": 5.0}
    row = {"name": name, "driver_gib": driver_gib, "parts_gib": parts, "beside_gib": beside}
    return {**row, "host_gib": 1.2, "step_ms": 310.4, "exactness": "exact"}


def test_the_parts_add_up_to_what_the_driver_said() -> None:
    assert plot_ladder.parts_of(row("a", 41.0, BESIDE)) == pytest.approx([0.8, 7.5, 0.3, 21.0, 11.4])
    assert plot_ladder.parts_of(row("a", 12.0, {})) == pytest.approx([0.8, 7.5, 0.0, 0.0, 3.7])
    assert len(plot_ladder.PARTS) == len(plot_ladder.COLOURS["dark"]) == len(plot_ladder.COLOURS["light"]) == 5


def test_two_pictures_of_the_rows_that_ran(tmp_path: Path) -> None:
    rows = [row("warm-up", 50.0, {}), row("all", 41.0, BESIDE), row("less", 12.0, {}), {"name": "x", "failed": "y"}]
    (tmp_path / "ladder.json").write_text(json.dumps({"rows": rows}))
    assert plot_ladder.main([str(tmp_path / "ladder.json"), str(tmp_path / "ladder")]) == 0
    light, dark = (tmp_path / f"ladder-{theme}.svg" for theme in ("light", "dark"))
    assert light.read_text() != dark.read_text()
    first = light.read_bytes()
    assert plot_ladder.main([str(tmp_path / "ladder.json"), str(tmp_path / "ladder")]) == 0
    assert light.read_bytes() == first  # a picture of the same numbers is the same file
