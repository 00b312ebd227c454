"""One cell: trains a model on a task, tests it, and says what came out."""

import dataclasses
import datetime
import functools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from repo_jax.config import OptimizerConfig, PositionConfig, TrainingConfig
from repo_jax.evidence import about
from repo_jax.evidence.methods import parameter_count
from repo_jax.evidence.suite import Cell, definition
from repo_jax.evidence.tasks import EvaluationSet, score
from repo_jax.flops import model_flops_per_token
from repo_jax.interop import from_pretrained, save_pretrained
from repo_jax.modeling import RePoLM, abstract_params, init_params
from repo_jax.training.loss import cross_entropy
from repo_jax.training.optimizer import make_optimizer
from repo_jax.training.step import TrainState, create_state

SCHEMA = 2

# Steps of one jitted call, at most.
_CHUNK = 50
_LOSS_POINTS = 50
_EVALUATION_TOKENS = 16_384
_LOSS_CHUNK = 16_384

# Called with the steps done and the loss at the last one; stops the cell by raising.
Watch = Callable[[int, float], None]


def cell_path(out: Path, cell: Cell) -> Path:
    """Where a finished cell's record is."""
    return out / "cells" / f"{cell.name}.json"


def model_path(out: Path, cell: Cell) -> Path:
    """Where a finished cell's model is, in the library's own format."""
    return out / "models" / cell.name


def run(
    cells: Sequence[Cell],
    out: Path,
    watch: Watch = lambda step, loss: None,
    *,
    commit: str = "unknown",
) -> None:
    """Runs a cell, or cells that differ in the seed alone together, and writes what came out.

    For each cell a folder that `from_pretrained` reads, with a tokenizer, and then, when all are
    there, the records. The numbers are a function of the cell, the software and the kind of
    machine; of several together, also of which ones.

    Args:
      cells: one; several are for devices that are no CPUs, on which jaxlib 0.10.2 got some
        vmapped gradients wrong.
      out: folder of the suite.
      watch: see `Watch`; called again before anything is written.
      commit: of this code, for the records.
    """
    start = time.perf_counter()
    first = cells[0]
    method, config = first.method_and_model()
    # Not every kernel can be mapped over seeds.
    attention = "xla" if len(cells) > 1 else None
    model = RePoLM(dataclasses.replace(config, attention=attention))
    params, losses, step_seconds = _train(
        cells, model, _begin(cells, model, out, watch), method.index_weight, watch
    )
    scores = evaluate(cells, model, params, method.index_weight)
    seconds = time.perf_counter() - start
    run = first.definition
    watch(run.all_steps, float(losses[:, -1].mean()))
    for i, cell in enumerate(cells):
        folder = model_path(out, cell)
        # Of a cell that was stopped before its record; a finished one is never run again.
        shutil.rmtree(folder, ignore_errors=True)
        _save_model(folder, RePoLM(config), _one(params, i, len(cells)), cell)
    for i, cell in enumerate(cells):
        record = {
            "schema": SCHEMA,
            "experiment": cell.experiment,
            "method": cell.method,
            "seed": cell.seed,
            "x_label": cell.task.x_label,
            "trained_to": cell.task.trained_to,
            "metric": cell.task.metric,
            "headline": list(run.headline),
            "steps": run.steps,
            "rope_steps": run.rope_steps,
            "batch_size": run.batch_size,
            "length": cell.task.length,
            "index_weight": method.index_weight,
            "parameters": parameter_count(config),
            "d_ff": config.d_ff,
            "flops_per_token": model_flops_per_token(config, cell.task.length),
            "train_loss": _finite(losses[i, -max(1, run.steps // 20) :].mean()),
            "losses": [_finite(part.mean()) for part in _parts(losses[i])],
            "step_seconds": step_seconds,
            "seconds": seconds,
            "seeds_together": [cell.seed for cell in cells],
            "config_hash": cell.config_hash(),
            "config": definition(run, cell.dtype),
            "hardware": about.hardware(),
            "versions": about.versions(),
            "commit": commit,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "evaluations": scores[i],
        }
        write(cell_path(out, cell), json.dumps(record, indent=1) + "\n")


def write(path: Path, content: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def _finite(value) -> float | None:
    return float(value) if math.isfinite(value) else None


def _parts(losses: np.ndarray) -> list[np.ndarray]:
    return np.array_split(losses, min(_LOSS_POINTS, len(losses)))


def _save_model(folder: Path, model: RePoLM, params, cell: Cell) -> None:
    """All of the folder or none; one that is there is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder.parent) as part:
        whole = Path(part) / folder.name
        save_pretrained(whole, model, params, format="repo_jax")
        cell.task.tokenizer().save(whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was sooner, with the same weights
            if not folder.is_dir():
                raise


def _optimizer_config(cell: Cell, has_positions: bool) -> OptimizerConfig:
    config, rate = cell.definition.optimizer, cell.definition.position_rate
    if rate == 1.0 or not has_positions:
        return config
    return dataclasses.replace(config, rates={"layers/repositioning/.*": rate, **config.rates})


def _begin(cells: Sequence[Cell], model: RePoLM, out: Path, watch: Watch) -> list[Any]:
    """The weights that each cell begins with."""
    new = [init_params(model, jax.random.key(cell.seed)) for cell in cells]
    if not cells[0].definition.rope_steps:
        return new
    old = _after_rope(cells, model, out, watch)
    both = lambda new, old: unflatten_dict(flatten_dict(new) | flatten_dict(old))
    return [both(*weights) for weights in zip(new, old, strict=True)]


def _after_rope(cells: Sequence[Cell], model: RePoLM, out: Path, watch: Watch) -> list[Any]:
    """The weights that RoPE comes to in each cell's `rope_steps`. All methods continue them, so
    they are kept in `out`."""
    run = cells[0].definition
    run = dataclasses.replace(run, steps=run.rope_steps, rope_steps=None)
    positions = PositionConfig(preset="rope")
    model = RePoLM(dataclasses.replace(model.config, positions=positions))
    cells = [dataclasses.replace(cell, method="rope", definition=run) for cell in cells]
    folders = [out / "continued" / f"{cell.name}-{cell.config_hash()}" for cell in cells]
    if not all(folder.is_dir() for folder in folders):
        new = [init_params(model, jax.random.key(cell.seed)) for cell in cells]
        params, *_ = _train(cells, model, new, 0.0, watch)
        for i, (cell, folder) in enumerate(zip(cells, folders, strict=True)):
            _save_model(folder, model, _one(params, i, len(cells)), cell)
    return [from_pretrained(folder)[1] for folder in folders]


def _one(params, i: int, n: int):
    """Of cell i of n that were trained together."""
    return jax.tree.map(lambda x: x[i], params) if n > 1 else params


def _train(
    cells: Sequence[Cell], model: RePoLM, begin: list[Any], index_weight: float, watch: Watch
):
    """Parameters (with a leading axis if there are several cells), losses [cells, steps], and
    seconds of a step, for all cells together, without compilation.

    begin: the weights of each cell before.
    """
    run, task, several = cells[0].definition, cells[0].task, len(cells) > 1
    before = run.rope_steps or 0
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees) if several else trees[0]
    optimizer, steps = training_steps(cells[0], model, index_weight)
    new = jax.jit(lambda params: create_state(params, optimizer, seed=0))
    state = stack([new(params) for params in begin])
    del begin  # and its memory
    steps = jax.jit(jax.vmap(steps) if several else steps, donate_argnums=0)

    def batches(cell: Cell, first: int):
        chunk = range(before + first, before + min(first + _CHUNK, run.steps))
        made = [task.training_batch(cell.seed, step, run.batch_size) for step in chunk]
        return [np.stack([getattr(m, name) for m in made]) for name in ("tokens", "answers")]

    losses, seconds, compiled = [], [], {}
    with ThreadPoolExecutor(len(cells)) as pool:
        ask = lambda first: [pool.submit(batches, cell, first) for cell in cells]
        coming: list[Future] = ask(0)
        for first in range(0, run.steps, _CHUNK):
            size = min(_CHUNK, run.steps - first)
            given = stack([future.result() for future in coming])
            if size not in compiled:
                compiled[size] = steps.lower(state, *given).compile()
            start = time.perf_counter()
            state, found = compiled[size](state, *given)
            if first + size < run.steps:
                coming = ask(first + size)
            losses.append(np.asarray(found).reshape(len(cells), size))
            seconds.append((time.perf_counter() - start) / size)
            watch(before + first + size, float(losses[-1][:, -1].mean()))
    return state.params, np.concatenate(losses, 1), float(np.median(seconds))


def training_steps(
    cell: Cell, model: RePoLM, index_weight: float
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer, and `steps(state, tokens, answers) -> state, losses` on as many batches as
    are stacked, to be jitted by the caller.

    state: `create_state` of the optimizer; tokens int32 [K, B, T]; answers bool [K, B, T]; losses
    float32 [K], the mean cross-entropy over each batch, as the experiment's `loss_over` says.
    """
    run = cell.definition
    optimizer = make_optimizer(
        _optimizer_config(cell, "repo" in model.config.kinds),
        TrainingConfig(steps=run.steps),
        abstract_params(model),
    )

    def loss(params, tokens, answers):
        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.roll(answers, -1, axis=1).astype(jnp.float32)
        if run.loss_over == "examples":
            weights /= jnp.maximum(weights.sum(1, keepdims=True), 1.0)
        weights /= jnp.maximum(weights.sum(), 1.0)
        hidden = model.apply({"params": params}, tokens, None, index_weight, method="hidden")
        kernel = params["head"]["kernel"]
        sums = cross_entropy(hidden, kernel, targets, weights, z_loss=run.z_loss, chunk=_LOSS_CHUNK)
        return sums.loss, sums.ce

    def step(state: TrainState, batch):
        grads, ce = jax.grad(loss, has_aux=True)(state.params, *batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), ce

    return optimizer, lambda state, tokens, answers: jax.lax.scan(step, state, (tokens, answers))


def evaluate(
    cells: Sequence[Cell], model: RePoLM, params, index_weight: float
) -> list[list[dict[str, Any]]]:
    """One list of results a cell, a result being a dict for each evaluation set.

    Args:
      cells: one, or several that differ in the seed alone.
      model: for all of them.
      params: of one; of several, with a leading axis.
      index_weight: as in `Method`.
    """

    def predict(params, tokens):
        logits = model.apply({"params": params}, tokens, None, index_weight).logits[:, :-1]
        targets = tokens[:, 1:, None]
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets, 2)[..., 0]
        return logits.argmax(-1), nll

    several = len(cells) > 1
    run = jax.jit(jax.vmap(predict, in_axes=(0, None)) if several else predict)
    results: list[list[dict[str, Any]]] = [[] for _ in cells]
    for name, examples in cells[0].task.evaluation_sets().items():
        predicted, nll = _predict(functools.partial(run, params), examples, several)
        for i, rows in enumerate(results):
            rows.append(_row(name, cells[0], examples, predicted[i], nll[i]))
    return results


def _predict(run, examples: EvaluationSet, several: bool):
    """Predicted tokens and their losses, [cells, n, T]; nothing predicts the first token."""
    n, T = examples.tokens.shape
    # Few lengths, so that there are few programs. What is added comes after all answers.
    length = -(-T // 32) * 32
    rows = min(n, max(1, _EVALUATION_TOKENS // length))
    tokens = np.pad(examples.tokens, ((0, -n % rows), (0, length - T)))
    found = [run(tokens[start : start + rows]) for start in range(0, n, rows)]
    whole = []
    for parts in zip(*found, strict=True):
        parts = [np.asarray(part) if several else np.asarray(part)[None] for part in parts]
        joined = np.concatenate(parts, 1)[:, :n, : T - 1]
        whole.append(np.pad(joined, ((0, 0), (0, 0), (1, 0))))
    return whole


def _row(name: str, cell: Cell, examples: EvaluationSet, predicted, nll) -> dict[str, Any]:
    found = score(predicted, examples)
    losses = nll[examples.answers].astype(np.float64)
    row = {
        "set": name,
        "group": examples.group,
        "x": examples.x,
        "examples": len(examples.tokens),
        "exact": found.exact,
        "tokens": found.tokens,
        "loss": _finite(losses.mean()),
        "chance_exact": examples.chance_exact,
        "chance_tokens": examples.chance_tokens,
    }
    if cell.task.metric == "bits_per_byte":
        # The end of a document is predicted too, but stands for no byte.
        is_byte = examples.tokens[examples.answers] < 256
        row["bits_per_byte"] = _finite(losses.sum() / is_byte.sum() / math.log(2))
    return row
