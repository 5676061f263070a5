"""The ladder of tricks: each row is the training script with its flags, and its figures are what the run noted.

The scripts run in this process here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from sd3_lora import tricks
from sd3_lora.tricks import Row, Rung, compared, drawn, rungs, table

import pytest
import torch
from conftest import TRAINING_SCRIPT
from safetensors.torch import save_file
from small_transformer import needs_gpu

STAGE_ONE = ["text encoders, one at a time", "VAE, whole pictures", "VAE, pictures in tiles"]
ON_CPU = [
    "attention keeps every score",
    "fused attention",
    "base in 16 bits",
    "Adam's state in 8 bits",
    "all blocks recomputed",
    "base in 4 bits",
    "half the side, base in 4 bits",
]


def in_process(words: Sequence[str]) -> tuple[int, str, str]:
    """What `tricks.run_python` does, without a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(words[0].removesuffix(".py")).main(list(words[1:]))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def run_scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the command run its scripts with this function."""
    return lambda run: monkeypatch.setattr(tricks, "run_python", run)


def test_the_ladder_of_a_small_model(run_scripts, tiny_sd3: Path, tmp_path: Path, capsys) -> None:
    run_scripts(in_process)
    model = ["--pretrained_model_name_or_path", str(tiny_sd3), "--resolution", "64", "--max_train_steps", "1"]
    assert tricks.main([*model, "--device", "cpu", "--output_dir", str(tmp_path / "tricks")]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "tricks" / "ladder.json").read_text())
    assert {name: result[name] for name in ("resolution_px", "steps", "device")} == {
        "resolution_px": 64,
        "steps": 1,
        "device": "cpu",
    }
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [*STAGE_ONE, *ON_CPU]
    assert not any(row["failed"] for row in rows.values())
    assert all(0 < row["before_gib"] <= row["peak_gib"] == row["host_gib"] for row in rows.values())
    assert rows["all blocks recomputed"]["numbers"] == "the same bits"
    assert rows["all blocks recomputed"]["loss"] == rows["Adam's state in 8 bits"]["loss"]
    assert rows["base in 16 bits"]["numbers"].startswith("off by ")
    assert rows["base in 4 bits"]["loss"] != rows["all blocks recomputed"]["loss"]
    assert all(row["step_ms"] > 0 for row in rows.values() if row["part"] == "training")
    assert f"[10/10] {ON_CPU[-1]}\n" in out
    assert "all blocks recomputed          --recompute_blocks" in out
    assert (tmp_path / "tricks" / "ladder.svg").read_text().count('class="work"') == 10
    assert [path.name for path in sorted((tmp_path / "tricks").iterdir())] == ["ladder.json", "ladder.svg"]


@needs_gpu
def test_the_ladder_on_a_gpu(tmp_path: Path) -> None:
    """Of the miniature, in processes: with the rows that change something on a GPU alone."""
    flags = ["--resolution", "512", "--max_train_steps", "2", "--device", "cuda", "--output_dir", str(tmp_path)]
    assert tricks.main(flags) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    assert len(rows) == len(STAGE_ONE) + len(ON_CPU) + 3
    assert {name: row["failed"] for name, row in rows.items() if row["failed"]} == {}
    recomputed, streamed = rows["all blocks recomputed"], rows["instead: 16-bit base streamed"]
    assert recomputed["peak_gib"] < rows["Adam's state in 8 bits"]["peak_gib"]
    assert streamed["peak_gib"] < recomputed["peak_gib"]
    assert streamed["host_gib"] > 0


def test_the_training_script_takes_the_flags_of_each_rung() -> None:
    training = importlib.import_module(TRAINING_SCRIPT)
    ladder = list(rungs(24, 512, "fp16"))
    assert [rung.name for rung in ladder if not rung.on_gpu] == ON_CPU
    assert [rung.name for rung in ladder if rung.on_gpu] == [
        "step as one CUDA graph",
        "instead: 16-bit base streamed",
        "block inputs offloaded",
    ]
    for rung in ladder:
        training.COMMAND_LINE.parse(list(rung.flags))
        flag, value = (*rung.trick.split(), "")[:2]
        assert flag in rung.flags or value == "auto", rung.name
    names = [rung.name for rung in ladder]
    assert all(rung.beside is None or rung.beside in names[: names.index(rung.name)] for rung in ladder)


def test_a_row_that_fails_says_why_and_the_others_stand(run_scripts, tiny_sd3: Path, tmp_path: Path, capsys) -> None:
    def run(words: Sequence[str]) -> tuple[int, str, str]:
        if "nf4" in words:
            return 2, "", "some noise\nerror: bitsandbytes is not there: type `pip install bitsandbytes`\n"
        if words[0] == f"{TRAINING_SCRIPT}.py":
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir()
            stages = [stage("load transformer", 0.25), stage("train", 0.5)]
            (folder / "run.json").write_text(json.dumps({"stages": stages, "ms_a_step": 12.34, "loss": 0.5}))
            save_file({"a": torch.ones(2)}, folder / "pytorch_lora_weights.safetensors")
            return 0, "", ""
        output = Path(words[words.index("--output_path") + 1])
        record = output.with_suffix(".json") if output.suffix else output / "run.json"
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"stages": [stage("encode", 0.125)]}))
        return 0, "", ""

    run_scripts(run)
    assert tricks.main(["--device", "cpu", "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "base in 4 bits: bitsandbytes is not there: type `pip install bitsandbytes`\n" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    assert (rows["fused attention"]["before_gib"], rows["fused attention"]["peak_gib"]) == (0.25, 0.5)
    assert (rows["fused attention"]["step_ms"], rows["fused attention"]["numbers"]) == (12.3, "the same bits")
    assert rows["base in 4 bits"]["peak_gib"] == 0
    assert "base in 4 bits<" not in (tmp_path / "ladder.svg").read_text()


def stage(name: str, host_gib: float) -> dict[str, object]:
    return {"name": name, "elapsed_s": 1.0, "peak_host_gib": host_gib, "peak_device_gib": 0.0}


def test_without_stage_one_there_is_nothing_to_train(run_scripts, tmp_path: Path, capsys) -> None:
    run_scripts(lambda words: (2, "", "error: the folder is empty\n"))
    assert tricks.main(["--device", "cpu", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: compute_embeddings.py failed: the folder is empty\n"
    assert list(tmp_path.iterdir()) == []


def test_plans_of_a_known_model_are_the_training_script_s_own(run_scripts, capsys) -> None:
    called = []

    def run(words: Sequence[str]) -> tuple[int, str, str]:
        called.append(list(words))
        return 0, f"plan: x\npredicted peak: {len(called)} GiB\n", ""

    run_scripts(run)
    assert tricks.main(["--plan"]) == 0
    out = capsys.readouterr().out
    assert "\nstabilityai/stable-diffusion-3-medium-diffusers at 1024 px, one picture a step" in out
    assert "all blocks recomputed (--recompute_blocks 24)\n  predicted peak: 6 GiB\n" in out
    assert len(called) == 10
    assert all(words[0] == f"{TRAINING_SCRIPT}.py" and "--plan" in words for words in called)


def test_a_plan_at_full_size_is_predicted_without_a_network(run_scripts, monkeypatch, capsys) -> None:
    (rung,) = (rung for rung in rungs(24, 1024, "fp16") if rung.name == "all blocks recomputed")
    monkeypatch.setattr(tricks, "rungs", lambda *_: iter([rung]))
    run_scripts(in_process)
    assert tricks.main(["--plan"]) == 0
    assert "= 5.35 GiB" in capsys.readouterr().out


def test_numbers_side_by_side(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for path, value in zip(files, (2.0, 2.0, 2.5), strict=True):
        save_file({"w": torch.full((4,), value)}, path)
    assert compared(files[1], files[0]) == "the same bits"
    assert compared(files[2], files[0]) == "off by 2.5e-01"
    assert compared(files[2], None) == ""


def test_the_table_and_the_drawing() -> None:
    rows = [
        Row("stage one", "VAE", "precompute_latents.py", 0.5, 1.0, 1.0, 2.0),
        Row("training", "all <blocks>", "--recompute_blocks 6", 0.25, 0.5, 0.5, 2.0, 12.3, 1.5, "the same bits"),
        Row("training", "base in 4 bits", "--base_precision nf4", failed="no"),
    ]
    lines = table(rows).splitlines()
    assert lines[1].split() == ["VAE", "precompute_latents.py", "1.00", "#" * 24]
    assert lines[2].split()[4:] == ["0.50", "0.25", "#" * 12, "12", "1.500000", "the", "same", "bits"]
    assert lines[-1] == "base in 4 bits: no"
    picture = drawn(rows, "a & b")
    assert "<title>a &amp; b</title>" in picture
    assert "all &lt;blocks&gt;" in picture
    assert 'class="work" x="240" y="81" width="170.0"' in picture
    assert 'class="before" x="240" y="81" width="85.0"' in picture
    assert "base in 4 bits" not in picture


def test_half_the_side_is_compared_with_nothing() -> None:
    last = list(rungs(6, 512, "bf16"))[-1]
    assert isinstance(last, Rung)
    assert (last.flags[:2], last.beside) == (("--resolution", "256"), None)
