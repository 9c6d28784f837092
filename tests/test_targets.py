"""Laws of hardware targets: a design is priced for several and played once; each sees a study of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_policies import cartpole
from test_study import without_timings
from typer.testing import CliRunner

from hwmodel.devices import find_device
from quantkit.backends import workers
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.page import page_data
from quantkit.pareto import front, value
from quantkit.pick import pick
from quantkit.recipe import uniform
from quantkit.report import read_study, write_report
from quantkit.results import Row, read_rows
from quantkit.search import search
from quantkit.search_space import SearchSpace
from quantkit.study import Settings, Study, evaluate_design, prepare, settings_for
from quantkit.sweep import open_study
from quantkit.targets import Target, find_target, parse_targets, points, seen_from, targets_of

TARGETS = parse_targets(("xc7a35t", "lfe5u-25f"), (1.0, 6.0), ())
SETTINGS = settings_for(TARGETS, episodes=6)
AGENT = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"


@pytest.fixture(scope="module")
def study() -> Study:
    """A study of a small policy, priced for two parts at two latencies."""
    return prepare(cartpole(), SETTINGS)


def test_each_target_costs_what_a_study_of_its_own_says(study: Study) -> None:
    """All that another target changes of a row is its cost, and that is the one of a study with this target alone."""
    recipe = uniform("int4", "int3")
    row = evaluate_design(study, recipe)
    for target, seen in zip(TARGETS, points(row), strict=True):
        alone = evaluate_design(replace(study, settings=settings_for((target,), episodes=6)), recipe)
        assert without_timings(seen) == without_timings(alone)
    luts = [value(seen, "luts") or 0.0 for seen in points(row)]
    assert len(set(luts)) == len(TARGETS) and luts[0] > luts[1]  # quicker is larger


def test_targets_survive_their_json() -> None:
    """What study.json has of a study's targets gives them back; names find one of them, or say which there are."""
    settings: dict[str, Any] = TARGETS[0].to_json() | {"also": [t.to_json() for t in TARGETS[1:]]}
    settings = json.loads(json.dumps(settings))
    assert targets_of(settings) == TARGETS == SETTINGS.targets
    assert find_target(settings, "lfe5u-25f within 6") == 3
    with pytest.raises(InputError, match="2 targets"):
        find_target(settings, "xc7a35t")
    assert targets_of({"device": None}) == () == Settings().targets


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A search for several targets at once."""
    folder = tmp_path_factory.mktemp("targets") / "s"
    study = open_study(folder, cartpole(), SETTINGS)
    with workers(study) as mapper:
        space = SearchSpace(("int2", "int3", "int5"), ("int3", "int5"))
        return folder, search(study, folder, space, mapper, designs=12, batch=4, points=4)


def test_a_search_for_several_targets_plays_each_design_once(found: tuple[Path, list[Row]]) -> None:
    """Every row has all costs; each target's front has complete returns; no episode is played twice for a target."""
    folder, rows = found
    assert all(len(points(row)) == len(TARGETS) for row in rows) and len({row["id"] for row in rows}) == len(rows)
    document, every = read_study(folder)
    for place in range(len(TARGETS)):
        _, seen = seen_from(document, every, place)
        assert all(row["episodes"] == SETTINGS.episodes for row in (seen[i] for i in front(seen)))
    most = {row["id"]: row["episodes"] for row in rows}
    assert sum(row["played"] for row in read_rows(folder / "rows.jsonl")) == sum(most.values())


def test_reports_show_each_target(found: tuple[Path, list[Row]]) -> None:
    """The page has each target's costs and design to take; the table a line for each design and target."""
    folder, rows = found
    data = page_data(folder)["study"]
    document, every = read_study(folder)
    assert [one["name"] for one in data["targets"]] == list(map(str, TARGETS))
    for place, one in enumerate(data["targets"]):
        _, seen = seen_from(document, every, place)
        assert [cost["values"]["luts"] for cost in one["costs"]] == [value(row, "luts") for row in seen]
        told = write_report(folder, target=str(TARGETS[place]), stem=f"p{place}")
        assert told["knee"]["id"] == one["take"]["id"] and told["target"] == one["name"]
    assert len((folder / "pareto.csv").read_text().splitlines()) == 1 + len(rows) * len(TARGETS)


# --- commands -------------------------------------------------------------------------------------


def call(*arguments: Any) -> Any:
    """`quantkit ...` in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_commands_take_lists_of_parts_and_latencies(tmp_path: Path) -> None:
    """A sweep over two parts and two latencies; pick takes the cheapest of all, or of those that are wished for."""
    folder = tmp_path / "s"
    sweep = call("sweep", AGENT, "-o", folder, "--weights", "int4,int6", "--acts", "int6", "-n", 3, "--jobs", 1,
                 "--device", "xc7a35t,xc7z020", "--latency-us", "4,8", "--json")  # fmt: skip
    assert sweep.exit_code == 0, sweep.stderr
    names = ["xc7a35t within 4 µs", "xc7a35t within 8 µs", "xc7z020 within 4 µs", "xc7z020 within 8 µs"]
    assert json.loads(sweep.stdout)["targets"] == names
    every = pick(folder, tmp_path / "a", max_loss="1e9", confirm=0)
    assert every["target"] == Target(find_device("xc7a35t"), 8.0).to_json() and not every["differences"]
    assert "4 hardware targets" in every["chosen"]["why"]
    quick = pick(folder, tmp_path / "b", max_loss="1e9", confirm=0, device="xc7z020", latency_us=4.0)
    assert quick["target"] == Target(find_device("xc7z020"), 4.0).to_json() and not quick["differences"]
    assert quick["estimate"]["latency_us"] <= 4 < every["estimate"]["latency_us"] <= 8
    other = pick(folder, tmp_path / "c", max_loss="1e9", confirm=0, latency_us=20.0)
    assert other["target"]["latency_us"] == 20.0 and not other["differences"]
    shown = call("pareto", folder, "--target", "xc7z020 within 4")
    assert shown.exit_code == 0 and "xc7z020 within 4" in shown.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--device", "xc7a35t,none"), "none"),
        (("--device", "none", "--luts", "300"), "--luts folds the hardware of a part"),
        (("--device", "none", "--latency-us", "3"), "--latency-us folds the hardware of a part"),
        (("--device", ","), "--device"),
        (("--latency-us", "5,fast"), "fast"),
        (("--latency-us", "0"), "--latency-us"),
        (("--luts", "10.5"), "10.5"),
        (("--luts", "1000", "--latency-us", "3"), "not both"),
    ],
)
def test_a_mistake_in_a_list_of_targets_is_one_line(options: tuple[str, ...], word: str, tmp_path: Path) -> None:
    """Exit code 2 and one line that names what is wrong, before anything is written."""
    result = call("search", AGENT, "-o", tmp_path / "s", *options)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "s").exists()
