"""Tequila and the training loop against their docstrings; gradients against formulas written out by hand."""

from __future__ import annotations

import pytest
import small_policies
import torch
from tiny_models import MODELS, single
from torch import nn

from hwmodel.formats import parse
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit.errors import InputError
from quantkit.methods import tequila
from quantkit.methods.tequila import Trainee, ternary
from quantkit.model import Calib, Model, Visits
from quantkit.qlayers import ActQuant, LayerPlan, QLayer
from quantkit.qtensor import dequantize, expand_scale, values_of
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.study import visited_states
from quantkit.training import Straight, cosine, train

GRANULARITIES = [PerTensor(), PerRow(), PerGroup(4), PerGroup(5)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trainee(granularity, quantizer="absmean", reactivate=0.3, columns=12, rows=5, seed=0, constant="lambda") -> Trainee:
    """A layer in training with a large lambda, so that C matters."""
    layer = nn.Linear(columns, rows)
    layer.weight.data, layer.bias.data = random(rows, columns, seed=seed), random(rows, seed=seed + 1)
    plan = LayerPlan(parse("ternary"), None, granularity)
    return Trainee(QLayer(layer, plan).eval(), quantizer, reactivate, constant)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quantizer", ["absmean", "absmedian", "twn"])
@pytest.mark.parametrize("reactivate", [0.0, 1e-3, 0.3])
def test_gradient(granularity, quantizer, reactivate):
    """A live weight has the gradient sum of G x, a dead one lambda sum of G besides; the bias sum of G."""
    part = trainee(granularity, quantizer, reactivate).double()
    x, G = random(7, 12, seed=3).double(), random(7, 5, seed=4).double()
    (part(x) * G).sum().backward()
    dead = part.codes()[0] == 0
    expected = G.T @ x + reactivate * G.sum(0)[:, None] * dead
    assert (part.w.grad - expected).abs().max() <= 1e-12
    assert (part.bias.grad - G.sum(0)).abs().max() <= 1e-12
    assert dead.any() and not dead.all()


def test_gradient_of_learned_scales():
    """Per scale LSQ's (t - w / a) inside and t outside, summed; w has a gradient inside only."""
    part = trainee(PerRow(), "lsq", 0.0).double()
    part.a.data *= 0.6
    G, x = random(7, 5, seed=4).double(), random(7, 12, seed=3).double()
    (part(x) * G).sum().backward()
    u, g = part.w.detach() / part.a.detach(), G.T @ x
    inside = u.abs() <= 1
    t = torch.where(u.abs() >= 0.5, u.sign(), 0.0)
    assert not inside.all() and torch.equal(t, part.codes()[0])
    assert (part.w.grad - g * inside).abs().max() <= 1e-12
    assert (part.a.grad - (g * (t - u * inside)).sum(1, keepdim=True)).abs().max() <= 1e-12


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quantizer", ["absmean", "twn", "lsq"])
@pytest.mark.parametrize("constant", ["mean", "error"])
def test_mean_inputs_stand_for_lambda(granularity, quantizer, constant):
    """C is the dead weights, or every weight's error, times the mean input; a dead w_ji has m_i sum of G besides x G.

    Of "error" the gradient is the straight-through estimator's alone, with LSQ the whole of G x besides.
    """
    part = trainee(granularity, quantizer, constant=constant).double()
    x, G = random(7, 12, seed=3).double() + 1, random(7, 5, seed=4).double()
    y = part(x)
    (y * G).sum().backward()
    t, a = (v.detach() for v in part.codes())
    w, q, m = part.w.detach(), t * expand_scale(a, 12, granularity), x.mean(0)
    missing = w - q if constant == "error" else w * (t == 0)
    assert (y - (x @ q.T + part.bias + missing @ m)).abs().max() <= 1e-12
    inside = torch.ones_like(w) if quantizer != "lsq" else (w.abs() <= expand_scale(a, 12, granularity)).double()
    expected = (G.T @ x) * inside
    if constant == "mean":
        expected = expected + G.sum(0)[:, None] * m * (t == 0)
    else:
        expected = expected + G.sum(0)[:, None] * m * (1 - inside)
    assert (part.w.grad - expected).abs().max() <= 1e-12


def test_the_mean_error_is_nothing():
    """With "error" the outputs over the batch that the mean is of are those of the float layer on average."""
    part, x = trainee(PerRow(), constant="error").double(), random(40, 12, seed=3).double() + 1
    y = x @ part.w.T + part.bias
    assert (part(x).mean(0) - y.mean(0)).abs().max() <= 1e-12 < 0.1 < (part(x) - y).abs().max()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("constant", ["mean", "error"])
def test_constants_of_any_layer(build, constant):
    """Of convolutions too, groups, strides and borders included, C is the mean output of what it stands for."""
    model, calib = build()
    for name, layer in list(model.layers().items()):
        model.replace(name, QLayer(layer, make_plan("ternary", "float")).eval())
    student, trainees = tequila._student(model, "twn", 1e-3, constant)
    seen = {}
    for name, part in trainees.items():
        part.register_forward_hook(lambda _, x, y, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        student.module(calib.inputs)
        for name, x in seen.items():
            part = trainees[name]
            t, a = part.codes()
            missing = part.w - t * expand_scale(a, t.shape[1], PerRow()) if constant == "error" else part.w * (t == 0)
            y = part.layer.product(x, missing.reshape(part.layer.weight.shape))
            want = y.movedim(part.layer.axis, -1).flatten(0, -2).mean(0)
            got = part.matrix_and_bias()[1] - part.bias
            assert (got - want).abs().max() <= 1e-5 * y.abs().max(), name


def test_bias_of_dead_weights_is_differentiable():
    """C alone passes gradcheck: no estimator is in it."""
    dead = ternary(random(4, 9).double(), PerRow())[0] == 0
    w = random(4, 9).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda w: 0.3 * (w * dead).sum(dim=1), w)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quantizer", ["absmean", "absmedian", "twn", "lsq"])
def test_codes(granularity, quantizer):
    """t is in {-1, 0, 1} and w >= D is live; -w gives -t, w times a power of two the same t and a times it."""
    w = random(6, 12)
    w[2] = 0
    t, a = ternary(w, granularity, quantizer)
    assert torch.isin(t, torch.tensor([-1.0, 0.0, 1.0])).all() and not t[2].any()
    assert (t * w >= 0).all()
    assert torch.equal(ternary(-w, granularity, quantizer)[0], -t)
    scaled = ternary(8 * w, granularity, quantizer)
    assert torch.equal(scaled[0], t) and torch.equal(scaled[1], 8 * a)
    live, dead = (w.abs()[2 != torch.arange(6)] * m[2 != torch.arange(6)] for m in (t.abs(), 1 - t.abs()))
    if granularity == PerTensor():
        assert dead.max() < live[live > 0].min()


def test_the_boundary_is_live():
    """|w| = D is live; a group of zeros is dead, with scale zero."""
    t, a = ternary(torch.tensor([[1.0, -0.5, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), PerRow())
    assert t.tolist() == [[1, -1, 1, 0], [0, 0, 0, 0]] and a.tolist() == [[1.0], [0.0]]


def test_dead_fraction_of_gaussian_weights():
    """erf(1 / (2 sqrt(pi))) = 31.0 % of Gaussian weights are dead under AbsMean."""
    assert float((ternary(random(500, 400), PerRow())[0] == 0).float().mean()) == pytest.approx(0.3100, abs=0.005)


def test_twn_is_the_best_scale():
    """TWN's a is the least-squares scale of its t."""
    w = random(5, 40)
    t, a = ternary(w, PerRow(), "twn")
    assert torch.allclose(a, (w * t).sum(1, keepdim=True) / t.abs().sum(1, keepdim=True))


def merged(part: Trainee) -> QLayer:
    """The layer that is left after training."""
    layer = QLayer(nn.Linear(part.layer.weight.shape[1], part.layer.weight.shape[0]), part.layer.plan).eval()
    layer.weight.data = part.layer.weight.data
    layer.set_act(part.layer.act)
    part.store(layer)
    return layer


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quantizer", ["absmean", "twn", "lsq"])
@pytest.mark.parametrize("act", [None, ActQuant(parse("int8"), 0.03)], ids=["float", "int8"])
def test_exact_merge(granularity, quantizer, act):
    """The merged layer gives the trained layer's outputs: bit for bit per group with float inputs, else to 1e-6 of
    the sum of magnitudes; weights are a t exactly, and C is the same constant for every input."""
    part = trainee(granularity, quantizer)
    part.layer.set_act(act)
    layer = merged(part)
    x = random(31, 12, seed=5)
    with torch.no_grad():
        got, wanted = layer(x), part(x)
        t, a = part.codes()
    if isinstance(granularity, PerGroup) and act is None:
        assert torch.equal(got, wanted)
    size = x.abs() @ dequantize(layer.q).abs().T + layer.bias.abs()
    assert ((got - wanted).abs() <= 1e-6 * size).all()
    assert torch.equal(dequantize(layer.q), t * expand_scale(a, 12, granularity)) and torch.equal(values_of(layer.q), t)
    extra = 0.3 * (part.w.detach() * (t == 0)).sum(1)
    assert torch.equal(layer.bias, part.bias.detach() + extra) and extra.abs().min() > 0


def test_wrong_merge_is_caught():
    """Sabotage: C put into the weights, a t + lambda w of the dead, is another network."""
    part = trainee(PerRow())
    layer, x = merged(part), random(31, 12, seed=5)
    with torch.no_grad():
        t, a = part.codes()
        wrong = nn.functional.linear(x, t * a + 0.3 * part.w * (t == 0), part.bias)
        assert (layer(x) - part(x)).abs().max() < 1e-5 < 0.1 < (wrong - part(x)).abs().max()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("constant", ["lambda", "mean", "error"])
def test_whole_networks_merge(build, constant):
    """Before a step is taken, the network of trainees and the merged one agree to 1e-5 of the largest output."""
    model, calib = build()
    for name, layer in list(model.layers().items()):
        model.replace(name, QLayer(layer, make_plan("ternary", "float")).eval())
    with torch.no_grad():
        student, trainees = tequila._student(model, "absmean", 0.3, constant)
        wanted = student.module(calib.inputs)
        got = tequila._merged(model, student, trainees).module(calib.inputs)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("acts", "constant"),
    [("float", "lambda"), ("int8", "lambda"), ("mxint8", "lambda"), ("int8", "mean"), ("int8", "error")],
)
def test_the_loss_falls(build, acts, constant):
    """Training brings the ternary network nearer to the float one, on every tiny network."""
    model, calib = build()
    step = ("tequila", {"steps": 150, "lr": 0.05, "constant": constant})
    done = quantize(model, uniform("ternary", acts, steps=(step,)), calib)
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["loss_after"] < 0.7 * report["loss_before"]
    assert 0 < report["dead_after"] < 0.6 and report["changed"] > 0 and report["bias_share"] > 0


def test_quantizers_and_granularities():
    """Each quantizer ends with codes of its own in the granularity asked for; lambda = 0 leaves no C."""
    model, calib = single(nn.Linear(12, 5))
    found = []
    for quantizer in ("absmean", "absmedian", "twn", "lsq"):
        step = ("tequila", {"steps": 30, "quantizer": quantizer, "reactivate": 0.0, "biases": False})
        done = quantize(model, uniform("int2n", "float", "group4", steps=(step,)), calib)
        layer = done.qlayers()["0"]
        assert layer.q.scale.shape == (5, 3) and torch.equal(layer.bias, model.layers()["0"].bias)
        assert done.meta["steps"][-1]["diagnostics"]["bias_share"] == 0
        found.append(dequantize(layer.q))
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_others_are_trained_on_request():
    """Layers left in float stay bit for bit, and with `others` they are trained and the end is nearer."""
    plan, losses = (("net.2", make_plan("ternary", "float")),), []
    for others in (False, True):
        model, calib = MODELS["tanh_policy"]()
        done = quantize(model, Recipe(plan, (("tequila", {"steps": 60, "others": others}),)), calib)
        assert torch.equal(done.layers()["net.0"].weight, model.layers()["net.0"].weight) is not others
        losses.append(done.meta["steps"][-1]["diagnostics"]["loss_after"])
    assert losses[1] < losses[0]


def test_a_policy_acts():
    """With `visit` the policy trained so far is asked for states, as a quantized model, once a round."""
    model = small_policies.cartpole()
    calib, asked = small_policies.calib(model), []

    def visit(m: Model, n: int, seed: int) -> Visits:
        asked.append((all(layer.q is not None for layer in m.qlayers().values()), n, seed))
        return visited_states(m, n, seed)

    calib.visit = visit
    step = ("tequila", {"steps": 30, "rounds": 3, "states": 64})
    done = quantize(model, uniform("ternary", "int8", steps=(step,)), calib)
    assert asked == [(True, 64, 1), (True, 64, 2), (True, 64, 3)]
    assert all(layer.q.fmt == parse("ternary") for layer in done.qlayers().values())


@pytest.mark.parametrize("distill", [1.0, 0.5, 0.0])
def test_language_models(distill):
    """On token ids: blocks become ternary, embedding and head stay, and both losses fall on the text trained on."""
    tiny_lm = pytest.importorskip("tiny_lm")
    module = tiny_lm.llama(layers=1, heads=2, kv_heads=1)
    ids = tiny_lm.tokens(24, 1).repeat(1, 9)  # one word again and again: there is something to learn
    step = ("tequila", {"steps": 40, "batch": 8, "lr": 0.05, "distill": distill})
    recipe = Recipe((("model.layers.*", make_plan("ternary", "float", "group4")),), (step,))
    done = quantize(Model(module, ids[:1]), recipe, Calib(ids, batch=8))
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["loss_after"] < (0.9 if distill == 1 else 1.0) * report["loss_before"]
    assert len(done.qlayers()) == 7 and done.module(ids[:3, :5]).shape == (3, 5, tiny_lm.VOCABULARY)
    assert torch.equal(done.layers()["lm_head"].weight, module.lm_head.weight)


@pytest.mark.parametrize("distill", [1.0, 0.0])
def test_answers_alone_count(distill):
    """With the tokens that end prompts and answers the loss is the mean over what the policy says, and of no other."""
    ids = torch.tensor([[4, 9, 7, 8, 1, 1], [5, 6, 4, 9, 3, 1]])
    said = [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4)]
    y, t = random(2, 6, 11), random(2, 6, 11, seed=1)
    loss = tequila._loss(Model(nn.Identity(), ids), t, ids, distill, (9, 1))
    each = []
    for row, at in said:
        p, q = t[row, at].softmax(0), y[row, at].log_softmax(0)
        each.append(float((p * (p.log() - q)).sum() if distill else -q[ids[row, at + 1]]))
    assert float(loss(y, t, ids)) == pytest.approx(sum(each) / len(said), rel=1e-5)
    other = y.clone()
    other[0, 0], other[0, 4:], other[1, :3], other[1, 5] = 3.0, -2.0, 5.0, 1.0
    other += random(2, 6, 1, seed=2)  # a constant of each position is none of a distribution
    assert float(loss(other, t, ids)) == pytest.approx(sum(each) / len(said), rel=1e-4)
    for bad in ((None, 1), (10, 1)):
        with pytest.raises(InputError, match="prompt"):
            tequila._loss(Model(nn.Identity(), ids), t, ids, distill, bad)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ("int4", {}, r"layer 'net\.0' is to be int4; accepted: ternary, int2n"),
        ("ternary", {"quantizer": "seq"}, r"quantizer='seq'; accepted: absmean, absmedian, twn, lsq"),
        ("ternary", {"constant": "sum"}, r"constant='sum'; accepted: lambda, mean, error"),
        ("ternary:group1", {}, r"layer 'net\.0' has scales in a format; accepted: tensor, row, group<size>"),
        ("ternary", {"steps": 0}, "steps, batch, rounds and states must be 1 or more"),
        ("ternary", {"distill": 0.5}, "which only a language model does"),
        ("ternary", {"prompt_end": 3}, "prompt_end is for language models"),
    ],
)
def test_bad_input(weights, options, message):
    """Another format, an unknown quantizer, no steps and next tokens of a policy are refused by name."""
    model, calib = MODELS["policy"]()
    with pytest.raises(InputError, match=message):
        weights, _, group = weights.partition(":")
        granularity = f"{group}:e8m0" if group else "row"
        quantize(model, uniform(weights, "float", granularity, steps=(("tequila", options),)), calib)


def test_straight_is_exact():
    """The forward value is the given one bit for bit, where the usual x + (v - x) is off."""
    x, v = random(2000), 0.37 * random(2000, seed=1).sign()
    assert torch.equal(Straight.apply(x, v), v) and not torch.equal(x + (v - x), v)


def test_loop():
    """Every pass takes each sample once, rates follow the schedule, and a run in two spans is the run in one."""
    seen, ends = [], []
    for spans in ([range(12)], [range(5), range(5, 12)]):
        w = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([w], lr=0.1)
        generator, losses = torch.Generator().manual_seed(1), []

        def loss(chosen: torch.Tensor, w: nn.Parameter = w) -> torch.Tensor:
            seen.append(chosen)
            return (w - torch.tensor([1.0, 2.0, 3.0])).square().sum()

        for span in spans:
            losses += train(
                loss, optimizer, span, total=12, samples=12, batch=4, generator=generator, schedule=cosine(0.2)
            )
        assert losses[-1] < losses[0] and len(losses) == 12
        ends.append(w.detach())
    assert torch.equal(*ends)
    for first in range(0, 12, 3):
        assert sorted(torch.cat(seen[first : first + 3]).tolist()) == list(range(12))


def test_loop_skips_what_is_not_finite():
    """A step with a NaN loss changes nothing and is counted; progress hears of every step."""
    w, heard = nn.Parameter(torch.ones(1)), []
    losses = train(
        lambda chosen: w.sum() * float("nan"),
        torch.optim.Adam([w], lr=1.0),
        range(3),
        total=3,
        samples=2,
        batch=5,
        generator=torch.Generator().manual_seed(0),
        progress=lambda done, of, value: heard.append((done, of)),
    )
    assert len(losses) == 3 and float(w.detach()) == 1.0 and heard == [(1, 3), (2, 3), (3, 3)]
