"""The weights of one component of a model: whether they are whole, and which they are.

Both are read from the headers of the safetensors files, and from few bytes behind them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, first_line
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.common.weight_hashes import spans

import torch
from safetensors import SafetensorError, safe_open

# Components whose classes look for weights by these names; the transformer's files are read whatever their names.
_LOADED_BY_NAME = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
    "vae": "diffusion_pytorch_model",
}
_COMPONENTS = (*_LOADED_BY_NAME, "transformer")
_SAMPLES_PER_TENSOR, _BYTES_PER_SAMPLE = 3, 512


def require_whole(folder: Path, config: Mapping[str, Any], paths: Sequence[Path], variant: str | None) -> None:
    """Checks that the files hold the tensors that a component's configuration asks for: all of them, and no others.

    Text encoders may hold parts beside the encoder, such as the decoder of a whole T5: these are left out with a note.

    Args:
        folder: of the component, whose name tells its kind.
        config: its config.json.
        paths: its weight files.
        variant: of the files, such as fp16.

    Raises:
        UserError: a file is truncated, or a shard or tensor is missing, one too many, or of another shape.
    """
    for path in paths:
        try:
            with safe_open(path, "pt"):  # reads the header, which knows the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: delete it and download it again") from error
    _require_shards(folder, paths, variant)
    if folder.name not in _COMPONENTS:
        return
    if "quantization_config" in config:
        raise UserError(
            f"{folder} is quantized already, which cannot be used here: give the model's original weights as "
            "--pretrained_model_name_or_path"
        )
    with TensorFiles(paths) as weights:
        shapes = weights.shapes()
    _require_plausible_depth(folder, config, len(shapes))
    expected = _expected_tensors(folder, config)
    unexpected = _require_same_shapes(folder, expected, shapes)
    if unexpected:
        print(f"note: {folder} holds {_first_of(unexpected)}, which is no part of the encoder: left out")


def missing_shards(folder: Path, variant: str | None) -> list[str]:
    """The names of weight files that the component's index lists and that are not there."""
    return sorted(name for name in _indexed_files(folder, variant) if not (folder / name).is_file())


def _indexed_files(folder: Path, variant: str | None) -> set[str]:
    """The weight files that the component's index lists; none where it has no index."""
    names: set[str] = set()
    for path in folder.glob(f"*.safetensors.index.{variant}.json" if variant else "*.safetensors.index.json"):
        try:
            names |= set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not whole: delete it and download it again") from error
    return names


def _require_shards(folder: Path, paths: Sequence[Path], variant: str | None) -> None:
    name = _LOADED_BY_NAME.get(folder.name)
    whole = f"{name}.{variant}.safetensors" if variant else f"{name}.safetensors"
    present = {path.name for path in paths}
    if whole in present:  # a class takes it before it looks at an index
        return
    missing = missing_shards(folder, variant)
    if missing:
        raise UserError(
            f"{folder} lacks {_first_of(missing)}, which its index lists: download it again, or check --variant"
        )
    unlisted = sorted(present - _indexed_files(folder, variant))
    if name and unlisted:
        raise UserError(
            f"{folder} has neither {whole} nor an index that lists {_first_of(unlisted)}: download it again, or check "
            "--variant"
        )


def _require_plausible_depth(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Each layer has a tensor: a model of more layers than that would be made for hours before one is found missing."""
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and value > tensors:
            raise UserError(
                f"{folder / 'config.json'} asks for {key} {value}, where the files hold {tensors} tensors: give the "
                "weights the config.json that they were saved with"
            )


def _expected_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the component's model, on the meta device; tied ones are one object.

    Raises:
        UserError: no model can be made of the configuration.
    """
    try:
        with torch.device("meta"):
            model = _make_model(folder.name, config)
    except Exception as error:  # the libraries raise whatever a wrong number leads to
        reason = first_line(error)
        raise UserError(
            f"no model can be made of {folder / 'config.json'} ({reason}): delete it and download it again"
        ) from error
    return dict(model.state_dict(keep_vars=True))


def _make_model(component: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """Imports what it makes alone: each takes a second to import."""
    if component == "transformer":
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel.from_config(config)
    if component == "vae":
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(config)
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if component == "text_encoder_3":
        return T5EncoderModel(T5Config.from_dict(dict(config)))
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def shapes_by_config(component: str, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Every tensor's shape by the component's configuration alone; of tied tensors the first."""
    tensors = _expected_tensors(Path(component), config)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensors[name].shape for name in reversed(first.values())}


def _require_same_shapes(
    folder: Path, expected: Mapping[str, torch.Tensor], in_files: Mapping[str, torch.Size]
) -> list[str]:
    """Raises, or returns the tensors of other parts than the encoder."""
    tied = {id(expected[name]) for name in in_files if name in expected}
    missing = [name for name, tensor in expected.items() if name not in in_files and id(tensor) not in tied]
    unexpected = [name for name in in_files if name not in expected and not name.endswith(".position_ids")]
    other = [name for name in expected if name in in_files and in_files[name] != expected[name].shape]
    if missing:
        raise UserError(
            f"{folder} lacks {_first_of(missing)}, which its config.json asks for: delete the folder and download it "
            "again, or check --variant"
        )
    parts = {name.split(".")[0] for name in expected}
    wrong = [n for n in unexpected if not folder.name.startswith("text_encoder") or n.split(".")[0] in parts]
    if wrong:
        raise UserError(
            f"{folder} holds {_first_of(wrong)}, which its config.json has no place for: give the weights the "
            "config.json that they were saved with"
        )
    if other:
        shapes = f"{tuple(in_files[other[0]])} and by its config.json {tuple(expected[other[0]].shape)}"
        raise UserError(
            f"{folder}: {_first_of(other)} is of shape {shapes}: give the weights the config.json that they were "
            "saved with"
        )
    return unexpected


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def tensors_hash(paths: Sequence[Path]) -> str | None:
    """A hash of the names, dtypes and shapes of all tensors, and of samples of each.

    It is the same however the tensors are spread over files. None where a file is not whole.
    """
    try:
        digests = dict(digest for path in paths for digest in _tensor_digests(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    content = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(content.encode()).hexdigest()


def _tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        start, tensors = spans(file)
        for name, (dtype, shape, begin, end) in tensors.items():
            digest = hashlib.sha256(f"{dtype} {shape}\n".encode())
            last = max(begin, end - _BYTES_PER_SAMPLE)
            for i in range(_SAMPLES_PER_TENSOR):
                place = begin + i * (last - begin) // (_SAMPLES_PER_TENSOR - 1)
                file.seek(start + place)
                digest.update(file.read(min(_BYTES_PER_SAMPLE, end - place)))
            yield name, digest.hexdigest()
