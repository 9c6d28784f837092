"""Commands of the hardware that is written out: rtl, rtl-episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.options import (
    HW,
    MAKE,
    Env,
    Episodes,
    Factory,
    Force,
    Json,
    Latency,
    MostLuts,
    NewDirectory,
    Quantized,
    Seed,
    app,
)
from quantkit.console import guarded, print_json, print_table, progress_bar, say


@app.command(rich_help_panel=MAKE, epilog="Example: quantkit rtl agent.q -o agent.rtl --device xc7a35t --latency-us 2")
@guarded
def rtl(
    directory: Quantized,
    output: NewDirectory,
    device: Annotated[str, typer.Option(help="FPGA part (see hwmodel devices).", rich_help_panel=HW)] = "xc7a35t",
    latency_us: Latency = None,
    luts: MostLuts = None,
    clock_mhz: Annotated[
        float, typer.Option(min=1.0, help="Clock assumed; it is not predicted.", rich_help_panel=HW)
    ] = 100.0,
    dsp: Annotated[
        str,
        typer.Option(help="Products in DSPs: none, all, or layers such as net.0,net.2.", rich_help_panel=HW),
    ] = "none",
    unroll: Annotated[
        bool,
        typer.Option("--unroll", help="All products at once, weights in the logic; no target.", rich_help_panel=HW),
    ] = False,
    factory: Factory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the quantized policy as Verilog whose codes and sums equal the simulator's bit for bit.

    A network with convolutions becomes one design for each run of layers without a branch.

    A network with GRUs or LSTMs becomes a design with a state: a step in time a vector. Its gates are fixed point and
    tables, and what it equals bit for bit is the integer reference.
    """
    from hwmodel import emit
    from hwmodel.devices import find_device
    from hwmodel.plan import plan_network
    from hwmodel.unroll import plan_unrolled
    from quantkit.artifact import load_artifact
    from quantkit.errors import InputError
    from quantkit.files import check_new, new_directory
    from quantkit.rtl_conv import has_convolutions
    from quantkit.rtl_designs import write_designs
    from quantkit.rtl_export import network_of

    part = find_device(device)
    check_new(output, force=force, marker="network.json")
    model = load_artifact(directory, factory=factory)
    if has_convolutions(model):
        if unroll:
            raise InputError("--unroll is for linear layers; a network with convolutions is folded")
        with new_directory(output, force=force, marker="network.json") as folder:
            targets: Any = {"latency_us": latency_us, "luts": luts, "clock_mhz": clock_mhz, "dsp": dsp}
            document = write_designs(model, folder, part, **targets)
            _name_origin(folder, directory, output)
        _show_designs(output, document, json)
        return
    network, _ = network_of(model)
    if unroll:
        if latency_us is not None or luts is not None or dsp != "none":
            raise InputError("--unroll has one design only; leave out --latency-us, --luts and --dsp")
        plans = plan_unrolled(network, part)
    else:
        plans = plan_network(network, part, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, dsp=dsp)
    with new_directory(output, force=force, marker="network.json") as folder:
        document = emit.write(network, plans, folder, part, clock_mhz=clock_mhz)
        _name_origin(folder, directory, output)
    if json:
        print_json({"output": str(output), **document})
        return
    keys = ("name", "pe", "simd", "converter", "converters", "cycles", "luts", "ffs", "dsps", "bram18")
    rows = [[str(entry[key]) for key in keys] for entry in document["layers"]]
    columns = {"layer": "left"} | dict.fromkeys(("PE", "SIMD", *keys[3:]), "right")
    title = f"{output}: {document['latency_us']:g} us at {clock_mhz:g} MHz, about {document['luts']:,} LUTs"
    print_table(title, columns, rows)
    env = "ENV" if model.env is None else model.env.id
    say(f"prove it with: hwmodel simulate {output}, and over episodes: hwmodel simulate {output} --env {env}")


def _name_origin(folder: Path, policy: Path, output: Path) -> None:
    """Say in a design that is to lie in `output` where its policy is, for `hwmodel simulate --env`."""
    import json
    import os

    from hwmodel.simulate import ORIGIN

    (folder / ORIGIN).write_text(json.dumps({"policy": os.path.relpath(policy.resolve(), output.resolve())}) + "\n")


def _show_designs(output: Path, document: dict[str, Any], json: bool) -> None:
    """Say what was written for a network with convolutions, and what was not."""
    from quantkit.rtl_designs import outside

    if json:
        print_json({"output": str(output), **document})
        return
    keys = ("pe", "simd", "converter", "converters", "period", "luts", "ffs", "dsps", "bram18")
    rows = []
    for entry in document["designs"]:
        for i, layer in enumerate(entry["layers"]):
            first = [entry["folder"], str(entry["cycles"])] if i == 0 else ["", ""]
            rows.append(
                [*first, layer["name"], *(f"{v:g}" if isinstance(v := layer[k], float) else str(v) for k in keys)]
            )
    columns = {"design": "left", "cycles": "right", "layer": "left"} | dict.fromkeys(("PE", "SIMD", *keys[2:]), "right")
    many = len(document["designs"])
    title = (
        f"{output}: {many} design{'s' * (many > 1)}, {document['latency_us']:g} us at {document['clock_mhz']:g} MHz, "
        f"one input every {document['interval'] / document['clock_mhz']:g} us, about {document['luts']:,.0f} LUTs"
    )
    print_table(title, columns, rows)
    left = outside(document)
    say(f"left to the host, in float32:\n{left}" if left else "nothing between input codes and last sums is left out")
    say(f"prove it with: hwmodel simulate {output}")


@app.command(
    "rtl-episodes",
    rich_help_panel=MAKE,
    epilog="Example: quantkit rtl-episodes agent.q agent.rtl --episodes 5",
)
@guarded
def rtl_episodes(
    directory: Quantized,
    design: Annotated[Path, typer.Argument(metavar="DESIGN", help="Directory written from it by quantkit rtl.")],
    episodes: Episodes = 5,
    seed: Seed = 1000,
    env: Env = None,
    tool: Annotated[
        str | None, typer.Option(help="verilator or iverilog; default: the first installed.", rich_help_panel=HW)
    ] = None,
    factory: Factory = None,
    json: Json = False,
) -> None:
    """Play whole episodes with the simulated Verilog; exit 1 at the first sum, output or action that differs.

    The actions of a network that is no policy are its outputs.
    """
    from dataclasses import asdict

    from quantkit.artifact import load_artifact
    from quantkit.model import EnvSpec
    from quantkit.recurrent import has_loop
    from quantkit.rtl_episodes import fly
    from quantkit.study import policy_of

    model = load_artifact(directory, factory=factory)
    if env is not None:
        spec = EnvSpec(env)
    elif model.env is not None and has_loop(model.module):
        spec = model.env
    else:
        spec = policy_of(model)[1]
    with progress_bar("fly", "episodes") as update:
        flight = fly(model, design, spec, episodes=episodes, seed=seed, tool=tool, progress=update)
    if json:
        print_json(asdict(flight) | {"env": spec.id})
    elif flight.difference is None:
        say(
            f"{spec.id} in {flight.tool}: {episodes} episode{'s' * (episodes > 1)}, {flight.decisions:,} decisions, "
            f"every action equals the Python reference; "
            f"{flight.cycles_min}..{flight.cycles_max} cycles a decision; "
            f"mean return {sum(flight.returns) / len(flight.returns):.2f}"
        )
    else:
        say(f"differs: {flight.difference}")
    if flight.difference is not None:
        raise typer.Exit(1)
