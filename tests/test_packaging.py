"""What is in the wheel, and what importing the package costs."""

import os
import re
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from hf_fff import __version__
from hf_fff.ops.loader import LIBRARIES, kernels_root

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".cpp", ".cu", ".cuh", ".h", ".md", ".nix", ".py", ".toml"}
EXTRAS = {"train", "peft", "openvino", "onnx", "quant", "hub", "kernels", "bench", "demo", "dev"}


def build(kind, source, output):
    """Builds the sdist or the wheel of the project in ``source``, without a network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(output), str(source)]
    run = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def contents(wheel):
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def files(wheel):
    return contents(wheel)


@pytest.fixture(scope="module")
def metadata(files):
    (name,) = (n for n in files if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(files[name].decode())


def test_wheel_is_pure_python(wheel):
    assert wheel.name == f"hf_fff-{__version__}-py3-none-any.whl"


def test_one_top_level_package(files):
    assert {name.split("/")[0] for name in files} == {"hf_fff", f"hf_fff-{__version__}.dist-info"}


def test_python_code_is_complete(files):
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hf_fff").rglob("*.py")}
    assert here <= files.keys()
    assert "hf_fff/py.typed" in files


def test_kernels_are_sources(files):
    kernels = {name for name in files if name.startswith("hf_fff/_kernels/")}
    sources = {path for library in LIBRARIES.values() for path in library.files()}
    assert {f"hf_fff/_kernels/{path.relative_to(kernels_root()).as_posix()}" for path in sources} <= kernels
    assert {".cpp", ".h", ".cu", ".cuh"} <= {Path(name).suffix for name in kernels} <= SOURCES


def test_cards(files):
    assert any(name.startswith("hf_fff/_cards/") for name in files)


def test_metadata(metadata, files):
    requires = [re.split(r"\s*;\s*", r) for r in metadata.get_all("Requires-Dist")]
    core = {r[0] for r in requires if len(r) == 1}
    assert {"torch>=2.11", "transformers>=5.17"} <= core
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    entry_points = next(text.decode() for name, text in files.items() if name.endswith("/entry_points.txt"))
    assert "hf-fff = hf_fff.cli:main" in entry_points
    assert any(name.endswith("/licenses/LICENSE") for name in files)


_IMPORT_SCRIPT = """
import sys
import torch
from transformers import BertModel
before = set(sys.modules)
import hf_fff
print(*sorted(set(sys.modules) - before))
"""


def test_import_is_light():
    """The configs of all families are registered; no model is imported, and none of what single commands need."""
    run = subprocess.run([sys.executable, "-c", _IMPORT_SCRIPT], capture_output=True, text=True, check=True)
    added = run.stdout.split()
    assert "transformers.models.modernbert.configuration_modernbert" in added
    models = {name.split(".")[2] for name in added if re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", name)}
    assert models <= {"auto"}
    heavy = {"accelerate", "datasets", "matplotlib", "rich", "scipy", "sentence_transformers", "sklearn", "typer"}
    assert not heavy & {name.split(".")[0] for name in added}
    ours = {name.split(".")[1] for name in added if name.startswith("hf_fff.")}
    assert not ours & {"bench", "cli", "hub", "surgery", "training"}


@pytest.mark.full
def test_wheel_from_sdist(tmp_path, files):
    """The sdist's wheel is the tree's wheel."""
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build("wheel", source, tmp_path / "wheel")) == files
    assert (source / "tests" / Path(__file__).name).is_file()


@pytest.mark.full
def test_wheel_compiles_its_own_kernels(tmp_path, wheel):
    site, cache = tmp_path / "site", tmp_path / "cache"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_FFF_")}
    environment |= {"PYTHONPATH": str(site), "HF_FFF_CACHE": str(cache), "HF_FFF_BACKEND": "native"}
    script = "from hf_fff.ops import loader; print(loader.load().origin, loader.kernels_root())"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["built", str(site / "hf_fff" / "_kernels")], run.stderr
