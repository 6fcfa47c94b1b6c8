"""MMDetection's config files: read as data, merged as MMEngine merges them; code in them is refused and never run."""

import json

import pytest

from fastrcnn.zoo.config_file import read_config


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_bases_are_merged_and_delete_replaces(tmp_path):
    write(
        tmp_path,
        "bases/a.py",
        "size = (4, 5)\nmodel = dict(x=dict(kept=1, changed=1), gone=dict(a=1, b=2), rows=[1])\n",
    )
    write(tmp_path, "bases/b.py", "schedule = dict(lr=0.02 * 4, steps=[8, 11])\n")
    path = write(
        tmp_path,
        "child.py",
        '"""Docstring."""\n_base_ = ["bases/a.py", "./bases/b.py"]\nn = 3\n'
        "model = dict(x=dict(changed=-n, new=(n, n / 2)), gone=dict(_delete_=True, c=3), rows=[2, *[3]])\n"
        "seen = dict(size={{_base_.size}}, first=_base_.schedule.steps[0], text='{{ fileBasenameNoExtension }}')\n"
        "many = [dict(scale=s) for s in [1, 2]]\n_base_.schedule.lr = 0.5\n",
    )
    config = read_config(path)
    assert config["model"] == dict(
        x=dict(kept=1, changed=-3, new=(3, 1.5)), gone=dict(c=3), rows=[2, 3]
    )  # fmt: skip
    assert config["seen"] == dict(size=(4, 5), first=8, text="child")
    assert config["schedule"] == dict(lr=0.5, steps=[8, 11])
    assert config["many"] == [dict(scale=1), dict(scale=2)]
    assert "_base_" not in config


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = open('marker', 'w')",
        "x = __import__('pathlib').Path('marker').touch()",
        "x = (lambda: 1)()",
        "x = [].append(1)",
        "x = ().__class__",
        "for i in [1]:\n    x = i",
        "if True:\n    x = 1",
        "def f():\n    return 1",
        "x = 9 ** 9 ** 9",
        "x = [0] * 10 ** 12",
        "x = 'x' * 5000000000",
        "x = '%0*d' % (2000000000, 3)",
        "x = [[0 for a in range(1000)] for b in range(1000)]",
        "x = 1 / 0",
        "x = 1 + 'x'",
        "x = int('a')",
        "x = f'{1:>9999999999}'",
        "x = dict(1, 2)",
        "x = {[1]: 2}",
        "a, b = 1",
        "del fine",
        "fine.append(1)",
        "x = unknown",
        "x = dict.fromkeys([1])",
    ],
)
def test_code_is_refused_with_its_line_and_not_run(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "config.py", f"fine = 1\n{line}\n")
    with pytest.raises(ValueError, match=r"config\.py, line 2"):
        read_config(path)
    assert not (tmp_path / "marker").exists()


def test_a_key_in_two_bases_and_a_dict_over_a_number_are_errors(tmp_path):
    write(tmp_path, "a.py", "x = 1\n")
    write(tmp_path, "b.py", "x = 2\n")
    with pytest.raises(ValueError, match="more than one of its bases"):
        read_config(write(tmp_path, "twice.py", "_base_ = ['a.py', 'b.py']\n"))
    with pytest.raises(ValueError, match="x is a dict here and int in a base"):
        read_config(write(tmp_path, "dict.py", "_base_ = 'a.py'\nx = dict(y=1)\n"))
    with pytest.raises(FileNotFoundError, match=r"missing\.py"):
        read_config(write(tmp_path, "lost.py", "_base_ = 'missing.py'\n"))


def test_what_a_config_may_say(tmp_path, monkeypatch):
    monkeypatch.setenv("A_ROOT", "there")
    path = write(
        tmp_path,
        "config.py",
        "root = '{{$A_ROOT:here}}'\nother = '{{$NOT_SET_ANYWHERE:here}}'\n"
        "ann = f'{root}/train_{2017}.json'\na, (b, c) = 1, (2, 3)\nx: int = 4\nx += 1\n"
        "rows = list(range(3)) + [len([1, 2])]\npart = rows[1:3]\nratio = 2 ** (1.0 / 2)\n"
        "base = dict(k=1, deeper=dict(q=1))\nlarger = dict(base, k=2)\ni = 7\neach = [i for i in rows]\nkept = i\n",
    )
    config = read_config(path)
    assert (config["root"], config["other"], config["ann"]) == ("there", "here", "there/train_2017.json")
    assert [config[k] for k in "abcx"] == [1, 2, 3, 5]
    assert (config["rows"], config["part"], config["ratio"]) == ([0, 1, 2, 2], [1, 2], 2**0.5)
    assert config["larger"] == dict(k=2, deeper=dict(q=1)) and config["kept"] == 7


@pytest.mark.parametrize(
    "text",
    [
        "a = 2\n" + "a = a * a\n" * 45,
        "a = [0]\n" + "a = a + a\n" * 45,
        "a = ['x'] * 10\n" + "a = [a] * 10\n" * 8,
        "a = dict()\n" + "a = dict(x=a, y=a)\n" * 45,
        "a = 'x'\n" + "a += a\n" * 45,
    ],
)
def test_a_value_that_grows_without_end_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"config\.py, line \d+: .*too large|config\.py, line \d+: more than"):
        read_config(write(tmp_path, "config.py", text))


def test_a_dict_over_a_list_is_an_error_at_any_depth(tmp_path):
    write(tmp_path, "a.py", "model = dict(neck=[1, 2], depth=3)\n")
    for child, where in (("neck={0: 5}", "model.neck is a dict here and list"), ("depth=dict(a=1)", "model.depth")):
        with pytest.raises(ValueError, match=where):
            read_config(write(tmp_path, "b.py", f"_base_ = 'a.py'\nmodel = dict({child})\n"))
    config = read_config(write(tmp_path, "c.py", "_base_ = 'a.py'\nmodel = dict(depth=4, _delete_=False)\n"))
    assert config["model"] == dict(neck=[1, 2], depth=4)


def test_files_that_are_no_configs_are_named(tmp_path):
    write(tmp_path, "a.py", "_base_ = 'b.py'\n")
    write(tmp_path, "b.py", "_base_ = ['a.py']\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    wrong = {"a.py": "its own base", "bytes.py": "bytes.py", "list.json": "expected an object", "cut.json": "cut.json",
             "x.yaml": r"\.py or \.json", "three.py": "_base_", "broken.py": "line 2", "deep.py": "deep.py"}  # fmt: skip
    write(tmp_path, "list.json", "[1]")
    write(tmp_path, "cut.json", "{")
    write(tmp_path, "x.yaml", "a: 1")
    write(tmp_path, "three.py", "_base_ = 3\n")
    write(tmp_path, "broken.py", "x = 1\ny = (\n")
    write(tmp_path, "deep.py", "x = " + "-" * 5000 + "1\n")
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.json, a base of .*child\.json"):
        read_config(write(tmp_path, "child.json", json.dumps(dict(_base_="gone.json"))))
    write(tmp_path, "base.json", json.dumps(dict(x=dict(a=1))))
    child = write(tmp_path, "child.json", json.dumps(dict(_base_="base.json", x=dict(b=2))))
    assert read_config(child) == dict(x=dict(a=1, b=2))
