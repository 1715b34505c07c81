"""Sparse mixture-of-experts feed-forward that balances its own load."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.feed_forward import Expert
from open_mythos.nn.linear import Linear, apply, fan_in_scale, residual_gain
from open_mythos.ops.experts import grouped_swiglu
from open_mythos.ops.rows import expert_counts, greatest


class MoEFFN(nn.Module):
    """Routed experts with top-k choice beside always-on shared experts: (..., dim) -> (..., dim).

    **Routing** (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): the ``topk`` experts with the largest
    ``router(x) + router_bias`` are chosen; they are mixed by ``sigmoid(router(x))``, normalised over the chosen (a
    single one keeps its score, through which the router learns, as in Switch, arXiv:2101.03961), or with
    ``router_score="softmax"`` by a softmax over the logits of the chosen (as in Mixtral, arXiv:2401.04088). So
    ``router_bias`` moves the choice and never the weight.

    **Balance** needs no loss and no call. While it trains, the module counts how many tokens each expert gets.
    Once the router's weights differ from those that were counted with, an optimizer step has passed: the next
    forward moves ``router_bias`` by ``router_bias_rate`` towards the mean load and starts a new count. One update
    per optimizer step, then, however many micro-batches or loops it saw; recomputation by activation checkpointing
    is not counted, nor are padding (all-zero) tokens, nor anything in eval mode.

    Attributes:
        router: :class:`Linear` (dim -> n_experts), the logits.
        router_bias: (n_experts,) float32 buffer; stays float32 under ``.to(dtype)``.
        topk: experts per token.
    """

    router_bias: Tensor
    expert_load: Tensor
    _counted_with: Tensor | None

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_experts, self.topk, self.bias_rate = cfg.n_experts, cfg.n_experts_per_tok, cfg.router_bias_rate
        self.is_softmax = cfg.router_score == "softmax"
        self.router = Linear(cfg.dim, cfg.n_experts, std=cfg.weight_std)
        self.gate_up = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.expert_dim, cfg.dim))
        self.down = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, cfg.expert_dim))
        self.shared = Expert(cfg.dim, cfg.shared_dim, cfg.core_layers, cfg.weight_std) if cfg.n_shared_experts else None
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts))
        self.register_buffer("expert_load", torch.zeros(cfg.n_experts, dtype=torch.int64))
        # The router's weights that the count belongs to. A buffer, so that whoever stops and goes on can keep it too.
        self.register_buffer("_counted_with", None, persistent=False)
        self.gate_up_scale = fan_in_scale(cfg.dim, 1.0, cfg.weight_std)
        self.down_scale = fan_in_scale(cfg.expert_dim, residual_gain(cfg.core_layers), cfg.weight_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=self.router.std)
        nn.init.normal_(self.down, std=self.router.std)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts (..., topk) int64, best first, and their mixing weights (..., topk) float32."""
        return self.choose(apply(self.router, x).float())

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`route`, from the router's logits (..., n_experts) in float32."""
        chosen = greatest(logits, self.router_bias, self.topk)
        scores = logits.gather(-1, chosen)
        if self.is_softmax:
            return chosen, scores.softmax(-1)
        # sigmoid / sum of sigmoids, but with a gradient where all of them underflow
        return chosen, F.logsigmoid(scores).softmax(-1) if self.topk > 1 else scores.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if self.training and not torch.compiler.is_compiling():
            self.update_bias()
        chosen, weights = self.route(tokens)
        if self.training:
            _count(self.expert_load, chosen, tokens.detach())
        # The scale of `down` is applied to the mixing weights, which are smaller.
        out = grouped_swiglu(tokens, self.gate_up, self.down, chosen, weights * self.down_scale, self.gate_up_scale).to(
            tokens.dtype
        )
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view(x.shape)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Apply the counted load, if the weights have moved on since it was counted. Called by the forward pass."""
        # Values, not version counters, which fused optimizers leave alone; on the device, so nothing waits for it.
        weights, before = self.router.weight.detach(), self._counted_with
        stepped = torch.ones((), dtype=torch.bool, device=weights.device)
        if before is not None and before.device == weights.device:
            stepped = (before != weights).any()
        load = self.expert_load.float()
        self.router_bias += stepped * self.bias_rate * torch.sign(load.mean() - load)
        self.expert_load *= ~stepped
        self._counted_with = weights.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFFN:
        """Keep the bias in float32: steps of 1e-2 are lost in a bfloat16 sum."""
        exact = self.router_bias
        super()._apply(fn, recurse)
        if self.router_bias.dtype != torch.float32:
            self.router_bias = exact.to(self.router_bias.device)
        return self

    def extra_repr(self) -> str:
        _, dim, width = self.down.shape
        return f"{self.n_experts} experts {dim}->{width}->{dim}, topk={self.topk}"


def _in_backward() -> bool:
    """Whether autograd is running, as it is while activation checkpointing recomputes a forward pass."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("open_mythos::count_experts", mutates_args=("load",))
def _count(load: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    """Add each expert's share of real tokens to ``load``. An operator, so that compiled code runs the check too."""
    if not _in_backward():
        # One pass, where any() takes three. Behind a norm no squares vanish but those of zeros.
        live = torch.linalg.vecdot(tokens, tokens).ne(0).unsqueeze(-1).expand_as(chosen)
        load += expert_counts(torch.where(live, chosen, len(load)), len(load) + 1)[:-1]


@_count.register_fake
def _(load: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    return None
