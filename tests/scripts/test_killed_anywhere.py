"""Scripts that are killed anywhere and started again, two of them at once in one place, disks and hosts without room.

Under the marker `faults` there are 300 kills, full disks, and too little memory, over all jobs; else a dozen over some.
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.run_locks import reading_in, require_unread, writing, writing_in
from sd3_lora.stage_one.embedding_store import EmbeddingStore

import pytest
from killed_runs import Campaign, ForkServer, Job, Jobs, can_mount, tree

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and has limits on files")

KILLS = 300
QUICK = ("latents", "class pictures", "training")  # the others take longer, or are much like one of these


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def jobs(server: ForkServer, tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(server, tiny_sd3, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def campaign(server: ForkServer, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Campaign]:
    """`campaign("training")` is that job, once it has run undisturbed."""
    return lru_cache(None)(lambda name: Campaign(server, jobs.job(name), tmp_path_factory.mktemp("campaign")))


def kill_often(campaign: Campaign, kills: int) -> int:
    """Kills a job so many times, up to three times in a row, with the same command to its end after each row."""
    chance, killed = random.Random(campaign.job.name), 0
    while killed < kills:
        killed += campaign.after_kills(chance, min(chance.choice((1, 1, 2, 3)), kills - killed))
    return killed


@pytest.mark.parametrize("name", QUICK)
def test_the_same_command_again_ends_as_if_nothing_had_been(campaign: Callable[[str], Campaign], name: str) -> None:
    campaign(name).after_kills(random.Random(name), 4)


LEFT_OUT = {
    "training": ["out/README.md", "out/run.json", "out/report.html", "out/samples/step_000004/00_a-robot_00.png"],
    "drawing": ["images/001_a-robot-in-a-forest/img_01.png", "images/run.json"],
}


@pytest.mark.parametrize("name", ["training", pytest.param("drawing", marks=pytest.mark.faults)])
def test_what_a_kill_at_the_end_leaves_out_is_made(
    server: ForkServer, campaign: Callable[[str], Campaign], tmp_path: Path, name: str
) -> None:
    """After its last checkpoint a training still draws, and writes its card, its record and its report.

    One picture of a batch is drawn again with the others, for the same bits.
    """
    known = campaign(name)
    folder = fresh(known.job, tmp_path)
    assert server.run(known.job, folder).code == 0
    for path in LEFT_OUT[name]:
        (folder / path).unlink()
    known.finish(folder, LEFT_OUT[name])


@pytest.mark.faults
@pytest.mark.parametrize("name", Jobs.NAMES)
def test_300_kills(campaign: Callable[[str], Campaign], name: str) -> None:
    kill_often(campaign(name), -(-KILLS // len(Jobs.NAMES)))


# Two at once


def fresh(job: Job, folder: Path) -> Path:
    return Path(shutil.copytree(job.start, folder / "at-once"))


def test_two_embed_other_prompts_into_one_file(server: ForkServer, jobs: Jobs, tmp_path: Path) -> None:
    """None of the rows is lost, and none waits for what the other has removed."""
    job = jobs.job("embeddings")
    other = replace(job, words=[*job.words, "--negative_prompt", "a blurred picture"])
    folder = fresh(job, tmp_path)
    ended = server.run_at_once([(job, folder), (other, folder)])
    assert [each.code for each in ended] == [0, 0], ended
    with EmbeddingStore(folder / "sample_embeddings.parquet") as store:
        assert {"a blurred picture", "a robot", "a robot on a hill", ""} <= set(store.prompts)
    assert sum("waiting for its end" in each.log for each in ended) == 1
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["latents", pytest.param("class pictures", marks=pytest.mark.faults)])
def test_two_fill_one_folder(
    server: ForkServer, campaign: Callable[[str], Campaign], tmp_path: Path, name: str
) -> None:
    """The second finds what the first has made."""
    job, alone = campaign(name).job, campaign(name).undisturbed
    folder = fresh(job, tmp_path)
    ended = server.run_at_once([(job, folder), (job, folder)])
    assert [each.code for each in ended] == [0, 0], ended
    after = tree(folder)
    assert after.keys() == alone.end.keys()
    assert all(after[path] == alone.end[path] for path in alone.same)


def test_of_two_trainings_in_one_folder_one_is_refused(server: ForkServer, jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.job("training")
    folder = fresh(job, tmp_path)
    ended = sorted(server.run_at_once([(job, folder), (job, folder)]), key=lambda each: each.code or 0)
    assert [each.code for each in ended] == [0, 2], ended
    sentence = "another run is training in out: wait for its end, or give another --output_dir"
    assert ended[1].log.splitlines()[-1] == f"error: {sentence}"
    assert len((folder / "out" / "losses.jsonl").read_text().splitlines()) == 4


def test_training_waits_for_a_writer_of_its_cache(server: ForkServer, jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.job("training")
    folder, held = fresh(job, tmp_path), threading.Event()

    def write() -> None:
        with writing(folder / "sample_embeddings.parquet"), writing_in(folder / "latents"):
            held.set()
            time.sleep(0.5)

    writer = threading.Thread(target=write)
    writer.start()
    held.wait()
    ended = server.run(job, folder)
    writer.join()
    assert ended.code == 0, ended.log
    assert ended.log.count("is being written by another run: waiting for its end") == 1
    assert ended.log.index("waiting for its end") < ended.log.index("load transformer")


def test_what_training_reads_is_not_deleted_meanwhile(server: ForkServer, jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.job("latents again")
    folder = fresh(job, tmp_path)
    before = tree(folder)
    with reading_in(folder / "latents"):
        ended = server.run(job, folder)
    assert ended.code == 2, ended.log
    assert "error: a run that goes on reads latents, where --overwrite would delete latents: wait" in ended.log
    assert tree(folder) == before
    assert server.run(job, folder).code == 0


# The disk


def test_a_disk_that_takes_no_more(campaign: Callable[[str], Campaign]) -> None:
    """One sentence; nothing is there in part; with room the same command goes on."""
    known = campaign("export")
    ended = known.after_full_disk(known.undisturbed.largest // 4)
    assert "does not take so large a file: lift it" in ended.log.splitlines()[-1]


def test_training_says_what_a_full_disk_has_left(campaign: Callable[[str], Campaign], tmp_path: Path) -> None:
    training = campaign("training")
    folder = fresh(training.job, tmp_path)
    state = len(training.undisturbed.end["out/checkpoint-2/state.safetensors"])
    ended = training.fill(folder, {"limit": state - 1})
    assert "; no step was kept; to start again, type `python train_dreambooth" in ended.log


@pytest.mark.faults
@pytest.mark.parametrize("name", Jobs.NAMES)
def test_a_disk_that_takes_no_more_of_any_file(campaign: Callable[[str], Campaign], name: str) -> None:
    known = campaign(name)
    written = [
        content for path, content in known.undisturbed.end.items() if known.undisturbed.start.get(path) != content
    ]
    sizes = sorted({len(content) for content in written if content}) or [1]
    for limit in {0, sizes[0] // 2, *(size - 1 for size in sizes[:: max(1, len(sizes) // 4)])}:
        known.after_full_disk(limit)


@pytest.mark.faults
@pytest.mark.parametrize("name", Jobs.NAMES)
def test_a_small_disk_and_one_that_can_only_be_read(
    campaign: Callable[[str], Campaign], tmp_path: Path, name: str
) -> None:
    if not can_mount(tmp_path / "disk"):
        pytest.skip("no disk may be mounted here")
    known = campaign(name)
    known.on_read_only_disk(tmp_path / "disk")
    for room in (0.05, 0.4, 0.8):
        known.on_small_disk(tmp_path / "disk", room)


# The host's memory


def test_a_host_with_too_little_memory(campaign: Callable[[str], Campaign]) -> None:
    assert campaign("latents").within_memory(0.3).code != 0


@pytest.mark.faults
@pytest.mark.parametrize("name", Jobs.NAMES)
def test_hosts_with_too_little_memory(campaign: Callable[[str], Campaign], name: str) -> None:
    chance = random.Random(name)
    for _ in range(3):
        campaign(name).within_memory(chance.uniform(0.2, 1))


# The locks


def test_a_lock_is_free_once_its_block_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with writing_in(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(UserError, match=r"^taken$"):
            in_thread(lambda: enter(folder))
    assert not (tmp_path / "a").exists()  # it was made for the lock alone
    enter(folder)


def test_what_a_killed_run_left_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".reading-0123abcd.lock").touch()
    (tmp_path / ".a.json.4194305.unfinished").touch()  # no process has this number
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".checkpoint-3.old.4194305.unfinished").mkdir()
    (tmp_path / ".b.json.1.unfinished").touch()  # this one runs
    with writing_in(tmp_path):
        require_unread(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".b.json.1.unfinished", ".lock", "below"]


def test_readers_do_not_exclude_each_other(tmp_path: Path) -> None:
    with reading_in(tmp_path), reading_in(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(UserError, match="a run that goes on reads"):
            require_unread(tmp_path)
    assert not list(tmp_path.iterdir())


def enter(folder: Path) -> None:
    with writing_in(folder, "taken"):
        pass


def in_thread(work: object) -> None:
    """As another run: the same thread would be told that it waits for itself."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
