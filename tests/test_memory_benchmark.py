"""The memory benchmark's rows, on a tiny model and a CPU: what was planned, and what a refused run said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import memory
import random_sd3

TINY = {"num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 64}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs cases as the command does."""
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(memory, "SIZES_PX", (64,))

    def run(*cases: memory.Case, part: str = "0/1") -> list[dict]:
        monkeypatch.setitem(memory.SETS, "cards", lambda: iter(cases))
        words = ["cards", "--models", str(tmp_path / "models"), "--device", "cpu", "--part", part]
        assert memory.main([*words, "--result", str(tmp_path / "result.json")]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {"date", "machine", "versions"} <= result.keys()
        assert "bitsandbytes" in result["versions"]
        return result["rows"]

    return run


def case(*flags: str, script: str = memory.Case.script) -> memory.Case:
    return memory.Case("a", "tiny", 64, flags=flags, steps=1, script=script)


def test_a_hollow_model_is_planned_as_a_whole_one_is(rows) -> None:
    bf16 = ("--mixed_precision", "bf16", "--vram_budget_gib", "2")
    trained, planned = rows(case(*bf16), case(*bf16, "--plan"))
    assert (
        trained["plan"] == planned["plan"] == "base unchanged, on the device; 0 of 4 blocks computed anew in backward"
    )
    assert trained["predicted_gib"] == pytest.approx(planned["predicted_gib"], abs=0.005)
    assert trained["parts_gib"]["CUDA"] == 0.75
    assert trained["ms_a_step"] > 0
    assert set(trained["stage_s"]) == {"load transformer", "train"}


def test_the_other_scripts_tell_their_predictions(rows) -> None:
    drawn, encoded = rows(
        case("--vram_budget_gib", "2", "--num_steps", "1", script="inference.py"),
        case("--vram_budget_gib", "2", script="precompute_latents.py"),
    )
    assert drawn["predicted_gib"] > 0.75
    assert encoded["predicted_gib"] > 0.75
    assert "peak: predicted" in encoded["said"][-1]


def test_a_refused_run_is_a_row_with_its_sentence(rows) -> None:
    assert rows(case("--vram_budget_gib", "0.76", "--plan"))[0]["failed"].startswith("error: 0.8 GiB of GPU memory")
    first, second = case("--vram_budget_gib", "3", "--plan"), case("--vram_budget_gib", "0.76", "--plan")
    (row,) = rows(first, second, part="1/2")
    assert row["flags"] == list(second.flags)
