"""What positions the models of an evidence suite learned, and what they are good for.

    python -m repo_jax.evidence --suite laptop
    python -m benchmarks.evidence_positions --suite laptop --run runs/evidence/laptop

For each model with learned positions, layer and head, on the first evaluation set of the size of
training, or the nearest to it:

* range: largest z minus smallest in a row, mean over rows; new: before training.
* by place: share of the variance of z that is explained by the index.
* by token: share that is explained by which token it is.
* mirror (reversal only): correlation of z of each letter and z of its copy, over letters and rows.

The first token of rows, which is always the same, is left out. The table has the least and the
most over heads and seeds; the JSON file every head.

Then the share of right answers (of text, bits per byte) in the suite's headline (or all) sets
when layers of the trained model lose their positions: mean over seeds, least and most.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from repo_jax.evidence import about, cell
from repo_jax.evidence.suite import Cell, load
from repo_jax.evidence.summary import means_over_kinds
from repo_jax.evidence.tasks import Reversal
from repo_jax.interop import from_pretrained
from repo_jax.modeling import RePoLM, capture_positions, init_params

MEASURES = ("new_range", "range", "by_place", "by_token", "mirror")


def explained(values: np.ndarray, labels: np.ndarray) -> float:
    """Share of the variance of `values` that lies between the groups of `labels`."""
    _, group = np.unique(labels, return_inverse=True)
    group, values = group.ravel(), values.ravel().astype(np.float64)
    count = np.bincount(group)
    means = np.bincount(group, values) / count
    return float(count @ (means - values.mean()) ** 2 / values.size / values.var())


def measure(c: Cell, folder: Path) -> list[dict]:
    """A row for each layer and head with learned positions."""
    model, params = from_pretrained(cell.model_path(folder, c))
    sets = c.task.evaluation_sets().values()
    tokens = min(sets, key=lambda s: abs(s.x - c.task.trained_to)).tokens
    captured = lambda params: np.asarray(
        capture_positions(model, params, jnp.asarray(tokens)), np.float64
    )
    z_BLNT = captured(params)
    new_BLNT = captured(init_params(model, jax.random.key(c.seed)))
    rows = []
    for layer in [i for i, kind in enumerate(model.config.kinds) if kind == "repo"]:
        for head in range(z_BLNT.shape[2]):
            z, read = z_BLNT[:, layer, head, 1:], tokens[:, 1:]
            row = {
                "new_range": float(np.ptp(new_BLNT[:, layer, head, 1:], axis=1).mean()),
                "range": float(np.ptp(z, axis=1).mean()),
                "by_place": explained(z, np.broadcast_to(np.arange(z.shape[1]), z.shape)),
                "by_token": explained(z, read),
            }
            if isinstance(c.task, Reversal) and not c.task.end:
                n = (z.shape[1] - 1) // 2  # letters, then the turn, then as many copies
                pairs = z[:, :n].ravel(), z[:, n + 1 :][:, ::-1].ravel()
                row["mirror"] = float(np.corrcoef(*pairs)[0, 1])
            rows.append({"layer": layer, "head": head, **row})
    return rows


def without(model: RePoLM, params, layers: tuple[int, ...]):
    """The model whose `layers` have no positions, with its parameters."""
    learned = [i for i, kind in enumerate(model.config.kinds) if kind == "repo"]
    kinds = ["nope" if i in layers else kind for i, kind in enumerate(model.config.kinds)]
    positions = dataclasses.replace(model.config.positions, layers=tuple(kinds))
    stacked = {**params["layers"]}
    kept = np.array([i not in layers for i in learned])
    f_phi = jax.tree.map(lambda x: x[kept], stacked.pop("repositioning"))
    stacked |= {"repositioning": f_phi} if kept.any() else {}
    config = dataclasses.replace(model.config, positions=positions)
    return RePoLM(config), {**params, "layers": stacked}


def ablate(c: Cell, folder: Path) -> list[dict]:
    """A row for each choice of layers and each evaluation set, means over kinds too."""
    model, params = from_pretrained(cell.model_path(folder, c))
    kinds, weight = model.config.kinds, c.method_and_model()[0].index_weight
    learned = tuple(i for i, kind in enumerate(kinds) if kind == "repo")
    choices = [(), *((i,) for i, kind in enumerate(kinds) if kind != "nope"), learned]
    rows = []
    for layers in dict.fromkeys(choices):
        (found,) = cell.evaluate([c], *without(model, params, layers), weight)
        rows += [
            {"without": list(layers), "set": row["set"], "value": row[c.task.metric]}
            for row in [*found, *means_over_kinds(found)]
        ]
    return rows


def grouped(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by what they have under `names`."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def position_table(rows: list[dict]) -> list[str]:
    """Markdown of what `measure` found."""

    def span(same, name):
        found = [row[name] for row in same if name in row]
        return f"{min(found):.2f} to {max(found):.2f}" if found else "-"

    return harness.table(
        ("experiment", "method", "layer", *(name.replace("_", " ") for name in MEASURES)),
        (
            " | ".join([*map(str, key), *(span(same, name) for name in MEASURES)])
            for key, same in grouped(rows, "experiment", "method", "layer").items()
        ),
    )


def ablation_table(rows: list[dict], sets) -> list[str]:
    """Markdown of what `ablate` found on some evaluation sets."""
    rows = [{**row, "layers": ", ".join(map(str, row["without"])) or "none"} for row in rows]

    def share(same, name):
        found = [row["value"] for row in same if row["set"] == name]
        return f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    return harness.table(
        ("method", "layers without", *(name.replace("_", " ") for name in sets)),
        (
            " | ".join([*key, *(share(same, name) for name in sets)])
            for key, same in grouped(rows, "method", "layers").items()
        ),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--suite", default="laptop")
    p.add_argument("--tasks", default="", help="experiments, with commas between; default all")
    p.add_argument("--run", type=Path, help="folder of the suite; default runs/evidence/SUITE")
    p.add_argument("--results_dir", type=Path, default=harness.HERE / "results")
    p.add_argument("--overwrite", action="store_true", help="replace today's results")
    args = p.parse_args()
    folder = args.run or Path("runs/evidence") / args.suite
    path = args.results_dir / f"{datetime.date.today()}-evidence_positions_{args.suite}"
    if path.with_suffix(".json").exists() and not args.overwrite:
        raise SystemExit(f"{path}.json exists; give --overwrite to replace it")
    suite = load(args.suite, experiments=args.tasks.split(",") if args.tasks else ())
    cells = [
        c
        for c in suite.cells()
        if "repo" in c.method_and_model()[1].kinds and cell.model_path(folder, c).is_dir()
    ]
    if not cells:
        raise SystemExit(f"{folder} has no model with learned positions; run the suite first")
    name_of = lambda c: {"experiment": c.experiment, "method": c.method, "seed": c.seed}
    rows = [{**name_of(c), **row} for c in cells for row in measure(c, folder)]
    ablations = [{**name_of(c), **row} for c in cells for row in ablate(c, folder)]
    title = f"Learned positions of the suite {args.suite}, {datetime.date.today()}"
    tasks = f" --tasks {args.tasks}" if args.tasks else ""
    lines = [
        *(f"# {title}", "", "What it means is in the script.", ""),
        *("Least and most over heads and seeds:", ""),
        *position_table(rows),
    ]
    for name, experiment in suite.experiments.items():
        own = [row for row in ablations if row["experiment"] == name]
        if own:
            sets = experiment.headline or list(dict.fromkeys(row["set"] for row in own))
            what = {"exact": "Right answers", "bits_per_byte": "Bits per byte"}
            title = f"{what[experiment.task.metric]} of {name}"
            lines += [f"{title}, mean over seeds (least to most):", ""]
            lines += ablation_table(own, sets)
    lines += [
        f"- {len(cells)} models; commit {about.commit()}",
        f"- `python -m benchmarks.evidence_positions --suite {args.suite}{tasks}`",
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    path.with_suffix(".md").write_text(text)
    facts = {"commit": about.commit(), "versions": about.versions()}
    whole = {**facts, "rows": rows, "ablations": ablations}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
