"""`captured`: a model whose module is a graph, with every product of weights or activations as a module of its own.

Any module that `torch.export` can follow becomes a `torch.fx.GraphModule` of ATen operations in which

- products with a weight (linear, convolutions, embedding, `x @ W`) are `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`,
  `nn.ConvTranspose2d` and `nn.Embedding` modules, under the name of the module that owned the weight,
- products of two activations are `MatMul`, and fused attention is `Attention`,
- layer and RMS normalization are `nn.LayerNorm` and `nn.RMSNorm`, so that rescaling finds their weights,
- batch normalization behind a product is folded into it, weight and spectral norms are in the weights, and dropout is
  gone.

So a convolution with code around it, a functional call and a hand-written attention are all found, which replacing
modules by their type cannot do. What cannot be followed keeps its module; layers are then found by type, and the
reason stands in `meta["untraced"]`. A network with a loop over time is not followed on purpose: unrolled, it would
hold for one length only. Its recurrent cells are replaced by those of `quantkit.recurrent`, whose products and
states can be quantized.

The batch is the first dimension of the input; the graph holds for any, and one of token ids for any length. Of a
Hugging Face language model the graph gives the logits: a cache of keys and values cannot be traced and is turned off.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit import recurrent
from quantkit.attention import Attention, MatMul
from quantkit.errors import one_line
from quantkit.model import Model
from quantkit.policy import Policy
from quantkit.qlayers import QLayer, op_of
from quantkit.reparametrize import copied, merge
from quantkit.repeats import traced_by_two

aten = torch.ops.aten


def captured(model: Model, *, inplace: bool = False) -> Model:
    """A copy of the model as described above; of a policy or a graph, whose layers are known, a plain copy.

    inplace: the weights are the model's own and not copies, and the model must not be used any more.
    """
    if isinstance(model.module, Policy | fx.GraphModule) or model.qlayers():
        return model.copy()
    meta = copy.deepcopy(model.meta)
    module = merge((model.module if inplace else copied(model.module)).eval())
    if getattr(getattr(module, "config", None), "use_cache", False):
        module.config.use_cache = False  # type: ignore[union-attr]
    cells = recurrent.substitute(module)
    module = cells.pop("", module)
    problem = "it loops over time" if recurrent.has_loop(module) else None
    if problem is None:
        try:
            with torch.random.fork_rng(devices=[]):  # building a layer draws its first weights
                graph = traced_by_two(module, lambda short: exported(short, (model.example,)))
                module = modularized(exported(module, (model.example,)) if graph is None else graph, module)
        except Exception as error:  # whatever the module's own Python does under export
            problem = one_line(error)
    if problem is not None:
        meta["untraced"] = problem
    else:
        meta.pop("untraced", None)
    left = _float_layers(module)
    if left:
        meta["float_layers"] = left
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Model(module, model.example.clone(), model.env, meta)


def exported(module: nn.Module, examples: tuple[Tensor, ...]) -> fx.GraphModule:
    """What `torch.export` makes of the module: the first dimension of inputs is free, of tokens the second, too."""
    for part in module.modules():  # what is written in place must be decomposed, batch norms with it
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    # export takes a size of 1 for a constant
    examples = tuple(torch.cat([x, x]) if len(x) == 1 and x.dim() else x for x in examples)
    free = [{0: torch.export.Dim.DYNAMIC} for _ in examples]
    if examples[0].dim() == 2 and not examples[0].is_floating_point():
        free[0][1] = torch.export.Dim.AUTO  # tokens; a network that holds for one length only stays so
    shapes = (free[0], tuple(free[1:])) if len(free) > 1 else (free[0],)  # a network with states has them as *states
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, examples, dynamic_shapes=shapes)
        if any(_mutates(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no log records and nothing on stderr: export prints whole graphs before it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


class _Parts:
    """The modules made so far, by name, and which one stands for which weight under which arguments.

    original: the module that was exported.
    """

    def __init__(self, original: nn.Module) -> None:
        self.original = original
        self.modules: dict[str, nn.Module] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def add(self, wanted: str, module: nn.Module) -> str:
        """The name that the module got: `wanted`, or with a number where another has it."""
        number, name = 1, wanted
        while name in self.modules:
            name, number = f"{wanted}_{number}", number + 1
        self.modules[name] = module
        return name


def modularized(gm: fx.GraphModule, original: nn.Module, made: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The graph with modules in the place of products and normalizations; made: those that it calls already."""
    parts = _Parts(original)
    parts.modules |= made or {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _BUILDERS:
            _BUILDERS[node.target](gm, node, parts)
    _fold_batch_norms(gm, parts)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the strides that export saw need not be those of other modules
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    return _plain(gm, parts)


_IDENTITIES = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
)


def _plain(gm: fx.GraphModule, parts: _Parts) -> fx.GraphModule:
    """The same graph without what `torch.export` wraps around it, and with the tensors and modules it uses only."""
    output = gm.graph.output_node()
    (results,) = output.args
    if isinstance(results, list | tuple) and len(results) == 1:
        output.args = (results[0],)
    tensors = {str(n.target): _attribute(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target in tensors:  # the weight is read elsewhere, too
            module = parts.modules.pop(node.target)
            node.target = parts.add(f"{node.target}_product", module)
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.graph._tracer_cls = None  # export's own cannot be pickled
    result = fx.GraphModule({**tensors, **parts.modules}, gm.graph).eval()
    result.graph.lint()
    _sort(result)
    return result


def _sort(gm: fx.GraphModule) -> None:
    """Submodules in the order of their first call, as `first` and `last` of a recipe mean it."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        path = str(node.target).split(".") if node.op == "call_module" else []
        for depth, leaf in enumerate(path):
            owner = ".".join(path[:depth])
            if f"{owner}.{leaf}" not in seen:
                seen.add(f"{owner}.{leaf}")
                siblings = gm.get_submodule(owner)._modules
                siblings[leaf] = siblings.pop(leaf)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    found |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return found | dict(node.kwargs)


def _constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node stands for, if it is a parameter or buffer, or a fixed view of one."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return _attribute(gm, str(node.target))
    if node.op == "call_function" and node.target in _VIEWS:
        inner = [_constant(gm, a) if isinstance(a, fx.Node) else a for a in node.args]
        if all(a is not None for a in inner):
            return node.target(*inner, **node.kwargs)  # type: ignore[operator]
    return None


_VIEWS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default)


def _attribute(gm: nn.Module, target: str) -> Tensor:
    owner, _, leaf = target.rpartition(".")
    value: Tensor = getattr(gm.get_submodule(owner), leaf)
    return value


def _source(node: fx.Node) -> str:
    """The name of the parameter behind a constant."""
    while node.op != "get_attr":
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target)


def _scope(node: fx.Node) -> str:
    """The dotted name of the module in whose forward the node is."""
    stack = node.meta.get("nn_module_stack") or {}
    return re.sub(r"@\d+", "", str(list(stack.values())[-1][0])) if stack else ""  # x@1: the second call of x


def _name_of_weight(source: str) -> str:
    """`conv1.weight` -> `conv1`; `attn.in_proj_weight` -> `attn.in_proj`."""
    owner, _, leaf = source.rpartition(".")
    rest = "" if leaf == "weight" else leaf.removesuffix("_weight")
    return ".".join(part for part in (owner, rest) if part)


def _call(gm: fx.GraphModule, node: fx.Node, name: str, inputs: tuple[Any, ...]) -> None:
    """Replace `node` by a call of the module `name`."""
    with gm.graph.inserting_before(node):
        call = gm.graph.create_node("call_module", name, inputs)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)


def _weighted(
    gm: fx.GraphModule,
    node: fx.Node,
    parts: _Parts,
    inputs: tuple[Any, ...],
    weight: fx.Node,
    key: tuple[Any, ...],
    build: Callable[[], nn.Module],
) -> None:
    """A call of the module that `build` makes, one for all calls with the same weight and arguments."""
    name = parts.names.get(key)
    if name is None:
        wanted, scope = _name_of_weight(_source(weight)), _scope(node)
        if hasattr(parts.original.get_submodule(scope), "weight"):
            wanted = scope  # and not the other owner's name, where two layers share a weight
        name = parts.names[key] = parts.add(wanted or "product", build())
    _call(gm, node, name, inputs)


def _linear(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    a = _arguments(node)
    if node.target is aten.addmm.default:
        if (a["beta"], a["alpha"]) != (1, 1):
            return
        x, weight, bias, turn = a["mat1"], a["mat2"], a["self"], True
    elif node.target is aten.linear.default:
        x, weight, bias, turn = a["input"], a["weight"], a["bias"], False
    else:  # a matrix product
        x, weight, bias, turn = *node.args[:2], None, True  # type: ignore[assignment]
    w, b = _constant(gm, weight), None if bias is None else _constant(gm, bias)
    if w is None or w.dim() != 2 or (bias is not None and (b is None or b.dim() != 1)):
        if node.target in _PRODUCTS:
            _matmul(gm, node, parts)
        return
    w = w.t() if turn else w

    def build() -> nn.Module:
        layer = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, device="meta")
        return _filled(layer, w, b)

    key = ("linear", _source(weight), None if bias is None else _source(bias), turn)
    _weighted(gm, node, parts, (x,), weight, key, build)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    hollow = 0 in weight.stride()  # one number for all of them: a weight that is yet to be read
    layer.weight = nn.Parameter(weight.detach() if hollow else weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


_CONVOLUTIONS: dict[Any, Any] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv_transpose2d.input: nn.ConvTranspose2d,
}


def _convolution(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    a = _arguments(node)
    w, b = _constant(gm, a["weight"]), None if a["bias"] is None else _constant(gm, a["bias"])
    if w is None or (a["bias"] is not None and b is None):
        return
    kind, groups = _CONVOLUTIONS[node.target], a["groups"]
    channels = (w.shape[1] * groups, w.shape[0])
    if kind is nn.ConvTranspose2d:
        channels = (w.shape[0], w.shape[1] * groups)
    options = {"stride": a["stride"], "padding": a["padding"], "dilation": a["dilation"], "groups": groups}
    if kind is nn.ConvTranspose2d:
        options["output_padding"] = a["output_padding"]
    options = {k: tuple(_pair(v, w.dim() - 2)) if isinstance(v, list | tuple) else v for k, v in options.items()}

    def build() -> nn.Module:
        return _filled(kind(*channels, tuple(w.shape[2:]), bias=b is not None, **options), w, b)

    key = ("conv", _source(a["weight"]), *options.values())
    _weighted(gm, node, parts, (a["input"],), a["weight"], key, build)


def _pair(values: Any, count: int) -> list[int]:
    return list(values) * count if len(values) == 1 else list(values)


def _embedding(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    a = _arguments(node)
    w = _constant(gm, a["weight"])
    if w is None:
        return

    def build() -> nn.Module:
        return _filled(nn.Embedding(w.shape[0], w.shape[1], device="meta"), w, None)

    _weighted(gm, node, parts, (a["indices"],), a["weight"], ("embedding", _source(a["weight"])), build)


def _normalization(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    a = _arguments(node)
    w, b = _constant(gm, a["weight"]), _constant(gm, a.get("bias"))
    if w is None or (a.get("bias") is not None and b is None) or node.args[1] != list(w.shape):
        return

    def build() -> nn.Module:
        shape = tuple(w.shape)
        if node.target is aten.rms_norm.default:
            return _filled(nn.RMSNorm(shape, a["eps"]), w, None)
        return _filled(nn.LayerNorm(shape, a["eps"], bias=b is not None), w, b)

    _weighted(gm, node, parts, (a["input"],), a["weight"], ("norm", _source(a["weight"])), build)


def _matmul(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    if any(_constant(gm, argument) is not None for argument in node.args[:2]):
        return
    name = parts.add(".".join(part for part in (_scope(node), "matmul") if part), MatMul())
    _call(gm, node, name, tuple(node.args[:2]))


def _attention(gm: fx.GraphModule, node: fx.Node, parts: _Parts) -> None:
    a = _arguments(node)
    attention = Attention(a["scale"], bool(a["is_causal"]))
    name = parts.add(".".join(part for part in (_scope(node), "attention") if part), attention)
    inputs = (a["query"], a["key"], a["value"], *([] if a["attn_mask"] is None else [a["attn_mask"]]))
    _call(gm, node, name, inputs)


_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
_BUILDERS: dict[Any, Callable[[fx.GraphModule, fx.Node, _Parts], None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _linear,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _normalization,
    aten.rms_norm.default: _normalization,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys(_PRODUCTS, _linear),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}


_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def _fold_batch_norms(gm: fx.GraphModule, parts: _Parts) -> None:
    """Merge every batch normalization that alone consumes a layer used once into this layer."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _BATCH_NORMS:
            continue
        a = _arguments(node)
        before = a["input"]
        if before.op != "call_module" or len(before.users) != 1 or a.get("training"):
            continue
        layer = parts.modules[before.target]
        calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == before.target]
        if op_of(layer) in (None, "embedding") or len(calls) != 1:
            continue
        mean, var, weight, bias = (_constant(gm, a[k]) for k in ("running_mean", "running_var", "weight", "bias"))
        if mean is None or var is None:
            continue
        fold(layer, mean, var, weight, bias, a["eps"])  # type: ignore[arg-type]
        for result in [node] if node.target is aten.batch_norm.default else list(node.users):
            result.replace_all_uses_with(before)  # the decomposed one gives a tuple, of which the first is used
            gm.graph.erase_node(result)
        if node.target is not aten.batch_norm.default:
            gm.graph.erase_node(node)


def fold(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Give the layer the weight and bias that make (y - mean) / sqrt(var + eps) * weight + bias its output, in place.

    Statistics per output channel, (channels,). Jacob et al., arXiv 1712.05877, section 3.2. Computed in float64.
    """
    gain = (1.0 if weight is None else weight.double()) / torch.sqrt(var.double() + eps)
    shift = (0.0 if layer.bias is None else layer.bias.double()) - mean.double()
    shape = [1] * layer.weight.dim()
    if isinstance(layer, nn.ConvTranspose2d):
        split = layer.weight.detach().double().reshape(layer.groups, -1, *layer.weight.shape[1:])
        scaled = split * gain.reshape(layer.groups, 1, -1, *(1 for _ in layer.weight.shape[2:]))
        folded = scaled.reshape(layer.weight.shape)
    else:
        shape[0] = -1
        folded = layer.weight.detach().double() * gain.reshape(shape)
    _filled(layer, folded.float(), (shift * gain + (0.0 if bias is None else bias.double())).float())


_KNOWN_FLOAT = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU, nn.modules.batchnorm._BatchNorm, QLayer)


def _float_layers(module: nn.Module) -> dict[str, str]:
    """What has a weight matrix and is none of the layers that can be quantized: name -> reason."""
    found: dict[str, str] = {}
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            if node.op != "call_function" or node.target in _VIEWS or node.target is operator.getitem:
                continue
            if not any(word in str(node.target) for word in ("conv", "mm", "einsum", "bilinear", "gru", "lstm", "rnn")):
                continue
            name = next((_name_of_weight(_source(a)) for a in operands if _is_matrix(module, a)), node.name)
            found[name] = f"no method handles {str(node.target).removeprefix('aten.')}"
        return found
    for name, part in module.named_modules():
        tensors = [t for t in part.parameters(recurse=False) if t.dim() >= 2]
        if tensors and op_of(part) is None and not isinstance(part, _KNOWN_FLOAT):
            found[name or "the network"] = f"{type(part).__name__} has code of its own around its weight"
    return found


def _is_matrix(gm: fx.GraphModule, node: fx.Node) -> bool:
    value = _constant(gm, node)
    return value is not None and value.dim() >= 2
