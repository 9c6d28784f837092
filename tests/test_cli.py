"""The command line as its users meet it: one JSON document or a table, one line per mistake, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import members, write_zip
from typer.testing import CliRunner

from quantkit.cli import app

AGENT = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"
QUICK = ["--calibration", "50"]
FOUR = ["--weights", "int4", "--acts", "int4"]


def call(*arguments: str | Path) -> Any:
    """One command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def document(*arguments: str | Path) -> dict[str, Any]:
    """The one JSON document that a command prints with --json."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert isinstance(found, dict) and result.stderr == ""
    return found


def error(*arguments: str | Path) -> str:
    """The line on stderr of a command that is refused: nothing else is printed, exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized directory `q`, its ONNX file, and a study `s` of two designs."""
    folder = tmp_path_factory.mktemp("cli")
    torch.set_num_threads(1)
    assert call("quantize", AGENT, "-o", folder / "q", *FOUR, *QUICK).exit_code == 0
    assert call("export", folder / "q", "-o", folder / "q.onnx").exit_code == 0
    study = ("--weights", "int4,e2m1", "--acts", "int4", "-n", "2", "--jobs", "1")
    result = call("sweep", AGENT, "-o", folder / "s", *study)
    assert result.exit_code == 0, result.stderr
    return folder


# --- what works ---------------------------------------------------------------------------------


def test_inspect_keeps_its_contract(work: Path) -> None:
    """kind, algo, env, layers with op and sizes, parameters; for checkpoints and quantized directories."""
    for path, quantized in ((AGENT, False), (work / "q", True)):
        found = document("inspect", path)
        assert (found["kind"], found["algo"], found["env"]) == ("policy", "sac", "Pendulum-v1")
        assert [(e["name"], e["op"], e["in_features"], e["out_features"]) for e in found["layers"]] == [
            ("net.fc1", "linear", 3, 64), ("net.fc2", "linear", 64, 64), ("net.head", "linear", 64, 1),
        ]  # fmt: skip
        assert found["parameters"] == sum(e["parameters"] for e in found["layers"])
        assert found["quantized"] is quantized


def test_evaluate_keeps_its_contract(work: Path) -> None:
    """metric, mean, std, stderr, n and returns agree with each other."""
    for path in (AGENT, work / "q"):
        found = document("evaluate", path, "--episodes", "4")
        returns = np.array(found["returns"])
        assert found["metric"] == "return" and found["n"] == len(returns) == 4
        assert found["mean"] == pytest.approx(returns.mean())
        assert found["std"] == pytest.approx(returns.std(ddof=1))
        assert found["stderr"] == pytest.approx(returns.std(ddof=1) / 2)
    assert document("evaluate", AGENT, "-n", "1")["stderr"] is None


def test_episode_i_uses_seed_plus_i() -> None:
    """The returns from a later seed are the tail of those from an earlier one."""
    whole = document("evaluate", AGENT, "-n", "5", "--seed", "30")["returns"]
    assert document("evaluate", AGENT, "-n", "3", "--seed", "32")["returns"] == whole[2:]
    assert document("evaluate", AGENT, "-n", "1", "--seed", "33")["returns"] == whole[3:4]


def test_quantize_keeps_its_contract(tmp_path: Path) -> None:
    """bits_per_weight and, for each layer, name, weight, act and sqnr_db; exceptions and steps are obeyed."""
    steps = (
        "--step",
        "equalize",
        "--step",
        "gptq:act_order=true",
        "--layer",
        "first=int8/int8",
        "--layer",
        "last=e2m1/float",
    )
    found = document("quantize", AGENT, "-o", tmp_path / "q", "--weights", "int3", "--acts", "e3m2", *steps, *QUICK)
    layers = [(e["name"], e["weight"], e["act"]) for e in found["layers"]]
    assert layers == [("net.fc1", "int8", "int8"), ("net.fc2", "int3", "e3m2"), ("net.head", "e2m1", "float")]
    assert 3 < found["bits_per_weight"] < 8 and all(e["sqnr_db"] > 3 for e in found["layers"])
    assert [s["name"] for s in found["steps"]] == ["equalize", "act_scales", "gptq"]
    assert found["steps"][2]["options"] == {"act_order": True}


def test_the_same_command_writes_the_same_bytes(work: Path, tmp_path: Path) -> None:
    """Quantizing twice gives the same tensors."""
    document("quantize", AGENT, "-o", tmp_path / "q", *FOUR, *QUICK)
    for name in ("model.safetensors", "specs.json", "quantkit.json"):
        assert (tmp_path / "q" / name).read_bytes() == (work / "q" / name).read_bytes(), name


def test_verify_keeps_its_contract(work: Path) -> None:
    """ok, max_abs, action_agreement, mean and mean_torch; a policy verified against its own file is ok."""
    found = document("verify", work / "q", work / "q.onnx", "-n", "2")
    assert {"ok", "max_abs", "action_agreement", "mean", "mean_torch"} <= set(found)
    assert found["ok"] is True and found["mean"] == found["mean_torch"]


def test_verify_tells_another_policy_apart(work: Path, tmp_path: Path) -> None:
    """The file of another recipe is refused; changed weights are found: ok is false, exit code 1, one document."""
    call("quantize", AGENT, "-o", tmp_path / "q2", "--weights", "int2", "--acts", "int4", *QUICK)
    assert "another recipe" in error("verify", tmp_path / "q2", work / "q.onnx", "-n", "1", "--json")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(work / "q.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims == [64]:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + 1, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    result = call("verify", work / "q", tmp_path / "changed.onnx", "-n", "1", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["ok"] is False and result.stderr == ""


def test_sweep_leaves_rows_table_and_pictures(work: Path) -> None:
    """rows.jsonl, pareto.csv, pareto.png and pareto.svg; running it again changes no row."""
    study = work / "s"
    rows = (study / "rows.jsonl").read_bytes()
    assert rows.count(b"\n") == 2
    for name in ("pareto.csv", "pareto.png", "pareto.svg"):
        assert (study / name).stat().st_size > 100
    command = ("--weights", "int4,e2m1", "--acts", "int4", "-n", "2", "--jobs", "1")
    found = document("sweep", AGENT, "-o", study, *command)
    assert (study / "rows.jsonl").read_bytes() == rows and found["designs"] == 2
    assert {"reference", "margin", "front", "knee", "files"} <= set(found)
    assert document("pareto", study)["front"] == found["front"]


def test_pareto_draws_other_axes(work: Path) -> None:
    """Other columns go to files of their own names."""
    found = document("pareto", work / "s", "--x", "weight_kib", "--y", "action_error")
    assert any(path.endswith("pareto_action_error_weight_kib.svg") for path in found["files"])
    assert all(Path(path).stat().st_size > 100 for path in found["files"])


@pytest.mark.parametrize("option", [("--device", "none"), ("--acts", "float")])
def test_a_sweep_without_hardware_cost_ends_well(option: tuple[str, str], tmp_path: Path) -> None:
    """With no device, or float inputs, there are rows, a table and a front against memory; exit code 0."""
    arguments = {"--weights": "int4,int8", "--acts": "int4", "-n": "1", "--jobs": "1"} | dict([option])
    result = call("sweep", AGENT, "-o", tmp_path / "s", *(part for pair in arguments.items() for part in pair))
    assert result.exit_code == 0, result.stderr
    assert {"rows.jsonl", "pareto.csv", "pareto.png", "pareto.svg"} <= {p.name for p in (tmp_path / "s").iterdir()}
    assert "0 LUTs" not in result.stdout


def test_designs_that_fail_are_reported(tmp_path: Path) -> None:
    """Inputs in a format that cannot hold them do not stop the others, and the output says that they failed."""
    options = ("--weights", "int4", "--acts", "int4,int1", "-n", "1", "--jobs", "1")
    result = call("sweep", AGENT, "-o", tmp_path / "s", *options)
    assert result.exit_code == 0
    assert "int1" in result.stdout + result.stderr and "no positive value" in result.stdout + result.stderr


def test_people_get_tables(work: Path) -> None:
    """Without --json each command prints its numbers as text, with nothing on stderr."""
    for arguments, words in (
        (("inspect", AGENT), ("Pendulum-v1", "net.fc1", "parameters")),
        (("evaluate", AGENT, "-n", "2"), ("return", "1000..1001")),
        (("pareto", work / "s"), ("Pareto front", "take:", "pareto.csv")),
        (("verify", work / "q", work / "q.onnx", "-n", "1"), ("verified",)),
    ):
        result = call(*arguments)
        assert result.exit_code == 0 and result.stderr == ""
        assert all(word in result.stdout for word in words), result.stdout


def test_force_replaces_a_quantized_directory(tmp_path: Path) -> None:
    """--force is needed to write over a result, and then the new one is there alone."""
    document("quantize", AGENT, "-o", tmp_path / "q", *FOUR, *QUICK)
    assert "exists" in error("quantize", AGENT, "-o", tmp_path / "q", *FOUR, *QUICK)
    document("quantize", AGENT, "-o", tmp_path / "q", "--weights", "e2m1", "--acts", "int4", "--force", *QUICK)
    assert document("inspect", tmp_path / "q")["layers"][0]["weight"] == "e2m1"
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


# --- what is refused ----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown weight format": (
        ("quantize", "AGENT", "-o", "OUT", "--weights", "itn4", "--acts", "int4"),
        ("itn4", "did you mean", "int4"),
    ),
    "unknown act format": (
        ("quantize", "AGENT", "-o", "OUT", "--weights", "int4", "--acts", "e9m9"),
        ("e9m9", "did you mean"),
    ),
    "unknown format in a sweep": (
        ("sweep", "AGENT", "-o", "OUT", "--weights", "int4,innt3", "--acts", "int4"),
        ("innt3", "did you mean"),
    ),
    "unknown granularity": (
        ("quantize", "AGENT", "-o", "OUT", *FOUR, "--granularity", "rows"),
        ("rows", "tensor, row"),
    ),
    "unknown step": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--step", "gptk"), ("gptk", "'gptq'")),
    "unknown step in a sweep": (("sweep", "AGENT", "-o", "OUT", *FOUR, "--step", "rtn+gptk"), ("gptk", "'gptq'")),
    "unknown step option": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--step", "gptq:dampp=1"), ("dampp", "damp")),
    "bad step value": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--step", "gptq:damp=x"), ("damp", "'x'")),
    "step value that is no number": (
        ("sweep", "AGENT", "-o", "OUT", *FOUR, "--step", "gptq:damp=nan"),
        ("damp", "nan"),
    ),
    "missing file": (("inspect", "nothing.zip"), ("nothing.zip", "no such file")),
    "missing file to evaluate": (("evaluate", "nothing.zip"), ("nothing.zip",)),
    "missing directory to export": (("export", "nothing.q", "-o", "OUT"), ("nothing.q",)),
    "missing directory to verify": (("verify", "nothing.q", "x.onnx"), ("nothing.q",)),
    "missing onnx file": (("verify", "Q", "nothing.onnx"), ("nothing.onnx",)),
    "missing study": (("pareto", "nothing"), ("nothing", "quantkit sweep")),
    "corrupt zip": (("inspect", "CORRUPT"), ("corrupt.zip",)),
    "cut zip": (("evaluate", "CUT"), ("cut.zip",)),
    "text as zip": (("quantize", "TEXT", "-o", "OUT", *FOUR), ("text.zip",)),
    "a folder that is no checkpoint": (("inspect", "EMPTY"), ("empty",)),
    "not an onnx file": (("verify", "Q", "TEXT"), ("text.zip",)),
    "unknown device": (("sweep", "AGENT", "-o", "OUT", *FOUR, "--device", "xc7a36t"), ("xc7a36t", "xc7a35t")),
    "latency and luts": (
        ("sweep", "AGENT", "-o", "OUT", *FOUR, "--latency-us", "5", "--luts", "900"),
        ("--latency-us", "--luts"),
    ),
    "existing output": (("quantize", "AGENT", "-o", "Q", *FOUR), ("exists", "--force")),
    "existing onnx output": (("export", "Q", "-o", "TEXT"), ("exists", "--force")),
    "output below nothing": (("quantize", "AGENT", "-o", "no/such/q", *FOUR), ("no/such",)),
    "layer without formats": (
        ("quantize", "AGENT", "-o", "OUT", *FOUR, "--layer", "first"),
        ("--layer", "first=int8/int8"),
    ),
    "layer with one format": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--layer", "first=int8"), ("--layer",)),
    "layer with an unknown format": (
        ("quantize", "AGENT", "-o", "OUT", *FOUR, "--layer", "first=int88/int8"),
        ("int88",),
    ),
    "layer that matches nothing": (
        ("quantize", "AGENT", "-o", "OUT", *FOUR, *QUICK, "--layer", "fc9=int8/int8"),
        ("fc9", "net.fc1"),
    ),
    "layer that matches nothing, in a sweep": (
        ("sweep", "AGENT", "-o", "OUT", *FOUR, "-n", "1", "--jobs", "1", "--layer", "fc9=int8/int8"),
        ("fc9", "net.fc1"),
    ),
    "output that is no study": (("sweep", "AGENT", "-o", "Q", *FOUR, "-n", "1"), ("not a study",)),
    "study of other episodes": (("sweep", "AGENT", "-o", "S", *FOUR, "-n", "3"), ("episodes", "2", "3")),
    "study of another seed": (("sweep", "AGENT", "-o", "S", *FOUR, "-n", "2", "--seed", "5"), ("seed", "1000", "5")),
    "study of another device": (
        ("sweep", "AGENT", "-o", "S", *FOUR, "-n", "2", "--device", "none"),
        ("device", "xc7a35t"),
    ),
    "study of another checkpoint": (
        ("sweep", "OTHER", "-o", "S", *FOUR, "-n", "2", "--env", "Pendulum-v1"),
        ("another checkpoint",),
    ),
    "unknown column": (("pareto", "S", "--x", "lutz"), ("lutz", "luts")),
    "unknown environment": (("evaluate", "AGENT", "--env", "Pendulun-v1"), ("Pendulun-v1",)),
    "an environment that does not fit": (("evaluate", "AGENT", "--env", "CartPole-v1"), ("CartPole-v1",)),
    "missing calibration file": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--inputs", "no.npy"), ("no.npy",)),
    "calibration file of text": (("quantize", "AGENT", "-o", "OUT", *FOUR, "--inputs", "TEXT"), ("text.zip",)),
    "factory that is not there": (("inspect", "TENSORS", "--factory", "no_such_module:make"), ("no_such_module",)),
    "tensors without factory": (("inspect", "TENSORS"), ("factory",)),
    "no formats": (("sweep", "AGENT", "-o", "OUT", "--weights", ",", "--acts", "int4"), ("--weights",)),
    "no granularity": (("sweep", "AGENT", "-o", "OUT", *FOUR, "--granularity", ","), ("--granularity",)),
    "sweep of a quantized directory": (
        ("sweep", "Q", "-o", "OUT", *FOUR, "-n", "1", "--jobs", "1"),
        ("already quantized",),
    ),
    "quantizing a quantized directory": (("quantize", "Q", "-o", "OUT", *FOUR, *QUICK), ("already quantized",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly one line `error: ...` on stderr, exit code 2, nothing on stdout, and no output left behind."""
    monkeypatch.chdir(tmp_path)
    places = {"AGENT": AGENT, "OUT": tmp_path / "out", "Q": work / "q", "S": work / "s"} | bad_files(tmp_path)
    before = sorted(p.name for p in (work / "s").iterdir())
    arguments, words = MISTAKES[mistake]
    line = error(*(places.get(a, a) for a in arguments))
    missing = [word for word in words if word not in line]
    assert not missing, line
    assert "internal error" not in line and "Traceback" not in line
    assert sorted(p.name for p in (work / "s").iterdir()) == before
    left = {p.name for p in tmp_path.iterdir()} - {p.name for p in bad_files(tmp_path).values()}
    assert not left - {"out"}, left
    if (tmp_path / "out").exists():
        assert mistake.endswith("in a sweep") or "sweep" in mistake


def bad_files(folder: Path) -> dict[str, Path]:
    """Files that are no checkpoints, and one that is another's."""
    content = bytearray(AGENT.read_bytes())
    paths = {name: folder / f"{name.lower()}.zip" for name in ("CORRUPT", "CUT", "TEXT", "OTHER")}
    paths["CUT"].write_bytes(content[:2000])
    with zipfile.ZipFile(AGENT) as archive:
        info = archive.getinfo("policy.pth")
    start = info.header_offset + info.compress_size // 2
    content[start : start + 2000] = bytes(255 - b for b in content[start : start + 2000])
    paths["CORRUPT"].write_bytes(content)
    paths["EMPTY"] = folder / "empty"
    paths["EMPTY"].mkdir(exist_ok=True)
    paths["TEXT"].write_text("not a zip\n")
    write_zip(paths["OTHER"], members())
    paths["TENSORS"] = folder / "tensors.pt"
    torch.save({"weight": torch.zeros(2, 2)}, paths["TENSORS"])
    return paths


USAGE: dict[str, tuple[str, ...]] = {
    "no output": ("quantize", "agent.zip", *FOUR),
    "no episodes": ("evaluate", "agent.zip", "--episodes", "0"),
    "text for a number": ("evaluate", "agent.zip", "--episodes", "many"),
    "negative seed": ("evaluate", "agent.zip", "--seed", "-1"),
    "unknown option": ("inspect", "agent.zip", "--jsno"),
    "unknown command": ("inspekt", "agent.zip"),
    "unknown choice": ("inspect", "agent.zip", "--normalize", "no"),
    "no argument": ("inspect",),
}


@pytest.mark.parametrize("mistake", USAGE)
def test_a_usage_mistake_is_one_line_too(mistake: str) -> None:
    """What the argument parser refuses looks like every other mistake, in a real process."""
    done = subprocess.run([sys.executable, "-m", "quantkit", *USAGE[mistake]], capture_output=True, text=True)
    if "No module named quantkit.__main__" in done.stderr:
        code = "import sys; sys.argv[0] = 'quantkit'; from quantkit.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *USAGE[mistake]], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr


# --- nothing is silent, nothing is done in vain ---------------------------------------------------

NET = """
import torch
from torch import nn

class Net(nn.Module):
    example_input = torch.ones(2, 4)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.odd = nn.Linear(4, 4), nn.Linear(4, 2), nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.b(self.odd(x, x)) if x.sum() > 0 else self.b(self.a(x))
"""


def test_what_stays_in_float_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize, inspect and analyze warn on stderr of a float layer, an untraced network and an idle layer; with
    --json the document says it and stderr is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "branching_net.py").write_text(NET)
    torch.manual_seed(1)
    from branching_net import Net  # type: ignore[import-not-found]

    torch.save(Net().state_dict(), "net.pt")
    np.save("x.npy", np.abs(np.random.default_rng(0).normal(size=(40, 4))).astype(np.float32))
    given = ("--factory", "branching_net:Net", "--inputs", "x.npy")
    result = call("quantize", "net.pt", "-o", "q", *FOUR, *given)
    lines = result.stderr.splitlines()
    assert result.exit_code == 0 and len(lines) == 3 and all(line.startswith("warning: ") for line in lines)
    for words in ("odd stays in float", "cannot be followed", "a never ran"):
        assert sum(words in line for line in lines) == 1, lines
    assert call("analyze", "net.pt", *FOUR, *given).stderr == result.stderr
    assert call("inspect", "q", *given[:2]).stderr == result.stderr
    for found in (
        document("quantize", "net.pt", "-o", "q", "--force", *FOUR, *given),
        document("inspect", "q", *given[:2]),
        document("analyze", "net.pt", *FOUR, *given)["gaps"],
    ):
        assert list(found["float_layers"]) == ["odd"] and found["untraced"] and found["idle"] == ["a"]


def test_rows_of_a_sweep_name_float_layers(work: Path) -> None:
    """Every row has `float_layers`, here an empty one."""
    rows = [json.loads(line) for line in (work / "s/rows.jsonl").read_text().splitlines()]
    assert [row["float_layers"] for row in rows] == [{}, {}]


IN_VAIN = [name for name in MISTAKES if "quantize" in MISTAKES[name][0] and name != "calibration file of text"]


@pytest.mark.parametrize("mistake", IN_VAIN)
def test_a_design_is_refused_before_any_work(mistake: str, work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What `quantize` refuses, it refuses without a rollout, a calibration or a step; `analyze` as well."""
    import quantkit.recipe
    import quantkit.study

    def spied(*_: Any, **__: Any) -> None:
        pytest.fail("work was done for a design that is refused")

    monkeypatch.setattr(quantkit.recipe, "quantize", spied)
    for name in ("calibration_states", "visited_states"):
        monkeypatch.setattr(quantkit.study, name, spied)
    monkeypatch.chdir(tmp_path)
    places = {"AGENT": AGENT, "OUT": tmp_path / "out", "Q": work / "q"} | bad_files(tmp_path)
    arguments = [places.get(a, a) for a in MISTAKES[mistake][0]]
    line = error(*arguments)
    if "Q" not in MISTAKES[mistake][0] and "no/such/q" not in arguments:
        assert error("analyze", *arguments[1:]) == line


@pytest.mark.parametrize("target", ["qonnx", "finn", "qcdq"])
def test_an_export_is_refused_before_any_work(target: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A format that the target cannot carry is refused before a graph is begun, and no file is left."""
    import quantkit.export

    refused = {"qonnx": ("int1", "int4"), "finn": ("e2m1", "e2m1"), "qcdq": ("e2m1", "int4")}[target]
    call("quantize", AGENT, "-o", tmp_path / "q", "--weights", refused[0], "--acts", refused[1], *QUICK)
    monkeypatch.setattr(quantkit.export, "Graph", lambda **_: pytest.fail("a graph was begun"))
    monkeypatch.setattr(quantkit.export, "open_session", lambda _: pytest.fail("a session was opened"))
    line = error("export", tmp_path / "q", "-o", tmp_path / "x.onnx", "--to", target)
    assert refused[0] in line and "accepted" in line
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


# --- real processes and help --------------------------------------------------------------------


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    command = Path(sys.executable).with_name("quantkit")
    return subprocess.run([str(command), *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_real_process_prints_one_document(tmp_path: Path) -> None:
    """stdout of the installed command is one JSON document, whatever libraries would like to say."""
    done = process("evaluate", AGENT, "-n", "1", "--json")
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["n"] == 1
    done = process("evaluate", tmp_path / "nothing.zip", "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not os.environ.get("PATH"), reason="needs a shell")
def test_a_closed_pipe_is_quiet() -> None:
    """`quantkit inspect | head -1` prints no traceback."""
    command = Path(sys.executable).with_name("quantkit")
    done = subprocess.run(f"'{command}' inspect '{AGENT}' --json | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


COMMANDS = ("inspect", "evaluate", "analyze", "quantize", "export", "rtl", "verify", "sweep", "search", "pareto")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_and_how(command: str) -> None:
    """Every command's help has a sentence, grouped options with help each, and an example of that command."""
    result = call(command, "--help")
    assert result.exit_code == 0 and f"Example: quantkit {command} " in result.stdout
    assert "╭─ Output" in result.stdout or command in ("inspect", "pareto") or "Options" in result.stdout
    from typer.main import get_command

    parameters: Any = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert all(p.help for p in parameters), [p.name for p in parameters if not p.help]


def test_the_examples_parse() -> None:
    """Options in the examples of the help exist."""
    from typer.main import get_command

    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) >= set(COMMANDS)
    for name, command in commands.items():
        words = command.epilog.removeprefix("Example: quantkit ").split()
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        assert words[0] == name and {w for w in words if w.startswith("-")} <= known


def test_the_first_page_lists_the_commands() -> None:
    """`quantkit` alone and `quantkit --help` show every command."""
    for arguments in ((), ("--help",), ("-h",)):
        result = call(*arguments)
        assert all(f" {command} " in result.stdout for command in COMMANDS)


def test_sabotage_a_chatty_command_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line printed beside the document breaks the JSON law."""
    from quantkit.cli import look

    real: Callable[[Any], None] = look.print_json
    monkeypatch.setattr(look, "print_json", lambda d: (print("hello"), real(d)))
    with pytest.raises(json.JSONDecodeError):
        document("inspect", AGENT)
