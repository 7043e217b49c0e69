"""Personal data: recall and precision on generated documents, and speed on real ones.

    python benchmarks/corpus_pii.py [--documents 2000] [--seed 0] [--texts GLOB...]
    [--plot PNG]

Documents are prose of Faker's (`pip install faker`) in several languages, with
sentences in between that hold personal data (known places), and others that hold what
only looks like it: versions, dates, ISBNs, order numbers, hashes, prices, code. A find
counts where kind, start and end are right; "touching" counts any overlap of the same
kind. With `--texts` the speed is measured on text files too, and the finds there are
printed a megabyte by kind, to be read (`--show` N of each).
"""

import argparse
import glob
import random
import string
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa

from maxlm.corpus.pii import KINDS, PiiMatch
from maxlm.corpus.stages.pii import PiiStage, find_pii

REGIONS = {
    "en_US": "US",
    "en_GB": "GB",
    "de_DE": "DE",
    "fr_FR": "FR",
    "es_ES": "ES",
    "it_IT": "IT",
    "nl_NL": "NL",
    "pl_PL": "PL",
    "pt_BR": "BR",
}
CALLS = {
    "en": (
        "Call {} before noon.",
        "Phone: {}",
        "My mobile is {}, I am in after six.",
        "Fax {}.",
    ),
    "de": (
        "Rufen Sie {} an.",
        "Telefon: {}",
        "Meine Handynummer ist {}.",
        "Tel. {} (abends)",
    ),
    "fr": (
        "Appelez le {} avant midi.",
        "Téléphone : {}",
        "Tél. {}",
        "Mon portable est le {}.",
    ),
    "es": (
        "Llame al {} por la tarde.",
        "Teléfono: {}",
        "Mi móvil es el {}.",
        "Tel. {}",
    ),
    "it": (
        "Chiami il {} dopo le sei.",
        "Telefono: {}",
        "Il mio cellulare è {}.",
        "Tel. {}",
    ),
    "nl": ("Bel {} voor negen uur.", "Telefoon: {}", "Mijn mobiele nummer is {}."),
    "pl": ("Proszę dzwonić: {}.", "Telefon: {}", "Tel. kom. {}"),
    "pt": ("Ligue para {} de manhã.", "Telefone: {}", "Meu celular é {}."),
}
PLAIN_CALLS = (
    "{name}, {}, {city}",
    "{name} ({}) will be there.",
    "{name} | {} | {city}",
)
SENTENCES = {
    "email": (
        "Write to {} today.",
        "Contact: {}",
        "<{}> wrote:",
        "{name} ({}) agreed.",
        "({})",
    ),
    "ip": (
        "Login from {} failed.",
        "The host {} answered.",
        '{} - - "GET / HTTP/1.1" 200',
        "IP: {}",
    ),
    "iban": (
        "Please pay to {} by Friday.",
        "IBAN: {}",
        "account {}, thank you",
        "IBAN {}.",
    ),
    "card": (
        "My card is {}, expiring soon.",
        "Card number: {}",
        "charged to {} today",
        "Visa {}.",
    ),
    "ssn": (
        "SSN: {}",
        "His social security number is {}.",
        "{name}, {}, {city}",
        "SSN {}",
    ),
    "key": (
        "api_key = '{}'",
        "Authorization: Bearer {}",
        "export SECRET_TOKEN={}",
        "secret: {}",
    ),
}


def token(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


ALPHANUMERIC = string.ascii_letters + string.digits


def make_key(rng: random.Random) -> str:
    """A token as one of several issuers writes it, or random characters."""
    upper = string.ascii_uppercase + "234567"
    base64 = ALPHANUMERIC + "-_"
    return rng.choice(
        [
            lambda: "AKIA" + token(rng, upper, 16),
            lambda: "ghp_" + token(rng, ALPHANUMERIC, 36),
            lambda: (
                f"xoxb-{token(rng, string.digits, 11)}-{token(rng, ALPHANUMERIC, 24)}"
            ),
            lambda: "AIza" + token(rng, base64, 34) + "x",
            lambda: "sk_live_" + token(rng, ALPHANUMERIC, 24),
            lambda: (
                f"eyJ{token(rng, base64, 30)}.eyJ{token(rng, base64, 60)}.{token(rng, base64, 42)}0"
            ),
            lambda: token(rng, "0123456789abcdef", 40),
            lambda: token(rng, ALPHANUMERIC, 32),
        ]
    )()


def make(kind: str, fake, rng: random.Random) -> str:
    """A value of a kind, in one of the ways people write it."""
    match kind:
        case "email":
            return fake.email() if rng.random() < 0.7 else fake.company_email().title()
        case "phone":
            return fake.phone_number()
        case "ip" if rng.random() < 0.7:
            return fake.ipv4_public()
        case "ip":
            return f"2a0{rng.randrange(10)}:{fake.ipv6().split(':', 1)[1]}"
        case "iban":
            value = fake.iban()
            return (
                value
                if rng.random() < 0.5
                else " ".join(value[i : i + 4] for i in range(0, len(value), 4))
            )
        case "card":
            value = fake.credit_card_number(
                rng.choice(["visa16", "mastercard", "amex", "discover"])
            )
            if len(value) != 16 or rng.random() < 0.4:
                return value
            return rng.choice(" -").join(value[i : i + 4] for i in range(0, 16, 4))
        case "ssn":
            return fake.ssn()
    return make_key(rng)


# What only looks personal: % is a digit from 1, # any digit; braces are filled in by
# `decoy`.
DECOYS = (
    "Version %#.##.%.%## is out.",
    "Upgraded from %.#.# to %.%#.#-%.",
    "It began on {date} at {time} and ended %#.%#.20%#.",
    "Timestamp 1%########, 20%##%##%#####.",
    "See {isbn13} and ISBN {isbn10}.",
    "Order %######### shipped; invoice no. 20##-%#####.",
    "Order number %################.",
    "commit {hex40}",
    "sha256: {hex64}",
    "It costs $%,###.## or %##.%##,00 €.",
    "The town has %,%##,### people, % %## ### in the region.",
    "for i in range(%######): total += weights@x.shape[%] / %#####.%#####",
    "Thanks @{user} and @{user}!",
    "pi is 3.14159265358979, e is 2.718281828, and #.%########e-%#.",
    "Saved as IMG_20%##%##_%#####.jpg and icon@%x.png.",
    "id={uuid}",
    "ping 192.168.%#.%## and 127.0.0.1:%###",
    "token = request.headers.get('X-Token-%#', default_token_value)",
    "password: your_password_here_%##, api_key=YOUR-API-KEY-GOES-HERE-%#",
    "at %#.%####, -1##.%##### on the map",
    "pages %##-1###, RFC %###, section %.%#.%.%#",
    "std::vector::size() took 1#:3#:4#.%##",
    "MAC {mac}",
    "git clone git@github.com:{user}/{user}.git",
    "% %# %## %# %### %##",
    "Part %##-%####-AX, lot %######",
    "19##-20##, %##/%##, 10-1#-19##",
)


def decoy(fake, rng: random.Random) -> str:
    """A sentence that holds nothing personal but looks so."""
    sentence = fake.numerify(rng.choice(DECOYS))
    return sentence.format(
        date=fake.date(),
        time=fake.time(),
        isbn13=fake.isbn13(),
        isbn10=fake.isbn10(),
        hex40=token(rng, "0123456789abcdef", 40),
        hex64=token(rng, "0123456789abcdef", 64),
        user=fake.user_name(),
        uuid=uuid.UUID(int=rng.getrandbits(128)),
        mac=fake.mac_address(),
    )


def document(fakes: dict, rng: random.Random) -> tuple[str, set[PiiMatch]]:
    """A text and the personal data in it."""
    locale = rng.choice(list(fakes))
    fake = fakes[locale]
    text = ""
    truth = set()
    sentences: list[str | tuple[str, str]] = [
        fake.paragraph() for _ in range(rng.randint(2, 6))
    ]
    sentences += [decoy(fake, rng) for _ in range(rng.randint(1, 4))]
    for _ in range(rng.randint(0, 4)):
        kind = rng.choice(KINDS)
        if kind == "ssn" and locale != "en_US":
            kind = "phone"
        plain = kind == "phone" and rng.random() < 0.15
        options = SENTENCES.get(kind, PLAIN_CALLS if plain else CALLS[locale[:2]])
        sentences.append((kind, rng.choice(options)))
    rng.shuffle(sentences)
    for sentence in sentences:
        if isinstance(sentence, tuple):
            kind, template = sentence
            template = template.replace("{name}", fake.name()).replace(
                "{city}", fake.city()
            )
            head, tail = template.split("{}")
            value = make(kind, fake, rng)
            truth.add(
                PiiMatch(
                    len(text) + len(head), len(text) + len(head) + len(value), kind
                )
            )  # pyright: ignore[reportArgumentType]
            sentence = head + value + tail
        text += sentence + rng.choice([" ", "\n"])
    return text, truth


def generate(count: int, seed: int) -> list[tuple[str, set[PiiMatch]]]:
    """Documents that depend on the seed only."""
    from faker import Faker

    rng = random.Random(seed)
    fakes = {locale: Faker(locale) for locale in REGIONS}
    for number, fake in enumerate(fakes.values()):
        fake.seed_instance(seed + number)
    return [document(fakes, rng) for _ in range(count)]


def measure(
    matches_by_text: list[list[PiiMatch]], truths: list[set[PiiMatch]]
) -> dict[str, Counter]:
    """Per kind: `true` values, `found` ones, `right` finds; `touched` values,
    `touching` finds."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for matches, truth in zip(matches_by_text, truths, strict=True):
        for m in matches:
            counts[m.kind]["found"] += 1
            counts[m.kind]["right"] += m in truth
            counts[m.kind]["touching"] += any(touch(m, t) for t in truth)
        for t in truth:
            counts[t.kind]["true"] += 1
            counts[t.kind]["touched"] += any(touch(m, t) for m in matches)
    counts["all"] = sum(counts.values(), Counter())
    return counts


def touch(a: PiiMatch, b: PiiMatch) -> bool:
    return a.kind == b.kind and a.start < b.end and b.start < a.end


def plot(counts: dict[str, Counter], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    names = [*KINDS, "all"]
    for shift, label, over in ((-0.2, "recall", "true"), (0.2, "precision", "found")):
        heights = [counts[name]["right"] / max(counts[name][over], 1) for name in names]
        bars = axes.bar(
            [i + shift for i in range(len(names))], heights, 0.38, label=label
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.axhline(0.95, color="C0", linestyle=":")
    axes.axhline(0.9, color="C1", linestyle=":")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0.8, 1.02)
    axes.set_title("Personal data in generated documents; dotted: what to reach")
    axes.legend(loc="lower left")
    FigureCanvasAgg(figure).print_png(str(path))


def speed(name: str, texts: list[str]) -> None:
    """MB/s of the whole stage, mask included; CPU time."""
    label = PiiStage().make_batch_label_fn()
    size = sum(len(text.encode()) for text in texts) / 1e6
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    times = []
    for _ in range(3):
        start = time.process_time()
        label(batch)
        times.append(time.process_time() - start)
    print(
        f"{name}: {len(texts)} texts, {size:.1f} MB, {size / min(times):.1f} MB/s of "
        f"CPU time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", nargs="*", default=[], help="text files, for speed")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument(
        "--show", type=int, default=0, help="print wrong or real finds of each kind"
    )
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    documents = generate(arguments.documents, arguments.seed)
    texts, truths = [text for text, _ in documents], [truth for _, truth in documents]
    regions = tuple(sorted(REGIONS.values()))
    matches_by_text = [find_pii(text, regions) for text in texts]
    counts = measure(matches_by_text, truths)
    print(f"{'':8}{'values':>8}{'recall':>8}{'prec.':>8}   touching: recall, precision")
    for name in (*KINDS, "all"):
        c = counts[name]
        true, finds = max(c["true"], 1), max(c["found"], 1)
        print(
            f"{name:8}{c['true']:8}{c['right'] / true:8.3f}{c['right'] / finds:8.3f}"
            f"{c['touched'] / true:19.3f}{c['touching'] / finds:8.3f}"
        )
    shown: Counter = Counter()
    for text, matches, truth in zip(texts, matches_by_text, truths, strict=True):
        for m in [*(truth - {*matches}), *({*matches} - truth)]:
            wrong = "missed" if m in truth else "wrong"
            shown[wrong, m.kind] += 1
            if shown[wrong, m.kind] <= arguments.show:
                print(wrong, m.kind, repr(text[max(0, m.start - 30) : m.end + 10]))
    if arguments.plot:
        plot(counts, arguments.plot)

    speed("generated", texts)
    real = []
    size = 0
    for path in sorted(
        {p for pattern in arguments.texts for p in glob.glob(pattern, recursive=True)}
    ):
        if size < arguments.megabytes * 1e6:
            real.append(Path(path).read_text("utf-8", errors="replace"))
            size += len(real[-1])
    if real:
        speed("real", real)
        regions = PiiStage().regions
        kinds = Counter()
        shown = Counter()
        for text in real:
            for m in find_pii(text, regions):
                kinds[m.kind] += 1
                if kinds[m.kind] <= arguments.show:
                    print(m.kind, repr(text[max(0, m.start - 30) : m.end + 10]))
        print(
            "finds a MB:", {kind: round(n / size * 1e6, 2) for kind, n in kinds.items()}
        )


if __name__ == "__main__":
    main()
