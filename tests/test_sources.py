"""Laws of the digest of our source: it sees all that makes a row, and nothing that only shows or exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import quantkit.sources
from quantkit.sources import source_digest, source_files

ROOT = Path(__file__).parents[1]
EVALUATE = """
import sys
sys.path.insert(0, "tests")
from small_policies import cartpole
from quantkit.presets import preset_steps
from quantkit.recipe import uniform
from quantkit.study import Settings, evaluate_design, prepare
from hwmodel.devices import find_device
study = prepare(cartpole(), Settings(episodes=1, device=find_device("xc7a35t")))
evaluate_design(study, uniform("int4", "int4", steps=preset_steps("fast")))
mine = ("quantkit.", "hwmodel.")
print("\\n".join(m.__file__ for n, m in sys.modules.items() if n.startswith(mine)))
"""


def test_the_digest_sees_all_that_makes_a_row() -> None:
    """Every module of ours that evaluating a design loads, presets aside (a row has the steps), is among the files."""
    done = subprocess.run([sys.executable, "-c", EVALUATE], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {Path(line).relative_to(ROOT).as_posix() for line in done.stdout.splitlines()}
    seen = {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert len(loaded) > 30 and loaded - seen == {"quantkit/presets.py"}
    assert {"hwmodel/coeffs.toml", "hwmodel/devices.toml", "quantkit/methods/adaround.py"} <= seen


def test_what_shows_or_exports_is_not_seen() -> None:
    """Commands, figures, exports and searches can change without a study noticing."""
    seen = {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert not {name for name in seen if "/cli" in name or "export" in name or "figure" in name or "verify" in name}
    assert not seen & {"quantkit/search.py", "quantkit/sweep.py", "quantkit/backends.py", "quantkit/report.py"}


def test_a_language_job_has_files_of_its_own() -> None:
    """What quantizes block by block counts for its blocks and not for a study's rows; every method counts for both."""
    own = {path.relative_to(ROOT).as_posix() for path in source_files("quantkit.language_stream")}
    stream = {"quantkit/language_stream.py", "quantkit/language_store.py"}
    assert stream <= own and not stream & {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert {"quantkit/columns.py", "quantkit/methods/gptq.py", "quantkit/loaders/hf.py", "quantkit/artifact.py"} <= own
    assert source_digest("quantkit.language_stream") != source_digest()


def test_any_changed_file_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more byte in one file is another digest; the same files give the same."""
    files = []
    for path in source_files()[:6]:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        files.append(copy)
    monkeypatch.setattr(quantkit.sources, "source_files", lambda root: files)
    digests = {source_digest.__wrapped__()}
    for path in files:
        path.write_bytes(path.read_bytes() + b"\n")
        digests.add(source_digest.__wrapped__())
    assert len(digests) == len(files) + 1 and source_digest.__wrapped__() in digests
