"""Loader of Hugging Face directories of causal language models: config.json and safetensors, nothing that runs.

The families of `quantkit.decoder` as transformers' own classes, in float32; of Gemma 3 the networks of text alone. Code
that a checkpoint brings along (`auto_map`) is never run, pickled weights are never opened, and nothing is downloaded.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from quantkit.decoder import FAMILIES
from quantkit.errors import InputError, one_line
from quantkit.files import sha256_of
from quantkit.model import Model
from quantkit.rounding import all_finite

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)
"""Files beside the weights that a quantized directory takes along."""
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What weights may be stored in, by the names of safetensors."""


def sniff(path: Path) -> bool:
    """Whether `path` is a directory with config.json or safetensors that this project did not write."""
    if not path.is_dir() or (path / "quantkit.json").is_file():
        return False
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def load(path: Path) -> Model:
    """The language model in a directory, in evaluation mode; `module(ids).logits` are (batch, tokens, vocabulary).

    GPT-2's Conv1D become nn.Linear of the same function. The example is one row of token ids (int64).
    `meta` holds the configuration under "config", and under "tied" the layers that share the weight of another.
    Raises InputError, one line naming the file and what is missing, unknown, misshapen or not finite.
    """
    record = _read_record(path)
    config = _config(record, path / "config.json")
    files, tensors = _read_shards(path)
    _check_size(config, sum(torch.Size(shape).numel() for shape in tensors.values()), len(tensors), path)
    module = _filled(path, config)
    _check_values(module, path)
    _check_tokenizer(path, config.vocab_size)
    _linearize(module)
    meta = _meta(path, record, config, files, _tied(module))
    return Model(module.eval(), torch.arange(8)[None] % config.vocab_size, None, meta)


def _meta(
    path: Path, record: dict[str, Any], config: PreTrainedConfig, files: list[Path], tied: dict[str, str]
) -> dict[str, Any]:
    digests = "".join(f"{f.name} {sha256_of(f)}\n" for f in (path / "config.json", *files))
    meta = {
        "kind": "module",
        "algo": config.model_type,
        "source": path.resolve().name,
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "config": {key: value for key, value in record.items() if key not in ("auto_map", "_name_or_path")},
    }
    return meta | ({"tied": tied} if tied else {})


def skeleton(record: dict[str, Any], path: Path, held: int | None = None, tensors: int = 2**31) -> nn.Module:
    """transformers' network of a configuration (`meta["config"]`), in evaluation mode, as `load` gives it; what its
    weights hold is undefined.

    path: the directory that errors name. held, tensors: how many parameters and tensors there are to fill it with;
    InputError where the configuration asks for far more, before memory is taken for it.
    """
    config = _config(record, path)
    if held is not None:
        _check_size(config, held, tensors, path)
    with no_init_weights(), _quiet():
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _linearize(module)
    return module.eval()


def outline(path: Path) -> tuple[Model, Weights]:
    """What `load` gives without reading weights, and where to read them.

    Every parameter is a single zero expanded to its shape, which takes no memory. Raises InputError as `load` does
    for what can be told without the values, and KeyError where a tensor is not found under its own name, in which case
    `load` may still know how to read it.
    """
    record = _read_record(path)
    config = _config(record, path / "config.json")
    files, tensors = _read_shards(path)
    _check_size(config, sum(torch.Size(shape).numel() for shape in tensors.values()), len(tensors), path)
    _check_tokenizer(path, config.vocab_size)
    with no_init_weights(), _quiet():
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        module.tie_weights()  # type: ignore[operator]
    tied = _tied(module)
    prefix = getattr(module, "base_model_prefix", "") + "."
    transposed = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Conv1D)}
    keys: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for owner, part in module.named_modules():
        for leaf, parameter in part._parameters.items():
            if parameter is None:
                continue
            name = f"{owner}.{leaf}"
            origin = f"{tied[owner]}.{leaf}" if owner in tied and leaf == "weight" else name
            keys[name] = next(k for k in (origin, name, origin.removeprefix(prefix), "") if k in tensors or not k)
            if not keys[name]:
                raise KeyError(name)
            if tensors[keys[name]] != tuple(parameter.shape):
                raise InputError(
                    f"{path}: weights do not fit config.json: {name!r} is {tensors[keys[name]]} instead of"
                    f" {tuple(parameter.shape)}"
                )
            shapes[name] = tuple(parameter.shape)
            hollow = torch.zeros(()).expand(parameter.shape)
            part._parameters[leaf] = nn.Parameter(hollow, requires_grad=False)
    if strange := sorted(tensors.keys() - set(keys.values())):
        raise KeyError(strange[0])
    _linearize(module)
    meta = _meta(path, record, config, files, tied)
    model = Model(module.eval(), torch.arange(8)[None] % config.vocab_size, None, meta)
    return model, Weights(path, files, keys, transposed)


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory, read one at a time.

    keys: the name in the files of each parameter. transposed: the parameters whose tensors are.
    """

    path: Path
    files: list[Path]
    keys: dict[str, str]
    transposed: set[str]

    @functools.cached_property
    def _where(self) -> dict[str, _Place]:
        found: dict[str, _Place] = {}
        for file in self.files:
            with file.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            found |= {
                key: _Place(file, facts["dtype"], tuple(facts["shape"]), 8 + length + facts["data_offsets"][0])
                for key, facts in header.items()
            }
        return found

    def stored_in(self) -> str:
        """The dtype that most numbers of the parameters are stored in, as files name it: F32, BF16, F16, ..."""
        counts: Counter[str] = Counter()
        for key in set(self.keys.values()):
            place = self._where[key]
            counts[place.dtype] += math.prod(place.shape)
        return counts.most_common(1)[0][0]

    def read(self, name: str) -> Tensor:
        """The parameter in float32; InputError for one that is not finite or is not stored in floating point."""
        place = self._where[self.keys[name]]
        if place.dtype not in FLOATS:
            raise InputError(f"{place.file}: {name!r} is stored in {place.dtype}; accepted: {', '.join(FLOATS)}")
        dtype = FLOATS[place.dtype]
        # not by the library, which maps the file: what has been read of that counts as memory of this process
        raw = np.fromfile(place.file, np.uint8, math.prod(place.shape) * dtype.itemsize, offset=place.start)
        value = torch.from_numpy(raw).view(dtype).reshape(place.shape).float()
        _check_finite(value, name, self.path)
        return value.T.contiguous() if name in self.transposed else value


@dataclass(frozen=True)
class _Place:
    """Where in a file a tensor begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def companions(path: Path) -> list[Path]:
    """The files of a directory that a quantized one takes along: tokenizer and generation settings."""
    return [path / name for name in COMPANIONS if (path / name).is_file()]


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory, from tokenizer.json; InputError if there is none that can be read.

    Texts stay whole: a length that the file cuts or pads to, as training has left it there, is dropped.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: has no tokenizer.json, the one form of tokenizer that is read")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{file}: cannot be read as a tokenizer ({one_line(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_tokens(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json if it has any, as in transformers, or of `config`."""
    record = _read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    found = next((r["eos_token_id"] for r in (record, config) if r.get("eos_token_id") is not None), ())
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: has no config.json; accepted: a directory with config.json and *.safetensors")
    return _read_json(file)


def _config(record: dict[str, Any], file: Path) -> PreTrainedConfig:
    kind = record.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        code = " and its own code (auto_map) is not run" if "auto_map" in record else ""
        raise InputError(
            f"{file}: model_type {str(kind)[:60]!r} is not read{code}{hint}; accepted: {', '.join(FAMILIES)}"
        )
    if record.get("quantization_config"):
        raise InputError(f"{file}: the weights are quantized already (quantization_config); load the float checkpoint")
    if record.get("is_encoder_decoder") or record.get("add_cross_attention"):
        raise InputError(f"{file}: not a decoder alone; accepted: causal language models")
    if record.get("use_bidirectional_attention"):
        raise InputError(f"{file}: tokens look at later ones (use_bidirectional_attention); accepted: causal models")
    try:
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in record.items() if k != "auto_map"})
    except Exception as error:  # transformers' validators raise many types
        raise InputError(f"{file}: not a configuration of {kind} ({one_line(error)})") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(record, dict):
        raise InputError(f"{file}: holds a {type(record).__name__}; expected an object")
    return record


def _read_shards(path: Path) -> tuple[list[Path], dict[str, tuple[int, ...]]]:
    """The weight files, in order, and the shape of every tensor by its name, from the headers."""
    if (path / INDEX).is_file():
        listed = _read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise InputError(f"{path / INDEX}: has no weight_map of tensor names to files")
        names = sorted(set(listed.values()))
        if any(Path(name).name != name for name in names):
            raise InputError(f"{path / INDEX}: names files outside the directory")
    elif (path / "model.safetensors").is_file():
        listed, names = None, ["model.safetensors"]
    else:
        pickles = sorted(f.name for f in path.glob("*.bin"))
        found = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
        raise InputError(f"{path}: has no model.safetensors and no {INDEX}{found}")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:4])}")
    tensors: dict[str, tuple[int, ...]] = {}
    for name in names:
        try:
            with safe_open(path / name, framework="pt") as file:
                tensors |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path / name}: cannot be read as safetensors ({one_line(error)})") from None
    absent = [key for key in listed or () if key not in tensors]
    if absent:
        raise InputError(f"{path / INDEX}: lists {len(absent)} tensors that its files do not hold: {absent[0]!r}, ...")
    return [path / name for name in names], tensors


def _check_size(config: PreTrainedConfig, held: int, tensors: int, path: Path) -> None:
    """Refuse a configuration far larger than the files, of `held` parameters, before memory is taken for it."""
    if config.num_hidden_layers > tensors:
        raise InputError(
            f"{path}: the configuration has {config.num_hidden_layers} layers, the files {tensors} tensors"
        )
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # whatever a class raises on sizes that do not fit each other
        raise InputError(f"{path}: no network of the configuration's sizes can be built ({one_line(error)})") from None
    if wanted > 2 * held:
        raise InputError(f"{path}: the configuration describes {wanted:,} parameters, the files hold {held:,}")


def _filled(path: Path, config: PreTrainedConfig) -> nn.Module:
    """transformers' network with the weights of the directory; every tensor must have its place and shape."""
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types
        raise InputError(f"{path}: cannot be loaded ({one_line(error)})") from None
    module: nn.Module = loaded[0]
    info = loaded[1]
    problems = [
        *(f"{n!r} is {tuple(a)} instead of {tuple(b)}" for n, a, b in sorted(info["mismatched_keys"])),
        *(f"missing {name!r}" for name in sorted(info["missing_keys"])),
        *(f"unexpected {name!r}" for name in sorted(info["unexpected_keys"])),
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{path}: weights do not fit config.json: {', '.join(problems[:4])}{more}")
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports from transformers; its settings are put back."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_values(module: nn.Module, path: Path) -> None:
    for name, value in module.named_parameters():
        _check_finite(value, name, path)


def _check_finite(value: Tensor, name: str, path: Path) -> None:
    if not all_finite(value):
        at = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise InputError(f"{path}: {name!r} holds {value[tuple(at)].item()} at {at}; all weights must be finite")


def _check_tokenizer(path: Path, vocabulary: int) -> None:
    """A tokenizer must not give ids that the embedding has no row for; fewer tokens than rows are usual."""
    if not (path / "tokenizer.json").is_file():
        return
    largest = max(read_tokenizer(path).get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocabulary:
        raise InputError(f"{path}: tokenizer.json has ids up to {largest}, config.json a vocabulary of {vocabulary}")


def _linearize(module: nn.Module) -> None:
    """GPT-2's Conv1D as nn.Linear, in place."""
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, Conv1D):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, _linear(layer))


def _tied(module: nn.Module) -> dict[str, str]:
    """Which modules share the weight of one defined earlier: name -> name of that."""
    first: dict[int, str] = {}
    found = {}
    for name, part in module.named_modules():
        weight = part._parameters.get("weight")
        if weight is not None and (other := first.setdefault(id(weight), name)) != name:
            found[name] = other
    return found


def _linear(layer: Conv1D) -> nn.Linear:
    """GPT-2's transposed linear layer as nn.Linear."""
    inputs, outputs = layer.weight.shape
    made = nn.Linear(inputs, outputs, device="meta")
    hollow = 0 in layer.weight.stride()
    made.weight = nn.Parameter(layer.weight.data.T if hollow else layer.weight.data.T.contiguous())
    made.bias = layer.bias
    return made
