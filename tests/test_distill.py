"""Distillation against its docstring."""

from __future__ import annotations

import numpy as np
import pytest
import small_policies
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, attention, nearest_quantized

from hwmodel import formats
from hwmodel.formats import levels
from quantkit.acting import DIRECTIONS, LENGTHS, PLAYED, uphill
from quantkit.contest import Contest
from quantkit.course import JUDGES, Course, Pool, student_of
from quantkit.errors import InputError
from quantkit.losses import loss_for
from quantkit.methods import act_scales, center, distill, input_grid
from quantkit.mixtures import half_mixed, mixtures
from quantkit.model import Calib, Model, Visits
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform
from quantkit.rounding import round_to
from quantkit.study import visited_states
from quantkit.trainees import Trainee, inside_cell

RTN = (("act_scales", {}), ("rtn", {}))


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_starts_inside_the_cell(weights):
    """A latent weight rounds to the code it starts from, and is the float weight where that rounds there anyway."""
    fmt = formats.parse(weights)
    grid = torch.tensor(levels(fmt))
    values = grid[torch.arange(300) % len(grid)]
    u = torch.linspace(-1.3, 1.1, 300) * grid.abs().max()
    assert torch.equal(round_to(inside_cell(u, values, fmt), fmt), values)
    inner = 0.96 * values
    assert torch.allclose(inside_cell(inner, round_to(inner, fmt), fmt), inner, atol=0.06 * float(grid.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_untrained_trainee_is_the_layer(name):
    """Before the first step the network of trainees gives the quantized network's outputs, ties of floats aside."""
    _, model, calib = nearest_quantized(name, "int4", "int8")
    expected = model.module(calib.inputs)
    pool = Pool.of(calib.inputs, model.module)
    student, trainees = student_of(model.copy(), pool)
    got = student(calib.inputs)
    assert (got - expected).abs().median() <= 1e-5 * expected.abs().max()
    same = Course(model, student, trainees, pool, lambda x, y, t: y.sum(1), 1, calib.generator).model()
    assert (same.module(calib.inputs) - expected).abs().median() <= 1e-5 * expected.abs().max()


def test_gradients_are_those_of_learned_step_sizes():
    """The derivative by log a is a (Q(x/a) - x/a) inside the range and a times the limit outside (Esser et al.)."""
    _, model, _ = nearest_quantized("policy")
    layer = model.qlayers()["net.2"]
    trainee = Trainee(layer, None)
    a, top = layer.act.scale, float(formats.max_value(layer.act.fmt))
    x = torch.tensor([[0.4 * a] + [0.0] * 12 + [a * (top + 9)]])
    trainee(x)[0].sum().backward()
    w = layer.effective_weight().sum(dim=0)
    expected = a * (w[0] * (round(0.4) - 0.4) + w[13] * top)
    assert float(trainee.log_a.grad) == pytest.approx(float(expected), rel=1e-4)
    x = torch.rand(3, 14)
    trainee.zero_grad()
    trainee(x).sum().backward()
    columns = trainee.layer.real_input(x).sum(dim=0)
    assert torch.allclose(trainee.V.grad, layer.q.scale * columns, atol=1e-4)


def test_losses():
    """Nothing at equal actions; a clipped float action only asks to be clipped; Q-values count like logits."""
    head = Head("box", low=(-1.0,), high=(1.0,))
    loss = loss_for(head, torch.zeros(1, 1))
    y = torch.tensor([[5.0], [0.5], [-2.0]])
    assert loss(y, torch.tensor([[1.5], [0.5], [-1.0]])).tolist() == [0, 0, 0]
    assert (loss(y, torch.tensor([[0.9], [0.6], [0.0]])) > 0).all()
    t = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    y = t + 0.1 * torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    plain, scaled = (
        loss_for(Head("discrete", nvec=(3,)), k * t)(k * y + s, k * t) for k, s in ((1, 0), (100.0, -500.0))
    )
    assert torch.allclose(plain, scaled, atol=1e-3) and (plain > 0).any()
    for head in (Head("multibinary", nvec=(1, 1, 1)), Head("multidiscrete", nvec=(1, 2)), None):
        loss = loss_for(head, t)
        assert loss(t, t).abs().max() < 1e-5 and loss(y, t).sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_error_falls(name):
    """Trained together at 3 bits, layers come closer to the float outputs on the calibration set."""
    floats, model, calib = nearest_quantized(name, "int3", "int4")
    with torch.no_grad():
        target = floats.module(calib.inputs)
        loss = loss_for(floats.module.head if isinstance(floats.module, Policy) else None, target)
        before = float(loss(model.module(calib.inputs), target).mean())
        report = distill.apply(model, calib, steps=150, rounds=2, lr=0.01)
        after = float(loss(model.module(calib.inputs), target).mean())
    assert report["loss_after"] <= report["loss_before"]
    assert after < 0.9 * before


def test_the_policy_acts():
    """It is trained on visits of the float policy, the start and the rounds, each round's in new episodes; what they
    earn is compared in others."""
    model = small_policies.cartpole()
    calib = small_policies.calib(model)
    asked = []

    def visit(m, n, seed):
        asked.append((n, seed))
        return visited_states(m, n, seed)

    calib.visit = visit
    recipe = uniform("int2", "int4", steps=(*RTN, ("distill", {"steps": 40, "rounds": 3, "states": 96})))
    done = quantize(model, recipe, calib)
    judged, trained = ([s for n, s in asked if n == k] for k in (1, 96))
    assert trained == [7, 7, 8, 9, 10] and len(judged) + len(trained) == len(asked)
    assert set(judged) == {1, 2, 3, 4, 5, 6}
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["states"] == 64 + 5 * 96
    scores = [
        np.concatenate([visited_states(m, 1, seed).returns.numpy() for seed in range(1, 7)]).mean()
        for m in (done, model)
    ]
    assert report["gain"] == pytest.approx(scores[0] - scores[1])
    again = quantize(model, recipe, calib)
    for a, b in zip(done.qlayers().values(), again.qlayers().values(), strict=True):
        assert torch.equal(a.q.codes, b.q.codes) and torch.equal(a.q.scale, b.q.scale) and a.act == b.act
        assert torch.equal(a.bias, b.bias)
    asked.clear()
    quantize(model, uniform("int2", "int4", steps=(*RTN, ("distill", {"steps": 4, "rounds": 1}))), calib)
    assert not asked


def test_laps():
    """Training goes on, each time on new visits, while the policy surely earns less than the float one and the loss
    falls by a twentieth."""
    model = small_policies.cartpole()
    asked: list[int] = []

    def report(bonus, laps):
        def visit(m, n, seed):
            found = visited_states(m, n, seed)
            if n == 96:
                asked.append(seed)
            is_float = all(layer.q is None for layer in m.qlayers().values())
            return found._replace(returns=found.returns + bonus * is_float)

        asked.clear()
        calib = small_policies.calib(model)
        calib.visit = visit
        options = {"steps": 60, "rounds": 3, "states": 96, "laps": laps, "lr": 0.02}
        return quantize(model, uniform("int2", "int4", steps=(*RTN, ("distill", options))), calib).meta["steps"][-1]

    for bonus, laps in ((-1000.0, 3), (1000.0, 1)):
        report(bonus, laps)
        assert asked == [7, 7, 8, 9, 10]
    once = report(1000.0, 2)["diagnostics"]
    assert asked == [7, 7, *range(8, 14)] and once["states"] == 64 + 8 * 96
    report(1000.0, 40)
    assert 14 <= asked[-1] < 130 and (asked[-1] - 7) % 3 == 0


def test_the_way_up():
    """Scales, biases and the input stage go where the return is greater, codes of weights stay; the budget ends it, and
    a model that never loses to the float policy is left as it is."""
    _, start, calib = nearest_quantized("policy", "int3", "int4")
    label = start.module
    with torch.no_grad():
        pool = Pool.of(calib.inputs, label)
        course = Course.of(start, pool, lambda x, y, t: y.sum(1), 8, calib.generator)
    last, played = list(start.qlayers())[-1], []
    first = start.qlayers()[last].bias.clone()

    def visit(model, n, seed, episodes=8):
        played.append(episodes * 5)
        reached = 0.0 if model == "float" else -float((model.qlayers()[last].bias - first - 1).square().sum())
        return Visits(torch.zeros(1), torch.full((episodes,), reached), torch.full((episodes,), 5))

    contest = Contest(visit, "float")
    assert contest.won(start)
    before, cost = float(contest.gains.mean()), 2 * DIRECTIONS * PLAYED * 5
    played.clear()
    best = uphill(course, contest, start, torch.Generator().manual_seed(0), 20 * cost)
    assert float(contest.gains.mean()) == pytest.approx(visit(best, 1, 1).returns.mean()) and best is not start
    assert float(contest.gains.mean()) > before + 0.1 * abs(before)
    assert len(played) - 1 <= 20 * (2 * DIRECTIONS + 6 * len(LENGTHS))
    for name, layer in best.qlayers().items():
        assert torch.equal(layer.q.codes, start.qlayers()[name].q.codes)
    played.clear()
    assert uphill(course, contest, best, torch.Generator(), 0) is best and not played
    contest.gains = torch.zeros(48)
    assert uphill(course, contest, best, torch.Generator(), cost) is best and not played


def test_visited_states_differ_from_evaluation():
    """Seeds of visits are far from those of evaluation and of calibration, and the same call gives the same states."""
    model = small_policies.cartpole()
    first, second, other = (visited_states(model, 50, seed).states.numpy() for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_threads_do_not_matter():
    """The same bits on one thread and on two; the number of threads is put back."""
    codes = []
    for threads in (1, 2):
        _, model, calib = nearest_quantized("policy")
        torch.set_num_threads(threads)
        distill.apply(model, calib, steps=20, rounds=1)
        assert torch.get_num_threads() == threads
        codes.append([(q.q.codes, q.q.scale, q.bias) for q in model.qlayers().values()])
    assert all(torch.equal(x, y) for a, b in zip(*codes, strict=True) for x, y in zip(a, b, strict=True))


def test_a_runaway_ends_where_it_began():
    """A learning rate beyond reason never makes the model worse than it was on held-out states."""
    _, model, calib = nearest_quantized("tanh_policy", "int8", "int8")
    expected = model.module(calib.inputs)
    report = distill.apply(model, calib, steps=10, rounds=1, lr=1e4)
    assert report["loss_after"] <= report["loss_before"]
    if report["round"] == 0:
        assert torch.equal(model.module(calib.inputs), expected)


def test_needs_weights():
    """Before any step that sets weights it says so."""
    model, calib = MODELS["policy"]()
    model.replace("net.0", QLayer(model.layers()["net.0"], make_plan("int4", "int4")))
    with pytest.raises(InputError, match=r"'net\.0' has no quantized weight yet"):
        distill.apply(model, calib)


@pytest.mark.parametrize("acts", ["int3", "e1m1"])
def test_input_grid(acts):
    """The loss falls, the float function stays, and without an input quantizer nothing is done."""
    model, calib = MODELS["tanh_policy"]()
    floats = model.copy()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", acts)))
    with torch.no_grad():
        assert input_grid.apply(model, calib) == {"loss_before": 0.0, "loss_after": 0.0}
        act_scales.apply(model, calib)
        report = input_grid.apply(model, calib, states=128)
        assert report["loss_after"] < 0.8 * report["loss_before"]
        first, *others = model.qlayers().values()
        for layer in others:
            layer.set_act(None)
        loss = loss_for(floats.module.head, target := floats.module(calib.inputs[:128]))
        found = float(loss(model.module(calib.inputs[:128]), target).mean())
        assert found == pytest.approx(report["loss_after"], rel=0.02)
        first.set_act(None)
        assert torch.allclose(model.module(calib.inputs), floats.module(calib.inputs), atol=1e-4)


def test_center_takes_the_mean_out():
    """Behind the stage every feature has mean zero, a constant one stays; unsigned formats start at zero."""
    for acts in ("int4", "uint4"):
        model, calib = MODELS["policy"]()
        inputs = calib.inputs.clone()
        inputs[:, 3] = 5.0
        calib = Calib(inputs)
        before = model.module.stage(inputs)
        model.replace("net.0", QLayer(model.layers()["net.0"], make_plan("int4", acts)))
        report = center.apply(model, calib)
        after = model.module.stage(inputs)
        assert report == {"shifted": 6.0, "outputs": 0.0}
        assert torch.allclose(after[:, 3], before[:, 3])
        rest = [0, 1, 2, 4, 5, 6]
        found = after.mean(dim=0)[rest] if acts == "int4" else after.amin(dim=0)[rest]
        assert found.abs().max() < 1e-5


def test_center_takes_the_mean_out_of_a_discrete_head():
    """Actions and differences between outputs stay, and the last layer's rows have mean zero in each part."""
    for kind, parts in (("discrete", (5,)), ("multidiscrete", (2, 1, 2))):
        net = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
        net[2].weight.data += 10.0
        policy = Policy(InputStage(), net, Head(kind, nvec=parts), (7,))
        model, inputs = Model(policy, torch.zeros(1, 7)), torch.randn(64, 7)
        for key, layer in list(model.layers().items()):
            model.replace(key, QLayer(layer, make_plan("int4", "int4")))
        with torch.no_grad():
            before = model.module(inputs).split(parts, 1)
            assert center.apply(model, Calib(inputs))["outputs"] == 5
            after = model.module(inputs).split(parts, 1)
        for a, b, rows in zip(before, after, model.layers()["net.2"].weight.split(parts), strict=True):
            assert torch.equal(a.argmax(1), b.argmax(1))
            if len(rows) > 1:
                assert torch.allclose(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), atol=1e-4)
                assert rows.mean(0).abs().max() < 1e-5
            else:
                assert torch.allclose(a, b, atol=1e-4)


def test_operands_are_trained():
    """A transformer's student starts as the quantized network, and the scales of its attention's operands move."""
    model, calib = attention()
    start = quantize(model, uniform("int4", "int4", steps=RTN), calib)
    pool = Pool.of(calib.inputs, start.module)
    student, _ = student_of(start.copy(), pool)
    expected = start.module(calib.inputs)
    assert (student(calib.inputs) - expected).abs().median() <= 1e-5 * expected.abs().max()
    steps = (*RTN, ("distill", {"steps": 60, "rounds": 1, "lr": 0.02}))
    done = quantize(model, uniform("int4", "int4", steps=steps), calib)
    before, after = ({n: point.act for n, point in m.points().items()} for m in (start, done))
    assert len(after) == 4 and {n: a.fmt for n, a in before.items()} == {n: a.fmt for n, a in after.items()}
    assert all(before[n].scale != after[n].scale for n in after)
    with torch.no_grad():
        target = model.module(calib.inputs)
        error = [float((m.module(calib.inputs) - target).square().mean()) for m in (start, done)]
    assert error[1] < error[0]


def test_judged_by_what_no_step_has_seen():
    """Without visits the steps before see seven eighths of the calibration set: the last is not their work, too."""
    model, calib = MODELS["mlp"]()
    steps = (("gptq", {}), ("distill", {"steps": 0, "rounds": 1}))
    done = quantize(model, uniform("int3", "int4", steps=steps), calib)
    alone = quantize(model, uniform("int3", "int4", steps=steps[:1]), calib.rest())
    assert all(
        torch.equal(a.q.codes, b.q.codes) and a.act == b.act
        for a, b in zip(done.qlayers().values(), alone.qlayers().values(), strict=True)
    )
    assert len(calib.rest().inputs) == int((~calib.held()).sum())


def test_a_network_ends_with_small_steps():
    """Where large steps only do harm, those at a tenth of the rate still bring a network nearer to its float one."""
    model, calib = MODELS["mlp"]()
    recipe = uniform("int8", "int8", steps=(("distill", {"steps": 200, "rounds": 3, "lr": 0.03, "batch": 32}),))
    found = quantize(model, recipe, calib).meta["steps"][-1]["diagnostics"]
    assert found["round"] == 3 and found["loss_after"] < found["loss_before"]


def test_several_rounds_of_a_network_begin_with_the_single_one(monkeypatch):
    """A fifteenth of the steps of several rounds, unmixed, gives the model of that many steps in one round."""

    def trained(**options):
        _, model, calib = nearest_quantized("mlp")
        report = distill.apply(model, calib, lr=0.01, batch=32, **options)
        assert report["round"] == 1
        return [(layer.q.codes, layer.q.scale, layer.bias, layer.act) for layer in model.qlayers().values()]

    alone = trained(steps=60, rounds=1)
    errors = iter([2.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(Course, "error", lambda *_: next(errors))
    for a, b in zip(alone, trained(steps=900, rounds=3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]


@pytest.mark.parametrize(("shape", "axes"), [((3, 9, 7), (1, 2)), ((4, 30), (1,)), ((30,), (0,))])
def test_mixtures_have_a_box_of_the_other(shape, axes):
    """What comes from the other input is a box at its place with all channels, of every size from nothing to all."""
    n = 400
    new = mixtures(torch.zeros(n, *shape).long(), torch.ones(n, *shape).long(), torch.Generator().manual_seed(5))
    assert new.shape == (n, *shape) and new.dtype == torch.int64
    starts = set()
    for one in new.numpy():
        runs = [one.any(axis=tuple(a for a in range(one.ndim) if a != axis)) for axis in axes]
        box = np.ones(shape, bool)
        for axis, run in zip(axes, runs, strict=True):
            assert (np.diff(np.flatnonzero(run)) == 1).all()
            box &= run.reshape([-1 if a == axis else 1 for a in range(one.ndim)])
        assert (one == box).all()
        starts.add(int(runs[0].argmax()))
    shares = new.double().flatten(1).mean(1)
    assert torch.allclose(
        shares.quantile(torch.tensor([0.25, 0.5, 0.75]).double()), torch.tensor([0.25, 0.5, 0.75]).double(), atol=0.08
    )
    assert len(starts) > shape[axes[0]] // 2


def test_mixtures_are_labelled_by_the_float_network():
    """Half of a batch is mixed and carries the labels of what it has become, the other half is as it was; held-out
    inputs are joined by mixtures of themselves alone until there are enough to judge by."""
    floats, _ = MODELS["mlp"]()
    label, g = floats.module, torch.Generator().manual_seed(0)
    x = torch.randn(9, *floats.example.shape[1:], generator=g)
    with torch.no_grad():
        mixed, target = half_mixed(x, label(x), label, g)
        assert torch.allclose(target, label(mixed), atol=1e-6)
        assert torch.equal(mixed[4:], x[4:]) and (mixed[:4] != x[:4]).flatten(1).any(1).sum() >= 2
        alone = half_mixed(x[:1], label(x[:1]), label, g)
        assert torch.equal(alone[0], x[:1])
        pool = Pool.of(torch.randn(80, *x.shape[1:], generator=g), label)
        more = pool.plus_mixtures(label, g)
        assert torch.equal(more.train, pool.train) and torch.equal(more.held[:10], pool.held)
        assert len(more.held) == JUDGES and torch.allclose(more.held_target, label(more.held), atol=1e-6)
        assert all(torch.isin(more.held[:, i], pool.held[:, i]).all() for i in range(x.shape[1]))
        assert more.plus_mixtures(label, g) is more


def test_few_inputs_are_not_learned_by_heart():
    """Trained equally long on a few images alone, a network stays farther from its float one on fresh images than with
    mixtures."""
    model, calib = MODELS["cnn"]()
    images, fresh = calib.inputs[:24], calib.inputs[24:]
    start = quantize(model, uniform("int3", "int4", steps=RTN), Calib(images))
    with torch.no_grad():
        pool, expected = Pool.of(images, model.module), model.module(fresh)
    loss = loss_for(None, expected)
    errors = []
    for label in (None, model.module):
        g = torch.Generator().manual_seed(0)
        (done,) = Course.of(start, pool, lambda x, y, t: loss(y, t), 16, g, label).rounds(400, 1, 0.02, 0.2)
        with torch.no_grad():
            errors.append(float(loss(done.module(fresh), expected).mean()))
    assert errors[1] < 0.9 * errors[0]
