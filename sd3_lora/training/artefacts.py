"""Stage one's artefacts as training opens them: checked against the flags, with the command that mends a mismatch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, command_words, print_in_rank_0
from sd3_lora.common.config import AUGMENTATION_FLAGS, BUCKET_FLAGS, BudgetConfig, ModelConfig, PictureFlags
from sd3_lora.common.defaults import EMBEDDINGS_PATH, PROJECT_FOLDER, REFERENCE_CLASS_PROMPT, default_folder
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.records import InstanceImage
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import CaptionRules, captions_win, require_apart
from sd3_lora.stage_one.concepts import ClassFolder, Concept, Subject, class_folders_of, concepts_of, read_subject
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.images import BrokenImage, list_images, number_of_variant, open_rgb
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents, recorded_precision
from sd3_lora.stage_one.masks import ALPHA, noted_masks, picture_name
from sd3_lora.stage_one.picture_hashes import NOTES_NAME, hash_pictures
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.dataset import augmented_counts, choose_variants, images_of_store, require_prompts
from sd3_lora.training.prior_flags import PriorConfig

# Set by torchrun and accelerate launch: a child process with them would wait for ranks that do not exist.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
# What a stage-one command read, which training of the same folder need not be told again.
_SOURCE_FLAGS = ("instance_data_dir", "concepts_list", "instance_prompt", "recursive")
_MASK_FLAGS = ("mask_data_dir", "alpha_mask")
_CLASS_FLAGS = ("class_data_dir", "num_class_images")  # that are as typed for training, whatever stage one was told


@dataclass(frozen=True)
class StageOne:
    """The artefacts that a training command names.

    Attributes:
        data: the command's data flags.
        model: its model flags.
        files: the model's files.
        resolution: of the crops, in pixels.
        device: cpu, cuda or auto, for a stage one that training runs itself.
        prior: its flags of prior preservation.
        budget: of GPU memory, for drawing class pictures.
        seed: of their noise.
        more_prompts: the flags with which compute_embeddings.py embeds what is drawn while training.
    """

    data: DataConfig
    model: ModelConfig
    files: ModelFiles
    resolution: int
    device: str
    prior: PriorConfig = field(default_factory=PriorConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    seed: int = 0
    more_prompts: Mapping[str, Any] = field(default_factory=dict)

    def command(self, script: str, **more: Any) -> str:
        """The stage-one command that makes these artefacts, to be typed."""
        return command(script, **{**self._flags(script), **more})

    def _flags(self, script: str) -> dict[str, Any]:
        """The flags of a stage-one script that makes these artefacts: as typed for training, else as typed for it."""
        data = self.data
        if script == "compute_embeddings.py":
            recorded = recorded_flags(Path(data.data_df_path).with_suffix(".json"), EmbeddingConfig)
            specific = {
                "class_prompt": self.prior.class_prompt,
                "max_sequence_length": data.max_sequence_length,
                "output_path": data.data_df_path,
                **self._more_prompts(),
            }
        else:
            recorded = recorded_flags(Path(data.latents_path) / "run.json", LatentConfig)
            left_out = (*BUCKET_FLAGS, *_CLASS_FLAGS)
            recorded = {name: value for name, value in recorded.items() if name not in left_out}
            if data.has_masks:
                recorded = {name: value for name, value in recorded.items() if name not in _MASK_FLAGS}
            specific = {
                **data.mask_flags(),
                **next((self._class_flags(of) for of in self._class_folders() if of.images(1)), {}),
                **data.crop_flags(),
                "resolution": self.resolution,
                "num_crops": data.num_crops,
                "random_flip": data.random_flip,
                "skip_broken": data.skip_broken,
                "output_path": data.latents_path,
            }
        subject = self._subject
        if subject is not None:  # what is read now decides, not what was read then
            kept = (*_SOURCE_FLAGS, *_MASK_FLAGS) if _source(subject) == _source(_picture_flags(recorded)) else ()
            decided = (*data.picture_flags(), *_MASK_FLAGS)
            recorded = {k: v for k, v in recorded.items() if k not in decided or k in kept}
        typed = {
            **self.model.flags(),
            **(subject or data).picture_flags(),
            "device": None if self.device == "auto" else self.device,
            **specific,
        }
        return {**typed, **recorded, **{name: value for name, value in typed.items() if value}}

    @property
    def _subject(self) -> PictureFlags | None:
        """The flags by which training reads pictures and captions; None where the embeddings file is to know them.

        Flags that decide captions, without a folder, are of the folder that stage one read.
        """
        data = self.data
        if data.instance_data_dir is not None or data.concepts_list is not None:
            return data
        decisive = {
            k: v for k, v in data.picture_flags().items() if k not in ("instance_prompt", "recursive", "repeats")
        }
        if not any(decisive.values()):
            return None
        recorded = _picture_flags(recorded_flags(Path(data.data_df_path).with_suffix(".json"), EmbeddingConfig))
        return replace(
            data,
            instance_data_dir=recorded.instance_data_dir,
            concepts_list=recorded.concepts_list,
            recursive=data.recursive or recorded.recursive,
        )

    @property
    def instance_prompt(self) -> str | None:
        """The flag's, with the trigger word for [trigger]."""
        prompt = self.data.instance_prompt
        return None if prompt is None else CaptionRules.of(self.data).filled(prompt)

    def open_embeddings(self) -> EmbeddingStore:
        """The embeddings file.

        Raises:
            UserError: it is missing, broken, or made for another model or length.
        """
        path = Path(self.data.data_df_path)
        remedy = self.command("compute_embeddings.py")
        if not path.exists():
            if self._subject is not None:  # a prompt that is missing there is asked for first
                self._read(self._subject, self._flags("compute_embeddings.py")["instance_prompt"], None)
            raise UserError(f"{path} is not there: type `{remedy}`")
        store = EmbeddingStore(path)
        size = self.data.max_sequence_length or store.provenance.size
        wanted = self.files.provenance(TEXT_COMPONENTS, store.provenance.precision, size)
        difference = store.provenance.difference(wanted, "max_sequence_length")
        if difference:
            raise UserError(f"{path} was made with {difference}: type `{remedy} --overwrite`")
        config = self.files.read_config("transformer")
        widths = config["joint_attention_dim"], config["pooled_projection_dim"]
        if (store.joint_width, store.pooled_width) != widths:
            raise UserError(
                f"{path} is {store.joint_width} and {store.pooled_width} wide, and the transformer takes "
                f"{widths[0]} and {widths[1]}: type `{remedy} --overwrite`"
            )
        return store

    def lacks_embeddings(self) -> bool:
        """Whether the embeddings file is to be made first, as where diffusers' one command does all.

        So it is where pictures are named and the file is not. One that is named and missing may be a slip: making it
        takes minutes.
        """
        data = self.data
        names_pictures = data.instance_data_dir is not None or data.concepts_list is not None
        return names_pictures and data.data_df_path == EMBEDDINGS_PATH and not Path(EMBEDDINGS_PATH).exists()

    def _more_prompts(self) -> dict[str, Any]:
        """The flags with which compute_embeddings.py embeds what is drawn and what the base is kept on."""
        flags, of_prior = dict(self.more_prompts), self.prior.prior_prompts_file
        if of_prior is None:
            return flags
        drawn = flags.get("prompts_file")
        if drawn is not None:  # the script takes one file
            flags["validation_prompt"] = [*flags["validation_prompt"], *read_prompts(Path(drawn))]
        return {**flags, "prompts_file": of_prior}

    def make_embeddings(self) -> None:
        """Runs `compute_embeddings.py` in another process, so that all memory of the text encoders is freed.

        Raises:
            UserError: a picture has neither a caption nor a prompt, or it failed.
        """
        flags = {**self._flags("compute_embeddings.py"), **self.budget.flags()}
        if self._subject is not None:
            self._read(self._subject, flags["instance_prompt"], None)
        self._run("compute_embeddings.py", flags, f"{self.data.data_df_path} is not there", "embeddings")

    def require_embedded(self, store: EmbeddingStore, prompts: Sequence[str]) -> None:
        """Checks that prompts that are to be drawn have their embeddings.

        Raises:
            UserError: one has none; names the command that adds it.
        """
        require_prompts(store, prompts, self.command("compute_embeddings.py", **self._text_flags(store)))

    def open_latents(self) -> LatentCache:
        """The latent cache, empty or not."""
        folder = Path(self.data.latents_path)
        precision = recorded_precision(folder) or "fp32"
        asked = {name: getattr(self.data, name) for name in AUGMENTATION_FLAGS[1:]}
        ranges = {name: value for name, value in asked.items() if value is not None}
        return LatentCache(folder, self.files.provenance(["vae"], precision, self.resolution), ranges=ranges)

    def has_latents(self) -> bool:
        """Whether the cache holds any picture."""
        return any(Path(self.data.latents_path).glob("*.safetensors"))

    def make_latents(self) -> None:
        """Runs `precompute_latents.py` in another process, so that all memory of the VAE is freed.

        Raises:
            UserError: it failed.
        """
        flags = self._flags("precompute_latents.py")
        self._run("precompute_latents.py", flags, f"{self.data.latents_path} holds no latents", "latents")

    def _run(self, script: str, flags: dict[str, Any], lack: str, made: str) -> None:
        """Runs a script in another process.

        Args:
            script: its name.
            flags: its flags.
            lack: why, for the user.
            made: what there is none of where it fails.

        Raises:
            UserError: it failed.
        """
        typed, (name, *arguments) = command(script, **flags), command_words(script, **flags)
        print(f"{lack} yet; in a process of its own: {typed}", flush=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
        if subprocess.run([sys.executable, PROJECT_FOLDER / name, *arguments], env=environment, check=False).returncode:
            raise UserError(f"there are no {made} to train on: mend what is said above, then type `{typed}`")

    def _class_folders(self) -> tuple[ClassFolder, ...]:
        """The folders of class pictures: the flags', or those of the concepts; none without --with_prior_preservation.

        Raises:
            UserError: a concept has none.
        """
        prior, data = self.prior, self.data
        if not prior.with_prior_preservation:
            return ()
        if prior.class_data_dir is not None and prior.class_prompt is not None:
            return (ClassFolder(Path(prior.class_data_dir), prior.class_prompt),)
        return class_folders_of(concepts_of(data), data.concepts_list or "")

    def _class_flags(self, of: ClassFolder) -> dict[str, Any]:
        return {"class_data_dir": of.folder, "num_class_images": self.prior.num_class_images}

    def _class_images(self) -> tuple[InstanceImage, ...]:
        """The class pictures that are there, as many as are asked for of each folder, the same one once."""
        images = (image for of in self._class_folders() for image in of.images(self.prior.num_class_images))
        return tuple({image.image_id: image for image in images}.values())

    def require_class_folder(self, store: EmbeddingStore) -> None:
        """Checks the class pictures' folders and prompts before anything is drawn.

        Raises:
            UserError: a folder is the subject's, or lies within it where subfolders are read, or a picture in it is the
                subject's; a prompt has no embedding.
        """
        classes = self._class_folders()
        recorded = recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig)
        concepts = concepts_of(self._subject or _picture_flags(recorded)) if classes else ()
        for of, concept in itertools.product(classes, concepts):
            folder, subject = of.folder.resolve(), concept.folder.resolve()
            if folder == subject or (self.data.recursive and folder.is_relative_to(subject)):
                relation = "is" if folder == subject else "lies in"
                raise UserError(
                    f"--class_data_dir {of.folder} {relation} the folder of the subject's pictures: give class "
                    "pictures a folder of their own"
                )
        require_apart(store.prompts_of_images().keys(), self._class_images())
        remedy = self.command("compute_embeddings.py", **self._text_flags(store))
        require_prompts(store, [of.prompt for of in classes], remedy)

    def make_class_pictures(self, sizes: Mapping[PictureSize, int]) -> None:
        """Has the class pictures that are missing drawn, and those without latents encoded, each in another process.

        Args:
            sizes: of the crops of the subject's pictures, with how many there are.

        Raises:
            UserError: one of the two failed.
        """
        for of in self._class_folders():
            if len(sizes) > 1:  # the sizes of those that are there decide those of the others
                self._encode_class_pictures(of)
            for lack, flags in self._missing_class_pictures(of, sizes):
                self._run("draw_class_pictures.py", flags, lack, "class pictures")
            self._encode_class_pictures(of)

    def _encode_class_pictures(self, of: ClassFolder) -> None:
        if self._lacks_class_latents(of):
            lack = f"{self.data.latents_path} lacks class pictures of {of.folder}"
            flags = {**self._flags("precompute_latents.py"), **self._class_flags(of)}
            self._run("precompute_latents.py", flags, lack, "latents of the class pictures")

    def require_class_pictures(self, sizes: Mapping[PictureSize, int]) -> None:
        """Checks that all class pictures are there: several processes would wait for rank 0 longer than they may.

        Args:
            sizes: as for `make_class_pictures`.

        Raises:
            UserError: some are missing; names the command that draws them.
        """
        for of in self._class_folders():
            for lack, flags in self._missing_class_pictures(of, sizes):
                typed = command("draw_class_pictures.py", **flags)
                raise UserError(f"{lack}, which are drawn before several processes start: type `{typed}`")

    def _missing_class_pictures(
        self, of: ClassFolder, sizes: Mapping[PictureSize, int]
    ) -> list[tuple[str, dict[str, Any]]]:
        """For each size in which some are to be drawn: how many, in words, and the flags that draw them."""
        have = of.images(self.prior.num_class_images)
        counts = Counter(size for size in self._sizes_of(have, self.open_latents()).values() if size)
        count, wanted = len(have), shared_out(self.prior.num_class_images - len(have), sizes, counts)
        drawings = []
        for size, missing in wanted.items():
            count += missing
            is_square = size == PictureSize.square(self.resolution)
            shape = {} if is_square else {"width": size.width, "height": size.height}
            lack = f"{of.folder} lacks {missing} class picture{'s' if missing > 1 else ''}"
            lack += "" if len(sizes) == 1 else f" of {size} px"
            drawings.append((lack, {**self._drawing_flags(of), "num_class_images": count, **shape}))
        return drawings

    def _sizes_of(self, images: Sequence[InstanceImage], cache: LatentCache) -> dict[str, PictureSize | None]:
        """Of each picture's crops, by its id; None where it has no latents that can be read."""
        buckets = Buckets.of(self.data, self.files)

        def size_of(image: InstanceImage) -> PictureSize | None:
            try:
                entry = cache.look(image.image_id)
            except UserError:  # `variants` says what to do
                return None
            return buckets.size_for(*entry.size) if entry else None

        return {image.image_id: size_of(image) for image in images}

    def _drawing_flags(self, of: ClassFolder) -> dict[str, Any]:
        """The flags of `draw_class_pictures.py`."""
        prior = self.prior
        return {
            **self.model.flags(),
            "class_prompt": of.prompt,
            **self._class_flags(of),
            "prior_generation_precision": prior.prior_generation_precision,
            "sample_batch_size": None if prior.sample_batch_size == 4 else prior.sample_batch_size,
            "data_df_path": self.data.data_df_path,
            "latents_path": self.data.latents_path,
            "resolution": self.resolution,
            "seed": self.seed,
            "device": None if self.device == "auto" else self.device,
            **self.budget.flags(),
        }

    def _lacks_class_latents(self, of: ClassFolder) -> bool:
        """Whether a class picture has no latents, or lacks a crop; not whether they are of other settings."""
        data, cache = self.data, self.open_latents()
        images = [i for i in of.images(self.prior.num_class_images) if i.image_id not in cache.broken()]
        try:
            buckets = Buckets.of(data, self.files)
            choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, "")
        except StaleLatents:  # `variants` says what to do
            return False
        except UserError:
            return True
        return False

    def find_class_images(
        self, images: Sequence[InstanceImage], sizes: Mapping[PictureSize, int], cache: LatentCache
    ) -> tuple[InstanceImage, ...]:
        """The class pictures of the subject's sizes, none without --with_prior_preservation.

        Args:
            images: the subject's.
            sizes: as for `make_class_pictures`.
            cache: of all.

        Raises:
            UserError: one of them is the subject's; none decodes, or none has one of the sizes.
        """
        found = self._class_images()
        require_apart({image.image_id for image in images}, found)
        if not found:
            return ()
        whole = self._without_broken(found, cache)
        size_of = self._sizes_of(whole, cache)
        lacking = [size for size in sizes if size not in size_of.values()]
        if lacking and None not in size_of.values():
            enough = self.prior.num_class_images + len(lacking)
            raise UserError(
                f"no class picture has the shape {lacking[0]} of some of the subject's pictures, beside which only "
                f"those of its shape are trained on: type --num_class_images {enough}, and it is drawn"
            )
        fitting = tuple(image for image in whole if size_of[image.image_id] in (None, *sizes))
        if len(fitting) < len(whole):
            print_in_rank_0(
                f"note: {len(whole) - len(fitting)} class pictures have shapes that no picture of the subject has, and "
                "are left out"
            )
        return fitting

    def find_images(self, store: EmbeddingStore, cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures with their prompts, each of which has its embedding; without those that do not decode.

        Raises:
            UserError: no pictures, or a prompt that stage one has not seen.
        """
        asked, subject = self.instance_prompt, self._subject
        prompt = store.uncaptioned_prompt if asked is None else asked
        remedy = self.command("compute_embeddings.py", **self._text_flags(store))
        if subject is None:
            images = self._named(images_of_store(store, cache), cache)
            images = tuple(replace(image, repeats=self.data.repeats) for image in images)
            captioned = sum(image.prompts != (prompt,) for image in images)
            if asked is not None and asked not in store.prompts_with_role("instance"):
                raise UserError(f"{store.path} describes no picture with {asked!r}: type `{remedy}`")
        else:
            pictures = self._read(subject, prompt, cache.folder / NOTES_NAME)
            images, captioned = pictures.images, pictures.captioned
        if asked is not None and captioned:
            print_in_rank_0(f"note: {captions_win(captioned, len(images), asked)}")
        empty = [""] if self.data.caption_dropout else []
        require_prompts(store, [*(prompt for image in images for prompt in image.prompts), *empty], remedy)
        return self._without_broken(images, cache)

    def _read(self, flags: PictureFlags, prompt: str | None, hashes_path: Path | None) -> Subject:
        return read_subject(_concepts(flags, prompt), flags, hashes_path)

    def prior_prompts(self, store: EmbeddingStore) -> tuple[str, ...]:
        """The prompts on which `--prior_term prediction` keeps the base: the flags', else stage one's class prompts.

        Raises:
            UserError: there are none, or one has no embedding.
        """
        prior = self.prior
        if not prior.predicts:
            return ()
        typed = [] if prior.class_prompt is None else [prior.class_prompt]
        if prior.prior_prompts_file is not None:
            typed += read_prompts(Path(prior.prior_prompts_file))
        prompts = tuple(dict.fromkeys(typed)) or store.prompts_with_role("class")
        flags = self._text_flags(store)
        if not prompts:
            remedy = self.command("compute_embeddings.py", **flags, class_prompt=REFERENCE_CLASS_PROMPT)
            raise UserError(
                f"--prior_term prediction needs the embedding of a class prompt, and {store.path} holds none: for a "
                f"dog type `{remedy}`, for another subject what it is one of"
            )
        require_prompts(store, prompts, self.command("compute_embeddings.py", **flags))
        return prompts

    def _text_flags(self, store: EmbeddingStore) -> dict[str, Any]:
        """Of the command that adds prompts to the embeddings file: its length, and the prompt of a single folder."""
        flags: dict[str, Any] = {"max_sequence_length": store.provenance.size}
        recorded = _picture_flags(recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig))
        source = self._subject or recorded
        if not (source.concepts_list or source.repeats_from_folders):
            asked = self.instance_prompt
            flags["instance_prompt"] = store.uncaptioned_prompt if asked is None else asked
        return flags

    def _named(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures of the embeddings file; those without latents get their names from stage one's folder."""
        if all(cache.path(image.image_id).is_file() or image.image_id in cache.broken() for image in images):
            return images
        recorded = _picture_flags(recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig))
        try:
            folders = [concept.folder for concept in _concepts(recorded, None)]
            paths = [path for folder in folders for path in list_images(folder, recorded.recursive).images]
            names = dict(zip(hash_pictures(paths, cache.folder / NOTES_NAME), paths, strict=True))
        except UserError:  # moved since
            return images
        return tuple(replace(image, path=names.get(image.image_id, image.path)) for image in images)

    def _without_broken(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures that decode, or may: those that stage one has skipped, or --skip_broken skips now, are named.

        Raises:
            UserError: none is left.
        """
        whole, skipped = [], cache.broken()
        for image in images:
            broken: object = skipped.get(image.image_id)
            if not broken and self.data.skip_broken and not cache.path(image.image_id).is_file():
                broken = _why_broken(image)
            if broken:
                print_in_rank_0(f"skipped: {broken}")
            else:
                whole.append(image)
        if not whole:
            raise UserError("no picture decodes: give another --instance_data_dir")
        return tuple(whole)

    def variants(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> dict[str, tuple[str, ...]]:
        """For each picture's id, the cached crops to train on.

        Raises:
            UserError: the cache was made with other settings, lacks a picture or a crop, or has crops of the subject
                with more augmented variants, or others, than those of other pictures.
        """
        remedy, data = self.command("precompute_latents.py"), self.data
        try:
            buckets = Buckets.of(data, self.files)
            chosen = choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, remedy)
        except StaleLatents as error:
            raise UserError(f"{error.path} was made with {error.difference}: type `{remedy} --overwrite`") from error
        chosen |= self._augmented([image for image in images if image.role == "instance"], chosen, cache)
        tiled = sum(not cache.tiles(image_id).keys().isdisjoint(variants) for image_id, variants in chosen.items())
        if tiled:
            print_in_rank_0(
                f"note: {tiled} of {len(images)} pictures were encoded in tiles, which differ a little from the whole"
            )
        return chosen

    def _augmented(
        self, images: Sequence[InstanceImage], chosen: Mapping[str, tuple[str, ...]], cache: LatentCache
    ) -> dict[str, tuple[str, ...]]:
        """For the id of each picture of the subject, its crops with as many augmented variants as all others have.

        Raises:
            UserError: there are more of one crop than of another, or than asked for; or they differ by other amounts.
        """
        asked = self.data.num_augmented
        kept = {
            image.image_id: tuple(v for v in chosen[image.image_id] if asked is None or number_of_variant(v) <= asked)
            for image in images
        }
        counts = {image_id: augmented_counts(variants) for image_id, variants in kept.items()}
        most = max((max(each) for each in counts.values()), default=0) if asked is None else asked
        ranges = {image.image_id: entry.ranges or {} for image in images if (entry := cache.look(image.image_id))}
        first = next((each for each in ranges.values() if each), {})
        remedy = self.command("precompute_latents.py", num_augmented=most, **first)
        for image in images if most else ():
            if counts[image.image_id] != {most}:
                fault = (
                    f"has {min(counts[image.image_id])} augmented variants of a crop of {image.path.name}, not {most}"
                )
            elif ranges[image.image_id] != first:
                fault = f"has variants of {image.path.name} augmented otherwise than those of other pictures"
                remedy += " --overwrite"
            else:
                continue
            raise UserError(f"{cache.folder} {fault}: type `{remedy}`, or --num_augmented 0 to train without")
        return kept

    def require_masks(
        self, images: Sequence[InstanceImage], variants: Mapping[str, Sequence[str]], cache: LatentCache
    ) -> None:
        """Checks under --masked_loss that the cache has the mask of each crop, and of the mask that there is now.

        Args:
            images: the subject's.
            variants: for each picture's id, its crops.
            cache: of the latents.

        Raises:
            UserError: one is missing, or was made of another mask.
        """
        if not self.data.masked_loss:
            return
        flags = self._flags("precompute_latents.py")
        named = {name: flags[name] for name in _MASK_FLAGS if flags.get(name)}
        remedy = f"type `{command('precompute_latents.py', **flags)}`"
        if not named:
            remedy = "add --mask_data_dir with the folder of your masks, or --alpha_mask where pictures have an alpha"
        for image in images:
            if not cache.masks(image.image_id).keys() >= set(variants[image.image_id]):
                raise UserError(f"{cache.folder} has no mask of {image.path.name} for --masked_loss: {remedy}")
        folder = Path(named.get("mask_data_dir", ""))
        if self.data.mask_data_dir is not None and not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder of your masks as --mask_data_dir")
        # A folder that was told to stage one alone may be gone since.
        notes = noted_masks(folder) if "mask_data_dir" in named and folder.is_dir() else None
        if notes is not None and self._subject is None:  # the pictures may have other names by now
            notes = {(picture_name(image.path), source) for image in images for _, source in notes}
        if "alpha_mask" in named:
            notes = {(picture_name(image.path), ALPHA) for image in images}
        for image in images:
            masks, name = cache.masks(image.image_id), picture_name(image.path)
            if notes is not None and any((name, masks[variant]) not in notes for variant in variants[image.image_id]):
                raise UserError(f"the mask of {image.path.name} is not the one in {cache.folder}: {remedy}")


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


def _picture_flags(recorded: dict[str, Any]) -> PictureFlags:
    """The picture flags of a recorded command."""
    return PictureFlags(**{name: value for name, value in recorded.items() if name in PictureFlags().picture_flags()})


def _source(flags: PictureFlags) -> Path:
    """The list or the folder that a command reads."""
    return Path(flags.concepts_list or flags.instance_data_dir or default_folder())


def _concepts(flags: PictureFlags, prompt: str | None) -> tuple[Concept, ...]:
    """The concepts that a command reads.

    Args:
        flags: of the command.
        prompt: of pictures without a caption in a single folder.
    """
    if flags.concepts_list is not None or flags.repeats_from_folders:
        return concepts_of(flags)
    return (Concept(_source(flags), prompt, flags.repeats),)


def _why_broken(image: InstanceImage) -> str | None:
    """Why a picture cannot be decoded; None where it can, or is not there."""
    try:
        if image.path.is_file():
            open_rgb(image.path)
    except BrokenImage as error:
        return str(error)
    return None
