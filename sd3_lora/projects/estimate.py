"""How long training will take: by an earlier run of the project, or else by the figures that the README publishes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import counted
from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.durations import duration
from sd3_lora.common.known_models import HUB_IDS
from sd3_lora.projects.settings import BUNDLED, Settings

_RESULTS = PROJECT_FOLDER / "benchmarks" / "results"
_OF_CARDS, _OF_MINIATURE = _RESULTS / "cards_run-h200.json", _RESULTS / "step-miniature-cpu.json"


@dataclass(frozen=True)
class Estimate:
    """The time of one photo in one step.

    Attributes:
        seconds: of it.
        source: where the figure is from, for a sentence.
    """

    seconds: float
    source: str

    def sentence(self, settings: Settings) -> str:
        """The time of all steps."""
        seconds = self.seconds * settings.max_train_steps * settings.photos_per_step
        steps = f"{counted(settings.max_train_steps, 'step')} of {counted(settings.photos_per_step, 'photo')}"
        return (
            f"time: about {duration(seconds)} for {steps}, after loading, and without pictures drawn on the way "
            f"({self.source})"
        )


def estimate(settings: Settings, resolution: int, earlier: Iterable[Path]) -> Estimate | None:
    """The time of a photo and step; None where nothing like it was ever measured.

    Args:
        settings: of the run to come.
        resolution: of its crops in pixels.
        earlier: folders of earlier runs on this machine, the newest first.
    """
    for folder in earlier:
        seconds = _of_run(folder, settings, resolution)
        if seconds:
            return Estimate(seconds, "as the last such run took here")
    if settings.model == BUNDLED:
        rows = _rows(_OF_MINIATURE)
        found = [row for row in rows if row["name"] == "ours" and row["resolution"] == resolution]
        return Estimate(found[0]["ms"] / 1000 / found[0]["batch"], "as measured on two cores") if found else None
    names = {hub_id: name for name, hub_id in HUB_IDS.items()}
    rows = [row for row in _rows(_OF_CARDS) if _is_of(row, names.get(settings.model, ""), resolution)]
    if not rows:
        return None
    budget = settings.vram_budget_gib or float("inf")
    within = [row for row in rows if row["driver_gib"] <= budget * 1.01]
    row = max(within, key=lambda row: row["driver_gib"]) if within else min(rows, key=lambda row: row["driver_gib"])
    return Estimate(row["step_ms"] / 1000, f"as measured on an H200 within {row['name']}; a smaller GPU takes longer")


def _is_of(row: dict, model: str, resolution: int) -> bool:
    return row["model"] == model and row["resolution"] == resolution and "T4" not in row["name"]


def _rows(path: Path) -> list[dict]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError):
        return []


def _of_run(folder: Path, settings: Settings, resolution: int) -> float | None:
    """Seconds of a photo and step of a finished run with the same model, budget and resolution."""
    try:
        earlier = Settings.read(folder.parent / "settings.json")
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        same = (earlier.model, earlier.vram_budget_gib) == (settings.model, settings.vram_budget_gib)
        if same and record["resolution"] == resolution:
            return float(record["ms_a_step"]) / 1000 / earlier.photos_per_step
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
