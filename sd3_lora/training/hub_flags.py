"""The flags of the upload to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from sd3_lora.common.command_line import Secret, require_right


@dataclass(frozen=True)
class HubFlags:
    """The upload to the hub. It begins once the LoRA is on disk."""

    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the LoRA, its card and validation pictures after training."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where to: OWNER/NAME or NAME. Default: your name and that of --output_dir."}
    )
    hub_token: Secret | None = field(
        default=None,
        metadata={"help": "A Write token. Default: that of `hf auth login`, which leaves none in the shell's history."},
    )
    hub_private: bool = field(
        default=False, metadata={"help": "For your eyes only; one that is there and public is refused."}
    )
    hub_checkpoints: Literal["none", "lora", "all"] = field(
        default="none",
        metadata={
            "help": "Checkpoints to upload too: of each its LoRA, or all of it, to resume elsewhere. All of it names "
            "your pictures and their captions."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.push_to_hub:
            typed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            yield from (
                f"--{name} has no effect without --push_to_hub: add that, or leave --{name} out" for name in typed
            )
        if self.hub_token and not all("!" <= letter <= "~" for letter in self.hub_token.value or " "):
            yield "--hub_token is no token of the hub: type it whole, without spaces, or type `hf auth login` instead"
        if self.hub_model_id is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError:
                yield (
                    f"--hub_model_id {self.hub_model_id} is no name that the hub takes: type OWNER/NAME of letters, "
                    "digits, hyphens, underscores and dots"
                )


HUB_FLAGS = frozenset(f.name for f in fields(HubFlags))  # nobody else's business
