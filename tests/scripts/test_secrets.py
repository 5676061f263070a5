"""Secrets appear in nothing that a run writes or prints, and a run asks nothing of the network."""

from __future__ import annotations

import importlib
import io
import re
import socket
import sys
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, exit_code, first_line, without_secrets

import pyarrow.parquet as pq
import pytest
from conftest import PROMPT, TRAINING_SCRIPT, Prepared
from PIL import Image
from training_runs import Script

TOKEN, KEY, PASSWORD = "hf_canaryCanaryCANARY0123456789", "c0ffee" * 6, "canary-password-1"
SECRETS = (TOKEN, KEY, PASSWORD)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The secrets of someone who is logged in everywhere: in the environment, in a file, and in a URL."""
    token_path = tmp_path / "home" / "token"
    token_path.parent.mkdir()
    token_path.write_text(TOKEN, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(token_path))
    for name, value in (("HF_TOKEN", TOKEN), ("WANDB_API_KEY", KEY), ("COMET_API_KEY", KEY)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", f"http://alice:{PASSWORD}@127.0.0.1:9")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The network is closed, and huggingface_hub does not know that it should not ask; returns who was asked."""
    asked: list[Any] = []

    def refuse(_: Any, address: Any, *more: Any) -> None:
        asked.append(address)
        raise OSError("the network is closed")

    def look_up(host: Any, *more: Any, **named: Any) -> None:
        asked.append(host)
        raise socket.gaierror("the network is closed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def texts_of(path: Path) -> str:
    """All that a file says, unpacked where it is packed."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        texts = [table.column(name).to_pylist() for name in table.column_names if "embeds" not in name]
        return f"{table.schema.metadata}{texts}"
    if path.suffix in (".png", ".webp"):
        with Image.open(io.BytesIO(content)) as picture:
            return f"{picture.info}{content!r}"
    return content.decode("latin-1")


def test_a_whole_job_sends_nothing_and_writes_no_secret(
    script: Script, prepared: Prepared, tmp_path: Path, secrets: None, closed: list[Any]
) -> None:
    out, said = tmp_path / "job", []

    def run(name: str, *words: object) -> None:
        result = script(name, *words)
        assert result.code == 0, result.err
        said.append(result.out + result.err)

    model = ["--pretrained_model_name_or_path", prepared.model]
    pictures = [*model, "--instance_data_dir", prepared.pictures, "--device", "cpu"]
    text = ["--instance_prompt", PROMPT, "--max_sequence_length", 20, "--output_path", out / "e.parquet"]
    run("compute_embeddings", *pictures, *text)
    run("precompute_latents", *pictures, "--output_path", out / "latents")
    artefacts = ["--data_df_path", out / "e.parquet", "--latents_path", out / "latents", "--instance_prompt", PROMPT]
    training = ["--output_dir", out / "lora", "--max_train_steps", 2, "--checkpointing_steps", 1, "--seed", 0]
    training += ["--validation_prompt", PROMPT, "--validation_num_steps", 1, "--export", "kohya"]
    run(TRAINING_SCRIPT, *pictures, *artefacts, *training, "--report_to", "all")
    drawing = ["--lora", out / "lora", "--prompt", PROMPT, "--data_df_path", out / "e.parquet", "--num_steps", 1]
    run("inference", *model, *drawing, "--outdir", out / "images", "--device", "cpu")
    assert closed == []
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {".parquet", ".safetensors", ".png", ".json", ".jsonl", ".html", ".md"} <= {path.suffix for path in files}
    for name, content in [*((str(path), texts_of(path)) for path in files), *(("printed", each) for each in said)]:
        assert not [secret for secret in SECRETS if secret in content], name


@pytest.mark.parametrize("name", ["compute_embeddings", "precompute_latents", TRAINING_SCRIPT, "inference"])
def test_no_sentence_repeats_a_secret(script: Script, tmp_path: Path, secrets: None, name: str) -> None:
    url = f"https://alice:{PASSWORD}@huggingface.co/some/sd3"
    for words in (["--pretrained_model_name_or_path", url], ["--hub_tokn", TOKEN], [f"--hub_tokn={TOKEN}"], [TOKEN]):
        result = script(name, *words)
        assert result.code == 2
        assert not [secret for secret in SECRETS if secret in result.out + result.err], result.err


def test_nor_does_a_traceback(
    capsys: pytest.CaptureFixture[str], secrets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # so that it is put back

    def fail(_: Any) -> None:
        raise RuntimeError(f"401 for {TOKEN}, {KEY} at https://alice:{PASSWORD}@hub/x")

    with pytest.raises(RuntimeError) as caught:
        exit_code(fail, [])
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert "RuntimeError: 401 for ***, *** at https://***@hub/x" in said
    assert not [secret for secret in SECRETS if secret in re.sub(r"raise .*", "", said)]
    assert first_line(UserError(f"no {KEY}")) == "no ***"


def test_what_is_no_secret_stays() -> None:
    text = "hf_transfer, https://huggingface.co/a/b and me@home are in C:/x and https://a/b@c"
    assert without_secrets(text) == text


def test_the_scripts_are_all_here() -> None:
    """What `exit_code` masks, it masks in each script."""
    root = Path(importlib.import_module(TRAINING_SCRIPT).__file__ or "").parent
    for path in root.glob("*.py"):
        assert "exit_code(" in path.read_text(encoding="utf-8"), path.name
