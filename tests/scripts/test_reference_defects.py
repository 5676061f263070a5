"""One test for each defect that was found in diffusers' sd3_lora_colab scripts and their larger sibling.

The number in a name is the defect's: what the reference does is in the docstring.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.devices import choose_training_dtype
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan
from sd3_lora.stage_one.text_encoders import load_t5
from sd3_lora.training import micro_batches
from sd3_lora.training.flow import flow_matching_loss, load_noise_table
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.model_card import licence_of

import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, save_pictures
from safetensors.torch import load_file

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch):
    """The training module, to spy on."""
    return importlib.import_module(TRAINING_SCRIPT)


@pytest.fixture
def seen(training, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What each micro-step of a run saw."""
    drawn: list[object] = []
    calls: list[dict[str, object]] = []
    draw, step = micro_batches.InputSampler.sample, training.micro_step

    def draw_spy(self, batch):
        drawn.append(batch)
        return draw(self, batch)

    def spy(model, *rest):
        calls.append({"model": model, "batch": drawn.pop(0)})
        return step(model, *rest)

    monkeypatch.setattr(micro_batches.InputSampler, "sample", draw_spy)
    monkeypatch.setattr(training, "micro_step", spy)
    return calls


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_01_t5_in_int8_loads(script, prepared: Prepared, tmp_path: Path) -> None:
    """`from_pretrained(load_in_8bit=True)` is a TypeError on transformers 5."""
    flags = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", prepared.pictures]
    flags += ["--instance_prompt", PROMPT, "--output_path", tmp_path / "e.parquet", "--t5_precision", "int8"]
    assert script("compute_embeddings", *flags).code == 0
    with EmbeddingStore(tmp_path / "e.parquet") as store:
        assert store.provenance.precision == "int8"
    plan = TextEncoderPlan("int8", False, 20, torch.device("cpu"))
    encoder = load_t5(ModelFiles(ModelConfig(str(prepared.model))), plan)
    assert encoder.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.int8


def test_02_the_shift_is_subtracted(script, prepared, tmp_path, training, monkeypatch) -> None:
    """Latents are multiplied by the scale alone, and sit +0.093 off what inference decodes."""
    raw, normalized = [], []
    sample, normalize = micro_batches.sample_posterior, micro_batches.normalize_latents
    monkeypatch.setattr(micro_batches, "sample_posterior", lambda *a: raw.append(sample(*a)) or raw[-1])
    monkeypatch.setattr(
        micro_batches, "normalize_latents", lambda *a: normalized.append(normalize(*a)) or normalized[-1]
    )
    flags = [*prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 1]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    torch.testing.assert_close(normalized[0], (raw[0] - 0.0609) * 1.5305, rtol=0, atol=1e-6)


def test_03_the_default_loss_is_not_weighted_by_sigma_squared() -> None:
    """Output preconditioning is hard-coded: the weight is 0.01 at sigma 0.1."""
    velocity, latents, noise = (torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sigmas = torch.full((1, 1, 1, 1), 0.1)
    plain = ((velocity - (noise - latents)) ** 2).mean()
    ours = flow_matching_loss(velocity, latents, noise, sigmas, torch.ones(1), FlowConfig())
    torch.testing.assert_close(ours, plain)
    weighted = flow_matching_loss(
        velocity, latents, noise, sigmas, torch.ones(1), FlowConfig(precondition_outputs=True)
    )
    torch.testing.assert_close(weighted, 0.01 * plain)


def test_04_the_instance_prompt_has_an_effect(script, prepared: Prepared, tmp_path: Path) -> None:
    """--instance_prompt, --max_sequence_length, --cache_dir and --prior_generation_precision have none."""
    first = {}
    for prompt in (PROMPT, "a photo of a robot"):
        out = tmp_path / prompt
        flags = [*prepared.flags, "--instance_prompt", prompt, "--output_dir", out, "--max_train_steps", 1]
        assert script(TRAINING_SCRIPT, *flags).code == 0
        first[prompt] = losses(out)[0]
    assert first[PROMPT] != first["a photo of a robot"]
    length = script(TRAINING_SCRIPT, *prepared.flags, "--output_dir", tmp_path / "l", "--max_sequence_length", 77)
    assert length.code == 2
    assert "max_sequence_length 20, not 77" in length.err
    prior = script(TRAINING_SCRIPT, *prepared.flags, "--prior_generation_precision", "fp16")
    assert prior.code == 2  # with class pictures it has one: test_prior_preservation.py
    assert "--prior_generation_precision has no effect without --with_prior_preservation" in prior.err


def test_04_cache_dir_reaches_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def download(*_: object, **options: object) -> str:
        asked.update(options)
        return str(PROJECT / "miniature" / "model_index.json")

    monkeypatch.setattr("sd3_lora.common.model_files.hf_hub_download", download)
    ModelFiles(ModelConfig("some/model", cache_dir=str(tmp_path)))
    assert asked["cache_dir"] == str(tmp_path)


def test_05_shapes_come_from_the_data(script, prepared: Prepared, tmp_path: Path, seen) -> None:
    """(154, 4096) is hard-coded; any other sequence length fails."""
    assert script(TRAINING_SCRIPT, *prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 1).code == 0
    assert seen[0]["batch"].prompt_embeds.shape == (1, 77 + 20, 48)


def test_06_all_formats_are_read_and_dot_folders_are_not(script, tiny_sd3: Path, tmp_path: Path) -> None:
    """Only *.jpeg is embedded; everything, .cache included, is trained on; no .jpeg is a success."""
    folder = tmp_path / "dog"
    save_pictures(folder, [(64, 64), (64, 80)])
    save_pictures(folder / ".cache", [(64, 64)], seed=7)
    flags = [
        "--pretrained_model_name_or_path",
        tiny_sd3,
        "--instance_prompt",
        "a",
        "--output_path",
        tmp_path / "e.parquet",
    ]
    found = script("compute_embeddings", *flags, "--instance_data_dir", folder, "--recursive")
    assert found.code == 0
    assert "2 pictures in" in found.out
    with EmbeddingStore(tmp_path / "e.parquet") as store:
        assert len(store.prompts_of_images()) == 2
    (tmp_path / "empty").mkdir()
    none = script("compute_embeddings", *flags, "--instance_data_dir", tmp_path / "empty")
    assert none.code == 2
    assert "holds no pictures" in none.err


def test_07_a_changed_picture_is_found_before_the_transformer_is_loaded(
    script, prepared: Prepared, tmp_path: Path, training, monkeypatch
) -> None:
    """It is a KeyError in mid-training."""
    shutil.copytree(prepared.pictures, tmp_path / "pictures")
    save_pictures(tmp_path / "pictures", [(96, 64)], seed=9)
    monkeypatch.setattr(training, "load_training", lambda *_: pytest.fail("the transformer was loaded"))
    flags = [*prepared.flags, "--instance_data_dir", tmp_path / "pictures", "--output_dir", tmp_path / "out"]
    changed = script(TRAINING_SCRIPT, *flags)
    assert changed.code == 2
    assert "00.png" in changed.err
    assert "python precompute_latents.py" in changed.err


def test_08_one_row_of_float16_for_each_prompt(prepared: Prepared) -> None:
    """One copy for each picture, as lists of doubles."""
    file = pq.ParquetFile(prepared.embeddings)
    prompts = file.read(columns=["prompt"]).column("prompt").to_pylist()
    assert sorted(prompts) == ["", "a photo of a robot", PROMPT]  # five pictures share one
    kind = file.schema_arrow.field("prompt_embeds").type
    assert (kind.list_size, str(kind.value_type)) == ((77 + 20) * 48, "halffloat")


def test_09_crops_are_drawn_anew_and_the_vae_is_not_loaded(script, prepared, tmp_path, seen, monkeypatch) -> None:
    """The VAE encodes the same pixels at every step; crop and flip are drawn once."""
    from diffusers import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the VAE was loaded"))
    flags = [*prepared.flags, "--output_dir", tmp_path, "--train_batch_size", 5, "--max_train_steps", 25]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    crops: dict[str, set[float]] = {}
    for call in seen:
        batch = call["batch"]
        for image_id, mean in zip(batch.image_ids, batch.latent_mean, strict=True):
            crops.setdefault(image_id, set()).add(mean.sum().item())
    # Four of the five pictures are not square and have three crops each.
    assert sorted(map(len, crops.values())) == [1, 3, 3, 3, 3]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_10_the_lora_is_float32_whatever_accelerate_says(
    script, prepared: Prepared, tmp_path: Path, seen, monkeypatch, precision
) -> None:
    """Precision set by accelerate launch leaves the LoRA in half: in bf16 81 % of lora_A never changes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    flags = [*prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1]
    assert script(TRAINING_SCRIPT, *flags, "--learning_rate", 1e-3).code == 0
    parameters = dict(seen[0]["model"].named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {parameters[name].dtype for name in trained} == {torch.float32}
    base = {parameter.dtype for name, parameter in parameters.items() if name not in trained}
    assert base == {torch.bfloat16 if precision == "bf16" else torch.float32}  # fp16 on a CPU runs in fp32
    before, after = (load_file(tmp_path / f"checkpoint-{step}" / LORA) for step in (1, 2))
    # Step 1 moved lora_B alone (lora_A has no gradient while lora_B is zero). The last block's text output is unused.
    for name in after:
        if ".lora_A." in name and "blocks.1.attn.add_q" not in name:
            assert (before[name] != after[name]).float().mean() > 0.99, name


def test_11_nothing_is_cast_to_float32_and_no_pipeline_is_loaded(script, prepared, tmp_path, seen, monkeypatch) -> None:
    """The transformer is cast to fp32 to save the LoRA, and the full pipeline, T5 included, is loaded at the end."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a pipeline was loaded"))
    flags = [*prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 2, "--mixed_precision", "bf16"]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    frozen = [parameter for parameter in seen[0]["model"].parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_12_seed_0_is_a_seed(script, prepared: Prepared, tmp_path: Path) -> None:
    """Seed 0 is treated as no seed."""
    runs = []
    for index in range(2):
        torch.manual_seed(index)  # what a run without a seed would start from
        out = tmp_path / str(index)
        assert script(TRAINING_SCRIPT, *prepared.flags, "--output_dir", out, "--max_train_steps", 2).code == 0
        runs.append(load_file(out / LORA))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


def test_13_every_update_sees_a_full_window(script, prepared: Prepared, tmp_path: Path, seen) -> None:
    """With 5 pictures and accumulation 4, half of the updates see one picture at a quarter of the gradient."""
    flags = [*prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 5, "--gradient_accumulation_steps", 2]
    assert script(TRAINING_SCRIPT, *flags, "--train_batch_size", 2).code == 0
    ids = [image_id for call in seen for image_id in call["batch"].image_ids]
    assert len(ids) == 20
    assert all(len(set(ids[start : start + 5])) == 5 for start in range(0, 20, 5))  # each once in every pass


def test_14_steps_are_not_overshot_and_a_finished_run_is_a_no_op(script, prepared: Prepared, tmp_path: Path) -> None:
    """max_train_steps is overshot on resume; resuming a finished run crashes; an outside path is not found."""
    flags = [*prepared.flags, "--output_dir", tmp_path / "a", "--max_train_steps", 3, "--checkpointing_steps", 2]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    finished = load_file(tmp_path / "a" / LORA)
    again = script(TRAINING_SCRIPT, *flags, "--resume_from_checkpoint", "latest")
    assert again.code == 0
    assert "nothing to do" in again.out
    outside = [*flags, "--output_dir", tmp_path / "b", "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-2"]
    assert script(TRAINING_SCRIPT, *outside).code == 0
    resumed = load_file(tmp_path / "b" / LORA)
    assert all(torch.equal(resumed[name], finished[name]) for name in finished)
    assert len(losses(tmp_path / "a")) == 3


def test_15_a_nan_embedding_stops_the_run(script, prepared: Prepared, tmp_path: Path) -> None:
    """It trains to the end, saves NaN weights and exits 0."""
    with EmbeddingStore(prepared.embeddings) as store:
        rows = list(store.read_all())
        rows[0].prompt_embeds[3, 3] = float("nan")
        write_embeddings(tmp_path / "e.parquet", store.provenance, rows)
    flags = [*prepared.flags, "--data_df_path", tmp_path / "e.parquet", "--output_dir", tmp_path / "out"]
    stopped = script(TRAINING_SCRIPT, *flags, "--max_train_steps", 3)
    assert stopped.code == 2
    assert "holds a NaN or infinity" in stopped.err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_16_validation_leaves_no_hook_on_the_live_transformer(
    script, training, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation leaves offload hooks on it: every later step moves it to the CPU and back."""
    hooks: list[tuple[int, ...]] = []
    original = training.look

    def look(state, *words) -> float:
        seconds = original(state, *words)
        modules = list(state.transformer.modules())
        hooks.append(tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) + hasattr(m, "_hf_hook") for m in modules))
        return seconds

    monkeypatch.setattr(training, "look", look)
    words = ["--validation_prompt", PROMPT, "--validation_num_steps", 1, "--device", "cpu", "--max_train_steps", 2]
    assert script(TRAINING_SCRIPT, *prepared.flags, *words, "--output_dir", tmp_path).code == 0
    assert len(hooks) == 3
    assert not any(map(any, hooks))


def test_17_sigma_sqrt_is_finite_at_every_timestep() -> None:
    """It is inf in fp16 at one timestep in 1,000."""
    table = load_noise_table({"shift": 3.0}, None)
    sigmas = table.sigmas.view(-1, 1, 1, 1)
    zeros, ones = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    config = FlowConfig(weighting_scheme="sigma_sqrt")
    for index in range(1000):
        row = slice(index, index + 1)
        weight = flow_matching_loss(zeros[row].half(), zeros[row], ones[row], sigmas[row], torch.ones(1), config)
        assert weight.item() == pytest.approx(table.sigmas[index].item() ** -2, rel=1e-5)


def test_18_an_unknown_optimizer_is_refused(script, prepared: Prepared) -> None:
    """It silently becomes AdamW."""
    unknown = script(TRAINING_SCRIPT, *prepared.flags, "--optimizer", "adamm")
    assert unknown.code == 2
    assert "--optimizer adamm is unknown: type one of AdamW, adamw_8bit" in unknown.err


def test_19_each_picture_keeps_its_own_caption(script, tiny_sd3: Path, tmp_path: Path, seen) -> None:
    """--cache_latents pairs latents with other pictures' captions (5 of 6 wrong), and with bf16 it crashes."""
    folder = tmp_path / "pictures"
    paths = save_pictures(folder, [(64, 64)] * 6)
    for path in paths:
        path.with_suffix(".txt").write_text(f"caption {path.stem}")
    model = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", folder]
    assert script("compute_embeddings", *model, "--output_path", tmp_path / "e.parquet").code == 0
    assert script("precompute_latents", *model, "--output_path", tmp_path / "latents").code == 0
    flags = [*model, "--data_df_path", tmp_path / "e.parquet", "--latents_path", tmp_path / "latents", "--seed", 0]
    flags += ["--train_batch_size", 2, "--max_train_steps", 3, "--mixed_precision", "bf16", "--report_to", "none"]
    assert script(TRAINING_SCRIPT, *flags, "--output_dir", tmp_path / "out").code == 0

    import hashlib

    with EmbeddingStore(tmp_path / "e.parquet") as store:
        right = {hashlib.sha256(p.read_bytes()).hexdigest(): store.read(f"caption {p.stem}") for p in paths}
    pairs = 0
    for call in seen:
        batch = call["batch"]
        for image_id, embeds, mean in zip(batch.image_ids, batch.prompt_embeds, batch.latent_mean, strict=True):
            assert torch.equal(embeds, right[image_id].prompt_embeds)
            assert torch.equal(mean, load_file(tmp_path / "latents" / f"{image_id}.safetensors")["64x64+0+0.mean"])
            pairs += 1
    assert pairs == 6


def test_19_t5_in_fp16_keeps_wo_in_float32(prepared: Prepared) -> None:
    """T5 is cast to fp16 throughout; its `wo` overflows."""
    plan = TextEncoderPlan("fp16", False, 20, torch.device("cpu"))
    block = load_t5(ModelFiles(ModelConfig(str(prepared.model))), plan).encoder.block[0]
    assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block.layer[1].DenseReluDense.wi_0.weight.dtype == torch.float16


def test_20_the_licence_on_the_card_is_the_base_models(script, prepared: Prepared, tmp_path: Path) -> None:
    """It says openrail++."""
    card = licence_of("stabilityai/stable-diffusion-3.5-medium")
    assert card["license_name"] == "stabilityai-ai-community"
    assert script(TRAINING_SCRIPT, *prepared.flags, "--output_dir", tmp_path, "--max_train_steps", 1).code == 0
    text = (tmp_path / "README.md").read_text()
    assert PROMPT in text
    assert "license:" not in text  # a folder of unknown origin


def test_21_a_t4_is_not_believed_to_have_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_bf16_supported() says True on it, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    chosen = choose_training_dtype("bf16", torch.device("cuda"))
    assert (chosen.dtype, chosen.reason) == (torch.float16, "fp16: Tesla T4 has no bf16")


def test_22_nothing_asks_for_torchvision() -> None:
    """A torchvision built for another torch breaks the import of the text encoders."""
    files = [*PROJECT.glob("*.py"), *PROJECT.glob("sd3_lora/**/*.py"), *PROJECT.glob("requirements*.txt")]
    assert len(files) > 20
    assert [path.name for path in files if "torchvision" in path.read_text(encoding="utf-8")] == ["__init__.py"]
