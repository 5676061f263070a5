"""What a command that resumes a run would change in it, in sentences that name the flags to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, counted, quoted
from sd3_lora.common.run_record import NotedPicture, RunRecord
from sd3_lora.training.checkpoints import read_pictures
from sd3_lora.transformer.lora import LORA_FILE, read_lora_record


@dataclass(frozen=True)
class RunChange:
    """One change.

    Attributes:
        before: how the checkpoint was trained, to follow "was trained".
        remedy: what to do to go on.
    """

    before: str
    remedy: str


PICTURES, MASKS, TRANSFORMER, BATCH, PRECISION, PRIOR_PROMPTS = (
    "the pictures and captions",
    "the masks",
    "the transformer",
    "a global batch of",
    "the precision",
    "the prior prompts",
)
# What made stage one's artefacts, and the model's noise levels. Checkpoints of earlier builds do not note these.
TEXT_ENCODERS, VAE, NOISE_LEVELS, FIRST_LORA, ROTATION, BRIGHTNESS = (
    "the text encoders",
    "the VAE",
    "the noise levels",
    "the LoRA to begin with",
    "the cached --rotation_degrees",
    "the cached --brightness_range",
)
_OF_THEN = {
    TEXT_ENCODERS: RunChange(
        "on embeddings of other text encoders",
        "give the model of then as --pretrained_model_name_or_path, and its embeddings as --data_df_path",
    ),
    VAE: RunChange(
        "on latents of another VAE",
        "give the model of then as --pretrained_model_name_or_path, and its latents as --latents_path",
    ),
    NOISE_LEVELS: RunChange(
        "with other noise levels than the model's scheduler/scheduler_config.json has now",
        "put back that file",
    ),
    FIRST_LORA: RunChange(
        "from another LoRA than --init_lora now is",
        "put back that file, or take it away, since the checkpoint has all that came of it,",
    ),
}
_OF_LATENTS = ("--vae_precision", "--alpha_background", ROTATION, BRIGHTNESS)
_PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
_MOST_NAMES = 5


def require_same_run(saved: Mapping[str, Any], record: RunRecord, folder: Path) -> None:
    """Checks that the run's identity is unchanged.

    A flag that the checkpoint's build did not have had its default. A flag that only a newer build has is refused
    whatever its value, since its effect on the numbers is not known here.

    Args:
        saved: flag or noun → value, of the checkpoint.
        record: of this command.
        folder: the checkpoint's.

    Raises:
        UserError: some differ, or one is unknown; says how to go on.
    """
    identity = record.identity
    for name, value in identity.unknown(saved):
        raise UserError(
            f"{folder} was trained {_as_typed(name, value)}, which this build does not know: resume it with the newer "
            "build that wrote it, or give another --output_dir for a new run"
        )
    differences = {name: (before, now) for name, before, now in identity.changed(saved)}
    if not differences:
        return
    noted = read_pictures(folder)
    same_captions = noted is None or _captions(noted) == _captions(identity.pictures)
    if same_captions and not differences.keys().isdisjoint(("--resolution", "--use_aspect_ratio_bucket")):
        differences.pop(PICTURES, None)  # the crops follow from it
    if not differences.keys().isdisjoint((PICTURES, "--resolution", "--masked_loss")):
        differences.pop(MASKS, None)  # likewise
    if "--timestep_shift" in differences:
        differences.pop(NOISE_LEVELS, None)  # likewise
    for name in (ROTATION, BRIGHTNESS):
        if None in differences.get(name, ()):
            differences.pop(name)  # follows from --num_augmented
    if "--init_lora" in differences and None not in differences["--init_lora"]:
        same_lora = saved.get(FIRST_LORA) and FIRST_LORA not in differences
        differences.pop("--init_lora" if same_lora else FIRST_LORA, None)  # one file may have several names
    elif None in differences.get(FIRST_LORA, ()):
        differences.pop(FIRST_LORA)  # it is gone since, or --init_lora says so
    if not differences:
        return
    if differences.get("--rank") == differences.get("--lora_alpha"):
        differences.pop("--lora_alpha", None)  # its default is the rank
    if "--prior_term" in differences:  # what follows from it
        differences.pop(PRIOR_PROMPTS, None)
        if differences["--prior_term"][0] is None:
            differences.pop("--prior_term_weight", None)
            differences.pop("--prior_share", None)
    changes = [
        _pictures_change(noted, identity.pictures)
        if name == PICTURES
        else RunChange("with other masks", "put back the masks of then")
        if name == MASKS
        else _transformer_change(folder)
        if name == TRANSFORMER
        else _batch_change(before, now, record.facts.processes)
        if name == BATCH
        else _OF_THEN[name]
        if name in _OF_THEN
        else _flag_change(name, before, now)
        for name, (before, now) in differences.items()
    ]
    raise UserError(
        f"{folder} was trained {', and '.join(change.before for change in changes)}: "
        f"{', '.join(change.remedy for change in changes)} to go on, or give another --output_dir for a new run"
    )


def _as_typed(name: str, value: Any) -> str:
    """How a flag was given, or that it was not."""
    if value is None or value is False:
        return f"without {name}"
    return f"with {name if value is True else quoted([name, str(value)])}"


def _flag_change(name: str, before: Any, now: Any) -> RunChange:
    if name == "--compile":  # as `StepExecution.kernels` has it
        compiled = before == "blocks"
        return RunChange(
            f"with{'' if compiled else 'out'} compiled blocks",
            "type --compile on (which streamed or 4-bit blocks cannot have)" if compiled else "type --compile off",
        )
    if name == PRECISION:
        name, before, now = "--mixed_precision", _PRECISIONS.get(before, before), _PRECISIONS.get(now, now)
    if name == PRIOR_PROMPTS:
        return _prior_prompts_change(before, now)
    if name in _OF_LATENTS:
        return _latents_change(name.removeprefix("the cached "), before)
    if before is None or before is False:
        return RunChange(_as_typed(name, before), f"leave {name} out")
    typed = _as_typed(name, before).removeprefix("with ")
    with_other = f"with {typed}" + ("" if now is None or isinstance(now, bool) else f", not {now}")
    if name in ("--t5_precision", "--max_sequence_length"):  # the file decides
        return RunChange(
            f"on embeddings made {with_other}", f"type `python compute_embeddings.py` with the flags of then, {typed}"
        )
    return RunChange(with_other, f"type {typed}")


def _latents_change(flag: str, before: Any) -> RunChange:
    """Latents that were made anew with another value of a flag."""
    typed = quoted([flag, str(before)])
    return RunChange(
        f"on latents made with {typed}",
        f"type `python precompute_latents.py` with the flags of then, {typed} --overwrite",
    )


def _prior_prompts_change(before: Sequence[str], now: Sequence[str]) -> RunChange:
    """Which prompts a prior term had; both have some, since the term is another difference."""
    here, other = (f"{prompts[0]!r}{_and_more(prompts)}" for prompts in (before, now))
    remedy = "--prior_prompts_file" if len(before) > 1 else quoted(["--class_prompt", before[0]])
    return RunChange(
        f"with the prior prompt{'s' if len(before) > 1 else ''} {here}, not {other}",
        f"give those of then as {remedy}" if len(before) > 1 else f"type {remedy} without --prior_prompts_file",
    )


def _and_more(prompts: Sequence[str]) -> str:
    return f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""


def _batch_change(before: int, now: int, processes: int) -> RunChange:
    share, rest = divmod(before, processes)
    return RunChange(
        f"with {counted(before, 'picture')} in a micro-batch of all processes, not {now}",
        f"start as many processes as {before} can be divided by"
        if rest
        else f"type --train_batch_size {share}" + (f" with {processes} processes" if processes > 1 else ""),
    )


def _transformer_change(folder: Path) -> RunChange:
    path = folder / LORA_FILE
    made_with = read_lora_record(path) if path.is_file() else {}
    model, revision = made_with.get("base_model"), made_with.get("revision")
    if not model:
        return RunChange("on another transformer", "give that one as --pretrained_model_name_or_path")
    if not revision:
        return RunChange(
            f"on other weights of the transformer than this command's (its model was {model})",
            "give those as --pretrained_model_name_or_path",
        )
    return RunChange(
        f"on the transformer of {model} at commit {revision}",
        f"type {quoted(['--pretrained_model_name_or_path', model, '--revision', revision])}",
    )


def _pictures_change(before: Sequence[NotedPicture] | None, now: Sequence[NotedPicture]) -> RunChange:
    """Which pictures were added, removed, or have other captions or crops."""
    if before is None:
        return RunChange(
            "on other pictures, captions or crops, of which it notes no more than a hash",
            "give those of then (--instance_data_dir, --instance_prompt, --num_crops, --center_crop, --random_flip)",
        )
    earlier, current = ({picture.image_id: picture for picture in pictures} for pictures in (before, now))
    in_both = [(earlier[key], current[key]) for key in earlier.keys() & current.keys()]
    recaptioned = [new for old, new in in_both if (old.prompt, old.other_prompts) != (new.prompt, new.other_prompts)]
    recropped = [new for old, new in in_both if old.crops != new.crops]
    repeated = [new for old, new in in_both if old.repeats != new.repeats]
    parts = {
        "without": [current[key] for key in current.keys() - earlier.keys()],
        "also on": [earlier[key] for key in earlier.keys() - current.keys()],
        "with another caption of": recaptioned,
        "on other crops of": recropped,
        "with other repeats of": repeated,
    }
    remedies = {
        "without": "take out what was added",
        "also on": "put back what was removed",
        "with another caption of": "give the captions of then (--instance_prompt, or the text files)",
        "with other repeats of": f"give the repeats of then ({_repeats_of_then(in_both)})",
        "on other crops of": "type the --num_crops, --center_crop, --random_flip, --num_augmented and --bucket_ flags "
        "of then",
    }
    changed = {how: pictures for how, pictures in parts.items() if pictures}
    return RunChange(
        ", ".join(f"{how} {_names(pictures)}" for how, pictures in changed.items())
        or "on these pictures, noted otherwise",
        ", ".join(remedies[how] for how in changed) or "give the pictures of then",
    )


def _captions(pictures: Sequence[NotedPicture]) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(picture.image_id, picture.prompt, picture.other_prompts) for picture in pictures}


def _repeats_of_then(pairs: Sequence[tuple[NotedPicture, NotedPicture]]) -> str:
    """The flag, where all pictures had the same."""
    repeats = {old.repeats for old, _ in pairs}
    return f"--repeats {repeats.pop()}" if len(repeats) == 1 else "in the concepts list or the folders' names"


def _names(pictures: Sequence[NotedPicture]) -> str:
    """Some names, and how many more there are."""
    names = sorted(picture.name for picture in pictures if picture.name)[:_MOST_NAMES]
    rest = len(pictures) - len(names)
    if not names:
        return f"{counted(rest, 'picture')}"
    return ", ".join(names) + (f" and {rest} more" if rest else "")
