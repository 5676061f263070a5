"""The model card that lies beside a trained LoRA, and goes to the hub with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import PATH_FLAGS, counted
from sd3_lora.common.durations import duration
from sd3_lora.common.identifier_embedding import EMBEDDING_FILE
from sd3_lora.common.run_record import RunFacts, RunRecord, RunResults, flag_defaults
from sd3_lora.training.gallery import find_pictures, find_sheet
from sd3_lora.training.hub_flags import HUB_FLAGS
from sd3_lora.training.identifier_flags import IdentifierFlags
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE

import torch
from huggingface_hub import ModelCard, ModelCardData

FOLDER_IN_CARD = "THIS_FOLDER"  # where the hub's copy has the repository's name
NOTICE_FILE = "NOTICE"
NOTICE = (
    "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. "
    "All Rights Reserved"
)
# A LoRA is a derivative of its base model and carries the base model's licence.
_STABILITY = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}
_MODEL_NAMES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "Stable Diffusion 3 Medium",
    "stabilityai/stable-diffusion-3.5-medium": "Stable Diffusion 3.5 Medium",
    "stabilityai/stable-diffusion-3.5-large": "Stable Diffusion 3.5 Large",
}
_TAGS = [
    *("text-to-image", "diffusers", "diffusers-training", "lora", "dreambooth"),
    *("template:sd-lora", "stable-diffusion-3", "sd3"),
]

_OF_LORAS = ("lora", "template:sd-lora")  # tags that a whole model lacks

# diffusers' pipeline for SD3 loads no textual inversion by itself, and takes the largest id for the end of a text.
_EMBEDDING_LOADER = """
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin, load_textual_inversion_state_dicts


class Pipeline(StableDiffusion3Pipeline, TextualInversionLoaderMixin):
    pass

"""
_EMBEDDING_LOADED = """
(embedding,) = load_textual_inversion_state_dicts(["FOLDER"])
vectors = [f"<s{index}>" for index in range(len(embedding["clip_l"]))]
for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
    tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    pipeline.load_textual_inversion(embedding[key], token=vectors, tokenizer=tokenizer, text_encoder=encoder)
    encoder.text_model.eos_token_id = tokenizer.eos_token_id
"""
_LYCORIS = {"lokr": "LoKr", "loha": "LoHa"}
_IN_OTHERS = (
    "It is a LyCORIS {}, which diffusers' pipeline for Stable Diffusion 3 does not load: draw with it in ComfyUI, or "
    "with the `inference.py` of the project that trained it."
)


def licence_of(base_model: str) -> dict[str, str]:
    """The licence entries of the card: the base model's.

    Those of a folder are read from its own card. Empty for a base model whose licence we do not know.

    Args:
        base_model: a hub id, `miniature`, or a folder.
    """
    if base_model.startswith("stabilityai/stable-diffusion-3"):
        return dict(_STABILITY)
    if base_model == "miniature":
        return {"license": "mit"}
    card = Path(base_model) / "README.md"
    if not card.is_file():
        return {}
    try:
        text = card.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("---"):  # states nothing, of which the library would warn
            return {}
        stated = ModelCard(text).data.to_dict()
    except Exception:  # of a YAML library: a card that nobody can read states nothing
        return {}
    if stated.get("license_name") == _STABILITY["license_name"]:
        return dict(_STABILITY)  # its link is to a file beside that card
    entries = {name: str(stated[name]) for name in _STABILITY if stated.get(name)}
    if not entries.get("license_link", "").startswith("https://"):  # a file that is not here
        entries.pop("license_link", None)
    return entries


def write_model_card(path: Path, record: RunRecord, results: RunResults) -> None:
    """Writes the card. It names no folder: it is meant for strangers.

    Args:
        path: of the README.md, in the folder of the LoRA and its validation pictures.
        record: of the run.
        results: of the run.
    """
    facts, folder = record.facts, path.parent
    trigger = facts.trigger or ""
    pictures = find_pictures(folder)
    licence, whole = licence_of(facts.model), _is_whole(record)
    name = "SD3 DreamBooth model" if whole else "SD3 DreamBooth LoRA"
    data = ModelCardData(
        base_model=facts.base_model if facts.revision else None,
        base_model_relation=("finetune" if whole else "adapter") if facts.revision else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=facts.trigger,
        tags=[tag for tag in _TAGS if not (whole and tag in _OF_LORAS)],
        widget=[
            {"text": picture.prompt or trigger, "output": {"url": picture.path.relative_to(folder).as_posix()}}
            for picture in pictures
        ]
        or None,
        **licence,
    )
    parts = [
        f"# {name}: {_plain(trigger)}" if trigger else f"# {name}",
        _introduction(record),
        *(["<Gallery />"] if pictures else []),
        *_sheet(folder),
        _usage(record, folder),
        _training(record, results),
        _licence(record, licence),
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(path)


def _introduction(record: RunRecord) -> str:
    facts = record.facts
    name = _MODEL_NAMES.get(facts.base_model, facts.base_model)
    base = f"[{name}](https://huggingface.co/{facts.base_model})" if facts.revision else f"`{name}`"
    what = f"{base} with a subject more" if _is_whole(record) else f"A LoRA that teaches {base} a subject"
    text = f"{what}, trained on {_count(record)} as DreamBooth does."
    if not facts.trigger:
        return text
    if len(facts.prompts or ()) > 1:
        return f"{text}\n\n**Trigger:** prompt it as its pictures are captioned, for example {_code(facts.trigger)}."
    return f"{text}\n\n**Trigger:** put {_code(facts.trigger)} into the prompt."


def _sheet(folder: Path) -> Iterator[str]:
    sheet = find_sheet(folder)
    if sheet:
        yield f"![Validation pictures: steps down, prompts across]({sheet.relative_to(folder).as_posix()})"


def _usage(record: RunRecord, folder: Path) -> str:
    facts = record.facts
    if _is_whole(record):
        return f"## Use it\n\n{_whole_in_diffusers(facts)}"
    average = (
        f"\n\n`{EMA_FILE}` is the moving average of the same run: another look at the same subject."
        if (folder / EMA_FILE).is_file()
        else ""
    )
    folder_note = "" if facts.revision else f"\n\n`{facts.base_model}` stands for the folder of the base model."
    lora_type, word = _flags(record)["lora_type"], _word_of(record)
    drawn = _in_diffusers(facts, word) if lora_type == "lora" else _IN_OTHERS.format(_LYCORIS[lora_type])
    return f"""## Use it

{drawn}{folder_note}

With ComfyUI: put `{LORA_FILE}` into `models/loras`, and the node *LoraLoaderModelOnly* between the checkpoint and the
sampler. {_text_encoders(word)}{average}"""


def _word_of(record: RunRecord) -> str | None:
    """The identifier whose embedding was trained."""
    return next(group.word for group in record.flags if isinstance(group, IdentifierFlags))


def _text_encoders(word: str | None) -> str:
    """What of the text encoders goes with it in ComfyUI."""
    if word is None:
        return "The text encoders are as they were."
    vectors = _code("embedding:" + Path(EMBEDDING_FILE).stem)
    return (
        f"Put `{EMBEDDING_FILE}` into `models/embeddings`: it is the embedding of {_code(word)} in the two CLIPs. In "
        f"the node *CLIPTextEncodeSD3* type {vectors} in place of {_code(word)} into `clip_l` and `clip_g`, and "
        f"{_code(word)} into `t5xxl`."
    )


def _training(record: RunRecord, results: RunResults) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _settings(record, results))
    changed = _changed_flags(record)
    table = f"""## Training

| | |
| --- | --- |
{rows}"""
    if not changed:
        return table
    return f"""{table}

<details>
<summary>All settings that are not the defaults</summary>

| flag | value |
| --- | --- |
{changed}

</details>"""


def _settings(record: RunRecord, results: RunResults) -> Iterator[tuple[str, object]]:
    """What most decides the result, and what it took."""
    facts, flags = record.facts, _flags(record)
    identity = record.identity.values
    accumulated, prior = flags["gradient_accumulation_steps"], flags["with_prior_preservation"]
    yield "pictures", f"{len(_own_pictures(record))}, at {facts.resolution} px"
    yield "captions", _captions(record)
    if prior:
        weight = f"{flags['prior_loss_weight']:g}"
        own = " or of their captions" if flags.get("class_captions") else ""
        yield (
            "prior preservation",
            f"{counted(flags['num_class_images'], 'picture')} of {_code(flags['class_prompt'])}{own}, × {weight}",
        )
    batch = flags["train_batch_size"] * accumulated * facts.processes
    yield "steps", f"{results.steps}, of {counted(batch, 'picture')} each"
    alpha = identity.get("--lora_alpha")
    kind = _LYCORIS.get(flags["lora_type"], "LoRA")
    if _is_whole(record):
        yield "trained", "the whole transformer"
    else:
        yield kind, f"rank {flags['rank']}, alpha {alpha:g}" if alpha else f"rank {flags['rank']}"
    optimizer = next(group for group in record.flags if isinstance(group, OptimizerConfig))
    yield "optimizer", f"{optimizer.kind.name}, learning rate {optimizer.rate:g}, {optimizer.lr_scheduler}"
    yield "noise levels", flags["weighting_scheme"]
    yield "weights in" if _is_whole(record) else "base weights in", facts.precision
    yield "T5 tokens", facts.max_sequence_length
    yield "seed", facts.seed
    if results.loss is not None:
        yield "loss, mean of the last steps", f"{results.loss:.4f}"
    if results.ms_a_step and results.steps:
        whole_s = results.ms_a_step * results.steps / 1000
        yield "time", f"{results.ms_a_step:.0f} ms a step, about {duration(whole_s)} in all"
    if results.measured_bytes:
        name = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
        yield "peak GPU memory", f"{results.measured_bytes / 1024**3:.2f} GiB{name}"
    host = max((stage.peak_host_gib for stage in results.stages), default=0)
    yield "peak host memory", f"{host:.2f} GiB"
    yield "versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _captions(record: RunRecord) -> str:
    """How the pictures are captioned."""
    facts, flags = record.facts, _flags(record)
    prompts = {prompt for picture in _own_pictures(record) for prompt in (picture.prompt, *picture.other_prompts)}
    if len(prompts) > 1:
        policy = f"{len(prompts)} different ones, written for the pictures"
    else:
        policy = f"one for all: {_code(next(iter(prompts), facts.trigger))}"
    more = []
    if flags["caption_dropout"]:
        more.append(f"dropped with a chance of {flags['caption_dropout']:g}")
    if flags["shuffle_tags"]:
        more.append("tags shuffled")
    return ", ".join([policy, *more])


def _own_pictures(record: RunRecord) -> list[Any]:
    """Those of the subject, not of its class."""
    flags = _flags(record)
    of_class = flags["class_prompt"] if flags["with_prior_preservation"] else None
    return [picture for picture in record.identity.pictures if picture.prompt != of_class]


def _count(record: RunRecord) -> str:
    return counted(len(_own_pictures(record)), "picture")


def _flags(record: RunRecord) -> dict[str, Any]:
    return {name: value for group in record.flags for name, value in asdict(group).items()}


def _is_whole(record: RunRecord) -> bool:
    """Whether the whole transformer was trained."""
    return bool(_flags(record).get("full"))


def _changed_flags(record: RunRecord) -> str:
    """The flags that are not at their defaults; without folders, and without what the hub is told."""
    defaults = flag_defaults(type(group) for group in record.flags)
    rows = [
        f"| `--{name}` | {_code(value)} |"
        for name, value in _flags(record).items()
        if value != defaults.get(f"--{name}") and name not in PATH_FLAGS | HUB_FLAGS
    ]
    return "\n".join(rows)


def _licence(record: RunRecord, licence: Mapping[str, str]) -> str:
    facts, what = record.facts, "this model" if _is_whole(record) else "a LoRA"
    if licence.get("license_name") == _STABILITY["license_name"]:
        return f"""## Licence

{what.capitalize() if _is_whole(record) else "A LoRA"} is a derivative of its base model, and so it is under the
[Stability AI Community License]({_STABILITY["license_link"]}). Powered by Stability AI.

> {NOTICE}"""
    if licence:
        name, link = licence.get("license_name") or licence.get("license", "").upper(), licence.get("license_link")
        return f"## Licence\n\nThat of the base model: {f'[{name}]({link})' if link else name}."
    return f"## Licence\n\nThat of the base model, `{facts.base_model}`: {what} is a derivative of it."


def _plain(text: str) -> str:
    """One line without what Markdown reads."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))


def _code(value: object) -> str:
    """As code in a table's cell or a line."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _in_diffusers(facts: RunFacts, word: str | None) -> str:
    prompt, pipeline = _literal(facts.trigger or ""), "StableDiffusion3Pipeline"
    imports, loaded, prompts = "", "", prompt
    if word is not None:
        pipeline, imports, loaded = "Pipeline", _EMBEDDING_LOADER, _EMBEDDING_LOADED.replace("FOLDER", FOLDER_IN_CARD)
        loaded += f"prompt = {prompt}  # T5 reads it as it is, the CLIPs with the vectors\n"
        prompts = f'prompt.replace({_literal(word)}, "".join(vectors)), prompt_3=prompt'
    return f"""With [diffusers](https://huggingface.co/docs/diffusers) and peft:

```python
import torch
from diffusers import StableDiffusion3Pipeline
{imports}
pipeline = {pipeline}.from_pretrained({_literal(facts.base_model)}, torch_dtype=torch.float16)
pipeline.load_lora_weights("{FOLDER_IN_CARD}", weight_name="{LORA_FILE}")
{loaded.lstrip()}pipeline.enable_model_cpu_offload()
pipeline({prompts}).images[0].save("picture.png")
```"""


def _whole_in_diffusers(facts: RunFacts) -> str:
    return f"""With [diffusers](https://huggingface.co/docs/diffusers):

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{FOLDER_IN_CARD}", torch_dtype=torch.bfloat16)
pipeline.enable_model_cpu_offload()
pipeline({_literal(facts.trigger or "")}).images[0].save("picture.png")
```"""


def _literal(text: str | None) -> str:
    """As a string of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False)
