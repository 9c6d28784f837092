"""Loader of any nn.Module: the caller's own code builds it, a file of tensors fills it.

The factory is code that the caller names and therefore trusts; the tensors are not trusted and
are read without unpickling (.safetensors, or .pt / .pth with `weights_only=True`).
"""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.capture import captured
from quantkit.errors import InputError, one_line
from quantkit.files import read_inputs, sha256_of
from quantkit.model import EnvSpec, Model
from quantkit.policy import Policy

_SUFFIXES = (".safetensors", ".pt", ".pth")


def sniff(path: Path) -> bool:
    """Whether `path` is a file of tensors by its suffix."""
    return path.is_file() and path.suffix in _SUFFIXES


def load(path: Path, *, factory: str | None, env: EnvSpec | str | None = None, inputs: Path | None = None) -> Model:
    """The module that `factory` ("package.module:callable", also in the working directory) builds, filled from `path`.

    A `Policy` keeps kind "policy", any other module is of kind "module". The example input is the
    module's attribute `example_input` (a float tensor with a batch dimension), or the first rows of
    the array in `inputs`, or, for a Policy, zeros and ones. Raises InputError naming missing, unexpected and
    misshapen tensors.
    """
    if factory is None:
        raise InputError(
            f"{path}: holds tensors only; name the code that builds the module: factory='package.module:callable'"
        )
    module = call_factory(factory)
    tensors = read_tensors(path)
    counters = {n: t for n, t in module.state_dict().items() if n.endswith(".num_batches_tracked")}
    tensors = {**counters, **tensors}  # many files leave them out; they mean nothing after training
    _check_shapes(module.state_dict(), tensors, path, factory)
    _check_values(dict(module.named_parameters()), tensors, path)
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: does not fill what {factory} builds ({one_line(error)})") from None
    module.eval()
    spec = EnvSpec(env) if isinstance(env, str) else env
    kind = "policy" if isinstance(module, Policy) else "module"
    meta = {"kind": kind, "algo": "module", "source": path.name, "sha256": sha256_of(path), "factory": factory}
    example = _example(module, factory, inputs)
    try:
        with torch.inference_mode():
            module(example)
    except Exception as error:  # whatever the module's own Python does with inputs that it is not made for
        where = factory if inputs is None else inputs
        raise InputError(
            f"{where}: the network cannot take {str(example.dtype).removeprefix('torch.')} inputs of shape"
            f" {tuple(example.shape)} ({one_line(error)})"
        ) from None
    return captured(Model(module, example, spec, meta))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors in a .safetensors or .pt file; InputError for anything else."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        raise InputError(f"{path}: not a file of tensors; accepted: {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: is not a plain state dict: it asks for code; save module.state_dict() instead"
        ) from None
    except Exception as error:  # both libraries raise many types on damaged files
        raise InputError(f"{path}: cannot be read as tensors ({one_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: holds a {type(state).__name__}; expected a state dict of named tensors")
    return state


def call_factory(factory: str) -> nn.Module:
    """What `package.module:callable` gives; InputError when it is not found, cannot be called or is no module.

    This runs the named code: only a name that the user gave may come here.
    """
    name, colon, attribute = factory.partition(":")
    if not colon or not name or not attribute:
        raise InputError(f"factory {factory!r} is not of the form package.module:callable")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target = importlib.import_module(name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"factory {factory!r} cannot be found from {Path.cwd().name}: {one_line(error)}") from None
    if not callable(target):
        raise InputError(f"factory {factory!r} is a {type(target).__name__}; expected a callable without arguments")
    try:
        module = target()
    except TypeError as error:
        raise InputError(f"factory {factory!r} cannot be called without arguments: {one_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise InputError(f"factory {factory!r} gives a {type(module).__name__}; expected a torch.nn.Module")
    return module


def _check_shapes(wanted: dict[str, Tensor], given: dict[str, Tensor], path: Path, factory: str) -> None:
    problems = [
        *(f"missing {name!r} {tuple(t.shape)}" for name, t in wanted.items() if name not in given),
        *(f"unexpected {name!r} {tuple(t.shape)}" for name, t in given.items() if name not in wanted),
        *(
            f"{name!r} is {tuple(given[name].shape)} instead of {tuple(t.shape)}"
            for name, t in wanted.items()
            if name in given and given[name].shape != t.shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(f"{path}: does not fit what {factory} builds: {', '.join(problems[:6])}{more}")


def _check_values(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], path: Path) -> None:
    """No tensor may hold NaN, no parameter Inf (a buffer may: an open clipping bound)."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized:
            raise InputError(f"{path}: tensor {name!r} is not a plain dense tensor")
        if not value.is_floating_point():
            continue
        bad = ~torch.isfinite(value.float()) if name in parameters else torch.isnan(value.float())
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise InputError(
                f"{path}: tensor {name!r} holds {value[tuple(at)].item()} at {at}; all weights must be finite"
            )


def _example(module: nn.Module, factory: str, inputs: Path | None) -> Tensor:
    example = getattr(module, "example_input", None)
    if inputs is not None:
        array = read_inputs(inputs)[:2]
        example = torch.from_numpy(array if example is None else array.astype(example.numpy().dtype))
        example = example.float() if example.dtype in (torch.float64, torch.float16) else example
    if example is None and isinstance(module, Policy):
        return torch.stack([torch.zeros(module.obs_shape), torch.ones(module.obs_shape)])
    if not isinstance(example, Tensor) or example.ndim < 1:
        raise InputError(
            f"factory {factory!r} gives a module without an example input; give --inputs FILE.npy, or set the"
            " module's attribute example_input to a tensor with a batch dimension, e.g. torch.zeros(1, 8)"
        )
    return example.detach().clone()
