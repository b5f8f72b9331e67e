"""The loader, with a tiny library of its own and a fresh copy of the module in every test."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from importlib import util
from pathlib import Path

import pytest

LOADER = Path(__file__).parents[2] / "hf_fff" / "ops" / "loader.py"
SOURCE = '#include "tiny.h"\nextern "C" __attribute__((visibility("default"))) int tiny() { return TINY; }\n'
VARIABLES = ("BACKEND", "KERNEL_PATH", "CACHE", "CXX", "CXXFLAGS", "NVCC", "NVCCFLAGS")

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")


def fresh_loader(root: Path, **row):
    """A copy of the module that knows one library, "tiny", with sources in ``root``."""
    spec = util.spec_from_file_location("fresh_loader", LOADER)
    loader = util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    loader.kernels_root = lambda: root
    loader._PACKAGE = root / "package"
    loader.LIBRARIES = {"tiny": loader.Library("tiny", ("tiny.cpp",), **row)}
    return loader


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in (*(f"HF_FFF_{v}" for v in VARIABLES), "CXX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "kernels"
    root.mkdir()
    (root / "tiny.cpp").write_text(SOURCE)
    (root / "tiny.h").write_text("#define TINY 1\n")
    return root


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a script the compiler: ``REAL`` in it is the real one, and its every compilation is counted."""
    log = tmp_path / "compilations"

    def use(script='exec REAL "$@"'):
        path = tmp_path / "cxx"
        real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
        target = 'while [ "$1" != -o ]; do shift; done; shift; target=$1'
        body = script.replace("REAL", real).replace("TARGET", target)
        path.write_text(
            f'#!/bin/sh\ncase " $* " in *" --version "*) echo fake 1.0; exit;; esac\necho >> "{log}"\n{body}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("HF_FFF_CXX", str(path))

    use.count = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    return use


def load_quietly(loader):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return loader.load("tiny")


def load_warned(loader):
    """The status and the text of the one warning that loading gave; later calls give none."""
    with pytest.warns(RuntimeWarning) as caught:
        status = loader.load("tiny")
    assert len(caught) == 1
    assert load_quietly(loader) is status
    return status, str(caught[0].message)


def in_processes(root, count=1, code="", **environment):
    """Loads in new processes, at the same time; returns what each prints: a dict of its status and warnings."""
    script = f"""
        import json, sys, warnings
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_loader
        loader = test_loader.fresh_loader(Path({str(root)!r}))
        {code or "pass"}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            status = loader.load("tiny")
        print(json.dumps(dict(loaded=status.loaded, origin=status.origin, warnings=[str(w.message) for w in caught])))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=env, **pipes) for _ in range(count)]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    return results


def test_is_built_once_and_then_found_in_the_cache(root, compiler, tmp_path, caplog):
    compiler()
    loader = fresh_loader(root)
    assert loader.status("tiny") is None
    with caplog.at_level(logging.INFO):
        built = load_quietly(loader)
    assert (built.loaded, built.backend, built.origin, built.reason) == (True, "native", "built", "")
    assert built.build_seconds > 0 and "compiling" in caplog.text
    assert built.path.parent.parent == tmp_path / "cache" and built.path.name == "libhf_fff_tiny.so"
    assert loader.status("tiny") is built
    again = load_quietly(fresh_loader(root))
    assert (again.origin, again.path, again.build_seconds) == ("cache", built.path, None)
    assert compiler.count() == 1
    assert sorted(p.name for p in built.path.parent.iterdir()) == ["libhf_fff_tiny.json", "libhf_fff_tiny.so", "lock"]


def test_several_sources_are_compiled_each_by_itself_and_linked(root, compiler, tmp_path):
    compiler()
    (root / "other.cpp").write_text('#include "tiny.h"\nextern "C" int other() { return TINY; }\n')
    loader = fresh_loader(root)
    loader.LIBRARIES = {"tiny": loader.Library("tiny", ("tiny.cpp", "other.cpp"))}
    assert loader.load("tiny").origin == "built" and compiler.count() == 3
    (root / "other.cpp").write_text("int other( {}\n")
    loader = fresh_loader(root)
    loader.LIBRARIES = {"tiny": loader.Library("tiny", ("tiny.cpp", "other.cpp"))}
    status, warning = load_warned(loader)
    assert not status.loaded and "other.cpp:1" in warning and not list((tmp_path / "cache").rglob("*.o"))


@pytest.fixture
def two_libraries(root):
    """A loader of "tiny" and "other", that share a source; their hosts need other flags."""
    (root / "core.cpp").write_text(
        '#include "tiny.h"\n#ifdef OF\n#error of a host\n#endif\nint core() { return TINY; }\n'
    )
    for name in ("tiny", "other"):
        (root / f"{name}.cpp").write_text(
            f"{SOURCE}int core();\nstatic_assert(OF == sizeof({name!r}));\n".replace("'", '"')
        )

    def make():
        loader, rows = fresh_loader(root), {}
        for name in ("tiny", "other"):
            host = dataclasses.replace(loader._torch(), flags=(f"-DOF={len(name) + 1}",))
            rows[name] = loader.Library(
                name, (f"{name}.cpp", "core.cpp"), core=("core.cpp",), host=lambda host=host: host
            )
        loader.LIBRARIES = rows
        return loader

    return make


def test_the_core_is_compiled_once_for_all_libraries(root, two_libraries, compiler, tmp_path):
    compiler()
    assert two_libraries().load("tiny").origin == "built" and compiler.count() == 3  # two sources, and linked
    (kept,) = (tmp_path / "cache").rglob("*.o")
    assert two_libraries().load("other").origin == "built" and compiler.count() == 5
    assert two_libraries().build("tiny", force=True).origin == "built" and compiler.count() == 8
    kept.write_bytes(kept.read_bytes()[:-1])
    assert two_libraries().build("other", force=False).origin == "cache" and compiler.count() == 8
    shutil.rmtree(two_libraries().load("other").path.parent)
    assert two_libraries().load("other").loaded and compiler.count() == 11, "a damaged object was linked"
    (root / "tiny.h").write_text("#define TINY 2\n")
    assert two_libraries().load("other").loaded and compiler.count() == 14
    assert len(list((tmp_path / "cache").rglob("*.o"))) == 2 and not list((tmp_path / "cache").rglob("tmp*"))


def test_our_libraries_share_one_core():
    pytest.importorskip("openvino")
    import hf_fff.openvino.library  # noqa: F401  # has a row of its own
    from hf_fff.ops import loader

    rows = [loader.LIBRARIES[name] for name in ("cpu", "bench", "openvino")]
    assert len({loader._kept_objects(row, loader._compiler(row)) for row in rows}) == 1
    assert all(len(row.core) > 3 and set(row.core) < set(row.sources) for row in rows)


def test_where_the_core_cannot_be_kept(two_libraries, compiler, tmp_path, monkeypatch):
    compiler()
    loader = two_libraries()
    place = loader._kept_objects(loader.LIBRARIES["tiny"], loader._compiler(loader.LIBRARIES["tiny"]))
    place.parent.mkdir()
    place.write_text("a file in its place")
    for name in ("tiny", "other"):
        assert two_libraries().load(name).origin == "built"
    assert compiler.count() == 6 and not list((tmp_path / "cache").rglob("*.o"))


def test_an_operator_in_the_stable_abi_compiles_and_runs(root):
    import torch

    (root / "tiny.cpp").write_text("""
        #include <torch/csrc/stable/library.h>
        int64_t twice(int64_t x) { return 2 * x; }
        STABLE_TORCH_LIBRARY(hf_fff_loader_test, m) { m.def("twice(int x) -> int"); }
        STABLE_TORCH_LIBRARY_IMPL(hf_fff_loader_test, CompositeExplicitAutograd, m) {
          m.impl("twice", TORCH_BOX(&twice));
        }
    """)
    loader = fresh_loader(root, operator="hf_fff_loader_test::twice", dispatch_key="CompositeExplicitAutograd")
    assert load_quietly(loader).loaded
    assert torch.ops.hf_fff_loader_test.twice(21) == 42


def test_errors_are_told_where_the_cpp_runtime_is_linked_statically(root, monkeypatch):
    """As compilers do that have no other: mixed with the names of torch's, it crashed where a number was written into a message."""
    import torch

    (root / "tiny.cpp").write_text("""
        #include <torch/csrc/stable/library.h>
        int64_t negative(int64_t x) { STD_TORCH_CHECK(x < 0, "x is ", x, ", not negative"); return x; }
        STABLE_TORCH_LIBRARY(hf_fff_static_test, m) { m.def("negative(int x) -> int"); }
        STABLE_TORCH_LIBRARY_IMPL(hf_fff_static_test, CompositeExplicitAutograd, m) {
          m.impl("negative", TORCH_BOX(&negative));
        }
    """)
    monkeypatch.setenv("HF_FFF_CXXFLAGS", "-static-libstdc++")
    loader = fresh_loader(root, operator="hf_fff_static_test::negative", dispatch_key="CompositeExplicitAutograd")
    status = load_quietly(loader)
    if "libstdc++" in status.reason:
        pytest.skip("no static C++ runtime is installed")
    assert status.loaded and torch.ops.hf_fff_static_test.negative(-1) == -1
    with pytest.raises(RuntimeError, match="x is 42, not negative"):
        torch.ops.hf_fff_static_test.negative(42)


def test_a_library_without_the_operator_is_refused(root, compiler):
    compiler()
    loader = fresh_loader(root, operator="hf_fff_nowhere::fff")
    status, warning = load_warned(loader)
    assert not status.loaded and "registers no kernel of hf_fff_nowhere::fff for CPU" in warning
    assert compiler.count() == 1


def test_four_processes_at_once_compile_once(root, compiler):
    compiler('sleep 1; exec REAL "$@"')
    results = in_processes(root, 4)
    assert all(r["loaded"] and not r["warnings"] for r in results)
    assert sorted(r["origin"] for r in results) == ["built"] + ["cache"] * 3
    assert compiler.count() == 1


def test_threads_at_once_load_once(root, compiler):
    compiler()
    loader, found = fresh_loader(root), []
    threads = [threading.Thread(target=lambda: found.append(loader.load("tiny"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(s is found[0] for s in found) and compiler.count() == 1


def test_a_child_of_fork_can_load_while_its_parent_compiles(root, compiler):
    compiler('sleep 2; exec REAL "$@"')
    code = """import os, threading, time
        thread = threading.Thread(target=loader.load, args=("tiny",))
        thread.start()
        time.sleep(0.5)
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            thread.join()
        else:
            os._exit(0 if loader.load("tiny").origin == "cache" else 1)"""
    assert in_processes(root, code=code)[0]["origin"] == "built"
    assert compiler.count() == 1


def test_no_compiler(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, warning = load_warned(fresh_loader(root))
    assert (status.loaded, status.backend, status.path) == (False, "torch", None)
    assert "no c++ compiler found (none of c++, g++, clang++ is on PATH)" in warning
    assert "HF_FFF_KERNEL_PATH" in warning and "PyTorch" in warning


def test_a_compiler_that_was_named_and_is_not_there(root, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("HF_FFF_CXX", "no-such-compiler -v")
    _, warning = load_warned(fresh_loader(root))
    assert "HF_FFF_CXX=no-such-compiler -v" in warning


def test_unreadable_flags(root, monkeypatch):
    monkeypatch.setenv("HF_FFF_CXXFLAGS", "-DX='")
    _, warning = load_warned(fresh_loader(root))
    assert "HF_FFF_CXXFLAGS" in warning


def test_cxx_may_hold_options(root, compiler, monkeypatch):
    compiler()
    monkeypatch.setenv("CXX", f"{os.environ['HF_FFF_CXX']} -DUNUSED")
    monkeypatch.delenv("HF_FFF_CXX")
    assert load_quietly(fresh_loader(root)).origin == "built" and compiler.count() == 1


def test_a_failing_compiler_is_quoted(root, compiler, tmp_path):
    compiler("echo 'tiny.cpp:1: error: the moon is full' >&2; exit 1")
    status, warning = load_warned(fresh_loader(root))
    assert not status.loaded and "the moon is full" in warning and "exit status 1" in warning
    assert not list((tmp_path / "cache").rglob("*.so"))
    compiler()
    assert load_quietly(fresh_loader(root)).origin == "built"


def test_a_real_compilation_error_is_quoted(root):
    (root / "tiny.cpp").write_text("int f() { return missing_name; }")
    _, warning = load_warned(fresh_loader(root))
    assert "missing_name" in warning


@pytest.mark.parametrize("script", ['TARGET; echo garbage > "$target"', "exit 0", 'TARGET; : > "$target"'])
def test_a_compiler_that_writes_no_library(root, compiler, script, tmp_path):
    compiler(script)
    status, warning = load_warned(fresh_loader(root))
    assert not status.loaded and "no usable library" in warning
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_that_is_no_program(root, tmp_path, monkeypatch):
    (tmp_path / "cxx").write_bytes(b"\0\1\2")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("HF_FFF_CXX", str(tmp_path / "cxx"))
    _, warning = load_warned(fresh_loader(root))
    assert "cannot be started" in warning


def test_a_compiler_that_hangs_is_stopped_with_its_children(root, compiler, tmp_path):
    compiler(f'(sleep 30; touch "{tmp_path}/survivor") & sleep 31')
    loader = fresh_loader(root)
    loader._TOOLCHAINS["c++"] = dataclasses.replace(loader._TOOLCHAINS["c++"], timeout=0.5)
    start = time.monotonic()
    _, warning = load_warned(loader)
    assert "was stopped" in warning and time.monotonic() - start < 20


def test_a_compiler_that_is_killed_half_way_leaves_no_library(root, compiler, tmp_path):
    compiler('REAL "$@"; TARGET; head -c 5000 "$target" > "$target.half"; mv "$target.half" "$target"; kill -9 $$')
    status, warning = load_warned(fresh_loader(root))
    assert not status.loaded and "exit status -9" in warning
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_process_that_is_killed_half_way_leaves_nothing_that_loads(root, compiler, tmp_path):
    compiler('REAL "$@"; sleep 30')
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_loader\n"
    script += f"test_loader.fresh_loader(test_loader.Path({str(root)!r})).load('tiny')"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").rglob("*.so")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    left = list((tmp_path / "cache").rglob("*.so"))
    assert left and all(p.parent.name.startswith("build-") for p in left)
    compiler()
    assert load_quietly(fresh_loader(root)).origin == "built"  # the lock died with its holder


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "missing": lambda path: path.unlink(),
    "no manifest": lambda path: path.with_suffix(".json").unlink(),
    "broken manifest": lambda path: path.with_suffix(".json").write_text('{"size":'),
    "odd manifest": lambda path: path.with_suffix(".json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_in_the_cache_is_built_again(root, compiler, damage):
    compiler()
    path = fresh_loader(root).load("tiny").path
    # damage a copy: truncating a file that this process has mapped would kill it
    shutil.copy(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)
    DAMAGES[damage](path)
    assert load_quietly(fresh_loader(root)).origin == "built"
    assert load_quietly(fresh_loader(root)).origin == "cache"
    assert compiler.count() == 2


def test_a_changed_source_header_flag_or_compiler_changes_the_key(root, compiler, monkeypatch):
    compiler()
    paths = {load_quietly(fresh_loader(root)).path}
    for change in (
        lambda: (root / "tiny.cpp").write_text(SOURCE + "\n"),
        lambda: (root / "tiny.h").write_text("#define TINY 2\n"),
        lambda: monkeypatch.setenv("HF_FFF_CXXFLAGS", "-DUNUSED"),
        lambda: monkeypatch.delenv("HF_FFF_CXX"),
    ):
        change()
        found = load_quietly(fresh_loader(root))
        assert found.origin == "built" and found.path not in paths
        paths.add(found.path)


def test_the_sources_are_missing(root):
    (root / "tiny.cpp").unlink()
    _, warning = load_warned(fresh_loader(root))
    assert "not installed" in warning and "tiny.cpp" in warning


@pytest.mark.parametrize("folder", ["with space", "mit Umläuten ☃", 'quote\'s "and" $HOME; #', "-dash,comma:colon"])
def test_odd_names_of_the_cache(root, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path / folder / "cache"))
    assert load_quietly(fresh_loader(root)).path.is_relative_to(tmp_path / folder)
    assert load_quietly(fresh_loader(root)).origin == "cache"


def test_where_the_cache_is(root, tmp_path, monkeypatch):
    loader = fresh_loader(root)
    assert loader.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("HF_FFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loader.cache_dir() == tmp_path / "home" / ".cache" / "hf_fff"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert loader.cache_dir() == tmp_path / "xdg" / "hf_fff"


def unusable_folder(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "below"  # even root can make nothing there


def test_an_unusable_cache_gives_way_to_a_temporary_folder(root, compiler, tmp_path):
    compiler()
    code = "import atexit; atexit.register(lambda: print(status.path.exists(), file=sys.stderr))"
    (result,) = in_processes(root, code=code, HF_FFF_CACHE=str(unusable_folder(tmp_path)), TMPDIR=str(tmp_path))
    assert result["loaded"] and result["origin"] == "built (temporary)"
    (warning,) = result["warnings"]
    assert "the cache cannot be used" in warning and "HF_FFF_CACHE" in warning and "PyTorch" not in warning
    assert not list(tmp_path.glob("hf_fff-*")), "the temporary folder outlived its process"


def test_neither_cache_nor_temporary_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FFF_CACHE", str(unusable_folder(tmp_path)))
    loader = fresh_loader(root)

    def refuse(**_):
        raise PermissionError("no room in the inn")

    monkeypatch.setattr(loader.tempfile, "mkdtemp", refuse)
    status, warning = load_warned(loader)
    assert not status.loaded and "no room in the inn" in warning and str(tmp_path / "file") in warning


@pytest.fixture
def mounted(tmp_path):
    folder, mounted = tmp_path / "mounted", []

    def mount(options):
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_cache_without_execution(root, mounted, compiler, monkeypatch):
    compiler()
    folder = mounted("noexec")
    monkeypatch.setenv("HF_FFF_CACHE", str(folder))
    status, warning = load_warned(fresh_loader(root))
    assert status.origin == "built (temporary)" and "noexec" in warning and compiler.count() == 1
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    status, warning = load_warned(fresh_loader(root))
    assert not status.loaded and "nor can a temporary folder" in warning


def test_a_full_cache(root, mounted, compiler, monkeypatch):
    compiler()
    folder = mounted("size=12k")
    monkeypatch.setenv("HF_FFF_CACHE", str(folder))
    status, warning = load_warned(fresh_loader(root))
    assert status.origin == "built (temporary)" and "No space left" in warning


def test_a_cache_that_became_read_only_still_serves(root, mounted, compiler, monkeypatch):
    compiler()
    folder = mounted("rw")
    monkeypatch.setenv("HF_FFF_CACHE", str(folder))
    in_processes(root)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert in_processes(root)[0]["origin"] == "cache"
    (root / "tiny.h").write_text("#define TINY 3\n")
    (result,) = in_processes(root)
    assert result["origin"] == "built (temporary)" and "Read-only" in result["warnings"][0]
    assert compiler.count() == 2


def test_backend_torch_loads_nothing_and_says_nothing(root, compiler, monkeypatch):
    compiler()
    monkeypatch.setenv("HF_FFF_BACKEND", "torch")
    status = load_quietly(fresh_loader(root))
    assert (status.loaded, status.reason, compiler.count()) == (False, "HF_FFF_BACKEND=torch", 0)


def test_backend_native_raises_instead_of_falling_back(root, compiler, monkeypatch):
    monkeypatch.setenv("HF_FFF_BACKEND", "native")
    compiler("echo the moon is full; exit 1")
    loader = fresh_loader(root)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)HF_FFF_BACKEND=native.*the moon is full"):
            load_quietly(loader)
    assert compiler.count() == 1
    compiler()
    assert load_quietly(fresh_loader(root)).loaded


def test_backend_unknown(root, monkeypatch):
    monkeypatch.setenv("HF_FFF_BACKEND", "bogus")
    with pytest.raises(ValueError, match=r"HF_FFF_BACKEND='bogus'.*auto, native, torch, hub"):
        fresh_loader(root).load("tiny")
    with pytest.raises(ValueError, match=r"'huge' is not known.*tiny"):
        fresh_loader(root).status("huge")


def test_backend_hub_is_about_the_cpu_library_alone(root, monkeypatch):
    monkeypatch.setenv("HF_FFF_BACKEND", "hub")
    assert load_quietly(fresh_loader(root)).origin == "built"


@pytest.mark.parametrize("as_folder", [True, False])
def test_kernel_path(root, as_folder, compiler, tmp_path, monkeypatch):
    copy = fresh_loader(root).build("tiny", output=tmp_path / "out").path
    assert copy == tmp_path / "out" / "libhf_fff_tiny.so"
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(copy.parent if as_folder else copy))
    compiler("exit 1")
    status = load_quietly(fresh_loader(root))
    assert (status.loaded, status.path, status.origin) == (True, copy, "HF_FFF_KERNEL_PATH")
    copy.with_suffix(".json").unlink()  # a library from elsewhere has none
    assert load_quietly(fresh_loader(root)).loaded


@pytest.mark.parametrize("wrong", ["absent", "empty folder", "garbage", "truncated", "other version"])
def test_kernel_path_that_cannot_be_used(root, wrong, compiler, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    if wrong == "empty folder":
        folder.mkdir()
    elif wrong == "garbage":
        folder.mkdir()
        (folder / "libhf_fff_tiny.so").write_text("garbage")
    elif wrong == "truncated":
        path = fresh_loader(root).build("tiny", output=folder).path
        path.with_suffix(".json").unlink()
        DAMAGES["truncated"](path)
    elif wrong == "other version":
        fresh_loader(root).build("tiny", output=folder)
        (root / "tiny.h").write_text("#define TINY 4\n")
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(folder))
    compiler()
    status, warning = load_warned(fresh_loader(root))
    assert not status.loaded and f"HF_FFF_KERNEL_PATH={folder} cannot be used" in warning
    assert compiler.count() == 0, "something else was built in its place"
    monkeypatch.setenv("HF_FFF_BACKEND", "native")
    with pytest.raises(RuntimeError, match="HF_FFF_KERNEL_PATH"):
        fresh_loader(root).load("tiny")


def test_a_kernel_path_for_another_library_is_not_in_the_way(root, monkeypatch, tmp_path):
    loader = fresh_loader(root)
    loader.LIBRARIES["other"] = loader.Library("other", ("other.cpp",))
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(tmp_path / "libhf_fff_other.so"))
    assert load_quietly(loader).origin == "built"


def test_bundled(root, compiler):
    built = fresh_loader(root).load("tiny").path
    bundled = root / "package" / "_lib" / built.name
    bundled.parent.mkdir(parents=True)
    shutil.copy(built, bundled)
    compiler()
    status = load_quietly(fresh_loader(root))
    assert (status.origin, status.path) == ("bundled", bundled)
    bundled.unlink()
    bundled.write_text("garbage")
    assert load_quietly(fresh_loader(root)).origin == "built"
    compiler("exit 1")
    (root / "tiny.h").write_text("#define TINY 5\n")
    _, warning = load_warned(fresh_loader(root))
    assert "bundled library cannot be used" in warning


def test_build_ahead(root, compiler):
    compiler()
    built = fresh_loader(root).build("tiny")
    assert (built.loaded, built.origin, compiler.count()) == (True, "built", 1)
    assert fresh_loader(root).build("tiny").origin == "cache"
    loader = fresh_loader(root)
    assert loader.build("tiny", force=True).origin == "built" and compiler.count() == 2
    assert loader.load("tiny").origin == "built"
    assert load_quietly(fresh_loader(root)).origin == "cache"


def test_build_reports_failure_without_a_warning(root, compiler, tmp_path, monkeypatch):
    compiler("echo the moon is full; exit 1")
    loader = fresh_loader(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failed = loader.build("tiny")
    assert not failed.loaded and "the moon is full" in failed.reason and loader.status("tiny") is None
    compiler()
    monkeypatch.setenv("HF_FFF_CACHE", str(unusable_folder(tmp_path)))
    assert not loader.build("tiny").loaded, "what is built would be gone when the process ends"
    assert loader.build("tiny", output=tmp_path / "out").path.parent == tmp_path / "out"


def test_build_repairs_a_failed_load(root, tmp_path, compiler):
    compiler("exit 1")
    loader = fresh_loader(root)
    load_warned(loader)
    compiler()
    loader.build("tiny")
    assert loader.load("tiny").loaded


def test_warnings_as_errors_still_leave_a_working_fallback(root, compiler):
    compiler("exit 1")
    loader = fresh_loader(root)
    with pytest.raises(RuntimeWarning):
        load_quietly(loader)
    assert not load_quietly(loader).loaded and compiler.count() == 1


def test_describe(root, tmp_path, monkeypatch):
    loader = fresh_loader(root)
    before = loader.describe()
    assert (before["backend_setting"], before["cache"], before["sources"]) == (
        "auto",
        str(tmp_path / "cache"),
        str(root),
    )
    row = before["libraries"]["tiny"]
    assert row["status"] == "not loaded yet" and len(row["key"]) == 16 and row["compiler"] and row["version"]
    assert loader.status("tiny") is None
    path = loader.load("tiny").path
    row = loader.describe()["libraries"]["tiny"]
    assert (row["status"], row["loaded"], row["origin"], row["path"]) == ("native", True, "built", str(path))
    assert row["key"] in str(path)
    monkeypatch.setenv("PATH", "")
    json.dumps(loader.describe())
    assert "no c++ compiler" in loader.describe()["libraries"]["tiny"]["compiler"]


def test_the_real_sources_are_where_the_loader_looks():
    spec = util.spec_from_file_location("fresh_loader", LOADER)
    loader = util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    for library in loader.LIBRARIES.values():
        assert all(path.is_file() for path in library.files())
