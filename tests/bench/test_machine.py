"""What stands beside a figure, on machines that this one is not."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hf_fff import ops
from hf_fff.bench import machine
from hf_fff.ops import loader


def test_all_that_stands_beside_a_figure():
    facts = machine.summary()
    assert list(facts) == ["cpu", "threads", "isa", "backend", "torch", "hf_fff"] and all(facts.values())
    assert facts["threads"] == torch.get_num_threads()
    report = json.loads(json.dumps(machine.report()))
    assert set(report) == {"hf_fff", "python", "platform", "packages", "cpu", "cuda", "backend", "gpu_ways", "kernels"}
    assert report["packages"]["transformers"] == version("transformers")
    assert report["kernels"]["libraries"]["cpu"]["status"] == report["backend"]["cpu"] == facts["backend"]


def test_the_instruction_set_is_asked_for_after_the_library_is_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(ops, "backend", lambda device="cpu": loaded.append(device) or "native")
    monkeypatch.setattr(ops, "isa", lambda: "avx2" if loaded else None)
    assert machine.summary()["isa"] == "avx2"
    loaded.clear()
    assert machine.report()["backend"]["isa"] == "avx2"


def test_pytorch_runs(monkeypatch):
    """As in a process in which the library is not loaded yet."""
    monkeypatch.setattr(loader, "_statuses", {})
    monkeypatch.setattr(ops, "has_native", lambda device="cpu": False)
    monkeypatch.setenv("HF_FFF_BACKEND", "torch")
    assert machine.summary()["isa"] == "-" and machine.summary()["backend"] == "torch"
    report = machine.report()
    assert report["backend"]["cpu"] == "torch" and report["backend"]["isa"] is None
    assert report["kernels"]["libraries"]["cpu"]["reason"] == "HF_FFF_BACKEND=torch"


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("transformers", "hf-fff-no-such-package"))
    packages = machine.report()["packages"]
    assert list(packages) == ["torch", "transformers", "hf-fff-no-such-package"]
    assert packages["hf-fff-no-such-package"] == "not installed" != packages["transformers"]


X86 = "processor : 0\ncpu family\t: 6\nmodel name\t: Some CPU: fast\nflags :\n\nprocessor : 1\nmodel name\t: Other\n"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "name"),
    [
        (X86, "x86", "Some CPU: fast (family 6)"),
        ("processor : 0\nCPU part : 0xd40\n", "arm", "arm"),  # Arm has no name there
        (OSError("not Linux"), "", "a machine"),
    ],
)
def test_name_of_the_cpu(monkeypatch, cpuinfo, processor, name):
    def read_text(self, **_):
        assert str(self) == "/proc/cpuinfo"
        if isinstance(cpuinfo, OSError):
            raise cpuinfo
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(machine.platform, "processor", lambda: processor)
    monkeypatch.setattr(machine.platform, "machine", lambda: "a machine")
    assert machine.cpu_name() == name


def test_what_every_measurement_tells():
    facts = json.loads(json.dumps(machine.facts()))
    assert machine.summary().items() <= facts.items()
    assert facts["cores"] >= 1 and facts["transformers"] == version("transformers") and facts["date"].endswith("UTC")
    assert all(name.startswith("L") for name in facts["caches"])


def test_free_memory(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "MemTotal: 9 kB\nMemAvailable:   3 kB\n")
    assert machine.free_memory() == 3072
    monkeypatch.setattr(Path, "read_text", lambda self, **_: (_ for _ in ()).throw(FileNotFoundError()))
    assert machine.free_memory() is None
