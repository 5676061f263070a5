"""Aspect-ratio buckets: the sizes to which pictures are cropped, so that each keeps about its own shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import CropFlags
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize

_STEP_PX = 64  # kohya's default


def bucket_sizes(resolution: int, least: int, most: int, step: int) -> tuple[PictureSize, ...]:
    """The sizes that kohya's sd-scripts make of these parameters, sorted by width and height.

    For each width from `least` to `most` the largest height that is a multiple of `step`, no more than `most`, and
    leaves no more pixels than the square has; each size both upright and lying; and the square.

    Args:
        resolution: side in pixels of the square whose pixels no size exceeds.
        least: shortest side in pixels.
        most: longest side in pixels.
        step: between two sides, in pixels.
    """
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, resolution**2 // width // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return tuple(PictureSize(*size) for size in sorted(sizes))


@dataclass(frozen=True)
class Buckets:
    """The sizes to which pictures are cropped: one for all, or by their shapes.

    Attributes:
        resolution: no crop has more pixels than the square of this side, in pixels.
        sizes: sorted.
        step: of which every side is a multiple, in pixels.
        upscales: whether a small picture is enlarged to its bucket; else it has a bucket of its own.
    """

    resolution: int
    sizes: tuple[PictureSize, ...]
    step: int
    upscales: bool = True

    @classmethod
    def square(cls, resolution: int) -> Buckets:
        """One for all pictures."""
        return cls(resolution, (PictureSize.square(resolution),), resolution)

    @classmethod
    def of(cls, flags: CropFlags, files: ModelFiles) -> Buckets:
        """What flags ask for.

        Raises:
            UserError: a resolution or a bucket that the model cannot take.
        """
        resolution = files.resolution(flags.resolution)
        if not flags.use_aspect_ratio_bucket:
            return cls.square(resolution)
        unit, largest = files.size_step_and_limit()
        default_step = max(unit, min(_STEP_PX, resolution // 8) // unit * unit)
        step = flags.bucket_step or default_step
        if step % unit or step > resolution:
            raise UserError(
                f"--bucket_step {step} does not fit this model at --resolution {resolution}: it must be a multiple of "
                f"{unit} and no more than the resolution: type --bucket_step {default_step}"
            )
        least = flags.bucket_min or max(step, resolution // 2 // step * step)
        most = flags.bucket_max or min(largest, 2 * resolution) // step * step
        fitting = f"of {step} (--bucket_step)"
        if least % step or least > resolution:
            raise UserError(
                f"--bucket_min {least} is not a multiple {fitting} up to the resolution of {resolution}: "
                f"type --bucket_min {max(step, min(least, resolution) // step * step)}"
            )
        if most % step or not resolution // step * step <= most <= largest:
            typed = max(resolution, min(most, largest)) // step * step
            raise UserError(
                f"--bucket_max {most} is not a multiple {fitting} from the resolution of {resolution} up to "
                f"{largest}, which this model takes: type --bucket_max {typed}"
            )
        return cls(resolution, bucket_sizes(resolution, least, most, step), step, not flags.bucket_no_upscale)

    @property
    def largest(self) -> PictureSize:
        """A size of at least as many pixels as any crop has."""
        if not self.upscales:
            return PictureSize.square(self.resolution)
        return max(self.sizes, key=lambda size: (size.pixels, -size.longer_side))

    @property
    def longest_side(self) -> int:
        """Of all crops, in pixels."""
        return max(size.longer_side for size in self.sizes)

    def size_for(self, width: int, height: int) -> PictureSize:
        """The size to which a picture is cropped: its own if that is a bucket, else that of the nearest width / height.

        As kohya's, which compares the ratios and not their logarithms. Where nothing may be enlarged, a picture that
        is smaller than its bucket keeps its shape: both sides are cut to multiples of `step`.

        Args:
            width: of the picture in pixels.
            height: of the picture in pixels.
        """
        own = PictureSize(width, height)
        if own in self.sizes:
            return own
        size = min(self.sizes, key=lambda size: abs(size.width / size.height - width / height))
        if self.upscales or (width >= size.width and height >= size.height):
            return size
        pixels = self.resolution**2
        fitting = min(width, math.isqrt(pixels * width // height)), min(height, math.isqrt(pixels * height // width))
        return PictureSize(*(max(self.step, min(side, self.longest_side) // self.step * self.step) for side in fitting))
