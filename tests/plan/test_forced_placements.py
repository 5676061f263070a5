"""Every trick's flag does what it says, with a budget and without one, and changes no number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.transformer import placement
from sd3_lora.transformer.mapped_pieces import MappedPieces
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import PinnedPieces, StreamedBlocks, stream_transformer

import pytest
import torch
from conftest import TRAINING_SCRIPT
from PIL import Image
from torch.nn.attention import SDPBackend
from training_runs import Flags, Run, Script, train, training_script

STEPS = 2
EVERY, BUT_LAST = (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4)
LARGE, TIGHT = ["--vram_budget_gib", 4], ["--vram_budget_gib", 0.8]  # of which CUDA itself takes 0.75


@dataclass
class Done:
    """What was done to the transformers of a test, the last one last."""

    streamed: list[tuple] = field(default_factory=list)  # class of the source, buffers, blocks
    ahead: list[tuple[int, ...]] = field(default_factory=list)
    offloaded: list[bool] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # as they compute


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """Each trick is applied, and noted."""
    noted = Done()

    def stream(transformer: Any, device: Any, source: Any, buffers: int, blocks: Sequence[int]) -> StreamedBlocks:
        noted.streamed.append((type(source), buffers, tuple(blocks)))
        return stream_transformer(transformer, device, source, buffers, blocks)

    def compute_ahead(transformer: Any, streamed: StreamedBlocks, blocks: Sequence[int]) -> ModulationsAhead:
        noted.ahead.append(tuple(blocks))
        return ModulationsAhead(transformer, streamed, blocks)

    def recompute(transformer: Any, indices: Sequence[int], offload_inputs: bool) -> None:
        noted.offloaded.append(offload_inputs)
        for index, block in enumerate(transformer.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, index=index: noted.blocks.append(index))
        recompute_blocks(transformer, indices, offload_inputs)

    monkeypatch.setattr(placement, "stream_transformer", stream)
    monkeypatch.setattr(placement, "ModulationsAhead", compute_ahead)
    monkeypatch.setattr(placement, "recompute_blocks", recompute)
    return noted


@pytest.fixture(scope="module")
def plain(on_miniature: Flags, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nothing forced, no budget."""
    folder = tmp_path_factory.mktemp("plain")
    words = [*on_miniature.flags, "--device", "cpu", "--output_dir", folder, "--max_train_steps", STEPS]
    assert training_script().main([str(word) for word in words]) == 0
    return Run(folder, "", "")


def plan_of(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "run.json").read_text())["plan"]


@dataclass(frozen=True)
class Forced:
    """Flags, and what they make of the placement."""

    flags: list[Any]
    recomputed: tuple[int, ...] = ()
    offloaded: bool = False
    streamed: tuple[int, ...] = ()
    source: type = PinnedPieces
    buffers: int = 6
    ahead: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.flags))


EVEN = (1, 3, 5)  # three of six, evenly spread
FORCED = [
    Forced(["--recompute_blocks", 0]),
    Forced(["--recompute_blocks", 2], (0, 1)),
    Forced(["--gradient_checkpointing"], EVERY),
    Forced(["--offload_inputs", "on"], BUT_LAST, True),
    Forced(["--cpu_offload_checkpointing"], BUT_LAST, True),
    Forced(["--recompute_blocks", 3, "--offload_inputs", "on"], (0, 1, 2), True),
    Forced(["--stream_blocks", 3], streamed=EVEN),
    Forced(["--blocks_to_swap", 3], streamed=EVEN),
    Forced(["--stream_blocks", 3, "--stream_from", "host"], streamed=EVEN),
    Forced(["--stream_blocks", 3, "--stream_from", "files"], streamed=EVEN, source=MappedPieces),
    Forced(["--stream_blocks", 6, "--stream_buffers", 3], streamed=EVERY, buffers=3),
    Forced(["--stream_blocks", 3, "--recompute_blocks", 4], (0, 1, 2, 3), streamed=EVEN, ahead=(1, 3)),
    Forced(["--stream_blocks", 3, "--gradient_checkpointing"], EVERY, streamed=EVEN, ahead=EVEN),
    Forced(
        ["--stream_blocks", 3, "--recompute_blocks", 4, "--modulations_ahead", "on"],
        (0, 1, 2, 3),
        streamed=EVEN,
        ahead=(1, 3),
    ),
    Forced(["--stream_blocks", 3, "--recompute_blocks", 4, "--modulations_ahead", "off"], (0, 1, 2, 3), streamed=EVEN),
]


@pytest.mark.parametrize("budget", [[], LARGE], ids=["no budget", "a budget"])
@pytest.mark.parametrize("forced", FORCED, ids=str)
def test_training_does_what_is_forced(
    script: Script, on_miniature: Flags, plain: Run, tmp_path: Path, done: Done, forced: Forced, budget: list[Any]
) -> None:
    run = train(script, on_miniature, tmp_path, *forced.flags, *budget, "--max_train_steps", STEPS)
    noted = plan_of(run)
    recomputed, ahead = forced.recomputed, forced.ahead
    if budget and "recompute" not in str(forced) and "--gradient_checkpointing" not in forced.flags:
        # The plan chooses: where blocks are streamed, to recompute some costs nothing; offloading needs two.
        recomputed = tuple(noted["recomputed"])
        assert len(recomputed) == 2 if forced.offloaded else forced.streamed
        ahead = tuple(block for block in forced.streamed if block in recomputed)
    assert tuple(noted["recomputed"]) == recomputed
    assert tuple(noted["streamed"]) == forced.streamed
    assert noted["stream_from"] == ("files" if forced.source is MappedPieces else "host")
    assert (noted["offload_inputs"], noted["modulations_ahead"]) == (forced.offloaded, "off" not in forced.flags)
    assert done.blocks == STEPS * [*EVERY, *reversed(recomputed)]
    assert done.offloaded == [forced.offloaded]
    assert done.streamed == ([(forced.source, forced.buffers, forced.streamed)] if forced.streamed else [])
    assert done.ahead == ([ahead] if ahead else [])
    assert run.losses == plain.losses
