"""The subject that the scripts take when none is named: the reference's folder `dog`, or the bundled robot."""

from __future__ import annotations

from pathlib import Path

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
MINIATURE = PROJECT_FOLDER / "miniature"
EXAMPLE_SUBJECT = PROJECT_FOLDER / "examples" / "robot"
EXAMPLE_PROMPT = "a photo of sks robot"
EXAMPLE_PROMPTS_FILE = PROJECT_FOLDER / "examples" / "prompts.txt"
REFERENCE_SUBJECT = Path("dog")
REFERENCE_PROMPT = "a photo of sks dog"
REFERENCE_CLASS_PROMPT = "a photo of a dog"

MINIATURE_GUIDANCE = 3  # as in the demo, and in the benchmarks that judge the miniature's pictures
EMBEDDINGS_PATH = "sample_embeddings.parquet"
LATENTS_PATH = "latents"
LORA_FOLDER = "sd3-dreambooth-lora"
DEFAULT_SEQUENCE_LENGTH = 77  # T5 tokens of a prompt where nothing says how many, as in diffusers


def default_subject(instance_data_dir: str | None, instance_prompt: str | None) -> tuple[Path, str | None]:
    """The folder of pictures and the prompt, with what was not given filled in.

    Without a folder it is `dog` where there is one (as in the reference's notebook), else the bundled example; for
    these two the prompt is known. A folder of the user's own has no default prompt: its pictures have captions, or
    the prompt must be given.
    """
    folder = default_folder() if instance_data_dir is None else Path(instance_data_dir)
    prompt = instance_prompt
    if prompt is None and folder.resolve() == EXAMPLE_SUBJECT:
        prompt = EXAMPLE_PROMPT
    if prompt is None and folder == REFERENCE_SUBJECT:
        prompt = REFERENCE_PROMPT
    if instance_data_dir is None or instance_prompt is None:
        print(f"subject: the pictures in {folder}" + (f", {prompt!r}" if prompt else ""))
    return folder, prompt


def default_folder() -> Path:
    """The folder of pictures where none is named."""
    return REFERENCE_SUBJECT if REFERENCE_SUBJECT.is_dir() else EXAMPLE_SUBJECT


def say_miniature(script: str, instance_data_dir: str | None = None) -> None:
    """The first line of a run without a model flag, and a note for photos that the miniature cannot learn."""
    print(
        f"no --pretrained_model_name_or_path: {script} runs on the bundled miniature, "
        "a tiny SD3 that needs no GPU and no account"
    )
    if instance_data_dir is not None and Path(instance_data_dir).resolve() != EXAMPLE_SUBJECT:
        print(
            f"note: the miniature knows a small world of drawn objects; what is on photos, as in {instance_data_dir}, "
            "needs a real model: --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers"
        )
