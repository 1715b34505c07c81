"""The named configurations have the sizes in their names."""

import pytest
import torch
from helpers import tokens

import open_mythos
from open_mythos import VARIANTS, MythosConfig, OpenMythos
from open_mythos.variants import variant

REFERENCE = ["mythos_1b", "mythos_3b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t"]
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
# dim, heads, kv heads, experts, experts per token, expert width, loops, context, prelude, coda, LoRA rank
SHAPES = {
    "mythos_1b": (2048, 16, 4, 64, 4, 2048, 16, 4096, 2, 2, 8),
    "mythos_3b": (3072, 24, 6, 64, 4, 4096, 16, 4096, 2, 2, 8),
    "mythos_10b": (4096, 32, 8, 128, 4, 5632, 24, 8192, 2, 2, 16),
    "mythos_50b": (6144, 48, 8, 256, 4, 9728, 32, 8192, 3, 3, 32),
    "mythos_100b": (8192, 64, 8, 256, 8, 13568, 32, 1_000_000, 4, 4, 64),
    "mythos_500b": (12288, 96, 16, 512, 8, 23040, 48, 1_000_000, 4, 4, 128),
    "mythos_1t": (16384, 128, 16, 512, 8, 34560, 64, 1_000_000, 6, 6, 256),
}


def count(cfg: MythosConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OpenMythos(cfg).parameters())


def test_variants_include_those_of_the_reference():
    assert set(REFERENCE) < set(VARIANTS)
    for name, make in VARIANTS.items():
        assert getattr(open_mythos, name) is make and make.__name__ == name
        assert isinstance(make(), MythosConfig)


@pytest.mark.parametrize("name", REFERENCE)
def test_shapes_match_the_reference(name):
    cfg = VARIANTS[name]()
    assert SHAPES[name] == (
        cfg.dim, cfg.n_heads, cfg.n_kv_heads, cfg.n_experts, cfg.n_experts_per_tok, cfg.expert_dim, cfg.max_loop_iters,
        cfg.max_seq_len, cfg.prelude_layers, cfg.coda_layers, cfg.lora_rank,
    )  # fmt: skip
    assert cfg.attn_type == "mla"


@pytest.mark.parametrize("name", [*REFERENCE, "mythos_100m", "mythos_800k"])
def test_parameter_counts_match_the_names(name):
    size = name.removeprefix("mythos_")
    assert count(VARIANTS[name]()) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.08)


def test_small_variants_are_small_and_run():
    assert count(VARIANTS["mythos_nano"]()) < 0.3e6
    assert count(VARIANTS["mythos_micro"]()) < 6e6
    for name in ("mythos_nano", "mythos_micro"):
        model = OpenMythos(VARIANTS[name]()).eval()
        with torch.no_grad():
            assert model(tokens(1, 5), 2).isfinite().all()


def test_each_call_makes_a_new_config():
    first, second = open_mythos.mythos_nano(), open_mythos.mythos_nano()
    first.max_seq_len = 7
    assert second.max_seq_len != 7


@pytest.mark.parametrize("name", ["mythos_1b", "1b", "1B", "mythos-1b"])
def test_a_variant_is_found_by_several_spellings(name):
    assert variant(name) == open_mythos.mythos_1b()


def test_an_unknown_variant_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown variant 'mythos_7b'; did you mean 'mythos_\d+b'.*mythos_nano"):
        variant("mythos_7b")
