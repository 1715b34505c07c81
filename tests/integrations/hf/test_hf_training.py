"""Trainer and the trainers of TRL train the model like any other."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import assert_near, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from wrapped import letters, wrapped

from open_mythos import OpenMythos
from open_mythos.integrations.hf import OpenMythosForCausalLM, OpenMythosForSequenceClassification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
QUIET = dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4, max_steps=3)
FEW = dict(**QUIET, learning_rate=1e-2, save_strategy="no", bf16=False, max_length=16)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, recompute):
    def run(name, max_steps, checkpoint=None):
        torch.manual_seed(0)
        lm = OpenMythosForCausalLM.wrap(tiny_model(warm_start=True, state_noise=0.1).train())
        options = {**QUIET, "max_steps": max_steps, "save_steps": 2, "lr_scheduler_type": "constant"}
        args = TrainingArguments(tmp_path / name, learning_rate=1e-2, gradient_checkpointing=recompute, **options)
        data = [{"input_ids": tokens(12, seed=i), "labels": tokens(12, seed=i)} for i in range(8)]
        trainer = Trainer(model=lm, args=args, train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        return lm, losses(trainer)

    whole, expected = run("whole", 4)
    run("halves", 2)
    lm, found = run("halves", 4, tmp_path / "halves" / "checkpoint-2")
    assert found == expected and len(found) == 4
    assert_near(lm.eval()(tokens(1, 5)).logits, whole.eval()(tokens(1, 5)).logits)
    assert_near(OpenMythos.from_pretrained(tmp_path / "halves" / "checkpoint-4")(tokens(1, 5)), lm.core(tokens(1, 5)))


def test_evaluation_returns_logits_without_a_cache(tmp_path):
    lm = wrapped()
    trainer = Trainer(model=lm, args=TrainingArguments(tmp_path, **QUIET))
    lm.config.use_cache = True  # Trainer turns it off
    found = trainer.predict([{"input_ids": tokens(5), "labels": tokens(5)}])
    assert_near(torch.tensor(found.predictions), lm.eval()(tokens(1, 5)).logits)


def test_label_smoothing_shifts_the_labels(tmp_path):
    lm, ids = wrapped(halting=False), tokens(4, 12)
    logits = lm(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1).item()
    args = TrainingArguments(tmp_path, **QUIET | {"max_steps": 1}, label_smoothing_factor=0.1)
    for model in (lm, get_peft_model(lm, LoraConfig(target_modules=["wq"]))):
        trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": i, "labels": i} for i in ids])
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(expected, rel=0.1)


def test_packed_documents_give_the_loss_of_separate_documents(tmp_path):
    documents = [{"input_ids": tokens(n, seed=n).tolist()} for n in (7, 9, 4, 5)]
    args = TrainingArguments(tmp_path, **QUIET | {"max_steps": 1}, remove_unused_columns=False)
    found = []
    for flat in (True, False):
        rows = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        each = [{key: torch.tensor(row["input_ids"]) for key in ("input_ids", "labels")} for row in documents]
        mean = args if flat else TrainingArguments(
            tmp_path, **QUIET | {"max_steps": 1, "per_device_train_batch_size": 1}, gradient_accumulation_steps=4
        )  # fmt: skip
        lm = wrapped(halting=False).train()
        data = documents if flat else each
        trainer = Trainer(model=lm, args=mean, train_dataset=data, data_collator=rows if flat else None)
        trainer.train()
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("kind, n_labels", [
    ("regression", 1), ("multi_label_classification", 3), ("single_label_classification", 3),
])  # fmt: skip
def test_accumulated_steps_of_a_classifier_equal_one_of_all_rows(tmp_path, kind, n_labels):
    labels = {"regression": [0.0, 1.0, 2.0, 3.0], "single_label_classification": [0, 1, 2, 0]}
    labels = labels.get(kind, [[1.0, 0.0, float(i % 2)] for i in range(4)])
    rows = [{"input_ids": tokens(6, seed=i), "labels": labels[i]} for i in range(4)]
    found = []
    for n in (1, 4):
        torch.manual_seed(0)
        config = wrapped(halting=False).config
        config.num_labels, config.problem_type = n_labels, kind
        config.pad_token_id = 0
        options = QUIET | {"max_steps": 1, "per_device_train_batch_size": 4 // n, "max_grad_norm": 1e9}
        args = TrainingArguments(tmp_path / str(n), gradient_accumulation_steps=n, save_strategy="no", **options)
        trainer = Trainer(model=OpenMythosForSequenceClassification(config), args=args, train_dataset=rows)
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_gradient_checkpointing_changes_no_gradient(attn_type):
    found = []
    for recompute in (False, True):
        lm = wrapped(attn_type).train()
        if recompute:
            lm.gradient_checkpointing_enable()
        lm(tokens(8, 10), labels=tokens(8, 10), num_loops=6).loss.backward()
        found.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, what=name)


def test_sft_dpo_and_reward_training_with_trl(tmp_path):
    start = wrapped(halting=False)  # a reference in eval mode would halt early, and a model in training not
    start.core.recurrent.lora.trained_loops.fill_(4)
    start.save_pretrained(tmp_path / "model")
    words = [{"prompt": "abc", "chosen": "def", "rejected": "hijk"}] * 8
    tokenizer = letters()
    lora = LoraConfig(target_modules=["wq", "wo"], target_parameters=["ffn.gate_up", "ffn.down"])
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    texts = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in words])
    args = SFTConfig(tmp_path / "sft", **FEW | {"max_length": None}, padding_free=True)
    sft = SFTTrainer(lm, args, train_dataset=texts, processing_class=tokenizer, peft_config=lora)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    pairs = Dataset.from_list(words)
    dpo = DPOTrainer(lm, args=DPOConfig(tmp_path / "dpo", **FEW), train_dataset=pairs, processing_class=tokenizer)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    reward = RewardTrainer(
        judge, args=RewardConfig(tmp_path / "reward", **FEW), train_dataset=pairs, processing_class=tokenizer
    )
    for trainer in (sft, dpo, reward):
        trainer.train()
        found = losses(trainer)
        assert len(found) == 3 and found[-1] < found[0], (type(trainer).__name__, found)
    assert losses(dpo)[0] == pytest.approx(0.6931, abs=1e-3), "at first the reference equals the model"
