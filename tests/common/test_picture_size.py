"""Both sides of a picture: their order, their text, and their latents."""

from __future__ import annotations

from sd3_lora.common.picture_size import PictureSize

import pytest


def test_sides_have_one_order_each() -> None:
    size = PictureSize(width=1024, height=768)
    assert (size.pixels, size.longer_side) == (1024 * 768, 1024)
    assert size.latent(8) == (96, 128)  # rows first, as in a tensor
    assert PictureSize.square(64) == PictureSize(64, 64)


def test_text_and_back() -> None:
    assert str(PictureSize(1024, 768)) == "1024x768"
    assert PictureSize.parse("1024x768") == PictureSize(1024, 768)
    for text in ("1024", "1024x", "x768", "1024x768x3", "-64x64", "0x64"):
        with pytest.raises(ValueError, match=r"is not a size in pixels such as 1024x768|has no pixels"):
            PictureSize.parse(text)
