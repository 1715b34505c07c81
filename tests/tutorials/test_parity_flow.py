"""The second of the two popular tutorials, from its first import to its last plot, as in a notebook.

Running parity, and a look inside the model by replaced methods. Rewritten with only the names, calls and attributes of
the reference, none of this library's own. It trains for fewer steps, so that it takes seconds.
"""

import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_parity_tutorial_runs_to_its_last_plot(seed, tmp_path):
    # -- imports and seeds
    import math
    from collections import Counter

    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    import torch.nn.functional as F

    from open_mythos.main import ACTHalting, MoEFFN, MythosConfig, OpenMythos

    torch.manual_seed(seed), np.random.seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # -- size of the cache in a plain dict, by kind of attention
    def make_config(attn_type, *, dim=128, n_heads=4, n_experts=4, max_loops=8, seq_len=128, vocab=256):
        base = dict(
            vocab_size=vocab, dim=dim, n_heads=n_heads, max_seq_len=seq_len, max_loop_iters=max_loops, prelude_layers=1,
            coda_layers=1, n_experts=n_experts, n_shared_experts=1, n_experts_per_tok=2, expert_dim=dim // 2,
            lora_rank=8, attn_type=attn_type,
        )  # fmt: skip
        if attn_type == "gqa":
            return MythosConfig(**base, n_kv_heads=2)
        return MythosConfig(
            **base, n_kv_heads=n_heads, kv_lora_rank=32, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16,
            v_head_dim=16,
        )  # fmt: skip

    def cache_bytes(kv):
        return sum(t.element_size() * t.numel() for entry in kv.values() for t in entry.values())

    m_gqa = OpenMythos(make_config("gqa")).to(device)
    m_mla = OpenMythos(make_config("mla")).to(device)
    x = torch.randint(0, 256, (1, 64), device=device)
    kv_gqa, kv_mla = {}, {}
    with torch.no_grad():
        m_gqa(x, n_loops=4, kv_cache=kv_gqa)
        m_mla(x, n_loops=4, kv_cache=kv_mla)
    for tag, m, kv in (("GQA", m_gqa, kv_gqa), ("MLA", m_mla, kv_mla)):
        size = sum(p.numel() for p in m.parameters())
        print(f"{tag} {size:>10,} parameters, {cache_bytes(kv) / 1024:.1f} KB of cache in {len(kv)} slots")
        assert len(kv) == 1 + 4 + 1, "prelude, one for each loop, coda"
    assert 2 < cache_bytes(kv_gqa) / cache_bytes(kv_mla) < 4
    with torch.no_grad():
        again = m_gqa(torch.randint(0, 256, (1, 1), device=device), n_loops=4, kv_cache=kv_gqa, start_pos=64)
    assert again.shape == (1, 1, 256)

    # -- stable by construction, whatever the optimizer does
    def show_stability(model, tag):
        A = model.recurrent.injection.get_A()
        stable = bool((A < 1).all() and (A > 0).all())
        print(f"{tag}: A between {A.min():.4f} and {A.max():.4f}, mean {A.mean():.4f}, stable={stable}")
        return stable

    assert show_stability(m_gqa, "GQA") and show_stability(m_mla, "MLA")
    before = m_mla.recurrent.injection.get_A().detach().clone()
    opt = torch.optim.Adam(m_mla.parameters(), lr=1.0)
    for _ in range(10):
        loss = m_mla(torch.randint(0, 256, (2, 16), device=device), n_loops=2).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert show_stability(m_mla, "MLA, abused")
    assert not torch.allclose(m_mla.recurrent.injection.get_A(), before)

    # -- training on running parity with three loops
    VOCAB, SEQ_LEN, T_TRAIN = 64, 24, 3

    def make_batch(batch=64, seq_len=SEQ_LEN):
        x = torch.randint(1, 3, (batch, seq_len), device=device)
        return x, (x - 1).cumsum(dim=1) % 2 + 1

    cfg = MythosConfig(
        vocab_size=VOCAB, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=SEQ_LEN + 4, max_loop_iters=16, prelude_layers=1,
        coda_layers=1, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=4,
        attn_type="gqa", act_threshold=0.99,
    )  # fmt: skip
    model = OpenMythos(cfg).to(device)
    opt, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    model.train()
    for step in range(30):
        x, y = make_batch()
        logits = model(x, n_loops=T_TRAIN)
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), y.reshape(-1))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        if step % 10 == 0:
            accuracy = (logits.argmax(-1) == y).float().mean().item()
            print(f"step {step:3d} loss {losses[-1]:.4f} accuracy {accuracy:.3f}")
    assert all(map(math.isfinite, losses)) and np.mean(losses[-5:]) < 0.5 * losses[0], losses

    # -- evaluation at 1 to 16 loops
    model.eval()
    T_sweep, accuracies = [1, 2, 3, 4, 6, 8, 10, 12, 14, 16], []
    with torch.no_grad():
        x_eval, y_eval = make_batch(128)
        for T in T_sweep:
            accuracies.append((model(x_eval, n_loops=T).argmax(-1) == y_eval).float().mean().item())
            print(f"T={T:2d}  accuracy {accuracies[-1]:.3f} {'<- trained' if T == T_TRAIN else ''}")
    assert min(accuracies) > 0.3, "it predicts at least only parity tokens"

    # -- halting probabilities at each loop
    halt_trace, orig_halt = [], model.recurrent.act.forward

    def halt_hook(self, h):
        p = orig_halt(h)
        halt_trace.append(p.detach().cpu())
        return p

    model.recurrent.act.forward = halt_hook.__get__(model.recurrent.act, ACTHalting)
    with torch.no_grad():
        x_h, _ = make_batch(1)
        watched = model(x_h, n_loops=16)
    model.recurrent.act.forward = orig_halt
    with torch.no_grad():
        assert torch.allclose(model(x_h, n_loops=16), watched, atol=1e-4), "hooks change no output"
    halts = torch.stack(halt_trace, dim=0)[:, 0].numpy()
    assert 1 <= halts.shape[0] <= 16 and halts.shape[1] == SEQ_LEN
    assert np.isfinite(halts).all() and (halts >= 0).all() and (halts <= 1).all()
    reached = np.cumsum(halts, axis=0) >= model.cfg.act_threshold
    halted_at = np.where(reached.any(0), reached.argmax(0) + 1, halts.shape[0])
    print(f"loops until the threshold: mean {halted_at.mean():.2f}, by position {halted_at.tolist()}")

    # -- which experts the tokens choose
    expert_hits, orig_moe = Counter(), model.recurrent.block.ffn.forward

    def moe_hook(self, x):
        flat = x.view(-1, x.shape[-1])
        logits = self.router(flat) + self.router_bias
        _, idx = F.softmax(logits, dim=-1).topk(self.topk, dim=-1)
        expert_hits.update(idx.flatten().tolist())
        return orig_moe(x)

    model.recurrent.block.ffn.forward = moe_hook.__get__(model.recurrent.block.ffn, MoEFFN)
    with torch.no_grad():
        x_m, _ = make_batch(32)
        model(x_m, n_loops=T_TRAIN)
    model.recurrent.block.ffn.forward = orig_moe
    total = sum(expert_hits.values())
    share = [expert_hits.get(e, 0) / max(total, 1) for e in range(cfg.n_experts)]
    print("share of the choices:", [f"{s:.2%}" for s in share])
    assert 0 < total <= 32 * SEQ_LEN * T_TRAIN * cfg.n_experts_per_tok and math.isclose(sum(share), 1)
    assert set(expert_hits) <= set(range(cfg.n_experts))

    # -- generation at three depths
    prompt = torch.tensor([[1, 2, 1, 1, 2, 2, 1, 2]], device=device)
    for T_gen in (1, 4, 12):
        with torch.no_grad():
            out = model.generate(prompt, max_new_tokens=8, n_loops=T_gen, temperature=0.1, top_k=2)
        print(f"T={T_gen:2d}: {out[0, 8:].tolist()}")
        assert out.shape == (1, 16) and torch.equal(out[:, :8], prompt)
        assert out.min() >= 0 and out.max() < VOCAB
    assert model.generate(prompt, 8, 4, 0.1, 2).shape == (1, 16), "the same with positional arguments"

    # -- the plots
    fig, ax = plt.subplots(1, 3, figsize=(15, 4))
    ax[0].plot(T_sweep, accuracies, "o-")
    ax[0].axvline(T_TRAIN, color="r", linestyle="--", label=f"trained with {T_TRAIN}")
    ax[0].legend()
    image = ax[1].imshow(halts, aspect="auto", cmap="viridis")
    fig.colorbar(image, ax=ax[1])
    ax[2].bar(range(cfg.n_experts), share)
    ax[2].axhline(1 / cfg.n_experts, color="gray", linestyle=":")
    fig.tight_layout()
    fig.savefig(tmp_path / "openmythos.png", dpi=60)
    plt.close(fig)
    assert (tmp_path / "openmythos.png").stat().st_size > 5000
