"""Commands that hand a study over: report, pick, robustness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.options import (
    _CHOOSE,
    _IN,
    _NUM,
    Checkpoint,
    Env,
    Episodes,
    Force,
    Json,
    Normalize,
    Seed,
    app,
    load,
)
from quantkit.console import guarded, print_json, print_table, progress_bar, say


@app.command(rich_help_panel=_CHOOSE, epilog="Example: quantkit report study -o study.html")
@guarded
def report(
    study: Annotated[Path, typer.Argument(help="Directory written by quantkit sweep.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Default: STUDY/report.html.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The study's checkpoint, where it lies now: for the layers' shapes.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    force: Force = False,
) -> None:
    """Write a study as one page that needs no network: fronts, each design's layers, returns, cost, sensitivity."""
    from quantkit.page import write_page

    path = study / "report.html" if output is None else output
    write_page(study, path, checkpoint=checkpoint, force=force or output is None)
    say(f"{path}: {path.stat().st_size:,} bytes")
    if show:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())


@app.command(
    rich_help_panel=_CHOOSE,
    epilog="Example: quantkit robustness agent.q --against agent.zip --condition noise=0.1 --condition delay=1",
)
@guarded
def robustness(
    checkpoint: Checkpoint,
    against: Annotated[
        Path | None, typer.Option(help="The float checkpoint, for the same episodes.", rich_help_panel=_IN)
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=LEVEL",
            help="noise=0.1, delay=2, gravity=0.9, ...; repeat. Default: some of each that the environment allows.",
            rich_help_panel=_NUM,
        ),
    ] = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    env: Env = None,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Return under noise, delay and changed dynamics, worst decile and chatter; float against quantized."""
    model = load(checkpoint, env, None, "stage" if (checkpoint / "quantkit.json").is_file() else normalize)
    float_model = None if against is None else load(against, env, None, normalize)

    from quantkit.study import policy_of
    from quantkit.tasks.robustness import PLAIN, compare, default_conditions, parse_condition

    policy, spec = policy_of(model)
    reference = None if float_model is None else policy_of(float_model)[0]
    wanted = [parse_condition(text, spec) for text in condition or []]
    chosen = (PLAIN, *(c for c in wanted if c != PLAIN)) if wanted else default_conditions(spec)
    with progress_bar("robustness", "episodes") as update:
        found = compare(policy, spec, chosen, reference=reference, episodes=episodes, seed=seed, progress=update)
    if json:
        print_json(found)
        return
    _show_robustness(f"{checkpoint} on {spec.id}", found)


def _show_robustness(title: str, found: dict[str, Any]) -> None:
    paired = "reference" in found["rows"][0]
    rows = []
    for row in found["rows"]:
        cells = [row["condition"], _number(row["mean"], row["stderr"]), f"{row['worst_decile']:.1f}"]
        if paired:
            other, apart = row["reference"], row["difference"]
            known = apart["low"] is not None and apart["high"] is not None
            bounds = f" [{apart['low']:+.1f}, {apart['high']:+.1f}]" if known else ""
            cells += [_number(other["mean"], other["stderr"]), f"{other['worst_decile']:.1f}"]
            cells += [f"{apart['mean']:+.1f}{bounds}", f"{row['chatter']:.3f}", f"{other['chatter']:.3f}"]
        else:
            cells.append(f"{row['chatter']:.3f}")
        rows.append(cells)
    columns = {"condition": "left"} | dict.fromkeys(("return", "worst tenth"), "right")
    if paired:
        names = ("against", "its worst tenth", "difference [95 %, 95 %]", "chatter", "its chatter")
        columns |= dict.fromkeys(names, "right")
    else:
        columns["chatter"] = "right"
    print_table(title, columns, rows)
    say(f"{found['episodes']} episodes each, seeds {found['seed']}..{found['seed'] + found['episodes'] - 1}")


def _number(value: float, stderr: float | None) -> str:
    return f"{value:.1f}" if stderr is None else f"{value:.1f} ± {stderr:.1f}"
