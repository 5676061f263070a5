"""Milliseconds and FLOPs of a training step: ours in each setting, and diffusers' scripts beside it on the same GPU.

    python benchmarks/step.py flops 1024 512 batch sd3.5 losses --models /tmp/models --peer ../diffusers --result FILE
    python benchmarks/step.py cpu --models /tmp/models --peer ../diffusers --peer_python ../peer/bin/python
    python benchmarks/step.py prior buckets --models /tmp/models --result "benchmarks/results/{set}-h100.json"

`--peer` is a clone of diffusers; its scripts run unchanged, and are timed from outside (`timed_peer.py`). The models
are of full size with random weights, and are made in `--models` where they are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import write_text_atomically
from sd3_lora.common.devices import choose_device
from sd3_lora.common.memory import free_memory
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.plan.step_time import device_seconds

import pandas as pd
import random_sd3
import torch
from evaluate import VERSIONS, circumstances
from memory import PROMPT, fabricate_stage_one, model_folder, with_encoders
from PIL import Image
from placements import placement_of
from timed_peer import Clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

TRAIN = "train_dreambooth_sd3_lora_miniature"
REFERENCE = "examples/research_projects/sd3_lora_colab/train_dreambooth_lora_sd3_miniature.py"
BIG_SCRIPT = "examples/dreambooth/train_dreambooth_lora_sd3.py"
PLAIN_WHOLE = "plain_whole.py"  # beside this script
TEXT_TOKENS = 154
ALL_BLOCKS = ("--gradient_checkpointing",)


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        name: of the row.
        resolution: in pixels.
        flags: of the script, beside the size.
        model: of `random_sd3.TRANSFORMERS`, or the miniature.
        batch: pictures a step.
        rank: of the LoRA.
        precision: of the base.
        script: below the clone of diffusers, or `PLAIN_WHOLE`; None for ours.
        sizes: of the pictures, in turn, as 832x1216; squares where there are none.
    """

    name: str
    resolution: int
    flags: tuple[str, ...] = ()
    model: str = "sd3-medium"
    batch: int = 1
    rank: int = 4
    precision: str = "fp16"
    script: str | None = None
    sizes: tuple[str, ...] = ()


PLAIN = ("--compile", "off", "--capture", "off")
CAPTURED = ("--compile", "off", "--capture", "on")
COMPILED = ("--compile", "on")


def cases_of_size(resolution: int) -> Iterator[Case]:
    """The peers, and ours as they are set and with each step towards the fastest."""
    yield Case("diffusers' sd3_lora_colab", resolution, ALL_BLOCKS, script=REFERENCE)
    yield Case("diffusers' train_dreambooth_lora_sd3", resolution, ALL_BLOCKS, script=BIG_SCRIPT)
    yield Case("ours, all blocks recomputed, plain", resolution, (*PLAIN, *ALL_BLOCKS))
    yield Case("ours, all blocks recomputed", resolution, (*CAPTURED, *ALL_BLOCKS))
    yield Case("ours, plain", resolution, PLAIN)
    yield Case("ours, replayed", resolution, CAPTURED)
    yield Case("ours, compiled and replayed", resolution, COMPILED)


def batch_cases() -> Iterator[Case]:
    """Four pictures a step."""
    yield Case("ours, replayed", 1024, CAPTURED, batch=4)
    yield Case("ours, compiled and replayed", 1024, COMPILED, batch=4)


def sd35_cases() -> Iterator[Case]:
    """What SimpleTuner publishes 0.72 s for, on an H100: three pictures, rank 128, bf16."""
    for name, flags in (("ours, replayed", CAPTURED), ("ours, compiled and replayed", COMPILED)):
        yield Case(name, 1024, flags, "sd3.5-medium", 3, 128, "bf16")


def prior_cases() -> Iterator[Case]:
    """Prior preservation without class pictures, beside the same step without it."""
    for resolution in (1024, 512):
        yield Case("no prior term", resolution, CAPTURED)
        for term in ("preference", "prediction"):
            yield Case(f"`{term}`", resolution, (*CAPTURED, "--prior_term", term))


def bucket_cases() -> Iterator[Case]:
    """One shape, and two in turn, of the same pixels."""
    flags = (*CAPTURED, "--use_aspect_ratio_bucket")
    for resolution, upright, lying in ((1024, "832x1216", "1216x832"), (512, "384x640", "640x384")):
        yield Case("one shape", resolution, flags, sizes=(upright,))
        yield Case("two shapes", resolution, flags, sizes=(upright, lying))


def cpu_cases() -> Iterator[Case]:
    """Of the miniature, in float32."""
    peer = Case("diffusers' train_dreambooth_lora_sd3", 128, (), "miniature", 2, precision="no", script=BIG_SCRIPT)
    yield peer
    yield replace(peer, name="ours", flags=PLAIN, script=None)
    yield replace(peer, name="ours, compiled", flags=COMPILED, script=None)  # needs a C++ compiler


def clip_cases() -> Iterator[Case]:
    """With a LoRA of the CLIPs; diffusers' script encodes with T5 too in each step, here with one layer of it."""
    clips = ("--train_text_encoder",)
    yield Case("diffusers' train_dreambooth_lora_sd3", 1024, (*ALL_BLOCKS, *clips), script=BIG_SCRIPT)
    yield Case("ours, all blocks recomputed, plain", 1024, (*PLAIN, *ALL_BLOCKS, *clips))
    yield Case("ours, all blocks recomputed", 1024, (*CAPTURED, *ALL_BLOCKS, *clips))
    yield Case("ours, replayed", 1024, (*CAPTURED, *clips))
    yield Case("ours, compiled and replayed", 1024, (*COMPILED, *clips))


def full_cases() -> Iterator[Case]:
    """The whole transformer, beside a plain loop with bitsandbytes (`plain_whole.py`)."""
    whole = ("--full", *ALL_BLOCKS)
    for model in ("sd3-medium", "sd3.5-medium"):
        yield Case("a plain loop, all blocks recomputed", 1024, (), model, precision="bf16", script=PLAIN_WHOLE)
        yield Case("ours, all blocks recomputed, plain", 1024, (*whole, "--capture", "off"), model, precision="bf16")
        yield Case("ours, all blocks recomputed", 1024, (*whole, "--capture", "on"), model, precision="bf16")
        yield Case("ours, replayed", 1024, ("--full", "--capture", "on"), model, precision="bf16")


SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "clips": clip_cases,
    "1024": lambda: cases_of_size(1024),
    "512": lambda: cases_of_size(512),
    "batch": batch_cases,
    "sd3.5": sd35_cases,
    "prior": prior_cases,
    "buckets": bucket_cases,
    "full": full_cases,
}
# Steps before the clock starts: the graphs of all shapes are captured by then. The timed ones have each as often.
WARM = {"prior": 9, "buckets": 9}


def flops(model: str, resolution: int) -> dict[str, float]:
    """TFLOPs of a forward and of a step of one picture, counted by torch on a model that has no memory.

    Keeping all activations; `step_fused` has what fused attention computes again in backward, the scores.
    """
    with torch.device("meta"):
        transformer = random_sd3.make_transformer(model).requires_grad_(False)
    config, side = dict(transformer.config), resolution // 8
    words = {
        "hidden_states": torch.empty(1, 16, side, side, device="meta", requires_grad=True),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, 4096, device="meta"),
        "pooled_projections": torch.empty(1, 2048, device="meta"),
    }
    with FlopCounterMode(display=False) as forward:
        velocity = transformer(**words, return_dict=False)[0]
    with FlopCounterMode(display=False) as backward:
        velocity.sum().backward()
    tokens = (side // 2) ** 2 + TEXT_TOKENS
    width = config["num_attention_heads"] * 64
    scores = 2 * tokens**2 * width * config["num_layers"]
    scores += 2 * (side // 2) ** 4 * width * len(config.get("dual_attention_layers") or ())
    totals = forward.get_total_flops(), backward.get_total_flops()
    return {
        "forward_tflop": round(totals[0] / 1e12, 3),
        "step_tflop": round(sum(totals) / 1e12, 3),
        "step_fused_tflop": round((sum(totals) + scores) / 1e12, 3),
    }


def matmul_tflops() -> float:
    """The rate of a large float16 product, in TFLOP/s."""
    size, count = 8192, 20
    square = torch.randn(size, size, device="cuda", dtype=torch.float16)
    for _ in range(3):
        square @ square
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        square @ square
    torch.cuda.synchronize()
    return round(count * 2 * size**3 / (time.perf_counter() - start) / 1e12, 1)


def shared_words(case: Case, model: Path, output: Path, steps: int) -> list[object]:
    """What both trainers are told."""
    words: list[object] = ["--pretrained_model_name_or_path", model, "--resolution", case.resolution]
    words += ["--train_batch_size", case.batch, "--rank", case.rank, "--mixed_precision", case.precision]
    words += ["--use_8bit_adam", "--max_train_steps", steps, "--output_dir", output, "--seed", 0]
    return [*words, "--learning_rate", "1e-5", "--report_to", "tensorboard" if case.script else "none"]


def stored(case: Case, model: Path) -> tuple[Path, Path]:
    """The fabricated embeddings and latents of a case."""
    return fabricate_stage_one(model, case.resolution, *map(PictureSize.parse, case.sizes))


@contextlib.contextmanager
def counted_steps(script: ModuleType, warm: int, steps: int) -> Iterator[Clock]:
    """A clock that ticks where our script takes an optimizer step."""
    clock, take_step = Clock(warm, steps), script.optimizer_step

    def step(*given: Any) -> Any:
        result = take_step(*given)
        clock.tick()
        return result

    with mock.patch.object(script, "optimizer_step", step):
        yield clock


def run_ours(case: Case, model: Path, output: Path, warm: int, steps: int, device: str) -> dict[str, Any]:
    """Our script in this process, its steps counted where it takes them."""
    script = importlib.import_module(TRAIN)
    embeddings, latents = stored(case, model)
    words = [*shared_words(case, model, output, steps), "--data_df_path", embeddings, "--latents_path", latents]
    refused = io.StringIO()
    redirected = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(refused)
    with counted_steps(script, warm, steps) as clock, redirected[0], redirected[1]:
        code = script.main([str(word) for word in (*words, "--device", device, *case.flags)])
    if code:
        return {"failed": refused.getvalue().strip().splitlines()[-1:]}
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {**clock.report(), "placement": placement_of(record["plan"]), "execution": record["execution"]}


def peer_words(case: Case, model: Path) -> list[object]:
    """Pictures and, for the reference, its embeddings file; both scripts are told where these are."""
    folder = model / f"jpeg-{case.resolution}"
    if not folder.is_dir():
        folder.mkdir()
        for index in range(4):
            picture = Image.effect_noise((case.resolution, case.resolution), 20 + 20 * index).convert("RGB")
            picture.save(folder / f"{index}.jpeg")
    words: list[object] = ["--instance_data_dir", folder, "--instance_prompt", PROMPT]
    if case.script == REFERENCE:
        rows = [
            {
                "image_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
                "prompt_embeds": torch.randn(TEXT_TOKENS * 4096).tolist(),
                "pooled_prompt_embeds": torch.randn(2048).tolist(),
            }
            for path in sorted(folder.iterdir())
        ]
        pd.DataFrame(rows).to_parquet(model / "reference.parquet")
        words += ["--data_df_path", model / "reference.parquet"]
    return words


def run_peer(script: str, words: Sequence[object], output: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """A script of diffusers in a process of its own."""
    report = output / "report.json"
    timed = [flags.peer_python, Path(__file__).with_name("timed_peer.py"), flags.warm, flags.steps, report]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"} if flags.device == "cpu" else {}
    finished = subprocess.run(
        [str(word) for word in (*timed, flags.peer / script, *words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **hidden},
        check=False,
    )
    if not report.is_file():
        return {"failed": finished.stderr.strip().splitlines()[-3:]}
    return json.loads(report.read_text(encoding="utf-8"))


def run_plain_whole(case: Case, output: Path, warm: int, steps: int) -> dict[str, Any]:
    """The plain loop in a process of its own."""
    report, script = output / "report.json", Path(__file__).with_name(PLAIN_WHOLE)
    words = [sys.executable, script, case.model, case.resolution, warm, steps, report]
    finished = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if not report.is_file():
        return {"failed": finished.stderr.strip().splitlines()[-3:]}
    return json.loads(report.read_text(encoding="utf-8"))


def save_short_t5(model: Path) -> None:
    """T5 of its real width and one layer."""
    shutil.rmtree(model / "text_encoder_3")
    t5 = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=512, num_layers=1, num_heads=4)
    T5EncoderModel(t5).half().save_pretrained(model / "text_encoder_3")


def save_short_text(model: Path) -> None:
    """Text encoders of the real widths and one layer: the larger script embeds its prompt before its loop begins."""
    for name, sizes in random_sd3.CLIPS.items():
        width = sizes["hidden_size"]
        config = CLIPTextConfig.from_pretrained(
            random_sd3.MINIATURE / name,
            vocab_size=49408,
            intermediate_size=width,
            projection_dim=width,
            **sizes | {"num_hidden_layers": 1},
        )
        shutil.rmtree(model / name)
        CLIPTextModelWithProjection(config).half().save_pretrained(model / name)
    save_short_t5(model)


def prepare_model(name: str, models: Path) -> Path:
    """The folder of a random model, which is made where it is not there."""
    if not (models / name / "model_index.json").is_file():
        random_sd3.save(name, models / name, ["transformer", "vae"])
        save_short_text(models / name)  # before anything is embedded with it
    return model_folder(models, name)


def prepare_with_clips(name: str, models: Path) -> Path:
    """The same with CLIPs of full size, beside a short T5."""
    prepare_model(name, models)
    is_new = not (models / f"{name}-with-clips" / "model_index.json").is_file()
    model = with_encoders(models, name, "clips")
    if is_new:
        save_short_t5(model)
    return model


def run_case(case: Case, flags: argparse.Namespace, warm: int) -> dict[str, Any]:
    """One row, timed after `warm` steps."""
    prepare = prepare_with_clips if "--train_text_encoder" in case.flags else prepare_model
    model = prepare(case.model, flags.models)
    output = flags.models / f"output-{os.getpid()}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    free_memory(choose_device(flags.device))
    start = time.perf_counter()
    if case.script is None:
        row = run_ours(case, model, output, warm, flags.steps, flags.device)
    elif case.script == PLAIN_WHOLE:
        row = run_plain_whole(case, output, warm, flags.steps)
    else:
        words = [*shared_words(case, model, output, flags.steps + 5), *peer_words(case, model), *case.flags]
        row = run_peer(case.script, words, output, flags)
    row = {**asdict(case), **row, "elapsed_s": round(time.perf_counter() - start, 1)}
    if "ms" in row:
        row["ms_an_image"] = round(row["ms"] / case.batch, 2)
    return row


def loss_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """How far each way's losses are from the plain ones over 200 steps on the miniature: the largest, relative."""
    folder = flags.models / "miniature"
    stored = ["--data_df_path", folder / "e.parquet", "--latents_path", folder / "latents"]
    device = ["--device", flags.device]
    losses: dict[str, list[float]] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for script, words in (
            ("compute_embeddings", ["--output_path", folder / "e.parquet"]),
            ("precompute_latents", ["--output_path", folder / "latents"]),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            importlib.import_module(script).main([str(word) for word in (*words, *device)])
        ways = {"plain": PLAIN, "replayed": CAPTURED, "compiled": COMPILED}
        if choose_device(flags.device).type != "cuda":
            del ways["replayed"]
        for name, how in ways.items():
            output = folder / name
            shutil.rmtree(output, ignore_errors=True)
            words = [*stored, *device, *how, "--output_dir", output, "--seed", 0, "--report_to", "none"]
            words += ["--max_train_steps", 200, "--rank", 8, "--learning_rate", 5e-4, "--train_batch_size", 2]
            importlib.import_module(TRAIN).main([str(word) for word in words])
            lines = (output / "losses.jsonl").read_text(encoding="utf-8").splitlines()
            losses[name] = [json.loads(line)["loss"] for line in lines]
    plain = losses["plain"]
    return [
        {
            "name": f"losses of 200 steps, {name}",
            "largest_relative_difference": max(abs(a - b) / b for a, b in zip(found, plain, strict=True)),
            "steps_with_equal_loss": sum(a == b for a, b in zip(found, plain, strict=True)),
            "last": found[-1],
        }
        for name, found in losses.items()
    ]


def cpu_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The step on the bundled miniature: ours and diffusers' script, with the cores that this process may use."""
    flags.device = "cpu"
    folder = flags.models / "miniature-cpu"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, model = folder / "pictures", random_sd3.MINIATURE
    pictures.mkdir(exist_ok=True)
    for path in (model.parent / "examples" / "robot").glob("*.[jpw][pne][gb]*"):  # the peer opens whatever lies there
        shutil.copy(path, pictures)
    rows = []
    for case in cpu_cases():
        if case.script and not flags.peer:
            continue
        output = folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        shared = shared_words(case, model, output, flags.steps)
        shared.remove("--use_8bit_adam")
        data: list[object] = ["--instance_data_dir", pictures, "--instance_prompt", PROMPT]
        if case.script:
            row = run_peer(case.script, [*shared, *data], output, flags)
        else:
            row = run_miniature([*shared, *case.flags], data, folder, flags)
        rows.append({**asdict(case), **row})
    return rows


def run_miniature(shared: list[object], data: list[object], folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Our step on the miniature, after its stage one."""
    embeddings, latents = folder / "e.parquet", folder / "latents"
    script = importlib.import_module(TRAIN)
    base = [*shared[:2], "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        for name, words in (
            ("compute_embeddings", [*base, *data, "--output_path", embeddings]),
            ("precompute_latents", [*base, *data[:2], "--resolution", 128, "--output_path", latents]),
        ):
            importlib.import_module(name).main([str(word) for word in words])
        with counted_steps(script, flags.warm, flags.steps) as clock:
            words = [*shared, *data, "--data_df_path", embeddings, "--latents_path", latents]
            if script.main([str(word) for word in (*words, "--device", "cpu")]):
                return {"failed": "the training script refused"}
    return clock.report()


def gpu_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The same script on one GPU and on all, a picture each: what accelerate launch makes of it."""
    model = model_folder(flags.models, "sd3-medium")
    embeddings, latents = fabricate_stage_one(model, 1024)
    rows = []
    for count in (1, torch.cuda.device_count()):
        output = flags.models / f"output-{count}-gpus"
        shutil.rmtree(output, ignore_errors=True)
        case = Case(f"{count} GPU(s)", 1024, CAPTURED)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", count]
        launch += [*(("--multi_gpu",) if count > 1 else ()), "--num_machines", 1, "--mixed_precision", "no"]
        words = [*launch, "--dynamo_backend", "no", Path(__file__).resolve().parent.parent / f"{TRAIN}.py"]
        words += [*shared_words(case, model, output, 60), "--data_df_path", embeddings, "--latents_path", latents]
        finished = subprocess.run([str(w) for w in (*words, *case.flags)], capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"set": "gpus", **asdict(case), "gpus": count}
        if finished.returncode:
            rows.append(row | {"failed": finished.stderr.strip().splitlines()[-3:]})
            continue
        ms = json.loads((output / "run.json").read_text(encoding="utf-8"))["ms_a_step"]
        rows.append(row | {"ms": round(ms, 2), "images_per_s": round(1000 * count / ms, 2)})
    return rows


def attention_rows() -> list[dict[str, Any]]:
    """SD3-Medium's attention alone, forward and backward, by each kernel that torch has, and by the one it chooses."""
    rows = []
    for resolution in (512, 1024):
        tokens = (resolution // 16) ** 2 + TEXT_TOKENS
        query, key, value = (
            torch.randn(1, 24, tokens, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)
        )

        def run(query: torch.Tensor = query, key: torch.Tensor = key, value: torch.Tensor = value) -> None:
            torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

        kernels: list[SDPBackend | None] = [None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        for kernel in (*kernels, SDPBackend.EFFICIENT_ATTENTION):
            with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
                ms = 1000 * statistics.median(device_seconds(run, 20) for _ in range(3))
            name = kernel.name.lower() if kernel else "torch's choice"
            rows.append({"set": "attention", "name": name, "resolution": resolution, "kernel_ms": round(ms, 3)})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=[*SETS, "flops", "attention", "losses", "cpu", "gpus"])
    parser.add_argument("--models", type=Path, required=True, help="Where the random models are, or are made.")
    parser.add_argument("--peer", type=Path, help="A clone of diffusers; without it only ours is measured.")
    parser.add_argument("--peer_python", default=sys.executable, help="The Python of its scripts.")
    parser.add_argument("--warm", type=int, default=5, help="Steps before the clock starts.")
    parser.add_argument("--steps", type=int, default=25, help="Steps in all.")
    parser.add_argument("--only", nargs="+", help="Only rows with one of these in their names or flags: replayed.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--result", type=Path, help="JSON file to write; {set} in its name gives each set one.")
    flags = parser.parse_args(argv)
    flags.models.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result: dict[str, Any] = circumstances(choose_device(flags.device), (*VERSIONS, "bitsandbytes"))
    result |= {"flops": {}, "rows": []}
    if torch.cuda.is_available():
        result["matmul_tflops"] = matmul_tflops()

    def keep(*rows: dict[str, Any]) -> None:
        for row in rows:
            result["rows"].append(row)
            print({key: row[key] for key in row if key not in ("flags", "script", "precision")}, flush=True)
        for name in flags.sets if flags.result else ():
            path = Path(str(flags.result).replace("{set}", name))
            own = [row for row in result["rows"] if path == flags.result or row.get("set") == name]
            write_text_atomically(path, json.dumps({**result, "rows": own}, indent=1) + "\n")

    for name in flags.sets:
        if name == "flops":
            for model, size in (("sd3-medium", 512), ("sd3-medium", 1024), ("sd3.5-medium", 1024)):
                result["flops"][f"{model} {size}"] = flops(model, size)
            keep()
        elif name == "attention":
            keep(*attention_rows())
        elif name == "losses":
            keep(*loss_rows(flags))
        elif name == "gpus":
            keep(*gpu_rows(flags))
        elif name == "cpu":
            keep(*cpu_rows(flags))
        else:
            for case in SETS[name]():
                if time.perf_counter() - start > flags.stop_after:
                    print(f"stopped before {name}: {case.name}", flush=True)
                    break
                said = f"{case.name} {' '.join(case.flags)}"
                if flags.only and not any(part in said for part in flags.only):
                    continue
                if case.script in (None, PLAIN_WHOLE) or flags.peer:
                    keep({"set": name, **run_case(case, flags, WARM.get(name, flags.warm))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
