"""The `calculator` tool: exact arithmetic over a closed grammar, no evaluation of code.

Covered: integers, decimals and fractions with + - * / // % ** and parentheses; gcd, lcm, abs, min,
max, round, sqrt; count("letter", "text") (case-insensitive); solve(equation), linear in one unknown.
A bare equation is solved. Not covered: variables, assignments, anything else of Python. Sizes are
bounded, so no input takes long.
"""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from functools import reduce

from memory.errors import ToolError

MAX_CHARS = 2000
MAX_DIGITS = 2000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def calculate(expression: str) -> str:
    """The value of `expression` as text. ToolError, with what was wrong, when it has none."""
    text = expression.strip().replace("×", "*").replace("÷", "/").replace("−", "-").replace("^", "**")
    if not text:
        raise ToolError("empty expression")
    if len(text) > MAX_CHARS:
        raise ToolError(f"expression longer than {MAX_CHARS} characters")
    inner = re.fullmatch(r"solve\((.*)\)", text, re.DOTALL)
    if inner is not None:
        return _show(_solve(inner.group(1)))
    if _is_equation(text):
        return _show(_solve(text))
    return _show(_value(text))


def _is_equation(text: str) -> bool:
    _, eq, right = text.partition("=")
    return bool(eq) and "=" not in right and not set("\"'") & set(text)


def _value(text: str) -> Fraction:
    try:
        return _number(_evaluate(_tree(text)))
    except RecursionError as exc:
        raise ToolError("the expression is nested too deeply") from exc


def _tree(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                if not math.isfinite(node.value):
                    raise ToolError("a number is too large")
                # The decimal as it was written, not the nearest float.
                exact = Fraction(ast.get_source_segment(text, node) or "") if node.value else Fraction(0)
                node.value = exact  # pyright: ignore[reportAttributeAccessIssue]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise ToolError(f"cannot read the expression {text[:80]!r}") from exc
    return tree


def _evaluate(node: ast.expr) -> Fraction | str:
    match node:
        case ast.Constant(value=bool()):
            raise ToolError("true and false are not numbers")
        case ast.Constant(value=int() | Fraction() as value):
            return Fraction(value)
        case ast.Constant(value=str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_evaluate(operand))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _number(_evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, _number(_evaluate(left)), _number(_evaluate(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _call(name, [_evaluate(arg) for arg in args])
        case _:
            raise ToolError("only numbers, + - * / and the named functions are understood")


def _number(value: Fraction | str) -> Fraction:
    if isinstance(value, str):
        raise ToolError("a text stands where a number is needed")
    if abs(value.numerator).bit_length() + value.denominator.bit_length() > MAX_DIGITS * 4:
        raise ToolError("the result is too large")
    return value


def _binary(op: ast.operator, a: Fraction, b: Fraction) -> Fraction:
    if isinstance(op, ast.Div | ast.FloorDiv | ast.Mod) and b == 0:
        raise ToolError("division by zero")
    match op:
        case ast.Add():
            return _number(a + b)
        case ast.Sub():
            return _number(a - b)
        case ast.Mult():
            return _number(a * b)
        case ast.Div():
            return _number(a / b)
        case ast.FloorDiv():
            return Fraction(a // b)
        case ast.Mod():
            return a % b
        case ast.Pow():
            if b.denominator != 1 or abs(b) > 1000 or (a == 0 and b < 0):
                raise ToolError("only whole exponents up to 1000 are understood")
            if max(abs(a.numerator).bit_length(), a.denominator.bit_length()) * abs(b) > MAX_DIGITS * 4:
                raise ToolError("the result is too large")
            return a ** int(b)
        case _:
            raise ToolError("only + - * / // % and ** are understood")


def _integers(name: str, args: list[Fraction | str]) -> list[int]:
    numbers = [_number(a) for a in args]
    if not numbers or any(n.denominator != 1 for n in numbers):
        raise ToolError(f"{name} needs whole numbers")
    return [int(n) for n in numbers]


def _call(name: str, args: list[Fraction | str]) -> Fraction:
    name = name.lower()
    if name == "count":
        match args:
            case [str() as letter, str() as text] if letter:
                return Fraction(text.lower().count(letter.lower()))
        raise ToolError('count needs a letter and a text: count("a", "banana")')
    if name in ("gcd", "lcm"):
        step = math.gcd if name == "gcd" else math.lcm
        # One by one, so that a product that grows out of bounds is stopped on its way.
        return reduce(lambda a, b: _number(Fraction(step(int(a), b))), _integers(name, args), Fraction(step()))
    if name == "sqrt" and len(args) == 1:
        value = _number(args[0])
        if value < 0:
            raise ToolError("sqrt of a negative number")
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        return root if root * root == value else Fraction(str(math.sqrt(_float(value))))
    match name, [_number(a) for a in args]:
        case "abs", [value]:
            return abs(value)
        case "min" | "max", [first, *rest]:
            return (min if name == "min" else max)([first, *rest])
        case "round", [value]:
            return Fraction(round(value))
        case "round", [value, digits] if digits.denominator == 1 and abs(digits) <= 100:
            return Fraction(round(value, int(digits)))
    raise ToolError(f"unknown function {name!r}")


def _solve(equation: str) -> Fraction:
    """The root of a linear equation in one unknown, from its values at 0, 1 and 2, put in to make sure."""
    left, eq, right = equation.partition("=")
    if not eq or "=" in right:
        raise ToolError("solve needs one equation: solve(3*x + 4 = 10)")
    unknowns = {name for name in _IDENTIFIER.findall(equation) if name not in ("gcd", "lcm")}
    if len(unknowns) != 1:
        raise ToolError(f"solve needs exactly one unknown, got {sorted(unknowns)}")
    (unknown,) = unknowns

    def difference(x: int | Fraction) -> Fraction:
        filled = [re.sub(rf"(\d)\s*{unknown}\b", rf"\1*({x})", side) for side in (left, right)]
        filled = [re.sub(rf"\b{unknown}\b", f"({x})", side).strip() for side in filled]
        return _value(filled[0]) - _value(filled[1])

    at0, at1, at2 = difference(0), difference(1), difference(2)
    slope = at1 - at0
    if slope == 0 or at2 - at1 != slope or difference(root := _number(-at0 / slope)) != 0:
        raise ToolError("the equation is not linear in its unknown")
    return root


def _show(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return repr(_float(value))


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError as exc:
        raise ToolError("the result is too large") from exc
