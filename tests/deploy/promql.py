"""Reads PromQL far enough to say which metrics and labels an expression names."""

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(r"""
    (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
  | (?P<variable>\$\{?\w+\}?)
  | (?P<range>\[[^\]]*\])
  | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?[a-z]*)
  | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
  | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>@])
  | (?P<space>\s+|\#[^\n]*)
""", re.VERBOSE)

_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass
class Named:
    """What an expression names. A matcher is (label, operator, value)."""
    selectors: list = field(default_factory=list)  # (metric, [matcher...])
    grouping: set = field(default_factory=set)  # labels of by(), without(), on(), ...


def _tokens(text):
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"PromQL: cannot read {text[at:at + 20]!r} of {text!r}")
        at = match.end()
        if match.lastgroup != "space":
            yield match.lastgroup, match.group()


def parse(expression):
    tokens = list(_tokens(expression)) + [("end", "")]
    named, i = Named(), 0
    while tokens[i][0] != "end":
        kind, text = tokens[i]
        following = tokens[i + 1][1]
        i += 1
        if kind != "name" or text.lower() in _WORDS:
            continue
        if text in _GROUPING:
            if following == "(":
                i += 1
                while tokens[i][1] != ")":
                    if tokens[i][0] == "name":
                        named.grouping.add(tokens[i][1])
                    i += 1
            continue
        if following == "(" or following in _GROUPING:
            continue  # a function or an aggregation
        matchers = []
        if following == "{":
            i += 1
            while tokens[i][1] != "}":
                if tokens[i][0] == "name":
                    matchers.append((tokens[i][1], tokens[i + 1][1], tokens[i + 2][1][1:-1]))
                    i += 2
                i += 1
        named.selectors.append((text, matchers))
    return named


_SAMPLE = re.compile(r'^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? \S+')
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')


def read_exposition(text):
    """{metric: [labels...]} of a /metrics answer, bucket, sum and count apart."""
    samples = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match and not line.startswith("#"):
            samples.setdefault(match.group(1), []).append(dict(_LABEL.findall(match.group(2) or "")))
    return samples
