"""The Colab notebook: what it may hold, and the whole of it on the miniature; and the script that prepares Colab."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from conftest import PROJECT, Result
from huggingface_hub.errors import GatedRepoError
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from peft.import_utils import is_torchao_available
from PIL import Image

NOTEBOOK = PROJECT / "colab" / "sd3_dreambooth_lora_16gb.ipynb"
SAID_THE_SECOND_TIME = {
    "embeddings": "8 prompts, 8 of them done before",
    "latents": "5 of 5 pictures cached before",
    "train": "nothing to do",
    "draw-before": "2 pictures of 128×128, 2 of them drawn before",
    "draw-after": "2 pictures of 128×128, 2 of them drawn before",
}
# Literals, names, imports, calls (a magic is one), assignments, and `or` (a token, or none).
WITHOUT_LOGIC = (
    *(ast.Module, ast.Expr, ast.Assign, ast.Import, ast.ImportFrom, ast.alias, ast.Call, ast.BoolOp, ast.Or),
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.Load, ast.Store),
)


def load_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def python_of(cell: Any) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def parameters_of(cell: Any) -> dict[str, Any]:
    return {node.targets[0].id: ast.literal_eval(node.value) for node in python_of(cell).body}


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("colab_prepare", PROJECT / "colab" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the notebook holds.


def test_outputs_are_cleared_and_a_t4_is_asked_for():
    notebook = load_notebook()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert notebook.metadata["accelerator"] == "GPU"
    assert notebook.metadata["colab"]["gpuType"] == "T4"


def test_the_notebook_holds_no_logic():
    for cell in code_cells(load_notebook()):
        for node in ast.walk(python_of(cell)):
            assert isinstance(node, WITHOUT_LOGIC), f"{cell.id}: {ast.dump(node)}"


def test_every_script_that_it_calls_is_there_and_nothing_installs_the_constraints():
    sources = [cell.source for cell in code_cells(load_notebook())]
    called = set(re.findall(r"!python (\S+\.py)", "\n".join(sources)))
    assert {path for path in called if not (PROJECT / path).is_file()} == set()
    stages = {path.name for path in PROJECT.glob("*.py")} - {"caption_images.py", "draw_class_pictures.py", "app.py"}
    assert {path for path in called if "/" not in path} == stages
    assert not any("constraints" in source or "pip install" in source for source in sources)


def test_its_figures_are_labelled_with_their_machine():
    texts = [cell.source for cell in load_notebook().cells if cell.cell_type == "markdown"]
    with_figures = [index for index, text in enumerate(texts) if re.search(r"\d\.\d+ GiB", text)]
    labels = [index for index, text in enumerate(texts) if "H200" in text]
    assert labels
    assert min(with_figures) >= min(labels)


def numbers_of(value: Any) -> Iterator[float]:
    """All numbers of a result, at any depth."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(part)
    elif isinstance(value, float):
        yield value


def test_its_figures_are_those_of_committed_results():
    results = [json.loads(path.read_text()) for path in (PROJECT / "benchmarks" / "results").glob("*h?00.json")]
    measured = {f"{number:.2f}" for result in results for number in numbers_of(result)}
    whole = {f"{number:.0f}" for result in results for number in numbers_of(result)}
    text = "\n".join(cell.source for cell in load_notebook().cells if cell.cell_type == "markdown")
    gib, ms = re.findall(r"(\d+\.\d+) GiB", text), re.findall(r"(\d+) ms", text)
    assert len(gib) >= 5
    assert len(ms) >= 2
    assert [figure for figure in gib if figure not in measured] == []
    assert [figure for figure in ms if figure not in whole] == []


def test_no_cell_asks_for_what_the_plan_knows_better():
    """All blocks recomputed whatever fits, and 8 bits for a small state."""
    sources = "\n".join(cell.source for cell in code_cells(load_notebook()))
    assert "--gradient_checkpointing" not in sources
    assert "--use_8bit_adam" not in sources


def test_an_empty_repository_stops_the_notebook_with_a_sentence(tmp_path: Path):
    notebook = load_notebook()
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("parameters", "project")]
    parameters, project = notebook.cells
    parameters.source = f"REPOSITORY = ''\nPROJECT = {str(tmp_path / 'sd3-lora')!r}"
    with pytest.raises(CellExecutionError, match="No such file"):
        NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    assert "fill in REPOSITORY in the cell above" in printed(project)


def test_a_drive_that_is_not_mounted_stops_the_notebook_with_a_sentence():
    """As after a reconnect: else the work would start at zero, in a folder of the machine."""
    notebook = load_notebook()
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("parameters", "folders")]
    parameters, folders = notebook.cells
    parameters.source = "OUTPUT, PHOTOS = '/content/drive/MyDrive/my lora', '/content/dog'"
    resources = {"metadata": {"path": str(PROJECT)}}
    with pytest.raises(CellExecutionError, match="returned non-zero exit status 2"):
        NotebookClient(notebook, timeout=60, kernel_name="python3", resources=resources).execute()
    assert "error: the Drive is not mounted, and /content/drive/MyDrive/my lora would be a folder" in printed(folders)


def test_folders_of_a_mounted_drive_and_of_the_machine(prepare, tmp_path, monkeypatch, capsys):
    assert prepare.main(["folders", "/content/output", str(tmp_path)]) == 0
    monkeypatch.setattr(prepare, "DRIVE", tmp_path)
    assert prepare.main(["folders", "/content/output", str(tmp_path / "MyDrive" / "dog")]) == 2
    assert capsys.readouterr().err.startswith("error: the Drive is not mounted")
    (tmp_path / "MyDrive").mkdir()
    assert prepare.main(["folders", "/content/output", str(tmp_path / "MyDrive" / "dog")]) == 0


# The whole of it, in a kernel, on the miniature.


def test_the_notebook_runs_from_top_to_bottom_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[..., Result]
):
    notebook = load_notebook()
    cells = {cell.id: cell for cell in code_cells(notebook)}
    values = {
        "REPOSITORY": "",
        "PROJECT": str(PROJECT),
        "OUTPUT": str(tmp_path / "out put"),  # a Drive's folders have spaces
        "PHOTOS": str(PROJECT / "examples" / "robot"),
        "PROMPT": "a photo of sks robot",
        "NEW_PROMPT": "a photo of sks robot in a bucket",
        "MODEL": str(PROJECT / "miniature"),
        "RESOLUTION": 128,
        "STEPS": 2,
        "ACCUMULATION": 2,
        "DRAWING_STEPS": 2,
        "MINIATURE_STEPS": 2,
    }
    assert cells["parameters"].metadata["tags"] == ["parameters"]
    assert parameters_of(cells["parameters"]).keys() == values.keys()
    cells["parameters"].source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # !python is this one
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elsewhere, output = tmp_path / "elsewhere", Path(values["OUTPUT"])
    elsewhere.mkdir()
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(elsewhere)}}
    ).execute()

    text = "\n".join(map(printed, cells.values()))
    assert "error:" not in text, text
    assert "Traceback" not in text, text
    assert "kept torch" in text
    assert "you have access" in text
    assert "no robot in it" in printed(cells["miniature"])
    assert "one block at a time" in printed(cells["embeddings"])
    assert all("no text encoder is loaded" in printed(cells[name]) for name in ("draw-before", "draw-after"))
    for name in ("miniature-pictures", "look"):
        assert cells[name].outputs[-1].data["image/png"]
    assert list(elsewhere.iterdir()) == []
    pictures = sorted(path.relative_to(output).as_posix() for path in output.glob("[ab]*/*/*.png"))
    assert pictures == [
        f"{row}/{name}/img_00.png"
        for row in ("after", "before")
        for name in ("000_a-photo-of-sks-robot", "001_a-photo-of-sks-robot-in-a-bucket")
    ]

    # Each script's cell again, in this process: five imports less.
    kept = [path for path in output.rglob("*") if path.suffix in (".png", ".safetensors")]
    written = {
        path: path.stat().st_mtime_ns for path in kept if path.stem != "contact_sheet"
    }  # each run writes its own
    assert len(written) > 20
    for name, said in SAID_THE_SECOND_TIME.items():
        program, *words = shlex.split(cells[name].source.replace("\\\n", " ").format(**values))
        assert program == "!python"
        result = script(Path(words[0]).stem, *words[1:])
        assert result.code == 0, result.err
        assert said in result.out
    assert written == {path: path.stat().st_mtime_ns for path in written}


# colab/prepare.py


class FakePip:
    """Notes what it is asked, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prepare: ModuleType, code: int = 0):
        self.commands: list[list[str]] = []
        self.code = code
        monkeypatch.setattr(prepare, "run_pip", self)

    def __call__(self, words: Sequence[str]) -> int:
        self.commands.append([word for word in words if word not in ("--quiet", "--disable-pip-version-check")])
        return self.code


@pytest.fixture
def old_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torchao 0.10.0, as Colab had it."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    metadata = tmp_path / "torchao-0.10.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()
    yield
    is_torchao_available.cache_clear()


def complain(monkeypatch: pytest.MonkeyPatch, prepare: ModuleType, *complaints: str | None) -> None:
    """Has peft say these things, one after another."""
    answers = iter(complaints)
    monkeypatch.setattr(prepare, "lora_complaint", lambda: next(answers))


def test_installing_keeps_torch_and_leaves_the_constraints_alone(prepare, monkeypatch, capsys):
    pip = FakePip(monkeypatch, prepare)
    assert prepare.main(["packages"]) == 0
    (command,) = pip.commands
    assert command[:3] == ["install", "--upgrade-strategy", "only-if-needed"]
    assert f"torch=={prepare.version_of('torch')}" in command
    assert not any(word.startswith("torch>") or "constraints" in word for word in command)
    named = {re.split(r"[<>=]", word)[0] for word in command[3:]}
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert named == {re.split(r"[<>=]", line)[0] for line in lines if not line.startswith("#")}
    assert f"kept torch {prepare.version_of('torch')}" in capsys.readouterr().out


def test_a_failing_pip_is_told(prepare, monkeypatch, capsys):
    FakePip(monkeypatch, prepare, code=1)
    assert prepare.main(["packages"]) == 1
    assert capsys.readouterr().err.startswith("error: pip could not")


def test_what_peft_says_comes_from_a_process_of_its_own(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "ATTACH_A_LORA", "import sys; assert 'torch' not in sys.modules")
    assert prepare.lora_complaint() is None
    monkeypatch.setattr(prepare, "ATTACH_A_LORA", "print('x')\nraise ImportError('torchao is old')")
    assert prepare.lora_complaint() == "ImportError: torchao is old"


@pytest.mark.usefixtures("old_torchao")
def test_an_old_torchao_stops_a_lora_and_is_upgraded_without_its_dependencies(prepare, monkeypatch, capsys):
    with pytest.raises(ImportError, match=r"incompatible version of torchao. Found version 0\.10\.0") as raised:
        exec(prepare.ATTACH_A_LORA, {})
    pip = FakePip(monkeypatch, prepare)
    complain(monkeypatch, prepare, str(raised.value), None)
    assert prepare.mend_torchao() == 0
    assert pip.commands == [["install", "--upgrade", "--no-deps", "torchao"]]
    assert "torchao 0.10.0 stops peft (Found an incompatible version" in capsys.readouterr().out


@pytest.mark.usefixtures("old_torchao")
def test_a_torchao_that_cannot_be_upgraded_is_removed(prepare, monkeypatch):
    pip = FakePip(monkeypatch, prepare, code=1)
    complain(monkeypatch, prepare, "too old", "too old", None)
    assert prepare.mend_torchao() == 0
    assert pip.commands == [["install", "--upgrade", "--no-deps", "torchao"], ["uninstall", "--yes", "torchao"]]


@pytest.mark.usefixtures("old_torchao")
def test_a_torchao_that_peft_accepts_stays(prepare, monkeypatch, capsys):
    pip = FakePip(monkeypatch, prepare)
    complain(monkeypatch, prepare, None)
    assert prepare.mend_torchao() == 0
    assert pip.commands == []
    assert capsys.readouterr().out == "kept torchao 0.10.0\n"


@pytest.mark.usefixtures("old_torchao")
def test_what_no_torchao_explains_is_told(prepare, monkeypatch, capsys):
    FakePip(monkeypatch, prepare)
    complain(monkeypatch, prepare, "ImportError: x", "ImportError: x", "ImportError: x")
    assert prepare.mend_torchao() == 1
    assert "cannot attach a LoRA (ImportError: x)" in capsys.readouterr().err


def test_a_closed_licence_gate_is_told_at_once(prepare, monkeypatch, capsys):
    asked = []

    def refuse(_model: str, name: str, **_: object) -> str:
        asked.append(name)
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("sd3_lora.common.model_files.hf_hub_download", refuse)
    assert prepare.main(["access", "someone/gated"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: someone/gated is gated: accept its licence at https://huggingface.co/someone/gated")
    assert asked == ["model_index.json"]


def test_example_photos_are_not_put_among_ones_own(prepare, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    assert prepare.main(["photos", str(tmp_path)]) == 0
    assert "1 picture" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_example_photos_are_fetched_into_an_empty_folder(prepare, tmp_path, monkeypatch, capsys):
    def download(_dataset: str, **options: Any) -> None:
        (options["local_dir"] / ".cache").mkdir(parents=True)
        (options["local_dir"] / ".cache" / "note.json").write_text(json.dumps({}), encoding="utf-8")
        Image.new("RGB", (8, 8)).save(options["local_dir"] / "alvan.jpeg")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert prepare.main(["photos", str(tmp_path / "dog")]) == 0
    assert capsys.readouterr().out.startswith("1 picture of diffusers/dog-example")


def test_example_photos_without_a_connection(prepare, tmp_path, capsys):
    assert prepare.main(["photos", str(tmp_path / "dog")]) == 2  # the tests are offline
    assert "put photos of your own into" in capsys.readouterr().err
