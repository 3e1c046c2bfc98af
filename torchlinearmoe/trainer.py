"""The training loop.

A step: fetch the micro-batches, count their tokens, forward and backward each, clip, step unless something is not
finite, log. Everything around it (validation, checkpoints, signals, the end) hangs off `run`.
"""

from __future__ import annotations

import gc
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinearmoe import disk
from torchlinearmoe.checkpoint.folder import read_extra
from torchlinearmoe.checkpoint.initial import InitialWeights
from torchlinearmoe.checkpoint.manager import CheckpointManager
from torchlinearmoe.checkpoint.model import begins_as_trained, model_files
from torchlinearmoe.commands import bytes_bar
from torchlinearmoe.data.baselines import Baselines, baseline_losses
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.fingerprint import DataState, fingerprint_of, follow
from torchlinearmoe.data.loader import Packed, build_loader, build_validation_loader
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.data.splits import Splits, Stream
from torchlinearmoe.data.tokenizer import check_vocabulary, load_tokenizer
from torchlinearmoe.evaluation import counted_hits, first_bad_layer, held_out_loss, silent_mixers
from torchlinearmoe.harness.training import Evaluation
from torchlinearmoe.harness.whole import whole_model
from torchlinearmoe.kernels.choose import check_modules
from torchlinearmoe.late import LateNumbers, to_device
from torchlinearmoe.metrics import report
from torchlinearmoe.metrics.logger import MetricsLogger
from torchlinearmoe.metrics.meter import Meter, peak_memory_gib
from torchlinearmoe.metrics.mfu import mfu, peak_flops
from torchlinearmoe.metrics.profiling import MemorySnapshot, StepProfiler
from torchlinearmoe.metrics.wandb import check_wandb
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import training_flops_per_token
from torchlinearmoe.moe.routers import Routers
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.optim.schedule import scheduled, set_learning_rate
from torchlinearmoe.optim.step import step_if_finite
from torchlinearmoe.parallel.apply import build_parallel_model
from torchlinearmoe.parallel.clip import gradient_norm
from torchlinearmoe.parallel.context import own_part
from torchlinearmoe.parallel.float8 import check_machine, check_sizes
from torchlinearmoe.parallel.inputs import Inputs
from torchlinearmoe.parallel.mesh import Degrees, Meshes
from torchlinearmoe.parallel.tensor import sum_partial_gradients
from torchlinearmoe.recipe import Recipe, dump
from torchlinearmoe.recipe.parse import read_keys
from torchlinearmoe.resume import choose_checkpoint, counts_of
from torchlinearmoe.run_folder import with_begin_of_text, write_recipe
from torchlinearmoe.runtime import StopSignal, choose_dtype, on_rank_0


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Trainer:
    """One run of a recipe on this rank. Needs a process group; `recipe.training.tokens_per_step` is resolved.

    Raises `resume.Finished`, before anything is written, where the checkpoint to go on from is that of the last step.
    """

    def __init__(self, recipe: Recipe, degrees: Degrees, device: torch.device) -> None:
        training = recipe.training
        assert training.tokens_per_step is not None
        # What is run
        self.recipe, self.device = recipe, device
        self.dtype = choose_dtype(training, device)
        self.folder = Path(training.output_dir)
        self.tokens_per_step = training.tokens_per_step
        self.total_steps = training.total_steps
        self.rank = dist.get_rank()
        # Parts
        torch.use_deterministic_algorithms(training.deterministic)
        self.meshes = Meshes(degrees, device.type)
        with torch.device("meta"):
            self.whole = Decoder(recipe.model)
        check_modules(self.whole, device.type, self.dtype, training.compile)
        check_sizes(self.whole, recipe)
        check_machine(recipe, device, self.dtype)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        check_vocabulary(self.tokenizer, recipe.model.vocab_size)
        if recipe.metrics.wandb:
            check_wandb()
        self.evaluation = Evaluation(recipe.evaluation, self.tokenizer) if recipe.evaluation.tasks else None
        self.checkpoints = CheckpointManager(self.folder / "checkpoints", recipe.checkpoint.keep)
        source, self.resume_notes = choose_checkpoint(recipe, self.checkpoints, self.tokenizer)
        self.checkpoints.clear()
        fresh = source is None and recipe.checkpoint.init_from
        self.initial_weights = InitialWeights(recipe) if fresh else None
        self.splits = self._open_data(source)
        recipe = self.recipe = with_begin_of_text(recipe, self.splits.begin_of_text)
        self.model_files = model_files(recipe, self.tokenizer)
        self.data, self.data_note = self._follow_data(source)
        built = build_parallel_model(recipe, self.meshes, device, self.dtype)
        self.parts, self.passes, self.shared = built.parts, built.passes, built.shared
        self.modules = nn.ModuleList(self.parts)
        self.routers = Routers(
            self.whole, self.parts, tokens=self.meshes.tokens_group, stages=self.meshes.pipeline_group
        )
        self.optimizer = build_optimizer(
            self.parts,
            name=recipe.optimizer.name,
            lr=recipe.optimizer.lr,
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            weight_decay=recipe.optimizer.weight_decay,
            states=recipe.optimizer.states,
            seed=training.seed,
        )
        # Saved
        self.step = 0
        self.tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        if source is not None:
            extra = self.checkpoints.load(source, self.parts, self.optimizer)
            self.step, self.tokens, self.skipped_steps = counts_of(extra, source)
        elif self.initial_weights is not None:
            self.initial_weights.load(self.parts, dist.group.WORLD)
        self.loader = build_loader(
            self.splits.train,
            sequence_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            samples_per_step=self.tokens_per_step // training.sequence_length,
            seed=training.seed,
            rank=self.meshes.data_rank,
            ranks=degrees.data_ranks,
            start_step=self.step,
            stop_step=self.total_steps,
            first_sample=self.data.first_sample,
            workers=recipe.data.workers,
            pin_memory=device.type == "cuda",
        )
        samples = len(self.splits.train.samples(training.sequence_length))
        self.epochs_per_step = self.tokens_per_step // training.sequence_length / samples
        self.totals = StepTotals(self.tokens_per_step, self.tokens_per_step // training.sequence_length)
        # Watched
        self.flops_per_token = training_flops_per_token(self.whole, training.sequence_length)
        self.peak = peak_flops(device, self.dtype, recipe.metrics.peak_tflops)
        self.meter = Meter(total_steps=self.total_steps, step=self.step, device=device)
        with disk.one_line(f"training.output_dir = '{self.folder}'", self._way_out):
            if self.rank == 0:
                write_recipe(recipe, self.folder)
            self.metrics = MetricsLogger(
                self.folder,
                total_steps=self.total_steps,
                resumed_step=self.step,
                rank=self.rank,
                tensorboard=recipe.metrics.tensorboard,
                wandb=recipe.metrics.wandb,
                recipe=dump(recipe),
                settings=read_keys(recipe),
            )
        self.resumed_from = source
        self.stop_signal = 0
        self._pending: LateNumbers | None = None

    @property
    def model(self) -> Decoder:
        """The model, where this rank has all of its layers."""
        (model,) = self.parts
        return model

    # -----------------------------------------------------------------------------------------------------------------
    # the loop

    def run(self) -> int | None:
        """Train to the last step. Returns the signal that stopped the run early, else None.

        Raises Diverged when too many steps in a row were not finite, or the last ones; the last good checkpoint stays.
        """
        with disk.one_line(f"training.output_dir = '{self.folder}'", self._way_out), self.metrics:
            return self._run()

    def _way_out(self) -> str:
        kept = self.checkpoints.newest()
        return f"make room or mend it, then start again; last complete checkpoint: {kept.name if kept else 'none'}"

    def _run(self) -> int | None:
        baselines = self._begin()
        stop = StopSignal()
        profile_folder = self.folder / "profile"
        metrics, checkpoint, evaluation = self.recipe.metrics, self.recipe.checkpoint, self.recipe.evaluation
        gc.collect()
        gc.freeze()
        try:
            with (
                StepProfiler(profile_folder, metrics.profile_steps, rank=self.rank) as profiler,
                MemorySnapshot(
                    profile_folder, metrics.memory_snapshot_step, device=self.device, rank=self.rank
                ) as snapshot,
            ):
                for batches in self.meter.waiting(self.loader):
                    profiler.begin(self.step + 1)
                    snapshot.begin(self.step + 1)
                    loss, grad_norm, lr = self.train_step(batches, stop.received)
                    last = self.step == self.total_steps
                    logs = last or self.step % metrics.interval == 0
                    validates = bool(metrics.validation_interval) and self.step % metrics.validation_interval == 0
                    saves = bool(checkpoint.interval) and self.step % checkpoint.interval == 0
                    if last or logs or saves or self.device.type == "cpu":
                        self._settle()
                    if self.skipped_in_a_row >= self._too_many_skipped():
                        self._diverged(batches)
                    if last or validates:
                        self._validate()
                    if last or (evaluation.interval and self.step % evaluation.interval == 0):
                        self._evaluate()
                    if logs:
                        self._log(loss, grad_norm, lr)
                    self.metrics.advance(self.step)
                    if self.stop_signal:
                        self._settle()
                        self._save(blocking=True)
                        name = signal.Signals(self.stop_signal).name
                        self.metrics.message(f"stopped by {name} after step {self.step}; the checkpoint is saved")
                        return self.stop_signal
                    if last or (saves and not self.skipped_in_a_row):
                        self._save(blocking=last or not checkpoint.asynchronous)
            self._finish(baselines)
            return None
        finally:
            stop.restore()
            gc.unfreeze()

    def train_step(self, batches: list[MicroBatch], received: int | None = None) -> tuple[Tensor, Tensor, float]:
        """One optimizer step. Returns the mean loss and the gradient norm before clipping, on the device, and the lr.

        `received`: a signal this rank was sent; all ranks learn of it.
        """
        self.modules.train()
        batches = [self._own(batch) for batch in batches]
        group = self.meshes.loss_group
        valid, counted = (sum(counts) for counts in zip(*((b.valid_tokens, b.counted_tokens) for b in batches)))
        counts = to_device(torch.tensor([valid, counted, received or 0], dtype=torch.float64), self.device)
        dist.all_reduce(counts[:2], group=group)
        dist.all_reduce(counts[2:], op=dist.ReduceOp.MAX)
        tokens = counts[0].clamp(min=1)

        padded = any(batch.filled is not None for batch in batches)
        totals = replace(self.totals, without_padding=counts[1].clamp(min=1)) if padded else self.totals
        inputs = [self._inputs(batch, totals) for batch in batches]
        self.routers.count_first(lambda: self.passes.forward(inputs), len(batches))
        total = self.passes.forward_backward(inputs, tokens)
        dist.all_reduce(total, group=group)
        mean = total / tokens

        grad_norm = self._gradient_norm()
        lr = scheduled(self.recipe, self.step + 1)
        set_learning_rate(self.optimizer, lr)
        finite_norm = grad_norm + 0.0 * mean.to(grad_norm.dtype)
        skipped = step_if_finite(self.optimizer, finite_norm, self.recipe.optimizer.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.routers.end_step(skipped)

        # What happened in a step is read one step later, when it is known without waiting for the device.
        previous, self._pending = self._pending, LateNumbers(torch.stack([skipped.double(), counts[2]]))
        if previous is not None:
            self._note(previous)
        self.step += 1
        self.tokens += self.tokens_per_step
        self.meter.add(self.tokens_per_step)
        return mean, grad_norm, lr

    def _own(self, batch: MicroBatch) -> MicroBatch:
        return own_part(batch, self.meshes, self.recipe.parallel)

    def _inputs(self, batch: MicroBatch, totals: StepTotals | None = None) -> Inputs:
        batch = batch.to(self.device)
        return Inputs(batch.tokens, batch.labels, batch.documents(self.device), totals)

    def _gradient_norm(self) -> Tensor:
        """Complete the gradients; their norm, the same on all ranks."""
        sum_partial_gradients(self.modules)
        if self.shared is None:
            return gradient_norm(self.modules)
        self.shared.sum_gradients()
        return gradient_norm(
            self.modules, pp_group=self.meshes.pipeline_group, counted_elsewhere=self.shared.counted_elsewhere
        )

    def _note(self, flags: LateNumbers) -> None:
        """Take in what a step reported: [skipped, signal]."""
        skipped, received = flags.read()
        self.skipped_steps += int(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.stop_signal = int(received) or self.stop_signal

    def _too_many_skipped(self) -> int:
        """How many steps in a row end the run; at its end two, or all there are: what comes after will not mend it."""
        most = self.recipe.training.max_skipped_steps
        return min(most, 2, self.total_steps) if self.step == self.total_steps else most

    def _settle(self) -> None:
        """Wait for the last step's report."""
        if self._pending is not None:
            self._note(self._pending)
            self._pending = None

    # -----------------------------------------------------------------------------------------------------------------
    # before, around and after

    def _open_data(self, source: Path | None) -> Splits:
        """The data, found and tokenised by rank 0 while the others wait; documents start as the weights know them."""
        data, known = self.recipe.data, source or self.recipe.checkpoint.init_from
        if data.begin_of_text is None and known:
            data = replace(data, begin_of_text=begins_as_trained(known, self.tokenizer))
        with bytes_bar("tokenising") as tell:
            return open_data(data, self.tokenizer, self.folder / "cache", self.folder, on_rank_0, tell)

    def _follow_data(self, source: Path | None) -> tuple[DataState, str | None]:
        """How the data go on from where the run stood, and a line to say."""
        now = on_rank_0(lambda: fingerprint_of(self.splits, self.recipe.data.min_length))
        if source is None:
            return DataState(now), None
        extra, training = read_extra(source), self.recipe.training
        next_sample = extra["step"] * (self.tokens_per_step // training.sequence_length)
        return follow(extra.get("data", {}), now, self.recipe.data.on_change, next_sample)

    def _begin(self) -> Baselines | None:
        degrees, source = self.meshes.degrees, self.resumed_from
        for line in report.beginning(
            self.recipe,
            self.splits,
            self.tokenizer,
            parameters=sum(p.numel() for p in self.whole.parameters()),
            flops_per_token=self.flops_per_token,
            devices=f"{degrees.world_size} x {self.device.type}",
            dtype=self.dtype,
            resumed=[source and f"resumed from {source} after step {self.step}", self.data_note, *self.resume_notes],
            weights=self.initial_weights.describe() if self.initial_weights else [],
            figures=self.loader.figures(self.total_steps),
        ):
            self.metrics.message(line)
        if not self.recipe.metrics.baselines or not len(self.splits.validation) or self.rank != 0:
            return None
        found = baseline_losses(self.splits.train, self.splits.validation, self.tokenizer.vocab_size)
        self.metrics.message(report.count_models(found))
        return found

    def _held_out_loss(self, limit: int = 0, stream: Stream | None = None) -> float:
        training = self.recipe.training
        loader = build_validation_loader(
            stream or self.splits.validation,
            sequence_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            rank=self.meshes.data_rank,
            ranks=self.meshes.degrees.data_ranks,
            pin_memory=self.device.type == "cuda",
        )
        return held_out_loss(
            self.passes, map(self._own, loader), self.device, group=self.meshes.loss_group, limit=limit
        )

    def _validate(self) -> None:
        limit, others = self.recipe.metrics.validation_batches, self.splits.others
        if len(self.splits.validation) or others:
            own = {"": self.splits.validation} if len(self.splits.validation) else {}
            with self.meter.paused():
                found = {name: self._held_out(limit, stream) for name, stream in {**own, **others}.items()}
            losses = {name: loss for name, (loss, _) in found.items()}
            hits = {name: accuracy for name, (_, accuracy) in found.items() if accuracy is not None}
            self.metrics.validation(self.step, losses.pop("", None), losses, hits)

    def _held_out(self, limit: int, stream: Stream) -> tuple[float, float | None]:
        """The loss on some data, and where the recipe asks for it the share of labels that greedy decoding says."""
        if not self.recipe.metrics.validation_accuracy:
            return self._held_out_loss(limit, stream), None
        with counted_hits(self.passes, self.device) as counts:
            loss = self._held_out_loss(limit, stream)
        for group in (self.meshes.loss_group, self.meshes.pipeline_group):
            dist.all_reduce(counts, group=group)
        hits, labels = counts.tolist()
        return loss, hits / max(labels, 1.0)

    def _evaluate(self) -> None:
        if self.evaluation is None:
            return
        data = self.recipe.data
        tokenizer = self.tokenizer.starting(bool(data.begin_of_text))
        ends = (
            {load_template(data.chat_template, tokenizer).end_id(tokenizer)}
            if data.format == "messages"
            else set[int]()
        )
        with self.meter.paused():
            model = whole_model(self.recipe.model, self.parts, self.meshes.pipeline_group, self.device, self.dtype)
            found = self.evaluation.ask(model, tokenizer, ends)
        self.metrics.evaluation(self.step, found)

    def _log(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """One line of metrics; every rank takes part in the sums."""
        figures, expert_load = self.routers.figures()
        values = {
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "epoch": self.step * self.epochs_per_step,
        }
        reading = self.meter.read()
        packed = to_device(torch.tensor(self.loader.packed, dtype=torch.float64), self.device)
        dist.all_reduce(packed)  # ranks that share samples count them as often as each other
        values |= {
            "tokens_per_second": reading.tokens_per_second,
            "mfu": mfu(
                reading.tokens_per_second, self.flops_per_token, self.peak, devices=self.meshes.degrees.world_size
            ),
            "memory_gib": peak_memory_gib(self.device),
            "step_time": reading.seconds_per_step,
            "data_wait": reading.data_wait,
            "data_wait_share": reading.data_wait / reading.seconds_per_step,
            **Packed(*packed.tolist()).figures(),
            **figures,
            **self.loader.figures(self.step),
        }
        self.metrics.log(self.step, values, expert_load=expert_load, seconds_left=reading.seconds_left)

    def _save(self, *, blocking: bool) -> None:
        with self.meter.paused():
            self.checkpoints.save(
                self.step,
                self.parts,
                self.optimizer,
                {
                    "tokens": self.tokens,
                    "skipped_steps": self.skipped_steps,
                    "data": self.loader.state_dict() | self.data.table(),
                },
                self.model_files,
                blocking=blocking,
            )

    def _diverged(self, batches: list[MicroBatch]) -> None:
        self.checkpoints.wait()
        place = first_bad_layer(self.passes, [self._inputs(self._own(batch)) for batch in batches])
        kept = self.checkpoints.latest()
        raise Diverged(
            f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, first bad: {place}; "
            f"stopped after step {self.step}, last good checkpoint: {kept or 'none yet'}"
        )

    def _finish(self, baselines: Baselines | None) -> None:
        """The last figures, and where everything is."""
        self.checkpoints.wait()
        metrics = self.recipe.metrics
        if len(self.splits.validation) and (metrics.baselines or metrics.mixer_ablation):
            loss = self._held_out_loss()
            self.metrics.message(f"held-out loss of the model: {loss:.4f} nats a token")
            if baselines is not None:
                self.metrics.message(report.below(baselines, loss))
            if metrics.mixer_ablation:
                with silent_mixers(self.modules):
                    silent = self._held_out_loss()
                self.metrics.message(f"  with every mixer's output set to zero: {silent:.4f} (+{silent - loss:.4f})")
        last = self.checkpoints.directory / f"step-{self.step}"
        if self.skipped_in_a_row:
            self.metrics.message("the last step had a loss or gradient that is not finite, and changed nothing")
        for line in report.where_it_is(self.recipe, self.splits, self.tokenizer, last):
            self.metrics.message(line)
