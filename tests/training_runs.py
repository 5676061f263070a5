"""Training runs on the tiny model, for the tests: start one, look at what it left, break something in it."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sd3_lora.common.checksums import CHECKSUMS_KEY
from sd3_lora.common.devices import ChosenDtype
from sd3_lora.common.records import StepInputs
from sd3_lora.training.micro_batches import MicroBatches
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Script = Callable[..., Result]


@dataclass(frozen=True)
class Run:
    """A training run: its folder, and what it printed."""

    folder: Path
    out: str
    err: str

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The lines of losses.jsonl."""
        return [json.loads(line) for line in (self.folder / "losses.jsonl").read_text().splitlines()]

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        """The LoRA file's tensors."""
        return load_file(self.folder / LORA_FILE)

    @property
    def error(self) -> str:
        """The one sentence of a run that was refused, which has written nothing that looks like a result."""
        sentences = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, self.err
        assert self.err.splitlines()[-1] == sentences[0]
        assert "Traceback" not in self.err
        return sentences[0].removeprefix("error: ")

    def wrote_no_weights(self) -> bool:
        """Whether there is neither a LoRA nor a checkpoint, finished or not."""
        return not list(self.folder.glob("**/*.safetensors*")) and not list(self.folder.glob("*checkpoint*"))


@dataclass(frozen=True)
class Flags:
    """Other flags than those of a finished stage one."""

    flags: list[object]


def same_lora(left: Path, right: Path) -> bool:
    """Whether two LoRA files hold the same bits; safetensors writes its metadata in any order."""
    tensors, others = load_file(left), load_file(right)
    assert tensors.keys() == others.keys()
    with safe_open(left, "pt") as mine, safe_open(right, "pt") as theirs:
        without = [
            {key: text for key, text in each.metadata().items() if key != CHECKSUMS_KEY} for each in (mine, theirs)
        ]
        assert without[0] == without[1]
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


def write_again(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    """Writes a safetensors file as an earlier build did, without checksums; other tensors and metadata if given."""
    with safe_open(path, "pt") as handle:
        kept = {key: text for key, text in (handle.metadata() or {}).items() if key != CHECKSUMS_KEY}
    save_file(load_file(path) if tensors is None else tensors, path, {**kept, **metadata})


def train(script: Script, stage_one: Prepared | Flags, folder: Path, *words: object, code: int = 0) -> Run:
    """Runs training on a CPU with some flags, 3 steps unless told; checks its exit code."""
    shared = ["--device", "cpu", "--max_train_steps", 3, "--output_dir", folder]
    result = script(TRAINING_SCRIPT, *stage_one.flags, *shared, *words)
    assert result.code == code, result.out + result.err
    return Run(folder, result.out, result.err)


def training_script() -> ModuleType:
    return importlib.import_module(TRAINING_SCRIPT)


def private_copy(prepared: Prepared, folder: Path) -> Prepared:
    """A copy of the finished stage one that a test may break."""
    shutil.copytree(prepared.pictures, folder / "pictures")
    shutil.copytree(prepared.latents, folder / "latents")
    shutil.copy(prepared.embeddings, folder / "embeddings.parquet")
    return Prepared(prepared.model, folder / "pictures", folder / "embeddings.parquet", folder / "latents")


def patch_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Every loss becomes `change(number of the micro-step from 1, loss)`."""
    original, count = training_script().flow_matching_loss, 0

    def patched(*words: Any, **more: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return change(count, original(*words, **more))

    monkeypatch.setattr(training_script(), "flow_matching_loss", patched)


def use_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 with its scaler, which the script never chooses on a CPU."""
    chosen = ChosenDtype(torch.float16, "fp16: for a test")
    monkeypatch.setattr(training_script(), "choose_training_dtype", lambda *_: chosen)


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepInputs, list[str]]]:
    """The inputs of every micro-step to come, and its pictures' names."""
    seen: list[tuple[StepInputs, list[str]]] = []
    original = MicroBatches.take

    def watching(batches: MicroBatches) -> Any:
        taken = original(batches)
        seen.append((taken[0].inputs, taken[0].names))
        return taken

    monkeypatch.setattr(MicroBatches, "take", watching)
    return seen


def fail_in(
    monkeypatch: pytest.MonkeyPatch, calls: Container[int], fail: Callable[[], object], after: bool = False
) -> None:
    """Has calls of the training script's `accumulate`, by their numbers from 1, fail before or after their work."""
    module, counted = training_script(), itertools.count(1)
    accumulate = module.accumulate

    def failing(*given: Any) -> Any:
        number = next(counted)
        done = accumulate(*given) if after or number not in calls else None
        if number in calls:
            fail()
        return done

    monkeypatch.setattr(module, "accumulate", failing)
