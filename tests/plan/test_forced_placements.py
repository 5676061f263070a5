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


EVEN = (0, 2, 4)  # three of six, evenly spread
FORCED = [
    Forced(["--recompute_blocks", 0]),
    Forced(["--recompute_blocks", 2], (0, 1)),
    Forced(["--gradient_checkpointing"], EVERY),
    Forced(["--offload_inputs", "on"], BUT_LAST, True),
    Forced(["--recompute_blocks", 3, "--offload_inputs", "on"], (0, 1, 2), True),
    Forced(["--stream_blocks", 3], streamed=EVEN),
    Forced(["--blocks_to_swap", 3], streamed=EVEN),
    Forced(["--stream_blocks", 3, "--stream_from", "host"], streamed=EVEN),
    Forced(["--stream_blocks", 3, "--stream_from", "files"], streamed=EVEN, source=MappedPieces),
    Forced(["--stream_blocks", 6, "--stream_buffers", 3], streamed=EVERY, buffers=3),
    Forced(["--stream_blocks", 3, "--recompute_blocks", 4], (0, 1, 2, 3), streamed=EVEN, ahead=(0, 2)),
    Forced(["--stream_blocks", 3, "--gradient_checkpointing"], EVERY, streamed=EVEN, ahead=EVEN),
    Forced(
        ["--stream_blocks", 3, "--recompute_blocks", 4, "--modulations_ahead", "on"],
        (0, 1, 2, 3),
        streamed=EVEN,
        ahead=(0, 2),
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


# Forced and not what the plan would choose


@pytest.mark.usefixtures("without_allowances")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--recompute_blocks", 5], "plan: base unchanged, on the device; 5 of 6 blocks recomputed\n"),
        (["--stream_blocks", 6], "plan: base unchanged, streamed from host memory, 6 pieces on the device (0.1 GiB pi"),
        (["--stream_blocks", 6, "--stream_buffers", 2], "streamed from host memory, 2 pieces on the device"),
        (
            ["--stream_blocks", 2, "--recompute_blocks", 0],
            "plan: base unchanged, 2 of its 6 blocks streamed from host memory, 6 pieces on the device (0.0 GiB pinned)"
            "; 0 of 6 blocks recomputed\n",
        ),
        (
            ["--recompute_blocks", 3, "--offload_inputs", "on"],
            "plan: base unchanged, on the device; 3 of 6 blocks recomputed, their inputs offloaded\n",
        ),
        (["--attention_kernel", "efficient"], "; 0 of 6 blocks recomputed; efficient attention\n"),
        (
            ["--stream_blocks", 6, "--recompute_blocks", 4, "--modulations_ahead", "off"],
            "; 4 of 6 blocks recomputed, modulations not ahead\n",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_plan_says_what_is_forced(script: Script, flags: list[Any], says: str) -> None:
    """A large budget, in which the plan would do nothing of this."""
    words = ["--pretrained_model_name_or_path", MINIATURE, "--device", "cpu", "--plan", *LARGE]
    free = script(TRAINING_SCRIPT, *words)
    assert "plan: base unchanged, on the device; 0 of 6 blocks recomputed\n" in free.out
    result = script(TRAINING_SCRIPT, *words, *flags)
    assert result.code == 0, result.err
    assert says in result.out


@pytest.mark.usefixtures("without_allowances")
@pytest.mark.parametrize(
    "flags",
    [
        ["--stream_blocks", 0],
        ["--recompute_blocks", 0],
        ["--recompute_blocks", 6, "--stream_blocks", 1],
        ["--recompute_blocks", 0, "--offload_inputs", "off", "--attention_kernel", "math"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_what_is_forced_and_does_not_fit_is_refused(script: Script, flags: list[Any]) -> None:
    words = ["--pretrained_model_name_or_path", MINIATURE, "--device", "cpu", "--plan", *TIGHT]
    result = script(TRAINING_SCRIPT, *words)
    assert result.code == 0, result.err  # without the flags it fits
    assert " recomputed" in result.out
    result = script(TRAINING_SCRIPT, *words, *flags)
    assert result.code == 2
    (sentence,) = result.err.splitlines()
    typed = " ".join(map(str, flags))
    assert sentence.startswith("error: 0.80 GiB of GPU memory are too little, training takes at least 0.")
    assert f" GiB here with {typed}: " in sentence
    assert sentence.endswith(f", or leave out {typed}")


def test_gradient_checkpointing_is_told_what_it_costs(script: Script, on_miniature: Flags, tmp_path: Path) -> None:
    note = r"note: --gradient_checkpointing recomputes all 6 blocks. Without it 0 would be"
    words = ["--gradient_checkpointing", "--max_train_steps", 1]
    assert f"{note}, and a step would compute 25% less\n" in train(script, on_miniature, tmp_path / "a", *words).out
    assert f"{note} within 0." in train(script, on_miniature, tmp_path / "b", *words, *LARGE).out
    assert "note:" not in train(script, on_miniature, tmp_path / "c", "--max_train_steps", 1).out


# How a step is carried out; attention


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [(["--compile", "on"], 6), (["--compile", "off"], 0), (["--capture", "off"], 0), (["--compile", "blocks"], 6)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_blocks_are_compiled_where_that_is_forced(
    script: Script,
    on_miniature: Flags,
    plain: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    compiled: int,
) -> None:
    """With a compiler that leaves the blocks as they are."""
    blocks: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, *_, **__: blocks.append(block))
    run = train(script, on_miniature, tmp_path, *flags, "--max_train_steps", STEPS)
    assert len(set(blocks)) == len(blocks) == compiled
    how = "compiled" if compiled else "plain"
    assert f"each micro-step: {how} blocks, launched kernel by kernel\n" in run.out
    assert run.losses == plain.losses


def enabled_backends() -> set[SDPBackend]:
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return {backend for backend, is_enabled in enabled.items() if is_enabled}


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[set[SDPBackend]]:
    """Those that may compute each attention of the blocks."""
    seen: list[set[SDPBackend]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(*inputs: Any, **more: Any) -> torch.Tensor:
        if inputs[0].device.type != "meta" and inputs[0].shape[-2] > 16:  # not the simulation, not the trial
            seen.append(enabled_backends())
        return attend(*inputs, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    return seen


KERNELS = [("math", SDPBackend.MATH), ("flash", SDPBackend.FLASH_ATTENTION)]


@pytest.mark.parametrize(("kernel", "backend"), KERNELS)
def test_attention_is_computed_by_the_kernel_that_is_forced(
    script: Script,
    on_miniature: Flags,
    plain: Run,
    tmp_path: Path,
    backends: list[set[SDPBackend]],
    kernel: str,
    backend: SDPBackend,
) -> None:
    before = enabled_backends()
    words = ["--recompute_blocks", 2, "--max_train_steps", STEPS]
    run = train(script, on_miniature, tmp_path, *words, "--attention_kernel", kernel)
    assert len(backends) >= STEPS * (6 + 2)
    assert all(enabled == {backend} for enabled in backends[: STEPS * 6])
    assert {frozenset(enabled) for enabled in backends} == {frozenset({backend})}  # in backward too
    assert enabled_backends() == before
    assert plan_of(run)["attention_kernel"] == kernel
    losses = [[line["loss"] for line in some.losses] for some in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
@pytest.mark.parametrize("name", [TRAINING_SCRIPT, "inference"])
def test_a_kernel_that_does_not_run_here_is_refused(
    script: Script, on_miniature: Flags, tmp_path: Path, kernel: str, name: str
) -> None:
    words = on_miniature.flags[:2] if name == "inference" else [*on_miniature.flags, "--output_dir", tmp_path / "out"]
    words = [*words, *(["--prompt", "a fish", "--outdir", tmp_path / "out"] if name == "inference" else [])]
    result = script(name, *words, "--device", "cpu", "--attention_kernel", kernel)
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        f"error: --attention_kernel {kernel} does not run on a CPU in float32: leave it out"
    )
    assert not list((tmp_path / "out").rglob("*.*"))


# Drawing


def test_a_picture_with_forced_streaming_is_the_resident_one(
    script: Script, on_miniature: Flags, tmp_path: Path, done: Done, backends: list[set[SDPBackend]]
) -> None:
    lora = train(script, on_miniature, tmp_path / "lora", "--max_train_steps", 1)
    words = ["--pretrained_model_name_or_path", MINIATURE, "--lora", lora.folder, "--prompt", "a photo of sks fish"]
    words += ["--data_df_path", on_miniature.flags[on_miniature.flags.index("--data_df_path") + 1], "--device", "cpu"]
    words += ["--num_steps", 2, "--guidance", 3, "--unmerged"]  # as a base is drawn that is streamed from files

    def draw(name: str, *more: object) -> bytes:
        done.streamed.clear()
        backends.clear()
        result = script("inference", *words, "--outdir", tmp_path / name, *more)
        assert result.code == 0, result.err
        (path,) = (tmp_path / name).glob("*/img_00.png")
        with Image.open(path) as picture:
            return picture.tobytes()

    resident = draw("resident")
    assert done.streamed == []
    for number, (flags, expected) in enumerate(
        [
            (["--stream_blocks", 3, "--stream_from", "files"], (MappedPieces, 6, EVEN)),
            (["--blocks_to_swap", 6, "--stream_buffers", 3], (PinnedPieces, 3, EVERY)),
            (["--stream_blocks", 1, *LARGE], (PinnedPieces, 6, done.streamed)),
            (["--stream_blocks", 3, "--stream_from", "files", "--stream_buffers", 2, *LARGE], (MappedPieces, 2, EVEN)),
        ]
    ):
        assert draw(f"streamed {number}", *flags) == resident
        ((source, buffers, blocks),) = done.streamed
        assert (source, buffers) == expected[:2]
        assert len(blocks) == 1 if expected[2] is done.streamed else blocks == expected[2]
    with_math = draw("math", "--attention_kernel", "math")
    assert {frozenset(enabled) for enabled in backends} >= {frozenset({SDPBackend.MATH})}
    assert len(with_math) == len(resident)
    refused = script("inference", *words, "--outdir", tmp_path / "x", "--stream_blocks", 0, "--stream_buffers", 3)
    assert refused.code == 2
    assert "--stream_buffers is of streamed blocks, and --stream_blocks 0 leaves none: leave one out" in refused.err


def test_a_flag_of_streamed_blocks_has_a_note_where_none_is_streamed(
    script: Script, on_miniature: Flags, tmp_path: Path
) -> None:
    run = train(script, on_miniature, tmp_path, "--stream_buffers", 3, "--modulations_ahead", "on")
    note = "note: no block is streamed, so --stream_buffers 3 and --modulations_ahead on changes nothing: "
    assert f"{note}add --stream_blocks with a number\n" in run.out
    streamed = train(script, on_miniature, tmp_path / "s", "--stream_buffers", 3, "--stream_blocks", 2)
    assert "note:" not in streamed.out
    alone = train(script, on_miniature, tmp_path / "a", "--stream_blocks", 1, "--modulations_ahead", "on")
    assert "note: no block is both streamed and recomputed, so --modulations_ahead on changes nothing: " in alone.out
    whole = train(script, on_miniature, tmp_path / "w", "--stream_blocks", 1, "--stream_buffers", 999)
    assert "1 of its 6 blocks streamed from host memory, 46 pieces" not in whole.out


def test_a_block_that_the_model_lacks_is_a_sentence_under_a_budget_too(
    script: Script, on_miniature: Flags, tmp_path: Path
) -> None:
    run = train(script, on_miniature, tmp_path, "--lora_blocks", 99, "--vram_budget_gib", 2, code=2)
    assert run.error == "--lora_blocks 99: this transformer has the blocks 0 to 5"
    run = train(script, on_miniature, tmp_path, "--vram_budget_gib", "inf", code=2)
    assert run.error == "--vram_budget_gib inf must be a positive number: type for example 8"


def test_what_cannot_be_compiled_is_refused_before_latents_are_made(
    script: Script, on_miniature: Flags, tmp_path: Path
) -> None:
    words = ["--compile", "on", "--stream_blocks", 2, "--latents_path", tmp_path / "latents"]
    assert train(script, on_miniature, tmp_path / "out", *words, code=2).error.startswith(
        "--compile on: streamed blocks"
    )
    assert list(tmp_path.iterdir()) == []
