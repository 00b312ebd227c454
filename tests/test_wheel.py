"""Whoever installs the wheel has all that a checkout has but its tests."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.tiny_runs import ROOT

PACKAGES = ("repo_jax", "pallas_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, which pip would download."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def files_of(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]


def test_it_has_every_file_of_the_packages_and_every_config(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    wanted = {path.relative_to(ROOT): path for name in PACKAGES for path in files_of(ROOT / name)}
    wanted |= {"repo_jax" / path.relative_to(ROOT): path for path in files_of(ROOT / "configs")}
    for name in (
        "repo_jax/configs/quickstart.yaml",
        "repo_jax/configs/evidence/tiny.yaml",
        "repo_jax/evaluation/harness/tasks/needle_single.yaml",
        "repo_jax/evaluation/harness/tasks/_needles_yaml",
        *(f"repo_jax/analysis/page/page.{suffix}" for suffix in ("html", "css", "js")),
    ):
        assert Path(name) in wanted
    for name, path in wanted.items():
        assert packed.get(name.as_posix()) == path.read_bytes(), name
    others = {name for name in packed if not name.startswith(tuple(f"{p}/" for p in PACKAGES))}
    assert all(".dist-info/" in name for name in others)


def test_what_reads_its_own_files_finds_them_there(wheel, tmp_path):
    """Unpacked, with no checkout around."""
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = """
        from repo_jax import cli
        from repo_jax.analysis.page.build import render
        from repo_jax.evidence import suite

        print(cli.config_file("quickstart"))
        assert suite.load("tiny").experiments
        assert "<html" in render({})
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(installed / "repo_jax" / "configs" / "quickstart.yaml")
