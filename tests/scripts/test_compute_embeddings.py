"""Prompts to parquet, through the script: what is embedded, kept, added, refused and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import compute_embeddings
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.gpu.budget import DeviceBudget
from sd3_lora.stage_one import text_encoders
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan, encoder_bytes, working_bytes
from sd3_lora.stage_one.text_encoders import encode_prompts

import pytest
import torch
from conftest import PROMPT, Prepared, Result, save_pictures, save_tiny_sd3

Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def embed(script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path) -> Callable[..., Result]:
    """`embed("--class_prompt", "a dog")` runs the script into `out.parquet`, with 20 T5 tokens."""

    def call(*words: object, model: Path = tiny_sd3, length: int = 20, prompt: str | None = PROMPT) -> Result:
        shared = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures, "--device", "cpu"]
        shared += ["--max_sequence_length", length, "--output_path", tmp_path / "out.parquet"]
        return script("compute_embeddings", *shared, *(["--instance_prompt", prompt] if prompt else []), *words)

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of each call of the encoders."""
    calls: list[list[str]] = []

    def watched(files: ModelFiles, prompts: list[str], *args: Any) -> Any:
        calls.append(list(prompts))
        return encode_prompts(files, prompts, *args)

    monkeypatch.setattr(compute_embeddings, "encode_prompts", watched)
    return calls


def read_rows(path: Path) -> Rows:
    with EmbeddingStore(path) as store:
        return {row.prompt: (row.prompt_embeds, row.pooled_prompt_embeds) for row in store.read_all()}


def bit_equal(one: Rows, other: Rows) -> bool:
    return list(one) == list(other) and all(
        torch.equal(mine, its) for prompt in one for mine, its in zip(one[prompt], other[prompt], strict=True)
    )


def refused(result: Result, *parts: str) -> bool:
    """One sentence on stderr, exit code 2, no traceback."""
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err
    return True


# What is embedded


def test_the_file_holds_what_the_stock_pipeline_says(prepared: Prepared) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(prepared.model)
    with EmbeddingStore(prepared.embeddings) as store:
        assert store.prompts == (PROMPT, "a photo of a robot", "")
        for row in store.read_all():
            expected, _, expected_pooled, _ = pipeline.encode_prompt(
                row.prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=20
            )
            # Half a unit in float16's last place, and the 1e-6 between a batch of one and of three.
            torch.testing.assert_close(row.prompt_embeds.float(), expected[0], rtol=2**-11 + 1e-5, atol=1e-5)
            torch.testing.assert_close(row.pooled_prompt_embeds.float(), expected_pooled[0], rtol=2**-11, atol=1e-5)


def test_every_distinct_prompt_once_with_its_roles_and_pictures(
    embed: Callable[..., Result], pictures: Path, out: Path, tmp_path: Path, encoded: list[list[str]]
) -> None:
    (pictures / "00.txt").write_text("sks robot, wide")
    (pictures / "02.txt").write_text("a robot")
    (pictures / "notes.pdf").write_text("no picture")
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfsks robot, wide\r\n\r\na blue sks robot\r\n")
    result = embed(
        "--class_prompt", "a robot", "--negative_prompt", "blurry", "--prompts_file", tmp_path / "prompts.txt",
        "--validation_prompt", "a red sks robot", "a robot", "--validation_prompt", "a green sks robot",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert "3 pictures in" in result.out
    assert "1 other file left out" in result.out
    wide, square, tall = (hash_file(pictures / f"0{i}.png") for i in range(3))
    with EmbeddingStore(out) as store:
        found = {row.prompt: (set(row.roles), row.image_ids) for row in store.read_all()}
        assert len(store) == len(found) == 8
    assert found == {
        PROMPT: ({"instance", "uncaptioned"}, (square,)),
        "sks robot, wide": ({"instance", "validation"}, (wide,)),
        "a robot": ({"instance", "class", "validation"}, (tall,)),
        "a red sks robot": ({"validation"}, ()),
        "a green sks robot": ({"validation"}, ()),
        "a blue sks robot": ({"validation"}, ()),
        "blurry": ({"negative"}, ()),
        "": ({"empty"}, ()),
    }
    assert [sorted(call) for call in encoded] == [sorted(found)]


def test_prompts_with_the_subject_in_its_place(embed: Callable[..., Result], out: Path, tmp_path: Path) -> None:
    """What is embedded is what inference.py draws by the same flags."""
    (tmp_path / "prompts.txt").write_text("# {} is the subject\na red {}\n")
    (tmp_path / "more.txt").write_text("a photo of a fish\n")
    flags = ["--prompts_file", tmp_path / "prompts.txt", "--prompts_file", tmp_path / "more.txt"]
    flags += ["--validation_prompt", "{} at sea"]
    refused = embed(*flags)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "'{} at sea' has {} in place of the subject: add --subject" in refused.err
    assert embed(*flags, "--subject", "sks robot").code == 0
    with EmbeddingStore(out) as store:
        assert set(store.prompts_with_role("validation")) == {
            "a red sks robot",
            "sks robot at sea",
            "a photo of a fish",
        }


def test_the_empty_prompt_is_the_negative_one_by_default(prepared: Prepared) -> None:
    with EmbeddingStore(prepared.embeddings) as store:
        assert store.prompts_with_role("negative") == store.prompts_with_role("empty") == ("",)
        assert store.prompts_with_role("class") == ("a photo of a robot",)


def test_captions_alone_suffice(embed: Callable[..., Result], pictures: Path, out: Path) -> None:
    for picture in pictures.glob("*.png"):
        picture.with_suffix(".txt").write_text("a zwxqj robot")
    result = embed(prompt=None)
    assert result.code == 0
    assert "identifier 'zwxqj'" in result.out
    with EmbeddingStore(out) as store:
        assert store.prompts == ("a zwxqj robot", "")
        assert set(store.prompts_of_images()) == {hash_file(picture) for picture in pictures.glob("*.png")}


def test_identical_pictures_are_one(embed: Callable[..., Result], pictures: Path, out: Path) -> None:
    (pictures / "copy.png").write_bytes((pictures / "00.png").read_bytes())
    result = embed()
    assert "identical pictures, used once: 00.png, copy.png" in result.out
    with EmbeddingStore(out) as store:
        assert len(store.prompts_of_images()) == 3


def test_the_identifier_is_reported_with_its_warning(embed: Callable[..., Result]) -> None:
    good = embed("--class_prompt", "a photo of a robot").out
    assert "identifier 'sks' → CLIP: sk s</w>; T5: ▁ s k s\n" in good
    assert "warning" not in good
    assert "note" not in good
    assert "note: T5's vocabulary lacks робот, 🤖: " in embed("--validation_prompt", "sks робот", "a red 🤖").out
    assert "identifier '[V]' → CLIP: [</w> v</w> ]</w>; T5: " in embed(prompt="a photo of [V] robot").out
    assert "warning: 'zwxqj' falls into 5 CLIP tokens" in embed(prompt="a photo of zwxqj robot").out
    assert "warning: 'x' is a common word" in embed("--class_prompt", "a photo of a dog", prompt="a photo of x dog").out


def test_the_resolved_flags_and_what_each_stage_took_are_saved(
    embed: Callable[..., Result], tiny_sd3: Path, out: Path
) -> None:
    result = embed("--t5_precision", "fp32")
    saved = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert saved["flags"]["pretrained_model_name_or_path"] == str(tiny_sd3)
    assert saved["flags"]["max_sequence_length"] == 20
    assert saved["flags"]["device"] == "cpu"
    assert [stage["name"] for stage in saved["stages"]] == [
        "encode with CLIP-L", "encode with CLIP-G", "encode with T5 (fp32)",
    ]  # fmt: skip
    assert all(stage["elapsed_s"] > 0 and stage["peak_host_gib"] > 0 for stage in saved["stages"])
    assert f"wrote {out}: 2 prompts" in result.out
    assert "next: python precompute_latents.py --pretrained_model_name_or_path" in result.out


def test_the_provenance_says_what_made_the_file(prepared: Prepared) -> None:
    files = ModelFiles(ModelConfig(str(prepared.model)))
    with EmbeddingStore(prepared.embeddings) as store:
        assert store.provenance == files.provenance(TEXT_COMPONENTS, "fp32", 20)
    assert files.provenance(TEXT_COMPONENTS, "fp32", 20).weights_hash is not None


def test_the_reference_s_flag_names(
    script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").symlink_to(pictures)
    model = ["--pretrained_model_name_or_path", tiny_sd3]
    assert script("compute_embeddings", *model, "--local_data_dir", pictures, "--prompt", PROMPT).code == 0
    named = read_rows(tmp_path / "sample_embeddings.parquet")
    assert list(named) == [PROMPT, ""]
    assert named[""][0].shape == (77 + 77, 48)
    assert script("compute_embeddings", *model, "--overwrite").code == 0  # the reference's folder and prompt
    assert list(read_rows(tmp_path / "sample_embeddings.parquet")) == ["a photo of sks dog", ""]


# Precisions


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_streamed_file_equals_the_resident_one(
    embed: Callable[..., Result], out: Path, precision: str, encoded: list[list[str]]
) -> None:
    assert "T5 in" in embed("--t5_precision", precision).out
    resident = read_rows(out)
    streamed = embed("--t5_precision", precision, "--t5_stream", "--overwrite")
    assert f"encode with T5 ({precision}, one block at a time)" in streamed.out
    assert len(encoded) == 2
    assert bit_equal(read_rows(out), resident)


def test_int8_is_recorded_and_differs_from_fp32(embed: Callable[..., Result], out: Path) -> None:
    embed()
    exact = read_rows(out)
    assert embed("--t5_precision", "int8", "--overwrite").code == 0
    with EmbeddingStore(out) as store:
        assert store.provenance.precision == "int8"
    found = read_rows(out)
    for prompt in exact:
        clip, t5 = exact[prompt][0][:77].float(), exact[prompt][0][77:].float()
        assert torch.equal(found[prompt][0][:77].float(), clip)
        assert 0 < (found[prompt][0][77:].float() - t5).norm() < 0.05 * t5.norm()


# Chunks, and going on


def test_an_interrupted_run_goes_on_to_the_same_file(
    embed: Callable[..., Result], out: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[list[str]]
) -> None:
    monkeypatch.setattr(compute_embeddings, "PROMPTS_PER_CHUNK", 2)
    more = ["--validation_prompt", *(f"{color} sks robot" for color in ("red", "green", "blue"))]
    assert embed(*more).code == 0
    undisturbed = read_rows(out)
    assert [len(chunk) for chunk in encoded] == [2, 2, 1]
    out.unlink()
    encoded.clear()

    watched = compute_embeddings.encode_prompts

    def interrupted(files: ModelFiles, prompts: list[str], *args: Any) -> Any:
        if encoded:
            raise KeyboardInterrupt
        return watched(files, prompts, *args)

    with monkeypatch.context() as patch:
        patch.setattr(compute_embeddings, "encode_prompts", interrupted)
        result = embed(*more)
    assert result.code == 130
    assert "run the same command again to go on" in result.err
    assert "Traceback" not in result.err
    assert not out.exists()
    assert encoded.pop() == [PROMPT, "red sks robot"]

    result = embed(*more)
    assert result.code == 0
    assert "5 prompts, 2 of them done before" in result.out
    assert encoded == [["green sks robot", "blue sks robot"], [""]]
    assert bit_equal(read_rows(out), undisturbed)
    leftovers = {path.name for path in out.parent.iterdir()}
    assert leftovers == {"out.parquet", "out.json", "pictures"}


def test_an_interruption_within_an_encoder_leaves_nothing_of_the_chunk(
    embed: Callable[..., Result], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_encoders, "load_t5", interrupted)
    assert embed().code == 130
    assert not list(out.parent.glob("*out*"))


def test_parts_of_another_precision_are_not_mixed_in(
    embed: Callable[..., Result], out: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[list[str]]
) -> None:
    monkeypatch.setattr(compute_embeddings, "PROMPTS_PER_CHUNK", 1)
    with monkeypatch.context() as patch:
        patch.setattr(compute_embeddings, "write_embeddings", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert embed("--t5_precision", "fp16").code == 130
    encoded.clear()
    assert embed("--t5_precision", "fp32").code == 0
    assert encoded == [[PROMPT], [""]]


def test_a_second_run_encodes_nothing(
    embed: Callable[..., Result], out: Path, encoded: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed()
    first = read_rows(out)
    encoded.clear()
    result = embed()
    assert result.code == 0
    assert "2 prompts, 2 of them done before" in result.out
    assert encoded == []
    assert bit_equal(read_rows(out), first)


def test_another_prompt_is_added_and_the_old_rows_stay(
    embed: Callable[..., Result], out: Path, encoded: list[list[str]], pictures: Path
) -> None:
    embed("--class_prompt", "a robot")
    first = read_rows(out)
    encoded.clear()
    save_pictures(pictures / "more", [(64, 64)], seed=1)
    assert embed("--validation_prompt", "a blue sks robot", "--recursive").code == 0
    assert encoded == [["a blue sks robot"]]
    second = read_rows(out)
    assert set(second) == {*first, "a blue sks robot"}
    assert bit_equal({prompt: second[prompt] for prompt in first}, first)
    with EmbeddingStore(out) as store:
        assert store.prompts_with_role("validation") == ("a blue sks robot",)
        assert "a robot" in store
        assert store.prompts_with_role("class") == ()
        assert len(store.prompts_of_images()) == 4


def test_the_precision_of_a_file_is_kept(embed: Callable[..., Result], out: Path, encoded: list[list[str]]) -> None:
    embed("--t5_precision", "fp16")
    result = embed("--validation_prompt", "a blue sks robot")
    assert result.code == 0
    assert "T5 in fp16" in result.out
    assert encoded[1:] == [["a blue sks robot"]]
    with EmbeddingStore(out) as store:
        assert store.provenance.precision == "fp16"


@pytest.fixture(scope="module")
def other_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes as `tiny_sd3`, other weights."""
    return save_tiny_sd3(tmp_path_factory.mktemp("other"), seed=1, width=48)


@pytest.mark.parametrize("change", ["precision", "length", "model"])
def test_a_file_made_otherwise_stays_and_overwrite_replaces_it(
    embed: Callable[..., Result], out: Path, other_sd3: Path, tiny_sd3: Path, change: str, encoded: list[list[str]]
) -> None:
    embed()
    before, rows = out.read_bytes(), read_rows(out)
    encoded.clear()
    words, options, difference = {
        "precision": (["--t5_precision", "fp16"], {}, "precision fp32, not fp16"),
        "length": ([], {"length": 21}, "max_sequence_length 20, not 21"),
        "model": ([], {"model": other_sd3}, f"model {tiny_sd3}, not {other_sd3}"),
    }[change]
    result = embed(*words, **options)
    assert refused(result, f"out.parquet was made with {difference}: add --overwrite to replace it")
    assert encoded == []
    assert out.read_bytes() == before
    assert not out.with_name("out.parquet.parts").exists()

    assert embed(*words, "--overwrite", **options).code == 0
    assert encoded == [[PROMPT, ""]]
    assert not bit_equal(read_rows(out), rows)


def test_the_same_folder_with_other_weights_is_noticed(
    embed: Callable[..., Result], other_sd3: Path, tiny_sd3: Path, tmp_path: Path
) -> None:
    link = tmp_path / "model"
    link.symlink_to(tiny_sd3)
    assert embed(model=link).code == 0
    link.unlink()
    link.symlink_to(other_sd3)
    assert refused(embed(model=link), "was made with other weights than", "has now: add --overwrite")


def test_overwrite_drops_the_old_prompts(embed: Callable[..., Result], out: Path, encoded: list[list[str]]) -> None:
    embed("--class_prompt", "a robot")
    encoded.clear()
    embed("--overwrite")
    assert encoded == [[PROMPT, ""]]
    assert list(read_rows(out)) == [PROMPT, ""]


def test_another_format_is_refused(embed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    embed()
    provenance = ModelFiles.provenance
    monkeypatch.setattr(ModelFiles, "provenance", lambda *args: replace(provenance(*args), format_version=2))
    assert refused(embed(), "was made with file format 1, not 2: add --overwrite")


# Within a budget


@pytest.fixture
def streamed_gib(tiny_sd3: Path) -> float:
    """What just fits the encoders one block at a time: CUDA's 0.75 GiB, a margin of 0.08, and little else."""
    plan = TextEncoderPlan("fp32", True, 20, torch.device("cpu"))
    files = ModelFiles(ModelConfig(str(tiny_sd3)))
    return 0.75 + (encoder_bytes(files, plan) + working_bytes(files, plan) + 1000) / GIB


def test_a_budget_too_small_for_t5_streams_all_encoders_to_the_same_numbers(
    embed: Callable[..., Result], out: Path, tmp_path: Path, streamed_gib: float
) -> None:
    assert embed("--t5_precision", "fp32").code == 0
    assert json.loads(out.with_suffix(".json").read_text())["predicted_bytes"] == 0
    expected = read_rows(out)
    assert embed("--overwrite", "--vram_budget_gib", 2).code == 0
    out.rename(tmp_path / "resident.parquet")
    assert bit_equal(read_rows(tmp_path / "resident.parquet"), expected)
    result = embed("--vram_budget_gib", streamed_gib)
    assert result.code == 0
    assert (
        "T5 in fp32, one block at a time: CUDA 0.75 + text encoder 0.00 + working memory 0.08 = 0.83 GiB" in result.out
    )
    assert "peak: predicted 0.83 GiB, not measured: no GPU" in result.out
    saved = json.loads(out.with_suffix(".json").read_text())
    assert saved["predicted_bytes"] == pytest.approx(streamed_gib * GIB, abs=2000)
    assert saved["measured_bytes"] == 0
    assert saved["flags"]["vram_budget_gib"] == streamed_gib
    assert bit_equal(read_rows(out), expected)


def test_a_budget_that_nothing_fits_is_one_sentence(embed: Callable[..., Result], out: Path) -> None:
    result = embed("--vram_budget_gib", 0.8)
    assert refused(
        result, "one block at a time, 1 prompt at a time needs at least 0.83 GiB: type --vram_budget_gib 0.83"
    )
    assert not out.exists()


def test_a_plan_loads_and_writes_nothing(
    embed: Callable[..., Result], tmp_path: Path, streamed_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("an encoder is loaded")

    for name in ("load_clip", "load_t5", "encode_t5_streamed"):
        monkeypatch.setattr(text_encoders, name, load)
    monkeypatch.setattr(DeviceBudget, "cap", load)
    result = embed("--plan", "--output_path", tmp_path / "folder" / "out.parquet")
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("T5 in fp32: CUDA 0.75 + text encoder 0.0")
    assert "one block at a time: CUDA 0.75" in embed("--plan", "--vram_budget_gib", streamed_gib).out
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


def test_the_allocator_is_capped_before_anything_is_loaded(
    embed: Callable[..., Result], encoded: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capped: list[tuple[int, int]] = []
    monkeypatch.setattr(DeviceBudget, "cap", lambda self: capped.append((self.total_bytes, len(encoded))))
    assert embed("--vram_budget_gib", 2).code == 0
    assert capped == [(2 * GIB, 0)]
