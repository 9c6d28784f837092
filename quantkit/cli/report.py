"""Commands that hand a study over: report, pick, robustness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantkit.cli.options import (
    CHOOSE,
    HW,
    IN,
    NUM,
    Checkpoint,
    Env,
    Episodes,
    Factory,
    Force,
    Json,
    Latency,
    MostLuts,
    NewDirectory,
    Normalize,
    Seed,
    Study,
    app,
    load,
)
from quantkit.console import guarded, note, print_json, print_table, progress_bar, say, warn
from quantkit.errors import InputError


@app.command(rich_help_panel=CHOOSE, epilog="Example: quantkit report study -o study.html")
@guarded
def report(
    study: Study,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Default: STUDY/report.html.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The study's checkpoint, where it lies now: for the layers' shapes.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Markdown and PNGs in a directory, and no page.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    force: Force = False,
) -> None:
    """Write a study as one page that needs no network: fronts, each design's layers, returns, cost, sensitivity."""
    if markdown is not None:
        if output is not None or show:
            raise InputError("give --markdown DIR, or -o FILE.html and --open, not both")
        from quantkit.markdown import write_markdown

        found = write_markdown(study, markdown, checkpoint=checkpoint, force=force)
        say("\n".join(f"wrote {path}" for path in found["files"]))
        return
    from quantkit.page import write_page

    path = study / "report.html" if output is None else output
    write_page(study, path, checkpoint=checkpoint, force=force or output is None)
    say(f"{path}: {path.stat().st_size:,} bytes")
    if show:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example: quantkit pick study -o best --max-loss 2% --device xc7z020 --latency-us 20",
)
@guarded
def pick(
    study: Study,
    output: NewDirectory,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="2%|RETURN",
            help="The cheapest design proved to lose no more (95 % bound), in the study and on fresh seeds: in return "
            "or accuracy, or of the distance to random actions or a constant answer.",
        ),
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The cheapest non-inferior design on the front.")] = False,
    design: Annotated[str | None, typer.Option("--id", help="This design (the beginning of its id).")] = None,
    x: Annotated[
        str | None,
        typer.Option(help="What cheap means: luts (default), ffs, dsps, bram18, latency_us, weight_kib, ..."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Price it for this part. Default: the study's.", rich_help_panel=HW)
    ] = None,
    latency_us: Latency = None,
    luts: MostLuts = None,
    mapping: Annotated[
        Literal["lut", "dsp", "auto"] | None,
        typer.Option(help="Products in LUTs, in DSPs, or in DSPs where LUTs do not suffice.", rich_help_panel=HW),
    ] = None,
    tries: Annotated[
        int,
        typer.Option(
            min=1, help="Look at this many of the cheapest: to price them anew, to confirm them.", rich_help_panel=NUM
        ),
    ] = 8,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The study's checkpoint, if it has moved.", rich_help_panel=IN)
    ] = None,
    factory: Factory = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="Of a network: inputs that the study has not seen, to confirm it on.", rich_help_panel=NUM),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help=".npy or .npz with the class of each of --inputs.", rich_help_panel=NUM)
    ] = None,
    confirm: Annotated[
        int | None,
        typer.Option(min=0, help="Episodes on fresh seeds; 0: none. Default: the study's.", rich_help_panel=NUM),
    ] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Measure noise, delay and changed dynamics too.", rich_help_panel=NUM)
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Take a design away: quantized policy or network, verified ONNX, QONNX, hardware estimate and a model card."""
    from quantkit.pick import pick as run

    with progress_bar("pick", "steps") as update:
        record = run(
            study, output, max_loss=max_loss, at_knee=knee, design=design, x=x, device=device, latency_us=latency_us,
            luts=luts, mapping=mapping, tries=tries, checkpoint=checkpoint, factory=factory, confirm=confirm,
            inputs=inputs, labels=labels, robustness=robustness, force=force,
            progress=lambda _, done, total: update(done, total),
        )  # fmt: skip
    verified = record["onnx"]["verified"]
    if json:
        print_json({"output": str(output), **record})
    else:
        for one in record["chosen"]["passed_over"]:
            note(f"passed over: {one['id']} (weights {one['weights']}, inputs {one['acts']}): {_missed(one)}")
        _show_pick(output, record)
    for line in record["differences"]:
        warn(f"not as in the study: {line}")
    if not verified["ok"]:
        raise typer.Exit(1)


def _missed(one: dict[str, Any]) -> str:
    bound = "no bound" if one["loss_bound"] is None else f"at most {one['loss_bound']:.4g} lost"
    return f"{one['diff_mean']:+.4g} on {one['n']:,} fresh, {bound}"


def _show_pick(output: Path, record: dict[str, Any]) -> None:
    row, score = record["row"], record["row"]["score"]
    network = score["metric"] == "accuracy"
    say(f"{row['id']}: weights {row['weights']}, inputs {row['acts']}, {row['steps']}, per {row['granularity']}")
    say(f"  {record['chosen']['why']}")
    say(f"  {score['metric']} {_against(score, row['verdict'])} to float")
    if fresh := record.get("fresh"):
        what = f"{fresh['score']['n']:,} fresh {'inputs' if network else 'seeds'}"
        say(f"  on {what} {_against(fresh['score'], fresh['verdict'])}: {fresh['verdict']['verdict']}")
    if (price := record["estimate"]) is not None:
        say(
            f"  {price['device']}: {price['luts']:,} LUTs, {price['ffs']:,} flip-flops, {price['dsps']} DSPs, "
            f"{price['bram18']} BRAM18, {price['latency_us']:g} µs"
        )
    verified = record["onnx"]["verified"]
    word = "verified" if verified["ok"] else f"NOT verified: {verified['reason']}"
    mean = f"{verified['mean']:.2%}" if network else f"{verified['mean']:.2f}"
    same = f"the study's {verified['episodes']:,} {'inputs' if network else 'seeds'}"
    say(f"  onnxruntime: {score['metric']} {mean} on {same}; {word}")
    if record["onnx"]["qonnx_missing"]:
        say(f"  no QONNX: {record['onnx']['qonnx_missing']}")
    say(f"wrote {output}/ (README.md is its card)")


def _against(score: dict[str, Any], verdict: dict[str, Any]) -> str:
    """A mean and its paired difference to float with its bounds, accuracies in percent."""
    if score["metric"] == "accuracy":
        mean, sign = f"{score['mean']:.2%} ± {score['stderr']:.2%}", "+.2%"
    else:
        mean, sign = _number(score["mean"], score["stderr"]), "+.2f"
    bounds = "" if verdict["low"] is None else f" [{verdict['low']:{sign}}, {verdict['high']:{sign}}]"
    return f"{mean}, {verdict['diff_mean']:{sign}}{bounds}"


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example: quantkit robustness agent.q --against agent.zip --condition noise=0.1 --condition delay=1",
)
@guarded
def robustness(
    checkpoint: Checkpoint,
    against: Annotated[
        Path | None, typer.Option(help="The float checkpoint, for the same episodes.", rich_help_panel=IN)
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=LEVEL",
            help="noise=0.1, delay=2, gravity=0.9, ...; repeat. Default: some of each that the environment allows.",
            rich_help_panel=NUM,
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
