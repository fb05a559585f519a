# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""Sixteen float32 lanes as one numba value: SIMD that does not depend on what the vectoriser makes of a loop.

A search works on sixteen blocks at once, block i in lane i. No sum ever runs across lanes, so each block sees exactly
the operations of a scalar program in a fixed order, and LLVM may map the vector type to registers of any width (one of
AVX-512, two of AVX, four of SSE or NEON): the results are the same bits everywhere. Only IEEE add, subtract, multiply,
divide, square root, compare and select are used, and nothing is contracted to a fused multiply-add.

    v = load(tile, e)          # row e of a C-contiguous float32 [n, 16]
    r = nearest(v * scale)     # + - * / with other lanes or a float; < <= > >= give a mask, & joins masks
    store(tile, e, where(r > hi, hi, r))

The tile is [element, lane], so that one load brings the same element of sixteen blocks.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.typing.builtins import infer_global
from numba.core.typing.templates import ConcreteTemplate, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from weightsmith.quant.kernels import inner

LANES = 16
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, so the sum is rounded to even


class Floats(types.Type):
    """Numba type: sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Floats16")


class Mask(types.Type):
    """Numba type: sixteen truth values."""

    def __init__(self) -> None:
        super().__init__(name="Mask16")


floats = Floats()
mask = Mask()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _MASK)


def _spread(builder: Any, value: Any) -> Any:
    """A float, double or vector as a vector of float32."""
    if value.type == _FLOATS:
        return value
    if value.type == ir.DoubleType():
        value = builder.fptrunc(value, ir.FloatType())
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), zeros)


_OPERANDS = (
    (floats, floats),
    (floats, types.float32),
    (types.float32, floats),
    (floats, types.float64),
    (types.float64, floats),
)


def _define(op: Any, result: Any, emit: Any) -> None:
    """Teach numba `op` for lanes with lanes and lanes with floats."""

    class _Template(ConcreteTemplate):
        cases = [signature(result, *operands) for operands in _OPERANDS]  # noqa: RUF012

    infer_global(op)(_Template)

    def lower(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return emit(builder, _spread(builder, args[0]), _spread(builder, args[1]))

    for operands in _OPERANDS:
        lower_builtin(op, *operands)(lower)


_define(operator.add, floats, lambda b, x, y: b.fadd(x, y))
_define(operator.sub, floats, lambda b, x, y: b.fsub(x, y))
_define(operator.mul, floats, lambda b, x, y: b.fmul(x, y))
_define(operator.truediv, floats, lambda b, x, y: b.fdiv(x, y))
for _op, _name in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _define(_op, mask, lambda b, x, y, name=_name: b.fcmp_ordered(name, x, y))


def _join(op: Any, emit: Any) -> None:
    """Teach numba `op` for two masks."""

    class _Template(ConcreteTemplate):
        cases = [signature(mask, mask, mask)]  # noqa: RUF012

    infer_global(op)(_Template)
    lower_builtin(op, mask, mask)(lambda _context, builder, _sig, args: emit(builder, *args))


_join(operator.and_, lambda b, x, y: b.and_(x, y))
_join(operator.or_, lambda b, x, y: b.or_(x, y))


def _address(context: Any, builder: Any, array_type: Any, array: Any, row: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    offset = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


@intrinsic
def load(_typing: Any, tile: Any, row: Any) -> Any:
    """Row `row` of a C-contiguous float32 [n, 16]; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row64 = context.cast(builder, args[1], sig.args[1], types.int64)
        instruction = builder.load(_address(context, builder, sig.args[0], args[0], row64, _FLOATS))
        instruction.align = 4
        return instruction

    return floats(tile, row), generate


@intrinsic
def store(_typing: Any, tile: Any, row: Any, value: Any) -> Any:
    """Write row `row` of a C-contiguous float32 [n, 16]; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row64 = context.cast(builder, args[1], sig.args[1], types.int64)
        address = _address(context, builder, sig.args[0], args[0], row64, _FLOATS)
        builder.store(args[2], address).align = 4
        return context.get_dummy_value()

    return types.void(tile, row, floats), generate


@intrinsic
def store_bytes(_typing: Any, tile: Any, row: Any, value: Any) -> Any:
    """Write whole numbers of -128..255 as row `row` of a C-contiguous uint8 [n, 16]; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row64 = context.cast(builder, args[1], sig.args[1], types.int64)
        address = _address(context, builder, sig.args[0], args[0], row64, _BYTES)
        whole = builder.fptosi(args[2], ir.VectorType(ir.IntType(32), LANES))
        builder.store(builder.trunc(whole, _BYTES), address).align = 1
        return context.get_dummy_value()

    return types.void(tile, row, floats), generate


def _place(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any, vector: Any) -> Any:
    found = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, found.shape)[1]
    offset = builder.add(builder.mul(row, width), column)
    return builder.bitcast(builder.gep(found.data, [offset]), vector.as_pointer())


@intrinsic
def load_at(_typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Sixteen neighbours from [row, column] on of a C-contiguous float32 or uint8 array; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _FLOATS if sig.args[0].dtype == types.float32 else _BYTES
        row64, column64 = (context.cast(builder, args[i], sig.args[i], types.int64) for i in (1, 2))
        instruction = builder.load(_place(context, builder, sig.args[0], args[0], row64, column64, kind))
        instruction.align = 4 if kind is _FLOATS else 1
        return instruction if kind is _FLOATS else builder.uitofp(instruction, _FLOATS)

    return floats(array, row, column), generate


@intrinsic
def store_at(_typing: Any, array: Any, row: Any, column: Any, value: Any) -> Any:
    """Write sixteen neighbours from [row, column] on of a C-contiguous float32 array, or whole numbers of 0..255 of a
    uint8 one; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, found = (_FLOATS, args[3]) if sig.args[0].dtype == types.float32 else (_BYTES, None)
        if found is None:
            found = builder.trunc(builder.fptosi(args[3], ir.VectorType(ir.IntType(32), LANES)), _BYTES)
        row64, column64 = (context.cast(builder, args[i], sig.args[i], types.int64) for i in (1, 2))
        address = _place(context, builder, sig.args[0], args[0], row64, column64, kind)
        builder.store(found, address).align = 4 if kind is _FLOATS else 1
        return context.get_dummy_value()

    return types.void(array, row, column, floats), generate


@intrinsic
def spread(_typing: Any, value: Any) -> Any:
    """A float in every lane."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _spread(builder, args[0])

    return floats(value), generate


@intrinsic
def root(_typing: Any, value: Any) -> Any:
    """Square root of every lane, correctly rounded as IEEE 754 wants it."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{LANES}f32")
        return builder.call(function, args)

    return floats(value), generate


@intrinsic
def where(_typing: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Lane by lane `yes` where the mask is true, else `no`; either may be a float."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.select(args[0], _spread(builder, args[1]), _spread(builder, args[2]))

    return floats(condition, yes, no), generate


@intrinsic
def any_lane(_typing: Any, condition: Any) -> Any:
    """Is the mask true in some lane? Only to skip work that would change no lane: lanes stay independent."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        word = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], word), ir.Constant(word, 0))

    return types.boolean(condition), generate


@intrinsic
def eleven_bits(_typing: Any, value: Any) -> Any:
    """Magnitude of every lane rounded to eleven significant bits, ties to even: half precision's, for normal halves."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        def all_of(number: int) -> Any:
            return ir.Constant(_WORDS, [number] * LANES)

        size = builder.and_(builder.bitcast(args[0], _WORDS), all_of(0x7FFFFFFF))
        tie = builder.and_(builder.lshr(size, all_of(13)), all_of(1))
        raised = builder.add(builder.add(size, all_of(0xFFF)), tie)
        return builder.bitcast(builder.and_(raised, all_of(0x7FFFE000)), _FLOATS)

    return floats(value), generate


@intrinsic
def magnitude(_typing: Any, value: Any) -> Any:
    """Every lane without its sign, NaN as well."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        sizes = builder.and_(builder.bitcast(args[0], _WORDS), ir.Constant(_WORDS, [0x7FFFFFFF] * LANES))
        return builder.bitcast(sizes, _FLOATS)

    return floats(value), generate


@intrinsic
def larger_bits(_typing: Any, one: Any, other: Any) -> Any:
    """The larger of two magnitudes by its bits: NaN above Inf above every number."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        a, b = (builder.bitcast(arg, _WORDS) for arg in args)
        return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), _FLOATS)

    return floats(one, other), generate


@inner
def nearest(v):
    """Round lanes of magnitude below 2**22 to whole numbers, ties to even."""
    return (v + _MAGIC) - _MAGIC


@inner
def clip(v, low, high):
    """Lanes limited to [low, high]."""
    v = where(v < low, low, v)
    return where(v > high, high, v)


@inner
def larger(a, b):
    """The larger lane of two."""
    return where(a > b, a, b)


@inner
def smaller(a, b):
    """The smaller lane of two."""
    return where(a < b, a, b)


@inner
def quotient(a, b):
    """a / b, or 0 where b is 0."""
    zero = b == np.float32(0.0)
    return where(zero, np.float32(0.0), a / where(zero, np.float32(1.0), b))
