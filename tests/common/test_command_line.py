"""Flags, sentences and atomic writes."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from sd3_lora.common.command_line import (
    OTHER_NAMES,
    PATH_FLAGS,
    CommandLine,
    HarmlessFlag,
    Interrupted,
    Secret,
    UserError,
    command,
    command_again,
    command_words,
    counted,
    exit_code,
    forget_secrets,
    host_memory_fault,
    read_text_lines,
    require_right,
    require_writable_folder,
    write_text_atomically,
)
from sd3_lora.common.defaults import LORA_FOLDER
from sd3_lora.common.short_help import MOST_LINES, SHORT_HELP, WIDTH

import pytest
import torch
from conftest import PROJECT

SCRIPTS = ("compute_embeddings", "precompute_latents", "train_dreambooth_sd3_lora_miniature", "inference")
COMMANDS = ("sd3_lora.convert", "sd3_lora.export", "sd3_lora.losses", "sd3_lora.merge")


@dataclass(frozen=True)
class Flags:
    """What to count."""

    steps: int = field(default=1, metadata={"help": "Steps."})
    names: list[str] = field(default_factory=list, metadata={"action": "extend"})
    on: bool = False

    def __post_init__(self) -> None:
        require_right(fault for fault in ("--steps must be at least 1",) if self.steps < 1)


COMMAND_LINE = CommandLine(
    "script.py",
    "A script.",
    (Flags,),
    {"push_to_hub": "type `hf upload`"},
    {
        "cache_latents": HarmlessFlag("they always are"),
        "repeats": HarmlessFlag("each comes once", takes_value=True, only="1", otherwise="leave it out"),
    },
)


def parse(*arguments: str) -> Flags:
    (flags,) = COMMAND_LINE.parse(arguments)
    return flags


def test_values_and_repeated_lists() -> None:
    flags = parse("--names", "a", "--names", "b", "c", "--on", "--steps", "3")
    assert flags == Flags(3, ["a", "b", "c"], True)
    assert parse("--steps=2", "--on", "no") == Flags(2, [], False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stepz", "1"], "unknown argument --stepz: type --steps"),
        (["--step", "1"], "unknown argument --step: "),  # no abbreviations: a new flag must not change their meaning
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--push_to_hub"], "--push_to_hub is not part of script.py: type `hf upload`"),
        (["--push-to-hub=yes"], "--push_to_hub is not part of script.py: type `hf upload`"),
        (["--push_to_hub", "yes", "--steps", "2"], "--push_to_hub is not part of script.py: type `hf upload`"),
        (["stray"], "unknown argument stray: `python script.py --help_all` lists the flags"),
        (
            ["--steps", "2", "3"],
            "unknown argument 3: put double quotes around a value of several words; `python script.py",
        ),
        (["--steps"], "argument --steps: expected one argument"),
        (["--names", "--on"], "argument --names: expected at least one argument"),
        (["--repeats"], "argument --repeats: expected one argument"),
        (["--repeats", "--on"], "argument --repeats: expected one argument"),
        (["--cfg_scale", "7"], "unknown argument --cfg_scale: `python script.py --help_all` lists the flags"),
    ],
)
def test_bad_flags_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: object) -> None:
        raise UserError("no such thing: type that")

    def fills_the_disk(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    def outgrows(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    def outgrows_the_host(_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def takes_a_file_for_damaged(_: object) -> None:
        try:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except OSError as error:
            raise UserError("a.parquet is damaged: delete it") from error

    again = "close other programs and type the same command again"
    assert exit_code(outgrows_the_host, None, "--batch_size 1") == 2
    sentence = "the host's memory ran out (1099511627776.0 MiB more were asked for)"
    assert capsys.readouterr().err == f"error: {sentence}: {again}, or try --batch_size 1\n"
    assert exit_code(takes_a_file_for_damaged, None) == 2
    assert capsys.readouterr().err == f"error: the host's memory ran out ([Errno 12] Cannot allocate memory): {again}\n"
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


def test_a_second_interruption_does_not_hide_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C once more while the script is on its way out, as where a tracker sends what is left."""

    def script(_: object) -> None:
        try:
            raise Interrupted("checkpoint-5 is kept; to go on, type `x`")
        finally:
            raise KeyboardInterrupt

    assert exit_code(script, []) == 130
    assert capsys.readouterr().err == "\ninterrupted: checkpoint-5 is kept; to go on, type `x`\n"


def test_a_command_is_typed_as_the_shell_reads_it() -> None:
    arguments = {"lora": "my lora", "prompt": "it's", "on": True, "off": False, "none": None, "steps": 0}
    assert command("a.py", **arguments) == """python a.py --lora 'my lora' --prompt 'it'"'"'s' --on --steps 0"""


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
    assert list(tmp_path.iterdir()) == [path]


# The command line as a whole


def test_a_number_with_its_noun() -> None:
    said = [counted(0, "picture"), counted(1, "class picture"), counted(2, "picture"), counted(3, "process")]
    assert said == ["0 pictures", "1 class picture", "2 pictures", "3 processes"]


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse("--stepz", "4", "--steps", "0", "--push_to_hub", "--repeats", "3", "--nonsense=1")
    assert str(error.value).splitlines() == [
        "5 things are wrong with the command line:",
        "  --push_to_hub is not part of script.py: type `hf upload`",
        "  --repeats 3 is not part of script.py: leave it out",
        "  unknown argument --stepz: type --steps",
        "  unknown argument --nonsense: `python script.py --help_all` lists the flags",
        "  --steps must be at least 1",
    ]
    with pytest.raises(UserError, match=r"^2 things .*\n  argument --steps: invalid int value: 'many'\n  unknown arg"):
        parse("--steps", "many", "--nope")
    with pytest.raises(
        UserError, match=r"^3 things .*\n  argument --steps: exp.*\n  argument --names: exp.*\n  unknown"
    ):
        parse("--steps", "--names", "--nope")


@pytest.mark.parametrize(
    ("script", "typed", "meant"),
    [
        ("compute_embeddings", "num_inference_steps", None),  # of a drawing
        ("inference", "lora_path", "lora"),
        ("inference", "steps", "num_steps"),
        ("train_dreambooth_sd3_lora_miniature", "steps", "max_train_steps"),
        ("train_dreambooth_sd3_lora_miniature", "prompt", "instance_prompt"),
        ("train_dreambooth_sd3_lora_miniature", "network_dim", "rank"),
        ("train_dreambooth_sd3_lora_miniature", "output_path", "output_dir"),
        ("train_dreambooth_sd3_lora_miniature", "guidance_scale", None),  # of a drawing: nothing near is meant
        ("precompute_latents", "output_dir", "output_path"),
        ("precompute_latents", "train_batch_size", None),
        ("compute_embeddings", "data_df_path", "output_path"),
        ("compute_embeddings", "max_token_length", "max_sequence_length"),
    ],
)
def test_the_names_of_other_trainers(script: str, typed: str, meant: str | None) -> None:
    command_line = importlib.import_module(script).COMMAND_LINE
    advice = f"type --{meant}" if meant else f"`python {script}.py --help_all` lists the flags"
    for word in (f"--{typed}", f"--{typed.replace('_', '-')}=1"):
        with pytest.raises(UserError) as error:
            command_line.parse([word])
        assert str(error.value) == f"unknown argument {word.removesuffix('=1')}: {advice}"


def test_every_other_name_is_of_some_script() -> None:
    command_lines = [importlib.import_module(script).COMMAND_LINE for script in SCRIPTS]
    flags = [{flag.name for group in line.groups for flag in fields(group)} for line in command_lines]
    for other, names in OTHER_NAMES.items():
        assert all(any(name in own for own in flags) for name in names)
        assert any(other not in own and not own.isdisjoint(names) for own in flags), other


def test_flags_of_paths_are_known() -> None:
    """By their names, so that a new one is not forgotten."""
    scripts = (*SCRIPTS, *COMMANDS)
    groups = {group for script in scripts for group in importlib.import_module(script).COMMAND_LINE.groups}
    names = {flag.name for group in groups for flag in fields(group)}
    assert names >= PATH_FLAGS
    assert {name for name in names if re.search(r"(dir|path|file)$", name)} <= PATH_FLAGS


def test_the_first_argument_may_have_a_flag() -> None:
    line = CommandLine("script.py", "A script.", (Flags,), first="steps")
    assert line.parse(["3"]) == line.parse(["--steps", "3"]) == (Flags(3, [], False),)
    assert line.parse(["3", "--on"]) == (Flags(3, [], True),)
    with pytest.raises(UserError, match="unknown argument 4"):
        line.parse(["3", "4"])


def test_the_help_is_plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a twin with hyphens nor a default that says nothing."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        importlib.import_module("compute_embeddings").COMMAND_LINE.parse(["--help_all"])
    text = capsys.readouterr().out
    assert "\n  --instance_data_dir, --local_data_dir INSTANCE_DATA_DIR\n" in text
    assert "\n  --recursive           Read" in text
    assert "--instance-data-dir" not in text
    assert not re.search(r"default: (None|False|\[\]|)\)", text)
    assert "(default: 77)" in text


@pytest.mark.parametrize("script", SHORT_HELP)
def test_the_short_help_fits_a_screen_and_its_examples_are_right(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command_line = importlib.import_module(script.removesuffix(".py")).COMMAND_LINE
    monkeypatch.chdir(tmp_path)
    Path(LORA_FOLDER).mkdir()  # that an example draws with
    flags = {flag.name for group in command_line.groups for flag in fields(group)}
    for typed in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            command_line.parse(["--seed", "x", typed])
        assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[: len(lines) // 2]
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= WIDTH
    named = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert set(named) <= flags
    assert len(set(named)) == len(named)
    examples = [shlex.split(line)[2:] for line in lines if line.startswith("  for example: ")]
    assert len(examples) == len(SHORT_HELP[script])
    for words in examples:
        given = {"class_prompt", "class_data_dir"} & {word.removeprefix("--") for word in words}
        need = ["--class_prompt", "a", "--class_data_dir", "b"] if script == "draw_class_pictures.py" else []
        command_line.parse([*words, *([] if given else need)])
    assert lines[0] == f"usage: python {script} [flags]"


def test_every_script_has_a_short_help_and_other_commands_a_whole_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(SHORT_HELP) == {path.name for path in PROJECT.glob("*.py")}
    for typed in ("--help", "--help_all", "--help-all"):
        with pytest.raises(SystemExit):
            COMMAND_LINE.parse([typed])
        assert "--steps STEPS" in capsys.readouterr().out


def test_what_is_always_so_is_taken_with_a_note() -> None:
    notes: list[str] = []
    (flags,) = COMMAND_LINE.parse(["--repeats", "1", "--cache_latents", "--steps", "2", "--repeats=1"], notes.append)
    assert flags.steps == 2
    repeats = "note: --repeats changes nothing: each comes once"
    assert notes == [repeats, "note: --cache_latents changes nothing: they always are", repeats]


def test_the_user_s_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd3_lora.training.data_flags import DataConfig

    monkeypatch.setenv("HOME", "/home/me")
    (data,) = CommandLine("a.py", "A.", (DataConfig,)).parse(["--instance_data_dir", "~/dog", "--instance_prompt", "~"])
    assert (data.instance_data_dir, data.instance_prompt) == ("/home/me/dog", "~")


def test_a_command_is_quoted_as_the_system_s_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.common.command_line.os.name", "nt")
    assert command("a.py", prompt="a sks dog") == 'python a.py --prompt "a sks dog"'
    arguments = {"a": "x&y", "b": 'say "hi"', "c": "C:\\my dogs\\", "d": "it's", "e": "", "f": r"C:\dogs", "g": 1e-4}
    typed = command("a.py", **arguments)
    assert (
        typed
        == r"""python a.py --a "x&y" --b "say \"hi\"" --c "C:\my dogs\\" --d "it's" --e "" --f C:\dogs --g 0.0001"""
    )
    assert command_words("a.py", prompt="a sks dog", on=True, off=False) == ["a.py", "--prompt", "a sks dog", "--on"]
    assert command_words("a.py", prompt=["a dog", "b"], more=[]) == ["a.py", "--prompt", "a dog", "b"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_line_is_answered_before_torch_is_imported(script: str) -> None:
    """And so is --help, whose flags stand in groups."""
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", *sys.argv[1:]]
try:
    runpy.run_path("{script}.py", run_name="__main__")
finally:
    heavy = {{"torch", "diffusers", "peft", "bitsandbytes"}} & sys.modules.keys()
    print("heavy:", *heavy, file=sys.stderr)
"""

    def answer(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True)

    wrong = answer("--devize", "cpu")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown argument --devize: type --device\nheavy:\n"
    shown = answer("--help")
    assert (shown.returncode, shown.stderr) == (0, "heavy:\n")
    assert shown.stdout.endswith(f"All flags: python {script}.py --help_all\n")
    shown = answer("--help_all")
    assert (shown.returncode, shown.stderr) == (0, "heavy:\n")
    assert f"usage: python {script}.py [flags]\n" in shown.stdout
    assert "\nWhere to compute, and whether always alike; every script has these flags:\n" in shown.stdout
    assert "\nHow much memory may be used; every script has these flags:\n" in shown.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *COMMANDS, "sd3_lora.report", "sd3_lora.tricks"])
def test_an_interruption_in_the_first_moment_shows_no_traceback(script: str) -> None:
    """Before the command line is read, while Python imports our first module."""
    code = f"""
import builtins, os, runpy, signal, sys
sys.argv = ["script", "--plan"]
original = builtins.__import__
def interrupted(name, *arguments, **more):
    if name.startswith("sd3_lora.common."):
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *arguments, **more)
if {"." in script}:
    import sd3_lora
    builtins.__import__ = interrupted
    runpy.run_module({script!r}, run_name="__main__")
else:
    builtins.__import__ = interrupted
    runpy.run_path({script!r} + ".py", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_an_interruption_while_libraries_are_imported_is_a_sentence() -> None:
    code = """
import os, signal, sys
from sd3_lora.common.command_line import CommandLine
CommandLine("a.py", "A.", ()).answer_at_once()
os.kill(os.getpid(), signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted: run the same command again\n")


def test_of_several_processes_rank_0_answers() -> None:
    """The others go on, so that its sentence is there before the launcher ends them all."""
    code = """
from sd3_lora.common.command_line import CommandLine
CommandLine("a.py", "A.", ()).answer_at_once()
print("went on")
"""

    def answer(rank: str) -> tuple[int, str, str]:
        arguments, environment = [sys.executable, "-c", code, "--nope"], {**os.environ, "RANK": rank}
        ended = subprocess.run(arguments, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    assert answer("0") == (2, "", "error: unknown argument --nope: `python a.py --help_all` lists the flags\n")
    assert answer("1") == (0, "went on\n", "")


def test_notes_are_rank_0_s(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    COMMAND_LINE.parse(["--cache_latents"])
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    COMMAND_LINE.parse(["--cache_latents"])
    assert capsys.readouterr().out == "note: --cache_latents changes nothing: they always are\n"


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(UserError) as error:
        importlib.import_module("inference").COMMAND_LINE.parse(["--height", "0", "--width=-64", "--seed", "-1"])
    assert str(error.value).splitlines()[1:] == [
        "  --height 0 must be at least 1",
        "  --width -64 must be at least 1",
        "  --seed -1 must be at least 0: there is no random seed here, so type any number",
    ]


@pytest.mark.parametrize(
    "before",
    [
        [],
        ["--resume_from_checkpoint", "latest"],
        ["--resume-from-checkpoint", "checkpoint-5"],
        ["--resume_from_checkpoint=a folder"],
    ],
)
def test_the_command_that_was_typed_with_a_flag_changed(monkeypatch: pytest.MonkeyPatch, before: list[str]) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    typed = ["--steps=3", *before, "--names", "a b", "c"]
    monkeypatch.setattr(sys, "argv", ["script.py", *typed])
    expected = command("script.py") + " --steps=3 --names 'a b' c --resume_from_checkpoint latest"
    if os.name == "nt":
        expected = expected.replace("'", '"')
    assert command_again("script.py", typed, resume_from_checkpoint="latest") == expected
    assert command_again("script.py", None, resume_from_checkpoint="latest") == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    again = command_again("script.py", typed, resume_from_checkpoint="latest")
    assert again == expected.replace("python ", "torchrun --nproc-per-node 2 ", 1)


def test_an_interruption_in_good_order(capsys: pytest.CaptureFixture[str]) -> None:
    def script(_: object) -> None:
        raise Interrupted("all is kept", 15)

    assert exit_code(script, None) == 143
    assert capsys.readouterr().err == "\ninterrupted: all is kept\n"


def test_memory_that_ran_out_is_found_behind_what_was_made_of_it() -> None:
    """And an error that is its own cause, as `raise error from error` makes it, is looked at once."""
    ran_out, damaged = MemoryError(), UserError("a.parquet is damaged")
    damaged.__cause__ = ran_out
    assert host_memory_fault(damaged) == "the host's memory ran out (MemoryError)"
    damaged.__cause__ = damaged
    assert host_memory_fault(damaged) is None
    ran_out.__cause__, damaged.__cause__ = damaged, ran_out
    assert host_memory_fault(damaged) is not None


@pytest.mark.parametrize("token", [["--hub_token", "hf_x"], ["--hub-token=hf_x"]])
def test_a_token_is_in_no_command_and_no_record(token: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["--push_to_hub", *token, "--rank", "8"]
    assert command_again("script.py", typed) == "python script.py --push_to_hub --rank 8"
    monkeypatch.setattr(sys, "argv", ["script.py", *typed])
    forget_secrets()
    assert sys.argv == ["script.py", "--push_to_hub", "--rank", "8"]
    assert "hf_x" not in f"{Secret('hf_x')} {[Secret('hf_x')]}"
