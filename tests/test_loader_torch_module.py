"""Any nn.Module loads from the caller's factory and a file of tensors; what does not fit is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.loaders import torch_module
from quantkit.loading import load_checkpoint
from quantkit.model import EnvSpec
from quantkit.policy import Head, InputStage, Policy

FACTORY = f"{__name__}:net"


def net() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    module.example_input = torch.full((5, 3), 0.3)  # type: ignore[assignment]
    return module


def bare() -> nn.Module:
    return nn.Linear(3, 2)


def policy() -> Policy:
    return Policy(InputStage(std=2.0), nn.Sequential(nn.Linear(3, 2)), Head("discrete", nvec=(2,)), (3,))


def needs_argument(size: int) -> nn.Module:
    return nn.Linear(size, 2)


def not_a_module() -> int:
    return 3


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_tensors_fill_the_module(suffix: str, tmp_path: Path) -> None:
    """The loaded module computes what the saved one did, in evaluation mode."""
    original = net()
    path = write(tmp_path / f"m{suffix}", original.state_dict())
    model = load_checkpoint(path, factory=FACTORY, env="CartPole-v1")
    assert torch.equal(model.module(model.example), original(model.example)) and not model.module.training
    assert model.meta["kind"] == "module" and model.meta["source"] == path.name and len(model.meta["sha256"]) == 64
    assert model.env == EnvSpec("CartPole-v1") and model.example.shape == (5, 3)


def test_a_policy_stays_a_policy(tmp_path: Path) -> None:
    """A factory that gives a Policy makes a model of kind "policy" with an example of its own."""
    path = write(tmp_path / "m.pt", policy().state_dict())
    model = load_checkpoint(path, factory=f"{__name__}:policy")
    assert model.meta["kind"] == "policy" and model.example.shape == (2, 3)


def test_factory_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code beside the user is importable."""
    (tmp_path / "my_own_net.py").write_text(
        "import torch\n\nclass Zoo:\n    @staticmethod\n    def make():\n        m = torch.nn.Linear(3, 2)\n"
        "        m.example_input = torch.zeros(1, 3)\n        return m\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p != str(tmp_path)])
    path = write(tmp_path / "m.safetensors", bare().state_dict())
    assert load_checkpoint(path, factory="my_own_net:Zoo.make").example.shape == (1, 3)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors are listed with shapes in one line."""
    state: dict[str, Any] = dict(net().state_dict())
    state["extra"] = torch.ones(4)
    del state["0.bias"]
    state["2.weight"] = torch.ones(2, 6)
    with pytest.raises(InputError) as caught:
        load_checkpoint(write(tmp_path / "m.pt", state), factory=FACTORY)
    message = str(caught.value)
    for word in ("m.pt", "missing '0.bias' (7,)", "unexpected 'extra' (4,)", "'2.weight' is (2, 6) instead of (2, 7)"):
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (None, "name the code that builds the module"),
        ("no_colon", "not of the form package.module:callable"),
        ("no_such_module_here:net", "cannot be found"),
        (f"{__name__}:nothing", "cannot be found"),
        (f"{__name__}:FACTORY", "is a str; expected a callable"),
        (f"{__name__}:needs_argument", "cannot be called without arguments"),
        (f"{__name__}:not_a_module", "gives a int; expected a torch.nn.Module"),
        (f"{__name__}:bare", "attribute example_input"),
    ],
)
def test_factories_that_cannot_be_used(factory: str | None, words: str, tmp_path: Path) -> None:
    """A factory that is absent, not found, not callable or of the wrong kind is refused by name."""
    path = write(tmp_path / "m.pt", bare().state_dict())
    with pytest.raises(InputError, match=words) as caught:
        load_checkpoint(path, factory=factory)
    assert "\n" not in str(caught.value)


def test_damaged_and_malicious_files(tmp_path: Path) -> None:
    """Truncated files, NaN, other values than tensors and pickles with code are refused; no code runs."""
    good = write(tmp_path / "good.safetensors", net().state_dict()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[:50])
    (tmp_path / "empty.pt").write_bytes(b"")
    write(tmp_path / "nan.pt", net().state_dict() | {"2.bias": torch.tensor([0.0, float("nan")])})
    torch.save([1, 2], tmp_path / "list.pt")
    sentinel = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{sentinel}'",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "text.txt").write_text("hello")
    expected = {
        "cut.safetensors": "cannot be read as tensors",
        "empty.pt": "cannot be read as tensors",
        "nan.pt": r"'2.bias' holds nan at \[1\]",
        "list.pt": "holds a list",
        "evil.pt": "asks for code",
        "text.txt": "accepted: .safetensors",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=words) as caught:
            load_checkpoint(tmp_path / name, factory=FACTORY)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not sentinel.exists()


def test_sniff_goes_by_suffix(tmp_path: Path) -> None:
    """Files of tensors are known by their suffix."""
    assert torch_module.sniff(write(tmp_path / "a.pt", {})) and not torch_module.sniff(tmp_path)
    assert not torch_module.sniff(tmp_path / "missing.pt")
