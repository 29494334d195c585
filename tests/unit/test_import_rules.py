"""What may import what: commands start fast, devices need no torch, quantization needs no ONNX."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from splitq_edge import config
from splitq_edge.exporters import specs
from splitq_edge.runtime_ops import packing

CORE = Path(config.__file__).parent
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors"}


def _modules() -> dict[str, Path]:
    """Every module of the package by dotted name; in a checkout exporters and runtime_ops are siblings.

    Their folders come from a module's file: an editable install puts other folders into `__path__`.
    """
    roots = {
        "splitq_edge": CORE,
        "splitq_edge.exporters": Path(specs.__file__).parent,
        "splitq_edge.runtime_ops": Path(packing.__file__).parent,
    }
    found: dict[str, Path] = {}
    for package, root in roots.items():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = _modules()


def in_package(*packages: str) -> list[str]:
    return sorted(
        name for name in MODULES if any(name == package or name.startswith(f"{package}.") for package in packages)
    )


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """Dotted names that a module imports: at import time, and lazily inside functions.

    `from a import b` counts as a and as a.b. What stands under `if TYPE_CHECKING` is imported by nobody.
    """
    at_import: set[str] = set()
    lazily: set[str] = set()

    def visit(node: ast.AST, target: set[str]) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            target.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            target.add(str(node.module))
            target.update(f"{node.module}.{alias.name}" for alias in node.names)
        inner = lazily if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else target
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")), at_import)
    return frozenset(at_import), frozenset(lazily)


def everything(module: str) -> frozenset[str]:
    at_import, lazily = imports(module)
    return at_import | lazily


def under(names: frozenset[str], *packages: str) -> list[str]:
    """The names that lie in one of the packages."""
    return sorted(name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages))


def loaded_by(module: str) -> set[str]:
    """All modules of ours that importing `module` loads, directly or not, and the foreign ones they name."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports(name)[0]
            waiting += [name.rpartition(".")[0]] if "." in name else []
    return seen


LIGHT = ["splitq_edge.config", "splitq_edge.modality", "splitq_edge.errors", "splitq_edge.artifacts", "splitq_edge.cli"]
CORE_MODULES = [
    name
    for name in in_package("splitq_edge")
    if not under(frozenset([name]), "splitq_edge.exporters", "splitq_edge.runtime_ops", "splitq_edge.commands")
    and name != "splitq_edge.cli"
]
RUNTIME_MODULES = in_package("splitq_edge.runtime_ops")
DEVICE_COMMANDS = ["splitq_edge.commands.run", "splitq_edge.commands.verify", "splitq_edge.commands.doctor"]


def test_the_rules_see_the_whole_package() -> None:
    assert {"splitq_edge.config", "splitq_edge.modules.split_linear", "splitq_edge.evaluate.backends"} <= set(
        CORE_MODULES
    )
    assert {"splitq_edge.runtime_ops", "splitq_edge.runtime_ops.session", "splitq_edge.runtime_ops.packing"} <= set(
        RUNTIME_MODULES
    )
    assert {"splitq_edge.exporters.specs", "splitq_edge.exporters.passes.expand_sites"} <= set(
        in_package("splitq_edge.exporters")
    )
    assert len(CORE_MODULES) > 20


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert {name.partition(".")[0] for name in loaded_by(module)} & HEAVY == set()


@pytest.mark.parametrize("module", CORE_MODULES)
def test_core_imports_no_onnx_when_it_is_imported(module: str) -> None:
    assert under(imports(module)[0], "onnx", "onnxruntime", "onnx_ir", "onnxscript") == []


@pytest.mark.parametrize("module", CORE_MODULES)
def test_core_does_not_know_exporters_and_runtime(module: str) -> None:
    at_import, lazily = imports(module)
    packages = ("splitq_edge.exporters", "splitq_edge.runtime_ops", "splitq_edge.commands")
    assert under(at_import, *packages) == []
    if module != "splitq_edge.evaluate.backends":  # evaluates exported folders too, and loads their runtime lazily
        assert under(lazily, *packages) == []


@pytest.mark.parametrize("module", in_package("splitq_edge.exporters"))
def test_exporters_never_import_onnxruntime(module: str) -> None:
    assert under(everything(module), "onnxruntime") == []
    assert under(everything(module), "splitq_edge.commands", "splitq_edge.cli") == []


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_runtime_never_imports_torch_or_onnx(module: str) -> None:
    assert under(everything(module), "torch", "onnx", "onnx_ir", "onnxscript", "splitq_edge.exporters") == []
    for name in under(everything(module), "splitq_edge"):
        if name in MODULES:
            assert "torch" not in {loaded.partition(".")[0] for loaded in loaded_by(name)}, name


@pytest.mark.parametrize("module", DEVICE_COMMANDS)
def test_commands_of_a_device_load_no_torch_and_no_onnx(module: str) -> None:
    roots = {name.partition(".")[0] for name in loaded_by(module)}
    assert roots & {"torch", "onnx", "onnx_ir", "onnxscript"} == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_are_absolute_by_the_installed_name(module: str) -> None:
    roots = {name.partition(".")[0] for name in everything(module)}
    assert not roots & {"exporters", "runtime_ops", "tests"}


def test_rules_catch_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The checks above are worth what this reader finds.
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx\nimport torch.nn\n"
        "def f():\n    from onnxruntime import x\nclass C:\n    from safetensors import y\n"
    )
    (tmp_path / "bad.py").write_text(source)
    monkeypatch.setitem(MODULES, "bad", tmp_path / "bad.py")
    at_import, lazily = imports("bad")
    assert under(at_import, "torch") == ["torch.nn"]
    assert under(at_import, "safetensors") == ["safetensors", "safetensors.y"]
    assert under(lazily, "onnxruntime") == ["onnxruntime", "onnxruntime.x"]
    assert under(everything("bad"), "onnx") == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("splitq_edge.cli", ["torch", "transformers", "onnx", "onnxruntime", "numpy", "rich"]),
        ("splitq_edge.runtime_ops.generate", ["torch", "transformers", "onnx", "onnxscript"]),
        ("splitq_edge.commands.run", ["torch", "transformers", "onnx", "onnxscript"]),
    ],
)
def test_a_fresh_interpreter_loads_no_more(module: str, absent: list[str], tmp_path: Path) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    # Not from the checkout: its folder splitq_edge is only a part of the package.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
