"""The record of a run: its identity, facts and results, each in one place.

`run.json`, a LoRA's metadata, the model card and the benchmarks' tables are all made from it; no program reads
sentences.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import DamagedError, with_checksum, without_checksum
from sd3_lora.common.command_line import print_in_rank_0, write_text_atomically
from sd3_lora.common.stage_report import StageReport

MOST_PROMPTS = 20  # that are written down: a folder may hold 10,000 captions


def flag_defaults(groups: Iterable[type]) -> dict[str, Any]:
    """`--flag` → its default, of all flags of some dataclasses that have one."""
    defaults: dict[str, Any] = {}
    for group in groups:
        for flag in fields(group):
            if flag.default is not MISSING:
                defaults[f"--{flag.name}"] = flag.default
            elif flag.default_factory is not MISSING:
                defaults[f"--{flag.name}"] = flag.default_factory()
    return defaults


def recorded_flags(path: Path, group: type) -> dict[str, Any]:
    """What an earlier command was told beyond defaults, as its `run.json` says; nothing where there is none.

    Args:
        path: of the record.
        group: whose flags are read, without those that say where to write and whether to replace it.
    """
    try:
        flags = without_checksum(json.loads(path.read_text(encoding="utf-8")))["flags"].items()
    except DamagedError as error:
        print_in_rank_0(f"note: {path} is damaged, {error}: not used; the next run of its script writes it anew")
        return {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        print_in_rank_0(f"note: {path} is damaged or of another program, and not used")
        return {}
    defaults = flag_defaults([group])
    names = {name.removeprefix("--") for name in defaults} - {"output_path", "overwrite"}
    return {name: value for name, value in flags if name in names and value != defaults[f"--{name}"]}


def recorded_results(path: Path) -> dict[str, Any] | None:
    """The results in a `run.json`: none of a run that goes on or was killed; None where it is not there, or damaged."""
    try:
        values = without_checksum(json.loads(path.read_text(encoding="utf-8")))
        return {each.name: values[each.name] for each in fields(RunResults) if each.name in values}
    except (DamagedError, OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class NotedPicture:
    """A picture that a run is trained on, noted to tell what changed.

    Attributes:
        image_id: sha256 of the file's bytes.
        name: of the file; empty where it is not known.
        prompt: its caption.
        crops: the cached crops that are drawn from.
        other_prompts: further captions.
        repeats: how many times it comes in a pass.
    """

    image_id: str
    name: str
    prompt: str
    crops: tuple[str, ...]
    other_prompts: tuple[str, ...] = ()
    repeats: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What of it decides a run's numbers. What came later stands there only where it is no default."""
        more = (self.other_prompts, self.repeats)
        return (self.image_id, self.prompt, self.crops, *(() if more == ((), 1) else more))


@dataclass(frozen=True)
class RunIdentity:
    """What decides a run's numbers, and so must not change when it is resumed.

    Attributes:
        values: flag or noun → its value, as plain JSON types.
        defaults: flag → its default, which is the value of a flag in a run of a build that did not have it.
        synonyms: flag or noun → other values that mean the same as its value.
        pictures: behind the hash in `values`; noted to tell what changed, not compared.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    synonyms: Mapping[str, Collection[Any]] = field(default_factory=dict)
    pictures: Sequence[NotedPicture] = ()

    def changed(self, saved: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """What had another value in an earlier run: the name, the value then, the value now.

        Args:
            saved: the earlier run's `values`.
        """
        before = {name: saved.get(name, self.defaults.get(name)) for name in self.values}
        return [
            (name, before[name], value)
            for name, value in self.values.items()
            if before[name] != value and before[name] not in self.synonyms.get(name, ())
        ]

    def unknown(self, saved: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """What an earlier run's identity has and this build does not know: the name, and the value then."""
        return [(name, value) for name, value in saved.items() if name not in self.values]


@dataclass(frozen=True)
class RunFacts:
    """The inputs and settings of a run, known before it begins. None is what a script does not have.

    Attributes:
        model: hub id or folder, as the user gave it.
        revision: the hub's commit; None for a folder.
        versions: of the libraries.
        precision: of the weights that compute: int8, nf4, fp16, bf16 or fp32.
        processes: how many compute.
        plan: the placement's fields, and the bytes of pinned host memory.
        predicted_parts: the predicted peak in bytes, by part; empty without a budget.
        prompts: the distinct captions of the subject's pictures, or the drawn prompts: the first 20.
        trigger: the prompt that draws the subject.
        resolution: side of the crops in pixels.
        max_sequence_length: T5 tokens of a prompt.
        seed: of every draw.
    """

    model: str
    revision: str | None
    versions: Mapping[str, str]
    precision: str
    processes: int = 1
    plan: Mapping[str, Any] = field(default_factory=dict)
    predicted_parts: Mapping[str, int] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    trigger: str | None = None
    resolution: int | None = None
    max_sequence_length: int | None = None
    seed: int | None = None

    @property
    def base_model(self) -> str:
        """The model as strangers may know it: its hub id, or its folder's name without the path."""
        return self.model if self.revision else Path(self.model).name

    @property
    def predicted_bytes(self) -> int:
        """The predicted peak; 0 where nothing was predicted."""
        return sum(self.predicted_parts.values())


@dataclass(frozen=True)
class RunResults:
    """The results of a run. None is what a script does not have.

    Attributes:
        wrote: a path, or a count and a folder, to be shown.
        stages: the time and peak memory of each stage.
        measured_bytes: the peak on the device; 0 without a GPU.
        steps: optimizer steps in all, those of earlier commands included.
        ms_a_step: milliseconds of an optimizer step, warm.
        execution: how micro-steps were carried out in the end, whatever had been chosen.
        loss: the mean of the last steps.
        skipped: steps that the gradient scaler skipped.
    """

    wrote: str
    stages: Sequence[StageReport]
    measured_bytes: int = 0
    steps: int | None = None
    ms_a_step: float | None = None
    execution: Mapping[str, Any] | None = None
    loss: float | None = None
    skipped: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run: the resolved flags, and the three parts.

    Attributes:
        flags: the groups of flags, dataclasses.
        facts: the inputs and settings.
        identity: compared on resume; empty where the artefacts' provenance is compared instead.
    """

    flags: Sequence[Any]
    facts: RunFacts
    identity: RunIdentity = field(default_factory=lambda: RunIdentity({}))

    def to_dict(self, results: RunResults | None) -> dict[str, Any]:
        """As `run.json` has it: plain types in a fixed order, without what the script does not have."""
        flags = {name: value for group in self.flags for name, value in asdict(group).items()}
        facts = {**asdict(self.facts), "predicted_bytes": self.facts.predicted_bytes}
        identity = {"identity": dict(self.identity.values)} if self.identity.values else {}
        values = {"flags": flags, **identity, **facts, **(asdict(results) if results else {})}
        return {name: value for name, value in values.items() if value is not None}

    def save(self, path: Path, results: RunResults | None) -> None:
        """Writes `run.json`, atomically; without results that of a run that goes on."""
        content = json.dumps(with_checksum(self.to_dict(results)), indent=1, ensure_ascii=False)
        write_text_atomically(path, content + "\n")
