"""A dataclass's fields as flags of argparse, as transformers' HfArgumentParser has them.

That class takes no time, and `import transformers` half a second, before any command line is read.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def add_flags(parser: argparse.ArgumentParser, group: type, title: str) -> None:
    """Adds a flag for each field, in a part of the help.

    A field's type is a bool, a Literal, a list, or one that makes a value of a text; or one of these or None. What its
    metadata says (help, aliases, nargs, const, action) is argparse's.

    Args:
        parser: to which they are added.
        group: the dataclass.
        title: of the part.
    """
    part = parser.add_argument_group(title)
    types = get_type_hints(group)
    for each in fields(group):
        hyphenated = [f"--{each.name.replace('_', '-')}"] if "_" in each.name else []
        given = dict(each.metadata)
        names = [f"--{each.name}", *hyphenated, *given.pop("aliases", ())]
        part.add_argument(*names, **(given | _settings(each, types[each.name])))


def _settings(field: Field[Any], declared: Any) -> dict[str, Any]:
    """The field's type and default, as argparse names them."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    settings: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
    kinds = [kind for kind in get_args(declared) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(declared) else declared
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        by_text = {str(choice): choice for choice in choices}
        return {**settings, "choices": choices, "type": lambda text: by_text.get(text, text)}
    if get_origin(kind) is list:
        return {**settings, "type": get_args(kind)[0], "nargs": "+"}
    if kind is not bool:
        return {**settings, "type": kind}
    without_value = {"nargs": "?", "const": True} if default is not None else {}
    return {**settings, "type": _truth_of, **without_value}


def _truth_of(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    pairs = ", ".join(map("/".join, zip(_TRUE, _FALSE, strict=True)))
    raise argparse.ArgumentTypeError(f"{text} is not one of {pairs}")
