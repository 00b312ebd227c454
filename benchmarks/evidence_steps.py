"""Seconds of a training step of each method, in the models of an evidence suite.

    python -m benchmarks.evidence_steps --suite laptop

Contenders: the suite's methods, in models matched in parameters, on the same batches: the step that
`repo_jax.evidence` takes for one seed, ten of them a call, on one core as there. Rounds alternate;
see harness.py for that and for the intervals. The suite itself runs cells side by side, so its own
times are an indication only.

Limits:
* One machine; small models, in which the methods differ more than in large ones.
* Compilation and the making of batches are not counted.
* Seeds that train together, as on a GPU, are another program.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from repo_jax.evidence.cell import training_steps
from repo_jax.evidence.methods import parameter_count
from repo_jax.evidence.suite import Cell, load
from repo_jax.flops import model_flops_per_token
from repo_jax.modeling import RePoLM, init_params
from repo_jax.training.step import create_state

STEPS = 10
BASELINE = "rope"


def options():
    p = harness.parser(__doc__.splitlines()[0])
    p.set_defaults(threads=1)
    p.add_argument("--suite", default="laptop")
    p.add_argument("--methods", default="", help="beside rope, instead of the suite's, with commas")
    return p


def contender(cell: Cell, seed: int) -> harness.Contender:
    method, config = cell.method_and_model()
    model, task = RePoLM(config), cell.task
    optimizer, steps = training_steps(cell, model, method.index_weight)
    steps = jax.jit(steps, donate_argnums=0)
    state = create_state(init_params(model, jax.random.key(seed)), optimizer, seed)
    made = [task.training_batch(seed, i, cell.definition.batch_size) for i in range(STEPS)]
    given = [jnp.asarray(np.stack([getattr(m, k) for m in made])) for k in ("tokens", "answers")]

    def run():
        nonlocal state
        state, losses = steps(state, *given)
        return losses

    return harness.jax_contender(run)


def main():
    args = options().parse_args()
    path = harness.prepare(args, f"evidence_steps_{args.suite}")
    methods = [name for name in args.methods.split(",") if name]
    methods = list(dict.fromkeys([BASELINE, *methods])) if methods else []
    cells = load(args.suite, methods=methods, seeds=[args.seed]).cells()
    lines, data = [], {}
    for experiment in dict.fromkeys(cell.experiment for cell in cells):
        own = {cell.method: cell for cell in cells if cell.experiment == experiment}
        times, _ = harness.measure({m: contender(c, args.seed) for m, c in own.items()}, args)
        rows, found = [], {}
        for method, cell in own.items():
            _, config = cell.method_and_model()
            ratio = harness.compare(times[method], times[BASELINE], args.seed)
            found[method] = {
                "parameters": parameter_count(config),
                "flops_per_token": model_flops_per_token(config, cell.task.length),
                "step_seconds": statistics.median(times[method]) / STEPS,
                "time_over_rope": ratio,
                "call_seconds": times[method],
            }
            rows.append(
                f"{method} | {found[method]['parameters']:,} | "
                f"{found[method]['flops_per_token'] / 1e6:.2f} | "
                f"{1e3 * found[method]['step_seconds']:.1f} | "
                + ("1 |" if method == BASELINE else harness.show(ratio))
            )
        head = ("method", "parameters", "MFLOP a token", "ms a step", "time / RoPE's", "95 %")
        run = next(iter(own.values())).definition
        lines += [f"{experiment}: B {run.batch_size}, T {run.task.length}, {cells[0].dtype}.", ""]
        lines += harness.table(head, rows)
        data[experiment] = found
    harness.report(path, f"Training steps of the suite {args.suite}", lines, data, args, None)


if __name__ == "__main__":
    main()
