"""The layout that docs/architecture.md describes: few modules at the root, small files, arrows that point down."""

import ast
from functools import cache

import pytest
from tree import ROOT, Function, Module, body_lines, modules, parameters

PACKAGE = "spo_kernels"
LEAVES = ("benchmarks", "examples", "experiments")
FOLDERS = (PACKAGE, "arithmetic", *LEAVES, "tests")

# From the bottom to the top; a name stands for the module or for everything in the package. What is not listed stands
# at the top: the command line.
LAYERS = {
    "backends": ("_version", "startup", "backends"),
    "values": ("arguments", "head", "sparsity"),
    "engine": ("engine",),
    "losses": ("losses",),
    "preference": ("preference",),
    "public functions": ("logprob", "loss", "kl", "sequences", "testing", "__init__"),
    "extras": ("extras",),
    "integrations": ("integrations",),
    "train": ("train", "commands", "data", "__main__"),
}
ORDER = list(LAYERS)
# Beyond the order: what may not be imported though it lies below or beside.
NEVER = {"backends": ("losses",), "losses": ("backends", "engine")}
# Packages whose functions users call, beside the modules at the root.
USERS = ("losses", "extras", "integrations", "data")
TRAINING_LIBRARIES = ("transformers", "datasets", "accelerate", "peft", "trl")

MOST_MODULES = 12
MOST_LINES = 400
MOST_PARAMETERS = 12
DUNDERS = {"__init__", "__main__", "_version"}


@cache
def package() -> list[Module]:
    return modules(PACKAGE)


def layer_of(name: str) -> str:
    """The layer of a module `spo_kernels...`."""
    first = [*name.split("."), "__init__"][1]
    found = [layer for layer, members in LAYERS.items() if first in members]
    assert found, f"{name} stands in no layer of LAYERS"
    return found[0]


def internal(module: Module) -> list[str]:
    return [name for name in module.imports() if name.split(".")[0] == PACKAGE]


def test_few_modules_at_the_root() -> None:
    names = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert len(names) <= MOST_MODULES, sorted(names)
    assert {name for name in names if name.startswith("_")} <= DUNDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_long_file(folder: str) -> None:
    assert {m.name: m.lines for m in modules(folder) if m.lines > MOST_LINES} == {}


def test_fused_spo_loss_reads_like_its_docstring() -> None:
    (module,) = (module for module in package() if module.name == f"{PACKAGE}.loss")
    function = dict(module.functions())["fused_spo_loss"]
    assert len(parameters(function)) <= 20, parameters(function)
    assert body_lines(function) <= 40


def test_few_parameters() -> None:
    """Public functions, Triton kernels and op schemas are the exceptions."""
    long = {}
    for module in package():
        for name, function in module.functions():
            count = len(parameters(function))
            excused = is_public(module, name) or is_triton_kernel(module, function)
            if count > MOST_PARAMETERS and not excused:
                long[f"{module.name}.{name}"] = count
    assert long == {}


def is_public(module: Module, name: str) -> bool:
    """A function that users call: what a module at the root, an objective's or an extra's offers by name."""
    offered = module.path.parent == ROOT / PACKAGE or module.name.split(".")[1] in USERS
    return offered and not any(part.startswith("_") for part in name.split("."))


def is_triton_kernel(module: Module, function: Function) -> bool:
    if not module.name.startswith(f"{PACKAGE}.backends.triton"):
        return False
    named = function.name.startswith("_") and function.name.endswith("_kernel")
    return named or any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_arrows_point_down() -> None:
    wrong = [
        f"{module.name} ({layer_of(module.name)}) imports {name} ({layer_of(name)})"
        for module in package()
        for name in internal(module)
        if ORDER.index(layer_of(name)) > ORDER.index(layer_of(module.name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layer", NEVER)
def test_kernels_and_losses_do_not_know_each_other(layer: str) -> None:
    forbidden = NEVER[layer]
    wrong = [
        f"{module.name} imports {name}"
        for module in package()
        if layer_of(module.name) == layer
        for name in internal(module)
        if layer_of(name) in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_only_training_code_imports_training_libraries() -> None:
    wrong = [
        f"{module.name} imports {name}"
        for module in package()
        if layer_of(module.name) not in ("integrations", "train")
        for name in module.imports()
        if name.split(".")[0] in TRAINING_LIBRARIES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("leaf", [*LEAVES, "arithmetic", PACKAGE])
def test_leaves_do_not_import_leaves(leaf: str) -> None:
    others = set(LEAVES) - {leaf}
    wrong = [f"{m.name} imports {name}" for m in modules(leaf) for name in m.imports() if name.split(".")[0] in others]
    assert not wrong, "\n".join(wrong)
