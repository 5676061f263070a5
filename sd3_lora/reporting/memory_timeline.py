"""Time and memory of each stage, in order, beside what was planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sd3_lora.common.memory import GIB
from sd3_lora.reporting.run_folder import RunFolder, ScriptRecord

NARROWEST = 0.012  # of the whole time: a shorter stage is drawn as wide as this, to be seen


@dataclass(frozen=True)
class StageBar:
    """A stage on the timeline.

    Attributes:
        script: to which it belongs.
        name: of the stage.
        elapsed_s: seconds.
        start: where it is drawn, from 0 to 1.
        end: likewise.
        device_gib: the most that was taken from the driver; 0 on a CPU.
        host_gib: the most memory of the process.
    """

    script: str
    name: str
    elapsed_s: float
    start: float
    end: float
    device_gib: float
    host_gib: float


@dataclass(frozen=True)
class ScriptSpan:
    """A script on the timeline.

    Attributes:
        script: its name.
        start: where its stages begin, from 0 to 1.
        end: where they end; as `start` where it did nothing in its last run.
        elapsed_s: seconds of its stages.
        planned_gib: the predicted peak on the device; None without a budget.
        measured_gib: the measured peak, the driver's own memory included; None on a CPU.
        host_gib: the most memory of the process.
        budget_gib: as asked for; None where it was all that is free.
        parts: of the prediction, name → GiB.
        resumed: whether its stages may be those of a command that went on.
    """

    script: str
    start: float
    end: float
    elapsed_s: float
    planned_gib: float | None
    measured_gib: float | None
    host_gib: float
    budget_gib: float | None
    parts: dict[str, float]
    resumed: bool

    @property
    def off_percent(self) -> float | None:
        """How far the measured peak lies from the planned one."""
        if not (self.planned_gib and self.measured_gib):
            return None
        return 100 * (self.measured_gib / self.planned_gib - 1)


@dataclass(frozen=True)
class MemoryTimeline:
    """The stages of all scripts that prepared and trained, one after another."""

    bars: tuple[StageBar, ...]
    spans: tuple[ScriptSpan, ...]

    @property
    def elapsed_s(self) -> float:
        """Seconds of all stages."""
        return sum(bar.elapsed_s for bar in self.bars)

    @property
    def has_device(self) -> bool:
        """Whether anything ran on a GPU."""
        return any(bar.device_gib for bar in self.bars)

    @property
    def is_stretched(self) -> bool:
        """Whether a stage is drawn wider than it took."""
        return any(bar.elapsed_s < NARROWEST * self.elapsed_s for bar in self.bars)


def memory_timeline(run: RunFolder) -> MemoryTimeline:
    """Lays the stages out."""
    records = [record for record in (*run.earlier, run.training) if record.values]
    seconds = [[float(stage.get("elapsed_s") or 0) for stage in record.stages] for record in records]
    whole = sum(map(sum, seconds)) or 1.0
    widths = [[max(each / whole, NARROWEST) for each in of_script] for of_script in seconds]
    scale, at = sum(map(sum, widths)) or 1.0, 0.0
    bars, spans = list[StageBar](), list[ScriptSpan]()
    for record, of_script in zip(records, widths, strict=True):
        begin = at
        for stage, width in zip(record.stages, of_script, strict=True):
            bars.append(_bar(record, stage, at, at + width / scale))
            at = bars[-1].end
        spans.append(_span(record, begin, at))
    return MemoryTimeline(tuple(bars), tuple(spans))


def _bar(record: ScriptRecord, stage: Any, start: float, end: float) -> StageBar:
    device = max(stage.get("peak_reserved_gib") or 0, stage.get("peak_device_gib") or 0)
    host = stage.get("peak_host_gib") or 0
    return StageBar(record.script, str(stage.get("name")), stage.get("elapsed_s") or 0, start, end, device, host)


def _span(record: ScriptRecord, start: float, end: float) -> ScriptSpan:
    values, stages = record.values, record.stages
    return ScriptSpan(
        record.script,
        start,
        end,
        sum(stage.get("elapsed_s") or 0 for stage in stages),
        (values.get("predicted_bytes") or 0) / GIB or None,
        (values.get("measured_bytes") or 0) / GIB or None,
        max((stage.get("peak_host_gib") or 0 for stage in stages), default=0.0),
        record.flags.get("vram_budget_gib"),
        {name: size / GIB for name, size in (values.get("predicted_parts") or {}).items() if size},
        bool(record.flags.get("resume_from_checkpoint")),
    )
