"""A pool of scenes to train on, with their captions as token ids. Tokenizing at each step would be too slow.

    python miniature/pool.py --scenes 1500000 --output_path pool.safetensors

Holds the scenes as `world.Scenes` has them, and for each caption its CLIP ids (both CLIPs share a vocabulary) and T5
ids, int16, ended by EOS and filled with -1: `padded` puts each tokenizer's own padding there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5TokenizerFast
from world import MINIATURE, Scenes, captions, load_objects, object_indices, sample_scenes

SHORT_CLIP_TOKENS, SHORT_T5_TOKENS = 36, 46  # hardly any caption of a scene has more; those are cut, as in use
PAIRS = 0.12
_CHUNK = 50_000


def tokenize(texts: Sequence[str], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and T5 ids of captions, `(N, SHORT_CLIP_TOKENS)` and `(N, SHORT_T5_TOKENS)` int16, filled with -1."""
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    results = []
    for tokenizer, width in ((clip, SHORT_CLIP_TOKENS), (t5, SHORT_T5_TOKENS)):
        ids = np.full((len(texts), width), -1, dtype=np.int16)
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            for row, tokens in enumerate(tokenizer(chunk, truncation=True, max_length=width).input_ids, start):
                ids[row, : len(tokens)] = tokens
        results.append(torch.from_numpy(ids))
    return results[0], results[1]


def padded(ids: torch.Tensor, length: int, pad_token_id: int) -> torch.Tensor:
    """Token ids `(B, length)` int64 as a tokenizer gives them with padding="max_length"."""
    ids = torch.nn.functional.pad(ids.long(), (0, length - ids.shape[1]), value=-1)
    return torch.where(ids < 0, pad_token_id, ids)


def make_chunk(index: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Scenes `index * _CHUNK` up to `count`, with their captions' ids, by their names in the file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1_000_000 * seed + index)
    size = min(_CHUNK, count - index * _CHUNK)
    scenes = sample_scenes(size, object_indices(held_out=False), generator, pairs=PAIRS)
    clip_ids, t5_ids = tokenize(captions(scenes, load_objects(), generator), MINIATURE)
    tensors = {f"scenes.{field.name}": getattr(scenes, field.name).contiguous() for field in fields(scenes)}
    tensors |= {"clip_ids": clip_ids, "t5_ids": t5_ids}
    return {name: tensor.numpy() for name, tensor in tensors.items()}  # tensors would pass through /dev/shm


def load_pool(path: Path) -> tuple[Scenes, torch.Tensor, torch.Tensor]:
    """The scenes, and the CLIP and T5 ids of their captions."""
    tensors = load_file(path)
    scenes = Scenes(**{field.name: tensors[f"scenes.{field.name}"] for field in fields(Scenes)})
    return scenes, tensors["clip_ids"], tensors["t5_ids"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scenes", type=int, default=1_500_000, help="How many.")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output_path", type=Path, required=True)
    flags = parser.parse_args(argv)
    chunks = range(-(-flags.scenes // _CHUNK))
    workers = min(len(chunks), os.cpu_count() or 1)
    # A chunk depends on the seed and its number alone, not on how many processes there are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        parts = list(executor.map(partial(make_chunk, count=flags.scenes, seed=flags.seed), chunks))
    tensors = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    temporary = flags.output_path.with_suffix(".unfinished")
    save_file(tensors, temporary)
    os.replace(temporary, flags.output_path)
    longest = [int((tensors[name] >= 0).sum(1).max()) for name in ("clip_ids", "t5_ids")]
    print(f"{flags.scenes} scenes; the longest captions have {longest[0]} CLIP and {longest[1]} T5 tokens", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
