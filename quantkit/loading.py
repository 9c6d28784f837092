"""`load_checkpoint`: one door for everything that can be quantized."""

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.errors import InputError
from quantkit.loaders import cleanrl, sb3, torch_module
from quantkit.model import EnvSpec, Model, Normalization
from quantkit.policy import Field, Policy
from quantkit.qlayers import QLayer, shape_of
from quantkit.recipe import format_name
from quantkit.specs import parameter_count, weight_name


def load_checkpoint(
    path: str | Path,
    *,
    env: EnvSpec | str | None = None,
    normalize: Normalization = "stage",
    factory: str | None = None,
    inputs: Path | None = None,
) -> Model:
    """The model at `path`: a Stable-Baselines3 zip, an rl-zoo folder, a CleanRL file, a module's tensors, a Hugging
    Face directory of a causal language model, or a quantized directory.

    env: the environment to use instead of the checkpoint's. normalize: VecNormalize as an input
    "stage", as a "fold" into the first layer, or, of a CleanRL agent, "none". factory: `package.module:callable`
    that builds the module whose tensors are in a .safetensors, .pt or .pth file; inputs: .npy or .npz with
    inputs of it. Raises InputError, one line naming the file and what would be accepted.
    """
    path = Path(path)
    if not path.exists() and path.with_name(f"{path.name}.zip").is_file():
        path = path.with_name(f"{path.name}.zip")  # as SB3's own load
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / "quantkit.json").is_file():
        from quantkit.artifact import load_artifact

        if normalize != "stage":
            raise InputError(f"{path} is quantized already; normalize the original checkpoint")
        model = load_artifact(path, factory=factory)
        if env is not None:
            model.env = EnvSpec(env) if isinstance(env, str) else env
        return model
    if factory is not None or torch_module.sniff(path):
        return torch_module.load(path, factory=factory, env=env, inputs=inputs)
    if cleanrl.sniff(path):
        return cleanrl.load(path, env=env, normalize=normalize)
    if sb3.sniff(path):
        return sb3.load(path, env=env, normalize=normalize)
    if is_hugging_face(path):
        return hugging_face(path).load(path)
    raise InputError(
        f"{path}: not a checkpoint; accepted: a Stable-Baselines3 .zip, an rl-zoo folder, a .cleanrl_model file,"
        " a Hugging Face directory, a quantized directory, or a .safetensors or .pt file with factory="
    )


def is_hugging_face(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory, or what is left of one."""
    if not path.is_dir() or (path / "quantkit.json").is_file() or sb3.sniff(path):
        return False
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def hugging_face(path: Path) -> ModuleType:
    """`quantkit.loaders.hf`; InputError where transformers is not installed."""
    try:
        from quantkit.loaders import hf
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: a language model needs {error.name}: pip install 'quantkit[lm]'") from None
    return hf


def gaps(model: Model) -> dict[str, Any]:
    """What stayed in float though it need not have, or was calibrated blindly: nothing of it may go unsaid.

    float_layers: {name: reason}. untraced: why the network could not be followed, or None. idle: layers and points
    whose input was to be quantized and that never ran on the calibration set. silent_channels: input channels that
    were zero on all of it. estimated: what the checkpoint lacks and was estimated, or None.
    """
    steps = model.meta.get("steps") or []
    idle = [
        name
        for name, part in model.quantizers().items()
        if part.plan.act is not None and part.act is None and not (isinstance(part, QLayer) and part.op == "embedding")
    ]
    return {
        "float_layers": model.meta.get("float_layers", {}),
        "untraced": model.meta.get("untraced"),
        "idle": idle if steps else [],
        "estimated": (model.meta.get("normalizer") or {}).get("estimated"),
        "silent_channels": int(sum(step["diagnostics"].get("silent_channels", 0) for step in steps)),
    }


def _places(fields: tuple[Field, ...]) -> dict[str, str]:
    """First and last number of each field in the vector.

    >>> _places((Field("goal", (2,)), Field("mode", (), (3,))))
    {'goal': '0..1', 'mode': '2..4 one-hot'}
    """
    ends = list(accumulate(f.width for f in fields))
    return {
        f.key: f"{end - f.width}..{end - 1}{' one-hot' if f.sizes else ''}" for f, end in zip(fields, ends, strict=True)
    }


def describe_checkpoint(model: Model) -> dict[str, Any]:
    """What `quantkit inspect` shows: kind, algo, env, spaces, layers and the number of parameters.

    made_of: by key of a dictionary ("" where there is none) where its numbers lie in the vector that is observed.
    memory: numbers that the policy keeps from step to step.
    """
    policy = model.module if isinstance(model.module, Policy) else None
    layers = []
    for name, layer in model.layers().items():
        shape, bias = shape_of(layer), getattr(layer, "bias", None)
        act = layer.act if isinstance(layer, QLayer) else None
        layers.append(
            {
                "name": name,
                "op": shape.op,
                "in_features": shape.inputs,
                "out_features": shape.outputs,
                "kernel": list(shape.kernel) or None,
                "parameters": layer.weight.numel() + (0 if bias is None else bias.numel()),
                "weight": weight_name(layer),
                "act": format_name(None if act is None else act.fmt),
            }
        )
    spec, meta = model.env, model.meta
    return {
        "kind": meta.get("kind"),
        "algo": meta.get("algo"),
        "env": None if spec is None else spec.id,
        "env_spec": None if spec is None else asdict(spec),
        "observations": list(policy.obs_shape if policy else model.example.shape[1:]),
        "made_of": _places(policy.fields) if policy and policy.fields else None,
        "memory": sum(2 * cell.hidden for cell in policy.cells) if policy and policy.recurrent else None,
        "actions": meta.get("action_space"),
        "normalizer": meta.get("normalizer"),
        "layers": layers,
        "points": [
            {"name": name, "act": format_name(p.act.fmt if p.act else None)} for name, p in model.points().items()
        ],
        "float_layers": meta.get("float_layers", {}),
        "untraced": meta.get("untraced"),
        "parameters": parameter_count(model),
        "quantized": any(isinstance(layer, QLayer) for layer in model.layers().values()),
        **{key: value for key, value in gaps(model).items() if key in ("idle", "silent_channels", "estimated")},
        "sha256": meta.get("sha256"),
    }
