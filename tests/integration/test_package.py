"""The wheel: what it contains, what it says of itself, and that it imports from an environment of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree (a build would litter it) by this environment's setuptools: without network."""
    tmp = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "outputs", "runs")
    shutil.copytree(ROOT, tmp / "source", ignore=ignored)
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp, ".")
    run(sys.executable, *pip_wheel, cwd=tmp / "source")
    (built,) = tmp.glob("bayeformers-*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_contains_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"bayeformers"}
    packaged = {name for name in names if name.startswith("bayeformers/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bayeformers").rglob("*.py")}
    assert packaged == sources | {"bayeformers/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_metadata(metadata: Message) -> None:
    import bayeformers

    assert metadata["Name"] == "bayeformers"
    assert metadata["Version"] == bayeformers.__version__
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert metadata["Requires-Python"] is not None
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not any(line.startswith(("evaluate", "matplotlib", "datasets", "peft", "pytest")) for line in required)


@pytest.fixture
def empty_python(tmp_path: Path) -> Path:
    """The interpreter of a new environment without any package."""
    venv.create(tmp_path / "environment", with_pip=False)
    return tmp_path / "environment" / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def test_wheel_imports_from_its_own_environment(wheel: Path, empty_python: Path, tmp_path: Path) -> None:
    """A new environment holds only the wheel; the dependencies are borrowed from this one's folder."""
    python = empty_python
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import bayeformers; print(bayeformers.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_installs_what_it_needs(wheel: Path, empty_python: Path, tmp_path: Path) -> None:
    """Its own requirements are enough: each public name is there, without any extra. Needs a package registry."""
    torch_pin = next(
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
    )
    install = (sys.executable, "-m", "pip", "--python", empty_python, "install", "--quiet")
    run(*install, torch_pin, cwd=tmp_path)
    run(*install, wheel, cwd=tmp_path)
    code = "import bayeformers as b; print(all(hasattr(b, name) for name in b.__all__))"
    assert run(empty_python, "-c", code, cwd=tmp_path).strip() == "True"
