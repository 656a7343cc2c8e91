"""Muon (Jordan et al. 2024): the step of a weight matrix is its gradient's momentum, made orthogonal.

Every direction of a matrix so moves by the same amount, where Adam's step is dominated by a few. The paper trains with
Adam; reports/fashion-mnist.md has what this one saves. A step is as large as Adam's, 0.2 a weight (root mean square) at
learning rate 1 (Liu et al. 2025, section 2.2), so Adam's learning rates apply.

Why not torch.optim.Muon: it multiplies one matrix at a time, takes a stacked q, k, v for one, and works in bf16 alone.
Here the matrices of one shape are one batch of products, and FSDP's shards are exchanged so that each process makes its
share of the matrices orthogonal.
"""

import torch
from torch.distributed.tensor import DTensor, Shard

# x -> a x + b x^3 + c x^5, five times, brings singular values of (0.001, 1] into about [0.7, 1.2]: Jordan's.
STEPS, A, B, C = 5, 3.4445, -4.7750, 2.0315


def groups(model) -> list[dict]:
    """The matrices of an ImageGPT's blocks by shape; q, k and v are three. Embeddings and head are for Adam."""
    parts = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc": 1, "mlp.proj": 1}
    return [
        {"params": [block.get_parameter(name) for block in model.blocks], "parts": count}
        for name, count in parts.items()
    ]


class Muon(torch.optim.Optimizer):
    """Of parameter groups whose matrices have one shape (m, n), which is `parts` (default 1) matrices (m / parts, n)
    one above the other. dtype: what the products run in.

    Raises ValueError for a group of other shapes."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.bfloat16):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "parts": 1})
        self.dtype = dtype
        for group in self.param_groups:
            shapes = {tuple(p.shape) for p in group["params"]}
            if len(shapes) != 1 or any(len(s) != 2 or s[0] % group["parts"] for s in shapes):
                raise ValueError(f"groups: got shapes {shapes}, expected one (m, n), m of {group['parts']} equal parts")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            looked_ahead = []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                looked_ahead.append(local(p.grad.lerp(momentum, group["momentum"])).to(self.dtype))
            m, n = params[0].shape
            lr = group["lr"]  # a graph's lies in the GPU's memory
            lr = lr if isinstance(lr, torch.Tensor) else torch.full((), lr, device=params[0].device)
            rate = lr * (-0.2 * max(m // group["parts"], n) ** 0.5)
            for p, u in zip(params, self.orthogonal(torch.stack(looked_ahead), params[0], group["parts"])):
                local(p).addcmul_(u, rate)
        return loss

    def orthogonal(self, shards, like, parts: int):
        """Of this process's rows of all matrices, (matrices, rows, n): the same rows of the orthogonal ones."""
        m, n = like.shape

        def whole(x):
            return newton_schulz(x.reshape(len(x) * parts, m // parts, n)).view_as(x)

        if not isinstance(like, DTensor):
            return whole(shards)
        rows, matrices = [Shard(1)], [Shard(0)]
        layout = {"device_mesh": like.device_mesh, "shape": (len(shards), m, n), "stride": (m * n, n, 1)}
        mine = DTensor.from_local(shards, placements=rows, **layout).redistribute(placements=matrices).to_local()
        back = DTensor.from_local(whole(mine), placements=matrices, **layout).redistribute(placements=rows)
        return back.to_local()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def newton_schulz(x):
    """About U V^T of each matrix x = U S V^T, (matrices, m, n), without a decomposition; 0 of 0."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the Gram matrix of the shorter side
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # Frobenius: no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).contiguous()
