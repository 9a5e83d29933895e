"""Finds the answer in a model's reply: boxed text, a label, choices, numbers, items, intervals, JSON.

Everything that reads an answer (verifiers, recycling, judges) starts from `last_boxed`, so the text that a judge is
shown is the text that was scored. Every function here runs in time linear in the length of its text.
"""

from spark_vl.answers.boxed import compact, last_box, last_boxed, normalized, plain
from spark_vl.answers.choices import match_choice, match_choices, match_label
from spark_vl.answers.quantities import TOLERANCE, Quantity, agrees, parse_count, parse_quantity, same_unit
from spark_vl.answers.sequences import Interval, distinct, last_json_object, parse_intervals, parse_items, parse_json

__all__ = [
    "TOLERANCE",
    "Interval",
    "Quantity",
    "agrees",
    "compact",
    "distinct",
    "last_box",
    "last_boxed",
    "last_json_object",
    "match_choice",
    "match_choices",
    "match_label",
    "normalized",
    "parse_count",
    "parse_intervals",
    "parse_items",
    "parse_json",
    "parse_quantity",
    "plain",
    "same_unit",
]
