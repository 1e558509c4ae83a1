"""Threads wait asleep beside a busy program, and as the user has set it, where the user has."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from program import waiting

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")


@pytest.fixture
def unset(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_set_unless_the_user_has_set_it(unset, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    waiting.spin_briefly()
    waiting.make_room()
    expected = given or {"GOMP_SPINCOUNT": "10000"}
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == expected
    assert bool(started) == (not given and sys.platform == "linux")


def test_one_thread_waits_for_nobody_and_needs_no_watcher(unset, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("started"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    waiting.spin_briefly()
    waiting.make_room()


@linux
def test_the_work_of_another_program_is_counted():
    before, own = waiting.busy_seconds(), time.process_time()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert waiting.busy_seconds() - before - (time.process_time() - own) > 0.4  # it is counted in ticks of 0.01 s


def test_our_own_work_is_not_that_of_others(monkeypatch):
    """In 2 s all programs work for 3.5 s, of which 2 are ours: the others have 0.75 of a core."""
    monkeypatch.setattr(waiting.time, "monotonic", iter([10.0, 12.0]).__next__)
    monkeypatch.setattr(waiting.time, "process_time", iter([5.0, 7.0]).__next__)
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(waiting, "busy_seconds", iter([100.0, 103.5]).__next__)
    assert waiting.cores_of_others(2) == 0.75


@linux
@pytest.mark.parametrize("threads, expected", [(4, "..kk.k."), (3, "...k..."), (1, ".......")])
def test_idle_threads_are_kept_while_our_threads_and_the_others_need_more_than_all_cores(
    monkeypatch, threads, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    kept, seen, loads = [], "", iter([0.1, 0.4, 0.9, 2.0, 0.2, 1.2, 0.0])

    def keep(*_) -> threading.Event:
        kept.append(threading.Event())
        return kept[-1]

    def others(seconds: float) -> float:
        nonlocal seen
        seen += "k" if kept and not kept[-1].is_set() else "."
        return next(loads)  # StopIteration ends the watch

    monkeypatch.setattr(waiting, "keep_idle_threads", keep)
    monkeypatch.setattr(waiting, "cores_of_others", others)
    with pytest.raises(StopIteration):
        waiting.watch(threads)
    assert seen[1:] == expected


SPIN = """
import os, sys, time
sys.path.insert(0, {root!r})
import torch
from program import waiting
cores = len(os.sched_getaffinity(0))
def spun():
    torch.zeros(65_536 * cores).add_(1)
    began = time.process_time()
    time.sleep(0.5)
    return time.process_time() - began
alone = spun()
release = waiting.keep_idle_threads(cores, cores)
time.sleep(1)
crowded = spun()
release.set()
time.sleep(1)
print("libgomp" in open("/proc/self/maps").read(), alone, crowded, spun())
"""


@linux
@pytest.mark.skipif(os.cpu_count() == 1, reason="one thread waits for nobody")
def test_with_more_threads_than_cores_they_hardly_spin():
    """Where they may spin for minutes, after an operation they use a core while the program sleeps."""
    environment = os.environ | {"GOMP_SPINCOUNT": "100000000000", "OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("OMP_WAIT_POLICY", None)
    script = SPIN.format(root=str(Path(__file__).parents[1]))
    words = [sys.executable, "-c", script]
    gnu, alone, crowded, after = subprocess.check_output(words, env=environment, text=True).split()
    if gnu != "True":
        pytest.skip("this torch has another OpenMP")
    assert float(crowded) < 0.02 < 0.1 < min(float(alone), float(after))
