"""Which of a file's categories a model's label is: by name, never by place where there are names."""

import warnings
from collections.abc import Sequence


def match_classes(names: Sequence[str], categories: Sequence[str], told: bool = True) -> list[int | None]:
    """For each label the place of its name in `categories`, None where the file has no such category: what a model
    finds beside them does not count.

    names: a model's by label ("N/A" for one that is unused, as in torchvision's numbering of COCO); told: whether the
    model said them. Where it did not (they are guesses or numbers), labels are taken by place, with a warning, if there
    are as many as categories. Raises ValueError for categories that the model does not know.
    """
    unknown = [c for c in categories if c not in names]
    if unknown and not told and len(names) == len(categories):
        warnings.warn("the model names no classes: its labels are taken in the order of the category ids", stacklevel=2)
        return list(range(len(names)))
    if unknown:
        raise ValueError(
            f"the categories {_some(unknown)} are none of the model's {len(names)} classes: {_some(names)}"
        )
    place = {name: i for i, name in enumerate(categories)}
    return [place.get(name) for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
