"""Few episodes first, more only where they decide: sequential non-inferiority of paired returns.

After 5, 10, 20, 40, ... episodes the quantized policy's returns are compared with the float policy's on the same
seeds. Half of the error that is allowed goes to the last look, the other half in equal parts to those before
(`levels`), so that a wrong "non-inferior" and a wrong "inferior" each have a probability of at most 1 - level over all
looks together (Bonferroni; where Student's t holds at each look). The first decisive look ends the race. Five equal
differences look decisive and are not, as Student's t knows nothing of failures that have not come yet: a policy that
fails in one episode of seven, which may cost more than the margin, shows none in ten episodes with a chance of 21 %, in
twenty of 5 %. So "non-inferior" needs 20 episodes, "inferior" 5.

A search has no use for a verdict on every design: what is undecided after half of the episodes, and at least 20, stops
there (`enough`), and is played to its end if it is on the front then.

A network's answers to labelled inputs are raced in the same way, from 64 inputs on and with bounds that are made for
shares (`quantkit.statistics.paired_shares`): ten answers that do not differ decide nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from quantkit.statistics import Floats, Verdict, non_inferior

FIRST, FIRST_ANSWERS = 5, 64
"""Episodes, and labelled inputs, at the first look."""
GOOD_FROM = 20
"""Episodes before a policy can be called non-inferior."""


def looks(episodes: int, first: int = FIRST) -> tuple[int, ...]:
    """After how many episodes a race of at most `episodes` looks at the returns.

    >>> looks(100), looks(3)
    ((5, 10, 20, 40, 80, 100), (3,))
    """
    found, n = [], first
    while n < episodes:
        found.append(n)
        n *= 2
    return (*found, episodes)


def enough(episodes: int) -> int:
    """After how many episodes a search leaves a design undecided.

    >>> enough(20), enough(40), enough(100)
    (20, 20, 50)
    """
    return max(GOOD_FROM, -(-episodes // 2))


def levels(count: int, level: float = 0.95) -> tuple[float, ...]:
    """The confidence of each of `count` looks.

    >>> [round(v, 4) for v in levels(6)], levels(1)
    ([0.995, 0.995, 0.995, 0.995, 0.995, 0.975], (0.95,))
    """
    if count == 1:
        return (level,)
    return (*[1 - (1 - level) / 2 / (count - 1)] * (count - 1), 1 - (1 - level) / 2)


def race(
    reference: ArrayLike,
    play: Callable[[int, int], Floats],
    margin: float,
    level: float = 0.95,
    *,
    shares: bool = False,
    undecided: int | None = None,
) -> tuple[Floats, Verdict]:
    """The returns played until decided, and the verdict on them, each of whose bounds holds at its look's level.

    reference: returns of the float policy, in order of seeds; as many episodes at most. play: `play(first, count)`
    gives the returns of episodes first, ..., first + count - 1. shares: they are 1 or 0, a right answer or a wrong one.
    "inconclusive" only after all episodes, or at the first look at `undecided` of them or more.
    """
    expected = np.asarray(reference, np.float64)
    stops = looks(len(expected), FIRST_ANSWERS if shares else FIRST)
    returns = np.empty(0)
    for n, confidence in zip(stops, levels(len(stops), level), strict=True):
        returns = np.concatenate((returns, play(len(returns), n - len(returns))))
        verdict = non_inferior(expected[:n], returns, margin, level=confidence, method="shares" if shares else "t")
        if verdict.verdict == "inferior" or (verdict.verdict == "non-inferior" and n >= min(GOOD_FROM, stops[-1])):
            break
        if undecided is not None and n >= undecided:
            break
    return returns, verdict
