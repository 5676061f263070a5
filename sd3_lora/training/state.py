"""All that changes while a LoRA is trained, and where it is written: the LoRA, and checkpoints for exact resume."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing, unfinished_path
from sd3_lora.common.command_line import UserError, link_or_copy
from sd3_lora.common.identifier_embedding import IdentifierEmbedding, embedding_path
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.model_folder import files_beside, take
from sd3_lora.common.run_record import RunFacts, RunRecord, recorded_results
from sd3_lora.common.tensor_files import read_shards, write_shards
from sd3_lora.gpu.set_aside import set_aside
from sd3_lora.training.checkpoints import (
    RECORD,
    REPORT_FILE,
    UnfinishedCheckpoint,
    checkpoint_folders,
    remove_old_checkpoints,
    write_pictures,
    write_state,
)
from sd3_lora.training.draws import DataOrder, GlobalDraws
from sd3_lora.training.ema import MovingAverage
from sd3_lora.training.in_backward import AdamInBackward
from sd3_lora.training.run_changes import require_same_run
from sd3_lora.training.schedule_free import averaged_weights
from sd3_lora.training.trainables import Trainables
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE, load_lora_tensors, lora_tensors, save_lora
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.velocity import VelocityModel
from sd3_lora.transformer.whole_weights import read_transformer, write_transformer

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SD3Transformer2DModel

_MOMENTS = "moments"  # the folder of a checkpoint with the optimizer's state of a whole transformer


@dataclass
class Training:
    """All that changes from step to step. All of it is in a checkpoint but `ahead`, which follows from it.

    Attributes:
        model: with its LoRA.
        trainables: what the optimizer updates.
        optimizer: of the trainables.
        lr_scheduler: of its learning rates.
        scaler: of the loss, in float16.
        draws: of crops, noise and noise levels.
        order: of the pictures.
        steps: optimizer steps to take in all.
        ahead: modulations that are computed ahead.
        step: optimizer steps taken.
        average: the moving average of what is trained, if one is kept.
        word: the identifier whose embedding is trained.
    """

    model: VelocityModel
    trainables: Trainables
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    scaler: torch.amp.GradScaler
    draws: GlobalDraws
    order: DataOrder
    steps: int
    ahead: ModulationsAhead | None = None
    step: int = 0
    average: MovingAverage | None = None
    word: str | None = None

    @property
    def clips(self) -> dict[str, torch.nn.Module]:
        """The CLIPs whose LoRA is trained, by their names in a pipeline; none where none is."""
        return self.model.clips.with_lora() if self.model.clips else {}

    @property
    def in_backward(self) -> AdamInBackward | None:
        """What updates the whole transformer inside the backward pass; None where a LoRA is trained."""
        return self.optimizer if isinstance(self.optimizer, AdamInBackward) else None

    def begin_step(self) -> None:
        """To be called before the micro-steps of a step, once `step` is its number."""
        if self.in_backward:
            self.in_backward.begin(self.step, self.learning_rates(self.step - 1)[0])

    @property
    def identifier(self) -> IdentifierEmbedding | None:
        """The identifier's embedding as it is now, if it is trained."""
        vectors = self.model.clips.identifier if self.model.clips else None
        return IdentifierEmbedding(self.word, vectors.by_name()) if vectors and self.word is not None else None

    def hold_identifier(self, gradient_norm: torch.Tensor) -> None:
        """Holds the identifier's vectors to the size of tokens' embeddings, after a step that changed them.

        Args:
            gradient_norm: of the step, a scalar on the device.
        """
        vectors = self.model.clips.identifier if self.model.clips else None
        if vectors is not None and self.trainables.groups[-1].trains_at(self.step):  # their group is the last
            vectors.hold_size(gradient_norm)

    @property
    def trained_steps(self) -> dict[str, list[int | None]]:
        """The first and the last step of each group that not every step changes."""
        groups = self.trainables.groups
        return {group.name: [group.first_step, group.last_step] for group in groups if group.is_for_a_time}

    def enter_step(self) -> bool:
        """Has each group trained in this step or left as it is: then its rate is zero, and it gets no gradient.

        Called before each step's micro-steps, and again before its update, which may have a new rate.

        Returns:
            Whether others are trained than in the step before.
        """
        if self.in_backward:  # all of the transformer, from the first step to the last
            return False
        changed = False
        for place, group in enumerate(self.trainables.groups):
            options = self.optimizer.param_groups[place]
            trains = group.trains_at(self.step)
            changed |= trains != group.trains_at(max(1, self.step - 1))
            for part in group.parts if group.is_for_a_time else ():
                part.requires_grad_(trains)
            if not trains:
                options["lr"] = 0.0
            elif group.first_step > 1 and self.step == group.first_step:
                options["lr"] = self.learning_rates(self.lr_scheduler.last_epoch)[place]
                for parameter in options["params"]:  # it has seen zeros, which are no gradients
                    self.optimizer.state.pop(parameter, None)
        return changed

    @property
    def transformer(self) -> SD3Transformer2DModel:
        """With its LoRA."""
        return self.model.transformer

    def learning_rates(self, step: int) -> list[float]:
        """The schedule's rate of each group after so many steps that were not skipped."""
        schedule = self.lr_scheduler
        return [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]

    @contextmanager
    def ready_to_draw(self) -> Iterator[None]:
        """Inside the block the weights to draw with are in place: the average, where there is one.

        What only the next step needs waits on the host. Afterwards all is as it was, bit for bit.
        """
        device = self.trainables.parameters[0].device
        if self.in_backward:  # its state is most of what there is, and the plan leaves room beside it
            yield
            return
        waiting = [tensor for state in self.optimizer.state.values() for tensor in _tensors_of(state)]
        if self.average:
            waiting += self.average.tensors
        # Schedule-free AdamW computes its average from its state, and so before that is set aside.
        in_place = self.average.in_place() if self.average else averaged_weights(self.optimizer)
        with in_place, set_aside(waiting, device):
            yield

    def state_dict(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The state of this rank and of what the ranks share; tensors on the CPU.

        Of a whole transformer neither weights nor moments, which are too large for one file.

        Args:
            drawn: where the draws and the order stand, `MicroBatches.state_dict`.
        """
        return {
            "step": self.step,
            "steps": self.steps,
            **({} if self.in_backward else {"lora": lora_tensors(self.transformer)}),
            **({"clips": {name: lora_tensors(clip) for name, clip in self.clips.items()}} if self.clips else {}),
            **({"identifier": self.identifier.vectors} if self.identifier else {}),
            **({"trained_steps": self.trained_steps} if self.trained_steps else {}),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            **({"ema": self.average.state_dict()} if self.average else {}),
            **drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        self.step = state["step"]
        if not self.in_backward:
            load_lora_tensors(self.transformer, state["lora"])
        for name, clip in self.clips.items():
            load_lora_tensors(clip, state["clips"][name])
        for name, vectors in self.identifier.vectors.items() if self.identifier else ():
            vectors.copy_(state["identifier"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.draws.generator.set_state(state["draws"])
        self.order.load_state_dict(state["order"])


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """The tensors in an optimizer's state of a parameter, which may be nested."""
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ():
        yield from _tensors_of(value)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators, from which dropout draws."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Goes on from where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def lora_metadata(facts: RunFacts, step: int) -> dict[str, Any]:
    """The metadata of a LoRA's file; drawing reads the trigger, the resolution and the length."""
    return {
        "base_model": facts.base_model,
        "revision": facts.revision,
        "instance_prompts": list(facts.prompts or ()),
        "trigger": facts.trigger,
        "max_sequence_length": facts.max_sequence_length,
        "resolution": facts.resolution,
        "seed": facts.seed,
        "steps": step,
    }


@dataclass(frozen=True)
class Outputs:
    """Where the run writes, and the facts that it writes there.

    Attributes:
        folder: of the run.
        record: of the run.
        limit: how many checkpoints are kept; None for all.
        command: that goes on with the run.
        files: of the base, of which a whole transformer's folder has some; None where a LoRA is trained.
    """

    folder: Path
    record: RunRecord
    limit: int | None
    command: str = ""
    files: ModelFiles | None = None

    @property
    def trained_path(self) -> Path:
        """Of the result: the LoRA's file, or the whole transformer's folder."""
        return self.folder / (LORA_FILE if self.files is None else "transformer")

    @property
    def report_path(self) -> Path:
        """Of the report."""
        return self.folder / REPORT_FILE

    def is_finished(self, step: int) -> bool:
        """Whether a run that ended after this step has written all that it writes but the report."""
        model = self.trained_path if self.files is None else self.folder / "model_index.json"
        results = recorded_results(self.folder / RECORD) or {}
        return results.get("steps") == step and self.trained_path.exists() and model.exists()

    def complete(self, training: Training) -> None:
        """At the end of a run that was killed there: the LoRA, if it lacks it, and no more checkpoints than asked."""
        if not self.trained_path.exists():
            self.save_trained(training, self.folder)
        remove_old_checkpoints(self.folder, self.limit)

    def remove_report(self) -> None:
        """Deletes the report of an earlier, shorter run, so that one that is there is of this run."""
        with suppress(OSError):  # Windows has it open, perhaps
            self.report_path.unlink(missing_ok=True)

    def save_trained(self, training: Training, folder: Path) -> Path:
        """Writes the LoRA with its average, or the whole transformer; returns the path."""
        return self.save_lora(training, folder) if self.files is None else self._save_transformer(training, folder)

    def _save_transformer(self, training: Training, folder: Path) -> Path:
        """Writes the transformer's folder under another name, and renames it. An earlier one is replaced."""
        assert self.files is not None
        path = folder / "transformer"
        unfinished, old = unfinished_path(path), unfinished_path(path.with_name(f"{path.name}.old"))
        try:
            write_transformer(unfinished, training.transformer, self.files)
            if path.exists():
                os.replace(path, old)
            os.replace(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return path

    def _save_whole_state(self, training: Training, folder: Path) -> None:
        """Writes what of a whole transformer's checkpoint is too large for one file: weights and moments.

        At the end of the run the weights have just been written, and are linked: no second copy on the disk.
        """
        assert training.in_backward is not None
        if training.step == training.steps:
            for path in sorted((self.folder / "transformer").iterdir()):
                link_or_copy(path, folder / "transformer" / path.name)
        else:
            self._save_transformer(training, folder)
        write_shards(folder / _MOMENTS, "moments{suffix}.safetensors", training.in_backward.tensors())

    def write_whole_model(self) -> None:
        """Puts what the transformer's folder lacks of a pipeline beside it: links to the base's files, or copies."""
        assert self.files is not None
        names = [name for name in files_beside(self.files, {"transformer"}) if not name.startswith("transformer/")]
        for name in [*names[1:], names[0]]:  # model_index.json last: with it the folder counts as a model
            with replacing(self.folder / name) as unfinished:
                take(self.files.folder / name, unfinished)

    def save_lora(
        self, training: Training, folder: Path, file_name: str = LORA_FILE, average_name: str = EMA_FILE
    ) -> Path:
        """Writes the LoRA in diffusers' format, and reads it back; then its moving average, if there is one.

        Returns:
            The LoRA's path, not the average's.
        """
        with averaged_weights(training.optimizer):  # of a schedule-free run
            path = self._save_one(training, folder / file_name)
        if training.average:
            with training.average.in_place():
                self._save_one(training, folder / average_name)
        return path

    def _save_one(self, training: Training, path: Path) -> Path:
        """Writes the LoRA, and beside it the identifier's embedding, if that is trained."""
        metadata = lora_metadata(self.record.facts, training.step)
        identifier = training.identifier
        if identifier:
            identifier.save(embedding_path(path), metadata)
            metadata["identifier_embedding"] = identifier.note
        return save_lora(path.parent, training.transformer, metadata, path.name, training.clips)

    def save_lora_of_step(self, training: Training) -> Path:
        """Writes the LoRA as it is now under a name that has the step, for the user to pick the best from."""
        name = f"{self.folder.resolve().name}-step{training.step:08d}"
        return self.save_lora(training, self.folder, f"{name}.safetensors", f"{name}_ema.safetensors")

    def kept(self) -> str:
        """What an interruption leaves, and the command that goes on."""
        folders = checkpoint_folders(self.folder)
        if not folders:
            return f"no step was kept; to start again, type `{self.command}`"
        return f"{folders[-1]} is kept; to go on, type `{self.command}`"

    def save_checkpoint(self, training: Training, drawn: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Writes a checkpoint on rank 0, with the random states of all ranks.

        Args:
            training: whose state is kept.
            drawn: where the draws and the order stand, `MicroBatches.state_dict`.
            accelerator: of the processes.
        """
        random_states = gather_object([random_state(accelerator.device)])
        if accelerator.is_main_process:
            with UnfinishedCheckpoint(self.folder, training.step) as folder:
                if self.files is not None:
                    self._save_whole_state(training, folder)
                else:
                    self.save_lora(training, folder)
                state = {
                    **training.state_dict(drawn),
                    "random": random_states,
                    "signature": dict(self.record.identity.values),
                }
                write_state(folder, state)
                write_pictures(folder, self.record.identity.pictures)
                self.record.save(folder / RECORD, None)
            remove_old_checkpoints(self.folder, self.limit)
        accelerator.wait_for_everyone()

    def load_checkpoint(
        self, folder: Path, state: dict[str, Any], training: Training, accelerator: Accelerator
    ) -> None:
        """Goes on from a checkpoint, whose state has been read.

        Raises:
            UserError: it is of a run with another identity, or whose learning rate would jump.
        """
        require_same_run(state["signature"], self.record, folder)
        self._require_same_schedule(state, training, folder)
        self._require_same_phases(state, training, folder)
        training.load_state_dict(state)
        if self.files is not None:
            assert training.in_backward is not None
            read_transformer(folder / "transformer", training.transformer)
            read_shards(folder / _MOMENTS, training.in_backward.tensors())
        if accelerator.process_index < len(
            state["random"]
        ):  # a rank that the checkpoint's run did not have keeps its state
            set_random_state(state["random"][accelerator.process_index], accelerator.device)

    def _require_same_phases(self, state: Mapping[str, Any], training: Training, folder: Path) -> None:
        """What is trained for a share of the steps would be trained in others in a longer run."""
        until = state.get("clips_until")  # an earlier build's
        saved = state.get("trained_steps", {"CLIPs": [1, until]} if until else {})
        for name in (*saved, *training.trained_steps):
            before, now = saved.get(name, [1, None]), training.trained_steps.get(name, [1, None])
            if list(before) == now:
                continue
            what = {"transformer": "LoRA", "identifier": "identifier's embedding"}.get(name, name)
            place = 0 if before[0] != now[0] else 1
            does = f"was to train the {what} from" if place == 0 else f"was to leave the {what} as they are after"
            raise UserError(
                f"{folder} {does} step {before[place]}, of {state['steps']}, and this command "
                f"{'from' if place == 0 else 'after'} step {now[place]}: type --max_train_steps {state['steps']}, or "
                "give another --output_dir for a new run"
            )

    def _require_same_schedule(self, state: Mapping[str, Any], training: Training, folder: Path) -> None:
        """A schedule that ends with the run has another rate in a longer run, unless it is warming up still."""
        saved = state["lr_scheduler"]
        then, now = saved["_last_lr"], training.learning_rates(saved["last_epoch"])
        if all(
            math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-15) for before, after in zip(then, now, strict=True)
        ):
            return
        steps = state.get("steps")  # earlier builds did not note them
        schedule = self.record.identity.values["--lr_scheduler"]
        raise UserError(
            f"{folder} was trained with --lr_scheduler {schedule} over {steps or 'another number of'} steps; over "
            f"{training.steps} its learning rate would jump from {then[0]:.3g} to {now[0]:.3g}: type "
            f"--max_train_steps {steps or 'N as then'}, or give another --output_dir for a new run"
        )
