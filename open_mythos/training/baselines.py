"""The models of a run: the one it trains, looped or a baseline, the one it starts from, and its teacher."""

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

import torch

from open_mythos import tasks
from open_mythos.checkpoint import without_storage
from open_mythos.config import MythosConfig
from open_mythos.diagnostics import flops_per_token, parameters
from open_mythos.fields import must, nearest
from open_mythos.model import OpenMythos, PlainMythos, UnrolledMythos
from open_mythos.models import load_model
from open_mythos.nn.block import TransformerBlock
from open_mythos.training.config import UNTIED, TrainConfig
from open_mythos.training.overrides import differences

# A block is compiled separately for each kind of call: with gradient and without, as prelude or core, and for one row
# or token, few, or many. Beyond torch's limit on recompilations, further kinds would not be compiled.
_WAYS = 32
_CLASSES: dict[str, type[OpenMythos]] = {"unrolled": UnrolledMythos, "plain": PlainMythos}
_WIDTHS = ("dense_dim", "expert_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")
_FED = _WIDTHS[:2]  # feed-forward widths, which can be tuned finely: dim has to be a multiple of twice the heads
_MATCH = 0.03  # share by which the FLOPs of the wide baseline may differ from those of the looped model


def build(cfg: TrainConfig) -> OpenMythos:
    """The model that a run trains: :class:`OpenMythos`, or one of the baselines if ``cfg.kind`` says so.

    Halting and warm start are off: a run trains the gate afterwards, and draws loop counts itself.
    """
    return _CLASSES.get(cfg.kind, OpenMythos)(_asked(cfg))


def counted(cfg: TrainConfig) -> OpenMythos:
    """As :func:`build`, on the meta device: to count parameters, or to check that the model can be built."""
    return without_storage(_CLASSES.get(cfg.kind, OpenMythos), _asked(cfg))


def shape(cfg: TrainConfig) -> MythosConfig:
    """The config of the model that a run trains."""
    return counted(cfg).cfg


def mean_context(cfg: TrainConfig, difficulty: int) -> int:
    """Tokens that a token of a problem attends to, on average."""
    return (tasks.load(cfg.task.name, **cfg.task.options).length(difficulty) + 1) // 2


def _asked(cfg: TrainConfig) -> MythosConfig:
    loops = cfg.model.max_loop_iters if cfg.kind == "looped" else cfg.depths[0]
    model = replace(cfg.model, halting=False, warm_start=False, max_loop_iters=loops)
    if cfg.kind != "wide":
        return model
    return MythosConfig.from_json(
        _widened(model.to_json(), cfg.loops.trained, mean_context(cfg, cfg.task.max_difficulty))
    )


@lru_cache(maxsize=4)
def _widened(config: str, loops: int, context: int) -> str:
    """The config of a model that at one loop takes as many FLOPs as another at ``loops`` loops.

    ``dim`` grows, and with it feed-forwards, latents and the size of heads; numbers of heads, layers and experts stay.
    """
    narrow = MythosConfig.from_json(config)
    wanted, step = flops_per_token(narrow, loops, context), 2 * narrow.n_heads

    def wide(steps: int, fed: int = 0) -> MythosConfig:
        sizes, ratio = narrow.to_dict() | {"dense_dim": narrow.ffn_dim}, 1 + steps * step / narrow.dim
        widths = {name: round(sizes[name] * ratio * (1 + fed / 1000 * (name in _FED))) for name in _WIDTHS}
        widths |= {"dim": narrow.dim + steps * step, "qk_rope_head_dim": 2 * round(narrow.qk_rope_head_dim * ratio / 2)}
        return MythosConfig.from_dict(sizes | widths)

    def cost(steps: int, fed: int = 0) -> float:
        return flops_per_token(wide(steps, fed), 1, context)

    # A model `loops` times as wide takes at least the FLOPs of `loops` loops, so the search ends there
    steps = bisect_right(range((loops - 1) * narrow.dim // step + 1), wanted, lo=1, key=cost) - 1
    above = bisect_right(range(8000), wanted, lo=1, key=lambda fed: cost(steps, fed))
    fed = min((above - 1, above), key=lambda fed: abs(cost(steps, fed) - wanted))
    off = abs(cost(steps, fed) / wanted - 1)
    sizes = f"kind='wide': no width of a model with dim={narrow.dim} takes as many FLOPs as {loops} loops"
    must(off <= _MATCH, f"{sizes} (the nearest differs by {off:.0%}); use a larger model.dim or fewer loops")
    return wide(steps, fed).to_json()


def stretched(model: OpenMythos, factor: float) -> OpenMythos:
    """``model`` with rotary wavelengths beyond ``cfg.rope_context`` stretched by ``factor``, to read longer prompts."""
    if factor == 1:
        return model
    made = type(model)(replace(model.cfg, rope_factor=factor))
    made.load_state_dict(model.state_dict())
    return made.to(next(model.parameters()).device).train(model.training)


def start_from(model: OpenMythos, cfg: TrainConfig) -> None:
    """Load the weights of ``cfg.start`` into ``model``. A bridge that they lack keeps its initial weights: zero output.

    Raises:
        ValueError: if there is no such model, or it is of another shape, naming what differs.
    """
    shapes = "many" if cfg.kind in UNTIED else "another width"
    must(
        cfg.kind not in (*UNTIED, "wide"),
        f"start={cfg.start!r} has one block for all loops, but kind={cfg.kind!r} {shapes}; leave start out",
    )
    start = load_model(cfg.start)
    new = {} if start.cfg.bridge_dim else model.state_dict()
    try:
        model.load_state_dict({k: v for k, v in new.items() if ".bridge." in k} | start.state_dict())
    except RuntimeError as error:
        pairs = differences(start.cfg, cfg.model).items() - {("bridge_dim", (0, cfg.model.bridge_dim))}
        changed = ", ".join(f"model.{key}={new!r} instead of {old!r}" for key, (old, new) in pairs)
        message = f"start={cfg.start!r} does not fit the run's model ({changed}); leave out the settings that change it"
        raise ValueError(message) from error


def train_only(model: OpenMythos, part: str) -> None:
    """Freeze the parameters of ``model`` without ``part`` in their dotted names; none of them for "".

    Raises:
        ValueError: if no parameter but those of a gate that is trained afterwards would be left; naming the parts.
    """
    named = dict(model.named_parameters())
    later = "recurrent.act." if model.cfg.recurrence == "injected" else None
    names = [name for name in named if later is None or not name.startswith(later)]
    parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
    is_there = any(part in name for name in names)
    must(is_there, f"optim.only={part!r} is in no name of a trained parameter; {nearest(part, parts)}")
    for name, parameter in named.items():
        parameter.requires_grad_(part in name)


def n_trained(cfg: TrainConfig) -> int:
    """Number of parameters that :func:`train_only` does not freeze."""
    if not cfg.optim.only:
        return parameters(cfg.model).total
    return sum(p.numel() for name, p in counted(cfg).named_parameters() if cfg.optim.only in name)


def load_teacher(cfg: TrainConfig, device: torch.device) -> OpenMythos | None:
    """The model of ``cfg.loss.teacher``, in eval mode and frozen; None if there is none.

    Raises:
        ValueError: if it cannot be found, or has another vocabulary size.
    """
    if not cfg.loss.teacher:
        return None
    teacher = load_model(cfg.loss.teacher)
    n, known = teacher.cfg.vocab_size, cfg.model.vocab_size
    sizes = f"loss.teacher={cfg.loss.teacher!r} has {n} tokens and the model {known}"
    must(n == known, f"{sizes}; use a teacher with the same vocabulary")
    return teacher.to(device).requires_grad_(False)


def compile_blocks(model: OpenMythos, cfg: TrainConfig) -> None:
    """Compile every transformer block of ``model``, in place, at its first call of each kind.

    A block does not depend on the loop that calls it, so no loop count triggers recompilation, and blocks of one shape
    share their code. Where the number of rows or tokens varies between calls, it is dynamic from the start: a loop that
    is recomputed in the backward pass has to run the code that it ran in the forward pass.
    Parameters keep their names; copies of ``model`` are not compiled.
    """
    import torch._dynamo.config  # takes a second

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _WAYS)
    is_varied = cfg.loops.per == "sequence" or cfg.task.min_difficulty < cfg.task.max_difficulty
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=True if is_varied else None)
