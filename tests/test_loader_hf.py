"""Hugging Face directories load as transformers would load them; what is wrong with one is said in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lm import transformers
from tokenizers import pre_tokenizers
from torch import nn

from quantkit.capture import captured
from quantkit.decoder import FAMILIES
from quantkit.errors import InputError
from quantkit.loaders import hf
from quantkit.loading import load_checkpoint

STORIES = Path(__file__).parents[2] / "shared" / "data" / "lm" / "stories260k"
SMALL = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN = {
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "smollm3": {"no_rope_layers": [1, 0]},
}
"""What makes a family's small network differ from the others; windows shorter than the texts of the tests."""
GPT2 = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: str):
    """A random model of a family."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**(GPT2 if kind == "gpt2" else SMALL | OWN.get(kind, {})))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def folder(tmp_path, kind="llama", **options):
    """It, saved as transformers saves."""
    made(kind).save_pretrained(tmp_path / kind, **options)
    return tmp_path / kind


def edit(path, **changes):
    """The JSON file with some keys changed."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def words(path, n):
    """A tokenizer of n words in the directory."""
    vocabulary = {f"w{i}": i for i in range(n)}
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["whole", "sharded"])
def test_a_family_loads(kind, options, tmp_path):
    """Logits are the saved model's, in float32 and evaluation mode, and every weight matrix is an nn.Linear."""
    path = folder(tmp_path, kind, **options)
    assert hf.sniff(path)
    model = hf.load(path)
    with torch.inference_mode():
        wanted = made(kind)(model.example).logits
        torch.testing.assert_close(model.module(model.example).logits, wanted, rtol=1e-5, atol=1e-6)
    assert not model.module.training and model.meta["algo"] == kind and len(model.meta["sha256"]) == 64
    assert model.meta["context"] == 64 and model.meta["vocabulary"] == 53
    linears = [m for m in model.layers().values() if isinstance(m, nn.Linear)]
    per_layer = 4 if kind in ("gpt2", "phi3") else 7
    assert len(linears) == 2 * per_layer + 1
    assert all(p.dtype == torch.float32 for p in model.module.parameters())


def test_half_precision_becomes_float32(tmp_path):
    """A bfloat16 checkpoint loads as the same values in float32."""
    model = made("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path).module.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_captured(kind, tmp_path):
    """The front door loads it, and its graph gives the same logits for another batch and another length."""
    model = load_checkpoint(folder(tmp_path, kind))
    graph = captured(model)
    assert "untraced" not in graph.meta and "float_layers" not in graph.meta
    ids = torch.randint(0, 53, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(graph.module(ids), model.module(ids).logits, rtol=1e-5, atol=1e-6)
    names = list(graph.layers())
    assert names[-1] == "lm_head" and ("embed" in names[0] or "wte" in names[0]) and len(graph.points()) == 8
    assert model.module.config.use_cache


def test_sniffing(tmp_path):
    """A directory with config.json or safetensors is one; a quantized directory and a file are not."""
    path = folder(tmp_path)
    assert not hf.sniff(path / "config.json") and not hf.sniff(tmp_path) and not hf.sniff(tmp_path / "absent")
    (path / "quantkit.json").touch()
    assert not hf.sniff(path)


def no_config(path):
    (path / "config.json").unlink()


def broken_config(path):
    (path / "config.json").write_text('{"model_type": "llama", ')


def list_config(path):
    (path / "config.json").write_text("[]")


def near_type(path):
    edit(path / "config.json", model_type="lama")


def own_code(path):
    edit(path / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('ran')")


def quantized(path):
    edit(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def both_ways(path):
    edit(path / "config.json", use_bidirectional_attention=True)


def odd_sizes(path):
    edit(path / "config.json", hidden_size="wide")


def no_weights(path):
    (path / "model.safetensors").unlink()


def pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut_off(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(path):
    edit(path / "config.json", intermediate_size=41)


def huge(path):
    edit(path / "config.json", vocab_size=2_000_000_000)


def many_layers(path):
    edit(path / "config.json", num_hidden_layers=2_000_000_000)


def change(path, work):
    tensors = load_file(path / "model.safetensors")
    work(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def lost_tensor(path):
    change(path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def strange_tensor(path):
    change(path, lambda t: t.update(stranger=torch.zeros(3)))


def nan_weight(path):
    change(path, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].__setitem__(5, float("nan")))


def large_tokenizer(path):
    words(path, 60)


def broken_tokenizer(path):
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_config, "no config.json"),
        (broken_config, "cannot be read as JSON"),
        (list_config, "holds a list"),
        (near_type, "did you mean 'llama'"),
        (own_code, "auto_map.* is not run"),
        (quantized, "quantized already"),
        (both_ways, "use_bidirectional_attention.*accepted: causal"),
        (odd_sizes, "config.json"),
        (no_weights, "has no model.safetensors"),
        (pickled, "pytorch_model.bin is a pickle"),
        (cut_off, "cannot be read as safetensors"),
        (other_shape, r"'model.layers.0.mlp.down_proj.weight' is \(24, 40\) instead of \(24, 41\)"),
        (huge, "describes .* parameters, the files hold"),
        (many_layers, "2000000000 layers"),
        (lost_tensor, "missing 'model.layers.1.mlp.up_proj.weight'"),
        (strange_tensor, "unexpected 'stranger'"),
        (nan_weight, r"holds nan at \[3, 5\]"),
        (large_tokenizer, "ids up to 59, config.json a vocabulary of 53"),
        (broken_tokenizer, "cannot be read as a tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_said_in_a_line(spoil, says, tmp_path):
    """Each fault of a directory is one line that names it."""
    path = folder(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=says) as caught:
        hf.load(path)
    assert "\n" not in str(caught.value) and "llama" in str(caught.value)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """A known family loads by transformers' own class, whatever code the directory offers in its stead."""
    path = folder(tmp_path)
    wanted = hf.load(path).module.state_dict()
    edit(path / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('ran')")
    found = hf.load(path).module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_faults_of_an_index_are_named(tmp_path):
    """Missing shards, files outside the directory and tensors that no file holds are errors."""
    whole = folder(tmp_path, max_shard_size="8KB")
    index = json.loads((whole / hf.INDEX).read_text())["weight_map"]

    def spoiled(name, **entries):
        shutil.copytree(whole, tmp_path / name)
        edit(tmp_path / name / hf.INDEX, weight_map=index | entries)
        return tmp_path / name

    last = sorted(set(index.values()))[-1]
    (spoiled("a") / last).unlink()
    with pytest.raises(InputError, match=f"weight files are missing: {last}"):
        hf.load(tmp_path / "a")
    with pytest.raises(InputError, match="outside the directory"):
        hf.load(spoiled("b", extra="../secret.safetensors"))
    with pytest.raises(InputError, match="lists 1 tensors that its files do not hold: 'extra'"):
        hf.load(spoiled("c", extra=last))
    with pytest.raises(InputError, match="no weight_map"):
        edit(spoiled("d") / hf.INDEX, weight_map=[])
        hf.load(tmp_path / "d")


def test_a_tokenizer_is_read(tmp_path):
    """A tokenizer of at most the model's tokens comes with the model; without one the model loads all the same."""
    path = folder(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        hf.read_tokenizer(path)
    words(path, 53)
    hf.load(path)
    assert hf.read_tokenizer(path).token_to_id("w7") == 7


def test_a_tokenizer_does_not_cut_texts(tmp_path):
    """A length that training left in tokenizer.json counts for nothing, as in transformers."""
    path = folder(tmp_path)
    words(path, 53)
    saved = hf.read_tokenizer(path)
    saved.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    saved.enable_truncation(3)
    saved.enable_padding(length=9)
    saved.save(str(path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    for text in ("w1 w2", "w1 w2 w3 w4 w5"):
        assert hf.read_tokenizer(path).encode(text).ids == theirs(text).input_ids == [int(w[1:]) for w in text.split()]


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k is not staged beside the project")
def test_a_real_checkpoint_loads():
    """stories260k has 260,032 parameters and continues a story in words."""
    from quantkit.tasks.generation import generate

    model, tokenizer = hf.load(STORIES), hf.read_tokenizer(STORIES)
    assert sum(p.numel() for p in model.module.parameters()) == 260_032
    ids = torch.tensor([tokenizer.encode("Once upon a time").ids])
    assert "there was a little girl" in tokenizer.decode(generate(model.module, ids, 20)[0].tolist())
