"""A commit of the hub's repository that leaves the weights as they were makes nothing stale."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sd3_lora.common import model_files
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.records import Provenance

import pytest
from conftest import PROMPT, Prepared, Result
from safetensors.torch import load_file, save_file
from training_runs import Flags, train

HUB_ID, OLD, NEW = "org/sd3", "a" * 40, "b" * 40


class Cache:
    """The hub's cache of one repository: snapshots of links to blobs, which are named by their hashes."""

    def __init__(self, folder: Path, source: Path):
        self.folder = folder
        self.repo = folder / "models--org--sd3"
        (self.repo / "blobs").mkdir(parents=True)
        self.commit(OLD, source)

    def commit(self, name: str, source: Path) -> None:
        """A commit with a folder's files, to which `main` is moved."""
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            blob = self.repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            if not blob.exists():
                shutil.copy(path, blob)
            link = self.repo / "snapshots" / name / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (self.repo / "refs").mkdir(exist_ok=True)
        (self.repo / "refs" / "main").write_text(name)

    def copy_links(self) -> None:
        """As on a system without links."""
        for link in (self.repo / "snapshots").rglob("*"):
            if link.is_symlink():
                content = link.read_bytes()
                link.unlink()
                link.write_bytes(content)

    def files(self, **options: Any) -> ModelFiles:
        return ModelFiles(ModelConfig(HUB_ID, cache_dir=str(self.folder), **options))

    def answers(self, source: Path) -> Any:
        """The hub's answer about a folder's files."""
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        hashes = {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names}
        files = [SimpleNamespace(rfilename=n, blob_id="-", lfs=SimpleNamespace(sha256=h)) for n, h in hashes.items()]
        return SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files))


@pytest.fixture
def cache(tiny_sd3: Path, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hub", tiny_sd3)


@pytest.fixture
def other(tiny_sd3: Path, tmp_path: Path) -> Path:
    """The tiny SD3 with one number changed in each of two components; samples of whole files do not see it."""
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "other"))
    for name in ("text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        next(iter(tensors.values())).view(-1)[7] += 1
        save_file(tensors, folder / name, {"format": "pt"})
    return folder


def as_earlier_build(record: Provenance) -> Provenance:
    return replace(record, tensors_hash=None, files_hash=None, whole_hash=None)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("components", [TEXT_COMPONENTS, ["transformer"], ["vae"]])
def test_the_weights_count_and_not_the_commit(
    cache: Cache, tiny_sd3: Path, other: Path, links: bool, components: list[str]
) -> None:
    before = cache.files().provenance(components, "fp32", 20)
    cache.commit(NEW, tiny_sd3)
    if not links:
        cache.copy_links()
    files = cache.files()
    now = files.provenance(components, "fp32", 20)
    assert (before.revision, now.revision, before.weights_hash) == (OLD, NEW, None)
    assert (now.files_hash is not None) == links
    for artefact in (before, as_earlier_build(before)):
        stored = Provenance.from_dict(json.loads(json.dumps(artefact.to_dict())))
        assert stored.difference(now, "length") is None
    assert now.identity == before.identity
    assert f"{before.config_hash[:8]}-{OLD[:8]}" in now.other_identities  # as earlier builds called it

    cache.commit("c" * 40, other)
    if not links:
        cache.copy_links()
    changed = cache.files().provenance(components, "fp32", 20)
    is_changed = components != ["vae"]
    for artefact in (before, as_earlier_build(before)):
        difference = artefact.difference(changed, "length")
        assert (difference is not None) == is_changed
        if difference:
            assert difference == f"model {HUB_ID}@aaaaaaaa, not {HUB_ID}@cccccccc (--revision {OLD} keeps it)"
    assert (changed.identity != before.identity) == is_changed
    kept = cache.files(revision=OLD).provenance(components, "fp32", 20)
    assert before.difference(kept, "length") is None


def test_text_encoders_that_are_not_here_are_known_by_the_hub(
    cache: Cache, tiny_sd3: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training never downloads them."""
    before = cache.files().provenance(TEXT_COMPONENTS, "fp32", 20)
    cache.commit(NEW, tiny_sd3)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (cache.repo / "snapshots" / NEW / name / "model.safetensors").unlink()
    for source, same in ((tiny_sd3, True), (other, False)):
        answer = cache.answers(source)
        with monkeypatch.context() as patch:
            patch.setattr(model_files, "HfApi", lambda answer=answer: answer)
            now = cache.files().provenance(TEXT_COMPONENTS, "fp32", 20)
        assert before.same_model(now) is as_earlier_build(before).same_model(now) is same
    silent = cache.files().provenance(TEXT_COMPONENTS, "fp32", 20)  # offline
    assert (silent.tensors_hash, silent.files_hash) == (None, None)
    assert before.difference(silent, "length") == (
        f"model {HUB_ID}@aaaaaaaa, not {HUB_ID}@bbbbbbbb (--revision {OLD} keeps it)"
    )


def test_a_folder_and_the_hub_s_model_are_compared(cache: Cache, tiny_sd3: Path, other: Path) -> None:
    of_hub = cache.files().provenance(["transformer"], "", 0)
    folder, changed = (
        ModelFiles(ModelConfig(str(path))).provenance(["transformer"], "", 0) for path in (tiny_sd3, other)
    )
    assert of_hub.same_model(folder)
    assert folder.identity == of_hub.identity
    assert not of_hub.same_model(changed)
    assert folder.weights_hash == changed.weights_hash or folder.tensors_hash != changed.tensors_hash


def be_earlier_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written knows the commit alone."""
    to_dict = Provenance.to_dict

    def without_hashes(record: Provenance) -> dict[str, Any]:
        return to_dict(as_earlier_build(record))

    monkeypatch.setattr(Provenance, "to_dict", without_hashes)
    monkeypatch.setattr(Provenance, "identity", property(lambda self: f"{self.config_hash[:8]}-{self.revision[:8]}"))


@pytest.mark.parametrize("earlier", [False, True])
def test_work_goes_on_after_it(
    script: Callable[..., Result],
    prepared: Prepared,
    cache: Cache,
    tiny_sd3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    earlier: bool,
) -> None:
    """Embeddings, latents, a checkpoint and a picture; also those of an earlier build."""
    model = ["--pretrained_model_name_or_path", HUB_ID, "--cache_dir", cache.folder]
    pictures = [*model, "--instance_data_dir", prepared.pictures, "--instance_prompt", PROMPT]
    embed = [*pictures, "--max_sequence_length", 20, "--output_path", tmp_path / "e.parquet"]
    encode = [*pictures, "--output_path", tmp_path / "latents"]
    artefacts = ["--data_df_path", tmp_path / "e.parquet", "--latents_path", tmp_path / "latents"]
    data = Flags([*pictures, *artefacts, "--report_to", "none", "--seed", 0, "--checkpointing_steps", 1])
    draw = [*model, *artefacts[:2], "--prompt", PROMPT, "--max_sequence_length", 20, "--outdir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        if earlier:
            be_earlier_build(patch)
        assert script("compute_embeddings", *embed).code == script("precompute_latents", *encode).code == 0
        train(script, data, tmp_path / "lora", "--max_train_steps", 1)
        assert script("inference", *draw, "--num_steps", 1).code == 0
    cache.commit(NEW, tiny_sd3)
    assert "2 of them done before" in script("compute_embeddings", *embed).out
    assert "5 of 5 pictures cached before" in script("precompute_latents", *encode).out
    words = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    assert "step 1 of 2" in train(script, data, tmp_path / "lora", *words).out
    if not earlier:  # earlier builds did not note the text encoders
        assert "1 of them drawn before" in script("inference", *draw, "--num_steps", 1).out
