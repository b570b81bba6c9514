"""What a torch.fx graph proves about norms: for graph modules, whose graph is their code, and where a source cannot be read."""

from __future__ import annotations

import inspect
from collections import Counter

from torch import fx, nn

from .source import Fusion
from .swap import twin


class _Children(fx.Tracer):
    """Calls of children stay calls."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return True


def graph_of(owner: nn.Module) -> fx.Graph | None:
    """The graph of ``owner``, if it has one for all inputs and both modes."""
    if isinstance(owner, fx.GraphModule):
        return owner.graph
    parameters = list(inspect.signature(owner.forward).parameters.values())
    # with a default, or a list of arguments, the trace would follow one way of calling it
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    before, mode = dict(owner.__dict__), owner.training
    graphs = []
    try:
        for training in (True, False):
            owner.training = training
            graphs.append(_Children().trace(owner))
    except Exception:  # whatever the module's own code raises on a proxy: no proof
        return None
    finally:
        changed = {k for k in (*before, *owner.__dict__) if before.get(k) is not owner.__dict__.get(k)} - {"training"}
        owner.__dict__.clear()
        owner.__dict__.update(before)
        owner.training = mode
    return graphs[0] if not changed and str(graphs[0]) == str(graphs[1]) else None


def fusions(owner: nn.Module, graph: fx.Graph, norms: set[nn.Module]) -> dict[nn.Module, Fusion]:
    """The norms whose output has one user in the graph, an activation that the graph calls nowhere else."""
    modules = dict(owner.named_modules())
    called = Counter(modules[str(n.target)] for n in graph.nodes if n.op == "call_module" and str(n.target) in modules)
    found = {}
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if norm not in norms or norm is None or called[norm] != 1:
            continue
        follower, user = None, node
        while len(user.users) == 1:
            user = next(iter(user.users))
            follower = modules.get(str(user.target)) if user.op == "call_module" and len(user.args) == 1 and not user.kwargs else None
            if type(follower) is not nn.Identity:
                break
        if follower is None or type(follower) is nn.Identity or called[follower] != 1:
            continue
        held = twin(follower)
        if held is not None:
            found[norm] = Fusion(held, silent=[follower])
    return found
