"""`load_checkpoint`: one door for everything that can be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quantkit.errors import InputError
from quantkit.loaders import sb3, torch_module
from quantkit.model import EnvSpec, Model


def load_checkpoint(
    path: str | Path,
    *,
    env: EnvSpec | str | None = None,
    normalize: Literal["stage", "fold"] = "stage",
    factory: str | None = None,
) -> Model:
    """The model at `path`: a Stable-Baselines3 zip, an rl-zoo folder, a module's tensors, or a quantized directory.

    env: the environment to use instead of the checkpoint's. normalize: VecNormalize as an input
    "stage" or as a "fold" into the first layer. factory: `package.module:callable` that builds the
    module whose tensors are in a .safetensors, .pt or .pth file.
    Raises InputError, one line naming the file and what would be accepted.
    """
    path = Path(path)
    if not path.exists() and path.with_name(f"{path.name}.zip").is_file():
        path = path.with_name(f"{path.name}.zip")  # as SB3's own load
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / "quantkit.json").is_file():
        from quantkit.artifact import load_artifact

        return load_artifact(path)
    if factory is not None or torch_module.sniff(path):
        return torch_module.load(path, factory=factory, env=env)
    if sb3.sniff(path):
        return sb3.load(path, env=env, normalize=normalize)
    raise InputError(
        f"{path}: not a checkpoint; accepted: a Stable-Baselines3 .zip, an rl-zoo folder, a quantized directory,"
        " or a .safetensors or .pt file with factory="
    )
