"""The small world that the miniature has learnt: objects on backgrounds, and the captions that describe them.

A scene is a row of a few numbers. `captions` puts it into words, `render.py` draws it, and both can be asked for any
number of scenes; the same generator gives the same scenes on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

MINIATURE = Path(__file__).resolve().parent
PICTURE_PX = 128

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 45, 48),
    "orange": (244, 140, 46),
    "yellow": (252, 220, 76),
    "green": (62, 158, 70),
    "blue": (48, 100, 204),
    "purple": (124, 70, 172),
    "pink": (248, 152, 192),
    "brown": (118, 76, 48),
    "black": (26, 26, 30),
    "white": (248, 248, 248),
    "grey": (142, 144, 148),
    "turquoise": (64, 202, 192),
}
PATTERNS = ("plain", "striped", "checkered", "dotted")
SIZES: dict[str, int] = {"small": 48, "medium": 70, "large": 96}  # side of the render in pixels
POSITIONS: dict[str, tuple[int, int]] = {  # words → direction from the middle
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
# How many answers each question about a scene has, beside the one for its object.
ANSWERS = {"colour": len(COLOURS), "pattern": len(PATTERNS), "size": len(SIZES), "position": len(POSITIONS)}
MEDIA = ("photo", "picture", "image")


@dataclass(frozen=True)
class WorldObject:
    """A thing that scenes show.

    Attributes:
        name: in captions.
        render: name of its file in the npm package, without the ending.
        held_out: whether it is a DreamBooth subject, never seen in pretraining.
    """

    name: str
    render: str
    held_out: bool

    @property
    def subject_path(self) -> Path:
        """The bundled render of a held-out object."""
        return MINIATURE / "subjects" / f"{self.name.replace(' ', '_')}.webp"

    @property
    def with_article(self) -> str:
        """The name as a caption has it."""
        plural = self.name.endswith("s") and not self.name.endswith(("ss", "us"))
        return self.name if plural else f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


def load_objects() -> tuple[WorldObject, ...]:
    """All objects, in the order of the judge's classes."""
    rows = json.loads((MINIATURE / "objects.json").read_text(encoding="utf-8"))
    return tuple(WorldObject(**row) for row in rows)


def object_indices(held_out: bool) -> list[int]:
    """The objects that pretraining leaves out, or those that it sees."""
    return [index for index, thing in enumerate(load_objects()) if thing.held_out == held_out]


@dataclass(frozen=True)
class Scenes:
    """N scenes, a tensor of `(N,)` for each property.

    Attributes:
        object: index of the object.
        second: index of an object on the right, -1 where there is one object only (then the first is on the left).
        colour: of the background, index into `COLOURS`.
        pattern: of the background, index into `PATTERNS`.
        size: index into `SIZES`.
        position: of the object, index into `POSITIONS`.
        geometry: `(N, 12)` uniform in [0, 1): jitter of size, place, angle and colour, and the pattern's own
            measures; `render.py` says which is which.
    """

    object: torch.Tensor
    second: torch.Tensor
    colour: torch.Tensor
    pattern: torch.Tensor
    size: torch.Tensor
    position: torch.Tensor
    geometry: torch.Tensor

    def __len__(self) -> int:
        return len(self.object)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on a device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))


def sample_scenes(count: int, objects: Sequence[int], generator: torch.Generator, pairs: float = 0.0) -> Scenes:
    """Draws scenes, every property independently and evenly.

    Args:
        count: how many.
        objects: indices of the objects to draw from.
        generator: on the CPU.
        pairs: share of scenes with two objects, side by side, small or medium.
    """

    def choice(options: int) -> torch.Tensor:
        return torch.randint(options, (count,), generator=generator)

    choices = torch.tensor(objects)
    first, other = choices[choice(len(objects))], choices[choice(len(objects))]
    is_pair = torch.rand(count, generator=generator) < pairs
    colour, pattern, size, position = choice(len(COLOURS)), choice(len(PATTERNS)), choice(len(SIZES)), choice(5)
    return Scenes(
        object=first,
        second=torch.where(is_pair, other, -1),
        colour=colour,
        pattern=pattern,
        size=torch.where(is_pair, size % 2, size),
        position=torch.where(is_pair, 0, position),
        geometry=torch.rand(count, 12, generator=generator),
    )


def full_caption(name: str, scenes: Scenes, index: int) -> str:
    """The caption that names everything in a scene of one object."""
    pattern, colour = PATTERNS[scenes.pattern[index]], list(COLOURS)[scenes.colour[index]]
    size, position = list(SIZES)[scenes.size[index]], list(POSITIONS)[scenes.position[index]]
    return f"a photo of a {size} {name} {position} on a {pattern} {colour} background"


def captions(scenes: Scenes, objects: Sequence[WorldObject], generator: torch.Generator) -> list[str]:
    """A caption for each scene, in varied words; what it leaves out is anything at all.

    The exception: "on a blue background" means a plain one.
    """
    colours, sizes, positions = list(COLOURS), list(SIZES), list(POSITIONS)
    dice = torch.rand(len(scenes), 6, generator=generator).tolist()
    columns = (scenes.object, scenes.second, scenes.colour, scenes.pattern, scenes.size, scenes.position)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    texts = []
    for (thing, second, colour, pattern, size, position), roll in zip(rows, dice, strict=True):
        background = PATTERNS[pattern] + " " + colours[colour]
        if pattern == 0 and roll[0] < 0.5:
            background = colours[colour]
        background = f"{'an' if background[0] in 'aeiou' else 'a'} {background} background"
        medium = "a photo of " if roll[1] < 0.7 else f"a {MEDIA[1]} of " if roll[1] < 0.85 else ""
        if medium == "" and roll[1] < 0.9:
            medium = f"an {MEDIA[2]} of "
        if second >= 0:
            left, right = objects[thing].with_article, objects[second].with_article
            where = ("on the left", "on the right") if roll[2] < 0.5 else ("", "")
            things = f"{left} {where[0]} and {right} {where[1]}".replace("  ", " ").strip()
        else:
            bare = objects[thing].with_article
            if roll[3] < 0.7:
                bare = f"a {sizes[size]} {objects[thing].name}"
            things = f"{bare} {positions[position]}" if roll[4] < 0.7 else bare
        if roll[5] < 0.82:
            texts.append(f"{medium}{things} on {background}")
        elif roll[5] < 0.9:
            texts.append(f"{background} with {things}")
        else:
            texts.append(f"{medium}{things}")
    return texts
