"""Personal data in a text: where it stands, and the text with it masked.

Phone numbers are found by phonenumberslite (the rules of all countries), numbers of cards, accounts and persons are checked by
python-stdnum. Letters of other scripts may stand right before and behind, as in Chinese, which has no spaces.
"""

import re

import phonenumbers
import stdnum.cn.ric
import stdnum.iban
import stdnum.luhn
import stdnum.us.ssn

LETTER = "A-Za-z0-9\u00c0-\u024f_"  # Latin
EMAIL = re.compile(rf"(?<![{LETTER}.+%-])[{LETTER}.+%-]+@(?:[{LETTER}-]+\.)+[A-Za-z\u00c0-\u024f]{{2,}}")
PHONE = re.compile(r"\d(?:[\s()./-]*\d){6}")  # only what has seven digits is worth phonenumbers' time
CARD_NUMBER = re.compile(rf"(?<![{LETTER}.-])\d(?:[ -]?\d){{12,18}}(?![{LETTER}-])")
SSN = re.compile(rf"(?<![{LETTER}-])\d{{3}}-\d{{2}}-\d{{4}}(?![{LETTER}-])")
CHINESE_ID = re.compile(rf"(?<![{LETTER}-])\d{{17}}[\dXx](?![{LETTER}-])")
IBAN = re.compile(rf"(?<![{LETTER}])[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?(?![{LETTER}])")
SIGNED = re.compile(
    r"(?i:\b(?:regards|sincerely|yours truly|best wishes|cheers|thanks))(?:,|\s{0,3}\n)\s{0,5}((?:[A-Z][\w'’-]+ ?){1,3})"
)
NUMBERS = (
    (IBAN, stdnum.iban.is_valid, "IBAN"),
    (CHINESE_ID, stdnum.cn.ric.is_valid, "ID"),
    (CARD_NUMBER, stdnum.luhn.is_valid, "CARD"),
    (SSN, stdnum.us.ssn.is_valid, "SSN"),
)

Span = tuple[int, int, str]


def personal_data(text: str, region: str = "US") -> list[Span]:
    """(start, end, what) of e-mail addresses, phone, card, social security and Chinese identity numbers, IBANs, and signed names.

    A name is found only under a closing ("Regards, Ann Lee") in a text that has one of the others: templates of letters end
    so, too. Names elsewhere, streets and dates of birth are not found.
    """
    found: list[Span] = []
    if "@" in text:
        found += [(m.start(), m.end(), "EMAIL") for m in EMAIL.finditer(text)]
    if PHONE.search(text):  # the other numbers have seven digits, too
        for pattern, valid, what in NUMBERS:
            found += [(m.start(), m.end(), what) for m in pattern.finditer(text) if valid(re.sub("[ -]", "", m[0]))]
        numbers = phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID)
        found += [(number.start, number.end, "PHONE") for number in numbers]
    if found:
        found += [(m.start(1), m.start(1) + len(m[1].rstrip()), "NAME") for m in SIGNED.finditer(text)]
    return _apart(found)


def _apart(spans: list[Span]) -> list[Span]:
    """In their order, and of two that overlap the one found first: a card's digits may look like a phone number."""
    kept: list[Span] = []
    for start, end, what in spans:
        if all(end <= other[0] or start >= other[1] for other in kept):
            kept.append((start, end, what))
    return sorted(kept)


def masked(text: str, spans: list[Span]) -> str:
    """The text with `[EMAIL]` and so on in place of each span."""
    for start, end, what in reversed(spans):
        text = f"{text[:start]}[{what}]{text[end:]}"
    return text
