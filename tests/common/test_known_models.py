"""`--plan` of the published models, without an account, a download or a network (`HF_HUB_OFFLINE` is set)."""

from __future__ import annotations

import shutil
import sys

from sd3_lora.common.component_weights import shapes_by_config
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import EMBEDDINGS_PATH
from sd3_lora.common.known_models import HUB_IDS, known_configs
from sd3_lora.common.model_files import ModelFiles

import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import random_sd3

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PLANNED = "planned by the shapes of {}, which are known here: nothing is downloaded\n"


@pytest.mark.parametrize("name", HUB_IDS)
def test_the_shapes_are_those_of_the_published_architecture(name: str) -> None:
    """As the benchmarks make it, of which every figure comes."""
    configs = known_configs(HUB_IDS[name])
    assert configs
    with torch.device("meta"):
        models = {"transformer": random_sd3.make_transformer(name)}
        if name == "sd3-medium":  # all three have the same others
            models |= {component: random_sd3.make(component) for component in COMPONENTS[1:]}
    for component, model in models.items():
        # One name of each tensor: T5's embedding has two.
        expected = {key: tensor.shape for key, tensor in model.named_parameters()}
        expected |= {key: tensor.shape for key, tensor in model.named_buffers() if key in model.state_dict()}
        assert shapes_by_config(component, configs[component]) == expected


def test_the_shapes_by_a_configuration_are_those_in_the_files(tiny_sd3) -> None:
    files = ModelFiles(ModelConfig(str(tiny_sd3)))
    for component in COMPONENTS:
        assert shapes_by_config(component, files.read_config(component)) == files.tensor_shapes(component)


@pytest.mark.parametrize(
    ("name", "planned"),
    [
        ("sd3-medium", "plan: base unchanged, on the device; 10 of 24 blocks recomputed"),
        ("sd3.5-medium", "plan: base unchanged, on the device; 16 of 24 blocks recomputed"),
        ("sd3.5-large", "plan: base unchanged, "),  # how many blocks are streamed, the machine's time to copy decides
    ],
)
def test_training_is_planned(script, name: str, planned: str, tmp_path, monkeypatch) -> None:
    """As the README's table of cards says for 8 GiB."""
    monkeypatch.chdir(tmp_path)
    model = ["--pretrained_model_name_or_path", HUB_IDS[name]]
    result = script(TRAINING_SCRIPT, *model, "--resolution", 1024, "--vram_budget_gib", 8, "--plan")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines(keepends=True)
    assert PLANNED.format(HUB_IDS[name]) in lines
    assert any(line.startswith(planned) for line in lines)
    peak_gib = float(lines[-1].split(" = ")[1].removesuffix(" GiB\n"))
    assert 7.4 < peak_gib <= 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("compute_embeddings", [], "T5 in fp16, one block at a time: CUDA 0.75"),
        ("precompute_latents", [], "VAE in fp32, 1 picture at a time, whole: CUDA 0.75 + VAE 0.31"),
        ("inference", ["--prompt", "a dog"], "transformer in fp16, base unchanged, on the device: CUDA 0.75"),
        (
            "draw_class_pictures",
            ["--class_prompt", "a dog", "--class_data_dir", "dogs"],
            "transformer in fp16, base unchanged, ",
        ),
    ],
)
def test_every_script_is_planned(script, name: str, words: list[str], said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub_id = HUB_IDS["sd3-medium"]
    result = script(name, "--pretrained_model_name_or_path", hub_id, *words, "--vram_budget_gib", 6, "--plan")
    assert (result.code, result.err) == (0, "")
    assert PLANNED.format(hub_id) in result.out
    assert any(line.startswith(said) for line in result.out.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_what_another_model_left_changes_no_plan(script, prepared, tmp_path, monkeypatch) -> None:
    """An embeddings file of the tiny model, in fp32, where this one's would go."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(prepared.embeddings, EMBEDDINGS_PATH)
    model = ["--pretrained_model_name_or_path", HUB_IDS["sd3-medium"]]
    result = script("compute_embeddings", *model, "--vram_budget_gib", 6, "--plan")
    assert result.code == 0, result.err
    assert "T5 in fp16, one block at a time: CUDA 0.75" in result.out


def test_more_than_a_plan_needs_the_files(script, tmp_path, monkeypatch) -> None:
    """And so does a plan of a revision, of which nothing is known."""
    monkeypatch.chdir(tmp_path)
    model = ["--pretrained_model_name_or_path", HUB_IDS["sd3-medium"]]
    for more in ([], ["--plan", "--revision", "refs/pr/1"]):
        result = script("inference", *model, "--prompt", "a dog", *more)
        assert result.code == 2
        assert "neither a folder here nor downloaded yet" in result.err


def test_a_folder_of_that_name_is_planned_by_its_files(script, tiny_sd3, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub_id = HUB_IDS["sd3.5-large"]
    (tmp_path / "stabilityai").mkdir()
    (tmp_path / hub_id).symlink_to(tiny_sd3, target_is_directory=True)
    result = script(TRAINING_SCRIPT, "--pretrained_model_name_or_path", hub_id, "--plan")
    assert result.code == 0
    assert "known here" not in result.out
    assert "of 2 blocks recomputed" in result.out
