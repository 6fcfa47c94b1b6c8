"""data/detect_format.py: a file, or a part of a set's folder, in the place of the whole. data/names.py: classes alone."""

import pytest
from test_data_formats import LAYOUTS, coco, content_of, expected, pictures, write

from fastrcnn.data import open_dataset, read_names


def laid_out(folder, layout, **more):
    files, folders = LAYOUTS[layout]
    write(folder, files | more)
    for place, names in folders.items():
        pictures(folder / place, names)
    return folder


@pytest.mark.parametrize("layout, part, names", [
    ("yolo, Roboflow", "train", "ab"), ("yolo, Roboflow", "valid", "c"), ("yolo, Roboflow", "train/images", "ab"),
    ("yolo, ultralytics", "images/train", "ab"), ("yolo, ultralytics", "images/val", "c"),
    ("yolo, no yaml", "train", "ab"), ("yolo, no yaml", "train/images", "ab"),
    ("voc", "Annotations", "abc"), ("voc", "ImageSets/Main/train.txt", "ab"), ("voc", "ImageSets/Main/val.txt", "c"),
    ("voc", "Annotations/a.xml", "a"), ("voc, Roboflow", "valid/c.xml", "c"), ("voc, VOCdevkit", "VOC2007", "ab"),
])  # fmt: skip
def test_a_part_of_a_set_is_read_with_what_lies_around_it(tmp_path, monkeypatch, layout, part, names):
    laid_out(tmp_path, layout)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / part, part):
        dataset = open_dataset(path)
        found = {
            k: [[*box, {"0": "cat", "1": "dog"}.get(n, n)] for *box, n in v] for k, v in content_of(dataset).items()
        }
        assert found == expected(names) and not dataset.left_out
        if "yaml" not in layout and "valid/" not in part:  # what names the classes lies elsewhere, or is not there
            assert dataset.class_names == ["cat", "dog"]


def test_the_data_yaml_of_other_pictures_says_nothing(tmp_path):
    laid_out(tmp_path / "set", "yolo, no yaml")
    (tmp_path / "set/classes.txt").unlink()
    write(tmp_path, {"data.yaml": "train: elsewhere\nnames: [x, y]\n"})
    pictures(tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "set").class_names == ["0", "1"]


def test_an_xml_that_is_not_there_or_none_of_vocs_is_named(tmp_path):
    with pytest.raises(OSError, match=r"gone\.xml"):
        open_dataset(tmp_path / "gone.xml")
    write(tmp_path, {"other.xml": "<a/>"})
    with pytest.raises(ValueError, match=r"other\.xml: the root is 'a', where Pascal VOC's is 'annotation'"):
        open_dataset(tmp_path / "other.xml")


def test_classes_are_named_as_people_have_them(tmp_path, monkeypatch):
    laid_out(tmp_path, "yolo, ultralytics", **{"a.txt": "cat\n\ndog\n", "a.json": coco()})
    monkeypatch.chdir(tmp_path)
    for given in ("cat,dog", " cat , dog", "a.txt", "data.yaml", "a.json"):
        assert read_names(given) == ["cat", "dog"]
    assert read_names("cat") == ["cat"]
    for given, said in [("cat,cat", "'cat' is there twice"), ("cat,,dog", "got 'cat,,dog'"), ("", "got ''")]:
        with pytest.raises(ValueError, match=said):
            read_names(given)
    with pytest.raises(OSError, match=r"gone\.txt"):
        read_names("gone.txt")


def test_the_outer_folders_of_a_path_are_left_out_one_by_one(tmp_path):
    for place in ("one", "two"):
        pictures(tmp_path / "images" / place, "a")
    rows = [dict(id=n, file_name=f"C:\\set\\images\\{place}\\a.png", width=60, height=40)
            for n, place in enumerate(("one", "two"), 1)]  # fmt: skip
    write(tmp_path, {"a.json": coco("a", lambda content: content.update(images=rows))})
    dataset = open_dataset(tmp_path)
    assert [dataset.picture(i) for i in (0, 1)] == [tmp_path / "images" / place / "a.png" for place in ("one", "two")]
