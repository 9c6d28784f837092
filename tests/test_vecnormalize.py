"""vecnormalize.pkl is read as numbers; whatever else is in it stays an inert record."""

from __future__ import annotations

import os
import pickle
import random
import sys
import types
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_agents as tiny

from quantkit.errors import InputError
from quantkit.loaders import vecnormalize
from quantkit.loaders.vecnormalize import Record, as_array, read_normalizer, read_pickle
from quantkit.loading import load_checkpoint


class RunningMeanStd:
    """Stands in for SB3's class: only names and states matter."""

    def __init__(self, mean: Any, var: Any) -> None:
        self.mean, self.var, self.count = mean, var, np.float64(12.5)


class VecNormalize:
    """Likewise."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.sentinel}'",)


MEAN, VAR = np.array([0.5, -1.75, 30.0]), np.array([0.25, 2.0, 9.0])


def saved(**changes: Any) -> VecNormalize:
    state = {
        "obs_rms": RunningMeanStd(MEAN, VAR),
        "clip_obs": 5.0,
        "epsilon": 1e-8,
        "norm_obs": True,
        "np_random": np.random.RandomState(3),
        "rng": np.random.default_rng(3),
        "others": [
            deque([1]),
            {2, 3},
            frozenset({4}),
            OrderedDict(a=1),
            5j,
            b"six",
            "sieben",
            10**30,
            None,
            False,
            range(3),
        ],
    }
    return VecNormalize(**(state | changes))


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol: int, tmp_path: Path) -> None:
    """Statistics are read exactly from each pickle protocol, in Fortran order and any plain type too."""
    for mean in (
        MEAN,
        MEAN.astype(np.float32),
        MEAN.astype(">f8"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3),
    ):
        var = np.ones_like(mean) * 2
        normalizer = read_normalizer(write(tmp_path / "v.pkl", saved(obs_rms=RunningMeanStd(mean, var)), protocol))
        assert normalizer is not None and normalizer.clip == 5.0
        np.testing.assert_array_equal(normalizer.mean, mean)
        np.testing.assert_array_equal(normalizer.std, np.sqrt(np.float64(2.0) + 1e-8) * np.ones(mean.shape))


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_and_numpy_scalars(protocol: int) -> None:
    """Plain numbers and numpy scalars come back exactly."""
    for value in (7, -1.25, True, 2**40, np.float64(0.1), np.float32(0.1), np.int64(-9), np.bool_(True), np.uint8(200)):
        assert as_array(read_pickle(pickle.dumps(value, protocol))) == np.float64(value)


@pytest.mark.parametrize("name", ["numpy.core", "numpy._core"])
def test_both_names_of_numpy_core(name: str, tmp_path: Path) -> None:
    """Files of numpy 1 and numpy 2 say numpy.core and numpy._core."""
    blob = pickle.dumps(saved(), 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "v.pkl").write_bytes(blob if name == "numpy.core" else pickle.dumps(saved(), 2))
    normalizer = read_normalizer(tmp_path / "v.pkl")
    assert normalizer is not None and normalizer.mean.tolist() == MEAN.tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_code_stays_a_record(protocol: int, tmp_path: Path) -> None:
    """Code beside the statistics does not run; in place of them it is refused unrun. The payload itself is live."""
    sentinel = tmp_path / "touched"
    beside = write(tmp_path / "v.pkl", saved(extra=Evil(sentinel), others=[Evil(sentinel)]), protocol)
    assert read_normalizer(beside) is not None
    for value in (Evil(sentinel), saved(obs_rms=Evil(sentinel)), saved(clip_obs=Evil(sentinel))):
        with pytest.raises(InputError, match=r"v\.pkl"):
            read_normalizer(write(tmp_path / "v.pkl", value, protocol))
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Evil(sentinel), protocol))
    assert sentinel.exists()


def test_opcodes_that_import_or_build_are_inert() -> None:
    """INST, OBJ, BUILD, persistent ids, extensions and random generators only make records."""
    assert read_pickle(b"(S'id'\nios\nsystem\n.") == Record("os.system", ("id",), called=True)
    assert read_pickle(b"(cos\nsystem\nS'id'\no.") == Record("os.system", ("id",), called=True)
    assert read_pickle(b"cos\nsystem\n(S'id'\ntR.") == Record("os.system", ("id",), called=True)
    assert read_pickle(b"cbuiltins\nobject\n)\x81}S'__class__'\nK\x01sb.").state == {"__class__": 1}
    assert read_pickle(b"Pabc\n.") == Record("<persid>") and read_pickle(b"\x82\x01.") == Record("<ext1>")
    generator = read_pickle(pickle.dumps(np.random.default_rng(1)))
    assert isinstance(generator, Record) and generator.name.startswith("numpy.random")


def test_names_are_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that explodes when imported is not imported."""
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    assert read_pickle(b"cnot_a_module_at_all\nthing\n.").name == "not_a_module_at_all.thing"
    assert not any(hasattr(vecnormalize, name) for name in ("pickle", "importlib"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_rms": None}, "no statistics"),
        ({"obs_rms": {"a": RunningMeanStd(MEAN, VAR)}}, "normalizes the key 'a'"),
        ({"obs_rms": RunningMeanStd(MEAN, VAR[:2])}, "variance of shape"),
        ({"obs_rms": RunningMeanStd(MEAN * [1, np.nan, 1], VAR)}, r"unusable mean at \[1\]"),
        ({"obs_rms": RunningMeanStd(MEAN, VAR * [1, 1, -1])}, r"unusable variance at \[2\]"),
        ({"obs_rms": RunningMeanStd(MEAN, VAR * [np.inf, 1, 1])}, r"unusable variance at \[0\]"),
        ({"obs_rms": RunningMeanStd(MEAN, None)}, "NoneType where a number"),
        ({"obs_rms": RunningMeanStd(MEAN.astype(object), VAR)}, "only plain numbers"),
        ({"obs_rms": RunningMeanStd(np.array(["a"]), VAR)}, "only plain numbers"),
        ({"obs_rms": RunningMeanStd(np.zeros(2, "f4,i4"), VAR)}, "only plain numbers"),
        ({"obs_rms": RunningMeanStd(np.array([]), np.array([]))}, "no entry"),
        ({"clip_obs": -1.0}, "clip_obs is -1.0"),
        ({"clip_obs": float("nan")}, "clip_obs is nan"),
        ({"clip_obs": MEAN}, "clip_obs is an array"),
        ({"epsilon": 10**400}, "too large"),
        ({"norm_obs": "yes"}, "str where a number"),
    ],
)
def test_unusable_statistics_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """What is not a finite, positive, matching statistic is refused with its place."""
    with pytest.raises(InputError, match=words) as caught:
        read_normalizer(write(tmp_path / "v.pkl", saved(**changes)))
    assert "v.pkl" in str(caught.value) and "\n" not in str(caught.value)


def test_normalization_of_rewards_only(tmp_path: Path) -> None:
    """norm_obs=False gives None, statistics or not."""
    assert read_normalizer(write(tmp_path / "v.pkl", saved(norm_obs=False))) is None
    assert read_normalizer(write(tmp_path / "v.pkl", saved(norm_obs=np.bool_(False), obs_rms=None))) is None


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    """No prefix of a file is read as a normalizer."""
    blob = pickle.dumps(saved())
    path = tmp_path / "v.pkl"
    for size in range(0, len(blob), 3):
        path.write_bytes(blob[:size])
        with pytest.raises(InputError):
            read_normalizer(path)
    with pytest.raises(InputError, match="No such file"):
        read_normalizer(tmp_path / "none.pkl")


def test_random_damage(tmp_path: Path) -> None:
    """Random bytes give statistics, None or one InputError line, never another error."""
    rng = random.Random(6)
    path = tmp_path / "v.pkl"
    wholes = [pickle.dumps(saved(np_random=None, rng=None), protocol) for protocol in (0, 2, 4, 5)]
    for i in range(1200):
        blob = bytearray(wholes[i % 4])
        for _ in range(rng.choice((1, 1, 2, 9))):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        path.write_bytes(blob)
        try:
            read_normalizer(path)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "blob",
    [
        b"r\xff\xff\xff\xff.",  # a memo index of 4 billion on an empty stack
        b"Nr\xff\xff\xff\xff.",  # and on a full one: no table of that length is made
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 8 EiB
        b"(" * 100_000 + b".",
        b"]" + b"]a" * 0 + b"2" * 100_000 + b".",
        b")\x86." + b"2\x86" * 200 + b".",  # (t, t) two hundred times: never hashed, never printed
        b"N" + b"2\x86" * 200 + b"}q\x00(h\x00N" + b"u.",
    ],
)
def test_bombs_are_cheap(blob: bytes, tmp_path: Path) -> None:
    """Streams made to exhaust memory or time are refused at once."""
    (tmp_path / "v.pkl").write_bytes(blob)
    with pytest.raises(InputError):
        read_normalizer(tmp_path / "v.pkl")


def test_size_must_match_the_policy(tmp_path: Path) -> None:
    """A normalizer for another number of inputs is refused with both shapes."""
    path = tiny.write_zip(tmp_path / "agent.zip", tiny.members())
    write(tmp_path / "vecnormalize.pkl", saved())
    assert load_checkpoint(path).meta["normalizer"]["clip"] == 5.0
    write(tmp_path / "vecnormalize.pkl", saved(obs_rms=RunningMeanStd(np.zeros(4), np.ones(4))))
    with pytest.raises(InputError, match=r"vecnormalize\.pkl.*shape \(4,\); the policy takes \(3,\)"):
        load_checkpoint(path)


def test_real_file_equals_what_pickle_gives(tmp_path: Path) -> None:
    """On a file saved by SB3, the opcode reader and real unpickling agree to the last bit."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import VecNormalize as Real

    venv = Real(tiny.make_venv(("box", (4,), -3.0, 3.0), ("discrete", 2)), clip_obs=2.5, epsilon=1e-6)
    venv.reset()
    for _ in range(5):
        venv.step([0])
    venv.save(str(tmp_path / "v.pkl"))
    normalizer = read_normalizer(tmp_path / "v.pkl")
    reference = pickle.loads((tmp_path / "v.pkl").read_bytes())
    assert normalizer is not None and normalizer.clip == 2.5
    np.testing.assert_array_equal(normalizer.mean, reference.obs_rms.mean)
    np.testing.assert_array_equal(normalizer.std, np.sqrt(reference.obs_rms.var + 1e-6))
