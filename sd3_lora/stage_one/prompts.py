"""Prompts before they are encoded: read from a file, the subject put in, and what their words are to the tokenizers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import MOST_SHOWN, UserError, all_of, read_text_lines, shown
from sd3_lora.common.model_files import ModelFiles

# What may follow a prompt in a file for sd-scripts, and the flag of inference.py for all prompts.
_SD_SCRIPTS_OPTIONS = {
    "d": "--seed",
    "g": "--guidance",
    "h": "--height",
    "l": "--guidance",
    "n": "--negative_prompt",
    "s": "--num_steps",
    "w": "--width",
}
_OPTION = re.compile(r"(?:^|\s)--([a-z]{1,3})(?=\s|$)")
SUBJECT_PLACE = "{}"
_IN_BRACKETS = re.compile(r"\[[^\s\]]+\]|<[^\s>]+>|\{[^\s}]+\}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; a line that begins with # is a comment.

    Raises:
        UserError: the file cannot be read, holds no prompt, or has options behind a prompt, as sd-scripts reads them.
    """
    prompts = [line for line in read_text_lines(path) if not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one into each line")
    faults = []
    for prompt in prompts:
        options = _OPTION.findall(prompt)
        if options:
            flags = dict.fromkeys(_SD_SCRIPTS_OPTIONS[name] for name in options if name in _SD_SCRIPTS_OPTIONS)
            instead = f"; inference.py takes {', '.join(flags)} for all prompts" if flags else ""
            found = ", ".join(f"--{name}" for name in dict.fromkeys(options))
            faults.append(f"{path} has {found} behind {_OPTION.split(prompt)[0]!r}: delete the options{instead}")
    if faults:
        raise UserError(all_of(faults, path.name, MOST_SHOWN))
    return prompts


def with_subject(prompts: Sequence[str], subject: str | None) -> list[str]:
    """The prompts, with the subject in place of each `{}`.

    Args:
        prompts: with places or without.
        subject: `--subject`, such as "sks dog".

    Raises:
        UserError: a prompt has a place, and there is no subject; or the other way round.

    >>> with_subject(["a photo of {} in the snow", "a forest"], "sks dog")
    ['a photo of sks dog in the snow', 'a forest']
    """
    first = next((prompt for prompt in prompts if SUBJECT_PLACE in prompt), None)
    if subject is None and first is not None:
        raise UserError(
            f'{first!r} has {SUBJECT_PLACE} in place of the subject: add --subject "sks dog", or what it is'
        )
    if subject is not None and first is None:
        raise UserError(f"--subject changes nothing, since no prompt has {SUBJECT_PLACE}: leave it out")
    return [prompt.replace(SUBJECT_PLACE, subject or "") for prompt in prompts]


def identifier_of(files: ModelFiles, prompt: str, class_prompt: str | None) -> list[str]:
    """The lines to print about the word that stands for the subject; none for an empty prompt.

    A word in brackets (`[V]`, as papers write "a rare word") is the identifier as it stands, brackets included.
    """
    from sd3_lora.stage_one.text_encoders import (  # imports all of transformers' encoders, as below
        IdentifierReport,
        clip_tokenizers,
        report_identifier,
        t5_tokenizer,
    )

    in_brackets = _IN_BRACKETS.search(prompt)
    if not in_brackets:
        report = report_identifier(files, prompt, class_prompt)
        return report.sentences() if report else []
    word = in_brackets[0]
    clip, t5 = clip_tokenizers(files)[0], t5_tokenizer(files)
    pieces = {"CLIP": clip.tokenize(word), "T5": t5.tokenize(word)}
    note = f"note: the brackets of {word!r} are part of the word, in training and in drawing"
    return [*IdentifierReport(word, pieces, is_common=False).sentences(), note]


def unknown_words(files: ModelFiles, prompts: Iterable[str]) -> list[str]:
    """The words that T5's vocabulary lacks in whole or in part, in the prompts' order: T5 reads <unk> there."""
    words = list(dict.fromkeys(word for prompt in prompts for word in prompt.split()))
    if not words:
        return []
    from sd3_lora.stage_one.text_encoders import t5_tokenizer

    tokenizer = t5_tokenizer(files)
    ids = tokenizer(words, add_special_tokens=False).input_ids
    return [word for word, tokens in zip(words, ids, strict=True) if tokenizer.unk_token_id in tokens]


def unknown_note(words: list[str]) -> str | None:
    """The line to print about words that T5 does not know; None where there are none."""
    if not words:
        return None
    return (
        f"note: T5's vocabulary lacks {shown(words)}: it reads <unk> there, and the CLIPs "
        "alone see the word; English words in Latin letters are read by all three"
    )


@dataclass(frozen=True)
class PromptTokens:
    """What the tokenizers make of a prompt.

    Attributes:
        clip: the pieces that CLIP reads, without the marks of beginning and end.
        clip_count: CLIP's tokens, these marks included.
        clip_limit: how many of these are read.
        t5_count: T5's tokens, its end mark included.
    """

    clip: tuple[str, ...]
    clip_count: int
    clip_limit: int
    t5_count: int


def tokens_of(files: ModelFiles, prompts: Sequence[str]) -> list[PromptTokens]:
    """The tokens of each prompt, before any is cut off.

    Raises:
        UserError: the model has no tokenizers, or they are not here.
    """
    from sd3_lora.stage_one.text_encoders import clip_tokenizers, t5_tokenizer

    clip, t5 = clip_tokenizers(files)[0], t5_tokenizer(files)
    limit = files.clip_tokens()
    return [
        PromptTokens(
            tuple(clip.tokenize(prompt)),
            len(clip(prompt).input_ids),
            limit,
            len(t5(prompt, truncation=False).input_ids),
        )
        for prompt in prompts
    ]
