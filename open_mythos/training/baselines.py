"""The models of a run: the one that it trains, or a baseline without a loop, and those it starts from and follows."""

from dataclasses import replace

import torch

from open_mythos.fields import must
from open_mythos.model import OpenMythos, UnrolledMythos
from open_mythos.models import load_model
from open_mythos.nn.block import TransformerBlock
from open_mythos.training.config import TrainConfig
from open_mythos.training.overrides import differences

# A block is called in several ways, each with code of its own: with gradient and without, as prelude or core, and for
# one row or token, few, or many. Beyond the limit further ones would not be compiled.
_WAYS = 32


def build(cfg: TrainConfig) -> OpenMythos:
    """The model that a run trains: :class:`OpenMythos`, or one of the baselines if ``cfg.kind`` says so.

    A looped model is built as it is trained here, by the run's own loop counts: its gate comes afterwards, and it
    explores no depths by itself.
    """
    loops = {"single": 1, "unrolled": cfg.loops.maximum}.get(cfg.kind, cfg.model.max_loop_iters)
    made = UnrolledMythos if cfg.kind == "unrolled" else OpenMythos
    return made(replace(cfg.model, halting=False, warm_start=False, max_loop_iters=loops))


def start_from(model: OpenMythos, cfg: TrainConfig) -> None:
    """Give ``model`` the weights of ``cfg.start``.

    Raises:
        ValueError: if there is no such model, or it is of another shape, naming what differs.
    """
    unrolled = f"start={cfg.start!r} has one block for all loops and kind='unrolled' many; leave it out"
    must(cfg.kind != "unrolled", unrolled)
    start = load_model(cfg.start)
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        pairs = differences(start.cfg, cfg.model).items()
        changed = ", ".join(f"model.{key}={new!r} for {old!r}" for key, (old, new) in pairs)
        message = f"start={cfg.start!r} is not of the run's model ({changed}); leave out what changes it"
        raise ValueError(message) from error


def load_teacher(cfg: TrainConfig, device: torch.device) -> OpenMythos | None:
    """The model of ``cfg.loss.teacher``, in eval mode and without gradients; None if there is none.

    Raises:
        ValueError: if it cannot be found, or has other tokens.
    """
    if not cfg.loss.teacher:
        return None
    teacher = load_model(cfg.loss.teacher)
    n, known = teacher.cfg.vocab_size, cfg.model.vocab_size
    sizes = f"loss.teacher={cfg.loss.teacher!r} has {n} tokens and the model {known}"
    must(n == known, f"{sizes}; use a teacher of the same tokens")
    return teacher.to(device).requires_grad_(False)


def compile_blocks(model: OpenMythos, cfg: TrainConfig) -> None:
    """Have every transformer block of ``model`` compiled, in place, at its first call of each kind.

    A block knows nothing of the loop that calls it, so no number of loops compiles anything anew, and blocks of one
    shape share their code. Where rows or tokens differ from call to call, one code is made for all of their numbers
    from the start: a loop that is recomputed in the backward pass has to meet the code that it met before.
    Parameters keep their names; copies of ``model`` are not compiled.
    """
    import torch._dynamo.config  # takes a second

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _WAYS)
    is_varied = cfg.loops.per == "sequence" or cfg.task.min_difficulty < cfg.task.max_difficulty
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=True if is_varied else None)
