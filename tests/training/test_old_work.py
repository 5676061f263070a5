"""What earlier builds wrote is read, resumed and drawn with (`tests/data/README.md`)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common import records
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents
from sd3_lora.training.checkpoints import read_state
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.transformer.lora import LORA_FILE, read_lora_record

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT, PROMPT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import Flags, Run, Script, train, training_script

BUILDS = sorted(path for path in (PROJECT / "tests" / "data").iterdir() if path.is_dir())
OF_ALL = ["--resolution", 64, "--lora_layers", "attn.to_q", "--lora_blocks", "0,1", "--seed", 0, "--report_to", "none"]
OF_ALL += ["--learning_rate", 1e-3, "--checkpointing_steps", 3, "--max_train_steps", 6]
OPTIMIZERS: dict[str, list[Any]] = {
    "adamw": [
        *["--rank", 2, "--lora_dropout", 0.1, "--train_batch_size", 2],
        *["--lr_scheduler", "cosine", "--lr_warmup_steps", 2],
    ],
    "adam8bit": ["--rank", 4, "--use_8bit_adam", "--gradient_accumulation_steps", 2],
}


@pytest.fixture(params=BUILDS, ids=lambda build: build.name)
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a build's work; its pictures are in `two`."""
    folder = tmp_path / "work"
    shutil.copytree(request.param, folder)
    (folder / "two").mkdir()
    for name in ("01.png", "02.jpg"):
        shutil.copy(PROJECT / "examples" / "robot" / name, folder / "two")
    return folder


def resume(script: Script, work: Path, optimizer: str, *more: object, code: int = 0) -> Run:
    """Goes on from the build's checkpoint with the command that wrote it, and more flags."""
    data = Flags(["--data_df_path", work / "embeddings.parquet", "--latents_path", work / "latents"])
    words = [*OF_ALL, *OPTIMIZERS[optimizer], "--resume_from_checkpoint", "latest", *more]
    return train(script, data, work / optimizer, *words, code=code)


def draw(script: Script, work: Path, outdir: Path) -> str:
    """What the command that drew the build's picture prints, writing elsewhere."""
    words = ["--lora", work / "adamw", "--prompt", PROMPT, "--max_sequence_length", 8, "--num_steps", 2, "--seed", 0]
    words += ["--data_df_path", work / "embeddings.parquet", "--outdir", outdir, "--device", "cpu"]
    result = script("inference", *words)
    assert result.code == 0, result.err
    return result.out


# Stage one


def test_the_embeddings_are_whole_and_current(script: Script, work: Path, miniature_files: ModelFiles) -> None:
    with EmbeddingStore(work / "embeddings.parquet") as store:
        assert store.provenance.difference(miniature_files.provenance(TEXT_COMPONENTS, "fp32", 8), "length") is None
        rows = list(store.read_all())
    assert {row.prompt for row in rows} == {PROMPT, ""}
    assert {len(row.image_ids) for row in rows} == {2, 0}
    words = ["--instance_data_dir", work / "two", "--instance_prompt", PROMPT, "--max_sequence_length", 8]
    result = script("compute_embeddings", *words, "--output_path", work / "embeddings.parquet", "--device", "cpu")
    assert result.code == 0, result.err
    assert "2 prompts, 2 of them done before" in result.out


def test_the_latents_are_whole_and_current(script: Script, work: Path, miniature_files: ModelFiles) -> None:
    cache = LatentCache(work / "latents", miniature_files.provenance(["vae"], "fp32", 64), "white")
    ids = [path.stem for path in (work / "latents").glob("*.safetensors")]
    assert len(ids) == 2
    for image_id in ids:
        assert len(cache.variants(image_id)) == 2
        for variant in cache.variants(image_id):
            assert cache.read(image_id, variant).mean.shape == (16, 8, 8)
    words = ["--instance_data_dir", work / "two", "--resolution", 64, "--random_flip", "--device", "cpu"]
    result = script("precompute_latents", *words, "--output_path", work / "latents")
    assert result.code == 0, result.err
    assert "2 of 2 pictures cached before" in result.out


def test_its_provenance_is_written_as_it_was(work: Path) -> None:
    """Byte for byte, so that the earlier build reads what this one writes."""
    metadata = pq.ParquetFile(work / "embeddings.parquet").schema_arrow.metadata[b"sd3_lora"]
    texts = [metadata.decode()]
    for path in (work / "latents").glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            texts.append(handle.metadata()["sd3_lora"])
    assert len(texts) == 3
    for text in texts:
        written = json.loads(text)["provenance"]
        again = records.Provenance.from_dict(written).to_dict()
        assert json.dumps(again) in text


def test_a_setting_that_it_did_not_have_is_at_its_default(
    work: Path, miniature_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(records.LATER_SETTINGS, "made_up", 1)
    wanted = miniature_files.provenance(["vae"], "fp32", 64)
    (image_id, *_) = [path.stem for path in (work / "latents").glob("*.safetensors")]
    for value, stale in ((1, None), (2, "made_up 1, not 2")):
        asked = records.Provenance.from_dict({**wanted.to_dict(), "settings": {"made_up": value}})
        cache = LatentCache(work / "latents", asked)
        if stale is None:
            assert cache.variants(image_id)
        else:
            with pytest.raises(StaleLatents, match=stale):
                cache.variants(image_id)


# Training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_is_resumed(script: Script, work: Path, optimizer: str) -> None:
    expected = [json.loads(line) for line in (work / optimizer / "losses.jsonl").read_text().splitlines()]
    lora = load_file(work / optimizer / LORA_FILE) if optimizer == "adamw" else {}
    run = resume(script, work, optimizer)
    assert f"resumed from {work / optimizer / 'checkpoint-3'}: step 3 of 6" in run.out
    assert [line["step"] for line in run.losses] == [1, 2, 3, 4, 5, 6]
    for line, before in zip(run.losses, expected, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert line[name] == pytest.approx(before[name], rel=1e-4), (line["step"], name)
    before = load_file(work / optimizer / "checkpoint-3" / LORA_FILE)
    for name, tensor in lora.items():
        torch.testing.assert_close(run.lora[name], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(before[name], tensor, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class LaterFlow(FlowConfig):
    """With a flag that a later build may have."""

    made_up: int = field(default=1, metadata={"help": "A flag."})


NOW = training_script().COMMAND_LINE
LATER = replace(NOW, groups=tuple(LaterFlow if group is FlowConfig else group for group in NOW.groups))


@pytest.fixture
def later_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with one flag more, which decides the numbers."""
    monkeypatch.setattr(training_script(), "COMMAND_LINE", LATER)


@pytest.mark.usefixtures("later_build")
def test_a_flag_that_the_build_did_not_have_is_at_its_default(script: Script, work: Path) -> None:
    refused = resume(script, work, "adamw", "--made_up", 2, code=2)
    assert refused.error == (
        f"{work / 'adamw' / 'checkpoint-3'} was trained with --made_up 1, not 2: type --made_up 1 to go on, or give "
        "another --output_dir for a new run"
    )
    assert len(refused.losses) == 6  # of before: nothing was written
    run = resume(script, work, "adamw")
    assert "step 3 of 6" in run.out
    assert read_state(work / "adamw" / "checkpoint-6")["signature"]["--made_up"] == 1


def test_what_a_later_build_wrote_is_refused_in_a_sentence(
    script: Script, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training_script(), "COMMAND_LINE", LATER)
        resume(script, work, "adamw")
    run = resume(script, work, "adamw", "--max_train_steps", 7, code=2)
    assert run.error == (
        f"{work / 'adamw' / 'checkpoint-6'} was trained with --made_up 1, which this build does not know: resume it "
        "with the newer build that wrote it, or give another --output_dir for a new run"
    )


# Drawing


def test_the_lora_is_drawn_with(script: Script, work: Path, tmp_path: Path) -> None:
    record = read_lora_record(work / "adamw" / LORA_FILE)
    assert {"trigger": PROMPT, "resolution": 64, "max_sequence_length": 8, "rank": 2}.items() <= record.items()
    assert "1 picture of 64×64, 0 of them drawn before" in draw(script, work, tmp_path / "again")
    (old,), (new,) = (sorted(folder.glob("*/*.png")) for folder in (work / "images", tmp_path / "again"))
    assert old.relative_to(work / "images") == new.relative_to(tmp_path / "again")
    difference = np.asarray(Image.open(old), int) - np.asarray(Image.open(new), int)
    assert np.abs(difference).max() <= 2


def test_a_picture_counts_as_drawn(script: Script, work: Path) -> None:
    (picture,) = (work / "images").glob("*/*.png")
    before = picture.read_bytes()
    assert "1 picture of 64×64, 1 of them drawn before" in draw(script, work, work / "images")
    assert picture.read_bytes() == before
