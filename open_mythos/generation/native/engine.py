"""The native engine: one new token of each row in one call of C code.

At a token, a fused model still spends its time on calls of operations, some forty a loop. ``decode.c`` needs none: it
computes the whole model with a few threads, on the matrices of a fused model, and writes into the buffers of an
ordinary cache, which other code can read. With an exit, each row of the batch stops at its own loop.
"""

import ctypes
import os
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from open_mythos.cache import ROLLBACK, Slot, loop_slot
from open_mythos.generation.engine import Depth, ModuleEngine
from open_mythos.generation.fused import FusedBlock, FusedGQA, folded, fuse, is_own, why_not_fused
from open_mythos.generation.native.build import library
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit, Gate, StateChange
from open_mythos.nn.halting import ACTHalting, is_replaced
from open_mythos.nn.injection import LoRAAdapter
from open_mythos.nn.linear import Head, Linear, RMSNorm
from open_mythos.ops.loop_index import loop_index_embedding
from open_mythos.ops.rope import rope_frequencies

_STAGES = "encode_at", "first_state", "decode"
_OF_MODELS = Model.__module__.replace("interface", "model")  # defines the stages that the C code computes
_GATE = ACTHalting, Linear, nn.Linear
_AROUND = (RMSNorm, LoRAAdapter, Linear, Head, nn.Embedding, nn.Identity)


def why_not(model: Model, depth: Depth, drafts: bool) -> str | None:
    """Why this engine cannot serve, as a phrase to follow a colon; None if it can. The model is in eval mode."""
    if os.environ.get("OPEN_MYTHOS_NATIVE") == "0":
        return "OPEN_MYTHOS_NATIVE=0 is set"
    cfg, weight = model.cfg, model.embed.weight
    if weight.device.type != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
        return f"it runs on the CPU in float32, but the model is {weight.dtype} on {weight.device}"
    if drafts:
        return "it decodes one token at a time, but drafts need several at once"
    if cfg.recurrence != "injected" or cfg.router_score != "sigmoid" or not cfg.causal:
        return (
            f"it supports recurrence='injected', router_score='sigmoid' and causal=True, but the model has "
            f"{cfg.recurrence!r}, {cfg.router_score!r} and {cfg.causal}"
        )
    if any(name in vars(model) or getattr(type(model), name).__module__ != _OF_MODELS for name in _STAGES):
        return f"the model has its own {', '.join(_STAGES[:-1])} or {_STAGES[-1]}"
    if cfg.bridge_dim:
        return f"it does not support a bridge, but the model has bridge_dim={cfg.bridge_dim}"
    if (why := why_not_fused(model)) is not None:
        return why
    hooked = model.recurrent._forward_hooks or model.recurrent._forward_pre_hooks
    around = model.embed, model.input_norm, model.recurrent.norm, model.recurrent.lora, model.norm, model.head
    if hooked or not all(part is None or is_own(part, _AROUND) for part in around):
        return "the model has hooks, or replaced or quantised layers"
    exit = model.recurrent.choose_exit(depth.exit)
    if type(exit) not in (Gate, StateChange, type(None)):
        return f"it supports the exits Gate and StateChange, not {exit}"
    if isinstance(exit, Gate) and (is_replaced(model.recurrent.act) or not is_own(model.recurrent.act, _GATE)):
        return f"{exit} uses a gate that was replaced, or has hooks"
    code = library()
    return code if isinstance(code, str) else None


def _struct(name: str, pointers: str, sizes: str = "", floats: str = "", more: str = "") -> type[ctypes.Structure]:
    """A C struct of pointers, integers, floats and more pointers, in that order."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float), (more, ctypes.c_void_p))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Mirrors of the structs in pool.h.
_CBlock = _struct(
    "Block",
    "w_in w_q kv_norm up_k up_v taps w_out w_ffn w_down router_bias expert_norm gate_up down",
    "n_local window ffn n_experts topk expert_dim",
    "down_scale",
)
_CExit = _struct("Exit", "hidden motion halt", "n_hidden patience", "threshold bias")
_CModel = _struct(
    "Model",
    "",
    "dim vocab H G W K value_at D V P Q N mla n_taps ring n_prelude n_core n_coda rank start_from_input",
    "eps score_scale",
    "frequencies embed head input_norm A B state_norm norm loop_codes lora_down lora_up lora_scale blocks exit",
)
_CSlot = _struct("Slot", "rows raw", "room")
_CStep = _struct("Step", "ids h state logits slots used starts", "batch position n_loops n_slots")


class NativeEngine(ModuleEngine):
    """The engine that computes single tokens of each row in C, and several at once by the modules.

    It is built from the current weights; make a new one when they change. Uses ``torch.get_num_threads()`` threads,
    which live as long as the engine.

    Args:
        model: one for which :func:`why_not` returns None.
        depth: how many loops each token runs.
        room: tokens to allocate in the cache.

    Attributes:
        used: loops that each row ran at the last step.
    """

    @torch.no_grad()
    def __init__(self, model: Model, depth: Depth, room: int = 0) -> None:
        fused = fuse(model)
        super().__init__(model, depth, room, fused)
        code, threads = library(), torch.get_num_threads()
        assert isinstance(code, ctypes.CDLL), code
        n_loops, core = depth.n_loops, _blocks(fused.recurrent.block)
        blocks = [*_blocks(fused.prelude), *core, *_blocks(fused.coda)]
        self._held: list[Any] = []
        c_blocks = (_CBlock * len(blocks))(*(self._block(block) for block in blocks))
        c_model = self._model(fused, core, n_loops)
        c_exit = self._exit(cast(ACTHalting, model.recurrent.act), model.recurrent.choose_exit(depth.exit), n_loops)
        self._held += c_blocks, c_exit
        c_model.blocks, c_model.exit = ctypes.addressof(c_blocks), c_exit and ctypes.addressof(c_exit)
        self._code, self._c_model, self._threads, self.used = code, c_model, threads, list[int]()
        self._start_workers()
        n_slots = min(depth.cache_loops or n_loops, n_loops)
        self._slots = [Slot("prelude", layer) for layer in range(len(fused.prelude))]
        self._slots += [loop_slot(i, self.cache, layer) for i in range(n_slots) for layer in range(len(core))]
        self._slots += [Slot("coda", layer) for layer in range(len(fused.coda))]
        self._addresses: list[tuple[int, int, int, int]] = []  # those in _c_slots
        self._c_slots = (_CSlot * len(self._slots))()
        self._job = _CStep(slots=ctypes.addressof(self._c_slots), n_loops=n_loops, n_slots=n_slots)

    def _start_workers(self) -> None:
        """Start the threads of this process: a forked child has none of its parent's."""
        pool = self._code.mythos_open(ctypes.byref(self._c_model), ctypes.c_int64(self._threads))
        if not pool:
            raise MemoryError(
                f"the native engine could not get memory, or its {self._threads} threads; see torch.set_num_threads"
            )
        self._pool, self._process = ctypes.c_void_p(pool), os.getpid()
        weakref.finalize(self, _close, self._code, self._pool, self._process)

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().extend(ids, attention_mask)
        if torch.get_num_threads() > 1:
            self._code.mythos_quiet_others()
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        cache, cfg, B = self.cache, self.model.cfg, len(tokens)
        at, ids = cache.length, tokens.flatten().tolist()
        if at == 0:  # no buffers yet
            return super().step(tokens, first)
        assert len(ids) == B == cache.batch_size and all(0 <= token < cfg.vocab_size for token in ids), ids
        if os.getpid() != self._process:
            self._start_workers()
        first = None if first is None else first.float().contiguous()
        # explicit, as torch's default dtype and device may have been changed
        own: Any = {"dtype": torch.float32, "device": "cpu"}
        self.state, logits = torch.empty(B, 1, cfg.dim, **own), torch.empty(B, cfg.vocab_size, **own)
        self._open_slots(at)
        Integers, job = ctypes.c_int64 * B, self._job
        c_ids, used, starts = Integers(*ids), Integers(), Integers(*self._read_padding())
        job.ids, job.used, job.starts = (ctypes.addressof(numbers) for numbers in (c_ids, used, starts))
        job.h, job.state = None if first is None else first.data_ptr(), self.state.data_ptr()
        job.logits, job.batch, job.position = logits.data_ptr(), B, at
        self._code.mythos_step(self._pool, ctypes.byref(job))
        self.used = list(used)
        return logits

    def _open_slots(self, at: int) -> None:
        """Make room for a row at ``at``, and update the C structs only if a buffer moved: there are many slots."""
        addresses = [self.cache.slot(slot).addresses(at) for slot in self._slots]
        if addresses != self._addresses:
            for c_slot, (rows, raw, room, _) in zip(self._c_slots, addresses, strict=True):
                c_slot.rows, c_slot.raw, c_slot.room = rows, raw, room
            self._addresses = addresses

    def _read_padding(self) -> list[int]:
        """Number of padding tokens in each row, [] if there are none; marks the new tokens as real."""
        valid = self.cache.valid
        if valid is None:
            return []
        self.cache.valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
        return (~valid).sum(1).tolist()

    # -- structs

    def _at(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a tensor's contiguous data, which is kept alive as long as this engine."""
        self._held.append(tensor.detach().to(dtype).contiguous())
        return self._held[-1].data_ptr()

    def _model(self, model: Model, core: list[FusedBlock], n_loops: int) -> Any:
        cfg, recurrent, attn = model.cfg, model.recurrent, core[0].attn
        rope: tuple[int, float, float, int] = cast(Any, model)._rope
        found: Any = _CModel(
            dim=cfg.dim, vocab=cfg.vocab_size, H=attn.n_heads, n_taps=attn.n_taps, ring=ROLLBACK + attn.n_taps - 1,
            n_prelude=len(model.prelude), n_core=len(core), n_coda=len(model.coda),
            start_from_input=cfg.state_init == "input", eps=model.norm.eps,
            frequencies=self._at(rope_frequencies(*rope, device="cpu"), torch.float64),
            embed=self._at(model.embed.weight), head=self._at(model.head.weight),
            A=self._at(recurrent.injection.get_A()), B=self._at(recurrent.injection.B),
            norm=self._at(model.norm.weight), **_attention_sizes(attn),
        )  # fmt: skip
        if isinstance(model.input_norm, RMSNorm):
            found.input_norm = self._at(model.input_norm.weight)
        if isinstance(recurrent.norm, RMSNorm):
            found.state_norm = self._at(recurrent.norm.weight)
        if cfg.loop_index_dim:
            zero = torch.zeros(cfg.dim, dtype=torch.float32, device="cpu")
            codes = [loop_index_embedding(zero, loop, cfg.loop_index_dim) for loop in range(n_loops)]
            found.loop_codes = self._at(torch.stack(codes))
        if (lora := recurrent.lora) is not None:
            found.rank, found.lora_down, found.lora_up = lora.B.shape[1], self._at(folded(lora.down)), self._at(lora.B)
            deepest = min(max(int(lora.trained_loops), 1), lora.scale.num_embeddings) - 1
            found.lora_scale = self._at(lora.scale.weight[torch.arange(n_loops, device="cpu").clamp(max=deepest)])
        return found

    def _exit(self, act: ACTHalting, exit: Exit | None, n_loops: int) -> Any:
        if exit is None:
            return None
        if isinstance(exit, StateChange):
            return _CExit(threshold=exit.threshold, patience=min(exit.patience, n_loops))
        assert isinstance(exit, Gate), exit
        halt = act.halt.weight[0] * (act.halt.in_features**-0.5 / act.std)
        return _CExit(
            hidden=self._at(folded(act.hidden)), motion=self._at(act.motion / act.std), halt=self._at(halt),
            n_hidden=len(halt), threshold=exit.threshold, bias=float(act.halt.bias) / act.std,
        )  # fmt: skip

    def _block(self, block: FusedBlock) -> Any:
        attn: Any = block.attn
        found: Any = _CBlock(
            w_in=self._at(attn.w_in), w_out=self._at(attn.wo.weight_OI), w_ffn=self._at(block.w_ffn),
            n_local=attn.n_local_heads, window=attn.local_window,
        )  # fmt: skip
        if attn.taps is not None:
            found.taps = self._at(attn.taps)
        if not isinstance(attn, FusedGQA):
            up = folded(attn.kv_up).unflatten(0, (attn.n_heads, -1))  # (H, N + V, R)
            found.w_q, found.kv_norm = self._at(attn.w_q), self._at(attn.kv_norm.weight)
            found.up_k = self._at(up[:, : attn.nope_dim].transpose(1, 2))
            found.up_v = self._at(up[:, attn.nope_dim :])
        if block.w_down is not None:
            found.w_down, found.ffn = self._at(block.w_down), block.w_down.shape[1]
        for moe in block.moe:
            found.router_bias, found.expert_norm = self._at(moe.router_bias), self._at(block.expert_norm)
            found.gate_up, found.down, found.down_scale = self._at(moe.gate_up), self._at(moe.down), moe.down_scale
            found.n_experts, found.topk, found.expert_dim = moe.n_experts, moe.topk, moe.down.shape[2]
        return found


def _close(code: ctypes.CDLL, pool: ctypes.c_void_p, process: int) -> None:
    if os.getpid() == process:  # a forked child has no threads to wait for
        code.mythos_close(pool)


def _blocks(part: nn.Module) -> list[FusedBlock]:
    return [module for module in part.modules() if isinstance(module, FusedBlock)]


def _attention_sizes(attn: Any) -> dict[str, Any]:
    """The attention sizes, named by the letters of pool.h."""
    if isinstance(attn, FusedGQA):
        D = attn.head_dim
        return dict(G=attn.n_kv_heads, W=2 * D, K=D, value_at=D, D=D, V=D, P=D, score_scale=D**-0.5)
    D, P = attn.latent_dim, attn.rope_dim
    return dict(
        G=1, W=D + P, K=D + P, D=D, V=attn.v_dim, P=P, Q=attn.widths[0], N=attn.nope_dim, mla=1,
        score_scale=attn.score_scale,
    )  # fmt: skip
