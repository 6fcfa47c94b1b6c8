"""What is built and what is refused, in which words; a source distribution holds everything, a clone hides nothing."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = {**os.environ, "CXX": "/nonexistent"}


def test_the_version_stands_once():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f'__version__ = "{version}"' in (ROOT / "fastrcnn" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the sources in a folder of the package's own name."""
    folder = tmp_path_factory.mktemp("parent") / "fastrcnn"
    for part in ("csrc", "fastrcnn", "scripts"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


def build(hook: str, clone: Path, out: Path, **environ: str) -> Path:
    """What a hook of the build backend makes in `out`, where neither torch nor a compiler is to be had."""
    code = (
        f"import sys; sys.modules['torch'] = None; import setuptools.build_meta as backend; backend.{hook}(sys.argv[1])"
    )
    run = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(run, cwd=clone, env={**NO_COMPILER, **environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


def test_source_distribution_holds_every_source(clone, tmp_path):
    sources = {str(p.relative_to(clone)) for p in clone.rglob("*") if p.is_file() and "egg-info" not in str(p)}
    shutil.copytree(ROOT / "benchmarks", clone / "benchmarks")  # which stay out
    with tarfile.open(build("build_sdist", clone, tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert any(name.endswith(".cuh") for name in sources) and sources <= packed
    assert not any(name.startswith("benchmarks/") for name in packed)


def test_editable_install_is_found_from_the_folder_above_the_clone(clone, tmp_path):
    zipfile.ZipFile(build("build_editable", clone, tmp_path, FASTRCNN_BUILD="none")).extractall(tmp_path / "site")
    find = "import site, sys, importlib.util as i; site.addsitedir(sys.argv[1]); print(i.find_spec('fastrcnn').origin)"
    run = [sys.executable, "-ES", "-c", find, str(tmp_path / "site")]  # -c puts the working folder first
    done = subprocess.run(run, cwd=clone.parent, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone / "fastrcnn/__init__.py"), done.stderr


@pytest.mark.parametrize("mode, status", [("auto", 0), ("none", 0), ("cpu", 1)])
def test_where_there_is_no_compiler_auto_installs_without_kernels_and_says_so(mode, status, clone, tmp_path):
    environ = {k: v for k, v in os.environ.items() if k != "CXX"} | dict(PATH=str(tmp_path), FASTRCNN_BUILD=mode)
    run = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    done = subprocess.run(run, cwd=clone, env=environ, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("no C++ compiler was found: installing without kernels" in done.stderr) == (mode == "auto")
    built = [path.name for path in (tmp_path / "build").rglob("*") if path.is_file()]
    assert ("nms.py" in built) == (status == 0) and not [name for name in built if name.endswith(".so")]


def old_compiler(folder: Path) -> str:
    return script(folder / "old-c++", "echo 9 __clang__")


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"CXX": "/nonexistent"}, ["'/nonexistent' does not work", "g++ >= 11", "FASTRCNN_BUILD=none"]),
        ({"CXX": "false"}, ["'false' does not work", "FASTRCNN_BUILD=none"]),
        ({"CXX": old_compiler}, ["is g++ 9", "g++ >= 11", "FASTRCNN_BUILD=none"]),
        ({"FASTRCNN_BUILD": "gpu"}, ["FASTRCNN_BUILD='gpu'", "auto, cpu, cuda or none"]),
    ],
)
def test_what_cannot_be_built_is_one_sentence_and_no_traceback(environ, words, clone, tmp_path):
    environ = {name: value(tmp_path) if callable(value) else value for name, value in environ.items()}
    run = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(run, cwd=clone, env={**os.environ, **environ}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("fastrcnn: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


ALL = "75 80 86 87 89 90 100 103 120 121"
OLDER = "50 60 70 75 80 86 89 90"  # an nvcc that knows no Blackwell


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """setup.py's plan_cuda with cards, a toolkit and a torch of CUDA 99 that the test describes."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("FASTRCNN_BUILD", "none")
    monkeypatch.chdir(ROOT)
    plan_cuda = runpy.run_path("setup.py")["plan_cuda"]

    def run(mode="auto", cards=(), known=ALL, arch_list=None, toolkit="99.3", torch_cuda="99.0"):
        script(
            tmp_path / "bin/nvcc", f"[ $1 = --version ] && echo release {toolkit}, || printf 'compute_%s\\n' {known}"
        )
        script(tmp_path / "include/cuda_runtime.h", "")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        if arch_list is None:
            monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        else:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
        monkeypatch.setitem(plan_cuda.__globals__, "MODE", mode)
        cuda = SimpleNamespace(
            is_available=lambda: bool(cards), device_count=lambda: len(cards), get_device_capability=lambda i: cards[i]
        )
        torch = SimpleNamespace(__version__="2.99", version=SimpleNamespace(cuda=torch_cuda), cuda=cuda)
        home, answer = plan_cuda(torch)
        assert home in (None, str(tmp_path))
        return answer if home else f"none: {answer}"

    return run


@pytest.mark.parametrize(
    "given, archs",
    [
        (dict(mode="cuda"), "7.5;8.0;8.6;8.9;9.0+PTX;10.0;12.0"),
        (dict(mode="cuda", known=OLDER), "7.5;8.0;8.6;8.9;9.0+PTX"),
        (dict(cards=[(7, 5)]), "7.5+PTX"),
        (dict(cards=[(9, 0), (8, 0), (9, 0)]), "8.0;9.0+PTX"),
        (dict(cards=[(6, 1), (8, 6)]), "8.6+PTX"),  # the old card beside it runs the references
        (dict(cards=[(10, 0)], known=OLDER), "9.0+PTX"),  # newer than the toolkit
        (dict(cards=[(7, 0)], arch_list="8.0 9.0a+PTX"), "8.0 9.0a+PTX"),
        (dict(cards=[(8, 0)], arch_list="native"), "8.0+PTX"),
        (dict(arch_list="Turing;Hopper"), "Turing;Hopper"),
    ],
)
def test_architectures(given, archs, plan):
    assert plan(**given) == archs


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(), "no GPU is visible"),
        (dict(mode="cpu", cards=[(9, 0)]), "FASTRCNN_BUILD=cpu"),
        (dict(cards=[(7, 0), (6, 1)]), "compute capability 7.0, the kernels need 7.5"),
        (dict(mode="cuda", cards=[(7, 0)]), "compute capability 7.0, the kernels need 7.5"),
        (dict(mode="cuda", torch_cuda=None), "torch 2.99 is not a CUDA build"),
        (dict(mode="cuda", toolkit="98.4"), "torch needs a toolkit of CUDA 99.0: .*nvcc is of another release 98.4"),
    ],
)
def test_why_there_are_no_cuda_kernels(given, reason, plan):
    assert re.match(f"none: .*{reason}", plan(**given))


@pytest.mark.parametrize("mode", ["auto", "cuda"])
@pytest.mark.parametrize(
    "arch_list, known, reason",
    [
        ("7.0;8.0", ALL, "7.0 is too old, the kernels need 7.5 or newer"),
        ("8.0 Volta+PTX", ALL, r"Volta\+PTX is too old"),
        ("9.0;12.0", OLDER, "nvcc does not know 12.0, only 7.5, 8.0, 8.6, 8.9, 9.0"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_an_error(mode, arch_list, known, reason, plan):
    with pytest.raises(SystemExit, match=reason):
        plan(mode=mode, arch_list=arch_list, known=known)
