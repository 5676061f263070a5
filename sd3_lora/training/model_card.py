"""The model card that lies beside a trained LoRA."""

from __future__ import annotations

import json
from pathlib import Path

from sd3_lora.common.run_record import RunRecord

from huggingface_hub import ModelCard, ModelCardData

# A LoRA is a derivative of its base model and carries the base model's licence.
_STABILITY = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}

_LYCORIS = {"lokr": "LoKr", "loha": "LoHa"}
_IN_OTHERS = (
    "It is a LyCORIS {}, which diffusers' pipeline for Stable Diffusion 3 does not load: draw with it in ComfyUI, or "
    "with the `inference.py` of the project that trained it."
)


def licence_of(base_model: str) -> dict[str, str]:
    """The licence entries of the card; empty for a base model whose licence we do not know."""
    if base_model.startswith("stabilityai/stable-diffusion-3"):
        return dict(_STABILITY)
    return {"license": "mit"} if base_model == "miniature" else {}


def write_model_card(path: Path, record: RunRecord, steps: int) -> None:
    """Writes the card.

    Args:
        path: of the README.md.
        record: of the run.
        steps: optimizer steps that the LoRA was trained for.
    """
    facts, flags = record.facts, record.identity.values
    base_model = facts.model
    is_hub_id = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base_model if is_hub_id else None,
        library_name="diffusers",
        tags=["text-to-image", "lora", "dreambooth", "stable-diffusion-3", "diffusers"],
        **licence_of(base_model),
    )
    lora_type = flags["--lora_type"]
    settings = {
        "steps": steps,
        **({} if lora_type == "lora" else {"kind": _LYCORIS[lora_type]}),
        "rank": flags["--rank"],
        "learning rate": flags["--learning_rate"],
        "seed": facts.seed,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    body = f"""# SD3 DreamBooth LoRA

Trained on {base_model}. Say `{facts.trigger}` to draw the subject.

{_in_diffusers(base_model, facts.trigger) if lora_type == "lora" else _IN_OTHERS.format(_LYCORIS[lora_type])}

| setting | value |
| --- | --- |
{rows}
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)


def _in_diffusers(base_model: str, trigger: str | None) -> str:
    return f"""```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained({_literal(base_model)})
pipeline.load_lora_weights("THIS_FOLDER")
pipeline({_literal(trigger)}).images[0].save("picture.png")
```"""


def _literal(text: str | None) -> str:
    """As a string of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False)
