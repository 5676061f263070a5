"""Whether equal runs give equal bits on a GPU, and what that costs: a LoRA of the full-size model trained again and
again, on fabricated files and random weights.

Each group has a reference, which is trained first; each row of it trains once more: the same, killed and resumed at
half, or with its parts kept elsewhere. `bit_equal` compares every number of the two LoRAs; `off_by` is the norm of the
difference over the norm, for the tensor where that is largest. A step's time is measured in turns, with torch's own
backward pass of attention and with the exact one.

    python benchmarks/exactness.py --models /tmp/models --result benchmarks/results/exactness-h100.json

The chunked way of cards before Ampere is measured on any card, by choosing it here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dreambooth_sd3_lora_miniature as script
from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.exact_attention import AttentionBackward, exact_attention
from sd3_lora.transformer.lora import LORA_FILE

import torch
from memory import fabricate_stage_one, model_folder
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TOKENS = (4250, 1178)  # of a picture of 1024 and 512 px, with its prompt's
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
STEPS, TIMED_STEPS, ROUNDS = 12, 41, 3
RECOMPUTED, STREAMED = ("--recompute_blocks", "24"), ("--recompute_blocks", "23", "--stream_blocks", "24")
AGAIN, RESUMED = "again", "killed and resumed"


@dataclass(frozen=True)
class Group:
    """Runs that are to give the same bits.

    Attributes:
        name: of the group.
        flags: of all its runs.
        rows: name → the flags that a row adds.
        resolution: in pixels.
        backward: attention's backward pass, where it is not to be chosen by the flags.
    """

    name: str
    flags: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    resolution: int = 1024
    backward: AttentionBackward | None = None


EVERY_PLAN = {
    AGAIN: (),
    RESUMED: (),
    "launched kernel by kernel": ("--capture", "off"),
    "12 blocks recomputed": ("--recompute_blocks", "12"),
    "all recomputed": RECOMPUTED,
    "all recomputed, inputs offloaded": (*RECOMPUTED, "--offload_inputs", "on"),
    "all streamed from host memory": STREAMED,
    "all streamed from the files": (*STREAMED, "--stream_from", "files"),
}
TWICE = {AGAIN: (), RESUMED: ()}
ADAM, BATCH = ("--use_8bit_adam",), ("--use_8bit_adam", "--train_batch_size", "2")


def groups() -> Iterator[Group]:
    """The table, in order."""
    for switch in ("on", "auto", "off"):
        flags = (*ADAM, "--deterministic", switch)
        yield Group("1024 px", flags, EVERY_PLAN if switch == "on" else TWICE)
        yield Group("512 px", flags, EVERY_PLAN if switch == "on" else TWICE, 512)
    flags = ("--deterministic", "on")
    some = {**TWICE, "all recomputed": RECOMPUTED, "all streamed from host memory": STREAMED}
    yield Group("batch of 2", (*BATCH, *flags), some)
    yield Group("batch of 2, 512 px", (*BATCH, *flags), some, 512)
    yield Group("AdamW in 32 bits", flags, TWICE)
    yield Group("LoRA dropout", (*ADAM, *flags, "--lora_dropout", "0.1"), {**TWICE, "all recomputed": RECOMPUTED})
    yield Group("base in 4 bits", (*ADAM, *flags, "--base_precision", "nf4"), TWICE)
    compiled = (*ADAM, "--deterministic", "auto", "--compile", "on")
    yield Group("compiled", compiled, TWICE)
    # A T4 has no other kernel.
    efficient = (*ADAM, *flags, "--attention_kernel", "efficient")
    for backward in (AttentionBackward.CHUNKS, AttentionBackward.FLASH):
        kernel = efficient if backward is AttentionBackward.CHUNKS else (*ADAM, *flags)
        yield Group(f"without Triton: {backward.value}", kernel, TWICE, backward=backward)


class Runs:
    """Trains one model.

    Args:
        models: where the random models are, or are made.
        name: of the model.
    """

    def __init__(self, models: Path, name: str):
        self._folder, self._model = models, model_folder(models, name)

    def train(
        self, group: Group, flags: Sequence[str], steps: int, output: Path, resumed: bool = False
    ) -> dict[str, Any]:
        """What `run.json` holds then."""
        embeddings, latents = fabricate_stage_one(self._model, group.resolution)
        words = ["--pretrained_model_name_or_path", self._model, "--data_df_path", embeddings]
        words += ["--latents_path", latents, "--resolution", group.resolution, "--seed", 0, "--rank", 8]
        words += ["--device", "cuda", "--report_to", "none", "--max_train_steps", steps, "--output_dir", output]
        words += ["--checkpointing_steps", steps // 2, *(["--resume_from_checkpoint", "latest"] if resumed else [])]
        torch.cuda.set_per_process_memory_fraction(1.0)  # the last run's cap
        drop_workspaces(torch.device("cuda"))
        free_memory(torch.device("cuda"))
        with contextlib.ExitStack() as held:
            if group.backward:
                held.enter_context(mock.patch.object(script, "choose_backward", return_value=group.backward))
            held.enter_context(contextlib.redirect_stdout(io.StringIO()))
            script.run([str(word) for word in [*words, *group.flags, *flags]])
        return dict(json.loads((output / "run.json").read_text(encoding="utf-8")))

    def fresh(self, name: str) -> Path:
        """An empty folder for a run."""
        folder = self._folder / f"exactness-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def resume(self, group: Group, flags: Sequence[str], reference: Path) -> Path:
        """Goes on from the reference's checkpoint, as a run would that was killed behind it; returns its folder."""
        output = self.fresh("resumed")
        checkpoint = f"checkpoint-{STEPS // 2}"
        shutil.copytree(reference / checkpoint, output / checkpoint)
        shutil.copy(reference / "losses.jsonl", output)
        self.train(group, flags, STEPS, output, resumed=True)
        return output


def off_by(folder: Path, reference: Path) -> tuple[bool, float]:
    """Whether two LoRAs have the same bits; and the largest distance of one of their tensors, relative to its norm."""
    ours, theirs = (load_file(path / LORA_FILE) for path in (folder, reference))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    distances = [float((ours[key] - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-30)) for key in theirs]
    return same, max(distances)


def compare(runs: Runs, group: Group) -> Iterator[dict[str, Any]]:
    """The rows of a group."""
    reference = runs.fresh("reference")
    try:
        runs.train(group, (), STEPS, reference)
    except Exception as error:  # the other groups are worth having
        yield {"name": group.name, "failed": f"{type(error).__name__}: {error}"}
        return
    for name, flags in group.rows.items():
        row = {"name": f"{group.name}: {name}", "flags": [*group.flags, *flags], "resolution": group.resolution}
        start = time.perf_counter()
        try:
            if name == RESUMED:
                output = runs.resume(group, flags, reference)
            else:
                output = runs.fresh("row")
                runs.train(group, flags, STEPS, output)
            record = json.loads((output / "run.json").read_text(encoding="utf-8"))
            execution = record["execution"]
            row |= {"deterministic": group.flags[group.flags.index("--deterministic") + 1]}
            row["bit_equal"], row["off_by"] = off_by(output, reference)
            row |= {"execution": execution, "predicted_bytes": record["predicted_bytes"]}
            row |= {"measured_bytes": record["measured_bytes"], "elapsed_s": round(time.perf_counter() - start, 1)}
        except Exception as error:  # the other rows are worth having
            row["failed"] = f"{type(error).__name__}: {error}"
        yield row


def timed_groups() -> Iterator[tuple[str, Group, Group]]:
    """What is timed in turns: a name, torch's own backward pass, and the exact one."""
    off, on = (*ADAM, "--deterministic", "off"), (*ADAM, "--deterministic", "on")
    for resolution in (1024, 512):
        yield f"{resolution}", Group("", off, {}, resolution), Group("", on, {}, resolution)
    compiled = ("--compile", "on")
    exact = (*ADAM, "--deterministic", "auto", *compiled)
    yield "1024 compiled", Group("", (*off, *compiled), {}), Group("", exact, {})
    for resolution in (1024, 512):
        kernel = ("--attention_kernel", "efficient")
        chunks = Group("", (*on, *kernel), {}, resolution, AttentionBackward.CHUNKS)
        yield f"{resolution} as a T4", Group("", (*off, *kernel), {}, resolution), chunks
    flash = ("--attention_kernel", "flash")
    yield "1024 flash", Group("", (*off, *flash), {}), Group("", (*on, *flash), {})


def time_steps(runs: Runs, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """What is timed, and the milliseconds of a step: the fast one, the exact one, and their ratio."""
    for name, fast, exact in timed_groups():
        times: dict[str, list[float]] = {"fast": [], "exact": []}
        for _ in range(rounds):
            for kind, group in (("fast", fast), ("exact", exact)):
                record = runs.train(group, (), TIMED_STEPS, runs.fresh("timed"))
                times[kind].append(record["ms_a_step"])
        ms = {kind: statistics.median(values) for kind, values in times.items()}
        found = {f"{kind}_ms": round(value, 2) for kind, value in ms.items()}
        yield name, {**found, "ratio": round(ms["exact"] / ms["fast"], 4)}


def time_kernels(tokens: int) -> dict[str, float]:
    """Milliseconds of attention's kernels alone, replayed as a CUDA graph: one picture, 24 heads of 64, float16."""
    drawn = [torch.randn(1, 24, tokens, 64, device="cuda", dtype=torch.float16) for _ in range(4)]
    *inputs, grad = drawn
    leaves = [tensor.requires_grad_() for tensor in inputs]
    times: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        with sdpa_kernel([kernel]):
            times[f"{name} forward"] = replayed_ms(lambda: scaled_dot_product_attention(*inputs))
            for backward in AttentionBackward:
                if backward is AttentionBackward.CHUNKS and name != "efficient":
                    continue
                with exact_attention(backward):
                    both = replayed_ms(lambda: torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, grad))
                times[f"{name} backward, {backward.name.lower()}"] = round(both - times[f"{name} forward"], 4)
    return times


def replayed_ms(compute: Callable[[], object], times: int = 5) -> float:
    """The median milliseconds of a computation over seven replays of a graph that holds it five times."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        compute()
    torch.cuda.synchronize()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph, stream=aside):
        for _ in range(times):
            compute()
    measured = []
    for _ in range(7):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        measured.append(start.elapsed_time(end) / times)
    return statistics.median(measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed, or a deterministic one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="Where the random models are, or are made.")
    parser.add_argument("--model", default="sd3-medium", help="Which of them.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Of the steps' times; 0 measures none.")
    parser.add_argument("--only", nargs="*", help="Groups whose names begin with one of these.")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    arguments = parser.parse_args(argv)
    from memory import VERSIONS, circumstances

    arguments.models.mkdir(parents=True, exist_ok=True)
    runs, rows, ratios = Runs(arguments.models, arguments.model), [], {}
    kernels: dict[str, dict[str, float]] = {}

    def save() -> None:
        if arguments.result:
            where = circumstances(torch.device("cuda"), (*VERSIONS, "bitsandbytes"))
            ratio = {name: times["ratio"] for name, times in ratios.items()}
            result = {**where, "model": arguments.model, "rows": rows, "step_ratio": ratio, "step_times": ratios}
            result["kernels_ms"] = kernels
            arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for group in groups():
        if arguments.only and not group.name.startswith(tuple(arguments.only)):
            continue
        for row in compare(runs, group):
            rows.append(row)
            shown = ("name", "deterministic", "bit_equal", "off_by", "failed", "elapsed_s")
            print({key: row[key] for key in shown if key in row}, flush=True)
            save()
    for name, times in time_steps(runs, arguments.rounds) if arguments.rounds else ():
        ratios[name] = times
        print(name, times, flush=True)
        save()
    for tokens in TOKENS if arguments.rounds else ():
        kernels[str(tokens)] = time_kernels(tokens)
        save()
    return int(any("failed" in row or (row["deterministic"] == "on" and not row["bit_equal"]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
