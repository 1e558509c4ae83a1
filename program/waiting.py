"""How torch's threads wait for each other: spinning on an idle machine, asleep beside another busy program.

A thread that spins goes on at once, but it keeps its core from the thread that it waits for. With torch's default an update
of the main job takes 50 times as long beside one busy program. A thread that sleeps has to be woken, which takes twice as
long on an idle machine. results/README.md has the measurements.

GNU's OpenMP, which torch's threads on Linux are from, is told only once how long to spin. But it hardly spins while there
are more threads than cores (its manual, GOMP_SPINCOUNT). So a watcher looks at the machine once a second. While other
programs need the cores, it keeps some more threads, which do nothing. As many threads as before do the work, so every
result stays the same, bit for bit.
"""

import os
import sys
import threading
import time

SPINS = "10000"  # torch's default is 300,000. An idle machine is as fast with fewer; a neighbour is seen after a second only


def spin_briefly() -> None:
    """Let threads spin for a short time only, unless the user has set how they wait. Called before torch is imported."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def make_room() -> None:
    """Start the watcher, where torch is imported, its threads spin as set above, and the system says how busy it is."""
    ours = "OMP_WAIT_POLICY" not in os.environ and os.environ.get("GOMP_SPINCOUNT") == SPINS
    if ours and "torch" in sys.modules and sys.platform == "linux" and os.access("/proc/stat", os.R_OK):
        import torch

        if torch.get_num_threads() > 1:
            threading.Thread(target=watch, args=(torch.get_num_threads(),), daemon=True).start()


def watch(threads: int) -> None:
    """Once a second: keep idle threads while the others' programs and our `threads` need more than all cores."""
    cores = len(os.sched_getaffinity(0))
    release = None
    while True:
        crowded = cores_of_others(seconds=1) + threads > cores + 0.5
        if crowded and release is None:
            release = keep_idle_threads(threads, cores)
        elif release is not None and not crowded:
            release.set()
            release = None


def keep_idle_threads(threads: int, cores: int) -> threading.Event:
    """Make OpenMP have more threads than cores, until the event is set.

    Each Python thread that computes gets `threads` - 1 helpers of its own from OpenMP. They last as long as it does.
    """
    import torch

    release = threading.Event()

    def compute_and_wait() -> None:
        torch.zeros(65_536 * threads, device="cpu").add_(1)  # twice as large as it must be for all to help
        release.wait()

    for _ in range(cores // (threads - 1)):
        threading.Thread(target=compute_and_wait, daemon=True).start()
    return release


def cores_of_others(seconds: float) -> float:
    """How many cores other programs use, of those that this process may use. It takes so many seconds to see that."""
    began, busy, own = time.monotonic(), busy_seconds(), time.process_time()
    time.sleep(seconds)
    others = (busy_seconds() - busy) - (time.process_time() - own)
    return others / (time.monotonic() - began)


def busy_seconds() -> float:
    """CPU seconds of all programs since the machine started, on the cores that this process may use."""
    mine, ticks = {f"cpu{core}" for core in os.sched_getaffinity(0)}, 0
    with open("/proc/stat") as file:
        for line in file:
            name, *numbers = line.split()
            if name in mine:
                user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, numbers[:8])
                ticks += user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
