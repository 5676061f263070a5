"""Where the parts of the transformer are kept, as data; and the one order in which the model is taken apart.

Every trick that saves memory is one field here, and one file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from sd3_lora.common.command_line import UserError
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.placement_flags import (
    AskedPrecision,
    AttentionKernel,
    BaseFlags,
    StepFlags,
    StreamSource,
    is_on,
)
from sd3_lora.transformer.base_weights import BasePrecision, load_transformer
from sd3_lora.transformer.compiled import Compiled, compile_blocks
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.mapped_pieces import MappedPieces
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.streaming import PinnedPieces, StreamedBlocks, pieces_of, stream_transformer
from sd3_lora.transformer.trained_pieces import stream_trained

import torch
from diffusers import SD3Transformer2DModel


@dataclass(frozen=True)
class Placement:
    """Where the parts of a transformer are kept. Only `precision`, `attention_kernel` and `merged` change numbers.

    Attributes:
        blocks: how many transformer blocks there are.
        precision: nf4 for linear layers in 4 bits; None for 16 bits (32 under --mixed_precision no).
        streamed: indices of the blocks whose matrices are streamed to the device, piece by piece.
        stream_from: the source of those: pinned host memory, or the mapped weight files.
        buffers: how many streamed pieces the device holds.
        recomputed: indices of the blocks whose activations backward recomputes.
        offload_inputs: whether the recomputed blocks' inputs are offloaded to the host until backward.
        modulations_ahead: whether modulations of blocks that are both streamed and recomputed are computed one
            micro-step ahead.
        attention_kernel: that computes attention; None for torch's choice.
        merged: whether the LoRAs to draw with are added to the weights (`merged_weights.py`), and not kept beside them.
        whole: whether the weights themselves are trained, and no LoRA (`whole_weights.py`).
        clips_streamed: whether the CLIPs' layers are streamed too, where something of them is trained.
    """

    blocks: int
    precision: BasePrecision | None = None
    streamed: tuple[int, ...] = ()
    stream_from: StreamSource = "host"
    buffers: int = 0
    recomputed: tuple[int, ...] = ()
    offload_inputs: bool = False
    modulations_ahead: bool = True
    attention_kernel: AttentionKernel | None = None
    merged: bool = False
    whole: bool = False
    clips_streamed: bool = False

    @property
    def can_merge(self) -> bool:
        """Whether weights can be added to: not those in 4 bits, nor those in the files."""
        return self.precision is None and not (self.streamed and self.stream_from == "files")

    @property
    def ahead_blocks(self) -> list[int]:
        """The blocks whose modulations are computed one micro-step ahead."""
        recomputed = set(self.recomputed)
        return [block for block in self.streamed if block in recomputed] if self.modulations_ahead else []

    def base_sentence(self) -> str:
        """For the user: where the weights are."""
        base = "base in 4 bits (nf4)" if self.precision else "base unchanged"
        if self.whole:
            base = "the whole transformer trained"
        clips = "; the CLIPs streamed too" if self.clips_streamed else ""
        if not self.streamed:
            return f"{base}, on the device{clips.removesuffix(' too')}"
        source = "the weight files" if self.stream_from == "files" else "host memory"
        which = f"{len(self.streamed)} of its {self.blocks} blocks " if len(self.streamed) < self.blocks else ""
        moments = " with the optimizer's state" if self.whole else ""
        return f"{base}, {which}streamed{moments} from {source}, {self.buffers} pieces on the device{clips}"

    def step_sentence(self) -> str:
        """For the user: what is recomputed and offloaded."""
        offloaded = ", their inputs offloaded" if self.offload_inputs else ""
        may_be_ahead = self.streamed and self.recomputed and not self.whole
        plain = ", modulations not ahead" if may_be_ahead and not self.modulations_ahead else ""
        return f"{len(self.recomputed)} of {self.blocks} blocks recomputed{offloaded}{plain}"

    def kernel_sentence(self) -> str:
        """The attention kernel where a flag fixes it, to be added to a sentence."""
        return f"; {self.attention_kernel} attention" if self.attention_kernel else ""


_PLACING = (
    "recompute_blocks",
    "offload_inputs",
    "stream_blocks",
    "stream_from",
    "stream_buffers",
    "modulations_ahead",
    "stream_text_encoders",
    "attention_kernel",
)


@dataclass(frozen=True)
class AskedPlacement:
    """What flags fix of a placement; None leaves a field to the plan.

    Attributes:
        precision: 16bit; nf4; or auto, which takes nf4 rather than stream the weights.
        recomputed: how many of the first blocks.
        offload_inputs: as in `Placement`.
        streamed: how many blocks, evenly spread.
        stream_from: as in `Placement`.
        buffers: likewise.
        modulations_ahead: likewise.
        attention_kernel: likewise.
        typed: the flags that fix something, for messages.
        whole: whether the weights themselves are trained.
        clips_streamed: as in `Placement`.
    """

    precision: AskedPrecision = "16bit"
    recomputed: int | None = None
    offload_inputs: bool | None = None
    streamed: int | None = None
    stream_from: StreamSource | None = None
    buffers: int | None = None
    modulations_ahead: bool | None = None
    attention_kernel: AttentionKernel | None = None
    typed: str = ""
    whole: bool = False
    clips_streamed: bool | None = None

    @classmethod
    def of(cls, base: BaseFlags, step: StepFlags | None, blocks: int) -> AskedPlacement:
        """What the flags fix.

        Args:
            base: of training and of drawing.
            step: of training alone; else nothing is recomputed.
            blocks: of the transformer.
        """
        values = {**asdict(base), **(asdict(step) if step else {})}
        placing = [(name, values[name]) for name in _PLACING if name in values]
        typed = [f"--{name} {value}" for name, value in placing if value != "auto"]
        typed += ["--gradient_checkpointing"] if step and step.gradient_checkpointing else []
        return cls(
            base.base_precision,
            step.recomputed(blocks) if step else 0,
            is_on(step.offload_inputs) if step else False,
            base.streamed,
            None if base.stream_from == "auto" else base.stream_from,
            base.buffers,
            is_on(step.modulations_ahead) if step else None,
            None if base.attention_kernel == "auto" else base.attention_kernel,
            " ".join(typed),
            clips_streamed=is_on(step.stream_text_encoders) if step else None,
        )

    def check(self, blocks: int, processes: int = 1) -> None:
        """Checks the flags against each other and the model.

        Args:
            blocks: of the transformer.
            processes: that train together.

        Raises:
            UserError: they cannot be obeyed, with the reason.
        """
        for flag, count in (("recompute_blocks", self.recomputed), ("stream_blocks", self.streamed)):
            if count is not None and not 0 <= count <= blocks:
                raise UserError(f"--{flag} {count}: this transformer has {blocks} blocks: type 0 to {blocks}")
        streaming = {
            f"--stream_blocks {self.streamed}": self.streamed,
            "--stream_text_encoders on": self.clips_streamed,
        }
        for flag, is_asked in streaming.items():
            if is_asked and processes > 1:
                raise UserError(f"{flag} works in one process, not in {processes}: leave it out, or use one")
        if self.buffers is not None and self.buffers < 2:
            raise UserError(f"--stream_buffers {self.buffers}: one computes while another fills: type 2 or more")
        if self.offload_inputs and self.recomputed in (0, 1):
            raise UserError(
                "--offload_inputs on offloads the inputs of all recomputed blocks but the last, and --recompute_blocks "
                f"{self.recomputed} leaves none: type 2 or more"
            )
        if self.stream_from == "files" and self.precision != "16bit":
            raise UserError(
                f"--stream_from files: no file holds the 4-bit weights that --base_precision {self.precision} may take"
                ": type --stream_from host, or --base_precision 16bit"
            )
        needs_streaming = {
            "--stream_from": self.stream_from,
            "--stream_buffers": self.buffers,
            "--modulations_ahead on": self.modulations_ahead or None,
        }
        for flag, value in needs_streaming.items():
            if value is not None and self.streamed == 0:
                raise UserError(f"{flag} is of streamed blocks, and --stream_blocks 0 leaves none: leave one out")
        if self.modulations_ahead and self.recomputed == 0:
            raise UserError(
                "--modulations_ahead on is of blocks that are both streamed and recomputed, and --recompute_blocks 0 "
                "leaves none: leave one out"
            )

    def without_effect(self, placement: Placement) -> str | None:
        """A note where a flag is of blocks that are streamed (or also recomputed) and there are none; else None."""
        flags = {
            f"--stream_from {self.stream_from}": self.stream_from,
            f"--stream_buffers {self.buffers}": self.buffers,
            "--modulations_ahead on": self.modulations_ahead or None,
        }
        idle = [flag for flag, value in flags.items() if value is not None]
        if placement.streamed and self.modulations_ahead and not placement.ahead_blocks:
            return (
                "note: no block is both streamed and recomputed, so --modulations_ahead on changes nothing: raise "
                "--recompute_blocks"
            )
        if placement.streamed or not idle:
            return None
        return f"note: no block is streamed, so {' and '.join(idle)} changes nothing: add --stream_blocks with a number"


def spread_streamed_blocks(count: int, resident: int) -> tuple[int, ...]:
    """Those of `count` blocks that are streamed where `resident` stay on the device.

    Spread evenly: while a resident one computes, a copy is under way.
    """
    return tuple(i for i in range(count) if (i + 1) * resident // count == i * resident // count)


@dataclass(frozen=True)
class ArrangedTransformer:
    """A model that was taken apart by its placement.

    Attributes:
        transformer: frozen but for its adapters.
        flat: what is trained, as one parameter; None where nothing is, or the whole transformer.
        trained: the same, parameter by parameter: views of `flat` where there is one.
        streamed: what streams its blocks, if any are.
        ahead: the modulations that are computed ahead, if any are.
    """

    transformer: SD3Transformer2DModel
    flat: torch.nn.Parameter | None
    trained: Sequence[torch.nn.Parameter]
    streamed: StreamedBlocks | None
    ahead: ModulationsAhead | None


def arrange(
    files: ModelFiles,
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype,
    latent_size: tuple[int, int],
    add_adapters: Callable[[SD3Transformer2DModel], Sequence[torch.nn.Parameter]],
    compiled: Compiled = Compiled.NO,
) -> ArrangedTransformer:
    """Loads the transformer and takes it apart. The order is the point: each step relies on those before it.

    1. load: the weights of streamed blocks stay in the files;
    2. adapters: peft wraps the linear layers, before streaming exchanges their forward;
    3. stream: all but the streamed matrices moves to the device, adapters too;
    4. modulations ahead: wraps layers that are streamed;
    5. recompute: wraps whole blocks;
    6. flatten: what is trained becomes one tensor, after which it may not be moved; not the whole transformer;
    7. compile: sees all of this.

    Capture as a CUDA graph (`CapturedCall`) comes last, where the step is put together.

    Args:
        files: the model.
        placement: what to keep where.
        device: that computes.
        dtype: of the weights, and of what 4-bit ones compute in.
        latent_size: height and width in which all pictures lie that it will compute, in latent pixels.
        add_adapters: attaches the adapters and returns what of them is trained, if anything.
        compiled: whether the blocks are compiled.

    Raises:
        UserError: as `load_transformer`, `add_adapters` and `PinnedPieces`.
    """
    transformer = load_transformer(files, device, dtype, placement.precision, latent_size, placement.streamed)
    trained = add_adapters(transformer)
    streamed: StreamedBlocks | None = None
    ahead: ModulationsAhead | None = None
    if placement.streamed and placement.whole:
        paths = files.weight_files("transformer")
        streamed = stream_trained(transformer, device, placement.buffers, placement.streamed, paths)
    elif placement.streamed:
        pieces = pieces_of(transformer.transformer_blocks, placement.streamed)
        paths = files.weight_files("transformer") if placement.precision is None else []  # 4-bit weights were read
        source_class = MappedPieces if placement.stream_from == "files" else PinnedPieces
        source = source_class(pieces, device, paths)
        streamed = stream_transformer(transformer, device, source, placement.buffers, placement.streamed)
        if placement.ahead_blocks:
            ahead = ModulationsAhead(transformer, streamed, placement.ahead_blocks)
    recompute_blocks(transformer, placement.recomputed, placement.offload_inputs)
    flat = flatten_parameters(trained) if trained and not placement.whole else None
    if compiled is not Compiled.NO:
        compile_blocks(transformer, compiled)
    return ArrangedTransformer(transformer, flat, trained, streamed, ahead)
