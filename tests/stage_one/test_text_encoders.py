"""The three text encoders: the stock pipeline's numbers, in every precision, streamed and whole."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.devices import DTYPES
from sd3_lora.common.memory import round_up
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.stage_report import StageReport
from sd3_lora.stage_one import t5_int8, text_encoders
from sd3_lora.stage_one.t5_halves import half_bytes
from sd3_lora.stage_one.text_encoder_plan import BATCH_SIZE, TextEncoderPlan, empty_t5, t5_device_bytes
from sd3_lora.stage_one.text_encoders import (
    encode_clip,
    encode_prompts,
    encode_t5_streamed,
    load_clip,
    load_t5,
    report_identifier,
    to_float16,
    tokenize,
)

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import PROMPT
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = "sks robot " * 80
# More than one batch; empty, cut off by every encoder, not ASCII, and alike but for a letter.
PROMPTS = [PROMPT, "", LONG, "ein Roboter auf dem Balkon, größer", "a photo of SKS robot", "a red robot", *"abcde"]
assert len(PROMPTS) > BATCH_SIZE


@pytest.fixture(scope="module")
def files(tiny_sd3: Path) -> ModelFiles:
    return ModelFiles(ModelConfig(str(tiny_sd3)))


@pytest.fixture(scope="module")
def stock(tiny_sd3: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3)


@pytest.fixture(scope="module")
def wide_files(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """With a T5 whose widths are multiples of 64 as any real one's are: bitsandbytes needs that for nf4 on a CPU."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_sd3, folder, ignore=shutil.ignore_patterns("text_encoder_3"))
    config = T5Config.from_pretrained(tiny_sd3 / "text_encoder_3")
    config.d_model, config.d_kv, config.num_heads, config.d_ff = 64, 32, 2, 128
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return ModelFiles(ModelConfig(str(folder)))


def plan(precision: str = "fp32", stream: bool = False, length: int = 20) -> TextEncoderPlan:
    return TextEncoderPlan(precision, stream, length, CPU)  # type: ignore[arg-type]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def t5_ids(files: ModelFiles, length: int = 20) -> torch.Tensor:
    return tokenize(T5TokenizerFast.from_pretrained(files.component("tokenizer_3")), PROMPTS, length)


@torch.no_grad()
def resident(files: ModelFiles, precision: str, ids: torch.Tensor) -> torch.Tensor:
    encoder = load_t5(files, plan(precision))
    return torch.cat([encoder(batch)[0] for batch in ids.split(BATCH_SIZE)])


def t5_streamed(*args: Any) -> torch.Tensor:
    return torch.cat(list(encode_t5_streamed(*args)))


def test_as_many_clip_tokens_as_the_model_has_positions(tiny_sd3: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "model")
    for name in ("text_encoder", "text_encoder_2"):
        config = CLIPTextConfig.from_pretrained(tiny_sd3 / name, max_position_embeddings=40)
        CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "model" / name)
    files = ModelFiles(ModelConfig(str(tmp_path / "model")))
    prompt_embeds, pooled = encode_prompts(files, PROMPTS[:2], plan(), [])
    assert files.clip_tokens() == 40
    assert (prompt_embeds.shape, pooled.shape) == ((2, 40 + 20, 48), (2, 24))
    assert not prompt_embeds[:, :40, 24:].any()  # padding beside the CLIPs


# The stock pipeline's numbers


@pytest.mark.parametrize("length", [20, 77, 130])
def test_fp32_equals_the_stock_pipeline_and_is_stored_rounded(
    files: ModelFiles, stock: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    expected, _, expected_pooled, _ = stock.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    stored, stored_pooled = encode_prompts(files, PROMPTS, plan(length=length), [])
    monkeypatch.setattr(text_encoders, "to_float16", lambda values, *_: values)
    exact, exact_pooled = encode_prompts(files, PROMPTS, plan(length=length), [])

    assert exact.shape == expected.shape == (len(PROMPTS), 77 + length, 48)
    assert exact.dtype == exact_pooled.dtype == torch.float32
    for row in range(len(PROMPTS)):
        assert relative_error(exact[row], expected[row]) < 1e-5
        assert relative_error(exact_pooled[row], expected_pooled[row]) < 1e-5
    assert torch.equal(stored, exact.to(torch.float16))
    assert torch.equal(stored_pooled, exact_pooled.to(torch.float16))


def test_the_clips_lie_side_by_side_padded_with_zeros(files: ModelFiles) -> None:
    embeds, pooled = encode_prompts(files, PROMPTS[:2], plan(), [])
    assert embeds.shape == (2, 77 + 20, 48)
    assert pooled.shape == (2, 8 + 16)
    assert (embeds[:, :77, 8 + 16 :] == 0).all()
    assert (embeds[:, :77, : 8 + 16] != 0).all(dim=-1).any()
    assert (embeds[:, 77:, 8 + 16 :] != 0).any(dim=-1).all()


def test_each_encoder_is_freed_before_the_next_is_loaded(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive_at_load: list[int] = []
    for name in ("load_clip", "load_t5"):
        load = getattr(text_encoders, name)

        def watched(*args: Any, load: Any = load) -> Any:
            alive_at_load.append(sum(encoder() is not None for encoder in loaded))
            encoder = load(*args)
            loaded.append(weakref.ref(encoder))
            return encoder

        monkeypatch.setattr(text_encoders, name, watched)
    reports: list[StageReport] = []
    encode_prompts(files, [PROMPT], plan(), reports)
    assert alive_at_load == [0, 0, 0]
    assert [report.name for report in reports] == ["encode with CLIP-L", "encode with CLIP-G", "encode with T5 (fp32)"]


def test_a_prompt_too_long_for_an_encoder_is_named(files: ModelFiles, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(files.component("tokenizer"))
    ids = tokenize(tokenizer, [PROMPT, LONG, LONG + "too"], 77)
    assert ids.shape == (3, 77)
    assert ids[1, -1] == tokenizer.eos_token_id
    note = capsys.readouterr().out
    assert note.startswith("note: cut off after 77 tokens of CLIPTokenizer: 'sks robot sks robot")
    assert note.endswith("...' and 1 more prompt\n")


# Streamed: one block at a time, bit for bit the whole encoder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_streamed_t5_equals_the_resident_one_bit_for_bit(files: ModelFiles, precision: str) -> None:
    ids = t5_ids(files)
    whole, streamed = resident(files, precision, ids), t5_streamed(files, ids, plan(precision, stream=True))
    assert whole.dtype == streamed.dtype
    assert torch.equal(whole, streamed)
    assert whole.abs().sum() > 0
    kept = replace(plan(precision, stream=True), kept_prompts=len(ids))
    assert torch.equal(t5_streamed(files, ids, kept), whole)


def test_streamed_t5_is_read_from_several_files(tiny_sd3: Path, files: ModelFiles, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder_3"))
    encoder = T5EncoderModel.from_pretrained(tiny_sd3 / "text_encoder_3")
    encoder.save_pretrained(tmp_path / "model" / "text_encoder_3", max_shard_size="100KB")
    shards = ModelFiles(ModelConfig(str(tmp_path / "model")))
    assert len(shards.weight_files("text_encoder_3")) > 1
    ids = t5_ids(files)
    assert torch.equal(t5_streamed(shards, ids, plan(stream=True)), resident(files, "fp32", ids))


def test_a_streamed_block_leaves_the_device_before_the_next_comes(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[torch.nn.Module] = []
    resident_blocks: list[int] = []
    forward = text_encoders.T5EncoderModel.__init__

    def watched(self: T5EncoderModel, config: T5Config) -> None:
        forward(self, config)
        blocks.extend(self.encoder.block)

    def count(_: torch.nn.Module, __: Any) -> None:
        resident_blocks.append(sum(all(p.device.type != "meta" for p in block.parameters()) for block in blocks))

    monkeypatch.setattr(text_encoders.T5EncoderModel, "__init__", watched)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: count(module, args) if module in blocks else None
    )
    try:
        t5_streamed(files, t5_ids(files), plan(stream=True))
    finally:
        handle.remove()
    assert resident_blocks == [1] * len(blocks) * 2 * 2  # two batches through both halves of each of three blocks
    assert all(p.device.type == "meta" for block in blocks for p in block.parameters())


@pytest.mark.parametrize("size", [4, 2, 1])
def test_fewer_prompts_at_a_time_equal_a_resident_encoder_with_the_same(files: ModelFiles, size: int) -> None:
    ids = t5_ids(files)
    whole = load_t5(files, plan())
    with torch.no_grad():
        expected = torch.cat([whole(batch)[0] for batch in ids.split(size)])
    assert torch.equal(t5_streamed(files, ids, replace(plan(stream=True), batch_size=size)), expected)
    few, many = (encode_prompts(files, PROMPTS, replace(plan(stream=True), batch_size=n), []) for n in (size, 8))
    torch.testing.assert_close(few, many, rtol=0, atol=2e-3)  # one place of float16


@torch.no_grad()
def test_a_streamed_clip_is_off_the_device_between_its_layers_and_equals_the_resident_one_bit_for_bit(
    files: ModelFiles,
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(files.component("tokenizer_2"))
    whole = load_clip(files, "text_encoder_2", plan())
    streamed = load_clip(files, "text_encoder_2", plan(stream=True))
    assert {p.device.type for p in whole.parameters()} == {"cpu"}
    assert {p.device.type for p in streamed.parameters()} == {"meta"}
    expected = next(encode_clip(whole, tokenizer, PROMPTS, 77, plan()))
    resident_layers: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: resident_layers.append(sum(p.device.type != "meta" for p in streamed.parameters()))
    )
    try:
        found = next(encode_clip(streamed, tokenizer, PROMPTS, 77, plan(stream=True)))
    finally:
        handle.remove()
    assert max(resident_layers) <= 2  # a weight and its bias
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[0].abs().sum() > 0


def test_the_whole_streamed_stage_equals_the_resident_one_bit_for_bit(files: ModelFiles) -> None:
    expected = encode_prompts(files, PROMPTS, plan(), [])
    found = encode_prompts(files, PROMPTS, plan(stream=True), [])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_whole_clips_are_not_offloaded_and_give_the_same_numbers(files: ModelFiles) -> None:
    whole = replace(plan("fp16", stream=True), whole_clips=True)
    assert {p.device.type for p in load_clip(files, "text_encoder_2", whole).parameters()} == {"cpu"}
    found, expected = (encode_prompts(files, PROMPTS, p, []) for p in (whole, plan("fp16", stream=True)))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_bytes_of_a_streamed_half_block_are_known_beforehand(files: ModelFiles, precision: str) -> None:
    layers = load_t5(files, plan(precision)).encoder.block[0].layer
    sizes = [sum(round_up(p.numel() * p.element_size()) for p in layer.parameters()) for layer in layers]
    assert half_bytes(empty_t5(files, DTYPES[precision]).block) == max(sizes)


# Precisions


def test_fp16_keeps_wo_in_fp32(files: ModelFiles) -> None:
    dtypes = {name: p.dtype for name, p in load_t5(files, plan("fp16")).named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("wo.weight")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("wo.weight")} == {torch.float16}


@pytest.mark.parametrize(("precision", "kind", "bound"), [("int8", Linear8bitLt, 0.03), ("nf4", Linear4bit, 0.3)])
def test_quantized_t5_is_near_fp32_but_not_equal(
    wide_files: ModelFiles, precision: str, kind: type[torch.nn.Module], bound: float
) -> None:
    encoder = load_t5(wide_files, plan(precision))
    assert isinstance(encoder.encoder.block[0].layer[0].SelfAttention.q, kind)
    ids = t5_ids(wide_files)[:4]
    with torch.no_grad():
        found = encoder(ids)[0].float()
    error = relative_error(found, resident(wide_files, "fp32", ids))
    assert 1e-4 < error < bound


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp16", "fp32"])
def test_the_bytes_that_t5_will_take_are_known_beforehand(wide_files: ModelFiles, precision: str) -> None:
    encoder = load_t5(wide_files, plan(precision))
    tensors = [*encoder.parameters()]
    tensors += [p.quant_state.absmax for p in tensors if hasattr(p, "quant_state")]  # nf4's scales lie beside it
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert {m.wo.weight.dtype for m in encoder.modules() if hasattr(m, "wo")} == {torch.float32}
    assert t5_device_bytes(wide_files, precision) == pytest.approx(taken, rel=0.03)


@pytest.fixture(scope="module")
def half_files(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """With T5's weights in float16, as SD3 has them."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(tiny_sd3, folder, ignore=shutil.ignore_patterns("text_encoder_3"))
    T5EncoderModel.from_pretrained(tiny_sd3 / "text_encoder_3").half().save_pretrained(folder / "text_encoder_3")
    return ModelFiles(ModelConfig(str(folder)))


@pytest.fixture
def from_pretrained_in_8_bits(half_files: ModelFiles) -> T5EncoderModel:
    """As transformers loads it."""
    return T5EncoderModel.from_pretrained(
        half_files.component("text_encoder_3"),
        dtype=torch.float16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )


@pytest.mark.parametrize("in_threads", [False, True])
def test_t5_in_8_bits_is_what_transformers_makes_of_it(
    half_files: ModelFiles,
    from_pretrained_in_8_bits: T5EncoderModel,
    in_threads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_threads:  # as for a GPU
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
        monkeypatch.setattr(t5_int8, "_read", t5_int8._read_in_threads)
    found, expected = load_t5(half_files, plan("int8")), from_pretrained_in_8_bits
    parameters = dict(found.named_parameters())
    assert sorted(parameters) == sorted(dict(expected.named_parameters()))
    for name, value in expected.named_parameters():
        assert type(parameters[name]) is type(value)
        assert torch.equal(parameters[name], value)
    states = {name: vars(m.state) for name, m in expected.named_modules() if isinstance(m, Linear8bitLt)}
    assert {name: vars(m.state) for name, m in found.named_modules() if isinstance(m, Linear8bitLt)} == states
    assert len(states) > 10
    ids = t5_ids(half_files)[:4]
    with torch.no_grad():
        assert torch.equal(found(ids)[0], expected(ids)[0])


def test_t5_in_8_bits_of_files_with_other_names_is_left_to_transformers(
    half_files: ModelFiles, from_pretrained_in_8_bits: T5EncoderModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(half_files.folder, folder)
    (path,) = (folder / "text_encoder_3").glob("*.safetensors")
    tensors = load_file(path)
    save_file({name.replace("shared.", "encoder.embed_tokens."): value for name, value in tensors.items()}, path)
    files = ModelFiles(ModelConfig(str(folder)))
    assert t5_int8.load_t5_int8(files, torch.device("cpu")) is None


@pytest.mark.parametrize("stream", [False, True])
def test_tensor_cores_multiply_wo_where_they_round_no_factor(
    files: ModelFiles, half_files: ModelFiles, stream: bool
) -> None:
    multiplied: dict[str, bool] = {}

    def note(module: torch.nn.Module, _: Any) -> None:
        if type(module).__name__ in ("T5DenseGatedActDense", "CLIPMLP"):
            multiplied[type(module).__name__] = torch.backends.cuda.matmul.allow_tf32

    def seen(of: ModelFiles, precision: str) -> dict[str, bool]:
        multiplied.clear()
        encode_prompts(of, PROMPTS[:2], plan(precision, stream), [])
        assert not torch.backends.cuda.matmul.allow_tf32
        return dict(multiplied)

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # torch's default; another test may have left it otherwise
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        assert seen(half_files, "fp16") == {"CLIPMLP": False, "T5DenseGatedActDense": True}
        assert not any(seen(half_files, "fp32").values())  # what comes to `wo` has all of float32's bits
        assert not any(seen(files, "fp16").values())  # its weights have
    finally:
        handle.remove()
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_wo_multiplies_was_float16_before(half_files: ModelFiles, precision: str) -> None:
    factors: list[torch.Tensor] = []
    encoder = load_t5(half_files, plan(precision))
    for block in encoder.encoder.block:
        wo = block.layer[1].DenseReluDense.wo
        wo.register_forward_pre_hook(lambda module, inputs: factors.extend([inputs[0], module.weight]))
    with torch.no_grad():
        encoder(t5_ids(half_files))
    assert {factor.dtype for factor in factors} == {torch.float32}
    assert len(factors) == 2 * len(encoder.encoder.block)
    exact = [torch.equal(factor.half().float(), factor) for factor in factors]
    assert exact == [precision == "fp16", True] * (len(exact) // 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_product_of_float16_numbers_is_as_exact_by_tensor_cores(half_files: ModelFiles) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 10240, device="cuda", generator=generator).half().float() for n in (64, 512))

    def error(factor: torch.Tensor) -> float:
        exact = x.double() @ factor.double().t()
        return relative_error(torch.nn.functional.linear(x, factor).double(), exact)

    plain, odd = error(weight), error(weight * (1 + 2**-12))
    with text_encoders.tensor_cores_for_wo(half_files, "fp16"):
        assert error(weight) < 3e-6
        has_tensor_cores = torch.cuda.get_device_capability() >= (8, 0)
        assert (error(weight * (1 + 2**-12)) > 1e-5) == has_tensor_cores  # where a factor has more bits, they show
    assert max(plain, odd) < 3e-6


def test_a_number_beyond_float16_names_its_prompt() -> None:
    values = torch.ones(3, 2, 2)
    assert torch.equal(to_float16(values, ["a", "b", "c"], "T5"), values.half())
    values[1, 1, 0] = -65504
    assert to_float16(values, ["a", "b", "c"], "T5")[1, 1, 0] == -65504
    for bad in (-70000.0, 65530.0, float("inf"), float("nan")):
        values[1, 1, 0] = bad
        with pytest.raises(UserError, match=r"T5 gives .* for the prompt 'b', which float16 cannot hold: type"):
            to_float16(values, ["a", "b", "c"], "T5")


def test_a_number_beyond_float16_names_its_prompt_in_a_later_batch() -> None:
    prompts = list("abcdefg")
    values = torch.arange(14.0).reshape(7, 2)
    hidden, pooled = text_encoders.rounded(zip(values.split(3), (2 * values).split(3), strict=True), prompts, "T5")
    assert torch.equal(hidden, values.half())
    assert torch.equal(pooled, (2 * values).half())
    values[5, 1] = 1e6
    with pytest.raises(UserError, match="for the prompt 'f'"):
        text_encoders.rounded(zip(values.split(3), strict=True), prompts, "T5")


# The identifier


def test_the_identifier_is_the_rarest_word_that_the_class_prompt_lacks(files: ModelFiles) -> None:
    report = report_identifier(files, "A photo of (sks) robot.", "a photo of a robot")
    assert report is not None
    assert report.word == "sks"
    assert report.pieces == {"CLIP": ["sk", "s</w>"], "T5": ["▁", "s", "k", "s"]}
    assert report.sentences() == ["identifier 'sks' → CLIP: sk s</w>; T5: ▁ s k s"]
    assert report_identifier(files, PROMPT, None) == report


def test_an_identifier_of_many_pieces_is_warned_of(files: ModelFiles) -> None:
    report = report_identifier(files, "a photo of zwxqj robot", None)
    assert report is not None
    assert len(report.pieces["CLIP"]) == 5
    assert report.sentences()[1].startswith("warning: 'zwxqj' falls into 5 CLIP tokens")


def test_a_common_word_as_identifier_is_warned_of(files: ModelFiles) -> None:
    report = report_identifier(files, "a photo of x robot", "a photo of a robot")  # one of CLIP's first tokens
    assert report is not None
    assert report.is_common
    assert report.sentences()[1].startswith("warning: 'x' is a common word")


def test_a_prompt_without_an_identifier(files: ModelFiles) -> None:
    assert report_identifier(files, "", None) is None
    assert report_identifier(files, "a robot", "a photo of a robot") is None
