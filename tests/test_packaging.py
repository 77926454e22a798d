"""What gets into the wheel and the sdist, and what `import morphc` loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "kernels", "templates")


def _shipped() -> set[str]:
    """Names in the package as the checkout has them: Python files, py.typed and templates."""
    names = set()
    for folder in ("morphc", *ROOMS):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.is_file() and (path.suffix in (".py", ".jinja") or path.name == "py.typed"):
                names.add(str(inside if folder == "morphc" else Path("morphc") / inside))
    # rglob doesn't go through the links morphc/passes -> ../passes, or else each file would be here twice
    # under the same name, which a set doesn't mind.
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of the checkout: building writes into its source."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    _copy_checkout(copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", str(folder)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _copy_checkout(copy: Path) -> None:
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    for folder in ("morphc", *ROOMS):
        shutil.copytree(
            ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )


def test_rooms_are_links_into_the_package():
    for room in ROOMS:
        link = ROOT / "morphc" / room
        assert link.is_symlink()
        assert os.readlink(link) == f"../{room}"


def test_wheel_holds_what_the_checkout_holds(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _shipped()


def test_wheel_has_types_templates_licence_and_command(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert "morphc/py.typed" in names
    assert "morphc/templates/report.html.jinja" in names
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "morphc = morphc.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_sdist_holds_what_the_checkout_holds(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in _shipped() if name not in names}
    assert missing == set()


def test_sdist_builds_the_same_wheel(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "dist")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = (tmp_path / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(again).namelist() if ".dist-info/" not in name}
    assert names == _shipped()


def test_installed_wheel_runs_away_from_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = "import morphc, morphc.kernels, morphc.passes; from morphc.cli import main; main(['--version'])"
    done = _python("-c", f"print(__import__('morphc').__file__); {script}", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "morphc 0." in done.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_room_refuses_to_be_imported_by_its_bare_name(room):
    done = _python("-c", f"import {room}", cwd=ROOT, path=ROOT)
    assert done.returncode == 1
    assert f"import morphc.{room}, not {room}" in done.stderr


def _loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement in a fresh interpreter."""
    script = f"import sys; {statement}; print(' '.join(sorted(sys.modules)))"
    done = _python("-c", script, cwd=ROOT, path=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing_heavy_beyond_torch():
    added = _loaded_by("import torch; import morphc; morphc.Config; morphc.Lifecycle")
    added -= _loaded_by("import torch")
    assert "morphc" in added
    assert not added & {"sympy", "networkx", "typer", "triton", "rich", "jinja2", "transformers", "pandas"}


def test_import_alone_does_not_even_load_torch():
    assert "torch" not in _loaded_by("import morphc")


def _python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env)
