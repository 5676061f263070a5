"""The flags of the tricks: what each comes to, and what cannot be asked for."""

from __future__ import annotations

from typing import Any

from sd3_lora.common.command_line import CommandLine, UserError
from sd3_lora.common.placement_flags import BaseFlags, StepFlags

import pytest


def parse(*argv: str) -> tuple[BaseFlags, StepFlags]:
    base, step = CommandLine("train.py", "Trains.", (BaseFlags, StepFlags)).parse(argv)
    return base, step


def test_by_default_the_plan_chooses() -> None:
    base, step = parse()
    assert (base.streamed, base.buffers, base.stream_from, base.attention_kernel) == (None, None, "auto", "auto")
    assert base.base_precision == "16bit"
    assert (step.recomputed(6), step.must_compile, step.must_capture) == (None, None, None)
    assert (step.offload_inputs, step.modulations_ahead, step.gradient_checkpointing) == ("auto", "auto", False)


@pytest.mark.parametrize("flag", ["--stream_blocks", "--blocks_to_swap"])
def test_numbers(flag: str) -> None:
    base, step = parse(flag, "3", "--stream_buffers", "2", "--recompute_blocks", "0")
    assert (base.streamed, base.buffers, step.recomputed(6)) == (3, 2, 0)
    assert parse(flag, "0")[0].streamed == 0
    assert parse("--gradient_checkpointing")[1].recomputed(6) == 6


@pytest.mark.parametrize("flag", ["--offload_inputs", "--cpu_offload_checkpointing"])
def test_offloading_is_switched_on_by_its_name(flag: str) -> None:
    assert parse(flag)[1].offload_inputs == "on"
    assert parse(flag, "off")[1].offload_inputs == "off"


@pytest.mark.parametrize(
    ("argv", "compile_", "capture"),
    [
        (["--compile", "on"], True, None),
        (["--compile", "off", "--capture", "on"], False, True),
        (["--capture", "off"], None, False),
        (["--compile", "blocks"], True, None),
        (["--compile", "graph"], False, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_how_a_step_is_carried_out(argv: list[str], compile_: bool | None, capture: bool | None) -> None:
    step = parse(*argv)[1]
    assert (step.must_compile, step.must_capture) == (compile_, capture)


NOT_A_NUMBER = "is neither auto nor a whole number from"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--stream_blocks", "-1"], f"--stream_blocks -1 {NOT_A_NUMBER} 0 on"),
        (["--stream_blocks", "half"], f"--stream_blocks half {NOT_A_NUMBER} 0 on"),
        (["--stream_buffers", "1"], f"--stream_buffers 1 {NOT_A_NUMBER} 2 on"),
        (["--recompute_blocks", "-2"], f"--recompute_blocks -2 {NOT_A_NUMBER} 0 on"),
        (["--recompute_blocks", "1.5"], f"--recompute_blocks 1.5 {NOT_A_NUMBER} 0 on"),
        (
            ["--gradient_checkpointing", "--recompute_blocks", "2"],
            "--gradient_checkpointing recomputes all blocks, and --recompute_blocks 2 so many: leave one out",
        ),
        (
            ["--compile", "graph", "--capture", "off"],
            "--compile graph captures a CUDA graph, and --capture off does not: leave one out",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_for(argv: list[Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "argv",
    [
        ["--stream_from", "disk"],
        ["--attention_kernel", "xformers"],
        ["--offload_inputs", "maybe"],
        ["--modulations_ahead", "1"],
        ["--capture", "graph"],
        ["--compile", "yes"],
    ],
    ids=" ".join,
)
def test_an_unknown_choice_is_refused(argv: list[str]) -> None:
    with pytest.raises(UserError, match=f"{argv[0]}.*invalid choice: '{argv[1]}'"):
        parse(*argv)
