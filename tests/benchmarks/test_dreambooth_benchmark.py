"""The DreamBooth benchmark: what it asks, how it counts, and that it goes on where it stopped.

The model is the tests' tiny one and the judge a fabricated one; the renders are the miniature's own.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from sd3_lora.stage_one.captions import read_captions
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROJECT
from PIL import Image

sys.path.insert(0, str(PROJECT / "benchmarks"))

import dreambooth
import dreambooth_scores
import dreambooth_subjects
import dreambooth_trainers
from judge import Verdict
from world import COLOURS, PATTERNS, POSITIONS, SIZES, Scenes, load_objects

FAKE_PEER = """
import json, os, shutil, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(parents=True)
shutil.copy(folder.parent.parent / "ours" / "lora" / "pytorch_lora_weights.safetensors", folder)
(folder / "argv.json").write_text(json.dumps(sys.argv[1:]))
(folder / "cuda.txt").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def places(scenes: Scenes) -> list[tuple[int, int]]:
    return list(zip(scenes.size.tolist(), scenes.position.tolist(), strict=True))


def test_the_subjects_are_held_out_and_the_robot_is_one():
    held_out = {thing.name for thing in load_objects() if thing.held_out}
    assert set(dreambooth_subjects.SUBJECTS) <= held_out
    assert len(set(dreambooth_subjects.SUBJECTS)) >= 12
    assert "robot" in dreambooth_subjects.SUBJECTS


def test_the_five_scenes_of_a_subject_are_the_same_in_every_process():
    """Pinned: a hash that changes between processes, as Python's, would give other numbers."""
    scenes = dreambooth_subjects.training_scenes("robot")
    colours, patterns = [list(COLOURS)[i] for i in scenes.colour], [PATTERNS[i] for i in scenes.pattern]
    assert colours == ["yellow", "green", "grey", "blue", "black"]
    assert patterns == ["dotted", "plain", "checkered", "striped", "checkered"]
    assert scenes.size.tolist() == [2, 2, 0, 1, 1]


@pytest.mark.parametrize("name", dreambooth_subjects.SUBJECTS)
def test_evaluation_asks_for_nothing_that_training_shows(name):
    shown = dreambooth_subjects.training_scenes(name)
    assert len(set(shown.colour.tolist())) == len(set(shown.position.tolist())) == 5
    assert set(shown.size.tolist()) == set(range(len(SIZES)))
    assert set(shown.pattern.tolist()) == set(range(len(PATTERNS)))

    asked, prompts = dreambooth_subjects.evaluation_scenes(name, 40)
    assert not set(shown.colour.tolist()) & set(asked.colour.tolist())
    assert not set(places(shown)) & set(places(asked))
    for index, prompt in enumerate(prompts):
        size, position = list(SIZES)[asked.size[index]], list(POSITIONS)[asked.position[index]]
        background = f"{PATTERNS[asked.pattern[index]]} {list(COLOURS)[asked.colour[index]]}"
        assert prompt == f"a photo of a {size} sks {name} {position} on a {background} background"
        assert load_objects()[asked.object[index]].name == name
    # All of what is left is asked for, evenly.
    assert sorted(places(asked)) == sorted(4 * list(set(places(asked))))
    assert torch.bincount(asked.pattern).tolist() == [10, 10, 10, 10]
    assert prompts == dreambooth_subjects.evaluation_scenes(name, 40)[1]


def test_drift_asks_for_other_objects_that_pretraining_knew():
    scenes, prompts = dreambooth_subjects.drift_scenes(32)
    things = [load_objects()[index] for index in scenes.object]
    assert len(set(things)) == 32
    assert not any(thing.held_out for thing in things)
    assert all(thing.name in prompt for thing, prompt in zip(things, prompts, strict=True))
    assert not any("sks" in prompt for prompt in prompts)
    assert prompts == dreambooth_subjects.drift_scenes(32)[1]


def test_the_pictures_are_five_and_always_the_same(tmp_path):
    for folder in ("once", "again"):
        folders = (tmp_path / f"{folder}{more}" for more in ("", ", captioned", ", masks"))
        dreambooth_subjects.write_pictures("teapot", *folders)
    paths = sorted((tmp_path / "once").iterdir())  # diffusers' script reads every file there as a picture
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert len({path.read_bytes() for path in paths}) == 5
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in paths)
    with Image.open(paths[0]) as picture:
        assert picture.size == (128, 128)
        scenes = dreambooth_subjects.training_scenes("teapot")
        top_left = picture.getpixel((0, 0))
    captioned = tmp_path / "once, captioned"
    assert all(path.read_bytes() == (captioned / path.name).read_bytes() for path in paths)
    captions = read_captions(captioned, sorted(captioned.glob("*.png")))
    assert len(captions) == 5
    for index, (text,) in enumerate(captions.values()):
        size, position = list(SIZES)[scenes.size[index]], list(POSITIONS)[scenes.position[index]]
        background = f"{PATTERNS[scenes.pattern[index]]} {list(COLOURS)[scenes.colour[index]]}"
        assert text == f"a photo of a {size} sks teapot {position} on a {background} background"
    colour = list(COLOURS.values())[scenes.colour[0]]
    assert scenes.pattern[0] or max(abs(a - b) for a, b in zip(top_left, colour, strict=True)) < 12


def verdict_of(scenes: Scenes, **wrong: int) -> Verdict:
    """A judge's answer that is right but for the first `wrong` pictures of each property."""
    answers = {name: getattr(scenes, name).clone() for name in ("object", "colour", "pattern", "size", "position")}
    for name, count in wrong.items():
        answers[name][:count] += 1
    return Verdict(**answers)


def test_each_property_is_counted_by_itself():
    scenes, _ = dreambooth_subjects.evaluation_scenes("robot", 20)
    right = dreambooth_scores.count_right(verdict_of(scenes, object=3, colour=5, pattern=1, size=20), scenes)
    assert right == {"object": 17, "colour": 15, "pattern": 19, "position": 20}


def test_shares_are_pooled_and_drift_is_relative_to_the_model_without_a_lora():
    right = {"object": 10, "colour": 10, "pattern": 8, "position": 9}
    worse = {"object": 20, "colour": 0, "pattern": 12, "position": 21}
    rows = [
        {"samples": 10, "right": right, "drift_samples": 10, "drift_right": 6},
        {"samples": 30, "right": worse, "drift_samples": 10, "drift_right": 8},
    ]
    before = {"drift_samples": 20, "drift_right": 16}
    values = dreambooth_scores.shares(rows, before)
    assert values["subject"] == 30 / 40
    assert (values["colour"], values["pattern"], values["position"]) == (10 / 40, 20 / 40, 30 / 40)
    assert values["prompt"] == 0.5
    assert values["drift"] == pytest.approx((14 / 20) / (16 / 20))
    without = [{key: row[key] for key in ("samples", "right")} for row in rows]
    assert dreambooth_scores.shares(without, before)["drift"] is None
    assert dreambooth_scores.drift_ratio(rows, {"drift_samples": 20, "drift_right": 0}) is None


def test_the_table_has_the_targets_last():
    values = {"subject": 0.8125, "prompt": 0.95, "colour": 1.0, "pattern": 0.9, "position": 0.95, "drift": None}
    lines = dreambooth_scores.table({"before": values, "ours": {**values, "drift": 0.9667}}).splitlines()
    assert lines[2] == "| without a LoRA | 81.25 % | 95.00 % | 100.00 % | 90.00 % | 95.00 % | – |"
    assert lines[3].endswith("| 96.67 % |")
    assert lines[4] == "| target | ≥ 80.00 % | ≥ 92.00 % | – | – | – | ≥ 90.00 % |"


def flag_values(words: list[str]) -> dict[str, str]:
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def test_the_trainers_are_told_the_same(tmp_path):
    flags = dreambooth.make_parser().parse_args(
        [
            *("--steps", "123", "--learning_rate", "3e-4", "--rank", "6", "--train_batch_size", "3", "--seed", "5"),
            *("--lora_layers", "attn.to_k", "--lora_blocks", "3"),
            *("--peer", str(tmp_path), "--peer_python", "py", "--output_dir", str(tmp_path)),
            *("--train_flags=--logit_mean 1", "--peer_flags=--precondition_outputs 0"),
        ]
    )
    subject = dreambooth.subject_of(flags, "alarm clock")
    python, script, *words = dreambooth_trainers.peer_words(flags, subject, "diffusers")
    assert (python, script) == ("py", str(tmp_path / "examples/dreambooth/train_dreambooth_lora_sd3.py"))
    peer, ours = flag_values(words), flag_values(dreambooth_trainers.our_words(flags, subject)[-1][1])
    defaults = flag_values(dreambooth_trainers.peer_words(flags, subject, "diffusers_defaults"))
    expected = {
        "--max_train_steps": "123",
        "--learning_rate": "0.0003",
        "--rank": "6",
        "--train_batch_size": "3",
        "--seed": "5",
        "--resolution": "128",
        "--max_sequence_length": "77",
        "--lr_scheduler": "constant",
        "--mixed_precision": "no",
        "--instance_prompt": "a photo of sks alarm clock",
    }
    assert expected.items() <= peer.items()
    assert expected.items() <= ours.items()
    assert expected.items() <= defaults.items()
    assert len({words["--output_dir"] for words in (ours, peer, defaults)}) == 3

    layers = {"--lora_layers": "attn.to_k", "--lora_blocks": "3"}
    assert layers.items() <= peer.items()
    assert layers.items() <= ours.items()
    assert not layers.keys() & defaults.keys()
    captioned = str(tmp_path / "alarm_clock" / "captioned")
    assert peer["--dataset_name"] == ours["--instance_data_dir"] == captioned
    assert peer["--caption_column"] == "text"
    assert "--instance_data_dir" not in peer
    assert defaults["--instance_data_dir"] == str(tmp_path / "alarm_clock" / "pictures")
    assert peer["--precondition_outputs"] == "0"
    assert "--precondition_outputs" not in ours
    assert ours["--logit_mean"] == "1"
    assert "--logit_mean" not in peer


def test_class_pictures_are_drawn_as_the_samples_are(tmp_path):
    words = ["--class_images", "7", "--guidance", "2.5", "--num_steps", "9", "--output_dir", str(tmp_path)]
    flags = dreambooth.make_parser().parse_args(words)
    subject = dreambooth.subject_of(flags, "fox")
    scripts = dict(dreambooth_trainers.our_words(flags, subject))
    assert list(scripts)[2] == "draw_class_pictures"
    drawn, trained = (flag_values(scripts[name]) for name in list(scripts)[2:])
    assert drawn["--guidance"] == "2.5"
    assert drawn["--num_steps"] == "9"
    for each in (drawn, trained):
        assert each["--class_prompt"] == subject.class_prompt
        assert each["--num_class_images"] == "7"
        assert each["--latents_path"] == str(tmp_path / "fox" / "ours" / "latents")
    assert "--with_prior_preservation" in trained
    without = dreambooth_trainers.our_words(dreambooth.make_parser().parse_args([]), subject)
    assert "--with_prior_preservation" not in without[-1][1]
    assert [name for name, _ in without] == [name for name in scripts if name != "draw_class_pictures"]


def test_prior_prompts_are_embedded(tmp_path):
    """Of the file that methods name."""
    flags = dreambooth.make_parser().parse_args(["--output_dir", str(tmp_path)])
    (_, embedded), *_ = dreambooth_trainers.our_words(flags, dreambooth.subject_of(flags, "fox"))
    assert flag_values(embedded)["--prompts_file"] == str(dreambooth_trainers.PRIOR_PROMPTS_FILE)
    assert dreambooth_trainers.PRIOR_PROMPTS_FILE.is_file()


def test_training_on_an_nf4_base_is_told_the_same_but_for_that(tmp_path):
    flags = dreambooth.make_parser().parse_args(["--nf4", "--mixed_precision", "fp16", "--output_dir", str(tmp_path)])
    assert dreambooth_trainers.trainers(flags) == ["ours", "ours_nf4"]
    subject = dreambooth.subject_of(flags, "fox")
    *files, (_, ours) = dreambooth_trainers.our_words(flags, subject)
    *same_files, (_, nf4) = dreambooth_trainers.our_words(flags, subject, "ours_nf4")
    assert files == same_files
    ours, nf4 = flag_values(ours), flag_values(nf4)
    assert {name for name in nf4 if nf4[name] != ours.get(name)} == {"--output_dir", "--base_precision"}
    assert nf4["--base_precision"] == "nf4"
    assert nf4["--output_dir"] == str(subject.lora("ours_nf4"))


def test_a_short_lora_run_teaches_the_shipped_miniature_a_subject(tmp_path):
    words = ["--subjects", "guitar", "--steps", "50", "--learning_rate", "1e-3", "--device", "cpu", "--sheets", "0"]
    sizes = ["--prompts", "8", "--drift_prompts", "1", "--num_steps", "8"]
    folders = ["--output_dir", str(tmp_path / "out"), "--result", str(tmp_path / "result.json")]
    assert dreambooth.main([*words, *sizes, *folders]) == 0
    means = read(tmp_path / "result.json")["means"]
    assert means["before"]["subject"] == 0
    assert means["ours"]["subject"] >= 0.5
    assert means["ours"]["prompt"] >= 0.92


class FakeJudge:
    """Says what the first pictures' prompts asked for of a robot, whatever it is shown."""

    def verdict(self, pictures: torch.Tensor) -> Verdict:
        assert pictures.shape[1:] == (3, 128, 128)
        assert pictures.amin() >= -1
        assert pictures.amin() < 0 < pictures.amax() <= 1
        scenes, _ = dreambooth_subjects.evaluation_scenes("robot", len(pictures))
        return verdict_of(scenes, object=1)


@pytest.fixture
def bench(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls the benchmark on the tiny model with the fabricated judge: two steps, two prompts, the robot."""
    (tmp_path / "judge.safetensors").write_bytes(b"")
    (tmp_path / "judge.json").write_text('{"object": 0.97}')
    monkeypatch.setattr(dreambooth, "JUDGE_FILE", tmp_path / "judge.safetensors")
    monkeypatch.setattr(dreambooth, "load_judge", lambda _: FakeJudge())

    def call(*words: object) -> int:
        sizes = ["--steps", "2", "--rank", "2", "--lora_blocks", "0", "--prompts", "2", "--drift_prompts", "2"]
        sizes += ["--num_steps", "1"]
        folders = [
            "--device",
            "cpu",
            "--model",
            tiny_sd3,
            "--output_dir",
            tmp_path / "out",
            "--result",
            tmp_path / "result.json",
        ]
        return dreambooth.main([*sizes, *map(str, [*folders, *words])])

    return call


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_from_end_to_end_goes_on_where_it_stopped(bench, tmp_path, monkeypatch, capsys):
    script = tmp_path / "clone" / dreambooth_trainers.PEER_SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(FAKE_PEER)
    assert bench("--subjects", "robot") == 0
    robot = tmp_path / "out" / "robot"
    assert read(tmp_path / "result.json")["means"].keys() == {"before", "ours"}
    done = [path for name in ("before", "ours") for path in (robot / name).rglob("*")]
    first = {path: path.stat().st_mtime_ns for path in done}

    # The peer is added, and nothing else is done again.
    assert bench("--subjects", "robot", "--peer", tmp_path / "clone") == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first
    out = capsys.readouterr().out
    assert out.count("robot, ours: 1 of 2 show it") == 1
    assert out.count("robot, diffusers' script, told the same: 1 of 2 show it") == 1
    assert out.count("robot, diffusers' script, one prompt, its layers: 1 of 2 show it") == 1
    assert "| target | ≥ 80.00 %" in out
    assert flag_values(read(robot / "diffusers" / "lora" / "argv.json"))["--max_train_steps"] == "2"
    assert (robot / "diffusers" / "lora" / "cuda.txt").read_text() == ""  # --device cpu hides the GPU from it

    result = read(tmp_path / "result.json")
    assert result["judge"] == {"object": 0.97}
    assert result["peer"]["versions"]["torch"] == result["versions"]["torch"]
    assert [row["trainer"] for row in result["rows"]] == ["before", "ours", "diffusers", "diffusers_defaults"]
    assert result["means"]["ours"]["subject"] == 0.5
    assert result["means"]["ours"]["prompt"] == 1.0
    assert result["means"]["before"]["drift"] is None
    assert [len(list((robot / name / "samples").iterdir())) for name in ("before", "ours", "diffusers")] == [2, 2, 2]
    with Image.open(robot / "ours" / "samples" / "000.png") as picture:
        assert picture.text["prompt"] == dreambooth_subjects.evaluation_scenes("robot", 2)[1][0]
    assert (robot / "ours" / "samples" / "000.png").read_bytes() != (
        robot / "before" / "samples" / "000.png"
    ).read_bytes()
    assert (robot / "sheet.png").is_file()

    # A whole run again loads no model.
    monkeypatch.setattr(dreambooth, "load_pipeline", None)
    monkeypatch.setattr(dreambooth, "train", None)
    assert bench("--subjects", "robot", "--peer", tmp_path / "clone") == 0

    # Other settings do not mix with these.
    assert bench("--subjects", "robot", "--learning_rate", "1e-4") == 2
    assert "holds scores with learning_rate 0.0005, not 0.0001" in capsys.readouterr().err


def test_a_lora_is_scored_without_training_and_again_when_it_changes(bench, prepared, script, tmp_path, monkeypatch):
    loras = []
    for seed in (0, 1):
        words = [*prepared.flags[:-1], seed, "--max_train_steps", 1, "--output_dir", tmp_path / str(seed)]
        assert script("train_dreambooth_sd3_lora_miniature", *words, "--device", "cpu").code == 0
        loras.append(tmp_path / str(seed) / LORA_FILE)
    monkeypatch.setattr(dreambooth, "train", None)
    row = tmp_path / "out" / "robot" / "given" / "result.json"
    assert bench("--lora", f"robot={loras[0].parent}") == 0
    assert read(tmp_path / "result.json")["means"].keys() == {"before", "given"}
    first, written = read(row), row.stat().st_mtime_ns
    assert bench("--lora", f"robot={loras[0]}") == 0
    assert row.stat().st_mtime_ns == written
    assert bench("--lora", f"robot={loras[1]}") == 0
    assert read(row)["lora"] != first["lora"]
    assert not (tmp_path / "out" / "robot" / "ours").exists()


def test_a_lora_leaves_nothing_behind(bench, prepared, script, tmp_path):
    words = [*prepared.flags, "--max_train_steps", 2, "--learning_rate", 0.1, "--output_dir", tmp_path / "lora"]
    assert script("train_dreambooth_sd3_lora_miniature", *words, "--device", "cpu").code == 0
    flags = dreambooth.parse(["--drift_prompts", "3", "--prompts", "3", "--num_steps", "1", "--device", "cpu"])
    flags.model = prepared.model
    loaded = dreambooth.load_bench(flags)
    _, prompts = dreambooth_subjects.drift_scenes(3)
    seen = []
    draw_drift = dreambooth.Bench.draw_drift
    before = loaded.draw(prompts, 7)

    def note(self: dreambooth.Bench) -> dict[str, int]:
        seen.append(self.draw(prompts, 7))
        return draw_drift(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreambooth.Bench, "draw_drift", note)
        loaded.score(dreambooth_subjects.Subject("robot", tmp_path / "robot"), "given", tmp_path / "lora" / LORA_FILE)
    assert not torch.equal(seen[0], before)  # the LoRA was there while the other objects were drawn
    assert torch.equal(loaded.draw(prompts, 7), before)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--subjects", "fish"], "fish is not a held-out object of the miniature: choose from robot,"),
        (["--lora", "robot"], "--lora takes SUBJECT=PATH"),
        (["--lora", "robot=x", "--subjects", "robot", "fox"], "there is no --lora for fox"),
        (["--peer", "nowhere"], "nowhere holds no examples/dreambooth/train_dreambooth_lora_sd3.py"),
    ],
)
def test_a_wrong_flag_is_one_sentence(bench, capsys, words, sentence):
    assert bench(*words) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_trainer_that_fails_is_quoted(bench, tmp_path, capsys):
    script = tmp_path / "clone" / dreambooth_trainers.PEER_SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('no torchvision here')")
    assert bench("--subjects", "fox", "--peer", tmp_path / "clone") == 2
    assert capsys.readouterr().err == "error: diffusers' script, told the same, failed on fox:\nno torchvision here\n"
    assert (tmp_path / "out" / "fox" / "ours" / "result.json").is_file()
    assert not (tmp_path / "out" / "fox" / "diffusers" / "result.json").exists()
    script.write_text(FAKE_PEER + "sys.exit('no memory left')")
    assert bench("--subjects", "fox", "--peer", tmp_path / "clone") == 2
    assert "no memory left" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "fox" / "diffusers").rglob("*.safetensors"))  # or the next run would score it
    assert bench("--subjects", "robot", "--train_flags=--rank nonsense", "--output_dir", tmp_path / "other") == 2
    assert "train_dreambooth_sd3_lora_miniature.py failed on robot:\n" in capsys.readouterr().err
