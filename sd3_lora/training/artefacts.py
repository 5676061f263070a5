"""Stage one's artefacts as training opens them: checked against the flags, with the command that mends a mismatch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, command_words, print_in_rank_0
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import PROJECT_FOLDER, default_folder
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.records import InstanceImage
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.stage_one.captions import InstanceFolder, captions_win, instance_images
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.images import BrokenImage, list_images, open_rgb
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents, recorded_precision
from sd3_lora.stage_one.picture_hashes import NOTES_NAME, hash_pictures
from sd3_lora.training.config import DataConfig
from sd3_lora.training.dataset import choose_variants, images_of_store, require_prompts

# Set by torchrun and accelerate launch: a child process with them would wait for ranks that do not exist.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass(frozen=True)
class StageOne:
    """The artefacts that a training command names.

    Attributes:
        data: the command's data flags.
        model: its model flags.
        files: the model's files.
        resolution: of the crops, in pixels.
        device: cpu, cuda or auto, for a stage one that training runs itself.
    """

    data: DataConfig
    model: ModelConfig
    files: ModelFiles
    resolution: int
    device: str

    def command(self, script: str, **more: Any) -> str:
        """The stage-one command that makes these artefacts, to be typed."""
        return command(script, **{**self._flags(script), **more})

    def _flags(self, script: str) -> dict[str, Any]:
        """The flags of a stage-one script that makes these artefacts: as typed for training, else as typed for it."""
        data = self.data
        if script == "compute_embeddings.py":
            recorded = recorded_flags(Path(data.data_df_path).with_suffix(".json"), EmbeddingConfig)
            specific = {"max_sequence_length": data.max_sequence_length, "output_path": data.data_df_path}
        else:
            recorded = recorded_flags(Path(data.latents_path) / "run.json", LatentConfig)
            specific = {
                "resolution": self.resolution,
                "center_crop": data.center_crop,
                "num_crops": data.num_crops,
                "random_flip": data.random_flip,
                "skip_broken": data.skip_broken,
                "output_path": data.latents_path,
            }
        folder = data.instance_data_dir
        if folder is not None and Path(folder) != _recorded_folder(recorded):
            recorded = {name: value for name, value in recorded.items() if name not in data.picture_flags()}
        typed = {
            **self.model.flags(),
            **data.picture_flags(),
            "device": None if self.device == "auto" else self.device,
            **specific,
        }
        return {**typed, **recorded, **{name: value for name, value in typed.items() if value}}

    def open_embeddings(self) -> EmbeddingStore:
        """The embeddings file.

        Raises:
            UserError: it is missing, broken, or made for another model or length.
        """
        path = Path(self.data.data_df_path)
        remedy = self.command("compute_embeddings.py")
        if not path.exists():
            if self.data.instance_data_dir is not None:  # a prompt that is missing there is asked for first
                self._read_folder(self._flags("compute_embeddings.py")["instance_prompt"], None)
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
        name = "precompute_latents.py"
        remedy = self.command(name)
        print(f"{self.data.latents_path} holds no latents yet; in a process of its own: {remedy}", flush=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
        script, *arguments = command_words(name, **self._flags(name))
        if subprocess.run(
            [sys.executable, PROJECT_FOLDER / script, *arguments], env=environment, check=False
        ).returncode:
            raise UserError(f"there are no latents to train on: mend what is said above, then type `{remedy}`")

    def find_images(self, store: EmbeddingStore, cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures with their prompts, each of which has its embedding; without those that do not decode.

        Raises:
            UserError: no pictures, or a prompt that stage one has not seen.
        """
        asked = self.data.instance_prompt
        prompt = store.uncaptioned_prompt if asked is None else asked
        flags = {"max_sequence_length": store.provenance.size, "instance_prompt": prompt}
        remedy = self.command("compute_embeddings.py", **flags)
        if self.data.instance_data_dir is None:
            images = self._named(images_of_store(store, cache), cache)
            captioned = sum(image.prompt != prompt for image in images)
            if asked is not None and asked not in store.prompts_with_role("instance"):
                raise UserError(f"{store.path} describes no picture with {asked!r}: type `{remedy}`")
        else:
            subject = self._read_folder(prompt, cache.folder / NOTES_NAME)
            images, captioned = subject.images, subject.captioned
        if asked is not None and captioned:
            print_in_rank_0(f"note: {captions_win(captioned, len(images), asked)}")
        require_prompts(store, [image.prompt for image in images], remedy)
        return self._without_broken(images, cache)

    def class_prompt(self, store: EmbeddingStore) -> str:
        """The prompt that stage one was given for the subject's class.

        Raises:
            UserError: it was given none.
        """
        known = store.prompts_with_role("class")
        if not known:
            remedy = self.command(
                "compute_embeddings.py",
                instance_prompt=self.data.instance_prompt or store.uncaptioned_prompt,
                max_sequence_length=store.provenance.size,
                class_prompt="a photo of a dog",
            )
            raise UserError(
                f"--prior_term prediction needs the embedding of a class prompt, and {store.path} holds none: for a "
                f"dog type `{remedy}`, for another subject what it is one of"
            )
        return known[0]

    def _read_folder(self, prompt: str | None, hashes_path: Path | None) -> InstanceFolder:
        return instance_images(Path(self.data.instance_data_dir or ""), prompt, self.data.recursive, hashes_path)

    def _named(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures of the embeddings file; those without latents get their names from stage one's folder."""
        if all(cache.path(image.image_id).is_file() or image.image_id in cache.broken() for image in images):
            return images
        recorded = recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig)
        try:
            paths = list_images(_recorded_folder(recorded), recorded.get("recursive", False)).images
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
            chosen = choose_variants(images, cache, data.center_crop, data.num_crops, data.random_flip, remedy)
        except StaleLatents as error:
            raise UserError(f"{error.path} was made with {error.difference}: type `{remedy} --overwrite`") from error
        tiled = sum(not cache.tiles(image_id).keys().isdisjoint(variants) for image_id, variants in chosen.items())
        if tiled:
            print_in_rank_0(
                f"note: {tiled} of {len(images)} pictures were encoded in tiles, which differ a little from the whole"
            )
        return chosen


def _recorded_folder(recorded: dict[str, Any]) -> Path:
    """The folder of pictures that a stage-one command read."""
    return Path(recorded.get("instance_data_dir") or default_folder())


def _why_broken(image: InstanceImage) -> str | None:
    """Why a picture cannot be decoded; None where it can, or is not there."""
    try:
        if image.path.is_file():
            open_rgb(image.path)
    except BrokenImage as error:
        return str(error)
    return None
