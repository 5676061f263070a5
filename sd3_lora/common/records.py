"""The typed objects that cross from one stage to the next.

Shapes: B batch, S text tokens (CLIP's and T5's), D joint attention width, P pooled width,
H, W pixels of the crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Settings of stage one that came after format version 1, each with its default: the value in artefacts that lack it. A
# setting at its default is not written, so that earlier builds read the artefact too.
LATER_SETTINGS: dict[str, Any] = {}
# Hashes of a provenance that came after format version 1; earlier builds ignore them.
_MAYBE_TEXTS = ("revision", "weights_hash", "tensors_hash", "files_hash", "whole_hash")
_LATER_HASHES = ("tensors_hash", "files_hash", "whole_hash")


@dataclass(frozen=True)
class InstanceImage:
    """One distinct picture of the subject.

    Attributes:
        image_id: sha256 of the file's bytes, hexadecimal; the key by which all stages join.
        path: where the file lies.
        prompt: the caption, or the instance prompt where the picture has none; of several captions the first.
        role: "instance" or "class".
        other_prompts: further captions.
        repeats: how many times it comes in a pass.
    """

    image_id: str
    path: Path
    prompt: str
    role: str = "instance"
    other_prompts: tuple[str, ...] = ()
    repeats: int = 1

    @property
    def prompts(self) -> tuple[str, ...]:
        """All captions, at least one: training takes them in turn."""
        return (self.prompt, *self.other_prompts)


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt's embedding by the three text encoders.

    Attributes:
        prompt: the text.
        roles: what the prompt is for: instance, uncaptioned, class, class_caption, validation, negative, empty.
        image_ids: the pictures that it describes.
        prompt_embeds: `(S, D)` float16.
        pooled_prompt_embeds: `(P,)` float16.
    """

    prompt: str
    roles: tuple[str, ...]
    image_ids: tuple[str, ...]
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor


@dataclass(frozen=True)
class LatentPosterior:
    """The VAE's raw posterior of one crop of one picture: neither shifted nor scaled.

    Attributes:
        image_id: sha256 of the file's bytes.
        variant: which crop, and whether mirrored (see `images.CropBox.name`).
        mean: `(16, H/8, W/8)`.
        std: `(16, H/8, W/8)`.
    """

    image_id: str
    variant: str
    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class LatentMask:
    """How much of each latent pixel of one crop is trained on.

    Attributes:
        variant: which crop (see `images.CropBox.name`).
        values: `(1, H/8, W/8)` float16 from 0 to 1, the mean of the mask's pixels there.
        source: sha256 of the mask's file, hexadecimal, or `alpha`: the picture's own.
    """

    variant: str
    values: torch.Tensor
    source: str


@dataclass(frozen=True)
class TrainingBatch:
    """The stacked tensors of one micro-batch.

    Attributes:
        image_ids: `B` keys, for the diagnosis of a bad step.
        latent_mean: `(B, 16, H/8, W/8)` raw.
        latent_std: `(B, 16, H/8, W/8)` raw.
        prompt_embeds: `(B, S, D)`.
        pooled_prompt_embeds: `(B, P)`.
        loss_weights: float32, the weight in the loss of each sample `(B,)`, or of each latent pixel `(B, 1, H/8, W/8)`.
        clip_tokens: `(B, 2, C)` int64, where the CLIPs are trained: what each of them encodes; negative in the place
            of an identifier whose embedding is trained.
        clip_kept: `(B, 2)` float32, 0 where a CLIP's part is dropped; None where none is.
    """

    image_ids: tuple[str, ...]
    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    loss_weights: torch.Tensor
    clip_tokens: torch.Tensor | None = None
    clip_kept: torch.Tensor | None = None

    def weighted(self, weights: torch.Tensor) -> TrainingBatch:
        """The same with each sample's weight multiplied by one of these `(B,)`."""
        shape = (-1, *(1 for _ in self.loss_weights.shape[1:]))
        return replace(self, loss_weights=self.loss_weights * weights.view(shape))


class StepInputs(NamedTuple):
    """The inputs of a micro-step, on the device.

    Attributes:
        latents: `(B, 16, H/8, W/8)` float32, a sample of the posterior, normalized.
        noise: likewise.
        sigmas: `(B, 1, 1, 1)` float32.
        timesteps: `(R,)` float32: R is B and, after these, the pictures that come once more with a prior prompt.
        prompt_embeds: `(R, S, D)` in the transformer's dtype.
        pooled_prompt_embeds: `(R, P)` likewise.
        loss_weights: `(B,)` or `(B, 1, H/8, W/8)` float32.
        prior_rows: `(R - B,)` int64: which of the B pictures come once more.
        clip_states: `(R, C, d)` in the transformer's dtype, where the CLIPs are trained: what they encode the prompts
            from (`TrainedClips.embed`); else empty.
        clip_ends: `(R, 2)` int64, likewise; else empty.
        clip_kept: `(R, 2)` float32, 0 where a CLIP's part is dropped; else empty.
        clip_places: `(R, 2, C)` int64, which of the identifier's vectors stands where, -1 for none; else empty.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    loss_weights: torch.Tensor
    prior_rows: torch.Tensor
    clip_states: torch.Tensor = torch.empty(0)
    clip_ends: torch.Tensor = torch.empty(0, dtype=torch.long)
    clip_kept: torch.Tensor = torch.empty(0)
    clip_places: torch.Tensor = torch.empty(0, dtype=torch.long)

    @property
    def conditions(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The transformer's inputs beside the noisy latents, with the base's embeddings."""
        return self.timesteps, self.prompt_embeds, self.pooled_prompt_embeds

    @property
    def modulating(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of the blocks' modulations: `timesteps` and `pooled_prompt_embeds`."""
        return self.timesteps, self.pooled_prompt_embeds


@dataclass(frozen=True)
class Provenance:
    """The origin of an artefact; it is stored inside the artefact.

    Attributes:
        format_version: of the file format.
        model: the model's hub id or folder, as the user gave it; used in messages, never compared.
        revision: the hub's commit; None for a folder.
        config_hash: sha256 of the configurations of the components that made the artefact.
        weights_hash: sha256 of sampled bytes of their weight files; None for a hub model.
        precision: int8, nf4, fp16, bf16 or fp32 of the component that dominates (T5, or the VAE).
        size: max_sequence_length in T5 tokens, or the resolution in pixels.
        versions: of the libraries; information only, never compared.
        settings: flag → value, of `LATER_SETTINGS`; one that is missing has its default there.
        tensors_hash: of all tensors of the weights, by samples; None where they are not here, as in earlier builds.
        files_hash: of the hub's own hashes of the weight files; None for a folder, and where they are not known.
        whole_hash: of all bytes of all tensors of the weights; None where they are not here, as in earlier builds.
        same_revisions: other commits of the hub's repository that are known to have the same weights. Not stored.
    """

    format_version: int
    model: str
    revision: str | None
    config_hash: str
    weights_hash: str | None
    precision: str
    size: int
    versions: dict[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors_hash: str | None = None
    files_hash: str | None = None
    whole_hash: str | None = None
    same_revisions: frozenset[str] = field(default=frozenset(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; what came after format version 1 only where it says something."""
        values = asdict(self)
        del values["same_revisions"]
        values = {name: value for name, value in values.items() if name not in _LATER_HASHES or value is not None}
        settings = {name: value for name, value in values.pop("settings").items() if value != _default_of(name)}
        return values | ({"settings": settings} if settings else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Provenance:
        """From what `to_dict` gave, in this build or an earlier one.

        Raises:
            KeyError: a field of format version 1 is missing (a foreign file).
            TypeError, ValueError: it is no provenance.
        """
        if not isinstance(values, dict):
            raise TypeError("a provenance is an object")
        required = [f.name for f in fields(cls) if f.default_factory is MISSING and f.default is MISSING]
        later: dict[str, Any] = {name: values.get(name) for name in _LATER_HASHES}
        texts = ["model", "config_hash", "precision", *(n for n in _MAYBE_TEXTS if values.get(n) is not None)]
        if not all(isinstance(values[name], str) for name in texts) or not isinstance(values["size"], int):
            raise TypeError("a value of the provenance is of another kind")
        return cls(**{name: values[name] for name in required}, settings=dict(values.get("settings", {})), **later)

    @property
    def identity(self) -> str:
        """A short hash of the components' configurations and weights, for the identity of a run."""
        known = self.whole_hash or self.tensors_hash or self.files_hash or self.revision or self.weights_hash or ""
        return self._identity_by(known[:12])

    @property
    def other_identities(self) -> frozenset[str]:
        """What the same weights are called where other hashes are known, and in earlier builds."""
        known = (self.whole_hash, self.tensors_hash, self.files_hash, self.revision, self.weights_hash)
        hashes = [h[:12] for h in known if h]
        hashes += [h[:8] for h in (self.revision, self.weights_hash, *self.same_revisions) if h]
        return frozenset(self._identity_by(h) for h in hashes)

    def _identity_by(self, weights: str) -> str:
        return f"{self.config_hash[:8]}-{weights}"

    def difference(self, wanted: Provenance, size_name: str) -> str | None:
        """The first difference from `wanted`, for a message; None where there is none.

        Args:
            wanted: the provenance that the reader's flags ask for.
            size_name: the flag behind `size`: max_sequence_length or resolution.
        """
        if self.format_version != wanted.format_version:
            return f"file format {self.format_version}, not {wanted.format_version}"
        if not self.same_model(wanted):
            name = f"{self.model}@{self.revision[:8]}" if self.revision else self.model
            wanted_name = f"{wanted.model}@{wanted.revision[:8]}" if wanted.revision else wanted.model
            if name == wanted_name:
                return f"other weights than {name} has now"
            hint = f" (--revision {self.revision} keeps it)" if self.revision and self.model == wanted.model else ""
            return f"model {name}, not {wanted_name}{hint}"
        if self.precision != wanted.precision:
            return f"precision {self.precision}, not {wanted.precision}"
        if self.size != wanted.size:
            return f"{size_name} {self.size}, not {wanted.size}"
        for name in sorted({*self.settings, *wanted.settings}):
            value, wanted_value = (side.settings.get(name, _default_of(name)) for side in (self, wanted))
            if value != wanted_value:
                known = name in LATER_SETTINGS
                return f"{name} {value}, " + (f"not {wanted_value}" if known else "which this build does not know")
        return None

    def same_model(self, other: Provenance) -> bool:
        """Whether both come from the same component weights, as far as both sides record them.

        The best hash that both sides have decides, whatever the commits: a new commit may change a text beside the
        weights. Where they have none in common, the commits do.
        """
        if self.config_hash != other.config_hash:
            return False
        for name in ("files_hash", "whole_hash", "tensors_hash", "weights_hash"):
            left, right = getattr(self, name), getattr(other, name)
            if left is not None and right is not None:
                return bool(left == right)
        if self.revision is None or other.revision is None or self.revision == other.revision:
            return True
        return self.revision in other.same_revisions or other.revision in self.same_revisions


def _default_of(setting: str) -> Any:
    return LATER_SETTINGS.get(setting)
