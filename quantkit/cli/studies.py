"""What the commands that choose among designs share: a study that is begun, and the report of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.console import print_json, print_table, progress_bar, say, warn

if TYPE_CHECKING:
    from quantkit.model import Model
    from quantkit.study import Settings, Study
    from quantkit.tasks.accuracy import Labelled


@contextmanager
def begun(
    output: Path,
    model: Model,
    settings: Settings,
    origin: Mapping[str, Any],
    labelled: Labelled | None,
    ray: str | None,
    accept_versions: bool,
) -> Iterator[Study]:
    """The study of a directory, with its bar of progress, while the Ray cluster is connected, if one is named."""
    from quantkit.backends import connected
    from quantkit.sweep import open_study

    what = ("float and random policy", "episodes") if labelled is None else ("float network", "inputs")
    with connected(ray):  # what does not answer is told before a study is begun
        with progress_bar(*what) as update:
            study = open_study(
                output, model, settings, update, origin=origin, accept_versions=accept_versions, labelled=labelled
            )
        yield study


def show_report(report: dict[str, Any], json: bool) -> None:
    """What `quantkit.report.write_report` gives, as JSON or as a table of the front."""
    from quantkit.pareto import COLUMNS, label, value

    if json:
        print_json(report)
        return
    x, y, metric = report["x"], report["y"], report["metric"]
    reference = report["reference"]
    say(
        f"float {'network' if metric == 'accuracy' else 'policy'}: {_score(reference, metric)}; "
        f"margin {_number(report['margin'], metric)}; {report['designs']} designs"
    )
    if report["random"] is not None and reference["mean"] <= report["random"]:
        rival = "random actions" if metric == "return" else "always the most frequent class"
        warn(
            f"float is no better than {rival} ({_number(report['random'], metric)}): margin and --max-loss, which are "
            "shares of the distance, say little"
        )
    if len(report["targets"]) > 1:
        say(f"costs for {report['target']}; of {len(report['targets'])} targets: {', '.join(report['targets'])}")
    shown = list(dict.fromkeys((x, "luts", "weight_kib", "latency_us")))
    rows = []
    for row in report["front"]:
        score = row["score"]
        numbers = [(value(row, c), c) for c in shown]
        cells = ["-" if v is None else f"{v:,.0f}" if c in ("luts", "ffs") else f"{v:,.4g}" for v, c in numbers]
        names = [row["weights"], row["acts"], row["granularity"], row["steps"]]
        rows.append([*names, _score(score, metric), row["verdict"]["verdict"], *cells])
    columns = dict.fromkeys(("weights", "inputs", "scales", "method"), "left")
    columns |= {metric: "right", "against float": "left"} | {COLUMNS[c][1]: "right" for c in shown}
    knee = report["knee"]
    highlight = next((i for i, row in enumerate(report["front"]) if knee and row["id"] == knee["id"]), None)
    print_table(f"Pareto front of {label(y, metric)} against {COLUMNS[x][1]}", columns, rows, highlight=highlight)
    if knee:
        say(f"take: weights {knee['weights']}, inputs {knee['acts']}, {knee['steps']}")
    say("\n".join(f"wrote {path}" for path in report["files"]))


def _score(score: Mapping[str, Any], metric: str) -> str:
    return f"{_number(score['mean'], metric)} ± {_number(score['stderr'] or 0.0, metric)}"


def _number(number: float, metric: str) -> str:
    return f"{number:.2%}" if metric == "accuracy" else f"{number:.2f}"
