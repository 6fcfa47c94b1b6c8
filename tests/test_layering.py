"""The package's shape: who may import whom, what an import brings in, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastrcnn"
MODULES = sorted(PACKAGE.rglob("*.py"))
TIERS = [
    {"_extension", "_write"},
    {"ops"},
    {"layers"},
    {"checkpoints"},
    {"models"},
    {"zoo"},
    {"weights"},
    {"data"},
    {"inference"},
    {"evaluation", "export", "ray"},
    {"training"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
TIER = {name: rank for rank, names in enumerate(TIERS) for name in names}
FACE = PACKAGE / "models" / "__init__.py"  # hands on the builders that stand above the networks
CORE = ("ops", "layers", "checkpoints", "models", "zoo", "weights")
CALLED_AT_RUN_TIME = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def module_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """ "ops" for fastrcnn/ops/nms.py, "cli" for fastrcnn/cli/info.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, nested: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b. Without `nested` only what an import runs."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = path.relative_to(ROOT).with_suffix("").parts[: -child.level] if child.level else ()
                source = ".".join([*package, *filter(None, [child.module])])
                found.extend((child.lineno, f"{source}.{alias.name}") for alias in child.names)
            if nested or not isinstance(child, CALLED_AT_RUN_TIME):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def tier_of_import(name: str) -> int:
    """fastrcnn itself, and what it exports, stands on everything below the command line."""
    part = name.split(".")[1] if "." in name else ""
    return TIER.get(part, TIER["training"])


def test_every_part_of_the_package_has_its_tier():
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts == set(TIER)


@pytest.mark.parametrize("path", [p for p in MODULES if p not in (PACKAGE / "__init__.py", FACE)], ids=module_id)
def test_imports_never_go_backwards(path):
    own = TIER[part_of(path)]
    ours = [(line, name) for line, name in imports(path, nested=True) if name.split(".")[0] == "fastrcnn"]
    backwards = [f"{module_id(path)}:{line}: {name}" for line, name in ours if tier_of_import(name) > own]
    assert not backwards


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) in CORE], ids=module_id)
def test_the_core_imports_only_torch_and_numpy(path):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "fastrcnn"}
    others = [f"{module_id(path)}:{line}: {name}" for line, name in imports(path, nested=False)
              if name.split(".")[0] not in allowed]  # fmt: skip
    assert not others


def test_import_checks_see_nested_relative_and_backward_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "fastrcnn" / "ops" / "nms.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..models import fpn\nif True:\n    import PIL.Image\ndef f():\n    from fastrcnn import Detector\n"
    )
    outer = [(1, "fastrcnn.models.fpn"), (3, "PIL.Image")]
    assert imports(path, nested=False) == outer
    assert imports(path, nested=True) == [*outer, (5, "fastrcnn.Detector")]
    assert tier_of_import("fastrcnn.models.fpn") == TIER["models"]
    assert tier_of_import("fastrcnn.Detector") == tier_of_import("fastrcnn") == TIER["training"]


def test_importing_the_package_brings_in_no_optional_dependency():
    script = """
import sys
import torch, torchvision
before = {name.split(".")[0] for name in sys.modules}
import fastrcnn, fastrcnn.data
fastrcnn.Detector, fastrcnn.ops, fastrcnn.load_weights, fastrcnn.save
print(*sorted({name.split(".")[0] for name in sys.modules} - before))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    brought = set(run.stdout.split())
    assert "fastrcnn" in brought
    assert not brought & {
        "PIL",
        "safetensors",
        "rich",
        "typer",
        "hotcoco",
        "matplotlib",
        "cv2",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "fastapi",
        "uvicorn",
        "prometheus_client",
        "ray",
        "pyarrow",
    }


def test_every_room_can_be_entered_first():
    """The rooms' faces hand each other names; which of them is imported first must not matter."""
    script = """
import importlib, os, sys
import torch, torchvision
for room in sys.argv[1:]:
    child = os.fork()
    if not child:
        status = 1
        try:
            importlib.import_module("fastrcnn." + room)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        print(room)
"""
    rooms = [name for names in TIERS[:-1] for name in sorted(names)]
    run = subprocess.run([sys.executable, "-c", script, *rooms], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "", run.stdout + run.stderr


CAPS = [
    ("csrc", "**/*.cu", 400),
    ("csrc", "**/*.cpp", 200),
    ("csrc", "*.h", 150),
    ("csrc", "*/**/*.h", 200),
    ("fastrcnn", "ops/*.py", 250),
    ("fastrcnn", "cli/*.py", 300),
    ("fastrcnn", "**/*.py", 400),
    ("tests", "**/*.py", 400),
]


def capped_files() -> dict[str, int]:
    caps = {}
    for folder, pattern, cap in CAPS:
        for path in sorted((ROOT / folder).glob(pattern)):
            caps.setdefault(path.relative_to(ROOT).as_posix(), cap)
    return caps


@pytest.mark.parametrize("name, cap", capped_files().items(), ids=capped_files())
def test_files_stay_short(name, cap):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= cap, f"{name} has {lines} lines, at most {cap} are allowed"


# Where the peers' own answers differ by device, and where one device has no deterministic answer.
RULES_OF_A_DEVICE = {"fastrcnn/ops/nms.py": 1, "fastrcnn/ops/deform_roi_pool.py": 1}


def device_switches(tree: ast.AST) -> list[int]:
    """Lines that ask where a tensor lies or what is loaded: `x.is_cuda`, `x.device.type == "cpu"`, `_C is None`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu"):
            found.append(node.lineno)
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if any(side.endswith("device.type") or side.split(".")[-1] in ("_C", "_C_cuda") for side in sides):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "ops"], ids=module_id)
def test_the_dispatcher_chooses_the_kernel(path):
    """No operator asks for the device or the library by hand to choose who answers."""
    allowed = RULES_OF_A_DEVICE.get(module_id(path), 0)
    assert len(device_switches(ast.parse(path.read_text(encoding="utf-8")))) <= allowed


def test_device_switches_are_seen():
    for line in (
        "x.is_cuda",
        'x.device.type == "cuda"',
        '"cpu" != a.b.device.type',
        "_C is None",
    ):
        assert device_switches(ast.parse(line)) == [1], line


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) != "cli"], ids=module_id)
def test_no_import_of_ours_hides_in_a_function(path):
    """A local import breaks a circle that should not be there; the command line alone is lazy, to start quickly."""
    always = imports(path, nested=False)
    assert not [
        found for found in imports(path, nested=True) if found[1].startswith("fastrcnn") and found not in always
    ]
