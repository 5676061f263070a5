"""What stage one left, as training finds it: checked, named with its remedy, made where it is missing."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.stage_one.image_files import hash_file

import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, Prepared, save_pictures, save_tiny_sd3
from PIL import Image
from safetensors.torch import save_file
from training_runs import Flags, Run, Script, train


def follow(script: Script, run: Run) -> str:
    """Types the command that the error names; returns its script."""
    _, name, *arguments = shlex.split(run.error.split("`")[1])
    result = script(name.removesuffix(".py"), *arguments)
    assert result.code == 0, result.err
    return name


def change_a_picture(stage_one: Prepared) -> None:
    save_pictures(stage_one.pictures / "new", [(64, 64)], seed=9)
    (stage_one.pictures / "new" / "00.png").replace(stage_one.pictures / "03.png")
    (stage_one.pictures / "new").rmdir()


def forget_a_picture(stage_one: Prepared) -> None:
    (stage_one.latents / f"{hash_file(stage_one.pictures / '03.png')}.safetensors").unlink()


STALE: dict[str, tuple[Callable[[Prepared], Any], list[object], str, list[str]]] = {
    # what the user does, the flags, a part of the sentence, the scripts that mend it
    "no embeddings": (lambda s: s.embeddings.unlink(), [], "embeddings.parquet is not there", ["compute_embeddings"]),
    "other prompt": (
        lambda s: None,
        ["--instance_prompt", "a photo of zwx robot"],
        "embeddings.parquet lacks 'a photo of zwx robot'",
        ["compute_embeddings"],
    ),
    "other length": (
        lambda s: None,
        ["--max_sequence_length", 12],
        "was made with max_sequence_length 20, not 12",
        ["compute_embeddings"],
    ),
    "changed picture": (
        change_a_picture,
        [],
        "no latents of 03.png (a new or changed picture)",
        ["precompute_latents"],
    ),
    "missing latents": (forget_a_picture, [], "no latents of 03.png", ["precompute_latents"]),
    "other resolution": (
        lambda s: None,
        ["--resolution", 32],
        "was made with resolution 64, not 32",
        ["precompute_latents"],
    ),
    "more crops": (lambda s: None, ["--num_crops", 5], "lacks the crop 64x64+", ["precompute_latents"]),
    "mirrored twins": (lambda s: None, ["--random_flip"], "-flip of 00.png", ["precompute_latents"]),
}


@pytest.mark.parametrize("name", STALE)
def test_the_named_command_mends_it(script: Script, private: Prepared, tmp_path: Path, name: str) -> None:
    change, arguments, sentence, scripts = STALE[name]
    change(private)
    mended = []
    run = train(script, private, tmp_path / "out", *arguments, code=2)
    assert sentence in run.error
    for _ in scripts:
        assert run.wrote_no_weights()
        mended.append(follow(script, run).removesuffix(".py"))
        run = train(script, private, tmp_path / "out", *arguments, code=0 if mended == scripts else 2)
    assert len(run.losses) == 3


def test_another_models_files(script: Script, private: Prepared, tmp_path: Path) -> None:
    """SD3 training on a miniature's files: the exact commands, with both models' names."""
    other = save_tiny_sd3(tmp_path / "other", seed=1, width=48)
    stage_one = replace(private, model=other)
    run = train(script, stage_one, tmp_path / "out", code=2)
    assert run.error == (
        f"{private.embeddings} was made with model {private.model}, not {other}: type `python compute_embeddings.py "
        f"--pretrained_model_name_or_path {other} --instance_data_dir {private.pictures} "
        f"--instance_prompt '{PROMPT}' --device cpu --output_path {private.embeddings} --overwrite`"
    )
    assert run.wrote_no_weights()
    assert follow(script, run) == "compute_embeddings.py"
    run = train(script, stage_one, tmp_path / "out", code=2)
    assert f"was made with model {private.model}, not {other}: type `python precompute_latents.py " in run.error
    assert follow(script, run) == "precompute_latents.py"
    train(script, stage_one, tmp_path / "out")


def spoil(path: Path, kind: str) -> Path:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif path.suffix == ".parquet":
        pq.write_table(pq.read_table(path, columns=["prompt"]).replace_schema_metadata(None), path)
    else:
        save_file({"weight": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
@pytest.mark.parametrize("artefact", ["embeddings", "latents"])
def test_broken_files(script: Script, private: Prepared, tmp_path: Path, artefact: str, kind: str) -> None:
    latents = private.latents / f"{hash_file(private.pictures / '00.png')}.safetensors"
    path = spoil(latents if artefact == "latents" else private.embeddings, kind)
    run = train(script, private, tmp_path / "out", code=2)
    assert f"{path} is not a whole " in run.error
    assert "delete it and run " in run.error
    assert run.wrote_no_weights()


def test_no_pictures(script: Script, private: Prepared, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = train(script, private, tmp_path / "out", "--instance_data_dir", tmp_path / "empty", code=2)
    assert "empty holds no pictures: put .jpg or .png files into it" in run.error
    run = train(script, private, tmp_path / "out", "--instance_data_dir", tmp_path / "nowhere", code=2)
    assert "there is no folder" in run.error


def test_a_folder_that_cannot_be_written(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        run = train(script, prepared, folder, code=2)
        assert f"cannot write to {folder} (" in run.error
        assert run.error.endswith("give another folder")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(("size", "fits"), [(60, 48), (8, 16), (10_000, 256)])
def test_a_resolution_that_the_model_cannot_take(
    script: Script, prepared: Prepared, tmp_path: Path, size: int, fits: int
) -> None:
    run = train(script, prepared, tmp_path / "out", "--resolution", size, code=2)
    assert run.error == (
        f"--resolution {size} does not fit this model, which takes multiples of 16 up to 256: type --resolution {fits}"
    )
    assert not run.folder.exists()


def test_an_unknown_flag(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    for arguments, advice in (
        (["--max_train_step", 3], "type --max_train_steps"),
        (["--ranks", 3], "type --rank"),
        (
            ["stray"],
            "put double quotes around a value of several words; "
            f"`python {TRAINING_SCRIPT}.py --help_all` lists the flags",
        ),
    ):
        run = train(script, prepared, tmp_path / "out", *arguments, code=2)
        assert run.error == f"unknown argument {arguments[0]}: {advice}"
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_there_are_made_in_a_process_of_its_own(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the process is faked; tests/common/test_processes.py starts it."""
    shutil.rmtree(private.latents)
    commands: list[list[str]] = []

    def run_here(arguments: list[Any], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append([str(word) for word in arguments])
        with monkeypatch.context() as patch:
            for name in env.keys() - os.environ.keys():
                patch.setenv(name, env[name])
            code = importlib.import_module("precompute_latents").main(commands[-1][2:])
        return subprocess.CompletedProcess(arguments, code)

    monkeypatch.setattr(subprocess, "run", run_here)
    first = train(script, private, tmp_path / "first", "--center_crop")
    (what_is_next,) = (line for line in first.out.splitlines() if line.startswith("next"))
    assert what_is_next.startswith("next: python inference.py ")  # what stage one alone would print goes on by itself
    sentence = (
        f"{private.latents} holds no latents yet; in a process of its own: python precompute_latents.py "
        f"--pretrained_model_name_or_path {private.model} --instance_data_dir {private.pictures} "
        f"--instance_prompt '{PROMPT}' --device cpu --resolution 64 --center_crop --output_path {private.latents}"
    )
    assert sentence in first.out.splitlines()
    assert len(commands) == 1
    assert commands[0][1] == str(PROJECT / "precompute_latents.py")
    assert len(list(private.latents.glob("*.safetensors"))) == 5
    second = train(script, private, tmp_path / "second", "--center_crop")
    assert "in a process of its own" not in second.out
    assert len(commands) == 1
    assert second.losses == first.losses


def test_latents_that_cannot_be_made(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(private.latents)
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: subprocess.CompletedProcess(arguments, 2))
    run = train(script, private, tmp_path / "out", code=2)
    assert "there are no latents to train on" in run.error
    assert run.error.split("`")[1].startswith("python precompute_latents.py --pretrained_model_name_or_path ")
    assert run.wrote_no_weights()


def test_embeddings_that_are_named_are_not_made(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip in a name must not cost the minutes of T5; nor are any made for pictures that nobody named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    run = train(script, private, tmp_path / "out", "--data_df_path", "slip.parquet", code=2)
    assert run.error.startswith("slip.parquet is not there: type `python compute_embeddings.py ")
    place = private.flags.index("--instance_data_dir")
    flags = Flags([*private.flags[:place], *private.flags[place + 2 :]])
    run = train(script, flags, tmp_path / "out", "--data_df_path", "sample_embeddings.parquet", code=2)
    assert run.error.startswith("sample_embeddings.parquet is not there: type `python compute_embeddings.py ")
    assert run.wrote_no_weights()


def test_embeddings_that_cannot_be_made(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: subprocess.CompletedProcess(arguments, 2))
    words = ["--data_df_path", "sample_embeddings.parquet", "--max_sequence_length", 30]
    run = train(script, private, tmp_path / "out", *words, code=2)
    assert "there are no embeddings to train on" in run.error
    typed = run.error.split("`")[1]
    assert typed.startswith("python compute_embeddings.py --pretrained_model_name_or_path ")
    assert "--max_sequence_length 30" in typed
    assert run.wrote_no_weights()


def test_the_child_is_not_told_of_the_launcher(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchrun's variables it would wait for ranks that never come."""
    seen: dict[str, str] = {}

    def capture(arguments: list[Any], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(arguments, 2)

    shutil.rmtree(private.latents)
    monkeypatch.setattr(subprocess, "run", capture)
    inherited = {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_CPU": "true", "HF_HOME": "/x"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    train(script, private, tmp_path / "out", code=2)
    assert set(inherited) & set(seen) == {"HF_HOME"}
    assert seen["PATH"] == os.environ["PATH"]


def test_without_a_folder_the_pictures_of_the_embeddings_file(
    script: Script, prepared: Prepared, tmp_path: Path
) -> None:
    """The folder may be gone; the ids are in the file."""
    place = prepared.flags.index("--instance_data_dir")
    flags = Flags([*prepared.flags[:place], *prepared.flags[place + 2 :]])
    without = train(script, flags, tmp_path / "a")
    assert "5 pictures at 64 px" in without.out
    assert len(without.losses) == 3
    run = train(script, flags, tmp_path / "b", "--instance_prompt", "another", code=2)
    assert "describes no picture with 'another'" in run.error


@pytest.fixture
def with_a_broken_picture(prepared: Prepared, tmp_path: Path) -> list[object]:
    """The flags of training on five good pictures, with latents, and a sixth that does not decode."""
    shutil.copytree(prepared.pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.jpg").write_text("not a picture")
    return [*prepared.flags, "--instance_data_dir", tmp_path / "pictures", "--max_train_steps", 2]


def test_a_broken_picture_is_left_out_when_asked(script, with_a_broken_picture, tmp_path: Path) -> None:
    stopped = script(TRAINING_SCRIPT, *with_a_broken_picture, "--output_dir", tmp_path / "a")
    assert stopped.code == 2
    assert "no latents of broken.jpg" in stopped.err
    going_on = script(TRAINING_SCRIPT, *with_a_broken_picture, "--output_dir", tmp_path / "b", "--skip_broken")
    assert going_on.code == 0
    assert "skipped: " in going_on.out
    assert "5 pictures at 64 px" in going_on.out


def test_a_new_picture_is_not_mistaken_for_a_broken_one(script, with_a_broken_picture, prepared, tmp_path) -> None:

    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "new.png")
    flags = [*with_a_broken_picture, "--output_dir", tmp_path / "a", "--skip_broken"]
    stopped = script(TRAINING_SCRIPT, *flags)
    assert stopped.code == 2
    assert "no latents of new.png" in stopped.err
    assert "--skip_broken" in stopped.err  # in the command that mends it


def test_latents_that_training_makes_itself_skip_it_too(script, tiny_sd3: Path, tmp_path: Path, monkeypatch) -> None:

    from conftest import save_pictures

    save_pictures(tmp_path / "pictures", [(64, 64)])
    (tmp_path / "pictures" / "broken.jpg").write_text("not a picture")
    model = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
    prompt = ["--instance_prompt", PROMPT]
    assert script("compute_embeddings", *model, *prompt, "--output_path", tmp_path / "e.parquet").code == 0
    commands = []

    def run(arguments: list[str], **_: object) -> object:
        commands.append([str(word) for word in arguments])
        main = importlib.import_module("precompute_latents").main
        return type("Finished", (), {"returncode": main(commands[-1][2:])})

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--data_df_path", tmp_path / "e.parquet", "--latents_path", tmp_path / "latents", "--report_to", "none"]
    flags += ["--output_dir", tmp_path / "out", "--max_train_steps", 1, "--skip_broken"]
    assert script(TRAINING_SCRIPT, *model, *prompt, *flags).code == 0
    assert "--skip_broken" in commands[0]
