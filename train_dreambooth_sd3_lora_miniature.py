"""Stage two: cached embeddings and latents → LoRA.

Only the transformer is loaded, frozen, and only its LoRA is trained; neither the VAE nor a text encoder is ever in
memory here. With --train_text_encoder the two CLIPs are, frozen, and their LoRA is trained too.

    python train_dreambooth_sd3_lora_miniature.py --instance_data_dir dog --instance_prompt "a photo of sks dog"

The file is in the order in which things happen:

1. the stage: `run_locked` calls all that follows;
2. the device and its precision;
3. the plan: what is kept where, before anything is loaded;
4. an attempt with this plan; where the device's memory runs out, the next one with a cheaper plan;
5. the transformer, frozen, and its LoRA;
6. what the loop works with: folder, log, pictures between the steps;
7. the micro-step, captured as a CUDA graph or not;
8. the loop: accumulate, update, save, look; and what is kept where memory runs out in it;
9. the end.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import group_classes, groups_of
from sd3_lora.common.lean_imports import import_diffusers, import_pyarrow, start_driver
from sd3_lora.training.config import HARMLESS_FLAGS, REFUSED_FLAGS, TrainingFlags

COMMAND_LINE = CommandLine(
    "train_dreambooth_sd3_lora_miniature.py", __doc__, group_classes(TrainingFlags), REFUSED_FLAGS, HARMLESS_FLAGS
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_diffusers("diffusers.training_utils")

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import (
    Interrupted,
    UserError,
    command_again,
    counted,
    exit_code,
    first_line,
    forget_secrets,
    host_memory_fault,
)
from sd3_lora.common.defaults import say_miniature
from sd3_lora.common.devices import (
    ChosenDtype,
    choose_device,
    choose_training_dtype,
    choose_whole_dtype,
    make_deterministic,
    planned_device,
)
from sd3_lora.common.identifier_embedding import EMBEDDING_FILE
from sd3_lora.common.memory import drop_workspaces, free_memory, is_out_of_memory
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.progress import Progress
from sd3_lora.common.records import StepInputs
from sd3_lora.common.run_record import RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.drawing.sampling import SamplingSettings
from sd3_lora.drawing.validation import VAE_PRECISION, Validation, ValidationTask
from sd3_lora.gpu.attention import require_attention_kernel
from sd3_lora.gpu.budget import DeviceBudget, at_most_gib, measured_peak, open_budget
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.exact_attention import choose_backward
from sd3_lora.gpu.forecast import Forecast
from sd3_lora.plan.memory_plan import (
    DrawingBetween,
    Plan,
    TrainingTask,
    drawn_together,
    plain_placement,
    plan_cheaper,
    plan_lines,
    plan_training,
    require_host_room,
    room_to_draw,
)
from sd3_lora.plan.step_execution import (
    COMPILED,
    AskedExecution,
    PlannedTraining,
    StepExecution,
    attention_of,
    choose_execution,
)
from sd3_lora.plan.step_memory import DenoisingShape, StepShape
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.vae_tiles import VaeTile, VaeWork, choose_tile, smallest_tile
from sd3_lora.training.asked_placement import asked_placement
from sd3_lora.training.checkpoints import RECORD, read_state, resume_point, write_pictures
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.draws import DataOrder, GlobalDraws, choose_seed, places_of_pass
from sd3_lora.training.ema import EMA_BYTES_PER_PARAMETER, MovingAverage
from sd3_lora.training.finished_run import next_commands, say_nothing_to_do, write_exports, write_model
from sd3_lora.training.flow import flow_matching_loss, interpolate, prediction_loss, preference_loss
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.hub import open_hub, upload
from sd3_lora.training.identifier_start import IdentifierStart
from sd3_lora.training.in_backward import adam_notes, hollow_moments
from sd3_lora.training.live_embeddings import live_embeddings
from sd3_lora.training.loss_log import READ_EVERY, LossLog, NotFinite, PendingStep
from sd3_lora.training.micro_batches import MicroBatches
from sd3_lora.training.missing_inputs import MissingInputs
from sd3_lora.training.model_card import write_model_card
from sd3_lora.training.not_finite import explained, held_norms
from sd3_lora.training.opened_data import (
    make_batches,
    open_data,
    sizes_sentence,
    stage_one_request,
    text_tokens_of,
    validation_prompts,
    with_pictures,
)
from sd3_lora.training.optimizer import (
    bytes_per_parameter,
    make_optimizer,
    make_optimizer_in_backward,
    optimizer_notes,
    optimizer_step,
    rate_in_force,
)
from sd3_lora.training.output_folder import (
    lock_outputs,
    named_disk_faults,
    require_room_for_checkpoints,
    require_room_for_model,
)
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.training.run_flags import RunConfig
from sd3_lora.training.run_identity import run_facts, run_identity
from sd3_lora.training.stage_one_request import StageOneRequest
from sd3_lora.training.starts import Starts, initial_lora
from sd3_lora.training.state import OutOfDeviceMemory, Outputs, StepStart, Training, random_state
from sd3_lora.training.stop_signals import StopSignals
from sd3_lora.training.trackers import Trackers, usable_trackers
from sd3_lora.training.trainables import Trainables, TrainedGroup, groups_by_rate
from sd3_lora.training.trained_parts import (
    clip_training,
    groups_of_clips,
    load_clips,
    lora_kind,
    lora_targets,
    optimizer_bytes,
    require_rates,
)
from sd3_lora.training.watch import Watch, finished_pictures, look, make_early_warning, mean_step_ms, open_log
from sd3_lora.training.watch_flags import WatchFlags
from sd3_lora.transformer.compiled import start_compile_workers
from sd3_lora.transformer.lora import LORA_FILE, attach_lora, chosen_blocks, start_from, trained_names
from sd3_lora.transformer.lora_exports import is_plain, require_exportable
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.placement import ArrangedTransformer, arrange
from sd3_lora.transformer.trained_clips import TrainedClips
from sd3_lora.transformer.velocity import VelocityModel
from sd3_lora.transformer.whole_weights import train_whole

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import SD3Transformer2DModel

SCRIPT = "train_dreambooth_sd3_lora_miniature.py"


# 1. The stage, from top to bottom


def run(argv: Sequence[str] | None) -> None:
    """The stage, with the locks that it takes on its way; all are free again in the end."""
    with ExitStack() as locks:
        run_locked(argv, locks)


def run_locked(argv: Sequence[str] | None, locks: ExitStack) -> None:
    """The stage from top to bottom."""
    flags = TrainingFlags(*COMMAND_LINE.parse(argv)).settled()
    forget_secrets()
    output_dir = Path(flags.run.output_dir)
    accelerator = start_accelerator(choose_device(flags.device.device, flags.model), flags.run, output_dir)
    device, say, processes = accelerator.device, accelerator.print, accelerator.num_processes
    chosen = set_up_device(flags, accelerator)

    files = ModelFiles(flags.model, flags.budget.plan)
    resolution, budget = files.resolution(flags.data.resolution), open_budget(flags.budget, device)
    task = training_task(flags, files, Buckets.of(flags.data, files), chosen.dtype, device, processes)
    plan = make_plan(task, budget)
    say("\n".join(plan_lines(task, plan, budget, flags.step.gradient_checkpointing)))
    if flags.budget.plan:
        return

    hub = open_hub(flags, accelerator)
    require_possible(flags, files, plan, chosen.dtype, device)
    lock_outputs(output_dir, accelerator, locks)
    flags = with_pictures(flags, accelerator)
    prompts, resumes = validation_prompts(flags.watch), flags.run.resume_from_checkpoint
    MissingInputs(stage_one_request(flags, files, resolution), prompts, output_dir, resumes).require_none()
    checkpoint = resume_point(resumes, output_dir)
    start = None if checkpoint else initial_lora(flags.lora, flags.text, files)  # a checkpoint has all that came of it

    request = stage_one_request(flags, files, resolution)
    identifier = IdentifierStart.of(flags.identifier, files, start)
    data = open_data(request, prompts, accelerator, flags.trains_clips, identifier, locks)
    state = read_state(checkpoint) if checkpoint else {"signature": {}}
    seed = choose_seed(flags.run.seed, state["signature"])
    say(f"{sizes_sentence(data, resolution)}, seed {seed}")

    facts = run_facts(request, data, chosen.name, seed, processes)
    job = Job(flags, request, task, data, accelerator, Starts(start, identifier), facts, argv)
    steps = train_within(job, Attempt(plan, budget, checkpoint, state))

    if accelerator.is_main_process:
        write_exports(output_dir, flags, files)
    accelerator.end_training()
    upload(hub, flags, steps)


# 2. The device and its precision


def start_accelerator(device: torch.device, run: RunConfig, output_dir: Path) -> Accelerator:
    """The processes and their devices; precision is not left to accelerate, so that the LoRA is always float32."""
    return Accelerator(
        mixed_precision="no",
        cpu=device.type == "cpu",
        log_with=usable_trackers(run.trackers) or None,
        project_dir=output_dir / run.logging_dir,
    )


def set_up_device(flags: TrainingFlags, accelerator: Accelerator) -> ChosenDtype:
    """Makes the device compute as the flags say, prints how, and returns the transformer's precision."""
    if flags.device.must_be_deterministic:
        make_deterministic()
    if flags.model.is_miniature and accelerator.is_main_process:
        say_miniature(SCRIPT, flags.data.instance_data_dir)
    chosen, say = choose_precision(flags, accelerator.device), accelerator.print
    processes = counted(accelerator.num_processes, "process")
    if flags.trains_all:
        say(f"transformer in {chosen.reason}; trained whole; {processes}")
        notes = adam_notes(flags.run.gradient_accumulation_steps, flags.optimizer.max_grad_norm)
    else:
        say(f"transformer in {chosen.reason}; LoRA and optimizer in float32; {processes}")
        notes = optimizer_notes(flags.optimizer, accelerator.device)
    for note in notes:
        say(note)
    if flags.run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return chosen


def choose_precision(flags: TrainingFlags, device: torch.device) -> ChosenDtype:
    """The transformer's: as its flag or accelerate launch says, else what the device does best."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # accelerate launch writes "no" where nobody said so
    asked = flags.run.mixed_precision or (launched if launched in ("fp16", "bf16") else None)
    choose = choose_whole_dtype if flags.trains_all else choose_training_dtype
    return choose(asked, planned_device(flags.device.device, device, flags.budget.plan))


# 3. The plan: what is kept where, before anything is loaded


def training_task(
    flags: TrainingFlags, files: ModelFiles, buckets: Buckets, dtype: torch.dtype, device: torch.device, processes: int
) -> TrainingTask:
    """What is to be planned.

    Raises:
        UserError: flags that cannot be obeyed.
    """
    config, lora, kind = files.read_config("transformer"), flags.lora, lora_kind(flags.lora)
    _, vae_scale = files.latent_channels_and_scale()
    asked = asked_placement(flags, config["num_layers"], processes)
    kind.check(asked.precision, asked.streamed)
    require_rates(flags, config)
    per_parameter = bytes_per_parameter(flags.optimizer, dtype, lora.rank) + kind.frozen_bytes_per_parameter
    micro_steps = flags.run.steps(0, processes) * flags.run.gradient_accumulation_steps  # of epochs, not known yet: 0
    prior_rows, base_rows = flags.prior.rows(flags.run.train_batch_size)
    shape = StepShape(
        flags.run.train_batch_size * flags.prior.pools,
        buckets.largest.latent(vae_scale),
        text_tokens_of(flags.data, files),
        lora.layers,
        chosen_blocks(lora.blocks, config["num_layers"]),
        lora.rank,
        lora.lora_dropout,
        dtype,
        per_parameter + (EMA_BYTES_PER_PARAMETER if flags.average.use_ema else 0),
        choose_backward(
            device, dtype, config["attention_head_dim"], asked.attention_kernel, flags.device.must_be_deterministic
        ),
        asked_execution(flags).compiles(device, micro_steps),
        kind,
        longest_side=buckets.longest_side // vae_scale,
        masked=flags.data.masked_loss,
        prior_rows=prior_rows,
        base_rows=base_rows,
        clips=clip_training(flags, files),
        whole_bytes=optimizer_bytes(flags, files, dtype, device),
        state_of=hollow_moments if flags.trains_all else None,
    )
    can_stream = processes == 1 and not kind.needs_whole_weights
    if flags.trains_all and flags.run.gradient_accumulation_steps > 1:  # whose kept gradients are as large as weights
        can_stream = False
    step = partial(micro_step, flow=flags.flow, prior=flags.prior)
    drawing = drawing_between(flags, files, dtype)
    can_be_4bit = not kind.starts_from_weights and not flags.trains_all
    return TrainingTask(files, shape, step, asked, can_stream, can_be_4bit, drawing)


def asked_execution(flags: TrainingFlags) -> AskedExecution:
    """What flags fix of how micro-steps are carried out."""
    step, base_pass = flags.step, flags.prior.prior_term is not None
    must_compile = False if flags.trains_all else step.must_compile  # a compiled block has all its gradients at once
    return AskedExecution(must_compile, step.must_capture, flags.device.must_be_deterministic, base_pass)


def plan_execution(
    flags: TrainingFlags, plan: Plan, device: torch.device, steps: int, kernels_before: str | None
) -> StepExecution:
    """How each micro-step is carried out; a resumed run keeps the kernels that its checkpoint notes."""
    micro_steps = steps * flags.run.gradient_accumulation_steps
    return choose_execution(asked_execution(flags), plan, device, flags.lora.lora_dropout, micro_steps, kernels_before)


def drawing_between(flags: TrainingFlags, files: ModelFiles, dtype: torch.dtype) -> DrawingBetween | None:
    """What validation takes at the least: one row of a forward, and the smallest tiles."""
    if not flags.watch.draws:
        return None
    work, (_, vae_scale) = validation_work(flags, files), files.latent_channels_and_scale()
    shape = DenoisingShape(1, work.size.latent(vae_scale), text_tokens_of(flags.data, files), dtype, 0)
    tile = smallest_tile(files, work)
    decoding = {"VAE": tile.weight_bytes, "working memory": tile.working_bytes}
    return DrawingBetween(shape, validation_sampling(flags.watch).rows, decoding)


def validation_sampling(watch: WatchFlags) -> SamplingSettings:
    """How validation pictures are denoised."""
    return SamplingSettings(watch.validation_num_steps, watch.validation_guidance, watch.validation_negative_prompt)


def validation_work(flags: TrainingFlags, files: ModelFiles) -> VaeWork:
    """What the VAE decodes of a validation picture: a square of the run's resolution."""
    resolution = files.resolution(flags.data.resolution)
    return VaeWork("decode", VAE_PRECISION, PictureSize(resolution, resolution))


def make_plan(task: TrainingTask, budget: DeviceBudget | None) -> Plan:
    """The fastest plan that fits the budget; all on the device where there is none.

    Raises:
        UserError: nothing fits; or the host has no room for what is streamed of a trained transformer.
    """
    # Rank 0's GPU decides: all are to compute with the same numbers.
    plan = [plan_training(task, budget) if budget else Plan(plain_placement(task.files, task.asked), Forecast())]
    broadcast_object_list(plan)
    require_host_room(task, plan[0])
    return plan[0]


def require_possible(
    flags: TrainingFlags, files: ModelFiles, plan: Plan, dtype: torch.dtype, device: torch.device
) -> None:
    """Checks what would fail once the transformer is loaded, before latents are made.

    Raises:
        UserError: the transformer's files are not whole, or flags ask for what cannot be.
    """
    for component in ("transformer", *(CLIPS if flags.trains_clips else ())):
        files.component(component)
    head_width = files.read_config("transformer")["attention_head_dim"]
    if flags.trains_all:
        require_room_for_model(flags, files, dtype)
    require_attention_kernel(plan.placement.attention_kernel, device, dtype, head_width, trains=True)
    plan_execution(flags, plan, device, 0, None)
    for form in flags.run.exports:
        lora_path = Path(flags.run.output_dir) / LORA_FILE
        require_exportable(lora_path, is_plain(flags.lora.lora_type, flags.lora.use_dora), form)


# 4. An attempt with a plan; where the device's memory runs out, the next one


@dataclass(frozen=True)
class Job:
    """All that is known of a run before the transformer is loaded, but for where it is kept.

    Attributes:
        flags: of the run.
        request: of stage one.
        task: to be planned.
        data: the pictures.
        accelerator: of the processes.
        starts: with what training begins.
        facts: of the record, without a plan.
        argv: the arguments, to be printed.
    """

    flags: TrainingFlags
    request: StageOneRequest
    task: TrainingTask
    data: TrainingData
    accelerator: Accelerator
    starts: Starts
    facts: RunFacts
    argv: Sequence[str] | None


@dataclass(frozen=True)
class Attempt:
    """How a run is begun, or goes on, with a plan that ought to fit.

    Attributes:
        plan: what is kept where.
        budget: that it fits.
        checkpoint: from which the run goes on, if it does.
        state: of that checkpoint; its signature is empty where there is none.
        may_capture: whether a CUDA graph may be tried where the plan has no room for one.
    """

    plan: Plan
    budget: DeviceBudget | None
    checkpoint: Path | None
    state: dict[str, Any]
    may_capture: bool = True


def train_within(job: Job, attempt: Attempt) -> int:
    """Trains within the device's memory; where that runs out, with a cheaper plan from there on. Returns the steps.

    Raises:
        UserError: no plan fits.
    """
    while True:
        try:
            return train_as_planned(job, attempt)
        except OutOfDeviceMemory as error:
            ended, kept = f"at step {error.step} ({error.reason})", error.checkpoint or attempt.checkpoint
        except RuntimeError as error:  # while the transformer is loaded
            if not is_out_of_memory(error) or job.accelerator.num_processes > 1:
                raise
            ended, kept = f"before the first step ({first_line(error)})", attempt.checkpoint
        free_memory(job.accelerator.device)
        attempt = cheaper_attempt(job, attempt, ended, kept)


def train_as_planned(job: Job, attempt: Attempt) -> int:
    """The transformer is loaded, trained and written, with one plan. Returns the steps that it has then.

    Raises:
        OutOfDeviceMemory: what can be kept is on disk.
    """
    flags, data, accelerator, files = job.flags, job.data, job.accelerator, job.task.files
    plan, budget, checkpoint, state = attempt.plan, attempt.budget, attempt.checkpoint, attempt.state
    device, say, reports = accelerator.device, accelerator.print, list[StageReport]()
    if budget:
        budget.cap()
    facts = replace(job.facts, plan=plan.to_dict(), predicted_parts=dict(plan.forecast.largest.parts))
    planned = plan_run(job, plan, state["signature"].get("--compile"))
    if not attempt.may_capture:
        planned = replace(planned, execution=replace(planned.execution, captured=False))
    start_compile_workers(planned.execution.compiled, device)  # while the transformer is loaded
    with memory_stage("load transformer", device, reports, say):
        training = load_training(job, planned)
    say(f"each micro-step: {planned.execution.sentence()}")
    outputs = open_outputs(flags, facts, job.request, data, planned.execution, job.argv)
    if checkpoint:
        outputs.load_checkpoint(checkpoint, state, training, accelerator)
        say(f"resumed from {checkpoint}: step {training.step} of {planned.steps}")
    if accelerator.is_main_process:
        require_room_for_checkpoints(flags, training)
    if training.step >= planned.steps and outputs.is_finished(training.step):
        say_nothing_to_do(outputs, training, accelerator)
        if accelerator.is_main_process and not outputs.report_path.exists():
            report(outputs)
        return training.step
    trackers = Trackers(accelerator, {"rank": flags.lora.rank, "steps": planned.steps, "seed": facts.seed})
    validation = make_validation(flags, job.task, plan, budget, data, outputs.record, training.step)
    batches = make_batches(training, data, files, flags, device)
    step = make_step(training, flags, planned.execution, say, len(set(data.sizes)))
    watch = make_watch(job, planned, outputs, training.step, trackers, validation, step)
    with trackers, memory_stage("train", device, reports, say), attention_of(planned):
        ms_a_step = train(training, batches, step, flags, watch, outputs, accelerator)
    if accelerator.is_main_process:
        results = report_results(outputs, watch.log, step, planned, budget, reports, ms_a_step)
        write_model(outputs, training)
        finish(outputs, flags, replace(results, steps=training.step))
    return training.step


def cheaper_attempt(job: Job, attempt: Attempt, ended: str, checkpoint: Path | None) -> Attempt:
    """How a run goes on whose device had too little memory, once that is freed; prints it.

    Args:
        job: the run.
        attempt: that has ended.
        ended: where and why, for the user.
        checkpoint: from which the run goes on, if it does.

    Raises:
        UserError: no cheaper plan fits.
    """
    budget = attempt.budget and attempt.budget.now()
    state = read_state(checkpoint) if checkpoint else {"signature": attempt.state["signature"]}
    say, where = job.accelerator.print, f"going on from {checkpoint}" if checkpoint else "beginning again"
    if attempt.may_capture and not attempt.plan.forecast.has_room_for_graph:  # it was tried all the same
        say(f"note: the GPU's memory ran out {ended}: {where}, without a CUDA graph")
        return replace(attempt, checkpoint=checkpoint, state=state, may_capture=False)
    compiled = state["signature"].get("--compile") == COMPILED
    plan = plan_cheaper(job.task, budget, attempt.plan, compiled) if budget else None
    if plan is None:
        left = f"; {at_most_gib(budget.total_bytes)} GiB are free, in which no cheaper plan fits" if budget else ""
        again = command_again(SCRIPT, job.argv, **({"resume_from_checkpoint": "latest"} if checkpoint else {}))
        kept = f"{checkpoint} is kept; to go on" if checkpoint else "no step was kept; to start again"
        raise UserError(f"the GPU's memory ran out {ended}{left}: {kept}, close other programs and type `{again}`")
    say(f"note: the GPU's memory ran out {ended}: {where}, with a plan that takes less")
    say("\n".join(plan_lines(job.task, plan, budget, False)))
    return Attempt(plan, budget, checkpoint, state)


def plan_run(job: Job, plan: Plan, kernels_before: str | None) -> PlannedTraining:
    """All that is decided before the transformer is loaded, now that the pictures are known; prints what is in force.

    Args:
        job: the run.
        plan: of it.
        kernels_before: of the checkpoint that the run goes on from.
    """
    flags, data, processes = job.flags, job.data, job.accelerator.num_processes
    steps = flags.run.steps(pictures_of_pass(flags, data, processes), processes)
    job.accelerator.print(f"in force: {flags.in_force(job.request.resolution, steps, processes)}")
    execution = plan_execution(flags, plan, job.accelerator.device, steps, kernels_before)
    execution = replace(execution, attention_backward=job.task.shape.attention_backward)
    longest_side = max(size.longer_side for size in data.sizes) // job.task.files.latent_channels_and_scale()[1]
    if job.task.drawing:
        longest_side = max(longest_side, *job.task.drawing.shape.latent_size)
    return PlannedTraining(plan, execution, job.task.shape.dtype, (longest_side, longest_side), steps)


# 5. The transformer, frozen, and its LoRA


def load_training(job: Job, planned: PlannedTraining) -> Training:
    """The transformer with what is trained, and all that trains it."""
    flags, request, data, accelerator, seed = job.flags, job.request, job.data, job.accelerator, job.facts.seed
    run, device, processes, dtype = flags.run, accelerator.device, accelerator.num_processes, planned.dtype
    arranged, clips, trainables = (
        load_whole(request, flags, planned, accelerator)
        if flags.trains_all
        else load_lora(request, flags, planned, seed, accelerator, job.starts)
    )
    if flags.trains_all:
        window, by_chance = run.gradient_accumulation_steps, flags.full.weight_rounding == "stochastic"
        optimizer, lr_scheduler = make_optimizer_in_backward(
            flags.optimizer, trainables, planned.steps, seed, window, by_chance, arranged.streamed
        )
    else:
        optimizer, lr_scheduler = make_optimizer(flags.optimizer, trainables, planned.steps)
    torch.manual_seed(seed + accelerator.process_index)  # each rank drops out other elements
    return Training(
        VelocityModel(arranged.transformer, dtype, arranged.ahead, clips),
        trainables,
        optimizer,
        lr_scheduler,
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        GlobalDraws(seed, run.train_batch_size * flags.prior.pools, accelerator.process_index, processes),
        DataOrder(data.pools, seed, data.sizes),
        planned.steps,
        arranged.ahead,
        average=MovingAverage(trainables, flags.average.ema_decay) if flags.average.use_ema else None,
        word=flags.identifier.word,
    )


def load_lora(
    request: StageOneRequest,
    flags: TrainingFlags,
    planned: PlannedTraining,
    seed: int,
    accelerator: Accelerator,
    starts: Starts,
) -> tuple[ArrangedTransformer, TrainedClips | None, Trainables]:
    """The frozen transformer with a new LoRA, or one that begins as another; the CLIPs where something of them is."""
    start, identifier = starts.lora, starts.identifier
    files, lora, device = request.files, flags.lora, accelerator.device
    dtype, names = planned.dtype, list[str]()

    def add_lora(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
        targets, kind = lora_targets(lora, transformer), lora_kind(lora)
        trained = attach_lora(transformer, targets, lora.rank, lora.alpha, lora.lora_dropout, seed, kind)
        if start:
            start_from(transformer, start.starts())
        names.extend(trained_names(transformer))
        return trained

    arranged = arrange(
        files, planned.plan.placement, device, dtype, planned.latent_size, add_lora, planned.execution.compiled
    )
    pictures = flags.run.pictures_per_step(accelerator.num_processes)
    first = flags.identifier.first_step_of_lora(planned.steps)
    rate, parts = flags.optimizer.scaled_rate(pictures), tuple(arranged.trained)
    group = TrainedGroup("transformer", arranged.flat, rate, parts, first_step=first)
    groups = groups_by_rate(group, names, flags.optimizer.scaled_rates(pictures))
    of_clips, clips = clip_training(flags, files, seed, identifier.count if identifier else 0), None
    if of_clips:
        clips = load_clips(of_clips, files, dtype, start, identifier)
        if planned.plan.placement.clips_streamed:
            clips.stream(device)
        else:
            clips.to(device)
        groups += groups_of_clips(clips, flags, pictures, planned.steps)
    trainables = Trainables(groups)
    accelerator.print(f"LoRA: {trainables.numel / 1e6:.2f} M parameters in float32, rank {lora.rank}")
    return arranged, clips, trainables


def load_whole(
    request: StageOneRequest, flags: TrainingFlags, planned: PlannedTraining, accelerator: Accelerator
) -> tuple[ArrangedTransformer, None, Trainables]:
    """The transformer, of which all is trained; each of its weights is a group of its own."""
    placement, device, dtype = planned.plan.placement, accelerator.device, planned.dtype
    arranged = arrange(request.files, placement, device, dtype, planned.latent_size, train_whole)
    rate = flags.optimizer.scaled_rate(flags.run.pictures_per_step(1))
    weights = arranged.transformer.named_parameters()
    trainables = Trainables([TrainedGroup(name, weight, rate, (weight,)) for name, weight in weights])
    name = str(dtype).removeprefix("torch.")
    accelerator.print(f"transformer: {trainables.numel / 1e6:.2f} M parameters in {name}, AdamW's state in 8 bits")
    return arranged, None, trainables


# 6. What the loop works with


def open_outputs(
    flags: TrainingFlags,
    facts: RunFacts,
    request: StageOneRequest,
    data: TrainingData,
    execution: StepExecution,
    argv: Sequence[str] | None,
) -> Outputs:
    """What writes the LoRA and the checkpoints, with the record of the run."""
    record = RunRecord(groups_of(flags), facts, run_identity(flags, facts, request, data, execution.kernels))
    again = command_again(SCRIPT, argv, resume_from_checkpoint="latest")
    # A checkpoint of a whole transformer has gigabytes, and by default the last one is kept alone.
    limit = flags.run.checkpoints_total_limit or (1 if flags.trains_all else None)
    files = request.files if flags.trains_all else None
    return Outputs(Path(flags.run.output_dir), record, limit, again, files)


def make_validation(
    flags: TrainingFlags,
    task: TrainingTask,
    plan: Plan,
    budget: DeviceBudget | None,
    data: TrainingData,
    record: RunRecord,
    resumed_at: int,
) -> Validation | None:
    """What draws while training: as many pictures at a time, and in as large tiles, as the plan's peak has room for."""
    if task.drawing is None:
        return None
    *prompts, negative_prompt = validation_prompts(flags.watch)
    embeddings = {prompt: data.embedding(prompt) for prompt in (*prompts, negative_prompt)}
    work = validation_work(flags, task.files)
    sampling, per_picture = validation_sampling(flags.watch), task.drawing.rows
    rows = drawn_together(task, plan, len(prompts) * flags.watch.num_validation_images)
    tile = validation_tile(task.files, work, plan, budget)
    facts = record.facts
    settings = {
        "model": task.files.provenance(["transformer", "vae"], "", 0).identity,
        "max_sequence_length": facts.max_sequence_length,
        "precision": facts.precision + (f", base {packed}" if (packed := plan.placement.precision) else ""),
        "average": "ema" if flags.average.use_ema else None,
    }
    what = ValidationTask(
        tuple(prompts),
        flags.watch.num_validation_images,
        replace(sampling, apart=rows < per_picture),
        flags.watch.validation_seed,
        work.size,
        max(1, rows // per_picture),
        tile,
        settings,
    )
    tensors = {prompt: (row.prompt_embeds, row.pooled_prompt_embeds) for prompt, row in embeddings.items()}
    encode = partial(live_embeddings, data=data, prompts=list(tensors)) if data.clip_tokens else None
    return Validation(what, task.files, tensors, Path(flags.run.output_dir) / "samples", resumed_at, encode)


def validation_tile(files: ModelFiles, work: VaeWork, plan: Plan, budget: DeviceBudget | None) -> VaeTile:
    """What the VAE decodes at a time: the largest tile that leaves the step's peak the peak, or the smallest of all."""
    if budget is None:
        return choose_tile(files, work, None)
    parts = plan.forecast.phases[-1].parts
    kept = sum(parts.get(name, 0) for name in ("weights", "CLIPs", "LoRA", "unused between them"))
    least = sum(parts.values()) - kept
    return choose_tile(files, work, replace(budget, total_bytes=max(least, room_to_draw(plan) - kept)))


def make_watch(
    job: Job,
    planned: PlannedTraining,
    outputs: Outputs,
    at: int,
    trackers: Trackers,
    validation: Validation | None,
    step: Callable[..., torch.Tensor],
) -> Watch:
    """What looks at a run from a step on."""
    accelerator, flags, data, processes = job.accelerator, job.flags, job.data, job.accelerator.num_processes
    log = open_log(outputs, at, trackers, accelerator)
    warning = None
    if accelerator.is_main_process:
        warning = make_early_warning(flags, data, job.task.files, at, accelerator.print)
    steps_of_epoch = pictures_of_pass(flags, data, processes) / flags.run.pictures_per_step(processes)
    release = step.release if isinstance(step, CapturedCall) else lambda: None
    over_ranks = partial(accelerator.reduce, reduction="sum") if processes > 1 else None
    signals = StopSignals(outputs.kept, accelerator.device, over_ranks)
    return Watch(log, trackers, validation, warning, steps_of_epoch, planned.execution.compiled, release, signals)


def pictures_of_pass(flags: TrainingFlags, data: TrainingData, processes: int) -> int:
    """How many pictures a pass over all of them has, those included that fill its last batches."""
    return places_of_pass(data.pools, data.sizes, flags.run.train_batch_size * processes)


# 7. The micro-step, captured as a CUDA graph or not


def make_step(
    training: Training, flags: TrainingFlags, execution: StepExecution, report: Callable[[str], None], sizes: int
) -> Callable[..., torch.Tensor]:
    """`StepInputs` → the loss, whose gradient is added to the trainables'. A CUDA graph of each shape if so chosen.

    Args:
        training: what is trained.
        flags: of the run.
        execution: whether it is captured.
        report: gets a line where it cannot be captured.
        sizes: how many sizes of crops there are.
    """
    ahead, window, in_backward = training.ahead, flags.run.gradient_accumulation_steps, training.in_backward

    def compute(*inputs: torch.Tensor) -> torch.Tensor:
        with ahead.active() if ahead else nullcontext():
            loss = micro_step(training.model, StepInputs(*inputs), flags.flow, flags.prior)
            training.scaler.scale(loss / window).backward()
        return loss.detach()

    if not execution.captured:
        return compute
    gradients = in_backward.gradients if in_backward else training.trainables.gradients
    exact = bool(flags.device.must_be_deterministic)
    shapes = 2 * sizes if sizes > 1 else 1  # of several sizes each has a smaller batch at the end of a pass
    if flags.prior.predicts and (sizes > 1 or not flags.prior.is_even(flags.run.train_batch_size)):
        shapes *= 2  # of each one with a row more than the other
    call = CapturedCall(compute, gradients[0].device, gradients, execution.must_capture, report, exact, shapes)
    if in_backward:
        call.rehearsal = in_backward.rehearsal
    return call


def micro_step(model: VelocityModel, inputs: StepInputs, flow: FlowConfig, prior: PriorConfig) -> torch.Tensor:
    """The loss of one micro-batch, a float32 scalar. The plan simulates this very function."""
    noisy_latents = interpolate(inputs.latents, inputs.noise, inputs.sigmas)
    target = inputs.latents, inputs.noise, inputs.sigmas, inputs.loss_weights, flow
    conditions = model.conditions(inputs)
    if prior.prior_term == "preference":
        base_velocity = model.base_velocity(noisy_latents, *inputs.conditions)
        velocity = model(noisy_latents, *conditions)
        return preference_loss(velocity, base_velocity, *target, prior.term_weight)
    count, again = len(noisy_latents), inputs.prior_rows
    if not len(again):
        return flow_matching_loss(model(noisy_latents, *conditions), *target)
    # The pictures that come once more, with a prior prompt, are rows of the same pass.
    base_velocity = model.base_velocity(noisy_latents[again], *(rows[count:] for rows in inputs.conditions))
    both = model(torch.cat([noisy_latents, noisy_latents[again]]), *conditions)
    velocity, prior_velocity = both.split([count, len(again)])
    moved = prediction_loss(prior_velocity, base_velocity, inputs.sigmas[again], inputs.loss_weights[again], flow)
    weight = prior.term_weight * len(again) / (float(prior.share) * count)
    return flow_matching_loss(velocity, *target) + weight * moved


# 8. The loop: accumulate, update, save, look


def train(
    training: Training,
    batches: MicroBatches,
    step: Callable[..., torch.Tensor],
    flags: TrainingFlags,
    watch: Watch,
    outputs: Outputs,
    accelerator: Accelerator,
) -> float | None:
    """Takes all steps. Returns the milliseconds of one.

    Raises:
        OutOfDeviceMemory: what can be kept is on disk. Several processes cannot go on: the others wait for this one.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP, after a checkpoint.
    """
    with finished_pictures(watch.validation), watch.signals:
        try:
            return take_steps(training, batches, step, flags, watch, outputs, accelerator)
        except (RuntimeError, MemoryError) as error:
            host_fault = host_memory_fault(error)
            if not (host_fault or is_out_of_memory(error)):
                raise
            reason, at = first_line(error), training.step
            ran_out = host_fault or f"the GPU's memory ran out ({reason})"
        except NotFinite as error:
            raise explained(error, training, batches, watch) from None
        # Not in the `except` block, which keeps what the step has allocated.
        watch.release()
        drop_workspaces(accelerator.device)
        free_memory(accelerator.device)
        if accelerator.num_processes > 1:
            raise UserError(f"{ran_out} at step {at}: {outputs.kept()}")
        if training.step == training.steps and not (training.started or training.updating):
            Progress.write(f"note: the GPU's memory ran out after step {at} ({reason}): what is due is done once more")
            return end_last_step(training, batches, flags, watch, outputs, accelerator)
        checkpoint = keep_whole_step(training, batches, watch.log, outputs, accelerator)
        if watch.signals.received is not None:
            raise Interrupted(outputs.kept(), watch.signals.received)
        if host_fault:
            raise UserError(f"{host_fault} at step {at}: close other programs; {outputs.kept()}")
        raise OutOfDeviceMemory(reason, at, checkpoint)


def take_steps(
    training: Training,
    batches: MicroBatches,
    step: Callable[..., torch.Tensor],
    flags: TrainingFlags,
    watch: Watch,
    outputs: Outputs,
    accelerator: Accelerator,
) -> float | None:
    """The loop: whole windows of micro-batches, one optimizer step each, never more than `training.steps`.

    Returns the milliseconds of a step; None where all had been taken before.

    The host runs ahead of the device: it learns one step late that the scaler skipped one. Writes checkpoints and LoRA.

    Raises:
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP, after a checkpoint.
    """
    training.model.train()
    log, window, signals = watch.log, flags.run.gradient_accumulation_steps, watch.signals
    steps_to_checkpoint = flags.run.steps_to_checkpoint(training.steps)
    # Before the first step; and of a run that is resumed, what its interruption left out.
    at_end = training.step >= training.steps
    if at_end and accelerator.is_main_process:
        outputs.complete(training)
    saves = at_end or training.step % steps_to_checkpoint == 0
    draws = flags.watch.draws_at(training.step, watch.steps_of_epoch, saves, at_end)
    aside_s = look(training, watch, draws, flags.watch.measures_at(training.step), accelerator)
    watch.marks.append((training.step, time.perf_counter() - aside_s))
    # Closed by `with` on an error too, so that its sentence stands on a line of its own.
    bar_of_steps = Progress(
        initial=training.step, total=training.steps, desc="steps", disable=not accelerator.is_local_main_process
    )
    with bar_of_steps as bar:
        while training.step < training.steps:
            training.started = StepStart(batches.state_dict(), random_state(accelerator.device))
            training.step += 1
            if training.enter_step():
                watch.release()  # the step is captured anew, with gradients for others
            training.begin_step()
            at_end = training.step == training.steps
            drawable = window * (training.steps - training.step + 1)
            loss, pictures, sigmas = accumulate(training, batches, step, window, drawable)
            finish_step(training, log)
            log.queued = update(training, flags.optimizer.max_grad_norm, loss, pictures, sigmas, accelerator)
            bar.update()
            interrupted = signals.agreed() and not at_end
            saves = at_end or interrupted or training.step % steps_to_checkpoint == 0
            draws = flags.watch.draws_at(training.step, watch.steps_of_epoch, saves, at_end) and not interrupted
            measures = flags.watch.measures_at(training.step) and not interrupted
            if saves or draws or measures or training.step % READ_EVERY == 0:
                finish_step(training, log)
                log.read()
                bar.set_postfix_str(f"loss {log.recent_mean:.4f}")
                watch.marks.append((training.step, time.perf_counter() - aside_s))
            with named_disk_faults(outputs):
                save_what_is_due(training, batches, flags, outputs, saves, accelerator)
            if interrupted:
                raise Interrupted(outputs.kept(), signals.received or signal.SIGINT)
            aside_s += look(training, watch, draws, measures, accelerator)
    return mean_step_ms(watch.marks)


def accumulate(
    training: Training, batches: MicroBatches, step: Callable[..., torch.Tensor], window: int, drawable: int
) -> tuple[torch.Tensor, str, list[float]]:
    """The micro-steps of one optimizer step.

    The host draws the next micro-batch while the device computes (two, where modulations are computed ahead).

    Args:
        training: whose modulations may be computed ahead.
        batches: the run's.
        step: computes one.
        window: how many.
        drawable: how many may be drawn, these included.

    Returns:
        The mean loss of a picture, a scalar on the device; the names of the pictures; and their noise levels.
    """
    losses, names, sigmas, full_batches = [], list[str](), list[float](), 0.0
    for drawable_now in range(drawable, drawable - window, -1):
        batches.draw_ahead(drawable_now)
        batch, coming = batches.take()
        inputs = batch.inputs
        if training.ahead:
            with training.model.precision(inputs.latents.device):
                training.ahead.advance(inputs.modulating, coming.modulating if coming else None)
        losses.append(step(*inputs))
        names += batch.names
        sigmas += batch.sigmas
        full_batches += batch.of_full
        batches.draw_ahead(drawable_now - 1)  # while the device computes
    mean = torch.stack(losses).mean()
    seen = ", ".join(dict.fromkeys(names))
    return mean if full_batches == window else mean * (window / full_batches), seen, sigmas


def update(
    training: Training,
    max_grad_norm: float,
    loss: torch.Tensor,
    pictures: str,
    sigmas: Sequence[float],
    accelerator: Accelerator,
) -> PendingStep:
    """The optimizer's step from what a window of micro-steps has left in the gradients, to be logged.

    Args:
        training: what is trained.
        max_grad_norm: to which gradients are clipped.
        loss: the window's mean, a scalar on the device.
        pictures: their names.
        sigmas: their noise levels.
        accelerator: of the processes.
    """
    if accelerator.num_processes > 1:  # a LoRA's gradients are a few megabytes, once a window
        training.trainables.reduce(lambda gradient: accelerator.reduce(gradient, "mean"))
    training.enter_step()  # the schedule has given new rates
    learning_rate, held = rate_in_force(training.optimizer), held_norms(training)
    drawn = training.started.drawn if training.started else None
    training.started, training.updating = None, True
    norm, skipped = optimizer_step(training.trainables, training.optimizer, training.scaler, max_grad_norm)
    training.hold_identifier(norm)
    if training.average:
        training.average.update(norm)
    training.updating = False
    return PendingStep(training.step, loss, norm, learning_rate, skipped, pictures, sigmas, held, drawn)


def finish_step(training: Training, log: LossLog) -> None:
    """Logs the step that was queued last. Waits until the device knows whether the scaler skipped it."""
    if log.queued is not None:
        queued = replace(log.queued, skipped=bool(log.queued.skipped))  # all that can fail, before anything changes
        log.queued = None
        if not queued.skipped:
            training.lr_scheduler.step()
        log.add(queued)


def save_what_is_due(
    training: Training,
    batches: MicroBatches,
    flags: TrainingFlags,
    outputs: Outputs,
    saves: bool,
    accelerator: Accelerator,
) -> None:
    """Writes the LoRA at the end of the run, that of a step if asked for, and a checkpoint where `saves` says so."""
    if training.step == training.steps and accelerator.is_main_process:
        outputs.save_trained(training, outputs.folder)  # first of all: nothing after this can lose it
    if flags.watch.saves_at(training.step) and accelerator.is_main_process:
        outputs.save_lora_of_step(training)
    if saves:
        outputs.save_checkpoint(training, batches.state_dict(), accelerator)


def keep_whole_step(
    training: Training, batches: MicroBatches, log: LossLog, outputs: Outputs, accelerator: Accelerator
) -> Path | None:
    """Writes a checkpoint of the last whole step, after the device's memory ran out in the next one.

    Returns:
        From which to go on: the checkpoint, or an earlier one if an update was cut off; None to begin again.

    Raises:
        UserError: a loss or gradient is not finite.
    """
    drawn, random_then = batches.state_dict(), None
    if training.started:  # all that the step has changed is what it has drawn
        drawn, random_then = training.started.drawn, training.started.random
    if training.started or training.updating:
        training.step -= 1
    if training.updating or training.step == 0:
        return outputs.last_checkpoint(training.step)
    finish_step(training, log)
    log.read()
    with named_disk_faults(outputs):
        outputs.save_checkpoint(training, drawn, accelerator, random_then)
    return outputs.last_checkpoint(training.step)


def end_last_step(
    training: Training,
    batches: MicroBatches,
    flags: TrainingFlags,
    watch: Watch,
    outputs: Outputs,
    accelerator: Accelerator,
) -> float | None:
    """What follows the last update, after the device's memory ran out in it. Returns the milliseconds of a step."""
    finish_step(training, watch.log)
    watch.log.read()
    with named_disk_faults(outputs):
        save_what_is_due(training, batches, flags, outputs, True, accelerator)
    if watch.marks[-1][0] != training.step:
        watch.marks.append((training.step, time.perf_counter()))
    draws = flags.watch.draws_at(training.step, watch.steps_of_epoch, True, True)
    look(training, watch, draws, flags.watch.measures_at(training.step), accelerator)
    return mean_step_ms(watch.marks)


# 9. The end


def report_results(
    outputs: Outputs,
    log: LossLog,
    step: Callable[..., torch.Tensor],
    planned: PlannedTraining,
    budget: DeviceBudget | None,
    reports: list[StageReport],
    ms_a_step: float | None,
) -> RunResults:
    """What the run came to; prints its peak beside the plan's."""
    measured = measured_peak(budget, reports, planned.plan.forecast.peak_bytes)
    carried_out = planned.execution.carried_out(step if isinstance(step, CapturedCall) else None).to_dict()
    loss, skipped = log.recent_mean, log.skipped
    return RunResults(
        str(outputs.trained_path), reports, measured, planned.steps, ms_a_step, carried_out, loss, skipped
    )


def finish(outputs: Outputs, flags: TrainingFlags, results: RunResults) -> None:
    """Writes the card, `run.json`, `pictures.json` and the report, and prints the command that draws with the LoRA."""
    embedding = f" and {EMBEDDING_FILE}" if flags.identifier.word is not None else ""
    print(f"wrote {results.wrote}{embedding}, read back and compared")
    if results.ms_a_step is not None:
        print(f"{results.ms_a_step:.0f} ms a step, {counted(results.skipped or 0, 'step')} skipped by the scaler")
    record = outputs.record
    outputs.remove_report()
    write_model_card(outputs.folder / "README.md", record, results)
    write_pictures(outputs.folder, record.identity.pictures)
    record.save(outputs.folder / RECORD, results)  # last but for the report: with it the run is finished
    report(outputs)
    print(*next_commands(outputs, flags), sep="\n")


def report(outputs: Outputs) -> None:
    """Writes `report.html` into the output folder. A failure costs a sentence: the LoRA is written."""
    try:
        from sd3_lora.reporting.page import write_report  # a template engine that nothing else here needs

        print(f"wrote {write_report(outputs.folder)}: open it in a browser")
    except Exception as error:  # whatever it is: the run is done
        print(f"note: the report was not written ({first_line(error)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    smaller = "a lower --vram_budget_gib, --mixed_precision fp16, a lower --train_batch_size or --resolution"
    return exit_code(run, argv, smaller)


if __name__ == "__main__":
    sys.exit(main())
