"""A training run from its config to its last checkpoint."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from repo_jax import distributed, flops, progress, sharding
from repo_jax.config import TrainConfig, to_dict
from repo_jax.data import Data, open_data
from repo_jax.errors import ConfigError, TrainingError
from repo_jax.evaluation.perplexity import Score, score
from repo_jax.training import agreement, initial, lock, observe
from repo_jax.training import run_dir as run_directory
from repo_jax.training.checkpoint_files import (
    DamagedCheckpoint,
    checkpoint_folder,
    read_record,
    saved_steps,
)
from repo_jax.training.checkpoints import Checkpoints
from repo_jax.training.metrics import MetricsWriter, require_loggers
from repo_jax.training.program import Program, make_program
from repo_jax.training.step import TrainState
from repo_jax.training.stopping import Stop
from repo_jax.training.timing import StepTimer


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run stands when `train` returns.

    Attributes:
      step: updates done.
      finished: whether that is all of them; False after a signal.
      validation: the last one; None where nothing is held out.
      tokens_per_second: over the steps of this process, validation aside.
    """

    step: int
    finished: bool
    validation: Score | None
    tokens_per_second: float | None


def train(config: TrainConfig, run_dir: str | Path) -> Summary:
    """Trains, resuming what is in `run_dir`; a finished run is left as it is.

    Of several processes, each calls this, with the same config; see `distributed.start`.

    Args:
      config: of the run.
      run_dir: made if it is not there. Process 0 alone writes it, but for checkpoints.

    Raises:
      ConfigError: the config, the mesh, the data, the checkpoint to start from or the
        directory is not as it must be, or another process trains there; or processes have other
        options or data than process 0, or do not see its checkpoints.
      MissingPackageError: a logger that is asked for is not installed.
      TrainingError: a loss or gradient is not finite, or something cannot be written or read.
    """
    if "://" in str(run_dir):
        raise ConfigError(
            f"--run_dir is {run_dir}; it must be a folder, and checkpoints alone can be elsewhere: "
            f"--training.checkpoint_dir {run_dir}"
        )
    run_dir = Path(run_dir)
    agreement.check_options(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(config, mesh)
    _check_attention(config.model.attention)
    training = config.training
    with contextlib.ExitStack() as stack:
        last, finished = distributed.on_main(lambda: _open_run(config, run_dir, stack))
        if finished:
            return Summary(last, True, None, None)
        agreement.check_folder(run_dir, training.checkpoint_dir)
        if last is None:
            distributed.on_main(lambda: initial.check(config))
        data = distributed.main_first(lambda: open_data(config.data, config.model))
        agreement.check_data(data)
        facts = {}  # of the model, which a config need not name
        if not config.model.eos_ids and data.eos_id is not None:
            facts["eos_ids"] = (data.eos_id,)
        if config.init.checkpoint is not None and config.model.rope_scaling is None:
            before = distributed.on_main(lambda: initial.trained_length(config, run_dir))
            facts["max_length"] = max(config.model.max_length, before)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **facts))
        rows = sharding.local_rows(mesh, config.data.batch_size)
        batches = distributed.everywhere(lambda: _training_batches(data, rows))
        program = make_program(config, mesh)
        distributed.on_main(lambda: _write_run(config, run_dir, data))

        checkpoints = stack.enter_context(
            Checkpoints(run_dir, training.keep_last, training.checkpoint_dir)
        )
        restored = checkpoints.restore_newest(
            program.state, lambda r: _check_data(r, data, run_dir)
        )
        if restored is None:
            state, record = initial.state(config, program), {}
        else:
            state, record = restored
        run = _Run(config, run_dir, program, data, checkpoints)
        with sharding.use(mesh):
            return run.go(state, batches, record.get("validation_due", False))


def _open_run(
    config: TrainConfig, run_dir: Path, stack: contextlib.ExitStack
) -> tuple[int | None, bool]:
    """Checks what is there and takes the lock, in process 0 alone.

    Returns:
      The last step that was saved, None before there is one; and whether the run is finished.
    """
    training = config.training
    require_loggers(training)
    run_directory.check(run_dir, config)
    folder = checkpoint_folder(run_dir, training.checkpoint_dir)
    steps = saved_steps(folder)
    newest, record = _newest_record(folder, steps)
    before = _checkpoints_before(run_dir)
    if before != folder and "config" in record:
        started = run_directory.from_dict(record["config"])
        run_directory.check_same(started, config, folder)
    if not steps and before not in (None, folder):
        raise ConfigError(
            f"training.checkpoint_dir is {folder}, which has no checkpoints; those of the "
            f"run in {run_dir} went to {before}; copy them, or keep that"
        )
    if steps and newest == steps[-1] >= training.steps and not record.get("validation_due"):
        print(f"the run in {run_dir} is finished; nothing is left to do", file=sys.stderr)
        return newest, True
    stack.enter_context(lock.hold(run_dir))
    return max(steps, default=None), False


def _newest_record(folder, steps: list[int]) -> tuple[int | None, dict]:
    """Of the newest checkpoint whose record is whole; others are told of when restoring."""
    for step in reversed(steps):
        with contextlib.suppress(DamagedCheckpoint):
            return step, read_record(folder, step)
    return None, {}


def _checkpoints_before(run_dir: Path):
    """Where the checkpoints of a started run are; None before it is started."""
    if not (run_dir / "config.yaml").is_file():
        return None
    return checkpoint_folder(run_dir, run_directory.read_config(run_dir).training.checkpoint_dir)


def _write_run(config: TrainConfig, run_dir: Path, data: Data) -> None:
    folder = checkpoint_folder(run_dir, config.training.checkpoint_dir)
    _, record = _newest_record(folder, saved_steps(folder))
    if record:  # else config.yaml would name data that are not the run's
        _check_data(record, data, run_dir)
    run_directory.write(run_dir, config)
    if data.tokenizer is not None:
        run_directory.keep_tokenizer(run_dir, data.tokenizer)
    if config.data.sources:
        for line in data.describe(config.training.steps):
            print(line, file=sys.stderr)


def _check_attention(name: str | None) -> None:
    needed = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}.get(name)
    here = jax.default_backend()
    if needed is not None and needed != here:
        raise ConfigError(
            f"model.attention is {name}, which needs a {needed.upper()}; JAX runs on {here} here; "
            "leave it out to take what fits"
        )


def _check_data(record: dict, data: Data, run_dir: Path) -> None:
    if not data.has_fingerprint(record["fingerprint"]):
        raise ConfigError(
            f"the training data are not those that the run in {run_dir} was started on (other "
            "files, another order or other tokens); bring those back, or name another --run_dir"
        )


def _training_batches(data: Data, rows):
    if data.validation:
        data.validation_batches()  # raises now what the first validation would
    return data.training_batches(rows)


class _Run:
    """What a run does around its steps: numbers, validation, checkpoints, stopping."""

    def __init__(self, config, run_dir, program: Program, data: Data, checkpoints: Checkpoints):
        self.config, self.run_dir, self.program, self.data = config, run_dir, program, data
        self.checkpoints = checkpoints
        self.best = checkpoints.best_loss or math.inf
        self.last_validation: Score | None = None
        self.validated_at: int | None = None
        self.validation_due = False
        self.stop = Stop()
        kinds = config.model.kinds
        self.repo_layers = [i for i, kind in enumerate(kinds) if kind == "repo"]
        self.collapse = observe.CollapseWatch(self.repo_layers)
        self.lines = progress.Lines()
        self.rate: float | None = None  # tokens per second, as last written

    def go(self, state: TrainState, batches, validation_due: bool) -> Summary:
        """Runs the steps that are left.

        Args:
          state: to start from.
          batches: `TrainingBatches`.
          validation_due: whether the validation of the state's step was interrupted.
        """
        training, main = self.config.training, distributed.is_main()
        self.first = done = int(state.step)
        if main:
            self._tell_where()
        self.timer = StepTimer()
        self.writer = MetricsWriter(self.run_dir, training, self.first) if main else None
        self.bar = tqdm(
            total=training.steps,
            initial=self.first,
            unit="step",
            disable=not (main and training.progress and sys.stderr.isatty()),
        )
        profile = observe.Profiler(self.run_dir, training.profile_steps if main else None)
        source = batches.iterate(self.first)
        pending = None  # numbers of the step before, read while the next one runs

        def flush():
            nonlocal pending
            if pending is not None:
                self._report(*pending)
            pending = None

        with self.stop:
            try:
                batch = self._place(next(source)) if done < training.steps else None
                if validation_due:
                    self._validate(state)
                    if self.validated_at == done:
                        self.checkpoints.add_loss(done, self.last_validation.loss)
                while done < training.steps and not self.stop.requested():
                    if profile.starts_at(done + 1, self.first + 1):
                        flush()
                        profile.start()
                    state, metrics = self.program.step(state, batch)
                    done += 1
                    finished = done == training.steps
                    if self._looks_at_positions(done):
                        metrics |= self._position_stats(state, batch)
                    if not finished:
                        batch = self._place(next(source))  # while the step runs
                    flush()
                    pending = (done, metrics)
                    if profile.ends_at(done):
                        flush()
                        profile.stop()
                    if finished or self._due(training.validate_every, done):
                        flush()
                        with self.timer.paused():
                            self._validate(state)
                    if finished or self._due(training.checkpoint_every, done):
                        flush()
                        with self.timer.paused():
                            self._save(state)
                flush()
                self._save(state)
                self.checkpoints.wait()
            finally:
                profile.stop()
                source.close()
                self.bar.close()
                if self.writer:
                    self.writer.close()
        if self.stop.reason and main:
            saved = f"saved step {done} to {self.run_dir}"
            print(f"{self.stop.reason}: {saved}; the same command goes on", file=sys.stderr)
        rate = self.timer.mean_rate()
        return Summary(
            done, done >= training.steps, self.last_validation, rate and self._tokens * rate
        )

    def _tell_where(self) -> None:
        mesh = self.program.mesh
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        print(
            f"from step {self.first} to {self.config.training.steps}, mesh {axes}: {mesh.size} "
            f"devices ({mesh.devices.flat[0].device_kind}), {jax.process_count()} processes",
            file=sys.stderr,
        )

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

    @property
    def _tokens(self) -> int:
        """In a step."""
        return self.config.data.batch_size * self.config.data.sequence_length

    def _place(self, batch: dict[str, np.ndarray]):
        return sharding.place_batch(self.program.mesh, batch, self.config.data.batch_size)

    def _looks_at_positions(self, step: int) -> bool:
        every = self.config.training.position_stats_every
        return bool(self.repo_layers and every) and (step == 1 or step % every == 0)

    def _position_stats(self, state: TrainState, batch) -> dict[str, jax.Array]:
        rows = observe.rows_in_parallel(self.program.mesh)
        return observe.position_stats(self.program.model, state.params, batch, rows)

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the numbers of a step, which waits for it, and writes them where they are due."""
        training = self.config.training
        numbers = jax.device_get(metrics)
        by_source = numbers.pop("ce_loss_by_source", ())
        values = {
            name: x.tolist() if x.ndim else x.item()
            for name, x in numbers.items()
            if name != "targets"
        }
        values |= {
            f"loss/{name}": loss.item()
            for name, loss in zip(self.data.source_names, by_source, strict=True)
        }
        self._check_finite(step, {name: values[name] for name in ("loss", "grad_norm")})
        if "z_std" in values and self.writer:
            self.collapse.see(step, values["z_std"])
        due = self._due(training.log_every, step) or step in (self.first + 1, training.steps)
        if due or "z_std" in values:
            seconds = self.timer.lap(step - self.first)
            values["tokens_per_second"] = seconds and self._tokens / seconds
            values["step_seconds"] = seconds
            self._write(step, **values, **self._mfu(seconds), tokens=step * self._tokens)
            self.rate = values["tokens_per_second"]
        self._show(step, values["loss"])
        self.bar.update(1)

    def _mfu(self, seconds: float | None) -> dict[str, float | None]:
        """Nothing where the devices' peak is not known."""
        devices = self.program.mesh.devices
        kind = devices.flat[0].device_kind
        if flops.peak_flops(kind) is None:
            return {}
        length = self.config.data.sequence_length
        rate = seconds and self._tokens / seconds
        share = rate and flops.mfu(self.config.model, length, rate, devices.size, kind)
        return {"mfu": share}

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self.checkpoints.wait()
            last = self.checkpoints.latest
            good = (
                "there is no checkpoint before it"
                if last is None
                else (f"the last good checkpoint is {self.checkpoints.folder / str(last)}")
            )
            raise TrainingError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; {good}; a lower "
                "optimizer.learning_rate or a longer optimizer.warmup_steps may help"
            )

    def _validation_batches(self) -> Iterator[dict[str, jax.Array]]:
        """On the mesh; ends early when the run is to stop."""
        training, mesh = self.config.training, self.program.mesh
        micro = self.config.data.batch_size // training.accumulation
        rows = sharding.local_rows(mesh, micro)
        for batch in self.data.validation_batches(
            batch_size=micro, max_windows=training.validation_windows
        ):
            if self.stop.requested():
                return
            mine = {name: x[rows] for name, x in batch.items()}
            yield sharding.place_batch(mesh, mine, micro)

    def _validate(self, state: TrainState) -> None:
        """Scores held-out windows; a new best is saved at once."""
        step = int(state.step)
        if not self.data.validation or self.validated_at == step:
            return
        result = score(
            *(self.program.model, state.params, self._validation_batches()),
            self.data.byte_lengths,
            chunk=self.config.training.loss_chunk,
        )
        # What is interrupted is done again when the run goes on.
        self.validation_due = self.stop.reason is not None
        if self.validation_due:
            return
        self._check_finite(step, {"val_loss": result.loss})
        self.last_validation, self.validated_at = result, step
        values = {"val_loss": result.loss}
        if result.bits_per_byte is not None:
            values["val_bits_per_byte"] = result.bits_per_byte
        self._write(step, **values)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self.writer:
            tqdm.write(f"step {step}: {shown}", file=sys.stderr)
        if result.loss < self.best:
            self.best = result.loss
            self._save(state)

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        data = {
            "seed": self.config.data.seed,
            "next_step": step,
            "fingerprint": self.data.fingerprint,
            "config": to_dict(self.config),
            "validation_due": self.validation_due,
        }
        loss = self.last_validation.loss if self.validated_at == step else None
        self.checkpoints.save(state, data, loss)

    def _write(self, step: int, **values) -> None:
        if self.writer:
            self.writer.write(step, **values)

    def _show(self, step: int, loss: float) -> None:
        speed = "" if self.rate is None else f", {self.rate:,.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.3f}{speed}", refresh=False)
        elif self.writer and (
            self.lines.due or step in (self.first + 1, self.config.training.steps)
        ):
            self.lines.written()
            print(f"step {step}: loss {loss:.4f}{speed}", file=sys.stderr, flush=True)
