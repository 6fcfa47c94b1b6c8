"""Reads a dataset through before a run begins, so that what is wrong is named before and not in its middle."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor


def read_through(dataset) -> Counter:
    """Reads every (image, target) of a dataset once, in threads, and counts the objects by label, so that nothing ends a
    long run that could be seen before it. Raises ValueError naming the first items that cannot be read, and their number.
    """

    def read(index: int) -> list[int] | Exception:
        try:
            target = dataset[index][1]
            return target["labels"].tolist() if "labels" in target else [0] * len(target["boxes"])
        except (ValueError, TypeError, OSError) as error:
            return error

    counts, errors = Counter(), []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(read, range(len(dataset))):
            errors.append(found) if isinstance(found, Exception) else counts.update(found)
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ValueError("; ".join(map(str, errors[:3])) + f"{more} ({len(errors)} of {len(dataset)} pictures)")
    return counts
