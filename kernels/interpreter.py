"""Mends Triton's CPU interpreter (TRITON_INTERPRET=1) where it is silently wrong for bfloat16 and fp8, and where it
spends half of its time to no effect.

It keeps bf16 as raw uint16, multiplies those bits in `tl.dot`, truncates where the GPU rounds to nearest even, and
adds and multiplies the bits elsewhere; fp8 it rounds half up. Here products go through fp32, casts round, and bf16
arithmetic raises: kernels cast to fp32 straight after any load that is no operand of a dot.
"""

import dataclasses
import functools
import inspect
import types

import numpy as np
import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as the hardware does; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def fp8_to_fp32(bits: np.ndarray, dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(FP8[dtype]).float().numpy()


def fp32_to_fp8(x: np.ndarray, dtype) -> np.ndarray:
    """Round to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(FP8[dtype]).view(torch.uint8).numpy()


def mend() -> None:
    """Patch the interpreter's builder, once, when this process interprets kernels."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "igpt_mended", False):
        return
    plain_dot, plain_cast, plain_binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def fp32(x):
        if x.dtype.scalar in FP8:
            return handle(fp8_to_fp32(x.data, x.dtype.scalar), tl.float32)
        return handle(bf16_to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, fp32(a), fp32(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar in FP8:
            return handle(fp32_to_fp8(fp32(src).data, dst_type.scalar), dst_type.scalar)
        if dst_type.scalar != tl.bfloat16:
            return plain_cast(self, fp32(src), dst_type)
        if src.dtype.scalar == tl.bfloat16:
            return handle(src.data, tl.bfloat16)
        return handle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError(f"the interpreter cannot do bf16 arithmetic ({op.__name__}): cast to fp32 after the load")
        return plain_binary(self, lhs, rhs, op)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op
    builder.create_fp_to_fp = create_fp_to_fp
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)
    builder.create_int_cast = lambda self, src, dst_type, is_signed: cast_impl(self, src, dst_type)
    quicken(interpreter)
    builder.igpt_mended = True


def quicken(interpreter) -> None:
    """The builtins are put in place once a launch, of one list, and not at every call of a device function besides;
    integers are not added a second time in 64 bits for an assertion that only the option `debug` makes; and the table
    of numpy's dtypes is not made anew for every value."""
    patch_lang, plain_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    dtype_of = functools.cache(plain_dtype)

    @functools.cache
    def builtins_of(package) -> list:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, *how):
        for name, member in builtins_of(package):
            interpreter._patch_attr(package, name, member, *how)

    def np_dtype(kind):  # a pointer's type has no hash
        return plain_dtype(kind) if isinstance(kind.scalar, tl.pointer_type) else dtype_of(kind.scalar)

    interpreter._get_np_dtype, interpreter._patch_builtin = np_dtype, patch_builtin
    interpreter._patch_lang = lambda fn: patch_lang(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)
    machine = interpreter.interpreter_builder
    machine.options = dataclasses.replace(machine.options, sanitize_overflow=False)


if INTERPRETED:
    mend()
