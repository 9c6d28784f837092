"""The walk through a graph: what a site is given, and what waits in a file."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from laws_methods import wide_images
from tiny_models import SINGLES, attention, stream
from torch import nn

from quantkit import batches
from quantkit.capture import captured
from quantkit.model import Calib, Model, float_twin
from quantkit.observers import Sample, collect, thinned
from quantkit.qlayers import Point, QLayer
from quantkit.recipe import make_plan, parse_step, quantize, uniform
from quantkit.spool import Filed, Spool
from quantkit.walk import Site, rows, walk

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
    monkeypatch.setattr(batches, "PORTION", portion)
    monkeypatch.setattr(batches, "LARGE", 10**9)
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


@pytest.mark.parametrize("name", BUILDS)
def test_waiting_in_a_file_changes_nothing(name, monkeypatch):
    """Inputs, float inputs and outputs are the same bits, in the same order of memory, where everything is filed."""
    done, calib = quantized(name)
    found = []
    for large in (10**9, 1):
        monkeypatch.setattr(batches, "LARGE", large)
        sites = walk(done, calib, list(done.qlayers()), targets=True)
        found.append([[list(x) for x in (site.inputs, site.floats, site.targets)] for site in sites])
    filed = 0
    for memory, file in zip(*found, strict=True):
        for ours, theirs in zip(itertools.chain(*memory), itertools.chain(*file), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
            filed += ours.data_ptr() != theirs.data_ptr()
    assert filed


@pytest.mark.parametrize("name", BUILDS)
def test_a_full_disk_changes_nothing(name, monkeypatch):
    """Where nothing can be written, what waits does so in memory."""
    done, calib = quantized(name)

    def inputs() -> list[torch.Tensor]:
        return [joined(site.inputs) for site in walk(done, calib, list(done.qlayers()))]

    expected = inputs()
    monkeypatch.setattr(batches, "LARGE", 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", 0))
    assert all(map(torch.equal, inputs(), expected))


def test_places_in_the_file_are_used_again():
    """Whatever is put and let go, what is kept comes back as it was, strides too, and the file grows to the most
    that was kept at once.
    """
    spool, draw = Spool(), torch.Generator().manual_seed(0)
    kept: list[tuple[torch.Tensor, Filed]] = []
    for i in range(60):
        x = torch.randn(2, 3, 4, 5, generator=draw)
        dense = [x, x.to(memory_format=torch.channels_last), x.mT, x[1:]]
        x = [*dense, x[:, ::2], x[:, :, :1].expand(2, 3, 4, 5)][i % 6]
        kept.append((x, spool.put(x)))
        back = kept[-1][1].tensor()
        assert back.stride() == x.stride() if i % 6 < len(dense) else back.is_contiguous()
        if len(kept) > 7:
            kept.pop(int(torch.randint(8, (1,), generator=draw)))
        for before, filed in kept:
            assert torch.equal(filed.tensor(), before)
    assert spool.end <= 8 * 3 * 2 * 3 * 4 * 5 * 4


def test_what_is_not_finite_stays(monkeypatch):
    """An infinite or missing value reaches the observers that name it, filed or not."""
    monkeypatch.setattr(batches, "LARGE", 1)
    model, calib = stream()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", "int4")).eval())
    for bad in (float("inf"), float("nan")):
        inputs = calib.inputs.clone()
        inputs[3, 2] = bad
        site = next(walk(model, Calib(inputs), ["up"]))
        assert not joined(site.inputs).isfinite().all()


@pytest.mark.parametrize("step", ["gptq:act_order=true,drift=true", "adaround:steps=40", "rtn:scale=importance"])
@pytest.mark.parametrize("name", BUILDS)
def test_batches_of_calibration_do_not_matter(name, step):
    """Codes and scales are the same however the calibration set is cut into batches."""
    model, calib = BUILDS[name]()
    recipe = uniform("int3", "int4", steps=(("act_scales", {"scale": "output", "samples": 500}), parse_step(step)))
    done = [quantize(model, recipe, Calib(calib.inputs, batch=batch)) for batch in (512, 37, 5)]
    for other in done[1:]:
        for key, layer in done[0].quantizers().items():
            assert other.quantizers()[key].act == layer.act
            if isinstance(layer, QLayer):
                assert torch.equal(other.qlayers()[key].q.codes, layer.q.codes), key
                assert torch.equal(other.qlayers()[key].q.scale, layer.q.scale), key


@pytest.mark.parametrize("samples", [0, 100, 10**9])
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
def test_rows_do_not_depend_on_batches(name, samples, monkeypatch):
    """The rows looked at, how many come at a time and the targets beside them are those of one large batch."""
    model, calib = SINGLES[name]()
    model.replace("0", QLayer(model.layers()["0"], make_plan("int4", "int4")))
    layer = model.qlayers()["0"]
    monkeypatch.setattr("quantkit.walk.BLOCK", 256 * layer.weight[0].numel())
    sites = []
    for batch in (len(calib.inputs), 64, 7):
        inputs = calib.inputs.split(batch)
        sites.append(Site("0", layer, inputs, [layer(x) for x in inputs]))
    wanted, *others = ([(x.clone(), y.clone()) for x, y in rows(site, samples, targets=True)] for site in sites)
    every = set(map(tuple, layer.columns(calib.inputs)[0].tolist()))
    assert sum(x.shape[1] for x, _ in wanted) == min(samples or 10**9, layer.columns(calib.inputs).shape[1])
    for x, y in wanted:
        assert set(map(tuple, x[0].tolist())) <= every
        w = layer.weight.reshape(layer.groups, -1, x.shape[2])
        assert torch.allclose(torch.bmm(x, w.mT) + layer.bias.reshape(layer.groups, 1, -1), y, atol=1e-5)
    for found in others:
        for (x, y), (u, v) in zip(wanted, found, strict=True):
            assert torch.equal(x, u) and torch.allclose(y, v, atol=1e-6)


@pytest.mark.parametrize("limit", [10, 100, 5000])
def test_samples_do_not_depend_on_batches(limit):
    """What a sample keeps is the same for every cut, between half and all of what it may, and of every place."""
    x = torch.arange(3000 * 12.0).reshape(3000, 12)
    point = Point()
    kept = []
    for batch in (3000, 64, 1):
        sample = Sample(limit)
        for part in x.split(batch):
            sample(point, part)
        kept.append(sample.values()[:-2])
        assert limit // 2 <= len(kept[-1]) <= limit and (sample.low, sample.high) == (0, x.max())
    assert all(torch.equal(k, kept[0]) for k in kept)
    if limit == 5000:
        assert set((kept[0] % 12).tolist()) == set(range(12))


def test_thinned_is_nested():
    """What stays at a level stays at those below: one of every 2^level, of any range the part that lies in it."""
    for level in range(6):
        at = thinned(0, 4096, level)
        assert (at // 2**level).tolist() == list(range(4096 >> level))
        assert set(thinned(0, 4096, level + 1).tolist()) < set(at.tolist())
        assert thinned(1000, 1777, level).tolist() == [i for i in at.tolist() if 1000 <= i < 1777]
    assert len(thinned(5, 5, 3)) == 0


LAYERS = {
    "linear": (nn.Linear(13, 7), (13,)),
    "conv": (nn.Conv2d(3, 5, 3, padding=1, stride=2), (3, 9, 7)),
    "depthwise": (nn.Conv2d(5, 10, 3, groups=5, dilation=2), (5, 8, 9)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (6, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_counted_and_picked(name):
    """As many samples are foretold as `columns` makes, and those picked from float16 are the numbers it holds."""
    plain, size = LAYERS[name]
    layer, x = QLayer(plain, make_plan("int4", "float")), torch.randn(5, *size).half()
    every = layer.columns(x)
    assert layer.positions(x.shape) == every.shape[1]
    at = torch.tensor([0, 3, every.shape[1] - 1])
    assert torch.equal(layer.columns(x, at), every[:, at])
    y = plain(x.float()).detach().half()
    assert torch.equal(layer.output_rows(y, at), layer.output_rows(y.float())[:, at])
