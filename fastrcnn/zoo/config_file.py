"""MMDetection's configuration files as plain data, read without MMDetection and without running them.

A config is Python source, but only its data is taken: assignments of literals, dict(...), list(...) and the like,
arithmetic, f-strings, simple list comprehensions, names assigned before, `_base_` inheritance with `_delete_`, references
to the bases (`_base_.x` and `{{_base_.x}}`) and MMEngine's templates (`{{ fileDirname }}`, `{{$VARIABLE:default}}`).
Everything else (imports, loops, conditions, other calls) is refused with the line it stands on.
"""

import ast
import importlib.util
import json
import operator
import os
import re
from pathlib import Path

from fastrcnn.models.build import merge

# Items of one value and letters of one text, steps of a file, nests, bases: what no config needs, and what keeps a hostile
# one short.
LIMIT = 100_000
STEPS, DEEPEST, MOST_FILES, LARGEST = 300_000, 100, 200, 2_000_000
_CALLS = {c.__name__: c for c in (list, tuple, set, range, len, int, float, str, bool)}
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


def _size(value) -> int:
    """Numbers, texts and containers in `value`, each as often as it is reached, counted up to a little over LIMIT; a nest
    too deep (a container in itself, for one) counts as more than that."""
    count, rest = 0, [(value, 0)]
    while rest and count <= LIMIT:
        v, depth = rest.pop()
        count += 1 + (len(v) // 100 if isinstance(v, str) else 0)
        if isinstance(v, dict | list | tuple | set):
            if depth > DEEPEST:
                return LIMIT + 1
            items = list(v.values() if isinstance(v, dict) else v)[: LIMIT + 1]
            rest += [(item, depth + 1) for item in items]
    return count


# Layers and anchors are built in loops, so a number of them is time.
_COUNT = re.compile(r"num_(?!classes|groups|heads)\w+|stacked_convs|scales_per_octave|depth|num")


def check_amount(value, key: str, where: str) -> None:
    """Raises ValueError for a number in a model's configuration that is beyond any model."""
    most = 2000 if _COUNT.fullmatch(key) else 1_000_000
    if isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{where}: {value} is more than any model has")


class _Refused(ValueError):
    """Says already where it happened."""


class _Reader:
    """Evaluates the data expressions of one file."""

    def __init__(self, path: Path):
        self.path, self.names, self.steps = path, {}, 0

    def refuse(self, node: ast.AST, what: str):
        where = f"{self.path}, line {getattr(node, 'lineno', '?')}"
        raise _Refused(f"{where}: {what}. A config is read, not run: only data, `_base_` and names assigned before it")

    def count(self, node: ast.AST, steps: int) -> None:
        self.steps += steps
        if self.steps > STEPS:
            self.refuse(node, f"more than {STEPS} steps")

    def value(self, node: ast.expr):
        self.count(node, 1)
        try:
            value = self._value(node)
            if isinstance(value, str | list | tuple | set | dict):  # what is copied counts as often as it is
                if len(value) > LIMIT:
                    self.refuse(node, f"more than {LIMIT} items")
                self.count(node, len(value) // 100 if isinstance(value, str) else len(value))
            return value
        except _Refused:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
            self.refuse(node, f"`{ast.unparse(node)[:60]}`: {error}")

    def _value(self, node: ast.expr):
        match node:
            case ast.Constant():
                return self.filled(node) if isinstance(node.value, str) else node.value
            case ast.List():
                return self.items(node.elts)
            case ast.Tuple():
                return tuple(self.items(node.elts))
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self.value(inner)
            case ast.Dict():
                pairs = zip(node.keys, node.values)
                return self.joined((None if k is None else self.value(k), self.value(v)) for k, v in pairs)
            case ast.Call(func=ast.Name(id="dict"), args=[] | [_]):
                given = [(None, self.value(v)) for v in node.args]
                return self.joined(given + [(k.arg, self.value(k.value)) for k in node.keywords])
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _CALLS:
                return self.called(node, name, [self.value(a) for a in arguments])
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return self.binary(node, self.value(node.left), node.op, self.value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](self.value(node.operand))
            case ast.JoinedStr():
                return self.joined_text(node)
            case ast.Name():
                if node.id not in self.names:
                    self.refuse(node, f"{node.id} is not assigned before")
                return self.names[node.id]
            case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], iter=source)]):
                outside, out = {key: self.names[key] for key in [name] if key in self.names}, []
                for item in self.value(source):
                    self.names[name] = item
                    out.append(self.value(node.elt))
                self.names.pop(name, None)
                self.names.update(outside)
                return out
            case ast.Attribute() | ast.Subscript():
                return self.member(node)
        self.refuse(node, f"`{ast.unparse(node)[:60]}` is not data")

    def items(self, elements: list[ast.expr]) -> list:
        out = []
        for e in elements:
            out += list(self.value(e.value)) if isinstance(e, ast.Starred) else [self.value(e)]
            if len(out) > LIMIT:
                self.refuse(e, f"more than {LIMIT} items")
        return out

    def called(self, node: ast.Call, name: str, arguments: list):
        if name == "range" and len(range(*arguments)) > LIMIT:
            self.refuse(node, f"more than {LIMIT} items")
        if name == "str":
            self.count(node, sum(map(_size, arguments)))
        result = _CALLS[name](*arguments)
        return list(result) if name == "range" else result

    def binary(self, node: ast.AST, left, op: ast.operator, right):
        """left op right, unless the result would be beyond reason."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if isinstance(op, ast.Pow | ast.Mod) and not numbers:  # `%` formats texts to any length
            self.refuse(node, f"`{ast.unparse(node)[:60]}` is not arithmetic")
        if isinstance(op, ast.Pow) and (abs(left) > LIMIT or abs(right) > 64):
            self.refuse(node, "too large a power")
        if isinstance(op, ast.Mult) and not numbers:
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if len(what) * times > LIMIT:
                self.refuse(node, f"more than {LIMIT} items")
        result = _OPERATORS[type(op)](left, right)
        size = _size(result)
        self.count(node, size)
        if (isinstance(result, int) and abs(result) > 2**128) or size > LIMIT:
            self.refuse(node, "too large a value")
        return result

    def joined_text(self, node: ast.JoinedStr) -> str:
        out = ""
        for part in node.values:
            out += self.text(part)
            if len(out) > LIMIT:
                self.refuse(node, f"more than {LIMIT} letters")
        return out

    def text(self, part: ast.expr) -> str:
        if isinstance(part, ast.Constant):
            return part.value
        if not isinstance(part, ast.FormattedValue) or part.format_spec is not None or part.conversion != -1:
            self.refuse(part, f"`{ast.unparse(part)[:60]}` is more than a value in a text")
        value = self.value(part.value)
        self.count(part, _size(value))
        return str(value)

    @staticmethod
    def joined(pairs) -> dict:
        """A dict from pairs, where the key None unpacks (`**x`)."""
        out = {}
        for key, value in pairs:
            out.update(value if key is None else {key: value})
        return out

    def member(self, node):
        owner = self.value(node.value)
        if isinstance(node, ast.Attribute) and not isinstance(owner, dict):
            self.refuse(node, f"`{ast.unparse(node)[:60]}` is not a member of a dict")
        try:
            return owner[self.key(node)]
        except (KeyError, IndexError, TypeError):
            self.refuse(node, f"`{ast.unparse(node)[:60]}` does not exist")

    def key(self, node):
        """What an attribute or subscript asks its owner for."""
        if isinstance(node, ast.Attribute):
            return node.attr
        if isinstance(node.slice, ast.Slice):
            ends = node.slice.lower, node.slice.upper, node.slice.step
            return slice(*(None if e is None else self.value(e) for e in ends))
        return self.value(node.slice)

    def assign(self, target: ast.expr, value, own: dict) -> None:
        """`a = value`, `a, b = value`, `_base_.a.b = value`, `a["b"] = value`."""
        size = _size(value)
        if size > LIMIT:
            self.refuse(target, "too large a value")
        self.count(target, size)
        match target:
            case ast.Name():
                self.names[target.id] = own[target.id] = value
            case ast.Tuple() | ast.List():
                values = list(value) if isinstance(value, list | tuple) else []
                if len(values) != len(target.elts):
                    self.refuse(target, f"`{ast.unparse(target)[:60]}` does not fit what it is set to")
                for one, v in zip(target.elts, values):
                    self.assign(one, v, own)
            case ast.Attribute() | ast.Subscript():
                owner, key = self.value(target.value), self.key(target)
                try:
                    owner[key] = value
                except (IndexError, TypeError):
                    self.refuse(target, f"`{ast.unparse(target)[:60]}` does not exist")
            case _:
                self.refuse(target, f"`{ast.unparse(target)[:60]}` cannot be assigned to")

    def statement(self, s: ast.stmt, own: dict) -> None:
        """Takes one statement's data into `own`."""
        match s:
            case ast.Expr(value=ast.Constant()):  # a docstring
                return
            case ast.Assign():
                value = self.value(s.value)
                for target in s.targets:
                    self.assign(target, value, own)
            case ast.AnnAssign() if s.value is not None:
                self.assign(s.target, self.value(s.value), own)
            case ast.AugAssign(target=ast.Name()) if type(s.op) in _OPERATORS:
                try:
                    value = self.binary(s, self.value(s.target), s.op, self.value(s.value))
                except (TypeError, ArithmeticError) as error:
                    self.refuse(s, f"`{ast.unparse(s)[:60]}`: {error}")
                self.assign(s.target, value, own)
            case _:
                self.refuse(s, f"`{ast.unparse(s).splitlines()[0][:60]}` is code")

    def filled(self, node: ast.Constant):
        """A text with MMEngine's templates filled in, or what `{{ _base_.x }}` alone in it stands for."""
        text = node.value
        base = re.fullmatch(r"\{\{\s*(_base_[\w.]*)\s*\}\}", text)
        if base:
            return self.value(ast.copy_location(ast.parse(base[1], mode="eval").body, node))
        names = dict(fileDirname=str(self.path.parent), fileBasename=self.path.name,
                     fileBasenameNoExtension=self.path.stem, fileExtname=self.path.suffix)  # fmt: skip
        if text.count("{{") * 4096 > LIMIT * 10:
            self.refuse(node, "too many templates")
        text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: names.get(m[1], m[0]), text)
        return re.sub(r"\{\{\s*\$(\w+)\s*:\s*([^\s{}]*)\s*\}\}", lambda m: os.environ.get(m[1], m[2]), text)


def _laid_over(base: dict, child: dict, path: Path, where: str = "") -> dict:
    """`merge`, but a dict over anything else is an error, as it is in MMEngine."""
    for key, value in child.items():
        other = base.get(key)
        if not isinstance(value, dict) or other is None or value.get("_delete_"):
            continue
        if not isinstance(other, dict):
            kind = type(other).__name__
            raise ValueError(
                f"{path}: {where}{key} is a dict here and {kind} in a base; add _delete_=True to replace it"
            )
        _laid_over(other, value, path, f"{where}{key}.")
    return merge(base, child)


def _parsed(path: Path) -> tuple[list[ast.stmt] | dict, list]:
    """(statements of a .py file or the content of a .json file, its bases as they are written there)."""
    if path.suffix not in (".py", ".json"):
        hint = ": Detectron2's are not read, its checkpoint tells the model" if path.suffix in (".yaml", ".yml") else ""
        raise ValueError(f"{path}: expected a .py or .json config{hint}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: expected a config of at most {LARGEST} bytes, got {path.stat().st_size}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError(f"expected an object, got {type(content).__name__}")
            return content, content.pop("_base_", [])
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno or '?'}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # bytes that are no text, JSON's errors, too deep a nest
        raise ValueError(f"{path}: {error}") from None
    reader = _Reader(path)
    found = [s for s in statements if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "_base_"]
    rest = [s for s in statements if s not in found]
    return rest, reader.value(found[0].value) if found else []


def _base_path(base: str, path: Path) -> Path:
    """The file that `_base_` names: beside `path`, or, as in `mmdet::faster_rcnn/x.py`, among the configs that an installed
    package brings along."""
    package, scoped, name = base.partition("::")
    if not scoped:
        return path.parent / base
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{path}: _base_: {base} is a config of the package {package}, which is not installed: copy it here"
        )
    return Path(spec.submodule_search_locations[0], ".mim", "configs", name)


def _read(path: Path, trail: tuple[Path, ...], files: list[Path]) -> dict:
    """A config file with its bases merged. trail: the files that led here as bases; files: all that were read so far."""
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}" + (f", a base of {trail[-1]}" if trail else ""))
    path = path.resolve() if trail else path
    if path.resolve() in trail:
        raise ValueError(f"{path}: is its own base, by way of {trail[-1]}")
    files.append(path)
    if len(files) > MOST_FILES or len(trail) > DEEPEST:
        raise ValueError(f"{path}: more than {MOST_FILES} files of bases, or {DEEPEST} one on the other")
    content, parents = _parsed(path)
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list | tuple) or not all(isinstance(p, str) for p in parents):
        raise ValueError(f"{path}: _base_: expected a path or a list of them, got {str(parents)[:60]}")
    bases = {}
    for parent in parents:
        inherited = _read(_base_path(parent, path), (*trail, path.resolve()), files)
        twice = set(bases) & set(inherited)
        if twice:
            raise ValueError(f"{path}: {sorted(twice)} is in more than one of its bases")
        bases.update(inherited)
    own = content
    if not isinstance(content, dict):
        reader, own = _Reader(path), {}
        reader.names["_base_"] = bases
        for s in content:
            reader.statement(s, own)
    if max(map(_size, [*own.values(), *bases.values()]), default=0) > LIMIT:  # a container was put into itself
        raise ValueError(f"{path}: too large a value, or one nested too deeply")
    return _laid_over(bases, own, path)


def read_config(path: str | Path) -> dict:
    """A config file (`.py` or `.json`) with its bases merged, as plain data.

    Raises FileNotFoundError, or ValueError naming the file, the line and what was refused.
    """
    try:
        return _read(Path(path), (), [])
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
