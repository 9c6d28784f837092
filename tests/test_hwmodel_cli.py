"""The command line prints one document, or one line of error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hwmodel.cli import app
from hwmodel.coeffs import use_coefficients
from hwmodel.formats import parse
from hwmodel.network import Layer, Network
from hwmodel.spec import LayerSpec

SPECS = [
    LayerSpec("a", "linear", 16, 8, weight=parse("int4"), act=parse("e2m1"), out=parse("int4"), activation="tanh"),
    LayerSpec("b", "linear", 4, 16, weight=parse("int4"), act=parse("int4")),
]


@pytest.fixture(autouse=True)
def own_coefficients() -> Iterator[None]:
    """What a command was told to price with is forgotten: a process runs one command only where no test calls it."""
    yield
    use_coefficients(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory as quantkit writes it, as far as hwmodel reads it."""
    (tmp_path / "specs.json").write_text(json.dumps({"format_version": 1, "layers": [s.to_json() for s in SPECS]}))
    return tmp_path


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_cost() -> None:
    """`hwmodel cost` prints LUTs, flip-flops and DSPs as JSON or as a table."""
    code, out, _ = run("cost", "--weights", "int4", "--acts", "e4m3", "--lanes", "8", "--acc-bits", "40", "--json")
    record = json.loads(out)
    assert code == 0 and record["luts"] > 100 and record["dsps"] == 0 and record["acc_bits"] == 40
    code, out, _ = run("cost", "--weights", "int8", "--acts", "int8", "--mapping", "dsp")
    assert code == 0 and "int8 x int8" in out


def test_estimate_reads_a_directory_or_a_file(folder: Path) -> None:
    """A directory and the file in it give the same single JSON document."""
    code, out, _ = run("estimate", folder, "--device", "xc7a35tcsg324-1", "--json")
    assert code == 0 and [layer["name"] for layer in json.loads(out)["layers"]] == ["a", "b"]
    assert run("estimate", folder / "specs.json", "--device", "xc7a35t", "--json")[1] == out
    assert "total" in run("estimate", folder, "--device", "xc7a35t", "--luts", "5000")[1]


def test_devices() -> None:
    """`hwmodel devices` lists parts with their sources."""
    assert {"name", "luts", "source"} <= set(json.loads(run("devices", "--json")[1])[0])
    assert "xc7z020" in run("devices")[1]


BAD = [
    (["cost", "--weights", "int9", "--acts", "int4"], "unknown format"),
    (["cost", "--weights", "int4", "--acts", "int4", "--lanes", "0"], "at least 1"),
    (["cost", "--weights", "int4", "--acts", "int4", "--mapping", "x"], "accepted: lut"),
    (["estimate", "DIR", "--device", "xc7a3"], "did you mean"),
    (["estimate", "DIR", "--device", "xc7a35t", "--latency-us", "0.01"], "nearest"),
    (["estimate", "DIR", "--device", "xc7a35t", "--latency-us", "1", "--luts", "9"], "not both"),
    (["estimate", "DIR/none", "--device", "xc7a35t"], "does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(arguments: list[str], message: str, folder: Path) -> None:
    """Bad input ends with exit code 2, one line on stderr, nothing on stdout."""
    code, out, err = run(*(a.replace("DIR", str(folder)) for a in arguments))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


MALFORMED = [
    "",
    "[]",
    "{}",
    '{"format_version": 2, "layers": []}',
    '{"format_version": 1, "layers": []}',
    '{"format_version": 1, "layers": [{"name": "a"}]}',
    '{"format_version": 1, "layers": [3]}',
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_specs_are_refused(text: str, tmp_path: Path) -> None:
    """A file that holds no layer specifications is refused by name."""
    (tmp_path / "specs.json").write_text(text)
    code, out, err = run("estimate", tmp_path, "--device", "xc7a35t")
    assert code == 2 and out == "" and "specs.json" in err and err.count("\n") == 1


def test_what_the_parser_refuses_is_one_line(tmp_path: Path) -> None:
    """An unknown command, a missing argument and a word in place of a number end as all bad input does."""
    number = ["cost", "--weights", "int4", "--acts", "int4", "--lanes", "x"]
    for arguments, words in ((["estimat"], "'estimate'"), (["estimate"], "'NETWORK'"), (number, "'--lanes'")):
        done = subprocess.run([sys.executable, "-m", "hwmodel", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and words in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_fit_refuses_outputs_that_it_could_not_write(tmp_path: Path) -> None:
    """A directory, a folder that is missing, and a report that --csv has no rows for, before any work is done."""
    rows = tmp_path / "mine.csv"
    rows.write_text("weight,act,lanes,acc_bits,luts,ffs\n" + "int4,int4,2,20,70,50\n" * 4)
    own = ["fit", "--csv", rows, "--out"]
    for arguments, words in (
        ([*own, tmp_path], "cannot be written"),
        ([*own, tmp_path / "none" / "x.toml"], "cannot be written"),
        (
            ["fit", "--out", tmp_path / "x.toml", "--report", tmp_path / "none" / "x.csv"],
            "none/x.csv cannot be written",
        ),
        ([*own, tmp_path / "x.toml", "--report", tmp_path / "x.csv"], "leave out one"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert run(*own, tmp_path / "x.toml")[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.csv", "x.toml"]


def test_help_is_light() -> None:
    """Help answers to -h, shows an example, and loads neither numpy nor torch."""
    assert "Example:" in run("estimate", "-h")[1]
    check = (
        "import sys; from typer.testing import CliRunner; import hwmodel.cli as c\n"
        "CliRunner().invoke(c.app, ['--help'])\n"
        "print({'numpy', 'torch', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_episodes_need_an_environment_a_policy_and_quantkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hwmodel simulate --env` without one of them, or with vectors besides, is one line and exit code 2."""
    spec = replace(SPECS[1], acc_bits=12)
    network = Network((Layer(spec, np.zeros((4, 16), np.int64), None),))
    (tmp_path / "network.json").write_text(json.dumps(network.to_json()))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "network.json").write_text(json.dumps({"parts": [{"folder": "a"}, {"folder": "b"}]}))
    drive = ["simulate", tmp_path, "--env", "Pendulum-v1"]
    for arguments, words in (
        (["simulate", tmp_path, "-n", "3", "--seed", "1"], "--episodes, --seed: for episodes, which need --env"),
        ([*drive, "--vectors", "x.npy"], "leave out --vectors"),
        (drive, "does not say which policy it was written from; give it by --policy DIR"),
        (["simulate", tmp_path / "none", "--env", "Pendulum-v1"], "has no network.json"),
        (["simulate", tmp_path / "two", "--env", "Pendulum-v1"], "holds several designs"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and words in err and err.count("\n") == 1
    (tmp_path / "origin.json").write_text("[]")
    assert "origin.json is damaged" in run(*drive)[2]
    monkeypatch.setattr("hwmodel.simulate.find_spec", lambda name: None)
    code, _, err = run(*drive)
    assert code == 2 and "quantkit, which is not installed" in err
