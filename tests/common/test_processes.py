"""Two processes train what one does with twice the batch."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd3_lora.training.checkpoints import read_state
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT, Prepared, torchrun
from safetensors.torch import load_file
from training_runs import Run, Script, private_copy, train

# No dropout: its masks are each rank's own. float32 AdamW: 8 bits round what differs in the last.
NUMBERS = ["--max_train_steps", 12, "--checkpointing_steps", 7, "--learning_rate", 0.002]
NUMBERS += ["--gradient_accumulation_steps", 2]


@pytest.fixture(scope="module")
def two_ranks(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Run]:
    """torchrun with two ranks of one picture each; the latents are not there yet."""
    folder = tmp_path_factory.mktemp("ranks")
    stage_one = private_copy(prepared, folder / "stage_one")
    shutil.rmtree(stage_one.latents)
    words = [*stage_one.flags, "--device", "cpu", "--output_dir", folder / "out", *NUMBERS]
    result = torchrun(f"{TRAINING_SCRIPT}.py", *words)
    assert result.code == 0, result.out + result.err
    return stage_one, Run(folder / "out", result.out, result.err)


def test_there_are_two_and_only_one_speaks(two_ranks: tuple[Prepared, Run]) -> None:
    _, run = two_ranks
    assert run.out.count("; 2 processes") == 1
    assert run.out.count("5 pictures at 64 px, seed 0") == 1
    assert run.out.count("read back and compared") == 1
    assert run.out.count("next: python inference.py") == 1
    assert run.out.count("train: ") == 1


def test_missing_latents_are_made_once(two_ranks: tuple[Prepared, Run]) -> None:
    stage_one, run = two_ranks
    assert run.out.count(f"{stage_one.latents} holds no latents yet; in a process of its own: python precompute") == 1
    assert run.out.count("wrote 13 crops of 5 pictures") == 1
    assert len(list(stage_one.latents.glob("*.safetensors"))) == 5
    assert not list(stage_one.latents.glob(".*"))


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_the_lora_is_that_of_one_process_with_twice_the_batch(
    script: Script, two_ranks: tuple[Prepared, Run], tmp_path: Path
) -> None:
    stage_one, two = two_ranks
    one = train(script, stage_one, tmp_path / "one", *NUMBERS, "--train_batch_size", 2)
    assert furthest(one.lora, two.lora) < 1e-5
    assert max(tensor.abs().max().item() for name, tensor in one.lora.items() if "lora_B" in name) > 0.005  # it trained
    assert [line["step"] for line in two.losses] == list(range(1, 13))
    for mine, theirs in zip(one.losses, two.losses, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], abs=1e-5)
        assert mine["learning_rate"] == theirs["learning_rate"]
    # The same batch of one picture is another run: the comparison sees the second rank.
    half = train(script, stage_one, tmp_path / "half", *NUMBERS)
    assert furthest(half.lora, two.lora) > 1e-3


def test_one_process_goes_on_where_two_stopped(script: Script, two_ranks: tuple[Prepared, Run], tmp_path: Path) -> None:
    stage_one, two = two_ranks
    checkpoint = two.folder / "checkpoint-7"
    assert len(read_state(checkpoint)["random"]) == 2
    words = [*NUMBERS, "--train_batch_size", 2, "--resume_from_checkpoint", checkpoint]
    run = train(script, stage_one, tmp_path, *words)
    assert furthest(run.lora, two.lora) < 1e-5
    assert furthest(load_file(two.folder / "checkpoint-12" / LORA_FILE), two.lora) == 0


def test_the_ranks_drop_out_different_inputs(two_ranks: tuple[Prepared, Run]) -> None:
    _, run = two_ranks
    first, second = (state["torch"] for state in read_state(run.folder / "checkpoint-7")["random"])
    assert not torch.equal(first, second)


ONE_RANK_IS_TOLD = """
import os, signal, sys
sys.path.insert(0, {project!r})
import torch
import {script} as script
original, count = script.flow_matching_loss, 0
def signalling(*words):
    global count
    count += 1
    if count == 5 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return original(*words)
script.flow_matching_loss = signalling
sys.exit(script.main(sys.argv[1:]))
"""


def test_a_signal_to_one_rank_stops_both_after_a_checkpoint(two_ranks: tuple[Prepared, Run], tmp_path: Path) -> None:
    """In the third step; the ranks agree in the fourth."""
    stage_one, whole = two_ranks
    told = tmp_path / "told.py"
    told.write_text(ONE_RANK_IS_TOLD.format(project=str(PROJECT), script=TRAINING_SCRIPT))
    folder = tmp_path / "out"
    words = [*stage_one.flags, "--device", "cpu", "--output_dir", folder, *NUMBERS]
    result = torchrun(told, *words)
    assert result.code != 0
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-4"]
    assert result.err.count(f"interrupted: {folder / 'checkpoint-4'} is kept; to go on, type `torchrun ") == 1
    result = torchrun(f"{TRAINING_SCRIPT}.py", *words, "--resume_from_checkpoint", "latest")
    assert result.code == 0, result.err
    assert furthest(Run(folder, "", "").lora, whole.lora) == 0
