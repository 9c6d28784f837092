"""Where designs are evaluated: in this process, in a pool of processes, on a Ray cluster.

A `Mapper` takes tasks one at a time, whenever a worker is free, and yields each with its outcome as it is ready. What
a worker does with a task depends on the study and the task alone, so rows are the same wherever they are made. A
worker that dies takes only its own task with it: the outcome is `Died`, and the rest goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from quantkit.errors import InputError
from quantkit.results import Row
from quantkit.study import Study, Task, attempt

_PRELOADED = ("quantkit.backends", "gymnasium")
ANSWER_S = 5.0
"""A Ray address that takes longer than this to accept a connection counts as not there."""


@dataclass(frozen=True)
class Died:
    """A worker ended without an answer; how, as far as is known."""

    reason: str


Outcome = tuple[Task, Row | Died]
Mapper = Callable[[Iterator[Task]], Iterator[Outcome]]


@contextmanager
def workers(study: Study, jobs: int = 1, ray: str | None = None) -> Iterator[Mapper]:
    """A mapper over `jobs` processes, this one if there is one job, or over the CPUs of the Ray cluster at `ray`.

    ray: "auto" for the cluster that this machine belongs to, "local" to start one here, or an address; InputError if
    nothing answers there. In the context of `connected` its connection is used. Each worker uses one thread.
    """
    if ray is not None:
        with _ray(study, ray) as mapper:
            yield mapper
    elif jobs > 1:
        with _pool(study, jobs) as mapper:
            yield mapper
    else:
        yield lambda tasks: _here(study, tasks)


def _here(study: Study, tasks: Iterator[Task]) -> Iterator[Outcome]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in tasks:
            yield task, attempt(study, task)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _pool(study: Study, jobs: int) -> Iterator[Mapper]:
    """Executors of one worker each: when one breaks, it is known which task broke it.

    They are forked from a process that has imported the libraries and does nothing else, so that these are loaded once
    for all of them.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["__main__", *_PRELOADED])

    def start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, _start_worker, (study,))

    idle, running = [start() for _ in range(jobs)], dict[Future[Row], tuple[ProcessPoolExecutor, Task]]()

    def mapper(tasks: Iterator[Task]) -> Iterator[Outcome]:
        ready: list[Outcome] = []
        while True:
            while idle and (task := next(tasks, None)) is not None:
                worker = idle.pop()
                running[worker.submit(_work, task)] = (worker, task)
            yield from ready  # what is done with them is done while the workers are busy
            ready.clear()
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, task = running.pop(future)
                try:
                    outcome: Row | Died = future.result()
                except BrokenProcessPool:
                    worker.shutdown()
                    worker, outcome = start(), Died("its worker process died (out of memory?)")
                idle.append(worker)
                ready.append((task, outcome))

    with one_thread_per_process():
        try:
            yield mapper
        finally:
            for worker in [*idle, *(worker for worker, _ in running.values())]:
                worker.shutdown(cancel_futures=True)


class one_thread_per_process:  # noqa: N801  (reads as a statement)
    """Environment in which child processes start with one BLAS thread each."""

    _names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self) -> None:
        self._old = {name: os.environ.get(name) for name in self._names}
        os.environ.update(dict.fromkeys(self._names, "1"))

    def __exit__(self, *_: object) -> None:
        for name, old in self._old.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


_study: Study | None = None


def _start_worker(study: Study) -> None:
    global _study
    torch.set_num_threads(1)
    _study = study
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> Row:
    assert _study is not None
    return attempt(_study, task)


@contextmanager
def _ray(study: Study, address: str) -> Iterator[Mapper]:
    """Tasks on a Ray cluster, as many at once as it has CPUs then: machines that join later get their share."""
    with connected(address) as ray:
        shared = ray.put(study)

        @ray.remote(num_cpus=1, max_retries=0)
        def work(study: Study, task: Task) -> Row:
            torch.set_num_threads(1)
            return attempt(study, task)

        def mapper(tasks: Iterator[Task]) -> Iterator[Outcome]:
            running: dict[Any, Task] = {}
            ready: list[Outcome] = []
            try:
                while True:
                    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
                    while len(running) < cpus and (task := next(tasks, None)) is not None:
                        running[work.remote(shared, task)] = task
                    yield from ready
                    ready.clear()
                    if not running:
                        return
                    done, _ = ray.wait(list(running), timeout=10.0)
                    for reference in done:
                        task = running.pop(reference)
                        try:
                            outcome: Row | Died = ray.get(reference)
                        except ray.exceptions.RayError as error:
                            outcome = Died(f"its Ray worker died: {str(error).splitlines()[0]}")
                        ready.append((task, outcome))
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

        yield mapper


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster until the end of the context, which others in it share; None without an address.

    InputError in one line if Ray is not installed or nothing answers in ANSWER_S.
    """
    if address is None:
        yield None
        return
    try:
        import ray
    except ImportError:
        raise InputError('Ray is not installed; pip install "quantkit[study]", or leave --ray out') from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    answers(address)
    try:
        with one_thread_per_process():
            ray.init(address=None if address == "local" else address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        hint = "start one with: ray start --head" if address == "auto" else "is a cluster of this Ray version there?"
        hint += ", or RAY_AUTH_MODE=token if it wants a token"  # without it, Ray tells of no answer only
        raise InputError(f"--ray {address}: no cluster answers ({str(error).splitlines()[0]}); {hint}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def answers(address: str) -> None:
    """InputError unless something listens at HOST:PORT or ray://HOST:PORT; auto and local are for Ray to find."""
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(f"--ray {address}: accepted: auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: nothing answers there ({error.strerror or error}); start it with: ray start --head"
        ) from None
