"""Prints a result as the Markdown table that the documents show, or has the documents show it.

python benchmarks/tables.py benchmarks/results/pipeline-sd3-medium-h100.json
python benchmarks/tables.py benchmarks/results/ladder-h100.json --rows "latents cached" "base in fp16"
python benchmarks/tables.py benchmarks/results/cards_run-h200.json --rows_with T4
python benchmarks/tables.py --fill README.md docs/*.md docs/tricks/*.md colab/*.ipynb
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dreambooth_scores import methods_table, table
from placements import streaming

PROJECT = Path(__file__).resolve().parent.parent
# In a document: the command with the result's path, the table, the end.
NAMED = re.compile(r"(<!-- python benchmarks/tables\.py ([^\n]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pipeline_table(result: dict[str, Any]) -> str:
    """A row for each script run, under a line that says what was measured on what."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers", "bitsandbytes"))
    lines = [
        "| script run | seconds | device GiB | of it, tensors | host GiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        peaks = (row["device_gib"], row["allocated_gib"], row["host_gib"])
        numbers = " | ".join([f"{row['elapsed_s']:.0f}", *(f"{peak:.2f}" for peak in peaks)])
        lines.append(f"| {row['name']} | {numbers} |")
    model, side = result["model"], result["resolution_px"]
    lines += ["", f"{result['machine']}, {result['date']}, {versions}; {model} at {side} px with random weights."]
    return "\n".join(lines)


def dreambooth_table(result: dict[str, Any]) -> str:
    """The trainers' scores beside the targets, and a line that says of what and with which settings."""
    settings, versions = result["settings"], result["versions"]
    subjects = len({row["subject"] for row in result["rows"]})
    said = (
        f"{result['machine']}, {result['date']}, torch {versions['torch']}, diffusers {versions['diffusers']}; "
        f"{subjects} subjects, {settings['prompts']} prompts each, {settings['steps']} steps of "
        f"{settings['train_batch_size']}, rank {settings['rank']}, learning rate {settings['learning_rate']:g}, "
        f"guidance {settings['guidance']:g}."
    )
    return f"{table(result['means'])}\n\n{said}"


def dreambooth_methods_table(result: dict[str, Any]) -> str:
    """The methods' scores beside the targets, and a line that says of what and with which settings."""
    settings = result["settings"]
    said = (
        f"{_of_the_miniature(result)}, {settings['steps']} steps of {settings['train_batch_size']}, rank "
        f"{settings['rank']}; unless told otherwise learning rate {settings['learning_rate']:g} and layers "
        f"{settings['lora_layers']} of blocks {settings['lora_blocks']}. ±: the standard error over subjects."
    )
    return f"{methods_table(result)}\n\n{said}"


def _of_the_miniature(result: dict[str, Any]) -> str:
    """Where and on what a sweep's scores were measured."""
    versions, seeds = result["versions"], len(result["seeds"])
    return (
        f"{result['machine']}, {result['date']}, torch {versions['torch']}, diffusers {versions['diffusers']}; "
        f"{len(result['subjects'])} subjects, {seeds} seed{'s' if seeds > 1 else ''}, {result['settings']['prompts']} "
        "prompts each"
    )


def map_table(result: dict[str, Any]) -> str:
    """Subject, prompt and drift over learning rate and steps."""
    settings = result["settings"]
    points = settings["points"]
    lines = ["| | rate | " + " | ".join(f"{steps} steps" for steps in points) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(points))
    for line in result["lines"]:
        cells = [" / ".join(f"{value:.0f}" for value in point["means"].values()) for point in line["points"]]
        lines.append(f"| {line['variant']} | {line['learning_rate']:g} | {' | '.join(cells)} |")
    said = (
        f"Subject / prompt / drift, %. {_of_the_miniature(result)}, steps of {settings['train_batch_size']}, rank "
        f"{settings['rank']}, layers {settings['lora_layers']} of blocks {settings['lora_blocks']}; "
        f"{settings['class_images']} class pictures; decay of the average {settings['ema_decay']:g}."
    )
    return "\n".join(lines) + f"\n\n{said}"


def printer(name: str) -> Callable[[dict[str, Any]], str]:
    """By the file's name, which begins with what made it."""
    tables = {
        "pipeline": pipeline_table,
        "dreambooth": dreambooth_table,
        "methods": dreambooth_methods_table,
        "map": map_table,
        "memory": memory_table,
        "memory-clips": trained_table,
        "memory-full": trained_table,
        "plans": plans_table,
        "text": text_table,
        "step": step_table,
        "ladder": ladder_table,
        "flags": flags_table,
        "cards_run": cards_table,
        "saving": saving_table,
        "streaming": streaming_table,
        "picture": picture_table,
        "drawing": drawing_table,
        "stages": stages_table,
        "exchange": exchange_table,
        "exactness": exactness_table,
        "prior": ratio_table,
        "buckets": ratio_table,
        "validation": validation_table,
        "predictions": predictions_table,
        "tricks": tricks_table,
        "imports": imports_table,
    }
    first, second, *_ = re.split(r"[-.]", name)
    return tables.get(f"{first}-{second}") or tables[first]


def memory_table(result: dict[str, Any]) -> str:
    """Each row that was measured: what ran, and its peak, predicted and measured."""
    lines = [
        "| | resolution | pictures, rank | predicted GiB | measured | host GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    seen = set()
    for row in _measured_rows(result):
        what = _what(row)
        key = (what, row["model"], row["resolution"], row["batch"], row["rank"])
        if "measured_gib" not in row or key in seen:
            continue
        seen.add(key)
        numbers = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['host_gib']:.2f}"
        shape = (
            f"{row['batch']}, {row['rank']}"
            if row.get("script") not in ("precompute_latents.py", "inference.py")
            else "–"
        )
        lines.append(f"| {row['model']}, {what} | {row['resolution']} | {shape} | {numbers} |")
    return "\n".join([*lines, "", _measured_on(result)])


def trained_table(result: dict[str, Any]) -> str:
    """Of more than a LoRA of the transformer: what ran and where its blocks were, the peaks, and a step's time."""
    lines = [
        "| | model | blocks streamed, recomputed | predicted GiB | measured | host GiB | ms a step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in _measured_rows(result):
        place = row["placement"]
        blocks = f"{place['streamed']}, {place['recomputed']} of {place['blocks']}"
        gib = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['host_gib']:.1f}"
        how = "" if row["execution"]["captured"] else ", no CUDA graph"
        lines.append(f"| {row['name']}{how} | {row['model']} | {blocks} | {gib} | {row['step_ms']:.0f} |")
    return "\n".join([*lines, "", _measured_on(result)])


def predictions_table(result: dict[str, Any]) -> str:
    """What ran with which flags: the peak, predicted and measured, and how far the one is off the other."""
    lines = [
        "| | px | pictures | flags | predicted GiB | measured | off |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in _measured_rows(result):
        flags = f"`{' '.join(row['flags'])}`" if row["flags"] else ""
        off = row["predicted_gib"] / row["measured_gib"] - 1
        pictures = row["batch"] if row["name"] == "training" else ""
        numbers = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {off:+.1%}"
        what = f"{row['model']}, {row['name']}" + (f", rank {row['rank']}" if row["rank"] != 4 else "")
        lines.append(f"| {what} | {row['resolution']} | {pictures} | {flags} | {numbers} |")
    return "\n".join([*lines, "", _measured_on(result)])


def exactness_table(result: dict[str, Any]) -> str:
    """Each run beside its reference, and what a step takes with the exact backward pass of attention."""
    lines = ["| run | `--deterministic` | captured | the same bits | off by |", "| --- | --- | --- | --- | ---: |"]
    for row in result["rows"]:
        if "failed" not in row:
            off = "" if row["bit_equal"] else f"{row['off_by']:.1e}"
            answers = ["yes" if answer else "no" for answer in (row["execution"]["captured"], row["bit_equal"])]
            lines.append(f"| {row['name']} | {row['deterministic']} | {' | '.join(answers)} | {off} |")
    if result["step_times"]:
        lines += ["", "| a step | fast, ms | exact, ms | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, times in result["step_times"].items():
        lines.append(f"| {name} | {times['fast_ms']:.1f} | {times['exact_ms']:.1f} | {times['ratio']:.3f} |")
    return "\n".join([*lines, "", f"{result['model']}, rank 8, 12 steps. {_measured_on(result)}"])


def ratio_table(result: dict[str, Any]) -> str:
    """Milliseconds of a step, and of it the share of that of the first row of the same size and batch."""
    times: dict[str, dict[tuple[int, int], float]] = {}
    for row in _measured_rows(result):
        times.setdefault(row["name"], {})[row["resolution"], row["batch"]] = row["ms"]
    first = next(iter(times.values()))
    heads = [f"{resolution} px" + (f", batch {batch}" if batch > 1 else "") for resolution, batch in first]
    lines = [
        f"| | {' | '.join(f'{head}: ms a step | ratio' for head in heads)} |",
        "| --- |" + " ---: | ---: |" * len(heads),
    ]
    for name, found in times.items():
        cells = [
            f"{found[size]:.1f} | {found[size] / ms:.2f}" if size in found else "– | –" for size, ms in first.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"SD3-Medium, rank 4, captured. {_measured_on(result)}"])


def validation_table(result: dict[str, Any]) -> str:
    """A drawing's time beside the stock pipeline's, its peak beside the step's, and what runs have the same bits."""
    rows, stock = _measured_rows(result), result["stock"]
    lines = [
        "| | seconds | of the stock pipeline's | denoising | decoding | step GiB | drawing GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["kind"] == "exact":
            continue
        is_timed = row["kind"] == "timed"
        of_stock = f"{row['drawing_s'] / stock['s']:.2f}" if is_timed and "s" in stock else ""
        seconds = [f"{row[name]:.1f}" if is_timed else "" for name in ("drawing_s", "denoise_s", "decode_s")]
        peaks = [f"{row[name]:.2f}" for name in ("step_gib", "drawing_gib")]
        lines.append(f"| {row['name']} | {' | '.join([seconds[0], of_stock, *seconds[1:], *peaks])} |")
    lines += [f"| the stock pipeline | {stock['s']:.1f} | | | | | |"] if "s" in stock else []
    same = [row["name"] for row in rows if row.get("bit_equal")]
    others = [row["name"] for row in rows if row.get("bit_equal") is False]
    said = f"The same bits with pictures and early warning as without: {', '.join(same) or 'none'}."
    said += f" Other bits: {', '.join(others)}." if others else ""
    shape = f"{result['prompts']} prompts at 1024 px, 28 steps, rank 16; peaks are the allocator's."
    return "\n".join([*lines, "", f"{shape} {said} {_measured_on(result)}"])


def streaming_table(result: dict[str, Any]) -> str:
    """For each size the time of a step by the buffers and the blocks on the device, as shares of the resident one's."""
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in _measured_rows(result):
        name = streamed_as(*row["streamed"]) if row.get("streamed") else "resident"
        rows.setdefault(row["resolution"], {})[name] = row
    heads = list(dict.fromkeys(name for found in rows.values() for name in found if name != "resident"))
    lines = [
        f"| x resident | {' | '.join(heads)} | resident, ms |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for resolution, found in rows.items():
        whole = found["resident"]["step_ms"]
        shares = [f"{found[name]['step_ms'] / whole:.2f}" if name in found else "–" for name in heads]
        peaks = [f"{found[name]['measured_gib']:.2f}" if name in found else "–" for name in (*heads, "resident")]
        lines.append(f"| {resolution} px | {' | '.join(shares)} | {whole:.0f} |")
        lines.append(f"| GiB | {' | '.join(peaks)} |")
    links = [row["link_gb_per_s"] for row in result["rows"] if row.get("link_gb_per_s")]
    return "\n".join([*lines, "", f"The link copied {min(links):.0f} to {max(links):.0f} GB/s. {_measured_on(result)}"])


def streamed_as(buffers: int, staying: int) -> str:
    """A setting's name."""
    return f"{buffers} buffers" + (f", {staying} blocks stay" if staying else "")


def _measured_on(result: dict[str, Any]) -> str:
    """The machine, the date and the versions."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers", "bitsandbytes"))
    return f"{result['machine']}, {result['date']}, {versions}; random weights."


def _what(row: dict[str, Any]) -> str:
    """A row's work in a few words."""
    if row.get("script") == "precompute_latents.py":
        return "VAE encodes a picture in tiles"
    if row.get("script") == "inference.py":
        return f"{row['name'].replace('draw', 'a whole picture')}"
    if "placement" not in row:  # of a build that told it in a sentence alone
        return str(row["plan"])
    placement = row["placement"]
    return f"{streaming(placement)}, {placement['recomputed']} of {placement['blocks']} blocks recomputed"


def plans_table(result: dict[str, Any]) -> str:
    """For each budget and model what is predicted at each resolution: the peak, and how it is reached."""
    rows = {(row["name"], row["model"], row["resolution"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for name, _, _ in rows if "auto" not in name))
    models = list(dict.fromkeys(model for _, model, _ in rows))
    sizes = sorted({size for _, _, size in rows})
    lines = [
        f"| GPU memory | model | {' | '.join(f'{size} px' for size in sizes)} |",
        "| ---: | --- |" + " --- |" * len(sizes),
    ]
    for name in names:
        for model in models:
            cells = [_cell(rows[name, model, size], rows[f"{name}, auto", model, size]) for size in sizes]
            lines.append(f"| {name if model == models[0] else ''} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(exact: dict[str, Any], auto: dict[str, Any]) -> str:
    """R: all on the device, a share of the blocks recomputed; S: streamed; 4: in 4 bits."""
    if "placement" not in exact:
        return f"4S {auto['predicted_gib']:.1f}" if "placement" in auto else "–"
    placement = exact["placement"]
    if placement["streamed"]:
        return f"S {exact['predicted_gib']:.1f}"
    recomputed = f", {placement['recomputed']}/{placement['blocks']} recomputed" if placement["recomputed"] else ""
    return f"{exact['predicted_gib']:.1f}{recomputed}"


def _measured_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What ran, without the rows that only warmed the machine up."""
    return [row for row in result["rows"] if row["name"] != "warm-up" and not row.get("failed")]


def text_table(result: dict[str, Any]) -> str:
    """Stage one's text encoders, held whole and streamed: the seconds of each turn, and the peaks."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in _measured_rows(result):
        groups.setdefault((row["name"], row["batch"]), []).append(row)
    lines = [
        "| fp16 | prompts | seconds | of them T5 | device GiB | host GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, prompts), rows in groups.items():
        whole = " / ".join(f"{_encoding_s(row):.1f}" for row in rows)
        t5 = " / ".join(f"{_encoding_s(row, 'T5'):.1f}" for row in rows)
        capped = [row["flags"][row["flags"].index("--vram_budget_gib") + 1] for row in rows if _is_capped(row)]
        what = f"{name} within {capped[0]} GiB" if capped else name
        tokens = f"{prompts} of {_tokens(rows[0])} tokens"
        peaks = f"{max(row['driver_gib'] for row in rows):.2f} | {max(row['host_gib'] for row in rows):.2f}"
        lines.append(f"| {what} | {tokens} | {whole} | {t5} | {peaks} |")
    resident, streamed = (
        [_encoding_s(r, "T5") for r in groups.get((name, 1), [])] for name in ("resident", "streamed")
    )
    ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(resident, streamed, strict=False))
    said = f"One prompt through T5, loading included, takes {ratios} times as long streamed as resident."
    return "\n".join([*lines, "", f"{said} {_measured_on(result)}"])


def _encoding_s(row: dict[str, Any], encoder: str = "") -> float:
    """The seconds of the stages, load included, of all encoders or of one."""
    return sum(seconds for stage, seconds in row["stage_s"].items() if encoder in stage)


def _tokens(row: dict[str, Any]) -> str:
    flag = "--max_sequence_length"
    return row["flags"][row["flags"].index(flag) + 1] if flag in row["flags"] else "77"


def _is_capped(row: dict[str, Any]) -> bool:
    return "--vram_budget_gib" in row["flags"]


def step_table(result: dict[str, Any]) -> str:
    """Milliseconds of a step of one picture: the trainers below each other, the resolutions side by side."""
    times: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        if row.get("batch") == 1 and "ms" in row:
            times.setdefault(row["name"], {}).setdefault(str(row["resolution"]), []).append(row["ms"])
    sizes = sorted({size for found in times.values() for size in found}, key=int, reverse=True)
    lines = [
        f"| | {' | '.join(f'{size} px, ms | ratio' for size in sizes)} |",
        "| --- |" + " ---: | ---: |" * len(sizes),
    ]
    first = next(iter(times.values()))
    for name, found in times.items():
        cells = []
        for size in sizes:
            ms = found.get(size, [])
            ratio = f"{sum(first[size]) / len(first[size]) / (sum(ms) / len(ms)):.1f}" if ms else "–"
            cells.append(f"{' / '.join(f'{value:.0f}' for value in ms) or '–'} | {ratio}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_on(result)])


def ladder_table(result: dict[str, Any]) -> str:
    """One trick a row: the peaks of device and host, the step's time, and whether numbers change."""
    lines = ["| | by | device GiB | host GiB | ms a step | numbers |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in _measured_rows(result):
        trick = f"`{row['trick']}`" if row["trick"] else ""
        numbers = f"{row['driver_gib']:.2f} | {row['host_gib']:.2f} | {row['step_ms']:.0f}"
        lines.append(f"| {row['name']} | {trick} | {numbers} | {row['exactness']} |")
    said = "SD3-Medium at 1024 px, one picture a step, rank 4; device: what the driver says, CUDA's own included."
    return "\n".join([*lines, "", f"{said} {_measured_on(result)}"])


def flags_table(result: dict[str, Any]) -> str:
    """One forced flag or pair a row: the peak, predicted and as the driver says, the host's, and the step's time."""
    lines = ["| flags | predicted GiB | device | host | ms a step |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in _measured_rows(result):
        flags = f"`{' '.join(row['flags'])}`" if row["flags"] else "none: the plan's choice"
        sizes = f"{row['predicted_gib']:.2f} | {row['driver_gib']:.2f} | {row['host_gib']:.2f}"
        lines.append(f"| {flags} | {sizes} | {row['step_ms']:.0f} |")
    return "\n".join([*lines, "", f"SD3-Medium at 1024 px, one picture a step, rank 4, fp16. {_measured_on(result)}"])


def cards_table(result: dict[str, Any]) -> str:
    """For each budget and model the largest size that trained, its peak, how, and its step's time."""
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    found = {(row["name"], row["model"]): row for row in result["rows"]}
    lines = [f"| GPU memory | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for name in sorted(names, key=lambda name: (int(name.split()[0]), name)):
        cells = [_card_cell(found.get((name, model), {})) for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Fits, measured under a cap. {_measured_on(result)}"])


def _card_cell(row: dict[str, Any]) -> str:
    if "measured_gib" not in row or "failed" in row:
        return "–"
    how = _card_placement(row["placement"]) if "placement" in row else str(row["plan"])
    return f"{row['resolution']} px: {row['driver_gib']:.1f} GiB, {how}, {row['step_ms'] / 1000:.2f} s"


def _card_placement(placement: dict[str, Any]) -> str:
    streamed, recomputed, blocks = (placement[key] for key in ("streamed", "recomputed", "blocks"))
    again = f"{recomputed}/{blocks} recomputed"
    if not streamed:
        return again
    return ("streamed" if streamed == blocks else f"{streamed}/{blocks} streamed") + (
        f", {again}" if recomputed else ""
    )


def saving_table(result: dict[str, Any]) -> str:
    """The peaks of training without and with checkpoints, and of drawing with its LoRA."""
    lines = ["| | tensors GiB | predicted | measured |", "| --- | ---: | ---: | ---: |"]
    for row in _measured_rows(result):
        peaks = (max(row["allocated_gib"].values()), row["predicted_gib"], row["measured_gib"])
        lines.append(f"| {row['name']} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |")
    return "\n".join([*lines, "", _measured_on(result)])


def picture_table(result: dict[str, Any]) -> str:
    """From process start to PNG, beside the stock pipeline."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _measured_rows(result):
        groups.setdefault(row["name"], []).append(row)
    stock = [row["elapsed_s"] for row in next(iter(groups.values()))]
    lines = ["| | seconds | of the first row's | device GiB |", "| --- | ---: | ---: | ---: |"]
    for name, rows in groups.items():
        seconds = [row["elapsed_s"] for row in rows]
        ratios = " / ".join(f"{a / b:.2f}" for a, b in zip(seconds, stock, strict=False))
        peak = max(row["device_gib"] for row in rows)
        lines.append(f"| {name} | {' / '.join(f'{s:.1f}' for s in seconds)} | {ratios} | {peak:.2f} |")
    said = f"SD3-Medium, {result['size']} px, {result['steps']} steps, guidance 7, fp16; a process each, in turns, text"
    return "\n".join([*lines, "", f"{said} encoders included, files in the page cache. {_measured_on(result)}"])


def imports_table(result: dict[str, Any]) -> str:
    """CPU seconds of each script up to its work, and of the miniature's job, beside the libraries' imports."""
    builds = list(dict.fromkeys(row["build"] for row in result["rows"] if row["build"]))
    lines = [
        f"| CPU seconds | {' | '.join(builds)} | of the first row's |",
        f"| --- | {'---: | ' * len(builds)}---: |",
    ]
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = {row["build"]: row for row in result["rows"] if row["name"] == name}
        latest = rows.get("now") or rows[""]
        seconds = [f"{rows[build]['cpu_s']:.2f}" if build in rows else "" for build in builds]
        if "" in rows:
            seconds[-1] = f"{latest['cpu_s']:.2f}"
        lines.append(f"| {name} | {' | '.join(seconds)} | {latest['of_typed']:.2f} |")
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "diffusers", "transformers", "peft")
    )
    rounds = "One round" if result["rounds"] == 1 else f"Medians of {result['rounds']} rounds"
    beside = f", beside {result['beside']}" if "beside" in result else ""
    said = (
        f"{rounds} in turns{beside}, files in the page cache. Scripts end where their work would "
        f"begin; `job` rows are whole commands on the miniature, {result['training_steps']} steps of training, "
        f"{result['drawing_steps']} of drawing."
    )
    return "\n".join(
        [*lines, "", f"{said} {result['machine']}, {result['date']}, Python {result['python']}, {versions}."]
    )


def drawing_table(result: dict[str, Any]) -> str:
    """Pictures a second of each way, beside the stock pipeline's at as many pictures at a time; and the first PNG's."""
    rows = _measured_rows(result)
    timed = [row for row in rows if "s_a_picture" in row]
    stock = {(row["size"], row["pictures_at_a_time"]): row for row in timed if row["name"].startswith("diffusers")}
    lines = ["| | px | at a time | pictures/s | of the pipeline's, 4 at a time | 1 at a time | GiB | of its | off by |"]
    lines.append("| --- |" + " ---: |" * 8)
    for row in sorted(timed, key=lambda row: -row["size"]):
        ratios = [_of_stock(row, stock.get((row["size"], count)), "s_a_picture") for count in (4, 1)]
        like = stock.get((row["size"], row["pictures_at_a_time"])) or stock.get((row["size"], 4))
        gib = f"{row['allocated_gib']:.2f}" if "allocated_gib" in row else ""
        ratio = f"{row['allocated_gib'] / like['allocated_gib']:.2f}" if like and like.get("allocated_gib") else ""
        cells = [row["name"], row["size"], row["pictures_at_a_time"], f"{1 / row['s_a_picture']:.2f}", *ratios]
        lines.append(f"| {' | '.join(map(str, [*cells, gib, ratio, row.get('mean_off_by', '')]))} |")
    first = [row for row in rows if "first_png_s" in row]
    if first:
        lines += ["", "| from process start to the first PNG | seconds | GiB |", "| --- | ---: | ---: |"]
        lines += [f"| {row['name']} | {row['first_png_s']:.1f} | {row['device_gib']:.2f} |" for row in first]
    off = result.get("miniature", {}).get("mean_off_by")
    trained = (
        f" On the miniature's trained weights merging changes pictures by {off:.2f}/255." if off is not None else ""
    )
    said = (
        f"SD3-Medium with random weights and a LoRA of rank {result['lora_rank']}, fp16, {result['steps']} steps, "
        "guidance 7, embeddings given, PNGs written; after the first batch. GiB: the most that tensors took. Off by: "
        f"the mean difference of pixels, of 255, from the row that it changes.{trained}"
    )
    return "\n".join([*lines, "", f"{said} {_measured_on(result)}"])


def _of_stock(row: dict[str, Any], stock: dict[str, Any] | None, key: str) -> str:
    return f"{stock[key] / row[key]:.2f}" if stock else ""


# Columns of each set's table, by the name of what they show.
_STAGES = {
    "encoders": {"dtype": "dtype", "channels last": "channels_last", "batch": "batch", "": "extra"}
    | {"ms a picture": "ms_an_item", "GiB beside the weights": "beside_weights_gib", "mean off by": "mean_relative"},
    "decoders": {"dtype": "dtype", "channels last": "channels_last", "tiles px": "tile_px", "": "extra"}
    | {"ms a picture": "ms_an_item", "GiB beside the weights": "beside_weights_gib"},
    "latents": {"photos to latents": "name", "photo px": "photo_px", "photos": "items", "seconds": "elapsed_s"}
    | {"ms each": "ms_an_item", "the reference's way, s": "reference_s", "ratio": "ratio"}
    | {"mean off by": "mean_relative", "std off by": "std_relative"},
    "text": {"captions to embeddings": "name", "captions": "items", "seconds": "elapsed_s", "ms each": "ms_an_item"}
    | {"the reference's way, s": "reference_s", "ratio": "ratio", "off by": "embeds_relative"},
    "job": {"the whole job": "name", "steps": "steps", "ms a step": "ms_a_step", "seconds": "elapsed_s"}
    | {"starting": "start_s", "compiling": "compile_s", "with 500 steps, s": "job_s", "times ours": "ratio"}
    | {"of the build before": "of_before", "device GiB": "device_gib"},
    "gpus": {"stage one": "name", "GPUs": "gpus", "items": "items", "seconds": "elapsed_s", "at work": "work_s"}
    | {"each once": "each_once"},
}


def stages_table(result: dict[str, Any]) -> str:
    """A table for each set that ran."""
    tables = []
    for name, columns in _STAGES.items():
        rows = [row for row in result["rows"] if row["set"] == name and "failed" not in row]
        shown = {title: key for title, key in columns.items() if any(row.get(key) not in (None, "") for row in rows)}
        if any(row.get("name") != "reference" for row in rows):  # alone, where the time was up, it says nothing
            lines = [f"| {' | '.join(shown)} |", "|" + " --- |" * len(shown)]
            lines += [f"| {' | '.join(_stage_cell(key, row.get(key)) for key in shown.values())} |" for row in rows]
            tables.append("\n".join(lines))
    said = f"{result['cores']} cores, {result['decoding_threads']} threads decode. {_measured_on(result)}"
    return "\n\n".join([*tables, said])


def _stage_cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_relative"):
        return f"{100 * value:.2g} %"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def tricks_table(result: dict[str, Any]) -> str:
    """The ladder of `python -m sd3_lora.tricks`: one trick a row, its memory, its step's time, and its numbers.

    Columns of training stand only where a row has them.
    """
    rows, where = _measured_rows(result), "host" if result["device"] == "cpu" else "device"
    trains = any(row["part"] == "training" for row in rows)
    more = " of it loaded | ms a step | numbers |" if trains else ""
    lines = [f"| | by | {where} GiB |{more}", "| --- | --- | ---: |" + (" ---: | ---: | --- |" if trains else "")]
    for row in rows:
        line = f"| {row['name']} | `{row['trick']}` | {row['peak_gib']:.2f} |"
        if row["part"] == "training":
            line += f" {row['before_gib']:.2f} | {row['step_ms']:.0f} | {row['numbers']} |"
        elif trains:
            line += " | | |"
        lines.append(line)
    said = f"The {result['model'].removeprefix('the ')} at {result['resolution_px']} px, one picture at a time"
    machine = f"{result['machine']}, {result['date']}, torch {result['versions']['torch']}"
    numbers = "; numbers: the trained LoRA beside that of an earlier row" if trains else ""
    return "\n".join([*lines, "", f"{said}. {machine}{numbers}."])


def exchange_table(result: dict[str, Any]) -> str:
    """What averaging a gradient takes, by its size."""
    lines = ["| gradient MiB | ms | GB/s each way |", "| ---: | ---: | ---: |"]
    lines += [f"| {row['mib']} | {row['ms']:.2f} | {row['gb_per_s']:.0f} |" for row in result["rows"]]
    versions = f"torch {result['versions']['torch']}"
    return "\n".join([*lines, "", f"{result['gpus']} × {result['machine']}, {result['date']}, {versions}, NCCL."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of results/, or Markdown files to fill.")
    parser.add_argument(
        "--fill", action="store_true", help="Put into Markdown files and notebooks the tables that they name."
    )
    add_choice_of_rows(parser)
    flags = parser.parse_args(argv)
    for path in flags.files:
        if flags.fill:
            fill = filled_notebook if path.suffix == ".ipynb" else filled
            path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print(printed(path, flags.rows, flags.rows_with))
    return 0


def add_choice_of_rows(parser: argparse.ArgumentParser) -> None:
    """The flags that choose among a result's rows."""
    parser.add_argument("--rows", nargs="+", help="Names of the rows to show. Default: all.")
    parser.add_argument("--rows_with", help="Show only the rows that have this text.")


def printed(path: Path, rows: Sequence[str] | None = None, text: str | None = None) -> str:
    """The table of a result, or of its rows with these names, or of it the rows that have a text.

    Raises:
        ValueError: the result has no row of a name.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if rows:
        unknown = set(rows) - {row["name"] for row in result["rows"]}
        if unknown:
            raise ValueError(f"{path} has no rows {sorted(unknown)}")
        result["rows"] = [row for row in result["rows"] if row["name"] in rows]
    lines = printer(path.name)(result).splitlines()
    is_row = [line.startswith("|") and index > 1 for index, line in enumerate(lines)]  # behind the two of the head
    return "\n".join(line for line, row in zip(lines, is_row, strict=True) if not row or text is None or text in line)


def filled(text: str) -> str:
    """A document in which each table stands that a comment above it names by its command."""

    def table_of(found: re.Match[str]) -> str:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("path")
        add_choice_of_rows(parser)
        asked = parser.parse_args(shlex.split(found[2]))
        return f"{found[1]}{printed(PROJECT / asked.path, asked.rows, asked.rows_with)}\n{found[4]}"

    return NAMED.sub(table_of, text)


def filled_notebook(text: str) -> str:
    """A notebook, likewise, in its texts."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = filled("".join(cell["source"])).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
