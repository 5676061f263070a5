"""The latent cache: raw posteriors by picture and variant, and the one formula that normalizes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.records import InstanceImage, LatentPosterior, Provenance
from sd3_lora.stage_one import latent_cache
from sd3_lora.stage_one.latent_cache import (
    LatentCache,
    StaleLatents,
    denormalize_latents,
    normalize_latents,
    recorded_precision,
    sample_posterior,
)

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PROVENANCE = Provenance(1, "some/model", None, "c" * 64, "w" * 64, "fp32", 64, {"torch": "2"})
IMAGE = InstanceImage("a" * 64, Path("folder/dog.jpg"), "a photo of sks dog")
VAE_CONFIG = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
NOT_WHOLE = r"is not a whole latent file of this project \(.*\): delete it and run precompute_latents.py again"


def posterior(variant: str, image_id: str = IMAGE.image_id, dtype: torch.dtype = torch.float32) -> LatentPosterior:
    generator = torch.Generator().manual_seed(sum(f"{variant}{image_id}".encode()))
    mean, std = torch.randn(2, 16, 8, 8, generator=generator).to(dtype)
    return LatentPosterior(image_id, variant, mean, std)


def same(found: LatentPosterior, expected: LatentPosterior) -> bool:
    return (
        (found.image_id, found.variant) == (expected.image_id, expected.variant)
        and found.mean.dtype == expected.mean.dtype
        and torch.equal(found.mean, expected.mean)
        and torch.equal(found.std, expected.std)
    )


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return LatentCache(tmp_path, PROVENANCE, "white")


# The formulas


def test_normalizing_takes_the_shift_off_and_then_scales() -> None:
    raw = torch.tensor([0.0609, 1.0609, -0.9391, 0.0])
    expected = torch.tensor([0.0, 1.5305, -1.5305, -0.0609 * 1.5305])
    torch.testing.assert_close(normalize_latents(raw, VAE_CONFIG), expected)
    torch.testing.assert_close(denormalize_latents(expected, VAE_CONFIG), raw)


def test_normalizing_is_diffusers_own_formula_and_its_inverse() -> None:
    raw = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = normalize_latents(raw, VAE_CONFIG)
    # The last lines of StableDiffusion3Pipeline.__call__ before vae.decode.
    assert torch.equal(denormalize_latents(latents, VAE_CONFIG), (latents / 1.5305) + 0.0609)
    torch.testing.assert_close(denormalize_latents(latents, VAE_CONFIG), raw, rtol=1e-6, atol=1e-6)
    assert (latents - raw * 1.5305).mean().item() == pytest.approx(-0.0609 * 1.5305, rel=1e-4)  # the reference's 0.093


def test_a_sample_of_the_posterior() -> None:
    mean, std, noise = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), torch.tensor([-2.0, 7.0])
    assert torch.equal(sample_posterior(mean, std, noise), torch.tensor([0.0, 2.0]))
    assert torch.equal(sample_posterior(mean, std, torch.zeros(2)), mean)


# Round trip


def test_whoever_may_read_the_folder_reads_the_files(cache: LatentCache) -> None:
    """As the umask has it; safetensors by itself lets only the owner read."""
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    (cache.folder / "plain").touch()
    assert cache.path(IMAGE.image_id).stat().st_mode == (cache.folder / "plain").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_posteriors_round_trip(cache: LatentCache, dtype: torch.dtype) -> None:
    first, second = posterior("64x64+0+0", dtype=dtype), posterior("64x64+0+0-flip", dtype=dtype)
    cache.add(IMAGE, (96, 64), [second, first])
    assert cache.variants(IMAGE.image_id) == ("64x64+0+0", "64x64+0+0-flip")
    assert cache.look(IMAGE.image_id).size == (96, 64)  # type: ignore[union-attr]
    assert same(cache.read(IMAGE.image_id, "64x64+0+0"), first)
    assert same(cache.read(IMAGE.image_id, "64x64+0+0-flip"), second)
    assert [path.name for path in cache.folder.iterdir()] == [f"{IMAGE.image_id}.safetensors"]


def test_the_layout_of_a_file(cache: LatentCache) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    tensors = load_file(cache.path(IMAGE.image_id))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "64x64+0+0.mean": (16, 8, 8),
        "64x64+0+0.std": (16, 8, 8),
    }
    with safe_open(cache.path(IMAGE.image_id), "pt") as handle:
        metadata = handle.metadata()["sd3_lora"]
    assert '"source": "dog.jpg"' in metadata
    assert '"alpha_background": "white"' in metadata


def test_adding_keeps_what_is_there_bit_for_bit(cache: LatentCache) -> None:
    first, second = posterior("64x64+0+0"), posterior("64x64+16+0")
    cache.add(IMAGE, (96, 64), [first])
    cache.add(IMAGE, (96, 64), [second])
    assert cache.variants(IMAGE.image_id) == ("64x64+0+0", "64x64+16+0")
    assert same(cache.read(IMAGE.image_id, first.variant), first)
    assert same(cache.read(IMAGE.image_id, second.variant), second)


def test_a_file_is_looked_at_once(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    opened: list[Path] = []
    monkeypatch.setattr(latent_cache, "safe_open", lambda path, kind: opened.append(path) or safe_open(path, kind))
    for _ in range(2):
        assert cache.variants(IMAGE.image_id) == ("64x64+0+0",)
        assert cache.tiles(IMAGE.image_id) == {}
    assert opened == [cache.path(IMAGE.image_id)]
    cache.add(IMAGE, (96, 64), [posterior("64x64+16+0")], tile_px=32)
    assert cache.tiles(IMAGE.image_id) == {"64x64+16+0": 32}
    cache.remove(IMAGE.image_id)
    assert cache.look(IMAGE.image_id) is None


def test_what_was_read_does_not_hang_on_the_file(cache: LatentCache) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    found, path = cache.read(IMAGE.image_id, "64x64+0+0"), cache.path(IMAGE.image_id)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(found, posterior("64x64+0+0"))


def test_pictures_are_paired_by_identity(cache: LatentCache) -> None:
    images = [replace(IMAGE, image_id=letter * 64) for letter in "dbac"]
    for image in images:
        cache.add(image, (64, 64), [posterior("64x64+0+0", image.image_id)])
    for image in reversed(images):
        assert same(cache.read(image.image_id, "64x64+0+0"), posterior("64x64+0+0", image.image_id))


def test_a_picture_without_a_file(tmp_path: Path) -> None:
    assert LatentCache(tmp_path, PROVENANCE).variants("b" * 64) == ()
    assert LatentCache(tmp_path / "none", PROVENANCE).variants("b" * 64) == ()
    assert recorded_precision(tmp_path / "none") is None


def test_an_interrupted_write_leaves_no_file_under_the_final_name(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = posterior("64x64+0+0")
    cache.add(IMAGE, (96, 64), [first])

    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_cache, "write_tensors", half)
    with pytest.raises(KeyboardInterrupt):
        cache.add(IMAGE, (96, 64), [posterior("64x64+16+0")])
    assert cache.variants(IMAGE.image_id) == (first.variant,)
    assert same(cache.read(IMAGE.image_id, first.variant), first)
    assert list(cache.folder.iterdir()) == [cache.path(IMAGE.image_id)]


# What is not ours, not whole, or made otherwise


@pytest.mark.parametrize("length", [0, 4, 100, -1, -1000])
def test_a_truncated_file(cache: LatentCache, length: int) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    path = cache.path(IMAGE.image_id)
    path.write_bytes(path.read_bytes()[:length])
    for use in (cache.variants, cache.look, lambda image_id: cache.read(image_id, "64x64+0+0")):
        with pytest.raises(UserError, match=NOT_WHOLE):
            use(IMAGE.image_id)
    assert recorded_precision(cache.folder) is None


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sd3_lora": "{"}, {"sd3_lora": '{"provenance": {}}'}])
def test_a_foreign_file(cache: LatentCache, metadata: dict[str, str] | None) -> None:
    save_file({"latents": torch.zeros(16, 8, 8)}, cache.path(IMAGE.image_id), metadata)
    with pytest.raises(UserError, match=NOT_WHOLE) as caught:
        cache.variants(IMAGE.image_id)
    assert not isinstance(caught.value, StaleLatents)
    assert recorded_precision(cache.folder) is None


@pytest.mark.parametrize("part", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_names_the_file(cache: LatentCache, part: str, value: float) -> None:
    bad = posterior("64x64+0+0")
    getattr(bad, part)[3, 2, 1] = value
    cache.add(IMAGE, (96, 64), [bad])
    remedy = "holds a NaN or infinity: delete it and run precompute_latents.py --vae_precision fp32 --overwrite"
    with pytest.raises(UserError, match=re.escape(f"{IMAGE.image_id}.safetensors {remedy}")):
        cache.read(IMAGE.image_id, "64x64+0+0")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"size": 128}, "resolution 64, not 128"),
        ({"precision": "fp16"}, "precision fp32, not fp16"),
        ({"model": "other/model", "weights_hash": "x" * 64}, "model some/model, not other/model"),
        ({"weights_hash": "x" * 64}, "other weights than some/model has now"),
        ({"config_hash": "d" * 64}, "other weights than some/model has now"),
        ({"format_version": 2}, "file format 1, not 2"),
    ],
)
def test_a_file_made_otherwise(cache: LatentCache, change: dict[str, object], difference: str) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    other = LatentCache(cache.folder, replace(PROVENANCE, **change))  # type: ignore[arg-type]
    for use in (other.variants, other.look, lambda image_id: other.read(image_id, "64x64+0+0")):
        with pytest.raises(StaleLatents, match="was made with " + re.escape(difference)) as caught:
            use(IMAGE.image_id)
        assert "add --overwrite to precompute_latents.py to replace it" in str(caught.value)
        assert (caught.value.path, caught.value.difference) == (cache.path(IMAGE.image_id), difference)


def test_other_library_versions_and_names_of_the_model_are_no_difference(cache: LatentCache) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    other = LatentCache(cache.folder, replace(PROVENANCE, versions={}, model="elsewhere"))
    assert same(other.read(IMAGE.image_id, "64x64+0+0"), posterior("64x64+0+0"))


def test_what_shows_through_transparent_pixels_is_part_of_a_file(cache: LatentCache) -> None:
    cache.add(IMAGE, (96, 64), [posterior("64x64+0+0")])
    assert LatentCache(cache.folder, PROVENANCE).variants(IMAGE.image_id)  # training reads either
    with pytest.raises(StaleLatents, match="alpha_background white, not mean"):
        LatentCache(cache.folder, PROVENANCE, "mean").variants(IMAGE.image_id)


def test_the_precision_of_a_cache_is_that_of_its_first_readable_file(cache: LatentCache) -> None:
    (cache.folder / "0.safetensors").write_bytes(b"")
    half = LatentCache(cache.folder, replace(PROVENANCE, precision="fp16"), "white")
    half.add(IMAGE, (96, 64), [posterior("64x64+0+0", dtype=torch.float16)])
    assert recorded_precision(cache.folder) == "fp16"
