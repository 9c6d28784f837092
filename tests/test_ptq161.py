"""PTQ1.61 and its storage: closed forms, blocks, what training moves, bits and bytes, exports."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, SINGLES, generator, single
from torch import nn

from quantkit.artifact import load_artifact, save_artifact
from quantkit.bands import Bands, dense, from_arrays, product, stored_bits, to_arrays
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.export import export_onnx
from quantkit.graph_blocks import Flow, blocks_of
from quantkit.methods import ptq161
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rtl_export import network_of
from quantkit.specs import bits_per_weight, layer_specs

FAST = {"steps": 15, "batch": 32}


def binary(model: Model, calib: Calib, acts: str = "float", **options) -> Model:
    """The model with every layer in bands."""
    return quantize(model, uniform("binary", acts, steps=(("ptq161", {**FAST, **options}),)), calib)


def matrix(n: int = 7, m: int = 31, seed: int = 3) -> torch.Tensor:
    """Rows of unequal size and mean, with some exact zeros and one row of them."""
    g = generator(seed)
    w = torch.randn(n, m, generator=g) * torch.exp(torch.randn(n, 1, generator=g)) + 0.3 * torch.randn(
        n, 1, generator=g
    )
    w[:, 4] = 0
    w[2] = 0
    return w


def salient(m: int = 31) -> torch.Tensor:
    """Every fifth column from the second."""
    return torch.arange(m) % 5 == 1


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest number of bfloat16, ties to even, by its bits."""
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def rtn4(w: np.ndarray) -> np.ndarray:
    """The paper's round to nearest on 16 levels, row by row in a loop, scale in bfloat16."""
    out = np.empty_like(w)
    for j, row in enumerate(w):
        low, high = min(row.min(), 0), max(row.max(), 0)
        if low == high:
            low, high = -1.0, 1.0
        scale = bf16(np.array([(high - low) / 15]))[0]
        zero = np.rint(np.float32(-low) / scale)
        out[j] = scale * (np.clip(np.rint(row / scale) + zero, 0, 15) - zero)
    return out


@pytest.mark.parametrize("m", [5, 31, 64, 103])
def test_mask_counts_one_more_than_the_ratio(m):
    """int(ratio m) + 1 columns are salient, those of the largest scores, then of the second; 0 is none and 1 is all."""
    score = torch.rand(m, generator=generator(1)) + 0.1
    for ratio in (0.1, 0.2, 0.55):
        chosen = ptq161.mask(score, ratio)
        assert int(chosen.sum()) == int(ratio * m) + 1
        assert score[chosen].min() > score[~chosen].max()
    assert not ptq161.mask(score, 0.0).any() and ptq161.mask(score, 1.0).all()
    assert torch.equal(ptq161.mask(torch.ones(m), 0.2, score), ptq161.mask(score, 0.2))
    assert ptq161.mask(torch.ones(m), 0.2).nonzero().flatten().tolist() == list(range(int(0.2 * m) + 1))


def test_start_is_the_closed_form():
    """Before training, weights equal the paper's formula, written out weight by weight."""
    w, s = matrix(), salient()
    got = dense(ptq161.start(w, s)).numpy()
    expected = rtn4(w.numpy())
    for j, row in enumerate(w.double().numpy()):
        rest = row[~s.numpy()]
        nonzero = rest[rest != 0]
        mu, size = (nonzero.mean(), np.abs(nonzero).mean()) if len(nonzero) else (0.0, 0.0)
        expected[j, ~s.numpy()] = [size * (1 if v >= np.float32(mu) else -1) + mu for v in rest]
    np.testing.assert_array_equal(got[:, s.numpy()], expected[:, s.numpy()])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_range_of_the_salient_columns_only():
    """With high="salient" the 4-bit band is round to nearest of these columns alone."""
    w, s = matrix(), salient()
    got = dense(ptq161.start(w, s, "salient"))[:, s]
    np.testing.assert_array_equal(got.numpy(), rtn4(w[:, s].numpy()))


@pytest.mark.parametrize("kind", ["none", "all", "some"])
def test_folded_equals_dense(kind):
    """The product of codes, as a kernel sums it, equals the product with the dense weight, for every kind of mask."""
    w, g = matrix(), generator(9)
    s = {"none": torch.zeros(31, dtype=torch.bool), "all": torch.ones(31, dtype=torch.bool), "some": salient()}[kind]
    q = ptq161.start(w, s)
    q = Bands(s, q.codes, q.scale, q.zero, q.signs, q.a * 1.3, q.b * 0.7, torch.randn(31, generator=g), q.shape)
    x = torch.randn(5, 3, 31, generator=g)
    expected = x.double() @ dense(q).double().T
    torch.testing.assert_close(product(q, x).double(), expected, rtol=1e-5, atol=1e-5)
    assert dense(ptq161.start(w, s))[2].abs().max() == 0, "a row of zeros stays one"


def test_training_moves_scales_only():
    """Signs, mask and 4-bit codes are those before training; s, r1 and r2 are all that learns."""
    model, calib = single(nn.Linear(40, 30))
    before, after = (binary(model, calib, steps=n).qlayers()["0"].q for n in (0, 60))
    for name in ("salient", "codes", "scale", "zero", "signs"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    for name in "abc":
        assert not torch.equal(getattr(before, name), getattr(after, name)), name
    part = ptq161.Scaled(QLayer(nn.Linear(31, 7), make_plan("binary", "float")), ptq161.start(matrix(), salient()))
    assert sorted(name for name, _ in part.named_parameters(recurse=False)) == ["r1", "r2", "s"]
    assert torch.equal(part.weight(), dense(part.first))


def test_loss_falls():
    """On one block the loss falls by a fifth, and the output error with it."""
    model, calib = single(nn.Linear(40, 30))
    model.module.requires_grad_(False)
    done = binary(model, calib, steps=200)
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["loss_after"] < report["loss_before"] * 0.8 and report["kept"] == 0

    def error(m: Model) -> float:
        return float(F.mse_loss(m.module(calib.inputs), model.module(calib.inputs)))

    assert error(done) < error(binary(model, calib, steps=0))


def test_what_training_makes_worse_is_not_kept():
    """With an absurd learning rate the block ends as it began, and says so."""
    model, calib = single(nn.Linear(40, 30))
    done, first = binary(model, calib, lr=1e4, lr_s=1e4), binary(model, calib, steps=0)
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["kept"] == 1 and report["loss_after"] == report["loss_before"]
    assert torch.equal(dense(done.qlayers()["0"].q), dense(first.qlayers()["0"].q))


def test_objective_is_the_formula():
    """MSE over entries less the log of the magnitude of the mean cosine; zero for equal outputs."""
    g = generator(5)
    y, t = torch.randn(3, 4, 6, generator=g), torch.randn(3, 4, 6, generator=g)
    a, b = y.double().numpy().reshape(-1, 6), t.double().numpy().reshape(-1, 6)
    cosines = [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(a, b, strict=True)]
    expected = ((a - b) ** 2).mean() - np.log(abs(np.mean(cosines)))
    assert float(ptq161.objective(y, t)) == pytest.approx(expected, rel=1e-5)
    assert float(ptq161.objective(y, t, angular=False)) == pytest.approx(((a - b) ** 2).mean(), rel=1e-6)
    assert float(ptq161.objective(y, y)) == pytest.approx(0, abs=1e-6)


def test_both_references_block_by_block():
    """Layer by layer, the losses are those of X through float layers and Xq through quantized ones, done by hand."""
    model, calib = MODELS["policy"]()
    model.module.requires_grad_(False)
    done = binary(model, calib, steps=0, blocks="layer", batch=1000)
    x = xq = model.module.stage(calib.inputs)
    total = 0.0
    for number in (0, 2, 4):
        plain, q = model.module.net[number], done.module.net[number]
        full, fq = plain(x), plain(xq)
        w = dense(ptq161.start(plain.weight.detach(), q.q.salient))
        y = F.linear(xq, w, plain.bias)
        total += float(ptq161.objective(y, full) + ptq161.objective(y, fq))
        score = x.abs().amax(0)
        assert score[q.q.salient].min() >= score[~q.q.salient].max()
        x, xq = F.relu(full), F.relu(q(xq))
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["blocks"] == 3
    assert report["loss_before"] == pytest.approx(total / 3, rel=1e-4)


def test_mean_score():
    """score="mean" takes the columns of largest mean magnitude, where a rare large input does not count."""
    layer = nn.Linear(10, 4)
    x = torch.ones(100, 10) * torch.arange(10.0)
    x[3, 0] = 50.0
    model = Model(nn.Sequential(layer), x[:2])
    for score, expected in (("max", [0, 8, 9]), ("mean", [7, 8, 9])):
        q = binary(model, Calib(x), score=score, steps=0).qlayers()["0"].q
        assert q.salient.nonzero().flatten().tolist() == expected


def test_decoder_layers_are_blocks():
    """A language model is quantized decoder layer by decoder layer, what they share included in none; the head last."""
    tiny_lm = pytest.importorskip("tiny_lm")
    ids = tiny_lm.tokens(6, 12)
    model = Model(tiny_lm.llama(), ids[:1])
    graph = captured(model).module.graph
    names = [n for n in captured(model).layers() if n != "model.embed_tokens"]
    blocks = list(blocks_of(graph, names, "auto"))
    assert [len(b.names) for b in blocks] == [7, 7, 1]
    assert [{n.split(".mlp")[0].split(".self")[0] for n in b.names} for b in blocks] == [
        {"model.layers.0"},
        {"model.layers.1"},
        {"lm_head"},
    ]
    assert [b.end.target for b in blocks[:2]] == [torch.ops.aten.add.Tensor] * 2, "blocks end in residual sums"
    assert len(list(blocks_of(graph, names, "network"))) == 1
    run = [n for b in blocks for n in (*b.before, *b.nodes)]
    assert run == list(graph.nodes)[: len(run)] and run[-1].target == "lm_head"
    plan = (("model.layers.*", make_plan("binary", "float")),)
    done = quantize(model, Recipe(plan, (("ptq161", {"steps": 5, "batch": 2}),)), Calib(ids, 2))
    assert type(done.layers()["lm_head"]) is nn.Linear
    assert done.module(tiny_lm.tokens(2, 9)).isfinite().all()
    assert done.meta["steps"][-1]["diagnostics"]["blocks"] == 2


def test_first_block_of_an_identity_quantizer_has_no_loss():
    """Float and quantized networks send the same through the first block: the trap of the released code."""
    tiny_lm = pytest.importorskip("tiny_lm")
    ids = tiny_lm.tokens(4, 9)
    model = captured(Model(tiny_lm.llama(), ids[:1]))
    twin, names = model.copy(), [n for n in model.layers() if ".layers." in n]
    first = next(blocks_of(model.module.graph, names, "auto"))
    a, b = (Flow(model.module.graph, m.module, (ids,)) for m in (model, twin))
    a.advance(first.before)
    b.advance(first.before)
    (y,), (z,) = a.outputs(first), b.outputs(first, a.values)
    assert torch.equal(y, z) and float(ptq161.objective(y, z)) == pytest.approx(0, abs=1e-6)
    a.advance(first.nodes)
    assert torch.equal(a.values[0][first.end.name], y)


def test_repair_lowers_the_loss_and_is_merged():
    """With repair the loss on the calibration text falls, and the second pass starts from the merged weights."""
    tiny_lm = pytest.importorskip("tiny_lm")
    ids = tiny_lm.tokens(8, 12)
    model = Model(tiny_lm.llama(), ids[:1])
    plan = (("model.layers.*", make_plan("binary", "float")),)
    step = ("ptq161", {"steps": 2, "batch": 4, "repair": 30, "rank": 4, "lr_repair": 1e-2})
    done, again = (quantize(model, Recipe(plan, (step,)), Calib(ids, 4)) for _ in range(2))
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["repair_after"] < report["repair_before"]
    layer, plain = done.qlayers()["model.layers.0.mlp.up_proj"], model.module.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.weight, plain.weight)
    spared = done.qlayers()["model.layers.0.self_attn.o_proj"]
    assert torch.unique(spared.weight[3, ~spared.q.salient]).numel() < 48, "what is spared is what the first pass left"
    for name, layer in done.qlayers().items():
        assert torch.equal(layer.effective_weight(), again.qlayers()[name].effective_weight())
    policy, calib = MODELS["policy"]()
    report = binary(policy, calib, repair=40, lr_repair=1e-2).meta["steps"][-1]["diagnostics"]
    assert report["repair_after"] < report["repair_before"]


@pytest.mark.parametrize("acts", ["float", "int8"])
@pytest.mark.parametrize("build", [*MODELS.values(), SINGLES["grouped"]], ids=[*MODELS, "grouped"])
def test_any_network(build, acts):
    """Policies, images, grouped convolutions and quantized inputs: trained no worse than untrained, all finite."""
    model, calib = build()
    done = binary(model, calib, acts)
    report = done.meta["steps"][-1]["diagnostics"]
    assert report["loss_after"] <= report["loss_before"]
    assert done.module(calib.inputs).isfinite().all()
    assert all(isinstance(layer.q, Bands) for layer in done.qlayers().values())
    assert bits_per_weight(done) == pytest.approx(report["bits_per_weight"], abs=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "exact", "nominal", "unfolded"),
    [
        (4096, 4096, 1.617, 1.617, 1.621),
        (11008, 4096, 1.615, 1.614, 1.618),
        (4096, 11008, 1.609, 1.609, 1.610),
        (2048, 2048, 1.634, 1.634, 1.642),
        (1024, 1024, 1.668, 1.667, 1.683),
        (256, 256, 1.879, 1.870, 1.932),
        (64, 64, 2.688, 2.678, 2.928),
    ],
)
def test_bits_formula(n, m, exact, nominal, unfolded):
    """Stored bits per weight are those computed for the paper's method, scales, zeros and mask included."""
    assert stored_bits(n, m, int(0.2 * m) + 1) / (n * m) == pytest.approx(exact, abs=6e-4)
    extra = stored_bits(n, m, 0) / (n * m) - 1
    assert 1.6 + extra == pytest.approx(nominal, abs=6e-4)
    assert 1.6 + extra + 16 / m == pytest.approx(unfolded, abs=6e-4)


def test_bytes_on_disk(tmp_path):
    """What the directory holds for a layer is its bits, and it is read back bit for bit."""
    model, calib = single(nn.Linear(64, 64))
    model.meta["factory"] = "test_ptq161:factory"
    done = binary(model, calib)
    q = done.qlayers()["0"].q
    assert sum(a.nbytes for a in to_arrays(q).values()) * 8 == q.bits == stored_bits(64, 64, 13)
    back = from_arrays(to_arrays(q), (64, 64))
    assert all(torch.equal(getattr(q, name), getattr(back, name)) for name in to_arrays(q))
    save_artifact(done, tmp_path / "q")
    size = (tmp_path / "q" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "q" / "model.safetensors").read_bytes()[:8], "little")
    assert size - 8 - header == q.bits // 8 + 64 * 4, "the bands and a float32 bias, nothing else"
    loaded = load_artifact(tmp_path / "q", factory="test_ptq161:factory")
    assert torch.equal(loaded.module(calib.inputs), done.module(calib.inputs))
    summary = json.loads((tmp_path / "q" / "quantkit.json").read_text())["summary"]
    assert summary["layers"][0]["weight"] == "int4+binary"
    assert summary["bits_per_weight"] == round(q.bits / 64**2, 4)


def factory() -> nn.Module:
    """What `test_bytes_on_disk` rebuilds."""
    return nn.Sequential(nn.Linear(64, 64))


def test_odd_sizes_and_damage(tmp_path):
    """Odd numbers of codes and bits come back; arrays of another size or not finite are refused."""
    q = ptq161.start(matrix(), salient())
    q = ptq161.Scaled(QLayer(nn.Linear(31, 7), make_plan("binary", "float")), q).bands()
    arrays = to_arrays(q)
    back = from_arrays(arrays, (7, 31))
    assert torch.equal(dense(back), dense(q))
    for name, bad in (("codes", arrays["codes"][:-1]), ("signs", arrays["signs"][:-1]), ("a", arrays["a"][:-1])):
        with pytest.raises(ValueError, match=name):
            from_arrays({**arrays, name: bad}, (7, 31))
    with pytest.raises(ValueError, match="c is not finite"):
        from_arrays({**arrays, "c": np.full_like(arrays["c"], 0x7F80)}, (7, 31))


def test_two_specs_a_layer():
    """The cost model sees a 4-bit and a 1-bit band of columns for each layer."""
    model, calib = MODELS["policy"]()
    done = binary(model, calib, "int8")
    specs = {s.name: s for s in layer_specs(done)}
    for name, layer in done.qlayers().items():
        high, low = specs[f"{name}.salient"], specs[f"{name}.rest"]
        assert (str(high.weight), str(low.weight)) == ("uint4", "binary")
        assert high.in_features == int(layer.q.salient.sum())
        assert high.in_features + low.in_features == layer.weight.shape[1]


def test_exports(tmp_path):
    """qdq holds the weight dense and computes the same; other targets, hardware and distillation refuse in a line."""
    model, calib = MODELS["policy"]()
    done = binary(model, calib)
    export_onnx(done, tmp_path / "p.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: calib.inputs.numpy()})
    np.testing.assert_allclose(y, done.module(calib.inputs).detach().numpy(), rtol=1e-4, atol=1e-5)
    for to in ("qcdq", "qonnx", "finn"):
        with pytest.raises(InputError, match=r"layer 'net.0'.*4 bits and of 1 bit"):
            export_onnx(done, tmp_path / f"{to}.onnx", to=to)
    with pytest.raises(InputError, match=r"layer net.0 has columns of 4 bits and of 1 bit"):
        network_of(binary(model, calib, "int8"))
    with pytest.raises(InputError, match="two formats"):
        quantize(model, uniform("binary", "float", steps=(("ptq161", FAST), ("distill", {"steps": 1}))), calib)


@pytest.mark.parametrize(
    ("weights", "granularity", "options", "match"),
    [
        ("int4", "row", {}, r"layer 'net.0' is to be int4 per row; accepted: binary per row"),
        ("binary", "tensor", {}, "accepted: binary per row"),
        ("binary", "row", {"ratio": 1.2}, "ratio from 0 to 1"),
        ("binary", "row", {"lr": 0.0}, "learning rates above 0"),
        ("binary", "row", {"repair": 2, "spare": "*"}, "matches every layer"),
    ],
)
def test_refusals(weights, granularity, options, match):
    """What cannot be done is refused in one line."""
    model, calib = MODELS["policy"]()
    with pytest.raises(InputError, match=match) as caught:
        quantize(model, uniform(weights, "float", granularity, (("ptq161", {"steps": 1, **options}),)), calib)
    assert "\n" not in str(caught.value)


def test_embeddings_are_refused():
    """An embedding planned to be binary is named."""
    tiny_lm = pytest.importorskip("tiny_lm")
    ids = tiny_lm.tokens(2, 5)
    with pytest.raises(InputError, match=r"'model.embed_tokens' is an embedding; plan it as float"):
        binary(Model(tiny_lm.llama(), ids[:1]), Calib(ids, 2))


def test_sabotage():
    """The closed form notices a lost mean, and the folded form a lost zero."""
    w, s = matrix(), salient()
    q = ptq161.start(w, s)
    broken = Bands(s, q.codes, q.scale, q.zero, q.signs, q.a, q.b * 0, q.c, q.shape)
    assert not torch.allclose(dense(broken), dense(q))
    x = torch.ones(1, 31)
    broken = Bands(s, q.codes, q.scale, q.zero + 1, q.signs, q.a, q.b, q.c, q.shape)
    assert not torch.allclose(product(broken, x), x @ dense(q).T)
