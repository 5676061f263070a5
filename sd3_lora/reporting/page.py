"""The report as one HTML file: Jinja2 fills `page.html`, and Observable Plot draws the charts in the browser.

Nothing of it comes from a network, and the page's own policy (CSP) lets nothing be asked of one. Text of the user's is
escaped by Jinja2; the charts' numbers are JSON in which `<`, `>` and `&` are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import remove_unfinished
from sd3_lora.common.command_line import UserError, first_line, write_atomically
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.durations import duration
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.reporting.loss_curves import LEVELS, losses_by_level, smoothed, thinned, window_of
from sd3_lora.reporting.memory_timeline import MemoryTimeline, memory_timeline
from sd3_lora.reporting.run_folder import RunFolder, read_run
from sd3_lora.reporting.settings import Setting, commands, shown_value, training_settings
from sd3_lora.reporting.thumbnails import drawn_columns, instance_pictures, shown_pictures
from sd3_lora.stage_one.crop_boxes import size_of_variant
from sd3_lora.stage_one.prompts import PromptTokens, tokens_of
from sd3_lora.training.checkpoints import REPORT_FILE

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

MOST_CAPTIONS = 60  # rows of the table
MOST_ROWS = 25  # of a chart's table
_LIBRARIES = ("vendored/d3.min.js", "vendored/plot.umd.min.js")
_SHOWN_KEYS = ("model", "precision", "plan", "execution", "versions", "revision")  # a record may lack any


@dataclass(frozen=True)
class PromptRow:
    """A prompt, what it is for, and its tokens.

    Attributes:
        prompt: as it was embedded.
        uses: such as "3 pictures".
        tokens: None where the model's tokenizers are not here.
    """

    prompt: str
    uses: str
    tokens: PromptTokens | None


def write_report(folder: Path) -> Path:
    """Reads a run's folder and writes `report.html` into it, atomically; returns its path.

    Raises:
        UserError: there is nothing of a run.
        OSError: it cannot be written.
    """
    path = folder / REPORT_FILE
    remove_unfinished(folder, path.name)
    write_atomically(path, render(read_run(folder)).encode())
    return path


def render(run: RunFolder) -> str:
    """The page."""
    return _template().render(**contents(run))


@lru_cache(1)
def _template() -> Template:
    """`page.html` with its style and scripts."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # in their order, not in the alphabet's
    environment.filters |= {"duration": duration, "gib": gib, "shown": shown_value, "loss": _loss}
    environment.filters |= {"changed": _changed, "breakable": _breakable}
    scripts = [Markup(_asset(name).replace("</script", "<\\/script")) for name in (*_LIBRARIES, "page.js")]
    environment.globals |= {"style": Markup(_asset("page.css")), "scripts": scripts, "rows": _rows}
    environment.globals |= {"hashes": [_csp_hash(script) for script in scripts]}
    return environment.from_string(_asset("page.html"))


def contents(run: RunFolder) -> dict[str, Any]:
    """All that the template shows."""
    timeline = memory_timeline(run)
    columns = drawn_columns(run.step_folders)
    prompts, tokens_note = prompt_rows(run)
    pictures = shown_pictures(run)
    return {
        "run": run,
        "record": {**dict.fromkeys(_SHOWN_KEYS), **run.training.values},
        "record_is_noted": bool(run.training.values),
        "title": run.training.values.get("trigger") or run.folder.resolve().name,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "tiles": list(tiles(run, timeline)),
        "columns": columns,
        "by_prompt": _by_prompt(columns),
        "drawn_steps": sorted({step for column in columns for step in column.uris}),
        "lora_names": {step: [path.name for path in paths] for step, paths in run.loras.items()},
        "timeline": timeline,
        "pictures": pictures,
        "has_masks": any(crop.masked is not None for each in pictures for crop in each.crops),
        "picture_count": len(instance_pictures(run)),
        "buckets": _buckets(run),
        "prompts": prompts[:MOST_CAPTIONS],
        "more_prompts": max(0, len(prompts) - MOST_CAPTIONS),
        "tokens_note": tokens_note,
        "t5_limit": run.training.values.get("max_sequence_length") or run.value("max_sequence_length") or "?",
        "settings": training_settings(run),
        "commands": commands(run),
        "data": chart_data(run, timeline),
        "levels": [f"{lower:g}–{upper:g}" for lower, upper in LEVELS],
    }


def chart_data(run: RunFolder, timeline: MemoryTimeline) -> dict[str, Any]:
    """The numbers of the charts, as plain JSON types."""
    lines, window = run.losses, window_of(len(run.losses))
    losses = [line.loss for line in lines]
    smooth, places = smoothed(losses, window), thinned(len(lines))
    return {
        "window": window,
        "together": places[0].stop if places else 1,
        "losses": [
            {
                "step": lines[place.stop - 1].step,
                "loss": sum(losses[place]) / (place.stop - place.start),
                "smooth": smooth[(place.start + place.stop - 1) // 2],
                "rate": lines[place.stop - 1].learning_rate,
            }
            for place in places
        ],
        "levels": [asdict(span) for span in losses_by_level(lines)],
        "warning": [asdict(each) for each in run.measurements],
        "bars": [asdict(bar) for bar in timeline.bars],
        "spans": [asdict(span) for span in timeline.spans],
        "loras": {str(step): [path.name for path in paths] for step, paths in run.loras.items()},
    }


def tiles(run: RunFolder, timeline: MemoryTimeline) -> Iterator[tuple[str, str, str]]:
    """The figures at the top: what, its value, and a word on it."""
    record, planned = run.training.values, run.planned_steps
    if run.has_ended:
        yield "steps", f"{run.steps:,}", ""
    else:
        of = f" of {planned:,}" if planned and planned > run.steps else ""
        yield "steps", f"{run.steps:,}{of}", "going on, or interrupted"
    if run.losses:
        reach = min(50, len(run.losses))  # as in `run.json`
        mean = sum(line.loss for line in run.losses[-reach:]) / reach
        yield "loss", f"{mean:.4f}", f"mean of the last {reach} steps"
    if timeline.elapsed_s and run.has_ended:
        per_step = record.get("ms_a_step")
        yield "time", duration(timeline.elapsed_s), f"{per_step:,.0f} ms a step" if per_step else ""
    training = timeline.spans[-1] if timeline.spans else None
    if training and training.measured_gib:
        off = f"{gib(training.planned_gib)} planned" if training.planned_gib else ""
        yield "GPU memory", gib(training.measured_gib), off
    if training and training.host_gib:
        yield "host memory", gib(training.host_gib), "peak of training"
    if run.pictures is not None:
        yield "pictures", str(len(instance_pictures(run))), _rest(run)


def _rest(run: RunFolder) -> str:
    others = len(run.pictures or ()) - len(instance_pictures(run))
    return f"and {others} of the class" if others else ""


def prompt_rows(run: RunFolder) -> tuple[list[PromptRow], str]:
    """The captions of the pictures and the other prompts, with their tokens; and why these lack, if they do."""
    uses = dict[str, list[str]]()
    pictures = instance_pictures(run)
    captions = Counter(prompt for picture in pictures for prompt in (picture.prompt, *picture.other_prompts))
    for prompt, count in captions.items():
        uses.setdefault(prompt, []).append(f"{count} picture{'' if count == 1 else 's'}")
    embedded = [record.flags for record in run.earlier if record.script == "compute_embeddings.py"]
    others = {
        "class": [run.value("class_prompt"), *(flags.get("class_prompt") for flags in embedded)],
        "validation": run.value("validation_prompt") or (),
        "negative": [run.value("validation_negative_prompt")],
    }
    for use, named in others.items():
        for prompt in dict.fromkeys(prompt for prompt in named if prompt):
            uses.setdefault(prompt, []).append(use)
    if not uses:
        uses = {prompt: ["captions"] for prompt in run.training.values.get("prompts") or ()}
    prompts = list(uses)
    tokens: Sequence[PromptTokens | None]
    tokens, note = [None] * len(prompts), ""
    try:
        if prompts:
            tokens = tokens_of(ModelFiles(_model_of(run)), prompts)
    except Exception as error:  # of the hub's libraries too: the rest of the report does without
        note = first_line(error)
    rows = [PromptRow(prompt, ", ".join(uses[prompt]), each) for prompt, each in zip(prompts, tokens, strict=True)]
    return rows, note


def _model_of(run: RunFolder) -> ModelConfig:
    """The base model.

    Raises:
        UserError: nothing names it.
    """
    if not run.training.values:
        raise UserError("the model is noted by a checkpoint, and by the end of the run")
    flags = run.training.flags
    revision = run.training.values.get("revision") or flags.get("revision")
    return ModelConfig(flags.get("pretrained_model_name_or_path"), revision, None, flags.get("cache_dir"))


def _by_prompt(columns: Sequence[Any]) -> dict[str, list[Any]]:
    by_prompt = dict[str, list[Any]]()
    for column in columns:
        by_prompt.setdefault(column.prompt, []).append(column)
    return by_prompt


def _buckets(run: RunFolder) -> dict[str, int]:
    """Size of the crops → how many of the subject's pictures have crops of it."""
    crops = [picture.crops[0] for picture in instance_pictures(run) if picture.crops]
    sizes = Counter(str(size_of_variant(name)).replace("x", "×") for name in crops)
    return dict(sizes.most_common())


def _rows(values: Sequence[Any]) -> list[Any]:
    """At most `MOST_ROWS` of them, evenly spread, the first and the last among them."""
    if len(values) <= MOST_ROWS:
        return list(values)
    return [values[round(place * (len(values) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]


def gib(value: float | None, unit: str = " GiB") -> str:
    """GiB with two decimals; a dash where there is none."""
    return f"{value:.2f}{unit}" if value else "–"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _changed(settings: Sequence[Setting]) -> list[Setting]:
    return [each for each in settings if not each.is_default]


def _breakable(name: str) -> Markup:
    """A name that may go on in a new line behind an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    """By which the page's policy knows a script of its own."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
