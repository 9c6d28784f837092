"""Directories in compressed-tensors' formats, as plain transformers loads and runs them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from hwmodel import formats
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit import export_compressed
from quantkit.decoder import decoder_of
from quantkit.errors import InputError
from quantkit.qlayers import ActQuant, BlockAct, QLayer
from quantkit.qtensor import dequantize

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")
pytest.importorskip("compressed_tensors", reason="not installed: pip install 'quantkit[lm]'")

from tiny_decoders import FAMILIES, apart, ids, logits_of, network, put, rounded  # noqa: E402

E4M3 = formats.parse("e4m3fn")
BLOCKS = {
    "mxfp4": ("e2m1", PerGroup(32, "e8m0")),
    "mxfp6": ("e2m3", PerGroup(32, "e8m0")),
    "mxfp8": ("e4m3fn", PerGroup(32, "e8m0")),
    "nvfp4": ("e2m1", PerGroup(16, E4M3)),
}


def wide(family: str = "llama", **options):
    """A network whose layers are multiples of 32 wide."""
    return network(family, **{"layers": 1, "hidden": 96, "intermediate_size": 64} | options)


def loaded(model, path: Path, **options):
    """The exported network as transformers loads it; every tensor has its place."""
    export_compressed.export(decoder_of(model, model.config), path / "out", force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there, info = transformers.AutoModelForCausalLM.from_pretrained(
            path / "out", attn_implementation="eager", output_loading_info=True, **options
        )
    assert not any(info.values()), info
    return there.eval()


def quantization_of(path: Path) -> dict:
    return json.loads((path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("name", "granularity", "stored"),
    [
        *((n, PerRow(), "pack-quantized") for n in ("int2", "int3", "int4", "int4n", "int8", "ternary", "binary")),
        ("int4", PerGroup(16), "pack-quantized"),
        ("int8", PerTensor(), "pack-quantized"),
        ("e4m3fn", PerRow(), "float-quantized"),
        ("e4m3fn", PerTensor(), "float-quantized"),
    ],
)  # fmt: skip
def test_weights_load_as_they_are(name: str, granularity, stored: str, tmp_path: Path) -> None:
    """transformers' logits are those of the dequantized weights, and its weights are these weights, in float32."""
    model, plain = rounded(wide(), name, granularity)
    there = loaded(model, tmp_path)
    assert quantization_of(tmp_path)["format"] == stored
    assert there.dtype == torch.float32
    assert apart(logits_of(there, ids(2, 9)), logits_of(plain, ids(2, 9))) < 5e-6
    for at, layer in model.named_modules():
        if isinstance(layer, QLayer):  # decompressed by the first forward
            assert torch.equal(there.get_submodule(at).weight, dequantize(layer.q))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run_in_bfloat16(block: str, tmp_path: Path) -> None:
    """Logits are near those of transformers in bfloat16 with the dequantized weights, which mx formats keep exactly."""
    model, plain = rounded(wide(), *BLOCKS[block])
    there, x = loaded(model, tmp_path), ids(2, 9)
    assert quantization_of(tmp_path)["format"].startswith(block)
    assert there.dtype == torch.bfloat16
    with torch.no_grad():
        got, want = there(x).logits.float().numpy(), plain.to(torch.bfloat16)(x).logits.float().numpy()
    assert apart(got, want) < 2e-2
    for at, layer in model.named_modules():
        if isinstance(layer, QLayer):
            weight, exact = there.get_submodule(at).weight.float(), dequantize(layer.q)
            assert torch.equal(weight, exact) or block == "nvfp4"
            assert ((weight - exact).abs() <= 2.0**-8 * exact.abs()).all()


@pytest.mark.parametrize(
    ("name", "act", "stored"),
    [
        ("int8", "int8", "int-quantized"),
        ("int8", "uint8", "int-quantized"),
        ("int4", "int8", "pack-quantized"),
        ("int4", "int6", "pack-quantized"),
        ("e4m3fn", "e4m3fn", "float-quantized"),
    ],
)
def test_inputs_are_rounded_alike(name: str, act: str, stored: str, tmp_path: Path) -> None:
    """Quantized inputs, signed or not, give our own logits; the float head stays as it is."""
    model, plain = rounded(wide(), name)
    fmt = formats.parse(act)
    for layer in model.modules():
        if isinstance(layer, QLayer):
            layer.set_act(ActQuant(fmt, 3 / formats.max_value(fmt)))
    there, x = loaded(model, tmp_path), ids(2, 9)
    assert quantization_of(tmp_path)["format"] == stored
    assert apart(logits_of(there, x), logits_of(model, x)) < 5e-6
    assert apart(logits_of(there, x), logits_of(plain, x)) > 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama", "gpt2")])
def test_families(family: str, tmp_path: Path) -> None:
    """Other families' logits are those of the dequantized weights; a tied head is stored once."""
    model, plain = rounded(wide(family, layers=2), "int4", PerGroup(16), where="layers")
    there, x = loaded(model, tmp_path), ids(2, 9)
    assert apart(logits_of(there, x), logits_of(plain, x)) < 5e-6
    assert there.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)


def test_layers_of_different_formats(tmp_path: Path) -> None:
    """Layers in several formats, some in float, and a quantized head on a tied embedding, load in one directory."""
    model = plain = wide("qwen2")
    for name, part in (("int4", "q_proj"), ("int8", "mlp"), ("e4m3fn", "lm_head")):
        layers, plain = rounded(plain, name, where=part)
        for at, layer in [*layers.named_modules()]:
            if isinstance(layer, QLayer):
                put(model, at, layer)
    there, x = loaded(model, tmp_path), ids(2, 9)
    assert quantization_of(tmp_path)["format"] == "mixed-precision"
    assert apart(logits_of(there, x), logits_of(plain, x)) < 5e-6
    assert not there.config.tie_word_embeddings


def test_biases_find_their_place_or_are_refused(tmp_path: Path) -> None:
    """A Llama gets biases in its configuration; a Mistral has no place for them."""
    model, _ = rounded(wide(), "ternary")
    for layer in model.modules():
        if isinstance(layer, QLayer):
            layer.bias.data = torch.linspace(-0.1, 0.1, len(layer.bias))
    there, x = loaded(model, tmp_path), ids(2, 9)
    assert there.config.attention_bias and there.config.mlp_bias
    assert apart(logits_of(there, x), logits_of(model, x)) < 5e-6
    model, _ = rounded(wide("mistral"), "ternary")
    model.model.layers[0].mlp.up_proj.bias.data += 1
    with pytest.raises(InputError, match=r"up_proj' has a bias.*mistral has no place for"):
        export_compressed.export(decoder_of(model, model.config), tmp_path / "biased")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """One line that names the layer and what is accepted, before anything is written."""

    def refused(match: str, model) -> None:
        with pytest.raises(InputError, match=match):
            export_compressed.export(decoder_of(model, model.config), tmp_path / "none")
        assert not (tmp_path / "none").exists()

    refused("q_proj': e4m3 per row is not one.*accepted: int2 to int8", rounded(wide(), "e4m3", where="q_proj")[0])
    refused("q_proj': uint4 per row is not one", rounded(wide(), "uint4", where="q_proj")[0])
    refused("e2m1 per group16:e8m0 is not one", rounded(wide(), "e2m1", PerGroup(16, "e8m0"), "q_proj")[0])
    refused("'gpt2' is not exported.*accepted: gemma, gemma2", rounded(network("gpt2"), "int4")[0])
    refused("nothing to compress", wide())
    model, _ = rounded(wide(), "int4")
    layer = model.model.layers[0].mlp.gate_proj
    layer.set_act(BlockAct(formats.parse("mxfp8")))
    refused("gate_proj': its input is quantized to mxfp8", model)
    layer.set_act(ActQuant(formats.parse("int8n"), 0.1))
    refused("gate_proj': its input is quantized to int8n", model)
    layer.set_act(None)
    layer.in_scale = torch.ones(96)
    refused("gate_proj': compressed-tensors has no place for factors", model)
    model, _ = rounded(wide(), "int4")
    embedding = QLayer(model.model.embed_tokens, layer.plan)
    embedding.set_weight(rounded(wide(), "int4")[0].model.layers[0].mlp.gate_proj.q)
    put(model, "model.embed_tokens", embedding)
    refused("embed_tokens': a quantized embedding", model)


def test_sizes_and_companions(tmp_path: Path) -> None:
    """Bytes are reported and near the accounted bits; files beside the weights come along."""
    (tmp_path / "tokenizer.json").write_text("{}")
    model, _ = rounded(wide(hidden=768, intermediate_size=512), "int4", PerGroup(32))
    found = export_compressed.export(decoder_of(model, model.config, [tmp_path / "tokenizer.json"]), tmp_path / "out")
    assert found["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(found["bytes"] / found["accounted_bytes"] - 1) < 0.02
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
