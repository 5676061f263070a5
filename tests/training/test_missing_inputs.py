"""A second subject among the files of the first: all that stands in its way is told at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import TRAINING_SCRIPT, Result, save_pictures
from training_runs import Script

SHORT = ["--max_train_steps", 1, "--report_to", "none"]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture
def words(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]) -> list[object]:
    """The flags of a training on a dog in the current folder, which has been carried out there."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("dog", "cat")):
        save_pictures(Path(name), [(64, 64)] * 2, seed=seed)
    return ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu", *SHORT]


def subject(name: str) -> list[object]:
    return ["--instance_data_dir", name, "--instance_prompt", f"a photo of sks {name}"]


def stopped(script: Script, *words: object) -> str:
    """The one sentence of a command that is refused."""
    result = script(TRAINING_SCRIPT, *words)
    assert result.code == 2, result.out
    assert result.err.count("error: ") == 1
    return result.err


def follow(script: Script, sentence: str) -> list[Result]:
    """Types all commands of a sentence."""
    commands = [shlex.split(typed) for typed in re.findall("`python ([^`]*)`", sentence)]
    results = [script(name.removesuffix(".py"), *words) for name, *words in commands]
    assert [result.code for result in results] == [0] * len(results)
    return results


@pytest.mark.parametrize("resumes", [True, False])
def test_a_second_subject_stops_once(script: Script, words: list[object], resumes: bool) -> None:
    """Whether it is resumed, as the README's command is, or not; what is said is enough to go on."""
    again = LATEST if resumes else []
    assert script(TRAINING_SCRIPT, *words, *subject("dog"), *LATEST, "--output_dir", "lora").code == 0
    cat = [*words, *subject("cat"), *again, "--validation_prompt", "a sks cat at sea"]
    cat += ["--validation_steps", 1, "--validation_num_steps", 1]
    sentence = stopped(script, *cat, "--output_dir", "lora")
    of_lora = "/checkpoint-1 was trained on other pictures" if resumes else " holds checkpoint-1 of an earlier run"
    assert "sample_embeddings.parquet lacks 'a sks cat at sea' and 1 more prompt, latents lacks cat/00.png" in sentence
    assert f", and lora{of_lora}: type `python compute_embeddings.py " in sentence
    assert sentence.strip().endswith("`, then give another --output_dir")
    assert len(follow(script, sentence)) == 2
    assert script(TRAINING_SCRIPT, *cat, "--output_dir", "lora2").code == 0


def test_with_places_of_its_own_but_for_the_output_folder(script: Script, words: list[object]) -> None:
    assert script(TRAINING_SCRIPT, *words, *subject("dog"), *LATEST, "--output_dir", "lora").code == 0
    own = ["--data_df_path", "cat.parquet", "--latents_path", "cats"]
    sentence = stopped(script, *words, *subject("cat"), *LATEST, *own, "--output_dir", "lora")
    assert "cat.parquet is not there, and lora/checkpoint-1 was trained on other pictures: type `python " in sentence
    follow(script, sentence)
    assert script(TRAINING_SCRIPT, *words, *subject("cat"), *LATEST, *own, "--output_dir", "lora2").code == 0


def test_stage_one_is_not_run_for_a_folder_of_another_run(
    script: Script, words: list[object], in_process: list[str]
) -> None:
    """Minutes at full size, before the same is said."""
    assert script(TRAINING_SCRIPT, *words, *subject("dog"), *LATEST, "--output_dir", "lora").code == 0
    Path("sample_embeddings.parquet").unlink()
    in_process.clear()
    sentence = stopped(script, *words, *subject("cat"), *LATEST, "--output_dir", "lora")
    assert "latents lacks cat/00.png and 1 more picture, and lora/checkpoint-1 was trained on other" in sentence
    assert in_process == []


def test_a_photo_that_came_later(script: Script, words: list[object]) -> None:
    """To go on with the run it must be taken out, so nobody is sent to encode it first and told that afterwards."""
    assert script(TRAINING_SCRIPT, *words, *subject("dog"), *LATEST, "--output_dir", "lora").code == 0
    (new,) = save_pictures(Path("more"), [(64, 64)], seed=9)
    new.rename("dog/new.png")
    sentence = stopped(script, *words, *subject("dog"), *LATEST, "--output_dir", "lora")
    assert "latents lacks dog/new.png, and lora/checkpoint-1 was trained without dog/new.png: type `" in sentence
    assert "then give another --output_dir; or take out what was added, and go on" in sentence
    alone = stopped(script, *words, *subject("dog"), "--output_dir", "lora2")
    assert "latents has no latents of new.png (a new or changed picture): type `python precompute" in alone
