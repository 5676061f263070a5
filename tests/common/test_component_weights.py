"""A component's weights: what is refused before anything computes, and by what weights are known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common import component_weights
from sd3_lora.common.command_line import UserError
from sd3_lora.common.component_weights import missing_shards, tensors_hash
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.embedding_store import EmbeddingStore

import pytest
import torch
from conftest import PROMPT, Prepared, Result
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

Change = Callable[[dict[str, torch.Tensor]], None]
# One tensor of each kind; of T5's embedding the files have one of two names.
TENSORS = {
    "text_encoder": ["text_model.encoder.layers.1.mlp.fc1.weight", "text_projection.weight"],
    "text_encoder_2": ["text_model.embeddings.position_embedding.weight", "text_model.final_layer_norm.bias"],
    "text_encoder_3": ["shared.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"],
    "vae": ["decoder.conv_out.bias", "encoder.mid_block.attentions.0.to_q.weight"],
    "transformer": ["transformer_blocks.1.attn.to_k.weight", "pos_embed.pos_embed"],
}


@pytest.fixture
def model(tiny_sd3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD3 to break."""
    return Path(shutil.copytree(tiny_sd3, tmp_path / "model"))


def weights_of(model: Path, component: str) -> Path:
    (path,) = (model / component).glob("*.safetensors")
    return path


def change(model: Path, component: str, edit: Change) -> None:
    path = weights_of(model, component)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def refusal(model: Path, component: str) -> str:
    with pytest.raises(UserError) as caught:
        ModelFiles(ModelConfig(str(model))).component(component)
    return str(caught.value).replace(str(model), "MODEL")


@pytest.mark.parametrize(("component", "name"), [(part, name) for part, names in TENSORS.items() for name in names])
def test_a_missing_tensor_or_one_of_another_shape(model: Path, component: str, name: str) -> None:
    whole = load_file(weights_of(model, component))[name].clone()

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(2, *whole.shape)

    change(model, component, reshape)
    assert refusal(model, component) == (
        f"MODEL/{component}: {name} is of shape {(2, *whole.shape)} and by its config.json {tuple(whole.shape)}: "
        "give the weights the config.json that they were saved with"
    )
    change(model, component, lambda tensors: drop(tensors, name))
    assert refusal(model, component) == (
        f"MODEL/{component} lacks {name}"
        f"{' (and 1 more)' if name == 'shared.weight' else ''}, which its config.json asks for: delete the folder and "
        "download it again, or check --variant"
    )


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("text_encoder", "text_model.encoder.layers.9.mlp.fc1.weight"),
        ("text_encoder_3", "encoder.block.9.layer.0.SelfAttention.q.weight"),
        ("vae", "quant_conv.weight"),
        ("transformer", "transformer_blocks.2.attn.to_q.bias"),
    ],
)
def test_a_tensor_that_the_configuration_has_no_place_for(model: Path, component: str, name: str) -> None:
    """Weights of a deeper model beside the configuration of a shallower one would compute something else."""
    change(model, component, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    assert refusal(model, component).startswith(f"MODEL/{component} holds {name}, which its config.json has no place")


@pytest.mark.parametrize(
    ("component", "name", "noted"),
    [
        ("text_encoder", "text_model.embeddings.position_ids", False),  # as transformers saved it until 4.31
        ("text_encoder", "vision_model.post_layernorm.weight", True),
        ("text_encoder_3", "decoder.block.0.layer.0.SelfAttention.q.weight", True),
    ],
)
def test_other_parts_of_a_whole_model_are_left_out(
    model: Path, capsys: pytest.CaptureFixture[str], component: str, name: str, noted: bool
) -> None:
    change(model, component, lambda tensors: tensors.update({name: torch.zeros(1, 4)}))
    ModelFiles(ModelConfig(str(model))).component(component)
    note = f"note: {model / component} holds {name}, which is no part of the encoder: left out\n"
    assert capsys.readouterr().out == (note if noted else "")


@pytest.mark.parametrize("stream", [False, True])
def test_t5_s_embedding_under_its_other_name(
    script: Callable[..., Result], prepared: Prepared, model: Path, tmp_path: Path, stream: bool
) -> None:
    change(model, "text_encoder_3", lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    words = ["--instance_data_dir", prepared.pictures, "--instance_prompt", PROMPT, "--max_sequence_length", 20]
    words += ["--t5_precision", "fp32", *(["--t5_stream"] if stream else [])]
    written = []
    for folder in (model, prepared.model):
        path = tmp_path / f"{folder.name}.parquet"
        result = script("compute_embeddings", *words, "--pretrained_model_name_or_path", folder, "--output_path", path)
        assert result.code == 0, result.err
        with EmbeddingStore(path) as store:
            written.append(store.read(PROMPT).prompt_embeds)
    assert torch.equal(*written)


@pytest.fixture
def sharded(model: Path) -> Path:
    """With T5 in shards."""
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder_3")
    weights_of(model, "text_encoder_3").unlink()
    encoder.save_pretrained(model / "text_encoder_3", max_shard_size="50KB")
    assert len(list((model / "text_encoder_3").glob("*.safetensors"))) > 2
    return model


def test_a_missing_shard(sharded: Path) -> None:
    folder = sharded / "text_encoder_3"
    ModelFiles(ModelConfig(str(sharded))).component("text_encoder_3")
    shards = sorted(folder.glob("*.safetensors"))
    assert missing_shards(folder, None) == []
    shards[1].unlink()
    assert missing_shards(folder, None) == [shards[1].name]
    assert refusal(sharded, "text_encoder_3") == (
        f"MODEL/text_encoder_3 lacks {shards[1].name}, which its index lists: download it again, or check --variant"
    )


def test_an_index_that_is_missing_broken_or_of_other_files(sharded: Path) -> None:
    folder = sharded / "text_encoder_3"
    (index,) = folder.glob("*.index.json")
    text, first = index.read_text(), sorted(folder.glob("*.safetensors"))[0].name
    index.write_text(text[:100])
    assert refusal(sharded, "text_encoder_3") == (
        f"MODEL/text_encoder_3/{index.name} is not whole: delete it and download it again"
    )
    content = json.loads(text)
    content["weight_map"] = {n: file for n, file in content["weight_map"].items() if file != first}
    index.write_text(json.dumps(content))
    assert f"has neither model.safetensors nor an index that lists {first}:" in refusal(sharded, "text_encoder_3")
    index.unlink()
    assert f"has neither model.safetensors nor an index that lists {first} (and" in refusal(sharded, "text_encoder_3")


@pytest.mark.parametrize("component", [name for name in TENSORS if name != "transformer"])
def test_a_configuration_of_which_no_model_can_be_made(model: Path, component: str) -> None:
    path = model / component / "config.json"
    numbers = {"num_attention_heads": 0, "num_heads": "x", "block_out_channels": 3, "hidden_size": -1, "d_model": -1}
    path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    said = refusal(model, component)
    assert said.startswith(f"no model can be made of MODEL/{component}/config.json (")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder_3", "num_layers"),
        ("vae", "layers_per_block"),
        ("transformer", "num_layers"),
    ],
)
def test_a_configuration_of_more_layers_than_there_are_tensors(
    model: Path, monkeypatch: pytest.MonkeyPatch, component: str, key: str
) -> None:
    """To make the model first would take hours, and all memory."""
    path = model / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 2**31}))
    monkeypatch.setattr(component_weights, "_make_model", lambda *_: pytest.fail("it was made"))
    said = refusal(model, component)
    assert said.startswith(f"MODEL/{component}/config.json asks for {key} 2147483648, where the files hold ")


# By what weights are known


def test_the_hash_is_of_the_tensors(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((40, 50), float(i)) for i in range(4)}
    save_file(tensors, tmp_path / "whole", {"format": "pt"})
    for i in range(2):
        save_file({n: tensors[n] for n in (f"t{i}", f"t{i + 2}")}, tmp_path / f"shard{i}")
    whole = tensors_hash([tmp_path / "whole"])
    assert whole is not None
    assert tensors_hash([tmp_path / "shard1", tmp_path / "shard0"]) == whole
    for other in (
        tensors | {"t1": tensors["t1"] + 1},
        tensors | {"t1": tensors["t1"].reshape(50, 40)},
        tensors | {"t1": tensors["t1"].half()},
        {("t9" if name == "t1" else name): tensor for name, tensor in tensors.items()},
    ):
        save_file(other, tmp_path / "other")
        assert tensors_hash([tmp_path / "other"]) != whole
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", (tmp_path / "whole").read_bytes()[:50]):
        (tmp_path / "other").write_bytes(content)
        assert tensors_hash([tmp_path / "other"]) is None
