"""Names of classes, as people have them at hand."""

from pathlib import Path

from fastrcnn.data.data_yaml import read_data_yaml
from fastrcnn.data.detect_format import open_dataset
from fastrcnn.data.folders import entries
from fastrcnn.data.yolo import names_of


def read_names(given: str | Path) -> list[str]:
    """By label, from 0: "red,white", a text file with a name a line, a data.yaml, or a COCO file whose categories they are.

    Raises ValueError where it gives no names or one twice, OSError where a file is not there.
    """
    path = Path(given).expanduser()
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        names = names_of(path, read_data_yaml(path))
    elif suffix in (".txt", ".names"):
        names = entries(path)
    elif suffix == ".json":
        names = open_dataset(path).class_names
    else:
        names = [name.strip() for name in str(given).split(",")]
    if not names or "" in names:
        raise ValueError(f"names: expected some with commas between them, or a file of them, got {str(given)!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"names: {twice[0]!r} is there twice in {str(given)!r}")
    return list(names)
