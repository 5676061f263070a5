"""The upload to the hub, against a stand-in on this machine: what arrives, what never does, and every refusal."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from sd3_lora.common.command_line import Secret
from sd3_lora.transformer.lora import LORA_FILE

import huggingface_hub
import pytest
from conftest import PROMPT, TRAINING_SCRIPT, Prepared, torchrun
from hub_server import TOKEN, Hub, card_data
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from training_runs import Run, Script, train, training_script

PUSH = ["--push_to_hub", "--hub_model_id", "alice/robot"]


def push(script: Script, prepared: Prepared, folder: Path, *words: object, code: int = 0) -> Run:
    """A short run that uploads."""
    return train(script, prepared, folder, "--max_train_steps", 2, *PUSH, "--hub_token", TOKEN, *words, code=code)


def draw_samples(folder: Path) -> None:
    """As validation leaves them."""
    for step in (1, 2):
        (folder / f"samples/step_{step:06d}").mkdir(parents=True)
        text = PngInfo()
        text.add_text("parameters", f"{PROMPT} at sea\nSteps: 2")
        text.add_text("sd3_lora", json.dumps({"prompt": f"{PROMPT} at sea", "model": "/home/me/sd3"}))
        picture = Image.new("RGB", (64, 64), (step, 2, 3))
        picture.save(folder / f"samples/step_{step:06d}/00_robot_00.png", pnginfo=text)
    Image.new("RGB", (9, 9)).save(folder / "samples/sheet.webp")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "out"
    draw_samples(folder)
    run = push(script, prepared, folder)
    assert f"after training: upload to {hub.url}/alice/robot (public)" in run.out
    assert f"uploaded {folder / 'hub'} to {hub.url}/alice/robot" in run.out
    arrived = hub.repos["alice/robot"]
    assert arrived == files_of(folder / "hub")
    assert arrived[LORA_FILE] == (folder / LORA_FILE).read_bytes()
    names = {LORA_FILE, "README.md", "run.json", "samples/sheet.webp", "samples/step_000002/00_robot_00.png"}
    assert set(arrived) == names  # no picture of training, no checkpoint, no losses, no logs
    assert hub.commits == ["LoRA after 2 steps"]
    card = arrived["README.md"].decode()
    data = card_data(card)
    assert data["instance_prompt"] == PROMPT
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "dreambooth"} <= set(data["tags"])
    url = "samples/step_000002/00_robot_00.png"
    assert data["widget"] == [{"text": f"{PROMPT} at sea", "output": {"url": url}}]
    assert "<Gallery />" in card
    assert 'load_lora_weights("alice/robot", weight_name="pytorch_lora_weights.safetensors")' in card
    local, sent = folder / url, folder / "hub" / url
    with Image.open(local) as mine, Image.open(sent) as theirs:
        assert mine.tobytes() == theirs.tobytes()
        assert theirs.text == {"parameters": f"{PROMPT} at sea\nSteps: 2"}  # type: ignore[attr-defined]


def test_nothing_private_arrives(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "out"
    draw_samples(folder)
    push(script, prepared, folder)
    for name, content in hub.repos["alice/robot"].items():
        for private in (str(tmp_path), str(prepared.model.parent), "/home/me", TOKEN):
            assert private.encode() not in content, name
    record = json.loads(hub.repos["alice/robot"]["run.json"])
    assert record["flags"]["pretrained_model_name_or_path"] == record["model"] == prepared.model.name
    assert record["flags"]["rank"] == 4
    assert not [name for name in record["flags"] if "hub" in name]


def test_the_token_is_nowhere(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as users type it, so that what reads `sys.argv` is shown too."""
    shared = [*map(str, prepared.flags), "--device", "cpu", "--max_train_steps", "2", "--output_dir"]
    words = [*shared, str(tmp_path / "out"), *PUSH, f"--hub_token={TOKEN}", "--report_to", "all"]
    monkeypatch.setattr(sys, "argv", [f"{TRAINING_SCRIPT}.py", *words])
    kept: list[str] = []
    monkeypatch.setattr(training_script(), "finish", lambda outputs, *_: kept.append(outputs.kept()))
    assert training_script().main(None) == 0
    assert kept
    assert TOKEN not in kept[0]
    assert "--hub_model_id alice/robot" in kept[0]
    assert not [word for word in sys.argv if TOKEN in word or "hub_token" in word]
    run = push(script, prepared, tmp_path / "out2", "--hub_checkpoints", "all")
    hub.failing["commit"] = (400, f"you sent {TOKEN}", "")
    failed = push(script, prepared, tmp_path / "out3", code=2)
    assert "you sent ***" in failed.error
    for text in (run.out, run.err, failed.out, failed.err):
        assert TOKEN not in text
    for name, content in {**files_of(tmp_path), **hub.repos["alice/robot"]}.items():
        assert TOKEN.encode() not in content, name
    assert str([Secret(TOKEN)]) == "[***]"


def test_a_second_push_updates(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub) -> None:
    push(script, prepared, tmp_path / "out")
    first = dict(hub.repos["alice/robot"])
    hub.repos["alice/robot"]["mine.txt"] = b"put there by hand"
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    push(script, prepared, tmp_path / "out", *more)
    second = hub.repos["alice/robot"]
    assert second[LORA_FILE] == (tmp_path / "out" / LORA_FILE).read_bytes() != first[LORA_FILE]
    assert second["mine.txt"] == b"put there by hand"
    assert hub.commits == ["LoRA after 2 steps", "LoRA after 3 steps"]
    again = push(script, prepared, tmp_path / "out", *more)  # nothing left to train
    assert "nothing to do" in again.out
    assert f"uploaded {tmp_path / 'out' / 'hub'} to " in again.out


@pytest.mark.parametrize("which", ["lora", "all"])
def test_checkpoints(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, which: str) -> None:
    push(script, prepared, tmp_path / "out", "--checkpointing_steps", 1, "--hub_checkpoints", which)
    arrived = hub.repos["alice/robot"]
    for step in (1, 2):
        local = files_of(tmp_path / f"out/checkpoint-{step}")
        del local["run.json"]  # it names folders
        sent = {name: content for name, content in local.items() if which == "all" or name == LORA_FILE}
        prefix = f"checkpoint-{step}/"
        assert {n.removeprefix(prefix): c for n, c in arrived.items() if n.startswith(prefix)} == sent


def test_the_folders_name_and_a_private_one(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub) -> None:
    words = ["--push_to_hub", "--hub_token", TOKEN, "--hub_private"]
    run = train(script, prepared, tmp_path / "my-dog", *words)
    assert f"{hub.url}/alice/my-dog (private)" in run.out
    assert hub.private == {"alice/my-dog"}


def test_two_processes_upload_once(
    prepared: Prepared, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shared = ["--device", "cpu", "--max_train_steps", 1, "--output_dir", tmp_path / "out"]
    result = torchrun(f"{TRAINING_SCRIPT}.py", *prepared.flags, *shared, *PUSH)
    assert result.code == 0, result.out + result.err
    assert hub.requests.count("GET /api/whoami-v2") == len(hub.commits) == 1
    assert LORA_FILE in hub.repos["alice/robot"]


# What is refused before a step is taken

Failing = dict[str, tuple[int, str, str]]
REFUSED: list[tuple[str, list[str], Failing, str]] = [
    ("no token", [], {}, "--push_to_hub needs a token: make a Write token at https://huggingface.co/settings/tokens"),
    ("another's token", ["--hub_token", "hf_other"], {}, "the hub does not know this token"),
    ("another's name", ["--hub_model_id", "bob/x"], {}, "alice may not write to bob/x: type --hub_model_id alice/NAME"),
    ("forbidden", [], {"auth-check": (403, "no", "")}, "alice may not write to alice/robot: type --hub_model_id"),
    ("no model", [], {"models/alice/robot": (404, "", "RepoNotFound")}, "is taken on the hub by something that is no"),
    ("conflict", [], {"repos/create": (409, "taken", "")}, "is taken on the hub by something that is no model"),
    ("broken", [], {"whoami": (500, "out of order", "")}, "cannot be used (500 out of order): type the same command"),
    ("broken later", [], {"create": (500, "oh", "")}, "cannot be used (500 oh): type the same command later"),
]


@pytest.mark.parametrize(("what", "words", "failing", "said"), REFUSED, ids=[what for what, *_ in REFUSED])
def test_refused_before_a_step(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    hub: Hub,
    what: str,
    words: list[str],
    failing: Failing,
    said: str,
) -> None:
    hub.failing = failing
    token = [] if what == "no token" or "--hub_token" in words else ["--hub_token", TOKEN]
    run = train(script, prepared, tmp_path / "out", *PUSH, *token, *words, code=2)
    assert said in run.error
    assert run.wrote_no_weights()


def test_a_token_that_may_only_read(script: Script, prepared: Prepared, tmp_path: Path, hub: Hub) -> None:
    hub.role = "read"
    assert "the token of alice may only read: make a Write token" in push(script, prepared, tmp_path, code=2).error
    assert not hub.repos


def test_a_login_that_has_expired(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    error = train(script, prepared, tmp_path, *PUSH, code=2).error
    assert "the hub does not know this token (that of HF_TOKEN; it may have expired)" in error


def test_one_that_is_public_is_not_taken_for_private(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub
) -> None:
    hub.repos["alice/robot"] = {}
    error = push(script, prepared, tmp_path, "--hub_private", code=2).error
    assert "alice/robot is there already, and public: make it private at" in error


def test_offline_and_out_of_reach(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.close()
    error = push(script, prepared, tmp_path, code=2).error
    assert error.startswith(f"the hub at {hub.url} cannot be used (")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in push(script, prepared, tmp_path, code=2).error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hub_model_id", "a/b"], "--hub_model_id has no effect without --push_to_hub"),
        (["--hub_private"], "--hub_private has no effect without --push_to_hub"),
        (["--push_to_hub", "--hub_model_id", "my dog"], "--hub_model_id my dog is no name that the hub takes"),
        (["--push_to_hub", "--hub_token", "hf_caf\u00e9"], "--hub_token is no token of the hub"),
        (["--push_to_hub", "--hub_token", "hf_a\nb"], "--hub_token is no token of the hub"),
    ],
)
def test_flags_that_cannot_be(script: Script, prepared: Prepared, tmp_path: Path, words: list[str], said: str) -> None:
    run = train(script, prepared, tmp_path, *words, code=2)
    assert said in run.error
    assert "hf_" not in run.err


def test_an_output_folder_that_the_hub_cannot_name(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub
) -> None:
    run = train(script, prepared, tmp_path / "my dog", "--push_to_hub", "--hub_token", TOKEN, code=2)
    assert run.error.startswith("my dog is no name that the hub takes: type another as --hub_model_id")


# What fails after training

LATE: list[tuple[str, tuple[int, str, str], str]] = [
    ("preupload", (401, "Invalid credentials", ""), "401 Invalid credentials"),
    ("lfs/objects", (403, "over the quota", ""), "403 over the quota"),
    ("commit", (409, "another commit came first", ""), "409 another commit came first"),
    ("blobs", (500, "storage is down", ""), "500 storage is down"),
    ("validate-yaml", (400, "bad card", ""), "Invalid metadata in README.md"),
]


@pytest.mark.parametrize(("where", "failure", "reason"), LATE, ids=[where for where, *_ in LATE])
def test_a_failed_upload_loses_nothing(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, where: str, failure: tuple[int, str, str], reason: str
) -> None:
    hub.failing[where] = failure
    run = push(script, prepared, tmp_path / "out", code=2)
    folder = tmp_path / "out" / "hub"
    command = f"`hf auth login`, then `hf upload alice/robot {folder} .`"
    assert run.error == f"{folder} is kept, but was not uploaded ({reason}): type {command}"
    assert len(run.lora) == 30
    assert "next: python inference.py" in run.out
    hub.failing.clear()
    words = shlex.split(command.split("`")[3])
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    if where == "commit":  # once: it takes seconds
        program = str(Path(sys.executable).with_name(words[0]))
        environment["PATH"] = environment["HOME"] = str(tmp_path)
        typed = subprocess.run([program, *words[1:]], env=environment, capture_output=True, text=True, check=False)
        assert typed.returncode == 0, typed.stdout + typed.stderr
        assert hub.repos["alice/robot"] == files_of(folder)


def test_ctrl_c_while_it_uploads(
    script: Script, prepared: Prepared, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", interrupt)
    run = push(script, prepared, tmp_path / "out", code=130)
    assert "is kept, but not uploaded; to upload it, type `hf auth login`, then `hf upload alice/robot " in run.err
    assert len(run.lora) == 30
