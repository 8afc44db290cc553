"""Several gloo processes on one machine, for the tests that need them."""

import os
import socket
import subprocess
import sys

import paths

ROOT = paths.ROOT

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "ACCELERATE_USE_CPU": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}


def command(arguments: list[str], processes: int) -> list[str]:
    """The command line of a Python file with `processes` processes; 0 starts it alone, without torchrun."""
    if not processes:
        return [sys.executable, *arguments]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), *arguments]


def launch(arguments: list[str], processes: int = 0, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a Python file to its end; its output is in the failure's message."""
    done = subprocess.run(
        command(arguments, processes), env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done
