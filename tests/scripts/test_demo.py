"""The demo and its contact sheet. The scripts run in this process here; test_notebook.py runs the demo as it is."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import PROJECT
from PIL import Image

sys.path.insert(0, str(PROJECT / "examples"))

from sd3_lora.drawing.contact_sheet import LEAST_WIDTH_PX, MARGIN_PX, load_row

import contact_sheet
import demo

STAGES = (
    "compute_embeddings.py",
    "precompute_latents.py",
    "train_dreambooth_sd3_lora_miniature.py",
    "inference.py",
    "inference.py --lora",
)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the demo call the scripts' main in this process; returns the list of what it called."""
    called: list[str] = []

    def run(words: Sequence[str]) -> int:
        called.append(words[0])
        return importlib.import_module(Path(words[0]).stem).main(list(words[1:]))

    monkeypatch.setattr(demo, "run_python", run)
    monkeypatch.chdir(PROJECT)  # where the demo runs them
    return called


def rows_of(out: str) -> dict[str, list[str]]:
    """The table's lines by stage: time, peak host, peak device, what was written."""
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines() if line.startswith(STAGES)]
    return {name: cells for name, *cells in lines}


def test_the_demo_draws_and_ends_with_a_table_and_goes_on_when_run_again(in_process, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "demo"), "--max_train_steps", "20", "--num_steps", "2"]
    assert demo.main(flags) == 0
    out = capsys.readouterr().out
    assert in_process == [stage.split()[0] for stage in STAGES] + ["examples/contact_sheet.py"]

    rows = rows_of(out)
    assert tuple(rows) == STAGES
    for seconds, host, device, wrote in rows.values():
        assert float(seconds.removesuffix(" s")) > 0
        assert 0.05 < float(host.removesuffix(" GiB")) < 16
        assert device == "–" or float(device.removesuffix(" GiB")) > 0  # on a CPU, or on a GPU
        assert str(tmp_path / "demo") in wrote
    assert rows["precompute_latents.py"][-1].startswith("5 crops in ")
    assert rows["inference.py --lora"][-1].startswith("4 pictures in ")
    assert "in all" in out
    second_to_last, last = out.splitlines()[-2:]
    assert "no robot in it" in last
    assert str(tmp_path / "demo" / "contact_sheet.png") in second_to_last

    folder = tmp_path / "demo"
    assert (folder / "embeddings.parquet").is_file()
    assert (folder / "lora" / demo.EMA_NAME).is_file()
    drawn = {row: sorted((folder / "pictures" / row).glob("*/*.png")) for row in ("without_lora", "with_lora")}
    assert all(len(paths) == 4 for paths in drawn.values())
    for without, with_lora in zip(*drawn.values(), strict=True):
        assert without.read_bytes() != with_lora.read_bytes()
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 900

    written = {path: path.stat().st_mtime_ns for paths in drawn.values() for path in paths}
    assert demo.main(flags) == 0
    out = capsys.readouterr().out
    assert "36 prompts, 36 of them done before" in out
    assert "5 of 5 pictures cached before" in out
    assert "nothing to do" in out
    assert out.count("4 of them drawn before") == 2
    assert rows_of(out) == {stage: ["–", "–", "–", "nothing new: done before"] for stage in STAGES}
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_a_failing_script_stops_the_demo_with_its_exit_code(in_process, tmp_path, capsys):
    (tmp_path / "embeddings.parquet").write_bytes(b"not parquet")
    assert demo.main(["--output_dir", str(tmp_path)]) == 2
    assert in_process == ["compute_embeddings.py"]
    assert "the demo stopped at compute_embeddings.py" in capsys.readouterr().out


def test_the_scripts_are_processes_of_this_python_in_the_project_folder(capfd):
    assert demo.run_python(["-c", "import os, sys; print(sys.executable, os.getcwd()); sys.exit(3)"]) == 3
    assert capfd.readouterr().out.split() == [sys.executable, str(PROJECT)]


def test_make_demo_calls_it():
    assert "examples/demo.py --output_dir outputs/demo" in (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert demo.plan_stages(Path("x"), 1, 1)[0].record == Path("x/embeddings.json")


def test_a_contact_sheet_of_odd_pictures(tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / ".hidden").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / ".hidden" / "never.png")
    Image.new("RGBA", (40, 10), (255, 0, 0, 0)).save(folder / "a transparent one.png")
    Image.new("P", (10, 40)).save(folder / "b.png")
    Image.new("I;16", (10, 10)).save(folder / "c.png")
    for index in range(3):
        Image.new("L", (10, 10)).save(folder / f"d{index}.png")
    path = tmp_path / "sheet.png"
    code = contact_sheet.main(
        ["--row", "Odd", str(folder), "--most", "4", "--picture_height", "50", "--output_path", str(path)]
    )
    assert code == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    row = load_row("Odd", folder, 50, 4)
    assert row.heading == "Odd (and 2 more)"
    assert [picture.size for picture in row.pictures] == [(200, 50), (12, 50), (50, 50), (50, 50)]
    assert row.pictures[0].getpixel((100, 25)) == (255, 255, 255)
    with Image.open(path) as sheet:
        assert sheet.width == LEAST_WIDTH_PX + 2 * MARGIN_PX


def test_a_contact_sheet_of_nothing_is_one_sentence(tmp_path, capsys):
    assert contact_sheet.main(["--row", "None", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: there are no pictures in")


def test_the_contact_sheet_needs_no_torch():
    code = "import sys, contact_sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT / "examples", check=False).returncode == 0
