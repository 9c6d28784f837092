"""Writing so that nothing is lost: everything goes to a temporary name first and is renamed when whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say what was being written where the system does not: of a full disk most errors name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # not imported for its sake
            raise OSError(0, str(error).rpartition("I/O error: ")[2], str(path)) from None
        raise


@contextmanager
def new_directory(path: Path, *, force: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes otherwise.

    Raises InputError as `check_new`; an old directory is replaced after the block.
    """
    check_new(path, force=force, marker=marker)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _named(path):
            yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):  # safetensors writes for the owner alone
            file.chmod(file.stat().st_mode | (0o055 if file.is_dir() else 0o044))
        if path.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            try:
                path.rename(old / "x")
                temporary.rename(path)
            except BaseException:
                if (old / "x").exists():
                    (old / "x").rename(path)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file path that becomes `path` when the block ends well, and vanishes otherwise."""
    check_new(path, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _named(path):
            yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path, *, force: bool = False, marker: str | None = None) -> None:
    """Raise InputError if `path` exists (unless `force`) or cannot be created: before work is done for it.

    marker: a file that a directory must hold for `force` to replace it, unless it is empty.
    """
    if path.exists() and not force:
        raise InputError(f"{path} exists already; give another output or --force to replace it")
    if marker and path.exists() and not (path / marker).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} holds other things; --force replaces only a directory with {marker}")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise InputError(f"cannot write {path}: the directory {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission in {parent}")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_inputs(path: Path) -> np.ndarray:
    """The array of a .npy file, or the first of a .npz; InputError unless it holds finite numbers, at least one row."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            array: np.ndarray = loaded
        else:
            with loaded:
                array = loaded[loaded.files[0]]
    except (ValueError, IndexError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: not a .npy or .npz file of plain numbers") from None
    if array.ndim < 2 or len(array) == 0 or array.dtype.kind not in "fiub":
        raise InputError(
            f"{path}: holds {array.dtype} of shape {array.shape}; accepted: numbers of shape (samples, ...)"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{path}: holds {array[at]} at index {at}; all numbers must be finite")
    return array
