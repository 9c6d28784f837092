"""Optuna's record of a search: its trials in a storage, for Optuna's own tools. A search does not go on from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.search_space import SearchSpace


def optuna_quiet() -> Any:
    """Optuna, which says errors only; InputError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise InputError('Optuna is not installed; pip install "quantkit[study]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def open_storage(url: str | None, folder: Path) -> Iterator[Any]:
    """Optuna's storage at a URL (sqlite:///FILE, postgresql://..., journal:FILE), None for a journal in the folder.

    Its connections are closed at the end. InputError in one line if it cannot be opened.
    """
    optuna_quiet()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is None or url.startswith("journal:"):
            path = folder / "optuna.journal" if url is None else Path(url.removeprefix("journal:"))
            storage: Any = JournalStorage(JournalFileBackend(str(path)))
        else:
            storage = RDBStorage(url)
    except Exception as error:  # whatever the database's driver raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--storage {url}: cannot be opened ({reason}); accepted: sqlite:///FILE, postgresql://USER@HOST/NAME, "
            "journal:FILE"
        ) from None
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def check_storage(url: str | None, folder: Path) -> None:
    """InputError in one line if a storage cannot be opened."""
    with open_storage(url, folder):
        pass


def record(url: str | None, space: SearchSpace, done: Any, folder: Path) -> None:
    """Write the trials that the storage lacks, under a name of the folder, the sampler and the seed.

    A journal of the study's own that a kill has damaged is begun anew: it is a record of what is known anyway.
    """
    name = f"{folder.resolve().name}-{type(done.sampler).__name__}-{space.seed}"
    with Claims(folder) as claims:
        claims.wait("")
        try:
            _add_trials(url, folder, name, done)
        except Exception as error:  # whatever the database's driver raises
            if isinstance(error, InputError):
                raise
            if url is not None:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"--storage {url}: cannot be written ({reason}); finished designs are kept") from None
            (folder / "optuna.journal").unlink(missing_ok=True)
            _add_trials(url, folder, name, done)


def _add_trials(url: str | None, folder: Path, name: str, done: Any) -> None:
    import optuna

    finished = [t for t in done.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    with open_storage(url, folder) as storage:
        kept = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
        )
        there = {trial.user_attrs.get("design") for trial in kept.get_trials(deepcopy=False)}
        for trial in finished:
            if trial.user_attrs.get("design") not in there:
                kept.add_trial(trial)
                there.add(trial.user_attrs.get("design"))
