"""Validation while training: its time beside the stock pipeline's, its peak beside the step's, and whether a run with
it has the bits of a run without.

Each row trains a LoRA of the full-size model on fabricated files and random weights, in this process.

- Timed rows draw four prompts at 1024 px in 28 steps: until training goes on, while threads write PNGs and the sheet
  (`written_s` later, if nothing else is to be done). Beside them: the same pictures by diffusers' pipeline in one call,
  resident in float16 with that LoRA and the embeddings given, until the PNGs are written.
- Rows of peaks draw in fewer steps, with less of the model on the device.
- Exact rows train twice, with pictures and the early warning in between and without, and compare LoRA and losses.

Peaks are the allocator's reserved bytes: of the steps, and of what runs between two of them.

    python benchmarks/validation.py --models /tmp/models --result benchmarks/results/validation-h100.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dreambooth_sd3_lora_miniature as script
from sd3_lora.common.command_line import Interrupted, write_text_atomically
from sd3_lora.common.memory import GIB, drop_workspaces, free_memory
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.drawing.validation import Validation
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training import watch
from sd3_lora.transformer.lora import LORA_FILE

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from evaluate import VERSIONS, circumstances
from exactness import off_by
from memory import DRAWN, fabricate_stage_one, model_folder
from placements import placement_of

GUIDANCE, RANK, TRAINING_STEPS = 7.0, 16, 3
UPRIGHT, LYING = PictureSize(384, 640), PictureSize(640, 384)


@dataclass(frozen=True)
class Row:
    """One run, or two that are compared.

    Attributes:
        name: of the row.
        kind: timed, peaks or exact.
        flags: of the training script, of both runs.
        resolution: in pixels.
        num_steps: of denoising.
        sizes: of the pictures, in turn; squares where there are none.
        masked: whether the pictures have masks.
    """

    name: str
    kind: str
    flags: tuple[str, ...] = ()
    resolution: int = 1024
    num_steps: int = 28
    sizes: tuple[PictureSize, ...] = ()
    masked: bool = False

    @property
    def every(self) -> int:
        """Of three training steps, after which a drawing comes; others are before the first and after the last."""
        return 3 if self.kind == "timed" else 2


def rows() -> Iterator[Row]:
    """The table, in order."""
    exact = partial(Row, kind="exact", resolution=512, num_steps=3)
    yield Row("no budget", "timed")
    yield exact("as it is")
    yield exact("prior term", flags=("--prior_term", "preference"))
    yield exact("masks", flags=("--masked_loss",), masked=True)
    yield exact("LoKr", flags=("--lora_type", "lokr"))
    yield exact("buckets", flags=("--use_aspect_ratio_bucket",), sizes=(UPRIGHT, LYING))
    yield exact("rates by pattern", flags=("--lr_pattern", "attn.to_q=5e-5,lora_B=1e-3"))
    yield exact("moving average, streamed", flags=("--use_ema", "--recompute_blocks", "23", "--stream_blocks", "24"))
    yield Row("within 16 GiB", "timed", ("--vram_budget_gib", "16"))
    yield Row("all blocks recomputed", "peaks", ("--recompute_blocks", "24"), num_steps=4)
    yield Row("base in 4 bits", "peaks", ("--base_precision", "nf4", "--recompute_blocks", "24"), num_steps=4)
    yield Row("within 3 GiB", "peaks", ("--vram_budget_gib", "3"), num_steps=4)
    yield Row("within 1.7 GiB", "peaks", ("--vram_budget_gib", "1.7"), num_steps=4)


def words_of(row: Row, model: Path, output: Path, device: str) -> list[object]:
    """The training script's flags, without those of validation."""
    embeddings, latents = fabricate_stage_one(model, row.resolution, *row.sizes, masked=row.masked)
    words: list[object] = ["--pretrained_model_name_or_path", model, "--data_df_path", embeddings]
    words += ["--latents_path", latents, "--resolution", row.resolution, "--rank", RANK, "--seed", 0]
    words += ["--device", device, "--report_to", "none", "--max_train_steps", TRAINING_STEPS, "--output_dir", output]
    words += ["--deterministic", "on"] if row.kind == "exact" else []
    return [*words, *row.flags]


def drawing_words(row: Row) -> list[object]:
    """The flags of validation; of an exact row with the early warning."""
    prompts = DRAWN if row.kind == "timed" else DRAWN[:2]
    words: list[object] = ["--validation_prompt", *prompts, "--validation_num_steps", row.num_steps]
    words += ["--validation_steps", row.every, "--validation_guidance", GUIDANCE]
    return [*words, *(["--early_warning_steps", row.every] if row.kind == "exact" else [])]


@dataclass
class Observed:
    """What was seen of a run.

    Attributes:
        device: that computes.
        step_bytes: the allocator's peak of the steps between two drawings.
        drawing_bytes: of each drawing, and of each early warning.
        drawing_s: how long each drawing took.
        parts_s: of the drawings, the seconds of denoising, of decoding, and of waiting until all is written.
        ended: when each optimizer step was over, and each drawing, in order.
        predicted: the plan's peak of each phase, in GiB.
    """

    device: torch.device
    step_bytes: list[int] = field(default_factory=list)
    drawing_bytes: list[int] = field(default_factory=list)
    drawing_s: list[float] = field(default_factory=list)
    parts_s: dict[str, list[float]] = field(default_factory=lambda: {"_denoise": [], "_decode": [], "finish": []})
    ended: list[tuple[str, float]] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds, when the device is through with what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def take_peak(self) -> int:
        """The allocator's peak since the last call."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Looks at the script's steps, and at what it does between them."""
        with contextlib.ExitStack() as held:
            for name in ("validate", "measure"):
                held.enter_context(_around(watch, name, partial(self._between, name)))
            for part in self.parts_s:
                held.enter_context(_around(Validation, part, partial(self._part, part)))
            held.enter_context(_around(script, "optimizer_step", self._step))
            held.enter_context(_around(script, "make_plan", self._plan))
            yield

    def _step(self, body: Callable[..., Any], *words: Any) -> Any:
        result = body(*words)
        self.ended.append(("step", self.now()))
        return result

    def _plan(self, body: Callable[..., Any], *words: Any) -> Any:
        plan = body(*words)
        self.predicted = {phase.name.split()[0]: round(phase.peak_bytes / GIB, 3) for phase in plan.forecast.phases}
        return plan

    def _part(self, name: str, body: Callable[..., Any], *words: Any) -> Any:
        start = self.now()
        try:
            return body(*words)
        finally:
            self.parts_s[name].append(self.now() - start)

    def _between(self, name: str, body: Callable[..., Any], *words: Any, **more: Any) -> Any:
        if self.ended and self.ended[-1][0] == "step":
            self.step_bytes.append(self.take_peak())
        free_memory(self.device)  # what the steps left in the allocator's cache is no part of the drawing
        self.take_peak()
        start = self.now()
        try:
            return body(*words, **more)
        finally:
            end = self.now()
            self.drawing_bytes.append(self.take_peak())
            self.ended.append((name, end))
            if name == "validate":
                self.drawing_s.append(end - start)

    def report(self) -> dict[str, Any]:
        """Peaks and times; those of the first drawing, which loads the VAE and kernels, apart."""
        found: dict[str, Any] = {"step_gib": max(self.step_bytes, default=0) / GIB}
        found["drawing_gib"] = max(self.drawing_bytes, default=0) / GIB
        found = {name: round(value, 3) for name, value in found.items()}
        found |= {"first_drawing_s": round(self.drawing_s[0], 2), "drawing_s": round(min(self.drawing_s[1:]), 2)}
        denoise, decode, finish = self.parts_s.values()
        found |= {"denoise_s": round(min(denoise[1:]), 2), "decode_s": round(min(decode[1:]), 2)}
        found |= {"written_s": round(finish[-1], 2)}
        times = [(kind, end - before) for (_, before), (kind, end) in zip(self.ended, self.ended[1:], strict=False)]
        steps = [seconds for kind, seconds in times if kind == "step"]
        before = [kind for kind, _ in self.ended]
        after = [s for (kind, s), last in zip(times, before, strict=False) if kind == "step" and last != "step"]
        steady = min(steps)
        found["step_ms"] = round(1000 * steady, 1)
        return found | ({"capture_s": round(after[-1] - steady, 2)} if len(after) > 1 else {})


def _around(owner: Any, name: str, call: Callable[..., Any]) -> contextlib.AbstractContextManager[object]:
    """Within it the owner's function `name` is called by `call`, which gets it first."""
    body = getattr(owner, name)

    def around(*words: Any, **more: Any) -> Any:
        return call(body, *words, **more)

    return mock.patch.object(owner, name, around)


def train(words: Sequence[object], output: Path, observed: Observed | None) -> dict[str, Any]:
    """Runs the script, watched if asked; what `run.json` holds then."""
    forget_last_run()
    shutil.rmtree(output, ignore_errors=True)
    printed = io.StringIO()
    watching = observed.watch() if observed else contextlib.nullcontext()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), watching:
        script.run([str(word) for word in words])
    failures = [line for line in printed.getvalue().splitlines() if "failed (" in line]
    if failures:
        raise RuntimeError(failures[0])
    return dict(json.loads((output / "run.json").read_text(encoding="utf-8")))


def forget_last_run() -> None:
    """Gives back its memory, and takes away its cap."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        drop_workspaces(torch.device("cuda"))
        free_memory(torch.device("cuda"))


def run_row(row: Row, model: Path, output: Path, device: str) -> dict[str, Any]:
    """What a row tells."""
    observed, words = Observed(torch.device(device)), words_of(row, model, output, device)
    record = train([*words, *drawing_words(row)], output, observed)
    found = {"placement": placement_of(record["plan"]), "execution": record["execution"], **observed.report()}
    found["predicted_gib"] = observed.predicted
    if row.kind == "exact":
        other = output.with_name(f"{output.name}-without")
        train([*words_of(row, model, other, device)], other, None)
        losses = [(folder / "losses.jsonl").read_text(encoding="utf-8") for folder in (output, other)]
        same, distance = off_by(output, other)
        found |= {"bit_equal": same and losses[0] == losses[1], "off_by": distance}
    return found


def time_stock(model: Path, lora: Path, output: Path, device: str, num_steps: int = 28) -> dict[str, Any]:
    """The same four pictures by diffusers' pipeline in one call, until they are there and until they are written."""
    forget_last_run()
    observed, dtype = Observed(torch.device(device)), torch.float16 if device == "cuda" else torch.float32
    load = {"torch_dtype": dtype}
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(model / "transformer", **load),
        vae=AutoencoderKL.from_pretrained(model / "vae", **load),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler"),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(lora), weight_name=LORA_FILE)
    with EmbeddingStore(model / "embeddings.parquet") as store:
        rows = [store.read(prompt) for prompt in (*DRAWN, "")]
    embeds, pooled = (
        torch.stack([getattr(row, name) for row in rows]).to(device, dtype)
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    output.mkdir(parents=True, exist_ok=True)
    side = 1024 if device == "cuda" else 64

    count = len(DRAWN)

    def draw(steps: int) -> dict[str, float]:
        start = observed.now()
        pictures = pipeline(
            prompt_embeds=embeds[:-1],
            pooled_prompt_embeds=pooled[:-1],
            negative_prompt_embeds=embeds[-1:].expand(count, -1, -1),
            negative_pooled_prompt_embeds=pooled[-1:].expand(count, -1),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=side,
            width=side,
            generator=torch.Generator(device).manual_seed(0),
        ).images
        drawn = observed.now()
        for place, picture in enumerate(pictures):
            picture.save(output / f"{place}.png")
        return {"unwritten_s": round(drawn - start, 2), "s": round(time.perf_counter() - start, 2)}

    draw(2)
    observed.take_peak()
    return {**draw(num_steps), "reserved_gib": round(observed.take_peak() / GIB, 2)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed, or an exact one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="Where the random model is, or is made.")
    parser.add_argument("--model", default="sd3-medium", help="Which of them.")
    parser.add_argument("--only", nargs="+", help="Rows whose names begin with one of these; stock for the pipeline.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--result", type=Path, help="JSON file to write; what is done stays where it is interrupted.")
    flags = parser.parse_args(argv)
    begun = time.perf_counter()
    flags.models.mkdir(parents=True, exist_ok=True)
    model, output = model_folder(flags.models, flags.model), flags.models / f"validation-{os.getpid()}"
    where = circumstances(torch.device(flags.device), (*VERSIONS, "bitsandbytes"))
    result: dict[str, Any] = {**where, "model": flags.model, "prompts": len(DRAWN), "rows": [], "stock": {}}

    def is_asked(name: str) -> bool:
        return not flags.only or name.startswith(tuple(flags.only))

    def note(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            found = compute()
        except Exception as error:  # the other rows are worth having
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(name, found, f"{time.perf_counter() - start:.0f} s", flush=True)
        return found | {"elapsed_s": round(time.perf_counter() - start, 1)}

    def save() -> None:
        if flags.result:
            write_text_atomically(flags.result, json.dumps(result, indent=1) + "\n")

    try:
        for row in filter(lambda row: is_asked(row.name), rows()):
            if time.perf_counter() - begun > flags.stop_after:
                print(f"stopped before {row.name}", flush=True)
                break
            told = {**asdict(row), "sizes": list(map(str, row.sizes))}
            result["rows"].append(told | note(row.name, partial(run_row, row, model, output, flags.device)))
            save()
            if row.name == "no budget" and is_asked("stock"):
                stock = partial(time_stock, model, output, output / "stock", flags.device)
                result["stock"] = note("stock", stock)
                save()
    except Interrupted as interrupted:
        return 128 + interrupted.number
    told = [*result["rows"], result["stock"]]
    return int(any("failed" in each or each.get("bit_equal") is False for each in told))


if __name__ == "__main__":
    sys.exit(main())
