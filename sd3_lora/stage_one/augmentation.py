"""Augmentation: further variants of a picture's crops, turned and brightened or darkened a little."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sd3_lora.common.config import CropFlags
from sd3_lora.stage_one.crop_boxes import CropBox

ROTATION_DEGREES, BRIGHTNESS_RANGE = 5.0, 0.1  # by default


@dataclass(frozen=True)
class Augmentation:
    """How many further variants each crop has, and what they differ by.

    Attributes:
        count: further variants of each crop; of a mirrored twin the same, mirrored.
        rotation_degrees: they are turned by up to so many degrees, either way.
        brightness_range: their brightness is multiplied by 1 - this to 1 + this.
    """

    count: int
    rotation_degrees: float
    brightness_range: float

    @classmethod
    def of(cls, flags: CropFlags) -> Augmentation | None:
        """What flags ask for; None where that is nothing."""
        if not flags.num_augmented:
            return None
        degrees, brightness = flags.rotation_degrees, flags.brightness_range
        return cls(
            flags.num_augmented,
            ROTATION_DEGREES if degrees is None else degrees,
            BRIGHTNESS_RANGE if brightness is None else brightness,
        )

    @property
    def ranges(self) -> dict[str, float]:
        """What the latent cache records, by flag."""
        return {"rotation_degrees": self.rotation_degrees, "brightness_range": self.brightness_range}

    def boxes(self, image_id: str, boxes: Iterable[CropBox]) -> tuple[CropBox, ...]:
        """The further variants of a picture's crops.

        What a variant differs by is drawn by the picture's id, the crop and the variant's number alone: the same
        in each run, and whatever the count.

        Args:
            image_id: of the picture.
            boxes: its crops.
        """
        return tuple(self._turned(image_id, box, number) for box in boxes for number in range(1, self.count + 1))

    def _turned(self, image_id: str, box: CropBox, number: int) -> CropBox:
        digest = hashlib.sha256(f"{image_id} {replace(box, flip=False).name} {number}".encode()).digest()
        turn, light = (int.from_bytes(part, "big") / 2**31 - 1 for part in (digest[:4], digest[4:8]))  # in [-1, 1)
        degrees = round(turn * self.rotation_degrees, 2)  # as the variant's name has it
        return replace(box, number=number, degrees=degrees, brightness=round(1 + light * self.brightness_range, 2))
