"""Products with everything around them in their epilogue, so that no elementwise pass is left in an MLP.

    y = epilogue(a @ b^T)  or  epilogue(a @ b)            a [M, K], b [N, K] or [K, N], y [M, N]

    "linear"    : y = row * acc + bias + r, and partials = sum(y^2) of each row over 128 columns
    "gelu"      : z = row * acc + bias,  y = quick_gelu(z)
    "gelu_grad" : du = acc * quick_gelu'(u),  y = row * du,  partials = sum(du * u)
    "norm_grad" : y = acc - row * u + r

`row` is fp32 [M]; each of row, bias [N], r [M, N], z [M, N] and partials may be absent. u is read, z and y are written.
With these a norm that does not centre costs no pass of its own. W' = gain * W, in the operands' dtype:

    u = norm(x) @ W^T = rstd * (x @ W'^T)                              row = rstd: "linear", "gelu"
    dx = dus @ W' - x * (rstd^2 / d) rowdot(du, u) + dy                dus = rstd * du: "gelu_grad", then "norm_grad"
    dW' = dus^T @ x,  dW = gain * dW',  dgain = sum_out(dW' * W)       `unfold_gain`

since the row's dot of du @ W' with x is that of du with u / rstd. All of this is fp32 from the accumulator on. Each of
`partials` [ceil(N / 128), M] has one writer, and they are summed in order: deterministic.

FLOPs: 2 M N K. Bytes: each operand and result once when the b operand (a weight) stays in L2: programs are persistent
and walk groups of GROUP_M row tiles, all columns of a group before the next. sm_90 and later: operands, u and r come
and y and z go by TMA; elsewhere by pointers. fp32 operands multiply in full precision, without matrix instructions.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import rows, tiles
from .primitives import quick_gelu, quick_gelu_grad
from .rows import load_rows, store_rows

PIECE = 128  # columns of one pass of the epilogue, and of one partial sum
GROUP_M = 8


@triton.jit
def load_block(p, i_row, i_col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr):
    """[BLOCK_R, BLOCK_C] of a contiguous [rows, cols], 0 outside of it."""
    if USE_TMA:
        return p.load([i_row, i_col])
    else:
        o_r, o_c = i_row + tl.arange(0, BLOCK_R), i_col + tl.arange(0, BLOCK_C)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        return tl.load(p + o_r[:, None].to(tl.int64) * cols + o_c[None, :], mask=m, other=0.0)


@triton.jit
def store_block(p, b, i_row, i_col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr):
    if USE_TMA:
        p.store([i_row, i_col], b.to(p.dtype))
    else:
        o_r, o_c = i_row + tl.arange(0, BLOCK_R), i_col + tl.arange(0, BLOCK_C)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        tl.store(p + o_r[:, None].to(tl.int64) * cols + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def finish_piece(
    b_y, row, bias, u, r, y, z, partials, i_row, i_col, M, N,
    EPILOGUE: tl.constexpr, HAS_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_PARTIALS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """The epilogue of accumulator b_y [BLOCK_M, BLOCK_C]."""
    o_m, o_n = i_row + tl.arange(0, BLOCK_M), i_col + tl.arange(0, BLOCK_C)
    if HAS_ROW:
        b_row = tl.load(row + o_m, mask=o_m < M, other=0.0)[:, None]
    if EPILOGUE == "gelu_grad" or EPILOGUE == "norm_grad":
        b_u = load_block(u, i_row, i_col, M, N, BLOCK_M, BLOCK_C, USE_TMA).to(tl.float32)
    if EPILOGUE == "gelu_grad":
        b_y *= quick_gelu_grad(b_u)
        if HAS_PARTIALS:
            b_sum = tl.sum(b_y * b_u, 1)
        if HAS_ROW:
            b_y *= b_row
    elif EPILOGUE == "norm_grad":
        b_y -= b_u * b_row
    else:
        if HAS_ROW:
            b_y *= b_row
        if HAS_BIAS:
            b_y += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_R:
        b_y += load_block(r, i_row, i_col, M, N, BLOCK_M, BLOCK_C, USE_TMA).to(tl.float32)
    if EPILOGUE == "gelu":
        if HAS_Z:
            store_block(z, b_y, i_row, i_col, M, N, BLOCK_M, BLOCK_C, USE_TMA)
        b_y = quick_gelu(b_y)
    store_block(y, b_y, i_row, i_col, M, N, BLOCK_M, BLOCK_C, USE_TMA)
    if HAS_PARTIALS:
        if EPILOGUE == "linear":
            b_sum = tl.sum(b_y * b_y, 1)
        # A tile's second piece may lie beyond the last column.
        tl.store(partials + (i_col // BLOCK_C).to(tl.int64) * M + o_m, b_sum, mask=(o_m < M) & (i_col < N))


@triton.jit
def product_kernel(
    a, b, row, bias, u, r, y, z, partials, M, N, K,
    IS_KN: tl.constexpr, EPILOGUE: tl.constexpr, HAS_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_PARTIALS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, GROUP_M: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_group = i_tile // (GROUP_M * tiles_n)
        group = min(tiles_m - i_group * GROUP_M, GROUP_M)
        i_row = (i_group * GROUP_M + i_tile % (GROUP_M * tiles_n) % group) * BLOCK_M
        i_col = (i_tile % (GROUP_M * tiles_n) // group) * BLOCK_N
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_k in range(0, tl.cdiv(K, BLOCK_K)):
            b_a = load_block(a, i_row, i_k * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            if IS_KN:
                b_b = load_block(b, i_k * BLOCK_K, i_col, K, N, BLOCK_K, BLOCK_N, USE_TMA)
            else:
                b_b = load_block(b, i_col, i_k * BLOCK_K, N, K, BLOCK_N, BLOCK_K, USE_TMA).T
            b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        # In two halves, the epilogue's own tiles fit beside the accumulator.
        if BLOCK_N == BLOCK_C:
            finish_piece(
                b_acc, row, bias, u, r, y, z, partials, i_row, i_col, M, N,
                EPILOGUE, HAS_ROW, HAS_BIAS, HAS_R, HAS_Z, HAS_PARTIALS, BLOCK_M, BLOCK_C, USE_TMA,
            )  # fmt: skip
        else:
            b_left, b_right = tl.permute(tl.reshape(b_acc, [BLOCK_M, 2, BLOCK_C]), [0, 2, 1]).split()
            finish_piece(
                b_left, row, bias, u, r, y, z, partials, i_row, i_col, M, N,
                EPILOGUE, HAS_ROW, HAS_BIAS, HAS_R, HAS_Z, HAS_PARTIALS, BLOCK_M, BLOCK_C, USE_TMA,
            )  # fmt: skip
            finish_piece(
                b_right, row, bias, u, r, y, z, partials, i_row, i_col + BLOCK_C, M, N,
                EPILOGUE, HAS_ROW, HAS_BIAS, HAS_R, HAS_Z, HAS_PARTIALS, BLOCK_M, BLOCK_C, USE_TMA,
            )  # fmt: skip


@triton.jit
def finish_rows_kernel(
    partials, rstd, out, P, M, d, eps, HAS_RSTD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr
):
    o_p, o_m = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_sum = tl.zeros([BLOCK_P, BLOCK_M], tl.float32)
    for i_p in range(0, P, BLOCK_P):
        m = (i_p + o_p < P)[:, None] & (o_m < M)[None, :]
        b_sum += tl.load(partials + (i_p + o_p)[:, None].to(tl.int64) * M + o_m[None, :], mask=m, other=0.0)
    b_mean = tl.sum(b_sum, 0) / d  # [BLOCK_M]
    if HAS_RSTD:
        b_rstd = tl.load(rstd + o_m, mask=o_m < M, other=0.0)
        tl.store(out + o_m, b_mean * b_rstd * b_rstd, mask=o_m < M)
    else:
        tl.store(out + o_m, tl.rsqrt(b_mean + eps), mask=o_m < M)


@triton.jit
def unfold_gain_kernel(
    dw, weight, gain, partials, rows, d, stride_weight, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_d = tl.arange(0, BLOCK_D)
    b_gain = tl.load(gain + o_d, mask=o_d < d, other=0.0).to(tl.float32)[None, :]
    b_dgain = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_m in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m = (o_m < rows)[:, None] & (o_d < d)[None, :]
        b_dw = load_rows(dw, o_m, o_d, m, d)  # [BLOCK_M, BLOCK_D]
        b_dgain += b_dw * load_rows(weight, o_m, o_d, m, stride_weight)
        store_rows(dw, b_dw * b_gain, o_m, o_d, m, d)
    tl.store(partials + tl.program_id(0) * d + o_d, tl.sum(b_dgain, 0), mask=o_d < d)


def is_aligned(*weights) -> bool:
    """Whether 16 divides every width: TMA asks for it, and pointer loads without it are narrow and need addresses that
    don't fit the registers."""
    return all(size % 16 == 0 for w in weights for size in w.shape)


def check_form(name: str, form: str | None, *weights, centred: bool = False) -> str:
    """`form` as custom ops take it, "" for the table's choice. Raises ValueError for an unknown or impossible one."""
    if form not in (None, "plain", "folded"):
        raise ValueError(f"{name}: form: got {form!r}, expected None, 'plain' or 'folded'")
    if form == "folded" and centred:
        raise ValueError(f"{name}: form: got 'folded' with centred=True: a large mean would cancel; expected 'plain'")
    if form == "folded" and not is_aligned(*weights):
        shapes = ", ".join(str(tuple(w.shape)) for w in weights)
        raise ValueError(f"{name}: form: got 'folded' for weights {shapes}, expected multiples of 16")
    return form or ""


def is_folded(form: str, name: str, x, *weights, centred: bool = False) -> bool:
    possible = is_aligned(*weights) and not centred
    return possible and (form or tiles.form(name, tiles.arch(x.device), x.shape[-1])) == "folded"


def hands_squares(name: str, y, weight, reader: str | None) -> bool:
    """Whether operation `name`, whose product with `weight` makes y (..., d), is to emit y's squares for the norm in
    `reader`: where the table folds both."""
    arch, d = tiles.arch(y.device), y.shape[-1]
    return reader is not None and is_aligned(weight) and all(
        tiles.form(operation, arch, d) == "folded" for operation in (name, reader)
    )  # fmt: skip


def empty_partials(M: int, N: int, device) -> torch.Tensor:
    return torch.empty((triton.cdiv(N, PIECE), M), dtype=torch.float32, device=device)


def empty_squares(y, emit: bool):
    """What holds the squares of y (..., N), unwritten; nothing unless `emit`."""
    M = y.numel() // y.shape[-1] if emit else 0
    return empty_partials(M, y.shape[-1], y.device)


def check_squares(name: str, squares, x) -> None:
    expected = triton.cdiv(x.shape[-1], PIECE), x.numel() // x.shape[-1]
    rows.check_operand(name, "squares", squares, torch.float32, expected)


def dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it, contiguous from an address that 16 divides."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def product(a, b, *, is_kn=False, epilogue="linear", row=None, bias=None, u=None, r=None, z=None, partials=None):
    """epilogue(a @ b^T), or of a @ b with `is_kn`: a new y [M, N]. K and N as `is_aligned` asks."""
    a, b, u, r = (t if t is None else dense(t) for t in (a, b, u, r))
    (M, K), N = a.shape, b.shape[is_kn]
    if tiles.warp_specialised(tiles.PRODUCT_HOPPER, (epilogue, K), a):
        from . import gemm_hopper  # Gluon is imported only where its rows are on

        has_its_options = bias is None and r is None and (partials is None) == (epilogue == "gelu")
        if has_its_options and gemm_hopper.fits(M, N, K, a.dtype):
            tile = tiles.PRODUCT_HOPPER[epilogue, K]
            return gemm_hopper.product(a, b, is_kn, epilogue, row, u, z, partials, tile)
    tile = tiles.product_tile(tiles.arch(a.device), a.element_size(), epilogue, K)
    tiles.require("product_kernel", tile, a, (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K)
    y = torch.empty((M, N), dtype=a.dtype, device=a.device)

    def argument(t, *block):
        return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], list(block)) if tile.tma and t is not None else t

    b_block = (tile.BLOCK_K, tile.BLOCK_N) if is_kn else (tile.BLOCK_N, tile.BLOCK_K)
    if M:
        programs = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
        product_kernel[(min(programs, tiles.multiprocessors(a.device)),)](
            argument(a, tile.BLOCK_M, tile.BLOCK_K), argument(b, *b_block), row, bias,
            *(argument(t, tile.BLOCK_M, PIECE) for t in (u, r, y, z)), partials,
            M=M, N=N, K=K, IS_KN=is_kn, EPILOGUE=epilogue, HAS_ROW=row is not None, HAS_BIAS=bias is not None,
            HAS_R=r is not None, HAS_Z=z is not None, HAS_PARTIALS=partials is not None,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, BLOCK_C=PIECE, GROUP_M=GROUP_M,
            USE_TMA=tile.tma, PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


def _finish_rows(partials, d: int, rstd=None, eps: float = 0.0):
    P, M = partials.shape
    out = torch.empty((1, M), dtype=torch.float32, device=partials.device)
    BLOCK_M = 64
    if M:
        finish_rows_kernel[(triton.cdiv(M, BLOCK_M),)](
            partials, rstd, out, P=P, M=M, d=d, eps=eps, HAS_RSTD=rstd is not None, BLOCK_P=16, BLOCK_M=BLOCK_M,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def rstd_of(x, gain, squares, eps: float):
    """stats [1, M] of the norm of x [M, d]: from its partial sums of squares, or by reading it."""
    if squares is None:
        return rows.norm_forward(x, gain, eps, centred=False, write=False)[1]
    return _finish_rows(squares, x.shape[1], eps=eps)


def product_residual(a, weight, residual, bias, folded: bool, emit_squares: bool):
    """residual + a @ weight^T + bias [M, N], and its squares (empty unless asked for)."""
    if not folded:
        residual = residual if bias is None else residual + bias
        return torch.addmm(residual, a, weight.t()), empty_partials(0, weight.shape[0], a.device)
    squares = empty_squares(residual, emit_squares)
    return product(a, weight, r=residual, bias=bias, partials=squares if emit_squares else None), squares


def norm_grad_row(partials, rstd, d: int):
    """Partial sums of rowdot(du, u) -> the factor rstd^2 / d * rowdot [1, M] of "norm_grad"."""
    return _finish_rows(partials, d, rstd)


def unfold_gain(dw, weight, gain):
    """dW' [out, d] becomes dW = gain * dW', in place; returns dW and dgain = sum_out(dW' * W)."""
    weight, (out, d) = rows.as_rows(weight), dw.shape
    tile = tiles.row_tile(tiles.NORM_BACKWARD, tiles.arch(dw.device), d)
    programs = min(triton.cdiv(out, tile.BLOCK_M), tiles.multiprocessors(dw.device))
    partials = torch.empty((programs, d), dtype=torch.float32, device=dw.device)
    unfold_gain_kernel[(programs,)](
        dw, weight, gain, partials, rows=out, d=d, stride_weight=weight.stride(0),
        BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_N, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dw, rows.sum_partials(partials, gain.dtype)
