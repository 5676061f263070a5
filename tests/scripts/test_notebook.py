"""The Colab notebook: what it may hold, and the whole of it on the miniature; and the script that prepares Colab."""

from __future__ import annotations

import ast
import base64
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from sd3_lora.common.placement_flags import BaseFlags, StepFlags

import nbformat
import pytest
from conftest import PROJECT, Result
from hub_server import TOKEN
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
    """Each variable that a cell sets to a literal."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in python_of(cell).body}


def with_values(cell: Any, values: dict[str, Any]) -> None:
    """Fills in a form: other values for variables that the cell sets."""
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"^{name} = .*$", lambda _, name=name, value=value: f"{name} = {value!r}", cell.source, flags=re.MULTILINE
        )
        assert count == 1, name


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"colab_{name}", PROJECT / "colab" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load_module("prepare")


@pytest.fixture(scope="module")
def cells() -> ModuleType:
    return load_module("notebook_cells")


# What the notebook holds.


def test_outputs_are_cleared_and_a_t4_is_asked_for():
    notebook = load_notebook()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert notebook.metadata["accelerator"] == "GPU"
    assert notebook.metadata["colab"]["gpuType"] == "T4"


def test_the_notebook_holds_no_logic():
    """But for the first cell, which has nothing of the project yet."""
    first, *others = code_cells(load_notebook())
    assert first.id == "project"
    for cell in others:
        for node in ast.walk(python_of(cell)):
            assert isinstance(node, WITHOUT_LOGIC), f"{cell.id}: {ast.dump(node)}"


def test_every_script_that_it_calls_is_there_and_nothing_installs_the_constraints():
    sources = [cell.source for cell in code_cells(load_notebook())]
    called = set(re.findall(r"^python (\S+\.py)", "\n".join(sources), re.MULTILINE))
    assert {path for path in called if not (PROJECT / path).is_file()} == set()
    stages = {path.name for path in PROJECT.glob("*.py")} - {"caption_images.py", "draw_class_pictures.py", "app.py"}
    assert {path for path in called if "/" not in path} == stages
    assert not any("constraints" in source or "pip install" in source for source in sources)
    beginnings = [source.splitlines()[0] for source in sources if re.search(r"^python ", source, re.MULTILINE)]
    assert all(line.startswith("%%terminal") for line in beginnings)  # which stops where one fails


def test_what_people_change_is_a_form_field_that_colab_reads():
    cells = {cell.id: cell for cell in code_cells(load_notebook())}
    forms = re.findall(r"^(\w+) = (.*?)  # @param (.*)$", cells["parameters"].source, re.MULTILINE)
    wanted = {"MODEL", "PHOTOS", "IDENTIFIER", "CLASS", "STEPS", "RESOLUTION", "LEARNING_RATE", "VALIDATION_PROMPT"}
    assert wanted <= {name for name, _, _ in forms}
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number"}
    for name, value, form in forms:
        choices = re.match(r"\[.*?\]", form)
        if choices:
            assert ast.literal_eval(value) in [
                *ast.literal_eval(choices[0]),
                *map(_number, ast.literal_eval(choices[0])),
            ]
        else:
            assert json.loads(re.sub(r"(\w+):", r'"\1":', form)) == {"type": kinds[type(ast.literal_eval(value))]}, name
    assert 'REPOSITORY = ""  # @param' in cells["project"].source
    assert 'HUB_REPO = ""  # @param' in cells["push"].source


def _number(text: str) -> Any:
    return int(text) if text.isdigit() else None


def test_the_models_are_the_known_ones():
    known = json.loads((PROJECT / "sd3_lora" / "common" / "known_models.json").read_text())["hub_ids"]
    source = next(cell.source for cell in load_notebook().cells if cell.id == "parameters")
    assert set(re.findall(r'"(stabilityai/[^"]+)"', source)) == set(known.values())


def test_its_tables_are_those_of_committed_results_and_no_other_figure_is_in_it():
    text = NOTEBOOK.read_text(encoding="utf-8")
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    import tables

    assert tables.filled_notebook(text) == text
    texts = [cell.source for cell in load_notebook().cells if cell.cell_type == "markdown"]
    found = [match for each in texts for match in tables.NAMED.finditer(each)]
    assert len(found) == 4
    assert any("as a T4" in match[0] for match in found)
    assert all(re.search(r"NVIDIA \w+.*, 20\d\d-", match[0]) for match in found)
    prose = "\n".join(tables.NAMED.sub("", each) for each in texts)
    assert set(re.findall(r"[\d.]+ (?:GiB|ms)\b", prose)) == {"15 GiB"}  # of a T4


def test_no_cell_asks_for_what_the_plan_knows_better():
    """All blocks recomputed whatever fits, and 8 bits for a small state."""
    sources = "\n".join(cell.source for cell in code_cells(load_notebook()))
    placement = {flag.name for flag in (*fields(BaseFlags), *fields(StepFlags))}
    asked = set(re.findall(r"--(\w+)", sources)) & {*placement, "gradient_checkpointing", "vram_budget_gib"}
    assert asked == set()
    assert "--use_8bit_adam" not in sources
    assert "--mixed_precision" not in sources


def execute(notebook: Any, folder: Path) -> None:
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def stopped_at(notebook: Any, folder: Path) -> tuple[str, list[str]]:
    """The cell at which a notebook stops, and what it shows of the error."""
    with pytest.raises(CellExecutionError):
        execute(notebook, folder)
    (cell,) = [cell for cell in code_cells(notebook) if any(out.output_type == "error" for out in cell.outputs)]
    return cell.id, next(out.traceback for out in cell.outputs if out.output_type == "error")


def only(*names: str) -> Any:
    notebook = load_notebook()
    notebook.cells = [cell for cell in notebook.cells if cell.id in names]
    return notebook


def test_an_empty_repository_stops_the_notebook_with_a_sentence(tmp_path: Path):
    notebook = only("project", "parameters", "folders")
    with_values(notebook.cells[0], {"PROJECT": str(tmp_path / "sd3-lora")})
    cell, shown = stopped_at(notebook, tmp_path)
    assert cell == "project"
    assert shown == ["error: REPOSITORY is empty: type the address of the project into it, and run this cell again"]
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_is_not_there_or_another_stops_the_notebook_with_a_sentence(tmp_path: Path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "another")], check=True)
    project = tmp_path / "sd3-lora"
    for page in ("nowhere", "another/blob/main/colab/notebook.ipynb", "another"):  # the second is the notebook's page
        notebook = only("project", "parameters")
        with_values(notebook.cells[0], {"PROJECT": str(project), "REPOSITORY": str(tmp_path / page)})
        there = project.exists()
        cell, (shown,) = stopped_at(notebook, tmp_path)
        assert cell == "project"
        said = (
            f"{project} is not the project: delete" if there else f"{tmp_path / page.split('/')[0]} was not cloned, or"
        )
        assert shown.startswith(f"error: {said}")
        assert project.exists() == page.startswith("another")


def test_a_notebook_in_the_projects_folder_needs_no_repository(tmp_path: Path):
    notebook = only("project", "parameters", "folders")
    with_values(notebook.cells[1], {"FOLDER": str(tmp_path / "out")})
    for _ in range(2):
        execute(notebook, PROJECT / "colab")
    assert printed(notebook.cells[2]) == f"results go to {tmp_path / 'out'}\n"


# The Drive.

COLAB = """
import os
def mount(path):
    {mount}
def upload():
    open("mine.png", "wb").write(b"x")
def download(path):
    print("the browser saves", os.path.basename(path))
"""
MOUNT = """
    os.makedirs(os.path.join(path, "MyDrive"), exist_ok=True)
    is_mount = os.path.ismount
    os.path.ismount = lambda each: os.fspath(each) == path or is_mount(each)
"""


def fake_colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str = MOUNT) -> None:
    """A machine on which `google.colab` can be imported, by kernels that are started from now on."""
    folder = tmp_path / "packages" / "google" / "colab"
    folder.mkdir(parents=True)
    for name in ("__init__", "drive", "files"):
        (folder / f"{name}.py").write_text(COLAB.format(mount=mount.strip()) if name != "__init__" else "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


@pytest.mark.parametrize(
    "values", [{"SAVE_TO_DRIVE": True}, {"PHOTOS": "DRIVE/MyDrive/dog"}, {"FOLDER": "DRIVE/MyDrive/x"}]
)
@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        (None, "only Colab has one"),
        ("raise ValueError('mount failed')", "mount failed"),
        ("os.makedirs(os.path.join(path, 'MyDrive'))", "it was not allowed"),  # an ordinary folder of that name
    ],
)
def test_a_drive_that_is_not_mounted_stops_the_notebook_with_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cells: ModuleType,
    mount: str | None,
    reason: str,
    values: dict[str, Any],
):
    """As after a reconnect: else the work would start at zero, in a folder of the machine."""
    drive, names = tmp_path / "drive", ("google", "google.colab", "google.colab.drive")
    if mount:
        fake_colab(tmp_path, monkeypatch, mount)
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path / "packages")
    settings = {"FOLDER": str(tmp_path / "out"), "SAVE_TO_DRIVE": False, "PHOTOS": "/content/dog", **values}
    if settings["SAVE_TO_DRIVE"]:
        settings["FOLDER"] = "my lora"
    settings = {
        key: value.replace("DRIVE", str(drive)) if isinstance(value, str) else value for key, value in settings.items()
    }
    with pytest.raises(
        cells.Stop, match=re.escape(f"the Drive is not mounted ({reason}), and {drive}/MyDrive/")
    ) as stop:
        cells.work_folder(settings["FOLDER"], settings["SAVE_TO_DRIVE"], settings["PHOTOS"], str(drive))
    assert stop.value._render_traceback_() == [f"error: {stop.value}"]
    assert not (tmp_path / "out").exists()
    assert not list(drive.glob("MyDrive/*"))


# The cells' functions.


def outputs_of(source: str, tmp_path: Path, settings: str = "") -> Any:
    """What a cell with these lines leaves behind the first cell, which `settings` follow."""
    notebook = only("project", "parameters")
    notebook.cells[0].source += f"\n{settings}"
    notebook.cells[1].source = source
    with contextlib.suppress(CellExecutionError):
        execute(notebook, PROJECT / "colab")
    return notebook.cells[1]


def test_a_value_reaches_its_command_as_it_was_typed(tmp_path: Path):
    source = 'VALUE = """5" of $1 `echo no` \\\\ {} it\'s"""'
    (tmp_path / "script.py").write_text("import sys\nprint(sys.executable)\nprint(sys.argv[1])")
    cell = outputs_of(f'%%terminal\npython "{tmp_path}/script.py" "{{VALUE}}"', tmp_path, source)
    assert printed(cell).splitlines() == [sys.executable, "5\" of $1 `echo no` \\ {} it's"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"IDENTIFIER": " "}, "IDENTIFIER is empty"),
        ({"CLASS": ""}, "CLASS is empty"),
        ({"VALIDATION_PROMPT": ""}, "VALIDATION_PROMPT is empty"),
        (
            {"VALIDATION_PROMPT": "a dog in a bucket"},
            "VALIDATION_PROMPT 'a dog in a bucket' has no {}, the place of 'sks'",
        ),
        ({"FOLDER": ""}, "FOLDER is empty"),
    ],
)
def test_a_form_that_cannot_work_stops_the_notebook_with_a_sentence(
    cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], said: str
):
    monkeypatch.chdir(tmp_path)
    form = {"IDENTIFIER": "sks", "CLASS": "dog", "VALIDATION_PROMPT": "{} in a bucket", "FOLDER": "out", **values}

    def settings_cell() -> None:
        cells.subject_prompt(form["IDENTIFIER"], form["CLASS"])
        cells.validation_prompt(form["VALIDATION_PROMPT"], form["IDENTIFIER"], form["CLASS"])
        cells.work_folder(form["FOLDER"], False, str(tmp_path / "photos"), str(tmp_path / "drive"))

    with pytest.raises(cells.Stop, match=re.escape(said)):
        settings_cell()
    assert cells.subject_prompt(" sks", "dog ") == "a photo of sks dog"
    assert cells.validation_prompt("sks on a sofa", "sks", "dog") == "sks on a sofa"


def test_a_command_that_fails_stops_the_notebook_with_a_sentence(tmp_path: Path):
    cell = outputs_of("%%terminal\necho first\nfalse\necho never", tmp_path)
    assert printed(cell) == "first\n"
    (error,) = [out for out in cell.outputs if out.output_type == "error"]
    assert error.traceback == [
        "error: the command ended with 1: the reason is above; run this cell again once it is mended"
    ]


def test_a_progress_bar_is_one_line_and_its_picture_grows(tmp_path: Path):
    picture = tmp_path / "she et.webp"
    for size in (8, 16):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.webp")
    (tmp_path / "script.py").write_text(
        "import shutil, sys, time\n"
        "print('plan: {all} on the device')\n"
        "for step in range(3):\n"
        f"    shutil.copy({str(tmp_path)!r} + f'/{{8 if step < 2 else 16}}.webp', {str(picture)!r})\n"
        "    print(f'\\rsteps: {step} of 3\\x1b[A', end='', flush=True)\n"
        "    time.sleep(1.2)\n"
        "print('\\rsteps: 3 of 3', flush=True)\n"
        "print(f'\\r               \\rdone in colour, or not', end='')\n"
    )
    line = f'%%terminal --picture "{picture}"\npython "{tmp_path}/script.py"'
    cell = outputs_of(line, tmp_path)
    assert printed(cell).splitlines() == ["plan: {all} on the device", "steps: 3 of 3", "done in colour, or not"]
    status, sheet = [out.data["text/html"] for out in cell.outputs if out.output_type == "display_data"]
    assert re.fullmatch(r"[3-9] s", status)
    shown = base64.b64decode(re.search(r"data:image/webp;base64,([^\"]+)", sheet)[1])
    assert shown == picture.read_bytes() == (tmp_path / "16.webp").read_bytes()


def test_stopping_a_cell_types_ctrl_c_into_its_terminal(cells: ModuleType, tmp_path: Path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nprint('began', flush=True)\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('checkpoint-3 is kept')\n    sys.exit(130)\n"
    )
    states = []

    def update(_: Any) -> None:
        states.append(0)
        if len(states) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cells, "display", lambda *_, **__: SimpleNamespace(update=update))
    assert cells.run(f"{sys.executable} {script}") == 130
    assert "checkpoint-3 is kept" in capsys.readouterr().out


def test_memory_is_shown_with_its_limits(cells: ModuleType, tmp_path: Path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '5734, 15360'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rows = list(cells.memory_in_use())
    assert rows[0] == ("GPU", pytest.approx(5.6, abs=0.01), 15.0)
    assert rows[1][0] == "host"
    assert 0 < rows[1][1] < rows[1][2]
    assert '<progress value="5.60" max="15.00"' in cells.bars(rows)
    assert "5.6 of 15.0 GiB" in cells.bars(rows)


# The whole of it, in a kernel, on the miniature.


VALUES = {
    "MODEL": str(PROJECT / "miniature"),
    "PHOTOS": str(PROJECT / "examples" / "robot"),
    "IDENTIFIER": "sks",
    "CLASS": "robot",
    "VALIDATION_PROMPT": "a photo of {} in a bucket",
    "RESOLUTION": 128,
    "STEPS": 2,
    "ACCUMULATION": 2,
    "LEARNING_RATE": 2e-4,
    "VALIDATION_STEPS": 1,
    "DRAWING_STEPS": 2,
    "SAVE_TO_DRIVE": False,
    "FOLDER": "out put",  # a Drive's folders have spaces
    "MINIATURE_STEPS": 2,
}
TAKEN_HOME = ("lora/pytorch_lora_weights.safetensors", "lora_kohya.safetensors", "lora/report.html")


def test_elsewhere_than_on_colab_results_stay_on_the_machine(tmp_path: Path):
    """The cells that ask whether it is Colab; the others are the same there and here."""
    notebook, output = only("project", "parameters", "folders", "upload", "download"), tmp_path / "out put"
    cells = {cell.id: cell for cell in notebook.cells}
    with_values(cells["parameters"], {**VALUES, "FOLDER": str(output)})
    with_values(cells["upload"], {"UPLOAD": True})
    (output / "lora").mkdir(parents=True)
    for name in TAKEN_HOME:
        (output / name).write_bytes(b"x")
    execute(notebook, PROJECT / "colab")
    assert printed(cells["folders"]) == f"results go to {output}\n"
    assert printed(cells["upload"]) == f"put your photos into {VALUES['PHOTOS']}\n"
    assert printed(cells["download"]) == "".join(f"{output / name}: 0.0 MB\n" for name in TAKEN_HOME)


def test_the_notebook_runs_from_top_to_bottom_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[..., Result]
):
    """On Colab with a Drive, or what looks like them."""
    notebook = load_notebook()
    cells = {cell.id: cell for cell in code_cells(notebook)}
    drive = tmp_path / "drive"
    values = {**VALUES, "SAVE_TO_DRIVE": True, "DRIVE": str(drive)}
    assert cells["parameters"].metadata["tags"] == ["parameters"]
    assert parameters_of(cells["parameters"]).keys() == values.keys()
    with_values(cells["parameters"], values)
    with_values(cells["project"], {"PROJECT": str(PROJECT)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake_colab(tmp_path, monkeypatch)
    elsewhere, output = tmp_path / "elsewhere", drive / "MyDrive" / "out put"
    elsewhere.mkdir()
    execute(notebook, elsewhere)

    text = "\n".join(map(printed, cells.values()))
    assert "error:" not in text, text
    assert "Traceback" not in text, text
    assert f"results go to {output}\n" in text
    assert "kept torch" in text
    assert "you have access" in text
    assert "no robot in it" in printed(cells["miniature"])
    assert "one block at a time" in printed(cells["embeddings"])
    assert "learning rate 0.0002" in printed(cells["train"])
    assert all("no text encoder is loaded" in printed(cells[name]) for name in ("draw-before", "draw-after"))
    for name in ("miniature-pictures", "look"):
        assert '<img src="data:image/png;base64,' in cells[name].outputs[-1].data["text/html"]
    sheets = [out.data["text/html"] for out in cells["train"].outputs if "data" in out]
    assert base64.b64encode((output / "lora/samples/sheet.webp").read_bytes()).decode() in sheets[-1]
    assert list(elsewhere.iterdir()) == []
    for name in TAKEN_HOME:
        assert f"{output / name}: 0." in printed(cells["download"])
        assert f"the browser saves {Path(name).name}" in printed(cells["download"])
    assert printed(cells["push-run"]) == "nothing is uploaded: HUB_REPO is empty\n"
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
    prompt = "a photo of sks robot"
    names = {**values, "OUTPUT": str(output), "PROMPT": prompt, "NEW_PROMPT": f"{prompt} in a bucket"}
    for name, said in SAID_THE_SECOND_TIME.items():
        magic, _, source = cells[name].source.partition("\n")
        program, *words = shlex.split(source.replace("\\\n", " ").format(**names))
        assert (magic.split()[0], program) == ("%%terminal", "python")
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


def test_a_lora_is_pushed_without_photos_and_folders(prepare, tmp_path, capsys, monkeypatch, hub):
    monkeypatch.setattr("sd3_lora.training.hub.get_token", lambda: TOKEN)
    folder = tmp_path / "lora"
    assert prepare.main(["push", str(folder), "my-dog"]) == 2
    assert "run the training cell first" in capsys.readouterr().err
    shutil.copytree(PROJECT / "tests" / "data" / "cc752f5" / "adamw", folder)
    assert prepare.main(["push", str(folder), ""]) == 0
    assert capsys.readouterr().out == "nothing is uploaded: HUB_REPO is empty\n"
    assert prepare.main(["push", str(folder), "no name", "--private", "True"]) == 2
    assert capsys.readouterr().err.startswith("error: --hub_model_id no name is no name that the hub takes")
    assert hub.repos == {}
    assert prepare.main(["push", str(folder), "my-dog", "--private", "True"]) == 0
    assert capsys.readouterr().out == f"uploaded to {hub.url}/alice/my-dog\n"
    assert set(hub.repos["alice/my-dog"]) == {"pytorch_lora_weights.safetensors", "run.json"}
    assert hub.private == {"alice/my-dog"}
    assert prepare.main(["push", str(folder), "another", "--private", "False"]) == 0
    assert hub.private == {"alice/my-dog"}


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
