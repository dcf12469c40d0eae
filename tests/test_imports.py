"""The shape of the package: imports point down only, optional packages stay optional, public names are documented."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import hira

SOURCE = Path(hira.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent.name != "startup")
# what answers without PEFT: `import hira` and the commands
LIGHT = [SOURCE / "__init__.py", SOURCE / "peft_hook.py", *sorted((SOURCE / "cli").glob("*.py"))]

# From the bottom up; a module imports from rows above its own, or from its own package.
LAYERS = [
    ["errors", "version"],
    ["ops"],
    ["distributed"],
    ["base_weights"],
    ["files"],
    ["config"],
    ["layers"],
    ["tuner"],
    ["peft_integration"],
    ["training"],
    ["serving"],
    ["peft_hook"],
    [""],
    ["cli"],
    ["__main__"],
]
# inside ops: the equations stand alone, and everything forms W' by way of effective_weight
OPS_LAYERS = [
    ["reference", "heuristics", "measures"],
    ["workspace"],
    ["dither", "int8", "triton"],
    ["kernel_choice"],
    ["effective_weight"],
    ["linear", "mixed_batch", "embedding", "conv", "recompute", "grouped"],
    ["kernel_bench"],
    ["__init__"],
]
OPTIONAL = {"bitsandbytes", "triton", "trl", "datasets", "accelerate", "matplotlib", "deepspeed", "vllm"}


def module_name(path: Path) -> str:
    """`ops.linear` for .../hira/ops/linear.py, "" for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """The absolute names of what a file imports; not in functions or for types alone, unless everywhere."""
    tree = ast.parse(path.read_text())
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _is_for_types(node)]
    inside = {node for part in later for node in ast.walk(part)}
    names = set()
    for node in ast.walk(tree):
        if node in inside and not everywhere:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(names: set[str]) -> set[str]:
    """Of imported names, the modules of this package: "" for a public name taken from the top."""
    found = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top == "hira":
            parts = rest.split(".") if rest else [""]
            depth = 2 if (SOURCE / parts[0]).is_dir() and len(parts) > 1 else 1
            is_module = (SOURCE / parts[0]).is_dir() or (SOURCE / f"{parts[0]}.py").is_file()
            found.add(".".join(parts[:depth]) if is_module else "")
    return found


def level(module: str, layers: list[list[str]]) -> int:
    return next(i for i, names in enumerate(layers) if module in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    module = module_name(path).partition(".")[0]
    used = {name.partition(".")[0] for name in within(imports(path))} - {module}
    upward = {name for name in used if level(name, LAYERS) >= level(module, LAYERS)}
    assert not upward


def test_the_graph_is_not_empty():
    """The test above would pass on files that it cannot read."""
    assert {"base_weights.dense", "layers.base", "ops.heuristics"} <= within(imports(SOURCE / "layers" / "linear.py"))


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_answers_at_once_imports_torch_and_peft_where_it_uses_them(path):
    names = imports(path, everywhere=False)
    assert {name.partition(".")[0] for name in names} <= {"typer", "rich", "hira", *sys.stdlib_module_names}
    assert within(names) <= {
        "",
        "errors",
        "version",
        "peft_hook",
        "cli.app",
        "cli.bench_command",
        "cli.file_commands",
        "cli.serving_commands",
        "cli.training_commands",
        "cli.messages",
    }


def test_every_file_has_a_place():
    placed = {name for names in LAYERS for name in names}
    assert {module_name(path).partition(".")[0] for path in FILES} == placed


@pytest.mark.parametrize("path", sorted((SOURCE / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_ops_are_pure_tensor_functions(path):
    """No modules, no PEFT, no transformers: torch and the standard library."""
    names = imports(path)
    outside = {name.partition(".")[0] for name in names} - {"torch", "hira", *sys.stdlib_module_names}
    assert outside == set()
    assert not {name for name in names if name == "torch.nn" or name == "torch.nn.Module"}
    for name in within(names):
        assert name.startswith("ops."), name
        used = name.split(".")[1]
        assert level(used, OPS_LAYERS) < level(path.stem, OPS_LAYERS), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    names = {name.partition(".")[0] for name in imports(path, everywhere=False)}
    # Triton's functions are compiled by name, so its names are global there; hira's loader is a class of vLLM's
    home = {"triton": path.parent.name == "triton", "vllm": path.stem == "vllm_loader"}
    assert names & OPTIONAL == {name for name, is_home in home.items() if is_home} & names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_imports_them_is_imported_where_it_is_used(path):
    names = [*imports(path, everywhere=False)]
    assert path.parent.name == "triton" or not any("hira.ops.triton" in name for name in names)
    assert not any("vllm_loader" in name for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"
    assert path.stem not in {"utils", "helpers", "common"}


def public_functions() -> list[tuple[str, object]]:
    found = []
    for name in hira.__all__:
        value = getattr(hira, name)
        found.append((name, value))
        if inspect.isclass(value):
            found += [
                (f"{name}.{attribute}", method)
                for attribute, method in vars(value).items()
                if inspect.isfunction(method) and not attribute.startswith("_")
            ]
    return found


@pytest.mark.parametrize(("name", "value"), public_functions(), ids=[name for name, _ in public_functions()])
def test_public_names_are_documented(name, value):
    assert inspect.getdoc(value), f"{name} has no docstring"
    assert "hira" in inspect.getmodule(value).__name__


def test_all_is_sorted_and_complete():
    assert hira.__all__ == sorted(hira.__all__)
    assert set(hira._HOMES) | {"HiraError"} == set(hira.__all__)
