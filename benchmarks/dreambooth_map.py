"""DreamBooth on the miniature over learning rate and steps: subject, prompt and drift, and where overfitting begins.

    python benchmarks/dreambooth_map.py --jobs 14 --result FILE
    python benchmarks/plot_map.py FILE docs/map

Each learning rate is trained once to the last point, without class pictures and with them, at a constant rate. Of the
first its moving average is judged too. A checkpoint of a run is what a shorter run ends with, so all points come from
one run. `dreambooth.py` explains the scores; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import UserError, exit_code

from demo import STEPS
from dreambooth import (
    LEARNING_RATE,
    SHARED_SETTINGS,
    add_shared_flags,
    read_json,
    require_subjects,
    settings_of,
)
from dreambooth_runs import (
    DRIFT_BEFORE,
    Method,
    Point,
    Run,
    carry_out_all,
    carry_out_benchmark,
    mean_times,
    require_none,
    results_of,
)
from dreambooth_scores import compact, summary
from dreambooth_subjects import SUBJECTS

RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
POINTS = (50, 100, 150, 300, 600)  # steps
PLAIN, AVERAGE, CLASS_PICTURES = "plain", "moving average", "class pictures"
VARIANTS = (PLAIN, AVERAGE, CLASS_PICTURES)


def method_of(flags: argparse.Namespace, rate: float, variant: str) -> Method:
    """A rate without class pictures or with them; a moving average changes nothing of the run that it follows."""
    words = f"--learning_rate {rate:g} --checkpointing_steps {math.gcd(*flags.points)}"
    if variant == CLASS_PICTURES:
        return Method(f"rate {rate:g}, {variant}", words, class_images=flags.class_images)
    return Method(f"rate {rate:g}", f"{words} --use_ema --ema_decay {flags.ema_decay:g}")


def points_of(flags: argparse.Namespace, variant: str) -> tuple[Point, ...]:
    """When a variant's run is judged; the plain run is that of its moving average too."""
    kinds = (False,) if variant == CLASS_PICTURES else (False, True)
    return tuple(Point(steps, is_average) for is_average in kinds for steps in flags.points)


def runs_of(flags: argparse.Namespace, rate: float, variant: str) -> list[Run]:
    """A rate's runs on all subjects with all seeds."""
    method, points = method_of(flags, rate, variant), points_of(flags, variant)
    return [Run(method, subject, seed, points) for seed in flags.seeds for subject in flags.subjects]


def line_of(flags: argparse.Namespace, rate: float, variant: str) -> dict[str, Any] | None:
    """A line of the plot: the scores at each point; None where a run has none."""
    found = results_of(flags, runs_of(flags, rate, variant))
    if found is None:
        return None
    before = read_json(flags.output_dir / DRIFT_BEFORE) or {}
    points = []
    for place, point in enumerate(points_of(flags, variant)):
        if point.is_average == (variant == AVERAGE):
            rows = [result["scores"][place] for result in found]
            points.append({"steps": point.steps, **summary(rows, before), "rows": compact(rows)})
    return {"variant": variant, "learning_rate": rate, **mean_times(found), "points": points}


def sentence(line: dict[str, Any]) -> str:
    """A finished line in words."""
    means = [point["means"] for point in line["points"]]
    scores = (f"{name} {' '.join(_percent(mean[name]) for mean in means)}" for name in ("subject", "prompt", "drift"))
    return f"{line['variant']}, rate {line['learning_rate']:g}: {'; '.join(scores)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def lines_of(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Those whose runs are all done."""
    found = [line_of(flags, rate, variant) for variant in VARIANTS for rate in flags.rates]
    return [line for line in found if line]


def measure(flags: argparse.Namespace) -> list[str]:
    """Carries out what has no result yet, and prints each line of the plot once it is whole.

    Returns:
        A sentence for each run that failed.
    """
    kinds = [(rate, variant) for rate in flags.rates for variant in (PLAIN, CLASS_PICTURES)]
    reported: set[tuple[float, str]] = set()

    def report(_run: Run) -> None:
        for rate, variant in ((rate, variant) for rate in flags.rates for variant in VARIANTS):
            line = None if (rate, variant) in reported else line_of(flags, rate, variant)
            if line:
                reported.add((rate, variant))
                print(sentence(line), flush=True)

    return carry_out_all(flags, [run for kind in kinds for run in runs_of(flags, *kind)], report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="Learning rates.")
    parser.add_argument("--points", nargs="+", type=int, default=list(POINTS), help="Steps at which LoRAs are judged.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of training.")
    parser.add_argument("--class_images", type=int, default=100, help="Class pictures of each subject.")
    parser.add_argument("--ema_decay", type=float, default=0.98, help="Of the moving average.")
    add_shared_flags(parser, Path("outputs/dreambooth-map"))
    flags = parser.parse_args(argv)
    if min(flags.points) < 1 or flags.class_images < 1:
        raise UserError("--points and --class_images must be at least 1")
    flags.subjects = require_subjects(flags.subjects or SUBJECTS)
    flags.points, flags.rates = sorted(set(flags.points)), sorted(set(flags.rates))
    flags.steps, flags.learning_rate = flags.points[-1], flags.rates[0]  # which a method's flags replace
    flags.seed, flags.vram_budget_gib = 0, None  # the seed is that of class pictures, which all seeds share
    return flags


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    flags = parse(argv)
    settings = settings_of(flags, (*SHARED_SETTINGS, "points", "class_images", "ema_decay"))

    def parts() -> dict[str, Any]:
        return {"baseline": {"learning_rate": LEARNING_RATE, "steps": STEPS}, "lines": lines_of(flags)}

    _, failures = carry_out_benchmark(flags, settings, lambda: measure(flags), parts)
    require_none(failures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "fewer --jobs or a smaller --batch_size")


if __name__ == "__main__":
    sys.exit(main())
