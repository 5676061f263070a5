"""The miniature's small world: scenes, captions, renders, and the token ids of the pool."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "miniature"))

from pool import SHORT_CLIP_TOKENS, SHORT_T5_TOKENS, load_pool, padded, tokenize
from pool import main as write_pool
from render import Renderer
from transformers import CLIPTokenizer, T5TokenizerFast
from world import COLOURS, MINIATURE, PATTERNS, POSITIONS, SIZES, Scenes, captions, load_objects, sample_scenes

OBJECTS = load_objects()
HELD_OUT = [index for index, thing in enumerate(OBJECTS) if thing.held_out]


def scene(**changes: int) -> Scenes:
    """One scene: a medium robot in the middle of a plain red background, everything without jitter."""
    values = {"object": HELD_OUT[0], "second": -1, "colour": 0, "pattern": 0, "size": 1, "position": 4, **changes}
    columns = {name: torch.tensor([value]) for name, value in values.items()}
    return Scenes(**columns, geometry=torch.full((1, 12), 0.5))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(OBJECTS, None, "cpu")


def extent(picture: torch.Tensor, background: torch.Tensor) -> tuple[float, float, float]:
    """The middle (x, y) and the height of what is not background, in pixels."""
    other = ((picture - background).abs().amax(0) > 0.1).nonzero().float()  # (n, 2): y, x
    low, high = other.amin(0), other.amax(0) + 1
    middle = (low + high) / 2
    return middle[1].item(), middle[0].item(), (high - low).amax().item()


def test_at_least_24_objects_are_held_out_and_bundled():
    assert len(OBJECTS) == len({thing.name for thing in OBJECTS}) > 850
    assert len(HELD_OUT) >= 24
    assert all(OBJECTS[index].subject_path.is_file() for index in HELD_OUT)


def test_scenes_follow_from_the_generator_and_are_even():
    first, again = (sample_scenes(6000, HELD_OUT, torch.Generator().manual_seed(3), pairs=0.25) for _ in range(2))
    assert torch.equal(first.geometry, again.geometry)
    assert torch.equal(first.object, again.object)
    assert set(first.object.tolist()) == set(HELD_OUT)
    single = first[first.second < 0]
    for values, options in ((single.colour, 12), (single.pattern, 4), (single.size, 3), (single.position, 5)):
        share = torch.bincount(values, minlength=options) / len(single)
        assert (share - 1 / options).abs().max() < 0.025
    assert 0.22 < (first.second >= 0).float().mean() < 0.28
    assert first.size[first.second >= 0].max() == 1  # two large ones would overlap


def test_a_caption_says_what_the_scene_holds():
    scenes = sample_scenes(500, range(len(OBJECTS)), torch.Generator().manual_seed(0), pairs=0.3)
    texts = captions(scenes, OBJECTS, torch.Generator().manual_seed(1))
    full = 0
    for index, text in enumerate(texts):
        assert OBJECTS[scenes.object[index]].name in text
        second = int(scenes.second[index])
        assert second < 0 or OBJECTS[second].name in text
        colour, pattern = list(COLOURS)[scenes.colour[index]], PATTERNS[scenes.pattern[index]]
        if "background" in text:
            assert f"{colour} background" in text
            # Without a word for it a background is plain.
            assert f"{pattern} {colour} background" in text or pattern == "plain"
        size, position = list(SIZES)[scenes.size[index]], list(POSITIONS)[scenes.position[index]]
        full += second < 0 and f" {size} " in text and position in text
        assert "  " not in text
    assert 100 < full < 250  # some captions name everything, many do not


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_a_plain_background_is_the_colour_that_it_is_named_for(renderer, colour):
    corner = renderer(scene(colour=colour))[0, :, 0, 0]
    assert (corner + 1) * 127.5 == pytest.approx(list(COLOURS.values())[colour], abs=0.6)


@pytest.mark.parametrize("pattern", range(len(PATTERNS)))
def test_a_pattern_is_two_shades_in_its_own_shares(renderer, pattern):
    edge = renderer(scene(pattern=pattern, size=0))[0][:, :24].flatten(1)  # above the object
    main = renderer(scene())[0, :, 0, 0]
    shaded = ((edge - main[:, None]).abs().amax(0) > 0.2).float().mean()
    low, high = [(0, 0), (0.4, 0.6), (0.4, 0.6), (0.1, 0.35)][pattern]
    assert low <= shaded <= high


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("position", range(len(POSITIONS)))
def test_an_object_is_as_large_and_where_it_should_be(renderer, size, position):
    picture = renderer(scene(size=size, position=position))[0]
    x, y, height = extent(picture, picture[:, :1, :1])
    side = list(SIZES.values())[size]
    assert 0.75 * side < height <= side + 2  # a render has a margin
    right, down = list(POSITIONS.values())[position]
    reach = (128 - side) / 2 - 2
    assert (x, y) == pytest.approx((64 + right * reach, 64 + down * reach), abs=4)
    assert picture.min() >= -1.05
    assert picture.max() <= 1.05


def test_of_a_pair_the_first_is_on_the_left(renderer):
    robot, fox = HELD_OUT[:2]
    pair = renderer(scene(second=fox, size=0, position=0))[0]
    alone = [renderer(scene(object=thing, size=0, position=0))[0] for thing in (robot, fox)]
    # The same render 30 pixels left of the middle, and right: a lone one stands 38 pixels left.
    assert torch.allclose(pair[:, :, 10:58], alone[0][:, :, 2:50], atol=0.02)
    assert torch.allclose(pair[:, :, 70:118], alone[1][:, :, 2:50], atol=0.02)


def test_the_pool_s_ids_padded_are_what_the_tokenizers_give(tmp_path):
    texts = ["a photo of a small fish on the left on a striped blue background", ""]
    clip_ids, t5_ids = tokenize(texts, MINIATURE)
    assert (clip_ids.shape, t5_ids.shape) == ((2, SHORT_CLIP_TOKENS), (2, SHORT_T5_TOKENS))
    for name, cls, ids in (
        ("tokenizer", CLIPTokenizer, clip_ids),
        ("tokenizer_2", CLIPTokenizer, clip_ids),
        ("tokenizer_3", T5TokenizerFast, t5_ids),
    ):
        tokenizer = cls.from_pretrained(MINIATURE / name)
        expected = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        assert torch.equal(padded(ids, 77, tokenizer.pad_token_id), expected.input_ids)


def test_a_pool_is_read_as_it_was_written_and_knows_no_subject(tmp_path):
    path = tmp_path / "pool.safetensors"
    assert write_pool(["--scenes", "300", "--seed", "5", "--output_path", str(path)]) == 0
    scenes, clip_ids, t5_ids = load_pool(path)
    assert len(scenes) == len(clip_ids) == len(t5_ids) == 300
    used = set(scenes.object.tolist()) | set(scenes.second[scenes.second >= 0].tolist())
    assert not used & set(HELD_OUT)
    seen = [index for index, thing in enumerate(OBJECTS) if not thing.held_out]
    again = sample_scenes(300, seen, torch.Generator().manual_seed(5_000_000), pairs=0.12)
    assert torch.equal(scenes.geometry, again.geometry)
