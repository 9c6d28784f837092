"""Decoders in onnxruntime, against transformers' classes with the dequantized weights in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from hwmodel import formats
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit import export_nbits
from quantkit.bands import Bands, half
from quantkit.decoder import decoder_of
from quantkit.errors import InputError
from quantkit.nbits import width_of
from quantkit.onnx_generate import OnnxDecoder, continued
from quantkit.qlayers import ActQuant, LayerPlan, QLayer
from quantkit.qtensor import dequantize, fit_scale, quantize

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")

from tiny_decoders import FAMILIES, VOCABULARY, YARN, apart, ids, logits_of, network, put, rounded


def runner(model, tmp_path: Path, level: int = 1) -> OnnxDecoder:
    """The exported network in onnxruntime."""
    export_nbits.export(decoder_of(model, model.config), tmp_path / "out", level=level, force=True)
    return OnnxDecoder(tmp_path / "out" / "model.onnx", threads=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str, tmp_path: Path) -> None:
    """A prompt of 9 tokens, then 6 one by one, gives transformers' logits of all 15, longer than a sliding window."""
    model, plain = rounded(network(family), "int4", where="layers" if family.startswith("gemma") else "")
    decoder, x = runner(model, tmp_path), ids(3, 15)
    parts = [decoder.step(x[:, :9].numpy()), *(decoder.step(x[:, n : n + 1].numpy()) for n in range(9, 15))]
    assert apart(np.concatenate(parts, axis=1), logits_of(plain, x)) < 3e-6
    decoder.reset()
    assert apart(decoder.step(x[:1, :3].numpy()), logits_of(plain, x[:1, :3])) < 3e-6


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_padding_on_either_side_changes_no_logit(family: str, tmp_path: Path) -> None:
    """Rows of a padded batch give the logits that they give alone."""
    model, plain = rounded(network(family), "int8", where="layers" if family.startswith("gemma") else "")
    decoder, long, short = runner(model, tmp_path), ids(1, 8), ids(1, 5, seed=1)
    for left in (True, False):
        x, mask = torch.cat([long, long]), torch.ones(2, 8, dtype=torch.int64)
        at = slice(3, 8) if left else slice(0, 5)
        x[1], mask[1] = 0, 0
        x[1, at], mask[1, at] = short, 1
        empty = {i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in decoder.past}
        feeds = {"input_ids": x.numpy(), "attention_mask": mask.numpy(), **empty}
        got = decoder.session.run(["logits"], feeds)[0]
        assert apart(got[:1], logits_of(plain, long)) < 3e-6
        assert apart(got[1:, at], logits_of(plain, short)) < 3e-6


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((n, PerRow()) for n in ("ternary", "binary", "int1", "int2", "int3", "int4n", "int5", "uint2", "uint4")),
        *((n, PerRow()) for n in ("uint8", "e2m1", "e3m0", "e2m3")),
        ("int4", PerTensor()),
        ("ternary", PerGroup(16)),
        ("int8", PerGroup(48)),
        ("e2m1", PerGroup(16, formats.parse("e4m3fn"))),
        ("int4", PerGroup(16, "e8m0")),
    ],
)  # fmt: skip
def test_every_format_keeps_its_values(name: str, granularity, tmp_path: Path) -> None:
    """Codes, zero points and scales mean in onnxruntime what they mean here, for rows that fill no whole block."""
    model, plain = rounded(network(layers=1), name, granularity, where="self_attn")
    assert apart(runner(model, tmp_path).step(ids(2, 5).numpy()), logits_of(plain, ids(2, 5))) < 3e-6


def test_widths_are_the_narrowest() -> None:
    """A format goes into 2 bits if and only if some zero point puts all of its values there, and so on to 8."""
    for name in formats.all_names():
        fmt = formats.parse(name)
        units = [round(v / formats.unit(fmt)) for v in formats.levels(fmt)]
        fits = [b for b in (2, 4, 8) for z in (0, 2 ** (b - 1)) if all(0 <= u + z < 2**b for u in units)]
        width = width_of(fmt)
        assert (width.bits if width else None) == (fits[0] if fits else None), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_greedy_tokens_are_transformers(family: str, tmp_path: Path) -> None:
    """At level 1 `generate` gives transformers' greedy tokens for six prompts, and stops where it is told to."""
    model, plain = rounded(network(family), "ternary", where="layers")
    decoder = runner(model, tmp_path)
    for seed in range(6):
        x = ids(1, 3 + seed, seed)
        options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
        want = plain.generate(x, attention_mask=torch.ones_like(x), **options).numpy()
        got = decoder.generate(x.numpy(), 40)
        assert (got == want).all()
        stop = int(want[0, x.shape[1] + 4])
        first = int((want[0, x.shape[1] :] == stop).argmax())
        assert (decoder.generate(x.numpy(), 40, stop=[stop]) == want[:, : x.shape[1] + first + 1]).all()


def test_samples_follow_the_logits(tmp_path: Path) -> None:
    """Frequencies of 4000 sampled tokens are softmax(logits / temperature) within four standard errors."""
    model, plain = rounded(network(layers=1), "int4")
    decoder, x = runner(model, tmp_path), ids(1, 4)
    p = (torch.from_numpy(logits_of(plain, x))[0, -1].double() / 2).softmax(0).numpy()
    made = decoder.generate(np.repeat(x.numpy(), 4000, axis=0), 1, temperature=2.0, seed=3)[:, -1]
    share = np.bincount(made, minlength=VOCABULARY) / 4000
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 4000) + 1e-3).all()
    assert (
        decoder.generate(x.numpy(), 9, temperature=2.0, seed=3)[0]
        == decoder.generate(x.numpy(), 9, temperature=2.0, seed=3)[0]
    ).all()


@pytest.mark.parametrize("name", ["ternary", "int4", "int8"])
def test_level_4_rounds_inputs_to_8_bits(name: str, tmp_path: Path) -> None:
    """Logits at level 4 differ from those of level 1, by less than a twentieth of the largest."""
    model, plain = rounded(network(), name)
    assert 1e-4 < apart(runner(model, tmp_path, 4).step(ids(3, 9).numpy()), logits_of(plain, ids(3, 9))) < 0.05


def test_biases_and_input_factors_are_kept(tmp_path: Path) -> None:
    """A bias from training and factors on a layer's inputs are in the file."""
    model, plain = rounded(network(), "ternary")
    torch.manual_seed(1)
    for at, layer in model.named_modules():
        if isinstance(layer, QLayer):
            layer.bias.data = torch.randn_like(layer.bias) / 9
            layer.in_scale = torch.rand(layer.in_channels) + 0.5
            layer.invalidate()
            there = plain.get_submodule(at)
            there.weight.data, there.bias = there.weight.data * layer.in_scale, torch.nn.Parameter(layer.bias.data)
    assert apart(runner(model, tmp_path).step(ids(2, 7).numpy()), logits_of(plain, ids(2, 7))) < 3e-6


def test_quantized_embeddings_and_heads(tmp_path: Path) -> None:
    """Rows of a quantized embedding, and a quantized head, are what they are here; the float twins are stored once."""
    model, plain = rounded(network("qwen2"), "int4")
    once = runner(model, tmp_path).session
    size = (tmp_path / "out" / "model.onnx").stat().st_size
    assert once.get_inputs()[0].name == "input_ids"
    for at, fmt in (("model.embed_tokens", "int4"), ("lm_head", "int8")):
        layer = plain.get_submodule(at)
        layer.weight = torch.nn.Parameter(layer.weight.data.clone())
        made = QLayer(layer, LayerPlan(formats.parse(fmt)))
        scale = fit_scale(layer.weight, formats.parse(fmt), PerRow())
        made.set_weight(quantize(layer.weight, scale, formats.parse(fmt), PerRow()))
        layer.weight.data = dequantize(made.q)
        put(model, at, made)
    assert apart(runner(model, tmp_path).step(ids(2, 7).numpy()), logits_of(plain, ids(2, 7))) < 3e-6
    saved = VOCABULARY * (48 * (32 - 4) - 64 * 8) / 8  # the head fills up its last block
    assert abs(size - (tmp_path / "out" / "model.onnx").stat().st_size - saved) < 2200


@pytest.mark.parametrize("salient", [0, 10, 48])
def test_bands_are_two_products(salient: int, tmp_path: Path) -> None:
    """Weights in bands of 4 bits and 1 bit give the logits of the dense matrix."""
    model, plain = network(layers=1), network(layers=1)
    torch.manual_seed(2)
    for at in [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "q_proj" in n]:
        layer, n, m = model.get_submodule(at), 48, 48
        chosen = torch.zeros(m, dtype=torch.bool)
        chosen[torch.randperm(m)[:salient]] = True
        codes, zero = torch.randint(0, 16, (n, salient)), torch.randint(0, 16, (n, 1))
        signs = torch.rand(n, m - salient) < 0.5
        a, b, c = half(torch.rand(n, 1)), half(torch.randn(n, 1) / 4), half(torch.rand(m) + 0.5)
        q = Bands(chosen, codes.byte(), half(torch.rand(n, 1) / 9), zero.byte(), signs, a, b, c, (n, m))
        made = QLayer(layer, LayerPlan())
        made.set_weight(q)
        put(model, at, made)
        plain.get_submodule(at).weight.data = dequantize(q)
    assert apart(runner(model, tmp_path).step(ids(2, 7).numpy()), logits_of(plain, ids(2, 7))) < 3e-6


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("ternary", PerRow()), ("int4", PerGroup(32)), ("int4", PerGroup(32, "e8m0")), ("int8", PerRow())],
)
def test_the_file_is_as_large_as_its_bits(name: str, granularity, tmp_path: Path) -> None:
    """Bytes on disk are within 2 % of the accounted bits of all weights."""
    model, _ = rounded(network(layers=1, hidden=768, intermediate_size=768), name, granularity)
    found = export_nbits.export(decoder_of(model, model.config), tmp_path / "out")
    assert found["bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert abs(found["bytes"] / found["accounted_bytes"] - 1) < 0.02
    assert found["wider"] == {}
    model, _ = rounded(network(layers=1), "int3", where="v_proj")
    found = export_nbits.export(decoder_of(model, model.config), tmp_path / "out3")
    assert found["wider"] == {"model.layers.0.self_attn.v_proj": "int3 as 4 bits"}


def test_large_files_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what protobuf holds the weights go to model.onnx.data, with the same logits."""
    model, plain = rounded(network(), "int8")
    monkeypatch.setattr(export_nbits, "_LARGEST", 0)
    assert apart(runner(model, tmp_path).step(ids(1, 7).numpy()), logits_of(plain, ids(1, 7))) < 3e-6
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > (tmp_path / "out" / "model.onnx").stat().st_size


def test_text_goes_in_and_out(tmp_path: Path) -> None:
    """`continued` takes the tokenizer and the configuration beside the file, and refuses what leaves no room."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    model, _ = rounded(network(), "int4")
    decoder = decoder_of(model, model.config, [tmp_path / "tokenizer.json"])
    export_nbits.export(decoder, tmp_path / "out", level=1)
    file = tmp_path / "out" / "model.onnx"
    found = continued(file, "w3 w4 w5", 7)
    want = OnnxDecoder(file).generate(np.array([[3, 4, 5]]), 7)
    assert found["text"] == " ".join(f"w{n}" for n in want[0])
    assert (found["prompt_tokens"], found["tokens"]) == (3, 7)
    assert continued(file, " ".join(["w3"] * 60), 7)["tokens"] == 4
    with pytest.raises(InputError, match="64 tokens, which leaves no room"):
        continued(file, " ".join(["w3"] * 64), 7)
    with pytest.raises(InputError, match="no token"):
        continued(file, "", 7)


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """One line that names the layer and what is accepted, before anything is written."""

    def refused(match: str, model) -> None:
        with pytest.raises(InputError, match=match):
            export_nbits.export(decoder_of(model, model.config), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("q_proj': e4m3 needs more than 8 bits.*accepted: ternary", rounded(network(), "e4m3", where="q_proj")[0])
    refused("q_proj': groups of 8 weights.*multiple of 16", rounded(network(), "int4", PerGroup(8), "q_proj")[0])
    model, _ = rounded(network(), "int4")
    model.model.layers[1].self_attn.v_proj.set_act(ActQuant(formats.parse("int8"), 0.1))
    refused("layers.1.self_attn.v_proj': its input is quantized to int8.*--acts float", model)
    refused("'longrope' are not exported; accepted: default", network("phi3", rope_parameters=LONG))
    split = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": YARN}
    refused("'yarn' are not exported; accepted: default", network("gemma3", rope_parameters=split))
    refused("activation 'relu'.*accepted: silu", network(hidden_act="relu"))
    other = network()
    other.config.model_type = "opt"
    refused("'opt' is not exported.*accepted: gemma, gemma2, gemma3_text", other)
    with pytest.raises(InputError, match="accuracy level 0; accepted: 1"):
        export_nbits.build(decoder_of(network(), network().config), level=0)


def test_other_files_are_no_decoders(tmp_path: Path) -> None:
    """A missing file, one that is no ONNX, and an ONNX file of another kind are refused in one line."""
    with pytest.raises(InputError, match="no such file"):
        OnnxDecoder(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(InputError, match="onnxruntime cannot load it"):
        OnnxDecoder(tmp_path / "text.onnx")
    torch.manual_seed(0)
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "neg.onnx")
    with pytest.raises(InputError, match="no decoder; accepted: inputs input_ids"):
        OnnxDecoder(tmp_path / "neg.onnx")


def test_only_products_and_lookups_are_onnxruntimes_own(tmp_path: Path) -> None:
    """All other operators are standard ONNX."""
    model, _ = rounded(network("qwen3"), "int4")
    made = export_nbits.build(decoder_of(model, model.config))
    own = {node.op_type for node in made.graph.node if node.domain}
    assert own == {"MatMulNBits"} and ort.get_available_providers()
