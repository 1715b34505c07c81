"""Invalid arguments of every public call raise an error that names the argument, before anything is computed."""

from __future__ import annotations

import copy
import inspect
import math
import os
import random
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from helpers import tiny_model, tokens

from open_mythos import KVCache, OpenMythos, tasks, trace
from open_mythos.evaluation.summary import evaluate
from open_mythos.generation.conversation import Conversation
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft
from open_mythos.models import card_of, load_model, model_dir, save_model, tokenizer_of
from open_mythos.nn import exits
from open_mythos.seq2seq import Seq2Seq
from open_mythos.tasks.tokenizer import Tokenizer, load

CALLS = int(os.environ.get("OPEN_MYTHOS_WRONG_ARGUMENTS", 400))  # 2000 or more in a long run
SEED = int(os.environ.get("OPEN_MYTHOS_SEED", 0))


class Foreign:
    """An object of a type that no argument accepts."""


def wrong(kind: Any) -> list[Any]:
    """Values that do not match an annotation: other types, NaN, infinities and huge integers."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = [Foreign(), object, 1j, b"x", {1, 2}, lambda: 0]
    if not {dict, Callable} & {get_origin(part) or part for part in parts}:
        found += [{}, {"a": 1}]
    if Callable in {get_origin(part) or part for part in parts}:
        found = [Foreign(), 1j, b"x", {1, 2}]
    if str not in parts:
        found += ["a", "", "1"]
    if not {int, float} & set(parts):
        found += [1.5, math.nan, math.inf, -1e400]
    if int in parts or float in parts:
        found += [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(1), True, 1 << 70, [None]]
    if int in parts and float not in parts:
        found += [1.5, np.float32(2.0)]
    if bool not in parts:
        found += [True, np.True_]
    if torch.Tensor not in parts:
        found += [torch.zeros(1, 2), torch.tensor(1)]
    if type(None) not in parts:
        found.append(None)
    if not {list, Sequence, tuple} & {get_origin(part) for part in parts}:
        found += [["a"], [None], (1.5,)]
    return found


# Values of the right type that are out of range, by the name of the argument.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "n_loops": [0, -1, -(1 << 62)], "max_new_tokens": [-1], "temperature": [-0.1], "top_k": [0, -1],
    "top_p": [0.0, 1.5, -1], "min_p": [-0.1, 2], "eos_token_id": [-1, 257, 1 << 62, (1, 999), (-1,)], "start_pos": [-1],
    "input_ids": [
        torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.tensor([[-1]]),
        torch.tensor([[999]]),
        torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, 7), torch.tensor(1),
    ],
    "prompt": [tokens(1, 3), torch.zeros(0, dtype=torch.long), torch.tensor([999]), torch.tensor([1.0])],
    "prompts": [[torch.tensor([1, 999])], [1], "ab", [tokens(1, 2)]],
    "attention_mask": [torch.ones(3), torch.tensor(1)],
    "threshold": [0, -1.0], "patience": [0, -1], "cache_loops": [0, -1], "room": [-1], "length": [-1, 99],
    "max_rows": [0, -1], "n": [0, -1], "difficulty": [0, -1], "difficulties": [[], [0], [1.5]], "seeds": [(), ["a"]],
    "loops": [[], [0], ["1"], [True]], "examples": [0, -1], "tokens": [0, 64], "said": ["\ud800"], "engine": ["fast"],
    "name": ["", "parties"], "source": ["", "no-such-model"], "exit": ["gate:2", "kl:x"], "draft": [Draft(99)],
    "max_shard_size": ["", "many", "-5GB", "0GB"],
    "kv_cache": [{"foo": 1}, {"prelude_0": {"k": torch.zeros(1)}}, {"prelude_0": {"rows": torch.zeros(1)}}],
}  # fmt: skip


def model() -> OpenMythos:
    return tiny_model(vocab_size=257, halting=False, max_seq_len=64).eval()


def states(things: Any) -> Any:
    """All state that a refused call must leave unchanged, in a form that can be compared."""
    made, talk, batch, cache = things
    weights = {name: x.clone() for name, x in made.state_dict().items()}
    modes = [module.training for module in made.modules()]
    grads = [x.grad for x in made.parameters()]
    rows = {slot: held.rows.clone() for slot, held in cache._slots.items()}
    requests = [(r.prompt, list(r.tokens), r.done) for r in batch._queue], len(batch._running), len(batch._finished)
    said = copy.deepcopy(talk.messages), list(talk.ids), list(talk._held), talk.n_loops, talk.sampling
    rng = torch.get_rng_state(), torch.is_grad_enabled()
    return weights, modes, grads, rows, requests, said, rng, (made.cfg.to_dict(), cache.valid)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_invalid_arguments_are_named_in_the_error_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made, tokenizer, task, ids = model(), Tokenizer(True), tasks.load("parity"), tokens(1, 3)
    talk, batch, cache = Conversation(made, tokenizer, 1, Sampling(0)), DepthBatch(made), KVCache()
    encoder = tiny_model(vocab_size=257, halting=False, max_seq_len=64, causal=False).eval()
    pair = Seq2Seq(encoder, made)
    pair.save_pretrained(tmp_path / "pair")
    "".join(talk.reply("hi", 2))
    batch.add(ids[0], 2)
    with torch.no_grad():
        made(ids, 2, cache)
    public: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (made.forward, dict(input_ids=ids)), (made.generate, dict(input_ids=ids, max_new_tokens=2)),
        (made.stream, dict(input_ids=ids, max_new_tokens=2)), (made.iterate, dict(input_ids=ids)),
        (made.generate_many, dict(prompts=[ids[0]], max_new_tokens=2)),
        (made.save_pretrained, dict(directory=tmp_path / "kept")),
        (OpenMythos.from_pretrained, dict(source="parity-tiny")),
        (trace, dict(model=made, input_ids=ids)), (KVCache, {}),
        (cache.truncate, {}), (Sampling, {}), (Draft, dict(loops=1)), (exits.parse, {}), (tasks.load, {}),
        *((kind, {}) for kind in exits.NAMES.values()), (DepthBatch, dict(model=made)),
        (batch.add, dict(prompt=ids[0], max_new_tokens=2)),
        (Conversation, dict(model=made, tokenizer=tokenizer)), (talk.reply, dict(said="a", max_new_tokens=1)),
        (talk.trace, {}), (task.batch, dict(n=1, difficulty=2)), (task.mixed, dict(difficulties=[2])),
        (evaluate, dict(model=made, task=task, difficulties=[2], loops=[1], examples=1)),
        (Seq2Seq, dict(encoder=encoder, decoder=made)), (pair.encode, dict(source=ids)),
        (pair.forward, dict(source=ids, target=ids)), (pair.generate, dict(source=ids, max_new_tokens=2)),
        (pair.save_pretrained, {}), (Seq2Seq.from_pretrained, dict(directory=tmp_path / "pair")),
        (Tokenizer, {}), (tokenizer.encode, dict(texts=["a"])), (tokenizer.encode_each, dict(texts=["a"])),
        (tokenizer.decode, dict(ids=[1])), (tokenizer.save, {}), (load, {}),
        *((function, {}) for function in (model_dir, load_model, tokenizer_of, card_of)),
        (save_model, dict(model=made, directory=tmp_path / "saved")),
    ]  # fmt: skip
    cases = []
    for call, needed in public:
        target = call.__init__ if isinstance(call, type) else call
        for name, kind in get_type_hints(target).items():
            if name == "return" or inspect.signature(target).parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                continue
            cases += [(call, needed, name, value) for value in wrong(kind)]
            if call is save_model and name == "source":  # "" means no source
                continue
            ranges = OUT_OF_RANGE.get(name, []) if name != "exit" or call is exits.parse else ["gate", exits.Gate]
            cases += [(call, needed, name, value) for value in ranges]
    draw = random.Random(SEED)
    draw.shuffle(cases)
    cases = (cases * (CALLS // len(cases) + 1))[:CALLS]
    counts, bad, before, computed = Counter[str](), [], states((made, talk, batch, cache)), []
    made.embed.register_forward_hook(lambda *_: computed.append(1))
    for call, needed, name, value in cases:
        try:
            found = call(**{**needed, name: value})
            list(found) if inspect.isgenerator(found) else found
            outcome = "taken"
        except (ValueError, TypeError) as error:
            stem = name.removesuffix("s").removesuffix("ie")  # an error about a list may name one element
            is_named = stem in str(error) or (isinstance(value, str) and repr(value)[1:-1] in str(error))
            outcome = "refused" if is_named else f"refused without its name: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome == "refused" and computed:
            outcome = "refused after computing"
        computed.clear()
        counts[outcome.partition(":")[0]] += 1
        if outcome != "refused":
            bad.append(f"{getattr(call, '__qualname__', call)}({name}={value!r:.60}): {outcome:.120}")
        if outcome != "taken" and not same(states((made, talk, batch, cache)), before):
            bad.append(f"{getattr(call, '__qualname__', call)}({name}={value!r:.60}): changed something")
        before = before if outcome == "refused" else states((made, talk, batch, cache))
    print(f"{len(cases)} calls, seed {SEED}: {dict(counts)}")
    assert not bad, f"{len(bad)} of {len(cases)}:\n" + "\n".join(sorted(set(bad)))


def test_numpy_numbers_are_accepted() -> None:
    made, ids = model(), tokens(1, 3)
    plain = made.generate(ids, 3, 2, temperature=0.0, top_k=5, eos_token_id=7)
    found = made.generate(
        ids, np.int64(3), np.int32(2), temperature=np.float32(0), top_k=np.uint8(5), eos_token_id=np.int64(7)
    )
    assert torch.equal(found, plain)
    task, generator = tasks.load("parity"), torch.Generator()
    assert torch.equal(
        task.batch(np.int64(2), np.int64(3), generator.manual_seed(0)).ids,
        task.batch(2, 3, generator.manual_seed(0)).ids,
    )
    assert KVCache(np.int64(2)).cache_loops == 2 and type(Sampling(top_k=np.int64(3)).top_k) is int


def test_argument_checks_are_skipped_under_torch_export() -> None:
    made, ids = model(), tokens(1, 3)
    with torch.no_grad():
        exported = torch.export.export(made, (ids,), {"n_loops": 2})
        torch.testing.assert_close(exported.module()(ids, n_loops=2), made(ids, 2))
