"""From a quantized directory to files of stock runtimes, by the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")
pytest.importorskip("compressed_tensors", reason="not installed: pip install 'quantkit[lm]'")
gguf = pytest.importorskip("gguf", reason="not installed: pip install 'quantkit[lm]'")

from test_cli import call, document, error  # noqa: E402
from test_language import checkpoint  # noqa: E402
from tiny_lm import transformers  # noqa: E402

from quantkit.language import causal_lm  # noqa: E402
from quantkit.loading import load_checkpoint  # noqa: E402

SLOW = ("gemma", "gemma2", "gemma3_text", "gpt2", "granite", "mistral", "olmo2", "phi3", "qwen3", "smollm3")
LAYERS = ["--weights", "int4", "--acts", "float"]


def quantized(tmp_path: Path, kind: str = "llama", *options: str, **config) -> Path:
    """A quantized directory."""
    call("quantize", checkpoint(tmp_path, kind, **config), "-o", tmp_path / "q", *LAYERS, *options)
    return tmp_path / "q"


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_generate_is_the_same_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    """The text that `generate` makes with the ONNX file is the text that it makes with the directory."""
    directory, out = quantized(tmp_path, kind), tmp_path / "out"
    found = document("export", directory, "-o", out, "--to", "onnx-nbits", "--accuracy-level", "1")
    assert found["error"] < 1e-5
    assert found["bytes"] == (out / "model.onnx").stat().st_size
    for prompt in ("w3 w4 w5", "w9", "w20 w21 w22 w23"):
        here = document("generate", directory, "--prompt", prompt, "--max-tokens", "20")
        there = document("generate", out / "model.onnx", "--prompt", prompt, "--max-tokens", "20")
        assert here["text"] == there["text"] and here["tokens"] == there["tokens"]
    sampled = [
        document("generate", out / "model.onnx", "--prompt", "w3", "--sample", "--seed", s)["text"] for s in "112"
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    fast = document("export", directory, "-o", out, "--to", "onnx-nbits", "--force")
    assert 1e-5 < fast["error"] < 0.1


def test_transformers_loads_the_compressed_directory(tmp_path: Path) -> None:
    """`AutoModelForCausalLM.from_pretrained` gives our logits."""
    directory, out = quantized(tmp_path), tmp_path / "out"
    assert document("export", directory, "-o", out, "--to", "compressed-tensors")["bytes"] > 0
    x = torch.arange(12)[None]
    with torch.no_grad():
        wanted = causal_lm(load_checkpoint(directory))(x).logits
        got = transformers.AutoModelForCausalLM.from_pretrained(out)(x).logits
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 5e-6
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


METHODS = {
    "rotate": ("--step", "rotate", "--step", "gptq"),
    "smoothquant": ("--step", "smoothquant", "--step", "qronos"),
    "tequila": ("--weights", "ternary", "--step", "tequila:steps=2,constant=lambda"),
    "mxfp4": ("--weights", "mxfp4", "--step", "adaround:steps=5"),
}
"""Options of methods that move factors or turns between layers, train, or have scales of blocks."""


@pytest.mark.parametrize("method", ["rotate", *(pytest.param(m, marks=pytest.mark.slow) for m in [*METHODS][1:])])
@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(k, marks=pytest.mark.slow) for k in (*SLOW, "llama"))])
def test_every_method_reaches_every_file_of_a_family(kind: str, method: str, tmp_path: Path) -> None:
    """What is written is the directory's network, or a target says in a line why it is not."""
    directory = quantized(tmp_path, kind, "--calibration", tmp_path / "t.txt", "--window", "16", *METHODS[method])
    assert document("evaluate", directory, "--text", tmp_path / "t.txt")["mean"] > 1
    found = document("export", directory, "-o", tmp_path / "onnx", "--to", "onnx-nbits", "--accuracy-level", "1")
    assert found["error"] < 2e-5
    for target in ("compressed-tensors", "gguf"):
        command = ("export", directory, "-o", tmp_path / target, "--to", target)
        if call(*command).exit_code:
            assert "accepted: " in error(*command) and not (tmp_path / target).exists()


def test_a_gguf_file_holds_the_weights(tmp_path: Path) -> None:
    """The file opens in gguf's reader and says what it is; a tokenizer of words is left out."""
    options = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory, out = quantized(tmp_path, **options, head_dim=16), tmp_path / "out.gguf"
    found = document("export", directory, "-o", out, "--to", "gguf")
    assert set(found["types"].values()) == {"Q4_0"} and found["tokenizer"] == "none"
    assert found["scale_error"] <= 2.0**-11
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.architecture"].contents() == "llama"
    weight = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    wanted = causal_lm(load_checkpoint(directory)).model.layers[0].mlp.up_proj.effective_weight().numpy()
    assert np.allclose(gguf.dequantize(weight.data, weight.tensor_type), wanted, rtol=2.0**-11, atol=0)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    """Targets of other networks, levels, existing outputs and a cache beside an ONNX file are refused."""
    directory = quantized(tmp_path)
    assert "--to onnx-nbits, compressed-tensors, gguf" in error("export", directory, "-o", tmp_path / "x.onnx")
    assert "accuracy level 2; accepted: 1" in error(
        "export", directory, "-o", tmp_path / "x", "--to", "onnx-nbits", "--accuracy-level", "2"
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    assert "exists already" in error("export", directory, "-o", tmp_path / "there", "--to", "onnx-nbits")
    assert "holds other things" in error("export", directory, "-o", tmp_path / "there", "--to", "onnx-nbits", "--force")
    call("export", directory, "-o", tmp_path / "out", "--to", "onnx-nbits")
    said = error("generate", tmp_path / "out" / "model.onnx", "--prompt", "w1", "--kv-cache", "saq:levels=16-8")
    assert "cache of its own" in said
    assert "no tokenizer.json" in error("generate", _moved(tmp_path / "out" / "model.onnx", tmp_path), "--prompt", "w1")
    assert not (tmp_path / "x").exists()


def _moved(file: Path, folder: Path) -> Path:
    """The file without what stands beside it."""
    (folder / "alone").mkdir()
    return file.rename(folder / "alone" / file.name)
