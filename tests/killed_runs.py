"""Whole commands in processes that are killed: what they are, how they are started, and what they leave.

A `Job` is a command in a folder of its own with all that it reads. A `Campaign` runs it to its end once, kills it,
types the same command again, and compares what is there with what the undisturbed run left.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import PROJECT, PROMPT, TRAINING_SCRIPT, save_pictures
from PIL import Image
from safetensors.torch import save_file

CLASS_PROMPT = "a photo of a robot"
GROWING = (".jsonl", "sheet.webp")
TIMED = ("report.html", "README.md", "run.json")  # they tell the time, to the minute some of them
# What is left on the terminal where memory runs out in compiled code, or in Python's start of a thread.
DIED = re.compile(r"memory allocation of \d+ bytes failed|alloc::|thread started by|terminate called")
_WITHOUT_DEVICE = ("sd3_lora.report", "sd3_lora.export", "sd3_lora.merge", "sd3_lora.convert")
_SETTINGS = {
    "compute_embeddings": {"compute_embeddings.PROMPTS_PER_CHUNK": 3},
    "sd3_lora.convert": {"sd3_lora.common.single_file._SHARD_BYTES": 50_000},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal; None where it hung and was killed for it.
        elapsed_s: its seconds.
        log: what it printed.
        memory: bytes that it had allocated at most, beside what it began with.
    """

    code: int | None
    elapsed_s: float
    log: str
    memory: int = 0


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: of the job.
        module: whose `main` it is.
        words: its arguments, with paths in its folder.
        start: the folder that it begins with.
        settings: of modules, which make it write in more pieces than the tiny model needs.
        refuses: what it says instead of doing its work again, with exit code 2.
        grows: parts of the names of files that are whole more than once, with more in them each time.
    """

    name: str
    module: str
    words: Sequence[str]
    start: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    grows: tuple[str, ...] = GROWING
    refuses: str = ""

    def ended_well(self, ended: Ended) -> bool:
        """Whether it came to its end, or said that it had done so before."""
        return ended.code == 0 or bool(ended.code == 2 and self.refuses and self.refuses in ended.log)


class ForkServer:
    """Starts scripts in processes forked from one that has imported them (`fork_server.py`), in tenths of a second."""

    def __init__(self, scratch: Path):
        words = [sys.executable, str(PROJECT / "tests" / "fork_server.py")]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=scratch)

    def run(self, job: Job, folder: Path, kill: Mapping[str, Any] | None = None, **more: Any) -> Ended:
        """Runs a job in a folder.

        Args:
            job: to run.
            folder: where.
            kill: {"after_s": …}, {"operation": …} or {"write": bytes of a file} to kill it; {"limit": bytes of a file}
                for a disk that takes no larger one; {"memory": bytes} for a host that has no more.
            more: of the order.
        """
        return self.run_at_once([(job, folder)], kill, **more)[0]

    def run_at_once(
        self, jobs: Sequence[tuple[Job, Path]], kill: Mapping[str, Any] | None = None, **more: Any
    ) -> list[Ended]:
        """Runs several at the same time."""
        orders = []
        for job, folder in jobs:
            order = {"module": job.module, "words": list(job.words), "settings": dict(job.settings)}
            orders.append({**order, "folder": str(folder), "kill": dict(kill or {}), **more})
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server ended"
        return [Ended(*each) for each in json.loads(answer)]

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path; an empty folder has a slash behind its name."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


@dataclass(frozen=True)
class Undisturbed:
    """What a job leaves where nothing disturbs it.

    Attributes:
        start: what was there before.
        end: what is there in the end.
        same: the files of `end` whose bytes are the same in every run; the others hold times.
        seconds: that it takes.
        operations: file operations that it takes.
        largest: bytes of the largest file that it writes.
        memory: bytes that it allocates at most.
    """

    start: Mapping[str, bytes]
    end: Mapping[str, bytes]
    same: frozenset[str]
    seconds: float
    operations: int
    largest: int
    memory: int


def mount(*words: object) -> None:
    """`mount` with these words.

    Raises:
        CalledProcessError: it is not allowed here.
    """
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk in memory of so many bytes at a folder."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount disks."""
    try:
        with mounted(folder, 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class Campaign:
    """Kills of one job, and what must be there after the same command was typed again.

    Args:
        server: starts it.
        job: the job.
        scratch: a folder for its runs.
    """

    def __init__(self, server: ForkServer, job: Job, scratch: Path):
        self.server, self.job, self.scratch = server, job, scratch
        self.undisturbed = self._run_undisturbed()

    def _fresh(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.job.start, folder))

    def _run_undisturbed(self) -> Undisturbed:
        ends, seconds, memory, count_path = [], 0.0, 0, self.scratch / "operations"
        for name in ("one", "two"):
            folder = self._fresh(name)
            more = {"count_path": str(count_path)} if name == "one" else {}
            ended = self.server.run(self.job, folder, **more)
            assert ended.code == 0, ended.log
            seconds, memory = ended.elapsed_s, max(memory, ended.memory)
            ends.append(tree(folder))
        one, two = ends
        assert one.keys() == two.keys()
        start = tree(self.job.start)
        same = frozenset(name for name in one if one[name] == two[name] and not name.endswith(TIMED))
        largest = max((len(content) for name, content in one.items() if content != start.get(name)), default=1)
        return Undisturbed(start, one, same, seconds, int(count_path.read_text()), largest, memory)

    def kill(self, chance: random.Random, folder: Path) -> tuple[str, bool]:
        """Starts it and kills it; returns how, and whether it did not come to its end before."""
        known = self.undisturbed
        ways: list[dict[str, Any]] = [
            {"after_s": round(chance.uniform(0, known.seconds), 3)},
            {"operation": chance.randint(1, known.operations)},
            {"write": int(known.largest ** chance.random())},
        ]
        way = chance.choices(ways, [2, 3, 1])[0]
        ended = self.server.run(self.job, folder, way)
        killed = ended.code in (-signal.SIGKILL, -signal.SIGXFSZ)
        assert killed or self.job.ended_well(ended), f"{way}: {ended}"
        self._require_no_partial(folder, str(way))
        return f"{way} -> {ended.code}", killed

    def _require_no_partial(self, folder: Path, way: str) -> None:
        """Whatever has a final name is what it was, or what it will be."""
        known = self.undisturbed
        for name, content in tree(folder).items():
            if name in known.same and not any(part.startswith(".") for part in Path(name).parts):
                whole = (known.start.get(name), known.end[name])
                assert any(part in name for part in self.job.grows) or content in whole, (
                    f"{way}: {name} is there in part"
                )

    def finish(self, folder: Path, ways: Sequence[str], may_lack: str | None = None) -> None:
        """Types the same command again, to its end; what was given up with a note may be missing then."""
        known, ended = self.undisturbed, self.server.run(self.job, folder)
        story = f"{self.job.name}: {'; '.join(ways)}\n{ended.log[-3000:]}"
        assert self.job.ended_well(ended), f"exit code {ended.code}: {story}"
        after = tree(folder)
        left, missing = sorted(after.keys() - known.end.keys()), sorted(known.end.keys() - after.keys())
        if may_lack is not None:
            missing = [name for name in missing if may_lack not in name]
        assert not left, f"{left} left for good, {missing} missing: {story}"
        assert not missing, f"{missing} missing: {story}"
        other = {name for name in known.same & after.keys() if after[name] != known.end[name]}
        assert not other, f"other bytes in {sorted(other)}: {story}"
        for name in after.keys() - known.same:
            if name.endswith(".json"):
                json.loads(after[name])

    def fill(self, folder: Path, limit: Mapping[str, Any] | None = None) -> Ended:
        """Runs it where the disk is full: one sentence, and what has a final name is whole."""
        ended = self.server.run(self.job, folder, limit)
        story = f"{self.job.name}, {limit}: {ended.code}\n{ended.log[-3000:]}"
        assert "Traceback" not in ended.log, story
        last = ended.log.splitlines()[-1]
        if ended.code == 0:  # what the result does not need costs a note; on a small disk there was room
            assert "note: " in ended.log or limit is None, story
        else:
            assert ended.code == 2, story
            assert last.startswith("error: "), story
            assert ended.log.count("error: ") == 1, story
        self._require_no_partial(folder, story)
        left = [name for name in tree(folder) if name.endswith(".unfinished")]
        assert not left, f"{left} left: {story}"
        return ended

    def on_small_disk(self, folder: Path, room: float) -> None:
        """Runs it on a disk of its own with room for a part of what it writes, then with room for all, and compares.

        Args:
            folder: to mount the disk on.
            room: the part.
        """
        known = self.undisturbed
        before, after = (
            sum(-(-len(content) // 4096) for content in each.values()) for each in (known.start, known.end)
        )
        with mounted(folder, 4096 * (before + int(room * max(0, after - before)))):
            shutil.copytree(self.job.start, folder, dirs_exist_ok=True)
            self.fill(folder)
            mount("-o", "remount,size=1G", folder)
            self.finish(folder, [f"a disk with room for {room:.2f} of it"])

    def on_read_only_disk(self, folder: Path) -> None:
        """Runs it on a disk that can only be read: one sentence, and nothing has changed; then it can be written."""
        with mounted(folder, 1 << 30):
            shutil.copytree(self.job.start, folder, dirs_exist_ok=True)
            mount("-o", "remount,ro", folder)
            ended = self.server.run(self.job, folder)
            assert ended.code == 2, ended.log
            assert "Traceback" not in ended.log
            assert ended.log.splitlines()[-1].startswith("error: "), ended.log
            assert tree(folder) == self.undisturbed.start
            mount("-o", "remount,rw", folder)
            self.finish(folder, ["a disk that could only be read"])

    def after_full_disk(self, limit: int) -> Ended:
        """Fills the disk, makes room, types the command again, and compares."""
        folder = self._fresh("full")
        ended = self.fill(folder, {"limit": limit})
        self.finish(folder, [f"a limit of {limit}: {ended.log[-500:]}"])
        return ended

    def within_memory(self, share: float) -> Ended:
        """Runs it on a host that has a part of the memory that it needs, then on one that has enough, and compares.

        Args:
            share: the part.
        """
        folder, limit = self._fresh("short"), int(share * self.undisturbed.memory)
        ended = self.server.run(self.job, folder, {"memory": limit, "after_s": 20})
        story = f"{self.job.name}, {limit} bytes: {ended.code}\n{ended.log[-3000:]}"
        assert "Traceback" not in ended.log, story
        died = ended.code is None or ended.code < 0  # by a compiled library, or it waits for a thread that never began
        if died:
            assert ended.code in (None, -signal.SIGKILL) or DIED.search(ended.log), story
        elif ended.code != 0:
            last = ended.log.splitlines()[-1]
            assert ended.code == 2, story
            assert len(re.findall("^error: ", ended.log, re.MULTILINE)) == 1, story
            assert last.startswith("error: the host's memory ran out ("), story
            assert last.count("memory ran out") == 1, story
        self._require_no_partial(folder, story)
        left = [name for name in tree(folder) if name.endswith(".unfinished")]
        assert died or not left, f"{left} left: {story}"
        self.finish(folder, [story], "samples/" if "note: the pictures of step" in ended.log else None)
        return ended

    def after_kills(self, chance: random.Random, kills: int) -> int:
        """Kills it some times in a row, types the command again, and compares; returns how often it was killed."""
        folder = self._fresh("killed")
        ways, killed = zip(*(self.kill(chance, folder) for _ in range(kills)), strict=True)
        self.finish(folder, ways)
        return sum(killed)


class Jobs:
    """All jobs on the tiny model: each stage, each writer. What one begins with is made when it is asked for.

    Args:
        server: that makes it.
        model: the tiny model's folder.
        folder: for what they begin with.

    Attributes:
        NAMES: of the jobs that are killed; others make what these begin with.
    """

    NAMES = (
        *("embeddings", "more embeddings", "latents", "latents again", "class pictures"),
        *("training", "training of all kinds", "full", "drawing", "losses", "report", "export", "merge", "convert"),
    )

    def __init__(self, server: ForkServer, model: Path, folder: Path):
        self.server, self.model, self.folder = server, model, folder
        self._shared = ["--device", "cpu", "--pretrained_model_name_or_path", model]
        pictures = ["--instance_data_dir", "pictures", "--instance_prompt", PROMPT]
        crops = ["--use_aspect_ratio_bucket", "--random_flip", "--num_crops", 1]
        text = [*pictures, "--max_sequence_length", 20, "--class_prompt", CLASS_PROMPT]
        text += ["--validation_prompt", "a robot in a forest", "a robot", "a robot on a hill"]
        latents = [*pictures[:2], *crops, "--mask_data_dir", "masks"]
        robots = ["--class_prompt", CLASS_PROMPT, "--class_data_dir", "robots", "--num_class_images"]
        draws = ["--sample_batch_size", 2, "--num_steps", 2, "--resolution", 64]
        steps = [*pictures, *crops, "--seed", 0, "--data_df_path", "sample_embeddings.parquet", "--report_to", "none"]
        steps += ["--output_dir", "out", "--max_train_steps", 4, "--checkpointing_steps", 2]
        steps += ["--resume_from_checkpoint", "latest"]
        validates = ["--validation_prompt", "a robot", "--validation_num_steps", 1, "--validation_guidance", 1]
        lora = [*validates, "--validation_steps", 2, "--early_warning_steps", 2, "--use_ema", "--lora_dropout", 0.1]
        lora += ["--save_every_n_steps", 3, "--export", "kohya", "--masked_loss"]
        kinds = [
            "--with_prior_preservation",
            *robots,
            7,
            "--train_text_encoder",
            "--use_ema",
            "--checkpoints_total_limit",
            1,
        ]
        kinds += ["--train_identifier_embedding", "sks"]
        full = [*validates, "--full", "--learning_rate", 1e-3]
        pictured = [
            "--lora",
            "out",
            "--prompt",
            "a robot",
            "a robot in a forest",
            "--num_images",
            2,
            "--num_steps",
            2,
            "--batch_size",
            2,
        ]
        pictured += ["--height", 64, "--width", 64, "--max_sequence_length", 20]
        losses = ["--data_df_path", "sample_embeddings.parquet", "--lora", "out", "--noise_levels", 2, *crops]
        again = [*latents, "--overwrite", "--vae_precision", "bf16", "--class_data_dir", "robots"]
        base = ["--pretrained_model_name_or_path", model]
        # name → the module, what it begins with, and its words behind those that all share
        self._known: dict[str, tuple[str, str, list[Any]]] = {
            "embeddings": ("compute_embeddings", "subject", text),
            "more embeddings": ("compute_embeddings", "embedded", [*text, "a robot at sea", "a robot at home"]),
            "latents": ("precompute_latents", "subject", latents),
            "latents again": ("precompute_latents", "ready", again),
            "class pictures": ("draw_class_pictures", "embedded", [*robots, 5, *draws]),
            "wide class pictures": (
                "draw_class_pictures",
                "ready",
                [*robots, 6, *draws, "--width", 80, "--height", 48],
            ),
            "tall class pictures": (
                "draw_class_pictures",
                "ready",
                [*robots, 7, *draws, "--width", 48, "--height", 64],
            ),
            "class latents": ("precompute_latents", "ready", [*latents, "--class_data_dir", "robots"]),
            "training": (TRAINING_SCRIPT, "ready", [*steps, *lora]),
            "training of all kinds": (TRAINING_SCRIPT, "with class pictures", [*steps, *kinds]),
            "full": (TRAINING_SCRIPT, "ready", [*steps, *full]),
            "drawing": ("inference", "trained", pictured),
            "losses": ("sd3_lora.losses", "trained", losses),
            "report": ("sd3_lora.report", "trained", ["out"]),
            "export": ("sd3_lora.export", "trained", ["out", "--format", "a1111", *base]),
            "merge": ("sd3_lora.merge", "trained", ["out", "--output_dir", "merged", "--copy", *base]),
            "convert": ("sd3_lora.convert", "single", ["sd3.safetensors", "--parts", model]),
        }
        # what a folder begins as, and the jobs that have run in it
        self._folders: dict[str, tuple[str, tuple[str, ...]]] = {
            "embedded": ("subject", ("embeddings",)),
            "ready": ("embedded", ("class pictures", "latents")),
            "with class pictures": ("ready", ("wide class pictures", "tall class pictures", "class latents")),
            "trained": ("ready", ("training",)),
        }

    def job(self, name: str) -> Job:
        """A job, with the folder that it begins with."""
        module, start, words = self._known[name]
        shared = [] if module in _WITHOUT_DEVICE else self._shared
        typed = [str(word) for word in (*words, *shared)]
        refuses = "there already" if name in ("merge", "convert") else ""
        grows = ("latents/",) if "--mask_data_dir" in typed else ()
        return Job(name, module, typed, self._start(start), _SETTINGS.get(module, {}), (*GROWING, *grows), refuses)

    def _start(self, name: str) -> Path:
        folder = self.folder / name
        if folder.exists():
            return folder
        if name == "subject":
            self._make_subject(folder)
        elif name == "single":
            sys.path.append(str(PROJECT / "tests" / "common"))
            from test_single_file import single_tensors

            folder.mkdir()
            save_file(single_tensors(self.model), folder / "sd3.safetensors")
        else:
            before, jobs = self._folders[name]
            shutil.copytree(self._start(before), folder)
            for each in jobs:
                ended = self.server.run(self.job(each), folder)
                assert ended.code == 0, ended.log
        return folder

    def _make_subject(self, folder: Path) -> None:
        save_pictures(folder / "pictures", [(96, 64), (64, 64), (64, 90), (70, 64)])
        save_pictures(folder / "robots", [(64, 64)], seed=1)
        (folder / "masks").mkdir()
        for path in (folder / "pictures").iterdir():
            with Image.open(path) as picture:
                picture.convert("L").save(folder / "masks" / path.name)
