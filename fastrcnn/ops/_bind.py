"""What makes a function an operator: its declaration to torch, and the public names that share one signature."""

import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def bind(function: Callable[Concatenate[Callable, P], R], op: Callable, name: str) -> Callable[P, R]:
    """`function(op, ...)` as the public function `name(...)`: the operator (op = torch.ops.fastrcnn.x) and its twin in
    plain torch (op = the reference) come from one function, which checks the arguments and calls `op`. Signature,
    annotations and docstring are those of `function`.
    """

    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(op, *args, **kwargs)

    signature = inspect.signature(function)
    first, *parameters = signature.parameters.values()
    bound.__signature__ = signature.replace(parameters=parameters)
    bound.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != first.name}
    bound.__name__ = bound.__qualname__ = name
    bound.__module__, bound.__doc__, bound.__wrapped__ = function.__module__, function.__doc__, function
    return bound


_LIBRARY = torch.library.Library("fastrcnn", "FRAGMENT")


def declare(name: str, reference: Callable, fake: Callable) -> None:
    """fastrcnn::<name>, an operator without a gradient: `reference` answers where no kernel is registered. What
    torch.library.custom_op does, without its step through Python at every call, which is there for gradients alone.
    """
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastrcnn::{name}", fake, lib=_LIBRARY)
