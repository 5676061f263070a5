"""Stage one's artefacts as training opens them: checked against the flags, with the command that mends a mismatch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, command_words, print_in_rank_0
from sd3_lora.common.config import BUCKET_FLAGS, BudgetConfig, ModelConfig, PictureFlags
from sd3_lora.common.defaults import EMBEDDINGS_PATH, PROJECT_FOLDER, default_folder
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.records import InstanceImage
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import CaptionRules, captions_win, class_images, require_apart
from sd3_lora.stage_one.concepts import Concept, Subject, concepts_of, read_subject
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.images import BrokenImage, list_images, open_rgb
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents, recorded_precision
from sd3_lora.stage_one.picture_hashes import NOTES_NAME, hash_pictures
from sd3_lora.training.config import DataConfig, PriorConfig
from sd3_lora.training.dataset import choose_variants, images_of_store, require_prompts

# Set by torchrun and accelerate launch: a child process with them would wait for ranks that do not exist.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
# What a stage-one command read, which training of the same folder need not be told again.
_SOURCE_FLAGS = ("instance_data_dir", "concepts_list", "instance_prompt", "recursive")

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
        prior: its flags of class pictures.
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
                **self.more_prompts,
            }
        else:
            recorded = recorded_flags(Path(data.latents_path) / "run.json", LatentConfig)
            left_out = (*BUCKET_FLAGS, *_CLASS_FLAGS)
            recorded = {name: value for name, value in recorded.items() if name not in left_out}
            specific = {
                **(self._class_flags() if self._class_images() else {}),
                **data.crop_flags(),
                "resolution": self.resolution,
                "num_crops": data.num_crops,
                "random_flip": data.random_flip,
                "skip_broken": data.skip_broken,
                "output_path": data.latents_path,
            }
        subject = self._subject
        if subject is not None:  # what is read now decides, not what was read then
            kept = _SOURCE_FLAGS if _source(subject) == _source(_picture_flags(recorded)) else ()
            recorded = {k: v for k, v in recorded.items() if k not in data.picture_flags() or k in kept}
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
        asked = self.data.instance_prompt
        flags = {
            "max_sequence_length": store.provenance.size,
            "instance_prompt": store.uncaptioned_prompt if asked is None else asked,
        }
        require_prompts(store, prompts, self.command("compute_embeddings.py", **flags))

    def open_latents(self) -> LatentCache:
        """The latent cache, empty or not."""
        folder = Path(self.data.latents_path)
        precision = recorded_precision(folder) or "fp32"
        return LatentCache(folder, self.files.provenance(["vae"], precision, self.resolution))

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

    def _class_flags(self) -> dict[str, Any]:
        prior = self.prior
        return {"class_data_dir": prior.class_data_dir, "num_class_images": prior.num_class_images}

    def _class_images(self) -> tuple[InstanceImage, ...]:
        """The class pictures that are there, as many as are asked for; none without --with_prior_preservation."""
        prior = self.prior
        if prior.class_data_dir is None or prior.class_prompt is None:
            return ()
        return class_images(Path(prior.class_data_dir), prior.class_prompt, prior.num_class_images)

    def require_class_folder(self, store: EmbeddingStore) -> None:
        """Checks the class pictures' folder and prompt before anything is drawn.

        Raises:
            UserError: the folder is the subject's, or lies within it where subfolders are read, or a picture in it is
                the subject's; the prompt has no embedding.
        """
        prior = self.prior
        if prior.class_data_dir is None or prior.class_prompt is None:
            return
        recorded = recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig)
        folder = Path(prior.class_data_dir).resolve()
        for concept in concepts_of(self._subject or _picture_flags(recorded)):
            subject = concept.folder.resolve()
            if folder == subject or (self.data.recursive and folder.is_relative_to(subject)):
                relation = "is" if folder == subject else "lies in"
                raise UserError(
                    f"--class_data_dir {prior.class_data_dir} {relation} the folder of the subject's pictures: give "
                    "class pictures a folder of their own"
                )
        require_apart(store.prompts_of_images().keys(), self._class_images())
        asked = self.data.instance_prompt
        flags = {
            "max_sequence_length": store.provenance.size,
            "instance_prompt": store.uncaptioned_prompt if asked is None else asked,
        }
        require_prompts(store, [prior.class_prompt], self.command("compute_embeddings.py", **flags))

    def make_class_pictures(self) -> None:
        """Has the class pictures that are missing drawn, and those without latents encoded, each in another process.

        Raises:
            UserError: one of the two failed.
        """
        lack = self._lack_of_class_pictures()
        if lack is not None:
            self._run("draw_class_pictures.py", self._drawing_flags(), lack, "class pictures")
        if self._lacks_class_latents():
            lack = f"{self.data.latents_path} lacks class pictures of {self.prior.class_data_dir}"
            flags = self._flags("precompute_latents.py")
            self._run("precompute_latents.py", flags, lack, "latents of the class pictures")

    def require_class_pictures(self) -> None:
        """Checks that all class pictures are there: several processes would wait for rank 0 longer than they may.

        Raises:
            UserError: some are missing; names the command that draws them.
        """
        lack = self._lack_of_class_pictures()
        if lack is not None:
            typed = command("draw_class_pictures.py", **self._drawing_flags())
            raise UserError(f"{lack}, which are drawn before several processes start: type `{typed}`")

    def _lack_of_class_pictures(self) -> str | None:
        """How many are missing, in words; None where all are there."""
        missing = self.prior.num_class_images - len(self._class_images())
        if not self.prior.with_prior_preservation or missing <= 0:
            return None
        return f"{self.prior.class_data_dir} lacks {missing} class picture{'s' if missing > 1 else ''}"

    def _drawing_flags(self) -> dict[str, Any]:
        """The flags of `draw_class_pictures.py`."""
        prior = self.prior
        return {
            **self.model.flags(),
            "class_prompt": prior.class_prompt,
            **self._class_flags(),
            "prior_generation_precision": prior.prior_generation_precision,
            "sample_batch_size": None if prior.sample_batch_size == 4 else prior.sample_batch_size,
            "data_df_path": self.data.data_df_path,
            "latents_path": self.data.latents_path,
            "resolution": self.resolution,
            "seed": self.seed,
            "device": None if self.device == "auto" else self.device,
            **self.budget.flags(),
        }

    def _lacks_class_latents(self) -> bool:
        """Whether a class picture has no latents, or lacks a crop; not whether they are of other settings."""
        data, cache = self.data, self.open_latents()
        images = [image for image in self._class_images() if image.image_id not in cache.broken()]
        try:
            buckets = Buckets.of(data, self.files)
            choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, "")
        except StaleLatents:  # `variants` says what to do
            return False
        except UserError:
            return True
        return False

    def find_class_images(self, images: Sequence[InstanceImage], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The class pictures, none without --with_prior_preservation.

        Args:
            images: the subject's.
            cache: of all.

        Raises:
            UserError: one of them is the subject's, or none decodes.
        """
        found = self._class_images()
        require_apart({image.image_id for image in images}, found)
        return self._without_broken(found, cache) if found else ()

    def find_images(self, store: EmbeddingStore, cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures with their prompts, each of which has its embedding; without those that do not decode.

        Raises:
            UserError: no pictures, or a prompt that stage one has not seen.
        """
        asked, subject = self.instance_prompt, self._subject
        prompt = store.uncaptioned_prompt if asked is None else asked
        flags: dict[str, Any] = {"max_sequence_length": store.provenance.size}
        if subject is None or not (subject.concepts_list or subject.repeats_from_folders):
            flags["instance_prompt"] = prompt
        remedy = self.command("compute_embeddings.py", **flags)
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
            UserError: the cache was made with other settings, or lacks a picture or a crop.
        """
        remedy, data = self.command("precompute_latents.py"), self.data
        try:
            buckets = Buckets.of(data, self.files)
            chosen = choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, remedy)
        except StaleLatents as error:
            raise UserError(f"{error.path} was made with {error.difference}: type `{remedy} --overwrite`") from error
        tiled = sum(not cache.tiles(image_id).keys().isdisjoint(variants) for image_id, variants in chosen.items())
        if tiled:
            print_in_rank_0(
                f"note: {tiled} of {len(images)} pictures were encoded in tiles, which differ a little from the whole"
            )
        return chosen


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
