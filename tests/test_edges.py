"""How a program begins and ends, tried with one whose work is imported slowly."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

SLOW = """
import sys
sys.path.insert(0, {root!r})
from program import edges
if __name__ == "__main__":
    edges.run("slow", lambda: print("parsed", flush=True) or sys.argv[1:])
print("importing", flush=True)
import time
try:
    time.sleep({seconds})
except BaseException:
    pass  # as some libraries do
def run(args):
    print("working", flush=True)
    exec(args[0])
"""


@pytest.fixture
def start(tmp_path):
    """Start the program, which imports for so many seconds and then does what the statement says."""

    def started(statement: str, seconds: float = 0, **more) -> subprocess.Popen:
        root = str(Path(__file__).parents[1])
        (tmp_path / "slow.py").write_text(SLOW.format(root=root, seconds=seconds))
        command = [sys.executable, str(tmp_path / "slow.py"), statement]
        # A job in the background ignores Ctrl-C, and what it starts does so, too: it is asked for here.
        ask = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, preexec_fn=ask, **pipes, **more)

    return started


def wait_for(process: subprocess.Popen, line: str) -> None:
    for said in process.stdout:
        if said.strip() == line:
            return time.sleep(0.1)
    raise AssertionError(f"{line} was never said")


@pytest.mark.parametrize(
    ("statement", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise ValueError('a\\n  flag')", 2, "slow.py: a flag\n"),
        ("open('/proc/nowhere')", 2, "slow.py: [Errno 2] No such file or directory: '/proc/nowhere'\n"),
        ("raise FloatingPointError('no number')", 1, "slow.py: no number\n"),
        ("raise SystemExit(143)", 143, ""),
        ("raise KeyboardInterrupt", 130, "slow.py: stopped by Ctrl-C\n"),
    ],
)
def test_a_program_ends_with_one_line(start, statement, status, said):
    process = start(statement)
    out, error = process.communicate()
    assert (process.returncode, error) == (status, said)
    assert out.split() == ["parsed", "importing", "working"]  # each once


def test_a_fault_of_the_program_keeps_its_traceback(start):
    process = start("1 / 0")
    error = process.communicate()[1]
    assert process.returncode == 1 and error.startswith("Traceback") and "ZeroDivisionError" in error


def test_only_the_first_process_says_the_line(start):
    process = start("raise ValueError('a')", env={"RANK": "1"})
    assert process.communicate()[1] == "" and process.returncode == 2


@pytest.mark.parametrize("moment", ["importing", "working"])
def test_ctrl_c_is_one_line_at_any_moment(start, moment):
    process = start("time.sleep(60)", seconds=60 if moment == "importing" else 0)
    wait_for(process, moment)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "slow.py: stopped by Ctrl-C\n")


def test_at_work_ctrl_c_is_an_exception_that_tidies_up(start):
    process = start("try:\n    time.sleep(60)\nfinally:\n    print('tidied', flush=True)")
    wait_for(process, "working")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and out.strip() == "tidied"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval.py"])
def test_help_and_a_mistyped_flag_do_not_wait_for_torch(script, tmp_path):
    """A torch that cannot be imported stands in its place."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(Path(__file__).parents[1] / script)]
    run = partial(subprocess.run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    shown, wrong = run([*command, "--help"]), run([*command, "--no-such-flag"])
    assert shown.returncode == 0 and f"python {script}" in shown.stdout
    if script != "train.py":  # whose help ends with a line of all recipes
        assert max(map(len, shown.stdout.splitlines())) <= 120
    assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr and "torch" not in wrong.stderr
