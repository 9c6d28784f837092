"""GGUF files, as gguf's own reader and dequantizer and transformers' loader of them see them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hwmodel import formats
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit import export_gguf
from quantkit.decoder import decoder_of
from quantkit.errors import InputError
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import QTensor, dequantize, quantize

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")
gguf = pytest.importorskip("gguf", reason="not installed: pip install 'quantkit[lm]'")

from tiny_decoders import VOCABULARY, apart, ids, logits_of, network, put, rounded  # noqa: E402

LLAMA_CPPS = {"query_pre_attn_scalar": 16, "layer_types": None}  # of a Gemma, as llama.cpp's code has them
LAYERS = [
    ("ternary", PerRow(), 256, "TQ2_0"),
    ("ternary", PerGroup(256), 512, "TQ2_0"),
    ("ternary", PerGroup(128), 512, "Q4_0"),
    ("ternary", PerRow(), 96, "Q4_0"),
    ("binary", PerTensor(), 64, "Q4_0"),
    ("int4", PerGroup(32), 96, "Q4_0"),
    ("int2", PerGroup(64), 128, "Q4_0"),
    ("int4n", PerTensor(), 96, "Q4_0"),
    ("int5", PerRow(), 96, "Q8_0"),
    ("int8", PerGroup(32), 96, "Q8_0"),
    ("e2m1", PerGroup(32, "e8m0"), 96, "MXFP4"),
]


def layer_of(name: str, granularity, columns: int, pow2: bool = False) -> QLayer:
    """A layer of 12 random rows in a format; pow2: with scales that are powers of two."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(columns, 12, bias=False)
    fmt = formats.parse(name)
    made = QLayer(plain, rounded(torch.nn.ModuleDict({"x": plain}), name, granularity)[0]["x"].plan)
    shape = (12, columns)
    count = {"tensor": (1, 1), "row": (12, 1)}.get(str(granularity), (12, columns // getattr(granularity, "size", 1)))
    scale = torch.rand(count) / 50 + 0.002
    scale = torch.exp2(torch.log2(scale).round()) if pow2 or "e8m0" in str(granularity) else scale
    q = quantize(plain.weight.detach() * 3, scale, fmt, granularity)
    assert tuple(q.shape) == shape
    made.set_weight(q)
    return made


def decoded(stored) -> torch.Tensor:
    """What gguf's own dequantizer makes of a stored weight."""
    return torch.from_numpy(gguf.dequantize(stored.data, gguf.GGMLQuantizationType[stored.kind]).copy())


@pytest.mark.parametrize(("name", "granularity", "columns", "kind"), LAYERS)
def test_gguf_decodes_our_weights(name: str, granularity, columns: int, kind: str) -> None:
    """The values are ours with float16 scales, and ours bit for bit where scales are powers of two."""
    for pow2 in (False, True):
        layer = layer_of(name, granularity, columns, pow2)
        stored = export_gguf.stored(layer)
        assert stored.kind == kind
        assert isinstance(layer.q, QTensor)
        got, want = decoded(stored), dequantize(layer.q)
        exact = pow2 or kind == "MXFP4"
        assert (export_gguf.scale_error(layer.q) == 0) == exact
        assert torch.equal(got, want) if exact else bool(((got - want).abs() <= 2.0**-11 * want.abs()).all())


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_reads_the_file(family: str, tmp_path: Path) -> None:
    """What transformers' own reader of GGUF makes of the file gives the logits of the network, up to float16 scales."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    sizes = {"layers": 2, "hidden": 96, "intermediate_size": 64, "head_dim": 16}
    options = {"mistral": {"sliding_window": 64}, "gemma2": LLAMA_CPPS, "gemma3": LLAMA_CPPS | {"layers": 6}}
    model, plain = rounded(network(family, **(sizes | options.get(family, {}))), "int8", where="layers")
    file = tmp_path / "model.gguf"
    found = export_gguf.export(decoder_of(model, model.config), file)
    assert found["bytes"] == file.stat().st_size
    with torch.device("meta"):
        config = network("llama", **sizes).config if family == "mistral" else model.config  # the same to llama.cpp
        names = transformers.AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=names)
    there = copy.deepcopy(plain)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert there.load_state_dict(read["tensors"], strict=False).missing_keys == sorted(tied)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert read["config"][key] == getattr(model.config, key)
    fields = gguf.GGUFReader(file).fields
    if family.startswith("gemma"):
        assert read["config"]["sliding_window"] == 5 and read["config"]["max_position_embeddings"] == 64
        assert read["config"]["head_dim"] == 16
    if family == "gemma2":
        assert fields["gemma2.attn_logit_softcapping"].contents() == 3.0
        assert fields["gemma2.final_logit_softcapping"].contents() == 30.0
    if family == "llama3":
        freqs = torch.from_numpy(
            next(t for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight").data.copy()
        )
        base = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(base / freqs, model.model.rotary_emb.inv_freq)
    assert apart(logits_of(there, ids(2, 9)), logits_of(plain, ids(2, 9))) < 3e-3


@pytest.mark.parametrize(("name", "granularity"), [("int4", PerRow()), ("ternary", PerTensor()), ("int8", PerRow())])
def test_rows_that_no_block_divides_are_half_floats(name: str, granularity, tmp_path: Path) -> None:
    """As llama.cpp's quantizer has it; the file says so of those layers, the others keep their types."""
    model, plain = rounded(network(hidden=48, intermediate_size=96), name, granularity, where="layers.0")
    found = export_gguf.export(decoder_of(model, model.config), tmp_path / "x.gguf")
    wide = {n for n in found["types"] if not n.endswith("down_proj")}
    assert found["wider"].keys() == wide and len(wide) == 6
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    down = held["blk.0.ffn_down.weight"].tensor_type.name
    up = held["blk.0.ffn_up.weight"]
    assert up.tensor_type.name == found["types"]["model.layers.0.mlp.up_proj"] == "F16" and down != "F16"
    want = plain.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert (np.abs(up.data.astype(np.float32) - want) <= 2.0**-11 * np.abs(want)).all()
    assert 0 < found["scale_error"] <= 2.0**-11


def test_biases_are_in_the_file(tmp_path: Path) -> None:
    """A bias lies beside its layer, in the order of the layer's rows; where llama.cpp has no place it is refused."""
    model, _ = rounded(network(hidden=96, intermediate_size=64), "int4", where="layers")
    model.model.layers[1].self_attn.q_proj.bias.data = torch.arange(96.0)
    model.model.layers[0].mlp.down_proj.bias.data = torch.arange(96.0)
    export_gguf.export(decoder_of(model, model.config), tmp_path / "x.gguf")
    held = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert sorted(n for n in held if n.endswith("bias")) == ["blk.0.ffn_down.bias", "blk.1.attn_q.bias"]
    pairs = held["blk.1.attn_q.bias"].reshape(6, 8, 2)
    assert (pairs[..., 1] - pairs[..., 0] == 8).all()
    assert (held["blk.0.ffn_down.bias"] == np.arange(96)).all()
    model, _ = rounded(network("qwen3", hidden=96, intermediate_size=64), "int4", where="layers")
    model.model.layers[0].mlp.down_proj.bias.data += 1
    with pytest.raises(InputError, match=r"down_proj' has a bias.*qwen3 has no place for"):
        export_gguf.export(decoder_of(model, model.config), tmp_path / "y.gguf")


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    """Tokens, kinds and scores of a character encoding with byte fallback; scores fall with the order of merges."""
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7, "▁ab": 8}
    record = {
        "model": {"type": "BPE", "vocab": vocab, "byte_fallback": True, "unk_token": "<unk>"},
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}],
        "post_processor": {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
    }
    record["model"]["merges"] = [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    model, _ = rounded(network(hidden=96, intermediate_size=64), "int4", where="layers")
    decoder = decoder_of(model, model.config, [tmp_path / "tokenizer.json"])
    assert export_gguf.export(decoder, tmp_path / "x.gguf")["tokenizer"] == "llama"
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    said = {key.rpartition(".")[2]: field.contents() for key, field in fields.items() if "tokenizer" in key}
    assert said["tokens"][:9] == list(vocab) and len(said["tokens"]) == VOCABULARY
    assert said["token_type"][:9] == [2, 3, 6, 1, 1, 1, 1, 1, 1] and set(said["token_type"][9:]) == {5}
    scores = dict(zip(vocab, said["scores"], strict=False))
    assert scores["ab"] > scores["▁a"] > scores["▁ab"] > scores["a"]
    assert said["add_space_prefix"] and said["add_bos_token"] and said["bos_token_id"] == 1


def test_byte_level_tokens(tmp_path: Path) -> None:
    """A byte-level encoding keeps its merges, and its way of splitting text has llama.cpp's name."""
    model, _ = rounded(network(hidden=96, intermediate_size=64), "int4", where="layers")
    patterns = {r"\p{N}{1,3}": "llama-bpe", r"(\p{L}+|\p{N})": "qwen2", None: "gpt-2"}
    for pattern, name in patterns.items():
        split = {"type": "ByteLevel"} if pattern is None else {"type": "Split", "pattern": {"Regex": pattern}}
        record = {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
            "pre_tokenizer": split,
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(record))
        decoder = decoder_of(model, model.config, [tmp_path / "tokenizer.json"])
        assert export_gguf.export(decoder, tmp_path / "x.gguf", force=True)["tokenizer"] == "gpt2"
        fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
        assert fields["tokenizer.ggml.merges"].contents() == ["a b"]
        assert fields["tokenizer.ggml.pre"].contents() == name
        assert "tokenizer.chat_template" not in fields
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for file, text in (
        ("tokenizer_config.json", json.dumps({"chat_template": template})),
        ("chat_template.jinja", template),
    ):
        (tmp_path / file).write_text(text)
        decoder = decoder_of(model, model.config, [tmp_path / "tokenizer.json", tmp_path / file])
        export_gguf.export(decoder, tmp_path / "x.gguf", force=True)
        assert gguf.GGUFReader(tmp_path / "x.gguf").fields["tokenizer.chat_template"].contents() == template


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """One line that names the layer and what is accepted, before anything is written."""

    def refused(match: str, model) -> None:
        with pytest.raises(InputError, match=match):
            export_gguf.export(decoder_of(model, model.config), tmp_path / "none.gguf")
        assert not (tmp_path / "none.gguf").exists()

    def wide(name: str, granularity=PerRow()):  # noqa: B008
        return rounded(network(hidden=96, intermediate_size=64), name, granularity, where="q_proj")[0]

    refused("q_proj': e4m3 per row.*accepted: ternary, binary, int2 to int8", wide("e4m3"))
    refused("q_proj': uint4 per row", wide("uint4"))
    refused("q_proj': int4 per group16, in rows of 96", wide("int4", PerGroup(16)))
    refused("'gpt2' is not exported to gguf; accepted: gemma2, gemma3_text, llama", network("gpt2"))
    other = LLAMA_CPPS | {"hidden": 96}
    refused("query_pre_attn_scalar is 9, which.*gemma2 has no place for; accepted: 16", network("gemma2"))
    refused("layer_types is .*; accepted: .'sliding_attention'", network("gemma3", query_pre_attn_scalar=16))
    refused("rotary base .* 100.0.*10000.0", network("gemma3_linear", **LLAMA_CPPS))
    refused("not capped have no place", network("gemma2", **other, attn_logit_softcapping=None))
    refused("no head of its own", network("gemma2", **other, tie_word_embeddings=False))
    refused("hidden_activation is silu", network("gemma2", **other, hidden_activation="silu"))
    refused("'yarn' are not exported", network(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}))
    model = wide("int4")
    layer = model.model.layers[0].self_attn.q_proj
    layer.set_weight(QTensor(layer.q.codes, layer.q.scale * 1e-6, *list(vars(layer.q).values())[2:]))
    refused("q_proj': scales from .* do not fit gguf's float16; accepted: 6.1e-05", model)
    layer.in_scale = torch.ones(96)
    refused("q_proj': gguf has no place for factors", model)
    layer.set_act(ActQuant(formats.parse("int8"), 0.1))
    refused("q_proj': its input is quantized to int8, which gguf does not carry", model)


def test_a_quantized_head_and_embedding(tmp_path: Path) -> None:
    """A head of its own is `output`, in its type; a tied float head is left out."""
    model, _ = rounded(network("qwen2", hidden=96, intermediate_size=64), "int4", where="layers")
    export_gguf.export(decoder_of(model, model.config), tmp_path / "tied.gguf")
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(tmp_path / "tied.gguf").tensors}
    put(model, "lm_head", rounded(model, "int8", where="lm_head")[0].lm_head)
    found = export_gguf.export(decoder_of(model, model.config), tmp_path / "own.gguf")
    held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "own.gguf").tensors}
    assert held["output.weight"] == found["types"]["lm_head"] == "Q8_0" and held["token_embd.weight"] == "F32"


@pytest.mark.parametrize(
    ("family", "name", "granularity"),
    [
        ("llama", "ternary", PerRow()),
        ("llama", "int4", PerGroup(32)),
        ("llama", "e2m1", PerGroup(32, "e8m0")),
        ("llama3", "int8", PerRow()),
        ("mistral", "int4", PerGroup(32)),
        ("qwen2", "int8", PerGroup(32)),
        ("qwen3", "int8", PerRow()),
    ],
)
def test_llama_cpp_runs_the_file(family: str, name: str, granularity, tmp_path: Path) -> None:
    """llama.cpp's logits are within a twentieth of the largest: it rounds a layer's inputs to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    sizes = {"layers": 2, "hidden": 768, "intermediate_size": 512, "head_dim": 128}
    model = network(family, **(sizes | ({"sliding_window": 64} if family == "mistral" else {})))
    for parameter in model.parameters():  # milder attention, so that a small error stays one
        parameter.data = parameter.data * 0.3 if parameter.dim() == 2 else parameter.data
    model, plain = rounded(model, name, granularity, where="layers")
    export_gguf.export(decoder_of(model, model.config), tmp_path / "x.gguf")
    runtime = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    x = ids(1, 12)
    runtime.eval(x[0].tolist())
    scores = np.array(runtime.scores[:12])
    runtime.close()
    assert apart(scores, logits_of(plain, x)[0]) < 0.05
