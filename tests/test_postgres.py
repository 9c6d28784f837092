"""Optuna's record in PostgreSQL: a real server, started for the test and stopped after it."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_search import DESIGNS, by_id, searched

from quantkit.errors import InputError
from quantkit.search_record import check_storage, open_storage

pytest.importorskip("optuna")
pytest.importorskip("psycopg")


def program(name: str) -> str | None:
    """Where a program of the server is: on the path, or where Debian puts it."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a database on a fresh server. PostgreSQL refuses to run as root, who becomes the user `postgres`."""
    if program("initdb") is None or program("pg_ctl") is None:
        pytest.skip("initdb and pg_ctl of PostgreSQL are not installed")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    prefix = ["runuser", "-u", user, "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path is short, and others than root must reach it
    if prefix:
        shutil.chown(folder, user)

    def call(name: str, *arguments: str) -> None:
        command = [*prefix, str(program(name)), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    call("initdb", "-A", "trust", "-U", "quantkit", "-N")
    options = f"-F -p {port} -k {folder} -c listen_addresses=127.0.0.1"
    call("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql://quantkit@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_the_record_in_postgresql_is_that_of_the_journal(server: str, tmp_path: Path) -> None:
    """The same search gives the same rows with either storage, and the same trials; run again, it adds none."""
    import optuna

    trials = []
    for where in (None, server, server):
        folder = tmp_path / ("journal" if where is None else "server")
        folder.mkdir(exist_ok=True)
        rows = searched(folder / "s", storage=where)
        with open_storage(where, folder / "s") as storage:
            (name,) = optuna.get_all_study_names(storage)
            found = optuna.load_study(study_name=name, storage=storage).trials
        trials.append((by_id(rows), [(t.params, t.values, t.user_attrs) for t in found]))
    assert trials[0] == trials[1] == trials[2] and len(trials[0][1]) == DESIGNS


def test_a_database_that_is_not_there_is_one_line(server: str, tmp_path: Path) -> None:
    """A server without that database is refused with its own words, before anything is measured."""
    with pytest.raises(InputError, match=r"nowhere.*does not exist") as caught:
        check_storage(f"{server.removesuffix('postgres')}nowhere", tmp_path)
    assert "\n" not in str(caught.value)
