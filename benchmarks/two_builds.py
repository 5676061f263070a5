"""Two builds of this project side by side on one GPU: milliseconds of a step in each setting, and whether losses agree.

    git worktree add ../before COMMIT
    python benchmarks/two_builds.py ../before . --models /tmp/models 1024 512 batch sd3.5 --result FILE

Each build has a process of its own, and the two take turns, case by case and round by round, so that a change of the
machine's mood meets both. `equal` compares losses instead, bit by bit, under torch's deterministic algorithms.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from timed_peer import Clock

TRAIN = "train_dreambooth_sd3_lora_miniature"


def work(build: Path) -> None:
    """A build's process: a line of JSON in, with the flags of a training; a line of JSON out, with its times."""
    sys.path.insert(0, str(build))
    answers = os.fdopen(os.dup(1), "w")
    import importlib

    import torch

    script = importlib.import_module(TRAIN)
    for line in sys.stdin:
        job = json.loads(line)
        torch.use_deterministic_algorithms(job["deterministic"])
        shutil.rmtree(job["output"], ignore_errors=True)
        clock = Clock(job["warm"], job["steps"])

        said, refused = io.StringIO(), io.StringIO()
        start = time.perf_counter()
        with (
            mock.patch.object(script, "optimizer_step", partial(ticked, script.optimizer_step, clock)),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(refused),
        ):
            try:
                code = script.main([*job["flags"], "--output_dir", job["output"]])
            except Exception as error:  # the other rows are worth having
                refused.write(f"{type(error).__name__}: {error}\n")
                code = 1
        answer: dict[str, Any] = {"elapsed_s": round(time.perf_counter() - start, 1)}
        if code:
            answer["failed"] = refused.getvalue().strip().splitlines()[-1]
        else:
            lines = (Path(job["output"]) / "losses.jsonl").read_text(encoding="utf-8").splitlines()
            answer["losses"] = [json.loads(line)["loss"] for line in lines]
            answer["ms"] = clock.report()["ms"]
        torch.cuda.empty_cache()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def as_one_flag(words: Sequence[str]) -> list[str]:
    """--compile and --capture as builds before cc752f5's successor had them, in one flag."""
    pairs = dict(itertools.pairwise(words))
    older = {("on", None): "blocks", ("off", "on"): "graph", ("off", "off"): "off"}
    asked = older[pairs["--compile"], pairs.get("--capture")]
    kept = list(words)
    for flag in ("--compile", "--capture"):
        if flag in kept:
            at = kept.index(flag)
            del kept[at : at + 2]
    return [*kept, "--compile", asked]


def ticked(take_step: Callable[..., Any], clock: Clock, *given: Any) -> Any:
    """Takes an optimizer step, and tells the clock."""
    result = take_step(*given)
    clock.tick()
    return result


class Build:
    """A build with its process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.has_capture_flag = (folder / "sd3_lora" / "common" / "placement_flags.py").is_file()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            },
        )

    def run(self, flags: Sequence[object], job: dict[str, Any]) -> dict[str, Any]:
        """Trains once."""
        words = [str(flag) for flag in flags]
        if not self.has_capture_flag:
            words = as_one_flag(words)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({**job, "flags": words}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": "the process ended"}

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


def compare(
    builds: Sequence[Build], flags: Sequence[object], output: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """One case: both builds in turns, `rounds` times; medians and their ratio, and whether all losses agree."""
    found: list[list[dict[str, Any]]] = [[], []]
    job = {"output": str(output), "warm": given.warm, "steps": given.steps, "deterministic": given.equal}
    for turn in range(given.rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for index in order:
            found[index].append(builds[index].run(flags, job))
    failed = [answer["failed"] for answers in found for answer in answers if "failed" in answer]
    if failed:
        return {"failed": failed}
    times = [[round(answer["ms"], 2) for answer in answers] for answers in found]
    losses = [answer["losses"] for answers in found for answer in answers]
    differing = [i for i, step in enumerate(zip(*losses, strict=True), start=1) if len(set(step)) > 1]
    before, after = (statistics.median(each) for each in times)
    return {
        "before_ms": before,
        "after_ms": after,
        "ratio": round(after / before, 4),
        "rounds_ms": times,
        "losses_equal": not differing,
        "first_step_that_differs": differing[0] if differing else None,
        "elapsed_s": round(sum(answer["elapsed_s"] for answers in found for answer in answers), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="The folder of one build.")
    parser.add_argument("after", type=Path, help="Of the other.")
    parser.add_argument("sets", nargs="+", help="Of benchmarks/step.py: 1024, 512, batch, sd3.5.")
    parser.add_argument("--models", type=Path, required=True, help="Where the random models are, or are made.")
    parser.add_argument("--rounds", type=int, default=2, help="Turns of each build. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=40, help="Of a run. Default: %(default)s.")
    parser.add_argument("--warm", type=int, default=15, help="Steps that are not timed. Default: %(default)s.")
    parser.add_argument("--equal", action="store_true", help="Compare losses under deterministic algorithms.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    given = parser.parse_args(argv)
    project = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(project / name) for name in ("benchmarks", "miniature", ".")]
    from sd3_lora.common.devices import choose_device

    import step
    from evaluate import VERSIONS, circumstances

    start = time.perf_counter()
    builds = [Build(given.before.resolve()), Build(given.after.resolve())]
    rows: list[dict[str, Any]] = []
    cases = [case for name in given.sets for case in step.SETS[name]() if case.script is None]
    for case in cases:
        if time.perf_counter() - start > given.stop_after:
            print(f"stopped before {case.name} at {case.resolution} px", flush=True)
            break
        model = step.prepare_model(case.model, given.models)
        embeddings, latents = step.stored(case, model)
        words = step.shared_words(case, model, given.models / "output", given.steps)
        words = words[: words.index("--output_dir")] + words[words.index("--output_dir") + 2 :]
        words += ["--data_df_path", embeddings, "--latents_path", latents, *case.flags]
        row = compare(builds, words, given.models / "output", given)
        rows.append({"name": case.name, "model": case.model, "resolution": case.resolution, "batch": case.batch, **row})
        print(rows[-1], flush=True)
        if given.result:
            circumstance = circumstances(choose_device("auto"), (*VERSIONS, "bitsandbytes"))
            settings = {"deterministic": given.equal, "steps": given.steps, "warm": given.warm}
            content = {**circumstance, **settings, "rows": rows}
            given.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for build in builds:
        build.close()
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        sys.exit(main())
