"""How large a picture is: both sides in one object, in one order."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PictureSize:
    """Width and height of a picture in pixels.

    Attributes:
        width: in pixels.
        height: in pixels.

    Raises:
        ValueError: a side is not positive.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture of {self} has no pixels")

    @classmethod
    def square(cls, side_px: int) -> PictureSize:
        """A square picture."""
        return cls(side_px, side_px)

    @classmethod
    def parse(cls, text: str) -> PictureSize:
        """From what `str` gives: "1024x768", width first.

        Raises:
            ValueError: another form.
        """
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"{text!r} is not a size in pixels such as 1024x768")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def longer_side(self) -> int:
        """The larger of the two, in pixels."""
        return max(self.width, self.height)

    def latent(self, vae_scale: int) -> tuple[int, int]:
        """Height and width in latents, the order of a tensor's dimensions.

        Args:
            vae_scale: pixels per latent, see `ModelFiles.latent_channels_and_scale`.
        """
        return self.height // vae_scale, self.width // vae_scale
