"""The generate command."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

from repo_jax import cli
from repo_jax.config import Dtype, MeshConfig, RopeScaling
from repo_jax.data import Tokenizer, check_vocabulary
from repo_jax.errors import ConfigError
from repo_jax.inference.generator import Generator
from repo_jax.inference.loading import config_of, folder_of, load, open_mesh
from repo_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and with what.

    Without `prompt` and `prompt_file`, prompts are read from standard input, a line each.

    Attributes:
      prompt: the text to continue.
      prompt_file: instead, a file with the text to continue.
      run: a run directory.
      model: instead, a local folder or a hub id in Hugging Face's layout.
      step: of the run: `latest`, `best`, or a number.
      revision: of the hub id.
      tokenizer: a tokenizer.json or its folder; None: the run's or the model folder's.
      dtype: of activations, and of the weights as they are used; None: as the run was trained, and
        float32 for a model.
      rope_scaling: YaRN, for contexts longer than the model was trained on.
      mesh: how all devices share the model, say `--mesh.tensor 8`; None: one has all of it.
      max_new_tokens: most tokens to add.
      temperature: 0 takes the likeliest token each time.
      top_k: sample among the k likeliest.
      top_p: sample among the fewest tokens whose probability reaches p.
      min_p: sample among tokens at least p times as likely as the likeliest.
      repetition_penalty: above 1, tokens that are there already become less likely.
      stop: a list of strings that end the continuation, say '["END", "[/INST]"]'; they are not
        printed.
      seed: of the draws.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    run: str | None = None
    model: str | None = None
    step: str = "latest"
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Dtype | None = None
    rope_scaling: RopeScaling | None = None
    mesh: MeshConfig | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] | str = ()
    seed: int = 0

    def __post_init__(self):
        if (self.run is None) == (self.model is None):
            raise ConfigError(
                "give one of --run (a run directory) and --model (a folder or hub id)"
            )
        if self.prompt is not None and self.prompt_file is not None:
            raise ConfigError("--prompt and --prompt_file are both given; give one")
        if self.prompt == "":
            raise ConfigError("--prompt is empty; give at least one character")
        try:
            self.sampling()
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens is {self.max_new_tokens}; it must be 1 or above")
        if isinstance(self.stop, str):  # one in brackets would be read as a list, without them
            listed = json.dumps([self.stop], ensure_ascii=False)
            raise ConfigError(
                f"--stop is {self.stop}; it must be a list of strings in quotes, such as '{listed}'"
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ConfigError("--stop has an empty string; each must have a letter or more")

    def sampling(self) -> Sampling:
        """What says how tokens are drawn."""
        names = (field.name for field in dataclasses.fields(Sampling))
        return Sampling(**{name: getattr(self, name) for name in names})


def _tokenizer(config: GenerateConfig) -> Tokenizer:
    place = config.tokenizer or folder_of(config)
    tokenizer = Tokenizer.load(place)
    check_vocabulary(f"the tokenizer {place}", tokenizer.vocab_size, config_of(config))
    return tokenizer


def _prompts(config: GenerateConfig) -> Iterator[str]:
    if config.prompt is not None:
        yield config.prompt
    elif config.prompt_file is not None:
        yield cli.read_text("--prompt_file", config.prompt_file)
    else:
        shown = "> " if sys.stdin.isatty() else ""
        while True:
            print(shown, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                yield line.rstrip("\n")


def _continue(generator: Generator, tokenizer: Tokenizer, prompt: str, config) -> None:
    """Prints the prompt and what follows it, as it comes."""
    print(prompt, end="", flush=True)
    printed, options = 0, dict(sampling=config.sampling(), seed=config.seed)
    options |= dict(max_new_tokens=config.max_new_tokens, stop_strings=config.stop)
    # What may be the start of a stop string, or of a character, is held back.
    held = max((len(stop) - 1 for stop in config.stop), default=0)
    text = ""
    for (completion,) in generator.stream(
        [tokenizer.encode(prompt)], tokenizer=tokenizer, **options
    ):
        text = tokenizer.decode(completion.ids)
        found = [at for stop in config.stop if (at := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
        sure = len(text) - (0 if found else held)
        while sure > printed and text[sure - 1] == "\N{REPLACEMENT CHARACTER}":
            sure -= 1
        if sure > printed:
            print(text[printed:sure], end="", flush=True)
            printed = sure
    print(text[printed:], flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each prompt and its continuation."""
    config, _ = cli.parse(GenerateConfig, "generate", "Continues prompts.", arguments)
    prompts = _prompts(config)
    if config.prompt_file is not None:
        prompts = iter(list(prompts))  # a file that is not there is told of first
    mesh = open_mesh(config, config.mesh)
    tokenizer = _tokenizer(config)
    loaded = load(config, config.dtype, mesh)
    generator = Generator(loaded.model, loaded.params, mesh=loaded.mesh)
    for prompt in prompts:
        try:
            _continue(generator, tokenizer, prompt, config)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def run() -> None:
    """The console script."""
    cli.run(main)
