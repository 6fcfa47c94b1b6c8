"""What every operator does: kernels equal references in every dtype, opcheck, compile and export pass, errors name the
argument. The calls stand in operator_cases.py.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from operator_cases import CASES, arguments, public
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastrcnn._extension import DTYPES, has_kernel, kernel_table, operators

each_operator = pytest.mark.parametrize("name", CASES)
each_function = pytest.mark.parametrize("reference", [False, True], ids=["operator", "reference"])


def outputs_and_gradients(function, kwargs: dict, wrt: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the first one's sum of squares in the tensors named in `wrt`."""
    kwargs = {
        k: tree_map(lambda t: t.detach().clone().requires_grad_(), v) if k in wrt else v for k, v in kwargs.items()
    }
    out = tree_leaves(function(**kwargs))
    leaves = tree_leaves([kwargs[k] for k in wrt])
    if not leaves:
        return out, []
    return out, list(torch.autograd.grad(out[0].square().sum(), leaves, materialize_grads=True))


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastrcnn":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


class Call(nn.Module):
    def __init__(self, function, rest: dict):
        super().__init__()
        self.function, self.rest = function, rest

    def forward(self, tensors: dict):
        return self.function(**tensors, **self.rest)


def split(kwargs: dict) -> tuple[dict, dict]:
    """The tensors and lists of tensors, and the rest."""
    tensors = {k: v for k, v in kwargs.items() if isinstance(v[0] if isinstance(v, list) else v, Tensor)}
    return tensors, {k: v for k, v in kwargs.items() if k not in tensors}


def test_the_table_holds_every_operator_and_the_package_hands_on_both_forms():
    assert set(CASES) == set(operators()) == set(kernel_table())
    for name in CASES:
        function, reference = public(name)
        assert (function.__name__, reference.__name__) == (name, f"{name}_reference")
        assert inspect.signature(function) == inspect.signature(reference)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference_with_gradients(device, need_kernel, name, dtype):
    need_kernel(name, device, dtype)
    case, (function, reference) = CASES[name], public(name)
    kwargs = arguments(name, device, dtype=dtype)
    if dtype in (torch.float64, torch.bfloat16):
        kwargs = channels_last(kwargs)
    results = [outputs_and_gradients(f, kwargs, case.differentiable) for f in (function, reference)]
    (actual, gradients), (expected, want_gradients) = results
    assert any(t.any() for t in actual) and all(g.any() for g in gradients)
    assert [t.stride() for t in actual] == [t.stride() for t in expected]
    exact = case.exact and dtype != torch.float64
    for i, (a, b) in enumerate(zip(actual + gradients, expected + want_gradients, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not b.is_floating_point() or (exact and i < len(actual)):
            assert torch.equal(a, b)
            continue
        # Statistics of norms stay float32 beside float64 maps, and boxes are float32 beside half precision.
        unit = max(torch.finfo(b.dtype).eps, 0.0 if name == "decode_boxes" else torch.finfo(dtype).eps)
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=(8 if unit < 1e-5 else 2) * unit * b.abs().max().item())


def channels_last(kwargs: dict) -> dict:
    def turned(t):
        return t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t

    return {k: tree_map(turned, v) for k, v in kwargs.items()}


def bare(kwargs: dict, name: str) -> dict:
    """Without what may be None."""
    parameters = inspect.signature(public(name)[0]).parameters
    least = {k: None if "None" in str(parameters[k].annotation) else v for k, v in kwargs.items()}
    if name == "decode_proposals":  # one of strides and batch_shape has to be there
        least["batch_shape"] = (64, 64)
    return least


@pytest.mark.parametrize("form", ["whole", "bare"])
@each_operator
def test_opcheck_of_the_operator_and_its_gradient(device, name, form):
    """The whole call in NCHW, the bare one channels-last."""
    kwargs, wrt = arguments(name, device, n=5), CASES[name].differentiable
    if form == "bare":
        kwargs = channels_last(bare(kwargs, name))
        wrt = tuple(k for k in wrt if kwargs[k] is not None)
    with Recorder() as recorder:
        outputs_and_gradients(public(name)[0], kwargs, wrt)
    names = {f"{name}_backward", "_conv_backward" if name == "conv_bn_relu" else name}
    gradient = (names - {name}) & {n.removeprefix("fastrcnn::") for n in torch._C._dispatch_get_all_op_names()}
    expected = [name, *gradient]
    assert [function.__name__.split(".")[0] for function, _ in recorder.calls] == expected
    for function, args in recorder.calls:
        if function.__name__.split(".")[0] in gradient:  # differentiable once
            args = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args)
        torch.library.opcheck(function, args)


@each_operator
def test_compiles_as_one_graph_with_gradients(device, name):
    tensors, rest = split(arguments(name, device))
    model, wrt = Call(public(name)[0], rest), CASES[name].differentiable
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [outputs_and_gradients(lambda f=f, **t: f(t), tensors, wrt) for f in (compiled, model)]
    exact = {} if name == "deform_roi_pool" else {"rtol": 0, "atol": 0}  # its gradient is added with atomics on CUDA
    torch.testing.assert_close(*map(tree_leaves, results), equal_nan=True, **exact)


@each_operator
def test_exports_with_any_number_of_boxes_where_it_has_them(device, name):
    tensors, rest = split(arguments(name, device))
    model, n = Call(public(name)[0], rest), torch.export.Dim("n", min=2)
    shapes = {k: {CASES[name].grows[k]: n} if k in CASES[name].grows else tree_map(lambda _: None, v)
              for k, v in tensors.items()}  # fmt: skip
    exported = torch.export.export(model, (tensors,), dynamic_shapes=(shapes,)).module()
    more = split(arguments(name, device, n=31 if CASES[name].grows else 20))[0]
    for a, b in zip(tree_leaves(exported(more)), tree_leaves(model(more)), strict=True):
        assert torch.equal(a, b)


def test_convolutions_export_with_any_batch_and_size(device):
    b, h, w = torch.export.Dim("b", min=2), torch.export.Dim("h", min=4), torch.export.Dim("w", min=4)
    none = dict.fromkeys(("bn_weight", "bn_bias", "bn_mean", "bn_var"))
    weight = torch.randn(6, 4, 3, 3, device=device)
    for name, rest, maps in (("conv_bn_relu", none, {"input": 4}), ("deform_conv2d", {}, {"input": 4, "offset": 18})):

        def tensors(*size, maps=maps):
            images, *sides = size
            return {k: torch.randn(images, c, *sides, device=device) for k, c in maps.items()} | dict(weight=weight)

        model = Call(public(name)[0], dict(rest, padding=1))
        shapes = {k: {0: b, 2: h, 3: w} for k in maps} | dict(weight=None)
        exported = torch.export.export(model, (tensors(2, 5, 6),), dynamic_shapes=(shapes,)).module()
        more = tensors(3, 9, 7)
        torch.testing.assert_close(exported(more), model(more))


WRONG = [(name, *wrong) for name, case in CASES.items() for wrong in case.wrong]


@pytest.mark.parametrize("name, wrong, error, argument", WRONG)
@each_function
def test_wrong_arguments_are_named(name, wrong, error, argument, reference):
    with pytest.raises(error, match=f"^{argument}"):
        public(name)[reference](**{**arguments(name, "cpu"), **wrong})


OF_ANY_NUMBERS = {"max_shape", "image_sizes", "images"}


@each_operator
@each_function
def test_tensors_of_the_other_kind_of_number_are_named(name, reference):
    kwargs = arguments(name, "cpu")
    for key, value in split(kwargs)[0].items():
        wrong = tree_map(lambda t: t.long() if t.is_floating_point() else t.float(), value)
        if key not in OF_ANY_NUMBERS:
            with pytest.raises(TypeError, match=f"^{key}"):
                public(name)[reference](**{**kwargs, key: wrong})


NOT_OF_ITS_TYPE = {  # by the first word of a parameter's annotation
    "Tensor": ["x", 1.0, np.zeros((20, 4)), [[0.0] * 4], torch.zeros(3, 3).to_sparse(), torch.zeros(20, 4) > 0],
    "float": ["0.5", True, [0.5], np.zeros(1), torch.tensor(0.5), float("nan"), float("inf"), 10**400],
    "int": ["1", 1.5, True, np.ones(1), torch.tensor(1), 2**64],
    "bool": [1, "False", np.ones(1)],
    "str": [5, True, "nonsense", ["linear"]],
    "Sequence": [5.5, "abc", {"a": 1}, np.zeros(()), torch.zeros(()), [None], [[]], ["a"]],
    "tuple": [5, "ab", (1.5, 2), (2**40, 1)],
    "torch": [5, torch.uint8, "float32"],
}
PARAMETERS = [(name, p) for name in CASES for p in inspect.signature(public(name)[0]).parameters.values()]


@pytest.mark.parametrize("name, parameter", PARAMETERS, ids=[f"{n}-{p.name}" for n, p in PARAMETERS])
def test_values_of_a_wrong_type_are_named(name, parameter):
    """Whatever stands in for an argument, the error is a TypeError or ValueError that begins with its name."""
    annotation = re.sub(r"<class '|collections\.abc\.|torch\.(?=Tensor)", "", str(parameter.annotation))
    kind = re.split(r"\W", annotation)[0]
    values = NOT_OF_ITS_TYPE[kind] + ([] if "None" in str(parameter.annotation) else [None])
    kwargs = arguments(name, "cpu")
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            public(name)[0](**{**kwargs, parameter.name: value})
        assert re.match(rf"{parameter.name}\b", str(caught.value)), f"{value!r}: {caught.value}"


@pytest.mark.parametrize("name", [name for name in CASES if name != "select_candidates"])  # which takes one tensor
@each_function
def test_tensors_of_another_device_are_named(name, reference):
    kwargs = arguments(name, "cpu")
    for key in split(kwargs)[0]:
        value = kwargs[key]
        moved = [*value[:-1], value[-1].to("meta")] if isinstance(value, list) else value.to("meta")
        with pytest.raises(ValueError, match=rf"one device.*{key}.*meta"):
            public(name)[reference](**{**kwargs, key: moved})


@each_operator
def test_a_required_argument_left_out_is_named(name):
    kwargs = arguments(name, "cpu")
    for key, parameter in inspect.signature(public(name)[0]).parameters.items():
        if parameter.default is parameter.empty:
            with pytest.raises(TypeError, match=key):
                public(name)[0](**{k: v for k, v in kwargs.items() if k != key})


def test_errors_of_the_kernels_are_value_errors_without_a_source_path():
    for call in (
        lambda: torch.ops.fastrcnn.nms(torch.zeros(3, 4), torch.zeros(2), 0.5),
        lambda: torch.ops.fastrcnn.roi_align(torch.zeros(1, 3, 0, 4), torch.zeros(1, 5), 2, 2, 1.0, 0, True),
        lambda: torch.ops.fastrcnn.roi_align(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5), 2, 2, 1.0, 2**32 + 1, True),
    ):
        with pytest.raises(ValueError, match=r"^(scores|features|sampling_ratio) must") as caught:
            call()
        assert "csrc" not in str(caught.value) and ".cpp" not in str(caught.value)


def test_has_kernel_asks_for_the_dtype(monkeypatch):
    monkeypatch.setitem(__import__("fastrcnn")._extension.TAKES, ("nms", "cpu"), lambda d: d != torch.float16)
    assert has_kernel("nms", "cpu") and not has_kernel("nms", "cpu", torch.float16)
    assert kernel_table(torch.float16)["nms"]["cpu"] == "reference" and kernel_table()["nms"]["cpu"] == "kernel"
