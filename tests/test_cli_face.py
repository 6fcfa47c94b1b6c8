"""What every verb has in common, and every example that a --help shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from PIL import Image
from test_docs import place, words_of  # noqa: F401  place is a fixture
from typer.testing import CliRunner

from fastrcnn import Detector, __version__, ops
from fastrcnn.cli import app
from fastrcnn.cli.common import console, say_table
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.export.compare import Difference

ROOT = Path(__file__).resolve().parent.parent
COMMAND = typer.main.get_command(app)
VERBS = {
    " ".join(filter(None, (group, name))): verb
    for group, commands in (("", COMMAND.commands), ("data", COMMAND.commands["data"].commands))
    for name, verb in commands.items()
    if not hasattr(verb, "commands")
}


def run(*arguments, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def process(*arguments, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, its output in pipes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    call = [sys.executable, "-m", *arguments] if arguments else [sys.executable, "-c", INSTALLED]
    return subprocess.run(call, capture_output=True, text=True, env=env, cwd=ROOT)


INSTALLED = (
    "import sys; from fastrcnn.cli import main; sys.argv[0] = '/usr/bin/fastrcnn'; main()"  # as pip's script does
)


def test_the_version():
    assert run("--version") == f"fastrcnn {__version__}\n"
    assert process("fastrcnn", "--version").stdout == f"fastrcnn {__version__}\n"


def test_help_says_what_it_is_for_and_each_verb_in_a_whole_line():
    printed = run("-h")
    assert printed == run("--help") == run(status=2)
    commands = printed.partition("Commands:")[2].splitlines()
    assert "Find objects in pictures" in printed and not [line for line in commands if line.endswith("...")]
    assert {line.split()[0] for line in commands if line.startswith("  ")} >= {
        "demo", "detect", "train", "eval", "export", "data", "models", "convert", "bench", "info"}  # fmt: skip


@pytest.mark.parametrize(
    "arguments", ["--help", "detect -h", "train --help", "data check --help", "models", "models --json"]
)
def test_what_needs_no_torch_does_not_load_it(arguments):
    script = f"""
import sys
from fastrcnn.cli import main
sys.argv[1:] = {arguments.split()!r}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *[name for name in ("torch", "torchvision", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"], done.stdout


def test_completion_knows_the_verbs_and_their_options():
    words = dict(_FASTRCNN_COMPLETE="complete_bash", COMP_WORDS="fastrcnn de", COMP_CWORD="1")
    assert set(process(**words).stdout.split()) == {"demo", "detect"}
    words = dict(_FASTRCNN_COMPLETE="complete_bash", COMP_WORDS="fastrcnn detect --sc", COMP_CWORD="2")
    assert process(**words).stdout.split() == ["--score"]


@pytest.mark.parametrize("other, verb", [("predict", "detect"), ("val", "eval")])
def test_other_tools_names_are_known(other, verb):
    assert run(other, "--help").replace(f" {other} ", f" {verb} ", 1) == run(verb, "--help")
    assert f"\n  {other} " not in run("--help")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_json_a_short_line_and_an_example(name):
    verb = VERBS[name]
    if name == "serve":  # answers in JSON as long as it runs
        return
    assert "--json" in {option for parameter in verb.params for option in parameter.opts}
    assert EXAMPLE.search(verb.help), f"{name}: no example"


EXAMPLE = re.compile(r"^\s*(fastrcnn \S.*)$", re.M)
EXAMPLES = [(name, line) for name, verb in VERBS.items() if not verb.hidden for line in EXAMPLE.findall(verb.help)]
NEEDS = {
    "fastrcnn train photos/train --val photos/valid --out runs/mine --resume": "a run that was ended",
    "fastrcnn convert mine_mmdet.pth --to fastrcnn --out mine.safetensors": "a model of its name's own widths",
}


@pytest.mark.parametrize("name, line", EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_of_the_help_runs(name, line, place, monkeypatch):  # noqa: F811
    if line in NEEDS or name == "serve":
        pytest.skip(f"needs {NEEDS.get(line, 'a client')}")
    Image.fromarray(render_cells(5, 96, 128)[0]).save("street.jpg")
    Path("list.txt").write_text("street.jpg\nphotos/valid/6.jpg\n")
    words = words_of(line)
    if words[0] in ("detect", "bench") and "--weights" not in words:  # the published ones would be fetched
        words += ["--weights", "coco.safetensors"]
    if words[0] == "bench":
        words += ["--height", "64", "--width", "96", "--seconds", "0"]
    if words[0] == "train":
        Path("runs/mine/best.safetensors").unlink()
    if words[0] == "export":  # tests/test_docs.py writes the file for the same line of README.md
        monkeypatch.setattr("fastrcnn.export.export", lambda *_: Difference(1, 1, 0.0, 0.0))
    printed = run(*words)
    if "--json" in words:
        json.loads(printed.splitlines()[-1])


def test_a_table_is_boxed_in_a_terminal_alone(monkeypatch, capsys):
    say_table(("op", "cpu"), [("nms", "kernel"), ("roi_align", "-")])
    assert capsys.readouterr().out == "op         cpu\nnms        kernel\nroi_align  -\n"
    monkeypatch.setattr(console, "_force_terminal", True)
    say_table(("op", "cpu"), [("nms", "kernel")])
    assert "┏" in capsys.readouterr().out


def test_info_lists_every_operator():
    listed = json.loads(process("fastrcnn", "info", "--json").stdout)["ops"]
    assert set(listed) == {name for name in ops.__all__ if not name.endswith("_reference")}


def test_exit_statuses(tmp_path):
    assert process("fastrcnn", "detect", str(tmp_path), "--score", "high").returncode == 2
    nothing = process("fastrcnn", "detect", str(tmp_path))
    assert nothing.returncode == 1 and nothing.stdout == "" and nothing.stderr.startswith("fastrcnn: no images found")
    assert process("fastrcnn", "models", "r51").returncode == 1


def test_ctrl_c_keeps_what_is_done_and_ends_with_130(tmp_path, monkeypatch):
    source = tmp_path / "a.jpg"
    Image.fromarray(render_cells(5, 96, 128)[0]).save(source)
    original = Detector.stream

    def interrupted(self, images, batch_size=None):
        yield next(original(self, images, batch_size))
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "stream", interrupted)
    weights = str(ROOT / "fastrcnn" / "assets" / "demo.safetensors")
    run("detect", source, source, "--weights", weights, "--out", tmp_path / "out", status=130)
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found["images"]) == 1 and found["annotations"]
