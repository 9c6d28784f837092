"""Command line of the cost model: `hwmodel cost`, `estimate`, `simulate`, `devices`; `cli_proof` has the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hwmodel.cli_proof import fit, validate
from hwmodel.console import print_table, run

app = typer.Typer(
    help="What a quantized network costs on an FPGA: LUTs, flip-flops, DSPs, block RAMs, latency.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.", rich_help_panel="Output")]
MAPPING = typer.Option(
    help="lut: no DSPs, the default; dsp: integers packed into them; auto: DSPs if LUTs do not suffice.",
    rich_help_panel="Hardware",
)
MappingOption = Annotated[str, MAPPING]
CoeffsOption = Annotated[
    Path | None,
    typer.Option(
        "--coeffs",
        help="Coefficients by hwmodel fit, or the word compressor: sums by published counters; default: ours.",
        rich_help_panel="Hardware",
    ),
]
UNMEASURED = "by published counter sizes, not measured here"
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="FINN's formula, EBOPs, BOPs, compressor trees beside.", rich_help_panel="Output"),
]
app.command(rich_help_panel="Proof")(validate)
app.command(rich_help_panel="Proof")(fit)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input ends with one line on stderr and exit code 2."""
    from hwmodel.cost import HwError
    from hwmodel.devices import DeviceError
    from hwmodel.formats import FormatError

    try:
        yield
    except (HwError, DeviceError, FormatError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Report bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Console entry point."""
    run(app, "hwmodel")


def checked_mapping(name: str) -> Any:
    """A mapping, or the end of the program."""
    if name not in ("lut", "dsp", "auto"):
        fail(f"unknown mapping {name!r}; accepted: lut, dsp, auto")
    return name


@app.command(rich_help_panel="Model")
def cost(
    weights: Annotated[
        str, typer.Option(help="Format of the weights, such as int4, e2m1, ternary.", rich_help_panel="Formats")
    ],
    acts: Annotated[str, typer.Option(help="Format of the activations.", rich_help_panel="Formats")],
    acc_bits: Annotated[
        int | None, typer.Option(help="Accumulator bits; default: exact for 256 products.", rich_help_panel="Hardware")
    ] = None,
    lanes: Annotated[int, typer.Option(help="Products per cycle.", rich_help_panel="Hardware")] = 1,
    mapping: MappingOption = "lut",
    coeffs: CoeffsOption = None,
    compare: CompareOption = False,
    json_: Json = False,
) -> None:
    """One multiply-accumulate element: products, adder tree, accumulator.

    Example: hwmodel cost --weights int4 --acts e4m3 --lanes 8
    """
    with plain_errors():
        from hwmodel.accumulator import type_bound
        from hwmodel.coeffs import use_coefficients
        from hwmodel.estimate import residual
        from hwmodel.formats import parse
        from hwmodel.mac import mac_cost
        from hwmodel.packing import shared_cost

        use_coefficients(coeffs)
        weight, act = parse(weights), parse(acts)
        checked_mapping(mapping)
        if lanes < 1 or (acc_bits is not None and acc_bits < 1):
            fail("--lanes and --acc-bits are at least 1")
        width = type_bound(weight, act, 256) if acc_bits is None else acc_bits
        packed = shared_cost(weight, act, width, lanes) if mapping == "dsp" else None
        found = packed or mac_cost(weight, act, width, lanes)
        record = {
            "weights": str(weight),
            "acts": str(act),
            "acc_bits": width,
            "lanes": lanes,
            "mapping": mapping,
            "luts": round(found.luts, 1),
            "ffs": round(found.ffs, 1),
            "dsps": round(found.dsps, 2),
            "luts_per_lane": round(found.luts / lanes, 2),
            "residual": residual(weight, act),
        }
        others = {}
        if compare:
            from hwmodel.baselines import compare_mac

            others = compare_mac(weight, act, lanes, width)
    if json_:
        print(json.dumps(record | ({"compare": others} if compare else {})))
        return
    band = UNMEASURED if record["residual"] is None else f"±{record['residual']:.0%}"
    shown = record | {"luts": f"{found.luts:,.1f} {band}"}
    rows = [[k, str(v)] for k, v in shown.items() if k != "residual"]
    rows += [[f"LUTs by {name}", "-" if count is None else f"{count:,.1f}"] for name, count in others.items()]
    print_table(f"{record['weights']} x {record['acts']}", ["", ""], rows)


@app.command(rich_help_panel="Model")
def estimate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="NETWORK",
            help="A directory of quantkit quantize or quantkit rtl, a specs file, or a quantized ONNX file.",
        ),
    ],
    device: Annotated[str, typer.Option(help="Part, such as xc7a35t or xc7z020clg400-1.", rich_help_panel="Hardware")],
    latency_us: Annotated[
        float | None, typer.Option(help="Fewest LUTs within this latency.", rich_help_panel="Target")
    ] = None,
    luts: Annotated[
        int | None, typer.Option(help="Lowest latency within this many LUTs.", rich_help_panel="Target")
    ] = None,
    clock_mhz: Annotated[
        float | None,
        typer.Option(
            help="Clock frequency assumed, 100 without; of ECP5 fmax is estimated beside it.",
            rich_help_panel="Hardware",
        ),
    ] = None,
    mapping: Annotated[str | None, MAPPING] = None,
    unroll: Annotated[
        bool,
        typer.Option(
            "--unroll",
            help="All products at once, weights in the logic, of a quantkit rtl directory.",
            rich_help_panel="Hardware",
        ),
    ] = False,
    coeffs: CoeffsOption = None,
    compare: CompareOption = False,
    json_: Json = False,
) -> None:
    """A whole network on a device: the best folding, layer by layer.

    Without a target: 64 multiply-accumulates per cycle, but 1,000 cycles at least; a directory of quantkit rtl, on the
    device that it was written for, without any other option: the design that lies there.

    An ONNX file is a chain of Gemm, MatMul and Conv with QDQ, QCDQ or QONNX quantizers; reading it needs onnx.

    Example: hwmodel estimate policy.onnx --device xc7a35t --latency-us 5
    """
    with plain_errors():
        from hwmodel.coeffs import use_coefficients
        from hwmodel.devices import find_device
        from hwmodel.estimate import estimate as planned
        from hwmodel.estimate import estimate_unrolled, read_design
        from hwmodel.network import read_network

        use_coefficients(coeffs)
        part, clock = find_device(device), 100.0 if clock_mhz is None else clock_mhz
        if latency_us is not None and luts is not None:
            fail("give --latency-us or --luts, not both")
        if unroll:
            if latency_us is not None or luts is not None or mapping not in (None, "lut"):
                fail("--unroll has one design only; leave out --latency-us, --luts and --mapping")
            network = read_network(directory)  # unrolled, weights are the cost
            specs, found = network.specs, estimate_unrolled(network, part, clock_mhz=clock)
        else:
            asked = any(given is not None for given in (latency_us, luts, clock_mhz, mapping, coeffs))
            written = None if asked else read_design(directory, part)
            specs = () if written and not compare else tuple(read_specs(directory))
            found = written or planned(
                specs,
                part,
                latency_us=latency_us,
                luts=luts,
                clock_mhz=clock,
                mapping=checked_mapping(mapping or "lut"),
            )
        others = {}
        if compare:
            from hwmodel.baselines import compare_network

            folds = [(layer.pe, layer.simd, layer.acc_bits) for layer in found.layers]
            others = compare_network(specs, folds)
    if json_:
        print(json.dumps(found.to_json() | ({"compare": others} if compare else {})))
        return
    columns = ["name", "pe", "simd", "luts", "ffs", "dsps", "bram18", "cycles", "memory", "converter"]
    rows = [[str(getattr(layer, c)) for c in columns] for layer in found.layers]
    rows.append(
        [
            "total",
            "",
            "",
            str(found.luts),
            str(found.ffs),
            str(found.dsps),
            str(found.bram18),
            str(found.cycles),
            "",
            "",
        ]
    )
    print_table(f"{found.device}, {found.latency_us:g} us at {found.clock_mhz:g} MHz", columns, rows)
    if found.residual is None:
        print(f"LUT {found.luts:,} {UNMEASURED if coeffs else 'without an error band'}")
    else:
        print(f"LUT {found.luts:,} ±{found.residual:.0%}: nine of ten synthesized {found.residual_of} lie within")
    if found.fmax_mhz is not None:
        print(
            f"fmax {found.fmax_mhz:g} MHz ±{found.fmax_residual:.0%}: nine of ten placed {found.residual_of} "
            f"lie within; slowest: {found.slowest}"
        )
    if found.interval is not None:
        print(f"where inputs follow each other, one result every {found.interval:,} cycles")
    print(f"{'fits' if found.fits else 'DOES NOT FIT'}; tightest: {found.binding}")
    for name, count in others.items():
        print(f"LUT {count:,.0f} by {name}")


@app.command(rich_help_panel="Hardware")
def simulate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory written by quantkit rtl.")],
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Input codes: .npy of integers, or hexadecimal text, one vector a line; default: random. Vectors of a "
            "recurrent network may have 1 or 0 before their codes: whether an episode begins."
        ),
    ] = None,
    tool: Annotated[str | None, typer.Option(help="verilator or iverilog; default: the first installed.")] = None,
    env: Annotated[
        str | None, typer.Option(help="Environment to drive, such as LunarLander-v3.", rich_help_panel="Episodes")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option("--episodes", "-n", min=1, help="How many; default: 5.", rich_help_panel="Episodes")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Episode i is seeded with SEED + i; default: 1000.", rich_help_panel="Episodes"),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="The quantized policy; default: the one that DIR was written from.", rich_help_panel="Episodes"
        ),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="module:callable of a policy of your own code.", rich_help_panel="Episodes"),
    ] = None,
    json_: Json = False,
) -> None:
    """Run input codes through the emitted Verilog and compare with the integer reference; exit 1 if they differ.

    Of a network in several designs, every one.

    With --env whole episodes, every action of the Verilog compared with the Python policy's; this is
    quantkit rtl-episodes, and needs quantkit.

    Example: hwmodel simulate agent.rtl --env LunarLander-v3 --episodes 3
    """
    given = {"--episodes": episodes, "--seed": seed, "--policy": policy, "--factory": factory}
    if env is not None:
        if vectors is not None:
            fail("--env takes its vectors from the environment; leave out --vectors")
        options = {"--episodes": episodes, "--seed": seed, "--factory": factory, "--tool": tool}
        words = [w for key, value in options.items() if value is not None for w in (key, str(value))]
        with plain_errors():
            from hwmodel.simulate import episodes_command

            command = episodes_command(directory, env, [*words, *["--json"] * json_], policy)
        raise typer.Exit(subprocess.call(command))
    if strange := [key for key, value in given.items() if value is not None]:
        fail(f"{', '.join(strange)}: for episodes, which need --env")
    with plain_errors():
        from dataclasses import asdict

        import numpy as np

        from hwmodel.emit import EPISODE
        from hwmodel.network import design_folders, read_network, sample_codes
        from hwmodel.simulate import check, episodes_of, read_vectors

        folders = [directory] if vectors is not None else design_folders(directory)
        found = {}
        for folder in folders:
            network = read_network(folder)
            if vectors is None:
                n = 64 if network.specs[0].window is None else 8  # a map takes as many cycles as a thousand vectors
                codes = sample_codes(network, n, seed=1)
                first = np.arange(len(codes)) % EPISODE == 0
            else:
                codes, first = episodes_of(network, read_vectors(vectors))
            found[folder.name] = check(folder, codes, tool, first)
    if json_:
        several = {name: asdict(one) for name, one in found.items()}
        print(json.dumps(several if folders != [directory] else next(iter(several.values()))))
    else:
        for name, one in found.items():
            prefix = "" if folders == [directory] else f"{name}: "
            if one.mismatch is None:
                print(
                    f"{prefix}{one.vectors} vectors agree with the integer reference in {one.tool}; "
                    f"{one.cycles_min}..{one.cycles_max} cycles"
                )
            else:
                print(f"{prefix}differs: {one.mismatch}")
    if any(one.mismatch is not None for one in found.values()):
        raise typer.Exit(1)


@app.command(rich_help_panel="Facts")
def devices(json_: Json = False) -> None:
    """Known parts with their resources and the documents these come from.

    Example: hwmodel devices --json
    """
    from dataclasses import asdict

    from hwmodel.devices import devices as table

    parts = [asdict(part) for part in table().values()]
    if json_:
        print(json.dumps(parts))
    else:
        print_table("Devices", list(parts[0]), [[str(v) for v in part.values()] for part in parts])


def read_specs(path: Path) -> list[Any]:
    """The layers of a directory with specs.json or network.json, of a specs file, or of an ONNX file.

    Of a network in several designs those of all of them. One line of error for anything else.
    """
    from hwmodel.spec import LayerSpec

    if (path / "network.json").is_file():
        from hwmodel.network import design_folders, read_network

        return [spec for folder in design_folders(path) for spec in read_network(folder).specs]
    if path.suffix == ".onnx" and path.is_file():
        from hwmodel.onnx_specs import read_onnx

        return read_onnx(path)
    file = path / "specs.json" if path.is_dir() else path
    if not file.is_file():
        fail(f"{file} does not exist; expected a directory with specs.json, such a file, or an ONNX file")
    try:
        document = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(f"{file} is not JSON: {error}")
    if not isinstance(document, dict) or not isinstance(document.get("layers"), list):
        fail(f'{file} has no list "layers"; expected {{"format_version": 1, "layers": [...]}}')
    if document.get("format_version") != 1:
        fail(f"{file} has format_version {document.get('format_version')!r}; this version reads 1")
    layers = []
    for i, record in enumerate(document["layers"]):
        try:
            layers.append(LayerSpec.from_json(record))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            fail(f"{file}: layer {i} is not a layer specification: {type(error).__name__}: {error}")
    if not layers:
        fail(f"{file} has no layers")
    return layers


if __name__ == "__main__":
    main()
