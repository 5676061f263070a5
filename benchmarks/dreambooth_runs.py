"""The benchmark's runs: a method trains on a subject with a seed, and the LoRA is judged. Processes share them.

Each process imports the libraries once, loads the miniature and the judge once, and trains in itself with the project's
scripts. Stage one is done once for each subject, for all methods and seeds.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.devices import choose_device
from sd3_lora.common.memory import GIB
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE

import torch
from dreambooth import Bench, load_bench, read_json, require_same_settings, write_json
from dreambooth_scores import COLUMNS, write_result
from dreambooth_subjects import Subject, write_pictures
from dreambooth_trainers import StageOneFiles, class_words, run_script, shared_words, stage_one_words, stored_words
from evaluate import circumstances
from judge import JUDGE_FILE

DRIFT_BEFORE = "drift_before.json"  # of the miniature without a LoRA
TRAINING_SCRIPT = "train_dreambooth_sd3_lora_miniature"
CLASS_PICTURES_TOGETHER = 25  # drawn: of a hundred four batches
LARGEST_BUDGET_GIB = 16.0  # for a process: the miniature needs a fraction


def words_for(subject: Subject, flags: str) -> list[str]:
    """Flags as typed, for a subject."""
    own = {"{class_prompt}": subject.class_prompt, "{masks}": str(subject.masks)}
    return [own.get(word, word) for word in shlex.split(flags)]


@dataclass(frozen=True)
class Method:
    """A way to train, which is told to the training script over the benchmark's own flags.

    Attributes:
        name: in the table, and of a folder.
        flags: of training, as typed; {class_prompt} and {masks} stand for the subject's.
        stage_one: flags of precompute_latents.py, likewise.
        one_prompt: whether all pictures have the instance prompt, and none its caption; the layers are then the
            script's own unless `flags` says which.
        class_images: class pictures of each subject, for prior preservation.
        class_prompts: file with their prompts, as typed; without one all have the class prompt.
    """

    name: str
    flags: str = ""
    stage_one: str = ""
    one_prompt: bool = False
    class_images: int = 0
    class_prompts: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+=,×-]+( [\w.+=,×-]+)*", self.name):
            raise UserError(f"a method's name names a folder too, and {self.name!r} cannot: use words and numbers")

    @property
    def keeps_average(self) -> bool:
        """Whether its moving average is kept, and so judged in place of the LoRA."""
        return "--use_ema" in shlex.split(self.flags)

    @property
    def is_whole(self) -> bool:
        """Whether the whole transformer is trained, and no LoRA."""
        return "--full" in shlex.split(self.flags)

    def words(self, subject: Subject) -> list[str]:
        """`flags` for a subject."""
        return words_for(subject, self.flags)

    def files(self, subject: Subject) -> StageOneFiles:
        """Stage one's, shared by all methods with the same flags of stage one."""
        words = shlex.split(self.stage_one)
        suffix = f"-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}" if words else ""
        folder = subject.folder
        pictures = f"class-{Path(self.class_prompts).stem}" if self.class_prompts else "class"
        return StageOneFiles(folder / "embeddings.parquet", folder / f"latents{suffix}", folder / pictures)

    @property
    def prompts_words(self) -> list[str]:
        """The flag of the class pictures' prompts."""
        return ["--class_prompts_file", self.class_prompts] if self.class_prompts else []


@dataclass(frozen=True)
class Point:
    """A moment of a run that is judged.

    Attributes:
        steps: that were trained until then; there is a checkpoint, or the run's end.
        is_average: whether the moving average is judged, not the LoRA itself.
    """

    steps: int
    is_average: bool = False


@dataclass(frozen=True)
class Run:
    """A method on a subject with a seed, and when it is judged."""

    method: Method
    subject: str
    seed: int
    points: tuple[Point, ...]

    def folder(self, output_dir: Path) -> Path:
        """Of its LoRA and its log."""
        return (
            output_dir / "runs" / self.method.name.replace(" ", "_") / f"{self.subject.replace(' ', '_')}-{self.seed}"
        )

    def noted(self) -> dict[str, Any]:
        """All that decides its scores beside the benchmark's settings."""
        return {"method": asdict(self.method), "points": [asdict(point) for point in self.points]}

    def result(self, output_dir: Path) -> dict[str, Any] | None:
        """Its scores; None where there are none, or of a method that has changed since."""
        found = read_json(self.folder(output_dir) / "result.json")
        if found is None:
            return None
        found["method"] = asdict(Method("none")) | found["method"]  # a field that came later has its default
        return found if {key: found[key] for key in ("method", "points")} == self.noted() else None


def prepared_subject(flags: argparse.Namespace, name: str) -> Subject:
    """A subject with the folder that all methods share."""
    return Subject(name, flags.output_dir / "subjects" / name.replace(" ", "_"))


def budget_words(flags: argparse.Namespace) -> list[str]:
    """The share of the GPU's memory that a process may plan with."""
    return ["--vram_budget_gib", str(flags.vram_budget_gib)] if flags.vram_budget_gib else []


def memory_share(device: torch.device, jobs: int) -> float | None:
    """GiB of the GPU for each of so many processes, a tenth left free; None without a GPU.

    Without it each would plan with all that is free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return min(LARGEST_BUDGET_GIB, int(90 * free / GIB / jobs) / 100)


def preparation(flags: argparse.Namespace, subject: Subject, methods: Sequence[Method]) -> list[tuple[str, list[str]]]:
    """The scripts of stage one with their flags, in order: each artefact once, whatever methods share it."""
    # flags of stage one and prompts of class pictures → a method that has them, the most class pictures
    most: dict[tuple[str, str], tuple[Method, int]] = {}
    for method in methods:
        kind = method.stage_one, method.class_prompts
        _, before = most.get(kind, (method, 0))
        most[kind] = (method, max(before, method.class_images))
    scripts = []
    for (stage_one, _), (method, class_images) in most.items():
        files, more = method.files(subject), words_for(subject, stage_one)
        found = dict(stage_one_words(flags, subject, files, class_images))
        found["precompute_latents"] += more
        if class_images:
            found["compute_embeddings"] += method.prompts_words
            found["draw_class_pictures"] += [*method.prompts_words, "--sample_batch_size", str(CLASS_PICTURES_TOGETHER)]
        scripts += found.items()
        if class_images:  # those that were drawn with other flags of stage one have no latents here
            words = [*found["precompute_latents"], *class_words(subject, files, class_images)[2:]]
            scripts.append(("precompute_latents", words))
    return list(dict.fromkeys((script, tuple(words)) for script, words in scripts))


def prepare(flags: argparse.Namespace, name: str, methods: Sequence[Method]) -> None:
    """Renders a subject's pictures and does stage one; what was done before is not done again.

    Raises:
        UserError: a script refused.
    """
    subject = prepared_subject(flags, name)
    scripts = [[script, *words] for script, words in preparation(flags, subject, methods)]
    path = subject.folder / "prepared.json"
    done = (read_json(path) or {"scripts": []})["scripts"]
    if all(words in done for words in scripts):
        return
    write_pictures(name, subject.pictures, subject.captioned, subject.masks)
    for script, *words in scripts:
        with process_settings():
            run_script(script, [*words, *budget_words(flags)], subject.folder / "log.txt", name)
    write_json(path, {"scripts": [*done, *(words for words in scripts if words not in done)]})


def training_words(flags: argparse.Namespace, run: Run) -> list[str]:
    """The training script's command line; where a flag stands twice, the last counts."""
    subject, method = prepared_subject(flags, run.subject), run.method
    files, lora = method.files(subject), run.folder(flags.output_dir) / "lora"
    words = shared_words(flags, subject, lora, has_layers=not method.one_prompt)
    words += stored_words(flags, subject.pictures if method.one_prompt else subject.captioned, files)
    if method.class_images:
        words += ["--with_prior_preservation", *class_words(subject, files, method.class_images)]
        words += ["--class_captions", *method.prompts_words] if method.class_prompts else []
    if method.is_whole:
        words = without_flags(words, ("--rank", "--lora_layers", "--lora_blocks"))
    return [*words, "--seed", str(run.seed), *budget_words(flags), *method.words(subject)]


def without_flags(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line without some flags that have a value each."""
    return [word for before, word in pairwise(["", *words]) if word not in flags and before not in flags]


@contextmanager
def process_settings() -> Iterator[None]:
    """Puts back afterwards what a script sets for its whole process, as --deterministic and --allow_tf32 do."""
    environment, cudnn, matmul = dict(os.environ), torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def carry_out(flags: argparse.Namespace, bench: Bench, run: Run) -> dict[str, Any]:
    """Trains, judges at each point, and notes the result; an interrupted training goes on from its checkpoint.

    Raises:
        UserError: the training script refused.
    """
    folder = run.folder(flags.output_dir)
    if read_json(folder / "asked.json") != run.noted():
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "asked.json", run.noted())
    start = time.perf_counter()
    with process_settings():
        run_script(TRAINING_SCRIPT, training_words(flags, run), folder / "log.txt", f"{run.subject}, {run.method.name}")
    trained = time.perf_counter()
    files = [trained_of(folder / "lora", point, flags.steps, run.method.is_whole) for point in run.points]
    scores = [{"subject": run.subject, "seed": run.seed, **bench.count(run.subject, path)} for path in files]
    times = {"training_s": round(trained - start, 2), "sampling_s": round(time.perf_counter() - trained, 2)}
    write_json(folder / "result.json", {**run.noted(), **times, "scores": scores})
    for checkpoint in (folder / "lora").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {**times, "scores": scores}


def results_of(flags: argparse.Namespace, runs: Sequence[Run]) -> list[dict[str, Any]] | None:
    """The results of some runs, in their order; None where one is missing."""
    found = [run.result(flags.output_dir) for run in runs]
    whole = [result for result in found if result is not None]
    return whole if len(whole) == len(runs) else None


def mean_times(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seconds that a run took, on average, beside all that the other processes did."""
    names = ("training_s", "sampling_s")
    return {name: round(sum(result[name] for result in results) / len(results), 2) for name in names}


def carry_out_benchmark(
    flags: argparse.Namespace,
    settings: dict[str, Any],
    measure: Callable[[], list[str]],
    parts: Callable[[], dict[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Carries out a benchmark in its output folder, and writes its result, also of what is whole where it is stopped.

    Args:
        flags: of the benchmark.
        settings: what decides the scores.
        measure: carries out what has no result yet; returns a sentence for each run that failed.
        parts: of the result, beside what all have.

    Returns:
        The result, and a sentence for each run that failed.

    Raises:
        UserError: the folder holds scores of other settings.
    """
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    require_same_settings(settings, flags.output_dir / "settings.json")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as after Ctrl-C: what is whole is written
    start = time.perf_counter()
    try:
        failures = measure()
    finally:
        signal.signal(signal.SIGTERM, before)
        result = {
            **circumstances(choose_device(flags.device)),
            "settings": settings,
            "subjects": flags.subjects,
            "seeds": flags.seeds,
            "jobs": flags.jobs,
            "elapsed_s": round(time.perf_counter() - start, 1),
            "judge": read_json(JUDGE_FILE.with_suffix(".json")),
            "drift_before": read_json(flags.output_dir / DRIFT_BEFORE),
            "columns": COLUMNS,
            **parts(),
        }
        if flags.result:
            write_result(flags.result, result)
    return result, failures


def require_none(failures: Sequence[str]) -> None:
    """Names the first of the runs that failed.

    Raises:
        UserError: there is one.
    """
    if failures:
        raise UserError(f"{len(failures)} runs failed; the first: {failures[0]}")


def trained_of(folder: Path, point: Point, last_step: int, is_whole: bool) -> Path:
    """A point's LoRA, or its transformer's folder: in the run's folder at its end, else in a checkpoint."""
    where = folder if point.steps == last_step else folder / f"checkpoint-{point.steps}"
    return where / ("transformer" if is_whole else EMA_FILE if point.is_average else LORA_FILE)


@dataclass(frozen=True)
class Task:
    """What a process does at a time: a run, or what comes before all runs.

    Attributes:
        run: to carry out; else
        subject: to prepare for these methods; else the drift of the miniature without a LoRA is measured.
        methods: of the subject.
    """

    run: Run | None = None
    subject: str | None = None
    methods: tuple[Method, ...] = ()

    def do(self, flags: argparse.Namespace, bench: Bench) -> None:
        """Does it."""
        if self.run:
            carry_out(flags, bench, self.run)
        elif self.subject:
            prepare(flags, self.subject, self.methods)
        else:
            write_json(flags.output_dir / DRIFT_BEFORE, bench.draw_drift())


class Worker:
    """What a process has loaded.

    Args:
        flags: of the benchmark.
        stopping: set when no further work is to be begun; None in a process of one's own.
    """

    def __init__(self, flags: argparse.Namespace, stopping: Event | None):
        self.flags, self.stopping = flags, stopping
        # Before anything is planned: CUDA's own memory is not measured while other processes grow theirs.
        self.bench = load_bench(flags)
        if self.bench.pipeline.device.type == "cuda":
            torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # what is loaded is never garbage, and each stage of each run collects

    def do(self, task: Task) -> tuple[Task, str | None]:
        """Does a task; returns it with the sentence of its failure, if it failed.

        Raises:
            KeyboardInterrupt: the work is to stop.
        """
        if self.stopping is not None and self.stopping.is_set():
            raise KeyboardInterrupt
        try:
            task.do(self.flags, self.bench)
        except UserError as error:
            return task, str(error)
        except Exception as error:  # of one method, which must not end those of others
            self.bench = load_bench(self.flags)  # whose transformer may have kept a LoRA
            return task, f"{type(error).__name__}: {error}"
        return task, None


_WORKER: Worker | None = None  # of this process


def start_worker(flags: argparse.Namespace, stopping: Event | None = None) -> None:
    """Makes this process one that does tasks."""
    global _WORKER
    _WORKER = Worker(flags, stopping)


def do(task: Task) -> tuple[Task, str | None]:
    """`Worker.do` of this process."""
    assert _WORKER is not None
    return _WORKER.do(task)


@contextmanager
def open_workers(flags: argparse.Namespace, jobs: int) -> Iterator[Callable[[Iterable[Task]], Iterator[Any]]]:
    """Gives a function that has tasks done, and yields each as it is finished; with one job this process does them.

    Where the block fails or is interrupted, each process ends what it does and begins no more.
    """
    if jobs <= 1:
        start_worker(flags)
        yield lambda tasks: map(do, tasks)
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported there
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # read by the new processes
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    pool = ProcessPoolExecutor(jobs, context, start_worker, (flags, stopping))

    def done(tasks: Iterable[Task]) -> Iterator[tuple[Task, str | None]]:
        for future in as_completed([pool.submit(do, task) for task in tasks]):
            yield future.result()

    try:
        yield done
    except BaseException:
        stopping.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def carry_out_all(flags: argparse.Namespace, runs: Sequence[Run], finished: Callable[[Run], None]) -> list[str]:
    """Carries out the runs that have no result yet, in their order; `finished` is told each as it ends.

    Returns:
        A sentence for each that failed.
    """
    pending = [run for run in runs if run.result(flags.output_dir) is None]
    methods: dict[str, list[Method]] = {}
    for run in pending:
        if run.method not in methods.setdefault(run.subject, []):
            methods[run.subject].append(run.method)
    first = [Task(subject=name, methods=tuple(found)) for name, found in methods.items()]
    if not (flags.output_dir / DRIFT_BEFORE).is_file():
        first.append(Task())
    if not first:
        return []
    jobs = min(flags.jobs, max(len(pending), len(first)))
    flags.vram_budget_gib = memory_share(choose_device(flags.device), jobs)
    with open_workers(flags, jobs) as done:
        for _, failure in done(first):
            if failure:
                raise UserError(failure)
        failures = []
        for task, failure in done([Task(run=run) for run in pending]):
            if failure:
                failures.append(failure)
            elif task.run:
                finished(task.run)
        return failures
