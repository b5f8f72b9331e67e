"""``hf-fff`` under FSDP2 on a CPU, where Accelerate runs DDP instead: it is made to shard, as on GPUs."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_fff.cli import main
from hf_fff.training import checkpoints, train

_init = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
    if plugin is not None:  # else the next instance would take it back
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = init
    checkpoints.check_processes = train.check_processes = lambda args: None  # which refuses
    main()
