"""data/check.py, data/convert.py's split, and `fastrcnn data`: each fault by file and entry, counted."""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastrcnn.cli import app
from fastrcnn.data import check, open_dataset, read_through, split
from fastrcnn.data.findings import LISTED, Findings


def run(*arguments, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def picture(path, size=(60, 40), seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)


def write(folder, images, annotations, name="train.json", categories=("cat", "dog")):
    content = dict(
        images=[dict(id=n, file_name=file, width=60, height=40) for n, file in enumerate(images, 1)],
        annotations=[dict(dict(id=n, category_id=1, bbox=[5, 5, 20, 20]), **a) for n, a in enumerate(annotations, 1)],
        categories=[dict(id=n, name=category) for n, category in enumerate(categories, 1)],
    )
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def clean(tmp_path):
    """Two splits without a fault."""
    for k, (name, count) in enumerate((("train", 20), ("val", 12))):
        files = [f"{name}{i}.png" for i in range(count)]
        for i, file in enumerate(files):
            picture(tmp_path / "images" / file, seed=100 * k + i)
        boxes = [dict(image_id=i + 1, category_id=1 + k) for i in range(count) for k in range(2)]
        write(tmp_path, files, boxes, f"{name}.json")
    return tmp_path


def test_a_clean_dataset_has_nothing(clean):
    found = check(clean)
    assert list(found) == [] and not found.counts
    assert "0 faults" in run("check", clean, "--strict")


EXIF = Image.Exif()
EXIF[0x0112] = 6


def change(folder, alter, name="train.json"):
    content = json.loads((folder / name).read_text())
    alter(content)
    (folder / name).write_text(json.dumps(content))


FAULTS = {  # kind: (what is done, how many, the entry that is named, whether it is dropped)
    "missing picture": (lambda d: (d / "images/train3.png").unlink(), 1, "images[3]", True),
    "unreadable picture": (lambda d: (d / "images/train3.png").write_bytes(b"no"), 1, "images[3]", True),
    "other size": (lambda d: picture(d / "images/train3.png", (30, 40), 3), 1, "images[3]", True),
    "turned by EXIF": (lambda d: picture(d / "images/train3.png", seed=3, exif=EXIF), 1, "images[3]", True),
    "picture named twice": (lambda d: change(d, lambda c: c["images"][3].update(file_name="train4.png")), 1, "images[4]",
                            False),
    "same picture in two splits": (lambda d: picture(d / "images/val3.png", seed=7), 1, "", False),
    "same picture twice": (lambda d: picture(d / "images/train3.png", seed=7), 1, "", False),
    "outside the picture": (lambda d: change(d, lambda c: c["annotations"][4].update(bbox=[70, 5, 9, 9])), 1,
                            "annotations[4]", True),
    "cut at the edge": (lambda d: change(d, lambda c: c["annotations"][4].update(bbox=[50, 5, 19, 9])), 1,
                        "annotations[4]", False),
    "less than a pixel wide or high": (lambda d: change(d, lambda c: c["annotations"][4].update(bbox=[50, 5, 0, 9])), 1,
                                       "annotations[4]", True),
    "duplicate box": (lambda d: change(d, lambda c: c["annotations"][5].update(category_id=1)), 1, "annotations[5]", False),
    "bad entry": (lambda d: change(d, lambda c: c["annotations"][4].update(bbox="here")), 1, "annotations[4] (id 5)", True),
    "unknown image": (lambda d: change(d, lambda c: c["annotations"][4].update(image_id=99)), 1, "annotations[4] (id 5)",
                      True),
    "unknown category": (lambda d: change(d, lambda c: c["annotations"][4].update(category_id=9)), 1,
                         "annotations[4] (id 5)", True),
    "duplicate id": (lambda d: change(d, lambda c: c["annotations"][4].update(id=9)), 1, "annotations", False),
    "empty picture": (lambda d: change(d, lambda c: c.update(annotations=c["annotations"][2:])), 1, "images[0]", False),
    "class with few objects": (lambda d: change(d, lambda c: [a.update(category_id=1, bbox=[30, 5, 20, 20])
                               for a in c["annotations"][13::2]]), 1, "", False),
    "unused class": (lambda d: change(d, lambda c: c["categories"].append(dict(id=3, name="fox"))), 1, "", False),
}  # fmt: skip
ALLOWED = ("empty picture", "class with few objects", "unused class", "cut at the edge")  # --strict lets them pass


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_found_named_and_counted(clean, kind):
    do, count, entry, dropped = FAULTS[kind]
    do(clean)
    found = check(clean)
    assert found.counts == {kind: count} and found.dropped == ({kind: count} if dropped else {})
    (finding,) = found
    assert finding.kind == kind and finding.entry == entry and finding.dropped == dropped
    named = {"same picture in two splits": "images/val3.png", "same picture twice": "images/train7.png"}
    assert finding.file == str(clean / named.get(kind, "train.json"))
    printed = run("check", clean)
    assert f"      1 {kind}" in printed and str(finding) in printed
    printed = run("check", clean, "--strict", status=0 if kind in ALLOWED else 1)
    assert ("refused: 1 " + kind in printed.replace("\n", " ")) == (kind not in ALLOWED)


def test_a_class_of_one_split_alone_is_named(clean):
    change(clean, lambda c: c["categories"][1].update(name="fox"), "val.json")
    (finding,) = check(clean)
    assert finding.kind == "classes of one split alone" and finding.file == str(clean / "val.json")
    assert finding.message == "fox: classes of val that train does not have"


def test_json_has_everything(clean):
    FAULTS["missing picture"][0](clean)
    found = json.loads(run("check", clean, "--json"))
    assert found["counts"] == {"missing picture": 1} and found["findings"][0]["entry"] == "images[3]"


def test_many_faults_are_counted_and_not_all_kept():
    found = Findings()
    found.drop_all("bad", "a.json", range(3000), lambda k: f"[{k}]", str)
    assert len(found) == LISTED and found.counts == found.dropped == {"bad": 3000}
    with pytest.raises(ValueError, match=r"a\.json: \[0\]: 0"):
        Findings(strict=True).drop_all("bad", "a.json", range(3000), lambda k: f"[{k}]", str)


def test_counts_beyond_the_list_reach_the_check(tmp_path):
    picture(tmp_path / "images" / "a.png")
    write(tmp_path, ["a.png"], [dict(image_id=1)] + [dict(image_id=2)] * 1500)
    assert check(tmp_path).counts["unknown image"] == 1500 == open_dataset(tmp_path).left_out["unknown image"]


def test_pictures_are_handed_to_the_threads_in_pieces(clean, monkeypatch):
    """So that ten million of them are not ten million objects at once; and none is missed."""
    handed, submit = [0], ThreadPoolExecutor.submit
    monkeypatch.setattr(sys.modules[read_through.__module__], "PIECE", 6)
    monkeypatch.setattr(
        ThreadPoolExecutor, "submit", lambda *args: handed.__setitem__(0, handed[0] + 1) or submit(*args)
    )
    data = open_dataset(clean / "train.json")
    target = data.target
    most = []
    monkeypatch.setattr(data, "target", lambda i: most.append(handed[0] - i) or target(i))
    assert read_through(data) == {0: 20, 1: 20} and handed[0] == 20 and max(most) <= 6
    (clean / "images" / "train17.png").unlink()
    assert check(clean).counts == {"missing picture": 1}


def test_what_is_no_dataset_is_one_sentence(tmp_path):
    assert "no annotations found" in run("check", tmp_path, status=1)
    assert "none.json" in run("check", tmp_path / "none.json", status=1)


def test_convert_says_what_it_wrote_and_what_it_dropped(clean, tmp_path):
    FAULTS["bad entry"][0](clean)
    printed = run("convert", clean, "--to", "yolo", "--out", tmp_path / "out")
    assert "32 pictures, 63 boxes" in printed and "1 bad entry, 1 dropped" in printed
    run("convert", clean, "--to", "voc", "--out", tmp_path / "voc")  # pixels counted from 1, the last one inside
    text = (tmp_path / "voc" / "Annotations" / "val0.xml").read_text()
    assert "<xmin>6</xmin><ymin>6</ymin><xmax>25</xmax><ymax>25</ymax>" in text
    assert "expected one of coco, voc, yolo" in run("convert", clean, "--to", "csv", "--out", tmp_path / "o", status=1)


def names_of(folder, which):
    dataset = open_dataset(folder, split=which)
    return {dataset.picture(i).name for i in range(len(dataset))}


@pytest.mark.parametrize("to", [None, "voc", "yolo"])
def test_split_puts_every_picture_in_one_set(tmp_path, to):
    source = tmp_path / "in"
    for i in range(20):
        picture(source / "images" / f"{i}.png", seed=i // 2)  # each picture twice
    write(source, [f"{i}.png" for i in range(20)], [dict(image_id=i + 1, category_id=1 + i % 2) for i in range(20)])
    (source / "train.json").rename(source / "all.json")
    command = ["split", source, "--val", 0.2, "--test", 0.1, "--seed", 3, *(["--to", to] if to else [])]
    assert "14 train, 4 val, 2 test; 20 pictures, 20 boxes" in run(*command, "--out", tmp_path / "out")
    sets = {which: names_of(tmp_path / "out", which) for which in ("train", "val", "test")}
    assert Counter(name for names in sets.values() for name in names) == {f"{i}.png": 1 for i in range(20)}
    for names in sets.values():  # the two of a pair go together
        assert names == {f"{2 * (int(n[:-4]) // 2) + k}.png" for n in names for k in range(2)}
    dataset = open_dataset(tmp_path / "out", split="val")
    for i in range(len(dataset)):
        assert dataset.target(i)["labels"].tolist() == [int(dataset.picture(i).stem) % 2]
    run(*command, "--out", tmp_path / "again")
    assert names_of(tmp_path / "again", "val") == sets["val"]
    assert "refused" not in run("check", tmp_path / "out")
    assert "same picture in two splits" not in check(tmp_path / "out").counts


def test_splits_that_cannot_be_made(clean, tmp_path):
    with pytest.raises(ValueError, match="has splits already: train, val"):
        split(clean, tmp_path / "o")
    for part in (dict(val=1.0), dict(val=0.6, test=0.5), dict(val=-0.1)):
        with pytest.raises(ValueError, match=r"(val|test): expected a part of the pictures"):
            split(clean / "train.json", tmp_path / "o", **part)
    with pytest.raises(ValueError, match="20 pictures leave none for val"):
        split(clean / "train.json", tmp_path / "o", val=0.01)
    assert not (tmp_path / "o").exists()


def test_what_to_do_is_said_of_a_labelling_servers_names_and_of_a_class_without_objects(clean):
    change(clean, lambda c: c["images"][0].update(file_name="/data/upload/1/0a1b-cat.png"))
    change(clean, lambda c: c["categories"].insert(0, dict(id=9, name="cells")))
    found = check(clean)
    (missing,) = [f.message for f in found if f.kind == "missing picture"]
    assert "/data/upload/1/0a1b-cat.png" in missing and "--images" in missing
    unused = [f.message for f in found if f.kind == "unused class" and "'cells'" in f.message]
    assert len(unused) == 1 and "placeholder" in unused[0]
