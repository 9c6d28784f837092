"""Export of language models to ONNX with 2-, 4- and 8-bit weights that onnxruntime multiplies with.

A directory: model.onnx (and model.onnx.data where it is large), config.json, tokenizer.json. The graph is that of
`quantkit.onnx_decoder`.

MatMulNBits' `accuracy_level` (onnxruntime 1.31, x86 with AVX-512 VNNI, one thread, 2048 x 2048, one row): at 1
inputs stay float32; 2- and 8-bit weights are then 8 to 11 times slower than a float32 product, 4-bit ones 2.2x as fast.
At 4 inputs are rounded to 8 bits in blocks, an error of 0.6 % of the largest output, and 2, 4 and 8 bits are 9.7, 6.0
and 3.6 times as fast as float32 (reports/language/nbits_speed.csv). 2 bits are fast in blocks of 32, 64 and 128 only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from hwmodel import formats
from quantkit.bands import Bands
from quantkit.decoder import FAMILIES, Decoder, config_record, refuse_inputs
from quantkit.errors import InputError
from quantkit.files import new_directory
from quantkit.nbits import block_of, group_of, width_of
from quantkit.onnx_decoder import Builder, activation, ropes
from quantkit.qtensor import QTensor

FILE = "model.onnx"
LEVELS = (1, 4)
_LARGEST = 2**31 - 2**24  # of one protobuf file, with room for the graph itself
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh")
ROPES = ("default", "linear", "llama3", "dynamic", "yarn")
"""Rotary positions whose frequencies do not change within the context: those of "dynamic" would beyond it."""


def check(decoder: Decoder) -> None:
    """InputError, naming what is accepted, for what cannot be exported; costs nothing."""
    config = decoder.config
    if decoder.family not in FAMILIES:
        raise InputError(f"{decoder.family!r} is not exported to onnx-nbits; accepted: {', '.join(FAMILIES)}")
    refuse_inputs(decoder, "onnx-nbits")
    for name, layer in decoder.quantized().items():
        if isinstance(layer.q, QTensor):
            if width_of(layer.q.fmt) is None:
                raise InputError(
                    f"layer {name!r}: {layer.q.fmt} needs more than 8 bits in units of its smallest step; accepted: "
                    f"ternary, binary, integers up to 8 bits, {', '.join(_minifloats())}"
                )
            if not block_of(layer.q.codes.shape[1], group := group_of(layer.q)):
                raise InputError(
                    f"layer {name!r}: groups of {group} weights do not fit "
                    "MatMulNBits; accepted: tensor, row, groups of a multiple of 16"
                )
            if layer.op == "embedding" and layer.q.codes.shape[1] % 4:
                raise InputError(f"layer {name!r}: rows of {layer.q.codes.shape[1]} numbers; accepted: multiples of 4")
        elif layer.op == "embedding":
            raise InputError(f"layer {name!r}: an embedding in bands is not exported to onnx-nbits; accepted: a format")
    act = activation(config)
    if act not in _ACTIVATIONS:
        raise InputError(f"activation {act!r} is not exported to onnx-nbits; accepted: {', '.join(_ACTIVATIONS)}")
    several = len(ropes(config)) > 1
    for rope in ropes(config):
        kind = rope.get("rope_type", "default")
        known = ROPES[:-1] if several else ROPES
        if kind not in known or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                f"rotary positions {kind!r} are not exported; accepted: {', '.join(known)}, of all channels"
            )
    if decoder.family == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        raise InputError("attention with a scale of its own is not exported; accepted: GPT-2's default")


def check_level(level: int) -> None:
    """InputError for an accuracy level that is not exported."""
    if level not in LEVELS:
        raise InputError(f"accuracy level {level}; accepted: 1 (inputs stay float32), 4 (inputs rounded to 8 bits)")


def _minifloats() -> list[str]:
    """The minifloats that 8 bits hold."""
    return [str(f) for bits in range(3, 9) for f in formats.minifloats(bits) if width_of(f) is not None]


def export(decoder: Decoder, path: Path, *, level: int = 4, force: bool = False) -> dict[str, Any]:
    """Write the directory; `summary` of it. InputError before any work for what `check` refuses."""
    check(decoder)
    model = build(decoder, level=level)
    with new_directory(path, force=force, marker=FILE) as folder:
        held = sum(len(t.raw_data) for t in model.graph.initializer)
        if held > _LARGEST:
            onnx.save_model(model, folder / FILE, save_as_external_data=True, location=f"{FILE}.data")
        else:
            onnx.save_model(model, folder / FILE)
        (folder / "config.json").write_text(json.dumps(config_record(decoder.config), indent=2) + "\n")
        for file in decoder.files:
            shutil.copyfile(file, folder / file.name)
    return summary(decoder, path)


def summary(decoder: Decoder, path: Path) -> dict[str, Any]:
    """What was written: bytes of the model, those that the bits of all weights make, layers stored wider than named."""
    files = [f for f in (path / FILE, path / f"{FILE}.data") if f.is_file()]
    wider = {}
    for name, layer in decoder.quantized().items():
        if isinstance(layer.q, Bands):
            wider[name] = "1 bit as 2 bits"
        elif layer.q is not None and (width := width_of(layer.q.fmt)) and width.bits > formats.bits(layer.q.fmt):
            wider[name] = f"{layer.q.fmt} as {width.bits} bits"
    return {
        "bytes": sum(f.stat().st_size for f in files),
        "accounted_bytes": -(-decoder.accounted_bits() // 8),
        "wider": wider,
    }


def build(decoder: Decoder, *, level: int = 4) -> ModelProto:
    """The ONNX model; level: the operator's accuracy_level, 1 (float32 inputs) or 4 (inputs rounded to 8 bits)."""
    check_level(level)
    check(decoder)
    return Builder(decoder, level).model()
