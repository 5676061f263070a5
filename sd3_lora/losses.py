"""The loss of each picture at fixed noise, from stage one's files: which photo is badly captioned, or broken.

Nothing is trained, and neither the VAE nor a text encoder is loaded. It takes the flags of training that name the data
and the model; where the output folder has the `run.json` of a run, what is not typed is as in that run.

    python -m sd3_lora.losses --instance_data_dir dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from sd3_lora.common.command_line import CommandLine, UserError, less_than_one, require_right
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig, PictureFlags, missing_path
from sd3_lora.common.defaults import LORA_FOLDER
from sd3_lora.common.lean_imports import import_diffusers, import_pyarrow, start_driver
from sd3_lora.common.placement_flags import BaseFlags
from sd3_lora.training.data_flags import DataConfig


@dataclass(frozen=True)
class LossesConfig:
    """What is measured, and where it is written."""

    output_dir: str = field(
        default=LORA_FOLDER,
        metadata={"help": "Where picture_losses.json goes: a run's folder, before or after its training."},
    )
    lora: str | None = field(
        default=None, metadata={"help": "Folder, file or hub id of a LoRA to measure with. Default: the model alone."}
    )
    noise_levels: int = field(default=8, metadata={"help": "How many noise levels, spread over the model's own."})
    seed: int = field(default=0, metadata={"help": "Of the noise, which all pictures of one shape share."})
    batch_size: int = field(default=16, metadata={"help": "Rows computed together, or as many as fit."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Of the transformer. Default: fp16 on a GPU, fp32 on a CPU."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "noise_levels", "batch_size")
        if not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed} must be at least 0 and less than 2**63"
        fault = missing_path(self.lora) if self.lora else None
        if fault:
            yield f"--lora: {fault}"


COMMAND_LINE = CommandLine(
    "-m sd3_lora.losses",
    __doc__,
    (LossesConfig, DataConfig, BaseFlags, ModelConfig, DeviceConfig, BudgetConfig),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_diffusers("diffusers.training_utils")

import json
import math
import sys

from sd3_lora.common.atomic_files import remove_unfinished
from sd3_lora.common.command_line import exit_code, require_writable_folder, write_text_atomically
from sd3_lora.common.defaults import say_miniature
from sd3_lora.common.devices import choose_device, choose_training_dtype, make_deterministic, planned_device
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.progress import Progress
from sd3_lora.common.run_record import recorded_flags
from sd3_lora.common.stage_report import memory_stage
from sd3_lora.gpu.attention import attention_kernel, require_attention_kernel
from sd3_lora.gpu.budget import BudgetTooSmall, DeviceBudget, open_budget
from sd3_lora.plan.memory_plan import Plan, plan_denoising
from sd3_lora.plan.step_memory import DenoisingShape
from sd3_lora.stage_one.data_sets import with_folder
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.crops import choose_crops
from sd3_lora.training.dataset import TrainingData, require_prompts
from sd3_lora.training.flow import load_noise_table
from sd3_lora.training.picture_losses import FixedNoise, PictureLoss, measure_losses, ranked, table
from sd3_lora.training.pool import Pool
from sd3_lora.training.stage_one_request import StageOneRequest
from sd3_lora.transformer.lora_files import LoraFile, find_lora, read_lora_file, require_drawable
from sd3_lora.transformer.placement import AskedPlacement, arrange
from sd3_lora.transformer.velocity import VelocityModel

import torch
from diffusers import SD3Transformer2DModel

LOSSES_FILE = "picture_losses.json"
IDLE_FLAGS = (
    "caption_dropout",
    "clip_l_dropout",
    "clip_g_dropout",
    "t5_dropout",
    "masked_loss",
    "unmasked_weight",
    "mask_data_dir",
    "alpha_mask",
)
_Group = TypeVar("_Group", DataConfig, ModelConfig)


def as_in_run(group: _Group, output_dir: Path) -> _Group:
    """The flags, with those of the folder's run where none was typed.

    Raises:
        WrongFlags: what was typed does not go with them.
    """
    recorded = recorded_flags(output_dir / "run.json", type(group))
    typed = {f.name for f in fields(group) if getattr(group, f.name) != f.default}
    if typed & {"instance_data_dir", "concepts_list", "dataset_name"}:  # other pictures, with other captions
        recorded = {name: value for name, value in recorded.items() if not hasattr(PictureFlags, name)}
    if "pretrained_model_name_or_path" in typed:
        recorded = {}
    return replace(group, **{name: value for name, value in recorded.items() if name not in typed})


def idle_note(data: DataConfig) -> str | None:
    """Which of the flags that were typed decide how training draws and weights, and so change nothing here."""
    idle = [f"--{name}" for name in IDLE_FLAGS if getattr(data, name) != getattr(DataConfig, name)]
    if not idle:
        return None
    change = "changes" if len(idle) == 1 else "change"
    return f"note: {', '.join(idle)} {change} nothing: each loss is of the whole picture with its whole caption"


def open_data(request: StageOneRequest) -> TrainingData:
    """The subject's pictures, their captions and the empty prompt, checked as training checks them.

    Raises:
        UserError: something is missing or stale; says which command mends it.
    """
    stage_one = StageOne(request)
    store = stage_one.open_embeddings()
    cache = stage_one.open_latents()
    images = stage_one.find_images(store, cache)
    require_prompts(store, [""], request.command("compute_embeddings.py"))
    return TrainingData([Pool(images)], choose_crops(request, images, cache), store, cache)


def plan_forwards(
    files: ModelFiles, shape: DenoisingShape, budget: DeviceBudget | None, asked: AskedPlacement
) -> tuple[Plan, int]:
    """Where the weights are, and how many rows are computed together: as many as asked for, or half until they fit.

    Raises:
        UserError: not even one row fits the budget.
    """
    while True:
        try:
            return plan_denoising(files, shape, budget, asked), shape.batch_size
        except BudgetTooSmall as error:
            if shape.batch_size == 1:
                raise UserError(
                    f"the budget is too small for one picture: type --vram_budget_gib {error.needed_gib}, or "
                    "--base_precision nf4"
                ) from error
            shape = replace(shape, batch_size=shape.batch_size // 2)


def measure(
    files: ModelFiles,
    data: TrainingData,
    config: LossesConfig,
    plan: Plan,
    together: int,
    model: VelocityModel,
    device: torch.device,
) -> list[PictureLoss]:
    """Every picture's losses, the most suspicious first."""
    fixed = FixedNoise(load_noise_table(files.read_scheduler_config(), None), config.noise_levels, config.seed)
    rows = config.noise_levels * sum(len({*image.prompts, ""}) for image in data.images)
    with attention_kernel(plan.placement.attention_kernel), Progress(total=rows, desc="losses", unit="row") as bar:
        return ranked(measure_losses(model, data, fixed, files.read_config("vae"), device, together, bar.update))


def load_model(
    files: ModelFiles, plan: Plan, data: TrainingData, lora: LoraFile | None, dtype: torch.dtype, device: torch.device
) -> VelocityModel:
    """The frozen transformer, with the LoRA if there is one."""

    def add_lora(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
        if lora:
            lora.attach(transformer, "lora")
        return []

    side = max(size.longer_side for size in data.sizes) // files.latent_channels_and_scale()[1]
    arranged = arrange(files, plan.placement, device, dtype, (side, side), add_lora)
    return VelocityModel(arranged.transformer, dtype).eval()


def write(losses: Sequence[PictureLoss], path: Path, config: LossesConfig, files: ModelFiles) -> None:
    """Writes the file."""
    made_with = {"model": files.name, "revision": files.revision, **asdict(config)}
    lines = json.dumps({**made_with, "pictures": [each.to_dict() for each in losses]}, indent=2, ensure_ascii=False)
    remove_unfinished(path.parent, path.name)
    write_text_atomically(path, lines + "\n")


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    config, data_config, base, model_config, device_config, budget_config = COMMAND_LINE.parse(argv)
    output_dir, note = Path(config.output_dir), idle_note(data_config)
    data_config, model_config = as_in_run(data_config, output_dir), as_in_run(model_config, output_dir)
    if model_config.is_miniature:
        say_miniature("sd3_lora.losses")
    if note:
        print(note)
    device = choose_device(device_config.device, model_config)
    if device_config.must_be_deterministic:
        make_deterministic()
    budget = open_budget(budget_config, device)
    files = ModelFiles(model_config)
    transformer = files.read_config("transformer")
    asked = AskedPlacement.of(base, None, transformer["num_layers"])
    asked.check(transformer["num_layers"])
    lora = read_lora_file(find_lora(config.lora), transformer) if config.lora else None
    if lora and lora.identifier is not None:
        raise UserError(
            f"{lora.path} was trained with an embedding of {lora.identifier!r}, which this command does not read: give "
            "a LoRA without one"
        )
    chosen = choose_training_dtype(
        config.mixed_precision, planned_device(device_config.device, device, budget_config.plan)
    )
    resolution = files.resolution(data_config.resolution)
    data_config = with_folder(data_config, model_config.cache_dir)
    data = open_data(StageOneRequest(data_config, model_config, files, resolution, device_config.device))

    scale = files.latent_channels_and_scale()[1]
    latent_size = max((size.latent(scale) for size in data.sizes), key=math.prod)
    text_tokens = files.clip_tokens() + data.text.size
    shape = DenoisingShape(config.batch_size, latent_size, text_tokens, chosen.dtype, lora.device_bytes if lora else 0)
    plan, together = plan_forwards(files, shape, budget, asked)
    print(f"transformer in {chosen.reason}, {plan.base_sentence()}; {together} rows together")
    if budget:
        print(f"predicted peak: {plan.forecast.largest.sentence()}")
    if budget_config.plan:
        return
    if lora:
        require_drawable([lora], [1.0], bool(plan.placement.streamed))
    require_attention_kernel(plan.placement.attention_kernel, device, chosen.dtype, transformer["attention_head_dim"])
    files.component("transformer")
    require_writable_folder(output_dir)
    if budget:
        budget.cap()
    with memory_stage("measure", device, []):
        model = load_model(files, plan, data, lora, chosen.dtype, device)
        losses = measure(files, data, config, plan, together, model, device)
        del model
    path = output_dir / LOSSES_FILE
    write(losses, path, config, files)
    suspicions = [line for each in losses for line in each.suspicions()]
    print("\n".join([*table(losses), *(suspicions or ["no picture stands out"]), f"wrote {path}"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv, "a lower --batch_size or --vram_budget_gib, or --mixed_precision fp16")


if __name__ == "__main__":
    sys.exit(main())
