"""Recipes by name: every number of a training, in one frozen row.

1x, 2x, 3x, ms-3x are MMDetection's schedules of 16 pictures a step, 90k its (and Detectron2's) schedule by steps; tv is
torchvision's reference, tv-v2 that of its second weights; lsj-* are Detectron2's new baselines with large-scale jitter.
finetune is for few pictures of one's own, from a checkpoint.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    name: str
    # --- length: epochs, or `steps` where it is given; milestones are in the same unit
    epochs: int = 12
    steps: int | None = None
    batch_size: int = 2  # pictures a process and step
    base_batch: int = 16  # pictures of all processes for which `lr` is meant: another number scales it
    least_steps: int | None = None  # more epochs where these are fewer steps; forgotten where somebody says the epochs
    # --- optimizer
    optimizer: str = "SGD"  # or AdamW
    lr: float = 0.02
    scaling: str = "linear"  # of `lr` with the pictures a step, or sqrt
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_decay: float = 1.0  # times weight_decay, for the weights of norms
    bias_decay: float = 1.0  # the same for every bias
    layer_decay: float = 1.0  # times lr for each stage that lies further from the heads
    fixed_norm_mult: float = 1.0  # times lr for a backbone whose norms keep their statistics: it was trained before
    # --- schedule
    schedule: str = "step"  # or cosine
    milestones: tuple[float, ...] = (8, 11)
    gamma: float = 0.1
    warmup: int = 499  # steps before the first one at the full rate: MMDetection's 500
    warmup_epochs: float | None = None  # the warm-up ends before this many epochs have passed
    warmup_share: float | None = None  # it takes this share of all steps at most
    warmup_factor: float = 0.001
    # --- step
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "fp32"  # of autocast: fp32, bf16 or fp16
    ema: float | None = None  # decay of the weights' moving average
    # --- model
    sync_bn: bool = False
    frozen_stages: int | None = None  # None: the model's own
    with_cp: bool = False  # activation checkpointing of the backbone's blocks
    channels_last: bool = False
    compile: bool | str = False  # or torch.compile's mode "reduce-overhead", which records CUDA graphs
    shard: bool = False  # parameters, gradients and optimizer states in shards over torchrun's processes
    # --- pictures
    flip: float = 0.5
    multi_scale: tuple[float, float] | None = None  # range of factors of the model's min_size
    # Large-scale jitter: range of scales to `crop`, then a random crop of that size.
    lsj: tuple[float, float] | None = None
    crop: int = 1024
    # Least share of each side that a random crop in front of all leaves; it holds a box.
    min_crop_size: float | None = None
    photometric: bool = False  # MMDetection's: hue and the order of the colours, too
    colour_jitter: float | None = None  # brightness, contrast, saturation: factors from 1 - this to 1 + this
    # --- end
    patience: int | None = None  # epochs without a better AP after which a run ends

    def __post_init__(self) -> None:
        """Raises ValueError for a number that no run can have."""
        for name in ("epochs", "batch_size", "base_batch", "accumulate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1 up, got {value!r}")
        for name in ("steps", "patience", "least_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a whole number from 1 up, got {value!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a number above 0, got {self.lr!r}")
        choices = dict(optimizer=("SGD", "AdamW"), scaling=("linear", "sqrt"), schedule=("step", "cosine"),
                       precision=("fp32", "bf16", "fp16"))  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("multi_scale", "lsj"):
            low, high = getattr(self, name) or (1.0, 1.0)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}: expected a range of factors above 0, got {getattr(self, name)}")
        if self.shard and (self.channels_last or self.compile):
            raise ValueError("shard: expected channels_last False (torch shards contiguous parameters alone) and compile "
                             f"False, got {self.channels_last} and {self.compile!r}")  # fmt: skip
        if self.compile not in (False, True, "reduce-overhead"):
            raise ValueError(f'compile: expected False, True or "reduce-overhead", got {self.compile!r}')
        if self.graphs and (self.multi_scale is not None or self.accumulate > 1):
            raise ValueError('compile: expected multi_scale None beside "reduce-overhead", as a graph is recorded for each '
                             "size, and accumulate 1, as a graph writes its gradients over those of before, got "
                             f"{self.multi_scale} and {self.accumulate}")  # fmt: skip
        if self.min_crop_size is not None and not 0 < self.min_crop_size <= 1:
            raise ValueError(f"min_crop_size: expected a share above 0, at most 1, got {self.min_crop_size!r}")
        for name in ("warmup_share", "colour_jitter"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")
        if self.least_steps is not None and self.milestones:
            raise ValueError(
                f"least_steps: a length that the data decides leaves no place to milestones {self.milestones}"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay from 0 to below 1, got {self.ema!r}")

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return self.compile == "reduce-overhead"


_LSJ = Recipe("lsj", base_batch=64, batch_size=8, lr=0.1, weight_decay=4e-5, norm_decay=0.0, sync_bn=True,
              frozen_stages=-1, lsj=(0.1, 2.0))  # fmt: skip


def _lsj(epochs: int) -> Recipe:
    """On COCO 100 epochs are 184,375 steps of 64 pictures, with drops at 163,889 and 177,546."""
    share = epochs / 184375
    drops = (163889 * share, 177546 * share)
    return dataclasses.replace(
        _LSJ, name=f"lsj-{epochs}e", epochs=epochs, milestones=drops, warmup=500, warmup_factor=0.067
    )


RECIPES = {
    r.name: r
    for r in (
        Recipe("1x"),
        Recipe("2x", 24, milestones=(16, 22)),
        Recipe("3x", 36, milestones=(27, 33)),
        Recipe("90k", steps=90000, milestones=(60000, 80000)),
        Recipe("ms-3x", 36, milestones=(27, 33), multi_scale=(0.8, 1.0)),  # the short side from 640 to 800
        Recipe("tv", 26, milestones=(16, 22), warmup=1000, warmup_epochs=1.0),
        dataclasses.replace(_LSJ, name="tv-v2", epochs=400, milestones=(352, 384), warmup=1000, warmup_epochs=1.0),
        _lsj(100),
        _lsj(200),
        _lsj(400),
        # Few pictures are few steps: two a step make them twice as many as four would, and AdamW comes further in them than
        # SGD. Its rate is Ultralytics' for few classes, 0.002 for 16 pictures; a backbone with constant norms, which was
        # trained before, has a quarter of it. The decay is RTMDet's; norms and biases are not drawn to 0. The warm-up is
        # MMDetection's 500 steps, a tenth of a run that is short. 36 epochs are MMDetection's 3x, and 1000 steps make
        # something of 20 pictures. The average looks back on the last tenth of a short run, on 500 steps of a long one.
        # Sizes and colours differ by a fifth, about as much as distance and light do. Gradients of an ordinary step are
        # shorter than 10.
        Recipe(
            "finetune", 36, least_steps=1000, optimizer="AdamW", lr=0.002, scaling="sqrt", fixed_norm_mult=0.25,
            weight_decay=0.05, norm_decay=0.0, bias_decay=0.0, schedule="cosine", milestones=(), warmup=500,
            warmup_share=0.1, clip_norm=10.0, ema=0.998, multi_scale=(0.8, 1.2), colour_jitter=0.2,
        ),
    )
}  # fmt: skip


def get_recipe(recipe: str | Recipe = "finetune", **changes: Any) -> Recipe:
    """The recipe of a name with what `changes` says otherwise, None standing for nothing said. Raises ValueError for an
    unknown name or a number that no run can have, TypeError for an unknown one."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        recipe = RECIPES[recipe]
    changes = {k: v for k, v in changes.items() if v is not None}
    if "epochs" in changes:
        changes = {"least_steps": None, **changes}
    if changes.get("epochs") and recipe.steps is None and recipe.milestones:  # drops keep their place in the run
        share = changes["epochs"] / recipe.epochs
        changes = {"milestones": tuple(m * share for m in recipe.milestones), **changes}
    if "epochs" in changes and recipe.steps is not None:
        shares = tuple(m / recipe.steps * changes["epochs"] for m in recipe.milestones)
        changes = {"steps": None, "milestones": shares, **changes}
        recipe = dataclasses.replace(recipe, steps=None)
    return dataclasses.replace(recipe, **changes)


def told(recipe: Recipe) -> str:
    """Every number of it, on one line."""
    return ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(recipe).items() if k != "name" and v is not None)
