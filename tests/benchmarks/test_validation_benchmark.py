"""The benchmark of validation: what it measures and compares, on a tiny model and a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

from sd3_lora.common.picture_size import PictureSize

import memory
import random_sd3
import tables
import validation

TINY = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 64}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in place of the full-size one."""
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    monkeypatch.setattr(memory, "SIZES_PX", (64,))


def small_rows(*names: str) -> list[validation.Row]:
    """Of the table, at 64 px and without what needs a GPU."""
    sizes = (PictureSize(48, 80), PictureSize(80, 48))
    return [
        replace(row, resolution=64, num_steps=2, sizes=sizes if row.sizes else (), flags=row.flags[:2])
        for row in validation.rows()
        if row.name in names
    ]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, code: int = 0) -> dict:
    chosen = small_rows(*names)
    monkeypatch.setattr(validation, "rows", lambda: iter(chosen))
    words = ["--models", str(tmp_path / "models"), "--model", "tiny", "--device", "cpu"]
    assert validation.main([*words, "--result", str(tmp_path / "result.json")]) == code
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.usefixtures("small")
def test_a_timed_row_beside_the_stock_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, "no budget")
    (row,) = result["rows"]
    assert (row["kind"], row["num_steps"]) == ("timed", 2)
    assert row["drawing_s"] >= row["denoise_s"] + row["decode_s"] > 0
    assert row["step_ms"] > 0
    assert (row["step_gib"], row["drawing_gib"], row["predicted_gib"]) == (0, 0, {})  # of a GPU
    assert row["written_s"] >= 0
    assert result["stock"]["s"] >= result["stock"]["unwritten_s"] > 0
    result["stock"]["s"], row["drawing_s"] = 2.0, 1.0
    lines = tables.validation_table({**result, "versions": dict.fromkeys(("torch", "diffusers", "bitsandbytes"), 1)})
    assert lines.splitlines()[2].startswith("| no budget | 1.0 | 0.50 | ")
    assert lines.splitlines()[3] == "| the stock pipeline | 2.0 | | | | | |"


@pytest.mark.usefixtures("small")
def test_exact_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [row.name for row in validation.rows() if row.kind == "exact" and "streamed" not in row.name]
    assert names == ["as it is", "prior term", "masks", "LoKr", "buckets", "rates by pattern"]
    result = run(tmp_path, monkeypatch, *names)
    assert [(row["name"], row["bit_equal"], row["off_by"]) for row in result["rows"]] == [(n, True, 0) for n in names]


@pytest.mark.usefixtures("small")
def test_a_difference_and_a_failure_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "off_by", lambda *_: (False, 0.1))
    original = validation.words_of
    monkeypatch.setattr(
        validation,
        "words_of",
        lambda row, *words: [*original(row, *words), *(["--rank", 0] if row.name == "masks" else [])],
    )
    differs, failed = run(tmp_path, monkeypatch, "as it is", "masks", code=1)["rows"]
    assert differs["bit_equal"] is False
    where = {"machine": "M", "date": "D", "versions": dict.fromkeys(("torch", "diffusers", "bitsandbytes"), 1)}
    said = tables.validation_table(
        {**where, "prompts": 4, "stock": {}, "rows": [differs, {**failed, "name": "warm-up"}]}
    )
    assert "without: none. Other bits: as it is. M, D," in said
    assert "rank" in failed["failed"]
