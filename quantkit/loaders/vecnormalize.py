"""`vecnormalize.pkl` read as data: the statistics that normalized an agent's observations.

The file is a pickle, and a pickle is a program. `read_pickle` walks its opcodes itself and never
looks up a name: a global, a call, an object state become an inert `Record`. Afterwards numpy
arrays and scalars are decoded from their records by hand, for plain number types only. Nothing of
Python's or numpy's own unpickling runs, so there is no class whose constructor could be abused.
"""

from __future__ import annotations

import hashlib
import math
import pickletools
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import InputError, one_line
from quantkit.policy import Field

_MAX_BYTES = 64 * 2**20
_DTYPE = re.compile(r"(b1|[iu][1248]|f[248])")


@dataclass
class Record:
    """What a pickle would have imported, called or built: its dotted name, arguments and state. Inert."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    called: bool = False


@dataclass(frozen=True)
class Normalizer:
    """`clip((obs - mean) / std, -clip, clip)`: float64 statistics of the shape of one observation.

    alone: which entries are left alone and not clipped either; their mean is 0 and their std 1.
    """

    mean: np.ndarray
    std: np.ndarray
    clip: float
    sha256: str
    alone: np.ndarray


@dataclass
class _Machine:
    """The pickle machine: a stack, the stacks below open marks, and the memo."""

    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise IndexError("the stack is empty")
        items = self.stack[-n:]
        del self.stack[-n:]
        return items


def read_pickle(blob: bytes) -> Any:
    """The value a pickle describes, with a `Record` for everything that is not a plain value.

    Sets become lists, dictionary items with keys other than text or int are dropped, persistent
    and extension references become records. Raises ValueError on a damaged stream.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in texts
            for opcode, arg, _ in pickletools.genops(blob):
                if opcode.name == "STOP":
                    return machine.stack[-1]
                _step(machine, opcode.name, arg)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged pickle: {one_line(error, 120)}") from None
    raise ValueError("damaged pickle: it does not end")


def _step(m: _Machine, op: str, arg: Any) -> None:
    """One opcode."""
    match op:
        case "PROTO" | "FRAME":
            pass
        case "NONE":
            m.stack.append(None)
        case "NEWTRUE" | "NEWFALSE":
            m.stack.append(op == "NEWTRUE")
        case "EMPTY_LIST" | "EMPTY_SET":
            m.stack.append([])
        case "EMPTY_TUPLE":
            m.stack.append(())
        case "EMPTY_DICT":
            m.stack.append({})
        case "MARK":
            m.marks.append(m.stack)
            m.stack = []
        case "POP":
            m.pop(1) if m.stack else m.pop_mark()
        case "POP_MARK":
            m.pop_mark()
        case "DUP":
            m.stack.append(m.stack[-1])
        case "MEMOIZE":
            m.memo[len(m.memo)] = m.stack[-1]
        case "PUT" | "BINPUT" | "LONG_BINPUT":
            m.memo[int(arg)] = m.stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
            m.stack.append(m.memo[int(arg)])
        case "APPEND" | "APPENDS":
            items = m.pop(1) if op == "APPEND" else m.pop_mark()
            if isinstance(m.stack[-1], list):
                m.stack[-1].extend(items)
        case "ADDITEMS":
            m.pop_mark()
        case "LIST" | "FROZENSET":
            items = m.pop_mark()
            m.stack.append(items)
        case "TUPLE":
            items = m.pop_mark()
            m.stack.append(tuple(items))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            m.stack.append(tuple(m.pop(int(op[-1]))))
        case "DICT":
            items = m.pop_mark()
            m.stack.append({})
            _set_items(m.stack[-1], items)
        case "SETITEM" | "SETITEMS":
            items = m.pop(2) if op == "SETITEM" else m.pop_mark()
            _set_items(m.stack[-1], items)
        case "GLOBAL":
            m.stack.append(Record(arg.replace(" ", ".")))
        case "STACK_GLOBAL":
            m.stack.append(Record(".".join(map(str, m.pop(2)))))
        case "REDUCE" | "NEWOBJ":
            callee, args = m.pop(2)
            m.stack.append(_called(callee, args))
        case "NEWOBJ_EX":
            callee, args, _ = m.pop(3)
            m.stack.append(_called(callee, args))
        case "INST":
            items = m.pop_mark()
            m.stack.append(Record(arg.replace(" ", "."), tuple(items), called=True))
        case "OBJ":
            callee, *args = m.pop_mark()
            m.stack.append(_called(callee, tuple(args)))
        case "BUILD":
            (state,) = m.pop(1)
            if isinstance(m.stack[-1], Record):
                m.stack[-1].state = state
        case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER":
            m.stack.append(Record(f"<{op.lower()}>"))
        case "BINPERSID":
            m.pop(1)
            m.stack.append(Record("<persid>"))
        case "READONLY_BUFFER":
            pass
        case _ if arg is not None:  # the opcodes that carry a number, a text or bytes
            m.stack.append(arg)
        case _:
            raise ValueError(f"unknown opcode {op}")


def _called(callee: Any, args: Any) -> Record:
    if not isinstance(callee, Record) or not isinstance(args, tuple):
        raise TypeError("a call of something that is no global")
    if callee.name in ("copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__") and args:
        callee, args = args[0], args[1:]
        if not isinstance(callee, Record):
            raise TypeError("a call of something that is no global")
    return Record(callee.name, args, called=True)


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, str | int))


def _bytes(value: Any) -> bytes:
    """Raw bytes, in any of the ways the pickle protocols write them."""
    match value:
        case bytes() | bytearray():
            return bytes(value)
        case str():
            return value.encode("latin-1")
        case Record("_codecs.encode", (str() as text, *_)):
            return text.encode("latin-1")
        case Record("builtins.bytearray" | "__builtin__.bytearray", (inner,)):
            return _bytes(inner)
    raise ValueError("array data is not raw bytes")


def _dtype(value: Any) -> np.dtype[Any]:
    """A plain number type from its record; ValueError for objects, records, dates and texts."""
    match value:
        case Record("numpy.dtype", (str() | bytes() as code, *_)):
            text = code.decode("latin-1") if isinstance(code, bytes) else code
            order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "="
            order = order.decode("latin-1") if isinstance(order, bytes) else order
            if _DTYPE.fullmatch(text) and order in ("<", ">", "=", "|"):
                return np.dtype(order + text)
            raise ValueError(f"array of type {text[:20]!r}; only plain numbers are read")
    raise ValueError("array of an unknown type; only plain numbers are read")


def _from_raw(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError("array of unreadable shape")
    kind, blob = _dtype(dtype), _bytes(raw)
    if math.prod(shape) * kind.itemsize != len(blob):
        raise ValueError(f"array of shape {shape} with {len(blob)} bytes")
    return np.frombuffer(blob, kind).reshape(shape, order="F" if order == "F" else "C")


def as_array(value: Any) -> np.ndarray:
    """A number or numpy array (float64) from what `read_pickle` returned; ValueError for anything else."""
    match value:
        case bool() | int() | float():
            array = np.asarray(value)
        case Record("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar", (dtype, raw)):
            array = _from_raw(raw, dtype, (), "C")
        case Record(
            "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct",
            state=(_, shape, dtype, bool() | int() as fortran, raw),
        ):
            array = _from_raw(raw, dtype, shape, "F" if fortran else "C")
        case Record("numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer", (raw, dtype, shape, order)):
            array = _from_raw(raw, dtype, shape, order)
        case Record(name):
            raise ValueError(f"{name[:80]} where a number or an array of numbers was expected")
        case _:
            raise ValueError(f"{type(value).__name__} where a number or an array of numbers was expected")
    return array.astype(np.float64)


def _number(state: dict[str, Any], name: str, default: float) -> float:
    value = as_array(state.get(name, default))
    if value.ndim:
        raise ValueError(f"{name} is an array; expected one number")
    return float(value)


def _moments(rms: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a saved RunningMeanStd; ValueError if it is none."""
    if not isinstance(rms, Record) or not isinstance(rms.state, dict):
        raise ValueError("no statistics of observations (obs_rms)")
    return as_array(rms.state.get("mean")), as_array(rms.state.get("var"))


def _by_key(found: dict[Any, Any], fields: tuple[Field, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and whether it is left alone, of every number of a dictionary's vector."""
    unknown = sorted(str(key) for key in found if key not in {f.key for f in fields})
    if unknown:
        keys = ", ".join(f.key for f in fields) or "none, it is no dictionary"
        raise ValueError(f"normalizes the key {unknown[0][:80]!r}; the policy's keys: {keys}")
    parts = []
    for f in fields:
        mean, var = _moments(found[f.key]) if f.key in found else (np.zeros(f.width), np.ones(f.width))
        if mean.size != f.width or var.size != f.width or (f.sizes and f.key in found):
            raise ValueError(f"key {f.key!r} has statistics of shape {mean.shape}; the policy takes {f.shape}")
        parts.append((mean.ravel(), var.ravel(), np.full(f.width, f.key not in found)))
    mean, var, alone = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean, var, alone


def read_normalizer(path: Path, fields: tuple[Field, ...] = ()) -> Normalizer | None:
    """The observation normalizer in a `vecnormalize.pkl`, or None when it leaves observations alone.

    fields: the parts of a dictionary's vector, which have normalizers of their own or none. Raises InputError naming
    the file and the cause: unreadable, truncated, no VecNormalize, keys or shapes of other observations, statistics
    that are not finite numbers.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: larger than {_MAX_BYTES // 2**20} MiB; no VecNormalize file is")
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    try:
        root = read_pickle(blob)
        if not isinstance(root, Record) or not isinstance(root.state, dict):
            raise ValueError("no saved VecNormalize object")
        state = root.state
        if not _number(state, "norm_obs", True):
            return None
        epsilon, clip = _number(state, "epsilon", 1e-8), _number(state, "clip_obs", 10.0)
        found = state.get("obs_rms")
        if isinstance(found, dict):
            mean, var, alone = _by_key(found, fields)
        else:
            mean, var = _moments(found)
            alone = np.zeros(mean.shape, bool)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error}; expected a VecNormalize saved by Stable-Baselines3") from None
    if mean.shape != var.shape:
        raise InputError(f"{path}: mean of shape {mean.shape} beside variance of shape {var.shape}")
    for name, array in (("mean", mean), ("variance", var + epsilon)):
        bad = np.argwhere(~np.isfinite(array) | ((array <= 0) if name == "variance" else False))
        if bad.size or not array.size:
            at = bad[0].tolist() if bad.size else "no entry"
            raise InputError(f"{path}: unusable {name} at {at}; expected finite numbers and positive variance")
    if not clip > 0:
        raise InputError(f"{path}: clip_obs is {clip}; expected a positive number")
    std = np.where(alone, 1.0, np.sqrt(var + epsilon))
    return Normalizer(mean, std, clip, hashlib.sha256(blob).hexdigest(), alone)
