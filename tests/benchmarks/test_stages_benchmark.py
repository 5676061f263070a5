"""The stages benchmark's rows, on a tiny model and a CPU: both ways do the same work, and it is compared."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from PIL import Image

sys.path.insert(0, str(PROJECT / "benchmarks"))

import stages
import vae_rows
from photos import fabricate_photos

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(tmp_path: Path, tiny_sd3: Path) -> Callable[..., Rows]:
    """Runs sets as the command does."""

    def run(*words: object) -> Rows:
        shared = ["--model", tiny_sd3, "--resolution", 64, "--items", 1, 3, "--reference_items", 2, "--device", "cpu"]
        shared += ["--sizes", "96x64", "128x96", "--output_dir", tmp_path / "out", "--result", tmp_path / "result.json"]
        assert stages.main([str(word) for word in (*words, *shared)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {"date", "machine", "versions", "cores", "decoding_threads"} <= result.keys()
        return result["rows"]

    return run


def test_latents_are_those_of_the_reference_s_way(rows: Callable[..., Rows]) -> None:
    found = rows("latents")
    assert [(row["photo_px"][0], row["name"], row["items"]) for row in found] == [
        (width, name, items)
        for width in (96, 128)
        for name, items in [("reference", 2), ("fp16", 1), ("fp16", 3), ("fp32", 1), ("fp32", 3)]
    ]
    for row in found:
        if row["name"] == "reference":
            assert row["decode_ms"] > 0
            assert row["decode_in_threads_ms"] > 0
            continue
        assert row["mean_relative"] < (0.01 if row["name"] == "fp16" else 0.001)
        assert row["mean_max"] > 0 or row["name"] == "fp32"
        assert row["std_relative"] < 0.01
        rounded = 0.005 * (2 + row["ratio"])
        assert row["ratio"] * row["elapsed_s"] == pytest.approx(row["reference_s"], abs=rounded)
        assert 0 < row["encode_s"] < row["elapsed_s"]


def test_embeddings_are_those_of_the_stock_pipeline(rows: Callable[..., Rows]) -> None:
    reference, *ours = rows("text")
    assert reference["name"] == "reference"
    assert [(row["name"], row["items"]) for row in ours] == [
        (name, items) for name in ("fp16, one block at a time", "int8") for items in (1, 3)
    ]
    assert all(len(row["stage_s"]) == 3 for row in ours)
    assert all(row["embeds_relative"] < 0.05 for row in ours)
    assert ours[-1]["embeds_relative"] < 1e-3  # T5 in 8 bits as the reference's, but for the batch
    assert ours[-1]["pooled_relative"] < 1e-3


def test_encoders_are_compared_with_exact_float32(rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((torch.float32, False, 1, ""), (torch.float16, True, 4, vae_rows.SPREAD))
    monkeypatch.setattr(vae_rows, "ENCODERS", cases)
    exact, half = rows("encoders")
    assert exact["mean_max"] == exact["std_max"] == 0
    assert 0 < half["mean_relative"] < 0.01
    assert half["ms_an_item"] > 0


def test_decoders_are_timed_whole_and_in_tiles(rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((torch.float32, False, False, ""), (torch.float16, True, True, vae_rows.SPREAD))
    monkeypatch.setattr(vae_rows, "DECODERS", cases)
    tiles: list[int | None] = []
    apply = vae_rows.VaeTile.apply
    monkeypatch.setattr(vae_rows.VaeTile, "apply", lambda tile, vae: tiles.append(tile.side_px) or apply(tile, vae))
    whole, tiled = rows("decoders")
    assert (whole["dtype"], whole["tile_px"]) == ("float32", None)
    assert (tiled["dtype"], tiled["tile_px"]) == ("float16", 32)
    assert tiles == [None, 32]
    assert min(whole["ms_an_item"], tiled["ms_an_item"]) > 0


def measured_here(name: str, script: str, flags: list[object], report: Path) -> dict[str, Any]:
    """In this process; ten seconds each."""
    assert importlib.import_module(script.removesuffix(".py")).main([str(flag) for flag in flags]) == 0
    assert report.is_file()
    return {"name": name, "elapsed_s": 10.0}


def test_the_job_is_reckoned_to_500_steps(
    rows: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "measure", measured_here)
    *scripts, whole = rows("job", "--steps", 2)
    assert [row["name"] for row in scripts] == [
        "ours: compute_embeddings", "ours: precompute_latents", "ours: training",
    ]  # fmt: skip
    run = json.loads((tmp_path / "out" / "job" / "lora" / "run.json").read_text())
    assert run["flags"]["gradient_accumulation_steps"] == 4
    assert (whole["elapsed_s"], whole["ratio"]) == (30.0, 1.0)
    assert whole["job_s"] == pytest.approx(30 + 498 * run["ms_a_step"] / 1000, abs=0.1)


def test_two_builds_run_the_readme_s_commands_in_turns(
    rows: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    def run_here(words: list[object], environment: dict[str, str]) -> tuple[dict[str, Any], None]:
        script, *flags = map(str, words)
        environments.append(environment)
        assert importlib.import_module(Path(script).stem).main(flags) == 0
        return {"elapsed_s": 40.0 if script.startswith(str(tmp_path)) else 30.0}, None

    monkeypatch.setattr(stages, "run_process", run_here)
    *scripts, before, after = rows("job", "--steps", 2, "--before", tmp_path / "before", "--rounds", 2)
    names = [row["name"].split(":")[0] for row in scripts]
    assert names == ["before"] * 3 + ["after"] * 6 + ["before"] * 3
    assert len({environment["TORCHINDUCTOR_CACHE_DIR"] for environment in environments}) == 4  # a job's own
    training = scripts[2]
    assert training["start_s"] == pytest.approx(40 - sum(training["stage_s"].values()), abs=0.01)
    assert training["compile_s"] == pytest.approx(training["stage_s"]["train"] - training["steps_s"], abs=0.01)
    assert before["job_s"] == pytest.approx(120, abs=60)
    assert after["of_before"] == pytest.approx(after["job_s"] / before["job_s"], abs=0.001)
    assert (before["of_before"], len(after["each_job_s"])) == (1.0, 2)

    environments.clear()
    dropped: list[int] = []
    monkeypatch.setattr(stages, "drop_page_cache", lambda: dropped.append(len(environments)))
    rows("job", "--steps", 2, "--before", tmp_path / "before", "--rounds", 1, "--cold")
    assert dropped == [0, 1, 2, 3, 4, 5]  # before each script
    assert len({environment["PYTHONPYCACHEPREFIX"] for environment in environments}) == 6


EMBEDS = """
import sys
from transformers import T5EncoderModel
from diffusers import StableDiffusion3Pipeline
t5 = T5EncoderModel.from_pretrained("stabilityai/some-name", subfolder="text_encoder_3", load_in_8bit=True)
assert type(t5.encoder.block[0].layer[0].SelfAttention.q).__name__ == "Linear8bitLt"
without = {"transformer": None, "vae": None}
pipeline = StableDiffusion3Pipeline.from_pretrained("stabilityai/some-name", text_encoder_3=t5, **without)
assert pipeline.text_encoder_3 is t5
open(sys.argv[sys.argv.index("--output_path") + 1], "w").write("embeddings")
"""
TRAINS = """
import sys, time, torch
from accelerate import Accelerator
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
assert open(value("--data_df_path")).read() == "embeddings"
accelerator = Accelerator(gradient_accumulation_steps=int(value("--gradient_accumulation_steps")), cpu=True)
layer, data = torch.nn.Linear(2, 2), torch.utils.data.DataLoader(torch.ones(80, 2))
layer, data, optimizer = accelerator.prepare(layer, data, torch.optim.SGD(layer.parameters(), lr=0.1))
steps = 0
for batch in data:
    with accelerator.accumulate(layer):
        accelerator.backward(layer(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        steps += 1
        time.sleep(0.5 if steps == 6 else 0)
    if steps == int(value("--max_train_steps")):
        break
open(value("--output_dir"), "w").write(str(steps))
"""


def test_the_reference_s_job_is_run_to_its_end_and_timed_from_outside(
    rows: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "measure", measured_here)
    script = tmp_path / "clone" / stages.REFERENCE
    script.parent.mkdir(parents=True)
    script.with_name("compute_embeddings.py").write_text(EMBEDS)
    script.write_text(TRAINS)
    *_, ours, embedding, training, whole = rows("job", "--steps", 2, "--peer", tmp_path / "clone", "--peer_steps", 10)
    assert [row["name"] for row in (embedding, training, whole)] == [
        f"the reference: {name}" for name in ("compute_embeddings", "training", "photos to LoRA")
    ]
    assert (tmp_path / "out" / "job" / "reference").read_text() == "10"  # what comes after the last timed step
    assert 100 <= training["ms_a_step"] < 200  # half a second within the five steps after the five that warm it up
    both = embedding["elapsed_s"] + training["elapsed_s"]
    assert whole["job_s"] == pytest.approx(both + 490 * training["ms_a_step"] / 1000, abs=0.2)
    assert whole["ratio"] == pytest.approx(whole["job_s"] / ours["job_s"], rel=0.01)


def test_no_row_is_begun_after_the_time(rows: Callable[..., Rows]) -> None:
    assert len(rows("latents", "text", "--stop_after", 0)) == 1


def test_photos_are_different_files_of_the_asked_size(tmp_path: Path) -> None:
    paths = fabricate_photos(tmp_path, 6, (80, 60))
    assert len({path.read_bytes() for path in paths}) == 6
    assert {Image.open(path).size for path in paths} == {(80, 60)}
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in paths]


def test_processes_share_out_the_items_and_each_is_there_once(rows: Callable[..., Rows]) -> None:
    found = rows("gpus")
    assert [(row["name"], row["gpus"], row["each_once"]) for row in found] == [
        ("precompute_latents", 1, True),
        ("compute_embeddings", 1, True),
        ("precompute_latents", 2, True),
        ("compute_embeddings", 2, True),
    ]
    assert all(row["items"] == 3 and row["work_s"] > 0 for row in found)
