"""The LoRA: which layers, in which precision, and a file that draws the same in diffusers."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import sd3_lora.training.state
import sd3_lora.transformer.added_layers
import sd3_lora.transformer.lora
from sd3_lora.common.command_line import UserError
from sd3_lora.common.run_record import RunRecord
from sd3_lora.transformer.added_layers import AddedLora
from sd3_lora.transformer.lora import (
    DEFAULT_LAYERS,
    LORA_FILE,
    attach_lora,
    lora_tensors,
    read_lora_record,
    save_lora,
    target_modules,
)

import pytest
import torch
from conftest import PROMPT, Prepared
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import Script, train

RECORD = {"base_model": "tiny", "trigger": PROMPT, "instance_prompts": [PROMPT, "ein Röbötér"], "seed": 0}


def load_transformer(model: Path, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(model / "transformer", torch_dtype=dtype)


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    return load_transformer(tiny_sd3)


@pytest.fixture
def trained(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """With a LoRA of rank 4 and alpha 12 that matters, as if it had been trained."""
    attach_lora(transformer, target_modules(transformer, None, None), 4, 12.0, 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return transformer


def output(transformer: SD3Transformer2DModel, with_gradient: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.set_grad_enabled(with_gradient):
        return transformer(
            hidden_states=torch.randn(2, 16, 8, 8, generator=generator).to(transformer.dtype),
            timestep=torch.tensor([900.0, 100.0]),
            encoder_hidden_states=torch.randn(2, 97, 48, generator=generator).to(transformer.dtype),
            pooled_projections=torch.randn(2, 24, generator=generator).to(transformer.dtype),
        ).sample


# Layers and blocks


def test_default_layers(transformer: SD3Transformer2DModel) -> None:
    """Both streams' projections in every block; the last block drops its text stream, and that one's output layer."""
    first, last = ([f"transformer_blocks.{i}.{layer}" for layer in DEFAULT_LAYERS] for i in (0, 1))
    last.remove("transformer_blocks.1.attn.to_add_out")
    assert target_modules(transformer, None, None) == sorted(first + last)


@pytest.mark.parametrize(
    ("layers", "blocks", "names"),
    [
        (["attn.to_k", "attn.to_q"], None, ["0.attn.to_k", "0.attn.to_q", "1.attn.to_k", "1.attn.to_q"]),
        (["attn.to_k"], [1], ["1.attn.to_k"]),
        (["attn.to_add_out"], None, ["0.attn.to_add_out"]),
        (["ff.net.0.proj"], [0], ["0.ff.net.0.proj"]),
        (["to_k", "attn.to_k"], [0], ["0.attn.to_k"]),
    ],
)
def test_chosen_layers(
    transformer: SD3Transformer2DModel, layers: list[str], blocks: list[int] | None, names: list[str]
) -> None:
    assert target_modules(transformer, layers, blocks) == [f"transformer_blocks.{name}" for name in names]


@pytest.mark.parametrize("layer", ["attn.to_z", "ttn.to_k", "attn", "", "norm1.linear.0"])
def test_an_unknown_layer(transformer: SD3Transformer2DModel, layer: str) -> None:
    with pytest.raises(UserError) as error:
        target_modules(transformer, ["attn.to_k", layer], None)
    assert str(error.value).startswith(f"--lora_layers {layer} is in no block: the layers are ")
    for known in (*DEFAULT_LAYERS, "ff.net.0.proj", "norm1.linear"):
        assert known in str(error.value)


def test_an_unknown_block(transformer: SD3Transformer2DModel) -> None:
    with pytest.raises(UserError, match=r"^--lora_blocks 2: this transformer has the blocks 0 to 1$"):
        target_modules(transformer, None, [0, 2])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora_layers", "attn.to_z"], "--lora_layers attn.to_z is in no block"),
        (["--lora_blocks", "7"], "--lora_blocks 7: this transformer has the blocks 0 to 1"),
        (["--lora_blocks", "one"], "--lora_blocks one is not a list of numbers: type for example 12,13"),
    ],
)
def test_training_refuses_them(script: Script, prepared: Prepared, tmp_path: Path, words: list[str], says: str) -> None:
    run = train(script, prepared, tmp_path, *words, code=2)
    assert says in run.error
    assert run.wrote_no_weights()


def test_training_takes_them(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--lora_layers", "attn.to_k, ff.net.2", "--lora_blocks", "0, 1", "--rank", 3]
    tensors = train(script, prepared, tmp_path, *words).lora
    names = {f"transformer.transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.to_k", "ff.net.2")}
    assert tensors.keys() == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    assert tensors["transformer.transformer_blocks.0.ff.net.2.lora_A.weight"].shape == (3, 128)
    assert tensors["transformer.transformer_blocks.0.ff.net.2.lora_B.weight"].shape == (32, 3)


# Attaching


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attached_in_float32_to_a_frozen_base(tiny_sd3: Path, dtype: torch.dtype) -> None:
    transformer = load_transformer(tiny_sd3, dtype)
    parameters = attach_lora(transformer, target_modules(transformer, None, None), 4, 8.0, 0.0, seed=0)
    trainable = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert {id(p) for p in parameters} == {id(p) for p in trainable.values()}
    assert len(trainable) == 2 * 15
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    frozen = {name: p for name, p in transformer.named_parameters() if not p.requires_grad}
    assert not any(".lora_" in name for name in frozen)
    assert {p.dtype for p in frozen.values()} == {dtype}


@pytest.mark.parametrize("spare", [0, 4], ids=["rank 4", "multiplied as 8"])
@pytest.mark.parametrize(("alpha", "dropout"), [(4.0, 0.0), (12.0, 0.0), (12.0, 0.3)])
def test_velocities_and_gradients_are_those_of_pefts_own_layers(
    tiny_sd3: Path, alpha: float, dropout: float, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd3_lora.transformer.added_layers, "_spare_rank", lambda *_: spare)

    def train(expected: type) -> list[torch.Tensor]:
        transformer = load_transformer(tiny_sd3)
        parameters = attach_lora(transformer, target_modules(transformer, None, None), 4, alpha, dropout, seed=0)
        layers = [module for module in transformer.modules() if isinstance(module, Linear)]
        assert {type(layer) for layer in layers} == {expected}
        generator = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(3)
        velocity = output(transformer.train(), with_gradient=True)
        velocity.square().mean().backward()
        return [velocity.detach(), *(p.grad for p in parameters if p.grad is not None)]

    mine = train(AddedLora)
    monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda *_: None)
    for found, expected in zip(mine, train(Linear), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6 * expected.abs().max().item() + 1e-9, rtol=1e-4)


def test_an_adapter_is_switched_off_and_on(tiny_sd3: Path) -> None:
    """As diffusers does it, and as peft's layer is asked to; off, the base gives its very bits."""
    base = output(load_transformer(tiny_sd3))
    transformer = load_transformer(tiny_sd3)
    for parameter in attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, seed=0):
        parameter.data.normal_(0, 0.2)
    layers = [module for module in transformer.modules() if isinstance(module, AddedLora)]
    adapted = output(transformer)
    assert not torch.equal(adapted, base)
    transformer.disable_lora()
    assert all(layer.disable_adapters for layer in layers)
    assert torch.equal(output(transformer), base)
    transformer.enable_lora()
    assert torch.equal(output(transformer), adapted)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(output(transformer), adapted, rtol=1e-4, atol=1e-5)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(output(transformer), adapted, rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up(tiny_sd3: Path) -> None:
    """Through peft's own layer, which the fast one hands them to."""

    def drawn(names: list[str], kind: type) -> torch.Tensor:
        transformer = load_transformer(tiny_sd3)
        targets = target_modules(transformer, None, None)
        for name in ("default", "second"):
            config = LoraConfig(r=2, target_modules=targets)
            if kind is AddedLora:
                config._register_custom_module({torch.nn.Linear: AddedLora})
            transformer.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(transformer.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        transformer.set_adapters(names)
        return output(transformer)

    both = drawn(["default", "second"], AddedLora)
    torch.testing.assert_close(both, drawn(["default", "second"], Linear), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, drawn(["default"], AddedLora), rtol=1e-4, atol=1e-5)


def test_ranks_that_tensor_cores_take() -> None:
    for device, spare in (("cuda", [7, 4, 1, 0, 7, 0]), ("cpu", [0] * 6), ("meta", [0] * 6)):
        assert [
            sd3_lora.transformer.added_layers._spare_rank(rank, torch.device(device)) for rank in (1, 4, 7, 8, 9, 128)
        ] == spare


def test_three_products_and_nothing_else() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    layer = AddedLora(torch.nn.Linear(8, 6), "default", LoraConfig(r=2), r=2, lora_alpha=6)
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), Seen():
        layer(x)
    views = {"t", "view", "_unsafe_view", "transpose", "permute", "expand", "alias", "detach"}
    assert [name for name in names if name not in views] == ["addmm", "mm", "addmm"]


def test_b_is_zero_and_a_is_gaussian_by_the_seed(tiny_sd3: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        torch.rand(7)  # what was drawn before does not count
        transformer = load_transformer(tiny_sd3)
        before = output(transformer)
        attach_lora(transformer, target_modules(transformer, None, None), 16, 16.0, 0.0, seed)
        assert torch.equal(output(transformer), before)
        made.append(lora_tensors(transformer))
    first, again, other = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.std().item() == pytest.approx(1 / 16, rel=0.2)


# The file


def test_names_and_shapes_are_diffusers(trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    path = save_lora(tmp_path, trained, RECORD)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    tensors = load_file(path)
    modules = dict(trained.named_modules())
    assert len(tensors) == 30
    for name, tensor in tensors.items():
        target, part = name.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        base = modules[target].base_layer
        assert tensor.shape == ((4, base.in_features) if part == "lora_A" else (base.out_features, 4))
        assert tensor.dtype == torch.float32


def test_alpha_is_folded_into_b(trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    saved = load_file(save_lora(tmp_path, trained, RECORD))
    for name, tensor in lora_tensors(trained).items():
        factor = 3.0 if "lora_B" in name else 1.0
        assert torch.equal(saved[f"transformer.{name}"], factor * tensor)


def test_metadata(tiny_sd3: Path, trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    path = save_lora(tmp_path, trained, RECORD)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == 4
    assert adapter["transformer.target_modules"] == target_modules(load_transformer(tiny_sd3), None, None)
    assert read_lora_record(path) == {**RECORD, "rank": 4}
    assert "Röbötér" in metadata["sd3_lora"]


def test_what_training_notes(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    train(script, prepared, tmp_path, "--rank", 3)
    expected = {
        "rank": 3,
        "base_model": prepared.model.name,  # its path is nobody else's business
        "revision": None,
        "instance_prompts": [PROMPT],
        "trigger": PROMPT,
        "max_sequence_length": 20,
        "resolution": 64,
        "seed": 0,
        "steps": 3,
    }
    assert read_lora_record(tmp_path / LORA_FILE) == expected


def without_metadata(path: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file(load_file(path), folder / LORA_FILE)
    return folder / LORA_FILE


@pytest.mark.parametrize("stripped", [False, True], ids=["with metadata", "stripped"])
def test_diffusers_computes_what_was_trained(
    tiny_sd3: Path, trained: SD3Transformer2DModel, tmp_path: Path, stripped: bool
) -> None:
    """alpha 12 and rank 4: three times too weak if either the folding or the metadata's alpha were wrong."""
    path = save_lora(tmp_path, trained, RECORD)
    if stripped:
        path = without_metadata(path, tmp_path / "stripped")
    loaded = load_transformer(tiny_sd3)
    before = output(loaded)
    loaded.load_lora_adapter(str(path.parent), weight_name=path.name)
    expected = output(trained)
    torch.testing.assert_close(output(loaded), expected, atol=1e-6, rtol=1e-6)
    assert (before - expected).abs().max() > 0.1


def test_the_stock_pipeline_draws_with_it(tiny_sd3: Path, trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    path = save_lora(tmp_path, trained, RECORD)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        words = {"num_inference_steps": 3, "height": 64, "width": 64, "max_sequence_length": 20}
        return torch.tensor(pipeline(PROMPT, generator=generator, output_type="np", **words).images)

    without = draw()
    stock = pipeline.transformer
    pipeline.transformer = trained
    expected = draw()
    pipeline.transformer = stock
    pipeline.load_lora_weights(path.parent)
    torch.testing.assert_close(draw(), expected, atol=1e-5, rtol=0)
    assert (without - expected).abs().max() > 0.01
    stripped = without_metadata(path, tmp_path / "stripped")
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(stripped.parent)
    torch.testing.assert_close(draw(), expected, atol=1e-5, rtol=0)


def test_a_trained_file_is_the_trained_transformer(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the training script, with alpha unlike rank: as it was in memory, so it is when diffusers loads it."""
    kept: list[Any] = []
    original = sd3_lora.transformer.lora.save_lora

    def keep(folder: Path, transformer: SD3Transformer2DModel, *words: Any) -> Path:
        kept.append(copy.deepcopy(transformer).eval())
        return original(folder, transformer, *words)

    monkeypatch.setattr(sd3_lora.training.state, "save_lora", keep)
    words = ["--rank", 2, "--lora_alpha", 16, "--learning_rate", 0.02, "--lora_dropout", 0.1]
    run = train(script, prepared, tmp_path, *words)
    loaded = load_transformer(prepared.model)
    before = output(loaded)
    loaded.load_lora_adapter(str(run.folder), weight_name=LORA_FILE)
    torch.testing.assert_close(output(loaded), output(kept[0]), atol=1e-6, rtol=1e-6)
    assert (output(loaded) - before).abs().max() > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(
    trained: SD3Transformer2DModel, tmp_path: Path, value: float
) -> None:
    good = save_lora(tmp_path, trained, RECORD).read_bytes()
    name = "transformer_blocks.1.attn.to_v.lora_A.default.weight"
    trained.get_parameter(name).data[2, 5] = value
    with pytest.raises(UserError, match=r"NaN or infinity in transformer\.transformer_blocks\.1\.attn\.to_v\.lora_A"):
        save_lora(tmp_path, trained, RECORD)
    assert (tmp_path / LORA_FILE).read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_folding_that_overflows_is_not_written(trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    layer = trained.get_submodule("transformer_blocks.0.attn.to_k")
    layer.scaling["default"] = 1e40
    with pytest.raises(UserError, match="NaN or infinity"):
        save_lora(tmp_path, trained, RECORD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["a bit", "a tensor", "cut short"])
def test_what_is_read_back_is_compared(
    trained: SD3Transformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A disk that lies: the file that was there stays, and nothing else is left."""
    (tmp_path / LORA_FILE).write_bytes(b"of an earlier run")
    original = sd3_lora.transformer.lora.write_tensors

    def save_damaged(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        name = sorted(tensors)[7]
        if damage == "a tensor":
            del tensors[name]
        else:
            tensors[name].view(-1)[3] += 1e-6
        original(path, tensors, metadata)
        if damage == "cut short":
            os.truncate(path, path.stat().st_size - 100)

    monkeypatch.setattr(sd3_lora.transformer.lora, "write_tensors", save_damaged)
    with pytest.raises((OSError, SafetensorError)):
        save_lora(tmp_path, trained, RECORD)
    assert (tmp_path / LORA_FILE).read_bytes() == b"of an earlier run"
    if damage != "cut short":
        assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_the_lora_is_on_disk_before_anything_that_can_fail(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth_sd3_lora_miniature as training

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("after the last step")

    state = sd3_lora.training.state
    for module, name in ((state, "write_state"), (training, "write_model_card"), (RunRecord, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(RuntimeError, match="after the last step"):
                train(script, prepared, tmp_path / name)
        assert len(load_file(tmp_path / name / LORA_FILE)) == 30


# Reading


def test_a_broken_file_is_a_sentence(trained: SD3Transformer2DModel, tmp_path: Path) -> None:
    path = save_lora(tmp_path, trained, RECORD)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_lora_record(path)
    save_file({"a": torch.ones(1)}, path)
    assert read_lora_record(path) == {}  # of another program
