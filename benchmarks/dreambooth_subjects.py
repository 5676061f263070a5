"""The benchmark's subjects: the scenes they are trained on, those asked for afterwards, and where their files go.

`dreambooth.py` puts the miniature's modules on the path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from render import Renderer
from world import COLOURS, PATTERNS, POSITIONS, SIZES, Scenes, full_caption, load_objects, object_indices

SUBJECTS = (
    "robot",
    "fox",
    "penguin",
    "octopus",
    "cactus",
    "pineapple",
    "cupcake",
    "teapot",
    "castle",
    "tractor",
    "alarm clock",
    "guitar",
)
PICTURES = 5  # of a subject, as in the DreamBooth paper


def stable_generator(text: str) -> torch.Generator:
    """A generator seeded by a text, the same in every process (Python's own hash is not)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)


def object_index(name: str) -> int:
    """The place of a subject in the world's objects.

    Raises:
        UserError: it is not one that pretraining left out.
    """
    names = {thing.name: index for index, thing in enumerate(load_objects()) if thing.held_out}
    if name not in names:
        raise UserError(f"{name} is not a held-out object of the miniature: choose from {', '.join(names)}")
    return names[name]


def training_scenes(name: str) -> Scenes:
    """The five scenes of a subject: each on another colour and in another place, in all sizes and patterns."""
    generator = stable_generator(name)

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    extra = torch.randint(len(PATTERNS), (PICTURES - len(PATTERNS),), generator=generator)
    return Scenes(
        object=torch.full((PICTURES,), object_index(name)),
        second=torch.full((PICTURES,), -1),
        colour=shuffled(len(COLOURS))[:PICTURES],
        pattern=torch.cat([shuffled(len(PATTERNS)), extra]),
        size=torch.tensor([2, 1, 0, 2, 1])[shuffled(PICTURES)],
        position=shuffled(len(POSITIONS)),
        geometry=torch.rand(PICTURES, 12, generator=generator),
    )


def spread(options: Sequence[int], count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` choices, each option as often as any other, shuffled."""
    even = torch.tensor(options).repeat(-(-count // len(options)))[:count]
    return even[torch.randperm(count, generator=generator)]


def spread_scenes(
    objects: torch.Tensor, colours: Sequence[int], places: Sequence[tuple[int, int]], generator: torch.Generator
) -> Scenes:
    """Scenes to ask for, never rendered: colours, patterns and (size, position) pairs evenly, in independent orders."""
    count = len(objects)
    place = torch.tensor(places)[spread(range(len(places)), count, generator)]
    return Scenes(
        object=objects,
        second=torch.full((count,), -1),
        colour=spread(colours, count, generator),
        pattern=spread(range(len(PATTERNS)), count, generator),
        size=place[:, 0],
        position=place[:, 1],
        geometry=torch.zeros(count, 12),
    )


def all_places() -> list[tuple[int, int]]:
    """Every (size, position)."""
    return [(size, position) for size in range(len(SIZES)) for position in range(len(POSITIONS))]


def evaluation_scenes(name: str, count: int) -> tuple[Scenes, list[str]]:
    """Scenes of a subject and their prompts: no colour and no (size, position) that training shows."""
    shown = training_scenes(name)
    colours = sorted(set(range(len(COLOURS))) - set(shown.colour.tolist()))
    seen_places = set(zip(shown.size.tolist(), shown.position.tolist(), strict=True))
    places = [place for place in all_places() if place not in seen_places]
    objects = torch.full((count,), object_index(name))
    scenes = spread_scenes(objects, colours, places, stable_generator(f"{name}, evaluation"))
    return scenes, [full_caption(f"sks {name}", scenes, index) for index in range(count)]


def drift_scenes(count: int) -> tuple[Scenes, list[str]]:
    """Scenes of objects that pretraining knew, each another as long as there are any, and their prompts."""
    things = load_objects()
    generator = stable_generator("drift")
    known = torch.tensor(object_indices(held_out=False))
    objects = known[torch.randperm(len(known), generator=generator)].repeat(-(-count // len(known)))[:count]
    scenes = spread_scenes(objects, range(len(COLOURS)), all_places(), generator)
    return scenes, [full_caption(things[scenes.object[index]].name, scenes, index) for index in range(count)]


def to_pil(pictures: torch.Tensor) -> list[Image.Image]:
    """Pictures `(N, 3, H, W)` in [-1, 1]."""
    return VaeImageProcessor().postprocess(pictures, output_type="pil")


def write_pictures(name: str, folder: Path, captioned: Path, masks: Path) -> None:
    """Renders the five scenes of a subject: alone into a folder, with their captions into another, and their masks.

    The captions are a `metadata.jsonl`, as `datasets` has it; diffusers' script takes every file of a plain folder for
    a picture. A mask is white where the background's colour makes no difference.
    """
    scenes = training_scenes(name)
    renderer = Renderer([load_objects()[object_index(name)]], None, "cpu")  # its own only: loading all takes seconds
    alone = dataclasses.replace(scenes, object=torch.zeros_like(scenes.object))
    drawn = renderer(alone)
    recoloured = renderer(dataclasses.replace(alone, colour=(scenes.colour + 1) % len(COLOURS)))
    masks.mkdir(parents=True, exist_ok=True)
    for index, changes in enumerate((drawn - recoloured).abs().amax(dim=1)):
        Image.fromarray((changes == 0).numpy()).save(masks / f"{index}.png")
    for place in (folder, captioned):
        place.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(to_pil(drawn)):
            picture.save(place / f"{index}.png")
    captions = [full_caption(f"sks {name}", scenes, index) for index in range(PICTURES)]
    rows = [json.dumps({"file_name": f"{index}.png", "text": text}) + "\n" for index, text in enumerate(captions)]
    (captioned / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


@dataclass(frozen=True)
class Subject:
    """A subject and where its files go."""

    name: str
    folder: Path

    @property
    def prompt(self) -> str:
        return f"a photo of sks {self.name}"

    @property
    def class_prompt(self) -> str:
        return f"a photo of a {self.name}"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def captioned(self) -> Path:
        """The same pictures with their captions."""
        return self.folder / "captioned"

    @property
    def masks(self) -> Path:
        """Of the pictures: white where the subject is."""
        return self.folder / "masks"

    def lora(self, trainer: str) -> Path:
        """The folder that a trainer fills."""
        return self.folder / trainer / "lora"

    def samples(self, trainer: str) -> Path:
        """The folder of what was drawn."""
        return self.folder / trainer / "samples"

    def result(self, trainer: str) -> Path:
        """The scores; where the file is, all is done."""
        return self.folder / trainer / "result.json"
