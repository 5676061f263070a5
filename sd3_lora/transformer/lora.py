"""The LoRA (Hu et al., arXiv 2106.09685) that is trained: its kind, which layers, attach, save.

A saved file is diffusers' `pytorch_lora_weights.safetensors`, of LoKr and LoHa with LyCORIS' names (`lycoris.py`). Its
alpha is always its rank: the strength, alpha / rank or what the kind makes of it, is folded into `lora_B` on saving, so
that a reader that ignores the metadata draws the same picture. (Of a DoRA, one that passes over the magnitudes, as
ComfyUI does, draws another.)

Shapes: a layer of `in` to `out` features has `lora_A (rank, in)` and `lora_B (out, rank)`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import LoraStart, LoraType
from sd3_lora.common.tensor_files import write_tensors
from sd3_lora.transformer.lycoris import PARTS, add_lycoris, difference, lycoris_file, lycoris_layers, parts_of

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

if TYPE_CHECKING:
    from sd3_lora.transformer.added_layers import AddedLora

LORA_FILE = "pytorch_lora_weights.safetensors"
# Of its moving average. diffusers takes any name that ends as LORA_FILE for the folder's LoRA: this one does not.
EMA_FILE = "pytorch_lora_weights_ema.safetensors"
# Both streams' attention projections, as in diffusers' train_dreambooth_lora_sd3.py.
DEFAULT_LAYERS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
_SECOND_ATTENTION = ("attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v")
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# Names for --lora_layers. Of these layers a model has some: only SD3.5-Medium has a second attention.
LAYER_PRESETS = {
    "attention": (*DEFAULT_LAYERS, *_SECOND_ATTENTION),
    "attention+mlp": (*DEFAULT_LAYERS, *_SECOND_ATTENTION, *_MLP),
    "second_attention": _SECOND_ATTENTION,
}
# PiSSA's singular vectors come from a randomized decomposition, as PEFT's pissa_niter_4: a full one takes minutes.
_SVD_ITERATIONS, _OVERSAMPLED = 4, 8
ADAPTER = "default"  # PEFT's name for the one that is trained
_LYCORIS_PARTS = {part for parts in PARTS.values() for part in parts}
METADATA_KEY = "sd3_lora"  # of what this project notes in a LoRA's file
_PREFIX = "transformer."


@dataclass(frozen=True)
class LoraKind:
    """How a LoRA is scaled and started, and which of its layers have a rank of their own.

    Attributes:
        use_rslora: the strength is alpha / √rank (Kalajdzievski, arXiv 2312.03732), else alpha / rank.
        use_dora: an output's magnitude is trained beside its direction (Liu et al., arXiv 2402.09353).
        start: of `lora_A` and `lora_B`. gaussian and default draw `lora_A` (as diffusers, as PEFT), `lora_B` is zero.
            pissa (Meng et al., arXiv 2404.02948) takes the weight's largest singular vectors, olora (Büyükakyüz, arXiv
            2406.01775) its QR decomposition; that product is subtracted, so that the model starts as it is.
        ranks: ending of a layer's name → its rank. The first that fits counts; other layers have the usual rank.
        type: lora, or LyCORIS' lokr and loha, which have a start of their own and none of the above but the ranks.
        factor: of a LoKr, as `add_lycoris` takes it.
    """

    use_rslora: bool = False
    use_dora: bool = False
    start: LoraStart = "gaussian"
    ranks: Mapping[str, int] = field(default_factory=dict)
    type: LoraType = "lora"
    factor: int = -1

    @property
    def starts_from_weights(self) -> bool:
        """Whether it starts from a decomposition of the weights."""
        return self.start in ("pissa", "olora")

    @property
    def needs_whole_weights(self) -> bool:
        """Whether streamed blocks cannot have it."""
        return self.use_dora or self.starts_from_weights

    @property
    def frozen_bytes_per_parameter(self) -> int:
        """Of the start that is subtracted, in float32."""
        return 4 if self.starts_from_weights else 0

    def ranks_of(self, targets: Sequence[str], usual: int) -> dict[str, int]:
        """The rank of each module.

        Raises:
            UserError: an ending is of none of them.
        """
        layers = {target: target.split(".", 2)[2] for target in targets}
        for ending in self.ranks:
            if not any(_ends_with(layer, ending) for layer in layers.values()):
                known = ", ".join(sorted(set(layers.values())))
                raise UserError(f"--rank_pattern {ending}={self.ranks[ending]}: the layers with a LoRA are {known}")
        return {
            target: next((rank for ending, rank in self.ranks.items() if _ends_with(layer, ending)), usual)
            for target, layer in layers.items()
        }

    def check(self, precision: str, streamed: int | None) -> None:
        """Checks it against what is asked of the base.

        Args:
            precision: of its weights, as `AskedPlacement` has it.
            streamed: how many blocks are streamed; None where the plan decides, which then streams none.

        Raises:
            UserError: they cannot be had together.
        """
        flag = "--use_dora" if self.use_dora else f"--init_lora_weights {self.start}"
        if self.needs_whole_weights and streamed:
            raise UserError(
                f"{flag} reads whole weights on the device, and --stream_blocks {streamed} leaves them on the host: "
                "leave one out"
            )
        if self.starts_from_weights and precision != "16bit":
            raise UserError(
                f"{flag} decomposes the exact weights, and --base_precision {precision} may keep them in 4 bits: type "
                "--base_precision 16bit, or leave one out"
            )


PLAIN_LORA = LoraKind()


@dataclass(frozen=True)
class LayerStart:
    """What a layer's LoRA begins as.

    Attributes:
        down: `(rank, in)`; empty in a LoKr and a LoHa.
        up: `(out, rank)` with the strength folded in; likewise.
        magnitudes: of a DoRA, `(out,)`.
        lycoris: of a LoKr or a LoHa its parts, the strength folded into the last; else empty.
        bias: added to the layer's, `(out,)`.
        scales_inputs: whether a DoRA's magnitudes are of the inputs, `(in,)`, as LyCORIS had them at first.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitudes: torch.Tensor | None
    lycoris: Mapping[str, torch.Tensor] = field(default_factory=dict)
    bias: torch.Tensor | None = None
    scales_inputs: bool = False

    def to(self, device: torch.device) -> LayerStart:
        """The same on another device."""
        return LayerStart(
            self.down.to(device),
            self.up.to(device),
            None if self.magnitudes is None else self.magnitudes.to(device),
            {part: tensor.to(device) for part, tensor in self.lycoris.items()},
            None if self.bias is None else self.bias.to(device),
            self.scales_inputs,
        )

    def added_to(self, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The layer's weight with the LoRA in it, `(out, in)` in float32 (of a DoRA: arXiv 2402.09353, equation 5)."""
        merged = weight.float() + scale * (difference(self.lycoris) if self.lycoris else self.up @ self.down)
        if self.magnitudes is None:
            return merged
        axis = 0 if self.scales_inputs else 1
        return merged * (self.magnitudes / torch.linalg.vector_norm(merged, dim=axis)).unsqueeze(axis)


def _ends_with(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def chosen_blocks(asked: Sequence[str] | None, count: int) -> list[int] | None:
    """The indices of the blocks that get a LoRA; None for all.

    Args:
        asked: indices and names of presets: early is the first half of the blocks, late the rest; None for all.
        count: of the transformer's blocks.

    Raises:
        UserError: one is neither, or the transformer does not have it.
    """
    if asked is None:
        return None
    half = count // 2
    presets = {"early": range(half), "late": range(half, count)}
    blocks: set[int] = set()
    for name in asked:
        if not name.isdecimal() and name not in presets:
            raise UserError(
                f"--lora_blocks {','.join(asked)} is not a list of numbers: type for example 12,13, or one of the "
                f"presets {', '.join(presets)}"
            )
        if name in presets and not half:
            raise UserError(f"--lora_blocks {name}: this transformer has one block: leave it out")
        blocks.update(presets[name] if name in presets else [int(name)])
    require_blocks(sorted(blocks), count)
    return sorted(blocks)


def require_blocks(blocks: Sequence[int] | None, count: int) -> None:
    """Checks the indices of blocks that get a LoRA.

    Raises:
        UserError: the transformer, of `count` blocks, does not have one.
    """
    wrong = [block for block in blocks or () if not 0 <= block < count]
    if wrong:
        raise UserError(f"--lora_blocks {wrong[0]}: this transformer has the blocks 0 to {count - 1}")


def target_modules(
    transformer: SD3Transformer2DModel, layers: Sequence[str] | None, blocks: Sequence[int] | None
) -> list[str]:
    """The names of the modules that get a LoRA.

    Args:
        transformer: the model.
        layers: endings of module names inside a block, such as attn.to_k, and names of `LAYER_PRESETS`; None for
            `DEFAULT_LAYERS`.
        blocks: indices of transformer blocks; None for all.

    Raises:
        UserError: a layer or block that the model does not have.
    """
    require_blocks(blocks, len(transformer.transformer_blocks))
    linears = [
        name
        for name, module in transformer.transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and (blocks is None or int(name.split(".")[0]) in blocks)
    ]
    chosen: list[str] = []
    for layer in layers or DEFAULT_LAYERS:
        endings = LAYER_PRESETS.get(layer, (layer,))
        matching = [name for name in linears if any(name.endswith(f".{ending}") for ending in endings)]
        if not matching and layers is not None:
            known = sorted({name.split(".", 1)[1] for name in linears})
            here = [preset for preset, names in LAYER_PRESETS.items() if {*names} & {*known}]
            raise UserError(
                f"--lora_layers {layer} is in no block: the layers are {', '.join(known)}; the presets "
                f"{', '.join(here)}"
            )
        chosen += matching
    return [f"transformer_blocks.{name}" for name in sorted(set(chosen))]


def attach_lora(
    transformer: SD3Transformer2DModel,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    kind: LoraKind = PLAIN_LORA,
) -> list[torch.nn.Parameter]:
    """Freezes the transformer, adds the LoRA and returns its parameters, in float32 whatever the base's dtype.

    It is drawn by `seed`, and its last matrix is zero, unless the kind starts otherwise. A layer with a rank of its own
    has alpha in proportion.

    Raises:
        UserError: the kind's ranks are of no layer, or too large for its start.
    """
    from sd3_lora.transformer.added_layers import AddedLora, add_adapter  # imports PEFT, as below

    transformer.requires_grad_(False)
    torch.manual_seed(seed)
    ranks = kind.ranks_of(targets, rank)
    shared = {
        "r": rank,
        "rank_pattern": peft_patterns(ranks, rank),
        "alpha_pattern": peft_patterns({name: alpha * own / rank for name, own in ranks.items()}, alpha),
        "target_modules": list(targets),
    }
    if kind.type == "lora":
        from peft import LoraConfig

        config = LoraConfig(
            **shared,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights=True if kind.start == "default" else "gaussian",
            use_rslora=kind.use_rslora,
            use_dora=kind.use_dora,
        )
        config._register_custom_module({torch.nn.Linear: AddedLora})
        add_adapter(transformer, config)
    else:
        add_lycoris(transformer, kind.type, ADAPTER, {**shared, "alpha": alpha}, kind.factor)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for name, layer in lora_layers(transformer).items():
        if kind.starts_from_weights:
            _decompose(name, layer, kind.start)
            layer.subtract_start()
        if kind.use_dora:
            layer.lora_magnitude_vector[ADAPTER].weight.data = layer.row_norms(ADAPTER)
    return parameters


def trained_names(transformer: SD3Transformer2DModel) -> list[str]:
    """What is trained, in the order of `attach_lora`'s parameters: names inside their blocks, as attn.to_q.lora_A."""
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    return [name.split(".", 2)[2].removesuffix(".weight").removesuffix(f".{ADAPTER}") for name in names]


@torch.no_grad()
def start_from(transformer: SD3Transformer2DModel, layers: Mapping[str, LayerStart]) -> None:
    """Has the LoRA that is trained begin as another one, whose layers it has, with ranks at least as large.

    What a larger rank adds is as new: drawn in `lora_A`, zero in `lora_B`. A DoRA that begins as a plain LoRA takes the
    magnitudes that leave it as it is.
    """
    trained = lora_layers(transformer) | lycoris_layers(transformer)
    for name, start in layers.items():
        layer = trained[name]
        if start.lycoris:
            for part, parameter in parts_of(layer, ADAPTER).items():
                parameter.copy_(start.lycoris[part])
            parameter.div_(layer.scaling[ADAPTER])  # the last
            continue
        rank = len(start.down)
        layer.lora_A[ADAPTER].weight[:rank] = start.down
        layer.lora_B[ADAPTER].weight[:, :rank] = start.up / layer.scaling[ADAPTER]
        if ADAPTER in layer.lora_magnitude_vector:
            magnitudes = layer.row_norms(ADAPTER) if start.magnitudes is None else start.magnitudes
            layer.lora_magnitude_vector[ADAPTER].weight.copy_(magnitudes)


def peft_patterns(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """PEFT's patterns of the layers that have another value; one a value, since PEFT tries each on every layer."""
    others = {value for value in values.values() if value != usual}
    return {
        "^(?:" + "|".join(re.escape(name) for name, own in values.items() if own == value) + ")": value
        for value in sorted(others)
    }


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether a LoRA is attached to it, or a LoKr or a LoHa; without one nothing here imports PEFT."""
    return hasattr(model, "peft_config")


@contextmanager
def lora_off(transformer: torch.nn.Module) -> Iterator[None]:
    """Within it the adapters are off, and the base alone computes.

    Not by peft's `enable_adapters`, which would freeze what is trained, and thaw it afterwards.
    """
    if not has_adapter(transformer):
        yield
        return
    from sd3_lora.transformer.added_layers import tuner_layers

    layers = tuner_layers(transformer)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def lora_layers(transformer: SD3Transformer2DModel) -> dict[str, AddedLora]:
    """The layers that have the LoRA that is trained, by name."""
    if not has_adapter(transformer):
        return {}
    from sd3_lora.transformer.added_layers import Linear

    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, Linear) and ADAPTER in module.lora_A
    }


@contextmanager
def lora_in(transformer: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it the matrices of the LoRA that is trained have this dtype, as those of one that was loaded to draw.

    So nothing needs autocast, under which norms are computed in float32. Afterwards they are in the memory that they
    had, with the bits that they had. DoRA's magnitudes, a LoKr and a LoHa stay in float32, as when they are loaded.
    """
    held = [(tensor, tensor.data) for layer in lora_layers(transformer).values() for tensor in layer.matrices]
    try:
        for tensor, data in held:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


@torch.no_grad()
def _decompose(name: str, layer: AddedLora, start: LoraStart) -> None:
    """Writes the start that is taken from the weight into `lora_A` and `lora_B`."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight, rank = layer.get_base_layer().weight, len(down)
    if rank > min(weight.shape):
        raise UserError(
            f"--init_lora_weights {start}: {name} has a rank of {min(weight.shape)}, less than {rank}: type a lower "
            "--rank or --rank_pattern"
        )
    if weight.is_meta:  # only its bytes are counted
        return
    weight = weight.float()
    if start == "olora":  # the first columns of Q depend on the first columns of the weight alone
        basis = torch.linalg.qr(weight[:, :rank]).Q
        down.copy_(basis.t() @ weight)
        up.copy_(basis)
        return
    left, values, right = torch.svd_lowrank(weight, q=min(rank + _OVERSAMPLED, *weight.shape), niter=_SVD_ITERATIONS)
    roots = (values[:rank] / layer.scaling[ADAPTER]).sqrt()
    down.copy_(roots[:, None] * right[:, :rank].t())
    up.copy_(left[:, :rank] * roots)


def lora_tensors(transformer: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The LoRA as it is trained, float32 on the CPU; names as in peft.

    What is subtracted is there too, as `.start_A` and `.start_B`.
    """
    from peft import get_peft_model_state_dict

    tensors = dict(get_peft_model_state_dict(transformer))
    for name, layer in lora_layers(transformer).items():
        tensors |= dict(zip(_start_names(name), getattr(layer, "start", None) or (), strict=False))
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def load_lora_tensors(transformer: SD3Transformer2DModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes what `lora_tensors` returned into a LoRA of the same kind, where its parameters lie."""
    parameters = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    for name, tensor in tensors.items():
        own = name.removesuffix(".weight")
        if own.endswith((".start_A", ".start_B")):
            where = own
        elif own.rpartition(".")[2] in _LYCORIS_PARTS:
            where = f"{own}.{ADAPTER}"
        else:
            where = f"{own}.{ADAPTER}.weight"
        parameters[where].data.copy_(tensor)


def _start_names(layer: str) -> tuple[str, str]:
    return f"{layer}.start_A", f"{layer}.start_B"


def plain_tensors(transformer: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The LoRA for the untouched base with alpha = rank, float32 on the CPU; names as in peft.

    The strength is folded into `lora_B`. A start that was subtracted is appended, which doubles the rank.
    """
    tensors = lora_tensors(transformer)
    for name, layer in lora_layers(transformer).items():
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        start = [tensors.pop(key) for key in _start_names(name) if key in tensors]
        if start:
            tensors[down] = torch.cat((tensors[down], start[0]))
            tensors[up] = torch.cat((tensors[up], -start[1]), dim=1)
        tensors[up] = tensors[up] * layer.scaling[ADAPTER]
    return tensors


def save_lora(
    folder: Path,
    transformer: SD3Transformer2DModel,
    record: Mapping[str, Any],
    file_name: str = LORA_FILE,
    clips: Mapping[str, torch.nn.Module] | None = None,
) -> Path:
    """Writes diffusers' file, or LyCORIS', atomically, reads it back and compares.

    Args:
        folder: where to write it.
        transformer: with the LoRA attached.
        record: base model, prompts and the like, kept in the metadata for inference.
        file_name: of the file.
        clips: that have a LoRA too, by their names in a pipeline.

    Raises:
        UserError: the weights are not finite: nothing is written.
        OSError: what was read back is not what was written.
    """
    tensors, metadata = _file_of(transformer, record, clips or {})
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"the LoRA has NaN or infinity in {bad[0]}: not saved; lower --learning_rate and train again")
    path = folder / file_name
    with replacing(path) as unfinished:
        write_tensors(unfinished, tensors, metadata)
        written = load(unfinished.read_bytes())  # not mapped: Windows renames no file that is
        if written.keys() != tensors.keys() or any(not torch.equal(written[name], tensors[name]) for name in tensors):
            raise OSError(f"{path}: the disk returned other bytes than were written")
    return path


def _file_of(
    transformer: SD3Transformer2DModel, record: Mapping[str, Any], clips: Mapping[str, torch.nn.Module]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors and metadata."""
    lycoris = lycoris_layers(transformer)
    if lycoris:
        tensors = lycoris_file(transformer, ADAPTER)
        rank, settings = _most_common({name: layer.r[ADAPTER] for name, layer in lycoris.items()}), {}
    else:
        tensors, adapters = {}, dict[str, Any]()
        for prefix, model in {_PREFIX: transformer, **{f"{name}.": clip for name, clip in clips.items()}}.items():
            plain = plain_tensors(model)
            tensors |= {prefix + name: tensor for name, tensor in plain.items()}
            adapters |= {prefix + key: value for key, value in _adapter_settings(plain).items()}
        rank = adapters[f"{_PREFIX}r"]
        settings = {LORA_ADAPTER_METADATA_KEY: json.dumps(adapters)}
    own = json.dumps({**record, "rank": rank}, ensure_ascii=False)
    return tensors, {"format": "pt", **settings, METADATA_KEY: own}


def _most_common(ranks: Mapping[str, int]) -> int:
    return Counter(ranks[name] for name in sorted(ranks)).most_common(1)[0][0]


def _adapter_settings(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """PEFT's configuration of a plain LoRA, or of a DoRA, with alpha = rank in every layer."""
    ranks = {
        name.removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    usual = _most_common(ranks)
    settings = {"r": usual, "lora_alpha": usual, "target_modules": sorted(ranks), "peft_type": "LORA"}
    patterns = peft_patterns(ranks, usual)
    if patterns:
        settings |= {"rank_pattern": patterns, "alpha_pattern": patterns}
    if any(name.endswith(".lora_magnitude_vector") for name in tensors):
        settings["use_dora"] = True
    return settings


def read_lora_record(path: Path) -> dict[str, Any]:
    """The metadata that this project's training wrote into a LoRA; empty for a LoRA of another program.

    Raises:
        UserError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as handle:
            return dict(json.loads((handle.metadata() or {}).get(METADATA_KEY, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: train again, or download it again") from error
