"""What a training command lacks in several places at once, as with a second subject among the files of the first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError, counted
from sd3_lora.common.records import InstanceImage
from sd3_lora.common.run_locks import reading_in, wait_for_writer
from sd3_lora.stage_one.concepts import read_subject
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.picture_hashes import NOTES_NAME
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.checkpoints import checkpoint_folders, find_checkpoint, read_pictures
from sd3_lora.training.stage_one_request import StageOneRequest, concepts_read


@dataclass(frozen=True)
class Lack:
    """Something that is missing.

    Attributes:
        what: in words.
        remedy: what to type.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class MissingInputs:
    """What a command that names pictures lacks of their embeddings, of their latents, and in its output folder.

    Attributes:
        request: what it asks of stage one.
        prompts: that are drawn while it trains.
        output_dir: of the run.
        resumes: `--resume_from_checkpoint`.
    """

    request: StageOneRequest
    prompts: Sequence[str]
    output_dir: Path
    resumes: str | None

    def require_none(self) -> None:
        """Tells all in one sentence where there is more than one; one alone is told where it is met.

        A run of other pictures in the output folder is told before stage one is run for it.

        Raises:
            UserError: several things are missing.
        """
        if self.request.subject is None:
            return
        stage_one = StageOne(self.request)
        try:
            images = self._images()
            uncached = self._uncached(images) if stage_one.has_latents() else []
            lacks = [self._embeddings(images), self._latents(uncached), self._outputs(images, uncached)]
        except UserError:  # told where it is met
            return
        found = [lack for lack in lacks if lack is not None]
        is_made_first = stage_one.lacks_embeddings() or not stage_one.has_latents()
        if len(found) > 1 or (lacks[-1] and is_made_first):
            remedies = ", then ".join(lack.remedy for lack in found)
            raise UserError(f"{_joined([lack.what for lack in found])}: {remedies}")

    def _images(self) -> tuple[InstanceImage, ...]:
        request, folder = self.request, Path(self.request.data.latents_path)
        prompt = request.instance_prompt
        path = Path(request.data.data_df_path)
        wait_for_writer(path)
        if prompt is None and path.exists():
            with EmbeddingStore(path) as store:
                prompt = store.uncaptioned_prompt
        elif prompt is None:
            prompt = request.flags("compute_embeddings.py")["instance_prompt"]
        notes = folder / NOTES_NAME if folder.is_dir() else None
        assert request.subject is not None
        return read_subject(concepts_read(request.subject, prompt), request.subject, notes).images

    def _embeddings(self, images: Sequence[InstanceImage]) -> Lack | None:
        """Prompts without an embedding; None where the file is made first."""
        path = Path(self.request.data.data_df_path)
        if not path.exists():
            if StageOne(self.request).lacks_embeddings():
                return None
            return Lack(f"{path} is not there", f"type `{self.request.command('compute_embeddings.py')}`")
        with StageOne(self.request).open_embeddings() as store:
            wanted = dict.fromkeys((*self.prompts, *(prompt for image in images for prompt in image.prompts)))
            missing = [prompt for prompt in wanted if prompt not in store]
            remedy = self.request.command("compute_embeddings.py", **self.request.text_flags(store))
        if not missing:
            return None
        others = f" and {counted(len(missing) - 1, 'more prompt')}" if len(missing) > 1 else ""
        return Lack(f"{path} lacks {missing[0]!r}{others}", f"type `{remedy}`")

    def _latents(self, uncached: Sequence[InstanceImage]) -> Lack | None:
        if not uncached:
            return None
        remedy = self.request.command("precompute_latents.py")
        return Lack(f"{self.request.data.latents_path} lacks {_names(uncached)}", f"type `{remedy}`")

    def _uncached(self, images: Sequence[InstanceImage]) -> list[InstanceImage]:
        """The pictures without latents, those aside that are known not to decode."""
        cache = StageOne(self.request).open_latents()
        with reading_in(cache.folder):  # after whoever writes there now
            broken = cache.broken()
            return [i for i in images if i.image_id not in broken and not cache.path(i.image_id).is_file()]

    def _outputs(self, images: Sequence[InstanceImage], uncached: Sequence[InstanceImage]) -> Lack | None:
        """Whether the output folder is that of another run."""
        earlier, other = checkpoint_folders(self.output_dir), "give another --output_dir"
        if self.resumes is None:
            return Lack(f"{self.output_dir} holds {earlier[-1].name} of an earlier run", other) if earlier else None
        checkpoint = None
        with suppress(UserError):  # told where it is looked for
            checkpoint = find_checkpoint(self.resumes, self.output_dir)
        noted = None if checkpoint is None else read_pictures(checkpoint)
        if noted is None:
            return None
        known = {picture.image_id for picture in noted}
        is_other = known.isdisjoint(image.image_id for image in images)
        added = [] if self.request.data.skip_broken else [each for each in uncached if each.image_id not in known]
        if is_other:
            return Lack(f"{checkpoint} was trained on other pictures", other)
        remedy = f"{other}; or take out what was added, and go on"
        return Lack(f"{checkpoint} was trained without {_names(added)}", remedy) if added else None


def _names(images: Sequence[InstanceImage]) -> str:
    others = f" and {counted(len(images) - 1, 'more picture')}" if len(images) > 1 else ""
    return f"{images[0].path}{others}"


def _joined(parts: Sequence[str]) -> str:
    """The parts of a sentence."""
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
