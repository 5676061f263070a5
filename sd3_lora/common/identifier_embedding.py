"""The identifier's embedding (textual inversion, Gal et al., arXiv 2208.01618): vectors that the CLIPs read in place of
the identifier's tokens. T5 reads the plain word.

The file is that of diffusers' advanced scripts, which ComfyUI reads too: `clip_l (n, d)` and `clip_g (n, d)`.

Shapes: n vectors, d width of a CLIP.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.checksums import Checksums
from sd3_lora.common.command_line import UserError, first_line
from sd3_lora.common.tensor_files import write_tensors

import torch
from safetensors import SafetensorError, safe_open

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # a pipeline's name of a CLIP → the file's
_METADATA_KEY = "sd3_lora"
_LORA_NAME, _NAME = "pytorch_lora_weights", "learned_embeds"  # diffusers' names of both kinds of file

EMBEDDING_FILE = f"{_NAME}.safetensors"


def embedding_path(lora_path: Path) -> Path:
    """Where the identifier's embedding of a LoRA lies: beside it.

    >>> embedding_path(Path("dog/pytorch_lora_weights_ema.safetensors")).name
    'learned_embeds_ema.safetensors'
    >>> embedding_path(Path("dog/dog-step00000500.safetensors")).name
    'dog-step00000500_learned_embeds.safetensors'
    """
    stem = lora_path.stem
    name = stem.replace(_LORA_NAME, _NAME, 1) if stem.startswith(_LORA_NAME) else f"{stem}_{_NAME}"
    return lora_path.with_name(f"{name}.safetensors")


def is_embedding(path: Path) -> bool:
    """Whether a file has the name of one, as `embedding_path` gives them."""
    return path.stem.startswith(_NAME) or path.stem.endswith(f"_{_NAME}")


def stands_in(word: str, prompt: str) -> bool:
    """Whether a prompt has the identifier, as a word of its own; capitals count as small letters, as to the CLIPs."""
    return bool(_places_of([word]).search(prompt))


def _places_of(words: Iterable[str]) -> re.Pattern[str]:
    """Where one of the words stands; a letter may stand beside a word's bracket, and not beside its letter."""
    parts = (
        (r"(?<!\w)" if re.match(r"\w", word) else "") + re.escape(word) + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in words
    )
    return re.compile("|".join(f"({part})" for part in parts), re.IGNORECASE)


class IdentifierTokenizer:
    """A CLIP's tokenizer that knows identifiers: the ids of their vectors are negative, -1 of the first.

    Args:
        tokenizer: the model's, which stays as it is.
        identifiers: word → number of its vectors. Those of the second word follow those of the first.
    """

    def __init__(self, tokenizer: Any, identifiers: Mapping[str, int]):
        self._tokenizer, self._known = copy.deepcopy(tokenizer), len(tokenizer)
        self._places, self._names = _places_of(identifiers), list[str]()
        count = 0
        for vectors in identifiers.values():
            names = [f"<identifier-vector-{count + index}>" for index in range(vectors)]
            self._tokenizer.add_tokens(names)
            self._names.append("".join(names))
            count += vectors

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        """As the tokenizer."""
        texts = [self._places.sub(lambda found: self._names[(found.lastindex or 1) - 1], text) for text in prompts]
        encoded = self._tokenizer(texts, **options)
        ids = encoded.input_ids
        if isinstance(ids, torch.Tensor):
            encoded["input_ids"] = torch.where(ids < self._known, ids, self._known - 1 - ids)
        return encoded


def embedding_note(word: str | None, lora_path: Path) -> str | None:
    """What becomes of the embedding when a LoRA is exported or merged, for the user; None where it has none.

    Args:
        word: the identifier whose embedding the LoRA was trained with, if any.
        lora_path: of that.
    """
    if word is None:
        return None
    path = embedding_path(lora_path)
    return (
        f"note: the LoRA was trained with an embedding of {word!r}, which stays a file of its own: draw with "
        f"{path} too (in ComfyUI, as an embedding; with inference.py, as --identifier_embedding)"
    )


@dataclass(frozen=True, eq=False)
class IdentifierEmbedding:
    """The vectors of one identifier. Two are equal where they are the same object.

    Attributes:
        word: the identifier, as it stands in prompts.
        vectors: `(n, d)` float32 of each CLIP, by its name in a pipeline.
        record: what training noted in its file, as in a LoRA's.
    """

    word: str
    vectors: Mapping[str, torch.Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many vectors stand in place of the word."""
        return len(next(iter(self.vectors.values())))

    @property
    def identity(self) -> str:
        """A hash of the word and the vectors."""
        digest = hashlib.sha256(self.word.encode())
        for name in KEYS:
            digest.update(self.vectors[name].detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def note(self) -> dict[str, str]:
        """What a LoRA's file notes of the embedding that it was trained with."""
        return {"word": self.word, "identity": self.identity}

    def save(self, path: Path, record: Mapping[str, Any]) -> Path:
        """Writes the file, atomically.

        Raises:
            UserError: the vectors are not finite: nothing is written.
        """
        tensors = {KEYS[name]: vectors.detach().float().cpu().contiguous() for name, vectors in self.vectors.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError("the identifier's embedding has NaN or infinity: not saved; lower --identifier_lr")
        metadata = {"format": "pt", _METADATA_KEY: json.dumps({**record, "identifier": self.word})}
        with replacing(path) as unfinished:
            write_tensors(unfinished, tensors, metadata)
        return path


def read_identifier_embedding(path: Path, widths: Mapping[str, int]) -> IdentifierEmbedding:
    """Reads a file that `save` wrote.

    Args:
        path: of it.
        widths: of the CLIPs of the model to draw with, by their names in a pipeline.

    Raises:
        UserError: it is not whole, of another program or of another model.
    """
    try:
        with safe_open(path, "pt") as handle:
            Checksums(handle).require_all(handle)
            record = dict(json.loads((handle.metadata() or {}).get(_METADATA_KEY, "{}")))
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): train again, or download it again") from error
    missing = [key for key in KEYS.values() if key not in tensors]
    if missing or not record.get("identifier"):
        lacks = f"has no {missing[0]}" if missing else "does not say which word it is of"
        raise UserError(f"{path} {lacks}: give the file that training with --train_identifier_embedding wrote")
    vectors = {name: tensors[key].float() for name, key in KEYS.items()}
    for name, values in vectors.items():
        if values.ndim != 2 or values.shape[1] != widths[name] or not values.isfinite().all():
            raise UserError(
                f"{path} does not fit this model: its {KEYS[name]} is {tuple(values.shape)}, and vectors are "
                f"{widths[name]} finite numbers here"
            )
    if len({len(values) for values in vectors.values()}) > 1:
        raise UserError(f"{path} has other numbers of vectors for each CLIP: train again, or download it again")
    return IdentifierEmbedding(record["identifier"], vectors, record)


def counts_of(identifiers: Iterable[IdentifierEmbedding]) -> dict[str, int]:
    """Word → number of vectors.

    Raises:
        UserError: two are of one word.
    """
    counts: dict[str, int] = {}
    for identifier in identifiers:
        if identifier.word.lower() in map(str.lower, counts):
            raise UserError(f"two embeddings are of {identifier.word!r}: draw with one of them")
        counts[identifier.word] = identifier.count
    return counts
