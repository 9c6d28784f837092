"""The page of a study: its numbers are the rows', nothing of them becomes markup, and a browser can use it offline."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, document, error
from test_figures import CASES, study

from quantkit.cli import app
from quantkit.cli.options import recipe_of
from quantkit.errors import InputError
from quantkit.page import _formats, page_data, quantize_command, write_page
from quantkit.pareto import COLUMNS, COSTS, front, knee, value
from quantkit.recipe import Recipe, make_plan, parse_step
from quantkit.report import read_study
from quantkit.results import append_row
from quantkit.study import design_id

AGENTS = Path(__file__).parents[1] / "benchmarks/agents"
AGENT = AGENTS / "sac/Pendulum-v1.zip"
HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>&amp;$^$\''


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six designs made by the command, with a sensitivity file and one design's robustness."""
    folder = tmp_path_factory.mktemp("page") / "study"
    options = ("--weights", "int3,int6,e2m1", "--acts", "int4,int8", "-n", "3", "--jobs", "1")
    assert call("sweep", AGENT, "-o", folder, *options, "--layer", "first=int8/int8").exit_code == 0
    for layer in ("net.fc1", "net.fc2"):
        for weights in ("int3", "int6"):
            row = {"id": layer + weights, "layer": layer, "weights": weights, "acts": "int4", "granularity": "row"}
            append_row(folder / "sensitivity.jsonl", row | {"steps": "rtn", "metric": "action_error", "value": 0.25})
    found = call("robustness", AGENT, "--against", AGENT, "--condition", "noise=0.1", "-n", "2", "--json")
    first = read_study(folder)[1][0]["id"]
    append_row(folder / "robustness.jsonl", {"id": first, **json.loads(found.stdout)})
    return folder


def embedded(page: str) -> dict[str, Any]:
    """The JSON document that a page holds."""
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.DOTALL)
    assert found
    told = json.loads(found[1])
    assert isinstance(told, dict)
    return told


def written(folder: Path, output: Path) -> str:
    """The page of a study."""
    return write_page(folder, output).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_the_page_are_those_of_the_rows(case: str, tmp_path: Path) -> None:
    """Each design has each column's number of its row, bit for bit, and no other; the first choice is the knee."""
    folder = study(tmp_path / "s", CASES[case])
    told = embedded(written(folder, tmp_path / "page.html"))
    _, rows = read_study(folder)
    assert [d["id"] for d in told["designs"]] == [row["id"] for row in rows]
    for design, row in zip(told["designs"], rows, strict=True):
        expected = {name: value(row, name) for name in COLUMNS if value(row, name) is not None}
        assert design["values"] == expected
        assert (design["n"], design["stderr"]) == (row["score"]["n"], row["score"]["stderr"])
        assert design["verdict"] == row["verdict"]
    assert set(told["columns"]) == {n for n in COLUMNS if any(value(row, n) is not None for row in rows)}
    on_front = front(rows, told["x"], "mean")
    assert told["knee"] == knee(rows, on_front, 10.0, 3.0, told["x"])


def test_returns_shapes_and_costs_are_told(real: Path) -> None:
    """Per-episode returns are the rows'; layers have the checkpoint's shapes; costs by layer add up to the row's."""
    _, rows = read_study(real)
    found = page_data(real)["study"]
    assert [(e["inputs"], e["outputs"]) for e in found["layers"]] == [(3, 64), (64, 64), (64, 1)]
    for design, row in zip(found["designs"], rows, strict=True):
        assert design["returns"] == row["score"]["returns"] and design["paired"]
        for resource in ("luts", "ffs", "dsps", "bram18"):
            assert sum(layer[resource] for layer in design["cost"]) == row["cost"][resource]
        assert [w["name"] for w, _, _ in design["layers"]] == ["int8", *[row["weights"].split()[0]] * 2]
    assert found["sensitivity"]["action error"]["values"] == [[0.25, 0.25], [0.25, 0.25]]
    assert [d["robustness"] is not None for d in found["designs"]] == [True, *[False] * 5]


PLANS = [
    (("*", "int4", "e3m2", "row"),),
    (("*", "mxfp4", "mxfp8", "row"),),
    (("*", "int4", "int8", "group4"), ("first", "int8", "float", "group4"), ("net.*2", "e2m1", "int4", "group4")),
    (("*", "float", "int8", "tensor"), ("last", "int8", "int8", "tensor")),
    (("*", "int3", "int4/e4m3x4", "row"), ("net.head", "int8", "int4/e4m3x4", "row")),
]
STEPS = [(), ("gptq:act_order=true",), ("equalize", "act_scales:scale=percentile", "gptq:damp=0.02")]


def recipes() -> list[Recipe]:
    """Recipes of every kind that the command line can say."""
    found = []
    for i, plan in enumerate(PLANS):
        for steps in STEPS:
            entries = tuple((glob, make_plan(*names)) for glob, *names in plan)
            found.append(Recipe(entries, tuple(parse_step(s) for s in steps), i))
    return found


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: design_id(r))
def test_the_command_makes_the_same_design(recipe: Recipe) -> None:
    """What `quantkit quantize` reads from the page's command is the design's recipe."""
    import typer

    row = {"id": design_id(recipe), "recipe": recipe.to_json()}
    text = quantize_command(row, {"checkpoint": "an agent's.zip"}, {})
    assert text is not None
    words = shlex.split(text)
    command = typer.main.get_command(app).get_command(None, "quantize")  # type: ignore[attr-defined]
    p = command.make_context("quantize", words[2:]).params
    assert str(p["checkpoint"]) == "an agent's.zip"
    again = recipe_of(p["weights"], p["acts"], p["granularity"], p["step"], p["preset"], p["layer"], p["seed"])
    assert design_id(again) == design_id(recipe)


def test_the_command_of_the_page_plays_the_rows_episodes(real: Path, tmp_path: Path) -> None:
    """Run as it stands, with the checkpoint as it was typed, it writes a policy with the row's returns, bit for bit."""
    shutil.copytree(real, tmp_path / "s")
    facts = json.loads((real / "study.json").read_text())
    facts["origin"]["command"] = shlex.join(["quantkit", "sweep", str(AGENT)])  # what a shell would have typed
    (tmp_path / "s/study.json").write_text(json.dumps(facts))
    design = page_data(tmp_path / "s")["study"]["designs"][4]
    words = shlex.split(design["command"])
    assert words[2] == str(AGENT)
    words[words.index("-o") + 1] = str(tmp_path / "q")
    assert call(*words[1:]).exit_code == 0
    assert document("evaluate", tmp_path / "q", "-n", "3")["returns"] == design["returns"]


def test_a_recipe_that_the_command_line_cannot_say_has_no_command() -> None:
    """Layers with granularities of their own: the page offers `pick` only."""
    recipe = Recipe((("*", make_plan("int4", "int4")), ("first", make_plan("int8", "int8", "tensor"))))
    assert quantize_command({"id": "x", "recipe": recipe.to_json()}, {}, {}) is None


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: design_id(r))
def test_formats_by_layer_are_the_recipes(recipe: Recipe) -> None:
    """The picture's formats equal `Recipe.plan_for`, layer by layer."""
    names = ["net.fc1", "net.fc2", "net.head"]
    for i, name in enumerate(names):
        plan = recipe.plan_for(name, i, len(names))
        weight, act, granularity = _formats(recipe.to_json()["plan"], name, i, len(names))
        told = [None if f is None else str(f) for f in (plan.weight, plan.act)]
        assert [None if f["name"] == "float" else f["name"] for f in (weight, act)] == told
        assert granularity == str(plan.granularity)


class _Tags(HTMLParser):
    """Counts what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]
        assert not any(k.startswith("on") for k, _ in attrs)


def hostile(folder: Path) -> Path:
    """A study whose every text is an attack."""
    rows = [dict(row) for row in CASES["many"][:4]]
    for index, row in enumerate(rows):
        row |= {key: HOSTILE for key in ("weights", "acts", "granularity", "steps", "origin")}
        row["id"], row["float_layers"] = f"{HOSTILE}{index}", {HOSTILE: HOSTILE}
        row["recipe"] = {
            "plan": [{"layers": "*", "weight": HOSTILE, "act": HOSTILE, "granularity": HOSTILE}],
            "steps": [[HOSTILE, {HOSTILE: HOSTILE}]], "seed": 0,
        }  # fmt: skip
        layer = {"name": HOSTILE, "luts": 1, "ffs": 1, "dsps": 0, "bram18": 0, "pe": 1, "simd": 1, "cycles": 9}
        row["cost"] = row["cost"] | {"layers": [layer | {"memory": HOSTILE, "converter": HOSTILE}], "residual": 0.1}
        row["cost"]["device"] = HOSTILE
        row["verdict"] = {"verdict": HOSTILE, "diff_mean": 1.0, "low": 0.0, "high": 2.0}
    rows.append({"id": "bad", "error": HOSTILE})
    study(folder, rows)
    facts = json.loads((folder / "study.json").read_text())
    facts["settings"] |= {"checkpoint": HOSTILE, "checkpoint_sha256": HOSTILE, "algo": HOSTILE, "device": "xc7a35t"}
    facts["settings"]["env"] = {"id": HOSTILE, "kwargs": {HOSTILE: HOSTILE}}
    facts |= {"origin": {"command": HOSTILE, "path": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    (folder / "study.json").write_text(json.dumps(facts))
    cell = {"layer": HOSTILE, "weights": HOSTILE, "acts": "x", "granularity": "y", "steps": "z", "metric": HOSTILE}
    append_row(folder / "sensitivity.jsonl", cell | {"id": "a", "value": 1.0})
    numbers = {"mean": 1.0, "worst_decile": 1.0, "chatter": 0.1}
    apart = {"mean": 0.0, "low": None, "high": None}
    harder = {"condition": HOSTILE, **numbers, "reference": numbers, "difference": apart}
    found = {"episodes": 1, "seed": 0, "rows": [harder]}
    append_row(folder / "robustness.jsonl", {"id": HOSTILE + "0", **found})
    return folder


def test_nothing_from_rows_becomes_markup(tmp_path: Path) -> None:
    """A hostile study has the tags of a harmless one, and no page has a link or source of its own."""
    pages = [hostile(tmp_path / "h"), study(tmp_path / "s", CASES["many"][:4])]
    counts = []
    for folder in pages:
        parser = _Tags()
        parser.feed(written(folder, folder / "page.html"))
        counts.append({tag: parser.tags.count(tag) for tag in ("script", "img", "b", "style", "a", "button", "meta")})
        assert parser.links == ["#designs"]
    counts[0]["button"] -= 1  # that of the command, which the harmless study does not know
    assert counts[0] == counts[1] and counts[0]["script"] == 3 and counts[0]["img"] == 0


def test_bad_input_is_one_line(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No study, an existing file, another checkpoint, damaged sensitivities, a library that is missing."""
    page = tmp_path / "p.html"
    page.write_text("mine")
    assert "not a study directory" in error("report", tmp_path, "-o", tmp_path / "q.html")
    assert "not a study directory" in error("report", tmp_path / "never")
    assert "exists already" in error("report", real, "-o", page) and page.read_text() == "mine"
    other = AGENTS / "ppo/LunarLander-v3.zip"
    assert "is another checkpoint" in error("report", real, "-o", tmp_path / "q.html", "--checkpoint", other)
    assert "no such file" in error("report", real, "-o", tmp_path / "q.html", "--checkpoint", tmp_path / "no.zip")
    damaged = study(tmp_path / "s", CASES["one"])
    append_row(damaged / "sensitivity.jsonl", {"id": "x", "layer": "fc"})
    assert "sensitivity.jsonl: not rows of layer" in error("report", damaged)
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(InputError, match=re.escape("pip install 'quantkit[study]'")):
        write_page(study(tmp_path / "t", CASES["one"]), tmp_path / "t.html")
    assert not (tmp_path / "t.html").exists()


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium")
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


def opened(browser: Any, page: Path, **context: Any) -> tuple[Any, list[str]]:
    """The page in a fresh tab, and what went wrong so far: console messages, exceptions, requests beyond the file."""
    tab = browser.new_context(**context).new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("#front .plotly .scatterlayer .point", state="attached")
    return tab, wrong


DRAWN = """() => document.getElementById("front").data.filter((t) => t.meta).flatMap(
    (t) => t.meta.members.map((i, k) => [i, t.x[k], t.y[k], t.marker.size > 8]))"""


def test_a_browser_switches_axes_and_selects(real: Path, browser: Any, tmp_path: Path) -> None:
    """For every pair of axes the drawn points are the rows' numbers and the large ones the front; clicking a point,
    or a key in the table, shows that design's recipe, commands and formats; nothing is fetched, no error is told."""
    write_page(real, tmp_path / "page.html")
    _, rows = read_study(real)
    tab, wrong = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 1200})
    pairs = [(x, y) for x in COSTS for y in ("mean", "iqm", "action_error")]
    for x, y in pairs:
        tab.select_option("#x", x)
        tab.select_option("#y", y)
        drawn = tab.evaluate(DRAWN)
        assert sorted((i, px, py) for i, px, py, _ in drawn) == [
            (i, value(row, x), value(row, y)) for i, row in enumerate(rows)
        ]
        assert sorted(i for i, *_, large in drawn if large) == sorted(front(rows, x, y))
    tab.select_option("#x", "luts")
    tab.select_option("#y", "mean")
    tab.check("#all")
    for index in front(rows, "luts", "mean"):
        row = rows[index]
        x, y = tab.evaluate(
            """([x, y]) => { const gd = document.getElementById("front"), box = gd.getBoundingClientRect(),
                a = gd._fullLayout.xaxis, b = gd._fullLayout.yaxis;
                return [box.left + a._offset + a.d2p(x), box.top + b._offset + b.d2p(y)]; }""",
            [value(row, "luts"), value(row, "mean")],
        )
        tab.wait_for_timeout(400)  # two clicks within 300 ms would be a double click
        tab.mouse.move(x, y)
        tab.wait_for_selector("#front .hoverlayer .hovertext")
        tab.mouse.click(x, y)
        tab.wait_for_selector(f'#table tr.on [data-design="{row["id"]}"]')
        shown = tab.inner_text("#chosen")
        assert f"weights {row['weights']}, inputs {row['acts']}" in shown and row["verdict"]["verdict"] in shown
        assert f"--id {row['id']}" in shown and "--layer first=int8/int8" in shown
        assert tab.locator("#network svg").count() == 3
        assert tab.locator("#network svg .fmt").nth(1).text_content() == "int8"
    tab.check("#every")
    assert tab.locator("#table tbody tr").count() == len(rows)
    heads = tab.locator("#table thead th").all_inner_texts()
    for key, head in (("granularity", "scales"), ("steps", "method")):  # what all have in common is told once
        same = len({row[key] for row in rows}) == 1
        assert (head in heads) != same and (rows[0][key] in tab.inner_text("#alike").replace("\u200b", "")) == same
    tab.locator(f'[data-design="{rows[0]["id"]}"]').focus()
    tab.keyboard.press("Enter")
    assert rows[0]["id"] in tab.inner_text("#recipe") and "noise=0.1" in tab.inner_text("#robustness")
    assert tab.evaluate("document.activeElement.dataset.design") == rows[0]["id"]
    assert (
        tab.evaluate("document.getElementById('sensitivity').data[0].customdata")
        == [[[0.25, "int3 × int4"], [0.25, "int6 × int4"]]] * 2
    )
    assert tab.locator("#front .modebar-btn").count() > 3 and tab.locator("[data-title^=Share]").count() == 0
    assert wrong == []


@pytest.mark.parametrize("context", [{"viewport": {"width": 360, "height": 700}}, {"color_scheme": "dark"}])
def test_phones_and_dark_rooms(real: Path, browser: Any, tmp_path: Path, context: dict[str, Any]) -> None:
    """Nothing is wider than a phone's screen; a dark scheme has a dark page with light text."""
    write_page(real, tmp_path / "page.html")
    tab, wrong = opened(browser, tmp_path / "page.html", **context)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = "color_scheme" in context
    shade = "(key) => Math.max(...getComputedStyle(document.body)[key].match(/[0-9]+/g))"
    assert (tab.evaluate(shade, "backgroundColor") < 60, tab.evaluate(shade, "color") > 180) == (dark, dark)
    assert wrong == []


def test_a_hostile_study_does_nothing_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """No code of a row runs, whichever design is selected and hovered; the attack is shown as text."""
    write_page(hostile(tmp_path / "h"), tmp_path / "page.html")
    tab, wrong = opened(browser, tmp_path / "page.html")
    tab.check("#every")
    for index in range(4):
        tab.locator("#table tbody button").nth(index).click()
    tab.evaluate("Plotly.Fx.hover('front', [{curveNumber: 0, pointNumber: 0}])")
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img[src=x]").count() == 0 and HOSTILE in tab.inner_text("#recipe")
    assert wrong == []
