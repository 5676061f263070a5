"""How the text encoders are planned for: what they take, and what a budget leaves of speed."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common import memory
from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import BudgetConfig, ModelConfig
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.budget import DeviceBudget, open_budget
from sd3_lora.stage_one import text_encoder_plan
from sd3_lora.stage_one.text_encoder_plan import (
    BATCH_SIZE,
    TextEncoderPlan,
    TextWork,
    choose_text_encoder_plan,
)

import pytest
import torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def files(tiny_sd3: Path) -> ModelFiles:
    return ModelFiles(ModelConfig(str(tiny_sd3)))


CONTEXT = GIB // 2
AMPLE = DeviceBudget(80 * GIB, CONTEXT, CUDA)


def needed_by(files: ModelFiles, plan: TextEncoderPlan) -> int:
    return CONTEXT + text_encoder_plan.encoder_bytes(files, plan) + text_encoder_plan.working_bytes(files, plan)


def budget_of(files: ModelFiles, precision: str, stream: bool, beyond: int = 0, device: torch.device = CUDA) -> Any:
    """What a plan needs of a device, and `beyond` bytes more."""
    return DeviceBudget(needed_by(files, TextEncoderPlan(precision, stream, 77, device)) + beyond, CONTEXT, device)  # type: ignore[arg-type]


def choose(
    files: ModelFiles, device: torch.device, budget: DeviceBudget | None, *args: Any, length: int = 77
) -> tuple[TextEncoderPlan, list[str]]:
    said: list[str] = []
    return choose_text_encoder_plan(files, TextWork(length, *args), device, budget, said.append), said


def test_the_default_precision(files: ModelFiles) -> None:
    assert choose(files, CPU, None, None, False) == (TextEncoderPlan("fp32", False, 77, CPU), [])
    assert choose(files, CUDA, AMPLE, None, False) == (TextEncoderPlan("int8", False, 77, CUDA), [])
    assert choose(files, CUDA, AMPLE, None, True) == (TextEncoderPlan("fp16", True, 77, CUDA), [])
    assert choose(files, CUDA, AMPLE, None, False, "nf4") == (TextEncoderPlan("nf4", False, 77, CUDA), [])
    assert choose(files, CUDA, AMPLE, "fp32", False, "nf4") == (TextEncoderPlan("fp32", False, 77, CUDA), [])
    assert choose(files, CPU, None, None, True, "fp32") == (TextEncoderPlan("fp32", True, 77, CPU), [])


@pytest.fixture(scope="module")
def counted_once() -> dict[str, Any]:
    """The functions that count a plan's bytes, with each answer kept: they make models of SD3's size for it."""
    names = ("encoder_bytes", "working_bytes", "clip_bytes")
    return {name: functools.cache(getattr(text_encoder_plan, name)) for name in names}


@pytest.fixture(scope="module")
def sd3_sizes() -> ModelFiles:
    return ModelFiles(ModelConfig("stabilityai/stable-diffusion-3-medium-diffusers"), is_plan=True)


@pytest.fixture
def big_files(sd3_sizes: ModelFiles, counted_once: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    """SD3's own sizes, without its files."""
    for name, function in counted_once.items():
        monkeypatch.setattr(text_encoder_plan, name, function)
    return sd3_sizes


def test_sd3_s_own_encoders_in_gib(big_files: ModelFiles) -> None:
    def parts(precision: str, stream: bool, length: int = 77) -> list[float]:
        chosen = TextEncoderPlan(precision, stream, length, CUDA)  # type: ignore[arg-type]
        return [round(size / GIB, 2) for size in chosen.predicted_parts(big_files, AMPLE).values()]

    # T5 in int8: 24 blocks of 4 matrices of 4096² and 2 of 4096 × 10240 in a byte, `wo` and `shared` in 4 and 2.
    assert parts("int8", False) == [0.5, 7.37, 0.58]
    assert parts("nf4", False) == [0.5, 5.89, 0.58]
    assert parts("fp16", False) == [0.5, 10.75, 0.58]
    # The feed-forward half: 2 matrices of 4096 × 10240 in fp16, `wo` in fp32.
    assert parts("fp16", True) == [0.5, 0.31, 0.23]
    assert parts("fp32", True) == [0.5, 0.47, 0.32]
    assert parts("fp16", True, 512) == [0.5, 0.31, 1.17]


@pytest.mark.parametrize(("length", "sizes"), [(77, [8, 4, 2, 1]), (256, [8, 4, 2, 1]), (512, [8, 4, 2, 1])])
def test_streamed_within_a_budget_as_many_prompts_at_a_time_as_fit(
    big_files: ModelFiles, length: int, sizes: list[int]
) -> None:
    seen = []
    for hundredth in range(200, 85, -1):
        budget = DeviceBudget(hundredth * GIB // 100, CONTEXT, CUDA)
        try:
            chosen, _ = choose(big_files, CUDA, budget, "fp16", True, length=length)
        except UserError:
            break
        assert sum(chosen.predicted_parts(big_files, budget).values()) <= budget.total_bytes
        seen.append(chosen.batch_size)
    assert list(dict.fromkeys(seen)) == sizes
    assert choose(big_files, CUDA, AMPLE, "fp16", True, length=length)[0].batch_size == BATCH_SIZE


def test_hidden_states_stay_on_a_gpu_where_there_is_room(big_files: ModelFiles, files: ModelFiles) -> None:
    def chosen(beyond: int, device: torch.device = CUDA) -> TextEncoderPlan:
        budget = budget_of(big_files, "fp16", True, beyond)
        return choose(big_files, device, budget, "fp16", True, None, 100)[0]

    hidden = 100 * 77 * 4096 * 4
    assert chosen(hidden).kept_prompts == 100
    assert chosen(hidden).predicted_parts(big_files, AMPLE)["hidden states"] == hidden
    assert chosen(hidden - 1) == chosen(0) == TextEncoderPlan("fp16", True, 77, CUDA)
    assert "hidden states" not in chosen(0).predicted_parts(big_files, AMPLE)
    assert chosen(hidden, CPU).kept_prompts == 0
    assert choose(big_files, CUDA, AMPLE, "fp16", False, None, 100)[0].kept_prompts == 0  # resident


@pytest.mark.parametrize(("precision", "stream"), [("fp16", True), ("int8", False)])
def test_many_prompts_go_in_larger_batches_where_there_is_room(
    big_files: ModelFiles, precision: str, stream: bool
) -> None:
    def size(prompts: int, beyond: int = 8 * GIB, device: torch.device = CUDA) -> int:
        budget = budget_of(big_files, precision, stream, beyond, device)
        return choose(big_files, device, budget, precision, stream, None, prompts)[0].batch_size

    assert [size(prompts) for prompts in (0, 1, 8, 9, 20, 25, 32, 512)] == [8, 8, 8, 16, 24, 32, 32, 32]
    assert size(30, 10 * 1024**2) == size(30, device=CPU) == 8
    # The CLIPs take no more at a time than they did.
    assert [TextEncoderPlan("fp16", True, 77, CUDA, n).clip_batch_size for n in (1, 8, 16, 32)] == [4, 32, 32, 32]


def test_the_clips_come_whole_where_there_is_room_and_more_than_one_batch(big_files: ModelFiles) -> None:
    layer = 4 * 1280**2 + 2 * 5120 * 1280 + 4 * 1280 + 5120 + 1280 + 2 * 2 * 1280  # matrices, biases and two norms
    clips = (49408 + 77 + 1280 + 2) * 1280 + 32 * layer  # CLIP-G's weights

    def chosen(gib: float, prompts: int = 100, device: torch.device = CUDA) -> TextEncoderPlan:
        return choose(big_files, device, DeviceBudget(int(gib * GIB), CONTEXT, device), "fp16", True, None, prompts)[0]

    parts = chosen(4).predicted_parts(big_files, AMPLE)
    assert chosen(4).whole_clips
    assert parts["text encoder"] == 2 * clips
    states = 32 * 77 * 1280 * 2
    assert parts["working memory"] - 33 * states == pytest.approx(0.5 * GIB, abs=0.1 * GIB)
    needed = sum(parts.values()) / GIB
    assert chosen(needed + 0.001).whole_clips
    assert chosen(needed - 0.001) == replace(chosen(4), whole_clips=False)  # T5's states still stay
    assert not chosen(4, prompts=32).whole_clips
    assert not chosen(4, device=CPU).whole_clips
    # With many prompts T5 and its hidden states take more than a CLIP.
    assert chosen(8, prompts=2000).predicted_parts(big_files, AMPLE)["hidden states"] == 2000 * 77 * 4096 * 4


@pytest.mark.parametrize("length", [77, 256])
def test_an_h100_s_context_leaves_room_for_t5_within_1_3_gib(big_files: ModelFiles, length: int) -> None:
    budget = DeviceBudget(int(1.3 * GIB), int(0.69 * GIB), CUDA)
    chosen, _ = choose(big_files, CUDA, budget, "fp16", True, length=length)
    assert chosen.batch_size == {77: 8, 256: 2}[length]


def test_more_memory_never_means_a_larger_step_down(big_files: ModelFiles) -> None:
    """Streamed, then resident, and refused before both."""
    seen = []
    for quarter in range(3, 80):
        budget = DeviceBudget(quarter * GIB // 4, CONTEXT, CUDA)
        try:
            chosen, _ = choose(big_files, CUDA, budget, None, False)
        except UserError:
            seen.append("refused")
            continue
        assert sum(chosen.predicted_parts(big_files, budget).values()) <= budget.total_bytes
        seen.append("streamed" if chosen.t5_stream else "resident")
    assert list(dict.fromkeys(seen)) == ["refused", "streamed", "resident"]
    assert seen == sorted(seen, key=["refused", "streamed", "resident"].index)


@pytest.mark.parametrize("asked", [None, "int8"])
def test_int8_that_does_not_fit_is_streamed_in_fp16_and_says_so(big_files: ModelFiles, asked: str | None) -> None:
    chosen, said = choose(big_files, CUDA, budget_of(big_files, "int8", False, -1), asked, False)
    assert chosen == TextEncoderPlan("fp16", True, 77, CUDA)
    assert said == [
        "T5 in int8 takes 7.96 GiB and 7.95 GiB are free: streaming it in fp16, one block at a time (--t5_stream)"
    ]
    enough = budget_of(big_files, "int8", False)
    assert choose(big_files, CUDA, enough, asked, False) == (TextEncoderPlan("int8", False, 77, CUDA), [])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_streamed_file_goes_on_streamed_where_the_whole_does_not_fit(big_files: ModelFiles, precision: str) -> None:
    # As on the second run of a small GPU.
    chosen, said = choose(big_files, CUDA, budget_of(big_files, precision, False, -1), None, False, precision)
    assert chosen == TextEncoderPlan(precision, True, 77, CUDA)  # type: ignore[arg-type]
    assert len(said) == 1
    assert "streaming it, one block at a time" in said[0]


@pytest.mark.parametrize("stream", [False, True])
def test_what_not_even_streaming_fits_is_told_the_smallest_budget_that_would(
    big_files: ModelFiles, stream: bool
) -> None:
    smallest = replace(TextEncoderPlan("fp16", True, 77, CUDA), batch_size=1)
    needed = needed_by(big_files, smallest)
    with pytest.raises(UserError) as caught:
        choose(big_files, CUDA, DeviceBudget(needed - 1, CONTEXT, CUDA), "fp16", stream)
    assert str(caught.value) == (
        "T5 in fp16, one block at a time, 1 prompt at a time needs at least 0.92 GiB: type --vram_budget_gib 0.92"
    )
    typed = open_budget(BudgetConfig(0.92), CPU)
    assert typed
    enough = DeviceBudget(typed.total_bytes, CONTEXT, CUDA)
    assert choose(big_files, CUDA, enough, "fp16", stream)[0] == smallest


def test_a_budget_decides_on_a_cpu_too(files: ModelFiles) -> None:
    budget = budget_of(files, "fp32", False, device=CPU)
    assert choose(files, CPU, budget, None, False)[0] == TextEncoderPlan("fp32", False, 77, CPU)
    less = replace(budget, total_bytes=budget.total_bytes - 1)
    assert choose(files, CPU, less, None, False)[0] == TextEncoderPlan("fp32", True, 77, CPU)


def test_on_a_cpu_the_free_host_memory_decides(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5-XXL in fp32 takes 18 GiB: more than most machines without a GPU have free.

    A container's limit counts, where the machine has more free.
    """
    monkeypatch.setattr(memory, "_free_in_groups", lambda *_: [int(0.25 * GIB)])
    for asked in (None, "fp32", "int8"):
        chosen, said = choose(files, CPU, None, asked, False)
        assert chosen == TextEncoderPlan("fp32", True, 77, CPU)
        assert "one block at a time" in said[0]


def test_nf4_that_does_not_fit_is_an_error(big_files: ModelFiles) -> None:
    with pytest.raises(UserError, match=r"T5 in nf4 takes .* are free: type --t5_precision fp16 --t5_stream"):
        choose(big_files, CUDA, budget_of(big_files, "nf4", False, -1), "nf4", False)


def test_the_encoders_are_downloaded_before_their_size_is_compared(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = budget_of(files, "int8", False, -1)
    downloaded: list[str] = []
    component, weight_files = ModelFiles.component, ModelFiles.weight_files
    monkeypatch.setattr(ModelFiles, "component", lambda self, name: downloaded.append(name) or component(self, name))
    monkeypatch.setattr(
        ModelFiles, "weight_files", lambda self, name: weight_files(self, name) if name in downloaded else []
    )
    chosen, said = choose(files, CUDA, budget, None, False)
    assert set(downloaded) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert chosen.t5_stream
    assert said


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantized_t5_cannot_be_streamed(files: ModelFiles, precision: str) -> None:
    with pytest.raises(UserError, match=f"not {precision}: add --t5_precision fp16"):
        choose(files, CPU, None, precision, True)


@pytest.mark.parametrize("length", [0, 513, -1])
def test_a_length_that_t5_cannot_take(files: ModelFiles, length: int) -> None:
    with pytest.raises(UserError, match=f"--max_sequence_length {length} is not between 1 and 512: type 77"):
        choose(files, CPU, None, None, False, length=length)
    assert [choose(files, CPU, None, None, False, length=n)[0].max_sequence_length for n in (1, 512)] == [1, 512]


def test_the_clips_are_fp16_on_a_gpu_unless_t5_is_exact() -> None:
    assert TextEncoderPlan("int8", False, 77, CUDA).clip_dtype == torch.float16
    assert TextEncoderPlan("fp32", False, 77, CUDA).clip_dtype == torch.float32
    assert TextEncoderPlan("int8", False, 77, CPU).clip_dtype == torch.float32
