"""Pictures that are trained on alike: their role, their weight in the loss, and how often they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sd3_lora.common.records import InstanceImage

Role = Literal["instance", "class"]


@dataclass(frozen=True)
class Pool:
    """Some pictures, in the order of their ids: neither the files' names nor the order of a list changes a run.

    Attributes:
        images: distinct pictures, at least one.
        role: "instance" for the subject, "class" for others of its kind.
        weight: of each picture in the loss.
        repeats: how many times each picture comes in a pass; pictures with repeats of their own as many times more.

    Raises:
        ValueError: there are no pictures, or `repeats` is less than 1.
    """

    images: Sequence[InstanceImage]
    role: Role = "instance"
    weight: float = 1.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.images or self.repeats < 1:
            raise ValueError(f"a pool of {len(self.images)} pictures that come {self.repeats} times a pass")
        object.__setattr__(self, "images", tuple(sorted(self.images, key=lambda image: image.image_id)))

    @property
    def places(self) -> tuple[int, ...]:
        """The pictures of a pass, by their numbers in the pool: each as often as it repeats, and the pool with it."""
        rounds = range(max(image.repeats for image in self.images))
        once = [number for turn in rounds for number, image in enumerate(self.images) if turn < image.repeats]
        return tuple(once * self.repeats)

    @property
    def pass_length(self) -> int:
        """Pictures in a pass, repeats included."""
        return self.repeats * sum(image.repeats for image in self.images)


def pass_length(pools: Sequence[Pool]) -> int:
    """Pictures that training takes from each pool until each had a whole pass."""
    return max(pool.pass_length for pool in pools)


def with_class_pool(
    images: Sequence[InstanceImage], class_images: Sequence[InstanceImage], prior_loss_weight: float
) -> list[Pool]:
    """The subject's pictures, and those of its class where there are any, which meet one to one.

    The mean over a batch, half of which is of each pool, is then the mean loss of the subject's pictures plus
    `prior_loss_weight` times that of the class's: each weight is twice what it is in that sum.
    """
    if not class_images:
        return [Pool(images)]
    return [Pool(images, weight=2.0), Pool(class_images, "class", weight=2 * prior_loss_weight)]
