"""The memory benchmark's rows, on a tiny model and a CPU: what was planned, and what a refused run said."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import memory
import picture
import random_sd3

TINY = {"num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 64}
SMALL_CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_T5 = {"vocab_size": 2048, "d_model": 4096, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in place of the full-size ones."""
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY, "sd3-medium": TINY})
    clips = {
        name: {**SMALL_CLIP, "projection_dim": width}
        for name, width in (("text_encoder", 768), ("text_encoder_2", 1280))
    }
    monkeypatch.setattr(random_sd3, "CLIPS", clips)
    monkeypatch.setattr(random_sd3, "T5", SMALL_T5)
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    monkeypatch.setattr(memory, "SIZES_PX", (64,))


@pytest.fixture
def rows(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs cases as the command does."""

    def run(*cases: memory.Case, part: str = "0/1", code: int = 0) -> list[dict]:
        monkeypatch.setitem(memory.SETS, "cards", lambda: iter(cases))
        words = ["cards", "--models", str(tmp_path / "models"), "--device", "cpu", "--part", part]
        assert memory.main([*words, "--result", str(tmp_path / "result.json")]) == code
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


# The sets as they are, on the tiny model


def tiny(case: memory.Case) -> memory.Case:
    """The same row of the tiny model; a budget becomes an ample one, or one that is too small if that is meant."""
    words = list(case.flags)
    if "--vram_budget_gib" in words:
        words[words.index("--vram_budget_gib") + 1] = "0.76" if case.smallest else "3"
    small = {"model": "tiny", "resolution": 64, "rank": 2}
    return replace(case, flags=tuple(words), steps=min(case.steps, 3), **small)


def test_the_ladder(rows) -> None:
    cases = [tiny(case) for case in memory.SETS["ladder"]() if case.exactness != "rounding"]
    found = rows(*cases[:3], *cases[-4:-1])
    assert not [row["failed"] for row in found if "failed" in row]
    assert all(row["step_ms"] > 0 for row in found[1:])
    assert found[1]["beside"] == ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
    assert found[1]["host_gib"] > found[2]["host_gib"]
    assert [bool(row.get("refused")) for row in found] == [False] * 3 + [True] * 3
    assert "in 4 bits" in found[-2]["plan"]


def test_text_encoders(rows) -> None:
    cases = [tiny(case) for case in memory.SETS["text"]()]
    few = [replace(case, batch=min(case.batch, 10)) for case in cases]
    tight = [case for case in few if case.smallest]
    resident, streamed, long = rows(few[1], tight[0], tight[-1])
    assert resident["stage_s"].keys() != streamed["stage_s"].keys()
    assert "one block at a time, 1 prompt at a time needs at least" in streamed["refused"][0]
    assert resident["predicted_gib"] == 0  # no budget, no GPU: nothing was planned
    assert 0.75 < streamed["predicted_gib"] < 0.9
    assert long["said"][0].startswith("T5 in fp16, one block at a time")


def test_saving_no_more_than_training(rows) -> None:
    cases = [tiny(case) for case in memory.SETS["saving"]()]
    _, training, checkpoints, picture = rows(*cases)
    assert checkpoints["allocated_gib"].keys() == training["allocated_gib"].keys()
    assert "denoise (fp32)" in picture["stage_s"]


def test_the_largest_size_that_fits_a_card(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SIZES_PX", (32, 64, 128))
    cases = list(memory.SETS["cards_run"]())
    assert [case.model for case in cases] == ["tiny"] * 8 + ["sd3-medium"] * 8  # each model once a process
    assert cases[-1].efficient_attention
    (row,) = rows(replace(cases[-1], flags=("--vram_budget_gib", "1.2", "--mixed_precision", "bf16")))
    assert row["resolution"] in (32, 64, 128)
    assert row["plan"]


def test_a_row_that_breaks_is_noted_and_the_next_runs(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "weights_beside", lambda names, _: 1 / 0 if names else contextlib.nullcontext())
    broken, good = rows(replace(case(), beside=("vae",)), case(), code=1)
    assert broken["failed"] == "ZeroDivisionError: division by zero"
    assert good["stage_s"]


def test_pictures_in_processes_of_their_own(small: None, tmp_path: Path) -> None:
    words = ["--models", tmp_path / "models", "--turns", 1, "--steps", 1, "--size", 64, "--device", "cpu"]
    assert picture.main([*map(str, words), "--result", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    stock, exact, nf4 = result["rows"]
    assert stock["name"] == picture.STOCK
    assert "encode with T5 (fp32)" in exact["stage_s"]
    assert all(row["elapsed_s"] > 1 for row in (stock, exact, nf4))
