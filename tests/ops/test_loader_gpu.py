"""The loader's library for GPUs, on machines that this one is not: a compiler that stands in for nvcc, and GPUs that are only told of."""

import os
import shutil
from types import SimpleNamespace

import pytest
import test_loader
from test_loader import fresh_loader, load_quietly, load_warned, root  # noqa: F401  # a fixture

from hf_fff import ops

pytestmark = test_loader.pytestmark

# Takes nvcc's options, tells them, and lets the C++ compiler do the work.
NVCC = """#!/bin/sh
case " $* " in *" --version "*) echo "nvcc: NVIDIA (R) Cuda compiler driver"; echo "Cuda compilation tools, release {release}, V{release}.1"; exit;; esac
echo "$@" >> "{log}"
for word do
  shift
  case "$skip$word" in
    -gencode=*) ;;
    -Xcompiler|-Xlinker) skip=1 ;;
    1*) skip= ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec {real} -fPIC "$@"
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Makes it HF_FFF_NVCC; ``nvcc.options()`` are those that it was given, a list a call."""
    log, path = tmp_path / "nvcc.log", tmp_path / "nvcc"
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))

    def use(release="13.0"):
        path.write_text(NVCC.format(release=release, log=log, real=real))
        path.chmod(0o755)
        monkeypatch.setenv("HF_FFF_NVCC", str(path))
        return path

    use.options = lambda: [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    use.codes = lambda: [[w.removeprefix("-gencode=") for w in of if w.startswith("-gencode")] for of in use.options()]
    use()
    return use


def gpu_loader(root, *capabilities, driver=13000):  # noqa: F811
    """A loader whose library "tiny" is for GPUs, of which the machine has these."""
    loader = fresh_loader(root, compiler="nvcc", otherwise="Triton kernels are")
    loader.torch = SimpleNamespace(
        **{n: getattr(loader.torch, n) for n in ("__version__", "__file__", "ops", "version")}
    )
    loader.torch._C = SimpleNamespace(_cuda_getDriverVersion=lambda: driver)
    loader.torch.version = SimpleNamespace(cuda="13.0", hip=None)
    loader.torch.cuda = SimpleNamespace(
        is_available=lambda: bool(capabilities),
        device_count=lambda: len(capabilities),
        get_device_capability=lambda i: capabilities[i],
    )
    return loader


def test_targets_however_they_are_written(root):  # noqa: F811
    check = fresh_loader(root).check_targets
    assert check(["sm_90", "8.0", "120+PTX", "80", "90a", " 100 "]) == ("80", "90", "90a", "100", "120+PTX")
    assert check([]) == ()


@pytest.mark.parametrize("wrong", ["70", "", "sm_9", "90b", "all", "90a+PTX", "compute_90"])
def test_targets_that_are_not_known(root, nvcc, wrong):  # noqa: F811
    allowed = "allowed: 75, 80, 86, 89, 90, 90a, 100, 100a, 120, 120a"
    with pytest.raises(ValueError, match=f"target '{wrong.replace('+', '.')}' is not supported .{allowed}"):
        gpu_loader(root, (9, 0)).build("tiny", targets=["80", wrong])
    assert nvcc.options() == []


def test_targets_of_a_library_that_is_not_for_gpus(root):  # noqa: F811
    with pytest.raises(ValueError, match="targets=90 means nothing to the tiny library"):
        fresh_loader(root).build("tiny", targets=["90"])


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "75"), ((8, 0), "80"), ((8, 6), "86"), ((8, 7), "86"), ((8, 9), "89"), ((9, 0), "90"), ((10, 0), "100"),
        ((10, 3), "100"), ((11, 0), "100+PTX"), ((12, 0), "120"), ((12, 1), "120"), ((13, 0), "120+PTX"),
    ],
)  # fmt: skip
def test_what_a_gpu_needs(root, capability, target):  # noqa: F811
    loader = gpu_loader(root, capability)
    assert loader.targets_here() == (target,) and loader._serves([target], capability)
    assert loader._serves(loader._EVERYWHERE, capability) is (capability != (11, 0))


def test_code_for_one_kind_of_gpu_serves_no_other(root):  # noqa: F811
    serves = fresh_loader(root)._serves
    assert serves(["90a"], (9, 0)) and not serves(["100a"], (10, 3)) and not serves(["90"], (8, 9))
    assert not serves(["86"], (8, 0)) and not serves(["80"], (9, 0)) and serves(["80+PTX"], (9, 0))


def test_first_use_builds_for_the_gpus_that_are_there(root, nvcc):  # noqa: F811
    built = load_quietly(gpu_loader(root, (9, 0), (8, 0), (9, 0)))
    assert built.origin == "built" and built.path.parent.name.endswith("-80-90")
    assert nvcc.codes() == [["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]]
    assert load_quietly(gpu_loader(root, (9, 0), (8, 0))).origin == "cache"
    assert load_quietly(gpu_loader(root, (8, 0))).origin == "cache", "what serves more is there already"
    assert load_quietly(gpu_loader(root, (8, 9))).path.parent.name.endswith("-80-90"), "8.0's code runs on 8.9"
    assert len(nvcc.options()) == 1


def test_built_ahead_without_a_gpu(root, nvcc, tmp_path):  # noqa: F811
    built = gpu_loader(root).build("tiny", output=tmp_path / "out")
    assert (
        not built.loaded and built.path == tmp_path / "out" / "libhf_fff_tiny.so" and "there is no GPU" in built.reason
    )
    (codes,) = nvcc.codes()
    numbers = ("75", "80", "86", "89", "90a", "100", "120")
    assert codes == [*(f"arch=compute_{n},code=sm_{n}" for n in numbers), "arch=compute_120,code=compute_120"]
    assert load_quietly(gpu_loader(root, (8, 6))).origin == "cache", "it serves the first use where there is one"
    assert gpu_loader(root).build("tiny").origin == "cache" and len(nvcc.options()) == 1


def test_built_ahead_for_others(root, nvcc):  # noqa: F811
    loader = gpu_loader(root, (9, 0))
    built = loader.build("tiny", targets=["8.0"])
    assert not built.loaded and built.path.is_file() and loader.status("tiny") is None
    assert "it was built for sm_80, and a GPU here is an sm_90" in built.reason
    assert load_quietly(loader).path.parent.name.endswith("-90") and len(nvcc.options()) == 2


def test_kernel_path(root, nvcc, tmp_path, monkeypatch):  # noqa: F811
    gpu_loader(root).build("tiny", output=tmp_path / "out", targets=["90"])
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(tmp_path / "out"))
    monkeypatch.setenv("HF_FFF_NVCC", "no-such-compiler")
    assert load_quietly(gpu_loader(root, (9, 0))).origin == "HF_FFF_KERNEL_PATH"
    status, warning = load_warned(gpu_loader(root, (8, 0)))
    assert not status.loaded and "it was built for sm_90, and a GPU here is an sm_80" in warning
    assert "Triton kernels are" in warning


def test_no_gpu(root, nvcc):  # noqa: F811
    loader = gpu_loader(root)
    status, warning = load_warned(loader)
    assert not status.loaded and "there is no GPU" in warning and nvcc.options() == []
    row = loader.describe()["libraries"]["tiny"]
    assert (
        row["targets"] == []
        and "there is no GPU" in row["no_gpu"]
        and row["version"].startswith("Cuda compilation tools")
    )


def test_a_gpu_that_is_too_old(root, nvcc):  # noqa: F811
    _, warning = load_warned(gpu_loader(root, (7, 0)))
    assert "a GPU here is an sm_70, and kernels are for sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120" in warning
    assert nvcc.options() == []


def test_gpus_of_others(root, nvcc):  # noqa: F811
    loader = gpu_loader(root, (9, 4))
    loader.torch.version.cuda, loader.torch.version.hip = None, "6.4"
    assert "are for GPUs of NVIDIA" in load_warned(loader)[1] and nvcc.options() == []


def test_a_driver_that_is_older_than_nvcc(root, nvcc, tmp_path, monkeypatch):  # noqa: F811
    _, warning = load_warned(gpu_loader(root, (9, 0), driver=12080))
    assert "nvcc is of CUDA 13, and the driver knows CUDA up to 12.8" in warning and nvcc.options() == []
    copy = gpu_loader(root).build("tiny", output=tmp_path / "out").path
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(copy))
    assert "the driver knows CUDA up to 12.8" in load_warned(gpu_loader(root, (9, 0), driver=12080))[1]
    monkeypatch.delenv("HF_FFF_KERNEL_PATH")
    nvcc("12.4")
    assert load_quietly(gpu_loader(root, (9, 0), driver=12080)).loaded


@pytest.mark.parametrize("by", ["HF_FFF_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_where_nvcc_is_found(root, nvcc, tmp_path, monkeypatch, by):  # noqa: F811
    for name in ("CUDA_HOME", "CUDA_PATH", "HF_FFF_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    shutil.move(tmp_path / "nvcc", home / "bin" / "nvcc")
    program = str(home / "bin" / "nvcc")
    monkeypatch.setenv(by, {"HF_FFF_NVCC": program, "PATH": str(home / "bin")}.get(by, str(home)))
    loader = gpu_loader(root, (9, 0))
    assert loader._compiler(loader.LIBRARIES["tiny"]).command == (program,)


def test_no_nvcc(root, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("HF_FFF_NVCC", str(tmp_path / "no-such-nvcc"))
    _, warning = load_warned(gpu_loader(root, (9, 0)))
    assert f"no nvcc compiler found (HF_FFF_NVCC={tmp_path}/no-such-nvcc). Install the CUDA toolkit" in warning
    assert "Triton kernels are: " in warning and "HF_FFF_KERNEL_PATH" in warning


def test_flags_of_nvcc(root, nvcc, monkeypatch):  # noqa: F811
    first = load_quietly(gpu_loader(root, (9, 0))).path
    monkeypatch.setenv("HF_FFF_NVCCFLAGS", "-DUNUSED")
    second = load_quietly(gpu_loader(root, (9, 0))).path
    assert first != second and "-DUNUSED" in nvcc.options()[-1] and "-DUNUSED" not in nvcc.options()[0]


def test_sources_for_gpus_are_no_part_of_the_other_libraries(root):  # noqa: F811
    (root / "cuda").mkdir()
    digests = []
    for text in ("", "// changed"):
        (root / "cuda" / "fff.cu").write_text(text)
        (root / "torch_binding_cuda.cpp").write_text(text)
        digests.append(
            [loader._source_digest(loader.LIBRARIES["tiny"]) for loader in (fresh_loader(root), gpu_loader(root))]
        )
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


class Tensor:
    """As much of one on a GPU as the operators of last resort look at."""

    device = SimpleNamespace(type="cuda")


@pytest.fixture
def chosen(monkeypatch):
    """What a call on a GPU runs, where nothing native is registered."""
    monkeypatch.setattr(ops, "has_native", lambda device="cpu": False)
    triton = SimpleNamespace(fff=lambda *a: "triton")
    monkeypatch.setattr(ops, "_triton", lambda: triton)
    return ops._fallback("fff", SimpleNamespace(fff=lambda *a: "torch"))


def test_triton_and_then_pytorch_where_the_library_does_not_load(chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "load", lambda name: asked.append(name) or ops.Status(name, reason="no nvcc"))
    assert chosen(Tensor) == "triton" and asked == ["cuda"]
    monkeypatch.setattr(ops, "_triton", lambda: None)
    assert chosen(Tensor) == "torch"


def test_native_and_no_library(chosen, monkeypatch):
    def load(name):
        raise RuntimeError("HF_FFF_BACKEND=native, but the cuda library cannot be loaded: no nvcc")

    monkeypatch.setattr(ops, "load", load)
    with pytest.raises(RuntimeError, match="the cuda library cannot be loaded"):
        chosen(Tensor)


@pytest.mark.skipif(os.environ.get("HF_FFF_BACKEND") is not None, reason="HF_FFF_BACKEND is set")
def test_what_a_call_runs_without_a_gpu(monkeypatch):
    monkeypatch.setattr(ops.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "has_native", lambda device="cpu": False)
    monkeypatch.setattr(ops, "load", lambda name: pytest.fail(f"{name} was loaded"))
    assert ops.backend("cuda") == "torch"
