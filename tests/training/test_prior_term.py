"""The term that keeps the trained model near its base: its numbers, beside a plain loop; resume; what it needs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

from sd3_lora.common.records import StepInputs
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.config import FlowConfig, PriorConfig
from sd3_lora.training.flow import flow_matching_loss, prediction_loss, preference_loss
from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from conftest import Prepared
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from safetensors.torch import load_file
from training_runs import Run, Script, same_lora, train, training_script, use_float16

CLASS_PROMPT = "a photo of a robot"
FAST = ["--learning_rate", 0.02, "--train_batch_size", 2, "--lora_alpha", 8]
TERMS = [["--prior_term", "prediction", "--prior_term_weight", 3], ["--prior_term", "preference"]]
terms = pytest.mark.parametrize("words", TERMS, ids=["prediction", "preference"])


def numbers(run: Run) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in run.losses]


@pytest.mark.parametrize("flow", [[], ["--weighting_scheme", "cosmap", "--precondition_outputs"]], ids=["", "weighted"])
@terms
def test_a_plain_loop_has_the_same_numbers(
    script: Script,
    prepared: Prepared,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[Any],
    flow: list[Any],
) -> None:
    """One prompt at a time, and a second transformer, from the files, as the base: losses and gradients of 4 steps."""
    run = train(script, prepared, tmp_path / "run", *FAST, *words, *flow, "--max_train_steps", 4)
    base = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer").requires_grad_(False)
    with EmbeddingStore(prepared.embeddings) as store:
        row = store.read(CLASS_PROMPT)
    of_class = row.prompt_embeds.float().expand(2, -1, -1), row.pooled_prompt_embeds.float().expand(2, -1)

    def plain(model: VelocityModel, inputs: StepInputs, flow: FlowConfig, prior: PriorConfig) -> torch.Tensor:
        noisy = (1 - inputs.sigmas) * inputs.latents + inputs.sigmas * inputs.noise
        timesteps, own = inputs.timesteps[:2], (inputs.prompt_embeds[:2], inputs.pooled_prompt_embeds[:2])

        def velocity(transformer: Any, text: Any) -> torch.Tensor:
            return transformer(noisy, text[0], text[1], timesteps, return_dict=False)[0]

        def errors(difference: torch.Tensor) -> torch.Tensor:
            scale = inputs.sigmas if flow.precondition_outputs else 1
            weighting = compute_loss_weighting_for_sd3(flow.weighting_scheme, inputs.sigmas)
            return (weighting * (scale * difference) ** 2).flatten(1).mean(1)

        target = inputs.noise - inputs.latents
        mine = errors(velocity(model.transformer, own) - target)
        if prior.prior_term == "prediction":
            moved = errors(velocity(model.transformer, of_class) - velocity(base, of_class))
            return (mine + 3 * moved).mean()
        theirs = errors(velocity(base, own) - target)
        return (-2 * torch.nn.functional.logsigmoid(theirs - mine)).mean()

    with monkeypatch.context() as patch:
        patch.setattr(training_script(), "micro_step", plain)
        loop = train(script, prepared, tmp_path / "loop", *FAST, *words, *flow, "--max_train_steps", 4)
    for found, expected in zip(numbers(run), numbers(loop), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
    without = train(script, prepared, tmp_path / "without", *FAST, *flow, "--max_train_steps", 4)
    # The first steps differ in nothing that the prediction says: the model is still the base.
    if words[1] == "prediction":
        assert numbers(run)[0] == pytest.approx(numbers(without)[0], rel=2e-5)
    assert numbers(run)[2][1] != pytest.approx(numbers(without)[2][1], rel=1e-3)


@terms
def test_the_weight_counts(script: Script, prepared: Prepared, tmp_path: Any, words: list[Any]) -> None:
    runs = [
        train(script, prepared, tmp_path / str(weight), *FAST, *words[:2], "--prior_term_weight", weight)
        for weight in (1, 30)
    ]
    assert numbers(runs[0])[2] != pytest.approx(numbers(runs[1])[2], rel=1e-3)
    if words[1] == "prediction":  # at 1 by default
        default = train(script, prepared, tmp_path / "default", *FAST, *words[:2])
        assert default.losses == runs[0].losses


def test_a_heavy_term_keeps_the_base_on_the_class_prompt(
    script: Script, prepared: Prepared, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance from the base's velocity, which the term measures, is held down."""
    distances: list[float] = []
    original = training_script().prediction_loss

    def noted(*arguments: Any) -> torch.Tensor:
        distances.append(original(*arguments).item())
        return original(*arguments)

    monkeypatch.setattr(training_script(), "prediction_loss", noted)
    ends = []
    for weight in (1e-6, 100):
        distances.clear()
        words = ["--prior_term", "prediction", "--prior_term_weight", weight, "--max_train_steps", 12]
        train(script, prepared, tmp_path / str(weight), *FAST, *words)
        ends.append(sum(distances[-3:]))
        assert distances[0] == pytest.approx(0, abs=1e-9)
    assert ends[1] < 0.2 * ends[0]


@pytest.mark.parametrize("dropout", [0, 0.3])
@terms
def test_an_interrupted_run_ends_with_the_same_bits(
    script: Script,
    prepared: Prepared,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[Any],
    dropout: float,
) -> None:
    """Dropout draws for the rows with a gradient alone; the base has none."""
    words = [*FAST, *words, "--lora_dropout", dropout, "--gradient_accumulation_steps", 2]
    words += ["--max_train_steps", 6, "--checkpointing_steps", 2]
    whole = train(script, prepared, tmp_path / "whole", *words)
    folder = tmp_path / "broken"

    class Stopped(BaseException):
        pass

    def stop(*_: Any) -> Any:
        raise Stopped

    module, count = training_script(), 0
    original = module.micro_step

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return stop() if count == 8 else original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "micro_step", counted)
        with pytest.raises(Stopped):
            train(script, prepared, folder, *words)
    train(script, prepared, folder, *words, "--resume_from_checkpoint", "latest")
    assert same_lora(whole.folder / "pytorch_lora_weights.safetensors", folder / "pytorch_lora_weights.safetensors")
    for name in ("checkpoint-6/state.safetensors", "checkpoint-6/state.json", "losses.jsonl"):
        assert (whole.folder / name).read_bytes() == (folder / name).read_bytes()
    identity = json.loads((folder / "run.json").read_text())["identity"]
    values = identity.get("values", identity)
    assert values["--prior_term"] == words[words.index("--prior_term") + 1]
    assert values["the class prompt"] == (CLASS_PROMPT if "prediction" in words else None)


@terms
def test_recomputed_and_streamed_blocks_give_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Any, words: list[Any]
) -> None:
    """With modulations ahead too, whose rows are the trained model's; the base computes its own."""
    words = [*FAST, *words, "--max_train_steps", 4]
    plain = train(script, prepared, tmp_path / "plain", *words)
    for number, placed in enumerate(
        (
            ["--recompute_blocks", 1, "--stream_blocks", 0],
            ["--recompute_blocks", 0, "--stream_blocks", 2, "--stream_buffers", 2],
            ["--recompute_blocks", 1, "--stream_blocks", 2, "--modulations_ahead", "on"],
            ["--recompute_blocks", 2, "--stream_blocks", 2, "--offload_inputs", "on", "--stream_from", "files"],
        )
    ):
        run = train(script, prepared, tmp_path / str(number), *words, *placed)
        assert run.losses == plain.losses, placed
        mine, theirs = (load_file(each.folder / "pytorch_lora_weights.safetensors") for each in (run, plain))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), placed


def test_in_half_precision_with_a_scaler(
    script: Script, prepared: Prepared, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_float16(monkeypatch)
    run = train(script, prepared, tmp_path, "--prior_term", "prediction")
    assert all(line["loss"] < 100 for line in run.losses)


def test_a_class_prompt_must_have_been_embedded(script: Script, private: Prepared, tmp_path: Any) -> None:
    """The command in the sentence mends it. The preference needs none."""
    private.embeddings.unlink()
    text = [
        "--instance_prompt",
        "a photo of sks robot",
        "--max_sequence_length",
        20,
        "--output_path",
        private.embeddings,
    ]
    model = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    assert script("compute_embeddings", *model, *text, "--device", "cpu").code == 0
    train(script, private, tmp_path / "preference", "--prior_term", "preference")
    run = train(script, private, tmp_path / "out", "--prior_term", "prediction", code=2)
    assert run.error.startswith("--prior_term prediction needs the embedding of a class prompt, and ")
    assert run.wrote_no_weights()
    _, name, *arguments = shlex.split(run.error.split("`")[1])
    assert script(name.removesuffix(".py"), *arguments).code == 0
    mended = train(script, private, tmp_path / "out", "--prior_term", "prediction")
    assert ", prior term prediction × 1\n" in mended.out


def test_another_class_prompt_is_another_run(script: Script, private: Prepared, tmp_path: Any) -> None:
    train(script, private, tmp_path / "out", "--prior_term", "prediction")
    model = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    text = [
        "--instance_prompt",
        "a photo of sks robot",
        "--max_sequence_length",
        20,
        "--output_path",
        private.embeddings,
    ]
    assert script("compute_embeddings", *model, *text, "--class_prompt", "a dog", "--device", "cpu").code == 0
    words = ["--prior_term", "prediction", "--resume_from_checkpoint", "latest"]
    run = train(script, private, tmp_path / "out", *words, code=2)
    assert f"was trained with the class prompt '{CLASS_PROMPT}', not 'a dog': type " in run.error


def test_the_terms_by_hand() -> None:
    """In float32, beside formulas in float64; where the model is the base nothing pulls, or the loss pulls alone."""
    generator = torch.Generator().manual_seed(0)
    velocity, base, latents, noise = torch.randn(4, 3, 16, 4, 4, generator=generator)
    sigmas, weights = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1, 1), torch.tensor([1.0, 0.5, 0.0])
    exact = [tensor.double() for tensor in (velocity, base, latents, noise, sigmas, weights)]
    v, b, x, n, s, w = exact
    for config in (FlowConfig("none"), replace(FlowConfig("sigma_sqrt"), precondition_outputs=True)):
        scale = (s if config.precondition_outputs else torch.ones_like(s)) ** 2
        scale = scale * (s**-2 if config.weighting_scheme == "sigma_sqrt" else 1)
        mine, theirs = ((scale * (each - (n - x)) ** 2).flatten(1).mean(1) for each in (v, b))
        moved = (scale * (v - b) ** 2).flatten(1).mean(1)

        found = velocity.clone().requires_grad_()
        loss = prediction_loss(found, base, sigmas, weights, config)
        torch.testing.assert_close(loss.double(), (w * moved).mean(), rtol=1e-6, atol=0)
        loss.backward()
        expected = (w.view(-1, 1, 1, 1) * scale * 2 * (v - b)) / v.numel()
        torch.testing.assert_close(found.grad.double(), expected, rtol=1e-5, atol=1e-9)
        assert prediction_loss(base, base, sigmas, weights, config) == 0

        arguments = latents, noise, sigmas, weights, config
        loss = preference_loss(velocity, base, *arguments, 4.0)
        expected_loss = (w * 0.5 * torch.log1p(torch.exp(4 * (mine - theirs)))).mean()
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-7)
        at_base = [base.clone().requires_grad_() for _ in range(2)]
        preference_loss(at_base[0], base, *arguments, 4.0).backward()
        flow_matching_loss(at_base[1], *arguments).backward()
        torch.testing.assert_close(at_base[0].grad, at_base[1].grad)


def test_the_adapter_is_on_again_afterwards() -> None:
    from small_transformer import CPU, inputs, make_transformer

    transformer = make_transformer(layers=2)
    words = tuple(inputs(0, CPU).values())
    model = VelocityModel(transformer, torch.float32)
    before = model(*words)
    base = model.base_velocity(*words)
    assert not base.requires_grad
    assert torch.equal(model(*words), before)
    assert all(parameter.requires_grad for name, parameter in transformer.named_parameters() if "lora_" in name)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(model(*words), base)
    assert not torch.equal(before, base)
    transformer.transformer_blocks[0].forward = None  # whatever goes wrong inside
    with pytest.raises(TypeError):
        model.base_velocity(*words)
    assert not any(getattr(module, "_disable_adapters", False) for module in transformer.modules())
