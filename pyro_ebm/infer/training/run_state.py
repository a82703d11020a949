"""What a point of a training consists of, and how to go back to one.

Parameters, the buffers of modules, the objective (its log Z, its chains) and the averages of the
weights. Checkpoints add what it takes to go on: optimizer, schedules, curves and random state.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from pyro_ebm.infer.training.run_modules import HasModules, modules_of

State = dict[str, Any]


class HasState(HasModules, Protocol):
    """A fit in progress, as far as its state goes."""

    result: Any


def state_of(run: HasState) -> State:
    """Returns the present point; its tensors are the live ones, without gradients."""
    return {
        "parameters": {name: p.detach() for name, p in run.parameters.items()},
        "buffers": {
            name: {key: buffer.detach() for key, buffer in module.named_buffers()}
            for name, module in modules_of(run).items()
        },
        "objective": run.objective.state_dict(),
        "averaged": run.result.averaged,
    }


@torch.no_grad()
def restore(state: State, run: HasState) -> None:
    """Copies a point's values into the live tensors; the averages become those of the point."""
    for name, value in state["parameters"].items():
        run.parameters[name].copy_(value)
    for name, module in modules_of(run).items():
        for key, buffer in module.named_buffers():
            buffer.copy_(state["buffers"][name][key])
    run.objective.load_state_dict(state["objective"])
    run.result.averaged = {name: value.clone() for name, value in state["averaged"].items()}
