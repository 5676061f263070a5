"""Dropout of each text encoder's part: where it lies, when it is dropped, and exact resume."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.joined_embeddings import join_embeddings
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.records import TrainingBatch
from sd3_lora.training.draws import GlobalDraws
from sd3_lora.training.encoder_dropout import EncoderDropout
from sd3_lora.training.micro_batches import InputSampler

import pytest
import torch
from conftest import Prepared
from test_resume import assert_same_run
from training_runs import Script, train

CHANCES = ["--clip_l_dropout", 0.5, "--clip_g_dropout", 0.4, "--t5_dropout", 0.3]
# The tiny model's: width of a CLIP's hidden states and of its pooled embedding, and T5's width.
CLIP_L, CLIP_G, T5, CLIP_TOKENS, T5_TOKENS = 8, 16, 48, 77, 20


class Parts:
    """What each encoder gives, for some prompts."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.clips = [torch.randn(count, CLIP_TOKENS, width, generator=generator) for width in (CLIP_L, CLIP_G)]
        self.pooled = [torch.randn(count, width, generator=generator) for width in (CLIP_L, CLIP_G)]
        self.t5 = torch.randn(count, T5_TOKENS, T5, generator=generator)

    def drop(self, row: int, encoder: int) -> None:
        for tensor in [self.clips[encoder], self.pooled[encoder]] if encoder < 2 else [self.t5]:
            tensor[row] = 0

    def batch(self) -> TrainingBatch:
        count, latents = len(self.t5), torch.zeros(len(self.t5), 16, 8, 8)
        embeds = join_embeddings(self.clips, self.t5)
        return TrainingBatch(("id",) * count, latents, latents, embeds, torch.cat(self.pooled, 1), torch.ones(count))


@pytest.fixture
def files(tiny_sd3: Path) -> ModelFiles:
    return ModelFiles(ModelConfig(str(tiny_sd3)))


def test_a_dropped_part_is_zero_as_if_the_encoder_had_given_zeros(files: ModelFiles) -> None:
    draws = [
        torch.tensor([0.1, 0.9, 0.1, 0.9]),
        torch.tensor([0.9, 0.39, 0.1, 0.9]),
        torch.tensor([0.9, 0.9, 0.2, 0.31]),
    ]
    before, expected = Parts(4), Parts(4)
    for row, encoder in ((0, 0), (2, 0), (1, 1), (2, 1), (2, 2)):
        expected.drop(row, encoder)
    coming = iter(draws)
    batch = before.batch()
    dropped = EncoderDropout.of(files, 0.5, 0.4, 0.3).apply(batch, lambda: next(coming))
    assert torch.equal(dropped.prompt_embeds, expected.batch().prompt_embeds)
    assert torch.equal(dropped.pooled_prompt_embeds, expected.batch().pooled_prompt_embeds)
    assert not dropped.prompt_embeds[2].any()
    assert torch.equal(batch.prompt_embeds, Parts(4).batch().prompt_embeds)  # what is read once is kept as it is


def test_without_a_chance_nothing_is_drawn(files: ModelFiles) -> None:
    batch = Parts(2).batch()
    assert EncoderDropout.of(files, 0.0, 0.0, 0.0).apply(batch, lambda: pytest.fail("drawn")) is batch
    once = iter([torch.tensor([0.5, 0.0])])
    dropped = EncoderDropout.of(files, 0.0, 0.0, 0.1).apply(batch, lambda: next(once))
    assert torch.equal(dropped.prompt_embeds[0], batch.prompt_embeds[0])
    assert torch.equal(dropped.pooled_prompt_embeds, batch.pooled_prompt_embeds)
    assert not dropped.prompt_embeds[1, CLIP_TOKENS:].any()


def test_two_ranks_see_what_one_process_sees(files: ModelFiles) -> None:
    dropout, whole = EncoderDropout.of(files, 0.5, 0.5, 0.5), Parts(4).batch()
    alone = dropout.apply(whole, partial(GlobalDraws(3, 4).uniform, 4)).prompt_embeds
    assert not torch.equal(alone, whole.prompt_embeds)
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        half = TrainingBatch(*(value if value is None else value[rows] for value in vars(whole).values()))
        mine = dropout.apply(half, partial(GlobalDraws(3, 2, rank, 2).uniform, 2))
        assert torch.equal(mine.prompt_embeds, alone[rows])


@pytest.mark.parametrize(
    ("flag", "zero"),
    [
        ("clip_l_dropout", (slice(0, CLIP_TOKENS), slice(0, CLIP_L), slice(0, CLIP_L))),
        ("clip_g_dropout", (slice(0, CLIP_TOKENS), slice(CLIP_L, CLIP_L + CLIP_G), slice(CLIP_L, None))),
        ("t5_dropout", (slice(CLIP_TOKENS, None), slice(None), slice(0, 0))),
    ],
)
def test_each_flag_drops_its_encoder(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    zero: tuple[slice, slice, slice],
) -> None:
    seen: list[TrainingBatch] = []
    original = InputSampler.sample
    monkeypatch.setattr(InputSampler, "sample", lambda self, batch: original(self, seen.append(batch) or batch))
    train(script, prepared, tmp_path / "without", "--max_train_steps", 1)
    train(script, prepared, tmp_path / "with", f"--{flag}", 1.0, "--max_train_steps", 1)
    plain, dropped = seen
    tokens, columns, pooled = zero
    embeds, pools = plain.prompt_embeds.clone(), plain.pooled_prompt_embeds.clone()
    assert embeds[:, tokens, columns].any()
    embeds[:, tokens, columns] = 0
    pools[:, pooled] = 0
    assert torch.equal(dropped.prompt_embeds, embeds)
    assert torch.equal(dropped.pooled_prompt_embeds, pools)


def test_resume_is_exact_and_another_chance_is_refused(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*CHANCES, "--caption_dropout", 0.2, "--train_batch_size", 2, "--checkpointing_steps", 3]
    whole = train(script, prepared, tmp_path / "whole", *words, "--max_train_steps", 5)
    part = train(script, prepared, tmp_path / "part", *words, "--max_train_steps", 3)
    again = ["--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
    refused = train(script, prepared, tmp_path / "part", *words, "--t5_dropout", 0.1, *again, code=2)
    assert "was trained with --t5_dropout 0.3, not 0.1: type --t5_dropout 0.3" in refused.error
    train(script, prepared, tmp_path / "part", *words, *again)
    assert_same_run(whole.folder, part.folder, 5)
    identity = json.loads((whole.folder / "run.json").read_text())["identity"]
    assert [identity[f"--{name}_dropout"] for name in ("clip_l", "clip_g", "t5")] == [0.5, 0.4, 0.3]
