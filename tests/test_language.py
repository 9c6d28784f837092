"""Laws of language models: the graph, transformers' class and the directory are one function, counted honestly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call, document, error
from test_loader_hf import edit, folder, made
from tiny_lm import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from quantkit.artifact import load_artifact, save_artifact
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.language import causal_lm, continued, perplexity, read_calibration, with_defaults
from quantkit.loaders import hf
from quantkit.loading import load_checkpoint
from quantkit.model import Calib, Model
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.specs import bits_per_weight, layer_specs, parameter_count

STORY = "w3 w4 w5 w6 w7 w8 <|endoftext|> w9 <|endoftext|>" + " w11 w12 w13 w14 w15" * 30
INT4, FLOAT = make_plan("int4", "float"), LayerPlan()


def checkpoint(tmp_path: Path, kind: str = "llama", **config: Any) -> Path:
    """A random model with a tokenizer of words, and a text beside it."""
    path = folder(tmp_path, kind)
    if config:
        altered = made(kind).config
        for key, value in config.items():
            setattr(altered, key, value)
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(altered).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(STORY)
    return path


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(0, 53, (batch, length), generator=torch.Generator().manual_seed(seed))


def quantized(model: Model, *plan: tuple[str, LayerPlan], steps: Any = ()) -> Model:
    """The model under a plan, calibrated on random tokens."""
    return quantize(model, Recipe(plan, steps), Calib(ids(12, 16), 4))


ALL = (("*", make_plan("int4", "int8")), ("*.attention.*", FLOAT))
SOFT_CAPPED = (("*", make_plan("int4", "int8")), ("*.matmul*.*", FLOAT))
STEPS = (("smoothquant", {}), ("gptq", {}))
HEAD = (("lm_head", make_plan("int8", "float")),)
SLOW = ("granite", "mistral", "olmo2", "phi3", "qwen2", "smollm3")


@pytest.mark.parametrize(
    ("kind", "plan", "steps"),
    [
        *((kind, ALL, STEPS) for kind in ("gemma", "gemma3_text", "gpt2", "llama", "qwen3")),
        ("gemma2", SOFT_CAPPED, STEPS),
        *(pytest.param(kind, ALL, STEPS, marks=pytest.mark.slow) for kind in SLOW),
        ("gemma", HEAD, ()),
    ],
)
def test_graph_class_and_directory_are_one_function(kind: str, plan: Any, steps: Any, tmp_path: Path) -> None:
    """Saved and loaded the logits are the same bits; transformers' class with the QLayers gives them, too.

    What SmoothQuant folds into norms, embeddings, biases and the constant behind Gemma's embedding are all there.
    """
    model = load_checkpoint(folder(tmp_path, kind))
    done, tokens = quantized(model, *plan, steps=steps), ids(3, 21, 1)
    save_artifact(done, tmp_path / "q")
    loaded = load_checkpoint(tmp_path / "q")
    network = causal_lm(done)
    with torch.inference_mode():
        wanted = done.module(tokens)
        assert torch.equal(loaded.module(tokens), wanted)
        torch.testing.assert_close(network(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(causal_lm(loaded)(tokens).logits, network(tokens).logits, rtol=0, atol=0)
    assert loaded.meta == done.meta and layer_specs(loaded) == layer_specs(done)
    assert bits_per_weight(loaded) == bits_per_weight(done)
    assert {n for n, m in network.named_modules() if isinstance(m, QLayer)} == set(done.qlayers())
    assert type(network) is type(made(kind))


@pytest.mark.parametrize(
    "kind", ["gemma", "gemma2", "gemma3_text", "gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)]
)
def test_a_quantized_network_decodes(kind: str, tmp_path: Path) -> None:
    """With transformers' cache, token by token and past a sliding window, the logits are those of one pass."""
    network = causal_lm(quantized(load_checkpoint(folder(tmp_path, kind)), ("*", INT4)))
    tokens, held = ids(2, 9), None
    with torch.inference_mode():
        for i in range(9):
            output = network(tokens[:, i : i + 1], past_key_values=held, use_cache=True)
            held = output.past_key_values
        torch.testing.assert_close(output.logits[:, -1], network(tokens).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_sabotage_a_lost_norm_is_caught(tmp_path: Path) -> None:
    """The law above fails if a folded normalization is left behind."""
    done = quantized(load_checkpoint(folder(tmp_path)), ("*", make_plan("int4", "float")), steps=(("smoothquant", {}),))
    network: Any = causal_lm(done)
    network.model.norm.weight.data = network.model.norm.weight * 1.01
    with torch.inference_mode(), pytest.raises(AssertionError):
        torch.testing.assert_close(network(ids(1, 9)).logits, done.module(ids(1, 9)), rtol=1e-4, atol=1e-5)


def test_a_shared_weight_is_stored_and_counted_once(tmp_path: Path) -> None:
    """Tied embeddings are one matrix: of one format one is stored, quantized differently two, for as many weights."""
    model = captured(load_checkpoint(checkpoint(tmp_path, tie_word_embeddings=True)))
    layers = model.layers()
    count = sum(layer.weight.numel() for name, layer in layers.items() if name != "lm_head")
    table = layers["lm_head"].weight.numel()
    assert model.meta["tied"] == {"lm_head": "model.embed_tokens"}
    assert parameter_count(model) == sum(p.numel() for p in made("llama").parameters()) - table
    body = ("model.layers.*", INT4)
    rows = sum(len(layer.weight) for name, layer in layers.items() if name.startswith("model.layers"))
    inner = 4 * (count - table) + 32 * rows
    sizes = {}
    for name, plan, bits in (
        ("float", [body], 32 * table),
        ("both", [body, ("model.embed_tokens", INT4), ("lm_head", INT4)], 4 * table + 32 * 53),
        ("head", [body, ("lm_head", INT4)], 36 * table + 32 * 53),
        ("embedding", [body, ("model.embed_tokens", INT4)], 36 * table + 32 * 53),
    ):
        done = quantized(model, *plan)
        save_artifact(done, tmp_path / name)
        loaded = load_artifact(tmp_path / name)
        assert bits_per_weight(loaded) == bits_per_weight(done) == pytest.approx((inner + bits) / count)
        with torch.inference_mode():
            assert torch.equal(loaded.module(ids(2, 9)), done.module(ids(2, 9)))
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size - (inner + bits) / 8
    assert max(sizes.values()) < min(sizes.values()) + 700  # names and sizes of another tensor or two
    assert max(sizes.values()) < 8000  # header and norms


def test_what_stays_in_float(tmp_path: Path) -> None:
    """Embeddings, head and operands of attention do, unless a later entry names them."""
    for kind in ("gpt2", "gemma", "gemma2"):
        model = captured(load_checkpoint(folder(tmp_path, kind)))
        recipe = with_defaults(uniform("int4", "int8"), model)
        done = quantize(model, recipe, Calib(ids(4, 8)))
        kept = set(done.layers()) - set(done.qlayers())
        embeddings = {"model.embed_tokens"} if kind != "gpt2" else {"transformer.wte", "transformer.wpe"}
        assert kept == embeddings | {"lm_head"}
        assert all(point.act is None for point in done.points().values())
    recipe = replace(recipe, plan=(*recipe.plan, ("lm_head", make_plan("int8", "float"))))
    assert "lm_head" in quantize(model, recipe, Calib(ids(4, 8))).qlayers()


def alone(module: Any, tokens: list[torch.Tensor]) -> float:
    """Perplexity by transformers' own loss, document by document."""
    with torch.inference_mode():
        losses = [module(t[None], labels=t[None]).loss.item() * (len(t) - 1) for t in tokens]
    return math.exp(sum(losses) / sum(len(t) - 1 for t in tokens))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_perplexity_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """Documents are split, those of one token dropped, others cut at the context: the commands' mean is by its loss."""
    path = checkpoint(tmp_path, kind)
    text, tokenizer = tmp_path / "t.txt", hf.read_tokenizer(path)
    tokens = [torch.tensor(tokenizer.encode(part).ids)[:64] for part in STORY.split("<|endoftext|>")]
    tokens = [t for t in tokens if len(t) > 1]
    assert [len(t) for t in tokens] == [6, 64]
    found = document("evaluate", path, "--text", text)
    assert found["mean"] == pytest.approx(alone(made(kind), tokens), rel=1e-6)
    assert (found["metric"], found["n"], found["tokens"]) == ("perplexity", 2, 68)
    done = quantized(load_checkpoint(path), ("*", INT4))
    save_artifact(done, tmp_path / "q", files=hf.companions(path))
    found = document("evaluate", tmp_path / "q", "--text", text)
    assert found["mean"] == pytest.approx(alone(causal_lm(done), tokens), rel=1e-6)
    cached = document("evaluate", tmp_path / "q", "--text", text, "--kv-cache", "saq:levels=16-2,block=16,group=8")
    assert cached["mean"] != found["mean"] and cached["kv_cache"].startswith("saq")


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_quantized_operands_are_never_ignored(kind: str, tmp_path: Path) -> None:
    """Perplexity without a cache computes with them; where only transformers' class can be used it is refused."""
    path, inputs = checkpoint(tmp_path, kind), SOFT_CAPPED if kind == "gemma2" else ALL
    done = quantized(load_checkpoint(path), ("*", make_plan("int4", "int3")))
    plain = quantized(load_checkpoint(path), ("*", make_plan("int4", "int3")), inputs[1])
    tokenizer, text = hf.read_tokenizer(path), tmp_path / "t.txt"
    assert perplexity(done, tokenizer, text).mean != pytest.approx(perplexity(plain, tokenizer, text).mean, rel=1e-6)
    save_artifact(done, tmp_path / "q", files=hf.companions(path))
    for line in (
        error("evaluate", tmp_path / "q", "--text", text, "--kv-cache", "kivi:bits=4,group=8"),
        error("generate", tmp_path / "q", "--prompt", "w3"),
    ):
        assert "operands of attention are quantized" in line and f"--layer '{inputs[1][0]}=float/float'" in line


def test_calibration_windows_are_the_documents_end_to_end(tmp_path: Path) -> None:
    """Windows are cut from the joined tokens, the rest is dropped; `documents` takes the first."""
    path = checkpoint(tmp_path)
    model, tokenizer = load_checkpoint(path), hf.read_tokenizer(path)
    stream = [i for part in STORY.split("<|endoftext|>") for i in tokenizer.encode(part).ids if part.split() != ["w9"]]
    calib = read_calibration(model, tokenizer, tmp_path / "t.txt", 10)
    assert calib.inputs.flatten().tolist() == stream[: len(stream) // 10 * 10] and calib.inputs.shape[1] == 10
    assert read_calibration(model, tokenizer, tmp_path / "t.txt").inputs.shape == (2, 64)
    assert read_calibration(model, tokenizer, tmp_path / "t.txt", 5, documents=1).inputs.tolist() == [[3, 4, 5, 6, 7]]


def test_the_commands_keep_their_contract(tmp_path: Path) -> None:
    """quantize writes a directory that inspect, evaluate and generate read; the same command, the same bytes."""
    path, text = checkpoint(tmp_path), tmp_path / "t.txt"
    options = ("--weights", "int3", "--acts", "float", "--step", "gptq", "--calibration", text, "--window", "16")
    found = document("quantize", path, "-o", tmp_path / "q", *options)
    formats = {e["name"]: e["weight"] for e in found["layers"]}
    assert formats.pop("lm_head") == formats.pop("model.embed_tokens") == "float" and set(formats.values()) == {"int3"}
    assert found["bits_per_weight"] == pytest.approx(bits_per_weight(load_checkpoint(tmp_path / "q")), abs=1e-4)
    call("quantize", path, "-o", tmp_path / "again", *options)
    assert (tmp_path / "q/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert str(tmp_path) not in (tmp_path / "q/quantkit.json").read_text()
    seen = document("inspect", tmp_path / "q")
    assert seen["kind"] == "module" and seen["quantized"] and seen["algo"] == "llama"
    made_text = document("generate", tmp_path / "q", "--prompt", "w3 w4", "--max-tokens", "6")
    assert made_text["prompt_tokens"] == 2 and 1 <= made_text["tokens"] <= 6
    assert (
        call("generate", tmp_path / "q", "--prompt", "w3 w4", "--max-tokens", "6").stdout.strip() == made_text["text"]
    )


def test_generation_is_greedy_or_drawn_and_ends(tmp_path: Path) -> None:
    """Greedy is transformers' greedy; a seed repeats itself; an end token and the context end it; caches decode."""
    path = checkpoint(tmp_path, eos_token_id=None)
    model, tokenizer = load_checkpoint(path), hf.read_tokenizer(path)
    prompt = torch.tensor([tokenizer.encode("w3 w4").ids])
    wanted = model.module.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    text = tokenizer.decode(wanted[0].tolist())
    assert continued(model, tokenizer, "w3 w4", 8)["text"] == text
    drawn = [continued(model, tokenizer, "w3 w4", 8, temperature=2.0, seed=s)["text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert continued(model, tokenizer, "w3", 1000)["tokens"] == 63
    end = int(wanted[0, 4])
    first = wanted[0, 2:].tolist().index(end) + 1
    assert continued(model, tokenizer, "w3 w4", 8, ends=[99, end])["tokens"] == first
    cached = document("generate", path, "--prompt", "w3 w4", "--max-tokens", "8", "--kv-cache", "saq:levels=16,group=8")
    assert cached["text"] == text


def test_a_text_ends_where_transformers_ends_it(tmp_path: Path) -> None:
    """generation_config.json has the word on end tokens where it names some, as in transformers' own `generate`."""
    path = checkpoint(tmp_path)
    prompt = torch.tensor([hf.read_tokenizer(path).encode("w3 w4").ids])
    free = transformers.AutoModelForCausalLM.from_pretrained(path).generate(
        prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=99
    )
    end = int(free[0, 5])
    for named, of in (([end, 99], path / "generation_config.json"), (end, path / "config.json")):
        edit(path / "generation_config.json", eos_token_id=None)
        edit(of, eos_token_id=named)
        if of.name == "config.json":
            (path / "generation_config.json").unlink()
        own = transformers.AutoModelForCausalLM.from_pretrained(path)
        wanted = own.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert wanted.shape[1] < free.shape[1]
        found = document("generate", path, "--prompt", "w3 w4", "--max-tokens", "8")
        assert found["tokens"] == wanted.shape[1] - 2


GPTQ = ("--weights", "int4", "--acts", "float", "--step", "gptq")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("quantize", "M", *GPTQ, "-o", "OUT"), "give --calibration FILE.txt"),
        (("quantize", "M", *GPTQ, "-o", "OUT", "--calibration", "2048"), "calibrated on text"),
        (("quantize", "M", *GPTQ, "-o", "OUT", "--calibration", "T", "--window", "65"), "context of 64"),
        (("quantize", "M", *GPTQ, "-o", "OUT", "--calibration", "T", "--documents", "1"), "less than one window of 64"),
        (("quantize", "M", *GPTQ, "-o", "OUT", "--calibration", "EMPTY"), "holds no text"),
        (("evaluate", "M"), "give --text FILE.txt"),
        (("evaluate", "M", "--text", "EMPTY"), "holds no text"),
        (("evaluate", "M", "--text", "ONE"), "no document has 2 tokens"),
        (("evaluate", "M", "--text", "ABSENT"), "cannot be read"),
        (("evaluate", "M", "--text", "T", "--kv-cache", "sak"), "did you mean 'saq'"),
        (("generate", "M", "--prompt", ""), "has no token"),
        (("generate", "M", "--prompt", "w1 " * 64), "no room in the model's context of 64"),
        (("generate", "M", "--prompt", "w1", "--temperature", "2"), "is of --sample"),
        (("generate", "M", "--prompt", "w1", "--sample", "--temperature", "0"), "above 0"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(command: tuple[str, ...], says: str, tmp_path: Path) -> None:
    """Each fault names the option or file and what is accepted, exit code 2, and no directory is begun."""
    path = checkpoint(tmp_path)
    (tmp_path / "e.txt").write_text(" <|endoftext|> ")
    (tmp_path / "one.txt").write_text("w1 <|endoftext|> w2")
    places = {"M": path, "OUT": tmp_path / "q", "T": tmp_path / "t.txt", "EMPTY": tmp_path / "e.txt"}
    places |= {"ONE": tmp_path / "one.txt", "ABSENT": tmp_path / "absent.txt"}
    before = sorted(tmp_path.iterdir())
    assert says in error(*(places.get(word, word) for word in command))
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_language_models_are_refused_elsewhere(tmp_path: Path) -> None:
    """A policy takes a number of states, no text, no cache and no prompt."""
    agent, text = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip", tmp_path / "t.txt"
    text.write_text(STORY)
    four = ("--weights", "int4", "--acts", "int4", "-o", tmp_path / "q")
    assert "a number of states" in error("quantize", agent, *four, "--calibration", text)
    assert "for language models" in error("quantize", agent, *four, "--window", "8")
    assert "--text and --kv-cache are for one" in error("evaluate", agent, "--text", text)
    assert "is no language model" in error("generate", agent, "--prompt", "hello")
    assert not (tmp_path / "q").exists()


def test_a_damaged_directory_of_a_language_model_is_refused(tmp_path: Path) -> None:
    """Another family, a size that the tensors cannot fill and a lost tensor are one line each."""
    save_artifact(quantized(load_checkpoint(folder(tmp_path)), ("*", INT4)), tmp_path / "q")
    whole = (tmp_path / "q/quantkit.json").read_text()
    for changes, says in (
        ({"model_type": "bert"}, "accepted: gemma"),
        ({"vocab_size": 2_000_000_000}, "describes .* parameters"),
        ({"num_hidden_layers": 2_000_000}, "2000000 layers"),
        ({"hidden_size": 25}, "quantkit.json"),
    ):
        config = json.loads(whole)["structure"]["hf"] | changes
        edit(tmp_path / "q/quantkit.json", structure={"hf": config})
        with pytest.raises(InputError, match=says):
            load_artifact(tmp_path / "q")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """An id beyond the embedding is an error that names the text, also of a quantized directory."""
    path = checkpoint(tmp_path)
    save_artifact(quantized(load_checkpoint(path), ("*", INT4)), tmp_path / "q")
    assert "has no tokenizer.json" in error("evaluate", tmp_path / "q", "--text", tmp_path / "t.txt")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": 50 + i for i in range(53)} | {"w0": 0}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "q" / "tokenizer.json"))
    assert "the model has 53 tokens" in error("evaluate", tmp_path / "q", "--text", tmp_path / "t.txt")
