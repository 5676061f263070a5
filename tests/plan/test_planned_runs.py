"""Runs of the scripts on the miniature under each kind of plan: the same bits."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.placement_flags import AskedPrecision
from sd3_lora.gpu.pinned_memory import pinned_bytes
from sd3_lora.plan import memory_plan
from sd3_lora.plan.memory_plan import Plan, plan_denoising
from sd3_lora.plan.step_memory import DenoisingShape, StepShape
from sd3_lora.plan.step_time import model_costs
from sd3_lora.transformer import placement
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.mapped_pieces import MappedPieces
from sd3_lora.transformer.modulations_ahead import Modulating, ModulationsAhead
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import PinnedPieces, StreamedBlocks, stream_transformer

import pytest
import torch
from conftest import TRAINING_SCRIPT
from miniature_plans import budget_of, list_plans, task_of
from PIL import Image
from training_runs import Flags, Script, same_lora, train


def script_plans(miniature_files: ModelFiles, precision: AskedPrecision = "16bit") -> list[Plan]:
    shape = StepShape(1, (8, 8), 97, None, None, 4, 0.2, torch.float32, 16)
    return list_plans(task_of(miniature_files, shape, precision=precision))


def gib(size: int) -> str:
    return repr((size + 1) / GIB)


@pytest.mark.usefixtures("without_allowances")
def test_every_plan_trains_to_the_same_bits(
    script: Script,
    miniature_files: ModelFiles,
    on_miniature: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[tuple] = []

    def stream(*words: object) -> StreamedBlocks:
        done.append(("streamed", words[-1]))
        return stream_transformer(*words)

    def recompute(transformer: torch.nn.Module, *words: object) -> None:
        done.append(words)
        recompute_blocks(transformer, *words)

    monkeypatch.setattr(placement, "stream_transformer", stream)
    monkeypatch.setattr(placement, "recompute_blocks", recompute)
    plain = train(script, on_miniature, tmp_path / "plain")
    assert "plan: base unchanged, on the device; 0 of 6 blocks recomputed\n" in plain.out
    assert "predicted" not in plain.out
    plans = script_plans(miniature_files)
    kept = [i for i, plan in enumerate(plans) if plan.placement.buffers == 6 and not plan.placement.offload_inputs]
    some = {len(plans[index].placement.streamed): index for index in kept}
    chosen = [0, 3, 6, *some.values(), *range(len(plans) - 5, len(plans))]
    assert len(some) > 4
    for index in chosen:
        folder, place = tmp_path / str(index), plans[index].placement
        run = train(script, on_miniature, folder, "--vram_budget_gib", gib(plans[index].forecast.peak_bytes))
        assert f"plan: {plans[index].sentence()}" in run.out
        assert run.losses == plain.losses
        if place.streamed:
            assert done[-2] == ("streamed", place.streamed)
        assert done[-1] == (place.recomputed, place.offload_inputs)
        assert same_lora(run.folder / LORA_FILE, plain.folder / LORA_FILE)
        record = json.loads((folder / "run.json").read_text())
        noted = record["plan"]
        assert record["predicted_parts"] == plans[index].forecast.largest.parts
        assert noted.pop("host_bytes") == plans[index].forecast.host_bytes
        assert noted == json.loads(json.dumps(asdict(place)))
    assert sum(words[0] == "streamed" for words in done) == len(chosen) - 3


@pytest.mark.usefixtures("without_allowances")
def test_a_streamed_run_goes_on_resident_and_4_bits_go_on_in_4_bits(
    script: Script, miniature_files: ModelFiles, on_miniature: Flags, tmp_path: Path
) -> None:
    streamed, packed = script_plans(miniature_files)[-1], script_plans(miniature_files, "nf4")[-1]
    whole = train(script, on_miniature, tmp_path / "whole", "--max_train_steps", 4)
    halves = [on_miniature, tmp_path / "halves"]
    train(script, *halves, "--max_train_steps", 2, "--vram_budget_gib", gib(streamed.forecast.peak_bytes))
    run = train(script, *halves, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert same_lora(run.folder / LORA_FILE, whole.folder / LORA_FILE)
    refused = train(
        script, *halves, "--max_train_steps", 5, "--resume_from_checkpoint", "latest", "--base_precision", "nf4", code=2
    )
    assert "--base_precision 16bit, not nf4" in refused.err

    words = ["--base_precision", "nf4", "--max_train_steps", 2]
    plain = train(script, on_miniature, tmp_path / "nf4", *words)
    assert plain.losses != whole.losses[:2]
    run = train(
        script,
        on_miniature,
        tmp_path / "streamed nf4",
        *words,
        "--vram_budget_gib",
        gib(packed.forecast.peak_bytes),
    )
    assert run.losses == plain.losses


@pytest.mark.usefixtures("without_allowances")
def test_a_run_streams_from_the_files_and_goes_on_from_host_memory(
    script: Script,
    miniature_files: ModelFiles,
    on_miniature: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources: list[tuple] = []
    monkeypatch.setattr(
        placement, "stream_transformer", lambda *words: sources.append(words[2:]) or stream_transformer(*words)
    )
    whole = train(script, on_miniature, tmp_path / "whole", "--max_train_steps", 4)
    budget = ["--vram_budget_gib", gib(script_plans(miniature_files)[-1].forecast.peak_bytes)]
    with monkeypatch.context() as patch:
        patch.setattr(memory_plan, "available_host_bytes", lambda: 0)
        half = train(script, on_miniature, tmp_path / "halves", "--max_train_steps", 2, *budget)
    assert "plan: base unchanged, streamed from the weight files, 2 pieces on the device (" in half.out
    noted = json.loads((half.folder / "run.json").read_text())["plan"]
    assert noted["stream_from"] == "files"
    costs = model_costs(miniature_files.read_config("transformer"), torch.float32, None)
    assert noted["host_bytes"] == pinned_bytes(3 * [max(piece.size for piece in costs)])
    assert half.losses == whole.losses[:2]
    run = train(
        script,
        on_miniature,
        tmp_path / "halves",
        "--max_train_steps",
        4,
        "--resume_from_checkpoint",
        "latest",
        *budget,
    )
    assert "plan: base unchanged, streamed from host memory, 2 pieces on the device (" in run.out
    assert same_lora(run.folder / LORA_FILE, whole.folder / LORA_FILE)
    assert [type(source) for source, *_ in sources] == [MappedPieces, PinnedPieces]


def test_plan_prints_and_writes_nothing(
    script: Script, on_miniature: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth_sd3_lora_miniature as training

    for name in ("arrange", "open_data"):
        monkeypatch.setattr(training, name, None)
    monkeypatch.chdir(tmp_path)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--output_dir", "lora", "--device", "cpu"]
    result = script(TRAINING_SCRIPT, *words, "--plan", "--vram_budget_gib", "2")
    assert result.code == 0, result.err
    assert "plan: base unchanged, on the device; 0 of 6 blocks recomputed\n" in result.out
    assert re.search(r"predicted peak: CUDA 0.75 \+ weights .* = 0\.\d\d GiB\n", result.out)
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_a_plan_is_one_for_a_gpu(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's precisions, unless a CPU was asked for; and what is done here is done in a CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sd3_lora.common.devices.has_nvidia_gpu", lambda: False)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--plan", "--vram_budget_gib", 4]
    draw = [*words, "--prompt", "a fish"]

    def said(name: str, *words: object) -> str:
        result = script(name, *words)
        assert result.code == 0, result.err
        return result.out

    assert "transformer in fp16: half the memory" in said(TRAINING_SCRIPT, *words)
    assert "transformer in bf16: as asked" in said(TRAINING_SCRIPT, *words, "--mixed_precision", "bf16")
    assert "transformer in fp32: the exact" in said(TRAINING_SCRIPT, *words, "--device", "cpu")
    assert "transformer in fp16, base" in said("inference", *draw)
    assert "transformer in fp32, base" in said("inference", *draw, "--device", "cpu")
    assert "T5 in int8: CUDA 0.75" in said("compute_embeddings", *words)
    assert "T5 in fp32: CUDA 0.75" in said("compute_embeddings", *words, "--device", "cpu")


@pytest.mark.usefixtures("without_allowances")
def test_in_training_past_checkpoints_and_when_resumed(
    script: Script,
    miniature_files: ModelFiles,
    on_miniature: Flags,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two micro-batches a step, a checkpoint every two steps, which does not hold what is drawn ahead of it."""
    turns: list[tuple[Modulating, Modulating | None]] = []
    advance = ModulationsAhead.advance
    monkeypatch.setattr(ModulationsAhead, "advance", lambda self, *words: turns.append(words) or advance(self, *words))
    budget = ["--vram_budget_gib", gib(script_plans(miniature_files)[-1].forecast.peak_bytes)]
    words = ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 2]
    plain = train(script, on_miniature, tmp_path / "plain", *words, "--max_train_steps", 5)
    assert not turns
    whole = train(script, on_miniature, tmp_path / "whole", *words, *budget, "--max_train_steps", 5)
    assert [coming is None for _, coming in turns] == 9 * [False] + [True]
    assert all(turns[i][1][0] is turns[i + 1][0][0] for i in range(9) if turns[i][1])
    halves = [on_miniature, tmp_path / "halves", *words, *budget]
    train(script, *halves, "--max_train_steps", 3)
    resumed = train(script, *halves, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    for run in (whole, resumed):
        assert run.losses == plain.losses
        assert same_lora(run.folder / LORA_FILE, plain.folder / LORA_FILE)


@pytest.mark.usefixtures("without_allowances")
def test_a_streamed_picture_is_the_resident_one_and_nf4_is_another(
    script: Script,
    miniature_files: ModelFiles,
    on_miniature: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_plan, "WORKSPACE_BYTES", 0)
    streams: list[tuple] = []
    monkeypatch.setattr(
        placement, "stream_transformer", lambda *words: streams.append(words) or stream_transformer(*words)
    )
    lora = train(script, on_miniature, tmp_path / "lora", "--max_train_steps", 1)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--lora", lora.folder, "--prompt", "a photo of sks fish"]
    words += [
        "--data_df_path",
        on_miniature.flags[on_miniature.flags.index("--data_df_path") + 1],
        "--device",
        "cpu",
    ]
    words += ["--num_steps", 2, "--guidance", 3]

    def draw(name: str, *more: object) -> bytes:
        result = script("inference", *words, "--outdir", tmp_path / name, *more)
        assert result.code == 0, result.err
        (path,) = (tmp_path / name).glob("*/img_00.png")
        with Image.open(path) as picture:
            return picture.tobytes()

    resident = draw("resident")
    shape = DenoisingShape(2, (8, 8), 97, torch.float32, lora.folder.joinpath(LORA_FILE).stat().st_size)
    whole = plan_denoising(miniature_files, shape, budget_of(1 << 40)).forecast.peak_bytes
    unmerged = draw("unmerged", "--unmerged")
    assert streams == []
    assert draw("streamed", "--vram_budget_gib", gib(whole - 2**20)) == resident
    assert [(type(source), buffers) for _, _, source, buffers, _ in streams] == [(PinnedPieces, 6)]
    assert 0 < len(streams[0][-1]) < 6  # some blocks stay
    with monkeypatch.context() as patch:
        patch.setattr(memory_plan, "available_host_bytes", lambda: 0)
        assert draw("from files", "--vram_budget_gib", gib(whole - 2**20)) == unmerged  # which are never changed
    assert [type(source) for _, _, source, *_ in streams] == [PinnedPieces, MappedPieces]
    assert draw("nf4", "--base_precision", "nf4") != resident
