"""A model's files: what is fetched, what made an artefact, and what a folder or hub id that does not serve gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sd3_lora.common import model_files, records
from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, TEXT_COMPONENTS, ModelFiles, check_size
from sd3_lora.common.records import Provenance
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan
from sd3_lora.stage_one.text_encoders import load_clip

import pytest
import torch
from conftest import PROJECT, save_tiny_sd3
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from transformers import CLIPTextModelWithProjection

HUB_ID = "stabilityai/stable-diffusion-3-medium-diffusers"
COMMIT = "ea42f8cef0f178587cf766dc8129abd379c90671"


@pytest.fixture
def model(tiny_sd3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD3 to break."""
    return Path(shutil.copytree(tiny_sd3, tmp_path / "model"))


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("other"), seed=1, width=48)


def files_of(folder: Path | str, **options: str) -> ModelFiles:
    return ModelFiles(ModelConfig(str(folder), **options))


# A folder


def test_a_folder_is_used_in_place(tiny_sd3: Path) -> None:
    files = files_of(tiny_sd3)
    assert files.folder == tiny_sd3
    assert files.component("vae") == tiny_sd3 / "vae"
    assert files.weight_files("vae") == [tiny_sd3 / "vae" / "diffusion_pytorch_model.safetensors"]
    assert files.read_config("transformer")["joint_attention_dim"] == 48
    assert files.read_scheduler_config()["shift"] == 3.0
    assert files.latent_channels_and_scale() == (16, 8)
    assert files.clip_tokens() == 77
    assert files.revision is None


def test_without_a_model_the_miniature_is_meant() -> None:
    files = ModelFiles(ModelConfig())
    assert (files.name, files.folder) == ("miniature", MINIATURE)
    assert set(ModelConfig().flags().values()) == {None}


def test_the_flags_name_the_same_model_again() -> None:
    config = ModelConfig("some/model", revision="main", variant="fp16", cache_dir="elsewhere")
    assert ModelConfig(**config.flags()) == config


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index.json: give the folder of a diffusers SD3 pipeline"):
        files_of(tmp_path)
    (tmp_path / "sd3_medium.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"is one file, which is first laid out as a diffusers folder: type `python -m sd3_lora"
    ):
        files_of(tmp_path / "sd3_medium.safetensors")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"_class_name": "FluxPipeline"}', "is a FluxPipeline, not a Stable Diffusion 3 pipeline: give one"),
        ("{}", "is a model of another kind, not a Stable Diffusion 3 pipeline: give one"),
        ('{"_class_name": "Stable', "is not whole .*: delete it and download it again"),
        ("", "is not whole .*: delete it and download it again"),
    ],
)
def test_a_pipeline_of_another_kind_or_a_broken_index(model: Path, index: str, said: str) -> None:
    (model / "model_index.json").write_text(index)
    with pytest.raises(UserError, match=said):
        files_of(model)


def test_a_model_without_a_component(model: Path) -> None:
    shutil.rmtree(model / "text_encoder_3")  # as in a download without T5
    files = files_of(model)
    with pytest.raises(UserError, match="has no text_encoder_3: give the folder or hub id of a whole SD3 pipeline"):
        files.component("text_encoder_3")
    with pytest.raises(UserError, match=r"has no text_encoder_3/config.json: give the folder"):
        files.provenance(TEXT_COMPONENTS, "fp32", 77)
    with pytest.raises(UserError, match=r"has no text_encoder_3/config.json: give the folder"):
        files.read_config("text_encoder_3")


def test_a_component_without_its_weights(model: Path) -> None:
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="vae has no weights in safetensors: check --variant and the download"):
        files_of(model).component("vae")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", None]
)
def test_weights_that_are_not_whole(model: Path, content: bytes | None) -> None:
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match="is not a whole safetensors file: delete it and download it again") as caught:
        files_of(model).component("vae")
    assert str(caught.value).startswith(str(weights))
    assert files_of(model).component("text_encoder").is_dir()


# The variant


@pytest.fixture
def two_variants(model: Path) -> Path:
    """With text_encoder in two sets of weights, and the VAE in shards of one."""
    encoder = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder")
    with torch.no_grad():
        encoder.text_projection.weight.zero_()
    encoder.half().save_pretrained(model / "text_encoder", variant="fp16")
    (model / "vae" / "model.fp16-00001-of-00002.safetensors").touch()
    (model / "vae" / "diffusion_pytorch_model.non_ema.safetensors").touch()
    return model


def test_the_variant_chooses_the_weight_files(two_variants: Path) -> None:
    plain, half = files_of(two_variants), files_of(two_variants, variant="fp16")
    assert [path.name for path in plain.weight_files("text_encoder")] == ["model.safetensors"]
    assert [path.name for path in half.weight_files("text_encoder")] == ["model.fp16.safetensors"]
    assert [path.name for path in plain.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]
    assert [path.name for path in half.weight_files("vae")] == ["model.fp16-00001-of-00002.safetensors"]
    with pytest.raises(UserError, match="text_encoder_2 has no fp16 weights in safetensors: check --variant"):
        half.component("text_encoder_2")


def test_the_variant_s_weights_are_loaded_and_are_another_model(two_variants: Path) -> None:
    plain, half = files_of(two_variants), files_of(two_variants, variant="fp16")
    plan = TextEncoderPlan("fp32", False, 77, torch.device("cpu"))
    assert load_clip(plain, "text_encoder", plan).text_projection.weight.abs().sum() > 0
    assert load_clip(half, "text_encoder", plan).text_projection.weight.abs().sum() == 0
    records = [files.provenance(["text_encoder"], "fp32", 77) for files in (plain, half)]
    assert records[0].config_hash == records[1].config_hash
    assert not records[0].same_model(records[1])


# What made an artefact


def test_other_weights_differ_and_the_configuration_does_not(tiny_sd3: Path, other_seed: Path) -> None:
    for components in (TEXT_COMPONENTS, ["vae"], ["transformer"]):
        mine = files_of(tiny_sd3).provenance(components, "fp32", 64)
        other = files_of(other_seed).provenance(components, "fp32", 64)
        assert mine.config_hash == other.config_hash
        assert mine.weights_hash != other.weights_hash
        assert mine.identity != other.identity
        assert not mine.same_model(other)
        assert mine.difference(other, "resolution") == f"model {tiny_sd3}, not {other_seed}"


def test_a_record_belongs_to_its_components_alone(tiny_sd3: Path, model: Path) -> None:
    before = files_of(model).provenance(TEXT_COMPONENTS, "fp32", 77)
    assert before == replace(files_of(tiny_sd3).provenance(reversed(TEXT_COMPONENTS), "fp32", 77), model=str(model))
    (model / "vae" / "config.json").write_text("{}")
    assert files_of(model).provenance(TEXT_COMPONENTS, "fp32", 77) == before


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_only_what_matters_in_a_configuration_counts(model: Path, component: str) -> None:
    before = files_of(model).provenance([component], "fp32", 64)
    path = model / component / "config.json"
    config = json.loads(path.read_text())
    saved_anew = {"_diffusers_version": "0.0", "transformers_version": "0.0", "_name_or_path": "x", "dtype": "float16"}
    path.write_text(json.dumps(dict(reversed(config.items())) | saved_anew | {"torch_dtype": "float16"}))
    assert files_of(model).provenance([component], "fp32", 64) == before
    path.write_text(json.dumps(config | {"shift_factor": 0.1159}))
    after = files_of(model).provenance([component], "fp32", 64)
    assert after.weights_hash == before.weights_hash
    assert after.config_hash != before.config_hash
    assert after.difference(before, "resolution") == f"other weights than {model} has now"


def test_the_record_says_what_it_was_asked(tiny_sd3: Path) -> None:
    record = files_of(tiny_sd3).provenance(["vae"], "bf16", 128)
    assert (record.precision, record.size, record.model, record.revision) == ("bf16", 128, str(tiny_sd3), None)
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert Provenance.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    with pytest.raises(KeyError):
        Provenance.from_dict({"model": "x"})


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [  # revision, weights_hash
        ((None, "w"), (None, "w"), True),
        ((None, "w"), (None, "v"), False),
        (("r", None), ("r", None), True),
        (("r", None), ("s", None), False),
        (("r", None), (None, "w"), True),  # a hub model and a folder: nothing to compare but the configuration
        (("r", "w"), ("r", "v"), False),
    ],
)
def test_same_model(mine: tuple[str, str], theirs: tuple[str, str], same: bool) -> None:
    base = Provenance(1, "a", None, "c", None, "fp32", 64, {})
    one, other = (replace(base, revision=revision, weights_hash=weights) for revision, weights in (mine, theirs))
    assert one.same_model(other) is other.same_model(one) is same
    assert not one.same_model(replace(other, config_hash="d"))


def test_a_difference_names_the_first_thing_that_matters() -> None:
    record = Provenance(1, "a/b", "0123456789", "c", None, "fp32", 64, {})
    assert record.difference(replace(record, versions={"torch": "9"}, model="elsewhere"), "resolution") is None
    assert record.difference(replace(record, size=32), "resolution") == "resolution 64, not 32"
    assert record.difference(replace(record, size=32, precision="fp16"), "resolution") == "precision fp32, not fp16"
    other = replace(record, revision="9876543210", precision="fp16")
    hint = "(--revision 0123456789 keeps it)"
    assert record.difference(other, "resolution") == f"model a/b@01234567, not a/b@98765432 {hint}"


def test_a_setting_that_is_not_there_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Provenance(1, "a/b", "0123456789", "c", None, "fp32", 64, {})
    assert "settings" not in old.to_dict()
    monkeypatch.setitem(records.LATER_SETTINGS, "made_up", 1)
    default, other = (replace(old, settings={"made_up": value}) for value in (1, 2))
    assert default.to_dict() == old.to_dict()
    assert Provenance.from_dict(other.to_dict()) == other
    assert old.difference(default, "resolution") is default.difference(old, "resolution") is None
    assert old.difference(other, "resolution") == "made_up 1, not 2"
    assert other.difference(old, "resolution") == "made_up 2, not 1"
    monkeypatch.delitem(records.LATER_SETTINGS, "made_up")  # as in a build that is older than the file
    assert other.difference(old, "resolution") == "made_up 2, which this build does not know"
    with pytest.raises(KeyError, match="precision"):
        Provenance.from_dict({name: value for name, value in old.to_dict().items() if name != "precision"})


# The resolution


@pytest.mark.parametrize(
    ("asked", "typed"), [(100, 96), (15, 16), (1, 16), (0, 16), (-64, 16), (257, 256), (1024, 256)]
)
def test_a_resolution_that_the_model_cannot_take(tiny_sd3: Path, asked: int, typed: int) -> None:
    limits = "which takes multiples of 16 up to 256"
    with pytest.raises(
        UserError, match=f"^--resolution {asked} does not fit this model, {limits}: type --resolution {typed}$"
    ):
        files_of(tiny_sd3).resolution(asked)
    assert files_of(tiny_sd3).resolution(typed) == typed


def test_the_model_s_own_resolution(tiny_sd3: Path) -> None:
    assert files_of(tiny_sd3).resolution(None) == 64
    check_size(256, "width", files_of(tiny_sd3).read_config("transformer"), 8)
    with pytest.raises(UserError, match="--width 272 does not fit"):
        check_size(272, "width", files_of(tiny_sd3).read_config("transformer"), 8)


# The hub


class Hub:
    """`huggingface_hub`'s two functions over a local folder; notes what is fetched."""

    def __init__(self, source: Path, cache: Path):
        self.source = source
        self.snapshot = cache / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / COMMIT
        self.fetched: list[str] = []
        self.asked: set[tuple[str, Any, Any]] = set()

    def download(self, repo: str, name: str, revision: Any = None, cache_dir: Any = None) -> str:
        self.asked.add((repo, revision, cache_dir))
        target = self.snapshot / name
        if not target.exists():
            self.fetched.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / name, target)
        return str(target)

    def snapshot_download(
        self, repo: str, revision: Any, cache_dir: Any, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        names = [path.relative_to(self.source).as_posix() for path in sorted(self.source.rglob("*")) if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            self.download(repo, name, revision, cache_dir)
        return str(self.snapshot)


@pytest.fixture
def hub(two_variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(two_variants, tmp_path / "cache")
    monkeypatch.setattr(model_files, "hf_hub_download", hub.download)
    monkeypatch.setattr(model_files, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_what_is_used_is_fetched(hub: Hub) -> None:
    files = files_of(HUB_ID)
    assert hub.fetched == ["model_index.json"]
    assert files.component("tokenizer") == hub.snapshot / "tokenizer"
    assert files.component("text_encoder") == hub.snapshot / "text_encoder"
    fetched = sorted(name for name in hub.fetched if name.startswith("text_encoder"))
    assert fetched == ["text_encoder/config.json", "text_encoder/model.safetensors"]
    assert {name.split("/")[0] for name in hub.fetched} == {"model_index.json", "tokenizer", "text_encoder"}


def test_only_the_variant_s_weights_are_fetched(hub: Hub) -> None:
    files_of(HUB_ID, variant="fp16", revision="main", cache_dir="elsewhere").component("text_encoder")
    weights = [name for name in hub.fetched if name.endswith(".safetensors")]
    assert weights == ["text_encoder/model.fp16.safetensors"]


def test_a_branch_that_moves_during_a_run_mixes_no_commits(hub: Hub) -> None:
    files = files_of(HUB_ID, revision="main", cache_dir="elsewhere")
    assert hub.asked == {(HUB_ID, "main", "elsewhere")}
    for use in (lambda: files.component("text_encoder"), lambda: files.read_config("vae"), lambda: files.folder):
        hub.asked.clear()
        use()
        assert hub.asked == {(HUB_ID, COMMIT, "elsewhere")}


def test_a_hub_model_is_known_by_its_commit_without_its_weights(hub: Hub, two_variants: Path) -> None:
    files = files_of(HUB_ID, revision="main")
    record = files.provenance(TEXT_COMPONENTS, "int8", 77)
    assert (record.model, record.revision, record.weights_hash) == (HUB_ID, COMMIT, None)
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    assert record.same_model(files_of(two_variants).provenance(TEXT_COMPONENTS, "int8", 77))
    assert files.resolution(None) == 64


def test_a_variant_that_the_hub_lacks(hub: Hub) -> None:
    with pytest.raises(UserError, match=f"{HUB_ID}/text_encoder has no bf16 weights in safetensors: check --variant"):
        files_of(HUB_ID, variant="bf16").component("text_encoder")


def http_error(kind: type[Exception]) -> Exception:
    """As huggingface_hub makes it from the server's answer."""
    response = SimpleNamespace(headers={}, request=None, status_code=403, url="")
    return kind("403 Client Error", response=response)  # type: ignore[call-arg]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """The hub answers every question with an exception."""

    def set_error(error: Exception) -> None:
        def refuse(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(model_files, "hf_hub_download", refuse)
        monkeypatch.setattr(model_files, "snapshot_download", refuse)

    return set_error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            errors.GatedRepoError,
            f"is gated: accept its licence at https://huggingface.co/{HUB_ID} , then type `hf auth login`",
        ),
        (errors.RepositoryNotFoundError, "is neither a folder here nor a model that you can see on the hub: check the"),
        (errors.RevisionNotFoundError, "has no such revision: check --revision"),
        (errors.RemoteEntryNotFoundError, "lacks files of a diffusers SD3 pipeline: give the id of one, such as"),
        (errors.HfHubHTTPError, "try again later"),
    ],
)
def test_what_the_hub_refuses(refusing: Callable[[Exception], None], kind: type[Exception], said: str) -> None:
    refusing(http_error(kind))
    with pytest.raises(UserError) as caught:
        files_of(HUB_ID)
    assert HUB_ID in str(caught.value)
    assert said in str(caught.value)


def test_a_gate_that_closes_later(hub: Hub, refusing: Callable[[Exception], None]) -> None:
    files = files_of(HUB_ID)
    refusing(http_error(errors.GatedRepoError))
    with pytest.raises(UserError, match="is gated: accept its licence at"):
        files.component("text_encoder")
    with pytest.raises(UserError, match="is gated: accept its licence at"):
        files.read_config("vae")


def test_an_unknown_id_without_the_hub() -> None:
    with pytest.raises(UserError, match="nobody/nothing is neither a folder here nor downloaded yet, and the hub"):
        files_of("nobody/nothing")  # tests run offline


@pytest.mark.parametrize(
    "name", ["no/such/folder/here", "a folder that is not there", "./missing", "miniatur", "~/sd3", "sd3.safetensors"]
)
def test_a_name_that_no_hub_model_can_have(name: str) -> None:
    """It is a path; nobody's folders are sent to the hub."""
    with pytest.raises(UserError) as caught:
        files_of(name)
    shown = Path(name).expanduser()
    assert str(caught.value) == f"--pretrained_model_name_or_path: there is no {shown}: check the path"


def test_a_mistyped_folder_in_a_folder_that_is_here(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    owner, name = HUB_ID.split("/")
    assert files_of(HUB_ID).revision == COMMIT
    (tmp_path / owner).mkdir()
    hub.asked.clear()
    with pytest.raises(UserError, match=f"there is no {HUB_ID} in the folder {owner}: check the path, or start"):
        files_of(HUB_ID)
    assert not hub.asked
    shutil.copytree(tiny_sd3, tmp_path / owner / name)
    assert files_of(HUB_ID).revision is None


def test_another_vocabulary_is_another_model(model: Path) -> None:
    before = ModelFiles(ModelConfig(str(model))).provenance(TEXT_COMPONENTS, "fp32", 77)
    path = model / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"photo</w>"', '"phtoo</w>"'), encoding="utf-8")
    after = ModelFiles(ModelConfig(str(model))).provenance(TEXT_COMPONENTS, "fp32", 77)
    assert after.config_hash == before.config_hash
    assert not after.same_model(before)


def test_requests_that_are_tried_again_are_one_line() -> None:
    code = """
import logging
from sd3_lora.common import model_files
logger = logging.getLogger("huggingface_hub.utils._http")
for _ in range(5):
    logger.warning("'%s' thrown while requesting HEAD", "Name or service not known")
    logger.warning("Retrying in 1s [Retry 1/5].")
logger.error("something else")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    said = "the hub does not answer: trying again for up to half a minute"
    assert ended.stderr.splitlines() == [said, "something else"]
