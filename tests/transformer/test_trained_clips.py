"""The CLIPs whose LoRA is trained: the stock encoders' numbers, recomputed, counted without a GPU, captured on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

from sd3_lora.common.memory import free_memory
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.exact_attention import choose_backward, exact_attention
from sd3_lora.gpu.simulation import AllocationCounter
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.trained_clips import ClipTraining, TrainedClips

import pytest
import torch
from conftest import PROMPT, Prepared
from small_transformer import CPU, GPU, late_copies, needs_gpu
from training_runs import Script, same_lora, train
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

SIZES = {"text_encoder": (32, 3, "quick_gelu"), "text_encoder_2": (48, 5, "gelu")}
FULL_SIZE = {
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
}
T5_TOKENS, WIDTH = 20, 96


def configs(end: int = 2) -> dict[str, CLIPTextConfig]:
    return {
        name: CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            hidden_act=activation,
            eos_token_id=end,
        )
        for name, (width, layers, activation) in SIZES.items()
    }


def full_size(rank: int = 4) -> ClipTraining:
    found = {}
    for name, sizes in FULL_SIZE.items():
        width = sizes["hidden_size"]
        own = CLIPTextConfig(**sizes, intermediate_size=4 * int(width), projection_dim=width)
        found[name] = own.to_dict()
    return ClipTraining(found, rank)


def make(
    device: torch.device = CPU, dtype: torch.dtype = torch.float32, dropout: float = 0.0, end: int = 2
) -> tuple[TrainedClips, list[torch.nn.Parameter]]:
    """Always the same random weights, and a LoRA whose `lora_B` is random too."""
    torch.manual_seed(0)
    clips = {name: CLIPTextModelWithProjection(config).to(dtype) for name, config in configs(end).items()}
    parameters = ClipTraining({}, 4, dropout).attach(clips)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return TrainedClips(clips).to(device).train(), parameters


def inputs(device: torch.device = CPU, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Of three prompts; their texts end at other places."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 90, (3, 2, 77), generator=generator)
    for row, place in enumerate((5, 30, 76)):
        tokens[row, :, place] = 99
    prompt_embeds = torch.randn(3, 77 + T5_TOKENS, WIDTH, generator=generator)
    return prompt_embeds.to(device, dtype), tokens, torch.ones(3, 2, device=device)


def encoded(
    clips: TrainedClips, prompt_embeds: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    states = (tensor.to(prompt_embeds.device) for tensor in clips.embed(tokens))
    return clips(prompt_embeds, *states, kept)  # type: ignore[no-any-return]


def loss_of(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return sum(part.float().square().mean() for part in found)  # type: ignore[return-value]


@pytest.mark.parametrize("end", [2, 99])
def test_they_are_the_stock_encoders(end: int) -> None:
    """Where the text ends is the largest id, as in old configurations, or the id that the configuration names."""
    stock, _ = make(end=end)
    prompt_embeds, tokens, kept = inputs()
    tokens[0, :, 6:] = 99 if end == 99 else 7  # the first counts
    for clip, embeddings in zip(stock.clips.values(), stock._embeddings, strict=True):
        clip.text_model.embeddings = embeddings
    outputs = [clip(tokens[:, place], output_hidden_states=True) for place, clip in enumerate(stock.clips.values())]
    found, pooled = encoded(make(end=end)[0], prompt_embeds, tokens, kept)
    joined = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    torch.testing.assert_close(found[:, :77, : joined.shape[-1]], joined, atol=1e-5, rtol=1e-5)
    assert not found[:, :77, joined.shape[-1] :].any()
    assert torch.equal(found[:, 77:], prompt_embeds[:, 77:])
    torch.testing.assert_close(pooled, torch.cat([output[0] for output in outputs], dim=-1), atol=1e-5, rtol=1e-5)


def test_a_dropped_part_is_zero_and_has_no_gradient() -> None:
    clips, _ = make()
    prompt_embeds, tokens, kept = inputs()
    kept[:, 0] = 0
    found, pooled = encoded(clips, prompt_embeds, tokens, kept)
    loss_of((found, pooled)).backward()
    assert not found[:, :77, :32].any()
    assert not pooled[:, :32].any()
    has_gradient = {
        name: any(p.grad is not None and bool(p.grad.any()) for p in clip.parameters())
        for name, clip in clips.clips.items()
    }
    assert has_gradient == {"text_encoder": False, "text_encoder_2": True}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_layers_give_the_same_gradients(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; dropout draws the same mask again."""
    from sd3_lora.transformer import trained_clips

    gradients = []
    for recomputes in (True, False):
        if not recomputes:
            monkeypatch.setattr(trained_clips, "recomputed", lambda block, inputs, _: block(*inputs))
        clips, parameters = make(dropout=dropout)
        torch.manual_seed(3)
        loss_of(encoded(clips, *inputs())).backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_streamed_they_give_the_same_bits(device: torch.device, dropout: float) -> None:
    """However late the copies are; passes without a gradient between, as for a validation picture."""
    found = []
    for way in ("resident", "streamed", "streamed, late"):
        clips, parameters = make(device if way == "resident" else CPU, dropout=dropout)
        streams = clips.stream(device) if way != "resident" else None
        with late_copies() if way.endswith("late") and device == CPU else nullcontext():
            results: list[torch.Tensor] = []
            for step in range(3):
                torch.manual_seed(step)
                loss = loss_of(encoded(clips, *inputs(device, seed=step)))
                loss.backward()
                with torch.no_grad():
                    results += [loss.detach(), *encoded(clips.eval(), *inputs(device, seed=9))]
                clips.train()
        found.append([*results, *(parameter.grad for parameter in parameters)])
        if streams:
            assert streams.copies > 100
            weight = clips.clips["text_encoder_2"].text_model.encoder.layers[4].mlp.fc1.weight
            assert weight.device.type == "cpu"
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert all(gradient.any() for gradient in found[0][-8:])


def test_each_clip_has_a_start_of_its_own() -> None:
    """lora_B is zero, and lora_A drawn anew for each CLIP."""
    clips = {name: CLIPTextModelWithProjection(config) for name, config in configs().items()}
    parameters = ClipTraining({}, 2, seed=5).attach(clips)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    first, second = (
        clip.text_model.encoder.layers[0].self_attn.q_proj.lora_A["default"].weight for clip in clips.values()
    )
    assert not torch.allclose(first[:, :16] / first.std(), second[:, :16] / second.std())
    again = {name: CLIPTextModelWithProjection(config) for name, config in configs().items()}
    assert all(map(torch.equal, parameters, ClipTraining({}, 2, seed=5).attach(again)))


# Counted without a GPU


def counted(clips: TrainedClips, rows: int, dtype: torch.dtype) -> AllocationCounter:
    counter = AllocationCounter()
    with torch.device("meta"):
        prompt_embeds = torch.empty(rows, 77 + T5_TOKENS, 4096, dtype=dtype)
        states, ends = torch.empty(rows, 77, 768 + 1280, dtype=dtype), torch.empty(rows, 2, dtype=torch.long)
        kept = torch.empty(rows, 2)
    with counter:
        loss_of(clips(prompt_embeds, states, ends, kept)).backward()
    return counter


def test_full_size_is_counted() -> None:
    """CLIP-L and CLIP-G in 16 bits without embeddings: 1.34 GiB; of a LoRA of rank 4, 4 layers of 12 and of 32."""
    lora = full_size()
    clips = lora.hollow(torch.float16)
    assert lora.states_shape == (77, 2048)
    assert clips.frozen_bytes / 1024**3 == pytest.approx(1.335, abs=0.001)
    trained = sum(parameter.numel() for parameter in clips.parameters() if parameter.requires_grad)
    assert trained == 4 * 4 * 2 * (12 * 768 + 32 * 1280)
    one, four = (counted(full_size().hollow(torch.float16), rows, torch.float16).peak for rows in (1, 4))
    assert 10 < one / 1024**2 < 30
    assert 2.5 < four / one < 4


# On a GPU


@pytest.fixture
def exact() -> Iterator[None]:
    """As in training: attention's exact backward pass, which knows no causal order, must not see that of the CLIPs."""
    with exact_attention(choose_backward(GPU, torch.float16, 64, None, True)):
        yield


@needs_gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_captured_they_give_the_same_numbers(dtype: torch.dtype) -> None:
    """Replayed with other prompts; in every call the same bits as the plain computation."""
    clips, parameters = make(GPU, dtype)
    flat = flatten_parameters(parameters)
    assert flat.grad is not None

    def compute(*given: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype):
            found = clips(*given)
        loss = loss_of(found)
        loss.backward()
        return loss.detach()

    messages: list[str] = []
    captured = CapturedCall(compute, GPU, [flat.grad], True, messages.append, exact=True)
    for seed in range(3):
        prompt_embeds, tokens, kept = inputs(GPU, dtype, seed)
        given, results = (prompt_embeds, *(each.to(GPU) for each in clips.embed(tokens)), kept), []
        for call in (captured, compute):
            flat.grad.zero_()
            results.append((call(*given).clone(), flat.grad.clone()))
        assert all(map(torch.equal, *results)), seed
        assert results[0][1].any()
    assert captured.captured
    assert not messages


@needs_gpu
@pytest.mark.usefixtures("exact")
def test_memory_is_as_counted() -> None:
    """At full size, three layers of each CLIP; what is allocated beside the weights."""
    lora = full_size()
    for config in lora.configs.values():
        config["num_hidden_layers"] = 3  # type: ignore[index]
    clips = {name: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(lora.configs[name]))) for name in CLIPS}
    clips = {name: clip.half() for name, clip in clips.items()}
    parameters = lora.attach(clips)
    trained = TrainedClips(clips).to(GPU).train()
    flatten_parameters(parameters)
    prompt_embeds = torch.randn(4, 77 + T5_TOKENS, 4096, device=GPU, dtype=torch.float16)
    states = [tensor.to(GPU) for tensor in trained.embed(torch.randint(0, 99, (4, 2, 77)))]
    kept = torch.ones(4, 2, device=GPU)
    peaks = []
    for _ in range(2):
        free_memory(GPU)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.float16):
            found = trained(prompt_embeds, *states, kept)
        loss_of(found).backward()
        del found
        peaks.append(torch.cuda.max_memory_allocated() - before)
    predicted = counted(lora.hollow(torch.float16), 4, torch.float16).peak
    assert predicted == pytest.approx(peaks[1], rel=0.3)
    assert all(later <= earlier for earlier, later in pairwise(peaks))


@needs_gpu
def test_a_captured_run_is_the_plain_one(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Bit for bit, streamed too; the CLIPs stop halfway, which captures the step anew, and pictures are drawn."""
    words = ["--train_text_encoder", "--text_encoder_lr", 0.01, "--learning_rate", 0.01, "--max_train_steps", 8]
    words += ["--device", "cuda", "--mixed_precision", "fp16", "--compile", "off", "--deterministic"]
    words += ["--stop_text_encoder_after", 0.5, "--gradient_accumulation_steps", 2]
    words += ["--validation_prompt", PROMPT, "--validation_steps", 3, "--validation_num_steps", 2]
    runs = {}
    for name, more in (
        ("plain", ["--capture", "off"]),
        ("captured", ["--capture", "on"]),
        ("streamed", ["--capture", "on", "--stream_blocks", 2, "--recompute_blocks", 2]),
        ("CLIPs", ["--capture", "on", "--stream_blocks", 2, "--stream_text_encoders", "on"]),
        ("CLIPs alone", ["--capture", "on", "--stream_text_encoders", "on"]),
    ):
        runs[name] = train(script, prepared, tmp_path / name, *words, *more)
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["execution"]["captured"] == (name != "plain"), record["execution"]
        assert len(list((tmp_path / name / "samples").glob("step_*/*.png"))) == 4
    for name in ("captured", "streamed", "CLIPs", "CLIPs alone"):
        assert runs[name].losses == runs["plain"].losses, name
        assert same_lora(tmp_path / name / LORA_FILE, tmp_path / "plain" / LORA_FILE), name
