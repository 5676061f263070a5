"""Flags from dataclasses: those that transformers' HfArgumentParser would make, which took half a second to import."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from sd3_lora.common.command_line import CommandLine, _Faults

import pytest
from transformers import HfArgumentParser

MODULES = (
    *("compute_embeddings", "precompute_latents", "train_dreambooth_sd3_lora_miniature", "inference"),
    *("draw_class_pictures", "caption_images", "sd3_lora.convert", "sd3_lora.export", "sd3_lora.losses"),
    *("sd3_lora.merge", "sd3_lora.report", "sd3_lora.tricks", "sd3_lora.verify", "app"),
)
ATTRIBUTES = ("option_strings", "dest", "nargs", "const", "default", "choices", "required", "help", "metavar")


def read(action: argparse.Action, text: str) -> Any:
    """The value that a flag makes of a text; the kind of the error where it takes none."""
    try:
        return action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_of_every_script_is_as_transformers_makes_it(module: str) -> None:
    command_line: CommandLine = importlib.import_module(module).COMMAND_LINE

    class Theirs(_Faults, HfArgumentParser):
        pass

    theirs = Theirs(list(command_line.groups), add_help=False)
    ours = [action for action in command_line._parser()._actions if "--help" not in action.option_strings]
    for mine, other in zip(ours, theirs._actions, strict=True):
        assert type(mine) is type(other)
        for name in ATTRIBUTES:
            assert getattr(mine, name) == getattr(other, name), (mine.dest, name)
        for text in ("a", "1", "0", "1.5", "Yes", "no", "", *(mine.choices or ())):
            assert read(mine, str(text)) == read(other, str(text)), (mine.dest, text)


def test_a_truth_that_is_none_is_named() -> None:
    parser = importlib.import_module("inference").COMMAND_LINE._parser()
    parser.parse_known_args(["--prompt", "a", "--compare", "perhaps"])
    expected = "argument --compare: perhaps is not one of yes/no, true/false, t/f, y/n, 1/0"
    assert parser.faults == [expected]
