"""The class pictures of prior preservation: checked, drawn and encoded where they are missing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, counted, print_in_rank_0
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import class_captions_note, require_apart
from sd3_lora.stage_one.concepts import ClassFolder, concepts_of
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.dataset import choose_variants, require_prompts
from sd3_lora.training.stage_one_request import StageOneRequest


@dataclass(frozen=True)
class ClassImages:
    """The class pictures that a training command asks for; none without --with_prior_preservation.

    Attributes:
        stage_one: the artefacts that they are in.
    """

    stage_one: StageOne

    @property
    def request(self) -> StageOneRequest:
        """What is asked of stage one."""
        return self.stage_one.request

    def require_folders(self, store: EmbeddingStore) -> None:
        """Checks the class pictures' folders and prompts before anything is drawn.

        Raises:
            UserError: a folder is the subject's, or lies within it where subfolders are read, or a picture in it is the
                subject's; a prompt has no embedding.
        """
        classes = self.request.class_folders()
        concepts = concepts_of(self.request.subject or self.request.recorded) if classes else ()
        for of, concept in itertools.product(classes, concepts):
            folder, subject = of.folder.resolve(), concept.folder.resolve()
            if folder == subject or (self.request.data.recursive and folder.is_relative_to(subject)):
                relation = "is" if folder == subject else "lies in"
                raise UserError(
                    f"--class_data_dir {of.folder} {relation} the folder of the subject's pictures: give class "
                    "pictures a folder of their own"
                )
        require_apart(store.prompts_of_images().keys(), self._present())
        remedy = self.request.command("compute_embeddings.py", **self.request.text_flags(store))
        drawn = self.request.prior.class_prompts_file
        captions = [prompt for image in self._present() for prompt in image.prompts]
        captions += read_prompts(Path(drawn)) if drawn is not None and classes else []
        require_prompts(store, [*(of.prompt for of in classes), *captions], remedy)
        for of in classes:
            note = None if of.has_captions else class_captions_note(of.folder)
            if note:
                print_in_rank_0(note)

    def make(self, sizes: Mapping[PictureSize, int]) -> None:
        """Has the class pictures that are missing drawn, and those without latents encoded, each in another process.

        Args:
            sizes: of the crops of the subject's pictures, with how many there are.

        Raises:
            UserError: one of the two failed.
        """
        for of in self.request.class_folders():
            if len(sizes) > 1:  # the sizes of those that are there decide those of the others
                self._encode(of)
            for lack, flags in self._missing(of, sizes):
                self.request.run("draw_class_pictures.py", flags, lack, "class pictures")
            self._encode(of)

    def require(self, sizes: Mapping[PictureSize, int]) -> None:
        """Checks that all class pictures are there: several processes would wait for rank 0 longer than they may.

        Args:
            sizes: as for `make`.

        Raises:
            UserError: some are missing; names the command that draws them.
        """
        for of in self.request.class_folders():
            for lack, flags in self._missing(of, sizes):
                typed = command("draw_class_pictures.py", **flags)
                raise UserError(f"{lack}, which are drawn before several processes start: type `{typed}`")

    def find(
        self, images: Sequence[InstanceImage], sizes: Mapping[PictureSize, int], cache: LatentCache
    ) -> tuple[InstanceImage, ...]:
        """The class pictures of the subject's sizes, none without --with_prior_preservation.

        Args:
            images: the subject's.
            sizes: as for `make`.
            cache: of all.

        Raises:
            UserError: one of them is the subject's; none decodes, or none has one of the sizes.
        """
        found = self._present()
        require_apart({image.image_id for image in images}, found)
        if not found:
            return ()
        whole = self.stage_one.without_broken(found, cache)
        size_of = self._sizes_of(whole, cache)
        lacking = [size for size in sizes if size not in size_of.values()]
        if lacking and None not in size_of.values():
            enough = self.request.prior.num_class_images + len(lacking)
            raise UserError(
                f"no class picture has the shape {lacking[0]} of some of the subject's pictures, beside which only "
                f"those of its shape are trained on: type --num_class_images {enough}, and it is drawn"
            )
        fitting = tuple(image for image in whole if size_of[image.image_id] in (None, *sizes))
        if len(fitting) < len(whole):
            print_in_rank_0(
                f"note: left out: {counted(len(whole) - len(fitting), 'class picture')} of shapes that no picture of "
                "the subject has"
            )
        return fitting

    def _present(self) -> tuple[InstanceImage, ...]:
        """The class pictures that are there, as many as are asked for of each folder, the same one once."""
        most = self.request.prior.num_class_images
        images = (image for of in self.request.class_folders() for image in of.images(most))
        return tuple({image.image_id: image for image in images}.values())

    def _encode(self, of: ClassFolder) -> None:
        if self._lacks_latents(of):
            lack = f"{self.request.data.latents_path} lacks class pictures of {of.folder}"
            flags = {**self.request.flags("precompute_latents.py"), **self.request.class_flags(of)}
            self.request.run("precompute_latents.py", flags, lack, "latents of the class pictures")

    def _missing(self, of: ClassFolder, sizes: Mapping[PictureSize, int]) -> list[tuple[str, dict[str, Any]]]:
        """For each size in which some are to be drawn: how many, in words, and the flags that draw them."""
        have = of.images(self.request.prior.num_class_images)
        counts = Counter(size for size in self._sizes_of(have, self.stage_one.open_latents()).values() if size)
        count, wanted = len(have), shared_out(self.request.prior.num_class_images - len(have), sizes, counts)
        drawings = []
        for size, missing in wanted.items():
            count += missing
            is_square = size == PictureSize.square(self.request.resolution)
            shape = {} if is_square else {"width": size.width, "height": size.height}
            lack = f"{of.folder} lacks {counted(missing, 'class picture')}"
            lack += "" if len(sizes) == 1 else f" of {size} px"
            drawings.append((lack, {**self.request.drawing_flags(of), "num_class_images": count, **shape}))
        return drawings

    def _sizes_of(self, images: Sequence[InstanceImage], cache: LatentCache) -> dict[str, PictureSize | None]:
        """Of each picture's crops, by its id; None where it has no latents that can be read."""
        buckets = Buckets.of(self.request.data, self.request.files)

        def size_of(image: InstanceImage) -> PictureSize | None:
            try:
                entry = cache.look(image.image_id)
            except UserError:  # `choose_crops` says what to do
                return None
            return buckets.size_for(*entry.size) if entry else None

        return {image.image_id: size_of(image) for image in images}

    def _lacks_latents(self, of: ClassFolder) -> bool:
        """Whether a class picture has no latents, or lacks a crop; not whether they are of other settings."""
        data, cache = self.request.data, self.stage_one.open_latents()
        images = [i for i in of.images(self.request.prior.num_class_images) if i.image_id not in cache.broken()]
        try:
            buckets = Buckets.of(data, self.request.files)
            choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, "")
        except StaleLatents:  # `choose_crops` says what to do
            return False
        except UserError:
            return True
        return False


def shared_out(
    count: int, parts: Mapping[PictureSize, int], before: Mapping[PictureSize, int]
) -> dict[PictureSize, int]:
    """How many of `count` more pictures each size gets, so that all are in proportion as far as that goes.

    A size of which there are none comes first.

    Args:
        count: of pictures; none where it is not positive.
        parts: of each size, in proportion to the others.
        before: how many there are of each size.
    """
    whole = sum(parts.values())
    added = dict.fromkeys(parts, 0)
    total = count + sum(before.get(size, 0) for size in parts)
    for _ in range(count):
        now = {size: before.get(size, 0) + added[size] for size in parts}
        added[max(parts, key=lambda size: (now[size] == 0, total * parts[size] / whole - now[size]))] += 1
    return {size: more for size, more in added.items() if more}
