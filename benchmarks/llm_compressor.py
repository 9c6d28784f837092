"""GPTQ of a language model here and in llm-compressor, from a directory to a directory: time, memory, error.

    python -m venv ../llmc && ../llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/llm_compressor.py --python ../llmc/bin/python

A Llama of 110 million random weights (tied embeddings), stored in float32 or with `--dtype bfloat16` in that, and 32 x
512 random tokens; int4 in groups of 128, each with a symmetric scale, columns by falling second moment with scales
fitted beforehand (`act_order=true`; "static" there), damping 0.01, head and embeddings in float. Ours is `quantkit
quantize` as it is; both calibrate in what the checkpoint is stored in, as is their default. "absmax" is ours with
scales by minimum and maximum, as theirs are; of a checkpoint in float32 ours runs with `--dtype bfloat16`, too, which
computes the calibration's products in that and rounds weights in float32 all the same. llm-compressor runs `oneshot`
with the scheme W4A16 and its own defaults (one sequence at a time, or `--batch`) in an interpreter of its own, as it
wants other versions of transformers and compressed-tensors. Each run is a process with `--threads` threads; they take
turns.

`wall` and `cpu` are seconds from the end of the imports to the written directory, the smaller of `--repeats` each;
`import_wall` what the imports took before. `peak_mib` is the largest resident memory of the whole process, `import_mib`
what of it the imports had taken. `load` is the machine's load average over a minute at the start of the run. `error` is
the mean squared error of the logits on 4 x 512 tokens that neither has seen, relative to their mean square, `agree` the
share of positions with the float network's likeliest token: both directories are loaded by plain transformers, ours
behind `quantkit export --to compressed-tensors`. `rtn` is rounding to nearest here, the yardstick of the error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS, WINDOW, HELD = 32_000, 512, 4
ABSMAX, HALF = "quantkit absmax", "quantkit --dtype bfloat16"


def main() -> None:
    """Make the network, let both quantize it in turns, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter that has llmcompressor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the checkpoint")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="sequences that llm-compressor runs at once")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args()
    from report import publish

    name = "llm_compressor" if args.dtype == "float32" else f"llm_compressor_{args.dtype}"
    packages = ("torch", "transformers", "compressed-tensors")
    publish(f"language/{name}", side_by_side(args.dtype, args), packages=packages, title=name)


def side_by_side(dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a network that is stored in `dtype`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make(folder, args.layers, args.hidden, args.sequences, dtype)
        names = ["llm-compressor", "quantkit", ABSMAX, *([HALF] if dtype == "float32" else []), "rtn"]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for who, found in runs.items():
                if who != "rtn" or not found:
                    found.append(run(who, folder, args.python, args.threads, args.batch))
                    print(who, {key: round(value, 1) for key, value in found[-1].items()}, flush=True)
        errors = compare(folder, list(runs))
        rows = []
        for who, found in runs.items():
            best = {key: min(one[key] for one in found) for key in found[0] if key != "load"}
            row: dict[str, Any] = {"who": who, "dtype": dtype, "weights": weights}
            row |= {
                "tokens": args.sequences * WINDOW,
                "threads": args.threads,
                "load": max(round(one["load"], 1) for one in found),
            }
            row |= {key: round(value, 1) for key, value in best.items()} | errors[who]
            rows.append(row)
        for row in rows:
            row |= {f"times_{key}": round(row[key] / rows[0][key], 3) for key in ("wall", "cpu", "peak_mib")}
    return rows


def make(folder: Path, layers: int, hidden: int, sequences: int, dtype: str = "float32") -> int:
    """The network with a tokenizer of one word a token, and both texts; how many weights it has."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "model")
    ids = torch.randint(0, WORDS, (sequences + HELD, WINDOW))
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids[:sequences].flatten().tolist()))
    return sum(p.numel() for p in model.parameters())


def run(who: str, folder: Path, python: Path, threads: int, batch: int) -> dict[str, float]:
    """One process from start to end; what it measured of itself."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    interpreter = str(python.absolute()) if who == "llm-compressor" else sys.executable
    if who == "llm-compressor":
        environment.pop("PYTHONPATH", None)
    load = os.getloadavg()[0]
    command = [interpreter, str(Path(__file__).resolve()), "--child", who, str(folder), str(batch)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"load": load}


def child(who: str, folder: Path, batch: int) -> None:
    """Import, quantize, write; print what it took."""
    began = time.perf_counter()
    work = theirs(folder, batch) if who == "llm-compressor" else ours(who)
    imported, processor, memory = time.perf_counter(), time.process_time(), peak()
    work()
    facts = {"wall": time.perf_counter() - imported, "cpu": time.process_time() - processor}
    print(json.dumps(facts | {"import_wall": imported - began, "peak_mib": peak(), "import_mib": memory}))


def peak() -> float:
    """The largest resident memory so far, in MiB; not `ru_maxrss`, which starts with that of the parent process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def ours(who: str) -> Any:
    """What runs `quantkit quantize`, everything that it needs imported."""
    import torch.export._trace  # noqa: F401 - what following a network's code imports
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantkit.cli
    import quantkit.language_stream
    import quantkit.loaders.hf  # noqa: F401
    from quantkit.cli.options import app

    step = "rtn" if who == "rtn" else "gptq:act_order=true" + (",scale=absmax" if who == ABSMAX else "")
    command = ["quantize", "model", "-o", who, "--weights", "int4", "--acts", "float", "--granularity", "group128"]
    command += ["--step", step, "--calibration", "text.txt", "--window", str(WINDOW), "--json"]
    command += ["--dtype", "bfloat16"] if who == HALF else []
    return lambda: app(command, standalone_mode=False)


def theirs(folder: Path, batch: int) -> Any:
    """What runs llm-compressor's `oneshot`."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    ids = json.loads((folder / "ids.json").read_text())[:-HELD]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    return lambda: oneshot(
        model=str(folder / "model"),
        dataset=data,
        recipe=recipe,
        max_seq_length=WINDOW,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=batch,
        output_dir=str(folder / "llm-compressor"),
    )


def compare(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Name -> error and agreement with the float network on what neither has seen."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantkit.export_language import export

    held = torch.tensor(json.loads((folder / "ids.json").read_text())[-HELD:])
    found = {}
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)(held).logits
        for name in names:
            path = folder / name
            if name != "llm-compressor":
                path = folder / f"{name}.exported"
                export(folder / name, path, "compressed-tensors")
            got = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(held).logits
            error = (got - wanted).square().mean() / wanted.square().mean()
            agree = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
            found[name] = {"error": round(float(error), 6), "agree": round(float(agree), 4)}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
