"""Laws of the diagnosis: measures against independent ones, advice against constructed defects, files and pictures."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import small_policies
import tiny_models
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from hwmodel import formats
from quantkit.advice import candidates
from quantkit.analysis_figure import analysis_figure
from quantkit.analyze import (
    GAIN,
    NEGLIGIBLE,
    Analysis,
    analyze,
    clip_range,
    damage,
    diagnose,
    phrase,
    write_tables,
)
from quantkit.cli import app
from quantkit.cli.options import recipe_of
from quantkit.errors import InputError
from quantkit.loading import gaps
from quantkit.model import Calib, Model
from quantkit.policy import Head, Policy
from quantkit.recipe import Recipe, make_plan, quantize, uniform

AGENT = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"


def outputs(model: Model, x: Tensor) -> Tensor:
    """The network's outputs."""
    with torch.no_grad():
        return model.module(x)


def head_of(model: Model) -> Head | None:
    """The head of a policy."""
    return model.module.head if isinstance(model.module, Policy) else None


# --- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_only_this_layer_is_what_a_recipe_for_this_layer_does(name: str) -> None:
    """The error of one place equals that of a network quantized by a recipe that names this layer alone."""
    model, calib = tiny_models.MODELS[name]()
    states = calib.inputs[:40]
    found = diagnose(quantize(model, uniform("int3", "int4"), calib), states)
    assert len(found.places) == len(quantize(model, uniform("int3", "int4"), calib).qlayers())
    for place in found.places:
        alone = quantize(model, Recipe(((place.name, make_plan("int3", "int4")),)), calib)
        off = quantize(model, Recipe(((place.name, make_plan("float", "float")),)), calib)
        expected = damage(outputs(alone, states), outputs(off, states), head_of(model))
        assert place.only.sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-3)
        assert place.only.error == pytest.approx(expected.error, rel=1e-3)
    assert sum(place.share for place in found.places) == pytest.approx(1)
    assert [p.share for p in found.places] == pytest.approx(
        [s / sum(n) for n in [[10 ** (-p.only.sqnr_db / 10) for p in found.places]] for s in n]
    )


def test_the_input_of_a_layer_is_measured_by_the_scalar_format() -> None:
    """SQNR and clipping of the first layer's input agree with the format's slow definition, number by number."""
    model, calib = tiny_models.policy()
    states = calib.inputs[:30] * 1.5
    steps: tuple[Any, ...] = (("act_scales", {"scale": "percentile", "percentile": 60.0}),)
    for acts in ("int3", "e2m1"):
        quantized = quantize(model, uniform("int4", acts, steps=steps), calib)
        place = diagnose(quantized, states).places[0]
        act = quantized.qlayers()[place.name].act
        assert act is not None and place.act == str(act.fmt) == acts
        x = model.module.stage(states).flatten().tolist()  # type: ignore[operator]
        rounded = [formats.nearest(v / act.scale, act.fmt) * act.scale for v in x]
        noise = sum((a - b) ** 2 for a, b in zip(x, rounded, strict=True))
        assert place.act_sqnr_db == pytest.approx(10 * math.log10(sum(v * v for v in x) / noise), abs=1e-3)
        low, high = clip_range(act.fmt)
        outside = sum(not low <= v / act.scale <= high for v in x)
        assert place.saturation == pytest.approx(outside / len(x), abs=1.5 / len(x)) and outside > 0


@pytest.mark.parametrize("name", formats.all_names())
def test_clipping_starts_where_the_error_exceeds_half_a_step(name: str) -> None:
    """Just inside the range a number is at most half an outer step from its value, just outside it is more."""
    fmt = formats.parse(name)
    grid, (low, high) = formats.levels(fmt), clip_range(fmt)
    for edge, outer, inner in ((low, grid[0], grid[1]), (high, grid[-1], grid[-2])):
        half = abs(outer - inner) / 2
        assert abs(edge - outer) == half
        assert abs(formats.nearest(outer + 0.999 * (edge - outer), fmt) - edge) <= half
        assert formats.nearest(outer + 2 * (edge - outer), fmt) == outer


def test_inputs_in_blocks_are_measured_by_what_the_layer_sees() -> None:
    """The input's SQNR is that of the blocks' values; no fraction is clipped, as scales follow the inputs."""
    model, calib = tiny_models.MODELS["mlp"]()
    done = quantize(model, uniform("int4", "e2m1/e8m0x2"), calib)
    name, layer = next(iter(done.qlayers().items()))
    x = calib.inputs[:40]
    noise = (layer.real_input(x) - x).double().square().sum() / x.double().square().sum()
    place = next(p for p in diagnose(done, x).places if p.name == name)
    assert place.act_sqnr_db == pytest.approx(float(-10 * noise.log10()), abs=1e-3)
    assert place.saturation is None and place.histogram is not None and place.histogram.grid == ()


def test_damage_by_hand() -> None:
    """Fractions of changed actions, RMS over the range, and relative RMS, worked out by hand."""
    reference = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    out = torch.tensor([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    assert damage(out, reference, Head("discrete", nvec=(2,))).error == 0.25
    box = Head("box", low=(-4.0, -1.0), high=(4.0, 3.0))
    assert damage(out, reference, box).error == pytest.approx(math.sqrt((1 / 64 + 1 / 16) / 8))
    plain = damage(out, reference, None)
    assert plain.error == pytest.approx(math.sqrt(2 / 16)) and plain.top1_change == 0.25
    assert plain.sqnr_db == pytest.approx(10 * math.log10(8))
    same = damage(out, out, None)
    assert same.error == 0 and same.sqnr_db == math.inf and damage(out[:, :1], out[:, :1], None).top1_change is None


def test_measuring_changes_nothing() -> None:
    """The quantized model gives the same outputs before and after, and its hooks are gone."""
    model, calib = tiny_models.cnn()
    quantized = quantize(model, uniform("int4", "int4"), calib)
    before = outputs(quantized, calib.inputs)
    diagnose(quantized, calib.inputs)
    assert torch.equal(before, outputs(quantized, calib.inputs))
    assert not any(part._forward_hooks for part in quantized.module.modules())


class Attending(nn.Module):
    """Attention over five tokens, so that there are points."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean(dim=1))


def test_points_are_places() -> None:
    """Operands of attention have their own rows, with an error of their own and no weight."""
    torch.manual_seed(3)
    x = torch.randn(40, 5, 8)
    model = Model(Attending(), x[:2], None, {"kind": "module"})
    found = diagnose(quantize(model, uniform("int6", "int3"), Calib(x)), x)
    points = [p for p in found.places if p.op == "point"]
    assert len(points) == 4
    for place in points:
        assert place.weight == "float" and place.weight_sqnr_db is None
        assert 3 < (place.act_sqnr_db or 0) < 30 and 0 < place.only.error < 1


class Remembering(nn.Module):
    """An embedding and a recurrent cell, which runs once for each of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(11, 6), nn.GRU(6, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.words(x))[0][:, -1])


def test_layers_that_look_up_or_run_often_are_measured() -> None:
    """An embedding has no input to measure; a layer of a recurrent cell is measured over all its steps."""
    torch.manual_seed(5)
    x = torch.randint(0, 11, (30, 5))
    model = Model(Remembering(), x[:2], None, {"kind": "module"})
    quantized = quantize(model, uniform("int3", "int4"), Calib(x))
    found = {p.name: p for p in diagnose(quantized, x).places}
    assert set(found) == set(quantized.quantizers())
    words = found["words"]
    assert (
        words.op == "embedding"
        and words.act_sqnr_db is None
        and words.output_sqnr_db == pytest.approx(words.weight_sqnr_db, abs=2)
    )
    assert all(p.only.error > 0 and p.output_sqnr_db is not None for p in found.values())


def test_refusals() -> None:
    """A float model and states of another shape are refused with what would be accepted."""
    model, calib = tiny_models.mlp()
    with pytest.raises(InputError, match="--weights and --acts"):
        diagnose(quantize(model, uniform("float", "float"), calib), calib.inputs)
    with pytest.raises(InputError, match=r"\(n, 6\)"):
        diagnose(quantize(model, uniform("int4", "int4"), calib), calib.inputs[:, :5])


# --- advice --------------------------------------------------------------------------------------


def network(change: Callable[[nn.Sequential], None] | None = None) -> Model:
    """A policy with eight inputs, two ReLU layers and three actions, well-conditioned unless changed."""
    model = small_policies.mlp((8, 24, 24, 3), seed=4, head=Head("box", low=(-1.0,) * 3, high=(1.0,) * 3))
    g = torch.Generator().manual_seed(9)
    for layer in model.module.net:  # type: ignore[union-attr]
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch.randn(layer.weight.shape, generator=g) / layer.in_features**0.5
            layer.bias.data = 0.1 * torch.randn(layer.bias.shape, generator=g)
    if change:
        change(model.module.net)  # type: ignore[arg-type]
    return model


def rescaled(net: nn.Sequential) -> None:
    """Every other hidden channel 40 times as large, and taken back by the next layer."""
    f = torch.where(torch.arange(24) % 2 == 0, 40.0, 1.0)
    net.fc1.weight.data *= f[:, None]
    net.fc1.bias.data *= f
    net.fc2.weight.data /= f


def unequal(net: nn.Sequential) -> None:
    """The first layer undoes inputs of very different ranges."""
    net.fc1.weight.data /= RANGES


RANGES = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 30.0, 1.0, 1.0])


def states(seed: int, n: int = 600) -> Tensor:
    """Normal inputs."""
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: Tensor) -> Tensor:
    """One input of the set 60 times as large."""
    x = x.clone()
    x[0, 0] = 60.0
    return x


# name -> (model, transformation of the inputs, options of the recipe, a word of the option that must be advised)
DEFECTS: dict[str, tuple[Callable[[], Model], Callable[[Tensor], Tensor], str, str]] = {
    "saturating inputs": (
        network, lambda x: x, "int8 int4 row --step act_scales:scale=percentile,percentile=80",
        "--step act_scales:scale=",
    ),
    "outliers": (network, with_outliers, "int8 int4 row --step act_scales:scale=absmax", "--step act_scales:scale="),
    "rows of different size": (lambda: network(rescaled), lambda x: x, "int4 int8 tensor", "--step equalize"),
    "inputs of different ranges": (
        lambda: network(unequal), lambda x: x * RANGES, "int8 int4 row", "--step smoothquant",
    ),
    "one narrow layer": (
        network, lambda x: x, "int8 int8 row --layer net.fc2=int2/int8", "--layer 'net.fc2=int8/int8'",
    ),
    "coarse weights": (network, lambda x: x, "int3 int8 row", "--step gptq"),
}  # fmt: skip


def parsed(weights: str, acts: str, granularity: str, options: list[str]) -> Recipe:
    """The recipe of a command line."""
    steps = [b for a, b in zip(options[::2], options[1::2], strict=True) if a == "--step"]
    layers = [b for a, b in zip(options[::2], options[1::2], strict=True) if a == "--layer"]
    for a, b in zip(options[::2], options[1::2], strict=True):
        granularity = b if a == "--granularity" else granularity
    return recipe_of(weights, acts, granularity, steps, None, layers, 0)


def run(name: str, attempts: bool = True) -> tuple[Analysis, Model, Calib, Tensor, list[str]]:
    """The analysis of a defect, and what it was made of."""
    build, change, text, _ = DEFECTS[name]
    model, words = build(), text.split()
    calib, seen = Calib(change(states(1))), change(states(2))
    return analyze(model, parsed(*words[:3], words[3:]), calib, seen, attempts=attempts), model, calib, seen, words


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_gets_its_advice(name: str) -> None:
    """The rule for the defect fires, and its option survives the attempt."""
    result, *_ = run(name)
    assert any(DEFECTS[name][3] in finding.option for finding in result.findings), result.findings
    listed = run(name, attempts=False)[0].findings
    assert {f.option for f in result.findings} <= {f.option for f in listed}
    assert all(f.after is None for f in listed)


@pytest.mark.parametrize("name", DEFECTS)
def test_following_the_advice_helps(name: str) -> None:
    """The option, given beside the others on the command line, gives the lower error that the finding promised."""
    result, model, calib, seen, words = run(name)
    for finding in result.findings:
        given = shlex.split(finding.option)
        rest = words[3:]
        if given[0] == "--step":  # the option lists all steps
            rest = [w for a, b in zip(rest[::2], rest[1::2], strict=True) if a != "--step" for w in (a, b)]
        better = quantize(model, parsed(*words[:3], [*rest, *given]), calib)
        after = damage(outputs(better, seen), outputs(model, seen), head_of(model)).error
        assert after == pytest.approx(finding.after) and after <= GAIN * finding.before
        assert finding.before == result.whole.error


def test_a_clean_network_gets_no_advice() -> None:
    """With eight bits no rule fires and nothing is tried."""
    model, calib = network(), Calib(states(1))
    recipe = uniform("int8", "int8")
    result = analyze(model, recipe, calib, states(2))
    assert result.whole.error < NEGLIGIBLE and result.findings == ()
    assert candidates(result.places, recipe, frozenset({"net.fc1", "net.fc2"})) == []


def test_sabotage_useless_advice_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that suggests wider inputs to a network that suffers from its weights is listed and not kept."""
    model, calib = network(), Calib(states(1))
    monkeypatch.setattr("quantkit.advice.SATURATED", -1.0)
    recipe = uniform("int2", "int8")
    listed = analyze(model, recipe, calib, states(2), attempts=False).findings
    kept = analyze(model, recipe, calib, states(2)).findings
    assert any("act_scales" in f.option for f in listed)
    assert not any("act_scales" in f.option for f in kept) and any("gptq" in f.option for f in kept)


# --- gaps ----------------------------------------------------------------------------------------


class Branching(nn.Module):
    """What nobody can follow, with a product that cannot be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.odd = nn.Linear(4, 4), nn.Linear(4, 2), nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.odd(x, x)) if x.sum() > 0 else self.b(self.a(x))


def test_gaps_are_named() -> None:
    """Layers left in float, an untraced network, a layer that never ran and channels without a signal."""
    x = torch.ones(9, 4)
    quantized = quantize(Model(Branching(), x[:2], None, {"kind": "module"}), uniform("int4", "int8"), Calib(x))
    found = gaps(quantized)
    assert list(found["float_layers"]) == ["odd"] and found["untraced"] and found["idle"] == ["a"]
    assert found["silent_channels"] == 0
    assert diagnose(quantized, x).gaps == found
    idle = next(p for p in diagnose(quantized, x).places if p.name == "a")
    assert idle.saturation is None and idle.only.error == 0
    model, calib = network(), states(1)
    calib[:, 3] = 0
    done = quantize(model, uniform("int4", "int8"), Calib(calib))
    assert gaps(done)["silent_channels"] >= 1 and gaps(done)["idle"] == []
    first = diagnose(done, calib).places[0]
    assert first.silent == 1


# --- files and the command -----------------------------------------------------------------------


def test_tables_repeat_the_analysis(tmp_path: Path) -> None:
    """layers.csv has a row for each place and analysis.json, without NaN, every number."""
    result, *_ = run("one narrow layer")
    table, document = write_tables(result, tmp_path)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [p.name for p in result.places]
    assert [float(r["only_error"]) for r in rows] == [p.only.error for p in result.places]
    read = json.loads(document.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert read["places"][0]["histogram"]["counts"] == list(result.places[0].histogram.counts)  # type: ignore[union-attr]
    assert read["findings"][0]["option"] == result.findings[0].option
    assert f"{result.whole.error:.2%}" in phrase(result)


@pytest.mark.parametrize("name", ["policy", "cnn"])
def test_the_picture_shows_every_place(name: str) -> None:
    """A bar for each place with its error and a histogram for each input; histograms hold the whole sample."""
    model, calib = tiny_models.MODELS[name]()
    result = diagnose(quantize(model, uniform("int3", "e2m1"), calib), calib.inputs)
    figure = analysis_figure(result, "title")
    figure.canvas.draw()
    axes = [a for a in figure.get_axes() if a.get_visible()]
    assert len(axes) == 1 + len(result.places)
    assert [b.get_width() for b in axes[0].patches] == [p.only.error for p in result.places]
    for place, drawn in zip(result.places, axes[1:], strict=True):
        assert place.histogram is not None and drawn.get_title(loc="left") == place.name
        assert sum(b.get_height() for b in drawn.patches) == sum(place.histogram.counts)
    plt.close(figure)


def call(*arguments: str | Path) -> Any:
    """One command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command_on_a_checkpoint_and_on_its_directory(tmp_path: Path) -> None:
    """A table for people, a document for programs, a folder of files; a directory keeps its recorded weight SQNR."""
    four = ("--weights", "int4", "--acts", "int4", "--calibration", "60")
    first = call("analyze", AGENT, *four, "--states", "50", "-o", tmp_path / "a")
    assert first.exit_code == 0 and "net.fc1" in first.stdout and "only this layer" in first.stdout
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "analysis.json", "layers.csv", "layers.png", "layers.svg",
    ]  # fmt: skip
    assert "exists" in call("analyze", AGENT, *four, "-o", tmp_path / "a").stderr
    found = json.loads(call("analyze", AGENT, *four, "--states", "50", "--no-try", "--json").stdout)
    assert found["metric"] == "action_error" and found["n"] == 50 and len(found["places"]) == 3
    made = json.loads(call("quantize", AGENT, "-o", tmp_path / "q", *four, "--json").stdout)
    stored = json.loads(call("analyze", tmp_path / "q", "--states", "50", "--json").stdout)
    assert [p["weight_sqnr_db"] for p in stored["places"]] == [e["sqnr_db"] for e in made["layers"]]
    assert stored["findings"] == [] and all(p["only"]["error"] > 0 for p in stored["places"])
    for arguments, words in (
        ((AGENT,), "--weights int4"),
        ((tmp_path / "q", *four), "quantized already"),
        ((AGENT, *four, "--preset", "fast", "--step", "rtn"), "not both"),
    ):
        refused = call("analyze", *arguments)
        assert refused.exit_code == 2 and words in refused.stderr and refused.stdout == ""
