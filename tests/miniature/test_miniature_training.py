"""How the miniature is trained: its optimizer, the model as a whole, and going on from a piece."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "miniature"))

from architecture import NETWORKS, make_models
from pool import SHORT_CLIP_TOKENS, SHORT_T5_TOKENS, tokenize
from pool import main as write_pool
from render import Renderer
from train_text import ENCODERS, accuracy, encoder_ids, make_pupils
from train_text import train as train_text
from train_transformer import (
    LONG,
    SHORT,
    Data,
    Muon,
    State,
    TextToVelocity,
    batch_loss,
    draw,
    export,
    make_optimizers,
    start_gently,
)
from train_transformer import main as train_transformer
from train_vae import main as train_vae_main
from train_vae import train as train_vae
from world import MINIATURE, captions, load_objects, sample_scenes

CPU = torch.device("cpu")
TEXTS = ("a photo of a small robot on the left on a striped blue background", "a large fish")


def test_muon_is_torch_s_own_for_many_matrices_at_once():
    torch.manual_seed(0)
    shapes = ((16, 16), (16, 16), (64, 16), (16, 64), (64, 16))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = Muon(ours, 1e-2, weight_decay=0.01)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    before = [parameter.detach().clone() for parameter in ours]
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other, old in zip(ours, theirs, before, strict=True):
        moved = (mine - old).norm()
        assert (mine - other).norm() < 0.04 * moved  # bfloat16, in another order


@pytest.fixture(scope="module")
def data() -> Data:
    """Random latents with two captions and the empty one."""
    clip_ids, t5_ids = tokenize([*TEXTS, ""], MINIATURE)
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    pads = NETWORKS["text_encoder"].from_pretrained(MINIATURE / "text_encoder").config.pad_token_id
    return Data(latents.bfloat16(), clip_ids, t5_ids, (pads, 0, 0))


def test_the_model_as_a_whole_is_the_pipeline_s(data):
    pipeline = StableDiffusion3Pipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    model = TextToVelocity({name: getattr(pipeline, name) for name in NETWORKS if name != "vae"}).eval()
    noisy = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            list(TEXTS), None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
        expected = pipeline.transformer(
            noisy, prompt_embeds, pooled, timestep=1000 * sigmas, return_dict=False
        )[0]  # fmt: skip
        velocity = model(noisy, sigmas, *data.text(torch.tensor([0, 1]), LONG))
        short = model(noisy, sigmas, *data.text(torch.tensor([0, 1]), SHORT))
    assert torch.allclose(velocity, expected, atol=1e-5)
    assert (short - expected).abs().max() > 1e-4  # fewer padding tokens are another prompt
    assert SHORT == (SHORT_CLIP_TOKENS, SHORT_T5_TOKENS)


def new_state() -> State:
    """A small transformer's worth of layers of the real recipe, from seed 0."""
    models = make_models(MINIATURE, tuple(name for name in NETWORKS if name != "vae"), seed=0)
    start_gently(models["transformer"])
    model = TextToVelocity(models).eval()
    return State(model, make_optimizers(model, 1e-3))


def take_step(state: State, data: Data, seed: int) -> float:
    """One step on both samples; returns the loss before it."""
    draws = draw(2, torch.Generator().manual_seed(seed), CPU)
    loss = batch_loss(state.model, data, torch.tensor([0, 1]), draws, SHORT)
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    state.update_ema()
    return loss.item()


def test_it_starts_by_predicting_nothing_goes_on_from_a_file_and_exports_its_running_mean(
    data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Orthogonalizing in bfloat16 takes a CPU seconds.
    monkeypatch.setattr("train_transformer.orthogonalize", lambda matrices: 1e-2 * matrices.sign())
    state = new_state()
    noise, _, uniforms = draw(2, torch.Generator().manual_seed(0), CPU)
    assert uniforms.min() > 0.1  # neither caption is left empty
    first = take_step(state, data, 0)
    assert first == pytest.approx((noise - data.latents.float()).square().mean().item(), rel=1e-6)
    state.save(tmp_path / "state.safetensors")

    again = new_state()
    again.load(tmp_path / "state.safetensors")
    assert (again.step, len(again.optimizers)) == (1, 2)
    assert take_step(again, data, 1) == take_step(state, data, 1)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name]), name
        assert torch.equal(state.ema[name], again.ema[name]), name

    export(state, tmp_path)
    for name in ("transformer", "text_encoder_3"):
        written = dict(NETWORKS[name].from_pretrained(tmp_path / name).named_parameters())
        key = next(key for key in written if key.endswith("proj_out.weight") or key.endswith("wi_0.weight"))
        assert torch.equal(written[key].half(), state.ema[f"models.{name}.{key}"].half())


def test_the_transformer_is_trained_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("train_transformer.orthogonalize", lambda matrices: 1e-2 * matrices.sign())
    assert write_pool(["--scenes", "12", "--output_path", str(tmp_path / "pool.safetensors")]) == 0
    shutil.copytree(MINIATURE / "vae", tmp_path / "vae")
    shutil.copytree(MINIATURE / "text_encoder", tmp_path / "text" / "text_encoder")
    # No renders: the pictures are backgrounds. Twelve ticks of the clock are all the training, six the first piece.
    words = ["--renders", str(tmp_path), "--work", str(tmp_path), "--minutes", "0.0125"]
    words += ["--scenes", "8", "--batch_size", "4", "--learning_rate", "1e-4"]

    def run(*more: str) -> str:
        clock = SimpleNamespace(perf_counter=partial(next, count(0, 0.0625)))
        monkeypatch.setattr("train_transformer.time", clock)
        assert train_transformer([*words, *more]) == 0
        return capsys.readouterr().out

    out = run("--stop_after", "0.00625")
    assert "8 scenes drawn" in out
    assert "text_encoder as train_text.py left it" in out
    assert "text_encoder_2 as" not in out
    assert "\n6 steps, 0 s; wrote" in out
    first = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    out = run()
    assert "going on from step 6" in out
    assert "\n12 steps, 1 s; wrote" in out
    second = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_text_encoder_learns_to_name_what_captions_say(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(perf_counter=partial(next, count(0, 0.0625)))  # every look at it takes a sixteenth
    monkeypatch.setattr("train_text.time", clock)
    objects = load_objects()
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(128, range(4), generator)
    ids = tokenize(captions(scenes, objects, generator), MINIATURE)
    pupils = make_pupils(CPU)
    assert tuple(pupils) == ENCODERS
    smallest = {"text_encoder": pupils["text_encoder"]}
    before = accuracy(smallest, scenes, ids)["text_encoder"]
    assert train_text(smallest, scenes, ids, minutes=0.0625, batch_size=32) == 59
    assert before < 0.1  # of 884 objects
    assert accuracy(smallest, scenes, ids)["text_encoder"] > 0.2  # of the 4 that there are


def test_the_vae_s_training_draws_its_channels_means_to_zero(monkeypatch: pytest.MonkeyPatch):
    objects = load_objects()
    held_out = [index for index, thing in enumerate(objects) if thing.held_out]
    renderer = Renderer(objects, None, "cpu")
    vae = NETWORKS["vae"].from_pretrained(MINIATURE / "vae", torch_dtype=torch.float32)
    pictures = renderer(sample_scenes(4, held_out, torch.Generator().manual_seed(0)))

    @torch.no_grad()
    def channel_means() -> float:
        return vae.encode(pictures).latent_dist.mode().mean((0, 2, 3)).square().mean().item()

    before = channel_means()
    clock = SimpleNamespace(perf_counter=partial(next, count(0, 0.0625)))
    monkeypatch.setattr("train_vae.time", clock)
    monkeypatch.setattr("train_vae.BATCH_SIZE", 2)
    monkeypatch.setattr("train_vae.RENDERED_AT_ONCE", 3)
    monkeypatch.setattr("train_vae.MEAN_WEIGHT", 100.0)
    steps = train_vae(vae, renderer, held_out, minutes=0.00625, learning_rate=0.1, seed=0)
    assert steps == 6  # a clock that starts again after the first
    assert channel_means() < 0.7 * before


def test_the_decoder_alone_is_trained_and_the_latents_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(perf_counter=partial(next, count(0, 0.0625)))
    monkeypatch.setattr("train_vae.time", clock)
    monkeypatch.setattr("train_vae.BATCH_SIZE", 2)
    monkeypatch.setattr("train_vae.RENDERED_AT_ONCE", 1)
    monkeypatch.setattr("train_vae.measure_psnr", lambda *_, **__: 0.0)
    words = ["--renders", str(tmp_path), "--output_dir", str(tmp_path), "--minutes", "0.00625"]
    assert train_vae_main([*words, "--start_from", str(MINIATURE / "vae"), "--decoder_only"]) == 0
    before, after = (load_file(p / "vae" / "diffusion_pytorch_model.safetensors") for p in (MINIATURE, tmp_path))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_each_text_encoder_gets_its_own_padding():
    clip_ids, t5_ids = tokenize(["a fish"], MINIATURE)
    pupils = make_pupils(CPU)
    last = {name: int(encoder_ids(name, clip_ids, t5_ids, pupil)[0, -1]) for name, pupil in pupils.items()}
    pads = {name: pupil.encoder.config.pad_token_id for name, pupil in pupils.items()}
    assert last == pads
    assert len(set(pads.values())) == 2  # CLIP-L's is its EOS
