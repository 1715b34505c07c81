"""Diagnosis of logits that are not finite: another forward pass finds the first module whose output is not."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.generation.engine import Depth
from open_mythos.generation.fused import shallow_copy
from open_mythos.interface import Model
from open_mythos.nn.modes import evaluating


@torch.no_grad()
def not_finite(model: Model, depth: Depth, text: list[Tensor], attention_mask: Tensor | None = None) -> ValueError:
    """The error for logits that are not finite: it names the first layer whose output was not.

    Args:
        model, depth: with which the logits were computed.
        text: what was read, in order: parts of (B, n) tokens each, of which the first may be embeddings (B, n, dim).
        attention_mask: of the first part; 0 at padding.
    """
    first, *new = text
    found: list[str] = [] if not first.is_floating_point() or bool(first.isfinite().all()) else ["input_ids"]
    ids = torch.cat([first, *(model.embed(x) if first.is_floating_point() else x.to(first.dtype) for x in new)], 1)
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (0, ids.shape[1] - first.shape[1]), value=1)
    twin, loop = _twin(model, {}), [0]

    def count(module: nn.Module, inputs: Any) -> None:
        loop[0] += 1

    def look(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(f"{name} in loop {loop[0]}" if name.startswith("recurrent.") else name)

    twin.recurrent.block.register_forward_pre_hook(count)
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
    options = dict(attention_mask=attention_mask, exit=depth.exit)
    evaluating(None, lambda: twin.head(twin.hidden(ids, depth.n_loops, **options)))
    where = f"the first non-finite output is that of {found[0]}" if found else "yet every layer's output is finite"
    return ValueError(
        f"the logits after {ids.shape[1]} tokens are not finite, so no next token can be chosen; {where}. Look for "
        f"weights that are not finite or too large, or run the model in a wider dtype"
    )


def _twin(module: Any, known: dict[nn.Module, Any]) -> Any:
    """A copy of a module tree that shares its tensors but not its hooks, as other threads may be using the original."""
    if module not in known:
        twin = known[module] = shallow_copy(module)
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(module._forward_hooks), OrderedDict()
        twin._forward_pre_hooks.update(module._forward_pre_hooks)
        twin._compiled_call_impl = None
        twin._modules = {name: child and _twin(child, known) for name, child in module._modules.items()}
    return known[module]
