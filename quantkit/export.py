"""Export: a `Model` as one ONNX file that plain onnxruntime runs.

Input `obs` (batch, *obs_shape), the normalizer inside, output `actions` (batch, ...): the
network's raw outputs, or the environment's actions with `postprocess`. A module that is not a
policy has input `input` and output `output`; it is captured as a graph first (`quantkit.capture`),
and the graph is translated node by node (`quantkit.export_graph`). The first dimension of the input
is the batch and has no fixed size; targets for FPGA tools fix it to 1.

Of a recurrent network one step in time is exported (`quantkit.stepwise`): behind `input` come its states (batch,
size), and behind `output` the states of the next step, `state` and `next_state`, or `state_0`, ... where there are
several. The first step takes zeros. The metadata say under `states` whose each is. A recurrent policy has `obs` and
`actions` in the place of `input` and `output`.

Five targets. `qonnx` and `finn` are for FPGA tools and described in `quantkit.export_qonnx`,
`qcdq` in `quantkit.export_qcdq`. The other two are QDQ (see `quantkit.onnx_formats`) and differ
in where scales are multiplied:

qdq: after the sum of products, as in `quantkit.qlayers` and in hardware. DequantizeLinear has
    scale 1 and the sums are of whole numbers, exact and so the same in any runtime and any order
    of summation. Where they may exceed 2^24 a linear layer sums in float64 (Cast around Gemm), as
    the torch layer does; onnxruntime has no such convolution, whose sums are then rounded. Products
    of two activations always sum in float64.
qdq-real: inside DequantizeLinear, as converters to other runtimes expect it. The sums are
    rounded; a value that falls on the boundary between two grid values may go the other way.

Four things that onnxruntime (1.31, default optimizations) does to a QDQ graph would change its
numbers, and the graph is shaped so that none of them applies:

- MatMul between two DequantizeLinear becomes an 8-bit integer kernel, which fails outright with
  blocked scales and, by onnxruntime's documentation, saturates on x86 processors without VNNI.
- MatMul with 4- or 8-bit weights and a float input becomes a kernel that rounds the input to 8
  bits, an error of 0.5 % of the largest output. Hence Gemm and Conv, which are left alone.
- A float bias inside Gemm or Conv is rounded to a multiple of input scale * weight scale; with 4
  bits that moved the outputs of a third of the states. A bias (or an Add) as *second* operand is
  moved inside. Hence an Add of its own with the bias first.
- The factor of a Conv's Mul is folded into the weights if it is the second operand, and the sums
  are no longer whole numbers. Hence it comes first.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper
from torch import fx, nn

import quantkit
from quantkit import export_graph, export_qcdq, export_qonnx, onnx_blocks, stepwise
from quantkit.bands import Bands
from quantkit.capture import captured
from quantkit.errors import InputError, one_line
from quantkit.export_layers import Target, layer_nodes
from quantkit.export_ops import LATER
from quantkit.export_walk import TYPES
from quantkit.files import check_new, new_file
from quantkit.model import Model
from quantkit.onnx_formats import DOMAIN, OPSET, Graph
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import BlockAct, QLayer
from quantkit.specs import may_have_design

IR_VERSION = 10  # the one released with opset 21
_OLD_IR_VERSION = 8  # the first with model-local functions; released before opset 21, for older tools
_LARGEST_NORMALIZER = 4096  # numbers per statistic that the metadata repeat in full


def export_onnx(
    model: Model, path: Path, *, to: Target = "qdq", postprocess: bool = False, overwrite: bool = False
) -> None:
    """Write `model` to `path`; nothing is written unless the file passes onnx's checker and runs in onnxruntime.

    postprocess: the output is the environment's actions (`Head.actions`) and not the network's
    outputs. Raises InputError for a format that the target cannot carry and a layer that ONNX
    export does not know (both named), an existing file without `overwrite`, and a folder that
    cannot be written.
    """
    path, model = Path(path), _followed(model)
    check_new(path, force=overwrite)
    data = build_onnx(model, to=to, postprocess=postprocess).SerializeToString()
    with new_file(path, force=overwrite) as temporary:
        temporary.write_bytes(data)
        _try(temporary, path, model)


def _try(path: Path, wanted: Path, model: Model) -> None:
    """Run the file once; InputError in the name of `wanted` if onnxruntime does not take it."""
    try:
        session = open_session(path)
        entry, *states = session.get_inputs()
        first = stepwise.observation(model)[:1] if states else model.example[:1]
        feed = {state.name: np.zeros((1, *state.shape[1:]), input_dtype(state.type)) for state in states}
        session.run(None, {entry.name: first.numpy().astype(input_dtype(entry.type)), **feed})
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise InputError(f"{wanted}: not written, onnxruntime does not run this network ({one_line(error)})") from None


def input_dtype(kind: str) -> np.dtype:
    """The numpy type of an onnxruntime input's type.

    >>> input_dtype("tensor(uint8)")
    dtype('uint8')
    """
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on one CPU thread with the default optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; onnxruntime would print them too
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check(model: Model, to: Target, postprocess: bool = False) -> Net:
    """What is translated, `network_of`; InputError for what the target cannot carry."""
    if to not in get_args(Target):
        raise InputError(f"unknown export target {to!r}; accepted: {', '.join(get_args(Target))}")
    bands = [name for name, layer in model.qlayers().items() if isinstance(layer.q, Bands)]
    if bands and to != "qdq":
        raise InputError(
            f"layer {bands[0]!r}: target {to} cannot carry columns of 4 bits and of 1 bit in one weight; "
            "accepted: target qdq, which holds it dense in float"
        )
    if postprocess and not isinstance(model.module, Policy):
        raise InputError("postprocess needs a policy: this module has no head that says what its outputs mean")
    for name, part in model.quantizers().items():
        if isinstance(part.act, BlockAct):
            onnx_blocks.check(part.act, name, to)
    net = network_of(model, to)
    if isinstance(net, fx.GraphModule):
        export_graph.check(net)
    elif isinstance(net, stepwise.Step):
        export_graph.check(net.graph, several=True)
        if to == "qonnx" or to == "finn":
            raise InputError(f"target {to} has no recurrent networks; accepted: qdq, qdq-real, qcdq")
    if to == "qonnx" or to == "finn":
        export_qonnx.check(model, to, postprocess, net if isinstance(net, list) else [])
    elif to == "qcdq":
        export_qcdq.check(model)
    return net


def build_onnx(model: Model, *, to: Target = "qdq", postprocess: bool = False) -> ModelProto:
    """The ONNX model, checked by onnx's full check; `export_onnx` writes it."""
    model = _followed(model)
    net = check(model, to, postprocess)
    policy = model.module if isinstance(model.module, Policy) else None
    fpga = to in ("qonnx", "finn")
    graph = Graph(dot="_" if fpga else ".")  # hls4ml changes the dots of some names and not of others
    source, target = ("obs", "actions") if policy else ("input", "output")
    shape = list(policy.obs_shape if policy else model.example.shape[1:])
    kind = TYPES[model.example.dtype]
    with torch.inference_mode():
        result = model.module(model.example[:1])
    out_kind, out_shape = int(TYPES[result.dtype]), list(result.shape[1:])
    batch: int | str = 1 if fpga else "batch"
    out_batch: list[Any] = [batch]
    values: dict[str, str] = {}
    if isinstance(net, stepwise.Step):
        return _step(graph, net, model, to, postprocess)
    if isinstance(net, fx.GraphModule):
        graph.four_bits = False
        (last,), walk = export_graph.translate(net, graph, [source], to, [model.example])
        x = walk.names[last]
        out_batch, out_shape = [], list(result.shape) if fpga else walk.output_shape(last)
        values = walk.named()
    else:
        kind = TensorProto.UINT8 if kind == TensorProto.UINT8 else TensorProto.FLOAT
        x = graph.op("Cast", [source], "stage.float", to=TensorProto.FLOAT) if kind == TensorProto.UINT8 else source
        if policy:
            x = _input_stage(graph, x, export_qonnx.stage_for(policy) if fpga else policy.stage)
        x = _chain(graph, x, net, to)
    if policy and postprocess:
        x, out_kind, out_shape = _head(graph, x, policy.head)
    if fpga and graph.nodes and graph.nodes[-1].output[0] == x:
        graph.nodes[-1].output[0] = target  # hls4ml loses the output behind an Identity
        values = {node: target if tensor == x else tensor for node, tensor in values.items()}
    else:
        graph.nodes.append(helper.make_node("Identity", [x], [target], name=target))
    entry = helper.make_tensor_value_info(source, kind, [batch, *shape])
    leaving = helper.make_tensor_value_info(target, out_kind, [*out_batch, *out_shape])
    return _proto(graph, [entry], [leaving], model, to, postprocess, values)


def _step(graph: Graph, step: stepwise.Step, model: Model, to: Target, postprocess: bool) -> ModelProto:
    """The file of one step of a recurrent network."""
    policy = model.module if isinstance(model.module, Policy) else None
    names = [f"state_{i}" for i in range(len(step.states))] if len(step.states) > 1 else ["state"]
    sources, targets = ["obs" if policy else "input", *names], [f"next_{name}" for name in names]
    targets.insert(0, "actions" if policy else "output")
    graph.four_bits = False
    nodes, walk = export_graph.translate(step.graph, graph, sources, to, step.examples)
    values = walk.named()
    entries = [
        helper.make_tensor_value_info(name, TYPES[example.dtype], ["batch", *example.shape[1:]])
        for name, example in zip(sources, step.examples, strict=True)
    ]
    leaving = []
    for node, target in zip(nodes, targets, strict=True):
        x, kind, shape = walk.names[node], int(TYPES[walk.facts[node].dtype or torch.float32]), walk.output_shape(node)
        if policy and postprocess and target == targets[0]:
            x, kind, width = _head(graph, x, policy.head)
            shape = ["batch", *width]
        graph.nodes.append(helper.make_node("Identity", [x], [target], name=target))
        leaving.append(helper.make_tensor_value_info(target, kind, shape))
    facts = [{"input": name, "output": f"next_{name}", **asdict(s)} for name, s in zip(names, step.states, strict=True)]
    return _proto(graph, entries, leaving, model, to, postprocess, values, {"states": canonical(facts)})


def _proto(
    graph: Graph,
    entries: list[Any],
    leaving: list[Any],
    model: Model,
    to: Target,
    postprocess: bool,
    values: dict[str, str],
    more: dict[str, str] | None = None,
) -> ModelProto:
    """The nodes as a model with its metadata, checked; values: tensors of the file by node; more: further metadata."""
    fpga = to in ("qonnx", "finn")
    proto = helper.make_graph(
        graph.nodes,
        _name(model),
        entries,
        leaving,
        graph.initializers,
        doc_string=_doc(model, to, postprocess),
    )
    opset = _opset(graph, to)
    opsets = [helper.make_opsetid("", opset)]
    for function in graph.functions.values():
        function.opset_import[0].version = opset  # what they use has not changed since 13, and a mixture is refused
    if graph.functions:
        opsets.append(helper.make_opsetid(export_qonnx.QONNX if fpga else DOMAIN, 1))
    result = helper.make_model(
        proto,
        opset_imports=opsets,
        functions=list(graph.functions.values()),
        ir_version=IR_VERSION if opset == OPSET else _OLD_IR_VERSION,
        producer_name="quantkit",
        producer_version=quantkit.__version__,
        doc_string=_doc(model, to, postprocess),
    )
    facts = metadata(model, to, postprocess) | {"opset": str(opset)} | (more or {})
    helper.set_model_props(result, facts | ({"values": canonical(values)} if values else {}))
    onnx.checker.check_model(result, full_check=True)
    return onnx.shape_inference.infer_shapes(result) if fpga or to == "qcdq" else result


def _followed(model: Model) -> Model:
    """The model with a module that is a policy or, if it can be followed, a graph."""
    return model if isinstance(model.module, Policy | fx.GraphModule) else captured(model)


Net = list[tuple[str, nn.Module]] | fx.GraphModule | stepwise.Step


def network_of(model: Model, to: Target) -> Net:
    """What is translated: the layers of a policy, and for finn of any chain, by name; otherwise the captured graph.

    Of a recurrent network its step.

    InputError, with the reason, for a network that could not be followed or is no chain.
    """
    module = model.module
    if isinstance(module, Policy) and not module.recurrent:
        return [(f"net.{name}", layer) for name, layer in module.net.named_children()]
    if stepwise.is_recurrent(module):
        return stepwise.step_graph(model)
    if not isinstance(module, fx.GraphModule):
        reason = model.meta.get("untraced", "it was quantized without being captured")
        raise InputError(
            f"this network cannot be exported, since its graph is not known: {reason}; accepted: what "
            "torch.export follows, with no loop over time but that of nn.GRU and nn.LSTM"
        )
    return export_graph.as_chain(module) if to == "finn" else module


def _chain(graph: Graph, x: str, layers: list[tuple[str, nn.Module]], to: Target) -> str:
    """Nodes of layers in a chain; for finn a Flatten comes behind the next quantizer, which FINN wants behind ReLU."""
    flatten = ""
    for name, layer in layers:
        if to == "finn" and isinstance(layer, nn.Flatten):
            flatten = name
        else:
            x = layer_nodes(graph, x, layer, name, to, flatten=flatten)
            flatten = "" if isinstance(layer, QLayer) else flatten
    return graph.op("Flatten", [x], f"{flatten}.out", axis=1) if flatten else x


def _opset(graph: Graph, to: Target) -> int:
    """21 for QDQ with 4-bit types; 13 for older tools, or 20 for them where GELU, normalization or a mean need it."""
    if to in ("qdq", "qdq-real"):
        return OPSET
    return 20 if any(node.op_type in LATER for node in graph.nodes) else export_qonnx.OPSET


def metadata(model: Model, to: Target, postprocess: bool) -> dict[str, str]:
    """What the file says about itself: text by name, JSON where a value has structure."""
    policy = model.module if isinstance(model.module, Policy) else None
    facts: dict[str, Any] = {
        "recipe": model.meta.get("recipe"),
        "env": None if model.env is None else asdict(model.env),
        "observation_space": model.meta.get("observation_space"),
        "action_space": model.meta.get("action_space"),
        "fields": [asdict(field) for field in policy.fields] if policy and policy.fields else None,
        "head": None if policy is None else asdict(policy.head),
        "normalizer": None if policy is None else _normalizer(policy.stage),
        "hardware": _hardware(model),
        "postprocess": postprocess,
    }
    texts = {
        "quantkit_version": quantkit.__version__,
        "target": to,
        "output": "actions of the environment" if postprocess else "raw outputs of the network",
        "kind": str(model.meta.get("kind", "module" if policy is None else "policy")),
        "algo": str(model.meta.get("algo", "")),
        "source": str(model.meta.get("source", "")),
        "source_sha256": str(model.meta.get("sha256", "")),
    }
    return texts | {key: canonical(value) for key, value in facts.items() if value is not None}


def _hardware(model: Model) -> list[dict[str, Any]] | None:
    """What `hwmodel estimate` cannot see in the file, as `rtl_export.hardware_specs` has it; None without a design."""
    if not may_have_design(model):
        return None
    from quantkit.rtl_export import hardware_specs

    return [spec.to_json() for spec in hardware_specs(model)]


def canonical(value: Any) -> str:
    """One JSON text per value: sorted keys, so that equal values have equal texts."""
    return json.dumps(value, sort_keys=True)


def _normalizer(stage: InputStage) -> dict[str, Any]:
    if stage.is_identity:
        return {"kind": "none"}
    record: dict[str, Any] = {"kind": "clamp((obs - mean) / std, low, high)"}
    for name in ("mean", "std", "low", "high"):
        values = getattr(stage, name)
        if values.numel() <= _LARGEST_NORMALIZER:  # text, since JSON has no infinity
            record[name] = [value if np.isfinite(value) else str(value) for value in values.flatten().tolist()]
        else:
            record[name] = f"{tuple(values.shape)} numbers, in the graph"
    return record


def _name(model: Model) -> str:
    return model.env.id if model.env else str(model.meta.get("source", "")) or "quantkit"


def _doc(model: Model, to: Target, postprocess: bool) -> str:
    origin = model.meta.get("source", "a module")
    form = "environment actions" if postprocess else "raw network outputs"
    return f"Quantized from {origin} by quantkit {quantkit.__version__}; target {to}, output: {form}."


def _input_stage(graph: Graph, x: str, stage: InputStage) -> str:
    def constant(name: str) -> str:
        return graph.constant(getattr(stage, name).numpy(), f"stage.{name}")

    if stage.scales:
        x = graph.op("Sub", [x, constant("mean")], "stage.centered")
        x = graph.op("Div", [x, constant("std")], "stage.normalized")
    if stage.clips:
        x = graph.op("Max", [x, constant("low")], "stage.clipped_low")
        x = graph.op("Min", [x, constant("high")], "stage.clipped")
    return x


def _head(graph: Graph, x: str, head: Head) -> tuple[str, int, list[int]]:
    """Nodes of `Head.actions`; the output's name, type and shape after the batch."""

    def ints(values: list[int], name: str) -> str:
        return graph.constant(values, f"head.{name}", TensorProto.INT64)

    match head.kind:
        case "discrete":
            x = graph.op("ArgMax", [x], "head.argmax", axis=1, keepdims=0)
            if head.start:
                x = graph.op("Add", [x, graph.constant(head.start, "head.start", TensorProto.INT64)], "head.action")
            return x, TensorProto.INT64, []
        case "multidiscrete":
            parts = []
            for first, last in pairwise(np.cumsum((0, *head.nvec)).tolist()):
                part = graph.op(
                    "Slice", [x, ints([first], "first"), ints([last], "last"), ints([1], "axis")], "head.part"
                )
                parts.append(graph.op("ArgMax", [part], "head.argmax", axis=1, keepdims=1))
            return graph.op("Concat", parts, "head.action", axis=1), TensorProto.INT64, [len(head.nvec)]
        case "multibinary":
            positive = graph.op("Greater", [x, graph.constant(0.0, "head.zero")], "head.positive")
            x = graph.op("Cast", [positive], "head.action", to=TensorProto.INT64)
            return x, TensorProto.INT64, [head.outputs]
        case "box":
            low, high = np.asarray(head.low, np.float32), np.asarray(head.high, np.float32)
            if head.squash:  # the operations of Head.actions in its order
                x = graph.op(
                    "Add", [graph.op("Tanh", [x], "head.tanh"), graph.constant(1.0, "head.one")], "head.shifted"
                )
                x = graph.op("Mul", [graph.constant(0.5, "head.half"), x], "head.unit")
                x = graph.op("Mul", [x, graph.constant(high - low, "head.range")], "head.scaled")
                x = graph.op("Add", [graph.constant(low, "head.low"), x], "head.action")
            else:
                x = graph.op("Max", [x, graph.constant(low, "head.low")], "head.at_least")
                x = graph.op("Min", [x, graph.constant(high, "head.high")], "head.action")
            return x, TensorProto.FLOAT, [head.outputs]
