"""scripts/accelerate/*.yaml: what `accelerate launch` makes of them; nothing is started."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from processes import ROOT

SCRIPT = str(ROOT / "scripts" / "finetune.py")
FOLDER = ROOT / "scripts" / "accelerate"


def launched(name: str):
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), SCRIPT, "run.yaml"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments


def test_every_file_is_known():
    assert sorted(path.name for path in FOLDER.iterdir()) == ["ddp.yaml", "deepspeed_zero2.yaml", "fsdp2.yaml"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp.yaml", DistributedType.MULTI_GPU),
        ("fsdp2.yaml", DistributedType.FSDP),
        ("deepspeed_zero2.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_a_file_starts_eight_processes_of_its_kind(name, kind):
    arguments = launched(name)
    assert arguments.num_processes == 8
    assert {"MULTI_GPU": arguments.multi_gpu, "FSDP": arguments.use_fsdp, "DEEPSPEED": arguments.use_deepspeed}[
        kind.value
    ]
    assert arguments.mixed_precision == "no"  # finetune's own autocast is the one that counts


def test_fsdp_is_version_2_wraps_layers_and_sends_no_weights():
    environment = prepare_multi_gpu_env(launched("fsdp2.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_deepspeed_is_zero_2_without_offloading():
    arguments = launched("deepspeed_zero2.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` notes it between the two
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "none"
