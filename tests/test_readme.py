"""README.md tells the truth: its commands run as written, and the files it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.tasks.reward import arithmetic, solution

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("quantkit", "hwmodel"))
]

FEWER = {command: ["--episodes", "3"] for command in ("evaluate", "sweep", "verify")}
FEWER |= {"search": ["--episodes", "3", "--budget-designs", "6"], "pick": ["--confirm", "3"]}


def test_every_linked_file_is_there() -> None:
    """Links to files of the project lead somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local and [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path: Path) -> None:
    """The commands of the README work in order in an empty directory, with fewer episodes to save time."""
    pytest.importorskip("gymnasium")
    assert {command[1] for command in COMMANDS} >= {
        "inspect",
        "evaluate",
        "quantize",
        "export",
        "verify",
        "sweep",
        "pareto",
        "search",
        "report",
        "pick",
        "generate",
    }
    problems = arithmetic(400).prompts
    for name, some in (("text", problems[:300]), ("heldout", problems[300:])):
        documents = (f"{problem}{solution(problem)}" for problem in some)
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(documents))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for command in COMMANDS:
        fewer = [] if "--text" in command else FEWER.get(command[1], [])
        words = [str(Path(sys.executable).parent / command[0]), *command[1:], *fewer]
        if command[1] == "pick":  # so few episodes prove no loss
            words[words.index("--max-loss") : words.index("--max-loss") + 2] = ["--knee"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, (command, done.stderr)


def test_the_python_example_runs() -> None:
    """The example from Python gives a policy that predicts."""
    pytest.importorskip("gymnasium")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace('"benchmarks/', f'"{ROOT}/benchmarks/'), names)
    action, _ = names["policy"].predict([0.0] * 8)  # type: ignore[attr-defined]
    assert 0 <= int(action) < 4
