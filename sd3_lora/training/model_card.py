"""The model card that lies beside a trained LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# A LoRA is a derivative of its base model and carries the base model's licence.
_STABILITY = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}


def licence_of(base_model: str) -> dict[str, str]:
    """The licence entries of the card; empty for a base model whose licence we do not know."""
    if base_model.startswith("stabilityai/stable-diffusion-3"):
        return dict(_STABILITY)
    return {"license": "mit"} if base_model == "miniature" else {}


def write_model_card(path: Any, base_model: str, prompts: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Writes the card.

    Args:
        path: of the README.md.
        base_model: hub id or folder of the base model.
        prompts: the instance prompts, the first of which is shown as the trigger.
        facts: rows of the table: rank, steps and the like.
    """
    is_hub_id = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base_model if is_hub_id else None,
        library_name="diffusers",
        tags=["text-to-image", "lora", "dreambooth", "stable-diffusion-3", "diffusers"],
        **licence_of(base_model),
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    body = f"""# SD3 DreamBooth LoRA

Trained on {base_model}. Say `{prompts[0]}` to draw the subject.

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{base_model}")
pipeline.load_lora_weights("THIS_FOLDER")
pipeline("{prompts[0]}").images[0].save("picture.png")
```

| setting | value |
| --- | --- |
{rows}
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)
