"""The memory benchmark's rows, on a tiny model and a CPU: what was planned, and what a refused run said."""

from __future__ import annotations

import contextlib
import gc
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
import tables
import torch

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
    assert trained["placement"] == planned["placement"]
    assert (trained["placement"]["blocks"], trained["placement"]["streamed"]) == (4, 0)
    assert trained["placement"]["recomputed"] == 0
    assert trained["execution"]["captured"] is False
    assert trained["predicted_gib"] == pytest.approx(planned["predicted_gib"], abs=0.005)
    assert trained["parts_gib"]["CUDA"] == 0.75
    assert trained["ms_a_step"] > 0
    assert set(trained["stage_s"]) == {"load transformer", "train"}


def test_a_step_is_streamed_as_asked(rows) -> None:
    def streamed(buffers: int, staying: int) -> memory.Case:
        flags = ("--recompute_blocks", "3", "--stream_blocks", str(4 - staying), "--stream_buffers", str(buffers))
        return replace(case(*flags, "--vram_budget_gib", "2"), steps=4, streamed=(buffers, staying))

    resident = replace(case("--gradient_checkpointing", "--vram_budget_gib", "2"), steps=4, name="resident")
    found = rows(resident, streamed(2, 0), streamed(3, 2))
    kept = [[row["placement"][key] for key in ("streamed", "buffers", "recomputed", "blocks")] for row in found]
    assert kept == [[0, 0, 4, 4], [4, 2, 3, 4], [2, 3, 3, 4]]
    assert [tables.streaming(row["placement"]) for row in found] == [
        "16-bit",
        "16-bit streamed",
        "16-bit, 2 of its 4 blocks streamed",
    ]
    assert all(row["predicted_gib"] > 0.75 for row in found)
    assert all(row["step_ms"] > 0 for row in found)
    result = {"machine": "M", "date": "D", "versions": dict.fromkeys(("torch", "diffusers", "bitsandbytes"), "1")}
    for row, ms in zip(found, (100, 170, 125), strict=True):
        row |= {"step_ms": ms, "measured_gib": ms / 100, "link_gb_per_s": 50.2}
    lines = tables.streaming_table({**result, "rows": found}).splitlines()
    assert lines[0] == "| x resident | 2 buffers | 3 buffers, 2 blocks stay | resident, ms |"
    assert lines[2:4] == ["| 64 px | 1.70 | 1.25 | 100 |", "| GiB | 1.70 | 1.25 | 1.00 |"]
    assert lines[-1].startswith("The link copied 50 to 50 GB/s. M, D, torch 1,")


def test_the_other_scripts_tell_their_predictions(rows) -> None:
    drawn, encoded = rows(
        case("--vram_budget_gib", "2", "--num_steps", "1", script="inference.py"),
        case("--vram_budget_gib", "2", script="precompute_latents.py"),
    )
    assert drawn["predicted_gib"] > 0.75
    assert encoded["predicted_gib"] > 0.75
    assert (drawn["placement"]["blocks"], encoded["settings"]["side_px"]) == (4, None)
    assert {"CUDA", "VAE"} <= encoded["parts_gib"].keys()


def test_a_refused_run_is_a_row_with_its_sentence(rows) -> None:
    (refused,) = rows(case("--vram_budget_gib", "0.76", "--plan"))
    assert refused["failed"].startswith("error: 0.76 GiB of GPU memory")
    assert f"at least {refused['needed_gib']} GiB" in refused["failed"]
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


def table(tmp_path: Path, name: str) -> list[str]:
    """What tables.py prints of the last result, called so."""
    return tables.printer(name)(json.loads((tmp_path / "result.json").read_text())).splitlines()


def test_the_ladder(rows, tmp_path: Path) -> None:
    cases = [tiny(case) for case in memory.SETS["ladder"]() if case.exactness != "rounding"]
    nf4 = replace(cases[-4], flags=(*cases[-4].flags, "--vram_budget_gib", "3"))
    found = rows(*cases[:3], nf4, *cases[-2:])
    kept = [[row["placement"][key] for key in ("recomputed", "streamed", "offload_inputs")] for row in found]
    assert kept == [[0, 0, False]] * 3 + [[4, 0, False]] + [[4, 4, True]] * 2
    assert not [row["failed"] for row in found if "failed" in row]
    assert all(row["step_ms"] > 0 for row in found[1:])
    assert found[1]["beside"] == ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
    assert found[1]["beside_gib"].keys() == {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
    assert list(found[2]["beside_gib"]) == ["vae"]
    assert found[3]["placement"]["precision"] == "nf4"
    lines = table(tmp_path, "ladder-h100.json")
    assert len(lines) == 2 + 5 + 2  # the warm-up is not shown
    numbers = f"0.00 | {found[2]['host_gib']:.2f} | {found[2]['step_ms']:.0f}"
    assert lines[3] == f"| prompt embeddings cached | `compute_embeddings.py` | {numbers} | exact |"


def test_what_lies_beside_a_row_is_there_meanwhile(small: None) -> None:
    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float32)

    before = held()
    with memory.weights_beside(("text_encoder", "vae"), "cpu") as gib:
        beside = held() - before
    assert held() == before
    expected = {name: 4 * sum(p.numel() for p in random_sd3.make(name).parameters()) for name in gib}
    assert list(gib) == ["text_encoder", "vae"]
    assert beside == sum(expected.values()) > 10e6
    assert gib == {name: round(size / 2**30, 3) for name, size in expected.items()}


def test_text_encoders(rows, tmp_path: Path) -> None:
    cases = [tiny(case) for case in memory.SETS["text"]()]
    few = [replace(case, batch=min(case.batch, 2)) for case in cases]
    tight = [case for case in few if case.smallest]
    resident, streamed, long = rows(few[1], tight[0], tight[-1])
    assert resident["stage_s"].keys() != streamed["stage_s"].keys()
    assert "one block at a time, 1 prompt at a time needs at least" in streamed["refused"][0]
    assert resident["predicted_gib"] == 0  # no budget, no GPU: nothing was planned
    assert 0.75 < streamed["predicted_gib"] < 0.9
    assert (long["settings"]["t5_precision"], long["settings"]["t5_stream"]) == ("fp16", True)
    lines = table(tmp_path, "text.json")
    assert lines[2].startswith("| resident | 1 of 77 tokens | ")
    assert lines[4].startswith("| streamed within 0.8")
    assert "GiB | 2 of 256 tokens | " in lines[4]
    assert "times as long streamed as resident" in lines[-1]


def test_each_flag_is_a_row(rows, tmp_path: Path) -> None:
    cases = [case for case in memory.SETS["flags"]() if "23" not in case.flags and "24" not in case.flags]
    asked = [tiny(replace(case, flags=(*case.flags, *("--vram_budget_gib", "3")))) for case in cases]
    kept = [case for case in asked if set(case.flags) & {"off", "math"} or len(case.flags) == 2]
    found = rows(*kept)
    assert not [row["failed"] for row in found if "failed" in row]
    lines = table(tmp_path, "flags-h100.json")
    assert lines[2].startswith("| `--vram_budget_gib 3` | 0.")
    assert lines[3].startswith("| `--capture off --vram_budget_gib 3` | 0.")


def test_saving_no_more_than_training(rows, tmp_path: Path) -> None:
    cases = [tiny(case) for case in memory.SETS["saving"]()]
    _, training, checkpoints, picture = rows(*cases)
    assert checkpoints["allocated_gib"].keys() == training["allocated_gib"].keys()
    assert "denoise (fp32)" in picture["stage_s"]
    assert table(tmp_path, "saving-h100.json")[2].startswith("| training | 0.00 | 0.")


def test_a_lora_of_the_clips(rows) -> None:
    """On the CLIPs of the benchmark's own sizes; the plan of the same step without has no such part."""
    clips = [each for each in memory.SETS["clips"]() if "--train_text_encoder" in each.flags]
    assert len(clips) == 10
    found, without = rows(case("--train_text_encoder", "--vram_budget_gib", "3"), case("--vram_budget_gib", "3"))
    assert found["parts_gib"]["CLIPs"] >= 0
    assert "CLIPs" not in without["parts_gib"]
    assert found["predicted_gib"] > without["predicted_gib"]


def test_the_whole_transformer(rows) -> None:
    cases = list(memory.SETS["full"]())
    assert all("--full" in each.flags for each in cases)
    assert {each.model for each in cases} == {"sd3-medium", "sd3.5-medium", "sd3.5-large"}
    (found,) = rows(case("--full", "--mixed_precision", "bf16", "--vram_budget_gib", "3"))
    assert found["parts_gib"]["optimizer"] > 0
    assert "LoRA and optimizer" not in found["parts_gib"]


def test_the_largest_size_that_fits_a_card(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SIZES_PX", (64, 512))
    cases = list(memory.SETS["cards_run"]())
    assert [case.model for case in cases] == ["tiny"] * 8 + ["sd3-medium"] * 8  # each model once a process
    assert cases[-1].flags[-2:] == ("--attention_kernel", "efficient")
    small = replace(cases[0], batch=4, flags=("--vram_budget_gib", "0.88"))
    refused = replace(cases[1], flags=("--vram_budget_gib", "0.78"))
    t4 = replace(cases[7], flags=("--vram_budget_gib", "1.2"))
    first, second, third = rows(small, refused, t4)
    assert (first["resolution"], third["resolution"]) == (64, 512)
    assert [len(row.get("refused", [])) for row in (first, second, third)] == [1, 2, 0]
    lines = table(tmp_path, "cards_run-h100.json")
    assert lines[2].startswith("| 2 GiB | 64 px: 0.0 GiB, ")
    assert lines[3] == "| 3 GiB | – |"
    assert lines[4].startswith("| 15 GiB, as a T4 | 512 px: 0.0 GiB, 0/4 recomputed, ")


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
    lines = table(tmp_path, "picture-h100.json")
    assert lines[2].startswith(f"| {picture.STOCK} | {stock['elapsed_s']:.1f} | 1.00 | 0.00 |")


def test_each_set_in_a_file_of_its_own(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cards", "saving"):
        monkeypatch.setitem(memory.SETS, name, lambda name=name: iter([replace(case("--plan"), name=name)]))
    words = ["cards", "saving", "--models", str(tmp_path / "models"), "--device", "cpu"]
    assert memory.main([*words, "--result", str(tmp_path / "{set}-cpu.json")]) == 0
    for name in ("cards", "saving"):
        (row,) = json.loads((tmp_path / f"{name}-cpu.json").read_text())["rows"]
        assert (row["set"], row["name"]) == (name, name)
