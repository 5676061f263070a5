"""An independent judge of the miniature's pictures: a small network that names what a scene shows.

It has seen rendered scenes only, never a picture that the miniature drew. `train_judge.py` trains it on all objects,
held-out ones included, and writes its own accuracy on other scenes to `judge.json`, to be read beside every score.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from world import ANSWERS, Scenes, load_objects

JUDGE_FILE = Path(__file__).resolve().parent / "judge.safetensors"
HEADS = ("object", *ANSWERS)


@dataclass(frozen=True)
class Verdict:
    """What N pictures show, `(N,)` int64 each: indices into the world's objects, colours, patterns and so on."""

    object: torch.Tensor
    colour: torch.Tensor
    pattern: torch.Tensor
    size: torch.Tensor
    position: torch.Tensor

    def right(self, scenes: Scenes) -> dict[str, torch.Tensor]:
        """For each property, whether the pictures show what the scenes ask for, `(N,)` bool."""
        return {name: getattr(self, name) == getattr(scenes, name).to(getattr(self, name).device) for name in HEADS}


class Judge(nn.Module):
    """Residual convolutions from 128 to 8 pixels; pooled for all questions but where and how large.

    Two more input channels hold each pixel's place, so that a pooled feature can tell left from right.
    """

    def __init__(self, object_count: int, widths: tuple[int, ...] = (32, 48, 80, 128, 160)):
        super().__init__()
        self.stem = nn.Conv2d(5, widths[0], 5, stride=2, padding=2)
        stages: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            stages += [_Block(inner, outer, 2 if inner > widths[0] else 1), _Block(outer, outer, 1)]
        self.stages = nn.Sequential(*stages)
        width = 2 * widths[-1]
        options = {"object": object_count, **ANSWERS}
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in options.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures `(N, 3, 128, 128)` in [-1, 1] → logits `(N, options)` for each question."""
        count, _, height, width = pictures.shape
        y = torch.linspace(-1, 1, height, device=pictures.device, dtype=pictures.dtype)[:, None].expand(-1, width)
        x = torch.linspace(-1, 1, width, device=pictures.device, dtype=pictures.dtype)[None, :].expand(height, -1)
        place = torch.stack([x, y]).expand(count, -1, -1, -1)
        features = self.stages(functional.relu(self.stem(torch.cat([pictures, place], 1))))  # (N, C, 8, 8)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)  # (N, 2C)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def verdict(self, pictures: torch.Tensor) -> Verdict:
        """The likeliest answers for pictures `(N, 3, 128, 128)` in [-1, 1]."""
        device = self.stem.weight.device
        pieces = [self(piece.to(device, torch.float32)) for piece in pictures.split(64)]
        return Verdict(**{name: torch.cat([p[name].argmax(1) for p in pieces]).cpu() for name in HEADS})


class _Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; the first may halve the size."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False, groups=4)
        self.second_norm = nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer or stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(x)) + shortcut)


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """The bundled judge, loaded."""
    judge = Judge(len(load_objects()))
    judge.load_state_dict({name: value.float() for name, value in load_file(JUDGE_FILE).items()})
    return judge.to(device).eval()
