"""What a step allocates: the simulation of one block of each kind beside that of all, and beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import MINIATURE
from sd3_lora.common.placement_flags import AttentionKernel
from sd3_lora.gpu.simulation import AllocationCounter, stand_in_for_gpu
from sd3_lora.plan import memory_plan, step_memory
from sd3_lora.plan.step_memory import DenoisingShape, Step, StepMemory, StepShape, simulate_denoising, simulate_step
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_flags import PriorConfig, PriorTerm
from sd3_lora.transformer.lora import attach_lora, target_modules
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.velocity import VelocityModel
from train_dreambooth_sd3_lora_miniature import micro_step

import pytest
import torch
from conftest import PROJECT
from miniature_plans import STEP

SHAPE = StepShape(2, (8, 8), 97, None, None, 4, 0.0, torch.float16, 16)
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096}
MEDIUM |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": None}
DUAL = {"num_layers": 7, "dual_attention_layers": (0, 1, 2), "pos_embed_max_size": 32}


def config_of(**changes: object) -> dict:
    config = json.loads((MINIATURE / "transformer" / "config.json").read_text())
    return {name: value for name, value in {**config, **changes}.items() if not name.startswith("_")}


def simulated_peak(config: dict, shape: StepShape, count: int, step: Step = STEP) -> int:
    """Of all blocks, each recomputed as it is in training."""
    with torch.device("meta"):
        transformer = step_memory.make_hollow(config, shape.dtype)
        targets = target_modules(transformer, shape.layers, shape.blocks)
        attach_lora(transformer, targets, shape.rank, float(shape.rank), shape.dropout, 0)
    transformer.train()
    recompute_blocks(transformer, range(count))
    for module in (transformer, *transformer.transformer_blocks):
        stand_in_for_gpu(module, shape.dtype)
    with AllocationCounter() as counter:
        step(VelocityModel(transformer, shape.dtype), step_memory._hollow_inputs(config, shape)).backward()
    return counter.peak


@pytest.mark.parametrize("count", [0, 3, 6, 7])
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, blocks=(2, 4), layers=("ff_context.net.2",), rank=32)])
def test_one_block_of_each_kind_stands_for_all(count: int, shape: StepShape) -> None:
    config = config_of(**DUAL)
    step = simulate_step(config, shape, None, STEP)
    assert sum(step.peak(range(count), False)) == pytest.approx(simulated_peak(config, shape, count), rel=0.045)


@pytest.mark.parametrize("count", [0, 3, 7])
@pytest.mark.parametrize("term", ["prediction", "preference"])
def test_a_prior_term_is_counted(count: int, term: PriorTerm) -> None:
    """The class prompt's rows are kept for backward as the pictures' own are; the base's pass keeps no more."""
    prior = PriorConfig(prior_term=term, **({"prior_share": 0.5} if term == "prediction" else {}))
    step = partial(micro_step, flow=FlowConfig(), prior=prior)
    prior_rows, base_rows = prior.rows(SHAPE.batch_size)
    assert (prior_rows, base_rows) == ((1, 1) if term == "prediction" else (0, 2))
    shape = replace(SHAPE, prior_rows=prior_rows, base_rows=base_rows)
    config = config_of(**DUAL)
    memory = simulate_step(config, shape, None, step)
    peak = simulated_peak(config, shape, count, step)
    assert sum(memory.peak(range(count), False)) == pytest.approx(peak, rel=0.045)
    without = simulate_step(config, replace(SHAPE, batch_size=shape.rows), None, STEP)
    assert memory.kept == without.kept
    assert memory.inputs == without.inputs
    assert memory.lora == without.lora


def test_before_the_first_lora_nothing_is_kept() -> None:
    step = simulate_step(config_of(), replace(SHAPE, blocks=(3,)), None, STEP)
    assert step.kept[:3] == step.inputs[:3] == (0, 0, 0)
    assert min(step.kept[3:]) > 0


def test_twice_the_batch_keeps_twice_as_much() -> None:
    one, two = (simulate_step(config_of(), replace(SHAPE, batch_size=size), None, STEP) for size in (2, 4))
    assert two.kept[2] == pytest.approx(2 * one.kept[2], rel=0.035)
    assert two.inputs[2] == 2 * one.inputs[2]
    assert two.lora == one.lora


def test_the_peak_of_any_blocks_is_that_of_those_blocks() -> None:
    """Of the last ones it is higher than of the first (see `recompute_blocks`)."""
    step = simulate_step(config_of(), SHAPE, None, STEP)
    first, last, both_ends = (sum(step.peak(blocks, False)) for blocks in ((0, 1, 2), (3, 4, 5), (0, 2, 4)))
    assert first < both_ends < last
    assert sum(step.peak((), False)) > last
    assert sum(step.peak(range(5), True)) < sum(step.peak(range(5), False))


def simulated_medium(resolution: int, kernel: AttentionKernel | None) -> StepMemory:
    latent_size = (resolution // 8, resolution // 8)
    shape = StepShape(1, latent_size, 154, None, None, 4, 0.0, torch.float16, 16)
    return simulate_step(config_of(**MEDIUM), shape, None, STEP, kernel)


def test_math_attention_keeps_every_score() -> None:
    """Of SD3-Medium at 1024 px: 24 heads, each with a score in 16 bits for each pair of 4096 + 154 tokens."""
    fused, math = simulated_medium(1024, None), simulated_medium(1024, "math")
    scores = 24 * (4096 + 154) ** 2 * 2
    assert all(more - less >= scores for more, less in zip(math.kept, fused.kept, strict=True))
    assert math.working > fused.working
    assert math.inputs == fused.inputs
    for kernel in ("flash", "cudnn", "efficient"):
        assert simulated_medium(1024, kernel) == fused

    shape = DenoisingShape(2, (128, 128), 154, torch.float16, 0)
    drawn = [simulate_denoising(config_of(**MEDIUM), shape, None, kernel) for kernel in (None, "math")]
    assert drawn[1] - drawn[0] >= 2 * scores


def test_the_counter_knows_what_is_freed() -> None:
    with AllocationCounter() as counter, torch.device("meta"):
        kept = torch.empty(1000)  # 4000 bytes are 8 × 512
        gone = torch.empty(600, dtype=torch.float16)
        view = gone[10:]
        assert counter.now == 4096 + 1536
        del gone, view
        another = kept + 1
        assert (counter.now, counter.peak) == (8192, 8192)
        del kept, another
    assert counter.now == 0


@pytest.mark.parametrize(("resolution", "batch", "plan"), [(1024, 1, 24), (512, 1, 24), (512, 4, 24), (1024, 4, 24)])
def test_what_was_measured_is_what_is_predicted_now(resolution: int, batch: int, plan: int) -> None:
    """The simulation of SD3-Medium on a CPU, beside the activations and working memory of the committed result."""
    rows = json.loads((PROJECT / "benchmarks" / "results" / "memory-accuracy-h100.json").read_text())["rows"]
    (row, *_) = [
        row
        for row in rows
        if (row["model"], row["resolution"], row["batch"], row["rank"]) == ("sd3-medium", resolution, batch, 4)
        and "placement" in row
        and [row["placement"][key] for key in ("precision", "streamed", "recomputed")] == [None, 0, plan]
    ]
    config = config_of(**MEDIUM)
    latent_size = (resolution // 8, resolution // 8)
    step = simulate_step(config, StepShape(batch, latent_size, 154, None, None, 4, 0.0, torch.float16, 16), None, STEP)
    beside = row["measured_gib"] - sum(row["parts_gib"][name] for name in ("CUDA", "weights", "LoRA and optimizer"))
    allowance = (memory_plan.WORKSPACE_BYTES + memory_plan.UNUSED_BYTES) / GIB
    assert 1.08 * sum(step.peak(range(plan), False)) / GIB + allowance == pytest.approx(beside, abs=0.14)


@pytest.mark.parametrize(("qk_norm", "share"), [(None, 0.77), ("rms_norm", 0.66)])
def test_compiled_blocks_keep_less_and_least_where_queries_and_keys_are_normalized(
    qk_norm: str | None, share: float
) -> None:
    """As measured on GPUs: SD3-Medium 0.77; SD3.5-Medium and SD3.5-Large 0.66."""
    config = config_of(qk_norm=qk_norm)
    plain = simulate_step(config, SHAPE, None, STEP)
    compiled = plain.compiled(config)
    assert compiled.kept == tuple(int(share * size) for size in plain.kept)
    assert compiled.working == int(share * plain.working)
    assert (compiled.inputs, compiled.outside, compiled.lora) == (plain.inputs, plain.outside, plain.lora)
