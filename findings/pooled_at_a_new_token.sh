#!/usr/bin/env bash
# diffusers 0.42.1, transformers 5.23.0, torch 2.13.0: after load_textual_inversion, a CLIP with "eos_token_id": 2 pools at
# the new token, and what follows it in the prompt does not reach the pooled output.
#
# The CLIPs of Stable Diffusion 3, as published, have that value in their configuration, which is not their tokenizer's end
# of text. transformers knows it as an old mistake, and takes the largest id of the prompt for the end, as CLIP's own code
# does. One would have sworn that a pipeline's loader for new tokens keeps that true. Seen instead: it gives them larger ids,
# without a word, and the pooled output, which SD3 conditions its timestep on, becomes that of the new token. CLIP is causal:
# "a s* c" and "a s* b" have the same one.
#
# Output seen:
#   "eos_token_id": 2: pooled at <|endoftext|> of 'a b c', at s* of 'a s* c'; what follows s* changes it: False
#   "eos_token_id": 17: pooled at <|endoftext|> of 'a b c', at <|endoftext|> of 'a s* c'; what follows s* changes it: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

END = "<|endoftext|>"
TOKENS = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh"), "<|startoftext|>", END]
Path("vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
Path("merges.txt").write_text("#version: 0.2\n")


class Pipeline(DiffusionPipeline, TextualInversionLoaderMixin):
    """A tokenizer and a text encoder, as one of SD3's."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModelWithProjection):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)

    @torch.no_grad()
    def pooled(self, prompt: str) -> tuple[torch.Tensor, str]:
        """The pooled output of a prompt, and the token that it is the output of."""
        ids = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        output = self.text_encoder(ids)
        places = self.text_encoder.text_projection(output.last_hidden_state)[0]
        place = int((places - output.text_embeds).norm(dim=1).argmin())
        return output.text_embeds, self.tokenizer.convert_ids_to_tokens(int(ids[0, place]))


sentences = []
for end in (2, TOKENS.index(END)):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=8, pad_token=END)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(TOKENS), eos_token_id=end, bos_token_id=16, **sizes, **heads)
    pipeline = Pipeline(tokenizer, CLIPTextModelWithProjection(config).eval())
    _, known = pipeline.pooled("a b c")
    pipeline.load_textual_inversion(torch.randn(8), token="s*")
    pooled, new = pipeline.pooled("a s* c")
    other, _ = pipeline.pooled("a s* b")
    changes = not torch.equal(pooled, other)
    sentences.append(
        f'"eos_token_id": {end}: pooled at {known} of \'a b c\', at {new} of \'a s* c\'; '
        f"what follows s* changes it: {changes}"
    )
    print(sentences[-1])
assert sentences[0].endswith("at s* of 'a s* c'; what follows s* changes it: False"), sentences
assert sentences[1].endswith(f"at {END} of 'a s* c'; what follows s* changes it: True"), sentences
PYTHON
