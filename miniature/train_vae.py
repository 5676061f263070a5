"""Trains the miniature's VAE on rendered scenes without the held-out objects.

    python miniature/train_vae.py --renders FOLDER_OF_WEBP --minutes 4 --output_dir WORK

Ends by folding each latent channel's spread into the weights next to it, so that SD3's own `scaling_factor` fits, and
by writing the pictures' PSNR on scenes of objects that it has never seen. `--start_from` goes on with an earlier VAE,
and `--decoder_only` then leaves its encoder, and so the latents that a transformer was trained on, as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from architecture import make_vae
from diffusers import AutoencoderKL
from render import Renderer
from world import load_objects, object_indices, sample_scenes

BATCH_SIZE = 48
KL_WEIGHT = 2e-5  # per latent value, beside a squared error per pixel value in [-1, 1]
# Keeps each channel's mean near 0. It cannot be folded away afterwards as the spread can: the decoder pads with zeros,
# and moving what zero means cost 1.6 dB.
MEAN_WEIGHT = 1e-2
RENDERED_AT_ONCE = 20  # batches: drawing small ones would leave the GPU waiting for launches
L1_WEIGHT = 0.05


def train(
    vae: AutoencoderKL, renderer: Renderer, objects: Sequence[int], minutes: float, learning_rate: float, seed: int
) -> int:
    """Trains for a time, compiling not included; returns the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    device = renderer.device
    on_gpu = device.type == "cuda"
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=on_gpu)

    def errors(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, log_variance = vae.encoder(pictures).chunk(2, dim=1)
        mean, log_variance = mean.float(), log_variance.float().clamp(-30, 20)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        difference = vae.decoder(latents).float() - pictures
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        channel_means = mean.mean((0, 2, 3))
        return difference.square().mean(), difference.abs().mean(), kl.mean(), channel_means.square().mean()

    step_errors = torch.compile(errors) if on_gpu else errors
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        # Level, then down to nothing over the last four fifths.
        rate = learning_rate * min(1, (step + 1) / 200) * min(1, 1.25 * (1 - done)) + 1e-7
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step % RENDERED_AT_ONCE == 0:
            many = renderer(sample_scenes(RENDERED_AT_ONCE * BATCH_SIZE, objects, generator, pairs=0.2))
        batch = many[step % RENDERED_AT_ONCE * BATCH_SIZE :][:BATCH_SIZE]
        pictures = batch.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            squared, absolute, kl, means = step_errors(pictures)
        loss = squared + L1_WEIGHT * absolute + KL_WEIGHT * kl + MEAN_WEIGHT * means
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step == 1:
            start = time.perf_counter()  # compiling does not count
        if step % 500 == 0:
            decibel = 10 * torch.log10(4 / squared.detach()).item()
            elapsed = time.perf_counter() - start
            print(f"vae step {step}, {elapsed:.0f} s: {decibel:.2f} dB, KL {kl.item():.2f}", flush=True)
    return step


@torch.no_grad()
def fold_latent_spread(vae: AutoencoderKL, renderer: Renderer, objects: Sequence[int], seed: int) -> None:
    """Scales the encoder's output, and the decoder's input back, channel by channel.

    Afterwards latents * scaling_factor has a spread of 1 in every channel, and what is decoded is unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [
        vae.encode(renderer(sample_scenes(64, objects, generator, pairs=0.2))).latent_dist.sample() for _ in range(16)
    ]
    gain = 1 / (vae.config.scaling_factor * torch.cat(samples).std((0, 2, 3)))
    encoder_out, decoder_in = vae.encoder.conv_out, vae.decoder.conv_in
    channels = len(gain)
    encoder_out.weight[:channels] *= gain[:, None, None, None]
    encoder_out.bias[:channels] *= gain
    encoder_out.bias[channels:] += 2 * gain.log()  # of the variance
    decoder_in.weight /= gain[None, :, None, None]


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, renderer: Renderer, objects: Sequence[int], count: int, seed: int) -> float:
    """Mean over pictures of the decibels between a scene and its decoded posterior mean, rounded to 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(count // 64):
        pictures = renderer(sample_scenes(64, objects, generator))
        decoded = vae.decode(vae.encode(pictures.to(vae.dtype)).latent_dist.mode()).sample.float()
        error = _as_bytes(decoded) - _as_bytes(pictures)
        values.append(10 * torch.log10(255**2 / error.square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def _as_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--renders", type=Path, required=True, help="The npm package's folder of webp files.")
    parser.add_argument("--minutes", type=float, default=4.0, help="Of training.")
    parser.add_argument("--learning_rate", type=float, default=1.2e-3, help="At its highest.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the folder vae goes.")
    parser.add_argument("--start_from", type=Path, help="Folder of a VAE to go on with.")
    parser.add_argument("--decoder_only", action="store_true", help="Train the decoder alone.")
    parser.add_argument("--test_scenes", type=int, default=1024, help="On which it is tested.")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    objects = load_objects()
    seen, held_out = object_indices(held_out=False), object_indices(held_out=True)
    renderer = Renderer(objects, flags.renders, device)
    vae = AutoencoderKL.from_pretrained(flags.start_from) if flags.start_from else make_vae()
    vae = vae.to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not flags.decoder_only)
    steps = train(vae, renderer, seen, flags.minutes, flags.learning_rate, seed=1)
    if not flags.decoder_only:
        fold_latent_spread(vae, renderer, seen, seed=3)
    vae = vae.half().float()  # it is tested as it is shipped
    report = {
        "steps": steps,
        "psnr_held_out_objects": round(measure_psnr(vae, renderer, held_out, flags.test_scenes, seed=2), 2),
        "psnr_seen_objects": round(measure_psnr(vae, renderer, seen, flags.test_scenes, seed=4), 2),
    }
    vae.half().save_pretrained(flags.output_dir / "vae")
    (flags.output_dir / "vae.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"vae: {report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
