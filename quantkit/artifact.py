"""The directory of a quantized model: everything needed to run, cost and export it.

    quantkit.json        format version, structure, environment, recipe, per-layer facts
    model.safetensors    packed weight codes, scales, biases, input stage
    specs.json           the LayerSpecs that `hwmodel estimate` reads
    tokenizer.json, ...  of a language model, copied

Codes are stored in exactly their format's bits (`NAME.codes`, uint8, no gaps), and so are scales that
have a format (`NAME.scale`; all others are float32). A weight that two layers share is stored once, a
bias that is all zero not at all. The directory is written under a temporary name and renamed, and needs
nothing of the checkpoint it came from, except that a network of the caller's own code is rebuilt by its
factory. A language model is transformers' own class of the recorded configuration.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from hwmodel import formats
from hwmodel.formats import Block, Float
from hwmodel.spec import LayerSpec, parse_granularity
from quantkit import __version__
from quantkit.bands import ARRAYS, BANDS, Bands, from_arrays, to_arrays
from quantkit.capture import captured
from quantkit.errors import InputError, one_line
from quantkit.files import new_directory
from quantkit.joints import place
from quantkit.model import EnvSpec, Model
from quantkit.policy import Policy, build, describe
from quantkit.qlayers import ActQuant, BlockAct, LayerPlan, Plain, QLayer, shape_of
from quantkit.qtensor import BlockRule, QTensor, pack, scale_codes, scale_format, scale_shape, scales_of, unpack, within
from quantkit.recipe import format_name, parse_format
from quantkit.specs import bits_per_weight, layer_specs, may_have_design, repeated, sqnr_db, weight_name

FORMAT_VERSION = 1
MARKER, TENSORS = "quantkit.json", "model.safetensors"
TENSORS_META = {"format": "quantkit"}


def summary(model: Model) -> dict[str, Any]:
    """What `quantize` reports: bits_per_weight and, for each layer, formats and weight SQNR in dB."""
    return report(model, [entry(name, layer) for name, layer in model.layers().items()], bits_per_weight(model))


def entry(name: str, layer: Plain | QLayer) -> dict[str, Any]:
    """What `summary` says of a layer."""
    sqnr = sqnr_db(layer) if isinstance(layer, QLayer) else None
    return {
        "name": name,
        "op": shape_of(layer).op,
        "shape": list(layer.weight.shape),
        "weight": weight_name(layer),
        "act": format_name(layer.act.fmt if isinstance(layer, QLayer) and layer.act else None),
        "granularity": str(layer.plan.granularity) if isinstance(layer, QLayer) else None,
        "sqnr_db": None if sqnr is None or not math.isfinite(sqnr) else round(sqnr, 3),
    }


def report(model: Model, layers: list[dict[str, Any]], bits: float) -> dict[str, Any]:
    """`summary` of a model whose layers' entries and bits per weight are known."""
    return {
        "bits_per_weight": round(bits, 4),
        "layers": layers,
        "points": [
            {"name": name, "act": format_name(p.act.fmt if p.act else None)} for name, p in model.points().items()
        ],
        "float_layers": model.meta.get("float_layers", {}),
        "untraced": model.meta.get("untraced"),
        "recipe": model.meta.get("recipe"),
        "steps": model.meta.get("steps"),
    }


def save_artifact(model: Model, path: Path, *, force: bool = False, files: Iterable[Path] = ()) -> None:
    """Write the quantized model as a new directory; InputError if it exists and not `force`.

    `force` replaces a directory of this kind or an empty one, nothing else. files: copied beside it, the tokenizer of a
    language model (`hf.companions`).
    """
    layers: list[dict[str, Any]] = []
    qlayers, shared = model.qlayers(), repeated(model)
    packed: dict[str, np.ndarray] = {}
    for name, tensor in model.module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in qlayers or leaf not in ("weight", "bias", "in_scale"):
            if not (owner in shared and leaf == "weight"):
                packed[name] = tensor.contiguous().numpy()
    for name, layer in qlayers.items():
        record, arrays = pack_layer(name, layer, weight=name not in shared)
        layers.append(record)
        packed |= arrays
    with new_directory(path, force=force, marker=MARKER) as folder:
        save_file(packed, folder / TENSORS, metadata=TENSORS_META)
        write_documents(folder, model, layers, shared, summary(model), _specs(model))
        for file in files:
            shutil.copyfile(file, folder / file.name)


def _specs(model: Model) -> tuple[LayerSpec, ...]:
    """What the cost model reads; code that knows hardware is loaded only where there may be some."""
    if not may_have_design(model):
        return layer_specs(model)
    from quantkit.rtl_export import hardware_specs

    return hardware_specs(model)


def pack_layer(name: str, layer: QLayer, *, weight: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of a layer and its tensors as they are stored; weight: False where another layer stores its weight."""
    record: dict[str, Any] = {"name": name, "granularity": str(layer.plan.granularity)}
    record["plan"] = [format_name(layer.plan.weight), format_name(layer.plan.act)]
    record["act"] = None if layer.act is None else _act_record(layer.act)
    record["in_scale"] = layer.in_scale is not None
    record["bias"] = bool(layer.bias.any())
    record["weight"] = None
    arrays: dict[str, Tensor | np.ndarray] = {}
    if layer.in_scale is not None:
        arrays["in_scale"] = layer.in_scale
    if record["bias"]:
        arrays["bias"] = layer.bias.detach()
    if isinstance(layer.q, Bands):
        record["weight"] = {"format": BANDS, "shape": list(layer.q.shape)}
        arrays |= to_arrays(layer.q) if weight else {}
    elif layer.q is not None:
        record["weight"] = {"format": str(layer.q.fmt), "shape": list(layer.q.shape), "base": layer.q.base}
        if weight:
            arrays |= {"codes": pack(layer.q.codes, formats.bits(layer.q.fmt)), "scale": _packed_scale(layer.q)}
    elif weight:
        arrays["weight"] = layer.weight.detach()
    plain = {k: a.contiguous().numpy() if isinstance(a, Tensor) else a for k, a in arrays.items()}
    return record, {f"{name}.{leaf}": array for leaf, array in plain.items()}


def write_documents(
    folder: Path,
    model: Model,
    quantized: list[dict[str, Any]],
    shared: dict[str, str],
    summary: dict[str, Any],
    specs: Iterable[LayerSpec],
) -> None:
    """quantkit.json and specs.json; quantized: the records of `pack_layer`; shared: `specs.repeated`."""
    document = {
        "format_version": FORMAT_VERSION,
        "quantkit_version": __version__,
        "structure": _structure(model),
        "example": {"shape": list(model.example.shape[1:]), "dtype": str(model.example.dtype).removeprefix("torch.")},
        "env": None if model.env is None else asdict(model.env),
        "meta": {key: value for key, value in model.meta.items() if key != "config"},
        "shared": shared,
        "quantized": quantized,
        "points": {name: _act_record(point.act) for name, point in model.points().items() if point.act is not None},
        "summary": summary,
    }
    records = {"format_version": 1, "layers": [spec.to_json() for spec in specs]}
    (folder / "specs.json").write_text(json.dumps(records, indent=1) + "\n")
    (folder / MARKER).write_text(json.dumps(document, indent=1) + "\n")


def _act_record(act: ActQuant | BlockAct) -> dict[str, Any]:
    if isinstance(act, BlockAct):
        return {"format": str(act.fmt), "rule": act.rule, "base": act.base}
    return {"format": str(act.fmt), "scale": act.scale}


def _act_of(record: dict[str, Any]) -> ActQuant | BlockAct:
    fmt = formats.parse(record["format"])
    if not isinstance(fmt, Block):
        return ActQuant(fmt, _positive(record["scale"]))
    minifloat = isinstance(fmt.scale, Float)
    if record["rule"] not in (("absmax",) if minifloat else get_args(BlockRule)):
        raise ValueError(f"{record['rule']!r} is not a block rule of {fmt}")
    return BlockAct(fmt, record["rule"], _positive(record["base"]) if minifloat else None)


def _packed_scale(q: QTensor) -> np.ndarray:
    fmt = scale_format(q.granularity)
    if fmt is None:
        return q.scale.contiguous().numpy()
    return pack(scale_codes(q.scale, fmt, q.base), formats.scale_bits(fmt))


def _structure(model: Model) -> dict[str, Any]:
    if "config" in model.meta:
        return {"hf": model.meta["config"]}
    if not isinstance(model.module, Policy):
        factory = model.meta.get("factory")
        if not factory:
            raise InputError("a network that is not a policy needs a factory (module:callable) to be saved")
        return {"factory": factory}
    return describe(model.module)


def load_artifact(path: Path, *, factory: str | None = None) -> Model:
    """The quantized model of a directory; InputError names the file that is missing or damaged.

    A network of the caller's own code is rebuilt only by a `factory` that the caller names and that
    is the recorded one: a directory from elsewhere must not choose what is imported.
    """
    document_path, tensors_path = path / MARKER, path / TENSORS
    try:
        document = json.loads(document_path.read_text())
        version = int(document["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no quantkit.json; not a directory written by quantkit quantize") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{document_path}: damaged; quantize the checkpoint again") from None
    if version > FORMAT_VERSION:
        raise InputError(
            f"{document_path}: format version {version} is newer than this program reads ({FORMAT_VERSION})"
        )
    try:
        tensors = {name: torch.from_numpy(array) for name, array in load_file(tensors_path).items()}
    except FileNotFoundError:
        raise InputError(f"{tensors_path}: missing; quantize the checkpoint again") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{tensors_path}: damaged ({one_line(error)})") from None
    try:
        return _restore(path, document, tensors, factory)
    except InputError:
        raise
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise InputError(f"{path}: quantkit.json and model.safetensors do not fit ({one_line(error)})") from None


def _restore(path: Path, document: dict[str, Any], tensors: dict[str, Tensor], factory: str | None) -> Model:
    structure = document["structure"]
    if "factory" in structure:
        if structure["factory"] != factory:
            raise InputError(
                f"{path} holds a network of your own code; to import it, give --factory {structure['factory']}"
            )
        from quantkit.loaders.torch_module import call_factory

        module: nn.Module = call_factory(structure["factory"])
    elif "hf" in structure:
        module = _language_model(path, structure["hf"], tensors)
    else:
        module = build(structure)
    example = torch.zeros(2, *document["example"]["shape"], dtype=getattr(torch, document["example"]["dtype"]))
    env = None if document["env"] is None else EnvSpec(**document["env"])
    meta = document["meta"] | ({"config": structure["hf"]} if "hf" in structure else {})
    model = Model(module.eval(), example, env, meta)
    if not isinstance(module, Policy):
        model = captured(model)
    shared: dict[str, str] = document.get("shared", {})
    tensors |= {
        f"{name}.{leaf}": tensors[f"{other}.{leaf}"]
        for name, other in shared.items()
        for leaf in ("weight", "codes", "scale", *ARRAYS)
        if f"{other}.{leaf}" in tensors
    }
    floats = model.layers()
    for record in document["quantized"]:
        weight, act = (parse_format(text) for text in record["plan"])
        plain = floats[record["name"]]
        assert not isinstance(plain, QLayer)
        layer = QLayer(plain, LayerPlan(weight, act, parse_granularity(record["granularity"])))
        model.replace(record["name"], layer)
        restore_layer(layer, record, tensors)
    place(model, [name for name in document.get("points", {}) if name not in model.points()])
    points = model.points()
    for name, record in document.get("points", {}).items():
        points[name].set_act(_act_of(record))
    codes = {f"{r['name']}.{leaf}" for r in document["quantized"] for leaf in _leaves(r["weight"])}
    rest = {name: tensor for name, tensor in tensors.items() if name not in codes}
    missing, unexpected = model.module.load_state_dict(rest, strict=False)
    restored = {f"{r['name']}.weight" for r in document["quantized"] if r["weight"] is not None}
    restored |= {f"{r['name']}.bias" for r in document["quantized"] if not r.get("bias", True)}
    if unexpected or set(missing) - restored:
        raise KeyError(", ".join([*unexpected, *sorted(set(missing) - restored)]))
    for name, parameter in model.module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} is not finite")
    return model


def restore_layer(layer: QLayer, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give a layer what `pack_layer` recorded of it, its float weight and a bias other than zero aside."""
    if record["in_scale"]:
        layer.in_scale = tensors[f"{record['name']}.in_scale"]
    if not record.get("bias", True):
        layer.bias.data.zero_()
    if record["weight"] is not None:
        _restore_weight(layer, record, tensors)
    if record["act"] is not None:
        layer.set_act(_act_of(record["act"]))


def _language_model(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """transformers' class with undefined weights; a code takes a bit or more, so that the files limit its size."""
    try:
        from quantkit.loaders import hf
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: a language model needs {error.name}: pip install 'quantkit[lm]'") from None
    held = sum(8 * t.numel() if t.dtype == torch.uint8 else t.numel() for t in tensors.values())
    return hf.skeleton(config, path / "quantkit.json", held, len(tensors))


def _positive(scale: float) -> float:
    if not 0 < scale < float("inf"):
        raise ValueError(f"{scale} is not a scale")
    return float(scale)


def _leaves(weight: dict[str, Any] | None) -> tuple[str, ...]:
    """What a quantized weight is stored as."""
    return () if weight is None else ARRAYS if weight["format"] == BANDS else ("codes", "scale")


def _restore_weight(layer: QLayer, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name, shape = record["name"], tuple(record["weight"]["shape"])
    if record["weight"]["format"] == BANDS:
        if shape != tuple(layer.weight.shape):
            raise ValueError(f"{name} has another shape")
        layer.set_weight(from_arrays({leaf: tensors[f"{name}.{leaf}"].numpy() for leaf in ARRAYS}, shape))
        layer.weight.data = layer.effective_weight().clone()
        return
    fmt = formats.parse(record["weight"]["format"])
    rows = shape[0]
    columns = int(torch.Size(shape).numel()) // rows
    packed, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
    if shape != tuple(layer.weight.shape) or packed.numel() != -(-rows * columns * formats.bits(fmt) // 8):
        raise ValueError(f"{name} has another shape")
    granularity = within(layer.plan.granularity, columns)
    expected = scale_shape(rows, columns, granularity)
    base, scales = None, scale_format(granularity)
    if scales is not None:
        base = _positive(record["weight"]["base"]) if isinstance(scales, Float) else None
        width = formats.scale_bits(scales)
        if scale.dtype != torch.uint8 or scale.numel() != -(-math.prod(expected) * width // 8):
            raise ValueError(f"{name}.scale is not {expected} codes of {scales}")
        scale = scales_of(unpack(scale.numpy(), width, expected), scales, base)
    if scale.shape != expected or not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"{name}.scale is not {expected} positive numbers")
    codes = unpack(packed.numpy(), formats.bits(fmt), (rows, columns))
    q = QTensor(codes, scale, fmt, granularity, shape, base)
    layer.set_weight(q)
    layer.weight.data = layer.effective_weight().clone()
