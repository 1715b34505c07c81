"""The bridge adds nothing in the first loop, whatever its weights, and in a new model nothing in any loop."""

import pytest
import torch
from helpers import assert_near, left_padding, tiny_config, tiny_model, tokens

from open_mythos import OpenMythos
from open_mythos.nn.injection import Bridge


def trained() -> Bridge:
    torch.manual_seed(0)
    bridge = Bridge(8, 20)
    for parameter in bridge.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return bridge


def test_the_bridge_follows_its_formula():
    bridge, h, e = trained(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    changed = h - e
    x = changed / (changed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * bridge.norm.weight
    gate, up, down = (part.weight * part.scale for part in (bridge.ffn.gate, bridge.ffn.up, bridge.ffn.down))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert expected.abs().max() > 0.1
    assert_near(bridge(h, e), expected)


def test_the_bridge_adds_nothing_to_an_unchanged_state():
    bridge, e = trained(), torch.randn(2, 5, 8)
    assert bridge(e, e).eq(0).all()


def test_a_new_bridge_adds_nothing_in_any_loop_and_gets_a_gradient():
    torch.manual_seed(0)
    with_bridge = OpenMythos(tiny_config(bridge_dim=12, halting=False)).train()
    without = OpenMythos(tiny_config(halting=False)).train()
    without.load_state_dict(with_bridge.state_dict(), strict=False)
    ids = tokens(2, 6)
    logits = with_bridge(ids, 4, auxiliary=False)
    assert torch.equal(logits, without(ids, 4, auxiliary=False))
    logits.square().sum().backward()
    assert with_bridge.recurrent.bridge.ffn.down.weight.grad.abs().max() > 0


@pytest.mark.parametrize("padded", [False, True])
def test_with_one_loop_the_bridge_does_not_change_the_logits(padded):
    model = tiny_model(bridge_dim=12, halting=False)
    without = OpenMythos(tiny_config(halting=False)).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    ids, mask = tokens(2, 6), left_padding([6, 3] if padded else [6, 6], 6)
    one, two = (model(ids, n, attention_mask=mask)[mask] for n in (1, 2))
    assert torch.equal(one, without(ids, 1, attention_mask=mask)[mask])
    assert (two - without(ids, 2, attention_mask=mask)[mask]).abs().max() > 1e-3
