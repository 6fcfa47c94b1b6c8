"""FSDP2: parameters, gradients and the optimizer's states in shards, of which each process has its own. What leaves a run,
weights and states, is whole: every process gives its shards for it at the same time.

Shards are DTensors. Torch takes a second to import them, which a run without them does not pay."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sharded(losses: nn.Module, world: int) -> nn.Module:
    """The module to call in the place of `losses`, a detector's: it gathers the parameters of a residual block, of the neck
    or of a head for as long as that computes, and after backward its gradients are the mean of all processes', in shards.

    The parameters of `losses` become the same shards, in place. It cannot be called any more; but it can be copied, which
    FSDP's modules cannot, and be saved, averaged and put into evaluation mode without a word to them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tensors = [*losses.parameters(), *losses.buffers()]
    for x in tensors:  # as DistributedDataParallel does
        dist.broadcast(x.detach(), 0)
    inner = copy.deepcopy(losses, {id(x): x for x in tensors})
    mesh = init_device_mesh(tensors[0].device.type, (world,))
    blocks = [m for m in inner.modules() if hasattr(m, "with_cp")]
    for part in (*blocks, *inner.model.children(), inner):  # what is within another part comes before it
        if next(part.parameters(), None) is not None:
            fully_shard(part, mesh=mesh)
    for name, p in inner.named_parameters():
        owner, _, own = name.rpartition(".")
        losses.get_submodule(owner).register_parameter(own, p)
    return inner


@torch.no_grad()
def whole(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters are whole, the same in every process."""
    copied = copy.deepcopy(module, {id(p): nn.Parameter(p.full_tensor(), p.requires_grad) for p in module.parameters()})
    for b in copied.buffers():  # statistics of norms that are not synchronised
        dist.broadcast(b, 0)
    return copied


def whole_state(state):
    """A state dict, of any depth, with whole tensors on the host in the first process; in the others with none for them."""
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()  # one after the other: all at once would not fit where one is too many
        return full.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, dict):
        found = copy.copy(state)  # torch keeps the versions of modules beside the keys
        found.update({k: whole_state(v) for k, v in state.items()})
        return found
    return [whole_state(v) for v in state] if isinstance(state, list) else state


def take_module(module: nn.Module, state: dict) -> None:
    """`module.load_state_dict` of a whole state."""
    own = module.state_dict()
    for k, v in state.items():
        state[k] = _part(v, own.get(k))
    module.load_state_dict(state)


def take_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of a whole state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        p = parameters[index]  # what has its shape is as it is: momentum, and not a counter of steps
        values.update({k: _part(v, p) for k, v in values.items() if isinstance(v, Tensor) and v.shape == p.shape})
    optimizer.load_state_dict(state)


def _part(value: Tensor, like) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
