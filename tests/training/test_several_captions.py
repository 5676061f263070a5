"""Several captions, repeats and concepts in training: which caption comes when, and exact resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.draws import DataOrder
from sd3_lora.training.pool import Pool
from sd3_lora.transformer.lora import LORA_FILE

import pytest
from conftest import Prepared, Result, save_pictures
from training_runs import Flags, Script, same_lora, train

CAPTIONS = ["sks dog, sea, sand", "sks dog, snow"]


def image(number: int, captions: int = 1, repeats: int = 1) -> InstanceImage:
    prompts = tuple(f"{number}-{caption}" for caption in range(captions))
    return InstanceImage(f"{number:04d}", Path("a.png"), prompts[0], other_prompts=prompts[1:], repeats=repeats)


def test_captions_come_in_turn_and_go_on_after_a_checkpoint() -> None:
    pools = [Pool([image(0, 3), image(1), image(2, 2)])]
    order, prompts = DataOrder(pools, 5), {number: list[int]() for number in range(3)}
    for _ in range(6):
        indices = order.take(3)
        for index, turn in zip(indices, order.turns(indices), strict=True):
            prompts[index].append(turn)
    assert prompts == {number: list(range(6)) for number in range(3)}
    resumed = DataOrder(pools, 5)
    resumed.load_state_dict(order.state_dict())
    for _ in range(4):
        indices = order.take(2)
        assert resumed.take(2) == indices
        assert resumed.turns(indices) == order.turns(indices)


def test_a_data_set_with_one_caption_each_has_no_turns() -> None:
    """So that its checkpoints are those of earlier builds."""
    order = DataOrder([Pool([image(0), image(1)])], 5)
    assert order.turns(order.take(2)) == [0, 0]
    assert "turns" not in order.state_dict()


def test_pictures_with_repeats_of_their_own_come_as_often() -> None:
    pool = Pool([image(0, repeats=3), image(1), image(2, repeats=2)], repeats=2)
    assert pool.pass_length == len(pool.places) == 12
    assert Counter(DataOrder([pool], 0).take(24)) == {0: 12, 1: 4, 2: 8}


def test_equal_repeats_are_those_of_the_pool() -> None:
    images = [image(number) for number in range(5)]
    repeated = [image(number, repeats=3) for number in range(5)]
    assert DataOrder([Pool(images, repeats=3)], 4).take(40) == DataOrder([Pool(repeated)], 4).take(40)


def shared(model: Path) -> list[object]:
    return ["--pretrained_model_name_or_path", model, "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures, of which one has two captions."""
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "d", [(64, 64), (64, 64), (64, 64)])
    (tmp_path / "d/00.txt").write_text("\n".join(CAPTIONS))
    return tmp_path / "d"


@pytest.fixture
def stage_one(folder: Path, tiny_sd3: Path, script: Script) -> Callable[..., Flags]:
    """Runs both scripts with some flags; the flags of training are the same."""

    def call(*words: object) -> Flags:
        for name in ("compute_embeddings", "precompute_latents"):
            result = script(name, *shared(tiny_sd3), *words)
            assert result.code == 0, result.err
        return Flags([*shared(tiny_sd3), *words, "--report_to", "none", "--seed", 3])

    return call


def seen_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the prompt of each picture that training takes."""
    seen: list[str] = []
    original = TrainingData.prompts_of

    def prompts_of(self: TrainingData, *words: Any) -> tuple[str, ...]:
        prompts = original(self, *words)
        seen.extend(prompts)
        return prompts

    monkeypatch.setattr(TrainingData, "prompts_of", prompts_of)
    return seen


FOLDER = ["--instance_data_dir", "d", "--instance_prompt", "a photo of sks dog"]


def test_captions_are_trained_on_in_turn_with_and_without_the_folder(
    script: Script, stage_one: Callable[..., Flags], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = stage_one(*FOLDER)
    seen = seen_prompts(monkeypatch)
    words = ["--max_train_steps", 6, "--train_batch_size", 2]
    run = train(script, flags, tmp_path / "lora", *words)
    assert Counter(seen) == {CAPTIONS[0]: 2, CAPTIONS[1]: 2, "a photo of sks dog": 8}
    without = Flags([word for word in flags.flags if word not in FOLDER])
    again = train(script, without, tmp_path / "without", *words)
    left, right = (json.loads((each.folder / "run.json").read_text()) for each in (run, again))
    assert left["identity"] == right["identity"]
    assert left["prompts"] == right["prompts"]
    assert run.losses == again.losses


@pytest.mark.parametrize("words", [[], ["--caption_dropout", 0.5], ["--repeats", 2, "--train_batch_size", 2]])
def test_resume_is_exact(script: Script, stage_one: Callable[..., Flags], tmp_path: Path, words: list[object]) -> None:
    flags = stage_one(*FOLDER, "--shuffle_tags", 3, "--keep_tags", 1)
    run = [*words, "--lora_dropout", 0.2, "--learning_rate", 0.01, "--checkpointing_steps", 5]
    whole = train(script, flags, tmp_path / "whole", *run, "--max_train_steps", 9)
    train(script, flags, tmp_path / "part", *run, "--max_train_steps", 5)
    again = ["--max_train_steps", 9, "--resume_from_checkpoint", "latest"]
    train(script, flags, tmp_path / "part", *run, *again)
    assert same_lora(whole.folder / LORA_FILE, tmp_path / "part" / LORA_FILE)
    for name in ("state.safetensors", "state.json", "pictures.json"):
        pair = [(root / "checkpoint-9" / name).read_bytes() for root in (whole.folder, tmp_path / "part")]
        assert pair[0] == pair[1]


def test_without_dropout_nothing_is_drawn(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    runs = [train(script, prepared, tmp_path / str(len(w)), *w) for w in (["--caption_dropout", 0.0], [])]
    assert runs[0].losses == runs[1].losses


def test_what_a_resumed_command_changes_is_told(
    script: Script, stage_one: Callable[..., Flags], folder: Path, tmp_path: Path
) -> None:
    flags = stage_one(*FOLDER)
    train(script, flags, tmp_path / "lora")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    run = train(script, flags, tmp_path / "lora", *resume, "--repeats", 2, code=2)
    assert "was trained with other repeats of 00.png, 01.png, 02.png: give the repeats of then (--rep" in run.error
    run = train(script, flags, tmp_path / "lora", *resume, "--caption_dropout", 0.1, code=2)
    assert "type --caption_dropout 0.0" in run.error
    (folder / "00.txt").write_text(CAPTIONS[0])
    run = train(script, flags, tmp_path / "lora", *resume, code=2)
    assert "was trained with another caption of 00.png" in run.error


def test_dropped_captions_are_the_cached_empty_prompt(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence and pooled together."""
    batches = []
    original = TrainingData.batch

    def batch(self: TrainingData, *words: Any) -> Any:
        batches.append(original(self, *words))
        return batches[-1]

    seen = seen_prompts(monkeypatch)
    monkeypatch.setattr(TrainingData, "batch", batch)
    train(script, prepared, tmp_path / "half", "--caption_dropout", 0.5, "--max_train_steps", 12)
    assert 2 <= seen.count("") <= 10
    with EmbeddingStore(prepared.embeddings) as store:
        for prompt, made in zip(seen, batches, strict=True):
            row = store.read(prompt)
            assert made.prompt_embeds[0].equal(row.prompt_embeds)
            assert made.pooled_prompt_embeds[0].equal(row.pooled_prompt_embeds)
    identity = json.loads((tmp_path / "half/run.json").read_text())["identity"]
    assert identity["--caption_dropout"] == 0.5


def concepts(tmp_path: Path) -> list[object]:
    save_pictures(tmp_path / "cat", [(64, 64)], seed=9)
    entries = [
        {"instance_prompt": "a photo of sks dog", "instance_data_dir": "d"},
        {"instance_prompt": "a photo of zwx cat", "instance_data_dir": "cat", "repeats": 3, "class_prompt": "a cat"},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    return ["--concepts_list", "concepts.json"]


def test_concepts(
    script: Script, stage_one: Callable[..., Flags], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = stage_one(*concepts(tmp_path))
    with EmbeddingStore(Path("sample_embeddings.parquet")) as store:
        assert store.prompts_with_role("class") == ("a cat",)
    seen = seen_prompts(monkeypatch)
    run = train(script, flags, tmp_path / "lora", "--num_train_epochs", 2, "--max_train_steps", 12)
    assert Counter(seen)["a photo of zwx cat"] == 6
    record = json.loads((run.folder / "run.json").read_text())
    assert set(record["prompts"]) == {*CAPTIONS, "a photo of sks dog", "a photo of zwx cat"}
    assert record["trigger"] == "a photo of sks dog"  # of two pictures


def test_repeats_from_folders(
    script: Script, stage_one: Callable[..., Flags], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    Path("d").rename("root/3_sks dog")
    flags = stage_one("--instance_data_dir", "root", "--repeats_from_folders")
    seen = seen_prompts(monkeypatch)
    train(script, flags, tmp_path / "lora", "--max_train_steps", 9)
    assert Counter(seen)["sks dog"] == 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--caption_prefix", "art of"], {"art of sks dog, sea, sand", "art of sks dog, snow", "a photo of sks dog"}),
        (["--caption_suffix", ", oil"], {"sks dog, sea, sand, oil", "sks dog, snow, oil", "a photo of sks dog"}),
        (["--shuffle_tags", "--keep_tags", 1], {*CAPTIONS, "sks dog, sand, sea", "a photo of sks dog"}),
        (["--use_filename_as_label"], {"zwx", "ohw", "sks robot"}),
        (["--trigger_word", "zwx", "--caption_prefix", "[trigger]:"], {f"zwx: {c}" for c in CAPTIONS} | {FOLDER[3]}),
    ],
)
def test_captions_as_flags_say(
    script: Script,
    stage_one: Callable[..., Flags],
    folder: Path,
    tmp_path: Path,
    words: list[object],
    expected: set[str],
) -> None:
    if "--use_filename_as_label" in words:
        for old, new in (("00", "zwx_1"), ("01", "ohw"), ("02", "sks_robot (3)")):
            (folder / f"{old}.png").rename(folder / f"{new}.png")
    run = train(script, stage_one(*FOLDER, *words), tmp_path / "lora")
    assert set(json.loads((run.folder / "run.json").read_text())["prompts"]) == expected


def test_txt_as_label_refuses_a_picture_without_one(
    script: Script, stage_one: Callable[..., Flags], folder: Path, tmp_path: Path
) -> None:
    flags = stage_one(*FOLDER)
    run = train(script, flags, tmp_path / "lora", "--use_txt_as_label", code=2)
    assert "there is no .txt beside d/01.png, d/02.png: write it, or leave out --use_txt_as_label" in run.error
    result: Result = script("compute_embeddings", *flags.flags[:4], *FOLDER, "--use_txt_as_label")
    assert result.code == 2
