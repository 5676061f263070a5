"""The term that keeps the trained model near its base: its numbers, beside a plain loop; resume; what it needs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from fractions import Fraction
from typing import Any

from sd3_lora.common.records import PromptEmbedding, StepInputs
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.draws import GlobalDraws
from sd3_lora.training.flow import flow_matching_loss, prediction_loss, preference_loss
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.training.prior_prompts import PriorPrompts
from sd3_lora.transformer.lora import LoraKind, attach_lora, target_modules
from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from conftest import PROMPT, Prepared
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from safetensors.torch import load_file
from training_runs import Run, Script, same_lora, train, training_script, use_float16

CLASS_PROMPT = "a photo of a robot"
FAST = ["--learning_rate", 0.02, "--train_batch_size", 2, "--lora_alpha", 8]
TERMS = {
    "prediction": ["--prior_term", "prediction", "--prior_term_weight", 3, "--prior_share", 1],
    "prediction of a quarter": ["--prior_term", "prediction", "--prior_term_weight", 3],
    "preference": ["--prior_term", "preference", "--prior_term_weight", 1],
}
terms = pytest.mark.parametrize("words", TERMS.values(), ids=TERMS.keys())


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
    of_class = row.prompt_embeds.float(), row.pooled_prompt_embeds.float()
    seen = 0  # pictures before this micro-batch

    def plain(model: VelocityModel, inputs: StepInputs, flow: FlowConfig, prior: PriorConfig) -> torch.Tensor:
        nonlocal seen
        noisy = (1 - inputs.sigmas) * inputs.latents + inputs.sigmas * inputs.noise
        timesteps, own = inputs.timesteps[:2], (inputs.prompt_embeds[:2], inputs.pooled_prompt_embeds[:2])

        def velocity(transformer: Any, text: Any, rows: Any = slice(None)) -> torch.Tensor:
            return transformer(noisy[rows], text[0], text[1], timesteps[rows], return_dict=False)[0]

        def errors(difference: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
            sigmas = inputs.sigmas[rows]
            scale = sigmas if flow.precondition_outputs else 1
            weighting = compute_loss_weighting_for_sd3(flow.weighting_scheme, sigmas)
            return (weighting * (scale * difference) ** 2).flatten(1).mean(1)

        target = inputs.noise - inputs.latents
        mine = errors(velocity(model.transformer, own) - target)
        if prior.prior_term == "preference":
            theirs = errors(velocity(base, own) - target)
            return (-2 * torch.nn.functional.logsigmoid(theirs - mine)).mean()
        every = 4 if "--prior_share" not in words else 1  # the fourth, the eighth, … picture of the run
        rows = [row for row in range(2) if (seen + row + 1) % every == 0]
        seen += 2
        if not rows:
            return mine.mean()
        text = of_class[0].expand(len(rows), -1, -1), of_class[1].expand(len(rows), -1)
        moved = errors(velocity(model.transformer, text, rows) - velocity(base, text, rows), rows)
        return mine.mean() + 3 * every * moved.sum() / 2

    with monkeypatch.context() as patch:
        patch.setattr(training_script(), "micro_step", plain)
        loop = train(script, prepared, tmp_path / "loop", *FAST, *words, *flow, "--max_train_steps", 4)
    for found, expected in zip(numbers(run), numbers(loop), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
    without = train(script, prepared, tmp_path / "without", *FAST, *flow, "--max_train_steps", 4)
    # The first steps differ in nothing that the prediction says: the model is still the base.
    if words[1] == "prediction":
        assert numbers(run)[0] == pytest.approx(numbers(without)[0], rel=2e-5)
    assert numbers(run)[3][1] != pytest.approx(numbers(without)[3][1], rel=1e-3)


@pytest.mark.parametrize(("term", "default"), [("prediction", 1), ("preference", 10)])
def test_the_weight_counts(script: Script, prepared: Prepared, tmp_path: Any, term: str, default: int) -> None:
    words = [*FAST, "--prior_term", term, "--max_train_steps", 5]
    runs = [
        train(script, prepared, tmp_path / str(weight), *words, "--prior_term_weight", weight)
        for weight in (default, 30 * default)
    ]
    assert numbers(runs[0])[4] != pytest.approx(numbers(runs[1])[4], rel=1e-3)
    assert train(script, prepared, tmp_path / "default", *words).losses == runs[0].losses


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[StepInputs]:
    """The inputs of all micro-steps to come."""
    seen: list[StepInputs] = []
    original = training_script().micro_step

    def noted(model: Any, inputs: StepInputs, *more: Any, **words: Any) -> torch.Tensor:
        seen.append(inputs)
        return original(model, inputs, *more, **words)

    monkeypatch.setattr(training_script(), "micro_step", noted)
    return seen


@pytest.mark.parametrize(
    ("batch", "share", "expected"),
    [
        (1, 0.25, [[], [], [], [0], [], [], [], [0]]),
        (2, 0.25, [[], [1], [], [1]]),
        (4, 0.25, [[3], [3], [3]]),
        (2, 0.5, [[1], [1], [1]]),
        (3, 0.7, [[1, 2], [1, 2], [1, 2], [0, 2], [0, 2]]),
        (2, 1, [[0, 1], [0, 1]]),
    ],
)
def test_pictures_come_once_more_evenly(
    script: Script,
    prepared: Prepared,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    share: float,
    expected: list[list[int]],
) -> None:
    seen = rows_of(monkeypatch)
    words = ["--prior_term", "prediction", "--prior_share", share, "--train_batch_size", batch]
    train(script, prepared, tmp_path, *words, "--max_train_steps", len(expected))
    assert [inputs.prior_rows.tolist() for inputs in seen] == expected
    assert all(len(inputs.timesteps) == batch + len(inputs.prior_rows) for inputs in seen)
    for inputs in seen:
        assert torch.equal(inputs.timesteps[batch:], inputs.timesteps[inputs.prior_rows])


def test_ranks_share_the_rows_of_one_process() -> None:
    row = PromptEmbedding("a", (), (), torch.zeros(3, 4), torch.zeros(5))
    prior = PriorPrompts([row, row], Fraction(7, 10))
    for number in range(10):
        whole = prior.rows(number, GlobalDraws(0, 4), 4).tolist()
        halves = [prior.rows(number, GlobalDraws(0, 2, rank, 2), 2).tolist() for rank in range(2)]
        assert [*halves[0], *(place + 2 for place in halves[1])] == whole


def test_prompts_of_a_file_are_taken_at_random(
    script: Script, prepared: Prepared, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside --class_prompt, which may be the empty prompt; the class prompt of stage one is not among them then."""
    seen = rows_of(monkeypatch)
    (tmp_path / "prompts.txt").write_text(f"# of the robot\n{CLASS_PROMPT}\n", encoding="utf-8")
    words = ["--prior_term", "prediction", "--prior_share", 1, "--class_prompt", "", "--train_batch_size", 2]
    words += ["--max_train_steps", 8]
    one = train(script, prepared, tmp_path / "one", *words)
    words += ["--prior_prompts_file", tmp_path / "prompts.txt"]
    two = train(script, prepared, tmp_path / "two", *words)
    again = train(script, prepared, tmp_path / "again", *words)
    assert two.losses == again.losses != one.losses
    with EmbeddingStore(prepared.embeddings) as store:
        rows = [store.read(prompt) for prompt in ("", CLASS_PROMPT)]
    taken = []
    for inputs in seen[8:16]:
        for embeds, pooled in zip(inputs.prompt_embeds[2:], inputs.pooled_prompt_embeds[2:], strict=True):
            (number,) = (i for i, row in enumerate(rows) if torch.equal(row.prompt_embeds.float(), embeds))
            assert torch.equal(rows[number].pooled_prompt_embeds.float(), pooled)
            taken.append(number)
    assert 3 <= sum(taken) <= 13
    identity = json.loads((two.folder / "run.json").read_text())["identity"]
    assert identity["the prior prompts"] == ["", CLASS_PROMPT]
    (tmp_path / "prompts.txt").write_text("a photo of a fish\n", encoding="utf-8")
    run = train(script, prepared, tmp_path / "other", *words, code=2)
    assert "lacks 'a photo of a fish': type `python compute_embeddings.py --" in run.error
    assert f"--prompts_file {tmp_path / 'prompts.txt'}" in run.error


def test_the_remedy_of_other_prior_prompts_names_both_flags(script: Script, prepared: Prepared, tmp_path: Any) -> None:
    words = ["--prior_term", "prediction", "--checkpointing_steps", 1, "--max_train_steps", 2]
    train(script, prepared, tmp_path / "out", *words)
    (tmp_path / "prompts").write_text(f"{PROMPT}\n{CLASS_PROMPT}\n", encoding="utf-8")
    words += ["--resume_from_checkpoint", "latest"]
    run = train(script, prepared, tmp_path / "out", *words, "--prior_prompts_file", tmp_path / "prompts", code=2)
    assert f"type --class_prompt '{CLASS_PROMPT}' without --prior_prompts_file to go on" in run.error
    train(script, prepared, tmp_path / "out", *words, "--class_prompt", CLASS_PROMPT)


def test_one_command_embeds_prior_and_validation_prompts(script: Script, private: Prepared, tmp_path: Any) -> None:
    """compute_embeddings.py takes one file of prompts, and this run has two."""
    for name, text in (("prior", "a photo of a fish\n"), ("drawn", "# later\na fish in it's bucket\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = ["--prior_term", "prediction", "--prior_prompts_file", tmp_path / "prior", "--max_train_steps", 1]
    words += ["--validation_prompts_file", tmp_path / "drawn", "--validation_prompt", "a photo of sks robot at sea"]
    words += ["--validation_num_steps", 1]
    refused = train(script, private, tmp_path / "out", *words, code=2)
    typed = shlex.split(refused.error.partition("`")[2].rpartition("`")[0])
    assert typed[:2] == ["python", "compute_embeddings.py"]
    assert script("compute_embeddings", *typed[2:]).code == 0
    train(script, private, tmp_path / "out", *words)


def test_modulations_ahead_need_as_many_rows_each_time(script: Script, prepared: Prepared, tmp_path: Any) -> None:
    streamed = ["--recompute_blocks", 2, "--stream_blocks", 2, "--prior_term", "prediction"]
    run = train(script, prepared, tmp_path / "out", *streamed, "--modulations_ahead", "on", code=2)
    assert run.error.startswith("--modulations_ahead on needs as many rows in each micro-batch, of which --prior_share")
    run = train(script, prepared, tmp_path / "out", *streamed)
    assert "modulations not ahead" in run.out
    even = train(script, prepared, tmp_path / "even", *streamed, "--train_batch_size", 4)
    assert "modulations not ahead" not in even.out


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
        words = ["--prior_term", "prediction", "--prior_term_weight", weight, "--prior_share", 1]
        words += ["--max_train_steps", 12]
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
    assert identity["--prior_term"] == words[words.index("--prior_term") + 1]
    assert identity["the prior prompts"] == ([CLASS_PROMPT] if "prediction" in words else None)


@terms
def test_recomputed_and_streamed_blocks_give_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Any, words: list[Any]
) -> None:
    """With modulations ahead too, whose rows are the trained model's; the base computes its own."""
    words = [*FAST, *words, "--max_train_steps", 4]
    is_even = "--prior_share" in words or "preference" in words
    plain = train(script, prepared, tmp_path / "plain", *words)
    for number, placed in enumerate(
        (
            ["--recompute_blocks", 1, "--stream_blocks", 0],
            ["--recompute_blocks", 0, "--stream_blocks", 2, "--stream_buffers", 2],
            ["--recompute_blocks", 1, "--stream_blocks", 2, "--modulations_ahead", "on" if is_even else "off"],
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
    assert ", prior term prediction × 1 on 0.25 of the pictures\n" in mended.out


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
    typed = f"type --class_prompt '{CLASS_PROMPT}' without --prior_prompts_file"
    was = f"was trained with the prior prompt '{CLASS_PROMPT}', not 'a dog'"
    assert f"{was}: {typed} to go on" in run.error
    train(script, private, tmp_path / "out", *words, "--class_prompt", CLASS_PROMPT, "--max_train_steps", 4)


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


@pytest.mark.parametrize("kind", [LoraKind(use_dora=True), LoraKind(start="pissa"), LoraKind(start="olora")])
def test_the_base_of_every_kind_is_the_untouched_model(kind: LoraKind) -> None:
    from small_transformer import CPU, WIDTH, inputs, smaller_transformer

    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": WIDTH, "pooled_projection_dim": 8}
    transformer = smaller_transformer(**sizes, num_layers=2, pos_embed_max_size=8)
    words = tuple(inputs(0, CPU).values())
    expected = VelocityModel(transformer, torch.float32)(*words)
    attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, 0, kind)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    model = VelocityModel(transformer, torch.float32)
    assert torch.equal(model.base_velocity(*words), expected)
    assert not torch.equal(model(*words), expected)
