"""Every optimizer that `--optimizer` names: its library's numbers, its bytes, exact resume, the scaler, bad input."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3_lora.training.checkpoints import read_state, write_state
from sd3_lora.training.optimizer import bytes_per_parameter, make_optimizer, optimizer_step, rate_in_force
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.optimizer_kinds import KINDS, SCHEDULE_FREE_ADAMW, OptimizerKind, find_kind
from sd3_lora.training.schedule_free import averaged_weights
from sd3_lora.training.trainables import Trainables, TrainedGroup
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared, torchrun
from safetensors.torch import load_file
from small_transformer import GPU, needs_gpu
from training_runs import Run, Script, same_lora, train, write_again

NAMES = [kind.name for kind in KINDS]
SHAPES = ((16, 300), (500, 16), (16, 128))  # a LoRA's; more than 4,096 numbers, from which on a state is in 8 bits


class Small:
    """A LoRA-like set of matrices, pulled towards targets by an optimizer of ours."""

    def __init__(self, name: str, scaled: bool = False, **options: Any):
        generator = torch.Generator().manual_seed(0)
        self.parts = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.parts[1].data.zero_()  # as lora_B
        self.targets = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.config = OptimizerConfig(optimizer=name, **options)
        flat = flatten_parameters(self.parts)
        self.trainables = Trainables([TrainedGroup("transformer", flat, self.config.rate, tuple(self.parts))])
        self.optimizer, self.schedule = make_optimizer(self.config, self.trainables, 20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)

    def backward(self, parts: list[torch.nn.Parameter], factor: float = 1.0) -> None:
        losses = [((part - target) ** 2).sum() for part, target in zip(parts, self.targets, strict=True)]
        self.scaler.scale(factor * torch.stack(losses).sum()).backward()

    def step(self, factor: float = 1.0) -> bool:
        """Whether the scaler skipped it."""
        self.backward(self.parts, factor)
        _, skipped = optimizer_step(self.trainables, self.optimizer, self.scaler, 1e9)
        if not skipped:
            self.schedule.step()
        return bool(skipped)

    @property
    def weights(self) -> torch.Tensor:
        return self.trainables.parameters[0].detach().clone()


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Every tensor in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_name_in_any_spelling(kind: OptimizerKind) -> None:
    for spelling in (kind.name, kind.name.upper(), kind.name.replace("_", ""), kind.name.replace("_", "-")):
        assert find_kind(spelling) is kind
        assert OptimizerConfig(optimizer=spelling).identity() == OptimizerConfig(optimizer=kind.name).identity()
    assert find_kind(f"{kind.name}2") is None
    assert find_kind("AdamWScheduleFree") is SCHEDULE_FREE_ADAMW


def reference(name: str, parts: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The library's own, tensor by tensor, with diffusers' or the library's defaults written out."""
    import bitsandbytes.optim as bnb
    from prodigyopt import Prodigy
    from schedulefree import AdamWScheduleFree
    from transformers.optimization import Adafactor

    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "AdamW": lambda: torch.optim.AdamW(parts, 1e-4, (0.9, 0.999), 1e-8, weight_decay=1e-4),
        "adafactor": lambda: Adafactor(
            parts, 1e-4, beta1=None, weight_decay=1e-4, scale_parameter=False, relative_step=False
        ),
        "prodigy": lambda: Prodigy(
            parts, 1.0, (0.9, 0.999), None, 1e-8, 1e-4, True, use_bias_correction=True, safeguard_warmup=True
        ),
        "schedule_free_adamw": lambda: AdamWScheduleFree(parts, 1e-4, (0.9, 0.999), 1e-8, 1e-4),
        "adamw_8bit": lambda: bnb.AdamW8bit(parts, 1e-4, (0.9, 0.999), 1e-8, 1e-4),
        "paged_adamw_8bit": lambda: bnb.AdamW8bit(parts, 1e-4, (0.9, 0.999), 1e-8, 1e-4),
        "ademamix_8bit": lambda: bnb.AdEMAMix8bit(parts, 1e-4, (0.9, 0.999, 0.9999), 5.0, eps=1e-8, weight_decay=1e-4),
        "lion_8bit": lambda: bnb.Lion8bit(parts, 1e-4, (0.9, 0.99), 1e-4),
    }
    return makers[name]()


@pytest.mark.parametrize("name", NAMES)
def test_its_numbers_are_the_librarys(name: str) -> None:
    """Bit for bit; the 8-bit ones with their blocks cut where the flat tensor's are, Prodigy's sums to rounding."""
    ours = Small(name)
    one_tensor = name.endswith("8bit")
    start = ours.weights
    theirs = [start] if one_tensor else ours.parts
    theirs = [torch.nn.Parameter(tensor.detach().clone()) for tensor in theirs]
    optimizer = reference(name, theirs)
    if name == "schedule_free_adamw":
        optimizer.train()  # type: ignore[attr-defined]
    targets = [torch.cat([target.flatten() for target in ours.targets])] if one_tensor else ours.targets
    for _ in range(5):
        ours.step()
        torch.stack(
            [((part - target) ** 2).sum() for part, target in zip(theirs, targets, strict=True)]
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.cat([part.detach().flatten() for part in theirs])
    assert not torch.equal(ours.weights, start)
    if name == "prodigy":
        assert torch.allclose(ours.weights, found, rtol=1e-5, atol=1e-8)
    else:
        assert torch.equal(ours.weights, found)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_what_a_trained_number_takes(kind: OptimizerKind) -> None:
    """The plan's figure: parameter, gradient, and the state as it is after a step; an eighth of a byte for scales."""
    small = Small(kind.name)
    small.step()
    state = {
        (index, name): tensor
        for index, values in enumerate(small.optimizer.state.values())
        for name, tensor in values.items()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not name.startswith("qmap")
    }
    measured = sum(tensor.nbytes for tensor in state.values()) / small.trainables.numel
    planned = kind.state_bytes + kind.state_bytes_over_rank / 16
    assert measured <= planned <= measured + 0.125
    expected = 8 + planned + kind.step_bytes
    assert bytes_per_parameter(small.config, torch.bfloat16, 16) == pytest.approx(expected)
    undone = 4 + planned if kind.can_undo else 0
    assert bytes_per_parameter(small.config, torch.float16, 16) == pytest.approx(expected + undone)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Through a checkpoint's files."""
    whole = Small(name)
    for _ in range(3):
        whole.step()
    write_state(tmp_path, {"optimizer": whole.optimizer.state_dict(), "weights": whole.weights})
    resumed, state = Small(name), read_state(tmp_path)
    resumed.trainables.parameters[0].data.copy_(state["weights"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    for _ in range(3):
        whole.step()
        resumed.step()
    assert torch.equal(whole.weights, resumed.weights)
    states = [tensors_of(small.optimizer.state_dict()) for small in (whole, resumed)]
    assert len(states[0]) == len(states[1]) > 0
    assert all(map(torch.equal, *states))
    assert rate_in_force(whole.optimizer) == rate_in_force(resumed.optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_the_scaler_skips_leaves_no_trace(name: str) -> None:
    plain, skipping = Small(name, scaled=True), Small(name, scaled=True)
    for number in range(5):
        assert not plain.step()
        if number in (0, 3):
            before = skipping.weights
            assert skipping.step(math.inf)
            assert torch.equal(skipping.weights, before)
        assert not skipping.step()
    assert torch.equal(plain.weights, skipping.weights)
    assert rate_in_force(plain.optimizer) == rate_in_force(skipping.optimizer)
    states = [tensors_of(small.optimizer.state_dict()) for small in (plain, skipping)]
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_ranks_is_what_it_sees(name: str) -> None:
    one, two = Small(name), Small(name)
    for _ in range(3):
        one.step()
        two.backward(two.parts, 4.0)
        two.trainables.reduce(lambda gradient: gradient / 4)
        optimizer_step(two.trainables, two.optimizer, two.scaler, 1e9)
    assert torch.equal(one.weights, two.weights)


@pytest.mark.parametrize("name", NAMES)
def test_the_logged_rate_moves_the_weights(name: str) -> None:
    """The first step of an Adam, and every one of Lion, is the rate for each number; Adafactor's at most."""
    small = Small(name, adam_weight_decay=0.0)
    before, rate = small.weights, rate_in_force(small.optimizer)
    small.step()
    moved = (small.weights - before).abs()
    assert rate == (1e-6 if name == "prodigy" else 1e-4)
    if name == "adafactor":
        assert moved.mean().item() == pytest.approx(rate, rel=0.5)
    else:
        # AdEMAMix: its slow moment adds 5 × (1 - 0.9999) before the correction of the bias.
        assert moved.median().item() == pytest.approx(rate, rel=0.02)


# Schedule-free


def test_the_average_is_the_librarys_eval_mode_and_leaves_no_trace() -> None:
    small, other = Small("schedule_free_adamw", learning_rate=0.1), Small("schedule_free_adamw", learning_rate=0.1)
    with averaged_weights(small.optimizer):  # before the first step there is none
        assert torch.equal(small.weights, other.weights)
    for _ in range(6):
        small.step()
        other.step()
    before = small.weights
    with contextlib.suppress(KeyError), averaged_weights(small.optimizer):
        averaged = small.weights
        assert torch.equal(torch.cat([part.detach().flatten() for part in small.parts]), averaged)
        raise KeyError  # as a disk that is full
    assert torch.equal(small.weights, before)
    other.optimizer.eval()  # type: ignore[attr-defined]
    assert torch.equal(averaged, other.weights)
    assert (averaged - before).abs().max() > 0.01
    other.optimizer.train()  # type: ignore[attr-defined]
    assert not torch.equal(other.weights, before)  # why it is not used
    assert torch.equal(small.weights, before)


def test_other_optimizers_have_no_average() -> None:
    small = Small("AdamW")
    small.step()
    before = small.weights
    with averaged_weights(small.optimizer):
        assert torch.equal(small.weights, before)


# By the script

LONG = ["--rank", 16, "--lora_dropout", 0.3, "--gradient_accumulation_steps", 2, "--max_train_steps", 6]
RATES: dict[str, list[Any]] = {"prodigy": [], "schedule_free_adamw": ["--lr_scheduler", "constant_with_warmup"]}


def words_of(name: str) -> list[Any]:
    words = RATES.get(name, ["--learning_rate", 0.01, "--lr_scheduler", "piecewise_constant"])
    rules = ["--lr_step_rules", "1:4,0.5"] if "piecewise_constant" in words else []
    warmup = ["--lr_warmup_steps", 2, "--learning_rate", 0.01] if "constant_with_warmup" in words else []
    return ["--optimizer", name, *words, *rules, *warmup]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Path, name: str
) -> None:
    words = [*LONG, *words_of(name), "--checkpointing_steps", 4]
    whole = train(script, prepared, tmp_path / "whole", *words)
    once = train(script, prepared, tmp_path / "once", *words[:-2], "--checkpointing_steps", 100)
    assert same_lora(whole.folder / LORA_FILE, once.folder / LORA_FILE)  # saving changes nothing
    torch.manual_seed(12345)
    words += ["--resume_from_checkpoint", whole.folder / "checkpoint-4"]
    resumed = train(script, prepared, tmp_path / "resumed", *words)
    assert "step 4 of 6" in resumed.out
    for name_of_file in ("state.safetensors", "state.json"):
        files = [run.folder / "checkpoint-6" / name_of_file for run in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert same_lora(whole.folder / LORA_FILE, resumed.folder / LORA_FILE)
    assert resumed.losses == whole.losses[4:]
    before = load_file(whole.folder / "checkpoint-4" / LORA_FILE)
    assert any(not torch.equal(whole.lora[key], before[key]) for key in before)


def test_prodigy_logs_what_moves_the_weights(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--optimizer", "prodigy", "--learning_rate", 0.9, "--train_batch_size", 2, "--checkpointing_steps", 1]
    run = train(script, prepared, tmp_path, *words, "--max_train_steps", 26)
    rates = [line["learning_rate"] for line in run.losses]
    states = [read_state(run.folder / f"checkpoint-{step}") for step in range(1, 26)]
    assert rates == [0.9e-6, *(0.9 * state["optimizer"]["param_groups"][0]["d"] for state in states)]
    assert rates[-1] > 1.2 * rates[0]
    assert "prodigy, learning rate 0.9 constant" in run.out
    assert "Using decoupled" not in run.out


def test_a_schedule_free_lora_is_of_the_averaged_weights(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """In the folder and in each checkpoint, whose state has the weights that are trained."""
    words = ["--optimizer", "schedule_free_adamw", "--learning_rate", 0.05, "--lora_blocks", 0]
    run = train(script, prepared, tmp_path, *words, "--lora_layers", "attn.to_k", "--checkpointing_steps", 2)
    for step, folder in ((2, run.folder / "checkpoint-2"), (3, run.folder)):
        state = read_state(run.folder / f"checkpoint-{step}")
        trained = torch.cat([tensor.flatten() for tensor in state["lora"].values()])
        z = state["optimizer"]["state"][0]["z"]
        saved = torch.cat([load_file(folder / LORA_FILE)[f"transformer.{name}"].flatten() for name in state["lora"]])
        assert torch.allclose(saved, trained.lerp(z, 1 - 1 / 0.9), atol=1e-6)
        assert (saved - trained).abs().max() > 1e-4


def test_two_processes_train_what_one_does_with_twice_the_batch(
    script: Script, prepared: Prepared, tmp_path: Path
) -> None:
    """Prodigy, whose estimate each process makes for itself, of the gradient's mean."""
    words = [*words_of("prodigy"), "--max_train_steps", 4]
    flags = [*prepared.flags, "--device", "cpu", "--output_dir", tmp_path / "two", *words]
    result = torchrun(f"{TRAINING_SCRIPT}.py", *flags)
    assert result.code == 0, result.out + result.err
    one = train(script, prepared, tmp_path / "one", *words, "--train_batch_size", 2)
    two = Run(tmp_path / "two", result.out, result.err)
    for mine, theirs in zip(one.losses, two.losses, strict=True):
        assert sorted(mine.pop("sigmas")) == sorted(theirs.pop("sigmas"))
        del mine["checksum"], theirs["checksum"]  # of the levels in another order
        assert mine == pytest.approx(theirs, rel=1e-3)
    half = train(script, prepared, tmp_path / "half", *words)
    assert half.losses[0]["gradient_norm"] != pytest.approx(two.losses[0]["gradient_norm"], rel=0.01)
    tensors = [torch.cat([run.lora[key].flatten() for key in sorted(run.lora)]) for run in (one, two, half)]
    furthest = [(tensor - tensors[0]).abs().max().item() for tensor in tensors[1:]]
    assert furthest[0] < 0.02 * furthest[1]


OF_PRODIGY: list[list[Any]] = [
    ["--prodigy_beta3", 0.5],
    ["--prodigy_decouple", "no", "--adam_weight_decay", 10],
    ["--prodigy_use_bias_correction", "no"],
    ["--prodigy_safeguard_warmup", "no"],
    ["--adam_beta1", 0.5],
    ["--adam_beta2", 0.9],
]


@pytest.mark.parametrize("words", OF_PRODIGY, ids=[" ".join(map(str, words)) for words in OF_PRODIGY])
def test_a_flag_of_prodigy_changes_the_numbers(words: list[Any]) -> None:
    """Within the steps in which its estimate begins to grow."""
    names, values = [flag.removeprefix("--") for flag in words[::2]], words[1::2]
    values = [False if value == "no" else value for value in values]
    without = dict(zip(names[1:], values[1:], strict=True))
    runs = [Small("prodigy", **each) for each in ({**without, names[0]: values[0]}, without)]
    for small in runs:
        for _ in range(40):
            small.step()
    assert not torch.equal(runs[0].weights, runs[1].weights)


@pytest.mark.parametrize("words", OF_PRODIGY[:4], ids=[" ".join(map(str, words)) for words in OF_PRODIGY[:4]])
def test_a_flag_of_prodigy_reaches_it_and_is_kept(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any]
) -> None:
    flag, value = words[:2]
    steps = ["--optimizer", "prodigy", "--max_train_steps"]
    run = train(script, prepared, tmp_path, *steps, 1, flag, value)
    (group,) = read_state(run.folder / "checkpoint-1")["optimizer"]["param_groups"]
    assert group[flag.removeprefix("--prodigy_")] == (False if value == "no" else value)
    assert json.loads((run.folder / "run.json").read_text())["identity"][flag] == value
    resumed = [*steps, 2, "--resume_from_checkpoint", "latest"]
    refused = train(script, prepared, tmp_path, *resumed, code=2)
    assert f"with {flag} {value}: type {flag} {value} to go on" in refused.error
    train(script, prepared, tmp_path, *resumed, flag, value)


def test_a_low_rate_for_prodigy_is_noted(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--optimizer", "prodigy", "--max_train_steps", 1, "--learning_rate"]
    run = train(script, prepared, tmp_path / "low", *words, 1e-4)
    assert (
        "note: prodigy finds the learning rate by itself, and --learning_rate 0.0001 multiplies it: leave it" in run.out
    )
    assert "note: prodigy" not in train(script, prepared, tmp_path / "one", *words, 1.0).out


def test_a_cpu_pages_nothing(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--max_train_steps", 2, "--rank", 16, "--optimizer"]
    paged = train(script, prepared, tmp_path / "paged", *words, "paged_adamw_8bit")
    assert "note: on a CPU nothing is paged: paged_adamw_8bit is adamw_8bit here" in paged.out
    assert "Paged" not in paged.err
    plain = train(script, prepared, tmp_path / "plain", *words, "adamw_8bit")
    assert same_lora(paged.folder / LORA_FILE, plain.folder / LORA_FILE)


@needs_gpu
def test_paged_state_is_paged_again_when_it_is_loaded(tmp_path: Path) -> None:
    from sd3_lora.training.optimizers_8bit import PagedAdamW8bit

    def make(weights: torch.Tensor) -> tuple[torch.nn.Parameter, PagedAdamW8bit]:
        parameter = torch.nn.Parameter(weights.to(GPU))
        return parameter, PagedAdamW8bit([parameter], lr=0.1)

    def steps(parameter: torch.nn.Parameter, optimizer: PagedAdamW8bit) -> None:
        for _ in range(3):
            parameter.grad = parameter.detach().sin()
            optimizer.step()

    weights, optimizer = make(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    steps(weights, optimizer)
    write_state(tmp_path, {"optimizer": optimizer.state_dict(), "weights": weights})
    saved = read_state(tmp_path)
    resumed, other = make(saved["weights"])
    other.load_state_dict(saved["optimizer"])
    assert all(other.state[resumed][name].is_paged for name in ("state1", "state2"))
    steps(weights, optimizer)
    steps(resumed, other)
    assert torch.equal(weights, resumed)


def test_a_run_goes_on_under_another_spelling(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--rank", 16, "--max_train_steps", 2]
    train(script, prepared, tmp_path / "8", *words, "--use_8bit_adam")
    more = ["--rank", 16, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    train(script, prepared, tmp_path / "8", *more, "--optimizer", "AdamW8bit")
    train(script, prepared, tmp_path / "32", *words, "--optimizer", "adamw")
    path = tmp_path / "32" / "checkpoint-2" / "state.json"
    text = path.read_text()
    assert text.count('["--optimizer", "AdamW"]') == 1
    path.write_text(
        text.replace('["--optimizer", "AdamW"]', '["--optimizer", "adamW"]')
    )  # as an earlier build noted it
    write_again(path.with_suffix(".safetensors"))
    train(script, prepared, tmp_path / "32", *more)
    refused = train(script, prepared, tmp_path / "32", *more, "--optimizer", "lion_8bit", code=2)
    assert "was trained with --optimizer AdamW, not lion_8bit" in refused.error
    assert "type --optimizer AdamW" in refused.error


# Bad input

MISFITS: list[tuple[list[Any], str]] = [
    (["--optimizer", "SGD"], f"--optimizer SGD is unknown: type one of {', '.join(NAMES)}"),
    (["--optimizer", "prodigy", "--use_8bit_adam"], "--use_8bit_adam is of AdamW, not of --optimizer prodigy"),
    (["--optimizer", "lion_8bit", "--use_8bit_adam"], "--use_8bit_adam is of AdamW, not of --optimizer lion_8bit"),
    (["--optimizer", "lion_8bit", "--adam_epsilon", 1e-6], "--adam_epsilon does nothing with --optimizer lion_8bit"),
    (["--optimizer", "adafactor", "--adam_beta1", 0.9], "--adam_beta1 does nothing with --optimizer adafactor: leave"),
    (["--optimizer", "adafactor", "--adam_beta2", 0.9], "--adam_beta2 does nothing with --optimizer adafactor: leave"),
    (
        ["--optimizer", "adafactor", "--adam_epsilon", 1],
        "--adam_epsilon does nothing with --optimizer adafactor: leave",
    ),
    (
        ["--prodigy_beta3", 0.9],
        "--prodigy_beta3 does nothing with --optimizer AdamW: leave it out, or type --optimizer",
    ),
    (["--prodigy_decouple"], "--prodigy_decouple does nothing with --optimizer AdamW: leave it out"),
    (["--prodigy_use_bias_correction", "no"], "--prodigy_use_bias_correction does nothing with --optimizer AdamW"),
    (["--prodigy_safeguard_warmup"], "--prodigy_safeguard_warmup does nothing with --optimizer AdamW"),
    (["--optimizer", "prodigy", "--prodigy_beta3", 1], "--prodigy_beta3 must be at least 0 and less than 1"),
    (["--optimizer", "prodigy", "--scale_lr"], "--scale_lr multiplies a learning rate that --optimizer prodigy finds"),
    (["--optimizer", "prodigy", "--adam_epsilon", 0], "--adam_epsilon must be positive with --optimizer prodigy"),
    (["--optimizer", "schedule_free_adamw", "--adam_beta1", 0], "--adam_beta1 must be positive with --optimizer sched"),
    *(
        (
            ["--optimizer", "schedule_free_adamw", "--lr_scheduler", schedule],
            f"--lr_scheduler {schedule} does not go with --optimizer schedule_free_adamw",
        )
        for schedule in ("linear", "cosine", "cosine_with_restarts", "polynomial")
    ),
]


@pytest.mark.parametrize(("words", "says"), MISFITS, ids=[" ".join(map(str, words)) for words, _ in MISFITS])
def test_what_cannot_work_is_a_sentence(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedule_free_adamw", "schedulefree")])
def test_one_that_is_not_installed_names_the_command(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *more: None if wanted == package else find(wanted, *more)
    )
    run = train(script, prepared, tmp_path / "out", "--optimizer", name, code=2)
    assert run.error == f"--optimizer {name} needs {package}, which is not installed: type `pip install {package}`"
    assert not (tmp_path / "out").exists()


def test_prodigy_refuses_groups_of_several_rates() -> None:
    from sd3_lora.common.command_line import UserError

    flats = [flatten_parameters([torch.nn.Parameter(torch.zeros(2))]) for _ in range(2)]
    groups = [TrainedGroup(str(rate), flat, rate) for flat, rate in zip(flats, (1.0, 0.5), strict=True)]
    with pytest.raises(UserError, match=r"finds one learning rate for all, and cannot have \[0.5, 1.0\]"):
        make_optimizer(OptimizerConfig(optimizer="prodigy"), Trainables(groups), 5)
