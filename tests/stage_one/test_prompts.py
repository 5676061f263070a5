"""Prompts before they are encoded: the file, the identifier, the words that T5 lacks."""

from __future__ import annotations

import importlib
from pathlib import Path

from sd3_lora.common.command_line import UserError, split_prompt
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.prompts import identifier_of, read_prompts, unknown_note, unknown_words, with_subject

import pytest
from conftest import PROJECT


def test_a_prompt_a_line_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "# for the\u2028robot\r\na #1 robot\u2028in a forest\r\n\r\n  #off\r\na robot -- at sea --\n".encode()
    )
    assert read_prompts(path) == ["a #1 robot\u2028in a forest", "a robot -- at sea --"]
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match=r"prompts\.txt holds no prompt"):
        read_prompts(path)


def test_the_prior_prompts_that_ship() -> None:
    """Of anything but a subject's identifier; as many as docs/prior.md says."""
    prompts = read_prompts(PROJECT / "examples" / "prompts" / "prior.txt")
    assert f"`examples/prompts/prior.txt` has {len(prompts)}" in (PROJECT / "docs" / "prior.md").read_text("utf-8")
    assert len(set(prompts)) == len(prompts)
    assert not any("{" in prompt or "sks" in prompt for prompt in prompts)


def test_the_options_of_sd_scripts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a robot --w 512 --h 768 --d 1\na robot\na dog --n blurry --am 0.5")
    with pytest.raises(UserError) as error:
        read_prompts(path)
    first, robot, dog = str(error.value).splitlines()
    assert first == "2 things are wrong with prompts.txt:"
    said = f"  {path} has --w, --h, --d behind 'a robot': delete the options; inference.py takes "
    assert robot == said + "--width, --height, --seed for all prompts"
    said = f"  {path} has --n, --am behind 'a dog': delete the options; inference.py takes "
    assert dog == said + "--negative_prompt for all prompts"


def test_the_subject_stands_in_its_place() -> None:
    assert with_subject(["a {}", "{} and {}", "a forest"], "sks dog") == [
        "a sks dog",
        "sks dog and sks dog",
        "a forest",
    ]
    assert with_subject(["a {x} {y}"], None) == ["a {x} {y}"]
    with pytest.raises(UserError, match=r"^'a {}' has {} in place of the subject: add --subject"):
        with_subject(["a forest", "a {}"], None)
    with pytest.raises(UserError, match=r"^--subject changes nothing, since no prompt has {}: leave it out$"):
        with_subject(["a forest"], "sks dog")


def test_a_word_in_brackets_is_the_identifier(miniature_files: ModelFiles) -> None:
    for word in ("[V]", "<sks-dog>", "{x}"):
        lines = identifier_of(miniature_files, f"a photo of {word}, a dog", "a photo of a dog")
        assert lines[0].startswith(f"identifier {word!r} → CLIP: {word[0]}")
        assert lines[-1] == f"note: the brackets of {word!r} are part of the word, in training and in drawing"
    assert identifier_of(miniature_files, "a photo of sks dog", None)[0].startswith("identifier 'sks' → ")
    assert identifier_of(miniature_files, "", None) == []


def test_words_that_t5_lacks_are_named(miniature_files: ModelFiles) -> None:
    prompts = ["фото собаки", "photo of 🤖 dog", "日本語の犬", "a photo of sks dog, at sea", "", "фото sks"]
    words = unknown_words(miniature_files, prompts)
    assert words == ["фото", "собаки", "🤖", "日本語の犬"]
    note = unknown_note(words) or ""
    assert note.startswith("note: T5's vocabulary lacks фото, собаки, 🤖, 日本語の犬: it reads <unk> there")
    assert unknown_note([]) is None
    assert unknown_words(miniature_files, []) == []


@pytest.mark.parametrize("prompts", [["'a", "photo", "of", "sks", "dog'"], ["a", "photo", "of", "sks", "dog"]])
def test_a_prompt_that_the_shell_has_split(prompts: list[str]) -> None:
    (fault,) = split_prompt("prompt", prompts)
    assert fault == (f'--prompt has 5 prompts, of which the first is {prompts[0]}: type --prompt "a photo of sks dog"')


@pytest.mark.parametrize(("script", "flag"), [("inference", "prompt"), ("compute_embeddings", "validation_prompt")])
def test_both_scripts_ask_what_was_meant(script: str, flag: str) -> None:
    with pytest.raises(UserError, match=f'--{flag} has 4 prompts, .*: type --{flag} "a photo of dog"'):
        importlib.import_module(script).COMMAND_LINE.parse([f"--{flag}", "'a", "photo", "of", "dog'"])


@pytest.mark.parametrize(
    "prompts", [[], ["a dog"], ["cat", "dog", "bird"], ["a dog", "a cat"], ["'90s dog", "a cat"], ["dog", "a"]]
)
def test_prompts_that_are_meant(prompts: list[str]) -> None:
    assert list(split_prompt("prompt", prompts)) == []
