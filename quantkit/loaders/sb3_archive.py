"""The zip of a Stable-Baselines3 agent, read as data: JSON fields and tensors, never pickles.

`data` is JSON; the base64 cloudpickles inside it (":serialized:") are dropped unread. `policy.pth`
goes through `torch.load(weights_only=True)`. The optimizer and the other members are not opened.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError, one_line
from quantkit.files import sha256_of

_MIB = 2**20
_TOTAL_BYTES = 2048 * _MIB
_MEMBER_BYTES = {"data": 256 * _MIB, "policy.pth": 1024 * _MIB, "_stable_baselines3_version": 4096}
_RATIO, _RATIO_FROM = 200, 100 * _MIB  # a member that unpacks to > 100 MiB may not shrink 200 times
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
    struct.error,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Archive:
    """What a zip holds: `data` (JSON fields without pickles), `tensors` (the policy's state dict), version, sha256."""

    path: Path
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    version: str | None
    sha256: str


def read_archive(path: Path) -> Archive:
    """The archive at `path`.

    Raises InputError (one line: file and cause) for anything but a well-formed SB3 zip: truncated
    or empty files, zip bombs, encrypted or duplicated members, names that leave the archive,
    unreadable JSON, and tensors that only code could rebuild.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, str(path))
            missing = [name for name in ("data", "policy.pth") if name not in archive.namelist()]
            if missing:
                raise InputError(
                    f"{path}: no member {missing[0]!r} (truncated?); an agent's zip holds 'data' and 'policy.pth'"
                )
            blobs = {name: _read(archive, name, path) for name in _MEMBER_BYTES if name in archive.namelist()}
    except _ZIP_ERRORS as error:
        if isinstance(error, InputError):
            raise
        cause = "empty file" if path.is_file() and path.stat().st_size == 0 else one_line(error)
        raise InputError(
            f"{path}: not a readable zip ({cause}); expected an agent saved by Stable-Baselines3"
        ) from None
    version = blobs.get("_stable_baselines3_version", b"").decode("utf-8", "replace").strip() or None
    return Archive(
        path, _read_json(blobs["data"], path), _read_tensors(blobs["policy.pth"], path), version, sha256_of(path)
    )


def _check_members(archive: zipfile.ZipFile, where: str) -> None:
    """Refuse what a saved agent never has; sizes are the declared ones, `_read` holds members to them."""
    seen: set[str] = set()
    infos = archive.infolist()
    total = sum(info.file_size for info in infos)
    if total > _TOTAL_BYTES:
        raise InputError(f"{where}: unpacks to {total // _MIB} MiB; at most {_TOTAL_BYTES // _MIB} MiB are read")
    for info in infos:
        name = info.filename
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"{where}: member name {name!r} leaves the archive; only plain relative names are read")
        if name in seen:
            raise InputError(f"{where}: member {name!r} occurs twice; each member may occur once")
        seen.add(name)
        if info.flag_bits & 0x1:
            raise InputError(f"{where}: member {name!r} is encrypted; only unencrypted archives are read")
        if info.file_size > _RATIO_FROM and info.file_size > _RATIO * max(info.compress_size, 1):
            raise InputError(
                f"{where}: member {name!r} unpacks {info.compress_size} bytes to {info.file_size} (a zip bomb);"
                f" at most {_RATIO} times is read"
            )


def _read(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """A member's bytes, never more than declared and allowed."""
    declared, limit = archive.getinfo(name).file_size, _MEMBER_BYTES[name]
    if declared > limit:
        raise InputError(f"{path}: member {name!r} has {declared} bytes; at most {limit} are read")
    with archive.open(name) as member:
        blob = member.read(declared + 1)
    if len(blob) != declared:
        raise InputError(f"{path}: member {name!r} does not hold the {declared} bytes it declares")
    return blob


def _read_json(blob: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: member 'data' is not JSON ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: member 'data' is a JSON {type(data).__name__}; expected an object")
    for value in data.values():
        if isinstance(value, dict):
            value.pop(":serialized:", None)
    return data


def _read_tensors(blob: bytes, path: Path) -> dict[str, Tensor]:
    """The state dict in policy.pth; only dense floating point tensors that the file really holds."""
    where = f"{path}: policy.pth"
    if blob.startswith(b"PK"):  # before torch 1.6 it was no zip; torch.load reads both
        try:
            with zipfile.ZipFile(io.BytesIO(blob)) as inner:
                _check_members(inner, where)
        except _ZIP_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} is not a readable zip ({one_line(error)})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{where} is not a plain state dict: it asks for code; only tensors are read") from None
    except Exception as error:  # torch raises many types on damaged files; each is the file's fault
        raise InputError(f"{where} cannot be read as tensors ({one_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{where} holds a {type(state).__name__}; expected a state dict of named tensors")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise InputError(f"{where}: tensor {name!r} is not a plain dense tensor")
        if value.numel() * value.element_size() > len(blob):
            raise InputError(f"{where}: tensor {name!r} claims shape {tuple(value.shape)}, more than the file holds")
    return {name: value for name, value in tensors.items() if value.dtype in _FLOATS}
