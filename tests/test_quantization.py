"""Int8 weights: logits of the rounded weights in less memory, and errors for what is not supported."""

import builtins
from copy import deepcopy

import pytest
import torch
from helpers import ATTENTION, assert_near, tiny_model, tokens

from open_mythos import CheckpointError, KVCache, OpenMythos
from open_mythos.model import UnrolledMythos
from open_mythos.nn.exits import StateChange
from open_mythos.quantization import quantize_int8, weight_bytes

SIZES = {"odd": {}, "widths of the int8 product": dict(dim=64, expert_dim=32)}  # multiples of 32 or not


def a_model(attn_type="gqa", **changes) -> OpenMythos:
    return tiny_model(attn_type, **{"halting": False, **changes})


def quantised(model: OpenMythos) -> OpenMythos:
    pytest.importorskip("torchao")
    return quantize_int8(deepcopy(model))


@torch.no_grad()
def of_rounded_weights(model: OpenMythos) -> OpenMythos:
    """The model with the dequantised weights in plain modules, whose outputs the quantised model should match."""
    rounded, small = deepcopy(model), dict(quantised(model).named_parameters())
    for name, weight in rounded.named_parameters():
        if hasattr(small[name], "qdata"):
            weight.copy_(small[name].dequantize())
    return rounded


@torch.no_grad()
def test_each_output_channel_of_each_expert_has_its_own_256_levels():
    model = a_model()
    for name, weight in of_rounded_weights(model).named_parameters():
        before = dict(model.named_parameters())[name]
        if not weight.equal(before):
            step = before.abs().amax(-1, keepdim=True) / 127.5
            assert ((weight - before).abs() <= 0.501 * step).all(), name
            assert all(len(row.unique()) <= 256 for row in weight.flatten(0, -2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_logits_match_the_rounded_weights(attn_type, size):
    model, ids = a_model(attn_type, **SIZES[size]), tokens(2, 13)
    expected = of_rounded_weights(model)(ids, 4)
    assert_near(quantised(model)(ids, 4), expected)
    assert (model(ids, 4) - expected).abs().max() > 1e-3  # rounding has an effect


@pytest.mark.parametrize("changes", [{}, dict(n_experts=1, n_experts_per_tok=1), dict(n_shared_experts=0)], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_bfloat16_logits_are_accurate_in_one_pass_and_token_by_token(attn_type, size, changes):
    """Few and many rows use different matrix products; both are as accurate as plain bfloat16."""
    model, ids = a_model(attn_type, **SIZES[size], **changes), tokens(3, 20)
    # The weights are rounded to bfloat16 before quantisation, as in the model that it is compared with.
    model = model.bfloat16()
    truth = of_rounded_weights(deepcopy(model).float())
    plain, small = deepcopy(truth).bfloat16(), quantised(model)
    expected = truth(ids, 3)
    error = (plain(ids, 3).float() - expected).norm() / expected.norm()
    cache = KVCache()
    stepped = torch.cat([small(part, 3, cache) for part in ids.split(1, 1)], 1)
    for logits in (small(ids, 3), stepped):
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() / expected.norm() < 2 * error + 1e-2


@torch.no_grad()
def test_the_fast_product_for_few_rows_is_used_and_accurate(monkeypatch):
    pytest.importorskip("torchao")
    from open_mythos.quantization import weights

    model, ids, seen = a_model(**SIZES["widths of the int8 product"]).bfloat16(), tokens(1, 1), []
    small, is_fast = quantised(model), weights.is_fast
    monkeypatch.setattr(weights, "is_fast", lambda *args: seen.append(is_fast(*args)) or seen[-1])
    few = small(ids, 2)
    assert sum(seen) > 20
    monkeypatch.setattr(weights, "is_fast", lambda *_: False)
    many = small(ids, 2)
    assert_near(few.float(), many.float(), 3e-2)


@torch.no_grad()
def test_quantised_blocks_take_a_quarter_of_the_memory():
    model = a_model(dim=128, expert_dim=128, vocab_size=23)
    small = quantised(model)
    blocks = [small.prelude, small.recurrent.block, small.coda]
    whole = sum(weight_bytes(part) for part in (model.prelude, model.recurrent.block, model.coda))
    assert 0.25 < sum(map(weight_bytes, blocks)) / whole < 0.3
    assert weight_bytes(model) == sum(4 * weight.numel() for weight in model.parameters())


@torch.no_grad()
def test_embeddings_norms_routers_and_gates_are_not_quantised():
    model = a_model("mla")
    small = dict(quantised(model).named_parameters())
    exact = [name for name in small if type(small[name]) is torch.nn.Parameter]
    assert all(small[name].equal(weight) for name, weight in model.named_parameters() if name in exact)
    for part in ("embed.weight", "router.weight", "norm.weight", "act.halt.weight", "lora.B", "kv_up.weight", "taps"):
        assert any(name.endswith(part) for name in exact), part
    kinds = {name: type(weight).__name__ for name, weight in small.items()}
    assert kinds["recurrent.block.ffn.down"] == kinds["coda.0.ffn.gate.weight"] == "Int8Weight"


def test_a_model_is_quantised_in_place_and_generates_with_halting_and_exits():
    pytest.importorskip("torchao")
    model = tiny_model(halting=True)
    assert quantize_int8(model) is model
    same = model.generate(tokens(2, 5), 6, temperature=0)
    assert same.equal(model.generate(tokens(2, 5), 6, temperature=0)) and same.shape == (2, 11)
    assert model.generate(tokens(2, 5), 6, exit=StateChange(0.1), draft_loops=None).shape == (2, 11)
    assert model.generate(tokens(1, 5), 6, cache_loops=2).shape == (1, 11)


def test_speculative_decoding_with_int8_weights_gives_the_same_tokens():
    model = quantised(a_model())
    plain = model.generate(tokens(1, 5), 12, temperature=0)
    assert model.generate(tokens(1, 5), 12, temperature=0, draft_loops=1).equal(plain)


@torch.no_grad()
def test_the_dtype_may_change_after_quantisation():
    model, ids = a_model(), tokens(2, 5)
    assert_near(quantised(model).bfloat16().float()(ids), quantised(model)(ids), 3e-2)
    assert quantised(model).bfloat16()(ids).dtype == torch.bfloat16


def test_gradients_still_reach_the_embedding():
    """As needed for attributions to the input, in eval mode; the int8 weights themselves get no gradient."""
    model, ids = a_model(), tokens(2, 5)
    small, expected = quantised(model), of_rounded_weights(model)
    for each in (small, expected):
        each(ids).square().mean().backward()
    assert_near(small.embed.weight.grad, expected.embed.weight.grad)
    assert small.coda[0].attn.wq.weight.grad is None


def test_training_a_quantised_model_is_refused():
    model = quantised(a_model()).train()
    with pytest.raises(ValueError, match=r"int8 and cannot be trained.*eval\(\)"):
        model(tokens(1, 4))
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        quantised(a_model().train())


def test_quantising_twice_is_refused():
    model = quantised(a_model())
    with pytest.raises(ValueError, match=r"Int8Weight.*once"):
        quantize_int8(model)


def test_saving_a_quantised_model_is_refused_before_anything_is_written(tmp_path):
    model = quantised(a_model())
    with pytest.raises(CheckpointError, match=r"Int8Weight.*cannot be saved; save the model before"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_torchao_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith(("torchao", "open_mythos.quantization.weights")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    model = a_model()
    with pytest.raises(ImportError, match=r'pip install "\.\[quant\]"'):
        quantize_int8(model)
    assert all(type(weight) is torch.nn.Parameter for weight in model.parameters())


@torch.no_grad()
def test_a_quantised_shipped_model_keeps_its_accuracy():
    """On parity, rounding the weights changes next to no answers."""
    from open_mythos import tasks
    from open_mythos.tasks.base import UNSCORED

    model = OpenMythos.from_pretrained("parity-tiny")
    problems = tasks.load("parity").batch(32, 16, torch.Generator().manual_seed(0))
    scored = problems.targets != UNSCORED
    for each in (model, quantised(model)):
        answers = each(problems.ids, 24, attention_mask=problems.valid).argmax(-1)
        assert (answers == problems.targets)[scored].float().mean() > 0.99


def test_every_block_of_an_unrolled_model_is_quantised():
    plain = UnrolledMythos(tiny_model().cfg).eval()
    before, model = weight_bytes(plain), quantised(plain)
    assert all(type(layer.attn.wo.weight).__name__ == "Int8Weight" for layer in model.recurrent.layers)
    assert weight_bytes(model) < 0.6 * before
    with pytest.raises(ValueError, match="int8 and cannot be trained"):
        model.train()(tokens(1, 4))
