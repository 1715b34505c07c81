"""Feed-forwards: a dense SwiGLU, and a sparse mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.auxiliary import count_choices
from open_mythos.nn.linear import WEIGHT_STD, Linear, call, fan_in_scale, residual_gain, swiglu
from open_mythos.nn.modes import is_evaluating
from open_mythos.ops.experts import swiglu_experts


class Expert(nn.Module):
    """SwiGLU feed-forward ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202): (..., dim) -> (..., dim).

    Used as the feed-forward of prelude and coda and as the always-on shared experts.

    Args:
        dim: model width.
        expert_dim: hidden width.
        n_layers: depth of the stack that it is part of, which sets the scale of its output at initialisation.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, expert_dim: int, n_layers: int = 1, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.gate = Linear(dim, expert_dim, std=std)
        self.up = Linear(dim, expert_dim, std=std)
        self.down = Linear(expert_dim, dim, gain=residual_gain(n_layers), std=std)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate, self.up, self.down)


class MoEFFN(nn.Module):
    """Routed experts with top-k choice beside always-on shared experts: (..., dim) -> (..., dim).

    **Routing** (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): the ``topk`` experts with the largest
    ``router(x) + router_bias`` are chosen. Their mixing weights are ``sigmoid(router(x))``, normalised over the chosen
    (not with ``topk=1``, where the router learns through the score itself, as in Switch, arXiv:2101.03961), or with
    ``router_score="softmax"`` a softmax over the logits of the chosen (as in Mixtral, arXiv:2401.04088). So
    ``router_bias`` affects the choice and never the weights.

    **Balance** needs no loss: a training step counts how many tokens each expert gets in ``expert_load``, and
    :func:`open_mythos.nn.auxiliary.balance` then moves ``router_bias`` towards the mean load.

    Attributes:
        router: :class:`Linear` (dim -> n_experts), the logits.
        router_bias: (n_experts,) float32 buffer; stays float32 under ``.to(dtype)``.
        expert_load: (n_experts,) int64 buffer, tokens since the last balance.
        topk: experts per token.
        engine: the function that runs the chosen experts, called as :func:`~open_mythos.ops.experts.swiglu_experts`.
    """

    router_bias: Tensor
    expert_load: Tensor

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
        self.gate_up_scale = fan_in_scale(cfg.dim, 1.0, cfg.weight_std)
        self.down_scale = fan_in_scale(cfg.expert_dim, residual_gain(cfg.core_layers), cfg.weight_std)
        self.engine: Callable[..., Tensor] = swiglu_experts
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=self.router.std)
        nn.init.normal_(self.down, std=self.router.std)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts (..., topk) int64, best first, and their mixing weights (..., topk) float32."""
        return self.choose(call(self.router, x).float())

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`route`, from the router's logits (..., n_experts) in float32."""
        chosen = (logits.detach() + self.router_bias).topk(self.topk, dim=-1).indices
        scores = logits.gather(-1, chosen)
        if self.is_softmax:
            return chosen, scores.softmax(-1)
        # equals sigmoid / sum of sigmoids, but keeps a gradient where all of these underflow
        return chosen, F.logsigmoid(scores).softmax(-1) if self.topk > 1 else scores.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(tokens)
        if self.training and not is_evaluating():
            count_choices(self.expert_load, chosen, tokens)
        return self.mix(tokens, chosen, weights).view(x.shape)

    def mix(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The chosen experts (N, topk) of tokens (N, dim), mixed by ``weights``, and the shared ones: (N, dim)."""
        shared = None if self.shared is None else self.shared(tokens)
        scales = self.gate_up_scale, self.down_scale
        return self.engine(tokens, self.gate_up, self.down, chosen, weights, scales, shared)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFFN:
        """Keep ``router_bias`` in float32: steps of 1e-2 would be rounded away in bfloat16."""
        exact = self.router_bias
        super()._apply(fn, recurse)
        if self.router_bias.dtype != torch.float32:
            self.router_bias = exact.to(self.router_bias.device)
        return self

    def extra_repr(self) -> str:
        _, dim, width = self.down.shape
        return f"{self.n_experts} experts {dim}->{width}->{dim}, topk={self.topk}"
