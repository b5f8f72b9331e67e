"""Every CUDA source compiles for two kinds of GPUs, where there is nvcc; no GPU is needed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from command import run

from hf_fff.ops import loader

TARGETS = ("80", "90")
CUDA = loader.LIBRARIES["cuda"]
QUICK = "quick"


@pytest.fixture(scope="module")
def nvcc():
    try:
        return loader._compiler(CUDA).command
    except loader.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[QUICK, pytest.param("as it is used", marks=pytest.mark.full)])
def flags(request, monkeypatch):
    """What else nvcc is told, for the loader too. Most of its time goes into optimising, which says nothing of whether the sources are right;
    what optimising alone could break, such as the registers that are there, the full tests find."""
    told = "-Xcicc -O0 -Xptxas -O1 -Xcompiler -O0" if request.param == QUICK else ""
    monkeypatch.setenv("HF_FFF_NVCCFLAGS", f"{os.environ.get('HF_FFF_NVCCFLAGS', '')} {told}")
    return told.split()


def test_the_library(nvcc, flags):
    """As ``hf-fff build --cuda --arch 80,90`` makes it: what did not change is not compiled again."""
    built = loader.build("cuda", targets=TARGETS)
    assert built.path is not None, built.reason
    assert json.loads(built.path.with_suffix(".json").read_text())["targets"] == list(TARGETS)
    objects = shutil.which("cuobjdump", path=str(Path(nvcc[0]).parent))
    if objects:
        listed = subprocess.run(
            [objects, "--list-elf", str(built.path)], capture_output=True, text=True, check=True
        ).stdout
        assert all(f".sm_{code}." in listed for code in ("80", "90a"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is loaded where there is a GPU")
@pytest.mark.usefixtures("flags")
def test_the_command(tmp_path):
    told = run("build", "--cuda", "--arch", ",".join(TARGETS), "--output", tmp_path)
    assert told.exit_code == 0 and told.stdout.startswith(str(tmp_path / "libhf_fff_cuda.so"))
    assert "built, and not loaded here: there is no GPU" in told.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["libhf_fff_cuda.json", "libhf_fff_cuda.so"]


def other_sources():
    root = loader.kernels_root()
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.cu")) if path not in CUDA.files()]


@pytest.mark.parametrize("source", other_sources())
def test_the_sources_that_are_no_part_of_it(nvcc, source, flags, tmp_path):
    root = loader.kernels_root()
    codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in ("80", "90a")]
    command = [
        *nvcc,
        "-std=c++20",
        "--extended-lambda",
        f"-I{root}",
        *codes,
        *flags,
        "-c",
        str(root / source),
        "-o",
        str(tmp_path / "out.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
