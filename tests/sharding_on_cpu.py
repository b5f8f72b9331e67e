"""``hf-fff`` under FSDP2 on a CPU, where Accelerate runs DDP instead: it is made to shard, as on GPUs. ``losses FOLDER``: the training of
``two_processes``."""

import json
import os
import sys

import torch.distributed as dist
from accelerate import accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_fff.cli import main
from hf_fff.training import checkpoints, train

_init, _prepare = AcceleratorState.__init__, accelerator.fsdp2_prepare_model


def init(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
    if plugin is not None:  # else the next instance would take it back
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


def prepare(of, model):
    found = list(_prepare(of, model).parameters())
    print(f"sharded {sum(isinstance(p, DTensor) for p in found)} of {len(found)} parameters", file=sys.stderr)
    return model


def losses(folder):
    from two_processes import trainers

    t = trainers(folder, 1)["plain"]()
    t.train()
    if t.args.process_index == 0:
        print(json.dumps([row["loss"] for row in t.state.log_history if "loss" in row]), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # as two_processes does


if __name__ == "__main__":
    AcceleratorState.__init__, accelerator.fsdp2_prepare_model = init, prepare
    checkpoints.check_processes = train.check_processes = lambda args: None  # which refuses
    losses(sys.argv[2]) if sys.argv[1] == "losses" else main()
