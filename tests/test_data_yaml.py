"""data/data_yaml.py: what a data.yaml says, and what is refused."""

import pytest

from fastrcnn.data.data_yaml import read_data_yaml


@pytest.mark.parametrize("text, found", [
    ("names: [a, 'b, c', \"d: e\"]  # f", dict(names=["a", "b, c", "d: e"])),
    ("names:\n- a\n- 'b'\n", dict(names=["a", "b"])), ("names: [\n  a,\n  b,\n]\n", dict(names=["a", "b"])),
    ("names:\n  0: person  # of any age\n  1: traffic light\n", dict(names={"0": "person", "1": "traffic light"})),
    ("path: C:\\data\ntrain: \"C:\\data\\x\"", dict(path="C:\\data", train="C:\\data\\x")),
    ("download: |\n  import os\n\n  a[0]: *x\nnc: 80", dict(download="", nc="80")),
    ("download: https://a.b/c#d\nnc: 80", dict(download="https://a.b/c#d", nc="80")),
])  # fmt: skip
def test_what_a_data_yaml_says(tmp_path, text, found):
    (tmp_path / "data.yaml").write_text(text)
    assert read_data_yaml(tmp_path / "data.yaml") == found


WRONG = ["names: [a", "names: *b", "a: !!python/object:os.system x", "- a", "names: [[a]]", "a b c"]


@pytest.mark.parametrize("text", WRONG)
def test_what_a_data_yaml_does_not_say(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml: line \d"):
        read_data_yaml(tmp_path / "data.yaml")
