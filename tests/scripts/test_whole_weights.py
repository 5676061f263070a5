"""Every script refuses a component that is not whole, by name, before it computes anything.

In `make test` each script meets one fault of each component that it loads; under the marker `faults` all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sd3_lora import verify

import pytest
import torch
from conftest import PROMPT, TRAINING_SCRIPT, Prepared, Result
from original_sd3 import random_original
from safetensors.torch import load_file, save_file
from training_runs import train

ENCODERS = ["text_encoder", "text_encoder_2", "text_encoder_3"]
COMPONENTS = [*ENCODERS, "vae", "transformer"]
# By script, the components that it loads.
LOADED = {
    "compute_embeddings": ENCODERS,
    "precompute_latents": ["vae"],
    "draw_class_pictures": ["transformer", "vae"],
    TRAINING_SCRIPT: ["transformer", "text_encoder", "text_encoder_2"],
    "inference": COMPONENTS,
    "sd3_lora.merge": COMPONENTS,
    "sd3_lora.convert": [*ENCODERS, "vae"],
    "sd3_lora.losses": ["transformer"],
    "sd3_lora.verify": COMPONENTS,
}
FAULTS = ["tensor missing", "shard missing", "tensor too many", "wrong shape", "cut short"]
CELLS = [(name, component) for name, components in LOADED.items() for component in components]
ALL = [(*cell, fault) for cell in CELLS for fault in FAULTS]
# Down the list the faults take turns, so that each script and each component meets several.
FEW = [(*cell, FAULTS[number % len(FAULTS)]) for number, cell in enumerate(CELLS)]


def damage(folder: Path, fault: str) -> str:
    """Breaks a component's weights; returns what the sentence has to name."""
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name in sorted(tensors) if ".1." in name and tensors[name].ndim >= 2)
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
        return path.name
    if fault == "shard missing":
        path.unlink()
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        names = [f"{path.stem}-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
        for half, shard in zip(halves, names, strict=True):
            save_file(half, folder / shard, {"format": "pt"})
        weight_map = {key: shard for half, shard in zip(halves, names, strict=True) for key in half}
        (folder / f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / names[1]).unlink()
        return names[1]
    if fault == "tensor missing":
        del tensors[name]
    elif fault == "tensor too many":
        tensors[name := name.replace(".1.", ".7.", 1)] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][1:].contiguous()
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def lora(script: Callable[..., Result], prepared: Prepared, made: Path) -> Path:
    """Trained once."""
    if not (made / "lora").exists():
        train(script, prepared, made / "lora", "--max_train_steps", 1)
    return made / "lora"


@pytest.fixture
def single(prepared: Prepared, made: Path) -> Path:
    """A base in one file, that has a transformer alone."""
    path = made / "single.safetensors"
    if not path.exists():
        config = json.loads((prepared.model / "transformer" / "config.json").read_text())
        tensors = random_original(config)
        save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    "cell", [cell if cell in FEW else pytest.param(cell, marks=pytest.mark.faults) for cell in ALL], ids=" ".join
)
def test_a_component_that_is_not_whole(
    script: Callable[..., Result],
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: Path,
    single: Path,
    cell: tuple[str, str, str],
) -> None:
    name, component, fault = cell
    model, out = Path(shutil.copytree(prepared.model, tmp_path / "model")), tmp_path / "out"
    named = damage(model / component, fault)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    for module in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding):
        monkeypatch.setattr(module, "forward", refuse)
    base = ["--pretrained_model_name_or_path", model]
    pictures = ["--instance_data_dir", prepared.pictures, "--instance_prompt", PROMPT]
    class_flags = ["--class_data_dir", out / "class", "--class_prompt", "a photo of a robot", "--num_class_images", 1]
    training = [*prepared.flags, *base, "--output_dir", out, "--max_train_steps", 1]
    if component.startswith("text_encoder"):
        training.append("--train_text_encoder")
    artefacts = ["--data_df_path", prepared.embeddings, "--latents_path", prepared.latents]
    flags = {
        "compute_embeddings": [*pictures, *base, "--output_path", out / "e.parquet", "--device", "cpu"],
        "precompute_latents": [*pictures, *base, "--output_path", out, "--device", "cpu"],
        "draw_class_pictures": [*class_flags, *base, "--data_df_path", prepared.embeddings, "--device", "cpu"],
        TRAINING_SCRIPT: [*training, "--device", "cpu"],
        "inference": [*base, "--prompt", "a", "--outdir", out, "--data_df_path", tmp_path / "none", "--device", "cpu"],
        "sd3_lora.merge": [lora, *base, "--output_dir", out],
        "sd3_lora.convert": [single, "--parts", model],
        "sd3_lora.losses": [*pictures, *base, *artefacts, "--output_dir", out],
        "sd3_lora.verify": [model],
    }[name]
    result = script(name, *flags)
    assert result.code == 2, result.out + result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert errors == result.err.splitlines()[-1:]
    assert f"{model / component}" in errors[0]
    assert named in errors[0]
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert not (single.parent / "single").exists()


def test_a_link_whose_file_is_gone_is_named(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the hub's cache, whose weights are links, once their blob was deleted."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    (weights,) = (model / "vae").glob("*.safetensors")
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    assert verify.main([str(model)]) == 2
    assert f"error: {weights} is no file, or a link to one that is gone: delete it" in capsys.readouterr().err
