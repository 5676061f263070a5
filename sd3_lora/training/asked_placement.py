"""What a command fixes of the placement, and what it cannot, for what it trains."""

from __future__ import annotations

from dataclasses import replace

from sd3_lora.common.command_line import UserError
from sd3_lora.training.config import TrainingFlags
from sd3_lora.transformer.placement import AskedPlacement


def asked_placement(flags: TrainingFlags, blocks: int, processes: int) -> AskedPlacement:
    """What flags fix of the placement.

    Args:
        flags: of the run.
        blocks: of the transformer.
        processes: that train together.

    Raises:
        UserError: flags that cannot be obeyed.
    """
    asked = AskedPlacement.of(flags.base, flags.step, blocks)
    asked.check(blocks, processes)
    if flags.trains_all:
        if processes > 1:
            raise UserError(
                f"--full updates weights inside the backward pass of one process, not of {processes}: use one"
            )
        return replace(asked, whole=True, modulations_ahead=False)
    if flags.trains_clips:
        if asked.modulations_ahead:
            trains = "--train_text_encoder" if flags.text.train_text_encoder else "--train_identifier_embedding"
            raise UserError(
                "--modulations_ahead on computes from prompts before the CLIPs have encoded them: leave it out, or "
                f"leave out {trains}"
            )
        asked = replace(asked, modulations_ahead=False)
    if flags.prior.is_even(flags.run.train_batch_size):
        return asked
    if asked.modulations_ahead:
        raise UserError(
            "--modulations_ahead on needs as many rows in each micro-batch, of which --prior_share "
            f"{flags.prior.prior_share:g} of {flags.run.train_batch_size} gives now more and now fewer: leave it out, "
            "or type --prior_share 1"
        )
    return replace(asked, modulations_ahead=False)
