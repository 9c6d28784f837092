"""Returns of designs that played different episodes, and who of them is on a front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.pareto import front
from quantkit.results import Row
from quantkit.study import Study
from quantkit.targets import points


def on_fronts(study: Study, rows: Sequence[Row], cost: str) -> list[int]:
    """Indices of the rows on the front of at least one target, but for those worse than a random policy and float."""
    every = [points(row) for row in rows]
    found = [front([on[min(place, len(on) - 1)] for on in every], cost, "mean") for place in range(places(study))]
    useless = min(study.random.mean, study.reference.mean)
    return [i for i in sorted(set(itertools.chain.from_iterable(found))) if rows[i]["score"]["mean"] >= useless]


def places(study: Study) -> int:
    """How many fronts there are."""
    return max(1, len(study.settings.targets))


def paired(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows with mean returns that compare: float mean plus mean paired difference, where only some were played.

    Episodes differ more from each other than policies do, so means over different episodes would not compare.
    """
    found = []
    for row in rows:
        if "score" in row and short(row, study):
            mean = study.reference.mean + row["verdict"]["diff_mean"]
            row = row | {"score": row["score"] | {"mean": mean}}
        found.append(row)
    return found


def short(row: Mapping[str, Any], study: Study) -> bool:
    """Whether a race ended the row's episodes early."""
    return row.get("episodes", study.settings.episodes) < study.settings.episodes
