"""What bad input gets in stage one: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sd3_lora.common import devices, model_files
from sd3_lora.common.defaults import EXAMPLE_SUBJECT
from sd3_lora.stage_one import text_encoders

import pytest
import torch
from conftest import PROJECT, PROMPT, Result
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import load_file, save_file

EMBED, CACHE = "compute_embeddings", "precompute_latents"
BOTH = pytest.mark.parametrize("name", [EMBED, CACHE])


@pytest.fixture
def run(script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run(EMBED, "--class_prompt", "a dog")` calls a script on the tiny model; its output is `tmp_path / "out"`."""

    def call(name: str, *words: object, model: object = tiny_sd3, folder: Path = pictures) -> Result:
        output = tmp_path / "out" / ("embeddings.parquet" if name == EMBED else "latents")
        shared = ["--pretrained_model_name_or_path", model, "--instance_data_dir", folder, "--output_path", output]
        prompt = [] if "--instance_prompt" in words else ["--instance_prompt", PROMPT]
        return script(name, *shared, *prompt, *words)

    return call


@pytest.fixture
def written(tmp_path: Path) -> Callable[[], list[str]]:
    """The files under `out`."""
    return lambda: sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())


def refused(result: Result, *parts: str) -> bool:
    """One sentence on stderr, exit code 2, no traceback."""
    assert result.code == 2, repr(result.err)
    assert result.err.splitlines()[-1].startswith("error: "), repr(result.err)
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert part in result.err
    return True


# The command line


@BOTH
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--no_such_flag"], "unknown argument --no_such_flag: `python {name}.py --help_all` lists the flags"),
        (["--outputpath=x"], "unknown argument --outputpath: type --output_path"),
        (["--output", "x"], "unknown argument --output: type --output_path"),  # not taken for --output_path
        (["stray"], "unknown argument stray: "),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--instance_prompt"], "argument --instance_prompt"),
    ],
)
def test_bad_flags(run: Callable[..., Result], written: Any, name: str, words: list[str], said: str) -> None:
    assert refused(run(name, *words), said.format(name=name))
    assert written() == []


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        (EMBED, ["--max_sequence_length", "many"], "argument --max_sequence_length: invalid int value: 'many'"),
        (EMBED, ["--max_sequence_length", "513"], "--max_sequence_length 513 is not between 1 and 512: type 77 or 256"),
        (EMBED, ["--max_sequence_length", "0"], "--max_sequence_length 0 is not between 1 and 512"),
        (EMBED, ["--t5_precision", "int4"], "invalid choice: 'int4' (choose from 'int8', 'nf4', 'fp16', 'fp32')"),
        (EMBED, ["--t5_precision", "nf4", "--t5_stream"], "not nf4: add --t5_precision fp16"),
        (EMBED, ["--prompts_file", "none.txt"], "cannot read none.txt (No such file or directory): check the path"),
        (CACHE, ["--vae_precision", "int8"], "invalid choice: 'int8' (choose from 'fp32', 'fp16', 'bf16')"),
        (CACHE, ["--num_crops", "0"], "--num_crops 0 must be at least 1"),
        (CACHE, ["--vae_batch_size", "0"], "--vae_batch_size 0 must be at least 1"),
        (CACHE, ["--alpha_background", "black"], "invalid choice: 'black' (choose from 'white', 'mean')"),
        (CACHE, ["--resolution", "100"], "--resolution 100 does not fit this model, which takes multiples of 16 up to"),
        (CACHE, ["--resolution", "100"], "up to 256: type --resolution 96"),
        (CACHE, ["--resolution", "512"], "up to 256: type --resolution 256"),
        (CACHE, ["--resolution", "0"], "up to 256: type --resolution 16"),
    ],
)
def test_bad_values(run: Callable[..., Result], written: Any, name: str, words: list[str], said: str) -> None:
    assert refused(run(name, *words), said)
    assert written() == []


# The machine


@BOTH
def test_a_gpu_beside_a_cpu_build_of_torch(
    run: Callable[..., Result], written: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    said = "this machine has an NVIDIA GPU but torch", f"type `{devices.cuda_install()}`"
    assert refused(run(name), *said, "or add --device cpu")
    assert refused(run(name, "--device", "cuda"), *said)
    assert written() == []
    assert run(name, "--device", "cpu").code == 0


@pytest.mark.parametrize(
    ("version", "typed"),
    [
        ("2.13.0+cpu", "torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("2.9.1", "torch==2.9.1+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("2.6.0", "torch==2.6.0+cu126 --index-url https://download.pytorch.org/whl/cu126"),
    ],
)
def test_the_same_torch_with_cuda(version: str, typed: str) -> None:
    """By its whole version, for which pip needs no --force-reinstall, and which constraints.txt allows."""
    assert devices.cuda_install(version) == f"pip install {typed}"


@BOTH
@pytest.mark.parametrize("model", [[], ["--pretrained_model_name_or_path", str(PROJECT / "miniature")]])
def test_the_miniature_runs_beside_a_gpu_that_torch_cannot_use(
    script: Callable[..., Result], tmp_path: Path, name: str, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where PyPI's torch is a build for the CPU."""
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.chdir(tmp_path)
    result = script(name, *model)
    assert result.code == 0, result.err
    assert f"enough for the miniature; for SD3 type `{devices.cuda_install()}`\n" in result.out
    asked = script(name, *model, "--device", "cuda")
    assert refused(asked, "this machine has an NVIDIA GPU but torch", "or add --device cpu")


@BOTH
def test_photos_are_nothing_to_the_miniature(
    script: Callable[..., Result], pictures: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--instance_prompt", PROMPT, "--plan"]
    note = f"what is on photos, as in {pictures}, needs a real model: --pretrained_model_name_or_path stabilityai/"
    assert note in script(name, "--instance_data_dir", pictures, *words).out
    assert "note: the miniature" not in script(name, *words).out
    assert "note: the miniature" not in script(name, "--instance_data_dir", EXAMPLE_SUBJECT, *words).out


@BOTH
def test_a_gpu_that_is_not_there(run: Callable[..., Result], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(run(name, "--device", "cuda"), "torch finds no GPU here: check `nvidia-smi`, or type --device cpu")


@BOTH
def test_an_output_folder_that_cannot_be_written(
    script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", pictures, "--instance_prompt", PROMPT]
    result = script(name, *words, "--output_path", tmp_path / "file" / "within")
    assert refused(result, f"cannot write to {tmp_path / 'file'}", "): give another folder")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere; Windows has other rights")
@BOTH
def test_an_output_folder_without_the_right_to_write(run: Callable[..., Result], tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert refused(run(name), "cannot write to", "(Permission denied): give another folder")


def test_an_embeddings_path_that_is_a_folder(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out" / "embeddings.parquet").mkdir(parents=True)
    for words in ([], ["--overwrite"]):
        assert refused(run(EMBED, *words), "embeddings.parquet is a folder: give the name of a file, such as")


# The pictures


@BOTH
def test_no_pictures(run: Callable[..., Result], tmp_path: Path, name: str) -> None:
    empty = tmp_path / "empty"
    assert refused(run(name, folder=empty), f"there is no folder {empty}: give the folder of your pictures")
    empty.mkdir()
    (empty / "readme.md").write_text("no picture")
    assert refused(run(name, folder=empty), f"{empty} holds no pictures: put .jpg or .png files into it")
    (empty / "deeper").mkdir()
    Image.new("RGB", (64, 64)).save(empty / "deeper" / "a.png")
    assert refused(run(name, folder=empty), "add --recursive to read its subfolders")
    assert not (tmp_path / "out").exists()


def test_pictures_without_any_prompt(
    script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "01.txt").write_text("only this one has a caption")
    words = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", pictures]
    result = script(EMBED, *words, "--output_path", tmp_path / "out" / "embeddings.parquet")
    said = '02.png have no caption: type --instance_prompt "a photo of sks dog", or write 00.txt beside 00.png'
    assert refused(result, "error: " + str(pictures / "00.png"), said)
    assert not (tmp_path / "out").exists()


@BOTH
def test_the_same_picture_with_two_captions(run: Callable[..., Result], pictures: Path, name: str) -> None:
    shutil.copy(pictures / "00.png", pictures / "copy.png")
    (pictures / "00.txt").write_text("a robot")
    (pictures / "copy.txt").write_text("a dog")
    assert refused(run(name), "are the same picture with different captions, 'a robot' and 'a dog': remove one of them")


# The model


@BOTH
def test_a_gated_model_without_access_is_explained_before_anything_is_loaded(
    run: Callable[..., Result], written: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def gated(repo: str, filename: str, **_: Any) -> str:
        asked.append(filename)
        response = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403 Client Error. Cannot access gated repo", response=response)  # type: ignore[arg-type]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("fetched or loaded before the licence is accepted")

    monkeypatch.setattr(model_files, "hf_hub_download", gated)
    for owner, function in [
        (model_files, "snapshot_download"),
        (text_encoders, "load_clip"),
        (text_encoders, "load_t5"),
        (torch.nn.Module, "load_state_dict"),
    ]:
        monkeypatch.setattr(owner, function, never)
    model = "stabilityai/stable-diffusion-3-medium-diffusers"
    assert refused(
        run(name, model=model),
        f"{model} is gated: accept its licence at https://huggingface.co/{model} , then type `hf auth login`",
    )
    assert asked == ["model_index.json"]
    assert written() == []


@BOTH
def test_a_model_that_is_not_there(run: Callable[..., Result], written: Any, tmp_path: Path, name: str) -> None:
    assert refused(run(name, model="nobody/nothing"), "nobody/nothing is neither a folder here nor downloaded yet")
    assert refused(run(name, model=tmp_path), "has no model_index.json: give the folder of a diffusers SD3 pipeline")
    assert refused(run(name, model=tmp_path / "no" / "such" / "model"), "/no/such/model: check the path")
    assert written() == []


@pytest.mark.parametrize(("name", "component"), [(EMBED, "text_encoder"), (EMBED, "text_encoder_3"), (CACHE, "vae")])
def test_a_model_with_truncated_weights(
    run: Callable[..., Result], written: Any, tiny_sd3: Path, tmp_path: Path, name: str, component: str
) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "model")
    (weights,) = (model / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    said = f"{weights} is not a whole safetensors file: delete it and download it again"
    assert refused(run(name, model=model), said)
    if component == "text_encoder_3":
        assert refused(run(name, "--t5_precision", "fp16", "--t5_stream", model=model), said)
    assert written() == []


@pytest.mark.parametrize("component", ["text_encoder_3", "text_encoder", "tokenizer_2", "tokenizer_3"])
def test_a_model_without_a_text_component(
    run: Callable[..., Result], written: Any, tiny_sd3: Path, tmp_path: Path, component: str
) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "model", ignore=lambda _, names: {component} & set(names))
    assert refused(run(EMBED, model=model), f"{model} has no {component}", "a whole SD3 pipeline")
    assert written() == []


def test_a_model_without_a_vae(run: Callable[..., Result], written: Any, tiny_sd3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "model", ignore=lambda _, names: {"vae"} & set(names))
    assert refused(run(CACHE, model=model), f"{model} has no vae", "a whole SD3 pipeline")
    assert written() == []


# The numbers


@pytest.fixture
def loud_sd3(tiny_sd3: Path, tmp_path: Path) -> Callable[[str, str, float], Path]:
    """`loud_sd3("text_encoder_3", "encoder.final_layer_norm.weight", 1e6)`: a copy with a weight scaled up."""

    def make(component: str, weight: str, factor: float) -> Path:
        model = Path(shutil.copytree(tiny_sd3, tmp_path / "loud"))
        path = model / component / "model.safetensors"
        tensors = load_file(path)
        tensors[weight] = tensors[weight] * factor
        path.unlink()  # `tensors` are still mapped to it
        save_file(tensors, path, {"format": "pt"})
        return model

    return make


@pytest.mark.parametrize(
    ("component", "weight", "said"),
    [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc2.weight", "CLIP-L gives "),
        ("text_encoder_2", "text_projection.weight", "CLIP-G gives "),
        ("text_encoder_3", "encoder.final_layer_norm.weight", "T5 gives "),
    ],
)
def test_an_embedding_that_float16_cannot_hold_names_the_prompt(
    run: Callable[..., Result], written: Any, loud_sd3: Any, component: str, weight: str, said: str
) -> None:
    model = loud_sd3(component, weight, 1e8)
    result = run(EMBED, "--t5_precision", "fp32", model=model)
    assert refused(result, said, f" for the prompt {PROMPT!r}, which float16 cannot hold: ")
    assert written() == []


def test_an_existing_file_survives_a_prompt_that_float16_cannot_hold(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(EMBED).code == 0
    before = (tmp_path / "out" / "embeddings.parquet").read_bytes()
    monkeypatch.setattr(text_encoders, "_FLOAT16_MAX", 1e-3)
    assert refused(run(EMBED, "--class_prompt", "a loud robot"), "for the prompt 'a loud robot', which float16 cannot")
    assert (tmp_path / "out" / "embeddings.parquet").read_bytes() == before


# What lies at the output's place


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_a_broken_embeddings_file_is_named_and_overwrite_replaces_it(
    run: Callable[..., Result], tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "out" / "embeddings.parquet"
    assert run(EMBED).code == 0
    whole = path.read_bytes()
    broken = whole[: len(whole) // 2] if content is None else content
    path.write_bytes(broken)
    assert refused(run(EMBED), f"{path} is not a whole embeddings file of this project", "delete it and run")
    assert path.read_bytes() == broken
    assert run(EMBED, "--overwrite").code == 0
    assert path.read_bytes() == whole


def test_a_foreign_latent_file_is_named(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run(CACHE).code == 0
    path = min((tmp_path / "out" / "latents").glob("*.safetensors"))
    path.write_bytes(b"no safetensors")
    assert refused(run(CACHE), f"{path} is not a whole latent file of this project", "delete it and run")
    assert path.read_bytes() == b"no safetensors"
    path.unlink()
    assert run(CACHE).code == 0
    assert path.exists()
