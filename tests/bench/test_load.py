"""What others did meanwhile, and what is measured again for it."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from hf_fff.bench import load
from hf_fff.bench.load import Load, Patience


@pytest.fixture
def machine(monkeypatch):
    """Four cores, and clocks that only a test moves."""

    class Machine:
        now, work, own = 100.0, 1000.0, 50.0

        def passes(self, seconds, others, own=0.0):
            self.now += seconds
            self.work += seconds * (others + own)
            self.own += seconds * own

    m = Machine()
    monkeypatch.setattr(load.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(load, "_clocks", lambda children=(): (m.work, m.own))
    monkeypatch.setattr(load, "_average", lambda: m.now)
    monkeypatch.setattr(load.time, "perf_counter", lambda: m.now)
    monkeypatch.setattr(load.time, "monotonic", lambda: m.now)
    m.neighbours = iter(())
    monkeypatch.setattr(load.time, "sleep", lambda seconds: m.passes(seconds, next(m.neighbours)))
    return m


def test_own_work_does_not_count(machine):
    with load.watched() as found:
        machine.passes(10, others=0.5, own=2.0)
    assert found == Load(100.0, 110.0, 0.5)


@pytest.mark.parametrize(
    ("others", "threads", "busy"), [(0.1, 4, False), (0.3, 4, True), (2.1, 2, False), (2.3, 2, True), (None, 4, False)]
)
def test_busy(machine, others, threads, busy):
    assert Load(others=others).busy(threads) is busy


def test_without_patience_it_is_measured_once(machine):
    patience = Patience()
    assert patience.measure(4, lambda: machine.passes(5, 3.0) or "x") == ("x", Load(100.0, 105.0, 3.0))
    assert [found.others for found in patience.loads] == [3.0]


def test_with_patience_it_waits_and_the_quietest_is_kept(machine):
    machine.neighbours = iter([3.0, 3.0, 0.0, 3.0, 0.0])
    done = iter([("first", 2.0), ("second", 0.0)])

    def run():
        name, others = next(done)
        machine.passes(5, others)
        return name

    patience = Patience(60)
    result, found = patience.measure(4, run)
    assert result == "second" and found.others == 0.0
    in_vain = 3 * load._WINDOW + 5  # waited, and measured
    assert patience.seconds == 60 - in_vain and patience.spent == in_vain
    assert patience.measuring == 2 * load._WINDOW + 5  # a quiet look each time, and what was kept


def test_patience_ends(machine):
    machine.neighbours = iter([3.0] * 100)
    runs = []
    patience = Patience(7)
    result, found = patience.measure(4, lambda: runs.append(machine.passes(5, 2.0)) or len(runs))
    assert result == 1 and found.others == 2.0 and patience.seconds <= 0 and len(runs) == 1


def test_worst():
    found = load.worst([Load(1.0, 2.0, 0.1), Load(2.0, 3.0, None), Load(3.0, 4.0, 0.7)])
    assert found == Load(1.0, 4.0, 0.7) and load.worst([]) == Load()
    assert json.loads(json.dumps(asdict(found)))["others"] == 0.7


def test_children_are_no_others():
    if load._clocks() is None:
        pytest.skip("this system does not tell")
    command = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alone, together = load._clocks()[1], load._clocks([child.pid])[1]
        child.communicate(b"\n")
    assert together - alone >= 0.4


def test_on_this_machine():
    with load.watched() as found:
        sum(range(100_000))
    assert found.others is None or found.others >= 0
