"""Personal data is found, nothing else is, and masking keeps the rest of a text in
place."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.corpus.pii import KINDS, Kind, PiiMatch
from maxlm.corpus.stages.pii import PiiStage, find_pii, mask_pii
from tests.corpus.corpora import label_texts

SETTINGS_REGIONS = PiiStage().regions
REGIONS = {
    "en_US": "US",
    "en_GB": "GB",
    "de_DE": "DE",
    "fr_FR": "FR",
    "es_ES": "ES",
    "it_IT": "IT",
}


def finds(text: str) -> list[tuple[str, str]]:
    return [(m.kind, text[m.start : m.end]) for m in find_pii(text, SETTINGS_REGIONS)]


# Worded apart from benchmarks/corpus_pii.py, whose sentences the detectors were tuned
# on.
HOLDERS: dict[Kind, tuple[str, ...]] = {
    "email": (
        "Replies go to {}, please.",
        "mailto:{}",
        "Author: A. Smith <{}>",
        "ask {}!",
    ),
    "phone": (
        "You can phone us on {} any day.",
        "T: home\nTel.: {}\n",
        "his cell ({}) was off",
        "{} is the switchboard.",
        "mobile/WhatsApp {}",
        "{}\nOpening hours: nine to five.",
    ),
    "ip": (
        "blocked {} for an hour",
        "src={} dst=10.0.0.1",
        "{} was unreachable",
        "[{}]",
    ),
    "iban": ("Transfer it to {}, quoting your name.", "Bank details {}", "({})"),
    "card": (
        "I paid with {} yesterday",
        "card={}",
        "Mastercard or Visa: {}",
        "number {} (valid)",
    ),
    "ssn": ("born 1980, SSN {}", "{} was on the form", "Social Security No. {}."),
    "key": ('"client_secret": "{}"', "TOKEN={}", "apiKey: {}", "password={}"),
}
HARMLESS = (
    "Release 2.14.0.1 fixes #48213.",
    "On 2021-11-03 10:22:31,123 the job took 00:14:59.",
    "ISBN 978-3-16-148410-0, pp. 1203-1290, doi:10.1000/182.",
    "Your order 4482190034 (invoice 2023-004512) has shipped.",
    "Sales rose from 1.234.567 to 2,345,678 (+90.1%), or 3 456 789 in all.",
    "x = 0.30103 * 1e-9 + 6.02214076e23 / 299792458",
    "cc @jane_doe: decorated with @app.route, see logo@2x.png",
    "see 127.0.0.1, 10.1.2.3, 192.168.0.17, 2001:db8::1, fe80::1 and ::1",
    "secret = os.environ['SECRET'] or get_secret_from_vault()",
    "20230415123059 was the build, 1700000000 the time.",
    "Boston, MA 02110-1301; clause 252.227-7013",
    "git@gitlab.com:group/project.git at 12:34:56:78",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "11.1.7.1. Integrating it with LDAP",
    "Invoice no. 030 1234567 is due.",
    "password: aaaaaaaaaaaa1111222",
    "secret_key = SomeVeryLongClassNameFactory",
    "| 10 | 200 | 3000 | 40000 |\n| 1234567 | 7654321 |",
)


def make(kind: str, fake, american, rng: random.Random) -> str:
    match kind:
        case "ip":
            return rng.choice([fake.ipv4_public(), "2a00:1450:4001:81b::200e"])
        case "card":
            return fake.credit_card_number(rng.choice(["visa16", "amex"]))
        case "ssn":
            return american.ssn()
        case "key":
            return "".join(rng.choices("abcdefABCDEF0123456789xyzXYZ", k=32))
        case "phone":
            return fake.phone_number()
    return fake.email() if kind == "email" else fake.iban()


def generated(count: int, seed: int) -> list[tuple[str, set[PiiMatch]]]:
    """Prose with personal data at known places, and with sentences that only look like
    it."""
    from faker import Faker

    rng = random.Random(seed)
    documents = []
    fakes = {locale: Faker(locale) for locale in REGIONS}
    for number, fake in enumerate(fakes.values()):
        fake.seed_instance(seed + number)
    for _ in range(count):
        locale = rng.choice(list(REGIONS))
        fake = fakes[locale]
        text = ""
        truth = set()
        pieces: list[tuple[Kind | None, str]] = []
        pieces.extend((None, fake.paragraph()) for _ in range(3))
        pieces.extend((None, rng.choice(HARMLESS)) for _ in range(3))
        pieces.extend((k, rng.choice(HOLDERS[k])) for k in rng.choices(KINDS, k=3))
        rng.shuffle(pieces)
        for kind, piece in pieces:
            if kind:
                value = make(kind, fake, fakes["en_US"], rng)
                start = len(text) + piece.index("{}")
                truth.add(PiiMatch(start, start + len(value), kind))
                piece = piece.replace("{}", value)
            text += piece + rng.choice("\n ")
        documents.append((text, truth))
    return documents


def test_recall_and_precision_on_generated_text():
    num_true = Counter()
    num_found = Counter()
    num_right = Counter()
    for text, truth in generated(250, seed=3):
        matches = set(find_pii(text, SETTINGS_REGIONS))
        num_true.update(match.kind for match in truth)
        num_found.update(match.kind for match in matches)
        num_right.update(match.kind for match in truth & matches)
    assert num_right.total() / num_true.total() >= 0.95
    assert num_right.total() / num_found.total() >= 0.95
    for kind in KINDS:
        assert num_true[kind] > 50
        assert num_right[kind] / num_true[kind] >= (
            0.85 if kind == "phone" else 0.98
        ), kind
        assert num_right[kind] / num_found[kind] >= 0.9, kind


@pytest.mark.parametrize("sentence", HARMLESS)
def test_harmless_sentences_hold_nothing(sentence):
    assert finds(sentence) == []


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("email", "first.last+tag@mail.example.co.uk", "To: {}."),
        ("email", "jörg@müller.de", "Jörg, {}"),
        ("email", "a@b.io", "邮箱{}。"),
        ("phone", "+49 (0) 30 123456", "Büro {}"),
        ("phone", "(212) 268-7393", "Voice {}, fax later"),
        ("phone", "01 42 68 53 00", "Mairie, {}"),
        ("phone", "06.12.34.56.78", "Paul, {}"),
        ("phone", "555-867-5309x12", "dial {}!"),
        ("phone", "020 7946 0958", "London {}"),
        ("phone", "612 345 678", "Teléfono: {}"),  # also thousands
        ("ip", "8.26.56.126", "resolver {}."),
        ("ip", "2606:4700:4700::1111", "AAAA {}"),
        ("iban", "GB82 WEST 1234 5698 7654 32", "IBAN {} AND MORE 1234"),
        ("iban", "DE89370400440532013000", "({})"),
        ("card", "4111 1111 1111 1111", "card {} 12/27"),
        ("card", "3782-822463-10005", "Amex {}"),
        ("ssn", "536-90-4399", "number {}"),
        ("ssn", "536904399", "social security number {}"),
        ("ssn", "351-82-9233", "patient no. {}"),
        ("ssn", "351-82-9233", "SSN, as on the order: {}"),
        ("key", "AKIAIOSFODNN7EXAMPLE", "aws {}"),
        ("key", "ghp_" + "aB3" * 12, "clone with {}"),
        ("key", "s3cr3t-pa55", "postgres://user:{}@db.internal/x"),
        (
            "key",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
            "{}",
        ),
        (
            "key",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
            "a {} b",
        ),
    ],
)
def test_each_way_of_writing_is_found_whole(kind, value, text):
    assert finds(text.format(value)) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn
        "9111111111111111",  # no issuer
        "GB83 WEST 1234 5698 7654 32",  # remainder
        "GB82 WEST 1234 5698 7654",  # too short for its country
        # never given out
        "666-12-3456 900-12-3456 123-00-4567 123-45-0000 078-05-1120",
        "536904399",  # no word beside it
        "part no. 351-82-9233",
        "Serial number: 351-82-9233; model 351-82-9233",
        "Item 351-82-9233, order 351-82-9233, catalogue no. 351-82-9233",
        "300.1.2.3 and 1.2.3.4.5",
        "w@x.shape",
        "@user@mastodon.social",
    ],
)
def test_what_fails_a_check_is_nothing(text):
    assert finds(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ask bob@gmail.com.She knows", ["bob@gmail.com"]),
        ("ask bob@gmail.com.So what", ["bob@gmail.com"]),
        ("bob@example.co.uk.Tel 12", ["bob@example.co.uk"]),
        ("mail bob@example.com-- thanks", ["bob@example.com"]),
        ("bob@example.com-alice@x.org", ["bob@example.com", "alice@x.org"]),
        ("bob@example.com.alice@x.org", ["bob@example.com", "alice@x.org"]),
        ("bob@example.com." + "x" * 70, ["bob@example.com"]),
        ("bob@example.com" + "x" * 70, []),
        ("a@my-company.co-op.com", ["a@my-company.co-op.com"]),
        ("git@gitlab.my-company.local", []),
        ("bob@mail.xn--fiqs8s", ["bob@mail.xn--fiqs8s"]),
        # The list of public suffixes has only names below these two.
        (
            "thandi@sun.ac.za, nabin@mpp.org.np",
            ["thandi@sun.ac.za", "nabin@mpp.org.np"],
        ),
    ],
)
def test_an_address_ends_with_its_domain_whatever_follows(text, expected):
    assert finds(text) == [("email", address) for address in expected]


CARDS = ("4111 1111 1111 1111", "5500 0000 0000 0004")
IBANS = ("AT61 1904 3002 3457 3201", "DE89 3704 0044 0532 0130 00")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Visa 2024 {CARDS[0]}", [("card", CARDS[0])]),
        (" ".join(CARDS), [("card", card) for card in CARDS]),
        (" ".join(IBANS), [("iban", card) for card in IBANS]),
        (f"AB12 CD34 {IBANS[1]}", [("iban", IBANS[1])]),
    ],
)
def test_a_number_that_is_none_does_not_hide_the_next(text, expected):
    assert finds(text) == expected


@given(
    st.text(max_size=60),
    st.lists(st.integers(0, 60), max_size=10),
    st.sets(st.sampled_from(KINDS)),
)
def test_masked_and_original_align(text, cuts, masked_kinds):
    cuts = sorted({cut for cut in cuts if cut <= len(text)})
    places = zip(cuts[::2], cuts[1::2], strict=False)
    matches = [
        PiiMatch(start, end, KINDS[i % len(KINDS)])
        for i, (start, end) in enumerate(places)
    ]
    placeholders = {kind: f"<{kind}>" for kind in masked_kinds}
    new, spans = mask_pii(text, matches, placeholders)
    is_masked = any(match.kind in masked_kinds for match in matches)
    assert (new is not None) == is_masked
    assert [(span["start"], span["end"], span["kind"]) for span in spans] == matches
    # Between the spans, both texts are the same.
    old_at = new_at = 0
    for span in spans:
        if new is not None and span["masked_start"] is not None:
            assert new[new_at : span["masked_start"]] == text[old_at : span["start"]]
            assert new[span["masked_start"] : span["masked_end"]] == f"<{span['kind']}>"
            old_at = span["end"]
            new_at = span["masked_end"]
        else:
            assert span["kind"] not in masked_kinds
    assert new is None or new[new_at:] == text[old_at:]


def test_labels_of_a_batch():
    texts = ["", "nothing\0here", "😀 a@example.com, +44 20 7946 0958 or b@example.com"]
    empty, plain, full = label_texts(PiiStage(), *texts)
    assert empty["text"] is None
    assert plain["text"] is None
    assert plain["count"] == 0
    assert plain["spans"] == []
    assert full["text"] == "😀 <EMAIL>, <PHONE> or <EMAIL>"
    assert full["count"] == 3
    assert full["email"] == 2
    assert full["phone"] == 1
    assert full["ip"] == 0
    assert list(full["spans"][1].values()) == [17, 33, "phone", 11, 18]


def test_only_chosen_kinds_are_masked_and_by_chosen_words():
    text = "a@example.com, 4111111111111111"
    cards_only = PiiStage(mask=("card",), placeholders={"card": "[card]"})
    (chosen,) = label_texts(cards_only, text)
    assert chosen["text"] == "a@example.com, [card]"
    assert [span["masked_start"] for span in chosen["spans"]] == [None, 15]
    (counted,) = label_texts(PiiStage(mask=()), text)
    assert counted["count"] == 2
    assert "text" not in counted
    with pytest.raises(ValidationError, match="placeholders for email"):
        PiiStage(mask=("card",), placeholders={"card": "", "email": ""})


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit",
    ["@", "a@", "a.", "1", "1 ", "12 34 567 ", "+1", "(", "1.1.", "2001:", "eyJ", "key=", "key=a1",
     "-----BEGIN PRIVATE KEY-----", "://a:b", "AB12 ", "x" * 50 + "1",
     "a@b.", "a@b.com-", "a@b.com.", "a@" + "b-" * 30 + ".", "4111 ", "4111-", "AT61 1904 "],
)  # fmt: skip
def test_a_long_line_takes_time_in_proportion(unit):
    """A quadratic pattern would run for minutes on these."""
    find_pii(unit * (300_000 // len(unit)), SETTINGS_REGIONS)


def test_mistakes_are_named():
    with pytest.raises(MaxlmError, match="numbering plan"):
        PiiStage(regions=("UK",)).make_batch_label_fn()
