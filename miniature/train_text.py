"""Teaches the three text encoders what captions say, before any picture.

    python miniature/pool.py --output_path WORK/pool.safetensors
    python miniature/train_text.py --work WORK

SD3's encoders know language when SD3's training begins; ours would start from noise. Each encoder by itself has to name
object, colour, pattern, size and position by one linear layer on its pooled answer. What a caption leaves out it can
only guess.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from architecture import make_models
from pool import SHORT_CLIP_TOKENS, SHORT_T5_TOKENS, load_pool, padded
from torch.nn import functional
from world import ANSWERS, MINIATURE, Scenes, load_objects

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
BATCH_SIZE = 2048
LEARNING_RATE = 1e-3
TEST_CAPTIONS = 4096  # the pool's last


class Pupil(torch.nn.Module):
    """A text encoder and a linear layer for each question.

    Args:
        encoder: CLIP or T5.
        width: of its pooled answer: CLIP's projection, or the mean of T5's tokens that are not padding.
        options: answers to each question.
    """

    def __init__(self, encoder: torch.nn.Module, width: int, options: dict[str, int]):
        super().__init__()
        self.encoder = encoder
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, n) for name, n in options.items()})

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Token ids `(B, tokens)` → logits `(B, options)` for each question."""
        output = self.encoder(ids)
        if hasattr(output, "text_embeds"):
            pooled = output.text_embeds
        else:
            is_word = (ids != self.encoder.config.pad_token_id)[:, :, None]
            pooled = (output[0] * is_word).sum(1) / is_word.sum(1)
        return {name: head(pooled) for name, head in self.heads.items()}


def make_pupils(device: torch.device) -> dict[str, Pupil]:
    """The three encoders with random weights, T5's dropout off."""
    options = {"object": len(load_objects()), **ANSWERS}
    encoders = make_models(MINIATURE, ENCODERS, seed=0)
    widths = [getattr(e.config, "projection_dim", None) or e.config.d_model for e in encoders.values()]
    return {
        name: Pupil(encoder, width, options).to(device).eval()
        for (name, encoder), width in zip(encoders.items(), widths, strict=True)
    }


def encoder_ids(name: str, clip_ids: torch.Tensor, t5_ids: torch.Tensor, pupil: Pupil) -> torch.Tensor:
    """An encoder's token ids with its own padding."""
    is_t5 = name == "text_encoder_3"
    ids, length = (t5_ids, SHORT_T5_TOKENS) if is_t5 else (clip_ids, SHORT_CLIP_TOKENS)
    return padded(ids, length, pupil.encoder.config.pad_token_id)


def train(
    pupils: dict[str, Pupil], scenes: Scenes, ids: tuple[torch.Tensor, torch.Tensor], minutes: float, batch_size: int
) -> int:
    """Trains all three for a time; returns the number of steps."""
    device = ids[0].device
    generator = torch.Generator(device).manual_seed(0)
    parameters = [parameter for pupil in pupils.values() for parameter in pupil.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * min(1, 2 * (1 - done))
        rows = torch.randint(len(scenes), (batch_size,), generator=generator, device=device)
        chosen = scenes[rows]
        loss = torch.zeros((), device=device)
        for name, pupil in pupils.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = pupil(encoder_ids(name, ids[0][rows], ids[1][rows], pupil))
            for question, values in logits.items():
                loss = loss + functional.cross_entropy(values.float(), getattr(chosen, question))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text step {step}, {time.perf_counter() - start:.0f} s: loss {loss.item():.3f}", flush=True)
    return step


@torch.no_grad()
def accuracy(pupils: dict[str, Pupil], scenes: Scenes, ids: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """The share of captions from which each encoder names the object."""
    shares = {}
    for name, pupil in pupils.items():
        logits = pupil(encoder_ids(name, *ids, pupil))["object"]
        shares[name] = round((logits.argmax(1) == scenes.object).float().mean().item(), 4)
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="Holds the pool; the folder text is written here.")
    parser.add_argument("--minutes", type=float, default=0.7, help="Of training.")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    scenes, clip_ids, t5_ids = load_pool(flags.work / "pool.safetensors")
    scenes, ids = scenes.to(device), (clip_ids.to(device), t5_ids.to(device))
    most = min(TEST_CAPTIONS, len(scenes) // 10)
    pupils = make_pupils(device)
    steps = train(pupils, scenes[:-most], (ids[0][:-most], ids[1][:-most]), flags.minutes, flags.batch_size)
    report = {"steps": steps, "object": accuracy(pupils, scenes[-most:], (ids[0][-most:], ids[1][-most:]))}
    for name, pupil in pupils.items():
        pupil.encoder.save_pretrained(flags.work / "text" / name)
    (flags.work / "text.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"text: {report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
