"""How much faster onnxruntime is with files of `quantkit export --to onnx-nbits` than with float32, on one thread.

    python benchmarks/nbits_speed.py

layer: one linear layer of SIZE x SIZE, one row of inputs, exported as a decoder's are. decoder: tokens a second of a
Llama of hidden size SIZE and 5632 in its perceptrons, random weights, that continues a prompt; its head stays float
("float") or has 8 bits. Weights have a scale a row. level: MatMulNBits' accuracy_level, 0 where there is none.

Formats take turns, round by round; medians of the rounds. ms and tokens_per_s: CPU time of the one thread, which other
work on the machine lengthens less; faster: the ratio of those medians, faster_wall that of wall clock. stored_bits: of
the file, a weight (a decoder's with embedding and head); accounted_bits: as `Decoder.accounted_bits` counts them.
error: largest difference of outputs from those with the same weights in float32 arithmetic, relative to the largest.
load: of the machine when the run began, over one minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from report import REPORTS, publish
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hwmodel import formats
from hwmodel.spec import PerRow
from quantkit import export_nbits, onnx_decoder
from quantkit.decoder import Decoder, decoder_of
from quantkit.onnx_generate import OnnxDecoder
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.qtensor import fit_scale, quantize


def rounded(layer: nn.Linear, name: str) -> nn.Module:
    """The layer with weights in a format, "float" for as it is."""
    if name == "float":
        return layer
    fmt = formats.parse(name)
    made = QLayer(layer, LayerPlan(fmt))
    made.set_weight(quantize(layer.weight, fit_scale(layer.weight, fmt, PerRow(), "absmax"), fmt, PerRow()))
    return made


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """The model on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def timed(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """Milliseconds of a call: CPU time of this thread, and wall clock."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(count):
        call()
    return 1e3 * (time.thread_time() - cpu) / count, 1e3 * (time.perf_counter() - wall) / count


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Of each column."""
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def one_layer(layer: nn.Module, level: int) -> onnx.ModelProto:
    """A file with one layer, x -> y, made by the exporter's own function."""
    of = Decoder(SimpleNamespace(model_type="llama"), {"layer": layer}, {})
    builder = onnx_decoder.Builder(of, level)
    y = builder.linear("x", "layer")
    rows, columns = layer.weight.shape
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", columns), (y, rows))]
    graph = helper.make_graph(builder.graph.nodes, "layer", ends[:1], ends[1:], builder.graph.initializers)
    return onnx_decoder.packaged(graph)


def layers(size: int, names: list[tuple[str, int]], rounds: int) -> list[dict[str, Any]]:
    """Rows of single layers: (format, accuracy level) each."""
    torch.manual_seed(0)
    plain = nn.Linear(size, size, bias=False)
    x = np.random.default_rng(0).standard_normal((1, size)).astype(np.float32)
    made = {(name, level): rounded(plain, name) for name, level in names}
    models = {key: one_layer(layer, key[1]) for key, layer in made.items()}
    sessions = {key: session(model) for key, model in models.items()}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in sessions}
    for turn in range(rounds + 1):
        for key, run in sessions.items():
            spent = timed(lambda run=run: run.run(None, {"x": x}), 10)  # type: ignore[misc]
            if turn:
                times[key].append(spent)
    base = medians(times["float", 1])
    found = []
    for (name, level), layer in made.items():
        with torch.no_grad():
            want = layer(torch.from_numpy(x)).numpy()
        got = sessions[name, level].run(None, {"x": x})[0]
        cpu, wall = medians(times[name, level])
        stored = len(models[name, level].SerializeToString()) * 8 / size**2
        q = layer.q if isinstance(layer, QLayer) else None
        row = {"part": "layer", "weights": name, "head": "-", "level": level if q is not None else 0}
        row |= {"ms": round(cpu, 4), "tokens_per_s": "-"}
        row |= {"faster": round(base[0] / cpu, 2), "faster_wall": round(base[1] / wall, 2)}
        row |= {"stored_bits": round(stored, 4), "accounted_bits": round(32 if q is None else q.bits / size**2, 4)}
        found.append(row | {"error": float(f"{np.abs(got - want).max() / np.abs(want).max():.2g}")})
    return found


def decoders(args: argparse.Namespace, names: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Rows of whole decoders: (format of the layers, format of the head) each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.size,
        intermediate_size=5632,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    plain = LlamaForCausalLM(config).eval()
    weights = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    prompt = torch.randint(0, args.vocabulary, (1, args.prompt), generator=torch.Generator().manual_seed(0)).numpy()
    runs: dict[tuple[str, str], OnnxDecoder] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, head in names:
        for at, layer in weights.items():
            parent, _, leaf = at.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, rounded(layer, head if at == "lm_head" else name))
        out = folder / f"{name}_{head}"
        summary = export_nbits.export(decoder_of(plain, config), out, level=4)
        runs[name, head] = OnnxDecoder(out / export_nbits.FILE, threads=1)
        with torch.no_grad():
            want = plain(torch.from_numpy(prompt)).logits.numpy()
        got = runs[name, head].step(prompt)
        facts[name, head] = summary | {"error": float(np.abs(got - want).max() / np.abs(want).max())}
    count = sum(p.numel() for p in weights.values() for p in [p.weight]) + plain.model.embed_tokens.weight.numel()
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key, run in runs.items():
            run.reset()
            token = run.step(prompt)[:, -1].argmax(axis=1)[:, None]

            def next_token(run: OnnxDecoder = run, held: list[np.ndarray] = [token]) -> None:  # noqa: B006
                held[0] = run.step(held[0])[:, -1].argmax(axis=1)[:, None]

            times[key].append(timed(next_token, args.tokens))
    base, found = medians(times["float", "float"]), []
    for (name, head), values in times.items():
        (cpu, wall), fact = medians(values), facts[name, head]
        row = {"part": "decoder", "weights": name, "head": head, "level": 0 if name == "float" else 4}
        row |= {"ms": round(cpu, 3), "tokens_per_s": round(1e3 / cpu, 2)}
        row |= {"faster": round(base[0] / cpu, 2), "faster_wall": round(base[1] / wall, 2)}
        row |= {"stored_bits": round(8 * fact["bytes"] / count, 4)}
        row |= {"accounted_bits": round(8 * fact["accounted_bytes"] / count, 4)}
        found.append(row | {"error": float(f"{fact['error']:.2g}")})
    return found


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="timed tokens a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 2)
    kinds = ["ternary", "int2", "int4", "int8"]
    rows = layers(args.size, [("float", 1), *((k, v) for k in kinds for v in (4, 1))], 3 * args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [("float", "float"), *((k, h) for k in ("ternary", "int4", "int8") for h in ("int8", "float"))]
        rows += decoders(args, pairs, Path(folder))
    (REPORTS / "language").mkdir(parents=True, exist_ok=True)
    publish("language/nbits_speed", [r | {"load": load} for r in rows], packages=("onnxruntime",), title="nbits_speed")


if __name__ == "__main__":
    main()
