"""On a GPU whose memory runs out in mid-run: the run goes on with a cheaper plan, and ends with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import Prepared
from training_runs import Run, Script, same_lora, training_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def uncapped() -> Iterator[None]:
    """Other tests may use the whole GPU again."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def all_taken() -> Iterator[None]:
    """Inside the block torch's allocator has nothing left, and gets no more from the driver."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    whole_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / whole_bytes)
    taken, size = [], 2**30
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        yield
    finally:
        taken.clear()


def train_on_gpu(script: Script, prepared: Prepared, folder: Path, *words: object) -> Run:
    shared: list[object] = ["--device", "cuda", "--max_train_steps", 6, "--checkpointing_steps", 2, "--seed", 3]
    shared += ["--output_dir", folder]
    result = script("train_dreambooth_sd3_lora_miniature", *prepared.flags, *shared, "--deterministic", "on", *words)
    assert result.code == 0, result.out + result.err
    return Run(folder, result.out, result.err)


@pytest.mark.parametrize(("capture", "at"), [("off", 1), ("off", 4), ("auto", 1)])
def test_memory_that_is_taken_costs_a_cheaper_plan_and_no_number(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: str, at: int
) -> None:
    whole = train_on_gpu(script, prepared, tmp_path / "whole", "--capture", capture)
    module, taken = training_script(), list[int]()
    accumulate = module.accumulate

    def with_less(training: Any, *given: Any) -> Any:
        if training.step == at and not taken:
            taken.append(at)
            with all_taken():
                return accumulate(training, *given)
        return accumulate(training, *given)

    monkeypatch.setattr(module, "accumulate", with_less)
    run = train_on_gpu(script, prepared, tmp_path / "run", "--capture", capture)
    assert run.out.count("note: the GPU's memory ran out at step ") == 1
    assert run.out.count("\nplan: ") == 2
    assert run.losses == whole.losses
    assert same_lora(run.folder / LORA_FILE, whole.folder / LORA_FILE)
