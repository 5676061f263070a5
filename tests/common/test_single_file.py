"""A base in one file, by the names of Stability's own files, is the model that it was made from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3_lora import convert
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.single_file import ENCODERS, SingleFile, converted_folder

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# diffusers' name of a block's parts → the original's, but for q, k and v, which are one matrix there.
BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
AROUND = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def original_transformer(tensors: Tensors) -> Tensors:
    """By the original's names: shift before scale where a block or the model ends, q, k and v in one."""
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    made: Tensors = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        value = torch.cat(tensor.chunk(2)[::-1]) if layer in swapped else tensor
        _, _, rest = layer.partition("transformer_blocks.")
        number, _, part = rest.partition(".")
        if name == "pos_embed.pos_embed":
            made["pos_embed"] = tensor
        elif layer in AROUND:
            made[f"{AROUND[layer]}.{kind}"] = value
        elif part in BLOCK:
            made[f"joint_blocks.{number}.{BLOCK[part]}.{kind}"] = value
    for number in range(last + 1):
        for fused, parts in FUSED.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{number}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    made[f"joint_blocks.{number}.{fused}.{kind}"] = torch.cat([tensors[name] for name in names])
    return made


def original_vae(tensors: Tensors) -> Tensors:
    """By the names of the latent diffusion VAE, whose attention multiplies by 1 × 1 convolutions."""
    ups = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    made: Tensors = {}
    for name, tensor in tensors.items():
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{ups - 1 - int(found[1])}", name)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        for old, other in (
            ("down_blocks.", "down."), (".resnets.", ".block."), ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("mid_block.attentions.0.to_", "mid.attn_1."),
        ):  # fmt: skip
            new = new.replace(old, other)
        is_matrix = ".attn_1." in new and tensor.ndim == 2
        made[new] = tensor[:, :, None, None] if is_matrix else tensor
    return made


def single_tensors(model: Path) -> Tensors:
    """All of a model, by the names in one file."""
    parts = {"model.diffusion_model.": original_transformer(load_file(next((model / "transformer").glob("*.saf*"))))}
    parts["first_stage_model."] = original_vae(load_file(next((model / "vae").glob("*.saf*"))))
    for component, name in ENCODERS.items():
        parts[f"text_encoders.{name}.transformer."] = load_file(next((model / component).glob("*.safetensors")))
    made = {prefix + name: tensor.contiguous() for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    return {**made, "text_encoders.clip_l.logit_scale": torch.ones(())}


@pytest.fixture(scope="module")
def tensors(tiny_sd3: Path) -> Tensors:
    return single_tensors(tiny_sd3)


def save_single(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), path)
    return path


def components_of(model: Path) -> dict[str, Tensors]:
    return {
        name: {key: value for path in (model / name).glob("*.safetensors") for key, value in load_file(path).items()}
        for name in ("transformer", "vae", *ENCODERS)
    }


def test_every_tensor_is_the_models(
    tensors: Tensors, tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """In shards too, as a large model's are."""
    monkeypatch.setattr("sd3_lora.common.single_file._SHARD_BYTES", 50_000)
    path = save_single(tmp_path / "all in one.safetensors", tensors)
    assert convert.main([str(path), "--parts", str(tiny_sd3)]) == 0
    folder = converted_folder(path)
    assert f"wrote {folder}" in capsys.readouterr().out
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    expected = components_of(tiny_sd3)
    for component, found in components_of(folder).items():
        assert found.keys() == expected[component].keys(), component
        assert all(torch.equal(found[name], expected[component][name]) for name in found), component
    ours, theirs = (ModelFiles(ModelConfig(str(model))) for model in (path, tiny_sd3))
    config = theirs.read_config("transformer")
    assert {key: ours.read_config("transformer")[key] for key in config if key[0] != "_"} == {
        key: value for key, value in config.items() if key[0] != "_"
    }
    parts = ["transformer", "vae", *ENCODERS, "tokenizer"]
    identities = [files.provenance(parts, "", 0).tensors_hash for files in (ours, theirs)]
    assert identities[0] == identities[1]


def test_the_scripts_take_the_file(script, prepared: Prepared, tensors: Tensors, tmp_path: Path) -> None:
    """With the artefacts of the folder that it was made from: the weights are the same."""
    path = save_single(tmp_path / "sd3.safetensors", tensors)
    model = ["--pretrained_model_name_or_path", path]
    draw = [*model, "--data_df_path", prepared.embeddings, "--outdir", tmp_path / "out", "--max_sequence_length", 20]
    draw += ["--prompt", "a photo of sks robot", "--num_steps", 1]
    refused = script("inference", *draw)
    assert refused.code == 2
    assert refused.err == (
        f"error: {path} is one file, which is first laid out as a diffusers folder: type "
        f"`python -m sd3_lora.convert {path}` once\n"
    )
    assert convert.main([str(path), "--parts", str(prepared.model)]) == 0
    drawn = script("inference", *draw)
    assert drawn.code == 0, drawn.err
    assert "no text encoder is loaded" in drawn.out
    words = [path if word == prepared.model else word for word in prepared.flags]
    assert path in words
    trained = script(TRAINING_SCRIPT, *words, "--output_dir", tmp_path / "lora", "--max_train_steps", 1)
    assert trained.code == 0, trained.err
    with path.open("ab") as file:
        file.write(b" ")
    assert f"was made of another file than {path} is now: delete it, and type" in script("inference", *draw).err


def test_what_the_file_lacks_is_taken_from_the_other(tensors: Tensors, tiny_sd3: Path, tmp_path: Path) -> None:
    """A transformer alone, without the prefix, in 8 bits."""
    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in bare.items()}
    path = save_single(tmp_path / "unet.safetensors", narrow)
    assert convert.main([str(path), "--parts", str(tiny_sd3)]) == 0
    found, expected = components_of(converted_folder(path)), components_of(tiny_sd3)
    for component in ("vae", *ENCODERS):
        assert all(torch.equal(found[component][name], tensor) for name, tensor in expected[component].items())
    assert {tensor.dtype for tensor in found["transformer"].values()} == {torch.float16}
    for name, tensor in expected["transformer"].items():
        assert torch.equal(found["transformer"][name], tensor.to(torch.float8_e4m3fn).half()), name


def test_the_shapes_of_sd3_5(tmp_path: Path) -> None:
    """Dual attention in the first blocks and normalized heads, which SD3-Medium's configuration does not have."""
    from small_transformer import smaller_transformer

    transformer = smaller_transformer(num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    tensors = {name: tensor.contiguous() for name, tensor in original_transformer(transformer.state_dict()).items()}
    file = SingleFile(save_single(tmp_path / "sd3.5.safetensors", tensors))
    like = smaller_transformer(num_layers=2, dual_attention_layers=(), qk_norm=None, attention_head_dim=8).config
    config = file.transformer_config(dict(like))
    for key in ("num_layers", "qk_norm", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
        assert config[key] == transformer.config[key], key
    assert tuple(config["dual_attention_layers"]) == (0, 1)
    made = file.tensors("transformer", config)
    assert made.keys() == transformer.state_dict().keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in transformer.state_dict().items())


def test_what_is_wrong_is_one_sentence(
    tensors: Tensors, tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(content: Mapping[str, torch.Tensor] | None, parts: Path = tiny_sd3) -> str:
        path = tmp_path / "bad.safetensors"
        if content is not None:
            save_single(path, content)
        assert convert.main([str(path), "--parts", str(parts)]) == 2
        assert not converted_folder(path).exists()
        assert [each.name for each in tmp_path.iterdir()] == ([path.name] if path.exists() else [])
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no file" in refusal(None)
    assert "holds no transformer of Stable Diffusion 3" in refusal({"first_stage_model.x": torch.ones(1)})
    assert "which is no part of a Stable Diffusion 3 model" in refusal({**tensors, "lora.up": torch.ones(1)})
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight"
    assert "holds scaled 8-bit weights" in refusal({**tensors, name: torch.ones(())})
    for name in ("model.diffusion_model.joint_blocks.0.x_block.extra.weight", "first_stage_model.encoder.extra.bias"):
        assert "extra" in refusal({**tensors, name: torch.ones(2)})
    lacking = {name: tensor for name, tensor in tensors.items() if "y_embedder.mlp.0" not in name}
    assert "lacks y_embedder.mlp.0.weight" in refusal(lacking)
    other = Path(shutil.copytree(tiny_sd3, tmp_path.parent / f"{tmp_path.name}-other"))
    config = other / "text_encoder_3" / "config.json"
    config.write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 99', config.read_text()))
    assert "has tokenizers of another model: its text_encoder_3 knows 99 tokens" in refusal(tensors, other)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    assert "is not a whole safetensors file" in refusal(None)


def test_the_miniature_in_one_file(tmp_path: Path) -> None:
    path = save_single(tmp_path / "miniature.safetensors", single_tensors(MINIATURE))
    file = SingleFile(path)
    files = ModelFiles(ModelConfig(str(MINIATURE)))
    config = files.read_config("transformer")
    made = file.transformer_config(config)
    assert {key: value for key, value in made.items() if config[key] != value} == {}


def test_a_mistyped_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """As of the other commands, where argparse alone would print its usage."""
    assert convert.main(["a.safetensors", "--part", "x"]) == 2
    assert capsys.readouterr().err == "error: unknown argument --part: type --parts\n"
    assert convert.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the following arguments are required: --file")
