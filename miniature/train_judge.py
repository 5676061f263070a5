"""Trains the judge on rendered scenes of all objects, and tests it on others.

    python miniature/train_judge.py --renders FOLDER_OF_WEBP --minutes 1.5

Part of the pictures are blurred and noisy, as a drawn picture may be; none was drawn by the miniature.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from judge import HEADS, JUDGE_FILE, Judge
from render import Renderer
from safetensors.torch import save_file
from torch.nn import functional
from world import load_objects, sample_scenes

BATCH_SIZE = 512
LEARNING_RATE = 4e-3


def roughen(pictures: torch.Tensor) -> torch.Tensor:
    """Blurs a quarter of `(N, 3, H, W)` a little, another quarter more, and adds noise to half."""
    quarter = len(pictures) // 4
    for part, size in ((slice(0, quarter), 3), (slice(quarter, 2 * quarter), 5)):
        blurred = functional.avg_pool2d(functional.pad(pictures[part], (size // 2,) * 4, "replicate"), size, 1)
        pictures[part] = torch.lerp(pictures[part], blurred, torch.rand(len(blurred), 1, 1, 1, device=pictures.device))
    strength = 0.1 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    strength[::2] = 0
    return pictures + strength * torch.randn_like(pictures)


@torch.no_grad()
def accuracy(judge: Judge, renderer: Renderer, object_count: int, scene_count: int, seed: int) -> dict[str, float]:
    """The share of right answers to each question over scenes that training has not seen."""
    generator = torch.Generator().manual_seed(seed)
    judge.eval()
    right: dict[str, int] = dict.fromkeys(HEADS, 0)
    for scenes in (sample_scenes(250, range(object_count), generator) for _ in range(scene_count // 250)):
        for name, values in judge.verdict(renderer(scenes)).right(scenes).items():
            right[name] += int(values.sum())
    return {name: round(count / (scene_count // 250 * 250), 4) for name, count in right.items()}


def train(judge: Judge, renderer: Renderer, object_count: int, minutes: float, seed: int) -> int:
    """Trains for a time; returns the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    device = renderer.device
    model = torch.compile(judge) if device.type == "cuda" else judge
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / 200) * (1 - done) + 1e-6
        scenes = sample_scenes(BATCH_SIZE, range(object_count), generator).to(device)
        pictures = roughen(renderer(scenes)).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(pictures)
        loss = sum(functional.cross_entropy(logits[name].float(), getattr(scenes, name)) for name in HEADS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"judge step {step}: loss {loss.item():.3f}", flush=True)
    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--renders", type=Path, required=True, help="The npm package's folder of webp files.")
    parser.add_argument("--minutes", type=float, default=1.5, help="Of training.")
    parser.add_argument("--output_path", type=Path, default=JUDGE_FILE, help="The safetensors file to write.")
    parser.add_argument("--test_scenes", type=int, default=20_000, help="On which it is tested.")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    objects = load_objects()
    renderer = Renderer(objects, flags.renders, device)
    judge = Judge(len(objects)).to(device, memory_format=torch.channels_last)
    steps = train(judge, renderer, len(objects), flags.minutes, seed=1)
    state = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    judge.load_state_dict(state)  # it is tested as it is shipped
    report = {
        **accuracy(judge, renderer, len(objects), flags.test_scenes, seed=2),
        "scenes": flags.test_scenes,
        "steps": steps,
    }
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, flags.output_path)
    flags.output_path.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"judge, on scenes it has not seen: {report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
