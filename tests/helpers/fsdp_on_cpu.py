"""`longvlm train` under FSDP on the CPU, to be started by `accelerate launch --config_file fsdp.yaml`.

    accelerate launch --config_file fsdp.yaml -m tests.helpers.fsdp_on_cpu CONFIG.yaml [CONFIG.yaml ...]

accelerate hands its FSDP plugin on to processes with accelerators only. Here its state takes it for processes on the
CPU (gloo) too, and in the same way; the wrapping, sharding, clipping, collecting and saving are accelerate's, torch's
and transformers' own. After each training it prints how the layers of the LLM were kept, as one JSON line.
"""

import json
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

from longvlm.training.arguments import parse_arguments
from longvlm.training.train import train

_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shares(model) -> dict[str, list[float]]:
    """Kind of the LLM's layers, and what share of their weights this process holds."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    held = sorted({parameter.to_local().numel() / parameter.numel() for parameter in parameters})
    return dict.fromkeys({type(layer).__name__ for layer in layers}, held)


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    for config in sys.argv[1:]:
        trainer = train(*parse_arguments([config]))
        if trainer.args.should_save:
            print(json.dumps({"trained": config, "shares": shares(trainer.model)}), flush=True)
