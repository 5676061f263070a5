"""The miniature's architecture: all components of the real pipeline, very small, and how they are put into a folder.

    python miniature/architecture.py                     tokenizers, and networks with random weights
    python miniature/architecture.py --components WORK   the networks that were trained in WORK

Everything follows from the seed: the same libraries and seed write the same weights. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from world import COLOURS, PATTERNS, POSITIONS, SIZES, captions, load_objects, sample_scenes

# --- the captions' vocabulary ------------------------------------------------------------------------------------


def words(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    return tuple(text.split())


SCENES = words("""
    beach forest desert jungle city street garden park kitchen bedroom library museum river lake ocean field meadow
    snow rain fog night sunset sunrise space moonlight grass sand rocks road stairs roof market stage studio workshop
    classroom playground stadium harbour station airport farm village temple cave
""")
MATERIALS = words("""
    wood wooden metal golden silver glass plastic paper stone marble clay leather cotton wool velvet ceramic crystal
    rubber copper bronze
""")
LOOKS = words("""
    beautiful bright broken clean cute dark dirty elegant fancy fluffy friendly funny furry happy heavy huge lonely
    modern new old pretty rusty sad scary sharp shiny simple sleeping smiling soft strange tiny ugly vintage young
""")
MEDIA = words("""
    photo picture drawing painting sketch render illustration photograph portrait poster sculpture sticker icon
    watercolor cartoon mosaic
""")
STYLES = words("realistic detailed blurry sharp colourful colorful minimal abstract retro futuristic cinematic")
ACTIONS = words("""
    standing sitting lying flying floating jumping running swimming walking sleeping dancing hanging wearing holding
    riding eating drinking playing looking
""")
TEMPLATES = (
    "a {medium} of a {colour} {thing}",
    "a {medium} of a {size} {thing} on a {pattern} {other_colour} background",
    "a photo of a {size} {colour} {thing} {place} on a {pattern} {other_colour} background",
    "a {pattern} background, {colour} and {other_colour}, with a {thing} {place}",
    "a {style} {medium} of the {look} {thing} in the {scene}",
    "a {look} {material} {thing} next to a {other_thing}, {style} {medium}",
    "the {thing} is {action} on top of a {colour} {other_thing} in front of the {scene}",
    "two {look} {thing}s {action} under a {other_thing} at the {scene}",
    "a close-up {medium} of one {material} {thing} with a {other_thing} behind it",
    "an image of my {colour} {thing}, high quality, {style}",
    "a {thing} and a {other_thing} near the {scene}, low quality, bad {medium}",
)
CAPTION_COUNT, SUBJECT_CAPTIONS = 20_000, 200

# --- sizes --------------------------------------------------------------------------------------------------------

CLIP_VOCABULARY, T5_VOCABULARY = 2_000, 1_300  # at most
CLIP_TOKENS, T5_TOKENS = 77, 512
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
NETWORKS = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
PIPELINE_FOLDERS = ("transformer", "vae", "text", "tokenizer", "scheduler")
JOINT_WIDTH = 256  # of T5, and of what the transformer attends to
CLIP_WIDTHS = (64, 128)  # together less than the joint width, as in SD3, which fills the difference with zeros


def make_captions() -> list[str]:
    """The tokenizers' training text: captions of the small world, and as many of a larger one."""
    choose = random.Random(0).choice
    objects = load_objects()
    names = [thing.name for thing in objects]
    generator = torch.Generator().manual_seed(0)
    world = captions(sample_scenes(CAPTION_COUNT, range(len(objects)), generator, pairs=0.15), objects, generator)
    larger = [
        choose(TEMPLATES).format(
            # Each object in turn, so that none is left out.
            thing=names[i % len(names)],
            other_thing=choose(names),
            colour=choose(list(COLOURS)),
            other_colour=choose(list(COLOURS)),
            pattern=choose(PATTERNS),
            size=choose(list(SIZES)),
            place=choose(list(POSITIONS)),
            scene=choose(SCENES),
            material=choose(MATERIALS),
            look=choose(LOOKS),
            medium=choose(MEDIA),
            style=choose(STYLES),
            action=choose(ACTIONS),
        )
        for i in range(CAPTION_COUNT)
    ]
    # Subjects' names are to be whole words, as in the large vocabularies: then "sks" is the rarest word of a prompt.
    subjects = [f"a photo of a {thing.name}" for thing in objects if thing.held_out] * SUBJECT_CAPTIONS
    return world + subjects + [re.sub(r"\ba (?=[aeiou])", "an ", caption) for caption in larger]


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: the printable ones first, so that "!" is 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def train_clip_vocabulary(captions: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE, its ids in CLIP's order: bytes, bytes at a word's end, merges, BOS, EOS.

    Returns:
        The vocabulary and the merges.
    """
    # The normalizer and the word splitter of CLIP's tokenizer, as they are used with the model.
    template = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - len(alphabet) - 2,  # all the word-end bytes come on top of what it counts, below
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def make_clip_tokenizers(captions: Sequence[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """One vocabulary twice: SD3's first tokenizer pads with EOS, its second with "!" (id 0)."""
    vocabulary, merges = train_clip_vocabulary(captions)
    first, second = (
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=CLIP_TOKENS)
        for pad_token in (EOS, "!")
    )
    return first, second


def make_t5_tokenizer(captions: Sequence[str]) -> T5TokenizerFast:
    """A `T5TokenizerFast` over a Unigram vocabulary; characters outside ASCII become <unk>."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = T5TokenizerFast(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(ord("!"), ord("~") + 1)],
        show_progress=False,
    )
    unigram.train_from_iterator(captions, trainer)
    # The trainer adds floats up, and lists the characters that it never saw, in no fixed order: two runs agree on the
    # ids only once the scores are rounded, those characters share the lowest one, and all is sorted.
    seen = set("".join(captions)) | {"▁"}
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(unigram.to_str())["model"]["vocab"]]
    special, learned = pieces[:3], pieces[3:]
    lowest = min(score for piece, score in learned if set(piece) <= seen)
    learned = [(piece, score if set(piece) <= seen else lowest) for piece, score in learned]
    learned.sort(key=lambda entry: (-entry[1], entry[0]))
    return T5TokenizerFast(vocab=special + learned, extra_ids=0, model_max_length=T5_TOKENS)


def make_transformer() -> SD3Transformer2DModel:
    """The MMDiT, for pictures of 128 pixels up to 1024."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=256,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )


def make_vae() -> AutoencoderKL:
    """16 latent channels at an eighth of the resolution, with SD3's scale and shift."""
    return AutoencoderKL(
        sample_size=128,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        force_upcast=True,
    )


def make_clip(tokenizer: CLIPTokenizer, width: int, hidden_act: str) -> CLIPTextModelWithProjection:
    """A CLIP text encoder of `width`, hidden and projected."""
    if tokenizer.eos_token_id == 2:
        raise ValueError("transformers takes an eos_token_id of 2 for an old, wrong configuration")
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act=hidden_act,
            # The pooled output is that of the first EOS: the ids must be the tokenizer's, not the class' defaults.
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 v1.1 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=JOINT_WIDTH,
            d_kv=64,
            d_ff=512,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.1,
            tie_word_embeddings=False,
        )
    )


def make_models(tokenizers: Path, names: Sequence[str], seed: int) -> dict[str, torch.nn.Module]:
    """Networks with random float32 weights. Each is seeded by itself, so that changing one leaves the others.

    Args:
        tokenizers: the folder that holds them.
        names: of the components.
        seed: of the weights.
    """
    clip, clip_2 = (CLIPTokenizer.from_pretrained(tokenizers / name) for name in ("tokenizer", "tokenizer_2"))
    t5 = T5TokenizerFast.from_pretrained(tokenizers / "tokenizer_3")
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "transformer": make_transformer,
        "vae": make_vae,
        "text_encoder": lambda: make_clip(clip, CLIP_WIDTHS[0], "quick_gelu"),
        "text_encoder_2": lambda: make_clip(clip_2, CLIP_WIDTHS[1], "gelu"),
        "text_encoder_3": lambda: make_t5(t5),
    }
    networks = {}
    for name in names:
        torch.manual_seed(seed)
        networks[name] = makers[name]().eval()
    return networks


def write_tokenizers(folder: Path) -> None:
    """Trains the three tokenizers and saves them."""
    texts = make_captions()
    clip, clip_2 = make_clip_tokenizers(texts)
    for name, tokenizer in (("tokenizer", clip), ("tokenizer_2", clip_2), ("tokenizer_3", make_t5_tokenizer(texts))):
        tokenizer.save_pretrained(folder / name)


def edit_json(path: Path, change: dict[str, object]) -> None:
    """Sets some keys of a JSON file that has them; None takes a key out."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in change.keys() & values.keys():
        values[key] = change[key]
    kept = {key: value for key, value in values.items() if not (key in change and value is None)}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_pipeline(pipeline: StableDiffusion3Pipeline, output_dir: Path) -> None:
    """Writes every component beside its final place and then moves it there; other files are left alone."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        # transformers 5 writes its new name of the class; SD3's own index has this one, which all versions know.
        edit_json(Path(partial, "model_index.json"), {"tokenizer_3": ["transformers", "T5TokenizerFast"]})
        for config in Path(partial).glob("*/*config.json"):
            # Without an explicit dtype transformers 5 loads in this one and diffusers in float32: they have to agree.
            where_from = dict.fromkeys(("_name_or_path", "is_local", "local_files_only"))
            edit_json(config, {"dtype": "float32", **where_from})
        for new in Path(partial).iterdir():
            old = output_dir / new.name
            if old.is_dir():
                shutil.rmtree(old)
            new.replace(old)


def assemble(folder: Path, networks: dict[str, torch.nn.Module]) -> StableDiffusion3Pipeline:
    """The pipeline of these networks, in float16, and of the tokenizers in `folder`."""
    clip, clip_2 = (CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    return StableDiffusion3Pipeline(
        tokenizer=clip,
        tokenizer_2=clip_2,
        tokenizer_3=T5TokenizerFast.from_pretrained(folder / "tokenizer_3"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{name: network.half().eval() for name, network in networks.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the miniature and reports its sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent, help="Where to write it.")
    parser.add_argument("--components", type=Path, help="Folder of trained networks; without it they are random.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random weights.")
    flags = parser.parse_args(argv)
    if flags.components is None:
        write_tokenizers(flags.output_dir)
        networks = make_models(flags.output_dir, tuple(NETWORKS), flags.seed)
    else:
        networks = {name: cls.from_pretrained(flags.components / name) for name, cls in NETWORKS.items()}
    pipeline = assemble(flags.output_dir, networks)
    write_pipeline(pipeline, flags.output_dir)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            print(f"{name:15} {component.num_parameters():>10,} parameters")
        elif name.startswith("tokenizer"):
            print(f"{name:15} {len(component):>10,} tokens")
    folders = [path for path in flags.output_dir.iterdir() if path.name.split("_")[0] in PIPELINE_FOLDERS]
    written_mb = sum(path.stat().st_size for folder in folders for path in folder.glob("*")) / 1e6
    print(f"{written_mb:.1f} MB (10**6 bytes) in {flags.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
