"""MMDetection's configuration files, read without MMDetection and without running them.

A config is Python source, but only its data is taken: assignments of literals, dict(...), list and tuple, arithmetic,
names assigned before, `_base_` inheritance with `_delete_`, and references to the bases (`_base_.x` and `{{_base_.x}}`).
Everything else (imports, loops, conditions, calls) is refused with the line it stands on.
"""

import ast
import inspect
import json
import operator
import re
from pathlib import Path

from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN
from fastrcnn.models.zoo import merge

DETECTORS = {"FasterRCNN": FasterRCNN, "RetinaNet": RetinaNet, "RPN": RPN}
_CALLS = {"dict": dict, "list": list, "tuple": tuple}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


class _Reader:
    """Evaluates the data expressions of one file."""

    def __init__(self, path: Path):
        self.path, self.names = path, {}

    def refuse(self, node: ast.AST, what: str):
        where = f"{self.path}, line {getattr(node, 'lineno', '?')}"
        raise ValueError(
            f"{where}: {what}. A config is read, not run: only data, `_base_` and names assigned before it"
        )

    def value(self, node: ast.expr):
        match node:
            case ast.Constant():
                return self.filled(node.value) if isinstance(node.value, str) else node.value
            case ast.List():
                return self.items(node.elts)
            case ast.Tuple():
                return tuple(self.items(node.elts))
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self.value(inner)
            case ast.Dict():
                pairs = zip(node.keys, node.values)
                return self.joined((None if k is None else self.value(k), self.value(v)) for k, v in pairs)
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return self.joined((k.arg, self.value(k.value)) for k in node.keywords)
            case ast.Call(func=ast.Name(id=name), args=[only], keywords=[]) if name in _CALLS:
                return _CALLS[name](self.value(only))
            case ast.BinOp() if type(node.op) in _OPERATORS and not isinstance(node.op, ast.Pow):
                return _OPERATORS[type(node.op)](self.value(node.left), self.value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](self.value(node.operand))
            case ast.Name():
                if node.id not in self.names:
                    self.refuse(node, f"{node.id} is not assigned before")
                return self.names[node.id]
            case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], iter=source)]):
                out = []
                for item in self.value(source):
                    self.names[name] = item
                    out.append(self.value(node.elt))
                self.names.pop(name, None)
                return out
            case ast.Attribute() | ast.Subscript():
                return self.member(node)
        self.refuse(node, f"`{ast.unparse(node)[:60]}` is not data")

    def items(self, elements: list[ast.expr]) -> list:
        out = []
        for e in elements:
            out += list(self.value(e.value)) if isinstance(e, ast.Starred) else [self.value(e)]
        return out

    @staticmethod
    def joined(pairs) -> dict:
        """A dict from pairs, where the key None unpacks (`**x`)."""
        out = {}
        for key, value in pairs:
            out.update(value if key is None else {key: value})
        return out

    def member(self, node):
        owner = self.value(node.value)
        key = node.attr if isinstance(node, ast.Attribute) else self.value(node.slice)
        if isinstance(node, ast.Attribute) and not isinstance(owner, dict):
            self.refuse(node, f"`{ast.unparse(node)[:60]}` is not a member of a dict")
        try:
            return owner[key]
        except (KeyError, IndexError, TypeError):
            self.refuse(node, f"`{ast.unparse(node)[:60]}` does not exist")

    def assign(self, target: ast.expr, value) -> None:
        """`_base_.a.b = value`, `a["b"] = value`."""
        if not isinstance(target, ast.Attribute | ast.Subscript):
            self.refuse(target, f"`{ast.unparse(target)[:60]}` cannot be assigned to")
        owner = self.value(target.value)
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice)
        try:
            owner[key] = value
        except (IndexError, TypeError):
            self.refuse(target, f"`{ast.unparse(target)[:60]}` does not exist")

    def filled(self, text: str):
        """MMEngine's file templates, and `{{ _base_.x }}` inside a string."""
        base = re.fullmatch(r"\{\{\s*(_base_[\w.]*)\s*\}\}", text)
        if base:
            return self.value(ast.parse(base[1], mode="eval").body)
        names = dict(fileDirname=str(self.path.parent), fileBasename=self.path.name,
                     fileBasenameNoExtension=self.path.stem, fileExtname=self.path.suffix)  # fmt: skip
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: names.get(m[1], m[0]), text)


def _laid_over(base: dict, child: dict, path: Path) -> dict:
    for key, value in child.items():
        other = base.get(key)
        if isinstance(value, dict) and not isinstance(other, dict | type(None)) and not value.get("_delete_"):
            kind = type(other).__name__
            raise ValueError(f"{path}: {key} is a dict here and {kind} in a base; add _delete_=True to replace it")
    return merge(base, child)


def read_config(path: str | Path) -> dict:
    """A config file (`.py` or `.json`) with its bases merged, as plain data.

    Raises FileNotFoundError, or ValueError naming the file, the line and what was refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    if path.suffix == ".json":
        own, bases = json.loads(path.read_text()), {}
        parents = own.pop("_base_", [])
    else:
        try:
            statements = ast.parse(path.read_text()).body
        except SyntaxError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
        reader = _Reader(path)
        found = [s for s in statements if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "_base_"]
        parents = reader.value(found[0].value) if found else []
    bases = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        inherited = read_config(path.parent / parent)
        twice = set(bases) & set(inherited)
        if twice:
            raise ValueError(f"{path}: {sorted(twice)} is in more than one of its bases")
        bases.update(inherited)
    if path.suffix != ".json":
        reader.names["_base_"] = bases
        own = {}
        for s in statements:
            if s in found or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)):
                continue  # the bases, or a docstring
            if not isinstance(s, ast.Assign):
                reader.refuse(s, f"`{ast.unparse(s).splitlines()[0][:60]}` is code")
            value = reader.value(s.value)
            for target in s.targets:
                if isinstance(target, ast.Name):
                    reader.names[target.id] = own[target.id] = value
                else:
                    reader.assign(target, value)
    return _laid_over(bases, own, path)


def _find(content, wanted: str) -> list[dict]:
    """Every dict of type `wanted`, depth first."""
    if isinstance(content, dict):
        here = [content] if content.get("type") == wanted else []
        return here + [d for v in content.values() for d in _find(v, wanted)]
    return [d for v in content for d in _find(v, wanted)] if isinstance(content, list | tuple) else []


def _input_options(config: dict, model: dict) -> dict:
    """min_size, max_size and the pixel statistics, from the 3.x data_preprocessor or the 2.x test pipeline."""
    options = {}
    loaders = [config.get("test_dataloader"), config.get("data", {}).get("test"), config.get("test_pipeline")]
    scales = [d["scale"] for part in loaders for d in _find(part or [], "Resize") if d.get("scale")]
    scales += [d["img_scale"] for part in loaders for d in _find(part or [], "MultiScaleFlipAug") if "img_scale" in d]
    if scales:
        scale = scales[0][0] if isinstance(scales[0], list) else scales[0]
        options.update(min_size=min(scale), max_size=max(scale))
    pixels = dict(model.get("data_preprocessor") or {})
    if not pixels and "img_norm_cfg" in config:
        norm = config["img_norm_cfg"]
        pixels = dict(mean=norm["mean"], std=norm["std"], bgr_to_rgb=norm.get("to_rgb", True))
    if "mean" in pixels:
        pixels.setdefault("bgr_to_rgb", False)  # MMDetection's default
    pixels = {k: pixels[k] for k in ("mean", "std", "bgr_to_rgb", "pad_size_divisor") if k in pixels}
    if pixels:
        options["data_preprocessor"] = pixels
    return options


def from_mmdet_config(path_or_dict: str | Path | dict) -> FasterRCNN | RetinaNet | RPN:
    """Builds the model of an MMDetection 2.x or 3.x config file, or of a dict: a whole config, or its `model` alone.

    `model.config` keeps the whole config, data and schedule included, as plain data. Weights to start from that it names
    are fetched by `model.init_weights()`, not here. Raises FileNotFoundError, or ValueError naming what is not understood
    or not supported.
    """
    config = dict(path_or_dict) if isinstance(path_or_dict, dict) else read_config(path_or_dict)
    if "model" not in config and "type" not in config:
        raise ValueError(f"config: expected a key 'model' or 'type', got {sorted(config)}")
    model = dict(config.get("model", config))
    kind = model.pop("type", None)
    if kind not in DETECTORS:
        raise ValueError(f"config: model type {kind!r} is not supported, expected one of {sorted(DETECTORS)}")
    options = _input_options(config, model)
    model.pop("data_preprocessor", None)
    if model.pop("pretrained", None):  # MMDetection 2.x named the backbone's start here
        start = config.get("model", config)["pretrained"]
        model["backbone"] = {**model["backbone"], "pretrained": start}
    model = {k: v for k, v in model.items() if k != "init_cfg" or v is not None}
    model.setdefault("neck", None)
    # MMDetection 2.0 kept these two beside the model.
    for key in ("train_cfg", "test_cfg"):
        if key not in model and isinstance(config.get(key), dict) and "type" not in config[key]:
            model[key] = config[key]
    unknown = set(model) - set(inspect.signature(DETECTORS[kind]).parameters)
    if unknown:
        raise ValueError(f"config: options of the model that are not supported: {sorted(unknown)}")
    built = DETECTORS[kind](**model, **options)
    built.config = config
    names = [m["classes"] for m in _metainfos(config) if "classes" in m]
    if names and len(names[0]) == built.num_classes:
        built.class_names = list(names[0])
    return built


def _metainfos(config: dict) -> list[dict]:
    loader = config.get("test_dataloader") or {}
    found = [config.get("metainfo"), (loader.get("dataset") or {}).get("metainfo"), config.get("data", {}).get("test")]
    return [m for m in found if isinstance(m, dict)] + ([{"classes": config["classes"]}] if "classes" in config else [])
