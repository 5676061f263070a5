"""The vectors of the identifier's embedding while they are trained: they stand where the tokens' embeddings would.

Shapes: R rows of the model's batch, C CLIP tokens, n vectors, d width of a CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_PULL = 0.1


class IdentifierVectors(torch.nn.Module):
    """The vectors of both CLIPs, in float32.

    Args:
        starts: `(n, d)` of each CLIP, by its name.
        spreads: the standard deviation of all embeddings of its tokens, by its name.
    """

    def __init__(self, starts: Mapping[str, torch.Tensor], spreads: Mapping[str, float]):
        super().__init__()
        self.vectors = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(start.detach().float().clone()) for name, start in starts.items()}
        )
        self._spreads = dict(spreads)

    def by_name(self) -> dict[str, torch.Tensor]:
        """The vectors `(n, d)` of each CLIP."""
        return {name: vectors.detach() for name, vectors in self.vectors.items()}

    def at(self, name: str, places: torch.Tensor) -> torch.Tensor:
        """What is added to the states that a CLIP begins with.

        A sum over all vectors, of which all but one are multiplied by zero: exact, also under TF32, and with the same
        gradient in every call, which an indexed sum on a GPU has not.

        Args:
            name: of the CLIP.
            places: `(R, C)` int64, which vector stands there; -1 for none.

        Returns:
            `(R, C, d)` float32.
        """
        vectors = self.vectors[name]
        chosen = places[..., None] == torch.arange(len(vectors), device=places.device)  # (R, C, n)
        return (chosen[..., None].to(vectors.dtype) * vectors).sum(dim=-2)

    @torch.no_grad()
    def hold_size(self, gradient_norm: torch.Tensor) -> None:
        """Pulls the vectors to the size of the tokens' embeddings, without a host–device synchronisation.

        As diffusers' advanced scripts do after each step: `vectors * (spread / std(vectors)) ** 0.1`. Free vectors grow
        many times as long as any token's embedding, and then outshout the rest of the prompt.

        Args:
            gradient_norm: of the step, a scalar on the device. Where it is not finite, the step was skipped.
        """
        counts = gradient_norm.isfinite()
        for name, vectors in self.vectors.items():
            pull = (self._spreads[name] / vectors.std()) ** _PULL
            vectors.mul_(torch.where(counts, pull, torch.ones_like(pull)))


def vectors_from(pieces: torch.Tensor, count: int | None) -> torch.Tensor:
    """Vectors to begin with `(count, d)`, from the embeddings `(k, d)` of a word's tokens.

    Each in turn where there are more vectors than tokens; means of neighbours where there are fewer; and as they are
    with a count of None.
    """
    total = len(pieces)
    if count is None or count == total:
        return pieces.clone()
    if count > total:
        return pieces[torch.arange(count) % total].clone()
    parts: Sequence[torch.Tensor] = torch.tensor_split(pieces, count)
    return torch.stack([part.mean(dim=0) for part in parts])
