"""The generate command."""

import dataclasses
from collections.abc import Sequence

from repo_jax import cli
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.inference.sampling import generate


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and with what.

    Attributes:
      prompt: the text to continue.
      run: a run directory.
      model: instead, a local folder or a hub id in Hugging Face's layout.
      step: of the run: `latest`, `best`, or a number.
      revision: of the hub id.
      tokenizer: a tokenizer.json or its folder; None: the run's or the model folder's.
      max_new_tokens: most tokens to add.
      temperature: 0 takes the likeliest token each time.
      top_k: sample among the k likeliest.
      top_p: sample among the fewest tokens whose probability reaches p.
      seed: of the draws.
    """

    prompt: str
    run: str | None = None
    model: str | None = None
    step: str = "latest"
    revision: str | None = None
    tokenizer: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.run is None) == (self.model is None):
            raise ConfigError(
                "give one of --run (a run directory) and --model (a folder or hub id)"
            )
        if not self.prompt:
            raise ConfigError("--prompt is empty; give at least one character")


def load(config):
    """Model, parameters and the folder to look for a tokenizer in, of --run or --model."""
    if config.run is not None:
        from repo_jax.training.checkpoints import load_run

        return *load_run(config.run, config.step), config.run
    from repo_jax.interop import from_pretrained
    from repo_jax.interop.hub import locate

    folder = locate(config.model, config.revision)
    return *from_pretrained(folder), folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the prompt and its continuation."""
    config, _ = cli.parse(GenerateConfig, "generate", "Continues a prompt.", arguments)
    model, params, folder = load(config)
    tokenizer = Tokenizer.load(config.tokenizer or folder)
    try:
        (ids,) = generate(
            *(model, params, [tokenizer.encode(config.prompt)]),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(config.prompt + tokenizer.decode(ids))


def run() -> None:
    """The console script."""
    cli.run(main)
