"""Stage one, text: prompts → embeddings.parquet.

Loads the three text encoders of SD3 one at a time, writes what they say of every prompt, and frees them, so that
no later stage ever loads T5's 4.8 billion parameters.

    python compute_embeddings.py --instance_data_dir dog --instance_prompt "a photo of sks dog"
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from sd3_lora.common.command_line import (
    UserError,
    command,
    exit_code,
    parse_flags,
    read_text_lines,
    require_writable_folder,
)
from sd3_lora.common.defaults import EXAMPLE_PROMPTS_FILE, EXAMPLE_SUBJECT, default_subject, say_miniature
from sd3_lora.common.devices import DeviceConfig, planned_device
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelConfig, ModelFiles, library_versions
from sd3_lora.common.processes import Processes, in_processes
from sd3_lora.common.records import InstanceImage, PromptEmbedding, Provenance
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport
from sd3_lora.gpu.budget import FEW_KERNELS_BYTES, BudgetConfig, compared, open_budget, sentence
from sd3_lora.stage_one.captions import instance_images
from sd3_lora.stage_one.embedding_parts import EmbeddingParts
from sd3_lora.stage_one.embedding_store import EmbeddingStore, with_uses, write_embeddings
from sd3_lora.stage_one.text_encoder_plan import CLIP_BATCH_SIZE, TextEncoderPlan, choose_text_encoder_plan, describe_t5
from sd3_lora.stage_one.text_encoders import encode_prompts, report_identifier

from tqdm import tqdm

PROMPTS_PER_CHUNK = 512  # each chunk is a finished part, so that an interrupted run loses at most one


@dataclass(frozen=True)
class EmbeddingConfig:
    """What to embed, how, and where to write it."""

    instance_data_dir: str | None = field(
        default=None,
        metadata={
            "aliases": ["--local_data_dir"],
            "help": "Folder of pictures of the subject; captions beside them (dog.txt for dog.jpg, or metadata.jsonl) "
            "are embedded too. Default: the folder dog, or examples/robot.",
        },
    )
    instance_prompt: str | None = field(
        default=None,
        metadata={"aliases": ["--prompt"], "help": "The prompt with the identifier: 'a photo of sks dog'."},
    )
    class_prompt: str | None = field(
        default=None, metadata={"help": "The same without the identifier: 'a photo of a dog'."}
    )
    validation_prompt: list[str] = field(
        default_factory=list, metadata={"action": "extend", "help": "Prompts that will be drawn after training."}
    )
    prompts_file: str | None = field(
        default=None, metadata={"help": "Text file with more such prompts, one a line, for inference.py."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "The negative prompt for inference.py; the empty prompt is always embedded."}
    )
    recursive: bool = field(default=False, metadata={"help": "Read pictures in subfolders too."})
    max_sequence_length: int = field(default=77, metadata={"help": "T5 tokens of a prompt, 1 to 512."})
    t5_precision: Literal["int8", "nf4", "fp16", "fp32"] | None = field(
        default=None,
        metadata={"help": "Of T5's weights. Default: that of an existing file, else int8 on a GPU, fp32 on a CPU."},
    )
    t5_stream: bool = field(
        default=False, metadata={"help": "Keep one T5 block at a time on the device (fp16 or fp32): the least memory."}
    )
    output_path: str = field(default="sample_embeddings.parquet", metadata={"help": "The parquet file to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a file that was made with other settings."})


def collect_prompts(
    config: EmbeddingConfig, images: Sequence[InstanceImage], instance_prompt: str | None, is_example: bool
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Every distinct prompt with its roles, and the image ids that it describes."""
    asked = [(instance_prompt, "instance")] if instance_prompt is not None else []
    asked += [(image.prompt, "instance") for image in images]
    if config.class_prompt is not None:
        asked.append((config.class_prompt, "class"))
    validation = list(config.validation_prompt)
    if config.prompts_file is not None:
        validation += read_text_lines(Path(config.prompts_file))
    elif is_example and not validation:
        validation = read_text_lines(EXAMPLE_PROMPTS_FILE)
    asked += [(prompt, "validation") for prompt in validation]
    asked += [(config.negative_prompt or "", "negative"), ("", "empty")]
    roles: dict[str, tuple[str, ...]] = {}
    for prompt, role in asked:
        roles[prompt] = tuple(dict.fromkeys((*roles.get(prompt, ()), role)))
    image_ids: dict[str, list[str]] = {}
    for image in images:
        image_ids.setdefault(image.prompt, []).append(image.image_id)
    return roles, {prompt: tuple(ids) for prompt, ids in image_ids.items()}


def read_existing(path: Path, overwrite: bool) -> Provenance | None:
    """The provenance of an embeddings file that is there already and is to be kept."""
    if not path.exists() or (overwrite and not path.is_dir()):
        return None
    with EmbeddingStore(path) as store:
        return store.provenance


def chunk_size(prompts: int, processes: int) -> int:
    """Prompts of a chunk: as many for each process, in whole batches, so that these are those of one process."""
    each = max(1, -(-prompts // processes))
    return min(PROMPTS_PER_CHUNK, -(-each // CLIP_BATCH_SIZE) * CLIP_BATCH_SIZE)


def find_missing(
    prompts: Iterable[str], output_path: Path, existing: Provenance | None, parts: EmbeddingParts
) -> tuple[list[str], list[int]]:
    """The prompts that neither the output nor a part has, and the numbers of the parts that are there."""
    done = parts.prompts()
    if existing:
        with EmbeddingStore(output_path) as store:
            done |= set(store.prompts)
    return [prompt for prompt in prompts if prompt not in done], parts.numbers()


def in_chunks(missing: Sequence[str], there: Sequence[int], processes: int) -> dict[int, Sequence[str]]:
    """The prompts of each part that is to be made, by its number: those after the last that is there."""
    size = chunk_size(len(missing), processes)
    chunks = (missing[i : i + size] for i in range(0, len(missing), size))
    return dict(enumerate(chunks, start=max(there, default=-1) + 1))  # a discarded part leaves a gap: no counting


def encode_chunks(
    files: ModelFiles,
    plan: TextEncoderPlan,
    chunks: Mapping[int, Sequence[str]],
    parts: EmbeddingParts,
    reports: list[StageReport],
    processes: Processes,
) -> None:
    """Encodes this process' share chunk by chunk; each chunk is on disk before the next begins."""
    own = processes.share(list(chunks.items()))
    for number, chunk in tqdm(own, desc="chunks", unit="chunk", disable=len(own) < 2):
        prompt_embeds, pooled = encode_prompts(files, chunk, plan, reports)  # (N, S, D), (N, P)
        parts.add(number, chunk, prompt_embeds, pooled)


def rows_of(
    parts: EmbeddingParts, numbers: Sequence[int], existing_path: Path | None, given_up: threading.Event
) -> Iterator[PromptEmbedding]:
    """The rows of all parts, each as it comes, and then those that the file has already."""
    yield from parts.read(numbers, given_up)
    if existing_path:
        with EmbeddingStore(existing_path) as store:
            yield from store.read_all()


@contextmanager
def in_thread(work: Callable[[threading.Event], int]) -> Iterator[Future[int]]:
    """Does `work` beside what the block does, and waits for it; the event that it is given says that it need not."""
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            working = thread.submit(work, given_up)
            yield working
            working.exception()  # waits
        except BaseException:
            given_up.set()
            raise


def run(argv: Sequence[str] | None, processes: Processes) -> None:
    """The stage from top to bottom."""
    configs = parse_flags(
        (EmbeddingConfig, ModelConfig, DeviceConfig, BudgetConfig),
        argv,
        "compute_embeddings.py",
        __doc__.splitlines()[0],
    )
    config, model, device_config, budget_config = configs
    if model.is_miniature:
        say_miniature("compute_embeddings.py")
    folder, instance_prompt = default_subject(config.instance_data_dir, config.instance_prompt)
    output_path = Path(config.output_path)
    device = processes.choose_device(device_config.device)
    budget = open_budget(budget_config, device, FEW_KERNELS_BYTES)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model)

    images, left_out = processes.from_first(lambda: instance_images(folder, instance_prompt, config.recursive))
    if not budget_config.plan:
        require_writable_folder(output_path.absolute().parent)
    print(f"{len(images)} pictures in {folder}" + (f", {len(left_out)} other files left out" if left_out else ""))
    roles, image_ids = collect_prompts(config, images, instance_prompt, folder.resolve() == EXAMPLE_SUBJECT)
    identifier = report_identifier(files, instance_prompt or images[0].prompt, config.class_prompt)
    for line in identifier.sentences() if identifier else ():
        print(line)

    existing = read_existing(output_path, config.overwrite)
    plan = choose_text_encoder_plan(
        files,
        planned_device(device_config.device, device, budget_config.plan),
        budget,
        config.max_sequence_length,
        config.t5_precision,
        config.t5_stream,
        existing.precision if existing else None,
        prompts=min(len(roles), chunk_size(len(roles), processes.count)),
    )
    plan = replace(processes.gather(plan)[0], device=device)  # by the first one's GPU: all compute alike
    predicted = plan.predicted_parts(files, budget) if budget else {}
    if budget:
        print(f"T5 in {describe_t5(plan)}: {sentence(predicted)}")
    if budget_config.plan:
        return
    provenance = files.provenance(TEXT_COMPONENTS, plan.t5_precision, config.max_sequence_length)
    difference = existing.difference(provenance, "max_sequence_length") if existing else None
    if difference:
        raise UserError(
            f"{output_path} was made with {difference}: add --overwrite to replace it, or give another --output_path"
        )

    parts = EmbeddingParts(output_path, provenance)
    missing, there = processes.from_first(lambda: find_missing(roles, output_path, existing, parts))
    chunks = in_chunks(missing, there, processes.count)
    print(f"{len(roles)} prompts, {len(roles) - len(missing)} of them done before; T5 in {describe_t5(plan)}")
    reports: list[StageReport] = []

    def write(given_up: threading.Event) -> int:
        rows = rows_of(parts, [*there, *chunks], output_path if existing else None, given_up)
        return write_embeddings(output_path, provenance, with_uses(rows, roles, image_ids))

    # The first one's file grows by one chunk while the next is encoded.
    with in_thread(write if processes.is_first else lambda _: 0) as written:
        encode_chunks(files, plan, chunks, parts, reports, processes)
        processes.gather(None)  # all parts are there
    count = written.result()
    if not processes.is_first:
        return
    parts.remove()
    size_mib = output_path.stat().st_size / 1024**2
    measured = budget.used_bytes(reports) if budget else 0
    if missing and budget:
        print(compared(sum(predicted.values()), measured))
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=plan.t5_precision,
        processes=processes.count,
        plan=asdict(plan),
        predicted_parts=predicted,
        prompts=tuple(dict.fromkeys(image.prompt for image in images))[:MOST_PROMPTS],
        trigger=instance_prompt,
        max_sequence_length=config.max_sequence_length,
    )
    results = RunResults(str(output_path), reports, measured)
    RunRecord(configs, facts).save(output_path.with_suffix(".json"), results)
    print(f"wrote {output_path}: {count} prompts, {size_mib:.1f} MiB")
    print("next: " + command("precompute_latents.py", **model.flags(), instance_data_dir=config.instance_data_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(in_processes(run), argv, "--t5_precision fp16 --t5_stream")


if __name__ == "__main__":
    sys.exit(main())
