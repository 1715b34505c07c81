"""A training step of several processes: the part that each runs, and the sums over all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.auxiliary import experts
from open_mythos.tasks import Batch
from open_mythos.training import distributed
from open_mythos.training.checkpoints import Part, Stored
from open_mythos.training.config import TrainConfig
from open_mythos.training.objective import Objective, Outcome, Plan
from open_mythos.training.parallel.grid import Grid

if TYPE_CHECKING:
    from open_mythos.training.parallel.pieces import Cuts, Piece


class Step(nn.Module):
    """The loss of a micro-batch as one module, so that FSDP's hooks run around all of it.

    Args:
        model, objective: those of the trainer.
    """

    def __init__(self, model: OpenMythos, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, plan: Plan, n_scored: int) -> dict[str, Any]:
        """The fields of an :class:`Outcome`, as a dictionary: FSDP finds no tensors in instances of a class."""
        return dict(vars(self.objective(self.model, batch, plan, n_scored)))


class Parallel:
    """The part that this process holds and runs of a model which one or several processes train.

    Args:
        model, objective: those of the trainer; the model is divided in place.
        cfg: of the run.
        grid: already connected.

    Attributes:
        held: the shard of each parameter that is held here, by name, as optimizer and average use it.
        pieces: where these shards lie in the whole parameters; empty for one process, which holds all.
    """

    def __init__(self, model: OpenMythos, objective: Objective, cfg: TrainConfig, grid: Grid) -> None:
        self.model, self.cfg, self.grid = model, cfg, grid
        self.step, self.units = Step(model, objective), list[Any]()
        self.is_alone = distributed.world_size() == 1
        cuts: Cuts = {}
        if grid.expert * grid.tensor > 1:
            from open_mythos.training.parallel.divide import divide

            cuts = divide(model, grid)
        if grid.shard > 1:  # imported here, as it takes a second and one process does not need it
            from open_mythos.training.parallel.shard import shard

            self.units = shard(self.step, model, grid, cuts)
        self.held: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.pieces: dict[str, Piece] = {}
        if not self.is_alone:
            from open_mythos.training.parallel.pieces import pieces

            self.pieces = pieces(model, grid, cuts)
            self.held = {name: piece.held for name, piece in self.pieces.items()}

    def run(self, batch: Batch, plan: Plan, rows: slice, n_scored: int) -> Outcome:
        """The loss of a micro-batch, these ``rows`` of the step's ``plan``.

        FSDP reduces gradients in the backward pass of every micro-batch, not only the last: it reduces whatever it
        finds after any call of a block, so gradients left over for the next micro-batch would be reduced incomplete.
        """
        own = plan[rows]
        if self.grid.expert > 1:
            own.among, own.meet = plan[self.grid.beside(rows, self.cfg.batch_size)], experts(self.model)[0].engine.meet
        if (lora := self.model.recurrent.lora) is not None:  # the depth it is trained to counts rows of all processes
            for loops, _ in plan.schedules(self.step.objective.short):
                lora.note_loops(int(loops.max()))
        return Outcome(**self.step(batch, own, n_scored))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Sum the experts' loads that arise in the block over all processes, once per optimizer step."""
        layers = [] if self.is_alone else experts(self.model)
        before = [layer.expert_load.clone() for layer in layers]
        yield
        for layer, load in zip(layers, before, strict=True):
            layer.expert_load -= load
            dist.all_reduce(layer.expert_load)
            layer.expert_load.div_(self.grid.tensor, rounding_mode="floor").add_(load)

    @property
    def waits_inside(self) -> bool:
        """Whether processes wait for each other before a step's last backward pass has ended."""
        return max(self.grid.shard, self.grid.expert, self.grid.tensor) > 1

    def add_up(
        self, numbers: Tensor, loops: float, plans: list[Plan], own: tuple[float, float]
    ) -> tuple[float, list[float], list[tuple[float, float]]]:
        """After the last backward pass, leave the gradients of the whole step in ``held``, summed over processes.

        This is the step's first GPU synchronisation. Returns the gradients' norm; the sums over processes of ``loops``
        and ``numbers``, which are sums over this process's rows; and each process's ``own`` two numbers.
        """
        for unit in self.units:
            unit.reshard()
        if not self.is_alone:
            self._check_gradients(plans)
            self._add_up_gradients()
        for piece in self.pieces.values():
            piece.follow()
        by_copies: dict[int, list[Tensor]] = {}
        for name, held in self.held.items():
            if held.grad is not None:
                by_copies.setdefault(self.pieces[name].copies if self.pieces else 1, []).append(held.grad)
        squares = [nn.utils.get_total_norm(group).double() ** 2 / copies for copies, group in by_copies.items()]
        square, *sums = torch.cat([torch.stack(squares).sum().view(1), numbers.double()]).tolist()
        total = [square, *(number / self.grid.tensor for number in (loops, *sums))]
        heard = [own]
        if not self.is_alone:
            heard = [own if i == dist.get_rank() else (0.0, 0.0) for i in range(dist.get_world_size())]
            both = torch.tensor([*total, *itertools.chain(*heard)], dtype=torch.float64)
            dist.all_reduce(both)
            pairs = both[len(total) :].view(-1, 2).tolist()
            total, heard = both[: len(total)].tolist(), [(said, seconds) for said, seconds in pairs]
        norm = math.sqrt(total[0]) if math.isfinite(total[0]) else math.nan
        return norm, total[1:], heard

    def clip(self, norm: float) -> None:
        """Scale gradients, whose total norm is ``norm``, to a norm of at most ``cfg.optim.clip``."""
        factor = self.cfg.optim.clip / (torch.tensor(norm) + 1e-6)
        if factor < 1:  # decided on the CPU, without a GPU synchronisation
            torch._foreach_mul_([held.grad for held in self.held.values() if held.grad is not None], factor.item())

    def whole(self, name: str) -> Tensor:
        """A whole parameter; to be called by all processes."""
        return (self.pieces[name].whole(self.held[name]) if self.pieces else self.held[name]).detach()

    def gathered(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`Piece.gathered` of tensors that are divided as the parameters are, by name."""
        return {n: self.pieces[n].gathered(part) if self.pieces else part.detach() for n, part in held.items()}

    def shared(self, held: Mapping[str, Tensor]) -> dict[str, Tensor | Part]:
        """:meth:`Piece.shared`, by name; with one process the tensors themselves."""
        return {n: self.pieces[n].shared(part) if self.pieces else part.detach() for n, part in held.items()}

    def of_rows(self, states: Mapping[int, Tensor]) -> dict[int, Tensor | Part]:
        """As :meth:`shared`, for states of the rows that this process runs, by row."""
        if not self.pieces:
            return dict(states)
        is_first = distributed.rank() % self.grid.tensor == 0
        return {row: Part(one, tuple(one.shape), (0,) * one.ndim, is_first) for row, one in states.items()}

    def model_state(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's ``state_dict()`` with these for parameters, :meth:`gathered`; not all on one device."""
        found = dict(self.model.named_buffers()) | self.gathered(held)
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - found.keys()
        return found | {name: found["embed.weight"] for name in tied}

    @torch.no_grad()
    def load(self, held: Mapping[str, Tensor], whole: Mapping[str, Tensor | Stored]) -> None:
        """Give ``held`` what this process is to hold of ``whole``; ValueError for that of another model."""
        for name, tensor in held.items():
            came, expected = whole.get(name), self.pieces[name].shape if self.pieces else tensor.shape
            shape = "none" if came is None else tuple(came.shape)
            said = f"the checkpoint is of another model: its {name} is {shape}, but {tuple(expected)} is expected"
            must(came is not None and came.shape == expected, f"{said}; continue with the model that was saved")
            assert came is not None
            tensor.copy_(self.pieces[name].part(came) if self.pieces else came[()])

    def _check_gradients(self, plans: list[Plan]) -> None:
        """Raise RuntimeError where FSDP has lost a gradient: for a parameter that took part and has none."""
        for name, piece in self.pieces.items() if self.units else ():
            is_missing = piece.parameter.requires_grad and piece.parameter.grad is None
            if is_missing and not all(_is_idle(name, self.cfg, plan) for plan in plans):
                raise RuntimeError(f"{name} took part in the step and has no gradient: it was gathered outside of FSDP")

    def _add_up_gradients(self) -> None:
        """Sum gradients over their groups where FSDP does not; a gradient that no process has stays None."""
        by_group: dict[Any, list[nn.Parameter]] = {}
        for piece in self.pieces.values():
            if piece.group is not None:
                by_group.setdefault(piece.group, []).append(piece.parameter)
        for group, parameters in by_group.items():
            has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
            dist.all_reduce(has, group=group)
            used = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
            if not used:  # none is trained
                continue
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=group)
            for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
                p.grad = part.view_as(p)


def _is_idle(name: str, cfg: TrainConfig, plan: Plan) -> bool:
    """Whether a step does not use a parameter: one of a gate that is trained afterwards, or of a loop not reached."""
    _, *path = name.split(".")
    if path[:1] == ["act"]:
        return cfg.model.recurrence == "injected" or cfg.kind != "looped"
    return path[:1] == ["blocks"] and int(path[1]) >= int(plan.n_loops.max())
