"""The layout holds: imports follow the arrows, folders explain themselves, families are short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "layers": {"layers", "kernels"},
    "checkpoints": {"checkpoints"},
    "zoo": {"zoo", "layers", "kernels", "checkpoints"},
    "recipes": {"recipes", "zoo", "layers", "kernels", "checkpoints"},
}
OURS = set(ALLOWED) | {"tests"}
HEAVY = {"transformers", "lm_eval", "kvpress", "datasets", "matplotlib", "ray"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Top-level names that a file imports, and whether the import is inside a function or for type checkers alone."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(function, ast.If) and ast.unparse(function.test) == "TYPE_CHECKING")
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module.split(".")[0], id(node) in inside))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name, in_function in imports(path):
            assert name not in OURS or name in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"
            if name == "lm_eval" and path.name in ("harness.py", "evaluate.py"):  # nothing else in zoo imports these
                continue
            if name in HEAVY:
                assert in_function and package == "recipes", f"{path.relative_to(ROOT)} imports {name}"


def test_layers_and_kernels_read_no_files():
    for package in ("layers", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name in ("native.py", "aot.py"):  # one builds a library; the other is a command that compiles
                continue
            names = {name for name, _ in imports(path)}
            assert not names & {"json", "argparse", "pathlib", "os", "sys"}, path


@pytest.mark.parametrize("package", ALLOWED)
def test_every_file_is_explained(package):
    readme = (ROOT / package / "README.md").read_text()
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT / package).as_posix()
        assert path.name == "__init__.py" or f"`{name}`" in readme, f"{package}/README.md says nothing about {name}"


def test_families_can_be_read_in_one_sitting():
    for path in (ROOT / "zoo" / "models").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 190, path


def test_nothing_outside_the_project_is_named():
    for path in ROOT.rglob("*.md"):
        if ".venv" not in path.parts:
            assert "../shared" not in path.read_text(), path


def test_nothing_imports_what_needs_lm_eval():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("harness.py", "evaluate.py", "check_evaluate.py"):
                assert "zoo.harness" not in path.read_text() and "zoo.evaluate" not in path.read_text(), path


def test_other_packages_still_import():
    """Some of them probe for a package of the name `kernels`, which is not ours."""
    import huggingface_hub  # noqa: F401
    import lm_eval.models.huggingface  # noqa: F401
    import transformers
    from transformers import LlamaForCausalLM

    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT)
    assert LlamaForCausalLM is transformers.LlamaForCausalLM
