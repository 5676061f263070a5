"""The frozen transformer: diffusers' own bits, one tensor at a time, and 4-bit layers that a LoRA trains on."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.packed_tensors import layout
from sd3_lora.plan.step_time import model_costs
from sd3_lora.transformer import base_weights
from sd3_lora.transformer.added_layers import AddedLora
from sd3_lora.transformer.base_weights import base_bytes, load_transformer
from sd3_lora.transformer.lora import attach_lora, save_lora, target_modules
from sd3_lora.transformer.streaming import pieces_of

import bitsandbytes
import diffusers.models.embeddings
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import PROMPT
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# dtype, precision, double quantization
NF4 = [(torch.float32, "nf4", True), (torch.float16, "nf4", False), (torch.float16, "nf4", True)]
# 20 × 20 weights are no multiple of a quantization block.
SHAPES: dict[str, Any] = {
    "sample_size": 8, "num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 20, "joint_attention_dim": 48,
    "caption_projection_dim": 20, "pooled_projection_dim": 24, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1),
}  # fmt: skip


def save_model(folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None, **changes: Any) -> Path:
    """A pipeline's folder with nothing but a random transformer in it, in several shards; returns `folder`."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**SHAPES | changes).to(dtype)
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB", variant=variant)
    shutil.copy(MINIATURE / "model_index.json", folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SD3.5-Medium, in float32 shards: dual attention and norms of queries and keys."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    assert len(list(folder.glob("transformer/*.safetensors"))) > 1
    return folder


def files_of(folder: Path, **more: Any) -> ModelFiles:
    return ModelFiles(ModelConfig(str(folder), **more))


def stock(folder: Path, dtype: torch.dtype, **more: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype, **more)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": torch.randn(2, 97, 48, generator=generator).to(dtype),
        "pooled_projections": torch.randn(2, 24, generator=generator).to(dtype),
    }


@torch.no_grad()
def output(transformer: SD3Transformer2DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return transformer(**inputs(dtype)).sample


def require_equal(loaded: SD3Transformer2DModel, expected: SD3Transformer2DModel, dtype: torch.dtype) -> None:
    """Every parameter and buffer, and the answer, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(loaded, kind)()), dict(getattr(expected, kind)())
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert tensor.device == CPU, name
            assert torch.equal(tensor, theirs[name]), name
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(output(loaded, dtype), output(expected, dtype))


# As from_pretrained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_equal_to_from_pretrained(model: Path, tmp_path: Path, dtype: torch.dtype, saved: torch.dtype) -> None:
    folder = model if saved == torch.float32 else save_model(tmp_path, saved)
    loaded = load_transformer(files_of(folder), CPU, dtype)
    require_equal(loaded, stock(folder, dtype), dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_buffer_that_no_file_holds_is_computed(tmp_path: Path) -> None:
    save_model(tmp_path, pos_embed_max_size=None)
    for dtype in DTYPES:
        loaded = load_transformer(files_of(tmp_path), CPU, dtype)
        assert "pos_embed.pos_embed" not in loaded.state_dict()
        assert loaded.pos_embed.pos_embed.abs().sum() > 1
        require_equal(loaded, stock(tmp_path, dtype), dtype)


def test_everything_goes_to_the_device(tmp_path: Path) -> None:
    """Buffers included; the meta device stands for a GPU."""
    save_model(tmp_path, pos_embed_max_size=None)
    loaded = load_transformer(files_of(tmp_path), torch.device("meta"), torch.float16)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"meta"}
    assert loaded.proj_out.weight.dtype == torch.float16


def test_the_variant_is_loaded(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(7)
    other = SD3Transformer2DModel(**SHAPES).half()
    other.save_pretrained(tmp_path / "transformer", max_shard_size="60KB", variant="fp16")
    for variant, expected in (("fp16", other), (None, stock(model, torch.float16))):
        loaded = load_transformer(files_of(tmp_path, variant=variant), CPU, torch.float16)
        require_equal(loaded, expected.eval(), torch.float16)


# What the files must hold


@pytest.fixture
def broken(tmp_path: Path, tiny_sd3: Path) -> dict[str, torch.Tensor]:
    """The tensors of a copy of the tiny model at `tmp_path`, to change and to write back with `refusal`."""
    shutil.copytree(tiny_sd3 / "transformer", tmp_path / "transformer")
    shutil.copy(tiny_sd3 / "model_index.json", tmp_path)
    return load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")


def refusal(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError) as caught:
        load_transformer(files_of(folder), CPU, torch.float32)
    assert str(caught.value).startswith(f"{folder / 'transformer'}")
    return str(caught.value).removeprefix(f"{folder / 'transformer'}")


def test_a_missing_tensor(broken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    says = ", which its config.json asks for: delete the folder and download it again, or check --variant"
    del broken["proj_out.bias"]
    assert refusal(tmp_path, broken) == f" lacks proj_out.bias{says}"
    del broken["pos_embed.pos_embed"], broken["proj_out.weight"]
    assert refusal(tmp_path, broken) == f" lacks pos_embed.pos_embed (and 2 more){says}"


def test_an_unexpected_tensor(broken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    broken["transformer_blocks.2.attn.to_q.bias"] = torch.zeros(32)
    assert refusal(tmp_path, broken) == (
        " holds transformer_blocks.2.attn.to_q.bias, which its config.json has no place for: "
        "give the weights the config.json that they were saved with"
    )


def test_a_tensor_of_another_shape(broken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    broken["transformer_blocks.1.attn.to_q.weight"] = torch.zeros(32, 16)
    assert refusal(tmp_path, broken) == (
        ": transformer_blocks.1.attn.to_q.weight is of shape (32, 16) and by its config.json (32, 32): "
        "give the weights the config.json that they were saved with"
    )


def test_a_quantized_model(broken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))
    assert refusal(tmp_path, broken).startswith(" is quantized already, which cannot be used here: give ")


# One tensor at a time


@pytest.mark.parametrize("precision", [None, "nf4"])
def test_nothing_is_held_beside_the_result(model: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """At each read: none of what was read before, and as much in the target dtype as the result keeps."""
    files = files_of(model)
    load_transformer(files, CPU, torch.float16, precision)  # what the first call imports is no tensor of ours
    original = TensorFiles.tensor
    read: list[weakref.ref[torch.Tensor]] = []
    kept, names = 0, []

    def half_bytes() -> int:
        found = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        return sum(value.nbytes for value in found if value.device == CPU and value.dtype == torch.float16)

    gc.collect()
    gc.freeze()  # what is there already is not looked at again: hundreds of thousands of objects at each read
    before = half_bytes()

    def tensor(weights: TensorFiles, name: str) -> torch.Tensor:
        nonlocal kept
        assert not [ref for ref in read if ref() is not None]
        assert half_bytes() - before == kept
        value = original(weights, name)
        assert value.dtype == torch.float32
        read.append(weakref.ref(value))
        names.append(name)
        kept += 0 if precision and name in quantized else 2 * value.numel()
        return value

    quantized = {name for name, value in stock(model, torch.float32).state_dict().items() if is_quantized(name, value)}
    monkeypatch.setattr(TensorFiles, "tensor", tensor)
    transformer = load_transformer(files, CPU, torch.float16, precision)
    assert sorted(names) == sorted(stock(model, torch.float32).state_dict())  # each once
    assert half_bytes() - before == kept > 0
    assert transformer.dtype == torch.float16


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("transformer_blocks.") and tensor.ndim == 2


def test_the_files_may_change_afterwards(tmp_path: Path) -> None:
    """Nothing of the result lies in the mapped files, though no conversion is needed."""
    save_model(tmp_path)
    loaded = load_transformer(files_of(tmp_path), CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for path in (tmp_path / "transformer").glob("*.safetensors"):
        with path.open("r+b") as file:  # in place: the same pages
            file.seek(-1000, 2)
            file.write(b"\x11" * 1000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_the_positional_embedding_is_not_computed_only_to_be_replaced(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD3.5's takes 3.4 GiB of the host and 10 seconds."""
    devices = []
    original = diffusers.models.embeddings.get_2d_sincos_pos_embed

    def watched(*words: Any, **more: Any) -> torch.Tensor:
        result = original(*words, **more)
        devices.append(result.device.type)
        return result

    monkeypatch.setattr(diffusers.models.embeddings, "get_2d_sincos_pos_embed", watched)
    load_transformer(files_of(model), CPU, torch.float16)
    assert set(devices) == {"meta"}


# 4 bits


def weights_of(transformer: SD3Transformer2DModel) -> dict[str, torch.nn.Module]:
    """The 4-bit layers by name."""
    found = transformer.named_modules()
    return {name: module for name, module in found if isinstance(module, bitsandbytes.nn.Linear4bit)}


def dequantized(transformer: SD3Transformer2DModel, model: Path) -> SD3Transformer2DModel:
    """Plain layers in float32 with the values that the 4-bit ones stand for."""
    plain = stock(model, torch.float32).requires_grad_(False)
    for name, layer in weights_of(transformer).items():
        plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_the_blocks_linear_layers_are_quantized_and_nothing_else(
    model: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, double: bool
) -> None:
    monkeypatch.setattr(base_weights, "DOUBLE_QUANTIZATION", double)
    transformer, plain = load_transformer(files_of(model), CPU, dtype, "nf4"), stock(model, dtype)
    linears = {
        f"transformer_blocks.{name}"
        for name, module in plain.transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    layers = weights_of(transformer)
    assert layers.keys() == linears
    assert len(linears) == 47
    for name, module in layers.items():
        weight = plain.get_submodule(name).weight
        values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        assert module.weight.dtype == torch.uint8
        assert torch.equal(module.weight, values), name
        assert module.weight.quant_state.nested is double
        assert (module.weight.quant_state.quant_type, module.weight.quant_state.dtype) == ("nf4", dtype)
        assert torch.equal(
            dequantize_4bit(module.weight.data, module.weight.quant_state), dequantize_4bit(values, state)
        )
        assert (module.compute_dtype, module.in_features) == (dtype, weight.shape[1])
    mine, theirs = transformer.state_dict(), plain.state_dict()
    others = [name for name in theirs if name.removesuffix(".weight") not in linears]
    assert len(others) == len(theirs) - 47
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == dtype for name in others)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not any(module.training for module in transformer.modules())
    assert (transformer.dtype, transformer.device) == (dtype, CPU)


def test_the_output_is_that_of_the_dequantized_weights(model: Path) -> None:
    transformer = load_transformer(files_of(model), CPU, torch.float32, "nf4")
    expected = output(dequantized(transformer, model))
    torch.testing.assert_close(output(transformer), expected, atol=1e-6, rtol=1e-5)
    exact = output(stock(model, torch.float32))
    assert 1e-3 < (expected - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_the_dequantized_weights(model: Path, recomputed: bool) -> None:
    """Of the LoRA and of the input, through every frozen 4-bit layer."""
    transformer = load_transformer(files_of(model), CPU, torch.float32, "nf4")
    found = []
    for base in (transformer, dequantized(transformer, model)):
        parameters = with_lora(base)
        if recomputed:
            base.enable_gradient_checkpointing()
        base.train()
        words = {name: value.requires_grad_(name != "timestep") for name, value in inputs(torch.float32).items()}
        base(**words).sample.square().sum().backward()
        leaves = [*parameters, *(value for name, value in words.items() if name != "timestep")]
        found.append([leaf.grad for leaf in leaves])
    assert len(found[0]) == 2 * 23 + 3
    idle = 0
    for mine, theirs in zip(*found, strict=True):
        if theirs is None:  # the last block drops its text stream, so what that asks for has no gradient
            assert mine is None or not mine.any()
            idle += 1
            continue
        torch.testing.assert_close(mine, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)
        idle += not theirs.any()
    assert idle == 2


def with_lora(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
    """A LoRA of rank 4 and alpha 12 that matters, as if it had been trained."""
    parameters = attach_lora(transformer, target_modules(transformer, None, None), 4, 12.0, 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float32_lora_is_trained_on_4_bit_layers(model: Path, dtype: torch.dtype) -> None:
    transformer = load_transformer(files_of(model), CPU, dtype, "nf4")
    parameters = with_lora(transformer)
    names = target_modules(stock(model, dtype), None, None)
    assert all(isinstance(transformer.get_submodule(name), AddedLora) for name in names)
    assert len(parameters) == 2 * len(names)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    base = {name: t.clone() for name, t in transformer.state_dict().items() if ".lora_" not in name}
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # as training, which alone casts for the LoRA
        loss = transformer(**inputs(dtype)).sample.float().square().mean()
    loss.backward()
    assert {parameter.grad.dtype for parameter in parameters if parameter.grad is not None} == {torch.float32}
    optimizer.step()
    moved = sum(not torch.equal(new, old) for new, old in zip(parameters, before, strict=True))
    assert moved == len(parameters) - 2  # those of the text stream that the last block drops
    after = transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())


def test_a_layer_answers_under_autocast_as_a_plain_one(model: Path) -> None:
    """On a GPU a norm answers in float32; what follows it must not, or activations take twice the memory."""
    name = "transformer_blocks.0.ff.net.0.proj"
    with torch.autocast("cpu", torch.bfloat16):
        for base in (stock(model, torch.bfloat16), load_transformer(files_of(model), CPU, torch.bfloat16, "nf4")):
            assert base.get_submodule(name)(torch.ones(1, 20)).dtype == torch.bfloat16


def test_no_cpu_repacks_the_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes would, where there is AVX512-BF16, at the first picture that is drawn: training stops then."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    transformer = load_transformer(files_of(model), CPU, torch.float32, "nf4")
    weights = {name: layer.weight.clone() for name, layer in weights_of(transformer).items()}
    output(transformer)
    for name, layer in weights_of(transformer).items():
        assert torch.equal(layer.weight, weights[name])
        assert layer.weight.quant_state.dtype == torch.float32


def test_diffusers_loads_a_lora_onto_it(tiny_sd3: Path, tmp_path: Path) -> None:
    """As inference does: the pipeline's pictures are those of the transformer on which the LoRA was trained."""
    trained = load_transformer(files_of(tiny_sd3), CPU, torch.float32, "nf4")
    with_lora(trained)
    save_lora(tmp_path, trained, {})
    transformer = load_transformer(files_of(tiny_sd3), CPU, torch.float32, "nf4")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, transformer=transformer).to("cpu")
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        words = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 20}
        return torch.tensor(pipeline(PROMPT, generator=generator, output_type="np", **words).images)

    without = draw()
    pipeline.load_lora_weights(tmp_path)
    assert isinstance(transformer.get_submodule("transformer_blocks.0.attn.to_q"), LoraLinear4bit)
    assert transformer.get_submodule("transformer_blocks.0.attn.to_q").lora_A.default_0.weight.dtype == torch.float32
    drawn = draw()
    pipeline.transformer = trained
    torch.testing.assert_close(drawn, draw(), atol=1e-5, rtol=0)
    assert (drawn - without).abs().max() > 0.01


# How large it will be


def loaded_bytes(transformer: SD3Transformer2DModel) -> int:
    """Every tensor that the model holds, shared ones once."""
    tensors = [*transformer.parameters(), *transformer.buffers()]
    for layer in weights_of(transformer).values():
        state = layer.weight.quant_state
        tensors += [state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("which", ["model", "tiny_sd3", "miniature"])
def test_bytes_are_exact(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(MINIATURE if which == "miniature" else request.getfixturevalue(which))
    found = []
    for dtype, precision, double in [*((dtype, None, True) for dtype in DTYPES), *NF4]:
        monkeypatch.setattr(base_weights, "DOUBLE_QUANTIZATION", double)
        with monkeypatch.context() as patch:
            patch.setattr(TensorFiles, "tensor", lambda *_: pytest.fail("only headers are read"))
            found.append(base_bytes(files, dtype, precision))
        assert found[-1] == loaded_bytes(load_transformer(files, CPU, dtype, precision))
    assert found[1] == found[2] == found[0] // 2
    if which == "miniature":
        assert found[0] == 4 * (13_826_112 + 64 * 64 * 256)
        assert found[5] < found[4] < 0.4 * found[1]


@pytest.mark.parametrize("size", [(8, 8), (8, 6), (6, 8), (2, 6), (30, 4), (32, 32)])
def test_the_middle_of_the_positional_embedding_is_enough(model, size):
    whole = load_transformer(files_of(model), CPU, torch.float32)
    middle = load_transformer(files_of(model), CPU, torch.float32, latent_size=size)
    latents = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(middle.pos_embed(latents), whole.pos_embed(latents))
    kept = middle.pos_embed.pos_embed.shape[1]
    assert max(size) ** 2 // 4 <= kept <= (max(size) // 2 + 1) ** 2
    assert base_bytes(files_of(model), torch.float32, latent_size=size) == loaded_bytes(middle)


@pytest.mark.parametrize("precision", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_streamed_of_each_piece_is_exact(model, dtype, precision):
    transformer = load_transformer(files_of(model), CPU, dtype, precision)
    attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.0, seed=0)
    sizes = [layout(piece.weights)[-1] for piece in pieces_of(transformer.transformer_blocks)]
    costs = model_costs(files_of(model).read_config("transformer"), dtype, precision)
    assert [cost.size for cost in costs] == sizes


def test_4_bit_matrices_that_will_visit_are_on_the_host(model, monkeypatch):
    """Quantized on the device, which is a CPU here: what is sent to the host afterwards is told by `Tensor.to`."""
    to, sent = torch.Tensor.to, []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *words, **more: sent.append((self, words)) or to(self, *words, **more)
    )
    device = torch.device("cpu", 0)
    transformer = load_transformer(files_of(model), device, torch.float32, "nf4", streamed_blocks=(1,))
    on_host = [tensor for tensor, words in sent if words == ("cpu",)]
    matrices = [layer.weight for piece in pieces_of(transformer.transformer_blocks, (1,)) for layer in piece.layers]
    assert {tensor.dtype for tensor in on_host} == {torch.uint8}
    assert sorted(tensor.numel() for tensor in on_host) == sorted(weight.numel() for weight in matrices)
    assert len(on_host) < len(weights_of(transformer))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_read_the_same_in_the_same_order(model: Path, threads: int) -> None:
    with TensorFiles(sorted((model / "transformer").glob("*.safetensors"))) as weights:
        names = sorted(weights.shapes())
        reader = base_weights._WeightReader(weights, CPU, torch.bfloat16, None)
        read = list(reader.read_all(names, threads))
        assert all(torch.equal(value, weights.tensor(name).bfloat16()) for name, value in zip(names, read, strict=True))
        with pytest.raises(KeyError):
            list(reader.read_all([*names, "nowhere"], threads))
