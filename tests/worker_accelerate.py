"""Run by torchrun: a script under FSDP2 or DeepSpeed on processes without a GPU.

torchrun --nproc_per_node 2 worker_accelerate.py CONFIG SCRIPT ARGUMENTS

CONFIG is the YAML file that `accelerate launch --config_file` would get; the script finds what the launcher tells it.
Accelerate has both for GPUs alone; what torch and DeepSpeed do in its name runs on gloo too.
"""

import os
import runpy
import sys
from pathlib import Path

import accelerate
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_deepspeed_cmd_env, prepare_multi_gpu_env


def main() -> None:
    config, script = sys.argv[1:3]
    own = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")}
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, script]))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` notes it in between
        _, environment = prepare_deepspeed_cmd_env(arguments)
        kind = DistributedType.DEEPSPEED
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        environment, kind = prepare_multi_gpu_env(arguments), DistributedType.MULTI_GPU
    PartialState(cpu=True).distributed_type = kind
    os.environ.update(environment | own)
    if arguments.use_deepspeed:
        os.environ.pop("ACCELERATE_USE_CPU")
        accelerate.Accelerator = WithoutCPU
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


class WithoutCPU(accelerate.Accelerator):
    """`cpu=True` would leave DeepSpeed out."""

    def __init__(self, cpu: bool = False, **options) -> None:
        super().__init__(**options)


if __name__ == "__main__":
    main()
