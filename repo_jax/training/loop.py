"""A training run from its config to its last checkpoint."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from tqdm import tqdm

from repo_jax.config import TrainConfig
from repo_jax.data import Data, open_data
from repo_jax.errors import ConfigError, TrainingError
from repo_jax.evaluation.perplexity import Score, score
from repo_jax.modeling import RePoLM
from repo_jax.training import run_dir as run_directory
from repo_jax.training.checkpoints import Checkpoints, abstract_params, newest_step
from repo_jax.training.metrics import MetricsWriter, require_loggers
from repo_jax.training.step import TrainState, create_state, make_train_step

# What a checkpoint to start from must have in common with the model to be trained.
_SHARED = (
    *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"),
    *("rope_theta", "norm_eps"),
)


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

    Args:
      config: of the run.
      run_dir: made if it is not there.

    Raises:
      ConfigError: the config, the data, the checkpoint to start from or the directory is
        not as it must be.
      MissingPackageError: a logger that is asked for is not installed.
      TrainingError: a loss or gradient is not finite.
    """
    run_dir = Path(run_dir)
    require_loggers(config.training)
    _check_attention(config.model.attention)
    run_directory.check(run_dir, config)
    newest = newest_step(run_dir)
    if newest is None:
        _check_init(config)
    elif newest >= config.training.steps:
        print(f"the run in {run_dir} is finished; nothing is left to do", file=sys.stderr)
        return Summary(newest, True, None, None)
    data = open_data(config.data, config.model)
    if not config.model.eos_ids and data.eos_id is not None:
        model_config = dataclasses.replace(config.model, eos_ids=(data.eos_id,))
        config = dataclasses.replace(config, model=model_config)
    batches = data.training_batches()
    model = RePoLM(config.model)
    abstract = abstract_params(model)
    optimizer, step = make_train_step(model, config.optimizer, config.training, abstract)
    step = jax.jit(step, donate_argnums=0)
    run_directory.write(run_dir, config)
    if data.tokenizer is not None:
        run_directory.keep_tokenizer(run_dir, data.tokenizer)

    with Checkpoints(run_dir, config.training.keep_last) as checkpoints:
        if checkpoints.latest is None:
            params = _first_params(config, model)
            state = create_state(params, optimizer, config.training.seed)
        else:
            state = _restore(checkpoints, optimizer, abstract, config, data)
        run = _Run(config, run_dir, model, data, checkpoints)
        return run.go(step, state, batches)


def _check_attention(name: str | None) -> None:
    needed = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}.get(name)
    here = jax.default_backend()
    if needed is not None and needed != here:
        raise ConfigError(
            f"model.attention is {name}, which needs a {needed.upper()}; JAX runs on {here} here; "
            "leave it out to take what fits"
        )


def _first_params(config: TrainConfig, model: RePoLM):
    """New weights, or those of `init.checkpoint`."""
    rng = jax.random.key(config.training.seed)
    if config.init.checkpoint is None:
        tokens = jnp.zeros((1, 2), jnp.int32)
        return nn.unbox(jax.jit(model.init)(rng, tokens)["params"])
    from repo_jax.interop import from_pretrained

    _, params = from_pretrained(
        config.init.checkpoint,
        param_dtype=config.model.param_dtype,
        positions=config.model.positions,
        rng=rng,
        revision=config.init.revision,
    )
    return params


def _check_init(config: TrainConfig) -> None:
    """Raises ConfigError unless the model fits `init.checkpoint`; reads no weights."""
    if config.init.checkpoint is None:
        return
    from repo_jax.interop.checkpoint import Checkpoint
    from repo_jax.interop.hub import locate
    from repo_jax.interop.load import Source, resolve_config

    checkpoint = Checkpoint(locate(config.init.checkpoint, config.init.revision))
    stored, _ = resolve_config(checkpoint, None, None)
    for name in _SHARED:
        theirs, ours = getattr(stored, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(
                f"model.{name} is {ours}, but init.checkpoint {config.init.checkpoint} "
                f"has {theirs}; give that"
            )
    wanted = dataclasses.replace(stored, positions=config.model.positions)
    Source(checkpoint, stored, wanted, None)


def _restore(checkpoints, optimizer, abstract, config: TrainConfig, data: Data) -> TrainState:
    state = jax.eval_shape(
        lambda params: create_state(params, optimizer, config.training.seed), abstract
    )
    state, saved = checkpoints.restore(state, checkpoints.latest)
    if saved["fingerprint"] != data.fingerprint:
        raise ConfigError(
            f"the training data are not those that the run in {checkpoints.folder.parent} was "
            "started on (another length or other tokens); bring those back, or name another "
            "--run_dir"
        )
    return state


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[str]]:
    """A list that is no longer empty once SIGTERM or Ctrl-C came; a second Ctrl-C interrupts."""
    seen: list[str] = []

    def handle(number, frame):
        del frame
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where nobody can be told
        before = {}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """What a run does around its steps: numbers, validation, checkpoints, stopping."""

    def __init__(self, config, run_dir, model, data: Data, checkpoints: Checkpoints):
        self.config, self.run_dir, self.model, self.data = config, run_dir, model, data
        self.checkpoints = checkpoints
        self.best = checkpoints.best_loss or math.inf
        self.last_validation: Score | None = None
        self.validated_at: int | None = None

    def go(self, step, state: TrainState, batches) -> Summary:
        """Runs the steps that are left."""
        training = self.config.training
        tokens_per_step = self.config.data.batch_size * self.config.data.sequence_length
        first = done = int(state.step)
        writer = MetricsWriter(self.run_dir, training, first)
        bar = tqdm(
            total=training.steps,
            initial=first,
            unit="step",
            disable=not (training.progress and sys.stderr.isatty()),
        )
        source = batches.iterate(first)
        pending = None  # numbers of the step before, read while the next one runs
        timer = _Timer()

        def flush():
            nonlocal pending
            if pending is None:
                return
            number, metrics = pending
            pending = None
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            self._check_finite(number, {name: values[name] for name in ("loss", "grad_norm")})
            values.pop("targets")
            if number % training.log_every == 0 or number in (first + 1, training.steps):
                seconds = timer.lap(number - first)
                values["tokens_per_second"] = seconds and tokens_per_step / seconds
                values["step_seconds"] = seconds
                writer.write(number, **values, tokens=number * tokens_per_step)
                self._show(bar, number, values)
            bar.update(1)

        with _stop_on_signals() as signals:
            try:
                while done < training.steps and not signals:
                    state, metrics = step(state, next(source))
                    flush()
                    done += 1
                    pending = (done, metrics)
                    finished = done == training.steps
                    if finished or self._due(training.validate_every, done):
                        flush()
                        with timer.paused():
                            self._validate(state, writer)
                    if finished or self._due(training.checkpoint_every, done):
                        flush()
                        with timer.paused():
                            self._save(state)
                flush()
                self._save(state)
                self.checkpoints.wait()
            finally:
                source.close()
                writer.close()
                bar.close()
        if signals:
            print(
                f"{signals[0]}: saved step {done} to {self.run_dir}; the same command goes on",
                file=sys.stderr,
            )
        rate = timer.mean_rate()
        return Summary(
            done, done >= training.steps, self.last_validation, rate and tokens_per_step * rate
        )

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

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

    def _validate(self, state: TrainState, writer: MetricsWriter) -> None:
        """Scores held-out windows; a new best is saved at once."""
        step = int(state.step)
        if not self.data.validation or self.validated_at == step:
            return
        training = self.config.training
        micro = self.config.data.batch_size // training.accumulation
        batches = self.data.validation_batches(
            batch_size=micro, max_windows=training.validation_windows
        )
        result = score(
            *(self.model, state.params, batches, self.data.byte_lengths),
            chunk=training.loss_chunk,
        )
        self._check_finite(step, {"val_loss": result.loss})
        self.last_validation, self.validated_at = result, step
        values = {"val_loss": result.loss}
        if result.bits_per_byte is not None:
            values["val_bits_per_byte"] = result.bits_per_byte
        writer.write(step, **values)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
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
        }
        loss = self.last_validation.loss if self.validated_at == step else None
        self.checkpoints.save(state, data, loss)

    def _show(self, bar: tqdm, step: int, values: dict[str, float]) -> None:
        loss, rate = values["loss"], values["tokens_per_second"]
        speed = "" if rate is None else f", {rate:,.0f} tokens/s"
        if not bar.disable:
            bar.set_postfix_str(f"loss {loss:.3f}{speed}", refresh=False)
        elif step % max(1, self.config.training.steps // 20) == 0:
            print(f"step {step}: loss {loss:.4f}{speed}", file=sys.stderr, flush=True)


class _Timer:
    """Seconds per step since the last lap; the first step, which compiles, does not count."""

    def __init__(self):
        self._lap_start: float | None = None
        self._lap_step = 0
        self._total = 0.0
        self._counted = 0

    def lap(self, step: int) -> float | None:
        """Seconds per step since the lap before; None at the first."""
        now = time.perf_counter()
        seconds = None
        if self._lap_start is not None and step > self._lap_step:
            elapsed = now - self._lap_start
            seconds = elapsed / (step - self._lap_step)
            self._total += elapsed
            self._counted += step - self._lap_step
        self._lap_start, self._lap_step = now, step
        return seconds

    @contextlib.contextmanager
    def paused(self):
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        if self._lap_start is not None:
            self._lap_start += time.perf_counter() - start

    def mean_rate(self) -> float | None:
        """Steps per second over all laps."""
        return self._counted / self._total if self._total else None
