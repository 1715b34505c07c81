"""One token at a time through compiled code: the arithmetic of :class:`Decoder`, in one call a token.

What :class:`~open_mythos.generation.decoder.Decoder` still spends at a token is calls of operations, some forty a loop.
``decode.c`` makes none: it walks through the whole model with a few threads on the weights that a ``Decoder`` has made
ready, and writes to the buffers of the same cache, which all else goes on reading. With an exit, each row of the batch
stops at its own loop.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from open_mythos.cache import KVCache, coda_slot, core_slot, loop_slot, prelude_slot
from open_mythos.generation.decoder import _GQA, Decoder, _Block
from open_mythos.generation.native.code import compiled
from open_mythos.nn.exits import Exit, Gate, StateChange
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.linear import effective_weight
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops.rope import rope_frequencies

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos


def _struct(name: str, pointers: str, sizes: str = "", floats: str = "", more: str = "") -> type[ctypes.Structure]:
    """A C struct of pointers, integers, floats and more pointers, in that order."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float), (more, ctypes.c_void_p))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Mirrors of the structs in team.h.
_CBlock = _struct(
    "Block",
    "w_in w_q kv_norm up_k up_v k_taps v_taps w_out w_ffn w_down router_bias expert_norm gate_up down",
    "n_taps n_local window ffn n_experts topk expert_dim",
    "down_scale",
)
_CExit = _struct("Exit", "hidden motion halt", "n_hidden patience", "threshold bias")
_CModel = _struct(
    "Model",
    "",
    "dim vocab H G D V mla Q N P n_prelude n_core n_coda rank start_from_input",
    "eps score_scale",
    "frequencies embed head input_norm A B state_norm norm codes lora_down lora_up lora_scale blocks exit",
)
_CSlot = _struct("Slot", "first second", "capacity")
_CStep = _struct("Step", "ids h state logits slots used starts", "batch position n_loops n_slots")


class CompiledDecoder:
    """:class:`Decoder` in compiled code, for one new token of each row at a time.

    Made of a model's weights as they are; make a new one when they change. Uses ``torch.get_num_threads()`` threads,
    which last as long as it does.

    Args:
        model: one that :func:`~open_mythos.generation.native.check.check_compilable`, in eval mode.
        n_loops: loops of every token, or the most.
        exit: stops rows earlier, each at its own loop; a :class:`Gate` or a :class:`StateChange`.

    Attributes:
        used: loops that each row ran at the last step.

    Raises:
        ValueError: without a C compiler.
    """

    @torch.no_grad()
    def __init__(self, model: OpenMythos, n_loops: int, exit: Exit | None = None) -> None:
        code, threads = compiled(), torch.get_num_threads()
        decoder = Decoder(model, n_loops)
        self._held: list[Tensor] = []
        made = [self._block(block) for block in (*decoder.prelude, *decoder.core, *decoder.coda)]
        self._blocks = blocks = (_CBlock * len(made))(*made)
        made_model = self._model(decoder, n_loops, blocks)
        if exit is not None:
            self._exit = self._stopping(model.recurrent.act, exit, n_loops)
            made_model.exit = ctypes.addressof(self._exit)
        team = code.mythos_open(ctypes.byref(made_model), ctypes.c_int64(threads))
        if not team:
            raise MemoryError(
                f"compiled decoding got no memory, or not its {threads} threads; see torch.set_num_threads"
            )
        self.cfg, self.n_loops, self.used = model.cfg, n_loops, list[int]()
        self._team, self._run = ctypes.c_void_p(team), code.mythos_step
        weakref.finalize(self, code.mythos_close, self._team)
        self._slots = (_CSlot * (len(blocks) + (n_loops - 1) * len(decoder.core)))()
        self._places: list[tuple[int, int, int, int]] = []  # what they hold
        self._names: dict[int | None, list[str]] = {}  # of the slots, for each number of them that loops share
        self._job = _CStep(slots=ctypes.addressof(self._slots), n_loops=n_loops)

    def step(self, tokens: Tensor, cache: KVCache, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state (B, 1, dim) after the last loop that a row ran, and the logits (B, vocab_size), of tokens (B, 1).

        Args:
            tokens: behind those of the cache.
            cache: holds some tokens, padded on the left or not, and all slots of ``n_loops`` loops; the new ones are
                appended.
            first: states to start from, (B, 1, dim); the model's own if None.
        """
        B, cfg, ids = len(tokens), self.cfg, tokens.flatten().tolist()
        assert len(ids) == B and all(0 <= token < cfg.vocab_size for token in ids), ids
        first = None if first is None else first.contiguous()
        state = torch.empty(B, 1, cfg.dim, dtype=torch.float32)
        logits = torch.empty(B, cfg.vocab_size, dtype=torch.float32)
        position = self._open_slots(cache, B)
        Integers, job = ctypes.c_int64 * B, self._job
        c_ids, used, starts = Integers(*ids), Integers(), Integers(*self._read_padding(cache))
        job.ids, job.used, job.starts = (ctypes.addressof(numbers) for numbers in (c_ids, used, starts))
        job.h, job.state, job.logits = None if first is None else first.data_ptr(), state.data_ptr(), logits.data_ptr()
        job.batch, job.position, job.n_slots = B, position, cache.cache_loops or self.n_loops
        self._run(self._team, ctypes.byref(job))
        self.used = list(used)
        return state, logits

    @staticmethod
    def _read_padding(cache: KVCache) -> list[int]:
        """How much of it each row holds, if any does; the new tokens are marked as real."""
        if cache.valid is None:
            return []
        new = cache.valid.new_ones(len(cache.valid), 1)
        starts = (~cache.valid).sum(1).tolist()
        cache.valid = torch.cat([cache.valid, new], 1)
        return starts

    def _open_slots(self, cache: KVCache, batch: int) -> int:
        """The position of a new row in every slot. There are many, so what can be kept from the step before is."""
        if cache.cache_loops not in self._names:
            self._names[cache.cache_loops] = self._met(cache)
        names = self._names[cache.cache_loops]
        position = cache.slot(names[0]).length
        places = [cache.slot(name).open_row(position) for name in names]
        if places != self._places:
            for slot, (first, second, room, _) in zip(self._slots, places, strict=True):
                slot.first, slot.second, slot.capacity = first, second, room
            self._places = places
        assert places[0][3] == batch, f"{batch} rows for a cache of {places[0][3]}"
        return position

    def _met(self, cache: KVCache) -> list[str]:
        """Names of slots in the order in which a token meets them."""
        prelude = [prelude_slot(layer) for layer in range(self.cfg.prelude_layers)]
        loops = [
            core_slot(loop_slot(loop, cache), layer)
            for loop in range(self.n_loops)
            for layer in range(self.cfg.core_layers)
        ]
        return prelude + loops + [coda_slot(layer) for layer in range(self.cfg.coda_layers)]

    # -- structs

    def _at(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a tensor's numbers, row by row; they stay there as long as this decoder."""
        self._held.append(tensor.detach().to(dtype).contiguous())
        return self._held[-1].data_ptr()

    def _model(self, decoder: Decoder, n_loops: int, blocks: ctypes.Array) -> ctypes.Structure:
        model, cfg = decoder.model, decoder.model.cfg
        recurrent, lora = model.recurrent, model.recurrent.lora
        codes = [code for code in decoder.codes if code is not None]
        found = _CModel(
            dim=cfg.dim, vocab=cfg.vocab_size, n_prelude=len(decoder.prelude), n_core=len(decoder.core),
            n_coda=len(decoder.coda), start_from_input=cfg.state_init == "input", eps=model.norm.eps,
            frequencies=self._at(rope_frequencies(*cfg.rope), torch.float64), embed=self._at(model.embed.weight),
            head=self._at(model.head.weight), A=self._at(decoder.A),
            B=self._at(recurrent.injection.B), norm=self._at(model.norm.weight),
            codes=self._at(torch.stack(codes)) if codes else None, blocks=ctypes.addressof(blocks),
            **self._shape(decoder),
        )  # fmt: skip
        if isinstance(model.input_norm, RMSNorm):
            found.input_norm = self._at(model.input_norm.weight)
        if isinstance(recurrent.norm, RMSNorm):
            found.state_norm = self._at(recurrent.norm.weight)
        if lora is not None:
            found.rank = len(lora.down.weight)
            found.lora_down, found.lora_up = self._at(lora.down.weight * lora.down.scale), self._at(lora.B)
            found.lora_scale = self._at(torch.stack([lora.row(loop) for loop in range(n_loops)]))
        return found

    def _stopping(self, act: ACTHalting, exit: Exit, n_loops: int) -> ctypes.Structure:
        if isinstance(exit, StateChange):
            return _CExit(threshold=exit.threshold, patience=min(exit.patience, n_loops))
        assert isinstance(exit, Gate), exit
        halt = act.halt.weight[0] * (act.halt.in_features**-0.5 / act.std)
        return _CExit(
            hidden=self._at(effective_weight(act.hidden)), motion=self._at(act.motion / act.std), halt=self._at(halt),
            n_hidden=len(halt), threshold=exit.threshold, bias=float(act.halt.bias) / act.std,
        )  # fmt: skip

    def _shape(self, decoder: Decoder) -> dict[str, Any]:
        attn = decoder.core[0].attn
        if isinstance(attn, _GQA):
            H, G, D = attn.attn.n_heads, attn.attn.n_kv_heads, attn.head_dim
            return dict(H=H, G=G, D=D, V=D, P=D, score_scale=D**-0.5)
        mla = attn.attn
        return dict(
            H=mla.n_heads, G=1, D=mla.latent_dim, V=mla.v_dim, P=mla.rope_dim, mla=1, Q=attn.widths[0],
            N=mla.nope_dim, score_scale=mla.score_scale,
        )  # fmt: skip

    def _block(self, block: _Block) -> ctypes.Structure:
        attn, moe = block.attn, block.moe
        found = _CBlock(
            w_in=self._at(attn.w_in), w_out=self._at(block.w_attn), w_ffn=self._at(block.w_ffn),
            ffn=0 if block.w_down is None else block.w_down.shape[1], n_local=attn.attn.n_local_heads,
            window=attn.attn.local_window, w_down=None if block.w_down is None else self._at(block.w_down),
        )  # fmt: skip
        if isinstance(attn, _GQA):
            one = torch.ones(1, attn.attn.n_kv_heads * attn.head_dim)
            k_taps, v_taps = (one, one) if attn.taps is None else (taps.flatten(2)[0] for taps in attn.taps)
            found.k_taps, found.v_taps, found.n_taps = self._at(k_taps), self._at(v_taps), len(k_taps)
        else:
            taps = torch.ones(1, attn.attn.latent_dim) if attn.taps is None else attn.taps
            found.w_q, found.kv_norm = self._at(attn.w_q), self._at(attn.attn.kv_norm.weight)
            found.up_k, found.up_v = self._at(attn.up_k.transpose(1, 2)), self._at(attn.up_v.transpose(1, 2))
            found.k_taps, found.n_taps = self._at(taps), len(taps)
        if moe is not None:
            found.router_bias, found.expert_norm = self._at(moe.router_bias), self._at(block.expert_norm)
            found.gate_up, found.down, found.down_scale = self._at(moe.gate_up), self._at(moe.down), moe.down_scale
            found.n_experts, found.topk, found.expert_dim = moe.n_experts, moe.topk, moe.down.shape[2]
        return found
