"""The map of learning rate and steps: its points are what shorter runs end with, and its picture shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "benchmarks"))

import dreambooth
import dreambooth_map
import dreambooth_runs
from test_dreambooth_methods import FakeJudge


@pytest.fixture
def call(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls the map on the tiny model with a fabricated judge: two rates, points at 1, 2 and 3 steps, the robot."""
    (tmp_path / "judge.safetensors").write_bytes(b"")
    (tmp_path / "judge.json").write_text('{"object": 0.97}')
    for module in (dreambooth, dreambooth_runs):
        monkeypatch.setattr(module, "JUDGE_FILE", tmp_path / "judge.safetensors")
    monkeypatch.setattr(dreambooth, "load_judge", lambda _: FakeJudge())

    def run(*words: object) -> int:
        sizes = ["--rank", "2", "--lora_blocks", "0", "--prompts", "2", "--drift_prompts", "2", "--num_steps", "1"]
        sizes += ["--subjects", "robot", "--points", "1", "2", "3", "--class_images", "2", "--ema_decay", "0.5"]
        files = ["--device", "cpu", "--model", tiny_sd3, "--output_dir", tmp_path / "out"]
        files += ["--rates", "1e-3", "1e-2", "--result", tmp_path / "map-x.json"]
        return dreambooth_map.main([*map(str, [*sizes, *files, *words])])

    return run


def test_each_point_is_what_a_run_of_so_many_steps_ends_with(call, tmp_path, monkeypatch):
    kept: dict[str, dict[str, torch.Tensor]] = {}
    count = dreambooth.Bench.count

    def keep(self: dreambooth.Bench, name: str, lora: Path) -> dict:
        kept[str(lora.relative_to(tmp_path))] = load_file(lora)
        return count(self, name, lora)

    monkeypatch.setattr(dreambooth.Bench, "count", keep)
    assert call() == 0
    assert call("--points", "2", "--output_dir", tmp_path / "short") == 0
    folder = "runs/rate_0.01/robot-0/lora"
    for name in (LORA_FILE, EMA_FILE):
        long, short = kept[f"out/{folder}/checkpoint-2/{name}"], kept[f"short/{folder}/{name}"]
        assert all(torch.equal(long[key], short[key]) for key in short)
        assert not all(torch.equal(kept[f"out/{folder}/{name}"][key], long[key]) for key in long)
    # Two rates, three points: the plain run and its average, and the run with class pictures.
    judged = [path for path in kept if path.startswith("out")]
    assert len(judged) == 2 * 3 * 3
    assert sum(EMA_FILE in path for path in judged) == 2 * 3
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_its_result_has_a_line_for_each_rate_and_variant_and_goes_on(call, tmp_path, monkeypatch, capsys):
    assert call() == 0
    out = capsys.readouterr().out
    assert out.count("plain, rate 0.001: subject 50.0 50.0 50.0; prompt 100.0 100.0 100.0; drift – – –") == 1
    result = json.loads((tmp_path / "map-x.json").read_text())
    lines = [(line["variant"], line["learning_rate"]) for line in result["lines"]]
    assert lines == [(variant, rate) for variant in dreambooth_map.VARIANTS for rate in (0.001, 0.01)]
    assert [point["steps"] for point in result["lines"][0]["points"]] == [1, 2, 3]
    assert result["lines"][0]["points"][0]["rows"] == {"robot": {"0": [1, 2, 2, 2, 0]}}
    assert result["baseline"] == {"learning_rate": 5e-4, "steps": 150}
    monkeypatch.setattr(dreambooth_runs, "load_bench", None)
    assert call() == 0
    assert call("--points", "1", "2") == 2
    assert "holds scores with points [1, 2, 3], not [1, 2]" in capsys.readouterr().err


def line(variant: str, rate: float, subject: float) -> dict:
    errors = {"subject": 1.5, "prompt": 0.2, "drift": None}
    points = [
        {"steps": steps, "means": {"subject": subject, "prompt": 99.0, "drift": 90.0}, "standard_errors": errors}
        for steps in (50, 150)
    ]
    return {"variant": variant, "learning_rate": rate, "points": points}


def test_two_pictures_of_the_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plot_map

    lines = [line("plain", 5e-4, 80.0), line("plain", 1e-3, 90.0), line("class pictures", 5e-4, 70.0)]
    result = {"lines": lines, "baseline": {"learning_rate": 5e-4, "steps": 150}}
    assert plot_map.limits(result, "subject") == pytest.approx((68.8, 91.2))
    assert plot_map.typed(1.25e-4) == "1.25e-4"
    (tmp_path / "map.json").write_text(json.dumps(result))
    assert plot_map.main([str(tmp_path / "map.json"), str(tmp_path / "map")]) == 0
    light, dark = (tmp_path / f"map-{theme}.svg" for theme in ("light", "dark"))
    assert light.read_text() != dark.read_text()
    first = light.read_bytes()
    assert plot_map.main([str(tmp_path / "map.json"), str(tmp_path / "map")]) == 0
    assert light.read_bytes() == first
    result["lines"][0]["points"][1]["means"]["subject"] = 85.0
    (tmp_path / "map.json").write_text(json.dumps(result))
    assert plot_map.main([str(tmp_path / "map.json"), str(tmp_path / "map")]) == 0
    assert light.read_bytes() != first
