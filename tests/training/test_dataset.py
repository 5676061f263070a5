"""What training reads: posteriors and prompts joined by the pictures' identity, and the crops to draw from."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import sd3_lora.training.dataset
from sd3_lora.common.command_line import UserError
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import instance_images
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.stage_one.latent_cache import LatentCache
from sd3_lora.training.dataset import TrainingData, choose_variants, images_of_store, require_prompts
from sd3_lora.training.pool import Pool

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Prepared, save_pictures
from safetensors.torch import load_file

SIZES = [(96, 64), (64, 64), (64, 90), (70, 64)]
CAPTIONS = ["a red robot", "a blue robot", "a robot in the snow", "sks robot, sleeping"]


@pytest.fixture(scope="module")
def captioned(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Four pictures, each with its own caption; crops with their mirrored twins."""
    folder = tmp_path_factory.mktemp("captioned")
    for path, caption in zip(save_pictures(folder / "pictures", SIZES, seed=4), CAPTIONS, strict=True):
        path.with_suffix(".txt").write_text(caption)
    made = Prepared(tiny_sd3, folder / "pictures", folder / "embeddings.parquet", folder / "latents")
    shared = ["--pretrained_model_name_or_path", str(tiny_sd3), "--instance_data_dir", str(made.pictures)]
    shared += ["--device", "cpu"]
    text = ["--max_sequence_length", "9", "--output_path", str(made.embeddings)]
    assert importlib.import_module("compute_embeddings").main([*shared, *text]) == 0
    crops = ["--random_flip", "--output_path", str(made.latents)]
    assert importlib.import_module("precompute_latents").main([*shared, *crops]) == 0
    return made


@pytest.fixture
def store(captioned: Prepared) -> EmbeddingStore:
    return EmbeddingStore(captioned.embeddings)


def open_cache(folder: Path) -> LatentCache:
    """A cache that takes whatever provenance its files have."""
    import json

    from sd3_lora.common.records import Provenance

    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as handle:
        provenance = json.loads(handle.metadata()["sd3_lora"])["provenance"]
    return LatentCache(folder, Provenance.from_dict(provenance))


@pytest.fixture
def cache(captioned: Prepared) -> LatentCache:
    return open_cache(captioned.latents)


def find(folder: Path) -> tuple[InstanceImage, ...]:
    return instance_images(folder, None).images


def all_variants(images: tuple[InstanceImage, ...], cache: LatentCache) -> dict[str, tuple[str, ...]]:
    return choose_variants(images, cache, Buckets.square(cache.resolution), False, None, None, "the command")


def truth(captioned: Prepared) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """image id → caption, its embedding, the posterior mean of the first crop; from the files, without our code."""
    rows = {row["prompt"]: row["prompt_embeds"] for row in pq.read_table(captioned.embeddings).to_pylist()}
    expected = {}
    for number, caption in enumerate(CAPTIONS):
        image_id = hash_file(captioned.pictures / f"{number:02d}.png")
        tensors = load_file(captioned.latents / f"{image_id}.safetensors")
        first = min(name.removesuffix(".mean") for name in tensors if name.endswith(".mean"))
        embeds = torch.tensor([float(value) for value in rows[caption]]).half().reshape(77 + 9, 48)
        expected[image_id] = (caption, embeds, tensors[f"{first}.mean"])
    return expected


def assert_joined(data: TrainingData, captioned: Prepared) -> None:
    expected = truth(captioned)
    batch = data.batch(range(len(data)), torch.zeros(len(data)))
    assert sorted(batch.image_ids) == sorted(expected)
    captions = {image.image_id: image.prompt for image in data.images}
    for row, image_id in enumerate(batch.image_ids):
        caption, embeds, mean = expected[image_id]
        assert captions[image_id] == caption
        assert torch.equal(batch.prompt_embeds[row], embeds)
        assert torch.equal(batch.latent_mean[row], mean)
    assert len({tuple(embeds.flatten().tolist()) for embeds in batch.prompt_embeds}) == 4  # all distinct


def test_each_picture_has_its_own_caption_and_latents(
    captioned: Prepared, store: EmbeddingStore, cache: LatentCache
) -> None:
    images = find(captioned.pictures)
    assert_joined(TrainingData([Pool(images)], all_variants(images, cache), store, cache), captioned)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 2, 3, 0), (2, 0, 3, 1)])
def test_renamed_files_keep_theirs(
    captioned: Prepared, store: EmbeddingStore, cache: LatentCache, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Stage one saw the files under other names, in another order."""
    for new, old in enumerate(order):
        for suffix in (".png", ".txt"):
            shutil.copy(captioned.pictures / f"{old:02d}{suffix}", tmp_path / f"picture {new}{suffix}")
    images = find(tmp_path)
    assert [image.path.name for image in images] == [f"picture {new}.png" for new in range(4)]
    assert_joined(TrainingData([Pool(images)], all_variants(images, cache), store, cache), captioned)


def test_without_the_folder_the_file_knows_them(captioned: Prepared, store: EmbeddingStore, cache: LatentCache) -> None:
    images = images_of_store(store, cache)
    names = {hash_file(path): path.name for path in captioned.pictures.glob("*.png")}
    assert {image.image_id: image.path.name for image in images} == names
    assert_joined(TrainingData([Pool(images)], all_variants(images, cache), store, cache), captioned)


def test_the_order_of_the_list_does_not_count(captioned: Prepared, store: EmbeddingStore, cache: LatentCache) -> None:
    """Neither names nor folders change a run: the pictures stand in the order of their ids."""
    images = find(captioned.pictures)
    variants = all_variants(images, cache)
    orders = (images, images[::-1], images_of_store(store, cache))
    made = [[image.image_id for image in TrainingData([Pool(each)], variants, store, cache).images] for each in orders]
    assert made == [sorted(image.image_id for image in images)] * 3


def test_a_caption_that_moved_moves_its_embedding(
    captioned: Prepared, store: EmbeddingStore, cache: LatentCache, tmp_path: Path
) -> None:
    shutil.copytree(captioned.pictures, tmp_path, dirs_exist_ok=True)
    (tmp_path / "00.txt").write_text(CAPTIONS[1])
    (tmp_path / "01.txt").write_text(CAPTIONS[0])
    images = find(tmp_path)
    data = TrainingData([Pool(images)], all_variants(images, cache), store, cache)
    batch = data.batch(range(4), torch.zeros(4))
    first, second = (batch.image_ids.index(hash_file(tmp_path / name)) for name in ("00.png", "01.png"))
    assert torch.equal(batch.prompt_embeds[first], store.read(CAPTIONS[1]).prompt_embeds)
    assert torch.equal(batch.prompt_embeds[second], store.read(CAPTIONS[0]).prompt_embeds)


def test_shapes_come_from_the_data(captioned: Prepared, store: EmbeddingStore, cache: LatentCache) -> None:
    images = find(captioned.pictures)
    data = TrainingData([Pool(images)], all_variants(images, cache), store, cache)
    batch = data.batch([2, 0, 2], torch.tensor([0.0, 0.5, 0.99]))
    assert len(data) == 4
    assert batch.latent_mean.shape == batch.latent_std.shape == (3, 16, 8, 8)
    assert batch.prompt_embeds.shape == (3, 77 + 9, 48)
    assert batch.pooled_prompt_embeds.shape == (3, 24)
    assert batch.prompt_embeds.dtype == torch.float16
    assert batch.loss_weights.tolist() == [1, 1, 1]
    assert batch.loss_weights.dtype == torch.float32
    assert batch.image_ids == (data.images[2].image_id, data.images[0].image_id, data.images[2].image_id)


def test_pools_weigh_their_pictures(captioned: Prepared, store: EmbeddingStore, cache: LatentCache) -> None:
    """The pools' pictures stand one pool after the other; the class pictures' captions are not the subject's."""
    images = sorted(find(captioned.pictures), key=lambda image: image.image_id)
    pools = [Pool(images[2:]), Pool(images[:2], "class", 0.25)]
    data = TrainingData(pools, all_variants(tuple(images), cache), store, cache)
    assert data.images == (*images[2:], *images[:2])
    batch = data.batch([1, 3, 2], torch.zeros(3))
    assert batch.image_ids == (images[3].image_id, images[1].image_id, images[0].image_id)
    assert batch.loss_weights.tolist() == [1, 0.25, 0.25]
    assert batch.loss_weights.dtype == torch.float32
    assert data.prompts == tuple(image.prompt for image in images[2:])


def test_the_draw_chooses_the_crop(captioned: Prepared, store: EmbeddingStore, cache: LatentCache) -> None:
    images = find(captioned.pictures)
    variants = all_variants(images, cache)
    data = TrainingData([Pool(images)], variants, store, cache)
    index = next(i for i, image in enumerate(data.images) if image.path.name == "00.png")
    image_id = data.images[index].image_id
    names = variants[image_id]
    assert len(names) == 6
    tensors = load_file(cache.path(image_id))
    for place, name in enumerate(names):
        for draw in (place / 6 + 1e-3, (place + 1) / 6 - 1e-3):
            batch = data.batch([index], torch.tensor([draw]))
            assert torch.equal(batch.latent_mean[0], tensors[f"{name}.mean"])
            assert torch.equal(batch.latent_std[0], tensors[f"{name}.std"])
    last = data.batch([index], torch.tensor([1 - 2**-24]))  # the largest that torch.rand gives
    assert torch.equal(last.latent_mean[0], tensors[f"{names[-1]}.mean"])


def test_rows_are_kept_up_to_a_limit(
    captioned: Prepared, store: EmbeddingStore, cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past it, they are read again each time; the batches are the same."""
    reads: list[str] = []
    original = LatentCache.read
    monkeypatch.setattr(LatentCache, "read", lambda self, *key: (reads.append(key[0]), original(self, *key))[1])
    images = find(captioned.pictures)
    kept = TrainingData([Pool(images)], all_variants(images, cache), store, cache)
    first = kept.batch(range(4), torch.zeros(4))
    assert len(reads) == 4
    kept.batch(range(4), torch.zeros(4))
    assert len(reads) == 4
    monkeypatch.setattr(sd3_lora.training.dataset, "_RESIDENT_BYTES", 0)
    never = TrainingData([Pool(images)], all_variants(images, cache), store, cache)
    for _ in range(2):
        again = never.batch(range(4), torch.zeros(4))
        assert torch.equal(again.latent_mean, first.latent_mean)
        assert torch.equal(again.prompt_embeds, first.prompt_embeds)
    assert len(reads) == 12


# Which crops


def names_of(captioned: Prepared, cache: LatentCache, name: str, *choice: object) -> list[str]:
    images = find(captioned.pictures)
    chosen = choose_variants(images, cache, Buckets.square(cache.resolution), *choice, "the command")  # type: ignore[arg-type]
    return list(chosen[hash_file(captioned.pictures / name)])


@pytest.mark.parametrize(
    ("choice", "wide", "square"),
    [
        # center_crop, num_crops, flip
        ((False, None, None), ["+0", "+0-flip", "+16", "+16-flip", "+32", "+32-flip"], ["+0", "+0-flip"]),
        ((False, None, True), ["+0", "+0-flip", "+16", "+16-flip", "+32", "+32-flip"], ["+0", "+0-flip"]),
        ((False, None, False), ["+0", "+16", "+32"], ["+0"]),
        ((True, None, None), ["+16", "+16-flip"], ["+0", "+0-flip"]),
        ((True, None, False), ["+16"], ["+0"]),
        ((True, 3, True), ["+16", "+16-flip"], ["+0", "+0-flip"]),
        ((False, 1, False), ["+16"], ["+0"]),
        ((False, 2, False), ["+0", "+32"], ["+0"]),
        ((False, 3, False), ["+0", "+16", "+32"], ["+0"]),
    ],
)
def test_the_flags_choose_crops(
    captioned: Prepared, cache: LatentCache, choice: tuple[object, ...], wide: list[str], square: list[str]
) -> None:
    def full(offsets: list[str]) -> set[str]:
        return {f"64x64{offset.replace('-flip', '')}+0{'-flip' * offset.endswith('-flip')}" for offset in offsets}

    chosen = names_of(captioned, cache, "00.png", *choice)
    assert set(chosen) == full(wide)
    assert len(chosen) == len(wide)
    assert set(names_of(captioned, cache, "01.png", *choice)) == full(square)


@pytest.fixture
def plain_cache(captioned: Prepared, tmp_path: Path) -> LatentCache:
    """The central crop only, without mirrored twins."""
    flags = ["--pretrained_model_name_or_path", captioned.model, "--instance_data_dir", captioned.pictures]
    flags += ["--center_crop", "--device", "cpu", "--output_path", tmp_path / "plain"]
    assert importlib.import_module("precompute_latents").main(list(map(str, flags))) == 0
    return open_cache(tmp_path / "plain")


def test_crops_that_are_not_cached(captioned: Prepared, plain_cache: LatentCache) -> None:
    assert names_of(captioned, plain_cache, "00.png", False, None, None) == ["64x64+16+0"]
    assert names_of(captioned, plain_cache, "00.png", False, None, False) == ["64x64+16+0"]
    with pytest.raises(UserError, match=r"plain lacks the crop 64x64\+0\+0 of 00\.png: type `the command`"):
        names_of(captioned, plain_cache, "00.png", False, 3, None)
    with pytest.raises(UserError, match=r"plain lacks the crop 64x64\+16\+0-flip of 00\.png: type `the command`"):
        names_of(captioned, plain_cache, "00.png", False, None, True)


def test_a_picture_that_is_not_cached(captioned: Prepared, cache: LatentCache, tmp_path: Path) -> None:
    save_pictures(tmp_path, [(64, 64)], seed=77)
    images = instance_images(tmp_path, "a robot").images
    with pytest.raises(UserError, match=r"latents has no latents of 00\.png \(a new or changed picture\): type `the c"):
        all_variants(images, cache)


def test_prompts_that_are_not_embedded(store: EmbeddingStore) -> None:
    require_prompts(store, CAPTIONS, "the command")
    with pytest.raises(UserError, match=r"embeddings\.parquet lacks 'a green robot': type `the command`"):
        require_prompts(store, [*CAPTIONS, "a green robot", "a green robot"], "the command")
    with pytest.raises(UserError, match="lacks 'x' and 2 more prompts: type"):
        require_prompts(store, ["x", CAPTIONS[0], "y", "z"], "the command")


def test_a_store_without_pictures(captioned: Prepared, cache: LatentCache, tmp_path: Path) -> None:
    from sd3_lora.stage_one.embedding_store import with_uses, write_embeddings

    store = EmbeddingStore(captioned.embeddings)
    write_embeddings(tmp_path / "none.parquet", store.provenance, with_uses(store.read_all(), {}, {}))
    with pytest.raises(UserError, match=r"none\.parquet knows no pictures: type --instance_data_dir FOLDER"):
        images_of_store(EmbeddingStore(tmp_path / "none.parquet"), cache)
