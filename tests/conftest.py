"""What every test runs under."""

import os

# Eight CPU devices, for sharding tests; read once, when jax first makes its backend.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Pallas' interpreters wait inside callbacks, each in a thread of XLA's pool; with fewer
# threads than devices or blocks that wait for each other nothing goes on.
os.environ.setdefault("NPROC", "8")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Compiling dominates the first example, so a deadline would only measure that.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")
