"""Every field is validated, errors name it, and a config round-trips through dict and JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos import MythosConfig

FIELDS = {spec.name: spec for spec in dataclasses.fields(MythosConfig)}
SIZES = {name: spec.metadata["min"] for name, spec in FIELDS.items() if spec.metadata["kind"] is int}
REALS = {name: spec.metadata for name, spec in FIELDS.items() if spec.metadata["kind"] is float}
FLAGS = [name for name, spec in FIELDS.items() if spec.metadata["kind"] is bool]
CHOICES = {name: spec.metadata["options"] for name, spec in FIELDS.items() if spec.metadata["kind"] is str}


def test_defaults_are_those_of_the_reference():
    cfg = MythosConfig()
    assert {name: getattr(cfg, name) for name in list(FIELDS)[:23]} == {
        "vocab_size": 32000, "dim": 2048, "n_heads": 16, "n_kv_heads": 4, "max_seq_len": 4096, "max_loop_iters": 16,
        "prelude_layers": 2, "coda_layers": 2, "attn_type": "mla", "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_experts": 64, "n_shared_experts": 2,
        "n_experts_per_tok": 4, "expert_dim": 512, "act_threshold": 0.99, "rope_theta": 500000.0, "lora_rank": 16,
        "max_output_tokens": 4096, "dropout": 0.0,
    }  # fmt: skip


# -- one invalid value


@pytest.mark.parametrize("name", SIZES)
def test_integer_fields_refuse_invalid_values(name):
    least = SIZES[name]
    for bad in (least - 1, -5, 2.5, 4.0, "8", None, True):
        with pytest.raises(ValueError, match=rf"^{name}=.*int of at least {least}") as caught:
            MythosConfig(**{name: bad})
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("name", REALS)
def test_float_fields_refuse_invalid_values(name):
    meta = REALS[name]
    bad = [float("nan"), float("inf"), -0.5, "0.5", None, True]
    bad += [meta["low"]] if meta["low_open"] else []
    bad += [] if meta["high"] is None else [meta["high"] + 0.5]
    bad += [meta["high"]] if meta["high_open"] else []
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}=.*use a number in [\[(]"):
            MythosConfig(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_bool_fields_refuse_invalid_values(name):
    for bad in (0, 1, "yes", None):
        with pytest.raises(ValueError, match=f"^{name}=.*True or False"):
            MythosConfig(**{name: bad})


@pytest.mark.parametrize("name", CHOICES)
def test_choice_fields_refuse_invalid_values(name):
    for bad in ("MLA", "", None, 3):
        with pytest.raises(ValueError, match=f"^{name}=.*one of {CHOICES[name][0]!r}") as caught:
            MythosConfig(**{name: bad})
        assert repr(bad) in str(caught.value)


def test_an_unhashable_choice_is_refused():
    with pytest.raises(ValueError, match="attn_type"):
        MythosConfig(attn_type=["mla"])  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.0, 1.0001, -1, 5])
def test_thresholds_outside_0_1_are_refused(threshold):
    with pytest.raises(ValueError, match=r"act_threshold=.*\(0, 1\]"):
        MythosConfig(act_threshold=threshold)
    assert MythosConfig(act_threshold=1).act_threshold == 1.0


# -- invalid combinations


@pytest.mark.parametrize("changes, message", [
    (dict(dim=66, n_heads=4), r"dim=66 .*n_heads=4.*multiple of 4"),
    (dict(n_heads=16, n_kv_heads=3), r"n_kv_heads=3 .*n_heads=16.*\[1, 2, 4, 8, 16\]"),
    (dict(n_heads=4, n_kv_heads=8), r"n_kv_heads=8 .*n_heads=4"),
    (dict(attn_type="gqa", dim=48, n_heads=16, n_kv_heads=4), r"dim=48 .*n_heads=16.*even"),
    (dict(attn_type="mla", qk_rope_head_dim=7), r"qk_rope_head_dim=7 .*use 8"),
    (dict(n_experts=4, n_experts_per_tok=5), r"n_experts_per_tok=5 .*n_experts=4.*1 to 4"),
    (dict(recurrence="mixture"), "warm_start=True .*warm_start=False"),
    (dict(recurrence="mixture", warm_start=False, state_noise=0.1), "state_noise=0.1 .*no noise"),
    (dict(recurrence="mixture", warm_start=False, bridge_dim=8), "bridge_dim=8, but .*has no bridge between its loops"),
    (dict(recurrence="mixture", warm_start=False, state_init="noise"), "state_init='noise'.*'input' or 'zero'"),
    (dict(dim=32, n_heads=4, n_kv_heads=2, attn_type="gqa", loop_index_dim=34), r"loop_index_dim=34 .*dim=32"),
], ids=lambda x: str(x) if isinstance(x, dict) else "")  # fmt: skip
def test_invalid_combinations_of_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MythosConfig(**changes)


def test_fields_of_the_unused_attention_type_are_not_checked():
    MythosConfig(attn_type="gqa", qk_rope_head_dim=7)
    MythosConfig(attn_type="mla", dim=48, n_heads=16, n_kv_heads=4)


def test_mla_allows_an_odd_dim():
    assert MythosConfig(attn_type="mla", dim=45, n_heads=5, n_kv_heads=5).head_dim == 9


def test_validate_checks_fields_assigned_later():
    cfg = MythosConfig()
    cfg.max_seq_len, cfg.max_loop_iters = 10**6, 64
    cfg.validate()
    cfg.dropout = 1.0
    with pytest.raises(ValueError, match="dropout=1"):
        cfg.validate()


# -- conversion to and from dict and JSON


@st.composite
def configs(draw):
    n_kv_heads, groups, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = {name: draw(st.integers(least, least + 1000)) for name, least in SIZES.items()}
    values |= {name: draw(st.sampled_from(options)) for name, options in CHOICES.items()}
    values |= {name: draw(st.booleans()) for name in FLAGS}
    for name, meta in REALS.items():
        high = 1e6 if meta["high"] is None else meta["high"]
        edges = dict(exclude_min=meta["low_open"], exclude_max=meta["high_open"])
        values[name] = draw(st.floats(meta["low"], high, **edges))
    dim = n_kv_heads * groups * 2 * draw(st.integers(1, 50))
    values |= dict(n_kv_heads=n_kv_heads, n_heads=n_kv_heads * groups, dim=dim, n_experts=n_experts)
    values |= dict(n_experts_per_tok=draw(st.integers(1, n_experts)), qk_rope_head_dim=2 * draw(st.integers(1, 50)))
    values |= dict(loop_index_dim=draw(st.integers(0, dim)))
    if values["recurrence"] == "mixture":
        values |= dict(warm_start=False, state_noise=0.0, state_init="input", bridge_dim=0)
    return MythosConfig(**values)


@given(configs())
def test_a_config_round_trips_through_dict_and_json(cfg):
    assert MythosConfig.from_dict(cfg.to_dict()) == cfg
    assert MythosConfig.from_json(cfg.to_json()) == cfg
    assert json.loads(cfg.to_json()) == cfg.to_dict()
    assert list(cfg.to_dict()) == list(FIELDS)


def test_missing_keys_take_defaults():
    assert MythosConfig.from_dict({}) == MythosConfig()
    assert MythosConfig.from_json('{"dim": 64}').dim == 64


@pytest.mark.parametrize("key, nearest", [
    ("n_layer", None), ("vocab_sise", "vocab_size"), ("n_head", "n_heads"), ("num_experts", "n_experts"),
    ("max_seq_length", "max_seq_len"), ("attention_type", "attn_type"),
])  # fmt: skip
def test_an_unknown_key_suggests_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=f"unknown config field {key!r}") as caught:
        MythosConfig.from_dict({key: 1})
    if nearest is not None:
        assert f"did you mean {nearest!r}?" in str(caught.value)


def test_an_unknown_key_without_a_near_match_lists_all_fields():
    with pytest.raises(ValueError, match="choose from vocab_size, dim,"):
        MythosConfig.from_dict({"zzzzzzzz": 1})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '"dim"', '{"dim": 2.5}', "\x00"])
def test_json_that_is_not_a_config_raises_value_error(text):
    with pytest.raises(ValueError):
        MythosConfig.from_json(text)


def test_config_files_are_saved_loaded_and_checked(tmp_path):
    path = tmp_path / "config.json"
    cfg = MythosConfig(dim=64, n_heads=4, attn_type="gqa")
    cfg.save(path)
    assert MythosConfig.load(path) == cfg
    for content in (b"{", b'{"dims": 3}', b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            MythosConfig.load(path)
    with pytest.raises(FileNotFoundError):
        MythosConfig.load(tmp_path / "none.json")


@pytest.mark.parametrize(("share", "n_local"), [(0.0, 0), (0.1, 2), (0.75, 15), (0.9, 18), (0.96, 19), (1.0, 20)])
def test_local_share_leaves_one_global_head_unless_all_are_local(share, n_local):
    assert MythosConfig(dim=320, n_heads=20, n_kv_heads=20, local_share=share).n_local_heads == n_local


def test_derived_sizes():
    cfg = MythosConfig(dim=96, n_heads=6, n_kv_heads=2, attn_type="gqa", n_shared_experts=2, n_experts_per_tok=3,
                       expert_dim=10, qk_rope_head_dim=8)  # fmt: skip
    assert (cfg.head_dim, cfg.rope_dim, cfg.ffn_dim, cfg.shared_dim) == (16, 16, 128, 60)
    cfg.attn_type = "mla"
    assert cfg.rope_dim == 8
