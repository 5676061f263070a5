"""The reference's own commands, as its notebook and READMEs have them.

Of diffusers' examples/research_projects/sd3_lora_colab and examples/dreambooth/README_sd3.md only names (the model's,
the training script's, the data set's), `--resolution` and `--max_train_steps` are changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import PROJECT, TRAINING_SCRIPT, Result, save_pictures
from diffusers import DiffusionPipeline
from hub_server import TOKEN, Hub
from safetensors import safe_open
from training_runs import Script

EMBED = "python compute_embeddings.py"
TRAIN = """
accelerate launch train_dreambooth_sd3_lora_miniature.py \
  --pretrained_model_name_or_path="miniature"  \
  --instance_data_dir="dog" \
  --data_df_path="sample_embeddings.parquet" \
  --output_dir="trained-sd3-lora-miniature" \
  --mixed_precision="fp16" \
  --instance_prompt="a photo of sks dog" \
  --resolution=128 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 --gradient_checkpointing \
  --use_8bit_adam \
  --learning_rate=1e-4 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=2 \
  --seed="0"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts, as the reference's is, and in it `dog`, as huggingface_hub leaves it."""
    folder = tmp_path_factory.mktemp("reference")
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("sd3_lora", "miniature"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in save_pictures(folder / "dog", [(160, 120), (128, 128), (120, 160), (150, 150), (140, 130)]):
        path.rename(path.with_name(f"alvan-nee-{path.stem}.jpeg"))
    cache = folder / "dog" / ".cache" / "huggingface"
    cache.mkdir(parents=True)
    (cache / "alvan-nee-00.jpeg").write_bytes(b"the reference opens this one, and fails")
    return folder


def run(command: str, folder: Path) -> str:
    """Types a command in the folder; returns what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program, *words = shlex.split(command)
    result = subprocess.run(
        [shutil.which(program, path=path), *words],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_references_notebook_from_its_first_script_to_its_picture(folder, monkeypatch):
    out = run(EMBED, folder)
    assert "5 pictures in dog" in out
    assert (folder / "sample_embeddings.parquet").is_file()

    out = run(TRAIN, folder)
    assert "in a process of its own: python precompute_latents.py" in out
    assert "wrote" in out
    if importlib.util.find_spec("wandb") is None:
        assert "wandb is not installed, so nothing is sent to it" in out
    if not torch.cuda.is_available():
        assert "fp16 runs in fp32" in out
    lora = folder / "trained-sd3-lora-miniature" / "pytorch_lora_weights.safetensors"
    with safe_open(lora, "pt") as file:
        added = {key: file.get_tensor(key) for key in file.keys() if ".lora_B." in key}  # noqa: SIM118
    unchanged = [key.split(".lora_B")[0] for key, tensor in added.items() if not tensor.any()]
    # The last block's answer to the text is not used by anything, so its queries have no gradient.
    assert unchanged == ["transformer.transformer_blocks.5.attn.add_q_proj"]
    assert len(added) > 40

    monkeypatch.chdir(folder)
    pipeline = DiffusionPipeline.from_pretrained("miniature", torch_dtype=torch.float16)
    lora_output_path = "trained-sd3-lora-miniature"
    pipeline.load_lora_weights(lora_output_path)
    if torch.cuda.is_available():
        pipeline.enable_sequential_cpu_offload()
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks dog in a bucket", num_inference_steps=4).images[0]
    image.save("bucket_dog.png")
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 1  # not black


# README_sd3.md

DOG = """
accelerate launch train_dreambooth_lora_sd3.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --output_dir=$OUTPUT_DIR \
  --mixed_precision="fp16" \
  --instance_prompt="a photo of sks dog" \
  --resolution=512 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --learning_rate=4e-4 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=500 \
  --validation_prompt="A photo of sks dog in a bucket" \
  --validation_epochs=25 \
  --seed="0" \
  --push_to_hub
"""
YARN_ART = """
accelerate launch train_dreambooth_lora_sd3.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --output_dir=$OUTPUT_DIR \
  --dataset_name="Norod78/Yarn-art-style" \
  --instance_prompt="a photo of TOK yarn art dog" \
  --resolution=1024 \
  --train_batch_size=1 \
  --train_text_encoder\
  --gradient_accumulation_steps=1 \
  --optimizer="prodigy"\
  --learning_rate=1.0 \
  --text_encoder_lr=1.0 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=1500 \
  --rank=32 \
  --seed="0" \
  --push_to_hub
"""

WHOLE = """
accelerate launch train_dreambooth_sd3.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --output_dir=$OUTPUT_DIR \
  --mixed_precision="fp16" \
  --instance_prompt="a photo of sks dog" \
  --resolution=1024 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=500 \
  --validation_prompt="A photo of sks dog in a bucket" \
  --validation_epochs=25 \
  --seed="0" \
  --push_to_hub
"""


def words_of(command: str, model: Path) -> list[str]:
    """The command's flags, with other names and fewer steps; the whole transformer's script is ours with --full."""
    exchanged = {
        "$MODEL_NAME": str(model),
        "$INSTANCE_DIR": "dog",
        "$OUTPUT_DIR": "trained-sd3-lora",
        "Norod78/Yarn-art-style": "yarn",
        "=1024": "=64",
        "=512": "=64",
        "=500": "=2",
        "=1500": "=2",
    }
    for name, ours in exchanged.items():
        command = command.replace(name, ours)
    _, _, script, *words = shlex.split(command)
    ours = {"train_dreambooth_lora_sd3.py": [], "train_dreambooth_sd3.py": ["--full"]}
    return [*ours[script], *words]


def typed(script: Script, words: list[str]) -> Result:
    """It runs as it is typed."""
    result = script(TRAINING_SCRIPT, *words)
    assert result.code == 0, result.out + result.err
    return result


def test_readme_sd3s_dog(
    script: Script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """One command, as there: stage one is run by itself, in processes of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    save_pictures(Path("dog"), [(80, 64), (64, 64)])
    words = words_of(DOG, tiny_sd3)
    result = typed(script, words)
    first, second = (line for line in result.out.splitlines() if "in a process of its own" in line)
    assert first.startswith("sample_embeddings.parquet is not there yet; in a process of its own: python compute_embed")
    assert "--instance_prompt 'a photo of sks dog'" in first
    assert second.startswith("latents holds no latents yet; in a process of its own: python precompute_latents.py ")
    assert "batch 1 × accumulation 4 × processes 1, 2 steps, learning rate 0.0004 constant, weighting" in result.out
    assert "--validation_prompt 'A photo of sks dog in a bucket'" in first
    assert Path("trained-sd3-lora/samples/step_000002/00_a-photo-of-sks-dog-in-a-bucket_00.png").is_file()
    lora = Path("trained-sd3-lora/pytorch_lora_weights.safetensors")
    assert hub.repos["alice/trained-sd3-lora"][lora.name] == lora.read_bytes()
    again = script(TRAINING_SCRIPT, *words, "--output_dir", "again")
    assert again.code == 0
    assert "in a process of its own" not in again.out


def test_readme_sd3s_yarn_art(
    script: Script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """With a data set of the library `datasets`, whose captions are not read without --caption_column."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    paths = save_pictures(tmp_path / "source", [(64, 64), (64, 90), (90, 64)])
    give_data_set(monkeypatch, "yarn", paths)
    words = words_of(YARN_ART, tiny_sd3)
    result = typed(script, words)
    assert "data set yarn: 3 pictures" in result.out
    assert "prodigy, learning rate 1 constant" in result.out
    assert "CLIPs' learning rate 1" in result.out
    record = json.loads(Path("trained-sd3-lora/run.json").read_text())
    assert record["prompts"] == ["a photo of TOK yarn art dog"]
    with safe_open("trained-sd3-lora/pytorch_lora_weights.safetensors", "pt") as file:
        ranks = {len(file.get_tensor(key)) for key in file.keys() if ".lora_A." in key}  # noqa: SIM118
        models = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert ranks == {32}
    assert models == {"transformer", "text_encoder", "text_encoder_2"}
    assert "run.json" in hub.repos["alice/trained-sd3-lora"]


def test_readme_sd3s_whole_transformer(
    script: Script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """Accumulation, validation and the upload included; what is drawn and uploaded is a whole model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    save_pictures(Path("dog"), [(80, 64), (64, 64)])
    result = typed(script, words_of(WHOLE, tiny_sd3))
    assert "batch 1 × accumulation 4 × processes 1, 2 steps, adamw_8bit, learning rate 0.0001 constant" in result.out
    assert "note: --gradient_accumulation_steps keeps a gradient for each weight" in result.out
    assert Path("trained-sd3-lora/samples/step_000002/00_a-photo-of-sks-dog-in-a-bucket_00.png").is_file()
    weights = Path("trained-sd3-lora/transformer/diffusion_pytorch_model.safetensors")
    assert hub.repos["alice/trained-sd3-lora"]["/".join(weights.parts[1:])] == weights.read_bytes()
    pipeline = DiffusionPipeline.from_pretrained("trained-sd3-lora")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks dog in a bucket", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def give_data_set(monkeypatch: pytest.MonkeyPatch, name: str, paths: list[Path]) -> None:
    """Has a stand-in for `datasets`, which need not be installed, answer to a name with pictures and captions."""

    class Image:
        def __init__(self, decode: bool = True):
            self.decode = decode

    class Rows(list):  # type: ignore[type-arg]
        features: ClassVar = {"image": Image(), "text": object()}
        column_names: ClassVar = ["image", "text"]

        def select_columns(self, names: list[str]) -> Rows:
            return Rows({name: row[name] for name in names} for row in self)

        def cast_column(self, name: str, kind: Image) -> Rows:
            assert (name, kind.decode) == ("image", False)
            return self

    def load_dataset(asked: str, config: str | None, cache_dir: str | None = None, **_: object) -> dict[str, Rows]:
        assert (asked, config) == (name, None)
        return {
            "train": Rows({"image": {"bytes": path.read_bytes(), "path": path.name}, "text": "x"} for path in paths)
        }

    library = ModuleType("datasets")
    library.Image, library.load_dataset, library.__version__ = Image, load_dataset, "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
