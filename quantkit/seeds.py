"""Whose episodes are whose: ranges of seeds, no two of which meet, so that nothing is judged by what has shaped it.

Episode number i of a rollout that begins at a seed has seed + i. `range.start` is where each use begins.
"""

from __future__ import annotations

from quantkit.errors import InputError

EVALUATION_SEED = 1_000
"""Where evaluations begin by default. Any other begin is allowed that `check_evaluation` lets pass."""
CALIBRATION = range(10_000, 200_000)
"""Rollouts of the float policy whose states calibrate."""
CONFIRM = range(500_000, 900_000)
"""Scores of a picked design, which no choice has seen."""
FRESH = range(900_000, 1_000_000)
"""States that errors are measured on, after calibration: `quantkit.study.fresh_states`."""
_SPAN = 1_000_000


def visit(number: int) -> range:
    """Of `Calib.visit` with seed `number`, from 1: its episodes shape, or judge, a policy in training."""
    return range(_SPAN * number + CALIBRATION.start, _SPAN * (number + 1) + CALIBRATION.start)


def check_evaluation(seed: int, episodes: int) -> None:
    """InputError where a study's episodes are some that calibration, training, measurement or confirmation may play."""
    wanted = range(seed, seed + episodes)
    taken = {"calibration": CALIBRATION, "confirmation": CONFIRM, "measurement": FRESH}
    taken["training"] = range(visit(1).start, max(visit(1).start, wanted.stop))
    for use, found in taken.items():
        if wanted.start < found.stop and found.start < wanted.stop:
            raise InputError(
                f"--seed {seed} with {episodes:,} episodes takes seeds of {use} ({found.start} on); free are "
                f"0..{CALIBRATION.start - 1} and {CALIBRATION.stop}..{CONFIRM.start - 1}"
            )
