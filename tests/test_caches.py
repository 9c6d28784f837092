"""Caches by text: names and options are found, and what is wrong is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import config

from quantkit.caches import cache_names, make_cache, parse_cache
from quantkit.errors import InputError


def test_a_text_is_a_cache():
    """Name and options come out with their types, blanks allowed, and make the cache."""
    assert cache_names() == ["kivi", "saq"]
    assert parse_cache("saq") == ("saq", {})
    text = "saq: levels=16-8-4-2, block=64,group=16 ,sink=4,values=heads"
    name, options = parse_cache(text)
    assert (name, options) == (
        "saq",
        {"levels": "16-8-4-2", "block": 64, "group": 16, "sink": 4, "values": "heads"},
    )
    layer = make_cache(text, config()).layers[1]
    assert (layer.levels, layer.block, layer.group, layer.sink, layer.width) == ((16, 8, 4, 2), 64, 16, 4, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sqa", "did you mean 'saq'"),
        ("kiwi:bits=2", "did you mean 'kivi'"),
        ("", "Known: kivi, saq"),
        ("saq:level=16-8", "did you mean 'levels'"),
        ("saq:blok=64", "did you mean 'block'"),
        ("saq:block", "no option 'block'"),
        ("saq:block=64,,sink=1", "no option ''"),
        ("saq:", "no option ''"),
        ("saq:block=many", "not a whole number"),
        ("saq:block=64.5", "not a whole number"),
        ("saq:values=channels", "not one of token, heads"),
        ("saq:sink=1,sink=2", "given twice"),
    ],
)
def test_bad_texts_are_named(text, says):
    """One line says what is wrong and what is known."""
    with pytest.raises(InputError, match=says) as caught:
        parse_cache(text)
    assert "\n" not in str(caught.value)


def test_names_load_no_transformers():
    """Listing caches imports neither torch nor transformers."""
    code = "import sys, quantkit.caches as c\nc.cache_names()\n"
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"
