"""What LoRAs change in the CLIPs: read by each program's names, and encoded as base plus difference; and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.joined_embeddings import join_embeddings
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one import text_encoders
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan, TextWork, choose_clip_plan
from sd3_lora.stage_one.text_encoders import encode_clips, encode_prompts
from sd3_lora.transformer.clip_loras import ClipLoras
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_exports import export_lora
from sd3_lora.transformer.lora_files import LoraFile, read_lora_file, require_drawable
from sd3_lora.transformer.lora_keys import CLIPS, keys_of_layers, keys_of_models, layer_widths

import pytest
import torch
from conftest import PROMPT
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_transformer import GPU, needs_gpu
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
PROMPTS = [PROMPT, "", "a red robot on a beach"]
NAMES = {"text_encoder": ("te1", "clip_l"), "text_encoder_2": ("te2", "clip_g")}
# By the program: the name of a CLIP's layer, and of its two matrices.
FORMS: dict[str, Callable[[str, str], tuple[str, str, str]]] = {
    "diffusers, SimpleTuner": lambda clip, name: (f"{clip}.{name}", "lora_A.weight", "lora_B.weight"),
    "diffusers of 2023": lambda clip, name: (
        f"{clip}.{name}",
        "lora_linear_layer.down.weight",
        "lora_linear_layer.up.weight",
    ),
    "sd-scripts, OneTrainer": lambda clip, name: (
        f"lora_{NAMES[clip][0]}_{name.replace('.', '_')}",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "OneTrainer, with dots": lambda clip, name: (f"lora_{NAMES[clip][0]}.{name}", "lora_down.weight", "lora_up.weight"),
    "ai-toolkit": lambda clip, name: (f"lora_{NAMES[clip][0]}.{name}", "lora_A.weight", "lora_B.weight"),
    "OneTrainer's OMI form": lambda clip, name: (f"{NAMES[clip][1]}.{name}", "lora_down.weight", "lora_up.weight"),
    "ComfyUI": lambda clip, name: (
        f"text_encoders.{NAMES[clip][1]}.transformer.{name}",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "A1111": lambda clip, name: (
        f"{NAMES[clip][1]}_transformer_{name.replace('.', '_')}",
        "lora_down.weight",
        "lora_up.weight",
    ),
}
FULL_SIZE = {
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "text_encoder_2": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
}


@pytest.fixture(scope="module")
def files(tiny_sd3: Path) -> ModelFiles:
    return ModelFiles(ModelConfig(str(tiny_sd3)))


def layers_of(files: ModelFiles, clip: str) -> dict[str, tuple[int, int]]:
    """Features in and out of every linear layer of a CLIP."""
    return {name: widths for name, widths in layer_widths(files.read_config(clip), clip).items() if widths}


def pairs(files: ModelFiles, rank: int = 3) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """By CLIP and layer, A and B."""
    generator = torch.Generator().manual_seed(5)
    return {
        clip: {
            name: (
                torch.randn(rank, width_in, generator=generator) / width_in**0.5,
                0.3 * torch.randn(width_out, rank, generator=generator),
            )
            for name, (width_in, width_out) in layers_of(files, clip).items()
        }
        for clip in CLIPS
    }


def in_form(files: ModelFiles, form: str, alpha: float | None = None) -> Tensors:
    tensors = {}
    for clip, own in pairs(files).items():
        for name, (down, up) in own.items():
            key, of_down, of_up = FORMS[form](clip, name)
            tensors |= {f"{key}.{of_down}": down, f"{key}.{of_up}": up}
            tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def read(path: Path, tensors: Tensors, files: ModelFiles) -> LoraFile:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return read_lora_file(path, files.read_config("transformer"), files.read_config)


def plan(stream: bool = False) -> TextEncoderPlan:
    return TextEncoderPlan("fp32", stream, 20, CPU)


Encoded = tuple[list[torch.Tensor], torch.Tensor]


def encoded(files: ModelFiles, loras: list[LoraFile], scales: list[float], stream: bool = False) -> Encoded:
    """What we encode, before it is rounded to float16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoders, "to_float16", lambda values, *_: values)
        return encode_clips(files, PROMPTS, plan(stream), [], ClipLoras.of(loras, scales).merge_into)


def with_differences(files: ModelFiles, differences: dict[str, Tensors]) -> Encoded:
    """What CLIPs encode to whose weights have these added to them, written out."""

    def add(clip: str, encoder: CLIPTextModelWithProjection) -> None:
        for name, difference in differences[clip].items():
            layer, _, part = name.rpartition(".")
            getattr(encoder.get_submodule(layer), part).data += difference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoders, "to_float16", lambda values, *_: values)
        return encode_clips(files, PROMPTS, plan(), [], add)


def are_close(found: Encoded, expected: Encoded, files: ModelFiles) -> None:
    base = with_differences(files, {clip: {} for clip in CLIPS})
    for one, other, before in zip([*found[0], found[1]], [*expected[0], expected[1]], [*base[0], base[1]], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        assert (other - before).abs().max() > 0.02


def differences_of(files: ModelFiles, strength: float) -> dict[str, Tensors]:
    return {
        clip: {f"{name}.weight": strength * up @ down for name, (down, up) in own.items()}
        for clip, own in pairs(files).items()
    }


# Names


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("form", FORMS)
def test_names_of_other_programs(files: ModelFiles, tmp_path: Path, form: str, alpha: float | None) -> None:
    """Every layer of both CLIPs adds alpha / rank B A, times the scale; the transformer is as it is."""
    lora = read(tmp_path / "foreign.safetensors", in_form(files, form, alpha), files)
    assert not lora.layers
    assert lora.has_effect
    assert lora.device_bytes == 0
    assert {clip: set(part.layers) for clip, part in lora.clips.items()} == {
        clip: set(layers_of(files, clip)) for clip in CLIPS
    }
    for scale in (1.0, 0.25):
        strength = scale * (1 if alpha is None else alpha / 3)
        are_close(encoded(files, [lora], [scale]), with_differences(files, differences_of(files, strength)), files)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", CLIPS)
def test_names_at_full_size(clip: str, form: str) -> None:
    """Each program's names of CLIP-L, of 12 layers, and of OpenCLIP bigG, of 32."""
    sizes = FULL_SIZE[clip] | {"projection_dim": FULL_SIZE[clip]["hidden_size"]}
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_attention_heads=4))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 6 * FULL_SIZE[clip]["num_hidden_layers"] + 1
    parts = [FORMS[form](clip, name) for name in linears]
    keys = [f"{key}.{part}" for key, *parts_of_key in parts for part in parts_of_key]
    assert keys_of_models(keys) == {clip: keys}
    assert keys_of_layers(Path("a"), keys, layer_widths(model.config.to_dict(), clip), clip).keys() == linears


def test_a_layer_that_a_clip_does_not_have(files: ModelFiles, tmp_path: Path) -> None:
    for name in ("encoder_layers_7_mlp_fc1", "embeddings_token_embedding", "encoder_layers_0_mlp_fc3"):
        key = f"lora_te2_text_model_{name}"
        tensors = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}
        with pytest.raises(UserError, match=r"was trained on another model|which is no linear layer"):
            read(tmp_path / "a.safetensors", tensors, files)
    wrong = {f"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}
    with pytest.raises(UserError, match="was trained on another model"):
        read(tmp_path / "a.safetensors", wrong, files)


# Other kinds


def test_dora_loha_and_whole_differences(files: ModelFiles, tmp_path: Path) -> None:
    """Each as W plus what its rule gives."""
    name = "text_model.encoder.layers.1.self_attn.v_proj"
    weights = {
        clip: CLIPTextModelWithProjection.from_pretrained(files.component(clip)).get_submodule(name).weight.detach()
        for clip in CLIPS
    }
    own = {clip: each[name] for clip, each in pairs(files).items()}
    bias = torch.linspace(-1, 1, 16)
    dora, whole, loha = dict[str, torch.Tensor](), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    expected: dict[str, dict[str, Tensors]] = {kind: {clip: {} for clip in CLIPS} for kind in ("dora", "whole", "loha")}
    for clip, (down, up) in own.items():
        key = f"{clip}.{name}"
        merged = weights[clip] + up @ down
        dora |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        dora[f"{key}.lora_magnitude_vector"] = torch.full((len(up),), 1.5)
        expected["dora"][clip][f"{name}.weight"] = 1.5 * merged / merged.norm(dim=1, keepdim=True) - weights[clip]
        key = f"lora_{NAMES[clip][0]}_{name.replace('.', '_')}"
        whole[f"{key}.diff"] = up @ down
        expected["whole"][clip][f"{name}.weight"] = up @ down
        loha |= {f"{key}.hada_w1_a": up, f"{key}.hada_w1_b": down, f"{key}.hada_w2_a": up, f"{key}.hada_w2_b": down}
        loha[f"{key}.alpha"] = torch.tensor(6.0)
        expected["loha"][clip][f"{name}.weight"] = 2 * (up @ down) ** 2
    whole["lora_te2_" + name.replace(".", "_") + ".diff_b"] = bias
    expected["whole"]["text_encoder_2"][f"{name}.bias"] = bias
    for kind, tensors in (("dora", dora), ("whole", whole), ("loha", loha)):
        lora = read(tmp_path / f"{kind}.safetensors", tensors, files)
        found, wanted = encoded(files, [lora], [1.0]), with_differences(files, expected[kind])
        for one, other in zip(found[0], wanted[0], strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], wanted[1], atol=2e-5, rtol=1e-4)
        if kind == "dora":
            require_drawable([lora], [1.0], is_streamed=True)
            with pytest.raises(UserError, match="has one strength"):
                require_drawable([lora], [0.5], is_streamed=False)


def test_two_loras_add_up_and_streamed_clips_have_them_too(files: ModelFiles, tmp_path: Path) -> None:
    tensors = in_form(files, "diffusers, SimpleTuner")
    first = read(tmp_path / "a.safetensors", {k: t for k, t in tensors.items() if k.startswith("text_encoder.")}, files)
    second = read(tmp_path / "b.safetensors", tensors, files)
    differences = differences_of(files, 0.5)
    for name in differences["text_encoder"]:
        differences["text_encoder"][name] *= 3
    expected = with_differences(files, differences)
    for stream in (False, True):
        are_close(encoded(files, [first, second], [1.0, 0.5], stream), expected, files)
    assert not ClipLoras.of([first, second], None)
    assert not ClipLoras.of([first], [0.0])


# The stock pipeline


@pytest.mark.parametrize("alpha", [2, 4])
def test_the_stock_pipeline_encodes_the_same(files: ModelFiles, tiny_sd3: Path, tmp_path: Path, alpha: int) -> None:
    """As diffusers' script trains and saves it, alphas in the metadata; prompts of the pipeline's `encode_prompt`."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    states, generator = {}, torch.Generator().manual_seed(3)
    for clip in CLIPS:
        encoder = getattr(pipeline, clip)
        encoder.add_adapter(config)
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        states[clip] = get_peft_model_state_dict(encoder)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        **{f"{clip}_lora_layers": state for clip, state in states.items()},
        **_collate_lora_metadata({clip: getattr(pipeline, clip) for clip in CLIPS}),
    )
    lora = read_lora_file(tmp_path / LORA_FILE, files.read_config("transformer"), files.read_config)
    assert {layer.alpha for part in lora.clips.values() for layer in part.layers.values()} == {alpha}
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    before, *_ = stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=20)
    stock.load_lora_weights(str(tmp_path))
    for pipe in (pipeline, stock):
        expected, _, expected_pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=20
        )
        hidden, pooled = encoded(files, [lora], [1.0])
        base, _ = encode_prompts(files, PROMPTS, plan(), [])
        found = join_embeddings(hidden, base[:, files.clip_tokens() :].float())
        torch.testing.assert_close(found[:, :77], expected[:, :77], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)  # T5's part is rounded to float16
        torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.05


# The plan


def test_clips_alone_are_whole_or_streamed(files: ModelFiles) -> None:
    """Nothing of T5 counts; where too little is free, they are streamed with fewer prompts at a time."""
    from sd3_lora.gpu.budget import DeviceBudget
    from sd3_lora.stage_one.text_encoder_plan import clip_bytes, clip_working_bytes

    work = TextWork(20, existing_precision="int8")
    assert choose_clip_plan(files, work, CPU, None) == TextEncoderPlan("fp16", False, 20, CPU)
    exact = TextWork(20, existing_precision="fp32")
    assert choose_clip_plan(files, exact, CPU, None).t5_precision == "fp32"
    whole = TextEncoderPlan("fp16", False, 20, CPU)
    needed = clip_bytes(files, whole) + clip_working_bytes(files, whole)
    assert not choose_clip_plan(files, work, CPU, DeviceBudget(needed, 0, CPU)).t5_stream
    less = choose_clip_plan(files, work, CPU, DeviceBudget(needed - 1, 0, CPU))
    assert less.t5_stream
    with pytest.raises(UserError, match=r"encoding with a CLIP needs at least"):
        choose_clip_plan(files, work, CPU, DeviceBudget(1000, 0, CPU))


# Exports


def apply(clips: dict[str, Tensors], lora: Tensors, form: str) -> dict[str, Tensors]:
    """As the programs do, written from their rules: a key for each weight of a CLIP; alpha over the rank, else one."""
    lora, found = dict(lora), {clip: dict[str, torch.Tensor]() for clip in clips}
    for clip, weights in clips.items():
        for name, weight in weights.items():
            layer = name.removesuffix(".weight").replace(".", "_")
            key = f"lora_{NAMES[clip][0]}_{layer}" if form == "kohya" else f"{NAMES[clip][1]}_transformer_{layer}"
            alpha = lora.pop(f"{key}.alpha", None)
            assert form == "kohya" or alpha is None
            if f"{key}.diff" in lora:
                found[clip][name] = lora.pop(f"{key}.diff").float()
            if f"{key}.lora_up.weight" in lora:
                up, down = lora.pop(f"{key}.lora_up.weight"), lora.pop(f"{key}.lora_down.weight")
                assert (len(up), down.shape[1]) == tuple(weight.shape)
                found[clip][name] = up @ down * (1.0 if alpha is None else float(alpha) / len(down))
    assert all(key.startswith("lora_unet_") for key in lora), sorted(lora)
    return found


@pytest.mark.parametrize("form", ["kohya", "a1111"])
def test_exports(files: ModelFiles, tmp_path: Path, form: str) -> None:
    """Read by an independent reader, and by us again."""
    tensors = in_form(files, "diffusers, SimpleTuner", 4.5)
    key = "transformer.transformer_blocks.0.attn.to_q"
    width = layer_widths(files.read_config("transformer"))[key.removeprefix("transformer.")]
    assert width
    tensors |= {f"{key}.lora_A.weight": torch.ones(2, width[0]), f"{key}.lora_B.weight": torch.ones(width[1], 2)}
    lora = read(tmp_path / LORA_FILE, tensors, files)
    export_lora(lora, form, tmp_path / "exported.safetensors", files)
    exported = load_file(tmp_path / "exported.safetensors")
    clips = {clip: load_file(next(files.component(clip).glob("*.safetensors"))) for clip in CLIPS}
    expected = with_differences(files, differences_of(files, 1.5))
    are_close(with_differences(files, apply(clips, exported, form)), expected, files)
    again = read_lora_file(tmp_path / "exported.safetensors", files.read_config("transformer"), files.read_config)
    are_close(encoded(files, [again], [1.0]), expected, files)
    assert again.layers.keys() == lora.layers.keys()
    with safe_open(tmp_path / "exported.safetensors", "pt") as handle:
        assert handle.metadata()["modelspec.architecture"].endswith("/lora")
        assert handle.metadata()["ss_network_dim"] == "3"


def test_a_dora_of_a_clip_is_exported_as_differences(files: ModelFiles, tmp_path: Path) -> None:
    """And the transformer's plain part as it is; A1111 reads plain ones alone."""
    name = "text_model.encoder.layers.0.mlp.fc1"
    down, up = pairs(files)["text_encoder"][name]
    tensors = {f"text_encoder.{name}.lora_A.weight": down, f"text_encoder.{name}.lora_B.weight": up}
    tensors[f"text_encoder.{name}.lora_magnitude_vector"] = torch.full((len(up),), 2.0)
    lora = read(tmp_path / LORA_FILE, tensors, files)
    with pytest.raises(UserError, match="A1111 reads plain LoRAs alone"):
        export_lora(lora, "a1111", tmp_path / "exported.safetensors", files)
    export_lora(lora, "kohya", tmp_path / "exported.safetensors", files)
    exported = load_file(tmp_path / "exported.safetensors")
    clips = {clip: load_file(next(files.component(clip).glob("*.safetensors"))) for clip in CLIPS}
    found = with_differences(files, apply(clips, exported, "kohya"))
    for one, other in zip(found[0], encoded(files, [lora], [1.0])[0], strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@needs_gpu
def test_a_clip_on_a_gpu_gets_the_weights_of_one_on_the_host(files: ModelFiles, tmp_path: Path) -> None:
    lora = read(tmp_path / "l.safetensors", in_form(files, "diffusers, SimpleTuner"), files)
    on_host = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(files.read_config("text_encoder")))
    on_gpu = copy.deepcopy(on_host).to(GPU)
    for clip in (on_host, on_gpu):
        ClipLoras.of([lora], [0.5]).merge_into("text_encoder", clip)
    for weight, expected in zip(on_gpu.parameters(), on_host.parameters(), strict=True):
        assert torch.equal(weight.cpu(), expected)
