"""Trains the transformer, and with it the three text encoders, on latents of the small world.

    python miniature/pool.py --output_path WORK/pool.safetensors
    python miniature/train_text.py --work WORK
    python miniature/train_vae.py --renders FOLDER_OF_WEBP --output_dir WORK
    python miniature/train_transformer.py --renders FOLDER_OF_WEBP --work WORK --minutes 12

The loss is that of `sd3_lora.training.flow` without weights. For most of the time captions are padded to 36 + 46
tokens, and only at the end to as many as SD3's pipeline gives by default, which costs half as much again. Give
`--stop_after` to train in pieces: run the same command again to go on.

Shapes: B batch, S text tokens (CLIP's and T5's), D joint width, P pooled width.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.joined_embeddings import join_embeddings
from sd3_lora.stage_one.latent_cache import normalize_latents, sample_posterior
from sd3_lora.training.flow import flow_matching_loss, interpolate
from sd3_lora.training.flow_flags import FlowConfig

import torch
from architecture import CLIP_TOKENS, NETWORKS, make_models
from diffusers import AutoencoderKL
from pool import SHORT_CLIP_TOKENS, SHORT_T5_TOKENS, load_pool, padded, tokenize
from render import Renderer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizer, T5TokenizerFast
from world import MINIATURE, load_objects

SHORT = (SHORT_CLIP_TOKENS, SHORT_T5_TOKENS)
LONG = (CLIP_TOKENS, 77)  # as in use: the scripts' default --max_sequence_length
LONG_SHARE = 0.2  # of the time, at the end, with padding as in use
EMPTY_SHARE = 0.1  # of the captions, for guidance
SIGMA_MEAN, SIGMA_STD = 0.8, 1.2  # of the logit of sigma: between SD3's training (0, 1) and its shift of 3 (ln 3, 1)
UNWEIGHTED = FlowConfig(weighting_scheme="none")
EMA = 0.9995
WARMUP_STEPS = 400
CHECKED_SAMPLES = 4096
SAVE_EVERY_S = 150
STATE_FILE = "state.safetensors"  # in --work, to go on from


@dataclass(frozen=True)
class Data:
    """What a step draws from, on the device: N scenes.

    Attributes:
        latents: normalized, `(N, 16, 16, 16)` bfloat16.
        clip_ids: `(N + 1, SHORT_CLIP_TOKENS)` int16, filled with -1; the last row is the empty prompt's.
        t5_ids: the same for T5.
        pads: the padding ids of CLIP-L, CLIP-G and T5.
    """

    latents: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    pads: tuple[int, int, int]

    def text(self, rows: torch.Tensor, lengths: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids of the three encoders, `(B, length)` each; row N is the empty prompt."""
        clip, t5 = self.clip_ids[rows], self.t5_ids[rows]
        clip, clip_2 = padded(clip, lengths[0], self.pads[0]), padded(clip, lengths[0], self.pads[1])
        return clip, clip_2, padded(t5, lengths[1], self.pads[2])


class TextToVelocity(torch.nn.Module):
    """The three text encoders and the transformer as one model, joined as in `StableDiffusion3Pipeline`."""

    def __init__(self, models: dict[str, torch.nn.Module]):
        super().__init__()
        self.models = torch.nn.ModuleDict(models)

    def forward(
        self, noisy: torch.Tensor, sigmas: torch.Tensor, clip: torch.Tensor, clip_2: torch.Tensor, t5: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents `(B, 16, H, W)`, sigmas `(B,)` and token ids → velocity."""
        outputs = [
            self.models[name](ids, output_hidden_states=True)
            for name, ids in (("text_encoder", clip), ("text_encoder_2", clip_2))
        ]
        clip_hidden = [output.hidden_states[-2] for output in outputs]
        return self.models["transformer"](
            hidden_states=noisy,
            timestep=1000 * sigmas,
            encoder_hidden_states=join_embeddings(clip_hidden, self.models["text_encoder_3"](t5)[0]),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], -1),
            return_dict=False,
        )[0]


def start_gently(transformer: torch.nn.Module) -> None:
    """Zeros the modulations and the last layer, so that every block starts as the identity (DiT, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm1" in name or "norm_out" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


@torch.no_grad()
def load_data(work: Path, renders: Path, device: torch.device, most: int | None) -> Data:
    """Draws and encodes the pool's scenes, each once."""
    scenes, clip_ids, t5_ids = load_pool(work / "pool.safetensors")
    scenes, clip_ids, t5_ids = scenes[:most], clip_ids[:most], t5_ids[:most]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=dtype)
    vae = vae.to(device, memory_format=torch.channels_last)
    renderer = Renderer(load_objects(), renders, device)
    latents = torch.empty(len(scenes), 16, 16, 16, dtype=torch.bfloat16, device=device)
    for start in range(0, len(scenes), 1000):
        pictures = renderer(scenes[start : start + 1000]).to(dtype, memory_format=torch.channels_last)
        mean, log_variance = vae.encoder(pictures).float().chunk(2, 1)
        raw = sample_posterior(mean, (0.5 * log_variance).exp(), torch.randn_like(mean))
        latents[start : start + 1000] = normalize_latents(raw, vae.config)
    empty = tokenize([""], MINIATURE)
    clip, clip_2 = (CLIPTokenizer.from_pretrained(MINIATURE / name) for name in ("tokenizer", "tokenizer_2"))
    t5 = T5TokenizerFast.from_pretrained(MINIATURE / "tokenizer_3")
    return Data(
        latents,
        torch.cat([clip_ids, empty[0]]).to(device),
        torch.cat([t5_ids, empty[1]]).to(device),
        (clip.pad_token_id, clip_2.pad_token_id, t5.pad_token_id),
    )


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; update scaled as in arXiv 2502.16982) for many small matrices at once.

    The mathematics of `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`, which updates one matrix after another:
    a thousand kernels for a hundred small matrices. Here matrices of one shape are orthogonalized together.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self._by_shape.setdefault(matrix.shape, []).append(matrix)

    @torch.no_grad()
    def step(self) -> None:
        """One update of all matrices; those without a gradient stay."""
        group = self.param_groups[0]
        for shape, matrices in self._by_shape.items():
            used = [matrix for matrix in matrices if matrix.grad is not None]
            if not used:
                continue
            gradients = [matrix.grad for matrix in used]
            momenta = [self.state[m].setdefault("momentum_buffer", torch.zeros_like(m)) for m in used]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            looking_ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            update = orthogonalize(torch.stack(looking_ahead)).to(used[0].dtype)
            torch._foreach_mul_(used, 1 - group["lr"] * group["weight_decay"])
            scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(used, list(update.unbind()), alpha=scale)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: `(K, m, n)` → the nearest matrices whose singular values are about 1, bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def make_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if "transformer_blocks" in name and parameter.ndim == 2 else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=others[0].is_cuda)
    return [adamw, Muon(matrices, learning_rate, weight_decay=0.01)]


def batch_loss(
    model: torch.nn.Module, data: Data, rows: torch.Tensor, draws: tuple, lengths: tuple[int, int]
) -> torch.Tensor:
    """The mean squared error of the velocity; `draws` are noise, the normals behind sigma, and uniforms."""
    noise, normals, uniforms = draws
    latents = data.latents[rows].float()
    sigmas = torch.sigmoid(SIGMA_MEAN + SIGMA_STD * normals)
    at = sigmas[:, None, None, None]  # (B, 1, 1, 1)
    empty_row = len(data.latents)
    text = data.text(torch.where(uniforms < EMPTY_SHARE, empty_row, rows), lengths)
    velocity = model(interpolate(latents, noise, at), sigmas, *text)
    return flow_matching_loss(velocity, latents, noise, at, torch.ones_like(sigmas), UNWEIGHTED)


def draw(count: int, generator: torch.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Noise `(B, 16, 16, 16)`, normals and uniforms `(B,)`."""
    noise = torch.randn(count, 16, 16, 16, generator=generator, device=device)
    normals = torch.randn(count, generator=generator, device=device)
    return noise, normals, torch.rand(count, generator=generator, device=device)


class State:
    """The state with which a later command continues the training: a safetensors file and a JSON file."""

    def __init__(self, model: TextToVelocity, optimizers: Sequence[torch.optim.Optimizer]):
        self.model, self.optimizers = model, optimizers
        self.ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.step, self.elapsed_s = 0, 0.0

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def save(self, path: Path) -> None:
        """Writes both files."""
        with replacing(path) as unfinished:
            save_file({name: value.contiguous() for name, value in self._tensors().items()}, unfinished)
        path.with_suffix(".json").write_text(json.dumps({"step": self.step, "elapsed_s": self.elapsed_s}))

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote."""
        numbers = json.loads(path.with_suffix(".json").read_text())
        self.step, self.elapsed_s = numbers["step"], numbers["elapsed_s"]
        owner = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        with safe_open(path, "pt") as handle:
            names = list(handle.keys())
            for name, parameter in self.model.named_parameters():
                parameter.copy_(handle.get_tensor(f"model.{name}"))
                self.ema[name].copy_(handle.get_tensor(f"ema.{name}"))
                for key in [n.split(".")[1] for n in names if n.startswith("optimizer.") and n.endswith(f".{name}")]:
                    value = handle.get_tensor(f"optimizer.{key}.{name}")
                    on_device = value.to(parameter.device) if value.ndim or parameter.is_cuda else value
                    owner[id(parameter)].state[parameter][key] = on_device

    @torch.no_grad()
    def update_ema(self) -> None:
        """The running mean of the weights moves a little."""
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.model.parameters()), 1 - decay)


def export(state: State, work: Path) -> None:
    """Writes the running mean of the weights as float16 components in diffusers' layout."""
    for name, module in state.model.models.items():
        copy = deepcopy(module).half()
        prefix = f"models.{name}."
        mean = {key.removeprefix(prefix): value for key, value in state.ema.items() if key.startswith(prefix)}
        copy.load_state_dict({key: value.half() for key, value in mean.items()}, strict=False)  # buffers stay
        copy.save_pretrained(work / name)


def train(state: State, data: Data, flags: argparse.Namespace, device: torch.device) -> None:
    """Trains until the time is over, or `--stop_after` of it."""
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(1000 + state.step)
    checked = torch.Generator(device).manual_seed(0)
    count = min(CHECKED_SAMPLES, len(data.latents))
    # In batches of the training's size, so that nothing is compiled for the check alone.
    fixed = [
        (rows, draw(len(rows), checked, device)) for rows in torch.arange(count, device=device).split(flags.batch_size)
    ]
    total_s, began_s, start = 60 * flags.minutes, state.elapsed_s, time.perf_counter()
    reported = saved = began_s
    running = torch.zeros((), device=device)
    while state.elapsed_s < min(total_s, 60 * flags.stop_after):
        done = state.elapsed_s / total_s
        # Level, then down to nothing over the last two thirds.
        rate = flags.learning_rate * min(1, (state.step + 1) / WARMUP_STEPS)
        rate *= 0.5 * (1 + math.cos(math.pi * max(0.0, (done - 0.33) / 0.67)))
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        is_long = done > 1 - LONG_SHARE
        lengths, batch_size = (LONG, flags.batch_size * 3 // 4) if is_long else (SHORT, flags.batch_size)
        rows = torch.randint(len(data.latents), (batch_size,), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = batch_loss(state.model, data, rows, draw(batch_size, generator, device), lengths)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
        state.step += 1
        state.update_ema()
        running = torch.lerp(running, loss.detach(), 0.01)
        if state.step % 20 == 0:
            running.item()  # waits for the device, so that the clock is true
        state.elapsed_s = began_s + time.perf_counter() - start
        if state.elapsed_s - saved > SAVE_EVERY_S:
            saved = state.elapsed_s
            state.save(flags.work / STATE_FILE)
            export(state, flags.work)
        if state.elapsed_s - reported > 20:
            reported = state.elapsed_s
            print(
                f"step {state.step}, {state.elapsed_s:.0f} s, {sum(lengths)} tokens: loss {running.item():.4f}, "
                f"checked {check(state.model, data, fixed, on_gpu):.4f}, rate {rate:.2e}",
                flush=True,
            )


def check(model: torch.nn.Module, data: Data, fixed: list, on_gpu: bool) -> float:
    """The loss on the same samples and draws each time, at the short length.

    With gradients recorded and dropped: without them every block would be compiled a second time.
    """
    losses = []
    for rows, draws in fixed:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            losses.append(batch_loss(model, data, rows, draws, SHORT).detach() * len(rows))
    return (torch.stack(losses).sum() / sum(len(rows) for rows, _ in fixed)).item()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--renders", type=Path, required=True, help="The npm package's folder of webp files.")
    parser.add_argument(
        "--work", type=Path, required=True, help="Holds the pool and the VAE; the rest is written here."
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="Of training, in all pieces together.")
    parser.add_argument("--stop_after", type=float, default=math.inf, help="Minutes at which this piece ends.")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, help="Use only so many of the pool.")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    data = load_data(flags.work, flags.renders, device, flags.scenes)
    print(f"{len(data.latents)} scenes drawn and encoded in {time.perf_counter() - start:.0f} s", flush=True)

    models = make_models(MINIATURE, ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"), seed=0)
    start_gently(models["transformer"])
    for name in models.keys() & set(os.listdir(flags.work / "text") if (flags.work / "text").is_dir() else ()):
        models[name] = NETWORKS[name].from_pretrained(flags.work / "text" / name, dtype=torch.float32)
        print(f"{name} as train_text.py left it", flush=True)
    model = TextToVelocity(models).to(device).eval()  # eval: no dropout in T5
    if device.type == "cuda":
        for block in models["transformer"].transformer_blocks:
            block.compile(dynamic=False)
    state = State(model, make_optimizers(model, flags.learning_rate))
    path = flags.work / STATE_FILE
    if path.is_file():
        state.load(path)
        print(f"going on from step {state.step}", flush=True)
    train(state, data, flags, device)
    state.save(path)
    export(state, flags.work)
    print(f"{state.step} steps, {state.elapsed_s:.0f} s; wrote {', '.join(models)} to {flags.work}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
