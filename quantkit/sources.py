"""A digest of our own source that decides what a result is: what other code has made must not be mixed in unnoticed."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

ROOT = "quantkit.study"
"""What makes a row of a study."""
SHELVES = ("methods", "tasks", "loaders")
"""Found by listing their folders at run time, so no import names them."""
ASIDE = ("quantkit.verify",)
"""What `ROOT` offers besides rows."""

_IMPORT = re.compile(
    r"^\s*(?:from\s+((?:quantkit|hwmodel)[\w.]*)\s+import\s+(\([^)]*\)|[^\n#]*)|import\s+((?:quantkit|hwmodel)[\w.]*))",
    re.MULTILINE,
)


@cache
def source_digest(root: str = ROOT) -> str:
    """12 hex digits over `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def source_files(root: str = ROOT) -> list[Path]:
    """The modules that `root` and the shelves import, directly or not, and hwmodel's tables, in a fixed order."""
    here = Path(__file__).resolve().parent
    todo = [f"quantkit.{shelf}.{path.stem}" for shelf in SHELVES for path in (here / shelf).glob("*.py")]
    todo.append(root)
    seen: dict[str, Path] = {}
    while todo:
        name = todo.pop()
        path = _file(here.parent, name)
        if path is None or name in seen or name in ASIDE:
            continue
        seen[name] = path
        for base, names, plain in _IMPORT.findall(path.read_text()):
            todo += [plain] if plain else [base, *(f"{base}.{part}" for part in re.findall(r"\w+", names))]
    return [*(seen[name] for name in sorted(seen)), *sorted((here.parent / "hwmodel").glob("*.toml"))]


def _file(root: Path, name: str) -> Path | None:
    """The file of a module or package; None if the name is something inside a module."""
    base = root.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
