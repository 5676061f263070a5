"""All the flags of training, with diffusers' names and meanings; and those of diffusers that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from sd3_lora.common.command_line import HarmlessFlag, UserError, counted, require_right
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.placement_flags import BaseFlags, StepFlags, is_on
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.full_flags import FULL_RATE, FullFlags
from sd3_lora.training.hub_flags import HubFlags
from sd3_lora.training.identifier_flags import DEFAULT_RATE as IDENTIFIER_RATE
from sd3_lora.training.identifier_flags import IdentifierFlags
from sd3_lora.training.lora_flags import AverageFlags, LoraFlags
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.optimizer_kinds import ADAMW, ADAMW_8BIT, PRODIGY, SCHEDULE_FREE_ADAMW
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.training.run_flags import RunConfig
from sd3_lora.training.text_encoder_flags import DEFAULT_RATE, TextEncoderFlags
from sd3_lora.training.watch_flags import WatchFlags

# Flags of diffusers' scripts that are not here, with what to do instead: none.
REFUSED_FLAGS: dict[str, str] = {}
# Those that ask for what is always so.
HARMLESS_FLAGS = {
    "cache_latents": HarmlessFlag("latents are always cached"),
    "dataloader_num_workers": HarmlessFlag("batches come from cached tensors, without a loader", takes_value=True),
    "upcast_before_saving": HarmlessFlag("the LoRA is always trained and saved in float32"),
    "local_rank": HarmlessFlag("torchrun and accelerate launch pass it in the environment", takes_value=True),
}


@dataclass(frozen=True)
class TrainingFlags:
    """All the flags of training, by group, in the order of `--help_all`."""

    data: DataConfig
    prior: PriorConfig
    lora: LoraFlags
    text: TextEncoderFlags
    full: FullFlags
    identifier: IdentifierFlags
    optimizer: OptimizerConfig
    average: AverageFlags
    run: RunConfig
    watch: WatchFlags
    base: BaseFlags
    step: StepFlags
    flow: FlowConfig
    model: ModelConfig
    device: DeviceConfig
    budget: BudgetConfig
    hub: HubFlags

    def __post_init__(self) -> None:
        if self.average.use_ema and self.optimizer.kind == SCHEDULE_FREE_ADAMW:
            raise UserError(
                f"--use_ema does not go with --optimizer {SCHEDULE_FREE_ADAMW.name}, whose LoRA is an average of the "
                "run already: leave one of them out"
            )
        if self.prior.prior_term == "preference" and self.data.masked_loss:
            raise UserError(
                "--prior_term preference compares whole pictures, so it does not go with --masked_loss: "
                "type --prior_term prediction, or leave --masked_loss out"
            )
        if self.prior.with_prior_preservation and self.data.concepts_list is None:
            require_right(self.prior.lacking())
        if is_on(self.step.stream_text_encoders) and not self.trains_clips:
            raise UserError(
                "--stream_text_encoders on is of CLIPs of which something is trained: add --train_text_encoder or "
                "--train_identifier_embedding, or leave it out"
            )
        for fault in self._text_encoder_faults() if self.text.train_text_encoder else ():
            raise UserError(fault)
        for fault in self._full_faults() if self.full.full else ():
            raise UserError(fault)
        for fault in self._identifier_faults() if self.identifier.word is not None else ():
            raise UserError(fault)

    @property
    def trains_all(self) -> bool:
        """Whether the whole transformer is trained, and not a LoRA."""
        return self.full.full

    def settled(self) -> TrainingFlags:
        """With the optimizer's settings that `--full` has where no flag says otherwise."""
        if not self.trains_all:
            return self
        rate = FULL_RATE if self.optimizer.learning_rate is None else self.optimizer.learning_rate
        settings = replace(self.optimizer, optimizer=ADAMW.name, use_8bit_adam=True, learning_rate=rate)
        return replace(self, optimizer=settings)

    def _full_faults(self) -> Iterator[str]:
        """What does not go with training the whole transformer."""
        usual = asdict(LoraFlags())
        for name, value in asdict(self.lora).items():
            if value != usual[name]:
                flag = f"--{name}" if isinstance(value, bool) else f"--{name} {value}"
                yield f"{flag} is of a LoRA, and --full trains the transformer itself: leave one of them out"
        if self.text.train_text_encoder:
            yield "--full trains the transformer alone, and --train_text_encoder a LoRA: leave one of them out"
        if self.identifier.word is not None:
            yield "--full trains the transformer alone: leave it or --train_identifier_embedding out"
        if self.prior.prior_term is not None:
            yield (
                f"--prior_term {self.prior.prior_term} compares with the base, which --full changes and does not keep "
                "beside: type --with_prior_preservation, with class pictures, or leave --full out"
            )
        if self.average.use_ema:
            yield "--use_ema would keep every weight of the transformer twice, and --full does not: leave one out"
        if self.optimizer.kind not in (ADAMW, ADAMW_8BIT):
            yield (
                f"--optimizer {self.optimizer.kind.name} updates all weights at once, and --full each one inside the "
                "backward pass, which AdamW with its state in 8 bits can: leave --optimizer out"
            )
        if self.optimizer.lr_pattern is not None:
            yield f"--lr_pattern {self.optimizer.lr_pattern} is of a LoRA's layers: leave it or --full out"
        if self.base.base_precision != "16bit":
            yield f"--base_precision {self.base.base_precision} freezes the weights that --full trains: leave one out"
        if self.base.streamed and self.run.gradient_accumulation_steps > 1:
            yield (
                f"--gradient_accumulation_steps {self.run.gradient_accumulation_steps} keeps a gradient for each "
                f"weight on the device, which --stream_blocks {self.base.stream_blocks} is to keep free: leave one of "
                "them out, or type a larger --train_batch_size"
            )
        if self.base.stream_from == "files":
            yield "--stream_from files is of weights that do not change, and --full changes them: leave one of them out"
        if is_on(self.step.modulations_ahead):
            yield (
                "--modulations_ahead on computes with weights of the step before, and --full changes them: leave one "
                "of them out"
            )
        if self.step.must_compile:
            yield ("--compile on has all gradients of a block in memory at once, and --full only one: leave one out")
        if self.run.exports:
            yield f"--export {self.run.exports[0]} is a form of a LoRA, and --full writes a whole model: leave it out"
        if self.hub.hub_checkpoints == "lora":
            yield "--hub_checkpoints lora uploads LoRAs, and --full trains none: type all or none"
        if self.watch.save_every_n_steps is not None:
            yield (
                "--save_every_n_steps with --full would write the whole model each time: type --checkpointing_steps "
                f"{self.watch.save_every_n_steps}, whose checkpoints hold the transformer"
            )

    def _identifier_faults(self) -> Iterator[str]:
        """What does not go with the identifier's embedding."""
        flag, optimizer = "--train_identifier_embedding", self.optimizer
        if optimizer.kind == SCHEDULE_FREE_ADAMW:
            yield (
                f"{flag} does not go with --optimizer {optimizer.kind.name}: its vectors are held to their size after "
                "each step, which its average does not know: type another --optimizer"
            )
        if self.identifier.has_phases and optimizer.kind == PRODIGY:
            flags = "--stop_identifier_after and --start_lora_after do"
            yield f"{flags} not go with --optimizer prodigy, which updates all that it has: leave one out"
        yield from self._one_rate("--identifier_lr", self.identifier.identifier_lr)
        if self.identifier.is_alone and self.text.train_text_encoder:
            yield (
                "--start_lora_after 1 trains the identifier's embedding alone, and --train_text_encoder a LoRA: leave "
                "one out"
            )

    @property
    def trains_clips(self) -> bool:
        """Whether something of the CLIPs is trained: they encode inside the step then."""
        return self.text.train_text_encoder or self.identifier.word is not None

    def identifier_rate(self, pictures: int) -> float:
        """The learning rate of the identifier's embedding, scaled with --scale_lr.

        Args:
            pictures: of an optimizer step.
        """
        return self._scaled(self.identifier.identifier_lr, IDENTIFIER_RATE, pictures)

    def _text_encoder_faults(self) -> Iterator[str]:
        """What does not go with a LoRA of the CLIPs."""
        flag, optimizer = "--train_text_encoder", self.optimizer
        if self.lora.lora_type != "lora":
            yield f"{flag} trains a plain LoRA, whose file --lora_type {self.lora.lora_type} cannot have: leave one out"
        if self.text.stop_text_encoder_after is not None and optimizer.kind in (PRODIGY, SCHEDULE_FREE_ADAMW):
            yield (
                f"--stop_text_encoder_after does not go with --optimizer {optimizer.kind.name}, which updates all that "
                "it has: leave one out"
            )
        yield from self._one_rate("--text_encoder_lr", self.text.text_encoder_lr)

    def _one_rate(self, flag: str, rate: float | None) -> Iterator[str]:
        """A group's own rate where the optimizer finds one for all."""
        optimizer = self.optimizer
        if optimizer.kind == PRODIGY and rate not in (None, optimizer.rate):
            yield (
                f"--optimizer {optimizer.kind.name} finds one learning rate for all: type {flag} {optimizer.rate:g}, "
                "as --learning_rate, or leave it out"
            )

    def _scaled(self, rate: float | None, default: float, pictures: int) -> float:
        """A group's own rate, or its default, scaled with --scale_lr."""
        if rate is None:
            rate = self.optimizer.rate if self.optimizer.kind == PRODIGY else default
        return rate * (pictures if self.optimizer.scale_lr else 1)

    def text_encoder_rate(self, pictures: int) -> float:
        """The CLIPs' learning rate, scaled with --scale_lr.

        Args:
            pictures: of an optimizer step.
        """
        return self._scaled(self.text.text_encoder_lr, DEFAULT_RATE, pictures)

    def in_force(self, resolution: int, steps: int, processes: int) -> str:
        """One line with the settings that most decide what is learned, defaults included.

        Args:
            resolution: of the crops, in pixels.
            steps: optimizer steps in all.
            processes: how many.
        """
        run, optimizer, prior = self.run, self.optimizer, self.prior
        weighted = f" (and as many class pictures, weighted {prior.prior_loss_weight:g})"
        class_pictures = weighted if prior.with_prior_preservation else ""
        pictures = run.pictures_per_step(processes)
        rate, rates = optimizer.scaled_rate(pictures), optimizer.scaled_rates(pictures)
        own = f" ({', '.join(f'{layer} {own:g}' for layer, own in rates.items())})" if rates else ""
        kind = "" if optimizer.kind == ADAMW else f"{optimizer.kind.name}, "
        warms_up = optimizer.lr_scheduler not in ("constant", "piecewise_constant") and optimizer.lr_warmup_steps > 0
        return (
            f"{resolution} px, batch {run.train_batch_size}{class_pictures} × accumulation "
            f"{run.gradient_accumulation_steps} × processes {processes}, {counted(steps, 'step')}, "
            f"{kind}learning rate {rate:g}{own} {optimizer.lr_scheduler}"
            + (f" after {counted(optimizer.lr_warmup_steps, 'step')} of warmup" if warms_up else "")
            + f", weighting {self.flow.weighting_scheme}, precondition_outputs "
            + ("on" if self.flow.precondition_outputs else "off")
            + self.data.sentence()
            + prior.sentence()
            + (f", CLIPs' learning rate {self.text_encoder_rate(pictures):g}" if self.text.train_text_encoder else "")
            + self._identifier_sentence(pictures, steps)
        )

    def _identifier_sentence(self, pictures: int, steps: int) -> str:
        flags = self.identifier
        if flags.word is None:
            return ""
        last, first = flags.last_step(steps), flags.first_step_of_lora(steps)
        until = f" until step {last}" if last else ""
        alone = f", LoRA from step {first}" if first > 1 else ""
        if first > steps:
            alone = ", no LoRA: its file is all zeros, by which drawing finds the embedding"
        return f", embedding of {flags.word!r} at learning rate {self.identifier_rate(pictures):g}{until}{alone}"
