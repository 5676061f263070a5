"""The documents' tables are those that the committed results give."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import stream_buffers
import tables


@pytest.mark.parametrize(
    ("document", "count"),
    [
        ("README.md", 1),
        ("docs/memory.md", 13),
        ("docs/stages.md", 8),
        ("docs/scaling.md", 1),
        ("docs/methods.md", 4),
        ("docs/speed.md", 2),
        ("docs/prior.md", 1),
        ("docs/watching.md", 1),
        ("docs/drawing.md", 2),
        ("docs/text_encoders.md", 2),
        ("docs/full.md", 2),
        ("miniature/README.md", 1),
    ],
)
def test_each_table_of_a_document_is_what_its_command_prints(document, count, capsys):
    text = (PROJECT / document).read_text(encoding="utf-8")
    found = re.findall(r"<!-- python benchmarks/tables\.py (\S+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert len(found) == count
    for path, shown in found:
        assert tables.main([str(PROJECT / path)]) == 0
        assert capsys.readouterr().out == shown + "\n"


def test_a_document_is_filled_with_the_tables_that_it_names(tmp_path):
    text = (PROJECT / "docs" / "stages.md").read_text(encoding="utf-8")
    old = tmp_path / "old.md"
    old.write_text(tables.NAMED.sub(r"\1\4", text), encoding="utf-8")
    assert len(old.read_text(encoding="utf-8")) < len(text) - 3000
    assert tables.main(["--fill", str(old)]) == 0
    assert old.read_text(encoding="utf-8") == text


def test_some_rows_of_a_result(capsys):
    path = PROJECT / "benchmarks" / "results" / "ladder-h100.json"
    assert tables.main([str(path), "--rows", "base in fp16", "latents cached"]) == 0
    shown = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert shown == ["| latents cached", "| base in fp16"]
    with pytest.raises(ValueError, match="no rows"):
        tables.printed(path, ["base in fp17"])


def test_a_document_may_name_rows():
    text = '<!-- python benchmarks/tables.py benchmarks/results/flags-h100.json --rows "--compile on" -->\n<!-- end -->'
    lines = tables.filled(text).splitlines()
    assert lines[3].startswith("| `--compile on` | 9.96 | 8.68 |")
    assert lines[-1] == "<!-- end -->"
    assert tables.filled(tables.filled(text)) == tables.filled(text)


def test_the_ladder_of_the_miniature():
    row = {"part": "training", "name": "recomputed", "trick": "--recompute_blocks 6", "before_gib": 0.25}
    row |= {"peak_gib": 0.5, "step_ms": 12.4, "numbers": "the same bits", "failed": ""}
    result = {"model": "the miniature", "resolution_px": 64, "device": "cpu", "machine": "M", "date": "D"}
    result |= {"versions": {"torch": "1"}, "rows": [row, {**row, "name": "no", "failed": "why"}]}
    lines = tables.tricks_table(result).splitlines()
    assert lines[0] == "| | by | host GiB | of it loaded | ms a step | numbers |"
    assert lines[2] == "| recomputed | `--recompute_blocks 6` | 0.50 | 0.25 | 12 | the same bits |"
    assert lines[4].startswith("The miniature at 64 px, one picture at a time. M, D, torch 1; numbers:")
    before = {**row, "part": "stage one", "name": "VAE", "trick": "--vae_tile 256"}
    assert tables.tricks_table({**result, "rows": [before, row]}).splitlines()[2] == (
        "| VAE | `--vae_tile 256` | 0.50 | | | |"
    )
    lines = tables.tricks_table({**result, "rows": [before]}).splitlines()
    assert lines[0] == "| | by | host GiB |"
    assert lines[2] == "| VAE | `--vae_tile 256` | 0.50 |"
    assert lines[4] == "The miniature at 64 px, one picture at a time. M, D, torch 1."


def test_the_reckoned_buffers_are_what_their_command_prints(capsys):
    assert stream_buffers.main([]) == 0
    assert f"<!-- python benchmarks/stream_buffers.py -->\n{capsys.readouterr().out}<!-- end -->" in (
        PROJECT / "docs" / "memory.md"
    ).read_text(encoding="utf-8")
    assert stream_buffers.main(["--tflops", "350", "--gb_per_s", "55"]) == 0
    assert "| 1024 px | 0.18 | 0.15 | 0.14 | 0.12 | 0.11 | 0.09 | 0.09 | 0.09 |\n" in capsys.readouterr().out


def test_a_row_shows_time_and_peaks_and_the_last_line_where_they_come_from():
    row = {"name": "a stage", "elapsed_s": 12.6, "device_gib": 3.456, "allocated_gib": 2.0, "host_gib": 0.5}
    versions = {"torch": "1", "diffusers": "2", "bitsandbytes": "3", "peft": "4"}
    result = {"machine": "M", "date": "D", "versions": versions, "model": "tiny", "resolution_px": 64, "rows": [row]}
    lines = tables.pipeline_table(result).splitlines()
    assert lines[2] == "| a stage | 13 | 3.46 | 2.00 | 0.50 |"
    assert lines[-1] == "M, D, torch 1, diffusers 2, bitsandbytes 3; tiny at 64 px with random weights."


def test_committed_results_say_where_they_were_made():
    for path in (PROJECT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"date", "machine", "versions"} <= result.keys(), path.name


def placement(**fields):
    whole = {"precision": None, "blocks": 24, "streamed": 0, "buffers": 0, "stream_from": "host"}
    return whole | {"recomputed": 0, "offload_inputs": False} | fields


def test_a_placement_in_a_few_words():
    nf4 = {"precision": "nf4"}
    placements = {
        "16-bit, 3 of 24 blocks recomputed": placement(recomputed=3),
        "16-bit streamed, 23 of 24 blocks recomputed": placement(streamed=24, recomputed=23),
        "16-bit, 14 of its 24 blocks streamed, 23 of 24 blocks recomputed": placement(streamed=14, recomputed=23),
        "nf4, streamed, 23 of 24 blocks recomputed": placement(**nf4, streamed=24, recomputed=23),
    }
    assert {words: tables._what({"placement": found}) for words, found in placements.items()} == {
        words: words for words in placements
    }


def test_a_sentence_of_an_earlier_build_is_shown_as_it_stands():
    """No number is read out of it."""
    sentence = "base unchanged, on the device; 3 of 24 blocks computed anew in backward"
    assert tables._what({"plan": sentence}) == sentence
    row = {"plan": sentence, "resolution": 512, "driver_gib": 5.0, "measured_gib": 5.0, "step_ms": 250}
    assert tables._card_cell(row) == f"512 px: 5.0 GiB, {sentence}, 0.25 s"


def test_cells_of_the_cards():
    row = {"resolution": 512, "driver_gib": 5.0, "measured_gib": 5.0, "step_ms": 250}
    shown = {
        "0/24 recomputed": placement(),
        "streamed, 23/24 recomputed": placement(streamed=24, recomputed=23),
        "14/24 streamed, 22/24 recomputed": placement(streamed=14, recomputed=22),
        "14/24 streamed": placement(streamed=14),
    }
    for words, found in shown.items():
        assert tables._card_cell({**row, "placement": found}) == f"512 px: 5.0 GiB, {words}, 0.25 s"
        planned = tables._cell({"placement": found, "predicted_gib": 4.04}, {})
        assert planned == ("S 4.0" if found["streamed"] else "4.0")
    assert tables._card_cell({**row, "failed": "error"}) == "–"
    refused, auto = {"failed": "error"}, {"placement": placement(), "predicted_gib": 2.5}
    assert (tables._cell(refused, auto), tables._cell(refused, refused)) == ("4S 2.5", "–")
    assert tables._cell({"placement": placement(recomputed=3), "predicted_gib": 4.04}, {}) == "4.0, 3/24 recomputed"


def test_no_benchmark_takes_a_sentence_apart():
    """What the scripts print is for people: regular expressions read documents and file names alone."""
    for path in (PROJECT / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "findall" not in text, path.name
        assert "said.getvalue" not in text, path.name
        assert "re.search" not in text, path.name
