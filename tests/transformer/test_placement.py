"""What flags fix of a placement, what they cannot; and a transformer that is arranged as a placement says."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.placement_flags import BaseFlags, StepFlags
from sd3_lora.transformer import placement as room
from sd3_lora.transformer.compiled import Compiled
from sd3_lora.transformer.lora import attach_lora, target_modules
from sd3_lora.transformer.placement import AskedPlacement, Placement, arrange

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_transformer import CPU

# What is asked


def test_flags_fix_what_they_say_and_nothing_else() -> None:
    assert AskedPlacement.of(BaseFlags(), StepFlags(), 6) == AskedPlacement()
    assert AskedPlacement.of(BaseFlags(), None, 6) == AskedPlacement(recomputed=0, offload_inputs=False)
    base = BaseFlags("nf4", "3", "files", "4", "math")
    step = StepFlags(recompute_blocks="2", offload_inputs="off", modulations_ahead="on")
    assert AskedPlacement.of(base, step, 6) == AskedPlacement(
        "nf4",
        2,
        False,
        3,
        "files",
        4,
        True,
        "math",
        "--recompute_blocks 2 --offload_inputs off --stream_blocks 3 --stream_from files --stream_buffers 4 "
        "--modulations_ahead on --attention_kernel math",
    )
    asked = AskedPlacement.of(BaseFlags(), StepFlags(gradient_checkpointing=True), 6)
    assert asked == AskedPlacement(recomputed=6, typed="--gradient_checkpointing")


NO_STREAMS = "is of streamed blocks, and --stream_blocks 0 leaves none: leave one out"
OFFLOADS = "--offload_inputs on offloads the inputs of all recomputed blocks but the last, and --recompute_blocks"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"recomputed": 7}, "--recompute_blocks 7: this transformer has 6 blocks: type 0 to 6"),
    ({"recomputed": -1}, "--recompute_blocks -1: this transformer has 6 blocks: type 0 to 6"),
    ({"streamed": 7}, "--stream_blocks 7: this transformer has 6 blocks: type 0 to 6"),
    ({"streamed": -1}, "--stream_blocks -1: this transformer has 6 blocks: type 0 to 6"),
    ({"buffers": 1}, "--stream_buffers 1: one computes while another fills: type 2 or more"),
    ({"offload_inputs": True, "recomputed": 0}, f"{OFFLOADS} 0 leaves none: type 2 or more"),
    ({"offload_inputs": True, "recomputed": 1}, f"{OFFLOADS} 1 leaves none: type 2 or more"),
    *(
        (
            {"stream_from": "files", "precision": precision},
            f"--stream_from files: no file holds the 4-bit weights that --base_precision {precision} may take: "
            "type --stream_from host, or --base_precision 16bit",
        )
        for precision in ("nf4", "auto")
    ),
    ({"stream_from": "host", "streamed": 0}, f"--stream_from {NO_STREAMS}"),
    ({"buffers": 3, "streamed": 0}, f"--stream_buffers {NO_STREAMS}"),
    ({"modulations_ahead": True, "streamed": 0}, f"--modulations_ahead on {NO_STREAMS}"),
    (
        {"modulations_ahead": True, "recomputed": 0},
        "--modulations_ahead on is of blocks that are both streamed and recomputed, and --recompute_blocks 0 leaves "
        "none: leave one out",
    ),
]


@pytest.mark.parametrize(("fixed", "sentence"), REFUSED, ids=[str(fixed) for fixed, _ in REFUSED])
def test_what_cannot_be_obeyed_is_refused(fixed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        AskedPlacement(**fixed).check(6)
    assert str(error.value) == sentence


def test_several_processes_stream_nothing() -> None:
    AskedPlacement(streamed=0).check(6, 2)
    with pytest.raises(UserError) as error:
        AskedPlacement(streamed=3).check(6, 2)
    assert str(error.value) == "--stream_blocks 3 works in one process, not in 2: leave it out, or use one"


@pytest.mark.parametrize(
    "fixed",
    [
        {},
        {"recomputed": 6, "offload_inputs": True, "streamed": 6, "buffers": 2, "modulations_ahead": True},
        {"recomputed": 0, "offload_inputs": False, "streamed": 0, "modulations_ahead": False},
        {"recomputed": 2, "offload_inputs": True},
        {"stream_from": "host", "precision": "nf4"},
        {"stream_from": "host", "precision": "auto"},
        {"stream_from": "files", "buffers": 2},
    ],
    ids=str,
)
def test_what_can_be_obeyed_is_not_refused(fixed: dict[str, Any]) -> None:
    AskedPlacement(**fixed).check(6)


# A placement


def test_a_placement_is_data() -> None:
    placement = Placement(6, None, (0, 2, 4), "files", 3, (0, 1, 2), True, attention_kernel="flash")
    assert pickle.loads(pickle.dumps(placement)) == placement  # rank 0 sends it to the others
    assert json.loads(json.dumps(asdict(placement)))["streamed"] == [0, 2, 4]
    assert placement.ahead_blocks == [0, 2]
    assert Placement(6, streamed=(0, 2), recomputed=(0,), modulations_ahead=False).ahead_blocks == []
    words = placement.base_sentence(), placement.step_sentence(), placement.kernel_sentence()
    assert words == (
        "base unchanged, 3 of its 6 blocks streamed from the weight files, 3 pieces on the device",
        "3 of 6 blocks recomputed, their inputs offloaded",
        "; flash attention",
    )
    assert Placement(6, "nf4").base_sentence() == "base in 4 bits (nf4), on the device"


# The order in which a transformer is arranged


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is done, each really done but for compiling."""
    names: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *words: (names.append(name), function(*words))[1]

    for name in ("load_transformer", "stream_transformer", "ModulationsAhead", "recompute_blocks"):
        monkeypatch.setattr(room, name, noted(name, getattr(room, name)))
    monkeypatch.setattr(room, "flatten_parameters", noted("flatten_parameters", room.flatten_parameters))
    monkeypatch.setattr(room, "compile_blocks", noted("compile_blocks", lambda *_: None))
    return names


def add_lora(transformer: SD3Transformer2DModel) -> Sequence[torch.nn.Parameter]:
    assert not any(parameter.is_meta for name, parameter in transformer.named_parameters() if "norm_out" in name)
    return attach_lora(transformer, target_modules(transformer, None, None), 2, 2.0, 0.0, 0)


def test_a_transformer_is_arranged_in_one_order(miniature_files: ModelFiles, order: list[str]) -> None:
    everything = Placement(6, None, (0, 2, 4), "files", 2, (0, 1, 2), True)
    arranged = arrange(miniature_files, everything, CPU, torch.float32, (8, 8), add_lora, Compiled.ALWAYS)
    assert order == [
        "load_transformer",
        "stream_transformer",
        "ModulationsAhead",
        "recompute_blocks",
        "flatten_parameters",
        "compile_blocks",
    ]
    assert arranged.ahead is not None
    assert arranged.streamed is not None
    assert arranged.flat is not None
    trained = [parameter for parameter in arranged.transformer.parameters() if parameter.requires_grad]
    memory = {parameter.untyped_storage().data_ptr() for parameter in trained}
    assert memory == {arranged.flat.untyped_storage().data_ptr()}
    assert arranged.flat.numel() == sum(parameter.numel() for parameter in trained)


def test_what_a_placement_does_not_name_is_not_done(miniature_files: ModelFiles, order: list[str]) -> None:
    arranged = arrange(miniature_files, Placement(6), CPU, torch.float32, (8, 8), lambda _: [])
    assert order == ["load_transformer", "recompute_blocks"]  # of no blocks
    assert (arranged.flat, arranged.streamed, arranged.ahead) == (None, None, None)
    assert not arranged.transformer.is_gradient_checkpointing
