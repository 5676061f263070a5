"""Stage two: cached embeddings and latents → LoRA.

Only the transformer is loaded, frozen, and only its LoRA is trained; neither the VAE nor a text encoder is ever in
memory here.

    python train_dreambooth_sd3_lora_miniature.py --instance_data_dir dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, exit_code, parse_flags, require_writable_folder
from sd3_lora.common.defaults import say_miniature
from sd3_lora.common.devices import DTYPES, DeviceConfig, choose_device, choose_training_dtype, planned_device
from sd3_lora.common.model_files import ModelConfig, ModelFiles, library_versions
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunIdentity, RunRecord, RunResults, flag_defaults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.gpu.budget import BudgetConfig, DeviceBudget, compared, open_budget, sentence
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.plan.memory_plan import CLIP_TOKENS, TrainingPlan, plain_plan, plan_training
from sd3_lora.plan.step_execution import StepExecution, choose_execution, compile_blocks
from sd3_lora.plan.step_memory import StepShape
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.checkpoints import checkpoint_folders, find_checkpoint, read_state
from sd3_lora.training.config import (
    REFUSED_FLAGS,
    DataConfig,
    LoraFlags,
    OptimizerConfig,
    RunConfig,
    TrainingFlags,
)
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.draws import DataOrder, GlobalDraws
from sd3_lora.training.flow import FlowConfig, flow_matching_loss, interpolate
from sd3_lora.training.loss_log import READ_EVERY, LossLog, PendingStep
from sd3_lora.training.micro_batches import MicroBatches, StepInputs
from sd3_lora.training.model_card import write_model_card
from sd3_lora.training.optimizer import flatten_parameters, make_optimizer, optimizer_step
from sd3_lora.training.state import Outputs, Training
from sd3_lora.training.trackers import start_trackers
from sd3_lora.transformer.base_weights import load_transformer
from sd3_lora.transformer.lora import LORA_FILE, attach_lora, target_modules
from sd3_lora.transformer.mapped_pieces import MappedPieces
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import PinnedPieces, pieces_of, stream_transformer

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

SCRIPT = "train_dreambooth_sd3_lora_miniature.py"


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """What the transformer is called in."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def micro_step(model: torch.nn.Module, inputs: StepInputs, flow: FlowConfig, dtype: torch.dtype) -> torch.Tensor:
    """The loss of one micro-batch, a float32 scalar."""
    noisy_latents = interpolate(inputs.latents, inputs.noise, inputs.sigmas)
    with precision(inputs.latents.device, dtype):
        velocity = model(
            hidden_states=noisy_latents.to(dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=inputs.prompt_embeds,
            pooled_projections=inputs.pooled_prompt_embeds,
            return_dict=False,
        )[0]
    return flow_matching_loss(velocity, inputs.latents, inputs.noise, inputs.sigmas, inputs.loss_weights, flow)


def resume_point(run: RunConfig, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: there is none of that name, or there are checkpoints that a new run would mix with its own.
    """
    if run.resume_from_checkpoint is not None:
        return find_checkpoint(run.resume_from_checkpoint, output_dir)
    earlier = checkpoint_folders(output_dir)
    if earlier:
        raise UserError(
            f"{output_dir} holds {earlier[-1].name} of an earlier run: add --resume_from_checkpoint latest to go on, "
            "or give another --output_dir"
        )
    return None


def run_facts(
    flags: TrainingFlags,
    stage_one: StageOne,
    data: TrainingData,
    plan: TrainingPlan,
    precision: str,
    seed: int,
    processes: int,
) -> RunFacts:
    """What the run works on, and how, before its first step."""
    prompts = tuple(dict.fromkeys(image.prompt for image in data.images))
    return RunFacts(
        model=stage_one.files.name,
        revision=stage_one.files.revision,
        versions=library_versions(),
        precision=precision,
        processes=processes,
        plan=asdict(plan),
        predicted_parts=plan.parts,
        prompts=prompts[:MOST_PROMPTS],
        trigger=flags.data.instance_prompt or prompts[0],
        resolution=stage_one.resolution,
        max_sequence_length=data.text.size,
        seed=seed,
    )


def run_identity(
    flags: TrainingFlags, facts: RunFacts, stage_one: StageOne, data: TrainingData, kernels: str
) -> RunIdentity:
    """What decides the numbers of a run, and so must not change when it is resumed."""
    pictures = [(image.image_id, image.prompt, data.variants[image.image_id]) for image in data.images]
    numbers = {**asdict(flags.lora), **asdict(flags.optimizer), **asdict(flags.flow)}
    values = {
        "the transformer": stage_one.files.provenance(["transformer"], "", 0).identity,
        "the pictures and captions": hashlib.sha256(repr(pictures).encode()).hexdigest()[:12],
        "--resolution": facts.resolution,
        "--max_sequence_length": facts.max_sequence_length,
        "--t5_precision": data.text.precision,
        **{f"--{name}": value for name, value in numbers.items()},
        "--lora_alpha": flags.lora.alpha,
        "--gradient_accumulation_steps": flags.run.gradient_accumulation_steps,
        "a global batch of": flags.run.train_batch_size * facts.processes,
        "the precision": str(DTYPES[facts.precision]).removeprefix("torch."),
        "--base_precision": facts.plan["base_precision"] or "16bit",
        "--compile": kernels,
        "--seed": facts.seed,
    }
    return RunIdentity(values, flag_defaults(type(group) for group in flags.groups()))


def train(
    training: Training,
    data: TrainingData,
    stage_one: StageOne,
    flags: TrainingFlags,
    steps: int,
    dtype: torch.dtype,
    execution: StepExecution,
    log: LossLog,
    outputs: Outputs,
    accelerator: Accelerator,
) -> tuple[float, StepExecution]:
    """The loop: whole windows of micro-batches, one optimizer step each, never more than `steps`.

    Returns the milliseconds of a step, without the first ones where there are more: those load, record and compile.
    And how micro-steps were carried out: what could not be captured or compiled ran as it was.

    The host runs ahead of the device: it draws the next micro-batch while the device computes (two, where modulations
    are computed ahead), and learns one step late whether the scaler skipped a step.
    """
    run, flow, ahead = flags.run, flags.flow, training.ahead
    model, flat, window = training.transformer.train(), training.flat, run.gradient_accumulation_steps
    batches = MicroBatches(training, data, stage_one, flow, dtype, accelerator.device)

    def compute(*inputs: torch.Tensor) -> torch.Tensor:
        with ahead.active() if ahead else nullcontext():
            loss = micro_step(model, StepInputs(*inputs), flow, dtype)
            training.scaler.scale(loss / window).backward()
        return loss.detach()

    step: Callable[..., torch.Tensor] = compute
    captured: CapturedCall | None = None
    if execution.captured:
        step = captured = CapturedCall(compute, flat.device, [flat.grad], execution.asked, accelerator.print)
    queued: PendingStep | None = None
    marks = [(training.step, time.perf_counter())]  # when the device was through with how many steps

    def finish_queued() -> None:
        """Takes note of the step that was queued last."""
        if queued is not None:
            if not queued.skipped:
                training.lr_scheduler.step()
            log.add(queued)

    # Closed by `with` on an error too, so that its sentence stands on a line of its own.
    with tqdm(initial=training.step, total=steps, desc="steps", disable=not accelerator.is_local_main_process) as bar:
        while training.step < steps:
            training.step += 1
            at_end = training.step == steps
            # Nothing is drawn past a checkpoint, which is to say where the draws stand.
            steps_to_save = min(steps - training.step, -training.step % run.checkpointing_steps)
            at_checkpoint = steps_to_save == 0 and not at_end
            losses, seen = [], []
            for index in range(window):
                left = window * (steps_to_save + 1) - index
                batches.draw_ahead(left)
                inputs, names, coming = batches.take()
                if ahead:
                    with precision(accelerator.device, dtype):
                        ahead.advance(inputs.modulating, coming.modulating if coming else None)
                losses.append(step(*inputs))
                seen += names
                batches.draw_ahead(left - 1)  # while the device computes
            finish_queued()
            if accelerator.num_processes > 1:  # a LoRA's gradients are a few megabytes, once a window
                flat.grad.copy_(accelerator.reduce(flat.grad, "mean"))
            learning_rate = training.lr_scheduler.get_last_lr()[0]
            norm, skipped = optimizer_step(flat, training.optimizer, training.scaler, flags.optimizer.max_grad_norm)
            pictures = ", ".join(dict.fromkeys(seen))
            queued = PendingStep(training.step, torch.stack(losses).mean(), norm, learning_rate, skipped, pictures)
            bar.update()
            if training.step % READ_EVERY == 0 or at_checkpoint or at_end:
                finish_queued()
                queued = None
                for line in log.read():
                    accelerator.log({"loss": line.loss, "learning_rate": line.learning_rate}, step=line.step)
                bar.set_postfix_str(f"loss {log.recent_mean:.4f}")
                marks.append((training.step, time.perf_counter()))
            if at_checkpoint:
                outputs.save_checkpoint(training, accelerator)
    (first_step, first_s), (last_step, last_s) = marks[1 if len(marks) > 2 else 0], marks[-1]
    return 1000 * (last_s - first_s) / (last_step - first_step), execution.in_force(captured)


def start_accelerator(device: torch.device, run: RunConfig, output_dir: Path) -> Accelerator:
    """The processes and their devices; precision is not left to it, so that the LoRA is float32 whatever it says."""
    return Accelerator(
        mixed_precision="no",
        cpu=device.type == "cpu",
        log_with=start_trackers(run.trackers) or None,
        project_dir=output_dir / run.logging_dir,
    )


def load_training(
    stage_one: StageOne,
    flags: TrainingFlags,
    plan: TrainingPlan,
    dtype: torch.dtype,
    seed: int,
    pictures: int,
    accelerator: Accelerator,
) -> tuple[Training, int]:
    """The frozen transformer with a new LoRA and all that trains it; and how many steps to take."""
    files, lora, run = stage_one.files, flags.lora, flags.run
    device, processes = accelerator.device, accelerator.num_processes
    latent_side = stage_one.resolution // files.latent_channels_and_scale()[1]
    latent_size = (latent_side, latent_side)
    transformer = load_transformer(files, device, dtype, plan.base_precision, latent_size, plan.streamed_blocks)
    targets = target_modules(transformer, lora.layers, lora.blocks)
    parameters = attach_lora(transformer, targets, lora.rank, lora.alpha, lora.lora_dropout, seed)
    ahead = None
    if plan.streamed:
        pieces = pieces_of(transformer.transformer_blocks, plan.streamed_blocks)
        paths = files.weight_files("transformer") if plan.leaves_blocks_unread else []
        source = MappedPieces(pieces, device, paths) if plan.from_files else PinnedPieces(pieces, device, paths)
        streamed = stream_transformer(transformer, device, source, plan.buffers, plan.streamed_blocks)
        if plan.modulated_ahead:
            ahead = ModulationsAhead(transformer, streamed, plan.modulated_ahead)
    recompute_blocks(transformer, plan.recomputed, plan.offload_inputs)
    flat = flatten_parameters(parameters)
    steps = run.steps(pictures, processes)
    pictures_per_step = run.train_batch_size * run.gradient_accumulation_steps * processes
    optimizer, lr_scheduler = make_optimizer(flags.optimizer, flat, pictures_per_step, steps)
    torch.manual_seed(seed + accelerator.process_index)  # each rank drops out other elements
    training = Training(
        transformer,
        flat,
        optimizer,
        lr_scheduler,
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        GlobalDraws(seed, run.train_batch_size, accelerator.process_index, processes),
        DataOrder(pictures, seed),
        ahead,
    )
    accelerator.print(
        f"LoRA: {flat.numel() / 1e6:.2f} M parameters in float32 in {len(targets)} layers, rank {lora.rank}"
    )
    return training, steps


def make_plan(
    flags: TrainingFlags,
    files: ModelFiles,
    resolution: int,
    text_tokens: int,
    dtype: torch.dtype,
    budget: DeviceBudget | None,
    processes: int,
) -> TrainingPlan:
    """What is kept where: whatever fits the budget, or all on the device where there is none."""
    run, lora = flags.run, flags.lora
    if budget is None:
        return plain_plan(
            files.read_config("transformer")["num_layers"], run.base_precision, run.gradient_checkpointing
        )
    shape = StepShape(
        run.train_batch_size,
        resolution // files.latent_channels_and_scale()[1],
        text_tokens,
        lora.layers,
        lora.blocks,
        lora.rank,
        lora.lora_dropout,
        dtype,
        flags.optimizer.use_8bit_adam,
    )
    plan = [plan_training(files, shape, budget, run.base_precision, run.gradient_checkpointing, processes == 1)]
    broadcast_object_list(plan)  # by the first rank's GPU: all are to compute with the same numbers
    return plan[0]


def text_tokens_of(data: DataConfig) -> int:
    """The tokens of a prompt, before anything else of the data is looked at: as asked for, as embedded, or 77 + 77."""
    length = data.max_sequence_length
    if length is None and Path(data.data_df_path).is_file():
        with EmbeddingStore(Path(data.data_df_path)) as store:
            length = store.provenance.size
    return CLIP_TOKENS + (length or 77)


def choose_seed(run: RunConfig, earlier: dict[str, Any], accelerator: Accelerator) -> int:
    """The seed as given (0 is one too), as noted in the checkpoint, or drawn; the same on every rank."""
    drawn = [run.seed]
    if run.seed is None:
        drawn = [earlier.get("--seed", random.randrange(2**31))]
        broadcast_object_list(drawn)
    return int(drawn[0])


def open_data(stage_one: StageOne, output_dir: Path, accelerator: Accelerator) -> TrainingData:
    """What stage one left, checked against what is asked for; latents that are not there yet are made."""
    store = stage_one.open_embeddings()
    require_writable_folder(output_dir)
    if accelerator.is_main_process and not stage_one.has_latents():
        stage_one.make_latents()
    accelerator.wait_for_everyone()
    cache = stage_one.open_latents()
    images = stage_one.find_images(store, cache)
    return TrainingData(images, stage_one.variants(images, cache), store, cache)


def finish(outputs: Outputs, model: ModelConfig, results: RunResults) -> None:
    """Writes what lies beside the LoRA, and says what to do with it."""
    record = outputs.record
    write_model_card(outputs.folder / "README.md", record, results.steps or 0)
    record.save(outputs.folder / "run.json", results)
    prompt = record.facts.trigger or ""
    if len(record.facts.prompts or ()) == 1:  # a caption says already where its picture was taken
        prompt += " in a forest"
    print("next: " + command("inference.py", **model.flags(), lora=outputs.folder, prompt=prompt))


def run(argv: Sequence[str] | None) -> None:
    """The stage from top to bottom."""
    groups = (DataConfig, LoraFlags, OptimizerConfig, RunConfig, FlowConfig, ModelConfig, DeviceConfig, BudgetConfig)
    flags = TrainingFlags(*parse_flags(groups, argv, SCRIPT, __doc__.splitlines()[0], REFUSED_FLAGS))
    output_dir = Path(flags.run.output_dir)
    accelerator = start_accelerator(choose_device(flags.device.device), flags.run, output_dir)
    device, say = accelerator.device, accelerator.print
    if flags.model.is_miniature and accelerator.is_main_process:
        say_miniature(SCRIPT)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # accelerate launch writes "no" where nobody said so
    asked = flags.run.mixed_precision or (launched if launched in ("fp16", "bf16") else None)
    chosen = choose_training_dtype(asked, planned_device(flags.device.device, device, flags.budget.plan))
    say(f"transformer in {chosen.reason}; LoRA and optimizer in float32; {accelerator.num_processes} process(es)")
    if flags.run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    files = ModelFiles(flags.model)
    resolution = files.resolution(flags.data.resolution)
    budget = open_budget(flags.budget, device)
    tokens = text_tokens_of(flags.data)
    plan = make_plan(flags, files, resolution, tokens, chosen.dtype, budget, accelerator.num_processes)
    if budget:
        say(f"plan: {plan.sentence()}\npredicted peak: {sentence(plan.parts)}")
    if flags.budget.plan:
        return
    checkpoint = resume_point(flags.run, output_dir)
    stage_one = StageOne(flags.data, flags.model, files, resolution, flags.device.device)
    data = open_data(stage_one, output_dir, accelerator)
    state = read_state(checkpoint) if checkpoint else {"signature": {}}
    earlier = state["signature"]
    seed = choose_seed(flags.run, earlier, accelerator)
    say(f"{len(data)} pictures at {resolution} px, seed {seed}")

    if budget:
        budget.cap()
    reports: list[StageReport] = []
    with memory_stage("load transformer", device, reports, say):
        training, steps = load_training(stage_one, flags, plan, chosen.dtype, seed, len(data), accelerator)
    micro_steps = steps * flags.run.gradient_accumulation_steps
    execution = choose_execution(
        flags.run.compile, plan, device, flags.lora.lora_dropout, micro_steps, earlier.get("--compile")
    )
    if execution.compiled:
        compile_blocks(training.transformer, execution.asked)
    say(f"each micro-step: {execution.sentence()}")
    facts = run_facts(flags, stage_one, data, plan, chosen.name, seed, accelerator.num_processes)
    record = RunRecord(flags.groups(), facts, run_identity(flags, facts, stage_one, data, execution.kernels))
    outputs = Outputs(output_dir, flags.lora, record, flags.run.checkpoints_total_limit)
    if checkpoint:
        outputs.load_checkpoint(checkpoint, state, training, accelerator)
        say(f"resumed from {checkpoint}: step {training.step} of {steps}")
        if training.step >= steps:
            say(f"nothing to do: {steps} steps were asked for; a larger --max_train_steps goes on from here")
            if accelerator.is_main_process and not (output_dir / LORA_FILE).is_file():
                say(f"wrote {outputs.save_lora(training, output_dir)}, as it is at step {training.step}")
            accelerator.end_training()
            return
    log_path = output_dir / "losses.jsonl" if accelerator.is_main_process else None
    log = LossLog(log_path, lambda losses: accelerator.reduce(losses, "mean"), chosen.name)
    log.cut_back(training.step)
    accelerator.init_trackers("sd3-dreambooth-lora", {"rank": flags.lora.rank, "steps": steps, "seed": seed})

    with memory_stage("train", device, reports, say):
        ms_a_step, execution = train(
            training, data, stage_one, flags, steps, chosen.dtype, execution, log, outputs, accelerator
        )
    if accelerator.is_main_process:
        path = outputs.save_lora(training, output_dir)  # first of all: nothing after this can lose it
    outputs.save_checkpoint(training, accelerator)
    if accelerator.is_main_process:
        measured = budget.used_bytes(reports) if budget else 0
        if budget:
            say(compared(plan.peak_bytes, measured))
        say(f"wrote {path}, read back and compared")
        say(f"{ms_a_step:.0f} ms a step, {log.skipped} steps skipped by the scaler")
        results = RunResults(
            wrote=str(path),
            stages=reports,
            measured_bytes=measured,
            steps=training.step,
            ms_a_step=ms_a_step,
            execution=asdict(execution),
            loss=log.recent_mean,
            skipped=log.skipped,
        )
        finish(outputs, flags.model, results)
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    smaller = "--gradient_checkpointing, --mixed_precision fp16, a lower --train_batch_size or --resolution"
    return exit_code(run, argv, smaller)


if __name__ == "__main__":
    sys.exit(main())
