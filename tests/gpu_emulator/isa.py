"""Arithmetic instructions as data: operand types and one C expression each.

`ALU` maps an opcode to ``(destination type, source types, expression)``; the expression names the
sources a, b, c, d. A type is u/s/f and a width, or p for a predicate. `c_source` turns the table
into C.
"""

from __future__ import annotations

CTYPES = {
    "u16": "uint32_t", "s16": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float",
    "u64": "uint64_t", "s64": "int64_t", "f64": "double", "p": "uint32_t",
}  # fmt: skip

ALU: dict[str, tuple[str, tuple[str, ...], str]] = {}


def op(name: str, dest: str, sources: str, expression: str) -> None:
    """Add an instruction."""
    ALU[name] = (dest, tuple(sources.split()), expression)


def _integers() -> None:
    for w in ("16", "32", "64"):
        u, s, b = f"u{w}", f"s{w}", f"b{w}"
        one = "(int16_t)" if w == "16" else ""
        for sign, t in (("u", u), ("s", s)):
            cast = one if sign == "s" else ""
            # wrap-around arithmetic is done unsigned
            op(f"add.{t}", u, f"{u} {u}", "a + b")
            op(f"sub.{t}", u, f"{u} {u}", "a - b")
            op(f"mul.lo.{t}", u, f"{u} {u}", "a * b")
            op(f"mad.lo.{t}", u, f"{u} {u} {u}", "a * b + c")
            op(f"min.{t}", t, f"{t} {t}", f"{cast}a < {cast}b ? a : b")
            op(f"max.{t}", t, f"{t} {t}", f"{cast}a > {cast}b ? a : b")
            op(f"div.{t}", t, f"{t} {t}", f"b == 0 ? -1 : {cast}a / {cast}b")
            op(f"rem.{t}", t, f"{t} {t}", f"b == 0 ? a : {cast}a % {cast}b")
            limit = f"{w} - 1" if sign == "s" else w
            if sign == "s":
                op(f"shr.{t}", t, f"{t} u32", f"{cast}a >> (b > {limit} ? {limit} : b)")
            else:
                op(f"shr.{t}", t, f"{t} u32", f"b >= {w} ? 0 : a >> b")
            for name, sym in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="),
                              ("ne", "!=")):  # fmt: skip
                op(f"setp.{name}.{t}", "p", f"{t} {t}", f"{cast}a {sym} {cast}b")
            for name, sym in (("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")):
                op(f"setp.{name}.{u}", "p", f"{u} {u}", f"a {sym} b")
        op(f"neg.{s}", u, u, "0 - a")
        op(f"abs.{s}", s, s, f"{one}a < 0 ? 0 - a : a")
        op(f"shr.{b}", u, f"{u} u32", f"b >= {w} ? 0 : a >> b")
        op(f"shl.{b}", u, f"{u} u32", f"b >= {w} ? 0 : a << b")
        for name, sym in (("and", "&"), ("or", "|"), ("xor", "^")):
            op(f"{name}.{b}", u, f"{u} {u}", f"a {sym} b")
        op(f"not.{b}", u, u, "~a")
        op(f"cnot.{b}", u, u, "a == 0")
        op(f"setp.eq.{b}", "p", f"{u} {u}", "a == b")
        op(f"setp.ne.{b}", "p", f"{u} {u}", "a != b")
        for t in (b, u, s):
            op(f"selp.{t}", u, f"{u} {u} p", "c ? a : b")
            op(f"mov.{t}", u, u, "a")
    for sign in "us":
        cast = "int64_t" if sign == "s" else "uint64_t"
        op(f"mul.wide.{sign}32", "u64", f"{sign}32 {sign}32", f"({cast})a * ({cast})b")
        op(f"mad.wide.{sign}32", "u64", f"{sign}32 {sign}32 u64", f"({cast})a * ({cast})b + c")
        op(f"mul.hi.{sign}32", "u32", f"{sign}32 {sign}32", f"(({cast})a * ({cast})b) >> 32")
        wide = "__int128" if sign == "s" else "unsigned __int128"
        op(f"mul.hi.{sign}64", "u64", f"{sign}64 {sign}64", f"(({wide})a * ({wide})b) >> 64")
    op("mul.wide.u16", "u32", "u16 u16", "a * b")
    op("mul.wide.s16", "s32", "s16 s16", "(int16_t)a * (int16_t)b")
    op("bfe.u32", "u32", "u32 u32 u32", "bfe_u32(a, b, c)")
    op("bfe.s32", "s32", "s32 u32 u32", "bfe_s32(a, b, c)")
    op("bfi.b32", "u32", "u32 u32 u32 u32", "bfi_b32(a, b, c, d)")
    op("popc.b32", "u32", "u32", "__builtin_popcount(a)")
    op("clz.b32", "u32", "u32", "a ? __builtin_clz(a) : 32")
    op("prmt.b32", "u32", "u32 u32 u32", "prmt(a, b, c)")
    op("lop3.b32", "u32", "u32 u32 u32 u32", "lop3(a, b, c, d)")
    op(
        "shf.l.wrap.b32",
        "u32",
        "u32 u32 u32",
        "(uint32_t)((((uint64_t)b << 32) | a) << (c & 31) >> 32)",
    )
    op("shf.r.wrap.b32", "u32", "u32 u32 u32", "(uint32_t)((((uint64_t)b << 32) | a) >> (c & 31))")
    for name, sym in (("and", "&"), ("or", "|"), ("xor", "^")):
        op(f"{name}.pred", "p", "p p", f"a {sym} b")
    op("not.pred", "p", "p", "!a")
    op("mov.pred", "p", "p", "a")


def _floats() -> None:
    for w, suffix in (("32", "f"), ("64", "")):
        t = f"f{w}"
        for ftz in ("", ".ftz") if w == "32" else ("",):
            z = "ftz(%s)" if ftz else "%s"
            for rounding in ("", ".rn"):
                for name, sym in (("add", "+"), ("sub", "-"), ("mul", "*")):
                    op(f"{name}{rounding}{ftz}.{t}", t, f"{t} {t}", z % f"a {sym} b")
            op(f"fma.rn{ftz}.{t}", t, f"{t} {t} {t}", z % f"__builtin_fma{suffix}(a, b, c)")
            for kind in ("rn", "full", "approx"):
                op(f"div.{kind}{ftz}.{t}", t, f"{t} {t}", z % "a / b")
            for kind in ("rn", "approx"):
                op(f"rcp.{kind}{ftz}.{t}", t, t, z % "1 / a")
                op(f"sqrt.{kind}{ftz}.{t}", t, t, z % f"__builtin_sqrt{suffix}(a)")
            op(f"rsqrt.approx{ftz}.{t}", t, t, z % f"1 / __builtin_sqrt{suffix}(a)")
            op(f"neg{ftz}.{t}", t, t, z % "-a")
            op(f"abs{ftz}.{t}", t, t, z % f"__builtin_fabs{suffix}(a)")
            for name in ("min", "max"):
                op(f"{name}{ftz}.{t}", t, f"{t} {t}", z % f"f{name}_{t}(a, b)")
                op(f"{name}{ftz}.NaN.{t}", t, f"{t} {t}", z % f"f{name}_nan_{t}(a, b)")
                op(f"{name}.NaN{ftz}.{t}", t, f"{t} {t}", z % f"f{name}_nan_{t}(a, b)")
            for name, sym in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "==")):
                op(f"setp.{name}{ftz}.{t}", "p", f"{t} {t}", f"a {sym} b")
            op(f"setp.ne{ftz}.{t}", "p", f"{t} {t}", "a < b || a > b")
            op(f"setp.neu{ftz}.{t}", "p", f"{t} {t}", "a != b")
            op(f"setp.equ{ftz}.{t}", "p", f"{t} {t}", "!(a < b || a > b)")
            for name, sym in (("ltu", ">="), ("leu", ">"), ("gtu", "<="), ("geu", "<")):
                op(f"setp.{name}{ftz}.{t}", "p", f"{t} {t}", f"!(a {sym} b)")
            op(f"setp.num{ftz}.{t}", "p", f"{t} {t}", "a == a && b == b")
            op(f"setp.nan{ftz}.{t}", "p", f"{t} {t}", "a != a || b != b")
        op(f"selp.{t}", t, f"{t} {t} p", "c ? a : b")
        op(f"mov.{t}", t, t, "a")
    for ftz in ("", ".ftz"):
        z = "ftz(%s)" if ftz else "%s"
        a = "ftz(a)" if ftz else "a"
        op(f"ex2.approx{ftz}.f32", "f32", "f32", z % f"approx(exp2f({a}), a)")
        op(f"lg2.approx{ftz}.f32", "f32", "f32", z % f"approx(log2f({a}), a)")
        op(f"sin.approx{ftz}.f32", "f32", "f32", z % f"sinf({a})")
        op(f"cos.approx{ftz}.f32", "f32", "f32", z % f"cosf({a})")
        op(f"tanh.approx{ftz}.f32", "f32", "f32", z % f"tanhf({a})")
    op("rcp.approx.ftz.f64", "f64", "f64", "rcp64(a)")
    op("copysign.f32", "f32", "f32 f32", "__builtin_copysignf(b, a)")


def _conversions() -> None:
    for width in ("16", "32", "64"):
        for sign in "us":
            source = f"{sign}{width}"
            one = {"s16": "(int16_t)a", "u16": "a"}.get(source, "a")
            for to in ("u16", "s16", "u32", "s32", "u64", "s64"):
                op(f"cvt.{to}.{source}", to, source, f"({CTYPES[to]})({one})")
            for to in ("f32", "f64"):
                op(f"cvt.rn.{to}.{source}", to, source, f"({CTYPES[to]})({one})")
                op(f"cvt.{to}.{source}", to, source, f"({CTYPES[to]})({one})")
    for source in ("f32", "f64"):
        for to in ("s32", "u32", "s64", "u64"):
            for rounding, call in (
                ("rzi", "trunc"),
                ("rni", "rint"),
                ("rmi", "floor"),
                ("rpi", "ceil"),
            ):
                for ftz in ("", ".ftz"):
                    op(f"cvt.{rounding}{ftz}.{to}.{source}", to, source, f"to_{to}({call}(a))")
    for rounding, call in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
        op(f"cvt.{rounding}.f32.f32", "f32", "f32", f"{call}f(a)")
        op(f"cvt.{rounding}.f64.f64", "f64", "f64", f"{call}(a)")
    op("cvt.f64.f32", "f64", "f32", "(double)a")
    op("cvt.rn.f32.f64", "f32", "f64", "(float)a")
    op("cvt.f32.f16", "f32", "u16", "half_to_float(a)")
    op("cvt.f32.bf16", "f32", "u16", "bf16_to_float(a)")
    op("cvt.rn.f16.f32", "u16", "f32", "float_to_half(a)")
    op("cvt.rn.bf16.f32", "u16", "f32", "float_to_bf16(a)")
    # the first source goes to the upper half
    op("cvt.rn.f16x2.f32", "u32", "f32 f32", "(float_to_half(a) << 16) | float_to_half(b)")
    op("cvt.rn.bf16x2.f32", "u32", "f32 f32", "(float_to_bf16(a) << 16) | float_to_bf16(b)")
    op("cvt.rna.tf32.f32", "u32", "f32", "to_tf32(a)")


_integers()
_floats()
_conversions()
NAMES = list(ALU)
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def c_source() -> str:
    """A C function for each instruction, and the table of them."""
    out = ['#include "vm.h"']
    for number, name in enumerate(NAMES):
        dest, sources, expression = ALU[name]
        lines = []
        for letter, kind in zip("abcd", sources, strict=False):
            if kind == "p":
                lines.append(f"uint32_t m{letter} = P[i->{letter}];")
            else:
                lines.append(
                    f"const {CTYPES[kind]} *v{letter} = (const {CTYPES[kind]} *)(R + i->{letter});"
                )
        load = " ".join(
            f"uint32_t {letter} = (m{letter} >> l) & 1;"
            if kind == "p"
            else f"{CTYPES[kind]} {letter} = v{letter}[l];"
            for letter, kind in zip("abcd", sources, strict=False)
        )
        if dest == "p":
            lines.append(
                "uint32_t t = 0; for (int l = 0; l < 32; l++) "
                f"{{ {load} t |= (uint32_t)({expression}) << l; }} PUTP(i->out, t);"
            )
        else:
            clip = " & 0xffff" if dest in ("u16", "s16") else ""
            lines.append(
                f"{CTYPES[dest]} t[32]; for (int l = 0; l < 32; l++) "
                f"{{ {load} t[l] = ({CTYPES[dest]})({expression}){clip}; }} "
                f"PUT{'64' if dest[1:] == '64' else '32'}(i->out, t);"
            )
        out.append(
            f"static void op{number}(uint8_t *R, uint32_t *P, const Ins *i, uint32_t m) "
            f"{{ /* {name} */ {' '.join(lines)} }}"
        )
    table = ", ".join(f"op{number}" for number in range(len(NAMES)))
    out.append(f"const Alu alu_table[] = {{{table}}};")
    return "\n".join(out) + "\n"
