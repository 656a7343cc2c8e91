"""A nanoGPT-style block with igpt's kernels in three of its lines: on a GPU they run, on a CPU the torch path.

    python examples/nanogpt_attention.py        # trains on a sentence for a moment and prints the loss

The lines that changed are marked. Norms here are RMS norms with a gain; `centred=True` makes them layer norms.
"""

import torch
from torch import nn

from igpt import ops


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        y = ops.attention(qkv, causal=True)  # was: split, three transposes, scaled_dot_product_attention
        return self.c_proj(y.reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.attn = CausalSelfAttention(width, heads)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attn(ops.norm(x, self.ln_1))
        # Was: x + c_proj(gelu(c_fc(ln_2(x)))). The sum is inside; gelu is the quick one, x sigmoid(1.702 x).
        return ops.norm_mlp(x, self.ln_2, self.c_fc.weight, self.c_proj.weight)


class GPT(nn.Module):
    def __init__(self, vocab: int, width: int = 64, heads: int = 2, layers: int = 2, block_size: int = 64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.Parameter(torch.ones(width)), nn.Linear(width, vocab, bias=False)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        # Was: cross_entropy(lm_head(ln_f(x))); the logits never reach memory.
        return ops.head_loss(x, self.ln_f, self.lm_head.weight, targets).mean()


def main(steps: int = 60) -> tuple[float, float]:
    """Losses before and after training on one sentence, nats a character."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "each pixel becomes one of 512 palette colours, and a transformer predicts the next one. "
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text], device=device)
    model = GPT(len(letters)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 33, (16,))
        batch = torch.stack([ids[i : i + 33] for i in starts.tolist()])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"loss {first:.2f} -> {last:.2f} nats a character")
