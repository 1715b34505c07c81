"""The first of the two popular tutorials, from its first import to its last cell, as in a notebook.

Sums of digits modulo 7, predicted at the "=". Rewritten with only the names, calls and attributes of the reference,
none of this library's own. It trains on fewer examples, so that it takes seconds.
"""

import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chain_sum_tutorial_runs_to_its_last_cell(seed, tmp_path):
    # -- imports and seeds
    import math
    import random
    import time

    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, Dataset

    from open_mythos.main import MythosConfig, OpenMythos

    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # -- a model for each kind of attention, and how many parameters they have
    VOCAB, MAX_LEN = 64, 32
    PAD, START, EQ, DIGIT, MOD = 0, 1, 2, 10, 7

    def make_config(attn_type="mla", max_loop_iters=8):
        base = dict(
            vocab_size=VOCAB, dim=128, n_heads=4, max_seq_len=MAX_LEN, max_loop_iters=max_loop_iters, prelude_layers=1,
            coda_layers=1, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=8,
            attn_type=attn_type,
        )  # fmt: skip
        if attn_type == "gqa":
            return MythosConfig(**base, n_kv_heads=2)
        return MythosConfig(
            **base, n_kv_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
            v_head_dim=16,
        )  # fmt: skip

    def count(model):
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return total, trainable

    cfg_gqa, cfg_mla = make_config("gqa"), make_config("mla")
    models = {"gqa": OpenMythos(cfg_gqa).to(device), "mla": OpenMythos(cfg_mla).to(device)}
    for name, m in models.items():
        total, trainable = count(m)
        print(f"{name}: {total:,} parameters, {trainable:,} trainable")
        assert total == trainable and 100_000 < total < 1_000_000
    assert count(models["gqa"]) != count(models["mla"])

    # -- the spectral radius of the injection
    def spectral_radius(model):
        A = model.recurrent.injection.get_A()
        assert A.ndim == 1 and torch.linalg.eigvals(torch.diag(A)).abs().max() == A.abs().max()
        return A.abs().max().item()

    for name, m in models.items():
        rho = spectral_radius(m)
        print(f"{name}: rho(A) = {rho:.6f} ({'stable' if rho < 1 else 'unstable'})")
        assert 0 < rho < 1

    # -- forward and generation
    ids = torch.randint(0, VOCAB, (2, 16), device=device)
    for m in models.values():
        with torch.no_grad():
            logits = m(ids, n_loops=4)
            assert logits.shape == (2, 16, VOCAB) and torch.isfinite(logits).all()
            assert torch.equal(m(ids, 4), logits)
        out = m.generate(ids, max_new_tokens=8, n_loops=8)
        assert out.shape == (2, 24) and torch.equal(out[:, :16], ids)
        assert out.min() >= 0 and out.max() < VOCAB

    # -- the data
    class ChainSum(Dataset):
        def __init__(self, n, low, high, seed):
            rng = random.Random(seed)
            self.rows = [[rng.randrange(MOD) for _ in range(rng.randint(low, high))] for _ in range(n)]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            digits = self.rows[i]
            sequence = [START] + [DIGIT + d for d in digits] + [EQ]
            x = torch.tensor(sequence + [PAD] * (MAX_LEN - len(sequence)), dtype=torch.long)
            return x, DIGIT + sum(digits) % MOD, len(sequence) - 1

    train_set, in_set, out_set = (ChainSum(n, *at) for n, at in ((256, (2, 5, 1)), (48, (2, 5, 2)), (48, (6, 8, 3))))
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True)

    # -- training
    model, epochs, train_loops = models["mla"], 3, 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(train_loader))
    history = {"loss": [], "rho": [], "lr": []}
    start = time.time()
    for epoch in range(epochs):
        model.train()
        for x, y, position in train_loader:
            x, y, position = x.to(device), y.to(device), position.to(device)
            logits = model(x, n_loops=train_loops)
            loss = F.cross_entropy(logits[torch.arange(len(x), device=device), position], y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            history["loss"].append(loss.item())
            history["rho"].append(spectral_radius(model))
            history["lr"].append(schedule.get_last_lr()[0])
        print(f"epoch {epoch}: loss {np.mean(history['loss'][-6:]):.3f}, rho {history['rho'][-1]:.4f}")
    print(f"{time.time() - start:.1f} s")
    assert all(map(math.isfinite, history["loss"])) and max(history["rho"]) < 1
    assert np.mean(history["loss"][-3:]) < 0.7 * history["loss"][0], history["loss"]

    # -- evaluation at other numbers of loops
    @torch.no_grad()
    def evaluate(dataset, n_loops):
        model.eval()
        right = 0
        for x, y, position in DataLoader(dataset, batch_size=48):
            logits = model(x.to(device), n_loops=n_loops)
            right += (logits[torch.arange(len(x)), position].argmax(-1).cpu() == y).sum().item()
        return right / len(dataset)

    loop_grid = [1, 2, 4, 6, 8, 12]
    accuracy = {name: [evaluate(s, n) for n in loop_grid] for name, s in (("in", in_set), ("out", out_set))}
    for n, inside, outside in zip(loop_grid, accuracy["in"], accuracy["out"], strict=True):
        print(f"{n:3d} loops: {inside:.3f} in distribution, {outside:.3f} longer")
        assert 0 <= inside <= 1 and 0 <= outside <= 1

    # -- the four plots
    fig, axes = plt.subplots(2, 2, figsize=(12, 8))
    axes[0, 0].plot(history["loss"])
    axes[0, 0].set_title("training loss")
    axes[0, 1].plot(loop_grid, accuracy["in"], marker="o", label="2 to 5 digits")
    axes[0, 1].plot(loop_grid, accuracy["out"], marker="s", label="6 to 8 digits")
    axes[0, 1].axvline(train_loops, linestyle="--", color="gray")
    axes[0, 1].axhline(1 / MOD, linestyle=":", color="gray")
    axes[0, 1].legend()
    axes[1, 0].plot(history["rho"])
    axes[1, 0].axhline(1.0, color="red", linestyle="--")
    A = model.recurrent.injection.get_A().detach().cpu().numpy()
    axes[1, 1].hist(A, bins=30)
    axes[1, 1].set_title(f"A, min {A.min():.3f}, max {A.max():.3f}")
    fig.tight_layout()
    fig.savefig(tmp_path / "openmythos.png", dpi=60)
    plt.close(fig)
    assert (tmp_path / "openmythos.png").stat().st_size > 5000

    # -- a demo: a prompt padded to max_seq_len
    model.eval()
    x, y, position = out_set[0]
    prompt = x.unsqueeze(0).to(device)
    assert prompt.shape == (1, MAX_LEN) and prompt[0, -1] == PAD and model.cfg.max_seq_len == MAX_LEN
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=1, n_loops=8)
        predicted = model(prompt, n_loops=8)[0, position].argmax().item()
    digits = [t - DIGIT for t in x.tolist() if t >= DIGIT]
    print(f"{' + '.join(map(str, digits))} = {predicted - DIGIT}, right: {y - DIGIT}, generated: {out[0, -1].item()}")
    assert out.shape == (1, MAX_LEN + 1) and torch.equal(out[:, :MAX_LEN], prompt) and 0 <= out[0, -1] < VOCAB
