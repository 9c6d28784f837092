"""Export of language models to one GGUF file, for llama.cpp and what is built on it.

Codes are this project's own; GGUF's scales are float16, so that weights differ from ours by at most 2^-11 of
themselves, and by nothing where scales are powers of two (`act_scales:pow2=true`, `rtn:pow2=true`, mxfp4). A type has
blocks of a fixed size in a row, and a coarser scale of ours is repeated for them:

    weights                     stored as   blocks of   bits a weight
    ternary                     TQ2_0       256         2.0625
    int2..int4, binary          Q4_0        32          4.5
    int5..int8                  Q8_0        32          8.5
    mxfp4                       MXFP4       32          4.25
    rows of no multiple of 32   F16         1           16

Ternary weights whose rows are no multiple of 256 become Q4_0; integers whose rows no block divides become F16, as
llama.cpp's own quantizer has it. What stays float is F32. llama.cpp rounds a layer's
inputs to 8 bits in blocks: logits of random networks are within 2 % of the largest (llama-cpp-python 0.3.36). Gemma 2
and 3 have been read back by transformers' reader of GGUF, not run in llama.cpp, which has their windows, scales and
local rotary base in its code: what differs from those is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hwmodel.formats import Float, Int, Levels
from hwmodel.spec import PerGroup
from quantkit.bands import BANDS
from quantkit.decoder import Decoder, bias_of, refuse_inputs, weight_of
from quantkit.errors import InputError
from quantkit.files import new_file
from quantkit.gguf_tokens import add_tokenizer
from quantkit.qlayers import Plain, QLayer
from quantkit.qtensor import QTensor, dequantize, expand_scale, scale_codes, values_of

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}  # where llama.cpp's is another
ACCEPTED = "ternary, binary, int2 to int8 per tensor, row or group of a multiple of 32, and mxfp4"
_SIZES = {"TQ2_0": 256, "Q4_0": 32, "Q8_0": 32, "MXFP4": 32}
_PLAIN = ("F32", "F16")
_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_GEMMA_NORMS = _NORMS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMAS = {"gemma2": (2, 46), "gemma3_text": (6, 62)}
"""Every how many layers one sees all tokens, and the layers of the network that scales queries by hidden / heads."""
_BIASED = {"llama": tuple(_LAYERS), "mistral": tuple(_LAYERS), "qwen2": tuple(_LAYERS)[:3]}


class Stored(NamedTuple):
    """A tensor as the file holds it: data, uint8 (rows, bytes), float32 or float16; kind, GGUF's name of its type."""

    data: np.ndarray
    kind: str


def stored_as(q: QTensor) -> str | None:
    """The type that holds a weight's codes and scales, None if there is none."""
    columns = q.codes.shape[1]
    group = q.granularity.size if isinstance(q.granularity, PerGroup) else columns
    kinds: tuple[str, ...] = ()
    if q.fmt == Float(2, 1) and q.granularity == PerGroup(32, "e8m0"):
        kinds = ("MXFP4",)
    elif isinstance(q.fmt, Levels):
        kinds = ("TQ2_0", "Q4_0") if q.fmt.name == "ternary" else ("Q4_0",)
    elif isinstance(q.fmt, Int) and q.fmt.signed and 2 <= q.fmt.bits <= 8:
        kinds = ("Q4_0",) if q.fmt.bits <= 4 else ("Q8_0",)
    if kinds and columns % 32:
        return "F16"
    return next((kind for kind in kinds if group % _SIZES[kind] == 0 and columns % _SIZES[kind] == 0), None)


def check(decoder: Decoder) -> None:
    """InputError, naming what is accepted, for what cannot be exported."""
    if decoder.family not in FAMILIES:
        raise InputError(f"{decoder.family!r} is not exported to gguf; accepted: {', '.join(FAMILIES)}")
    refuse_inputs(decoder, "gguf")
    if decoder.family in _GEMMAS:
        _check_gemma(decoder)
    rope = _rope(decoder)
    known = ("default", "linear", "llama3", "dynamic")  # the last changes nothing within the context
    if rope.get("rope_type", "default") not in known:
        raise InputError(f"rotary positions {rope['rope_type']!r} are not exported; accepted: {', '.join(known)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("rotary positions of some channels are not exported; accepted: of all")
    for name, layer in decoder.layers.items():
        part = name.split(".", 3)[-1]
        if bias_of(layer) is not None and part not in _BIASED.get(decoder.family, ()):
            raise InputError(
                f"layer {name!r} has a bias (of a step such as tequila or bias_correction), which llama.cpp's "
                f"{decoder.family} has no place for; accepted: a step without"
            )
        if not isinstance(layer, QLayer):
            continue
        if layer.in_scale is not None:
            raise InputError(
                f"layer {name!r}: gguf has no place for factors on a layer's inputs, which a step put there because "
                "no layer before it could take them; accepted: layers without"
            )
        if layer.q is None:
            continue
        if not isinstance(layer.q, QTensor) or stored_as(layer.q) is None:
            held = BANDS if not isinstance(layer.q, QTensor) else f"{layer.q.fmt} per {layer.q.granularity}"
            raise InputError(
                f"layer {name!r}: {held}, in rows of {layer.weight.shape[1]}, is not one of gguf's types; accepted: "
                f"{ACCEPTED}; or leave the layer float: --layer '{name}=float/float'"
            )
        if scale_error(layer.q) > 2.0**-10:
            raise InputError(
                f"layer {name!r}: scales from {layer.q.scale.min():.3g} to {layer.q.scale.max():.3g} do not fit "
                "gguf's float16; accepted: 6.1e-05 to 65504"
            )


def _check_gemma(decoder: Decoder) -> None:
    """InputError for a Gemma 2 or 3 that is not as llama.cpp's code has it."""
    config, (every, largest) = decoder.config, _GEMMAS[decoder.family]
    width = decoder.head_dim
    if config.num_hidden_layers == largest:
        width = config.hidden_size // config.num_attention_heads
    pattern = ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(config.num_hidden_layers)]
    facts: list[tuple[str, Any, Any]] = [
        ("layer_types", list(config.layer_types), pattern),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, width),
        ("hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"),
    ]
    if decoder.family == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]
        facts.append(("rotary base of sliding layers", (local["rope_type"], local["rope_theta"]), ("default", 10000.0)))
    for name, here, there in facts:
        if here != there:
            raise InputError(
                f"{name} is {here}, which llama.cpp's {decoder.family} has no place for; accepted: {there}"
            )
    if decoder.family == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise InputError(
            "scores or logits that are not capped have no place in llama.cpp's gemma2; accepted: both caps"
        )
    if decoder.family == "gemma2" and not decoder.tied():
        raise InputError("llama.cpp's gemma2 has no head of its own; accepted: lm_head and embedding in float")


def _rope(decoder: Decoder) -> dict[str, Any]:
    """The parameters of rotary positions, of Gemma 3 those of the layers that see all tokens."""
    found: dict[str, Any] = decoder.config.rope_parameters or {}
    return found["full_attention"] if "full_attention" in found else found


def scale_error(q: QTensor) -> float:
    """The largest relative error of scales in float16, or of whole weights; 0 of MXFP4, whose scales fit."""
    kind = stored_as(q)
    if kind == "MXFP4":
        return 0.0
    if kind == "F16":
        w = dequantize(q)
        return float(((w.to(torch.float16).float() - w) / w).nan_to_num(0.0, math.inf, math.inf).abs().max())
    return float(((q.scale.to(torch.float16).float() - q.scale) / q.scale).abs().max())


def export(decoder: Decoder, path: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the file; what was written: its bytes, those that the accounted bits make, types by layer, which layers are
    `wider` than their formats for want of blocks, the scales' largest error, and the tokenizer.

    InputError before any work for what `check` refuses.
    """
    check(decoder)
    try:
        import gguf
    except ImportError:
        raise InputError("exporting to gguf needs the package: pip install 'quantkit[lm]'") from None
    arch = _NAMES.get(decoder.family, decoder.family)
    with new_file(path, force=force) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        kinds: dict[str, str] = {}
        _add_facts(writer, decoder)
        tokens = add_tokenizer(writer, decoder)
        for name, (data, kind) in _tensors(decoder, kinds).items():
            raw = None if kind in _PLAIN else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, data, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    errors = [scale_error(layer.q) for layer in decoder.quantized().values() if isinstance(layer.q, QTensor)]
    return {
        "bytes": path.stat().st_size,
        "accounted_bytes": -(-decoder.accounted_bits() // 8),
        "types": kinds,
        "wider": {
            name: f"{layer.q.fmt} as F16, its rows of {layer.weight.shape[1]} being no multiple of 32"
            for name, layer in decoder.quantized().items()
            if kinds[name] == "F16" and isinstance(layer.q, QTensor)
        },
        "scale_error": max(errors, default=0.0),
        "tokenizer": tokens,
    }


def _add_facts(writer: Any, decoder: Decoder) -> None:
    """The configuration in llama.cpp's names."""
    config, rope = decoder.config, _rope(decoder)
    writer.add_name(str(decoder.meta.get("source", "")) or decoder.family)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    if decoder.family in _GEMMAS:
        writer.add_sliding_window(window)
    elif window is not None:
        context = min(context, window)
    writer.add_context_length(context)
    if decoder.family == "gemma2":
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", float(rope["factor"]))


def _tensors(decoder: Decoder, kinds: dict[str, str]) -> dict[str, Stored]:
    """All tensors by llama.cpp's names; `kinds` learns the types of quantized layers."""
    found: dict[str, Stored] = {}

    def add(name: str, target: str, heads: int = 0) -> None:
        layer = decoder.layer(name)
        found[f"{target}.weight"] = stored(layer, heads)
        if isinstance(layer, QLayer) and layer.q is not None:
            kinds[name] = found[f"{target}.weight"].kind
        bias = bias_of(layer)
        if bias is None and decoder.family == "qwen2" and target.endswith(("attn_q", "attn_k", "attn_v")):
            bias = torch.zeros(len(layer.weight))  # llama.cpp wants them
        if bias is not None:
            found[f"{target}.bias"] = Stored(interleaved(bias.float(), heads).numpy(), "F32")

    add("model.embed_tokens", "token_embd")
    turned = decoder.family in ("llama", "mistral")
    rotated = {
        "self_attn.q_proj": decoder.config.num_attention_heads if turned else 0,
        "self_attn.k_proj": decoder.kv_heads if turned else 0,
    }
    for number in range(decoder.config.num_hidden_layers):
        at, to = f"model.layers.{number}", f"blk.{number}"
        for part, target in _LAYERS.items():
            add(f"{at}.{part}", f"{to}.{target}", rotated.get(part, 0))
        for part, target in (_GEMMA_NORMS if decoder.family in _GEMMAS else _NORMS).items():
            if f"{at}.{part}.weight" in decoder.tensors:
                found[f"{to}.{target}.weight"] = _norm(decoder, f"{at}.{part}.weight")
    found["output_norm.weight"] = _norm(decoder, "model.norm.weight")
    if not decoder.tied():
        add("lm_head", "output")
    rope = _rope(decoder)
    if rope.get("rope_type") == "llama3":
        exponents = torch.arange(0, decoder.head_dim, 2).double() / decoder.head_dim
        factors = float(rope["rope_theta"]) ** -exponents / decoder.tensor("model.rotary_emb.inv_freq").double()
        found["rope_freqs.weight"] = Stored(factors.float().numpy(), "F32")
    return found


def _norm(decoder: Decoder, name: str) -> Stored:
    weight = decoder.tensor(name).float()
    return Stored((weight + 1 if decoder.family in _GEMMAS else weight).numpy(), "F32")


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of `heads` rotated heads in llama.cpp's order, where a pair of channels lies side by side; 0: as they are.

    >>> interleaved(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows if heads == 0 else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def stored(layer: Plain | QLayer, heads: int = 0) -> Stored:
    """A layer's weight; heads: of rows that are rotated and so `interleaved`."""
    q = layer.q if isinstance(layer, QLayer) else None
    if not isinstance(q, QTensor):
        return Stored(interleaved(weight_of(layer), heads).contiguous().numpy(), "F32")
    kind = stored_as(q)
    assert kind is not None
    if kind == "F16":
        return Stored(interleaved(dequantize(q), heads).to(torch.float16).contiguous().numpy(), kind)
    rows, columns = q.codes.shape
    blocks = columns // _SIZES[kind]
    scale = expand_scale(q.scale.expand(rows, -1), columns, q.granularity).expand(-1, columns)[:, :: _SIZES[kind]]
    scale = interleaved(scale, heads).unsqueeze(-1)
    values = interleaved(q.codes if kind == "MXFP4" else values_of(q).to(torch.int8), heads)
    codes = values.reshape(rows, blocks, -1).numpy()
    d: np.ndarray = scale.to(torch.float16).numpy().view(np.uint8)
    parts: list[np.ndarray]
    match kind:
        case "Q8_0":
            parts = [d, codes.view(np.uint8)]
        case "Q4_0":
            parts = [d, _nibbles((codes + 8).astype(np.uint8))]
        case "MXFP4":
            parts = [scale_codes(scale, "e8m0").numpy(), _nibbles(codes.astype(np.uint8))]
        case _:
            pairs = (codes + 1).astype(np.uint8).reshape(rows, blocks, 2, 4, 32)
            held = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
            parts = [held.reshape(rows, blocks, -1), d]
    return Stored(np.concatenate(parts, axis=-1).reshape(rows, -1), kind)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit codes of a block with the second half in the high bits of the first."""
    first, second = np.split(codes, 2, axis=-1)
    packed: np.ndarray = first | second << 4
    return packed
