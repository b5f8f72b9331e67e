"""The kernel as others use it: the layout of kernel-builder, loaded by the package kernels, and by hf_fff from a repository of the Hub."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import jinja2
import pytest
from command import listing, run, unwrapped
from hub_client import make_folder
from transformers.utils import is_kernels_available

from hf_fff.hub import kernel
from hf_fff.ops import hub_backend, loader

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _installed():
    try:
        return metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return None


with_kernels = pytest.mark.skipif(_installed() is None, reason="the package kernels is not installed")


@pytest.fixture(scope="session")
def layout(tmp_path_factory):
    """What ``hf-fff build --kernel-layout`` writes."""
    folder = tmp_path_factory.mktemp("kernel") / "a folder"
    done = run("build", "--kernel-layout", folder, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"folder": str(folder), "variant": kernel.variant()}
    return folder


def python(code, *args, cwd=ROOT, fails=False, **environment):
    """What ``code`` prints, in a process of its own, started where a folder ``kernels`` lies."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_FFF_")}
    env = {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")])}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


# The layout


def test_build_toml_names_what_hf_fff_compiles():
    tomllib = pytest.importorskip("tomllib")
    told = tomllib.loads((KERNELS / "build.toml").read_text())
    general = told["general"]
    assert (general["name"], general["version"], general["license"]) == (kernel.NAME, kernel.VERSION, kernel.LICENCE)
    assert told["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"} and "0x020b0" in " ".join(
        loader._torch().flags
    )
    assert {part["backend"] for part in told["kernel"].values()} == set(general["backends"])
    assert told["torch"]["src"] == ["torch-ext/module.cpp"] and (KERNELS / "torch-ext" / "module.cpp").is_file()
    assert {f"cpu_{isa}" for isa in ("baseline", "avx2", "avx512", "avx512_bf16")} < set(told["kernel"])
    for backend in general["backends"]:
        named = [name for part in told["kernel"].values() if part["backend"] == backend for name in part["src"]]
        compiled = {name for name in named if name.endswith((".cpp", ".cu"))}
        headers = {
            p.relative_to(KERNELS).as_posix() for p in (KERNELS / backend).glob("*.[hc]*") if p.suffix in (".h", ".cuh")
        }
        assert len(set(named)) == len(named)
        assert compiled == {p for source in loader.LIBRARIES[backend].sources for p in _sources(source)}
        assert set(named) - compiled == headers | {"torch-ext/arguments.h", "torch-ext/namespace.h"}


def _sources(pattern):
    return {p.relative_to(KERNELS).as_posix() for p in KERNELS.glob(pattern)}


def test_the_folder_is_a_whole_project(layout):
    build = layout / "build" / kernel.variant()
    files = set(listing(layout))
    assert {"build.toml", "flake.nix", "CARD.md", "tests/test_fff.py", "benchmarks/benchmark.py"} < files
    assert {
        f"torch-ext/fff/{name}" for name in ("__init__.py", "_schema.py", "functions.py", "layers/__init__.py")
    } < files
    assert "torch-ext/fff/_ops.py" not in files  # kernel-builder writes it
    assert not [name for name in files if "openvino" in name or "/check" in name or "bench_" in name]
    told = json.loads((build / "metadata.json").read_text())
    assert told["name"] == "fff" and told["backend"] == {"type": "cpu"} and told["python-depends"] == []
    assert re.fullmatch(r"_fff_cpu_[0-9a-f]{8}", told["id"]) and (build / f"{told['id']}.so").is_file()
    hashes = {
        p: hashlib.sha256(c).digest() for p, c in listing(build).items() if c is not None and p != "metadata.json"
    }
    assert told["digest"]["files"] == {path: base64.b64encode(sha).decode() for path, sha in hashes.items()}


def test_it_imports_only_itself_torch_and_the_standard_library(layout):
    for path in (layout / "build").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (\w[\w.]*)", path.read_text(), re.MULTILINE):
            assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path}: {module}"


def test_folders_that_are_refused(layout, tmp_path):
    before = listing(layout)
    done = run("build", "--kernel-layout", layout)
    assert done.exit_code == 2 and "--overwrite" in unwrapped(done.stderr) and listing(layout) == before
    done = run("build", "--kernel-layout", tmp_path / "new", "--output", tmp_path)
    assert done.exit_code == 2 and "--output" in unwrapped(done.stderr) and not (tmp_path / "new").exists()


def test_a_failed_compilation_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho the moon is full >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("HF_FFF_CXX", str(compiler))
    done = run("build", "--kernel-layout", tmp_path / "out")
    assert done.exit_code == 1 and "the moon is full" in done.stderr and [p.name for p in tmp_path.iterdir()] == ["cxx"]


# Loaded as the package kernels does, with and without that package

_BY_HAND = """
import importlib.util, json, sys
from pathlib import Path
build = Path(sys.argv[1])
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
sys.modules[name] = sys.modules["fff"] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
_LOCALLY = """
import sys
from pathlib import Path
from kernels import get_local_kernel
sys.modules["fff"] = kernel = get_local_kernel(Path(sys.argv[1]))
"""
_TESTS = """
import pytest
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", sys.argv[2]]))
"""


def test_its_own_tests(layout):
    python(_BY_HAND + _TESTS, layout / "build" / kernel.variant(), layout / "tests")


def test_two_builds_in_one_process(layout, tmp_path):
    """Beside hf_fff's own operators, too: each has its own namespace."""
    code = _BY_HAND + "import hf_fff.ops as ours, torch\n"
    code += "args = [torch.randn(3, 8), torch.randn(7, 8), torch.randn(7), torch.randn(7, 8)]\n"
    code += "assert torch.equal(kernel.fff(*args, 1), ours.fff(*args, 1)) and ours.backend() == 'native'\n"
    code += "assert kernel.ops is not torch.ops.hf_fff; print(name)"
    assert python(code, layout / "build" / kernel.variant()).startswith("_fff_cpu_")


@with_kernels
def test_get_local_kernel(layout):
    """From a folder that holds our ``kernels/``, too."""
    python(_LOCALLY + _TESTS, layout, layout / "tests")


@with_kernels
def test_kernelize(layout):
    code = """
import sys, torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from hf_fff import FFF
replace_kernel_forward_from_hub(FFF, "FFF")
layer = FFF(16, "2x3")
x = torch.randn(5, 16)
wanted = layer(x)
(wanted_grad,) = torch.autograd.grad(wanted.sum(), layer.weight_in)
repository = LocalLayerRepository(Path(sys.argv[1]), layer_name="FFF")
for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE):
    with use_kernel_mapping({"FFF": {"cpu": {mode: repository}}}):
        kernelize(layer, mode=mode, device="cpu", use_fallback=False)
    assert layer.forward.__func__.__module__.startswith("_fff_cpu_"), layer.forward
    got = layer(x)
    assert torch.equal(got, wanted) and torch.equal(torch.autograd.grad(got.sum(), layer.weight_in)[0], wanted_grad)
"""
    python(code, layout)


@with_kernels
@pytest.mark.skipif(not is_kernels_available(), reason="this transformers takes another version of kernels")
def test_a_model_of_transformers_with_use_kernels(layout, tmp_path):
    code = """
import sys, torch, hf_fff
from pathlib import Path
from kernels import LocalLayerRepository, Mode, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers import AutoModel
replace_kernel_forward_from_hub(hf_fff.FFF, "FFF")
wanted = AutoModel.from_pretrained(sys.argv[2])
repository = LocalLayerRepository(Path(sys.argv[1]), layer_name="FFF")
with use_kernel_mapping({"FFF": {"cpu": {Mode.INFERENCE: repository}}}):
    got = AutoModel.from_pretrained(sys.argv[2], use_kernels=True)
layers = [module for module in got.modules() if isinstance(module, hf_fff.FFF)]
assert layers and all(layer.forward.__func__.__module__.startswith("_fff_cpu_") for layer in layers)
ids = torch.arange(10)[None]
assert torch.equal(got(ids).last_hidden_state, wanted(ids).last_hidden_state)
"""
    python(code, layout, make_folder(tmp_path / "fast", "Model"))


@with_kernels
def test_the_snippet_of_its_card(layout):
    text = jinja2.Template((layout / "CARD.md").read_text()).render(repo_id="me/fff", version=kernel.VERSION)
    assert text.startswith("---\nlibrary_name: kernels\n") and "{{" not in text
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    wanted = f'get_kernel("me/fff", version={kernel.VERSION})'
    assert wanted in snippet
    local = snippet.replace("import get_kernel", "import get_local_kernel").replace(wanted, "get_local_kernel(FOLDER)")
    assert "[3, 64]" in python("import sys\nfrom pathlib import Path\nFOLDER = Path(sys.argv[1])\n" + local, layout)


# HF_FFF_BACKEND=hub


@pytest.fixture
def published(hub, layout, tmp_path):
    """The kernel on the hub, and variables with which hf_fff takes it from there."""
    build = {f"build/{p.relative_to(layout / 'build').as_posix()}": p for p in (layout / "build").rglob("*")}
    files = {name: path.read_bytes() for name, path in build.items() if path.is_file() and "__pycache__" not in name}
    repo = hub.create("kernels/me/fff", files=files)
    pinned = f"me/fff@{repo.refs['main']}"
    own = {"HF_FFF_BACKEND": "hub", "HF_FFF_KERNEL_REPO": pinned, "HF_FFF_CACHE": str(tmp_path / "no-cache")}
    return {**hub.environment(tmp_path / "home"), **own}


_LOAD = "from hf_fff import ops\nprint(ops.load().origin, ops.backend(), ops.isa())"


@with_kernels
def test_from_the_hub(hub, published):
    repo = published["HF_FFF_KERNEL_REPO"]
    assert python(_LOAD, **published).split() == ["hub:", repo, "native", *_isa()]
    assert hub.requests and not list(Path(published["HF_FFF_CACHE"]).glob("*"))  # nothing was compiled
    hub.requests.clear()
    assert python(_LOAD, **{**published, "HF_HUB_OFFLINE": "1"}).split()[1] == repo and not hub.requests
    # Another commit of the same name is not taken.
    hub.repos["kernels/me/fff"].refs["main"] = COMMIT
    assert python(_LOAD, **published).split()[1] == repo


def _isa():
    from hf_fff import ops

    ops.load()
    return [ops.isa()]


@with_kernels
@pytest.mark.parametrize(
    "some",
    [
        "test_activations or test_gradients or test_autocast or test_export or test_bad_arguments or test_compile_without_graph_break",
        pytest.param("not none", marks=pytest.mark.full),
    ],
)
def test_the_operators_own_tests(published, some):
    code = "import pytest, sys\nfrom hf_fff import ops\nops.load()  # before the tests go offline\n"
    code += "raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', '-m', 'not full', *sys.argv[1:]]))"
    python(code, "tests/ops/test_operator.py", "tests/ops/test_packed.py", "-k", some, **published)


@with_kernels
def test_only_where_it_is_asked_for(hub, published):
    """A repository alone asks for nothing."""
    variables = {k: v for k, v in published.items() if k != "HF_FFF_BACKEND"}
    code = "import sys\nfrom hf_fff import ops\nassert ops.load().origin in ('built', 'cache') and 'kernels' not in sys.modules"
    python(code, **{**variables, "HF_FFF_CACHE": str(loader.cache_dir())})
    assert not hub.requests


@with_kernels
def test_a_kernel_of_something_else(hub, published, layout, tmp_path):
    path = f"build/{kernel.variant()}/_schema.py"
    files = hub.files("kernels/me/fff")
    changed = files[path].replace(
        b"Tensor x, Tensor packed, str activation", b"Tensor x, Tensor packed, str activation, int more"
    )
    other = hub.create("kernels/me/other", files={**files, path: changed})
    told = python(_LOAD, fails=True, **{**published, "HF_FFF_KERNEL_REPO": f"me/other@{other.refs['main']}"})
    assert "fff_packed takes other arguments" in told


@with_kernels
def test_what_the_hub_does_not_have(hub, published):
    for repo in ("me/none", "me/fff"):
        told = python(_LOAD, fails=True, **{**published, "HF_FFF_KERNEL_REPO": f"{repo}@{COMMIT}"})
        assert (
            f"HF_FFF_BACKEND=hub, but the cpu library cannot be loaded: the kernel {repo}@{COMMIT} cannot be had"
            in told
        )


@pytest.mark.parametrize(
    "value",
    [None, "", "me/fff", "me/fff@main", "me/fff@v1", f"fff@{COMMIT}", f"../fff@{COMMIT}", f"me/fff@{COMMIT[:7]}"],
)
def test_a_repository_that_is_not_pinned(value, monkeypatch):
    monkeypatch.delenv("HF_FFF_KERNEL_REPO", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_FFF_KERNEL_REPO", value)
    with pytest.raises(ValueError, match=r"HF_FFF_KERNEL_REPO=.* must be OWNER/NAME@COMMIT"):
        hub_backend.asked_for()


def test_without_the_package_kernels(monkeypatch):
    """A folder of that name, which Python takes for an empty namespace, is none."""

    def no_version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hub_backend, "import_module", lambda name: types.ModuleType(name))
    for found in (no_version, lambda name: "0.0"):
        monkeypatch.setattr(hub_backend, "version", found)
        with pytest.raises(RuntimeError, match=r"pip install hf-fff\[kernels\]"):
            hub_backend.kernels_package()
