"""Laws of searches: the same designs and rows however they are run or interrupted, and nothing paid for twice."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policies import cartpole
from test_study import without_timings
from typer.testing import CliRunner

import quantkit.study
from hwmodel.devices import find_device
from quantkit.backends import workers
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.pareto import front, value
from quantkit.recipe import Recipe, parse_step
from quantkit.results import Row, read_rows
from quantkit.search import search
from quantkit.search_fronts import paired
from quantkit.search_record import check_storage, open_storage
from quantkit.search_space import SearchSpace
from quantkit.sensitivity import measure
from quantkit.study import Settings, Study, design_id, evaluate_design
from quantkit.surrogate import predict
from quantkit.sweep import open_study

pytest.importorskip("optuna")
SETTINGS = Settings(episodes=24, device=find_device("xc7a35t"))
SPACE = SearchSpace(("int2", "int3", "int5"), ("int3", "int5"), pipelines=((), (parse_step("gptq"),)))
DESIGNS, BATCH = 14, 4


def begin(folder: Path) -> Study:
    """A study of a small policy."""
    return open_study(folder, cartpole(), SETTINGS)


def searched(folder: Path, **options: Any) -> list[Row]:
    """A search in this process."""
    study = begin(folder)
    with workers(study) as mapper:
        return search(study, folder, SPACE, mapper, designs=DESIGNS, batch=BATCH, points=2, **options)


def by_id(rows: list[Row]) -> dict[str, Row]:
    """Rows as two runs must agree on them; of a design with several, the last."""
    return {row["id"]: without_timings(row) for row in rows}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """An undisturbed search."""
    folder = tmp_path_factory.mktemp("straight") / "s"
    return folder, searched(folder)


def test_a_search_keeps_its_budget_and_tells_who_asked(straight: tuple[Path, list[Row]]) -> None:
    """So many designs, no two alike, first the allocation's; every row is in the file and can be built again."""
    folder, rows = straight
    assert len(rows) == DESIGNS == len(by_id(rows))
    origins = [row["origin"] for row in rows]
    assert set(origins) == {"allocation", "search"} and origins == sorted(origins)
    assert by_id(read_rows(folder / "rows.jsonl")) == by_id(rows)
    assert all(design_id(Recipe.from_json(row["recipe"])) == row["id"] for row in rows)


@pytest.mark.parametrize("lead", [0.0, 1000.0])
def test_the_first_designs_stop_where_nothing_can_be_added(lead: float, tmp_path: Path) -> None:
    """They go by ascending cost, in batches, up to one that returns as much as float: all of them if none does."""
    study = begin(tmp_path)
    float_ = study.reference
    returns = tuple(r + lead for r in float_.returns)
    study = replace(study, reference=replace(float_, returns=returns, mean=float_.mean + lead))
    with workers(study) as mapper:
        rows = search(study, tmp_path, SPACE, mapper, designs=24, batch=2, points=12)
    first = [row for row in rows if row["origin"] == "allocation"]
    luts = [value(row, "luts") or 0.0 for row in first]
    assert all(b > 0.98 * a for a, b in itertools.pairwise(luts))  # predicted costs ascend, those of rows nearly
    reached = [np.mean(got := row["score"]["returns"]) >= np.mean(returns[: len(got)]) for row in first]
    assert (len(first) > 10 and not any(reached)) if lead else (len(first) == 2 and any(reached))


def test_the_front_has_complete_returns(straight: tuple[Path, list[Row]]) -> None:
    """What is on the front and of some use played all episodes; others may have stopped early; a row tells."""
    folder, rows = straight
    study = begin(folder)
    shown = paired(study, rows)
    useless = min(study.random.mean, study.reference.mean)
    useful = [i for i in front(shown, "luts", "mean") if shown[i]["score"]["mean"] >= useless]
    assert useful
    for i in useful:
        assert rows[i]["episodes"] == SETTINGS.episodes == rows[i]["score"]["n"]
    assert any(row["episodes"] < SETTINGS.episodes for row in rows)
    assert all(row["score"]["n"] == row["episodes"] == len(row["score"]["returns"]) for row in rows)


def test_the_same_search_again_pays_for_nothing(
    straight: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run again, it finds every row there; with a larger budget it goes on from the same designs."""
    folder, rows = straight
    before = (folder / "rows.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(quantkit.study, "evaluate_design", lambda *_: pytest.fail("evaluated again"))
        assert by_id(searched(folder)) == by_id(rows)
    assert (folder / "rows.jsonl").read_bytes() == before


def test_a_larger_budget_goes_on_from_a_smaller(straight: tuple[Path, list[Row]], tmp_path: Path) -> None:
    """Ended early, which completes a front of its own, and run again, it proposes what one long search does."""
    study = begin(tmp_path / "s")
    for designs in (DESIGNS - 5, DESIGNS - 3, DESIGNS):
        with workers(study) as mapper:
            rows = search(study, tmp_path / "s", SPACE, mapper, designs=designs, batch=BATCH, points=2)
    with workers(study) as mapper:
        other = begin(tmp_path / "t")
        once = search(other, tmp_path / "t", SPACE, mapper, designs=DESIGNS, batch=BATCH, points=2)
    assert [row["id"] for row in rows] == [row["id"] for row in once]


def test_two_processes_make_one_search(straight: tuple[Path, list[Row]], tmp_path: Path) -> None:
    """Two at once on one folder end with the rows of one; no design is evaluated twice for the same episodes."""
    context = multiprocessing.get_context("fork")
    begin(tmp_path / "s")
    processes = [context.Process(target=searched, args=(tmp_path / "s",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    rows = read_rows(tmp_path / "s/rows.jsonl")
    assert by_id(rows) == by_id(straight[1])
    assert len(rows) == len(read_rows(straight[0] / "rows.jsonl"))


def test_a_killed_search_goes_on(straight: tuple[Path, list[Row]], tmp_path: Path) -> None:
    """Killed with SIGKILL at eight random moments, it ends with the rows of an undisturbed one."""
    context, rng = multiprocessing.get_context("fork"), random.Random(3)
    begin(tmp_path / "s")
    for _ in range(8):
        process = context.Process(target=searched, args=(tmp_path / "s",))
        process.start()
        time.sleep(rng.uniform(0.02, 0.5))
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
    searched(tmp_path / "s")
    assert by_id(read_rows(tmp_path / "s/rows.jsonl")) == by_id(straight[1])


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_samplers_and_seeds_matter(straight: tuple[Path, list[Row]], tmp_path: Path, sampler: Any) -> None:
    """Another sampler or seed proposes other designs behind the same allocation; budgets hold for all of them."""
    study = begin(tmp_path / "s")
    limit = sorted(value(row, "luts") or 0.0 for row in straight[1])[8]
    with workers(study) as mapper:
        space = replace(SPACE, seed=5)
        rows = search(
            study,
            tmp_path / "s",
            space,
            mapper,
            designs=DESIGNS,
            batch=BATCH,
            points=2,
            sampler=sampler,
            budgets={"luts": limit},
        )
    assert all((value(row, "luts") or 0.0) <= 1.05 * limit for row in rows)
    assert set(by_id(rows)) != set(by_id(straight[1]))


def test_predictions_are_close(straight: tuple[Path, list[Row]]) -> None:
    """Predicted memory is exact, predicted LUTs are within 5 % of the row's, for any mix of cells."""
    folder, _ = straight
    study = begin(folder)
    cells = measure(study, folder, SPACE.weights, SPACE.acts)
    rng = random.Random(1)
    from quantkit.sensitivity import assemble

    for _ in range(5):
        chosen = [rng.choice(options) for options in cells.values()]
        row, guess = evaluate_design(study, assemble(chosen), True), predict(chosen, study.settings)
        assert guess.cost("weight_kib") == pytest.approx(row["weight_kib"])
        assert guess.cost("luts") == pytest.approx(row["cost"]["luts"], rel=0.05)


def test_the_record_is_written_where_asked(tmp_path: Path) -> None:
    """Each evaluated design is one trial in the storage, by default a journal in the folder; another run adds none."""
    import optuna

    url = f"sqlite:///{tmp_path}/record.db"
    for storage in (None, url, url):
        searched(tmp_path / "s", storage=storage)
        with open_storage(storage, tmp_path / "s") as where:
            (name,) = optuna.get_all_study_names(where)
            trials = optuna.load_study(study_name=name, storage=where).trials
        assert len({t.user_attrs["design"] for t in trials}) == len(trials) == DESIGNS


def test_a_torn_record_is_begun_anew(tmp_path: Path) -> None:
    """A journal that a kill cut off in the middle of a line does not keep a search from going on, and is mended."""
    import optuna

    searched(tmp_path / "s")
    journal = tmp_path / "s/optuna.journal"
    journal.write_bytes(journal.read_bytes()[:-30])
    for _ in range(2):
        searched(tmp_path / "s")
    with open_storage(None, tmp_path / "s") as where:
        (name,) = optuna.get_all_study_names(where)
        assert len(optuna.load_study(study_name=name, storage=where).trials) == DESIGNS


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/x.db", "postgresql://nobody@127.0.0.1:1/x", "hello"])
def test_a_storage_that_cannot_be_opened_is_one_line(url: str, tmp_path: Path) -> None:
    """Whatever the driver says, it is an InputError that names the URL and what would be accepted."""
    with pytest.raises(InputError, match="cannot be opened") as caught:
        check_storage(url, tmp_path)
    assert url in str(caught.value) and "sqlite:///FILE" in str(caught.value) and "\n" not in str(caught.value)


def test_impossible_wishes_are_one_line(tmp_path: Path) -> None:
    """A budget that nothing meets, one without a device, and a format that no layer takes."""
    study = begin(tmp_path / "s")
    with workers(study) as mapper:
        for budgets, words in (({"luts": 3.0}, "nearest"), ({"lutz": 3.0}, "lutz")):
            with pytest.raises(InputError, match=words):
                search(study, tmp_path / "s", SPACE, mapper, designs=4, budgets=budgets)
        without = replace(study, settings=replace(SETTINGS, device=None))
        with pytest.raises(InputError, match="device"):
            search(without, tmp_path / "s", SPACE, mapper, designs=4)


def test_a_space_that_is_used_up_ends_a_search(tmp_path: Path) -> None:
    """With fewer designs than asked for, each is tried once and the search ends."""
    study = begin(tmp_path / "s")
    space = SearchSpace(("int3", "int5"), ("int4",))
    with workers(study) as mapper:
        rows = search(study, tmp_path / "s", space, mapper, designs=500, batch=BATCH)
    assert len(rows) == len(by_id(rows)) <= 8


# --- the command ----------------------------------------------------------------------------------

AGENT = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"
SMALL = ("--budget-designs", "3", "-n", "3", "--jobs", "1", "--batch", "2")


def call(*arguments: Any) -> Any:
    """`quantkit search` in this process."""
    return CliRunner().invoke(app, ["search", *map(str, arguments)], catch_exceptions=False)


def test_the_command_searches_and_shows_a_front(tmp_path: Path) -> None:
    """Options from a file and from the command line: the rows, the record and the figure are in the folder."""
    config = tmp_path / "study.toml"
    config.write_text(
        'weights = ["int3", "int5"]\nacts = "int4"\nbudget-designs = 9\ndevice = "xc7z020"\nstep = "gptq"\n'
    )
    result = call(AGENT, "-o", tmp_path / "s", *SMALL, "--config", config, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["designs"] == 3
    settings = json.loads((tmp_path / "s/study.json").read_text())["settings"]
    assert settings["device"] == "xc7z020" and settings["episodes"] == 3
    rows = read_rows(tmp_path / "s/rows.jsonl")
    assert len(rows) == 3 and {row["steps"] for row in rows} == {"gptq"}
    assert {"sensitivity.jsonl", "optuna.journal", "pareto.png"} <= {p.name for p in (tmp_path / "s").iterdir()}


MISTAKES = {
    'devise = "xc7z020"': ("devise", "'device'"),
    "weights = [[1]]": ("weights",),
    "weights = ": ("study.toml",),
    'weights = "int9"': ("int9",),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_study_file_is_one_line(text: str, tmp_path: Path) -> None:
    """The file, the key and the nearest option are named, before anything is loaded."""
    (tmp_path / "study.toml").write_text(text)
    result = call("nothing.zip", "-o", tmp_path / "s", "--config", tmp_path / "study.toml")
    said = "".join(result.stderr.replace("│", "").split())  # the runner's frame breaks long words
    assert result.exit_code == 2 and all(word in said for word in MISTAKES[text])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--storage", "sqlite:////no/such/folder/x.db"), ("--storage", "cannot be opened")),
        (("--max-luts", "3"), ("luts <= 3", "nearest")),
        (("--device", "none", "--cost", "luts"), ("luts", "device")),
        (("--weights", "int4,innt3"), ("innt3",)),
        (("--ray", "127.0.0.1:1"), ("127.0.0.1:1", "answers")),
        (("--acts", "int1"), ("net.", "no positive value")),
    ],
)
def test_a_mistake_of_a_search_is_one_line(options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    """Exit code 2 and one line that names what is wrong."""
    result = call(AGENT, "-o", tmp_path / "s", *SMALL, *options)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
