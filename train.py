"""python train.py --config configs/quickstart.yaml [--training.steps 200 ...]"""

from repo_jax.training.command import run

if __name__ == "__main__":
    run()
