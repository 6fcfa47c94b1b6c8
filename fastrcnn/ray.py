"""A detector in every worker of a Ray cluster: the class that `map_batches` takes, and the engine of
`fastrcnn detect --engine ray`, which needs the extra `ray`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic

import fsspec
import numpy as np

from fastrcnn.data.decode import max_bytes
from fastrcnn.data.fetch import is_address, read_bytes
from fastrcnn.data.images import IMAGE_SUFFIXES, list_images
from fastrcnn.inference import Detections
from fastrcnn.inference import Detector as PlainDetector
from fastrcnn.inference.memory import keep_memory

SETTINGS = "run.json"
FETCHERS = 8  # threads that read a part's files, which may be far away
MOST_FILES = 64  # of a part


class Detector:
    """A detector for `ray.data.Dataset.map_batches`, loaded once a worker:

        pictures = ray.data.read_images("s3://bucket/photos", include_paths=True)
        found = pictures.map_batches(fastrcnn.ray.Detector, fn_constructor_args=["mine.safetensors"], batch_size=16,
                                     num_gpus=1, concurrency=4)

    The arguments are those of `fastrcnn.Detector`. A batch is a dict of columns, with the pictures in `image` (arrays
    [H, W, 3] RGB or [H, W], as `read_images` gives them) or `bytes` (files, as `read_binary_files` does). Its other columns
    come back, and a row a picture of `boxes` (lists of x1, y1, x2, y2 in pixels), `scores`, `labels` from 0, `names`, and
    `error`: None, or why nothing is known about the picture. Raises ValueError for a batch without pictures.
    """

    def __init__(self, model_or_name, weights=None, **options):
        self.detector = PlainDetector(model_or_name, weights, **options)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list | np.ndarray]:
        column = next((name for name in ("image", "bytes") if name in batch), None)
        if column is None:
            raise ValueError(f"batch: expected a column image or bytes, got {', '.join(batch)}")
        pictures = list(batch[column])
        found: list[Detections | Exception] = [ValueError("not looked at")] * len(pictures)
        for index, _, objects in self.detector.stream(pictures):
            found[index] = objects
        rows = [_row(objects, f"images[{index}]: ") for index, objects in enumerate(found)]
        kept = {name: values for name, values in batch.items() if name != column}
        return kept | {name: [row[name] for row in rows] for name in ("boxes", "scores", "labels", "names", "error")}


def _row(found: Detections | Exception, place: str) -> dict:
    if isinstance(found, Exception):
        return dict(boxes=[], scores=[], labels=[], names=[], error=str(found).removeprefix(place))
    return dict(boxes=found.boxes.tolist(), scores=found.scores.tolist(), labels=found.labels.tolist(), names=found.names,
                error=None)  # fmt: skip


def find_pictures(sources: Sequence[str]) -> list[str]:
    """Files, folders, patterns and http(s) addresses as `list_images` has them; of other addresses that fsspec knows
    (s3://, gs://, memory://...) the pictures of a folder and all below it, or of a pattern; each once."""
    found: dict[str, None] = {}
    for source in sources:
        if "://" not in source or is_address(source):
            found |= dict.fromkeys(path if is_address(path) else os.path.abspath(path) for path in list_images(source))
            continue
        files, path = fsspec.url_to_fs(source)
        below = sorted(files.glob(path) if has_magic(path) else files.find(path))
        names = [files.unstrip_protocol(name) for name in below if name.lower().endswith(IMAGE_SUFFIXES)]
        found |= dict.fromkeys(names or [source])  # what is not there is said by reading it
    return list(found)


def _content(path: str) -> bytes | Exception:
    """The bytes of a picture, or why they cannot be read."""
    try:
        if "://" not in path or is_address(path):
            return read_bytes(path, max_bytes())
        with fsspec.open(path, "rb") as file:
            data = file.read(int(min(max_bytes(), 1 << 40)) + 1)
        return data if len(data) <= max_bytes() else ValueError(f"it has more than {int(max_bytes()):,} bytes")
    except Exception as error:  # each file system has its own ways to fail
        return error


class _Worker:
    """Detects in a part's pictures and writes them as one Parquet file, whole or not at all."""

    def __init__(self, out: str, classes: Sequence[str] | None, arguments: dict):
        keep_memory()
        self.files, self.folder = fsspec.url_to_fs(out)
        self.classes, self.detector = classes, Detector(**arguments)

    def __call__(self, part: dict) -> dict:
        import pyarrow
        from pyarrow import parquet

        path, columns = f"{self.folder}/{part['name']}", None
        if self.files.exists(path):  # by a worker that died before it could say so
            with self.files.open(path, "rb") as file:
                columns = parquet.read_table(file).to_pydict()
        else:
            columns = self._detect(list(part["paths"]))
            kinds = [pyarrow.string(), pyarrow.list_(pyarrow.list_(pyarrow.float32())), pyarrow.list_(pyarrow.float32()),
                     pyarrow.list_(pyarrow.int64()), pyarrow.list_(pyarrow.string()), pyarrow.string()]  # fmt: skip
            table = pyarrow.table(columns, schema=pyarrow.schema(list(zip(columns, kinds))))
            with self.files.open(f"{path}.{os.getpid()}", "wb") as file:
                parquet.write_table(table, file)
            self.files.mv(f"{path}.{os.getpid()}", path)
        failed = [f"{name}: {error}" for name, error in zip(columns["path"], columns["error"]) if error]
        objects = Counter(name for names in columns["names"] for name in names)
        said = dict(pictures=len(columns["path"]), failed=failed, objects=objects, worker=os.getpid())
        return dict(said=json.dumps(said))  # text alone: Ray makes columns of what differs in kind from part to part

    def _detect(self, paths: list[str]) -> dict[str, list]:
        with ThreadPoolExecutor(FETCHERS) as pool:
            contents = list(pool.map(_content, paths))
        found = self.detector(dict(path=paths, bytes=[b"" if isinstance(c, Exception) else c for c in contents]))
        for k, content in enumerate(contents):
            if isinstance(content, Exception):
                found["error"][k] = f"cannot be read ({content})"
        if self.classes is not None:
            for k, names in enumerate(found["names"]):
                kept = [i for i, name in enumerate(names) if name in self.classes]
                for column in ("boxes", "scores", "labels", "names"):
                    found[column][k] = [found[column][k][i] for i in kept]
        return found


def detect(
    pictures: Sequence[str],
    out: str,
    model_or_name: str,
    weights: str | None = None,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    resume: bool = False,
    **options,
) -> Iterator[dict]:
    """Detects in `pictures` (`find_pictures`) on a Ray cluster, the one that runs here or RAY_ADDRESS names, else one of
    this machine's cores, and writes Parquet files to the folder `out`, any that fsspec and all workers reach. For each
    file that is written it yields dict(pictures, failed: ["path: why"], objects: {name: number}, worker: its process).

    A row is a picture: path, boxes, scores, labels, names, error, as in `Detector`, of whose arguments `options` are.
    Objects of other classes than `classes` are left out. `workers` (default: one a GPU, or one for four cores) share
    the cores. A file is whole or not there: a worker that is killed loses nothing, its part is done again by another.

    resume: pictures that have a row in `out` are left out; a row with an error counts, delete its file to try again.
    Raises FileExistsError where there are results and it is not set, ValueError where they are of other settings or a
    class is unknown.
    """
    own = lambda path: os.path.abspath(path) if path and os.path.exists(path) else path  # noqa: E731  workers are elsewhere
    arguments = dict(model_or_name=own(model_or_name), weights=own(weights), **options)
    # What is wrong with them is said here, before the workers start; a GPU is theirs.
    names = PlainDetector(**arguments | dict(device="cpu", precision="auto")).class_names
    if unknown := [name for name in classes or () if name not in names]:
        raise ValueError(f"classes: unknown {', '.join(unknown)}; the model knows {', '.join(names)}")
    out = out if "://" in out else os.path.abspath(out)
    todo = _todo(pictures, out, dict(arguments, classes=classes and sorted(classes)), resume)
    if todo:
        yield from _run(todo, out, classes, arguments, workers)


def _todo(pictures: Sequence[str], out: str, settings: dict, resume: bool) -> list[str]:
    from pyarrow import parquet

    files, folder = fsspec.url_to_fs(out)
    done, said, before = set(), json.dumps(settings, indent=1, default=str), None
    if files.exists(f"{folder}/{SETTINGS}"):
        if not resume:
            raise FileExistsError(f"{out}: there are results of an earlier run; resume it, or choose another folder")
        before = json.loads(files.cat_file(f"{folder}/{SETTINGS}"))
        if before != json.loads(said):
            raise ValueError(f"{out}: the earlier run had other settings, {json.dumps(before)}, these are {said}")
        for path in files.glob(f"{folder}/part-*.parquet"):
            with files.open(path, "rb") as file:
                done.update(parquet.read_table(file, columns=["path"])["path"].to_pylist())
    else:
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(f"{folder}/{SETTINGS}", said.encode())
    return [path for path in dict.fromkeys(pictures) if path not in done]


def _run(todo: list[str], out: str, classes, arguments: dict, workers: int | None) -> Iterator[dict]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"the engine ray needs ray ({error}): pip install 'fastrcnn[ray]'") from None

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        workers = min(workers or gpus or max(cores // 4, 1), len(todo))
        share = dict(num_gpus=1) if gpus else dict(num_cpus=max(cores // workers, 1))
        size = min(max(-(-len(todo) // (4 * workers)), 1), MOST_FILES)
        parts = [todo[i : i + size] for i in range(0, len(todo), size)]
        # By its content: whoever does a part again after a kill finds what was written.
        named = [
            dict(name=f"part-{hashlib.sha256(chr(0).join(p).encode()).hexdigest()[:24]}.parquet", paths=p)
            for p in parts
        ]
        found = ray.data.from_items(named, override_num_blocks=len(named)).map(
            _Worker,
            fn_constructor_args=(out, classes, arguments),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **share,
        )
        for row in found.iter_rows():
            yield json.loads(row["said"])
    finally:
        if started:
            ray.shutdown()
