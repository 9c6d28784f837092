"""Malformed and malicious files end in one InputError line, and code in them never runs."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_agents as tiny
import torch

from quantkit.errors import InputError
from quantkit.loaders import sb3_archive
from quantkit.loading import load_checkpoint
from quantkit.model import Model


class Evil:
    """Touches a file when unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.sentinel}'",)


def refused(path: Path, *words: str) -> str:
    """Loading fails with one line that names the file and holds the words."""
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    for word in words:
        assert word in message, message
    return message


def agent(tmp_path: Path, data: Any = None, tensors: Any = None, **other: bytes) -> Path:
    """A hand-made agent, with members replaced or added."""
    return tiny.write_zip(tmp_path / "agent.zip", tiny.members(data, tensors) | other)


def test_the_untouched_agent_loads(tmp_path: Path) -> None:
    """What the attacks start from is accepted."""
    model = load_checkpoint(agent(tmp_path))
    assert model.meta["algo"] == "ppo" and list(model.layers()) == ["net.fc1", "net.fc2", "net.head"]


# --- code -------------------------------------------------------------------------------------


def test_payload_is_live(tmp_path: Path) -> None:
    """The payload of the tests below does run under pickle: their silence means something."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_code_in_policy_pth_does_not_run(tmp_path: Path) -> None:
    """A pickle in policy.pth that would run code, bare or inside torch's zip, is refused unrun."""
    sentinel = tmp_path / "touched"
    for blob in (
        pickle.dumps(Evil(sentinel)),
        pickle.dumps({"a": Evil(sentinel)}, 2),
        tiny.torch_bytes({"a": Evil(sentinel)}),
    ):
        refused(tiny.write_zip(tmp_path / "agent.zip", tiny.members() | {"policy.pth": blob}), "policy.pth")
    assert not sentinel.exists()


def test_code_in_data_does_not_run(tmp_path: Path) -> None:
    """The cloudpickles inside `data` are dropped unread: the agent loads and nothing happens."""
    sentinel = tmp_path / "touched"
    blob = base64.b64encode(pickle.dumps(Evil(sentinel))).decode()
    data = tiny.ppo_data()
    for key in ("policy_class", "policy_kwargs", "observation_space", "action_space", "clip_range"):
        data[key] = {**data[key], ":serialized:": blob}
    data["lr_schedule"] = {":type:": "<class 'function'>", ":serialized:": blob}
    load_checkpoint(agent(tmp_path, data))
    assert not sentinel.exists()


def test_code_in_members_never_opened_does_not_run(tmp_path: Path) -> None:
    """The optimizer and pytorch_variables are not opened."""
    sentinel = tmp_path / "touched"
    blob = pickle.dumps(Evil(sentinel))
    load_checkpoint(agent(tmp_path, **{"policy.optimizer.pth": blob, "pytorch_variables.pth": blob}))
    assert not sentinel.exists()


def test_code_in_yaml_does_not_run(tmp_path: Path) -> None:
    """Python tags and evaluated texts in the zoo's YAML are read as plain values."""
    sentinel = tmp_path / "touched"
    folder = tmp_path / "ppo" / "CartPole-v1_1"
    tiny.write_zip(folder / "CartPole-v1.zip", tiny.members())
    (folder / "CartPole-v1").mkdir()
    (folder / "CartPole-v1" / "args.yml").write_text(
        f"env: CartPole-v1\nx: !!python/object/apply:os.system [\"touch '{sentinel}'\"]\n"
        f"y: !!python/object/new:os.system {{args: [\"touch '{sentinel}'\"]}}\nz: !!python/name:os.system\n"
    )
    config = folder / "CartPole-v1" / "config.yml"
    config.write_text("policy: MlpPolicy")
    assert load_checkpoint(folder).env is not None
    config.write_text(f"normalize: \"__import__('os').system('touch {sentinel}')\"")
    with pytest.raises(InputError, match="as a literal"):
        load_checkpoint(folder)
    config.write_text("a: [1\nb")
    with pytest.raises(InputError, match=r"config\.yml: not readable YAML"):
        load_checkpoint(folder)
    config.write_text("just text")
    with pytest.raises(InputError, match="expected settings by name"):
        load_checkpoint(folder)
    config.write_text("[" * 5000)
    with pytest.raises(InputError, match="not readable YAML"):
        load_checkpoint(folder)
    assert not sentinel.exists()


# --- archives ---------------------------------------------------------------------------------


def test_truncated_empty_and_foreign_files(tmp_path: Path) -> None:
    """Every prefix of a zip, an empty file and a text are refused."""
    whole = agent(tmp_path).read_bytes()
    path = tmp_path / "cut.zip"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(b"")
    refused(path, "empty file")
    path.write_text("hello, I am no zip\n" * 99)
    refused(path, "not a readable zip", "Stable-Baselines3")
    refused(tiny.write_zip(path, {}), "no member 'data'")


@pytest.mark.parametrize("name", ["data", "policy.pth"])
def test_missing_member(name: str, tmp_path: Path) -> None:
    """A zip without `data` or `policy.pth` is no agent."""
    content = tiny.members()
    del content[name]
    refused(tiny.write_zip(tmp_path / "agent.zip", content), f"no member {name!r}")


@pytest.mark.parametrize("blob", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"[" * 200_000])
def test_data_that_is_no_json_object(blob: bytes, tmp_path: Path) -> None:
    """`data` must be a JSON object."""
    refused(tiny.write_zip(tmp_path / "agent.zip", tiny.members() | {"data": blob}), "'data'")


def test_zip_bomb(tmp_path: Path) -> None:
    """A member that unpacks to far more than it holds is refused before it is unpacked, also inside policy.pth."""
    bomb = b" " * (sb3_archive._RATIO_FROM + 1)
    content = tiny.members()
    refused(tiny.write_zip(tmp_path / "agent.zip", content | {"data": bomb}, zipfile.ZIP_DEFLATED), "zip bomb")
    inner = tiny.write_zip(tmp_path / "inner.zip", {"archive/data.pkl": bomb}, zipfile.ZIP_DEFLATED).read_bytes()
    refused(tiny.write_zip(tmp_path / "agent.zip", content | {"policy.pth": inner}), "policy.pth", "zip bomb")


def test_total_and_member_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives and members above the limits are refused by their declared size."""
    path = agent(tmp_path)
    monkeypatch.setitem(sb3_archive._MEMBER_BYTES, "policy.pth", 100)
    refused(path, "'policy.pth'", "at most 100")
    monkeypatch.setattr(sb3_archive, "_TOTAL_BYTES", 1000)
    refused(path, "unpacks to")


def test_member_larger_than_declared(tmp_path: Path) -> None:
    """A directory entry that lies about the size is caught while reading."""
    path = agent(tmp_path)
    blob = bytearray(path.read_bytes())
    entry = blob.index(b"PK\x01\x02")
    size = struct.unpack_from("<I", blob, entry + 24)[0]
    for lie in (size - 5, size + 5):
        struct.pack_into("<I", blob, entry + 24, lie)
        path.write_bytes(blob)
        refused(path)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:\\evil", "..\\evil", "\\evil"])
def test_names_that_leave_the_archive(name: str, tmp_path: Path) -> None:
    """Path traversal and absolute member names are refused."""
    refused(agent(tmp_path, **{name: b"x"}), "leaves the archive")


def test_duplicated_member(tmp_path: Path) -> None:
    """Two members of one name are refused: readers differ in which they take."""
    path = agent(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("data", b"{}")
    refused(path, "occurs twice")


def test_encrypted_member(tmp_path: Path) -> None:
    """Encrypted members are refused."""
    path = agent(tmp_path)
    blob = bytearray(path.read_bytes())
    blob[blob.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(blob)
    refused(path, "encrypted")


# --- tensors ----------------------------------------------------------------------------------

FIRST, SECOND = "mlp_extractor__policy_net__0", "mlp_extractor__policy_net__2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"action_net__weight": None}, ["'action_net.weight' is missing"]),
        ({"action_net__bias": None}, ["'action_net.bias' is missing"]),
        ({f"{FIRST}__weight": None, f"{FIRST}__bias": None}, ["'mlp_extractor.policy_net.0.weight' is missing"]),
        (
            {f"{SECOND}__weight": None, f"{SECOND}__bias": None},
            ["net_arch asks for 2", "'mlp_extractor.policy_net.2.weight' is missing"],
        ),
        ({"action_net__bias": torch.tensor([0.0, float("nan")])}, ["'action_net.bias' holds nan at [1]"]),
        (
            {
                f"{FIRST}__weight": torch.ones(4, 3).index_put(
                    (torch.tensor(2), torch.tensor(1)), torch.tensor(-float("inf"))
                )
            },
            ["'mlp_extractor.policy_net.0.weight' holds -inf at [2, 1]"],
        ),
        (
            {f"{SECOND}__weight": torch.ones(5, 6)},
            ["mlp_extractor.policy_net.2.weight (5, 6)", "mlp_extractor.policy_net.0.weight (4, 3)"],
        ),
        ({f"{FIRST}__weight": torch.ones(4, 9)}, ["policy_net.0.weight (4, 9)", "observations of shape (3,)"]),
        ({"action_net__weight": torch.ones(3, 5), "action_net__bias": torch.ones(3)}, ["gives 3 outputs", "needs 2"]),
        ({"action_net__bias": torch.ones(7)}, ["action_net.bias (7,) does not fit"]),
        ({"action_net__weight": torch.ones(2, 5, 1)}, ["shape (2, 5, 1); expected 2 dimensions"]),
        ({"action_net__weight": torch.ones(2, 0)}, ["none empty"]),
        ({"mlp_extractor__policy_net__1__weight": torch.ones(4)}, ["policy_net.1 is not a Linear layer"]),
        ({"mlp_extractor__policy_net__99998__weight": torch.ones(4, 4)}, ["at most 1000 layers"]),
        ({"action_net__weight": torch.ones(1).expand(10**6, 10**6)}, ["more than the file holds"]),
        ({"action_net__weight": torch.ones(2, 5).to_sparse()}, ["not a plain dense tensor"]),
        ({"action_net__weight": torch.ones(2, 5, dtype=torch.int64)}, ["'action_net.weight' is missing"]),
    ],
)
def test_tensors_that_do_not_make_an_actor(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Missing, not finite and misfitting tensors are named with their shapes."""
    refused(agent(tmp_path, tensors=tiny.ppo_tensors(**changes)), *words)


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), {1: torch.ones(2)}, "text"])
def test_policy_that_is_no_state_dict(value: Any, tmp_path: Path) -> None:
    """policy.pth must hold named tensors."""
    refused(agent(tmp_path, tensors=value), "expected a state dict")


# --- fields -----------------------------------------------------------------------------------

_LSTM = {
    "__module__": "sb3_contrib.common.recurrent.policies",
    "__init__": "<function RecurrentActorCriticCnnPolicy.__init__ at 0x1>",
}
_OWN = {"__module__": "__main__", "__init__": "<function MyPolicy.__init__ at 0x1>"}


def _dict(text: str) -> dict[str, Any]:
    return {":type:": "<class 'gymnasium.spaces.dict.Dict'>", "spaces": text, "_shape": None, "dtype": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observation_space": _dict("{}")}, ["a Dict without keys"]),
        ({"observation_space": _dict("{'a': Dict('b': Discrete(2))}")}, ["cannot read", "accepted under its keys"]),
        ({"observation_space": _dict("{'a': Box(-1.0, 1.0, (3,), float32), __import__('os')}")}, ["cannot read"]),
        ({"observation_space": _dict("{'a': Discrete(999999999999)}")}, ["key 'a' has no readable size"]),
        ({"observation_space": _dict("{'a': Box(0, 1, (99999, 99999), uint8)}")}, ["key 'a' has no readable size"]),
        ({"observation_space": _dict("{'a': MultiDiscrete([[2 2] [3 3]])}")}, ["key 'a' has no readable size"]),
        ({"observation_space": _dict("'a': " * 50_000)}, ["cannot read"]),
        ({"observation_space": _dict("{'a': Discrete(2), " * 9_000)}, ["cannot read"]),
        ({"policy_class": _LSTM}, ["RecurrentActorCriticCnnPolicy", "accepted: PPO"]),
        ({"policy_class": _OWN}, ["__main__.MyPolicy", "accepted: PPO"]),
        ({"policy_class": None}, ["policy class", "accepted: PPO"]),
        ({"policy_kwargs": None}, ["no readable policy_kwargs"]),
        (
            {"policy_kwargs": {"net_arch": [4, 5], "activation_fn": "<class '__main__.Mine'>"}},
            ["activation_fn", "known: ReLU, Tanh"],
        ),
        (
            {"policy_kwargs": {"features_extractor_class": "<class '__main__.Mine'>"}},
            ["features extractor", "NatureCNN"],
        ),
        ({"observation_space": None}, ["observation_space"]),
        ({"action_space": {":type:": "<class '__main__.Space'>"}}, ["action_space"]),
        ({"action_space": {":type:": "<class 'gymnasium.spaces.tuple.Tuple'>"}}, ["action space Tuple", "accepted"]),
        ({"action_space": tiny.discrete_fields(0)}, ["unreadable size of Discrete"]),
        ({"action_space": tiny.discrete_fields(10**30)}, ["unreadable size of Discrete"]),
        ({"action_space": tiny.box_fields([1.0, -1.0], [-1.0, 1.0])}, ["no interval"]),
        ({"observation_space": tiny.box_fields([-1.0], [1.0]) | {"_shape": "__import__('os')"}}, ["unreadable shape"]),
        ({"observation_space": tiny.box_fields([-1.0], [1.0]) | {"_shape": [10**9, 10**9]}}, ["no shape of a space"]),
        ({"observation_space": tiny.box_fields([-1.0], [1.0]) | {"_shape": [-3]}}, ["no shape of a space"]),
        ({"observation_space": tiny.box_fields([-1.0] * 4, [1.0] * 4)}, ["observations of shape (4,)"]),
    ],
)
def test_fields_that_cannot_be_read(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Unknown classes, spaces and activations are refused with what is accepted."""
    refused(agent(tmp_path, data=tiny.ppo_data(**changes)), *words)


def test_squashed_actions_need_bounds(tmp_path: Path) -> None:
    """tanh cannot be rescaled to an infinite interval."""
    space = tiny.box_fields([-np.inf, -1.0], [np.inf, 1.0])
    kwargs = {"net_arch": {"pi": [4, 5]}, "squash_output": True}
    refused(agent(tmp_path, data=tiny.ppo_data(action_space=space, policy_kwargs=kwargs)), "need finite bounds")


# --- noise ------------------------------------------------------------------------------------


def test_random_damage_is_one_line_or_loads(tmp_path: Path) -> None:
    """Random bytes in the zip, in `data` or in policy.pth give a model or one InputError, never another error."""
    rng = random.Random(4)
    content = tiny.members()
    whole = agent(tmp_path).read_bytes()
    path = tmp_path / "noise.zip"
    outcomes = {True: 0, False: 0}
    for i in range(400):
        name = (None, "data", "policy.pth")[i % 3]
        blob = bytearray(whole if name is None else content[name])
        for _ in range(rng.choice((1, 1, 3, 20))):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        if name is None:
            path.write_bytes(blob)
        else:
            tiny.write_zip(path, content | {name: bytes(blob)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[isinstance(load_checkpoint(path), Model)] += 1
        except InputError as error:
            assert "\n" not in str(error) and "noise.zip" in str(error)
            outcomes[False] += 1
    assert outcomes[True] > 20 and outcomes[False] > 100


def test_random_fields_are_one_line_or_load(tmp_path: Path) -> None:
    """Values of any JSON type in any field give a model or one InputError."""
    rng = random.Random(9)
    values: list[Any] = [
        None,
        True,
        -1,
        0.5,
        1e400,
        "x",
        "[1 2]",
        "nan",
        [],
        [[]],
        {},
        {"a": []},
        "9" * 400,
        [None],
        ["x"],
        "(" * 300,
    ]
    data = tiny.ppo_data()
    fields = [(key, None) for key in data] + [(k, s) for k, v in data.items() if isinstance(v, dict) for s in v]
    fields += [
        ("policy_kwargs", k) for k in ("activation_fn", "squash_output", "clip_mean", "normalize_images", "net_arch")
    ]
    path, policy = tmp_path / "fields.zip", tiny.members()["policy.pth"]
    for key, sub in fields:
        for value in rng.sample(values, 8):
            changed = json.loads(json.dumps(data))
            if sub is None:
                changed[key] = value
            else:
                changed[key][sub] = value
            tiny.write_zip(path, {"data": json.dumps(changed).encode(), "policy.pth": policy})
            try:
                load_checkpoint(path)
            except InputError as error:
                assert "\n" not in str(error) and "fields.zip" in str(error)


def test_safe_reader_is_what_stops_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: with weights_only off, the attack on policy.pth succeeds, so the tests above can fail."""
    sentinel = tmp_path / "touched"
    load = torch.load
    monkeypatch.setattr(sb3_archive.torch, "load", lambda f, **kw: load(f, **(kw | {"weights_only": False})))
    path = agent(tmp_path, **{"policy.pth": tiny.torch_bytes({"a": Evil(sentinel)})})
    with pytest.raises(InputError):
        load_checkpoint(path)
    assert sentinel.exists()
