"""The reference's own commands, as its notebook and README have them.

Of diffusers' examples/research_projects/sd3_lora_colab only the model's path, the training script's name,
`--resolution` and `--max_train_steps` are changed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, save_pictures
from diffusers import DiffusionPipeline
from safetensors import safe_open

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
