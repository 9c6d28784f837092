"""Language models from text: what to calibrate on, what stays in float, and the network that decodes.

`causal_lm` turns a quantized graph back into transformers' own class, so that whatever runs one runs the other:
caches of keys and values, `generate`, perplexity.
"""

from __future__ import annotations

import copy
import fnmatch
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.qlayers import LayerPlan, QLayer, shape_of
from quantkit.recipe import Recipe, full_steps
from quantkit.tasks.generation import generate
from quantkit.tasks.perplexity import Perplexity, Progress, encode, evaluate, read_documents

WINDOW = 512
OPERANDS = ("*.attention.*", "*.matmul*.*")
"""The points of a captured decoder, queries, keys, probabilities and values: of attention as one operation, and of
attention as two products, which a family with soft-capped scores has."""


def is_language(model: Model) -> bool:
    """Whether the model is a causal language model, quantized or not."""
    return "config" in model.meta


class Logits(nn.Module):
    """A captured language model, called as transformers' are, without a cache."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.graph(ids))


def causal_lm(model: Model) -> nn.Module:
    """transformers' class of a language model, in evaluation mode, with the model's QLayers in the place of its layers.

    All other parameters are the model's, as quantization left them; tensors are shared with it, not copied. It takes
    `past_key_values` and `use_cache`. Raises InputError if operands of attention are quantized, which the class
    computes in float.
    """
    from quantkit.loaders import hf

    if not isinstance(model.module, fx.GraphModule):
        if not is_language(model):
            raise InputError("the network is not a language model from a Hugging Face directory")
        return model.module
    if operands := quantized_operands(model):
        raise InputError(
            f"{len(operands)} operands of attention are quantized ({operands[0]}, ...), which transformers' class"
            f" cannot hold; for a cache or for generating leave them in float: {_in_float(operands[0])}"
        )
    module, qlayers = hf.skeleton(model.meta["config"], Path(str(model.meta.get("source")))), model.qlayers()
    tensors = {**dict(model.module.named_parameters(remove_duplicate=False)), **dict(model.module.named_buffers())}
    for name, part in [*module.named_modules()]:
        if name in qlayers:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, _standing_for(part, qlayers[name]))
            continue
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[leaf] = nn.Parameter(tensors[f"{name}.{leaf}"].detach(), requires_grad=False)
    return module.eval()


def _standing_for(part: nn.Module, layer: QLayer) -> nn.Module:
    """The layer, or a copy of it that does what Gemma's embedding does behind its lookup: multiply by a constant."""
    scale = getattr(part, "embed_scale", None)
    if scale is None:
        return layer
    layer = copy.copy(layer)
    layer._forward_hooks = layer._forward_hooks.copy()
    layer.register_forward_hook(lambda _module, _inputs, y: y * scale)
    return layer


def _in_float(operand: str) -> str:
    """The option that leaves an operand and its like in float."""
    return "--layer '" + next(p for p in OPERANDS if fnmatch.fnmatchcase(operand, p)) + "=float/float'"


def quantized_operands(model: Model) -> list[str]:
    """Names of the points that quantize something."""
    return [name for name, point in model.points().items() if point.act is not None]


def runner(model: Model) -> nn.Module:
    """What perplexity without a cache runs: `causal_lm`, or the graph where only it holds all that is quantized."""
    return Logits(model.module) if quantized_operands(model) else causal_lm(model)


def with_defaults(recipe: Recipe, model: Model) -> Recipe:
    """The recipe with what stays in float unless an exception names it: embeddings, head, operands of attention.

    As in GPTQ, AWQ and llm-compressor. These entries stand behind the first, so that all later ones override them. A
    model without a head of its own name quantizes all its layers.
    """
    layers = model.layers()
    kept = [name for name, layer in layers.items() if shape_of(layer).op == "embedding" or name == "lm_head"]
    entries = [(name, LayerPlan()) for name in kept]
    if any(plan.act is not None for _, plan in recipe.plan):
        entries += [(p, LayerPlan()) for p in OPERANDS if fnmatch.filter(model.points(), p)]
    return Recipe((recipe.plan[0], *entries, *recipe.plan[1:]), recipe.steps, recipe.seed)


def needs_text(recipe: Recipe) -> bool:
    """Whether some step looks at the calibration set."""
    inputs = any(plan.act is not None for _, plan in recipe.plan)
    names = {name for name, _ in full_steps(recipe)}
    sees = any(name == "rtn" and options.get("scale") == "importance" for name, options in recipe.steps)
    return inputs or sees or not names <= {"rtn", "act_scales", "equalize"}


def read_calibration(
    model: Model, tokenizer: Any, file: Path, window: int | None = None, documents: int | None = None
) -> Calib:
    """Windows of `window` tokens (default 512, or the context if that is shorter) of a text's documents, end to end.

    documents: only the first so many. What is left over behind the last whole window is not used. Raises InputError
    for a window longer than the context, text shorter than one window, and a token that the model does not know.
    """
    context = int(model.meta["context"])
    window = min(context, WINDOW) if window is None else window
    if window > context:
        raise InputError(f"--window {window} is longer than the model's context of {context} tokens")
    texts = read_documents(file)[:documents]
    tokens = torch.cat([torch.empty(0, dtype=torch.int64), *encode(tokenizer, texts, 2**62)])
    _check_tokens(model, tokens, file)
    if len(tokens) < window:
        raise InputError(f"{file}: {len(tokens)} tokens in {len(texts)} documents are less than one window of {window}")
    windows = tokens[: len(tokens) // window * window].reshape(-1, window)
    return Calib(windows, batch=_rows(model, window, len(windows), 1024))


def _rows(model: Model, length: int, most: int, tokens: int = 4096) -> int:
    """How many sequences to run at once: at most `tokens`, 2^27 logits and 2^23 scores of attention."""
    config = model.meta["config"]
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    logits = 2**27 // (length * int(model.meta["vocabulary"]))
    return max(1, min(most, tokens // length, logits, 2**23 // (heads * length**2)))


def _check_tokens(model: Model, tokens: Tensor, file: Path) -> None:
    largest, vocabulary = int(tokens.max()) if tokens.numel() else 0, int(model.meta["vocabulary"])
    if largest >= vocabulary:
        raise InputError(f"{file}: the tokenizer gives the id {largest}, the model has {vocabulary} tokens")


def perplexity(
    model: Model,
    tokenizer: Any,
    file: Path,
    *,
    cache: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity on the documents of a text, each cut at the context; cache: makes an empty cache for a configuration.

    Raises InputError for a text without a document of 2 tokens.
    """
    documents = encode(tokenizer, read_documents(file), int(model.meta["context"]))
    if not documents:
        raise InputError(f"{file}: no document has 2 tokens, the least that perplexity is defined for")
    _check_tokens(model, torch.cat(documents), file)
    module: Any = runner(model) if cache is None else causal_lm(model)
    make = None if cache is None else lambda: cache(module.config)
    batch = 4 * _rows(model, max(map(len, documents)), len(documents))
    return evaluate(module, documents, batch=batch, cache=make, progress=progress)


def continued(
    model: Model,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    cache: Callable[[Any], Any] | None = None,
    ends: Collection[int] = (),
) -> dict[str, Any]:
    """A prompt and what the model makes of it: text, prompt_tokens, tokens (made) and seconds.

    It ends at a token of `ends` (`hf.end_tokens`), at `tokens` tokens or at the context. temperature: 0 is greedy.
    Raises InputError for a prompt of no token, or one that leaves no room in the context.
    """
    context = int(model.meta["context"])
    ids = torch.tensor([tokenizer.encode(prompt).ids], dtype=torch.int64)
    length = ids.shape[1]
    if length == 0:
        raise InputError("the prompt has no token; give a text to go on from")
    if length >= context:
        raise InputError(f"the prompt has {length} tokens, which leaves no room in the model's context of {context}")
    if int(ids.max()) >= int(model.meta["vocabulary"]):
        raise InputError(
            f"the tokenizer gives the id {int(ids.max())}, the model has {model.meta['vocabulary']} tokens"
        )
    module: Any = causal_lm(model)
    began = time.perf_counter()
    made = generate(
        module,
        ids,
        min(tokens, context - length),
        cache=None if cache is None else lambda: cache(module.config),
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        stop=ends,
    )
    seconds = time.perf_counter() - began
    text = tokenizer.decode(made[0].tolist())
    return {"text": text, "prompt_tokens": length, "tokens": made.shape[1] - length, "seconds": seconds}
