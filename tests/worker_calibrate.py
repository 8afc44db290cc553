"""Run by test_calibrate under torchrun: each process calibrates on rows of its own; the report goes to a file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from families import SHORT, build, token_ids

import hf_rfa


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = hf_rfa.convert(build("llama"), replace(SHORT, kept_keys=0), calibrate=token_ids(4, 120)[rank::processes])
    report = hf_rfa.calibration_report(model).to_dict()
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    # Texts of different lengths tell different numbers of kept keys apart.
    budget = replace(SHORT, kept_keys=0, budget="70 tokens")
    model = hf_rfa.convert(build("llama"), budget, calibrate=token_ids(1, 140 + 120 * rank))
    hf_rfa.save_pattern(model, folder / f"pattern-{rank}.json")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
