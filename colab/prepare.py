"""Makes a Colab machine ready: its packages, the model's licence gate, photos to begin with; and pushes the LoRA.

    python colab/prepare.py packages
    python colab/prepare.py access stabilityai/stable-diffusion-3-medium-diffusers
    python colab/prepare.py photos /content/photos
    python colab/prepare.py push /content/sd3-lora-output/lora my-dog --private True

Each of them may be run again at any time.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_FOLDER))

EXAMPLE_DATASET = "diffusers/dog-example"
GIB = 1024**3
ATTACH_A_LORA = """
import torch
from peft import LoraConfig, inject_adapter_in_model
inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2)))
"""


def run_pip(words: Sequence[str]) -> int:
    """Runs pip of this Python; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_requirements() -> dict[str, str]:
    """The lines of requirements.txt by package name."""
    lines = (PROJECT_FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return {re.split(r"[<>=!~\[ ]", line)[0]: line for line in wanted}


def install_packages() -> int:
    """Installs what is missing or too old, and nothing else; an installed torch stays the very one it is.

    Colab's torch is built for its driver, and torchvision beside it for that torch: it is pinned by its own version,
    so that no dependency can pull in another.
    """
    requirements = read_requirements()
    if torch := version_of("torch"):
        requirements["torch"] = f"torch=={torch}"
    before = {name: version_of(name) for name in requirements}
    options = ["--quiet", "--disable-pip-version-check", "--upgrade-strategy", "only-if-needed"]
    code = run_pip(["install", *options, *requirements.values()])
    importlib.invalidate_caches()
    if code:
        print("error: pip could not install the packages: the reason is above; run this again", file=sys.stderr)
        return code
    for name, old in before.items():
        new = version_of(name)
        print(
            f"kept {name} {old}" if new == old else f"installed {name} {new}" + (f" in place of {old}" if old else "")
        )
    return mend_torchao()


def lora_complaint() -> str | None:
    """What peft says when a LoRA is attached to a layer, in a process of its own; None if it works."""
    probe = subprocess.run([sys.executable, "-c", ATTACH_A_LORA], capture_output=True, text=True, check=False)
    return probe.stderr.strip().splitlines()[-1] if probe.returncode else None


def mend_torchao() -> int:
    """Upgrades a torchao that stops peft, without what it depends on (torch!), or removes it.

    Nothing here uses torchao: it only must not be in the way.
    """
    version = version_of("torchao")
    if version is None:
        return 0
    complaint = lora_complaint()
    if complaint is None:
        print(f"kept torchao {version}")
        return 0
    print(f"torchao {version} stops peft ({complaint}): upgrading it", flush=True)
    run_pip(["install", "--quiet", "--disable-pip-version-check", "--upgrade", "--no-deps", "torchao"])
    if lora_complaint() is None:
        print(f"installed torchao {version_of('torchao')}")
        return 0
    print("that does not help: removing torchao, which nothing here uses", flush=True)
    run_pip(["uninstall", "--quiet", "--disable-pip-version-check", "--yes", "torchao"])
    if complaint := lora_complaint():
        print(f"error: peft cannot attach a LoRA ({complaint}): type `pip install --upgrade peft`", file=sys.stderr)
        return 1
    return 0


def describe_gpu() -> str:
    """The GPU in one sentence, or how to get one."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: the miniature needs none; for SD3 choose Runtime > Change runtime type > T4 GPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name} with {properties.total_memory / GIB:.1f} GiB"


def prepare_packages() -> int:
    """All of the first command."""
    code = install_packages()
    if code == 0:
        print(describe_gpu())
    return code


def check_access(model: str) -> int:
    """Says at once whether a model can be read: fetches its index, a file of some hundred bytes."""
    from sd3_lora.common.command_line import exit_code
    from sd3_lora.common.config import ModelConfig
    from sd3_lora.common.model_files import ModelFiles

    def check(_: Sequence[str] | None) -> None:
        files = ModelFiles(ModelConfig(model))
        print(f"{files.name}: you have access" + (f", revision {files.revision}" if files.revision else ""))

    return exit_code(check, None)


def example_photos(folder: Path) -> int:
    """Downloads five photos of a dog, unless the folder has pictures already."""
    from sd3_lora.common.command_line import UserError, counted, exit_code
    from sd3_lora.stage_one.image_files import list_images

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def count() -> int:
        try:
            return len(list_images(folder).images)
        except UserError:
            return 0

    def fetch(_: Sequence[str] | None) -> None:
        if present := count():
            print(f"{counted(present, 'picture')} in {folder}: nothing is downloaded")
            return
        try:
            snapshot_download(
                EXAMPLE_DATASET, repo_type="dataset", local_dir=folder, allow_patterns=["*.jpeg", "*.jpg", "*.png"]
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise UserError(
                f"{EXAMPLE_DATASET} cannot be downloaded now: run this again, or put photos of your own into {folder}"
            ) from error
        print(f"{counted(count(), 'picture')} of {EXAMPLE_DATASET} in {folder}")

    return exit_code(fetch, None)


def push(folder: Path, repo: str, private: bool) -> int:
    """Uploads a trained LoRA with its card and pictures, as training does with --push_to_hub."""
    from sd3_lora.common.command_line import UserError, exit_code

    def upload(_: Sequence[str] | None) -> None:
        from sd3_lora.training.hub import open_repo
        from sd3_lora.training.hub_flags import HubFlags
        from sd3_lora.training.hub_folder import make_hub_folder
        from sd3_lora.transformer.lora import LORA_FILE

        if not repo:
            print("nothing is uploaded: HUB_REPO is empty")
            return
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"there is no {LORA_FILE} in {folder}: run the training cell first")
        try:
            flags = HubFlags(push_to_hub=True, hub_model_id=repo, hub_private=private)
        except ValueError as error:
            raise UserError(str(error)) from error
        hub = open_repo(flags, folder)
        print(f"uploaded to {hub.upload(make_hub_folder(folder, hub.repo_id), 'LoRA')}")

    return exit_code(upload, None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("packages", help="install what is missing, keep torch, mend torchao")
    commands.add_parser("access", help="is the model's licence gate open?").add_argument("model")
    commands.add_parser("photos", help="five example photos, unless there are some").add_argument("folder", type=Path)
    push_words = commands.add_parser("push", help="upload a LoRA to the hub; an empty name uploads nothing")
    push_words.add_argument("folder", type=Path)
    push_words.add_argument("repo")
    push_words.add_argument("--private", choices=("True", "False"), default="True")
    flags = parser.parse_args(argv)
    if flags.command == "access":
        return check_access(flags.model)
    if flags.command == "push":
        return push(flags.folder, flags.repo, flags.private == "True")
    if flags.command == "photos":
        return example_photos(flags.folder)
    return prepare_packages()


if __name__ == "__main__":
    sys.exit(main())
