"""data/detect_format.py and the readers: COCO as the tools export it, Pascal VOC, YOLO, in the folders they are laid
out in."""

import json
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn.data import convert, open_dataset
from fastrcnn.data.coco import read_coco

BOXES = {"a": [[10, 5, 20, 15, "cat"], [0, 0, 60, 40, "dog"]], "b": [[30, 20, 10, 10, "dog"]], "c": []}  # x, y, w, h


def pictures(folder, names=("a", "b", "c"), suffix=".png", size=(60, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{name}{suffix}")


def coco(names="abc", change=lambda content: None, suffix=".png"):
    content = dict(images=[], annotations=[], categories=[dict(id=1, name="cat"), dict(id=2, name="dog")])
    for n, name in enumerate(names, 1):
        content["images"].append(dict(id=n, file_name=f"{name}{suffix}", width=60, height=40))
        for *box, kind in BOXES[name]:
            content["annotations"].append(dict(id=len(content["annotations"]) + 1, image_id=n, bbox=box,
                                               category_id=1 + (kind == "dog")))  # fmt: skip
    change(content)
    return json.dumps(content)


def voc(name, first=1, suffix=".png"):
    """first: where pixels are counted from, 0: the corners themselves."""
    rows = "".join(
        f"<object><name>{kind}</name><part><name>tail</name><bndbox><xmin>1</xmin></bndbox></part><bndbox>"
        f"<xmin>{x + first}</xmin><ymin>{y + first}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>\n"
        for x, y, w, h, kind in BOXES[name]
    )
    size = "<size><width>60</width><height>40</height></size>"
    return f"<annotation><filename>{name}{suffix}</filename>\n{size}\n{rows}</annotation>"


def yolo(name):
    rows = [((kind == "dog"), (x + w / 2) / 60, (y + h / 2) / 40, w / 60, h / 40) for x, y, w, h, kind in BOXES[name]]
    return "".join(" ".join(f"{v:.8f}" if i else str(int(v)) for i, v in enumerate(row)) + "\n" for row in rows)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def content_of(dataset):
    """What a dataset holds, by the stems of its pictures."""
    found = {}
    for i in range(len(dataset)):
        image, target = dataset[i]
        assert image.shape == (3, *dataset.sizes[i])
        names = [dataset.class_names[label] for label in target["labels"].tolist()]
        stem = dataset.picture(i).stem
        assert stem not in found
        found[stem] = [[*box, name] for box, name in zip(target["boxes"].round().tolist(), names)]
    return found


def expected(names="abc"):
    return {name: [[x, y, x + w, y + h, kind] for x, y, w, h, kind in BOXES[name]] for name in names}


YAML = "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['cat', \"dog\"]\n\nroboflow:\n  license: MIT\n"
LAYOUTS = {  # name: (files, folders of pictures)
    "coco, plain": ({"train.json": coco("ab"), "val.json": coco("c")}, {"images": "abc"}),
    "coco, as COCO's": (
        {"annotations/instances_train2017.json": coco("ab"), "annotations/captions_train2017.json": '{"images": []}',
         "annotations/instances_val2017.json": coco("c")}, {"train2017": "ab", "val2017": "c"}),
    "coco, Roboflow": ({"train/_annotations.coco.json": coco("ab"), "valid/_annotations.coco.json": coco("c")},
                       {"train": "ab", "valid": "c"}),
    "coco, CVAT": ({"annotations/instances_train.json": coco("ab"), "annotations/instances_val.json": coco("c")},
                   {"images/train": "ab", "images/val": "c"}),
    "voc": ({f"Annotations/{n}.xml": voc(n) for n in "abc"} | {"ImageSets/Main/train.txt": "a\nb 1\n",
            "ImageSets/Main/val.txt": "c\n", "ImageSets/Main/cat_train.txt": "a -1\n"}, {"JPEGImages": "abc"}),
    "voc, VOCdevkit": ({f"VOC2007/Annotations/{n}.xml": voc(n) for n in "abc"} | {"VOC2007/ImageSets/Main/trainval.txt":
                       "a\nb\n", "VOC2007/ImageSets/Main/test.txt": "c\n"}, {"VOC2007/JPEGImages": "abc"}),
    "voc, Roboflow": ({f"{'valid' if n == 'c' else 'train'}/{n}.xml": voc(n, 0) for n in "abc"},
                      {"train": "ab", "valid": "c"}),
    "yolo, Roboflow": ({"train/labels/a.txt": yolo("a"), "train/labels/b.txt": yolo("b"), "data.yaml": YAML},
                       {"train/images": "ab", "valid/images": "c"}),
    "yolo, ultralytics": (
        {"labels/train/a.txt": yolo("a"), "labels/train/b.txt": yolo("b"), "labels/val/c.txt": "",
         "data.yaml": "path: .  # here\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"},
        {"images/train": "ab", "images/val": "c"}),
    "yolo, lists": ({"labels/a.txt": yolo("a"), "labels/b.txt": yolo("b"), "train.txt": "./images/a.png\n./images/b.png\n",
                     "val.txt": "./images/c.png\n",
                     "data.yaml": "train: train.txt\nval: val.txt\nnames: {0: cat, 1: dog}\n"}, {"images": "abc"}),
    "yolo, no yaml": ({"train/labels/a.txt": yolo("a"), "train/labels/b.txt": yolo("b"), "val/labels/c.txt": "",
                       "classes.txt": "cat\ndog\n"}, {"train/images": "ab", "val/images": "c"}),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    files, folders = LAYOUTS[request.param]
    write(tmp_path, files)
    for folder, names in folders.items():
        pictures(tmp_path / folder, names)
    return tmp_path


def test_every_layout_gives_the_same_datasets(layout):
    train, val = open_dataset(layout), open_dataset(layout, split="val")
    assert content_of(train) == expected("ab") and content_of(val) == expected("c")
    assert train.class_names == val.class_names == ["cat", "dog"] and train.category_ids == [1, 2]
    assert train.objects.tolist() == [2, 1] and val.objects.tolist() == [0] and not train.left_out
    assert train.truth([0]).boxes == pytest.approx(np.array([box[:4] for box in BOXES["a"]]), abs=1e-5)
    if (layout / "VOC2007").exists():  # which has no other val
        assert content_of(open_dataset(layout, split="test")) == expected("c")
    else:
        with pytest.raises(ValueError, match="no test split: there are train, val"):
            open_dataset(layout, split="test")


@pytest.mark.parametrize("files, folder", [
    ({"a.xml": voc("a"), "b.xml": voc("b"), "c.xml": voc("c")}, "."),
    ({"a.txt": yolo("a"), "b.txt": yolo("b"), "c.txt": "\n", "classes.txt": "cat\ndog"}, "."),
    ({"obj_train_data/a.txt": yolo("a"), "obj_train_data/b.txt": yolo("b"), "obj_train_data/c.txt": "",
      "obj.names": "cat\ndog\n", "obj.data": "classes = 2\n"}, "obj_train_data"),
    ({"labels/a.txt": yolo("a"), "labels/b.txt": yolo("b"), "labels/c.txt": "", "classes.txt": "cat\ndog\n",
      "notes.json": '{"categories": [], "info": {}}'}, "images"),
    ({"result.json": coco()}, "images"),
])  # fmt: skip
def test_folders_without_splits(tmp_path, files, folder):
    """XML or text beside the pictures, CVAT's YOLO, Label Studio's YOLO and COCO."""
    write(tmp_path, files)
    pictures(tmp_path / folder)
    assert content_of(open_dataset(tmp_path)) == expected()
    with pytest.raises(ValueError, match="no val split"):
        open_dataset(tmp_path, split="val")


def test_a_file_may_be_given_and_what_is_none_is_named(tmp_path):
    files, folders = LAYOUTS["yolo, Roboflow"]
    write(tmp_path, files)
    for folder, names in folders.items():
        pictures(tmp_path / folder, names)
    assert content_of(open_dataset(tmp_path / "data.yaml", split="train")) == expected("ab")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no annotations found: expected a COCO file"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(ValueError, match="split: expected one of train, val, test or None, got 'dev'"):
        open_dataset(tmp_path, split="dev")
    write(tmp_path / "two", {"a.json": coco(), "b.json": coco()})
    with pytest.raises(ValueError, match=r"several annotation files, name one: .*a\.json"):
        open_dataset(tmp_path / "two")


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
def test_conversions_keep_everything(layout, tmp_path_factory, to):
    out = tmp_path_factory.mktemp("out") / "there"
    done, _ = convert(layout, to, out)
    assert done["pictures"] == 3 and done["boxes"] == 3
    assert content_of(open_dataset(out)) == expected("ab")
    val = open_dataset(out, split="val")
    assert content_of(val) == expected("c") and val.class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="out: expected a folder that is empty"):
        convert(layout, to, out)


def test_boxes_that_are_not_whole_and_difficult_ones_survive_vocs_file(tmp_path):
    def change(content):
        content["annotations"][0].update(bbox=[1.25, 2, 10.5, 10], ignore=1, area=3)

    write(tmp_path / "in", {"a.json": coco(change=change)})
    pictures(tmp_path / "in" / "images")
    convert(tmp_path / "in", "voc", tmp_path / "out")
    target = open_dataset(tmp_path / "out").target(0)
    assert target["ignore_boxes"].tolist() == [[1.25, 2, 11.75, 12]] and target["boxes"].tolist() == [[0, 0, 60, 40]]


def test_the_convention_of_voc(tmp_path):
    """Corners counted from 0 where a coordinate is 0 or not whole, else VOC's pixels counted from 1, and it is said."""
    pictures(tmp_path / "images")
    sets = {"9 9 20 20": [8, 8, 20, 20], "0 9 20 20": [0, 9, 20, 20], "9.5 9 20 20": [9.5, 9, 20, 20],
            "9.0 9 20 20": [8, 8, 20, 20]}  # fmt: skip
    for k, (change, box) in enumerate(sets.items()):
        text = voc("b")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), change.split()):
            head, _, rest = text.rpartition(f"<{side}>")
            text = f"{head}<{side}>{value}</{side}>" + rest.partition(f"</{side}>")[2]
        write(tmp_path / f"set{k}", {"b.xml": text})
        dataset = open_dataset(tmp_path / f"set{k}", images=tmp_path / "images")
        assert dataset.target(0)["boxes"].tolist() == [box], change
        (said,) = [f.message for f in dataset.findings if f.kind == "convention"]
        assert ("counted from 1" in said) == (box[0] == 8)


# What labelling tools write into COCO's format.


def strings(content):  # VIA: ids as texts here and there, no iscrowd, no area
    for image in content["images"]:
        image["id"] = str(image["id"])
    for a in content["annotations"]:
        a["category_id"] = float(a["category_id"])


def texts(content):  # ids that are names
    for image in content["images"]:
        image["id"] = f"img-{image['id']}"
    for a in content["annotations"]:
        a["image_id"] = f"img-{a['image_id']}"


def placeholder(content):  # Roboflow
    for row in content["categories"]:
        row["supercategory"] = "pets"
    content["categories"].insert(0, dict(id=0, name="pets", supercategory="none"))


def written_by_hand(content):  # the placeholder alone has a super category
    content["categories"].insert(0, dict(id=0, name="pets", supercategory="none"))


def same_name(content):  # Roboflow, a project called as its class
    placeholder(content)
    content["categories"][0]["name"] = "cat"
    for row in content["categories"][1:]:
        row["supercategory"] = "cat"


def background(content):  # LabelMe's script
    content["categories"].insert(0, dict(id=0, name="_background_", supercategory=None))


def polygons(content):  # no bbox
    for a in content["annotations"]:
        x, y, w, h = a.pop("bbox")
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    a["segmentation"] = a["segmentation"][0]  # VIA's flat list


def names(alter):
    def change(content):
        for image in content["images"]:
            image["file_name"] = alter(image["file_name"])

    return change


def no_sizes(content):
    for k, image in enumerate(content["images"]):
        image.update(width=0, height=0) if k else image.pop("width")


@pytest.mark.parametrize("change", [
    strings, texts, placeholder, written_by_hand, same_name, background, polygons, no_sizes,
    lambda c: c.update(info=None, licenses=[]),
    lambda c: [a.update(iscrowd=None, area=None, attributes={"occluded": False}) for a in c["annotations"]],
    names(lambda n: f"..\\..\\media\\{n}"), names(lambda n: f"some/folder/{n}"), names(lambda n: "/data/images/" + n),
    names(lambda n: f"C:\\data\\images\\{n}"), names(lambda n: quote(f"my photos/{n}")), names(lambda n: n[:-3] + "PNG"),
    names(lambda n: f"/data/local-files/?d=upload/1/{n}"),
])  # fmt: skip
def test_what_the_tools_export_is_read(tmp_path, change):
    write(tmp_path, {"a.json": "\ufeff" + coco(change=change)})
    pictures(tmp_path / "images")
    dataset = open_dataset(tmp_path)
    assert content_of(dataset) == expected() and dataset.category_ids == [1, 2] and not dataset.left_out


def test_unused_categories_stay_and_a_used_zero_too(tmp_path):
    def change(content):
        content["categories"] += [dict(id=9, name="bird", supercategory="animal"), dict(id=0, name="background")]
        content["annotations"][0]["category_id"] = 0

    write(tmp_path, {"a.json": coco(change=change)})
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ["background", "cat", "dog", "bird"] and dataset.category_ids == [0, 1, 2, 9]


def test_what_is_wrong_is_dropped_counted_and_named_or_refused(tmp_path):
    def change(content):
        content["annotations"] += [dict(id=7, image_id=1, category_id=1, bbox=[1, 2, None, 4]),
                                   dict(id=8, image_id=55, category_id=1, bbox=[1, 2, 3, 4]),
                                   dict(id=9, image_id=2, category_id=77, bbox=[1, 2, 3, 4]), "x"]  # fmt: skip
        content["images"] += [dict(id=3, file_name="c.png", width=60, height=40), dict(id=4)]

    write(tmp_path, {"a.json": coco(change=change)})
    pictures(tmp_path / "images")
    dataset = open_dataset(tmp_path)
    assert content_of(dataset) == expected()
    assert dataset.left_out == {"bad entry": 3, "unknown image": 1, "unknown category": 1, "duplicate id": 1}
    said = [str(f).removeprefix(str(tmp_path)) for f in dataset.findings]
    assert "/a.json: annotations[4] (id 8): image_id: no image has the id 55" in said
    assert "/a.json: annotations[3] (id 7): bbox: expected four finite numbers" in " ".join(said)
    with pytest.raises(ValueError, match=r"a\.json: "):
        open_dataset(tmp_path, strict=True)


def test_two_pictures_of_one_id_are_both_dropped(tmp_path):
    write(tmp_path, {"a.json": coco(change=lambda c: c["images"][2].update(id=1))})
    pictures(tmp_path / "images")
    dataset = open_dataset(tmp_path)
    assert content_of(dataset) == expected("b") and dataset.left_out["duplicate id"] == 3  # the image and two boxes


@pytest.mark.parametrize("first", [0, 2**31 - 200])
def test_columns_of_large_files_are_those_of_small_ones(tmp_path, monkeypatch, first):
    """Rows read many at once, one by one, from windows of any size, in any order of the parts: the same table."""
    rng = np.random.default_rng(0)
    images = [dict(id=first + int(i), file_name=f"{i}ä.png", width=60, height=40) for i in rng.permutation(400)]
    boxes = (rng.random((900, 4)) * 30).round(2).tolist()
    annotations = [dict(id=n, image_id=first + int(rng.integers(400)), category_id=1, bbox=box, caption='"}, {"',
                        segmentation=[{"deep": [{}, {}]}]) for n, box in enumerate(boxes)]  # fmt: skip
    content = dict(annotations=annotations, other=[1, {"a": "x" * 999}], **{f"n{k}": 10**15 + k for k in range(200)})
    content |= dict(categories=[dict(id=1, name="cat")], images=images)
    (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-16")
    tables = []
    for window, stretch in ((1 << 22, 1 << 20), (1 << 22, 5000), (1000, 3000), (777, 1)):
        monkeypatch.setattr("fastrcnn.data.json_rows.WINDOW", window)
        monkeypatch.setattr("fastrcnn.data.json_rows.STRETCH", stretch)
        tables.append(read_coco(tmp_path / "a.json"))
    by_image = {i["id"]: [a for a in annotations if a["image_id"] == i["id"]] for i in images}
    for table in tables:
        assert table.image_ids.tolist() == [i["id"] for i in images] and [*table.names] == [
            i["file_name"] for i in images
        ]
        rows = [a for i in images for a in by_image[i["id"]]]
        assert table.boxes.tolist() == [a["bbox"] for a in rows] and table.lines.tolist() == [a["id"] for a in rows]
        assert np.diff(table.starts).tolist() == [len(by_image[i["id"]]) for i in images]


@pytest.mark.parametrize("text, line", [
    ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>", "a document type"),
    ("<!DOCTYPE annotation SYSTEM 'http://localhost/a.dtd'><annotation/>", "a document type"),
    ("<annotation>" * 40 + "</annotation>" * 40, "more than 32 deep"),
    ("<annotation><object>", "no XML: .*line 1"), ("<svg/>", "the root is 'svg'"), ("", "no XML"),
    ('<?xml version="1.0" encoding="utf-99"?><annotation/>', "no XML"),
    (voc("a").replace("<name>cat</name>", ""), "line 3: name is missing"),
    (voc("a").replace("<xmax>30", "<xmax>nan"), "line 3: bndbox: expected four finite"),
    (voc("a").replace("<xmax>30", "<xmax>3"), "line 3: bndbox: .*negative size"),
])  # fmt: skip
def test_what_is_no_annotation_of_vocs_is_named_by_file_and_line(tmp_path, text, line):
    write(tmp_path, {"a.xml": text, "b.xml": voc("b")})
    pictures(tmp_path)
    dataset = open_dataset(tmp_path)
    (found,) = [f for f in dataset.findings if f.kind == "bad entry"]
    assert found.file == str(tmp_path / "a.xml") and dataset.left_out["bad entry"] == 1
    with pytest.raises(ValueError, match=rf"a\.xml: .*{line}"):
        open_dataset(tmp_path, strict=True)


@pytest.mark.parametrize("line, said", [
    ("0 0.5 0.5 0.2", "four numbers"), ("0 0.5 0.5 0.2 nan", "from 0 to 1"), ("0 30 20 10 10", "from 0 to 1"),
    ("cat 0.5 0.5 0.2 0.2", "expected numbers"), ("2 0.5 0.5 0.2 0.2", "class 2 is none of the 2"),
    ("0.5 0.5 0.5 0.2 0.2", "class number"), ("-1 0.5 0.5 0.2 0.2", "class number"), ("0 0.5 0.5 0.2 0.2 0.9", "polygon"),
])  # fmt: skip
def test_what_is_no_line_of_yolos_is_named_by_file_and_line(tmp_path, line, said):
    write(tmp_path, {"labels/a.txt": yolo("a") + line, "labels/gone.txt": "", "classes.txt": "cat\ndog"})
    pictures(tmp_path / "images")
    dataset = open_dataset(tmp_path)
    assert content_of(dataset) == expected("a") | {"b": [], "c": []}
    bad, gone = [f for f in dataset.findings if f.dropped]
    assert bad.entry == "line 3" and bad.file.endswith("labels/a.txt") and said in bad.message
    assert gone.kind == "missing picture" and gone.file.endswith("labels/gone.txt")


def test_decoded_pictures_beside_the_pictures_are_no_pictures(tmp_path):
    write(tmp_path, {"a.txt": yolo("a"), "b.txt": yolo("b"), "a.npy": "an array", "classes.txt": "cat\ndog"})
    pictures(tmp_path, "ab")
    assert content_of(open_dataset(tmp_path)) == expected("ab")


def test_polygons_of_yolo_give_their_box(tmp_path):
    write(tmp_path, {"a.txt": "0 0.5 0.25 0.75 0.5 0.5 0.75\n"})
    pictures(tmp_path, "a")
    dataset = open_dataset(tmp_path)
    assert dataset.target(0)["boxes"].tolist() == [[30, 10, 45, 30]] and dataset.class_names == ["0"]


def test_labels_survive_as_int64_and_boxes_as_float32(tmp_path):
    write(tmp_path, {"a.json": coco()})
    target = open_dataset(tmp_path).target(0)
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64 and target["image_id"] == 1
