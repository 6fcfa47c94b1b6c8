"""The training loop: one plain function from a model and a dataset to a trained model and a run's folder.

A step is a function of (seed, epoch, the pictures' indices) and of the state, and of nothing else; nothing in it waits for
the device. Losses stay there until a few steps are logged together, and a state is only saved behind such a look: what is
saved is finite.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn.data.batches import batches, steps_per_epoch
from fastrcnn.models.base_detector import unwrapped
from fastrcnn.models.sampling import seeded
from fastrcnn.training import checkpoint, distributed
from fastrcnn.training.auto_batch import auto_batch, out_of_memory
from fastrcnn.training.ema import averaged_copy
from fastrcnn.training.log import Log
from fastrcnn.training.mmdet_recipe import recipe_of
from fastrcnn.training.pictures import on_device, picture_sizes, smallest_batch, training_transforms
from fastrcnn.training.recipe import Recipe, get_recipe, told
from fastrcnn.training.schedule import base_rate, build_optimizer, rate_factor, total_steps
from fastrcnn.training.state import (
    DTYPES,
    Losses,
    State,
    adapt,
    check_machine,
    description,
    deterministic_algorithms,
    differences,
    seed_everything,
    seed_of,
)
from fastrcnn.training.validate import BEST, SCORE, check_data, measured, report, unsaid, validation_loss
from fastrcnn.weights import described, save

LOOK = 10  # steps between two looks at the losses
REPORT = 60.0  # seconds between two reports: charts take some


class Run:
    """One run: what its steps share. `train` makes it, and calls `begin`, `go` and `end`."""

    def __init__(
        self, model, dataset, val, recipe: Recipe, out: Path | None, copy: Path | None, loader: dict, lr: float | None,
        save_every: float, keep: int, say: Callable[[str], None], tensorboard: bool,
    ):  # fmt: skip
        self.dataset, self.val, self.recipe, self.out, self.loader = dataset, val, recipe, out, loader
        self.copy = copy  # a file that holds the best weights, too
        self.save_every, self.keep, self.say, self.tensorboard = save_every, keep, say, tensorboard
        self.rank, self.world, self.seed = loader["rank"], loader["world"], loader["seed"]
        self.device = next(model.parameters()).device
        self.batches = steps_per_epoch(dataset, recipe.batch_size, self.world, loader["drop_empty"])
        self.epoch_steps = math.ceil(self.batches / recipe.accumulate)
        self.total = total_steps(recipe, self.epoch_steps)
        self.rate = base_rate(recipe, recipe.batch_size * self.world * recipe.accumulate, lr)
        seed_everything(self.seed)
        adapt(model, recipe)
        model.train()
        scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.losses = distributed.parallel(Losses(model, recipe.graphs), self.world, recipe.shard)
        mean = None if recipe.ema is None else averaged_copy(model)
        self.state = State(model, mean, build_optimizer(model, recipe, self.rate), scaler, recipe.shard)
        self.latest = self.found = None  # on `val`: what the last epoch's weights found, and what the best ones did

    @property
    def identity(self) -> dict:
        """What must be the same for a run to go on."""
        return dict(
            recipe=dataclasses.asdict(self.recipe), seed=self.seed, lr=self.rate, processes=self.world,
            images=len(self.dataset), drop_empty=self.loader["drop_empty"],
            classes=list(getattr(self.dataset, "class_names", None) or []), model=description(self.state.model),
        )  # fmt: skip

    def begin(self, resume: bool) -> None:
        """Takes over the newest state where there is one. Raises ValueError where it is another run's."""
        content = checkpoint.load_state(self.out, self.say) if resume and self.out is not None else None
        if content is not None:
            if said := differences(content["identity"], self.identity):
                raise ValueError(f"{self.out}: cannot go on with other settings than the run began with: {said}")
            self.state.take(content)
        s = self.state
        self.log = Log(self.out if self.rank == 0 else None, self.say, s.step, self.tensorboard)
        self.log.json("config.json", self.settings())
        self.say(f"recipe {self.recipe.name}: {self.total} steps of {self.recipe.batch_size} x {self.world} pictures, "
                 f"{self.epoch_steps} an epoch, full rate {self.rate:g}"
                 + (f"; going on at step {s.step}" if content is not None else "") + f"\n{told(self.recipe)}")  # fmt: skip
        self.log.epochs(s.rows)

    def settings(self) -> dict:
        """Every number of the run, for config.json."""
        return dict(
            **self.identity, steps=self.total, epoch_steps=self.epoch_steps, data=str(getattr(self.dataset, "path", "")),
            val=str(getattr(self.val, "path", "")), workers=self.loader["workers"], device=str(self.device),
            deterministic=torch.are_deterministic_algorithms_enabled(), torch=torch.__version__,
            threads=torch.get_num_threads(),
        )  # fmt: skip

    def go(self, stop: checkpoint.Stop) -> None:
        """Every step that is left."""
        s, patience = self.state, self.recipe.patience
        self.saved = self.reported = time.perf_counter()
        # An epoch that was saved before its pictures were measured is still to be ended.
        while (s.step < self.total or s.batch) and not (patience is not None and s.stale >= patience):
            self.epoch(stop)

    def epoch(self, stop: checkpoint.Stop) -> None:
        """What is left of an epoch, and its end. Ends the process where a signal asked for it, behind a saved state."""
        s, recipe = self.state, self.recipe
        self.losses.train()
        loader = batches(self.dataset, recipe.batch_size, epoch=s.epoch, start=s.batch, **self.loader)
        self.pending, self.waited, self.since, begun = [], 0.0, time.perf_counter(), time.perf_counter()
        try:
            warnings.filterwarnings("ignore", message="picture .* is left out")  # said below
            for images, targets, indices in loader if s.step < self.total else ():
                self.waited += time.perf_counter() - begun
                if s.step == 0 and s.batch == 0:
                    self.log.samples(images, targets, indices, s.model.class_names)
                self.batch(images, targets, indices)
                for index in loader.skipped.keys() - s.skipped.keys():
                    s.skipped[index] = loader.skipped[index]
                    self.say(f"left out: {s.skipped[index]}")
                done = s.step >= self.total
                # A state holds no gradients: none is saved between the batches of one step.
                whole = s.batch % recipe.accumulate == 0 or s.batch == self.batches
                asked = self.world == 1 and stop.number  # several processes stop at the same look
                if whole and (len(self.pending) >= LOOK or s.batch == self.batches or done or asked):
                    stopped, due = self.look(stop)
                    if self.out is not None and (stopped or (due and s.batch < self.batches and not done)):
                        self.save()
                    if stopped:
                        if self.rank == 0 and self.found is not None:
                            self.report()
                        self.say(f"stopped by signal {stop.number} at step {s.step}; --resume goes on from here")
                        stop.leave()
                if done:
                    break
                begun = time.perf_counter()
        except RuntimeError as error:
            raise out_of_memory(error, f"step {s.step}", recipe.batch_size, self.device) from None
        finally:
            loader.close()
        self.end_epoch()

    def batch(self, images, targets, indices) -> None:
        """Forward and backward of a batch, and an update where it is the last of `accumulate`, or of the epoch."""
        s, recipe = self.state, self.recipe
        seeds = [seed_of(self.seed, s.epoch, index) for index in indices]
        sizes = picture_sizes(s.model, images, seeds, recipe)
        least = distributed.largest([*sizes, *smallest_batch(recipe)], self.world)
        images, targets = on_device(s.model, images, targets, self.device)
        first = s.batch % recipe.accumulate == 0
        last = (s.batch + 1) % recipe.accumulate == 0 or s.batch + 1 == self.batches
        rate = self.rate * rate_factor(recipe, s.step, self.epoch_steps)
        values = self.step(images, targets, (sizes, least), seeds, rate, first, last)
        self.pending.append((dict(step=s.step, epoch=s.epoch + 1, lr=rate), values, indices))
        s.batch += 1
        s.step += last

    def step(self, images, targets, sizes, seeds, rate: float, first: bool, last: bool) -> dict[str, Tensor]:
        """The part of a batch that runs on the device, and that nothing waits for. Returns its losses, and the norm of the
        gradients where there was an update."""
        s, recipe = self.state, self.recipe
        if first:
            s.optimizer.zero_grad(set_to_none=True)
        # Shards are summed at every batch: gradients that wait for the last one would be whole.
        waits = self.world > 1 and not last and not recipe.shard
        quiet = self.losses.no_sync() if waits else contextlib.nullcontext()
        cast = torch.autocast(self.device.type, DTYPES.get(recipe.precision), enabled=recipe.precision != "fp32")
        with quiet, seeded(seeds):
            with cast:
                losses = self.losses(images, targets, *sizes)
            loss = sum(losses.values())
            s.scaler.scale(loss / recipe.accumulate).backward()
        values = {"loss": loss.detach(), **{k: v.detach() for k, v in losses.items()}}
        if last:
            values["grad_norm"] = s.update(recipe, rate)
        return values

    def look(self, stop: checkpoint.Stop) -> tuple[bool, bool]:
        """Reads the losses since the last look, logs them, and says whether to stop, and whether a state is due: what one
        process says, all say. Raises FloatingPointError where a loss is not finite, in all processes."""
        s, rows = self.state, []
        names = list(dict.fromkeys(name for _, values, _ in self.pending for name in values))
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        table = torch.stack([torch.stack([v.get(n, none).double() for n in names]) for _, v, _ in self.pending])
        asked = [[stop.number > 0], [time.perf_counter() - self.saved > self.save_every]]
        asked = none.new_tensor(asked).expand(2, len(names))
        *table, stops, dues = distributed.mean_of_all(torch.cat([table, asked]), self.world).tolist()
        now = time.perf_counter()
        pictures = sum(len(indices) for *_, indices in self.pending) * self.world
        speed, waiting = pictures / max(now - self.since, 1e-9), self.waited / max(now - self.since, 1e-9)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        for line, ((row, values, indices)) in zip(table, self.pending):
            found = dict(zip(names, line))
            # The scaler of fp16 looks for gradients that are not finite, and leaves their step out.
            norm = 0.0 if s.scaler.is_enabled() else found.get("grad_norm", 0.0)
            if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
                self.diverged(row, found, indices)
            for name in values:
                if name != "grad_norm":
                    s.sums[name] = s.sums.get(name, 0.0) + found[name]
            s.sums["batches"] = s.sums.get("batches", 0) + 1
            extra = {"images/s": round(speed, 2), "waiting": round(waiting, 4)} | ({"memory": memory} if memory else {})
            rows.append({**row, **{n: found[n] for n in values}, **extra})
        self.log.steps([row for row in rows if "grad_norm" in row] or rows, self.total)
        self.pending, self.waited, self.since = [], 0.0, now
        return stops[0] > 0, dues[0] > 0

    def diverged(self, row: dict, found: dict, indices: Sequence[int]) -> None:
        """Raises FloatingPointError naming the step, its losses, its pictures, and the state that is still good."""
        parts = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k not in ("loss", "grad_norm"))
        everyone = [i for own in distributed.gathered(list(indices), self.world) for i in own]
        name_of = getattr(self.dataset, "picture", "picture {}".format)
        names = ", ".join(str(name_of(i)) for i in everyone)
        kept = ""
        if self.out is not None:
            states = checkpoint.state_files(self.out)
            kept = f"; {states[-1]} is the last good state" if states else "; no state had been saved yet"
        raise FloatingPointError(
            f"step {row['step']}: the loss is {found['loss']}, from {parts}, the norm of the gradients "
            f"{found.get('grad_norm', math.nan):.4g}, at a rate of {row['lr']:.3g}, on {names}{kept}"
        )

    def end_epoch(self) -> None:
        """Measures, writes what there is to see, and saves."""
        s, batches_done = self.state, max(1, self.state.sums.get("batches", 0))
        row = dict(epoch=s.epoch + 1, loss=s.sums.get("loss", math.nan) / batches_done,
                   lr=self.rate * rate_factor(self.recipe, max(0, s.step - 1), self.epoch_steps))  # fmt: skip
        parts = "  ".join(f"{k} {v / batches_done:.3f}" for k, v in s.sums.items() if k not in ("loss", "batches"))
        better = self.val is None
        if self.val is not None:
            self.save()  # measuring may take long
            row.update(self.measure())
            score = row.get(SCORE[s.model.reads_labels], math.nan)
            better = score > s.best or s.best == -math.inf
            s.best, s.stale = (score if score == score else -math.inf, 0) if better else (s.best, s.stale + 1)
        s.rows.append(row)
        s.epoch, s.batch, s.sums = s.epoch + 1, 0, {}
        said = "".join(f"  {k} {row[k]:.3g}" for k in ("val_loss", "AP", "AP50", "AR@1000") if k in row)
        epochs = math.ceil(self.total / self.epoch_steps)
        self.say(f"epoch {s.epoch}/{epochs}  loss {row['loss']:.3f}  {parts}{said}")
        for other in distributed.gathered(s.skipped, self.world):
            s.skipped.update(other)
        if s.skipped:
            self.say(
                f"{len(s.skipped)} pictures could not be read and were left out, the first: {min(s.skipped.values())}"
            )
        self.log.epochs(s.rows)
        self.log.json("metrics.json", self.metrics())
        if better:
            self.write(BEST)
            self.found = self.latest
        if self.rank == 0 and self.out is not None and time.perf_counter() - self.reported > REPORT:
            self.report()
        self.save()

    def report(self) -> None:
        report(self.out, self.say, self.val, self.found)
        self.found, self.reported = None, time.perf_counter()

    def measure(self) -> dict[str, float]:
        """Validation loss and COCO's numbers of what would be kept now."""
        kept, self.latest = self.state.result(), None
        losses, size, workers = Losses(kept, self.recipe.graphs), self.recipe.batch_size, self.loader["workers"]
        found = dict(val_loss=validation_loss(losses, self.val, size, workers, self.rank, self.world))
        try:
            numbers, self.latest = measured(kept, self.val, self.world)
            return found | numbers
        except (ValueError, OSError) as error:  # a picture that has gone since the first step, say
            self.say(f"AP could not be measured: {error}")
            return found

    def metrics(self) -> dict:
        rows, name = self.state.rows, SCORE[self.state.model.reads_labels]
        scored = [row for row in rows if row.get(name) is not None and not math.isnan(row[name])]
        best = max(scored, key=lambda row: row[name]) if scored else rows[-1]
        return dict(best=best, last=rows[-1], steps=self.state.step, skipped=len(self.state.skipped))

    def write(self, name: str) -> None:
        """The weights as they would be kept now. A full disk ends no run: the file of before stays."""
        if self.out is None:
            return
        kept = self.state.result()
        if self.rank == 0 and self.log.attempt(save, kept, self.out / name) and name == BEST and self.copy is not None:
            self.log.attempt(checkpoint.copy_whole, self.out / name, self.copy)

    def save(self) -> None:
        """The state, and the weights beside it."""
        if self.out is None:
            return
        self.saved = time.perf_counter()
        self.write("last.safetensors")
        content = self.state.content(self.identity)
        if self.rank == 0:
            self.log.attempt(checkpoint.save_state, self.out, content, self.keep)
        distributed.wait(self.world)

    def end(self) -> nn.Module:
        """The model as it is kept. Raises OSError where its weights could not be written."""
        s, patience = self.state, self.recipe.patience
        if patience is not None and s.stale >= patience:
            self.say(f"stopped: no better {SCORE[s.model.reads_labels]} for {s.stale} epochs")
        if self.rank == 0 and self.out is not None:
            if self.copy is not None:  # which a run that began without it does not have yet
                self.log.attempt(checkpoint.copy_whole, self.out / BEST, self.copy)
            for path in filter(None, (self.out / BEST, self.out / "last.safetensors", self.copy)):
                if not path.exists():
                    raise OSError(f"{path}: could not be written")
            if self.found is None and self.val is not None and s.model.reads_labels:
                self.found = unsaid(self.out, self.val, s.best, self.device)
            self.report()
        return s.result().eval()


def train(
    model: nn.Module,
    dataset,
    recipe: str | Recipe = "finetune",
    out: str | Path | None = None,
    resume: bool = False,
    val=None,
    *,
    epochs: int | None = None,
    batch_size: int | str | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 0,
    deterministic: bool = False,
    drop_empty: bool = False,
    patience: int | None = None,
    save_every: float = 300.0,
    keep: int = 2,
    tensorboard: bool = False,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Trains `model`, in place, and returns what it became, or with a recipe that averages the average, in eval mode.

    dataset, val: `fastrcnn.data.open_dataset`'s, or (image uint8 [3, H, W], target) pairs, targets being dicts boxes
    [N, 4] xyxy pixels, labels [N] counted from 0, optional ignore_boxes [R, 4].
    recipe: a name of `RECIPES`, "config" for that of the MMDetection config that the model came with, or one of your own;
    epochs, batch_size (pictures a process and step; "auto": as many as fit on a GPU), lr (as it is, where the recipe's is
    scaled by the pictures of a step) and patience say otherwise.
    out: a folder for weights (best.safetensors, last.safetensors), states, log.jsonl, results.csv, config.json,
    metrics.json and the report; NAME.safetensors is the folder NAME and that file, with the best weights; None writes
    nothing.
    resume: goes on from the newest state in `out`, or begins where there is none: the steps that follow are, on the CPU
    bit for bit, those of a run that was never stopped, with any number of workers.
    val: after each epoch its losses and AP are measured, the best AP is kept, and `patience` epochs without a better one
    end the run. save_every: seconds between two states, of which `keep` stay; an epoch's end has one, as have
    SIGTERM and Ctrl-C. deterministic: PyTorch's deterministic algorithms.
    Under torchrun every process trains on its share of each batch, as one process would on the whole; with the recipe's
    `shard` the model keeps its shards, and what is returned is a whole copy.

    Every picture is read once before the first step. Raises ValueError for arguments, folders and data that no run can
    have, naming them; OSError where `out` cannot be written or another process trains in it; FloatingPointError at a loss
    that is not finite, naming step, losses and pictures, while the states of before are kept; torch.OutOfMemoryError that
    says what to lower. The same seed gives the same weights on the same machine with the same number of threads.
    """
    model = unwrapped(model)
    auto = batch_size == "auto"
    recipe = recipe_of(model, recipe, log, epochs=epochs, batch_size=None if auto else batch_size, patience=patience)
    get_recipe(recipe, lr=lr)  # checks it
    if recipe.patience is not None and val is None:
        raise ValueError("patience: needs val, whose AP it watches")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number from 0 up, got {seed!r}")
    device = next(model.parameters()).device
    fits = auto_batch(model, recipe, dataset, out if resume else None) if auto else None
    with contextlib.ExitStack() as stack, warnings.catch_warnings():  # a run's filters end with it
        rank, world = stack.enter_context(distributed.process_group(device))
        check_machine(recipe, device, world)
        if auto:
            recipe = get_recipe(recipe, batch_size=min(distributed.gathered(fits, world)))
        say = log if rank == 0 else lambda line: None
        stop, copy = checkpoint.Stop(), None
        if out is not None:
            out, copy = checkpoint.check_out(out, resume or rank > 0)
            distributed.wait(world)  # nobody writes before everybody has looked
            if rank == 0:
                stack.enter_context(checkpoint.locked(out))
            stop = stack.enter_context(checkpoint.stopping())
            described(model)  # what no file can hold is refused now, not behind an epoch
        if deterministic:
            stack.enter_context(deterministic_algorithms())
        check_data(model, dataset, val, drop_empty, world, say)
        loader = dict(seed=seed, rank=rank, world=world, workers=workers, drop_empty=drop_empty,
                      transforms=training_transforms(recipe))  # fmt: skip
        run = Run(model, dataset, val, recipe, out, copy, loader, lr, save_every, keep, say, tensorboard)
        run.begin(resume)
        run.go(stop)
        return run.end()
