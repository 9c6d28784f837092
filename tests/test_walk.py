"""The walk through a graph: what a site is given, and what waits in half precision."""

from __future__ import annotations

import pytest
import torch
from laws_methods import wide_images
from tiny_models import attention, stream

from quantkit import observers
from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.observers import collect, float_twin, walk
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform

BUILDS = {"attention": attention, "stream": stream, "images": wide_images}


def quantized(name):
    """A captured network, all of it at int4, and its calibration set in batches that do not divide it."""
    model, calib = BUILDS[name]()
    return quantize(captured(model), uniform("int4", "int4"), calib), Calib(calib.inputs, batch=37)


def seen(model: Model, calib: Calib) -> dict[str, torch.Tensor]:
    """Every layer's inputs in one plain pass."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in model.qlayers()}
    collect(model, calib, {name: lambda layer, x, name=name: found[name].append(x.clone()) for name in found})
    return {name: torch.cat(parts) for name, parts in found.items()}


def joined(parts) -> torch.Tensor:
    return torch.cat(list(parts))


@pytest.mark.parametrize("portion", [1, 10**9])
@pytest.mark.parametrize("name", BUILDS)
def test_sites_show_what_a_pass_shows(name, portion, monkeypatch):
    """Inputs, float inputs and float outputs are those of plain passes, also once the float outputs were looked at."""
    monkeypatch.setattr(observers, "PORTION", portion)
    done, calib = quantized(name)
    twin = float_twin(done)
    inputs, floats = seen(done, calib), seen(twin, calib)
    visited = []
    for site in walk(done, calib, list(done.qlayers()), targets=True):
        visited.append(site.name)
        assert torch.allclose(joined(site.inputs), inputs[site.name], rtol=1e-5, atol=1e-6)
        assert torch.allclose(joined(site.floats), floats[site.name], rtol=1e-5, atol=1e-6)
        expected = twin.qlayers()[site.name](floats[site.name])
        assert torch.allclose(joined(site.targets), expected, rtol=1e-4, atol=1e-5)
        assert len(site.inputs) == len(site.targets)
    assert sorted(visited) == sorted(done.qlayers())


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("name", BUILDS)
def test_half_precision_is_fine_enough(name, size, monkeypatch):
    """Where everything waits in half precision, values of any size stay right to 0.5 % of the largest, in float."""
    done, calib = quantized(name)
    done = float_twin(done)  # a step of a quantizer turns a small difference into a large one
    calib = Calib(calib.inputs * size, batch=37)
    exact = seen(done, calib)
    monkeypatch.setattr(observers, "LARGE", 1)
    for site in walk(done, calib, list(done.qlayers())):
        error = (joined(site.inputs) - exact[site.name]).abs().max()
        assert error <= 5e-3 * exact[site.name].abs().max()


def test_what_is_not_finite_stays(monkeypatch):
    """An infinite or missing value reaches the observers that name it, half precision or not."""
    monkeypatch.setattr(observers, "LARGE", 1)
    model, calib = stream()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", "int4")).eval())
    for bad in (float("inf"), float("nan")):
        inputs = calib.inputs.clone()
        inputs[3, 2] = bad
        site = next(walk(model, Calib(inputs), ["up"]))
        assert not joined(site.inputs).isfinite().all()


def test_presets_end_as_well(monkeypatch):
    """A network quantized with everything in half precision is as near to the float one as without."""
    model, calib = wide_images()
    errors = []
    for large in (2**22, 1):
        monkeypatch.setattr(observers, "LARGE", large)
        done = quantize(model, uniform("int4", "int4", steps=(("gptq", {"drift": True}),)), calib)
        with torch.no_grad():
            errors.append(float((done.module(calib.inputs) - model.module(calib.inputs)).square().mean()))
    assert errors[1] <= 1.1 * errors[0]
