"""A study on a Ray cluster: two nodes on this machine, the same rows as in one process."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_policies import cartpole
from test_cli import error
from test_durability import RECIPES as SOME
from test_durability import Deadly
from test_sweep import RECIPES, SETTINGS, same_rows

from quantkit.backends import Died, answers, workers
from quantkit.errors import InputError
from quantkit.results import read_rows
from quantkit.study import Task
from quantkit.sweep import open_study, run


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a second node with one CPU each, as `ray start` makes them."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        made.add_node(**node)
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_rows_of_one_process(cluster: Any, tmp_path: Path) -> None:
    """Two nodes, one design each at a time: every design once, rows equal but for timings."""
    rows = {}
    for where in ("here", "there"):
        study = open_study(tmp_path / where, cartpole(), SETTINGS)
        rows[where] = run(study, RECIPES, tmp_path / where, ray=cluster.address if where == "there" else None)
    same_rows(rows["there"], rows["here"])
    same_rows(read_rows(tmp_path / "there/rows.jsonl"), rows["here"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dead_ray_worker_costs_its_design_only(cluster: Any, tmp_path: Path) -> None:
    """A task that kills its worker is reported dead, and all others have their rows."""
    study = open_study(tmp_path / "s", cartpole(), SETTINGS)
    tasks = [Deadly(recipe) if i == 1 else Task(recipe) for i, recipe in enumerate(SOME[:4])]
    with workers(study, ray=cluster.address) as mapper:
        found = {task.id: outcome for task, outcome in mapper(iter(tasks))}
    assert [isinstance(found[task.id], Died) for task in tasks] == [False, True, False, False]


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_that_does_not_answer_is_one_line(address: str) -> None:
    """InputError that names the address, before Ray is even asked."""
    began = time.monotonic()
    with pytest.raises(InputError, match="nothing answers there") as caught:
        answers(address.format(port=free_port()))
    assert "\n" not in str(caught.value) and time.monotonic() - began < 60


@pytest.mark.parametrize("address", ["somewhere", "host:", "host:port", "ray://host", ""])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    """What is neither auto, local nor HOST:PORT is refused with what is accepted."""
    with pytest.raises(InputError, match="HOST:PORT"):
        answers(address)


def test_auto_and_local_are_ray_s_to_find() -> None:
    """Nothing is dialled for them."""
    answers("auto")
    answers("local")


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_a_cluster_that_is_not_there_leaves_no_study(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster for Ray to find that it does not: one line, and the folder that was to be begun is not there."""
    ray = pytest.importorskip("ray")

    def nothing(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one.")

    monkeypatch.setattr(ray, "init", nothing)
    agent = Path(__file__).parent.parent / "benchmarks/agents/ppo/LunarLander-v3.zip"
    formats = ("--weights", "int4", "--acts", "int4", "--episodes", "1", "--ray", "auto")
    line = error(command, str(agent), "-o", str(tmp_path / "s"), *formats)
    assert "--ray auto" in line and "ray start --head" in line and list(tmp_path.iterdir()) == []
