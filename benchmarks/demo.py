"""The main job on the agents of this repository: `make demo`.

    python benchmarks/demo.py [--out demo_out] [--reports]

Types the commands a user would type, prints them, and ends with a table of what was gained.
--reports copies the figures and tables to reports/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quantkit.console import print_table

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "xc7a35t"
AGENTS = {
    "LunarLander": {
        "zip": "ppo/LunarLander-v3.zip",
        "sweep": "--weights int2,int3,int4,int8,e2m1,e3m2 --acts int3,int4,int8,e2m1,e3m2 --step rtn --step gptq",
    },
    "Pendulum": {
        "zip": "sac/Pendulum-v1.zip",
        "sweep": "--weights int3,int4,int6,int8,e2m1,e3m2 --acts int4,int6,int8,e3m2 --step smoothquant+gptq",
    },
}


def run(command: str, *, capture: bool = False) -> Any:
    """Run a command of this environment, shown as typed; its JSON document if captured."""
    print(f"\n\033[1m$ {command}\033[0m" if sys.stdout.isatty() else f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).parent / program
    done = subprocess.run([path, *arguments], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {program} ended with exit code {done.returncode}")
    return json.loads(done.stdout) if capture else None


def tour(name: str, out: Path) -> dict[str, Any]:
    """Checkpoint to verified ONNX for one agent; the numbers of the final table."""
    agent, study = AGENTS[name], out / f"study_{name.lower()}"
    checkpoint = os.path.relpath(ROOT / "benchmarks" / "agents" / agent["zip"])
    small, onnx = out / f"{name.lower()}.q", out / f"{name.lower()}.onnx"
    run(f"quantkit inspect {checkpoint}")
    began = time.perf_counter()
    run(f"quantkit sweep {checkpoint} -o {study} {agent['sweep']} --episodes 20 --device {DEVICE}")
    seconds = time.perf_counter() - began
    report = run(f"quantkit pareto {study} --json", capture=True)
    knee = report["knee"]
    steps = " ".join(f"--step {step}" for step in knee["steps"].split("+"))
    run(
        f"quantkit quantize {checkpoint} -o {small} --weights {knee['weights']} --acts {knee['acts']} "
        f"--granularity {knee['granularity']} {steps}"
    )
    run(f"hwmodel estimate {small} --device {DEVICE}")
    run(f"quantkit export {small} -o {onnx} --postprocess")
    check = run(f"quantkit verify {small} {onnx} --episodes 20 --json", capture=True)
    print(f"ok: {check['ok']}, actions equal in {check['action_agreement']:.2%} of {check['n']} states")
    rows = [json.loads(line) for line in (study / "rows.jsonl").read_text().splitlines()]
    int8 = next(r for r in rows if r["weights"] == "int8" and r["acts"] == "int8")
    return {
        "name": name, "reference": report["reference"], "knee": knee, "int8": int8, "check": check,
        "designs": report["designs"], "seconds": seconds, "onnx_bytes": onnx.stat().st_size, "study": study,
    }  # fmt: skip


def gains(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the final table for one agent: float, int8, and the design taken."""
    knee, int8, reference, check = (result[k] for k in ("knee", "int8", "reference", "check"))
    parameters = knee["weight_kib"] * 8192 / knee["bits_per_weight"]
    table = [
        [
            result["name"],
            "float32",
            f"{reference['mean']:.1f} ± {reference['stderr']:.1f}",
            f"{parameters / 256:.1f}",
            "-",
            "-",
        ]
    ]
    for label, row in (("int8 x int8", int8), (f"{knee['weights']} x {knee['acts']}", knee)):
        score, cost = row["score"], row["cost"]
        cells = [f"{score['mean']:.1f} ± {score['stderr']:.1f}", f"{row['weight_kib']:.1f}"]
        table.append(["", label, *cells, f"{cost['luts']:,}", f"{cost['latency_us']:.1f}"])
    table.append(["", f"  in onnxruntime ({result['onnx_bytes'] / 1024:.0f} KiB)", f"{check['mean']:.1f}", "", "", ""])
    return table


def publish(results: list[dict[str, Any]]) -> None:
    """Copy figures and tables to reports/, each table with the command on its first line."""
    for result in results:
        stem = ROOT / "reports" / f"demo_{result['name'].lower()}"
        for suffix in ("png", "svg"):
            shutil.copyfile(result["study"] / f"pareto.{suffix}", stem.with_suffix(f".{suffix}"))
        text = (result["study"] / "pareto.csv").read_text()
        stem.with_suffix(".csv").write_text(f"# make demo, then: python benchmarks/demo.py --reports\n{text}")


def main(out: Path, reports: bool) -> None:
    """Both agents, then the table."""
    began = time.perf_counter()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    out = Path(os.path.relpath(out))
    results = [tour(name, out) for name in AGENTS]
    print()
    columns = {
        "agent": "left",
        "design": "left",
        "return": "right",
        "weights KiB": "right",
        "LUTs": "right",
        "µs": "right",
    }
    print_table("What was gained", columns, [row for result in results for row in gains(result)])
    for result in results:
        ratio = result["int8"]["cost"]["luts"] / result["knee"]["cost"]["luts"]
        rate = result["designs"] / result["seconds"] * 60
        print(
            f"{result['name']}: {ratio:.1f}x fewer LUTs than int8 at the same target latency, "
            f"verified: {result['check']['ok']}; {result['designs']} designs in {result['seconds']:.0f} s "
            f"({rate:.0f} a minute); figure: {result['study']}/pareto.png"
        )
    print(f"everything took {time.perf_counter() - began:.0f} s and lies in {out}/")
    if reports:
        publish(results)
    if not all(result["check"]["ok"] for result in results):
        raise SystemExit("error: an exported file did not verify")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out")
    parser.add_argument("--reports", action="store_true", help="also refresh reports/demo_*")
    args = parser.parse_args()
    main(args.out, args.reports)
