"""Batch normalisation over all processes, on any device."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics, in training, are those of the joined batch of all processes: each counts by its
    number of values, so that one without any (no RoI) takes part with nothing, and where nobody has any nothing changes.
    Detectron2 calls it NaiveSyncBatchNorm with stats_mode "N". torch's own needs CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values, flat = x.numel() // x.shape[1], x if x.dtype == torch.float64 else x.float()
        if values:
            var, mean = torch.var_mean(flat, (0, 2, 3), correction=0)
        else:
            var = mean = flat.sum((0, 2, 3))  # zeros, through which the gradient's sum finds this process, too
        var, mean = var.double(), mean.double()
        sums = torch.cat([mean * values, (var + mean * mean) * values, mean.new_full((1,), values)])
        if dist.is_available() and dist.is_initialized():
            sums = _Sum.apply(sums)
        mean, square, count = sums.split([len(mean), len(mean), 1])
        total = count.detach().clamp(min=1)
        mean = mean / total
        var = (square / total - mean * mean).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum * (count > 0)
            self.running_mean.lerp_(mean.to(self.running_mean), momentum.to(self.running_mean))
            unbiased = var * total / (total - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var), momentum.to(self.running_var))
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps).to(self.weight)
        shift = self.bias - mean.to(scale) * scale
        return (flat * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def synchronise_norms(model: nn.Module) -> nn.Module:
    """Every batch norm of `model` that trains becomes a SyncBatchNorm2d, in place, under its own keys. Returns `model`."""
    for m in model.modules():
        if (
            type(m) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and m.affine
            and m.track_running_stats
            and m.momentum is not None
        ):
            m.__class__ = SyncBatchNorm2d
    return model
