"""A small random SD3 transformer with a LoRA, some steps of training, and copies that are as late as they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from sd3_lora.gpu.copy_stream import Copy, CopyStream
from sd3_lora.transformer.lora import attach_lora, target_modules

import pytest
import torch
from diffusers import SD3Transformer2DModel
from random_sd3 import smaller_transformer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDTH = 32  # of the transformer and of the text


def make_transformer(
    layers: int = 6, dropout: float = 0.0, dtype: torch.dtype = torch.float32, dual: tuple[int, ...] = (0, 1)
) -> SD3Transformer2DModel:
    """Always the same random weights; blocks of three sizes, as the first have dual attention and the last is short.

    `lora_B` is random too, so that every LoRA weight has a gradient.
    """
    torch.manual_seed(0)
    transformer = smaller_transformer(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
    )
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    attach_lora(transformer, target_modules(transformer, None, None), 2, 2.0, dropout, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return transformer.train()


def inputs(step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of one forward; other ones for each step, and in step 2 of another number of tokens."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": draw(2, 4, 8, 8),
        "timestep": torch.tensor([900.0, 100.0], device=device),
        "encoder_hidden_states": draw(2, 7 if step == 2 else 5, WIDTH),
        "pooled_projections": draw(2, 8),
    }


@dataclass
class Trained:
    """What some steps gave, on the CPU."""

    losses: list[torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]

    def is_equal(self, other: Trained) -> bool:
        """Bit for bit."""
        return all(map(torch.equal, self.losses, other.losses)) and all(
            mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in zip(self.gradients, other.gradients, strict=True)
        )


def train_steps(
    transformer: SD3Transformer2DModel,
    device: torch.device = CPU,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    between: Callable[[int], object] = lambda _: None,
) -> Trained:
    """Plain gradient descent on the LoRA; `between(step)` is called before each step."""
    torch.manual_seed(3)  # of dropout
    trained = Trained([], [])
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for step in range(steps):
        between(step)
        words = inputs(step, device, dtype)
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            velocity = transformer(**words, return_dict=False)[0]
        loss = (velocity.float() - words["hidden_states"].float()).square().mean()
        loss.backward()
        trained.losses.append(loss.detach().cpu())
        trained.gradients.append({name: p.grad.cpu() for name, p in parameters.items()})
        for parameter in parameters.values():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
        # The last block drops its text stream, so nothing comes of the text's queries.
        unused = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.attn.add_q_proj"
        assert all(g.any() for name, g in trained.gradients[-1].items() if not name.startswith(unused))
    return trained


@dataclass(frozen=True, eq=False)
class LateCopy(Copy):
    """A copy that has not been done."""

    work: Callable[[], object] = lambda: None


@contextmanager
def late_copies() -> Iterator[list[Callable[[], object]]]:
    """Copies that are done only when something waits for them: the other extreme of a CPU, which does them at once.

    What a GPU does lies between. Yields the copies that are outstanding.
    """
    outstanding: list[Callable[[], object]] = []
    start, wait, join = CopyStream.start, CopyStream.wait, CopyStream.join

    def start_later(self: CopyStream, copy: Callable[[], object]) -> Copy:
        outstanding.append(copy)
        return LateCopy(work=copy)

    def wait_now(self: CopyStream, copy: Copy) -> None:
        if isinstance(copy, LateCopy):
            while copy.work in outstanding:  # in the order of the stream
                with torch.no_grad():
                    outstanding.pop(0)()

    def join_now(self: CopyStream) -> None:
        while outstanding:
            with torch.no_grad():
                outstanding.pop(0)()

    CopyStream.start, CopyStream.wait, CopyStream.join = start_later, wait_now, join_now
    try:
        yield outstanding
    finally:
        CopyStream.start, CopyStream.wait, CopyStream.join = start, wait, join
