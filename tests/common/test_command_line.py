"""Flags, sentences and atomic writes."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

from sd3_lora.common.command_line import (
    UserError,
    command,
    exit_code,
    parse_flags,
    read_text_lines,
    require_writable_folder,
    write_text_atomically,
)

import pytest
import torch


@dataclass(frozen=True)
class Flags:
    steps: int = field(default=1, metadata={"help": "Steps."})
    names: list[str] = field(default_factory=list, metadata={"action": "extend"})
    on: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("--steps must be at least 1")


def parse(*words: str) -> Flags:
    (flags,) = parse_flags((Flags,), words, "script.py", "A script.", {"push_to_hub": "type `hf upload`"})
    return flags


def test_values_and_repeated_lists() -> None:
    flags = parse("--names", "a", "--names", "b", "c", "--on", "--steps", "3")
    assert flags == Flags(3, ["a", "b", "c"], True)
    assert parse("--steps=2", "--on", "no") == Flags(2, [], False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stepz", "1"], "unknown argument --stepz: `python script.py --help` lists the flags"),
        (["--step", "1"], "unknown argument --step: "),  # no abbreviations: a new flag must not change their meaning
        (["--steps", "many"], "argument --steps: invalid int value: 'many': "),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--push_to_hub"], "--push_to_hub is not part of script.py: type `hf upload`"),
        (["--push-to-hub=yes"], "--push_to_hub is not part of script.py: type `hf upload`"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_bad_flags_are_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*words)
    assert str(error.value).startswith(sentence)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: object) -> None:
        raise UserError("no such thing: type that")

    def fills_the_disk(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    def outgrows(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    assert exit_code(lambda _: None, None) == 0
    assert exit_code(outgrows, None, "--batch_size 1") == 2
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2.00 GiB: try --batch_size 1\n"
    assert exit_code(fails, None) == 2
    assert capsys.readouterr().err == "error: no such thing: type that\n"
    assert exit_code(fills_the_disk, None) == 2
    assert capsys.readouterr().err == "error: the disk is full: free some space and type the same command again\n"
    assert exit_code(interrupted, None) == 130
    assert "type" not in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        exit_code(lambda _: 1 / 0, None)


def test_a_command_is_typed_as_the_shell_reads_it() -> None:
    words = {"lora": "my lora", "prompt": "it's", "on": True, "off": False, "none": None, "steps": 0}
    assert command("a.py", **words) == """python a.py --lora 'my lora' --prompt 'it'"'"'s' --on --steps 0"""


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    require_writable_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        require_writable_folder(tmp_path / "file" / "folder")


def test_text_is_read_kindly(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein grüner Hund\r\n\r\n  a cat \r\n".encode())
    assert read_text_lines(path) == ["ein grüner Hund", "a cat"]
    path.write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_text_lines(path)
    with pytest.raises(UserError, match="cannot read"):
        read_text_lines(tmp_path / "missing")


def test_an_atomic_write_leaves_the_old_text_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(OSError, match="cut off"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
