"""Turns a parsed kernel into the bytecode of `vm.c`.

Registers, constants and special registers get places in a warp's register file: 128 bytes for 32
lanes of 32 bits (16-bit registers too), 256 bytes for 64 bits. Predicates are bit masks elsewhere.
"""

from __future__ import annotations

import re
import struct

import numpy as np

from tests.gpu_emulator import isa
from tests.gpu_emulator.bytecode import INS, OPS, SPECIAL, Program
from tests.gpu_emulator.ptx import SIZES, Address, Kernel, Statement, parse


class Unsupported(NotImplementedError):
    """An instruction that the emulator does not know."""


def number_bits(text: str, kind: str) -> int:
    """The bits of an immediate as a value of type `kind`."""
    width = int(kind[1:])
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = int(text[2:], 16)
        if sign < 0:
            bits ^= 1 << 31
        if kind == "f64":
            bits = int.from_bytes(
                struct.pack("<d", struct.unpack("<f", bits.to_bytes(4, "little"))[0]), "little"
            )
        return bits
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        bits = int(text[2:], 16)
        return bits ^ (1 << 63) if sign < 0 else bits
    return sign * int(text.rstrip("U"), 0) & ((1 << width) - 1)


class Assembler:
    """Translates statement after statement."""

    def __init__(self, kernel: Kernel, shared_base: int):
        self.kernel, self.size, self.lists = kernel, 0, []
        self.places: dict[str, int] = {}
        self.wide: dict[str, bool] = {}
        self.predicate: dict[str, int] = {}
        self.constants: dict[tuple[int, bool], int] = {}
        self.rows: list[dict] = []
        self.shared_base, self.static = shared_base, {}
        at = 0
        for name, size in kernel.shared.items():
            self.static[name] = shared_base + at
            at += -(-size // 128) * 128
        for name, kind in kernel.registers.items():
            if kind == "pred":
                self.predicate[name] = len(self.predicate)
            else:
                self.wide[name] = SIZES[kind] == 8
                self.places[name] = self.room(self.wide[name])
        for name in SPECIAL:
            self.places[name], self.wide[name] = self.room(False), False
        self.params, offset = {}, 0
        for name, size, align in kernel.params:
            offset = -(-offset // align) * align
            self.params[name] = offset
            offset += size
        self.param_bytes = offset
        for index, statement in enumerate(kernel.statements):
            try:
                self.assemble(statement)
            except (Unsupported, KeyError, IndexError, TypeError, ValueError) as error:
                raise Unsupported(f"{statement.text}: {error!r}") from error
            assert len(self.rows) == index + 1, statement.text

    def room(self, wide: bool) -> int:
        place = self.size
        self.size += 256 if wide else 128
        return place

    def constant(self, bits: int, wide: bool) -> int:
        key = (bits, wide)
        if key not in self.constants:
            self.constants[key] = self.room(wide)
        return self.constants[key]

    def source(self, operand, kind: str) -> int:
        """The place of a source of type `kind` (s32, f64, ..., p)."""
        if kind == "p":
            if operand in self.predicate:
                return self.predicate[operand]
            raise Unsupported(f"predicate {operand}")
        if operand in self.places:
            return self.places[operand]
        if operand in self.static:
            return self.constant(self.static[operand], kind[1:] == "64")
        if operand in self.params:
            return self.constant(self.params[operand], kind[1:] == "64")
        return self.constant(number_bits(operand, kind), kind[1:] == "64")

    def values(self, operands, kind: str) -> list[int]:
        """Places with bit 0 set where the register has 64 bits; -1 for ``_``."""
        found = []
        for operand in operands if isinstance(operands, list) else [operands]:
            if operand == "_":
                found.append(-1)
            elif operand in self.places:
                found.append(self.places[operand] | self.wide[operand])
            else:
                wide = kind[1:] == "64"
                found.append(self.constant(number_bits(operand, kind), wide) | wide)
        return found

    def address(self, address: Address, wide: bool) -> tuple[int, int]:
        if address.base in self.places:
            return self.places[address.base], address.offset
        if address.base in self.static:
            return self.constant(self.static[address.base], wide), address.offset
        return self.constant(
            number_bits(address.base, "u64" if wide else "u32"), wide
        ), address.offset

    def emit(self, statement: Statement, op: int, items=(), **fields) -> None:
        row = dict.fromkeys(INS.names, 0) | {"out": -1, "a": -1, "b": -1, "c": -1, "d": -1}
        row |= {"op": op, "list": len(self.lists), "count": len(items), "line": statement.line[1]}
        self.lists.extend(items)
        if statement.guard is not None:
            row["guard"] = self.predicate[statement.guard] + 1
            if statement.negated:
                row["guard"] = -row["guard"]
        row |= fields
        self.rows.append(row)

    def assemble(self, s: Statement) -> None:
        opcode, operands = s.opcode, s.operands
        parts = opcode.split(".")
        if opcode.startswith("mov.") and any(isinstance(x, list) for x in operands):
            return self.pack(s)
        if opcode == "mov.pred" and operands[1] not in self.predicate:
            value = number_bits(operands[1], "u32") != 0
            name = f"setp.{'eq' if value else 'ne'}.u32"  # 0 == 0, or 0 != 0
            zero = self.constant(0, False)
            return self.emit(s, isa.NUMBERS[name], out=self.predicate[operands[0]], a=zero, b=zero)
        if opcode in isa.ALU:
            return self.arithmetic(s, opcode)
        if parts[0] == "setp" and parts[2] in ("and", "or", "xor"):
            raise Unsupported("setp with a combination")
        handler = getattr(self, f"do_{parts[0]}", None)
        if handler is None:
            raise Unsupported(opcode)
        handler(s, parts)

    def arithmetic(self, s: Statement, opcode: str) -> None:
        dest, sources, _ = isa.ALU[opcode]
        if len(s.operands) != 1 + len(sources):
            raise Unsupported(f"{len(s.operands)} operands")
        places = {
            letter: self.source(operand, kind)
            for letter, operand, kind in zip("abcd", s.operands[1:], sources, strict=False)
        }
        out = self.predicate[s.operands[0]] if dest == "p" else self.places[s.operands[0]]
        if dest != "p" and self.wide[s.operands[0]] != (dest[1:] == "64"):
            raise Unsupported("a register of another width")
        for x, kind in zip(s.operands[1:], sources, strict=True):
            if kind != "p" and x in self.wide and self.wide[x] != (kind[1:] == "64"):
                raise Unsupported("a register of another width")
        self.emit(s, isa.NUMBERS[opcode], out=out, **places)

    def pack(self, s: Statement) -> None:
        to, source = s.operands
        width = SIZES[s.opcode.split(".")[1]]
        if isinstance(to, list):
            size = width // len(to)
            self.emit(s, OPS["UNPACK"], self.values(to, f"u{8 * size}"), size=size,
                      a=self.source(source, f"u{8 * width}"), flags=int(width == 8))  # fmt: skip
        else:
            size = width // len(source)
            self.emit(s, OPS["PACK"], self.values(source, f"u{8 * size}"), size=size,
                      out=self.places[to], flags=int(width == 8))  # fmt: skip

    def do_bra(self, s, parts):
        self.emit(s, OPS["BRA"], imm=self.kernel.labels[s.operands[0]])

    def do_brx(self, s, parts):
        """A branch to the label that a table has at an index."""
        index, table = s.operands
        targets = [self.kernel.labels[name] for name in self.kernel.tables[table]]
        self.emit(s, OPS["BRX"], targets, a=self.source(index, "u32"))

    def do_ret(self, s, parts):
        self.emit(s, OPS["RET"])

    do_exit = do_ret

    def do_cvta(self, s, parts):
        """Generic addresses: those of parameters are moved to the host's copy at each launch."""
        if parts[1:3] == ["param", "u64"]:
            if "%param_base" not in self.places:
                self.places["%param_base"], self.wide["%param_base"] = self.room(True), True
            source, base = self.source(s.operands[1], "u64"), self.places["%param_base"]
            out = self.places[s.operands[0]]
            return self.emit(s, isa.NUMBERS["add.u64"], out=out, a=source, b=base)
        if "global" in parts:
            return self.emit(s, isa.NUMBERS["mov.u64"], out=self.places[s.operands[0]],
                             a=self.source(s.operands[1], "u64"))  # fmt: skip
        raise Unsupported(s.opcode)

    def memory(self, s, parts):
        kind = parts[-1]
        space = next(
            (p.split("::")[0] for p in parts if p.split("::")[0] in ("param", "global", "shared")),
            None,
        )
        if space is None:
            raise Unsupported(s.opcode)
        return kind, space

    def do_ld(self, s, parts):
        kind, space = self.memory(s, parts)
        to, address = s.operands[:2]
        fields = {"size": SIZES[kind], "flags": int(kind[0] == "s")}
        values = self.values(to, f"u{8 * SIZES[kind]}")
        if space == "param":
            return self.emit(
                s, OPS["LD_PARAM"], values, imm=self.params[address.base] + address.offset, **fields
            )
        a, offset = self.address(address, space == "global")
        self.emit(s, OPS[f"LD_{space.upper()}"], values, a=a, imm=offset, **fields)

    def do_st(self, s, parts):
        kind, space = self.memory(s, parts)
        address, source = s.operands[:2]
        a, offset = self.address(address, space == "global")
        self.emit(s, OPS[f"ST_{space.upper()}"], self.values(source, f"u{8 * SIZES[kind]}"),
                  size=SIZES[kind], a=a, imm=offset)  # fmt: skip

    def do_cp(self, s, parts):
        if parts[1:3] == ["async", "commit_group"]:
            return self.emit(s, OPS["CP_COMMIT"])
        if parts[1:3] == ["async", "wait_group"]:
            return self.emit(s, OPS["CP_WAIT"], imm=int(s.operands[0], 0))
        if parts[1:3] == ["async", "wait_all"]:
            return self.emit(s, OPS["CP_WAIT"], imm=-1)
        if parts[1:4] == ["async", "bulk", "commit_group"]:
            return self.emit(s, OPS["BULK_COMMIT"])
        if parts[1:4] == ["async", "bulk", "wait_group"]:
            return self.emit(s, OPS["BULK_WAIT"], imm=int(s.operands[0], 0))
        if parts[1:4] == ["async", "bulk", "tensor"]:
            if parts[5:7] == ["global", "shared::cta"]:
                to, source = s.operands
                if to.offset or source.offset or parts[7:] != ["bulk_group"]:
                    raise Unsupported(s.opcode)
                return self.emit(s, OPS["TMA_STORE"], self.values(to.coordinates, "s32"),
                                 a=self.address(source, False)[0],
                                 b=self.address(to, True)[0])  # fmt: skip
            to, source, bar = s.operands[:3]
            if (
                "multicast::cluster" in parts
                or parts[5].split("::")[0] != "shared"
                or parts[6] != "global"
                or to.offset
                or bar.offset
                or source.offset
            ):
                raise Unsupported(s.opcode)
            return self.emit(s, OPS["TMA_LOAD"], self.values(source.coordinates, "s32"),
                             a=self.address(to, False)[0], b=self.address(source, True)[0],
                             c=self.address(bar, False)[0])  # fmt: skip
        if parts[1:2] == ["async"] and parts[2] in ("ca", "cg"):
            to, source, size, *rest = s.operands
            a, offset = self.address(to, False)
            b, source_offset = self.address(source, True)
            srcsize = self.source(rest[0], "u32") if rest else -1
            return self.emit(s, OPS["CP_ASYNC"], a=a, b=b, c=srcsize, imm=offset,
                             size=int(size, 0), flags=source_offset)  # fmt: skip
        raise Unsupported(s.opcode)

    def do_fence(self, s, parts):
        self.emit(s, OPS["FENCE_PROXY" if parts[1:3] == ["proxy", "async"] else "NOP"])

    def do_membar(self, s, parts):
        self.emit(s, OPS["NOP"])

    do_griddepcontrol = do_membar

    def do_setmaxnreg(self, s, parts):
        count = int(s.operands[0], 0)
        self.emit(s, OPS["SETMAXNREG"], imm=count, flags=int(parts[1] == "inc"))

    def do_bar(self, s, parts):
        if parts[1] == "warp":
            return self.emit(s, OPS["WARP_SYNC"])
        if parts[1] != "sync":
            raise Unsupported(s.opcode)
        identity, *count = (int(x, 0) for x in s.operands)
        self.emit(s, OPS["BAR"], imm=identity | (count[0] << 4 if count else 0))

    do_barrier = do_bar

    def do_shfl(self, s, parts):
        to, a, b, c, _mask = s.operands
        flags = {"bfly": 0, "idx": 1, "up": 2, "down": 3}[parts[2]]
        both = to[1:] if isinstance(to, list) else [to]
        self.emit(s, OPS["SHFL"], out=self.places[both[0]], a=self.source(a, "u32"),
                  b=self.source(b, "u32"), c=self.source(c, "u32"), flags=flags,
                  d=self.predicate[both[1]] if len(both) > 1 else -1)  # fmt: skip

    def do_redux(self, s, parts):
        kinds = ["max.s32", "min.s32", "max.u32", "min.u32", "add", "and", "or", "xor"]
        name = ".".join(parts[2:])
        flags = kinds.index(name) if name in kinds else kinds.index(parts[2])
        self.emit(s, OPS["REDUX"], out=self.places[s.operands[0]],
                  a=self.source(s.operands[1], "u32"), flags=flags)  # fmt: skip

    def do_vote(self, s, parts):
        flags = {"ballot": 0, "any": 1, "all": 2}[parts[2]]
        source = s.operands[1]
        out = self.places[s.operands[0]] if flags == 0 else self.predicate[s.operands[0]]
        self.emit(s, OPS["VOTE"], out=out, a=self.predicate[source.lstrip("!")],
                  b=int(source.startswith("!")), flags=flags)  # fmt: skip

    def do_elect(self, s, parts):
        _, number, predicate = s.operands[0]
        out = -1 if number == "_" else self.places[number]
        self.emit(s, OPS["ELECT"], out=out, d=self.predicate[predicate])

    def do_ldmatrix(self, s, parts):
        a, offset = self.address(s.operands[1], False)
        self.emit(s, OPS["LDMATRIX"], self.values(s.operands[0], "u32"), a=a, imm=offset,
                  flags=int("trans" in parts))  # fmt: skip

    def do_stmatrix(self, s, parts):
        a, offset = self.address(s.operands[0], False)
        self.emit(s, OPS["STMATRIX"], self.values(s.operands[1], "u32"), a=a, imm=offset,
                  flags=int("trans" in parts))  # fmt: skip

    def do_mma(self, s, parts):
        shape, kinds = parts[3], parts[6:10]
        known = {("m16n8k16", "bf16"): 0, ("m16n8k16", "f16"): 1, ("m16n8k8", "tf32"): 2}
        if kinds[0] != "f32" or parts[4:6] != ["row", "col"] or (shape, kinds[1]) not in known:
            raise Unsupported(s.opcode)
        items = [x for group in s.operands for x in self.values(group, "u32")]
        if len(items) != 14:
            raise Unsupported(s.opcode)
        self.emit(s, OPS["MMA"], items, flags=known[shape, kinds[1]])

    def do_wgmma(self, s, parts):
        if parts[1] == "fence":
            return self.emit(s, OPS["WGMMA_FENCE"])
        if parts[1] == "commit_group":
            return self.emit(s, OPS["WGMMA_COMMIT"])
        if parts[1] == "wait_group":
            return self.emit(s, OPS["WGMMA_WAIT"], imm=int(s.operands[0], 0))
        tf32 = parts[6] == "tf32"
        found = re.match(rf"m64n(\d+)k{8 if tf32 else 16}$", parts[4])
        if not found or parts[5] != "f32" or parts[6] not in ("bf16", "f16", "tf32"):
            raise Unsupported(s.opcode)
        sums, a, b, scale, *rest = s.operands
        registers = isinstance(a, list)
        flags = int(parts[6] == "f16") | registers << 1 | tf32 << 4
        rest = [int(x, 0) for x in rest]
        if rest[:2] != [1, 1]:
            raise Unsupported("negated operands")
        if registers:
            flags |= 0 if tf32 else rest[2] << 3
        elif not tf32:  # always K-major
            flags |= rest[2] << 2 | rest[3] << 3
        items = self.values(sums, "u32") + (self.values(a, "u32") if registers else [])
        if len(items) != int(found[1]) // 2 + 4 * registers:
            raise Unsupported("number of registers")
        predicate = self.predicate.get(scale)
        self.emit(s, OPS["WGMMA"], items, size=int(found[1]), flags=flags,
                  a=-1 if registers else self.source(a, "u64"), b=self.source(b, "u64"),
                  c=-1 if predicate is None else predicate,
                  imm=-1 if predicate is not None else int(int(scale, 0) != 0))  # fmt: skip

    def do_mbarrier(self, s, parts):
        bar = next(x for x in s.operands if isinstance(x, Address))
        a, offset = self.address(bar, False)
        last = s.operands[-1]
        if parts[1] == "init":
            return self.emit(s, OPS["MBAR_INIT"], a=a, imm=offset, b=self.source(last, "u32"))
        if parts[1] == "inval":
            return self.emit(s, OPS["MBAR_INVAL"], a=a, imm=offset)
        if parts[1] == "arrive":
            expect = "expect_tx" in parts
            if not expect and last is not bar:
                raise Unsupported("mbarrier.arrive with a count")
            b = self.source(last, "u32") if expect else -1
            return self.emit(s, OPS["MBAR_ARRIVE"], a=a, imm=offset, b=b)
        if parts[1] in ("try_wait", "test_wait") and parts[2] == "parity":
            return self.emit(s, OPS["MBAR_TRY"], out=self.predicate[s.operands[0]], a=a, imm=offset,
                             b=self.source(s.operands[2], "u32"))  # fmt: skip
        raise Unsupported(s.opcode)


def assemble(text: str, shared_base: int) -> Program:
    """From PTX text to a program."""
    kernel = parse(text)
    made = Assembler(kernel, shared_base)
    code = np.zeros(len(made.rows), INS)
    for name in INS.names:
        code[name] = [row[name] for row in made.rows]
    image = np.zeros(max(made.size, 256), np.uint8)
    for (bits, wide), place in made.constants.items():
        lanes = np.full(32, bits, np.uint64 if wide else np.uint32)
        image[place : place + lanes.nbytes] = lanes.view(np.uint8)
    special = np.array([made.places[name] for name in SPECIAL], np.int32)
    return Program(
        kernel, code, np.array(made.lists or [0], np.int32), image, special,
        len(made.predicate), made.params, made.param_bytes, kernel.statements,
        np.zeros(len(code), np.uint8), made.places.get("%param_base"),
    )  # fmt: skip
