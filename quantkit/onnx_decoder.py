"""The ONNX graph of a language model, built from its configuration and layers, with weights of 2, 4 and 8 bits.

    input_ids (batch, n), attention_mask (batch, past + n), past_key_values.N.{key,value} (batch, heads, past, dim)
    -> logits (batch, n, vocabulary), present.N.{key,value} (batch, heads, past + n, dim)

the inputs and outputs that optimum and onnxruntime-genai name so. It starts with past = 0; texts of unequal length are
padded on either side, with zeros in the mask. Operators are standard ONNX (opset 24) except for the two that take
quantized weights.

A layer is one MatMulNBits. Codes are stored in the next width of 2, 4 or 8 bits that holds the format's values in
units of its smallest step, which is exact for integers up to 8 bits, ternary and binary weights, and minifloats such
as e2m1 or e2m3. Scales are stored once, for a row or group, and repeated by Expand for the blocks of the operator:
onnxruntime computes that when it loads the file; those of e8m0 are stored as exponents. Biases are the operator's own.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper
from torch import Tensor

import quantkit
from quantkit.bands import Bands
from quantkit.decoder import Decoder, bias_of, weight_of
from quantkit.nbits import Codes, codes_of
from quantkit.onnx_formats import Graph
from quantkit.qlayers import QLayer
from quantkit.qtensor import QTensor

OPSET = 24  # has Attention, RotaryEmbedding and RMSNormalization
_MS = "com.microsoft"
_GEMMAS = ("gemma", "gemma2", "gemma3_text")  # norms multiply with 1 + w, embeddings with the root of their width
_OUTSIDE = ("post_attention_layernorm", "post_feedforward_layernorm")
_INSIDE = ("input_layernorm", "post_attention_layernorm")
_AROUND = (("input_layernorm", "pre_feedforward_layernorm"), _OUTSIDE)
_NORMS = {"gemma2": _AROUND, "gemma3_text": _AROUND, "olmo2": (("", ""), _OUTSIDE)}
"""Norms (in front of, behind) attention and perceptron where they are not those of Llama, (_INSIDE, ("", ""))."""


def ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary positions: none of GPT-2, of Gemma 3 those of each kind of layer, else one."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [rope for rope in found.values() if isinstance(rope, dict)]
    return each or ([found] if found else [])


def turned_by(config: Any) -> float:
    """What cosines and sines are multiplied by, which is 1 but for YaRN (arXiv 2309.00071, section 3.4)."""
    (rope,) = ropes(config) if len(ropes(config)) == 1 else ({},)
    if rope.get("rope_type") != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def size(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return size(rope["mscale"]) / size(rope["mscale_all_dim"])
    return size(1.0)


def activation(config: Any) -> str:
    """The name of the activation in the perceptrons."""
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if getattr(config, key, None):
            return str(getattr(config, key))
    return ""


def packaged(graph: GraphProto) -> ModelProto:
    """The model of a graph, with the operator sets that it uses."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MS, 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=10, producer_name="quantkit", producer_version=quantkit.__version__
    )


class Builder:
    """The graph as it grows. Values are named after transformers' modules."""

    def __init__(self, decoder: Decoder, level: int) -> None:
        self.of, self.level = decoder, level
        self.config = decoder.config
        self.graph = Graph()
        self.op, self.constant = self.graph.op, self.graph.constant

    def model(self) -> ModelProto:
        """The whole model."""
        self._places()
        h = self._gpt2() if self.of.family == "gpt2" else self._llama()
        logits = self.scaled(
            self.linear(h, "lm_head"), 1 / getattr(self.config, "logits_scaling", 1.0), "logits.scaled"
        )
        self.op("Identity", [self.capped(logits)], "logits")
        dims: list[Any] = ["batch", self.of.kv_heads, "past", self.of.head_dim]
        value = helper.make_tensor_value_info
        inputs = [value("input_ids", TensorProto.INT64, ["batch", "n"])]
        inputs.append(value("attention_mask", TensorProto.INT64, ["batch", "total"]))
        outputs = [value("logits", TensorProto.FLOAT, ["batch", "n", self.config.vocab_size])]
        for number in range(self.config.num_hidden_layers):
            for kind in ("key", "value"):
                inputs.append(value(f"past_key_values.{number}.{kind}", TensorProto.FLOAT, dims))
                outputs.append(value(f"present.{number}.{kind}", TensorProto.FLOAT, [*dims[:2], "total", dims[3]]))
        name = str(self.of.meta.get("source", "")) or "decoder"
        graph = helper.make_graph(self.graph.nodes, name, inputs, outputs, self.graph.initializers)
        made = packaged(graph)
        facts = {
            "target": "onnx-nbits",
            "family": self.of.family,
            "accuracy_level": str(self.level),
            "context": str(self.config.max_position_embeddings),
            "source": str(self.of.meta.get("source", "")),
            "source_sha256": str(self.of.meta.get("sha256", "")),
            "recipe": json.dumps(self.of.meta.get("recipe"), sort_keys=True),
        }
        helper.set_model_props(made, facts)
        return made

    def _places(self) -> None:
        """Positions of the new tokens (batch, n), and who may look at whom, as (batch, 1, n, total) booleans."""
        i64 = TensorProto.INT64
        one, end = self.constant(1, "one", i64), self.constant([2**62], "end", i64)
        axis, rows = self.constant([1], "axis", i64), self.constant([1, 2], "mask.axes", i64)
        total = self.op("Gather", [self.op("Shape", ["attention_mask"], "mask.shape"), one], "total")
        new = self.op("Gather", [self.op("Shape", ["input_ids"], "ids.shape"), one], "new")
        past = self.op("Sub", [total, new], "past")
        first = self.op("Reshape", [past, axis], "past.first")
        counted = self.op("Sub", [self.op("CumSum", ["attention_mask", one], "mask.sum"), one], "mask.places")
        known = self.op("Max", [counted, self.constant(0, "zero", i64)], "places")
        self.places = self.op("Slice", [known, first, end, axis], "position_ids")
        key = self.op("Range", [self.constant(0, "key.first", i64), total, one], "key")
        query = self.op("Unsqueeze", [self.op("Range", [past, total, one], "query"), axis], "query.column")
        real = self.op(
            "Unsqueeze", [self.op("Cast", ["attention_mask"], "mask.real", to=TensorProto.BOOL), rows], "real"
        )
        self.masks: dict[int | None, str] = {
            None: self.op("And", [real, self.op("LessOrEqual", [key, query], "causal")], "mask")
        }
        for window in sorted({w for n in range(self.config.num_hidden_layers) if (w := self._window(n)) is not None}):
            oldest = self.op("Sub", [query, self.constant(window, "window", i64)], "oldest")
            near = self.op("Greater", [key, oldest], "near")
            self.masks[window] = self.op("And", [self.masks[None], near], "mask.near")

    # Llama and its kin

    def _llama(self) -> str:
        """Final hidden states, (batch, n, hidden)."""
        self._rotations()
        h = self.gathered("model.embed_tokens", "input_ids")
        if self.of.family in _GEMMAS:
            h = self.op("Mul", [h, self.constant(self.config.hidden_size**0.5, "embedding_scale")], "embedded")
        h = self.scaled(h, getattr(self.config, "embedding_multiplier", 1.0), "embedded")
        inside, outside = _NORMS.get(self.of.family, (_INSIDE, ("", "")))
        added = ""
        for number in range(self.config.num_hidden_layers):
            at = f"model.layers.{number}"
            for part, before, behind in zip((self.attended, self.perceived), inside, outside, strict=True):
                if before:
                    x, h = self.rms(h, added, f"{at}.{before}")
                else:
                    x = h = self.op("Add", [h, added], f"{at}.in") if added else h
                added = part(x, number, at)
                if behind:
                    added = self.normalized(added, f"{at}.{behind}")
                added = self.scaled(added, getattr(self.config, "residual_multiplier", 1.0), f"{at}.added")
        return self.rms(h, added, "model.norm")[0]

    def attended(self, x: str, number: int, at: str) -> str:
        """What attention makes of its inputs."""
        at = f"{at}.self_attn"
        heads = {"q": self.config.num_attention_heads, "k": self.of.kv_heads, "v": self.of.kv_heads}
        if self.of.family == "phi3":
            widths = [count * self.of.head_dim for count in heads.values()]
            made = dict(zip(heads, self.split(self.linear(x, f"{at}.qkv_proj"), widths, at, list(heads)), strict=True))
        else:
            made = {part: self.linear(x, f"{at}.{part}_proj") for part in heads}
        for part in "qk":
            if self.of.family in ("qwen3", "gemma3_text"):
                made[part] = self.head_norm(made[part], f"{at}.{part}_norm", heads[part])
            elif self.of.family == "olmo2":
                made[part] = self.normalized(made[part], f"{at}.{part}_norm")
            if self.of.family != "smollm3" or self.config.no_rope_layers[number]:
                made[part] = self.rotated(made[part], f"{at}.{part}", heads[part], number)
        y = self.attention(made["q"], made["k"], made["v"], number, at.removesuffix(".self_attn"))
        return self.linear(y, f"{at}.o_proj")

    def perceived(self, x: str, number: int, at: str) -> str:
        """What the gated perceptron makes of its inputs."""
        at = f"{at}.mlp"
        if self.of.family == "phi3":
            widths = [self.config.intermediate_size] * 2
            gate, up = self.split(self.linear(x, f"{at}.gate_up_proj"), widths, at, ["gate", "up"])
            return self.linear(self.op("Mul", [self.activate(gate, f"{at}.act"), up], f"{at}.gated"), f"{at}.down_proj")
        gate = self.activate(self.linear(x, f"{at}.gate_proj"), f"{at}.act")
        up = self.op("Mul", [gate, self.linear(x, f"{at}.up_proj")], f"{at}.gated")
        return self.linear(up, f"{at}.down_proj")

    def split(self, x: str, widths: list[int], at: str, names: list[str]) -> list[str]:
        """Channels apart."""
        parts, sizes = [f"{at}.{n}.apart" for n in names], self.constant(widths, f"{at}.widths", TensorProto.INT64)
        self.graph.nodes.append(helper.make_node("Split", [x, sizes], parts, name=f"{at}.split", axis=2))
        return parts

    def scaled(self, x: str, factor: float, name: str) -> str:
        """x times a constant, x itself where that is 1."""
        return x if factor == 1 else self.op("Mul", [x, self.constant(factor, f"{name}.factor")], name)

    def capped(self, logits: str) -> str:
        """cap tanh(logits / cap), where the family caps them."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is None:
            return logits
        height = self.constant(cap, "cap")
        squashed = self.op("Tanh", [self.op("Div", [logits, height], "logits.small")], "logits.squashed")
        return self.op("Mul", [squashed, height], "logits.capped")

    def _rotations(self) -> None:
        """Cosines and sines of all positions by the prefix of their frequencies' name, computed at loading."""
        ends = [self.constant(np.float32(v), f"positions.{v}") for v in (0, self.config.max_position_embeddings, 1)]
        positions = self.op("Range", ends, "positions")
        column = self.op("Unsqueeze", [positions, self.constant([1], "column", TensorProto.INT64)], "positions.column")
        self.turns: dict[str, list[str]] = {}
        for prefix in sorted({self._prefix(n) for n in range(self.config.num_hidden_layers)}):
            inv_freq = self.of.tensor(f"model.rotary_emb.{prefix}inv_freq").float()
            angles = self.op("Mul", [column, self.constant(inv_freq.numpy(), f"{prefix}inv_freq")], f"{prefix}angles")
            turns = [self.op(kind, [angles], f"{prefix}{kind.lower()}") for kind in ("Cos", "Sin")]
            if (factor := turned_by(self.config)) != 1:
                size = self.constant(np.float32(factor), "turns.size")
                turns = [self.op("Mul", [turn, size], f"{turn}.sized") for turn in turns]
            self.turns[prefix] = turns

    def _prefix(self, number: int) -> str:
        """What the name of a layer's rotary frequencies starts with: its kind, where kinds turn differently."""
        return f"{self.config.layer_types[number]}_" if self.of.family == "gemma3_text" else ""

    def rms(self, h: str, added: str, name: str) -> tuple[str, str]:
        """(the normalized sum h + added, the sum itself)."""
        if added:
            h = self.op("Add", [h, added], f"{name}.in")
        return self.normalized(h, name), h

    def normalized(self, x: str, name: str) -> str:
        """x divided by its root mean square and multiplied with a weight."""
        weight = self.of.tensor(f"{name}.weight").float()
        gamma = self.constant((weight + 1 if self.of.family in _GEMMAS else weight).numpy(), f"{name}.weight")
        return self.op("RMSNormalization", [x, gamma], f"{name}.out", axis=-1, epsilon=float(self.config.rms_norm_eps))

    def head_norm(self, x: str, name: str, heads: int) -> str:
        """Each head's channels normalized."""
        apart = self.constant([0, 0, heads, self.of.head_dim], f"{name}.heads", TensorProto.INT64)
        together = self.constant([0, 0, heads * self.of.head_dim], f"{name}.together", TensorProto.INT64)
        x = self.normalized(self.op("Reshape", [x, apart], f"{name}.in"), name)
        return self.op("Reshape", [x, together], f"{name}.flat")

    def rotated(self, x: str, name: str, heads: int, number: int) -> str:
        """Each head's channels turned by the angles of their positions."""
        return self.op("RotaryEmbedding", [x, *self.turns[self._prefix(number)], self.places], name, num_heads=heads)

    # GPT-2

    def _gpt2(self) -> str:
        """Final hidden states, (batch, n, hidden)."""
        place = self.gathered("transformer.wpe", self.places)
        h = self.op("Add", [self.gathered("transformer.wte", "input_ids"), place], "embedded")
        for number in range(self.config.num_hidden_layers):
            at = f"transformer.h.{number}"
            together = self.linear(self.layer_norm(h, f"{at}.ln_1"), f"{at}.attn.c_attn")
            parts = [f"{at}.attn.{p}" for p in "qkv"]
            self.graph.nodes.append(
                helper.make_node("Split", [together], parts, name=f"{at}.qkv", axis=2, num_outputs=3)
            )
            y = self.attention(parts[0], parts[1], parts[2], number, at)
            h = self.op("Add", [h, self.linear(y, f"{at}.attn.c_proj")], f"{at}.attended")
            x = self.linear(self.layer_norm(h, f"{at}.ln_2"), f"{at}.mlp.c_fc")
            x = self.linear(self.activate(x, f"{at}.mlp.act"), f"{at}.mlp.c_proj")
            h = self.op("Add", [h, x], f"{at}.out")
        return self.layer_norm(h, "transformer.ln_f")

    def layer_norm(self, x: str, name: str) -> str:
        """Layer normalization."""
        parts = [
            self.constant(self.of.tensor(f"{name}.{p}").float().numpy(), f"{name}.{p}") for p in ("weight", "bias")
        ]
        eps = float(self.config.layer_norm_epsilon)
        return self.op("LayerNormalization", [x, *parts], f"{name}.out", axis=-1, epsilon=eps)

    # both

    def attention(self, q: str, k: str, v: str, number: int, at: str) -> str:
        """Attention of the new queries over past and new keys; the presents are outputs."""
        past, present = (
            [f"{side}.{number}.{kind}" for kind in ("key", "value")] for side in ("past_key_values", "present")
        )
        name = f"{at}.attention"
        inputs = [q, k, v, self.masks[self._window(number)], *past]
        options: dict[str, Any] = {"q_num_heads": self.config.num_attention_heads, "kv_num_heads": self.of.kv_heads}
        if self.of.family in ("gemma2", "gemma3_text"):
            options["scale"] = float(self.config.query_pre_attn_scalar) ** -0.5
        elif self.of.family == "granite":
            options["scale"] = float(self.config.attention_multiplier)
        if self.of.family == "gemma2" and self.config.attn_logit_softcapping is not None:
            options["softcap"] = float(self.config.attn_logit_softcapping)
        self.graph.nodes.append(helper.make_node("Attention", inputs, [name, *present], name=name, **options))
        return name

    def _window(self, number: int) -> int | None:
        """How many of the last keys a layer looks at, None for all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if window is None or (kinds is not None and kinds[number] != "sliding_attention"):
            return None
        return int(window) if kinds is not None or self.of.family in ("mistral", "phi3") else None

    def activate(self, x: str, name: str) -> str:
        """The perceptron's activation."""
        kind = activation(self.config)
        if kind == "silu":
            return self.op("Mul", [x, self.op("Sigmoid", [x], f"{name}.sigmoid")], name)
        return self.op("Gelu", [x], name, approximate="none" if kind == "gelu" else "tanh")

    def gathered(self, name: str, ids: str) -> str:
        """Rows of an embedding, with its bias if it has one."""
        layer = self.of.layer(name)
        q = layer.q if isinstance(layer, QLayer) else None
        if isinstance(q, QTensor):
            codes = codes_of(q)
            block = codes.block
            options: dict[str, Any] = {"bits": codes.bits, "block_size": block, "quantize_axis": 1, "gather_axis": 0}
            row = codes.packed(block).reshape(len(codes.codes), -1)[:, : q.codes.shape[1] * codes.bits // 8]
            inputs = [self.constant(row, f"{name}.codes", TensorProto.UINT8), ids, *self.scales(codes, block, name)]
            y = self.op("GatherBlockQuantized", inputs, f"{name}.out", domain=_MS, **options)
        else:
            y = self.op("Gather", [self.constant(weight_of(layer).numpy(), f"{name}.weight"), ids], f"{name}.out")
        bias = bias_of(layer)
        return y if bias is None else self.op("Add", [y, self.constant(bias.numpy(), f"{name}.bias")], f"{name}.biased")

    def linear(self, x: str, name: str) -> str:
        """A linear layer."""
        layer = self.of.layer(name)
        bias = bias_of(layer)
        if isinstance(layer, QLayer) and layer.in_scale is not None:
            x = self.op("Mul", [x, self.constant(layer.in_scale.numpy(), f"{name}.in_scale")], f"{name}.scaled")
        q = layer.q if isinstance(layer, QLayer) else None
        if isinstance(q, QTensor):
            return self.product(x, codes_of(q), name, bias)
        if isinstance(q, Bands):
            y = self.bands(x, q, name)
        elif name == "lm_head" and self.of.tied():
            table = next(
                t.name for t in self.graph.initializers if t.name.endswith(("embed_tokens.weight", "wte.weight"))
            )
            y = self.op("MatMul", [x, self.op("Transpose", [table], f"{name}.weight", perm=[1, 0])], f"{name}.product")
        else:
            weight = self.constant(weight_of(layer).T.numpy(), f"{name}.weight")
            y = self.op("MatMul", [x, weight], f"{name}.product")
        return y if bias is None else self.op("Add", [y, self.constant(bias.numpy(), f"{name}.bias")], f"{name}.out")

    def product(self, x: str, codes: Codes, name: str, bias: Tensor | None = None) -> str:
        """x times the transposed matrix, and the bias."""
        rows, columns = codes.codes.shape
        block = codes.block
        inputs = [x, self.constant(codes.packed(block), f"{name}.codes", TensorProto.UINT8)]
        inputs += self.scales(codes, block, name)
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self.constant(bias.numpy(), f"{name}.bias")]
        options: dict[str, Any] = {"K": columns, "N": rows, "bits": codes.bits, "block_size": block}
        return self.op("MatMulNBits", inputs, f"{name}.out", domain=_MS, accuracy_level=self.level, **options)

    def scales(self, codes: Codes, block: int, name: str) -> list[str]:
        """Scales repeated for every block, and zero points where they are not the operator's own."""
        i64 = TensorProto.INT64
        rows, columns = codes.codes.shape
        blocks, own = -(-columns // block), codes.scale.shape[1]
        each = (
            self.powers(codes.scale[..., None], name)
            if codes.pow2
            else self.constant(codes.scale[..., None], f"{name}.scale")
        )
        repeats = blocks if codes.group is None else codes.group // block
        times = self.constant([rows, own, repeats], f"{name}.times", i64)
        shape = self.constant([rows, own * repeats], f"{name}.blocks", i64)
        found = [self.op("Reshape", [self.op("Expand", [each, times], f"{name}.repeated"), shape], f"{name}.scales")]
        if own * repeats > blocks:  # the last group of a row is shorter
            ends = {"from": 0, "to": blocks, "axis": 1}
            bounds = [self.constant([value], f"{name}.blocks.{key}", i64) for key, value in ends.items()]
            found = [self.op("Slice", [*found, *bounds], f"{name}.scales.cut")]
        if (codes.zero != 2 ** (codes.bits - 1)).any():
            byte = sum(codes.zero << at for at in range(0, 8, codes.bits))
            width = self.constant([rows, -(-blocks * codes.bits // 8)], f"{name}.zero_width", i64)
            found.append(
                self.op("Expand", [self.constant(byte, f"{name}.zero", TensorProto.UINT8), width], f"{name}.zeros")
            )
        return found

    def powers(self, scale: np.ndarray, name: str) -> str:
        """Powers of two, stored as exponents of 8 bits."""
        exponents = self.constant(np.frexp(scale)[1] - 1, f"{name}.exponents", TensorProto.INT8)
        wide = self.op("Cast", [exponents], f"{name}.exponents.float", to=TensorProto.FLOAT)
        return self.op("Pow", [self.constant(2.0, f"{name}.two"), wide], f"{name}.scale")

    def bands(self, x: str, q: Bands, name: str) -> str:
        """The product with a matrix in bands, without bias, as `quantkit.bands.product` has it; signs take 2 bits."""
        parts = []
        if q.codes.shape[1]:
            high = self.op("Gather", [x, self.indices(q.salient, f"{name}.salient")], f"{name}.high", axis=-1)
            salient = Codes(q.codes.numpy(), 4, q.zero.numpy(), q.scale.numpy())
            parts.append(self.product(high, salient, f"{name}.salient"))
        if q.signs.shape[1]:
            low = self.op("Gather", [x, self.indices(~q.salient, f"{name}.rest")], f"{name}.rest.in", axis=-1)
            low = self.op("Mul", [low, self.constant(q.c[~q.salient].numpy(), f"{name}.c")], f"{name}.low")
            signs = Codes(1 + 2 * q.signs.numpy().astype(np.uint8), 2, np.full((1, 1), 2, np.uint8), q.a.numpy())
            parts.append(self.product(low, signs, f"{name}.rest"))
            last = self.constant([-1], f"{name}.last", TensorProto.INT64)
            total = self.op("ReduceSum", [low, last], f"{name}.sum", keepdims=1)
            parts.append(self.op("Mul", [total, self.constant(q.b[:, 0].numpy(), f"{name}.b")], f"{name}.shift"))
        return parts[0] if len(parts) == 1 else self.op("Sum", parts, f"{name}.bands")

    def indices(self, chosen: Tensor, name: str) -> str:
        """The numbers of the columns that are chosen."""
        return self.constant(chosen.nonzero()[:, 0].numpy(), name, TensorProto.INT64)
