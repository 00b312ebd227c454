"""The plan command."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from repo_jax import cli
from repo_jax.config import TrainConfig
from repo_jax.errors import ConfigError
from repo_jax.planning import targets


@dataclasses.dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training run, as train.py reads it; its data need not be named."""

    def __post_init__(self):
        data = self.data
        if not (data.text or data.tokens or data.sources):
            object.__setattr__(self, "data", dataclasses.replace(data, tokens=("not read",)))
        super().__post_init__()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the plan; SystemExit 1 if the run does not fit."""

    def add(parser):
        parser.add_argument(
            "--topology", type=str, required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8 or h200:8."
        )
        parser.add_argument("--json", type=str, help="Also write the numbers to this new file.")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="A --json file that is there is replaced."
        )

    what = "Compiles a run for hardware that need not be there, and says what it would cost."
    config, options = cli.parse(PlanConfig, "plan", what, arguments, add)
    if config.mesh.slices > 1:
        raise ConfigError(f"mesh.slices is {config.mesh.slices}; only one slice can be planned")
    path = Path(options.json) if options.json else None
    if path:
        cli.check_file("--json", path, overwrite=options.overwrite)
    targets.prepare()
    topology = targets.topology(options.topology)

    from repo_jax.planning import plan, report

    found = plan.plan(config, topology)
    print(report.text(found))
    if path:
        with cli.writing("--json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report.plain(found), indent=1) + "\n", encoding="utf-8")
    if not found.memory.fits:
        print(f"\n{report.advice(found)}")
        raise SystemExit(1)


def run() -> None:
    """The console script."""
    cli.run(main)
