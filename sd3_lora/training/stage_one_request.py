"""What a training command asks of stage one, and the commands that make it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, command_words
from sd3_lora.common.config import BUCKET_FLAGS, BudgetConfig, ModelConfig, PictureFlags
from sd3_lora.common.defaults import PROJECT_FOLDER, default_folder
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.processes import STARTED_BY_TRAINING
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.stage_one.captions import CaptionRules
from sd3_lora.stage_one.concepts import ClassFolder, Concept, class_folders_of, concepts_of
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.prior_flags import PriorConfig

# Set by torchrun and accelerate launch: a child process with them would wait for ranks that do not exist.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
# What a stage-one command read, which training of the same folder need not be told again.
_SOURCE_FLAGS = ("instance_data_dir", "concepts_list", "instance_prompt", "recursive")
MASK_FLAGS = ("mask_data_dir", "alpha_mask")
_CLASS_FLAGS = ("class_data_dir", "num_class_images")  # that are as typed for training, whatever stage one was told


@dataclass(frozen=True)
class StageOneRequest:
    """What a training command asks of stage one.

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
        return command(script, **{**self.flags(script), **more})

    def flags(self, script: str) -> dict[str, Any]:
        """The flags of a stage-one script that makes these artefacts: as typed for training, else as typed for it."""
        data = self.data
        if script == "compute_embeddings.py":
            recorded = recorded_flags(Path(data.data_df_path).with_suffix(".json"), EmbeddingConfig)
            specific = {
                "class_prompt": self.prior.class_prompt,
                **self._class_captions(),
                "max_sequence_length": data.max_sequence_length,
                "output_path": data.data_df_path,
                **self._more_prompts(),
            }
        else:
            recorded = recorded_flags(Path(data.latents_path) / "run.json", LatentConfig)
            left_out = (*BUCKET_FLAGS, *_CLASS_FLAGS)
            recorded = {name: value for name, value in recorded.items() if name not in left_out}
            if data.has_masks:
                recorded = {name: value for name, value in recorded.items() if name not in MASK_FLAGS}
            specific = {
                **data.mask_flags(),
                **next((self.class_flags(of) for of in self.class_folders() if of.images(1)), {}),
                **data.crop_flags(),
                "resolution": self.resolution,
                "num_crops": data.num_crops,
                "random_flip": data.random_flip,
                "skip_broken": data.skip_broken,
                "output_path": data.latents_path,
            }
        subject = self.subject
        if subject is not None:  # what is read now decides, not what was read then
            kept = (*_SOURCE_FLAGS, *MASK_FLAGS) if _source(subject) == _source(_picture_flags(recorded)) else ()
            decided = (*data.picture_flags(), *MASK_FLAGS)
            recorded = {k: v for k, v in recorded.items() if k not in decided or k in kept}
        typed = {
            **self.model.flags(),
            **(subject or data).picture_flags(),
            "device": None if self.device == "auto" else self.device,
            **specific,
        }
        return {**typed, **recorded, **{name: value for name, value in typed.items() if value}}

    @property
    def subject(self) -> PictureFlags | None:
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
    def recorded(self) -> PictureFlags:
        """The picture flags with which the embeddings file was made."""
        return _picture_flags(recorded_flags(Path(self.data.data_df_path).with_suffix(".json"), EmbeddingConfig))

    @property
    def instance_prompt(self) -> str | None:
        """The flag's, with the trigger word for [trigger]."""
        prompt = self.data.instance_prompt
        return None if prompt is None else CaptionRules.of(self.data).filled(prompt)

    def _class_captions(self) -> dict[str, Any]:
        """The flags with which compute_embeddings.py embeds the captions of class pictures."""
        prior = self.prior
        if not prior.class_captions:
            return {}
        names = ("class_captions", "class_data_dir", "class_prompts_file")
        return {name: getattr(prior, name) for name in names}

    def _more_prompts(self) -> dict[str, Any]:
        """The flags with which compute_embeddings.py embeds what is drawn and what the base is kept on."""
        of_prior = self.prior.prior_prompts_file
        if of_prior is None:
            return dict(self.more_prompts)
        return {**self.more_prompts, "prompts_file": [*self.more_prompts.get("prompts_file", ()), of_prior]}

    def text_flags(self, store: EmbeddingStore) -> dict[str, Any]:
        """Of the command that adds prompts to the embeddings file: its length, and the prompt of a single folder."""
        flags: dict[str, Any] = {"max_sequence_length": store.provenance.size}
        source = self.subject or self.recorded
        if not (source.concepts_list or source.repeats_from_folders):
            asked = self.instance_prompt
            flags["instance_prompt"] = store.uncaptioned_prompt if asked is None else asked
        return flags

    def run(self, script: str, flags: dict[str, Any], lack: str, made: str) -> None:
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
        environment[STARTED_BY_TRAINING] = "1"
        if subprocess.run([sys.executable, PROJECT_FOLDER / name, *arguments], env=environment, check=False).returncode:
            raise UserError(f"there are no {made} to train on: mend what is said above, then type `{typed}`")

    def class_folders(self) -> tuple[ClassFolder, ...]:
        """The folders of class pictures: the flags', or those of the concepts; none without --with_prior_preservation.

        Raises:
            UserError: a concept has none.
        """
        prior, data = self.prior, self.data
        if not prior.with_prior_preservation:
            return ()
        if prior.class_data_dir is not None and prior.class_prompt is not None:
            return (ClassFolder(Path(prior.class_data_dir), prior.class_prompt, prior.class_captions),)
        found = class_folders_of(concepts_of(data), data.concepts_list or "")
        return tuple(replace(of, has_captions=prior.class_captions) for of in found)

    def class_flags(self, of: ClassFolder) -> dict[str, Any]:
        """The flags of `precompute_latents.py` that name a folder of class pictures."""
        return {"class_data_dir": of.folder, "num_class_images": self.prior.num_class_images}

    def drawing_flags(self, of: ClassFolder) -> dict[str, Any]:
        """The flags of `draw_class_pictures.py`.

        Folders for which the same prompts are drawn have noise of their own, or they would hold the same pictures.
        """
        prior = self.prior
        number = (
            0 if prior.class_prompts_file is None else [each.folder for each in self.class_folders()].index(of.folder)
        )
        return {
            **self.model.flags(),
            "class_prompt": of.prompt,
            "class_prompts_file": prior.class_prompts_file,
            **self.class_flags(of),
            "prior_generation_precision": prior.prior_generation_precision,
            "sample_batch_size": None if prior.sample_batch_size == 4 else prior.sample_batch_size,
            "data_df_path": self.data.data_df_path,
            "latents_path": self.data.latents_path,
            "resolution": self.resolution,
            "seed": self.seed + number,
            "device": None if self.device == "auto" else self.device,
            **self.budget.flags(),
        }


def _picture_flags(recorded: dict[str, Any]) -> PictureFlags:
    """The picture flags of a recorded command."""
    return PictureFlags(**{name: value for name, value in recorded.items() if name in PictureFlags().picture_flags()})


def _source(flags: PictureFlags) -> Path:
    """The list or the folder that a command reads."""
    return Path(flags.concepts_list or flags.instance_data_dir or default_folder())


def concepts_read(flags: PictureFlags, prompt: str | None) -> tuple[Concept, ...]:
    """The concepts that a command reads.

    Args:
        flags: of the command.
        prompt: of pictures without a caption in a single folder.
    """
    if flags.concepts_list is not None or flags.repeats_from_folders:
        return concepts_of(flags)
    return (Concept(_source(flags), prompt, flags.repeats),)
