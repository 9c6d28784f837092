"""Caches by text: `saq:levels=16-8-4,block=64` is `quantkit.kvcache.saq.make(config, levels="16-8-4", block=64)`.

The folder `quantkit/kvcache` is the registry, the keyword-only parameters of a file's `make` are its options.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from typing import TYPE_CHECKING, Any

import quantkit.kvcache
from quantkit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from quantkit.kvcontract import PackedCache


def cache_names() -> list[str]:
    """Names of all caches, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(quantkit.kvcache.__path__))


def make_cache(text: str, config: PreTrainedConfig) -> PackedCache:
    """The empty cache that `text` names, for a model of `config`; InputError as `parse_cache`, or from its `make`."""
    name, options = parse_cache(text)
    made: PackedCache = _module(name).make(config, **options)
    return made


def parse_cache(text: str) -> tuple[str, dict[str, Any]]:
    """`kivi:bits=2,values=heads` -> ("kivi", {"bits": 2, "values": "heads"}), checked against the cache's options.

    Raises InputError with the nearest name for an unknown cache or option, and for a value of another type.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if name not in cache_names():
        raise InputError(f"unknown cache {name!r}; {_nearest(name, cache_names())}")
    accepted = {
        p.name: p.annotation
        for p in inspect.signature(_module(name).make, eval_str=True).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in accepted:
            raise InputError(f"cache {name!r} has no option {item.strip()!r}; {_nearest(key, list(accepted))}")
        if key in options:
            raise InputError(f"cache {name!r}: option {key!r} is given twice")
        options[key] = _convert(value, accepted[key], f"cache {name!r}, option {key!r}")
    return name, options


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"quantkit.kvcache.{name}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise InputError(f"cache {name!r} needs transformers: pip install 'quantkit[lm]'") from None


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}? Known: {', '.join(known)}" if near else f"known: {', '.join(known)}"


def _convert(text: str, kind: Any, where: str) -> Any:
    """`text` as an int, a string, or one of a Literal's strings."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise InputError(f"{where}: {text!r} is not one of {', '.join(choices)}")
        return text
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{where}: {text!r} is not a {'whole number' if kind is int else kind.__name__}") from None
