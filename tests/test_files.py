"""Laws of writing: whole or not at all, and never over what exists unless told to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantkit.errors import InputError
from quantkit.files import check_new, new_directory, new_file, read_inputs, sha256_of

FAILURES = [RuntimeError, KeyboardInterrupt, SystemExit]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden names included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_new_file_appears_whole(tmp_path: Path) -> None:
    """The target exists only after the block, and nothing else is left."""
    with new_file(tmp_path / "a.txt") as path:
        path.write_text("x")
        assert not (tmp_path / "a.txt").exists()
        assert path.suffix == ".txt"
    assert listing(tmp_path) == {"a.txt": b"x"}


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    """The target exists only after the block, readable by others, and nothing else is left."""
    with new_directory(tmp_path / "d") as folder:
        (folder / "f").write_text("x")
        (folder / "f").chmod(0o600)
        assert not (tmp_path / "d").exists()
    assert listing(tmp_path) == {"d": None, "d/f": b"x"}
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "d/f").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, failure: type[BaseException], existing: bool) -> None:
    """An exception in the block, an interruption too, leaves no temporary and keeps what was to be replaced."""
    if existing:
        (tmp_path / "f").write_text("old")
        (tmp_path / "d").mkdir()
        (tmp_path / "d/f").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(failure), new_file(tmp_path / "f", force=existing) as path:
        path.write_text("half")
        raise failure
    with pytest.raises(failure), new_directory(tmp_path / "d", force=existing) as folder:
        (folder / "f").write_text("half")
        raise failure
    assert listing(tmp_path) == before


def test_what_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    """Without force an existing file or directory, even an empty one, is refused and untouched."""
    (tmp_path / "f").write_text("old")
    (tmp_path / "d").mkdir()
    before = listing(tmp_path)
    for name in ("f", "d"):
        for make in (new_file, new_directory):
            with pytest.raises(InputError, match="--force"), make(tmp_path / name):
                raise AssertionError("the block must not run")
    assert listing(tmp_path) == before


def test_force_replaces(tmp_path: Path) -> None:
    """With force the new content replaces all of the old."""
    (tmp_path / "f").write_text("old")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/old").write_text("old")
    with new_file(tmp_path / "f", force=True) as path:
        path.write_text("new")
    with new_directory(tmp_path / "d", force=True) as folder:
        (folder / "new").write_text("new")
    assert listing(tmp_path) == {"f": b"new", "d": None, "d/new": b"new"}


@pytest.mark.parametrize("at_dir", [False, True])
def test_force_never_replaces_one_kind_by_the_other(tmp_path: Path, at_dir: bool) -> None:
    """A file in the place of a directory, or the reverse, is refused in one line and nothing is left behind."""
    (tmp_path / "x").mkdir() if at_dir else (tmp_path / "x").write_text("old")
    before = listing(tmp_path)
    make = new_file if at_dir else new_directory
    with pytest.raises((InputError, OSError)), make(tmp_path / "x", force=True):
        pass
    assert listing(tmp_path) == before


def test_a_directory_that_cannot_be_moved_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing the working directory itself fails without leftovers."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = listing(tmp_path)
    with pytest.raises((InputError, OSError)), new_directory(Path(), force=True) as folder:
        (folder / "f").write_text("x")
    assert listing(tmp_path) == before


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    """Forcing a path that is a symbolic link replaces the link, not the data behind it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/keep").write_text("x")
    (tmp_path / "link").symlink_to("data")
    with new_directory(tmp_path / "link", force=True) as folder:
        (folder / "new").write_text("y")
    assert (tmp_path / "data/keep").read_text() == "x"
    assert (tmp_path / "link/new").read_text() == "y" and not (tmp_path / "link").is_symlink()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A missing or read-only parent is an InputError that names it, with and without force."""
    for force in (False, True):
        with pytest.raises(InputError, match="no/such"):
            check_new(tmp_path / "no/such/x", force=force)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="permission"):
            check_new(tmp_path / "closed/x")


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    """Of the empty file it is the known constant."""
    (tmp_path / "f").write_bytes(b"")
    assert sha256_of(tmp_path / "f") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_sabotage_writing_in_place_is_caught(tmp_path: Path) -> None:
    """The failure law notices a writer that opens its target directly."""
    with pytest.raises(RuntimeError), (tmp_path / "f").open("w") as handle:
        handle.write("half")
        raise RuntimeError
    assert listing(tmp_path) != {}


def test_what_does_not_fit_on_the_disk_names_the_output(tmp_path: Path) -> None:
    """Errors of writing that name no file, safetensors' own among them, become one that names the output."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def tensors() -> None:  # a directory that is missing is the nearest to a full disk that every machine has
        save_file({"a": np.zeros(3)}, tmp_path / "none" / "x.safetensors")

    for write in (full, tensors):
        for new in (new_file, new_directory):
            with pytest.raises(OSError) as caught, new(tmp_path / "out"):
                write()
            assert caught.value.filename == str(tmp_path / "out") and caught.value.strerror
            assert listing(tmp_path) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    """The message names the file, the value and its first index; files of whole numbers have none."""
    x = np.zeros((5, 3), np.float32)
    np.save(tmp_path / "good.npy", x)
    x[3, 1] = x[4, 0] = bad
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=rf"x\.npy: holds {bad} at index \(3, 1\); all numbers must be finite"):
        read_inputs(tmp_path / "x.npy")
    assert read_inputs(tmp_path / "good.npy").shape == (5, 3)
    np.save(tmp_path / "tokens.npy", np.ones((2, 4), np.int64))
    assert read_inputs(tmp_path / "tokens.npy").dtype == np.int64
