"""The benchmark's scores: right answers counted, pooled over subjects, and set beside the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreambooth_trainers import heading
from judge import Verdict
from world import Scenes

ASKED = ("colour", "pattern", "position")  # what prompt fidelity is the mean of
TARGETS = {"subject": 0.80, "prompt": 0.92, "drift": 0.90}


def count_right(verdict: Verdict, scenes: Scenes) -> dict[str, int]:
    """In how many pictures the judge sees what was asked for: object, colour, pattern, position."""
    right = verdict.right(scenes)
    return {name: int(right[name].sum()) for name in ("object", *ASKED)}


def shares(rows: Sequence[dict[str, Any]], before: dict[str, int]) -> dict[str, float | None]:
    """Pooled over rows of one trainer: subject, prompt (and its three parts) and drift, each in [0, 1] or above."""
    samples = sum(row["samples"] for row in rows)
    right = {name: sum(row["right"][name] for row in rows) / samples for name in ("object", *ASKED)}
    drift = drift_ratio(rows, before) if all("drift_right" in row for row in rows) else None
    parts = {name: right[name] for name in ASKED}
    values = {"subject": right["object"], **parts, "prompt": sum(parts.values()) / len(ASKED), "drift": drift}
    return {name: value if value is None else round(value, 4) for name, value in values.items()}


def drift_ratio(rows: Sequence[dict[str, Any]], before: dict[str, int]) -> float | None:
    """Right objects with a LoRA relative to without, over all the rows; None where there was nothing to forget."""
    after = sum(row["drift_right"] for row in rows) / sum(row["drift_samples"] for row in rows)
    share_before = before["drift_right"] / before["drift_samples"]
    return after / share_before if share_before else None


def table(means: dict[str, dict[str, float | None]]) -> str:
    """The means of each trainer beside the targets, in markdown."""

    def line(name: str, values: dict[str, float | None], mark: str = "") -> str:
        cells = ["–" if values.get(key) is None else f"{mark}{100 * values[key]:.2f} %" for key in columns]
        return f"| {name} | {' | '.join(cells)} |"

    columns = ("subject", "prompt", *ASKED, "drift")
    head = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    rows = [line(heading(trainer), values) for trainer, values in means.items()]
    return "\n".join([*head, *rows, line("target", TARGETS, "≥ ")])
