"""python -m repo_jax.generate: continues a prompt with a run or a model."""

import sys

from repo_jax.inference import command, generate

if __name__ == "__main__":
    command.run()
else:
    # `repo_jax.generate` is a public function; importing this module must not replace it.
    sys.modules[__name__] = generate
