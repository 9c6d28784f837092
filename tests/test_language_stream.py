"""Block by block is the same as all at once, to the byte; what was interrupted goes on, and nothing else does."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from test_cli import call, document, error
from test_language import checkpoint, ids
from test_loader_hf import change, edit, folder
from torch import fx, nn
from transformers import AutoModelForCausalLM

from quantkit import arithmetic, columns
from quantkit.arithmetic import has_half
from quantkit.artifact import load_artifact, save_artifact
from quantkit.capture import captured
from quantkit.cli import language
from quantkit.errors import InputError
from quantkit.language_store import Store, Stream, save_tensors
from quantkit.language_stream import join, partial_folder, quantize_streamed, why_whole
from quantkit.loaders import hf
from quantkit.model import Calib
from quantkit.observers import Gram
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.qtensor import fit_scale
from quantkit.qtensor import quantize as quantize_weight
from quantkit.recipe import Recipe, make_plan, quantize

FLOAT = LayerPlan()
AIMED = Recipe((("*", make_plan("int4", "float")),), (("gptq", {"act_order": True, "drift": True}),))
INPUTS = Recipe((("*", make_plan("int4", "int8")), ("*.attention.*", FLOAT)), (("gptq", {}), ("bias_correction", {})))
BLOCKS = Recipe((("*.layers.*", make_plan("int3", "float")),))
LEARNED = Recipe((("*.mlp.*", make_plan("int3", "float")),), (("adaround", {"steps": 30}),))


def streamed(path: Path, recipe: Recipe, output: Path, **options: Any) -> None:
    """The directory by blocks."""
    model, weights = hf.outline(path)
    model = captured(model, inplace=True)
    assert why_whole(model, recipe) is None
    assert all(layer.weight.untyped_storage().nbytes() == 4 for layer in model.layers().values())  # nothing read yet
    quantize_streamed(path, model, weights, recipe, Calib(ids(12, 16), 4), output, **options)


def whole(path: Path, recipe: Recipe, output: Path) -> None:
    """The directory by the way of the whole model."""
    save_artifact(quantize(hf.load(path), recipe, Calib(ids(12, 16), 4)), output, files=hf.companions(path))


def same(a: Path, b: Path) -> None:
    """Two quantized directories hold the same files, and in them the same."""
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys()
    for name, array in x.items():
        assert array.dtype == y[name].dtype and np.array_equal(array, y[name]), name
    for name in ("quantkit.json", "specs.json"):
        assert json.loads((a / name).read_text()) == json.loads((b / name).read_text())


@pytest.mark.parametrize(
    ("kind", "recipe", "memory"),
    [
        ("llama", AIMED, 2**30),
        ("gpt2", INPUTS, 20_000),
        ("gemma", INPUTS, 0),
        ("gemma2", AIMED, 0),
        pytest.param("gemma3_text", INPUTS, 0, marks=pytest.mark.slow),
        pytest.param("phi3", INPUTS, 20_000, marks=pytest.mark.slow),
        pytest.param("llama", LEARNED, 2**30, marks=pytest.mark.slow),
        pytest.param("qwen3", AIMED, 0, marks=pytest.mark.slow),
        pytest.param("mistral", BLOCKS, 0, marks=pytest.mark.slow),
    ],
)
def test_blocks_make_the_directory_of_the_whole(kind: str, recipe: Recipe, memory: int, tmp_path: Path) -> None:
    """Every byte of codes, scales, biases, reports and specifications, whatever lies on disk meanwhile."""
    path = folder(tmp_path, kind, max_shard_size="8KB")
    whole(path, recipe, tmp_path / "whole")
    streamed(path, recipe, tmp_path / "q", memory=memory)
    same(tmp_path / "whole", tmp_path / "q")
    assert not partial_folder(tmp_path / "q").exists()
    with torch.inference_mode():
        one, other = (load_artifact(tmp_path / name).module(ids(2, 9)) for name in ("whole", "q"))
    assert torch.equal(one, other)


def test_shared_embeddings_are_stored_once(tmp_path: Path) -> None:
    """Tied tables give the same directory too, in float and quantized alike."""
    path = checkpoint(tmp_path, tie_word_embeddings=True)
    for name, recipe in (("a", BLOCKS), ("b", Recipe((("*", make_plan("int4", "float")),)))):
        whole(path, recipe, tmp_path / f"whole-{name}")
        streamed(path, recipe, tmp_path / name)
        same(tmp_path / f"whole-{name}", tmp_path / name)
        assert json.loads((tmp_path / name / "quantkit.json").read_text())["shared"]


@pytest.mark.parametrize("drift", [False, True])
def test_layers_with_one_input_share_its_moments(drift: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values have one matrix of second moments, gate and up another: 4 for 7 layers of a block."""
    made: list[Gram] = []

    class Counted(Gram):
        """Second moments that leave a trace."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(columns, "Gram", Counted)
    streamed(folder(tmp_path), Recipe(BLOCKS.plan, (("gptq", {"drift": drift}),)), tmp_path / "q")
    assert len(made) == 2 * 4


class Stop:
    """Interrupts after so many layers."""

    def __init__(self, layers: int) -> None:
        self.layers, self.seen = layers, []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append(done)
        if done == self.layers:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "recipe", "layers"),
    [
        ("llama", AIMED, 12),
        pytest.param("llama", AIMED, 3, marks=pytest.mark.slow),
        pytest.param("gemma", INPUTS, 12, marks=pytest.mark.slow),
        pytest.param("gemma", INPUTS, 15, marks=pytest.mark.slow),
        pytest.param("llama", LEARNED, 12, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_at_its_block(kind: str, recipe: Recipe, layers: int, tmp_path: Path) -> None:
    """Wherever it stopped, the result is the same, and no layer of a finished block is done again."""
    path = folder(tmp_path, kind)
    whole(path, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        streamed(path, recipe, tmp_path / "q", progress=Stop(layers))
    assert not (tmp_path / "q").exists() and partial_folder(tmp_path / "q").is_dir()
    again = Stop(-1)
    streamed(path, recipe, tmp_path / "q", progress=again)
    same(tmp_path / "whole", tmp_path / "q")
    assert again.seen[0] == {3: 2, 12: 9, 15: 9}[layers]  # an embedding, then blocks of seven layers


def test_a_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    """Another recipe, checkpoint or calibration is refused in a line that names it; the old work stays."""
    path, text = checkpoint(tmp_path), tmp_path / "t.txt"
    base = ("quantize", path, "-o", tmp_path / "q", "--acts", "float", "--window", "8", "--step")
    with pytest.raises(KeyboardInterrupt):
        streamed(path, AIMED, tmp_path / "q", progress=Stop(10))
    line = error(*base, "gptq", "--weights", "int4", "--calibration", text)
    assert "another recipe and calibration" in line and "q.partial" in line
    change(path, lambda t: t["model.norm.weight"].mul_(2))
    assert "another recipe, checkpoint and calibration" in error(
        *base, "gptq", "--weights", "int4", "--calibration", text
    )
    assert partial_folder(tmp_path / "q").is_dir() and not (tmp_path / "q").exists()
    job = partial_folder(tmp_path / "q") / "job.json"
    edit(job, source="0" * 12)
    assert "recipe, checkpoint, calibration and source" in error(
        *base, "gptq", "--weights", "int4", "--calibration", text
    )
    (tmp_path / "r.partial").mkdir()
    line = error("quantize", path, "-o", tmp_path / "r", "--weights", "int4", "--acts", "float")
    assert "is no unfinished run" in line


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.up_proj", "model.norm"])
def test_a_weight_that_is_not_finite_leaves_no_folder(name: str, tmp_path: Path) -> None:
    """The error names it, wherever it is; what was begun for nothing is gone, finished blocks included."""
    path = checkpoint(tmp_path)
    change(path, lambda t: t[f"{name}.weight"].view(-1).__setitem__(5, float("inf")))
    before = sorted(tmp_path.iterdir())
    line = error("quantize", path, "-o", tmp_path / "q", "--weights", "int4", "--acts", "float")
    assert f"'{name}.weight' holds inf at [{'5' if name == 'model.norm' else '0, 5'}]" in line
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_goes_by_blocks_or_as_a_whole(tmp_path: Path) -> None:
    """Steps that need the whole model get it, with the same contract; --dry-run says which, and writes nothing."""
    path, text = checkpoint(tmp_path), tmp_path / "t.txt"
    base = ("quantize", path, "-o", tmp_path / "q", "--weights", "int4", "--acts", "float", "--window", "16")
    base = (*base, "--calibration", text, "--memory", "1MB")
    before = sorted(tmp_path.iterdir())
    found = document(*base, "--preset", "fast", "--dry-run")
    assert found["streamed"] and found["whole_because"] is None
    assert 0 < found["seconds"] == pytest.approx(sum(found["parts"].values())) and found["memory_bytes"] > 10**7
    assert found["calibration_tokens"] == 144 and found["layers"] == 14
    trained = document(*base, "--step", "distill", "--dry-run")
    assert trained["seconds"] is None and "distill" in trained["not_foretold"] and not trained["streamed"]
    assert "about" in call(*base, "--preset", "fast", "--dry-run").stdout
    assert sorted(tmp_path.iterdir()) == before
    found = document(*base, "--step", "smoothquant", "--step", "gptq")
    assert [s["name"] for s in found["steps"]] == ["smoothquant", "act_scales", "gptq"]
    assert "is not an amount of memory" in error(*base[:-1], "much")
    assert "--dry-run is for language models" in error(
        "quantize", Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip", "-o", tmp_path / "p",
        "--weights", "int4", "--acts", "int4", "--dry-run",
    )  # fmt: skip


def test_a_forecast_grows_with_the_work(tmp_path: Path) -> None:
    """Eight times the text is more work and more activations; a budget bounds what is held of them."""
    from quantkit.language_forecast import forecast

    model, _ = hf.outline(folder(tmp_path))
    model = captured(model, inplace=True)
    few, many = (forecast(model, AIMED, Calib(ids(n, 32)), memory=2**30, whole=None) for n in (8, 64))
    assert many["activation_bytes"] == 8 * few["activation_bytes"] and many["spilled_bytes"] == 0
    assert many["parts"]["inputs"] > 2 * few["parts"]["inputs"]
    tight = forecast(model, AIMED, Calib(ids(64, 32)), memory=1000, whole=None)
    assert tight["spilled_bytes"] == many["activation_bytes"] - 1000


def test_joined_files_are_one_file(tmp_path: Path) -> None:
    """The joined file is what safetensors itself reads, with all tensors and without gaps."""
    rng = np.random.default_rng(0)
    parts = [{f"t{i}.{j}": rng.normal(size=(i + 2, j + 1)).astype("f4") for j in range(3)} for i in range(3)]
    parts[1]["odd"] = np.arange(5, dtype=np.uint8)
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    join([tmp_path / f"{i}.safetensors" for i in range(3)], tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    wanted = parts[0] | parts[1] | parts[2]
    assert found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)
    data = (tmp_path / "all.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert len(data) == 8 + length + sum(a.nbytes for a in wanted.values()) and length % 8 == 0


def stored_in_half(path: Path) -> Path:
    """The directory with its weights stored in bfloat16."""
    for file in path.glob("*.safetensors"):
        tensors = {k: v.bfloat16() for k, v in load_torch(file).items()}
        save_torch(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_depends_on_nothing_but_the_work(stored: str, tmp_path: Path) -> None:
    """Neither memory, nor threads, nor an interruption; the artifact says so, however the checkpoint is stored."""
    path = folder(tmp_path)
    path = stored_in_half(path) if stored == "bfloat16" else path
    streamed(path, AIMED, tmp_path / "a", half=True, memory=2**30)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            streamed(path, AIMED, tmp_path / "b", half=True, memory=0, progress=Stop(12))
        streamed(path, AIMED, tmp_path / "b", half=True, memory=20_000)
    finally:
        torch.set_num_threads(before)
    same(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "a" / "quantkit.json").read_text())["meta"]["calibrated_in"] == "bfloat16"


def test_bfloat16_is_finer_than_transformers_own(tmp_path: Path) -> None:
    """What reaches the head errs less, against float64, than where transformers computes everything in bfloat16."""
    path = stored_in_half(folder(tmp_path))
    model, weights = hf.outline(path)
    model = captured(model, inplace=True)
    for name, parameter in model.module.named_parameters():
        parameter.data = weights.read(name)
    inputs = ids(4, 64)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(inputs).logits
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(inputs).logits.double()
        found = {}
        for half in (False, True):
            stream = Stream(model.module, [inputs], Store(tmp_path, 2**30, half))
            for node in stream.nodes[:-1]:
                stream.follow(node)
            stream.last[stream.nodes[-2]] = len(stream.nodes)  # somebody will ask for the logits
            stream.catch_up()
            (logits,) = stream.values[stream.nodes[-2]]
            found[half] = (logits.double() - wanted).norm() / wanted.norm()
    assert found[False] < 1e-5 < found[True] < 0.75 * (theirs - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("weight", ["int4", "int4/e4m3x32", "float"])
def test_linear_layers_in_bfloat16_round_operands_and_results(weight: str, tmp_path: Path) -> None:
    """The sum is the exact one of rounded operands within the rounding of bfloat16; scale and bias stay float32."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(96, 40)
    layer.weight.data, layer.bias.data = torch.randn(40, 96, generator=g), 3 * torch.randn(40, generator=g)
    x = torch.randn(7, 96, generator=g)
    made: nn.Linear | QLayer = layer
    if weight != "float":
        made = QLayer(layer, make_plan(weight, "float"))
        scale = fit_scale(layer.weight, made.plan.weight, made.plan.granularity)
        made.set_weight(quantize_weight(layer.weight, scale, made.plan.weight, made.plan.granularity))
    rows = made.q.scale[:, 0] if isinstance(made, QLayer) and made.q.scale.shape[1] == 1 else torch.ones(40)
    W = (made.effective_weight() if isinstance(made, QLayer) else made.weight) / rows[:, None]
    exact = x.bfloat16().double() @ W.bfloat16().double().T
    graph = fx.GraphModule({"layer": made}, traced("layer"))
    stream = Stream(graph, [x], Store(tmp_path, 2**30, half=True))
    node = stream.nodes[1]
    found = stream.ahead(node, made)[0].double()
    wanted = exact * rows.double() + layer.bias.double()
    error = (found - wanted).abs()
    assert (error <= 2.0**-8 * ((exact * rows).abs() + wanted.abs())).all() and error.max() > 0


def traced(name: str) -> fx.Graph:
    """x -> the module of that name -> output."""
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    return graph


def test_moments_of_halves_are_sums_of_exact_products() -> None:
    """Second moments of bfloat16 inputs err as float32 sums do; those of others are of the rounded inputs."""
    x = torch.randn(1, 3000, 300, generator=torch.Generator().manual_seed(0))
    rounded = x.bfloat16().double()
    wanted = rounded.mT @ rounded
    for given in (x, x.bfloat16().float()):
        gram = Gram(half=True)
        for part in given.split(700, dim=1):
            gram.add(part)
        assert gram.total is not None
        exact = has_half() or given is not x
        assert (gram.total.double() - wanted).norm() <= (1e-6 if exact else 1e-2) * wanted.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_dtype_is_the_checkpoints_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto follows what is stored and what the processor has; what cannot be had is refused in a line."""
    path = folder(tmp_path)
    weights = hf.outline(path)[1]
    assert weights.stored_in() == "F32" and hf.outline(stored_in_half(path))[1].stored_in() == "BF16"
    for has, wanted in ((True, True), (False, False)):
        monkeypatch.setattr(arithmetic, "has_half", lambda has=has: has)
        assert [language._half(d, hf.outline(path)[1], None) for d in ("auto", "float32")] == [wanted, False]
        assert not language._half("auto", weights, "it trains") and not language._half("auto", None, None)
    with pytest.raises(InputError, match="does not multiply bfloat16"):
        language._half("bfloat16", weights, None)
    with pytest.raises(InputError, match="block by block; here it trains"):
        language._half("bfloat16", weights, "it trains")
    with pytest.raises(InputError, match="'half'; accepted: auto, float32, bfloat16"):
        language._half("half", weights, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_weights_are_read_from_any_floating_point(dtype: torch.dtype, tmp_path: Path) -> None:
    """As the library reads them, in float32; integers are refused in a line."""
    path = folder(tmp_path)
    file = next(path.glob("*.safetensors"))
    tensors = {k: v.to(dtype) for k, v in load_torch(file).items()}
    save_torch(tensors, file, metadata={"format": "pt"})
    weights, name = hf.outline(path)[1], "model.layers.0.mlp.up_proj.weight"
    if dtype == torch.int32:
        with pytest.raises(InputError, match="is stored in I32; accepted: F64"):
            weights.read(name)
    else:
        assert torch.equal(weights.read(name), tensors[name].float())


def test_tensors_are_saved_as_the_library_does(tmp_path: Path) -> None:
    """Its own reader finds every dtype, shape and number."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array(3, np.int64),
        "c": np.zeros((0, 4), np.uint8),
        "d": np.array([True, False]),
        "e": np.arange(3, dtype=np.float16),
    }
    save_tensors(arrays, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
