"""Data sets of the library `datasets`, which need not be installed: these tests have a small one in its place."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import PictureFlags
from sd3_lora.stage_one.data_sets import with_folder

import pytest
from conftest import TRAINING_SCRIPT, Result, save_pictures

INSTALLED = importlib.util.find_spec("datasets") is not None


@dataclass
class Kind:
    """Stands for `datasets.Image` and for all other kinds of column."""

    decode: bool = True


class Other:
    """Some other kind of column."""


@dataclass
class Rows:
    """Stands for `datasets.Dataset`."""

    features: dict[str, Any]
    rows: Sequence[dict[str, Any]]

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert not self.features["image"].decode  # bytes are to stay as they are
        return iter(self.rows)

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self.features[name] for name in names}, [{n: row[n] for n in names} for row in self.rows])

    def cast_column(self, name: str, kind: Any) -> Rows:
        return Rows({**self.features, name: kind}, self.rows)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three rows of a data set in the working folder, with which `load_dataset` answers; a test may change them."""
    monkeypatch.chdir(tmp_path)
    paths = save_pictures(tmp_path / "source", [(64, 64), (70, 64), (64, 90)])
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": paths[0].read_bytes(), "path": None}, "text": "sks dog,\n at sea", "id": 1},
        {"image": {"bytes": None, "path": str(paths[1])}, "text": ["sks dog", "a dog"], "id": 2},
        {"image": {"bytes": paths[2].read_bytes(), "path": "a.png"}, "text": None, "id": 3},
    ]

    def load_dataset(name: str, config: str | None, cache_dir: str | None = None, **_: Any) -> dict[str, Rows]:
        if name == "missing":
            raise ValueError("Couldn't find it.\nLook elsewhere.")
        train = Rows({"id": Other(), "image": Kind(), "text": Other()}, rows)
        return {"test": train} if config == "tests" else {"train": train, "test": train}

    library = ModuleType("datasets")
    library.Image, library.load_dataset, library.__version__ = Kind, load_dataset, "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return rows


def flags(**more: Any) -> PictureFlags:
    return PictureFlags(dataset_name="someone/dogs", **more)


def test_it_is_laid_out_once(
    rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_data_set = flags(caption_column="text", instance_prompt="a dog")
    read = with_folder(with_data_set)
    folder = Path(read.instance_data_dir or "")
    assert read == PictureFlags(instance_data_dir=str(folder), instance_prompt="a dog")
    out = capsys.readouterr().out
    assert "note: of the data set only the split train is read, not test (3)" in out
    assert f"data set someone/dogs: 3 pictures, 2 of them with captions, laid out in {folder}" in out
    assert [path.read_bytes() for path in sorted(folder.glob("*.png"))] == [
        path.read_bytes() for path in sorted(Path("source").glob("*.png"))
    ]
    assert [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "00000.png", "text": "sks dog,\n at sea"},
        {"file_name": "00001.png", "text": ["sks dog", "a dog"]},
    ]
    provenance = json.loads((folder / ".dataset.json").read_text())
    assert provenance["dataset_name"] == "someone/dogs"
    assert (provenance["image_column"], provenance["pictures"], provenance["captions"]) == ("image", 3, 2)
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    assert with_folder(with_data_set) == read
    assert "laid out in" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_a_caption_column_there_are_no_captions(rows: list[dict[str, Any]]) -> None:
    folder = Path(with_folder(flags(image_column="image")).instance_data_dir or "")
    assert not (folder / "metadata.jsonl").exists()
    assert str(folder) != with_folder(flags(image_column="image", caption_column="text")).instance_data_dir


def test_without_the_library(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the library datasets: type `pip install datasets`, or give a folder"):
        with_folder(flags())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption_column": "label"}, "has no column label: give --caption_column one of id, image, text"),
        ({"image_column": "img"}, "has no column img: give --image_column one of id, image, text"),
        (
            {"image_column": "text"},
            "column text of the data set someone/dogs holds no pictures: give --image_column im",
        ),
        ({"caption_column": "id"}, "row 1 of the data set someone/dogs has no text in the column id: give another"),
        ({"dataset_config_name": "tests"}, r"has no split train \(test\)"),
        ({"dataset_name": "missing"}, r"cannot read the data set missing \(Couldn't find it. Look elsewhere\): check"),
    ],
)
def test_what_is_not_there_is_one_sentence_and_nothing_is_written(
    rows: list[dict[str, Any]], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        with_folder(PictureFlags(**{"dataset_name": "someone/dogs", **given}))
    assert len(str(error.value).splitlines()) == 1
    assert not list(Path("dataset_pictures").glob("*") if Path("dataset_pictures").exists() else [])


def test_a_row_without_its_picture(rows: list[dict[str, Any]]) -> None:
    rows[2]["image"] = {"bytes": None, "path": "gone.png"}
    with pytest.raises(UserError, match=r"row 3 of the data set someone/dogs names gone\.png, which cannot be read"):
        with_folder(flags())
    rows[2]["image"] = None
    with pytest.raises(UserError, match="row 3 of the data set someone/dogs has no picture in the column image"):
        with_folder(flags())
    assert not list(Path("dataset_pictures").iterdir())


def test_from_the_data_set_to_the_lora(
    rows: list[dict[str, Any]],
    script: Callable[..., Result],
    tiny_sd3: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each script takes the flags, as README_sd3's yarn-art command has them; what is printed needs no library."""
    model = ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu"]
    words = ["--dataset_name", "someone/dogs", "--caption_column", "text", "--instance_prompt", "a photo of sks dog"]
    result = script("compute_embeddings", *model, *words)
    assert result.code == 0, result.err
    trained = script(TRAINING_SCRIPT, *model, *words, "--max_train_steps", 1, "--report_to", "none")
    assert trained.code == 0, trained.err
    assert "3 pictures at 64 px" in trained.out
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    (command,) = [line for line in result.out.splitlines() if line.startswith("next: ")]
    python, name, *typed = shlex.split(command.removeprefix("next: "))
    assert (python, name) == ("python", "precompute_latents.py")
    assert script("precompute_latents", *typed).code == 0
    prompts = json.loads(Path("sd3-dreambooth-lora/run.json").read_text())["prompts"]
    assert set(prompts) == {"a dog", "sks dog, at sea", "sks dog", "a photo of sks dog"}


@pytest.mark.skipif(not INSTALLED, reason="datasets is not installed")
def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures whose names read like splits, of which the library would drop all but one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = save_pictures(tmp_path / "dogs", [(64, 64), (70, 64), (64, 90)])
    names = ["a_test.png", "b_train.png", "c.png"]
    for path, name in zip(paths, names, strict=True):
        path.rename(path.with_name(name))
    lines = [json.dumps({"file_name": name, "text": f"caption of {name}"}) for name in names]
    (tmp_path / "dogs/metadata.jsonl").write_text("\n".join(lines))
    given = PictureFlags(dataset_name="dogs", caption_column="text")
    folder = Path(with_folder(given, str(tmp_path / "cache")).instance_data_dir or "")
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert captions == [f"caption of {name}" for name in names]
    assert (folder / "00002.png").read_bytes() == (tmp_path / "dogs/c.png").read_bytes()
    with pytest.raises(UserError, match="has no column prompt: give --caption_column one of image, text"):
        with_folder(PictureFlags(dataset_name="dogs", caption_column="prompt"), str(tmp_path / "cache"))
