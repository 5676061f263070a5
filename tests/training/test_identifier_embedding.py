"""The identifier's embedding: its gradients, its file, exact resume, and what goes with it or is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.identifier_embedding import EMBEDDING_FILE, IdentifierTokenizer, read_identifier_embedding
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.records import StepInputs
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan
from sd3_lora.stage_one.text_encoders import encode_clips
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_flags import PriorConfig
from sd3_lora.transformer.identifier_vectors import IdentifierVectors
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE
from sd3_lora.transformer.lora_files import read_lora_file
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.trained_clips import ClipTraining, TrainedClips
from sd3_lora.transformer.velocity import VelocityModel

import numpy as np
import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, save_pictures
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from safetensors.torch import load_file
from test_resume import Interrupted, assert_same_run, interrupt
from training_runs import Run, Script, private_copy, train

WORDS = ["--train_identifier_embedding", "sks", "--identifier_lr", 0.02, "--learning_rate", 0.01]


def embedding(folder: Path, name: str = EMBEDDING_FILE) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# A run, and its file


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of both, three vectors, with an average and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--output_dir", folder, *WORDS, "--use_ema"]
    words += ["--num_vectors", 3, "--ema_decay", 0.5]
    words += ["--validation_prompt", PROMPT, "--validation_num_steps", 3, "--validation_guidance", 4]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in words]) == 0
    return folder


class Stock(StableDiffusion3Pipeline, TextualInversionLoaderMixin):
    """The stock pipeline, which of itself has no `load_textual_inversion`, as docs/text_encoders.md has it."""


def stock_with(model: Path, path: Path) -> tuple[Stock, str]:
    """The stock pipeline with the embedding loaded by diffusers, and what stands in prompts for the identifier."""
    pipeline, state = Stock.from_pretrained(model), load_file(path)
    names = [f"<s{index}>" for index in range(len(state["clip_l"]))]
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(state[key], token=names, text_encoder=encoder, tokenizer=tokenizer)
        encoder.text_model.eos_token_id = tokenizer.eos_token_id
    return pipeline, "".join(names)


@pytest.mark.parametrize("old_end", [False, True])
def test_diffusers_reads_the_file(prepared: Prepared, tmp_path: Path, trained: Path, old_end: bool) -> None:
    """Loaded by diffusers' own loader the stock encoders give what ours give, bit for bit; T5 reads the plain word."""
    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    for name in CLIPS if old_end else ():  # as SD3's
        path = model / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    prompts = ["a photo of sks robot, Sks!", "a red robot", "sks tasks"]
    pipeline, names = stock_with(model, trained / EMBEDDING_FILE)
    texts = [f"a photo of {names} robot, {names}!", "a red robot", f"{names} tasks"]
    expected, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, prompts, max_sequence_length=20, do_classifier_free_guidance=False
    )
    files = ModelFiles(ModelConfig(str(model)))
    identifier = read_identifier_embedding(trained / EMBEDDING_FILE, {"text_encoder": 8, "text_encoder_2": 16})
    plan = TextEncoderPlan("fp32", False, 20, torch.device("cpu"))
    hidden, found = encode_clips(files, prompts, plan, [], identifiers=[identifier])
    assert torch.equal(torch.cat(hidden, -1), expected[:, :77, :24].half())
    assert torch.equal(found, pooled.half())


def test_the_benchmark_encodes_with_it(prepared: Prepared, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dreambooth.py gives the stock pipeline CLIPs that read the vectors, and afterwards those of before."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    from dreambooth import changed_clips

    pipeline, names = stock_with(prepared.model, trained / EMBEDDING_FILE)
    settings: dict[str, Any] = {"max_sequence_length": 20, "do_classifier_free_guidance": False}
    text = PROMPT.replace("sks", names)
    expected, _, pooled, _ = pipeline.encode_prompt(text, text, PROMPT, **settings)
    plain, files = (
        StableDiffusion3Pipeline.from_pretrained(prepared.model),
        ModelFiles(ModelConfig(str(prepared.model))),
    )
    before = plain.encode_prompt(PROMPT, None, None, **settings)[0]
    lora = read_lora_file(trained / LORA_FILE, files.read_config("transformer"), files.read_config)
    with changed_clips(plain, lora):
        found, _, also_pooled, _ = plain.encode_prompt(PROMPT, None, None, **settings)
    assert torch.equal(found, expected)
    # A product with one row is rounded by where it lies in memory.
    torch.testing.assert_close(also_pooled, pooled, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, before)
    assert torch.equal(plain.encode_prompt(PROMPT, None, None, **settings)[0], before)


def drawn(script: Script, prepared: Prepared, outdir: Path, *more: object, code: int = 0) -> Any:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    flags += ["--outdir", outdir, "--num_steps", 3, "--guidance", 4, "--prompt", PROMPT, "--device", "cpu", *more]
    result = script("inference", *flags)
    assert result.code == code, result.err
    if code:
        return result.err
    (path,) = outdir.glob("0*/img_00.png")
    return np.asarray(Image.open(path)).astype(int)


def test_the_same_picture_everywhere(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    """The stock pipeline's, ours, and the one that was drawn while training (with the average)."""
    from sd3_lora.drawing.pictures import plan_pictures

    pipeline, names = stock_with(prepared.model, trained / EMBEDDING_FILE)
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    pipeline.set_progress_bar_config(disable=True)
    (plan,) = plan_pictures(tmp_path, [PROMPT], 1, {"seed": 0})
    text = PROMPT.replace("sks", names)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20}
    settings |= {"latents": plan.noise((16, 8, 8))[None], "height": 64, "width": 64, "output_type": "np"}
    (picture,) = pipeline(prompt=text, prompt_3=PROMPT, **settings).images
    expected = (picture * 255).round().astype(int)
    (plain,) = pipeline(prompt=PROMPT, **settings).images
    assert np.abs(expected - (plain * 255).round()).mean() > 1
    assert np.abs(drawn(script, prepared, tmp_path / "ours", "--lora", trained) - expected).max() <= 2
    (picture,) = (trained / "samples" / "step_000004").glob("*.png")
    average = drawn(script, prepared, tmp_path / "average", "--lora", trained / EMA_FILE)
    assert np.abs(np.asarray(Image.open(picture)).astype(int) - average).max() <= 2
    assert np.abs(average - expected).max() > 2


# Gradients


def test_gradients_are_those_of_a_plain_loop(tiny_sd3: Path) -> None:
    """Two steps of AdamW beside the stock encoders with new rows of the token embeddings, in float32."""
    micro_step = importlib.import_module(TRAINING_SCRIPT).micro_step
    prompts, generator = ["a photo of sks robot", "sks, a red robot of Sks"], torch.Generator().manual_seed(6)
    latents, noise = torch.randn(2, 2, 16, 8, 8, generator=generator)
    sigmas = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    embeds, pooled = torch.randn(2, 97, 48, generator=generator), torch.randn(2, 24, generator=generator)
    starts = {name: torch.randn(2, width, generator=generator) for name, width in zip(CLIPS, (8, 16), strict=True)}

    def ours() -> list[list[torch.Tensor]]:
        pipeline, found = StableDiffusion3Pipeline.from_pretrained(tiny_sd3), []
        clips = {name: getattr(pipeline, name) for name in CLIPS}
        ClipTraining({}, None, vectors=2).attach(clips)
        model = VelocityModel(
            pipeline.transformer.requires_grad_(False),
            torch.float32,
            clips=TrainedClips(clips, IdentifierVectors(starts, dict.fromkeys(CLIPS, 1.0))),
        ).train()
        assert model.clips is not None
        assert model.clips.identifier is not None
        tokenizers = [IdentifierTokenizer(t, {"sks": 2}) for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        tokens = torch.stack([tokenizer(prompts, **options).input_ids for tokenizer in tokenizers], 1)
        states, ends = model.clips.embed(tokens)
        inputs = StepInputs(latents, noise, sigmas, 1000 * sigmas.flatten(), embeds, pooled, torch.ones(2),
            torch.empty(0, dtype=torch.long), states, ends, torch.ones(2, 2), model.clips.places(tokens),
        )  # fmt: skip
        parameters = list(model.clips.identifier.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
        for _ in range(2):
            flow = FlowConfig(weighting_scheme="none", precondition_outputs=False)
            loss = micro_step(model, inputs, flow, PriorConfig())
            loss.backward()
            found.append([loss.detach(), *(parameter.grad.clone() for parameter in parameters)])
            optimizer.step()
            optimizer.zero_grad()
        return found

    def plain() -> list[list[torch.Tensor]]:
        pipeline, found, ids = StableDiffusion3Pipeline.from_pretrained(tiny_sd3), [], []
        clips = [getattr(pipeline, name) for name in CLIPS]
        for module in (pipeline.transformer, *clips):
            module.requires_grad_(False)
        for clip, tokenizer, name in zip(clips, (pipeline.tokenizer, pipeline.tokenizer_2), CLIPS, strict=True):
            tokenizer.add_tokens(["<s0>", "<s1>"])
            clip.resize_token_embeddings(len(tokenizer))
            rows = clip.get_input_embeddings().weight
            rows.data[-2:] = starts[name]
            rows.requires_grad_()
            texts = ["a photo of <s0><s1> robot", "<s0><s1>, a red robot of <s0><s1>"]
            options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
            ids.append(tokenizer(texts, **options).input_ids)
        parameters = [clip.get_input_embeddings().weight for clip in clips]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
        for _ in range(2):
            outputs = [clip(each, output_hidden_states=True) for clip, each in zip(clips, ids, strict=True)]
            hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            noisy = (1 - sigmas) * latents + sigmas * noise
            velocity = pipeline.transformer(
                hidden_states=noisy,
                timestep=1000 * sigmas.flatten(),
                encoder_hidden_states=torch.cat([torch.nn.functional.pad(hidden, (0, 24)), embeds[:, 77:]], dim=1),
                pooled_projections=torch.cat([output[0] for output in outputs], dim=-1),
            ).sample
            loss = (velocity - (noise - latents)).square().mean()
            loss.backward()
            found.append([loss.detach(), *(parameter.grad[-2:].clone() for parameter in parameters)])
            for parameter in parameters:
                parameter.grad[:-2] = 0  # all other tokens stay
            optimizer.step()
            optimizer.zero_grad()
        return found

    for step, (mine, expected) in enumerate(zip(ours(), plain(), strict=True)):
        for value, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=2e-4, atol=1e-6 * float(other.abs().max()), msg=str(step))
        assert all(float(gradient.abs().max()) > 1e-6 for gradient in expected[1:])


# Flags


def test_it_begins_as_the_plain_run(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Before the first update the prompt is encoded as ever; T5's part and the rest of the step are the same."""
    mine = train(script, prepared, tmp_path / "mine", *WORDS).losses
    plain = train(script, prepared, tmp_path / "plain", "--learning_rate", 0.01).losses
    assert mine[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02)  # the parquet's are rounded to float16
    assert mine[2]["loss"] != pytest.approx(plain[2]["loss"], rel=1e-6)


def test_each_flag_has_its_effect(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    def run(name: str, *more: object) -> tuple[dict[str, torch.Tensor], Run]:
        found = train(script, prepared, tmp_path / name, *WORDS, "--max_train_steps", 1, *more)
        return embedding(found.folder), found

    plain, first = run("plain")
    assert {key: tuple(value.shape) for key, value in plain.items()} == {"clip_l": (2, 8), "clip_g": (2, 16)}
    assert {len(value) for value in run("vectors", "--num_vectors", 4)[0].values()} == {4}
    other, begun = run("begun", "--initializer_word", "robot")
    assert not same({k: v[:1] for k, v in other.items()}, {k: v[:1] for k, v in plain.items()})
    assert begun.losses[0]["loss"] != first.losses[0]["loss"]
    slower, same_lora = run("rate", "--identifier_lr", 0.001)
    assert not same(slower, plain)
    assert same(same_lora.lora, first.lora)
    again = train(script, prepared, tmp_path / "again", *WORDS, "--max_train_steps", 1)
    assert same(embedding(again.folder), plain)
    names = ["--train_text_encoder_ti", "--token_abstraction", "sks", *WORDS[2:], "--max_train_steps", 1]
    names += ["--num_new_tokens_per_abstraction", 2, "--initializer_concept", "sks"]
    assert same(embedding(train(script, prepared, tmp_path / "names", *names).folder), plain)
    decayed = run("decay", "--adam_weight_decay", 100)[0]
    assert same(decayed, plain)


def test_the_word_of_diffusers_is_tok(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    error = train(script, prepared, tmp_path / "out", "--train_text_encoder_ti", code=2).error
    assert "--train_identifier_embedding TOK: no prompt of the subject's pictures has that word" in error
    assert PROMPT in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--identifier_lr", 1e-3], "--identifier_lr 0.001 is of --train_identifier_embedding: add that, or leave it"),
        (["--start_lora_after", 0.5], "--start_lora_after 0.5 is of --train_identifier_embedding"),
        (
            ["--train_identifier_embedding", "ohwx"],
            "ohwx: no prompt of the subject's pictures has that word",
        ),
        (["--train_identifier_embedding", " "], "--train_identifier_embedding needs a word: type the identifier"),
        ([*WORDS, "--num_vectors", 0], "--num_vectors 0 must be at least 1"),
        ([*WORDS, "--num_vectors", 99], "--num_vectors 99 leaves a prompt too little room: type at most 32"),
        ([*WORDS, "--identifier_lr", 0], "--identifier_lr 0 must be positive"),
        ([*WORDS, "--stop_identifier_after", 1.5], "--stop_identifier_after 1.5 is a share of the steps, up to 1"),
        ([*WORDS, "--start_lora_after", 1.5], "--start_lora_after 1.5 is a share of the steps, from 0 to 1"),
        (
            [*WORDS, "--start_lora_after", 0.5, "--stop_identifier_after", 0.3],
            "--stop_identifier_after 0.3 and --start_lora_after 0.5 leave steps between them that train nothing",
        ),
        ([*WORDS, "--optimizer", "schedule_free_adamw"], "does not go with --optimizer schedule_free_adamw"),
        (
            [*WORDS[:2], "--optimizer", "prodigy", "--start_lora_after", 0.5],
            "--stop_identifier_after and --start_lora_after do not go with --optimizer prodigy",
        ),
        ([*WORDS, "--optimizer", "prodigy"], "--optimizer prodigy finds one learning rate for all: type --identifier_"),
        (
            [*WORDS, "--start_lora_after", 1, "--train_text_encoder"],
            "--start_lora_after 1 trains the identifier's embedding alone, and --train_text_encoder a LoRA",
        ),
        (
            [*WORDS, "--modulations_ahead", "on", "--stream_blocks", 2],
            "--modulations_ahead on computes from prompts before the CLIPs have encoded them: leave it out, or leave "
            "out --train_identifier_embedding",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_go_together(
    script: Script, prepared: Prepared, tmp_path: Path, words: list[Any], says: str
) -> None:
    run = train(script, prepared, tmp_path / "out", *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


# Phases


def phases(script: Script, prepared: Prepared, folder: Path, *more: object) -> tuple[Run, list[Any], list[bool]]:
    """Six steps with a file of each; the words, and whether the LoRA is all zero after each step."""
    words = [*WORDS, "--max_train_steps", 6, "--save_every_n_steps", 1, "--checkpointing_steps", 2]
    words += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2, *more]
    run = train(script, prepared, folder, *words)
    files = [load_file(folder / f"{folder.name}-step{step:08d}.safetensors") for step in range(1, 7)]
    zero = [not any(bool(tensor.any()) for name, tensor in file.items() if ".lora_B." in name) for file in files]
    return run, words, zero


def changes(folder: Path, suffix: str = "_learned_embeds") -> list[bool]:
    """Whether each step from the second on changes a file."""
    files = [load_file(folder / f"{folder.name}-step{step:08d}{suffix}.safetensors") for step in range(1, 7)]
    return [not same(before, after) for before, after in pairwise(files)]


def test_first_the_embedding_then_the_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Half of the steps each; the other stays as it is, bit for bit; resumed before, at and after the change."""
    more = ["--start_lora_after", 0.5, "--stop_identifier_after", 0.5]
    run, words, zero = phases(script, prepared, tmp_path / "whole", *more)
    assert zero == [True, True, True, False, False, False]
    assert changes(run.folder) == [True, True, False, False, False]
    assert "until step 3, LoRA from step 4" in run.out
    for step in (2, 4):
        folder = tmp_path / f"resumed{step}"
        train(script, prepared, folder, *words, "--resume_from_checkpoint", run.folder / f"checkpoint-{step}")
        for name in (LORA_FILE, EMBEDDING_FILE):
            assert (folder / name).read_bytes() == (run.folder / name).read_bytes(), (step, name)
    longer = [*words, "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    error = train(script, prepared, run.folder, *longer, code=2).error
    assert "was to train the LoRA from step 4, of 6, and this command from step 5: type --max_train_steps 6" in error


def test_the_lora_begins_as_a_new_one(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Its first step is as large as one of AdamW's from the beginning: the steps before left no state."""
    run, _, _ = phases(script, prepared, tmp_path / "later", "--start_lora_after", 0.5, "--lr_warmup_steps", 0)
    first = load_file(run.folder / "later-step00000004.safetensors")
    steps = torch.cat([tensor.flatten() for name, tensor in first.items() if ".lora_B." in name]).abs()
    assert float(steps.median()) == pytest.approx(0.01, rel=1e-3)  # the rate, where a gradient is not tiny


def test_the_embedding_alone(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run, words, zero = phases(script, prepared, tmp_path / "alone", "--start_lora_after", 1)
    assert all(zero)
    assert all(changes(run.folder))
    assert ", no LoRA: its file is all zeros" in run.out
    assert f"wrote {run.folder / LORA_FILE} and {EMBEDDING_FILE}, read back and compared" in run.out
    longer = [*words, "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    train(script, prepared, run.folder, *longer)
    assert (run.folder / "checkpoint-8").is_dir()


# What it goes with


def test_an_interrupted_run_ends_with_the_same_bits(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a LoRA of the CLIPs, an average, dropout, accumulation and prior prompts."""
    words = [*WORDS, "--max_train_steps", 6, "--checkpointing_steps", 2, "--lora_dropout", 0.3, "--use_ema"]
    words += ["--gradient_accumulation_steps", 2, "--caption_dropout", 0.3, "--clip_l_dropout", 0.3]
    words += ["--prior_term", "prediction", "--prior_share", 0.5, "--train_batch_size", 2]
    words += ["--train_text_encoder", "--text_encoder_lr", 0.02]
    whole = train(script, prepared, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        interrupt(patch, 9)
        with pytest.raises(Interrupted):
            train(script, prepared, tmp_path / "killed", *words)
    torch.manual_seed(12345)
    train(script, prepared, tmp_path / "killed", *words, "--resume_from_checkpoint", "latest")
    assert_same_run(whole.folder, tmp_path / "killed", 6)
    for name in (EMBEDDING_FILE, "learned_embeds_ema.safetensors"):
        assert (whole.folder / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert read_state(tmp_path / "killed" / "checkpoint-6")["identifier"].keys() == set(CLIPS)
    assert not same(embedding(whole.folder), embedding(whole.folder, "learned_embeds_ema.safetensors"))
    other = [*words, "--num_vectors", 3, "--resume_from_checkpoint", "latest"]
    assert "--num_vectors" in train(script, prepared, tmp_path / "killed", *other, code=2).error
    without = [*words[4:], "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    assert "--train_identifier_embedding sks" in train(script, prepared, tmp_path / "killed", *without, code=2).error


@pytest.mark.parametrize(
    "words",
    [
        ["--prior_term", "preference"],
        ["--train_batch_size", 2, "--mixed_precision", "bf16"],
        ["--optimizer", "adamw_8bit"],
        ["--optimizer", "adafactor"],
        ["--lora_type", "lokr"],
        ["--stream_blocks", 2, "--recompute_blocks", 2],
        ["--base_precision", "nf4"],
        ["--lr_pattern", "attn.to_q=1e-3", "--start_lora_after", 0.4],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_goes_with_it(script: Script, prepared: Prepared, tmp_path: Path, words: list[Any]) -> None:
    """The embedding is trained, the same in each run."""
    first = train(script, prepared, tmp_path / "first", *WORDS, *words)
    second = train(script, prepared, tmp_path / "second", *WORDS, *words)
    assert first.losses == second.losses
    assert same(embedding(first.folder), embedding(second.folder))
    begun = load_file(prepared.model / "text_encoder" / "model.safetensors")[
        "text_model.embeddings.token_embedding.weight"
    ]
    assert not any(torch.equal(row, other) for row in embedding(first.folder)["clip_l"] for other in begun)


def test_class_pictures_go_with_it(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Their prompt is without the identifier, and so without gradient for it."""
    save_pictures(tmp_path / "class", [(64, 64)] * 2, seed=9)
    words = [*WORDS, "--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--num_class_images", 2]
    words += ["--class_prompt", "a photo of a robot"]
    run = train(script, private_copy(prepared, tmp_path / "copy"), tmp_path / "prior", *words)
    assert embedding(run.folder)["clip_l"].isfinite().all()


def test_a_lora_to_begin_with_brings_its_embedding(
    script: Script, prepared: Prepared, tmp_path: Path, trained: Path
) -> None:
    words = ["--init_lora", trained, "--max_train_steps", 1, "--learning_rate", 1e-9]
    error = train(script, prepared, tmp_path / "without", *words, code=2).error
    assert "was trained with an embedding of 'sks', without which it is another LoRA: type --train_identifier" in error
    words += ["--train_identifier_embedding", "sks", "--identifier_lr", 1e-9]
    error = train(script, prepared, tmp_path / "two", *words, code=2).error
    assert "--init_lora has 3 vectors in place of 'sks', and this command 2: type --num_vectors 3" in error
    run = train(script, prepared, tmp_path / "three", *words, "--num_vectors", 3)
    for key, values in embedding(run.folder).items():
        before = embedding(trained)[key]
        ratio = values / before  # held to the size of other tokens' embeddings
        assert float(ratio.std()) < 1e-3


# Drawing


def test_a_missing_embedding_is_refused(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    """Never drawn without it: where it is not beside the LoRA, is another, or is named."""
    shutil.copy(trained / LORA_FILE, tmp_path / LORA_FILE)
    error = drawn(script, prepared, tmp_path / "a", "--lora", tmp_path, code=2)
    assert "was trained with an embedding of 'sks', which is not beside it as learned_embeds.safetensors: put" in error
    shutil.copy(trained / "learned_embeds_ema.safetensors", tmp_path / EMBEDDING_FILE)
    error = drawn(script, prepared, tmp_path / "b", "--lora", tmp_path, code=2)
    assert "(learned_embeds.safetensors is of another training): put it there, or type --identifier_embedding" in error
    named = ["--lora", tmp_path, "--identifier_embedding", trained / EMBEDDING_FILE]
    picture = drawn(script, prepared, tmp_path / "c", *named)
    assert np.array_equal(picture, drawn(script, prepared, tmp_path / "d", "--lora", trained))


def test_drawn_without_a_lora(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    """The embedding alone changes the picture; the base beside it is the base; a prompt must have the word."""
    base = drawn(script, prepared, tmp_path / "base", "--max_sequence_length", 20)
    flag = ["--identifier_embedding", trained / EMBEDDING_FILE]
    alone = drawn(script, prepared, tmp_path / "alone", *flag, "--compare")
    assert np.abs(alone - base).max() > 0
    (path,) = (tmp_path / "alone").glob("0*/img_00_base.png")
    assert np.array_equal(np.asarray(Image.open(path)).astype(int), base)
    flags = ["--pretrained_model_name_or_path", prepared.model, "--prompt", "a red robot", "--device", "cpu", *flag]
    result = script("inference", *flags, "--outdir", tmp_path / "out", "--data_df_path", prepared.embeddings)
    assert result.code == 2
    assert "--identifier_embedding is of 'sks', which stands in no prompt: put it into --prompt" in result.err


def test_exports_and_merges_say_what_becomes_of_it(
    script: Script, prepared: Prepared, tmp_path: Path, trained: Path
) -> None:
    model = ["--pretrained_model_name_or_path", prepared.model]
    for command, more in (("export", []), ("merge", ["--output_dir", tmp_path / "merged"])):
        result = script(f"sd3_lora.{command}", trained, *model, *more)
        assert result.code == 0, result.err
        assert "note: the LoRA was trained with an embedding of 'sks', which stays a file of its own" in result.out
    exported = drawn(script, prepared, tmp_path / "e", "--lora", trained / LORA_FILE.replace(".", "_kohya."))
    plain = drawn(script, prepared, tmp_path / "p", "--lora", trained)
    assert np.abs(exported - plain).max() <= 2


def test_the_card_says_how(trained: Path, prepared: Prepared) -> None:
    """Its code runs as it stands."""
    text = (trained / "README.md").read_text()
    assert (
        "type `embedding:learned_embeds` in place of `sks` into `clip_l` and `clip_g`, and `sks` into `t5xxl`" in text
    )
    code = text.split("```python\n")[1].split("```")[0].split("pipeline(prompt")[0]
    code = code.replace("THIS_FOLDER", str(trained)).replace("torch.float16", "torch.float32")
    code = code.replace("pipeline.enable_model_cpu_offload()", "").replace(
        f'"{prepared.model.name}"', repr(str(prepared.model))
    )
    names: dict[str, Any] = {}
    exec(code.split("pipeline(prompt")[0], names)
    assert names["prompt"] == PROMPT
    assert len(names["vectors"]) == 3
    assert names["pipeline"].tokenizer("<s0>").input_ids[1] == len(names["pipeline"].tokenizer) - 3
