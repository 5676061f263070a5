"""What app.py says where it cannot start, and whom it warns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import app

import pytest


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The flags with which the page would be served, if Gradio were here."""
    launched = list[Any]()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace())
    monkeypatch.setattr(app, "Page", lambda root: root)
    monkeypatch.setattr(app, "launch", lambda root, flags: launched.append((root, flags)))
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    return launched


def test_without_gradio_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert app.main(["--output_dir", str(tmp_path / "projects")]) == 2
    assert capsys.readouterr().err == "error: the page needs Gradio: type `pip install -r requirements-app.txt`\n"
    assert not (tmp_path / "projects").exists()


def test_it_listens_at_this_machine_alone_unless_asked(launched: list[Any], tmp_path: Path, capsys: Any) -> None:
    assert app.main(["--output_dir", str(tmp_path)]) == 0
    ((root, flags),) = launched
    assert (root, flags.host) == (tmp_path, "127.0.0.1")
    assert "warning" not in capsys.readouterr().out
    assert app.main(["--output_dir", str(tmp_path), "--host", "0.0.0.0"]) == 0
    assert "warning: at 0.0.0.0 whoever reaches this machine" in capsys.readouterr().out


def test_nothing_is_sent_and_uploads_stay_in_its_folder(launched: list[Any], tmp_path: Path) -> None:
    assert app.main(["--output_dir", str(tmp_path)]) == 0
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert Path(app.os.environ["GRADIO_TEMP_DIR"]).is_relative_to(tmp_path)


@pytest.mark.parametrize("flags", [["--port", "0"], ["--port", "70000"], ["--host", ""]])
def test_wrong_flags_are_one_sentence(flags: list[str], capsys: Any) -> None:
    assert app.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {flags[0]}")
