"""What each kind of answer accepts, a row a rule. Rules that `test_verifiers.py` has are not repeated here."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_vl.records import BadRecordError, PromptRecord
from spark_vl.verifiers import get_verifier, verify
from spark_vl.verifiers.pool import INLINE
from spark_vl.verifiers.text import edit_distance, similarity
from tests.golds import check_gold

RIGHT, WRONG, UNPARSABLE = (1.0, "ok"), (0.0, "ok"), (0.0, "unparsable")
COLORS = ("red", "blue", "green and white", "0.5")

CHOICE = [  # gold, content of the box, expected, rule
    ("A, C", "A, C", RIGHT, "the same"),
    ("A, C", "C,A", RIGHT, "any order"),
    ("A, C", "AC", RIGHT, "run together"),
    ("A, C", "A and C", RIGHT, "in words"),
    ("A, C", "A;C", RIGHT, "semicolon"),
    ("A, C", "A, and C", RIGHT, "comma and word"),
    ("A, C", "(A) & (C)", RIGHT, "ampersand"),
    ("A, C", "(A), (C)", RIGHT, "parentheses"),
    ("A, C", r"\text{Options A and C}.", RIGHT, "styled"),
    ("A, C", "Both A and C", RIGHT, "both"),
    ("A, C", "red, green and white", RIGHT, "texts of the options"),
    ("A, C", "A. red; C. green and white", RIGHT, "letters and texts"),
    ("A, D", "red, 1/2", RIGHT, "the value of an option"),
    ("A, C", "A, A, C", RIGHT, "a set"),
    ("AC", "A, C", RIGHT, "the gold run together"),
    ("A; C", "AC", RIGHT, "the gold with a semicolon"),
    ("A, C", "A", WRONG, "a part"),
    ("A, C", "A, B, C", WRONG, "too many"),
    ("A, C", "A, B, C, D", WRONG, "all of them"),
    ("A, C", "B, D", WRONG, "others"),
    ("A, C", "A or C", UNPARSABLE, "a hedge"),
    ("A, C", "A, E", UNPARSABLE, "no such option"),
    ("A, C", "A, perhaps C", UNPARSABLE, "a hedge"),
    ("A", "A or B", UNPARSABLE, "the gold is one letter"),
    ("A", "A, B", UNPARSABLE, "the gold is one letter"),
    ("A", "AB", UNPARSABLE, "the gold is one letter"),
    ("D", r"\frac{1}{2}", RIGHT, "the value of an option"),
]

MONEY = ("5 cents", "€5", "£5", "5 cm")
NUMBER = [  # settings, then as above
    ({}, "0", "none", RIGHT, "none"),
    ({}, "20", r"\text{Twenty}.", RIGHT, "words up to twenty"),
    ({}, "twelve", "12", RIGHT, "a gold in words"),
    ({}, "21", "twenty-one", UNPARSABLE, "words above twenty"),
    ({}, "5 cm", "5", RIGHT, "unit left out"),
    ({}, "5", "5 cm", RIGHT, "unit added"),
    ({}, "5 cm", "5 centimeters", RIGHT, "unit spelt out"),
    ({}, "5 cm^2", r"5\ \text{square centimetres}", RIGHT, "unit spelt out"),
    ({}, "60 mph", "60 miles per hour", RIGHT, "unit spelt out"),
    ({}, "9.8 m/s^2", r"9.8\,\mathrm{m/s}^{2}", RIGHT, "unit of units"),
    ({}, "5 cm", "5 m", WRONG, "another unit"),
    ({}, "5 cm", "5 cm^2", WRONG, "another unit"),
    ({}, "1 m", "100 cm", WRONG, "units are not converted"),
    ({}, "5 €", "£5", WRONG, "another currency"),
    ({}, "5 dollars", r"\$5", RIGHT, "dollars"),
    ({}, "21 °C", r"21^\circ", RIGHT, "degrees of any kind"),
    ({}, "21 °C", "21 °F", WRONG, "other degrees"),
    ({}, "50 cm", "50%", WRONG, "a percent sign is a unit"),
    *[({}, gold, answer, WRONG, "another currency or unit") for gold in ("$5", "5 dollars") for answer in MONEY],
    ({}, "$50", "50 cents", WRONG, "cents are no dollars"),
    ({}, "$5", "5", RIGHT, "currency left out"),
    ({}, "$5", r"\$5.00", RIGHT, "currency"),
    ({}, "$5", "US$5", RIGHT, "currency"),
    ({}, "$5", "5 USD", RIGHT, "currency"),
    ({}, "5", "$5", RIGHT, "currency added"),
    ({}, "5 cm", "$5$", RIGHT, "dollar signs of math mode"),
    ({}, "5 cm", "$5", WRONG, "money is no length"),
    ({}, "5 pounds", "£5", RIGHT, "pounds of money"),
    ({}, "5 pounds", "5 lb", RIGHT, "pounds of weight"),
    ({}, "5 lb", "£5", WRONG, "weight is no money"),
    ({}, "14", r"14 \text{ people}", RIGHT, "a noun"),
    ({}, "14 people", "14", RIGHT, "a noun left out"),
    ({}, "14 people", "15 people", WRONG, "another number"),
    ({}, "14 cm", "14 people", WRONG, "a noun is no unit of length"),
    ({}, "5 PM", "5 AM", WRONG, "another half of the day"),
    ({}, "12", "12 years old", RIGHT, "a unit and a noun"),
    ({}, "12 months", "12 years old", WRONG, "another unit"),
    ({}, "12", "x = 12", RIGHT, "the value of a variable"),
    ({}, "12", "x = 13", WRONG, "the value of a variable"),
    ({}, "12", r"\approx 12", RIGHT, "about"),
    ({}, "12", r"\approx 12.5", WRONG, "about"),
    ({}, "1.5", r"1\frac{1}{2}", RIGHT, "a mixed number"),
    ({}, "1.5", "1 1/2", RIGHT, "a mixed number"),
    ({}, "5.5", "1 1/2", WRONG, "a mixed number"),
    ({}, "-0.75", r"\frac{-3}{4}", RIGHT, "a sign within a fraction"),
    ({}, "0.75", r"\frac{-3}{4}", WRONG, "a sign within a fraction"),
    ({}, "0.001", "10^{-3}", RIGHT, "a power of ten"),
    ({}, "1000", "10^{-3}", WRONG, "a power of ten"),
    ({}, "1234", "1 234", RIGHT, "thousands separator"),
    ({}, "234", "1 234", WRONG, "thousands separator"),
    ({}, "5 m", "5 Meters", RIGHT, "a unit in capitals"),
    ({}, "5 cm", "5 Meters", WRONG, "a unit in capitals"),
    ({}, "5 mW", "5 MW", WRONG, "case of a symbol"),
    ({}, "12 Ω", r"12 \Omega", RIGHT, "ohms"),
    ({}, "12 kΩ", r"12 \Omega", WRONG, "ohms"),
    ({}, "21 °C", r"21^\circ\text{C}", RIGHT, "degrees in LaTeX"),
    ({}, "21 °F", r"21^\circ\text{C}", WRONG, "degrees in LaTeX"),
    ({}, "5", "5 or more", UNPARSABLE, "a hedge"),
    ({}, "5", "about 5 of 7", UNPARSABLE, "two numbers"),
    ({}, "5", "5 of 10", UNPARSABLE, "two numbers"),
    ({}, "5", "5 of ten", UNPARSABLE, "two numbers"),
    ({}, "5", "5 million people", UNPARSABLE, "a scale"),
    ({}, "3", "3 quarters", UNPARSABLE, "a part"),
    ({}, "5 units", "5 m", RIGHT, "units are no unit"),
    ({}, "50%", "50 percent", RIGHT, "spelt out"),
    ({"relative": 0.05}, "100", "105", RIGHT, "5% above, inclusive"),
    ({"relative": 0.05}, "1.1", "1.155", RIGHT, "5% above, though not in binary"),
    ({"relative": 0.05}, "100", "95", RIGHT, "5% below, inclusive"),
    ({"relative": 0.05}, "100", "105.2", WRONG, "5% of the gold, not of the answer"),
    ({"relative": 0.05}, "-100", "-104", RIGHT, "negative"),
    ({"relative": 0.05}, "-100", "100", WRONG, "sign"),
    ({"relative": 0.05}, "0", "0.01", WRONG, "nothing is near 0, relatively"),
    ({"relative": 0}, "5", "5.0000001", WRONG, "exact"),
    ({"absolute": 0.5}, "0", "-0.5", RIGHT, "absolute, inclusive"),
    ({"absolute": 0.5}, "0", "0.6", WRONG, "absolute"),
    ({"absolute": 0.01, "relative": 0}, "3.14", "3.15", RIGHT, "absolute"),
    ({"absolute": 0.5, "relative": 0.1}, "100", "109", RIGHT, "either tolerance"),
    ({"percent": "fraction"}, "0.5", "50%", RIGHT, "a percentage is a fraction"),
    ({"percent": "fraction"}, "0.5", "0.5", RIGHT, "a fraction"),
    ({"percent": "fraction"}, "0.5", "50", WRONG, "the gold has no sign"),
    ({"percent": "fraction"}, "50", "50%", WRONG, "the gold has no sign"),
    ({"percent": "fraction"}, "50%", "0.5", RIGHT, "the gold has a sign"),
    ({"percent": "fraction"}, "50%", "50", RIGHT, "the sign left out"),
    ({"percent": "fraction"}, "50%", r"50\%", RIGHT, "the same"),
    ({"percent": "fraction"}, "50%", "0.5%", WRONG, "another percentage"),
    ({"percent": "fraction"}, "50%", "5", WRONG, "another number"),
    ({"percent": "fraction", "relative": 0.05}, "50%", "0.52", RIGHT, "with a tolerance"),
]

COUNT = [
    ("5", "5", RIGHT, "the same"),
    ("5", "five", RIGHT, "a word"),
    ("0", "None", RIGHT, "none"),
    ("0", "zero", RIGHT, "zero"),
    ("20", r"\text{twenty}", RIGHT, "twenty"),
    ("twenty", "20", RIGHT, "a gold in words"),
    ("1", "one", RIGHT, "one"),
    ("1", "a", UNPARSABLE, "an article is no count"),
    ("0", "no", UNPARSABLE, "a negation is no count"),
    ("5", "6", WRONG, "another"),
    ("1000000", "1000001", WRONG, "exact"),
    ("5", "5.0", RIGHT, "no fraction"),
    ("5.0", "5", RIGHT, "a gold from a column of floats"),
    ("5", "5.5", UNPARSABLE, "a fraction"),
    ("5", "10/2", UNPARSABLE, "a quotient"),
    ("5", "about 5", UNPARSABLE, "a hedge"),
    ("5", "5 or 6", UNPARSABLE, "a hedge"),
    ("5", "5-6", UNPARSABLE, "a range"),
    ("5", "5+", UNPARSABLE, "at least"),
    ("5", "5 dogs", UNPARSABLE, "a noun"),
    ("5", "-5", UNPARSABLE, "negative"),
    ("5", "5%", UNPARSABLE, "a unit"),
    ("1234", "1,234", RIGHT, "thousands separator"),
    ("1234", "1{,}234", RIGHT, "thousands separator"),
    ("5", "**5**.", RIGHT, "Markdown"),
    ("5", "5" * 5000, UNPARSABLE, "longer than any count"),
    ("5", ".5", UNPARSABLE, "a fraction"),
    ("5", "$5$", RIGHT, "dollar signs of math mode"),
    ("5", "$5", UNPARSABLE, "money"),
    ("5", "(5)", RIGHT, "parentheses"),
    ("5", "5'", UNPARSABLE, "a prime"),
]

VARIANTS = '["New York", "NYC"]'
TEXT = [  # settings, gold, box, expected, rule
    ({}, "New York", "new  york.", RIGHT, "case, white space, period"),
    ({}, "New York", r"\text{New York}", RIGHT, "styled"),
    ({}, "New York", '"New York"', RIGHT, "quotes"),
    ({}, "New York", "York", WRONG, "a part"),
    ({}, "New York", "New York or Boston", WRONG, "a hedge"),
    ({}, "Straße", "STRASSE", RIGHT, "full case folding"),
    ({}, "5", "5.0", WRONG, "no numbers"),
    ({}, "New York", "****", UNPARSABLE, "nothing but marks"),
    ({}, "New York", "...", UNPARSABLE, "nothing but marks"),
    ({}, "$.5", "$.5", RIGHT, "a dollar sign and a point at the start"),
    ({}, "$.5", "5", WRONG, "a dollar sign and a point at the start"),
    ({}, "B'", "B'", RIGHT, "a prime"),
    ({}, "B'", "B", WRONG, "a prime"),
    ({}, "5'", '5"', WRONG, "feet and inches"),
    ({}, "A*", "A*", RIGHT, "an asterisk"),
    ({}, "A*", "A", WRONG, "an asterisk"),
    ({}, "user_", "user", WRONG, "an underscore"),
    ({}, "50%", r"50\%", RIGHT, "LaTeX escapes"),
    ({}, "50%", r"50\$", WRONG, "LaTeX escapes"),
    ({}, "R&D", r"\text{R\&D}", RIGHT, "LaTeX escapes"),
    ({}, "user_name", r"user\_name", RIGHT, "LaTeX escapes"),
    ({}, "it's", "it’s", RIGHT, "curly quotes"),
    ({}, "New York", "“New York”", RIGHT, "curly quotes"),
    ({}, "café", "cafe\u0301", RIGHT, "composed accents"),
    ({}, "café", "cafe", WRONG, "no accent"),
    ({"mode": "exact"}, "R&D", r"R\&D", RIGHT, "LaTeX escapes"),
    ({}, VARIANTS, "NYC", RIGHT, "a variant"),
    ({}, VARIANTS, "new york", RIGHT, "a variant"),
    ({}, VARIANTS, "Boston", WRONG, "no variant"),
    ({}, VARIANTS, "New York, NYC", WRONG, "two variants at once"),
    ({}, "[sic] x", "[sic] x", RIGHT, "a text that starts with a bracket"),
    ({}, "[1, 2]", "[1, 2]", RIGHT, "a list of something else is a text"),
    ({"mode": "exact"}, "NaCl", "NaCl", RIGHT, "the same"),
    ({"mode": "exact"}, "NaCl", r"$\mathrm{NaCl}$", RIGHT, "styled"),
    ({"mode": "exact"}, "NaCl", "NACL", WRONG, "case"),
    ({"mode": "exact"}, VARIANTS, "nyc", WRONG, "case of a variant"),
    ({"mode": "anls"}, "hello", "Hello", RIGHT, "case"),
    ({"mode": "anls"}, "hello", "hallo", (0.8, "ok"), "1 of 5 characters wrong"),
    ({"mode": "anls"}, "hello", "helloworld", (0.5, "ok"), "half of the longer text"),
    ({"mode": "anls"}, "hello", "hello world", WRONG, "below the threshold"),
    ({"mode": "anls"}, "hello", "jelly", (0.6, "ok"), "2 of 5 characters wrong"),
    ({"mode": "anls"}, "cat", "dog", WRONG, "nothing in common"),
    ({"mode": "anls"}, '["hello", "hallo you"]', "hallo", (0.8, "ok"), "the nearest variant"),
    ({"mode": "anls"}, "hello", "hello" * 20_000, WRONG, "a flood"),
    ({"mode": "anls"}, "ab" * 2000, "ba" * 2000, (1 - 2 / 4000, "ok"), "long texts"),
]

LIST = [
    ("1, 2, 3", "1, 2, 3", RIGHT, "the same"),
    ("1, 2, 3", "[1, 2, 3]", RIGHT, "brackets"),
    ("1, 2, 3", r"\left(1;\ 2;\ 3\right)", RIGHT, "semicolons"),
    ("[1, 2, 3]", "1.0,2.00,3", RIGHT, "numbers"),
    ("1, 2", r"\frac{2}{2}, \text{2 cm}", RIGHT, "numbers"),
    ("1, 2, 3", "1, 3, 2", WRONG, "order"),
    ("1, 2, 3", "1, 2", WRONG, "a part"),
    ("1, 2", "1, 2, 2", WRONG, "twice"),
    ("1, 2", "1, 2, 3", WRONG, "more"),
    ("1 cm, 2 cm", "1 m, 2 m", WRONG, "other units"),
    ("red, blue", "Red, blue.", RIGHT, "texts"),
    ("red, blue and green", "red, blue, and green", RIGHT, "and"),
    ("red, blue", "red and blue", RIGHT, "and"),
    ("red, blue", '["red", "blue"]', RIGHT, "JSON"),
    ("red, blue", "'red', 'blue'", RIGHT, "quotes"),
    ('["salt and pepper", "oil"]', "salt and pepper, oil", RIGHT, "and within an item of the gold"),
    ('["oil", "salt and pepper"]', "oil, salt and pepper", RIGHT, "and within an item of the gold"),
    ('["1,000", "2"]', "1,000; 2", RIGHT, "semicolons keep thousands separators"),
    ("1000, 2", "1,000, 2", WRONG, "a comma separates"),
    ("(1, 2), (3, 4)", "(1, 2), (3, 4)", RIGHT, "commas within brackets"),
    ("a (b, c), d", "[a (b, c), d]", RIGHT, "commas within brackets"),
    ("5", "5", RIGHT, "one item"),
    ("[]", "[]", RIGHT, "nothing"),
    ("[]", r"\emptyset", RIGHT, "nothing"),
    ("[]", r"\{\}", RIGHT, "nothing"),
    ("[]", r"\text{}", UNPARSABLE, "no items is not the list of none"),
    ("[]", "1", WRONG, "not nothing"),
    ("[true, 1]", "true, 1", RIGHT, "truth values"),
    ("1, 2", "1,,2", UNPARSABLE, "an empty item"),
    ("1, 2", ",", UNPARSABLE, "an empty item"),
    ("1, 2", "[[1, 2]]", UNPARSABLE, "a list of lists"),
    ("1, 2", ",".join(map(str, range(257))), UNPARSABLE, "a flood"),
    ("1, 2", "[" * 5000, WRONG, "no list, but an item"),
    ("3, 4", "three, four", RIGHT, "numbers in words"),
    ("3, 4", "three, five", WRONG, "numbers in words"),
    ("(1, 2), (3, 4)", "(1,2),(3,4)", RIGHT, "white space"),
    ("(1, 2), (3, 4)", "(1,2),(4,3)", WRONG, "white space"),
    ("red, blue", "red\nblue", RIGHT, "lines"),
    ("red, blue", "\\text{\nred\n\nblue\n}", RIGHT, "lines"),
    ("red, blue", "red\ngreen", WRONG, "lines"),
    ("red, blue", "red,\nblue", RIGHT, "lines with commas"),
    ("red, blue", '[\n"red",\n"blue"\n]', RIGHT, "JSON on lines"),
    ("red car, blue", "red\ncar, blue", RIGHT, "a line that is wrapped"),
    ("1, 2", "$1$, $2$", RIGHT, "each in dollar signs"),
    ("€5, $6", "$5, $6", WRONG, "dollar signs that are no pair"),
    ("2 dogs, 3 cats", "2 cats, 3 dogs", WRONG, "other things"),
    ("2 dogs, 3 cats", "2 Dogs, 3 Cats", RIGHT, "the same things"),
]

SET = [  # settings, gold, box, expected, rule
    ({}, "1, 2, 3", r"\{3, 1, 2\}", RIGHT, "order"),
    ({}, "1, 2", "1, 2, 2.0, 1", RIGHT, "twice counts once"),
    ({}, "1, 1, 2", "2, 1", RIGHT, "twice in the gold counts once"),
    ({}, "1, 2", "1", WRONG, "a part"),
    ({}, "1, 2", "1, 2, 3", WRONG, "more"),
    ({}, "red, blue", "blue and red", RIGHT, "texts"),
    ({}, "[]", "{}", RIGHT, "nothing"),
    ({}, "1, 2", "[]", WRONG, "nothing"),
    ({"partial": "f1"}, "1, 2", "2, 1", RIGHT, "all"),
    ({"partial": "f1"}, "1, 2", "1", (2 / 3, "ok"), "precision 1, recall 1/2"),
    ({"partial": "f1"}, "1, 2", "1, 3", (1 / 2, "ok"), "precision 1/2, recall 1/2"),
    ({"partial": "f1"}, "1, 2", "1, 1.0, 1.00, 3", (1 / 2, "ok"), "twice counts once"),
    ({"partial": "f1"}, "1, 2", "3", WRONG, "nothing right"),
    ({"partial": "f1"}, "1, 2", ",".join(map(str, range(1, 99))), (2 * 2 / 100, "ok"), "a flood costs precision"),
    ({"partial": "f1"}, "[]", "1", WRONG, "not nothing"),
    ({"partial": "f1"}, "1 cm, 1 m", "1 m, 1 cm", RIGHT, "the same"),
    ({"partial": "f1"}, "1 cm, 1 m", "1", (2 / 3, "ok"), "one item is not two"),
    ({"partial": "f1"}, "1 cm, 1 m", "1, 1", (2 / 3, "ok"), "one item is not two"),
    ({"partial": "f1"}, "1 cm, 1 m, 2", "1 km, 2", (2 / 5, "ok"), "another unit"),
    ({}, "1 cm, 1 m", "1", WRONG, "one item is not two"),
    ({}, "3, 4", "four, three", RIGHT, "numbers in words"),
    ({}, "red, blue", "blue\nred", RIGHT, "lines"),
]

INTERVAL = [
    ("(1, 2]", "(1,2]", RIGHT, "the same"),
    ("(1, 2]", r"\left(1, \frac{4}{2}\right]", RIGHT, "sized, a fraction"),
    ("(1, 2]", "(1; 2.0]", RIGHT, "semicolon"),
    ("(1, 2]", r"x \in (1, 2]", RIGHT, "an element"),
    ("(1, 2]", "[1, 2]", WRONG, "closed"),
    ("(1, 2]", "(1, 2)", WRONG, "open"),
    ("(1, 2]", "(1, 3]", WRONG, "another end"),
    ("(1, 2]", "1, 2", UNPARSABLE, "no brackets"),
    ("(1, 2]", "(2, 1]", UNPARSABLE, "empty"),
    ("(1, 2]", "(1, 1]", UNPARSABLE, "empty"),
    ("[1, 1]", "[1, 1]", RIGHT, "a point"),
    ("(1, 2]", "(1, 2, 3]", UNPARSABLE, "three ends"),
    ("(1, 2]", "(1, x]", UNPARSABLE, "no number"),
    (r"(3, \infty)", "(3, ∞)", RIGHT, "infinity"),
    (r"(3, \infty)", r"(3, +\infty)", RIGHT, "infinity"),
    ("(-∞, 3]", "(−∞, 3]", RIGHT, "Unicode minus"),
    ("(-inf, inf)", r"(-\infty, \infty)", RIGHT, "everything"),
    (r"(3, \infty)", r"(3, \infty]", UNPARSABLE, "closed at infinity"),
    (r"(3, \infty)", r"(3, -\infty)", UNPARSABLE, "empty"),
    (r"(3, \infty)", r"(3, 2^9)", UNPARSABLE, "no number that is read"),
    (r"(3, \infty)", r"(3, 10^9)", WRONG, "large is not infinite"),
    ("[1 m, 2 m]", "[1 m, 2 meters]", RIGHT, "units"),
    ("[1 m, 2 m]", "[1, 2]", RIGHT, "units left out"),
    ("[1 m, 2 m]", "[1, 2 m]", RIGHT, "one unit for both ends"),
    ("[1, 2]", "[1 m, 2 m]", RIGHT, "units added"),
    ("[1 m, 2 m]", "[1 cm, 2 cm]", WRONG, "other units"),
    ("[1 m, 2 m]", "[1 cm, 2 m]", UNPARSABLE, "two units"),
    ("[1 m, 2 m] U [3 m, 4 m]", "[1 m, 2 m] U [3 cm, 4 cm]", UNPARSABLE, "two units"),
    ("[1 m, 2 m] U [3 m, 4 m]", "[1, 2] U [3 m, 4 m]", RIGHT, "one unit for all"),
    (r"[1 m, \infty)", r"[1 cm, \infty)", WRONG, "other units"),
    (r"(3, \infty)", "(3, 1e300)", WRONG, "large is not infinite"),
    (r"(0, 1) \cup (2, 3)", "(2,3) ∪ (0,1)", RIGHT, "order of a union"),
    ("(0, 1) U (2, 3)", r"(0, 1)\cup(2, 3)", RIGHT, "letter U"),
    (r"(0, 1) \cup (2, 3)", "(0, 1)", WRONG, "a part"),
    (r"(0, 1) \cup (2, 3)", "(0, 3)", WRONG, "the gap"),
    ("(0, 3)", r"(0, 2) \cup (1, 3)", RIGHT, "overlapping"),
    ("(0, 3)", r"(0, 1] \cup (1, 3)", RIGHT, "touching, with the point between"),
    ("(0, 3)", r"(0, 1) \cup (1, 3)", WRONG, "touching, without the point between"),
    ("(0, 3]", r"(0, 3] \cup (1, 2)", RIGHT, "within another"),
    ("(0, 3]", r"(0, 3) \cup [3, 3]", RIGHT, "a point that closes"),
    ("[0.3333333, 1)", "[1/3, 1)", RIGHT, "within a millionth"),
    ("(1, 2]", "(1, 2]" * 20_000, UNPARSABLE, "a flood"),
]

BLOCK = '```json\n{{"answer": "{}"}}\n```'
FENCED = 'So:\n```json\n{"answer": 5}\n```'
JSON_FIELD = [  # settings, gold, completion, expected, rule
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "Cat"}}', RIGHT, "text by default"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "dog"}}', WRONG, "another text"),
    ({}, '{"answer": "cat", "why": 1}', r'\boxed{{"why": 2, "answer": "cat"}}', RIGHT, "other fields"),
    ({}, '{"answer": "cat"}', r"\boxed{cat}", UNPARSABLE, "no object"),
    ({}, '{"answer": "cat"}', r'\boxed{["cat"]}', UNPARSABLE, "no object"),
    ({}, '{"answer": "cat"}', r'\boxed{{"reply": "cat"}}', UNPARSABLE, "no such field"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": null}}', UNPARSABLE, "no value"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": {"answer": "cat"}}}', UNPARSABLE, "an object"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": [["cat"]]}}', UNPARSABLE, "an array of arrays"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "dog", "answer": "cat"}}', UNPARSABLE, "a key twice"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "cat", "x": NaN}}', UNPARSABLE, "NaN"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "cat", "x": ' + "[" * 9999 + "]" * 9999 + "}}", UNPARSABLE, "deep"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "\ud800"}}', UNPARSABLE, "half of a surrogate pair"),
    ({}, '{"answer": "cat"}', r'\boxed{{"answer": "cat}', UNPARSABLE, "cut off"),
    ({}, '{"answer": "cat"}', r'\boxed{\{"answer": "cat"\}}', RIGHT, "escaped braces"),
    ({}, '{"answer": "cat"}', r'\boxed{\text{{"answer": "cat"}}}', RIGHT, "styled"),
    ({}, '{"answer": true}', r'\boxed{{"answer": true}}', RIGHT, "a truth value"),
    ({}, '{"answer": "cat"}', BLOCK.format("cat"), RIGHT, "a block"),
    ({}, '{"answer": "cat"}', BLOCK.format("cat} or dog"), UNPARSABLE, "a brace that would close the box"),
    ({}, '{"answer": "cat"}', BLOCK.format("{cat"), UNPARSABLE, "a brace that does not close"),
    ({}, '{"answer": "cat"}', BLOCK.format("cat\\\\"), UNPARSABLE, "a backslash that would escape the box's brace"),
    ({}, '{"answer": "cat"}', BLOCK.format(r"dog \u005cboxed{cat}"), UNPARSABLE, "a box within the value"),
    ({}, '{"answer": "cat"}', BLOCK.format(" "), UNPARSABLE, "a blank value"),
    ({}, '{"answer": "{cat}"}', BLOCK.format("{cat}"), RIGHT, "braces that balance"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED, RIGHT, "a block"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED + "\n" + FENCED.replace("5", "6"), WRONG, "the last block"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED.replace("5", "6") + FENCED, RIGHT, "the last block"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED + r"\boxed{6}", UNPARSABLE, "a box goes before blocks"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED.replace("json", ""), UNPARSABLE, "a block of something"),
    ({"verifier": "number"}, '{"answer": 5}', FENCED[:-3], UNPARSABLE, "a block that is cut off"),
    ({"verifier": "number"}, '{"answer": 5}', r'\boxed{{"answer": "5.0 cm"}}', RIGHT, "a number in a text"),
    ({"verifier": "number"}, '{"answer": 5}', r'\boxed{{"answer": "five or six"}}', UNPARSABLE, "no number"),
    ({"verifier": "number"}, '{"answer": 5}', r'\boxed{{"answer": 1e999}}', UNPARSABLE, "not finite"),
    ({"verifier": "count"}, '{"answer": 5}', r'\boxed{{"answer": "five"}}', RIGHT, "a count"),
    ({"verifier": "choice"}, '{"answer": "B"}', r'\boxed{{"answer": "blue"}}', RIGHT, "a choice"),
    ({"verifier": "set"}, '{"answer": [1, 2]}', r'\boxed{{"answer": [2, 1]}}', RIGHT, "an array"),
    ({"verifier": "list"}, '{"answer": [1, 2]}', r'\boxed{{"answer": [2, 1]}}', WRONG, "an array"),
    ({"verifier": "interval"}, '{"answer": "(1, 2)"}', r'\boxed{{"answer": "(1,2)"}}', RIGHT, "an interval"),
    ({"field": "a.b"}, '{"a": {"b": "x"}}', r'\boxed{{"a": {"b": "X"}}}', RIGHT, "a path"),
    ({"field": "a.b"}, '{"a": {"b": "x"}}', r'\boxed{{"a": "x"}}', UNPARSABLE, "half of the path"),
    ({"field": "a.b"}, '{"a": {"b": "x"}}', r'\boxed{{"a.b": "x"}}', UNPARSABLE, "a key with a dot"),
]

TABLE = [
    *(("choice", {}, gold, rf"\boxed{{{box}}}", *rest) for gold, box, *rest in CHOICE),
    *(("number", options, gold, rf"\boxed{{{box}}}", *rest) for options, gold, box, *rest in NUMBER),
    *(("count", {}, gold, rf"\boxed{{{box}}}", *rest) for gold, box, *rest in COUNT),
    *(("text", options, gold, rf"\boxed{{{box}}}", *rest) for options, gold, box, *rest in TEXT),
    *(("list", {}, gold, rf"\boxed{{{box}}}", *rest) for gold, box, *rest in LIST),
    *(("set", options, gold, rf"\boxed{{{box}}}", *rest) for options, gold, box, *rest in SET),
    *(("interval", {}, gold, rf"\boxed{{{box}}}", *rest) for gold, box, *rest in INTERVAL),
    *(("json_field", *row) for row in JSON_FIELD),
]


def record(kind: str, gold: str, **options) -> PromptRecord:
    settings = tuple(options.items())
    return PromptRecord("toy/7", "problem", (), (), gold, kind, "toy", COLORS, settings=settings)


@pytest.mark.parametrize(
    ("kind", "options", "gold", "reply", "expected", "rule"),
    TABLE,
    ids=[f"{row[0]}-{i}-{row[-1]}" for i, row in enumerate(TABLE)],
)
def test_verdicts(kind, options, gold, reply, expected, rule) -> None:
    verdict = verify(kind, reply, gold, choices=COLORS, **options)
    assert (pytest.approx(verdict.score), verdict.status) == expected, rule
    assert (verdict.parsed is None) == (verdict.status == "unparsable")
    assert bool(verdict.detail) == (verdict.status != "ok")
    check_gold(record(kind, gold, **options))
    assert verify(kind, "no answer", gold, choices=COLORS, **options).status == "unparsable"


@pytest.mark.parametrize(
    ("kind", "gold", "options"),
    [
        ("choice", "A or C", {}),
        ("choice", "A, E", {}),
        ("choice", "AE", {}),
        ("number", "twenty-one", {}),
        ("count", "-1", {}),
        ("count", "5 dogs", {}),
        ("count", "2.5", {}),
        ("count", "", {}),
        ("text", "", {}),
        ("text", "**", {}),
        ("text", "[]", {}),
        ("text", '["a", ""]', {}),
        ("text", "x" * 4001, {"mode": "anls"}),
        ("list", "", {}),
        ("list", "1,,2", {}),
        ("list", "[[1], [2]]", {}),
        ("list", "[1, null]", {}),
        ("set", ",".join(map(str, range(300))), {}),
        ("interval", "5", {}),
        ("interval", r"(1, \sqrt{2})", {}),
        ("interval", "(2, 1)", {}),
        ("json_field", "5", {}),
        ("json_field", '{"reply": 5}', {}),
        ("json_field", '{"answer": {}}', {}),
        ("json_field", '{"answer": "fifty"}', {"verifier": "number"}),
    ],
)
def test_a_gold_that_means_nothing_is_a_bad_record(kind: str, gold: str, options: dict) -> None:
    for reply in ("no box", r'\boxed{{"answer": 1}}'):
        with pytest.raises(BadRecordError, match=r"^toy/7: .*gold"):
            get_verifier(kind)(reply, record(kind, gold, **options))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("number", {"relative": -0.1}, "allowed: a finite number from 0"),
        ("number", {"relative": math.nan}, "allowed: a finite number from 0"),
        ("number", {"absolute": math.inf}, "allowed: a finite number from 0"),
        ("number", {"relative": "5%"}, "number: relative: found '5%'; allowed: float"),
        ("number", {"percent": "both"}, "number: percent: found 'both'; allowed: 'same', 'fraction'"),
        ("text", {"mode": "fuzzy"}, "allowed: 'normalized', 'exact', 'anls'"),
        ("set", {"partial": True}, "allowed: 'none', 'f1'"),
        ("list", {"partial": "f1"}, "'partial' is not a setting; allowed: none"),
        ("json_field", {"verifier": "math"}, "json_field: verifier: found 'math'"),
    ],
)
def test_settings_are_checked(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(kind, r"\boxed{5}", "5", **options)


def test_kinds_without_a_deadline() -> None:
    assert {row[0] for row in TABLE} <= INLINE


# ── edit distance ──


def table_distance(a: str, b: str) -> int:
    """The usual table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", max_size=12))
def test_edit_distance_is_that_of_the_table(a: str, b: str) -> None:
    assert edit_distance(a, b) == table_distance(a, b)


@given(st.text(alphabet="abc", min_size=1, max_size=80), st.text(alphabet="abc", min_size=1, max_size=80))
def test_similarity_is_symmetric_and_cut_at_the_threshold(a: str, b: str) -> None:
    value = 1 - table_distance(a, b) / max(len(a), len(b))
    assert similarity(a, b) == similarity(b, a) == (value if value >= 0.5 else 0)
