"""Quantize a Hugging Face directory block by block: weights are read when their layer's turn comes, and then dropped.

Held at any time: the weights of the layer at its turn and of those that have not run yet, and what the calibration set
is in front of it: its inputs and what later layers read, of which what exceeds a budget lies on disk. Layers, their
inputs and their order are those of `recipe.quantize` on the whole model, and so are the codes, bit for bit.

Every finished block (a decoder layer; what comes before the first, and behind the last) leaves in a work folder

    block-000.safetensors     its tensors as the artifact stores them
    block-000/                activations behind it, of the quantized and, where a step asks for it, the float network
    block-000.json            written last: records, specifications, what the steps have counted so far

so that an interrupted run goes on behind the last of them, if recipe, weights, text and our own source are the same. At
the end the files are joined to the artifact.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.numpy import load_file
from torch import Tensor, fx, nn

from hwmodel.spec import LayerSpec
from quantkit import __version__
from quantkit.arithmetic import one_thread
from quantkit.artifact import MARKER, TENSORS, TENSORS_META, entry, pack_layer, report, restore_layer, write_documents
from quantkit.errors import InputError
from quantkit.files import check_new, new_directory, new_file
from quantkit.language_store import Later, Store, Stream, framed, save_tensors
from quantkit.loaders.hf import Weights, companions
from quantkit.model import Calib, Model
from quantkit.qlayers import Plain, QLayer, shape_of
from quantkit.recipe import Recipe, StepReport, full_steps, give_plans, one_walk
from quantkit.sources import source_digest
from quantkit.specs import same_weight, specs_of
from quantkit.spool import give_back
from quantkit.walk import Site, Visit


def why_whole(model: Model, recipe: Recipe) -> str | None:
    """Why a captured model has to be quantized as a whole, None if it can be streamed; its layers get their plans."""
    if not isinstance(model.module, fx.GraphModule):
        return f"the network cannot be followed: {model.meta.get('untraced')}"
    calls = [str(n.target) for n in model.module.graph.nodes if n.op == "call_module" and n.target in model.layers()]
    if calls != list(model.layers()):
        return "its layers do not run once each, in the order of their definition"
    give_plans(model, recipe)
    if one_walk(model, recipe, Calib(model.example)) is None:
        names = " + ".join(name for name, _ in full_steps(recipe))
        return f"{names}, with these formats, is more than one walk from layer to layer"
    return None


def budget(model: Model) -> int:
    """Bytes of activations that are held where nothing else is asked for: those of a block's largest weight in float32.

    At least 64 MiB. So weights and not the length of the text decide what is held at the peak. Embedding and head do
    not count: what is held beside the layers of a block is held beside their second moments, too.
    """
    inside = (layer.weight.numel() for name, layer in model.layers().items() if _block_of(name) is not None)
    return max(2**26, 4 * max(inside, default=0))


def partial_folder(output: Path) -> Path:
    """The work folder of an output."""
    return output.with_name(f"{output.name}.partial")


def quantize_streamed(
    source: Path,
    model: Model,
    weights: Weights,
    recipe: Recipe,
    calib: Calib,
    output: Path,
    *,
    memory: int | None = None,
    half: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Quantize a model for which `why_whole` is None into the directory `output`; what `artifact.summary` says.

    model, weights: what `hf.outline` of `source` gave, captured. memory: bytes of activations to hold; the rest lies in
    the work folder beside the output; None: `budget`. half: compute the network's products and the inputs' second
    moments from operands rounded to bfloat16, and keep activations so; weights are rounded in float32 all the same.
    progress(layers done, layers). Goes on with what an earlier run left there, and raises InputError if that was
    another run. The returned model has no weights.
    """
    check_new(output, force=force, marker=MARKER)
    calib.generator.manual_seed(recipe.seed)
    steps = one_walk(model, recipe, calib)
    assert steps is not None, "why_whole has not been asked"
    folder = partial_folder(output)
    store = Store(folder / "spilled", budget(model) if memory is None else memory, half)
    run = _Run(model, weights, calib, steps, folder, store)
    model.module.eval()
    give_back()  # what following the network's code has taken
    try:
        run.begin(_job(model, recipe, calib, half))
        with torch.no_grad(), one_thread():
            run.walk(progress)
    except InputError:
        if run.begun:  # the same job would end here again
            shutil.rmtree(folder)
        raise
    model.meta["recipe"] = recipe.to_json()
    model.meta["steps"] = [vars(found) for found, _ in steps]
    if half:
        model.meta["calibrated_in"] = "bfloat16"
    blocks = run.blocks()
    parts = [folder / "rest.safetensors", *(folder / f"block-{i:03d}.safetensors" for i in range(len(blocks)))]
    shared = {name: other for block in blocks for name, other in block["shared"].items()}
    bits, numbers = (sum(block[key] for block in blocks) for key in ("bits", "weights"))
    summary = report(model, [e for block in blocks for e in block["entries"]], bits / max(1, numbers))
    specs = [LayerSpec.from_json(record) for block in blocks for record in block["specs"]]
    with new_directory(output, force=force, marker=MARKER) as temporary:
        join(parts, temporary / TENSORS)
        write_documents(temporary, model, [r for block in blocks for r in block["records"]], shared, summary, specs)
        for file in companions(source):
            shutil.copyfile(file, temporary / file.name)
    shutil.rmtree(folder)
    return model, summary


def _job(model: Model, recipe: Recipe, calib: Calib, half: bool) -> dict[str, Any]:
    """What must be the same for a run to go on with another's blocks."""
    digest = hashlib.sha256(calib.inputs.contiguous().numpy().tobytes()).hexdigest()
    return {
        "recipe": recipe.to_json(),
        "checkpoint": model.meta["sha256"],
        "calibration": [digest, list(calib.inputs.shape), calib.batch],
        "dtype": "bfloat16" if half else "float32",
        "versions": {"quantkit": __version__, "torch": torch.__version__},
        "source": source_digest(__name__),
    }


class _Run:
    """One pass through the layers, from wherever an earlier one has stopped."""

    def __init__(
        self,
        model: Model,
        weights: Weights,
        calib: Calib,
        steps: list[tuple[StepReport, Visit]],
        folder: Path,
        store: Store,
    ) -> None:
        self.model, self.weights, self.calib, self.folder = model, weights, calib, folder
        self.visits = [step for _, step in steps]
        self.layers = model.layers()
        self.names: set[str] = set().union(*(v.names for v in self.visits))
        self.sees = any(v.inputs for v in self.visits)
        self.twins = any(v.targets for v in self.visits)
        assert isinstance(model.module, fx.GraphModule)
        self.nodes = list(model.module.graph.nodes)
        batches, self.half = calib.batches(), store.half
        self.current = Stream(model.module, batches, store)
        self.float = Stream(model.module, batches, store) if self.twins else None
        self.streams = [self.current] if self.float is None else [self.float, self.current]
        self.unrun: list[str] = []  # layers done that the streams have still to go through
        self.tied: dict[str, str] = {n: o for n, o in model.meta.get("tied", {}).items() if n in self.layers}
        self.moments: tuple[fx.Node | None, dict[Any, Tensor]] = (None, {})  # of the inputs that a node makes
        self.waiting: str | None = None  # the layer whose specification waits for the next one's input
        self.begun = False
        self.block: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}

    # --- the work folder ------------------------------------------------------------------------------------------

    def begin(self, job: dict[str, Any]) -> None:
        """Make the work folder, or check that it is this run's."""
        file = self.folder / "job.json"
        if self.folder.exists():
            try:
                before = json.loads(file.read_text())
            except (OSError, ValueError):
                raise InputError(f"{self.folder} is in the way and is no unfinished run; remove or rename it") from None
            changed = [key for key in job if before.get(key) != job[key]]
            if changed:
                names = " and ".join([", ".join(changed[:-1]), changed[-1]] if changed[1:] else changed)
                raise InputError(
                    f"{self.folder} is an unfinished run with another {names}; finish it with the same"
                    " command as before, or remove it to start anew"
                )
            shutil.rmtree(self.folder / "spilled", ignore_errors=True)
        else:
            with new_directory(self.folder) as temporary:
                (temporary / "job.json").write_text(json.dumps(job, indent=1) + "\n")
        self.begun = True
        (self.folder / "spilled").mkdir()
        rest = {}
        assert isinstance(self.model.module, fx.GraphModule)
        for name, parameter in self.model.module.named_parameters():
            if name.rpartition(".")[0] not in self.layers:
                parameter.data = self.weights.read(name)
        for name, tensor in self.model.module.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            if owner not in self.layers or leaf not in ("weight", "bias", "in_scale"):
                rest[name] = tensor.contiguous().numpy()
        save_tensors(rest, self.folder / "rest.safetensors")

    def blocks(self) -> list[dict[str, Any]]:
        """The finished blocks, in order."""
        files = (self.folder / f"block-{i:03d}.json" for i in itertools.count())
        return [json.loads(file.read_text()) for file in itertools.takewhile(Path.is_file, files)]

    # --- the walk -------------------------------------------------------------------------------------------------

    def walk(self, progress: Callable[[int, int], None] | None) -> None:
        """Do every layer that is not done, and leave its block in the work folder."""
        plan = list(self._segments())
        finished = self.blocks()
        start = self._resume(plan, finished)
        done = sum(len(names) for names, _ in plan[: len(finished)])
        for number in range(len(finished), len(plan)):
            end = plan[number][1]
            self.block = {"shared": {}, "bits": 0, "weights": 0, "entries": [], "records": [], "specs": []}
            self.arrays = {}
            rest = {name for later, _ in plan[number:] for name in later}
            for index in range(start, end):
                node = self.nodes[index]
                name = str(node.target) if node.op == "call_module" else ""
                if name in self.layers:
                    self._layer(name, node, bool(rest & self.names))
                    rest.discard(name)
                    done += 1
                    if progress:
                        progress(done, len(self.layers))
                elif self.sees and rest & self.names:
                    for stream in self.streams:
                        stream.follow(node)
            start = end
            if number == len(plan) - 1:
                self._specify(None)
            self._finish(number, end, last=number == len(plan) - 1 or not rest & self.names)

    def _segments(self) -> Iterator[tuple[list[str], int]]:
        """(layers, number of the node in front of which the block ends) of each block."""
        places = {str(node.target): i for i, node in enumerate(self.nodes) if node.op == "call_module"}
        groups = [list(names) for _, names in itertools.groupby(self.layers, _block_of)]
        last = {used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes}

        def alive(at: int) -> int:
            return sum(last.get(n, -1) >= at for n in self.nodes[:at] if n.op != "get_attr")

        for here, after in itertools.pairwise(groups):
            yield here, min(range(places[here[-1]] + 1, places[after[0]] + 1), key=alive)
        yield groups[-1], len(self.nodes)

    def _resume(self, plan: list[tuple[list[str], int]], finished: list[dict[str, Any]]) -> int:
        """The number of the node to start with, everything as it was there."""
        if not finished:
            return 0
        last = finished[-1]
        records = {record["name"]: record for block in finished for record in block["records"]}
        # inputs of all finished layers, and all of those still needed: the last, and what another is tied to
        needed = {plan[len(finished) - 1][0][-1], *self.tied.values()}
        for number, (names, _) in enumerate(plan[: len(finished)]):
            wanted = [n for n in names if n in needed]
            held = load_file(self.folder / f"block-{number:03d}.safetensors") if wanted else {}
            tensors = {key: torch.from_numpy(array) for key, array in held.items()}
            for name in names:
                layer = self.layers[name]
                if isinstance(layer, QLayer):
                    if name in wanted:
                        self._read(name)
                    restore_layer(layer, records[name] if name in wanted else records[name] | {"weight": None}, tensors)
        for step, counted in zip(self.visits, last["counted"], strict=True):
            step.report.update(counted)
        self.calib.generator.set_state(torch.tensor(last["generator"], dtype=torch.uint8))
        self.waiting = last["waiting"]
        if self.waiting is not None and not isinstance(self.layers[self.waiting], QLayer):
            self._read(self.waiting)
        folder = self.folder / f"block-{len(finished) - 1:03d}"
        if self.sees and folder.is_dir():
            self.current.load(folder / "current", last["node"])
            if self.float is not None:
                self.float.load(folder / "float", last["node"])
        return int(last["node"])

    def _layer(self, name: str, node: fx.Node, needed: bool) -> None:
        """Read a layer, let the steps have it, pack it; needed: whether anything from it on looks at inputs."""
        layer = self.layers[name]
        sees = self.sees and needed
        looks_up = shape_of(layer).op == "embedding"
        if sees and not all(stream.has_input(node) for stream in self.streams):
            self._catch_up()
        self._read(name)
        site = Site(name, layer, [], [], half=self.half)  # type: ignore[arg-type]
        twin = _twin(layer) if sees and self.float is not None else None
        later = Later(lambda: self._targets(site, node, twin))  # type: ignore[arg-type]
        known: list[Any] | None = None
        if name in self.names:
            assert isinstance(layer, QLayer)
            if sees and not looks_up:
                site.inputs = self.current.inputs(node)
                if self.float is not None:
                    site.floats, site.targets = self.float.inputs(node), later
            if self.moments[0] is not node.all_input_nodes[0]:
                self.moments = node.all_input_nodes[0], {}
            site.moments = self.moments[1]
            for step in self.visits:
                if name in step.names:
                    site.outputs = None  # of the layer as it was before this step
                    step.visit(site)
            known = None if site.outputs is None else [self.current.store.put(y) for y in site.outputs]
            site.inputs, site.targets, site.floats, site.outputs = [], [], [], None
            if not self._shared(node):
                self.moments = (None, {})
        if sees:
            if self.float is not None:
                self.float.follow(node, twin, later.kept)
            self.current.follow(node, known=known)
            self.unrun.append(name)
        give_back()  # what the steps have taken
        self._specify(name)
        self._pack(name)
        self._release(name)
        give_back()

    def _targets(self, site: Site, node: fx.Node, twin: nn.Module) -> list[Any]:
        """What the float layer puts out; its inputs are let go, as in `quantkit.walk`."""
        assert self.float is not None
        site.floats = []
        return self.float.ahead(node, twin)

    def _shared(self, node: fx.Node) -> bool:
        """Whether a module that is yet to come reads what this one does."""
        users, place = node.all_input_nodes[0].users, self.current.number
        return any(place[user] > place[node] and user.op == "call_module" for user in users)

    def _catch_up(self) -> None:
        """Run what waits, and forget the weights of its layers."""
        for stream in self.streams:
            stream.catch_up()
        self._ran()

    def _ran(self) -> None:
        names, self.unrun = self.unrun, []
        for name in names:
            self._release(name)
        give_back()

    def _read(self, name: str) -> None:
        layer = self.layers[name]
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in self.weights.keys:
                getattr(layer, leaf).data = self.weights.read(f"{name}.{leaf}")

    def _release(self, name: str) -> None:
        """Forget the float weight at once, codes as soon as nobody asks for them."""
        layer = self.layers[name]
        wanted = name == self.waiting or name in self.unrun
        if isinstance(layer, QLayer):
            layer.invalidate()
            if layer.q is not None or not wanted:
                layer.weight.data = torch.zeros(()).expand(layer.weight.shape)
            if not wanted and name not in self.tied.values():
                layer.set_weight(None)
        elif not wanted:
            layer.weight.data = torch.zeros(()).expand(layer.weight.shape)

    def _specify(self, name: str | None) -> None:
        """The specification of the layer before, now that the next one is known; embeddings have none."""
        if name is not None and shape_of(self.layers[name]).op == "embedding":
            return
        before, self.waiting = self.waiting, name
        if before is not None:
            follower = None if name is None else self.layers[name]
            specs = specs_of(before, self.layers[before], follower, self.model.example.shape[1])
            self.block["specs"] += [spec.to_json() for spec in specs]
            self._release(before)

    def _pack(self, name: str) -> None:
        layer, other, block = self.layers[name], self.tied.get(name), self.block
        same = other is not None and _same(layer, self.layers[other])
        if other is not None and same:
            block["shared"][name] = other
        if isinstance(layer, QLayer):
            record, arrays = pack_layer(name, layer, weight=not same)
            block["records"].append(record)
            self.arrays |= arrays
        else:
            leaves = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
            kept = {leaf: t for leaf, t in leaves.items() if t is not None and not (same and leaf == "weight")}
            self.arrays |= {f"{name}.{leaf}": t.detach().contiguous().numpy() for leaf, t in kept.items()}
        q = layer.q if isinstance(layer, QLayer) else None
        numel = layer.weight.numel()
        block["bits"] += 0 if same else 32 * numel if q is None else q.bits
        block["weights"] += 0 if other is not None else numel
        block["entries"].append(entry(name, layer))

    def _finish(self, number: int, end: int, *, last: bool) -> None:
        """Write the block; its .json, last of all, makes it count. last: nothing behind it looks at inputs."""
        if last:
            for stream in self.streams:
                stream.forget()
            self.moments = (None, {})
            self._ran()
        else:
            self._catch_up()
        stem = self.folder / f"block-{number:03d}"
        save_tensors(self.arrays, stem.with_suffix(".safetensors"))
        shutil.rmtree(stem, ignore_errors=True)
        if self.sees and not last:
            stem.mkdir()
            self.current.save(stem / "current")
            if self.float is not None:
                self.float.save(stem / "float")
        self.block |= {"node": end, "waiting": self.waiting, "counted": [v.report for v in self.visits]}
        self.block["generator"] = self.calib.generator.get_state().tolist()
        with new_file(stem.with_suffix(".json"), force=True) as temporary:
            temporary.write_text(json.dumps(self.block) + "\n")
        if number:
            shutil.rmtree(self.folder / f"block-{number - 1:03d}", ignore_errors=True)


def _same(a: Plain | QLayer, b: Plain | QLayer) -> bool:
    """`same_weight` of two layers whose float weight was the same tensor, whether it is at hand or not."""
    floats = [not (isinstance(layer, QLayer) and layer.q is not None) for layer in (a, b)]
    return all(floats) or (not any(floats) and same_weight(a, b))


def _block_of(name: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`; None outside blocks."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else ".".join(parts[: at + 1])


def _twin(layer: Plain | QLayer) -> nn.Module:
    """The layer in float, as it is before any step has had it."""
    if not isinstance(layer, QLayer):
        return layer
    twin = copy.copy(layer)
    twin._parameters = {k: nn.Parameter(p.detach(), requires_grad=False) for k, p in layer.named_parameters()}
    twin._buffers = dict(layer._buffers)
    twin.set_act(None)
    twin.set_weight(None)
    return twin


def join(parts: Sequence[Path], whole: Path) -> None:
    """One .safetensors file of several, copied in pieces; their names must differ.

    A file is the length of its header (8 bytes, little endian), the header in JSON with the `data_offsets` of every
    tensor in what follows, and the bytes of all tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": TENSORS_META}
    at, starts = 0, []
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            own = json.loads(file.read(length))
        own.pop("__metadata__", None)
        for name, facts in own.items():
            assert name not in header, name
            header[name] = facts | {"data_offsets": [at + o for o in facts["data_offsets"]]}
        starts.append(8 + length)
        at += part.stat().st_size - 8 - length
    with whole.open("wb") as target:
        target.write(framed(header))
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                _copy(file, start, target)


def _copy(file: BinaryIO, start: int, target: BinaryIO) -> None:
    file.seek(start)
    shutil.copyfileobj(file, target, 2**20)
