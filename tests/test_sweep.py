"""Laws of sweeps: rows are resumed, never repeated, and do not depend on how they were made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policies import cartpole
from test_study import without_timings

import quantkit.study
import quantkit.sweep
from hwmodel.devices import find_device
from quantkit.backends import one_thread_per_process
from quantkit.errors import InputError
from quantkit.model import EnvSpec, Model
from quantkit.recipe import Recipe, make_plan, parse_step
from quantkit.results import Row, read_rows
from quantkit.study import Settings, Study, design_id, evaluate_design
from quantkit.sweep import Space, describe_study, open_study, run, study_origin

SETTINGS = Settings(episodes=3, device=find_device("xc7a35t"))
SPACE = Space(("int3", "e2m1", "ternary"), ("int4", "e3m2"), ("row", "tensor"))
RECIPES = SPACE.recipes()
BAD = Space(("int4",), ("int1",), ("row",)).recipes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A study directory and its rows, made by one process without disturbance."""
    folder = tmp_path_factory.mktemp("straight") / "study"
    study = open_study(folder, cartpole(), SETTINGS)
    return folder, run(study, RECIPES, folder)


def copy_of_study(straight: tuple[Path, list[Row]], folder: Path) -> tuple[Study, Path]:
    """The same study in a new directory, without rows."""
    folder.mkdir()
    for name in ("study.json", "calibration.npy"):
        (folder / name).write_bytes((straight[0] / name).read_bytes())
    return open_study(folder, cartpole(), SETTINGS), folder


def same_rows(found: list[Row], expected: list[Row]) -> None:
    """Equal apart from order and timings."""
    by_id = [{row["id"]: without_timings(row) for row in rows} for rows in (found, expected)]
    assert by_id[0] == by_id[1] and len(found) == len(expected)


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """The ids of the designs that are evaluated from now on; interrupted after some."""
    calls: list[str] = []

    def spy(study: Study, recipe: Recipe, *rest: Any) -> Row:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(design_id(recipe))
        return evaluate_design(study, recipe, *rest)

    monkeypatch.setattr(quantkit.study, "evaluate_design", spy)
    return calls


def resume_law(straight: tuple[Path, list[Row]], folder: Path, patch: pytest.MonkeyPatch, run_: Any = run) -> None:
    """Interrupted twice and cut once, a sweep evaluates what is missing, once, and ends with the same rows."""
    study, folder = copy_of_study(straight, folder)
    for stop in (2, 3):
        counted(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run_(study, RECIPES, folder)
    rows = folder / "rows.jsonl"
    assert len(read_rows(rows)) == 5
    rows.write_bytes(rows.read_bytes()[:-40])  # a crash in the middle of the last line
    calls = counted(patch)
    found = run_(open_study(folder, cartpole(), SETTINGS), RECIPES, folder)
    assert calls == [design_id(r) for r in RECIPES[4:]]
    assert [row["id"] for row in found] == [design_id(r) for r in RECIPES]
    same_rows(found, straight[1])
    same_rows(read_rows(rows), straight[1])
    calls.clear()
    assert run_(study, RECIPES, folder) == found and calls == []


def test_an_interrupted_sweep_goes_on(straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished designs are not evaluated again; the end is that of an undisturbed run."""
    resume_law(straight, tmp_path / "s", monkeypatch)


def test_a_larger_space_keeps_the_rows_of_a_smaller(
    straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the new designs of a larger space are evaluated; asking twice for one evaluates it once."""
    study, folder = copy_of_study(straight, tmp_path / "s")
    run(study, RECIPES[:2], folder)
    calls = counted(monkeypatch)
    run(study, [RECIPES[3], RECIPES[1], RECIPES[3]], folder)
    assert calls == [design_id(RECIPES[3])]


def test_two_workers_give_the_rows_of_one(straight: Any, tmp_path: Path) -> None:
    """Rows agree apart from order and timings; the rows returned are in the order of the recipes."""
    study, folder = copy_of_study(straight, tmp_path / "s")
    ticks: list[tuple[int, int]] = []
    found = run(study, [*RECIPES, *BAD], folder, jobs=2, progress=lambda done, total, _: ticks.append((done, total)))
    assert [row["id"] for row in found] == [design_id(r) for r in [*RECIPES, *BAD]]
    same_rows(found[:-1], straight[1])
    assert "no positive value" in found[-1]["error"]
    assert ticks == [(i, len(found)) for i in range(len(found) + 1)]


VICTIM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_sweep import RECIPES, SETTINGS, cartpole, open_study, run
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run(open_study(folder, cartpole(), SETTINGS), RECIPES, folder, jobs=int(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_sweep_goes_on(straight: Any, tmp_path: Path) -> None:
    """Killed with SIGKILL in one process and in two, and resumed, the rows are those of an undisturbed run."""
    study, folder = copy_of_study(straight, tmp_path / "s")
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    rows = folder / "rows.jsonl"
    for jobs, enough in ((1, 2), (2, 6)):
        command = [sys.executable, str(script), str(folder), str(jobs), str(Path(__file__).parent)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and len(read_rows(rows)) < enough and time.monotonic() < deadline:
                time.sleep(0.002)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            deadline = time.monotonic() + 10  # workers notice by themselves that their parent is gone
            while alive(process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            orphans = alive(process.pid)
            if orphans:
                os.killpg(process.pid, signal.SIGKILL)
        assert not orphans, "workers outlive their parent"
        assert enough <= len(read_rows(rows)) <= len(RECIPES)
    known = {row["id"]: row for row in read_rows(rows)}
    found = run(study, RECIPES, folder)
    same_rows(found, straight[1])
    assert all(row == known[row["id"]] for row in found if row["id"] in known)
    assert len(read_rows(rows)) == len(RECIPES)


def alive(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_study_is_prepared_once(straight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening it again reads the same scores and states, and runs no episode."""
    monkeypatch.setattr(quantkit.sweep, "prepare", lambda *_: pytest.fail("prepared again"))
    again = open_study(straight[0], cartpole(), SETTINGS)
    document = json.loads((straight[0] / "study.json").read_text())
    assert again.reference.to_json() == document["reference"] and again.random.to_json() == document["random"]
    assert again.margin == document["margin"] > 0
    assert again.states.shape[1:] == (4,) and np.isfinite(again.states).all()


def test_a_study_remembers_where_it_came_from(tmp_path: Path) -> None:
    """study.json tells how to load the model again; opened with another origin, the first one stays."""
    first, other = (study_origin(Path(name), None, "stage", ["sweep", name]) for name in ("a b.zip", "b.zip"))
    for origin in (first, other):
        open_study(tmp_path / "s", cartpole(), Settings(episodes=1), origin=origin)
    found = json.loads((tmp_path / "s/study.json").read_text())["origin"]
    assert found == first and first["command"] == "quantkit sweep 'a b.zip'"
    assert Path(found["path"]) == Path.cwd() / "a b.zip" and found["env"] is None and found["normalize"] == "stage"


def other_model(**meta: Any) -> Model:
    """The small policy with other facts."""
    model = cartpole()
    model.meta |= meta
    return model


OTHERS: dict[str, tuple[Any, Any]] = {
    "checkpoint_sha256": (lambda: other_model(sha256="1" * 64), SETTINGS),
    "episodes": (cartpole, replace(SETTINGS, episodes=4)),
    "seed": (cartpole, replace(SETTINGS, seed=7)),
    "device": (cartpole, replace(SETTINGS, device=None)),
    "latency_us": (cartpole, replace(SETTINGS, latency_us=3.5)),
    "luts": (cartpole, replace(SETTINGS, luts=5000)),
    "mapping": (cartpole, replace(SETTINGS, mapping="dsp")),
    "env": (lambda: replace_env(EnvSpec("CartPole-v0")), SETTINGS),
    "normalizer": (lambda: other_model(normalizer={"mode": "fold"}), SETTINGS),
}


def replace_env(env: EnvSpec) -> Model:
    """The small policy for another environment."""
    model = cartpole()
    model.env = env
    return model


@pytest.mark.parametrize("fact", OTHERS)
def test_a_study_of_something_else_is_refused(straight: Any, fact: str) -> None:
    """Another checkpoint or setting is refused in one line that names what differs, and nothing is written."""
    make, settings = OTHERS[fact]
    before = {p.name: p.read_bytes() for p in straight[0].iterdir()}
    with pytest.raises(InputError) as caught:
        open_study(straight[0], make(), settings)
    assert fact in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in straight[0].iterdir()} == before


def test_every_setting_is_compared() -> None:
    """A new field of Settings must enter describe_study, or rows that cannot be compared would be mixed."""
    facts = describe_study(cartpole(), SETTINGS)
    assert set(SETTINGS.__dataclass_fields__) <= set(facts) and set(OTHERS) <= set(facts)
    assert json.loads(json.dumps(facts)) == facts


def test_environment_arguments_survive_the_file(tmp_path: Path) -> None:
    """An environment with a tuple among its arguments is recognized when the study is opened again."""
    model = replace_env(EnvSpec("CartPole-v1", {"render_mode": None, "sutton_barto_reward": False}))
    for _ in range(2):
        open_study(tmp_path / "a", model, Settings(episodes=1))
    facts = describe_study(replace_env(EnvSpec("X-v0", {"size": (1, 2)})), SETTINGS)
    assert json.loads(json.dumps(facts)) == facts


def test_a_directory_that_is_no_study_is_refused(tmp_path: Path) -> None:
    """A file, a directory with other files, and a missing parent are refused; an empty directory is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file", "no/such"):
        with pytest.raises(InputError):
            open_study(tmp_path / name, cartpole(), SETTINGS)
    (tmp_path / "empty").mkdir()
    open_study(tmp_path / "empty", cartpole(), Settings(episodes=1))


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", '{"settings": []}', '{"settings": {}, "reference": {}}'])
def test_a_damaged_study_is_one_line(straight: Any, tmp_path: Path, damage: str) -> None:
    """A study.json that is cut or holds something else is an InputError naming the directory."""
    _, folder = copy_of_study(straight, tmp_path / "s")
    (folder / "study.json").write_text(damage)
    with pytest.raises(InputError, match="damaged"):
        open_study(folder, cartpole(), SETTINGS)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_calibration_is_one_line(straight: Any, tmp_path: Path, damage: bytes | None) -> None:
    """A calibration.npy that is missing or cut is an InputError naming the directory."""
    _, folder = copy_of_study(straight, tmp_path / "s")
    (folder / "calibration.npy").unlink() if damage is None else (folder / "calibration.npy").write_bytes(damage)
    with pytest.raises(InputError, match="damaged"):
        open_study(folder, cartpole(), SETTINGS)


@pytest.mark.parametrize("where", ["prepare", "versions", "np.save"])
def test_a_study_that_could_not_be_begun_can_be_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whenever its preparation is interrupted, the same command works afterwards."""

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail) if where == "np.save" else patch.setattr(quantkit.sweep, where, fail)
        with pytest.raises(KeyboardInterrupt):
            open_study(tmp_path / "s", cartpole(), Settings(episodes=1))
    open_study(tmp_path / "s", cartpole(), Settings(episodes=1))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["calibration.npy", "s", "study.json", "study.lock"]


def test_a_study_killed_while_it_is_written_can_be_begun_again(straight: Any, tmp_path: Path) -> None:
    """A directory with what a kill leaves, its states or files under temporary names, is not refused as foreign."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s/calibration.npy").write_bytes((straight[0] / "calibration.npy").read_bytes())
    for name in (".calibration.x1y2.npy", ".study.z3.json", "study.lock"):
        (tmp_path / "s" / name).write_bytes(b"")
    open_study(tmp_path / "s", cartpole(), Settings(episodes=1))


@pytest.mark.parametrize("fact", ["source", "libraries"])
def test_other_code_is_refused_and_named(straight: Any, tmp_path: Path, fact: str) -> None:
    """Other source of ours is refused; other libraries, too, unless accepted; a study without the facts is taken."""
    _, folder = copy_of_study(straight, tmp_path / "s")
    document = json.loads((folder / "study.json").read_text())
    here = document["settings"][fact]
    there = "0123456789ab" if fact == "source" else here | {"torch": "1.0"}
    (folder / "study.json").write_text(json.dumps(document | {"settings": document["settings"] | {fact: there}}))
    with pytest.raises(InputError, match="0123456789ab" if fact == "source" else r"torch 1\.0 there") as caught:
        open_study(folder, cartpole(), SETTINGS)
    assert "\n" not in str(caught.value)
    if fact == "libraries":
        open_study(folder, cartpole(), SETTINGS, accept_versions=True)
    else:
        with pytest.raises(InputError, match="digest"):
            open_study(folder, cartpole(), SETTINGS, accept_versions=True)
    del document["settings"][fact]
    (folder / "study.json").write_text(json.dumps(document))
    open_study(folder, cartpole(), SETTINGS)


def test_a_space_is_a_product_without_repetition() -> None:
    """Every combination once, in a fixed order; names that mean the same count once."""
    assert len(RECIPES) == 12 == len({design_id(r) for r in RECIPES})
    assert SPACE.recipes() == RECIPES
    same = Space(("int4", "INT4"), ("int4",), ("row", "channel")).recipes()
    assert len(same) == 1
    pipelines = ((), (parse_step("gptq"),), (parse_step("equalize"), parse_step("gptq")))
    exceptions = (("first", make_plan("int8", "int8")),)
    space = Space(("int3", "int4"), ("int4",), ("row",), pipelines, exceptions, seed=5).recipes()
    assert len(space) == 6 and all(r.plan[1:] == exceptions and r.seed == 5 for r in space)
    with pytest.raises(InputError, match="int9"):
        Space(("int4", "int9"), ("int4",)).recipes()


def test_worker_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that limit BLAS threads are set inside and as before outside, also after an exception."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with pytest.raises(RuntimeError), one_thread_per_process():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
        raise RuntimeError
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_sabotage_a_sweep_that_starts_over_is_caught(
    straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resume law notices a sweep that forgets its rows."""

    def forgetful(study: Study, recipes: Any, folder: Path) -> list[Row]:
        (folder / "rows.jsonl").unlink(missing_ok=True)
        return run(study, recipes, folder)

    with pytest.raises(AssertionError):
        resume_law(straight, tmp_path / "s", monkeypatch, forgetful)
