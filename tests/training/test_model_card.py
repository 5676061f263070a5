"""The model card: the right licence, valid metadata, and no folder of this machine."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.config import groups_of
from sd3_lora.common.run_record import NotedPicture, RunFacts, RunIdentity, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.gallery import find_pictures
from sd3_lora.training.hub_folder import make_hub_folder, public_record
from sd3_lora.training.model_card import NOTICE, licence_of, write_model_card

import pytest
from hub_server import card_data
from huggingface_hub import ModelCard
from PIL import Image
from training_runs import training_script

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
FACTS = RunFacts(SD3, "a" * 40, {"torch": "2"}, "fp16", prompts=("a dog",), trigger="a dog", resolution=1024, seed=0)
RESULTS = RunResults("x", [StageReport("train", 300.0, 4.0, 5.0, 2.0)], 5 * 1024**3, 500, 600.0, {}, 0.5, 0)


def card(folder: Path, facts: RunFacts = FACTS, *words: str, prompts: tuple[str, ...] = ("a dog",)) -> str:
    flags = TrainingFlags(*training_script().COMMAND_LINE.parse(words))
    pictures = [NotedPicture(str(n), "secret-name.jpg", prompt, ()) for n, prompt in enumerate(prompts)]
    identity = RunIdentity({"--lora_alpha": 4.0}, pictures=pictures)
    write_model_card(folder / "README.md", RunRecord(groups_of(flags), facts, identity), RESULTS)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "model", [SD3, "stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"]
)
def test_stabilitys_licence(tmp_path: Path, model: str) -> None:
    text = card(tmp_path, replace(FACTS, model=model))
    data = card_data(text)
    assert (data["license"], data["license_name"]) == ("other", "stabilityai-ai-community")
    assert data["license_link"] == "https://stability.ai/license"
    assert (data["base_model"], data["base_model_relation"]) == (model, "adapter")
    assert NOTICE in text
    assert "Powered by Stability AI" in text
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    folder = make_hub_folder(tmp_path, "alice/dog")
    assert (folder / "NOTICE").read_text(encoding="utf-8") == NOTICE + "\n"


FOLDERS: list[tuple[str | None, dict[str, str]]] = [
    (None, {}),
    ("no metadata", {}),
    ("---\n[\n---\n", {}),
    ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
    (
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
        {"license": "other", "license_name": "mine"},
    ),
    (
        "---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\n---\n",
        licence_of(SD3),
    ),
]


@pytest.mark.parametrize(("text", "licence"), FOLDERS)
def test_a_folders_licence_is_that_of_its_card(
    tmp_path: Path, text: str | None, licence: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    monitored = logging.getLogger("huggingface_hub")
    monitored.addHandler(caplog.handler)
    (tmp_path / "model").mkdir()
    if text is not None:
        (tmp_path / "model/README.md").write_text(text)
    assert licence_of(str(tmp_path / "model")) == licence
    written = card(tmp_path, replace(FACTS, model=str(tmp_path / "model"), revision=None))
    assert str(tmp_path) not in written
    assert 'from_pretrained("model", ' in written
    assert "base_model" not in card_data(written)  # the hub would look for a model of that name
    assert card_data(written).get("license") == licence.get("license")
    monitored.removeHandler(caplog.handler)
    assert caplog.records == []  # no line of the library's among the trainer's


def test_the_miniatures_licence() -> None:
    assert licence_of("miniature") == {"license": "mit"}


@pytest.mark.parametrize(
    "prompt",
    ["a: dog", '"sks" dog # 1', "sks `dog` | cat", "- [a](b)\n---\ndog", "d\u00f6g \u72ac", "{sks} 'dog'", "---"],
)
def test_any_prompt_can_stand_in_it(tmp_path: Path, prompt: str) -> None:
    text = card(tmp_path, replace(FACTS, trigger=prompt, prompts=(prompt,)), prompts=(prompt,))
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict()["instance_prompt"] == prompt
    assert text.count("\n# ") == 1
    assert len([line for line in text.splitlines() if line.startswith("| captions")]) == 1


def test_what_it_says(tmp_path: Path) -> None:
    words = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", "/home/me/dogs")
    more = ("--caption_dropout", "0.1", "--gradient_accumulation_steps", "4", "--output_dir", "/home/me/out")
    prompts = ("sks dog at sea", "sks dog at home", "a dog", "a dog")
    facts = replace(FACTS, trigger=prompts[0], prompts=prompts[:2])
    text = card(tmp_path, facts, *words, *more, prompts=prompts)
    assert "[Stable Diffusion 3 Medium](https://huggingface.co/" in text
    for row in (
        "| pictures | 2, at 1024 px |",
        "| optimizer | AdamW, learning rate 0.0001, constant |",
        "| captions | 2 different ones, written for the pictures, dropped with a chance of 0.1 |",
        "| steps | 500, of 4 pictures each |",
        "| time | 600 ms a step, about 5 min in all |",
        "| peak GPU memory | 5.00 GiB",
        "| `--class_prompt` | `a dog` |",
    ):
        assert row in text
    assert "/home/me" not in text
    assert "secret-name" not in text
    assert "<Gallery />" not in text


def test_only_whole_pictures_of_the_last_step(tmp_path: Path) -> None:
    for step in (50, 100, 150):
        (tmp_path / f"samples/step_{step:06d}").mkdir(parents=True)
    assert find_pictures(tmp_path) == []
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    (tmp_path / "samples/step_000050/a.png").write_bytes(png.getvalue())
    (tmp_path / "samples/step_000100/a.png").write_bytes(png.getvalue())
    (tmp_path / "samples/step_000150/a.png").write_bytes(png.getvalue()[:40])
    (found,) = find_pictures(tmp_path)
    assert (found.path.parent.name, found.prompt) == ("step_000100", "")


RECORD: dict[str, Any] = {
    "flags": {"pretrained_model_name_or_path": "org/sd3", "instance_data_dir": "../me/dog", "hub_token": "***"},
    "model": "org/sd3",
    "revision": "a",
    "prompts": ["a /b/ c", "~dog"],
    "stages": [{"name": "/home/me/x"}, {"name": "C:\\me\\y"}],
}


def test_the_public_record() -> None:
    public = public_record(RECORD)
    assert public["flags"] == {"pretrained_model_name_or_path": "org/sd3", "instance_data_dir": "dog"}
    assert (public["model"], public["stages"], public["prompts"]) == (
        "org/sd3",
        [{"name": "x"}, {"name": "y"}],
        RECORD["prompts"],
    )
    assert public_record({**RECORD, "revision": None})["model"] == "sd3"
