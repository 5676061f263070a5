"""The benchmark of methods: what each run is told, what is shared, how it goes on, and how scores are counted.

The model is the tests' tiny one and the judge a fabricated one; the renders are the miniature's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.config import BudgetConfig
from sd3_lora.training.config import TrainingFlags
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "benchmarks"))

import train_dreambooth_sd3_lora_miniature as training_script

import dreambooth
import dreambooth_methods
import dreambooth_runs
import dreambooth_scores
import tables
from dreambooth_runs import Method, Point, Run
from dreambooth_subjects import evaluation_scenes
from judge import Verdict

PLAIN = {"name": "plain"}


class FakeJudge:
    """Says what a robot's first prompts ask for, whatever it is shown; every second object is wrong."""

    def verdict(self, pictures: torch.Tensor) -> Verdict:
        scenes, _ = evaluation_scenes("robot", len(pictures))
        names = ("object", "colour", "pattern", "size", "position")
        answers = {name: getattr(scenes, name).clone() for name in names}
        answers["object"][::2] += 1
        return Verdict(**answers)


@pytest.fixture
def sweep(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls the benchmark with a list of methods: two steps on the tiny model, two prompts, the robot, seed 0."""
    (tmp_path / "judge.safetensors").write_bytes(b"")
    (tmp_path / "judge.json").write_text('{"object": 0.97}')
    for module in (dreambooth, dreambooth_runs):
        monkeypatch.setattr(module, "JUDGE_FILE", tmp_path / "judge.safetensors")
    monkeypatch.setattr(dreambooth, "load_judge", lambda _: FakeJudge())

    def call(methods: list[dict], *words: object) -> int:
        (tmp_path / "list.json").write_text(json.dumps(methods))
        sizes = ["--steps", "2", "--rank", "2", "--lora_blocks", "0", "--prompts", "2", "--drift_prompts", "2"]
        sizes += ["--num_steps", "1", "--device", "cpu", "--subjects", "robot", "--seeds", "0", "--model", tiny_sd3]
        files = ["--methods", tmp_path / "list.json", "--output_dir", tmp_path / "out"]
        files += ["--result", tmp_path / "methods-x.json"]
        return dreambooth_methods.main([*map(str, [*sizes, *files, *words])])

    return call


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def flags_of(*words: object) -> object:
    return dreambooth_methods.parse([*map(str, words), "--device", "cpu"])


def test_every_method_of_the_list_is_a_command_that_training_takes():
    flags = flags_of()
    methods = dreambooth_methods.read_methods(dreambooth_methods.METHODS_FILE, [])
    assert methods[0] == Method("baseline")
    assert len({run.folder(Path()) for method in methods for run in dreambooth_methods.runs_of(flags, method)}) == (
        len(methods) * 24
    )
    for method in methods:
        words = dreambooth_runs.training_words(flags, dreambooth_methods.runs_of(flags, method)[0])
        told = TrainingFlags(*training_script.COMMAND_LINE.parse(words))
        rank = 4 if method.is_whole else 8  # of no effect
        assert (told.run.max_train_steps, told.run.train_batch_size, told.lora.rank) == (150, 2, rank), method.name
        assert told.trains_all == method.is_whole
        assert told.prior.with_prior_preservation == bool(method.class_images)
        assert told.average.use_ema == method.keeps_average
        if "--learning_rate" in method.flags:
            assert told.optimizer.rate != 5e-4 or "--learning_rate 5e-4" in method.flags


def test_a_method_is_told_over_the_shared_flags_and_one_prompt_has_no_captions(tmp_path):
    flags = flags_of("--output_dir", tmp_path)
    subject = dreambooth_runs.prepared_subject(flags, "alarm clock")

    def parsed(**fields: object) -> TrainingFlags:
        run = Run(Method("m", **fields), "alarm clock", 7, (Point(150),))
        return TrainingFlags(*training_script.COMMAND_LINE.parse(dreambooth_runs.training_words(flags, run)))

    told = parsed(flags="--learning_rate 0.01 --class_prompt '{class_prompt}'", class_images=9)
    assert (told.optimizer.learning_rate, told.run.seed) == (0.01, 7)
    assert told.run.output_dir == str(tmp_path / "runs/m/alarm_clock-7/lora")
    assert (told.lora.lora_blocks, told.data.instance_data_dir) == ("0,1", str(subject.captioned))
    assert (told.prior.class_prompt, told.prior.num_class_images) == ("a photo of a alarm clock", 9)
    told = parsed(one_prompt=True)
    data, lora = told.data, told.lora
    assert (data.instance_data_dir, data.instance_prompt) == (str(subject.pictures), "a photo of sks alarm clock")
    assert (lora.lora_layers, lora.lora_blocks) == (None, None)
    assert parsed(one_prompt=True, flags="--lora_blocks 1").lora.lora_blocks == "1"


def test_stage_one_and_class_pictures_are_made_once_for_all_methods(sweep, tmp_path, monkeypatch, capsys):
    called = []
    run_script = dreambooth_runs.run_script

    def note(script: str, *rest: object) -> None:
        called.append(script)
        run_script(script, *rest)

    monkeypatch.setattr(dreambooth_runs, "run_script", note)
    methods = [
        {"name": "flips", "stage_one": "--random_flip", "class_images": 2},
        PLAIN,
        {"name": "fast", "flags": "--learning_rate 1e-2"},
        {"name": "class", "class_images": 2},
        {"name": "one prompt", "one_prompt": True, "class_images": 3},
    ]
    assert sweep(methods, "--seeds", 0, 1) == 0
    training = ["train_dreambooth_sd3_lora_miniature"] * 10
    latents = ["precompute_latents", "draw_class_pictures", "precompute_latents"]
    assert called == ["compute_embeddings", *latents, *latents, *training]
    robot = tmp_path / "out" / "subjects" / "robot"
    assert len(list((robot / "class").glob("*.png"))) == 3
    (flipped,) = robot.glob("latents-*")
    assert {len(load_file(path)) for path in flipped.glob("*.safetensors")} == {4}  # mean and std of two crops
    assert [len(list(folder.glob("*.safetensors"))) for folder in (flipped, robot / "latents")] == [5 + 2, 5 + 3]
    assert "in a process of its own" not in "".join(path.read_text() for path in tmp_path.rglob("log.txt"))

    def picture_count(name: str) -> int:
        record = read(tmp_path / "out" / "runs" / name / "robot-0" / "lora" / "run.json")
        return len(record["prompts"])

    assert picture_count("plain") == 5
    assert picture_count("one_prompt") == 1

    # A method that comes later needs nothing new.
    called.clear()
    assert sweep([*methods, {"name": "slow", "flags": "--learning_rate 1e-5"}]) == 0
    assert called == ["train_dreambooth_sd3_lora_miniature"]


def test_a_seed_gives_its_own_lora_and_a_run_is_the_same_after_others(sweep, tmp_path):
    others = [{"name": "exact", "flags": "--deterministic on"}, {"name": "dropped", "flags": "--lora_dropout 0.5"}]
    assert sweep([*others, PLAIN], "--seeds", 0, 1) == 0
    assert sweep([PLAIN], "--output_dir", tmp_path / "alone") == 0
    loras = [
        load_file(folder / "runs" / "plain" / f"robot-{seed}" / "lora" / LORA_FILE)
        for folder, seed in ((tmp_path / "out", 0), (tmp_path / "alone", 0), (tmp_path / "out", 1))
    ]
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])
    assert not all(torch.equal(loras[0][name], loras[2][name]) for name in loras[0])
    assert not torch.backends.cudnn.deterministic


def test_an_interrupted_call_has_whole_methods_and_goes_on(sweep, tmp_path, monkeypatch, capsys):
    count = dreambooth.Bench.count

    def interrupted(self: dreambooth.Bench, name: str, lora: Path) -> dict:
        if "later" in str(lora) and "robot-1" in str(lora):
            raise KeyboardInterrupt
        return count(self, name, lora)

    methods = [PLAIN, {"name": "later", "flags": "--learning_rate 1e-3"}]
    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.Bench, "count", interrupted)
        assert sweep(methods, "--seeds", 0, 1) == 130
    assert [method["name"] for method in read(tmp_path / "methods-x.json")["methods"]] == ["plain"]
    out = capsys.readouterr().out
    assert out.count("plain: subject 50.00") == 1
    assert "later:" not in out
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert len(done) == 3

    assert sweep(methods, "--seeds", 0, 1) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert [method["name"] for method in read(tmp_path / "methods-x.json")["methods"]] == ["plain", "later"]
    assert "later: subject 50.00" in capsys.readouterr().out

    # All is done: nothing is loaded.
    monkeypatch.setattr(dreambooth_runs, "load_bench", None)
    assert sweep(methods, "--seeds", 0, 1) == 0
    # Other settings do not mix with these; another definition of a method is measured.
    assert sweep(methods, "--steps", 3) == 2
    assert "holds scores with steps 2, not 3" in capsys.readouterr().err
    assert sweep(methods, "--tf32") == 2
    assert "holds scores without --tf32: give another --output_dir" in capsys.readouterr().err


def test_a_method_that_has_changed_is_measured_again(sweep, tmp_path):
    lora = tmp_path / "out" / "runs" / "plain" / "robot-0" / "lora" / LORA_FILE
    assert sweep([PLAIN]) == 0
    before = load_file(lora)
    assert sweep([{**PLAIN, "flags": "--learning_rate 1e-2"}]) == 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in load_file(lora).items())
    assert read(tmp_path / "methods-x.json")["methods"][0]["flags"] == "--learning_rate 1e-2"


def test_a_method_that_has_changed_does_not_go_on_with_what_was_begun(sweep, tmp_path, monkeypatch):
    def interrupted(*_: object) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.Bench, "count", interrupted)
        assert sweep([PLAIN]) == 130
    run = tmp_path / "out" / "runs" / "plain" / "robot-0"
    assert [path.name for path in run.glob("lora/checkpoint-*")] == ["checkpoint-2"]
    assert sweep([{**PLAIN, "flags": "--learning_rate 1e-2"}]) == 0
    assert "resumed" not in (run / "log.txt").read_text()


def test_a_method_that_fails_is_named_and_the_others_are_measured(sweep, tmp_path, capsys):
    broken = {"name": "broken", "flags": "--use_dora --init_lora_weights pissa"}
    assert sweep([broken, PLAIN]) == 2
    err = capsys.readouterr().err
    assert "1 runs failed; the first: train_dreambooth_sd3_lora_miniature.py failed on robot, broken:" in err
    assert "two kinds of LoRA: leave one out" in err
    assert [method["name"] for method in read(tmp_path / "methods-x.json")["methods"]] == ["plain"]


def test_of_a_run_with_an_average_that_is_judged(sweep, tmp_path, monkeypatch):
    judged = []
    count = dreambooth.Bench.count

    def note(self: dreambooth.Bench, name: str, lora: Path) -> dict:
        judged.append(lora.name)
        return count(self, name, lora)

    monkeypatch.setattr(dreambooth.Bench, "count", note)
    assert sweep([PLAIN, {"name": "average", "flags": "--use_ema --ema_decay 0.5"}]) == 0
    assert judged == [LORA_FILE, EMA_FILE]


@pytest.mark.parametrize("flags", ["", "--use_dora", "--init_lora_weights pissa", "--use_rslora --lora_alpha 3"])
def test_the_base_has_the_same_bits_after_a_run(sweep, tmp_path, flags):
    assert sweep([{"name": "m", "flags": f"{flags} --learning_rate 0.1"}]) == 0
    words = ["--device", "cpu", "--prompts", "2", "--drift_prompts", "2", "--num_steps", "1"]
    bench = dreambooth.load_bench(flags_of(*words, "--model", read_model(tmp_path)))
    transformer = bench.pipeline.transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    bench.count("robot", tmp_path / "out" / "runs" / "m" / "robot-0" / "lora" / LORA_FILE)
    after = transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def read_model(tmp_path: Path) -> str:
    record = read(tmp_path / "out" / "runs" / "m" / "robot-0" / "lora" / "run.json")
    return record["flags"]["pretrained_model_name_or_path"]


def test_a_base_that_has_changed_is_noticed(sweep, tmp_path, monkeypatch, capsys):
    def spoil(self: dreambooth.Bench) -> dict:
        with torch.no_grad():
            next(self.pipeline.transformer.parameters()).view(-1)[0] += 1e-3
        return {"drift_samples": 2, "drift_right": 1}

    assert sweep([PLAIN]) == 0
    monkeypatch.setattr(dreambooth.Bench, "draw_drift", spoil)
    assert sweep([PLAIN, {"name": "second"}]) == 2
    assert "is not what it was before" in capsys.readouterr().err


def row(subject: str, seed: int, right: int, drift: int) -> dict:
    right_of = {"object": right, "colour": 10, "pattern": 8, "position": 9}
    return {
        "subject": subject,
        "seed": seed,
        "samples": 10,
        "right": right_of,
        "drift_samples": 10,
        "drift_right": drift,
    }


def test_means_are_over_subjects_and_seeds_and_the_error_is_over_subjects():
    rows = [row("a", 0, 10, 8), row("a", 1, 8, 8), row("b", 0, 4, 4), row("b", 1, 6, 4)]
    found = dreambooth_scores.summary(rows, {"drift_samples": 10, "drift_right": 8})
    assert found["means"] == {"subject": 70.0, "prompt": 90.0, "drift": 75.0}
    # Subjects at 90 and 50 % scatter by 28.3, of which two have a mean off by 20.
    assert found["standard_errors"] == {"subject": 20.0, "prompt": 0.0, "drift": 25.0}
    assert found["by_seed"]["0"] == {"subject": 70.0, "prompt": 90.0, "drift": 75.0}
    assert found["by_seed"]["1"] == {"subject": 70.0, "prompt": 90.0, "drift": 75.0}
    alone = dreambooth_scores.summary(rows[:1], {"drift_samples": 10, "drift_right": 8})
    assert alone["standard_errors"] == {"subject": None, "prompt": None, "drift": None}


def test_the_result_has_every_count_and_prints_as_a_table(sweep, tmp_path, capsys):
    methods = [PLAIN, {"name": "flips", "stage_one": "--random_flip", "flags": "--learning_rate 1e-3"}]
    assert sweep(methods, "--seeds", 0, 1) == 0
    path = tmp_path / "methods-x.json"
    result = read(path)
    first = result["methods"][0]
    assert result["columns"] == ["object", "colour", "pattern", "position", "drift"]
    assert first["rows"] == {"robot": {"0": [1, 2, 2, 2, 0], "1": [1, 2, 2, 2, 0]}}
    assert '"0": [1, 2, 2, 2, 0]' in path.read_text()
    assert first["means"] == {"subject": 50.0, "prompt": 100.0, "drift": None}
    assert first["training_s"] > 0
    assert result["seeds"] == [0, 1]
    capsys.readouterr()
    assert tables.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 1 | plain | 50.0 | 100.0 | – |"
    assert lines[3] == "| 2 | flips | 50.0 | 100.0 | – |"
    assert lines[4] == "| | target, captions | ≥ 92 | ≥ 98 | ≥ 97 |"
    told = lines.index("<summary>What each was told</summary>")
    assert lines[told + 2] == "1. nothing more"
    assert lines[told + 3] == "2. `--learning_rate 1e-3`; stage one: `--random_flip`"


@pytest.mark.parametrize(
    ("methods", "words", "sentence"),
    [
        ([PLAIN, PLAIN], [], "has two methods named plain"),
        ([PLAIN], ["--only", "other*"], "has no method named other*: choose from plain"),
        ([{"name": "a/b"}], [], "'a/b' cannot"),
        ([{"name": "a", "flag": "x"}], [], "is not a list of methods"),
    ],
)
def test_a_wrong_list_is_one_sentence(sweep, capsys, methods, words, sentence):
    assert sweep(methods, *words) == 2
    assert sentence in capsys.readouterr().err


def test_processes_share_the_runs(tiny_sd3, tmp_path):
    """Spawned ones, with the miniature's own judge."""
    (tmp_path / "list.json").write_text(json.dumps([PLAIN]))
    words = ["--steps", 1, "--rank", 2, "--lora_blocks", 0, "--prompts", 1, "--drift_prompts", 1, "--num_steps", 1]
    words += ["--device", "cpu", "--subjects", "robot", "fox", "--seeds", 0, "--model", tiny_sd3, "--jobs", 2]
    words += ["--methods", tmp_path / "list.json", "--output_dir", tmp_path / "out", "--result", tmp_path / "x.json"]
    assert dreambooth_methods.main(list(map(str, words))) == 0
    (method,) = read(tmp_path / "x.json")["methods"]
    assert method["rows"].keys() == {"robot", "fox"}
    logs = [path.read_text() for path in (tmp_path / "out" / "runs").rglob("log.txt")]
    assert ["1 step" in log for log in logs] == [True, True]


def test_each_process_plans_with_its_share_of_the_gpu(monkeypatch, tmp_path):
    gib = 1024**3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (78 * gib, 80 * gib))
    assert dreambooth_runs.memory_share(torch.device("cuda"), 14) == 5.01
    assert dreambooth_runs.memory_share(torch.device("cuda"), 2) == dreambooth_runs.LARGEST_BUDGET_GIB
    assert dreambooth_runs.memory_share(torch.device("cpu"), 2) is None
    flags = flags_of("--output_dir", tmp_path)
    flags.vram_budget_gib = 5.01
    words = dreambooth_runs.training_words(flags, Run(Method("m"), "robot", 0, (Point(150),)))
    groups = training_script.COMMAND_LINE.parse(words)
    assert [group.vram_budget_gib for group in groups if isinstance(group, BudgetConfig)] == [5.01]


def test_only_drawing_is_in_tf32(sweep, tmp_path, monkeypatch):
    seen = []
    draw = dreambooth.draw

    def note(*arguments: object) -> torch.Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return draw(*arguments)

    monkeypatch.setattr(dreambooth, "draw", note)
    assert sweep([PLAIN], "--tf32") == 0
    assert set(seen) == {True}
    assert not torch.backends.cuda.matmul.allow_tf32
    assert sweep([PLAIN]) == 2  # other settings


def test_some_methods_of_the_list():
    names = [method.name for method in dreambooth_methods.read_methods(dreambooth_methods.METHODS_FILE, ["EMA*"])]
    assert len(names) > 1
    assert all(name.startswith("EMA") for name in names)


def test_a_whole_transformer_is_judged_and_taken_out_again(sweep: Callable[..., int], tmp_path: Path) -> None:
    whole = {"name": "whole", "flags": "--full"}
    assert sweep([whole, PLAIN], "--jobs", "1") == 0
    folder = Run(Method(**whole), "robot", 0, ()).folder(tmp_path / "out") / "lora"
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
