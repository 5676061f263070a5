"""All that changes while a LoRA is trained, and where it is written: the LoRA, and checkpoints for exact resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.run_record import RunFacts, RunRecord
from sd3_lora.training.checkpoints import UnfinishedCheckpoint, remove_old_checkpoints, require_same_run, write_state
from sd3_lora.training.draws import DataOrder, GlobalDraws
from sd3_lora.training.trainables import Trainables
from sd3_lora.transformer.lora import lora_tensors, save_lora
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.velocity import VelocityModel

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SD3Transformer2DModel


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

    @property
    def transformer(self) -> SD3Transformer2DModel:
        """With its LoRA."""
        return self.model.transformer

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank and of what the ranks share; tensors on the CPU."""
        return {
            "step": self.step,
            "lora": lora_tensors(self.transformer),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "draws": self.draws.generator.get_state(),
            "order": self.order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        self.step = state["step"]
        parameters = dict(self.transformer.named_parameters())
        for name, tensor in state["lora"].items():
            parameters[name.replace(".weight", ".default.weight")].data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.draws.generator.set_state(state["draws"])
        self.order.load_state_dict(state["order"])


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
        "base_model": facts.model,
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
        rank: of the LoRA.
        alpha: of the LoRA.
        record: of the run.
        limit: how many checkpoints are kept; None for all.
    """

    folder: Path
    rank: int
    alpha: float
    record: RunRecord
    limit: int | None

    def save_lora(self, training: Training, folder: Path) -> Path:
        """Writes the LoRA in diffusers' format, and reads it back."""
        metadata = lora_metadata(self.record.facts, training.step)
        return save_lora(folder, training.transformer, self.rank, self.alpha, metadata)

    def save_checkpoint(self, training: Training, accelerator: Accelerator) -> None:
        """Writes a checkpoint on rank 0, with the random states of all ranks."""
        random_states = gather_object([random_state(accelerator.device)])
        if accelerator.is_main_process:
            with UnfinishedCheckpoint(self.folder, training.step) as folder:
                self.save_lora(training, folder)
                state = {
                    **training.state_dict(),
                    "random": random_states,
                    "signature": dict(self.record.identity.values),
                }
                write_state(folder, state)
            remove_old_checkpoints(self.folder, self.limit)
        accelerator.wait_for_everyone()

    def load_checkpoint(
        self, folder: Path, state: dict[str, Any], training: Training, accelerator: Accelerator
    ) -> None:
        """Goes on from a checkpoint, whose state has been read.

        Raises:
            UserError: it is of a run with another identity.
        """
        require_same_run(state["signature"], self.record.identity, folder)
        training.load_state_dict(state)
        if accelerator.process_index < len(
            state["random"]
        ):  # a rank that the checkpoint's run did not have keeps its state
            set_random_state(state["random"][accelerator.process_index], accelerator.device)
