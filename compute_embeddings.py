"""Stage one, text: prompts → embeddings.parquet.

Loads the three text encoders of SD3 one at a time, writes every prompt's embedding, and frees them, so that no later
stage ever loads T5's 4.8 billion parameters.

    python compute_embeddings.py --instance_data_dir dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.lean_imports import import_pyarrow, import_transformers, start_driver
from sd3_lora.stage_one.config import EmbeddingConfig

COMMAND_LINE = CommandLine(
    "compute_embeddings.py",
    __doc__,
    (EmbeddingConfig, ModelConfig, DeviceConfig, BudgetConfig),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_transformers("CLIPTextModelWithProjection", "T5EncoderModel")

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import remove_unfinished
from sd3_lora.common.command_line import UserError, command, counted, exit_code
from sd3_lora.common.defaults import EXAMPLE_PROMPTS_FILE, EXAMPLE_SUBJECT, LATENTS_PATH, say_miniature
from sd3_lora.common.devices import make_deterministic, planned_device
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles, library_versions
from sd3_lora.common.processes import Processes, in_processes, print_next
from sd3_lora.common.progress import Progress
from sd3_lora.common.records import InstanceImage, PromptEmbedding, Provenance
from sd3_lora.common.run_locks import writing
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunRecord, RunResults, recorded_flags
from sd3_lora.common.stage_report import StageReport
from sd3_lora.gpu.budget import FEW_KERNELS_BYTES, DeviceBudget, measured_peak, open_budget, sentence, within_memory
from sd3_lora.stage_one.captions import class_images, trigger_of
from sd3_lora.stage_one.concepts import Subject, concepts_of, read_subject
from sd3_lora.stage_one.config import LatentConfig
from sd3_lora.stage_one.data_sets import with_folder
from sd3_lora.stage_one.embedding_parts import EmbeddingParts
from sd3_lora.stage_one.embedding_store import CLASS_CAPTION, UNCAPTIONED, EmbeddingStore, with_uses, write_embeddings
from sd3_lora.stage_one.image_files import picture_paths
from sd3_lora.stage_one.prompts import identifier_of, read_prompts, unknown_note, unknown_words, with_subject
from sd3_lora.stage_one.text_encoder_plan import (
    CLIP_BATCH_SIZE,
    TextEncoderPlan,
    TextWork,
    choose_text_encoder_plan,
    describe_t5,
)
from sd3_lora.stage_one.text_encoders import encode_prompts

import torch

PROMPTS_PER_CHUNK = 512  # each chunk is a finished part, so that an interrupted run loses at most one


def collect_prompts(
    config: EmbeddingConfig, subject: Subject
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Every distinct prompt with its roles, and the image ids that it describes."""
    asked = [(prompt, role) for prompt in subject.instance_prompts for role in ("instance", UNCAPTIONED)]
    asked += [(prompt, "instance") for image in subject.images for prompt in image.prompts]
    class_prompts = subject.class_prompts if config.class_prompt is None else (config.class_prompt,)
    asked += [(prompt, "class") for prompt in class_prompts]
    asked += [(prompt, CLASS_CAPTION) for prompt in class_captions(config, subject)]
    validation = list(config.validation_prompt)
    validation += (prompt for file in config.prompts_file for prompt in read_prompts(Path(file)))
    if not validation and subject.concepts[0].folder.resolve() == EXAMPLE_SUBJECT:
        validation = read_prompts(EXAMPLE_PROMPTS_FILE)
    asked += [(prompt, "validation") for prompt in with_subject(validation, config.subject)]
    asked += [(config.negative_prompt or "", "negative"), ("", "empty")]
    roles: dict[str, tuple[str, ...]] = {}
    for prompt, role in asked:
        roles[prompt] = tuple(dict.fromkeys((*roles.get(prompt, ()), role)))
    image_ids: dict[str, list[str]] = {}
    for image in subject.images:
        for prompt in image.prompts:
            image_ids.setdefault(prompt, []).append(image.image_id)
    return roles, {prompt: tuple(ids) for prompt, ids in image_ids.items()}


def class_captions(config: EmbeddingConfig, subject: Subject) -> list[str]:
    """The prompts of class pictures beside the class prompt: their captions, and those to be drawn."""
    folders = [concept.class_folder for concept in subject.concepts] if config.class_captions else []
    if config.class_data_dir is not None:
        folders = [Path(config.class_data_dir)]
    images = (image for folder in dict.fromkeys(folders) if folder for image in class_images(folder, "", None, True))
    prompts = [prompt for image in images for prompt in image.prompts if prompt]
    return prompts + ([] if config.class_prompts_file is None else read_prompts(Path(config.class_prompts_file)))


def print_words(files: ModelFiles, trigger: str, class_prompt: str | None, prompts: Iterable[str]) -> None:
    """Prints how the word that stands for the subject tokenizes, and which words T5 does not know."""
    for line in identifier_of(files, trigger, class_prompt):
        print(line)
    note = unknown_note(unknown_words(files, prompts))
    if note:
        print(note)


def read_existing(path: Path, overwrite: bool) -> Provenance | None:
    """The provenance of an existing embeddings file that is to be kept; None where there is none."""
    if not path.exists() or (overwrite and not path.is_dir()):
        return None
    with EmbeddingStore(path) as store:
        return store.provenance


def require_same(existing: Provenance | None, wanted: Provenance, path: Path) -> None:
    """Refuses to add to a file that was made with other settings.

    Raises:
        UserError: it was.
    """
    difference = existing.difference(wanted, "max_sequence_length") if existing else None
    if difference:
        raise UserError(
            f"{path} was made with {difference}: add --overwrite to replace it, or give another --output_path"
        )


def chunk_size(prompts: int, processes: int) -> int:
    """Prompts of a chunk: each process' share of them in whole batches, so that the batches are those of one process.

    At most `PROMPTS_PER_CHUNK`.
    """
    share = max(1, -(-prompts // processes))
    return min(PROMPTS_PER_CHUNK, -(-share // CLIP_BATCH_SIZE) * CLIP_BATCH_SIZE)


def text_work(config: EmbeddingConfig, existing: Provenance | None, prompts: int) -> TextWork:
    """What the text encoders are to do, with so many prompts together."""
    precision = existing.precision if existing else None
    return TextWork(config.max_sequence_length, config.t5_precision, config.t5_stream, precision, prompts)


def find_missing(
    prompts: Iterable[str], output_path: Path, existing: Provenance | None, parts: EmbeddingParts
) -> tuple[list[str], list[int]]:
    """The prompts that neither the output nor a part has, and the numbers of the existing parts."""
    done = parts.prompts()
    if existing:
        with EmbeddingStore(output_path) as store:
            done |= set(store.prompts)
    return [prompt for prompt in prompts if prompt not in done], parts.numbers()


def in_chunks(missing: Sequence[str], existing: Sequence[int], processes: int) -> dict[int, Sequence[str]]:
    """The prompts of each part that is to be made, by its number; the numbers follow those of the existing parts."""
    size = chunk_size(len(missing), processes)
    chunks = (missing[i : i + size] for i in range(0, len(missing), size))
    return dict(enumerate(chunks, start=max(existing, default=-1) + 1))  # a discarded part leaves a gap


def encode_chunks(
    files: ModelFiles,
    plan: TextEncoderPlan,
    chunks: Mapping[int, Sequence[str]],
    parts: EmbeddingParts,
    reports: list[StageReport],
    processes: Processes,
) -> None:
    """Encodes this process' share chunk by chunk; each chunk is on disk before the next begins."""
    share = processes.share(list(chunks.items()))
    for number, chunk in Progress(share, desc="chunks", unit="chunk", disable=len(share) < 2):
        prompt_embeds, pooled = encode_prompts(files, chunk, plan, reports)  # (N, S, D), (N, P)
        parts.add(number, chunk, prompt_embeds, pooled)


def encode_and_write(
    files: ModelFiles,
    plan: TextEncoderPlan,
    chunks: Mapping[int, Sequence[str]],
    parts: EmbeddingParts,
    write: Callable[[threading.Event], int],
    processes: Processes,
    reports: list[StageReport],
) -> int:
    """Encodes the chunks, while rank 0 writes the rows of each beside the next; adds the reports.

    Returns:
        What `write` did in rank 0, 0 in others.
    """
    with in_thread(write if processes.is_rank_0 else lambda _: 0) as written:
        encode_chunks(files, plan, chunks, parts, reports, processes)
        processes.gather(None)  # all parts are there
    return written.result()


def rows_of(
    parts: EmbeddingParts, numbers: Sequence[int], existing_path: Path | None, cancelled: threading.Event
) -> Iterator[PromptEmbedding]:
    """The rows of all parts, each as soon as it is there, and then those of the existing file."""
    yield from parts.read(numbers, cancelled)
    if existing_path:
        with EmbeddingStore(existing_path) as store:
            yield from store.read_all()


@contextmanager
def in_thread(work: Callable[[threading.Event], int]) -> Iterator[Future[int]]:
    """Runs `work` in a thread beside the block, and waits for it at the end.

    Args:
        work: gets an event that is set when the block fails, and then ends early.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            future = thread.submit(work, cancelled)
            yield future
            future.exception()  # waits
        except BaseException:
            cancelled.set()
            raise


def bytes_to_write(files: ModelFiles, tokens: int, missing: int, output_path: Path) -> int:
    """The bytes of the missing prompts' parts and rows, and of the rows that are there, which are written anew.

    Args:
        files: of the model.
        tokens: of T5.
        missing: how many prompts.
        output_path: of all rows.
    """
    width = files.read_config("text_encoder_3")["d_model"]
    kept = output_path.stat().st_size if output_path.is_file() else 0
    return kept + 2 * missing * 2 * (files.clip_tokens() + tokens) * width  # float16, twice


def facts_of(
    files: ModelFiles,
    plan: TextEncoderPlan,
    predicted: dict[str, int],
    images: Sequence[InstanceImage],
    processes: Processes,
) -> RunFacts:
    """The run's inputs and settings, for `run.json`."""
    return RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=plan.t5_precision,
        processes=processes.count,
        plan=asdict(plan),
        predicted_parts=predicted,
        prompts=tuple(dict.fromkeys(prompt for image in images for prompt in image.prompts))[:MOST_PROMPTS],
        max_sequence_length=plan.max_sequence_length,
    )


def run(argv: Sequence[str] | None, processes: Processes) -> None:
    """The stage from top to bottom."""
    config, model, device_config, budget_config = COMMAND_LINE.parse(argv)
    if model.is_miniature:
        say_miniature("compute_embeddings.py", config.instance_data_dir)
    config = processes.from_rank_0(lambda: with_folder(config, model.cache_dir))
    configs = (config, model, device_config, budget_config)
    concepts = concepts_of(config)
    device = processes.choose_device(device_config.device, model)
    if device_config.must_be_deterministic:
        make_deterministic()
    budget = open_budget(budget_config, device, FEW_KERNELS_BYTES)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model, budget_config.plan)

    subject = processes.from_rank_0(lambda: read_subject(concepts, config))
    lock = nullcontext() if budget_config.plan else writing(Path(config.output_path).absolute())
    with processes.holding(lock):
        embed(configs, files, subject, device, budget, processes)


def embed(
    configs: tuple[Any, ...],
    files: ModelFiles,
    subject: Subject,
    device: torch.device,
    budget: DeviceBudget | None,
    processes: Processes,
) -> None:
    """Encodes the prompts that the output lacks, and writes it with all of them; or plans that alone."""
    config, _, device_config, budget_config = configs
    images, output_path = subject.images, Path(config.output_path)
    print(*subject.sentences(about_prompts=True), sep="\n")
    roles, image_ids = collect_prompts(config, subject)
    trigger = trigger_of((prompt for image in images for prompt in image.prompts), subject.instance_prompts)
    if not files.is_known:
        print_words(files, trigger, config.class_prompt, roles)

    # A model that is not there is planned for as if nothing were: what is there is not known to be of it.
    existing = None if files.is_known else read_existing(output_path, config.overwrite)
    work = text_work(config, existing, min(len(roles), chunk_size(len(roles), processes.count)))
    planned = planned_device(device_config.device, device, budget_config.plan)
    plan = choose_text_encoder_plan(files, work, planned, budget)
    plan = replace(processes.gather(plan)[0], device=device)  # that of rank 0's GPU: all processes compute alike
    predicted = plan.predicted_parts(files, budget) if budget else {}
    if budget:
        print(f"T5 in {describe_t5(plan)}: {sentence(predicted)}")
    if budget_config.plan:
        return
    provenance = files.provenance(TEXT_COMPONENTS, plan.t5_precision, config.max_sequence_length)
    require_same(existing, provenance, output_path)
    parts = EmbeddingParts(output_path, provenance)
    missing, numbers = processes.from_rank_0(lambda: find_missing(roles, output_path, existing, parts))
    chunks = in_chunks(missing, numbers, processes.count)
    print(
        f"{counted(len(roles), 'prompt')}, {len(roles) - len(missing)} of them done before; T5 in {describe_t5(plan)}"
    )

    size = bytes_to_write(files, plan.max_sequence_length, len(missing), output_path)
    require_room(output_path.absolute().parent, size, "the embeddings take")
    reports: list[StageReport] = []

    def write(cancelled: threading.Event) -> int:
        rows = rows_of(parts, [*numbers, *chunks], output_path if existing else None, cancelled)
        return write_embeddings(output_path, provenance, with_uses(rows, roles, image_ids))

    def encode(within: DeviceBudget | None) -> int:
        nonlocal plan, chunks, numbers
        if within is not budget:  # the parts that are there have T5's precision
            fixed = replace(work, t5_precision=plan.t5_precision)
            plan = choose_text_encoder_plan(files, fixed, device, within)
            missing, numbers = find_missing(roles, output_path, existing, parts)
            chunks = in_chunks(missing, numbers, 1)
        return encode_and_write(files, plan, chunks, parts, write, processes, reports)

    # One of several processes cannot go on alone: the others wait for its chunks.
    count = within_memory(encode, budget, reports) if processes.count == 1 else encode(budget)
    if not processes.is_rank_0:
        return
    parts.remove()
    remove_unfinished(output_path.parent, output_path.with_suffix(".json").name)
    measured = measured_peak(budget, reports, sum(predicted.values()) if missing else 0)
    facts = replace(facts_of(files, plan, predicted, images, processes), trigger=trigger)
    results = RunResults(str(output_path), reports, measured)
    RunRecord(configs, facts).save(output_path.with_suffix(".json"), results)
    print(f"wrote {output_path}: {counted(count, 'prompt')}, {output_path.stat().st_size / 1024**2:.1f} MiB")
    print_next("next: " + next_command(configs))


def next_command(configs: tuple[Any, ...]) -> str:
    """The command that caches the same pictures, beside an embeddings file with a folder of its own.

    A cache that is there already keeps its settings.
    """
    config, model, device, budget = configs
    folder = Path(config.output_path).parent
    settings = recorded_flags(folder / LATENTS_PATH / "run.json", LatentConfig)
    if config.class_data_dir is not None and picture_paths(Path(config.class_data_dir)):
        settings["class_data_dir"] = config.class_data_dir
    settings["output_path"] = None if folder == Path() else folder / LATENTS_PATH
    shared = {**model.flags(), **config.picture_flags(), **device.flags(), **budget.flags()}
    return command("precompute_latents.py", **{**shared, **settings, **shared})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(in_processes(run), argv, "--t5_precision fp16 --t5_stream")


if __name__ == "__main__":
    sys.exit(main())
