"""DreamBooth on the miniature with many methods: optimizers, kinds of LoRA, layers, schedules, prior preservation.

    python benchmarks/dreambooth_methods.py --jobs 14 --result FILE
    python benchmarks/dreambooth_methods.py --only baseline "lion*" --seeds 0 --jobs 14

The methods are those of a file, `methods.json` beside this script: a list of {"name", "flags", "stage_one",
"one_prompt", "class_images", "class_prompts"}, explained in `dreambooth_runs.Method`. Steps, batch size and rank are
the same for all. `dreambooth.py` explains the scores.

Methods come one after another, so that an interrupted call has whole ones; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import UserError, exit_code

from dreambooth import (
    LENGTH_SETTINGS,
    SHARED_SETTINGS,
    add_length_flags,
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
from dreambooth_scores import METHOD_TARGETS, compact, methods_table, summary
from dreambooth_subjects import SUBJECTS

METHODS_FILE = Path(__file__).resolve().parent / "methods.json"


def read_methods(path: Path, only: Sequence[str]) -> list[Method]:
    """The methods of a file, or those whose names are among `only`, in which * stands for anything; in its order.

    Raises:
        UserError: it cannot be read, or lacks one.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        methods = [Method(**entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a list of methods: {error}") from error
    names = [method.name for method in methods]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise UserError(f"{path} has two methods named {double[0]}: give one another name")
    missing = [pattern for pattern in only if not fnmatch.filter(names, pattern)]
    if missing:
        raise UserError(f"{path} has no method named {missing[0]}: choose from {', '.join(names)}")
    chosen = {name for pattern in only for name in fnmatch.filter(names, pattern)}
    return [method for method in methods if not only or method.name in chosen]


def runs_of(flags: argparse.Namespace, method: Method) -> list[Run]:
    """A method on all subjects, seed after seed, judged at its end."""
    points = (Point(flags.steps, method.keeps_average),)
    return [Run(method, subject, seed, points) for seed in flags.seeds for subject in flags.subjects]


def scores_of(flags: argparse.Namespace, method: Method) -> dict[str, Any] | None:
    """A method's part of the result; None where a run has none."""
    found = results_of(flags, runs_of(flags, method))
    if found is None:
        return None
    rows = [result["scores"][0] for result in found]
    fields = {"flags": method.flags, "stage_one": method.stage_one}
    fields |= {"one_prompt": method.one_prompt, "class_images": method.class_images}
    fields |= {"class_prompts": method.class_prompts} if method.class_prompts else {}
    scores = summary(rows, read_json(flags.output_dir / DRIFT_BEFORE) or {})
    return {"name": method.name, **fields, **scores, **mean_times(found), "rows": compact(rows)}


def sentence(scores: dict[str, Any]) -> str:
    """A finished method in a line."""
    means, errors = scores["means"], scores["standard_errors"]
    spread = "" if errors["subject"] is None else f" ± {errors['subject']:.2f}"
    drift = "–" if means["drift"] is None else f"{means['drift']:.2f}"
    scored = f"subject {means['subject']:.2f}{spread}, prompt {means['prompt']:.2f}, drift {drift}"
    return f"{scores['name']}: {scored} ({scores['training_s']:.1f} s training, {scores['sampling_s']:.1f} s drawing)"


def measure(flags: argparse.Namespace, methods: Sequence[Method]) -> list[str]:
    """Carries out what has no result yet, and prints a line for each method that is whole.

    Returns:
        A sentence for each run that failed.
    """
    runs = [run for method in methods for run in runs_of(flags, method)]
    reported: set[str] = set()

    def report(method: Method) -> None:
        scores = None if method.name in reported else scores_of(flags, method)
        if scores:
            reported.add(method.name)
            print(sentence(scores), flush=True)

    if (flags.output_dir / DRIFT_BEFORE).is_file():
        for method in methods:
            report(method)
    return carry_out_all(flags, runs, lambda run: report(run.method))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", type=Path, default=METHODS_FILE, help="JSON file. Default: methods.json.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="Of its methods; 'EMA*' for several.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="Of training.")
    add_shared_flags(parser, Path("outputs/dreambooth-methods"))
    add_length_flags(parser)
    flags = parser.parse_args(argv)
    flags.subjects = require_subjects(flags.subjects or SUBJECTS)
    flags.seed, flags.vram_budget_gib = 0, None  # the seed is that of class pictures, which all seeds share
    return flags


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    flags = parse(argv)
    methods = read_methods(flags.methods, flags.only)
    settings = settings_of(flags, (*LENGTH_SETTINGS, *SHARED_SETTINGS))

    def parts() -> dict[str, Any]:
        found = [scores_of(flags, method) for method in methods]
        return {"targets": METHOD_TARGETS, "methods": [scores for scores in found if scores]}

    result, failures = carry_out_benchmark(flags, settings, lambda: measure(flags, methods), parts)
    print(f"\n{methods_table(result)}")
    require_none(failures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "fewer --jobs or a smaller --batch_size")


if __name__ == "__main__":
    sys.exit(main())
