"""Laws of quantized directories: what was saved is what is loaded, and nothing else can be smuggled in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_policies import CARTPOLE, calib, cartpole, conv, mlp
from torch import nn

from hwmodel import formats
from hwmodel.spec import LayerSpec
from quantkit.artifact import load_artifact, save_artifact, summary
from quantkit.errors import InputError
from quantkit.loading import describe_checkpoint, load_checkpoint
from quantkit.model import EnvSpec, Model
from quantkit.policy import Head, InputStage
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rtl_export import hardware_specs
from quantkit.specs import bits_per_weight, layer_specs

ACTS = [n for n in formats.all_names() if n != "int1"] + ["float"]
WEIGHTS = [n for n in formats.all_names() if n not in ("int1", "uint1")] + ["float"]


def same_law(model: Model, folder: Path) -> Model:
    """save then load: outputs, formats, environment, facts and costs are the same."""
    save_artifact(model, folder)
    loaded = load_artifact(folder)
    inputs = calib(model, 33, seed=4).inputs
    with torch.inference_mode():
        assert torch.equal(model.module(inputs), loaded.module(inputs))
    assert loaded.env == model.env and loaded.meta == model.meta
    assert torch.equal(loaded.example, torch.zeros_like(loaded.example)) and loaded.example.dtype == model.example.dtype
    assert layer_specs(loaded) == layer_specs(model)
    assert bits_per_weight(loaded) == bits_per_weight(model)
    described = describe_checkpoint(model)
    assert describe_checkpoint(loaded) == described
    assert not loaded.module.training
    return loaded


@settings(max_examples=70, deadline=None)
@given(st.sampled_from(WEIGHTS), st.sampled_from(ACTS), st.sampled_from(["tensor", "row", "group4", "group8"]))
@example("e7m0", "e7m0", "row")
def test_every_format_and_granularity_comes_back(
    tmp_path_factory: pytest.TempPathFactory, weight: str, act: str, granularity: str
) -> None:
    """A policy of any formats gives the same bits after saving and loading; sums beyond float32 are refused before."""
    model = mlp((8, 16, 8, 3), env=EnvSpec("X-v0", {"a": [1, "b"]}, 1000, 9, "X-v-1"))
    if weight == act == "float":
        return
    if "float" not in (weight, act):
        largest = 16 * formats.max_value(formats.parse(weight)) * formats.max_value(formats.parse(act))
        if largest > torch.finfo(torch.float32).max:
            with pytest.raises(InputError, match="can exceed float32"):
                quantize(model, uniform(weight, act, granularity), calib(model))
            return
    same_law(quantize(model, uniform(weight, act, granularity), calib(model)), tmp_path_factory.mktemp("a") / "q")


@pytest.mark.parametrize(
    "steps",
    [
        (("smoothquant", {"explicit": True}), ("gptq", {})),
        (("equalize", {}), ("rtn", {}), ("bias_correction", {})),
        (("smoothquant", {"explicit": True, "pow2": True}),),
    ],
)
def test_factors_and_corrected_biases_come_back(steps: Any, tmp_path: Path) -> None:
    """Input factors, equalized and corrected biases and a normalizing stage are part of the directory."""
    stage = InputStage([0.1] * 8, [2.0] * 8, -3.0, 3.0)
    model = mlp((8, 16, 8, 3), act=nn.ReLU if "equalize" in dict(steps) else nn.Tanh, stage=stage)
    done = quantize(model, uniform("int4", "int6", steps=steps), calib(model))
    if "smoothquant" in dict(steps):
        assert any(layer.in_scale is not None for layer in done.qlayers().values())
    same_law(done, tmp_path / "q")


CONVOLUTIONS: dict[str, Callable[[], Model]] = {
    "plain": conv,
    "grouped": lambda: conv(groups=2),
    "dilated": lambda: conv(dilation=2),
    "strided": lambda: conv(stride=(2, 1), padding=(1, 0)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutional_policies_come_back(kind: str, tmp_path: Path) -> None:
    """Stride, padding, dilation, groups and missing biases are kept."""
    model = CONVOLUTIONS[kind]()
    same_law(quantize(model, uniform("int3", "uint8"), calib(model)), tmp_path / "q")
    recipe = Recipe((("*", make_plan("float", "float")), ("last", make_plan("int4", "int8"))))
    same_law(quantize(model, recipe, calib(model)), tmp_path / "mostly-float")


@pytest.mark.parametrize(
    "activation", [nn.ELU(0.5), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.Hardtanh(-0.5, 2.0), nn.ReLU6()], ids=str
)
def test_parameters_of_activations_come_back_or_are_refused(activation: nn.Module, tmp_path: Path) -> None:
    """An activation with other than default parameters is never rebuilt as another function."""
    model = mlp((8, 16, 3), act=lambda: activation)  # type: ignore[arg-type]
    done = quantize(model, uniform("int4", "float"), calib(model))
    try:
        save_artifact(done, tmp_path / "q")
    except InputError as error:
        assert "net" in str(error) or "act1" in str(error)
        assert not (tmp_path / "q").exists()
        return
    inputs = calib(model, 33).inputs
    assert torch.equal(load_artifact(tmp_path / "q").module(inputs), done.module(inputs))


@pytest.mark.parametrize(
    "head",
    [
        Head("discrete", nvec=(4,), start=2),
        Head("multidiscrete", nvec=(2, 2)),
        Head("multibinary", nvec=(4,)),
        Head("box", low=(-1.0, -2.0, -3.0, float("-inf")), high=(1.0, 2.0, 3.5, float("inf"))),
        Head("box", low=(-0.1,) * 4, high=(0.7,) * 4, squash=True),
    ],
    ids=lambda head: f"{head.kind}{'-squash' if head.squash else ''}",
)
def test_heads_come_back(head: Head, tmp_path: Path) -> None:
    """The loaded policy takes the same actions, for every kind of action space."""
    model = mlp((8, 16, 4), head=head)
    loaded = same_law(quantize(model, uniform("int4", "int8"), calib(model)), tmp_path / "q")
    assert loaded.module.head == head


@pytest.mark.parametrize("weight", ["int2", "int3", "int5", "e2m1", "ternary", "binary", "int8", "e3m3ieee", "int16"])
def test_the_size_on_disk_is_the_bits_per_weight(weight: str, tmp_path: Path) -> None:
    """Codes take exactly their format's bits, no byte more than the rounding up of each layer."""
    model = mlp((8, 160, 24, 3))
    done = quantize(model, uniform(weight, "int8"), calib(model))
    save_artifact(done, tmp_path / "q")
    stored = load_file(tmp_path / "q/model.safetensors")
    counted = sum(stored[f"{n}.{leaf}"].nbytes for n in done.qlayers() for leaf in ("codes", "scale"))
    weights = sum(layer.weight.numel() for layer in done.qlayers().values())
    exact = bits_per_weight(done) * weights / 8
    assert exact <= counted < exact + len(done.qlayers())
    assert not any(f"{name}.weight" in stored for name in done.qlayers())
    biases = sum(4 * layer.bias.numel() for layer in done.qlayers().values())
    assert (tmp_path / "q/model.safetensors").stat().st_size <= counted + biases + 16 + 2048


def test_the_directory_is_plain_data(tmp_path: Path) -> None:
    """Three files: strict JSON twice, specs that the cost model reads, and tensors."""
    model = mlp((8, 16, 3), env=CARTPOLE)
    model.module.net.fc1.weight.data[3] = 0  # type: ignore[union-attr,operator,index]
    for weight in ("int4", "binary", "ternary"):
        done = quantize(model, uniform(weight, "int8"), calib(model))
        save_artifact(done, tmp_path / weight)
        assert sorted(p.name for p in (tmp_path / weight).iterdir()) == [
            "model.safetensors",
            "quantkit.json",
            "specs.json",
        ]
        for name in ("quantkit.json", "specs.json"):
            json.loads((tmp_path / weight / name).read_text(), parse_constant=pytest.fail)
        specs = json.loads((tmp_path / weight / "specs.json").read_text())["layers"]
        assert tuple(LayerSpec.from_json(s) for s in specs) == hardware_specs(done)


def test_a_loaded_directory_can_be_saved_again(tmp_path: Path) -> None:
    """Saving what was loaded writes the same tensors, codes and scales."""
    model = cartpole()
    save_artifact(quantize(model, uniform("e2m1", "int4"), calib(model)), tmp_path / "a")
    save_artifact(load_artifact(tmp_path / "a"), tmp_path / "b")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_an_existing_directory_is_refused_or_replaced(tmp_path: Path) -> None:
    """Without force nothing is touched; with force the old directory is gone."""
    model = cartpole()
    four, eight = (quantize(model, uniform(w, "int8"), calib(model)) for w in ("int4", "int8"))
    save_artifact(four, tmp_path / "q")
    before = (tmp_path / "q/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists"):
        save_artifact(eight, tmp_path / "q")
    assert (tmp_path / "q/model.safetensors").read_bytes() == before
    save_artifact(eight, tmp_path / "q", force=True)
    assert summary(load_artifact(tmp_path / "q"))["layers"][0]["weight"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def one_line(path: Path) -> str:
    """The message with which loading fails."""
    with pytest.raises(InputError) as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value).strip() and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small good directory."""
    model = cartpole()
    save_artifact(quantize(model, uniform("int4", "int4"), calib(model)), tmp_path / "q")
    return tmp_path / "q"


@pytest.mark.parametrize("name", ["quantkit.json", "model.safetensors"])
def test_missing_and_cut_files_are_named(saved: Path, name: str) -> None:
    """A file that is missing, empty, cut or overwritten is an InputError of one line that names the directory."""
    content = (saved / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-3], b"\xff\xfe\0garbage", b"[]", b"null", b"{}"):
        (saved / name).write_bytes(damaged)
        assert saved.name in one_line(saved)
    (saved / name).unlink()
    assert saved.name in one_line(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    """The message gives both versions."""
    path = saved / "quantkit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    assert "99" in one_line(saved)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in [(*path, key), *leaves(inner, (*path, key))]]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("junk", [None, -1, 0, "x", [], {}, [1], 1e308, 10**30, True], ids=repr)
def test_a_document_changed_anywhere_is_refused_or_loads(saved: Path, junk: Any) -> None:
    """Whatever single value is replaced or removed: one InputError, never another exception."""
    path = saved / "quantkit.json"
    good = path.read_text()
    document = json.loads(good)
    for where in leaves({k: document[k] for k in ("format_version", "structure", "example", "env", "quantized")}):
        changed = json.loads(good)
        parent = changed
        for key in where[:-1]:
            parent = parent[key]
        if junk == "x" and isinstance(parent, dict):
            del parent[where[-1]]
        else:
            parent[where[-1]] = junk
        path.write_text(json.dumps(changed))
        try:
            load_artifact(saved)
        except InputError as error:
            assert "\n" not in str(error), where
        except Exception as error:
            pytest.fail(f"{'.'.join(map(str, where))} = {junk!r}: {type(error).__name__}: {error}")


def tensor_damage() -> dict[str, Callable[[dict[str, Any]], None]]:
    """Ways to spoil the tensors of a directory."""
    name = "net.fc2"
    return {
        "codes cut": lambda t: t.update({f"{name}.codes": t[f"{name}.codes"][:-4].copy()}),
        "codes of another type": lambda t: t.update({f"{name}.codes": t[f"{name}.codes"].astype("float32")}),
        "no codes": lambda t: t.pop(f"{name}.codes"),
        "no scale": lambda t: t.pop(f"{name}.scale"),
        "no bias": lambda t: t.pop(f"{name}.bias"),
        "scale of another shape": lambda t: t.update({f"{name}.scale": t[f"{name}.scale"][:1].copy()}),
        "scale not finite": lambda t: t[f"{name}.scale"].fill(float("nan")),
        "bias not finite": lambda t: t[f"{name}.bias"].fill(float("inf")),
        "bias of another shape": lambda t: t.update({f"{name}.bias": t[f"{name}.bias"][:1].copy()}),
        "one tensor more": lambda t: t.update(extra=t[f"{name}.bias"]),
    }


@pytest.mark.parametrize("damage", tensor_damage())
def test_tensors_that_do_not_fit_are_refused(saved: Path, damage: str) -> None:
    """Missing, misshapen, superfluous and non-finite tensors are an InputError, not another network."""
    tensors = load_file(saved / "model.safetensors")
    tensor_damage()[damage](tensors)
    save_file(tensors, saved / "model.safetensors")
    assert saved.name in one_line(saved)


def test_a_directory_never_chooses_what_is_imported(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded factory is only imported if the caller names the same one."""
    (tmp_path / "evil_factory.py").write_text("import pathlib\npathlib.Path('touched').touch()\ndef make(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = saved / "quantkit.json"
    document = json.loads(path.read_text())
    document["structure"] = {"factory": "evil_factory:make"}
    path.write_text(json.dumps(document))
    assert "evil_factory:make" in one_line(saved)
    for other in ("torch.nn:Identity", "evil_factory", ""):
        with pytest.raises(InputError):
            load_artifact(saved, factory=other)
    assert "evil_factory" not in sys.modules and not (tmp_path / "touched").exists()
    with pytest.raises(InputError):
        load_artifact(saved, factory="evil_factory:make")
    assert (tmp_path / "touched").exists()
    sys.modules.pop("evil_factory", None)


def test_a_network_of_the_callers_own_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module loaded through a factory is saved, and loaded again through the same factory."""
    (tmp_path / "my_factory.py").write_text(
        "import torch\n"
        "def make():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))\n"
        "    net.example_input = torch.zeros(1, 5)\n"
        "    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_factory  # type: ignore[import-not-found]

    torch.save(my_factory.make().state_dict(), "net.pt")
    model = load_checkpoint(tmp_path / "net.pt", factory="my_factory:make")
    done = quantize(model, uniform("int4", "int8"), calib(model))
    save_artifact(done, tmp_path / "q")
    assert "my_factory:make" in one_line(tmp_path / "q")
    loaded = load_checkpoint(tmp_path / "q", factory="my_factory:make")
    inputs = torch.randn(9, 5)
    assert torch.equal(loaded.module(inputs), done.module(inputs))
    sys.modules.pop("my_factory", None)


def test_sabotage_a_lost_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If loading forgot the activation scales, the law of equal outputs would fail."""
    import quantkit.artifact

    real = quantkit.artifact.ActQuant
    monkeypatch.setattr(quantkit.artifact, "ActQuant", lambda fmt, scale: real(fmt, scale * 1.01))
    model = cartpole()
    with pytest.raises(AssertionError):
        same_law(quantize(model, uniform("int4", "int4"), calib(model)), tmp_path / "q")
