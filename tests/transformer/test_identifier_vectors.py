"""The identifier's vectors: put in place exactly, held to their size, counted by the plan, and captured."""

from __future__ import annotations

import json
from pathlib import Path

from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.simulation import AllocationCounter
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.identifier_vectors import IdentifierVectors, vectors_from
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.trained_clips import ClipTraining, TrainedClips

import pytest
import torch
from conftest import Prepared
from test_trained_clips import GPU, T5_TOKENS, configs, full_size, inputs, loss_of, needs_gpu
from training_runs import Script, same_lora, train
from transformers import CLIPTextModelWithProjection


def make(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, count: int = 3) -> TrainedClips:
    """Small CLIPs with vectors of the size of their tokens' embeddings."""
    torch.manual_seed(2)
    clips = {name: CLIPTextModelWithProjection(config).to(dtype) for name, config in configs().items()}
    ClipTraining({}, None, vectors=count).attach(clips)
    starts = {name: 0.02 * torch.randn(count, clip.config.hidden_size) for name, clip in clips.items()}
    vectors = IdentifierVectors(starts, dict.fromkeys(CLIPS, 0.02))
    return TrainedClips(clips, vectors).to(device).train()


def tokens_with_identifier(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `inputs`; the first prompt has the identifier twice, the second once, the third never."""
    prompt_embeds, tokens, kept = inputs(seed=seed)
    marks = torch.tensor([-1, -2, -3])
    tokens[0, :, 1:4], tokens[1, :, 20:23] = marks, marks
    tokens[1, 0, 2:5] = marks  # of one CLIP alone
    return prompt_embeds, tokens, kept


def test_a_vector_is_put_in_place_exactly() -> None:
    """The states are those of an embedding table with the vectors as its last rows, bit for bit."""
    clips = make()
    _, tokens, _ = tokens_with_identifier()
    states, ends = clips.embed(tokens)
    places = clips.places(tokens)
    assert clips.identifier is not None
    begin = 0
    for place, (name, vectors) in enumerate(clips.identifier.by_name().items()):
        embeddings = clips._embeddings[place]
        known, ids = embeddings.token_embedding.weight, tokens[:, place]
        table = torch.cat([known, vectors])
        expected = table[torch.where(ids < 0, len(known) - 1 - ids, ids)] + embeddings.position_embedding.weight[:77]
        width = vectors.shape[1]
        found = states[..., begin : begin + width] + clips.identifier.at(name, places[:, place])
        assert torch.equal(found, expected)
        begin += width
    assert ends.tolist() == [[5, 5], [30, 30], [76, 76]]


def test_the_gradient_is_the_sum_over_all_places() -> None:
    vectors = IdentifierVectors({name: torch.randn(3, 4) for name in CLIPS}, dict.fromkeys(CLIPS, 1.0))
    places = torch.tensor([[-1, 0, 1, -1], [1, 1, -1, 2]])
    weights = torch.randn(2, 4, 4)
    (vectors.at("text_encoder", places) * weights).sum().backward()
    expected = torch.zeros(3, 4).index_put((places.clamp(min=0),), weights * (places >= 0)[..., None], accumulate=True)
    torch.testing.assert_close(vectors.vectors["text_encoder"].grad, expected)
    assert vectors.vectors["text_encoder_2"].grad is None


def test_the_size_is_held() -> None:
    """As diffusers' advanced scripts; a step that the scaler skipped changes nothing."""
    starts = {name: torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) for name in CLIPS}
    vectors = IdentifierVectors(starts, {"text_encoder": 0.02, "text_encoder_2": 5.0})
    vectors.hold_size(torch.tensor(float("nan")))
    assert all(torch.equal(vectors.by_name()[name], starts[name]) for name in CLIPS)
    vectors.hold_size(torch.tensor(1.0))
    for name, spread in (("text_encoder", 0.02), ("text_encoder_2", 5.0)):
        torch.testing.assert_close(vectors.by_name()[name], starts[name] * (spread / starts[name].std()) ** 0.1)
    for _ in range(200):
        vectors.hold_size(torch.tensor(1.0))
    assert float(vectors.by_name()["text_encoder"].std()) == pytest.approx(0.02, rel=1e-3)


def test_what_vectors_begin_as() -> None:
    pieces = torch.tensor([[1.0], [3.0], [8.0]])
    assert vectors_from(pieces, None).flatten().tolist() == [1, 3, 8]
    assert vectors_from(pieces, 5).flatten().tolist() == [1, 3, 8, 1, 3]
    assert vectors_from(pieces, 2).flatten().tolist() == [2, 8]
    assert vectors_from(pieces, 1).flatten().tolist() == [4]


def test_the_plan_counts_them() -> None:
    """At full size: n vectors of both widths; the step keeps at most a few MiB more."""
    config, peaks = full_size().configs, []
    for count in (0, 8):
        clips = ClipTraining(config, 4, vectors=count).hollow(torch.float16)
        trained = sum(parameter.numel() for parameter in clips.parameters() if parameter.requires_grad)
        assert trained == 4 * 4 * 2 * (12 * 768 + 32 * 1280) + count * 2048
        counter = AllocationCounter()
        with torch.device("meta"):
            prompt_embeds = torch.empty(1, 77 + T5_TOKENS, 4096, dtype=torch.float16)
            given = torch.empty(1, 77, 2048, dtype=torch.float16), torch.empty(1, 2, dtype=torch.long)
            places = torch.empty(1, 2, 77, dtype=torch.long)
        with counter:
            loss_of(clips(prompt_embeds, *given, torch.empty(1, 2, device="meta"), places)).backward()
        peaks.append(counter.peak)
    assert 0 < peaks[1] - peaks[0] < 8 * 1024**2


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_captured_they_give_the_same_numbers(dtype: torch.dtype) -> None:
    """Replayed with other prompts, and with vectors that were updated between; the same bits in every call."""
    clips = make(GPU, dtype)
    assert clips.identifier is not None
    flat = flatten_parameters(list(clips.identifier.parameters()))
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
        prompt_embeds, tokens, kept = tokens_with_identifier(seed)
        given = [prompt_embeds.to(dtype), *clips.embed(tokens), kept, clips.places(tokens)]
        results = []
        for call in (captured, compute):
            flat.grad.zero_()
            results.append((call(*(tensor.to(GPU) for tensor in given)).clone(), flat.grad.clone()))
        assert all(map(torch.equal, *results)), seed
        assert results[0][1].any()
        flat.data.add_(flat.grad, alpha=-0.1)
        clips.identifier.hold_size(torch.ones((), device=GPU))
    assert captured.captured
    assert not messages


@needs_gpu
def test_a_step_waits_for_nothing() -> None:
    """No host–device synchronisation in putting vectors in place, in their gradient and in holding their size."""
    clips = make(GPU, torch.float16)
    assert clips.identifier is not None
    places = clips.places(tokens_with_identifier()[1]).to(GPU)
    norm = torch.ones((), device=GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for place, name in enumerate(CLIPS):
            clips.identifier.at(name, places[:, place]).square().sum().backward()
        clips.identifier.hold_size(norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_captured_run_is_the_plain_one(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Bit for bit, streamed too: first the embedding, then the LoRA, which captures the step anew."""
    words = ["--train_identifier_embedding", "sks", "--identifier_lr", 0.01, "--learning_rate", 0.01]
    words += ["--start_lora_after", 0.5, "--stop_identifier_after", 0.75, "--max_train_steps", 8]
    words += ["--device", "cuda", "--mixed_precision", "fp16", "--compile", "off", "--deterministic"]
    runs = {}
    for name, more in (
        ("plain", ["--capture", "off"]),
        ("captured", ["--capture", "on"]),
        ("streamed", ["--capture", "on", "--stream_blocks", 2, "--recompute_blocks", 2]),
    ):
        runs[name] = train(script, prepared, tmp_path / name, *words, *more)
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["execution"]["captured"] == (name != "plain"), record["execution"]
    for name in ("captured", "streamed"):
        assert runs[name].losses == runs["plain"].losses, name
        assert same_lora(tmp_path / name / LORA_FILE, tmp_path / "plain" / LORA_FILE), name
        file = "learned_embeds.safetensors"
        assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), name
