"""Checkpoints: exact, whole, without pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.training.checkpoints import (
    UnfinishedCheckpoint,
    checkpoint_folders,
    find_checkpoint,
    pack,
    read_state,
    remove_old_checkpoints,
    require_own_checkpoints,
    unpack,
    write_state,
)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def make_checkpoint(output_dir: Path, step: int, state: dict[str, Any] | None = None) -> Path:
    with UnfinishedCheckpoint(output_dir, step) as folder:
        write_state(folder, state or {"step": step})
    return output_dir / f"checkpoint-{step}"


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_a_nested_state_round_trips(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "8bit": torch.arange(5, dtype=torch.uint8)}, 1: {}}},
        "betas": (0.9, 0.999),
        "list": [None, True, 1, 1e-45, 0.1, "ä/{}"],
        "same": [shared, shared],  # bitsandbytes' quantization maps are shared
        "view": torch.arange(6).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": {},
        "a dict that looks packed": {"tensor": "optimizer"},
    }
    write_state(tmp_path, state)
    assert same(read_state(tmp_path), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((tmp_path / "state.json").read_text())


_LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
_KEYS = st.integers(0, 9) | st.text(max_size=4)


@given(
    st.dictionaries(
        _KEYS,
        st.recursive(
            _LEAVES | st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_plain_state_round_trips(state: dict[Any, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(state, tensors)))
    assert same(unpack(packed, tensors), state)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"/optimizer/0 is a \w*Path, which"):
        pack({"optimizer": [Path("a")]}, {})


def test_eight_bit_adam_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def make(generator: torch.Generator) -> tuple[torch.nn.Parameter, torch.nn.Parameter, AdamW8bit]:
        large, small = (torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (4096, 100))
        return large, small, AdamW8bit([large, small], lr=0.1)

    def steps(large: torch.nn.Parameter, small: torch.nn.Parameter, optimizer: AdamW8bit, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in (large, small):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    large, small, optimizer = make(torch.Generator().manual_seed(0))
    steps(large, small, optimizer, range(3))
    write_state(tmp_path, {"optimizer": optimizer.state_dict(), "parameters": [large, small]})
    steps(large, small, optimizer, range(3, 6))

    other_large, other_small, other = make(torch.Generator().manual_seed(1))
    state = read_state(tmp_path)
    with torch.no_grad():
        for parameter, saved in zip((other_large, other_small), state["parameters"], strict=True):
            parameter.copy_(saved)
    other.load_state_dict(state["optimizer"])
    steps(other_large, other_small, other, range(3, 6))
    assert other.state[other_large]["state1"].dtype == torch.uint8
    assert other.state[other_small]["state1"].dtype == torch.float32
    assert torch.equal(large, other_large)
    assert torch.equal(small, other_small)
    assert torch.equal(optimizer.state[large]["state2"], other.state[other_large]["state2"])


def test_find_checkpoint(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    assert find_checkpoint("latest", output_dir) is None
    made = {step: make_checkpoint(output_dir, step) for step in (5, 10, 9)}
    (output_dir / "checkpoint-notes").mkdir()
    (output_dir / "checkpoint-99").mkdir()  # without a state: not a whole one
    assert find_checkpoint("latest", output_dir) == made[10]  # by number, not by letters
    assert checkpoint_folders(output_dir) == [made[5], made[9], made[10]]
    assert find_checkpoint("checkpoint-5", output_dir) == made[5]
    assert find_checkpoint(str(made[9]), tmp_path / "elsewhere") == made[9]
    with pytest.raises(
        UserError, match=r"checkpoint-7 is not there; .* checkpoint-5, checkpoint-9, checkpoint-10: type"
    ):
        find_checkpoint("checkpoint-7", output_dir)
    with pytest.raises(UserError, match="holds none: type latest or a path"):
        find_checkpoint("checkpoint-7", tmp_path / "elsewhere")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 5, {"step": 5, "old": True})
    with pytest.raises(TypeError, match="which a checkpoint cannot hold"), UnfinishedCheckpoint(tmp_path, 5) as folder:
        write_state(folder, {"step": 5, "old": False, "path": tmp_path})
    assert list(tmp_path.iterdir()) == [made]
    assert read_state(made) == {"step": 5, "old": True}
    make_checkpoint(tmp_path, 5, {"step": 5, "old": False})
    assert list(tmp_path.iterdir()) == [made]
    assert read_state(made) == {"step": 5, "old": False}


def test_a_killed_write_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    write_state(UnfinishedCheckpoint(tmp_path, 6).__enter__(), {"step": 6})  # and never left
    made = make_checkpoint(tmp_path, 5)
    assert checkpoint_folders(tmp_path) == [made]
    remove_old_checkpoints(tmp_path, None)
    assert list(tmp_path.iterdir()) == [made]


def test_the_oldest_go_first(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (2, 10, 9, 100)]
    remove_old_checkpoints(tmp_path, 10)
    assert len(checkpoint_folders(tmp_path)) == 4
    remove_old_checkpoints(tmp_path, 2)
    assert checkpoint_folders(tmp_path) == [made[1], made[3]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b'{"dict": [["step", {"ten'),
        ("state.json", b"[1, 2]"),
        ("state.json", b'{"global_step": 5}'),
        ("state.json", b'"text"'),
        ("state.json", b"{}"),
        ("state.json", b'{"step": 5, "epoch": 1}'),
        ("state.json", b"\xff\xfe"),
        ("state.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("state.safetensors", None),
        ("state.json", None),
    ],
)
def test_a_broken_checkpoint_is_a_sentence(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = make_checkpoint(tmp_path, 5, {"step": 5, "lora": torch.ones(3)})
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-5 is not a whole checkpoint of this project .*give another to"):
        read_state(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_is_damaged(tmp_path: Path, value: float) -> None:
    """Else training would blame the learning rate for it."""
    state = {"step": 5, "lora": {"to_q": torch.tensor([1.0, value])}}
    with pytest.raises(
        UserError, match=r"checkpoint-5 is damaged, with a NaN or infinity in lora/to_q: no earlier one"
    ):
        read_state(make_checkpoint(tmp_path, 5, state))


def test_another_programs_checkpoint_is_refused(tmp_path: Path) -> None:
    require_own_checkpoints(tmp_path / "new")
    make_checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-7").mkdir()
    require_own_checkpoints(tmp_path)  # an empty folder
    half = tmp_path / "checkpoint-3"
    half.mkdir()
    (half / "state.safetensors").touch()
    require_own_checkpoints(tmp_path)  # half of an older one
    (tmp_path / "checkpoint-7" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"checkpoint-7 is not a checkpoint of this project, .* another --output_dir"):
        require_own_checkpoints(tmp_path)


def test_a_checkpoint_is_never_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while one is deleted, or replaced, leaves none under its name."""
    made = [make_checkpoint(tmp_path, step) for step in (1, 2)]
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: assert_hidden(Path(folder)))
    remove_old_checkpoints(tmp_path, 1)
    assert checkpoint_folders(tmp_path) == made[1:]
    assert not made[0].exists()


def assert_hidden(folder: Path) -> None:
    assert folder.name.startswith(".checkpoint-")
