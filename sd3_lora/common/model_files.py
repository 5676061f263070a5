"""The files of an SD3 model in diffusers' layout: their place, their provenance, and the sizes that they allow."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.records import Provenance

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

MINIATURE = PROJECT_FOLDER / "miniature"
TEXT_COMPONENTS = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
FORMAT_VERSION = 1
_SAMPLES_PER_FILE, _BYTES_PER_SAMPLE = 16, 4096


class ModelFiles:
    """A model's folder; a component is downloaded when it is first needed.

    Args:
        config: which model.

    Raises:
        UserError: the folder is not an SD3 pipeline, the hub has no such model, or its licence is not yet accepted.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.name = config.pretrained_model_name_or_path or "miniature"
        self.revision: str | None = None  # the commit, once known: a branch may move during a run
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
            raise UserError(f"{folder} is one file: give the folder or hub id of a diffusers SD3 pipeline")
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
            UserError: the model lacks the component or its weights in safetensors.
        """
        folder = self._snapshot([f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model", *self._weight_patterns(name)])
        if not (folder / name).is_dir():
            raise UserError(f"{self.name} has no {name}: give the folder or hub id of a whole SD3 pipeline")
        if not name.startswith(("tokenizer", "scheduler")) and not self.weight_files(name):
            wanted = f"{self.config.variant} weights" if self.config.variant else "weights"
            raise UserError(f"{self.name}/{name} has no {wanted} in safetensors: check --variant and the download")
        for path in self.weight_files(name):
            try:
                with safe_open(path, "pt"):  # reads the header, which knows the file's length
                    pass
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file: delete it and download it again") from error
        return folder / name

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
        return self._read_json(f"{component}/config.json")

    def read_scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration."""
        return self._read_json("scheduler/scheduler_config.json")

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
        files = sorted((self.folder / component).glob("*.safetensors"))
        if self.config.variant:
            return [f for f in files if f".{self.config.variant}" in f.name]
        return [f for f in files if not any(part in f.name for part in (".fp16", ".bf16", ".non_ema"))]

    def provenance(self, components: Iterable[str], precision: str, size: int) -> Provenance:
        """The provenance of an artefact that `components` make.

        It hashes their configurations, which are small. Of a folder it also hashes samples of the weights and whole
        vocabularies; of a hub model it does not, so that training never downloads the text encoders.
        """
        components = sorted(components)
        configs, weights = hashlib.sha256(), hashlib.sha256()
        for component in components:
            name = "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"
            configs.update(f"{component}/{name}\n".encode())
            configs.update(_canonical_json(self._read_json(f"{component}/{name}")))
            if self._local is not None:
                is_vocabulary = component.startswith("tokenizer")
                for path in self._content_files(component):
                    weights.update(path.read_bytes() if is_vocabulary else _sample_bytes(path))
        return Provenance(
            format_version=FORMAT_VERSION,
            model=self.name,
            revision=self.revision,
            config_hash=configs.hexdigest(),
            weights_hash=weights.hexdigest() if self._local is not None else None,
            precision=precision,
            size=size,
            versions=library_versions(),
        )

    def weights_hash(self, component: str) -> str:
        """sha256 of samples of a component's weights, which must be here: equal files are equal weights.

        Of a folder it is what `provenance` has; a hub model has it too, whatever its commit.
        """
        weights = hashlib.sha256()
        for path in self.weight_files(component):
            weights.update(_sample_bytes(path))
        return weights.hexdigest()

    def _content_files(self, component: str) -> list[Path]:
        """The files beside the configuration that decide a component's output: weights, or a tokenizer's vocabulary."""
        if not component.startswith("tokenizer"):
            return self.weight_files(component)
        files = (self.folder / component).iterdir()
        return sorted(f for f in files if f.name != "tokenizer_config.json" and f.suffix in (".json", ".txt", ".model"))

    def latent_channels_and_scale(self) -> tuple[int, int]:
        """The VAE's latent channels, and pixels per latent."""
        config = self.read_config("vae")
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    def clip_tokens(self) -> int:
        """The tokens that a CLIP makes of every prompt; T5's follow them."""
        return int(self.read_config("text_encoder")["max_position_embeddings"])

    def latent_size(self, resolution: int) -> tuple[int, int]:
        """Height and width of a square picture's latents."""
        side = resolution // self.latent_channels_and_scale()[1]
        return side, side

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
    return {
        name: importlib.metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "bitsandbytes", "peft", "safetensors")
    }


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
