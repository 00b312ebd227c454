"""What every test runs under."""

import os

# Eight CPU devices, for sharding tests; read once, when jax first makes its backend.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Pallas' interpreters and CPU devices that exchange arrays wait in threads of XLA's pool, a
# device in as many as its program has exchanges at once; with too few nothing goes on.
os.environ.setdefault("NPROC", "32")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Compiling dominates the first example, so a deadline would only measure that.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")

# Most programs here run once or a few times, so that compiling them is what takes time.
_UNOPTIMIZED = "jax_disable_most_optimizations"
jax.config.update(_UNOPTIMIZED, True)


@pytest.fixture(scope="module")
def optimized():
    """As users' programs are compiled, from here to the end of the module."""
    jax.clear_caches()
    jax.config.update(_UNOPTIMIZED, False)
    yield
    jax.clear_caches()
    jax.config.update(_UNOPTIMIZED, True)


@pytest.fixture
def device_flops(monkeypatch):
    """`device_flops(module, name)`: FLOPs of one device in each call of that jitted function from
    then on, in a list that grows."""

    def watch(module, name: str) -> list[float]:
        program, found = getattr(module, name), []

        def watched(*args, **kwargs):
            compiled = program.lower(*args, **kwargs).compile()
            found.append(compiled.cost_analysis()["flops"])
            return program(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
        return found

    return watch
