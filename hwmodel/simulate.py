"""Compile an emitted network with Verilator or Icarus and run vectors through it: integers in, integers out.

The simulation is one process that reads codes and answers sums, so it can stand in for the
policy of an environment, step by step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from hwmodel.cost import HwError
from hwmodel.network import Network, check_codes, design_folders, read_network, reference

Tool = Literal["verilator", "iverilog"]
TOOLS: dict[Tool, str] = {"verilator": "verilator", "iverilog": "iverilog"}
"""Program and the Debian or Ubuntu package it comes in."""
CHUNK = 64
"""Vectors written ahead of their answers: what fits a pipe."""
ORIGIN = "origin.json"
"""Beside a design: {"policy": the path, from there, of the quantized policy that it was written from}."""


class SimulationError(HwError):
    """The simulator refused the design, or ended early."""


def find_tool(name: str | None = None) -> Tool:
    """The simulator to use: the named one, else the first installed; `HwError` names the package to install."""
    wanted = list(TOOLS) if name is None else [name]
    for tool in wanted:
        if tool not in TOOLS:
            raise HwError(f"unknown simulator {tool!r}; accepted: {', '.join(TOOLS)}")
        if shutil.which(tool):
            return tool  # type: ignore[return-value]
    packages = " or ".join(f"`apt-get install {TOOLS[tool]}`" for tool in wanted)  # type: ignore[index]
    raise HwError(f"{' and '.join(wanted)} not found; {packages} provides it")


def compile_design(folder: Path, tool: Tool) -> list[str]:
    """The command that runs the design's testbench; compiled into `folder`/build unless it is there already."""
    sources = [folder / "network.v", *sorted((folder / "rtl").glob("*.v")), folder / "testbench.v"]
    missing = [path.name for path in sources if not path.is_file()]
    if missing or len(sources) < 3:
        raise HwError(f"{folder} lacks {', '.join(missing) or 'rtl/'}; expected a directory written by quantkit rtl")
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    build = folder.resolve() / "build" / f"{tool}-{digest}"
    program = build / ("testbench" if tool == "verilator" else "testbench.vvp")
    if not program.exists():
        build.mkdir(parents=True, exist_ok=True)
        names = [str(path.relative_to(folder)) for path in sources]
        if tool == "verilator":
            command = ["verilator", "--binary", "--default-language", "1364-2005"]
            command += ["-Wno-fatal", "-Wno-lint", "-Wno-style", "-Wno-TIMESCALEMOD"]
            command += ["--x-initial", "unique", "-O3", "-CFLAGS", "-O1", "-j", "2", "--top-module", "testbench"]
            command += ["--Mdir", str(build), "-o", "testbench", *names]
        else:
            command = ["iverilog", "-g2005", "-s", "testbench", "-o", str(program), *names]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not program.exists():
            shutil.rmtree(build, ignore_errors=True)
            raise SimulationError(f"{tool} refused {folder}: {(done.stderr or done.stdout).strip()[-1500:]}")
    return [str(program)] if tool == "verilator" else ["vvp", "-n", str(program)]


@dataclass(frozen=True, slots=True)
class Answer:
    """sums: int64 (n, outputs). cycles: int64 (n,), from the last input beat accepted to out_valid."""

    sums: np.ndarray
    cycles: np.ndarray


class Simulation:
    """A running design: `with Simulation(folder) as rtl: rtl.run(codes)`."""

    def __init__(self, folder: Path, tool: str | None = None) -> None:
        self.folder = folder
        self.network = read_network(folder)
        self.tool = find_tool(tool)
        command = compile_design(folder, self.tool)
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def run(self, codes: np.ndarray, first: np.ndarray | None = None) -> Answer:
        """Sums for input codes (n, inputs), one inference after the other.

        first: bool (n,), whether an episode of a recurrent network begins; its states last from call to call.
        """
        codes = check_codes(self.network, codes)
        if self.network.recurrent:
            codes = np.column_stack([np.zeros(len(codes), int) if first is None else np.asarray(first, int), codes])
        outputs = self.network.outputs
        lines: list[list[int]] = []
        assert self._process.stdin is not None and self._process.stdout is not None
        for begin in range(0, len(codes), CHUNK):
            chunk = codes[begin : begin + CHUNK]
            try:
                self._process.stdin.write("".join(" ".join(f"{c:x}" for c in row) + "\n" for row in chunk))
                self._process.stdin.flush()
            except BrokenPipeError:
                raise SimulationError(f"the simulation of {self.folder} ended before vector {begin}") from None
            for i in range(len(chunk)):
                words = self._process.stdout.readline().split()
                try:
                    numbers = [int(word) for word in words]
                except ValueError:
                    raise SimulationError(
                        f"vector {begin + i}: {self.tool} answers {' '.join(words)}: an undefined signal"
                    ) from None
                if len(numbers) != outputs + 1:
                    raise SimulationError(f"the simulation of {self.folder} ended at vector {begin + i}")
                lines.append(numbers)
        table = np.array(lines, dtype=np.int64).reshape(len(codes), outputs + 1)
        return Answer(table[:, :-1], table[:, -1])


@dataclass(frozen=True, slots=True)
class Check:
    """A simulation against the integer reference. mismatch: the first difference in words, None if all agree."""

    tool: str
    vectors: int
    cycles_min: int
    cycles_max: int
    mismatch: str | None


def check(folder: Path, codes: np.ndarray, tool: str | None = None, first: np.ndarray | None = None) -> Check:
    """Run the codes through the hardware and through `hwmodel.network.reference`."""
    with Simulation(folder, tool) as rtl:
        answer = rtl.run(codes, first)
        want = reference(rtl.network, codes, first)
        name = rtl.tool
    mismatch = None
    if (answer.sums != want).any():
        row, column = map(int, np.argwhere(answer.sums != want)[0])
        mismatch = (
            f"vector {row}, cycle {int(answer.cycles[row])}, out_sums[{column}]: {int(answer.sums[row, column])}, "
            f"but the reference has {int(want[row, column])}"
        )
    cycles = answer.cycles if len(answer.cycles) else np.zeros(1, np.int64)
    return Check(name, len(codes), int(cycles.min()), int(cycles.max()), mismatch)


def episodes_command(folder: Path, env: str, options: Sequence[str], policy: Path | None = None) -> list[str]:
    """The command that plays episodes with the design in `folder`: `quantkit rtl-episodes`, a process of its own.

    Policies and environments are quantkit's, which nothing here imports. policy: None for the one that `ORIGIN` names.
    `HwError` where quantkit or the policy is missing.
    """
    if design_folders(folder) != [folder]:
        raise HwError(f"{folder} holds several designs, between which the host computes; episodes need a single one")
    read_network(folder)
    if find_spec("quantkit") is None:
        raise HwError(
            "--env plays episodes with quantkit, which is not installed; pip install 'quantkit[rl]' provides it"
        )
    path = folder / ORIGIN
    if policy is None:
        try:
            policy = folder / json.loads(path.read_text())["policy"]
        except OSError:
            raise HwError(f"{folder} does not say which policy it was written from; give it by --policy DIR") from None
        except (KeyError, TypeError, ValueError):
            raise HwError(f"{path} is damaged; give the policy by --policy DIR") from None
        if not policy.is_dir():
            raise HwError(f"{policy.resolve()}, which {folder} was written from, is not there; give it by --policy DIR")
    return [sys.executable, "-m", "quantkit", "rtl-episodes", str(policy), str(folder), "--env", env, *options]


def read_vectors(path: Path) -> np.ndarray:
    """Codes (n, inputs) from a .npy file of integers, or from text with hexadecimal codes, one vector a line."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        rows = [[int(word, 16) for word in line.split()] for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        raise HwError(f"{path} cannot be read") from None
    except ValueError as error:
        raise HwError(f"{path} holds no vectors of hexadecimal codes: {error}") from None
    if len({len(row) for row in rows}) != 1:
        raise HwError(f"{path}: vectors of unequal length, or none")
    return np.array(rows, dtype=np.int64)


def episodes_of(network: Network, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Input codes (n, inputs) and, of a recurrent network, `first` (n,) from vectors of a file.

    There each vector has one number more, before its codes: 1 where an episode begins, 0 where not.
    """
    if not network.recurrent or vectors.ndim != 2 or vectors.shape[1] != network.layers[0].spec.in_features + 1:
        return vectors, None
    if not np.isin(vectors[:, 0], (0, 1)).all():
        raise HwError("the first number of a recurrent network's vector is 1 where an episode begins, or 0")
    return vectors[:, 1:], vectors[:, 0] == 1
