"""The files of an SD3 model in diffusers' layout: their place, their provenance, and the sizes that they allow."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, print_in_rank_0
from sd3_lora.common.component_weights import missing_shards, require_whole, shapes_by_config, tensors_hash
from sd3_lora.common.config import ModelConfig, missing_path
from sd3_lora.common.defaults import MINIATURE
from sd3_lora.common.known_models import known_configs
from sd3_lora.common.records import Provenance
from sd3_lora.common.single_file import require_converted
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.common.weight_hashes import require_as_on_the_hub, whole_hash

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TEXT_COMPONENTS = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
FORMAT_VERSION = 1
_SAMPLES_PER_FILE, _BYTES_PER_SAMPLE = 16, 4096


class ModelFiles:
    """A model's folder; a component is downloaded when it is first needed.

    Args:
        config: which model.
        is_plan: whether no more is wanted than shapes, as for `--plan`: of a known model nothing is downloaded then.

    Attributes:
        is_known: whether this is a known model without its files: it has configurations and shapes, and no more.

    Raises:
        UserError: the folder is not an SD3 pipeline, the hub has no such model, or its licence is not yet accepted.
    """

    def __init__(self, config: ModelConfig, is_plan: bool = False):
        self.config, self._is_plan = config, is_plan
        self.name = config.pretrained_model_name_or_path or "miniature"
        self.revision: str | None = None  # the commit, once known: a branch may move during a run
        self._hub_files: dict[str, str] | None = None
        self._content_hashes: dict[tuple[_FileState, ...], str | None] = {}
        self._whole_hashes: dict[tuple[_FileState, ...], str | None] = {}
        self._whole: dict[str, list[_FileState]] = {}  # files that were checked
        self._local: Path | None = None
        is_hub_s = config.revision is None and not Path(self.name).exists()
        self._known = known_configs(self.name) if is_plan and is_hub_s else None
        self.is_known = self._known is not None
        if self.is_known:
            print_in_rank_0(f"planned by the shapes of {self.name}, which are known here: nothing is downloaded")
            return
        self._local = self._local_folder()
        # The smallest file first: a closed licence gate is found before gigabytes are fetched.
        kind = self._read_json("model_index.json").get("_class_name", "")
        if not kind.startswith("StableDiffusion3"):
            raise UserError(
                f"{self.name} is a {kind or 'model of another kind'}, not a Stable Diffusion 3 pipeline: give one as "
                "--pretrained_model_name_or_path"
            )
        if self._local is None:
            self.revision = self.folder.name  # the hub's cache names its snapshot folders by commit

    def _local_folder(self) -> Path | None:
        if self.config.is_miniature:
            return MINIATURE
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise UserError(f"{folder} has no model_index.json: give the folder of a diffusers SD3 pipeline")
            return folder
        if folder.is_file():
            return require_converted(folder)
        fault = missing_path(str(folder))
        if fault:
            raise UserError(f"--pretrained_model_name_or_path: {fault}")
        return None

    def _file(self, name: str) -> Path:
        if self._local is not None:
            return self._local / name
        with _HubErrors(self.name):
            return Path(
                hf_hub_download(
                    self.name, name, revision=self.revision or self.config.revision, cache_dir=self.config.cache_dir
                )
            )

    def component(self, name: str) -> Path:
        """The folder that holds component `name`'s configuration and weights; downloads them if need be.

        Raises:
            UserError: the model lacks the component or its weights in safetensors; or these are not whole, or not those
            of its configuration.
        """
        folder = self._snapshot([f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model", *self._weight_patterns(name)])
        if not (folder / name).is_dir():
            raise UserError(f"{self.name} has no {name}: give the folder or hub id of a whole SD3 pipeline")
        if not name.startswith(("tokenizer", "scheduler")) and not self.weight_files(name):
            wanted = f"{self.config.variant} weights" if self.config.variant else "weights"
            raise UserError(f"{self.name}/{name} has no {wanted} in safetensors: check --variant and the download")
        self._require_whole(name)
        return folder / name

    def components(self) -> list[str]:
        """The names of the pipeline's components."""
        index = self._read_json("model_index.json")
        return [name for name, value in index.items() if isinstance(value, list) and all(value)]

    def _require_whole(self, name: str) -> None:
        paths = self.weight_files(name)
        state = _state_of(paths)
        if paths and self._whole.get(name) != state:
            require_whole(self.folder / name, self.read_config(name), paths, self.config.variant)
            if not self._is_plan:
                require_as_on_the_hub(paths)
            self._whole[name] = state

    def _weight_patterns(self, name: str) -> list[str]:
        variant = self.config.variant
        return [f"{name}/*.{variant}*safetensors"] if variant else [f"{name}/*.safetensors"]

    def _snapshot(self, patterns: list[str]) -> Path:
        if self._local is not None:
            return self._local
        with _HubErrors(self.name):
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision or self.config.revision,
                    cache_dir=self.config.cache_dir,
                    allow_patterns=["model_index.json", *patterns],
                    ignore_patterns=None if self.config.variant else ["*.fp16*", "*.bf16*", "*.non_ema*"],
                )
            )

    @property
    def folder(self) -> Path:
        """The pipeline's folder (of the hub's cache, for a hub model)."""
        return self._local or self._file("model_index.json").parent

    def read_config(self, component: str) -> dict[str, Any]:
        """A component's config.json.

        Raises:
            UserError: the model has no such component.
        """
        if self._known:
            return self._known[component]
        return self._read_json(f"{component}/config.json")

    def tensor_shapes(self, component: str) -> dict[str, torch.Size]:
        """The shape of each of a component's tensors, from its files' headers; these are downloaded if need be.

        Raises:
            UserError: as `component`.
        """
        if self._known:
            return shapes_by_config(component, self._known[component])
        self.component(component)
        with TensorFiles(self.weight_files(component)) as weights:
            return weights.shapes()

    def read_scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration."""
        return self._read_json("scheduler/scheduler_config.json")

    def scheduler_hash(self) -> str:
        """A short hash of the scheduler's configuration, for a picture's settings."""
        return hashlib.sha256(json.dumps(self.read_scheduler_config(), sort_keys=True).encode()).hexdigest()[:12]

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.name} has no {name}: give the folder or hub id of a whole SD3 pipeline") from error
        except ValueError as error:
            raise UserError(f"{path} is not whole ({error}): delete it and download it again") from error

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files that are here, of the variant asked for."""
        return [path for path in sorted((self.folder / component).glob("*")) if self._is_weight_file(path.name)]

    def _is_weight_file(self, name: str) -> bool:
        if not name.endswith(".safetensors"):
            return False
        if self.config.variant:
            return f".{self.config.variant}" in name
        return not any(part in name for part in (".fp16", ".bf16", ".non_ema"))

    def provenance(self, components: Iterable[str], precision: str, size: int) -> Provenance:
        """The provenance of an artefact that `components` make.

        It hashes their configurations and whole vocabularies, which are small, and those weights that are here: by
        samples, as earlier builds did, and whole (`weight_hashes`). Of a hub model it also takes the hub's own hashes
        of the weight files, which need no download, so that training never fetches the text encoders. Of a known model
        without its files it is the provenance of nothing.
        """
        if self._known:
            return Provenance(FORMAT_VERSION, self.name, None, "", None, precision, size, library_versions())
        components = sorted(components)
        configs, weights = hashlib.sha256(), hashlib.sha256()
        for component in components:
            name = "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"
            configs.update(f"{component}/{name}\n".encode())
            configs.update(_canonical_json(self._read_json(f"{component}/{name}")))
            if self._local is not None:
                is_vocabulary = component.startswith("tokenizer")
                for path in self._content_files(self.folder, component):
                    weights.update(path.read_bytes() if is_vocabulary else _sample_bytes(path))
            elif component.startswith("tokenizer"):
                self.component(component)
        here = self._hashes(self.folder, components)
        if self._local is None and here.files is None:
            here = replace(here, files=self._hash_by_hub(components))
        return Provenance(
            format_version=FORMAT_VERSION,
            model=self.name,
            revision=self.revision,
            config_hash=configs.hexdigest(),
            weights_hash=weights.hexdigest() if self._local is not None else None,
            precision=precision,
            size=size,
            versions=library_versions(),
            tensors_hash=here.tensors,
            files_hash=here.files,
            whole_hash=None if here.tensors is None else self._whole_hash(components),
            same_revisions=self._same_revisions(here, components),
        )

    def _content_files(self, folder: Path, component: str) -> list[Path]:
        """The files beside the configuration that decide a component's output: weights, or a tokenizer's vocabulary."""
        return [path for path in sorted((folder / component).glob("*")) if self._is_content(component, path.name)]

    def _is_content(self, component: str, name: str) -> bool:
        if not component.startswith("tokenizer"):
            return self._is_weight_file(name)
        return name != "tokenizer_config.json" and name.endswith((".json", ".txt", ".model"))

    def _hashes(self, folder: Path, components: Iterable[str]) -> _WeightHashes:
        """What is known of the weights in a folder; None where a component is not here as a whole."""
        digest, blobs = hashlib.sha256(), list[str]()
        for component in components:
            paths = self._content_files(folder, component)
            if not paths or missing_shards(folder / component, self.config.variant):
                return _WeightHashes()
            content = self._content_hash(component, paths)
            if content is None:
                return _WeightHashes()
            digest.update(f"{component} {content}\n".encode())
            # In the hub's cache a file is a link to a blob, whose name is the hub's hash of it.
            blobs += [f"{component}/{path.name} {path.readlink().name}" for path in paths if path.is_symlink()]
            blobs += ["unknown" for path in paths if not path.is_symlink()]
        is_known = self._local is None and "unknown" not in blobs
        return _WeightHashes(digest.hexdigest(), _hash_of_lines(blobs) if is_known else None)

    def _content_hash(self, component: str, paths: Sequence[Path]) -> str | None:
        """Of a component's files, sampled once as long as they stay as they are; None where one is not whole."""
        key = tuple(_state_of(paths))
        if key not in self._content_hashes:
            if component.startswith("tokenizer"):
                self._content_hashes[key] = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
            else:
                self._content_hashes[key] = tensors_hash(paths)
        return self._content_hashes[key]

    def _whole_hash(self, components: Iterable[str]) -> str | None:
        """Of the components' weights and vocabularies, all of which are here."""
        lines = []
        for component in components:
            paths = self._content_files(self.folder, component)
            is_vocabulary = component.startswith("tokenizer")
            known = self._content_hash(component, paths) if is_vocabulary else self._whole_hash_of(paths)
            if known is None:
                return None
            lines.append(f"{component} {known}")
        return _hash_of_lines(lines)

    def _whole_hash_of(self, paths: Sequence[Path]) -> str | None:
        key = tuple(_state_of(paths))
        if key not in self._whole_hashes:
            self._whole_hashes[key] = whole_hash(paths)
        return self._whole_hashes[key]

    def _hash_by_hub(self, components: Iterable[str]) -> str | None:
        """The `files` of `_hashes`, asked of the hub; None where it does not answer."""
        if self._hub_files is None:
            self._hub_files = _ask_hub(self.name, self.revision)
        lines = []
        for component in components:
            names = [name for name in self._hub_files if name.rpartition("/")[0] == component]
            names = [name for name in names if self._is_content(component, name.rpartition("/")[2])]
            if not names:
                return None
            lines += [f"{name} {self._hub_files[name]}" for name in names]
        return _hash_of_lines(lines)

    def _same_revisions(self, here: _WeightHashes, components: Iterable[str]) -> frozenset[str]:
        """Other commits in the hub's cache with the same weights: artefacts of earlier builds know the commit alone."""
        if self._local is not None:
            return frozenset()
        others = [path for path in self.folder.parent.iterdir() if path.is_dir() and path != self.folder]
        hashes = {path.name: self._hashes(path, components) for path in others}
        return frozenset(name for name, other in hashes.items() if here.is_same(other))

    def latent_channels_and_scale(self) -> tuple[int, int]:
        """The VAE's latent channels, and pixels per latent."""
        config = self.read_config("vae")
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    def clip_tokens(self) -> int:
        """The tokens that a CLIP makes of every prompt; T5's follow them."""
        return int(self.read_config("text_encoder")["max_position_embeddings"])

    def size_step_and_limit(self) -> tuple[int, int]:
        """Of what every side of a picture is a multiple, and the longest side, both in pixels."""
        config, (_, vae_scale) = self.read_config("transformer"), self.latent_channels_and_scale()
        step = vae_scale * config["patch_size"]
        return step, step * config["pos_embed_max_size"]

    def resolution(self, asked: int | None) -> int:
        """`asked`, or the model's own resolution in pixels.

        Raises:
            UserError: the model cannot take it.
        """
        config, (_, vae_scale) = self.read_config("transformer"), self.latent_channels_and_scale()
        resolution = config["sample_size"] * vae_scale if asked is None else asked
        check_size(resolution, "resolution", config, vae_scale)
        return resolution


def check_size(size_px: int, flag: str, transformer_config: dict[str, Any], vae_scale: int) -> None:
    """Checks one side of a picture against what the transformer's positional embedding holds.

    Raises:
        UserError: not a multiple of a patch, or past the largest.
    """
    step = vae_scale * transformer_config["patch_size"]
    largest = step * transformer_config["pos_embed_max_size"]
    if size_px < step or size_px % step or size_px > largest:
        below = max(step, min(size_px, largest) // step * step)
        raise UserError(
            f"--{flag} {size_px} does not fit this model, which takes multiples of {step} up to {largest}: "
            f"type --{flag} {below}"
        )


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide the numbers."""
    names = ("torch", "diffusers", "transformers", "bitsandbytes", "peft", "safetensors")
    return {name: _version(name) for name in names}


_version = cache(importlib.metadata.version)  # it parses a long text each time


def _state_of(paths: Sequence[Path]) -> list[_FileState]:
    for path in paths:
        if not path.is_file() and not path.is_dir():  # a folder is told where it is read
            gone = f"{path} is no file, or a link to one that is gone"
            raise UserError(f"{gone}: delete it, and download the model again")
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _canonical_json(content: dict[str, Any]) -> bytes:
    """A configuration without the keys that differ between two saves of the same component."""
    ignored = ("_diffusers_version", "transformers_version", "_name_or_path", "torch_dtype", "dtype")
    return json.dumps({k: v for k, v in content.items() if k not in ignored}, sort_keys=True).encode()


def _sample_bytes(path: Path) -> bytes:
    """The file's size and evenly spread samples of it: other weights differ in all of them."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES_PER_FILE):
            file.seek(i * max(0, size - _BYTES_PER_SAMPLE) // (_SAMPLES_PER_FILE - 1))
            digest.update(file.read(_BYTES_PER_SAMPLE))
    return digest.digest()


def _hash_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _ask_hub(model: str, revision: str | None) -> dict[str, str]:
    """The hub's hash of each file of a commit, by path; empty where it does not answer."""
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=10)
    except (HTTPError, OSError):
        return {}
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    return {name: value for name, value in hashes.items() if value}


_FileState = tuple[Path, int, int]  # with its size and time


@dataclass(frozen=True)
class _WeightHashes:
    """By what the weights of some components are known.

    Attributes:
        tensors: by their tensors.
        files: by the hub's hashes of their files.
    """

    tensors: str | None = None
    files: str | None = None

    def is_same(self, other: _WeightHashes) -> bool:
        """Whether they are known to be the same; the hub's hashes decide where both sides have them."""
        if self.files and other.files:
            return self.files == other.files
        return self.tensors is not None and self.tensors == other.tensors


class _OneLine(logging.Filter):
    """In place of huggingface_hub's notes about requests that it tries again, two for each, one sentence."""

    def __init__(self) -> None:
        super().__init__()
        self._is_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        is_first, self._is_said = not self._is_said, True
        record.msg, record.args = "the hub does not answer: trying again for up to half a minute", ()
        return is_first


logging.getLogger("huggingface_hub.utils._http").addFilter(_OneLine())


class _HubErrors:
    """Turns the hub's exceptions into a sentence with the remedy."""

    def __init__(self, model: str):
        self.model = model

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        model = self.model
        if isinstance(error, GatedRepoError):
            raise UserError(
                f"{model} is gated: accept its licence at https://huggingface.co/{model} , "
                "then type `hf auth login` and run this again"
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise UserError(f"{model} has no such revision: check --revision") from error
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            raise UserError(
                f"{model} is neither a folder here nor a model that you can see on the hub: check the spelling of "
                "--pretrained_model_name_or_path, or type `hf auth login` if it is private"
            ) from error
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise UserError(
                f"{model} is neither a folder here nor downloaded yet, and the hub cannot be reached: "
                "check the path or the connection"
            ) from error
        if isinstance(error, EntryNotFoundError):  # stabilityai/stable-diffusion-3-medium, without -diffusers
            raise UserError(
                f"{model} lacks files of a diffusers SD3 pipeline: give the id of one, "
                "such as stabilityai/stable-diffusion-3-medium-diffusers"
            ) from error
        if isinstance(error, HfHubHTTPError):
            raise UserError(f"the hub refused {model} ({error}): try again later") from error
