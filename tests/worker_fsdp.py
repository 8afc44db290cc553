"""Run by torchrun: a script under FSDP2 on processes without a GPU.

torchrun --nproc_per_node 2 worker_fsdp.py CONFIG SCRIPT ARGUMENTS

CONFIG is the YAML file that `accelerate launch --config_file` would get; the script finds what the launcher tells it.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_multi_gpu_env


def main() -> None:
    config, script = sys.argv[1:3]
    own = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")}
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, script]))
    os.environ.update(prepare_multi_gpu_env(arguments) | own)
    # Accelerate has FSDP for GPUs alone. What torch does in its name runs on gloo too.
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
