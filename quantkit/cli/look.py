"""Commands that look at a checkpoint: inspect, evaluate, analyze."""

from __future__ import annotations

from typing import Any

from quantkit.cli.options import _LOOK, Checkpoint, Env, Episodes, Factory, Inputs, Json, Normalize, Seed, app, load
from quantkit.console import guarded, print_json, print_table, progress_bar, say


@app.command(rich_help_panel=_LOOK, epilog="Example: quantkit inspect ppo/LunarLander-v2_1")
@guarded
def inspect(
    checkpoint: Checkpoint,
    env: Env = None,
    factory: Factory = None,
    inputs: Inputs = None,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: algorithm, environment, layers, parameters."""
    from quantkit.loading import describe_checkpoint

    document = describe_checkpoint(load(checkpoint, env, factory, normalize, inputs))
    if json:
        print_json(document)
        return
    say(f"{checkpoint}")
    for key in ("kind", "algo", "env", "observations", "actions", "normalizer", "parameters"):
        if (text := _phrase(document[key])) != "none":
            say(f"  {key}: {text}")
    fields = {"name": "layer", "op": "op", "in_features": "in", "out_features": "out", "parameters": "parameters"}
    fields |= {"weight": "weights", "act": "input"}
    rows = [[_phrase(entry[key]) for key in fields] for entry in document["layers"]]
    justify = {"in": "right", "out": "right", "parameters": "right"}
    print_table("", {heading: justify.get(heading, "left") for heading in fields.values()}, rows)


def _phrase(fact: Any) -> str:
    """A fact of `inspect` in words: a space as Discrete(4), a normalizer by its mode."""
    match fact:
        case None:
            return "none"
        case {"mode": mode, **rest}:
            return f"{mode}, clip {rest['clip']:g}" if rest.get("clip") else str(mode)
        case {"type": "Box", "shape": shape, **rest}:
            bounds = f" in {rest['low']}..{rest['high']}" if "low" in rest else ""
            return f"Box{tuple(shape)}{bounds}"
        case {"type": kind, "nvec": nvec}:
            return f"{kind}({', '.join(map(str, nvec))})"
        case int():
            return f"{fact:,}"
    return str(fact)


@app.command(rich_help_panel=_LOOK, epilog="Example: quantkit evaluate agent.zip --episodes 20 --seed 1000 --json")
@guarded
def evaluate(
    checkpoint: Checkpoint,
    env: Env = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Run deterministic episodes and report the return with its uncertainty."""
    from quantkit.study import policy_of
    from quantkit.tasks.episodes import evaluate_policy

    model = load(checkpoint, env, None, normalize)
    policy, spec = policy_of(model)
    with progress_bar("episodes", "episodes") as update:
        score = evaluate_policy(policy, spec, episodes=episodes, seed=seed, progress=update)
    if json:
        print_json(score.to_json())
        return
    say(
        f"{checkpoint} on {spec.id}: return {score.mean:.2f} ± {score.stderr:.2f} "
        f"(standard error of {score.n} episodes)"
        if score.n > 1
        else f"{checkpoint} on {spec.id}: return {score.mean:.2f} (one episode: no error known)"
    )
    if score.n > 1:
        say(f"  std {score.std:.2f}, interquartile mean {score.iqm:.2f} [{score.iqm_low:.2f}, {score.iqm_high:.2f}]")
    say(f"  seeds {seed}..{seed + episodes - 1}, {sum(score.lengths):,} steps in {score.seconds:.1f} s")
