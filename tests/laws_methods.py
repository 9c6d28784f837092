"""What every method satisfies; methods are discovered, so a new file joins by existing."""

from __future__ import annotations

import copy
from types import ModuleType, SimpleNamespace

import pytest
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, SINGLES, attention, correlated, generator, single, stream
from torch import nn

from hwmodel import formats
from hwmodel.formats import levels
from quantkit import shelves
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.presets import PRESETS, preset_steps
from quantkit.qlayers import QLayer
from quantkit.qtensor import dequantize, values_of
from quantkit.recipe import Recipe, make_plan, quantize, step_options, uniform

METHODS = shelves.methods()
FAST = {
    "adaround": {"steps": 60},
    "distill": {"steps": 20, "rounds": 2},
    "tune": {"steps": 8},
    "tequila": {"steps": 20, "batch": 32},
    "ptq161": {"steps": 4},
}
BANDS = sorted(n for n, m in METHODS.items() if "bands" in m.CHANGES)  # for binary weights only
TRAINED = sorted(n for n, m in METHODS.items() if "trained" in m.CHANGES)  # for ternary weights only
WEIGHTS = sorted(n for n, m in METHODS.items() if "weights" in m.CHANGES and n not in TRAINED + BANDS)
FLOATS = sorted(n for n, m in METHODS.items() if "float" in m.CHANGES)
REFINED = sorted(n for n, m in METHODS.items() if "refined" in m.CHANGES)
BIASES = sorted(n for n, m in METHODS.items() if "bias" in m.CHANGES and n not in REFINED + TRAINED)
NEEDS = {"rotate": {"stream": stream}}  # methods that refuse any other network
ANYWHERE = [n for n in METHODS if n not in NEEDS]


def cases(names) -> dict:
    """Every method with every network, as arguments of `parametrize`."""
    found = {f"{n}-{k}": (n, build) for n in names for k, build in NEEDS.get(n, MODELS).items()}
    return {"argnames": ("name", "build"), "argvalues": list(found.values()), "ids": list(found)}


def options(name: str, **more) -> dict:
    """Options that keep the method fast, and those it shares with the law."""
    known = step_options(name)
    return {**FAST.get(name, {}), **{k: v for k, v in more.items() if k in known}}


def asked(name: str, weights: str = "int4") -> str:
    """The weight format, or the one that the method is for."""
    return "ternary" if name in TRAINED else "binary" if name in BANDS else weights


def recipe(name: str, weights: str = "int4", acts: str = "int8", granularity: str = "row", **more) -> Recipe:
    """The method's own step, after round-to-nearest if it corrects or refines what that leaves."""
    step = (name, options(name, **more))
    weights = asked(name, weights)
    before = (("act_scales", {}), ("rtn", {})) if name in BIASES + REFINED else ()
    return uniform(weights, acts, granularity, (*before, step))


def prepared(build, weights="int4", acts="int8", granularity="row") -> tuple[Model, Calib]:
    """The model with wrapped layers, nothing quantized."""
    model, calib = build()
    for name, layer in list(model.layers().items()):
        model.replace(name, QLayer(layer, make_plan(weights, acts, granularity)).eval())
    return model, calib


def before_step(name: str, model: Model, calib: Calib) -> None:
    """What a method may expect to have been done before it."""
    with torch.no_grad():
        if "weights" in METHODS[name].CHANGES:
            METHODS["act_scales"].apply(model, calib)
        if name in BIASES + REFINED:
            METHODS["act_scales"].apply(model, calib)
            METHODS["rtn"].apply(model, calib)


def facts(model: Model) -> dict[str, dict[str, object]]:
    """Everything a method could change, by what CHANGES calls it."""
    found: dict[str, dict[str, object]] = {"float": {}, "acts": {}, "weights": {}, "bias": {}}
    for name, tensor in model.module.state_dict().items():
        kind = "bias" if name.endswith(".bias") else "float"
        found[kind][name] = tensor.clone()
    for name, layer in model.qlayers().items():
        found["acts"][name] = layer.act
        found["weights"][name] = None if layer.q is None else (layer.q.codes.clone(), layer.q.scale.clone())
    found["acts"] |= {name: point.act for name, point in model.points().items()}
    return found


def same(a: object, b: object) -> bool:
    """Equal bit for bit."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def differences(a: dict, b: dict) -> list[str]:
    """Kinds of facts that differ."""
    return [
        kind for kind in a if a[kind].keys() != b[kind].keys() or not all(same(a[kind][n], b[kind][n]) for n in a[kind])
    ]


def check_changes(name: str, method: ModuleType | SimpleNamespace, build) -> None:
    """The law below, for a subject that need not be on the shelf."""
    model, calib = prepared(build, asked(name))
    before_step(name, model, calib)
    before = facts(model)
    inputs = calib.inputs.clone()
    method.apply(model, calib, **options(name))
    allowed = set(method.CHANGES) | ({"bias"} if "float" in method.CHANGES else set())
    if "refined" in method.CHANGES:
        allowed |= {"acts", "weights"}
        if isinstance(model.module, Policy):  # the input stage, and what undoes it in the first layer's float weight
            allowed |= {"float"}
    assert set(differences(before, facts(model))) <= allowed
    assert torch.equal(calib.inputs, inputs)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.module.modules())
    assert not any(m.training for m in model.module.modules())


@pytest.mark.parametrize(**cases(METHODS))
def test_only_what_changes_names(name, build):
    """What CHANGES does not name stays bit for bit (rescaling takes the bias along); no hook and no mode is left."""
    check_changes(name, METHODS[name], build)


@pytest.mark.parametrize(**cases(METHODS))
def test_deterministic_and_pure(name, build):
    """The same seed gives the same bits, and the model given to quantize stays as it was."""
    model, calib = build()
    before = copy.deepcopy(model.module.state_dict())
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first, second = (quantize(model, recipe(name), calib) for _ in range(2))
    assert not differences(facts(first), facts(second))
    assert first.meta["steps"] == second.meta["steps"]
    assert same(tuple(before.values()), tuple(model.module.state_dict().values()))
    assert not model.qlayers()
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def wide() -> tuple[Model, Calib]:
    """Layers of sizes at which torch and its libraries split sums among threads."""
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 190), nn.GELU(), nn.Linear(190, 7))
    inputs = correlated(4096, 64, seed=36)
    return Model(net, inputs[:1]), Calib(inputs, batch=2048)


def wide_images() -> tuple[Model, Calib]:
    """The same of convolutions, one of them depthwise."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.ReLU()),
        *(nn.Conv2d(48, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 9)),
    )
    inputs = torch.randn(90, 3, 24, 24, generator=generator(37))
    return Model(net, inputs[:1]), Calib(inputs, batch=40)


SPLIT = {
    **{"policy": MODELS["policy"], "mlp": MODELS["mlp"], "cnn": MODELS["cnn"], "attention": attention},
    **{"wide": wide, "wide images": wide_images, "wide attention": lambda: attention(128, 24, 100)},
}


def with_threads(threads: int, build, recipe: Recipe) -> tuple[dict, list]:
    """What a recipe makes of a fresh model while torch may use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(3)
        model, calib = build()
        done = quantize(model, recipe, calib)
        return facts(done), done.meta["steps"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("build", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("name", ANYWHERE)
def test_threads_change_nothing(name, build):
    """Codes, scales, biases and diagnostics are the same bytes on one thread and on two."""
    one, two = (with_threads(threads, build, recipe(name)) for threads in (1, 2))
    assert not differences(one[0], two[0])
    assert one[1] == two[1]


def test_one_thread():
    """Every step runs on one thread, as sums over 4,096 samples have other last bits on two."""
    model, calib = MODELS["policy"]()
    seen = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantize(model, recipe("gptq"), calib, lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen[:-1] and set(seen[:-1]) == {1}


@pytest.mark.parametrize("build", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("preset", PRESETS)
def test_threads_change_no_preset(preset, build):
    """The same of every preset, its training cut short."""
    steps = preset_steps(preset, "policy" if isinstance(build()[0].module, Policy) else "network")
    steps = tuple((name, {**given, **options(name)}) for name, given in steps)
    one, two = (with_threads(threads, build, uniform("int4", "int4", steps=steps)) for threads in (1, 2))
    assert not differences(one[0], two[0])


@pytest.mark.parametrize(**cases(METHODS))
def test_diagnostics_are_numbers(name, build):
    """apply returns finite floats by name."""
    report = [s for s in quantize(build()[0], recipe(name), build()[1]).meta["steps"] if s["name"] == name][-1]
    assert all(isinstance(v, float) and v == v and abs(v) < float("inf") for v in report["diagnostics"].values())


@pytest.mark.parametrize("granularity", ["tensor", "row", "group1"])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("name", WEIGHTS + REFINED)
def test_codes_in_range(name, weights, granularity):
    """Every weight is a value of its format, at a finite positive scale, in every granularity."""
    build = MODELS["cnn"] if granularity != "group1" else MODELS["mlp"]
    model = quantize(build()[0], recipe(name, weights, granularity=granularity, steps=8), build()[1])
    for layer in model.qlayers().values():
        values = torch.tensor(levels(formats.parse(weights)))
        assert torch.isin(values_of(layer.q), values).all()
        assert (layer.q.scale > 0).all() and layer.q.scale.isfinite().all()
        assert layer.q.shape == tuple(layer.weight.shape)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_groups(name, act_order):
    """Scales per group have one entry per group of inputs."""
    model, calib = single(nn.Linear(12, 5))
    done = quantize(model, recipe(name, "int3", "float", "group4", act_order=act_order), calib)
    layer = done.qlayers()["0"]
    assert layer.q.scale.shape == (5, 3)
    assert error_of(done, model, calib) < 0.3


@pytest.mark.parametrize("name", ANYWHERE)
def test_planned_layers_only(name):
    """Layers without a plan keep their class and weights; an already quantized layer keeps its codes."""
    model, calib = MODELS["tanh_policy"]()
    plan = ((("net.2"), make_plan(asked(name), "int8")),)
    done = quantize(model, Recipe(plan, recipe(name).steps), calib)
    assert type(done.layers()["net.0"]) is nn.Linear and type(done.layers()["net.4"]) is nn.Linear
    assert torch.equal(done.layers()["net.0"].weight, model.layers()["net.0"].weight)
    if name in WEIGHTS + TRAINED + BANDS:
        model, calib = prepared(MODELS["policy"])
        before_step(name, model, calib)
        METHODS["rtn"].apply(model, calib)
        before = facts(model)
        METHODS[name].apply(model, calib, **options(name))
        assert not differences(before, facts(model))


@pytest.mark.parametrize("name", METHODS)
def test_not_a_number(name):
    """A weight that is not finite raises InputError naming the layer and the index."""
    model, calib = MODELS["mlp"]()
    model.module.middle.weight.data[4, 2] = float("nan")
    with pytest.raises(InputError, match=r"layer 'middle': weight is nan in channel 4, first at index \(4, 2\)"):
        quantize(model, recipe(name), calib)


def odd(kind: str) -> tuple[Model, Calib]:
    """Networks at the edge of arithmetic."""
    model, calib = MODELS["policy"]()
    first, second = model.module.net[0], model.module.net[2]
    if kind == "zero channel":
        first.weight.data[3] = 0
        first.bias.data[3] = 0
        second.weight.data[:, 5] = 0
        second.weight.data[2] = 0
    elif kind == "zero layer":
        second.weight.data.zero_()
        second.bias.data.zero_()
    elif kind == "huge":
        first.weight.data *= 1e12
    elif kind == "tiny":
        first.weight.data *= 1e-12
        first.bias.data *= 1e-12
    elif kind == "huge channel":
        first.weight.data[1] *= 1e6
    elif kind == "few samples":
        calib = Calib(calib.inputs[:2])
    elif kind == "constant input":
        calib = Calib(calib.inputs[:1].expand(50, -1).clone())
    return model, calib


KINDS = ["zero channel", "zero layer", "huge", "tiny", "huge channel", "few samples", "constant input"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANYWHERE)
def test_survives(name, kind):
    """Zero channels, huge and tiny scales and degenerate calibration end in a finite network."""
    model, calib = odd(kind)
    done = quantize(model, recipe(name, "e2m1"), calib)
    with torch.no_grad():
        assert done.module(calib.inputs).isfinite().all()
    for layer in done.qlayers().values():
        assert dequantize(layer.q).isfinite().all()
        if kind == "zero layer" and layer is done.qlayers()["net.2"]:
            assert not dequantize(layer.q).any()


def error_of(done: Model, model: Model, calib: Calib) -> float:
    """Mean squared output error over the mean square of the output."""
    with torch.no_grad():
        reference = model.module(calib.inputs).double()
        return float((done.module(calib.inputs) - reference).square().mean() / reference.square().mean())


def check_float(method, build, **more) -> None:
    """The law below, for a subject that need not be on the shelf."""
    model, calib = prepared(build)
    with torch.no_grad():
        before = model.module(calib.inputs)
        method.apply(model, calib, **more)
        after = model.module(calib.inputs)
    if isinstance(model.module, Policy) and model.module.head.kind == "discrete":
        before, after = (y - y.mean(dim=1, keepdim=True) for y in (before, after))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize(**cases(FLOATS))
def test_function_is_preserved(name, build):
    """A float method leaves the output of the float network as it was, up to what no argmax depends on."""
    check_float(METHODS[name], build)


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_refuses(name, build):
    """A method that cannot help a network says so in one line and has changed nothing."""
    model, calib = prepared(build)
    before = facts(model)
    with pytest.raises(InputError, match=rf"^step '{name}': nothing in this network [^\n]*$"):
        METHODS[name].apply(model, calib)
    assert not differences(before, facts(model))


@pytest.mark.parametrize("scale", ["absmax", "mse", "importance"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("weights", ["int4", "int3", "e2m1", "e3m0", "ternary"])
@pytest.mark.parametrize("build", SINGLES.values(), ids=SINGLES)
@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "rtn"])
def test_not_worse_than_nearest(name, build, weights, granularity, scale):
    """With the same scale rule, a layer's output error on the calibration set is at most round-to-nearest's."""
    model, calib = build()
    plain = quantize(model, recipe("rtn", weights, "float", granularity, scale=scale), calib)
    done = quantize(model, recipe(name, weights, "float", granularity, scale=scale), calib)
    assert error_of(done, model, calib) <= error_of(plain, model, calib) * (1 + 1e-4)


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "rtn"])
def test_better_than_nearest(name):
    """On a wider layer with correlated inputs the error falls by a quarter at least."""
    model, calib = single(nn.Linear(40, 30))
    plain = quantize(model, recipe("rtn", "int3", "float", scale="mse"), calib)
    done = quantize(model, uniform("int3", "float", steps=((name, {"scale": "mse"}),)), calib)
    assert error_of(done, model, calib) <= 0.75 * error_of(plain, model, calib)


@pytest.mark.parametrize("weights", ["int3", "e2m1"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", BIASES)
def test_mean_error_is_not_larger(name, build, weights):
    """After a bias method the mean error of every output over the calibration set is not larger."""
    model, calib = build()
    plain = quantize(model, recipe("rtn", weights, "int4"), calib)
    done = quantize(model, recipe(name, weights, "int4"), calib)
    with torch.no_grad():
        reference = model.module(calib.inputs).double()
        before = (plain.module(calib.inputs) - reference).mean(dim=0).abs()
        after = (done.module(calib.inputs) - reference).mean(dim=0).abs()
    assert (after <= before + 1e-5 * reference.abs().max()).all()


@pytest.mark.parametrize("weights", ["int3", "e2m1", "ternary"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", REFINED)
def test_refining_never_loses(name, build, weights):
    """A refining method keeps formats and granularity, and its held-out loss never ends above where it began."""
    model, calib = build()
    plain = quantize(model, recipe("rtn", weights, "int4"), calib)
    done = quantize(model, recipe(name, weights, "int4"), calib)
    report = next(s for s in done.meta["steps"] if s["name"] == name)["diagnostics"]
    assert report["loss_after"] <= report["loss_before"]
    for a, b in zip(plain.qlayers().values(), done.qlayers().values(), strict=True):
        assert (a.q.fmt, a.q.granularity, a.q.shape, a.act.fmt) == (b.q.fmt, b.q.granularity, b.q.shape, b.act.fmt)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("man", [1, 2, 4])
@pytest.mark.parametrize("build", [MODELS["policy"], MODELS["cnn"]], ids=["policy", "cnn"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_e1_equals_the_narrow_integer(name, build, man, scale):
    """E1My gives, bit for bit, the network of the narrow integer of y + 2 bits under the same threshold rule."""
    model, calib = build()
    done = [
        quantize(model, recipe(name, weights, "float", scale=scale), calib)
        for weights in (f"e1m{man}", f"int{man + 2}n")
    ]
    for a, b in zip(*(m.qlayers().values() for m in done), strict=True):
        assert torch.equal(dequantize(a.q), dequantize(b.q))


def test_sabotage():
    """The laws can fail: methods that touch, forget or distort what they should not are caught."""

    def touch_bias(model, calib):
        METHODS["rtn"].apply(model, calib)
        next(iter(model.qlayers().values())).bias.data += 1e-3
        return {}

    def leave_hook(model, calib):
        model.module.register_forward_pre_hook(lambda module, args: None)
        return {}

    def distort(model, calib):
        next(iter(model.qlayers().values())).scale_input(torch.full((7,), 2.0))
        next(iter(model.qlayers().values())).in_scale *= 1.01
        return {}

    weights = frozenset({"weights"})
    for bad in (touch_bias, leave_hook):
        with pytest.raises(AssertionError):
            check_changes("rtn", SimpleNamespace(CHANGES=weights, apply=bad), MODELS["policy"])
    with pytest.raises(AssertionError):
        check_float(SimpleNamespace(apply=distort), MODELS["policy"])
