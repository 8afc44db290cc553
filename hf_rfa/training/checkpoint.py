"""Checkpoints of a training run: written atomically, found again, and refused with a reason if they do not fit."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_rfa.errors import CheckpointError
from hf_rfa.training.carry import Carry


def check_output(output: Path, model: torch.nn.Module) -> None:
    """Check, before any work is done, that the folder can be written to and has room for two checkpoints.

    A checkpoint holds the weights and, for the trained ones, AdamW's two moments; the next one is complete before the
    last one is deleted.

    Raises:
        CheckpointError: no permission, no folder, or not enough room.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 2 * (weights + 2 * trained)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"Cannot write checkpoints to {str(output)!r}: {error}. Choose another `output` or get the permission."
        ) from error
    free = shutil.disk_usage(output).free
    if free < needed:
        raise CheckpointError(
            f"Two checkpoints need {needed / 2**20:,.0f} MiB. {str(output)!r} has {free / 2**20:,.0f} MiB left. Free "
            "some or choose another `output`."
        )


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, carries: dict[int, Carry]) -> Path:
    """Writes `output/checkpoint-<step>` atomically, then removes earlier ones; every process calls this.

    Raises:
        CheckpointError: the disk is full or the folder gone; the checkpoint before stays.
    """
    partial, final = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    try:
        accelerator.save_state(str(partial))
        for lane, carry in carries.items():
            torch.save(carry.state_dict(), partial / f"carry-{lane}.pt")
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = latest_checkpoint(output)
        raise CheckpointError(
            f"Could not save step {step} to {str(output)!r}: {error}. "
            + (f"{before.name} is whole: free some room and resume." if before else "There is no checkpoint yet.")
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)  # a run killed while saving keeps the checkpoint before
        for other in output.glob("checkpoint-*"):
            if other != final:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()
    return final


def latest_checkpoint(output: Path) -> Path | None:
    """The last complete checkpoint of a run, if there is one."""
    found = {int(path.name.split("-")[1]): path for path in output.glob("checkpoint-*") if path.suffix != ".partial"}
    return found[max(found)] if found else None


def load_checkpoint(accelerator: Accelerator, output: Path, carries: dict[int, Carry]) -> Path | None:
    """Restores weights, optimiser, schedule, progress, hooks and carried states from the last checkpoint, if any.

    Raises:
        CheckpointError: it cannot be read, or does not belong to this run.
    """
    path = latest_checkpoint(output)
    if path is None:
        return None
    try:
        accelerator.load_state(str(path))
        for lane, carry in carries.items():
            saved: list[dict[str, Any]] = torch.load(path / f"carry-{lane}.pt", weights_only=True)
            carry.load_state_dict(saved, accelerator.device)
    except Exception as error:  # Accelerate lets through any error of its readers
        raise CheckpointError(
            f"Cannot resume from {path.name} in {str(output)!r}: {error} Delete it, or start without `resume`."
        ) from error
    return path
