"""`expression`: a filter written as a formula over the columns, e.g. `caption_words >= 3 and aspect < 2.5`.

The formula is parsed into a syntax tree, each node is looked up in a small table, and a polars expression is built from
it. Nothing is evaluated as Python: no calls, no attributes but `json.NAME`, no indexing.

    comparisons  < <= > >= == !=, in chains (`32 <= width < 512`); `in` and `not in` a list of constants
    logic        and or not, also written & | ~ (with the same, low, precedence: `width > 32 & height > 32` needs no
                 brackets)
    arithmetic   + - * / %, on numbers
    names        the columns of the metadata table; `json.NAME` is a field of the sample's own JSON
"""

import ast
import io
import operator
import tokenize
from collections.abc import Callable
from functools import reduce
from typing import Literal, NamedTuple

import polars as pl
from pydantic import Field, field_validator

from mmfoundry.data.columns import COLUMNS, JSON_PREFIX, UID_NUMBERS, column_named
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.pipeline.errors import ConfigError, UnknownColumn
from mmfoundry.pipeline.registry import unknown

MAX_CHARACTERS = 4000
MAX_DEPTH = 50

_WORDS = {"&": "and", "|": "or", "~": "not"}
_COMPARE: dict[type[ast.cmpop], Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}

Kind = Literal["number", "string", "boolean", "any"]


class _Value(NamedTuple):
    expression: pl.Expr
    kind: Kind


@FILTERS.register("expression")
class Expression(Filter):
    """A formula over the columns of the metadata table is true."""

    formula: str = Field(description="e.g. 'caption_words >= 3 and language == \"en\"'")

    @field_validator("formula")
    @classmethod
    def _parses(cls, formula: str) -> str:
        parse_expression(formula)
        return formula

    def expression(self) -> pl.Expr:
        """The formula as polars understands it."""
        return parse_expression(self.formula)


def parse_expression(formula: str) -> pl.Expr:
    """Turn a formula into a boolean polars expression.

    Raises:
        ConfigError: it does not parse, uses something that formulas do not have, or mixes types; the place is quoted.
        UnknownColumn: a name is not a column; the nearest one is named.
    """
    if len(formula) > MAX_CHARACTERS:
        raise ConfigError(f"the formula has {len(formula)} characters; {MAX_CHARACTERS} are allowed")
    text = _spell_out(formula)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        near = f" near {error.text.strip()[:40]!r}" if isinstance(error, SyntaxError) and error.text else ""
        raise ConfigError(
            f"{formula!r} is not a formula{near}; write e.g. caption_words >= 3 and aspect < 2"
        ) from error
    value = _build(tree.body, text, 0)
    if value.kind not in ("boolean", "any"):
        raise ConfigError(f"{formula!r} is a {value.kind}, not a condition; compare it with something")
    return _as(value, "boolean")


def _spell_out(formula: str) -> str:
    """Write & | ~ as and, or, not: in Python's grammar they bind tighter than comparisons, which nobody means here."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(f"({formula}\n)").readline))
    except (tokenize.TokenError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{formula!r} is not a formula: a bracket or quote is not closed") from error
    words = [_WORDS.get(token.string, token.string) if token.type == tokenize.OP else token.string for token in tokens]
    kinds = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    return " ".join(word for word, token in zip(words, tokens, strict=True) if token.type not in kinds)


def _build(node: ast.expr, text: str, depth: int) -> _Value:
    if depth > MAX_DEPTH:
        raise ConfigError(f"the formula is nested more than {MAX_DEPTH} deep")
    deeper = depth + 1
    match node:
        case ast.Constant(value=bool() as value):
            return _Value(pl.lit(value), "boolean")
        case ast.Constant(value=int() | float() as value):
            return _Value(pl.lit(_float(value), pl.Float64), "number")
        case ast.Constant(value=str() as value):
            return _Value(pl.lit(value), "string")
        case ast.Name(id=name):
            return _column(name)
        case ast.Attribute(value=ast.Name(id="json"), attr=field):
            return _Value(pl.col(JSON_PREFIX + field), "any")
        case ast.BoolOp(op=op, values=values):
            parts = [_expect(_build(one, text, deeper), "boolean", one, text) for one in values]
            return _Value(reduce(operator.and_ if isinstance(op, ast.And) else operator.or_, parts), "boolean")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _Value(~_expect(_build(operand, text, deeper), "boolean", operand, text), "boolean")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            number = _expect(_build(operand, text, deeper), "number", operand, text)
            return _Value(-number if isinstance(op, ast.USub) else number, "number")
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
            a, b = (_expect(_build(one, text, deeper), "number", one, text) for one in (left, right))
            # x / 0 and the like cannot be judged; left as NaN they would compare as larger than everything
            result = _ARITHMETIC[type(op)](a, b)
            return _Value(pl.when(result.is_finite()).then(result), "number")
        case ast.Compare():
            return _Value(_comparison(node, text, deeper), "boolean")
    raise ConfigError(f"{_quote(node, text)} is not something that a formula may have; see docs/filter.md")


def _comparison(node: ast.Compare, text: str, depth: int) -> pl.Expr:
    parts = []
    left = _build(node.left, text, depth)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            member = _member(left, right_node, text)
            if len(node.ops) > 1:
                raise ConfigError(f"{_quote(node, text)}: `in` stands alone, not in a chain of comparisons")
            return ~member if isinstance(op, ast.NotIn) else member
        right = _build(right_node, text, depth)
        if type(op) not in _COMPARE:
            raise ConfigError(f"{_quote(node, text)}: compare with < <= > >= == != or in")
        if left.kind != right.kind and "any" not in (left.kind, right.kind):
            raise ConfigError(f"{_quote(node, text)} compares a {left.kind} with a {right.kind}")
        kind = right.kind if left.kind == "any" else left.kind
        parts.append(_COMPARE[type(op)](_as(left, kind), _as(right, kind)))
        left = right
    return reduce(operator.and_, parts)


def _member(left: _Value, node: ast.expr, text: str) -> pl.Expr:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set) or not node.elts:
        raise ConfigError(f"{_quote(node, text)}: after `in` comes a list of constants, e.g. ['en', 'de']")
    values = [_build(one, text, MAX_DEPTH) for one in node.elts if isinstance(one, ast.Constant)]
    if len(values) != len(node.elts) or len({value.kind for value in values}) > 1:
        raise ConfigError(f"{_quote(node, text)}: the list after `in` holds constants of one type")
    if left.kind not in ("any", values[0].kind):
        raise ConfigError(f"{_quote(node, text)} holds {values[0].kind}s, not a {left.kind}")
    return reduce(operator.or_, (_as(left, values[0].kind) == value.expression for value in values))


def _column(name: str) -> _Value:
    column = column_named(name)
    if column is None:
        known = [one for one in COLUMNS if one not in UID_NUMBERS]
        raise UnknownColumn(f"{unknown('column', name, known)}; a field of the sample's JSON is json.{name}")
    if column.dtype.is_numeric():
        # as floats: the columns count without a sign, and polars has no -1 for those
        return _Value(pl.col(name).cast(pl.Float64), "number")
    if column.dtype == pl.String:
        return _Value(pl.col(name), "string")
    raise ConfigError(f"{name} is a {column.dtype} and cannot stand in a formula")


def _expect(value: _Value, kind: Kind, node: ast.expr, text: str) -> pl.Expr:
    if value.kind not in (kind, "any"):
        raise ConfigError(f"{_quote(node, text)} is a {value.kind} where a {kind} is needed")
    return _as(value, kind)


def _as(value: _Value, kind: Kind) -> pl.Expr:
    """A field of the JSON, which is kept as text, read as what the formula needs; null where it is not that."""
    if value.kind != "any" or kind in ("any", "string"):
        return value.expression
    if kind == "number":
        return value.expression.cast(pl.Float64, strict=False).fill_nan(None)
    return pl.when(value.expression.is_in(["true", "false"])).then(value.expression == "true")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf") if value > 0 else float("-inf")


def _quote(node: ast.expr, text: str) -> str:
    return repr(ast.get_source_segment(text, node) or text)
