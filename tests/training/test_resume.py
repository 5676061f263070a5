"""Exact resume: a run that was interrupted, even killed, ends with the very bits of one that was not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sd3_lora.common.run_record import RunIdentity
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.state import Outputs
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT, Prepared
from safetensors.torch import load_file
from training_runs import Flags, Run, Script, patch_loss, private_copy, same_lora, train, use_float16


class Interrupted(BaseException):
    """Stands for a kill where no process is needed: nothing catches it."""


def interrupt(monkeypatch: pytest.MonkeyPatch, micro_step: int) -> None:
    """Ends the run within that micro-step; counted from 1."""

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == micro_step:
            raise Interrupted
        return loss

    patch_loss(monkeypatch, change)


def assert_same_run(left: Path, right: Path, step: int) -> None:
    """The LoRA, every tensor and number of the last checkpoint, and the loss log, bit for bit."""
    assert same_lora(left / LORA_FILE, right / LORA_FILE)
    assert (left / LORA_FILE).read_bytes() == (right / LORA_FILE).read_bytes()  # the metadata's order too
    for name in ("state.safetensors", "state.json"):
        assert (left / f"checkpoint-{step}" / name).read_bytes() == (right / f"checkpoint-{step}" / name).read_bytes()
    assert (left / "losses.jsonl").read_bytes() == (right / "losses.jsonl").read_bytes()
    assert len((left / "losses.jsonl").read_text().splitlines()) == step


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as this process, for the same bits
import {script} as script
original, count = script.flow_matching_loss, 0
def killing(*words):
    global count
    count += 1
    if count == 12:  # the second micro-batch of step 6
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*words)
script.flow_matching_loss = killing
script.main(sys.argv[1:])
"""


def test_a_killed_run_ends_with_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit Adam with truly 8-bit state (4,096 elements and more), dropout and accumulation."""
    words = ["--rank", 16, "--use_8bit_adam", "--lora_dropout", 0.3, "--gradient_accumulation_steps", 2]
    words += ["--max_train_steps", 12, "--checkpointing_steps", 5, "--learning_rate", 0.01]
    whole = train(script, prepared, tmp_path / "whole", *words)

    folder = tmp_path / "killed"
    command = [*prepared.flags, "--device", "cpu", "--output_dir", folder, *words]
    result = subprocess.run(
        [sys.executable, "-c", KILLED.format(script=TRAINING_SCRIPT), *map(str, command)],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-5"]
    assert not (folder / LORA_FILE).exists()
    assert len((folder / "losses.jsonl").read_text().splitlines()) == 5

    torch.manual_seed(12345)  # nothing may depend on what this process drew
    resumed = train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert f"resumed from {folder / 'checkpoint-5'}: step 5 of 12" in resumed.out
    assert_same_run(whole.folder, folder, 12)

    saved = load_file(folder / "checkpoint-12" / "state.safetensors")
    eight_bit = [name for name, tensor in saved.items() if name.endswith(("/state1", "/state2"))]
    assert all(saved[name].dtype == torch.uint8 and saved[name].numel() >= 4096 for name in eight_bit)
    assert len(eight_bit) == 2  # of the whole LoRA, as one tensor
    before = load_file(folder / "checkpoint-5" / "state.safetensors")
    assert not any(torch.equal(saved[name], before[name]) for name in eight_bit)


@pytest.mark.parametrize("interrupted_at", [9, 11])
@pytest.mark.parametrize(
    "schedule",
    [
        ["--lr_scheduler", "cosine", "--lr_warmup_steps", 3],
        ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:6,0.5:9,0.1"],
    ],
    ids=["cosine", "piecewise"],
)
def test_adamw_in_float32(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: list[Any],
    interrupted_at: int,
) -> None:
    """At 11 the log is three lines ahead of the checkpoint, and is cut back."""
    words = ["--max_train_steps", 12, "--checkpointing_steps", 7, "--learning_rate", 0.01, "--lora_dropout", 0.2]
    words += ["--train_batch_size", 2, *schedule]
    whole = train(script, prepared, tmp_path / "whole", *words)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt(patch, interrupted_at)
        with pytest.raises(Interrupted):
            train(script, prepared, folder, *words)
    assert len((folder / "losses.jsonl").read_text().splitlines()) == (7 if interrupted_at == 9 else 10)
    train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, folder, 12)
    rates = [line["learning_rate"] for line in whole.losses]
    assert len(set(rates)) >= 3
    assert_same_run(whole.folder, folder, 12)


def test_fp16_with_its_scaler(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_float16(monkeypatch)
    words = ["--max_train_steps", 6, "--checkpointing_steps", 3]
    whole = train(script, prepared, tmp_path / "whole", *words)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(Interrupted):
            train(script, prepared, folder, *words)
    assert read_state(folder / "checkpoint-3")["scaler"]["scale"] > 1
    train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, folder, 6)


def test_a_finished_run_is_a_no_op(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path)
    before = snapshot(tmp_path)
    for steps in (3, 2):  # as many as there are, or fewer
        again = train(script, prepared, tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", steps)
        assert "nothing to do: " in again.out
        assert snapshot(tmp_path) == before
    assert len(run.losses) == 3


def test_never_more_than_max_train_steps(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five pictures, windows of 4: neither a pass nor a resume rounds up."""
    steps: list[int] = []
    patch_loss(monkeypatch, lambda number, loss: (steps.append(number), loss)[1])
    words = ["--gradient_accumulation_steps", 4, "--checkpointing_steps", 2]
    train(script, prepared, tmp_path, *words, "--max_train_steps", 3)
    assert len(steps) == 3 * 4
    longer = train(script, prepared, tmp_path, *words, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert len(steps) == 4 * 4
    assert [line["step"] for line in longer.losses] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 4)]


def test_a_longer_run_is_what_it_would_have_been(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    whole = train(script, prepared, tmp_path / "whole", "--max_train_steps", 5)
    train(script, prepared, tmp_path / "grown")
    train(script, prepared, tmp_path / "grown", "--max_train_steps", 5, "--resume_from_checkpoint", "checkpoint-3")
    assert_same_run(whole.folder, tmp_path / "grown", 5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_schedule_that_has_ended_does_not_jump(
    script: Script, prepared: Prepared, tmp_path: Path, schedule: str
) -> None:
    """A longer run is refused, with the steps of then; not while it warms up, as a longer run does too."""
    words = ["--lr_scheduler", schedule, "--lr_warmup_steps", 2, "--resume_from_checkpoint"]
    train(script, prepared, tmp_path, *words, "latest", "--checkpointing_steps", 1)
    before = snapshot(tmp_path)
    longer = train(script, prepared, tmp_path, *words, "latest", "--max_train_steps", 6, code=2)
    assert (
        f"checkpoint-3 was trained with --lr_scheduler {schedule} over 3 steps; over 6 its learning rate would jump "
    ) in longer.error
    assert longer.error.endswith(": type --max_train_steps 3, or give another --output_dir for a new run")
    ended = train(script, prepared, tmp_path, *words, "latest")
    assert f"nothing to do: 3 steps were asked for; --lr_scheduler {schedule} has come to its end" in ended.out
    assert snapshot(tmp_path) == before
    whole = train(script, prepared, tmp_path / "whole", *words, "latest", "--max_train_steps", 6)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "warm")
    grown = train(script, prepared, tmp_path / "grown", *words, tmp_path / "warm", "--max_train_steps", 6)
    assert same_lora(whole.folder / LORA_FILE, grown.folder / LORA_FILE)


def test_another_programs_checkpoint(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """It is neither passed over, to start at step 0, nor replaced by a new run."""
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    (foreign / "optimizer.bin").touch()
    for words in (["--resume_from_checkpoint", "latest"], []):
        run = train(script, prepared, tmp_path, *words, code=2)
        assert run.error.startswith(f"{foreign} is not a checkpoint of this project")
    assert list(tmp_path.iterdir()) == [foreign]


def test_latest_where_there_is_none_starts(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "new", "--resume_from_checkpoint", "latest")
    plain = train(script, prepared, tmp_path / "plain")
    assert "resumed from" not in run.out
    assert_same_run(plain.folder, run.folder, 3)


def test_what_an_unfinished_run_logged_is_not_kept(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """A run that died before its first checkpoint leaves a log."""
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo')
    assert [line["step"] for line in train(script, prepared, tmp_path).losses] == [1, 2, 3]


def test_a_checkpoint_of_another_folder(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--max_train_steps", 5, "--checkpointing_steps", 3]
    whole = train(script, prepared, tmp_path / "whole", *words)
    outside = tmp_path / "kept" / "my checkpoint"
    shutil.copytree(whole.folder / "checkpoint-3", outside)
    new = train(script, prepared, tmp_path / "new", *words, "--resume_from_checkpoint", outside)
    assert f"resumed from {outside}: step 3 of 5" in new.out
    assert same_lora(whole.folder / LORA_FILE, new.folder / LORA_FILE)
    assert new.losses == whole.losses[3:]
    assert [path.name for path in new.folder.glob("checkpoint-*")] == ["checkpoint-5"]


def test_an_unknown_checkpoint(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "out", "--resume_from_checkpoint", "checkpoint-9", code=2)
    assert run.error == (
        f"--resume_from_checkpoint checkpoint-9 is not there; {tmp_path / 'out'} holds none: type latest or a path"
    )
    assert not run.folder.exists()
    (tmp_path / "empty").mkdir()
    run = train(script, prepared, tmp_path / "out", "--resume_from_checkpoint", tmp_path / "empty", code=2)
    assert "empty is not a whole checkpoint of this project" in run.error


def test_earlier_checkpoints_are_not_mixed_with_a_new_run(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path)
    before = snapshot(tmp_path)
    run = train(script, prepared, tmp_path, "--max_train_steps", 5, code=2)
    assert run.error == (
        f"{tmp_path} holds checkpoint-3 of an earlier run: add --resume_from_checkpoint latest to go on, "
        "or give another --output_dir"
    )
    assert snapshot(tmp_path) == before


def test_a_limit_on_checkpoints(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--max_train_steps", 7, "--checkpointing_steps", 2]
    assert checkpoints(train(script, prepared, tmp_path / "all", *words)) == [2, 4, 6, 7]
    limited = train(script, prepared, tmp_path / "two", *words, "--checkpoints_total_limit", 2)
    assert checkpoints(limited) == [6, 7]
    assert checkpoints(train(script, prepared, tmp_path / "one", *words, "--checkpoints_total_limit", 1)) == [7]


def checkpoints(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.folder.glob("checkpoint-*"))


# A flag, how the checkpoint was trained, and what to type to go on.
OTHER_RUN: list[tuple[list[Any], str, str]] = [
    (["--rank", 8], "with --rank 4, not 8", "type --rank 4"),
    (["--lora_alpha", 2], "with --lora_alpha 4.0, not 2.0", "type --lora_alpha 4.0"),
    (["--lora_dropout", 0.1], "with --lora_dropout 0.0, not 0.1", "type --lora_dropout 0.0"),
    (["--lora_layers", "attn.to_k"], "without --lora_layers", "leave --lora_layers out"),
    (["--lora_blocks", "1"], "without --lora_blocks", "leave --lora_blocks out"),
    (["--use_8bit_adam"], "without --use_8bit_adam", "leave --use_8bit_adam out"),
    (
        ["--train_batch_size", 2],
        "with 1 picture in a micro-batch of all processes, not 2",
        "type --train_batch_size 1",
    ),
    (
        ["--gradient_accumulation_steps", 2],
        "with --gradient_accumulation_steps 1, not 2",
        "type --gradient_accumulation_steps 1",
    ),
    (
        ["--weighting_scheme", "mode"],
        "with --weighting_scheme logit_normal, not mode",
        "type --weighting_scheme logit_normal",
    ),
    (["--precondition_outputs"], "without --precondition_outputs", "leave --precondition_outputs out"),
    (["--timestep_shift", 1], "without --timestep_shift", "leave --timestep_shift out"),
    (["--prior_term", "prediction"], "without --prior_term", "leave --prior_term out"),
    (["--logit_mean", 1], "with --logit_mean 0.0, not 1.0", "type --logit_mean 0.0"),
    (["--mixed_precision", "bf16"], "with --mixed_precision no, not bf16", "type --mixed_precision no"),
    (["--seed", 1], "with --seed 0, not 1", "type --seed 0"),
    (
        ["--center_crop"],
        "on other crops of 00.png, 02.png, 03.png, 04.png",
        "type the --num_crops, --center_crop, --random_flip, --num_augmented and --bucket_ flags of then",
    ),
    (
        ["--instance_prompt", "a photo of a robot"],
        "with another caption of 00.png, 01.png, 02.png, 03.png, 04.png",
        "give the captions of then (--instance_prompt, or the text files)",
    ),
    (["--learning_rate", 1e-3], "with --learning_rate 0.0001, not 0.001", "type --learning_rate 0.0001"),
    (["--lr_scheduler", "linear"], "with --lr_scheduler constant, not linear", "type --lr_scheduler constant"),
    (["--adam_beta1", 0.8], "with --adam_beta1 0.9, not 0.8", "type --adam_beta1 0.9"),
    (["--max_grad_norm", 2], "with --max_grad_norm 1.0, not 2.0", "type --max_grad_norm 1.0"),
]


@pytest.fixture(scope="module")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, which the tests that are given it must not change."""
    import importlib

    folder = tmp_path_factory.mktemp("finished")
    words = [*prepared.flags, "--device", "cpu", "--output_dir", folder, "--max_train_steps", 1]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in words]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "before", "remedy"), OTHER_RUN, ids=[" ".join(map(str, case[0])) for case in OTHER_RUN]
)
def test_what_decides_the_numbers_must_not_change(
    script: Script, prepared: Prepared, finished: Path, words: list[Any], before: str, remedy: str
) -> None:
    left = snapshot(finished)
    run = train(script, prepared, finished, *words, "--resume_from_checkpoint", "latest", code=2)
    assert run.error == (
        f"{finished / 'checkpoint-1'} was trained {before}: {remedy} to go on, "
        "or give another --output_dir for a new run"
    )
    assert snapshot(finished) == left


def test_all_changes_are_named_at_once(script: Script, prepared: Prepared, finished: Path) -> None:
    words = ["--resume_from_checkpoint", "latest", "--rank", 8, "--precondition_outputs"]
    run = train(script, prepared, finished, *words, code=2)
    assert "was trained with --rank 4, not 8, and without --precondition_outputs: type --rank 4, leave " in run.error


def test_other_pictures_are_named(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """One removed, one added, one with another caption; an earlier build noted no more than a hash."""
    private = private_copy(prepared, tmp_path / "stage_one")
    words = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5]
    folder = tmp_path / "out"
    (private.pictures / "03.png").rename(tmp_path / "03.png")
    train(script, private, folder)
    (private.pictures / "04.png").unlink()
    (tmp_path / "03.png").rename(private.pictures / "new dog.png")
    (private.pictures / "00.txt").write_text("a photo of a robot")
    changed = train(script, private, folder, *words, code=2)
    assert "was trained without new dog.png, also on 04.png, with another caption of 00.png: take out " in changed.error
    (folder / "checkpoint-3" / "pictures.json").unlink()
    old = train(script, private, folder, *words, code=2)
    assert "was trained on other pictures, captions or crops, of which it notes no more than a hash: " in old.error


def test_renamed_pictures_are_the_same_run(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Only what is in them counts."""
    private = private_copy(prepared, tmp_path / "stage_one")
    folder = tmp_path / "out"
    whole = train(script, private, tmp_path / "whole", "--max_train_steps", 5)
    train(script, private, folder)
    for number, path in enumerate(sorted(private.pictures.iterdir(), reverse=True)):
        path.rename(path.with_name(f"robot {number}.png"))
    train(script, private, folder, "--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    assert_same_run(whole.folder, folder, 5)


def test_a_drawn_seed_is_kept(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    assert prepared.flags[-2:] == ["--seed", 0]
    unseeded = Flags(prepared.flags[:-2])
    first = train(script, unseeded, tmp_path / "drawn")
    (seed,) = re.findall(r"px, seed (\d+)\n", first.out)
    assert read_state(first.folder / "checkpoint-3")["signature"]["--seed"] == int(seed)
    longer = train(script, unseeded, first.folder, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert f"px, seed {seed}\n" in longer.out
    whole = train(script, unseeded, tmp_path / "whole", "--max_train_steps", 5, "--seed", seed)
    assert_same_run(whole.folder, longer.folder, 5)


def test_a_broken_checkpoint(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path)
    state = tmp_path / "checkpoint-3" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    run = train(script, prepared, tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", 5, code=2)
    assert f"{tmp_path / 'checkpoint-3'} is not a whole checkpoint" in run.error


def test_another_transformer(script: Script, prepared: Prepared, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tmp_path / "other"
    shutil.copytree(prepared.model, model)
    (weights,) = (model / "transformer").glob("*.safetensors")
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    other = Prepared(model, prepared.pictures, prepared.embeddings, prepared.latents)
    run = train(script, other, finished, "--resume_from_checkpoint", "latest", code=2)
    assert (
        f"was trained on other weights of the transformer than this command's (its model was {prepared.model.name}): "
        "give those as --pretrained_model_name_or_path to go on"
    ) in run.error


def test_more_processes_than_before(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint of one process with a batch of 2 is one of two with 1 each; the second has no dropout state yet."""
    run = train(script, prepared, tmp_path, "--train_batch_size", 2)
    loaded: list[Any] = []
    training = SimpleNamespace(load_state_dict=loaded.append, learning_rates=lambda _: [1e-4], trained_steps={})
    folder = run.folder / "checkpoint-3"
    record = SimpleNamespace(identity=RunIdentity(read_state(folder)["signature"]))
    outputs = Outputs(tmp_path, record, None)
    for rank in (0, 1):
        accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
        outputs.load_checkpoint(folder, read_state(folder), training, accelerator)
    assert [state["step"] for state in loaded] == [3, 3]


def test_the_checkpoint_is_plain(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """JSON and safetensors; LoRA, optimizer, schedule, scaler, every random state and the data order are in it."""
    run = train(script, prepared, tmp_path)
    folder = run.folder / "checkpoint-3"
    assert sorted(path.name for path in folder.iterdir()) == [
        "pictures.json",
        LORA_FILE,
        "run.json",
        "state.json",
        "state.safetensors",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # read by all who may, as the umask has it
    json.loads((folder / "state.json").read_text())
    state = read_state(folder)
    assert state["step"] == 3
    assert len(state["lora"]) == 30
    assert {"lr_scheduler", "optimizer", "scaler", "draws", "order", "random", "signature"} <= set(state)
    assert state["order"]["position"] == 3
    assert len(state["order"]["permutation"]) == 5
    assert state["random"][0]["torch"].dtype == torch.uint8
