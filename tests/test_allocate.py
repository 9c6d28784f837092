"""Laws of sensitivities and allocations: measured once, additive where errors are small, optimal among all choices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_policies import CARTPOLE, cartpole, mlp

import quantkit.sensitivity
from hwmodel.fold_search import front, whole
from hwmodel.spec import LayerSpec
from quantkit.allocate import RESOURCES, Allocation, Problem, allocate, budget_front, default_latency, problem
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.policy import Head
from quantkit.recipe import make_plan, parse_step, quantize, uniform
from quantkit.results import read_rows
from quantkit.sensitivity import Cell, assemble, errors_of, measure, untrained
from quantkit.study import Settings, Study, hardware_costs
from quantkit.tasks.episodes import Rollout, score

SCORE = score(Rollout(np.array([1.0, 2.0]), np.array([1, 1]), 1000, 0.0))
FORMATS = ("int3", "int5")


def study_of(model: Model, seed: int = 3) -> Study:
    """A study of random states: nothing here plays episodes."""
    states = np.random.default_rng(seed).normal(size=(256, *model.example.shape[1:])).astype(np.float32)
    return Study(model, Settings(episodes=2), states, SCORE, SCORE)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Cell]]:
    """The cells of a small policy of three layers."""
    return measure(study_of(cartpole()), tmp_path_factory.mktemp("cells"), FORMATS, FORMATS)


def test_a_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, or for more formats, only what is new is measured; other weights or states are new."""
    calls: list[str] = []
    real = quantkit.sensitivity.quantize
    monkeypatch.setattr(
        quantkit.sensitivity,
        "quantize",
        lambda model, recipe, calib: (calls.append("x"), real(model, recipe, calib))[1],
    )
    study = study_of(cartpole())
    first = measure(study, tmp_path, FORMATS, ("int4",))
    assert len(calls) == 6
    assert measure(study, tmp_path, FORMATS, ("int4",)) == first and len(calls) == 6
    more = measure(study, tmp_path, FORMATS, ("int4", "int8"))
    assert len(calls) == 12 and [c for c in more["net.fc1"] if c.acts == "int4"] == first["net.fc1"]
    measure(study_of(cartpole(), seed=4), tmp_path, ("int3",), ("int4",))
    measure(study_of(cartpole(seed=1)), tmp_path, ("int3",), ("int4",))
    assert len(calls) == 18
    rows = read_rows(tmp_path / "sensitivity.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 2 * 18
    assert {"layer", "weights", "acts", "granularity", "steps", "metric", "value", "id"} <= set(rows[0])


def test_a_cell_is_the_layer_alone(cells: dict[str, list[Cell]]) -> None:
    """Its errors are those of a network in which only this layer is quantized, by hand."""
    study = study_of(cartpole())
    recipe = replace(uniform("int3", "int5"), plan=(("net.fc2", make_plan("int3", "int5")),))
    by_hand = quantize(study.model, recipe, Calib(torch.from_numpy(study.states)))
    assert list(by_hand.qlayers()) == ["net.fc2"]
    cell = next(c for c in cells["net.fc2"] if (c.weights, c.acts) == ("int3", "int5"))
    assert cell.errors == errors_of(study, by_hand)
    assert set(cell.errors) == {"output_error", "action_kl"} and cell.loss == cell.errors["action_kl"]


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_small_losses_add_up(kind: str, tmp_path: Path) -> None:
    """At 6 bits and more the sum over the layers is the network's loss to a third; a box counts squared errors."""
    head = Head("box", low=(-1.0, -2.0), high=(1.0, 2.0), squash=True) if kind == "box" else None
    study = study_of(mlp((6, 16, 12, 2), head=head, env=CARTPOLE))
    for bits in ("int6", "int8"):
        table = measure(study, tmp_path, (bits,), (bits,))
        total = sum(options[0].loss for options in table.values())
        whole_ = errors_of(study, quantize(study.model, uniform(bits, bits), Calib(torch.from_numpy(study.states))))
        expected = whole_["action_error"] ** 2 if kind == "box" else whole_["action_kl"]
        assert total == pytest.approx(expected, rel=0.34)


def test_q_values_count_their_own_error(tmp_path: Path) -> None:
    """A network of action values has no KL: its losses are squares of its output error, and q_error is told."""
    model = cartpole()
    model.meta["algo"] = "dqn"
    cell = measure(study_of(model), tmp_path, ("int4",), ("int4",))["net.head"][0]
    assert set(cell.errors) == {"output_error", "q_error"} and cell.loss == cell.errors["output_error"] ** 2


def test_formats_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """A format without a positive value gives a layer no cell; if nothing fits, layer and reason are named."""
    table = measure(study_of(cartpole()), tmp_path, ("int4",), ("int4", "int1"))
    assert all([c.acts for c in cells] == ["int4"] for cells in table.values())
    with pytest.raises(InputError, match=r"net\.fc1.*no positive value"):
        measure(study_of(cartpole()), tmp_path, ("int4",), ("int1",))


def test_training_is_left_out() -> None:
    """Of a pipeline, steps that train the whole network are not measured with."""
    steps = tuple(parse_step(text) for text in ("smoothquant", "gptq", "distill:steps=5", "bias_correction"))
    assert [name for name, _ in untrained(steps)] == ["smoothquant", "gptq", "bias_correction"]


def test_layers_that_agree_are_the_recipe_of_a_sweep(cells: dict[str, list[Cell]]) -> None:
    """One plan for all gives `uniform`'s recipe; exceptions are named, and every layer has its own plan."""
    same = [next(c for c in options if (c.weights, c.acts) == ("int3", "int5")) for options in cells.values()]
    assert assemble(same) == uniform("int3", "int5")
    mixed = [*same[:2], cells["net.head"][0]]
    recipe = assemble(mixed)
    assert [pattern for pattern, _ in recipe.plan] == ["*", "net.head"]
    for index, cell in enumerate(mixed):
        assert recipe.plan_for(cell.layer, index, 3) == cell.plan()


# --- allocation -----------------------------------------------------------------------------------


def by_force(cells: dict[str, list[Cell]], latency_us: float, luts: float) -> tuple[float, float] | None:
    """The least loss within both budgets, and the least LUTs of it, over all formats and folds, tried one by one."""
    best: tuple[float, float] | None = None
    for chosen in itertools.product(*cells.values()):
        loss = sum(cell.loss for cell in chosen)
        if best is not None and loss > best[0]:
            continue
        outs = [cell.spec.act for cell in chosen[1:]] + [None]
        folds = [front(replace(cell.spec, out=out)) for cell, out in zip(chosen, outs, strict=True)]
        for picked in itertools.product(*folds):
            used = sum(whole(fold.cost.luts) for fold in picked)
            if used <= luts and sum(fold.cycles for fold in picked) / 100 <= latency_us:
                best = min(best or (np.inf, np.inf), (loss, used))
    return best


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Cell]]:
    """The cells of a policy of two layers: small enough to try everything."""
    return measure(
        study_of(mlp((5, 6, 3), env=CARTPOLE)),
        tmp_path_factory.mktemp("two"),
        ("int2", "int4", "e2m1"),
        ("int3", "int6"),
    )


@pytest.mark.parametrize(("latency_us", "luts"), [(0.5, 150), (0.5, 250), (0.3, 300), (0.4, 200), (9, 120)])
def test_an_allocation_is_the_best_there_is(two_layers: dict[str, list[Cell]], latency_us: float, luts: float) -> None:
    """Under LUT and latency budgets the loss is that of trying all formats with all folds; so is what cannot be met."""
    expected = by_force(two_layers, latency_us, luts)
    given_ = problem(two_layers, on=("luts", "latency_us"))
    if expected is None:
        with pytest.raises(InputError, match="nearest"):
            allocate(given_, {"luts": luts, "latency_us": latency_us})
        return
    found = allocate(given_, {"luts": luts, "latency_us": latency_us})
    assert found.loss == pytest.approx(expected[0], rel=1e-4)
    assert found.costs["luts"] <= luts and found.costs["latency_us"] <= latency_us


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_embedding_takes_memory_alone(two_layers: dict[str, list[Cell]], place: int) -> None:
    """Wherever it runs, LUTs buy what they buy without it, and memory what trying everything finds."""
    table = [
        Cell("table", fmt, "float", "row", {"action_kl": loss}, None, bits, 64)
        for fmt, loss, bits in (("int2", 0.3, 128), ("int4", 0.1, 256), ("int6", 0.2, 384), ("int8", 0.01, 512))
    ]
    layers = list(two_layers.items())
    whole_ = dict([*layers[:place], ("table", table), *layers[place:]])
    limits = {"luts": 200, "latency_us": 0.5}
    alone = allocate(problem(two_layers, on=limits), limits)
    found = allocate(problem(whole_, on=limits), limits)
    assert [c for c in found.cells if c.spec is not None] == list(alone.cells) and found.costs["luts"] <= 200
    assert found.cells[place].weights == "int8" and default_latency(whole_) == default_latency(two_layers)
    for kib in (0.05, 0.06, 0.07, 0.08):
        chains = [c for c in itertools.product(*whole_.values()) if sum(cell.bits for cell in c) / 8192 <= kib]
        best = min((sum(cell.loss for cell in c) for c in chains), default=None)
        if best is None:
            with pytest.raises(InputError, match="nearest"):
                allocate(problem(whole_, on=("weight_kib",)), {"weight_kib": kib})
        else:
            found = allocate(problem(whole_, on=("weight_kib",)), {"weight_kib": kib})
            assert found.loss == pytest.approx(best, rel=1e-4) and found.costs["weight_kib"] <= kib


NUMBERS = st.floats(0.0, 8.0).map(lambda x: round(x, 2))


EACH_OVER = [(0.0, 0, 0, 0.0, 0.0), (0.0, 0, 0, 0.0, 1.0), (0.0, 0, 0, 2.0, 0.0)] + [(0.0, 0, 0, 0.0, 1.0)] * 3
"""Of the last layer each option exceeds a budget, whatever the others take."""


@settings(max_examples=40, deadline=None)
@example(table=EACH_OVER, budget=(1.0, 1.0))
@given(
    table=st.lists(st.tuples(NUMBERS, st.integers(0, 1), st.integers(0, 1), NUMBERS, NUMBERS), min_size=6, max_size=12),
    budget=st.tuples(st.floats(1.0, 20.0), st.floats(1.0, 20.0)),
)
def test_any_small_program_is_solved_exactly(
    table: list[tuple[float, int, int, float, float]], budget: tuple[float, float]
) -> None:
    """Of random options of three layers, the loss is the least of all chains that fit, or nothing fits."""
    spec = LayerSpec("x", "linear", 1, 1)
    made = [Cell(f"l{i % 3}", f"w{i}", "a", "row", {"action_kl": t[0]}, spec, 8, 1) for i, t in enumerate(table)]
    layer = np.arange(len(table)) % 3
    uses = np.array([[t[3], 0.0, 0.0, t[4], 1.0] for t in table])
    act, out = (np.array([t[k] for t in table]) for k in (1, 2))
    out[layer == 2] = 0
    chains = [
        (i, j, k)
        for i, j, k in itertools.product(*(np.flatnonzero(layer == n) for n in range(3)))
        if out[i] == act[j] and out[j] == act[k]
    ]
    fits = [c for c in chains if uses[list(c), 0].sum() <= budget[0] and uses[list(c), 3].sum() <= budget[1]]
    given_ = Problem(tuple(made), layer, act, out, uses)
    limits = {"luts": budget[0], "latency_us": budget[1]}
    if not fits:
        with pytest.raises(InputError, match="no formats meet"):
            allocate(given_, limits)
        return
    best = min(sum(table[i][0] for i in chain) for chain in fits)
    assert allocate(given_, limits).loss == pytest.approx(best, abs=1e-4)


@pytest.fixture(scope="module")
def swept(cells: dict[str, list[Cell]]) -> list[Allocation]:
    """The front of the three layers at the default latency."""
    return budget_front(
        problem(cells, on=("luts", "latency_us")), "luts", {"latency_us": default_latency(cells) or 0.0}, 6
    )


def test_a_front_trades_loss_for_its_resource(swept: list[Allocation]) -> None:
    """More LUTs, less loss, no two points alike."""
    luts, losses = [a.costs["luts"] for a in swept], [a.loss for a in swept]
    assert len(swept) >= 3 and luts == sorted(set(luts)) and losses == sorted(set(losses), reverse=True)


def test_predicted_costs_are_those_of_the_estimate(swept: list[Allocation]) -> None:
    """Quantized and estimated, the LUTs of a point are within 5 % of the prediction, cycles within 2 %."""
    from hwmodel.devices import find_device

    study = study_of(cartpole())
    for point in swept:
        quantized = quantize(study.model, assemble(point.cells), Calib(torch.from_numpy(study.states)))
        cost = hardware_costs(quantized, Settings(device=find_device("xc7a35t")))["cost"]
        assert cost["luts"] == pytest.approx(point.costs["luts"], rel=0.05, abs=8)


def test_memory_is_a_budget_without_a_device(tmp_path: Path) -> None:
    """Float inputs have no price in LUTs: weight memory is what is left to sweep, and it is exact."""
    study = study_of(cartpole())
    table = measure(study, tmp_path, ("int2", "int4", "int8"), ("float",))
    assert default_latency(table) is None
    points = budget_front(problem(table, on=("weight_kib",)), "weight_kib", points=5)
    assert len(points) >= 3
    for point in points:
        quantized = quantize(study.model, assemble(point.cells), Calib(torch.from_numpy(study.states)))
        stored = sum(layer.q.bits for layer in quantized.qlayers().values() if layer.q is not None)
        assert point.costs["weight_kib"] == pytest.approx(stored / 8192)


def test_impossible_budgets_say_what_is_possible(cells: dict[str, list[Cell]]) -> None:
    """The nearest of a budget can be met; two that exclude each other are told one by one; others are refused."""
    given_ = problem(cells)
    with pytest.raises(InputError, match="nearest") as caught:
        allocate(given_, {"luts": 5, "latency_us": 10})
    nearest = float(str(caught.value).rsplit("luts = ", 1)[1])
    assert allocate(given_, {"luts": nearest, "latency_us": 10}).costs["luts"] == nearest
    with pytest.raises(InputError, match=r"each alone is luts = [\d.]+, latency_us = [\d.]+"):
        allocate(given_, {"luts": 5, "latency_us": 0.001})
    with pytest.raises(InputError, match=f"lutz.*{RESOURCES[0]}"):
        allocate(given_, {"lutz": 5})
