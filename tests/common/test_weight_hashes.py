"""Weights known by all of their bytes: what is noticed, what is noted, and rot told apart from a change on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sd3_lora.common import weight_hashes
from sd3_lora.common.command_line import UserError
from sd3_lora.common.component_weights import tensors_hash
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.records import Provenance
from sd3_lora.common.weight_hashes import hashes_of, hub_sha256, noted_hash, whole_hash

import pytest
import torch
from conftest import Result
from safetensors.torch import load_file, save_file

VERIFY = "sd3_lora.verify"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; small files are noted too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_hashes, "NOTED_FROM_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_sd3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD3, written an hour ago."""
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "model"))
    for path in folder.rglob("*.safetensors"):
        age(path, 3600)
    return folder


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def flip(path: Path, place: int = -3) -> None:
    """A bit, as rot does: the file's times stay."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def transformer_of(model: Path) -> Provenance:
    return ModelFiles(ModelConfig(str(model))).provenance(["transformer"], "", 0)


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    """Of the name, the dtype and the shape too; the same tensors spread over two files are the same."""
    tensors = {f"t{i}": torch.full((40, 50), float(i)) for i in range(4)}
    path = tmp_path / "whole"
    save_file(tensors, path, {"format": "pt"})
    for i in range(2):
        save_file({n: tensors[n] for n in (f"t{i}", f"t{i + 2}")}, tmp_path / f"shard{i}")
    whole, content = whole_hash([path]), path.read_bytes()
    assert whole == whole_hash([tmp_path / "shard1", tmp_path / "shard0"])
    start = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * start, 8 * len(content), 509):
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        assert whole_hash([path]) != whole
    for other in (
        tensors | {"t1": tensors["t1"].reshape(50, 40)},
        tensors | {"t1": tensors["t1"].view(torch.int32)},
        {("t9" if name == "t1" else name): tensor for name, tensor in tensors.items()},
        tensors | {"t1": tensors["t2"], "t2": tensors["t1"]},
        {name: tensor for name, tensor in tensors.items() if name != "t0"},
    ):
        save_file(other, path)
        assert whole_hash([path]) != whole
    for broken in (b"", b"version https://git-lfs.github.com/spec/v1\n", content[:50], content[:-1]):
        path.write_bytes(broken)
        assert whole_hash([path]) is None


def test_one_number_between_the_samples_makes_other_weights(model: Path) -> None:
    """Earlier builds knew weights by samples; what they wrote stays valid."""
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    before = transformer_of(model)
    samples = tensors_hash([path])
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[400] += 1  # no sample reaches it
    save_file(tensors, path, {"format": "pt"})
    assert tensors_hash([path]) == samples
    now = transformer_of(model)
    assert before.difference(now, "resolution") == f"other weights than {model} has now"
    assert now.identity not in {before.identity, *before.other_identities}
    assert before.identity not in now.other_identities
    stored = Provenance.from_dict(json.loads(json.dumps(before.to_dict())))
    assert stored == before
    earlier = Provenance.from_dict({k: v for k, v in before.to_dict().items() if k != "whole_hash"})
    assert earlier == replace(before, whole_hash=None)
    assert earlier.difference(before, "resolution") is None
    assert earlier.identity in before.other_identities


def test_a_file_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = transformer_of(model).whole_hash
    read, real = list[Path](), weight_hashes._read
    monkeypatch.setattr(weight_hashes, "_read", lambda path, **options: read.append(path) or real(path, **options))
    assert transformer_of(model).whole_hash == first
    assert read == []
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    os.utime(path)  # written just now: it may be written again within a tick of the clock
    for _ in range(2):
        assert transformer_of(model).whole_hash == first
    assert read == [path, path]


def test_a_damaged_note_or_a_cache_that_cannot_be_written_costs_a_reading(model: Path, cache: Path) -> None:
    path = model / VAE
    (known,) = hashes_of([path])
    assert noted_hash(path) == known
    (note,) = (cache / "sd3_lora" / "weights").iterdir()
    for content in ("", "{}", note.read_text().replace('"tensors": "', '"tensors": "zz')):
        note.write_text(content)
        assert noted_hash(path) is None
        assert hashes_of([path]) == [known]
    shutil.rmtree(cache)
    cache.write_text("a file")
    assert hashes_of([path]) == [known]


def test_rot_is_told_apart_from_a_change_on_purpose(script: Callable[..., Result], model: Path) -> None:
    path = model / VAE
    first = script(VERIFY, model)
    assert first.code == 0
    assert f"{path}: read for the first time\n" in first.out
    assert first.out.endswith("whole and sound\n")
    assert f"{path}: as when it was first read\n" in script(VERIFY, model).out

    flip(path)
    for _ in range(2):
        rotten = script(VERIFY, model)
        assert rotten.code == 2
        assert rotten.err == (
            f"error: {path} has rotted on the disk (nobody wrote it since it was first read, and it is another): "
            f"delete {path} and download it again\n"
        )

    tensors = load_file(path)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    age(path, 60)
    changed = script(VERIFY, model)
    assert (changed.code, changed.err) == (0, "")
    assert f"{path}: changed since it was first read\n" in changed.out
    assert f"{path}: as when it was first read\n" in script(VERIFY, model).out


def test_all_faults_of_a_folder_are_named(script: Callable[..., Result], model: Path) -> None:
    assert script(VERIFY, model).code == 0
    flip(model / VAE)
    (model / "text_encoder" / "model.safetensors").unlink()
    result = script(VERIFY, model)
    assert result.code == 2
    assert f"{model}/text_encoder has no weights in safetensors" in result.err
    assert "(1 more fault above)" in result.err
    assert f"{model / VAE} has rotted on the disk" in result.out


def hub_copy(model: Path, folder: Path, is_linked: bool) -> Path:
    """The VAE as the hub's cache has it, a link to a blob that is named by its hash; or as `--local-dir` has it."""
    weights = folder / VAE
    shutil.copytree(model, folder)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if is_linked:
        blob = folder.parent / "blobs" / digest
        blob.parent.mkdir()
        weights.rename(blob)
        weights.symlink_to(blob)
    else:
        record = folder / ".cache" / "huggingface" / "download" / f"{VAE}.metadata"
        record.parent.mkdir(parents=True)
        record.write_text(f"{'a' * 40}\n{digest}\n{weights.stat().st_mtime + 1}\n")
    assert hub_sha256(weights) == digest
    return weights


@pytest.mark.parametrize("is_linked", [True, False])
def test_a_file_that_is_not_the_hub_s_is_refused(
    script: Callable[..., Result], model: Path, tmp_path: Path, is_linked: bool
) -> None:
    path = hub_copy(model, tmp_path / "hub", is_linked)
    folder = tmp_path / "hub"
    assert f"{path}: as on the hub\n" in script(VERIFY, folder).out
    flip(path.resolve())
    ModelFiles(ModelConfig(str(folder))).component("vae")  # a note says that it was sound
    assert f"{path} is damaged (its sha256 is not the hub's): delete {path.resolve()} and" in script(VERIFY, folder).err
    os.utime(path.resolve(), (1, 1))  # as if it came so
    with pytest.raises(UserError, match="is damaged: its sha256 is not the hub's") as caught:
        ModelFiles(ModelConfig(str(folder))).component("vae")
    assert str(caught.value).startswith(f"{path} ")


def test_a_file_that_was_changed_after_its_download_is_no_longer_the_hub_s(model: Path, tmp_path: Path) -> None:
    path = hub_copy(model, tmp_path / "hub", is_linked=False)
    flip(path)
    os.utime(path)
    assert hub_sha256(path) is None
    ModelFiles(ModelConfig(str(tmp_path / "hub"))).component("vae")
