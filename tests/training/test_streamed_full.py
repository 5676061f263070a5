"""The whole transformer trained while its blocks are streamed: the bits of a resident run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.gpu.round_trips import RoundTrips
from sd3_lora.plan.memory_plan import _Places
from sd3_lora.training.blockwise_adam import Settings
from sd3_lora.training.in_backward import AdamInBackward, hollow_moments
from sd3_lora.transformer.placement import AskedPlacement, arrange
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import Piece
from sd3_lora.transformer.trained_pieces import TrainedBlocks, TrainedPieces, _forward_trained, stream_trained
from sd3_lora.transformer.whole_weights import train_whole

import pytest
import torch
from conftest import Prepared
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from small_transformer import CPU, GPU, WIDTH, inputs, late_copies, needs_gpu, smaller_transformer
from training_runs import Script, train

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SETTINGS = Settings((0.9, 0.999), 1e-8, 1.0)


def linear_case(shape: tuple[int, ...], has_bias: bool, is_sliced: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    rows = (*shape[:-2], shape[-2] + 3, shape[-1]) if is_sliced else shape
    x = torch.randn(rows, generator=generator)
    bias = torch.randn(48, generator=generator).requires_grad_() if has_bias else None
    return [x.requires_grad_(), torch.randn(48, shape[-1], generator=generator), bias]


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("shape", "is_sliced"), [((5, 40), False), ((2, 70, 40), False), ((2, 70, 40), True)])
def test_a_layer_has_the_bits_of_autograd(
    device: torch.device, dtype: torch.dtype, has_bias: bool, shape: tuple[int, ...], is_sliced: bool
) -> None:
    """Rows, batches of rows, and batches that do not lie side by side; the gradient is of all shapes too."""
    found = []
    for ours in (False, True):
        x, weight, bias = (
            None if t is None else t.detach().to(device, dtype).requires_grad_()
            for t in linear_case(shape, has_bias, is_sliced)
        )
        assert x is not None
        assert weight is not None
        seen = x[..., : shape[-2], :] if is_sliced else x
        given: list[torch.Tensor] = []
        if ours:
            held = weight.detach()
            out = _forward_trained(lambda held=held: held, lambda _, g, given=given: given.append(g), bias, seen)
        else:
            out = torch.nn.functional.linear(seen, weight, bias)
        (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)).sum().backward()
        of_weight = given[0] if ours else weight.grad
        found.append([out, x.grad, of_weight, *([] if bias is None else [bias.grad])])
    assert all(map(torch.equal, *found))


def make(dtype: torch.dtype) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    transformer = smaller_transformer(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=4,
        caption_projection_dim=2 * WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    train_whole(transformer)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.to(dtype)
    return transformer.train()


class Trained:
    """A run of some steps.

    Args:
        device: that computes.
        dtype: of the weights.
        blocks: that are streamed; None where all are on the device, () for all streamed.
        recomputed: how many blocks are.
        buffers: of streamed pieces.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        blocks: Sequence[int] | None,
        recomputed: int,
        buffers: int = 2,
    ):
        self.device, self.dtype = device, dtype
        self.transformer, self.streamed = make(dtype), None
        if blocks is None:
            self.transformer.to(device)
        else:
            self.streamed = stream_trained(self.transformer, device, buffers, blocks or None)
        recompute_blocks(self.transformer, range(recomputed))
        self.optimizer = AdamInBackward(
            dict(self.transformer.named_parameters()), 1e-2, 0.1, SETTINGS, 3, 1, self.streamed
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def loss(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Of a micro-step, whose updates are made."""
        is_half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if is_half else nullcontext():
            velocity = self.transformer(*tensors, return_dict=False)[0]
        loss = (velocity.float() - tensors[0].float()).square().mean()
        loss.backward()
        return loss.detach()

    def run(
        self, steps: Sequence[int], call: Callable[..., torch.Tensor] | None = None, bad: int | None = None
    ) -> Trained:
        """Takes these steps, from 1; in step `bad` a gradient is not finite."""
        for step in steps:
            words = inputs(1 if call else step, self.device, self.dtype)
            words["hidden_states"] = words["hidden_states"] * (float("nan") if step == bad else step)
            order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
            self.optimizer.begin(step, 1e-2 / step)
            self.losses.append(float((call or self.loss)(*(words[name] for name in order))))
            self.optimizer.step()
            self.norms.append(float(self.optimizer.norm()))
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments, on the CPU."""
        weights = {name: each.detach() for name, each in self.transformer.named_parameters()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in (self.optimizer.tensors() | weights).items()}


def require_same(ours: Trained, theirs: Trained) -> None:
    mine, other = ours.tensors(), theirs.tensors()
    assert mine.keys() == other.keys()
    assert ours.losses == theirs.losses
    assert ours.norms == theirs.norms
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert not different


WAYS = [((), 0, 2), ((), 3, 2), ((), 2, 6), ((0, 2), 0, 2), ((1,), 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("blocks", "recomputed", "buffers"), WAYS)
def test_streamed_is_resident(dtype: torch.dtype, blocks: Sequence[int], recomputed: int, buffers: int) -> None:
    """However late the copies are."""
    resident = Trained(CPU, dtype, None, 0).run(range(1, 5))
    before = {name: each.detach().clone() for name, each in make(dtype).named_parameters()}
    assert not torch.equal(
        resident.tensors()["transformer_blocks.1.attn.to_q.weight"], before["transformer_blocks.1.attn.to_q.weight"]
    )
    require_same(Trained(CPU, dtype, blocks, recomputed, buffers).run(range(1, 5)), resident)
    streamed = Trained(CPU, dtype, blocks, recomputed, buffers)
    with late_copies():
        streamed.run(range(1, 5))
    require_same(streamed, resident)
    assert streamed.streamed is not None
    streamed_names = streamed.streamed.names
    assert {int(name.split(".")[1]) for name in streamed_names} == set(blocks or range(3))


def test_forwards_between_the_steps_see_the_changed_weights() -> None:
    found = []
    for blocks in (None, ()):
        trained = Trained(CPU, torch.float32, blocks, 2)
        drawn = []
        for step in range(1, 4):
            trained.run([step])
            with torch.no_grad():
                drawn.append(trained.transformer(**inputs(7, CPU)).sample)
        found.append(drawn)
    assert all(map(torch.equal, *found))


def test_a_gradient_that_is_not_finite_leaves_all_as_it_was() -> None:
    resident, streamed = (Trained(CPU, torch.float32, blocks, 2) for blocks in (None, ()))
    for each in (resident, streamed):
        each.run([1])
    before = streamed.tensors()
    for each in (resident, streamed):
        each.run([2], bad=2)
        each.losses.clear()
        each.norms.clear()
    name = "transformer_blocks.1.attn.to_q.weight"
    assert torch.equal(streamed.tensors()[name], before[name])
    require_same(streamed, resident)


def test_what_is_rehearsed_changes_nothing() -> None:
    trained = Trained(CPU, torch.bfloat16, (), 2).run([1])
    before = trained.tensors()
    with trained.optimizer.rehearsal():
        trained.run([2])
    after = trained.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_backward_that_fails_is_followed_by_right_ones() -> None:
    """What was updated before the failure is on the host as on the device."""

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("no memory")

    trained = Trained(CPU, torch.float32, (), 0).run([1])
    layer: Any = trained.transformer.transformer_blocks[1].ff.net[2]
    hook = layer.bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        trained.run([2])
    hook.remove()
    trained.run([3])
    plain = make(torch.float32)
    plain.load_state_dict(trained.transformer.state_dict())
    with torch.no_grad():
        ours, theirs = (each(**inputs(7, CPU)).sample for each in (trained.transformer, plain))
    assert torch.equal(ours, theirs)


def test_nothing_stays_in_memory_of_a_model_that_is_gone() -> None:
    trained = Trained(CPU, torch.float32, (), 2).run([1, 2])
    assert trained.streamed is not None
    seen: list[Any] = [weakref.ref(trained.streamed), weakref.ref(trained.optimizer), weakref.ref(trained.transformer)]
    del trained
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


def test_the_order_of_visits_is_prefetched() -> None:
    items = [(torch.empty(256, device="meta"),) for _ in range(5)]
    trips = RoundTrips(items, CPU)
    for item, value in zip(trips.host, range(5), strict=True):
        item[0].fill_(value)
    for order in ([4, 3, 2, 1, 0], [4, 3, 2, 1, 0], [0, 2, 1], [0, 2, 1]):
        with late_copies() as outstanding:
            trips.begin()
            for index in order:
                (tensor,) = trips.visit(index)
                tensor += 10
                trips.leave(index)
            trips.join()
            assert not outstanding
    assert [float(item[0][0]) for item in trips.host] == [40, 41, 42, 23, 24]
    assert trips.device_bytes == 3 * 1024


@needs_gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("blocks", "recomputed", "buffers"), WAYS)
def test_a_gpu_trains_the_same(dtype: torch.dtype, blocks: Sequence[int], recomputed: int, buffers: int) -> None:
    """With real copies from and to pinned memory."""
    resident = Trained(GPU, dtype, None, 0).run(range(1, 7))
    streamed = Trained(GPU, dtype, blocks, recomputed, buffers).run(range(1, 7))
    require_same(streamed, resident)
    for block in range(3):
        weight = streamed.transformer.get_parameter(f"transformer_blocks.{block}.attn.to_q.weight")
        assert weight.is_pinned() == (block in (blocks or range(3)))


@needs_gpu
@pytest.mark.usefixtures("deterministic")
def test_a_captured_step_is_the_plain_one() -> None:
    """As one CUDA graph, which copies both ways; between two replays a plain forward, and the graph freed once."""

    def captured(trained: Trained) -> CapturedCall:
        optimizer = trained.optimizer
        call = CapturedCall(trained.loss, GPU, optimizer.gradients, asked=True, exact=True)
        call.rehearsal = optimizer.rehearsal
        return call

    found = []
    for blocks in (None, ()):
        trained = Trained(GPU, torch.bfloat16, blocks, 2)
        call = captured(trained)
        trained.run(range(1, 4), call)
        with torch.no_grad():
            trained.losses.append(float(trained.transformer(**inputs(7, GPU, torch.bfloat16)).sample.sum()))
        call.release()
        found.append(trained.run(range(4, 7), call))
    plain = Trained(GPU, torch.bfloat16, None, 2)
    plain.run(range(1, 4), plain.loss)
    plain.losses.append(found[0].losses[3])
    require_same(found[0], plain.run(range(4, 7), plain.loss))
    require_same(found[1], found[0])


@needs_gpu
def test_large_matrices_that_copy_slower_than_they_compute() -> None:
    """A missing wait would read what is not there yet, or copy back what has been overwritten."""

    def run(is_streamed: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(2048, 2048) for _ in range(10)).bfloat16()
        streamed = None
        if is_streamed:
            pieces = [Piece((f"{index}.weight",), (layer,)) for index, layer in enumerate(layers)]
            streamed = TrainedBlocks(pieces, GPU, TrainedPieces(pieces, GPU), 3)
            for layer in layers:
                layer.bias.data = layer.bias.data.to(GPU)
        else:
            layers.to(GPU)
        optimizer = AdamInBackward(dict(layers.named_parameters()), 1e-2, 0.1, SETTINGS, 3, 1, streamed)
        for step in range(1, 6):
            optimizer.begin(step, 1e-2)
            hidden = torch.randn(1, 2048, generator=torch.Generator().manual_seed(step)).to(GPU, torch.bfloat16)
            hidden.requires_grad_()
            if streamed:
                streamed.begin_pass()
            for layer in layers:
                hidden = layer(hidden).tanh()
            hidden.float().square().sum().backward()
            optimizer.step()
        tensors = optimizer.tensors() | {name: each.detach() for name, each in layers.named_parameters()}
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    resident, streamed = run(False), run(True)
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)


def test_the_plan_counts_what_is_there(miniature_files: ModelFiles) -> None:
    """To the byte: slots of weights and moments on the device, and pinned memory."""
    files = miniature_files
    asked = AskedPlacement(modulations_ahead=False, whole=True, streamed=4, buffers=3)
    places = _Places(files, torch.bfloat16, None, (8, 8), asked, hollow_moments)
    base, whole = places.streamed(2, 6), places.on_device()
    arranged = arrange(files, base.placement, CPU, torch.bfloat16, (8, 8), train_whole)
    streamed = arranged.streamed
    assert isinstance(streamed, TrainedBlocks)
    parameters = dict(arranged.transformer.named_parameters())
    optimizer = AdamInBackward(parameters, 1e-2, 0.1, SETTINGS, 3, 1, streamed)
    trips = optimizer._trips
    assert trips is not None
    assert base.host_bytes == streamed.host_bytes + trips.host_bytes
    resident = sum(each.nbytes for name, each in parameters.items() if name not in streamed.names)
    positions = arranged.transformer.pos_embed.pos_embed.nbytes
    assert base.device_bytes == resident + positions + streamed.device_bytes
    of_streamed = sum(parameters[name].nbytes for name in streamed.names)
    assert whole.device_bytes == resident + positions + of_streamed
    moments = sum(t.nbytes for name, t in optimizer.tensors().items() if name.rpartition(".")[0] in streamed.names)
    assert base.state_saved == moments - trips.device_bytes


def same_tensors(left: Path, right: Path) -> bool:
    mine, theirs = load_file(left), load_file(right)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_streamed_run_writes_and_resumes_as_a_resident_one(
    script: Script, prepared: Prepared, tmp_path: Path
) -> None:
    """The saved folder, the checkpoints and the losses; the resident run goes on from the streamed one's checkpoint."""
    shared = ["--full", "--learning_rate", 1e-3, "--mixed_precision", "bf16", "--checkpointing_steps", 2]
    shared += ["--checkpoints_total_limit", 3]
    streamed = ["--stream_blocks", 2, "--stream_buffers", 2, "--recompute_blocks", 1]
    plain = train(script, prepared, tmp_path / "plain", *shared, "--max_train_steps", 4)
    run = train(script, prepared, tmp_path / "streamed", *shared, *streamed, "--max_train_steps", 4)
    train(script, prepared, tmp_path / "resumed", *shared, *streamed, "--max_train_steps", 2)
    again = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    resumed = train(script, prepared, tmp_path / "resumed", *shared, *streamed, *again)
    for other in (run, resumed):
        assert same_tensors(other.folder / WEIGHTS, plain.folder / WEIGHTS)
        moments = "checkpoint-4/moments/moments.safetensors"
        assert same_tensors(other.folder / moments, plain.folder / moments)
        assert [line["loss"] for line in other.losses] == [line["loss"] for line in plain.losses]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["plan"]["whole"] is True
    assert len(record["plan"]["streamed"]) == 2
    assert "the whole transformer trained" in run.out
