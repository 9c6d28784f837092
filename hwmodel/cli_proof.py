"""Commands that prove the model and renew it: `hwmodel validate`, `hwmodel fit`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmodel.console import print_table

CACHE = Path("~/.cache/hwmodel/yosys")
Jobs = Annotated[int, typer.Option(help="Yosys processes at once; 0.3-0.6 GB each.", rich_help_panel="Run")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder of synthesized counts.", rich_help_panel="Run")]
FamilyOption = Annotated[
    str,
    typer.Option(help="xc7 (7-series by Yosys) or ecp5 (by Yosys and nextpnr).", rich_help_panel="Run"),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.", rich_help_panel="Output")]


def checked_family(name: str) -> str:
    """A family of coefficients, or the end of the program."""
    from hwmodel.cli import fail

    if name not in ("xc7", "ecp5"):
        fail(f"unknown family {name!r}; accepted: xc7, ecp5")
    return name


def validate(
    units: Annotated[int, typer.Option(help="Multiply-accumulate elements.", rich_help_panel="Sample")] = 60,
    layers: Annotated[int, typer.Option(help="Folded matrix-vector layers.", rich_help_panel="Sample")] = 20,
    policies: Annotated[int, typer.Option(help="Whole folded perceptrons.", rich_help_panel="Sample")] = 10,
    unrolled: Annotated[
        int, typer.Option(help="Small perceptrons with weights in the logic.", rich_help_panel="Sample")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the sample.", rich_help_panel="Sample")] = 0,
    family: FamilyOption = "xc7",
    jobs: Jobs = 0,
    cache: CacheOption = CACHE,
    json_: Json = False,
) -> None:
    """The model against Yosys on designs that the fit has not seen, beside FINN's formula, EBOPs and BOPs.

    Designs are synthesized for 7-series parts without placement, or placed and routed on ECP5 parts, which also
    gives their clocks; 20 layers and 10 policies take about 5 CPU minutes once, 15 on ECP5, then come from the cache.

    Example: hwmodel validate --units 60 --layers 20 --policies 10 --seed 0
    """
    from hwmodel import nextpnr, yosys
    from hwmodel.cli import plain_errors
    from hwmodel.fabric import pricing
    from hwmodel.validate import summary
    from hwmodel.validate import validate as run

    with plain_errors(), pricing(checked_family(family)), Bar("synthesizing") as progress:
        rows = run(
            units,
            layers,
            policies,
            unrolled,
            seed=seed,
            jobs=jobs or os.cpu_count() or 1,
            cache=cache.expanduser(),
            progress=progress,
        )
    record = summary(rows) | {"yosys": yosys.version(), "flow": yosys.flow(family, dsp=False), "seed": seed}
    if family == "ecp5":
        record |= {"nextpnr": nextpnr.version()}
    if json_:
        print(json.dumps(record))
    else:
        _show(record)


def fit(
    out: Annotated[Path, typer.Option(help="File of coefficients to write.", rich_help_panel="Output")] = Path(
        "coeffs.toml"
    ),
    parts: Annotated[
        str,
        typer.Option(
            help="Which to renew, of products, converters, glue and, of ECP5, timing and clock; the others stay.",
            rich_help_panel="Run",
        ),
    ] = "products,converters,glue",
    family: FamilyOption = "xc7",
    csv: Annotated[
        Path | None, typer.Option(help="Fit to your own tool's counts instead of Yosys'.", rich_help_panel="Run")
    ] = None,
    tool: Annotated[
        str, typer.Option(help="Tool and version behind --csv, kept with the coefficients.", rich_help_panel="Run")
    ] = "unknown tool",
    report: Annotated[Path | None, typer.Option(help="CSV of every judged unit.", rich_help_panel="Output")] = None,
    jobs: Jobs = 0,
    cache: CacheOption = CACHE,
    json_: Json = False,
) -> None:
    """New coefficients, from Yosys runs of every template or from a CSV of your own, for `--coeffs FILE`.

    A CSV has one synthesized hwmodel/rtl/mac.v a row, with the columns weight, act (formats such as int4, e2m1),
    lanes, acc_bits, luts, ffs; products are fitted to it, all else stays. All of Yosys' units take some 15 CPU
    minutes once, then come from the cache.

    Example: hwmodel fit --csv vivado.csv --tool "Vivado 2024.1" --out mine.toml
    """
    from hwmodel import fit as fitting
    from hwmodel import utilization
    from hwmodel.cli import fail, plain_errors
    from hwmodel.fabric import pricing

    command = f"hwmodel fit --out {out.name}" + (f" --csv {csv.name}" if csv else f" --parts {parts}")
    command += "" if family == "xc7" else f" --family {family}"
    with plain_errors(), pricing(checked_family(family)), Bar("synthesizing") as progress:
        for file in (out, report):
            if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
                fail(f"{file} cannot be written; expected a file in a directory that exists and may be written to")
        if csv is not None and report is not None:
            fail("--report lists synthesized units, which --csv has none of; leave out one of them")
        if csv is not None and family != "xc7":
            fail("--csv fits products of LUTs with six inputs; leave out --family")
        if csv is not None:
            try:
                rows = utilization.read_utilization(csv)
            except utilization.RowsError as error:
                for line in error.lines:
                    print(f"error: {line}", file=sys.stderr)
                raise typer.Exit(2) from None
            residual = {"mac": utilization.fit_utilization(rows, out, tool=tool, command=command)}
        else:
            found = fitting.fit(
                [part.strip() for part in parts.split(",")],
                out,
                cache=cache.expanduser(),
                jobs=jobs or os.cpu_count() or 1,
                command=command,
                progress=progress,
            )
            judged = dict.fromkeys(row.kind for row in found.rows if row.held_out)
            residual = {kind: found.data["residual"][kind] for kind in judged}
            if report is not None:
                _write_report(report, command, found.rows)
    if json_:
        print(json.dumps({"out": str(out), "residual": residual}))
        return
    print(f"{'held-out units':22} {'n':>4} {'median':>7} {'p90':>7} {'max':>7}")
    for kind, r in residual.items():
        print(f"{kind:22} {r['n']:4} {r['median']:7.1%} {r['p90']:7.1%} {r['max']:7.1%}")
    print(f"wrote {out}")


def _write_report(path: Path, command: str, rows: list[Any]) -> None:
    import csv
    from dataclasses import asdict

    with path.open("w", newline="") as file:
        file.write(f"# {command}\n")
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(row).items()})


class Bar:
    """A progress bar on stderr that is called with (done, total)."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Any:
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _show(record: dict[str, Any]) -> None:
    columns = ("", "model", "n", "median", "p90", "Spearman", "FF median", "DSP exact", "BRAM exact")
    rows: list[list[str]] = []

    def numbers(found: dict[str, Any]) -> list[str]:
        rank = found["spearman"]
        return [
            f"{found['median_abs_error']:.1%}",
            f"{found['p90_abs_error']:.1%}",
            "-" if rank is None else f"{rank:.3f}",
        ]

    for kind in ("units", "layers", "policies", "unrolled"):
        found = record[kind]
        if not found["n"]:
            continue
        others = [
            f"{found['ff']['median_abs_error']:.1%}",
            f"{found['dsp']['exact']:.0%}",
            f"{found['bram']['exact']:.0%}",
        ]
        rows.append([kind, "hwmodel", str(found["n"]), *numbers(found), *others])
        for name, baseline in found["baselines"].items():
            title = f"{name.removesuffix('_scaled')} x {baseline['scale']:.2f}" if "scale" in baseline else name
            rows.append(["", title, "", *numbers(baseline), "", "", ""])
        rows.append([])
    print_table(f"LUTs predicted against {record['yosys']}", columns, rows)
    for kind in ("layers", "policies", "unrolled"):
        if clocks := record[kind].get("fmax_mhz"):
            print(
                f"{kind}: {clocks['median']:g} MHz ({clocks['min']:g}..{clocks['max']:g}) by {record['nextpnr']}; "
                f"predicted with a median error of {clocks['median_abs_error']:.1%}, p90 {clocks['p90_abs_error']:.1%}"
            )
