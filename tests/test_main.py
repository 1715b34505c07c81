"""The names of the reference implementation exist in ``open_mythos.main``, as the same objects as in the package."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tokens

import open_mythos
import open_mythos.main

SURFACE = {
    "OpenMythos": "open_mythos.model",
    "MythosConfig": "open_mythos.config",
    "ACTHalting": "open_mythos.nn.halting",
    "MoEFFN": "open_mythos.nn.feed_forward",
    "GQAttention": "open_mythos.nn.attention",
    "MLAttention": "open_mythos.nn.attention",
    "LTIInjection": "open_mythos.nn.injection",
    "LoRAAdapter": "open_mythos.nn.injection",
    "RecurrentBlock": "open_mythos.nn.recurrent",
    "TransformerBlock": "open_mythos.nn.block",
    "Expert": "open_mythos.nn.feed_forward",
    "RMSNorm": "open_mythos.nn.linear",
    "loop_index_embedding": "open_mythos.ops.loop_index",
    "precompute_rope_freqs": "open_mythos.ops.rope",
    "apply_rope": "open_mythos.ops.rope",
}
PACKAGE = Path(open_mythos.__file__).parent


@pytest.mark.parametrize("name", SURFACE)
def test_the_facade_exports_the_same_object(name):
    assert getattr(open_mythos.main, name) is getattr(importlib.import_module(SURFACE[name]), name)


def test_the_package_exports_model_config_variants_and_version():
    assert open_mythos.OpenMythos is open_mythos.main.OpenMythos
    assert open_mythos.MythosConfig is open_mythos.main.MythosConfig
    for name in ("mythos_1b", "mythos_3b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t"):
        assert isinstance(getattr(open_mythos, name)(), open_mythos.MythosConfig)
    assert open_mythos.__version__.count(".") == 2


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, or imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_package_imports_neither_the_facade_nor_the_reference_code():
    slow = {"open_mythos.reference", "open_mythos.ops.reference"}
    for path in PACKAGE.rglob("*.py"):
        assert "open_mythos.main" not in imports(path), path
        if path.name != "reference.py":
            assert not imports(path) & slow, path


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages([str(PACKAGE)], "open_mythos."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_the_attributes_used_in_tutorials_exist():
    cfg = tiny_config()
    model = open_mythos.OpenMythos(cfg)
    A = model.recurrent.injection.get_A()
    assert A.shape == (32,) and A.min() > 0 and A.max() < 1
    ffn = model.recurrent.block.ffn
    assert ffn.router(torch.randn(5, 32)).shape == (5, 4)
    assert ffn.router_bias.shape == (4,) and ffn.topk == 2
    assert model.recurrent.act.forward(torch.randn(2, 3, 32)).shape == (2, 3)
    assert model.cfg is cfg and model.head.weight is model.embed.weight
    assert model(tokens(2, 3)).shape == (2, 3, 23)
    assert model.generate(tokens(2, 3), max_new_tokens=4).shape == (2, 7)


def test_modules_accept_the_positional_arguments_of_the_reference():
    """Constructors and forward calls as users of the reference implementation write them."""
    m = open_mythos.main
    x = torch.randn(2, 6, 32)
    gqa, mla = tiny_config("gqa"), tiny_config("mla")
    for cfg, attention in ((gqa, m.GQAttention), (mla, m.MLAttention)):
        freqs = m.precompute_rope_freqs(cfg.rope_dim, cfg.max_seq_len, cfg.rope_theta)
        assert attention(cfg)(x, freqs[:6]).shape == x.shape
        assert m.TransformerBlock(cfg, use_moe=True)(x, freqs[:6]).shape == x.shape
        assert m.RecurrentBlock(cfg)(x, x, freqs[:6], None, 2).shape == x.shape
    assert m.RMSNorm(32)(x).shape == m.Expert(32, 8)(x).shape == m.MoEFFN(gqa)(x).shape == x.shape
    assert m.LoRAAdapter(32, 4, 10)(x, 3).shape == m.LTIInjection(32)(x, x, x).shape == x.shape
    assert m.ACTHalting(32)(x).shape == (2, 6)
    assert m.loop_index_embedding(x, 2, 8).shape == x.shape
    assert m.apply_rope(torch.randn(2, 6, 4, 8), m.precompute_rope_freqs(8, 6)).shape == (2, 6, 4, 8)


def test_loop_index_embedding_changes_only_its_channels():
    h = torch.zeros(2, 3, 16)
    first, second = loop_index_embedding_at(h, 0), loop_index_embedding_at(h, 1)
    assert first[..., 8:].eq(0).all() and not torch.equal(first, second)
    assert first[0, 0, :8].tolist() == [0.0] * 4 + [1.0] * 4
    assert loop_index_embedding_at(h, 10**6).abs().max() <= 1
    assert loop_index_embedding_at(h.bfloat16(), 3).dtype == torch.bfloat16


def loop_index_embedding_at(h: torch.Tensor, loop: int) -> torch.Tensor:
    return open_mythos.main.loop_index_embedding(h, loop, 8)
