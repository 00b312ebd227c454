"""Processes that start together and wait for each other."""

import os
import subprocess
import sys
import textwrap

from tests.tiny_runs import ROOT, free_address


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A process that runs `program`, with output to read."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_named_process_takes_all_devices_under_slurm_too():
    program = """
        import sys
        import jax
        from repo_jax import distributed
        distributed.start(coordinator=sys.argv[1], num_processes=1, process_id=0)
        print(jax.config.read("jax_cuda_visible_devices"))
    """
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "8"}
    slurm |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    out, errors = start(program, free_address(), **slurm).communicate(timeout=120)
    assert out == "all\n", errors


def test_who_waits_for_process_0_is_in_no_collective():
    # It would give up there, after half a minute on CPUs.
    program = """
        import sys
        import time
        from jax.experimental import multihost_utils
        from repo_jax import distributed

        distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
        gather, began = multihost_utils.process_allgather, []

        def noted(x):
            began.append(time.time())
            return gather(x)

        def work():
            time.sleep(1)
            return time.time()

        multihost_utils.process_allgather = noted
        done = distributed.on_main(work)
        print(began[0] >= done)
    """
    address = free_address()
    for process in [start(program, address, str(i)) for i in range(2)]:
        out, errors = process.communicate(timeout=120)
        assert out.splitlines()[-1] == "True", errors
