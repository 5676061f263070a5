"""The step benchmark's rows, and the exchange's, on small models and a CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import exchange
import plain_whole
import random_sd3
import step
import tables

TINY = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 64}


def rows_of(tmp_path: Path, *words: object) -> list[dict]:
    """What the command writes."""
    shared = ["--models", tmp_path / "models", "--device", "cpu", "--warm", 1, "--steps", 4]
    assert step.main([str(word) for word in (*words, *shared, "--result", tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())["rows"]


def test_a_step_of_sd3_takes_the_flops_that_its_sizes_say() -> None:
    """24 blocks of width 1536 on 1024 and 154 tokens; what is not a block's is less than a percent."""
    width, tokens, text = 1536, 32**2, step.TEXT_TOKENS
    products = 24 * (8 + 16) * (tokens + text) * width**2 - 18 * text * width**2  # the last block drops its text
    scores = 24 * 4 * (tokens + text) ** 2 * width
    found = step.flops("sd3-medium", 512)
    assert found["forward_tflop"] == pytest.approx((products + scores) / 1e12, rel=0.01)
    assert found["step_tflop"] == pytest.approx(2 * found["forward_tflop"] + scores / 1e12, rel=0.1)
    assert found["step_fused_tflop"] - found["step_tflop"] == pytest.approx(scores / 2 / 1e12, abs=0.002)


def test_our_row_says_how_the_step_was_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    monkeypatch.setattr(step, "save_short_text", lambda _: None)
    ours = step.Case("ours", 64, (*step.PLAIN, *step.ALL_BLOCKS), "tiny", 2, 2, "bf16")
    refused = step.Case("ours", 64, step.CAPTURED, "tiny")
    peer = step.Case("the peer", 64, model="tiny", script=step.REFERENCE)
    monkeypatch.setitem(step.SETS, "batch", lambda: iter([ours, refused, peer]))
    found, failed = rows_of(tmp_path, "batch")  # without --peer there is no row of theirs
    assert found["ms"] > 0
    assert found["ms_an_image"] == pytest.approx(found["ms"] / 2, abs=0.01)
    assert found["execution"] == {
        "compiled": False,
        "captured": False,
        "refusal": None,
        "attention_backward": "torch",
    }
    assert (found["placement"]["recomputed"], found["placement"]["blocks"]) == (2, 2)
    assert "--capture on: it needs a GPU" in failed["failed"][0]
    (asked,) = rows_of(tmp_path, "batch", "--only", "capture on")
    assert asked["flags"] == failed["flags"]


def test_a_step_with_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have their own sizes, and T5 is short."""
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clips = {"text_encoder": {**small, "projection_dim": 768}, "text_encoder_2": {**small, "projection_dim": 1280}}
    monkeypatch.setattr(random_sd3, "CLIPS", clips)
    monkeypatch.setattr(step, "save_short_text", lambda _: None)
    ours = step.Case("ours", 64, (*step.PLAIN, "--train_text_encoder"), "tiny", 1, 2, "no")
    monkeypatch.setitem(step.SETS, "clips", lambda: iter([ours]))
    (found,) = rows_of(tmp_path, "clips")
    assert found["ms"] > 0
    config = json.loads((tmp_path / "models" / "tiny-with-clips" / "text_encoder_3" / "config.json").read_text())
    assert (config["d_model"], config["num_layers"]) == (4096, 1)


def test_the_whole_transformer_beside_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    monkeypatch.setattr(step, "save_short_text", lambda _: None)
    cases = list(step.SETS["full"]())
    assert [case.script for case in cases] == [step.PLAIN_WHOLE, None, None, None] * 2
    assert {case.precision for case in cases} == {"bf16"}
    ours = replace(cases[1], model="tiny", resolution=64)
    monkeypatch.setitem(step.SETS, "full", lambda: iter([replace(cases[0], model="tiny", resolution=64), ours]))
    monkeypatch.setattr(step.subprocess, "run", partial(run_here, monkeypatch, step.subprocess.run))
    plain, found = rows_of(tmp_path, "full")
    assert plain["ms"] > 0
    assert found["ms"] > 0
    assert found["placement"]["whole"] is True


def run_here(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., object], words: list[str], *more: object, **others: object
) -> object:
    """The plain loop in this process, which has the small sizes; whatever else is started as ever."""
    if not str(words[1]).endswith(step.PLAIN_WHOLE):
        return run(words, *more, **others)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return plain_whole.main(words[2:])


def test_prior_terms_and_two_shapes_beside_the_plain_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is captured; each set has a result of its own."""
    monkeypatch.setattr(random_sd3, "TRANSFORMERS", {"tiny": TINY})
    monkeypatch.setattr(random_sd3, "VAE", {"sample_size": 64})
    monkeypatch.setattr(step, "save_short_text", lambda _: None)
    monkeypatch.setattr(step, "WARM", {})
    shapes = {"832x1216": "48x80", "1216x832": "80x48"}
    for name in ("prior", "buckets"):
        cases = [
            replace(
                case,
                resolution=64,
                model="tiny",
                flags=case.flags[len(step.CAPTURED) :],
                sizes=tuple(shapes[size] for size in case.sizes),
                precision="bf16",
            )
            for case in step.SETS[name]()
            if case.resolution == 1024
        ]
        monkeypatch.setitem(step.SETS, name, lambda cases=cases: iter(cases))
    shared = ["--models", tmp_path / "models", "--device", "cpu", "--warm", 1, "--steps", 4]
    words = ["prior", "buckets", *shared, "--result", tmp_path / "{set}.json"]
    assert step.main([str(word) for word in words]) == 0
    versions = {"versions": dict.fromkeys(("torch", "diffusers", "bitsandbytes"), "1")}
    for name, rows in {
        "prior": ["no prior term", "`preference`", "`prediction`"],
        "buckets": ["one shape", "two shapes"],
    }.items():
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert [row["name"] for row in result["rows"]] == rows
        assert all(row["ms"] > 0 for row in result["rows"])
        result["rows"][0]["ms"], result["rows"][1]["ms"] = 10, 12
        lines = tables.printer(f"{name}-h100.json")({**result, **versions}).splitlines()
        assert lines[0] == "| | 64 px: ms a step | ratio |"
        assert lines[3] == f"| {rows[1]} | 12.0 | 1.20 |"


def test_the_miniature_is_timed_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in step.cpu_cases() if "compiled" not in case.name]
    monkeypatch.setattr(step, "cpu_cases", lambda: iter(cases))
    (row,) = rows_of(tmp_path, "cpu")
    assert (row["name"], row["precision"]) == ("ours", "no")
    assert row["ms"] > 1


def test_one_process_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SIZES_MIB", (1, 2))
    assert exchange.main(["--result", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["gpus"] == 1
    assert [(row["mib"], row["gb_per_s"]) for row in result["rows"]] == [(1, 0), (2, 0)]
    assert all(row["ms"] > 0 for row in result["rows"])
