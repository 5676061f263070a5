"""Stage one's artefacts as training opens them: checked against the flags, with the command that mends a mismatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sd3_lora.common.command_line import UserError, print_in_rank_0
from sd3_lora.common.config import AUGMENTATION_FLAGS, PictureFlags
from sd3_lora.common.defaults import EMBEDDINGS_PATH, REFERENCE_CLASS_PROMPT
from sd3_lora.common.model_files import TEXT_COMPONENTS
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.captions import captions_win
from sd3_lora.stage_one.concepts import Subject, read_subject
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.image_files import list_images
from sd3_lora.stage_one.images import BrokenImage, open_rgb
from sd3_lora.stage_one.latent_cache import LatentCache, recorded_precision
from sd3_lora.stage_one.picture_hashes import NOTES_NAME, hash_pictures
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.training.dataset import images_of_store, require_prompts
from sd3_lora.training.stage_one_request import StageOneRequest, concepts_read


@dataclass(frozen=True)
class StageOne:
    """The artefacts that a training command names.

    Attributes:
        request: what the command asks of stage one.
    """

    request: StageOneRequest

    def open_embeddings(self) -> EmbeddingStore:
        """The embeddings file.

        Raises:
            UserError: it is missing, broken, or made for another model or length.
        """
        path = Path(self.request.data.data_df_path)
        remedy = self.request.command("compute_embeddings.py")
        if not path.exists():
            if self.request.subject is not None:  # a prompt that is missing there is asked for first
                self._read(self.request.subject, self.request.flags("compute_embeddings.py")["instance_prompt"], None)
            raise UserError(f"{path} is not there: type `{remedy}`")
        store = EmbeddingStore(path)
        size = self.request.data.max_sequence_length or store.provenance.size
        wanted = self.request.files.provenance(TEXT_COMPONENTS, store.provenance.precision, size)
        difference = store.provenance.difference(wanted, "max_sequence_length")
        if difference:
            raise UserError(f"{path} was made with {difference}: type `{remedy} --overwrite`")
        config = self.request.files.read_config("transformer")
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
        data = self.request.data
        names_pictures = data.instance_data_dir is not None or data.concepts_list is not None
        return names_pictures and data.data_df_path == EMBEDDINGS_PATH and not Path(EMBEDDINGS_PATH).exists()

    def make_embeddings(self) -> None:
        """Runs `compute_embeddings.py` in another process, so that all memory of the text encoders is freed.

        Raises:
            UserError: a picture has neither a caption nor a prompt, or it failed.
        """
        flags = {**self.request.flags("compute_embeddings.py"), **self.request.budget.flags()}
        if self.request.subject is not None:
            self._read(self.request.subject, flags["instance_prompt"], None)
        self.request.run("compute_embeddings.py", flags, f"{self.request.data.data_df_path} is not there", "embeddings")

    def require_embedded(self, store: EmbeddingStore, prompts: Sequence[str]) -> None:
        """Checks that prompts that are to be drawn have their embeddings.

        Raises:
            UserError: one has none; names the command that adds it.
        """
        require_prompts(store, prompts, self.request.command("compute_embeddings.py", **self.request.text_flags(store)))

    def prior_prompts(self, store: EmbeddingStore) -> tuple[str, ...]:
        """The prompts on which `--prior_term prediction` keeps the base: the flags', else stage one's class prompts.

        Raises:
            UserError: there are none, or one has no embedding.
        """
        prior = self.request.prior
        if not prior.predicts:
            return ()
        typed = [] if prior.class_prompt is None else [prior.class_prompt]
        if prior.prior_prompts_file is not None:
            typed += read_prompts(Path(prior.prior_prompts_file))
        prompts = tuple(dict.fromkeys(typed)) or store.prompts_with_role("class")
        flags = self.request.text_flags(store)
        if not prompts:
            remedy = self.request.command("compute_embeddings.py", **flags, class_prompt=REFERENCE_CLASS_PROMPT)
            raise UserError(
                f"--prior_term prediction needs the embedding of a class prompt, and {store.path} holds none: for a "
                f"dog type `{remedy}`, for another subject what it is one of"
            )
        require_prompts(store, prompts, self.request.command("compute_embeddings.py", **flags))
        return prompts

    def open_latents(self) -> LatentCache:
        """The latent cache, empty or not."""
        request, folder = self.request, Path(self.request.data.latents_path)
        precision = recorded_precision(folder) or "fp32"
        asked = {name: getattr(request.data, name) for name in AUGMENTATION_FLAGS[1:]}
        ranges = {name: value for name, value in asked.items() if value is not None}
        return LatentCache(folder, request.files.provenance(["vae"], precision, request.resolution), ranges=ranges)

    def has_latents(self) -> bool:
        """Whether the cache holds any picture."""
        return any(Path(self.request.data.latents_path).glob("*.safetensors"))

    def make_latents(self) -> None:
        """Runs `precompute_latents.py` in another process, so that all memory of the VAE is freed.

        Raises:
            UserError: it failed.
        """
        request, script = self.request, "precompute_latents.py"
        request.run(script, request.flags(script), f"{request.data.latents_path} holds no latents", "latents")

    def find_images(self, store: EmbeddingStore, cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures with their prompts, each of which has its embedding; without those that do not decode.

        Raises:
            UserError: no pictures, or a prompt that stage one has not seen.
        """
        asked, subject = self.request.instance_prompt, self.request.subject
        prompt = store.uncaptioned_prompt if asked is None else asked
        remedy = self.request.command("compute_embeddings.py", **self.request.text_flags(store))
        if subject is None:
            images = self._named(images_of_store(store, cache), cache)
            images = tuple(replace(image, repeats=self.request.data.repeats) for image in images)
            captioned = sum(image.prompts != (prompt,) for image in images)
            if asked is not None and asked not in store.prompts_with_role("instance"):
                raise UserError(f"{store.path} describes no picture with {asked!r}: type `{remedy}`")
        else:
            pictures = self._read(subject, prompt, cache.folder / NOTES_NAME)
            images, captioned = pictures.images, pictures.captioned
        if asked is not None and captioned:
            print_in_rank_0(f"note: {captions_win(captioned, len(images), asked)}")
        empty = [""] if self.request.data.caption_dropout else []
        require_prompts(store, [*(prompt for image in images for prompt in image.prompts), *empty], remedy)
        return self.without_broken(images, cache)

    def without_broken(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures that decode, or may: those that stage one has skipped, or --skip_broken skips now, are named.

        Raises:
            UserError: none is left.
        """
        whole, skipped = [], cache.broken()
        for image in images:
            broken: object = skipped.get(image.image_id)
            if not broken and self.request.data.skip_broken and not cache.path(image.image_id).is_file():
                broken = _why_broken(image)
            if broken:
                print_in_rank_0(f"skipped: {broken}")
            else:
                whole.append(image)
        if not whole:
            raise UserError("no picture decodes: give another --instance_data_dir")
        return tuple(whole)

    def _read(self, flags: PictureFlags, prompt: str | None, hashes_path: Path | None) -> Subject:
        return read_subject(concepts_read(flags, prompt), flags, hashes_path)

    def _named(self, images: tuple[InstanceImage, ...], cache: LatentCache) -> tuple[InstanceImage, ...]:
        """The pictures of the embeddings file; those without latents get their names from stage one's folder."""
        if all(cache.path(image.image_id).is_file() or image.image_id in cache.broken() for image in images):
            return images
        recorded = self.request.recorded
        try:
            folders = [concept.folder for concept in concepts_read(recorded, None)]
            paths = [path for folder in folders for path in list_images(folder, recorded.recursive).images]
            names = dict(zip(hash_pictures(paths, cache.folder / NOTES_NAME), paths, strict=True))
        except UserError:  # moved since
            return images
        return tuple(replace(image, path=names.get(image.image_id, image.path)) for image in images)


def _why_broken(image: InstanceImage) -> str | None:
    """Why a picture cannot be decoded; None where it can, or is not there."""
    try:
        if image.path.is_file():
            open_rgb(image.path)
    except BrokenImage as error:
        return str(error)
    return None
