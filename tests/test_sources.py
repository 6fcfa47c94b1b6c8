"""What a user names, as a list of pictures: folders with and without sub-folders, lists, standard input, shards."""

import io

import pytest
from PIL import Image

from fastrcnn.data import find_sources, shard_of
from fastrcnn.data.images import is_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.png", "in/c.jpg", "in/deep/d.jpg", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sub_folders_are_counted_or_taken(folder):
    assert find_sources(["."]) == (["a.png", "b.jpg"], 2)
    assert find_sources(["."], recursive=True) == (["a.png", "b.jpg", "in/c.jpg", "in/deep/d.jpg"], 0)
    assert find_sources(["in", "b.jpg"]) == (["in/c.jpg", "b.jpg"], 1)
    assert find_sources(["**/*.jpg"])[0] == ["b.jpg", "in/c.jpg", "in/deep/d.jpg"]
    assert find_sources(["."], wanted=lambda name: name.endswith(".md") or is_image(name))[0] == [
        "a.png",
        "b.jpg",
        "notes.md",
    ]


def test_the_results_are_no_sources(folder):
    found = ["a.png", "b.jpg"]
    assert find_sources(["."], True, beside="in") == (found, 0) and find_sources(["."], beside="in") == (found, 0)
    assert find_sources(["in"], True, beside="in")[0] == ["in/c.jpg", "in/deep/d.jpg"]  # asked for by name
    assert find_sources([".", "in/c.jpg"], True, beside="in/deep")[0] == [*found, "in/c.jpg", "in/c.jpg"]


def test_a_list_in_a_file_and_on_standard_input(folder, monkeypatch):
    (folder / "list.txt").write_text("b.jpg\n\n  in \nhttps://example.com/a.txt\n")
    wanted = ["b.jpg", "in/c.jpg", "https://example.com/a.txt"]
    assert find_sources(["list.txt", "a.png"]) == ([*wanted, "a.png"], 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("b.jpg\nin\n"))
    assert find_sources(["-"])[0] == wanted[:2]
    with pytest.raises(OSError, match=r"none\.txt"):
        find_sources(["none.txt"])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_are_everything_once(count):
    items = list("abcdefghijk")
    parts = [shard_of(items, f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(item for part, _ in parts for item in part) == items
    assert all(items[n - 1] == item for part, numbers in parts for item, n in zip(part, numbers))
    assert max(len(p) for p, _ in parts) - min(len(p) for p, _ in parts) <= 1


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_named(shard):
    with pytest.raises(ValueError, match=r"shard: expected i/n"):
        shard_of([1, 2], shard)
