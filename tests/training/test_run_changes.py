"""What a resumed command changes, in sentences that name the flags to type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.run_record import NotedPicture, RunFacts, RunIdentity, RunRecord
from sd3_lora.training.checkpoints import read_pictures, write_pictures
from sd3_lora.training.run_changes import require_same_run
from sd3_lora.transformer.lora import save_lora

import pytest
from small_transformer import make_transformer

FOLDER = Path("out/checkpoint-5")


def record_of(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    processes: int = 1,
    pictures: tuple[NotedPicture, ...] = (),
) -> RunRecord:
    return RunRecord(
        [], RunFacts("m", None, {}, "fp32", processes), RunIdentity(values, defaults or {}, pictures=pictures)
    )


def refusal(saved: Mapping[str, Any], record: RunRecord, folder: Path = FOLDER) -> str:
    with pytest.raises(UserError) as error:
        require_same_run(saved, record, folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "before", "now", "says"),
    [
        ("--rank", 4, 8, "with --rank 4, not 8: type --rank 4 to go on"),
        ("--lora_layers", None, "attn.to_k", "without --lora_layers: leave --lora_layers out to go on"),
        ("--lora_layers", "attn.to_k", None, "with --lora_layers attn.to_k: type --lora_layers attn.to_k to go on"),
        ("--use_8bit_adam", False, True, "without --use_8bit_adam: leave --use_8bit_adam out to go on"),
        ("--use_8bit_adam", True, False, "with --use_8bit_adam: type --use_8bit_adam to go on"),
        ("--use_aspect_ratio_bucket", True, False, "with --use_aspect_ratio_bucket: type --use_aspect_ratio_bucket to"),
        ("--compile", "off or graph", "blocks", "without compiled blocks: type --compile off to go on"),
        ("--compile", "blocks", "off or graph", "with compiled blocks: type --compile on (which streamed or 4-bit "),
        ("the precision", "bfloat16", "float16", "with --mixed_precision bf16, not fp16: type --mixed_precision bf16 "),
        ("--base_precision", "16bit", "nf4", "with --base_precision 16bit, not nf4: type --base_precision 16bit to"),
        (
            "the prior prompts",
            ["a cat"],
            ["a dog"],
            "with the prior prompt 'a cat', not 'a dog': type --class_prompt 'a c",
        ),
        (
            "the prior prompts",
            ["a cat", "a dog"],
            ["a dog", "a cat", "a fox"],
            "with the prior prompts 'a cat' and 1 more, not 'a dog' and 2 more: give those of then as --prior_",
        ),
        ("--t5_precision", "fp16", "int8", "on embeddings made with --t5_precision fp16, not int8: type `python comp"),
        ("the transformer", "a-b", "a-c", "on another transformer: give that one as --pretrained_model_name_or_path"),
        ("a global batch of", 4, 2, "with 4 pictures in a micro-batch of all processes, not 2: type --train_batch_si"),
    ],
)
def test_a_change_is_a_sentence(name: str, before: Any, now: Any, says: str) -> None:
    require_same_run({name: before}, record_of({name: before}), FOLDER)
    said = refusal({name: before}, record_of({name: now}))
    assert said.startswith(f"{FOLDER} was trained {says}")
    assert said.endswith(" to go on, or give another --output_dir for a new run")


def test_a_batch_is_shared_by_the_processes() -> None:
    name = "a global batch of"
    assert "type --train_batch_size 2 with 2 processes to go on" in refusal({name: 4}, record_of({name: 2}, {}, 2))
    assert "start as many processes as 3 can be divided by to go" in refusal({name: 3}, record_of({name: 2}, {}, 2))


def test_a_flag_that_the_checkpoint_lacks_had_its_default() -> None:
    saved = {"--rank": 4}
    require_same_run(saved, record_of({**saved, "--new": 1}, {"--new": 1, "--rank": 8}), FOLDER)
    assert "was trained with --new 1, not 2: type --new 1" in refusal(
        saved, record_of({**saved, "--new": 2}, {"--new": 1})
    )
    for value, given in ((1, "with --new 1"), (True, "with --new"), (False, "without --new"), (None, "without --new")):
        assert f"was trained {given}, which this build does not know" in refusal(
            {**saved, "--new": value}, record_of(saved)
        )


def test_crops_follow_from_the_resolution(tmp_path: Path) -> None:
    """Other sizes have other crops: only the flag is named. Other pictures are named all the same."""
    saved = {"the pictures and captions": "a", "--resolution": 64}
    now = {"the pictures and captions": "b", "--resolution": 128}
    write_pictures(tmp_path, [NotedPicture("1", "dog.png", "a dog", ("x",))])
    larger = record_of(now, pictures=(NotedPicture("1", "dog.png", "a dog", ("y",)),))
    assert "trained with --resolution 64, not 128: type --resolution 64 to go" in refusal(saved, larger, tmp_path)
    others = record_of(now, pictures=(NotedPicture("2", "", "a cat", ("y",)),))
    assert "trained without 1 picture, also on dog.png, and with --resolution 64" in refusal(saved, others, tmp_path)


def test_many_pictures_are_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, [])
    pictures = tuple(NotedPicture(str(number), f"{number}.png", "", ()) for number in range(8))
    said = refusal(
        {"the pictures and captions": "a"}, record_of({"the pictures and captions": "b"}, {}, 1, pictures), tmp_path
    )
    assert "trained without 0.png, 1.png, 2.png, 3.png, 4.png and 3 more: take out what was added to go on" in said


def test_damaged_notes_are_none(tmp_path: Path) -> None:
    assert read_pictures(tmp_path) is None
    for content in ("[{", "[1]", "{}5", '[{"image_id": "1"}]'):
        (tmp_path / "pictures.json").write_text(content)
        assert read_pictures(tmp_path) is None


def test_other_weights_are_named_by_their_commit(tmp_path: Path) -> None:
    transformer = make_transformer(1)
    save_lora(tmp_path, transformer, {"base_model": "some/sd3", "revision": "a" * 40})
    said = refusal({"the transformer": "a-b"}, record_of({"the transformer": "a-c"}), tmp_path)
    flags = f"--pretrained_model_name_or_path some/sd3 --revision {'a' * 40}"
    assert f"trained on the transformer of some/sd3 at commit {'a' * 40}: type {flags} to go on" in said


def test_a_lora_to_begin_with_may_have_another_name() -> None:
    """Its content decides, where it is there; where it is not, the checkpoint has all that came of it."""
    name, noun = "--init_lora", "the LoRA to begin with"
    saved = {name: "a", noun: "x"}
    for same in ({name: "other/a", noun: "x"}, {name: "a", noun: None}):
        require_same_run(saved, record_of(same), FOLDER)
    assert "was trained from another LoRA than --init_lora now is: put back that file, or take it away" in refusal(
        saved, record_of({name: "a", noun: "y"})
    )
    assert "was trained with --init_lora a, not b: type --init_lora a to go" in refusal(
        saved, record_of({name: "b", noun: "y"})
    )
    assert "was trained with --init_lora a: type --init_lora a to go" in refusal(
        saved, record_of({name: None, noun: None})
    )


def test_augmented_latents_made_otherwise() -> None:
    name = "the cached --rotation_degrees"
    said = refusal({name: 5.0}, record_of({name: 9.0}))
    assert "was trained on latents made with --rotation_degrees 5.0: type `python precompute_latents.py` with" in said
    require_same_run({name: None}, record_of({name: 9.0}), FOLDER)  # the crops differ, and are named
