"""Laws of studies that are disturbed: killed at any moment, doubled, out of disk, with workers that crash.

Designs are stubs of a few milliseconds, whose rows are a function of the recipe; processes are real, forked from this
one so that they need no start-up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policies import cartpole

import quantkit.results
import quantkit.study
from quantkit.backends import Died, workers
from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.results import Row, append_row, read_rows
from quantkit.study import Settings, Study, Task, describe_design, design_id
from quantkit.sweep import FAILURES, Space, complete, run
from quantkit.tasks.episodes import Rollout, score

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else multiprocessing.get_context("spawn")
RECIPES = Space(("int2", "int3", "int4", "int5", "int6", "int8"), ("int3", "int4", "int5", "int6", "int8")).recipes()
SCORE = score(Rollout(np.array([1.0, 2.0]), np.array([1, 1]), 1000, 0.0))


def tiny_study() -> Study:
    """A study without rollouts."""
    return Study(cartpole(), Settings(episodes=2), np.zeros((4, 4), np.float32), SCORE, SCORE)


def stub(folder: Path | None = None, seconds: float = 0.003) -> Callable[[Study, Recipe], Row]:
    """An evaluation that takes a moment and whose row is long; each call is noted in `folder`/calls."""

    def evaluate(study: Study, recipe: Recipe, *_: Any) -> Row:
        name = design_id(recipe)
        if folder is not None:
            with (folder / "calls").open("a") as file:
                file.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds * (1 + int(name[0], 16) / 8))
        return describe_design(study, recipe) | {"mean": int(name, 16) / 7, "fill": name * 200}

    return evaluate


def study_in(folder: Path, evaluate: Callable[[Study, Recipe], Row]) -> None:
    """What a process of a study does from its start to its end."""
    quantkit.study.evaluate_design = evaluate  # type: ignore[assignment]  # in a child: gone with it
    run(tiny_study(), RECIPES, folder)


def expected() -> dict[str, Row]:
    """The rows of an undisturbed run, by id."""
    rows = [stub(seconds=0)(tiny_study(), recipe) | {"origin": "sweep"} for recipe in RECIPES]
    return {row["id"]: row for row in rows}


def written(folder: Path) -> int:
    """Bytes of rows."""
    path = folder / "rows.jsonl"
    return path.stat().st_size if path.exists() else 0


def kill_law(folder: Path, kills: int, resume: Callable[[Path, Any], None] = study_in) -> None:
    """Killed at random moments until done, each design has one row, equal to that of an undisturbed run."""
    rng = random.Random(5)
    done = 0
    for number in range(100 * kills):
        process = FORK.Process(target=resume, args=(folder, stub(folder)))
        before = written(folder)
        process.start()
        while number % 3 and process.is_alive() and written(folder) == before:
            time.sleep(0.001)  # two of three: not before something was written
        time.sleep(rng.uniform(0.0, 0.02))
        if number < kills:
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        kept = read_rows(folder / "rows.jsonl")
        assert len(kept) >= done, "a finished row is lost"
        done = len(kept)
        if number >= kills:
            break
        if done == len(RECIPES):  # start over: what counts is the number of kills
            (folder / "rows.jsonl").rename(folder / f"rows{number}.jsonl")
            done = 0
    assert process.exitcode == 0
    for path in folder.glob("rows*.jsonl"):
        rows = read_rows(path)
        assert len(rows) == len(RECIPES) and {row["id"]: row for row in rows} == expected(), path


@pytest.mark.slow
def test_two_hundred_kills_change_nothing(tmp_path: Path) -> None:
    """`kill -9` at 200 random moments and running again gives exactly the rows of an undisturbed run."""
    kill_law(tmp_path, 200)


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    """The same with fewer kills."""
    kill_law(tmp_path, 5)


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    """Two processes on one study evaluate every design once between them, both of them some, and end with all rows."""
    together = FORK.Barrier(2)

    def begin() -> None:
        together.wait()
        study_in(tmp_path, stub(tmp_path, 0.02))

    processes = [FORK.Process(target=begin) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(name for name, _ in calls) == sorted(expected())
    assert set(Counter(pid for _, pid in calls)) == {str(process.pid) for process in processes}
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len(RECIPES) and {row["id"]: row for row in rows} == expected()


def test_a_dead_process_leaves_no_claim(tmp_path: Path) -> None:
    """What a killed process was doing is taken over by the one that is still there, at once."""
    slow = FORK.Process(target=study_in, args=(tmp_path, stub(tmp_path, 60)))
    slow.start()
    while not (tmp_path / "calls").exists():
        time.sleep(0.005)
    other = FORK.Process(target=study_in, args=(tmp_path, stub(tmp_path)))
    other.start()
    while len(read_rows(tmp_path / "rows.jsonl")) < len(RECIPES) - 1:
        time.sleep(0.01)
    assert other.is_alive(), "it must wait for the design that the first is doing"
    slow.kill()
    other.join(30)
    assert other.exitcode == 0
    assert {row["id"]: row for row in read_rows(tmp_path / "rows.jsonl")} == expected()


def test_claims_exclude_processes_and_end_with_them(tmp_path: Path) -> None:
    """A claim is refused to another process until it is given up or its process is killed."""
    name, ready = "00000000000a", FORK.Event()

    def hold() -> None:
        claims = Claims(tmp_path)
        assert claims.take(name) and claims.take("")
        ready.set()
        time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(10)
    with Claims(tmp_path) as claims:
        assert not claims.take(name) and not claims.take("") and claims.take("00000000000b")
        process.kill()
        process.join()
        assert claims.take(name)
        claims.give(name)
        claims.wait("")


def small_disk(folder: Path, room: int) -> None:
    """A process that may write only so many bytes more to a file: exits 2 with the message on `folder`/message."""
    import resource

    size = written(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, before[1]))
    try:
        study_in(folder, stub(None, 0))
    except InputError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (folder / "message").write_text(str(error))
        os._exit(2)
    os._exit(0)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Out of room in the middle of a row, the study stops with one line that says so; whole rows stay, and no torn one.

    With room again, the same command ends with the rows of an undisturbed run.
    """
    for room in (100, 3000, 7777):
        process = FORK.Process(target=small_disk, args=(tmp_path, room))
        process.start()
        process.join(30)
        assert process.exitcode == 2
        message = (tmp_path / "message").read_text()
        assert "rows.jsonl: no room" in message and "\n" not in message
        text = (tmp_path / "rows.jsonl").read_bytes()
        assert text[-1:] in (b"", b"\n") and len(text.splitlines()) == len(read_rows(tmp_path / "rows.jsonl"))
    done = len(read_rows(tmp_path / "rows.jsonl"))
    assert 0 < done < len(RECIPES)
    process = FORK.Process(target=study_in, args=(tmp_path, stub(tmp_path, 0)))
    process.start()
    process.join(30)
    assert len((tmp_path / "calls").read_text().splitlines()) == len(RECIPES) - done
    assert {row["id"]: row for row in read_rows(tmp_path / "rows.jsonl")} == expected()


def test_no_space_left_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC after a part of a row was written: InputError, and the file is what it was."""
    path = tmp_path / "rows.jsonl"
    append_row(path, {"id": "a"})
    before, write = path.read_bytes(), os.write
    left = [10]

    def full(handle: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        written = write(handle, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        append_row(path, {"id": "b"})
    assert path.read_bytes() == before and "\n" not in str(caught.value)
    left[0] = 10_000
    append_row(path, {"id": "b"})
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


def test_a_changed_row_counts_as_missing(tmp_path: Path) -> None:
    """Any one byte of a row's content or checksum changed on disk, that row is left out, and no other is."""
    path = tmp_path / "rows.jsonl"
    rows = [{"id": name, "mean": 1.25, "text": "x y"} for name in "abc"]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    name = whole.index(b',"crc32":"', start)
    digits = range(name + 10, name + 18)
    for at in (*range(start, name), *digits):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        assert read_rows(path) == [rows[0], rows[2]], at


def test_rows_without_a_checksum_are_read(tmp_path: Path) -> None:
    """Rows of older studies, and new ones behind them, are read alike; a torn old row is cut off."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id":"a","mean":1.0}\n{"id":"b","mean":2.0}\n{"id":"c","me')
    append_row(path, {"id": "d"})
    assert [row["id"] for row in read_rows(path)] == ["a", "b", "d"]
    assert json.loads(path.read_text().splitlines()[2]).keys() == {"id", "crc32"}


# --- workers that crash ---------------------------------------------------------------------------


def failing(bad: set[str], message: str = "the arm fell off") -> Callable[[Study, Recipe], Row]:
    """Evaluations that raise for some designs, as an environment may."""

    def evaluate(study: Study, recipe: Recipe, *_: Any) -> Row:
        if design_id(recipe) in bad:
            raise ZeroDivisionError(message)
        return stub(None, 0)(study, recipe)

    return evaluate


def test_a_crash_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A design whose environment crashes has a row with the reason; the rest goes on; the next run tries it again."""
    bad = {design_id(RECIPES[3]), design_id(RECIPES[7])}
    monkeypatch.setattr(quantkit.study, "evaluate_design", failing(bad))
    rows = run(tiny_study(), RECIPES, tmp_path)
    assert {row["id"] for row in rows if "failure" in row} == bad
    assert "the arm fell off" in rows[3]["error"] and "ZeroDivisionError" in rows[3]["failure"]
    monkeypatch.setattr(quantkit.study, "evaluate_design", failing(set()))
    again = run(tiny_study(), RECIPES, tmp_path)
    assert {row["id"]: row for row in again} == expected()
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(RECIPES) + 2


def test_three_failures_alike_stop_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third crash of one kind is the end: one line with the reason; rows so far are kept."""
    monkeypatch.setattr(quantkit.study, "evaluate_design", failing({design_id(r) for r in RECIPES[5:]}))
    with pytest.raises(InputError, match=r"3 designs failed alike.*the arm fell off") as caught:
        run(tiny_study(), RECIPES, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(read_rows(tmp_path / "rows.jsonl")) == 5 + FAILURES


def test_what_a_design_makes_impossible_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """InputErrors in evaluation are rows with `error`; any number of them stops nothing; they are not tried again."""

    def refuse(study: Study, recipe: Recipe, *_: Any) -> Row:
        raise InputError("actions that are not finite")

    monkeypatch.setattr(quantkit.study, "evaluate_design", refuse)
    rows = run(tiny_study(), RECIPES, tmp_path)
    assert all(row["error"] == "actions that are not finite" and "failure" not in row for row in rows)
    monkeypatch.setattr(quantkit.study, "evaluate_design", lambda *_: pytest.fail("tried again"))
    assert run(tiny_study(), RECIPES, tmp_path) == rows


def test_a_worker_that_dies_costs_its_design_only(tmp_path: Path) -> None:
    """A death is tried once more; the second is recorded; everything else is evaluated. A third design stops it."""
    victim, shaky = design_id(RECIPES[2]), design_id(RECIPES[4])
    calls: Counter[str] = Counter()

    def mapper(tasks: Any) -> Any:
        for task in tasks:
            calls[task.id] += 1
            dies = task.id == victim or (task.id == shaky and calls[shaky] == 1)
            yield task, Died("killed by signal 9") if dies else stub(None, 0)(tiny_study(), task.recipe)

    rows = complete(tiny_study(), [Task(recipe) for recipe in RECIPES], tmp_path, mapper)
    assert calls == Counter({row["id"]: 2 if row["id"] in (victim, shaky) else 1 for row in rows})
    assert [row["id"] for row in rows if "failure" in row] == [victim]
    assert rows[2]["error"] == "killed by signal 9, twice"


class Deadly(Task):
    """A task that kills its worker when it arrives there."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.slow
def test_a_pool_survives_its_workers() -> None:
    """In a real pool, tasks that kill their worker are reported dead, and all others have their rows."""
    tasks = [Deadly(r) if i in (1, 4) else Task(r) for i, r in enumerate(RECIPES[:6])]
    study = quantkit.study.prepare(cartpole(), Settings(episodes=1))
    with workers(study, 2) as mapper:
        found = {task.id: outcome for task, outcome in mapper(iter(tasks))}
    assert {name for name, outcome in found.items() if isinstance(outcome, Died)} == {tasks[1].id, tasks[4].id}
    assert len(found) == 6 and all(isinstance(o, Died) or o["score"]["n"] == 1 for o in found.values())


def test_sabotage_a_study_without_claims_or_checksums_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The laws notice processes that ignore claims, and a writer that forgets rows."""
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "take", lambda *_: True)
        (tmp_path / "a").mkdir()
        with pytest.raises(AssertionError):
            test_two_processes_share_a_study(tmp_path / "a")

    def forgetful(folder: Path, evaluate: Any) -> None:
        (folder / "rows.jsonl").unlink(missing_ok=True)
        study_in(folder, evaluate)

    (tmp_path / "b").mkdir()
    with pytest.raises(AssertionError, match="lost"):
        kill_law(tmp_path / "b", 20, forgetful)
