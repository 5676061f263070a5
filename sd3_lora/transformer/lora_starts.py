"""Whether training can begin with a LoRA file, and what to type where it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sd3_lora.common.command_line import UserError, all_of
from sd3_lora.common.config import LoraType
from sd3_lora.transformer.lora import LoraKind
from sd3_lora.transformer.lora_files import LoraFile
from sd3_lora.transformer.lycoris import lycoris_layers, parts_of
from sd3_lora.transformer.trained_clips import CLIP_LAYERS

from diffusers import SD3Transformer2DModel

TYPE_NAMES: Mapping[LoraType, str] = {"lora": "plain LoRA", "lokr": "LoKr", "loha": "LoHa"}


def require_start(lora: LoraFile, ranks: Mapping[str, int], kind: LoraKind) -> None:
    """Checks that training can begin with a LoRA.

    Args:
        lora: to begin with.
        ranks: of the layers that are trained, by the names of the transformer's modules.
        kind: that is trained.

    Raises:
        UserError: it is of another kind; a layer of it is not trained, or has a larger rank.
    """
    flag = f"--init_lora {lora.path}"
    if lora.scales_inputs or lora.has_biases:
        of = "magnitudes of the layers' inputs" if lora.scales_inputs else "biases"
        raise UserError(f"{flag} has {of}, which are not trained here: begin with another")
    for name in lora.layers:
        if name not in ranks and not name.startswith("transformer_blocks."):
            raise UserError(f"{flag} has a LoRA on {name}, which is not trained here: begin with another")
    faults = [f"{flag} {fault}" for fault in _start_faults(lora, ranks, kind)]
    if faults:
        raise UserError(all_of(faults, "--init_lora"))


def _start_faults(lora: LoraFile, ranks: Mapping[str, int], kind: LoraKind) -> Iterator[str]:
    """What flags can mend, all of it, so that one round of typing does."""
    if lora.type != kind.type:
        remedy = f"leave out --lora_type {kind.type}" if lora.type == "lora" else f"type --lora_type {lora.type}"
        yield f"is a {TYPE_NAMES[lora.type]}, and this command trains another kind: {remedy}"
    more = [name for name in lora.layers if name not in ranks]
    if more:
        wanted = sorted({each.split(".", 2)[2] for each in (*lora.layers, *ranks) if each.startswith("transformer_b")})
        yield (
            f"has a LoRA on {more[0]}, which this command does not train: type --lora_layers {','.join(wanted)} "
            "and leave out --lora_blocks"
        )
    if lora.type == "lora":  # `require_lycoris_start` compares the shapes of others
        least = min(ranks.values(), default=0)  # what a layer will have that is not trained yet
        larger = {name: layer.rank for name, layer in lora.layers.items() if layer.rank > ranks.get(name, least)}
        for name, rank in list(larger.items())[:1]:
            yield (
                f"has a rank of {rank} on {name}, and this command {ranks.get(name, least)}: type --rank "
                f"{max(larger.values())} and leave out --rank_pattern"
            )
    if lora.is_dora and not kind.use_dora:
        yield "is a DoRA: add --use_dora"


def require_clip_start(lora: LoraFile, rank: int) -> None:
    """Checks that the CLIPs' LoRA can begin with what a file has of them.

    Args:
        lora: to begin with.
        rank: of the CLIPs' LoRA, which is a plain one.

    Raises:
        UserError: it is of another kind; a layer of it is not trained, or has a larger rank.
    """
    flag = f"--init_lora {lora.path}"
    for clip, part in lora.clips.items():
        if part.type != "lora" or part.is_dora or part.has_biases:
            raise UserError(
                f"{flag} has another kind than a plain LoRA on {clip}, which is not trained: begin with another"
            )
        for name, layer in part.layers.items():
            if name.rpartition(".")[2] not in CLIP_LAYERS:
                raise UserError(f"{flag} has a LoRA on {clip}.{name}, which is not trained here: begin with another")
            if layer.rank > rank:
                raise UserError(
                    f"{flag} has a rank of {layer.rank} on {clip}.{name}, and this command {rank}: type "
                    f"--text_encoder_rank {max(each.rank for each in part.layers.values())}"
                )


def require_lycoris_start(lora: LoraFile, transformer: SD3Transformer2DModel) -> None:
    """Checks that training can begin with a LoKr or a LoHa.

    Args:
        lora: to begin with, which `require_start` has seen.
        transformer: with what is to be trained, without weights.

    Raises:
        UserError: its parts have other shapes.
    """
    layers = lycoris_layers(transformer)
    for name in lora.layers:
        (trained,) = layers[name].active_adapters
        wanted = {part: list(tensor.shape) for part, tensor in parts_of(layers[name], trained).items()}
        found = {part: list(tensor.shape) for part, tensor in lora.start(name).lycoris.items()}
        if wanted != found:
            raise UserError(
                f"--init_lora {lora.path} has {_shapes_in_words(found)} on {name}, and this command "
                f"{_shapes_in_words(wanted)}: type the --rank"
                + (" and --lokr_factor" if lora.type == "lokr" else "")
                + " that it was trained with"
            )


def _shapes_in_words(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{part} {'×'.join(map(str, shapes[part]))}" for part in sorted(shapes))
