"""The benchmark's scores: right answers counted, pooled over subjects, and set beside the targets."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import write_text_atomically

from dreambooth_trainers import TRAINERS
from judge import Verdict
from world import Scenes

ASKED = ("colour", "pattern", "position")  # what prompt fidelity is the mean of
TARGETS = {"subject": 0.80, "prompt": 0.92, "drift": 0.90}
# In percent, of the best method with captions and of the best without.
METHOD_TARGETS = {
    "captions": {"subject": 92.0, "prompt": 98.0, "drift": 97.0},
    "one prompt": {"subject": 60.0, "prompt": 98.0, "drift": 90.0},
}

# Of a row in the result: in how many samples the judge saw what was asked for.
COLUMNS = ("object", "colour", "pattern", "position", "drift")


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


def percentages(rows: Sequence[dict[str, Any]], before: dict[str, int]) -> dict[str, float | None]:
    """Subject, prompt and drift in percent, pooled over rows."""
    values = shares(rows, before)
    return {name: None if values[name] is None else round(100 * values[name], 2) for name in TARGETS}


def summary(rows: Sequence[dict[str, Any]], before: dict[str, int]) -> dict[str, Any]:
    """The scores of a method, in percent: pooled, of each seed, and how much the subjects scatter.

    Args:
        rows: one for each subject and seed.
        before: the drift's counts without a LoRA.

    Returns:
        `means`; `standard_errors` of them over the subjects, each pooled over seeds, None with one subject; `by_seed`.
    """
    subjects = [percentages(same, before) for same in grouped(rows, "subject").values()]
    errors = {}
    for name in TARGETS:
        values = [scores[name] for scores in subjects if scores[name] is not None]
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        errors[name] = None if spread is None else round(spread, 2)
    by_seed = {str(seed): percentages(same, before) for seed, same in grouped(rows, "seed").items()}
    return {"means": percentages(rows, before), "standard_errors": errors, "by_seed": by_seed}


def grouped(rows: Sequence[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The rows by one of their values."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def table(means: dict[str, dict[str, float | None]]) -> str:
    """The means of each trainer beside the targets, in markdown."""

    def line(name: str, values: dict[str, float | None], mark: str = "") -> str:
        cells = ["–" if values.get(key) is None else f"{mark}{100 * values[key]:.2f} %" for key in columns]
        return f"| {name} | {' | '.join(cells)} |"

    columns = ("subject", "prompt", *ASKED, "drift")
    head = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    rows = [line(TRAINERS[trainer], values) for trainer, values in means.items()]
    return "\n".join([*head, *rows, line("target", TARGETS, "≥ ")])


def compact(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Subject → seed → the counts of `COLUMNS`."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        counts = [*(row["right"][name] for name in COLUMNS[:-1]), row["drift_right"]]
        found.setdefault(row["subject"], {})[str(row["seed"])] = counts
    return found


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON, a list of numbers on one line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[\d\s,.-]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text + "\n")


def methods_table(result: dict[str, Any]) -> str:
    """A row for each method, best subject first, with standard errors over subjects; and the targets; in markdown.

    What each was told stands below the table, by its number: flags are too long for a column.
    """
    lines = ["| | method | subject, % | prompt, % | drift, % |", "| ---: | --- | ---: | ---: | ---: |"]
    best_first = sorted(result["methods"], key=lambda method: (method["one_prompt"], -method["means"]["subject"]))
    for number, method in enumerate(best_first, start=1):
        cells = []
        for name in TARGETS:
            mean, error = method["means"][name], method["standard_errors"][name]
            cells.append("–" if mean is None else f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}"))
        lines.append(f"| {number} | {method['name']} | {' | '.join(cells)} |")
    for kind, targets in result["targets"].items():
        lines.append(f"| | target, {kind} | {' | '.join(f'≥ {targets[name]:.0f}' for name in TARGETS)} |")
    all_told = [f"{number}. {told(method) or 'nothing more'}" for number, method in enumerate(best_first, start=1)]
    return "\n".join(
        [*lines, "", "<details>", "<summary>What each was told</summary>", "", *all_told, "", "</details>"]
    )


def told(method: dict[str, Any]) -> str:
    """What a method tells training over what all are told, as it is typed."""
    words = f"`{method['flags']}`" if method["flags"] else ""
    parts = [words, f"stage one: `{method['stage_one']}`" if method["stage_one"] else ""]
    parts.append("one prompt" if method["one_prompt"] else "")
    parts.append(f"{method['class_images']} class pictures" if method["class_images"] else "")
    return "; ".join(part for part in parts if part)
