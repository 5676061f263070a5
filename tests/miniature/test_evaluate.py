"""What scores the miniature: the shipped judge and VAE on rendered scenes, the prompts, and what is drawn of them.

Scenes are rendered by the miniature's own renderer; what is drawn is drawn by the tests' tiny model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

sys.path.insert(0, str(PROJECT / "miniature"))

import evaluate
from judge import HEADS, Verdict, load_judge
from render import Renderer
from train_vae import fold_latent_spread, measure_psnr
from world import COLOURS, MINIATURE, PATTERNS, POSITIONS, SIZES, Scenes, load_objects, sample_scenes

OBJECTS = load_objects()
HELD_OUT = [index for index, thing in enumerate(OBJECTS) if thing.held_out]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """Draws scenes of held-out objects, whose renders are bundled."""
    return Renderer(OBJECTS, None, "cpu")


@pytest.fixture
def vae() -> AutoencoderKL:
    """The shipped VAE."""
    return AutoencoderKL.from_pretrained(MINIATURE / "vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(tiny_sd3: Path) -> StableDiffusion3Pipeline:
    """The tests' tiny model."""
    return evaluate.load_pipeline(tiny_sd3, torch.device("cpu"))


def test_the_judge_names_rendered_scenes_rightly(renderer):
    scenes = sample_scenes(200, HELD_OUT, torch.Generator().manual_seed(12))
    assert len(set(scenes.object.tolist())) == len(HELD_OUT)
    right = load_judge().verdict(renderer(scenes)).right(scenes)
    shares = {name: right[name].float().mean().item() for name in HEADS}
    assert shares["object"] >= 0.95
    assert shares["colour"] >= 0.99
    assert shares["pattern"] >= 0.99
    assert shares["size"] >= 0.97
    assert shares["position"] >= 0.97


def test_a_verdict_is_compared_with_the_scenes_property_by_property():
    asked = {
        "object": torch.tensor([5, 6, 7]),
        "colour": torch.tensor([0, 1, 2]),
        "pattern": torch.tensor([3, 2, 1]),
        "size": torch.tensor([0, 1, 2]),
        "position": torch.tensor([4, 0, 1]),
    }
    scenes = Scenes(**asked, second=torch.full((3,), -1), geometry=torch.zeros(3, 12))
    seen = {name: values.clone() for name, values in asked.items()}
    for place, name in enumerate(("object", "colour", "pattern")):
        seen[name][place] += 1
    seen["size"] = torch.tensor([1, 1, 1])
    seen["position"] = asked["object"]
    right = {name: values.tolist() for name, values in Verdict(**seen).right(scenes).items()}
    assert right == {
        "object": [False, True, True],
        "colour": [True, False, True],
        "pattern": [True, True, False],
        "size": [False, True, False],
        "position": [False, False, False],
    }


def test_the_prompts_name_what_the_scenes_hold_and_no_held_out_object():
    seen = len(OBJECTS) - len(HELD_OUT)
    scenes, prompts = evaluate.sample_prompts(2 * seen + 3, seed=4)
    for index, prompt in enumerate(prompts):
        size, position = list(SIZES)[scenes.size[index]], list(POSITIONS)[scenes.position[index]]
        background = f"{PATTERNS[scenes.pattern[index]]} {list(COLOURS)[scenes.colour[index]]}"
        name = OBJECTS[scenes.object[index]].name
        assert prompt == f"a photo of a {size} {name} {position} on a {background} background"
    assert not set(scenes.object.tolist()) & set(HELD_OUT)
    assert scenes.second.unique().tolist() == [-1]
    # Each in turn, so that no object weighs more than another.
    assert torch.equal(scenes.object[:seen].sort().values, scenes.object[seen : 2 * seen].sort().values)
    assert len(set(scenes.object[:seen].tolist())) == seen
    assert prompts == evaluate.sample_prompts(2 * seen + 3, seed=4)[1]
    assert prompts != evaluate.sample_prompts(2 * seen + 3, seed=5)[1]


def test_a_picture_depends_on_its_prompt_and_place_and_not_on_the_batch_size(pipeline):
    def draw(prompts: list[str], seed: int = 7, batch_size: int = 32) -> torch.Tensor:
        return evaluate.draw(pipeline, prompts, seed, num_steps=2, batch_size=batch_size)

    prompts = ["a photo of a small fish", "a photo of a large dog", "a photo of a large dog"]
    together = draw(prompts)
    assert together.shape == (3, 3, 128, 128)
    assert together.dtype == torch.float32
    assert -1 <= together.amin() < -0.1 < 0.1 < together.amax() <= 1
    for batch_size in (1, 2):
        torch.testing.assert_close(draw(prompts, batch_size=batch_size), together, atol=1e-3, rtol=0)
    torch.testing.assert_close(draw(prompts[:1]), together[:1], atol=1e-3, rtol=0)
    torch.testing.assert_close(draw(prompts[1:], seed=8), together[1:], atol=1e-3, rtol=0)
    differences = {
        "place": together[1] - together[2],
        "prompt": draw([prompts[1]])[0] - together[0],
        "seed": draw(prompts, seed=9)[0] - together[0],
    }
    assert {name: bool(value.abs().amax() > 1e-2) for name, value in differences.items()} == dict.fromkeys(
        differences, True
    )


def first_of(renderer: Renderer, count: int) -> Callable[[Scenes], torch.Tensor]:
    """A renderer that draws the first scenes only of those it is asked for: time is short."""
    return lambda scenes: renderer(scenes[:count])


def test_the_shipped_vae_keeps_scenes_of_objects_that_it_never_saw(renderer, vae):
    assert measure_psnr(vae, first_of(renderer, 32), HELD_OUT, 64, seed=2) >= 32


def test_the_shipped_miniature_draws_what_is_asked_for():
    scenes, prompts = evaluate.sample_prompts(32, seed=3)
    pictures = evaluate.draw(evaluate.load_pipeline(MINIATURE, torch.device("cpu")), prompts, seed=3, num_steps=10)
    scores = evaluate.score(pictures, scenes, torch.device("cpu"))
    assert scores["object"] >= 0.85
    assert scores["colour"] >= 0.98
    assert scores["pattern"] >= 0.95
    assert scores["position"] >= 0.95


@torch.no_grad()
def test_folding_the_spread_makes_it_one_and_leaves_what_is_decoded(renderer, vae):
    # The shipped VAE is folded already: it is stretched, each channel differently, to have something to fold.
    channels = vae.config.latent_channels
    stretch = torch.linspace(0.4, 2.5, channels)
    vae.encoder.conv_out.weight[:channels] *= stretch[:, None, None, None]
    vae.encoder.conv_out.bias[:channels] *= stretch
    pictures = renderer(sample_scenes(4, HELD_OUT, torch.Generator().manual_seed(8)))
    before = vae.encode(pictures).latent_dist
    decoded = vae.decode(before.mode()).sample
    torch.manual_seed(0)
    fold_latent_spread(vae, first_of(renderer, 4), HELD_OUT, seed=3)

    after = vae.encode(pictures).latent_dist
    torch.testing.assert_close(vae.decode(after.mode()).sample, decoded, atol=1e-3, rtol=0)
    gain = (after.mode().std((0, 2, 3)) / before.mode().std((0, 2, 3)))[None, :, None, None]
    torch.testing.assert_close(after.std, before.std * gain, atol=0, rtol=1e-3)
    generator = torch.Generator().manual_seed(3)  # of the scenes that were folded
    drawn = [first_of(renderer, 4)(sample_scenes(64, HELD_OUT, generator, pairs=0.2)) for _ in range(16)]
    latents = torch.cat([vae.encode(batch).latent_dist.sample() for batch in drawn]) * vae.config.scaling_factor
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(channels), atol=0.03, rtol=0)


def test_the_script_writes_its_scores_and_what_they_are_to_be_read_with(tiny_sd3, tmp_path, capsys):
    words = ["--model", tiny_sd3, "--count", 3, "--num_steps", 1, "--guidance", 1, 4]
    files = ["--result", tmp_path / "scores.json", "--sheet", tmp_path / "sheet.png"]
    assert evaluate.main([str(word) for word in [*words, *files]]) == 0
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert list(result["guidance"]) == ["1.0", "4.0"]
    for scores in result["guidance"].values():
        assert scores.keys() == set(HEADS)
        assert {round(3 * share, 2) % 1 for share in scores.values()} == {0}
    assert (result["prompts"], result["num_steps"]) == (3, 1)
    assert result["judge"]["object"] >= 0.99
    assert result["vae_psnr_db"] < 20  # a random one
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]
    assert len(result["date"]) == len("2025-01-31")
    assert capsys.readouterr().out.startswith("guidance 1: {'object': ")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 128, 128)


def test_a_sheet_has_each_picture_in_its_place(tmp_path):
    shades = torch.linspace(-1, 1, 10)
    pictures = shades[:, None, None, None].expand(-1, 3, 2, 2).clone()
    evaluate.save_grid(pictures, tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8, 6)
        levels = [sheet.getpixel((2 * column, 2 * row))[0] for row in range(3) for column in range(4)]
    assert levels == [*[round(255 * place / 9) for place in range(10)], 0, 0]
