"""Export of a quantized language model's directory to what a stock runtime runs: ONNX, compressed-tensors or GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from quantkit import export_compressed, export_gguf, export_nbits
from quantkit.artifact import load_artifact
from quantkit.decoder import Decoder, decoder_of
from quantkit.errors import InputError
from quantkit.files import check_new
from quantkit.language import causal_lm, is_language

Target = Literal["onnx-nbits", "compressed-tensors", "gguf"]


def decoder_from(directory: Path) -> tuple[Any, Decoder]:
    """(transformers' network, its parts) of a directory written by `quantkit quantize`; InputError for others."""
    from quantkit.loaders.hf import companions

    model = load_artifact(directory)
    if not is_language(model):
        raise InputError(f"{directory} is no language model; accepted here: qdq, qdq-real, qcdq, qonnx, finn")
    module: Any = causal_lm(model)
    return module, decoder_of(module, module.config, companions(directory), model.meta)


def export(directory: Path, output: Path, to: Target, *, level: int = 4, force: bool = False) -> dict[str, Any]:
    """Write `output`, a directory or for gguf a file; what was written, as the target's own `export` says.

    Of onnx-nbits also error: the largest difference of logits from the torch network's on 16 tokens, relative to the
    largest logit. level: of onnx-nbits, see `export_nbits`. InputError, before any work, for what the target refuses.
    """
    marker = {"onnx-nbits": export_nbits.FILE, "compressed-tensors": export_compressed.FILE, "gguf": None}[to]
    check_new(output, force=force, marker=marker)
    export_nbits.check_level(level)
    module, decoder = decoder_from(directory)
    if to == "compressed-tensors":
        return export_compressed.export(decoder, output, force=force)
    if to == "gguf":
        return export_gguf.export(decoder, output, force=force)
    found = export_nbits.export(decoder, output, level=level, force=force)
    return found | {"error": logits_error(module, output / export_nbits.FILE)}


def logits_error(module: Any, file: Path, tokens: int = 16) -> float:
    """How far onnxruntime's logits are from torch's on some tokens, the last one by its cache; of the largest logit."""
    from quantkit.onnx_generate import OnnxDecoder

    size, context = int(module.config.vocab_size), int(module.config.max_position_embeddings)
    ids = torch.randint(0, size, (1, min(tokens, context)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = module(ids, use_cache=False).logits
    decoder = OnnxDecoder(file)
    parts = [decoder.step(part.numpy()) for part in (ids[:, :-1], ids[:, -1:]) if part.numel()]
    got = torch.cat([torch.from_numpy(p) for p in parts], dim=1)
    return float((got - wanted).abs().max() / wanted.abs().max())
