"""Training of the whole transformer, `--full`: its gradients, its updates, its files, and exact resume."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common import tensor_files
from sd3_lora.common.command_line import UserError
from sd3_lora.common.devices import choose_whole_dtype
from sd3_lora.common.records import StepInputs
from sd3_lora.training import output_folder
from sd3_lora.training.checkpoints import checkpoint_folders
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.hub_folder import make_hub_folder
from sd3_lora.training.in_backward import AdamInBackward

import pytest
import torch
from conftest import PROMPT, Prepared
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from training_runs import Run, Script, train, training_script

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def train_full(script: Script, prepared: Prepared, folder: Path, *words: object, code: int = 0) -> Run:
    return train(script, prepared, folder, "--full", "--learning_rate", 1e-3, *words, code=code)


def same_tensors(left: Path, right: Path) -> bool:
    mine, theirs = load_file(left), load_file(right)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    shared = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--checkpointing_steps", 2]
    words = [*shared, "--output_dir", folder, "--full", "--learning_rate", 1e-3, "--checkpoints_total_limit", 3]
    assert training_script().main([str(word) for word in words]) == 0
    return folder


def test_all_weights_are_trained_and_nothing_else(whole: Path, prepared: Prepared) -> None:
    before = load_file(prepared.model / WEIGHTS)
    after = load_file(whole / WEIGHTS)
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert unchanged == {"pos_embed.pos_embed"}


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    script: Script, prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    words = ["--checkpointing_steps", 2, "--checkpoints_total_limit", 3]
    train_full(script, prepared, tmp_path / "a", "--max_train_steps", 2, *words)
    run = train_full(
        script, prepared, tmp_path / "a", "--max_train_steps", 4, *words, "--resume_from_checkpoint", "latest"
    )
    assert "resumed from" in run.out
    assert same_tensors(run.folder / WEIGHTS, whole / WEIGHTS)
    moments = "checkpoint-4/moments/moments.safetensors"
    assert same_tensors(run.folder / moments, whole / moments)
    assert run.losses == Run(whole, "", "").losses


def test_the_folder_is_a_model_that_draws(script: Script, prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    drawn = script(
        "inference",
        *("--pretrained_model_name_or_path", whole, "--prompt", PROMPT, "--device", "cpu", "--num_steps", 2),
        *("--height", 64, "--width", 64, "--data_df_path", prepared.embeddings, "--outdir", tmp_path),
    )
    assert drawn.code == 0, drawn.err
    assert list(tmp_path.glob("*/*.png"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(whole)
    name, tensor = next(iter(load_file(whole / WEIGHTS).items()))
    assert torch.equal(pipeline.transformer.state_dict()[name], tensor)
    record = json.loads((whole / "run.json").read_text())
    assert record["plan"]["whole"] is True
    assert record["wrote"] == str(whole / "transformer")


@dataclass
class Seen:
    """What a run computed with, step by step.

    Attributes:
        inputs: of the micro-steps.
        gradients: by weight, of each update.
    """

    inputs: list[StepInputs] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Notes it while training."""
    seen, module = Seen(), training_script()
    micro_step, apply, begin = module.micro_step, AdamInBackward._apply, AdamInBackward.begin

    def noting_step(model: Any, inputs: StepInputs, *more: Any) -> torch.Tensor:
        if inputs.latents.device.type == "cpu":  # not the plan's
            seen.inputs.append(StepInputs(*(tensor.clone() for tensor in inputs)))
        return micro_step(model, inputs, *more)

    def noting_begin(self: AdamInBackward, *words: Any) -> None:
        seen.gradients.append({})
        begin(self, *words)

    def noting_apply(self: AdamInBackward, place: int, parameter: torch.nn.Parameter) -> None:
        seen.gradients[-1][list(self._parameters)[place]] = parameter.grad.detach().clone()
        apply(self, place, parameter)

    monkeypatch.setattr(module, "micro_step", noting_step)
    monkeypatch.setattr(AdamInBackward, "begin", noting_begin)
    monkeypatch.setattr(AdamInBackward, "_apply", noting_apply)
    return seen


@pytest.mark.parametrize(
    "words",
    [[], ["--recompute_blocks", 1], ["--gradient_accumulation_steps", 2]],
    ids=["plain", "recomputed", "window"],
)
def test_gradients_and_updates_are_those_of_a_plain_loop(
    script: Script, prepared: Prepared, tmp_path: Path, seen: Seen, words: list[Any]
) -> None:
    """float32, torch's AdamW. Gradients to 1e-5 at the first step; the movement to 7 %, which the 8 bits cost."""
    train_full(script, prepared, tmp_path, *words)
    window = 2 if "--gradient_accumulation_steps" in words else 1
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer", torch_dtype=torch.float32)
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, weight_decay=1e-4)
    for step, gradients in enumerate(seen.gradients):
        for inputs in seen.inputs[step * window : (step + 1) * window]:
            noisy = (1 - inputs.sigmas) * inputs.latents + inputs.sigmas * inputs.noise
            velocity = transformer(noisy, inputs.prompt_embeds, inputs.pooled_prompt_embeds, inputs.timesteps).sample
            ((velocity - (inputs.noise - inputs.latents)).square().mean() / window).backward()
        for name, weight in transformer.named_parameters():
            assert weight.grad is not None
            if step == 0:
                torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6)
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = load_file(tmp_path / WEIGHTS)
    for name, weight in transformer.named_parameters():
        expected = weight.detach() - before[name]
        error = (after[name] - before[name] - expected).norm()
        assert error < 0.07 * expected.norm() or expected.norm() < 1e-6 * before[name].norm(), name


def test_bfloat16_weights_move_as_float32_ones_do(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """By updates far below their precision: they are rounded by chance, not to the nearest."""
    words = ["--max_train_steps", 20, "--learning_rate", 1e-4]
    train_full(script, prepared, tmp_path / "bf16", "--mixed_precision", "bf16", *words)
    train_full(script, prepared, tmp_path / "fp32", *words)
    before = load_file(prepared.model / WEIGHTS)
    ours, theirs = load_file(tmp_path / "bf16" / WEIGHTS), load_file(tmp_path / "fp32" / WEIGHTS)
    names = [name for name in before if name.endswith("ff.net.2.weight")]
    assert names
    for name in names:
        assert ours[name].dtype == torch.bfloat16
        moved, expected = ours[name].float() - before[name].bfloat16().float(), theirs[name] - before[name]
        along = float((moved * expected).sum() / expected.square().sum())
        assert 0.6 < along < 1.2, name


def test_to_the_nearest_small_updates_are_lost(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--mixed_precision", "bf16", "--learning_rate", 1e-5]
    train_full(script, prepared, tmp_path / "chance", *words)
    train_full(script, prepared, tmp_path / "nearest", *words, "--weight_rounding", "nearest")
    before = load_file(prepared.model / WEIGHTS)
    names = [name for name in before if name.endswith("ff.net.2.weight")]
    moved = {}
    for kind in ("chance", "nearest"):
        after = load_file(tmp_path / kind / WEIGHTS)
        moved[kind] = sum(int((after[name] != before[name].bfloat16()).sum()) for name in names)
    assert moved["nearest"] < 0.4 * moved["chance"]
    run = train(script, prepared, tmp_path / "out", "--weight_rounding", "nearest", code=2)
    assert run.error == "--weight_rounding nearest is of --full: add that, or leave it out"


def test_equal_runs_are_equal_in_bfloat16(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--mixed_precision", "bf16", "--checkpointing_steps", 2]
    for name in "ab":
        train_full(script, prepared, tmp_path / name, "--max_train_steps", 4, *words)
    train_full(script, prepared, tmp_path / "c", "--max_train_steps", 2, *words)
    train_full(script, prepared, tmp_path / "c", "--max_train_steps", 4, *words, "--resume_from_checkpoint", "latest")
    for name in "bc":
        assert same_tensors(tmp_path / "a" / WEIGHTS, tmp_path / name / WEIGHTS)
    train_full(script, prepared, tmp_path / "d", "--max_train_steps", 4, *words, "--seed", 1)
    assert not same_tensors(tmp_path / "a" / WEIGHTS, tmp_path / "d" / WEIGHTS)


def test_the_schedule_is_that_of_the_log(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, begin = list[float](), AdamInBackward.begin

    def noting(self: AdamInBackward, step: int, rate: float) -> None:
        rates.append(rate)
        begin(self, step, rate)

    monkeypatch.setattr(AdamInBackward, "begin", noting)
    words = ["--lr_scheduler", "polynomial", "--lr_warmup_steps", 2, "--max_train_steps", 5]
    run = train_full(script, prepared, tmp_path, *words)
    assert rates == [line["learning_rate"] for line in run.losses]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[4] < rates[3] < 1e-3


def test_the_default_rate_is_its_own(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path, "--full", "--max_train_steps", 1)
    assert [line["learning_rate"] for line in run.losses] == [1e-5]
    assert "adamw_8bit, learning rate 1e-05 constant" in run.out


REFUSED: list[tuple[list[Any], str]] = [
    (["--rank", 8], "--rank 8 is of a LoRA, and --full trains the transformer itself: leave one of them out"),
    (["--use_dora"], "--use_dora is of a LoRA, and --full trains the transformer itself: leave one of them out"),
    (["--init_lora", "x"], "--init_lora x is of a LoRA, and --full trains the transformer itself: leave one of them"),
    (["--train_text_encoder"], "--full trains the transformer alone, and --train_text_encoder a LoRA: leave one of"),
    (["--prior_term", "preference"], "--prior_term preference compares with the base, which --full changes"),
    (["--use_ema"], "--use_ema would keep every weight of the transformer twice, and --full does not: leave one out"),
    (["--optimizer", "prodigy"], "--optimizer prodigy updates all weights at once, and --full each one inside the"),
    (["--lr_pattern", "attn=1e-5"], "--lr_pattern attn=1e-5 is of a LoRA's layers: leave it or --full out"),
    (["--base_precision", "nf4"], "--base_precision nf4 freezes the weights that --full trains: leave one out"),
    (["--stream_blocks", 1, "--gradient_accumulation_steps", 2], "--gradient_accumulation_steps 2 keeps a gradient"),
    (
        ["--stream_from", "files"],
        "--stream_from files is of weights that do not change, and --full changes them: leave",
    ),
    (["--modulations_ahead", "on"], "--modulations_ahead on computes with weights of the step before, and --full"),
    (["--compile", "on"], "--compile on has all gradients of a block in memory at once, and --full only one: leave"),
    (["--export", "kohya"], "--export kohya is a form of a LoRA, and --full writes a whole model: leave it out"),
    (["--save_every_n_steps", 5], "--save_every_n_steps with --full would write the whole model each time: type --che"),
    (["--hub_checkpoints", "lora", "--push_to_hub"], "--hub_checkpoints lora uploads LoRAs, and --full trains none"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=lambda value: str(value))
def test_what_does_not_go_with_it_is_refused(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], sentence: str
) -> None:
    run = train(script, prepared, tmp_path / "out", "--full", *words, code=2)
    assert run.error.startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused() -> None:
    script = training_script()
    flags = TrainingFlags(*script.COMMAND_LINE.parse(["--full"])).settled()
    assert script.asked_placement(flags, 6, 1).whole
    with pytest.raises(UserError, match="--full updates weights inside the backward pass of one process, not of 2"):
        script.asked_placement(flags, 6, 2)


def test_a_gpu_without_bf16_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    gpu = torch.device("cuda")
    for asked in (None, "fp16", "bf16"):
        with pytest.raises(UserError, match=r"bf16, which Tesla T4 lacks.*add --mixed_precision no"):
            choose_whole_dtype(asked, gpu)
    assert choose_whole_dtype("no", gpu).dtype == torch.float32


def test_fp16_is_bf16_where_there_is_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_whole_dtype("fp16", torch.device("cuda"))
    assert chosen.dtype == torch.bfloat16
    assert chosen.reason.startswith("bf16: --full does not train weights in fp16")
    assert choose_whole_dtype("fp16", torch.device("cpu")).dtype == torch.float32  # as of a LoRA


def test_the_folder_of_the_base_is_not_replaced(script: Script, prepared: Prepared) -> None:
    run = train(script, prepared, prepared.model, "--full", code=2)
    assert run.error.endswith("is the model that is trained, which --full would replace: give another")


def test_a_full_disk_is_noticed_first(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "free_disk_bytes", lambda _: 1000)
    run = train(script, prepared, tmp_path / "out", "--full", code=2)
    assert "of disk left, and --full writes up to" in run.error
    assert run.wrote_no_weights()


def test_one_checkpoint_is_kept_unless_more_are_asked_for(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--checkpointing_steps", 1]
    train_full(script, prepared, tmp_path / "one", *words)
    assert [path.name for path in checkpoint_folders(tmp_path / "one")] == ["checkpoint-3"]
    final, kept = (tmp_path / "one" / folder / WEIGHTS for folder in (".", "checkpoint-3"))
    assert final.samefile(kept)  # no second copy on the disk
    train_full(script, prepared, tmp_path / "two", *words, "--checkpoints_total_limit", 2)
    assert len(checkpoint_folders(tmp_path / "two")) == 2


def test_a_failed_write_leaves_the_earlier_model(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files: the second one cannot be written."""
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 100_000)
    folder = tmp_path / "out"
    train_full(script, prepared, folder)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    StableDiffusion3Pipeline.from_pretrained(folder)
    before = {path: path.read_bytes() for path in files}
    written, write = list[Path](), tensor_files.write_tensors

    def failing(path: Path, *more: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError("No space left on device")
        write(path, *more)

    monkeypatch.setattr(tensor_files, "write_tensors", failing)
    words = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    assert "the disk is full" in train_full(script, prepared, folder, *words, code=2).error
    assert {path: path.read_bytes() for path in sorted((folder / "transformer").glob("*.safetensors"))} == before
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(tensor_files, "write_tensors", write)
    assert "resumed from" in train_full(script, prepared, folder, *words).out


def test_a_damaged_checkpoint_is_refused(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train_full(script, prepared, tmp_path)
    path = tmp_path / "checkpoint-3" / "moments" / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    words = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    run = train_full(script, prepared, tmp_path, *words, code=2)
    assert "moments is not whole" in run.error


def test_validation_goes_with_it(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train_full(
        script,
        prepared,
        tmp_path / "out",
        *("--validation_prompt", PROMPT, "--validation_num_steps", 2, "--early_warning_steps", 2),
    )
    assert list((tmp_path / "out" / "samples").glob("step_*/*.png"))
    assert "the early warning" not in run.err
    assert "--full changes the base itself: no drift is measured" in run.out or "no class prompt" in run.out


def test_the_card_and_the_hubs_folder_are_of_a_model(whole: Path) -> None:
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "# SD3 DreamBooth model: " in card
    assert "StableDiffusion3Pipeline.from_pretrained" in card
    assert "LoRA" not in card.replace("lora", "")
    folder = make_hub_folder(whole, "alice/out")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {WEIGHTS, "model_index.json", "text_encoder_3/config.json", "vae/config.json", "README.md"} <= there
    assert not [path for path in there if path.startswith("checkpoint")]
