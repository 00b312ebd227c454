"""python eval.py --run runs/quickstart | --model FOLDER_OR_HUB_ID [...]"""

from repo_jax.evaluation.command import run

if __name__ == "__main__":
    run()
