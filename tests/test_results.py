"""Laws of rows: what was appended is there, whatever happened afterwards."""

from __future__ import annotations

import functools
import json
import operator
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.results import append_row, read_rows, versions

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5)
THREE: list[dict[str, Any]] = [{"id": "a", "x": 1.5}, {"id": "b", "text": "größer {\n}"}, {"id": "c", "n": None}]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_appended_rows_come_back_in_order(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any JSON values, line separators in strings included, are read back equal and in order."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [row | {"id": str(i)} for i, row in enumerate(rows)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    """A sweep that has not started has an empty list of rows."""
    assert read_rows(tmp_path / "rows.jsonl") == []


def cut_law(append: Any, folder: Path) -> None:
    """After a cut at any byte the whole rows before it survive, and so does every row appended later."""
    path = folder / "rows.jsonl"
    for row in THREE:
        append_row(path, row)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ends = [len(b"\n".join(whole.split(b"\n")[: i + 1])) for i in range(3)]
        kept = THREE[: sum(cut >= end for end in ends)]
        assert read_rows(path) == kept, cut
        append(path, {"id": "new"})
        append(path, {"id": "newer"})
        assert read_rows(path) == [*kept, {"id": "new"}, {"id": "newer"}], cut


def test_a_crash_costs_at_most_the_last_line(tmp_path: Path) -> None:
    """Cut anywhere, the file is read without the broken line, and the next row repairs it."""
    cut_law(append_row, tmp_path)


def test_garbage_after_a_crash_is_skipped(tmp_path: Path) -> None:
    """Blocks of zeros and bytes that are no text, as file systems leave them, do not hide the other rows."""
    path = tmp_path / "rows.jsonl"
    append_row(path, THREE[0])
    with path.open("ab") as handle:
        handle.write(b"\0" * 32 + b'{"id": "\xff\xfe')
    append_row(path, THREE[1])
    assert read_rows(path) == THREE[:2]


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced after the whole line was written."""
    path, sizes = tmp_path / "rows.jsonl", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle)))
    for row in THREE:
        append_row(path, row)
        assert sizes[-1] == path.stat().st_size


def test_a_number_that_json_lacks_is_refused_before_writing(tmp_path: Path) -> None:
    """NaN in a row raises and leaves the file as it was: other programs must be able to read it."""
    path = tmp_path / "rows.jsonl"
    append_row(path, THREE[0])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        append_row(path, {"id": "x", "mean": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', '{"mean": 1.0}', "7"])
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    """Whole JSON that is not a row is somebody's mistake: InputError with the line number."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(THREE[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_rows(path)


def test_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Rows appended at the same time by several writers are all whole."""
    path = tmp_path / "rows.jsonl"
    names = [[f"{w}-{i}" for i in range(20)] for w in range(4)]
    threads = [
        threading.Thread(target=lambda own=own: [append_row(path, {"id": n, "fill": n * 500}) for n in own])
        for own in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["id"] for row in read_rows(path)) == sorted(functools.reduce(operator.iadd, names, []))


def test_versions_are_plain_texts() -> None:
    """The versions of what can change a number include our own, torch and gymnasium."""
    found = versions()
    assert {"python", "quantkit", "torch", "gymnasium"} <= set(found)
    assert all(isinstance(v, str) for v in found.values())


def test_sabotage_an_append_without_repair_is_caught(tmp_path: Path) -> None:
    """The cut law notices a writer that continues a broken line."""

    def naive(path: Path, row: dict[str, Any]) -> None:
        with path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")

    with pytest.raises(AssertionError):
        cut_law(naive, tmp_path)
