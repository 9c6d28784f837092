"""Export of language models to Hugging Face directories in compressed-tensors' formats, which transformers loads.

    AutoModelForCausalLM.from_pretrained(OUT)

runs them with `pip install compressed-tensors`; vLLM reads the same files. Codes and scales are this project's own,
packed by the library's functions, so that nothing is rounded a second time. What there is a place for:

    weights                          scales                   stored as
    int2..int8, ternary, binary      tensor, row, group<n>    pack-quantized; int-quantized: 8 bits and inputs of 8 bits
    e4m3fn                           tensor, row              float-quantized
    mxfp4, mxfp6, mxfp8, nvfp4       their own                mxfp4-pack-quantized, ...

Inputs are float, or integers or e4m3fn with one fixed scale. The network runs in float32 and its sums are not exact, a
difference of about 1e-6 of the largest logit. Blocks (mx.., nvfp4) the library decodes to bfloat16, in which all of the
network then runs: about 1e-2. Of those, weights in mx formats survive without a change, nvfp4 to 2^-9.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hwmodel import formats
from hwmodel.formats import Float, Format, Int, Levels
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit.bands import BANDS
from quantkit.decoder import FAMILIES, Decoder, bias_of, config_record, weight_of
from quantkit.errors import InputError
from quantkit.files import new_directory
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import QTensor, scale_codes, values_of

_FAMILIES = tuple(family for family in FAMILIES if family != "gpt2")
ACCEPTED = "int2 to int8, ternary, binary, e4m3fn per tensor, row or group, and mxfp4, mxfp6, mxfp8, nvfp4"
FILE = "model.safetensors"
_E2M1, _E2M3, _E4M3 = Float(2, 1), Float(2, 3), Float(4, 3, "fn")
_BLOCKS = {
    (_E2M1, PerGroup(32, "e8m0")): "mxfp4-pack-quantized",
    (_E2M3, PerGroup(32, "e8m0")): "mxfp6-pack-quantized",
    (_E4M3, PerGroup(32, "e8m0")): "mxfp8-quantized",
    (_E2M1, PerGroup(16, _E4M3)): "nvfp4-pack-quantized",
}
_BIAS_FLAGS: dict[str, tuple[str, ...]] = dict.fromkeys(("granite", "llama", "smollm3"), ("attention_bias", "mlp_bias"))
_BIAS_FLAGS |= dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "qwen3"), ("attention_bias",))


def stored_as(layer: QLayer) -> str | None:
    """The library's name of the format that a quantized linear layer is stored in, None if there is none."""
    q = layer.q
    if not isinstance(q, QTensor):
        return None
    if (name := _BLOCKS.get((q.fmt, q.granularity))) is not None:  # type: ignore[arg-type]
        return name if layer.act is None else None
    if isinstance(q.granularity, PerGroup) and q.granularity.scale is not None:
        return None
    if q.fmt == _E4M3 and not isinstance(q.granularity, PerGroup):
        return "float-quantized"
    if isinstance(q.fmt, Levels) or (isinstance(q.fmt, Int) and q.fmt.signed and 2 <= q.fmt.bits <= 8):
        whole = formats.bits(q.fmt) == 8 and isinstance(layer.act, ActQuant) and formats.bits(layer.act.fmt) == 8
        return "int-quantized" if whole and isinstance(q.fmt, Int) else "pack-quantized"
    return None


def check(decoder: Decoder) -> None:
    """InputError, naming what is accepted, for what cannot be exported; costs nothing."""
    if decoder.family not in _FAMILIES:
        raise InputError(
            f"{decoder.family!r} is not exported to compressed-tensors, which quantizes nn.Linear; accepted: "
            f"{', '.join(_FAMILIES)}"
        )
    if not decoder.quantized():
        raise InputError("no layer has quantized weights: there is nothing to compress")
    for name, layer in decoder.layers.items():
        if not isinstance(layer, QLayer):
            continue
        if layer.act is not None and (layer.q is None or not _input_fits(layer)):
            raise InputError(
                f"layer {name!r}: its input is quantized to {layer.act.fmt}, which compressed-tensors does not carry "
                "here; accepted: float, integers of 2 to 8 bits for weights in integers, e4m3fn for weights in e4m3fn"
            )
        if layer.q is None:
            continue
        if layer.op == "embedding":
            raise InputError(
                f"layer {name!r}: a quantized embedding is not exported to compressed-tensors; leave it float"
            )
        if layer.in_scale is not None:
            raise InputError(
                f"layer {name!r}: compressed-tensors has no place for factors on a layer's inputs, which a step has "
                "put there because no layer before it could take them; accepted: layers without"
            )
        if isinstance(layer.q, QTensor) and isinstance(layer.q.granularity, PerGroup):
            columns, size = layer.q.codes.shape[1], layer.q.granularity.size
            if columns % size:
                raise InputError(
                    f"layer {name!r}: groups of {size} do not divide its {columns} inputs, which compressed-tensors "
                    "demands; accepted: a size that does, or row granularity"
                )
        if stored_as(layer) is None:
            held = BANDS if not isinstance(layer.q, QTensor) else f"{layer.q.fmt} per {layer.q.granularity}"
            raise InputError(f"layer {name!r}: {held} is not one of compressed-tensors' formats; accepted: {ACCEPTED}")


def _input_fits(layer: QLayer) -> bool:
    """Whether the library has a static quantizer that does what the layer's input quantizer does."""
    act = layer.act
    if not isinstance(act, ActQuant) or stored_as(layer) is None:
        return False
    if isinstance(act.fmt, Int):
        return 2 <= act.fmt.bits <= 8 and not act.fmt.narrow and stored_as(layer) != "float-quantized"
    return act.fmt == _E4M3 and stored_as(layer) == "float-quantized"


def export(decoder: Decoder, path: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the directory; bytes of the weights and the bytes that their accounted bits make.

    InputError before any work for what `check` refuses.
    """
    check(decoder)
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise InputError("exporting to compressed-tensors needs the package: pip install 'quantkit[lm]'") from None
    config, blank = _configuration(decoder)
    tensors: dict[str, Tensor] = {}
    for name, part in blank.named_modules():
        layer = decoder.layers.get(name)
        if layer is None:
            tensors |= {f"{name}.{leaf}": decoder.tensor(f"{name}.{leaf}") for leaf in part._parameters}
            continue
        if isinstance(layer, QLayer) and layer.q is not None:
            tensors |= {f"{name}.{leaf}": t for leaf, t in compressed(layer).items()}
        elif not (name == "lm_head" and config.tie_word_embeddings):
            tensors[f"{name}.weight"] = weight_of(layer)
        if getattr(part, "bias", None) is not None:
            bias = bias_of(layer)
            tensors[f"{name}.bias"] = torch.zeros(len(layer.weight)) if bias is None else bias
    record = config_record(config)
    blocks = any(stored_as(layer) in _BLOCKS.values() for layer in decoder.quantized().values())
    record["dtype"] = "bfloat16" if blocks else "float32"
    record["quantization_config"] = quantization_config(decoder)
    with new_directory(path, force=force, marker=FILE) as folder:
        held = {name: t.contiguous().clone() for name, t in tensors.items()}
        save_file(held, folder / FILE, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in decoder.files:
            shutil.copyfile(file, folder / file.name)
    return {"bytes": (path / FILE).stat().st_size, "accounted_bytes": -(-decoder.accounted_bits() // 8)}


def _configuration(decoder: Decoder) -> tuple[Any, nn.Module]:
    """The configuration to write, with biases and an output layer of its own where needed, and its empty network."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(decoder.config)
    config.tie_word_embeddings = decoder.tied()
    biased = [n for n, layer in decoder.layers.items() if bias_of(layer) is not None]

    def built() -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]

    blank = built()
    if any(blank.get_submodule(n).bias is None for n in biased):
        for flag in _BIAS_FLAGS.get(decoder.family, ()):
            setattr(config, flag, True)
        blank = built()
    for name in biased:
        if blank.get_submodule(name).bias is None:
            raise InputError(
                f"layer {name!r} has a bias (of a step such as tequila or bias_correction), which transformers' "
                f"{decoder.family} has no place for; accepted: a step without, or a Llama"
            )
    return config, blank


def compressed(layer: QLayer) -> dict[str, Tensor]:
    """The tensors of a quantized layer by their names behind its own."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q, name = layer.q, stored_as(layer)
    assert isinstance(q, QTensor)
    values, scale = values_of(q), q.scale.reshape(1) if isinstance(q.granularity, PerTensor) else q.scale
    found: dict[str, Tensor] = {}
    match name:
        case "pack-quantized":
            found["weight_packed"] = pack_to_int32(values.to(torch.int8), _bits(q.fmt))
            found["weight_shape"] = torch.tensor(q.codes.shape)
        case "int-quantized":
            found["weight"] = values.to(torch.int8)
        case "float-quantized" | "mxfp8-quantized":
            found["weight"] = values.to(torch.float8_e4m3fn)
        case "mxfp6-pack-quantized":
            from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8

            found["weight_packed"] = pack_fp6_to_uint8(values)
        case _:
            found["weight_packed"] = pack_fp4_to_uint8(values)
    if name == "nvfp4-pack-quantized":
        assert q.base is not None
        found["weight_scale"] = (scale / q.base).to(torch.float8_e4m3fn)
        found["weight_global_scale"] = torch.tensor([1 / q.base])
    elif name is not None and name.startswith("mx"):
        found["weight_scale"] = scale_codes(scale, "e8m0")
    else:
        found["weight_scale"] = scale
    if isinstance(layer.act, ActQuant):
        found["input_scale"] = torch.tensor([layer.act.scale])
        if not formats.is_signed(layer.act.fmt):
            found["input_zero_point"] = torch.tensor([-(2 ** (formats.bits(layer.act.fmt) - 1))], dtype=torch.int8)
    return found


def _bits(fmt: Format) -> int:
    """The library's num_bits: two's complement, so that binary takes 2."""
    return 2 if isinstance(fmt, Levels) else formats.bits(fmt)


def quantization_config(decoder: Decoder) -> dict[str, Any]:
    """What stands under quantization_config in config.json: a group of layers for every way of storing them."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, layer in decoder.quantized().items():
        scheme = _scheme(layer)
        groups.setdefault(json.dumps(scheme), (scheme, []))[1].append(name)
    schemes = list(groups.values())
    kinds = {scheme["format"] for scheme, _ in schemes}
    alone = len(schemes) == 1
    linear = [
        n for n, x in decoder.layers.items() if not (isinstance(x, nn.Embedding) or getattr(x, "op", "") == "embedding")
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme | {"targets": ["Linear"] if alone else names}
            for i, (scheme, names) in enumerate(schemes)
        },
        "ignore": [name for name in linear if name not in decoder.quantized()] if alone else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(layer: QLayer) -> dict[str, Any]:
    """The library's QuantizationScheme of a layer, without its targets."""
    q, name = layer.q, stored_as(layer)
    assert isinstance(q, QTensor) and name is not None
    weights: dict[str, Any] = {"num_bits": _bits(q.fmt), "type": "float" if isinstance(q.fmt, Float) else "int"}
    weights |= {"symmetric": True, "dynamic": False, "group_size": None}
    match q.granularity:
        case PerTensor():
            weights["strategy"] = "tensor"
        case PerRow():
            weights["strategy"] = "channel"
        case PerGroup(size):
            weights |= {"strategy": "tensor_group" if name.startswith("nvfp4") else "group", "group_size": size}
    if name.startswith("mx"):
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    elif name.startswith("nvfp4"):
        weights |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    inputs: dict[str, Any] | None = None
    if isinstance(layer.act, ActQuant):
        inputs = {"num_bits": formats.bits(layer.act.fmt), "strategy": "tensor", "dynamic": False, "group_size": None}
        inputs |= {"type": "float" if isinstance(layer.act.fmt, Float) else "int"}
        inputs |= {"symmetric": formats.is_signed(layer.act.fmt)}
    return {"format": name, "weights": weights, "input_activations": inputs, "output_activations": None}
