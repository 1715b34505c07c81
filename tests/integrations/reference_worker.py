"""Run with the reference package in place of this one: saves its models in every format, and the logits they give.

Usage: python reference_worker.py OUT. Writes a checkpoint for each name in ``CASES``, and ``NAME.expected`` beside it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from open_mythos import MythosConfig, OpenMythos  # the reference's

SHAPE = dict(
    vocab_size=29, max_seq_len=16, max_loop_iters=4, kv_lora_rank=11, q_lora_rank=9, qk_rope_head_dim=6,
    qk_nope_head_dim=5, v_head_dim=7, expert_dim=9, rope_theta=10000.0,
)  # fmt: skip
CASES = {
    "training.pt": dict(
        attn_type="gqa", dim=40, n_heads=4, n_kv_heads=2, n_experts=5, n_experts_per_tok=2, n_shared_experts=2,
        prelude_layers=1, coda_layers=2, lora_rank=3, act_threshold=0.9,
    ),
    "state_dict.pt": dict(
        attn_type="mla", dim=48, n_heads=3, n_kv_heads=1, n_experts=4, n_experts_per_tok=3, n_shared_experts=1,
        prelude_layers=2, coda_layers=0, lora_rank=2, act_threshold=0.99, rope_theta=500000.0,
    ),
    "safetensors": dict(
        attn_type="gqa", dim=12, n_heads=3, n_kv_heads=3, n_experts=3, n_experts_per_tok=1, n_shared_experts=0,
        prelude_layers=0, coda_layers=1, lora_rank=0, act_threshold=1.0,
    ),
    "bin": dict(
        attn_type="mla", dim=32, n_heads=4, n_kv_heads=4, n_experts=3, n_experts_per_tok=2, n_shared_experts=3,
        prelude_layers=3, coda_layers=1, lora_rank=4, act_threshold=0.3,
    ),
}  # fmt: skip
LOOPS, PROMPT, TOKENS = (1, 3, 9), 5, 8


def model_of(changes: dict, seed: int) -> OpenMythos:
    """A model with every parameter perturbed, and some values of A that this library's own models never have."""
    torch.manual_seed(seed)
    model = OpenMythos(MythosConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.recurrent.act.halt.bias.sub_(1.0)
        model.recurrent.block.ffn.router_bias.normal_()
        model.recurrent.injection.log_A[:4] = torch.tensor([-25.0, -6.0, 1.5, 9.0])
    return model


def save(model: OpenMythos, path: Path) -> None:
    tensors = model.state_dict()
    if path.name == "training.pt":  # as the reference's training script does
        optimizer = torch.optim.AdamW(model.parameters())
        torch.save(
            {"step": 7, "model": tensors, "optimizer": optimizer.state_dict(), "cfg": model.cfg, "vocab_size": 29}, path
        )
    elif path.name == "state_dict.pt":
        torch.save(tensors, path)
    else:  # in the layout of uploads to Hugging Face, with complex buffers
        path.mkdir()
        more = dict(model_type="open_mythos", architectures=["OpenMythosForCausalLM"], torch_dtype="float32")
        (path / "config.json").write_text(json.dumps(asdict(model.cfg) | more))
        if path.name == "safetensors":
            save_file({name: x for name, x in tensors.items() if name != "head.weight"}, path / "model.safetensors")
        else:
            torch.save({f"model.{name}": x for name, x in tensors.items()}, path / "pytorch_model.bin")


@torch.no_grad()
def main(out: Path) -> None:
    for seed, (name, changes) in enumerate(CASES.items()):
        model = model_of(changes, seed)
        save(model, out / name)
        ids = torch.randint(29, (2, TOKENS))
        expected = {"cfg": asdict(model.cfg), "ids": ids, "whole": {}, "cached": {}}
        for n_loops in LOOPS:
            expected["whole"][n_loops] = model(ids, n_loops)
            cache: dict = {}
            parts = [model(ids[:, :PROMPT], n_loops, cache)]
            parts += [model(ids[:, at : at + 1], n_loops, cache, start_pos=at) for at in range(PROMPT, TOKENS)]
            expected["cached"][n_loops] = torch.cat(parts, 1)
        torch.save(expected, out / f"{name}.expected")
    torch.save(model, out / "whole_model.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
