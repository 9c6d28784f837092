"""Discovery: a folder of modules is the registry. `methods/awq.py` makes `--step awq` work."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import quantkit.methods


def method_names() -> list[str]:
    """Names of all methods, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(quantkit.methods.__path__) if not m.name.startswith("_"))


def methods() -> dict[str, ModuleType]:
    """Every module of `quantkit.methods` by name; each has `CHANGES` and `apply`."""
    return {name: importlib.import_module(f"quantkit.methods.{name}") for name in method_names()}
