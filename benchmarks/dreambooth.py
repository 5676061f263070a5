"""DreamBooth on the miniature: how well a LoRA of five pictures draws its subject, and what it forgets.

The subjects are objects that the miniature never saw. Of each, five rendered scenes with captions are trained on, with
the project's own scripts and, with --peer, with diffusers' own script, unchanged and on the same pictures. The
miniature's judge, which has seen no generated picture, says what the samples show:

- subject: the share of samples that show the subject, on backgrounds and with sizes and places unlike the five scenes';
- prompt: the share of right background colours, patterns and places in the same samples;
- drift: the share of right objects on prompts of other objects, relative to the miniature without a LoRA.

    python benchmarks/dreambooth.py --result FILE
    python benchmarks/dreambooth.py --peer DIFFUSERS_CLONE --peer_python PEER_VENV/bin/python --result FILE
    python benchmarks/dreambooth.py --class_images 100 --result FILE
    python benchmarks/dreambooth.py --nf4 --mixed_precision fp16 --result FILE
    python benchmarks/dreambooth.py --lora robot=sd3-dreambooth-lora

The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import UserError, exit_code, write_text_atomically
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.devices import choose_device
from sd3_lora.common.identifier_embedding import IdentifierEmbedding, IdentifierTokenizer
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.text_encoders import add_vectors
from sd3_lora.transformer.clip_loras import ClipLoras
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_files import LoraFile, find_lora, identifier_beside, read_lora_file
from sd3_lora.transformer.lora_keys import CLIPS

import torch
from contact_sheet import draw_sheet, load_row
from demo import GUIDANCE, RANK, STEPS, TRAIN_BATCH_SIZE
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from dreambooth_scores import TARGETS, count_right, shares, table
from dreambooth_subjects import (
    SUBJECTS,
    Subject,
    drift_scenes,
    evaluation_scenes,
    object_index,
    to_pil,
    write_pictures,
)
from dreambooth_trainers import PEER_SCRIPT, TRAINERS, describe_peer, file_hash, train, trainers
from evaluate import BATCH_SIZE, NUM_STEPS, SEQUENCE_LENGTH, circumstances, draw, load_pipeline
from judge import JUDGE_FILE, Judge, load_judge
from PIL.PngImagePlugin import PngInfo
from world import MINIATURE, PICTURE_PX, load_objects

# What trainers and methods are compared with: a LoRA in the layers where the miniature keeps what a name looks like.
LEARNING_RATE, LORA_LAYERS, LORA_BLOCKS = 5e-4, "ff_context.net.0.proj,ff_context.net.2", "0,1"
SUBJECT_NOISE, DRIFT_NOISE = 1_000, 100_000  # seed of the first prompt's noise; the others follow it
SHEET_PICTURES = 6
# What decides the scores of all DreamBooth benchmarks, and of those with one number of steps and one rate.
SHARED_SETTINGS = ("rank", "lora_layers", "lora_blocks", "train_batch_size", "mixed_precision")
SHARED_SETTINGS += ("prompts", "drift_prompts", "guidance", "num_steps", "tf32")
LENGTH_SETTINGS = ("steps", "learning_rate")


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all, so that a file that is there can be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Bench:
    """The model and the judge, loaded once."""

    flags: argparse.Namespace
    pipeline: StableDiffusion3Pipeline
    judge: Judge

    def draw(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """A picture of each prompt, `(N, 3, 128, 128)` in [-1, 1], with whatever LoRA is loaded."""
        flags, matmul = self.flags, torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, flags.tf32
        try:
            return draw(self.pipeline, prompts, seed, flags.guidance, flags.num_steps, flags.batch_size)
        finally:
            matmul.allow_tf32 = before

    def score(self, subject: Subject, trainer: str, lora: Path | None) -> dict[str, Any]:
        """Draws a subject's samples, and with a LoRA those of other objects, and has them judged.

        Args:
            subject: whose prompts to draw.
            trainer: names the folder that the samples go to.
            lora: a file of diffusers' format; None for the miniature as it is.
        """
        start = time.perf_counter()
        scenes, prompts = evaluation_scenes(subject.name, self.flags.prompts)
        with self.with_lora(lora):
            pictures = self.draw(prompts, SUBJECT_NOISE)
            drift = self.draw_drift() if lora else {}
        save_samples(subject.samples(trainer), pictures, prompts)
        verdict = self.judge.verdict(pictures)
        things = load_objects()
        named = collections.Counter(things[index].name for index in verdict.object.tolist())
        return {
            "subject": subject.name,
            "trainer": trainer,
            "samples": len(prompts),
            "right": count_right(verdict, scenes),
            "named": dict(named.most_common(5)),
            **drift,
            "sampling_s": round(time.perf_counter() - start, 1),
        }

    def count(self, name: str, lora: Path) -> dict[str, Any]:
        """The same answers, counted, of a subject with a LoRA; no sample is kept."""
        scenes, prompts = evaluation_scenes(name, self.flags.prompts)
        with self.with_lora(lora):
            right = count_right(self.judge.verdict(self.draw(prompts, SUBJECT_NOISE)), scenes)
            return {"samples": len(prompts), "right": right, **self.draw_drift()}

    @contextmanager
    def with_lora(self, lora: Path | None) -> Iterator[None]:
        """The miniature with a LoRA, or with the weights of a transformer's folder; and afterwards as it was.

        Raises:
            RuntimeError: it is not what it was before.
        """
        if lora is None:
            yield
            return
        transformer = self.pipeline.transformer
        before = fingerprint(transformer)
        with in_its_place(transformer, lora) if lora.is_dir() else attached(self.pipeline, lora):
            yield
        if fingerprint(transformer) != before:
            raise RuntimeError(f"{lora} was taken off the transformer, which is not what it was before")

    def draw_drift(self) -> dict[str, int]:
        """How many of the other objects are still themselves, with whatever LoRA is loaded."""
        scenes, prompts = drift_scenes(self.flags.drift_prompts)
        right = count_right(self.judge.verdict(self.draw(prompts, DRIFT_NOISE)), scenes)
        return {"drift_samples": len(scenes), "drift_right": right["object"]}


@contextmanager
def attached(pipeline: StableDiffusion3Pipeline, path: Path) -> Iterator[None]:
    """Within it the transformer has a LoRA, and the CLIPs what is theirs."""
    transformer = pipeline.transformer
    lora = read_lora_file(path, transformer.config, lambda name: getattr(pipeline, name).config.to_dict())
    lora.attach(transformer, "subject")
    try:
        with changed_clips(pipeline, lora):
            yield
    finally:
        transformer.unload_lora()


@contextmanager
def in_its_place(transformer: SD3Transformer2DModel, folder: Path) -> Iterator[None]:
    """Within it the transformer has the weights of a folder."""
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    transformer.load_state_dict(SD3Transformer2DModel.from_pretrained(folder).state_dict())
    try:
        yield
    finally:
        transformer.load_state_dict(before)


class VectorTokenizer:
    """A CLIP's tokenizer whose ids of an identifier's vectors lie behind the vocabulary, as `add_vectors` puts them.

    Args:
        tokenizer: the pipeline's.
        identifier: whose vectors they are.
        known: tokens of the CLIP without them.
    """

    def __init__(self, tokenizer: Any, identifier: IdentifierEmbedding, known: int):
        self._tokenizer, self._known = tokenizer, known
        self._with_vectors = IdentifierTokenizer(tokenizer, {identifier.word: identifier.count})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        """As the tokenizer, with ids `(N, C)`."""
        encoded = self._with_vectors(prompts, **options)
        ids = encoded.input_ids
        encoded["input_ids"] = torch.where(ids < 0, self._known - 1 - ids, ids)
        return encoded


@contextmanager
def changed_clips(pipeline: StableDiffusion3Pipeline, lora: LoraFile) -> Iterator[None]:
    """Inside the block the CLIPs are as a LoRA changes them, and read the identifier's embedding beside it, if any."""
    identifier, widths = None, {name: getattr(pipeline, name).config.hidden_size for name in CLIPS}
    if lora.identifier is not None:
        identifier = identifier_beside(lora, widths)
    changed: dict[str, Any] = {}
    for name in CLIPS if lora.clips or identifier else ():
        encoder, suffix = copy.deepcopy(getattr(pipeline, name)), name.removeprefix("text_encoder")
        ClipLoras.of([lora], [1.0]).merge_into(name, encoder)
        if identifier:
            tokenizer = getattr(pipeline, f"tokenizer{suffix}")
            add_vectors(name, encoder, [identifier], tokenizer.eos_token_id)
            changed[f"tokenizer{suffix}"] = VectorTokenizer(tokenizer, identifier, encoder.config.vocab_size)
        changed[name] = encoder
    before = {name: getattr(pipeline, name) for name in changed}
    vars(pipeline).update(changed)  # set as attributes they would be noted in the pipeline's configuration
    try:
        yield
    finally:
        vars(pipeline).update(before)


def fingerprint(model: torch.nn.Module) -> list[tuple[str, int]]:
    """The names of a model's tensors, each with the sum of its bytes: quickly compared."""
    tensors = model.state_dict()
    sums = torch.stack([tensor.detach().contiguous().view(torch.uint8).sum() for tensor in tensors.values()])
    return list(zip(tensors, sums.tolist(), strict=True))


def save_samples(folder: Path, pictures: torch.Tensor, prompts: Sequence[str]) -> None:
    """The samples as PNGs that know their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (picture, prompt) in enumerate(zip(to_pil(pictures), prompts, strict=True)):
        info = PngInfo()
        info.add_text("prompt", prompt)
        picture.save(folder / f"{index:03d}.png", pnginfo=info)


def load_bench(flags: argparse.Namespace) -> Bench:
    """The model and the judge on the asked device."""
    device = choose_device(flags.device)
    return Bench(flags, load_pipeline(flags.model, device), load_judge(device))


def subject_of(flags: argparse.Namespace, name: str) -> Subject:
    """A subject with its folder."""
    return Subject(name, flags.output_dir / name.replace(" ", "_"))


def is_done(subject: Subject, trainer: str, lora: Path | None) -> bool:
    """Whether there are scores; of a given LoRA, whether they are of this file."""
    result = read_json(subject.result(trainer))
    return result is not None and (lora is None or result["lora"] == file_hash(lora))


def measure(flags: argparse.Namespace, names: Sequence[str]) -> None:
    """Trains and scores what has no scores yet."""
    bench = None
    for name in names:
        subject = subject_of(flags, name)
        for trainer in ("before", *trainers(flags)):
            given = find_lora(flags.lora[name]) if trainer == "given" else None
            if is_done(subject, trainer, given):
                continue
            # Whole ones, even if the last run was stopped at one.
            write_pictures(name, subject.pictures, subject.captioned, subject.masks)
            start, lora, record = time.perf_counter(), given, {}
            if trainer != "before" and not given:
                lora = subject.lora(trainer) / LORA_FILE
                if not lora.is_file():
                    train(flags, subject, trainer)
                    record["training_s"] = round(time.perf_counter() - start, 1)
            bench = bench or load_bench(flags)
            row = {**bench.score(subject, trainer, lora), **record, **({"lora": file_hash(lora)} if lora else {})}
            write_json(subject.result(trainer), row)
            times = ", ".join(f"{row[key]} s {key[:-2]}" for key in ("training_s", "sampling_s") if key in row)
            right = row["right"]["object"]
            print(f"{name}, {TRAINERS[trainer]}: {right} of {row['samples']} show it ({times})", flush=True)


def measure_drift_before(flags: argparse.Namespace, path: Path) -> None:
    """What the other objects look like without any LoRA: once for all subjects."""
    if not path.is_file():
        write_json(path, load_bench(flags).draw_drift())


def measure_all(flags: argparse.Namespace) -> None:
    """All subjects, one after another or shared among processes; what is done already costs nothing."""
    measure_drift_before(flags, flags.output_dir / "drift_before.json")
    jobs = min(flags.jobs, len(flags.subjects))
    if jobs <= 1:
        measure(flags, flags.subjects)
        return
    # Read by the new processes, and by diffusers' script under them.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    parts = [flags.subjects[job::jobs] for job in range(jobs)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(measure, flags), parts))


def draw_subject_sheet(flags: argparse.Namespace, subject: Subject) -> None:
    """One PNG: the five pictures, and the first samples without and with each LoRA."""
    folders = {"the five pictures": subject.pictures}
    folders |= {TRAINERS[trainer]: subject.samples(trainer) for trainer in ("before", *trainers(flags))}
    rows = [load_row(heading, folder, PICTURE_PX, SHEET_PICTURES) for heading, folder in folders.items()]
    draw_sheet(f"sks {subject.name}", rows).save(subject.folder / "sheet.png")


def settings_of(flags: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What decides the scores, and so must be the same in all of an output folder: flags, the model and the judge."""
    files = ModelFiles(ModelConfig(pretrained_model_name_or_path=str(flags.model)))
    parts = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    identity = {"model": files.provenance(parts, "fp32", SEQUENCE_LENGTH).identity, "judge": file_hash(JUDGE_FILE)}
    return {**{name: getattr(flags, name) for name in names}, **identity}


def require_same_settings(settings: dict[str, Any], path: Path) -> None:
    """Notes the settings in the output folder, or compares them with those noted there.

    Raises:
        UserError: the folder holds scores of other settings.
    """
    noted = read_json(path)
    if noted is None:
        write_json(path, settings)
        return
    noted = {"class_images": 0, "tf32": False, **noted}  # which earlier builds did not have
    wrong = [name for name in settings if noted.get(name) != settings[name]]
    if wrong:
        name, before, now = wrong[0], noted.get(wrong[0]), settings[wrong[0]]
        change = f"with {name} {before}, not {now}"
        if isinstance(now, bool):  # a flag without a value
            change = f"with{'' if before else 'out'} --{name}"
        raise UserError(f"{path.parent} holds scores {change}: give another --output_dir")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_shared_flags(parser, Path("outputs/dreambooth"))
    add_length_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="Of training; the samples' noise is fixed.")
    parser.add_argument("--train_flags", default="", help="More for our training: --train_flags='--random_flip'.")
    parser.add_argument(
        "--class_images", type=int, default=0, help="Class pictures of each subject, for prior preservation."
    )
    parser.add_argument(
        "--nf4", action="store_true", help="Train a second LoRA on the base in 4 bits; both are drawn on the exact one."
    )
    parser.add_argument("--peer", type=Path, help="A clone of diffusers, to train with its script too.")
    parser.add_argument("--peer_python", default=sys.executable, help="A Python with that script's requirements.")
    parser.add_argument("--peer_flags", default="", help="More for diffusers' script, likewise.")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="SUBJECT=PATH",
        help="Score this LoRA and train none; may be repeated.",
    )
    parser.add_argument("--sheets", type=int, default=3, help="For how many subjects to draw sheet.png.")
    return parser


def add_shared_flags(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    """The flags of all DreamBooth benchmarks: what is trained, how it is scored, and where."""
    parser.add_argument("--subjects", nargs="+", help=f"Held-out objects. Default: {', '.join(SUBJECTS)}.")
    parser.add_argument("--model", type=Path, default=MINIATURE, help="The miniature's folder.")
    parser.add_argument("--rank", type=int, default=RANK, help="Of the LoRA.")
    parser.add_argument("--lora_layers", default=LORA_LAYERS, help="As of the training script. Default: %(default)s.")
    parser.add_argument("--lora_blocks", default=LORA_BLOCKS, help="Likewise. Default: %(default)s.")
    parser.add_argument("--train_batch_size", type=int, default=TRAIN_BATCH_SIZE)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Of training.")
    parser.add_argument("--prompts", type=int, default=32, help="Samples of each subject.")
    parser.add_argument("--drift_prompts", type=int, default=32, help="Samples of other objects, with each LoRA.")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, help="Denoising steps.")
    parser.add_argument(
        "--tf32", action="store_true", help="Draw with products in TF32: sooner, and rounded otherwise. Not training."
    )
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="Pictures drawn together.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="Processes that share the work.")
    parser.add_argument("--output_dir", type=Path, default=output_dir)
    parser.add_argument("--result", type=Path, help="JSON file to write.")


def add_length_flags(parser: argparse.ArgumentParser) -> None:
    """How long is trained, and how fast."""
    parser.add_argument("--steps", type=int, default=STEPS, help="Of training.")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)


def require_subjects(names: Sequence[str]) -> list[str]:
    """The subjects, each once.

    Raises:
        UserError: one that there is not, or there is no judge.
    """
    for name in names:
        object_index(name)
    if not JUDGE_FILE.is_file():
        raise UserError(f"there is no {JUDGE_FILE}: miniature/train_judge.py makes it")
    return list(dict.fromkeys(names))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked.

    Raises:
        UserError: a subject that there is not, or a peer or judge that is not there.
    """
    flags = make_parser().parse_args(argv)
    if any("=" not in word for word in flags.lora):
        raise UserError("--lora takes SUBJECT=PATH, for example robot=sd3-dreambooth-lora")
    flags.lora = dict(word.split("=", 1) for word in flags.lora)
    flags.subjects = require_subjects(flags.subjects or list(flags.lora) or SUBJECTS)
    missing = [name for name in flags.subjects if flags.lora and name not in flags.lora]
    if missing:
        raise UserError(f"there is no --lora for {missing[0]}: leave it out of --subjects, or give one")
    if flags.peer and not (flags.peer / PEER_SCRIPT).is_file():
        raise UserError(f"{flags.peer} holds no {PEER_SCRIPT}: give a clone of diffusers")
    return flags


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    flags = parse(argv)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    settings = settings_of(
        flags, (*LENGTH_SETTINGS, *SHARED_SETTINGS, "seed", "train_flags", "peer_flags", "class_images")
    )
    require_same_settings(settings, flags.output_dir / "settings.json")
    start = time.perf_counter()
    measure_all(flags)
    before = read_json(flags.output_dir / "drift_before.json")
    subjects = [subject_of(flags, name) for name in flags.subjects]
    rows = {
        trainer: [read_json(subject.result(trainer)) for subject in subjects]
        for trainer in ("before", *trainers(flags))
    }
    means = {trainer: shares(found, before) for trainer, found in rows.items()}
    for subject in subjects[: flags.sheets]:
        draw_subject_sheet(flags, subject)
    print(f"\n{len(subjects)} subjects, {flags.prompts} prompts each\n\n{table(means)}")
    judge = read_json(JUDGE_FILE.with_suffix(".json"))
    print(f"\nthe judge itself is right on rendered scenes: {judge}")
    if flags.result:
        result = {
            **circumstances(choose_device(flags.device)),
            "peer": describe_peer(flags) if flags.peer else None,
            "settings": settings,
            "elapsed_s": round(time.perf_counter() - start, 1),
            "judge": judge,
            "targets": TARGETS,
            "means": means,
            "drift_before": before,
            "rows": [{**row, "shares": shares([row], before)} for found in rows.values() for row in found],
        }
        write_json(flags.result, result)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--jobs 1 or a smaller --batch_size")


if __name__ == "__main__":
    sys.exit(main())
