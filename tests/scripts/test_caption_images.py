"""Captions written by a tiny model of random weights: where there were none, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import caption_images
from sd3_lora.stage_one.captions import read_captions
from sd3_lora.stage_one.config import CaptioningConfig
from sd3_lora.stage_one.images import open_rgb

import pytest
import torch
from conftest import PROJECT
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import Script
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS += ["a", "photo", "of", "the", "dog", "cat", "robot", "on", "grass", "red"]
ROBOTS = PROJECT / "examples" / "robot"


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP with 17 words."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), bos_token="[DEC]")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = BlipTextConfig(vocab_size=len(WORDS), encoder_hidden_size=32, projection_dim=32, **shared, **ids)
    vision = BlipVisionConfig(image_size=32, patch_size=16, **shared)
    torch.manual_seed(3)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three: the first with a caption beside it, the second with a row in metadata.jsonl."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, side in enumerate((40, 50, 60)):
        Image.new("RGB", (side, 40), (80 * number, 0, 255 - 80 * number)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("mine")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "mine too"}) + "\n")
    return folder


def flags(folder: Path, captioner: Path) -> list[object]:
    return ["--instance_data_dir", folder, "--caption_model", captioner, "--device", "cpu", "--max_new_tokens", 5]


def test_a_caption_where_there_was_none(script: Script, pictures: Path, captioner: Path) -> None:
    """The model's own words, between prefix and suffix; a second run finds nothing to do."""
    more = ["--caption_prefix", "sks dog, ", "--caption_suffix", "."]
    run = script("caption_images", *flags(pictures, captioner), *more)
    assert run.code == 0
    assert "3 pictures in" in run.out
    config = CaptioningConfig(caption_model=str(captioner), max_new_tokens=5)
    model, processor = caption_images.load_captioner(config, torch.device("cpu"))
    (words,) = caption_images.caption(model, processor, [open_rgb(pictures / "2.png")], config)
    assert set(words.split()) <= set(WORDS)
    assert (pictures / "2.txt").read_text() == f"sks dog, {words}.\n"
    assert sorted(path.name for path in pictures.glob("*.txt")) == ["0.txt", "2.txt"]
    assert (pictures / "0.txt").read_text() == "mine"
    again = script("caption_images", *flags(pictures, captioner))
    assert (again.code, "wrote 0 captions" in again.out) == (0, True)
    images = sorted(pictures.glob("*.png"))
    assert read_captions(pictures, images)[images[2]] == (f"sks dog, {words}.",)


def test_pictures_of_one_name_get_captions_of_their_own(script: Script, tmp_path: Path, captioner: Path) -> None:
    for name, color in (("a.png", (255, 0, 0)), ("a.jpg", (0, 0, 255))):
        Image.new("RGB", (40, 40), color).save(tmp_path / name)
    assert script("caption_images", *flags(tmp_path, captioner), "--caption_prefix", "a dog ").code == 0
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["a.jpg.txt", "a.png.txt"]


def test_a_caption_is_not_taken_for_another_picture_of_the_same_name(
    script: Script, tmp_path: Path, captioner: Path
) -> None:
    """a.txt would be read for a.jpg too, which has a caption of its own."""
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "a.jpg.txt").write_text("mine")
    assert script("caption_images", *flags(tmp_path, captioner), "--caption_prefix", "a dog ").code == 0
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["a.jpg.txt", "a.png.txt"]
    assert (tmp_path / "a.jpg.txt").read_text() == "mine"


def test_subfolders_and_the_longest_caption(script: Script, tmp_path: Path, captioner: Path) -> None:
    """Both by their flags."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "more/b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    words = [*flags(tmp_path, captioner), "--caption_prefix", "a dog "]
    assert script("caption_images", *words).code == 0
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["a.txt"]
    assert script("caption_images", *words, "--recursive").code == 0
    assert (tmp_path / "more" / "b.txt").is_file()
    pictures, lengths = [open_rgb(tmp_path / "a.png")], []
    for most in (1, 20):
        config = CaptioningConfig(caption_model=str(captioner), max_new_tokens=most)
        model, processor = caption_images.load_captioner(config, torch.device("cpu"))
        generate = model.generate
        model.generate = lambda generate=generate, **given: lengths.append(given["max_new_tokens"]) or generate(**given)
        caption_images.caption(model, processor, pictures, config)
    assert lengths == [1, 20]


def test_an_answer_without_words_is_no_caption(
    script: Script, pictures: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage one would stop at an empty file."""
    monkeypatch.setattr(caption_images, "caption", lambda *_: [""])
    run = script("caption_images", *flags(pictures, captioner))
    assert run.code == 0
    assert "wrote 0 captions" in run.out
    assert "note: the model has no words for 2.png: write these captions yourself" in run.out
    assert not (pictures / "2.txt").exists()


def test_fewer_pictures_at_a_time_where_memory_runs_out(
    script: Script, tmp_path: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is captioned once; where not even one fits, the error says what to type."""
    for number in range(5):
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    sizes: list[int] = []
    most = 2

    def caption(model: object, processor: object, batch: list[Image.Image], config: object) -> list[str]:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [f"red {picture.getpixel((0, 0))[0]}" for picture in batch]

    monkeypatch.setattr(caption_images, "caption", caption)
    assert script("caption_images", *flags(tmp_path, captioner), "--caption_batch_size", 8).code == 0
    assert sizes == [5, 4, 2, 2, 1]
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(5)] == [f"red {50 * n}\n" for n in range(5)]
    most = 0
    (tmp_path / "0.txt").unlink()
    failed = script("caption_images", *flags(tmp_path, captioner))
    assert failed.code == 2
    assert "--caption_batch_size 1" in failed.err


def test_a_florence_model_answers_its_task() -> None:
    """Within marks that its processor takes away."""

    class Inputs(dict):
        def to(self, _: object) -> Inputs:
            return self

    class Processor:
        def __call__(self, images: list[Image.Image], text: list[str], return_tensors: str) -> Inputs:
            assert text == ["<CAPTION>"] * len(images)
            return Inputs(pixel_values=torch.zeros(len(images)))

        def batch_decode(self, ids: list[str], skip_special_tokens: bool) -> list[str]:
            assert not skip_special_tokens
            return ids

        def post_process_generation(self, answer: str, task: str, image_size: tuple[int, int]) -> dict[str, str]:
            return {task: f"{answer.removeprefix('<s>')}, {image_size[0]} wide"}

    model = SimpleNamespace(device="cpu", dtype=torch.float32, generate=lambda **_: ["<s>a dog", "<s>a  cat"])
    pictures = [Image.new("RGB", (side, 40)) for side in (40, 50)]
    config = CaptioningConfig(caption_task="<CAPTION>")
    assert caption_images.caption(model, Processor(), pictures, config) == ["a dog, 40 wide", "a cat, 50 wide"]


def test_bad_input_is_one_sentence(script: Script, pictures: Path, captioner: Path, tmp_path: Path) -> None:
    """And writes nothing; a picture that does not decode is named when the others are done."""
    for words, reason in (
        ([], "which pictures? Type --instance_data_dir"),
        (["--instance_data_dir", tmp_path / "none"], "there is no folder"),
        ([*flags(pictures, tmp_path / "none")], "--caption_model: there is no"),
        ([*flags(pictures, ROBOTS)], f"--caption_model {ROBOTS} cannot be loaded"),
        ([*flags(pictures, captioner), "--caption_batch_size", 0], "--caption_batch_size 0 must be at least 1"),
    ):
        run = script("caption_images", *words)
        assert run.code == 2
        assert reason in run.err
        assert len(run.err.strip().splitlines()) == 1
    assert not (pictures / "2.txt").exists()
    (pictures / "3.png").write_bytes((ROBOTS / "01.png").read_bytes()[:200])
    run = script("caption_images", *flags(pictures, captioner), "--caption_prefix", "a dog ")
    assert run.code == 2
    assert "1 broken picture (" in run.err
    assert (pictures / "2.txt").exists()


def test_a_plan_writes_nothing(script: Script, pictures: Path, captioner: Path) -> None:
    run = script("caption_images", *flags(pictures, captioner), "--plan")
    assert (run.code, "1 caption to write" in run.out) == (0, True)
    assert not (pictures / "2.txt").exists()


@pytest.mark.parametrize("fault", ["tensor missing", "shard missing", "wrong shape", "cut short", "tensor too many"])
def test_a_captioner_that_is_not_whole(
    script: Script, pictures: Path, captioner: Path, tmp_path: Path, fault: str
) -> None:
    """transformers would draw at random what is missing, and says so in a warning."""
    name, folder = "vision_model.encoder.layers.1.mlp.fc1.weight", Path(shutil.copytree(captioner, tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if fault == "tensor missing":
        del tensors[name]
    elif fault == "wrong shape":
        tensors[name] = torch.zeros(3, 5)
    elif fault == "tensor too many":
        tensors["vision_model.encoder.layers.9.mlp.fc1.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, {"format": "pt"})
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    if fault == "shard missing":
        path.unlink()
        BlipForConditionalGeneration.from_pretrained(captioner).save_pretrained(folder, max_shard_size="20KB")
        (first, *_) = sorted(folder.glob("model-*.safetensors"))
        first.unlink()
    result = script("caption_images", *flags(pictures, folder))
    named = f"--caption_model {folder} "
    if fault == "tensor too many":
        assert result.code == 0
        assert f"note: {named}holds vision_model.encoder.layers.9.mlp.fc1.weight, which it does not use" in result.out
        return
    assert result.code == 2
    assert f"error: {named}{'lacks ' + name if fault == 'tensor missing' else 'cannot be loaded ('}" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (pictures / "2.txt").exists()


def test_a_captioner_with_code_in_its_folder_runs_none(
    script: Script, pictures: Path, captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does transformers ask on the terminal whether it may."""
    folder = Path(shutil.copytree(captioner, tmp_path / "model"))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Captioner: pass\nclass Settings: pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "no_such_kind", "auto_map": {"AutoConfig": "code.Settings", "AutoModel": "code.Captioner"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked"))
    result = script("caption_images", *flags(pictures, folder))
    assert result.code == 2
    assert f"error: --caption_model {folder} cannot be loaded (" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
